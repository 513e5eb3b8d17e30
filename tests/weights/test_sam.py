"""Segment Anything's weights: complete at all released sizes, bit exact in both layouts, and every fault refused."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from tests.weights.checkpoints import Malicious, assert_same_state, files_below
from tests.weights.sam_checkpoints import (
    CLASSES,
    drawn,
    original_state,
    reference,
    tiny,
    write_hugging_face,
    write_original,
)
from tracevision_jax.errors import UserError
from tracevision_jax.hosts.sam import SegmentAnything, init_params
from tracevision_jax.hosts.sam_presets import SAM_PRESETS
from tracevision_jax.weights import sam
from tracevision_jax.weights.conversion import to_hugging_face, to_native, to_original
from tracevision_jax.weights.engine import CheckpointMismatch, flatten
from tracevision_jax.weights.families import load_host, read_host_shapes, recognise
from tracevision_jax.weights.hugging_face import exported
from tracevision_jax.weights.sam_config import config_from_json, config_to_json, read_config
from tracevision_jax.weights.sam_config_export import model_type, write_config
from tracevision_jax.weights.sources import DictSource

KINDS = [("sam", True), ("sam2", True), ("sam2.1", True), ("sam2.1", False)]
"""(release, whether it has memory); SAM has none in any case."""
NAMES = ["sam", "sam2", "sam2.1", "sam2.1 for pictures"]
ORIGINALS = ["sam", "sam2", "sam2.1"]
OURS = ("tracevision.json", "tracevision.safetensors")
every_kind = pytest.mark.parametrize(("release", "memory"), KINDS, ids=NAMES)

COUNTS = {
    "sam_vit_h": (641_090_608, 594, 595),
    "sam2_hiera_tiny": (38_945_986, 468, 466),
    "sam2_hiera_small": (46_043_842, 516, 514),
    "sam2_hiera_base_plus": (80_833_666, 612, 610),
    "sam2_hiera_large": (224_430_130, 900, 898),
    "sam2.1_hiera_tiny": (38_962_498, 471, 469),
    "sam2.1_hiera_small": (46_060_354, 519, 517),
    "sam2.1_hiera_base_plus": (80_850_178, 615, 613),
    "sam2.1_hiera_large": (224_446_642, 903, 901),
}
"""Published: parameters, tensors of the authors' file, tensors in `transformers`."""
FOURIER_SIZE = 256
"""Of the matrix of the point codes, a buffer of the original."""


def shapes_of(state) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


@pytest.mark.parametrize("name", SAM_PRESETS)
def test_a_released_size_maps_completely_in_all_worlds(name):
    config = SAM_PRESETS[name]
    table, original = sam.table(config), sam.original_table(config)
    model = SegmentAnything(config)
    made = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    assert table.flax_shapes == original.flax_shapes == shapes_of(flatten(made))
    with torch.device("meta"):
        theirs = reference(config).state_dict()
    assert {name: table.torch_shapes[other] for name, other in table.written.items()} == shapes_of(theirs)
    assert original.torch_shapes == shapes_of(original_state(theirs, name.startswith("sam_")))
    if name in COUNTS:
        parameters = sum(int(np.prod(shape)) for shape in original.torch_shapes.values()) - FOURIER_SIZE
        assert (parameters, len(original.torch_shapes), len(table.written)) == COUNTS[name]


@pytest.mark.parametrize("name", SAM_PRESETS)
def test_a_released_size_is_recognised_even_if_tensors_are_missing(name):
    config = SAM_PRESETS[name]
    shapes = dict(list(sam.original_table(config).torch_shapes.items())[5:])
    tensors = DictSource({name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}).tensors
    family = sam.family_of(config)
    assert [other.name for other in sam.FAMILIES if other.original and other.original.recognise(tensors)] == [
        family.name
    ]
    assert family.original is not None and family.original.nearest(tensors) == (name, config)


@pytest.mark.parametrize("name", SAM_PRESETS)
def test_configurations_come_back_from_both_forms(name):
    config = SAM_PRESETS[name]
    content = write_config(config, np.dtype(np.float32), {"label": "kept", "vision_config": {"other": 1}})
    assert (content["label"], content["vision_config"]["other"]) == ("kept", 1)
    assert read_config(json.loads(json.dumps(content))) == config
    assert config_from_json(json.loads(json.dumps(config_to_json(config.with_precision("bfloat16"))))) == config


