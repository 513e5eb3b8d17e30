"""A system whose linear layers are trained through low-rank adapters (`layers/lora.py`); any system, unchanged.

Kernels that are adapted are frozen in every stage, and their adapters trained in every stage; of all other parameters
the stage decides. With a stage that freezes the host, that is LoRA as it is mostly meant; with one that trains all, the
matched kernels alone are trained at low rank.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from tracevision_jax.layers.lora import LoRAConfig, adapted, check_adapted, is_adapter
from tracevision_jax.systems.protocol import Batch, Bucket, Params, Scalars, State, System


@dataclasses.dataclass(frozen=True)
class Adapted:
    """The system, see `protocol.py`."""

    base: System
    lora: LoRAConfig

    @property
    def config(self) -> Any:
        """The base's: once adapters are merged (`layers.lora.merged`), it describes the model."""
        return self.base.config

    @property
    def coefficients(self) -> Mapping[str, float]:
        """The base's."""
        return self.base.coefficients

    def init(self, rng: jax.Array) -> Params:
        """Draw all parameters.

        Raises:
            UserError: a target matches no kernel, or what no linear layer multiplies by.
        """
        with adapted(self.lora):
            params = self.base.init(rng)
        check_adapted(params, self.lora)
        return params

    def settle(self, params: Params) -> Params:
        """As the base does where parameters are read from a checkpoint."""
        settle = getattr(self.base, "settle", None)
        return settle(params) if settle else params

    def init_state(self) -> State:
        """The base's."""
        return self.base.init_state()

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array) -> tuple[Scalars, Scalars, State]:
        """The base's, through the adapters."""
        with adapted(self.lora):
            return self.base.loss(params, state, batch, rng)

    def trainable(self, stage: str) -> Callable[[str], bool]:
        """Adapters, and what the stage trains of the parameters that are not adapted."""
        trains = self.base.trainable(stage)
        return lambda path: is_adapter(path) or (trains(path) and not self.lora.matches(path))

    def batch_spec(self, bucket: Bucket, rows: int) -> Batch:
        """The base's."""
        return self.base.batch_spec(bucket, rows)


def with_adapters(system: System, lora: LoRAConfig) -> System:
    """The system with the adapters that a recipe asks for; itself where it asks for none."""
    return Adapted(system, lora) if lora.rank else system
