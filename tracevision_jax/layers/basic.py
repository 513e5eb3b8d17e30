"""Modules shared by the language model and the towers: RMS norm, gated MLP, projections, and remat by name.

Everything takes `dtype` (in which it computes) and `param_dtype` (in which parameters live). Matrices start
with std 1/sqrt(fan in), so that activations keep their size at any width.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tracevision_jax.layers.sharding import constrain, leading_axes_merge

kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")

REMAT_POLICIES = ("none", "full", "dots")
"""What the backward pass recomputes: nothing, everything, everything but products with weights."""


def precision(config: Any) -> dict[str, Any]:
    """The `dtype` and `param_dtype` that a configuration names, as the modules here take them."""
    return {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype)}


def rematerialised(
    module: type[nn.Module], policy: str, static_arguments: tuple[int, ...] = (), prevent_cse: bool = False
) -> Any:
    """Wrap a module class so that its activations are recomputed as the policy says.

    `static_arguments` are numbers of Python-valued arguments of `__call__`, `self` being 0. Unlike in the body of a
    scan, elsewhere XLA must be kept from merging the recomputation with the first computation: `prevent_cse`.
    """
    if policy not in REMAT_POLICIES:
        raise ValueError(f"no remat policy '{policy}'; known are {', '.join(REMAT_POLICIES)}")
    if policy == "none":
        return module
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if policy == "dots" else None
    return nn.remat(module, policy=keep, prevent_cse=prevent_cse, static_argnums=static_arguments)


def scanned(module: Any, length: int, in_axes: Any) -> Any:
    """Repeat a module whose call maps (carry, *inputs) to (carry, output); parameters get a leading axis.

    `in_axes` has one entry an input: 0 for one split along its first axis, `nn.broadcast` for a constant. What the
    module sows as "intermediates" is stacked likewise.
    """
    axes: Any = {"params": 0, "intermediates": 0}
    return nn.scan(module, variable_axes=axes, split_rngs={"params": True}, in_axes=in_axes, length=length)


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich 2019), statistics in float32."""

    eps: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (normed * scale.astype(jnp.float32)).astype(self.dtype)


def dot_rows(
    x: Float[Array, "..."], kernel: Float[Array, "..."], dimensions: Any, precision: Any = None
) -> Float[Array, "..."]:
    """Contract the last axes of x with the first ones of a kernel, as one product of two matrices.

    It says what `jax.lax.dot_general` says. Over several leading axes XLA's CPU compiler transposes the activations
    in memory to form a kernel's gradient, which doubles the time of an MLP's backward pass; over one it does not.
    """
    (inner, _), _ = dimensions
    if not leading_axes_merge():
        return jax.lax.dot_general(x, kernel, dimensions, precision=precision)
    rows, columns = x.shape[: x.ndim - len(inner)], kernel.shape[len(inner) :]
    size = math.prod(kernel.shape[: len(inner)])
    flat = jnp.matmul(x.reshape(-1, size), kernel.reshape(size, -1), precision=precision)
    return flat.reshape(*rows, *columns)


def projection(
    name: str,
    features: int | Sequence[int],
    *,
    dtype: Any,
    param_dtype: Any,
    bias: bool = True,
    axis: int | Sequence[int] = -1,
    gain: float = 1.0,
    bias_start: float = 0.0,
) -> nn.DenseGeneral:
    """A linear map over the last axis or axes, named for the parameter tree: (in..., out...) kernels.

    Where it is drawn, results are `gain` times as large as what comes in, and biases are `bias_start`.
    """
    return nn.DenseGeneral(
        features,
        axis=axis,
        use_bias=bias,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=kernel_init if gain == 1 else nn.initializers.variance_scaling(gain**2, "fan_in", "normal"),
        bias_init=nn.initializers.constant(bias_start),
        dot_general=dot_rows,
        name=name,
    )


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, SwiGLU)."""

    hidden: int
    bias: bool
    axes: tuple[str | None, ...]
    """Logical names of the axes before the width, see `layers/sharding.py`."""
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype, "bias": self.bias}
        gate = projection("gate", self.hidden, **options)(x)
        up = projection("up", self.hidden, **options)(x)
        hidden = nn.silu(gate) * up
        hidden = constrain(hidden, *self.axes, "mlp")
        return projection("down", x.shape[-1], **options)(hidden)
