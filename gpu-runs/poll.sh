# poll.sh SECONDS MARK: wait until MARK is in the schedule, packing results every 10 s
i=0
pack() { (cd /tmp/q && tar czf /tmp/q.new.tgz --exclude='*.pt' . && cp /tmp/q.new.tgz $OUT/q.tgz); }
while [ $i -lt $1 ]; do
  grep -q "$2" /tmp/q/log/schedule.txt 2>/dev/null && break
  sleep 2; i=$((i+2))
  [ $((i % 10)) = 0 ] && pack
done
pack
cat /tmp/q/log/setup.txt | grep -v WARN | tail -5; tail -${3:-40} /tmp/q/log/schedule.txt
