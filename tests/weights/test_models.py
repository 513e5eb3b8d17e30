"""Hosts where models are expected, and trained models where a host is wanted."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.hosts.qwen25vl_reference import RELEASED_LAYOUT
from tests.weights.checkpoints import write_hugging_face
from tracevision_jax.errors import UserError
from tracevision_jax.systems.config_json import to_json
from tracevision_jax.systems.tracevision import tracevision_config
from tracevision_jax.vision.preprocess import VisionInputConfig
from tracevision_jax.weights import model_directory, qwen25vl
from tracevision_jax.weights.conversion import model_to_pytorch, to_native
from tracevision_jax.weights.engine import flatten
from tracevision_jax.weights.families import load_host

ADDED = 9


def write_tokenizer(folder) -> None:
    """A tokenizer of a few words, as `transformers` saves one."""
    words = ["[UNK]", "two", "pictures", "the", "video", "and", "where", "it", "happens"]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)


def write_model(folder, host, params) -> None:
    """A trained model of which only the host and one other parameter are there, with its tokenizer's folder."""
    vision = VisionInputConfig(min_pixels=2048, max_pixels=16_000, video_min_pixels=2048, video_max_pixels=8_000)
    system = tracevision_config(host, 300, processor={"coordinates": "digits", "vision": vision})
    assert system.host.language.added_tokens == ADDED
    model_directory.save_model(
        folder,
        {"system": "tracevision", "model": to_json(system)},
        {"host": params, "tvp": {"scale": jnp.zeros(3)}},
        {"tokenizer": write_tokenizer},
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a trained model, its host's configuration and parameters."""
    folder = tmp_path_factory.mktemp("trained")
    write_hugging_face(folder / "released", RELEASED_LAYOUT)
    config, params = qwen25vl.load(folder / "released")
    rng = np.random.default_rng(0)
    added = {name: jnp.asarray(rng.standard_normal((ADDED, 64)), jnp.float32) for name in ("embedding", "head")}
    params["language"]["added"] = added
    write_model(folder / "model", config, params)
    return folder, config, params


@pytest.mark.parametrize("form", ["hugging_face", "native"])
def test_a_host_is_read_like_a_model_directory(tmp_path, form):
    write_hugging_face(tmp_path / "hugging_face")
    to_native(tmp_path / "hugging_face", tmp_path / "native", qwen25vl.FAMILY).run()
    expected = flatten(load_host(tmp_path / "hugging_face")[1])
    shapes = model_directory.read_shapes(tmp_path / form)
    assert {path: leaf.shape for path, leaf in shapes.items()} == {path: leaf.shape for path, leaf in expected.items()}
    wanted = ["language/layers/mlp/up/kernel", "vision/merger/norm/scale"]
    places = []

    def place(path, shape):
        places.append((path, shape))
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])

    _, params = model_directory.load_model(tmp_path / form, place, wanted)
    assert sorted(places) == [(path, expected[path].shape) for path in wanted]
    assert sorted(flatten(params)) == wanted
    for path in wanted:
        np.testing.assert_array_equal(flatten(params)[path], expected[path])
    with pytest.raises(UserError, match="no parameter vision/typo"):
        model_directory.load_model(tmp_path / form, paths=["vision/typo"])


def test_the_host_of_a_trained_model_becomes_a_hugging_face_directory(trained, tmp_path):
    folder, config, params = trained
    model_to_pytorch(folder / "model", tmp_path / "out").run()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "out")
    language = replace(config.language, added_tokens=ADDED, first_added=300)
    state = dict(qwen25vl.to_torch_names(params, replace(config, language=language)))
    found = {qwen25vl.canonical_name(name): value.numpy() for name, value in model.state_dict().items()}
    assert set(found) == set(state)
    for name, array in state.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert found["lm_head.weight"].shape == (300 + ADDED, 64)
    np.testing.assert_array_equal(found["lm_head.weight"][300:], params["language"]["added"]["head"])
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the video")["input_ids"] == [3, 4]
    processor = Qwen2VLImageProcessorPil.from_pretrained(tmp_path / "out")
    assert (processor.patch_size, dict(processor.size)) == (4, {"shortest_edge": 2048, "longest_edge": 16_000})


def test_damaged_models_and_other_systems_are_refused(trained, tmp_path):
    folder, config, _ = trained
    file = folder / "model" / "tokenizer" / "tokenizer.json"
    content = file.read_text()
    file.write_text(content + " ")
    with pytest.raises(UserError, match=r"(?s)damaged.*tokenizer\.json"):
        model_to_pytorch(folder / "model", tmp_path / "out")
    file.write_text(content)
    model_directory.save_model(tmp_path / "other", {"system": "sjtu"}, {"x": jnp.zeros(1)})
    with pytest.raises(UserError, match="'sjtu'"):
        model_to_pytorch(tmp_path / "other", tmp_path / "out")
    content = {"system": "tracevision", "model": to_json(tracevision_config(config, 300))}
    model_directory.save_model(tmp_path / "empty", content, {"host": {"x": jnp.zeros(1)}})
    with pytest.raises(UserError, match="does not fit its configuration"):
        model_to_pytorch(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()
