"""`tracevision supervise`: who is to blame, one message, one exit code; on small programs that use no jax."""

import signal
import subprocess
import sys
import time

import pytest

from launch import supervise
from launch.supervise import Args, End, environments, verdict
from tests.conftest import ROOT
from tracevision_jax.errors import UserError

QUICK = 20.0
"""Seconds; everything here takes two or three on an idle machine."""


def start(program: str, *flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "launch", "supervise", *flags, "--", sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def supervised(program: str, *flags: str) -> tuple[int, str, str, float]:
    """Exit code, output, error output, seconds."""
    began = time.monotonic()
    process = start(program, *flags)
    out, error = process.communicate(timeout=60)
    return process.returncode, out, error, time.monotonic() - began


NUMBER = "import os, signal, sys, time; me = int(os.environ['JAX_PROCESS_ID'])\n"


def test_the_first_to_die_is_named_and_what_its_death_makes_others_say_is_left_out():
    program = NUMBER + (
        "print('hello', flush=True)\n"
        "if me == 1: time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)\n"
        "parent = os.getppid()\n"
        "time.sleep(0.9); print('peer is gone, pages of it', file=sys.stderr, flush=True); time.sleep(60)"
    )
    code, out, error, seconds = supervised(program, "--processes", "2")
    assert code == 128 + signal.SIGKILL
    assert sorted(out.splitlines()) == ["[1] hello", "hello"]
    assert error.splitlines() == [
        "tracevision supervise: process 1 of 2 was ended by SIGKILL (out of memory, or by hand); the other one was "
        "ended. The same command continues from the last checkpoint."
    ]
    assert seconds < QUICK


def test_the_message_of_the_process_that_failed_is_shown_once():
    program = NUMBER + "print('the mesh does not fit', file=sys.stderr); sys.exit(2)"
    code, _, error, _ = supervised(program, "--processes", "2")
    assert code == 2
    assert error.count("the mesh does not fit") == 1
    assert "failed with exit code 2, its messages are above" in error


def test_sigterm_goes_to_all_and_their_own_code_comes_back():
    program = NUMBER + (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print('ready', flush=True); time.sleep(60)"
    )
    process = start(program, "--processes", "2")
    assert {process.stdout.readline(), process.stdout.readline()} == {"ready\n", "[1] ready\n"}
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=QUICK)
    assert process.returncode == 75
    assert error == "tracevision supervise: saved after SIGTERM. The same command continues from there.\n"


def test_what_does_not_end_within_the_grace_period_is_killed_with_all_that_it_started():
    program = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    process = start(program, "--grace", "0.5")
    worker = int(process.stdout.readline())
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=QUICK)
    assert process.returncode == 128 + signal.SIGKILL and time.monotonic() - began < QUICK
    assert "1 of the processes did not end within 0.5 s; the other one was ended" in error
    assert gone(worker)


def test_processes_end_with_a_supervisor_that_was_killed():
    process = start("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    child = int(process.stdout.readline())
    process.kill()
    process.communicate()
    assert gone(child)


def gone(pid: int) -> bool:
    """Whether a process ends soon; a zombie, which nobody here may reap, has ended."""
    deadline = time.monotonic() + QUICK
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_one_process_keeps_the_launchers_environment_and_several_get_their_own():
    assert environments(Args()) == [{}]
    found = environments(Args(processes=2, devices=4, nodes=2, node=1, coordinator="first:7777"))
    assert found[1] == {
        "JAX_COORDINATOR_ADDRESS": "first:7777",
        "JAX_NUM_PROCESSES": "4",
        "JAX_PROCESS_ID": "3",
        "JAX_LOCAL_DEVICE_IDS": "4,5,6,7",
    }


@pytest.mark.parametrize(
    ("ends", "code", "said"),
    [
        ({0: End(0, 1), 1: End(0, 2)}, 0, ""),
        ({0: End(75, 1), 1: End(75, 2)}, 75, "saved after SIGTERM"),
        ({0: End(75, 1), 1: End(0, 2)}, 75, "saved after SIGTERM"),
        ({0: End(130, 1), 1: End(75, 2)}, 130, "saved after Ctrl-C"),
        ({0: End(-6, 2.1), 1: End(-9, 2.0)}, 137, "process 1 of 2 was ended by SIGKILL"),
        ({0: End(1, 2.1), 1: End(2, 2.0)}, 2, "process 1 of 2 failed with exit code 2"),
        ({0: End(75, 1.0), 1: End(1, 2.0)}, 1, "process 1 of 2 failed with exit code 1"),
        ({0: End(-9, 3, by_us=True), 1: End(-11, 2)}, 139, "SIGSEGV; the other one was ended"),
    ],
)
def test_the_exit_code_is_that_of_the_first_to_fail(ends, code, said):
    found, message = verdict(ends, 2)
    assert found == code and said in message and bool(said) == bool(message)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="after --"):
        supervise.parse(["--processes", "2"])
    with pytest.raises(UserError, match="--coordinator"):
        supervise.run(Args(command=("true",), nodes=2))
    with pytest.raises(UserError, match="below --nodes"):
        supervise.run(Args(command=("true",), node=1))


def test_a_command_that_is_not_there_is_a_mistake():
    with pytest.raises(UserError, match="there is no command 'no-such-program'"):
        supervise.run(Args(command=("no-such-program",)))
