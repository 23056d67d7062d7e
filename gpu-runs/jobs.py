"""What is still to be run, most wanted first; times are those of one card."""
Q = "bash /tmp/tree/.dev/pack/queue/"
T = "python3 -m torch.distributed.run --standalone --nproc-per-node "
O = T + "4 -m benchmarks.tp_overlap --results $OUT/%s "
W = T + "4 -m benchmarks.whole_model --tensor-parallel 4 --layers 4 --sequence 4096 --batch 2 --micro-batches 4 --attention flash --repeats 15 --results $OUT "
L = "python3 -m benchmarks.longest_context $CAP --attention flash --results $OUT --repeats 4 --time-limit %d "
B3, B8 = "--tied --name longest-context-3b%s ", "--layers 8 --hidden-size 4096 --ffn-hidden-size 14336 --name longest-context-8b%s "
STOCK = "--settings stock 'stock, recompute core_attn' 'stock, recompute mlp' 'stock, recompute core_attn mlp' 'stock, 4 MLP chunks' "
TILED = "'tiled: output alone' 'tiled: default' 'tiled: keep 0' "
BY_2 = "'stock, full recompute by 2 layers' 'tiled: output alone, full recompute by 2 layers' 'tiled: keep 0, full recompute by 2 layers'"
APEX = ["/tmp/sp/site-packages/fused_weight_gradient_mlp_cuda.so"]
FLASH = APEX + ["/tmp/setup.done"]
JOBS = [
    # 4 cards: overlap. First its bits with layers and the head, 20 s each.
    dict(name="bits-4", gpus=4, first=True, limit=60, run=T + "4 -m tests.tiles.check_overlap_gpu auto"),
    dict(name="bits-4-nccl", gpus=4, first=True, limit=60, run=T + "4 -m tests.tiles.check_overlap_gpu collectives"),
    dict(name="ov-host", gpus=4, first=True, limit=100, needs=FLASH, run=O % "host" + "--sizes 4096x14336 --tokens 8192 --steps 3 4 --profile-host $OUT/host.txt"),
    dict(name="ov-layer", gpus=4, first=True, limit=260, needs=FLASH, run=O % "layer" + "--what layer --steps 2 3 4"),
    dict(name="ov-fused", gpus=4, first=True, limit=120, needs=FLASH, run=O % "fused" + "--sizes 8192x28672 --tokens 8192 --steps 3 --userbuffers --fused-ops"),
    dict(name="ov-whole-8192", gpus=4, first=True, limit=200, needs=FLASH, run=W + "--hidden-size 8192 --ffn-hidden-size 28672 --name whole-model-tp4-8192"),
    dict(name="ov-whole-4096", gpus=4, first=True, limit=150, needs=FLASH, run=W + "--name whole-model-tp4-4096"),
    # one and two cards, side by side
    dict(name="l3a", limit=310, needs=FLASH, run=L % 240 + B3 % "" + STOCK + TILED + "'tiled: keep 0, recompute core_attn'"),
    dict(name="l3b", limit=300, needs=FLASH, run=L % 230 + B3 % "-full-by-2" + "--sequence 106496 --settings " + BY_2),
    dict(name="l8-rest", limit=260, needs=FLASH, run=L % 190 + B8 % "-rest" + "--settings 'stock, 4 MLP chunks' 'stock, full recompute' 'stock, full recompute by 2 layers' " + TILED),
    dict(name="qwen-ep2", gpus=2, limit=300, needs=FLASH, run="PYTHON=python3 " + Q + "qwen-ep2.sh"),
    dict(name="qwen", limit=300, needs=FLASH, run="PYTHON=python3 " + Q + "qwen.sh"),
    dict(name="measure-tp2", gpus=2, limit=260, needs=FLASH, run="OUT=$OUT/measure PYTHON=python3 " + Q + "measure-tp2.sh"),
    dict(name="measure-tests", limit=460, needs=FLASH, run="python3 -m pytest -q -rA -p no:cacheprovider tests/plan/test_measure_gpu.py"),
    dict(name="oom", limit=200, needs=FLASH, run=Q + "plan-oom.sh"),
    dict(name="sonic", needs=["/tmp/sp2.done"], limit=260, run="export PYTHONPATH=$TREE:/tmp/sp2/site-packages:/tmp/sp2/site-packages/nvidia_cutlass_dsl/python_packages:/tmp/sp3; python3 -m benchmarks.experts --combine --cases 8:8:1536 64:8:768 --repeats 10 --results $OUT"),
]
