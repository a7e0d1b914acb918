"""The fsspec filesystem `encfs`: an artifact for pandas, pyarrow, zarr and everything else that takes fsspec URLs.

    pandas.read_parquet("encfs://data/train.parquet", storage_options={"ref": "oci:store:v1", "key": "me.jwk", ...})
    fsspec.filesystem("encfs", ref="oci:store:v1", key="me.jwk", trust="signer.jwk.pub", id="acme/data")

Storage options are the keyword arguments of `encfs.open`, plus those of `encfs.oci.options.StoreOptions` by name
(`plain_http=True`, `ca_file=...`). Others can be chained in front (`zip://a.txt::encfs://archive.zip`); those
that cache files (`filecache`, `simplecache`) write plaintext to the disk. Read-only: what would write raises an OSError
with EROFS.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
from datetime import UTC, datetime
from typing import Any, ClassVar

from fsspec import AbstractFileSystem

import encfs
from encfs.api import Artifact
from encfs.errors import NotFoundError, SourceError
from encfs.files import Entry
from encfs.oci.options import StoreOptions

_STORE_OPTIONS = frozenset(field.name for field in dataclasses.fields(StoreOptions))
#: Options of every fsspec filesystem, which its base class looks at before `__init__` is called.
_BASE_OPTIONS = ("asynchronous", "loop", "skip_instance_cache", "use_listings_cache", "listings_expiry_time")
_TYPES = {"file": "file", "directory": "directory", "symlink": "link"}


class EncfsFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec is not typed
    """One artifact. Thread-safe; instances with equal options are the same one, as fsspec keeps them."""

    protocol: ClassVar[str] = "encfs"
    root_marker: ClassVar[str] = ""

    def __init__(self, ref: str, **options: Any) -> None:
        """`ref` with the options of `encfs.open` and of `StoreOptions`. Raises: what `encfs.open` does."""
        super().__init__()
        own = {name: options.pop(name) for name in list(options) if name in _STORE_OPTIONS}
        for name in _BASE_OPTIONS:
            options.pop(name, None)
        self.artifact: Artifact = encfs.open(ref, store=StoreOptions(**own) if own else None, **options)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(item) for item in path]
        stripped: str = super()._strip_protocol(path)
        return "/".join(part for part in stripped.split("/") if part not in ("", "."))

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Raises: FileNotFoundError, and what the artifact raises."""
        path = self._strip_protocol(path)
        try:
            return self._info(self.artifact.stat(path, follow_symlinks=True), path)
        except NotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, error.message, path) from None

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """A directory, or the one entry where it is a file. Raises: FileNotFoundError."""
        path = self._strip_protocol(path)
        try:
            found = [self._listed(entry) for entry in self.artifact.list(path)]
        except SourceError:
            found = [self.info(path)]
        except NotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, error.message, path) from None
        return found if detail else [entry["name"] for entry in found]

    def _listed(self, entry: Entry) -> dict[str, Any]:
        """An entry of a listing as what it leads to; a link that leads nowhere stays a link."""
        if entry.target is None:
            return self._info(entry, entry.path)
        with contextlib.suppress(NotFoundError):
            entry = dataclasses.replace(self.artifact.stat(entry.path), target=entry.target)
        return self._info(entry, entry.path) | {"islink": True, "destination": entry.target}

    def _info(self, entry: Entry, path: str) -> dict[str, Any]:
        return {
            "name": path,
            "size": entry.size if entry.is_file else 0,
            "type": _TYPES.get(entry.kind, "other"),
            "mode": entry.mode,
            "uid": entry.uid,
            "gid": entry.gid,
            "nlink": entry.links,
            "mtime": entry.mtime_ns / 1_000_000_000,
            "islink": False,
        }

    def modified(self, path: str) -> datetime:
        """When a file was modified last, in UTC."""
        return datetime.fromtimestamp(self.info(path)["mtime"], UTC)

    def ukey(self, path: str) -> str:
        """Content never changes under one digest."""
        return f"{self.artifact.content_digest}:{self._strip_protocol(path)}"

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **_: Any) -> io.BufferedReader:
        if mode != "rb":
            raise _read_only(path)
        with _as_os_errors(path):
            return self.artifact.open(path, buffering=block_size or 1 << 20)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """A range of a file; negative positions count from its end."""
        path = self._strip_protocol(path)
        with _as_os_errors(path):
            size = self.artifact.stat(path).size
            first, stop, _step = slice(start, end).indices(size)
            return self.artifact.read(path, first, max(0, stop - first))

    def _refuse(self, path: Any = "", *_: Any, **__: Any) -> Any:
        raise _read_only(path)

    # Whatever would change something.
    _rm = rm_file = rm = cp_file = mkdir = makedirs = rmdir = touch = pipe_file = put_file = mv = _refuse


def _read_only(path: object) -> OSError:
    return OSError(errno.EROFS, "an encfs artifact is read-only", str(path))


class _as_os_errors:  # noqa: N801 - used as a statement
    """What callers of fsspec expect: NotFoundError as FileNotFoundError, a directory as IsADirectoryError."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, NotFoundError):
            raise FileNotFoundError(errno.ENOENT, error.message, self._path) from None
        if isinstance(error, SourceError):
            raise IsADirectoryError(errno.EISDIR, error.message, self._path) from None
