"""Write what starts a recipe on a cluster: SLURM (GPU), GKE JobSet, XPK or TPU VM (TPU).

The recipe and its flags are read here as `tracevision train` reads them, and the mesh and the rows are checked against
the chips asked for, so that a mistake shows now and not after hours in a queue. The templates lie in launch/templates/;
facts about TPU come from Google Cloud's pages on TPU versions and on TPUs in GKE.
"""

import dataclasses
import math
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from tracevision_jax.errors import UserError

TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class TpuKind:
    """What Google Cloud calls a TPU."""

    accelerator: str
    """Label of GKE's nodes."""
    prefix: str
    """Of the accelerator type."""
    units: int
    """What the number of the accelerator type counts, for each chip: chips, or TensorCores."""
    runtime: str
    """Software version of a TPU VM."""


TPUS = {
    "v4": TpuKind("tpu-v4-podslice", "v4", 2, "tpu-ubuntu2204-base"),
    "v5e": TpuKind("tpu-v5-lite-podslice", "v5litepod", 1, "v2-alpha-tpuv5-lite"),
    "v5p": TpuKind("tpu-v5p-slice", "v5p", 2, "v2-alpha-tpuv5"),
    "v6e": TpuKind("tpu-v6e-slice", "v6e", 1, "v2-alpha-tpuv6e"),
}


@dataclass(frozen=True)
class Common:
    """What all of them take."""

    recipe: tyro.conf.Positional[str]
    """A recipe of configs/; flags of `tracevision train` follow after `--`."""
    write: Annotated[Path | None, tyro.conf.arg(name="write")] = None
    """File to write; by default it is printed."""
    name: str = ""
    """Of the job; by default made of the recipe's."""
    flags: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """What stood after `--`."""


@dataclass(frozen=True)
class Slurm(Common):
    """Write a batch script for SLURM, one process a GPU.

    Examples:
      tracevision launch slurm tracevision_7b_stage1 --nodes 2 --write job.sh -- --out /data/runs/s1 --mesh.fsdp 16
      sbatch job.sh
    """

    nodes: int = 1
    gpus: int = 8
    """GPUs of a node."""
    cpus: int = 12
    """Cores of each process."""
    time: str = "24:00:00"
    """Limit, as sbatch takes it; the run saves before it and is queued again."""
    grace: int = 300
    """Seconds before the limit at which it saves."""
    partition: str = ""
    account: str = ""
    setup: str = ""
    """Shell line that makes the command available, such as `source .venv/bin/activate`."""


@dataclass(frozen=True)
class Tpu(Common):
    """What all TPUs take."""

    topology: str = "v5p:8x8x4"
    """KIND:SHAPE of one slice: v4, v5e, v5p or v6e, and chips along each dimension."""


@dataclass(frozen=True)
class Gke(Tpu):
    """Write a JobSet for Google Kubernetes Engine, one process a TPU host.

    Examples:
      tracevision launch gke tracevision_7b_stage1 --topology v5p:8x8x4 --image REGION-docker.pkg.dev/P/R/tracevision
        --claim shared --write job.yaml -- --out /data/runs/s1 --mesh.fsdp 256
      kubectl apply -f job.yaml
    """

    slices: int = 1
    image: str = ""
    """Container image with this package and jax[tpu]."""
    claim: str = ""
    """PersistentVolumeClaim that all pods share, for data and runs (Filestore, or Cloud Storage FUSE)."""
    mount: str = "/data"
    """Where it appears."""
    namespace: str = "default"
    queue: str = ""
    """LocalQueue of Kueue, if the cluster has it."""
    restarts: int = 20
    grace: int = 300
    """Seconds from SIGTERM to SIGKILL."""


@dataclass(frozen=True)
class Xpk(Tpu):
    """Write a call of XPK, which makes a JobSet itself, one process a TPU host.

    Examples:
      tracevision launch xpk tracevision_7b_stage1 --topology v5p:8x8x4 --cluster C --project P --zone Z --image I
        --write job.sh -- --out /data/runs/s1 --mesh.fsdp 256
      bash job.sh
    """

    slices: int = 1
    image: str = ""
    """Container image with this package and jax[tpu]."""
    cluster: str = ""
    project: str = ""
    zone: str = ""
    restarts: int = 20


@dataclass(frozen=True)
class TpuVm(Tpu):
    """Write gcloud calls that create TPU VMs, set them up, and train on all hosts.

    Examples:
      tracevision launch tpu-vm tracevision_7b_stage1 --topology v5e:16x16 --project P --zone Z
        --setup "pip install 'tracevision-jax[tpu] @ git+https://HOST/REPOSITORY'" --write job.sh -- --out /data/runs/s1
      bash job.sh create && bash job.sh setup && bash job.sh train
    """

    project: str = ""
    zone: str = ""
    setup: str = ""
    """Shell line that installs this package on a host."""
    spot: bool = False
    """Cheaper, and taken away at any time."""


Args = (
    Annotated[Slurm, tyro.conf.subcommand("slurm")]
    | Annotated[Gke, tyro.conf.subcommand("gke")]
    | Annotated[Xpk, tyro.conf.subcommand("xpk")]
    | Annotated[TpuVm, tyro.conf.subcommand("tpu-vm")]
)

