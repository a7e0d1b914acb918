"""`skr:NAME?akv=VAULT&maa=INSTANCE`: a key of Azure Key Vault, released to this TEE by Azure's secure key release.

| option | |
|---|---|
| `akv=HOST` | the vault (or managed HSM), such as `acme.vault.azure.net` |
| `maa=HOST` | the instance of Microsoft Azure Attestation that the key's release policy names |
| `port=N` | where the sidecar listens on loopback, 8080 by default |
| `direct=yes` | without a sidecar, in a confidential container group or virtual machine of Azure's |
| `token-file=FILE` | with `direct`: an access token for the vault, instead of the machine's managed identity |
| `ca=FILE` | with `direct`: the authorities of both services' certificates, instead of the system's |

NAME may be followed by `/VERSION`. The key is 32 bytes (`oct`), or a private RSA or EC key that the artifact is for.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from encfs.attestation.collect.sources import THIS_MACHINE, Machine
from encfs.errors import FormatError, KeyFileError, KeyProviderError
from encfs.keys.jwk import PrivateKey
from encfs.keys.recipients import Recipient, unwrap_with_key
from encfs.keys.secrets import KEK_SIZE, SymmetricKey, wipe
from encfs.keys.uriquery import query_options
from encfs.skr import CONTEXT_VARIABLE, sidecar
from encfs.strictjson import loads_object, show_name
from encfs.webclient import Address, Deadline, parse_address

#: Seconds for everything.
TIMEOUT = 60.0
_LOOK_TIMEOUT = 1.0
_MAX_TOKEN = 16 << 10
_NAME = re.compile(r"[A-Za-z0-9-]{1,127}(/[0-9a-f]{32})?", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9.-]{1,253}(:[0-9]{1,5})?", re.ASCII)
_OPTIONS = frozenset({"akv", "maa", "port", "direct", "token-file", "ca"})
_HINT = "write skr:NAME?akv=VAULT.vault.azure.net&maa=INSTANCE.attest.azure.net"
# What makes up the key; what services say of its use (for their own operations) is left aside.
_KEY_MEMBERS = frozenset({"kty", "k", "crv", "x", "y", "d", "n", "e", "p", "q", "dp", "dq", "qi"})


@dataclass(frozen=True, slots=True)
class SkrRequest:
    """What a URI asks for."""

    name: str
    vault: Address
    attestation: Address
    port: int = sidecar.PORT
    direct: bool = False
    token_file: str | None = None
    ca_file: str | None = None


class SkrProvider:
    """Unwraps with the released key; keeps it until `close`."""

    def __init__(self, rest: str, *, machine: Machine = THIS_MACHINE) -> None:
        self._request = parse_request(rest)
        self._machine = machine
        self._key: PrivateKey | SymmetricKey | None = None

    @staticmethod
    def unavailable() -> str | None:
        from encfs.attestation.collect.azure import is_azure

        if os.environ.get(CONTEXT_VARIABLE) or is_azure():
            return None
        try:
            with socket.create_connection((sidecar.HOST, sidecar.PORT), _LOOK_TIMEOUT):
                return None
        except OSError as error:
            return f"no sidecar for secure key release at {sidecar.HOST}:{sidecar.PORT}: {error.strerror or error}"

    @property
    def uri(self) -> str:
        return f"skr:{self._request.name}"

    def unwrap(self, recipients: Sequence[Recipient], content_digest: str) -> bytearray:
        return unwrap_with_key(self._released(), recipients, content_digest, self.uri)

    def fetch(self) -> SymmetricKey:
        key = self._released()
        if not isinstance(key, SymmetricKey):
            raise KeyFileError(f"{self.uri} is a private key: encrypt to its public half instead")
        return SymmetricKey(bytearray(key.secret), self.uri)

    def close(self) -> None:
        if isinstance(self._key, SymmetricKey):
            self._key.wipe()
        self._key = None

    def _released(self) -> PrivateKey | SymmetricKey:
        if self._key is None:
            self._key = self._direct() if self._request.direct else self._from_sidecar()
        return self._key

    def _from_sidecar(self) -> PrivateKey | SymmetricKey:
        request = self._request
        content = sidecar.release(
            request.vault, request.attestation, request.name, port=request.port, deadline=Deadline(TIMEOUT)
        )
        try:
            return _jwk(content, self.uri)
        finally:
            wipe(content)

    def _direct(self) -> PrivateKey | SymmetricKey:
        from encfs.attestation.collect.azure import METADATA_SERVICE, is_azure
        from encfs.attestation.collect.sources import event_log, evidence_source
        from encfs.skr import direct, guest
        from encfs.skr.release import Release

        request, machine, deadline = self._request, self._machine, Deadline(TIMEOUT)
        service = machine.metadata_service or METADATA_SERVICE
        in_machine = not os.environ.get(CONTEXT_VARIABLE) and is_azure(machine.chassis)
        context = None if in_machine else direct.load_context()
        if request.token_file is not None:
            token = _token(request.token_file)
        else:
            token = direct.access_token(service, deadline=deadline)
        wanted = Release(request.vault, request.attestation, request.name, token, deadline, request.ca_file)
        if context is not None:
            kind, content = direct.release(wanted, source=evidence_source("snp", machine=machine), context=context)
        else:
            kind, content = guest.release(wanted, event_log=event_log(machine), metadata_service=service)
        try:
            return _plain_key(kind, content, self.uri)
        finally:
            wipe(content)


def parse_request(rest: str) -> SkrRequest:
    """What stands behind `skr:`. Raises: KeyFileError."""
    name, _, query = rest.partition("?")
    if not _NAME.fullmatch(name):
        raise KeyFileError(f"{show_name(name)} is not the name of a key in a vault", hint=_HINT)
    options = dict(query_options(query, "skr", _OPTIONS, hint=_HINT))
    direct = options.get("direct", "no")
    if direct not in ("yes", "no"):
        raise KeyFileError("direct of the skr: URI is neither yes nor no", hint=_HINT)
    if direct == "no" and options.keys() & {"token-file", "ca"}:
        raise KeyFileError("token-file and ca are for direct=yes: the sidecar has its own", hint=_HINT)
    port = options.get("port", str(sidecar.PORT))
    if not (port.isascii() and port.isdecimal() and len(port) < 6 and 0 < int(port) < 1 << 16):
        raise KeyFileError(f"{port[:16]!a} is no port", hint=_HINT)
    return SkrRequest(
        name,
        _address(options.get("akv"), "akv"),
        _address(options.get("maa"), "maa"),
        int(port),
        direct == "yes",
        options.get("token-file"),
        options.get("ca"),
    )


def _address(text: str | None, option: str) -> Address:
    if text is None:
        raise KeyFileError(f"the skr: URI has no {option}", hint=_HINT)
    host = text.removeprefix("https://").removesuffix("/")
    if not _HOST.fullmatch(host):
        raise KeyFileError(f"{option}={show_name(text)} is no host", hint=_HINT)
    return parse_address(f"https://{host}")


def _token(path: str) -> str:
    try:
        with open(path, "rb") as file:
            token = file.read(_MAX_TOKEN + 1).strip().decode("ascii")
    except OSError as error:
        raise KeyFileError(f"the access token {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        token = ""
    if not token or len(token) > _MAX_TOKEN or not token.isprintable() or " " in token:
        raise KeyFileError(f"{path} holds no access token")
    return token


def _jwk(content: bytearray, what: str) -> PrivateKey | SymmetricKey:
    import json

    from encfs.keys.files import decryption_key, parse_key

    try:
        document = loads_object(content, limit=len(content), what="the released key")
    except FormatError as error:
        raise KeyProviderError(f"{what}: {error.message}") from None
    bare = {name: value for name, value in document.items() if name in _KEY_MEMBERS}
    bare["kty"] = str(bare.get("kty")).removesuffix("-HSM")
    return decryption_key(parse_key(json.dumps(bare).encode(), what), what)


def _plain_key(kind: str, content: bytearray, what: str) -> PrivateKey | SymmetricKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_der_private_key

    from encfs.keys.files import decryption_key
    from encfs.keys.jwk import private_key

    if kind == "oct":
        if len(content) != KEK_SIZE:
            raise KeyFileError(f"{what} is {len(content)} bytes; a key for artifacts has {KEK_SIZE}")
        return SymmetricKey(bytearray(content))
    try:
        key = private_key(load_der_private_key(content, None))  # type: ignore[arg-type]
    except (ValueError, UnsupportedAlgorithm):
        raise KeyProviderError(f"{what} is no private key") from None
    except KeyFileError as error:
        raise KeyFileError(f"{what} {error.message}") from None
    return decryption_key(key, what)
