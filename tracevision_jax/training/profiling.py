"""A trace of chosen steps by `jax.profiler`, for TensorBoard's profile plugin, XProf or Perfetto.

profile = Profile("10:12", Path("runs/x/profile"), print)
profile.before(step, clock.drain)       # starts before step 10
with profile.step(step):
    ...
profile.after(step, clock.drain)        # ends after step 12
"""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import jax

from tracevision_jax.errors import UserError


def parse(asked: str) -> tuple[int, int] | None:
    """FIRST:LAST as numbers, steps counted from 1, both included; None for an empty text.

    Raises:
        UserError: anything else.
    """
    if not asked:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", asked)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"profile is '{asked}', must be FIRST:LAST, two steps counted from 1, such as 10:12")
    return int(found[1]), int(found[2])


class Profile:
    """Traces the steps that were asked for, if any."""

    def __init__(self, asked: str, directory: Path, say: Callable[[str], None]):
        """Trace the steps `asked` (as `parse` takes them) into `directory`."""
        self._steps, self._directory, self._say = parse(asked), directory, say
        self._running = False

    def before(self, step: int, settle: Callable[[], None]) -> None:
        """Start with the first of the steps; `settle` waits for the devices, so that no earlier one is in the trace."""
        if self._steps and not self._running and self._steps[0] <= step <= self._steps[1]:
            settle()
            jax.profiler.start_trace(self._directory)
            self._running = True

    def step(self, step: int) -> AbstractContextManager:
        """Context that marks a step in the trace."""
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, step: int, settle: Callable[[], None]) -> None:
        """End with the last of the steps."""
        if self._running and self._steps and step >= self._steps[1]:
            settle()
            self.close()

    def close(self) -> None:
        """End a trace that runs."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            self._say(f"profile of the steps up to here: {self._directory} (tensorboard --logdir)")
