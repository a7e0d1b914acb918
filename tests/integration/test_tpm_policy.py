"""Policies carried out in a real TPM (swtpm): PCR values, approvals of other values."""

from __future__ import annotations

import pytest

from encfs.errors import KeyRefusedError
from encfs.keys.jwk import PrivateKey, generate_key
from encfs.tpm import structures
from encfs.tpm.keyfile import TpmObject, with_approval
from encfs.tpm.policy import Approval, Authorization, PcrValues, Policy
from encfs.tpm.storage import opened_storage
from tests.support.tpm import SoftwareTpm, tpm

__all__ = ["tpm"]

SECRET = b"k" * 32


def sealed(authorization: Authorization | None) -> TpmObject:
    with opened_storage() as storage:
        policy = Policy(storage.read_pcrs("sha256", [7, 11]), authorization)
        public, private = storage.create(structures.sealed_data(policy.digest()), bytearray(SECRET))
        found = TpmObject("sealed", storage.root_name, storage.root_handle, public, private, policy)
    found.check()
    return found


def unsealed(found: TpmObject) -> bytes:
    assert found.policy is not None
    with (
        opened_storage(found.srk_name, found.srk_handle) as storage,
        storage.loaded(found) as handle,
        storage.satisfied(found.policy) as session,
    ):
        return bytes(storage.tpm.unseal(handle, session1=session))


def test_only_the_pcrs_at_sealing_open_it(tpm: SoftwareTpm) -> None:
    found = sealed(None)
    assert unsealed(found) == SECRET
    tpm.extend(11)
    with pytest.raises(KeyRefusedError, match=r"PCR 11 \(sha256\) differ"):
        unsealed(found)
    tpm.restart()
    assert unsealed(found) == SECRET
    assert tpm.transient() == ""


def test_approved_values_open_it_and_others_signatures_do_not(tpm: SoftwareTpm) -> None:
    owner, stranger = generate_key("p256"), generate_key("p256")
    assert isinstance(owner, PrivateKey)
    assert isinstance(stranger, PrivateKey)
    authorization = Authorization(owner.public, "fleet")
    found = sealed(authorization)
    tpm.extend(11)
    with opened_storage(found.srk_name, found.srk_handle) as storage:
        now: PcrValues = storage.read_pcrs("sha256", [7, 11])
    forged = with_approval(found, Approval(now, stranger.sign(authorization.message(now))))
    with pytest.raises(Exception, match="the signature does not verify"):
        unsealed(forged)
    assert unsealed(with_approval(found, Approval(now, owner.sign(authorization.message(now))))) == SECRET
    assert tpm.transient() == ""
