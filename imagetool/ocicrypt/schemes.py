"""Who can open a layer: the two sides of a scheme, and trying keys on the wrapped private options of a layer.

A scheme is the last part of an annotation's name: `jwe`, `pkcs7`, `pgp`, `provider.NAME`. Which text on a command line
means which of them is `keys`' to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from encfs.errors import EncfsError, MissingKeyError, WrongKeyError
from encfs.keys.secrets import wipe
from encfs.strictjson import show_name
from imagetool.ocicrypt.options import Element, Encryption, LayerKey, parse_private_options

#: How many failures a message tells.
_SHOWN_FAILURES = 4


class Recipient(Protocol):
    """Somebody to encrypt to."""

    @property
    def scheme(self) -> str: ...

    def wrap(self, options: bytearray) -> bytes:
        """The element for the annotation of the scheme. Raises: KeyProviderError, UsageError."""

    def close(self) -> None:
        """Forget every secret; harmless when called again."""


class Opener(Protocol):
    """A key that may open layers, or something that has one."""

    @property
    def name(self) -> str:
        """Its name in messages; it holds no secret."""

    def handles(self, scheme: str) -> bool: ...

    def unwrap(self, element: Element) -> bytearray:
        """The private options, which the caller wipes.

        Raises: WrongKeyError where they are for another key; FormatError; KeyProviderError and others where the key
        could not be had.
        """

    def close(self) -> None:
        """Forget every secret; harmless when called again."""


def wrapped_for(recipients: Sequence[Recipient], options: bytearray) -> list[Element]:
    """One element for every recipient. Raises: what the recipients raise."""
    return [Element(recipient.scheme, recipient.wrap(options)) for recipient in recipients]


def open_layer(encryption: Encryption, openers: Sequence[Opener], what: str) -> tuple[LayerKey, bytearray]:
    """The layer's key and the private options that hold it, both wiped by the caller; `what` names the layer.

    The openers are asked in order, each about every element of its schemes; the first that opens one decides.

    Raises: MissingKeyError without openers; WrongKeyError where none fits, saying what was tried; another error of an
    opener where one failed and none fits; FormatError where what was opened is malformed.
    """
    if not openers:
        raise MissingKeyError("no key was given to open the image", hint="pass one with -k KEYURI")
    failures: list[EncfsError] = []
    for opener in openers:
        for element in encryption.elements:
            if not opener.handles(element.scheme):
                continue
            try:
                options = opener.unwrap(element)
            except EncfsError as error:
                failures.append(error)
                continue
            try:
                return parse_private_options(options), options
            except BaseException:
                wipe(options)
                raise
    raise _no_key(encryption, openers, failures, what)


def _no_key(encryption: Encryption, openers: Sequence[Opener], failures: Sequence[EncfsError], what: str) -> EncfsError:
    schemes = ", ".join(sorted({show_name(element.scheme)[1:-1] for element in encryption.elements})) or "nobody"
    if not failures:
        names = ", ".join(opener.name for opener in openers)
        return WrongKeyError(
            f"{what} is encrypted for {schemes}, which {names} cannot open",
            hint="see who can with: imagetool ocicrypt recipients list",
        )
    # One that failed outranks those that merely do not fit: it may have been the right one.
    first = next((failure for failure in failures if not isinstance(failure, WrongKeyError)), failures[0])
    reasons = "; ".join(dict.fromkeys(failure.message for failure in failures[:_SHOWN_FAILURES]))
    return type(first)(f"no key opens {what} (encrypted for {schemes}): {reasons}", hint=first.hint)
