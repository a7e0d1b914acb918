"""When modules are loaded: not at all, as long as only a dependency imports them; or while the network is awaited.

importlib's `LazyLoader` does not help here: the import statement itself looks at a module's attributes, and loads it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from types import ModuleType


class _Deferred(ModuleType):
    """Stands where a module was imported, and gets attributes from the real one."""

    def __getattr__(self, name: str) -> object:
        if name == "__version__":  # compared by who imports it
            from importlib.metadata import version

            return version(self.__name__)
        if name.startswith("__"):  # the import system looks for many
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


@contextmanager
def loaded_meanwhile(name: str) -> Iterator[None]:
    """Import a module in a thread, which has ended when the block has.

    It pays where the block waits for a network. Where the import fails, or no thread is to be had, whoever imports
    the module is told, or does it.
    """

    def load() -> None:
        with suppress(ImportError):
            import_module(name)

    thread = threading.Thread(target=load, name="encfs-load")
    with suppress(RuntimeError):
        thread.start()
    try:
        yield
    finally:
        if thread.ident is not None:
            thread.join()
