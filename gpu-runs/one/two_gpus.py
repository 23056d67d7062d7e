"""pytest -p two_gpus: the tests' own process believes in two GPUs; ranks share the one there is (sitecustomize.py)."""
import torch

torch.cuda.device_count = lambda: 2
