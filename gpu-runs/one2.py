"""One GPU: all training layouts on TransformerEngine 2.20.2, two ranks on the one GPU where they have two, and all GPU tests."""
import runpy
J = runpy.run_path(str(__import__("pathlib").Path(__file__).with_name("one.py")))
APEX, PYTEST, ONE, PLAIN, NEWEST, SEE = (J[name] for name in "APEX PYTEST ONE PLAIN NEWEST SEE".split())
GPU_TESTS = J["J"]["GPU_TESTS"]
NEW = [*APEX, "/tmp/sp220.done"]
CURVES = "tests/trainer/test_training_gpu.py"
JOBS = [
    dict(name="curves-220", share=0.2, limit=420, needs=NEW, run=ONE + NEWEST + SEE + PYTEST + f"-v -n 6 -p two_gpus {CURVES} -k 'equal_dense and not (CP and 2) and not communication'"),
    dict(name="resume-220", share=0.2, limit=400, needs=NEW, run="export PYTHONPATH=" + NEWEST + SEE + PYTEST + f"-v {CURVES} -k goes_on"),
    dict(name="fp8-tp", share=0.2, limit=200, needs=NEW, run=ONE + NEWEST + SEE + PYTEST + "-v -p two_gpus tests/resident/test_fp8_gpu.py -k tensor_and_sequence"),
    dict(name="gpu-tests", share=0.2, limit=300, needs=NEW, run="export PYTHONPATH=" + PLAIN + SEE + PYTEST + "-n 3 " + GPU_TESTS),
    dict(name="fp8-experts", share=0.2, limit=300, needs=NEW, run=ONE + PLAIN + SEE + PYTEST + f"-v -n 2 -p two_gpus {CURVES} -k 'equal_dense and experts and FP8'"),
]
