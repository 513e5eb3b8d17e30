"""SAM 2 as a system: what its loss counts, what padding may not change, what learns, and how memory is taken away."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.systems.tiny_sam2 import BUCKET, FRAMES, PROMPTING, clip_batch, tiny_sam2
from tracevision_jax.errors import UserError
from tracevision_jax.hosts.sam_presets import sam_preset
from tracevision_jax.segmentation.clip_losses import COEFFICIENTS
from tracevision_jax.segmentation.prompt_encoder import ABSENT, BOTTOM_RIGHT, NEGATIVE, POSITIVE, TOP_LEFT
from tracevision_jax.systems.protocol import System
from tracevision_jax.systems.sam2 import PromptingConfig, Sam2, draw_prompting, first_prompts
from tracevision_jax.training.parameters import flatten, unflatten
from tracevision_jax.training.step import total_loss

INERT = {"prompt_encoder/shared_embedding/positional_embedding", "memory_conditioning/no_memory_positional_encoding"}
"""Drawn once; in every release, and read by nobody."""


@functools.cache
def programs(prompting: PromptingConfig = PROMPTING):
    """(system, its parameters, compiled: the loss's sums and weights with the gradient of the total)."""
    system = tiny_sam2(prompting)

    def objective(params, batch, key):
        sums, weights, _ = system.loss(params, (), batch, key)
        return total_loss(system.coefficients, sums, weights), (sums, weights)

    params = system.init(jax.random.key(1))
    return system, params, jax.jit(jax.value_and_grad(objective, has_aux=True))


@functools.cache
def costs(points: float, told: float = 0.0):
    """Compiled: the loss of clips prompted by points or by masks alone, without clicks."""
    return jax.jit(tiny_sam2(dataclasses.replace(PROMPTING, points=points, clicks=0, told=told)).loss)


def scoring(params, bias: float):
    """Parameters by which every object seems there, or absent."""
    name = "mask_decoder/pred_obj_score_head/proj_out/bias"
    return unflatten(flatten(params) | {name: jnp.full(1, bias)})


@pytest.fixture(scope="module")
def key():
    """Of a step in which there are prompts of all kinds and a later frame is corrected."""
    for number in range(100):
        key = jax.random.key(number)
        drawn = draw_prompting(jax.random.split(key, FRAMES + 1)[0], 4, FRAMES, PROMPTING)
        kinds = {("points", "boxes")[int(box)] if by else "mask" for by, box in zip(*drawn[:2], strict=True)}
        if len(kinds) == 3 and drawn.corrected.sum() == 2 and not drawn.by_points[:3].all():
            return key
    raise AssertionError("no such step")


@pytest.fixture(scope="module")
def result(key):
    """Of one batch, objects being thought to be there."""
    _, params, run = programs()
    (total, (sums, weights)), gradient = run(scoring(params, 3.0), clip_batch(), key)
    return total, sums, weights, gradient


def test_it_is_a_system_and_says_what_its_batches_are():
    system = tiny_sam2()
    assert isinstance(system, System)
    batch = clip_batch()
    spec = system.batch_spec(BUCKET, len(batch.frames))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(lambda x: (x.shape, x.dtype), spec)


def test_a_model_without_memory_and_impossible_prompting_are_refused():
    with pytest.raises(UserError, match=r"memory|videos"):
        Sam2(sam_preset("sam_vit_b"))
    with pytest.raises(UserError, match=r"boxes 1\.5"):
        PromptingConfig(boxes=1.5)
    with pytest.raises(UserError, match=r"corrected_frames \(0\)"):
        PromptingConfig(corrected_frames=0)
    with pytest.raises(UserError, match=r"loss_stride \(0\)"):
        PromptingConfig(loss_stride=0)


def test_stages_train_all_or_what_follows_the_encoder():
    system = tiny_sam2()
    paths = flatten(jax.eval_shape(system.init, jax.random.key(0)))
    assert all(map(system.trainable("all"), paths))
    heads = {path for path in paths if system.trainable("heads")(path)}
    assert heads == {path for path in paths if not path.startswith("vision_encoder/")} != set()
    with pytest.raises(UserError, match=r"No stage 'head'. Did you mean 'heads'"):
        system.trainable("head")


def test_every_part_is_counted_by_real_frames_of_real_objects(result):
    total, sums, weights, _ = result
    batch = clip_batch()
    assert set(sums) == set(weights) == {*COEFFICIENTS, "overlap"}
    assert all(float(weights[name]) == batch.real.sum() for name in COEFFICIENTS)
    assert float(weights["overlap"]) == (batch.masks & batch.real[..., None, None]).any((-2, -1))[:, :, 1:].sum()
    assert all(np.isfinite(float(value)) for value in sums.values()) and float(total) > 0


def test_every_parameter_learns_but_the_inert_ones(result, key):
    """Those of present objects where objects seem present, those of absent ones where they do not."""
    _, params, run = programs()
    _, absent = run(scoring(params, -3.0), clip_batch(), key)
    gradients = flatten(result[-1]), flatten(absent)
    still = {path for path in gradients[0] if not any(float(jnp.abs(each[path]).max()) > 0 for each in gradients)}
    assert still == INERT


def test_what_padding_holds_changes_nothing(result, key):
    _, sums, *_ = result
    _, params, run = programs()
    batch = clip_batch()
    rng = np.random.default_rng(9)
    frames = batch.frames.copy()
    frames[-1] = rng.integers(0, 256, frames[-1].shape)
    noise = rng.random(batch.masks.shape) < 0.5
    masks = np.where(batch.real[..., None, None], batch.masks, noise)
    (_, (other, _)), _ = run(scoring(params, 3.0), dataclasses.replace(batch, frames=frames, masks=masks), key)
    for name, value in sums.items():
        np.testing.assert_allclose(other[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_frames_of_all_clips_are_drawn_for_correction_and_the_first_always_is():
    config = PromptingConfig(corrected_frames=3)
    drawn = [draw_prompting(jax.random.key(k), 64, 8, config) for k in range(60)]
    corrected = np.stack([prompting.corrected for prompting in drawn])
    assert corrected[:, 0].all()
    assert set(corrected.sum(1).tolist()) == {1, 2, 3} and corrected[:, 1:].any(0).all()
    assert 0.42 < np.mean([prompting.by_points for prompting in drawn]) < 0.58
    assert 0.42 < np.mean([prompting.by_boxes for prompting in drawn]) < 0.58
    alone = draw_prompting(jax.random.key(0), 4, 1, config)
    assert alone.corrected.tolist() == [True]


def test_first_prompts_are_boxes_or_clicks_on_the_object():
    truth = jnp.asarray(clip_batch().masks[:2, :, 0])
    points, labels = first_prompts(jax.random.key(0), truth, jnp.array([True, False]))
    assert labels[0].tolist() == [[TOP_LEFT, BOTTOM_RIGHT]] * 2
    assert labels[1, 0].tolist() == [POSITIVE, ABSENT]
    assert labels[1, 1].tolist() == [NEGATIVE, ABSENT], "an object that is padding is nowhere"
    x, y = np.asarray(points[1, 0, 0]).astype(int)
    assert truth[1, 0, y, x]


def test_a_mask_that_the_user_gives_teaches_nothing_on_its_own_frame():
    """A clip whose first frame alone is real has no loss by masks; the same by points has."""
    batch = clip_batch()
    real = batch.real & (np.arange(FRAMES) == 0)
    one = dataclasses.replace(batch, real=real)
    sums = {points: costs(points)(programs()[1], (), one, jax.random.key(0))[0] for points in (0.0, 1.0)}
    assert all(float(value) == 0 for value in sums[0.0].values())
    assert all(float(sums[1.0][name]) > 0 for name in COEFFICIENTS)


def test_the_true_masks_of_a_clip_are_remembered_where_they_are_told():
    """With other truths on frame 1 the later frames cost the same, unless those truths are remembered."""
    params = scoring(programs()[1], 3.0)

    batch = clip_batch()
    other = batch.masks.copy()
    other[:, :, 1] = other[:, :, 1, ::-1]
    short = batch.real.copy()
    short[:, :, 2:] = False

    def costs_of_another_truth(told: float) -> list[float]:
        """How much the Dice loss changes of frame 1 alone, and of all frames."""

        def dice(masks, real) -> float:
            changed = dataclasses.replace(batch, masks=masks, real=real)
            return float(costs(0.0, told)(params, (), changed, jax.random.key(0))[0]["dice"])

        return [dice(other, real) - dice(batch.masks, real) for real in (short, batch.real)]

    alone, whole = costs_of_another_truth(0.0)
    assert abs(whole - alone) < 1e-4 * abs(alone)
    told_alone, told_whole = costs_of_another_truth(1.0)
    assert abs(told_alone - alone) < 1e-4 * abs(alone)
    assert abs(told_whole - alone) > 1e-2 * abs(alone)


def test_tracking_starts_from_the_given_masks_and_forgetting_changes_the_rest():
    system, params, _ = programs()
    params, batch = scoring(params, 3.0), clip_batch()
    follow = jax.jit(system.follow, static_argnums=2)
    ours, forgetful = np.asarray(follow(params, batch, False)), np.asarray(follow(params, batch, True))
    assert ours.shape == batch.masks.shape == forgetful.shape
    np.testing.assert_array_equal(ours[:, :, 0], batch.masks[:, :, 0])
    assert (ours != forgetful).any()
    # Without memory the objects of a clip are all the same to the model.
    np.testing.assert_array_equal(forgetful[0, 0, 1:], forgetful[0, 1, 1:])
