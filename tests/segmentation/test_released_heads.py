"""All released sizes of what follows the image encoders: names, shapes and numbers of parameters.

Whole models on pictures and videos are compared in tests/hosts.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Sam2VideoModel

from tests.segmentation.sam_reference import Sam, sam2_config, sam_config, table
from tracevision_jax.segmentation.mask_decoder import HighResolution, MaskDecoder
from tracevision_jax.segmentation.memory_attention import MemoryConditioning
from tracevision_jax.segmentation.memory_bank import empty, read
from tracevision_jax.segmentation.memory_encoder import MemoryEncoder
from tracevision_jax.segmentation.object_pointer import MaskDownsample, ObjectPointer
from tracevision_jax.segmentation.prompt_encoder import PromptEncoder
from tracevision_jax.segmentation.sam_config import HEADS_PRESETS, HeadsConfig
from tracevision_jax.weights.engine import flatten


def built_shapes(heads: HeadsConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the parameters of all modules, made without allocating anything."""
    prompts, decoder, memory = heads.prompts, heads.decoder, heads.memory
    grid, side, width = prompts.grid, prompts.image_size, prompts.width

    def numbers(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    features, position = numbers(1, grid, grid, width), numbers(grid, grid, width)
    found = {}

    def build(name: str, module, *given):
        out, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), *given)
        found[name] = variables["params"]
        return out

    mask = numbers(1, 1, prompts.mask_size, prompts.mask_size)
    points = numbers(1, 1, 1, 2), numbers(1, 1, 1, dtype=jnp.int32)
    embedded = build("prompt_encoder", PromptEncoder(prompts), *points, mask)
    high = None
    if decoder.high_resolution:
        maps = [numbers(1, n * grid, n * grid, width) for n in (4, 2)]
        high = build("high_resolution", HighResolution(decoder), *maps)
    image = numbers(1, 1, grid, grid, width)
    out = build("mask_decoder", MaskDecoder(decoder), image, embedded, high)
    assert out.masks.shape == (1, 1, 4, prompts.mask_size, prompts.mask_size)
    if memory is not None:
        reading = jax.eval_shape(lambda: read(empty(memory, 1, grid, grid), 0, memory))
        reading = jax.tree.map(lambda x: numbers(1, *x.shape, dtype=x.dtype), reading)
        conditioned = build("memory_conditioning", MemoryConditioning(memory), features, position, reading)
        assert conditioned.shape == image.shape
        flag = numbers(1, 1, dtype=bool)
        kept = build("memory_encoder", MemoryEncoder(memory), features, numbers(1, 1, side, side), flag, flag)
        assert kept.shape == (1, 1, grid, grid, memory.memory_width)
        build("object_pointer", ObjectPointer(memory), numbers(1, 1, width), flag)
        build("mask_downsample", MaskDownsample(memory), numbers(1, 1, side, side))
    return {path: leaf.shape for path, leaf in flatten(found).items()}


COUNTS = {
    "sam": 6_220 + 4_058_340,
    # A whole model (Hiera tiny) without its image encoder.
    "sam2": 38_945_986 - 27_219_136,
    "sam2.1": 38_962_498 - 27_219_136,
}


@pytest.mark.parametrize("release", sorted(HEADS_PRESETS))
def test_released_sizes_match_the_reference_tensor_by_tensor(release):
    """Names and shapes both ways, and the released number of parameters."""
    heads = HEADS_PRESETS[release]
    names = table(heads)
    built = built_shapes(heads)
    assert built == {path: tuple(shape) for path, shape in names.flax_shapes.items()}
    with torch.device("meta"):
        model = Sam(sam_config(heads)) if heads.memory is None else Sam2VideoModel(sam2_config(heads))
    aside = ("vision_encoder.", "shared_image_embedding.")
    theirs = {name: tuple(x.shape) for name, x in model.state_dict().items() if not name.startswith(aside)}
    assert names.torch_shapes == theirs
    fourier = heads.prompts.width  # a matrix that is drawn once and no parameter of the original
    assert sum(int(np.prod(shape)) for shape in built.values()) - fourier == COUNTS[release]
