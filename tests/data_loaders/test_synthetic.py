"""Synthetic scenes: what a sample says is true of its picture, and depends on seed and index alone."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_loaders.sources.protocol import Source
from data_loaders.sources.synthetic import SyntheticSource
from data_loaders.synthetic.config import COLOURS, QUESTION_KINDS, SHAPES, SceneConfig
from data_loaders.synthetic.drawing import TONES, draw
from data_loaders.synthetic.language import relation_of
from data_loaders.synthetic.scenes import SyntheticScenes
from data_loaders.synthetic.shapes import signed_distance
from tests.data_loaders.same import assert_same_sample
from tracevision_jax.errors import UserError
from tracevision_jax.records.sample import BoxPart, MaskPart, TracePart
from tracevision_jax.records.templates import TASKS, build, task_of_question
from tracevision_jax.trajectory.alignment import align_words

ASKED = SceneConfig(questions=QUESTION_KINDS, questions_per_scene=len(QUESTION_KINDS))


def scenes(count: int = 40, seed: int = 5, **changes) -> SyntheticScenes:
    return SyntheticScenes(seed, count, replace(SceneConfig(), **changes))


def test_a_scene_depends_on_seed_and_index_alone():
    first = SyntheticScenes(3, 10, ASKED)
    forwards = [first[k] for k in range(4)]
    for index in (3, 0, 2):
        assert_same_sample(SyntheticScenes(3, 1000, ASKED)[index], forwards[index])


def test_scenes_of_other_indices_and_seeds_differ():
    made = [SyntheticScenes(seed, 3)[index] for seed in (0, 1) for index in range(3)]
    assert len({sample.frames.tobytes() for sample in made}) == len(made)
    assert len({sample.id for sample in made}) == len(made)


def test_asking_questions_leaves_the_rest_of_a_scene_as_it_was():
    plain, asked = SyntheticScenes(0, 5)[2], SyntheticScenes(0, 5, ASKED)[2]
    assert asked.questions
    assert_same_sample(plain, replace(asked, questions=()), but=("tasks",))


def test_objects_are_told_apart_by_colour_and_shape():
    for index in range(40):
        objects = scenes().scene(index).layout.objects
        assert 4 <= len(objects) <= 6
        assert len({thing.name for thing in objects}) == len(objects)


def test_masks_are_where_the_object_has_its_colour():
    """Inside the mask of a plain object the colour nearest to the mean pixel is the one it is named by."""
    names = list(COLOURS)
    palette = np.array([COLOURS[name] for name in names], float)
    for sample in (scenes(textures=("plain",))[k] for k in range(40)):
        for region in sample.regions:
            mean = sample.frames[0][region.mask[0]].mean(axis=0)
            # Light and rim scale the brightness: compare directions of colour and, weakly, brightness.
            distance = np.linalg.norm(palette - mean, axis=1)
            assert names[int(np.argmin(distance))] == region.attributes["colour"]


def test_no_background_has_the_colour_of_an_object():
    saturation = np.ptp(TONES, axis=1)
    assert saturation.max() < 0.12
    assert min(np.ptp(np.array(rgb) / 255) for rgb in COLOURS.values()) > 0.35


def test_boxes_hold_their_masks_tightly():
    for sample in (scenes(count=20)[k] for k in range(20)):
        height, width = sample.size
        for region in sample.regions:
            x1, y1, x2, y2 = region.box[0] * (width, height, width, height)
            rows, columns = np.nonzero(region.mask[0])
            assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x1, y1, x2, y2)


def test_no_object_is_hidden_by_more_than_the_overlap_allows():
    made = scenes(count=60)
    hidden = []
    for index in range(60):
        scene = made.scene(index)
        _, masks = scene.drawn
        for number, thing in enumerate(scene.layout.objects):
            alone = draw(replace(scene.layout, objects=(thing,)), made.config, np.random.default_rng(0))[1]
            hidden.append(1 - masks[number].sum() / alone.sum())
    assert max(hidden) <= made.config.overlap
    assert np.mean(np.array(hidden) > 0.01) > 0.02, "some objects do overlap"


@pytest.mark.parametrize("shape", SHAPES)
def test_signed_distances_are_negative_inside_and_grow_at_unit_rate(shape):
    side = np.linspace(-1.3, 1.3, 261, dtype=np.float32)
    x, y = np.meshgrid(side, side)
    distance = signed_distance(shape, x, y, 0.0)
    inside = distance < 0
    assert 0.2 < inside.sum() / (2 / 0.01) ** 2 < 0.8
    assert not inside[[0, -1]].any() and not inside[:, [0, -1]].any()
    slope = np.hypot(*np.gradient(distance, 0.01))
    at_edge = np.abs(distance) < 0.03
    assert np.median(slope[at_edge]) == pytest.approx(1, abs=0.05)


def test_captions_name_regions_in_order_and_truly():
    for index in range(60):
        scene = scenes(count=60).scene(index)
        caption = scene.narrative.caption.lower()
        places = [caption.index(region.phrase) for region in scene.regions]
        assert places == sorted(places) and 2 <= len(places) <= 4
        for region in scene.regions:
            assert region.attributes["colour"] in region.phrase and region.attributes["shape"] in region.phrase


def test_relations_are_those_of_the_centres():
    assert relation_of((0.8, 0.5), (0.2, 0.5)) == "to the right of"
    assert relation_of((0.2, 0.5), (0.8, 0.55)) == "to the left of"
    assert relation_of((0.5, 0.1), (0.5, 0.9)) == "above"
    assert relation_of((0.5, 0.9), (0.55, 0.1)) == "below"
    assert relation_of((0.2, 0.2), (0.8, 0.8)) is None
    assert relation_of((0.5, 0.5), (0.55, 0.5)) is None


def test_the_hand_is_over_the_object_while_its_phrase_is_said():
    distances = []
    for index in range(40):
        scene = scenes().scene(index)
        words, strokes = scene.recording
        points = np.concatenate(strokes)
        aligned = align_words(scene.narrative.caption, words)
        for number, phrase in zip(scene.narrative.order, scene.narrative.phrases, strict=True):
            end = scene.narrative.caption.lower().index(phrase) + len(phrase)
            window = next(word.window for word in aligned if word.end_char == end)
            near = points[(points[:, 2] >= window[0]) & (points[:, 2] <= window[1])]
            offset = (near[:, :2] - scene.layout.centre(number)) / scene.radii[number]
            distances.extend(np.linalg.norm(offset, axis=1))
    assert np.percentile(distances, 90) < 1.5


def test_words_are_spoken_at_the_speed_of_speech():
    for sample in (scenes(count=20)[k] for k in range(20)):
        rate = len(sample.words) / sample.words[-1].end
        assert 2.4 < rate < 4.1
        starts = [word.start for word in sample.words]
        assert starts == sorted(starts) and all(word.end > word.start for word in sample.words)


def test_traces_are_steady_in_time_and_mostly_inside():
    lengths, outside, split = [], 0, 0
    for sample in (scenes(count=60)[k] for k in range(60)):
        for stroke in sample.strokes:
            assert np.allclose(np.diff(stroke[:, 2]), 1 / 60, atol=2e-6)
        points = np.concatenate(sample.strokes)
        lengths.append(len(points))
        outside += (np.abs(points[:, :2] - 0.5).max() > 0.5).any()
        split += len(sample.strokes) > 1
        assert np.abs(points[:, :2] - 0.5).max() < 0.75
    assert 300 <= np.median(lengths) <= 600
    assert outside > 3 and split > 3


def test_brief_narratives_are_shorter():
    full = np.mean([len(scenes()[k].words) for k in range(30)])
    brief = np.mean([len(scenes(brief=True)[k].words) for k in range(30)])
    assert brief < 0.75 * full


@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_every_kind_of_question_is_answered_truly(kind):
    config = SceneConfig(questions=(kind,), questions_per_scene=3)
    for index in range(15):
        scene = SyntheticScenes(1, 15, config).scene(index)
        objects = scene.layout.objects
        for question in scene.questions:
            assert question.kind == kind
            assert [turn.role for turn in question.turns[:2]] == ["user", "assistant"]
            assert len(question.turns) % 2 == 0 and (len(question.turns) >= 6) == (kind == "dialogue")
            asked, answer = question.turns[0].parts, question.turns[1].parts
            traces = [part for part in asked if isinstance(part, TracePart)]
            over = [nearest(scene, trace) for trace in traces]
            text = " ".join(part for part in answer if isinstance(part, str)).lower()
            if kind == "which_trace":
                wanted = next(k for k, thing in enumerate(objects) if thing.name in asked[-1])
                assert over[{"trajectory a.": 0, "trajectory b.": 1}[text]] == wanted and over[0] != over[1]
            elif kind in ("what", "dialogue"):
                assert objects[over[0]].name in text
            elif kind in ("colour", "shape", "size", "texture"):
                assert text == getattr(objects[over[0]], kind) + "."
            elif kind == "counting":
                name = next(n for n in (*COLOURS, *SHAPES, "object") if n in asked[0])
                count = sum(name in thing.name or name == "object" for thing in objects)
                assert text == ("no", "one", "two", "three", "four", "five", "six")[count] + "."
            for part in answer:
                if isinstance(part, str):
                    continue
                number = over[0] if over else next(k for k, o in enumerate(objects) if o.name in asked[0])
                if isinstance(part, BoxPart):
                    np.testing.assert_array_equal(part.box, scene.box(number)[0])
                elif isinstance(part, MaskPart):
                    np.testing.assert_array_equal(part.mask, scene.drawn[1][number])


def nearest(scene, trace: TracePart) -> int:
    """The object whose centre lies nearest to a trace's mean, in units of its radius."""
    middle = trace.points[:, :2].mean(axis=0)
    centres = np.array([scene.layout.centre(k) for k in range(len(scene.layout.objects))])
    return int(np.argmin(np.linalg.norm((centres - middle) / scene.radii, axis=1)))


