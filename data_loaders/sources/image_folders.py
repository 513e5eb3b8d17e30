"""Where the images of Localized Narratives lie: the usual folders of COCO, ADE20k, Flickr30k and Open Images.

A record names its image by an id (COCO: without leading zeros; Open Images: in hexadecimal; the others: by
the stem of the file). The layouts tried are those of the data sets' own archives, and one flat folder.
"""

from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from tracevision_jax.records.sample import BadRecord

DATASETS = ("coco", "ade20k", "flickr30k", "open_images")
EXTENSIONS = (".jpg", ".png", ".jpeg")
TURNED = (5, 6, 7, 8)
"""EXIF orientations that swap height and width."""


def _folders(dataset: str, image_id: str, split: str) -> Iterator[str]:
    """Folders, below the folder of images, that may hold an image; the likeliest first."""
    if dataset == "coco":
        years = [f"{split}2017"] if split else []
        years += [year for year in ("val2017", "train2017") if year not in years]
        for year in years:
            yield from (year, f"images/{year}")
    elif dataset == "ade20k":
        part = "training" if "_train_" in image_id else "validation"
        yield from (part, f"images/{part}", f"ADEChallengeData2016/images/{part}")
    elif dataset == "flickr30k":
        yield from ("flickr30k-images", "flickr30k_images", "Images")
    elif dataset == "open_images":
        # The archives of the training split are cut by the first digit of the id.
        parts = {"train": [f"train_{image_id[:1]}", "train"], "val": ["validation", "val"], "test": ["test"]}
        wanted = parts.get(split, [])
        yield from wanted
        yield from (part for others in parts.values() for part in others if part not in wanted)
    yield from ("", "images")


def file_stem(dataset: str, image_id: str) -> str:
    """Name of an image's file without extension."""
    return image_id.zfill(12) if dataset == "coco" else image_id


def find_image(root: Path, dataset: str, image_id: str, split: str) -> Path:
    """The file of an image.

    Raises:
        BadRecord: there is none; says where it was looked for.
    """
    stem = file_stem(dataset, image_id)
    if not stem or "/" in stem or "\\" in stem or stem.startswith(".") or "\0" in stem:
        raise BadRecord(f"'{image_id}' is no image id", record=image_id)
    tried = []
    for folder in _folders(dataset, image_id, split):
        for extension in EXTENSIONS:
            path = root / folder / f"{stem}{extension}"
            if path.is_file():
                return path
        tried.append(str(Path(folder) / f"{stem}.jpg"))
    raise BadRecord(f"image {image_id} is missing: looked in {root} for {', '.join(tried)}", record=image_id)


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) of an upright image, from its header alone.

    Raises:
        BadRecord: the header cannot be read.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            # Pillow would decode a PNG to look for an orientation behind its pixels, where none is ever put.
            known = image.format != "PNG" or "exif" in image.info
            turned = known and image.getexif().get(0x0112) in TURNED
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        reason = "is empty (zero bytes)" if path.stat().st_size == 0 else f"has no readable header: {error}"
        raise BadRecord(f"the image {reason}", file=str(path), record=path.stem) from error
    return (width, height) if turned else (height, width)
