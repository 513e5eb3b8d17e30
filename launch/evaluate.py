"""Run benchmarks on a checkpoint: resumable, with tables in Markdown and JSON and a record of every answer."""

import json as json_format
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from tracevision_jax.errors import UserError


@dataclass(frozen=True)
class Args:
    """Run benchmarks on a checkpoint.

    OUT gets a file of records for each benchmark (NAME.jsonl: prompt, prediction, truth and scores of every answer),
    results.md and results.json. Interrupt it at any time: the same command asks only what is left.

    Benchmarks on synthetic scenes: trace_captioning, trace_prediction, traced_object, refer_box, refer_segment,
    trace_segment. On Localized Narratives (--data): ln_coco, ln_ade20k, ln_flickr30k, ln_open_images.

    Examples:
      tracevision evaluate checkpoints/tracevision-7b --benchmark ln_coco --data /data/tfds --tensor 4
      tracevision evaluate runs/demo/stage2 --benchmark trace_prediction traced_object --limit 200
      tracevision evaluate runs/demo/stage2 --benchmark refer_segment --split test --out results/masks
    """

    checkpoint: tyro.conf.Positional[str]
    """Model directory, folder of a run, or a Qwen2.5-VL."""
    benchmark: tuple[str, ...]
    """Names of benchmarks."""
    split: str = "val"
    """Of the data."""
    limit: int | None = None
    """Only the first so many samples; by default 200 of synthetic scenes, all of a dataset."""
    out: Path | None = None
    """Folder for results; by default runs/evaluation/NAME OF THE CHECKPOINT."""
    data: Path | None = None
    """Folder of the dataset: built by `tracevision data build`, or the released files."""
    images: Path | None = None
    """Folder of the images of released files, where it is another one."""
    rows: int = 50
    """Answers that are written at a time."""
    blind_traces: bool = False
    """Simplify traces without the words spoken over them, as a user's trace is; the paper's data use the words."""
    dtype: str | None = None
    """float32, bfloat16 or float16; as stored by default."""
    tensor: int = 1
    """Devices that share every layer; all others take rows of their own."""


def run(args: Args) -> int:
    """Evaluate, print the tables, write them.

    Raises:
        UserError: an unknown benchmark, or data or a checkpoint that cannot be used.
    """
    from configs import benchmarks

    if not args.benchmark:
        raise UserError(f"--benchmark needs a name, such as {next(iter(benchmarks.BENCHMARKS))}")
    chosen = {name: benchmarks.get(name) for name in args.benchmark}
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is {args.limit}, must be at least 1")
    if args.rows < 1:
        raise UserError(f"--rows is {args.rows}, must be at least 1")

    import jax

    from evaluation.sweep import Sweep
    from evaluation.tables import as_json, markdown
    from tracevision_jax.inference.engine import Engine
    from tracevision_jax.inference.loading import fingerprint, read_checkpoint
    from tracevision_jax.parallel.mesh import MeshConfig
    from tracevision_jax.records.processor import Processor

    mesh = MeshConfig(tensor=args.tensor) if jax.device_count() > 1 or args.tensor > 1 else None
    checkpoint = read_checkpoint(args.checkpoint, mesh=mesh, dtype=args.dtype)
    for part in checkpoint.drawn:
        print(f"warning: {part} of {args.checkpoint}: drawn at random, not trained", file=sys.stderr)
    scenes = benchmarks.scenes_of_recipe(checkpoint.recipe) or benchmarks.SceneConfig()
    data = benchmarks.BenchmarkData(args.split, args.data, args.images, scenes)
    opened = {name: benchmark.open(data) for name, benchmark in chosen.items()}
    config, words = checkpoint.system.config, checkpoint.vocabulary
    engine = Engine(config, checkpoint.params, words, mesh=checkpoint.mesh)
    folder = args.out or Path("runs/evaluation") / checkpoint_name(args.checkpoint)
    sweep = Sweep(engine, Processor(words, config.processor), folder, fingerprint(args.checkpoint), args.rows)
    tables, skipped = {}, {}
    for name, benchmark in chosen.items():
        for result, task in benchmark.tasks(args.blind_traces).items():
            outcome = sweep.run(result, task, opened[name], args.limit or benchmark.limit)
            tables[result], skipped[result] = outcome.tables, dict(outcome.skipped)
    asked = {"checkpoint": args.checkpoint, "split": args.split, "limit": args.limit, "blind": args.blind_traces}
    content = {**asked, "skipped": skipped, "results": as_json(tables)}
    (folder / "results.json").write_text(json_format.dumps(content, indent=2, allow_nan=False) + "\n")
    title = f"{args.checkpoint}, split {args.split}" + (f", first {args.limit} samples" if args.limit else "")
    text = markdown(tables, title)
    (folder / "results.md").write_text(text, encoding="utf-8")
    print(text, end="")
    print(f"wrote records, results.md and results.json to {folder}", file=sys.stderr)
    return 0


def checkpoint_name(path: str) -> str:
    """What to call results of a checkpoint: its folder, or that of the run that exported it."""
    folder = Path(path).resolve()
    return folder.parent.name if folder.name == "model" else folder.name
