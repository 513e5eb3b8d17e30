"""Tests, in folders that mirror the packages; a package, so that no installed `tests` can shadow it."""
