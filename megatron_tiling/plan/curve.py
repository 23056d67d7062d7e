"""Memory over one step, by its parts, as few points as a picture shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_tiling.plan.clock import Clock
from megatron_tiling.plan.tracker import Allocation, Peak, Tracker

#: Spans of equal time into which a step is cut; of each the moments with the most and with the fewest bytes are kept.
SPANS = 200


@dataclass(frozen=True)
class Point:
    """Seconds since the step began, and bytes of each part from then on."""

    seconds: float
    parts: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


class Moments:
    """Of a step, from when this is made: all moments at which a tracker could have seen a peak."""

    def __init__(self, tracker: Tracker, clock: Clock) -> None:
        self._tracker, self._clock = tracker, clock
        self._moments = [(clock.seconds, tracker.peak)]
        tracker.on_moment = self._add

    def _add(self, moment: Peak) -> None:
        self._moments.append((self._clock.seconds, moment))

    def curve(self, always: Mapping[str, int]) -> tuple[Point, ...]:
        """The step, with parts that are there ``always``. The tracker's peak is one of the points.

        What a tensor is, is known only when the step is over.
        """
        self._tracker.on_moment = None
        begin = self._moments[0][1].time
        waiting = [one for one in self._tracker.allocations if one.died is None or one.died > begin][::-1]
        live: list[Allocation] = []
        points = []
        for seconds, moment in thinned(self._moments, bytes_of=lambda moment: moment.bytes):
            while waiting and waiting[-1].born <= moment.time:
                live.append(waiting.pop())
            live = [one for one in live if one.lives(moment.time)]
            points.append(Point(seconds, self._tracker.parts(moment, live) | dict(always)))
        return tuple(points)


def thinned[M](moments: Sequence[tuple[float, M]], bytes_of: Callable[[M], int]) -> Iterator[tuple[float, M]]:
    """Of moments and their seconds since the first: those with the most and with the fewest bytes, of each span."""
    begin = moments[0][0]
    span = (moments[-1][0] - begin) / SPANS
    spans: dict[int, list[int]] = {}
    for index, (seconds, _) in enumerate(moments):
        spans.setdefault(int((seconds - begin) / span) if span else 0, []).append(index)
    for indices in spans.values():
        most, fewest = (pick(indices, key=lambda index: bytes_of(moments[index][1])) for pick in (max, min))
        yield from (moments[index] for index in sorted({most, fewest}))
