"""What reads the plaintext of a volume: protocols. `volume.VolumeReader` is one; so are several behind one another.

Every byte that comes out was verified; what does not verify is an exception.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class VolumeStatsView(Protocol):
    """Counters of a volume, by name."""

    def to_json(self) -> Mapping[str, int]: ...


class Volume(Protocol):
    """Random access to a plaintext image of `size` bytes. Thread-safe."""

    size: int

    @property
    def stats(self) -> VolumeStatsView: ...

    def read(self, offset: int, size: int, /) -> bytes | memoryview: ...

    def read_into(self, offset: int, buffer: memoryview, /) -> int: ...

    def try_read_into(self, offset: int, buffer: memoryview, /) -> int | None: ...

    def close(self) -> None: ...
