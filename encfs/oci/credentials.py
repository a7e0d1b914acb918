"""Where credentials for a registry come from: the files of docker and podman, and credential helpers.

Looked up anew each time they are asked for, so that a login during a long mount takes effect. Not here: how a registry
is told (`authentication`).

Files, in this order (containers-auth.json(5), docker's config.json): `REGISTRY_AUTH_FILE`; `DOCKER_CONFIG`/config.json;
`XDG_RUNTIME_DIR`/containers/auth.json or /run/containers/UID/auth.json; `XDG_CONFIG_HOME`/containers/auth.json;
~/.docker/config.json. In each: `credHelpers`, then `auths`, then `credsStore`. The first that has an entry counts.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import selectors
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from encfs.errors import AuthenticationError

#: Registries that go by several names in those files.
_DOCKER_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io")

_MAX_FILE_SIZE = 1 << 20
_MAX_HELPER_OUTPUT = 64 << 10
_HELPER_SECONDS = 30.0
#: The user name by which a helper says that the secret is an identity token (docker-credential-helpers).
_TOKEN_USER = "<token>"  # noqa: S105 - a marker


@dataclass(frozen=True, slots=True)
class Credential:
    """A user name with a password, or an identity token (an OAuth2 refresh token) instead. `source` names the place."""

    username: str
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    source: str = ""

    def basic(self) -> str:
        """The value of an Authorization header (RFC 7617)."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode("ascii")


def find_credential(registry: str, repository: str = "") -> Credential | None:
    """The credential for a registry (`HOST[:PORT]`), or None for anonymous access.

    podman's files may have one for a part of the registry only, `HOST/NAMESPACE[/REPOSITORY]`; the longest counts.
    Raises: AuthenticationError where a file or helper is broken: going on without would only hide that.
    """
    for path in _config_files():
        config = _read_config(path)
        if config is None:
            continue
        credential = _find_in(config, registry, repository, str(path))
        if credential is not None:
            return credential
    return None


def _config_files() -> Iterator[Path]:
    environment = os.environ
    if environment.get("REGISTRY_AUTH_FILE"):
        yield Path(environment["REGISTRY_AUTH_FILE"])
    if environment.get("DOCKER_CONFIG"):
        yield Path(environment["DOCKER_CONFIG"]) / "config.json"
    runtime = environment.get("XDG_RUNTIME_DIR")
    yield (Path(runtime) / "containers" if runtime else Path(f"/run/containers/{os.getuid()}")) / "auth.json"
    home = Path(environment.get("HOME") or "/")
    yield Path(environment.get("XDG_CONFIG_HOME") or home / ".config") / "containers/auth.json"
    yield home / ".docker/config.json"


def _read_config(path: Path) -> Mapping[str, object] | None:
    # The error is raised outside of the handlers: json's errors carry the document, which holds passwords.
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_FILE_SIZE + 1)
        config = json.loads(content) if content.strip() and len(content) <= _MAX_FILE_SIZE else {}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        problem = error.strerror or "cannot be read"
    except (ValueError, RecursionError):
        problem = "is not JSON"
    else:
        if isinstance(config, dict) and len(content) <= _MAX_FILE_SIZE:
            return config
        problem = "is not an object of at most 1 MiB"
    raise AuthenticationError(f"credentials file {path}: {problem}", hint="mend it, or log in anew")


def _find_in(config: Mapping[str, object], registry: str, repository: str, path: str) -> Credential | None:
    names = _DOCKER_HUB if registry in _DOCKER_HUB else (registry,)
    helpers = config.get("credHelpers")
    if isinstance(helpers, dict):
        for name in names:
            if isinstance(helper := helpers.get(name), str):
                return _ask_helper(helper, name, path)
    entries = config.get("auths")
    if isinstance(entries, dict):
        for key in _keys(names, repository):
            credential = _parse_entry(entries.get(key), key, path)
            if credential is not None:
                return credential
    store = config.get("credsStore")
    if isinstance(store, str) and store:
        # docker keeps the hub's credentials under this historical address.
        return _ask_helper(store, "https://index.docker.io/v1/" if registry in _DOCKER_HUB else registry, path)
    return None


