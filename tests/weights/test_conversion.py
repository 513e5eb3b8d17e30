"""To our format and back: the same bytes, everything checked first, hashes, damaged and foreign checkpoints."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import Qwen2_5_VLForConditionalGeneration

from tests.hosts.qwen25vl_reference import RELEASED_LAYOUT, TINY
from tests.weights.checkpoints import SIDE_FILES, assert_same_state, files_below, write_hugging_face
from tracevision_jax.errors import UserError
from tracevision_jax.weights import native, qwen25vl
from tracevision_jax.weights.conversion import check_places, check_space, to_hugging_face, to_native
from tracevision_jax.weights.engine import CheckpointMismatch, flatten
from tracevision_jax.weights.families import family_named, load_host, recognise

FAMILY = qwen25vl.FAMILY


@pytest.mark.parametrize("raw", [TINY, RELEASED_LAYOUT], ids=["untied", "tied"])
def test_to_our_format_and_back_is_bit_exact(tmp_path, raw):
    model = write_hugging_face(tmp_path / "in", raw, "bfloat16")
    to_native(tmp_path / "in", tmp_path / "ours", FAMILY).run(max_shard_bytes=200_000)
    to_hugging_face(tmp_path / "ours", tmp_path / "out", FAMILY).run(max_shard_bytes=200_000)
    again = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert_same_state(again.state_dict(), model.state_dict())
    for name, content in SIDE_FILES.items():
        for place in ("ours", "out"):
            assert (tmp_path / place / name).read_text() == content
    assert not (tmp_path / "out" / native.MANIFEST).exists()
    assert len(list((tmp_path / "ours").glob("tracevision-*-of-*.safetensors"))) > 1


def test_our_format_holds_parameters_under_their_paths(tmp_path):
    write_hugging_face(tmp_path / "in")
    to_native(tmp_path / "in", tmp_path / "ours", FAMILY).run()
    _, params = qwen25vl.load(tmp_path / "in")
    expected = flatten(params)
    with safe_open(tmp_path / "ours" / "tracevision.safetensors", "np") as file:
        assert set(file.keys()) == set(expected)
        for path, leaf in expected.items():
            np.testing.assert_array_equal(file.get_tensor(path), leaf)
    assert {path: leaf.shape for path, leaf in native.read_shapes(tmp_path / "ours").items()} == {
        path: leaf.shape for path, leaf in expected.items()
    }


@pytest.mark.parametrize("block", [1, 5000, 2**28])
def test_both_forms_load_to_the_same_host(tmp_path, monkeypatch, block):
    monkeypatch.setattr(native, "MAX_BLOCK_BYTES", block)
    write_hugging_face(tmp_path / "in")
    to_native(tmp_path / "in", tmp_path / "ours", FAMILY).run()
    assert recognise(tmp_path / "ours").native and not recognise(tmp_path / "in").native
    there, theirs = load_host(tmp_path / "in")
    here, ours = load_host(tmp_path / "ours")
    assert here == there
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    here, narrow = load_host(tmp_path / "ours", dtype="bfloat16")
    assert here.vision.param_dtype == "bfloat16"
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(narrow)} == {"bfloat16"}


def test_some_parameters_can_be_read_alone(tmp_path):
    write_hugging_face(tmp_path / "in")
    to_native(tmp_path / "in", tmp_path / "ours", FAMILY).run()
    wanted = ["vision/merger/fc2/bias", "language/embed/embedding"]
    _, params = native.load(tmp_path / "ours", paths=wanted)
    assert set(flatten(params)) == set(wanted)
    with pytest.raises(UserError, match="no parameter vision/typo"):
        native.load(tmp_path / "ours", paths=["vision/typo"])


def test_a_dtype_can_be_asked_for_in_both_directions(tmp_path):
    model = write_hugging_face(tmp_path / "in", dtype="float32")
    to_native(tmp_path / "in", tmp_path / "ours", FAMILY, "bfloat16").run()
    assert {str(leaf.dtype) for leaf in native.read_shapes(tmp_path / "ours").values()} == {"bfloat16"}
    to_hugging_face(tmp_path / "ours", tmp_path / "out", FAMILY, "float32").run()
    again = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "out")
    rounded = {name: tensor.bfloat16().float() for name, tensor in model.state_dict().items()}
    assert_same_state(again.state_dict(), rounded)
    assert again.dtype == torch.float32


def test_pytorch_files_convert_like_safetensors(tmp_path):
    model = write_hugging_face(tmp_path / "in", shard_size="10MB")
    (tmp_path / "in" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "in" / "pytorch_model.bin")
    to_native(tmp_path / "in", tmp_path / "ours", FAMILY).run()
    to_hugging_face(tmp_path / "ours", tmp_path / "out", FAMILY).run()
    again = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert_same_state(again.state_dict(), model.state_dict())


def test_a_flipped_byte_of_ours_is_found_before_anything_is_read(tmp_path):
    write_hugging_face(tmp_path / "in")
    to_native(tmp_path / "in", tmp_path / "ours", FAMILY).run()
    path = tmp_path / "ours" / "tracevision.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    for use in (load_host, lambda folder: to_hugging_face(folder, tmp_path / "out", FAMILY)):
        with pytest.raises(UserError, match=r"changed since they were written.*tracevision\.safetensors"):
            use(tmp_path / "ours")
    native.load(tmp_path / "ours", check_hashes=False)
    path.unlink()
    with pytest.raises(UserError, match="missing"):
        load_host(tmp_path / "ours")


def test_a_damaged_or_newer_manifest_is_refused(tmp_path):
    write_hugging_face(tmp_path / "in")
    to_native(tmp_path / "in", tmp_path / "ours", FAMILY).run()
    path = tmp_path / "ours" / native.MANIFEST
    good = json.loads(path.read_text())
    for change, message in (
        ({"format_version": 99}, "format version 99"),
        ({"family": "qwen2_5_v"}, "Did you mean 'qwen2_5_vl'"),
        ({"config": {}}, "vision: is missing"),
        ({"config": good["config"] | {"extra": 1}}, "extra"),
        ({"sha256": None}, "damaged"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(UserError, match=message):
            load_host(tmp_path / "ours")
    path.write_text("{")
    with pytest.raises(UserError, match="damaged"):
        load_host(tmp_path / "ours")


def test_a_configuration_that_asks_for_other_parameters_is_refused(tmp_path):
    write_hugging_face(tmp_path / "in")
    to_native(tmp_path / "in", tmp_path / "ours", FAMILY).run()
    path = tmp_path / "ours" / native.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["config"]["language"]["layers"] = 4
    manifest["config"]["language"]["tied"] = True
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointMismatch) as caught:
        load_host(tmp_path / "ours")
    assert caught.value.unexpected == ["language/head/kernel"] and len(caught.value.misshaped) == 12


def test_nothing_is_written_when_a_tensor_cannot_be_read_midway(tmp_path, monkeypatch):
    write_hugging_face(tmp_path / "in")
    conversion = to_native(tmp_path / "in", tmp_path / "ours", FAMILY)
    before = files_below(tmp_path)

    def stop(name: str, count: int) -> None:
        if name == "language/layers/mlp/up/kernel":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversion.run(progress=stop)
    assert files_below(tmp_path) == before


def test_places_that_would_destroy_the_source_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text("{}")
    for target in ("in", "in/below", "."):
        with pytest.raises(UserError, match=r"within each other|not empty|no checkpoint"):
            check_places(tmp_path / "in", tmp_path / target, overwrite=True)
    check_places(tmp_path / "in", tmp_path / "out", overwrite=False)
    with pytest.raises(UserError, match="no local directory"):
        check_places(tmp_path / "in", Path("gs://bucket/out"), overwrite=False)


def test_a_full_disk_is_noticed_before_writing(tmp_path):
    check_space(tmp_path / "x", 10)
    with pytest.raises(UserError, match="GB free"):
        check_space(tmp_path / "x" / "y", 10**18)


def test_unknown_families_are_refused_with_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'qwen2_5_vl'"):
        family_named("qwen2.5_vl")
