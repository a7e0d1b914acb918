"""Fixtures of the tests on container images; other modules have keys and stores of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.artifacts import Keys, make_keys
from tests.support.container_images import Store


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "images")
