"""Qwen2.5-VL's weights: complete at all released sizes, bit exact both ways, and every fault refused."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.hosts.qwen25vl_reference import RELEASED_LAYOUT, TINY, reference_model
from tests.weights.checkpoints import SIDE_FILES, assert_same_state, write_hugging_face
from tests.weights.independent_mapping import expected_parameters
from tracevision_jax.errors import UserError
from tracevision_jax.hosts.qwen25vl import Qwen25VL, Qwen25VLConfig, preset
from tracevision_jax.weights import qwen25vl
from tracevision_jax.weights.engine import CheckpointMismatch, flatten
from tracevision_jax.weights.families import load_host


def shapes_of_modules(config: Qwen25VLConfig) -> dict[str, tuple[int, ...]]:
    """Path and shape of every parameter that the Flax modules make."""
    v = config.vision
    spec = {
        "tokens": ((1, 4), jnp.int32),
        "positions": ((1, 4, 3), jnp.int32),
        "segments": ((1, 4), jnp.int32),
        "patches": ((1, 1, 1, v.slots, v.patch_dim), jnp.float32),
        "grid": ((1, 1, 2), jnp.int32),
        "visual_index": ((1, 4), jnp.int32),
    }
    inputs = {name: jax.ShapeDtypeStruct(*entry) for name, entry in spec.items()}
    tree = jax.eval_shape(lambda inputs: Qwen25VL(config).init(jax.random.key(0), **inputs), inputs)
    return {path: leaf.shape for path, leaf in flatten(tree["params"]).items()}


def shapes_of_reference(config: Qwen25VLConfig) -> dict[str, tuple[int, ...]]:
    """Name on disk and shape of every tensor of transformers' model, built on the meta device."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config.to_hf()))
    parameters = model.named_parameters()  # a tied head is listed once, under the embedding's name
    return {qwen25vl.canonical_name(name): tuple(value.shape) for name, value in parameters}


@pytest.mark.parametrize("size", ["3b", "7b", "32b", "72b"])
def test_a_released_size_maps_completely_in_both_worlds(size):
    config = preset(size)
    table = qwen25vl.table(config)
    assert table.flax_shapes == shapes_of_modules(config)
    assert table.torch_shapes == shapes_of_reference(config)
    assert ("lm_head.weight" in table.torch_shapes) == (size != "3b")


@pytest.mark.parametrize("size", ["3b", "7b"])
def test_a_released_size_with_added_tokens_maps_completely(size):
    config = preset(size)
    config = replace(config, language=replace(config.language, added_tokens=1009, first_added=151665))
    made = shapes_of_modules(config)
    if config.language.tied:
        made["language/head/kernel"] = made["language/embed/embedding"][::-1]
    table = qwen25vl.table(replace(config, language=replace(config.language, tied=False)))
    assert table.flax_shapes == made
    assert table.torch_shapes == shapes_of_reference(config)
    assert table.torch_shapes["lm_head.weight"] == (152674, config.language.width)


@pytest.mark.parametrize(
    ("raw", "dtype"),
    [(TINY, "float32"), (TINY, "bfloat16"), (TINY, "float16"), (RELEASED_LAYOUT, "bfloat16")],
    ids=["float32", "bfloat16", "float16", "tied"],
)
def test_pytorch_to_flax_to_pytorch_is_bit_exact(tmp_path, raw, dtype):
    model = write_hugging_face(tmp_path / "in", raw, dtype)
    config, params = qwen25vl.load(tmp_path / "in")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {dtype}
    assert config.language.param_dtype == config.vision.dtype == dtype
    qwen25vl.save(tmp_path / "out", params, config, side_files=tmp_path / "in", max_shard_bytes=200_000)
    again = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert_same_state(again.state_dict(), model.state_dict())
    theirs, ours = model.config.to_dict(), again.config.to_dict()
    for part in (theirs, theirs["text_config"], theirs["vision_config"]):
        part.pop("dtype", None), part.pop("_name_or_path", None)
    for part in (ours, ours["text_config"], ours["vision_config"]):
        part.pop("dtype", None), part.pop("_name_or_path", None)
    assert ours == theirs


