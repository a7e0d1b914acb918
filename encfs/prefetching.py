"""Fetch an artifact, or some of its files, into the ciphertext cache while it is being read.

What is fetched is checked against the root at once; what is wrong is fetched again. Readers come first: nothing is
fetched while one of them waits for the registry. A registry that is away is asked again, until the mount ends. Not
here: connections and who comes first (`encfs.oci.fetching`), fetching before anything is read (`encfs.oci.prefetch`).
"""

from __future__ import annotations

import logging
import stat
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Literal

from encfs.artifact import Artifact
from encfs.browse import Image, open_image
from encfs.erofs.tree import Inode
from encfs.erofs.walk import walk
from encfs.errors import EncfsError, IntegrityError, NotFoundError, StorageError, TransportError, UsageError
from encfs.format.volume import VolumeReader
from encfs.image.artifact import image_parts
from encfs.image.stack import split

log = logging.getLogger(__name__)

Mode = Literal["none", "all", "list"]

#: Stored bytes that are fetched, and then checked, in one piece.
_PIECE = 4 << 20
#: Seconds between attempts while the registry is away: at first, and at most.
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 30.0
_MAX_LIST_SIZE = 16 << 20


@dataclass(frozen=True, slots=True)
class Selection:
    """What is fetched in the background: nothing, all of the artifact, or the files at `paths`, in this order."""

    mode: Mode
    paths: tuple[bytes, ...] = ()


def parse_selection(text: str) -> Selection:
    """`none`, `all`, or the name of a file that lists paths inside the artifact, one a line.

    A path of a directory stands for everything below it. Raises: UsageError, NotFoundError, StorageError.
    """
    if text in ("none", "all"):
        return Selection("none" if text == "none" else "all")
    try:
        with open(text, "rb") as file:
            content = file.read(_MAX_LIST_SIZE + 1)
    except FileNotFoundError:
        raise NotFoundError(
            f"there is no file {text}", hint="--prefetch takes none, all, or a file that lists paths, one a line"
        ) from None
    except OSError as error:
        raise StorageError(f"{text}: {error.strerror}") from None
    if len(content) > _MAX_LIST_SIZE:
        raise UsageError(f"{text} has more than {_MAX_LIST_SIZE >> 20} MiB", hint="use --prefetch all")
    paths = tuple(line.strip(b"/") for line in content.splitlines() if line.strip())
    if not paths:
        raise UsageError(f"{text} lists no path", hint="write one path of a file inside the artifact on each line")
    return Selection("list", paths)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Stored bytes to fetch and check: frames from `offset` on in the image; none of it for the volume's tree."""

    volume: VolumeReader
    offset: int
    size: int


