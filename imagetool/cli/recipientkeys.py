"""What `-r` takes: a key file, the name of a key that a key service holds (`kbs:`, `cdh:`), or a wrapping service.

Encrypting to the name of a key asks nobody: the owner says where the key is, and the name goes into the keyring, so
that a consumer's `-k kbs:…` or `cdh:…` finds it.

| `kbs:///REPOSITORY/TYPE/TAG?…`, `cdh:REPOSITORY/TYPE/TAG?…` | |
|---|---|
| `key=FILE` | the key is here: what the resource holds, or its public half |
| `broker=DIR` | the key of the team's own broker in this directory; made where the broker has none of that name |
| `fetch=yes` | have it released to this machine, as `-k` would |
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import unquote_plus

from encfs.console.terminal import Terminal
from encfs.errors import FormatError, KeyFileError, UsageError

if TYPE_CHECKING:
    from encfs.keys.recipients import NamedKey, RecipientKey
    from encfs.keys.secrets import SymmetricKey
    from encfs.trust import KeyBinding

_SERVICE = "keyprovider:"
_RESOURCES = ("kbs:", "cdh:")
_WAYS = ("key", "broker", "fetch")
_HINT = (
    "add key=FILE (the key is here), broker=DIR (a broker of yours) or fetch=yes (have it released to this machine), "
    "such as kbs:///default/key/chat?key=chat.jwk"
)


@dataclass(frozen=True, slots=True)
class ForWhat:
    """The artifact that is encrypted to the keys. `artifact_id` None: one of its own, made at random."""

    artifact_id: str | None
    version: int


@contextmanager
def recipient_keys(
    terminal: Terminal, words: Sequence[str], passphrase_file: str | None, artifacts: Sequence[ForWhat]
) -> Iterator[list[RecipientKey]]:
    """The keys to encrypt to; secrets among them are wiped at the end.

    What comes with a key of a key service may say which artifacts it is for: others of `artifacts` would be refused
    when they are opened.

    Raises: UsageError, KeyFileError, NotFoundError; ConflictError, RollbackError for an artifact that a key is not for;
    what a broker or key service that was named raises.
    """
    from encfs.hardening import protect_keys
    from encfs.keyprovider.client import parse_service
    from encfs.keys.files import load_recipient_key
    from encfs.keys.providers.passphrase import read_passphrase
    from encfs.keys.recipients import WrappingService, mixes_post_quantum
    from encfs.keys.secrets import SymmetricKey
    from encfs.trust import KeyBinding

    # The artifact's own keys are made for the recipients, whatever those are.
    protect_keys()
    with ExitStack() as stack:
        keys: list[RecipientKey] = []
        for word in words:
            if word.startswith(_SERVICE):
                service = parse_service(word.removeprefix(_SERVICE))
                keys.append(WrappingService(service.name, service.wrap))
                continue
            key: RecipientKey
            binding = KeyBinding()
            if word.startswith(_RESOURCES):
                key, binding = _resource_key(terminal, word, artifacts)
            else:
                key = load_recipient_key(word)
            if isinstance(key, SymmetricKey):
                stack.callback(key.wipe)
            _require_accepted(binding, artifacts, word)
            if binding.pins:
                terminal.warn(f"{word.partition('?')[0]} is for certain content: let it be for the new one as well")
            keys.append(key)
        if passphrase_file is not None:
            standard_input = passphrase_file == "-"  # noqa: S105 -- the name of a file
            passphrase = read_passphrase("fd=0" if standard_input else f"file={passphrase_file}")
            stack.callback(passphrase.wipe)
            keys.append(passphrase)
        if mixes_post_quantum(keys):
            terminal.warn(
                "a post-quantum recipient stands beside one that is not: whoever breaks the weaker one reads everything"
            )
        yield keys


def _require_accepted(binding: KeyBinding, artifacts: Sequence[ForWhat], word: str) -> None:
    from encfs.trust import require_accepted

    for one in artifacts:
        require_accepted(binding, artifact_id=one.artifact_id, version=one.version, key_name=word.partition("?")[0])


@dataclass(frozen=True, slots=True)
class ResourceRecipient:
    """A key that a key service holds, and where the one who encrypts takes it from. `uri` is as `-k` takes it."""

    path: str
    uri: str
    way: str
    value: str

    @property
    def kid(self) -> str:
        """What the keyring calls it."""
        return f"kbs:///{self.path}"


def parse_resource_recipient(text: str) -> ResourceRecipient:
    """`text` begins with `kbs:` or `cdh:`. Raises: UsageError, KeyFileError."""
    front, _, query = text.partition("?")
    own: dict[str, str] = {}
    others: list[str] = []
    for pair in query.split("&") if query else ():
        name, _, value = pair.partition("=")
        if name not in _WAYS:
            others.append(pair)
        elif name in own or not value:
            raise UsageError(f"{front} has the option {name} twice, or without a value", hint=_HINT)
        else:
            own[name] = unquote_plus(value)
    if len(own) != 1:
        problem = "does not say where the key is" if not own else "says more than once where the key is"
        raise UsageError(f"the recipient {front} {problem}", hint=_HINT)
    way, value = own.popitem()
    if way == "fetch" and value != "yes":
        raise UsageError(f"the recipient {front} has an option fetch other than fetch=yes", hint=_HINT)
    uri = f"{front}?{'&'.join(others)}" if others else front
    return ResourceRecipient(_path(front, uri), uri, way, value)


def _path(front: str, uri: str) -> str:
    """The resource's path; whatever else stands in the URI must make sense, too. Raises: KeyFileError."""
    from encfs.kbs.protocol import parse_path
    from encfs.keys.jwkjson import MAX_KID_SIZE
    from encfs.keys.providers import provider_from_uri
    from encfs.keys.providers.kbs import split_front

    scheme, _, rest = front.partition(":")
    try:
        head, path = split_front(rest) if scheme == "kbs" else ("", parse_path(rest))
    except FormatError as error:
        raise KeyFileError(error.message, hint="write cdh:REPOSITORY/TYPE/TAG") from None
    if head or uri != front:
        provider_from_uri(uri)
    if len(path.uri) > MAX_KID_SIZE:
        raise KeyFileError(f"{path.uri} is longer than the {MAX_KID_SIZE} characters of a key id")
    return str(path)


