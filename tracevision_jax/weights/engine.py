"""Names, shapes and layouts between PyTorch checkpoints and Flax parameters: one engine, one table a family.

A table is a list of rules. A rule names a tensor in PyTorch and a parameter in Flax and says with an
einops-like pattern how the axes of one become those of the other:

    Rule("model.layers.{}.self_attn.q_proj.weight", "language/layers/attn/q/kernel",
         "(heads head_dim) width -> width heads head_dim", layers={(n,): (n,) for n in range(80)})

`layers` maps the numbers in the PyTorch name to the place in the leading (scanned) axes of the parameter. A
`Part` takes a stretch of an axis, so that several rules can split one tensor, or stack several into one
parameter. All axes have known lengths (`sizes`), hence every shape on both sides is known before anything is
read, and a `Table` refuses rules that leave out or repeat any part of either side.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from flax import traverse_util

from tracevision_jax.errors import UserError
from tracevision_jax.weights.copying import copy_into
from tracevision_jax.weights.sources import TensorInfo

Shape = tuple[int, ...]
Axes = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Part:
    """The stretch start..stop of a named axis that is `total` long as a whole."""

    axis: str
    start: int
    stop: int
    total: int


@dataclass(frozen=True)
class Rule:
    """How one tensor (or one a layer) becomes one parameter, or part of it."""

    torch: str
    """Name in PyTorch; `{}` stands for the numbers of the layer."""
    flax: str
    """Path of the parameter."""
    pattern: str
    """Axes in PyTorch -> axes in Flax, without the leading ones; parentheses join axes."""
    layers: Mapping[Shape, Shape] = field(default_factory=lambda: {(): ()})
    """Numbers in the name -> index in the parameter's leading axes."""
    torch_part: Part | None = None
    """Which part of the tensor is meant."""
    flax_part: Part | None = None
    """Which part of the parameter is meant; its axis stands alone in the pattern."""
    unused_rest: bool = False
    """What no rule covers of the parameter is read by nobody; it is filled with zeros."""


@dataclass(frozen=True)
class Layout:
    """The axes of a rule on both sides, with their lengths."""

    torch_axes: Axes
    flax_axes: Axes
    lengths: Mapping[str, int]
    """Of what is moved."""
    torch_part: Part | None
    flax_part: Part | None

    def _full(self, axis: str, part: Part | None) -> int:
        return part.total if part and part.axis == axis else self.lengths[axis]

    @cached_property
    def torch_shape(self) -> Shape:
        """Shape of the whole tensor."""
        return tuple(_product(self._full(a, self.torch_part) for a in axes) for axes in self.torch_axes)

    @cached_property
    def block_shape(self) -> Shape:
        """Shape of what is moved, as the parameter has it, without leading axes."""
        return tuple(_product(self.lengths[a] for a in axes) for axes in self.flax_axes)

    @cached_property
    def parameter_shape(self) -> Shape:
        """Shape of the whole parameter, without leading axes."""
        return tuple(_product(self._full(a, self.flax_part) for a in axes) for axes in self.flax_axes)

    @cached_property
    def block_start(self) -> Shape:
        """Where the block begins in the parameter, without leading axes."""
        part = self.flax_part
        return tuple(part.start if part and axes == (part.axis,) else 0 for axes in self.flax_axes)

    def _torch_view(self, tensor: np.ndarray) -> np.ndarray:
        """The part of the tensor that is moved, its axes taken apart."""
        names = [a for axes in self.torch_axes for a in axes]
        view = tensor.reshape([self._full(a, self.torch_part) for a in names])
        part = self.torch_part
        chosen = (slice(part.start, part.stop) if part and a == part.axis else slice(None) for a in names)
        return view[tuple(chosen)]

    def to_flax(self, tensor: np.ndarray) -> np.ndarray:
        """The block of the parameter that a tensor becomes."""
        torch_names = [a for axes in self.torch_axes for a in axes]
        flax_names = [a for axes in self.flax_axes for a in axes]
        order = [torch_names.index(a) for a in flax_names]
        return self._torch_view(tensor).transpose(order).reshape(self.block_shape)

    def fill_torch(self, tensor: np.ndarray, block: np.ndarray) -> None:
        """Write what a block of the parameter becomes into its part of a contiguous tensor."""
        torch_names = [a for axes in self.torch_axes for a in axes]
        flax_names = [a for axes in self.flax_axes for a in axes]
        order = [flax_names.index(a) for a in torch_names]
        parts = block.reshape([self.lengths[a] for a in flax_names])
        copy_into(self._torch_view(tensor), parts.transpose(order))


