"""The jitted training step of any `System`.

The loss is sum_k coefficient[k] * sums[k] / weights[k] over the sums and weights of the whole global batch,
so that gradient accumulation, packing, padding and the mesh change nothing but float rounding. Frozen
parameters have neither gradient nor optimizer state; they are an argument of their own and no result.

    state, frozen = create_state(system, params, optimizer, stage="1", seed=0)
    step = make_train_step(system, optimizer, schedule, accumulation=4)
    state, metrics = step(state, frozen, batch)        # `state` is donated
"""

import contextlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Num, UInt32

from tracevision_jax.layers.sharding import activation_sharding
from tracevision_jax.parallel.mesh import replicated
from tracevision_jax.parallel.rules import ACTIVATIONS
from tracevision_jax.systems.protocol import Params, Scalars, State, System
from tracevision_jax.training.optimizer import Schedule
from tracevision_jax.training.parameters import flatten, merge, owner_of, split_for_stage
from tracevision_jax.training.stability import DEFAULT, Health, StabilityConfig, choose, healthy, judge

Metrics = dict[str, Any]


@jax.tree_util.register_dataclass
@no_type_check  # jax also builds it of shapes and shardings
@dataclass(frozen=True)
class TrainState:
    """All that a step changes."""

    step: Int[Array, ""]
    """Number of steps taken."""
    trained: Params
    """The parameters that the stage trains."""
    optimizer: optax.OptState
    system: State
    """What the system keeps between steps."""
    health: Health
    rng: UInt32[Array, "words"]
    """Key data of the run; each step folds its number in."""


def create_state(
    system: System, params: Params, optimizer: optax.GradientTransformation, stage: str, seed: int
) -> tuple[TrainState, Params]:
    """Part the parameters and start the optimizer; returns (state, frozen parameters).

    Raises UserError when the stage trains nothing. Traceable, so `jax.eval_shape` gives the shapes of both.
    """
    trained, frozen = split_for_stage(params, system.trainable(stage), stage)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        trained=trained,
        optimizer=optimizer.init(trained),
        system=system.init_state(),
        health=healthy(),
        rng=jax.random.key_data(jax.random.key(seed)),
    )
    return state, frozen


def make_train_step(
    system: System,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    accumulation: int = 1,
    stability: StabilityConfig = DEFAULT,
    mesh: Mesh | None = None,
    state_shardings: Any = None,
) -> Callable[[TrainState, Params, Any], tuple[TrainState, Metrics]]:
    """Return the jitted `step(state, frozen, batch) -> (state, metrics)`.

    `accumulation` microbatches share one update; it must divide the rows of a batch. On a mesh, activations
    follow `parallel.rules.ACTIVATIONS`, and the new state is laid out as `state_shardings`. A step that `stability`
    rejects changes only its number. Metrics: "loss", "parts" and "weights" (value and weight of every loss part),
    "gradient_norm" (before clipping), "learning_rate", "tokens" (not padding), "rejected" (steps in a row).
    """

    def step(state: TrainState, frozen: Params, batch: Any) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        with activation_sharding(mesh, ACTIVATIONS) if mesh else contextlib.nullcontext():
            gradient, sums, weights, system_state = _gradient(system, state, frozen, batch, rng, accumulation)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.trained)
        loss, norm = total_loss(system.coefficients, sums, weights), optax.tree.norm(gradient)
        accepted, health = judge(state.health, loss, norm, stability)
        metrics = {
            "loss": loss,
            "parts": part_values(sums, weights),
            "weights": weights,
            "gradient_norm": norm,
            "learning_rate": schedule(state.step),
            "tokens": jnp.sum(batch.filled),
            "rejected": health.rejected,
        }
        new_state = TrainState(
            step=state.step + 1,
            trained=choose(accepted, optax.apply_updates(state.trained, updates), state.trained),
            optimizer=choose(accepted, optimizer_state, state.optimizer),
            system=choose(accepted, system_state, state.system),
            health=health,
            rng=state.rng,
        )
        return new_state, metrics

    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, replicated(mesh)))


def part_values(sums: Scalars, weights: Scalars) -> Scalars:
    """sums / weights, a part without weight being 0."""
    return {name: sums[name] * _inverse(weights[name]) for name in sums}


def total_loss(coefficients: Mapping[str, float], sums: Scalars, weights: Scalars) -> Float[Array, ""]:
    """The number that is minimised. Raises KeyError when a part with a coefficient is not in `sums`."""
    values = part_values(sums, weights)
    parts = [factor * values[name] for name, factor in coefficients.items() if factor]
    return jnp.sum(jnp.stack(parts)).astype(jnp.float32)


