"""One GPU, two ranks on it, over NCCL's sockets: for when machines of two are not lent. Slow, and right for correctness only."""
import runpy
J = runpy.run_path(str(__import__("pathlib").Path(__file__).with_name("jobs.py")))
APEX, PYTEST = J["APEX"], J["PYTEST"]
PLAIN = "$TREE:$TREE/examples/gpt:/tmp/sp/site-packages"
NEWEST = "$TREE:$TREE/examples/gpt:/tmp/sp220:/tmp/sp/site-packages"
ONE = "export ONE_GPU=1 NCCL_SOCKET_IFNAME=lo NCCL_MNNVL_ENABLE=0 NCCL_DEBUG=INFO NCCL_DEBUG_FILE=/tmp/q/log/nccl.%p; export PYTHONPATH=$TREE/.dev/pack/one:"
SEE = "; python3 -c 'import torch, transformer_engine as t; print(t.__version__, t.__file__, torch.cuda.nccl.version())'; "
JOBS = [
    dict(name="one-experts", share=0.3, limit=270, needs=APEX, run=ONE + PLAIN + SEE + PYTEST + "-v -n 2 -p two_gpus tests/trainer/test_training_gpu.py -k 'EP or their'"),
    dict(name="gpu-tests-220", share=0.3, limit=240, needs=[*APEX, "/tmp/sp220.done"], run="export PYTHONPATH=" + NEWEST + SEE + PYTEST + "-n 4 " + J["GPU_TESTS"]),
    dict(name="one-experts-unfused", share=0.3, limit=240, needs=APEX, run="export PYTHONPATH=" + PLAIN + SEE + PYTEST + "-v -n 2 tests/trainer/test_training_gpu.py -k "+"'grouped or shared'"),
]
