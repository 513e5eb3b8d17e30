"""Qwen2.5-VL against the reference: logits, padding, greedy tokens, bfloat16, every tensor, gradients."""

from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.hosts.qwen25vl_reference import (
    RELEASED_LAYOUT,
    TINY,
    error,
    make_prompt,
    numpy_of,
    pack,
    params_of,
    random_visual,
    reference_model,
)
from tracevision_jax.hosts.qwen25vl import Qwen25VL, Qwen25VLConfig, place_features, preset
from tracevision_jax.language.cache import KVCache, init_cache

WHOLE = 1e-4
"""Largest relative error of the whole model, Frobenius, float32."""
NEW_TOKENS = 12


@dataclass
class Pair:
    """A reference model and ours with the same weights, and two prompts: a long one and a short one."""

    config: Qwen25VLConfig
    reference: torch.nn.Module
    host: Qwen25VL
    params: dict
    prompts: tuple

    def exact(self, prompt) -> tuple[np.ndarray, float]:
        """The reference's logits in float64, and its own float32 error against them."""
        with torch.no_grad():
            narrow = numpy_of(self.reference(**prompt.for_reference()).logits[0])
            self.reference.double()
            wide = numpy_of(self.reference(**prompt.for_reference(torch.float64)).logits[0])
            self.reference.float()
        return wide, error(narrow, wide)

    def logits(self, **extras) -> np.ndarray:
        """Our logits for both prompts in one batch, compiled, padded by the extras."""
        return np.asarray(apply_of(self.host)(self.params, **pack(self.prompts, **extras)))


@cache
def apply_of(host: Qwen25VL):
    """The compiled forward pass."""
    return jax.jit(host.apply)


@cache
def pair(name: str) -> Pair:
    """The two models of a name, made once."""
    raw = {"tiny": TINY, "released layout": RELEASED_LAYOUT}[name]
    config = Qwen25VLConfig.from_hf(raw)
    reference = reference_model(raw)
    rng = np.random.default_rng(5)
    long = make_prompt(
        rng,
        config,
        [
            random_visual(rng, config, 1, 26, 18),
            random_visual(rng, config, 1, 12, 30),
            random_visual(rng, config, 3, 18, 20, 0.7),
        ],
        17,
    )
    short = make_prompt(rng, config, [random_visual(rng, config, 1, 10, 6)], 9)
    assert len(long.tokens) > 500
    return Pair(config, reference, Qwen25VL(config), {"params": params_of(reference, config)}, (long, short))


@pytest.mark.parametrize("name", ["tiny", "released layout"])
def test_logits_equal_the_reference_at_every_position_of_a_long_prompt(name):
    both = pair(name)
    ours = both.logits()
    for row, prompt in enumerate(both.prompts):
        expected, floor = both.exact(prompt)
        found = error(ours[row, : len(prompt.tokens)], expected)
        worst = max(error(a, b) for a, b in zip(ours[row], expected, strict=False))
        title = f"{name}, {len(prompt.tokens)} tokens"
        print(f"{title}: error {found:.1e}, worst position {worst:.1e}, floor {floor:.1e}")
        assert worst <= WHOLE


def test_padding_never_changes_logits():
    both = pair("tiny")
    plain = both.logits()
    padded = both.logits(extra_tokens=9, extra_frames=2, extra_windows=5)
    for row, prompt in enumerate(both.prompts):
        count = len(prompt.tokens)
        assert error(padded[row, :count], plain[row, :count]) < 2e-6


def test_prompts_of_one_bucket_share_one_program():
    both = pair("tiny")
    both.logits()
    size = apply_of(both.host)._cache_size()
    rng = np.random.default_rng(6)
    other = make_prompt(rng, both.config, [random_visual(rng, both.config, 2, 14, 8, 0.5)], 11)
    long, _ = both.prompts
    apply_of(both.host)(both.params, **pack([long, other]))
    assert apply_of(both.host)._cache_size() == size


def greedy_tokens(host: Qwen25VL, params, inputs, lengths, offsets, size: int) -> jax.Array:
    """Greedy decoding on the device: prefill of right-padded prompts, then one token a row and step."""
    run, config = host.apply, host.config.language
    rows = jnp.arange(len(lengths))
    units, _ = run(params, inputs["patches"], inputs["grid"], method="encode_vision")
    features = units.reshape(units.shape[0], -1, units.shape[-1])
    embeddings = place_features(run(params, inputs["tokens"], method="embed"), features, inputs["visual_index"])
    cache = init_cache(config, len(lengths), size)
    hidden, cache = run(params, embeddings, inputs["positions"], inputs["segments"], cache, True, method="run")
    first = run(params, hidden[rows, lengths - 1], method="logits").argmax(-1)
    out = jnp.zeros((len(lengths), NEW_TOKENS), jnp.int32).at[:, 0].set(first)

    def step(state):
        number, out, cache = state
        embedding = run(params, out[:, number - 1][:, None], method="embed")
        place = jnp.broadcast_to((cache.lengths + offsets)[:, None, None], (len(lengths), 1, 3))
        hidden, cache = run(params, embedding, place, jnp.ones((len(lengths), 1), jnp.int32), cache, method="run")
        token = run(params, hidden[:, 0], method="logits").argmax(-1)
        return number + 1, out.at[:, number].set(token), cache

    return jax.lax.while_loop(lambda state: state[0] < NEW_TOKENS, step, (1, out, cache))[1]