def test_traces_of_questions_take_two_to_three_seconds():
    question = SyntheticScenes(0, 1, SceneConfig(questions=("what",), questions_per_scene=1))[0].questions[0]
    trace = question.turns[0].parts[0]
    assert 110 <= len(trace.points) <= 190
    assert trace.words[0].text == "the"


def test_questions_of_a_scene_are_about_different_objects():
    sample = SyntheticScenes(0, 1, SceneConfig(questions=("box",), questions_per_scene=4))[0]
    boxes = {tuple(question.turns[1].parts[1].box) for question in sample.questions}
    assert len(boxes) == 4


def test_every_task_of_a_sample_can_be_built():
    sample = SyntheticScenes(0, 1, ASKED)[0]
    assert sample.tasks == frozenset(TASKS)
    for task in sample.tasks:
        assert build(sample, task, np.random.default_rng(0)).task == task
    assert {task_of_question(kind) for kind in QUESTION_KINDS} <= set(TASKS)


def test_scenes_without_narrative_serve_no_task_with_a_trace():
    sample = scenes(narrative=False)[0]
    assert sample.caption and not sample.words and not sample.strokes
    assert sample.tasks == {
        "plain_caption",
        "plain_boxes",
        "plain_names",
        "plain_objects",
        "refer_box",
        "refer_segment",
    }


