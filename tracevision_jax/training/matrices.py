"""Which parameters are matrices, and along which of their axes: what Muon and Adafactor ask of a path.

Kernels are stacked by scans, and those of attention have heads apart: (layers, in, heads, head_dim) is one matrix of
in x (heads * head_dim) a layer.
"""

import optax

from tracevision_jax.parallel.rules import TWO_INPUTS

STACKS = ("layers", "groups", "window", "output_hypernetworks_mlps")
"""Modules whose parameters are stacked along a leading axis."""
NO_MATRICES = ("head", "upsample", "neck_out")
"""How modules begin whose kernels stay with Adam: the vocabulary's, and those of convolutions."""
CONVOLUTION_AXES = 4
"""Axes of a convolution's kernel, which is no matrix: rows, columns, in, out."""
TABLES = ("embedding", "head", "x_bins", "y_bins")
"""Names of parameters with a vector a row: of the vocabulary, and of the places of a trace."""

Axes = optax.contrib.MuonDimensionNumbers
"""(input axes, output axes) of a matrix; each member along all other axes is a matrix of its own."""


def stacked_axes(path: str) -> int:
    """Number of leading axes along which parameters of one kind are stacked."""
    return sum(part in STACKS for part in path.split("/"))


def matrix_axes(path: str, ndim: int) -> Axes | None:
    """(input axes, output axes) of a kernel that multiplies as one matrix; None for everything else.

    Axes of stacked layers and of q, k, v in one kernel are left out: each matrix of a stack is one of its own.
    """
    *_, owner, name = path.split("/")
    if name != "kernel" or owner.startswith(NO_MATRICES):
        return None
    first = stacked_axes(path)
    if owner == "qkv":
        return Axes((first,), (first + 2, first + 3))
    if ndim - first == CONVOLUTION_AXES:
        return None
    if owner in TWO_INPUTS:
        return Axes(tuple(range(first, ndim - 1)), (ndim - 1,))
    return Axes((first,), tuple(range(first + 1, ndim)))


def table_axes(path: str, ndim: int) -> Axes | None:
    """As `matrix_axes`, and (rows, columns) of tables, the vocabulary's head among them."""
    *_, owner, name = path.split("/")
    if ndim == 2 and (name in TABLES or owner == "head"):
        return Axes((0,), (1,))
    return matrix_axes(path, ndim)
