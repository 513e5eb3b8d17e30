"""`TrainRecipe`: everything that makes a training run, as one frozen dataclass; every field is a flag.

A recipe file of `configs/` builds one and registers it (`configs/registry.py`), opening with its command, the
hardware it is for and the result to expect:

    register(TrainRecipe(
        name="tracevision_7b_stage1",
        system="tracevision", model=tracevision_7b(), stage="stage1",
        data=DataConfig(sources=(SourceEntry("localized_narratives", options={"split": "train"}),),
        root="..."), buckets=(Bucket(tokens=2048, frames=1, windows=64, conversations=4, points=64,
        masks=4),), rows=(256,), epochs=1, optimizer=OptimizerConfig(learning_rate=1e-3),
        mesh=MeshConfig(fsdp=64),
    ))

Names become objects through the registries of `configs/registry.py`:
- `system`: a `SystemEntry`, which builds the `System` from `model`, the data pieces (records, sizes, rows,
  collate) from `data`, and the evaluators of `evaluation`;
- `data.sources[i].source`: what opens a dataset; a name that is announced but has no reader yet says so at
  start.

`tracevision train NAME --optimizer.learning-rate 3e-4 --init-from DIR --out DIR` overrides fields.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from tracevision_jax.errors import UserError
from tracevision_jax.layers import lora
from tracevision_jax.layers.lora import LoRAConfig
from tracevision_jax.parallel.mesh import MeshConfig
from tracevision_jax.training.optimizer import OptimizerConfig
from tracevision_jax.training.optimizer import faults as optimizer_faults
from tracevision_jax.training.profiling import parse as parse_profile
from tracevision_jax.training.retention import CheckpointConfig
from tracevision_jax.training.retention import faults as retention_faults
from tracevision_jax.training.stability import StabilityConfig


@dataclass(frozen=True)
class SourceEntry:
    """One dataset of a mixture."""

    source: str
    """Name in the registry of sources."""
    repetitions: float = 1.0
    """How often an epoch goes through it; 0.5 is every record once in two epochs."""
    tasks: tuple[str, ...] = ()
    """Task kinds to make conversations of; empty: all that the records can serve."""
    options: dict[str, Any] = field(default_factory=dict)
    """What the source's reader takes."""


@dataclass(frozen=True)
class DataConfig:
    """The mixture, and how it is read."""

    sources: tuple[SourceEntry, ...] = ()
    root: str = ""
    """Folder or bucket that relative paths of the sources start from."""
    seed: int = 0
    """Seed of the epoch plan: order, packing, batches."""
    workers: int = 0
    """Processes that make batches; 0 makes them in threads of the training process."""
    prefetch: int = 4
    """Batches that are made ahead."""
    retries: int = 3
    """How often to try again what may pass: a read that fails (0.1 s, 0.4 s, 1.6 s later), a worker that dies."""
    timeout: float = 600.0
    """Seconds to wait for a batch; then the reading hangs."""
    bad_limit: float = 0.2
    """Share of the last thousand records that may be unusable; more end the run with the file that holds most."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation while training."""

    every: int = 0
    """Steps between evaluations; 0 evaluates never."""
    samples: int = 64
    """Held-out samples of each evaluation."""
    pictures: int = 4
    """Pictures of held-out answers for TensorBoard of each evaluation; 0 draws none."""
    sources: tuple[SourceEntry, ...] = ()
    """Held-out records whose loss is measured."""


