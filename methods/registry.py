"""Finds methods by name: the built-in ones, and those that other distributions offer as entry points.

A distribution offers a method in its pyproject.toml:

    [project.entry-points."activation_sparsity.methods"]
    mymethod = "mypackage.mymethod:MyMethod"

Method files import torch only inside functions, so listing them is quick.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from math import isfinite
from typing import Any, get_type_hints

from .base import Method
from .errors import UsageError, unknown

ENTRY_POINT_GROUP = "activation_sparsity.methods"

BUILT_IN = {
    "dense": "methods.dense:Dense",
    "null": "methods.null:Null",
    "teal": "methods.teal:Teal",
    "lte": "methods.lte:Lte",
    "moefication": "methods.moefication:Moefication",
    "d2dmoe": "methods.d2dmoe:D2dmoe",
    "dejavu": "methods.dejavu:Dejavu",
    "polar": "methods.polar:Polar",
    "spark": "methods.spark:Spark",
    "dense-finetuned": "methods.dense_finetuned:DenseFinetuned",
}


def _third_party() -> dict[str, EntryPoint]:
    return {e.name: e for e in entry_points(group=ENTRY_POINT_GROUP) if e.name not in BUILT_IN}


def names() -> list[str]:
    """All method names: built-in ones first (they win a name clash), then third parties'."""
    return [*BUILT_IN, *sorted(_third_party())]


def info(name: str) -> type[Method]:
    """The class of a method; its attributes say what it is. Raises UsageError for an unknown name."""
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        return getattr(import_module(module), attribute)
    third_party = _third_party()
    if name not in third_party:
        raise unknown("method", name, names(), "`python -m harness ls methods` shows them all.")
    entry = third_party[name]
    found = entry.load()
    found.origin = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
    return found


def create(name: str, options: Mapping[str, Any]) -> Method:
    """A method with these settings (missing ones take their defaults)."""
    return info(name)(**options)


def parse(spec: str) -> Method:
    """A method from its command-line form `name` or `name:option=value:option=value`. Raises UsageError."""
    name, *settings = spec.split(":")
    cls = info(name)
    hints = get_type_hints(cls.Options)
    known = [f.name for f in fields(cls.Options)]
    given: dict[str, Any] = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator:
            raise UsageError(f"'{setting}' in '{spec}' is not of the form option=value.")
        if key not in known:
            raise unknown(f"option of method {name}", key, known or ["(none)"])
        given[key] = _convert(spec, key, value, hints[key])
    return cls(**given)


def _convert(spec: str, key: str, value: str, kind: type) -> Any:
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        converted = kind(value)
        if kind is float and not isfinite(converted):
            raise ValueError
        return converted
    except (KeyError, ValueError):
        raise UsageError(f"'{value}' in '{spec}' is not a valid {kind.__name__} for '{key}'.") from None
