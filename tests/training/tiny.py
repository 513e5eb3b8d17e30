"""A system of a few thousand parameters with the contract's names: next-token and point regression losses.

Used by the tests of training, parallel and the data pipeline; small enough to compile in a second.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from tracevision_jax.records.batch import Batch, Bucket

BUCKET = Bucket(tokens=12, frames=1, windows=1, conversations=2, points=3, masks=1)
SLOTS, PATCH_DIM, GRID, CODES = 4, 3, 4, 6


@dataclass(frozen=True)
class TinyConfig:
    """Sizes of the tiny system."""

    vocab_size: int = 32
    width: int = 16
    mlp_width: int = 32
    layers: int = 2


@dataclass(frozen=True)
class TinySystem:
    """Implements the `System` protocol."""

    config: TinyConfig = TinyConfig()
    coefficients: ClassVar = {"text": 1.0, "points": 0.5}

    def init(self, rng):
        c, keys = self.config, iter(jax.random.split(rng, 8))

        def draw(*shape):
            return jax.random.normal(next(keys), shape, jnp.float32) / np.sqrt(shape[-2])

        return {
            "language": {
                "embed": {"embedding": draw(c.vocab_size, c.width)},
                "layers": {
                    "mlp_norm": {"scale": jnp.ones((c.layers, c.width))},
                    "mlp": {
                        "up": {"kernel": draw(c.layers, c.width, c.mlp_width)},
                        "down": {"kernel": draw(c.layers, c.mlp_width, c.width)},
                    },
                },
                "head": {"kernel": draw(c.width, c.vocab_size)},
            },
            "tvp": {"points": {"kernel": draw(c.width, 3), "bias": jnp.zeros((3,))}},
        }

    def init_state(self):
        return {"seen": jnp.zeros((), jnp.int32)}

    def loss(self, params, state, batch, rng):
        language = params["language"]
        hidden = language["embed"]["embedding"][batch.tokens]
        hidden = hidden * jax.random.bernoulli(rng, 0.9, (hidden.shape[-1],))

        def layer(hidden, p):
            middle = jnp.tanh(hidden * p["mlp_norm"]["scale"] @ p["mlp"]["up"]["kernel"])
            return hidden + middle @ p["mlp"]["down"]["kernel"], None

        hidden, _ = jax.lax.scan(layer, hidden, language["layers"])
        logits = jax.nn.log_softmax(hidden @ language["head"]["kernel"])
        picked = jnp.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
        head = params["tvp"]["points"]
        guess = hidden.mean(1) @ head["kernel"] + head["bias"]
        present = (batch.point_trace > 0).astype(jnp.float32)
        error = jnp.sum((guess[:, None, None] - batch.points) ** 2, -1)
        sums = {"text": -jnp.sum(picked * batch.target_weights), "points": jnp.sum(error * present)}
        weights = {"text": jnp.sum(batch.target_weights), "points": jnp.sum(present)}
        sums["accuracy"] = jnp.sum((logits.argmax(-1) == batch.targets) * batch.target_weights)
        weights["accuracy"] = weights["text"]
        return sums, weights, {"seen": state["seen"] + jnp.sum(batch.segments > 0)}

    def trainable(self, stage: str) -> Callable[[str], bool]:
        return {
            "all": lambda path: True,
            "head": lambda path: path.startswith(("language/head", "tvp")),
            "none": lambda path: False,
        }[stage]

    def batch_spec(self, bucket, rows):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), empty_batch(bucket, rows))


class Deterministic(TinySystem):
    """The tiny system without its dropout, whose masks differ between microbatches."""

    def loss(self, params, state, batch, rng):
        return super().loss(params, state, batch, jax.random.key(3))


def empty_batch(bucket: Bucket, rows: int) -> Batch:
    """A batch of padding."""
    b, t, f, c = rows, bucket.tokens, bucket.frames, bucket.conversations

    def zeros(*shape, dtype=np.int32):
        return np.zeros(shape, dtype)

    return Batch(
        tokens=zeros(b, t),
        segments=zeros(b, t),
        positions=zeros(b, t, 3),
        targets=zeros(b, t),
        target_weights=zeros(b, t, dtype=np.float32),
        sought=zeros(b, t, 4, dtype=np.float32),
        visual_index=np.full((b, t), -1, np.int32),
        point_index=np.full((b, t), -1, np.int32),
        patches=zeros(b, f, bucket.windows, SLOTS, PATCH_DIM, dtype=np.float32),
        grid=zeros(b, f, 2),
        frame_times=zeros(b, f, dtype=np.float32),
        frame_owner=zeros(b, c, f, dtype=bool),
        points=zeros(b, c, bucket.points, 3, dtype=np.float32),
        point_trace=zeros(b, c, bucket.points),
        masks=zeros(b, bucket.masks, GRID, GRID, dtype=np.float32),
        mask_frame=zeros(b, bucket.masks),
        mask_group=zeros(b, bucket.masks),
        mask_slots=zeros(b, bucket.masks, CODES),
    )


def random_batch(rows: int, seed: int = 0, bucket: Bucket = BUCKET, with_points: bool = True) -> Batch:
    """A batch of rows of unequal lengths; the last row is empty when there are several."""
    rng, batch = np.random.default_rng(seed), empty_batch(bucket, rows)
    for row in range(rows if rows == 1 else rows - 1):
        length = int(rng.integers(3, bucket.tokens + 1))
        batch.tokens[row, :length] = rng.integers(1, 32, length)
        batch.targets[row, :length] = rng.integers(1, 32, length)
        batch.segments[row, :length] = 1
        batch.target_weights[row, 1:length] = 1
        if with_points:
            points = int(rng.integers(1, bucket.points + 1))
            batch.points[row, 0, :points] = rng.random((points, 3))
            batch.point_trace[row, 0, :points] = 1
    return batch
