"""Tensors of safetensors files in an artifact, decrypted straight into their own memory.

    tensors = encfs.safetensors.load_file("oci:models:v1", "model.safetensors", key="me.jwk", pin="sha256:...")

    with encfs.safetensors.safe_open("oci:models:v1", "model.safetensors", key="me.jwk", pin="sha256:...") as file:
        file.keys(); file.get_tensor("embed"); file.get_slice("embed")[:128]

The names and shapes are those of the `safetensors` package, which is not needed; NumPy is, and PyTorch for
`framework="pt"`. Every byte is verified before it is decrypted; where that fails nothing is returned and what was
written is wiped. Not here: other formats (`encfs.open(...).read_into` fills any buffer at the same speed).

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, JSON, tensors without gaps).
"""

from __future__ import annotations

import json
import math
import operator
import posixpath
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, SupportsIndex

from encfs.errors import FormatError, NotFoundError, UnsupportedError, UsageError
from encfs.memory import fresh_bytes

if TYPE_CHECKING:
    from encfs.api import Artifact

Framework = Literal["np", "numpy", "pt", "torch"]

_LENGTH = struct.Struct("<Q")
#: Bytes of a header at most, as in the reference implementation.
_MAX_HEADER = 100_000_000
#: Bytes of an index of shards at most.
_MAX_INDEX = 64 << 20
_MAX_RANK = 64
#: Bytes from which an array has pages of its own.
_LARGE = 1 << 20
#: Safetensors' name of a type: bits of one element, NumPy's name, PyTorch's name (None where it has none).
_TYPES: dict[str, tuple[int, str | None, str | None]] = {
    "BOOL": (8, "bool", "bool"),
    "U8": (8, "u1", "uint8"),
    "I8": (8, "i1", "int8"),
    "F8_E5M2": (8, None, "float8_e5m2"),
    "F8_E4M3": (8, None, "float8_e4m3fn"),
    "F8_E8M0": (8, None, "float8_e8m0fnu"),
    "I16": (16, "<i2", "int16"),
    "U16": (16, "<u2", "uint16"),
    "F16": (16, "<f2", "float16"),
    "BF16": (16, None, "bfloat16"),
    "I32": (32, "<i4", "int32"),
    "U32": (32, "<u4", "uint32"),
    "F32": (32, "<f4", "float32"),
    "C64": (64, "<c8", "complex64"),
    "F64": (64, "<f8", "float64"),
    "I64": (64, "<i8", "int64"),
    "U64": (64, "<u8", "uint64"),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a header: where its `size` bytes begin in the file, its safetensors type and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: tensors in the order of their data, which they tile."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def load_file(ref: str | Artifact, path: str, *, framework: Framework = "np", **options: Any) -> dict[str, Any]:
    """All tensors of one file, or of all shards where `path` is an index (`*.index.json`).

    `ref` is an open artifact, or a reference with the keyword arguments of `encfs.open` (`key`, `trust`, ...).
    Arrays of NumPy, or tensors of PyTorch on the CPU with `framework="pt"`.

    Raises: FormatError for a malformed header, UnsupportedError for a type that the framework does not have,
    IntegrityError, NotFoundError and whatever `encfs.open` does.
    """
    with _Opened(ref, options) as artifact:
        if path.endswith(".index.json"):
            return _load_shards(artifact, path, framework)
        with _SafeOpen(artifact, path, framework) as file:
            return file.get_tensors()


def safe_open(ref: str | Artifact, path: str, *, framework: Framework = "np", **options: Any) -> _SafeOpen:
    """One file, of which single tensors and slices are read. Use as a context manager. Raises: as `load_file`."""
    opened = _Opened(ref, options)
    try:
        return _SafeOpen(opened.artifact, path, framework, owner=opened)
    except BaseException:
        opened.close()
        raise


class _Opened:
    """An artifact, closed at the end if it was opened here."""

    def __init__(self, ref: str | Artifact, options: dict[str, Any]) -> None:
        import encfs

        self._owned = isinstance(ref, str)
        if isinstance(ref, str):
            self.artifact = encfs.open(ref, **options)
        elif options:
            raise UsageError(f"an open artifact was given; {sorted(options)[0]!r} belongs to the call that opens it")
        else:
            self.artifact = ref

    def close(self) -> None:
        if self._owned:
            self.artifact.close()

    def __enter__(self) -> Artifact:
        return self.artifact

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _SafeOpen:
    """What `safe_open` gives."""

    def __init__(self, artifact: Artifact, path: str, framework: Framework, *, owner: _Opened | None = None) -> None:
        self._arrays = _arrays_of(framework)
        self._files = artifact.files
        self._path = path
        self._owner = owner
        self._header = read_header(artifact, path)

    def keys(self) -> list[str]:
        return sorted(self._header.tensors)

    def offset_keys(self) -> list[str]:
        """Names in the order of their data."""
        return list(self._header.tensors)

    def metadata(self) -> dict[str, str] | None:
        return dict(self._header.metadata) or None

    def get_tensor(self, name: str) -> Any:
        """One tensor. Raises: NotFoundError where there is none of that name."""
        return self._load([self._info(name)])[name]

    def get_tensors(self, names: Iterable[str] | None = None) -> dict[str, Any]:
        """Several tensors at once, all by default."""
        wanted = self._header.tensors.values() if names is None else [self._info(name) for name in names]
        return self._load(list(wanted))

    def get_slice(self, name: str) -> TensorSlice:
        """A tensor of which only what is asked for is read: `get_slice(name)[2:4, :, 0]`."""
        return TensorSlice(self, self._info(name))

    def close(self) -> None:
        if self._owner is not None:
            self._owner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        info = self._header.tensors.get(name)
        if info is None:
            raise NotFoundError(f"{self._path} holds no tensor {name[:200]!r}")
        return info

    def _load(self, wanted: Sequence[TensorInfo]) -> dict[str, Any]:
        arrays = {info.name: self._arrays.empty(info.dtype, info.shape) for info in wanted}
        self._files.read_many(self._path, [(info.offset, arrays[info.name].memory) for info in wanted])
        return {name: array.value for name, array in arrays.items()}

    def _load_rows(self, info: TensorInfo, start: int, stop: int) -> Any:
        """Rows `start`…`stop` of the first axis: they lie side by side."""
        row = info.size // info.shape[0]
        array = self._arrays.empty(info.dtype, (stop - start, *info.shape[1:]))
        self._files.read_many(self._path, [(info.offset + start * row, array.memory)])
        return array.value


class TensorSlice:
    """A tensor that is read when it is indexed, and no more of it than the rows that the first index needs."""

    def __init__(self, file: _SafeOpen, info: TensorInfo) -> None:
        self._file = file
        self._info = info

    def get_shape(self) -> list[int]:
        return list(self._info.shape)

    def get_dtype(self) -> str:
        return self._info.dtype

    def __getitem__(self, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        info = self._info
        first = parts[0] if parts else Ellipsis
        rows = _rows(first, info.shape[0]) if info.shape and info.size else None
        if rows is None:
            return self._file._load([info])[info.name][index]
        start, stop, inner = rows
        return self._file._load_rows(info, start, stop)[(inner, *parts[1:])]


def _rows(index: object, length: int) -> tuple[int, int, int | slice] | None:
    """The rows that an index of the first axis needs, and its index among those; None for other kinds of index."""
    if isinstance(index, slice):
        chosen = range(length)[index]
        if not chosen:
            return 0, 0, slice(0, 0)
        # Read in order, a negative step begins at the last of them.
        return min(chosen), max(chosen) + 1, slice(None, None, chosen.step)
    if isinstance(index, bool) or not isinstance(index, SupportsIndex):
        return None
    try:
        position = operator.index(index)
    except TypeError:  # an array of indexes
        return None
    if not -length <= position < length:
        raise IndexError(f"index {position} is out of range for an axis of {length}")
    return position % length, position % length + 1, 0


def read_header(artifact: Artifact, path: str) -> Header:
    """The header of a safetensors file. Raises: FormatError, NotFoundError, IntegrityError, what the store raises."""
    size = artifact.stat(path).size
    head = artifact.read(path, 0, _LENGTH.size)
    if len(head) < _LENGTH.size:
        raise FormatError(f"{path} has {size} bytes and is no safetensors file")
    (length,) = _LENGTH.unpack(head)
    if length > _MAX_HEADER or _LENGTH.size + length > size:
        raise FormatError(f"{path} is no safetensors file: it states a header of {length} bytes")
    return parse_header(artifact.read(path, _LENGTH.size, length), _LENGTH.size + length, size, path)


def parse_header(content: bytes, data_offset: int, file_size: int, path: str) -> Header:
    """`content` is the JSON, tensors begin at `data_offset` of a file of `file_size` bytes. Raises: FormatError."""
    document = _json_object(content, f"the header of {path}")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(item, str) for item in metadata.values()):
        raise FormatError(f"the metadata of {path} is not an object of strings")
    tensors = [_tensor(name, value, data_offset, path) for name, value in document.items()]
    tensors.sort(key=lambda info: (info.offset, info.size))
    position = data_offset
    for info in tensors:
        if info.offset != position:
            raise FormatError(f"the tensors of {path} overlap or leave gaps at {info.name[:200]!r}")
        position += info.size
    if position != file_size:
        raise FormatError(f"the tensors of {path} end at byte {position} of {file_size}")
    return Header({info.name: info for info in tensors}, metadata)


def _tensor(name: str, value: object, data_offset: int, path: str) -> TensorInfo:
    where = f"tensor {name[:200]!r} of {path}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where} has other members than dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str):
        raise FormatError(f"{where} has a dtype that is no text")
    if dtype not in _TYPES:
        raise UnsupportedError(f"{where} is of type {dtype[:40]!r}, which is not supported")
    if not _naturals(shape) or len(shape) > _MAX_RANK or not _naturals(offsets) or len(offsets) != 2:
        raise FormatError(f"{where} has a malformed shape or place")
    # Frameworks reckon so, too: without the dimensions that are zero.
    if math.prod(max(1, length) for length in shape) * _TYPES[dtype][0] // 8 >= 1 << 63:
        raise FormatError(f"{where} has a shape that no memory has")
    start, end = offsets
    if end - start != math.prod(shape) * _TYPES[dtype][0] // 8:
        raise FormatError(f"{where} has {end - start} bytes, other than its shape needs")
    return TensorInfo(name, dtype, tuple(shape), data_offset + start, end - start)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 63 for item in value
    )


