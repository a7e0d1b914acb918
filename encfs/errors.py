"""The one exception tree of both packages, with the exit code of each branch.

Every error a user can cause or meet is an `EncfsError`: its message is one line that names what is wrong, its `hint`
the next step, its `exit_code` what a command exits with (`docs/cli.md` lists them). Anything else that escapes is a
bug.

    EncfsError                      1
    |- UsageError                   2   an option or argument is wrong
    |- NotFoundError                3   a reference, file, tag or path does not exist
    |- ConflictError                4   the destination exists, or changed underneath
    |- SourceError                  5   an input to encrypt cannot be read or represented
    |- StorageError                 6   disk full, I/O error, permission on local storage
    |- UnsupportedError             7   well-formed, but a version, feature or platform that is not supported
    |- FormatError                 10   malformed artifact, descriptor, tree, keyring, image
    |- IntegrityError              11   well-formed, but the bytes are not those the root commits to
    |- KeyFileError                20   a key file or key URI is malformed or unusable
    |- MissingKeyError             21   no key was given where one is needed
    |- WrongKeyError               22   the keys that were given open no recipient
    |- KeyProviderError            23   a key provider failed or is not available
    |  `- KeyRefusedError          24   it refuses: measurements, policy or counter are not those agreed
    |- TrustError                  30   base of the refusals below
    |  |- UnsignedError            30   no signature, and nothing pinned
    |  |- WrongSignerError         31   signed, but by no trusted key
    |  |- WrongIdError             32   trusted signature, another artifact's id
    |  |- RollbackError            33   version below the floor
    |  `- PinError                 34   content digest is not the pinned one
    |- MountError                  40   FUSE cannot be used, or the mount point is unfit
    |  `- NotMountedError          41   nothing of ours is mounted there
    |- TransportError              50   a registry or network failed after bounded retries
    |  |- AuthenticationError      51   the registry refused the credentials
    |  `- TransportTimeoutError    52   no answer within the time allowed
    |- AttestationError            60   no evidence could be collected on this machine
    |- EvidenceRefusedError        61   evidence is not genuine, or does not show what was asked for
    `- (ended by signal N:  128 + N)
"""

from __future__ import annotations

from typing import ClassVar


class EncfsError(Exception):
    """Base of all errors of this project.

    `message` is one line without a trailing full stop; `hint`, where there is one, says what to do next.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.hint)


def _rebuild(kind: type[EncfsError], message: str, hint: str | None) -> EncfsError:
    return kind(message, hint=hint)


class UsageError(EncfsError):
    """An option or argument is wrong or contradicts another."""

    exit_code = 2


class NotFoundError(EncfsError):
    """A reference, file, tag or path does not exist."""

    exit_code = 3


class ConflictError(EncfsError):
    """The destination already exists, or changed underneath the operation."""

    exit_code = 4


class SourceError(EncfsError):
    """An input to encrypt cannot be read, changed while it was read, or cannot be represented."""

    exit_code = 5


class StorageError(EncfsError):
    """Local storage failed: disk full, I/O error, permission."""

    exit_code = 6


class UnsupportedError(EncfsError):
    """Well-formed, but of a version, feature or platform that is not supported."""

    exit_code = 7


class FormatError(EncfsError):
    """Malformed artifact, descriptor, tree, keyring, signature or image."""

    exit_code = 10


class IntegrityError(EncfsError):
    """Well-formed, but the bytes are not those that the root commits to."""

    exit_code = 11


class KeyFileError(EncfsError):
    """A key file or key URI is malformed, or of a kind that does not fit its use."""

    exit_code = 20


class MissingKeyError(EncfsError):
    """No key was given where one is needed."""

    exit_code = 21


class WrongKeyError(EncfsError):
    """The keys that were given open no recipient of the keyring."""

    exit_code = 22


class KeyProviderError(EncfsError):
    """A key provider failed or is not available on this machine."""

    exit_code = 23


class KeyRefusedError(KeyProviderError):
    """A key provider refused: measurements, policy or counter are not those agreed upon."""

    exit_code = 24


class TrustError(EncfsError):
    """The artifact's origin was not accepted. Holding a key never proves origin."""

    exit_code = 30


class UnsignedError(TrustError):
    """The artifact is neither pinned nor signed, or no trust option was given."""


class WrongSignerError(TrustError):
    """Signed, but by no trusted key."""

    exit_code = 31


class WrongIdError(TrustError):
    """Signed by a trusted key, but of another line of releases than the expected one."""

    exit_code = 32


class RollbackError(TrustError):
    """The artifact's version is below the floor."""

    exit_code = 33


class PinError(TrustError):
    """The content digest is not the pinned one."""

    exit_code = 34


class MountError(EncfsError):
    """FUSE cannot be used here, or the mount point is unfit."""

    exit_code = 40


class NotMountedError(MountError):
    """Nothing of ours is mounted at the given place."""

    exit_code = 41


class TransportError(EncfsError):
    """A registry or the network failed after bounded retries."""

    exit_code = 50


class AuthenticationError(TransportError):
    """The registry refused the credentials, or wants some and none were found."""

    exit_code = 51


class TransportTimeoutError(TransportError):
    """No answer within the time allowed."""

    exit_code = 52


class AttestationError(EncfsError):
    """No evidence, or no key, could be had from the hardware or platform interface of this machine."""

    exit_code = 60


class EvidenceRefusedError(EncfsError):
    """Evidence is not genuine, or does not show what the policy asks for."""

    exit_code = 61


def error_named(name: object, message: str, hint: str | None) -> EncfsError:
    """The error that another process of this project tells of; a MountError where there is none of that name."""
    kind = globals().get(name) if isinstance(name, str) else None
    if not isinstance(kind, type) or not issubclass(kind, EncfsError):
        kind = MountError
    return kind(message, hint=hint)
