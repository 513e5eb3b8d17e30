"""J and F of predicted mask files against true ones, sequence by sequence, in the semi-supervised protocol.

    pairs, notes = open_pairs(Path("predictions"), Path("masks"))
    results = {pair.name: score_pair(pair) for pair in pairs}
    objects = [scores for result in results.values() for scores in result.objects.values()]
    video.mean_scores(objects).named()

As DAVIS's evaluation code (davis2017-evaluation) does it:
- objects are matched by id; in DAVIS layout only ids up to the highest of the first true mask are scored;
- void pixels count as background of the truth;
- an object without pixels in a prediction is an empty mask: 0, or 1 in frames where the truth is empty too;
- of a prediction only the scored frames are read; the first and the last need not be there.
Where that code stops, or counts what cannot be meant:
- an id that the true masks never show is no object (there, all ids from 1 on are);
- a predicted id that is no object is ignored and told (there, the end; SA-V's evaluation ignores it as well);
- a sequence of two frames or fewer, or without an object, has no scores and enters no mean (there, the end).
Masks are never resized, and a missing prediction is never taken for an empty one: both are errors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evaluation.metrics import files, video
from evaluation.metrics.video_files import Frame, Masklets, is_png, open_masklets
from tracevision_jax.errors import UserError

JOINED = 1
"""Id of the one object that `binary` makes of all."""


class Pair(NamedTuple):
    """A sequence to be scored."""

    name: str
    true: Masklets
    predicted: Masklets

    @property
    def scored(self) -> Sequence[str]:
        """Names of the frames that the protocol scores."""
        return self.true.names[video.SEMI_SUPERVISED]


@dataclass(frozen=True)
class PairScores:
    """Scores of each object by its id, and what there is to tell; without an object, why there is none."""

    objects: Mapping[int, video.Scores]
    notes: tuple[str, ...] = ()


def open_pairs(predictions: Path, masks: Path) -> tuple[list[Pair], list[str]]:
    """The sequences of `masks` with their predictions, and notes on what is predicted beyond them.

    Raises:
        UserError: a folder is missing or not in a layout, or a sequence or a scored frame has no prediction.
    """
    true = _sequences(masks)
    predicted = {
        path.name
        for path in _children(predictions, "predictions")
        if path.is_dir() == true[0].is_dir() and (path.is_dir() or path.suffix == ".json")
    }
    problems: list[str] = []
    pairs, beyond = [], 0
    for path in true:
        if path.name not in predicted:
            problems.append(f"{predictions / path.name} does not exist, but is needed to score {path}")
            continue
        try:
            name = path.name if path.is_dir() else path.stem
            pair = Pair(name, open_masklets(path), open_masklets(predictions / path.name))
        except UserError as error:
            problems.append(str(error))
            continue
        pairs.append(pair)
        given = set(pair.predicted.names)
        if lacking := [frame for frame in pair.scored if frame not in given]:
            told = f" and {len(lacking) - 1} more of its frames" if len(lacking) > 1 else ""
            problems.append(f"{pair.predicted.place(lacking[0])}{told} must be scored, but there is no prediction")
        beyond += len(given.difference(pair.true.names))
    files.refuse(problems)
    notes = []
    if unasked := predicted - {path.name for path in true}:
        notes.append(f"Predictions without true masks, ignored: {files.some(unasked)}.")
    if beyond:
        notes.append(f"Predicted frames without a true mask, ignored: {beyond}.")
    return pairs, notes


def score_pair(pair: Pair, binary: bool = False, advance: Callable[[], Any] = lambda: None) -> PairScores:
    """J and F of each object over the scored frames; `advance` is called after each frame.

    With `binary` all ids of a frame are one object, except for void pixels of the truth.

    Raises:
        UserError: a mask cannot be read, or differs in size from the first true one.
    """
    objects = [JOINED] if binary else pair.true.objects
    if not objects:
        return PairScores({}, (f"{pair.name}: no object in the first true mask, so there is nothing to score.",))
    if not pair.scored:
        frames = files.counted(len(pair.true.names), "frame")
        return PairScores({}, (f"{pair.name}: {frames}, of which the first and the last are not scored.",))
    # Out of sight in both masks counts as found: J and F are 1.
    values = np.ones((2, len(objects), len(pair.scored)))
    shown = set(objects) if binary else set(pair.true.first.masks)
    predicted_ids: set[int] = set()
    for column, name in enumerate(pair.scored):
        predicted, true = _read(pair.predicted, name, pair), _without(_read(pair.true, name, pair), pair.true.void)
        if binary:
            predicted, true = _joined(predicted), _joined(true)
        for row, number in enumerate(objects):
            if number in predicted.masks or number in true.masks:
                counts = video.frame_counts(predicted.mask(number), true.mask(number))
                values[:, row, column] = video.j_and_f(counts)
        shown.update(true.masks)
        predicted_ids.update(predicted.masks)
        advance()
    scores = {
        number: video.Scores(*(video.statistics(measure) for measure in values[:, row]))
        for row, number in enumerate(objects)
        if number in shown
    }
    if not scores:
        return PairScores({}, (f"{pair.name}: no object is ever in sight in the true masks.",))
    told = {
        "true ids above those of the first mask": shown - set(objects) - pair.true.void,
        "predicted ids that are no objects": predicted_ids - scores.keys(),
    }
    notes = (f"{pair.name}: {what}, ignored: {', '.join(map(str, sorted(ids)))}." for what, ids in told.items() if ids)
    return PairScores(scores, tuple(notes))


def _children(folder: Path, side: str) -> list[Path]:
    """What a folder of sequences holds, in order of names.

    Raises:
        UserError: there is no such folder, or it is a sequence itself.
    """
    if not folder.is_dir():
        raise UserError(f"the {side} folder {folder} {'is a file' if folder.exists() else 'does not exist'}")
    children = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if any(map(is_png, children)) and not any(path.is_dir() for path in children):
        raise UserError(
            f"the {side} folder {folder} holds PNG files itself; expected {folder}/SEQUENCE/FRAME.png: "
            "move the files of each sequence into a folder of their own, or give the folder above"
        )
    return children


def _sequences(folder: Path) -> list[Path]:
    """The folders of true masks; where there is none, the JSON files.

    Raises:
        UserError: there is no sequence.
    """
    children = _children(folder, "masks")
    folders = [path for path in children if path.is_dir()]
    sequences = folders or [path for path in children if path.suffix == ".json"]
    if not sequences:
        raise UserError(f"the masks folder {folder} holds no sequence; expected {folder}/SEQUENCE/FRAME.png")
    for path in folders:
        if not any(map(is_png, path.iterdir())):
            raise UserError(f"{path} holds no PNG file; expected {folder}/SEQUENCE/FRAME.png")
    return sequences


def _read(masklets: Masklets, name: str, pair: Pair) -> Frame:
    """The frame, which must have the size of the first true one."""
    frame = masklets.read(name)
    if frame.size != pair.true.first.size:
        found, first = (f"{height} x {width}" for height, width in (frame.size, pair.true.first.size))
        raise UserError(
            f"{masklets.place(name)} is {found} pixels (height x width), but {pair.true.place(pair.true.names[0])} "
            f"is {first}: masks are compared pixel by pixel, so save predictions at the size of the true masks"
        )
    return frame


def _without(frame: Frame, void: frozenset[int]) -> Frame:
    return Frame(frame.size, {number: mask for number, mask in frame.masks.items() if number not in void})


def _joined(frame: Frame) -> Frame:
    """The frame with all its ids as one object."""
    joined = np.zeros(frame.size, bool)
    for mask in frame.masks.values():
        joined |= mask
    return Frame(frame.size, {JOINED: joined})
