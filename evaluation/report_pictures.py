"""The folder of the report's pictures: each is written beside the page and shown on a card.

images = Images(Path("runs/demo/report/images"))
card = images.card("attention_0", picture, "what is to be seen", Line("model", "a red circle"))
"""

from pathlib import Path

from PIL import Image

from evaluation.report_page import Card, Line

JPEG_QUALITY = 90


class Images:
    """A folder, and the path by which the page finds it."""

    def __init__(self, directory: Path, prefix: str = "images"):
        """Make `directory`, or empty it of the pictures of an earlier report."""
        directory.mkdir(parents=True, exist_ok=True)
        for old in directory.glob("*.jpg"):
            old.unlink()
        self.directory, self.prefix = directory, prefix

    def card(self, name: str, picture: Image.Image, alternative: str, *lines: Line, panels: int = 1) -> Card:
        """Write a picture and show it with its lines; `panels` is how many it has side by side."""
        picture.convert("RGB").save(self.directory / f"{name}.jpg", quality=JPEG_QUALITY, subsampling=0, optimize=True)
        return Card(f"{self.prefix}/{name}.jpg", alternative, tuple(lines), picture.size, panels)
