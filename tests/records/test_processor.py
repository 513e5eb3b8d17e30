"""From conversations to arrays: what is learned, which token stands for which place, point and mask."""

import dataclasses
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.records.conftest import CONFIG, VISION
from tracevision_jax.errors import UserError
from tracevision_jax.records import templates
from tracevision_jax.records.encoded import EncodedConversation
from tracevision_jax.records.processor import Processor
from tracevision_jax.records.sample import (
    BoxPart,
    Conversation,
    MaskPart,
    PhrasePart,
    Region,
    Sample,
    TimedWord,
    TracePart,
    Turn,
    UnitNamesPart,
)
from tracevision_jax.records.vocabulary import GAP, SLOTS, Vocabulary
from tracevision_jax.trajectory.tokens import format_trajectory, from_bins, ids_to_bins, parse_all_digits, to_bins

POINTS = np.array([[0.012, 0.345, 0.0], [0.5, 0.5, 0.4], [0.999, 0.1, 0.9]])
OTHER = np.array([[0.25, 0.75, 0.0], [0.3, 0.7, 0.2]])


def user(*parts) -> Turn:
    return Turn("user", parts)


def assistant(*parts) -> Turn:
    return Turn("assistant", parts)


def one(processor: Processor, sample: Sample, *turns: Turn, answer: bool = True) -> EncodedConversation:
    return processor.piece(sample, [Conversation("trace_qa", turns)], answer).conversations[0]


def video(frames: int = 8, rate: float = 2.0, height: int = 16, width: int = 24) -> Sample:
    """Frame k is of grey 10 k."""
    pixels = np.broadcast_to((np.arange(frames, dtype=np.uint8) * 10)[:, None, None, None], (frames, height, width, 3))
    return Sample("video", "test", np.ascontiguousarray(pixels), frames_per_second=rate)


def learned_text(vocabulary: Vocabulary, encoded: EncodedConversation) -> str:
    return vocabulary.decode(encoded.tokens[encoded.learn > 0])


def test_just_the_assistants_words_and_end_tokens_are_learned(processor, picture):
    mask = MaskPart(np.ones((1, 24, 40), bool))
    encoded = one(
        processor,
        picture,
        Turn("system", ("Be brief.",)),
        user("Where is ", PhrasePart("it"), BoxPart(np.array([0, 0, 0.5, 1.0])), TracePart(POINTS), "?"),
        assistant("Here ", PhrasePart("the circle"), mask, " and ", BoxPart(np.array([0, 0, 0.25, 0.5]))),
        user("And now?"),
        assistant(TracePart(OTHER), " done"),
    )
    assert learned_text(processor.vocabulary, encoded) == (
        "Here <|object_ref_start|>the circle<|object_ref_end|>[SEG] and <|box_start|><0><0><250><500><|box_end|>"
        "<|im_end|><traj><250><750><300><700></traj> done<|im_end|>"
    )
    slots = np.isin(encoded.tokens, processor.vocabulary.slots)
    assert slots.sum() == SLOTS and not encoded.learn[slots].any()


def test_a_linked_trajectory_names_each_phrase_before_the_points_of_its_time(vocabulary, picture):
    linked = Processor(vocabulary, dataclasses.replace(CONFIG, linked=True))
    said = "A red circle. A small star."
    words = tuple(TimedWord(text, 0.15 * k, 0.15 * (k + 1)) for k, text in enumerate(said.split()))
    encoded = one(linked, picture, user("?"), assistant(TracePart(POINTS, words)))
    answer = learned_text(vocabulary, encoded)
    assert answer == (
        "<|object_ref_start|>A red circle<|object_ref_end|><traj><12><345><500><500></traj>"
        "<|object_ref_start|>A small star<|object_ref_end|><traj><999><100></traj><|im_end|>"
    )
    outline = linked.trajectory_outline(said)
    gaps = [place for place, token in enumerate(outline) if token == GAP]
    ends = pairwise([-1, *gaps, len(outline)])
    stretches = [re.escape(vocabulary.decode(outline[begin + 1 : end])) for begin, end in ends]
    assert len(gaps) == 2 and re.fullmatch(r"(<\d+>)+</traj>".join(stretches), answer)
    assert vocabulary.decode(Processor(vocabulary, CONFIG).trajectory_outline(said)) == "<traj>"
    seekers = encoded.sought.any(1)
    places = np.unique(encoded.sought[seekers], axis=0)
    assert len(places) == 2 and seekers.sum() == 6, "every coordinate seeks the place of its phrase"


