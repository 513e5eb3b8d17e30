"""The static key-value cache of generation: one array for all layers, filled row by row at each row's own
length.

Heads stand before places, as attention reads them: in the other order TPU's compiler lays the whole cache out anew for
every layer and token. It is a pytree of fixed shapes, so it can live in the carry of `jax.lax.while_loop`.
"""

from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tracevision_jax.language.config import LanguageConfig


@jax.tree_util.register_dataclass
@no_type_check  # jax also builds it of specs, shardings and axis numbers, which have no such shapes
@dataclass(frozen=True)
class KVCache:
    """Rotated keys, and values, of all layers; rows at and beyond `lengths` are not seen."""

    keys: Float[Array, "layers batch kv_heads size head_dim"]
    values: Float[Array, "layers batch kv_heads size head_dim"]
    lengths: Int[Array, "batch"]


def init_cache(config: LanguageConfig, batch: int, size: int, dtype: str | None = None) -> KVCache:
    """An empty cache for `size` tokens a row, in the model's compute dtype unless another is given."""
    shape = (config.layers, batch, config.kv_heads, size, config.head_dim)
    kind = jnp.dtype(dtype or config.dtype)
    return KVCache(jnp.zeros(shape, kind), jnp.zeros(shape, kind), jnp.zeros(batch, jnp.int32))


def write_rows(
    store: Float[Array, "layers batch kv_heads size head_dim"],
    layer: Int[Array, ""],
    rows: Float[Array, "batch tokens kv_heads head_dim"],
    starts: Int[Array, "batch"],
) -> Float[Array, "layers batch kv_heads size head_dim"]:
    """Write each batch row's new tokens into one layer from its own start on; what would pass the end is
    dropped.

    One scatter with the batch as a batching axis: it works in place in a loop's carry, and a batch split over
    devices stays split.
    """
    places = starts[:, None] + jnp.arange(rows.shape[1])
    indices = jnp.stack([jnp.broadcast_to(layer, places.shape), places], axis=-1)
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(2, 3),
        inserted_window_dims=(0, 3),
        scatter_dims_to_operand_dims=(0, 3),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    return jax.lax.scatter(
        store, indices, rows.astype(store.dtype), numbers,
        indices_are_sorted=True, unique_indices=True, mode="drop",
    )  # fmt: skip
