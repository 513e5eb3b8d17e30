"""`System`: all that the training loop, the sweep and the ahead-of-time compiler know of a model.

The loss is returned as global sums and weights, divided once by the training step, so that gradient accumulation,
packing, padding and any mesh give the same number.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax

Params = Any
State = Any
Scalars = dict[str, jax.Array]
Batch = Any
"""The system's own kind of batch: a pytree of arrays whose first axis is rows, such as `records.batch.Batch`.

`batch.filled` marks what is no padding: tokens, or whatever the log counts instead.
"""
Bucket = Any
"""Static sizes of that kind of batch, a frozen dataclass of whole numbers, such as `records.batch.Bucket`.

`bucket.adds_up` names the fields of which the records in a row have the sum; with none, a row holds one record.
"""


@runtime_checkable
class System(Protocol):
    """A trainable system; stateless, its configuration frozen."""

    @property
    def config(self) -> Any:
        """The frozen dataclass that describes the model."""
        ...

    @property
    def coefficients(self) -> Mapping[str, float]:
        """Factor of each loss part; parts that are absent are only reported."""
        ...

    def init(self, rng: jax.Array) -> Params:
        """Draw all parameters."""
        ...

    def init_state(self) -> State:
        """What lives between steps (memory banks, statistics); `()` when there is none."""
        ...

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array) -> tuple[Scalars, Scalars, State]:
        """Return (sums, weights, state); a part's value is sums[k] / weights[k]; weights depend on the batch only."""
        ...

    def trainable(self, stage: str) -> Callable[[str], bool]:
        """Tell from a parameter's path ("host/language/embed/embedding") whether a stage trains it."""
        ...

    def batch_spec(self, bucket: Bucket, rows: int) -> Batch:
        """Shapes and dtypes of a batch, as `jax.ShapeDtypeStruct`."""
        ...
