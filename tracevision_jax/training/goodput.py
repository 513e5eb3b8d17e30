"""Where the wall time of a run went: the share in useful steps, and what took the rest.

The time is parted without gap or overlap. Devices at work on a step count as `useful` (or `rejected`, or, where the
step was undone later, `lost`). What the host does meanwhile costs nothing; only while the devices are idle is the time
charged to what the host does: `input`, `save`, `evaluation`, and so on. So data that are read while a step runs are
free, however long they take, and input that is really waited for is not hidden by pipelining.

    goodput = Goodput(time.perf_counter())
    with goodput.measure("restore"):
        ...
    goodput.fill(time.perf_counter(), "start")
    waited = goodput.step(sent, finished, accepted=True)
    goodput.describe()      # "goodput 83% of 1:02:03; compile 9%, input 5%, ..."
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

PARTS: tuple[str, ...] = (
    "useful",
    "start",
    "restore",
    "compile",
    "input",
    "save",
    "evaluation",
    "export",
    "rejected",
    "lost",
    "other",
)
"""Seconds are kept of: steps that counted; building and initialising; reading checkpoints; compiling; waiting for data;
copying for a checkpoint, or waiting for the one before; evaluating; writing the model; steps that were rejected; steps
that were undone by going back or by a stop before the next checkpoint; the rest."""

INPUT_BOUND = 0.2
"""Above this share of the time of steps spent waiting for data, a run is input-bound."""


def input_bound(input_share: float) -> bool:
    """Whether so much of the time of steps is waiting for data that reading them sets the speed."""
    return input_share > INPUT_BOUND


class Goodput:
    """Parts the wall time from `began` on; times are those of `time.perf_counter`."""

    def __init__(self, began: float):
        self.spent = dict.fromkeys(PARTS, 0.0)
        """Seconds of each part, since this start of the run."""
        self.before = dict.fromkeys(PARTS, 0.0)
        """Seconds of each part of earlier starts of a continued run."""
        self._until = began
        self._activities: list[tuple[str, float, float]] = []
        self._marks: dict[int, float] = {}

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """What the host does in a `with` block is `part`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.note(part, began, time.perf_counter())

    def note(self, part: str, began: float, ended: float) -> None:
        """The host did `part` from `began` to `ended`; such times do not overlap."""
        self._activities.append((part, began, ended))

    def fill(self, until: float, rest: str = "other") -> float:
        """Part the time up to `until`, in which the devices had no step; returns what of it was `input`, in seconds."""
        if until <= self._until:
            return 0.0
        left, waited = until - self._until, 0.0
        for part, began, ended in self._activities:
            overlap = min(ended, until) - max(began, self._until)
            if overlap > 0:
                self.spent[part] += overlap
                left -= overlap
                waited += overlap if part == "input" else 0.0
        self.spent[rest] += max(left, 0.0)
        self._advance(until)
        return waited

    def step(self, sent: float, finished: float, accepted: bool) -> float:
        """A step was sent to the devices and finished there; returns the seconds for which they waited for its data."""
        waited = self.fill(sent)
        self.spent["useful" if accepted else "rejected"] += max(finished - self._until, 0.0)
        self._advance(max(finished, self._until))
        return waited

    def mark(self, step: int) -> None:
        """A checkpoint of a step is saved, all steps up to which have finished."""
        self._marks[step] = self.spent["useful"]

    def undo(self, step: int) -> None:
        """What was useful since the checkpoint of a step is lost."""
        lost = self.spent["useful"] - self._marks.get(step, 0.0)
        self.spent["useful"] -= lost
        self.spent["lost"] += lost

    def continue_from(self, kept: Mapping[str, float], lost: float) -> None:
        """Go on from what earlier starts spent up to the checkpoint, and what was lost after it, in seconds."""
        self.before = {part: kept.get(part, 0.0) for part in PARTS}
        self.before["lost"] += lost

    def total(self) -> dict[str, float]:
        """Seconds of each part over all starts of the run."""
        return {part: self.before[part] + self.spent[part] for part in PARTS}

    def input_share(self) -> float:
        """Share of the time of steps, since this start, in which the devices waited for data."""
        busy = self.spent["useful"] + self.spent["rejected"] + self.spent["lost"]
        return self.spent["input"] / max(busy + self.spent["input"], 1e-9)

    def _advance(self, until: float) -> None:
        self._until = until
        self._activities = [activity for activity in self._activities if activity[2] > until]


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Share of each part in their sum."""
    whole = max(sum(seconds.values()), 1e-9)
    return {part: value / whole for part, value in seconds.items()}


def describe(seconds: Mapping[str, float]) -> str:
    """ "83.0% in useful steps; compile 9.1%, input 5.2%": what took half a percent or more, most first."""
    parts = shares(seconds)
    rest = sorted(((share, part) for part, share in parts.items() if part != "useful"), reverse=True)
    listed = ", ".join(f"{part} {share:.1%}" for share, part in rest if share >= 0.005)
    return f"{parts['useful']:.1%} in useful steps" + (f"; {listed}" if listed else "")
