"""What the kernel makes of the daemon's FUSE mount: EROFS over the images in it, overlayfs over the layers.

All of it is put together in a mount namespace that nobody else sees, and comes out as one mount that is attached
nowhere yet. That one holds everything below it: unmounting it ends the daemon, and where the daemon dies before it is
attached, nothing was ever there. Not here: when which of these is used (`stacking`), serving FUSE (`session`).
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from encfs.errors import EncfsError, MountError
from encfs.mount import kernel
from encfs.mount.options import IMAGE_PREFIX, MOUNT_SOURCE

Backend = Literal["fuse", "erofs"]

#: Layers must not be able to name files of other layers, or anything else outside of themselves.
_OVERLAY_OPTIONS = "index=off,xino=off,metacopy=off,redirect_dir=nofollow"
#: Names in the scratch filesystem: the FUSE mount, EROFS mounts, an empty layer, the place of the result, what is
#: written.
_FUSE, _EROFS, _EMPTY, _RESULT, _WRITTEN = "fuse", "erofs", "empty", "result", "written"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to make of the FUSE mount: with `overlay` a stack of its `parts`, otherwise the only one as it is.

    `backend` `erofs`: the FUSE mount holds images (`FilesTree`), which the kernel's EROFS mounts; `fuse`: it holds
    directories (`LayersTree`). What is written goes to `upper`, a directory on this machine, or with None to memory.
    `in_user_namespace` has overlayfs read attributes that need no privilege; `loop` uses loop devices in any case.
    """

    parts: int
    backend: Backend
    overlay: bool
    writable: bool = False
    upper: str | None = None
    suid: bool = False
    dev: bool = False
    in_user_namespace: bool = False
    loop: bool = False

    def flags(self) -> int:
        """Of the mount that comes out, for mount(2)."""
        return (
            (0 if self.writable else kernel.MS_RDONLY)
            | (0 if self.suid else kernel.MS_NOSUID)
            | (0 if self.dev else kernel.MS_NODEV)
        )


@dataclass(frozen=True, slots=True)
class Assembled:
    """What came out: the mount's descriptor, and the `st_dev` of every mount in it that reads ahead."""

    mount: int
    devices: tuple[int, ...]


def open_fuse(*, allow_other: bool, default_permissions: bool) -> tuple[int, int]:
    """A FUSE mount that is attached nowhere: (descriptor of /dev/fuse to serve it, of the mount).

    Raises: MountError.
    """
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        options: dict[str, str | None] = {
            "source": MOUNT_SOURCE,
            "subtype": MOUNT_SOURCE,
            "fd": str(device),
            "rootmode": f"{stat.S_IFDIR:o}",
            "user_id": str(os.geteuid()),
            "group_id": str(os.getegid()),
        }
        if allow_other:
            options["allow_other"] = None
        if default_permissions:
            options["default_permissions"] = None
        restricted = kernel.ATTR_RDONLY | kernel.ATTR_NOSUID | kernel.ATTR_NODEV
        return device, kernel.new_mount("fuse", options, restricted)
    except BaseException:
        os.close(device)
        raise


def assemble_apart(fuse: int, recipe: Recipe, scratch: str) -> Assembled:
    """`assemble` in a mount namespace of its own, from a process that goes on in its own. Raises: MountError."""

    def work() -> Assembled:
        kernel.enter_private_namespace()
        return assemble(fuse, recipe, scratch)

    return _in_thread(work)


