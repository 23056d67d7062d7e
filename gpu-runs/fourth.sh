cp .dev/fx3/sb /tmp/
setsid nohup bash -c 'mkdir -p /tmp/sp2; cat /tmp/sa /tmp/sb | xz -d -T4 | tar x -C /tmp/sp2; while [ ! -e /tmp/setup.done ]; do sleep 1; done; mkdir -p /tmp/sp3; cp -r /tmp/sp/site-packages/. /tmp/sp3/; cd /tmp/sp3; rm -rf flash_attn* quack* nvidia_cutlass* sonic*; touch /tmp/sp2.done' < /dev/null > /tmp/q/log/sp2.txt 2>&1 &
