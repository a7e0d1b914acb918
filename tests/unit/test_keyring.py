"""The keyring: every kind of recipient, known answers, agreement with jwcrypto both ways, adding and removing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encfs.encoding import b64url_decode, b64url_encode
from encfs.errors import (
    ConflictError,
    EncfsError,
    FormatError,
    IntegrityError,
    KeyFileError,
    KeyProviderError,
    MissingKeyError,
    NotFoundError,
    UsageError,
    WrongKeyError,
)
from encfs.keys import keyring as keyring_module
from encfs.keys.jwk import HPKE_ALGORITHM, KeyKind, PrivateKey, PublicKey
from encfs.keys.jwkjson import private_jwk, public_jwk
from encfs.keys.keyring import MAX_KEYRING_SIZE, create_keyring, parse_keyring
from encfs.keys.recipients import (
    Recipient,
    RecipientKey,
    mixes_post_quantum,
    unwrap_with_key,
    unwrap_with_passphrase,
)
from encfs.keys.secrets import Passphrase, SymmetricKey, wipe
from tests.support.jose import JWE, JWK
from tests.support.keys import DIGEST, ENCRYPTING, OTHER_DIGEST, key, private, public, recipient

PAYLOAD = b'{"a":"payload"}'
STANDARD = ("x25519", "p256", "p384", "rsa3072", "oct")
ALGORITHMS = {"x25519": "ECDH-ES+A256KW", "p256": "ECDH-ES+A256KW", "p384": "ECDH-ES+A256KW"} | {
    "rsa3072": "RSA-OAEP-256",
    "oct": "A256KW",
    "mlkem768x25519": HPKE_ALGORITHM,
}


def passphrase(text: str = "correct horse") -> Passphrase:
    return Passphrase(bytearray(text.encode()))


@dataclass
class Holder:
    """A provider with a key at hand, which counts how often it is asked."""

    key: PrivateKey | SymmetricKey | Passphrase
    uri: str = "test:key"
    asked: int = 0

    def unwrap(self, recipients: Sequence[Recipient], content_digest: str) -> bytearray:
        self.asked += 1
        if isinstance(self.key, Passphrase):
            return unwrap_with_passphrase(self.key, recipients, self.uri)
        return unwrap_with_key(self.key, recipients, content_digest, self.uri)

    def close(self) -> None:
        return


def holder(kind: str, number: int = 0) -> Holder:
    return Holder(key(kind, number), f"test:{kind}")


def members(keyring: bytes) -> dict[str, object]:
    loaded = json.loads(keyring)
    assert isinstance(loaded, dict)
    return loaded


@pytest.mark.parametrize("kind", ENCRYPTING)
def test_every_kind_alone(kind: str) -> None:
    content = create_keyring(PAYLOAD, DIGEST, [recipient(kind)])
    keyring = parse_keyring(content, DIGEST)
    assert len(keyring.recipients) == 1
    only = keyring.recipients[0]
    assert (only.index, only.alg, only.kid) == (0, ALGORITHMS[kind], key(kind).kid)
    assert only.kind == ("rsa" if kind == "rsa3072" else kind)
    opened = keyring.open([holder(kind)])
    assert isinstance(opened, bytearray)
    assert opened == PAYLOAD
    with pytest.raises(WrongKeyError, match=rf"test:{kind} opens none of the .* recipients \(tried 0\)"):
        keyring.open([holder(kind, 1)])


def test_a_passphrase() -> None:
    keyring = parse_keyring(create_keyring(PAYLOAD, DIGEST, [passphrase()]), DIGEST)
    only = keyring.recipients[0]
    assert (only.alg, only.kind, only.kid, only.iterations) == ("PBES2-HS512+A256KW", "passphrase", None, 600_000)
    assert len(only.salt) == 16
    assert keyring.open([Holder(passphrase())]) == PAYLOAD
    with pytest.raises(WrongKeyError, match="test:key opens none of the passphrase recipients"):
        keyring.open([Holder(passphrase("wrong"))])


def test_all_kinds_at_once() -> None:
    keys: list[RecipientKey] = [recipient(kind) for kind in ENCRYPTING]
    keyring = parse_keyring(create_keyring(PAYLOAD, DIGEST, [*keys, passphrase()]), DIGEST)
    for kind in ENCRYPTING:
        assert keyring.open([holder(kind)]) == PAYLOAD
    assert keyring.open([Holder(passphrase())]) == PAYLOAD
    assert keyring.mixes_post_quantum


def test_nothing_of_the_payload_or_digest_is_fixed() -> None:
    """Fresh key, nonce and ephemeral key every time."""
    first, second = (members(create_keyring(PAYLOAD, DIGEST, [recipient("x25519")])) for _ in range(2))
    assert first["iv"] != second["iv"]
    assert first["ciphertext"] != second["ciphertext"]
    assert first["recipients"] != second["recipients"]


@settings(max_examples=20)
@given(st.binary(max_size=5000), st.lists(st.sampled_from(["x25519", "p256", "oct"]), min_size=1, unique=True))
def test_any_payload(payload: bytes, kinds: list[str]) -> None:
    keyring = parse_keyring(create_keyring(payload, DIGEST, [recipient(kind) for kind in kinds]), DIGEST)
    for kind in kinds:
        assert keyring.open([holder(kind)]) == payload


# --- known answers ---------------------------------------------------------------------------------------------------


def test_key_wrap_of_rfc_3394() -> None:
    """Section 4.6: 256 bits of key data with a 256-bit KEK."""
    kek = SymmetricKey(bytearray(range(32)))
    wrapped = "28c9f404c4b810f4cbccb35cfb87f8263f5786e2d80ed326cbc7f0e71a99f43bfb988b9b7a02dd21"
    entry = Recipient(0, "A256KW", None, bytes.fromhex(wrapped))
    expected = "00112233445566778899aabbccddeeff000102030405060708090a0b0c0d0e0f"
    assert unwrap_with_key(kek, [entry], DIGEST, "kek").hex() == expected


def test_passphrase_of_rfc_7520() -> None:
    """Section 5.3: PBES2-HS512+A256KW with 8192 iterations (fewer than a keyring may have)."""
    entry = Recipient(
        0,
        "PBES2-HS512+A256KW",
        None,
        b64url_decode("d3qNhUWfqheyPp4H8sjOWsDYajoej4c5Je6rlUtFPWdgtURtmeDV1g", "key"),
        salt=b64url_decode("8Q1SzinasR3xchYz6ZZcHA", "salt"),
        iterations=8192,
    )
    secret = passphrase("entrap_o\u2013peter_long\u2013credit_tun")
    cek = unwrap_with_passphrase(secret, [entry], "passphrase")
    assert b64url_encode(cek) == "uwsjJXaBK407Qaf0_zpcpmr1Cs0CC50hIUEyGNEt3m0"


# --- the same in jwcrypto --------------------------------------------------------------------------------------------


def decrypt_by_jwcrypto(content: bytes, theirs: object, algorithm: str) -> tuple[bytes, bytes]:
    message = JWE(algs=[algorithm, "A256GCM"])
    message.deserialize(content.decode())
    message.decrypt(theirs)
    return message.payload, message.objects["aad"]


@pytest.mark.parametrize("kind", STANDARD)
@pytest.mark.parametrize("others", [[], ["mlkem768x25519", "p384", "rsa3072", "oct", "x25519", "p256"]])
def test_jwcrypto_opens_ours(kind: str, others: list[str]) -> None:
    kinds = [kind, *(other for other in others if other != kind)]
    content = create_keyring(PAYLOAD, DIGEST, [recipient(each) for each in kinds])
    payload, aad = decrypt_by_jwcrypto(content, JWK(**private_jwk(key(kind))), ALGORITHMS[kind])
    assert payload == PAYLOAD
    assert aad == DIGEST.encode()


def test_jwcrypto_opens_our_passphrase() -> None:
    content = create_keyring(PAYLOAD, DIGEST, [passphrase("pässphrase"), recipient("p256")])
    theirs = JWK.from_password("pässphrase")
    assert decrypt_by_jwcrypto(content, theirs, "PBES2-HS512+A256KW")[0] == PAYLOAD


def jwcrypto_keyring(kinds: Sequence[str]) -> bytes:
    message = JWE(PAYLOAD, protected='{"enc":"A256GCM"}', aad=DIGEST)
    for kind in kinds:
        theirs = JWK(**(private_jwk(key(kind)) if kind == "oct" else public_jwk(public(kind))))
        message.add_recipient(theirs, json.dumps({"alg": ALGORITHMS[kind]}))
    text = message.serialize(compact=False)
    assert isinstance(text, str)
    return text.encode()


@pytest.mark.parametrize("kind", STANDARD)
def test_we_open_jwcrypto_flattened(kind: str) -> None:
    content = jwcrypto_keyring([kind])
    assert "recipients" not in members(content)
    keyring = parse_keyring(content, DIGEST)
    assert keyring.recipients[0].kid is None
    assert keyring.open([holder(kind)]) == PAYLOAD


def test_we_open_jwcrypto_general() -> None:
    keyring = parse_keyring(jwcrypto_keyring(STANDARD), DIGEST)
    assert len(keyring.recipients) == len(STANDARD)
    for kind in STANDARD:
        assert keyring.open([holder(kind)]) == PAYLOAD


def test_we_open_jwcrypto_passphrase() -> None:
    message = JWE(PAYLOAD, protected='{"enc":"A256GCM"}', aad=DIGEST)
    header = {"alg": "PBES2-HS512+A256KW", "p2c": 210_000, "p2s": b64url_encode(b"0123456789abcdef")}
    message.add_recipient(JWK.from_password("correct horse"), json.dumps(header))
    content = message.serialize(compact=False).encode()
    keyring = parse_keyring(content, DIGEST)
    assert keyring.recipients[0].iterations == 210_000
    assert keyring.open([Holder(passphrase())]) == PAYLOAD


def test_the_digest_is_bound_by_hpke() -> None:
    """A hybrid entry that is copied to another artifact's keyring does not open even if the CEK were the same."""
    content = create_keyring(PAYLOAD, DIGEST, [recipient("mlkem768x25519")])
    entry = parse_keyring(content, DIGEST).recipients
    hybrid = private("mlkem768x25519")
    assert len(unwrap_with_key(hybrid, entry, DIGEST, "it")) == 32
    with pytest.raises(WrongKeyError):
        unwrap_with_key(hybrid, entry, OTHER_DIGEST, "it")


