"""``megatron_tiling.plan.rates`` on a CPU: kernels take the time that a clock with other rates gives them.

torchrun -m tests.plan.check_rates RECORD ATTENTION
"""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import torch

from megatron_tiling.plan import rates
from megatron_tiling.plan.clock import H100, useful_share

GPU = dataclasses.replace(H100, products=500e12, product_traffic=0.3, bandwidth=2e12)


def product_seconds(shape: rates.Shape) -> float:
    rows, _, columns = shape
    share = useful_share(rows, columns, 1, GPU.processors)
    return 2.0 * math.prod(shape) / share / GPU.products + GPU.product_traffic * rates.traffic(shape) / GPU.bandwidth


def no_attention(*_: Any) -> Any:
    raise ImportError("no TransformerEngine\nin this test")


def main() -> None:
    cuda: Any = torch.cuda
    cuda.set_device, cuda.current_device = lambda device: None, lambda: 0
    cuda.get_device_properties = lambda device: SimpleNamespace(name="NVIDIA H100 in a test", multi_processor_count=132)
    rates.warm_up, rates.attention = lambda: None, no_attention
    rates.product_seconds, rates.bandwidth = product_seconds, lambda: GPU.bandwidth
    rates.link = lambda world: 123e9
    torch.distributed.init_process_group = lambda backend: None
    torch.distributed.destroy_process_group = lambda: None
    rates.main()


if __name__ == "__main__":
    main()