def test_phrases_share_the_points_of_a_linked_trajectory_evenly(vocabulary, picture):
    linked = Processor(vocabulary, dataclasses.replace(CONFIG, linked=True, max_points=4))
    said = "A red circle. A star."
    words = tuple(TimedWord(text, 0.1 * k, 0.1 * (k + 1)) for k, text in enumerate(said.split()))
    times = np.linspace(0.0, 0.5, 20)
    trace = TracePart(np.stack([times, times, times], 1), words)
    first, second = linked.links(trace, picture.size)
    assert len(first.points) == len(second.points) == 2
    assert first.points[0, 2] == 0.0 and first.points[1, 2] < 0.3 <= second.points[0, 2] and second.points[1, 2] == 0.5


def test_visual_tokens_run_over_the_picture_in_raster_order(processor, picture):
    """Unit k of the picture has grey 16 k; patches of the unit that a token names must have that grey."""
    piece = processor.piece(picture, [Conversation("plain_caption", (user("?"), assistant("a")))])
    encoded = piece.conversations[0]
    place = encoded.visual[encoded.visual[:, 0] >= 0]
    assert (place[:, 0] == 0).all() and len(place) == 15
    patches = piece.patches[0].reshape(-1, VISION.merge**2, 3, 2 * VISION.patch**2)
    grey = patches[place[:, 1]].mean((1, 3)) * VISION.std + VISION.mean
    assert np.allclose(grey * 255, np.arange(15)[:, None] * 16, atol=1e-3)
    pads = encoded.tokens == processor.vocabulary.special("<|image_pad|>")
    assert (pads == (encoded.visual[:, 0] >= 0)).all()
    assert (
        encoded.positions[pads].tolist() == [[4, 4 + r, 4 + c] for r in range(3) for c in range(5)]
        or (
            encoded.positions[pads] - encoded.positions[pads][0] == [[0, r, c] for r in range(3) for c in range(5)]
        ).all()
    )


def test_frames_of_a_video_follow_each_other(processor):
    sample = video()
    piece = processor.piece(sample, [Conversation("plain_caption", (user("?"), assistant("a")))])
    encoded = piece.conversations[0]
    frames = len(piece.grid)
    assert frames == 4 and piece.frame_times.tolist() == [0, 1, 2, 3]
    place = encoded.visual[encoded.visual[:, 0] >= 0]
    units = len(place) // frames
    assert (place[:, 0] == np.repeat(np.arange(frames), units)).all()
    assert (np.diff(place[:, 1].reshape(frames, -1), axis=0) == 0).all()
    # The time part of the positions: two steps a second, frames a second apart.
    time = encoded.positions[encoded.visual[:, 0] >= 0, 0].reshape(frames, -1)
    assert (time - time[0, 0] == 2 * np.arange(frames)[:, None]).all()
    markers = [processor.vocabulary.special(f"<|vision_{side}|>") for side in ("start", "end")]
    assert [int((encoded.tokens == marker).sum()) for marker in markers] == [1, 1]


def test_several_stills_are_frames_at_time_zero_with_markers_of_their_own(processor):
    sample = dataclasses.replace(video(3), frames_per_second=0.0)
    piece = processor.piece(sample, [Conversation("plain_caption", (user("?"), assistant("a")))])
    encoded = piece.conversations[0]
    assert piece.frame_times.tolist() == [0, 0, 0]
    assert (encoded.tokens == processor.vocabulary.special("<|vision_start|>")).sum() == 3
    shown = encoded.visual[:, 0]
    assert [int((shown == frame).sum()) for frame in range(3)] == [6, 6, 6]
    later = encoded.positions[shown == 1].min(0) > encoded.positions[shown == 0].max(0)
    assert later[0]