def _json_object(content: bytes, what: str) -> dict[str, Any]:
    def members(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a member is there twice")
        return found

    try:
        document = json.loads(content, object_pairs_hook=members)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what} is not JSON of one reading: {str(error)[:100]}") from None
    if not isinstance(document, dict):
        raise FormatError(f"{what} is not an object")
    return document


def _load_shards(artifact: Artifact, path: str, framework: Framework) -> dict[str, Any]:
    size = artifact.stat(path).size
    if size > _MAX_INDEX:
        raise FormatError(f"{path} has {size} bytes, more than an index of shards may have")
    weights = _json_object(artifact.read(path), path).get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(item, str) for item in weights.values()):
        raise FormatError(f"{path} has no weight_map of names to files")
    by_file: dict[str, list[str]] = {}
    for name, file in weights.items():
        by_file.setdefault(file, []).append(name)
    tensors: dict[str, Any] = {}
    for file, names in by_file.items():
        if "/" in file or file in ("", ".", ".."):
            raise FormatError(f"{path} names a shard outside its directory: {file[:200]!r}")
        with _SafeOpen(artifact, posixpath.join(posixpath.dirname(path), file), framework) as shard:
            tensors |= shard.get_tensors(names)
    return tensors


@dataclass(frozen=True, slots=True)
class _Array:
    """A fresh array or tensor, and its memory as bytes."""

    value: Any
    memory: memoryview


