"""Frozen dataclasses <-> JSON, strict in both directions: an unknown key is an error with a suggestion."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ..errors import CheckpointError, UserError

C = TypeVar("C")


def config_to_json(config: Any) -> str:
    """The JSON text that :func:`config_from_json` turns back into an equal object."""
    return json.dumps(dataclasses.asdict(config), separators=(",", ":"), ensure_ascii=False)


def config_from_json(cls: type[C], text: str, *, where: str, error: type[UserError] = CheckpointError) -> C:
    """Read a dataclass from JSON text; ``where`` names the source in messages."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as problem:
        raise error(f"The configuration is not valid JSON ({problem.msg})", given=where) from problem
    return config_from_dict(cls, value, where=where, error=error)


def config_from_dict(cls: type[C], values: object, *, where: str, error: type[UserError] = CheckpointError) -> C:
    """Build a (nested) dataclass from plain values, checking every key and type.

    Raises:
        UserError: of class ``error``, for unknown or missing keys and for values of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise error(f"The configuration of {cls.__name__} is not a table", given=f"{values!r} in {where}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise unknown_name(f"option of {cls.__name__}", str(key), list(fields), where=where, error=error)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise error(f"{cls.__name__} needs {name!r}", given=where, do=f"add {name!r}")
    parsed = {key: _convert(hints[key], value, f"{cls.__name__}.{key}", where, error) for key, value in values.items()}
    return cls(**parsed)


def unknown_name(
    what: str, given: str, known: Sequence[str], *, where: str | None = None, error: type[UserError] = CheckpointError
) -> UserError:
    """The error for a name that is not one of ``known``, with the nearest one as a suggestion."""
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    return error(
        f"Unknown {what}",
        given=f"{given!r}" + (f" in {where}" if where else ""),
        expected="one of " + ", ".join(sorted(known)),
        do=f"did you mean {near[0]!r}?" if near else None,
    )


def _convert(hint: Any, value: object, name: str, where: str, error: type[UserError]) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return config_from_dict(typing.cast(type, hint), value, where=where, error=error)
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = [args[0]] * len(value) if len(args) == 2 and args[1] is ... else list(args)
        if len(kinds) == len(value):
            return tuple(_convert(kind, item, name, where, error) for kind, item in zip(kinds, value, strict=True))
    elif origin is typing.Literal and value in args:
        return value
    elif origin in (typing.Union, types.UnionType):
        return _convert_union(args, value, name, where, error)
    elif origin in (dict, Mapping) or hint is dict:
        if isinstance(value, Mapping):
            return dict(value)
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    expected = getattr(hint, "__name__", str(hint)) if origin is None else str(hint).replace("typing.", "")
    raise error(f"{name} has a value that cannot be used", given=f"{value!r} in {where}", expected=expected)


def _convert_union(args: tuple[Any, ...], value: object, name: str, where: str, error: type[UserError]) -> Any:
    if value is None and type(None) in args:
        return None
    kinds = [kind for kind in args if kind is not type(None)]
    for kind in kinds[:-1]:
        try:
            return _convert(kind, value, name, where, error)
        except error:
            continue
    return _convert(kinds[-1], value, name, where, error)
