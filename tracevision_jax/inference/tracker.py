"""Tracking objects through videos with SAM 2: the public API, and what the command `tracevision track` uses.

    tracker = Tracker.load("checkpoints/sam2.1_tiny")
    with tracker.session("clip.mp4") as session:        # a folder, an array, a list of pictures, a generator
        session.add(1, frame=0, box=(10, 20, 200, 180))                  # pixels of the frame
        session.add(2, frame=0, points=[(210, 350), (90, 40, 0)])        # label 0: not here
        session.add(3, mask=array)
        for result in session.run():                                     # frames as they are tracked
            result.masks[1], result.boxes[1], result.run_lengths[1], result.scores[1]
            if looks_wrong(result):                                      # correct, add, remove midway
                session.add(1, frame=result.frame, points=[(120, 80)])
        for result in session.run(reverse=True): ...                     # back from the first prompt

Frames are decoded and squared in a background thread, encoded in batches, and tracked by a scan over each batch. Only
the bank, the last batches and the results of prompts are kept, so a stream may last for ever. Several videos in one
program:

    for number, result in run_together([tracker.session(path) for path in paths]): ...

Prompts on frames that can be read at any time (all sources but streams) count for the whole video, frames before them
included, as in the original; in a stream an object begins at its first prompt. A prompt on a frame that the object was
not tracked on makes a conditioning frame; clicks on one of the frames tracked last (`remember`) correct its mask.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tracevision_jax.errors import UserError
from tracevision_jax.hosts.sam import Maps, SegmentAnything
from tracevision_jax.hosts.sam_presets import SegmentAnythingConfig
from tracevision_jax.inference import tracker_state
from tracevision_jax.inference.frames import FrameSource, Videos, open_frames
from tracevision_jax.inference.tracker_feed import Feed
from tracevision_jax.inference.tracker_loading import load_tracking_model
from tracevision_jax.inference.tracker_results import TrackedFrame
from tracevision_jax.inference.tracker_session import SessionSteps, Steps
from tracevision_jax.inference.tracker_steps import Programs

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
"""Rows of objects that programs are compiled for."""
BATCH, CACHE_FRAMES, KEY_FRAMES = 8, 16, 8


class Tracker:
    """A model that tracks; sessions share its compiled programs."""

    def __init__(
        self,
        config: SegmentAnythingConfig,
        params: Any,
        *,
        batch: int = BATCH,
        buckets: Sequence[int] = BUCKETS,
        cache_frames: int = CACHE_FRAMES,
        key_frames: int = KEY_FRAMES,
    ):
        """
        Args:
            config: of SAM 2 or 2.1.
            params: its parameters.
            batch: frames that are encoded and tracked at once. A result comes when its batch is there: 1 for a camera.
            buckets: numbers of objects that programs are made for; the last is the most that a session takes.
            cache_frames: frames whose embeddings stay, so that going back to them costs nothing; at least two batches
                do. Each takes `frame_bytes` of the device's memory.
            key_frames: most conditioning frames of an object; see `memory_bank` on what happens beyond.

        Raises:
            UserError: a model without memory, or a number under 1.
        """
        config.video_memory()
        sizes = tuple(sorted(set(buckets)))
        if min(batch, key_frames, *(sizes or (0,))) < 1 or cache_frames < 0:
            raise UserError(
                f"a tracker with batches of {batch} frames, object buckets {list(buckets)} and {key_frames} "
                f"conditioning frames: each must be at least 1, and cache_frames ({cache_frames}) at least 0"
            )
        self.config, self.batch, self.buckets = config, batch, sizes
        self.key_frames, self._cached = key_frames, -(-cache_frames // batch)
        self.programs = Programs(SegmentAnything(config), params)

    @classmethod
    def load(
        cls, directory: str | Path, *, dtype: str | None = None, image_size: int | None = None, **settings: Any
    ) -> "Tracker":
        """Load a checkpoint.

        Args:
            directory: of a SAM 2, in any layout that `tracevision convert` knows, or of a training run.
            dtype: of parameters and arithmetic, "float32" or "bfloat16"; as stored by default.
            image_size: side of the model's pictures, pixels; smaller ones are faster.
            settings: see `Tracker`.

        Raises:
            UserError: no such directory, or another kind of model.
        """
        return cls(*load_tracking_model(directory, dtype, image_size), **settings)

    @property
    def frame_bytes(self) -> int:
        """Memory that a cached frame's embeddings take on the device."""
        side = self.config.image_size
        model, params = self.programs.model, self.programs.params
        pixels = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        maps: Maps = jax.eval_shape(lambda p, x: model.apply({"params": p}, x, method="encode"), params, pixels)  # pyright: ignore
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(maps))

    def session(
        self, video: Videos | FrameSource, *, frames_per_s: float | None = None, remember: int | None = None
    ) -> "Session":
        """Begin with a video.

        Args:
            video: a file, a folder of pictures, an array (frames, height, width, 3), pictures in a list, or a stream.
            frames_per_s: where the video does not say it itself.
            remember: how many of the frames tracked last clicks can correct, and are seen again when tracking turns
                back; by default as many as tracking in one direction reads (6). Costs memory for each object.

        Raises:
            UserError: a video that cannot be read, or has no frames.
        """
        if remember is not None and remember < 1:
            raise UserError(f"remember is {remember}; it must be at least 1")
        source = open_frames(video, frames_per_s)
        feed = Feed(source, self.batch, self.config.image_size, self._cached)
        return Session(self.programs, SessionSteps(self.config, source, feed, self.buckets, self.key_frames, remember))


