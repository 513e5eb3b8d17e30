"""Memory attention against the reference's: with and without pointers, every tensor, and where there is no memory."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.sam2_video.modeling_sam2_video import get_1d_sine_pe

from tests.segmentation.sam_reference import GRID, MODULE, WIDTH, inert_tensors, parameters, reference, small_heads
from tests.vision.sam_reference import error, shown
from tracevision_jax.errors import UserError
from tracevision_jax.ops.sine_position import sine_position
from tracevision_jax.segmentation.memory_attention import (
    MemoryAttention,
    MemoryConditioning,
    MemoryEmbedding,
    MemoryTokens,
    line_sines,
)
from tracevision_jax.segmentation.memory_bank import MemoryReading
from tracevision_jax.segmentation.sam_config import MemoryConfig

OBJECTS, FRAMES, POINTERS, CELLS = 2, 3, 3, GRID * GRID
PARTS = WIDTH // 64


def memory_config(release: str = "sam2.1") -> MemoryConfig:
    config = small_heads(release).memory
    assert config is not None
    return config


def draw(*shape: int, seed: int = 3) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def inputs(pointers: int = POINTERS) -> tuple[jax.Array, MemoryTokens]:
    """A frame's features for each object, and memories that are all there."""
    keys = FRAMES * CELLS + pointers * PARTS
    tokens = MemoryTokens(draw(OBJECTS, keys, 64), draw(OBJECTS, keys, 64, seed=4), jnp.ones((OBJECTS, keys), bool))
    return draw(OBJECTS, GRID, GRID, WIDTH, seed=5), tokens


@cache
def attention(pointers: int = POINTERS):
    """Our compiled attention, from parameters and memory."""
    module, position = MemoryAttention(memory_config()), sine_position(GRID, GRID, WIDTH)

    def run(params, memory):
        params = {"params": params["memory_conditioning"]["memory_attention"]}
        return module.apply(params, inputs()[0], position, memory, pointers * PARTS)

    return jax.jit(run)


def as_torch(x) -> torch.Tensor:
    """A jax array as a tensor."""
    return torch.tensor(np.array(x))


def theirs(model, pointers: int = POINTERS) -> np.ndarray:
    """The reference's attention, which has objects in the second axis."""
    features, memory = inputs(pointers)
    dtype = model.no_object_pointer.dtype

    def flat(x) -> torch.Tensor:
        return as_torch(x).reshape(len(x), -1, x.shape[-1]).transpose(0, 1).to(dtype)

    position = np.broadcast_to(sine_position(GRID, GRID, WIDTH), features.shape)
    with torch.no_grad():
        out = model.memory_attention(
            current_vision_features=flat(features),
            current_vision_position_embeddings=flat(position),
            memory=flat(memory.tokens),
            memory_posision_embeddings=flat(memory.positions),
            num_object_pointer_tokens=pointers * PARTS,
        )
    return out[0].reshape(OBJECTS, GRID, GRID, WIDTH).double().numpy()


@pytest.mark.parametrize("pointers", [0, POINTERS])
def test_conditioned_features_equal_the_references(pointers):
    ours = attention(pointers)(parameters("sam2.1"), inputs(pointers)[1])
    exact, narrow = theirs(reference("sam2.1", True), pointers), theirs(reference("sam2.1"), pointers)
    assert shown(f"{pointers} pointers", error(ours, exact), error(narrow, exact)) <= MODULE


def test_every_tensor_moves_the_features_as_in_the_reference():
    memory = inputs()[1]
    found = inert_tensors(
        "sam2.1",
        ("memory_attention.",),
        lambda params: [attention()(params, memory)],
        lambda model: [theirs(model)],
    )
    # With rotary positions and pointers without, a key's bias is not the same for all keys.
    assert found == set()


def test_hidden_keys_change_nothing_whatever_they_hold():
    memory = inputs()[1]
    visible = np.ones(memory.visible.shape, bool)
    visible[0, CELLS : 2 * CELLS] = visible[1, -PARTS:] = False
    hidden = memory._replace(visible=jnp.asarray(visible))
    filled = jnp.where(visible[..., None], memory.tokens, 1e3)
    first = attention()(parameters("sam2.1"), hidden)
    second = attention()(parameters("sam2.1"), hidden._replace(tokens=filled))
    assert np.array_equal(first, second)
    everything = attention()(parameters("sam2.1"), memory)
    assert error(first, everything) > 1e-3


