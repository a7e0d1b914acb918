"""`imagetool ls`."""

from __future__ import annotations

from encfs.commandparts import (
    CacheOptions,
    KeyOptions,
    LongOption,
    PathArgument,
    PlatformOption,
    RecursiveOption,
    ReferenceArgument,
    TrustOptions,
    list_artifact,
)
from encfs.terminal import Terminal


def command(
    terminal: Terminal,
    reference: ReferenceArgument,
    path: PathArgument = "",
    *,
    keys: KeyOptions,
    trust: TrustOptions,
    registry: CacheOptions,
    recursive: RecursiveOption = False,
    long: LongOption = False,
    platform: PlatformOption = None,
) -> None:
    """List what is in an artifact, without mounting it."""
    list_artifact(terminal, reference, path, keys, trust, registry, platform=platform, recursive=recursive, long=long)
