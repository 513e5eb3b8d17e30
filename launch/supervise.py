"""Start the processes of a run on this host, end all when one dies, and give one message and one exit code.

When a process of a run dies, the others first hang in a sum over all devices and then abort with pages of their own.
The supervisor knows who died first: it ends the rest within seconds, holds back what they say of it, and exits with the
code of the cause. `verdict` has the rules. It imports no jax, and is told nothing by the processes: their exit codes
are `launch/train.py`'s.
"""

import contextlib
import ctypes
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import IO

from launch.train import INTERRUPTED, PREEMPTED
from tracevision_jax.errors import UserError

SETTLE = 1.0
"""Seconds after a death in which others may end by themselves, and for which error output is held back."""
SAVED = {PREEMPTED: "saved after SIGTERM", INTERRUPTED: "saved after Ctrl-C"}


@dataclass(frozen=True)
class Args:
    """Start the processes of a run on this host, and end all of them when one dies.

    What follows `--` is the command that each process runs. Exit code: 0; 75 when all saved after SIGTERM (start the
    same command again); 130 after Ctrl-C; 137 when one was killed (128 + the signal); else that of the first to fail.

    Examples:
      tracevision supervise --processes 8 -- tracevision train tracevision_7b_stage1 --mesh.fsdp 8
      tracevision supervise -- tracevision train tracevision_7b_stage1      one process, as a launcher finds it
      tracevision supervise --processes 8 --nodes 2 --node 1 --coordinator node0:7777 -- tracevision train RECIPE
    """

    command: tuple[str, ...] = ()
    """What each process runs; written after `--`. The word tracevision stands for this very installation."""
    processes: int = 1
    """Processes on this host. With one, and one node, the environment of a launcher is left as it is."""
    devices: int = 1
    """GPUs of each of several processes; process i takes the i-th so many."""
    nodes: int = 1
    """Hosts of the run; `supervise` is started on each."""
    node: int = 0
    """Number of this host, from 0."""
    coordinator: str = ""
    """host:port of the first process, for several nodes; on one host a free port is taken."""
    grace: float = 300.0
    """Seconds that the processes have to save after SIGTERM or Ctrl-C, or after one of them ended well."""


def parse(argv: list[str]) -> Args:
    """Flags up to `--`, then the command."""
    import dataclasses

    from launch.cli import parse_with_tyro

    flags, dashes, command = argv, [], []
    if "--" in argv:
        cut = argv.index("--")
        flags, dashes, command = argv[:cut], ["--"], argv[cut + 1 :]
    args = parse_with_tyro(Args, flags, "tracevision supervise")
    if not dashes or not command:
        raise UserError("write what to run after --: tracevision supervise --processes 2 -- tracevision train RECIPE")
    return dataclasses.replace(args, command=tuple(command))


def run(args: Args) -> int:
    """Start, watch, end; returns the exit code of the whole."""
    if args.processes < 1 or args.devices < 1 or not 0 <= args.node < args.nodes:
        raise UserError("--processes and --devices are at least 1, and --node is from 0 to below --nodes.")
    if args.nodes > 1 and not args.coordinator:
        raise UserError("several nodes need --coordinator host:port, the address of the first one.")
    command = list(args.command)
    if command[0] == "tracevision":
        command = [sys.executable, "-m", "launch", *command[1:]]
    if shutil.which(command[0]) is None:
        raise UserError(f"there is no command '{command[0]}' to run.")
    code, message = Group(command, environments(args), args.grace, args.node * args.processes).run()
    if message:
        print(f"tracevision supervise: {message}", file=sys.stderr, flush=True)
    return code


def environments(args: Args) -> list[dict[str, str]]:
    """What the environment of each process has more than ours; read by `tracevision_jax.parallel.processes.connect`."""
    total = args.processes * args.nodes
    if total == 1:
        return [{}]
    found = []
    address = args.coordinator or f"localhost:{_free_port()}"
    for local in range(args.processes):
        own = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(total),
            "JAX_PROCESS_ID": str(args.node * args.processes + local),
        }
        if args.processes > 1:
            first = local * args.devices
            own["JAX_LOCAL_DEVICE_IDS"] = ",".join(str(first + number) for number in range(args.devices))
        found.append(own)
    return found


@dataclass
class End:
    """How a process ended."""

    code: int
    """As `subprocess` gives it: minus the signal for one that was killed."""
    moment: float
    by_us: bool = False


def verdict(ends: Mapping[int, End], total: int, late: str = "") -> tuple[int, str]:
    """Exit code and message of the whole, from the ends of all processes by number.

    Args:
        ends: of the processes of this host.
        total: how many of them there are.
        late: why the supervisor ended the rest though nobody had failed.
    """
    failed = {number: end for number, end in ends.items() if not end.by_us and end.code not in (0, *SAVED)}
    rest = sum(end.by_us for end in ends.values())
    ended = f"; the other {f'{rest} were' if rest > 1 else 'one was'} ended" if rest else ""
    again = "The same command continues from the last checkpoint."
    if failed:
        number = min(failed, key=lambda number: failed[number].moment)
        who, code = f"process {number} of {total}" if total > 1 else "the process", failed[number].code
        if code < 0:
            name = signal.Signals(-code).name
            why = {
                "SIGKILL": " (out of memory, or by hand)",
                "SIGABRT": " (an error in a library, or a process on another host is gone: see its messages)",
            }.get(name, "")
            return 128 - code, f"{who} was ended by {name}{why}{ended}. {again}"
        return code, f"{who} failed with exit code {code}, its messages are above{ended}."
    if late:
        return 128 + signal.SIGKILL, f"{late}{ended}. {again}"
    saved = max((end.code for end in ends.values()), default=0)
    return (saved, f"{SAVED[saved]}. The same command continues from there.") if saved else (0, "")


