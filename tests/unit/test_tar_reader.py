"""The tar reader against Python's tarfile on sound archives of all formats, and on damaged ones."""

from __future__ import annotations

import errno
import io
import os
import random
import stat
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from encfs.errors import SourceError, StorageError
from encfs.tar.file import TarFile
from encfs.tar.reader import Member, TarReader

KINDS = {
    tarfile.REGTYPE: stat.S_IFREG,
    tarfile.AREGTYPE: stat.S_IFREG,
    tarfile.LNKTYPE: 0,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.FIFOTYPE: stat.S_IFIFO,
    tarfile.GNUTYPE_SPARSE: stat.S_IFREG,
}


def read_all(content: bytes) -> list[tuple[Member, bytes]]:
    """All members with their stored contents; every byte is either content or was handed over as a literal."""
    source = io.BytesIO(content)
    literals = bytearray()
    found = []
    reader = TarReader(source, literals.extend)
    buffer = memoryview(bytearray(1000))
    for member in reader:
        data = bytearray()
        while count := reader.readinto(buffer):
            data += buffer[:count]
        found.append((member, bytes(data)))
    assert len(literals) + sum(len(data) for _, data in found) == len(content)
    return found


def block(name: bytes, kind: bytes = b"0", size: int = 0, **fields: bytes) -> bytes:
    """A ustar header block; `fields` overwrite what stands at an offset, `at_OFFSET=bytes`."""
    header = bytearray(512)
    header[0 : len(name)] = name
    header[100:108] = b"0000644\0"
    header[108:116] = header[116:124] = b"0000000\0"
    header[124:136] = b"%011o\0" % size
    header[136:148] = b"00000000000\0"
    header[156:157] = kind
    header[257:265] = b"ustar\x0000"
    for place, value in fields.items():
        offset = int(place.removeprefix("at_"))
        header[offset : offset + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def record(keyword: bytes, value: bytes) -> bytes:
    size = len(keyword) + len(value) + 3
    while len(text := b"%d %s=%s\n" % (size, keyword, value)) != size:
        size = len(text)
    return text


def pax(*records: bytes, kind: bytes = b"x") -> bytes:
    body = b"".join(records)
    return block(b"pax", kind, len(body)) + padded(body)


END = bytes(1024)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(form: int) -> None:
    generator = random.Random(form)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for index in range(60):
            length = generator.choice([5, 90, 99, 100, 101, 150] + ([255, 300, 700] if form else []))
            info = tarfile.TarInfo("/".join(["d" * 40] * (length // 41) + [f"{index:03}" + "x" * (length % 41)]))
            info.type = generator.choice(list(KINDS)[:-1])
            info.mode = generator.randrange(0o10000)
            info.uid, info.gid = generator.choice([(0, 0), (1000, 5), (2097151, 1)])
            info.mtime = generator.randrange(1 << 31)
            if form == tarfile.GNU_FORMAT:
                info.uid, info.mtime = generator.choice([(3 << 21, -5), (0, 1 << 34)])
            if form == tarfile.PAX_FORMAT:
                info.mtime = generator.choice([1.5, -1.25, 7])  # type: ignore[assignment]
                info.uid = 1 << 30
                info.pax_headers = {"SCHILY.xattr.user.a": "b=c\n", "comment": "ignored"}
            if info.type in (tarfile.LNKTYPE, tarfile.SYMTYPE):
                info.linkname = "t" * generator.choice([1, 99, 100] + ([101, 500] if form else []))
            if info.type in (tarfile.CHRTYPE, tarfile.BLKTYPE):
                info.devmajor, info.devminor = 8, 17
            content = generator.randbytes(generator.choice([0, 1, 511, 512, 513, 4000])) if info.isreg() else b""
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    found = read_all(buffer.getvalue())
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as archive:
        expected = archive.getmembers()
        assert len(found) == len(expected) == 60
        for (member, data), info in zip(found, expected, strict=True):
            assert member.name.decode().rstrip("/") == info.name
            assert member.kind == KINDS[info.type]
            assert (member.mode, member.uid, member.gid) == (info.mode, info.uid, info.gid)
            assert member.mtime_ns == int(info.mtime * 1_000_000_000)
            assert member.link_name.decode() == info.linkname
            assert (member.major, member.minor) == (info.devmajor, info.devminor)
            if info.isreg():
                file = archive.extractfile(info)
                assert file is not None
                assert data == file.read()
            if form == tarfile.PAX_FORMAT:
                assert member.xattrs == ((b"user.a", b"b=c\n"),)


@pytest.mark.parametrize(
    "options",
    [
        ("--format=gnu",),
        ("--format=posix", "--sparse-version=0.0"),
        ("--format=posix", "--sparse-version=0.1"),
        ("--format=posix", "--sparse-version=1.0"),
    ],
    ids=["old", "0.0", "0.1", "1.0"],
)
@pytest.mark.parametrize("pieces", [0, 1, 3, 40])
def test_sparse_files_of_gnu_tar(tmp_path: Path, options: Sequence[str], pieces: int) -> None:
    size = 65536 * (pieces + 1) + 77
    with open(tmp_path / "sparse", "wb") as file:
        for index in range(pieces):
            file.seek(65536 * (index + 1) - 5000)
            file.write(random.Random(index).randbytes(5001))
        file.truncate(size)
    expected = (tmp_path / "sparse").read_bytes()
    made = subprocess.run(
        ["tar", "-C", str(tmp_path), "--sparse", *options, "-cf", "-", "sparse"], capture_output=True, check=True
    )
    ((member, data),) = read_all(made.stdout)
    assert member.name == b"sparse"
    assert member.size == size
    assert member.extents is not None
    content = bytearray(size)
    position = 0
    for offset, length in member.extents:
        content[offset : offset + length] = data[position : position + length]
        position += length
    assert position == len(data) < max(size // 2, 1)
    assert content == expected


def test_bsdtar_and_gnu_agree_on_long_names(tmp_path: Path) -> None:
    name = "/".join(["n" * 120] * 5)
    long = tmp_path / name
    long.parent.mkdir(parents=True)
    long.write_bytes(b"x")
    made = subprocess.run(
        ["tar", "-C", str(tmp_path), "--format=gnu", "-cf", "-", name], capture_output=True, check=True
    )
    assert [member.name for member, _ in read_all(made.stdout)] == [name.encode()]


def test_archive_may_end_without_padding_and_zeros() -> None:
    # umoci insert writes such layers, and Go's archive/tar reads them.
    assert read_all(block(b"f", size=3) + b"abc")[0][1] == b"abc"
    assert read_all(block(b"f", size=3) + padded(b"abc") + bytes(512))[0][1] == b"abc"


def test_what_follows_the_end_belongs_to_the_stream_only() -> None:
    assert len(read_all(block(b"f") + END + b"garbage" * 5000)) == 1


SPARSE_1 = [
    record(b"GNU.sparse.major", b"1"),
    record(b"GNU.sparse.minor", b"0"),
    record(b"GNU.sparse.realsize", b"9999"),
]

MALFORMED = {
    "cut in a header": block(b"f")[:300],
    "cut in contents": block(b"f", size=600) + b"abc",
    "checksum": block(b"f").replace(b"f", b"g", 1),
    "no octal": block(b"f", at_124=b"00000000z8\0"),
    "negative size": block(b"f", at_124=b"\xff" * 12),
    "size out of range": block(b"f", at_124=b"\x80" + b"\xff" * 11),
    "unknown type": block(b"f", b"D"),
    "behind zeros": bytes(512) + block(b"f"),
    "extended header without entry": pax(record(b"path", b"a")),
    "extended header too large": block(b"p", b"x", (1 << 20) + 1),
    "long name too large": block(b"p", b"L", 1 << 40),
    "record too short": pax(b"3 a\n") + block(b"f"),
    "record beyond the end": pax(b"99 path=a\n") + block(b"f"),
    "record without newline": pax(b"10 path=ab") + block(b"f"),
    "record without length": pax(b"path=a\n") + block(b"f"),
    "NUL in a path": pax(record(b"path", b"a\0b")) + block(b"f"),
    "NUL in a keyword": pax(record(b"pa\0th", b"ab")) + block(b"f"),
    "size that is no number": pax(record(b"size", b"0x10")) + block(b"f"),
    "size beyond 64 bits": pax(record(b"size", b"9" * 19)) + block(b"f"),
    "time that is none": pax(record(b"mtime", b"1e9")) + block(b"f"),
    "global header that renames": pax(record(b"path", b"evil"), kind=b"g") + block(b"f"),
    "global header with attributes": pax(record(b"SCHILY.xattr.user.a", b"b"), kind=b"g") + block(b"f"),
    "endless extended headers": pax(record(b"comment", b"a")) * 20 + block(b"f"),
    "sparse: unknown version": pax(record(b"GNU.sparse.major", b"2"), record(b"GNU.sparse.minor", b"0")) + block(b"f"),
    "sparse: directory": pax(record(b"GNU.sparse.map", b"0,1")) + block(b"d", b"5"),
    "sparse: overlapping": pax(record(b"GNU.sparse.map", b"0,5,3,5"), record(b"GNU.sparse.size", b"99"))
    + block(b"f", size=10)
    + bytes(512),
    "sparse: beyond its size": pax(record(b"GNU.sparse.map", b"0,10"), record(b"GNU.sparse.size", b"9"))
    + block(b"f", size=10)
    + bytes(512),
    "sparse: other than stored": pax(record(b"GNU.sparse.map", b"0,5"), record(b"GNU.sparse.size", b"99"))
    + block(b"f", size=10)
    + bytes(512),
    "sparse: odd number": pax(record(b"GNU.sparse.map", b"0,5,9"), record(b"GNU.sparse.size", b"99")) + block(b"f"),
    "sparse: negative": pax(record(b"GNU.sparse.map", b"-5,5"), record(b"GNU.sparse.size", b"99"))
    + block(b"f", size=5)
    + bytes(512),
    "sparse: no map in the data": pax(*SPARSE_1) + block(b"f", size=100) + bytes(512),
    "sparse: map without end": pax(*SPARSE_1) + block(b"f", size=2048) + b"1" * 2048,
    "sparse: too many": pax(*SPARSE_1) + block(b"f", size=512) + padded(b"99999999\n"),
    "sparse: old without GNU's header": block(b"f", b"S"),
    "sparse: old, map without end": block(b"f", b"S", at_257=b"ustar  \0", at_482=b"\1")
    + (bytes(504) + b"\1" + bytes(7)),
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_archives_are_refused(content: bytes) -> None:
    with pytest.raises(SourceError):
        read_all(content)


def test_damaged_archives_are_read_or_refused_but_never_crash() -> None:
    generator = random.Random(7)
    good = (
        pax(record(b"path", b"p" * 300), record(b"mtime", b"1.5"))
        + block(b"f", size=700)
        + padded(b"c" * 700)
        + block(b"././@LongLink", b"L", 200)
        + padded(b"l" * 200)
        + block(b"g", b"2", at_157=b"target")
        + pax(*SPARSE_1)
        + block(b"s", size=517)
        + padded(b"1\n4096\n5\n")
        + padded(b"hello")
        + END
    )
    assert [member.name[:3] for member, _ in read_all(good)] == [b"ppp", b"lll", b"s"]
    refused = 0
    for _ in range(1500):
        damaged = bytearray(good)
        for _ in range(generator.randrange(1, 4)):
            damaged[generator.randrange(len(damaged))] = generator.choice([0, 48, 57, 255, generator.randrange(256)])
        try:
            read_all(bytes(damaged[: generator.choice([len(good), generator.randrange(len(good))])]))
        except SourceError:
            refused += 1
    assert refused > 150


@pytest.mark.parametrize("call", ["pread", "preadv"])
def test_a_disk_that_fails_is_said(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with tarfile.open(tmp_path / "image.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("member"))
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(StorageError, match=r"image.tar: Input/output error"):
        TarFile(str(tmp_path / "image.tar"), hint="")
