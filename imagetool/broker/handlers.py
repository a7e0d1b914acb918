"""The three steps of a handshake, without HTTP: messages in, answers or refusals out. Runs in threads.

Every state between the steps is in the database. A key leaves only after the decision is in the log, on the disk.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from sqlalchemy import Connection, select, update

from encfs.attestation.kbs import from_kbs_evidence, kind_of_tee
from encfs.encoding import b64url_decode, b64url_encode, parse_digest
from encfs.errors import EncfsError, FormatError, IntegrityError, RollbackError
from encfs.kbs import jwe, protocol
from encfs.kbs.resource import resource_document
from encfs.keys.secrets import wipe
from encfs.strictjson import loads_object
from encfs.trust import KeyBinding
from imagetool.broker import log, sessions, state
from imagetool.broker.database import Database
from imagetool.broker.decisions import Because, Decision, Wanted, decide, judge_genuineness, logged_claims
from imagetool.broker.endorsements import EndorsementStore
from imagetool.broker.policy import Policy
from imagetool.broker.rollback import CounterMark, check_mark
from imagetool.broker.sessions import Attested, Session
from imagetool.broker.state import State
from imagetool.broker.tables import RESOURCES, VERSIONS
from imagetool.broker.vault import SealedRow, Vault
from imagetool.broker.writer import Writer

_MAX_DETAIL = 400
#: How often a decision is made anew because the owner changed something in between.
_ATTEMPTS = 5
_TOKEN_HEADER = b64url_encode(b'{"alg":"HS256","typ":"JWT"}')
_MAX_TOKEN = 2048

_logger = logging.getLogger(__name__)


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
class _Found:
    """What the database has for a request: the epoch, the key's sealed row, the version of the content asked for."""

    epoch: int
    row: SealedRow | None
    version: int | None