class Session:
    """One video and its objects. Close it (or use it in `with`) to end its thread at once."""

    def __init__(self, programs: Programs, steps: SessionSteps):
        self.programs, self.steps = programs, steps

    @property
    def objects(self) -> list[int]:
        """Numbers of the objects."""
        return self.steps.objects

    @property
    def source(self) -> FrameSource:
        """Where the frames come from."""
        return self.steps.source

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the frames, pixels. Raises UserError where there is none."""
        return self.steps.feed.size()

    def add(
        self,
        number: int,
        *,
        frame: int = 0,
        points: Iterable[Any] | None = None,
        box: Any = None,
        mask: Any = None,
    ) -> None:
        """Say where an object is: a new one, or a known one on a further frame, or more clicks on the same.

        Clicks add up; a box takes the place of an earlier one, a mask that of everything. An empty mask says that a
        known object is not in sight.

        Args:
            number: of the object, from 1 on.
            frame: number of the frame, from 0 on. Of a stream: one that is at hand still, or one to come.
            points: (x, y), or (x, y, label) with label 1 on the object and 0 beside it; pixels of the frame.
            box: (x1, y1, x2, y2) in pixels.
            mask: (height, width), positive inside.

        Raises:
            UserError: a place outside the frame, no such frame, an empty mask for a new object, too many objects.
        """
        self.steps.say(number, frame, points, box, mask)

    def remove(self, number: int) -> None:
        """Stop tracking an object. Raises UserError where there is none of that number."""
        self.steps.drop(number)

    def preview(self, frame: int = 0) -> TrackedFrame:
        """What the prompts on a frame give, at once: to look at before tracking, or after a correction.

        Raises:
            UserError: no prompt on that frame, or one of a stream that has not come yet.
        """
        (result,) = (result for _, result in _drive(self.programs, [self.steps.prompted_frame(frame)]))
        return result

    def run(self, start: int | None = None, stop: int | None = None, reverse: bool = False) -> Iterator[TrackedFrame]:
        """Track, and hand out frame after frame.

        Prompts may be added and objects removed between two frames; the next frames take account of it.

        Args:
            start: the first frame. By default one goes on behind the last frame handed out, if that was in the same
                direction, else begins at the first frame with a prompt; of a stream, where it is.
            stop: the frame to end before, or behind when going backwards; by default the end of the video.
            reverse: from a frame back to the beginning.

        Raises:
            UserError: no object, no such frame, a stream backwards, a frame that cannot be read, frames that change
                size, or a prompt on a frame that never came.
        """
        return (result for _, result in _drive(self.programs, [self._run(start, stop, reverse)]))

    def _run(self, start: int | None, stop: int | None, reverse: bool) -> Steps:
        place, source = self.steps.memory.place, self.source
        if not source.again:
            if reverse:
                raise UserError(f"{source.name} cannot be tracked backwards: its frames come once")
            here = 0 if place is None else place.frame
            if start is not None and start != here:
                raise UserError(f"{source.name} is at frame {here}, tracking cannot begin at frame {start}")
            return self.steps.run(here, stop, False)
        first = self.steps.first_prompted()
        if first is None:
            raise UserError("there is nothing to track: say with add() where an object is")
        if start is None:
            start = place.frame if place is not None and place.reverse == reverse else first
        if source.length is not None and not -1 <= start <= source.length:
            raise UserError(f"there is no frame {start}; {source.name} has frames 0 to {source.length - 1}")
        return self.steps.run(start, stop, reverse)

    def reset(self) -> None:
        """Forget all objects; cached embeddings stay. A stream stays where it is."""
        self.steps.forget_all()

    @property
    def at_rest(self) -> bool:
        """Whether all that was tracked was handed out, which is so after each batch: saving costs nothing then."""
        return self.steps.at_rest

    def save(self, path: str | Path, note: Any = None) -> None:
        """Write all that is known of the objects, to go on with another time; the file appears whole or not at all.

        `note` is JSON values to be kept beside it (`tracker_state.read_note`).

        Raises:
            UserError: prompts wait for frames of a stream to come, or the file cannot be written.
        """
        for _ in _drive(self.programs, [self.steps.settle()]):
            pass
        tracker_state.save(path, self.steps, note)

    def restore(self, path: str | Path) -> None:
        """Go on from what `save` wrote, of the same model and video.

        Raises:
            UserError: no such file, a damaged one, or one of another model.
        """
        tracker_state.restore(path, self.steps)

    def close(self) -> None:
        """End the background thread; embeddings and frames are let go."""
        self.steps.feed.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run_together(
    sessions: Sequence[Session], *, stop: int | None = None, reverse: bool = False
) -> Iterator[tuple[int, TrackedFrame]]:
    """`Session.run` of several videos, whose work is done in one program each time; they may differ in length and size.

    Yields:
        (number of the session, result); in order within a session.

    Raises:
        UserError: see `Session.run`; sessions of several trackers.
    """
    if not sessions:
        return
    programs = sessions[0].programs
    if any(session.programs is not programs for session in sessions):
        raise UserError("videos are tracked together by one tracker; make all sessions with the same")
    most = max(len(session.objects) for session in sessions)
    for session in sessions:
        # One program serves all, so that the one with most objects decides.
        session.steps.least_bucket = max(1, most)
    yield from _drive(programs, [session._run(None, stop, reverse) for session in sessions])


def _drive(programs: Programs, runs: Sequence[Steps]) -> Iterator[tuple[int, TrackedFrame]]:
    """Let steps of several sessions go on, do the work that they ask for, together where it is alike."""
    answers: dict[int, Any] = dict.fromkeys(range(len(runs)))
    while answers:
        asked: dict[int, Any] = {}
        for number, answer in answers.items():
            try:
                said = runs[number].send(answer)
                while isinstance(said, TrackedFrame):
                    yield number, said
                    said = next(runs[number])
                asked[number] = said
            except StopIteration:
                continue
        answers = {}
        for kind in {type(work) for work in asked.values()}:
            numbers = [number for number, work in asked.items() if type(work) is kind]
            done = programs.run([asked[number] for number in numbers], lanes=len(runs))
            answers.update(zip(numbers, done, strict=True))
