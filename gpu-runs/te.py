"""Two GPUs, some 500 s: experts whose own TP is 2 (issue 19's last part), and all tests of a GPU on TransformerEngine 2.20.2."""
import runpy
J = runpy.run_path(str(__import__("pathlib").Path(__file__).with_name("jobs.py")))
APEX, PYTEST = J["APEX"], J["PYTEST"]
NEWEST = "export PYTHONPATH=$TREE:$TREE/examples/gpt:/tmp/sp220:/tmp/sp/site-packages; python3 -c 'import torch, transformer_engine as t; print(t.__version__, t.__file__)'; "
JOBS = [
    dict(name="te-experts", gpus=2, first=True, limit=250, needs=APEX, run=PYTEST + "-v -n 3 tests/trainer/test_training_gpu.py -k experts"),
    dict(name="gpu-tests-220", gpus=2, first=True, limit=250, needs=[*APEX, "/tmp/sp220.done"], run=NEWEST + PYTEST + "-n 4 " + J["GPU_TESTS"]),
    dict(name="te-curves-220", gpus=2, first=True, limit=500, needs=[*APEX, "/tmp/sp220.done"], run=NEWEST + PYTEST + "-v -n 3 tests/trainer/test_training_gpu.py"),
]