def test_traces_of_the_user_go_behind_their_tokens_and_those_of_the_assistant_do_not(processor, picture):
    encoded = one(
        processor,
        picture,
        user("Trajectory A: ", TracePart(POINTS), " Trajectory B: ", TracePart(OTHER)),
        assistant(TracePart(OTHER)),
        user(TracePart(POINTS[:1])),
        assistant("yes"),
    )
    assert np.allclose(encoded.points, np.concatenate([POINTS, OTHER, POINTS[:1]]))
    assert encoded.point_trace.tolist() == [1, 1, 1, 2, 2, 3]
    ids = encoded.tokens
    first_bin = processor.vocabulary.first_bin
    owned = np.flatnonzero(encoded.point >= 0)
    assert encoded.point[owned].tolist() == np.repeat(np.arange(6), 2).tolist()
    assert (ids[owned] - first_bin == to_bins(encoded.points).reshape(-1)).all()
    opened = np.flatnonzero(ids == processor.vocabulary.traj_open)
    closed = np.flatnonzero(ids == processor.vocabulary.traj_close)
    found = [from_bins(ids_to_bins(ids[a : b + 1], first_bin - 9)) for a, b in zip(opened, closed, strict=True)]
    assert [len(points) for points in found] == [3, 2, 2, 1]
    assert (encoded.point[opened[2] : closed[2] + 1] == -1).all()


def test_written_numbers_stand_for_their_own_point(digits, picture):
    processor = Processor(digits, dataclasses.replace(CONFIG, coordinates="digits"))
    points = np.array([[0.0, 0.999, 0], [0.123456, 0.6, 1], [0.01, 0.02, 2], [0.5, 0.25, 3]])
    encoded = one(processor, picture, user("See ", TracePart(points), "."), assistant(TracePart(POINTS)))
    written = digits.decode(encoded.tokens)
    spans = [inner for _, inner in parse_all_digits(written)]
    assert (spans[0] == to_bins(points)).all() and (spans[1] == to_bins(POINTS)).all()
    assert format_trajectory(points) in written
    for number, pair in enumerate(to_bins(points).tolist()):
        own = digits.decode(encoded.tokens[encoded.point == number])
        assert [int(value) for value in re.findall("[0-9]+", own)] == pair
    assert np.allclose(encoded.points, points)


def test_masks_name_their_slots_frames_and_targets(processor):
    sample = video()
    mask = np.zeros((8, 16, 24), bool)
    mask[4:, :8] = True
    encoded = one(processor, sample, user("?"), assistant("a ", MaskPart(mask), " b ", MaskPart(~mask)))
    slots = processor.vocabulary.slots
    assert encoded.mask_frame == [0, 1, 2, 3] * 2
    for index in range(8):
        assert encoded.tokens[encoded.mask_slots[index]].tolist() == slots
    assert encoded.mask_slots[0][0] != encoded.mask_slots[4][0]
    # Temporal patch k stands for frames 2 k and 2 k + 1, by its first one.
    assert [target.mean() for target in encoded.mask_target] == [0, 0, 0.5, 0.5, 1, 1, 0.5, 0.5]
    assert encoded.mask_target[2][:4].all() and not encoded.mask_target[2][4:].any()


def test_mask_targets_are_shares_of_area(processor, picture):
    mask = np.zeros((1, 24, 40), bool)
    mask[0, :, :2] = True
    encoded = one(processor, picture, user("?"), assistant(MaskPart(mask)))
    (target,) = encoded.mask_target
    assert target.shape == (8, 8) and target.dtype == np.float32
    # 2 of the 5 columns of pixels under the first column of cells.
    assert np.allclose(target[:, 0], 0.4, atol=0.01) and (target[:, 1:] == 0).all()


def test_a_prompt_is_the_beginning_of_the_whole_and_has_no_targets(processor, picture):
    mask = MaskPart(np.zeros((1, 1, 1), bool))
    turns = (user(TracePart(POINTS), "?"), assistant("a ", mask), user("then?"), assistant("b"))
    whole, prompt = (one(processor, picture, *turns, answer=answer) for answer in (True, False))
    n = len(prompt.tokens)
    assert (whole.tokens[:n] == prompt.tokens).all() and (whole.positions[:n] == prompt.positions).all()
    assert processor.vocabulary.decode(prompt.tokens).endswith("<|im_start|>assistant\n")
    assert prompt.mask_slots == [] and len(whole.mask_slots) == 1
    assert (whole.positions[n] == prompt.next_position).all()


