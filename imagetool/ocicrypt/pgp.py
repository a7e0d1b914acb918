"""OpenPGP messages (RFC 4880) through the gpg program, with the keys that its user has there.

ocicrypt takes its keys from gpg, too. Keys on cards, agents and passphrase prompts work as gpg is set up; GNUPGHOME is
honoured. gpg checks that a message was not altered (MDC), and says so by its exit code.
"""

from __future__ import annotations

from encfs.childprocess import run_bounded
from encfs.errors import FormatError, KeyFileError, KeyProviderError, WrongKeyError
from encfs.keys.secrets import wipe
from encfs.strictjson import show_name
from imagetool.ocicrypt.options import MAX_ELEMENT_SIZE, MAX_OPTIONS_SIZE

#: Seconds: somebody may have to type a passphrase.
TIMEOUT = 120.0
_GPG = ("gpg", "--batch", "--quiet", "--no-tty", "--no-auto-key-locate", "--no-auto-key-retrieve")
# What the Go library reads: no compression, no newer kinds of packets, no keys that gpg asks about.
_ENCRYPT = ("--openpgp", "--compress-algo", "none", "--cipher-algo", "AES256", "--trust-model", "always", "--no-armor")
_WHAT = "gpg"
_SESSION_KEY = 1


def encrypt(content: bytes | bytearray, recipient: str) -> bytes:
    """A message for a key of gpg's public keyring, named as gpg names keys: an address, a fingerprint.

    Raises: KeyFileError where there is no such key, or it cannot encrypt; KeyProviderError.
    """
    words = (*_GPG, *_ENCRYPT, "--output", "-", "--recipient", recipient, "--encrypt")
    finished = run_bounded(words, content, limit=MAX_ELEMENT_SIZE, timeout=TIMEOUT, what=_WHAT)
    if finished.status != 0 or not finished.output:
        raise KeyFileError(
            f"gpg cannot encrypt to {show_name(recipient)}: {finished.complaint()}",
            hint="is its public key in the keyring? gpg --import FILE",
        )
    return bytes(finished.output)


def decrypt(message: bytes) -> bytearray:
    """The content, to be wiped by the caller. Raises: WrongKeyError where gpg does not decrypt; KeyProviderError."""
    words = (*_GPG, "--max-output", str(MAX_OPTIONS_SIZE), "--output", "-", "--decrypt")
    finished = run_bounded(words, message, limit=MAX_OPTIONS_SIZE, timeout=TIMEOUT, what=_WHAT)
    if finished.status != 0:
        wipe(finished.output)
        raise WrongKeyError(f"gpg does not decrypt it: {finished.complaint()}")
    if not finished.output:
        raise KeyProviderError("gpg gave nothing")
    return finished.output


def describe(message: bytes) -> list[str]:
    """The key ids that a message says it is for. Raises: FormatError."""
    ids = []
    position = 0
    while position < len(message):
        tag, start, size = _header(message, position)
        if tag != _SESSION_KEY:
            break
        # Section 5.1: version, key id, algorithm.
        if size < 10 or start + size > len(message) or message[start] != 3:
            raise FormatError("the OpenPGP message has a malformed session key packet")
        ids.append(message[start + 1 : start + 9].hex().upper())
        position = start + size
    if not ids:
        raise FormatError("the OpenPGP message is for no key")
    return [f"keys {', '.join(ids)}"]


def _header(message: bytes, position: int) -> tuple[int, int, int]:
    """Type of the packet at `position`, where its body begins, and its length (section 4.2). Raises: FormatError."""
    try:
        first, second = message[position], message[position + 1]
        if first & 0xC0 == 0xC0 and second < 192:
            return first & 0x3F, position + 2, second
        if first & 0xC0 == 0xC0 and second < 224:
            return first & 0x3F, position + 3, (second - 192 << 8) + message[position + 2] + 192
        if first & 0xC0 == 0x80 and first & 3 < 2:
            width = 1 << (first & 3)
            start = position + 1 + width
            return first >> 2 & 0xF, start, int.from_bytes(message[position + 1 : start])
        if first & 0xC0 in (0xC0, 0x80):
            return (first & 0x3F if first & 0x40 else first >> 2 & 0xF), position, len(message) - position
    except IndexError:
        pass
    raise FormatError("the OpenPGP message is malformed")
