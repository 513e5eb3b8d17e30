"""A system's configuration as JSON and back: nested frozen dataclasses, each with its class name.

    content = to_json(config)
    config = from_json(TraceVisionConfig, content, "runs/stage2/model/config.json")

The form is that of the `config.json` of a model directory: an object per dataclass, its class name under "".
Reading is strict, since a mistake would change results silently: every field that is unknown, missing or of another
kind is named, all at once.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from tracevision_jax.errors import UserError
from tracevision_jax.nearest import suggest

T = TypeVar("T")
CLASS = ""
"""Key of the class name."""


def to_json(value: Any) -> Any:
    """JSON values of a dataclass of dataclasses, tuples, mappings, numbers, texts, booleans and None.

    Raises:
        TypeError: a value that JSON cannot hold.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {CLASS: type(value).__name__} | fields
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a configuration cannot hold a {type(value).__name__}")


def from_json(kind: type[T], content: Any, name: str = "the configuration") -> T:
    """Build a dataclass from what `to_json` gave.

    Args:
        kind: the class.
        content: decoded JSON.
        name: where it comes from, for messages.

    Raises:
        UserError: lists every unknown, missing or ill-typed field; or says why the class refuses the values.
    """
    faults: list[str] = []
    try:
        built = _read(kind, content, "", faults)
    except (ValueError, TypeError, UserError) as error:
        if not faults:
            raise UserError(f"{name} describes an impossible model: {error}") from error
        built = None
    if faults:
        raise UserError(f"{name} does not fit {kind.__name__}:\n  " + "\n  ".join(faults))
    return typing.cast(T, built)


class _Unusable:
    """Stands for a value whose fault is noted already."""


def _read(kind: Any, value: Any, place: str, faults: list[str]) -> Any:
    """The value of one field; notes a fault where it cannot be."""
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(typing.cast(type, kind), value, place, faults)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        if value in arguments:
            return value
        wanted = " or ".join(repr(choice) for choice in arguments)
        return _fault(faults, place, f"is {value!r}, must be {wanted}")
    if origin in (typing.Union, types.UnionType):
        for member in arguments:
            inner: list[str] = []
            result = _read(member, value, place, inner)
            if not inner:
                return result
        return _fault(faults, place, f"is {value!r}, must be {kind}")
    if origin is tuple:
        if not isinstance(value, list):
            return _fault(faults, place, f"is {value!r}, must be a list")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(value):
            return _fault(faults, place, f"has {len(value)} entries, must have {len(kinds)}")
        entries = zip(kinds, value, strict=True)
        return tuple(_read(entry, item, f"{place}[{n}]", faults) for n, (entry, item) in enumerate(entries))
    if origin is dict or kind is dict:
        return value if isinstance(value, dict) else _fault(faults, place, f"is {value!r}, must be an object")
    if kind is type(None):
        return None if value is None else _fault(faults, place, f"is {value!r}, must be null")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type):
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        return value if fits else _fault(faults, place, f"is {value!r}, must be a {kind.__name__}")
    raise TypeError(f"fields of the kind {kind} cannot be read from JSON")


def _read_dataclass(kind: type, value: Any, place: str, faults: list[str]) -> Any:
    if not isinstance(value, dict):
        return _fault(faults, place, f"is {value!r}, must be an object of {kind.__name__}'s fields")
    if value.get(CLASS, kind.__name__) != kind.__name__:
        return _fault(faults, place, f"is a {value[CLASS]}, must be a {kind.__name__}")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    before = len(faults)
    prefix = f"{place}." if place else ""
    for name in value:
        if name != CLASS and name not in fields:
            faults.append(f"{prefix}{name}: is no field of {kind.__name__}.{suggest(name, fields)}")
    arguments = {}
    for name in fields:
        if name in value:
            arguments[name] = _read(hints[name], value[name], f"{prefix}{name}", faults)
        else:
            faults.append(f"{prefix}{name}: is missing")
    return _Unusable() if len(faults) > before else kind(**arguments)


def _fault(faults: list[str], place: str, text: str) -> _Unusable:
    faults.append(f"{place or 'it'}: {text}")
    return _Unusable()
