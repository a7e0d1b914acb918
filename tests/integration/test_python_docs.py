"""The examples in Python of docs/python.md and the README are run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from encfs.keys.files import write_key_files
from encfs.oci.layout import Layout
from encfs.progress import NoProgress
from imagetool.pipeline.encrypt import EncryptOptions, encrypt
from tests.support.artifacts import make_keys

ROOT = Path(__file__).parents[2]
PAGES = ("docs/python.md", "README.md")
EXAMPLES = [
    (f"{page} {number}", text)
    for page in PAGES
    for number, text in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL))
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that the page describes."""
    place = tmp_path_factory.mktemp("docs")
    (place / "model").mkdir()
    (place / "model" / "config.json").write_text('{"layers": 2}')
    save_file({"embed": np.ones((64, 8), np.float32)}, place / "model" / "model.safetensors")
    keys = make_keys(place)
    keys.recipient_file.rename(place / "alice.jwk")
    write_key_files(keys.signer, place / "owner.jwk")
    layout = Layout(str(place / "store"), tag="v1", create=True)
    options = EncryptOptions("acme/chat", 1)
    encrypt(
        place / "model", layout, [keys.public], signers=[keys.signer], options=options, tag="v1", progress=NoProgress()
    )
    layout.close()
    return place


@pytest.mark.parametrize(("name", "example"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_example(name: str, example: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    exec(compile(example, name, "exec"), {"__name__": "example"})  # noqa: S102 - the project's own page


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 5
