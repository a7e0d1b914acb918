"""Which frame size an encryption takes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from encfs.format.frames import DEFAULT_FRAME_SIZE
from encfs.format.writer import VolumeOptions
from encfs.progress import NoProgress
from imagetool.pipeline.encrypt import LARGE_FRAME_SIZE, EncryptOptions, encrypt
from tests.support.artifacts import make_keys
from tests.support.memory import MemoryStore


@pytest.mark.parametrize(
    ("sizes", "options", "expected"),
    [
        ([2 << 20], EncryptOptions(adapt_frames=True), LARGE_FRAME_SIZE),
        ([3 << 20, 100], EncryptOptions(adapt_frames=True), LARGE_FRAME_SIZE),
        ([2 << 20, 100, 100], EncryptOptions(adapt_frames=True), DEFAULT_FRAME_SIZE),
        ([], EncryptOptions(adapt_frames=True), DEFAULT_FRAME_SIZE),
        ([2 << 20], EncryptOptions(volume=VolumeOptions(frame_size=4096)), 4096),
    ],
)
def test_large_files_get_large_frames(sizes: list[int], options: EncryptOptions, expected: int, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number, size in enumerate(sizes):
        (source / str(number)).write_bytes(os.urandom(size))
    keys = make_keys(tmp_path)
    result = encrypt(source, MemoryStore(), [keys.public], options=options, tag=None, progress=NoProgress())
    assert [volume.frame_size for volume in result.content.volumes] == [expected]
