"""The collectives of a compiled program: which, along which mesh axes, how often, and how many bytes each chip sends.

    for use in collectives(parse(compiled.as_text()), mesh.shape):
        print(use.kind, use.axes, use.times, use.sent_bytes)

Bytes are those of the ring algorithms: with n chips in a group, a gather, a scattered sum and an all-to-all send
(n - 1) / n of the whole array, a sum twice that, a permutation its array once.

A program for several TPU slices is written for one of them: its groups number the chips of a slice, so `mesh` is the
part of the mesh in one slice. What goes from slice to slice stands there as a transfer to the host and back; its axes
are `BETWEEN_SLICES`, its group one chip of every slice.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

from tracevision_jax.parallel.hlo import Instruction, Module, Step, executed

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

BETWEEN_SLICES = "slices"
"""Stands for an axis in the collectives that leave a slice."""

_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_TARGET = re.compile(r'_xla_megascale_target="\{([\d,:]+)\}x')
"""Slices that take part, counted from 1: {1,2} or {1:4}."""

_LATER_PIECE = re.compile(r'"flag_start":"\d')
"""TPU spreads a collective over several fusions, each of which writes it down again; only the first starts it (-1)."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program's text."""

    kind: str
    axes: tuple[str, ...]
    """Mesh axes along which its groups extend."""
    group: int
    """Chips of a group."""
    whole_bytes: int
    """The array that a group holds together (gathered, before scattering, summed)."""
    times: int
    """Trip counts of the loops around it, multiplied."""
    known: bool
    """Whether all of them are known; else it is counted once."""
    origin: str
    arrays: tuple[str, ...] = ()
    """Kind and sizes of the results, such as "f32[8,128]"; the compiler joins what may run together."""

    @property
    def sent_bytes(self) -> float:
        """Bytes that each chip sends, all times together."""
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.times * self.whole_bytes)
        share = (self.group - 1) / self.group * (2 if self.kind == "all-reduce" else 1)
        return self.times * self.whole_bytes * share


def collectives(module: Module, mesh: Mapping[str, int]) -> list[Collective]:
    """All collectives that run; `mesh` gives the sizes of the mesh axes in their order.

    Groups of one chip, which move nothing, are left out.
    """
    found = (_collective(step, mesh) for step in executed(module))
    return [use for use in found if use is not None and use.group > 1 and use.whole_bytes]


def by_axes(uses: Iterable[Collective]) -> dict[tuple[str, ...], list[Collective]]:
    """Grouped by the mesh axes."""
    grouped: dict[tuple[str, ...], list[Collective]] = {}
    for use in uses:
        grouped.setdefault(use.axes, []).append(use)
    return grouped


def _collective(step: Step, mesh: Mapping[str, int]) -> Collective | None:
    instruction = step.instruction
    if instruction.opcode == "send" and (transfer := _TRANSFER.search(instruction.attributes)):
        return _between_slices(step, transfer.group(1))
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS or _LATER_PIECE.search(instruction.attributes):
        return None
    groups = _groups(instruction, math.prod(mesh.values()))
    size = 2 if kind == "collective-permute" else groups.shape[1]
    whole = _whole_bytes(instruction, kind, size, step)
    if kind == "all-reduce" and step.fused and "all-reduce-scatter" in step.computation.name:
        kind = "reduce-scatter"  # TPU writes it as a fusion of a sum and the slice that a chip keeps
    arrays = tuple(f"{shape.kind}[{','.join(map(str, shape.dims))}]" for shape in instruction.shapes)
    return Collective(
        kind, _axes(groups, mesh), size if groups.size else 1, whole, step.times, step.known, instruction.origin, arrays
    )


def _between_slices(step: Step, transfer: str) -> Collective:
    """What a chip hands to its host for the same chip of other slices; the last operand of a send is a token."""
    instruction = step.instruction
    given = step.computation.instructions[instruction.operands[0]]
    kind = transfer.lower().replace("_", "-")
    if kind not in KINDS:
        kind = "collective-permute"  # from one slice to another
    found = _TARGET.search(instruction.attributes)
    size = sum(_span(part) for part in found.group(1).split(",")) if found else 2
    whole = given.bytes * size if kind == "all-gather" else given.bytes
    arrays = tuple(f"{shape.kind}[{','.join(map(str, shape.dims))}]" for shape in given.shapes)
    return Collective(kind, (BETWEEN_SLICES,), size, whole, step.times, step.known, instruction.origin, arrays)


def _span(part: str) -> int:
    """Of a number or a first and a last one."""
    ends = part.split(":")
    return int(ends[-1]) - int(ends[0]) + 1


def _whole_bytes(instruction: Instruction, kind: str, size: int, step: Step) -> int:
    operands = [step.computation.instructions[name] for name in instruction.operands]
    given = sum(operand.bytes for operand in operands)
    return given * size if kind == "all-gather" else given


def _groups(instruction: Instruction, devices: int) -> np.ndarray:
    """Devices that take part together: (groups, devices of a group); of a permutation (pairs, 2)."""
    text = instruction.attributes
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", text):
        found = [[int(n) for n in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs.group(1))]
        moving = [pair for pair in found if pair[0] != pair[1]]
        return np.array(moving, int).reshape(-1, 2)
    if short := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, sizes, order = (_numbers(part) for part in short.groups())
        numbers = np.arange(math.prod(sizes)).reshape(sizes)
        return (numbers.transpose(order) if order else numbers).reshape(shape)
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}", text):
        return _named_groups(*named.groups())
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed.group(1))])
    return np.arange(devices)[None]


def _named_groups(axes: str, order: str, grouped: str) -> np.ndarray:
    """Groups that are written as axes of a mesh of XLA's own, such as mesh['a'=2,'b'=4] {'b':(2)2}.

    (2)2 is the part of size 2 of an axis behind a major part of size 2. An order of devices other than the plain one
    stands between.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", axes)}
    numbers = np.arange(math.prod(sizes.values()))
    if moved := re.search(r"device_ids=\(?\[([\d,]+)\](?:T\(([\d,]+)\))?", order):
        shape, axes_order = (_numbers(part) for part in moved.groups())
        numbers = numbers.reshape(shape)
        numbers = (numbers.transpose(axes_order) if axes_order else numbers).ravel()
    taken = {name: (before, size) for name, before, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", grouped)}
    shape, members = [], []
    for name, size in sizes.items():
        before, part = (int(n) if n else None for n in taken.get(name, ("", "")))
        before, part = (1, size if name in taken else 1) if before is None or part is None else (before, part)
        members.append(len(shape) + 1)
        shape += [before, part, size // before // part]
    others = [axis for axis in range(len(shape)) if axis not in members]
    count = math.prod(shape[axis] for axis in members)
    return numbers.reshape(shape).transpose(*others, *members).reshape(-1, count)


def _numbers(text: str | None) -> list[int]:
    return [int(number) for number in text.split(",")] if text else []


def _axes(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes along which the members of any group differ."""
    places = np.array(np.unravel_index(groups, tuple(mesh.values())))  # (axes, groups, members)
    differ = (places != places[:, :, :1]).any(axis=(1, 2))
    return tuple(name for name, differs in zip(mesh, differ, strict=True) if differs)
