"""Several processes that train together: how they find each other, which rows each makes, how one of them leaves.

    connect()                          # before anything else of jax; nothing happens without a launcher
    share, shares = share_of_rows(mesh)
    step = of_first(newest_step())     # one decides

`connect` takes what the environment says, in this order:
1. JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES, JAX_PROCESS_ID, and for several processes on a
   host JAX_LOCAL_DEVICE_IDS: what `tracevision supervise` sets, or anybody;
2. what jax finds itself (https://docs.jax.dev/en/latest/multi_process.html): SLURM, Open MPI, Cloud TPU, GKE.
Without either, and with JAX_NUM_PROCESSES=1, the process is alone and nothing is set up.
"""

import os
import sys
import traceback
from collections.abc import Mapping
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Int

from tracevision_jax.errors import UserError
from tracevision_jax.parallel.mesh import AXES

COORDINATOR, PROCESSES, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
LAUNCHED = (
    "SLURM_STEP_NODELIST",
    "OMPI_COMM_WORLD_SIZE",
    "JOB_COMPLETION_INDEX",
    "TPU_WORKER_HOSTNAMES",
    "TPU_PROCESS_ADDRESSES",
)
"""What launchers leave in the environment."""
NO_LAUNCHER = "coordinator_address should be defined"
"""What jax says when no launcher is there."""
TOO_LATE = "must be called before"
"""What it says in a program that has computed something already; with no launcher in sight that is its own affair."""


class AgreedError(UserError):
    """A mistake that all processes know of: they end as usual, and the first says why."""


def connect(environment: Mapping[str, str] = os.environ) -> None:
    """Join the other processes of this run, if there are any; returns once all have come (or after 5 minutes fails).

    Raises:
        UserError: the variables are incomplete or do not fit together, or a launcher was found and the others were not.
    """
    if jax.distributed.is_initialized() or is_alone(environment):
        return
    try:
        if explicit := read_explicit(environment):
            address, processes, process = explicit
            jax.distributed.initialize(address, processes, process, cluster_detection_method="deactivate")
        else:
            jax.distributed.initialize()
    except Exception as error:
        nobody = not any(name in environment for name in (COORDINATOR, *LAUNCHED))
        if NO_LAUNCHER in str(error) or (TOO_LATE in str(error) and nobody):
            return
        raise UserError(
            f"The processes of this run did not find each other: {error}. Check that process 0 runs and that its "
            f"address and port can be reached from all hosts; or name them with {COORDINATOR}, {PROCESSES} and "
            f"{PROCESS}. To train on this host alone set {PROCESSES}=1."
        ) from error


def is_alone(environment: Mapping[str, str]) -> bool:
    """Whether the environment says that there is one process.

    One task of SLURM is alone: jax would join it to itself, and show it a single GPU of those that it was given. So is
    a Kubernetes pod that belongs to no indexed job and no TPU slice, such as a notebook's, and a TPU slice of one host.
    """
    if PROCESSES in environment:
        return environment[PROCESSES] == "1"
    if COORDINATOR in environment or PROCESS in environment:
        return False
    if "SLURM_STEP_NODELIST" in environment:
        return environment.get("SLURM_NTASKS", "1") == "1"
    if "JOB_COMPLETION_INDEX" in environment or "TPU_PROCESS_ADDRESSES" in environment:
        return False
    if "TPU_WORKER_HOSTNAMES" in environment:
        slices = environment.get("MEGASCALE_NUM_SLICES", "1")
        return "," not in environment["TPU_WORKER_HOSTNAMES"] and slices == "1"
    return "KUBERNETES_SERVICE_HOST" in environment


def read_explicit(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    """(address of process 0, number of processes, number of this one) if the variables are set.

    Raises:
        UserError: some are missing, or are no numbers in range; says which.
    """
    names = (COORDINATOR, PROCESSES, PROCESS)
    if not any(name in environment for name in names):
        return None
    if missing := [name for name in names if not environment.get(name)]:
        raise UserError(
            f"{' and '.join(missing)} must be set as well: the three of {', '.join(names)} say who trains together."
        )
    address, processes, process = (environment[name] for name in names)
    if not (processes.isdecimal() and process.isdecimal() and int(process) < int(processes)):
        raise UserError(
            f"{PROCESS}={process} of {PROCESSES}={processes}: numbers, the first from 0 to below the second."
        )
    if not address.rpartition(":")[2].isdecimal():
        raise UserError(f"{COORDINATOR}={address} names no port: write host:port.")
    return address, int(processes), int(process)


def share_of_rows(mesh: Mesh) -> tuple[int, int]:
    """(which share of each batch this process makes, number of shares); UserError as `share_of`."""
    numbers = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    return share_of(numbers, jax.process_index())


def share_of(numbers: Int[np.ndarray, "data fsdp tensor context"], process: int) -> tuple[int, int]:
    """(which share of each batch a process makes, number of shares), from the process of every device of a mesh.

    Rows lie along the first two axes. Processes whose devices hold the same rows (a slice of tensors or tokens spans
    them) make the same share.

    Raises:
        UserError: the mesh gives a process a part of the rows of another.
    """
    lines = numbers.reshape(numbers.shape[0] * numbers.shape[1], -1)
    rows = {int(number): tuple(np.flatnonzero((lines == number).any(1))) for number in np.unique(numbers)}
    shares = sorted(set(rows.values()))
    if sum(map(len, shares)) != len(lines) or len({len(share) for share in shares}) != 1:
        sizes = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, numbers.shape, strict=True))
        raise UserError(
            f"A mesh of {sizes} gives {len(rows)} processes rows that overlap in part; choose sizes of tensor and "
            "context that divide the devices of a process, or are multiples of them."
        )
    return shares.index(rows[process]), len(shares)


def of_first(value: int) -> int:
    """What the first process says, on all of them."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.asarray(value, np.int32)))


def gather(text: str) -> list[str]:
    """The text of every process, in their order, on all of them."""
    if jax.process_count() == 1:
        return [text]
    content = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.asarray(len(content), np.int32))
    padded = np.zeros(max(int(lengths.max()), 1), np.uint8)
    padded[: len(content)] = content
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


def leave(error: BaseException) -> NoReturn:
    """End this process because of an error that the others do not know of.

    An ordinary exit would wait for the others, which wait for this one in a sum over all devices. Where there are no
    others, or they know, the error is raised again.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1 or isinstance(error, AgreedError | SystemExit):
        raise error
    who = f"process {jax.process_index()} of {jax.process_count()}"
    if isinstance(error, UserError):
        print(f"tracevision: {who}: {error}", file=sys.stderr)
        code = 2
    elif isinstance(error, KeyboardInterrupt):
        print(f"tracevision: {who}: interrupted", file=sys.stderr)
        code = 130
    else:
        print(f"tracevision: {who}:", file=sys.stderr)
        traceback.print_exception(error)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