def test_parameters_stand_where_an_independent_mapping_puts_them(tmp_path):
    model = write_hugging_face(tmp_path / "in", RELEASED_LAYOUT)
    config, params = qwen25vl.load(tmp_path / "in")
    state = {qwen25vl.canonical_name(name): value.numpy() for name, value in model.state_dict().items()}
    expected = flatten(expected_parameters(state, config))
    found = flatten(params)
    assert set(found) == set(expected)
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def test_names_on_disk_and_in_memory_give_the_same_parameters(tmp_path):
    model = write_hugging_face(tmp_path / "in")
    config, from_disk = qwen25vl.load(tmp_path / "in")
    in_memory = model.state_dict()
    assert any(name.startswith("model.visual.") for name in in_memory)
    jax.tree.map(np.testing.assert_array_equal, qwen25vl.from_torch(in_memory, config), from_disk)
    with pytest.raises(UserError, match="twice"):
        both = in_memory | {"visual.patch_embed.proj.weight": torch.zeros(48, 3, 2, 8, 8)}
        qwen25vl.from_torch(both, config)


def test_parameters_do_not_share_memory_with_the_state_dictionary(tmp_path):
    model = reference_model(TINY)
    config = Qwen25VLConfig.from_hf(TINY)
    params = qwen25vl.from_torch(model.state_dict(), config)
    before = np.array(params["vision"]["merger"]["fc2"]["bias"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    np.testing.assert_array_equal(params["vision"]["merger"]["fc2"]["bias"], before)
    assert before.any()


def test_arrays_come_back_under_the_names_of_the_files(tmp_path):
    write_hugging_face(tmp_path / "in", dtype="bfloat16", shard_size="10MB")
    config, params = qwen25vl.load(tmp_path / "in")
    stored = load_file(tmp_path / "in" / "model.safetensors")
    back = dict(qwen25vl.to_torch_names(params, config))
    assert set(back) == set(stored)
    for name, array in back.items():
        np.testing.assert_array_equal(array.view(np.int16), stored[name].view(torch.int16).numpy())


def test_a_dtype_can_be_asked_for(tmp_path):
    write_hugging_face(tmp_path / "in", dtype="float32")
    _, wide = qwen25vl.load(tmp_path / "in")
    config, narrow = qwen25vl.load(tmp_path / "in", dtype="bfloat16")
    assert config.language.dtype == "bfloat16"
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a.astype(jnp.bfloat16)), b), wide, narrow)
    qwen25vl.save(tmp_path / "out", narrow, config, dtype="float32")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("first", [270, 300])
def test_added_tokens_become_rows_of_the_vocabulary(tmp_path, tied, first):
    raw = (RELEASED_LAYOUT if tied else TINY) | {"tie_word_embeddings": tied}
    model = write_hugging_face(tmp_path / "in", raw)
    config, params = qwen25vl.load(tmp_path / "in")
    rng = np.random.default_rng(0)
    added = {name: rng.standard_normal((11, 64)).astype(np.float32) for name in ("embedding", "head")}
    params["language"]["added"] = {name: jnp.asarray(rows) for name, rows in added.items()}
    config = replace(config, language=replace(config.language, added_tokens=11, first_added=first))
    qwen25vl.save(tmp_path / "out", params, config, side_files=tmp_path / "in")
    again = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "out")
    rows = max(300, first + 11)
    assert again.config.tie_word_embeddings is False
    embedding, head = again.get_input_embeddings().weight, again.lm_head.weight
    base = model.get_input_embeddings().weight, model.lm_head.weight
    for found, old, new in zip((embedding, head), base, (added["embedding"], added["head"]), strict=True):
        found, old = found.detach().numpy(), old.detach().numpy()
        assert found.shape == (rows, 64)
        np.testing.assert_array_equal(found[:first], old[:first])
        np.testing.assert_array_equal(found[first : first + 11], new)
        np.testing.assert_array_equal(found[first + 11 :], old[first + 11 :])