def reading(visible: bool = True) -> MemoryReading:
    """Memories of one video: two conditioning frames and one a step back."""
    distances = jnp.array([[-0.4, 1.0, 1 / 15]] * OBJECTS)
    return MemoryReading(
        memories=draw(OBJECTS, FRAMES, GRID, GRID, 64),
        memory_steps=jnp.array([[0, 4, 1]] * OBJECTS),
        memory_visible=jnp.full((OBJECTS, FRAMES), visible),
        pointers=draw(OBJECTS, POINTERS, WIDTH, seed=6),
        pointer_distances=distances,
        pointer_visible=jnp.full((OBJECTS, POINTERS), visible),
    )


@pytest.mark.parametrize("release", ["sam2", "sam2.1"])
def test_tokens_and_their_positions_equal_the_references(release):
    given = reading()
    params = parameters(release)["memory_conditioning"]["memory_embedding"]
    ours = jax.jit(MemoryEmbedding(memory_config(release)).apply)({"params": params}, given)
    model = reference(release)
    with torch.no_grad():
        sines = model.memory_encoder.position_encoding((1, 64, GRID, GRID), torch.device("cpu"), torch.float32)
        sines = sines.flatten(2).permute(2, 0, 1)
        for index in range(OBJECTS):
            outputs = [
                (int(step), {"maskmem_features": as_torch(m).reshape(CELLS, 1, 64), "maskmem_pos_enc": sines})
                for step, m in zip(given.memory_steps[index], given.memories[index], strict=True)
            ]
            memories, positions = model._build_memory_attention_inputs(outputs, torch.device("cpu"))
            pointers, pointer_positions = model._process_object_pointers(
                [float(15 * d) for d in given.pointer_distances[index]],
                [as_torch(p)[None] for p in given.pointers[index]],
                max_object_pointers_to_use=16,
                batch_size=1,
                num_channels=WIDTH,
                device=torch.device("cpu"),
            )
            assert error(ours.tokens[index], torch.cat([*memories, pointers])[:, 0]) <= 1e-7
            assert error(ours.positions[index], torch.cat([*positions, pointer_positions])[:, 0]) <= 1e-6
    assert ours.visible.all()


def test_numbers_have_the_references_sines():
    places = np.linspace(-1, 3, 9)
    wanted = get_1d_sine_pe(torch.tensor(places), WIDTH)
    assert error(line_sines(jnp.asarray(places, jnp.float32), WIDTH), wanted) <= 1e-6


@cache
def conditioning():
    """The whole way, compiled: from features, a reading and flags, with a leading axis of videos."""
    module, params = MemoryConditioning(memory_config()), {"params": parameters("sam2.1")["memory_conditioning"]}
    position = sine_position(GRID, GRID, WIDTH)
    return jax.jit(lambda features, reading, use: module.apply(params, features, position, reading, use))


def videos(*readings: MemoryReading) -> MemoryReading:
    return jax.tree.map(lambda *x: jnp.stack(x), *readings)


def test_without_memory_a_learned_vector_is_added_instead():
    features = draw(2, GRID, GRID, WIDTH, seed=7)
    use = jnp.array([[True, False], [True, True]])
    found = conditioning()(features, videos(reading(), reading(visible=False)), use)
    params = parameters("sam2.1")["memory_conditioning"]
    alone = features + params["no_memory_embedding"][0]
    assert error(found[0, 0], alone[0]) > 0.1
    # Not asked to, nothing to read, nothing to read.
    for video, thing in ((0, 1), (1, 0), (1, 1)):
        assert np.array_equal(found[video, thing], alone[video]), (video, thing)
    image = MemoryConditioning(memory_config()).apply({"params": params}, features, sine_position(GRID, GRID, WIDTH))
    assert image.shape == (2, 1, GRID, GRID, WIDTH) and np.array_equal(image[:, 0], alone)


def test_an_empty_reading_has_finite_gradients():
    features, nothing = draw(1, GRID, GRID, WIDTH), videos(reading(visible=False))
    use = jnp.ones((1, OBJECTS), bool)

    def loss(features, memories):
        return (conditioning()(features, replace(nothing, memories=memories), use) ** 2).sum()

    gradients = jax.grad(loss, argnums=(0, 1))(features, nothing.memories)
    assert all(np.isfinite(x).all() for x in gradients) and not np.any(gradients[1])


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="pointers of width 256 do not split into tokens of 96"):
        MemoryConfig(memory_width=96)
    with pytest.raises(UserError, match="max_conditioning 1: at least 2"):
        MemoryConfig(max_conditioning=1)
    with pytest.raises(UserError, match="memory of 1 frames"):
        MemoryConfig(frames=1)
