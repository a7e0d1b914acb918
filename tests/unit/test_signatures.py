"""DSSE signatures over a content descriptor: known answers, every kind of key, and every malformed envelope."""

from __future__ import annotations

import base64
import json

import pytest
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from hypothesis import given
from hypothesis import strategies as st

from encfs.encoding import b64url_encode
from encfs.errors import FormatError, KeyFileError, MissingKeyError, UnsignedError, WrongSignerError
from encfs.keys.jwk import PrivateKey, PublicKey
from encfs.keys.jwkjson import key_from_jwk, public_jwk
from encfs.signatures import MAX_ENVELOPES, PAYLOAD_TYPE, max_envelope_size, pae, sign, verify
from tests.support.keys import SIGNING, private, public

CONTENT = b'{"format":"encfs/1"}'


def members(envelope: bytes) -> dict[str, object]:
    loaded = json.loads(envelope)
    assert isinstance(loaded, dict)
    return loaded


def envelope_of(**changes: object) -> bytes:
    """A good envelope by the Ed25519 key, with members replaced; None drops one."""
    changed = members(sign(CONTENT, private("ed25519"))) | changes
    return json.dumps({name: value for name, value in changed.items() if value is not None}).encode()


def signature_of(key: PrivateKey, message: bytes) -> str:
    return base64.b64encode(key.sign(message)).decode()


def test_pae_of_the_dsse_protocol() -> None:
    """protocol.md, "Test Vectors"."""
    assert pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )
    assert pae("", b"") == b"DSSEv1 0  0 "
    assert pae("é", b"\xff\n") == "DSSEv1 2 é 2 ".encode() + b"\xff\n"


def test_signature_of_the_dsse_protocol() -> None:
    """protocol.md: the published ECDSA P-256 signature over its PAE verifies (as r || s; DER here)."""
    x = 46950820868899156662930047687818585632848591499744589407958293238635476079160
    y = 5640078356564379163099075877009565129882514886557779369047442380624545832820
    key = key_from_jwk(
        {
            "kty": "EC",
            "crv": "P-256",
            "x": b64url_encode(x.to_bytes(32)),
            "y": b64url_encode(y.to_bytes(32)),
        }
    )
    assert isinstance(key, PublicKey)
    raw = base64.b64decode("A3JqsQGtVsJ2O2xqrI5IcnXip5GToJ3F+FnZ+O88SjtR6rDAajabZKciJTfUiHqJPcIAriEGAHTVeCUjW2JIZA==")
    der = encode_dss_signature(int.from_bytes(raw[:32]), int.from_bytes(raw[32:]))
    message = pae("http://example.com/HelloWorld", b"hello world")
    assert key.verify(der, message)
    assert not key.verify(raw, message)
    assert not key.verify(der, message + b" ")


@pytest.mark.parametrize("kind", SIGNING)
def test_round_trip(kind: str) -> None:
    envelope = sign(CONTENT, private(kind))
    parsed = members(envelope)
    assert parsed["payloadType"] == PAYLOAD_TYPE == "application/vnd.encfs.content.v1+json"
    assert base64.b64decode(str(parsed["payload"])) == CONTENT
    assert parsed["signatures"] == [{"keyid": public(kind).kid, "sig": parsed["signatures"][0]["sig"]}]  # type: ignore[index]
    verified = verify([envelope], CONTENT, [public(kind)])
    assert (verified.signer, verified.malformed) == (public(kind), ())
    with pytest.raises(WrongSignerError, match="none of the artifact's 1 signatures is by a trusted key"):
        verify([envelope], CONTENT, [public(kind, 1)])
    with pytest.raises(WrongSignerError, match="payload is not this artifact's content descriptor"):
        verify([envelope], CONTENT + b" ", [public(kind)])


def test_any_trusted_signature_suffices() -> None:
    strangers = [sign(CONTENT, private(kind, 1)) for kind in SIGNING]
    good = sign(CONTENT, private("mldsa65"))
    assert verify([*strangers, good], CONTENT, [public("p256"), public("mldsa65")]).signer == public("mldsa65")


def test_the_algorithm_is_the_keys() -> None:
    """A P-256 signature under another kind of key, and keyids that lie, change nothing."""
    mixed = [{"keyid": public("ed25519").kid, "sig": signature_of(private("p256"), pae(PAYLOAD_TYPE, CONTENT))}]
    envelope = envelope_of(signatures=mixed)
    with pytest.raises(WrongSignerError):
        verify([envelope], CONTENT, [public("ed25519"), public("mldsa65")])
    assert verify([envelope], CONTENT, [public("ed25519"), public("p256")]).signer == public("p256")


