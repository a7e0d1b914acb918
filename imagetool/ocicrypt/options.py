"""What ocicrypt says about an encrypted layer: public options, private options, and the lists of wrapped ones.

    org.opencontainers.image.enc.pubopts          base64(JSON {"cipher", "hmac", "cipheroptions": {}})
    org.opencontainers.image.enc.keys.SCHEME      base64(wrapped private options) ["," base64(…)] …

Private options, which every scheme wraps as they are: JSON {"symkey", "digest", "cipheroptions": {"nonce"}}. Strict:
the public options are not authenticated, and other readers let a nonce in them win over the private one; here nothing
but the MAC is taken from them. `digest` is whatever the writer put there, and nothing follows from it.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from encfs.encoding import b64_decode, b64_encode
from encfs.errors import FormatError, UnsupportedError
from encfs.keys.secrets import wipe
from encfs.strictjson import loads_object, show_name

CIPHER = "AES_256_CTR_HMAC_SHA256"
KEY_SIZE, NONCE_SIZE, MAC_SIZE = 32, 16, 32

#: Largest public and private options (bytes of JSON): both are less than 300.
MAX_OPTIONS_SIZE = 8 << 10
#: Most wrapped private options of a layer, over all schemes, and the bytes of one of them.
MAX_ELEMENTS = 64
MAX_ELEMENT_SIZE = 256 << 10

ANNOTATIONS = "org.opencontainers.image.enc."
_PUBLIC = f"{ANNOTATIONS}pubopts"
_KEYS = f"{ANNOTATIONS}keys."
_PRIVATE_MEMBERS = frozenset({"symkey", "digest", "cipheroptions"})
_PUBLIC_MEMBERS = frozenset({"cipher", "hmac", "cipheroptions"})


@dataclass(frozen=True, slots=True, eq=False)
class LayerKey:
    """The key of one layer, for its cipher and its MAC, and the first counter block. Wiped by `wipe`."""

    secret: bytearray = field(repr=False)
    nonce: bytes

    def wipe(self) -> None:
        wipe(self.secret)


@dataclass(frozen=True, slots=True)
class Element:
    """One wrapped copy of the private options: under which scheme ("jwe", "provider.NAME" …), and its bytes."""

    scheme: str
    content: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Encryption:
    """The annotations of an encrypted layer: the MAC over its ciphertext (32 bytes), and who can open it."""

    mac: bytes = field(repr=False)
    elements: tuple[Element, ...]

    def annotations(self) -> dict[str, str]:
        """As they are written. Elements of one scheme share an annotation."""
        public = {"cipher": CIPHER, "hmac": b64_encode(self.mac), "cipheroptions": {}}
        found = {_PUBLIC: b64_encode(_dumps(public))}
        for element in self.elements:
            name = f"{_KEYS}{element.scheme}"
            text = b64_encode(element.content)
            found[name] = f"{found[name]},{text}" if name in found else text
        return found


def fresh_key() -> LayerKey:
    """A new key for one layer: each must encrypt once only."""
    return LayerKey(bytearray(secrets.token_bytes(KEY_SIZE)), secrets.token_bytes(NONCE_SIZE))


def private_options(key: LayerKey, digest: str) -> bytearray:
    """What every scheme wraps; the caller wipes it. `digest` is that of the plain layer, which others put there."""
    document = {"symkey": b64_encode(key.secret), "digest": digest, "cipheroptions": {"nonce": b64_encode(key.nonce)}}
    return bytearray(_dumps(document))


def parse_private_options(content: bytes | bytearray) -> LayerKey:
    """Raises: FormatError, UnsupportedError for a cipher that takes other options."""
    what = "the layer's private options"
    document = loads_object(content, limit=MAX_OPTIONS_SIZE, what=what)
    if unknown := set(document) - _PRIVATE_MEMBERS:
        raise FormatError(f"{what} have the unknown member {show_name(min(unknown))}")
    options = document.get("cipheroptions")
    if not isinstance(options, dict) or set(options) != {"nonce"}:
        raise FormatError(f"{what} do not carry exactly a nonce")
    if not isinstance(document.get("digest", ""), str):
        raise FormatError(f"{what} have a digest that is no text")
    nonce = b64_decode(options["nonce"], f"the nonce in {what}")
    if len(nonce) != NONCE_SIZE:
        raise FormatError(f"{what} have a nonce of {len(nonce)} bytes, not {NONCE_SIZE}")
    secret = bytearray(b64_decode(document.get("symkey"), f"the key in {what}"))
    if len(secret) != KEY_SIZE:
        wipe(secret)
        raise FormatError(f"{what} have a key of {len(secret)} bytes, not {KEY_SIZE}")
    return LayerKey(secret, nonce)


def parse_encryption(annotations: Mapping[str, str], what: str) -> Encryption:
    """The untrusted annotations of an encrypted layer; `what` names the layer in messages.

    Raises: FormatError where they are malformed, too many or too large, or where the public options hold anything that
    would change how the layer is decrypted; UnsupportedError for another cipher.
    """
    known = {_PUBLIC, *(name for name in annotations if name.startswith(_KEYS))}
    if other := {name for name in annotations if name.startswith(ANNOTATIONS)} - known:
        raise FormatError(f"{what} has the unknown annotation {show_name(min(other))}")
    if _PUBLIC not in annotations:
        raise FormatError(f"{what} has no annotation {_PUBLIC}")
    elements: list[Element] = []
    for name in sorted(known - {_PUBLIC}):
        elements += _elements(name.removeprefix(_KEYS), annotations[name], what)
    if len(elements) > MAX_ELEMENTS:
        raise FormatError(f"{what} has {len(elements)} wrapped keys, more than the {MAX_ELEMENTS} allowed")
    return Encryption(_parse_public(annotations[_PUBLIC], what), tuple(elements))


def without_encryption(annotations: Mapping[str, str]) -> dict[str, str]:
    """The annotations that are not about encryption."""
    return {name: text for name, text in annotations.items() if not name.startswith(ANNOTATIONS)}


def _parse_public(text: str, what: str) -> bytes:
    what = f"the public options of {what}"
    if len(text) > 2 * MAX_OPTIONS_SIZE:
        raise FormatError(f"{what} are larger than {MAX_OPTIONS_SIZE} bytes")
    document = loads_object(b64_decode(text, what), limit=MAX_OPTIONS_SIZE, what=what)
    if unknown := set(document) - _PUBLIC_MEMBERS:
        raise FormatError(f"{what} have the unknown member {show_name(min(unknown))}")
    if document.get("cipher") != CIPHER:
        raise UnsupportedError(f"{what} name the cipher {show_name(document.get('cipher'))}; {CIPHER} is supported")
    # Go writes null for an empty map that was never made.
    if document.get("cipheroptions") not in ({}, None):
        raise FormatError(
            f"{what} hold cipher options, which nothing authenticates",
            hint="somebody may have put them there to change what decryption gives; ask who made the image",
        )
    mac = b64_decode(document.get("hmac"), f"the HMAC in {what}")
    if len(mac) != MAC_SIZE:
        raise FormatError(f"{what} have an HMAC of {len(mac)} bytes, not {MAC_SIZE}")
    return mac


def _elements(scheme: str, text: str, what: str) -> Sequence[Element]:
    what = f"the annotation {show_name(_KEYS + scheme)} of {what}"
    if not scheme or not scheme.isascii() or not scheme.isprintable():
        raise FormatError(f"{what} names no scheme")
    parts = text.split(",")
    if len(parts) > MAX_ELEMENTS or any(len(part) > 2 * MAX_ELEMENT_SIZE for part in parts):
        raise FormatError(f"{what} has more than {MAX_ELEMENTS} elements, or one above {MAX_ELEMENT_SIZE} bytes")
    return [Element(scheme, b64_decode(part, f"an element of {what}")) for part in parts]


def _dumps(document: Mapping[str, object]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