@dataclass(frozen=True)
class Move:
    """One tensor, or part of it, and the block of the parameter that it is."""

    name: str
    path: str
    start: Shape
    """First corner of the block in the parameter, leading axes included."""
    shape: Shape
    """Of the block, leading axes included (with length 1)."""
    layout: Layout

    def to_flax(self, tensor: np.ndarray) -> np.ndarray:
        """The block, with its leading axes."""
        return self.layout.to_flax(tensor).reshape(self.shape)


class Table:
    """The rules of a family at given sizes, written out tensor by tensor and checked for completeness."""

    def __init__(
        self,
        rules: Sequence[Rule],
        sizes: Mapping[str, int],
        same: Mapping[str, str] | None = None,
        copies: Mapping[str, str] | None = None,
    ):
        """Write the rules out.

        Args:
            rules: all of the family.
            sizes: length of every axis.
            same: tensors that a checkpoint may repeat under another name (that name -> the one in the rules).
            copies: as `same`, and they are also written under the other name.

        Raises:
            ValueError: rules that leave out or repeat part of a tensor or parameter.
        """
        self.copies = dict(copies or {})
        self.same = {**(same or {}), **self.copies}
        self.moves = [move for rule in rules for move in _moves(rule, sizes)]
        self.by_name: dict[str, list[Move]] = defaultdict(list)
        self.by_path: dict[str, list[Move]] = defaultdict(list)
        for move in self.moves:
            self.by_name[move.name].append(move)
            self.by_path[move.path].append(move)
        self.torch_shapes = {name: moves[0].layout.torch_shape for name, moves in self.by_name.items()}
        unused = {rule.flax for rule in rules if rule.unused_rest}
        self.flax_shapes = {
            path: _leading_shape(moves) + moves[0].layout.parameter_shape for path, moves in self.by_path.items()
        }
        for name, moves in self.by_name.items():
            _check_tensor(name, moves)
        for path, moves in self.by_path.items():
            _check_parameter(path, moves, self.flax_shapes[path], path in unused)

    @property
    def written(self) -> dict[str, str]:
        """{name that is written: name in the rules}."""
        return {name: name for name in self.torch_shapes} | self.copies

    def check_tensors(self, tensors: Mapping[str, TensorInfo], whole: str) -> None:
        """Compare a checkpoint's names and shapes with what the table wants; `whole` names the checkpoint.

        Raises:
            CheckpointMismatch: with everything that is missing, unexpected or of another shape.
        """
        wanted = dict(self.torch_shapes)
        wanted |= {name: wanted[other] for name, other in self.same.items() if name in tensors}
        _compare(wanted, {name: info.shape for name, info in tensors.items()}, whole)

    def check_parameters(self, shapes: Mapping[str, Shape], whole: str) -> None:
        """Compare paths and shapes of a parameter tree with what the table gives, like `check_tensors`."""
        _compare(self.flax_shapes, shapes, whole)

    def blocks(self, path: str) -> Iterator[tuple[Shape, list[Move]]]:
        """The parameter's blocks (index in the leading axes, moves that make it) in memory order."""
        grouped: dict[Shape, list[Move]] = defaultdict(list)
        for move in self.by_path[path]:
            grouped[_leading(move)].append(move)
        yield from sorted(grouped.items(), key=lambda item: item[0])