def _keys(names: tuple[str, ...], repository: str) -> Iterator[str]:
    """The keys an entry may have, from the most specific on; with the schemes that old versions of docker wrote."""
    parts = repository.split("/") if repository else []
    for length in range(len(parts), -1, -1):
        for name in names:
            key = "/".join([name, *parts[:length]])
            yield key
            if not length:
                yield from (f"https://{key}", f"https://{key}/", f"https://{key}/v1/", f"https://{key}/v2/")
                yield from (f"http://{key}", f"http://{key}/")


def _parse_entry(entry: object, key: str, path: str) -> Credential | None:
    if not isinstance(entry, dict):
        return None
    source = f"{path}, entry {key}"
    token, encoded = entry.get("identitytoken"), entry.get("auth")
    username, password = entry.get("username"), entry.get("password")
    if isinstance(encoded, str) and encoded:
        username, password = _decode_auth(encoded, source)
    if isinstance(token, str) and token:
        return Credential(str(username or ""), identity_token=token, source=source)
    if isinstance(username, str) and isinstance(password, str) and username:
        return Credential(username, password, source=source)
    return None


def _decode_auth(encoded: str, source: str) -> tuple[str, str]:
    try:
        text = base64.b64decode(encoded, validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        text = ""
    username, colon, password = text.partition(":")
    if not colon:
        raise AuthenticationError(f"{source}: its auth value is not base64 of user:password", hint="log in anew")
    return username, password.rstrip("\0")


# -- credential helpers (docker-credential-helpers, README: "get" with the address on the standard input)


def _ask_helper(name: str, address: str, path: str) -> Credential | None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name, re.ASCII):
        raise AuthenticationError(f"{path} names an odd credential helper", hint="mend it, or log in anew")
    program = f"docker-credential-{name}"
    status, output = _run_helper(program, address)
    if status != 0:
        if b"credentials not found" in output:
            return None
        raise AuthenticationError(
            f"{program} failed for {address} with status {status}", hint="run it by hand to see why"
        )
    try:
        answer = json.loads(output)
    except (ValueError, RecursionError):
        answer = None
    if isinstance(answer, dict):
        username, secret = answer.get("Username"), answer.get("Secret")
        if isinstance(username, str) and isinstance(secret, str):
            if username == _TOKEN_USER:
                return Credential("", identity_token=secret, source=program)
            return Credential(username, secret, source=program) if username else None
    raise AuthenticationError(f"{program} gave an answer that is none for {address}")


def _run_helper(program: str, address: str) -> tuple[int, bytes]:
    """Exit status and bounded output; the time is bounded too. Raises: AuthenticationError."""
    try:
        process = subprocess.Popen(
            [program, "get"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except OSError as error:
        raise AuthenticationError(f"credential helper {program} cannot be run: {error.strerror}") from None
    with process:
        assert process.stdin is not None  # noqa: S101 - they are pipes
        assert process.stdout is not None  # noqa: S101
        try:
            try:
                process.stdin.write(address.encode())
                process.stdin.close()
            except BrokenPipeError:
                pass  # it does not care what it was asked; its answer says the rest
            output = _read_bounded(process.stdout.fileno(), program)
            return process.wait(_HELPER_SECONDS), output
        except subprocess.TimeoutExpired:
            raise AuthenticationError(f"{program} does not end") from None
        finally:
            process.kill()


def _read_bounded(pipe: int, program: str) -> bytes:
    output = bytearray()
    deadline = time.monotonic() + _HELPER_SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())):
            piece = os.read(pipe, _MAX_HELPER_OUTPUT)
            if not piece:
                return bytes(output)
            output += piece
            if len(output) > _MAX_HELPER_OUTPUT:
                raise AuthenticationError(f"{program} gave more than {_MAX_HELPER_OUTPUT} bytes")
    raise AuthenticationError(f"{program} gave no answer within {_HELPER_SECONDS:.0f} seconds")
