"""How parameters are cut over the mesh: ordered tables (path -> axes), one for each family of modules.

A rule is a regular expression that is searched in the parameter's path, and the mesh axes of the array's
*last* dimensions; leading dimensions, which scans over layers add, stay whole. The first rule that matches
counts, and a parameter that none matches is an error, as is a dimension that its axes do not divide. The
layout is the usual one: `fsdp` on the dimension that faces the residual stream, `tensor` on heads, MLP
columns and the vocabulary, so that a block needs one sum over `tensor` for attention and one for the MLP.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tracevision_jax.errors import UserError
from tracevision_jax.layers.lora import A, is_adapter

Rule = tuple[str, P]

LANGUAGE: tuple[Rule, ...] = (
    (r"language/embed/embedding$", P("tensor", "fsdp")),
    (r"language/added/(embedding|head)$", P(None, "fsdp")),
    (r"language/head/kernel$", P("fsdp", "tensor")),
    (r"language/layers/attn/[qkv]/kernel$", P("fsdp", "tensor", None)),
    (r"language/layers/attn/[qkv]/bias$", P("tensor", None)),
    (r"language/layers/attn/o/kernel$", P("tensor", None, "fsdp")),
    (r"language/layers/mlp/(gate|up)/kernel$", P("fsdp", "tensor")),
    (r"language/layers/mlp/down/kernel$", P("tensor", "fsdp")),
    (r"language/(layers/(attn|mlp)_norm|final_norm)/scale$", P(None)),
)

VISION: tuple[Rule, ...] = (
    (r"vision/patch_embed/kernel$", P(None, "fsdp")),
    (r"vision/groups/(window|full)/attn/qkv/kernel$", P("fsdp", None, "tensor", None)),
    (r"vision/groups/(window|full)/attn/qkv/bias$", P(None, "tensor", None)),
    (r"vision/groups/(window|full)/attn/proj/kernel$", P("tensor", None, "fsdp")),
    (r"vision/groups/(window|full)/mlp/(gate|up)/kernel$", P("fsdp", "tensor")),
    (r"vision/groups/(window|full)/mlp/(gate|up)/bias$", P("tensor")),
    (r"vision/groups/(window|full)/mlp/down/kernel$", P("tensor", "fsdp")),
    (r"vision/groups/(window|full)/(attn/proj|mlp/down)/bias$", P(None)),
    (r"vision/merger/fc1/kernel$", P("fsdp", "tensor")),
    (r"vision/merger/fc1/bias$", P("tensor")),
    (r"vision/merger/fc2/kernel$", P("tensor", "fsdp")),
    (r"vision/merger/fc2/bias$", P(None)),
    (r"vision/.*norm\d?/scale$", P(None)),
)

TVP: tuple[Rule, ...] = (
    (r"tvp/.*/(q|k|v)/kernel$", P("fsdp", "tensor", None)),
    (r"tvp/.*/place/kernel$", P(None, "tensor", None)),
    (r"tvp/[xy]_bins$", P(None, "fsdp")),
    (r"tvp/.*/o/kernel$", P("tensor", None, "fsdp")),
    (r"tvp/.*/ffn_in/kernel$", P("fsdp", "tensor")),
    (r"tvp/.*/ffn_in/bias$", P("tensor")),
    (r"tvp/.*/ffn_out/kernel$", P("tensor", "fsdp")),
    (r"tvp/time_bias$", P("tensor")),
    (r"tvp/", P()),
)

DECODER: tuple[Rule, ...] = ((r"decoder/", P()),)
"""At most 12.5 M parameters: every device keeps them whole."""

SEGMENT_ANYTHING: tuple[Rule, ...] = (
    (r"vision_encoder/.*/attn/qkv/kernel$", P("fsdp", None, "tensor", None)),
    (r"vision_encoder/.*/attn/qkv/bias$", P(None, "tensor", None)),
    (r"vision_encoder/.*/attn/proj/kernel$", P("tensor", None, "fsdp")),
    (r"vision_encoder/.*/mlp/proj_in/kernel$", P("fsdp", "tensor")),
    (r"vision_encoder/.*/mlp/proj_out/kernel$", P("tensor", "fsdp")),
    (
        r"^(vision_encoder|prompt_encoder|mask_decoder|high_resolution|memory_conditioning|memory_encoder|object_pointer"
        r"|mask_downsample)/",
        P(),
    ),
)
"""SAM and SAM 2: the blocks of the image encoder are cut, all that follows it is small."""

PARAMETERS: tuple[Rule, ...] = (*LANGUAGE, *VISION, *TVP, *DECODER, *SEGMENT_ANYTHING)
"""All families; their paths do not overlap."""

TWO_INPUTS = ("o", "proj", "o_proj")
"""Layers whose kernels begin with two dimensions of what comes in: heads and their channels."""

ACTIVATIONS: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "copies": "data",
    "sliced_width": "fsdp",
    "tokens": "context",
    "sets": ("data", "fsdp", "context"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}
"""Mesh axes of the logical axes that `layers/sharding.py` names; those that are absent stay whole."""


def rule_of(path: str, rules: Sequence[Rule]) -> P | None:
    """Axes of one parameter's last dimensions, by the first rule that matches its path; None if none does.

    Adapters follow the kernel that they adapt: A on what comes in, B on what goes out, neither along its rank.
    """
    if not is_adapter(path):
        return next((spec for pattern, spec in rules if re.search(pattern, path)), None)
    *owners, name = path.split("/")
    kernel = rule_of("/".join((*owners, "kernel")), rules)
    inputs = 2 if owners[-1] in TWO_INPUTS else 1
    if kernel is None:
        return None
    return P(*kernel[:inputs], None) if name == A else P(None, *kernel[inputs:])


def spec_of(path: str, shape: Sequence[int], rules: Sequence[Rule]) -> P | None:
    """Axes of one parameter as `rule_of`, leading dimensions whole.

    Raises:
        UserError: the rule names more dimensions than the array has.
    """
    spec = rule_of(path, rules)
    if spec is None:
        return None
    if len(spec) > len(shape):
        raise UserError(f"The sharding rule of {path} has {len(spec)} axes {tuple(spec)}, the array is {tuple(shape)}.")
    return P(*[None] * (len(shape) - len(spec)), *spec)


def without(spec: P, axis: str) -> P:
    """The same axes but one, along which the array is whole then."""
    kept = [tuple(name for name in (entry if isinstance(entry, tuple) else (entry,)) if name != axis) for entry in spec]
    return P(*(names if len(names) > 1 else names[0] if names else None for names in kept))


def partition_specs(shapes: Any, mesh_sizes: Mapping[str, int], rules: Sequence[Rule]) -> Any:
    """PartitionSpec of every parameter of a tree of arrays or of `jax.ShapeDtypeStruct`.

    Raises:
        UserError: lists every parameter without a rule and every dimension that its axes do not divide.
    """
    faults: list[str] = []

    def choose(key_path: Any, leaf: Any) -> P:
        path = "/".join(str(key.key) for key in key_path)
        spec = spec_of(path, leaf.shape, rules)
        if spec is None:
            faults.append(f"{path} {tuple(leaf.shape)}: no rule matches")
            return P()
        for size, axes in zip(leaf.shape, spec, strict=True):
            names = () if axes is None else (axes,) if isinstance(axes, str) else axes
            slices = math.prod(mesh_sizes[name] for name in names)
            if size % slices:
                fits = max(n for n in range(1, slices + 1) if slices % n == 0 and size % n == 0)
                faults.append(
                    f"{path} {tuple(leaf.shape)}: {size} cannot be cut into {slices} equal slices "
                    f"({' x '.join(names)}); the nearest size of the axis that fits is {fits}"
                )
        return spec

    specs = jax.tree_util.tree_map_with_path(choose, shapes)
    if faults:
        raise UserError("These parameters do not fit the mesh:\n  " + "\n  ".join(faults))
    return specs


def parameter_shardings(shapes: Any, mesh: Mesh | AbstractMesh, rules: Sequence[Rule]) -> Any:
    """NamedSharding of every parameter; raises UserError as `partition_specs`."""
    specs = partition_specs(shapes, mesh.shape, rules)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))


def shard_params(params: Any, mesh: Mesh, rules: Sequence[Rule]) -> Any:
    """Move a tree of arrays to where the rules want it."""
    return jax.device_put(params, parameter_shardings(params, mesh, rules))
