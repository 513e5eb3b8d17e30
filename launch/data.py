"""Build and inspect datasets: `build` makes TFDS datasets of released files, `export-synthetic` writes drawn
scenes in the released format, `show` draws one record.

  tracevision data build ln_coco --from /data/localized_narratives --images /data/coco --to /data/tfds
  tracevision data export-synthetic --to /data/scenes --count 1000
  tracevision data show /data/tfds/ln_coco --split val --index 7 --out seven.png
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from tracevision_jax.errors import UserError
from tracevision_jax.nearest import suggest

if TYPE_CHECKING:
    from data_loaders.sources.protocol import Source
    from tracevision_jax.records.sample import Sample

BUILT = ("ln_coco", "ln_ade20k", "ln_flickr30k", "ln_open_images")


@dataclass(frozen=True)
class Build:
    """Build a TFDS dataset (ArrayRecord files and a length index) for training at scale.

    NAME is ln_coco, ln_ade20k, ln_flickr30k or ln_open_images. The released JSON-lines files are looked for
    in --from and two levels below. Interrupt it at any time: the same command continues. Records that
    cannot be used (missing or damaged images, malformed lines) are left out and listed beside the result.

    Read the result with `tfds.data_source(NAME, data_dir=TO, split=...)`, or name it in a recipe.

    Examples:
      tracevision data build ln_coco --from /data/localized_narratives --images /data/coco --to /data/tfds
      tracevision data build ln_open_images --from /data/oi --to /data/tfds --splits val test --workers 32
    """

    name: tyro.conf.Positional[str]
    """Dataset."""
    from_: Annotated[Path, tyro.conf.arg(name="from")]
    """Folder of the narratives files, and of the images unless --images says otherwise."""
    to: Path
    """Folder of TFDS datasets; the result is TO/NAME/1.0.0."""
    images: Path | None = None
    """Folder of the images."""
    splits: tuple[str, ...] = ()
    """Of train, val, test; all that are found by default."""
    workers: int = 0
    """Threads that read and check images; 0 is one a core."""
    shard_records: int = 2048
    """Records a file. A build continues only with the number it started with."""


@dataclass(frozen=True)
class ExportSynthetic:
    """Write drawn scenes as a Localized Narratives dataset: released JSON lines, and folders of images.

    The file NAME.sidecar.jsonl beside them carries what the format cannot hold: regions with masks and boxes,
    and questions with answers.

    Examples:
      tracevision data export-synthetic --to /data/scenes --count 1000 --held-out 200
      tracevision data export-synthetic --to /data/scenes --count 50 --questions what which_trace dialogue
    """

    to: Path
    """Folder to write to."""
    count: int = 1000
    """Scenes of the train split; 0 writes none."""
    held_out: int = 0
    """Scenes of the val split, of another seed."""
    seed: int = 0
    """Of the train split; the val split has the next one."""
    size: tuple[int, int] = (128, 128)
    """Height and width in pixels."""
    questions: tuple[str, ...] = ("what", "colour", "shape", "which_trace", "box", "segment", "dialogue")
    """Kinds of questions."""
    questions_per_scene: int = 4
    image_format: Literal["png", "jpg"] = "png"
    """PNG keeps every pixel."""


@dataclass(frozen=True)
class Show:
    """Draw one record: its trace by time, masks and boxes, with caption and questions printed.

    SOURCE is "synthetic", a dataset built by `tracevision data build`, a narratives file (.jsonl), or a
    folder of those.

    Examples:
      tracevision data show synthetic --index 7 --out seven.png
      tracevision data show synthetic --index 7 --frames 6
      tracevision data show /data/tfds/ln_coco --split val --index 7
      tracevision data show /data/ln/coco_val_localized_narratives.jsonl --images /data/coco --index 7
    """

    source: tyro.conf.Positional[str]
    """Where the record is."""
    index: int = 0
    """Number of the record, from 0."""
    out: Path | None = None
    """PNG file; by default record-INDEX.png in the current folder."""
    split: str = "train"
    """Of a built dataset, or of a folder."""
    images: Path | None = None
    """Folder of the images of a narratives file; by default the file's own."""
    dataset: str = "coco"
    """How the images of a narratives file are named: coco, ade20k, flickr30k, open_images."""
    seed: int = 0
    """Of synthetic scenes."""
    frames: int = 1
    """Of synthetic scenes; more than one makes videos."""


