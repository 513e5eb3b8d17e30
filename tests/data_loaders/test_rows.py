"""From records to rows: which conversations are had, and that the bounds of the epoch plan hold."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_loaders.rows import (
    ConversationRecords,
    RowMaker,
    _task_tokens,
    _visual,
    measured_table,
    parse_tasks,
    resource_table,
)
from data_loaders.sources.protocol import RecordSize
from data_loaders.sources.synthetic import SyntheticSource
from data_loaders.synthetic.config import QUESTION_KINDS, SceneConfig
from data_loaders.synthetic.scenes import SyntheticScenes
from tracevision_jax.errors import UserError
from tracevision_jax.records import templates
from tracevision_jax.records.processor import Processor
from tracevision_jax.records.processor_config import ProcessorConfig
from tracevision_jax.records.vocabulary import Vocabulary, train_tokenizer
from tracevision_jax.vision.preprocess import VisionInputConfig, sample_frames, video_size

VISION = VisionInputConfig(
    patch=4,
    window_units=2,
    min_pixels=16 * 16,
    max_pixels=48 * 48,
    min_frames=2,
    video_min_pixels=16 * 16,
    video_max_pixels=32 * 32,
    video_total_pixels=6 * 24 * 24,
)
CONFIG = ProcessorConfig(vision=VISION, mask_size=8, max_points=9)
SCENES = SceneConfig(height=(24, 60), width=(24, 60), questions=QUESTION_KINDS, questions_per_scene=14)
KINDS_OF_SCENES = {
    "with questions": SCENES,
    "with narratives alone": dataclasses.replace(SCENES, questions=(), questions_per_scene=0),
    "brief": dataclasses.replace(SCENES, brief=True, named=(1, 2), questions=(), questions_per_scene=0),
    "videos": dataclasses.replace(SCENES, frames=7, frames_per_second=3.0),
}
COUNT = 8


def source(kind: str, seed: int = 0, count: int = COUNT) -> SyntheticSource:
    return SyntheticSource(seed, count, KINDS_OF_SCENES[kind])


@pytest.fixture(scope="module")
def trained() -> Vocabulary:
    """A tokenizer of the demo's kind: small, trained on other scenes of the same world."""
    scenes = SyntheticScenes(99, 60, SCENES)
    texts = ["You are a helpful assistant. system user assistant\n" * 20]
    for index in range(60):
        made = templates.build_all(scenes[index], sorted(scenes[index].tasks), np.random.default_rng(index))
        texts += [part for c in made for turn in c.turns for part in turn.parts if isinstance(part, str)]
        texts.append(scenes[index].caption)
    return Vocabulary(train_tokenizer(texts, 480))


@pytest.fixture(params=["bins", "digits"])
def processor(request, trained) -> Processor:
    words = dataclasses.replace(trained, coordinates=request.param)
    return Processor(words, dataclasses.replace(CONFIG, coordinates=request.param))


def assert_bounded(records: ConversationRecords, processor: Processor) -> np.ndarray:
    """Each record takes at most what the table says; returns (table, taken)."""
    table = resource_table(records, processor.config)
    make_row = RowMaker(processor)
    taken = np.array([make_row([records[index]])[0].resources for index in range(len(records))])
    names = ("tokens", "frames", "windows", "conversations", "points", "masks")
    over = [
        f"record {index} takes {taken[index, column]} {names[column]}, bound {table[index, column]}"
        for index, column in zip(*np.nonzero(taken > table), strict=True)
    ]
    assert over == []
    return np.stack([table, taken])


@pytest.mark.parametrize("kind", sorted(KINDS_OF_SCENES))
def test_the_table_bounds_every_task_of_every_kind_of_scene(kind, processor):
    found = source(kind)
    tasks = sorted(frozenset.intersection(*(found.sizes(index).tasks for index in range(COUNT))))
    tasks += [task for task in templates.TASKS if task.startswith("plain_")]
    assert len(tasks) >= 7
    for task in tasks:
        assert_bounded(ConversationRecords(found, (task,)), processor)


def test_the_table_bounds_dialogues_of_several_tasks(processor):
    tasks = ("trace_qa+refer_box+trace_qa", "caption_from_trace+trace_segment", "dialogue+refer_segment")
    table, taken = assert_bounded(ConversationRecords(source("with questions"), tasks), processor)
    assert (table[:, 3] == 3).all() and (taken[:, 5] > 0).all()


def test_the_table_bounds_what_samples_serve_by_themselves(processor):
    assert_bounded(ConversationRecords(source("videos", 3)), processor)
    assert_bounded(ConversationRecords(source("with questions", 4)), processor)


def test_the_table_bounds_rows_of_the_released_tokenizer(shared_data):
    from tests.records.qwen_tokenizer import released_tokenizer

    words = Vocabulary(released_tokenizer(shared_data / "tokenizers" / "qwen.tiktoken"))
    for coordinates in ("bins", "digits"):
        processor = Processor(
            dataclasses.replace(words, coordinates=coordinates), dataclasses.replace(CONFIG, coordinates=coordinates)
        )
        assert_bounded(ConversationRecords(source("with questions", count=4)), processor)


