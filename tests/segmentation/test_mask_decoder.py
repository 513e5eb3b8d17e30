"""The mask decoder of both generations against the reference's: every output, every kind of prompt, every tensor."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.segmentation.sam_reference import (
    GRID,
    IMAGES,
    KINDS,
    MODULE,
    WIDTH,
    inert_tensors,
    parameters,
    random_prompts,
    reference,
    small_heads,
)
from tests.vision.sam_reference import channels_first, error, shown
from tracevision_jax.errors import UserError
from tracevision_jax.segmentation.mask_decoder import (
    NO_OBJECT_LOGIT,
    DecodedMasks,
    HighResolution,
    MaskDecoder,
    choose,
    several_wanted,
    stability,
    without_absent,
)
from tracevision_jax.segmentation.prompt_encoder import ABSENT, PromptEmbeddings, PromptEncoder
from tracevision_jax.segmentation.sam_config import HEADS_PRESETS, MaskDecoderConfig

RELEASES = ("sam", "sam2.1")
SIDE = 4 * GRID
NAMES = DecodedMasks._fields


def features() -> tuple[jax.Array, ...]:
    """Features of strides 16, 4 and 8."""
    rng = np.random.default_rng(5)
    return tuple(jnp.asarray(rng.standard_normal((IMAGES, n * GRID, n * GRID, WIDTH)), jnp.float32) for n in (1, 4, 2))


def run(release: str, params, given, image, stride4, stride8) -> DecodedMasks:
    """Our prompt encoder and decoder."""
    heads = small_heads(release)
    high = None
    if heads.decoder.high_resolution:
        high = HighResolution(heads.decoder).apply({"params": params["high_resolution"]}, stride4, stride8)
    prompts = PromptEncoder(heads.prompts).apply({"params": params["prompt_encoder"]}, **given)
    return MaskDecoder(heads.decoder).apply({"params": params["mask_decoder"]}, image, prompts, high)


@cache
def jitted(release: str):
    """`run` with one embedding an image."""
    return jax.jit(lambda params, given, maps: run(release, params, given, maps[0][:, None], *maps[1:]))


def compiled(release: str):
    """`run` with the drawn weights."""
    return lambda given, maps=None: jitted(release)(parameters(release), given, maps or features())


def image_code(model, dtype: torch.dtype) -> torch.Tensor:
    """The code of the image's places, from the reference, one an image."""
    centres = (torch.arange(GRID, dtype=dtype) + 0.5) / GRID
    places = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), dim=-1)[None]
    return model.prompt_encoder.shared_embedding(places).permute(0, 3, 1, 2).repeat(IMAGES, 1, 1, 1)


def theirs(release: str, prompts, wide: bool) -> DecodedMasks:
    """The reference's outputs, of the single mask and the several."""
    model, dtype = reference(release, wide), torch.float64 if wide else torch.float32
    image, stride4, stride8 = (channels_first(np.asarray(x), dtype) for x in features())
    sparse, dense = model.prompt_encoder(**prompts.for_reference(dtype))
    decoder = model.mask_decoder
    more = {}
    if release != "sam":
        more = {"high_resolution_features": [decoder.conv_s0(stride4), decoder.conv_s1(stride8)]}
        decoder.dynamic_multimask_via_stability = False
    outputs = [
        decoder(
            image_embeddings=image,
            image_positional_embeddings=image_code(model, dtype),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=several,
            **more,
        )
        for several in (False, True)
    ]
    joined = [torch.cat(pair, dim=2) for pair in zip(*(out[:3] for out in outputs), strict=True)]
    if release == "sam":
        return DecodedMasks(*joined, None, None)
    return DecodedMasks(*joined, outputs[0][3][..., 0])


@pytest.mark.parametrize("release", RELEASES)
def test_every_output_equals_the_references_for_every_kind_of_prompt(release):
    for kind in KINDS:
        prompts = random_prompts(kind)
        found = compiled(release)(prompts.ours())
        with torch.no_grad():
            narrow, exact = (theirs(release, prompts, wide) for wide in (False, True))
        for name in NAMES:
            wanted = getattr(exact, name)
            if wanted is None:  # SAM tells neither its tokens nor whether the object is there
                continue
            floor = error(getattr(narrow, name), wanted)
            assert shown(f"{release}, {kind}: {name}", error(getattr(found, name), wanted), floor) <= MODULE
        if release == "sam":
            assert (found.object_logits > 0).all()