Args = (
    Annotated[Build, tyro.conf.subcommand("build")]
    | Annotated[ExportSynthetic, tyro.conf.subcommand("export-synthetic")]
    | Annotated[Show, tyro.conf.subcommand("show")]
)


def run(args: Build | ExportSynthetic | Show) -> int:
    """Do the command.

    Raises:
        UserError: a name, folder or file is wrong.
    """
    if isinstance(args, Build):
        return _build(args)
    if isinstance(args, ExportSynthetic):
        return _export(args)
    return _show(args)


def _build(args: Build) -> int:
    from rich.console import Console

    from data_loaders.sources.localized_narratives import LocalizedNarratives
    from data_loaders.sources.released_files import narrative_files
    from data_loaders.tfds_builders.build import Target, build_split
    from data_loaders.tfds_builders.narratives import VERSION, NarrativeInput, narrative_features

    if args.name not in BUILT:
        raise UserError(f"no dataset '{args.name}' to build.{suggest(args.name, BUILT)} Known: {', '.join(BUILT)}")
    if args.shard_records < 1 or args.workers < 0:
        raise UserError("--shard-records must be at least 1, and --workers at least 0")
    if any(re.match(r"\w+:/", str(folder)) for folder in (args.to, args.from_)):
        raise UserError("build between local (or mounted) folders, then copy the result to the bucket")
    dataset = args.name.removeprefix("ln_")
    found = narrative_files(args.from_, dataset)
    missing = [split for split in args.splits if split not in found]
    if missing:
        raise UserError(f"no {missing[0]} split of {args.name} in {args.from_}: found {', '.join(found)}")
    console = Console(stderr=True)
    target = Target(args.to / args.name / VERSION, args.name)
    for split in args.splits or tuple(found):
        source = LocalizedNarratives([str(file) for file in found[split]], args.images or args.from_, dataset)
        built = build_split(
            NarrativeInput(source),
            narrative_features(),
            target,
            split,
            args.workers or os.cpu_count() or 1,
            args.shard_records,
            console,
        )
        left_out = f"; {built.bad:,} left out, see {target.bad_records(split)}" if built.bad else ""
        print(f"{split}: {built.records:,} records, {built.shards} files, {built.bytes / 1e6:,.1f} MB{left_out}")
    print(f"{args.name} is in {target.folder}: tfds.data_source('{args.name}', data_dir='{args.to}')")
    return 0


def _export(args: ExportSynthetic) -> int:
    from data_loaders.synthetic.config import SceneConfig
    from data_loaders.synthetic.export import export_narratives
    from data_loaders.synthetic.scenes import SyntheticScenes

    if min(args.count, args.held_out) < 0 or not args.count + args.held_out:
        raise UserError("nothing to export: give --count or --held-out scenes")
    height, width = args.size
    config = SceneConfig(
        height=(height, height),
        width=(width, width),
        questions=args.questions,
        questions_per_scene=args.questions_per_scene if args.questions else 0,
    )
    first = 1
    for split, seed, count in (("train", args.seed, args.count), ("val", args.seed + 1, args.held_out)):
        if count:
            scenes = SyntheticScenes(seed, count, config)
            print(f"{count:,} scenes: {export_narratives(scenes, args.to, split, args.image_format, first)}")
            first += count
    return 0


def _show(args: Show) -> int:
    from tracevision_jax.records.sample import BadRecord

    source = _open(args)
    if not 0 <= args.index < len(source):
        raise UserError(f"no record {args.index}: {args.source} has {len(source):,}, counted from 0")
    try:
        sample = source[args.index]
    except BadRecord as bad:
        raise UserError(f"record {args.index} cannot be used: {bad}") from bad
    out = args.out or Path(f"record-{args.index}.png")
    try:
        _drawn(sample).save(out)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {out}: {error}") from error
    print(f"{sample.id} of {sample.source}: {_described(sample)}")
    print(sample.caption)
    for question in sample.questions:
        print(f"[{question.kind}] " + " / ".join(_written(turn.parts) for turn in question.turns))
    print(f"tasks: {', '.join(sorted(sample.tasks))}")
    print(f"drawn to {out}")
    return 0


