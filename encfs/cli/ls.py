"""`encfs ls`; both programs have the same."""

from __future__ import annotations

from encfs.console.commandparts import list_artifact as command

__all__ = ["command"]
