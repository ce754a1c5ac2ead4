"""How long a run will still take: its counted costs, at the speed of its last steps."""

import time
from collections import deque
from collections.abc import Sequence

from tokensieve import cost

WINDOW = 30.0  # seconds: a change of the machine's load is seen no later
PAUSE = 10.0  # seconds between two announcements


class Forecast:
    """The time that is left, from the FLOPs of the steps to come and the speed of the last `WINDOW` seconds.

    Whatever happens between two steps counts as the later one's time: data, measurements, checkpoints.
    """

    def __init__(self, work: Sequence[float], rehearsed: tuple[float, float] | None):
        """work: FLOPs of each step that is left. rehearsed: FLOPs and seconds of a pass before the first step; if None,
        no time was said before the run, and there is no news of one.
        """
        self._left, self._work = sum(work), deque(work)
        self._samples = deque([] if rehearsed is None else [rehearsed])
        self._then = time.monotonic()
        self._range: tuple[float, float] | None = None
        if rehearsed is not None:
            self._announce()

    def advance(self) -> None:
        """A step has ended."""
        now, flops = time.monotonic(), self._work.popleft()
        self._samples.append((flops, now - self._then))
        self._left, self._then = self._left - flops, now
        recent = sum(seconds for _, seconds in self._samples)
        while len(self._samples) > 1 and recent - self._samples[0][1] >= WINDOW:
            recent -= self._samples.popleft()[1]

    @property
    def seconds(self) -> float:
        """The time left after the last step, which has ended or was rehearsed."""
        flops, seconds = map(sum, zip(*self._samples, strict=True))
        return max(0.0, self._left) * seconds / flops

    def news(self) -> str | None:
        """What is left as a range, if by now the run would end outside of the range that was said last."""
        if self._range is None:
            return None
        soonest, latest = self._range
        if soonest <= self._then + self.seconds <= latest or self._then < self._said + PAUSE:
            return None
        self._announce()
        return cost.time_range(self.seconds)

    def _announce(self) -> None:
        self._said = self._then
        self._range = self._then + cost.SHORTER * self.seconds, self._then + cost.LONGER * self.seconds
