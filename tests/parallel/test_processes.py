"""How processes find each other, what each makes of a batch, and what they tell when they disagree."""

import numpy as np
import pytest

from tracevision_jax.errors import UserError
from tracevision_jax.parallel import agreement
from tracevision_jax.parallel.processes import is_alone, read_explicit, share_of

EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "first:7777", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


def mesh_of(processes: int, each: int, *shape: int) -> np.ndarray:
    """Number of the process of every device, devices in order."""
    return np.repeat(np.arange(processes), each).reshape(shape)


@pytest.mark.parametrize(
    ("numbers", "shares"),
    [
        (mesh_of(2, 4, 8, 1, 1, 1), [(0, 2), (1, 2)]),
        (mesh_of(2, 4, 2, 2, 2, 1), [(0, 2), (1, 2)]),
        (mesh_of(2, 4, 1, 1, 8, 1), [(0, 1), (0, 1)]),  # a tensor axis over all: everybody makes every row
        (mesh_of(4, 2, 2, 1, 2, 2), [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (np.array([0, 1, 0, 1]).reshape(1, 4, 1, 1), [(0, 2), (1, 2)]),  # devices of a process need not be neighbours
    ],
)
def test_processes_make_the_rows_that_their_devices_hold(numbers, shares):
    assert [share_of(numbers, process) for process in range(len(shares))] == shares


def test_a_mesh_that_cuts_across_processes_is_refused():
    with pytest.raises(UserError, match="rows that overlap in part"):
        share_of(mesh_of(2, 3, 1, 2, 1, 3)[:, :, :, [0, 1, 2]].reshape(1, 3, 2, 1), 0)


def test_the_variables_of_an_explicit_start_are_read():
    assert read_explicit(EXPLICIT) == ("first:7777", 4, 3)
    assert read_explicit({}) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID must be set as well"),
        ({"JAX_PROCESS_ID": "4"}, "from 0 to below"),
        ({"JAX_NUM_PROCESSES": "many"}, "JAX_NUM_PROCESSES=many"),
        ({"JAX_COORDINATOR_ADDRESS": "first"}, "names no port"),
    ],
)
def test_an_explicit_start_that_is_incomplete_is_refused(change, said):
    with pytest.raises(UserError, match=said):
        read_explicit(EXPLICIT | change)


@pytest.mark.parametrize(
    ("environment", "alone"),
    [
        ({}, False),  # jax looks whether there is a launcher that the environment does not show
        ({"JAX_NUM_PROCESSES": "1"}, True),
        (EXPLICIT, False),
        ({"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"}, True),
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "16"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "TPU_WORKER_HOSTNAMES": "a,b"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, False),
    ],
)
def test_who_is_alone_is_told_from_the_environment(environment, alone):
    assert is_alone(environment) is alone


def test_differing_facts_name_who_has_what():
    same = {"code": "a", "recipe.seed": "0", "steps": "9"}
    told = [same, same, same | {"recipe.seed": "1"}, same, {"code": "b", "recipe.seed": "0"}]
    assert agreement.differences(told) == [
        "code: a on processes 0-3; b on process 4",
        "recipe.seed: 0 on processes 0-1, 3-4; 1 on process 2",
        "steps: 9 on processes 0-3; (none) on process 4",
    ]


def test_a_recipe_becomes_flat_facts():
    content = {"": "Recipe", "mesh": {"fsdp": 2}, "rows": [8, 4], "empty": [], "out": ""}
    assert dict(agreement.flat(content, "recipe")) == {
        "recipe (class)": '"Recipe"',
        "recipe.mesh.fsdp": "2",
        "recipe.rows[0]": "8",
        "recipe.rows[1]": "4",
        "recipe.empty": "[]",
        "recipe.out": '""',
    }


def test_one_changed_file_changes_the_fingerprint_of_the_code(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("x = 1\n")
    before = agreement.code_fingerprint([package])
    (package / "notes.txt").write_text("no code")
    assert agreement.code_fingerprint([package]) == before
    (package / "a.py").write_text("x = 2\n")
    assert agreement.code_fingerprint([package]) != before


def test_a_process_that_is_alone_raises_its_own_mistake(tmp_path):
    mistake = UserError("the data cannot be had")
    with pytest.raises(UserError) as raised:
        agreement.agree({}, mistake)
    assert raised.value is mistake
    agreement.agree(agreement.environment_facts())
    agreement.check_shared(tmp_path / "run")
    assert not (tmp_path / "run").exists()
