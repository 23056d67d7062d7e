W = "python3 -m benchmarks.whole_model --attention flash --results $OUT "
L = "/tmp/lead"
U = "PYTHONPATH=/tmp/tree/.dev/mlm_none:$PYTHONPATH python3 tests/upstream/megatron_unit_tests.py --checkout /tmp/tree/.dev/mlm --world 2 --gpus --log /tmp/q/log/%s "
DC = "tests/unit_tests/dist_checkpointing/models/"
T = "tests/unit_tests/transformer/"
JOBS = [
    dict(name="units-ckpt", tree=L, gpus=2, share=0.4, noisy=True, limit=200, run=U % "units-ckpt" + f"{DC}test_mlp_glu.py {DC}test_gpt_model.py"),
    dict(name="fp8-tests", tree=L, gpus=2, share=0.4, noisy=True, limit=200, run="python3 -m pytest -q -p no:cacheprovider tests/resident/test_fp8_gpu.py tests/tiles/test_cast.py"),
    dict(name="tune", tree=L, quiet=True, limit=90, run="python3 /tmp/tree/.dev/tune/tune.py"),
    dict(name="whole8-row", tree=L, quiet=True, limit=200, run=W + "--layers 8 --repeats 10 --micro-batches 4 --name whole-model-8-layers-row"),
    dict(name="fp8-mlp", tree=L, quiet=True, limit=260, run="python3 -m benchmarks.mlp_fp8 --sizes 4096x14336 8192x28672 --tokens 8192 --repeats 10 --results $OUT"),
    dict(name="scores", tree=L, quiet=True, needs=["/tmp/scores.go"], limit=160, run="python3 -m benchmarks.scores --packed 32768 151936 --results $OUT"),
    dict(name="qwen-ep2", tree=L, gpus=2, quiet=True, limit=280, run="PYTHON=python3 bash /tmp/tree/.dev/queue/qwen-ep2.sh"),
    dict(name="head2", tree=L, gpus=2, quiet=True, limit=120, run="python3 -m torch.distributed.run --standalone --nproc-per-node 2 -m benchmarks.lm_head --sequence-parallel --memory-mib 320 600 --results $OUT"),
    dict(name="measure", tree="/tmp/measure", gpus=2, quiet=True, limit=230, needs=["/tmp/measure"], run="bash /tmp/tree/.dev/queue/plan-measure.sh"),
    dict(name="qwen", tree=L, quiet=True, limit=260, run="PYTHON=python3 bash /tmp/tree/.dev/queue/qwen.sh"),
    dict(name="oom", tree=L, limit=300, run="bash /tmp/tree/.dev/queue/plan-oom.sh"),
    dict(name="sonic", tree=L, quiet=True, needs=["/tmp/sonic.go"], limit=200, run="python3 -m benchmarks.experts --combine --cases 8:8:1536 --repeats 10 --results $OUT"),
]