def test_videos_move_their_objects_and_the_hand_follows():
    config = SceneConfig(frames=6, frames_per_second=2.0, questions=("what",), questions_per_scene=1)
    moved = 0
    for index in range(8):
        scene = SyntheticScenes(2, 8, config).scene(index)
        frames, masks = scene.drawn
        assert frames.shape == (6, 128, 128, 3) and masks.shape[1:] == (6, 128, 128)
        moved += (masks[:, 0] != masks[:, -1]).any()
        words, strokes = scene.recording
        assert words[-1].end == pytest.approx(3.0)
        points = np.concatenate(strokes)
        last = scene.narrative.order[-1]
        end = scene.layout.centres(last, points[-20:-10, 2])
        assert (np.abs(points[-20:-10, :2] - end) / scene.radii[last]).max() < 2.5
        times = np.linspace(0, 30, 200)
        centres = np.stack([scene.layout.centres(k, times) for k in range(len(scene.layout.objects))])
        assert centres.min() > 0 and centres.max() < 1, "objects bounce off the borders"
    assert moved == 8


def test_hidden_objects_of_a_video_have_no_box():
    made = SyntheticScenes(2, 60, SceneConfig(frames=8, frames_per_second=1.0))
    for index in range(20):
        scene = made.scene(index)
        empty = ~scene.drawn[1].any(axis=(2, 3))
        boxes = np.stack([scene.box(number) for number in range(len(empty))])
        np.testing.assert_array_equal(np.isnan(boxes).all(axis=2), empty)


