"""What can be said of a wrapped key without any key: for lists and messages. Untrusted, and shown as such."""

from __future__ import annotations

from encfs.errors import FormatError
from encfs.strictjson import show_name
from imagetool.ocicrypt import jwe, packets, pgp
from imagetool.ocicrypt.options import Element


def describe(element: Element) -> list[str]:
    """One line for each recipient of an element: several for a JWE that has several; one for what is not understood."""
    try:
        if element.scheme == "jwe":
            return [_describe_jwe(recipient) for recipient in jwe.parse(element.content).recipients]
        if element.scheme == "pkcs7":
            from imagetool.ocicrypt import pkcs7  # slow to import

            # One line for all of them: they cannot be removed one by one.
            return ["; ".join(pkcs7.describe(element.content))]
        if element.scheme == "pgp":
            return pgp.describe(element.content)
        if element.scheme == f"provider.{packets.PROVIDER}":
            return [f"key {packets.parse(element.content).kid}"]
    except FormatError as error:
        return [f"malformed: {error.message}"]
    return [f"{len(element.content)} bytes"]


def _describe_jwe(recipient: jwe.JweRecipient) -> str:
    parts = [_text(recipient.alg)]
    epk, kid = recipient.header.get("epk"), recipient.header.get("kid")
    if isinstance(epk, dict):
        parts.append(_text(epk.get("crv")))
    if kid is not None:
        parts.append(f"kid {_text(kid)}")
    return " ".join(parts)


def _text(value: object) -> str:
    return show_name(value).strip("'")
