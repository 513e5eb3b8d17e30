"""Rows of pieces become a `Batch` of one bucket; absent things are padding.

    batch = collate([[piece], [other, third]], bucket, processor.config)

A row that does not fit its bucket is an error that names what is too much.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from tracevision_jax.records.batch import Batch, Bucket
from tracevision_jax.records.encoded import Piece
from tracevision_jax.records.processor_config import ProcessorConfig
from tracevision_jax.records.vocabulary import SLOTS


def collate(rows: Sequence[Sequence[Piece]], bucket: Bucket, config: ProcessorConfig) -> Batch:
    """Place rows of pieces into the arrays of a bucket; an empty row has no weight at all.

    Raises:
        ValueError: a row does not fit the bucket.
    """
    batch = empty_batch(len(rows), bucket, config)
    for row, pieces in enumerate(rows):
        _place(batch, row, pieces, bucket, config)
    return batch


def empty_batch(rows: int, bucket: Bucket, config: ProcessorConfig) -> Batch:
    """A batch of padding.

    Raises:
        ValueError: the bucket's tokens cannot be parted into the configured slots.
    """
    if config.slot_tokens and bucket.tokens % config.slot_tokens:
        raise ValueError(f"{bucket.tokens} tokens of a bucket are no multiple of slot_tokens, {config.slot_tokens}")
    b, t, f, c = rows, bucket.tokens, bucket.frames, bucket.conversations
    p, k, m, w = bucket.points, bucket.masks, config.mask_size, bucket.windows
    vision = config.vision
    slots = vision.window_patches**2
    i32, f32 = np.int32, np.float32
    return Batch(
        tokens=np.zeros((b, t), i32),
        segments=np.zeros((b, t), i32),
        positions=np.zeros((b, t, 3), i32),
        targets=np.zeros((b, t), i32),
        target_weights=np.zeros((b, t), f32),
        sought=np.zeros((b, t, 4), f32),
        visual_index=np.full((b, t), -1, i32),
        point_index=np.full((b, t), -1, i32),
        patches=np.zeros((b, f, w, slots, vision.patch_dim), f32),
        grid=np.zeros((b, f, 2), i32),
        frame_times=np.zeros((b, f), f32),
        frame_owner=np.zeros((b, c, f), bool),
        points=np.zeros((b, c, p, 3), f32),
        point_trace=np.zeros((b, c, p), i32),
        masks=np.zeros((b, k, m, m), f32),
        mask_frame=np.zeros((b, k), i32),
        mask_group=np.zeros((b, k), i32),
        mask_slots=np.zeros((b, k, SLOTS), i32),
    )


def _place(batch: Batch, row: int, pieces: Sequence[Piece], bucket: Bucket, config: ProcessorConfig) -> None:
    """Write the pieces of one row; the arrays are numpy here and filled in place."""
    units = bucket.windows * config.vision.window_units**2
    room = config.slot_tokens
    token = frame = conversation = mask = group = 0
    for piece in pieces:
        frames = len(piece.grid)
        _check_room(piece, bucket, config, (token, frame, 0, conversation, 0, mask))
        span = slice(frame, frame + frames)
        batch.patches[row, span, : piece.patches.shape[1]] = piece.patches
        batch.grid[row, span] = piece.grid
        batch.frame_times[row, span] = piece.frame_times
        for encoded in piece.conversations:
            n = len(encoded.tokens)
            token = conversation * room if room else token
            here = slice(token, token + n)
            batch.tokens[row, here] = encoded.tokens
            batch.segments[row, here] = conversation + 1
            batch.positions[row, here] = encoded.positions
            batch.targets[row, token : token + n - 1] = encoded.tokens[1:]
            batch.target_weights[row, token : token + n - 1] = encoded.learn[1:]
            extra, words = encoded.extra_targets[:, 0] + token, encoded.extra_targets[:, 1]
            batch.targets[row, extra] = words
            batch.target_weights[row, extra] = config.answer_weight(len(extra))
            batch.sought[row, here] = encoded.sought
            place = (conversation * bucket.frames + frame + encoded.visual[:, 0]) * units + encoded.visual[:, 1]
            batch.visual_index[row, here] = np.where(encoded.visual[:, 0] >= 0, place, -1)
            batch.point_index[row, here] = np.where(
                encoded.point >= 0, conversation * bucket.points + encoded.point, -1
            )
            batch.frame_owner[row, conversation, span] = True
            batch.points[row, conversation, : len(encoded.points)] = encoded.points
            batch.point_trace[row, conversation, : len(encoded.points)] = encoded.point_trace
            for index, target in enumerate(encoded.mask_target):
                batch.masks[row, mask] = target
                batch.mask_frame[row, mask] = frame + encoded.mask_frame[index]
                batch.mask_group[row, mask] = group + encoded.mask_frame[index] + 1
                batch.mask_slots[row, mask] = token + encoded.mask_slots[index]
                mask += 1
            group += frames
            token += n
            conversation += 1
        frame += frames
    learned, most = int((batch.target_weights[row] > 0).sum()), config.learned_tokens(bucket.tokens)
    if learned > most:
        raise ValueError(f"a row has {learned} tokens to learn, its bucket takes {most} (learned_share)")


def _check_room(piece: Piece, bucket: Bucket, config: ProcessorConfig, taken: tuple[int, ...]) -> None:
    """Raise ValueError where a piece does not fit what is left of its bucket's row."""
    needed = list(piece.resources)
    longest = max((len(c.tokens) for c in piece.conversations), default=0)
    if config.slot_tokens:
        if longest > config.slot_tokens:
            raise ValueError(f"a conversation has {longest} tokens, its slot of the row {config.slot_tokens}")
        needed[0] = len(piece.conversations) * config.slot_tokens
        taken = (taken[3] * config.slot_tokens, *taken[1:])
    names = (field.name for field in dataclasses.fields(Bucket))
    for name, used, more, room in zip(names, taken, needed, dataclasses.astuple(bucket), strict=True):
        if used + more > room:
            raise ValueError(f"a row needs {used + more} {name}, its bucket has {room} ({bucket})")
