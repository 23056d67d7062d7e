"""How large a peak fits: what torch's allocator reserves for it must fit into what the GPU leaves to torch."""

from collections.abc import Mapping
from dataclasses import dataclass

#: What torch reserves, by the peak of what is allocated: near the middle of 30 training runs, of 1.007 to 1.1
#: (benchmarks/results/2026-11-27-plan-runs.md). It gives back what is free before it runs out, and yet
#: a run died at 1.036 (docs/out-of-memory.md): the rest lay in pieces.
RESERVED = 1.045
#: Of torch's allocator: it joins pieces, so that next to none are left.
EXPANDABLE = "expandable_segments:True"
#: Of environments, torch's name for any accelerator first, and its older one.
SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@dataclass(frozen=True)
class Room:
    """GiB of one GPU, of them outside torch's allocator, and what that reserves by the peak of what is allocated."""

    memory: float
    outside: float
    reserved: float

    @property
    def torch(self) -> float:
        """GiB that torch may reserve."""
        return self.memory - self.outside

    @property
    def peak(self) -> float:
        """GiB of the largest peak that fits."""
        return self.torch / self.reserved

    @property
    def fragmentation(self) -> str:
        """What is left beside the peak, in words; empty where segments are expandable."""
        if self.reserved == 1:
            return ""
        return f"{self.torch - self.peak:.1f} for fragmentation (none with {SETTINGS[0]}={EXPANDABLE})"

    def __str__(self) -> str:
        beside = f", and {self.fragmentation}" if self.fragmentation else " (segments are expandable)"
        return f"{self.memory:.4g} GiB less {self.outside:g} that torch does not count{beside}"


def room(memory: float, outside: float, environment: Mapping[str, str]) -> Room:
    """Of a GPU of ``memory`` GiB, for runs in ``environment``. Where its two settings differ, segments are plain."""
    given = [environment[name] for name in SETTINGS if name in environment]
    expandable = [EXPANDABLE in "".join(each.split()).split(",") for each in given]
    return Room(memory, outside, 1 if expandable and all(expandable) else RESERVED)