def fold_rows(x: Num[Array, "rows ..."] | Bool[Array, "rows ..."], count: int) -> Array:
    """Fold rows to (count, rows / count, ...); microbatch i takes the rows i, i + count, ...

    Taking every count-th row keeps rows on their devices when they are sharded; consecutive rows would not.
    Raises ValueError when `count` does not divide the rows.
    """
    rows = x.shape[0]
    if rows % count:
        raise ValueError(f"{rows} rows cannot be parted into {count} microbatches")
    return jnp.moveaxis(x.reshape(rows // count, count, *x.shape[1:]), 1, 0)


def _inverse(weight: Float[Array, ""]) -> Float[Array, ""]:
    """1 / weight, and 0 for a part that no row of the batch has; never a division by 0."""
    weight = jax.lax.stop_gradient(jnp.asarray(weight, jnp.float32))
    return jnp.where(weight > 0, 1.0 / jnp.where(weight > 0, weight, 1.0), 0.0)


def _gradient(
    system: System, state: TrainState, frozen: Params, batch: Any, rng: jax.Array, accumulation: int
) -> tuple[Params, Scalars, Scalars, State]:
    """Gradient of the global loss, with the global sums and weights and the system's new state."""

    def objective(
        trained: Params, system_state: State, rows: Any, key: jax.Array, global_weights: Scalars | None
    ) -> tuple[Float[Array, ""], tuple[Scalars, Scalars, State]]:
        sums, weights, system_state = system.loss(merge(trained, frozen), system_state, rows, key)
        sums = {name: jnp.asarray(value, jnp.float32) for name, value in sums.items()}
        value = total_loss(system.coefficients, sums, weights if global_weights is None else global_weights)
        return value, (sums, weights, system_state)

    differentiate = jax.grad(objective, has_aux=True)
    if accumulation == 1:
        gradient, (sums, weights, system_state) = differentiate(state.trained, state.system, batch, rng, None)
        return gradient, sums, weights, system_state

    # The divisors must be known before the first microbatch. They depend on the batch alone, so the compiler
    # drops the forward pass that this call seems to make (`test_weights_alone_cost_no_forward_pass`).
    _, (_, weights, _) = objective(state.trained, state.system, batch, rng, None)

    # Leaves are scanned, not the batch itself, whose fields promise one shape each.
    leaves, structure = jax.tree.flatten(batch)

    def accumulate(carry: tuple[Params, State], item: tuple[Any, jax.Array]) -> tuple[Any, Scalars]:
        gradient, system_state = carry
        row_leaves, key = item
        rows = jax.tree.unflatten(structure, row_leaves)
        more, (sums, _, system_state) = differentiate(state.trained, system_state, rows, key, weights)
        return (jax.tree.map(jnp.add, gradient, more), system_state), sums

    zeros = jax.tree.map(jnp.zeros_like, state.trained)
    keys = jax.random.split(rng, accumulation)
    (gradient, system_state), sums = jax.lax.scan(
        accumulate, (zeros, state.system), ([fold_rows(leaf, accumulation) for leaf in leaves], keys)
    )
    return gradient, jax.tree.map(jnp.sum, sums), weights, system_state


def state_shardings(shapes: TrainState, trained: Any, mesh: Mesh | AbstractMesh) -> TrainState:
    """Shardings of a whole state: what belongs to a parameter lies as it does, all else is replicated.

    A moment has its parameter's shape and layout; a statistic that is a mean over some axes, kept at size 1, is cut
    along the others as its parameter is.

    Args:
        shapes: the state, or its shapes.
        trained: shardings of the trained parameters.
        mesh: the mesh.
    """
    whole: Any = replicated(mesh)
    places, parameters = flatten(trained), flatten(shapes.trained)

    def place_of(path: tuple[Any, ...], leaf: Any) -> Any:
        owner = owner_of(path, parameters)
        if owner is None or leaf.ndim != parameters[owner].ndim:
            return whole
        return _kept_axes(places[owner], parameters[owner].shape, leaf.shape)

    return TrainState(
        step=whole,
        trained=trained,
        optimizer=jax.tree_util.tree_map_with_path(place_of, shapes.optimizer),
        system=jax.tree.map(lambda _: whole, shapes.system),
        health=jax.tree.map(lambda _: whole, shapes.health),
        rng=whole,
    )


def _kept_axes(place: NamedSharding, shape: tuple[int, ...], kept: tuple[int, ...]) -> NamedSharding:
    """`place`, the sharding of an array of `shape`, for one of as many axes: those of another size are not cut."""
    names = itertools.zip_longest(place.spec, shape, kept)
    spec = P(*(axes if size == other else None for axes, size, other in names))
    return place if kept == shape else NamedSharding(place.mesh, spec)
