"""The messages of ocicrypt's key provider protocol: JSON, the same over standard streams, gRPC and ttrpc.

    wrap    {"op":"keywrap","keywrapparams":{"ec":{"Parameters":{NAME:[b64]},"DecryptConfig":{"Parameters":{}}},
                                             "optsdata":b64},"keyunwrapparams":{"dc":null,"annotation":null}}
            -> {"keywrapresults":{"annotation":bytes}}
    unwrap  {"op":"keyunwrap","keywrapparams":{"ec":null,"optsdata":null},
             "keyunwrapparams":{"dc":{"Parameters":{NAME:[b64]}},"annotation":b64}}
            -> {"keyunwrapresults":{"optsdata":bytes}}

Bytes are base64 when Go writes them and arrays of numbers when Rust does; Rust reads nothing but arrays, Go both. So
answers are written as arrays, and both are read. ocicrypt-rs asks with `optsdata` as the text itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from encfs.encoding import b64_decode, b64_encode
from encfs.errors import FormatError
from encfs.strictjson import loads_object, show_name

#: Largest options or annotation (bytes), and largest message: an array of numbers takes up to four bytes for each.
MAX_DATA_SIZE = 48 << 10
MAX_MESSAGE_SIZE = 512 << 10
#: What ocicrypt gives as the parameter of a provider that was named without any.
DEFAULT_PARAMETERS = b"Enabled"
_MAX_PARAMETERS = 64


@dataclass(frozen=True, slots=True, eq=False)
class WrapRequest:
    """Wrap `options`; `parameters` by provider name. The options are secret, and the receiver's to wipe."""

    parameters: Mapping[str, Sequence[bytes]]
    options: bytearray = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class UnwrapRequest:
    """Unwrap what is in `annotation`; `parameters` by provider name."""

    parameters: Mapping[str, Sequence[bytes]]
    annotation: bytes = field(repr=False)


def wrap_request(name: str, parameters: bytes, options: bytes | bytearray) -> bytearray:
    """Asks a provider to wrap. It is told of its own parameters only. The caller wipes the message."""
    asked = {"Parameters": {name: [b64_encode(parameters)]}, "DecryptConfig": {"Parameters": {}}}
    return _dumps(
        {
            "op": "keywrap",
            "keywrapparams": {"ec": asked, "optsdata": b64_encode(options)},
            "keyunwrapparams": {"dc": None, "annotation": None},
        }
    )


def unwrap_request(name: str, parameters: bytes, annotation: bytes) -> bytearray:
    """Asks a provider to unwrap."""
    return _dumps(
        {
            "op": "keyunwrap",
            "keywrapparams": {"ec": None, "optsdata": None},
            "keyunwrapparams": {
                "dc": {"Parameters": {name: [b64_encode(parameters)]}},
                "annotation": b64_encode(annotation),
            },
        }
    )


def parse_wrap_answer(content: bytes | bytearray, what: str) -> bytes:
    """The annotation of an untrusted answer; `what` names the provider. Raises: FormatError."""
    return bytes(_answered(content, "keywrapresults", "annotation", what))


def parse_unwrap_answer(content: bytes | bytearray, what: str) -> bytearray:
    """The options of an untrusted answer, which the caller wipes. Raises: FormatError."""
    return _answered(content, "keyunwrapresults", "optsdata", what)


def parse_request(content: bytes | bytearray) -> WrapRequest | UnwrapRequest:
    """An untrusted request. Raises: FormatError."""
    document = loads_object(content, limit=MAX_MESSAGE_SIZE, what="the request")
    match document.get("op"):
        case "keywrap":
            asked = _object(document, "keywrapparams")
            return WrapRequest(_parameters(asked.get("ec")), _data(asked.get("optsdata"), "optsdata", text=True))
        case "keyunwrap":
            asked = _object(document, "keyunwrapparams")
            return UnwrapRequest(_parameters(asked.get("dc")), bytes(_data(asked.get("annotation"), "annotation")))
        case other:
            raise FormatError(f"the request asks for {show_name(other)}, not for keywrap or keyunwrap")


def wrap_answer(annotation: bytes) -> bytearray:
    return _dumps({"keywrapresults": {"annotation": list(annotation)}})


def unwrap_answer(options: bytes | bytearray) -> bytearray:
    """The caller wipes it."""
    return _dumps({"keyunwrapresults": {"optsdata": list(options)}})


def _answered(content: bytes | bytearray, results: str, member: str, what: str) -> bytearray:
    document = loads_object(content, limit=MAX_MESSAGE_SIZE, what=f"the answer of {what}")
    value = document.get(results)
    if not isinstance(value, dict) or value.get(member) is None:
        raise FormatError(f"the answer of {what} has no {results} with {member}")
    return _data(value[member], f"{member} in the answer of {what}")


def _object(document: Mapping[str, object], name: str) -> Mapping[str, object]:
    value = document.get(name)
    if not isinstance(value, dict):
        raise FormatError(f"the request has no {name}")
    return value


def _parameters(config: object) -> Mapping[str, Sequence[bytes]]:
    """Parameters by name. Others than the provider's own are in there, too: ocicrypt hands everything to everyone."""
    parameters = config.get("Parameters") if isinstance(config, dict) else None
    if parameters is None:
        return {}
    if not isinstance(parameters, dict) or len(parameters) > _MAX_PARAMETERS:
        raise FormatError("the request's Parameters are malformed or too many")
    found: dict[str, Sequence[bytes]] = {}
    for name, values in parameters.items():
        if not isinstance(values, list) or len(values) > _MAX_PARAMETERS:
            raise FormatError(f"the request's parameter {show_name(name)} is no short list")
        found[name] = [bytes(_data(value, f"the parameter {show_name(name)}")) for value in values]
    return found


def _data(value: object, what: str, *, text: bool = False) -> bytearray:
    """Bytes as either language writes them; `text`: a JSON text may stand for itself."""
    if isinstance(value, list):
        if not all(type(number) is int and 0 <= number < 256 for number in value):
            raise FormatError(f"{what} is an array of something else than bytes")
        data = bytearray(value)
    elif text and isinstance(value, str) and value.startswith("{"):
        data = bytearray(value.encode())
    else:
        data = bytearray(b64_decode(value, what))
    if len(data) > MAX_DATA_SIZE:
        raise FormatError(f"{what} is {len(data)} bytes, more than the {MAX_DATA_SIZE} allowed")
    return data


def _dumps(document: Mapping[str, object]) -> bytearray:
    return bytearray(json.dumps(document, separators=(",", ":")).encode())