def test_a_flattened_keyring_can_be_extended() -> None:
    flattened = parse_keyring(jwcrypto_keyring(["p256"]), DIGEST)
    extended = parse_keyring(flattened.add_recipients([holder("p256")], [recipient("x25519")]), DIGEST)
    assert extended.open([holder("x25519")]) == extended.open([holder("p256")]) == PAYLOAD


# --- adding and removing ---------------------------------------------------------------------------------------------

SEALED = ("protected", "aad", "iv", "ciphertext", "tag")


def test_adding_leaves_everything_else() -> None:
    before = create_keyring(PAYLOAD, DIGEST, [recipient("p256"), recipient("oct")])
    keyring = parse_keyring(before, DIGEST)
    after = keyring.add_recipients([holder("oct")], [recipient("x25519"), recipient("mlkem768x25519"), passphrase()])
    old, new = members(before), members(after)
    assert [old[name] for name in SEALED] == [new[name] for name in SEALED]
    assert isinstance(new["recipients"], list)
    assert new["recipients"][:2] == old["recipients"]
    extended = parse_keyring(after, DIGEST)
    assert [entry.kind for entry in extended.recipients] == ["p256", "oct", "x25519", "mlkem768x25519", "passphrase"]
    for kind in ("p256", "oct", "x25519", "mlkem768x25519"):
        assert extended.open([holder(kind)]) == PAYLOAD
    assert extended.open([Holder(passphrase())]) == PAYLOAD


