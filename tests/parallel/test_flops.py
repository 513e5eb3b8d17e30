"""Analytic FLOPs: by hand on small functions, and against XLA's own cost analysis where no loop hides anything."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tests.parallel.small_tracevision import BUCKET, small_system
from tracevision_jax.ops.attention import attention, attention_mesh
from tracevision_jax.parallel.ahead_of_time import kept_for_backward
from tracevision_jax.parallel.flops import Flops, forward_flops, part_of, products, training_flops
from tracevision_jax.systems.tracevision import TraceVision, tracevision_config
from tracevision_jax.training.ahead_of_time import parts_of, with_remat
from tracevision_jax.training.parameters import merge, split
from tracevision_jax.training.step import total_loss
from tracevision_jax.vision.config import QwenVisionConfig
from tracevision_jax.vision.qwen_vit import VisionTower

F32 = jnp.float32


def shape(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, F32)


def stack(weights, given):
    """Four layers of a matrix of their own, as a scan."""

    def layer(x, w):
        return jnp.tanh(x @ w), None

    return jax.lax.scan(layer, given, weights)[0].sum()


def test_a_scan_counts_as_many_times_as_it_turns_and_backward_twice_that():
    found = training_flops(stack, shape(4, 8, 8), shape(5, 8))
    once = 4 * 2 * 5 * 8 * 8
    # The first layer's input is no parameter, but from the second turn on the carry depends on parameters.
    assert (found.forward, found.backward, found.recomputed) == (once, 2 * once, 0)
    assert found.model == 3 * once


def test_rematerialisation_is_counted_apart():
    def loss(weights, given):
        return jax.lax.scan(lambda x, w: (jax.checkpoint(lambda x: jnp.tanh(x @ w))(x), None), given, weights)[0].sum()

    once = 4 * 2 * 5 * 8 * 8
    found = training_flops(loss, shape(4, 8, 8), shape(5, 8))
    assert (found.forward, found.backward, found.recomputed) == (once, 2 * once, once)
    inputs_of_layers = 4 * 5 * 8 * 4
    assert kept_for_backward(loss, shape(4, 8, 8), shape(5, 8)) == inputs_of_layers
    assert kept_for_backward(stack, shape(4, 8, 8), shape(5, 8)) > inputs_of_layers


def test_what_is_frozen_costs_no_backward_pass():
    def loss(head, given):
        tower, x = given
        return ((x @ tower) @ head).sum()

    found = training_flops(loss, shape(8, 3), (shape(6, 8), shape(5, 6)))
    assert found.forward == 2 * 5 * 6 * 8 + 2 * 5 * 8 * 3
    assert found.backward == 2 * 5 * 8 * 3  # the head's gradient alone


def test_a_stopped_gradient_stops_the_count():
    def loss(w, x):
        return (jax.lax.stop_gradient(x @ w) @ w).sum()

    found = training_flops(loss, shape(8, 8), shape(5, 8))
    assert (found.forward, found.backward) == (2 * 2 * 5 * 8 * 8, 2 * 5 * 8 * 8)


def test_the_costlier_branch_counts_and_a_while_loop_counts_one_turn():
    def choose(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: (x @ w) @ w, lambda: x @ w).sum()

    assert forward_flops(choose, shape(5, 8), shape(8, 8)).forward == 2 * 2 * 5 * 8 * 8

    def write(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w, x)

    assert forward_flops(write, shape(5, 8), shape(8, 8)).forward == 2 * 5 * 8 * 8


def test_a_convolution_counts_its_taps():
    def convolve(x, k):
        return jax.lax.conv_general_dilated(x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert forward_flops(convolve, shape(2, 6, 6, 3), shape(3, 3, 3, 5)).forward == 2 * 2 * 4 * 4 * 5 * 3 * 3 * 3


def test_causal_attention_of_a_language_model_is_halved_in_the_model_flops():
    def attend(q, k, v):
        with jax.named_scope("language/layers/attn"):
            return attention(q, k, v, causal=True)

    one = shape(2, 16, 4, 8)
    found = forward_flops(attend, one, one, one, parts=("language",))
    square = 2 * (2 * 2 * 4 * 16 * 16 * 8)
    assert (found.model_full_square, found.causal, found.model) == (square, square, square / 2)
    assert dict(found.parts) == {"language": square}


def test_no_program_has_a_higher_mfu_than_what_is_computed_again_leaves():
    """Causal attention of 100 FLOPs, 40 of them computed again: at least half of both is multiplied."""
    found = Flops(forward=600.0, backward=400.0, recomputed=240.0, causal=100.0, parts={}, recomputed_causal=40.0)
    assert found.model == 950
    assert found.mfu_bound == 950 / (950 + 200 + 40 / 2)


@pytest.mark.parametrize("again", [False, True])
def test_causal_attention_that_is_computed_again_is_counted_apart(again):
    def attend(x):
        return attention(x, x, x, causal=True)

    def loss(weights, given):
        with jax.named_scope("language/layers/attn"):
            x = jnp.einsum("btd,dhe->bthe", given, weights)
            return jnp.square((jax.checkpoint(attend) if again else attend)(x)).sum()

    rows = 4096  # a CPU would take so many queries in blocks, which compute their scores again
    found = training_flops(loss, shape(6, 4, 8), shape(2, rows, 6))
    product = 2 * 2 * 4 * rows * rows * 8
    # Two products, and each twice backward; of all that only the scores are computed again.
    assert found.causal == 6 * product
    assert found.recomputed == found.recomputed_causal == product * again


def attention_flops(windows: int) -> dict[str, int]:
    """FLOPs of attention in a small tower on one frame of so many windows, by kind of block."""
    config = QwenVisionConfig(32, width=32, heads=4, mlp_width=64, groups=2, window_blocks=3, patch=4)
    tower = VisionTower(config)
    given = shape(1, 1, windows, config.slots, config.patch_dim), jax.ShapeDtypeStruct((1, 1, 2), jnp.int32)
    params = jax.eval_shape(tower.init, jax.random.key(0), *given)
    with attention_mesh(None, platform="cpu"):
        found = [product for product in products(jax.make_jaxpr(tower.apply)(params, *given)) if "bk" in product.place]
    return {kind: sum(p.flops for p in found if f"/{kind}/attn" in p.place) for kind in ("window", "full")}


@pytest.mark.parametrize("windows", [1, 4, 16])
def test_window_attention_costs_what_its_windows_cost_and_not_the_full_square(windows):
    one_window = 2 * (2 * 32 * 64 * 64)  # two products of 64 x 64 tokens over all channels
    assert attention_flops(windows) == {"window": 6 * windows * one_window, "full": 2 * windows**2 * one_window}


def test_parts_are_whole_words():
    assert part_of("Model/host.encode/vision/groups", ("vision", "language")) == "vision"
    assert part_of("Model/vision_encoder/attn", ("vision",)) == "other"


def unrolled_system(width: int) -> TraceVision:
    """TraceVision with one layer of everything, so that every loop turns once, and no chunks of logits."""
    config = small_system().config
    language = dataclasses.replace(config.host.language, layers=1, width=width, mlp_width=4 * width)
    vision = dataclasses.replace(config.host.vision, groups=1, window_blocks=0, out_width=width, width=width)
    host = dataclasses.replace(config.host, vision=vision, language=language)
    made = tracevision_config(host, first_added=100, decoder=config.decoder, feature_groups=(1, 1), logit_chunk=0)
    return TraceVision(made)


def loss_of(system: TraceVision, stage: str):
    """(loss, trained shapes, given shapes, names of parts) of a batch of two rows."""
    shapes = jax.eval_shape(system.init, jax.random.key(0))
    trained, frozen = split(shapes, system.trainable(stage))

    def loss(trained, given):
        sums, weights, _ = system.loss(merge(trained, given[0]), (), given[1], jax.random.key(0))
        return total_loss(system.coefficients, sums, weights)

    return loss, trained, (frozen, system.batch_spec(BUCKET, 2)), parts_of(shapes)


@pytest.fixture(scope="module")
def counted():
    """{stage: (our count, FLOPs by XLA's cost analysis)} of the unrolled system."""
    found = {}
    for stage in ("stage1_5", "stage2"):
        loss, trained, given, parts = loss_of(unrolled_system(128), stage)
        analysis = jax.jit(jax.grad(loss)).lower(trained, given).compile().cost_analysis()
        found[stage] = training_flops(loss, trained, given, parts), analysis["flops"]
    return found


@pytest.mark.parametrize("stage", ["stage1_5", "stage2"])
def test_flops_of_tracevision_are_those_of_xlas_cost_analysis(counted, stage):
    """Where no loop hides anything; XLA counts what is elementwise too, which is little at this width."""
    found, theirs = counted[stage]
    print(f"{stage}: counted {found.model_full_square:.4e}, XLA {theirs:.4e}")
    assert found.recomputed == 0
    assert 1.0 <= theirs / found.model_full_square < 1.05
    assert set(found.parts) - {"other"} == {"vision", "language", "tvp", "decoder"}
    assert sum(found.parts.values()) == found.model_full_square


def test_a_frozen_tower_costs_less(counted):
    every, language_only = counted["stage1_5"][0], counted["stage2"][0]
    assert language_only.forward == every.forward
    assert language_only.parts["vision"] * 2.5 < every.parts["vision"]


def test_remat_policies_change_what_is_computed_again_and_what_is_kept_but_not_the_model():
    system = small_system()
    found, kept = {}, {}
    for policy in ("none", "full"):
        changed = TraceVision(with_remat(system.config, policy))
        loss, trained, given, parts = loss_of(changed, "stage1_5")
        found[policy] = training_flops(loss, trained, given, parts)
        kept[policy] = kept_for_backward(loss, trained, given)
    assert found["none"].model == found["full"].model
    assert found["none"].recomputed < found["full"].recomputed < found["full"].forward
    assert found["full"].mfu_bound < found["none"].mfu_bound <= 1
    assert kept["none"] > kept["full"] > 0
