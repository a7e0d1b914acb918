"""`oci-archive:` as source and sink: what skopeo writes is read, what is written skopeo reads, and what is refused."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from encfs.errors import (
    ConflictError,
    FormatError,
    IntegrityError,
    NotFoundError,
    SourceError,
    UnsupportedError,
    UsageError,
    WrongKeyError,
)
from encfs.image.artifact import this_platform
from encfs.image.compression import Compression
from encfs.oci.layoutarchive import ArchiveSink, LayoutArchive
from tests.support.container_images import Store, archive, make_image, make_index, skopeo
from tests.support.image_layers import needs_skopeo
from tests.support.shell import Shell

HERE = this_platform().architecture
OPEN = ("-k", "tee.jwk", "--allow-unsigned")
PLAIN = archive({"word": b"content", "large": b"x" * 100_000})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Keys; `image.tar`, an image; `enc.tar`, its encryption."""
    shell = Shell(tmp_path_factory.mktemp("archives"))
    for name in ("tee", "other"):
        shell.ok("imagetool", "keygen", "-o", f"{name}.jwk")
    store = Store(shell.path / "plain")
    make_image(store, "v1", [(PLAIN, Compression.GZIP)], architecture=HERE)
    layers = {name: [(PLAIN, Compression.NONE)] for name in (HERE, "s390x")}
    make_index(store, "all", layers)
    with tarfile.open(shell.path / "image.tar", "w") as tar:
        tar.add(store.path, arcname=".", filter=_without_tag_all)
    shell.ok("imagetool", "encrypt", "oci:plain:v1", "oci-archive:enc.tar:v1", "-r", "tee.jwk.pub")
    return shell


