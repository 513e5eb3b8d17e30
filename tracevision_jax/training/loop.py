"""The training loop: from a system, a source of batches and a recipe to a trained model in a folder.

    summary = fit(system, recipe, source, "runs/x", evaluators={"held_out": evaluate})

The folder gets `checkpoints/`, `model/` (the final parameters, `weights/model_directory.py`),
`metrics.jsonl`, `bad_records.jsonl` and `tensorboard/`. The same call again continues from the newest whole
checkpoint, and ends in the very same bits as a run that was never stopped (same mesh, program and libraries).
The host waits for a step only after it has sent the next one to the device.
"""

import contextlib
import errno
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from rich.console import Console

from tracevision_jax.errors import UserError
from tracevision_jax.layers.lora import merged
from tracevision_jax.parallel.mesh import batch_sharding, check_rows, make_mesh
from tracevision_jax.parallel.rules import PARAMETERS, Rule
from tracevision_jax.systems.adapted import with_adapters
from tracevision_jax.systems.config_json import to_json
from tracevision_jax.systems.protocol import Params, System
from tracevision_jax.training.checkpoints import Checkpoints
from tracevision_jax.training.clock import Clock
from tracevision_jax.training.goodput import Goodput
from tracevision_jax.training.initialise import initialise
from tracevision_jax.training.interruption import Interruption
from tracevision_jax.training.journal import Journal, say
from tracevision_jax.training.layout import stage_layout
from tracevision_jax.training.optimizer import learning_rate_schedule, make_optimizer
from tracevision_jax.training.parameters import count, merge
from tracevision_jax.training.profiling import Profile
from tracevision_jax.training.recipe import TrainRecipe, check, differences
from tracevision_jax.training.retention import score_of
from tracevision_jax.training.source import BatchSource, StepBatch
from tracevision_jax.training.stability import healthy
from tracevision_jax.training.step import TrainState, create_state, make_train_step
from tracevision_jax.weights.model_directory import is_model, save_model

Evaluator = Callable[[Params, int], Mapping[str, Any]]
"""(parameters, step) -> numbers, and pictures as (height, width, 3) uint8."""

EMPTY_LIMIT = 20
"""So many batches in a row without one usable record end the run: the data cannot be read at all."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

BACKS_LIMIT = 3
"""So many times one start of a run goes back to a checkpoint; once more ends it."""


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    step: int
    steps: int
    directory: Path
    model: Path | None
    """Folder of the trained model; None when the run was interrupted."""
    metrics: Mapping[str, Any]
    """The last line of `metrics.jsonl` of kind "train"; empty when no step was taken."""
    evaluations: Mapping[str, Mapping[str, float]]
    seconds: Mapping[str, float]
    """Wall time of each part of the run (`training/goodput.py`), over all its starts."""
    interrupted: str = ""
    """Name of the signal that ended the run early."""

    @property
    def finished(self) -> bool:
        """Whether all steps were taken."""
        return self.step == self.steps


@dataclass(frozen=True)
class Run:
    """What stays the same during a run."""

    system: System
    recipe: TrainRecipe
    source: BatchSource
    mesh: Mesh
    optimizer: optax.GradientTransformation
    directory: Path
    goodput: Goodput

    def meta(self) -> dict[str, Any]:
        """What a checkpoint says about the run that it belongs to."""
        return {"recipe": to_json(self.recipe), "data": self.source.fingerprint, "steps": self.source.steps}


def fit(
    system: System,
    recipe: TrainRecipe,
    source: BatchSource,
    directory: str | Path,
    *,
    evaluators: Mapping[str, Evaluator] | None = None,
    folders: Mapping[str, Callable[[Path], None]] | None = None,
    console: Console | None = None,
    rules: tuple[Rule, ...] = PARAMETERS,
    devices: Sequence[Any] | None = None,
    began: float | None = None,
) -> Summary:
    """Train, or continue, and export the model.

    Args:
        system: what is trained.
        recipe: how; `system`, `data` and `buckets` have become `system` and `source` already.
        source: batches by step number.
        directory: folder of the run.
        evaluators: called every `recipe.evaluation.every` steps and at the end.
        folders: {name: what writes the files of a folder of that name beside the exported parameters}.
        console: where lines go; standard output by default.
        rules: sharding of the parameters.
        devices: all by default.
        began: when the command began, as `time.perf_counter` tells it, if before this call.

    Raises:
        UserError: the recipe, the mesh and the data do not fit, the folder holds another run, or no data is
        usable.
    """
    goodput = Goodput(time.perf_counter() if began is None else began)
    check(recipe)
    console = console or Console(quiet=jax.process_index() > 0)
    mesh = make_mesh(recipe.mesh, devices)
    for rows in source.rows:
        check_rows(rows, recipe.accumulation, mesh)
    optimizer = make_optimizer(recipe.optimizer, source.steps)
    system = with_adapters(system, recipe.lora)
    run = Run(system, recipe, source, mesh, optimizer, Path(directory).absolute(), goodput)
    checkpoints = Checkpoints(run.directory / "checkpoints", recipe.checkpoint, lambda line: say(console, line))
    try:
        with jax.set_mesh(mesh), Interruption() as interruption:  # to the last save: a second SIGTERM must not cut it
            state, frozen = _start(run, checkpoints, rules, console)
            return _train(run, state, frozen, checkpoints, evaluators or {}, folders or {}, console, interruption)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise UserError(
            f"{run.directory} cannot be written: {error.strerror}. Make room and give the same command again: it goes "
            "on from the newest checkpoint."
        ) from error
    finally:
        checkpoints.close()


def _start(run: Run, checkpoints: Checkpoints, rules: tuple[Rule, ...], console: Console) -> tuple[TrainState, Params]:
    """The newest checkpoint's state, or a fresh one."""
    system, recipe, mesh, optimizer = run.system, run.recipe, run.mesh, run.optimizer

    def create(params: Params) -> tuple[TrainState, Params]:
        return create_state(system, params, optimizer, recipe.stage, recipe.seed)

    shapes = jax.eval_shape(system.init, jax.random.key(recipe.seed))
    layout = stage_layout(system, recipe, optimizer, shapes, mesh, rules)
    trained_count = f"{count(layout.state.trained):,} of {count(shapes):,} parameters"
    devices = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    say(console, f"{recipe.name}: stage '{recipe.stage}' trains {trained_count}, on {devices}")
    say(console, run.source.describe())
    with run.goodput.measure("restore"):
        step = checkpoints.latest()
    if step is not None:
        _check_same_run(run, checkpoints.meta(step))
        with run.goodput.measure("restore"):
            found = checkpoints.restore({"state": layout.state, "frozen": layout.frozen}, step)
        say(console, f"Continuing from the checkpoint of step {step}.")
        return found["state"], found["frozen"]
    fresh = initialise(system, recipe.seed, layout.parameters, recipe.init_from)
    for line in fresh.report:
        say(console, f"  {line}")
    places = jax.tree.map(lambda leaf: leaf.sharding, (layout.state, layout.frozen))
    state, frozen = jax.jit(create, out_shardings=places, donate_argnums=0)(fresh.params)
    return state, frozen


