"""Random trees for property tests: entries for the EROFS writer, and what any reader must show of them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from hypothesis import strategies as st

from encfs.erofs.writer import Entry
from tests.support.images import Item
from tests.support.trees import POSIX_ACL, Node, digest_bytes

_ODD_NAMES = [b"!", b"-", b".x", b"...", b"..a", b" ", b"\n", b"\xff", b"\x01", b"a", b"a.b", b"a-b", b"n" * 255]
_NAMES = st.one_of(
    st.sampled_from(_ODD_NAMES),
    st.binary(min_size=1, max_size=12),
    st.integers(1, 255).map(lambda size: b"z" * size),
).map(lambda name: bytes(byte for byte in name if byte not in b"/\0") or b"0")
NAMES = _NAMES.filter(lambda name: name not in (b".", b".."))

_SIZES = st.one_of(st.sampled_from([0, 1, 4095, 4096, 4097, 8192, 65536, 65537]), st.integers(0, 20_000))
_OWNERS = st.sampled_from([0, 1000, 65535, 65536, 4_294_967_294])
_TIMES = st.one_of(
    st.sampled_from([0, 1, -1, 10**18, 1_700_000_000 * 10**9]),
    st.integers(-(2**33) * 10**9, 2**33 * 10**9),
)
_DEVICES = st.builds(os.makedev, st.integers(0, 4095), st.integers(0, (1 << 20) - 1))
_TARGETS = st.one_of(
    st.binary(min_size=1, max_size=40).filter(lambda target: b"\0" not in target),
    st.sampled_from([3900, 4000, 4032, 4033, 4095]).map(lambda size: b"t" * size),
)
#: By kind of file: Linux gives user.* to files and directories only.
_TRUSTED = st.dictionaries(
    st.sampled_from([b"trusted.a", b"trusted." + b"t" * 200, b"security.other"]), st.binary(max_size=100), max_size=2
)
_ATTRIBUTES: st.SearchStrategy[dict[bytes, bytes]] = st.one_of(
    st.just({}),
    st.dictionaries(
        st.sampled_from([b"user.a", b"user.\xff", b"user." + b"k" * 250, b"trusted.x", b"security.y"]),
        st.one_of(st.binary(max_size=60), st.sampled_from([bytes(2000), b"v" * 5000])),
        max_size=3,
    ),
    st.just({b"system.posix_acl_access": POSIX_ACL}),
)
_LINKABLE = [stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR]


@st.composite
def trees(draw: st.DrawFn, *, max_nodes: int = 25) -> list[Item]:
    """A tree in an order in which only hard links follow what they link to."""
    directories = [b""]
    taken: set[bytes] = set()
    items: list[Item] = [(_draw_entry(draw, b"", stat.S_IFDIR), b"")]
    linkable: list[bytes] = []
    links: list[Item] = []
    for _ in range(draw(st.integers(0, max_nodes))):
        parent = draw(st.sampled_from(directories))
        name = draw(NAMES)
        path = parent + b"/" + name if parent else name
        if path in taken:
            continue
        taken.add(path)
        if linkable and draw(st.integers(0, 7)) == 0:
            links.append((Entry(path, 0, link_to=draw(st.sampled_from(linkable))), b""))
            continue
        kind = draw(
            st.sampled_from(
                [stat.S_IFDIR] * 3
                + [stat.S_IFREG] * 5
                + [stat.S_IFLNK] * 2
                + [stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK]
            )
        )
        if kind == stat.S_IFDIR:
            directories.append(path)
        if kind in _LINKABLE:
            linkable.append(path)
        items.append(_draw_item(draw, path, kind))
    crowd = draw(st.sampled_from([0, 0, 0, 100, 150, 400]))
    if crowd:
        parent = draw(st.sampled_from(directories))
        length = draw(st.integers(0, 40))
        for index in range(crowd):
            name = b"crowd-%03d" % index + b"c" * length
            items.append((Entry(parent + b"/" + name if parent else name, stat.S_IFREG | 0o600), b""))
    return [*draw(st.permutations(items)), *draw(st.permutations(links))]


def _draw_entry(draw: st.DrawFn, path: bytes, kind: int, **fields: object) -> Entry:
    attributes = draw(_ATTRIBUTES if kind in (stat.S_IFREG, stat.S_IFDIR) else _TRUSTED)
    mode = 0o777 if kind == stat.S_IFLNK else draw(st.integers(0, 0o7777))
    if b"system.posix_acl_access" in attributes:
        mode = mode & 0o7000 | 0o664  # what this ACL says
    return Entry(
        path,
        kind | mode,
        uid=draw(_OWNERS),
        gid=draw(_OWNERS),
        mtime_ns=draw(_TIMES),
        xattrs=tuple(attributes.items()),
        **fields,  # type: ignore[arg-type]
    )


def _draw_item(draw: st.DrawFn, path: bytes, kind: int) -> Item:
    if kind == stat.S_IFREG:
        size = draw(_SIZES)
        if size and draw(st.integers(0, 3)) == 0:
            size *= draw(st.sampled_from([1, 50]))
            cuts = sorted(draw(st.sets(st.integers(0, size), max_size=8)))
            extents = [(start, end - start) for start, end in zip(cuts[::2], cuts[1::2], strict=False)]
            content = _pattern(sum(length for _, length in extents), draw(st.integers(1, 255)))
            return _draw_entry(draw, path, kind, size=size), content, extents
        return _draw_entry(draw, path, kind, size=size), _pattern(size, draw(st.integers(1, 255)))
    if kind == stat.S_IFLNK:
        return _draw_entry(draw, path, kind, target=draw(_TARGETS)), b""
    if kind in (stat.S_IFCHR, stat.S_IFBLK):
        return _draw_entry(draw, path, kind, rdev=draw(_DEVICES)), b""
    return _draw_entry(draw, path, kind), b""


def _pattern(size: int, seed: int) -> bytes:
    unit = bytes((seed + index * 31) & 0xFF for index in range(251))
    return (unit * (size // len(unit) + 1))[:size]


def expected_nodes(items: Iterable[Item]) -> dict[bytes, Node]:
    """What a reader of an image of these entries must find."""
    nodes: dict[bytes, Node] = {}
    groups: dict[bytes, list[bytes]] = {}
    for entry, content, *rest in items:
        if entry.link_to is not None:
            groups.setdefault(entry.link_to, [entry.link_to]).append(entry.path)
            nodes[entry.path] = nodes[entry.link_to]
            continue
        kind = stat.S_IFMT(entry.mode)
        size, digest = 0, ""
        if kind == stat.S_IFREG:
            size = entry.size
            digest = digest_bytes(_expand(entry.size, content, *rest))
        elif kind == stat.S_IFLNK:
            size = len(entry.target)
        nodes[entry.path] = Node(
            mode=entry.mode,
            uid=entry.uid,
            gid=entry.gid,
            rdev=entry.rdev,
            size=size,
            mtime_ns=entry.mtime_ns,
            target=entry.target,
            digest=digest,
            xattrs=dict(entry.xattrs),
            nlink=1,
        )
    for node in nodes.values():
        if stat.S_ISDIR(node.mode):
            node.nlink = 2
    for path, node in nodes.items():
        if stat.S_ISDIR(node.mode) and path:
            nodes[path.rpartition(b"/")[0]].nlink += 1
    for first, group in groups.items():
        nodes[first].nlink = len(group)
        nodes[first].group = tuple(sorted(group))
    return nodes


def _expand(size: int, content: bytes, extents: Iterable[tuple[int, int]] | None = None) -> bytes:
    if extents is None:
        return content
    whole = bytearray(size)
    position = 0
    for offset, length in extents:
        whole[offset : offset + length] = content[position : position + length]
        position += length
    return bytes(whole)
