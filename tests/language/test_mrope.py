"""Multimodal rotary positions against those of the reference, and what they refuse."""

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from tests.hosts.qwen25vl_reference import TINY, make_prompt, random_visual
from tracevision_jax.hosts.qwen25vl import Qwen25VLConfig
from tracevision_jax.language.mrope import VisualSpan, mrope_positions

CONFIG = Qwen25VLConfig.from_hf(TINY)


def positions_of(prompt):
    """Ours for a prompt of the reference tests."""
    return mrope_positions(prompt.tokens, prompt.spans, CONFIG.visual_tokens, 2, CONFIG.tokens_per_second)


@pytest.mark.parametrize("seconds", [0.3, 0.5, 1.0, 1.7, 3.333])
@pytest.mark.parametrize("text", [1, 7])
def test_positions_and_offset_equal_the_reference(rng, seconds, text):
    with torch.device("meta"):
        reference = Qwen2_5_VLModel(Qwen2_5_VLConfig(**TINY))
    visuals = [
        random_visual(rng, CONFIG, 1, 6, 10),
        random_visual(rng, CONFIG, 5, 4, 8, seconds),
        random_visual(rng, CONFIG, 1, 2, 4),
        random_visual(rng, CONFIG, 2, 6, 2, 2 * seconds),
    ]
    prompt = make_prompt(rng, CONFIG, visuals, text)
    arguments = prompt.for_reference()
    wanted = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    expected, delta = reference.get_rope_index(**{name: arguments[name] for name in wanted})
    ours, offset = positions_of(prompt)
    np.testing.assert_array_equal(ours, expected[:, 0].T.numpy())
    assert offset == int(delta)


def test_text_alone_counts_up():
    positions, offset = mrope_positions(np.array([5, 6, 7]), [], (290, 291), 2, 2)
    np.testing.assert_array_equal(positions, [[0] * 3, [1] * 3, [2] * 3])
    assert offset == 0


def test_images_without_text_between_them_are_told_apart():
    spans = [VisualSpan(1, 4, 4), VisualSpan(1, 2, 4)]
    positions, _ = mrope_positions(np.array([290] * 6), spans, (290, 291), 2, 2)
    np.testing.assert_array_equal(positions[4:], [[2, 2, 2], [2, 2, 3]])


def test_pad_tokens_that_do_not_fit_the_images_are_refused():
    with pytest.raises(ValueError, match="3 visual tokens, its images and videos need 4"):
        mrope_positions(np.array([290] * 3), [VisualSpan(1, 4, 4)], (290, 291), 2, 2)
    with pytest.raises(ValueError, match="interrupted"):
        mrope_positions(np.array([290, 1, 290, 290, 290]), [VisualSpan(1, 4, 4)], (290, 291), 2, 2)
