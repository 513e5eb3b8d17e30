"""Processes that are to train together compare what they are about to do, before they do it.

A host with an older copy of the code, another recipe or other data would hang the run, or change its result without a
word. So each process says what it has as facts (name -> value); `agree` compares them everywhere and says which
processes differ in what:

    agree({"code": code_fingerprint(package), "recipe.seed": "3", ...})

A process that could not even prepare says so instead of its facts, and all stop with its message.
"""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from tracevision_jax.errors import UserError
from tracevision_jax.parallel.processes import AgreedError, gather

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers")
"""What results depend on."""
SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_debug_nans",
)
"""Of jax; where they differ, so do the compiled programs."""
SHOWN = 12
"""Differing facts that a message lists."""
SEEN_AFTER = 60.0
"""Seconds until a host must see what another wrote; NFS remembers a folder for 30 to 60."""


def agree(facts: Mapping[str, str], fault: UserError | None = None) -> None:
    """Return when all processes have the same facts and none has a fault.

    Args:
        facts: what this process has; empty when it has a fault.
        fault: why this process cannot go on.

    Raises:
        AgreedError: on the first process, with what differs; on the others SystemExit(2), since one message is enough.
        A process that is alone raises its fault.
    """
    if jax.process_count() == 1:
        if fault is not None:
            raise fault
        return
    content = json.dumps({"facts": dict(facts), "fault": str(fault or "")}, sort_keys=True)
    digests = gather(hashlib.sha256(content.encode()).hexdigest())
    if len(set(digests)) == 1 and not fault:
        return
    told = [json.loads(text) for text in gather(content)]
    if jax.process_index() > 0:
        raise SystemExit(2)
    faults = {number: each["fault"] for number, each in enumerate(told) if each["fault"]}
    if faults:
        raise AgreedError(_faults(faults, len(told)))
    lines = differences([each["facts"] for each in told])
    more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    raise AgreedError(
        f"The {len(told)} processes of this run are about to do different things:\n  "
        + "\n  ".join(lines[:SHOWN] + more)
        + "\nStart all of them from the same code, with the same command and the same data."
    )


def differences(facts: Sequence[Mapping[str, str]]) -> list[str]:
    """A line for every fact that differs between processes: its values, and who has which."""
    lines = []
    for name in dict.fromkeys(name for each in facts for name in each):
        holders: dict[str, list[int]] = {}
        for number, each in enumerate(facts):
            holders.setdefault(each.get(name, "(none)"), []).append(number)
        if len(holders) > 1:
            values = "; ".join(f"{value} on {processes(numbers)}" for value, numbers in holders.items())
            lines.append(f"{name}: {values}")
    return lines


def processes(numbers: Sequence[int]) -> str:
    """ "process 3", "processes 0-2, 5"."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    texts = [f"{first}-{last}" if last > first else f"{first}" for first, last in spans]
    return f"process{'es' if len(numbers) > 1 else ''} {', '.join(texts)}"


def environment_facts() -> dict[str, str]:
    """Versions of libraries, jax's settings and devices, flags of the compiler (where it writes its dumps apart)."""
    facts = {f"version of {name}": _version(name) for name in LIBRARIES}
    facts |= {f"jax.config.{name}": str(getattr(jax.config, name)) for name in SETTINGS}
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        facts[name] = " ".join(sorted(flag for flag in os.environ.get(name, "").split() if "_dump_" not in flag))
    facts["devices"] = f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"
    return facts


def code_fingerprint(packages: Iterable[Path]) -> str:
    """Hash of all Python files of some packages, given as folders."""
    digest = hashlib.sha256()
    for package in packages:
        for file in sorted(package.rglob("*.py")):
            digest.update(file.relative_to(package.parent).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def flat(content: Any, path: str) -> Iterator[tuple[str, str]]:
    """(path with dots, value) of every leaf of JSON values."""
    if isinstance(content, dict) and content:
        for name, value in content.items():
            yield from flat(value, f"{path}.{name}" if name else f"{path} (class)")
    elif isinstance(content, list) and content:
        for number, value in enumerate(content):
            yield from flat(value, f"{path}[{number}]")
    else:
        yield path, json.dumps(content)


def check_shared(directory: Path) -> None:
    """Check that a folder, made if absent, is the same on all hosts.

    Raises:
        AgreedError: as `agree`; some processes do not see what the first writes there.
    """
    if jax.process_count() == 1:
        return
    word = gather(uuid.uuid4().hex)[0]
    mark = directory / f".seen_by_all_{word}"
    fault = None
    if jax.process_index() == 0:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError as error:
            fault = UserError(f"The folder of the run cannot be written: {error}.")
    agree({}, fault)
    unseen = UserError(
        f"What process 0 writes in {directory} is not seen; --out must be a folder that all hosts share."
    )
    try:
        agree({}, None if _appears(mark) else unseen)
    finally:
        if jax.process_index() == 0:
            mark.unlink(missing_ok=True)


def _appears(file: Path) -> bool:
    """Whether a file is there, or comes within the time for which network file systems remember a folder."""
    deadline = time.monotonic() + SEEN_AFTER
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def _faults(faults: Mapping[int, str], count: int) -> str:
    groups: dict[str, list[int]] = {}
    for number, fault in faults.items():
        groups.setdefault(fault, []).append(number)
    if len(groups) == 1 and len(faults) == count:
        return next(iter(groups))
    return "\n".join(f"{processes(numbers)} of {count}: {fault}" for fault, numbers in groups.items())


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