def _without_tag_all(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    return member


@pytest.fixture
def shell(prepared: Shell, tmp_path: Path) -> Shell:
    shutil.copytree(prepared.path, tmp_path / "copy")
    return Shell(tmp_path / "copy")


def test_read_in_place(prepared: Shell) -> None:
    """Names with a leading `./` as well, as `tar -C LAYOUT .` writes them."""
    assert "frames" in prepared.ok("imagetool", "verify", "oci-archive:enc.tar", *OPEN)
    assert sorted(prepared.ok("encfs", "ls", "oci-archive:enc.tar:v1", *OPEN).split()) == ["large", "word"]
    assert prepared.ok("encfs", "cat", "oci-archive:enc.tar:v1", "word", *OPEN) == "content"
    digest = prepared.json("imagetool", "inspect", "oci-archive:enc.tar")["manifest_digest"]
    prepared.ok("imagetool", "inspect", f"oci-archive:enc.tar@{digest}")
    line = prepared.refused(NotFoundError, "imagetool", "inspect", "oci-archive:enc.tar:v2")
    assert "name one of its tags: v1" in line
    prepared.refused(NotFoundError, "imagetool", "inspect", f"oci-archive:enc.tar@sha256:{'0' * 64}")


@pytest.mark.fuse
def test_mounted_from_the_archive(shell: Shell) -> None:
    (shell.path / "run").mkdir(mode=0o700)
    (shell.path / "mnt").mkdir()
    shell.ok("encfs", "mount", "oci-archive:enc.tar", "mnt", *OPEN)
    try:
        assert (shell.path / "mnt/large").read_bytes() == b"x" * 100_000
    finally:
        shell.ok("encfs", "umount", "mnt")


@needs_skopeo
def test_to_and_from_skopeo(shell: Shell) -> None:
    skopeo("copy", f"oci:{shell.path}/plain:v1", f"oci-archive:{shell.path}/theirs.tar:v1")
    shell.ok("imagetool", "encrypt", "oci-archive:theirs.tar", "oci-archive:ours.tar:v1", "-r", "tee.jwk.pub")
    shell.ok("imagetool", "decrypt", "oci-archive:ours.tar", "oci-archive:back.tar:v1", *OPEN)
    skopeo("copy", f"oci-archive:{shell.path}/back.tar:v1", f"oci:{shell.path}/back:v1")
    back, plain = Store(shell.path / "back").manifest("v1"), Store(shell.path / "plain").manifest("v1")
    assert back.config.digest == plain.config.digest
    assert gzip.decompress(Store(shell.path / "back").plain_layers("v1")[0]) == PLAIN


def test_an_index_goes_in_and_out(shell: Shell) -> None:
    shell.ok("imagetool", "encrypt", "oci-archive:image.tar:all", "oci:enc:all", "-r", "tee.jwk.pub")
    there = shell.json("imagetool", "copy", "oci:enc:all", "oci-archive:all.tar:v1")
    back = shell.json("imagetool", "copy", "oci-archive:all.tar", "oci:back:v1")
    assert back["manifest_digest"] == there["manifest_digest"]
    assert back["blobs_copied"] == there["blobs_copied"]
    assert shell.ok("imagetool", "verify", "oci:back:v1", "-k", "tee.jwk").count("frames") == 2
    shell.ok("imagetool", "ocicrypt", "recipients", "list", "oci-archive:image.tar:v1")


def test_a_file_is_written_once_and_never_half(shell: Shell) -> None:
    before = sorted(os.listdir(shell.path))
    shell.refused(ConflictError, "imagetool", "copy", "oci-archive:enc.tar", "oci-archive:enc.tar:v1")
    wrong = ("-k", "other.jwk", "--allow-unsigned")
    shell.refused(WrongKeyError, "imagetool", "decrypt", "oci-archive:enc.tar", "oci-archive:new.tar:v1", *wrong)
    with closing(LayoutArchive(str(shell.path / "enc.tar"))) as opened:
        places = [place for name, place in opened._tar.members.items() if name.startswith("blobs/")]
    largest = max(places, key=lambda place: place.size)
    change(shell.path / "enc.tar", lambda content: flipped(content, largest.offset + largest.size // 2))
    shell.refused(IntegrityError, "imagetool", "verify", "oci-archive:enc.tar")
    shell.refused(IntegrityError, "imagetool", "copy", "oci-archive:enc.tar", "oci-archive:new.tar:v1")
    shell.refused(IntegrityError, "imagetool", "decrypt", "oci-archive:enc.tar", "oci-archive:new.tar:v1", *OPEN)
    fewer = ("recipients", "remove", "oci-archive:enc.tar", "0", "--allow-unsigned")
    line = shell.refused(UsageError, "imagetool", *fewer)
    assert "copied to a layout first" in line
    shell.refused(UsageError, "imagetool", "push", "oci-archive:enc.tar", "docker://localhost:1/x")
    assert sorted(os.listdir(shell.path)) == before


def test_somebody_else_s_file_is_not_replaced(tmp_path: Path) -> None:
    with closing(ArchiveSink(str(tmp_path / "new.tar"))) as sink:
        (tmp_path / "new.tar").write_bytes(b"theirs")
        with pytest.raises(ConflictError):
            sink.put_manifest(b"{}", "application/vnd.oci.image.manifest.v1+json", tag="v1")
    assert (tmp_path / "new.tar").read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["new.tar"]


def change(path: Path, how: Callable[[bytes], bytes]) -> None:
    path.write_bytes(how(path.read_bytes()))


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def test_what_is_no_archive_of_a_layout_is_refused(shell: Shell) -> None:
    def refused(kind: type[Exception], content: bytes, message: str) -> None:
        (shell.path / "odd.tar").write_bytes(content)
        line = shell.refused(kind, "imagetool", "inspect", "oci-archive:odd.tar")  # type: ignore[arg-type]
        assert "odd.tar" in line
        assert message in line

    content = (shell.path / "enc.tar").read_bytes()
    refused(UnsupportedError, gzip.compress(content), "compressed with gzip")
    refused(SourceError, content[:300], "cut short")
    refused(FormatError, content[:700], "no index.json")
    refused(NotFoundError, content[:2048], "has no blob")
    refused(SourceError, b"no tar archive" * 100, "header")
    refused(FormatError, archive({"manifest.json": b"[]"}), "it has no oci-layout")
    refused(FormatError, archive({"oci-layout": b'{"imageLayoutVersion":"1.0.0"}'}), "it has no index.json")
    refused(UnsupportedError, archive({"oci-layout": b'{"imageLayoutVersion":"9"}'}), "version 1.0.0")
    # A blob that is a link leads to another member or nowhere, never out of the archive.
    buffer = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(content)) as old, tarfile.open(fileobj=buffer, mode="w") as new:
        for member in old:
            data = old.extractfile(member)
            if member.name.startswith("blobs/"):
                member.type, member.linkname, member.size, data = tarfile.SYMTYPE, "/etc/hostname", 0, None
            new.addfile(member, data)
    refused(FormatError, buffer.getvalue(), "has no 'etc/hostname'")
    os.mkfifo(shell.path / "pipe")
    shell.refused(UsageError, "imagetool", "inspect", "oci-archive:pipe")
    shell.refused(NotFoundError, "imagetool", "inspect", "oci-archive:missing.tar")


def test_a_pipe_where_a_killed_writer_s_marker_would_be_is_passed_over(tmp_path: Path) -> None:
    """Where others write to the directory as well, anybody can put one there."""
    left = tmp_path / ".image.tar.encfs-partial-x" / "layout"
    left.mkdir(parents=True)
    os.mkfifo(left / "oci-layout")
    ArchiveSink(str(tmp_path / "image.tar")).close()
    assert left.exists()
    assert not (tmp_path / "image.tar").exists()