def test_bounds_are_not_far_above_what_is_taken(trained):
    """So that rows are well filled: on captions, half or more of the bound."""
    records = ConversationRecords(source("with narratives alone", count=12), ("plain_caption", "caption_from_trace"))
    table, taken = assert_bounded(records, Processor(trained, CONFIG))
    assert (taken[:, 0] / table[:, 0]).mean() > 0.5
    assert (taken[:, 1:4] == table[:, 1:4]).all()


@given(
    st.integers(2, 400), st.floats(0.5, 120), st.integers(8, 300), st.integers(8, 300), st.sampled_from([4, 10, 768])
)
def test_a_video_of_any_rate_stays_within_its_bound(frames, rate, height, width, most):
    vision = dataclasses.replace(VISION, max_frames=most)
    patches, windows, visual = _visual(frames, height, width, vision)
    chosen = len(sample_frames(frames, rate, vision))
    rows, cols = (side // vision.unit_px for side in video_size(height, width, chosen, vision))
    used = -(-chosen // 2)
    assert used <= patches
    assert -(-rows // vision.window_units) * -(-cols // vision.window_units) <= windows
    assert used * rows * cols <= visual


def test_every_task_has_a_bound():
    for task in templates.TASKS:
        assert _task_tokens(task, RecordSize(32, 32, regions=2), CONFIG) > 0


def test_slots_take_their_whole_length(trained):
    slotted = Processor(trained, dataclasses.replace(CONFIG, slot_tokens=500))
    table = resource_table(ConversationRecords(source("brief"), ("plain_caption",) * 3), slotted.config)
    assert (table[:, 0] == 1500).all() and (table[:, 3] == 3).all()


def test_a_measured_table_gives_all_records_what_the_largest_takes(trained):
    records = ConversationRecords(source("with questions"), ("trace_qa", "trace_segment"))
    make_row = RowMaker(Processor(trained, CONFIG))
    taken = [make_row([records[index]])[0].resources for index in range(5)]
    table = measured_table(records, make_row, 5)
    assert table.shape == (COUNT, 6)
    assert (table == np.max(taken, axis=0)).all()
    assert (measured_table(records, make_row, 100) >= table).all()


def test_tasks_are_groups_joined_by_plus():
    assert parse_tasks(("trace_qa+refer_box", "plain_caption")) == (("trace_qa", "refer_box"), ("plain_caption",))
    assert parse_tasks(()) == ()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("trace_qa+refer_boxx", r"No task 'refer_boxx'\. Did you mean 'refer_box'\? Tasks: .*joined by '\+'"),
        ("trace_qa,refer_box", "No task 'trace_qa,refer_box'"),
        ("trace_qa+", "No task ''"),
        ("", "No task ''"),
    ],
)
def test_an_unknown_task_is_named_with_the_nearest(entry, message):
    with pytest.raises(UserError, match=message):
        parse_tasks((entry,))


def asked(record) -> list:
    _, conversations = record
    return [
        [c.task, *(part for turn in c.turns for part in turn.parts if isinstance(part, str))] for c in conversations
    ]


def test_a_record_depends_on_its_number_and_the_seed_alone():
    found = source("with questions", count=20)
    records = ConversationRecords(found, ("trace_qa+trace_qa", "plain_caption"), seed=1)
    assert len(records) == 20
    forward = [asked(records[index]) for index in range(6)]
    again = ConversationRecords(found, records.tasks, seed=1)
    assert [asked(again[index]) for index in reversed(range(6))] == forward[::-1]
    other = ConversationRecords(found, records.tasks, seed=2)
    assert [asked(other[index]) for index in range(6)] != forward
    sample, conversations = records[0]
    assert sample.id == found[0].id
    assert [c.task for c in conversations] == ["dialogue", "plain_caption"]


def test_without_tasks_a_sample_has_one_conversation_for_each_that_it_serves():
    records = ConversationRecords(source("with questions"))
    sample, conversations = records[2]
    assert [c.task for c in conversations] == sorted(sample.tasks)


def test_a_task_that_does_not_fit_a_sample_is_an_error_of_its_record():
    records = ConversationRecords(source("with narratives alone"), ("trace_qa",))
    with pytest.raises(UserError, match="Task 'trace_qa' does not fit: sample 0-3 of synthetic"):
        records[3]


def test_the_fingerprint_changes_with_whatever_changes_a_record():
    records = ConversationRecords(source("brief"), ("plain_caption",))
    others = [
        dataclasses.replace(records, tasks=("trace_from_caption",)),
        dataclasses.replace(records, seed=1),
        dataclasses.replace(records, source=source("brief", seed=1)),
    ]
    prints = [entry.fingerprint() for entry in (records, *others)]
    assert len(set(prints)) == 4
    assert dataclasses.replace(records).fingerprint() == prints[0]


def test_a_row_has_a_piece_for_each_record(trained):
    records = ConversationRecords(source("brief"), ("plain_caption", "caption_from_trace"))
    pieces = RowMaker(Processor(trained, CONFIG))([records[0], records[1]])
    assert [len(piece.conversations) for piece in pieces] == [2, 2]
    assert RowMaker(Processor(trained, CONFIG))([]) == []