@dataclass
class Group:
    """The processes of this host."""

    command: list[str]
    environments: list[dict[str, str]]
    grace: float
    first: int = 0
    """Number of the first process in the whole run."""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    ends: dict[int, End] = field(default_factory=dict)
    events: "queue.Queue[tuple[str, int, object]]" = field(default_factory=queue.Queue)
    held: list[tuple[float, int, bytes]] = field(default_factory=list)
    """Error output that is not shown yet."""
    deaths: dict[int, float] = field(default_factory=dict)
    deadline: float = float("inf")
    asked: int = 0
    """Signals that were forwarded."""

    def run(self) -> tuple[int, str]:
        """Exit code and message."""
        handlers = {number: signal.signal(number, self._forward) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._start()
            late = self._watch()
        finally:
            self._kill_rest()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self._show_held()
        return verdict({self.first + number: end for number, end in self.ends.items()}, self._total(), late)

    def _total(self) -> int:
        return int(self.environments[0].get("JAX_NUM_PROCESSES", "1"))

    def _start(self) -> None:
        end_with_us = _end_with_parent()
        for own in self.environments:
            self.processes.append(
                subprocess.Popen(
                    self.command,
                    env={**os.environ, "PYTHONUNBUFFERED": "1", **own},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    start_new_session=True,  # a group of its own, data workers included; Ctrl-C comes through us
                    preexec_fn=end_with_us,
                )
            )
        for number in range(len(self.processes)):
            threading.Thread(target=self._listen, args=(number,), daemon=True).start()

    def _listen(self, number: int) -> None:
        """Post the lines and the end of a process."""
        process = self.processes[number]
        readers = []
        for kind, stream in (("out", process.stdout), ("error", process.stderr)):
            readers.append(threading.Thread(target=self._read, args=(kind, number, stream), daemon=True))
            readers[-1].start()
        code = process.wait()
        end = End(code, time.monotonic())
        self.events.put(("death", number, end))
        for reader in readers:  # a data worker may keep the pipe open for a moment longer
            reader.join(SETTLE)
        self.events.put(("end", number, end))

    def _read(self, kind: str, number: int, stream: IO[bytes]) -> None:
        for line in stream:
            self.events.put((kind, number, (time.monotonic(), line)))

    def _watch(self) -> str:
        """Until all have ended, or the rest must be ended: then why, if nobody failed."""
        while len(self.ends) < len(self.processes):
            now = time.monotonic()
            try:
                kind, number, content = self.events.get(timeout=0.1)
            except queue.Empty:
                kind, number, content = "nothing", 0, None
            if kind == "out":
                self._write(sys.stdout, number, content[1])  # type: ignore[index]
            elif kind == "error":
                self.held.append((content[0], number, content[1]))  # type: ignore[index]
            elif isinstance(content, End):
                failed = content.code not in (0, *SAVED)
                self.deadline = min(self.deadline, content.moment + (SETTLE if failed else self.grace))
                if failed:
                    self.deaths.setdefault(number, content.moment)
                if kind == "end":
                    self.ends[number] = content
            if not self.deaths:
                self._show_held(now - SETTLE)
            if now > self.deadline:
                break
        missing = len(self.processes) - len(self.ends)
        return f"{missing} of the processes did not end within {self.grace:g} s" if missing and not self.deaths else ""

    def _show_held(self, until: float = float("inf")) -> None:
        """Show error output that came before `until`.

        After a death: what the first to die said, and of the others what they said before, if it is not the same.
        """
        cause = min(self.deaths, key=lambda number: self.deaths[number]) if self.deaths else -1
        everything = cause < 0 or os.environ.get("TRACEVISION_DEBUG", "0") not in ("", "0")
        said = {line for _, number, line in self.held if number == cause}
        kept = []
        for moment, number, line in self.held:
            if moment > until:
                kept.append((moment, number, line))
            elif everything or number == cause or (moment < self.deaths[cause] and line not in said):
                self._write(sys.stderr, number, line)
        self.held = kept

    def _write(self, stream: IO[str], number: int, line: bytes) -> None:
        number += self.first
        stream.write(f"[{number}] {line.decode(errors='replace')}" if number else line.decode(errors="replace"))
        stream.flush()

    def _kill_rest(self) -> None:
        """Kill what still runs, with the groups' data workers, and take the last lines."""
        for number, process in enumerate(self.processes):
            alive = process.poll() is None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if alive:
                self.ends.setdefault(number, End(-signal.SIGKILL, time.monotonic(), by_us=True))
            process.wait()
        while len(self.ends) < len(self.processes) or not self.events.empty():
            kind, number, content = self.events.get()
            if kind == "error":
                self.held.append((content[0], number, content[1]))  # type: ignore[index]
            elif kind == "out":
                self._write(sys.stdout, number, content[1])  # type: ignore[index]
            elif isinstance(content, End):
                self.ends.setdefault(number, content)

    def _forward(self, number: int, _: FrameType | None) -> None:
        """Pass a signal on; the second Ctrl-C, or what takes longer than the grace period, ends all at once."""
        self.asked += number == signal.SIGINT
        self.deadline = 0.0 if self.asked > 1 else min(self.deadline, time.monotonic() + self.grace)
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        return opened.getsockname()[1]


def _end_with_parent() -> Callable[[], None] | None:
    """What a new process does first: ask Linux to end it when the supervisor is gone, however that came about."""
    if sys.platform != "linux":
        return None
    library, set_death_signal = ctypes.CDLL(None), 1
    return lambda: library.prctl(set_death_signal, signal.SIGKILL)
