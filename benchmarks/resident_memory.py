"""What a piece of work adds to the memory that a process really has, by Linux's own count (`/proc/self`).

peak = peak_above(work)          # bytes, of whatever `work()` held at its most
"""

import gc
import re
from collections.abc import Callable
from pathlib import Path


def memory(what: str) -> int:
    """VmRSS (now) or VmHWM (its peak) of this process in bytes; ValueError where the kernel does not say."""
    return _kilobytes(Path("/proc/self/status"), what) * 1024


def available() -> int:
    """Bytes that this machine can still give out without swapping."""
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable") * 1024


def _kilobytes(file: Path, what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", file.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{file} has no {what}")
    return int(found.group(1))


def peak_above(work: Callable[[], object]) -> int:
    """Bytes by which the process grew at most while `work` ran, over what it had just before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew, see proc(5)
    before = memory("VmRSS")
    work()
    return memory("VmHWM") - before
