"""Rules of layers that many families have: linear maps, convolutions and norms, each a weight and a bias.

    rules = [*linear("mlp.lin1", "mlp/proj_in", "mlp", "width"), *norm("norm1", "layer_norm1", "width")]

Names are given without `.weight` and `.bias`, axes by their names in the table's sizes, outputs before inputs as
PyTorch has them. Axes "one" and "uno" are of length 1.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from tracevision_jax.weights.engine import Rule, Shape

Layers = Mapping[Shape, Shape]
"""Numbers in the names -> index in the parameter's leading axes, see `Rule.layers`."""


def _more(layers: Layers | None) -> dict[str, Any]:
    return {} if layers is None else {"layers": layers}


def weight_and_bias(theirs: str, ours: str, weight: str, bias: str, layers: Layers | None = None) -> Iterator[Rule]:
    """A kernel and a bias with patterns of their own."""
    yield Rule(f"{theirs}.weight", f"{ours}/kernel", weight, **_more(layers))
    yield Rule(f"{theirs}.bias", f"{ours}/bias", bias, **_more(layers))


def linear(theirs: str, ours: str, out: str, inner: str, layers: Layers | None = None) -> Iterator[Rule]:
    """A matrix."""
    yield from weight_and_bias(theirs, ours, f"{out} {inner} -> {inner} {out}", f"{out} -> {out}", layers)


def pointwise(theirs: str, ours: str, out: str, inner: str) -> Iterator[Rule]:
    """A convolution of 1 x 1, here a matrix."""
    yield from weight_and_bias(theirs, ours, pointwise_pattern(out, inner), f"{out} -> {out}")


def pointwise_pattern(out: str, inner: str) -> str:
    """Of the weight of a convolution of 1 x 1."""
    return f"{out} {inner} one uno -> ({inner} one uno) {out}"


def conv(theirs: str, ours: str, out: str, inner: str, row: str, column: str) -> Iterator[Rule]:
    """A convolution in two dimensions."""
    yield from weight_and_bias(theirs, ours, conv_pattern(out, inner, row, column), f"{out} -> {out}")


def conv_pattern(out: str, inner: str, row: str, column: str) -> str:
    """Of the weight of a convolution."""
    return f"{out} {inner} {row} {column} -> {row} {column} {inner} {out}"


def norm(theirs: str, ours: str, axis: str, layers: Layers | None = None) -> Iterator[Rule]:
    """Scale and bias."""
    yield Rule(f"{theirs}.weight", f"{ours}/scale", f"{axis} -> {axis}", **_more(layers))
    yield Rule(f"{theirs}.bias", f"{ours}/bias", f"{axis} -> {axis}", **_more(layers))


def mlp(theirs: str, ours: str, axes: tuple[str, str, str, str], layers: Layers | None = None) -> Iterator[Rule]:
    """Three linear maps as SAM's heads have them, `axes` being those of the input, inside (twice) and of the output."""
    first, hidden, again, last = axes
    yield from linear(f"{theirs}.proj_in", f"{ours}/proj_in", hidden, first, layers)
    yield from linear(f"{theirs}.layers.0", f"{ours}/layers_0", again, hidden, layers)
    yield from linear(f"{theirs}.proj_out", f"{ours}/proj_out", last, again, layers)
