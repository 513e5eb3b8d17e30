"""The cache of compiled programs: where it is, and how it is turned off."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.compilation_cache import SETTING, enable, processor

ROOT = Path(__file__).resolve().parents[2]


def test_it_lies_in_the_users_cache_in_a_folder_for_the_processor(tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    folder = enable(environment)
    assert folder == tmp_path / "tracevision-jax" / processor() and folder.is_dir()
    assert environment["JAX_COMPILATION_CACHE_DIR"] == str(folder)
    assert enable({"HOME": str(tmp_path)}) == tmp_path / ".cache" / "tracevision-jax" / processor()
    assert enable({SETTING: str(tmp_path / "fast")}) == tmp_path / "fast" / processor()


@pytest.mark.parametrize("setting", [{SETTING: "off"}, {SETTING: "0"}, {"JAX_COMPILATION_CACHE_DIR": "/elsewhere"}])
def test_the_environment_turns_it_off_or_names_jaxs_own(setting, tmp_path):
    environment = {"HOME": str(tmp_path), **setting}
    assert enable(environment) is None
    assert environment == {"HOME": str(tmp_path), **setting} and not list(tmp_path.iterdir())


def test_a_home_that_cannot_be_written_is_no_fault(tmp_path):
    (tmp_path / ".cache").write_text("a file")
    assert enable({"HOME": str(tmp_path)}) is None


def test_jax_keeps_programs_there(tmp_path):
    program = (
        "import os; from launch.compilation_cache import enable; enable(os.environ); "
        "import jax; jax.jit(lambda x: x * 2 + 1)(1.0)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {SETTING: str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, cwd=ROOT)
    assert list((tmp_path / processor()).iterdir())
