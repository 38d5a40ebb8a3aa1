"""What classes say of the settings that their constructors take."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any


def _initializers(cls: type) -> Iterator[Any]:
    """The constructors that take a class's settings: its own, and its base's if it hands on."""
    for base in cls.__mro__:
        if "__init__" in vars(base):
            yield base.__init__  # type: ignore[misc]
            kinds = {p.kind for p in inspect.signature(base).parameters.values()}
            if inspect.Parameter.VAR_KEYWORD not in kinds:
                return


def parameters(cls: type) -> list[str]:
    """The names of a class's settings, those that it hands on to its base included."""
    if not any("__init__" in vars(base) for base in cls.__mro__[:-1]):
        return list(inspect.signature(cls).parameters)
    found: dict[str, None] = {}
    for init in _initializers(cls):
        own = list(inspect.signature(init).parameters.items())[1:]
        found |= {n: None for n, p in own if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    return list(found)


def hints(cls: type) -> dict[str, Any]:
    """The types of a class's settings."""
    found: dict[str, Any] = {}
    for init in _initializers(cls):
        try:
            found = typing.get_type_hints(init) | found
        except (NameError, TypeError):  # imported for type checkers only
            continue
    return found


def classes_in(hint: Any) -> list[type]:
    """The classes of a type hint: ``list[A] | None`` → A; ``Callable[..., B]`` → B."""
    if inspect.isclass(hint) and not typing.get_args(hint):
        plain = hint.__module__ in ("builtins", "collections.abc") or hint.__name__ == "Tensor"
        return [] if plain else [hint]
    return [c for part in typing.get_args(hint) for c in classes_in(part)]


def subclasses(bases: Sequence[type]) -> list[type]:
    """The concrete classes below some bases, these included; our own first."""
    found: dict[type, None] = {}
    waiting = list(bases)
    while waiting:
        cls = waiting.pop(0)
        waiting += cls.__subclasses__()
        if not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
            found[cls] = None
    return sorted(found, key=lambda c: not c.__module__.startswith("iqstar"))


def public_path(cls: type) -> str:
    """The shortest import path of a class."""
    parts = cls.__module__.split(".")
    for end in range(1, len(parts)):
        if getattr(import_module(".".join(parts[:end])), cls.__name__, None) is cls:
            return ".".join([*parts[:end], cls.__name__])
    return f"{cls.__module__}.{cls.__name__}"
