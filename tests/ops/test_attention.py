"""The attention door: the reference against float64 arithmetic, the choice of kernels, the kernels."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh

from tests.on_devices import printed_on
from tracevision_jax.ops.attention import IMPLEMENTATIONS, attention, attention_mesh, choose
from tracevision_jax.ops.attention_call import AttentionCall, attend_xla, attend_xla_in_blocks
from tracevision_jax.ops.attention_kernels import attend_cudnn, attend_splash, why_not_splash
from tracevision_jax.ops.placement import Placement

HERE = Placement(None, (), (), "cpu")
TPU = Placement(None, (), (), "tpu")
GPU = Placement(None, (), (), "gpu")


def draw(rng, batch=2, queries=6, keys=6, heads=4, kv_heads=2, head_dim=8, dtype=np.float32):
    """Random q, k, v."""
    shapes = ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    return [jnp.asarray(rng.standard_normal((batch, *shape, head_dim)), dtype) for shape in shapes]


def plain(q, k, v, visible, bias=0.0):
    """Attention in float64, one head at a time; rows without a key give 0."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    out = np.zeros(q.shape)
    bias = np.broadcast_to(np.asarray(bias, np.float64), (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
    for row, head in np.ndindex(q.shape[0], q.shape[2]):
        scores = q[row, :, head] @ k[row, :, head // group].T / np.sqrt(q.shape[-1]) + bias[row, head]
        weights = np.where(visible[row], np.exp(scores), 0)
        total = weights.sum(-1, keepdims=True)
        out[row, :, head] = weights / np.where(total == 0, 1, total) @ v[row, :, head // group]
    return out


def test_all_masks_and_a_bias_together_equal_plain_arithmetic(rng):
    q, k, v = draw(rng, queries=4, keys=6)
    q_segments, kv_segments = jnp.array([[1, 1, 2, 0], [1, 1, 1, 2]]), jnp.array([[1, 1, 2, 2, 0, 1]] * 2)
    q_positions, kv_lengths = jnp.array([[1, 2, 3, 5], [0, 3, 5, 2]]), jnp.array([6, 4])
    bias = rng.standard_normal((2, 4, 4, 6)).astype(np.float32)
    ours = attention(
        q, k, v, bias=jnp.asarray(bias), q_segments=q_segments, kv_segments=kv_segments,
        causal=True, q_positions=q_positions, kv_lengths=kv_lengths,
    )  # fmt: skip
    keys = np.arange(6)
    visible = (
        (np.asarray(q_segments)[:, :, None] == np.asarray(kv_segments)[:, None])
        & (np.asarray(kv_segments) != 0)[:, None]
        & (keys <= np.asarray(q_positions)[..., None])
        & (keys < np.asarray(kv_lengths)[:, None, None])
    )
    np.testing.assert_allclose(ours, plain(q, k, v, visible, bias), atol=2e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("extras", ["none", "all"])
def test_blocks_of_queries_give_the_whole_calls_result_and_gradient(rng, causal, extras):
    q, k, v = draw(rng, queries=11, keys=11)
    given = {}
    if extras == "all":
        segments = jnp.asarray(rng.integers(0, 3, (2, 11)), jnp.int32)
        given = {"q_segments": segments, "kv_segments": segments, "kv_lengths": jnp.array([9, 11])}
        given |= {"bias": jnp.asarray(rng.standard_normal((1, 4, 11, 11)), jnp.float32)}

    def results(attend):
        def loss(q, k, v):
            mixed = attend(AttentionCall(q, k, v, 0.3, causal=causal, **given))
            return jnp.sum(jnp.sin(mixed)), mixed

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)

    blocks, whole = results(lambda call: attend_xla_in_blocks(call, 4)), results(attend_xla)
    for ours, theirs in zip(*map(jax.tree.leaves, (blocks, whole)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_cpu_takes_many_queries_in_blocks_and_few_at_once(rng):
    few, many = (AttentionCall(*draw(rng, queries=n, keys=n, heads=2, head_dim=2), 1.0) for n in (64, 1024))
    assert choose(few, HERE).name == "xla" and choose(many, HERE).name == "xla in blocks"
    np.testing.assert_allclose(choose(many, HERE).run(many, HERE), attend_xla(many), atol=1e-6)


@pytest.mark.parametrize("bias_heads", [1, 4])
def test_a_bias_may_be_shared_by_all_heads(rng, bias_heads):
    q, k, v = draw(rng)
    bias = rng.standard_normal((1, bias_heads, 6, 6)).astype(np.float32)
    everything = np.ones((2, 6, 6), bool)
    np.testing.assert_allclose(attention(q, k, v, bias=jnp.asarray(bias)), plain(q, k, v, everything, bias), atol=2e-6)


def test_rows_that_see_no_key_give_zero_and_finite_gradients(rng):
    q, k, v = draw(rng)
    segments = jnp.array([[1, 1, 0, 0, 0, 0], [0] * 6])

    def loss(q, k, v):
        return jnp.square(attention(q, k, v, q_segments=segments)).sum()

    assert not np.asarray(attention(q, k, v, q_segments=segments))[0, 2:].any()
    for gradient in jax.grad(loss, argnums=(0, 1, 2))(q, k, v):
        assert np.isfinite(gradient).all()
        assert not np.asarray(gradient)[0, 2:].any() and not np.asarray(gradient)[1].any()
        assert np.asarray(gradient)[0, :2].any()


def test_what_padding_holds_never_matters(rng):
    q, k, v = draw(rng)
    segments = jnp.array([[1, 1, 1, 2, 2, 0]] * 2)
    huge = [x.at[:, 5].set(1e30) for x in (q, k, v)]
    ours = attention(q, k, v, q_segments=segments, causal=True)[:, :5]
    np.testing.assert_array_equal(ours, attention(*huge, q_segments=segments, causal=True)[:, :5])


def test_shapes_that_do_not_fit_are_refused(rng):
    q, k, v = draw(rng, heads=3)
    with pytest.raises(ValueError, match="3 query heads"):
        attention(q, k, v)
    q, k, v = draw(rng, queries=2)
    with pytest.raises(ValueError, match="kv_segments are needed"):
        attention(q, k, v, q_segments=jnp.ones((2, 2), int))
    with pytest.raises(ValueError, match="without q_segments"):
        attention(q, k, v, kv_segments=jnp.ones((2, 6), int))


def test_each_platform_takes_its_first_kernel_that_supports_the_call(rng):
    q, k, v = draw(rng, queries=128, keys=128, dtype=jnp.bfloat16)
    call = AttentionCall(q, k, v, 1.0, causal=True)
    bias = jnp.zeros((1, 1, 128, 128))
    assert choose(call, HERE).name == "xla"
    assert choose(call, TPU).name == "splash"
    assert choose(call, GPU).name == "cudnn"
    assert choose(AttentionCall(q, k, v, 1.0, bias), TPU).name == "xla"
    assert choose(AttentionCall(q, k, v, 1.0, bias), GPU).name == "cudnn"
    assert choose(AttentionCall(q[:, :100], k[:, :100], v[:, :100], 1.0), TPU).name == "xla"
    assert choose(AttentionCall(q[:, :1], k, v, 1.0, kv_lengths=jnp.ones(2, int)), TPU).name == "xla"
    assert choose(AttentionCall(*(x.astype(jnp.float32) for x in (q, k, v)), scale=1.0), GPU).name == "xla"
    assert IMPLEMENTATIONS[-1].name == "xla"


def test_the_choice_and_its_reasons_are_logged_at_debug_level(rng, caplog):
    with caplog.at_level(logging.DEBUG, logger="tracevision_jax.ops.attention"):
        attention(*draw(rng))
    assert "xla" in caplog.text and "not splash: it is a TPU kernel" in caplog.text


@pytest.mark.parametrize("causal", [False, True])
def test_splash_equals_the_reference_with_its_gradients(rng, causal):
    q, k, v = draw(rng, batch=1, queries=128, keys=128, heads=2, kv_heads=1, head_dim=16)
    segments = jnp.asarray(np.repeat([[1, 2, 0]], [50, 60, 18], axis=1))
    target = jnp.asarray(rng.standard_normal(q.shape), jnp.float32)

    def result_and_gradients(run):
        def loss(q, k, v):
            mixed = run(AttentionCall(q, k, v, 0.25, q_segments=segments, kv_segments=segments, causal=causal))
            return (mixed * target).sum(), mixed

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    with pltpu.force_tpu_interpret_mode():
        gradients, mixed = result_and_gradients(lambda call: attend_splash(call, TPU))
    expected_gradients, expected = result_and_gradients(attend_xla)
    np.testing.assert_allclose(mixed, expected, atol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_splash_is_lowered_for_tpu_under_a_mesh(rng):
    mesh = jax.make_mesh((1, 1), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    q, k, v = draw(rng, queries=128, keys=128, dtype=jnp.bfloat16)
    with attention_mesh(mesh, ("data",), ("tensor",), platform="tpu"):
        traced = jax.jit(lambda q, k, v: attention(q, k, v, causal=True)).trace(q, k, v)
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("packed", [False, True])
def test_the_call_of_cudnn_means_what_the_reference_does(rng, monkeypatch, packed):
    """cuDNN itself needs a GPU; jax's own fallback behind the same function takes the same arguments."""
    through = jax.nn.dot_product_attention

    def fallback(*arguments, implementation, **options):
        assert implementation == "cudnn"
        return through(*arguments, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", fallback)
    q, k, v = draw(rng, dtype=jnp.bfloat16)
    segments = jnp.array([[1, 1, 2, 2, 0, 0]] * 2) if packed else None
    call = AttentionCall(q, k, v, 0.3, q_segments=segments, kv_segments=segments, causal=True)
    ours, expected = attend_cudnn(call, GPU), attend_xla(call)
    np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(expected, np.float32), atol=2e-2)


@pytest.fixture(scope="module")
def on_mesh() -> dict:
    """What `attention_on_mesh.py` prints in a process of four virtual devices."""
    return printed_on(4, "tests.ops.attention_on_mesh")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["splash", "cudnn", "xla"])
def test_queries_cut_over_context_give_the_results_and_gradients_of_whole_ones(on_mesh, name, causal):
    result, *gradients = on_mesh[f"{name} {causal}"]
    assert result < 1e-5, result
    assert max(gradients) < 1e-5, gradients


def test_splash_takes_a_shards_own_queries_and_all_keys(on_mesh):
    """Of 4 heads and 256 queries cut over 2 x 2 devices, with channels padded to 128; 2 heads of keys."""
    assert on_mesh["chosen"] == "splash"
    assert on_mesh["kernel takes"] == ["2x128x128", "1x256x128", "1x256x128"]


def test_queries_that_cannot_be_cut_are_refused_with_the_reason(rng):
    mesh = AbstractMesh((1, 2), ("data", "context"))
    cut = Placement(mesh, ("data",), (), "tpu", ("context",))
    call = AttentionCall(*draw(rng, queries=128, keys=128), scale=1.0)
    assert why_not_splash(call, cut) == "length 128 is no multiple of 128 x 2 over ('context',)"
    assert why_not_splash(call, cut.of("rows", 2)) is None
    assert why_not_splash(AttentionCall(*draw(rng, queries=256, keys=256), scale=1.0), cut) is None


def test_sets_take_every_mesh_axis_that_divides_them():
    mesh = AbstractMesh((2, 2, 3), ("data", "fsdp", "context"))
    given = Placement(mesh, ("data", "fsdp"), (), "tpu", ("context",), ("data", "fsdp", "context"))
    assert given.of("sets", 24).batch_axes == ("data", "fsdp", "context")
    assert given.of("sets", 8).batch_axes == ("data", "fsdp")
    assert given.of("sets", 6).batch_axes == ("data", "context")
    assert given.of("sets", 24).token_axes == ()
    assert given.of("tokens", 24) == given
