"""`encfs extract`."""

from __future__ import annotations

from encfs.console.commandparts import (
    CacheOptions,
    KeyOptions,
    PlatformOption,
    ReferenceArgument,
    TargetArgument,
    TrustOptions,
    extract_artifact,
)
from encfs.console.terminal import Terminal


def command(
    terminal: Terminal,
    reference: ReferenceArgument,
    directory: TargetArgument,
    *,
    platform: PlatformOption = None,
    keys: KeyOptions,
    trust: TrustOptions,
    registry: CacheOptions,
) -> None:
    """Decrypt a whole artifact into a directory. Nothing appears there unless all of it verified."""
    extract_artifact(terminal, reference, directory, keys, trust, registry, platform=platform)
