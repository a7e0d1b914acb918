"""HTTP as registries are spoken to: TLS, connections, single exchanges with redirects, bounded bodies, errors by name.

One exchange, no retries and no authentication (`client`). Nothing is sent to another host than the one asked but what
it needs: no Authorization, no client certificate, no cookies; and never from https to http.
"""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from http.cookiejar import DefaultCookiePolicy
from typing import Any
from urllib.parse import urljoin, urlsplit

import urllib3.exceptions

from encfs.deferred import deferred
from encfs.errors import (
    AuthenticationError,
    EncfsError,
    IntegrityError,
    NotFoundError,
    TransportError,
    TransportTimeoutError,
    UsageError,
)
from encfs.oci.blobs import MAX_MANIFEST_SIZE
from encfs.oci.deadlines import POOLS
from encfs.oci.options import StoreOptions
from encfs.oci.retry import Patience
from encfs.strictjson import loads_object, show_name

# requests guesses with it how texts are encoded, which we never ask for; it takes a while to load.
with deferred("charset_normalizer"):
    import requests
    import requests.adapters
    import requests.utils

#: What one exchange may raise besides this project's errors; all of it can pass by itself.
TRANSIENT = (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, HTTPException, OSError)
#: Statuses that can pass by themselves.
RETRYABLE = frozenset({408, 425, 429, 500, 502, 503, 504})

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_REDIRECTS = 5
_CONNECT_SECONDS = 10.0
#: Seconds of silence in the middle of an exchange before it is given up; the operation's own time may be shorter.
_SILENCE_SECONDS = 30.0
_LONGEST_RETRY_AFTER = 3600.0
_READ_SIZE = 1 << 20
#: An upload is sent in pieces of this size, each within the silence allowed.
_SEND_SIZE = 128 << 10
_USER_AGENT = "encfs"
_SHOWN_TEXT = 160
#: How OpenSSL calls an answer in clear text.
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST")


@dataclass(frozen=True, slots=True)
class Body:
    """A request body that can be sent more than once: `open()` gives its `size` bytes from the start."""

    size: int
    open: Callable[[], Iterator[bytes | memoryview]]


class _SizedIterator:
    """What makes requests send a Content-Length in front of an iterator."""

    def __init__(self, body: Body) -> None:
        self._body = body

    def __len__(self) -> int:
        return self._body.size

    def __iter__(self) -> Iterator[bytes]:
        rest = self._body.size
        for chunk in self._body.open():
            view = memoryview(chunk)
            rest -= len(view)
            if rest < 0:
                break
            for start in range(0, len(view), _SEND_SIZE):
                yield view[start : start + _SEND_SIZE]  # type: ignore[misc]  # a socket takes any buffer
        if rest:
            raise IntegrityError("a blob that is being sent is not of its stated size")


# -- connections


