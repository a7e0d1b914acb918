"""The broker over HTTP: routes, bodies within their bounds, errors in the protocol's form. What is done: `handlers.py`.

POST /kbs/v0/auth, /kbs/v0/attest     GET /kbs/v0/resource/REPOSITORY/TYPE/TAG
GET  /healthz (the process answers), /readyz (the database, too), /metrics (Prometheus)
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from encfs.errors import EncfsError
from encfs.kbs import protocol
from encfs.kbs.protocol import error_document
from imagetool.broker.handlers import Broker, Refusal
from imagetool.broker.limits import ByteBudget, RateLimiter
from imagetool.broker.metrics import Metrics

#: Seconds for a request's body to arrive.
BODY_TIMEOUT = 10.0
#: Bytes of the first message, which names a version and a TEE.
_MAX_AUTH = 16 << 10
#: Seconds between deletions of expired sessions, and looks at the endorsements.
_UPKEEP_INTERVAL = 5.0

_RESOURCES = f"{protocol.PREFIX}/resource/"

_Step = Callable[[Request], Awaitable[Response]]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one address may do: requests, sessions that send evidence, bytes of messages, those that are in memory."""

    requests: RateLimiter
    sessions: RateLimiter
    volume: RateLimiter
    bodies: ByteBudget


def make_app(broker: Broker, limits: Limits, metrics: Metrics, *, secure: bool) -> Starlette:
    """`secure`: served over TLS, so that the session's cookie is marked accordingly."""
    api = _Api(broker, limits, metrics, secure=secure)
    routes = [
        Route(f"{protocol.PREFIX}/auth", api.step("auth", api.auth), methods=["POST"]),
        Route(f"{protocol.PREFIX}/attest", api.step("attest", api.attest), methods=["POST"]),
        Route(_RESOURCES + "{path:path}", api.step("resource", api.resource), methods=["GET"]),
        Route("/healthz", api.health, methods=["GET"]),
        Route("/readyz", api.step("ready", api.readiness), methods=["GET"]),
        Route("/metrics", api.step("metrics", api.exposition), methods=["GET"]),
    ]
    return Starlette(routes=routes, lifespan=api.lifespan, exception_handlers={HTTPException: _unknown})


