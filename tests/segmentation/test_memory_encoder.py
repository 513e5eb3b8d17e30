"""The memory encoder and object pointers against the reference's: outputs, every tensor, released sizes."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.segmentation.sam_reference import GRID, MODULE, STRIDE, WIDTH, inert_tensors, parameters, reference
from tests.segmentation.sam_reference import small_heads as heads_of
from tests.vision.sam_reference import channels_first, channels_last, error, shown
from tracevision_jax.errors import UserError
from tracevision_jax.segmentation.memory_encoder import MemoryEncoder, mask_signal
from tracevision_jax.segmentation.object_pointer import MaskDownsample, ObjectPointer, outputs_of_mask
from tracevision_jax.segmentation.sam_config import HEADS_PRESETS, MemoryConfig

SIDE = GRID * STRIDE
PRESENT = np.array([[True, False], [True, True]])
PROMPTED = np.array([[False, True], [True, False]])


def memory_config(release: str = "sam2.1") -> MemoryConfig:
    config = heads_of(release).memory
    assert config is not None
    return config


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Features of two frames, and logits of two objects on each."""
    rng = np.random.default_rng(1)
    features = rng.standard_normal((2, GRID, GRID, WIDTH)).astype(np.float32)
    blobs = rng.standard_normal((2, 2, SIDE // 8, SIDE // 8)).repeat(8, axis=2).repeat(8, axis=3) * 3
    return features, (blobs + rng.standard_normal(blobs.shape)).astype(np.float32)


def given() -> tuple[jax.Array, ...]:
    """All that our encoder is given."""
    return tuple(jnp.asarray(x) for x in (*inputs(), PRESENT, PROMPTED))


@cache
def encoder(release: str):
    """Our compiled encoder, from parameters."""
    module = MemoryEncoder(memory_config(release))
    run = jax.jit(lambda params, given: module.apply({"params": params["memory_encoder"]}, *given))
    return lambda params, inputs=None: run(params, inputs or given())


def theirs(model, dtype: torch.dtype) -> np.ndarray:
    """The reference's memories, before it rounds them to bfloat16."""
    features, masks = inputs()
    config, found = model.config, np.zeros((2, 2, GRID, GRID, 64))
    with torch.no_grad():
        for place in np.ndindex(2, 2):
            logits = torch.tensor(masks[place][None, None], dtype=dtype)
            signal = (logits > 0).to(dtype) if PROMPTED[place] else torch.sigmoid(logits)
            signal = signal * config.sigmoid_scale_for_mem_enc + config.sigmoid_bias_for_mem_enc
            memory, _ = model.memory_encoder(channels_first(features[place[:1]][None], dtype), signal)
            if not PRESENT[place] and model.occlusion_spatial_embedding_parameter is not None:
                memory = memory + model.occlusion_spatial_embedding_parameter[..., None, None]
            found[place] = channels_last(memory)[0]
    return found


@pytest.mark.parametrize("release", ["sam2", "sam2.1"])
def test_memories_equal_the_references(release):
    ours = encoder(release)(parameters(release))
    exact, narrow = theirs(reference(release, True), torch.float64), theirs(reference(release), torch.float32)
    assert shown(f"{release}: memories", error(ours, exact), error(narrow, exact)) <= MODULE


def test_the_reference_stores_what_we_store():
    """Its own function, which also binarises, scales, marks the absent, and rounds to bfloat16."""
    model, (features, masks) = reference("sam2.1"), inputs()
    ours = encoder("sam2.1")(parameters("sam2.1")).astype(jnp.bfloat16)
    for place in np.ndindex(2, 2):
        with torch.no_grad():
            stored, _ = model._encode_new_memory(
                current_vision_feats=torch.tensor(features[place[0]]).reshape(GRID * GRID, 1, WIDTH),
                pred_masks_high_res=torch.tensor(masks[place][None, None]),
                object_score_logits=torch.tensor([[1.0 if PRESENT[place] else -1.0]]),
                is_mask_from_pts=bool(PROMPTED[place]),
            )
        wanted = stored[:, 0].float().numpy().reshape(GRID, GRID, -1)
        found = np.asarray(ours[place], np.float32)
        # Values that lie on the edge between two bfloat16 may fall to either side.
        assert np.mean(found != wanted) < 1e-3 and error(found, wanted) < 1e-3, place


def test_every_tensor_of_the_encoder_moves_the_memories_as_in_the_reference():
    found = inert_tensors(
        "sam2.1",
        ("memory_encoder.", "occlusion_spatial"),
        lambda params: [encoder("sam2.1")(params)],
        lambda model: [theirs(model, torch.float64)],
    )
    assert found == set()


def test_an_object_and_a_frame_keep_to_themselves():
    features, masks, *flags = given()
    swapped = encoder("sam2.1")(parameters("sam2.1"), (features[::-1], *(x[::-1, ::-1] for x in (masks, *flags))))
    assert error(swapped[::-1, ::-1], encoder("sam2.1")(parameters("sam2.1"))) <= 1e-6


def test_prompted_masks_are_all_or_nothing_and_others_probabilities():
    logits = jnp.array([[[[-3.0, 0.0, 5.0]]]])
    config = MemoryConfig()
    assert mask_signal(logits, jnp.array([[True]]), config).tolist() == [[[[-10.0, -10.0, 10.0]]]]
    assert np.allclose(mask_signal(logits, jnp.array([[False]]), config), 20 / (1 + np.exp(-logits)) - 10)


def pointer_inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(2)
    tokens = jnp.asarray(rng.standard_normal((2, 3, WIDTH)), jnp.float32)
    masks = jnp.asarray(rng.uniform(size=(2, 3, SIDE, SIDE)) < 0.5, jnp.float32)
    return tokens, jnp.array([[True, False, True], [True, True, False]]), masks


@cache
def pointers():
    """Our compiled pointers and small masks, from parameters."""
    config, (tokens, present, masks) = memory_config(), pointer_inputs()

    def run(params):
        pointer = ObjectPointer(config).apply({"params": params["object_pointer"]}, tokens, present)
        return [pointer, MaskDownsample(config).apply({"params": params["mask_downsample"]}, masks)]

    return jax.jit(run)


def test_every_tensor_of_the_pointers_moves_them_as_in_the_reference():
    tokens, present, masks = (torch.tensor(np.asarray(x)) for x in pointer_inputs())

    def reference_pointers(model):
        dtype = model.no_object_pointer.dtype
        there = present[..., None].to(dtype)
        with torch.no_grad():
            pointer = there * model.object_pointer_proj(tokens.to(dtype)) + (1 - there) * model.no_object_pointer
            small = model.mask_downsample(masks.to(dtype).reshape(6, 1, SIDE, SIDE))
        return [pointer, small.reshape(2, 3, SIDE // 4, SIDE // 4)]

    exact, narrow = reference_pointers(reference("sam2.1", True)), reference_pointers(reference("sam2.1"))
    for name, *values in zip(("pointers", "small masks"), pointers()(parameters("sam2.1")), exact, narrow, strict=True):
        ours, wanted, rounded = (np.asarray(x, np.float64) for x in values)
        assert shown(name, error(ours, wanted), error(rounded, wanted)) <= MODULE
    prefixes = ("no_object_pointer", "object_pointer_proj", "mask_downsample")
    assert inert_tensors("sam2.1", prefixes, pointers(), reference_pointers) == set()


def test_a_mask_prompt_is_the_frames_output():
    """As the reference's `_use_mask_as_output`: logits of -10 and 10, antialiased when made smaller."""
    masks = pointer_inputs()[2].at[1, 1].set(0)
    high, low, score = outputs_of_mask(masks)
    assert np.array_equal(high, np.where(np.asarray(masks) > 0, 10.0, -10.0))
    assert np.array_equal(score, [[10.0, 10.0, 10.0], [10.0, -10.0, 10.0]])
    small = torch.nn.functional.interpolate(
        torch.tensor(np.asarray(high), dtype=torch.float64), scale_factor=0.25, mode="bilinear", antialias=True
    )
    assert error(low, small) <= 1e-6


@pytest.mark.parametrize("release", ["sam2", "sam2.1"])
def test_released_sizes_have_the_shapes_of_the_release(release):
    config = HEADS_PRESETS[release].memory
    assert config is not None
    features = jax.ShapeDtypeStruct((1, 64, 64, 256), jnp.float32)
    masks = jax.ShapeDtypeStruct((1, 2, 1024, 1024), jnp.float32)
    flags = [jax.ShapeDtypeStruct((1, 2), bool)] * 2
    memory, params = jax.eval_shape(MemoryEncoder(config).init_with_output, jax.random.key(0), features, masks, *flags)
    assert memory.shape == (1, 2, 64, 64, 64)
    assert ("occlusion_spatial_embedding_parameter" in params["params"]) == (release == "sam2.1")


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="mask_stride 12: a power of 2"):
        MemoryConfig(mask_stride=12)
    features, masks = (jnp.asarray(x) for x in inputs())
    with pytest.raises(ValueError, match="masks of 64 x 128 for features of 8 x 8, stride 16"):
        flags = jnp.asarray(PRESENT), jnp.asarray(PROMPTED)
        MemoryEncoder(memory_config()).apply({"params": {}}, features, masks[:, :, :64], *flags)
