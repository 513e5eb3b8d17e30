"""`tracevision launch`: the rendered jobs are valid, say what was asked for, and refuse what cannot run."""

import dataclasses
import shlex
import subprocess

import pytest
import yaml

from configs import registry
from launch.cli import main
from launch.launch import TPUS, Host, Tpu, hosts_of, tpu_values
from tests.launch.test_train import tiny  # noqa: F401 - the registry with the recipe "tiny_numbers"
from tracevision_jax.errors import UserError
from tracevision_jax.parallel.topologies import CHIPS

OUT = ["--", "--out", "/data/runs/it's first", "--rows", "512"]
"""A folder that must be quoted everywhere."""
GKE = ["gke", "tiny_numbers", "--image", "registry/image:1", "--claim", "shared"]
XPK = ["xpk", "tiny_numbers", "--image", "i", "--cluster", "c", "--project", "p", "--zone", "z"]
TPU_VM = ["tpu-vm", "tiny_numbers", "--project", "p", "--zone", "z", "--setup", "pip install 'a[tpu] @ git+b'"]
SLURM = [
    "slurm",
    "tiny_numbers",
    "--nodes",
    "2",
    "--gpus",
    "8",
    "--account",
    "lab",
    "--setup",
    "source .venv/bin/activate",
]


@pytest.fixture
def rendered(capsys):
    def render(*words: str) -> str:
        assert main(["launch", *words]) == 0
        return capsys.readouterr().out

    return render


def train_command(words: list[str]) -> list[str]:
    """The part of a command from `tracevision train` on."""
    return words[words.index("train") - 1 :]


@pytest.mark.parametrize("words", [SLURM, XPK, TPU_VM], ids=lambda words: words[0])
def test_scripts_are_valid_bash_and_keep_the_words_of_the_command(rendered, tmp_path, words):
    text = rendered(*words, *OUT)
    (tmp_path / "job.sh").write_text(text)
    checked = subprocess.run(["bash", "-n", str(tmp_path / "job.sh")], capture_output=True, text=True)
    assert checked.returncode == 0 and not checked.stderr, checked.stderr
    assert "{{" not in text and "{%" not in text
    # What the shell makes of the script: programs that only print their arguments stand for the real ones.
    stub = tmp_path / "stub"
    stub.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done\n')
    stub.chmod(0o755)
    for name in ("srun", "xpk", "gcloud"):
        (tmp_path / name).symlink_to(stub)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    result = subprocess.run(
        ["bash", "job.sh", "train"],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    inner = [line.partition("=")[2] for line in lines if line.startswith("--command=")]
    command = train_command(shlex.split(inner[0]) if inner else lines)
    assert command[:7] == ["tracevision", "train", "tiny_numbers", *OUT[1:]]


def test_a_slurm_job_asks_for_a_task_a_gpu_and_comes_back_after_sigterm(rendered, tmp_path):
    text = rendered(*SLURM, "--grace", "120", *OUT)
    asked = {line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH")}
    assert {"--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--gpus-per-node=8", "--account=lab"} <= asked
    assert {"--signal=TERM@120", "--requeue"} <= asked and not any("partition" in word for word in asked)
    script = text.replace("srun ", "fake_srun ").replace("source .venv/bin/activate", "fake_srun() { return $CODE; }")
    script = script.replace("scontrol requeue", "echo requeued")
    for code, said in ((0, "finished"), (75, "requeued 17"), (2, "not tried again"), (137, "exit code 137")):
        result = subprocess.run(
            ["bash", "-c", script], env={"CODE": str(code), "SLURM_JOB_ID": "17"}, capture_output=True, text=True
        )
        assert result.returncode == code and said in result.stdout + result.stderr


def test_a_jobset_has_the_fields_of_its_schema(rendered):
    job = yaml.safe_load(rendered(*GKE, "--topology", "v5p:8x8x4", "--slices", "2", "--queue", "q", *OUT))
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert job["metadata"]["name"] == "tiny-numbers"
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q"}
    assert set(job["spec"]) == {"failurePolicy", "replicatedJobs"}
    assert job["spec"]["failurePolicy"]["maxRestarts"] == 20
    assert job["spec"]["failurePolicy"]["rules"][0]["action"] == "FailJobSet"
    (slices,) = job["spec"]["replicatedJobs"]
    assert slices["replicas"] == 2
    spec = slices["template"]["spec"]
    assert (spec["parallelism"], spec["completions"], spec["completionMode"]) == (64, 64, "Indexed")
    assert spec["backoffLimit"] == 0
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]  # a user's mistake is not tried again
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 300
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "8x8x4",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": 4}
    assert container["command"][:3] == ["tracevision", "supervise", "--"]
    assert train_command(container["command"]) == ["tracevision", "train", "tiny_numbers", *OUT[1:]]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "shared"}


