"""Sealed keys with an NV counter and with approvals, on a real TPM (swtpm): `encfs advance`, `encfs approve`."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from encfs.errors import ConflictError, KeyFileError, KeyProviderError, KeyRefusedError, UsageError
from encfs.tpm.keyfile import load_object
from encfs.tpm.policy import MAX_APPROVALS
from tests.integration.test_tpm_sealing import flipped, ok, opened, place, plain, refused, run
from tests.support.documented import assert_as_documented
from tests.support.tpm import SoftwareTpm, tpm

__all__ = ["place", "tpm"]

INDEX = "0x01800100"
SEAL = ("encfs", "seal", "kek.jwk", "-o")
PCRS = ("--tpm2-pcrs", "sha256:7,11")
COUNTED = (*PCRS, "--tpm2-nv-counter", INDEX)
UNSEAL = ("encfs", "unseal")


def present(tpm: SoftwareTpm, index: int) -> str:
    return tpm.tool("pcrread", f"sha256:{index}").stdout.decode().split("0x")[1].strip().lower()


def changed(path: str, **members: Any) -> None:
    """Change members of a file's policy."""
    document = json.loads(Path(path).read_text())
    for name, change in members.items():
        change(document["policy"][name])
    Path(path).write_text(json.dumps(document))


# -- counters


def test_a_counter_that_moved_on(place: Path, tpm: SoftwareTpm) -> None:
    ok(*SEAL, "a.tpm", *COUNTED)
    ok(*SEAL, "b.tpm", *COUNTED)
    assert opened("a.tpm") == opened("b.tpm") == plain()
    moved = json.loads(ok("encfs", "advance", INDEX, "--json"))
    assert_as_documented("encfs advance", moved)
    for name in ("a.tpm", "b.tpm"):
        line = refused(KeyRefusedError, *UNSEAL, name)
        assert f"the NV counter {INDEX} has moved beyond {moved['value'] - 1}: this file was superseded" in line
    ok(*SEAL, "c.tpm", *COUNTED)
    assert opened("c.tpm") == plain()
    tpm.restart()
    for index in (7, 11):
        tpm.extend(index)
    assert opened("c.tpm") == plain()
    refused(KeyRefusedError, *UNSEAL, "a.tpm")
    assert tpm.transient() == ""


def test_a_counter_made_anew_brings_nothing_back(place: Path, tpm: SoftwareTpm) -> None:
    ok(*SEAL, "a.tpm", *COUNTED)
    ok("encfs", "advance", INDEX)
    tpm.tool("nvundefine", INDEX)
    assert f"the NV counter {INDEX} is not there any more" in refused(KeyRefusedError, *UNSEAL, "a.tpm")
    ok(*SEAL, "b.tpm", *COUNTED)
    assert "has moved beyond" in refused(KeyRefusedError, *UNSEAL, "a.tpm")
    assert opened("b.tpm") == plain()


def test_a_counter_with_other_attributes_is_another(place: Path, tpm: SoftwareTpm) -> None:
    ok(*SEAL, "a.tpm", *COUNTED)
    tpm.tool("nvundefine", INDEX)
    tpm.tool("nvdefine", INDEX, "-a", "ownerread|ownerwrite|authread|authwrite|nt=1")
    tpm.tool("nvincrement", INDEX)
    assert "is another one than at sealing" in refused(KeyRefusedError, *UNSEAL, "a.tpm")


def test_the_pcrs_count_as_well(place: Path, tpm: SoftwareTpm) -> None:
    ok(*SEAL, "a.tpm", *COUNTED)
    tpm.extend(11)
    assert "PCR 11 (sha256) differ" in refused(KeyRefusedError, *UNSEAL, "a.tpm")


def test_a_counter_that_is_there_is_used(place: Path, tpm: SoftwareTpm) -> None:
    tpm.tool("nvdefine", INDEX, "-a", "ownerread|ownerwrite|authread|authwrite|nt=1")
    ok(*SEAL, "a.tpm", *COUNTED)  # never incremented before
    assert opened("a.tpm") == plain()


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ("ownerread|ownerwrite|authread|authwrite", "is in use, and is no counter"),
        ("ownerread|ownerwrite|nt=1", "is no counter without a password"),
        ("ownerread|ownerwrite|authread|authwrite|orderly|nt=1", "a loss of power sets back"),
    ],
)
def test_indices_that_are_unfit(place: Path, tpm: SoftwareTpm, attributes: str, message: str) -> None:
    tpm.tool("nvdefine", INDEX, "-s", "8", "-a", attributes)
    assert message in refused(KeyProviderError, *SEAL, "a.tpm", *COUNTED)
    assert message in refused(KeyProviderError, "encfs", "advance", INDEX)
    assert not Path("a.tpm").exists()


