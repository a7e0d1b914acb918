"""Binary structures as tables of fields: one row a field, its offset (bytes), its type.

The tables themselves stand with the formats they describe. For fixed offsets only.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from encfs.errors import FormatError

_INTEGERS = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q"}


@dataclass(frozen=True, slots=True)
class Table:
    """A structure of `size` bytes. A field's type is u8, u16, u32, u64, or a number: that many bytes, as they are.

    `order` is struct's: "<" little-endian, ">" big-endian.
    """

    what: str
    size: int
    order: str
    fields: Mapping[str, tuple[int, str | int]]

    def read(self, data: bytes, base: int = 0) -> dict[str, Any]:
        """All fields of the structure that begins at `base`, as `int` or `bytes`. Raises: FormatError if cut short."""
        if base < 0 or len(data) - base < self.size:
            raise FormatError(f"{self.what} is cut short: {max(len(data) - base, 0)} of {self.size} bytes")
        values: dict[str, Any] = {}
        for name, (offset, kind) in self.fields.items():
            at = base + offset
            if isinstance(kind, int):
                values[name] = data[at : at + kind]
            else:
                values[name] = struct.unpack_from(self.order + _INTEGERS[kind], data, at)[0]
        return values

    def write(self, values: Mapping[str, int | bytes]) -> bytearray:
        """The structure with these fields, zeros elsewhere. Raises: FormatError where a value does not fit."""
        data = bytearray(self.size)
        for name, value in values.items():
            offset, kind = self.fields[name]
            if isinstance(kind, int):
                if not isinstance(value, bytes) or len(value) != kind:
                    raise FormatError(f"{name} of {self.what} is not {kind} bytes")
                data[offset : offset + kind] = value
            else:
                try:
                    struct.pack_into(self.order + _INTEGERS[kind], data, offset, value)
                except struct.error:
                    raise FormatError(f"{name} of {self.what} does not fit its field") from None
        return data