@pytest.mark.parametrize("release", RELEASES)
def test_every_tensor_moves_the_outputs_as_in_the_reference(release):
    def inert(kind: str, *prefixes: str) -> set[str]:
        prompts = random_prompts(kind)
        given, maps = prompts.ours(), features()

        def told(out: DecodedMasks) -> list:
            return [out.masks, out.ious] if release == "sam" else list(out)

        with torch.no_grad():
            return inert_tensors(
                release,
                prefixes,
                lambda params: told(jitted(release)(params, given, maps)),
                lambda model: told(theirs(release, prompts, wide=True)),
            )

    assert inert("points and mask", "prompt_encoder.mask_embed") == set()
    rest = ("shared_embedding", "point_embed", "not_a_point_embed", "no_mask_embed")
    found = inert("points and box", "mask_decoder.", *(f"prompt_encoder.{name}" for name in rest))
    # A bias added to all keys changes no softmax. In SAM a prompt with a box has no token "not a point".
    assert {name for name in found if not name.endswith("k_proj.bias")} == (
        {"prompt_encoder.not_a_point_embed.weight"} if release == "sam" else set()
    )
    assert sum(name.endswith("k_proj.bias") for name in found) == 3 * small_heads(release).decoder.layers + 1
    if release == "sam":
        assert inert("points", "prompt_encoder.not_a_point_embed") == set()


@pytest.mark.parametrize("release", RELEASES)
def test_padding_and_the_other_prompts_never_change_a_mask(release):
    given = random_prompts("points and box").ours()
    # The second prompt loses its box and a click; places of padding say anything.
    labels = given["labels"].at[:, 1, :2].set(ABSENT).at[:, 1, 3].set(ABSENT)
    mixed = compiled(release)(given | {"labels": labels})
    other = {
        "labels": jnp.flip(labels, axis=-1),
        "points_px": jnp.flip(jnp.where((labels == ABSENT)[..., None], -3000.0, given["points_px"]), axis=2),
    }
    moved = compiled(release)(given | other)
    alone = compiled(release)(
        {name: jnp.broadcast_to(value[:, 1:2], value.shape) for name, value in (given | {"labels": labels}).items()}
    )
    for name in NAMES:
        assert error(getattr(moved, name), getattr(mixed, name)) <= 1e-6, name
        assert error(getattr(alone, name)[:, 2], getattr(mixed, name)[:, 1]) <= 1e-6, name
    assert error(compiled(release)(given).masks[:, 1], mixed.masks[:, 1]) > 0.01


def test_an_image_embedding_may_differ_from_prompt_to_prompt():
    """As memory makes it in a video: prompts of one image are what they are for three images."""
    given, maps = random_prompts("points").ours(), features()
    swapped = jnp.stack([maps[0], maps[0][::-1], maps[0]], axis=1)
    found = jax.jit(lambda image: run("sam2.1", parameters("sam2.1"), given, image, *maps[1:]))(swapped)
    same, other = compiled("sam2.1")(given), compiled("sam2.1")(given, (maps[0][::-1], *maps[1:]))
    assert error(found.masks[:, ::2], same.masks[:, ::2]) <= 1e-6
    assert error(found.masks[:, 1], other.masks[:, 1]) <= 1e-6
    assert error(found.masks[:, 1], same.masks[:, 1]) > 0.1


def drawn_outputs() -> DecodedMasks:
    """Outputs with stable, unstable and empty single masks."""
    rng = np.random.default_rng(11)
    masks = rng.standard_normal((2, 3, 4, SIDE, SIDE)).astype(np.float32)
    masks[0, 0, 0] *= 100
    masks[1, 2, 0] = -1
    return DecodedMasks(
        jnp.asarray(masks),
        jnp.asarray(rng.uniform(size=(2, 3, 4)), jnp.float32),
        jnp.asarray(rng.standard_normal((2, 3, 4, WIDTH)), jnp.float32),
        jnp.asarray([[1.0, -1.0, 0.0], [0.1, 3.0, -0.1]]),
    )


def test_an_unstable_single_mask_gives_way_as_in_the_reference():
    out, config = drawn_outputs(), MaskDecoderConfig()
    masks, ious, tokens = choose(out, False, config)
    wanted = reference("sam2.1").mask_decoder._dynamic_multimask_via_stability(
        torch.tensor(np.asarray(out.masks)), torch.tensor(np.asarray(out.ious))
    )
    assert np.array_equal(masks, wanted[0][:, :, 0]) and np.array_equal(ious, wanted[1][:, :, 0])
    stable = np.asarray(stability(out.masks[:, :, 0], config.stability_delta) >= config.stability_threshold)
    assert stable.tolist() == [[True, False, False], [False, False, True]]
    assert np.array_equal(tokens, out.tokens[:, :, 0])
    for more in ({"training": True}, {"config": replace(config, dynamic_multimask=False)}):
        masks, _, _ = choose(out, False, **({"config": config} | more))
        assert np.array_equal(masks, out.masks[:, :, 0])


