"""config.json of Qwen2.5-VL: read, written, refused."""

from dataclasses import replace

import pytest
from transformers import Qwen2_5_VLConfig

from tests.hosts.qwen25vl_reference import RELEASED_LAYOUT, TINY
from tracevision_jax.errors import UserError
from tracevision_jax.hosts.qwen25vl import Qwen25VLConfig, preset


@pytest.mark.parametrize("raw", [TINY, RELEASED_LAYOUT])
def test_what_is_written_is_read_back(raw):
    config = Qwen25VLConfig.from_hf(raw)
    assert Qwen25VLConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("size", ["3b", "7b", "32b", "72b"])
def test_transformers_reads_what_is_written_of_each_released_size(size):
    config = preset(size)
    theirs = Qwen2_5_VLConfig(**config.to_hf())
    assert Qwen25VLConfig.from_hf(theirs.to_dict()) == config
    assert theirs.text_config.num_key_value_heads == config.language.kv_heads
    assert theirs.vision_config.fullatt_block_indexes == [7, 15, 23, 31]
    assert theirs.tie_word_embeddings == (size == "3b")


def test_the_form_with_a_text_config_is_read_as_the_flat_one():
    nested = Qwen2_5_VLConfig(**TINY).to_dict()
    assert "text_config" in nested and "hidden_size" not in nested
    assert Qwen25VLConfig.from_hf(nested) == Qwen25VLConfig.from_hf(TINY)


def test_added_tokens_are_written_as_rows_of_an_untied_vocabulary():
    config = preset("3b")
    config = replace(config, language=replace(config.language, added_tokens=1009, first_added=151665))
    written = config.to_hf()
    assert written["vocab_size"] == 151665 + 1009
    assert written["tie_word_embeddings"] is False


def test_a_config_that_cannot_be_read_is_refused_with_every_reason_at_once():
    tower = {key: value for key, value in TINY["vision_config"].items() if key != "patch_size"}
    raw = {key: value for key, value in TINY.items() if key != "hidden_size"}
    raw |= {"model_type": "qwen2_vl", "use_sliding_window": True, "hidden_act": "gelu"}
    raw["vision_config"] = {**tower, "fullatt_block_indexes": [0, 3]}
    with pytest.raises(UserError) as caught:
        Qwen25VLConfig.from_hf(raw)
    for reason in (
        "'hidden_size' is missing",
        "'vision_config.patch_size' is missing",
        "model_type is 'qwen2_vl'",
        "use_sliding_window",
        "hidden_act is 'gelu'",
        "full attention in blocks [0, 3] of 4",
    ):
        assert reason in str(caught.value)


def test_a_wrong_size_name_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"no Qwen2\.5-VL of size '7B'.*3b, 7b, 32b, 72b"):
        preset("7B")


def test_precision_changes_computation_and_leaves_parameters():
    config = preset("7b").with_precision("bfloat16", remat="dots")
    assert {config.vision.dtype, config.language.dtype} == {"bfloat16"}
    assert {config.vision.param_dtype, config.language.param_dtype} == {"float32"}
    assert {config.vision.remat, config.language.remat} == {"dots"}


def test_parts_that_do_not_fit_together_are_refused():
    config = preset("7b")
    with pytest.raises(ValueError, match="vision gives width 3584, language takes 2048"):
        replace(config, language=preset("3b").language)
    with pytest.raises(ValueError, match="mrope_sections"):
        replace(config.language, head_dim=64)
    with pytest.raises(ValueError, match="multiple of 4"):
        replace(config.vision, heads=40, width=1200)
