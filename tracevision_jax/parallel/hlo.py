"""Reading a compiled program's HLO text: instructions, how often each runs, its products' FLOPs, its traffic with HBM.

XLA's own cost analysis counts the body of a loop once. Here every instruction is multiplied by the trip counts of the
loops around it, which XLA writes beside them (`known_trip_count`), or which their counters tell. A loop whose count
only the data decide, such as the one that decodes tokens, counts once: costs are then those of one turn.

    module = parse(compiled.as_text())
    for step in executed(module): ...                   # (instruction, times, whether inside a fusion)
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

_BYTES = {"pred": 1, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_CALLS = re.compile(r"\b(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_INDEX = re.compile(r"\bindex=(\d+)")
_NAMES = re.compile(r"%([\w.\-]+)")
_LIBRARY = re.compile(r'custom_call_target="__(?:(cublas)|cudnn\$conv(Forward|BackwardInput|BackwardFilter))')
_DEFINES = re.compile(r"\s+(ROOT )?%?[\w.\-]+ = ")


class Shape(NamedTuple):
    """One array of an instruction's result."""

    kind: str
    dims: tuple[int, ...]
    space: int = 0
    """Memory space; 0 is HBM."""

    @property
    def bytes(self) -> int:
        """Without padding of the layout."""
        if self.kind in _BYTES:
            return _BYTES[self.kind] * math.prod(self.dims)
        bits = re.search(r"\d+", self.kind)
        return math.prod(self.dims) * int(bits.group() if bits else 32) // 8


def read_shapes(text: str) -> tuple[Shape, ...]:
    """All arrays of a shape's text, tuples flattened."""
    found = []
    for kind, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size.strip("<=")) for size in dims.split(",") if size)
        found.append(Shape(kind, sizes, int(space.group(1)) if space else 0))
    return tuple(found)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    inside: str
    """What stands between the parentheses: operands, a parameter's number, a constant."""
    attributes: str
    root: bool

    @property
    def called(self) -> Mapping[str, str]:
        """{attribute: computation}; branches are numbered."""
        found = dict(_CALLS.findall(self.attributes))
        if branches := _BRANCHES.search(self.attributes):
            found |= {f"branch {n}": name.strip(" %") for n, name in enumerate(branches.group(1).split(","))}
        return found

    @property
    def origin(self) -> str:
        """Where the program says it comes from (`op_name` of its metadata)."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    @property
    def bytes(self) -> int:
        """Of the result."""
        return sum(shape.bytes for shape in self.shapes)


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in order."""

    name: str
    instructions: Mapping[str, Instruction]

    @cached_property
    def root(self) -> Instruction:
        """What it returns."""
        listed = list(self.instructions.values())
        return next((instruction for instruction in listed if instruction.root), listed[-1])

    @cached_property
    def users(self) -> Mapping[str, list[Instruction]]:
        """{name: the instructions that take it}."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for operand in instruction.operands:
                found.setdefault(operand, []).append(instruction)
        return found


class Module(NamedTuple):
    """A compiled program of one device."""

    computations: Mapping[str, Computation]
    entry: str


class Step(NamedTuple):
    """An instruction that runs."""

    instruction: Instruction
    computation: Computation
    times: int
    """Trip counts of the loops around it, multiplied."""
    fused: bool
    """Whether it lies inside a fusion, so that its operands and result are in registers."""
    known: bool
    """Whether all trip counts around it are known."""


def parse(text: str) -> Module:
    """Read the text of a module; raises ValueError when it has no entry computation."""
    computations: dict[str, Computation] = {}
    entry = name = ""
    lines: list[str] = []
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and not name and not line.startswith("HloModule"):
            name, lines = header.group(2), []
            entry = name if header.group(1) else entry
        elif name and line.rstrip() == "}":
            read = map(_read_line, lines)
            computations[name] = Computation(name, {instruction.name: instruction for instruction in read})
            name = ""
        elif name and _DEFINES.match(line):
            lines.append(line.strip())
        elif name and lines:  # a kernel's metadata may hold line breaks
            lines[-1] += line
    if not entry:
        raise ValueError("this is no HLO module: it has no ENTRY computation")
    return Module(computations, entry)


def _read_line(line: str) -> Instruction:
    root = line.startswith("ROOT ")
    name, rest = line.removeprefix("ROOT ").split(" = ", 1)
    rest = re.sub(r"/\*.*?\*/", "", rest)
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    return Instruction(
        name.strip(" %"), rest[:opening], read_shapes(shape), tuple(_NAMES.findall(inside)), inside,
        rest[closing + 1 :], root,
    )  # fmt: skip


def _closing(text: str, opening: int) -> int:
    """Place of the parenthesis that closes the one at `opening`."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


