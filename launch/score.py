"""Score anybody's predictions from files: `lbm` traces, `captions` texts, `masks` masks, `jf` masks of videos.

Each takes two JSON files with the same ids, or for videos two folders, prints a table, or with --json JSON alone,
and refuses malformed files with the entry and the reason.

  tracevision score lbm --predictions p.json --references r.json --k 0 1
  tracevision score captions --predictions p.json --references r.json
  tracevision score masks --predictions p.json --references r.json --json
  tracevision score jf --predictions results --masks DAVIS/Annotations/480p
"""

import json as json_format
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tracevision_jax.errors import UserError


@dataclass(frozen=True)
class Lbm:
    """Score traces: local bipartite matching distance, lower is better.

    Each file is a JSON object: id -> list of boxes [x1, y1, x2, y2], or of points [x, y], in [0, 1]; a point
    counts as a box without area. A fifth number is a box's area: a reference box whose area is exactly 1
    stands for a word without a trace and is dropped. An id without any other reference box is skipped (null
    in JSON).

    Examples:
      tracevision score lbm --predictions p.json --references r.json --k 0
      tracevision score lbm --predictions p.json --references r.json --k 0 1 --json
    """

    predictions: Path
    """JSON file: id -> list of boxes or points."""
    references: Path
    """JSON file: id -> list of boxes or points."""
    k: tuple[int, ...] = (0,)
    """Windows of the matching; for several, JSON holds one object each, under its k."""
    json: bool = False
    """Print {"lbm": mean over ids, "samples": {id: value}} and nothing else."""


@dataclass(frozen=True)
class Captions:
    """Score captions: BLEU-1 to 4, METEOR, ROUGE-L, CIDEr, SPICE, as COCO's evaluation computes them.

    Predictions are a JSON object id -> text, references id -> list of texts. All metrics use the tokens of
    the Stanford PTB tokenizer, which needs Java; what cannot run is null, with the reason.

    Examples:
      tracevision score captions --predictions p.json --references r.json
      tracevision score captions --predictions p.json --references r.json --tokenizer simple --json
    """

    predictions: Path
    """JSON file: id -> text."""
    references: Path
    """JSON file: id -> list of texts."""
    tokenizer: Literal["ptb", "simple"] = "ptb"
    """"simple" (lower-cased words) needs no Java, but its scores compare only with each other."""
    java_timeout_s: float = 1800.0
    """Seconds that each Java program (tokenizer, METEOR, SPICE) may take."""
    json: bool = False
    """Print the metrics, the tokenizer and the reasons as JSON and nothing else."""


@dataclass(frozen=True)
class Masks:
    """Score masks: gIoU (mean IoU over ids) and cIoU (sum of intersections over sum of unions).

    Each file is a JSON object: id -> COCO RLE {"size": [height, width], "counts": string or list}. The IoU of
    two empty masks is 1.

    Examples:
      tracevision score masks --predictions p.json --references r.json
      tracevision score masks --predictions p.json --references r.json --union-epsilon 1e-5 --json
    """

    predictions: Path
    """JSON file: id -> COCO RLE."""
    references: Path
    """JSON file: id -> COCO RLE."""
    union_epsilon: float = 0.0
    """Pixels added to each union before dividing; LISA's evaluation adds 1e-5."""
    json: bool = False
    """Print {"gIoU": ..., "cIoU": ..., "samples": {id: IoU}} and nothing else."""


@dataclass(frozen=True)
class Jf:
    """Score masks of videos: J (region) and F (boundary), their recall and decay, as DAVIS's semi-supervised track.

    Both folders hold SEQUENCE/FRAME.png, a palette PNG (or 8-bit grey) whose values are object ids; or SA-V's JSON,
    a file a video. Objects are the ids of a sequence's first true mask, matched by id; the first and the last frame
    are not scored, and predictions need not have them. Scores are means over objects. A sequence with nothing to
    score has null in JSON and enters no mean.

    Examples:
      tracevision score jf --predictions results --masks DAVIS/Annotations/480p
      tracevision score jf --predictions results --masks masks --binary --json
    """

    predictions: Path
    """Folder of predicted masks."""
    masks: Path
    """Folder of true masks."""
    binary: bool = False
    """Join all ids of a frame into one object."""
    json: bool = False
    """Print {"J": ..., "F": ..., "J&F": ..., "J-recall": ..., "J-decay": ..., "F-recall": ..., "F-decay": ...,
    "sequences": {name: {the same}}} and nothing else."""


Args = Lbm | Captions | Masks | Jf


def run(args: Args) -> int:
    """Score the files and print; returns the exit status.

    Raises:
        UserError: a file is malformed, or a flag has no meaning.
    """
    if isinstance(args, Lbm):
        return _run_lbm(args)
    if isinstance(args, Captions):
        return _run_captions(args)
    if isinstance(args, Masks):
        return _run_masks(args)
    return _run_jf(args)


