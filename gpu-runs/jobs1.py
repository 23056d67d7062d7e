W = "python3 -m benchmarks.whole_model --attention flash --results $OUT "
JOBS = [
    dict(name="whole3-mb4", run=W + "--repeats 10 --micro-batches 4 --name whole-model-h100-row", limit=200),
    dict(name="fp8-mb4", run=W + "--repeats 10 --fp8 tensorwise --micro-batches 4 --name whole-model-fp8-h100-row", limit=250),
    dict(name="whole3-mb1", run=W + "--repeats 20 --name whole-model-h100", limit=200),
    dict(name="fp8-mb1", run=W + "--repeats 20 --fp8 tensorwise --name whole-model-fp8-h100", limit=200),
    dict(name="head", run="python3 -m benchmarks.lm_head --memory-mib 320 272 --results $OUT", limit=120),
    dict(name="whole8-mb1", run=W + "--repeats 20 --layers 8 --name whole-model-h100-8-layers", limit=200),
    dict(name="scores", run="python3 -m benchmarks.scores --results $OUT", limit=160),
    dict(name="whole8-mb4", run=W + "--repeats 10 --layers 8 --micro-batches 4 --name whole-model-h100-8-layers-row", limit=250),
]
