"""Keyrings by an adversary: refused with one line, never another payload, never minutes of work."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from encfs.encoding import b64url_decode, b64url_encode
from encfs.errors import EncfsError, FormatError, IntegrityError, WrongKeyError
from encfs.keys.jwkjson import private_jwk
from encfs.keys.keyring import MAX_KEYRING_SIZE, create_keyring, parse_keyring
from encfs.keys.recipients import Recipient, unwrap_with_key, unwrap_with_passphrase
from encfs.keys.secrets import Passphrase, SymmetricKey
from tests.support.keys import DIGEST, OTHER_DIGEST, key, private, public, recipient
from tests.unit.test_keyring import Holder, holder, jwcrypto_keyring

PAYLOAD = b'{"secret":"payload"}'
KINDS = ("x25519", "p256", "oct", "rsa3072", "mlkem768x25519")
GOOD = create_keyring(PAYLOAD, DIGEST, [*(recipient(kind) for kind in KINDS), Passphrase(bytearray(b"pass"))])
TREE: dict[str, Any] = json.loads(GOOD)
ECDH, NIST, KEK, RSA, HPKE, PBES2 = range(6)

Change = Callable[[dict[str, Any]], object]


def changed(change: Change) -> bytes:
    tree = copy.deepcopy(TREE)
    change(tree)
    return json.dumps(tree).encode()


def header(index: int, **members: object) -> Change:
    """Sets members of one recipient's header; None drops one."""

    def change(tree: dict[str, Any]) -> None:
        merged = tree["recipients"][index]["header"] | members
        tree["recipients"][index]["header"] = {name: value for name, value in merged.items() if value is not None}

    return change


def entry(index: int, **members: object) -> Change:
    return lambda tree: tree["recipients"][index].update(members)


def top(**members: object) -> Change:
    return lambda tree: tree.update(members)


def drop(name: str) -> Change:
    return lambda tree: tree.pop(name)


def protected(text: str) -> Change:
    return top(protected=b64url_encode(text.encode()))


def epk(index: int, **members: object) -> Change:
    merged = TREE["recipients"][index]["header"]["epk"] | members
    return header(index, epk={name: value for name, value in merged.items() if value is not None})


_unaligned = "AB"
_p521 = {"kty": "EC", "crv": "P-521", "x": "AA", "y": "AA"}

