"""How an artifact is mounted: which tree the daemon serves, and what the kernel makes of it.

One tree of files is served as it is. The layers of an image are served side by side, and overlayfs stacks them; where
this process may not do that, the daemon serves the merged tree. With the backend `erofs` the daemon serves decrypted
images, and the kernel's own EROFS reads them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from encfs.erofs.reader import ErofsReader
from encfs.erofs.tree import Read, ServedTree
from encfs.errors import MountError, UsageError
from encfs.format.plaintext import Volume
from encfs.image.layers import FilesTree, LayersTree
from encfs.image.merged import MergedTree
from encfs.image.stack import VolumeStack, open_readers
from encfs.mount.assembly import Backend, Recipe
from encfs.mount.kernel import may_mount
from encfs.mount.options import IMAGE_PREFIX, MountOptions

TreeFactory = Callable[[Read], ServedTree]


@dataclass(frozen=True, slots=True)
class Shape:
    """What is served: a tree over a volume; and what the kernel makes of it, None where it is mounted as it is."""

    volume: Volume
    tree: TreeFactory
    recipe: Recipe | None

    @property
    def backend(self) -> Backend:
        return "fuse" if self.recipe is None else self.recipe.backend


def choose_shape(
    volumes: Sequence[Volume],
    options: MountOptions,
    *,
    layered: bool = False,
    proven: bool = True,
    handed_over: bool = False,
) -> Shape:
    """`layered`: the volumes follow overlayfs's conventions; `proven`: the artifact's origin was accepted.

    `handed_over`: somebody else made the FUSE mount, so that nothing can be made of it.

    Raises: UsageError, UnsupportedError; MountError where what is asked for needs privileges that are missing.
    """
    privileged = may_mount() and not handed_over
    backend = _backend(options, privileged=privileged, proven=proven)
    if (options.suid or options.dev) and os.geteuid() != 0:
        raise UsageError("--suid and --dev are for root", hint="leave them out")
    if options.writable and not privileged:
        raise MountError("a writable mount needs root (CAP_SYS_ADMIN)", hint="leave --writable out, or use encfs run")
    stacked = layered or options.writable
    if not stacked and backend == "fuse":
        volume = volumes[0]
        return Shape(volume, lambda read: ErofsReader(read, volume.size), None)
    stack = VolumeStack(volumes)
    sizes = [volume.size for volume in volumes]
    if not privileged:
        return Shape(stack, lambda read: MergedTree(open_readers(read, sizes)), None)
    recipe = Recipe(
        parts=len(volumes),
        backend=backend,
        overlay=stacked,
        writable=options.writable,
        upper=None if options.upper is None else str(options.upper.absolute()),
        suid=options.suid,
        dev=options.dev,
    )
    if backend == "erofs":
        return Shape(stack, lambda _: FilesTree(sizes, IMAGE_PREFIX.encode()), recipe)
    return Shape(stack, lambda read: LayersTree(open_readers(read, sizes)), recipe)


def choose_container_shape(volumes: Sequence[Volume], options: MountOptions, *, proven: bool) -> Shape:
    """What is served to a container, which stacks layers in namespaces of its own, where it may do that.

    Raises: UnsupportedError; MountError where what is asked for needs privileges that are missing.
    """
    privileged = may_mount()
    backend = _backend(options, privileged=privileged, proven=proven)
    stack = VolumeStack(volumes)
    sizes = [volume.size for volume in volumes]
    recipe = Recipe(parts=len(volumes), backend=backend, overlay=True, writable=True, in_user_namespace=not privileged)
    if backend == "erofs":
        return Shape(stack, lambda _: FilesTree(sizes, IMAGE_PREFIX.encode()), recipe)
    return Shape(stack, lambda read: LayersTree(open_readers(read, sizes), user=not privileged), recipe)


def _backend(options: MountOptions, *, privileged: bool, proven: bool) -> Backend:
    if options.backend == "fuse":
        return "fuse"
    missing = _missing_for_erofs(privileged=privileged)
    if options.backend == "erofs":
        if missing:
            raise MountError(f"the kernel's EROFS cannot be used: {missing}", hint="mount with --backend fuse")
        return "erofs"
    # A kernel's parser of filesystems is no place for what anybody may have made: only who asks for it by name gets it.
    return "fuse" if missing or not proven else "erofs"


def _missing_for_erofs(*, privileged: bool) -> str:
    if not privileged:
        return "it needs root (CAP_SYS_ADMIN)"
    if "\terofs\n" not in Path("/proc/filesystems").read_text() and not _has_module("erofs"):
        return "this kernel has none"
    return ""


def _has_module(name: str) -> bool:
    """Whether the kernel would load it when it is asked for."""
    index = Path("/lib/modules", os.uname().release, "modules.dep")
    try:
        return f"/{name}.ko" in index.read_text()
    except OSError:
        return False