def test_adding_needs_a_key_that_opens() -> None:
    keyring = parse_keyring(create_keyring(PAYLOAD, DIGEST, [recipient("p256")]), DIGEST)
    with pytest.raises(WrongKeyError):
        keyring.add_recipients([holder("p256", 1)], [recipient("x25519")])
    with pytest.raises(MissingKeyError):
        keyring.add_recipients([], [recipient("x25519")])
    with pytest.raises(ConflictError, match="is a recipient already"):
        keyring.add_recipients([holder("p256")], [recipient("p256")])
    with pytest.raises(KeyFileError, match="cannot encrypt"):
        keyring.add_recipients([holder("p256")], [public("ed25519")])
    with pytest.raises(MissingKeyError, match="no recipient"):
        keyring.add_recipients([holder("p256")], [])


def test_adding_to_an_altered_keyring() -> None:
    altered = members(create_keyring(PAYLOAD, DIGEST, [recipient("p256")]))
    altered["tag"] = b64url_encode(bytes(16))
    keyring = parse_keyring(json.dumps(altered).encode(), DIGEST)
    with pytest.raises(IntegrityError, match="payload is not what was sealed"):
        keyring.add_recipients([holder("p256")], [recipient("x25519")])


def test_removing() -> None:
    kinds = ("p256", "x25519", "oct", "rsa3072")
    before = create_keyring(PAYLOAD, DIGEST, [recipient(kind) for kind in kinds])
    keyring = parse_keyring(before, DIGEST)
    symmetric = key("oct").kid
    assert symmetric is not None
    for selector, gone in ((1, 1), (public("rsa3072"), 3), (public("p256").kid, 0), (symmetric, 2)):
        after = parse_keyring(keyring.remove_recipient(selector), DIGEST)
        assert [entry.kind for entry in after.recipients] == [
            entry.kind for entry in keyring.recipients if entry.index != gone
        ]
        for index, kind in enumerate(kinds):
            if index == gone:
                with pytest.raises(WrongKeyError, match="the keyring has none"):
                    after.open([holder(kind)])
            else:
                assert after.open([holder(kind)]) == PAYLOAD
        old, new = members(before), members(keyring.remove_recipient(selector))
        assert [old[name] for name in SEALED] == [new[name] for name in SEALED]


