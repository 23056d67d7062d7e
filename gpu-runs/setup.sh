export TORCH_CUDA_ARCH_LIST=9.0a
S=/tmp/sp/site-packages
mkdir -p $S /tmp/q/log
(python3 /tmp/tree/.dev/pack/build_apex.py /tmp/tree/.dev/apex /tmp/apexbuild > /tmp/q/log/apex.txt 2>&1; cp /tmp/apexbuild/fused_weight_gradient_mlp_cuda.so $S/; echo "apex $? $(date)" >> /tmp/q/log/setup.txt) &
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target $S /tmp/tree/.dev/whl/*.whl >> /tmp/q/log/setup.txt 2>&1
for f in verl verl/utils; do : > $S/$f/__init__.py; done
touch /tmp/wheels.done
mkdir -p /tmp/spx; ln -s $S/* /tmp/spx/; rm -f /tmp/spx/transformer_engine* /tmp/spx/fused_weight*
[ -d /tmp/tree/.dev/apex2 ] && (cp -r /tmp/tree/.dev/apex2 /tmp/apex2; while [ ! -e $S/fused_weight_gradient_mlp_cuda.so ]; do sleep 1; done; mkdir -p /tmp/apexall; cp $S/fused_weight_gradient_mlp_cuda.so /tmp/apexall/; MAX_JOBS=12 python3 /tmp/tree/.dev/pack/build_apex_all.py /tmp/apex2 /tmp/apexall > /tmp/q/log/apexall.txt 2>&1 && touch /tmp/apexall/done; touch /tmp/apexall.ended) &
mkdir -p /tmp/mlm /tmp/data && tar xf /tmp/tree/.dev/pack/mlm.tar.xz -C /tmp/mlm --strip-components 1
(cd /tmp/tree; . .dev/pack/env.sh; python3 examples/gpt/prepare_data.py --output /tmp/data/stdlib > /tmp/q/log/data.txt 2>&1; touch /tmp/data.done) &
while [ ! -e /tmp/p2.done ]; do sleep 0.5; done
cat /tmp/p1 /tmp/p2 | xz -d -T8 | tar x -C $S
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target /tmp/fa /tmp/flash*.whl >> /tmp/q/log/setup.txt 2>&1
python3 - <<'P'
f = "/tmp/fa/flash_attn/cute/interface.py"
s = open(f).read()
old = "    if causal:\n        window_size_right = 0\n    if window_size_left is not None or"
assert s.count(old) == 1
open(f, "w").write(s.replace(old, "    if window_size_left is not None and window_size_left < 0:\n        window_size_left = None\n" + old))
P
cp -r /tmp/fa/* $S/
(TREE=/tmp/tree; . /tmp/tree/.dev/pack/env.sh; cd /tmp; python3 -c "import flash_attn.cute, torch, transformer_engine.pytorch; print('imports ok', torch.backends.cudnn.version())" 2>&1 | tail -n 1) >> /tmp/q/log/setup.txt
echo "setup done $(date)" >> /tmp/q/log/setup.txt
touch /tmp/setup.done