def trip_count(module: Module, loop: Instruction) -> int | None:
    """How often a while loop turns: as XLA noted, or by its counter, which begins at 0; None: unknown.

    The counter is what the condition compares with a constant. Its steps are what the body adds: not always 1, as
    XLA unrolls the loops that it makes of a product and a collective.
    """
    if noted := _TRIPS.search(loop.attributes):
        return int(noted.group(1))
    condition, body = (module.computations[loop.called[name]] for name in ("condition", "body"))
    compare = condition.root
    if compare.opcode == "fusion" and "calls" in compare.called:
        compare = module.computations[compare.called["calls"]].root
    if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
        return None
    compared = [condition.instructions[name] for name in condition.root.operands]
    limits = [number for number in map(_constant, compared) if number is not None]
    counters = [_INDEX.search(value.attributes) for value in compared if value.opcode == "get-tuple-element"]
    if len(limits) != 1 or len(counters) != 1 or counters[0] is None or body.root.opcode != "tuple":
        return None
    step = _step(body, body.instructions[body.root.operands[int(counters[0].group(1))]])
    return -(-limits[0] // step) if step else None


def _constant(value: Instruction) -> int | None:
    """The number of a constant that is one of 0, 1, ..."""
    return int(value.inside) if value.opcode == "constant" and value.inside.isdigit() else None


def _step(body: Computation, value: Instruction) -> int | None:
    """What a loop's body adds to its counter, given the counter's new value; None if that cannot be read."""
    while value.opcode in ("copy", "bitcast"):
        value = body.instructions[value.operands[0]]
    added = [_constant(body.instructions[name]) for name in value.operands] if value.opcode == "add" else []
    return next((number for number in added if number is not None), None)


def executed(module: Module) -> Iterator[Step]:
    """Every instruction that runs, with how often; both branches of a condition count."""

    def visit(name: str, times: int, fused: bool, known: bool) -> Iterator[Step]:
        computation = module.computations[name]
        for instruction in computation.instructions.values():
            yield Step(instruction, computation, times, fused, known)
            called = instruction.called
            if instruction.opcode == "while":
                trips = trip_count(module, instruction)
                yield from visit(
                    called["body"], times * (1 if trips is None else trips), fused, known and trips is not None
                )
            elif instruction.opcode == "fusion":
                yield from visit(called["calls"], times, True, known)
            elif instruction.opcode in ("call", "async-start", "conditional"):
                for inner in called.values():
                    yield from visit(inner, times, fused, known)

    return visit(module.entry, 1, False, True)


def product_flops(instruction: Instruction, computation: Computation) -> int:
    """2 x multiplications of a dot or convolution (taps that fall on padding left out), calls of cuBLAS and cuDNN
    included; 0 for all else."""
    attributes, opcode = instruction.attributes, instruction.opcode
    if opcode not in ("dot", "convolution", "custom-call"):
        return 0
    target = _LIBRARY.search(attributes) if opcode == "custom-call" else None
    if opcode == "custom-call" and target is None:
        return 0
    left, right = (computation.instructions[name].shapes[0].dims for name in instruction.operands[:2])
    result = instruction.shapes[0].dims
    if opcode == "dot" or (target and target.group(1) == "cublas"):
        contracted = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', attributes)
        axes = [int(axis) for axis in re.findall(r"\d+", contracted.group(1))] if contracted else []
        return 2 * math.prod(result) * math.prod(left[axis] for axis in axes)
    # Gradients by cuDNN keep the labels and the window of the forward pass; what they give has changed places with what
    # they take.
    if target and target.group(2) == "BackwardInput":
        left, result = result, left
    elif target and target.group(2) == "BackwardFilter":
        right, result = result, right
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    assert labels is not None
    lhs, rhs, out = labels.groups()
    window = _window(attributes)
    taps = 1
    for number in range(len(lhs) - 2):
        label = str(number)
        option = {key: values[number] for key, values in window.items()}
        taps *= _taps(left[lhs.index(label)], right[rhs.index(label)], result[out.index(label)], option)
    groups = re.search(r"batch_group_count=(\d+)", attributes)
    batch = left[lhs.index("b")] // (int(groups.group(1)) if groups else 1)
    return 2 * taps * batch * right[rhs.index("i")] * right[rhs.index("o")]


def _window(attributes: str) -> dict[str, list[str]]:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    return {key: values.split("x") for key, values in re.findall(r"(\w+)=([\d_x\-]+)", found.group(1))} if found else {}


def _taps(size: int, kernel: int, result: int, window: Mapping[str, str]) -> int:
    """Pairs of an output place and a kernel place along one dimension that meet an input, not padding."""
    stride, low = int(window.get("stride", 1)), int(window.get("pad", "0_0").split("_")[0])
    spread, step = int(window.get("lhs_dilate", 1)), int(window.get("rhs_dilate", 1))
    place = np.arange(result)[:, None] * stride + np.arange(kernel)[None] * step - low
    return int(((place >= 0) & (place <= (size - 1) * spread) & (place % spread == 0)).sum())


FREE = {
    *("parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
    *("partition-id", "replica-id", "after-all", "add-dependency", "optimization-barrier", "domain"),
    *("async-start", "async-update", "async-done", "copy-done", "slice-done", "send", "send-done", "recv", "recv-done"),
    *("all-gather-done", "all-reduce-done", "collective-permute-done"),
}
"""Opcodes that move nothing through HBM themselves."""


def hbm_bytes(step: Step, module: Module) -> int:
    """Bytes that one run of a top-level instruction reads and writes in HBM; what lies in on-chip memory is free.

    A slice of a larger array counts as the slice, also inside a fusion; so does an update in place.
    """
    instruction, computation = step.instruction, step.computation
    if step.fused or instruction.opcode in FREE:
        return 0
    if instruction.opcode in ("copy-start", "slice-start"):  # the result names the source, too
        source, moved = instruction.shapes[:2]
        return moved.bytes * ((source.space == 0) + (moved.space == 0))
    if instruction.opcode == "dynamic-slice":
        return 2 * _in_hbm(instruction)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _in_hbm(computation.instructions[instruction.operands[1]])
    operands = [computation.instructions[name] for name in instruction.operands if name in computation.instructions]
    if instruction.opcode != "fusion":
        return _in_hbm(instruction) - _workspace(instruction) + sum(map(_in_hbm, operands))
    inner = module.computations[instruction.called["calls"]]
    read = sum(min(_in_hbm(operand), _read(module, inner, n)) for n, operand in enumerate(operands))
    return read + min(_in_hbm(instruction), _written(module, inner, inner.root))


def _in_hbm(instruction: Instruction) -> int:
    return sum(shape.bytes for shape in instruction.shapes if shape.space == 0)


def _workspace(instruction: Instruction) -> int:
    """Bytes that a library on GPU may use or not: the last result of its calls."""
    scratch = instruction.shapes[-1]
    library = instruction.opcode == "custom-call" and 'custom_call_target="__cu' in instruction.attributes
    return scratch.bytes if library and scratch.kind in ("s8", "u8") and len(scratch.dims) == 1 else 0


def _read(module: Module, inner: Computation, number: int) -> int:
    """Bytes of a fusion's operand that its uses need, also those in fusions inside it."""
    given = (p for p in inner.instructions.values() if p.opcode == "parameter" and int(p.inside) == number)
    return sum(_needed(module, inner, parameter) for parameter in given)


def _needed(module: Module, inner: Computation, value: Instruction) -> int:
    needed = 0
    for user in inner.users.get(value.name, []):
        if user.opcode == "bitcast":
            needed += _needed(module, inner, user)
        elif user.opcode == "fusion":
            nested = module.computations[user.called["calls"]]
            needed += sum(_read(module, nested, n) for n, name in enumerate(user.operands) if name == value.name)
        elif user.opcode == "dynamic-slice" and user.operands[0] == value.name:
            needed += user.bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            continue
        else:
            return value.bytes
    return needed


def _written(module: Module, inner: Computation, root: Instruction) -> int:
    """Bytes that a fusion's result changes."""
    if root.opcode == "tuple":
        return sum(_written(module, inner, inner.instructions[name]) for name in root.operands)
    if root.opcode == "bitcast":
        return _written(module, inner, inner.instructions[root.operands[0]])
    if root.opcode == "fusion":
        nested = module.computations[root.called["calls"]]
        return _written(module, nested, nested.root)
    if root.opcode == "dynamic-update-slice":
        return inner.instructions[root.operands[1]].bytes
    return root.bytes
