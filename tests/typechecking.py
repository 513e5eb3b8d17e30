"""The type checker that tests put behind every signature (`--jaxtyping-packages` in pyproject.toml).

jaxtyping wraps each function so that shapes and dtypes are compared with its annotations, names of axes bound
within one call. Constructors are the exception: Flax fills modules with sentinels, and jax rebuilds pytree
records from tracers, placeholders and slices. Those of the `Sample` record, which is neither, are checked.
"""

from collections.abc import Callable

from beartype import beartype

CHECKED_CONSTRUCTORS = ("tracevision_jax.records.sample",)


def check(function: Callable) -> Callable:
    """Check arguments and result of a function; leave a constructor alone, except those of plain records."""
    if function.__name__ == "__init__" and function.__module__ not in CHECKED_CONSTRUCTORS:
        return function
    return beartype(function)
