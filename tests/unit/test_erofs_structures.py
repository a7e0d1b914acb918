"""The tables: exact sizes, device numbers, superblocks, extended attributes."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from encfs.erofs import structures
from encfs.erofs.structures import (
    Superblock,
    decode_device,
    encode_device,
    pack_superblock,
    parse_superblock,
    printable,
)
from encfs.erofs.xattrs import decode_xattrs, encode_xattrs
from encfs.errors import FormatError, SourceError, UnsupportedError

SUPERBLOCK = Superblock(
    root_nid=1,
    inodes=7,
    epoch=1_700_000_000,
    epoch_nsec=5,
    blocks=12,
    metadata_block=9,
    xattr_block=0,
    uuid=bytes(range(16)),
    incompatible=structures.INCOMPAT_CHUNKED,
)


def no_shared(offset: int, size: int) -> bytes:
    raise AssertionError("nothing is shared")


def test_records_have_the_sizes_of_the_specification() -> None:
    assert structures.SUPERBLOCK.size == 128
    assert structures.COMPACT_INODE.size == 32
    assert structures.EXTENDED_INODE.size == 64
    assert structures.DIRENT.size == 12
    assert structures.XATTR_HEADER.size == 12
    assert structures.XATTR_ENTRY.size == 4
    assert structures.CHUNK_INDEX.size == 8


def test_superblock_stands_where_the_kernel_looks() -> None:
    head = pack_superblock(SUPERBLOCK)
    assert len(head) == 1024 + 128
    assert not any(head[:1024])
    assert head[1024:1028] == bytes.fromhex("e2e1f5e0")
    assert head[1024 + 12] == 12
    assert struct.unpack_from("<H", head, 1024 + 14) == (1,)
    assert struct.unpack_from("<QQIIII", head, 1024 + 16) == (7, 1_700_000_000, 5, 12, 9, 0)
    assert head[1024 + 48 : 1024 + 64] == bytes(range(16))
    assert struct.unpack_from("<I", head, 1024 + 80) == (4,)
    assert parse_superblock(head[1024:]) == SUPERBLOCK


@pytest.mark.parametrize(
    ("offset", "value", "error"),
    [
        (0, b"\0", FormatError),
        (12, b"\x09", UnsupportedError),
        (12, b"\xff", UnsupportedError),
        (32, b"\xff\xff\xff\xff", FormatError),
        (80, b"\x01", UnsupportedError),
        (83, b"\x80", UnsupportedError),
        (86, b"\x01", UnsupportedError),
        (90, b"\x01", UnsupportedError),
    ],
)
def test_superblock_with_anything_unknown_is_refused(offset: int, value: bytes, error: type[Exception]) -> None:
    data = bytearray(pack_superblock(SUPERBLOCK)[1024:])
    data[offset : offset + len(value)] = value
    with pytest.raises(error):
        parse_superblock(bytes(data))


def test_short_superblock_is_refused() -> None:
    with pytest.raises(FormatError):
        parse_superblock(pack_superblock(SUPERBLOCK)[1024:-1])


@given(st.integers(0, 0xFFF), st.integers(0, 0xFFFFF))
def test_device_numbers_round_trip(major: int, minor: int) -> None:
    encoded = encode_device(os.makedev(major, minor))
    assert encoded is not None
    assert encoded < 1 << 32
    assert decode_device(encoded) == os.makedev(major, minor)


def test_device_numbers_have_the_kernels_form() -> None:
    assert encode_device(os.makedev(1, 3)) == 0x103
    assert encode_device(os.makedev(0xABC, 0xDEF12)) == 0xDEFABC12
    assert encode_device(os.makedev(0x1000, 0)) is None
    assert encode_device(os.makedev(0, 0x100000)) is None


def test_printable_is_one_line() -> None:
    assert printable(b"a/\xff\n\x1b[31m\xe2\x80\xae") == "a/\\xff\\n\\x1b[31m\\u202e"
    assert printable("grüße".encode()) == "grüße"
    assert printable(b"") == "/"


XATTR_NAMES = st.one_of(
    st.sampled_from([b"system.posix_acl_access", b"system.posix_acl_default"]),
    st.builds(
        lambda prefix, suffix: prefix + suffix,
        st.sampled_from([b"user.", b"trusted.", b"security."]),
        st.binary(min_size=1, max_size=255).filter(lambda suffix: b"\0" not in suffix),
    ),
)


@given(st.dictionaries(XATTR_NAMES, st.binary(max_size=300), max_size=8), st.randoms())
def test_xattrs_round_trip_in_any_order(xattrs: dict[bytes, bytes], random: object) -> None:
    items = list(xattrs.items())
    random.shuffle(items)  # type: ignore[attr-defined]
    area = encode_xattrs(b"path", items)
    assert area == encode_xattrs(b"path", sorted(items))
    assert len(area) % 4 == 0
    if items:
        assert dict(decode_xattrs(area, no_shared)) == xattrs
    else:
        assert area == b""


def test_xattr_area_has_the_documented_bytes() -> None:
    assert encode_xattrs(b"", [(b"user.ab", b"xyz")]) == bytes(12) + b"\x02\x01\x03\x00abxyz" + bytes(3)
    assert encode_xattrs(b"", [(b"system.posix_acl_default", b"")]) == bytes(12) + b"\x00\x03\x00\x00"


@pytest.mark.parametrize(
    "xattrs",
    [
        [(b"user.", b"")],
        [(b"user.a", b""), (b"user.a", b"")],
        [(b"user." + b"k" * 256, b"")],
        [(b"user.a\0b", b"")],
        [(b"user.a", bytes(65536))],
        [(b"system.nfs4_acl", b"x")],
        [(b"system.posix_acl_access2", b"x")],
        [(b"com.example", b"x")],
        [(b"", b"x")],
        [(b"user.%d" % number, bytes(65535)) for number in range(4)],
    ],
)
def test_xattrs_that_cannot_be_kept_are_named(xattrs: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(SourceError, match="odd/path") as caught:
        encode_xattrs(b"odd/path", xattrs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "area",
    [
        bytes(4) + b"\x01" + bytes(7),  # a shared entry that is not there
        bytes(12) + b"\x01\x01",  # cut in an entry's head
        bytes(12) + b"\x08\x01\x00\x00abcd",  # name beyond the end
        bytes(12) + b"\x01\x01\x08\x00abcd",  # value beyond the end
        bytes(12) + b"\x00\x01\x00\x00",  # user. without a name
        bytes(12) + b"\x01\x02\x00\x00abcd",  # a POSIX ACL with a name
        bytes(12) + b"\x03\x01\x00\x00a\0b\0",  # NUL in a name
    ],
)
def test_malformed_xattr_areas_are_refused(area: bytes) -> None:
    with pytest.raises(FormatError):
        list(decode_xattrs(area, no_shared))


def test_xattrs_of_unknown_kinds_are_left_out() -> None:
    assert list(decode_xattrs(bytes(12) + b"\x01\x05\x01\x00ab\0\0" + b"\x01\x01\x01\x00cd\0\0", no_shared)) == [
        (b"user.c", b"d")
    ]


def test_shared_xattrs_are_read_where_their_number_says() -> None:
    shared = bytes(8) + b"\x01\x06\x02\x00s42" + bytes(1)
    area = bytes(4) + b"\x01" + bytes(7) + struct.pack("<I", 2) + b"\x01\x01\x01\x00cd\0\0"
    assert dict(decode_xattrs(area, lambda offset, size: shared[offset : offset + size])) == {
        b"security.s": b"42",
        b"user.c": b"d",
    }