def test_the_file_says_the_command_that_writes_it_again(rendered, tmp_path, capsys):
    text = rendered(*SLURM, *OUT)
    line = next(line for line in text.splitlines() if line.startswith("#   tracevision launch"))
    assert rendered(*shlex.split(line[1:])[2:]) == text
    assert main(["launch", *SLURM, "--write", str(tmp_path / "job.sh"), *OUT]) == 0
    assert (tmp_path / "job.sh").read_text() == text and (tmp_path / "job.sh").stat().st_mode & 0o100


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["slurm", "tiny_number"], "Did you mean 'tiny_numbers'?"),
        (["slurm", "tiny_numbers", "--gpus", "4", "--", "--mesh.fsdp", "3"], "needs a multiple of 3 devices"),
        (["slurm", "tiny_numbers", "--gpus", "8"], "4 rows a batch cannot be shared by 8 devices"),
        ([*GKE, "--slices", "2", *OUT, "--mesh.dcn.data", "4"], "fits: --mesh.dcn.data 2 --mesh.dcn.fsdp 1"),
        ([*XPK, "--slices", "3", *OUT, "--mesh.tensor", "3"], "3 slices cannot be shared by data 256 and fsdp 1"),
        ([*GKE[:4], *OUT], "also needed: --claim"),
        ([*GKE, "--topology", "h100:2x8", *OUT], "no TPU"),
        ([*GKE, "--topology", "v5p:8x8", *OUT], "v5p has 3"),
        ([*GKE, "--", "--out", "/elsewhere/run", "--rows", "256"], "the pods share /data only"),
        ([*XPK, "--name", "Upper_Case", *OUT], "small letters"),
        (["slurn", "tiny_numbers"], "Did you mean 'slurm'?"),
    ],
)
def test_what_could_not_run_is_refused_before_it_is_queued(capsys, words, said):
    assert main(["launch", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("topology", "kind", "host"),
    [
        ("v4:2x2x4", "v4-32", Host(4, 4)),
        ("v5e:2x4", "v5litepod-8", Host(1, 8)),
        ("v5e:16x16", "v5litepod-256", Host(64, 4)),
        ("v5p:8x8x4", "v5p-512", Host(64, 4)),
        ("v5p:2x2x1", "v5p-8", Host(1, 4)),
        ("v6e:16x16", "v6e-256", Host(64, 4)),
    ],
)
def test_slices_have_google_clouds_names_and_hosts(topology, kind, host):
    recipe = dataclasses.replace(registry.get("tiny_numbers"), rows=(256,))
    values = tpu_values(Tpu("tiny_numbers", topology=topology), recipe)
    assert values["kind"] == kind
    assert Host(values["hosts"], values["chips"]) == host


def test_every_tpu_that_can_be_compiled_for_can_be_launched_on():
    assert set(TPUS) == {name for name, chip in CHIPS.items() if chip.platform == "tpu"}


def test_chips_that_do_not_fill_their_hosts_are_refused():
    with pytest.raises(UserError, match="does not fill hosts of 4"):
        hosts_of((3, 3))
