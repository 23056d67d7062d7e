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
KNOWN = "--known benchmarks/results/2026-11-28-longest-context-%s.json "  # where the search begins, on other GPUs
QWEN = "--hidden-size 2048 --heads 32 --query-groups 4 --vocabulary 151936 --experts 128 --top-k 8 --moe-ffn-hidden-size 768 --sequence 131072 "
MOE = "--settings stock 'stock, recompute moe_act' 'stock, recompute moe' 'stock, full recompute' 'tiled: output alone' 'tiled: output alone, recompute moe' 'tiled: default' 'tiled: keep 0'"
PEERS = "4 -m benchmarks.tp_overlap --results $OUT/peers%s --sizes %s --tokens %s --steps 3 4 --repeats 15 --userbuffers "
SIZES = [(size, tokens) for size in ("8192x28672", "4096x14336") for tokens in ("8192", "16384")]


def peers(ranks):
    """A process takes one size: TransformerEngine's buffers are of one shape. About 45 s each."""
    for size, tokens in SIZES:
        for what, more in (("mlp", "--fused-ops"), ("layer", "--what layer")):
            name = f"-{what}-tp{ranks}-{size.split('x')[0]}-{tokens}"
            yield dict(name="peers" + name, gpus=ranks, first=True, limit=110, needs=FLASH, run=T + (PEERS % (name, size, tokens)).replace("4 -m", f"{ranks} -m", 1) + more)


JOBS = [
    dict(name="ov-whole-4096-8k", gpus=4, first=True, limit=150, needs=FLASH, run=W + "--batch 2 --name whole-model-tp4-4096"),
    dict(name="ov-whole-4096", gpus=4, first=True, limit=150, needs=FLASH, run=W + "--batch 4 --name whole-model-tp4-4096-16k"),
    *peers(4),
    dict(name="whole-3", limit=200, needs=FLASH, run="python3 -m benchmarks.whole_model --layers 3 --more --attention flash --repeats 20 --results $OUT --name whole-model-fewer-tiles-3-layers"),
    dict(name="whole-8", limit=200, needs=FLASH, run="python3 -m benchmarks.whole_model --layers 8 --attention flash --repeats 20 --results $OUT --name whole-model-fewer-tiles-8-layers"),
    dict(name="sonic-quick", needs=[*FLASH, "/tmp/sp2.done"], limit=400, run="export PYTHONPATH=$TREE:/tmp/sp2/site-packages:/tmp/sp2/site-packages/nvidia_cutlass_dsl/python_packages:/tmp/sp3; export PYTHONFAULTHANDLER=1; (sleep 380; pkill -ABRT -f one-case-into) & python3 -m benchmarks.experts --combine --sonic-untuned --cases 64:8:768 --repeats 10 --results $OUT/sonic-quick"),
    dict(name="sonic", needs=[*FLASH, "/tmp/sp2.done"], limit=850, run="export PYTHONPATH=$TREE:/tmp/sp2/site-packages:/tmp/sp2/site-packages/nvidia_cutlass_dsl/python_packages:/tmp/sp3; export PYTHONFAULTHANDLER=1 QUACK_COMPILE_WORKERS=15 QUACK_PRINT_AUTOTUNING=1; (sleep 800; pkill -ABRT -f one-case-into) & python3 -m benchmarks.experts --combine --cases 64:8:768 --repeats 10 --results $OUT/sonic"),
    dict(name="apex-tests", limit=400, needs=["/tmp/apexall/done"], run="export PYTHONPATH=$TREE:$TREE/examples/gpt:/tmp/apexall:/tmp/spx; python3 -m pytest -q -rA -p no:cacheprovider --basetemp /tmp/apex-runs tests/trainer/test_apex_gpu.py; mkdir -p $OUT/log/apex-runs; find /tmp/apex-runs -maxdepth 2 -type f -exec cp {} $OUT/log/apex-runs/ \\;"),
    dict(name="te-resume", limit=400, needs=FLASH, run="python3 -m pytest -q -rA -p no:cacheprovider --basetemp /tmp/te-runs tests/trainer/test_training_gpu.py -k goes_on; mkdir -p $OUT/log/te-runs; find /tmp/te-runs -maxdepth 2 -type f -exec cp {} $OUT/log/te-runs/ \\;"),
    dict(name="gpu-tests", limit=200, needs=FLASH, run="python3 -m pytest -q -rfE -n 3 -p no:cacheprovider tests/resident/test_experts_gpu.py tests/resident/test_transformer_engine_gpu.py tests/resident/test_fp8_gpu.py tests/tiles/test_head_gpu.py tests/tiles/test_mlp_gpu.py tests/tiles/kernels/test_devices_gpu.py"),
    dict(name="l3-again", limit=200, needs=FLASH, run=L.replace("--repeats 4", "--repeats 10") % 150 + B3 % "-again" + KNOWN % "3b-rest" + "--settings stock 'stock, recompute core_attn' 'tiled: output alone' 'tiled: default'"),
]
