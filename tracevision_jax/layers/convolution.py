"""Convolutions that are better said as something else, channels last.

A convolution whose kernel is its stride is one product of matrices, forwards (`Patches`) and transposed (`Doubling`);
one of stride 2 is a product after its taps were put side by side (`Halving`; in a scan on a CPU XLA takes ten times as
long for the gradient of a strided convolution's kernel); a depthwise one is a sum of shifted pictures, which XLA fuses
(20 times faster than its convolution on a CPU). Kernels have Flax's layout (rows, columns, in, out). Everything takes
`dtype` (in which it computes) and `param_dtype`.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from tracevision_jax.layers.basic import kernel_init


class Patches(nn.Module):
    """Convolution whose kernel and stride are both `size`: each square of cells becomes one by one matrix product."""

    features: int
    size: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*batch rows columns channels"]) -> Float[Array, "*batch h w features"]:
        """Map (rows, columns) to (rows / size, columns / size), both multiples of `size`."""
        *batch, rows, columns, channels = x.shape
        size = self.size
        kernel = self.param("kernel", kernel_init, (size, size, channels, self.features), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        squares = x.astype(self.dtype).reshape(*batch, rows // size, size, columns // size, size, channels)
        mixed = jnp.einsum("...hiwjc,ijcf->...hwf", squares, kernel.astype(self.dtype))
        return mixed + bias.astype(self.dtype)


class Doubling(nn.Module):
    """Transposed convolution of kernel 2 and stride 2: each cell becomes 2 x 2 by one matrix product."""

    features: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 features"]:
        n, h, w, c = x.shape
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=2, batch_axis=(0, 1))
        kernel = self.param("kernel", init, (2, 2, c, self.features), self.param_dtype).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype).astype(self.dtype)
        doubled = jnp.einsum("nhwc,ijco->nhiwjo", x, kernel) + bias
        return doubled.reshape(n, 2 * h, 2 * w, self.features)


class Halving(nn.Module):
    """Convolution of kernel 3, stride 2 and padding 1: half the rows and columns, rounded up."""

    features: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 features"]:
        n, h, w, c = x.shape
        kernel = self.param("kernel", kernel_init, (3, 3, c, self.features), self.param_dtype).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype).astype(self.dtype)
        rows, columns = (h + 1) // 2, (w + 1) // 2
        wide = jnp.pad(x.astype(self.dtype), ((0, 0), (1, 1), (1, 1), (0, 0)))
        taps = [wide[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2] for i in range(3) for j in range(3)]
        beside = jnp.concatenate(taps, axis=-1).reshape(-1, 9 * c)
        return (beside @ kernel.reshape(9 * c, self.features) + bias).reshape(n, rows, columns, self.features)


class Depthwise(nn.Module):
    """One odd, square filter a channel, zeros beyond the border, as a sum of shifted pictures."""

    size: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*batch rows columns channels"]) -> Float[Array, "*batch rows columns channels"]:
        rows, columns, channels = x.shape[-3:]
        init = nn.initializers.normal(1 / self.size)
        kernel = self.param("kernel", init, (self.size, self.size, 1, channels), self.param_dtype).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,), self.param_dtype).astype(self.dtype)
        edge = self.size // 2
        wide = jnp.pad(x.astype(self.dtype), [(0, 0)] * (x.ndim - 3) + [(edge, edge), (edge, edge), (0, 0)])
        filtered = bias
        for i in range(self.size):
            for j in range(self.size):
                filtered = filtered + wide[..., i : i + rows, j : j + columns, :] * kernel[i, j, 0]
        return filtered