FILES = {Slurm: "slurm.sh.jinja", Gke: "gke.yaml.jinja", Xpk: "xpk.sh.jinja", TpuVm: "tpu_vm.sh.jinja"}
WORDS = {Slurm: "slurm", Gke: "gke", Xpk: "xpk", TpuVm: "tpu-vm"}
NEEDED = {Gke: ("image", "claim"), Xpk: ("image", "cluster", "project", "zone"), TpuVm: ("project", "zone", "setup")}


@dataclass(frozen=True)
class Host:
    """TPU hosts of a slice."""

    hosts: int
    chips: int
    """Of each."""


def parse(argv: list[str]) -> Any:
    """Flags up to `--`, then those of `tracevision train`."""
    from launch.cli import parse_with_tyro

    cut = argv.index("--") if "--" in argv else len(argv)
    args = parse_with_tyro(Args, argv[:cut], "tracevision launch", description=__doc__)
    return dataclasses.replace(args, flags=tuple(argv[cut + 1 :]))


def run(args: Any) -> None:
    """Render, and write or print."""
    text = render(args)
    if args.write is None:
        sys.stdout.write(text)
        return
    args.write.write_text(text, encoding="utf-8")
    if args.write.suffix == ".sh":
        args.write.chmod(0o755)
    print(f"Wrote {args.write}.")


def render(args: Any) -> str:
    """The file's text.

    Raises:
        UserError: the recipe or a flag of it is unknown, does not fit the chips, or something needed is not given.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from launch import train

    kind = type(args)
    if missing := [name for name in NEEDED.get(kind, ()) if not getattr(args, name)]:
        raise UserError(f"also needed: {', '.join('--' + name for name in missing)}.")
    recipe = train.parse([args.recipe, *args.flags]).recipe
    command = ["tracevision", "train", args.recipe, *args.flags]
    values = dataclasses.asdict(args)
    values |= {
        "name": args.name or re.sub(r"[^a-z0-9]+", "-", args.recipe.lower()).strip("-"),
        "written_by": _written_by(args),
        "out": recipe.out or f"runs/{recipe.name}",
    }
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?", values["name"]):
        raise UserError(f"--name is '{values['name']}': up to 40 small letters, digits and inner hyphens.")
    if isinstance(args, Slurm):
        check_fits(recipe, args.nodes * args.gpus)
        values["command"] = shlex.join(command)
    else:
        values |= tpu_values(args, recipe)
        whole = ["tracevision", "supervise", "--", *command]  # one message a host, whatever ends the process
        values["command"] = whole if isinstance(args, Gke) else shlex.join(whole)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["quote"] = shlex.quote
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    return environment.get_template(FILES[kind]).render(values)


def tpu_values(args: Any, recipe: Any) -> dict[str, Any]:
    """What a template says of the chips."""
    from tracevision_jax.parallel.topologies import topology

    wanted = topology(args.topology, getattr(args, "slices", 1))
    if wanted.chip.name not in TPUS:
        raise UserError(f"--topology is {args.topology}, which is no TPU; for GPU: tracevision launch slurm.")
    check_fits(recipe, wanted.devices, wanted.slices)
    if isinstance(args, Gke) and not Path(recipe.out).is_relative_to(args.mount):
        raise UserError(
            f"the pods share {args.mount} only; put the run there: -- --out {args.mount}/runs/{recipe.name}"
        )
    tpu, chips = TPUS[wanted.chip.name], math.prod(wanted.shape)
    host = hosts_of(wanted.shape)
    return {
        "shape": "x".join(map(str, wanted.shape)),
        "hosts": host.hosts,
        "chips": host.chips,
        "accelerator": tpu.accelerator,
        "kind": f"{tpu.prefix}-{chips * tpu.units}",
        "runtime": tpu.runtime,
    }


def hosts_of(shape: tuple[int, ...]) -> Host:
    """Hosts of a slice: four chips each; slices of up to eight chips in two dimensions have one.

    Raises:
        UserError: the chips do not fill their hosts.
    """
    chips = math.prod(shape)
    if chips <= 4 or sorted(shape) == [2, 4]:
        return Host(1, chips)
    if chips % 4:
        raise UserError(f"a slice of {chips} chips does not fill hosts of 4.")
    return Host(chips // 4, 4)


def check_fits(recipe: Any, devices: int, slices: int = 1) -> None:
    """Refuse a mesh or rows that so many devices cannot take, as `tracevision train` would at its start."""
    from jax.sharding import AbstractMesh

    from tracevision_jax.parallel.mesh import AXES, across_slices, check_rows, mesh_shape
    from tracevision_jax.training.recipe import check

    check(recipe)
    shape = mesh_shape(recipe.mesh, devices)
    across_slices(recipe.mesh, shape, slices)
    mesh = AbstractMesh(shape, AXES)
    for rows in recipe.rows:
        check_rows(rows, recipe.accumulation, mesh)


def _written_by(args: Any) -> str:
    """The command line that gives this file again, flags at their defaults left out."""
    words = ["tracevision", "launch", WORDS[type(args)], args.recipe]
    for each in dataclasses.fields(args):
        value = getattr(args, each.name)
        if each.name in ("recipe", "flags", "write") or value == each.default:
            continue
        words += [f"--{each.name}"] if value is True else [f"--{each.name}", str(value)]
    return shlex.join([*words, "--", *args.flags] if args.flags else words)