def _check_same_run(run: Run, saved: dict[str, Any]) -> None:
    """Refuse to continue another run than the one that the folder holds."""
    ours = run.meta()
    lines = differences(ours["recipe"], saved["recipe"])
    if ours["steps"] != saved["steps"]:
        lines.append(f"steps of the plan: {ours['steps']}, was {saved['steps']}")
    if ours["data"] != saved["data"]:
        lines.append("the data: its records or their sizes are others")
    if lines:
        raise UserError(
            f"{run.directory} holds another run; give another --out, or remove it. What differs:\n  "
            + "\n  ".join(lines)
        )


def _train(
    run: Run,
    state: TrainState,
    frozen: Params,
    checkpoints: Checkpoints,
    evaluators: Mapping[str, Evaluator],
    folders: Mapping[str, Callable[[Path], None]],
    console: Console,
    interruption: Interruption,
) -> Summary:
    """Take the steps that are left, then export."""
    recipe, steps, goodput = run.recipe, run.source.steps, run.goodput
    start = int(state.step)
    checkpoints.forget_scores_after(start)
    journal = Journal(run.directory, console, steps, start, recipe.log_every, goodput)
    step_function = make_train_step(
        run.system,
        run.optimizer,
        learning_rate_schedule(recipe.optimizer, steps),
        accumulation=recipe.accumulation,
        stability=recipe.stability,
        mesh=run.mesh,
        state_shardings=jax.tree.map(lambda leaf: leaf.sharding, state),
    )
    clock = Clock(journal, goodput, int(state.health.rejected))
    profile = Profile(recipe.profile, run.directory / "profile", journal.say)
    goodput.fill(time.perf_counter(), "start")
    backs, empty, compiled, saved, evaluated, done = 0, 0, set(), start if start else -1, -1, start

    def save() -> int:
        clock.drain()
        with goodput.measure("save"):
            checkpoints.save(done, {"state": state, "frozen": frozen}, run.meta())
        goodput.mark(done)
        return done

    def whole() -> Params:
        return merged(merge(state.trained, frozen), recipe.lora)

    def evaluate() -> bool:
        clock.drain()
        with goodput.measure("evaluation"):
            return _evaluate(evaluators, whole(), done, journal, checkpoints)

    try:
        # Closing it ends the data workers, also when a step fails.
        with contextlib.closing(on_device(run.source.batches(start), run.mesh, goodput)) as batches:
            for item, batch in batches:
                new = item.bucket not in compiled
                if new:
                    compiled.add(item.bucket)
                    journal.say(f"compiling for rows of {item.bucket}")
                journal.data(item)
                empty = empty + 1 if not item.batch.filled.any() else 0
                if empty == EMPTY_LIMIT:
                    reason, _ = (journal.bad_reasons.most_common(1) or [("no reason known", 0)])[0]
                    raise UserError(f"{empty} batches in a row held no usable record: {reason}.")
                done = item.step + 1
                profile.before(done, clock.drain)
                sent = time.perf_counter()
                with profile.step(done):
                    state, metrics = step_function(state, frozen, batch)
                if new:
                    goodput.note("compile", sent, time.perf_counter())
                    sent = time.perf_counter()
                clock.sent(done, item.epoch, metrics, sent, new)
                profile.after(done, clock.drain)
                if clock.rejected:  # no step ahead while in trouble, so that a continued run goes back at the same one
                    clock.drain()
                if clock.rejected >= recipe.stability.patience:
                    if backs == BACKS_LIMIT:
                        raise UserError(
                            f"The run went back {backs} times and is unstable again at step {done}; lower "
                            "optimizer.learning_rate or look at the data."
                        )
                    backs += 1
                    with goodput.measure("restore"):
                        state, frozen = _go_back(run, checkpoints, state, frozen, clock.rejected, journal)
                    clock.rejected = 0
                    clock.restart()
                best = False
                if evaluators and recipe.evaluation.every and done % recipe.evaluation.every == 0:
                    best, evaluated = evaluate(), done
                    clock.restart()
                checkpoints.check()
                if best or (recipe.checkpoint.every and done % recipe.checkpoint.every == 0):
                    saved = save()
                if interruption.reached(done):
                    break
        clock.drain()
        stopped = interruption.signal.name if interruption.signal and done < steps else ""
        if saved != done:
            saved = save()
        model = run.directory / "model" if not stopped else None
        if model and not (start == steps and is_model(model)):  # a finished run stays as it is, whatever read it since
            if evaluators and evaluated != done:
                evaluate()
            config = {"system": recipe.system, "model": to_json(run.system.config), "recipe": to_json(recipe)}
            with goodput.measure("export"):
                save_model(model, config, whole(), folders)
        with goodput.measure("save"):
            checkpoints.wait()
            checkpoints.prune()
        goodput.fill(time.perf_counter())
        journal.summary(done, str(checkpoints.path(done)), str(model) if model else None)
        if stopped:
            journal.say(f"Stopped by {stopped} after step {done}; the same command again continues from there.")
        metrics = journal.lines[-1] if journal.lines else {}
        return Summary(done, steps, run.directory, model, metrics, journal.evaluations, goodput.total(), stopped)
    finally:
        profile.close()
        clock.close()
        journal.close()


