"""Directories and files as sources: what is taken, in which order, and what is left out."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from encfs.erofs.writer import ErofsWriter
from encfs.errors import NotFoundError, SourceError
from imagetool.sources.directory import SourceMeasure, SourceOptions, add_source, measure_source
from tests.support.images import TEST_UUID, FileSink, open_image
from tests.support.trees import Node, assert_same, scan_image, scan_tree


def image_of(source: Path, image: Path, options: SourceOptions | None = None) -> int:
    """Write an image of a source; the bytes that were read."""
    read = 0

    def advance(size: int) -> None:
        nonlocal read
        read += size

    with FileSink(image) as sink, ErofsWriter(sink, uuid=TEST_UUID) as writer:
        add_source(source, writer, options or SourceOptions(), advance)
        writer.finish()
    return read


def nodes_of(source: Path, work: Path, options: SourceOptions | None = None) -> dict[bytes, Node]:
    image_of(source, work / "image", options)
    with open_image(work / "image") as reader:
        return scan_image(reader)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    for name in ("a/b/c.txt", "a/b/d.pyc", "a/.git/config", "z.txt", "cache/x", "b.txt"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(name)
    return path


def names(nodes: dict[bytes, Node]) -> set[str]:
    return {path.decode() for path in nodes}


def test_everything_is_taken_as_it_is(source: Path, tmp_path: Path) -> None:
    assert_same(scan_tree(source), nodes_of(source, tmp_path))


def test_the_same_tree_gives_the_same_image_whatever_the_order_of_its_making(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for path in sorted(source.rglob("*"), reverse=True):
        place = other / path.relative_to(source)
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    for top in (source, other):
        for path in [*top.rglob("*"), top]:
            os.utime(path, ns=(10**18 + 1, 10**18 + 1))
    image_of(source, tmp_path / "one")
    image_of(other, tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (("*.pyc",), {"a/b/d.pyc"}),
        ((".git",), {"a/.git", "a/.git/config"}),
        (("a/b",), {"a/b", "a/b/c.txt", "a/b/d.pyc"}),
        (("b",), {"a/b", "a/b/c.txt", "a/b/d.pyc"}),
        (("?.txt",), {"a/b/c.txt", "z.txt", "b.txt"}),
        (("/z.txt", "nothing", ""), set()),
    ],
)
def test_exclusion_by_name_and_by_path(source: Path, tmp_path: Path, exclude: tuple[str, ...], left: set[str]) -> None:
    everything = names(scan_tree(source))
    options = SourceOptions(exclude)
    assert names(nodes_of(source, tmp_path, options)) == everything - left
    files = [path for path in everything - left if (source / path).is_file()]
    assert measure_source(source, options) == SourceMeasure(len(files), sum(len(path) for path in files))


def test_what_is_excluded_need_not_be_readable(source: Path, tmp_path: Path) -> None:
    (source / "cache" / "broken").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as server:
        directory = os.open(source / "cache", os.O_RDONLY)
        server.bind(f"/proc/self/fd/{directory}/socket")
        os.close(directory)
        assert b"cache/socket" in nodes_of(source, tmp_path)
        assert b"cache" not in nodes_of(source, tmp_path, SourceOptions(("cache",)))


def test_times_after_the_latest_are_set_to_it(source: Path, tmp_path: Path) -> None:
    os.utime(source / "z.txt", ns=(1, 5 * 10**9 + 7))
    os.utime(source / "b.txt", ns=(1, 2**32 * 10**9))
    nodes = nodes_of(source, tmp_path, SourceOptions(latest_mtime=10))
    assert nodes[b"z.txt"].mtime_ns == 5 * 10**9 + 7
    assert nodes[b"b.txt"].mtime_ns == 10 * 10**9
    assert nodes[b""].mtime_ns == 10 * 10**9


def test_a_single_file_stands_in_a_directory_of_its_owner(source: Path, tmp_path: Path) -> None:
    file = source / "z.txt"
    file.chmod(0o640)
    nodes = nodes_of(file, tmp_path)
    assert names(nodes) == {"", "z.txt"}
    assert nodes[b""].mode == 0o40755
    assert nodes[b"z.txt"].mode == 0o100640
    assert nodes[b""].uid == nodes[b"z.txt"].uid == file.stat().st_uid
    assert measure_source(file, SourceOptions()) == SourceMeasure(1, len("z.txt"))


def test_a_link_to_a_source_is_followed_and_links_within_are_not(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("source")
    (source / "within").symlink_to("a")
    nodes = nodes_of(tmp_path / "link", tmp_path)
    assert nodes[b""].mode == source.stat().st_mode
    assert nodes[b"within"].target == b"a"


def test_a_link_to_a_single_file_gives_the_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "latest.txt").symlink_to("source/z.txt")
    nodes = nodes_of(tmp_path / "latest.txt", tmp_path)
    assert names(nodes) == {"", "latest.txt"}
    assert nodes[b"latest.txt"].size == len("z.txt")


def test_holes_are_not_read_and_hard_links_are_read_once(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with open(source / "sparse", "wb") as file:
        os.pwrite(file.fileno(), b"x" * 4096, 1 << 30)
        os.truncate(file.fileno(), 2 << 30)
    (source / "one").write_bytes(b"y" * 8192)
    os.link(source / "one", source / "two")
    assert measure_source(source, SourceOptions()).size == 4096 + 8192
    assert image_of(source, tmp_path / "image") == 4096 + 8192
    assert (tmp_path / "image").stat().st_size < 1 << 20


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
def test_a_source_that_is_neither_is_refused(tmp_path: Path, kind: str) -> None:
    path = Path("/dev/null") if kind == "device" else tmp_path / kind
    server = socket.socket(socket.AF_UNIX)
    if kind == "fifo":
        os.mkfifo(path)
    if kind == "socket":
        directory = os.open(tmp_path, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{directory}/{kind}")
        os.close(directory)
    server.close()
    with pytest.raises(SourceError, match="neither"):
        image_of(path, tmp_path / "image")


def test_a_missing_source_is_named_on_one_line(tmp_path: Path) -> None:
    for name in ("missing", "line\nend"):
        with pytest.raises(NotFoundError) as caught:
            image_of(tmp_path / name, tmp_path / "image")
        assert "\n" not in str(caught.value)
        with pytest.raises(NotFoundError):
            measure_source(tmp_path / name, SourceOptions())
