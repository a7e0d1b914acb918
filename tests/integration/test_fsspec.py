"""The fsspec filesystem: fsspec's own contract tests for reading, and the libraries that read through it."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas
import pytest
import zarr
from fsspec.implementations.local import LocalFileSystem
from fsspec.tests.abstract import AbstractFixtures, AbstractGetTests
from pyarrow import dataset, parquet

from encfs.fsspec import EncfsFileSystem
from tests.support.opened import Stored, store_tree

CONTENT = os.urandom(3_000_000)
CSV = "name,count\nred,3\ngreen,4\n"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """One artifact with every scenario of the contract tests, each in a directory of its own, and files to read."""
    directory = tmp_path_factory.mktemp("fsspec")
    tree = directory / "tree"
    local = LocalFileSystem(auto_mkdir=True)
    scenarios = AbstractFixtures()
    for name, make in (
        ("bulk", scenarios._bulk_operations_scenario_0),
        ("glob", scenarios._glob_edge_cases_files),
        ("prefix", scenarios._dir_and_file_with_same_name_prefix),
        ("hashed", scenarios._10_files_with_hashed_names),
    ):
        make(local, os.path.join, str(tree / "all" / name))
    (tree / "all" / "src").mkdir()
    (tree / "all" / "src" / "file").touch()
    (tree / "data.bin").write_bytes(CONTENT)
    (tree / "table.csv").write_text(CSV)
    (tree / "link.csv").symlink_to("table.csv")
    (tree / "dangling").symlink_to("nowhere")
    return store_tree(tree, directory)


@pytest.fixture
def options(stored: Stored) -> dict[str, Any]:
    return {"ref": stored.reference, **stored.options}


@pytest.fixture
def fs(options: dict[str, Any]) -> Iterator[EncfsFileSystem]:
    yield fsspec.filesystem("encfs", **options)
    EncfsFileSystem.clear_instance_cache()


class TestGetContract(AbstractGetTests, AbstractFixtures):
    """fsspec's contract for `get`: to files, to directories, globs, lists. The scenarios are in the artifact."""

    @pytest.fixture
    def fs(self, options: dict[str, Any]) -> EncfsFileSystem:
        return fsspec.filesystem("encfs", **options)

    @pytest.fixture
    def fs_path(self) -> str:
        return "all"

    @pytest.fixture
    def fs_bulk_operations_scenario_0(self) -> str:
        return "all/bulk/source"

    @pytest.fixture
    def fs_glob_edge_cases_files(self) -> str:
        return "all/glob/source"

    @pytest.fixture
    def fs_dir_and_file_with_same_name_prefix(self) -> str:
        return "all/prefix/source"

    @pytest.fixture
    def fs_10_files_with_hashed_names(self) -> str:
        return "all/hashed/source"

    @pytest.fixture
    def supports_empty_directories(self) -> bool:
        return True

    def test_get_directory_recursive(  # type: ignore[override]
        self,
        fs: EncfsFileSystem,
        fs_join: Any,
        fs_path: str,
        local_fs: Any,
        local_join: Any,
        local_target: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The one that makes its scenario by itself: it is in the artifact already."""
        assert fs.isfile("all/src/file")
        monkeypatch.setattr(fs, "mkdir", lambda path: None)
        monkeypatch.setattr(fs, "touch", lambda path: None)
        super().test_get_directory_recursive(fs, fs_join, fs_path, local_fs, local_join, local_target)


def test_protocol_is_registered(options: dict[str, Any]) -> None:
    with fsspec.open("encfs://table.csv", "rt", **options) as file:
        assert file.read() == CSV
    assert fsspec.open_files("encfs://all/*/source/file*", **options)[0].path.endswith("source/file1")


def test_listing_and_info(fs: EncfsFileSystem) -> None:
    assert fs.ls("", detail=False) == sorted(["all", "data.bin", "table.csv", "link.csv", "dangling"])
    info = fs.info("encfs://data.bin")
    assert (info["type"], info["size"], info["name"]) == ("file", len(CONTENT), "data.bin")
    by_name = {entry["name"]: entry for entry in fs.ls("/")}
    assert (by_name["link.csv"]["type"], by_name["link.csv"]["destination"]) == ("file", "table.csv")
    assert by_name["dangling"]["type"] == "link"
    assert fs.isdir("all/bulk/source/")
    assert fs.isfile("link.csv")
    assert not fs.exists("nothing")
    assert fs.ls("table.csv", detail=False) == ["table.csv"]
    assert fs.du("all/bulk") == 0
    assert sorted(fs.find("all/prefix")) == ["all/prefix/source/subdir.txt", "all/prefix/source/subdir/subfile.txt"]
    assert fs.glob("**/nestedfile") == [
        "all/bulk/source/subdir/nesteddir/nestedfile",
        "all/glob/source/subdir0/nesteddir/nestedfile",
        "all/glob/source/subdir1/nesteddir/nestedfile",
    ]
    assert fs.modified("data.bin").tzinfo is not None


def test_ranges_and_whole_files(fs: EncfsFileSystem, tmp_path: Path) -> None:
    assert fs.cat("data.bin") == CONTENT
    assert fs.cat_file("data.bin", 10, 20) == CONTENT[10:20]
    assert fs.cat_file("data.bin", -20, -10) == CONTENT[-20:-10]
    assert fs.cat_file("data.bin", start=len(CONTENT) - 3) == CONTENT[-3:]
    assert fs.cat_ranges(["data.bin"] * 2, [0, 100], [5, 105]) == [CONTENT[:5], CONTENT[100:105]]
    assert fs.head("data.bin", 16) == CONTENT[:16]
    assert fs.tail("data.bin", 16) == CONTENT[-16:]
    fs.get("data.bin", str(tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == CONTENT
    assert fs.ukey("data.bin") != fs.ukey("table.csv")


def test_missing_and_wrong_kinds(fs: EncfsFileSystem) -> None:
    for action in (fs.info, fs.ls, fs.open, fs.cat_file):
        with pytest.raises(FileNotFoundError):
            action("nothing")
    with pytest.raises(IsADirectoryError):
        fs.open("all/bulk")


@pytest.mark.parametrize(
    "change",
    [
        lambda fs: fs.open("new", "wb"),
        lambda fs: fs.open("data.bin", "ab"),
        lambda fs: fs.rm("data.bin"),
        lambda fs: fs.mkdir("new"),
        lambda fs: fs.makedirs("new/deep"),
        lambda fs: fs.pipe_file("data.bin", b""),
        lambda fs: fs.touch("data.bin"),
        lambda fs: fs.cp_file("data.bin", "copy"),
        lambda fs: fs.mv("data.bin", "moved"),
        lambda fs: fs.put_file(__file__, "new"),
    ],
)
def test_whatever_writes_is_refused(fs: EncfsFileSystem, change: Callable[[EncfsFileSystem], object]) -> None:
    with pytest.raises(OSError, match="read-only") as caught:
        change(fs)
    assert caught.value.errno == errno.EROFS


def test_goes_to_other_processes(fs: EncfsFileSystem) -> None:
    again = pickle.loads(pickle.dumps(fs))  # noqa: S301 - made here
    assert again.cat("table.csv") == CSV.encode()
    assert "ref" in fs.to_dict()


def test_a_reference_is_needed() -> None:
    with pytest.raises(TypeError, match="ref"):
        fsspec.filesystem("encfs")


def test_pandas_and_pyarrow(options: dict[str, Any], fs: EncfsFileSystem, tmp_path: Path) -> None:
    assert pandas.read_csv("encfs://table.csv", storage_options=options)["count"].sum() == 7
    frame = pandas.DataFrame({"a": range(1000), "b": [f"text {i}" for i in range(1000)]})
    tree = tmp_path / "tree"
    (tree / "parts").mkdir(parents=True)
    for part in range(3):
        frame.to_parquet(tree / "parts" / f"{part}.parquet")
    other = store_tree(tree, tmp_path)
    where = {"ref": other.reference, **other.options}
    assert pandas.read_parquet("encfs://parts/1.parquet", storage_options=where).equals(frame)
    files = fsspec.filesystem("encfs", **where)
    assert dataset.dataset("parts", filesystem=files).count_rows() == 3000
    assert parquet.read_table("parts/0.parquet", filesystem=files, columns=["a"]).num_rows == 1000


def test_zarr_and_chaining(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    values = np.arange(10_000).reshape(100, 100)
    zarr.create_array(str(tree / "array.zarr"), data=values, chunks=(10, 100))
    local = LocalFileSystem()
    archive = fsspec.filesystem("zip", fo=str(tree / "archive.zip"), mode="w")
    archive.pipe("inner.txt", b"inside")
    archive.close()
    assert local.exists(str(tree / "archive.zip"))
    stored = store_tree(tree, tmp_path)
    where = {"ref": stored.reference, **stored.options}
    with fsspec.open("zip://inner.txt::encfs://archive.zip", encfs=where) as file:
        assert file.read() == b"inside"
    opened = zarr.open_array("encfs://array.zarr", mode="r", storage_options=where)
    assert np.array_equal(opened[:], values)
