"""What every test shares: jax on the CPU in full float32, a compilation cache, real data, seeds, hypothesis.

jax reads the variables below when it is first imported, so nothing may import it before they are set;
processes that tests start inherit them.
"""

import os
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest

import tests.typechecking  # noqa: F401 - jaxtyping's hook looks it up by name

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Float32 products are exact to float32, on accelerators as well, where the default is less.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never reach for the network
# Programs compiled by earlier runs are loaded instead of compiled again; keyed by content, safe to delete.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could set its variables")

hypothesis.settings.register_profile(
    "ci",
    derandomize=True,
    max_examples=25,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("thorough", parent=hypothesis.settings.get_profile("ci"), max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data, `shared/data` beside the repository; a test that reads it skips without it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data not here: no folder {folder.parent.name}/{folder.name} beside the repository")
    return folder


@pytest.fixture
def rng() -> np.random.Generator:
    """Numpy's random numbers, the same in every run."""
    return np.random.default_rng(0)


@pytest.fixture
def key():
    """A jax random key, the same in every run."""
    import jax

    return jax.random.key(0)