def test_each_prompt_chooses_for_itself_whether_several_masks_count():
    out, config = drawn_outputs(), MaskDecoderConfig()
    several = jnp.array([[True, False, True], [False, True, False]])
    masks, ious, tokens = choose(out, several, config)
    single = choose(out, False, config)
    best = 1 + np.asarray(out.ious)[:, :, 1:].argmax(-1)
    for place in np.ndindex(2, 3):
        if several[place]:
            wanted = out.masks[place][best[place]], out.ious[place][best[place]], out.tokens[place][best[place]]
        else:
            wanted = tuple(value[place] for value in single)
        for value, target in zip((masks, ious, tokens), wanted, strict=True):
            assert np.array_equal(value[place], target), place


def test_several_masks_are_considered_for_at_most_one_point():
    labels = jnp.array([[-1, ABSENT, ABSENT], [1, ABSENT, ABSENT], [0, 1, ABSENT], [2, 3, ABSENT]])
    assert several_wanted(labels, MaskDecoderConfig()).tolist() == [True, True, False, False]


def test_an_absent_objects_mask_is_empty():
    out = drawn_outputs()
    masks = without_absent(out.masks, out.object_logits)
    absent = np.asarray(out.object_logits <= 0)
    assert (np.asarray(masks)[absent] == NO_OBJECT_LOGIT).all() and absent.sum() == 3
    assert np.array_equal(np.asarray(masks)[~absent], np.asarray(out.masks)[~absent])


def decoder_shapes(release: str):
    """Shapes of the decoder's parameters at the released size."""
    heads = HEADS_PRESETS[release]
    grid, width = heads.prompts.grid, heads.decoder.width
    cells = jax.ShapeDtypeStruct((1, 1, grid, grid, width), jnp.float32)
    prompts = PromptEmbeddings(
        jax.ShapeDtypeStruct((1, 1, 2, width), jnp.float32),
        jax.ShapeDtypeStruct((1, 1, 2), bool),
        jax.ShapeDtypeStruct((1, 1, 1, 1, width), jnp.float32),
        jax.ShapeDtypeStruct((grid, grid, width), jnp.float32),
    )
    maps = [jax.ShapeDtypeStruct((1, n * grid, n * grid, width), jnp.float32) for n in (4, 2)]
    key = jax.random.key(0)
    if not heads.decoder.high_resolution:
        return jax.eval_shape(MaskDecoder(heads.decoder).init, key, cells, prompts), None
    high, narrow = jax.eval_shape(HighResolution(heads.decoder).init_with_output, key, *maps)
    out, params = jax.eval_shape(MaskDecoder(heads.decoder).init_with_output, key, cells, prompts, high)
    assert out.masks.shape == (1, 1, 4, 256, 256) and out.masks.dtype == jnp.float32
    return params, narrow


def test_sams_decoder_has_the_released_number_of_parameters():
    params, _ = decoder_shapes("sam")
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 4_058_340


def test_sam2s_decoder_has_sams_parameters_the_object_score_and_two_projections():
    params, narrow = decoder_shapes("sam2.1")
    score = 256 + 2 * (256 * 256 + 256) + 256 + 1
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 4_058_340 + score
    assert sum(leaf.size for leaf in jax.tree.leaves(narrow)) == 256 * (32 + 64) + 32 + 64


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="3 heads must divide half of it"):
        MaskDecoderConfig(width=64, heads=3)
    heads, image = small_heads("sam"), jnp.zeros((1, 1, GRID, GRID, WIDTH))
    prompts = PromptEmbeddings(jnp.zeros((1, 1, 1, WIDTH)), jnp.ones((1, 1, 1), bool), image, image[0, 0])
    with pytest.raises(ValueError, match="given True, used False"):
        MaskDecoder(heads.decoder).apply({"params": {}}, image, prompts, (image[0], image[0]))


def test_no_prompt_token_at_all_leaves_the_decoders_own():
    """What the original image predictors do without a prompt."""
    given = random_prompts("nothing").ours()
    found = compiled("sam")(given | {"labels": jnp.full_like(given["labels"], ABSENT)})
    image, model = channels_first(np.asarray(features()[0]), torch.float64), reference("sam", True)
    with torch.no_grad():
        _, dense = model.prompt_encoder(None, None, None, None)
        masks, ious = model.mask_decoder(image, image_code(model, torch.float64), None, dense, multimask_output=False)
    assert error(found.masks[:, :1, :1], masks) <= MODULE and error(found.ious[:, :1, :1], ious) <= MODULE
