"""What can be asked of a mount, and what is known of a running one. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

#: Largest request that the kernel sends through FUSE (bytes); more read-ahead than this gains nothing.
MAX_REQUEST = 1 << 20

#: What our mounts are mounted from, as mount(8) shows it; the beginning of that where it is an image of the daemon.
MOUNT_SOURCE = "encfs"
IMAGE_PREFIX = "encfs-"

#: `serving`: its daemon answers. `detached`: it answers, but the mount is not seen here (unmounted lazily and still in
#: use, or made in another mount namespace). `silent`: the daemon is there and does not answer. `dead`: the daemon is
#: gone, and every access fails. `foreign`: a mount of ours without a control socket in this user's runtime directory.
#: `restarting`: a supervisor holds the mount until the next daemon is there; `failing`: none has come, reads fail.
MountState = Literal["serving", "detached", "silent", "dead", "foreign", "restarting", "failing"]

LogFormat = Literal["text", "json"]

#: `auto`: the kernel's EROFS where it can be used and the artifact's origin is proven.
BackendChoice = Literal["fuse", "erofs", "auto"]


@dataclass(frozen=True, slots=True)
class MountOptions:
    """How an artifact is mounted. The artifact itself is never written to.

    `allow_other` lets other users in (/etc/fuse.conf must permit it to users who are not root). `suid` and `dev` honour
    set-uid bits and device nodes of the image, which only root can ask for. `default_permissions` has the kernel check
    modes and POSIX ACLs. `max_read_ahead` is in bytes, and set where /sys can be written. `log_file` None: stderr in
    the foreground; in the background a bounded file in the runtime directory, which a clean end removes. `listen` is
    where probes and metrics are answered (`health`). `backend` says
    who reads the images. With `writable`, what is written goes to the directory `upper`, or without one to memory.
    """

    foreground: bool = False
    allow_other: bool = False
    suid: bool = False
    dev: bool = False
    default_permissions: bool = True
    max_read_ahead: int = MAX_REQUEST
    log_file: Path | None = None
    log_format: LogFormat = "text"
    listen: str | None = None
    backend: BackendChoice = "fuse"
    writable: bool = False
    upper: Path | None = None

    def kernel_options(self) -> frozenset[str]:
        """As mount(8) and libfuse spell them."""
        options = {
            "ro",
            "fsname=encfs",
            "subtype=encfs",
            "suid" if self.suid else "nosuid",
            "dev" if self.dev else "nodev",
        }
        if self.allow_other:
            options.add("allow_other")
        if self.default_permissions:
            options.add("default_permissions")
        return frozenset(options)


@dataclass(frozen=True, slots=True)
class MountStatus:
    """One mount as `mounts()` and the readiness report give it.

    `content_digest` is what is served, `manifest_digest` the manifest that it was opened by; `started` in seconds since
    the epoch; `stats` are counters since then, sizes in bytes; `transfer` those of what came from a registry or its
    cache, and `prefetch` how far the background fetch is, both empty where nothing works beside the mount; `device` is
    the mount's `major:minor`, as in /proc/self/mountinfo; `read_ahead` in bytes, 0 where it is not known.
    `supervisor` is the process that restarts the daemon, or 0; `restarts` how often it has, `reason` why it last did.
    What is not known of a mount that does not answer is empty or 0.
    """

    mountpoint: str
    state: MountState
    device: str = ""
    pid: int = 0
    reference: str = ""
    content_digest: str = ""
    manifest_digest: str = ""
    started: float = 0.0
    read_ahead: int = 0
    polling: bool = False
    log_file: str = ""
    backend: str = ""
    writable: bool = False
    supervisor: int = 0
    restarts: int = 0
    reason: str = ""
    stats: Mapping[str, int] = field(default_factory=dict)
    transfer: Mapping[str, float] = field(default_factory=dict)
    prefetch: Mapping[str, object] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """A JSON object with these fields, in this order."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: object) -> MountStatus | None:
        """What `to_json` made, of another version perhaps, which knows more or less; None where it is none."""
        if not isinstance(document, dict) or not isinstance(document.get("mountpoint"), str):
            return None
        known = {item.name for item in fields(cls)}
        return cls(**{"state": "serving"} | {name: value for name, value in document.items() if name in known})