@dataclass(frozen=True)
class TrainRecipe:
    """A training run. Any field is a flag; nested ones are joined by a dot (--mesh.fsdp 64)."""

    name: str
    """Name in the registry, and of the folder under runs/."""
    system: str = ""
    """Which system: a name in the registry of systems."""
    model: Any = None
    """The system's own configuration."""
    stage: str = ""
    """Which parameters are trained: a stage of the system."""
    lora: LoRAConfig = LoRAConfig()
    """Kernels that are trained through low-rank adapters, whatever the stage says of them; merged at export."""
    data: DataConfig = DataConfig()
    buckets: tuple[Any, ...] = ()
    """Shapes of rows, as the system names them (`Bucket`, `ClipBucket`); one program is compiled for each that the data
    uses."""
    rows: tuple[int, ...] = (8,)
    """Rows of a global batch for each bucket, or one number for all."""
    accumulation: int = 1
    """Microbatches of one update."""
    steps: int = 0
    """Updates of the run; 0: as many as `epochs` take."""
    epochs: float = 1.0
    """Passes through the mixture, when `steps` is 0."""
    seed: int = 0
    """Seed of fresh parameters and of the step's randomness."""
    optimizer: OptimizerConfig = OptimizerConfig()
    stability: StabilityConfig = StabilityConfig()
    mesh: MeshConfig = MeshConfig()
    frozen_whole: tuple[str, ...] = ()
    """Patterns (regular expressions, searched in paths) of frozen parameters that every chip keeps whole along fsdp,
    such as vision/: they are gathered no more, and take their full bytes on every chip; along tensor they are cut."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    profile: str = ""
    """FIRST:LAST, steps to trace with jax.profiler into OUT/profile, such as 10:12."""
    log_every: int = 1
    """Steps between lines of the console and the metrics file."""
    init_from: str = ""
    """Folder to start from: a converted host, or the model of the stage before; the rest starts fresh."""
    out: str = ""
    """Folder of the run; by default runs/NAME. A run that is there already is continued."""


RUN_ONLY = (
    "out",
    "log_every",
    "profile",
    "checkpoint",
    "evaluation",
    "mesh",
    "frozen_whole",
    "data.workers",
    "data.prefetch",
    "data.retries",
    "data.timeout",
    "data.bad_limit",
)
"""Fields that may differ when a run is continued: they change no batch and no formula."""


def differences(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """Where two recipes as JSON (`systems.config_json`) differ in what makes a run: lines "field: ours, was theirs"."""
    if path in RUN_ONLY:
        return []
    if isinstance(ours, dict) and isinstance(theirs, dict):
        lines = []
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            inner = f"{path}.{key}" if path else key
            lines += differences(ours.get(key), theirs.get(key), inner)
        return lines
    return [] if ours == theirs else [f"{path}: {ours!r}, was {theirs!r}"]


def check(recipe: TrainRecipe) -> None:
    """Check what can be checked before anything is built; UserError names every fault at once."""
    faults = []
    if recipe.steps < 0 or (recipe.steps == 0 and recipe.epochs <= 0):
        faults.append("steps or epochs must be positive")
    if recipe.accumulation < 1:
        faults.append(f"accumulation is {recipe.accumulation}, must be at least 1")
    if not recipe.buckets:
        faults.append("buckets is empty")
    if len(recipe.rows) not in (1, len(recipe.buckets)):
        faults.append(f"rows has {len(recipe.rows)} numbers for {len(recipe.buckets)} buckets")
    if any(rows < 1 for rows in recipe.rows):
        faults.append("rows must be positive")
    if recipe.log_every < 1:
        faults.append("log_every must be at least 1")
    if recipe.data.retries < 0 or recipe.data.timeout <= 0 or not 0 <= recipe.data.bad_limit <= 1:
        faults.append("data.retries must not be negative, data.timeout positive, data.bad_limit between 0 and 1")
    for pattern in recipe.frozen_whole:
        try:
            re.compile(pattern)
        except re.error as error:
            faults.append(f"frozen_whole '{pattern}' is no regular expression ({error})")
    try:
        parse_profile(recipe.profile)
    except UserError as error:
        faults.append(str(error))
    faults += lora.faults(recipe.lora)
    faults += optimizer_faults(recipe.optimizer)
    faults += retention_faults(recipe.checkpoint, recipe.evaluation.every)
    if recipe.stability.patience < 2 or recipe.stability.spike < 0:
        faults.append("stability.patience must be at least 2 and stability.spike not negative")
    if any(entry.repetitions <= 0 for entry in recipe.data.sources):
        faults.append("repetitions of a source must be positive")
    if faults:
        raise UserError(f"Recipe '{recipe.name}' cannot be run: {'; '.join(faults)}.")
