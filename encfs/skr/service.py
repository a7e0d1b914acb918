"""JSON over HTTP to Azure's services: one exchange, with what each refusal means said in one line."""

from __future__ import annotations

import json
from collections.abc import Mapping

from encfs.errors import FormatError, KeyProviderError, KeyRefusedError, TransportError
from encfs.strictjson import loads_object
from encfs.webclient import Address, Answer, Deadline, WebClient, tls_context

_MAX_ANSWER = 1 << 20
_SHOWN = 300


def ask(
    address: Address,
    method: str,
    path: str,
    body: Mapping[str, object] | None,
    *,
    deadline: Deadline,
    service: str,
    ca_file: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> dict[str, object]:
    """The object that a service answers with. `service` names it in messages.

    Raises: KeyRefusedError where it refuses (400, 401, 403); KeyProviderError for everything else.
    """
    context = tls_context(ca_file) if address.scheme == "https" else None
    content = json.dumps(body).encode() if body is not None else None
    sent = {**({"Content-Type": "application/json"} if body is not None else {}), **(headers or {})}
    try:
        with WebClient(address, deadline, context=context) as client:
            answer = client.exchange(method, path, body=content, headers=sent, limit=_MAX_ANSWER)
    except TransportError as error:
        raise KeyProviderError(f"{service} gives no answer: {error.message}", hint=error.hint) from None
    if answer.status != 200:
        kind = KeyRefusedError if answer.status in (400, 401, 403) else KeyProviderError
        raise kind(f"{service} refuses with status {answer.status}{_said(answer)}")
    try:
        return loads_object(answer.body, limit=_MAX_ANSWER, what="the answer")
    except FormatError as error:
        raise KeyProviderError(f"{service} answers with something that is no JSON object: {error.message}") from None


def text_member(document: Mapping[str, object], name: str, service: str) -> str:
    """Raises: KeyProviderError where the member is missing or no text."""
    value = document.get(name)
    if not isinstance(value, str) or not value:
        raise KeyProviderError(f"{service} answers without {name}")
    return value


def _said(answer: Answer) -> str:
    """What an error's body says: `error`, as text or with a `message`, printable and cut short."""
    try:
        error = loads_object(answer.body, limit=_MAX_ANSWER, what="the error").get("error")
    except FormatError:
        return ""
    text = error.get("message") if isinstance(error, dict) else error
    if not isinstance(text, str):
        return ""
    return ": " + "".join(one if one.isprintable() else " " for one in text)[:_SHOWN]