def test_no_counter_to_advance(place: Path) -> None:
    assert f"the NV counter {INDEX} is not there" in refused(KeyProviderError, "encfs", "advance", INDEX)
    assert "is no NV index" in refused(UsageError, "encfs", "advance", "7")
    assert "is no NV index" in refused(UsageError, *SEAL, "a.tpm", *PCRS, "--tpm2-nv-counter", "0x81000001")


@pytest.mark.parametrize(("member", "value"), [("value", 1 << 20), ("index", "0x01800101"), ("name", "00" * 34)])
def test_altered_counters(place: Path, member: str, value: object) -> None:
    ok(*SEAL, "a.tpm", *COUNTED)
    changed("a.tpm", counter=lambda counter: counter.update({member: value}))
    if member == "index":  # the name says which counter it is
        assert "is not there any more" in refused(KeyRefusedError, *UNSEAL, "a.tpm")
    else:
        assert "the policy is not that of the sealed object" in refused(KeyFileError, *UNSEAL, "a.tpm")


@pytest.mark.parametrize(
    ("value", "message"),
    [(-1, "is no number"), (1 << 64, "an integer out of range"), (True, "is no number"), ("5", "is no number")],
)
def test_malformed_counters(place: Path, value: object, message: str) -> None:
    ok(*SEAL, "a.tpm", *COUNTED)
    changed("a.tpm", counter=lambda counter: counter.update({"value": value}))
    assert message in refused(KeyFileError, *UNSEAL, "a.tpm")


# -- approvals


@pytest.fixture
def keys(place: Path) -> Path:
    """Where there is a P-256 key `owner.jwk`, and a stranger's."""
    for name in ("owner", "stranger"):
        ok("imagetool", "keygen", "-o", f"{name}.jwk", "--type", "p256")
    return place


AUTHORIZED = ("--tpm2-authorize", "owner.jwk.pub")
APPROVE = ("encfs", "approve", "a.tpm", "--key", "owner.jwk", "--tpm2-pcrs")


def test_approved_values_open_it(keys: Path, tpm: SoftwareTpm) -> None:
    ok(*SEAL, "a.tpm", *PCRS, *AUTHORIZED)
    assert opened("a.tpm") == plain()
    tpm.extend(11)
    line = refused(KeyRefusedError, *UNSEAL, "a.tpm")
    assert "PCR 11 (sha256) differ" in line
    assert "encfs approve" in line
    assert_as_documented("encfs approve", json.loads(ok(*APPROVE, "sha256:7,11", "--json")))
    assert opened("a.tpm") == plain()
    tpm.restart()
    for index in (7, 11):
        tpm.extend(index)
    assert opened("a.tpm") == plain(), "the values at sealing open it still"
    tpm.extend(7)
    assert "PCR 7 (sha256) differ from any that were approved" in refused(KeyRefusedError, *UNSEAL, "a.tpm")
    assert tpm.transient() == ""


