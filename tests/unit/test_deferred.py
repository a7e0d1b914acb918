"""Modules that are not loaded before they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout


def test_a_deferred_module_is_loaded_when_it_is_used() -> None:
    program = """
import sys
from encfs.deferred import deferred
with deferred("colorsys"):
    import colorsys as first
assert "colorsys" not in sys.modules
print(first.rgb_to_hsv(0, 0, 0))
import colorsys as second
print(second is sys.modules["colorsys"], second is not first, second.rgb_to_hsv is first.rgb_to_hsv)
"""
    assert run(program) == "(0.0, 0.0, 0)\nTrue True True\n"


@pytest.mark.parametrize("module", ["jsonschema", "charset_normalizer"])
def test_registries_do_without(module: str) -> None:
    assert run(f"import sys, encfs.oci.registry; print({module!r} in sys.modules)") == "False\n"


def test_what_is_loaded_stays_as_it_is() -> None:
    program = (
        "import colorsys; from encfs.deferred import deferred\nwith deferred('colorsys'):\n import colorsys as x\n"
    )
    assert run(f"{program}print(x is colorsys)") == "True\n"


def test_a_deferred_module_tells_its_version_unloaded() -> None:
    program = """
import sys
from encfs.deferred import deferred
with deferred("typer"):
    from typer import __version__ as stated
print("typer" in sys.modules)
import typer
print(stated == typer.__version__)
"""
    assert run(program) == "False\nTrue\n"


def test_a_module_is_loaded_while_something_else_is_done() -> None:
    program = """
import sys, threading
from encfs.deferred import loaded_meanwhile
with loaded_meanwhile("colorsys"), loaded_meanwhile("no_such_module"):
    pass
print("colorsys" in sys.modules, threading.active_count())
"""
    assert run(program) == "True 1\n"
