"""Our reader and writer of safetensors against the library, and damaged files."""

import json
import struct
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from tracevision_jax.errors import UserError
from tracevision_jax.weights.hashes import sha256
from tracevision_jax.weights.safetensors_io import (
    DTYPES,
    SafetensorsSource,
    TensorPlan,
    check_index,
    find_safetensors,
    write_sharded,
)

TENSORS = {
    "b": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "a": np.arange(6, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(3, 2),
    "scalar": np.array(7.0, np.float32),
    "empty": np.zeros((0, 3), np.int64),
    "flags": np.array([True, False]),
}


def plans(tensors: dict[str, np.ndarray]) -> list[TensorPlan]:
    return [
        TensorPlan(name, tensor.shape, tensor.dtype, lambda tensor=tensor: iter([tensor]))
        for name, tensor in tensors.items()
    ]


def test_the_library_reads_what_we_write(tmp_path):
    written = write_sharded(tmp_path, "model", plans(TENSORS), 10**9)
    assert [file.name for file in written] == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert set(file.keys()) == set(TENSORS)
        for name, tensor in TENSORS.items():
            np.testing.assert_array_equal(file.get_tensor(name), tensor)
            assert file.get_tensor(name).dtype == tensor.dtype
        assert file.metadata() == {"format": "pt"}
    assert written[0].sha256 == sha256(tmp_path / "model.safetensors")
    assert written[0].bytes == (tmp_path / "model.safetensors").stat().st_size


def test_we_read_what_the_library_writes(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    source = SafetensorsSource([tmp_path / "x.safetensors"])
    assert set(source.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(source.read(name), tensor)
        assert source.read(name).dtype == tensor.dtype == source.tensors[name].dtype
        assert source.tensors[name].bytes == tensor.nbytes


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_survives_bit_for_bit(tmp_path, dtype):
    bits = np.arange(256, dtype=np.uint8).repeat(8) if dtype != np.bool_ else np.array([0, 1] * 8, np.uint8)
    tensor = bits.view(dtype)
    write_sharded(tmp_path, "x", plans({"t": tensor}), 10**9)
    back = SafetensorsSource([tmp_path / "x.safetensors"]).read("t")
    np.testing.assert_array_equal(back.view(np.uint8), bits)


def test_any_block_of_a_tensor_can_be_read(tmp_path, rng):
    tensor = rng.standard_normal((3, 4, 5, 2)).astype(np.float32)
    save_file({"t": tensor}, tmp_path / "x.safetensors")
    source = SafetensorsSource([tmp_path / "x.safetensors"])
    for start, shape in [
        ((0, 0, 0, 0), (3, 4, 5, 2)),
        ((1, 0, 0, 0), (2, 4, 5, 2)),
        ((2, 3, 0, 0), (1, 1, 5, 2)),
        ((2, 1, 0, 0), (1, 2, 5, 2)),
        ((0, 1, 2, 1), (3, 2, 2, 1)),
        ((1, 2, 3, 1), (1, 1, 1, 1)),
        ((1, 0, 2, 0), (1, 4, 2, 2)),
    ]:
        block = tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
        np.testing.assert_array_equal(source.read_block("t", start, shape), tensor[block])


def test_shards_are_filled_to_the_limit_and_no_tensor_is_split(tmp_path):
    lengths = {"t10": 10, "t15": 15, "t60": 60, "t5": 5, "u": 20, "v": 1}
    tensors = {name: np.full(length, length, np.float32) for name, length in lengths.items()}
    written = write_sharded(tmp_path, "model", plans(tensors), 100)
    assert [file.name for file in written] == [f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    assert [file.tensors for file in written] == [("t10", "t15"), ("t60",), ("t5", "u"), ("v",)]
    source = SafetensorsSource([tmp_path / file.name for file in written])
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(source.read(name), tensor)


def test_a_tensor_may_come_in_pieces(tmp_path):
    whole = np.arange(12, dtype=np.float32).reshape(3, 4)
    told = []
    plan = TensorPlan("t", (3, 4), whole.dtype, lambda: iter(whole))
    write_sharded(tmp_path, "x", [plan], 10**9, lambda name, count: told.append((name, count)))
    np.testing.assert_array_equal(SafetensorsSource([tmp_path / "x.safetensors"]).read("t"), whole)
    assert told == [("t", 16)] * 3


def test_a_writer_that_gives_other_bytes_than_announced_is_stopped(tmp_path):
    for pieces in ([np.zeros(3, np.float32)], [np.zeros(4, np.float64)]):
        plan = TensorPlan("t", (4,), np.dtype(np.float32), lambda pieces=pieces: iter(pieces))
        with pytest.raises(ValueError, match="announced"):
            write_sharded(tmp_path, "x", [plan], 10**9)


def damaged(content: bytes, kind: str) -> bytes:
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    data = content[8 + struct.unpack("<Q", content[:8])[0] :]

    def with_header(change) -> bytes:
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data

    return {
        "truncated": lambda: content[:-1],
        "no data": lambda: content[: -len(data)],
        "half a header": lambda: content[:20],
        "empty": lambda: b"",
        "too long": lambda: content + b"\0",
        "header length": lambda: struct.pack("<Q", 2**60) + content[8:],
        "no json": lambda: content[:8] + b"\xff" * (len(content) - 8),
        "a list": lambda: struct.pack("<Q", 2) + b"[]",
        "dtype": lambda: with_header(lambda h: h["b"].update(dtype="F4")),
        "shape": lambda: with_header(lambda h: h["b"].update(shape=[2, 3, 5])),
        "negative": lambda: with_header(lambda h: h["b"].update(shape=[-2, -3, 4])),
        "offsets": lambda: with_header(lambda h: h["b"].update(data_offsets=[4, 100])),
        "entry": lambda: with_header(lambda h: h.update(b=3)),
        "git lfs": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n",
    }[kind]()


@pytest.mark.parametrize(
    "kind",
    [
        "truncated", "no data", "half a header", "empty", "too long", "header length", "no json", "a list",
        "dtype", "shape", "negative", "offsets", "entry", "git lfs",
    ],
)  # fmt: skip
def test_damaged_files_are_found_before_anything_is_read(tmp_path, kind):
    save_file({"b": TENSORS["b"]}, tmp_path / "good.safetensors")
    content = (tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "bad.safetensors").write_bytes(damaged(content, kind))
    with pytest.raises(UserError, match=r"bad\.safetensors"):
        SafetensorsSource([tmp_path / "bad.safetensors"])


def test_all_damaged_files_are_named_at_once(tmp_path):
    for name in ("one", "two", "three"):
        save_file({name: TENSORS["b"]}, tmp_path / f"{name}.safetensors")
    for name in ("one", "three"):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError) as caught:
        SafetensorsSource(find_safetensors(tmp_path))
    assert "one.safetensors" in str(caught.value) and "three.safetensors" in str(caught.value)
    assert "two.safetensors" not in str(caught.value)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for name in ("one", "two"):
        save_file({"t": TENSORS["b"]}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"one\.safetensors, too"):
        SafetensorsSource(find_safetensors(tmp_path))


def test_the_index_must_agree_with_the_files(tmp_path):
    save_file({"t": TENSORS["b"]}, tmp_path / "m-00001-of-00002.safetensors")
    save_file({"u": TENSORS["b"]}, tmp_path / "m-00002-of-00002.safetensors")
    with pytest.raises(UserError, match="without its index"):
        find_safetensors(tmp_path)
    index = tmp_path / "m.safetensors.index.json"
    files = {"t": "m-00001-of-00002.safetensors", "u": "m-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": files}))
    check_index(tmp_path, SafetensorsSource(find_safetensors(tmp_path)))
    index.write_text(json.dumps({"weight_map": {**files, "u": files["t"], "v": files["t"]}}))
    with pytest.raises(UserError, match=r"(?s)u \(in m-00001.*v \(in m-00001"):
        check_index(tmp_path, SafetensorsSource([tmp_path / name for name in sorted(set(files.values()))]))
    index.write_text(json.dumps({"weight_map": {**files, "w": "absent.safetensors"}}))
    with pytest.raises(UserError, match=r"absent\.safetensors"):
        find_safetensors(tmp_path)
    index.write_text("{")
    with pytest.raises(UserError, match="damaged"):
        find_safetensors(tmp_path)


@given(data=st.data())
def test_any_damage_to_the_header_is_refused_or_harmless(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        save_file({"a": np.arange(4, dtype=np.float32), "b": np.zeros((2, 3), np.int32)}, path)
        content = bytearray(path.read_bytes())
        header = 8 + struct.unpack("<Q", content[:8])[0]
        for place in data.draw(st.lists(st.integers(0, header - 1), min_size=1, max_size=4)):
            content[place] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
        try:
            source = SafetensorsSource([path])
        except UserError as error:
            assert "x.safetensors" in str(error)
            return
        for name, info in source.tensors.items():
            assert source.read(name).nbytes == info.bytes