def test_adjacent_texts_are_encoded_as_one(processor, picture):
    apart = one(processor, picture, user("Where is ", "", "the red ", "circle?"), assistant("on the ", "left"))
    joined = one(processor, picture, user("Where is the red circle?"), assistant("on the left"))
    assert apart.tokens.tolist() == joined.tokens.tolist()
    assert apart.learn.tolist() == joined.learn.tolist()


def test_visual_tokens_that_are_named_learn_the_word_of_what_covers_them(processor, picture):
    left, right = np.zeros((2, 1, 24, 40), bool)
    left[0, :, :16], right[0, :8, 16:24] = True, True
    part = UnitNamesPart((("red", left), ("star", right)))
    encoded = one(processor, picture, user(part, "?"), assistant("a"))
    vocabulary = processor.vocabulary
    words = {name: vocabulary.encode(f" {name}")[0] for name in ("red", "star")}
    nothing = vocabulary.special("<|endoftext|>")
    row = [words["red"], words["red"]]
    expected = [*row, words["star"], nothing, nothing] + [*row, nothing, nothing, nothing] * 2
    assert encoded.extra_targets[:, 0].tolist() == np.flatnonzero(encoded.visual[:, 0] >= 0).tolist()
    assert encoded.extra_targets[:, 1].tolist() == expected
    assert encoded.tokens.tolist() == one(processor, picture, user("?"), assistant("a")).tokens.tolist()


def test_slots_learn_the_words_of_the_phrase_before_them_in_turn(processor, vocabulary, picture):
    masked = [user("?"), assistant(PhrasePart("the red star"), MaskPart(np.ones((1, 24, 40), bool)))]
    plain = one(processor, picture, *masked)
    assert len(plain.extra_targets) == 0
    taught = Processor(vocabulary, dataclasses.replace(CONFIG, slot_words=True))
    encoded = one(taught, picture, *masked)
    red, star = (vocabulary.encode(f" {name}")[0] for name in ("red", "star"))
    assert encoded.extra_targets.tolist() == [
        [slot, word] for slot, word in zip(encoded.mask_slots[0][:5], [red, star, red, star, red], strict=True)
    ], "the last slot learns the token behind it"
    assert encoded.tokens.tolist() == plain.tokens.tolist()
    phraseless = one(taught, picture, user("?"), assistant(MaskPart(np.ones((1, 24, 40), bool))))
    assert len(phraseless.extra_targets) == 0


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_tokens_weigh_less_in_longer_answers(vocabulary, picture, exponent):
    processor = Processor(vocabulary, dataclasses.replace(CONFIG, answer_weighting=exponent))
    box = BoxPart(np.array([0.1, 0.2, 0.3, 0.4]))
    encoded = one(processor, picture, user("?"), assistant(box), user("?"), assistant("red"))
    ends = np.flatnonzero(encoded.tokens == vocabulary.special("<|im_end|>"))[-3:-1]
    long, short = encoded.learn[: ends[0]], encoded.learn[ends[1] :]
    counts = (long > 0).sum() + 1, (short > 0).sum()
    assert counts[0] == 7 and counts[1] < 7
    assert encoded.learn[: ends[0] + 1].sum() == pytest.approx(counts[0] ** (1 - exponent), rel=1e-6)
    assert short.sum() == pytest.approx(counts[1] ** (1 - exponent), rel=1e-6)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ((), "no turn of the user"),
        ((assistant("hello"),), "no turn of the user"),
        ((Turn("narrator", ("x",)), user("?")), "role is 'narrator'"),
        ((user(MaskPart(np.ones((1, 2, 2), bool))),), "not the assistant's"),
        ((user("?"), assistant(MaskPart(np.ones((2, 2, 2), bool)))), "mask of 2 frames is given for 1 frames"),
        ((user(*[TracePart(POINTS)] * 9),), "more than 8 traces"),
        ((user(TracePart(np.zeros((0, 3)))),), "trace is empty"),
        ((user(TracePart(np.full((2, 3), np.nan))),), "not finite"),
        ((user(TracePart(POINTS * 100)),), "look like pixels"),
        ((user(BoxPart(np.array([0, 0, np.nan, 1]))),), "not finite"),
        ((user("half \ud83d"),), "surrogate"),
    ],
)
def test_what_makes_no_conversation_is_the_users_mistake(processor, picture, turns, reason):
    with pytest.raises(UserError, match=reason):
        one(processor, picture, *turns)


