"""The JSON shapes that docs/cli.md shows, to compare with what the commands print."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def shape(value: object) -> object:
    """Names and types of a document; of arrays the shapes that occur."""
    if isinstance(value, dict):
        return {name: shape(member) for name, member in value.items()}
    if isinstance(value, list):
        shapes: list[object] = []
        for item in value:
            if shape(item) not in shapes:
                shapes.append(shape(item))
        return shapes
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def documented(command: str, which: int = 0) -> dict[str, object]:
    """The object that a command's section shows; `which` of several, from 0."""
    page = (ROOT / "docs" / "cli.md").read_text()
    section = re.search(rf"^## {command}$(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert section is not None
    shown = re.findall(r"^```json$(.*?)^```$", section[1], re.MULTILINE | re.DOTALL)
    document = json.loads(shown[which])
    assert isinstance(document, dict)
    return document


def assert_as_documented(command: str, actual: dict[str, object], *, but: tuple[str, ...] = ("warnings",)) -> None:
    expected = documented(command)
    assert actual.keys() == expected.keys()
    for name in expected.keys() - set(but):
        assert shape(actual[name]) == shape(expected[name]), name
    assert isinstance(actual["warnings"], list)
