"""PyTorch files: read by name without running any code in them."""

import json
import pickle

import ml_dtypes
import numpy as np
import pytest
import torch

from tests.weights.checkpoints import Malicious
from tracevision_jax.errors import UserError
from tracevision_jax.weights.sources import DictSource, RenamedSource, open_torch_files, torch_files

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}


def test_tensors_of_every_kind_come_out_bit_for_bit(tmp_path):
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    source = open_torch_files(torch_files(tmp_path))
    np.testing.assert_array_equal(source.read("a"), STATE["a"].numpy())
    assert source.tensors["b"].dtype == ml_dtypes.bfloat16 and source.tensors["b"].shape == (2,)
    np.testing.assert_array_equal(source.read("b").astype(np.float32), [1.5, -2.0])


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_training_checkpoint_is_unwrapped(tmp_path, key):
    torch.save({key: STATE, "step": 3}, tmp_path / "last.pt")
    assert set(open_torch_files(torch_files(tmp_path)).tensors) == {"a", "b"}


def test_files_from_before_archives_are_read_too(tmp_path):
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    np.testing.assert_array_equal(open_torch_files([tmp_path / "old.pth"]).read("a"), STATE["a"].numpy())


def test_files_are_found_by_index_name_or_ending(tmp_path):
    for name in ("training_args.bin", "notes.txt", "x.pth", "y.pt"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in torch_files(tmp_path)] == ["x.pth", "y.pt"]
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert [path.name for path in torch_files(tmp_path)] == ["pytorch_model.bin"]
    index = {"weight_map": {"a": "p-2.bin", "b": "p-1.bin", "c": "p-1.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert [path.name for path in torch_files(tmp_path)] == ["p-1.bin", "p-2.bin"]
    with pytest.raises(UserError, match=r"p-1\.bin.*not there"):
        open_torch_files(torch_files(tmp_path))


def test_code_in_a_pickle_is_never_run(tmp_path):
    victim = tmp_path / "ran"
    with (tmp_path / "evil.pt").open("wb") as file:
        pickle.dump({"a": Malicious(victim)}, file)
    torch.save({"a": Malicious(victim)}, tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(UserError, match=rf"{name} is refused: .* would run code.*only tensors") as caught:
            open_torch_files([tmp_path / name])
        assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)
    assert not victim.exists()


def test_damaged_and_foreign_files_are_refused(tmp_path):
    torch.save(STATE, tmp_path / "good.pt")
    content = (tmp_path / "good.pt").read_bytes()
    cases = {"truncated.pt": content[: len(content) // 2], "empty.pt": b"", "text.pt": b"hello"}
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"a": "text"}, tmp_path / "value.pt")
    for name in (*cases, "list.pt", "value.pt"):
        with pytest.raises(UserError, match=name):
            open_torch_files([tmp_path / name])
    with pytest.raises(UserError, match="several files"):
        open_torch_files([tmp_path / "good.pt", tmp_path / "good.pt"])


def test_renaming_keeps_order_and_refuses_collisions():
    source = DictSource({"x.a": np.zeros(1), "x.b": np.ones(2)})
    renamed = RenamedSource(source, lambda name: name.removeprefix("x."))
    assert list(renamed.tensors) == ["a", "b"]
    np.testing.assert_array_equal(renamed.read("b"), np.ones(2))
    with pytest.raises(UserError, match=r"x\.a and x\.b"):
        RenamedSource(source, lambda name: "same")