def origin_of(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of a URL. Raises: TransportError where it is none of http or https."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise TransportError(f"the registry named {show_name(url)}, which is no address to go to")
    return parts.scheme, parts.hostname.lower(), port or (443 if parts.scheme == "https" else 80)


def resolve(url: str, location: str) -> str:
    """The address that a Location or Link at `url` means. Raises: TransportError where it means none."""
    try:
        return urljoin(url, location)
    except ValueError:
        raise TransportError(f"the registry named {show_name(location)}, which is no address to go to") from None


class _Adapter(requests.adapters.HTTPAdapter):
    """Connections whose answers have an end, with a TLS context of our own, made when it is first needed."""

    def __init__(self, options: StoreOptions, *, identify: bool) -> None:
        """`identify`: present the client certificate."""
        self._options = options
        self._identify = identify
        self._context: ssl.SSLContext | None = None
        super().__init__(pool_maxsize=options.concurrency + 4, max_retries=0)

    def init_poolmanager(self, *args: Any, **named: Any) -> None:
        """Called by the constructor."""
        super().init_poolmanager(*args, **named)
        self.poolmanager.pool_classes_by_scheme = POOLS

    def proxy_manager_for(self, proxy: str, **named: Any) -> Any:
        """The same for connections through a proxy."""
        manager = super().proxy_manager_for(proxy, **named)
        manager.pool_classes_by_scheme = POOLS
        return manager

    def build_connection_pool_key_attributes(
        self, request: requests.PreparedRequest, verify: Any, cert: Any = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        host, _ = super().build_connection_pool_key_attributes(request, True, None)
        if host["scheme"] != "https":
            return host, {}
        if self._context is None:
            self._context = _tls_context(self._options, identify=self._identify)
        return host, {"ssl_context": self._context}

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        """The context says all of it."""


def _tls_context(options: StoreOptions, *, identify: bool) -> ssl.SSLContext:
    """Certificates and host names are checked; the system's authorities are trusted, and those of `ca_file`.

    Raises: UsageError where a file is unusable.
    """
    context = ssl.create_default_context()
    paths = ssl.get_default_verify_paths()
    if paths.cafile is None and (paths.capath is None or not os.listdir(paths.capath)):
        context.load_verify_locations(requests.adapters.DEFAULT_CA_BUNDLE_PATH)
    if options.ca_file is not None:
        try:
            context.load_verify_locations(options.ca_file)
        except (OSError, ssl.SSLError) as error:
            raise UsageError(f"--ca-file {options.ca_file}: {_reason(error)}", hint="give a PEM file") from None
    if identify and options.cert_file is not None:
        try:
            # An encrypted key would ask for its password on the terminal.
            context.load_cert_chain(options.cert_file, options.key_file, password=lambda: "")
        except (OSError, ssl.SSLError) as error:
            raise UsageError(
                f"--cert-file {options.cert_file}: {_reason(error)}",
                hint="give PEM files of a certificate and its unencrypted key",
            ) from None
    return context


class _Session(requests.Session):
    """Leaves redirects alone, even their addresses unread: they are followed by `exchange`."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        return None


def open_session(url: str, options: StoreOptions) -> requests.Session:
    """A session for the registry at `url`; it can be used by several threads."""
    session = _Session()
    # No ~/.netrc, no cookies: nothing but what the registry's own challenge asks for. Proxies are looked up by us.
    session.trust_env = False
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    session.headers.clear()
    session.headers.update({"User-Agent": _USER_AGENT, "Accept-Encoding": "identity", "Accept": "*/*"})
    scheme, host, port = origin_of(url)
    shown = f"[{host}]" if ":" in host else host
    stranger, home = _Adapter(options, identify=False), _Adapter(options, identify=True)
    session.mount("https://", stranger)
    session.mount("http://", stranger)
    session.mount(f"{scheme}://{shown}:{port}/", home)
    if port == (443 if scheme == "https" else 80):
        session.mount(f"{scheme}://{shown}/", home)
    return session


# -- one exchange


def exchange(
    session: requests.Session,
    method: str,
    url: str,
    *,
    headers: Mapping[str, str],
    authorization: str | None = None,
    body: Body | None = None,
    patience: Patience,
) -> requests.Response:
    """Send one request, follow its redirects, and give the response with its body still to be read.

    `authorization` goes to the origin of `url` alone. Raises: TransportError for redirects that lead nowhere good, and
    whatever `TRANSIENT` lists.
    """
    home = origin_of(url)
    for _ in range(_MAX_REDIRECTS + 1):
        scheme, host, _ = here = origin_of(url)
        if scheme == "http" and home[0] == "https":
            raise TransportError(
                f"{home[1]} redirects from https to http, to {host}", hint="the registry is misconfigured"
            )
        sent = dict(headers)
        if authorization is not None and here == home:
            sent["Authorization"] = authorization
        if body is not None:
            sent["Content-Length"] = str(body.size)
        response = session.request(
            method,
            url,
            headers=sent,
            data=_SizedIterator(body) if body is not None and body.size else None,
            stream=True,
            allow_redirects=False,
            timeout=_timeouts(patience, sending=body is not None),
            proxies=requests.utils.get_environ_proxies(url),
        )
        location = response.headers.get("Location")
        if response.status_code not in _REDIRECTS or location is None:
            return response
        response.close()
        if method not in ("GET", "HEAD") and response.status_code not in (307, 308):
            raise TransportError(f"{host} answers {method} with a redirect of status {response.status_code}")
        url = resolve(url, location)
    raise TransportError(f"{home[1]} redirects in a circle", hint="the registry is misconfigured")


def _timeouts(patience: Patience, *, sending: bool) -> tuple[float, float]:
    # urllib3 applies the first one while it sends, too. Large uploads are stored before they are answered.
    silence = max(0.05, patience.remaining if sending else min(_SILENCE_SECONDS, patience.remaining))
    return (silence if sending else min(_CONNECT_SECONDS, silence)), silence


def read_chunks(response: requests.Response, patience: Patience) -> Iterator[bytes]:
    """The body as it arrives, in pieces of up to 1 MiB; the connection is given back when it is read to the end.

    Raises: TransportTimeoutError where the time is over, TransportError for an encoding nobody asked for, `TRANSIENT`.
    """
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        response.close()
        raise TransportError(f"the registry sends content encoded as {show_name(encoding)}, which was not asked for")
    whole = False
    try:
        # A server that drips keeps every single read short of its own time limit.
        while patience.remaining:
            chunk: bytes = response.raw.read1(_READ_SIZE, decode_content=False)
            if not chunk:
                whole = True
                return
            yield chunk
    finally:
        if not whole:
            response.close()
    raise TransportTimeoutError(f"{host_of(response)} sends too slowly")


def read_body(response: requests.Response, patience: Patience, limit: int = MAX_MANIFEST_SIZE) -> bytes:
    """The whole body. Raises: TransportError where it is more than `limit` bytes, and as `read_chunks`."""
    content = bytearray()
    for chunk in read_chunks(response, patience):
        content += chunk
        if len(content) > limit:
            response.close()
            raise TransportError(f"{host_of(response)} answers with more than {limit} bytes")
    return bytes(content)


def content_length(response: requests.Response) -> int | None:
    """The stated length of the body (bytes)."""
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def retry_after(response: requests.Response) -> float:
    """Seconds the server asks to wait (RFC 9110, section 10.2.3); 0 where it does not say."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit() and len(text) < 10:
        return min(float(text), _LONGEST_RETRY_AFTER)
    if text:
        from email.utils import parsedate_to_datetime

        try:
            return min(max(0.0, parsedate_to_datetime(text).timestamp() - time.time()), _LONGEST_RETRY_AFTER)
        except (ValueError, OverflowError):
            return 0.0
    return 0.0


# -- errors


def host_of(response: requests.Response) -> str:
    return urlsplit(response.url).netloc


def _reason(error: BaseException) -> str:
    """The innermost text of a chain of exceptions, on one line."""
    seen = 0
    inner: BaseException = error
    while seen < 8:
        following = getattr(inner, "reason", None)
        if not isinstance(following, BaseException):
            following = next((item for item in inner.args if isinstance(item, BaseException)), None)
        following = following or inner.__cause__ or inner.__context__
        if following is None:
            break
        inner, seen = following, seen + 1
    text = getattr(inner, "verify_message", None) or getattr(inner, "strerror", None) or str(inner)
    return _one_line(str(text)) or type(inner).__name__


def _one_line(text: str) -> str:
    """Untrusted text for a message: one line of printable ASCII, cut short."""
    return ascii(" ".join(text[:_SHOWN_TEXT].split()))[1:-1]


def _is_caused_by(error: BaseException, kinds: type[BaseException] | tuple[type[BaseException], ...]) -> bool:
    pending: list[BaseException] = [error]
    for _ in range(32):
        if not pending:
            break
        item = pending.pop()
        if isinstance(item, kinds):
            return True
        pending += [
            other
            for other in (item.__cause__, item.__context__, getattr(item, "reason", None), *item.args)
            if isinstance(other, BaseException)
        ]
    return False


def named_error(error: BaseException, url: str) -> tuple[EncfsError, bool]:
    """The project's error for one of `TRANSIENT`, and whether trying again can help."""
    host = urlsplit(url).netloc
    if _is_caused_by(error, ssl.SSLCertVerificationError):
        return (
            TransportError(
                f"{host}: its certificate is not trusted: {_reason(error)}",
                hint="name the authority's certificate with --ca-file",
            ),
            False,
        )
    if _is_caused_by(error, ssl.SSLError) and any(mark in str(error) for mark in _NO_TLS):
        return TransportError(f"{host} does not speak TLS", hint="pass --plain-http if that is meant"), False
    if _is_caused_by(error, urllib3.exceptions.NameResolutionError):
        return TransportError(f"{host}: the name cannot be resolved: {_reason(error)}"), True
    # urllib3 counts a refused connection among the timeouts.
    late = (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError, TimeoutError)
    if _is_caused_by(error, late) and not _is_caused_by(error, urllib3.exceptions.NewConnectionError):
        return TransportTimeoutError(f"{host} gave no answer in time"), True
    if isinstance(error, (requests.exceptions.InvalidURL, requests.exceptions.InvalidHeader)):
        return TransportError(f"{host}: {_reason(error)}"), False
    return TransportError(f"{host}: {_reason(error)}"), True


def status_error(response: requests.Response, content: bytes, what: str) -> EncfsError:
    """The project's error for a status that is no success; `what` says what was asked for."""
    status, host = response.status_code, host_of(response)
    said = _registry_message(content)
    suffix = f": {said}" if said else ""
    if status == 401:
        return AuthenticationError(
            f"{host} wants credentials for {what}{suffix}", hint="log in with skopeo, podman or docker login"
        )
    if status == 403:
        return AuthenticationError(
            f"{host} refuses {what}{suffix}", hint="check the account's permissions for this repository"
        )
    if status in (404, 410):
        return NotFoundError(f"{host} has no {what}{suffix}")
    return TransportError(f"{host} answers {what} with status {status}{suffix}")


def _registry_message(content: bytes) -> str:
    """The first message of a registry's error document (distribution-spec, "Error Codes")."""
    if not content.lstrip().startswith(b"{"):
        return ""
    try:
        errors = loads_object(content, limit=64 << 10, what="error").get("errors")
    except EncfsError:
        return ""
    first = errors[0] if isinstance(errors, list) and errors else None
    if not isinstance(first, dict):
        return ""
    text = first.get("message") or first.get("code")
    return _one_line(text) if isinstance(text, str) else ""
