"""What a client holds of its session: a cookie from its first step on, a token once it attested. Each under a MAC.

    cookie    base64url(VERSION TEE CREATED EXPIRES NONCE, with spaces) and the MAC's 43 characters
    token     a JWT (HS256), since clients of the protocol read its expiry

Nobody but the brokers of one database, which have its KEK, can make either; so a session takes no room in the database
before its evidence was looked at.
"""

from __future__ import annotations

import hmac
import json

from encfs.encoding import b64url_decode, b64url_encode
from encfs.strictjson import loads_object
from imagetool.broker.sessions import Session
from imagetool.broker.vault import Vault

_MAC_CHARACTERS = 43
_HEADER = b64url_encode(b'{"alg":"HS256","typ":"JWT"}')
_MAX_TOKEN = 2048


def write_cookie(vault: Vault, session: Session) -> str:
    parts = (session.version, session.tee, str(session.created), str(session.expires), session.nonce)
    content = b64url_encode(" ".join(parts).encode())
    return content + _mac(vault, "session", content)


def read_cookie(vault: Vault, cookie: str) -> Session | None:
    """The session that a broker wrote; None for anything else. Whether it is over is still to be looked at."""
    content, mac = cookie[:-_MAC_CHARACTERS], cookie[-_MAC_CHARACTERS:]
    if not cookie.isascii() or not hmac.compare_digest(_mac(vault, "session", content), mac):
        return None
    version, tee, created, expires, nonce = b64url_decode(content, "the cookie").decode().split(" ")
    return Session(nonce, version, tee, int(created), int(expires))


def write_token(vault: Vault, session: Session) -> str:
    claims = {"iss": "encfs-broker", "exp": session.expires // 1000, "sid": session.id, "tee": session.tee}
    signed = f"{_HEADER}.{b64url_encode(json.dumps(claims).encode())}"
    return f"{signed}.{_mac(vault, 'token', signed)}"


def read_token(vault: Vault, token: str) -> str | None:
    """The session's id where a broker wrote the token. When it is over stands in its row."""
    signed, _, mac = token.rpartition(".")
    if len(token) > _MAX_TOKEN or not token.isascii() or not hmac.compare_digest(_mac(vault, "token", signed), mac):
        return None
    payload = b64url_decode(signed.rpartition(".")[2], "the token")
    return str(loads_object(payload, limit=_MAX_TOKEN, what="the token")["sid"])


def _mac(vault: Vault, use: str, content: str) -> str:
    return b64url_encode(vault.mac(use, content.encode()))
