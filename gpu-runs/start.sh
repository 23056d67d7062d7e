mkdir -p /tmp/q/log /tmp/go; rm -rf /tmp/tree; cp -r "$PWD" /tmp/tree
python3 -c "import runpy, sys; print(*(j['name'] for j in runpy.run_path(sys.argv[1])['JOBS']))" /tmp/tree/.dev/pack/$1 || exit 1
nvidia-smi -L > /tmp/q/log/gpus.txt
setsid nohup bash /tmp/tree/.dev/pack/setup.sh < /dev/null > /tmp/q/log/setup.out 2>&1 &
setsid nohup bash -c "while [ ! -e /tmp/wheels.done ]; do sleep 0.5; done; python3 /tmp/tree/.dev/pack/schedule.py /tmp/tree/.dev/pack/$*" < /dev/null > /tmp/q/log/schedule.out 2>&1 &
sleep 1; cat /tmp/q/log/gpus.txt
