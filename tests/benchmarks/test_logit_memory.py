"""The loss over a large vocabulary is really run, and its memory measured."""

from pathlib import Path

import pytest

from benchmarks.logit_memory import executed
from tracevision_jax.language.config import LanguageConfig

TOKENS, VOCABULARY = 1024, 32_768
LOGITS = 4 * TOKENS * VOCABULARY
"""Bytes of all of them in float32."""


def test_a_process_that_chunks_the_loss_never_has_all_logits():
    """Measured: the growth of this process's resident memory while loss and gradients are computed."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of resident memory can be reset and read on Linux only (/proc/self/clear_refs)")
    config = LanguageConfig(VOCABULARY, 16, 1, 2, 1, 8, 32, mrope_sections=(2, 1, 1), added_tokens=64, first_added=100)
    chunked, whole = (executed(config, TOKENS, chunk)["peak"] for chunk in (64, 0))
    print(f"chunked {chunked / 2**20:.0f} MiB, whole {whole / 2**20:.0f} MiB, logits {LOGITS / 2**20:.0f} MiB")
    assert whole > 2 * LOGITS  # themselves and their gradient
    assert chunked < LOGITS / 2
