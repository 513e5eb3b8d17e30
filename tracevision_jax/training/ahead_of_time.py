"""The training step of a recipe, ready to be compiled for chips that are not here.

    program = training_program(system, recipe, bucket, rows=256, mesh=mesh)
    outcome = measure(program, topology, mesh)          # parallel/ahead_of_time.py

It is the very step of `training/loop.py`: same optimizer, layouts, donation; only its arguments are shapes. A layout
that does not fit is refused before anything is compiled, with the nearest that does.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from tracevision_jax.errors import UserError
from tracevision_jax.layers.basic import REMAT_POLICIES
from tracevision_jax.parallel.ahead_of_time import Program, kept_for_backward, shard_bytes
from tracevision_jax.parallel.flops import Flops, training_flops
from tracevision_jax.parallel.mesh import (
    AXES,
    BATCH_AXES,
    MeshConfig,
    across_slices,
    as_flags,
    batch_sharding,
    divisors,
    mesh_shape,
    nearest_mesh,
    ways_across,
)
from tracevision_jax.parallel.rules import PARAMETERS, Rule, partition_specs, spec_of
from tracevision_jax.systems.adapted import with_adapters
from tracevision_jax.systems.protocol import System
from tracevision_jax.training.layout import placed, stage_layout
from tracevision_jax.training.optimizer import learning_rate_schedule, make_optimizer
from tracevision_jax.training.parameters import flatten, merge, split_for_stage
from tracevision_jax.training.recipe import TrainRecipe
from tracevision_jax.training.step import make_train_step, total_loss

STEPS = 1000
"""Of the learning rate's schedule; it changes no cost."""
TILE = 8
"""Rows of the tiles in which TPU keeps arrays."""


def with_remat(config: Any, policy: str) -> Any:
    """A configuration with every rematerialisation policy in it replaced; UserError for an unknown policy."""
    if policy not in REMAT_POLICIES:
        raise UserError(f"There is no remat policy '{policy}'. Known are {', '.join(REMAT_POLICIES)}.")
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        new = policy if field.name == "remat" and isinstance(value, str) else with_remat(value, policy)
        if new is not value:
            changes[field.name] = new
    return dataclasses.replace(config, **changes) if changes else config


def why_not(
    sizes: Mapping[str, int],
    rows: int,
    accumulation: int,
    shapes: Any,
    rules: tuple[Rule, ...] = PARAMETERS,
    slices: int = 1,
) -> str | None:
    """Reason why rows and parameters cannot be shared on a mesh of these sizes, on TPU slices, or None."""
    holders = math.prod(sizes[axis] for axis in BATCH_AXES) * accumulation
    if rows % holders:
        return f"{rows} rows a batch cannot be shared by data x fsdp x accumulation = {holders}"
    if not ways_across([sizes[axis] for axis in AXES], slices):
        return f"{slices} slices cannot be shared by data {sizes['data']} and fsdp {sizes['fsdp']}"
    try:
        partition_specs(shapes, sizes, rules)
    except UserError as error:
        return str(error)
    return None


