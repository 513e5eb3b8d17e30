"""Where the parameters and the optimizer of a stage lie on a mesh.

    layout = stage_layout(system, recipe, optimizer, shapes, mesh)

One answer for a fresh start, a checkpoint that is read, and a program that is compiled ahead of time.

A frozen parameter has neither gradient nor moments: cutting it over `fsdp` saves its own bytes alone, and costs that it
is gathered in every step, twice where gradients pass through it. `TrainRecipe.frozen_whole` names those that every chip
keeps whole along `fsdp` instead; along `tensor` they are cut as ever.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, Mesh

from tracevision_jax.errors import UserError
from tracevision_jax.nearest import suggest
from tracevision_jax.parallel.rules import PARAMETERS, Rule, parameter_shardings, rule_of, without
from tracevision_jax.systems.protocol import Params, System
from tracevision_jax.training.parameters import flatten, split_for_stage
from tracevision_jax.training.recipe import TrainRecipe
from tracevision_jax.training.step import TrainState, create_state, state_shardings


@dataclass(frozen=True)
class StageLayout:
    """Shapes with their shardings, as `jax.ShapeDtypeStruct`."""

    state: TrainState
    frozen: Params
    parameters: Params
    """Shardings alone, of all parameters in one tree."""


def stage_layout(
    system: System,
    recipe: TrainRecipe,
    optimizer: optax.GradientTransformation,
    shapes: Params,
    mesh: Mesh | AbstractMesh,
    rules: Sequence[Rule] = PARAMETERS,
) -> StageLayout:
    """The layout of a recipe's stage, from the shapes of all parameters.

    Raises:
        UserError: as `stage_rules` and `parallel.rules.partition_specs`; the stage trains nothing.
    """
    places = parameter_shardings(shapes, mesh, stage_rules(system, recipe, shapes, rules))
    trained, frozen_places = split_for_stage(places, system.trainable(recipe.stage), recipe.stage)
    state, frozen = jax.eval_shape(
        lambda params: create_state(system, params, optimizer, recipe.stage, recipe.seed), shapes
    )
    state_places = state_shardings(state, trained, mesh)
    return StageLayout(jax.tree.map(placed, state, state_places), jax.tree.map(placed, frozen, frozen_places), places)


def placed(leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
    """An array's shape with its sharding."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def stage_rules(
    system: System, recipe: TrainRecipe, shapes: Params, rules: Sequence[Rule] = PARAMETERS
) -> tuple[Rule, ...]:
    """Sharding rules of a recipe's stage: first one for each parameter that `frozen_whole` names, then `rules`.

    Raises:
        UserError: a pattern finds no parameter that the stage keeps frozen; names the nearest.
    """
    trains, leaves = system.trainable(recipe.stage), flatten(shapes)
    frozen = [path for path in leaves if not trains(path)]
    whole: dict[str, Rule] = {}
    for pattern in recipe.frozen_whole:
        found = [path for path in frozen if re.search(pattern, path)]
        if not found:
            trained = any(re.search(pattern, path) for path in leaves)
            raise UserError(_nothing_found(pattern, recipe.stage, frozen, trained))
        for path in found:
            if spec := rule_of(path, rules):
                whole[path] = (f"^{re.escape(path)}$", without(spec, "fsdp"))
    return (*whole.values(), *rules)


def _nothing_found(pattern: str, stage: str, frozen: list[str], trained: bool) -> str:
    parts = [path.split("/") for path in frozen]
    runs = {"/".join(names[start:end]) for names in parts for start in range(3) for end in range(start + 1, len(names))}
    near = difflib.get_close_matches(pattern, frozen, n=3, cutoff=0.0)
    return (
        f"frozen_whole '{pattern}' finds no parameter that stage '{stage}' keeps frozen"
        f"{': it trains all that the pattern finds' if trained else ''}.{suggest(pattern.strip('^$/'), runs)} "
        + (f"The nearest frozen paths: {', '.join(near)}." if near else "It freezes nothing.")
    )