class Broker:
    """The steps, for one process. Safe for several threads."""

    def __init__(self, database: Database, vault: Vault, store: EndorsementStore, settings: Settings) -> None:
        self._database, self._vault, self._store, self._settings = database, vault, store, settings
        self._writer = Writer(database)
        self._lock = threading.Lock()
        self._known: State | None = None
        self._crowded = False

    def close(self) -> None:
        self._writer.close()
        self._database.close()

    # The protocol

    def auth(self, body: bytes) -> tuple[str, dict[str, object]]:
        """The session's id for the cookie, and the challenge."""
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
        if self._crowded:
            raise Refusal(429, protocol.ERROR_BUSY, "too many sessions at this time: try again later")
        lifetime = self._settings.session_lifetime * 1000
        session = self._writer.run(
            lambda connection: sessions.create(connection, str(version), tee, self._database.now(connection), lifetime)
        )
        return session.id, {"nonce": session.nonce, "extra-params": ""}

    def attest(self, identity: str | None, body: bytes, client: str) -> dict[str, object]:
        """The answer with a token, once the evidence is genuine and bound to this session."""
        with self._database.reading() as connection:
            session = self._session(connection, identity)
            epoch = state.epoch(connection)
        if session.attested is not None:
            raise _spent()
        offered = _attestation(session, _message(body, "the attestation"))
        reasons, claims = self._judged(offered, self._state(epoch).policy)
        if reasons:
            self._writer.run(
                lambda connection: self._refuse_evidence(connection, session, offered, reasons, claims, client),
                durable=True,
            )
            said = "; ".join(one.message for one in reasons)
            raise Refusal(401, protocol.ERROR_EVIDENCE, f"the evidence is not accepted: {said}", code=reasons[0].code)
        if not self._writer.run(lambda connection: sessions.attest(connection, session.id, offered)):
            raise _spent()
        return {"token": self._token(session)}

    def resource(
        self, identity: str | None, token: str | None, path: str, content_digest: str | None, client: str
    ) -> dict[str, str]:
        """The JWE of a resource. `identity` is the cookie, `token` what `attest` gave; one of them is needed."""
        try:
            wanted_path = str(protocol.parse_path(path))
            if content_digest is not None:
                parse_digest(content_digest, protocol.DIGEST_PARAMETER)
        except FormatError as error:
            raise Refusal(400, protocol.ERROR_REQUEST, error.message) from None
        identity = self._of_token(token) if identity is None and token is not None else identity
        for _ in range(_ATTEMPTS):
            with self._database.reading() as connection:
                session = self._session(connection, identity)
                found = self._look_up(connection, wanted_path, content_digest)
            if session.attested is None:
                raise Refusal(401, protocol.ERROR_REQUEST, "the session is not attested: send evidence first")
            content = self._release(_Request(session, session.attested, wanted_path, content_digest, client), found)
            if content is not None:
                break
        else:
            raise Refusal(503, protocol.ERROR_UNAVAILABLE, "the policy is being changed: try again")
        try:
            return jwe.encrypt(content, jwe.parse_public(session.attested.public_key))
        finally:
            wipe(content)

    # Around it

    def ready(self) -> None:
        """Raises: StorageError, IntegrityError where this broker can serve nobody."""
        with self._database.reading() as connection:
            epoch = state.epoch(connection)
        self._state(epoch)

    def purge(self) -> int:
        """Delete expired sessions; how many are left."""
        left = self._writer.run(lambda connection: sessions.purge(connection, self._database.now(connection)))
        self._crowded = left >= self._settings.max_sessions
        return left

    def _session(self, connection: Connection, identity: str | None) -> Session:
        if identity is None:
            raise Refusal(401, protocol.ERROR_REQUEST, "there is no session cookie: authenticate first")
        found = sessions.find(connection, identity, self._database.now(connection))
        if found is None:
            raise Refusal(401, protocol.ERROR_SESSION, "the session is not known, or has expired")
        return found

    def _state(self, epoch: int) -> State:
        """The state of the epoch that the database says it is in. Raises: IntegrityError, RollbackError."""
        known = self._known
        if known is not None and known.epoch == epoch:
            return known
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
                self._store,
                demo=self._settings.demo,
                now=datetime.now(UTC),
            )
        except EncfsError as error:  # malformed, or of a kind for which a package is missing
            return [Because("evidence", error.message)], {}
        return [Because(one.code.value, one.message) for one in verdict.reasons], logged_claims(verdict.claims)

    def _release(self, request: _Request, found: _Found) -> bytearray | None:
        """The content to be handed out, its release being in the log; None where the owner changed something."""
        current = self._state(found.epoch)
        entry, rule = current.entries.get(request.path), current.policy.rule_for(request.path)
        decision = decide(
            Wanted(request.path, request.content_digest, found.version),
            entry,
            rule,
            request.attested.evidence,
            request.attested.report_data,
            self._store,
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
            outcome = self._writer.run(
                lambda connection: self._decided(connection, current, request, found.version, decision), durable=True
            )
            if outcome is None:
                return None
            if not outcome.released:
                raise _refusal(outcome)
            if outcome.binding == KeyBinding():
                return bytearray(content)
            return resource_document(content, outcome.binding)
        finally:
            wipe(content)

    def _look_up(self, connection: Connection, path: str, content_digest: str | None) -> _Found:
        columns = (RESOURCES.c.nonce, RESOURCES.c.sealed)
        row = connection.execute(select(*columns).where(RESOURCES.c.path == path)).one_or_none()
        version = None
        if content_digest is not None:
            version = connection.execute(
                select(VERSIONS.c.version).where(VERSIONS.c.content_digest == content_digest)
            ).scalar()
        # The epoch last: where it changed since, the decision is not valid, and is made anew.
        sealed = SealedRow(row.nonce, row.sealed) if row is not None else None
        return _Found(state.epoch(connection), sealed, version)

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
    ) -> Decision | None:
        """Count and log, in a transaction. None: the owner changed something, and the decision is not valid."""
        if state.epoch(connection) != current.epoch:
            return None
        rule = decision.rule
        if decision.released and not self._counted(connection, request.path, decision):
            limit = rule.releases if rule is not None else None
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

    def _counted(self, connection: Connection, path: str, decision: Decision) -> bool:
        change = update(RESOURCES).where(RESOURCES.c.path == path).values(releases=RESOURCES.c.releases + 1)
        if decision.rule is not None and decision.rule.releases is not None:
            change = change.where(RESOURCES.c.releases < decision.rule.releases)
        return connection.execute(change).rowcount == 1

    def _refuse_evidence(
        self,
        connection: Connection,
        session: Session,
        offered: Attested,
        reasons: list[Because],
        claims: Mapping[str, object],
        client: str,
    ) -> None:
        sessions.end(connection, session.id)
        members = {"reasons": [one.to_json() for one in reasons], "claims": claims}
        log.append(
            connection,
            self._vault,
            time=self._database.now(connection),
            event="refused-evidence",
            path="",
            members=_about(session, offered, client) | members,
        )

    # Tokens: the session under a MAC, as a JWT, since clients of the protocol read its expiry.

    def _token(self, session: Session) -> str:
        claims = {"iss": "encfs-broker", "exp": session.expires // 1000, "sid": session.id, "tee": session.tee}
        signed = f"{_TOKEN_HEADER}.{b64url_encode(json.dumps(claims).encode())}"
        return f"{signed}.{b64url_encode(self._vault.mac('token', signed.encode()))}"

    def _of_token(self, token: str) -> str:
        """The session's id. Its expiry is the session's, which is looked at in the database."""
        wrong = Refusal(401, protocol.ERROR_SESSION, "the token is not one of this broker's")
        signed, _, mac = token.rpartition(".")
        if len(token) > _MAX_TOKEN or not token.isascii():
            raise wrong
        if not hmac.compare_digest(b64url_encode(self._vault.mac("token", signed.encode())), mac):
            raise wrong
        payload = b64url_decode(signed.rpartition(".")[2], "the token")
        return str(loads_object(payload, limit=_MAX_TOKEN, what="the token")["sid"])


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


def _spent() -> Refusal:
    return Refusal(401, protocol.ERROR_SESSION, "the session's nonce was used: begin anew")


def _refusal(decision: Decision) -> Refusal:
    codes = [one.code for one in decision.reasons]
    if codes == ["no-key"]:
        return Refusal(404, protocol.ERROR_MISSING, "there is no such resource", code="no-key")
    return Refusal(
        401, protocol.ERROR_DENIED, f"the policy does not allow it ({', '.join(dict.fromkeys(codes))})", code=codes[0]
    )
