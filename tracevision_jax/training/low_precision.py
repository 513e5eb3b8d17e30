"""Moments of an optimizer in bfloat16 between steps: half the memory, at float32's arithmetic.

Rounding to the nearest bfloat16 would stop a second moment: with beta2 = 0.999 a step changes it by a thousandth, and
two neighbouring bfloat16 lie four to eight thousandths apart. So values are rounded to one of their two neighbours by
chance, the nearer one more often, so that the expectation is the value itself and small changes add up (Gupta et al.
2015, arXiv:1502.02551). A second moment then wanders by a few per cent around that of float32, which moves an update by
half as much.

    optimizer = kept_in_bfloat16(optax.scale_by_adam())

Chance is a function of the number of the step, so that a run that is continued ends in the same bits; and of the place
in the array alone, so that each device draws for its own slice, whatever the mesh. It is a hash and not threefry, whose
hundred operations an element took the compiler several times as long.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float32, Int, UInt32

from tracevision_jax.training.parameters import flatten, owner_of

SEED = 0
"""Of all rounding; steps and arrays draw by their numbers."""
LARGEST = float(jnp.finfo(jnp.bfloat16).max)


class LowPrecisionState(NamedTuple):
    """The state of the transformation within, its moments in bfloat16."""

    count: Int[Array, ""]
    """Updates made."""
    inner: Any


def round_stochastically(x: Float32[Array, "..."], key: UInt32[Array, "2"]) -> BFloat16[Array, "..."]:
    """Round each value to one of its two neighbours in bfloat16, with its own value as the expectation.

    What bfloat16 can hold stays as it is, infinities and NaN too; finite values beyond its range become its largest.
    """
    bits = jax.lax.bitcast_convert_type(jnp.clip(x, -LARGEST, LARGEST), jnp.uint32)
    # A bfloat16 is the upper half of a float32: the lower half says how likely a random number below 2^16 carries.
    carried = bits + (random_bits(key, x.shape) >> 16)
    rounded = jax.lax.bitcast_convert_type((carried >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def random_bits(key: UInt32[Array, "2"], shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Bits that look random for each place of an array: its number in row-major order (modulo 2^32), hashed twice."""
    place = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    return _mixed(_mixed(place ^ key[0]) ^ key[1])


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Every bit of the result depends on every bit of x (the finaliser of MurmurHash3, public domain)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def kept_in_bfloat16(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same transformation, whose arrays that mirror a parameter are kept as bfloat16; it sees them as float32."""

    def init(params: Any) -> LowPrecisionState:
        shapes = {path: leaf.shape for path, leaf in flatten(params).items()}

        def kept(path: tuple[Any, ...], leaf: Any) -> Any:
            owner = owner_of(path, shapes)
            mirrors = owner is not None and leaf.shape == shapes[owner] and jnp.issubdtype(leaf.dtype, jnp.floating)
            return leaf.astype(jnp.bfloat16) if mirrors else leaf

        return LowPrecisionState(jnp.zeros((), jnp.int32), jax.tree_util.tree_map_with_path(kept, inner.init(params)))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, LowPrecisionState]:
        kept, structure = jax.tree.flatten(state.inner)
        seen = [leaf.astype(jnp.float32) if _is_low(leaf) else leaf for leaf in kept]
        updates, new = inner.update(updates, jax.tree.unflatten(structure, seen), params)
        step_key = jax.random.fold_in(jax.random.key(SEED, impl="threefry2x32"), state.count)
        keys = jax.random.bits(step_key, (len(kept), 2), jnp.uint32)
        stored = [
            round_stochastically(leaf, key) if _is_low(old) else leaf
            for old, leaf, key in zip(kept, jax.tree.leaves(new), keys, strict=True)
        ]
        return updates, LowPrecisionState(state.count + 1, jax.tree.unflatten(structure, stored))

    return optax.GradientTransformation(init, update)


def _is_low(leaf: Any) -> bool:
    return leaf.dtype == jnp.bfloat16