class Prefetch:
    """The background fetch of one mounted artifact. Thread-safe; it does nothing before `start`."""

    def __init__(self, artifact: Artifact, selection: Selection, *, rate: int | None = None) -> None:
        """`rate` in bytes a second. Raises: UsageError where there is no registry, or no cache with room for it."""
        self._artifact = artifact
        self._selection = selection
        self._rate = rate
        self._volumes: Sequence[VolumeReader] = ()
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        self._working = 0
        self._lock = threading.Lock()
        #: Held while a piece is looked up, which may wait for the registry.
        self._choosing = threading.Lock()
        self._pieces: Iterator[_Piece] = iter(())
        self._pace = _Pace(rate, self._stopped)
        self._state = "off"
        self._error = ""
        self._total = self._done = self._fetched = self._wrong = self._lost = self._absent = 0
        if selection.mode == "none":
            return
        # The registry's client takes a while to load, and what is local does without it.
        from encfs.oci.cached import CachedSource
        from encfs.oci.prefetch import check_room, require_cache

        source = artifact.source
        if not isinstance(source, CachedSource):
            raise UsageError("--prefetch is for artifacts in a registry", hint="leave it out for what is local")
        self._lanes = source.fetcher.lanes
        self._counters = source.counters
        self._concurrency = max(1, source.options.concurrency - 1)
        self._volumes = image_parts(artifact).volumes
        if selection.mode == "all":
            check_room(require_cache(source), sum(volume.stored_size for volume in self._volumes))
        require_cache(source)
        self._state = "waiting"

    def start(self) -> None:
        """Begin, in threads that do not keep the process alive."""
        if self._selection.mode == "none" or self._threads:
            return
        self._state = "running"
        self._pieces = self._all_pieces() if self._selection.mode == "all" else self._listed_pieces()
        self._working = self._concurrency
        for number in range(self._concurrency):
            thread = threading.Thread(target=self._work, name=f"encfs-prefetch-{number + 1}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                self._go_on_with_fewer(str(error))
                return
            self._threads.append(thread)

    def _go_on_with_fewer(self, reason: str) -> None:
        """The system's limit of threads is reached: the mount works without the background fetch."""
        log.warning("prefetch: %s: going on with %d", reason, len(self._threads))
        if not self._threads:
            self._error = reason
        for _ in range(self._concurrency - len(self._threads)):
            self._end("done" if self._threads else "failed")

    def status(self) -> dict[str, object]:
        """How far it is, in bytes as they are stored. `bytes_total` grows while listed files are being looked up.

        `frames_wrong` were fetched again, `frames_lost` never came right; `not_found` counts paths of the list.
        """
        with self._lock:
            state = self._state
            if state == "running" and self._lanes.reader_is_waiting:
                state = "paused"
            return {
                "mode": self._selection.mode,
                "state": state,
                "bytes_total": self._total,
                "bytes_done": self._done,
                "bytes_fetched": self._fetched,
                "frames_wrong": self._wrong,
                "frames_lost": self._lost,
                "not_found": self._absent,
                "error": self._error,
            }

    def close(self) -> None:
        """End it; what is under way is given a moment."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(1.0)

    # -- what is to be fetched

    def _all_pieces(self) -> Iterator[_Piece]:
        self._add_total(sum(volume.stored_size for volume in self._volumes))
        for volume in self._volumes:
            yield _Piece(volume, 0, 0)
            step = max(1, _PIECE // volume.frame_size) * volume.frame_size
            for offset in range(0, volume.size, step):
                yield _Piece(volume, offset, min(step, volume.size - offset))

    def _listed_pieces(self) -> Iterator[_Piece]:
        image: Image | None = None
        for path in self._selection.paths:
            pause = _FIRST_PAUSE
            while not self._stopped.is_set():
                # A path begins anew where the registry was away: what is in the cache already is not fetched twice.
                try:
                    image = image or open_image(self._artifact)
                    yield from self._pieces_at(image, path)
                    break
                except TransportError as error:
                    self._note_trouble(error)
                    self._stopped.wait(pause)
                    pause = min(_LONGEST_PAUSE, pause * 2)

    def _pieces_at(self, image: Image, path: bytes) -> Iterator[_Piece]:
        try:
            top = image.tree.resolve(path)
        except NotFoundError as error:
            self._absent += 1
            log.warning("prefetch: %s", error.message)
            return
        inodes = (inode for _, inode in walk(image.tree, top)) if stat.S_ISDIR(top.mode) else iter((top,))
        for inode in inodes:
            if stat.S_ISREG(inode.mode):
                yield from self._pieces_of(image, inode)

    def _pieces_of(self, image: Image, inode: Inode) -> Iterator[_Piece]:
        for place, length in image.tree.extents(inode, 0, inode.size):
            if place is None:
                continue
            index, offset = split(place)
            volume = self._volumes[index]
            first, end = offset // volume.frame_size * volume.frame_size, offset + length
            step = max(1, _PIECE // volume.frame_size) * volume.frame_size
            for start in range(first, end, step):
                piece = _Piece(volume, start, min(step, end - start))
                self._add_total(sum(run.size for run in volume.stored_runs(piece.offset, piece.size, _PIECE)))
                yield piece

    def _add_total(self, size: int) -> None:
        self._total += size

    # -- fetching

    def _work(self) -> None:
        with self._lanes.in_background():
            self._fetch_pieces()

    def _fetch_pieces(self) -> None:
        pause = _FIRST_PAUSE
        piece: _Piece | None = None
        while not self._stopped.is_set():
            try:
                if piece is None:
                    with self._choosing:
                        piece = next(self._pieces, None)
                    if piece is None:
                        self._end("done")
                        return
                self._fetch(piece)
                piece, pause = None, _FIRST_PAUSE
                self._note_running()
            except TransportError as error:
                self._note_trouble(error)
                self._stopped.wait(pause)
                pause = min(_LONGEST_PAUSE, pause * 2)
            except EncfsError as error:
                # Such as a blob that is gone, or metadata that does not verify: readers are told the same.
                log.error("prefetch: %s", error)  # noqa: TRY400 - foreseen: the line says it all
                with self._lock:
                    self._error = error.message
                self._end("failed")
                return
            except Exception:
                log.exception("unexpected error in prefetch")
                with self._lock:
                    self._error = "unexpected error: the log has it"
                self._end("failed")
                return

    def _fetch(self, piece: _Piece) -> None:
        volume = piece.volume
        if not piece.size:
            size = volume.tree_blob.size
            for start in range(0, size, _PIECE):
                self._fetch_range(volume.tree_blob, start, min(size, start + _PIECE))
            self._note_done(size)
            return
        for run in volume.stored_runs(piece.offset, piece.size, _PIECE):
            self._fetch_range(volume.stored_blob(run), run.offset, run.offset + run.size)
            wrong = lost = 0
            try:
                wrong = volume.check_run(run)
            except IntegrityError as error:
                log.warning("prefetch: %s", error)
                lost = 1
            with self._lock:
                self._wrong += wrong
                self._lost += lost
            self._note_done(run.size)

    def _fetch_range(self, blob: object, start: int, end: int) -> None:
        from encfs.oci.fetching import FetchingBlob

        assert isinstance(blob, FetchingBlob)  # noqa: S101 - all of a CachedSource's are
        blob.prefetch(start, end, self._keep_pace)

    def _keep_pace(self, size: int, awaited: bool) -> None:
        """Bytes have arrived: wait as the rate and readers demand, unless a reader waits for these very bytes."""
        self._counters.add("bytes_prefetched", size)
        with self._lock:
            self._fetched += size
        if self._stopped.is_set():
            raise TransportError("the background fetch was ended")
        if not awaited:
            self._lanes.hold_background()
            self._pace.wait(size)

    # -- how it goes

    def _note_done(self, size: int) -> None:
        with self._lock:
            self._done += size

    def _note_running(self) -> None:
        with self._lock:
            if self._state == "retrying":
                self._state, self._error = "running", ""

    def _note_trouble(self, error: EncfsError) -> None:
        with self._lock:
            first = self._state == "running"
            if first:
                self._state = "retrying"
            self._error = error.message
        if first and not self._stopped.is_set():
            log.warning("prefetch: %s; trying again", error.message)

    def _end(self, state: Literal["done", "failed"]) -> None:
        """One thread has no more to do; the last of them says how it went."""
        with self._lock:
            self._working -= 1
            if state == "failed":
                self._state = "failed"
            elif not self._working and self._state != "failed":
                self._state = "incomplete" if self._lost else "done"
            else:
                return
            state_now = self._state
        log.info("prefetch: %s", state_now)


class _Pace:
    """At most so many bytes a second, of all threads together."""

    def __init__(self, rate: int | None, stopped: threading.Event) -> None:
        self._rate = rate
        self._stopped = stopped
        self._lock = threading.Lock()
        self._free_at = 0.0

    def wait(self, size: int) -> None:
        """Wait until `size` further bytes are within the rate."""
        if not self._rate:
            return
        now = monotonic()
        with self._lock:
            self._free_at = max(self._free_at, now) + size / self._rate
            seconds = self._free_at - now
        self._stopped.wait(seconds)