@pytest.mark.parametrize("name", ["tiny", "released layout"])
def test_greedy_tokens_equal_the_reference_for_prompts_of_different_length(name):
    both = pair(name)
    inputs = {key: jnp.asarray(value) for key, value in pack(both.prompts, extra_tokens=3).items()}
    lengths = inputs["segments"].sum(1)
    offsets = inputs["positions"].max((1, 2)) + 1 - lengths
    decode = jax.jit(greedy_tokens, static_argnums=(0, 5))
    ours = decode(both.host, both.params, inputs, lengths, offsets, inputs["tokens"].shape[1] + NEW_TOKENS)
    both.reference.generation_config.eos_token_id = None
    for row, prompt in enumerate(both.prompts):
        theirs = both.reference.generate(**prompt.for_reference(), max_new_tokens=NEW_TOKENS, do_sample=False)
        np.testing.assert_array_equal(ours[row], theirs[0, len(prompt.tokens) :])


def test_bfloat16_is_as_near_to_float32_as_torchs_own():
    both = pair("tiny")
    half = reference_model(TINY, dtype=torch.bfloat16)
    ours = apply_of(Qwen25VL(both.config.with_precision("bfloat16")))(both.params, **pack(both.prompts))
    assert ours.dtype == jnp.float32
    for row, prompt in enumerate(both.prompts):
        exact, _ = both.exact(prompt)
        with torch.no_grad():
            theirs = error(numpy_of(half(**prompt.for_reference(torch.bfloat16)).logits[0]), exact)
        found = error(ours[row, : len(prompt.tokens)], exact)
        print(f"bfloat16, {len(prompt.tokens)} tokens: error {found:.1e}, torch's {theirs:.1e}")
        assert found <= 1.5 * theirs


def test_every_tensor_moves_both_models_alike():
    both = pair("tiny")
    rng = np.random.default_rng(7)
    prompt = make_prompt(rng, both.config, [random_visual(rng, both.config, 1, 6, 8)], 5)
    inputs, arguments = pack([prompt]), prompt.for_reference()
    apply = apply_of(both.host)
    generator = torch.Generator().manual_seed(8)
    found = {}
    with torch.no_grad():
        ours_before = np.asarray(apply(both.params, **inputs))[0]
        theirs_before = numpy_of(both.reference(**arguments).logits[0])
        for name, parameter in both.reference.named_parameters():
            saved = parameter.clone()
            noise = torch.randn(parameter.shape, generator=generator)
            # Biases by more than their own size: those of keys act through the rotation alone.
            parameter.add_(0.5 * noise * (1.0 if name.endswith("bias") else saved.std()))
            theirs = numpy_of(both.reference(**arguments).logits[0]) - theirs_before
            ours = np.asarray(apply({"params": params_of(both.reference, both.config)}, **inputs))[0] - ours_before
            parameter.copy_(saved)
            found[name] = error(ours, theirs)
            assert np.linalg.norm(theirs) > 1e-3 * np.linalg.norm(theirs_before), f"{name} does not matter"
    worst = max(found, key=lambda name: found[name])
    print(f"{len(found)} tensors; the least alike is {worst}: {found[worst]:.1e}")
    assert found[worst] < 1e-3


def test_gradients_are_finite_with_padding_and_leave_padding_alone():
    both = pair("tiny")
    rng = np.random.default_rng(9)
    prompt = make_prompt(rng, both.config, [random_visual(rng, both.config, 1, 6, 8)], 5)
    inputs = pack([prompt], extra_tokens=6, extra_frames=1, extra_windows=2)
    count = len(prompt.tokens)

    def loss(params, patches):
        logits = apply_of(both.host)(params, **{**inputs, "patches": patches})
        return jax.nn.logsumexp(logits[:, :count], axis=-1).sum()

    by_params, by_patches = jax.jit(jax.grad(loss, argnums=(0, 1)))(both.params, inputs["patches"])
    assert all(np.isfinite(leaf).all() and np.asarray(leaf).any() for leaf in jax.tree.leaves(by_params))
    assert np.asarray(by_patches)[0, 0].any()
    assert not np.asarray(by_patches)[0, 1:].any() and np.isfinite(by_patches).all()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("3b", 3754622976), ("7b", 8292166656), ("32b", 33452718336), ("72b", 73410777344)],
)
def test_released_sizes_have_their_number_of_parameters(name, parameters):
    config = preset(name)
    vision = config.vision
    spec = jax.ShapeDtypeStruct
    tree = jax.eval_shape(
        Qwen25VL(config).init,
        jax.random.key(0),
        spec((1, 8), jnp.int32),
        spec((1, 8, 3), jnp.int32),
        spec((1, 8), jnp.int32),
        spec((1, 1, 2, vision.slots, vision.patch_dim), jnp.float32),
        spec((1, 1, 2), jnp.int32),
        spec((1, 8), jnp.int32),
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == parameters


def test_the_cache_is_a_pytree_of_fixed_shapes():
    cache = init_cache(pair("tiny").config.language, 2, 9, "bfloat16")
    assert isinstance(jax.tree.map(jnp.shape, cache), KVCache)
    assert cache.keys.shape == (3, 2, 2, 9, 16) and cache.keys.dtype == jnp.bfloat16
