"""The phase of a peak, as plan/watched.py and as the planner's tracker find it: a line for each of some models.

python -m tests.plan.check_watched_phases
"""

import torch

from megatron_tiling import cpu
from megatron_tiling.plan import gpu, run
from megatron_tiling.plan.process_groups import fake_process_groups
from megatron_tiling.plan.tracker import Tracker
from megatron_tiling.plan.watched import Watch
from tests.plan.check_fake import BATCH, MODELS, SEQUENCE, build


def main() -> None:
    torch.set_num_threads(1)
    cpu.install(train=False)
    fake_process_groups(world=2, rank=0)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    model_parallel_cuda_manual_seed(11)
    gpu.forget_random_states()
    kinds = run.module_kinds()
    trackers: list[Tracker] = []
    watch = Watch(peak=lambda: trackers[-1].peak.bytes)
    for owner, kind in kinds.items():
        watch.module_calls(owner, kind)
    for name, (changes, tiling) in MODELS.items():
        trackers.append(Tracker(kinds))
        with trackers[-1]:
            model = build(changes, tiling)
            tokens = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
            mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool)
            for watch.on in (False, True):
                trackers[-1].reset_peak()
                model(tokens, tokens, mask, labels=tokens).float().mean().backward()
            watch.end("")
        peak = trackers[-1].peak
        print(f"{name}: {watch.bytes - peak.bytes} {watch.phase} / {peak.phase}", flush=True)
        watch.on, watch.bytes, watch.phase, watch.running = False, 0, "", []


if __name__ == "__main__":
    main()