def test_pictures_of_any_size_are_drawn():
    for height, width in ((64, 200), (300, 96), (31, 17)):
        sample = scenes(height=(height, height), width=(width, width), objects=(2, 3))[0]
        assert sample.size == (height, width)
        assert all(region.mask.any() for region in sample.regions)


def test_sizes_say_what_the_sample_holds():
    source = SyntheticSource(4, 12, replace(ASKED, questions_per_scene=3))
    assert isinstance(source, Source)
    for index in range(12):
        sample, size = source[index], source.sizes(index)
        assert (size.height, size.width, size.frames) == (*sample.size, len(sample.frames))
        assert size.caption_characters == len(sample.caption) and size.words == len(sample.words)
        assert size.trace_points == sum(len(stroke) for stroke in sample.strokes)
        assert (size.regions, size.questions) == (len(sample.regions), len(sample.questions))
        assert size.tasks == sample.tasks
        longest = max(
            sum(len(p) for turn in q.turns for p in turn.parts if isinstance(p, str)) for q in sample.questions
        )
        assert size.question_characters == longest


def test_the_fingerprint_changes_with_seed_count_and_config():
    sources = [
        SyntheticSource(0, 5),
        SyntheticSource(1, 5),
        SyntheticSource(0, 6),
        SyntheticSource(0, 5, SceneConfig(brief=True)),
    ]
    assert len({source.fingerprint() for source in sources}) == 4
    assert pickle.loads(pickle.dumps(sources[3])).fingerprint() == sources[3].fingerprint()


def test_an_index_past_the_end_is_refused():
    with pytest.raises(IndexError, match="scene 5 of 5"):
        SyntheticSource(0, 5)[5]
    with pytest.raises(IndexError):
        SyntheticSource(0, 5).sizes(-1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colours": ("red", "bleu")}, "unknown name 'bleu'. Did you mean 'blue'"),
        ({"questions": ("what", "whatever_else")}, "unknown name 'whatever_else'"),
        ({"objects": (5, 4)}, "scene objects is 5 to 4"),
        ({"height": (8, 8)}, "scene height is 8 to 8"),
        ({"colours": ("red",), "shapes": ("circle", "ring")}, "6 objects need as many pairs"),
        ({"frames": 0}, "must be positive"),
        ({"questions_per_scene": 2}, "needs kinds of questions"),
        ({"shapes": ()}, "need at least one name"),
    ],
)
def test_a_wrong_configuration_says_what_is_wrong(changes, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        SceneConfig(**changes)


@given(st.integers(0, 2**40), st.integers(0, 2**31), st.integers(1, 3))
def test_any_seed_and_index_give_a_whole_sample(seed, index, frames):
    config = SceneConfig(
        height=(24, 80),
        width=(24, 80),
        objects=(1, 6),
        named=(1, 4),
        frames=frames,
        questions=QUESTION_KINDS,
        questions_per_scene=3,
    )
    sample = SyntheticScenes(seed, index + 1, config)[index]
    assert sample.caption.endswith(".") and sample.caption[0].isupper()
    assert np.isfinite(np.concatenate(sample.strokes)).all()
    for region in sample.regions:
        assert region.box.shape == (frames, 4)
        seen = region.box[np.isfinite(region.box).all(axis=1)]
        assert (seen >= 0).all() and (seen <= 1).all() and (seen[:, 2:] > seen[:, :2]).all()