def test_approvals_alone(keys: Path, tpm: SoftwareTpm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner approves where there is no TPM, and never sees the key."""
    ok(*SEAL, "a.tpm", *AUTHORIZED)
    assert "no PCR values have been approved yet" in refused(KeyRefusedError, *UNSEAL, "a.tpm")
    value = present(tpm, 11)
    with monkeypatch.context() as without:
        without.setenv("TPM2TOOLS_TCTI", "device:/dev/no-such-tpm")
        ok(*APPROVE, f"sha256:11={value}")
        assert "there is no TPM" in refused(KeyProviderError, *APPROVE, "sha256:11")
    assert opened("a.tpm") == plain()


def test_a_counter_ends_approvals(keys: Path, tpm: SoftwareTpm) -> None:
    ok(*SEAL, "a.tpm", *COUNTED, *AUTHORIZED)
    tpm.extend(11)
    ok(*APPROVE, "sha256:7,11")
    assert opened("a.tpm") == plain()
    ok("encfs", "advance", INDEX)
    assert "has moved beyond" in refused(KeyRefusedError, *UNSEAL, "a.tpm")


def test_other_keys_do_not_approve(keys: Path, tpm: SoftwareTpm) -> None:
    ok(*SEAL, "a.tpm", *PCRS, *AUTHORIZED)
    before = Path("a.tpm").read_text()
    words = ("encfs", "approve", "a.tpm", "--tpm2-pcrs", "sha256:7", "--key")
    assert "is not the key whose approvals count" in refused(KeyFileError, *words, "stranger.jwk")
    assert "signing needs the private one" in refused(KeyFileError, *words, "owner.jwk.pub")
    assert Path("a.tpm").read_text() == before
    assert "was not sealed for approvals" in refused(
        KeyFileError, "encfs", "approve", "kek.tpm", "--key", "owner.jwk", "--tpm2-pcrs", "sha256:7"
    )


def test_an_approval_for_another_text(keys: Path, tpm: SoftwareTpm) -> None:
    ok(*SEAL, "a.tpm", *AUTHORIZED, "--tpm2-reference", "fleet a")
    ok(*SEAL, "b.tpm", *AUTHORIZED, "--tpm2-reference", "fleet b")
    ok(*APPROVE, "sha256:7,11")
    assert opened("a.tpm") == plain()
    approvals = json.loads(Path("a.tpm").read_text())["policy"]["authorize"]["approvals"]
    changed("b.tpm", authorize=lambda authorize: authorize.update(approvals=approvals))
    assert "the signature does not verify" in refused(KeyProviderError, *UNSEAL, "b.tpm")
    changed("b.tpm", authorize=lambda authorize: authorize.update(reference="fleet a"))
    assert "the policy is not that of the sealed object" in refused(KeyFileError, *UNSEAL, "b.tpm")


def test_altered_approvals(keys: Path, tpm: SoftwareTpm) -> None:
    ok(*SEAL, "a.tpm", *AUTHORIZED)
    ok(*APPROVE, "sha256:7,11")
    good = Path("a.tpm").read_text()
    tpm.extend(11)
    now = present(tpm, 11)
    changed("a.tpm", authorize=lambda one: one["approvals"][0]["pcrs"]["values"].update({"11": now}))
    assert "the signature does not verify" in refused(KeyProviderError, *UNSEAL, "a.tpm")
    tpm.restart()
    for index in (7, 11):
        tpm.extend(index)

    def altered(signature: str) -> str:
        Path("a.tpm").write_text(good)
        changed("a.tpm", authorize=lambda one: one["approvals"][0].update(signature=signature))
        code, out, err = run(*UNSEAL, "a.tpm")
        assert code in (KeyProviderError.exit_code, KeyFileError.exit_code), err
        assert out == ""
        return err

    signature = json.loads(good)["policy"]["authorize"]["approvals"][0]["signature"]
    assert "the signature does not verify" in altered(base64.b64encode(last_bit(signature)).decode())
    for text in (flipped(signature), "AAAA", base64.b64encode(bytes(72)).decode()):
        assert "signature" in altered(text)
    stranger = json.loads(Path("stranger.jwk.pub").read_text())
    Path("a.tpm").write_text(good)
    changed("a.tpm", authorize=lambda one: one.update(key=stranger))
    assert "the policy is not that of the sealed object" in refused(KeyFileError, *UNSEAL, "a.tpm")


def last_bit(text: str) -> bytes:
    data = bytearray(base64.b64decode(text))
    data[-1] ^= 1
    return bytes(data)


def test_the_same_values_are_approved_once_and_there_is_an_end(keys: Path) -> None:
    ok(*SEAL, "a.tpm", *AUTHORIZED)
    for number in (*range(MAX_APPROVALS), 0):
        ok(*APPROVE, f"sha256:11={number:064x}")
    policy = load_object("a.tpm").policy
    assert policy is not None
    assert policy.authorization is not None
    assert len(policy.authorization.approvals) == MAX_APPROVALS
    assert "carries 64 approvals already" in refused(ConflictError, *APPROVE, f"sha256:11={MAX_APPROVALS:064x}")


def test_sealing_options_that_do_not_go(keys: Path) -> None:
    ok("imagetool", "keygen", "-o", "ed.jwk", "--type", "ed25519")
    assert "nothing says when the TPM may open it" in refused(UsageError, *SEAL, "x")
    assert "nothing says when" in refused(UsageError, *SEAL, "x", "--tpm2-nv-counter", INDEX)
    assert "is a private key" in refused(KeyFileError, *SEAL, "x", "--tpm2-authorize", "owner.jwk")
    assert "does not check signatures" in refused(KeyFileError, *SEAL, "x", "--tpm2-authorize", "ed.jwk.pub")
    assert "is for approvals" in refused(UsageError, *SEAL, "x", *PCRS, "--tpm2-reference", "a")
    long = (*AUTHORIZED, "--tpm2-reference", "a" * 33)
    assert "longer than 32 bytes" in refused(UsageError, *SEAL, "x", *long)
    assert not Path("x").exists()