class _NumpyArrays:
    def empty(self, dtype: str, shape: tuple[int, ...]) -> _Array:
        import numpy as np

        name = _TYPES[dtype][1]
        if name is None:
            raise UnsupportedError(f"NumPy has no type {dtype}", hint='pass framework="pt" to load it with PyTorch')
        size = math.prod(shape) * np.dtype(name).itemsize
        if size < _LARGE:
            array = np.empty(shape, dtype=name)
        else:
            array = np.frombuffer(fresh_bytes(size), dtype=name).reshape(shape)
        return _Array(array, array.reshape(-1).view(np.uint8).data)


class _TorchTensors:
    def __init__(self) -> None:
        try:
            import torch
        except ImportError:
            raise UnsupportedError("PyTorch is not installed", hint="pip install torch") from None
        self._torch: Any = torch

    def empty(self, dtype: str, shape: tuple[int, ...]) -> _Array:
        kind = getattr(self._torch, _TYPES[dtype][2] or "", None)
        if kind is None:
            raise UnsupportedError(f"this PyTorch has no type {dtype}", hint="use a newer version of it")
        tensor = self._torch.empty(shape, dtype=kind)
        if not tensor.numel():
            return _Array(tensor, memoryview(b""))
        return _Array(tensor, memoryview(tensor.reshape(-1).view(self._torch.uint8).numpy()))


def _arrays_of(framework: str) -> _NumpyArrays | _TorchTensors:
    if sys.byteorder != "little":
        raise UnsupportedError("safetensors files are little-endian; this machine is not")
    if framework in ("np", "numpy"):
        return _NumpyArrays()
    if framework in ("pt", "torch"):
        return _TorchTensors()
    raise UsageError(f"framework {framework!r} is not known", hint='use "np" or "pt"')
