"""Requests to one registry: retries, authentication and time limits around single exchanges (`http`).

Built on oras: `Client` is an `oras.provider.Registry` whose transport is replaced where measurements showed it wanting
(docs/registries.md). Not here: what the requests mean (`registry`, `upload`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from json import dumps
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from encfs.deferred import deferred
from encfs.errors import AuthenticationError, EncfsError, TransportError
from encfs.oci.authentication import Authenticator, purpose_of
from encfs.oci.counters import TransferCounters
from encfs.oci.http import (
    RETRYABLE,
    TRANSIENT,
    Body,
    exchange,
    named_error,
    open_session,
    origin_of,
    read_body,
    retry_after,
    status_error,
)
from encfs.oci.options import StoreOptions
from encfs.oci.reference import DEFAULT_REGISTRY
from encfs.oci.retry import Patience
from encfs.tracing import span

# oras checks with it what it uploads by itself, which we never ask for; it takes longer to load than the rest of oras.
with deferred("jsonschema"):
    import oras.container
    import oras.provider

if TYPE_CHECKING:
    import requests

log = logging.getLogger(__name__)

#: The address behind docker.io.
_DOCKER_HUB_HOST = "registry-1.docker.io"
#: Answers to challenges within one request: the first, and one more when a token has run out.
_MAX_ANSWERS = 2


class Client(oras.provider.Registry):
    """One repository of one registry, over HTTP. Thread-safe."""

    def __init__(
        self,
        registry: str,
        repository: str,
        options: StoreOptions,
        *,
        plain_http: bool = False,
        attempts: int | None = None,
        counters: TransferCounters | None = None,
    ) -> None:
        """`registry` is HOST[:PORT]; `attempts` bounds the tries of one request, besides the time."""
        host = _DOCKER_HUB_HOST if registry == DEFAULT_REGISTRY else registry
        super().__init__(hostname=host, insecure=plain_http)
        self.registry = registry
        self.repository = repository
        self.counters = counters or TransferCounters()
        self.base = f"{self.prefix}://{host}"
        self._options = options
        self._attempts = attempts
        self._stopped = threading.Event()
        self._reached = False
        self._told_of_ranges = False
        self.session.close()
        self.session = open_session(self.base, options)
        self.auth = Authenticator(self.session, registry, repository, secure=not plain_http)
        self._origin = origin_of(self.base)

    @property
    def container(self) -> oras.container.Container:
        """The repository as oras calls it."""
        container = oras.container.Container("repository", registry=self.hostname)
        namespace, _, container.repository = self.repository.rpartition("/")
        container.namespace = namespace or None
        return container

    def url(self, kind: str, name: str) -> str:
        """The address of a part of the repository: ("manifests", tag or digest), ("blobs", digest) and so on."""
        return f"{self.base}/v2/{self.repository}/{kind}/{name}"

    def patience(self, attempts: int | None = None) -> Patience:
        """A new time budget, as the options say; `attempts` bounds the tries besides the time."""
        return Patience(self._options.io_timeout, attempts=attempts or self._attempts, stopped=self._stopped)

    def is_home(self, url: str) -> bool:
        """Whether a URL is of the registry itself."""
        return origin_of(url) == self._origin

    def do_request(
        self,
        url: str,
        method: str = "GET",
        data: bytes | Body | None = None,
        headers: Mapping[str, str] | None = None,
        json: object = None,
        stream: bool = False,
        *,
        patience: Patience | None = None,
    ) -> requests.Response:
        """Send a request until it has an answer that waiting would not change, and give that whatever its status.

        With `stream`, the body is left to be read; otherwise it is read whole, at most 4 MiB. Challenges of the
        registry are answered. Raises: TransportError, TransportTimeoutError, AuthenticationError.
        """
        if json is not None:
            data = dumps(json).encode()
        if self._origin[0] == "https" and origin_of(url)[0] != "https":
            raise TransportError(f"{self.registry} names an address without TLS, {urlsplit(url).netloc}: refused")
        body = _as_body(data)
        patience = patience or self.patience()
        # Neither path nor query: they may hold what lets others in.
        with span("registry.request", **{"http.request.method": method, "server.address": self.registry}) as traced:
            response = self._exchange(url, method, body, headers, stream=stream, patience=patience)
            traced["http.response.status_code"] = response.status_code
            return response

    def _exchange(
        self,
        url: str,
        method: str,
        body: Body | None,
        headers: Mapping[str, str] | None,
        *,
        stream: bool,
        patience: Patience,
    ) -> requests.Response:
        purpose = purpose_of(method, url)
        answers = 0
        while True:
            sent = self.auth.header(purpose) if self.is_home(url) else None
            wait = 0.0
            self.counters.add("requests")
            try:
                response = exchange(
                    self.session,
                    method,
                    url,
                    headers=headers or {},
                    authorization=sent,
                    body=body,
                    patience=patience,
                )
                status = response.status_code
                if status in (401, 403) and self.is_home(response.url) and answers < _MAX_ANSWERS:
                    answers += 1
                    _drain(response, patience)
                    # A token may also have run out where the registry only says "forbidden".
                    if (status == 401 or sent) and self.auth.answer(response, purpose, sent, patience):
                        continue
                    return response
                if status not in RETRYABLE:
                    self._reached = True
                    if not stream:
                        _drain(response, patience)
                        self.counters.add("bytes_from_registry", len(response.content))
                    return response
                _drain(response, patience)
                wait = retry_after(response)
                error: EncfsError = status_error(response, response.content, f"{method} request")
            except AuthenticationError:
                raise
            except TRANSIENT as problem:
                error, temporary = named_error(problem, url)
                if not temporary:
                    raise error from None
            patience.pause(error, at_least=wait, first_contact=not self._reached)
            self.counters.add("retries")

    def request(
        self,
        url: str,
        method: str,
        what: str,
        statuses: frozenset[int],
        *,
        data: bytes | Body | None = None,
        headers: Mapping[str, str] | None = None,
        stream: bool = False,
        patience: Patience | None = None,
    ) -> requests.Response:
        """The same, for statuses that mean success; `what` stands in messages.

        Raises: NotFoundError, AuthenticationError, TransportError for any other status, and as `do_request`.
        """
        patience = patience or self.patience()
        response = self.do_request(url, method, data, headers, stream=stream, patience=patience)
        if response.status_code in statuses:
            return response
        if stream:
            try:
                _drain(response, patience)
            except TRANSIENT as error:
                raise named_error(error, url)[0] from None
        raise status_error(response, response.content, what)

    def note_no_ranges(self) -> None:
        """Say once that every read fetches a whole blob."""
        if not self._told_of_ranges:
            self._told_of_ranges = True
            log.warning("%s does not serve parts of blobs: they are fetched whole", self.registry)

    def close(self) -> None:
        """End every pause and close the connections."""
        self._stopped.set()
        self.session.close()


def _as_body(data: bytes | Body | None) -> Body | None:
    if data is None or isinstance(data, Body):
        return data
    content = data
    return Body(len(content), lambda: iter([content]))


def _drain(response: requests.Response, patience: Patience) -> None:
    """Read the bounded body, which gives the connection back; `response.content` holds it from then on."""
    if response.request.method == "HEAD":
        response._content = response.raw.read()  # empty, and http.client takes note that the answer is over
    else:
        response._content = read_body(response, patience)
    response._content_consumed = True