def test_removing_what_is_not_there() -> None:
    keyring = parse_keyring(create_keyring(PAYLOAD, DIGEST, [recipient("p256"), recipient("oct")]), DIGEST)
    for selector in (2, -1, public("x25519"), "nobody"):
        with pytest.raises(NotFoundError, match="has no recipient"):
            keyring.remove_recipient(selector)
    single = parse_keyring(keyring.remove_recipient(0), DIGEST)
    with pytest.raises(UsageError, match="last recipient cannot be removed"):
        single.remove_recipient(0)


def test_removing_one_of_two_with_the_same_key_id() -> None:
    content = members(create_keyring(PAYLOAD, DIGEST, [recipient("p256")]))
    assert isinstance(content["recipients"], list)
    content["recipients"] *= 2
    keyring = parse_keyring(json.dumps(content).encode(), DIGEST)
    with pytest.raises(ConflictError, match="recipients 0, 1 share that key id; name one by its index"):
        keyring.remove_recipient(public("p256"))
    assert parse_keyring(keyring.remove_recipient(1), DIGEST).open([holder("p256")]) == PAYLOAD


def test_entries_of_a_later_version_survive() -> None:
    content = members(create_keyring(PAYLOAD, DIGEST, [recipient("p256")]))
    later = [
        {"header": {"alg": "FUTURE-KEM", "kid": "f", "new": {"x": [1, None]}}, "encrypted_key": "AAAA"},
        {
            "header": {"alg": "ECDH-ES+A256KW", "epk": {"kty": "EC", "crv": "P-521", "x": "AA", "y": "AA"}},
            "encrypted_key": b64url_encode(bytes(40)),
        },
    ]
    assert isinstance(content["recipients"], list)
    content["recipients"] += later
    keyring = parse_keyring(json.dumps(content).encode(), DIGEST)
    assert [entry.kind for entry in keyring.recipients] == ["p256", "unknown", "unknown"]
    after = keyring.add_recipients([holder("p256")], [recipient("oct")])
    kept = members(after)["recipients"]
    assert isinstance(kept, list)
    assert kept[1:3] == later
    without = parse_keyring(parse_keyring(after, DIGEST).remove_recipient("f"), DIGEST)
    assert [entry.kind for entry in without.recipients] == ["p256", "unknown", "oct"]
    with pytest.raises(WrongKeyError, match=r"\(recipients: 1 oct, 1 p256, 2 unknown\)"):
        parse_keyring(after, DIGEST).open([holder("x25519")])