@every_kind
def test_to_our_format_and_back_is_bit_exact(tmp_path, release, memory):
    model = write_hugging_face(tmp_path / "in", release, memory, "bfloat16")
    found = recognise(tmp_path / "in")
    assert found.layout == "hugging_face" and found.family.name == model.config.model_type
    to_native(tmp_path / "in", tmp_path / "ours", found.family).run(max_shard_bytes=100_000)
    assert recognise(tmp_path / "ours").native and recognise(tmp_path / "ours").family == found.family
    to_hugging_face(tmp_path / "ours", tmp_path / "out", found.family).run(max_shard_bytes=100_000)
    again, report = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert_same_state(again.state_dict(), model.state_dict())
    here, ours = load_host(tmp_path / "ours")
    there, theirs = load_host(tmp_path / "in")
    assert here == there == tiny(release, memory).with_precision("bfloat16", "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("release", ORIGINALS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_authors_files_to_our_format_and_back_are_bit_exact(tmp_path, release, dtype):
    config, family = tiny(release), sam.family_of(tiny(release))
    sam.save(tmp_path / "in", sam.from_torch(drawn(release).state_dict(), config), config, dtype=dtype)
    to_native(tmp_path / "in", tmp_path / "ours", family).run()
    to_original(tmp_path / "ours", tmp_path / "original", family).run()
    file = tmp_path / "original" / f"{family.name}.pt"
    assert {path.name for path in file.parent.iterdir()} == {file.name, "original.json"}
    stored = torch.load(file, weights_only=True)
    expected = original_state(drawn(release).to(torch.float32).state_dict(), release == "sam")
    expected = {name: value.to(getattr(torch, dtype)) for name, value in expected.items()}
    assert_same_state(stored if release == "sam" else stored["model"], expected)
    for place in (file, file.parent):
        assert recognise(place).layout == "original" and recognise(place).family is family
        to_native(place, tmp_path / "again", family).run(overwrite=True)
        weights = {name: content for name, content in files_below(tmp_path / "ours").items() if name in OURS}
        assert files_below(tmp_path / "again") == weights


@pytest.mark.parametrize("release", ORIGINALS)
def test_both_layouts_give_the_same_parameters(tmp_path, monkeypatch, release):
    """The authors' own file, whose size is found among the released ones."""
    config = tiny(release)
    monkeypatch.setitem(SAM_PRESETS, f"{release}_tiny_for_this_test", config)
    write_original(tmp_path / "checkpoint.pt", release)
    here, ours = load_host(tmp_path / "checkpoint.pt")
    write_hugging_face(tmp_path / "theirs", release)
    there, theirs = load_host(tmp_path / "theirs")
    assert here.vision == there.vision == config.vision and here.heads.memory == there.heads.memory
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert {path: tuple(leaf.shape) for path, leaf in read_host_shapes(tmp_path / "checkpoint.pt").items()} == (
        shapes_of(flatten(ours))
    )
    native = to_native(tmp_path / "checkpoint.pt", tmp_path / "ours", sam.family_of(config))
    native.run()
    back = to_original(tmp_path / "ours", tmp_path / "back", sam.family_of(config))
    back.run()
    assert [path.name for path in (tmp_path / "back").glob("*.pt")] == [f"{release}_tiny_for_this_test.pt"]


def test_a_directory_with_config_and_the_authors_file_is_read_by_its_names(tmp_path):
    write_hugging_face(tmp_path / "in", "sam2.1")
    _, expected = load_host(tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").unlink()
    write_original(tmp_path / "in" / "sam2.1_hiera_tiny.pt", "sam2.1")
    assert recognise(tmp_path / "in").layout == "original"
    config, params = load_host(tmp_path / "in")
    assert config == tiny("sam2.1")
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_the_matrix_of_point_codes_may_stand_under_either_name_but_not_differ(tmp_path):
    write_hugging_face(tmp_path / "in", "sam2.1")
    file = tmp_path / "in" / "model.safetensors"
    state = load_file(file)
    shared, own = "shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding"
    for name in (shared, own):
        save_file({other: value for other, value in state.items() if other != name}, file)
        _, params = load_host(tmp_path / "in")
        matrix = params["prompt_encoder"]["shared_embedding"]["positional_embedding"]
        np.testing.assert_array_equal(matrix, state[own])
    save_file(state | {shared: state[shared] + 1}, file)
    with pytest.raises(UserError, match=f"{shared} should be {own} again"):
        load_host(tmp_path / "in")
    save_file({name: value for name, value in state.items() if name not in (shared, own)}, file)
    with pytest.raises(CheckpointMismatch) as caught:
        load_host(tmp_path / "in")
    assert caught.value.missing == [own]


@every_kind
def test_an_export_stands_alone_with_the_files_that_processors_read(tmp_path, release, memory):
    config = tiny(release, memory)
    sam.save(tmp_path / "out", sam.from_torch(drawn(release, memory).state_dict(), config), config)
    processors = {"preprocessor_config.json"} | ({"video_preprocessor_config.json"} if config.heads.memory else set())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors"} | processors
    assert CLASSES[model_type(config)][1].from_pretrained(tmp_path / "out").dtype == torch.float32
    if release == "sam":
        processor = SamImageProcessorPil.from_pretrained(tmp_path / "out")
        pixels = processor(images=np.zeros((40, 30, 3), np.uint8), return_tensors="np")["pixel_values"]
        assert pixels.shape == (1, 3, config.image_size, config.image_size)
        return
    for name in processors:
        content = json.loads((tmp_path / "out" / name).read_text())
        assert content["size"] == {"height": config.image_size, "width": config.image_size}
        assert content["processor_class"] == ("Sam2VideoProcessor" if memory else "Sam2Processor")


def test_every_fault_of_the_authors_file_is_named_at_once(tmp_path):
    state = write_original(tmp_path / "good.pt", "sam2.1")
    del state["no_obj_ptr"], state["image_encoder.trunk.blocks.1.norm1.weight"]
    state["sam_mask_decoder.extra"] = torch.zeros(2)
    state["mask_downsample.weight"] = torch.zeros(1, 1, 2, 2)
    torch.save({"model": state}, tmp_path / "bad.pt")
    config = {"file": "bad.pt", "config": config_to_json(tiny("sam2.1"))}
    (tmp_path / "original.json").write_text(json.dumps(config))
    before = files_below(tmp_path)
    with pytest.raises(CheckpointMismatch) as caught:
        to_native(tmp_path / "bad.pt", tmp_path / "ours", sam.family_of(tiny("sam2.1")))
    assert caught.value.missing == ["image_encoder.trunk.blocks.1.norm1.weight", "no_obj_ptr"]
    assert caught.value.unexpected == ["sam_mask_decoder.extra"]
    assert caught.value.misshaped == ["mask_downsample.weight: [1, 1, 2, 2], expected [1, 1, 4, 4]"]
    assert files_below(tmp_path) == before
    # Without a configuration beside it, it is held against the released model that is most like it.
    torch.save({"model": state}, tmp_path / "lone.pt")
    with pytest.raises(CheckpointMismatch, match=r"most like sam2\.1_hiera_tiny"):
        load_host(tmp_path / "lone.pt")


def test_what_is_no_checkpoint_of_ours_is_refused(tmp_path):
    write_original(tmp_path / "whole.pt", "sam")
    torch.save({"model": {"image_encoder.trunk.pos_embed": Malicious(tmp_path / "ran")}}, tmp_path / "malicious.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "truncated.pt").write_bytes(content[: len(content) // 2])
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    for name, message in (
        ("truncated.pt", r"truncated\.pt is no file of tensors, or a damaged one"),
        ("malicious.pt", r"malicious\.pt is refused: reading it would run code or build objects \(getattr\)"),
        ("other.pt", r"weight, \.\.\.\) have the names of no family that is known without one \(sam, sam2_video\)"),
        ("absent.pt", "is no directory and no file"),
    ):
        with pytest.raises(UserError, match=message):
            recognise(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_configurations_that_ours_cannot_express_are_refused_with_every_reason():
    content = write_config(tiny("sam2.1"), np.dtype(np.float32), {})
    content["mask_decoder_config"]["iou_head_depth"] = 4
    content["mask_downsampler_stride"] = 4
    content["vision_config"]["fpn_kernel_size"] = 3
    with pytest.raises(UserError, match=r"fpn_kernel_size is 3.*iou_head_depth is 4.*mask_downsampler_stride is 4"):
        read_config(content)
    content = write_config(tiny("sam"), np.dtype(np.float32), {})
    for change, message in (
        ({"global_attn_indexes": [1, 5]}, "do not end equal groups"),
        ({"image_size": [64, 32]}, "only squares"),
        ({"hidden_size": 33}, "mlp_dim|impossible"),
    ):
        with pytest.raises(UserError, match=message):
            read_config(content | {"vision_config": content["vision_config"] | change})


def test_models_that_the_reference_cannot_hold_are_refused_with_every_reason():
    config = tiny("sam2.1")
    assert config.heads.memory is not None
    memory = replace(config.heads.memory, frame_stride=2, only_past_pointers=False)
    config = replace(config, heads=replace(config.heads, memory=memory))
    with pytest.raises(UserError, match=r"frame_stride is 2, there it is 1; .*only_past_pointers is False"):
        write_config(config, np.dtype(np.float32), {})
    with pytest.raises(UserError, match=r"image_size is 80, there it is 64"):
        write_config(tiny("sam").with_image_size(80), np.dtype(np.float32), {})


def test_parameters_of_another_configuration_are_not_written(tmp_path):
    config = tiny("sam2.1")
    params = sam.from_torch(drawn("sam2.1").state_dict(), config)
    del params["object_pointer"]["no_object_pointer"]
    with pytest.raises(CheckpointMismatch, match="object_pointer/no_object_pointer"):
        sam.save(tmp_path / "out", params, config)
    with pytest.raises(CheckpointMismatch, match="object_pointer/no_object_pointer"):
        exported(params, sam.family_of(config), config)
    assert not (tmp_path / "out").exists()
