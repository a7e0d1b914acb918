"""The three steps of a handshake, without HTTP: messages in, answers or refusals out. On the event loop.

Every state between the steps is in the client's cookie or in the database. A key leaves only after the decision is in
the log, on the disk. Judging evidence takes less time than a change of threads; the database has threads of its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TypeVar

from sqlalchemy import Connection

from encfs.attestation.evidence import Collateral
from encfs.attestation.kbs import from_kbs_evidence, kind_of_tee
from encfs.encoding import parse_digest
from encfs.errors import EncfsError, FormatError, IntegrityError, RollbackError, StorageError
from encfs.kbs import jwe, protocol
from encfs.kbs.resource import resource_document
from encfs.keys.secrets import wipe
from encfs.strictjson import loads_object
from encfs.trust import KeyBinding
from imagetool.broker import log, refusals, sessions, state
from imagetool.broker.database import Database
from imagetool.broker.decisions import Because, Decision, Wanted, decide, judge_genuineness, logged_claims
from imagetool.broker.endorsements import EndorsementDirectory
from imagetool.broker.lookups import Found, count_release, look_up
from imagetool.broker.policy import Policy
from imagetool.broker.rollback import CounterMark, check_mark
from imagetool.broker.sessions import Attested, Session
from imagetool.broker.state import State
from imagetool.broker.tickets import read_cookie, read_token, write_cookie, write_token
from imagetool.broker.vault import SealedRow, Vault
from imagetool.broker.writer import TIMEOUT, Writer, too_late

_MAX_DETAIL = 400
#: How often a decision is made anew because the owner changed something in between.
_ATTEMPTS = 5
#: Reads of the database at the same time.
_READERS = 4

_logger = logging.getLogger(__name__)

T = TypeVar("T")


class Refusal(Exception):  # noqa: N818 -- what it is; it never leaves the broker
    """An answer that is no success: HTTP status, kind of error (`encfs.kbs.protocol`), and a detail for people."""

    def __init__(self, status: int, kind: str, detail: str, *, code: str = "") -> None:
        super().__init__(detail)
        self.status, self.kind, self.detail = status, kind, detail[:_MAX_DETAIL]
        self.code = code or kind


@dataclass(frozen=True, slots=True)
class Settings:
    """How a broker behaves. `session_lifetime` in seconds; `demo` lets `sample` evidence through."""

    session_lifetime: int
    max_sessions: int
    demo: bool = False
    mark: CounterMark | None = None


@dataclass(frozen=True, slots=True)
class _Request:
    """Who wants which key. `content_digest` is of the artifact that it says it wants to open."""

    session: Session
    attested: Attested
    path: str
    content_digest: str | None
    client: str


@dataclass(frozen=True, slots=True)
class _Changed:
    """The owner changed something while a decision was made, which is not valid then."""

    epoch: int


class Broker:
    """The steps, for one process and its event loop."""

    def __init__(
        self, database: Database, vault: Vault, endorsements: EndorsementDirectory, settings: Settings
    ) -> None:
        self._database, self._vault, self._endorsements, self._settings = database, vault, endorsements, settings
        self._writer = Writer(database)
        self._readers = ThreadPoolExecutor(_READERS, "broker-reader")
        self._lock = threading.Lock()
        self._known: State | None = None
        self._crowded = False
        #: The database's clock minus this machine's, milliseconds, as of the last purge.
        self._ahead = 0

    def close(self) -> None:
        """Finish what is being written. Not for the event loop's thread."""
        self._writer.close()
        self._readers.shutdown()
        self._database.close()

    # The protocol

    def auth(self, body: bytes) -> tuple[str, dict[str, object]]:
        """The session's cookie, and the challenge."""
        message = _message(body, "the request")
        version, tee = message.get("version"), message.get("tee")
        if version not in protocol.VERSIONS:
            raise Refusal(
                401, protocol.ERROR_VERSION, f"this broker speaks the versions {', '.join(protocol.VERSIONS)}"
            )
        if not isinstance(tee, str):
            raise Refusal(400, protocol.ERROR_REQUEST, "tee is not text")
        try:
            kind_of_tee(tee)
        except FormatError as error:
            raise Refusal(400, protocol.ERROR_REQUEST, error.message) from None
        self._refuse_crowds()
        session = sessions.begin(str(version), tee, self._now(), self._settings.session_lifetime * 1000)
        return write_cookie(self._vault, session), {"nonce": session.nonce, "extra-params": ""}

    async def attest(self, cookie: str | None, body: bytes, client: str) -> dict[str, object]:
        """The answer with a token, once the evidence is genuine and bound to this session."""
        session = self._begun(cookie)
        self._refuse_crowds()
        offered = _attestation(session, _message(body, "the attestation"))
        epoch: int | None = None
        for _ in range(_ATTEMPTS):
            changed = await self._offer(session, offered, client, await self._state(epoch))
            if changed is None:
                return {"token": write_token(self._vault, session)}
            epoch = changed.epoch
        raise _being_changed()

    async def resource(
        self, cookie: str | None, token: str | None, path: str, content_digest: str | None, client: str
    ) -> dict[str, str]:
        """The JWE of a resource. `cookie` of the session, `token` what `attest` gave; one of them is needed."""
        try:
            wanted_path = str(protocol.parse_path(path))
            if content_digest is not None:
                parse_digest(content_digest, protocol.DIGEST_PARAMETER)
        except FormatError as error:
            raise Refusal(400, protocol.ERROR_REQUEST, error.message) from None
        identity = self._of_token(token) if cookie is None and token is not None else self._begun(cookie).id
        for _ in range(_ATTEMPTS):
            found = await self._read(lambda connection: look_up(connection, identity, wanted_path, content_digest))
            if found.session is None:
                raise _unknown("the session has no accepted evidence: send it first, or begin anew")
            session, attested = found.session
            self._refuse_if_over(session)
            content = await self._release(_Request(session, attested, wanted_path, content_digest, client), found)
            if isinstance(content, _Changed):
                continue
            try:
                return jwe.encrypt(content, jwe.parse_public(attested.public_key))
            finally:
                wipe(content)
        raise _being_changed()

    # Around it

    async def ready(self) -> None:
        """Raises: StorageError, IntegrityError where this broker can serve nobody."""
        await self._state(await self._read(state.epoch))

    async def refresh(self) -> None:
        """Take over what changed in the directory of endorsements; where that is of no use, all stays as it was."""
        # The process that watches this one tells the operator.
        with suppress(EncfsError, OSError):
            await asyncio.to_thread(self._endorsements.refresh)

    @property
    def collateral(self) -> list[Collateral]:
        return [one.collateral for one in self._endorsements.store.collateral]

    async def purge(self) -> int:
        """Delete expired sessions, log what was counted, look at the database's clock; how many sessions are left."""

        def work(connection: Connection) -> tuple[int, int]:
            now = self._database.now(connection)
            refusals.settle(connection, self._vault, now)
            return now - _machine_time(), sessions.purge(connection, now)

        self._ahead, left = await self._writer.run(work, durable=True)
        self._crowded = left >= self._settings.max_sessions
        return left

    def _now(self) -> int:
        """The database's clock, near enough: milliseconds since 1970."""
        return _machine_time() + self._ahead

    def _refuse_crowds(self) -> None:
        if self._crowded:
            raise Refusal(429, protocol.ERROR_BUSY, "too many sessions at this time: try again later")

    def _begun(self, cookie: str | None) -> Session:
        if cookie is None:
            raise Refusal(401, protocol.ERROR_REQUEST, "there is no session cookie: authenticate first")
        session = read_cookie(self._vault, cookie)
        if session is None:
            raise _unknown()
        self._refuse_if_over(session)
        return session

    def _refuse_if_over(self, session: Session) -> None:
        if not session.holds_at(self._now()):
            raise _unknown()

    def _of_token(self, token: str) -> str:
        identity = read_token(self._vault, token)
        if identity is None:
            raise Refusal(401, protocol.ERROR_SESSION, "the token is not one of this broker's")
        return identity

    async def _read(self, query: Callable[[Connection], T]) -> T:
        if self._database.is_sqlite:
            # A file in memory: read before a thread would have begun to. One that is locked is waited for in a thread.
            with suppress(StorageError), self._database.reading_at_once() as connection:
                return query(connection)

        def work() -> T:
            with self._database.reading() as connection:
                return query(connection)

        return await self._in_thread(work)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Raises: StorageError where the database does not answer in time, too; the thread goes on waiting for it."""
        try:
            async with asyncio.timeout(TIMEOUT):
                return await asyncio.get_running_loop().run_in_executor(self._readers, work)
        except TimeoutError:
            raise too_late() from None

    async def _state(self, epoch: int | None = None) -> State:
        """The state of the epoch that the database says it is in; of the last one known where it was not asked.

        Raises: IntegrityError, RollbackError.
        """
        known = self._known
        if known is not None and epoch in (None, known.epoch):
            return known
        return await self._in_thread(self._load_state)

    def _load_state(self) -> State:
        with self._lock:
            with self._database.transaction(durable=False) as connection:
                found = state.load_state(connection, self._vault)
            if self._known is not None and found.epoch < self._known.epoch:
                raise RollbackError(
                    f"the database was set back from epoch {self._known.epoch} to {found.epoch}",
                    hint="restore the newest backup and restart the brokers",
                )
            if self._settings.mark is not None and (self._known is None or found.epoch != self._known.epoch):
                check_mark(self._settings.mark, found.epoch)
            self._known = found
            return found

    def _judged(self, offered: Attested, policy: Policy) -> tuple[list[Because], Mapping[str, object]]:
        """Why evidence is no evidence, and what it claims."""
        try:
            verdict = judge_genuineness(
                offered.evidence,
                offered.report_data,
                policy,
                self._endorsements.store,
                demo=self._settings.demo,
                now=datetime.now(UTC),
            )
        except EncfsError as error:  # malformed, or of a kind for which a package is missing
            return [Because("evidence", error.message)], {}
        return [Because(one.code.value, one.message) for one in verdict.reasons], logged_claims(verdict.claims)

    async def _offer(self, session: Session, offered: Attested, client: str, current: State) -> _Changed | None:
        """Attest a session, or refuse its evidence; its nonce is spent in both cases. Raises: Refusal."""
        reasons, claims = self._judged(offered, current.policy)

        def work(connection: Connection) -> _Changed | bool:
            if (epoch := state.epoch(connection)) != current.epoch:
                return _Changed(epoch)
            if not reasons:
                return sessions.attest(connection, session, offered)
            is_first = sessions.refuse(connection, session)
            if is_first:
                refusals.note(
                    connection,
                    self._vault,
                    now=self._database.now(connection),
                    client=client,
                    tee=session.tee,
                    reasons=[one.to_json() for one in reasons],
                    members={**_about(session, offered, client), "claims": claims},
                )
            return is_first

        outcome = await self._writer.run(work, durable=bool(reasons))
        if isinstance(outcome, _Changed):
            return outcome
        if not outcome:
            raise Refusal(401, protocol.ERROR_SESSION, "the session's nonce was used: begin anew")
        if reasons:
            said = "; ".join(one.message for one in reasons)
            raise Refusal(401, protocol.ERROR_EVIDENCE, f"the evidence is not accepted: {said}", code=reasons[0].code)
        return None

    async def _release(self, request: _Request, found: Found) -> bytearray | _Changed:
        """The content to be handed out, its release being in the log. Raises: Refusal."""
        current = await self._state(found.epoch)
        entry, rule = current.entries.get(request.path), current.policy.rule_for(request.path)
        decision = decide(
            Wanted(request.path, request.content_digest, found.version),
            entry,
            rule,
            request.attested.evidence,
            request.attested.report_data,
            self._endorsements.store,
            demo=self._settings.demo,
            now=datetime.now(UTC),
        )
        content = bytearray()
        try:
            if decision.released:
                opened = self._opened(current, request.path, found.row)
                if isinstance(opened, Because):
                    decision = replace(decision, reasons=(opened,))
                else:
                    content = opened
            outcome = await self._writer.run(
                lambda connection: self._decided(connection, current, request, found.version, decision), durable=True
            )
            if isinstance(outcome, _Changed):
                return outcome
            if not outcome.released:
                raise _refusal(outcome)
            if outcome.binding == KeyBinding():
                return bytearray(content)
            return resource_document(content, outcome.binding)
        finally:
            wipe(content)

    def _opened(self, current: State, path: str, row: SealedRow | None) -> bytearray | Because:
        if path not in current.entries:
            return Because("no-key", "the broker has no such key")
        if row is None:  # the list of keys is authenticated, and has it
            return Because("damaged", "the key is missing in the broker's database")
        try:
            return self._vault.open(current.identity(path), row)
        except IntegrityError as error:
            _logger.warning("%s", error)
            return Because("damaged", error.message)

    def _decided(
        self, connection: Connection, current: State, request: _Request, version: int | None, decision: Decision
    ) -> Decision | _Changed:
        """Count and log, in a transaction."""
        if (epoch := state.epoch(connection)) != current.epoch:
            return _Changed(epoch)
        rule = decision.rule
        limit = rule.releases if rule is not None else None
        if decision.released and not count_release(connection, request.path, limit):
            decision = replace(decision, reasons=(Because("releases", f"all {limit} releases were made"),))
        log.append(
            connection,
            self._vault,
            time=self._database.now(connection),
            event="released" if decision.released else "refused",
            path=request.path,
            members={
                **_about(request.session, request.attested, request.client),
                "rule": rule.pattern if rule is not None else None,
                "rule_digest": rule.digest if rule is not None else None,
                "epoch": current.epoch,
                "content_digest": request.content_digest,
                "version": version,
                "min_version": decision.binding.min_version,
                "reasons": [one.to_json() for one in decision.reasons],
                "claims": decision.claims,
            },
        )
        return decision


def _machine_time() -> int:
    return time.time_ns() // 1_000_000


def _message(body: bytes, what: str) -> dict[str, object]:
    try:
        return loads_object(body, limit=protocol.MAX_MESSAGE, what=what)
    except FormatError as error:
        raise Refusal(400, protocol.ERROR_REQUEST, error.message) from None


def _attestation(session: Session, message: dict[str, object]) -> Attested:
    """What a client offers: the session's public key as it came, the evidence, the report data it must carry."""
    try:
        public_key, raw, nonce = protocol.parse_attest_message(message, session.version)
        jwe.parse_public(public_key)
        evidence = from_kbs_evidence(session.tee, raw)
        offered = sessions.bound(session.nonce, session.version, public_key, evidence)
    except FormatError as error:
        raise Refusal(400, protocol.ERROR_REQUEST, error.message) from None
    if nonce is not None and not hmac.compare_digest(nonce.encode(), session.nonce.encode()):
        raise Refusal(401, protocol.ERROR_EVIDENCE, "the nonce is not this session's")
    return offered


def _about(session: Session, offered: Attested, client: str) -> dict[str, object]:
    """Who asked, for the log."""
    return {
        "client": client,
        "session": session.public_name,
        "tee": session.tee,
        "evidence": hashlib.sha256(offered.evidence.content).hexdigest(),
    }


def _unknown(detail: str = "the session is not known, or has expired") -> Refusal:
    return Refusal(401, protocol.ERROR_SESSION, detail)


def _being_changed() -> Refusal:
    return Refusal(503, protocol.ERROR_UNAVAILABLE, "the policy is being changed: try again")


def _refusal(decision: Decision) -> Refusal:
    codes = [one.code for one in decision.reasons]
    if codes == ["no-key"]:
        return Refusal(404, protocol.ERROR_MISSING, "there is no such resource", code="no-key")
    return Refusal(
        401, protocol.ERROR_DENIED, f"the policy does not allow it ({', '.join(dict.fromkeys(codes))})", code=codes[0]
    )
