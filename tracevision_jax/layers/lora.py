"""Low-rank adaptation (LoRA, Hu et al. 2021, Eq. 3): W x + (alpha / rank) B A x, with W frozen.

Linear layers are adapted from outside, where they are called, so that no module knows of it:

    with adapted(LoRAConfig(rank=16, targets=("attn/[qv]/kernel$",))):
        params = model.init(...)["params"]        # "lora_a" and "lora_b" beside each kernel that a target matches
        model.apply({"params": params}, ...)

`x A B` is two thin products beside the layer's own; neither B A nor a gradient of W is ever formed. Under a scan over
layers the adapters are stacked as the kernels are. `merged` writes them into the kernels.
"""

import contextlib
import math
import re
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float

from tracevision_jax.errors import UserError
from tracevision_jax.layers.basic import dot_rows
from tracevision_jax.nearest import suggest

A, B = "lora_a", "lora_b"
"""Names of the adapters, beside the "kernel" that they adapt: (in..., rank) and (rank, out...)."""
LINEAR = (nn.Dense, nn.DenseGeneral)
"""Modules that are adapted."""


@dataclass(frozen=True)
class LoRAConfig:
    """Which kernels are adapted, and how."""

    rank: int = 0
    """Columns of A; 0 adapts nothing."""
    alpha: float = 16.0
    """The adapters' part is scaled by alpha / rank."""
    targets: tuple[str, ...] = (r"language/layers/attn/[qkvo]/kernel$",)
    """Regular expressions, searched in the paths of kernels."""

    @property
    def scale(self) -> float:
        """Factor of the adapters' part."""
        return self.alpha / self.rank

    def matches(self, path: str) -> bool:
        """Whether the parameter of a path is one that is adapted."""
        return (
            self.rank > 0
            and path.split("/")[-1] == "kernel"
            and any(re.search(target, path) for target in self.targets)
        )


def faults(config: LoRAConfig) -> list[str]:
    """What is wrong with a configuration by itself, for the check of a recipe."""
    found = []
    if config.rank < 0 or not config.alpha > 0:
        found.append(f"lora.rank is {config.rank} and lora.alpha {config.alpha}: must not be negative, and positive")
    if config.rank and not config.targets:
        found.append("lora.targets is empty: name the kernels to adapt, or set lora.rank to 0")
    for target in config.targets:
        try:
            re.compile(target)
        except re.error as error:
            found.append(f"lora.targets: '{target}' is no regular expression ({error})")
    return found


def is_adapter(path: str) -> bool:
    """Whether a parameter is an adapter's."""
    return path.rsplit("/", 1)[-1] in (A, B)


def adapted(config: LoRAConfig) -> contextlib.AbstractContextManager[None]:
    """Adapt the linear layers that are initialised or applied inside."""
    if config.rank == 0:
        return contextlib.nullcontext()

    def call(linear: Any, inputs: tuple[Any, ...], options: dict[str, Any], context: Any) -> Any:
        out = linear(*inputs, **options)
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, LINEAR):
            return out
        if not config.matches("/".join((*module.path, "kernel"))):
            return out
        return out + _low_rank(module, inputs[0], out, config)

    return nn.intercept_methods(call)


def _low_rank(module: Any, x: Float[Array, "..."], out: Float[Array, "..."], config: LoRAConfig) -> Float[Array, "..."]:
    """(alpha / rank) x A B in the layer's precision; A starts uniform as PyTorch's linear layers do, B at 0."""
    axes = getattr(module, "axis", -1)
    inputs = 1 if isinstance(axes, int) else len(axes)
    if (axes if isinstance(axes, int) else tuple(axes)) not in (-1, tuple(range(-inputs, 0))):
        raise ValueError(f"{'/'.join(module.path)} contracts the axes {axes}; only the last ones can be adapted")
    size, shape = x.shape[x.ndim - inputs :], out.shape[x.ndim - inputs :]
    bound = math.prod(size) ** -0.5

    def start(key: jax.Array, shape: tuple[int, ...]) -> Array:
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    a = module.param(A, start, (*size, config.rank)).astype(out.dtype)
    b = module.param(B, nn.initializers.zeros, (config.rank, *shape)).astype(out.dtype)
    inner = tuple(range(x.ndim - inputs, x.ndim))
    low = config.scale * dot_rows(x.astype(out.dtype), a, ((inner, tuple(range(inputs))), ((), ())))
    return dot_rows(low, b, (((low.ndim - 1,), (0,)), ((), ())))


def check_adapted(shapes: Any, config: LoRAConfig) -> None:
    """Check that every target matched and every kernel that matched is adapted, given all parameters.

    Raises:
        UserError: a target matches no kernel, or one that no linear layer multiplies by.
    """
    paths = traverse_util.flatten_dict(shapes, sep="/")
    kernels = [path for path in paths if path.endswith("/kernel")]
    for target in config.targets:
        if not any(re.search(target, path) for path in kernels):
            raise UserError(
                f"lora.targets: '{target}' matches no kernel.{suggest(target, kernels)} There are kernels such as "
                f"{', '.join(kernels[:3])}."
            )
    bare = [path for path in kernels if config.matches(path) and f"{path.removesuffix('kernel')}{A}" not in paths]
    if bare:
        raise UserError(
            f"lora.targets match what no linear layer multiplies by (a convolution, or the head): {', '.join(bare)}. "
            "Name other kernels."
        )


def merged(params: Any, config: LoRAConfig) -> Any:
    """Parameters without adapters, which compute the same: each kernel is W + (alpha / rank) A B, in its own dtype.

    Kernels keep their layout on a mesh; what has no adapter is passed through. Without adapters nothing changes.
    """
    leaves: dict[str, Any] = dict(traverse_util.flatten_dict(params, sep="/"))
    whole = {path: leaf for path, leaf in leaves.items() if not is_adapter(path)}
    for path in leaves:
        if path.endswith(f"/{A}"):
            kernel = f"{path.removesuffix(A)}kernel"
            whole[kernel] = _merge(leaves[kernel], leaves[path], leaves[f"{path.removesuffix(A)}{B}"], config.scale)
    return traverse_util.unflatten_dict(whole, sep="/")


def _merge(kernel: Array, a: Array, b: Array, scale: float) -> Array:
    """One kernel, or a stack of them, in the layout that it has."""
    stacked = a.ndim + b.ndim - 2 - kernel.ndim
    batch = tuple(range(stacked))

    def merge(kernel: Array, a: Array, b: Array) -> Array:
        product = jax.lax.dot_general(a, b, (((a.ndim - 1,), (stacked,)), (batch, batch)))
        return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)

    return jax.jit(merge, out_shardings=getattr(kernel, "sharding", None))(kernel, a, b)
