# poll.sh SECONDS MARK: wait until MARK is in the schedule, packing results every 10 s
[ -d /tmp/q ] || { echo "start.sh has not run on this machine"; exit 1; }
i=0
touch /tmp/q/log/schedule.out
pack() { (cd /tmp/q && tar czf /tmp/q.new.tgz --exclude='*.pt' . && cp /tmp/q.new.tgz $OUT/q.tgz); }
while [ $i -lt $1 ]; do
  grep -q "$2" /tmp/q/log/schedule.txt 2>/dev/null && break
  grep -q Traceback /tmp/q/log/schedule.out && { cat /tmp/q/log/schedule.out; break; }
  sleep 2; i=$((i+2))
  [ $((i % 10)) = 0 ] && pack
done
pack
cat /tmp/q/log/setup.txt | grep -v WARN | tail -5; tail -${3:-40} /tmp/q/log/schedule.txt
