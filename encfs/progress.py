"""How library functions report progress, without knowing who watches. Terminals draw it in `encfs.console.terminal`."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of one operation; called from one thread at a time."""

    def begin(self, label: str, total: int | None) -> None:
        """A phase starts; `total` in bytes, None where unknown. Ends the phase before it."""

    def advance(self, amount: int) -> None:
        """`amount` more bytes are done."""

    def end(self) -> None:
        """The last phase is over."""


class NoProgress:
    """Discards everything."""

    def begin(self, label: str, total: int | None) -> None:
        return

    def advance(self, amount: int) -> None:
        return

    def end(self) -> None:
        return
