"""jax's cache of compiled programs, on for every command: a run that continues does not compile again.

It lies in $XDG_CACHE_HOME/tracevision-jax (by default ~/.cache/tracevision-jax), in a folder for each kind of
processor, since programs for a CPU are built for its very features and a home directory may be shared by unlike
machines. The environment moves it or turns it off:

    TRACEVISION_COMPILATION_CACHE=/fast/disk    another folder
    TRACEVISION_COMPILATION_CACHE=off           none

jax's own JAX_COMPILATION_CACHE_DIR and JAX_ENABLE_COMPILATION_CACHE are left as they are. The folder may be deleted at
any time; jax compiles again what it cannot read. Call `enable` before jax is imported.
"""

import hashlib
import platform
from collections.abc import MutableMapping
from pathlib import Path

SETTING = "TRACEVISION_COMPILATION_CACHE"
OFF = ("off", "0", "no", "false")


def enable(environment: MutableMapping[str, str]) -> Path | None:
    """Name the cache's folder to jax; the folder, or None where there is no cache or jax has been told already."""
    wanted = environment.get(SETTING, "")
    if wanted.lower() in OFF or "JAX_COMPILATION_CACHE_DIR" in environment:
        return None
    folder = (Path(wanted) if wanted else default_folder(environment)) / processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written: a cache is a convenience
        return None
    environment["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    return folder


def default_folder(environment: MutableMapping[str, str]) -> Path:
    """The user's folder for caches, by the XDG base directory specification."""
    given = environment.get("XDG_CACHE_HOME", "")
    base = Path(given) if Path(given).is_absolute() else Path(environment.get("HOME", "~")).expanduser() / ".cache"
    return base / "tracevision-jax"


def processor() -> str:
    """Name of a folder that processors of the same features share, such as "x86_64-3f9a0c11"."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    features = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}) or lines[:1]
    return f"{platform.machine()}-{hashlib.sha256(' '.join(features).encode()).hexdigest()[:8]}"
