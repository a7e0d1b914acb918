"""docs/architecture.md names every module of the tree, and none that is not there."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/architecture.md"


def named() -> list[str]:
    """The paths of the table's first column: a name without a directory is beside the one before it."""
    found: list[str] = []
    for row in re.findall(r"^\| (`.*?) \|", PAGE.read_text(), re.MULTILINE):
        directory = ""
        for name in re.findall(r"`([^`]+)`", row):
            if "/" in name:
                directory = name[: name.rindex("/") + 1]
                found.append(name)
            else:
                found.append(directory + name)
    return found


def modules() -> set[str]:
    """All Python files but what generated code and packages' docstrings are."""
    paths = (path for package in ("encfs", "imagetool") for path in (ROOT / package).rglob("*.py"))
    return {
        str(path.relative_to(ROOT))
        for path in paths
        if path.name != "__init__.py" and not path.name.endswith(("_pb2.py", "_pb2_grpc.py"))
    }


def test_every_path_of_the_table_exists() -> None:
    assert [path for path in named() if not (ROOT / path).exists()] == []


def test_no_path_stands_twice() -> None:
    assert [path for path, count in Counter(named()).items() if count > 1] == []


def test_every_module_is_in_the_table() -> None:
    paths = named()
    directories = tuple(path for path in paths if path.endswith("/"))
    assert sorted(path for path in modules() - set(paths) if not path.startswith(directories)) == []


def test_encfs_knows_nothing_of_imagetool_and_nothing_imports_a_command() -> None:
    """The directions that the page shows."""
    for path in modules():
        text = (ROOT / path).read_text()
        if path.startswith("encfs/"):
            assert not re.search(r"^\s*(from|import) imagetool\b", text, re.MULTILINE), path
        if "/cli/" not in path and not path.endswith("/start.py"):
            assert not re.search(r"^\s*(from|import) (encfs|imagetool)\.cli\b", text, re.MULTILINE), path
            if not path.startswith("encfs/console/"):
                assert not re.search(r"^\s*(from|import) encfs\.console\b", text, re.MULTILINE), path
