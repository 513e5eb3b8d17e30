"""Sine positions equal those of the reference's neck and memory encoder."""

import numpy as np
import pytest
import torch
from transformers.models.sam2.modeling_sam2 import Sam2SinePositionEmbedding

from tracevision_jax.ops.sine_position import sine_position


@pytest.mark.parametrize(("height", "width", "channels"), [(64, 64, 256), (64, 64, 64), (5, 9, 24)])
def test_positions_equal_the_references(height, width, channels):
    module = Sam2SinePositionEmbedding(channels // 2, normalize=True)
    theirs = module((1, channels, height, width), "cpu", torch.float64)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(sine_position(height, width, channels), theirs, atol=2e-6)


def test_channels_that_do_not_split_into_sines_and_cosines_of_both_axes_are_refused():
    with pytest.raises(ValueError, match="multiple of 4"):
        sine_position(4, 4, 6)
