"""Whether an artifact's origin is accepted: pins, trusted signers, ids and version floors.

Anyone can encrypt to a public key and any recipient can wrap the keys anew, so holding a key never proves origin. The
rules:

1. Something must vouch for the content: a pin that equals its digest, or a signature by a trusted key together with
   the expected id. Only `allow_unsigned` stands in for that.
2. Everything that was given must hold, whatever else does: the pin, a signature by one of the keys, the id, the floor.
   So every option but `allow_unsigned` can only add refusals, and `allow_unsigned` takes none of the others back.
3. A trusted key without an expected id is a usage error: the signer's other artifacts would pass too. An id or a floor
   with nothing to vouch for them is one as well: they would be read from what anyone may have written.

A policy must come from measured configuration or local arguments. What arrives with a key, from a registry or from pod
attributes may only add refusals to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from encfs.encoding import parse_digest, sha256_digest
from encfs.errors import (
    ConflictError,
    FormatError,
    PinError,
    RollbackError,
    UnsignedError,
    UsageError,
    WrongIdError,
)
from encfs.keys.jwk import PublicKey, Use
from encfs.signatures import verify
from encfs.strictjson import MAX_INTEGER, show_name

_HOW = "pass --pin sha256:..., or --trust KEY with --id NAME, or --allow-unsigned to go without any proof of origin"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustPolicy:
    """What a reader accepts. The default accepts nothing.

    `pin` is a content digest (`sha256:<64 lower-case hex>`), `keys` the public keys of trusted signers, `artifact_id`
    the expected `id`, `min_version` the lowest accepted `version` (inclusive).

    Raises: UsageError for a malformed pin or floor and for combinations that rule 3 forbids; KeyFileError for a key
    that does not verify signatures.
    """

    pin: str | None = None
    keys: tuple[PublicKey, ...] = ()
    artifact_id: str | None = None
    min_version: int | None = None
    allow_unsigned: bool = False

    def __post_init__(self) -> None:
        if self.pin is not None:
            parse_pin(self.pin)
        for key in self.keys:
            key.require(Use.SIGN, f"the trusted key {key.kid}")
        if self.min_version is not None and not 0 <= self.min_version <= MAX_INTEGER:
            raise UsageError(f"the version floor {self.min_version} is not between 0 and 2^53-1")
        if self.keys and self.artifact_id is None:
            raise UsageError(
                "a trusted key was given without the artifact's id: everything its owner signs would be accepted",
                hint="add --id NAME",
            )
        if not self._vouched and (self.artifact_id is not None or self.min_version is not None):
            raise UsageError(
                "an id or a version floor proves nothing by itself", hint="add --trust KEY or --pin DIGEST"
            )

    @property
    def _vouched(self) -> bool:
        return self.pin is not None or bool(self.keys) or self.allow_unsigned


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyBinding:
    """What came with a key about the artifacts that it may open: refusals on top of the reader's own policy.

    `artifact_id` is the one id, `min_version` the lowest version (inclusive), `pins` the content digests one of which
    it must be. What is None or empty asks for nothing; nothing in here accepts anything.
    """

    artifact_id: str | None = None
    min_version: int | None = None
    pins: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Origin:
    """Why an artifact was accepted.

    `pinned`: by its content digest; `signer`: thumbprint of the trusted key that signed it; `warnings`: lines to show.
    """

    content_digest: str
    pinned: bool
    signer: str | None
    warnings: tuple[str, ...]

    @property
    def proven(self) -> bool:
        """False where the artifact was accepted by `allow_unsigned` alone."""
        return self.pinned or self.signer is not None

    def __str__(self) -> str:
        if not self.proven:
            return "unproven"
        reasons = ["pinned"] if self.pinned else []
        return ", ".join([*reasons, f"signed by {self.signer}"] if self.signer else reasons)


def require_accepted(binding: KeyBinding, *, artifact_id: str | None, version: int, key_name: str) -> None:
    """Before an artifact is encrypted to a key: that whoever gets the key with its refusals accepts it.

    `artifact_id` is None for an id of its own. Pins are about content that does not exist yet. Raises: ConflictError,
    RollbackError.
    """
    if binding.artifact_id not in (None, artifact_id):
        other = "a new id" if artifact_id is None else f"the id {show_name(artifact_id)}"
        raise ConflictError(
            f"the key {key_name} is for the artifact {show_name(binding.artifact_id)}: whoever gets it refuses {other}",
            hint=f"--id {binding.artifact_id} is accepted; or encrypt to a key of its own",
        )
    if binding.min_version is not None and version < binding.min_version:
        raise RollbackError(
            f"version {version} is below the floor {binding.min_version} of the key {key_name}: whoever gets it "
            "refuses it",
            hint=f"--artifact-version {binding.min_version} or later is accepted",
        )


def check_binding(binding: KeyBinding, *, content_digest: str, artifact_id: str, version: int, key_name: str) -> None:
    """Refuse an artifact that the key was not released for; `key_name` names the key in messages.

    Call after `check_trust`, never instead of it: the key's own source may be as hostile as the artifact's.

    Raises: PinError, WrongIdError, RollbackError.
    """
    if binding.pins and content_digest not in binding.pins:
        raise PinError(
            f"the content digest {content_digest} is none of those that came with the key {key_name}",
            hint="the owner released the key for other content; fetch the current artifact",
        )
    if binding.artifact_id is not None and binding.artifact_id != artifact_id:
        raise WrongIdError(
            f"the artifact's id is {show_name(artifact_id)}, but the key {key_name} was released for "
            f"{show_name(binding.artifact_id)}",
            hint="another artifact may have been put in its place; check the reference and the key's policy",
        )
    if binding.min_version is not None and version < binding.min_version:
        raise RollbackError(
            f"the artifact's version {version} is below the floor {binding.min_version} that came with the key "
            f"{key_name}",
            hint="fetch the current version; an old one may have been put in its place",
        )


def parse_pin(text: str) -> str:
    """A pin as it was given, if it is `sha256:<64 lower-case hex>`. Raises: UsageError."""
    try:
        parse_digest(text, "the pin")
    except FormatError as error:
        raise UsageError(error.message, hint="take the content_digest that imagetool encrypt --json printed") from None
    return text


def check_trust(
    content: bytes, artifact_id: str, version: int, envelopes: Sequence[bytes], policy: TrustPolicy
) -> Origin:
    """Decide on the origin of the config blob `content`, whose `id` and `version` are given as it states them.

    `envelopes` are the bytes of the artifact's DSSE envelopes. The content digest is computed here.

    Raises: PinError, UnsignedError, WrongSignerError, WrongIdError, RollbackError; FormatError for too many envelopes.
    """
    digest = sha256_digest(content)
    warnings: list[str] = []
    if policy.pin is not None and policy.pin != digest:
        raise PinError(
            f"the content digest is {digest}, not the pinned {policy.pin}",
            hint="the artifact was replaced, or the pin is another version's",
        )
    signer: str | None = None
    if policy.keys:
        verified = verify(envelopes, content, policy.keys)
        signer = verified.signer.kid
        warnings.extend(verified.malformed)
    elif policy.pin is None and not policy.allow_unsigned:
        raise UnsignedError("nothing was given that proves the artifact's origin", hint=_HOW)
    if policy.artifact_id is not None and artifact_id != policy.artifact_id:
        raise WrongIdError(
            f"the artifact's id is {show_name(artifact_id)}, not the expected {show_name(policy.artifact_id)}",
            hint="another artifact of the same owner may have been put in its place; check --id and the reference",
        )
    if policy.min_version is not None and version < policy.min_version:
        raise RollbackError(
            f"the artifact's version {version} is below the floor {policy.min_version}",
            hint="fetch the current version; an old one may have been put in its place",
        )
    if policy.min_version is None and policy.pin is None and policy.keys:
        warnings.append("no version floor: an older version that was signed once would be accepted (--min-version N)")
    if policy.pin is None and signer is None:
        warnings.append("the artifact's origin is not proven (--allow-unsigned): anyone may have written it")
    return Origin(digest, policy.pin is not None, signer, tuple(warnings))
