"""Parse untrusted JSON strictly: one reading of the bytes, or a FormatError.

RFC 8259 leaves duplicate names, huge numbers and lone surrogates to the implementation, so two parsers can see two
documents in the same signed bytes. Here such documents are refused (the I-JSON profile of RFC 7493, narrowed further:
no floating-point numbers, bounded nesting). Writing JSON is not done here: canonical output is `rfc8785`'s.
"""

from __future__ import annotations

import json
from typing import NoReturn

from encfs.errors import FormatError

#: Largest magnitude of an integer: the range in which every JSON implementation is exact (RFC 7493, section 2.2).
MAX_INTEGER = 2**53 - 1
#: Deepest nesting of arrays and objects; a top-level object has depth 1.
MAX_DEPTH = 16

#: Most members, elements and containers together: parsed, each takes up to 30 times the memory of its text.
MAX_VALUES = 1 << 18

_BOM = b"\xef\xbb\xbf"
_DIGITS = bytes.maketrans(b"123456789", b"0" * 9)
_SHOWN_NAME = 48


class _RefusedError(ValueError):
    """Raised inside the json module's hooks; never leaves this module."""


def loads(content: bytes | bytearray, *, limit: int, what: str) -> object:
    """The value of a JSON document of at most `limit` bytes; `what` names it in messages ("keyring").

    Objects come back as `dict[str, object]`, arrays as `list[object]`, numbers as `int`. No part of the content but
    member names gets into the error or its context, since the document may be a secret key.

    Raises: FormatError for anything larger than `limit`, that is not UTF-8 JSON, begins with a byte order mark, repeats
    a member of an object, holds a lone surrogate, a NUL, a fraction, an exponent, NaN, Infinity, an integer beyond
    ±(2^53-1), or nests deeper than 16, or holds more than 262144 values.
    """
    if len(content) > limit:
        raise FormatError(f"{what} is {len(content)} bytes, more than the {limit} allowed")
    # The exception is made here and raised below, outside of the handlers: json's errors carry the whole document.
    problem: str
    # Counted with those inside of strings, which is never too few.
    if sum(content.count(byte) for byte in b",[{") > MAX_VALUES:
        raise FormatError(f"{what} holds more than {MAX_VALUES} values")
    if content.startswith(_BOM):
        raise FormatError(f"{what} begins with a byte order mark")
    try:
        value: object = json.loads(
            content.decode("utf-8", "strict"),
            object_pairs_hook=_object,
            # Evidence is lists of thousands of numbers: a call for each only where one could be out of range.
            parse_int=_integer if _may_hold_a_bad_integer(content) else None,
            parse_float=_refuse_float,
            parse_constant=_refuse_constant,
        )
        _check(value)
    except _RefusedError as error:
        problem = str(error)
    except json.JSONDecodeError as error:
        problem = f"is not JSON (line {error.lineno}, column {error.colno}: {error.msg})"
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 (byte {error.start})"
    except RecursionError:
        problem = f"nests deeper than {MAX_DEPTH} levels"
    else:
        return value
    raise FormatError(f"{what} {problem}")


def loads_object(content: bytes | bytearray, *, limit: int, what: str) -> dict[str, object]:
    """Like `loads`, for a document that must be a JSON object. Raises: FormatError."""
    value = loads(content, limit=limit, what=what)
    if not isinstance(value, dict):
        raise FormatError(f"{what} is not a JSON object")
    return value


def show_name(name: object) -> str:
    """An untrusted string for use in a one-line message: quoted, ASCII only, cut short."""
    text = ascii(name)
    return text if len(text) <= _SHOWN_NAME else text[:_SHOWN_NAME] + "..."


def _may_hold_a_bad_integer(content: bytes | bytearray) -> bool:
    """Whether 16 digits in a row or a minus before a zero are anywhere in it, also where they are no number."""
    return b"-0" in content or b"0" * 16 in content.translate(_DIGITS)


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _RefusedError(f"repeats the member {show_name(name)}")
            seen.add(name)
    return members


def _integer(text: str) -> int:
    # The length is looked at first: converting a million digits is quadratic.
    if len(text) > 17 or text == "-0" or abs(number := int(text)) > MAX_INTEGER:
        raise _RefusedError("holds an integer out of range")
    return number


def _refuse_float(text: str) -> NoReturn:
    raise _RefusedError("holds a number that is no integer")


def _refuse_constant(text: str) -> NoReturn:
    raise _RefusedError(f"holds {text}")


def _check(value: object) -> None:
    """Depth and characters, without recursion."""
    pending: list[tuple[object, int]] = [(value, 1)]
    while pending:
        item, depth = pending.pop()
        if isinstance(item, str):
            _check_text(item)
        elif isinstance(item, dict | list):
            if depth > MAX_DEPTH:
                raise _RefusedError(f"nests deeper than {MAX_DEPTH} levels")
            if isinstance(item, dict):
                for name in item:
                    _check_text(name)
                pending.extend((member, depth + 1) for member in item.values() if type(member) is not int)
            else:
                # Numbers were checked when they were parsed.
                if set(map(type, item)) != {int}:
                    pending.extend((member, depth + 1) for member in item if type(member) is not int)


def _check_text(text: str) -> None:
    if text.isascii():
        if "\0" in text:
            raise _RefusedError("holds a NUL character")
        return
    if any("\ud800" <= character <= "\udfff" or character == "\0" for character in text):
        raise _RefusedError("holds a lone surrogate or a NUL character")
