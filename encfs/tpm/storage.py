"""A session with a TPM that nobody on the way can read or change, and objects opened through it under their policy.

Every session is salted to the storage root key (SRK): only the TPM that holds it knows the session's key, which
authenticates each answer and encrypts what is secret in it. Which TPM that must be is known by the SRK's name, a hash
of its public key, which stands in every file that was made before. The first time it is taken as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tpm2_pytss import (
    ESAPI,
    ESYS_TR,
    TPM2_ALG,
    TPM2_EO,
    TPM2_SE,
    TPM2B_ECC_PARAMETER,
    TPM2B_PRIVATE,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPMA_SESSION,
    TPML_DIGEST,
    TPML_PCR_SELECTION,
    TPMS_SIGNATURE_ECC,
    TPMT_PUBLIC,
    TPMT_PUBLIC_PARMS,
    TPMT_SIGNATURE,
    TPMT_SYM_DEF,
    TPMU_SIGNATURE,
)

from encfs.errors import KeyFileError, KeyProviderError, KeyRefusedError
from encfs.tpm import structures
from encfs.tpm.connection import HANDLE, NOT_IMPLEMENTED, NV_UNINITIALIZED, PCR, VALUE, flushed, opened_tpm, translated
from encfs.tpm.policy import Approval, Authorization, CounterLimit, PcrValues, Policy, differing

if TYPE_CHECKING:
    from encfs.tpm.keyfile import TpmObject

#: Where the storage root key persists on machines that were set up so (TCG Provisioning Guidance, 7.8).
PERSISTENT_ROOT = 0x81000001

_OFFSET_OF_ATTRIBUTES = 4


class Storage:
    """A TPM with its storage root key, and an HMAC session salted to it. Made by `opened_storage`; not thread-safe."""

    def __init__(self, tpm: ESAPI, root: ESYS_TR, root_handle: int | None, session: ESYS_TR) -> None:
        self.tpm = tpm
        self.root = root
        self.root_handle = root_handle
        self.root_name = _name(tpm, root)
        self._session = session

    def session(self) -> ESYS_TR:
        """The session, set to encrypt the first parameter in both directions."""
        flags = TPMA_SESSION.CONTINUESESSION | TPMA_SESSION.DECRYPT | TPMA_SESSION.ENCRYPT
        self.tpm.trsess_set_attributes(self._session, flags, 0xFF)
        return self._session

    def answers_encrypted(self) -> ESYS_TR:
        """The session for commands whose own parameters cannot be encrypted."""
        flags = TPMA_SESSION.CONTINUESESSION | TPMA_SESSION.ENCRYPT
        self.tpm.trsess_set_attributes(self._session, flags, 0xFF)
        return self._session

    def authenticated(self) -> ESYS_TR:
        """The session for commands with nothing that can be encrypted: answers are authenticated all the same."""
        self.tpm.trsess_set_attributes(self._session, TPMA_SESSION.CONTINUESESSION, 0xFF)
        return self._session

    def audited(self) -> ESYS_TR:
        """The session for commands that need no authorisation: their answers are authenticated all the same."""
        self.tpm.trsess_set_attributes(self._session, TPMA_SESSION.CONTINUESESSION | TPMA_SESSION.AUDIT, 0xFF)
        return self._session

    def read_pcrs(self, bank: str, indices: Iterator[int] | list[int]) -> PcrValues:
        """The present values. Raises: KeyProviderError where the TPM has no such bank."""
        wanted = sorted(indices)
        values: dict[int, bytes] = {}
        with translated("read its PCRs"):
            while missing := [index for index in wanted if index not in values]:
                selection, _ = TPML_PCR_SELECTION.unmarshal(structures.pcr_selection(bank, missing))
                _, read, digests = self.tpm.pcr_read(selection, session1=self.audited())
                found = [index for index in missing if _selects(bytes(read.marshal()), bank, index)]
                if not found or len(found) != int(digests.count):
                    raise KeyProviderError(
                        f"the TPM has no values of the PCR bank {bank}",
                        hint="see which banks it has: tpm2_getcap pcrs",
                    )
                values |= {index: bytes(digest) for index, digest in zip(found, digests, strict=False)}
        return PcrValues(bank, values)

    def create(self, template: bytes, secret: bytearray | None = None) -> tuple[bytes, bytes]:
        """A new object under the root: its public area and its private part, encrypted by the TPM.

        `secret` is what to seal, which goes to the TPM encrypted; None: the TPM makes the key.
        """
        public, _ = TPMT_PUBLIC.unmarshal(template)
        sensitive = TPM2B_SENSITIVE_CREATE()
        if secret is not None:
            sensitive.sensitive.data = bytes(secret)
        private, made, _, _, _ = self.tpm.create(
            self.root, sensitive, TPM2B_PUBLIC(publicArea=public), session1=self.session()
        )
        return bytes(made.publicArea.marshal()), bytes(private)

    def makes(self, template: bytes) -> bool:
        """Whether this TPM knows the algorithms and sizes of a template."""
        public, _ = TPMT_PUBLIC.unmarshal(template)
        unknown = KeyProviderError("the TPM does not know it")
        try:
            with translated("ask what it makes", dict.fromkeys(NOT_IMPLEMENTED, unknown)):
                self.tpm.test_parms(TPMT_PUBLIC_PARMS(type=public.type, parameters=public.parameters))
        except KeyProviderError as error:
            if error is unknown:
                return False
            raise
        return True

    @contextmanager
    def loaded(self, found: TpmObject) -> Iterator[ESYS_TR]:
        """An object of a file. Raises: KeyProviderError where the TPM does not take it."""
        area, _ = TPMT_PUBLIC.unmarshal(found.public)
        with translated("load the object"):
            handle = self.tpm.load(
                self.root, TPM2B_PRIVATE(found.private), TPM2B_PUBLIC(publicArea=area), session1=self.session()
            )
        with flushed(self.tpm, handle):
            yield handle

    @contextmanager
    def satisfied(self, policy: Policy) -> Iterator[ESYS_TR]:
        """A session in which the policy was carried out, good for one use of an object.

        Raises: KeyRefusedError, with what differs, where it is not met now.
        """
        expected, approval = self._choose(policy)
        with flushed(self.tpm, self._start(TPM2_SE.POLICY)) as session:
            selection, _ = TPML_PCR_SELECTION.unmarshal(expected.selection)
            changed = KeyRefusedError("the PCRs changed while the policy was carried out", hint="try again")
            with translated("check its PCRs", {VALUE: changed, PCR: changed}):
                self.tpm.policy_pcr(session, expected.composite(), selection)
            if approval is not None and policy.authorization is not None:
                self._authorize(session, policy.authorization, approval)
            branches = policy.branches
            if len(branches) > 1:
                with translated("combine the policy"):
                    self.tpm.policy_or(session, TPML_DIGEST(branches))
            if policy.counter is not None:
                self._check_counter(session, policy.counter)
            self.tpm.trsess_set_attributes(
                session, TPMA_SESSION.CONTINUESESSION | TPMA_SESSION.ENCRYPT | TPMA_SESSION.DECRYPT, 0xFF
            )
            yield session

    def _choose(self, policy: Policy) -> tuple[PcrValues, Approval | None]:
        """The alternative that fits the present values: those at sealing (None), or an approved one."""
        approvals = policy.authorization.approvals if policy.authorization is not None else ()
        alternatives: list[tuple[PcrValues, Approval | None]] = [(one.pcrs, one) for one in approvals]
        if policy.pcrs is not None:
            alternatives.insert(0, (policy.pcrs, None))
        nearest: list[tuple[int, str, list[int]]] = []
        for pcrs, approval in alternatives:
            different = differing(pcrs, self.read_pcrs(pcrs.bank, list(pcrs.values)))
            if not different:
                return pcrs, approval
            nearest.append((len(different), pcrs.bank, different))
        if not nearest:
            raise KeyRefusedError(
                "no PCR values have been approved yet", hint="approve the present ones with encfs approve"
            )
        _, bank, different = min(nearest)
        which = f"{'PCR' if len(different) == 1 else 'PCRs'} {', '.join(map(str, different))} ({bank})"
        where = "those at sealing" if policy.pcrs is not None and len(alternatives) == 1 else "any that were approved"
        raise KeyRefusedError(
            f"{which} differ from {where}: the machine was not started as it was then",
            hint="start what was sealed to; or seal again, or approve the new values with encfs approve",
        )

    def _authorize(self, session: ESYS_TR, authorization: Authorization, approval: Approval) -> None:
        public, _ = TPMT_PUBLIC.unmarshal(authorization.public)
        digest = authorization.digest(approval.pcrs)
        with translated("check who approved the PCR values"):
            key = self.tpm.load_external(TPM2B_PUBLIC(publicArea=public), hierarchy=ESYS_TR.OWNER)
            with flushed(self.tpm, key):
                ticket = self.tpm.verify_signature(key, digest, _signature(approval.signature))
            self.tpm.policy_authorize(
                session,
                approval.pcrs.policy(),
                structures.object_name(authorization.public),
                ticket,
                authorization.reference.encode(),
            )

    def _check_counter(self, session: ESYS_TR, limit: CounterLimit) -> None:
        where = f"the NV counter {limit.index:#010x}"
        gone = KeyRefusedError(f"{where} is not there any more", hint="seal again")
        with translated(f"look at {where}", {HANDLE: gone}):
            index = self.tpm.tr_from_tpmpublic(limit.index, session1=self.answers_encrypted())
        if _name(self.tpm, index) != limit.name:
            raise KeyRefusedError(f"{where} is another one than at sealing", hint="seal again")
        moved = KeyRefusedError(
            f"{where} has moved beyond {limit.value}: this file was superseded",
            hint="use the file that was sealed since, or seal again",
        )
        with translated(f"read {where}", {0x126: moved, NV_UNINITIALIZED: gone}):
            self.tpm.policy_nv(index, index, session, limit.operand, TPM2_EO.UNSIGNED_LE, session1=self.authenticated())

    def _start(self, kind: TPM2_SE) -> ESYS_TR:
        return start_session(self.tpm, self.root, kind)


@contextmanager
def opened_storage(expected: bytes | None = None, handle: int | None = None) -> Iterator[Storage]:
    """The TPM of this machine with its storage root key; everything is flushed at the end.

    `expected` is the name that the root must have and `handle` where it persisted; without them the root at 0x81000001
    is taken if it is fit, else one is made from the owner's seed.

    Raises: KeyRefusedError where the root is another; KeyProviderError where the TPM cannot be used.
    """
    with opened_tpm() as tpm, _root(tpm, expected, handle) as (root, persistent):
        with translated("begin a session"):
            session = start_session(tpm, root, TPM2_SE.HMAC)
        with flushed(tpm, session):
            yield Storage(tpm, root, persistent, session)


def start_session(tpm: ESAPI, root: ESYS_TR, kind: TPM2_SE) -> ESYS_TR:
    """A session salted to a storage root key, with AES-128-CFB."""
    return tpm.start_auth_session(
        tpm_key=root,
        bind=ESYS_TR.NONE,
        session_type=kind,
        symmetric=TPMT_SYM_DEF.parse("aes128cfb"),
        auth_hash=TPM2_ALG.SHA256,
    )


@contextmanager
def _root(tpm: ESAPI, expected: bytes | None, handle: int | None) -> Iterator[tuple[ESYS_TR, int | None]]:
    persistent = PERSISTENT_ROOT if expected is None else handle
    if persistent is not None:
        found = _persistent(tpm, persistent)
        if found is not None and (_name(tpm, found) == expected if expected else _fit(tpm, found)):
            yield found, persistent
            return
    template, _ = TPMT_PUBLIC.unmarshal(structures.storage_root())
    with translated("make its storage root key"):
        made, *_ = tpm.create_primary(TPM2B_SENSITIVE_CREATE(), TPM2B_PUBLIC(publicArea=template), ESYS_TR.OWNER)
    with flushed(tpm, made):
        if expected is not None and _name(tpm, made) != expected:
            raise KeyRefusedError(
                "this is not the TPM that the file was made with, or it was cleared since: "
                "its storage root key is another",
                hint="use the machine where the file was made, or make a new one here",
            )
        yield made, None


def _persistent(tpm: ESAPI, handle: int) -> ESYS_TR | None:
    absent = _AbsentError()
    try:
        with translated("look at its storage root key", {HANDLE: absent}):
            return tpm.tr_from_tpmpublic(handle)
    except _AbsentError:
        return None


class _AbsentError(Exception):
    """Nothing is at a handle."""


def _fit(tpm: ESAPI, handle: ESYS_TR) -> bool:
    """Whether a persistent key is one that other keys can be stored under, and that this TPM made."""
    with translated("look at its storage root key"):
        public, _, _ = tpm.read_public(handle)
    area = bytes(public.publicArea.marshal())
    attributes = int.from_bytes(area[_OFFSET_OF_ATTRIBUTES : _OFFSET_OF_ATTRIBUTES + 4])
    needed = structures.STORAGE_ATTRIBUTES_NEEDED
    return attributes & needed == needed and structures.object_name(area) == _name(tpm, handle)


def _name(tpm: ESAPI, handle: ESYS_TR) -> bytes:
    return bytes(tpm.tr_get_name(handle))


def _selects(selection: bytes, bank: str, index: int) -> bool:
    """Whether a TPML_PCR_SELECTION, as the TPM returned it, has this PCR."""
    return selection[:-3] == structures.pcr_selection(bank, [])[:-3] and bool(
        int.from_bytes(selection[-3:], "little") >> index & 1
    )


def _signature(der: bytes) -> TPMT_SIGNATURE:
    from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

    try:
        r, s = (value.to_bytes(32) for value in decode_dss_signature(der))
    except (ValueError, OverflowError):
        raise KeyFileError(
            "the signature of an approval is malformed", hint="take the approval from who signed it"
        ) from None
    return TPMT_SIGNATURE(
        sigAlg=TPM2_ALG.ECDSA,
        signature=TPMU_SIGNATURE(
            ecdsa=TPMS_SIGNATURE_ECC(
                hash=TPM2_ALG.SHA256, signatureR=TPM2B_ECC_PARAMETER(r), signatureS=TPM2B_ECC_PARAMETER(s)
            )
        ),
    )
