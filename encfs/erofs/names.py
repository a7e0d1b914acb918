"""The names of an image under construction: paths to inode numbers, implied directories, hard links, removal.

Everything lies in the writer's spool, so that memory does not grow with the number of names. Not here: what an inode
holds (`writer`), and how names become directories on disk (`metadata`).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence

from encfs.erofs.spool import ROOT_ID
from encfs.erofs.structures import LAYOUT_PLAIN, MAX_NAME, MAX_PATH, TYPE_DIRECTORY, printable
from encfs.errors import SourceError

#: Numbers of directories are kept at hand by path, in about this much memory (bytes); any other is looked up.
_CACHE_SIZE = 4 << 20
_CACHE_OVERHEAD = 200

_SELECT_NAME = "SELECT inode, type FROM name WHERE parent = ? AND name = ?"
_SELECT_OWNED = "SELECT inode, type, owner FROM name WHERE parent = ? AND name = ?"
_SELECT_FIRST = "SELECT name, inode, type, owner FROM name WHERE parent = ? LIMIT 1"
_SELECT_NEXT_DIRECTORY = f"""
SELECT name.name, name.inode, inode.mode IS NULL FROM name JOIN inode ON inode.id = name.inode
WHERE name.parent = ? AND name.name > ? AND name.type = {TYPE_DIRECTORY} ORDER BY name.name LIMIT 1
"""  # noqa: S608 (constants only)
_INSERT_INODE = f"INSERT INTO inode VALUES ({'?, ' * 13}NULL)"  # noqa: S608 (placeholders only)


class Names:
    """Names and numbers in one spool. `count` names, `inodes` inodes, the root among both."""

    def __init__(self, spool: sqlite3.Connection, epoch: int) -> None:
        self._spool = spool
        self._epoch = epoch
        self._last = ROOT_ID
        self._directories: dict[bytes, int] = {}
        self._cached_size = 0
        #: From the root down to the directory that was looked up last: the name and number of each.
        self._way: list[tuple[bytes, int]] = []
        self.inodes = 1
        self.count = 1
        self._insert_implied(ROOT_ID)

    # -- looking up

    def split(self, path: bytes) -> tuple[int, bytes]:
        """The number of the parent directory, which comes to be here if need be, and the name in it.

        Raises: SourceError where the path is not plain and relative, too long, or leads through a non-directory.
        """
        parent, slash, name = path.rpartition(b"/")
        if not name or name == b"." or name == b".." or (slash and not parent):
            raise SourceError(f"{printable(path)}: not a plain relative path")
        if len(name) > MAX_NAME:
            raise SourceError(f"{printable(path)}: name of {len(name)} bytes, the limit is {MAX_NAME}")
        if len(path) > MAX_PATH:
            raise SourceError(f"{printable(path[:MAX_NAME])}...: path of {len(path)} bytes, the limit is {MAX_PATH}")
        if b"\0" in name:
            raise SourceError(f"{printable(path)}: name with a NUL byte")
        return self._directory(parent), name

    def find(self, path: bytes) -> tuple[int, int] | None:
        """The number and type of what has been added at a path; None where there is nothing."""
        if not path:
            return ROOT_ID, TYPE_DIRECTORY
        directory, _slash, name = path.rpartition(b"/")
        number = self._directories.get(directory)
        names = path.split(b"/") if number is None else [name]
        number = number or ROOT_ID
        kind = TYPE_DIRECTORY
        for name in names:
            row = self._spool.execute(_SELECT_NAME, (number, name)).fetchone()
            if row is None:
                return None
            number, kind = row
        return number, kind

    def find_in(self, parent: int, name: bytes) -> tuple[int, int] | None:
        """The number and type of a name in a directory."""
        row: tuple[int, int] | None = self._spool.execute(_SELECT_NAME, (parent, name)).fetchone()
        return row

    def _directory(self, path: bytes) -> int:
        """The number of a directory; it and those above it are noted as implied where they are not there."""
        if not path:
            return ROOT_ID
        cached = self._directories.get(path)
        if cached is not None:
            return cached
        names = path.split(b"/")
        number = self._go_back_to(names)
        for depth in range(len(self._way), len(names)):
            number = self._find_directory(number, names, depth) or self._imply_directory(number, names, depth)
            self._way.append((names[depth], number))
        self.remember(path, number)
        return number

    def _go_back_to(self, names: Sequence[bytes]) -> int:
        """Shorten the way to what it shares with `names`; the number of the directory that it leads to then.

        Looking for the longest known path instead would hash every one above, which is quadratic in the depth.
        """
        number, shared = ROOT_ID, 0
        for (name, known), wanted in zip(self._way, names, strict=False):
            if name != wanted:
                break
            number, shared = known, shared + 1
        del self._way[shared:]
        return number

    def _find_directory(self, parent: int, names: Sequence[bytes], depth: int) -> int | None:
        row = self.find_in(parent, names[depth])
        if row is None:
            return None
        if row[1] != TYPE_DIRECTORY:
            above = printable(b"/".join(names[: depth + 1]))
            raise SourceError(f"{above}: something lies below it, but it is not a directory")
        return row[0]

    def remember(self, path: bytes, number: int) -> None:
        """Keep a directory's number at hand."""
        self._cached_size += len(path) + _CACHE_OVERHEAD
        if self._cached_size > _CACHE_SIZE:
            self._forget()
        self._directories[path] = number

    def _forget(self) -> None:
        self._directories.clear()
        self._cached_size = 0
        self._way.clear()

    # -- adding

    def new_inode(self) -> int:
        """The number of a further inode."""
        self.inodes += 1
        self._last += 1
        return self._last

    def insert(self, path: bytes, parent: int, name: bytes, number: int, kind: int, *, owner: bool) -> None:
        """Raises: SourceError where the name is there already."""
        try:
            self._spool.execute("INSERT INTO name VALUES (?, ?, ?, ?, ?)", (parent, name, number, kind, owner))
        except sqlite3.IntegrityError:
            raise SourceError(f"{printable(path)}: given twice, or also as the directory of another entry") from None
        self.count += 1

    def insert_inode(self, values: tuple[object, ...]) -> None:
        """A row of the spool's table `inode`, without its nid."""
        self._spool.execute(_INSERT_INODE, values)

    def imply(self, path: bytes, parent: int, name: bytes) -> int:
        """A directory whose attributes may follow; its number."""
        number = self.new_inode()
        self._insert_implied(number)
        self.insert(path, parent, name, number, TYPE_DIRECTORY, owner=True)
        return number

    def _imply_directory(self, parent: int, names: Sequence[bytes], depth: int) -> int:
        name = names[depth]
        if not name or name == b"." or name == b".." or len(name) > MAX_NAME or b"\0" in name:
            raise SourceError(f"{printable(b'/'.join(names))}: not a plain relative path")
        return self.imply(name, parent, name)

    def imply_directory(self, path: bytes) -> None:
        """Note a directory, and those above it, as implied where they are not there. Raises: SourceError."""
        self._directory(path)

    def _insert_implied(self, number: int) -> None:
        self.insert_inode((number, None, 0, 0, self._epoch, 0, 0, 1, LAYOUT_PLAIN, 0, 0, b"", b""))

    def implied(self) -> Iterator[bytes]:
        """Paths of directories that only entries below them imply so far, in preorder; the root is b"".

        Paths are put together on the way: keeping one for each level would let a single long name fill disk or memory.
        """
        if self._spool.execute("SELECT mode FROM inode WHERE id = ?", (ROOT_ID,)).fetchone()[0] is None:
            yield b""
        path = bytearray()
        # Directory, the name in it behind which to go on, length of its path
        stack = [(ROOT_ID, b"", 0)]
        while stack:
            number, last, size = stack.pop()
            row = self._spool.execute(_SELECT_NEXT_DIRECTORY, (number, last)).fetchone()
            if row is None:
                continue
            name, child, is_implied = row
            del path[size:]
            path += b"/" + name if size else name
            stack += ((number, name, size), (child, b"", len(path)))
            if is_implied:
                yield bytes(path)

    def link(self, path: bytes, link_to: bytes, *, replace: bool) -> None:
        """A further name of what is at `link_to`. Raises: SourceError where nothing fit is there."""
        parent, name = self.split(path)
        if replace and path != link_to:
            self.remove_in(parent, name)
        found = self.find(link_to)
        if found is None:
            raise SourceError(f"{printable(path)}: hard link to {printable(link_to)}, which was not added before it")
        number, kind = found
        if kind == TYPE_DIRECTORY:
            raise SourceError(f"{printable(path)}: hard link to the directory {printable(link_to)}")
        self.insert(path, parent, name, number, kind, owner=False)
        self._spool.execute("UPDATE inode SET nlink = nlink + 1 WHERE id = ?", (number,))

    # -- removing

    def remove(self, path: bytes, *, contents_only: bool) -> None:
        """Remove what is at a path with everything below it, or only what is in the directory; not the root itself."""
        if contents_only or not path:
            found = self.find(path)
            if found is not None and found[1] == TYPE_DIRECTORY:
                self.clear(found[0])
            return
        parent, _slash, name = path.rpartition(b"/")
        above = self.find(parent)
        if above is not None and above[1] == TYPE_DIRECTORY:
            self.remove_in(above[0], name)

    def remove_in(self, parent: int, name: bytes) -> bool:
        """Remove a name of a directory with everything below it; whether it was there."""
        row = self._spool.execute(_SELECT_OWNED, (parent, name)).fetchone()
        if row is None:
            return False
        number, kind, owner = row
        if kind == TYPE_DIRECTORY:
            self._forget()
            self.clear(number)
        self._drop(parent, name, number, kind, owner)
        return True

    def clear(self, directory: int) -> None:
        """Remove everything that is in a directory."""
        self._forget()
        # Directories from the given one down to the one that is being emptied, each with its place in the one above.
        stack: list[tuple[int, int, bytes]] = [(directory, 0, b"")]
        while True:
            row = self._spool.execute(_SELECT_FIRST, (stack[-1][0],)).fetchone()
            if row is not None:
                name, number, kind, owner = row
                if kind == TYPE_DIRECTORY:
                    stack.append((number, stack[-1][0], name))
                else:
                    self._drop(stack[-1][0], name, number, kind, owner)
                continue
            number, parent, name = stack.pop()
            if not stack:
                return
            self._drop(parent, name, number, TYPE_DIRECTORY, 1)

    def _drop(self, parent: int, name: bytes, number: int, kind: int, owner: int) -> None:
        """Remove one name, and the inode with the last of its names."""
        self._spool.execute("DELETE FROM name WHERE parent = ? AND name = ?", (parent, name))
        self.count -= 1
        if kind != TYPE_DIRECTORY:
            self._spool.execute("UPDATE inode SET nlink = nlink - 1 WHERE id = ?", (number,))
            if self._spool.execute("SELECT nlink FROM inode WHERE id = ?", (number,)).fetchone()[0]:
                if owner:
                    self._promote(number)
                return
        self._spool.execute("DELETE FROM inode WHERE id = ?", (number,))
        self.inodes -= 1

    def _promote(self, number: int) -> None:
        """Have an inode placed where another of its names stands."""
        # The index is made when it is first needed: most images never are in that case.
        self._spool.execute("CREATE INDEX IF NOT EXISTS name_of_inode ON name (inode)")
        self._spool.execute(
            "UPDATE name SET owner = 1 WHERE (parent, name) = "
            "(SELECT parent, name FROM name WHERE inode = ? ORDER BY parent, name LIMIT 1)",
            (number,),
        )
