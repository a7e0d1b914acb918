"""Tensors straight from an artifact, against what the `safetensors` package reads from the plain file."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import encfs.safetensors
from encfs.errors import (
    EncfsError,
    FormatError,
    IntegrityError,
    NotFoundError,
    PinError,
    UnsupportedError,
    UsageError,
    WrongKeyError,
)
from encfs.keys.files import write_key_files
from encfs.keys.jwk import generate_key
from encfs.safetensors import parse_header
from tests.support.opened import Stored, store_tree

MODEL = "model.safetensors"


def tensors() -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(7)
    return {
        "wide": random.standard_normal((700, 1024), dtype=np.float32),
        "half": random.standard_normal((33, 7, 5)).astype(np.float16),
        "bytes": random.integers(0, 255, 1000, dtype=np.uint8),
        "flags": random.integers(0, 2, (3, 3)).astype(bool),
        "long": random.integers(-(2**62), 2**62, (5,)),
        "scalar": np.array(3.5),
        "none": np.zeros((0, 4), dtype=np.float32),
        "complex": np.array([1 + 2j, 3 - 4j], dtype=np.complex64),
    }


def raw_file(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tensors") / "tree"
    (root / "sharded").mkdir(parents=True)
    save_file(tensors(), root / MODEL, metadata={"format": "pt", "note": "ünïcode"})
    shards = {"a": {"x": np.arange(10.0)}, "b": {"y": np.ones((2, 3), np.float32), "unused": np.zeros(3)}}
    for name, content in shards.items():
        save_file(content, root / "sharded" / f"{name}.safetensors")
    index = {"metadata": {"total_size": 104}, "weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (root / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "outside.index.json").write_text(json.dumps({"weight_map": {"x": "../a.safetensors"}}))
    (root / "broken.index.json").write_text('{"weight_map": ["x"]}')
    brain = {"w": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}
    (root / "bf16.safetensors").write_bytes(raw_file(brain, os.urandom(8)))
    (root / "short").write_bytes(b"1234567")
    (root / "lies").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    return root


@pytest.fixture(scope="module")
def stored(tree: Path) -> Stored:
    return store_tree(tree, tree.parent)


def load(stored: Stored, path: str, **options: Any) -> dict[str, Any]:
    return encfs.safetensors.load_file(stored.reference, path, **stored.options, **options)


def test_loads_what_the_package_loads(stored: Stored, tree: Path) -> None:
    expected, loaded = load_file(tree / MODEL), load(stored, MODEL)
    assert loaded.keys() == expected.keys()
    for name, array in expected.items():
        assert loaded[name].dtype == array.dtype
        assert loaded[name].shape == array.shape
        assert np.array_equal(loaded[name], array)
        assert loaded[name].flags.writeable


def test_safe_open_reads_single_tensors_and_slices(stored: Stored, tree: Path) -> None:
    with (
        encfs.safetensors.safe_open(stored.reference, MODEL, **stored.options) as ours,
        safetensors.safe_open(tree / MODEL, "np") as theirs,
    ):
        assert ours.keys() == sorted(theirs.keys())
        assert ours.offset_keys() == list(theirs.offset_keys())
        assert ours.metadata() == theirs.metadata()
        assert np.array_equal(ours.get_tensor("half"), theirs.get_tensor("half"))
        mine, other = ours.get_slice("wide"), theirs.get_slice("wide")
        assert (mine.get_shape(), mine.get_dtype()) == (list(other.get_shape()), other.get_dtype())
        for index in (np.s_[3:9], np.s_[:, 5:7], np.s_[10], np.s_[690:, :3], np.s_[5:5], np.s_[...]):
            assert np.array_equal(mine[index], theirs.get_tensor("wide")[index])
        with pytest.raises(NotFoundError, match="no tensor 'nothing'"):
            ours.get_tensor("nothing")
        with pytest.raises(IndexError):
            mine[700]


@given(
    index=st.one_of(
        st.integers(-7, 6),
        st.slices(7),
        st.tuples(st.slices(7), st.slices(5)),
        st.tuples(st.integers(-7, 6), st.integers(-5, 4)),
        st.just(np.s_[None, 2:3]),
        st.just(np.s_[..., 1]),
        st.just(np.int64(3)),
        st.just([1, 2]),
        st.just(np.array([4, 0])),
        st.just(np.arange(7) % 2 == 0),
        st.just(np.array(3)),
    )
)
@settings(max_examples=60)
def test_slices_as_numpy_has_them(small: Any, index: Any) -> None:
    assert np.array_equal(small.get_slice("t")[index], np.arange(35.0).reshape(7, 5)[index])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("slices")
    (directory / "tree").mkdir()
    save_file({"t": np.arange(35.0).reshape(7, 5)}, directory / "tree" / MODEL)
    stored = store_tree(directory / "tree", directory)
    with encfs.safetensors.safe_open(stored.reference, MODEL, **stored.options) as file:
        yield file


def test_a_slice_reads_no_more_than_its_rows(stored: Stored) -> None:
    with stored.open() as artifact:
        volume = artifact.files._here().volume
        file = encfs.safetensors.safe_open(artifact, MODEL)
        before = volume.stats.bytes_fetched
        file.get_slice("wide")[100:102]
        assert volume.stats.bytes_fetched - before <= 3 * (volume.frame_size + 64)


def test_shards_by_their_index(stored: Stored) -> None:
    loaded = load(stored, "sharded/model.safetensors.index.json")
    assert loaded.keys() == {"x", "y"}
    assert np.array_equal(loaded["x"], np.arange(10.0))


def test_an_open_artifact_stays_open(stored: Stored) -> None:
    with stored.open() as artifact:
        assert "x" in encfs.safetensors.load_file(artifact, "sharded/a.safetensors")
        with encfs.safetensors.safe_open(artifact, MODEL) as file:
            file.get_tensor("long")
        assert artifact.exists(MODEL)
        with pytest.raises(UsageError, match="'key' belongs"):
            encfs.safetensors.load_file(artifact, MODEL, key="x")


def test_bfloat16_needs_torch(stored: Stored) -> None:
    with pytest.raises(UnsupportedError, match="NumPy has no type BF16"):
        load(stored, "bf16.safetensors")


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("short", FormatError),
        ("lies", FormatError),
        ("outside.index.json", FormatError),
        ("broken.index.json", FormatError),
        ("missing.safetensors", NotFoundError),
    ],
)
def test_bad_files(stored: Stored, path: str, error: type[EncfsError]) -> None:
    with pytest.raises(error):
        load(stored, path)


def test_unknown_framework(stored: Stored) -> None:
    with pytest.raises(UsageError, match="not known"):
        load(stored, MODEL, framework="jax")


def test_nothing_without_trust_or_key(stored: Stored, tmp_path: Path) -> None:
    with pytest.raises(PinError):
        encfs.safetensors.load_file(stored.reference, MODEL, key=stored.options["key"], pin="sha256:" + "0" * 64)
    write_key_files(generate_key("x25519"), tmp_path / "other.jwk")
    with pytest.raises(WrongKeyError):
        encfs.safetensors.load_file(stored.reference, MODEL, **(stored.options | {"key": str(tmp_path / "other.jwk")}))


def test_a_changed_byte_leaves_no_tensor_filled(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = store_tree(tree, tmp_path)
    size = max(path.stat().st_size for path in (stored.layout / "blobs" / "sha256").iterdir())
    stored.flip_byte(0, size // 2)
    made: list[np.ndarray[Any, Any]] = []
    arrays = encfs.safetensors._NumpyArrays
    empty = arrays.empty

    def remembered(self: Any, dtype: str, shape: tuple[int, ...]) -> Any:
        array = empty(self, dtype, shape)
        made.append(array.value)
        return array

    monkeypatch.setattr(arrays, "empty", remembered)
    with pytest.raises(IntegrityError, match="frame"):
        load(stored, MODEL)
    monkeypatch.undo()
    assert len(made) == len(tensors())
    assert [array.shape for array in made if array.size and array.reshape(-1).view(np.uint8).any()] == []


def header(**changes: Any) -> dict[str, Any]:
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return {"t": {name: value for name, value in (tensor | changes).items() if value is not None}}


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"t": 1},
        header(dtype=None),
        header(extra=1),
        header(shape=[3]),
        header(shape=[-1, -2]),
        header(shape=[True, 2]),
        header(shape=[2.0]),
        header(shape="2"),
        header(shape=[1] * 65),
        header(shape=[0, 1 << 62], data_offsets=[0, 0]),
        header(dtype="BOOL", shape=[0, 1 << 40, 1 << 40], data_offsets=[0, 0]),
        header(dtype=[]),
        header(data_offsets=[0]),
        header(data_offsets=[8, 0]),
        header(data_offsets=[0, 1 << 70]),
        header(data_offsets=[4, 12]),
        {"a": header()["t"], "b": header()["t"]},
        {**header(), "__metadata__": {"a": 1}},
        {**header(), "__metadata__": []},
        b'{"t": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        b"{" * 100_000,
        b"\xff",
        b"{} {}",
    ],
)
def test_hostile_headers(document: object) -> None:
    content = document if isinstance(document, bytes) else json.dumps(document).encode()
    with pytest.raises(FormatError):
        parse_header(content, 100, 108, "file")


def test_unknown_types_are_unsupported() -> None:
    with pytest.raises(UnsupportedError, match="'F13'"):
        parse_header(json.dumps(header(dtype="F13")).encode(), 100, 108, "file")


@given(st.binary(max_size=200))
def test_any_header_is_read_or_refused(content: bytes) -> None:
    with contextlib.suppress(FormatError, UnsupportedError):
        assert not parse_header(content, 8, 8, "file").tensors