# --- bounds when writing ---------------------------------------------------------------------------------------------


def test_too_many_recipients() -> None:
    keks = [SymmetricKey(bytearray(32)) for _ in range(65)]
    with pytest.raises(UsageError, match="at most 64 recipients"):
        create_keyring(PAYLOAD, DIGEST, keks)
    keyring = parse_keyring(create_keyring(PAYLOAD, DIGEST, keks[:64]), DIGEST)
    assert keyring.open([Holder(keks[0])]) == PAYLOAD
    with pytest.raises(UsageError, match="at most 64 recipients"):
        keyring.add_recipients([Holder(keks[0])], [recipient("p256")])


def test_too_many_passphrases() -> None:
    with pytest.raises(UsageError, match="at most 4 passphrase recipients"):
        create_keyring(PAYLOAD, DIGEST, [passphrase(str(number)) for number in range(5)])
    keyring = parse_keyring(create_keyring(PAYLOAD, DIGEST, [passphrase(str(number)) for number in range(4)]), DIGEST)
    assert keyring.open([Holder(passphrase("3"))]) == PAYLOAD
    with pytest.raises(UsageError, match="at most 4 passphrase recipients"):
        keyring.add_recipients([Holder(passphrase("0"))], [passphrase("4")])


def test_too_large() -> None:
    largest = MAX_KEYRING_SIZE * 3 // 4 - 700
    content = create_keyring(bytes(largest), DIGEST, [recipient("p256")])
    assert len(content) <= MAX_KEYRING_SIZE
    assert parse_keyring(content, DIGEST).open([holder("p256")]) == bytes(largest)
    with pytest.raises(UsageError, match="1048576 are allowed"):
        create_keyring(bytes(largest + 700), DIGEST, [recipient("p256")])


def test_no_or_repeated_recipients() -> None:
    with pytest.raises(MissingKeyError, match="no recipient was given; pass one with -r KEY"):
        create_keyring(PAYLOAD, DIGEST, [])
    with pytest.raises(ConflictError, match="was given twice"):
        create_keyring(PAYLOAD, DIGEST, [recipient("p256"), recipient("p256")])
    with pytest.raises(FormatError, match="content digest"):
        create_keyring(PAYLOAD, "sha256:00", [recipient("p256")])


@pytest.mark.parametrize("kind", ["ed25519", "mldsa65"])
def test_signing_keys_are_no_recipients(kind: str) -> None:
    with pytest.raises(KeyFileError, match=f"is of type {kind}, which cannot encrypt"):
        create_keyring(PAYLOAD, DIGEST, [public(kind)])