def test_vocabulary_and_processor_must_write_coordinates_alike(vocabulary):
    with pytest.raises(UserError, match="'bins', the processor as 'digits'"):
        Processor(vocabulary, dataclasses.replace(CONFIG, coordinates="digits"))


sides = st.integers(1, 60)
coordinates = st.one_of(st.floats(-2, 2), st.sampled_from([0.0, 1.0, 0.5]))
traces = st.lists(st.tuples(coordinates, coordinates, st.floats(-1e3, 1e6)), min_size=1, max_size=40)


@given(height=sides, width=sides, trace=traces, written=st.booleans())
def test_any_picture_with_any_trace_becomes_a_row(processor, digits, height, width, trace, written):
    pixels = np.random.default_rng(height).integers(0, 256, (1, height, width, 3), np.uint8)
    if written:
        processor = Processor(digits, dataclasses.replace(processor.config, coordinates="digits"))
    sample = Sample("any", "test", pixels)
    made = templates.describe_trace(TracePart(np.array(trace, np.float64)), "a red circle")
    piece = processor.piece(sample, [made])
    encoded = piece.conversations[0]
    n = len(encoded.tokens)
    assert encoded.positions.shape == (n, 3) and encoded.visual.shape == (n, 2) and len(encoded.point) == n
    assert 1 <= len(encoded.points) <= CONFIG.max_points
    assert (encoded.points[:, :2] >= 0).all() and (encoded.points[:, :2] <= 1).all()
    assert (np.diff(encoded.points[:, 2]) >= 0).all()
    if not written:
        inner = encoded.tokens[encoded.point >= 0] - processor.vocabulary.first_bin
        assert (inner == to_bins(encoded.points).reshape(-1)).all()
    rows, cols = piece.grid[0]
    shown = encoded.visual[encoded.visual[:, 0] >= 0, 1]
    assert len(shown) == len(set(shown.tolist())) == rows * cols // VISION.merge**2
    assert learned_text(processor.vocabulary, encoded) == "a red circle<|im_end|>"


@pytest.mark.parametrize("size", [(1, 1), (1, 150), (200, 1), (7, 90)])
def test_odd_pictures_have_every_unit_inside(processor, size):
    sample = Sample("odd", "test", np.full((1, *size, 3), 128, np.uint8))
    piece = processor.piece(sample, [Conversation("plain_caption", (user("?"), assistant("a")))])
    encoded = piece.conversations[0]
    units = encoded.visual[encoded.visual[:, 0] >= 0, 1]
    patches = piece.patches[0].reshape(-1, VISION.merge**2 * VISION.patch_dim)
    # Padding is zeros; a grey of 128 is not.
    assert (patches[units] != 0).all() and (np.delete(patches, units, 0) == 0).all()


def test_scenes_serve_every_task_through_the_processor(processor, scenes):
    sample = scenes[0]
    piece = processor.piece(sample, [templates.build(sample, task) for task in sorted(sample.tasks)])
    assert len(piece.conversations) == len(sample.tasks) >= 10
    for encoded in piece.conversations:
        assert encoded.learn.any()
        assert len(encoded.mask_slots) == len(encoded.mask_target) == len(encoded.mask_frame)


