"""Between host memory and (sharded) device arrays, block by block.

`ArrayBuilder` fills a device array from blocks, so that the host never holds more than one (of large arrays):
the array is made on the devices and each block is written into it in place (the old array is donated to the
update). `fetch` brings one block back. Every process of a multi-host run calls both in the same order.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from tracevision_jax.weights.copying import contiguous, copy_into

SMALL_BYTES = 2**22
"""Up to this size an array goes to and from the devices as a whole: scales, biases, all of a tiny model."""

ShardingOf = Callable[[str, tuple[int, ...]], Sharding]
"""(path, shape) of a parameter -> where it goes."""


def first_device(path: str, shape: tuple[int, ...]) -> Sharding:
    """The `ShardingOf` of a program without a mesh."""
    return SingleDeviceSharding(jax.local_devices()[0])


class ArrayBuilder:
    """A device array that is being filled."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding):
        self.shape, self.dtype, self.sharding = shape, np.dtype(dtype), sharding
        self._array: jax.Array | None = None
        small = math.prod(shape) * self.dtype.itemsize <= SMALL_BYTES
        self._small = np.zeros(shape, self.dtype) if small else None

    def write(self, start: tuple[int, ...], block: np.ndarray) -> None:
        """Write a block with its first corner at `start`; returns when the block's memory is free again."""
        if self._small is not None:
            place = tuple(slice(begin, begin + size) for begin, size in zip(start, block.shape, strict=True))
            copy_into(self._small[place], block)
            return
        if block.shape == self.shape:
            self._array = _place(block, self.dtype, self.sharding)
        else:
            if self._array is None:
                self._array = _zeros(self.shape, self.dtype, self.sharding)()
            piece = _place(block, self.dtype, _block_sharding(self.sharding, self.shape, block.shape))
            self._array = _update(self.sharding)(self._array, piece, np.asarray(start, np.int32))
        # Without this the host would read ahead of the devices and pile up blocks.
        self._array.block_until_ready()

    def finish(self) -> jax.Array:
        """The filled array; the builder is of no use afterwards."""
        if self._small is not None:
            self._array, self._small = _place(self._small, self.dtype, self.sharding), None
        if self._array is None:
            raise ValueError("no block was written")
        return self._array


def fetch(array: jax.Array | np.ndarray, start: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Bring a block of a parameter to every host."""
    if isinstance(array, jax.Array) and array.is_fully_addressable and array.nbytes <= SMALL_BYTES:
        array = np.asarray(array)  # jax keeps this copy, so that it is made once
    if isinstance(array, np.ndarray):
        return array[tuple(slice(begin, begin + length) for begin, length in zip(start, shape, strict=True))]
    block = _cut(shape, _replicated(array.sharding))(array, np.asarray(start, np.int32))
    return np.asarray(block.addressable_data(0))


def _place(block: np.ndarray, dtype: np.dtype, sharding: Sharding) -> jax.Array:
    """Put host memory on the devices, converting only what each of them gets."""
    return jax.make_array_from_callback(block.shape, sharding, lambda index: contiguous(block[index], dtype))


def _block_sharding(sharding: Sharding, shape: tuple[int, ...], block: tuple[int, ...]) -> Sharding:
    """As the whole is laid out, but for the axes of which the block is only a part."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = tuple(sharding.spec) + (None,) * (len(shape) - len(sharding.spec))
    kept = (axes if part == whole else None for axes, part, whole in zip(spec, block, shape, strict=True))
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))


def _replicated(sharding: Sharding) -> Sharding:
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding


@cache
def _zeros(shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding) -> Callable[[], jax.Array]:
    return jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=sharding)


@cache
def _update(sharding: Sharding) -> Callable[[jax.Array, jax.Array, np.ndarray], jax.Array]:
    return jax.jit(
        lambda array, block, start: jax.lax.dynamic_update_slice(array, block, tuple(start)),
        donate_argnums=0,
        out_shardings=sharding,
    )


@cache
def _cut(shape: tuple[int, ...], sharding: Sharding) -> Callable[[jax.Array, np.ndarray], jax.Array]:
    return jax.jit(lambda array, start: jax.lax.dynamic_slice(array, tuple(start), shape), out_shardings=sharding)


@runtime_checkable
class Leaf(Protocol):
    """A parameter of which blocks can be read: on devices, in a file, or derived from another."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Of the values."""
        ...

    def block(self, start: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
        """The block with its first corner at `start`."""
        ...


class ArrayLeaf:
    """A parameter that is an array, on devices (sharded or not) or in host memory."""

    def __init__(self, array: jax.Array | np.ndarray):
        self.array = array
        self.shape, self.dtype = tuple(array.shape), np.dtype(array.dtype)

    def block(self, start: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
        """See `Leaf`."""
        return fetch(self.array, start, shape)


class TransposedLeaf:
    """A matrix that is another one transposed."""

    def __init__(self, leaf: Leaf):
        self.leaf = leaf
        self.shape, self.dtype = leaf.shape[::-1], leaf.dtype

    def block(self, start: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
        """See `Leaf`."""
        return self.leaf.block(start[::-1], shape[::-1]).T
