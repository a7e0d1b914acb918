"""Key URIs: `scheme:rest` names where the key comes from that opens an artifact; a plain path means `file:`.

A provider is an entry point of the group `encfs.key_providers`; other packages add theirs. Our own schemes are listed
here as well: looking through all installed packages takes a while, and nobody else gets to see what ours are given.
A provider's factory is a callable that takes the text behind `scheme:` and returns a `KeyProvider`; it does not touch
the key yet and raises KeyFileError where the text is malformed. Making a provider parses no key, shows no prompt and
asks no machine: that is done when it first unwraps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

from encfs.errors import KeyFileError, KeyProviderError
from encfs.keys.recipients import Recipient
from encfs.keys.secrets import SymmetricKey
from encfs.strictjson import show_name
from encfs.trust import KeyBinding

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINT_GROUP = "encfs.key_providers"
#: The factory of each scheme of ours, in the module of its name: what our own entry points say.
_OWN = {
    "cdh": "CdhProvider",
    "env": "EnvProvider",
    "file": "FileProvider",
    "gramine": "GramineProvider",
    "kbs": "KbsProvider",
    "keyprovider": "KeyServiceProvider",
    "passphrase": "PassphraseProvider",
    "sealed": "SealedProvider",
    "skr": "SkrProvider",
    "snp": "SnpProvider",
    "tpm2": "Tpm2Provider",
}

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):(.*)", re.ASCII | re.DOTALL)


class KeyProvider(Protocol):
    """Something that unwraps the content-encryption key (CEK) of a keyring. Not thread-safe.

    Most get hold of a key and call `recipients.unwrap_with_key`; others have the unwrapping done elsewhere.
    """

    @property
    def uri(self) -> str:
        """Its key URI, for messages: it names a secret and holds none."""

    def unwrap(self, recipients: Sequence[Recipient], content_digest: str) -> bytearray:
        """The CEK, 32 bytes, which the caller wipes. `content_digest` is the artifact's, computed by the reader.

        Raises: WrongKeyError, with the reason, where no recipient is for this provider's key; KeyFileError,
        KeyProviderError, NotFoundError or StorageError where the key could not be had at all.
        """

    def close(self) -> None:
        """Forget every secret; harmless when called again."""


@runtime_checkable
class BoundProvider(Protocol):
    """A provider whose key may come with refusals: they hold for every artifact that it opens."""

    @property
    def binding(self) -> KeyBinding:
        """What came with the key that unwrapped last."""


@runtime_checkable
class FetchingProvider(Protocol):
    """A provider that can hand out its key-encryption key, for whoever encrypts to it."""

    def fetch(self) -> SymmetricKey:
        """The key, a copy that the caller wipes. Raises: KeyFileError, KeyProviderError."""


#: May have an attribute `unavailable`, a callable without arguments: why it cannot work on this machine, or None. It
#: only looks; no secret is touched.
ProviderFactory = Callable[[str], KeyProvider]


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a scheme can be used on this machine; `reason` says why not."""

    scheme: str
    reason: str | None

    @property
    def usable(self) -> bool:
        return self.reason is None


def provider_from_uri(uri: str) -> KeyProvider:
    """The provider of a key URI, or of a plain path to a key file.

    Raises: KeyFileError for an unknown scheme or a malformed rest; KeyProviderError where a provider cannot be loaded.
    """
    match = _SCHEME.fullmatch(uri)
    scheme, rest = (match[1], match[2]) if match else ("file", uri)
    return _factory(scheme)(rest)


def fetched_key(uri: str, *, bare: bool = False) -> SymmetricKey:
    """The key-encryption key that a key service gives out under `uri`, for encrypting to it; the caller wipes it.

    `bare`: it is going to be used without what came with it, so refusals that came with it are not acceptable.

    Raises: as `provider_from_uri` and the provider's `fetch`; KeyFileError where the scheme hands no key out, or not a
    bare one.
    """
    key, binding = fetched_bound_key(uri)
    if bare and binding != KeyBinding():
        key.wipe()
        raise KeyFileError(
            f"{uri.partition('?')[0]} came with refusals (an id, a floor or pins), which would be lost without it",
            hint=f"open with -k {uri.partition('?')[0]} itself",
        )
    return key


def fetched_bound_key(uri: str) -> tuple[SymmetricKey, KeyBinding]:
    """As `fetched_key`, with the refusals that came with the key."""
    provider = provider_from_uri(uri)
    try:
        if not isinstance(provider, FetchingProvider):
            raise KeyFileError(f"{provider.uri} hands no symmetric key out", hint="give a key file")
        key = provider.fetch()
        return key, provider.binding if isinstance(provider, BoundProvider) else KeyBinding()
    finally:
        provider.close()


def known_schemes() -> tuple[str, ...]:
    """The schemes installed on this machine, sorted."""
    from importlib.metadata import entry_points

    return tuple(sorted({*_OWN, *entry_points(group=ENTRY_POINT_GROUP).names}))


def availabilities() -> list[Availability]:
    """Every installed scheme, sorted."""
    return [Availability(scheme, _unavailable(scheme)) for scheme in known_schemes()]


def _unavailable(scheme: str) -> str | None:
    try:
        look: Callable[[], str | None] | None = getattr(_factory(scheme), "unavailable", None)
    except KeyProviderError as error:
        return error.message
    return look() if look is not None else None


def _factory(scheme: str) -> ProviderFactory:
    try:
        if scheme in _OWN:
            module = import_module(f"{__name__}.{scheme}")
            return cast("ProviderFactory", getattr(module, _OWN[scheme]))
        return cast("ProviderFactory", _entry_point(scheme).load())
    except (ImportError, AttributeError) as error:
        raise KeyProviderError(f"the provider of the key scheme {scheme} cannot be loaded: {error}") from error


def _entry_point(scheme: str) -> EntryPoint:
    from importlib.metadata import entry_points

    found = tuple(entry_points(group=ENTRY_POINT_GROUP, name=scheme))
    if not found:
        raise KeyFileError(
            f"unknown key scheme {show_name(scheme)}; known are {', '.join(known_schemes())}",
            hint="a path with a colon in it is written file:PATH",
        )
    if len({entry.value for entry in found}) > 1:
        # Whichever came first would decide who sees the keys.
        raise KeyProviderError(f"several packages provide the key scheme {scheme}", hint="uninstall all but one")
    return found[0]