MALFORMED: dict[str, tuple[Change, str]] = {
    "unprotected": (top(unprotected={"enc": "A256GCM"}), "unknown member 'unprotected'"),
    "unknown member": (top(x=1), "unknown member 'x'"),
    "no aad": (drop("aad"), "lacks the member aad"),
    "no iv": (drop("iv"), "lacks the member iv"),
    "no tag": (drop("tag"), "lacks the member tag"),
    "no ciphertext": (drop("ciphertext"), "lacks the member ciphertext"),
    "no protected": (drop("protected"), "lacks the member protected"),
    "no recipients": (drop("recipients"), "lacks the member encrypted_key"),
    "both serialisations": (top(header={"alg": "A256KW"}, encrypted_key="AA"), "unknown member 'encrypted_key'"),
    "recipients no list": (top(recipients={}), "not a list of 1 to 64"),
    "recipients empty": (top(recipients=[]), "not a list of 1 to 64"),
    "too many recipients": (top(recipients=[TREE["recipients"][KEK]] * 65), "not a list of 1 to 64"),
    "too many passphrases": (top(recipients=[TREE["recipients"][PBES2]] * 5), "more than 4 passphrase"),
    "recipient no object": (top(recipients=[1]), "recipient 0 is not a JSON object"),
    "recipient without key": (lambda tree: tree["recipients"][1].pop("encrypted_key"), "recipient 1 lacks the member"),
    "recipient without header": (lambda tree: tree["recipients"][2].pop("header"), "recipient 2 lacks the member"),
    "recipient with more": (entry(3, unprotected={}), "recipient 3 has the unknown member 'unprotected'"),
    "header no object": (entry(0, header=[]), "recipient 0: header is not"),
    "iv too short": (top(iv=b64url_encode(bytes(11))), "11 and 16 bytes"),
    "iv of 16 bytes": (top(iv=b64url_encode(bytes(16))), "16 and 16 bytes"),
    "iv empty": (top(iv=""), "0 and 16 bytes"),
    "tag too short": (top(tag=b64url_encode(bytes(12))), "12 and 12 bytes"),
    "tag too long": (top(tag=b64url_encode(bytes(17))), "12 and 17 bytes"),
    "iv padded": (top(iv=b64url_encode(bytes(12)) + "="), "iv is not canonical"),
    "tag not canonical": (lambda tree: tree.update(tag=tree["tag"][:-1] + "_"), "tag is not canonical"),
    "ciphertext not base64": (top(ciphertext="!"), "ciphertext is not canonical"),
    "ciphertext no string": (top(ciphertext=1), "ciphertext is not canonical"),
    "ciphertext unaligned": (top(ciphertext=_unaligned), "ciphertext is not canonical"),
    "protected no string": (top(protected={"enc": "A256GCM"}), "protected is not canonical"),
    "protected no JSON": (protected("x"), "protected header is not JSON"),
    "protected empty": (protected("{}"), "protected header lacks the member enc"),
    "enc another": (protected('{"enc":"A128GCM"}'), "enc is 'A128GCM'"),
    "enc CBC": (protected('{"enc":"A256CBC-HS512"}'), "enc is 'A256CBC-HS512'"),
    "enc no string": (protected('{"enc":null}'), "enc is None"),
    "enc twice": (protected('{"enc":"A256GCM","enc":"A256GCM"}'), "repeats the member 'enc'"),
    "alg in protected": (protected('{"alg":"dir","enc":"A256GCM"}'), "unknown member 'alg'"),
    "zip in protected": (protected('{"enc":"A256GCM","zip":"DEF"}'), "unknown member 'zip'"),
    "crit in protected": (protected('{"crit":["x"],"enc":"A256GCM","x":1}'), "unknown member 'crit'"),
    "aad no digest": (top(aad=b64url_encode(b"x")), "aad is not of the form sha256"),
    "aad not ASCII": (top(aad=b64url_encode(b"\xff")), "aad is not of the form sha256"),
    "aad empty": (top(aad=""), "aad is not of the form sha256"),
    "aad upper case": (top(aad=b64url_encode(DIGEST.upper().encode())), "aad is not of the form sha256"),
    "aad with more": (top(aad=b64url_encode(DIGEST.encode() + b"\n")), "aad is not of the form sha256"),
    "alg missing": (header(0, alg=None), "recipient 0: alg is missing"),
    "alg no string": (header(0, alg=["A256KW"]), "alg is missing or malformed"),
    "alg empty": (header(0, alg=""), "alg is missing or malformed"),
    "alg too long": (header(0, alg="x" * 65), "alg is missing or malformed"),
    "alg not ASCII": (header(0, alg="Ä"), "alg is missing or malformed"),
    "kid no string": (header(0, kid=1), "kid is not"),
    "kid too long": (header(0, kid="x" * 257), "kid is not"),
    "kid with a line end": (header(0, kid="a\nb"), "kid is not"),
    "crit": (header(0, crit=["x"]), "'crit' is not allowed"),
    "zip": (header(RSA, zip="DEF"), "'zip' is not allowed"),
    "jku": (header(RSA, jku="https://x/"), "'jku' is not allowed"),
    "x5u": (header(RSA, x5u="https://x/"), "'x5u' is not allowed"),
    "jwk": (header(RSA, jwk={}), "'jwk' is not allowed"),
    "enc in header": (header(RSA, enc="A128GCM"), "'enc' is not allowed"),
    "jku of an unknown algorithm": (header(0, alg="NEW", jku="https://x/"), "'jku' is not allowed"),
    "crit of an unknown algorithm": (header(0, alg="NEW", crit=["x"]), "'crit' is not allowed"),
    "apu": (header(ECDH, apu="AA"), "'apu' does not belong to ECDH-ES"),
    "epk for RSA": (header(RSA, epk=_p521), "'epk' does not belong to RSA-OAEP-256"),
    "p2c for a KEK": (header(KEK, p2c=600_000), "'p2c' does not belong to A256KW"),
    "epk missing": (header(ECDH, epk=None), "header lacks the member epk"),
    "epk no object": (header(ECDH, epk="x"), "epk is not a JSON object"),
    "epk with a private part": (epk(ECDH, d="AA"), "epk is no public EC or OKP key"),
    "epk with a kid": (epk(ECDH, kid="x"), "epk is no public EC or OKP key"),
    "epk without x": (epk(ECDH, x=None), "epk is no public EC or OKP key"),
    "epk symmetric": (header(ECDH, epk={"kty": "oct", "k": "AA"}), "epk is no public EC or OKP key"),
    "epk RSA": (header(ECDH, epk={"kty": "RSA", "n": "AA", "e": "AQAB"}), "epk is no public EC or OKP key"),
    "epk of another type": (epk(NIST, kty="OKP"), "epk is no public EC or OKP key"),
    "epk Ed25519": (epk(ECDH, crv="Ed25519"), "epk is not for key agreement"),
    "epk off the curve": (epk(NIST, y=b64url_encode(bytes(32))), "not on the curve P-256"),
    "epk of another curve": (epk(NIST, crv="P-384"), "x is 32 bytes, not 48"),
    "epk of small order": (epk(ECDH, x=b64url_encode(bytes(32))), "small order"),
    "epk of order 8": (epk(ECDH, x=b64url_encode(b"\x01" + bytes(31))), "small order"),
    "epk not canonical": (epk(ECDH, x=b64url_encode(b"\xff" * 32)), "not a canonical X25519"),
    "p2c missing": (header(PBES2, p2c=None), "header lacks the member p2c"),
    "p2c one": (header(PBES2, p2c=1), "p2c is not between 210000 and 1000000"),
    "p2c low": (header(PBES2, p2c=209_999), "p2c is not between"),
    "p2c high": (header(PBES2, p2c=1_000_001), "p2c is not between"),
    "p2c endless": (header(PBES2, p2c=2**53 - 1), "p2c is not between"),
    "p2c true": (header(PBES2, p2c=True), "p2c is not between"),
    "p2c string": (header(PBES2, p2c="600000"), "p2c is not between"),
    "p2s missing": (header(PBES2, p2s=None), "header lacks the member p2s"),
    "p2s short": (header(PBES2, p2s=b64url_encode(bytes(15))), "p2s is 15 bytes"),
    "p2s long": (header(PBES2, p2s=b64url_encode(bytes(65))), "p2s is 65 bytes"),
    "key of a KEK too short": (entry(KEK, encrypted_key=b64url_encode(bytes(24))), "24 bytes does not fit A256KW"),
    "key of a KEK too long": (entry(KEK, encrypted_key=b64url_encode(bytes(48))), "48 bytes does not fit A256KW"),
    "key of ECDH": (entry(ECDH, encrypted_key=b64url_encode(bytes(39))), "39 bytes does not fit ECDH-ES"),
    "key of RSA too short": (entry(RSA, encrypted_key=b64url_encode(bytes(255))), "255 bytes does not fit RSA"),
    "key of RSA too long": (entry(RSA, encrypted_key=b64url_encode(bytes(1025))), "1025 bytes does not fit RSA"),
    "key of HPKE": (entry(HPKE, encrypted_key=b64url_encode(bytes(1167))), "1167 bytes does not fit HPKE"),
    "key of PBES2": (entry(PBES2, encrypted_key=""), "0 bytes does not fit PBES2"),
    "key no string": (entry(KEK, encrypted_key=None), "encrypted_key is not canonical"),
    "key of an unknown algorithm": (
        lambda tree: tree["recipients"].append({"header": {"alg": "NEW"}, "encrypted_key": "A" * 30000}),
        "encrypted_key is larger than 16384 bytes",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(name: str) -> None:
    change, reason = MALFORMED[name]
    with pytest.raises(FormatError, match=reason) as caught:
        parse_keyring(changed(change), DIGEST)
    assert caught.value.message.startswith("keyring ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "keyring is not JSON"),
        (b"null", "keyring is not a JSON object"),
        (b"[]", "keyring is not a JSON object"),
        (GOOD + b"{}", "keyring is not JSON"),
        (GOOD.replace(b'"aad"', b'"iv":"AA","aad"', 1), "keyring repeats the member 'iv'"),
        (GOOD.replace(b'"alg":"A256KW"', b'"alg":"dir","alg":"A256KW"', 1), "keyring repeats the member 'alg'"),
        (b" " * (MAX_KEYRING_SIZE + 1), "keyring is 1048577 bytes"),
        (b"\xff\xfe" + GOOD, "keyring is not UTF-8"),
        (b"[" * 100_000, "keyring nests deeper"),
    ],
)
def test_malformed_json(content: bytes, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        parse_keyring(content, DIGEST)


@pytest.mark.parametrize(
    "alg", ["dir", "ECDH-ES", "RSA-OAEP", "RSA1_5", "A128KW", "PBES2-HS256+A128KW", "none", "A256kw"]
)
def test_weaker_algorithms_are_never_tried(alg: str) -> None:
    """They are unknown, so a keyring with nothing else opens for nobody."""
    for index in range(len(KINDS)):
        tree = copy.deepcopy(TREE)
        tree["recipients"] = [tree["recipients"][index]]
        tree["recipients"][0]["header"]["alg"] = alg
        keyring = parse_keyring(json.dumps(tree).encode(), DIGEST)
        assert keyring.recipients[0].kind == "unknown"
        for kind in KINDS:
            with pytest.raises(WrongKeyError):
                keyring.open([holder(kind)])


def test_an_algorithm_that_does_not_fit_the_key() -> None:
    """A KEK whose bytes are an RSA or EC key's, an RSA entry as long as another: the type decides, and fails closed."""
    tree = copy.deepcopy(TREE)
    tree["recipients"][KEK]["header"]["alg"] = "PBES2-HS512+A256KW"
    tree["recipients"][KEK]["header"] |= {"p2s": b64url_encode(bytes(16)), "p2c": 210_000}
    keyring = parse_keyring(json.dumps(tree).encode(), DIGEST)
    with pytest.raises(WrongKeyError, match="is for recipients of type oct, and the keyring has none"):
        keyring.open([holder("oct")])
    for kind in KINDS:
        fitting = [found for found in parse_keyring(GOOD, DIGEST).recipients if found.kind == kind.removesuffix("3072")]
        for other in KINDS:
            if other != kind:
                with pytest.raises(WrongKeyError):
                    unwrap_with_key(private(other) if other != "oct" else _kek(), fitting, DIGEST, "it")


def _kek() -> SymmetricKey:
    made = key("oct")
    assert isinstance(made, SymmetricKey)
    return made


def test_a_keyring_of_another_artifact() -> None:
    with pytest.raises(IntegrityError) as caught:
        parse_keyring(GOOD, OTHER_DIGEST)
    assert DIGEST in caught.value.message
    assert OTHER_DIGEST in caught.value.message


def test_the_aad_is_authenticated() -> None:
    """A keyring of another artifact, relabelled for this one, unwraps but does not decrypt."""
    keyring = parse_keyring(changed(top(aad=b64url_encode(OTHER_DIGEST.encode()))), OTHER_DIGEST)
    for kind in KINDS:
        with pytest.raises((IntegrityError, WrongKeyError)):
            keyring.open([holder(kind)])
    with pytest.raises(IntegrityError, match="not what was sealed"):
        keyring.open([holder("p256")])


def test_the_protected_header_is_authenticated() -> None:
    keyring = parse_keyring(changed(protected('{ "enc":"A256GCM"}')), DIGEST)
    with pytest.raises(IntegrityError, match="not what was sealed"):
        keyring.open([holder("p256")])


def test_mixing_two_keyrings_of_one_artifact() -> None:
    other = json.loads(create_keyring(b"another payload", DIGEST, [recipient(kind) for kind in KINDS]))
    for name in ("iv", "ciphertext", "tag"):
        keyring = parse_keyring(changed(top(**{name: other[name]})), DIGEST)
        with pytest.raises(IntegrityError):
            keyring.open([holder("p256")])
    swapped = parse_keyring(changed(top(recipients=other["recipients"])), DIGEST)
    for kind in KINDS:
        with pytest.raises(IntegrityError):
            swapped.open([holder(kind)])


def test_a_recipient_can_make_another_keyring() -> None:
    """Whoever knows the content key can seal another payload: this is why the descriptor commits to the payload."""
    cek = unwrap_with_key(private("p256"), parse_keyring(GOOD, DIGEST).recipients, DIGEST, "it")
    iv = b64url_decode(TREE["iv"], "iv")
    associated = f"{TREE['protected']}.{TREE['aad']}".encode()
    sealed = AESGCM(cek).encrypt(iv, b"forged", associated)
    forged = changed(top(ciphertext=b64url_encode(sealed[:-16]), tag=b64url_encode(sealed[-16:])))
    assert parse_keyring(forged, DIGEST).open([holder("x25519")]) == b"forged"


# --- exhaustive, at random, and costs --------------------------------------------------------------------------------

SMALL = create_keyring(PAYLOAD, DIGEST, [recipient("p256"), recipient("oct")])


def opens(content: bytes) -> bytes | None:
    """The payload, or None where the keyring is refused with an error that a user can read."""
    found = None
    try:
        keyring = parse_keyring(content, DIGEST)
        for kind in ("oct", "p256"):
            try:
                found = bytes(keyring.open([holder(kind)]))
            except WrongKeyError as error:
                assert "\n" not in str(error)  # noqa: PT017
    except EncfsError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return None
    return found


@pytest.mark.parametrize("bit", [0x01, 0x20, 0x80])
def test_every_byte_changed(bit: int) -> None:
    content = bytearray(SMALL)
    for at in range(len(content)):
        content[at] ^= bit
        assert opens(bytes(content)) in (None, PAYLOAD), at
        content[at] ^= bit


def test_every_length() -> None:
    for length in range(len(SMALL)):
        assert opens(SMALL[:length]) is None, length
    assert opens(SMALL + b"\n") == PAYLOAD


def test_every_byte_of_a_flattened_keyring_changed() -> None:
    content = bytearray(jwcrypto_keyring(["oct"]))
    for at in range(len(content)):
        content[at] ^= 0x01
        found = opens(bytes(content))
        assert found is None or found == b'{"a":"payload"}', at
        content[at] ^= 0x01


_values: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**60), 2**60),
    st.text(max_size=20),
    st.binary(max_size=64).map(b64url_encode),
    st.lists(st.text(max_size=5), max_size=3),
    st.dictionaries(st.sampled_from(["alg", "epk", "kty", "crv", "x", "enc"]), st.text(max_size=10), max_size=3),
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, member in items:
        found += _places(member, (*path, name))
    return found


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_anything_anywhere(data: st.DataObject) -> None:
    """Values replaced, dropped and added at random places: refused, or the same payload."""
    tree = json.loads(SMALL)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(_places(tree)))
        parent = tree
        for name in path[:-1]:
            parent = parent[name]
        action = data.draw(st.sampled_from(["replace", "drop", "add"]))
        if action == "drop":
            del parent[path[-1]]
        elif action == "add" and isinstance(parent, dict):
            parent[data.draw(st.sampled_from(["zip", "crit", "jku", "x", "kid", "epk", "p2c", "header"]))] = data.draw(
                _values
            )
        else:
            parent[path[-1]] = data.draw(_values)
        if not _places(tree):
            break
    assert opens(json.dumps(tree).encode()) in (None, PAYLOAD)