def _resource_key(
    terminal: Terminal, text: str, artifacts: Sequence[ForWhat]
) -> tuple[SymmetricKey | NamedKey, KeyBinding]:
    """The key, and what whoever opens with it refuses."""
    wanted = parse_resource_recipient(text)
    if wanted.way == "key":
        return _given_key(wanted)
    if wanted.way == "broker":
        return _broker_key(terminal, wanted, artifacts)
    from encfs.keys.providers import fetched_bound_key

    return fetched_bound_key(wanted.uri)


def _given_key(wanted: ResourceRecipient) -> tuple[SymmetricKey | NamedKey, KeyBinding]:
    """The key of a file that holds what the resource does, or the public half of that."""
    from encfs.kbs.resource import recipient_key
    from encfs.keys.files import read_key_file
    from encfs.keys.jwk import PublicKey, Use
    from encfs.keys.recipients import NamedKey
    from encfs.keys.secrets import SymmetricKey, wipe

    content, access = read_key_file(wanted.value)
    try:
        key, binding = recipient_key(content, wanted.value)
    finally:
        wipe(content)
    if isinstance(key, PublicKey):
        key.require(Use.ENCRYPT, wanted.value)
        return NamedKey(key, wanted.kid), binding
    access.check()
    return SymmetricKey(key.secret, wanted.kid), binding


def _broker_key(
    terminal: Terminal, wanted: ResourceRecipient, artifacts: Sequence[ForWhat]
) -> tuple[SymmetricKey | NamedKey, KeyBinding]:
    """The key that the broker holds under that name, made there where it holds none."""
    from imagetool.cli.broker.parts import add_key, opened

    with opened(wanted.value) as broker:
        from encfs.keys.secrets import KEK_SIZE, SymmetricKey
        from imagetool.broker import state
        from imagetool.broker.publishing import held_binding, held_recipient

        held = held_recipient(broker, wanted.path)
        if held is not None:
            return held
        binding = held_binding(broker, wanted.path)
        # Before it is made.
        _require_accepted(binding, artifacts, wanted.kid)
        made = SymmetricKey(bytearray(secrets.token_bytes(KEK_SIZE)), wanted.kid)
        add_key(terminal, broker, wanted.path, state.KEY, made.secret)
    terminal.note(f"{wanted.kid} was made in the broker {wanted.value}")
    return made, binding
