"""Tracking a video by SAM 2 here and by `transformers`: `python -m benchmarks.sam2_video`.

Both sides get the same weights (drawn, in a directory that both read), the same frames as arrays, the same mask on the
first one, and two processor cores; each gives out a mask of the frame's own size for every frame. Resizing of frames
and masks counts, loading and compiling do not: every side tracks the video once before it is timed, and the best of
the rounds counts. Sides take turns, each in a process of its own, whose peak of resident memory is reported.

    python -m benchmarks.sam2_video --models sam2.1_hiera_tiny --sides-px 512 --frames 16
    python -m benchmarks.sam2_video --device cuda --dtype bfloat16            # the same on one GPU
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

HEIGHT, WIDTH = 480, 854
CORES = 2


@dataclass(frozen=True)
class Args:
    """Measure and print the table."""

    models: tuple[str, ...] = ("sam2.1_hiera_tiny", "sam2.1_hiera_base_plus")
    sides_px: tuple[int, ...] = (512, 1024)
    """Of the square pictures that the model sees."""
    frames: int = 24
    objects: int = 1
    rounds: int = 2
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    side: Literal["", "ours", "reference"] = ""
    """Only this side of the first model at the first size, from `directory`; prints JSON."""
    directory: str = ""


def video(frames: int, objects: int) -> tuple[np.ndarray, np.ndarray]:
    """(frames (frames, height, width, 3), masks of the objects on the first (objects, height, width))."""
    from data_loaders.synthetic.videos import SyntheticVideos
    from data_loaders.synthetic.videos_config import VideoConfig

    config = VideoConfig(height=HEIGHT, width=WIDTH, frames=frames, objects=(objects, objects), alike=(0, 0))
    drawn = SyntheticVideos(0, 1, config).video(0)
    return drawn.frames, drawn.masks[0, :objects]


def track_here(args: Args) -> Callable[[], Iterator[np.ndarray]]:
    """Something that tracks the video when called, frame by frame."""
    from tracevision_jax.inference.tracker import Tracker

    frames, masks = video(args.frames, args.objects)
    tracker = Tracker.load(args.directory, dtype=args.dtype)

    def run() -> Iterator[np.ndarray]:
        with tracker.session(frames) as session:
            for number, mask in enumerate(masks, start=1):
                session.add(number, mask=mask)
            for result in session.run():
                yield np.stack([result.masks[number] for number in session.objects])

    return run


def track_there(args: Args) -> Callable[[], Iterator[np.ndarray]]:
    """The same by `transformers`, whose processor for videos needs torchvision: its resizing is written out here."""
    import torch
    from torch.nn.functional import interpolate
    from transformers import Sam2VideoModel
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

    from tracevision_jax.vision.sam_preprocess import IMAGENET_MEAN, IMAGENET_STD

    torch.set_num_threads(CORES)
    frames, masks = video(args.frames, args.objects)
    dtype = getattr(torch, args.dtype)
    model = Sam2VideoModel.from_pretrained(args.directory, dtype=dtype).eval().to(args.device)  # pyright: ignore
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    size = (args.sides_px[0], args.sides_px[0])

    def prepared(frame: np.ndarray) -> torch.Tensor:
        values = torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 255
        return (interpolate(values, size, mode="bilinear", antialias=True)[0] - mean) / std

    def run() -> Iterator[np.ndarray]:
        with torch.inference_mode():
            pixels = torch.stack([prepared(frame) for frame in frames])
            session = Sam2VideoInferenceSession(pixels, HEIGHT, WIDTH, inference_device=args.device, dtype=dtype)
            for number, mask in enumerate(masks):
                session.obj_id_to_idx(number)
                square = interpolate(torch.from_numpy(mask)[None, None].float(), size) > 0.5
                session.add_mask_inputs(number, 0, square.to(args.device, dtype))
            session.obj_with_new_inputs = list(range(len(masks)))
            for out in model.propagate_in_video_iterator(session, start_frame_idx=0):
                small: Any = out.pred_masks
                large = interpolate(small.float(), (HEIGHT, WIDTH), mode="bilinear")
                yield (large[:, 0] > 0).cpu().numpy()

    return run


def measure_side(args: Args) -> dict[str, float]:
    """Frames a second, the best of the rounds, and the most memory that this process held, MiB."""
    if args.device == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    run = (track_here if args.side == "ours" else track_there)(args)
    shortest = float("inf")
    for number in range(1 + args.rounds):
        start = time.perf_counter()
        count = sum(1 for _ in run())
        if count != args.frames:
            raise RuntimeError(f"{args.side} gave {count} of {args.frames} frames")
        if number:
            shortest = min(shortest, time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"frames_per_s": args.frames / shortest, "peak_mib": peak}


def write_weights(name: str, side_px: int, directory: Path) -> None:
    """A model of this size with weights drawn at random, as `transformers` keeps it."""
    import jax

    from tracevision_jax.hosts.sam import SegmentAnything, init_params
    from tracevision_jax.hosts.sam_presets import sam_preset
    from tracevision_jax.segmentation.sam_config import hugging_face
    from tracevision_jax.weights.sam import save

    config = sam_preset(name).with_image_size(side_px)
    config = type(config)(config.vision, hugging_face(config.heads))
    save(directory, init_params(SegmentAnything(config), jax.random.key(0)), config)


def run_side(args: Args, side: str, name: str, side_px: int, directory: Path) -> dict[str, float]:
    """Measure one side in a process of its own."""
    numbers = {"frames": args.frames, "objects": args.objects, "rounds": args.rounds}
    flags = [word for flag, value in numbers.items() for word in (f"--{flag}", str(value))]
    command = [sys.executable, "-m", "benchmarks.sam2_video", "--models", name, "--sides-px", str(side_px), *flags]
    command += ["--device", args.device, "--dtype", args.dtype, "--side", side, "--directory", str(directory)]
    # Each side has the accelerator for itself.
    environment = os.environ | {"JAX_PLATFORMS": args.device, "OMP_NUM_THREADS": str(CORES)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} of {name} at {side_px} px ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(args: Args, directory: Path) -> Iterator[dict[str, Any]]:
    """One record a model and size."""
    for name in args.models:
        for side_px in args.sides_px:
            place = directory / f"{name}_{side_px}"
            # In a process of its own: it would hold the accelerator, and memory.
            code = "import sys, pathlib; from benchmarks.sam2_video import write_weights as w"
            code += "; w(sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3]))"
            subprocess.run([sys.executable, "-c", code, name, str(side_px), str(place)], check=True)
            measured = {side: run_side(args, side, name, side_px, place) for side in ("ours", "reference")}
            yield {"model": name, "side_px": side_px, **measured}


def main(args: Args) -> None:
    """Print a row as soon as it is there, and at the end the table."""
    if args.side:
        print(json.dumps(measure_side(args)))
        return
    where = f"{CORES} cores" if args.device == "cpu" else "one GPU"
    table = Table(title=f"SAM 2.1, {args.frames} frames of {WIDTH} x {HEIGHT}, {where}, {args.dtype}")
    for heading in ("model", "px", "ours, frames/s", "transformers", "ratio", "ours, peak MiB", "transformers"):
        table.add_column(heading, justify="right")
    with tempfile.TemporaryDirectory() as directory:
        for record in compare(args, Path(directory)):
            ours, reference = record["ours"], record["reference"]
            row = [record["model"], str(record["side_px"])]
            row += [f"{ours['frames_per_s']:.2f}", f"{reference['frames_per_s']:.2f}"]
            row += [f"{ours['frames_per_s'] / reference['frames_per_s']:.2f}"]
            row += [f"{ours['peak_mib']:,.0f}", f"{reference['peak_mib']:,.0f}"]
            print("  ".join(row), file=sys.stderr, flush=True)
            table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main(tyro.cli(Args))
