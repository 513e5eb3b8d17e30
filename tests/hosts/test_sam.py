"""Whole Segment Anything models on pictures: every kind of prompt from pixels on, released sizes, configurations."""

import copy
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import SamConfig, SamModel, SamVisionConfig

from tests.hosts.sam_reference import (
    SIDE,
    WHOLE,
    drawn_video,
    image_reference,
    small_config,
    whole_parameters,
)
from tests.segmentation.sam_reference import IMAGES, KINDS, WIDTH, random_prompts
from tests.segmentation.sam_reference import Prompts as TheirPrompts
from tests.vision.sam_reference import channels_first, error, shown
from tracevision_jax.errors import UserError
from tracevision_jax.hosts.sam import Maps, Prompts, SegmentAnything, init_params
from tracevision_jax.hosts.sam_presets import SAM_PRESETS, SegmentAnythingConfig, sam_preset
from tracevision_jax.segmentation.prompt_encoder import ABSENT
from tracevision_jax.weights.engine import flatten

RELEASES = ("sam", "sam2.1")
"""On pictures SAM 2 and 2.1 are the same."""


def pixels() -> np.ndarray:
    return drawn_video(IMAGES)


@cache
def answer(release: str, dtype: str = "float32"):
    """Compiled: from pixels and prompts to (several masks, the one mask), `traces` counting how often it was traced."""
    model, traces = SegmentAnything(small_config(release).with_precision(dtype)), []

    @jax.jit
    def run(params, pixels, prompts):
        traces.append(1)
        maps = model.apply({"params": params}, pixels, method="encode")
        predict = partial(model.apply, {"params": params}, maps, prompts, method="predict")
        return predict(several=True), predict(several=False)

    return run, traces


def theirs(release: str, prompts: TheirPrompts | None, dtype: torch.dtype, several: bool) -> dict[str, np.ndarray]:
    """The reference's answer; `prompts` None for none at all."""
    model = image_reference(release, dtype == torch.float64)
    if dtype == torch.bfloat16:
        model = copy.deepcopy(model).to(dtype)
    if release != "sam":
        model.mask_decoder.dynamic_multimask_via_stability = True
    given = {} if prompts is None else prompts.for_reference(dtype)
    out = model(channels_first(pixels(), dtype), **given, multimask_output=several)
    found = {"masks": out.pred_masks, "ious": out.iou_scores}
    if release != "sam":
        found["object_logits"] = out.object_score_logits[..., 0]
    return {name: value.detach().double().numpy() for name, value in found.items()}


@pytest.mark.parametrize("release", RELEASES)
def test_every_output_equals_the_references_for_every_kind_of_prompt(release):
    """Points, boxes, masks, several at once and none; the several masks and the one; all in one program."""
    run, traces = answer(release)
    for kind in KINDS:
        prompts = random_prompts(kind)
        given = prompts.ours()
        found = run(whole_parameters(release), pixels(), Prompts(**given))
        for several, ours in zip((True, False), found, strict=True):
            with torch.no_grad():
                narrow, exact = (theirs(release, prompts, dtype, several) for dtype in (torch.float32, torch.float64))
            for name, wanted in exact.items():
                label = f"{release}, {kind}, {'several' if several else 'one'}: {name}"
                assert shown(label, error(getattr(ours, name), wanted), error(narrow[name], wanted)) <= WHOLE
    assert len(traces) == 1


def test_sam_without_any_prompt_equals_the_reference():
    """The decoder's own tokens are all it reads: all slots for points are absent."""
    run, traces = answer("sam")
    given = random_prompts("nothing").ours()
    prompts = Prompts(**given | {"labels": jnp.full_like(given["labels"], ABSENT)})
    found = run(whole_parameters("sam"), pixels(), prompts)
    for several, ours in zip((True, False), found, strict=True):
        with torch.no_grad():
            narrow, exact = (theirs("sam", None, dtype, several) for dtype in (torch.float32, torch.float64))
        for name, wanted in exact.items():
            first = getattr(ours, name)[:, :1]
            assert shown(f"sam, {name}", error(first, wanted), error(narrow[name], wanted)) <= WHOLE
            assert error(getattr(ours, name)[:, 1:2], first) == 0
    assert len(traces) == 1


def test_in_bfloat16_the_error_is_that_of_the_reference():
    prompts = random_prompts("points and box")
    run, _ = answer("sam2.1", "bfloat16")
    found, _ = run(whole_parameters("sam2.1"), pixels(), Prompts(**prompts.ours()))
    with torch.no_grad():
        rounded, exact = (theirs("sam2.1", prompts, dtype, True)["masks"] for dtype in (torch.bfloat16, torch.float64))
    floor = error(rounded, exact)
    assert shown("sam2.1 in bfloat16", error(found.masks, exact), floor) <= 1.5 * floor


def test_a_model_for_pictures_alone_adds_the_vector_for_no_memory():
    config, params = small_config("sam2.1"), whole_parameters("sam2.1")
    alone = SegmentAnything(replace(config, heads=replace(config.heads, memory=None)))
    kept = ("vision_encoder", "prompt_encoder", "mask_decoder", "high_resolution")
    few = {name: params[name] for name in kept}
    name = "no_memory_embedding"
    few["memory_conditioning"] = {name: params["memory_conditioning"][name]}
    drawn = jax.eval_shape(lambda rng: init_params(alone, rng), jax.random.key(0))
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, few)
    image = jnp.asarray(np.random.default_rng(0).standard_normal((2, config.grid, config.grid, WIDTH)), jnp.float32)
    found, wanted = (
        model.apply({"params": tree}, Maps(image, None, None), method="condition")
        for model, tree in ((alone, few), (SegmentAnything(config), params))
    )
    np.testing.assert_array_equal(found, wanted)


