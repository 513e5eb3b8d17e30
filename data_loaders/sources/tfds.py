"""Localized Narratives built as a TFDS dataset (`tracevision data build`), read by record number.

    source = TfdsNarratives("/data/tfds/ln_coco", split="val")

gives the same samples as the reader of the distributed files, without a search for files or a folder of
images.
"""

import hashlib
import json
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from data_loaders.sources.lengths import LengthIndex
from data_loaders.sources.localized_narratives import sample_of
from data_loaders.sources.protocol import RecordSize
from data_loaders.tfds_builders.build import Target
from data_loaders.tfds_builders.narratives import VERSION, from_example
from tracevision_jax.errors import UserError
from tracevision_jax.nearest import suggest
from tracevision_jax.records.sample import BadRecord, Sample
from tracevision_jax.vision.pictures import read_image


@dataclass(frozen=True)
class TfdsNarratives:
    """One split of a built dataset."""

    folder: str | Path
    """The dataset's folder (such as .../ln_coco), or that of its version in it."""
    split: str = "train"

    def __post_init__(self):
        """Look for the dataset.

        Raises:
            UserError: no such dataset or split, or it is not finished.
        """
        folder = Path(self.folder)
        if (folder / VERSION).is_dir():
            object.__setattr__(self, "folder", folder / VERSION)
        elif folder.is_dir() and not (folder / "build.json").exists():
            near = sorted(path.parent.parent.name for path in folder.glob(f"*/{VERSION}/build.json"))
            listed = f" It holds the datasets {', '.join(near)}: name one, as {folder / near[0]}." if near else ""
            raise UserError(f"{folder} is no dataset of version {VERSION} that `tracevision data build` made.{listed}")
        splits = self._state["splits"]
        if "finished" not in splits.get(self.split, {}):
            done = [name for name, entry in splits.items() if "finished" in entry]
            if self.split in splits:
                raise UserError(
                    f"the {self.split} split in {self.folder} is not finished: run the same "
                    "`tracevision data build` again, which continues it"
                )
            hint = suggest(self.split, done)
            raise UserError(f"no split '{self.split}' in {self.folder}.{hint} It has: {', '.join(done) or 'none'}")

    @cached_property
    def _state(self) -> dict:
        file = Path(self.folder) / "build.json"
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"no dataset in {self.folder}: cannot read {file.name} ({error})") from error

    @property
    def name(self) -> str:
        """Such as "ln_coco"; `Sample.source`."""
        return self._state["name"]

    def __getstate__(self):
        # Open files stay here when a worker process receives the source.
        return {"folder": self.folder, "split": self.split}

    def __setstate__(self, state):
        self.__dict__.update(state)

    @cached_property
    def _examples(self) -> Any:
        import tensorflow_datasets as tfds

        builder: Any = tfds.builder_from_directory(self.folder)
        return builder.as_data_source(self.split, decoders={"image": tfds.decode.SkipDecoding()})

    @cached_property
    def _lengths(self) -> LengthIndex:
        return LengthIndex.load(Target(Path(self.folder), self.name).lengths(self.split))

    def __len__(self) -> int:
        return sum(self._state["splits"][self.split]["finished"]["shard_lengths"])

    def __getitem__(self, index: int) -> Sample:
        """Read one record and decode its image.

        Raises:
            BadRecord: the image or the sidecar is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        place = f"{self.folder}, {self.split} record {index}"
        try:
            parts, image = from_example(self._examples[index])
            return sample_of(parts, read_image(image), self.name)
        except BadRecord as bad:
            raise BadRecord(bad.reason, place, bad.record) from None
        except UserError as error:
            raise BadRecord(str(error), place) from error

    def place(self, index: int) -> str:
        """The shard that holds a record."""
        ends = list(accumulate(self._state["splits"][self.split]["finished"]["shard_lengths"]))
        shard = bisect_right(ends, index)
        return str(Target(Path(self.folder), self.name).shard(self.split, shard, len(ends)))

    def sizes(self, index: int) -> RecordSize:
        """Size of a record, from the length index."""
        return self._lengths[index]

    def fingerprint(self) -> str:
        """Hash of the files that the split was built from."""
        entry = self._state["splits"][self.split]
        text = f"{self.name} {self.split} {VERSION} {entry['fingerprint']} {entry['finished']}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]
