"""The programs that answer, ready to be compiled for chips that are not here: encode, prefill, decode.

They are those of `engine.py` and `hosts/generation.py`, with shapes for arguments. A turn of the decode loop writes one
token a row, so the costs of "decode" are those of one token a row.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from tracevision_jax.hosts.generation import CACHE_STEP, decode, prefill
from tracevision_jax.hosts.grammar import text_grammar
from tracevision_jax.hosts.sampling import sampling_settings
from tracevision_jax.language.model import LanguageModel
from tracevision_jax.layers.sharding import activation_sharding, layout
from tracevision_jax.parallel.ahead_of_time import Program
from tracevision_jax.parallel.flops import forward_flops
from tracevision_jax.parallel.mesh import MeshConfig, batch_sharding, replicated
from tracevision_jax.parallel.rules import ACTIVATIONS, PARAMETERS, parameter_shardings
from tracevision_jax.records.batch import Bucket
from tracevision_jax.systems.tracevision import TraceVision, TraceVisionModel

PARTS = ("vision", "language", "tvp", "decoder")


def answer_mesh(system: TraceVision, devices: int) -> MeshConfig:
    """As many chips as there are key heads share a model, as far as they divide; the others hold copies."""
    heads = system.config.host.language.kv_heads
    tensor = max(size for size in range(1, heads + 1) if heads % size == 0 and devices % size == 0)
    return MeshConfig(data=devices // tensor, tensor=tensor)


def answer_programs(system: TraceVision, bucket: Bucket, rows: int, new_tokens: int, mesh: Mesh) -> list[Program]:
    """Encode the frames and traces of `rows` prompts, run the prompts, write tokens.

    Parameters are stored as the model computes. Prompts have one conversation; the cache has room for `new_tokens`.
    """
    processor = dataclasses.replace(system.config.processor, slot_tokens=0)
    config = dataclasses.replace(system.config, processor=processor)
    system, language = TraceVision(config), config.host.language
    bucket = dataclasses.replace(bucket, conversations=1, masks=0)
    model, network = TraceVisionModel(config), LanguageModel(language)
    kind = jnp.dtype(language.dtype)
    drawn = jax.eval_shape(system.init, jax.random.key(0))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, kind), drawn)
    places = parameter_shardings(shapes, mesh, PARAMETERS)

    def placed(leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    def by_rows(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: placed(leaf, batch_sharding(mesh)), tree)

    params = jax.tree.map(placed, shapes, places)
    batch = by_rows(system.batch_spec(bucket, rows))
    plain = text_grammar(language.output_size, (0,))  # which token ends an answer costs nothing
    grammar = jax.tree.map(lambda x: placed(jnp.asarray(x), replicated(mesh)), plain)
    settings = by_rows(jax.tree.map(jnp.asarray, sampling_settings(rows)))
    budgets = by_rows(jax.ShapeDtypeStruct((rows,), jnp.int32))
    embeddings = by_rows(jax.ShapeDtypeStruct((rows, bucket.tokens, language.width), kind))
    forced = by_rows(jax.ShapeDtypeStruct((rows, new_tokens + 1), jnp.int32))
    stop = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    cache_size = -(-(bucket.tokens + new_tokens) // CACHE_STEP) * CACHE_STEP

    def encode_step(params: Any, batch: Any) -> Any:
        context: Any = model.apply({"params": params}, batch, method="context")
        return context.embeddings, context.shallow, context.deep

    prefill_step = functools.partial(prefill, network, cache_size, new_tokens)
    decode_step = functools.partial(decode, network)
    prompt = (params["host"]["language"], grammar, embeddings, batch.positions, budgets, budgets)
    state = _placed_state(jax.eval_shape(_fresh(prefill_step), *prompt), mesh)
    answer = (params["host"]["language"], state, grammar, settings, forced, budgets, stop)

    def program(
        name: str, function: Any, given: tuple, held: dict[str, Any], tokens: int, donated: Any = (), part: str = ""
    ) -> Program:
        def lower() -> Any:
            with activation_sharding(mesh, ACTIVATIONS):
                return jax.jit(_fresh(function, part), donate_argnums=donated).lower(*given)

        flops = forward_flops(_fresh(function, part), *given, parts=PARTS)
        return Program(name, lower, held, flops, tokens, rows)

    words = {"parameters": params["host"]["language"]}
    return [
        program("encode", encode_step, (params, batch), {"parameters": params, "batch": batch}, rows * bucket.tokens),
        program("prefill", prefill_step, prompt, words | {"prompts": embeddings}, rows * bucket.tokens, (), "language"),
        _sees_all(
            program("decode, a token a row", decode_step, answer, words | {"cache": state.cache}, rows, 1, "language")
        ),
    ]


def _fresh(function: Callable[..., Any], part: str = "") -> Callable[..., Any]:
    """The same under another identity, its products named after a part of the model.

    jax keeps what it traced by function and shapes, whatever mesh attention was told of: a program that was counted
    first would be compiled with the attention of the machine that counted it.
    """

    def again(*given: Any) -> Any:
        with jax.named_scope(part) if part else contextlib.nullcontext():
            return function(*given)

    return again


def _sees_all(program: Program) -> Program:
    """Nothing of a token's attention to the cache is masked as half of a square is."""
    return dataclasses.replace(program, flops=dataclasses.replace(program.flops, causal=0.0))


def _placed_state(state: Any, mesh: Mesh) -> Any:
    """The state as `prefill` leaves it."""

    def place(leaf: Any, names: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, layout(leaf.shape, names, mesh, ACTIVATIONS))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def rows(leaf: Any) -> jax.ShapeDtypeStruct:
        return place(leaf, ("batch", *(None,) * (leaf.ndim - 1)) if leaf.ndim else ())

    def store(leaf: Any) -> jax.ShapeDtypeStruct:
        return place(leaf, (None, "batch", "kv_heads", None, None))

    by_rows = jax.tree.map(rows, state)
    cache = dataclasses.replace(by_rows.cache, keys=store(state.cache.keys), values=store(state.cache.values))
    return dataclasses.replace(by_rows, cache=cache)
