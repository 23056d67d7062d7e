# Call 2, carries te220 and pack: the newest TransformerEngine in a folder that comes before the other.
mkdir -p /tmp/te220; cp .dev/te220/*.whl /tmp/te220/
setsid nohup bash -c 'while [ ! -e /tmp/wheels.done ]; do sleep 0.5; done; python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target /tmp/sp220 /tmp/te220/*.whl; touch /tmp/sp220.done' < /dev/null > /tmp/q/log/te220.txt 2>&1 &