def _open(args: Show) -> "Source":
    """The source that the user means."""
    from data_loaders.sources.localized_narratives import LocalizedNarratives
    from data_loaders.sources.released_files import narrative_files
    from data_loaders.sources.synthetic import SyntheticSource
    from data_loaders.sources.tfds import TfdsNarratives
    from data_loaders.synthetic.config import QUESTION_KINDS, SceneConfig

    path = Path(args.source)
    if args.source == "synthetic":
        config = SceneConfig(frames=args.frames, questions=QUESTION_KINDS, questions_per_scene=4)
        return SyntheticSource(args.seed, 1 << 31, config)
    if path.is_file() or any(letter in args.source for letter in "*?"):
        return LocalizedNarratives(args.source, args.images or path.parent, args.dataset)
    if not path.is_dir():
        raise UserError(f"no source '{args.source}': give synthetic, a narratives file, or a folder")
    if any(path.glob("*.jsonl")) and not (path / "build.json").exists():
        found = narrative_files(path, args.dataset)
        if args.split not in found:
            raise UserError(f"no {args.split} split in {path}: it has {', '.join(found)}")
        return LocalizedNarratives([str(file) for file in found[args.split]], args.images or path, args.dataset)
    return TfdsNarratives(path, args.split)


def _drawn(sample: "Sample"):
    """The record's picture: masks, boxes and trace; of a video all frames."""
    import numpy as np

    from tracevision_jax.inference.pictures import draw_boxes, draw_trace, overlay_masks
    from tracevision_jax.inference.pictures_sheets import contact_sheet, draw_trace_on_frames

    phrases = [region.phrase for region in sample.regions]
    frames = []
    for number, frame in enumerate(sample.frames):
        masks = [region.mask[number] for region in sample.regions if region.mask is not None]
        picture = overlay_masks(frame, np.stack(masks)) if masks else frame
        if sample.regions:
            picture = draw_boxes(picture, np.stack([region.box[number] for region in sample.regions]), phrases)
        frames.append(picture)
    points = np.concatenate([np.zeros((0, 3)), *sample.strokes])
    if len(frames) == 1:
        return draw_trace(frames[0], points)
    rate = sample.frames_per_second
    if len(points):
        frames = draw_trace_on_frames(np.stack([np.asarray(frame) for frame in frames]), points, rate)
    return contact_sheet(frames, [number / rate for number in range(len(frames))])


def _described(sample: "Sample") -> str:
    height, width = sample.size
    points = sum(len(stroke) for stroke in sample.strokes)
    seconds = max((float(stroke[:, 2].max()) for stroke in sample.strokes), default=0.0)
    parts = [f"{width} x {height} pixels"]
    if len(sample.frames) > 1:
        parts.append(f"{len(sample.frames)} frames at {sample.frames_per_second:g} a second")
    parts.append(f"{len(sample.words)} timed words")
    strokes = "1 stroke" if len(sample.strokes) == 1 else f"{len(sample.strokes)} strokes"
    parts.append(f"{points} trace points in {strokes}, {seconds:.1f} s")
    if sample.regions:
        parts.append(f"{len(sample.regions)} regions")
    return ", ".join(parts)


def _written(parts) -> str:
    """Parts of a turn as text."""
    from tracevision_jax.records.sample import BoxPart, PhrasePart, TracePart

    words = []
    for part in parts:
        if isinstance(part, str):
            words.append(part.strip())
        elif isinstance(part, PhrasePart):
            words.append(part.text)
        elif isinstance(part, TracePart):
            words.append(f"<trace of {len(part.points)} points>")
        elif isinstance(part, BoxPart):
            words.append("<box " + " ".join(f"{value:.2f}" for value in part.box) + ">")
        else:
            words.append("<mask>")
    return " ".join(words)