COUNTS = {
    "sam_vit_h": 641_090_608,
    "sam2_hiera_tiny": 38_945_986,
    "sam2_hiera_small": 46_043_842,
    "sam2_hiera_base_plus": 80_833_666,
    "sam2_hiera_large": 224_430_130,
    "sam2.1_hiera_tiny": 38_962_498,
    "sam2.1_hiera_small": 46_060_354,
    "sam2.1_hiera_base_plus": 80_850_178,
    "sam2.1_hiera_large": 224_446_642,
}
"""As published. The matrix of the point codes, which is drawn once, is not counted."""


def built_count(config: SegmentAnythingConfig) -> int:
    """Parameters of a model that is built without being allocated."""
    model = SegmentAnything(config)
    shapes = jax.eval_shape(lambda rng: init_params(model, rng), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes)) - config.heads.prompts.width


@pytest.mark.parametrize("name", sorted(SAM_PRESETS))
def test_every_released_size_has_the_published_number_of_parameters(name):
    config = sam_preset(name)
    wanted = COUNTS.get(name)
    if wanted is None:  # SAM's smaller encoders, of which the reference knows the sizes
        vision = config.vision
        sizes = SamVisionConfig(
            hidden_size=vision.width,
            num_hidden_layers=vision.depth,
            num_attention_heads=vision.heads,
            global_attn_indexes=[(group + 1) * (vision.window_blocks + 1) - 1 for group in range(vision.groups)],
        )
        with torch.device("meta"):
            model = SamModel(SamConfig(vision_config=sizes))
        # It counts the matrix of the point codes.
        wanted = sum(x.numel() for x in model.parameters()) - config.heads.prompts.width
    assert built_count(config) == wanted


def test_a_model_starts_with_all_its_parts_at_their_names():
    """The tree that converted weights fill is the one that is drawn."""
    for release in ("sam", "sam2", "sam2.1"):
        model = SegmentAnything(small_config(release))
        drawn = jax.eval_shape(lambda rng, model=model: init_params(model, rng), jax.random.key(0))
        found = {path: leaf.shape for path, leaf in flatten(drawn).items()}
        assert found == {path: leaf.shape for path, leaf in flatten(whole_parameters(release)).items()}
    assert set(drawn) == {
        "vision_encoder",
        "prompt_encoder",
        "mask_decoder",
        "high_resolution",
        "memory_conditioning",
        "memory_encoder",
        "object_pointer",
        "mask_downsample",
    }


def test_pictures_of_another_size_keep_the_parameters():
    config = small_config("sam2.1")
    larger = config.with_image_size(2 * SIDE)
    assert (larger.image_size, larger.grid, larger.mask_size) == (2 * SIDE, 2 * config.grid, 2 * config.mask_size)
    model, params = SegmentAnything(larger), whole_parameters("sam2.1")
    numbers = jax.ShapeDtypeStruct((1, 2 * SIDE, 2 * SIDE, 3), jnp.float32)
    out = jax.eval_shape(lambda params, x: model.apply({"params": params}, x), params, numbers)
    assert out.masks.shape == (1, 1, 3, larger.mask_size, larger.mask_size)


def test_the_precision_reaches_every_part():
    config = small_config("sam2.1").with_precision("bfloat16", "bfloat16", remat="full")
    heads = config.heads
    for part in (config.vision, heads.prompts, heads.decoder, heads.memory):
        assert (part.dtype, part.param_dtype) == ("bfloat16", "bfloat16")
    assert config.vision.remat == heads.memory.remat == "full"
    assert config.with_precision("float32").vision.param_dtype == "bfloat16"


def wrong(**changes) -> SegmentAnythingConfig:
    """The small model with parts exchanged: `vision`, or fields of the heads' parts."""
    config = small_config("sam2.1")
    heads = replace(
        config.heads,
        **{
            name: replace(getattr(config.heads, name), **change) for name, change in changes.items() if name != "vision"
        },
    )
    return SegmentAnythingConfig(changes.get("vision", config.vision), heads)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: wrong(decoder={"width": 64}), "the mask decoder has 64"),
        (lambda: wrong(memory={"width": 64}), "the memory has 64"),
        (lambda: wrong(prompts={"stride": 8}), r"set heads\.prompts\.stride to 16"),
        (lambda: wrong(memory={"mask_stride": 8}), r"set heads\.memory\.mask_stride to 16"),
        (lambda: wrong(vision=small_config("sam").vision), "a plain ViT gives no maps of strides 4 and 8"),
        (lambda: small_config("sam2.1").with_image_size(SIDE + 16), "needs a multiple of 32 px"),
        (lambda: small_config("sam").with_image_size(SIDE + 1), "must be a multiple of the stride"),
        (lambda: sam_preset("sam2.1_hiera_tin"), r"Did you mean 'sam2\.1_hiera_tiny'"),
        (lambda: small_config("sam").video_memory(), "for videos take SAM 2"),
    ],
)
def test_what_does_not_fit_together_is_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()


def test_pictures_of_a_wrong_size_and_videos_with_sam_are_refused():
    model, params = SegmentAnything(small_config("sam")), {"params": whole_parameters("sam")}
    with pytest.raises(UserError, match=r"takes 128 x 128"):
        model.apply(params, jnp.zeros((1, SIDE, SIDE // 2, 3)), method="encode")
    config = small_config("sam")
    maps = Maps(jnp.zeros((1, config.grid, config.grid, config.heads.prompts.width)), None, None)
    with pytest.raises(UserError, match="for videos take SAM 2"):
        model.apply(params, maps, jnp.zeros((1, 1, SIDE, SIDE)), method="take_mask")