def test_the_most_expensive_keyring_is_bounded() -> None:
    """64 RSA entries of the largest size and 4 passphrases at the most iterations: seconds, not minutes."""
    wrong = Recipient(0, "PBES2-HS512+A256KW", None, bytes(40), salt=bytes(16), iterations=1_000_000)
    started = time.process_time()
    with pytest.raises(WrongKeyError):
        unwrap_with_passphrase(Passphrase(bytearray(b"x")), [wrong] * 4, "it")
    assert time.process_time() - started < 20
    tree = copy.deepcopy(TREE)
    tree["recipients"] = [tree["recipients"][RSA]] * 64
    for at in range(64):
        tree["recipients"][at] = copy.deepcopy(tree["recipients"][at])
        tree["recipients"][at]["encrypted_key"] = b64url_encode(bytes([at] * 384))
    keyring = parse_keyring(json.dumps(tree).encode(), DIGEST)
    started = time.process_time()
    with pytest.raises(WrongKeyError, match="tried 0, 1, 2"):
        keyring.open([holder("rsa3072")])
    assert time.process_time() - started < 20


def test_a_large_keyring_is_read_quickly() -> None:
    unknown = {"header": {"alg": "NEW", "x": ["y" * 100] * 20}, "encrypted_key": "A" * 10000}
    tree = copy.deepcopy(TREE)
    tree["recipients"] += [unknown] * (64 - len(tree["recipients"]))
    content = json.dumps(tree).encode()
    assert len(content) > 600_000
    started = time.process_time()
    keyring = parse_keyring(content, DIGEST)
    assert time.process_time() - started < 5
    assert keyring.open([holder("p256")]) == PAYLOAD


def test_a_kid_that_claims_to_be_ours_first() -> None:
    """An adversary's entry under our key id is tried first, does not open, and ours behind it still does."""
    tree = json.loads(create_keyring(PAYLOAD, DIGEST, [recipient("p256", 1), recipient("p256")]))
    tree["recipients"][0]["header"]["kid"] = public("p256").kid
    del tree["recipients"][1]["header"]["kid"]
    assert parse_keyring(json.dumps(tree).encode(), DIGEST).open([holder("p256")]) == PAYLOAD


def test_no_secret_in_any_error() -> None:
    secrets = [private_jwk(key(kind)) for kind in KINDS]
    texts = []
    for change, _ in MALFORMED.values():
        try:
            parse_keyring(changed(change), DIGEST).open([holder("p256")])
        except EncfsError as error:
            texts.append(str(error))
    assert len(texts) == len(MALFORMED)
    for members in secrets:
        for name in {"d", "k", "priv", "p"} & set(members):
            assert all(members[name] not in text for text in texts)
    with pytest.raises(WrongKeyError) as caught:
        parse_keyring(GOOD, DIGEST).open([Holder(Passphrase(bytearray(b"hunter2")), "passphrase:")])
    assert "hunter2" not in str(caught.value)
