"""What plain vision transformers share: a layer norm with exact variance, and the two-layer MLP with GELU.

SAM and SAM 2 use both in every block (Dosovitskiy et al. 2021, Sec. 3.1). GELU is the exact one, by the error function.
"""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from tracevision_jax.layers.basic import projection
from tracevision_jax.layers.sharding import constrain


def layer_norm(name: str, eps: float, *, dtype: Any, param_dtype: Any) -> nn.LayerNorm:
    """Layer norm over the last axis, statistics in float32.

    The variance is the mean of squared deviations: Flax's default, a difference of two means, loses digits where the
    mean is large.
    """
    return nn.LayerNorm(eps, dtype=dtype, param_dtype=param_dtype, use_fast_variance=False, name=name)


class GeluMLP(nn.Module):
    """proj_out(gelu(proj_in(x))), as wide at its end as at its start."""

    hidden: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        hidden = nn.gelu(projection("proj_in", self.hidden, **options)(x), approximate=False)
        hidden = constrain(hidden, "sets", *(None,) * (hidden.ndim - 2), "mlp")
        return projection("proj_out", x.shape[-1], **options)(hidden)
