"""What tracking scores on a real video for which no model was trained: two floors, and predictions beside them.

    python -m benchmarks.video_floors VIDEO --masks MASKS [--predictions tracked/masks/NAME]

MASKS is a folder of one PNG a frame (all ids are one object). The floors know the first mask, as a tracker does: one
keeps it for all frames, the other moves it from frame to frame by dense optical flow (DIS of OpenCV, at its medium
preset; `pip install opencv-python-headless`). All are scored by J and F, semi-supervised, without the first and the
last frame.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from jaxtyping import Bool, UInt8
from PIL import Image
from rich.console import Console
from rich.table import Table
from scipy.ndimage import map_coordinates

from evaluation.metrics import video
from evaluation.metrics.video_files import DavisMasklets
from evaluation.metrics.video_scoring import Pair, score_pair
from tracevision_jax.errors import UserError
from tracevision_jax.inference.frames import open_frames


@dataclass(frozen=True)
class Args:
    """Score the floors, and predictions."""

    video: tyro.conf.Positional[Path]
    """Video file, or folder of pictures."""
    masks: Path
    """True masks, a PNG a frame, named in the order of frames."""
    predictions: tuple[Path, ...] = ()
    """Folders of predicted masks, of the same names."""


def moved(
    mask: Bool[np.ndarray, "height width"], before: UInt8[np.ndarray, "height width"], now: UInt8[np.ndarray, "h w"]
) -> Bool[np.ndarray, "height width"]:
    """A mask moved from one grey frame to the next: each pixel looks where it was."""
    try:
        import cv2  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("the floor by optical flow needs OpenCV: pip install opencv-python-headless") from error
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(now, before, None)  # pyright: ignore
    rows, columns = np.mgrid[: mask.shape[0], : mask.shape[1]]
    places = (rows + flow[..., 1], columns + flow[..., 0])
    return map_coordinates(mask.astype(np.float32), places, order=1, mode="nearest") > 0.5


def floors(frames: Iterator[np.ndarray], first: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """Of each frame the masks of both floors."""
    mask, before = first, None
    for frame in frames:
        grey = np.asarray(Image.fromarray(frame).convert("L"))
        if before is not None:
            mask = moved(mask, before, grey)
        before = grey
        yield {"the first mask, kept": first, "the first mask, moved by optical flow": mask}


def main(args: Args) -> None:
    """Print the table."""
    true = DavisMasklets(args.masks)
    first = np.logical_or.reduce([true.first.mask(number) for number in true.first.masks])
    places = {str(path): path for path in args.predictions}
    with tempfile.TemporaryDirectory() as directory:
        for name, masks in zip(true.names, floors(open_frames(args.video).frames(), first), strict=False):
            for floor, mask in masks.items():
                places[floor] = Path(directory) / floor
                places[floor].mkdir(exist_ok=True)
                Image.fromarray(mask.astype(np.uint8)).save(places[floor] / f"{name}.png")
        table = Table("masks", "J&F", "J", "F")
        for name, folder in places.items():
            pair = Pair(name, true, DavisMasklets(folder))
            scores = video.mean_scores(list(score_pair(pair, binary=True).objects.values())).named()
            table.add_row(name, *(f"{scores[figure]:.3f}" for figure in ("J&F", "J", "F")))
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Args))
