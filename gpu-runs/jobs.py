"""What is still to be run, most wanted first; times are those of one card."""
Q = "bash /tmp/tree/.dev/pack/queue/"
T = "python3 -m torch.distributed.run --standalone --nproc-per-node "
O = T + "4 -m benchmarks.tp_overlap --results $OUT/%s "
W = T + "4 -m benchmarks.whole_model --tensor-parallel 4 --layers 4 --sequence 4096 --micro-batches 4 --attention flash --repeats 15 --results $OUT "
W2 = W.replace("4 -m", "2 -m", 1).replace("parallel 4", "parallel 2")
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


APEX_PATH = "export PYTHONPATH=$TREE:$TREE/examples/gpt:/tmp/apexall:/tmp/spx; "
SONIC = "export PYTHONPATH=$TREE:/tmp/sp2/site-packages:/tmp/sp2/site-packages/nvidia_cutlass_dsl/python_packages:/tmp/sp3; export PYTHONFAULTHANDLER=1 QUACK_COMPILE_WORKERS=7 QUACK_PRINT_AUTOTUNING=1; "
PYTEST = "python3 -m pytest -q -rfEs -p no:cacheprovider "
KEEP = "; mkdir -p $OUT/log/%s-runs; find /tmp/%s-runs -maxdepth 2 -type f -exec cp {} $OUT/log/%s-runs/ \\;"
GPU_TESTS = " ".join("tests/" + name for name in "resident/test_experts_gpu.py resident/test_transformer_engine_gpu.py resident/test_fp8_gpu.py tiles/test_head_gpu.py tiles/test_mlp_gpu.py tiles/kernels/test_devices_gpu.py".split())
CURVES = "'Llama or (grouped and shared) or Megatron or FP8'"
BOTH = dict(gpus=2, first=True)  # nothing else on the host
FOUR = [  # what issue 21 lacks, some 10 minutes of four GPUs
    dict(name="ov-whole-4096-8k", gpus=4, first=True, limit=150, needs=FLASH, run=W + "--batch 2 --name whole-model-tp4-4096-fewer-tiles"),
    dict(name="ov-whole-4096", gpus=4, first=True, limit=150, needs=FLASH, run=W + "--batch 4 --name whole-model-tp4-4096-16k-fewer-tiles"),
    *peers(4),
]
JOBS = FOUR + [
    dict(name="sonic", needs=[*FLASH, "/tmp/sp2.done"], limit=900, run=SONIC + "timeout -s ABRT 880 python3 -m benchmarks.experts --combine --cases 64:8:768 --repeats 20 --results $OUT/sonic; touch /tmp/sonic.done"),
    dict(name="te-resume", limit=400, needs=FLASH, run=PYTEST + "--basetemp /tmp/te-runs tests/trainer/test_training_gpu.py -k goes_on" + KEEP.replace("%s", "te") + "; python3 /tmp/tree/.dev/pack/queue/control.py te"),
    dict(name="gpu-tests", limit=250, needs=[*FLASH, "/tmp/sp2.done"], run=PYTEST + "-n 3 " + GPU_TESTS),
    dict(name="apex-tests", limit=400, needs=["/tmp/apexall/done"], run=APEX_PATH + PYTEST + "--basetemp /tmp/apex-runs tests/trainer/test_apex_gpu.py" + KEEP.replace("%s", "apex") + "; python3 /tmp/tree/.dev/pack/queue/control.py apex"),
    dict(name="te-curves", limit=400, needs=[*FLASH, "/tmp/apexall.ended"], run=PYTEST + "-n 2 tests/trainer/test_training_gpu.py -k " + CURVES),
    dict(name="whole-3", limit=200, needs=[*FLASH, "/tmp/sonic.done"], run="python3 -m benchmarks.whole_model --layers 3 --more --attention flash --repeats 20 --results $OUT --name whole-model-fewer-tiles-3-layers", **BOTH),
    dict(name="whole-8", limit=200, needs=[*FLASH, "/tmp/sonic.done"], run="python3 -m benchmarks.whole_model --layers 8 --attention flash --repeats 20 --results $OUT --name whole-model-fewer-tiles-8-layers", **BOTH),
    dict(name="tp2-tests", limit=250, needs=[*FLASH, "/tmp/sonic.done"], run=PYTEST + "tests/tiles/test_overlap_gpu.py tests/resident/test_fp8_gpu.py::test_tensor_and_sequence_parallelism 'tests/trainer/test_training_gpu.py::test_losses_equal_dense[TP=2, sequence parallel, distributed optimizer]'", **BOTH),
    dict(name="ov-whole-4096", limit=150, needs=[*FLASH, "/tmp/sonic.done"], run=W2 + "--batch 4 --name whole-model-fewer-tiles-tp2-4096-16k", **BOTH),
    dict(name="ov-whole-4096-8k", limit=150, needs=[*FLASH, "/tmp/sonic.done"], run=W2 + "--batch 2 --name whole-model-fewer-tiles-tp2-4096", **BOTH),
    dict(name="sonic-quick", needs=[*FLASH, "/tmp/sp2.done", "/tmp/sonic.done"], limit=400, run=SONIC + "ls $OUT/sonic/*.json || timeout -s ABRT 380 python3 -m benchmarks.experts --combine --sonic-untuned --cases 64:8:768 --repeats 20 --results $OUT/sonic-quick", **BOTH),
]
