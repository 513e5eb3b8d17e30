"""The tiny system's language model of Flax modules, whose linear layers can be adapted."""

from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.training.tiny import TinyConfig, TinySystem
from tracevision_jax.layers.basic import projection, scanned

KINDS = {"dtype": jnp.float32, "param_dtype": jnp.float32, "bias": False}


class MLP(nn.Module):
    config: TinyConfig

    @nn.compact
    def __call__(self, x):
        middle = jnp.tanh(projection("up", self.config.mlp_width, **KINDS)(x))
        return projection("down", self.config.width, **KINDS)(middle)


class Layer(nn.Module):
    config: TinyConfig

    @nn.compact
    def __call__(self, x):
        return x + MLP(self.config, name="mlp")(x), None


class Language(nn.Module):
    config: TinyConfig

    @nn.compact
    def __call__(self, tokens):
        c = self.config
        x = nn.Embed(c.vocab_size, c.width, name="embed")(tokens)
        x, _ = scanned(Layer, c.layers, ())(c, name="layers")(x)
        return projection("head", c.vocab_size, **KINDS)(x)


class Model(nn.Module):
    config: TinyConfig

    @nn.compact
    def __call__(self, tokens):
        return Language(self.config, name="language")(tokens)


@dataclass(frozen=True)
class LinearSystem(TinySystem):
    """Implements the `System` protocol."""

    coefficients: ClassVar = {"text": 1.0}

    def init(self, rng):
        return Model(self.config).init(rng, jnp.zeros((1, 2), jnp.int32))["params"]

    def loss(self, params, state, batch, rng):
        logits = jax.nn.log_softmax(Model(self.config).apply({"params": params}, batch.tokens))
        picked = jnp.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
        sums = {"text": -jnp.sum(picked * batch.target_weights)}
        return sums, {"text": jnp.sum(batch.target_weights)}, state

    def trainable(self, stage):
        return {"all": lambda path: True, "head": lambda path: path.startswith("language/head")}[stage]
