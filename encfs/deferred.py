"""Modules that a dependency imports and we hardly use: loaded when something of them is first asked for."""

from __future__ import annotations

import sys
from importlib.util import LazyLoader, find_spec, module_from_spec


def defer_import(name: str) -> None:
    """Have `import name` cost nothing until an attribute of it is used (importlib's `LazyLoader`).

    Without effect where the module is loaded already, or not installed.
    """
    if name in sys.modules:
        return
    spec = find_spec(name)
    if spec is None or spec.loader is None:
        return
    loader = LazyLoader(spec.loader)
    spec.loader = loader
    module = module_from_spec(spec)
    sys.modules[name] = module
    loader.exec_module(module)