def _run_lbm(args: Lbm) -> int:
    import numpy as np

    from evaluation.metrics import files, lbm

    windows = list(dict.fromkeys(args.k))
    if not windows or min(windows) < 0:
        raise UserError(f"--k takes whole numbers from 0 on, such as --k 0 1, but got {args.k}")
    predictions, references = files.read_pair(
        args.predictions, args.references, files.check_predicted_trace, files.check_trace
    )
    values = {
        window: np.array([lbm.trace_lbm(predictions[name], references[name], window) for name in references])
        for window in windows
    }
    skipped = int(np.isnan(values[windows[0]]).sum())
    if skipped == len(references):
        raise UserError(f"{args.references}: no id has a box or point to compare with, so there is no mean")
    results = {
        window: {
            "lbm": lbm.mean_over_traces(scores),
            "samples": {
                name: None if np.isnan(score) else float(score) for name, score in zip(references, scores, strict=True)
            },
        }
        for window, scores in values.items()
    }
    if args.json:
        single = results[windows[0]] if len(windows) == 1 else None
        return _print_json(single or {str(window): result for window, result in results.items()})
    _print_table(
        "LBM, lower is better",
        ("k", "mean over ids", f"mean over batches of {lbm.MITR_BATCH_SIZE} (MITR)", "ids", "skipped"),
        [
            (
                str(window),
                f"{results[window]['lbm']:.4f}",
                f"{lbm.mean_over_batches(scores):.4f}",
                str(len(scores) - skipped),
                str(skipped),
            )
            for window, scores in values.items()
        ],
        [f"Predicted {_shapes(predictions.values())} against true {_shapes(references.values())}."],
    )
    return 0


def _shapes(traces) -> str:
    """What traces are made of, which every table of LBM must say: boxes, or points taken as boxes."""
    kinds = {"points (boxes without area)" if trace.shape[1] == 2 else "boxes" for trace in traces}
    return " and ".join(sorted(kinds))


def _run_captions(args: Captions) -> int:
    from rich.console import Console

    from evaluation.metrics import captions, files

    if not args.java_timeout_s > 0:
        raise UserError(f"--java-timeout-s must be above 0, but is {args.java_timeout_s}")
    predictions, references = files.read_pair(
        args.predictions, args.references, files.check_caption, files.check_captions
    )
    with Console(stderr=True).status(f"Scoring {len(references)} captions"):
        scores = captions.score_captions(predictions, references, args.tokenizer, args.java_timeout_s)
    if args.json:
        return _print_json(scores.as_json())
    _print_table(
        f"Captions, {args.tokenizer} tokens",
        ("metric", "score"),
        [(name, "not computed" if value is None else f"{value:.4f}") for name, value in scores.values.items()],
        [*_grouped(scores.reasons), *scores.notes, f"{len(references)} ids."],
    )
    return 0


def _grouped(reasons: dict[str, str]) -> list[str]:
    """Each reason once, with the metrics that it holds for."""
    metrics: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        metrics.setdefault(reason, []).append(name)
    return [f"{', '.join(names)} not computed: {reason}." for reason, names in metrics.items()]


def _run_masks(args: Masks) -> int:
    import numpy as np

    from evaluation.metrics import files, masks, run_lengths

    if not 0 <= args.union_epsilon < float("inf"):
        raise UserError(f"--union-epsilon must be 0 or a small positive number, but is {args.union_epsilon}")
    predictions, references = files.read_pair(args.predictions, args.references, run_lengths.parse, run_lengths.parse)
    overlaps, problems = [], []
    for name, true in references.items():
        try:
            overlaps.append(run_lengths.overlap_areas(predictions[name], true))
        except ValueError as error:
            problems.append(f"entry {files.quoted(name)}: {error}")
    files.refuse(problems)
    intersections, unions = np.array(overlaps).T
    values = masks.iou(intersections, unions, args.union_epsilon)
    giou = masks.giou(intersections, unions, args.union_epsilon)
    ciou = masks.ciou(intersections, unions)
    if args.json:
        samples = dict(zip(references, values.tolist(), strict=True))
        return _print_json({"gIoU": giou, "cIoU": ciou, "samples": samples})
    convention = f", {args.union_epsilon:g} pixels added to each union" if args.union_epsilon else ""
    _print_table(
        "Masks",
        ("metric", "score"),
        [("gIoU", f"{giou:.4f}"), ("cIoU", f"{ciou:.4f}")],
        [f"{len(values)} ids; the IoU of two empty masks is 1{convention}."],
    )
    return 0


def _run_jf(args: Jf) -> int:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from evaluation.metrics import files, video, video_scoring

    pairs, notes = video_scoring.open_pairs(args.predictions, args.masks)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    results = {}
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Scoring frames", total=sum(len(pair.scored) for pair in pairs))
        for pair in pairs:
            results[pair.name] = video_scoring.score_pair(pair, args.binary, lambda: progress.advance(task))
    notes += [note for result in results.values() for note in result.notes]
    objects = [scores for result in results.values() for scores in result.objects.values()]
    if not objects:
        raise UserError("there is nothing to score:\n  " + "\n  ".join(notes))
    overall = video.mean_scores(objects).named()
    undefined = dict.fromkeys(overall)
    sequences = {
        name: video.mean_scores(list(result.objects.values())).named() if result.objects else undefined
        for name, result in results.items()
    }
    if args.json:
        for note in notes:
            print(note, file=sys.stderr)
        return _print_json({**overall, "sequences": sequences})
    rows: list[tuple[str, Mapping[str, float | None]]] = [("all objects", overall)]
    for name, result in results.items():
        rows.append((escape(name), sequences[name]))
        if len(result.objects) > 1:
            rows += [(f"  object {number}", scores.named()) for number, scores in result.objects.items()]
    _print_table(
        "Masks of videos, semi-supervised",
        ("sequence", *(name.replace("-", "\n") for name in overall)),
        [(name, *("-" if value is None else f"{value:.4f}" for value in scores.values())) for name, scores in rows],
        [f"Means over {files.counted(len(objects), 'object')} of {files.counted(len(results), 'sequence')}.", *notes],
    )
    return 0


def _print_json(value: Any) -> int:
    print(json_format.dumps(value, indent=2, allow_nan=False))
    return 0


def _print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False)
