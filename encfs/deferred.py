"""Modules that a dependency imports and we never use: not loaded unless something of them is asked for after all.

importlib's `LazyLoader` does not help here: the import statement itself looks at a module's attributes, and loads it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType


class _Deferred(ModuleType):
    """Stands where a module was imported, and gets attributes from the real one."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(import_module(self.__name__), name)


@contextmanager
def deferred(name: str) -> Iterator[None]:
    """Whoever imports the module `name` within the block has it loaded when it is used; outside all is as ever."""
    if name in sys.modules:
        yield
        return
    stand_in = _Deferred(name)
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]
