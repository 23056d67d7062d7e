"""What is still to be run, most wanted first; times are those of one card."""
Q = "bash /tmp/tree/.dev/pack/queue/"
T = "python3 -m torch.distributed.run --standalone --nproc-per-node "
O = T + "4 -m benchmarks.tp_overlap --results $OUT/%s "
W = T + "4 -m benchmarks.whole_model --tensor-parallel 4 --layers 4 --sequence 4096 --micro-batches 4 --attention flash --repeats 15 --results $OUT "
L = "python3 -m benchmarks.longest_context $CAP --attention flash --results $OUT --repeats 4 --time-limit %d "
B3, B8 = "--tied --name longest-context-3b%s ", "--layers 8 --hidden-size 4096 --ffn-hidden-size 14336 --name longest-context-8b%s "
STOCK = "--settings stock 'stock, recompute core_attn' 'stock, recompute mlp' 'stock, recompute core_attn mlp' 'stock, 4 MLP chunks' "
TILED = "'tiled: output alone' 'tiled: default' 'tiled: keep 0' "
BY_2 = "'stock, full recompute by 2 layers' 'tiled: output alone, full recompute by 2 layers' 'tiled: keep 0, full recompute by 2 layers'"
APEX = ["/tmp/sp/site-packages/fused_weight_gradient_mlp_cuda.so"]
FLASH = APEX + ["/tmp/setup.done"]
UNITS = "python3 tests/upstream/megatron_unit_tests.py --gpus --world 8 --checkout /tmp/mlm --log $OUT/log/%s tests/unit_tests/dist_checkpointing/models/%s.py"
KNOWN = "$(known %s) "  # env.sh: refused on other GPUs, and left out there
QWEN = "--hidden-size 2048 --heads 32 --query-groups 4 --vocabulary 151936 --experts 128 --top-k 8 --moe-ffn-hidden-size 768 --sequence 131072 "
MOE = "--settings stock 'stock, recompute moe_act' 'stock, recompute moe' 'stock, full recompute' 'tiled: output alone' 'tiled: output alone, recompute moe' 'tiled: default' 'tiled: keep 0'"
JOBS = [
    dict(name="ov-whole-8192", gpus=4, first=True, limit=180, needs=FLASH, run=W + "--batch 2 --hidden-size 8192 --ffn-hidden-size 28672 --name whole-model-tp4-8192"),
    dict(name="ov-whole-4096", gpus=4, first=True, limit=180, needs=FLASH, run=W + "--batch 4 --name whole-model-tp4-4096-16k"),
    dict(name="units-gpt", limit=800, needs=FLASH, run=UNITS % ("units-gpt", "test_gpt_model")),
    dict(name="sonic", needs=["/tmp/sp2.done"], limit=450, run="export PYTHONPATH=$TREE:/tmp/sp2/site-packages:/tmp/sp2/site-packages/nvidia_cutlass_dsl/python_packages:/tmp/sp3; export PYTHONFAULTHANDLER=1; (sleep 400; pkill -ABRT -f one-case-into) & python3 -m benchmarks.experts --combine --cases 64:8:768 --repeats 10 --results $OUT/sonic"),
    dict(name="bits-2", gpus=2, limit=90, needs=FLASH, run=T + "2 -m tests.tiles.check_overlap_gpu auto; " + T + "2 -m tests.tiles.check_overlap_gpu collectives"),
    dict(name="ov2-mlp", gpus=2, limit=110, needs=FLASH, run=T + "2 -m benchmarks.tp_overlap --results $OUT/mlp2 --sizes 8192x28672 4096x14336 --tokens 8192 --steps 2 3 4"),
    dict(name="ov2-layer", gpus=2, limit=130, needs=FLASH, run=T + "2 -m benchmarks.tp_overlap --results $OUT/layer2 --what layer --sizes 8192x28672 4096x14336 --tokens 8192 --steps 2 3 4"),
    dict(name="qwen-ep2", gpus=2, limit=330, needs=FLASH, run=T + "2 -m benchmarks.longest_context --expert-parallel 2 --layers 8 --attention flash $CAP " + QWEN + "--repeats 10 --time-limit 270 --results $OUT --name longest-context-qwen3-30b-a3b-ep2 " + KNOWN % "qwen3-30b-a3b-ep2" + MOE),
    dict(name="qwen", limit=330, needs=FLASH, run=L.replace("--repeats 4", "--repeats 10") % 270 + "--layers 4 --name longest-context-qwen3-30b-a3b " + QWEN + KNOWN % "qwen3-30b-a3b" + MOE),
    dict(name="l3-again", limit=260, needs=FLASH, run=L.replace("--repeats 4", "--repeats 10") % 200 + B3 % "-again" + KNOWN % "3b-rest" + "--settings stock 'stock, recompute core_attn' 'tiled: output alone' 'tiled: default'"),
    dict(name="l8-by-2", limit=230, needs=FLASH, run=L % 180 + B8 % "-by-2" + KNOWN % "8b-rest" + "--settings 'stock, full recompute by 2 layers' 'tiled: output alone' 'tiled: default' 'tiled: keep 0'"),
    dict(name="oom", limit=260, needs=FLASH, run=Q + "plan-oom.sh"),
    dict(name="experts64", limit=200, needs=FLASH, run="python3 -m benchmarks.experts --cases 64:8:768 8:2:1536 8:8:1536 --repeats 15 --results $OUT/experts"),
    dict(name="units-mlp", limit=300, needs=FLASH, run=UNITS % ("units-mlp", "test_mlp_glu")),
    dict(name="measure-tests-tp2", gpus=2, limit=200, needs=FLASH, run="python3 -m pytest -q -rA -p no:cacheprovider tests/plan/test_measure_gpu.py -k 'side_by_side and 2'"),
    dict(name="measure-tp2-overlap", gpus=2, limit=260, needs=FLASH, run="OUT=$OUT/measure PYTHON=python3 " + Q + "measure-tp2.sh"),
]
