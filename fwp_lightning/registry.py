"""Named collections of interchangeable parts: rules, feature maps, backends.

>>> COLOURS = Registry("colour")
>>> @COLOURS.register("red")
... class Red: ...
>>> COLOURS["red"] is Red
True
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


def did_you_mean(name: object, known: list[str]) -> str:
    """Return the sentence that answers an unknown name: the nearest known one, then all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5) if isinstance(name, str) else []
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(known)}."


def import_members(package: str, folders: Iterable[str]) -> None:
    """Import every file of a package, so that what they register is known: a new part is a new file and no more."""
    for module in sorted(module.name for module in pkgutil.iter_modules(folders)):
        importlib.import_module(f"{package}.{module}")


def _origin(part: object) -> object:
    """Where a class was written: a file that is imported under two names defines the same part twice."""
    if not inspect.isclass(part):
        return id(part)
    methods = (value for value in vars(part).values() if inspect.isfunction(value))
    files = sorted({method.__code__.co_filename for method in methods}) or [part.__module__]
    return (part.__qualname__, *files)


class Registry(Generic[T]):
    """A mapping from names, as they are written in YAML, to parts; a name is taken once."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._parts: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that stores its argument under ``name``; raise ``ValueError`` if the name is taken."""

        def store(part: T) -> T:
            known = self._parts.get(name)
            if known is not None and _origin(known) != _origin(part):
                raise ValueError(f"the {self.kind} {name!r} is already registered, by {known!r}; choose another name")
            self._parts[name] = part
            return part

        return store

    def __getitem__(self, name: str) -> T:
        if name not in self._parts:
            raise ValueError(f"unknown {self.kind} {name!r}. {did_you_mean(name, list(self))}")
        return self._parts[name]

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)
