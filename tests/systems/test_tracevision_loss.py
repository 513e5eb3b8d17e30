"""The loss of TraceVision does not depend on how its conversations are laid out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.systems.conftest import tiny_system, with_rows
from tracevision_jax.records.batch import Bucket
from tracevision_jax.records.collate import collate
from tracevision_jax.systems.protocol import System
from tracevision_jax.systems.tracevision import TraceVision
from tracevision_jax.training.step import total_loss

BUCKET = Bucket(tokens=136, frames=2, windows=4, conversations=3, points=6, masks=4)
TOLERANCE = 1e-5


@functools.cache
def measured(system: TraceVision, gradient: bool = True):
    """Jitted (params, batch) -> (sums, weights, gradient of the total loss)."""

    def total(params, batch):
        sums, weights, _ = system.loss(params, (), batch, jax.random.key(0))
        return total_loss(system.coefficients, sums, weights), (sums, weights)

    def run(params, batch):
        if not gradient:
            return *total(params, batch)[1], None
        found, (sums, weights) = jax.grad(total, has_aux=True)(params, batch)
        return sums, weights, found

    return jax.jit(run)


def distance(ours, theirs) -> float:
    """Relative Frobenius distance of two trees."""
    one, other = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (ours, theirs))
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def assert_same(ours, theirs) -> None:
    for name in theirs[0]:
        assert abs(float(ours[0][name] - theirs[0][name])) <= TOLERANCE * abs(float(theirs[0][name])), name
        assert float(ours[1][name]) == float(theirs[1][name]), name
    if ours[2] is not None and theirs[2] is not None:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(ours[2]))
        assert distance(ours[2], theirs[2]) <= TOLERANCE


@pytest.fixture(scope="module")
def reference(params, pieces):
    """Every piece in a row of its own."""
    system = tiny_system()
    batch = collate([[piece] for piece in pieces], BUCKET, system.config.processor)
    return measured(system)(params, batch)


def test_all_parts_have_a_loss_and_weights_count_tokens_and_masks(reference, pieces, vocabulary):
    sums, weights, gradient = reference
    learned = sum(int(c.learn[1:].sum()) for piece in pieces for c in piece.conversations)
    masks = sum(len(c.mask_slots) for piece in pieces for c in piece.conversations)
    assert {name: int(value) for name, value in weights.items()} == {
        **{"text": learned, "accuracy": learned, "refinement": masks, "dice": masks}
    }
    assert masks == 6
    value = {name: float(sums[name] / weights[name]) for name in sums}
    assert 0.5 * np.log(vocabulary.size) < value["text"] < 3 * np.log(vocabulary.size)
    assert 0 < value["refinement"] < 10 and 0 < value["dice"] <= 1 and 0 <= value["accuracy"] <= 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_every_parameter_that_can_matter_has_a_gradient(reference, system, params):
    """Rows of the head beyond the tokenizer's are unused, key biases before a rotary are not; words are few."""
    silent = {
        "/".join(key.key for key in path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(reference[2])
        if np.abs(leaf).max() < 1e-9
    }
    # The pixel decoder's attention has no rotary: a bias of all keys alike changes no softmax.
    assert {path for path in silent if not (path.startswith("decoder/") and path.endswith("k/bias"))} == set()


def test_packed_rows_have_the_loss_and_gradient_of_separate_ones(reference, system, params, pieces):
    # An empty row fills up the batch, so that it is the compiled program of separate rows that runs.
    packed = collate([[pieces[1], pieces[0]], [pieces[2]], []], BUCKET, system.config.processor)
    assert_same(measured(system)(params, packed), reference)


def test_padding_of_every_axis_changes_nothing(reference, system, params, pieces):
    wide = Bucket(tokens=144, frames=3, windows=6, conversations=4, points=8, masks=6)
    rows = [[piece] for piece in pieces] + [[]]
    assert_same(measured(system)(params, collate(rows, wide, system.config.processor)), reference)


def test_sums_and_weights_of_microbatches_add_up(reference, system, params, pieces):
    run = measured(system, gradient=False)
    parts = [run(params, collate([[piece]], BUCKET, system.config.processor)) for piece in pieces]
    sums = {name: sum(float(part[0][name]) for part in parts) for name in reference[0]}
    weights = {name: sum(float(part[1][name]) for part in parts) for name in reference[1]}
    assert_same((sums, weights, None), reference)


def test_slots_of_a_row_have_the_loss_and_gradient_of_tight_packing(reference, system, params, pieces):
    """Also with logits made in chunks, for learned tokens alone."""
    slot = max(len(c.tokens) for piece in pieces for c in piece.conversations)
    slotted = with_rows(system, slot_tokens=slot, learned_share=0.8, logit_chunk=24)
    bucket = dataclasses.replace(BUCKET, tokens=3 * slot)
    batch = collate([[pieces[0], pieces[1]], [pieces[2]]], bucket, slotted.config.processor)
    assert_same(measured(slotted)(params, batch), reference)


def test_a_batch_of_empty_rows_weighs_nothing(system, params):
    sums, weights, _ = measured(system, gradient=False)(params, collate([[]], BUCKET, system.config.processor))
    assert all(float(value) == 0 for value in (*sums.values(), *weights.values()))


def test_the_system_has_the_protocol(system):
    assert isinstance(system, System)
    assert system.coefficients == {"text": 1.0, "refinement": 1.0, "dice": 2.0}
    assert system.init_state() == ()


def test_a_conversation_without_a_trace_sees_the_towers_own_features(system, params, pieces):
    """The first conversation of a picture shows no trace, the second does."""
    batch = collate([[pieces[0]]], BUCKET, system.config.processor)
    apply = functools.partial(system.model.apply, {"params": params})
    context = jax.jit(lambda batch: apply(batch, method="context"))(batch)
    units, _ = jax.jit(lambda batch: system.model.apply(
        {"params": params}, batch.patches, batch.grid, method=lambda model, *x: model.host.encode_vision(*x))
    )(batch)  # fmt: skip
    per_conversation = units[0].reshape(-1, units.shape[-1])
    for number, same in ((1, True), (2, False)):
        here = (batch.segments[0] == number) & (batch.visual_index[0] >= 0)
        own = batch.visual_index[0][here] - (number - 1) * len(per_conversation)
        assert (np.array_equal(context.embeddings[0][here], per_conversation[own])) == same
    assert np.abs(context.maps[0]["trace_to_vision"]).max() > 0


def test_a_bucket_without_trajectories_skips_the_tvp_and_changes_nothing(system, params, pieces):
    apply = jax.jit(lambda batch: system.model.apply({"params": params}, batch, method="context"))
    without = apply(collate([[pieces[1]]], dataclasses.replace(BUCKET, points=0), system.config.processor))
    with_room = apply(collate([[pieces[1]]], BUCKET, system.config.processor))
    assert without.maps == []
    assert np.allclose(without.embeddings, with_room.embeddings, atol=1e-6)


def test_masks_are_decoded_on_the_frame_that_they_name(system, params, rng):
    places, width = 2 * 16, system.config.host.vision.width
    shallow, deep = (jnp.asarray(rng.normal(size=(1, 2, places, width)), jnp.float32) for _ in range(2))
    seg = jnp.asarray(rng.normal(size=(1, 1, 6, 16)), jnp.float32).repeat(2, 1)
    grid = jnp.asarray([[[4, 8], [4, 6]]])

    @jax.jit
    def masks(frame):
        return system.model.apply({"params": params}, shallow, deep, grid, seg, frame, method="masks")

    one, other = masks(jnp.asarray([[0, 1]]))[0], masks(jnp.asarray([[1, 0]]))[0]
    assert np.allclose(one, other[::-1], atol=1e-5) and np.abs(one - other).max() > 1e-2


def test_guidance_is_part_of_the_loss_and_does_not_depend_on_the_layout(params, pieces):
    """Slots of five masks seek their place, and an answer that of a trace, however rows are packed and padded."""
    slot = max(len(c.tokens) for piece in pieces for c in piece.conversations)
    guided = with_rows(TraceVision(dataclasses.replace(tiny_system().config, guided_layer=1)), slot_tokens=slot)
    assert guided.coefficients["guidance"] == 0.5 and isinstance(guided, System)
    bucket = dataclasses.replace(BUCKET, tokens=3 * slot)
    run = measured(guided)
    separate = run(params, collate([[piece] for piece in pieces], bucket, guided.config.processor))
    seekers = [c.sought[:, 2] > c.sought[:, 0] for piece in pieces for c in piece.conversations]
    assert int(separate[1]["guidance"]) == sum(int(some.sum()) for some in seekers) > 30
    assert 0.1 < float(separate[0]["guidance"] / separate[1]["guidance"]) < 10
    packed = collate([[pieces[2]], [pieces[1], pieces[0]], []], bucket, guided.config.processor)
    assert_same(run(params, packed), separate)
    without = measured(guided_off := with_rows(tiny_system(), slot_tokens=slot))(params, packed)
    assert "guidance" not in without[0] and guided_off.coefficients == tiny_system().coefficients
    layers = [found[2]["host"]["language"]["layers"]["attn"]["q"]["kernel"] for found in (separate, without)]
    assert distance(*layers) > 0.01
