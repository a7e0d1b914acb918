"""The keyring: a JWE (RFC 7516, JSON serialisation) whose payload is an artifact's secret part.

    {"protected":  b64u({"enc":"A256GCM"}),
     "aad":        b64u("sha256:<hex>"),          the content digest
     "recipients": [{"header": {"alg", "kid"?, …}, "encrypted_key"}, …],
     "iv", "ciphertext", "tag"}                   AES-256-GCM, aad = protected "." aad

The general serialisation is written; the flattened one (`header` and `encrypted_key` at the top) is read too. Adding a
recipient wraps the same content-encryption key (CEK) once more, removing one drops its entry: everything else stays as
it is. Whether the payload is the one the descriptor commits to is the caller's to check: a recipient knows the CEK and
can make another keyring with it.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import rfc8785
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from encfs.encoding import b64url_decode, b64url_encode, parse_digest
from encfs.errors import (
    ConflictError,
    EncfsError,
    FormatError,
    IntegrityError,
    MissingKeyError,
    NotFoundError,
    UsageError,
    WrongKeyError,
)
from encfs.keys import recipients as _recipients
from encfs.keys.jwk import PublicKey
from encfs.keys.providers import KeyProvider
from encfs.keys.recipients import CEK_SIZE, PBES2, NamedKey, Recipient, RecipientKey, WrappingService
from encfs.keys.secrets import Passphrase, SymmetricKey, wipe
from encfs.strictjson import loads_object, show_name

#: Largest keyring (bytes), most recipients, and how many of them may be passphrases: each takes a reader up to half a
#: second to try.
MAX_KEYRING_SIZE = 1 << 20
MAX_RECIPIENTS = 64
MAX_PASSPHRASES = 4

_IV_SIZE, _TAG_SIZE = 12, 16
_PROTECTED = b64url_encode(b'{"enc":"A256GCM"}')
# Parsed JSON with string keys; typed loosely because rfc8785 wants its own type of JSON values.
_Entry = Mapping[str, Any]
_MEMBERS = frozenset({"protected", "aad", "iv", "ciphertext", "tag"})


@dataclass(frozen=True, slots=True)
class Keyring:
    """A parsed keyring that belongs to the content digest it was parsed for. Nothing in it is secret."""

    content_digest: str
    recipients: tuple[Recipient, ...]
    _entries: tuple[_Entry, ...] = field(repr=False)
    _protected: str = field(repr=False)
    _iv: bytes = field(repr=False)
    _ciphertext: bytes = field(repr=False)
    _tag: bytes = field(repr=False)

    def open(self, providers: Sequence[KeyProvider], accept: Callable[[KeyProvider], None] | None = None) -> bytearray:
        """The payload, which the caller checks against the descriptor's commitment and wipes after use.

        The providers are asked in order; the first that unwraps the CEK decides. `accept` is shown that one before
        anything is decrypted, and raises where what came with its key refuses the artifact.

        Raises: MissingKeyError without providers; WrongKeyError where none fits, naming each and what it was tried on;
        another error of a provider where one failed and none fits; IntegrityError where the payload was altered.
        """
        cek = self._unwrap(providers, accept)
        try:
            return self._decrypt(cek)
        finally:
            wipe(cek)

    def add_recipients(
        self,
        providers: Sequence[KeyProvider],
        keys: Sequence[RecipientKey],
        accept: Callable[[KeyProvider], None] | None = None,
    ) -> bytes:
        """A new keyring with `keys` as further recipients; the payload stays sealed as it is.

        Raises: ConflictError where one is a recipient already; MissingKeyError and UsageError for none or too many;
        KeyFileError for a key that cannot encrypt; as `open`.
        """
        cek = self._unwrap(providers, accept)
        try:
            # A CEK that does not open the payload would make a keyring that nobody can open by the new recipients.
            wipe(self._decrypt(cek))
            added = _wrap_all(cek, keys, self.content_digest, self.recipients)
        finally:
            wipe(cek)
        return self._serialize([*self._entries, *added])

    def remove_recipient(self, selector: int | str | PublicKey) -> bytes:
        """A new keyring without one recipient, named by its index, its key id or its public key.

        Whoever was removed may have kept the key: only a new version under fresh keys revokes access.

        Raises: NotFoundError; ConflictError where a key id names several; UsageError for the last one.
        """
        index = self._find(selector)
        if len(self._entries) == 1:
            raise UsageError("the last recipient cannot be removed", hint="add another one first")
        return self._serialize([entry for at, entry in enumerate(self._entries) if at != index])

    @property
    def mixes_post_quantum(self) -> bool:
        """Whether a post-quantum recipient stands beside one that is not: worth a warning."""
        return _recipients.mixes_post_quantum(self.recipients)

    def _unwrap(self, providers: Sequence[KeyProvider], accept: Callable[[KeyProvider], None] | None) -> bytearray:
        if not providers:
            raise MissingKeyError("no key was given to open the artifact", hint="pass one with -k KEYURI")
        failures: list[EncfsError] = []
        for provider in providers:
            try:
                cek = provider.unwrap(self.recipients, self.content_digest)
            except EncfsError as error:
                failures.append(error)
                continue
            if len(cek) == CEK_SIZE:
                try:
                    if accept is not None:
                        accept(provider)
                except BaseException:
                    wipe(cek)
                    raise
                return cek
            wipe(cek)
            failures.append(WrongKeyError(f"{provider.uri} gave a key of {len(cek)} bytes"))
        raise self._no_key(failures)

    def _no_key(self, failures: Sequence[EncfsError]) -> EncfsError:
        # A provider that failed outranks those that merely do not fit: it may have been the right one.
        first = next((failure for failure in failures if not isinstance(failure, WrongKeyError)), failures[0])
        if len(failures) == 1 and not isinstance(first, WrongKeyError):
            return first
        reasons = "; ".join(failure.message for failure in failures)
        kinds = Counter(recipient.kind for recipient in self.recipients)
        present = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        hint = first.hint or "use the key of one of the recipients, or have yours added: imagetool recipients add"
        return type(first)(f"no key opens the keyring (recipients: {present}): {reasons}", hint=hint)

    def _decrypt(self, cek: bytearray) -> bytearray:
        payload = bytearray(len(self._ciphertext))
        associated = f"{self._protected}.{b64url_encode(self.content_digest.encode())}".encode()
        try:
            AESGCM(cek).decrypt_into(self._iv, self._ciphertext + self._tag, associated, payload)
        except InvalidTag:
            wipe(payload)  # it holds what was not authenticated
        else:
            return payload
        raise IntegrityError("the keyring's payload is not what was sealed under its key")

    def _find(self, selector: int | str | PublicKey) -> int:
        if isinstance(selector, int):
            if 0 <= selector < len(self._entries):
                return selector
            raise NotFoundError(f"the keyring has no recipient {selector}; it has 0 to {len(self._entries) - 1}")
        kid = selector.kid if isinstance(selector, PublicKey) else selector
        found = [recipient.index for recipient in self.recipients if recipient.kid == kid]
        if not found:
            raise NotFoundError(f"the keyring has no recipient with the key id {show_name(kid)}")
        if len(found) > 1:
            raise ConflictError(
                f"recipients {', '.join(map(str, found))} share that key id", hint="name one by its index"
            )
        return found[0]

    def _serialize(self, entries: Sequence[_Entry]) -> bytes:
        return _serialize(entries, self.content_digest, self._protected, self._iv, self._ciphertext, self._tag)


def create_keyring(payload: bytes | bytearray, content_digest: str, keys: Sequence[RecipientKey]) -> bytes:
    """A keyring for `payload`, bound to `content_digest` (`sha256:<hex>`), under a fresh CEK.

    Raises: MissingKeyError without keys; ConflictError where one is given twice; UsageError for more than 64
    recipients, more than 4 passphrases, or a keyring above 1 MiB; KeyFileError for a key that cannot encrypt;
    FormatError for a malformed digest.
    """
    parse_digest(content_digest, "content digest")
    cek = bytearray(secrets.token_bytes(CEK_SIZE))
    try:
        entries = _wrap_all(cek, keys, content_digest)
        iv = secrets.token_bytes(_IV_SIZE)
        associated = f"{_PROTECTED}.{b64url_encode(content_digest.encode())}".encode()
        sealed = AESGCM(cek).encrypt(iv, payload, associated)
    finally:
        wipe(cek)
    return _serialize(entries, content_digest, _PROTECTED, iv, sealed[:-_TAG_SIZE], sealed[-_TAG_SIZE:])


def parse_keyring(content: bytes, content_digest: str) -> Keyring:
    """Read an untrusted keyring that must belong to `content_digest`, the digest the reader computed of the descriptor.

    Raises: IntegrityError where it belongs to another artifact; FormatError for everything else that is not as this
    module describes: duplicate, missing or unknown members, `unprotected`, `zip`, `crit`, `jku`, `x5u`, more than 64
    recipients, 4 passphrases or 1 MiB, encodings that are not canonical, sizes that do not fit the algorithm.
    """
    parse_digest(content_digest, "content digest")
    members = loads_object(content, limit=MAX_KEYRING_SIZE, what="keyring")
    entries = _entries(members)
    _check_protected(members["protected"])
    bound = b64url_decode(members["aad"], "keyring aad")
    try:
        text = bound.decode("ascii")
    except UnicodeDecodeError:
        text = ""
    parse_digest(text, "keyring aad")
    if text != content_digest:
        raise IntegrityError(f"the keyring belongs to the artifact {text}, not to {content_digest}")
    iv, tag = b64url_decode(members["iv"], "keyring iv"), b64url_decode(members["tag"], "keyring tag")
    if len(iv) != _IV_SIZE or len(tag) != _TAG_SIZE:
        raise FormatError(f"keyring iv and tag are {len(iv)} and {len(tag)} bytes, not {_IV_SIZE} and {_TAG_SIZE}")
    ciphertext = b64url_decode(members["ciphertext"], "keyring ciphertext")
    parsed = tuple(
        _recipients.parse_recipient(index, entry["header"], entry["encrypted_key"])
        for index, entry in enumerate(entries)
    )
    if sum(recipient.alg == PBES2 for recipient in parsed) > MAX_PASSPHRASES:
        raise FormatError(f"keyring has more than {MAX_PASSPHRASES} passphrase recipients")
    return Keyring(content_digest, parsed, entries, str(members["protected"]), iv, ciphertext, tag)


def _entries(members: _Entry) -> tuple[_Entry, ...]:
    """The recipients of either serialisation, every set of members checked."""
    if "recipients" not in members:
        _exactly(members, _MEMBERS | {"header", "encrypted_key"}, "keyring")
        return ({"header": members["header"], "encrypted_key": members["encrypted_key"]},)
    _exactly(members, _MEMBERS | {"recipients"}, "keyring")
    entries = members["recipients"]
    if not isinstance(entries, list) or not 0 < len(entries) <= MAX_RECIPIENTS:
        raise FormatError(f"keyring recipients are not a list of 1 to {MAX_RECIPIENTS}")
    for index, entry in enumerate(entries):
        _exactly(entry, {"header", "encrypted_key"}, f"keyring recipient {index}")
    return tuple(entries)


def _exactly(members: object, names: frozenset[str] | set[str], what: str) -> None:
    if not isinstance(members, Mapping):
        raise FormatError(f"{what} is not a JSON object")
    if unknown := set(members) - names:
        raise FormatError(f"{what} has the unknown member {show_name(min(unknown))}")
    if missing := names - set(members):
        raise FormatError(f"{what} lacks the member {min(missing)}")


def _check_protected(text: object) -> None:
    header = loads_object(
        b64url_decode(text, "keyring protected"), limit=MAX_KEYRING_SIZE, what="keyring protected header"
    )
    _exactly(header, {"enc"}, "keyring protected header")
    if header["enc"] != "A256GCM":
        raise FormatError(f"keyring enc is {show_name(header['enc'])}, not A256GCM")


def _wrap_all(
    cek: bytearray, keys: Sequence[RecipientKey], content_digest: str, present: Sequence[Recipient] = ()
) -> list[dict[str, object]]:
    """Entries for `keys`, beside those `present`; every bound is checked before a passphrase is stretched."""
    if not keys:
        raise MissingKeyError("no recipient was given", hint="pass one with -r KEY")
    kids = {recipient.kid for recipient in present} - {None}
    for key in keys:
        kid = _kid(key)
        if kid in kids:
            raise ConflictError(f"the key {kid} is a recipient already, or was given twice")
        kids |= {kid} - {None}
    if len(present) + len(keys) > MAX_RECIPIENTS:
        raise UsageError(f"a keyring has at most {MAX_RECIPIENTS} recipients")
    passphrases = sum(isinstance(key, Passphrase) for key in keys)
    if passphrases + sum(recipient.alg == PBES2 for recipient in present) > MAX_PASSPHRASES:
        raise UsageError(f"a keyring has at most {MAX_PASSPHRASES} passphrase recipients")
    return [_recipients.wrap(cek, key, content_digest) for key in keys]


def _kid(key: RecipientKey) -> str | None:
    match key:
        case PublicKey() | NamedKey() | SymmetricKey():
            return key.kid
        case Passphrase() | WrappingService():
            return None


def _serialize(
    entries: Sequence[_Entry],
    content_digest: str,
    protected: str,
    iv: bytes,
    ciphertext: bytes,
    tag: bytes,
) -> bytes:
    content = rfc8785.dumps(
        {
            "protected": protected,
            "aad": b64url_encode(content_digest.encode()),
            "recipients": list(entries),
            "iv": b64url_encode(iv),
            "ciphertext": b64url_encode(ciphertext),
            "tag": b64url_encode(tag),
        }
    )
    if len(content) > MAX_KEYRING_SIZE:
        raise UsageError(f"the keyring would be {len(content)} bytes; {MAX_KEYRING_SIZE} are allowed")
    return content