def test_exported_added_tokens_can_be_read_into_their_own_parameters_again(tmp_path):
    write_hugging_face(tmp_path / "in")
    config, params = qwen25vl.load(tmp_path / "in")
    params["language"]["added"] = {"embedding": jnp.ones((5, 64)), "head": jnp.full((5, 64), 2.0)}
    config = replace(config, language=replace(config.language, added_tokens=5, first_added=290))
    state = dict(qwen25vl.to_torch_names(params, config))
    again = qwen25vl.from_torch(state, config)
    np.testing.assert_array_equal(again["language"]["added"]["head"], params["language"]["added"]["head"])
    embedding = np.array(params["language"]["embed"]["embedding"])
    embedding[290:295] = 0  # nobody reads these rows
    np.testing.assert_array_equal(again["language"]["embed"]["embedding"], embedding)


def test_every_fault_of_a_checkpoint_is_named_at_once(tmp_path):
    write_hugging_face(tmp_path / "in", shard_size="10MB")
    file = tmp_path / "in" / "model.safetensors"
    state = load_file(file)
    del state["visual.blocks.2.attn.qkv.weight"], state["model.norm.weight"]
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(5, 6)
    state["model.layers.3.mlp.up_proj.weight"] = torch.zeros(2)
    save_file(state, file)
    with pytest.raises(CheckpointMismatch) as caught:
        qwen25vl.load(tmp_path / "in")
    assert caught.value.missing == ["model.norm.weight", "visual.blocks.2.attn.qkv.weight"]
    assert caught.value.unexpected == ["model.layers.3.mlp.up_proj.weight"]
    assert caught.value.misshaped == ["model.layers.1.mlp.up_proj.weight: [5, 6], expected [112, 64]"]


def test_a_tied_head_may_be_stored_only_with_the_same_values(tmp_path):
    model = reference_model(RELEASED_LAYOUT)
    config = Qwen25VLConfig.from_hf(RELEASED_LAYOUT)
    state = dict(model.state_dict())
    assert "lm_head.weight" in state
    assert "head" not in qwen25vl.from_torch(state, config)["language"]
    with pytest.raises(UserError, match="tie_word_embeddings"):
        qwen25vl.from_torch(state | {"lm_head.weight": state["lm_head.weight"] + 1}, config)


def test_mixed_dtypes_within_a_parameter_are_refused_unless_one_is_asked_for(tmp_path):
    model = reference_model(TINY)
    config = Qwen25VLConfig.from_hf(TINY)
    state = dict(model.state_dict())
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    state[name] = state[name].half()
    with pytest.raises(UserError, match=r"mixes dtypes.*language/layers/mlp/up/kernel \(float16, float32\)"):
        qwen25vl.from_torch(state, config)


def test_parameters_of_another_configuration_are_not_written(tmp_path):
    write_hugging_face(tmp_path / "in")
    config, params = qwen25vl.load(tmp_path / "in")
    del params["vision"]["merger"]["norm"]
    with pytest.raises(CheckpointMismatch, match="vision/merger/norm/scale"):
        qwen25vl.save(tmp_path / "out", params, config)
    assert not (tmp_path / "out").exists()


def test_side_files_are_copied_and_configurations_written(tmp_path):
    write_hugging_face(tmp_path / "in")
    config, params = qwen25vl.load(tmp_path / "in")
    (tmp_path / "in" / "optimizer.pt").write_bytes(b"x")
    qwen25vl.save(tmp_path / "out", params, config, side_files=tmp_path / "in")
    for name, content in SIDE_FILES.items():
        assert (tmp_path / "out" / name).read_text() == content
    assert not (tmp_path / "out" / "optimizer.pt").exists()
    qwen25vl.save(tmp_path / "bare", params, config)
    assert {path.name for path in (tmp_path / "bare").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert load_host(tmp_path / "bare")[0] == config
    generation = json.loads((tmp_path / "bare" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == list(config.end_tokens)


def test_quantised_and_impossible_checkpoints_are_refused(tmp_path):
    write_hugging_face(tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    good = json.loads(path.read_text())
    for change, message in (
        ({"quantization_config": {"quant_method": "awq"}}, "quantised .awq"),
        ({"text_config": good["text_config"] | {"num_key_value_heads": 3}}, "impossible"),
        ({"model_type": "llava"}, "llava"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(UserError, match=message):
            load_host(tmp_path / "in")
    path.write_text("{")
    with pytest.raises(UserError, match="no JSON"):
        load_host(tmp_path / "in")
    path.unlink()
    with pytest.raises(UserError, match=r"tracevision\.json"):
        load_host(tmp_path / "in")