def test_several_signatures_in_one_envelope() -> None:
    message = pae(PAYLOAD_TYPE, CONTENT)
    signatures = [
        {"sig": signature_of(private("ed25519", 1), message)},
        {"sig": "AAAA", "keyid": ""},
        {"sig": signature_of(private("p256"), message), "more": 1},
    ]
    assert verify([envelope_of(signatures=signatures)], CONTENT, [public("p256")]).signer == public("p256")


def test_unknown_members_are_ignored_as_dsse_demands() -> None:
    envelope = envelope_of(another={"x": 1})
    assert verify([envelope], CONTENT, [public("ed25519")]).signer == public("ed25519")


def test_url_safe_base64_is_taken_as_dsse_demands() -> None:
    content = b"\xfb\xef\xff" * 10
    message = pae(PAYLOAD_TYPE, content)
    payload = base64.urlsafe_b64encode(content).decode()
    assert "-" in payload
    assert "_" in payload
    signature = base64.urlsafe_b64encode(private("ed25519").sign(message)).decode()
    envelope = json.dumps(
        {"payload": payload, "payloadType": PAYLOAD_TYPE, "signatures": [{"sig": signature}]}
    ).encode()
    assert verify([envelope], content, [public("ed25519")]).signer == public("ed25519")


def test_another_payload_type_is_another_message() -> None:
    """A signature made for another protocol over the same bytes is worth nothing, whatever the envelope says."""
    other = "application/vnd.in-toto+json"
    signature = [{"sig": signature_of(private("ed25519"), pae(other, CONTENT))}]
    bare = [{"sig": signature_of(private("ed25519"), CONTENT)}]
    for changes in (
        {"payloadType": other, "signatures": signature},
        {"signatures": signature},
        {"signatures": bare},
    ):
        with pytest.raises(WrongSignerError):
            verify([envelope_of(**changes)], CONTENT, [public("ed25519")])


def test_ecdsa_is_der_only() -> None:
    raw = private("p256").sign(pae(PAYLOAD_TYPE, CONTENT))
    r, s = decode_dss_signature(raw)
    fixed = base64.b64encode(r.to_bytes(32) + s.to_bytes(32)).decode()
    with pytest.raises(WrongSignerError):
        verify([envelope_of(signatures=[{"sig": fixed}])], CONTENT, [public("p256")])


MALFORMED = [
    (b"", "not JSON"),
    (b"[]", "not a JSON object"),
    (b'{"payload":"","payload":""}', "repeats the member"),
    (envelope_of(payloadType=None), "payloadType is None"),
    (envelope_of(payloadType=PAYLOAD_TYPE.upper()), "payloadType is 'APPLICATION"),
    (envelope_of(payload=None), "payload is not canonical base64"),
    (envelope_of(payload=base64.b64encode(CONTENT).decode().rstrip("=")), "payload is not canonical base64"),
    (envelope_of(payload=base64.b64encode(CONTENT).decode() + "\n"), "payload is not canonical base64"),
    (envelope_of(payload="-_+/"), "payload is not canonical base64"),
    (envelope_of(payload=[1]), "payload is not canonical base64"),
    (envelope_of(payload=base64.b64encode(CONTENT + b" ").decode()), "not this artifact's content descriptor"),
    (envelope_of(payload=""), "not this artifact's content descriptor"),
    (envelope_of(signatures=None), "not a list of 1 to 8"),
    (envelope_of(signatures={}), "not a list of 1 to 8"),
    (envelope_of(signatures=[]), "not a list of 1 to 8"),
    (envelope_of(signatures=[{"sig": "AAAA"}] * 9), "not a list of 1 to 8"),
    (envelope_of(signatures=["AAAA"]), "not all JSON objects"),
    (envelope_of(signatures=[{}]), "sig is not canonical base64"),
    (envelope_of(signatures=[{"sig": None}]), "sig is not canonical base64"),
    (envelope_of(signatures=[{"sig": "AAAA", "keyid": 1}]), "keyid that is no string"),
    (envelope_of(signatures=[{"sig": "A" * 8192}]), "more than 4096 bytes"),
    (b" " * (max_envelope_size(len(CONTENT)) + 1), "allowed"),
]