def usual_mesh(
    rows: int, devices: int, accumulation: int, shapes: Any, rules: tuple[Rule, ...] = PARAMETERS
) -> MeshConfig:
    """The mesh where none is asked for: rows over `fsdp` as far as slices are whole tiles, then over `data`, and the
    chips that are left over `tensor`.

    TPU gathers slices that are no whole tiles, and scatters sums of them, as sums of whole arrays: twice the bytes.
    """
    holders = math.gcd(rows // accumulation, devices)
    cut = {
        size
        for path, leaf in flatten(shapes).items()
        for size, axes in zip(leaf.shape, spec_of(path, leaf.shape, rules) or (), strict=False)
        if axes == "fsdp"
    }
    fsdp = max((n for n in divisors(holders) if not any(size % (n * TILE) for size in cut)), default=holders)
    return MeshConfig(data=holders // fsdp, fsdp=fsdp, tensor=devices // holders)


def fitting_mesh(
    config: MeshConfig,
    devices: int,
    rows: int,
    accumulation: int,
    shapes: Any,
    rules: tuple[Rule, ...] = PARAMETERS,
    slices: int = 1,
) -> MeshConfig:
    """The mesh of a configuration on so many devices of so many TPU slices, checked.

    Raises:
        UserError: it does not fit the devices, the slices, the rows or the parameters; names the nearest that does.
    """

    def fault(sizes: Mapping[str, int]) -> str | None:
        return why_not(sizes, rows, accumulation, shapes, rules, slices)

    try:
        sizes: dict[str, int] = dict(zip(AXES, mesh_shape(config, devices), strict=True))
        reason = fault(sizes)
    except UserError as error:
        sizes = {axis: max(size, 1) for axis, size in zip(AXES, config.sizes, strict=True)}
        reason = str(error)
    if reason is None:
        across_slices(config, list(sizes.values()), slices)
        return MeshConfig(**sizes, dcn=config.dcn)
    nearest = nearest_mesh(sizes, devices, lambda other: fault(other) is None)
    if nearest is None:
        holders = max(1, devices // 2)
        raise UserError(
            f"{reason}\nNo mesh of {devices} chips fits {rows} rows; rows such as {holders} fit more meshes."
        )
    raise UserError(f"{reason}\nThe nearest mesh that fits {devices} chips and {rows} rows: {as_flags(nearest)}.")


def training_program(
    system: System,
    recipe: TrainRecipe,
    bucket: Any,
    rows: int,
    mesh: Mesh,
    rules: tuple[Rule, ...] = PARAMETERS,
) -> Program:
    """The step on batches of `rows` rows of a bucket, on a mesh that fits (`fitting_mesh`)."""
    system = with_adapters(system, recipe.lora)
    lower, (state, frozen, batch) = lowered_step(system, recipe, bucket, rows, mesh, rules)
    loss, trained_shapes, given = loss_of_stage(system, recipe, bucket, rows)
    holders = math.prod(mesh.shape[axis] for axis in (*BATCH_AXES, "context")) * recipe.accumulation
    return Program(
        name=f"train on rows of {bucket}",
        lower=lower,
        held={"parameters": (state.trained, frozen), "optimizer": state.optimizer, "batch": batch},
        flops=_flops(loss, trained_shapes, given),
        tokens=jax.eval_shape(lambda batch: batch.filled, given[1]).size,
        rows=rows,
        kept={
            "gradients": shard_bytes(state.trained),
            "activations": kept_for_backward(loss, trained_shapes, given) // holders,
        },
    )


def loss_of_stage(
    system: System, recipe: TrainRecipe, bucket: Any, rows: int
) -> tuple[Callable[[Any, tuple[Any, Any]], jax.Array], Any, tuple[Any, Any]]:
    """(the loss of trained and given arrays, shapes of the trained ones, those of (frozen parameters, batch))."""
    shapes = jax.eval_shape(system.init, jax.random.key(recipe.seed))
    trained, frozen = split_for_stage(shapes, system.trainable(recipe.stage), recipe.stage)

    def loss(trained: Any, given: tuple[Any, Any]) -> jax.Array:
        frozen, batch = given
        sums, weights, _ = system.loss(merge(trained, frozen), system.init_state(), batch, jax.random.key(0))
        return total_loss(system.coefficients, sums, weights)

    return loss, trained, (frozen, system.batch_spec(bucket, rows))


def step_flops(system: System, recipe: TrainRecipe, bucket: Any, rows: int) -> Flops:
    """FLOPs of a step on all chips together; it is traced, not compiled."""
    return _flops(*loss_of_stage(with_adapters(system, recipe.lora), recipe, bucket, rows))


def _flops(loss: Callable[[Any, Any], jax.Array], trained: Any, given: tuple[Any, Any]) -> Flops:
    return training_flops(loss, trained, given, parts_of(merge(trained, given[0])))


def lowered_step(
    system: System,
    recipe: TrainRecipe,
    bucket: Any,
    rows: int,
    mesh: Mesh,
    rules: tuple[Rule, ...] = PARAMETERS,
) -> tuple[Callable[[], Any], tuple[Any, Any, Any]]:
    """What lowers the step, and its arguments (state, frozen parameters, batch) as shapes with their layouts."""
    shapes = jax.eval_shape(system.init, jax.random.key(recipe.seed))
    optimizer = make_optimizer(recipe.optimizer, STEPS)
    layout = stage_layout(system, recipe, optimizer, shapes, mesh, rules)
    state, frozen = layout.state, layout.frozen
    batch = jax.tree.map(lambda leaf: placed(leaf, batch_sharding(mesh)), system.batch_spec(bucket, rows))
    step = make_train_step(
        system,
        optimizer,
        learning_rate_schedule(recipe.optimizer, STEPS),
        accumulation=recipe.accumulation,
        mesh=mesh,
        state_shardings=jax.tree.map(lambda leaf: leaf.sharding, state),
    )

    def lower() -> Any:
        with jax.set_mesh(mesh):
            return step.lower(state, frozen, batch)

    return lower, (state, frozen, batch)


def parts_of(shapes: Any) -> list[str]:
    """Names of a model's parts: the first level of its parameters, or the second below one that only holds parts."""
    names = []
    for name, inner in shapes.items():
        holds_parts = (
            isinstance(inner, Mapping) and len(inner) <= 3 and all(isinstance(x, Mapping) for x in inner.values())
        )
        names += list(inner) if holds_parts else [name]
    return names
