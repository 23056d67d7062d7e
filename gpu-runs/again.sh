pkill -9 -f schedule.py; pkill -9 -f benchmarks; sleep 1
rm -rf /tmp/tree/.dev/pack; cp -r .dev/pack /tmp/tree/.dev/pack
mv /tmp/q/log/schedule.txt /tmp/q/log/schedule.before.txt
setsid nohup python3 /tmp/tree/.dev/pack/schedule.py /tmp/tree/.dev/pack/$* < /dev/null > /tmp/q/log/schedule.out 2>&1 &
sleep 1
