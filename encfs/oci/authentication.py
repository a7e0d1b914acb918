"""Answers to a registry's challenges: Basic, and Bearer with its token service (distribution's token and OAuth2 pages).

Tokens are kept for what they are good for (reading, writing, mounting from a repository) until the registry refuses
them; then the credentials are read anew and a new token is fetched. Not here: where credentials come from.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode, urlsplit

from encfs.deferred import deferred
from encfs.errors import AuthenticationError, TransportError
from encfs.oci.credentials import Credential, find_credential
from encfs.oci.http import (
    RETRYABLE,
    TRANSIENT,
    Body,
    exchange,
    named_error,
    origin_of,
    read_body,
    retry_after,
    status_error,
)
from encfs.oci.retry import Patience
from encfs.strictjson import show_name

# requests guesses with it how texts are encoded, which we never ask for; it takes a while to load.
with deferred("charset_normalizer"):
    import oras.auth.base

if TYPE_CHECKING:
    import requests

_MAX_TOKEN_ANSWER = 1 << 20
_MAX_TOKEN = 64 << 10
_MAX_CHALLENGE = 8 << 10
#: Validity of a token that does not say (seconds; distribution, "Token Authentication Specification").
_DEFAULT_VALIDITY = 60
#: A token this close to its end is not used any more (seconds).
_MARGIN = 5.0
_CLIENT_ID = "encfs"

_CHALLENGE_PART = re.compile(
    r'\s*,?\s*([A-Za-z0-9!#$%&\'*+.^_`|~-]+)(?:\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+)))?', re.ASCII
)


@dataclass(frozen=True, slots=True)
class Purpose:
    """What a token is good for."""

    write: bool
    mount_from: str = ""

    def scopes(self, repository: str) -> list[str]:
        scopes = [f"repository:{repository}:{'pull,push' if self.write else 'pull'}"]
        return [*scopes, f"repository:{self.mount_from}:pull"] if self.mount_from else scopes


@dataclass(frozen=True, slots=True)
class _Header:
    """An Authorization header and the time until which it is worth sending (monotonic seconds)."""

    value: str = field(repr=False)
    until: float


def purpose_of(method: str, url: str) -> Purpose:
    """What a request needs a token for."""
    mount = parse_qs(urlsplit(url).query).get("from", [""])[0] if "mount=" in url else ""
    return Purpose(method not in ("GET", "HEAD"), mount)


def parse_challenges(text: str) -> dict[str, dict[str, str]]:
    """The challenges of a WWW-Authenticate header (RFC 9110, section 11.6.1) by scheme, in lower case."""
    challenges: dict[str, dict[str, str]] = {}
    current: dict[str, str] | None = None
    position = 0
    text = text[:_MAX_CHALLENGE]
    while match := _CHALLENGE_PART.match(text, position):
        name, quoted, plain = match.groups()
        position = match.end()
        if quoted is None and plain is None:
            current = challenges.setdefault(name.lower(), {})
        elif current is not None:
            current.setdefault(name.lower(), re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else plain)
    return challenges


class Authenticator(oras.auth.base.AuthBackend):
    """Authentication at one repository of one registry. Thread-safe."""

    def __init__(
        self,
        session: requests.Session,
        registry: str,
        repository: str,
        *,
        secure: bool,
        find: Callable[[str, str], Credential | None] = find_credential,
    ) -> None:
        """`registry` as credentials files name it; `secure`: tokens are fetched over https only."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.session = session
        self._registry = registry
        self._repository = repository
        self._secure = secure
        self._find = find
        self._lock = threading.Lock()
        self._headers: dict[Purpose, _Header] = {}
        self._basic: str | None = None  # good for every purpose

    def load_configs(self, container: Any, configs: list[Any] | None = None) -> None:
        """Part of oras's interface; credentials are looked up when they are asked for."""

    def header(self, purpose: Purpose) -> str | None:
        """The Authorization header to send at once, if any is known."""
        header = self._headers.get(purpose)
        if header is None and self._basic is not None:
            return self._basic
        if header is None or header.until < time.monotonic():
            return None
        return header.value

    def answer(self, response: requests.Response, purpose: Purpose, sent: str | None, patience: Patience) -> bool:
        """Get a better header than `sent` after a refusal; False where the registry's challenge leaves no way.

        Raises: AuthenticationError where the credentials are refused, TransportError where the token service fails.
        """
        challenges = parse_challenges(response.headers.get("WWW-Authenticate", ""))
        with self._lock:
            known = self.header(purpose)
            if known is not None and known != sent:
                return True  # another thread was faster
            self._headers.pop(purpose, None)
            self._basic = None
            if "bearer" in challenges:
                self._headers[purpose] = self._fetch_token(challenges["bearer"], purpose, patience)
                return True
            if "basic" in challenges:
                credential = self._find(self._registry, self._repository)
                if credential is None or not credential.password:
                    return False
                header = credential.basic()
                if header == sent:
                    raise AuthenticationError(
                        f"{self._registry} refuses the user name and password of {credential.source}",
                        hint="log in anew with skopeo, podman or docker login",
                    )
                self._basic = header
                return True
        return False

    def _fetch_token(self, challenge: Mapping[str, str], purpose: Purpose, patience: Patience) -> _Header:
        realm = challenge.get("realm", "")
        scheme, host, _ = origin_of(realm)
        if self._secure and scheme != "https":
            raise TransportError(f"{self._registry} names a token service without TLS, {host}: refused")
        scopes = purpose.scopes(self._repository)
        asked = {_without_order(scope) for scope in scopes}
        scopes += [scope for scope in challenge.get("scope", "").split() if _without_order(scope) not in asked]
        fields = [("service", challenge["service"])] if challenge.get("service") else []
        credential = self._find(self._registry, self._repository)
        if credential is not None and credential.identity_token:
            form = [
                ("grant_type", "refresh_token"),
                *fields,
                ("client_id", _CLIENT_ID),
                ("scope", " ".join(scopes)),
                ("refresh_token", credential.identity_token),
            ]
            content = urlencode(form).encode()
            document = self._ask(realm, "POST", None, Body(len(content), lambda: iter([content])), credential, patience)
        else:
            query = urlencode([*fields, *(("scope", scope) for scope in scopes)])
            url = f"{realm}{'&' if urlsplit(realm).query else '?'}{query}"
            basic = credential.basic() if credential is not None else None
            document = self._ask(url, "GET", basic, None, credential, patience)
        return _parse_token(document, host)

    def _ask(
        self,
        url: str,
        method: str,
        authorization: str | None,
        body: Body | None,
        credential: Credential | None,
        patience: Patience,
    ) -> bytes:
        headers = {"Content-Type": "application/x-www-form-urlencoded"} if body is not None else {}
        while True:
            wait = 0.0
            try:
                response = exchange(
                    self.session,
                    method,
                    url,
                    headers=headers,
                    authorization=authorization,
                    body=body,
                    patience=patience,
                )
                content = read_body(response, patience, _MAX_TOKEN_ANSWER)
                if response.status_code not in RETRYABLE:
                    break
                error = status_error(response, content, "a token")
                wait = retry_after(response)
            except TRANSIENT as problem:
                error, temporary = named_error(problem, url)
                if not temporary:
                    raise error from None
            patience.pause(error, at_least=wait)
        if response.status_code in (400, 401, 403) and credential is not None:
            raise AuthenticationError(
                f"{urlsplit(url).netloc} refuses the credentials of {credential.source}",
                hint="log in anew with skopeo, podman or docker login",
            )
        if response.status_code != 200:
            raise status_error(response, content, "a token")
        return content


def _parse_token(content: bytes, host: str) -> _Header:
    """Raises: TransportError where the answer holds no usable token."""
    import json

    # Not the strict reader: token services put numbers of all kinds into their answers.
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        document = None
    if isinstance(document, dict):
        token = document.get("token") or document.get("access_token")
        if isinstance(token, str) and 0 < len(token) <= _MAX_TOKEN and token.isascii() and token.isprintable():
            seconds = document.get("expires_in")
            if not isinstance(seconds, int | float) or not 0 < seconds < 1e9:
                seconds = _DEFAULT_VALIDITY
            return _Header(f"Bearer {token}", time.monotonic() + max(1.0, seconds - _MARGIN))
    raise TransportError(f"the token service {show_name(host)} gives an answer without a token")


def _without_order(scope: str) -> tuple[str, frozenset[str]]:
    """A scope's resource and its set of actions: registries write `pull,push` and `push,pull` alike."""
    resource, _, actions = scope.rpartition(":")
    return resource, frozenset(actions.split(","))