class _Api:
    def __init__(self, broker: Broker, limits: Limits, metrics: Metrics, *, secure: bool) -> None:
        self._broker, self._limits, self._metrics = broker, limits, metrics
        self._attributes = "; Path=/; HttpOnly" + ("; Secure" if secure else "")

    @asynccontextmanager
    async def lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        upkeep = asyncio.create_task(self._keep_up())
        try:
            yield
        finally:
            upkeep.cancel()
            with suppress(asyncio.CancelledError):
                await upkeep
            await asyncio.to_thread(self._broker.close)

    async def _keep_up(self) -> None:
        while True:
            await self._purge()
            await self._broker.refresh()
            await asyncio.sleep(_UPKEEP_INTERVAL)

    async def _purge(self) -> None:
        try:
            await self._broker.purge()
        except EncfsError as error:
            _logger.warning("expired sessions are not deleted: %s", error)

    def step(self, name: str, answer: _Step) -> _Step:
        """A step with what all have: the rate, errors as answers, figures."""

        async def endpoint(request: Request) -> Response:
            started = time.perf_counter()
            reason = "ok"
            try:
                self._admit(request)
                response = await answer(request)
            except Refusal as refusal:
                reason = refusal.code
                response = _error(refusal.status, refusal.kind, refusal.detail)
            except EncfsError as error:
                reason = "unavailable"
                _logger.warning("%s: %s", name, error)
                # What the matter is with the database is the operator's to know.
                response = _error(503, protocol.ERROR_UNAVAILABLE, "the broker cannot answer now: try again later")
            except ClientDisconnect:
                reason = "gone"
                response = Response(status_code=400)
            except Exception:  # a bug: the client must not wait for it, and the traceback holds no values
                reason = "bug"
                _logger.exception("internal error in the step %s", name)
                response = _error(500, protocol.ERROR_UNAVAILABLE, "internal error")
            self._metrics.count(name, response.status_code, reason, time.perf_counter() - started)
            return response

        return endpoint

    def _admit(self, request: Request) -> None:
        if not self._limits.requests.allow(_address(request)):
            raise Refusal(429, protocol.ERROR_BUSY, "too many requests from this address: try again later")

    async def auth(self, request: Request) -> Response:
        async with self._body(request, _MAX_AUTH) as body:
            value, challenge = self._broker.auth(body)
        cookie = f"{protocol.SESSION_COOKIE}={value}{self._attributes}"
        return JSONResponse(challenge, headers={"Set-Cookie": cookie, **_UNCACHED})

    async def attest(self, request: Request) -> Response:
        async with self._body(request, protocol.MAX_MESSAGE) as body:
            if not self._limits.sessions.allow(_address(request)):
                raise Refusal(429, protocol.ERROR_BUSY, "too many sessions of this address: try again later")
            answer = await self._broker.attest(_cookie(request), body, _address(request))
        return JSONResponse(answer, headers=_UNCACHED)

    async def resource(self, request: Request) -> Response:
        if request.method != "GET":  # the router takes HEAD for one, and it would use up a release
            raise Refusal(405, protocol.ERROR_REQUEST, "a resource is asked for with GET")
        # As it came: the router's own pattern overlooks a line end behind it.
        path: str = request.scope["path"].removeprefix(_RESOURCES)
        digests = request.query_params.getlist(protocol.DIGEST_PARAMETER)
        if len(digests) > 1:
            raise Refusal(400, protocol.ERROR_REQUEST, f"{protocol.DIGEST_PARAMETER} is given twice")
        digest = digests[0] if digests else None
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        bearer = token.strip() if scheme.lower() == "bearer" else None
        sealed = await self._broker.resource(_cookie(request), bearer, path, digest, _address(request))
        return JSONResponse(sealed, headers=_UNCACHED)

    async def health(self, _request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readiness(self, _request: Request) -> Response:
        try:
            await self._broker.ready()
        except EncfsError as error:
            _logger.warning("not ready: %s", error)
            return PlainTextResponse("not ready\n", 503)
        return PlainTextResponse("ready\n")

    async def exposition(self, _request: Request) -> Response:
        content, kind = await asyncio.to_thread(self._metrics.exposition, self._broker.collateral)
        return Response(content, media_type=kind)

    @asynccontextmanager
    async def _body(self, request: Request, limit: int) -> AsyncIterator[bytes]:
        """The body of `limit` bytes at most, within its time, and what may be in memory of all while it is."""
        declared = request.headers.get("content-length", "0")
        if not declared.isdecimal() or len(declared) > 9 or int(declared) > limit:
            raise _too_large(limit)
        body, address = bytearray(), _address(request)
        try:
            await self._receive(request, body, limit, address)
            yield bytes(body)
        finally:
            self._limits.bodies.give_back(address, len(body))

    async def _receive(self, request: Request, body: bytearray, limit: int, address: str) -> None:
        try:
            async with asyncio.timeout(BODY_TIMEOUT):
                async for chunk in request.stream():
                    # Parsing a message blocks the others for a time that goes with its size.
                    if not self._limits.volume.allow(address, len(chunk)):
                        raise Refusal(429, protocol.ERROR_BUSY, "too much from this address: try again later")
                    if not self._limits.bodies.take(address, len(chunk)):
                        raise Refusal(429, protocol.ERROR_BUSY, "too much is being sent: try again later")
                    body += chunk
                    if len(body) > limit:
                        raise _too_large(limit)
        except TimeoutError:
            raise Refusal(408, protocol.ERROR_REQUEST, "the message did not arrive in time") from None


_UNCACHED = {"Cache-Control": "no-store"}


def _too_large(limit: int) -> Refusal:
    return Refusal(413, protocol.ERROR_REQUEST, f"the message is larger than {limit} bytes")


def _cookie(request: Request) -> str | None:
    value = request.cookies.get(protocol.SESSION_COOKIE)
    return value if value is not None and len(value) <= protocol.MAX_COOKIE else None


def _address(request: Request) -> str:
    return request.client.host if request.client is not None else "unknown"


def _error(status: int, kind: str, detail: str) -> Response:
    # Of these a part may be still to come, which nobody wants.
    end = {"Connection": "close"} if status in (408, 413, 429) else {}
    return JSONResponse(error_document(kind, detail), status, headers=_UNCACHED | end)


async def _unknown(_request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    return _error(status, protocol.ERROR_REQUEST, "there is nothing of that name, or not with this method")