# --- opening ---------------------------------------------------------------------------------------------------------


def test_key_ids_are_only_hints() -> None:
    content = members(create_keyring(PAYLOAD, DIGEST, [recipient("p256", 1), recipient("p256")]))
    entries = content["recipients"]
    assert isinstance(entries, list)
    for kids in (("wrong", "wrong"), (public("p256").kid, "other"), (public("p256").kid, public("p256").kid)):
        for entry, kid in zip(entries, kids, strict=True):
            entry["header"]["kid"] = kid
        assert parse_keyring(json.dumps(content).encode(), DIGEST).open([holder("p256")]) == PAYLOAD


@dataclass
class Resident:
    """A key that lives elsewhere: it records what it was asked to do."""

    inner: PrivateKey
    calls: list[str]

    @property
    def kind(self) -> KeyKind:
        return self.inner.kind

    @property
    def kid(self) -> str:
        return self.inner.kid

    def exchange(self, peer: PublicKey) -> bytes:
        self.calls.append("exchange")
        return self.inner.exchange(peer)

    def decrypt_oaep(self, data: bytes) -> bytes:
        self.calls.append("decrypt_oaep")
        return self.inner.decrypt_oaep(data)

    def decrypt_hpke(self, data: bytes, info: bytes) -> bytes:
        self.calls.append("decrypt_hpke")
        return self.inner.decrypt_hpke(data, info)


@pytest.mark.parametrize(
    ("kind", "operation"), [("p384", "exchange"), ("rsa3072", "decrypt_oaep"), ("mlkem768x25519", "decrypt_hpke")]
)
def test_keys_that_live_elsewhere(kind: str, operation: str) -> None:
    keyring = parse_keyring(
        create_keyring(PAYLOAD, DIGEST, [recipient("x25519"), recipient(kind, 1), recipient(kind)]), DIGEST
    )
    resident = Resident(private(kind), [])
    cek = unwrap_with_key(resident, keyring.recipients, DIGEST, "resident")
    # The entry with its key id comes first, so the other one of its kind is not tried.
    assert resident.calls == [operation]
    assert len(cek) == 32


@dataclass
class Failing:
    error: EncfsError
    uri: str = "test:failing"

    def unwrap(self, recipients: Sequence[Recipient], content_digest: str) -> bytearray:
        raise self.error

    def close(self) -> None:
        return


@dataclass
class Giving:
    cek: bytearray
    uri: str = "test:giving"

    def unwrap(self, recipients: Sequence[Recipient], content_digest: str) -> bytearray:
        return self.cek

    def close(self) -> None:
        return


def test_providers_in_order() -> None:
    keyring = parse_keyring(create_keyring(PAYLOAD, DIGEST, [recipient("p256"), recipient("oct")]), DIGEST)
    first, second, third = holder("x25519"), holder("p256"), holder("oct")
    assert keyring.open([first, second, third]) == PAYLOAD
    assert (first.asked, second.asked, third.asked) == (1, 1, 0)
    broken = Failing(KeyProviderError("the machine is on fire"))
    assert keyring.open([broken, second]) == PAYLOAD


def test_no_provider() -> None:
    keyring = parse_keyring(create_keyring(PAYLOAD, DIGEST, [recipient("p256")]), DIGEST)
    with pytest.raises(MissingKeyError, match="pass one with -k KEYURI"):
        keyring.open([])


def test_what_was_tried_is_named() -> None:
    keyring = parse_keyring(create_keyring(PAYLOAD, DIGEST, [recipient("p256"), recipient("rsa3072")]), DIGEST)
    with pytest.raises(WrongKeyError) as caught:
        keyring.open([holder("p256", 1), holder("oct")])
    assert caught.value.message == (
        "no key opens the keyring (recipients: 1 p256, 1 rsa): test:p256 opens none of the p256 recipients (tried 0); "
        "test:oct is for recipients of type oct, and the keyring has none"
    )
    assert caught.value.hint is not None
    assert "imagetool recipients add" in caught.value.hint


