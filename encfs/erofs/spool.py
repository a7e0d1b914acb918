"""Where the writer keeps the metadata of every entry until the end: a private temporary database.

SQLite with an empty file name is a database of its own that lives in a small page cache, spills to an unlinked file in
the temporary directory, and is gone when it is closed. So memory is the same for a hundred files and ten million.
Names are kept apart from inodes: several names may share one. Directories are numbered, so that a name is stored once
and not again in every path below it.

Not here: what an inode looks like on disk (`metadata`), and what makes an entry acceptable (`writer`).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from encfs.erofs.structures import TYPE_DIRECTORY
from encfs.errors import StorageError

ROOT_ID = 1

#: Size of the page cache in KiB; what does not fit goes to the temporary file.
_CACHE_KIB = 16 << 10

_SCHEMA = """
CREATE TABLE inode (
    id INTEGER PRIMARY KEY,  -- in the order of adding
    mode INTEGER,            -- NULL: a directory that only entries below it imply
    uid INTEGER,
    gid INTEGER,
    seconds INTEGER,
    nanoseconds INTEGER,
    size INTEGER,
    nlink INTEGER,
    layout INTEGER,
    start INTEGER,           -- the field `u`: first block, device number or chunk information
    extra INTEGER,           -- bytes that follow the inode and its xattrs: inline tail or block map
    xattrs BLOB,
    tail BLOB,               -- symbolic link target kept inline; runs of a sparse file
    nid INTEGER
);
CREATE TABLE name (
    parent INTEGER NOT NULL,
    name BLOB NOT NULL,
    inode INTEGER NOT NULL,
    type INTEGER NOT NULL,
    owner INTEGER NOT NULL,  -- 1: the inode is placed where this name stands; 0: another name of it (hard link)
    PRIMARY KEY (parent, name)
) WITHOUT ROWID;
CREATE TABLE directory (
    visit INTEGER PRIMARY KEY,  -- in preorder, siblings sorted by name
    id INTEGER NOT NULL,
    parent INTEGER NOT NULL
);
"""

# `ORDER BY 1 DESC` makes the walk depth-first: the deepest pending directories, which are always siblings, come first.
_FILL_DIRECTORIES = f"""
WITH RECURSIVE walk(depth, name, id, parent) AS (
    VALUES (0, x'', {ROOT_ID}, {ROOT_ID})
    UNION ALL
    SELECT walk.depth + 1, name.name, name.inode, walk.id
    FROM walk JOIN name ON name.parent = walk.id
    WHERE name.type = {TYPE_DIRECTORY}
    ORDER BY 1 DESC, 2
)
INSERT INTO directory (id, parent) SELECT id, parent FROM walk
"""  # noqa: S608 (constants only)


@contextmanager
def storage_errors() -> Iterator[None]:
    """Report a failing database as what it is for the user: temporary storage that is full or broken."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise StorageError(
            f"cannot keep file metadata in a temporary database: {error}",
            hint="free space in the temporary directory, or name another one in TMPDIR",
        ) from error


def open_spool() -> sqlite3.Connection:
    """A new empty spool. Its use may move between threads, but only one may use it at a time."""
    return open_temporary(_SCHEMA)


def open_temporary(schema: str) -> sqlite3.Connection:
    """A private temporary database of another schema, for others who write images. Raises: StorageError."""
    with storage_errors():
        spool = sqlite3.connect("", isolation_level=None, check_same_thread=False, cached_statements=64)
        spool.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        # Nothing is ever rolled back or recovered: a failure drops the database.
        spool.execute("PRAGMA journal_mode = OFF")
        spool.execute("PRAGMA synchronous = OFF")
        spool.executescript(schema)
        spool.execute("BEGIN")
    return spool


def fill_directories(spool: sqlite3.Connection) -> None:
    """Number the directories in the order in which the metadata region visits them."""
    spool.execute(_FILL_DIRECTORIES)
