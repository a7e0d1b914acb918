"""Fixtures that several modules share: of the tests on container images, and of those with a registry `server`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.artifacts import Keys, make_keys
from tests.support.container_images import Store
from tests.support.registry import FaultProxy, Server


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "images")


@pytest.fixture
def proxy(server: Server) -> Iterator[FaultProxy]:
    """Faults in front of the registry that a module's fixture `server` runs."""
    proxy = FaultProxy(server.host)
    yield proxy
    proxy.close()
