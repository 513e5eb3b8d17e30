"""Adafactor's second moment (Shazeer and Stern 2018, arXiv:1804.04235): of a matrix, its rows' and columns' means.

The mean squares of the rows R and of the columns C of a gradient stand for all of its squares, as the matrix of rank
one R C / mean(R) (the paper's Algorithm 4). What is no matrix keeps its squares whole (Algorithm 5). The moment decays
by min(1 - t^-0.8, beta2) at step t, the bound being that of Zhai et al. 2021 (arXiv:2106.04560). Updates are not scaled
by the parameter's size, and there is no first moment: single updates are rougher than AdamW's, but their sum over many
steps is alike, so learning rates mean the same.

optax's `scale_by_factored_rms` takes an array's two largest axes, of a kernel (layers, in, heads, head_dim) thus `in`
and `head_dim`, and nothing where one is shorter than 128 (all q, k, v of the vision tower). Here axes are those of
the matrix (`matrices.py`), each matrix of a stack for itself, and statistics keep the axes that they are means over,
at size 1: so a mesh cuts them as it cuts the parameter (`step.state_shardings`), and nothing is ambiguous when both
sides are equal.

Stage 1.5 of the 72B recipe trains 74.8 billion parameters. AdamW keeps 557 GiB for them, 279 in bfloat16, Adafactor
0.07 (with optax's axes 1.24): three fourths are rows and columns, the rest squares of biases, scales and convolutions.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from tracevision_jax.training.matrices import stacked_axes, table_axes
from tracevision_jax.training.parameters import flatten, unflatten

DECAY_POWER = 0.8
TINY = 1e-30
"""Added to squares (epsilon 1 of the paper), so that a gradient of 0 moves nothing."""
LARGEST_RMS = 1.0
"""Root mean square that an update is clipped to (d of the paper)."""

Leaves = dict[str, jax.Array]


class FactoredState(NamedTuple):
    """Running means of squared gradients; a parameter is either in `rows` and `columns` or in `whole`."""

    count: Int[Array, ""]
    """Updates made."""
    rows: Any
    """Means over a matrix's output axes, which stay with size 1."""
    columns: Any
    """Means over its input axes, likewise."""
    whole: Any
    """Squares of what is no matrix."""


def scale_by_factored_rms(beta2: float) -> optax.GradientTransformation:
    """Divide gradients by the root of their factored second moment, then clip each update's root mean square."""

    def init(params: Any) -> FactoredState:
        statistics = jax.eval_shape(_statistics, flatten(params))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), statistics)
        return FactoredState(jnp.zeros((), jnp.int32), *map(unflatten, zeros))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, FactoredState]:
        del params
        gradients = flatten(updates)
        count = state.count + 1
        decay = jnp.minimum(1 - count.astype(jnp.float32) ** -DECAY_POWER, beta2)
        old = tuple(map(flatten, state[1:]))
        new = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, old, _statistics(gradients))
        scaled = {path: _clipped(path, _scaled(path, gradient, *new)) for path, gradient in gradients.items()}
        return unflatten(scaled), FactoredState(count, *map(unflatten, new))

    return optax.GradientTransformation(init, update)


def _statistics(gradients: Leaves) -> tuple[Leaves, Leaves, Leaves]:
    """Mean squares of rows and of columns, and squares of what is no matrix, by path."""
    rows, columns, whole = {}, {}, {}
    for path, gradient in gradients.items():
        squares = jnp.square(gradient.astype(jnp.float32)) + TINY
        axes = table_axes(path, gradient.ndim)
        if axes is None:
            whole[path] = squares
        else:
            rows[path] = squares.mean(axes.output_axis, keepdims=True)
            columns[path] = squares.mean(axes.reduction_axis, keepdims=True)
    return rows, columns, whole


def _scaled(
    path: str, gradient: Float[Array, "*shape"], rows: Leaves, columns: Leaves, whole: Leaves
) -> Float[Array, "*shape"]:
    """A gradient over the root of its second moment."""
    axes = table_axes(path, gradient.ndim)
    if axes is None:
        return gradient * jax.lax.rsqrt(whole[path])
    share = rows[path] / rows[path].mean(axes.reduction_axis, keepdims=True)
    return gradient * jax.lax.rsqrt(share) * jax.lax.rsqrt(columns[path])


def _clipped(path: str, update: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """An update whose root mean square is at most `LARGEST_RMS`, each member of a stack for itself."""
    axes = tuple(range(stacked_axes(path), update.ndim))
    rms = jnp.sqrt(jnp.square(update).mean(axes, keepdims=True))
    return update / jnp.maximum(1.0, rms / LARGEST_RMS)