def test_a_provider_that_failed_outranks_keys_that_do_not_fit() -> None:
    keyring = parse_keyring(create_keyring(PAYLOAD, DIGEST, [recipient("p256")]), DIGEST)
    failing = Failing(KeyProviderError("the broker refused", hint="ask its owner"))
    with pytest.raises(KeyProviderError) as alone:
        keyring.open([failing])
    assert str(alone.value) == "the broker refused; ask its owner"
    with pytest.raises(KeyProviderError, match=r"test:oct .*; the broker refused; ask its owner$"):
        keyring.open([holder("oct"), failing])


def test_a_key_that_opens_nothing_is_wiped() -> None:
    keyring = parse_keyring(create_keyring(PAYLOAD, DIGEST, [recipient("p256")]), DIGEST)
    short, wrong = bytearray(b"x" * 16), bytearray(b"x" * 32)
    with pytest.raises(WrongKeyError, match="test:giving gave a key of 16 bytes"):
        keyring.open([Giving(short)])
    with pytest.raises(IntegrityError, match="payload is not what was sealed"):
        keyring.open([Giving(wrong)])
    assert (short, wrong) == (bytearray(16), bytearray(32))


def test_a_content_key_of_another_size_is_no_content_key() -> None:
    """RSA-OAEP unwraps whatever was wrapped."""
    entries = [
        Recipient(index, "RSA-OAEP-256", None, public("rsa3072").encrypt_oaep(bytes(size)))
        for index, size in enumerate((0, 16, 31, 33))
    ]
    with pytest.raises(WrongKeyError, match=r"opens none of the rsa recipients \(tried 0, 1, 2, 3\)"):
        unwrap_with_key(private("rsa3072"), entries, DIGEST, "it")
    good = Recipient(4, "RSA-OAEP-256", None, public("rsa3072").encrypt_oaep(bytes(range(32))))
    assert unwrap_with_key(private("rsa3072"), [*entries, good], DIGEST, "it") == bytes(range(32))


def test_unverified_plaintext_is_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    altered = members(create_keyring(PAYLOAD, DIGEST, [recipient("p256")]))
    altered["tag"] = b64url_encode(bytes(16))
    wiped: list[tuple[bytearray, bytes]] = []

    def record(buffer: bytearray) -> None:
        wiped.append((buffer, bytes(buffer)))
        wipe(buffer)

    monkeypatch.setattr(keyring_module, "wipe", record)
    with pytest.raises(IntegrityError):
        parse_keyring(json.dumps(altered).encode(), DIGEST).open([holder("p256")])
    # Shows also why: the library leaves the plaintext there.
    assert PAYLOAD in [before for _, before in wiped]
    assert all(not any(buffer) for buffer, _ in wiped)
    assert sorted(len(buffer) for buffer, _ in wiped) == sorted([len(PAYLOAD), 32])


def test_post_quantum_beside_others() -> None:
    hybrid, classical, symmetric = recipient("mlkem768x25519"), recipient("p256"), recipient("oct")
    assert mixes_post_quantum([hybrid, classical])
    assert mixes_post_quantum([recipient("rsa3072"), symmetric, hybrid])
    assert not mixes_post_quantum([hybrid, symmetric, passphrase()])
    assert not mixes_post_quantum([classical, symmetric])
    assert not parse_keyring(create_keyring(PAYLOAD, DIGEST, [hybrid, symmetric]), DIGEST).mixes_post_quantum


def test_no_secret_is_shown() -> None:
    keyring = parse_keyring(create_keyring(PAYLOAD, DIGEST, [recipient("oct"), recipient("p256")]), DIGEST)
    text = repr(keyring) + repr(passphrase("hunter2"))
    assert "hunter2" not in text
    assert "ciphertext" not in text
