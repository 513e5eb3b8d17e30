"""The prompt encoder of both generations against the reference's, for every kind of prompt."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.segmentation.sam_reference import (
    GRID,
    KINDS,
    MODULE,
    STRIDE,
    parameters,
    random_prompts,
    reference,
    small_heads,
)
from tests.vision.sam_reference import channels_last, error, shown
from tracevision_jax.errors import UserError
from tracevision_jax.segmentation.prompt_encoder import ABSENT, NOT_A_POINT, PromptEncoder, count_points, with_boxes
from tracevision_jax.segmentation.sam_config import HEADS_PRESETS, PromptEncoderConfig

RELEASES = ("sam", "sam2.1")
FOURIER = 256
"""Values of the matrix of point codes, which is no parameter of the original."""


@cache
def encoder(release: str):
    """Our compiled encoder."""
    module = PromptEncoder(small_heads(release).prompts)
    params = {"params": parameters(release)["prompt_encoder"]}
    return jax.jit(lambda given: module.apply(params, **given))


def sparse_order(found, prompts):
    """The reference's tokens in our order: corners of a box before points."""
    if prompts.points is None or prompts.boxes is None:
        return found
    points = prompts.points.shape[2]
    return np.concatenate([found[:, :, points : points + 2], found[:, :, :points], found[:, :, points + 2 :]], axis=2)


@pytest.mark.parametrize("release", RELEASES)
def test_every_kind_of_prompt_gives_the_references_tokens_and_map(release):
    for kind in KINDS:
        prompts = random_prompts(kind)
        found = encoder(release)(prompts.ours())
        with torch.no_grad():
            (narrow, narrow_dense), (sparse, dense) = (
                reference(release, wide).prompt_encoder(**prompts.for_reference(dtype))
                for wide, dtype in ((False, torch.float32), (True, torch.float64))
            )
        visible = np.asarray(found.visible)
        assert (visible == visible[:1, :1]).all()
        tokens = np.asarray(found.tokens)[:, :, visible[0, 0]]
        exact = sparse_order(sparse.numpy(), prompts)
        floor = error(sparse_order(narrow.numpy(), prompts), exact)
        assert shown(f"{release}, {kind}: tokens", error(tokens, exact), floor) <= MODULE
        exact, floor = channels_last(dense), error(channels_last(narrow_dense), channels_last(dense))
        exact = np.broadcast_to(exact[:, None] if len(exact) > 1 else exact[None], found.dense.shape)
        assert shown(f"{release}, {kind}: map", error(found.dense, exact), floor) <= MODULE


@pytest.mark.parametrize("release", RELEASES)
def test_places_of_the_image_have_the_code_of_points(release):
    found = encoder(release)(random_prompts("points").ours()).image_code
    centres = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    column, row = torch.meshgrid(centres, centres, indexing="xy")
    embedding = reference(release, True).prompt_encoder.shared_embedding
    assert error(found, embedding(torch.stack([column, row], dim=-1)[None])[0].detach()) <= MODULE
    if release != "sam":
        assert error(found, channels_last(reference(release, True).get_image_wide_positional_embeddings())[0]) <= MODULE


@pytest.mark.parametrize(
    ("release", "labels", "ends"),
    [
        ("sam", [1, 0, ABSENT], True),
        ("sam", [2, 3, ABSENT], False),
        ("sam", [2, 3, 1], False),
        ("sam2.1", [2, 3, ABSENT], True),
        ("sam2.1", [ABSENT, NOT_A_POINT, ABSENT], True),
        ("sam2.1", [ABSENT, ABSENT, ABSENT], False),
    ],
)
def test_which_prompts_end_in_the_token_not_a_point(release, labels, ends):
    module = PromptEncoder(small_heads(release).prompts)
    given = jnp.array([[labels]]), {"params": parameters(release)["prompt_encoder"]}
    found = module.apply(given[1], jnp.full((1, 1, 3, 2), 5.0), given[0])
    assert np.asarray(found.visible)[0, 0].tolist() == [label != ABSENT for label in labels] + [ends]


def test_a_mask_counts_only_for_those_that_have_one():
    given = random_prompts("points and mask").ours()
    masked = encoder("sam2.1")(given).dense
    without = encoder("sam2.1")(given | {"has_mask": jnp.zeros((2, 3), bool)}).dense
    flags = jnp.array([[True, False, True], [False, False, True]])
    mixed = encoder("sam2.1")(given | {"has_mask": flags}).dense
    assert np.array_equal(mixed, jnp.where(flags[..., None, None, None], masked, without))
    assert error(masked, without) > 0.1


def test_a_box_counts_as_two_points():
    points, labels = with_boxes(
        jnp.zeros((2, 1, 2)), jnp.array([[1], [ABSENT]]), jnp.arange(8.0).reshape(2, 4), jnp.array([False, True])
    )
    assert points[1].tolist() == [[4.0, 5.0], [6.0, 7.0], [0.0, 0.0]]
    assert labels.tolist() == [[ABSENT, ABSENT, 1], [2, 3, ABSENT]]
    assert count_points(labels).tolist() == [1, 2]


@pytest.mark.parametrize("release", sorted(HEADS_PRESETS))
def test_released_sizes_have_the_released_number_of_parameters(release):
    config = HEADS_PRESETS[release].prompts
    shapes = jax.eval_shape(
        PromptEncoder(config).init,
        jax.random.key(0),
        jnp.zeros((1, 1, 1, 2)),
        jnp.zeros((1, 1, 1), jnp.int32),
        jnp.zeros((1, 1, config.mask_size, config.mask_size)),
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 6_220 + FOURIER


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="multiple of the stride, 16"):
        PromptEncoderConfig(image_size=1000)
    with pytest.raises(UserError, match="the width, 9, must be even"):
        PromptEncoderConfig(width=9)
    given = random_prompts("points").ours()
    with pytest.raises(ValueError, match=f"takes {4 * GRID} x {4 * GRID}"):
        encoder("sam")(given | {"masks": jnp.zeros((2, 3, STRIDE, STRIDE))})