def _go_back(
    run: Run, checkpoints: Checkpoints, state: TrainState, frozen: Params, rejected: int, journal: Journal
) -> tuple[TrainState, Params]:
    """The state of the newest checkpoint from before the rejected steps, with the step number, and so the data, of now.

    Raises:
        UserError: there is no such checkpoint.
    """
    now = int(state.step)
    checkpoints.wait()
    step = checkpoints.latest(until=now - rejected)
    if step is None:
        raise UserError(
            f"The last {rejected} steps up to step {now} were rejected (loss or gradients not finite, or a spike), and "
            "there is no checkpoint from before them to go back to; lower optimizer.learning_rate, or save more often "
            "(checkpoint.every)."
        )
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        {"state": state, "frozen": frozen},
    )
    number, health = state.step, healthy()
    found = checkpoints.restore(shapes, step)
    health = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), health, state.health)
    run.goodput.undo(step)
    journal.went_back(now, step, rejected)
    return replace(found["state"], step=number, health=health), found["frozen"]


def _evaluate(
    evaluators: Mapping[str, Evaluator], params: Params, step: int, journal: Journal, checkpoints: Checkpoints
) -> bool:
    """Run all evaluators; whether the step is one of the best so far."""
    for name, evaluator in evaluators.items():
        began = time.perf_counter()
        values = evaluator(params, step)
        journal.evaluation(step, name, values, time.perf_counter() - began)
    config = checkpoints.config
    return bool(config.metric) and checkpoints.score(step, score_of(config, journal.evaluations))


def on_device(
    batches: Iterator[StepBatch], mesh: Mesh, goodput: Goodput
) -> Generator[tuple[StepBatch, Any], None, None]:
    """Send each batch to the devices while the step before it still runs."""
    sharding = batch_sharding(mesh)
    while True:
        with goodput.measure("input"):
            item = next(batches, None)
        if item is None:
            return
        yield item, jax.tree.map(lambda leaf: place_rows(leaf, sharding), item.batch)


def place_rows(rows: np.ndarray, sharding: jax.sharding.NamedSharding) -> jax.Array:
    """This process's rows as part of the global array."""
    if jax.process_count() == 1:
        return jax.device_put(rows, sharding)
    return jax.make_array_from_process_local_data(sharding, rows)