class CheckpointMismatch(UserError):
    """A checkpoint that is not what its configuration says: every difference, found at once."""

    def __init__(self, whole: str, missing: list[str], unexpected: list[str], misshaped: list[str]):
        self.missing, self.unexpected, self.misshaped = missing, unexpected, misshaped
        lines = [f"{whole} does not fit its configuration:"]
        found = (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", misshaped))
        for title, names in found:
            if names:
                lines += [f"  {title} ({len(names)}):", *(f"    {name}" for name in names)]
        super().__init__("\n".join(lines))


def _compare(wanted: Mapping[str, Shape], found: Mapping[str, Shape], whole: str) -> None:
    missing = sorted(set(wanted) - set(found))
    unexpected = sorted(set(found) - set(wanted))
    misshaped = [
        f"{name}: {list(found[name])}, expected {list(wanted[name])}"
        for name in sorted(set(wanted) & set(found))
        if tuple(found[name]) != tuple(wanted[name])
    ]
    if missing or unexpected or misshaped:
        raise CheckpointMismatch(whole, missing, unexpected, misshaped)


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries -> {path: leaf}."""
    return traverse_util.flatten_dict(dict(tree), sep="/")


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """{path: leaf} -> nested dictionaries."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


def _product(lengths: Iterable[int]) -> int:
    return int(np.prod(list(lengths), dtype=np.int64))


def _axes(side: str) -> Axes:
    """`"(a b) c"` -> `(("a", "b"), ("c",))`."""
    return tuple(tuple((group or name).split()) for group, name in re.findall(r"\(([^()]*)\)|(\S+)", side))


def _moves(rule: Rule, sizes: Mapping[str, int]) -> Iterator[Move]:
    torch_axes, flax_axes = (_axes(side) for side in rule.pattern.split("->"))
    names = sorted(a for axes in torch_axes for a in axes)
    if names != sorted(a for axes in flax_axes for a in axes) or len(set(names)) != len(names):
        raise ValueError(f"{rule.torch}: the sides of '{rule.pattern}' do not have the same axes")
    lengths = {name: sizes[name] for name in names if name in sizes}
    for part in (rule.torch_part, rule.flax_part):
        if part:
            lengths[part.axis] = part.stop - part.start
    if unknown := set(names) - set(lengths):
        raise ValueError(f"{rule.torch}: no length known for {', '.join(sorted(unknown))}")
    if rule.flax_part and (rule.flax_part.axis,) not in flax_axes:
        raise ValueError(f"{rule.flax}: the axis '{rule.flax_part.axis}' of a part must stand alone")
    layout = Layout(torch_axes, flax_axes, lengths, rule.torch_part, rule.flax_part)
    for numbers, index in rule.layers.items():
        yield Move(
            rule.torch.format(*numbers),
            rule.flax,
            tuple(index) + layout.block_start,
            (1,) * len(index) + layout.block_shape,
            layout,
        )


def _leading(move: Move) -> Shape:
    return move.start[: len(move.start) - len(move.layout.block_start)]


def _leading_shape(moves: Sequence[Move]) -> Shape:
    return tuple(max(places) + 1 for places in zip(*(_leading(move) for move in moves), strict=True))


def _check_stretches(what: str, parts: list[Part | None], unused_rest: bool = False) -> None:
    """Parts of one thing must follow each other along one axis, not overlap and (else) leave no gap."""
    if len(parts) == 1 and parts[0] is None:
        return
    stretches = sorted((part.axis, part.start, part.stop, part.total) for part in parts if part)
    starts = [start for _, start, _, _ in stretches] + [stretches[-1][3]] if stretches else []
    ends = [0] + [stop for _, _, stop, _ in stretches]
    complete = (
        len(stretches) == len(parts)
        and len({(axis, total) for axis, _, _, total in stretches}) == 1
        and all(start >= end if unused_rest else start == end for start, end in zip(starts, ends, strict=True))
    )
    if not complete:
        raise ValueError(f"the rules for {what} repeat or leave out part of it: {parts}")


def _check_tensor(name: str, moves: list[Move]) -> None:
    if len({(move.layout.torch_axes, move.layout.torch_shape) for move in moves}) > 1:
        raise ValueError(f"the rules for {name} take it apart in different ways")
    _check_stretches(name, [move.layout.torch_part for move in moves])


def _check_parameter(path: str, moves: list[Move], shape: Shape, unused_rest: bool) -> None:
    if len({move.layout.parameter_shape for move in moves}) > 1:
        raise ValueError(f"the rules for {path} give it different shapes")
    grouped: dict[Shape, list[Part | None]] = defaultdict(list)
    for move in moves:
        grouped[_leading(move)].append(move.layout.flax_part)
    leading = len(shape) - len(moves[0].layout.parameter_shape)
    if len(grouped) != _product(shape[:leading]):
        raise ValueError(f"the rules for {path} leave out some of its layers")
    for index, parts in grouped.items():
        _check_stretches(f"{path}{list(index)}", parts, unused_rest)