def _in_thread(work: Callable[[], T]) -> T:
    """Namespaces are a thread's own: this one ends with the work, and its mount namespace with it."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            errors.append(error)

    thread = threading.Thread(target=run, name="encfs-assembly", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def assemble(fuse: int, recipe: Recipe, scratch: str) -> Assembled:
    """Put together what the recipe says, from the FUSE mount `fuse`, which must be served by another thread.

    `scratch` is any directory: what is mounted on it is seen in this mount namespace only, which must be private.
    Changes the working directory. Raises: MountError.
    """
    kernel.mount("tmpfs", scratch, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=700")
    os.chdir(scratch)
    for name in (_FUSE, _EROFS, _EMPTY, _RESULT, _WRITTEN):
        os.mkdir(name, 0o755)
    kernel.attach(fuse, _FUSE)
    devices = [os.stat(_FUSE).st_dev]
    named = True
    if recipe.backend == "erofs":
        below, named = _mount_images(recipe)
        devices += below
    # A mount from a loop device does not show whose it is: overlayfs over it does.
    if not recipe.overlay and named:
        return Assembled(kernel.clone_mount(f"{_EROFS}/0"), tuple(devices))
    _mount_overlay(recipe)
    return Assembled(kernel.clone_mount(_RESULT), tuple(devices))


def _mount_images(recipe: Recipe) -> tuple[list[int], bool]:
    """The kernel's EROFS over each image; the `st_dev` of each, and whether none needed a loop device."""
    # Where an image is what comes out, its mount has the attributes that were asked for.
    flags = recipe.flags() if not recipe.overlay else kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV
    devices, named = [], True
    for index in range(recipe.parts):
        place = f"{_EROFS}/{index}"
        os.mkdir(place, 0o755)
        image = f"{IMAGE_PREFIX}{index}"
        os.chdir(_FUSE)
        try:
            named &= _mount_image(image, f"../{place}", flags | kernel.MS_RDONLY, loop=recipe.loop)
        finally:
            os.chdir("..")
        devices.append(os.stat(place).st_dev)
    return devices, named


def _mount_image(image: str, place: str, flags: int, *, loop: bool) -> bool:
    """From the file itself, which kernels can from 6.12 on: True; otherwise through a loop device."""
    if not loop:
        try:
            kernel.mount(image, place, "erofs", flags, "")
        except kernel.MountCallError as error:
            if error.errno != errno.ENOTBLK:
                raise
        else:
            return True
    from encfs.mount.loop import attached

    with attached(image) as device:
        kernel.mount(device, place, "erofs", flags, "")
    return False


def _mount_overlay(recipe: Recipe) -> None:
    """overlayfs over the layers, topmost first: by short names, since all options must fit into one page."""
    below = _EROFS if recipe.backend == "erofs" else _FUSE
    # It wants two layers where nothing can be written: an empty one is the lowest.
    layers = [str(index) for index in reversed(range(recipe.parts))] + [f"../{_EMPTY}"]
    options = [f"lowerdir={':'.join(layers)}", _OVERLAY_OPTIONS]
    if recipe.in_user_namespace:
        options.append("userxattr")
    if recipe.writable:
        _prepare_upper(recipe, os.stat(f"{below}/{layers[0]}"))
        options.append(f"upperdir=../{_WRITTEN}/upper,workdir=../{_WRITTEN}/work")
    os.chdir(below)
    try:
        kernel.mount(MOUNT_SOURCE, f"../{_RESULT}", "overlay", recipe.flags(), ",".join(options))
    finally:
        os.chdir("..")


def _prepare_upper(recipe: Recipe, root: os.stat_result) -> None:
    """Where overlayfs writes. The root directory of what comes out has the attributes of `upper`, so it gets them."""
    if recipe.upper is None:
        kernel.mount("tmpfs", _WRITTEN, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=700")
    else:
        with kernel.closing(kernel.clone_mount(recipe.upper)) as directory:
            kernel.attach(directory, _WRITTEN)
    try:
        os.mkdir(f"{_WRITTEN}/upper")
    except FileExistsError:
        if recipe.upper is None or not os.path.isdir(f"{_WRITTEN}/work"):
            raise MountError(f"{recipe.upper} holds something else", hint="choose an empty directory") from None
        return
    except OSError as error:
        raise MountError(f"{recipe.upper} cannot be written: {error.strerror}") from None
    os.mkdir(f"{_WRITTEN}/work")
    os.chown(f"{_WRITTEN}/upper", root.st_uid, root.st_gid)
    os.chmod(f"{_WRITTEN}/upper", stat.S_IMODE(root.st_mode))


def attach_at(assembled: Assembled, mountpoint: str) -> None:
    """Attach what came out, and give its descriptor up. Raises: MountError."""
    try:
        kernel.attach(assembled.mount, mountpoint)
    except EncfsError as error:
        raise MountError(f"{mountpoint} cannot be mounted: {error.message}") from None
    finally:
        os.close(assembled.mount)
