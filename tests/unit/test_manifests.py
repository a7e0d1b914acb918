"""Manifests against the schemas of Kubernetes, and their commands against the program."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer.main
import yaml

from encfs.cli import app
from encfs.sidecar import load_config

_FILES = sorted((Path(__file__).parents[2] / "deploy" / "kubernetes").glob("*.yaml"))


def _documents() -> Iterator[Any]:
    for path in _FILES:
        for document in yaml.safe_load_all(path.read_text()):
            yield pytest.param(document, id=f"{path.stem}-{document['kind']}")


@pytest.mark.parametrize("document", list(_documents()))
def test_a_manifest_is_of_kubernetes(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, "1.30", strict=True)


def test_the_schema_is_one() -> None:
    pod = yaml.safe_load((_FILES[-1].parent / "sidecar.yaml").read_text())
    pod["spec"]["initContainers"][0]["mountPropagaton"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, "1.30", strict=True)


def _commands() -> Iterator[list[str]]:
    for path in _FILES:
        for document in yaml.safe_load_all(path.read_text()):
            template = document.get("spec", {})
            spec = template.get("template", {}).get("spec", template)
            for container in [*spec.get("initContainers", []), *spec.get("containers", [])]:
                if container["image"].startswith("registry.example/encfs:"):
                    yield container["args"]


@pytest.mark.parametrize("words", list(_commands()), ids=lambda words: words[0])
def test_the_program_has_these_options(words: list[str]) -> None:
    command = typer.main.get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    known = {name for parameter in command.params for name in parameter.opts}
    options = [word.partition("=")[0] for word in words[1:] if word.startswith("--")]
    assert options
    assert set(options) <= known


def test_the_sidecar_s_configuration_is_one(tmp_path: Path) -> None:
    documents = list(yaml.safe_load_all((_FILES[-1].parent / "unprivileged.yaml").read_text()))
    (tmp_path / "sidecar.toml").write_text(documents[0]["data"]["sidecar.toml"])
    assert load_config(str(tmp_path / "sidecar.toml")).ids == ("acme/chat",)