@pytest.mark.parametrize(("envelope", "reason"), MALFORMED)
def test_malformed(envelope: bytes, reason: str) -> None:
    with pytest.raises(WrongSignerError, match=f"signature 0 is ignored: .*{reason}") as caught:
        verify([envelope], CONTENT, [public("ed25519")])
    assert "\n" not in str(caught.value)


def test_malformed_ones_do_not_hide_a_good_one() -> None:
    good = sign(CONTENT, private("p256"))
    bad = [envelope for envelope, _ in MALFORMED[:15]]
    for envelopes in ([*bad, good], [good, *bad]):
        verified = verify(envelopes, CONTENT, [public("p256")])
        assert verified.signer == public("p256")
        assert len(verified.malformed) == len(bad)


def test_bounds() -> None:
    good = sign(CONTENT, private("ed25519"))
    assert verify([good] * MAX_ENVELOPES, CONTENT, [public("ed25519")]).signer == public("ed25519")
    with pytest.raises(FormatError, match="has 17 signatures; 16 are allowed"):
        verify([good] * (MAX_ENVELOPES + 1), CONTENT, [public("ed25519")])
    large = b"x" * (4 << 20)
    envelope = sign(large, private("mldsa65"))
    assert len(envelope) <= max_envelope_size(len(large))
    assert verify([envelope], large, [public("mldsa65")]).signer == public("mldsa65")


def test_nothing_to_verify_with_or_against() -> None:
    with pytest.raises(UnsignedError, match="is not signed"):
        verify([], CONTENT, [public("ed25519")])
    with pytest.raises(MissingKeyError, match="pass --trust KEY"):
        verify([sign(CONTENT, private("ed25519"))], CONTENT, [])


@pytest.mark.parametrize("kind", ["x25519", "p384", "rsa3072", "mlkem768x25519"])
def test_keys_that_do_not_sign(kind: str) -> None:
    with pytest.raises(KeyFileError, match="cannot sign"):
        sign(CONTENT, private(kind))
    with pytest.raises(KeyFileError, match="cannot sign"):
        verify([sign(CONTENT, private("ed25519"))], CONTENT, [public(kind)])


def test_a_key_for_encryption_only_verifies_nothing() -> None:
    narrowed = key_from_jwk(public_jwk(public("p256")) | {"use": "enc"})
    assert isinstance(narrowed, PublicKey)
    with pytest.raises(KeyFileError, match="does not allow it to sign"):
        verify([sign(CONTENT, private("p256"))], CONTENT, [narrowed])


@pytest.mark.parametrize("kind", SIGNING)
def test_every_changed_bit_of_a_signature_is_noticed(kind: str) -> None:
    raw = bytearray(private(kind).sign(pae(PAYLOAD_TYPE, CONTENT)))
    message = pae(PAYLOAD_TYPE, CONTENT)
    assert public(kind).verify(bytes(raw), message)
    for at in range(0, len(raw), max(1, len(raw) // 64)):
        for bit in range(8):
            raw[at] ^= 1 << bit
            assert not public(kind).verify(bytes(raw), message)
            raw[at] ^= 1 << bit
    for cut in (0, 1, len(raw) // 2, len(raw) - 1):
        assert not public(kind).verify(bytes(raw[:cut]), message)
    assert not public(kind).verify(bytes(raw) + b"\0", message)


def test_every_changed_byte_of_an_envelope() -> None:
    """It is refused, or still is a signature by the same key over the same content (the keyid counts for nothing)."""
    envelope = bytearray(sign(CONTENT, private("ed25519")))
    accepted = 0
    for at in range(len(envelope)):
        envelope[at] ^= 1
        try:
            assert verify([bytes(envelope)], CONTENT, [public("ed25519")]).signer == public("ed25519")
            accepted += 1
        except WrongSignerError:
            pass
        envelope[at] ^= 1
    # The keyid's value, its name, and nothing else.
    assert 0 < accepted <= len(public("ed25519").kid) + len('"keyid"')


@given(st.lists(st.binary(max_size=60), max_size=4))
def test_anything_is_refused(envelopes: list[bytes]) -> None:
    with pytest.raises((WrongSignerError, UnsignedError)):
        verify(envelopes, CONTENT, [public("ed25519")])