def test_regions_are_masked_in_their_order(processor, picture):
    boxes = [np.array([[0, 0, 0.5, 1.0]]), np.array([[0.5, 0, 1, 1.0]])]
    masks = np.zeros((2, 1, 24, 40), bool)
    masks[0, 0, :, :20], masks[1, 0, :, 20:] = True, True
    regions = [Region(name, box, mask) for name, box, mask in zip(("left", "right"), boxes, masks, strict=True)]
    encoded = processor.piece(picture, [templates.segment_phrases(regions)]).conversations[0]
    assert processor.vocabulary.decode(encoded.tokens[encoded.learn > 0]) == (
        "<|object_ref_start|>left<|object_ref_end|>[SEG] and <|object_ref_start|>right<|object_ref_end|>[SEG]<|im_end|>"
    )
    assert [target[:, :4].mean() for target in encoded.mask_target] == [1, 0]


BIN = 1 / 1000


@pytest.mark.parametrize("coordinates", ["bins", "digits"])
def test_an_answers_coordinates_and_slots_seek_what_they_are_about(vocabulary, digits, picture, coordinates):
    """The token before each coordinate, and the slots of a mask themselves; nothing in the user's turn."""
    words = digits if coordinates == "digits" else vocabulary
    processor = Processor(words, dataclasses.replace(CONFIG, coordinates=coordinates))
    mask = np.zeros((1, 24, 40), bool)
    mask[0, 6:12, 10:30] = True
    box = np.array([0.25, 0.0, 0.5, 0.5])
    encoded = one(
        processor,
        picture,
        user("Where ", BoxPart(np.array([0.1, 0.1, 0.2, 0.2])), "?"),
        assistant("Here ", BoxPart(box), TracePart(OTHER), MaskPart(mask), MaskPart(np.zeros((1, 24, 40), bool))),
    )
    assert encoded.sought.shape == (len(encoded.tokens), 4) and encoded.sought.dtype == np.float32
    around = np.array([-0.5, -0.5, 0.5, 0.5]) * BIN
    wanted = np.stack([box, box, *np.tile(OTHER[:, :2], (1, 2)), [0.25, 0.25, 0.75, 0.5]]) + around
    seekers = np.flatnonzero(encoded.sought.any(1))
    found, counts = np.unique(encoded.sought[seekers], axis=0, return_counts=True)
    assert np.allclose(found, np.unique(wanted, axis=0), atol=1e-6)
    slots = np.flatnonzero(np.isin(encoded.tokens, words.slots))
    assert np.allclose(encoded.sought[slots[:SLOTS]], wanted[-1], atol=1e-6)
    assert not encoded.sought[slots[SLOTS:]].any(), "an empty mask has no place"
    if coordinates == "bins":
        assert counts.tolist() == [4 if np.allclose(row, wanted[0]) else 6 if row[2] > 0.7 else 2 for row in found]
        bins = np.flatnonzero(words.is_bin(encoded.tokens) & (encoded.learn > 0))
        assert seekers.tolist() == sorted({*(bins - 1), *slots[:SLOTS]})


def test_an_answer_about_one_trace_seeks_where_it_lies(processor, picture):
    """Until the next question; what has a place of its own keeps it, and two traces are no one place."""
    box = np.array([0.25, 0.0, 0.5, 0.5])
    turns = [user("What is ", TracePart(OTHER), "?"), assistant("red", BoxPart(box)), user("And?"), assistant("blue")]
    encoded = one(processor, picture, *turns)
    seekers = np.flatnonzero(encoded.sought.any(1))
    first = np.flatnonzero(encoded.learn > 0)[: -len(processor.vocabulary.encode("blue")) - 1]
    assert seekers.tolist() == (first - 1).tolist()
    extent = np.array([0.25, 0.7, 0.3, 0.75]) + np.array([-0.5, -0.5, 0.5, 0.5]) * BIN
    coordinates = processor.vocabulary.is_bin(encoded.tokens[first])
    assert coordinates.sum() == 4
    for place, own in zip(encoded.sought[seekers], coordinates, strict=True):
        assert np.allclose(place[1], -0.0005 if own else extent[1], atol=1e-6)
    two = user("Which? ", TracePart(OTHER), TracePart(POINTS))
    assert not one(processor, picture, two, assistant("red")).sought.any()


def test_a_prompt_seeks_nothing(processor, picture):
    turns = user("Where?"), assistant(BoxPart(np.array([0.25, 0.0, 0.5, 0.5])))
    assert not one(processor, picture, *turns, answer=False).sought.any()
