"""Four GPUs, 29 November: what issue 21 lacks, then the experts' new backward pass (issue 19)."""
import runpy
J = runpy.run_path(str(__import__("pathlib").Path(__file__).with_name("jobs.py")))
FLASH, PYTEST, W, QWEN, MOE, KNOWN, CURVES = (J[k] for k in "FLASH PYTEST W QWEN MOE KNOWN CURVES".split())
L = J["L"].replace("--repeats 4", "--repeats 10")
FOUR = [dict(j, run=j["run"].replace("--steps 3 4", "--steps 2 3 4"), limit=170) for j in J["FOUR"]]
JOBS = FOUR + [
    dict(name="ov-whole-8192", gpus=4, first=True, limit=170, needs=FLASH, run=W + "--batch 2 --hidden-size 8192 --ffn-hidden-size 28672 --name whole-model-tp4-8192-fewer-tiles"),
    dict(name="experts", limit=420, needs=FLASH, run="python3 -m benchmarks.experts --repeats 20 --results $OUT/experts"),
    dict(name="experts-combine", limit=300, needs=FLASH, run="python3 -m benchmarks.experts --combine --cases 64:8:768 --repeats 20 --results $OUT/combine"),
    dict(name="gpu-tests", gpus=2, limit=300, needs=FLASH, run=PYTEST + "-n 3 " + J["GPU_TESTS"]),
    dict(name="qwen", limit=420, needs=FLASH, run=L % 280 + "--layers 4 --name longest-context-qwen3-30b-a3b-one-node " + QWEN + KNOWN % "qwen3-30b-a3b" + MOE),
    dict(name="te-curves", gpus=2, limit=400, needs=FLASH, run=PYTEST + "-n 2 tests/trainer/test_training_gpu.py -k 'losses_equal and (experts or TP=2 or full)'"),
    dict(name="qwen-ep2", gpus=2, limit=420, needs=FLASH, run="python3 -m torch.distributed.run --standalone --nproc-per-node 2 " + L.replace("python3 ", "") % 280 + "--expert-parallel 2 --layers 8 --name longest-context-qwen3-30b-a3b-ep2-one-node " + QWEN + KNOWN % "qwen3-30b-a3b-ep2-timed" + MOE),
    dict(name="tp4-tests", gpus=4, limit=200, needs=FLASH, run=PYTEST + "tests/tiles/test_overlap_gpu.py tests/resident/test_fp8_gpu.py::test_tensor_and_sequence_parallelism 'tests/trainer/test_training_gpu.py' -k 'same_bits or sequence_parallelism or TP'"),
]
