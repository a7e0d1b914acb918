"""ocicrypt's key provider protocol, CoCo's packets, and keyrings that services wrapped."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from encfs.encoding import b64_encode
from encfs.errors import EncfsError, FormatError, IntegrityError, KeyFileError, KeyProviderError, WrongKeyError
from encfs.keyprovider import config, grpcmessage, protocol
from encfs.keyprovider.client import KeyService, parse_service
from encfs.keyprovider.config import ENVIRONMENT, Command, GrpcServer, TlsFiles, TtrpcServer, parse_config
from encfs.keyprovider.protocol import UnwrapRequest, WrapRequest, parse_request
from encfs.keys.keyring import Keyring, create_keyring, parse_keyring
from encfs.keys.providers import availabilities, known_schemes, provider_from_uri
from encfs.keys.providers.keyprovider import KeyServiceProvider
from encfs.keys.recipients import Recipient, WrappingService, unwrap_with_service
from encfs.keys.secrets import SymmetricKey
from imagetool.ocicrypt import packets
from imagetool.ocicrypt.keyservice import KeyService as Server
from imagetool.ocicrypt.keyservice import load_keys
from imagetool.ocicrypt.options import parse_private_options
from tests.support.keys import DIGEST, OTHER_DIGEST

KID = "kbs:///default/key/1"
SAMPLE_KEK = bytes.fromhex("d99b7705b0ba7a168295b3a3367270b0dd9b371bf514ca8b9ba7f0a33711daea")
VECTOR = (Path(__file__).parents[2] / "fixtures" / "ocicrypt" / "coco-annotation-packet.json").read_bytes()


# -- messages: what skopeo 1.13 sends, byte for byte

WRAP = (
    b'{"op":"keywrap","keywrapparams":{"ec":{"Parameters":{"mykp":["a2V5aWQ9YWJjOjp4PXk="]},"DecryptConfig":'
    b'{"Parameters":{}}},"optsdata":"eyJhIjoxfQ=="},"keyunwrapparams":{"dc":null,"annotation":null}}'
)
UNWRAP = (
    b'{"op":"keyunwrap","keywrapparams":{"ec":null,"optsdata":null},"keyunwrapparams":'
    b'{"dc":{"Parameters":{"mykp":["Zm9v"]}},"annotation":"cGFja2V0"}}'
)


def test_requests_are_those_of_skopeo() -> None:
    assert protocol.wrap_request("mykp", b"keyid=abc::x=y", b'{"a":1}') == WRAP
    assert protocol.unwrap_request("mykp", b"foo", b"packet") == UNWRAP


def test_requests_are_read() -> None:
    wrap, unwrap = parse_request(WRAP), parse_request(UNWRAP)
    assert isinstance(wrap, WrapRequest)
    assert (wrap.parameters, wrap.options) == ({"mykp": [b"keyid=abc::x=y"]}, b'{"a":1}')
    assert isinstance(unwrap, UnwrapRequest)
    assert (unwrap.parameters, unwrap.annotation) == ({"mykp": [b"foo"]}, b"packet")
    assert "options" not in repr(wrap)


def test_options_may_be_the_text_itself_as_rust_sends_them() -> None:
    request = json.loads(WRAP)
    request["keywrapparams"]["optsdata"] = '{"a":1}'
    parsed = parse_request(json.dumps(request).encode())
    assert isinstance(parsed, WrapRequest)
    assert parsed.options == b'{"a":1}'


@pytest.mark.parametrize("value", [list(b"packet"), "cGFja2V0"])
def test_answers_of_both_languages_are_read(value: object) -> None:
    wrap = json.dumps({"keywrapresults": {"annotation": value}}).encode()
    unwrap = json.dumps({"keyunwrapresults": {"optsdata": value}}).encode()
    assert protocol.parse_wrap_answer(wrap, "it") == b"packet"
    assert protocol.parse_unwrap_answer(unwrap, "it") == b"packet"


def test_answers_are_arrays() -> None:
    assert protocol.wrap_answer(b"ab") == b'{"keywrapresults":{"annotation":[97,98]}}'
    assert protocol.unwrap_answer(b"ab") == b'{"keyunwrapresults":{"optsdata":[97,98]}}'
    biggest = bytes(protocol.MAX_DATA_SIZE)
    assert protocol.parse_wrap_answer(protocol.wrap_answer(b"\xff" * len(biggest)), "it") == b"\xff" * len(biggest)


@pytest.mark.parametrize(
    "value",
    [None, 5, [256], [-1], [True], ["a"], [1.0], "not base64", {}, "A" * (70 << 10), [0] * ((48 << 10) + 1)],
)
def test_malformed_answers_are_refused(value: object) -> None:
    with pytest.raises(FormatError, match="it"):
        protocol.parse_wrap_answer(json.dumps({"keywrapresults": {"annotation": value}}).encode(), "it")


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"keywrapresults":null}', b" " * (513 << 10)])
def test_answers_that_are_none_are_refused(content: bytes) -> None:
    with pytest.raises(FormatError):
        protocol.parse_wrap_answer(content, "it")


@given(st.binary(max_size=100))
def test_messages_of_grpc(content: bytes) -> None:
    assert grpcmessage.decode(grpcmessage.encode(content)) == content
    assert grpcmessage.encode(b"x" * 300)[:3] == b"\x0a\xac\x02"
    try:
        grpcmessage.decode(content)
    except FormatError:
        pass
    else:
        assert not content or content[0] == 0x0A


# -- configuration


def _config(value: object, name: str = "it") -> bytes:
    return json.dumps({"key-providers": {name: value}}).encode()


def test_configurations() -> None:
    for value, expected in (
        ({"cmd": {"path": "/x", "args": ["a", "b"]}}, Command(("/x", "a", "b"))),
        ({"cmd": {"path": "x", "args": None}, "grpc": "y:1"}, Command(("x",))),
        ({"grpc": "127.0.0.1:50000"}, GrpcServer("127.0.0.1:50000", None)),
        ({"grpc": "unix:///run/x"}, GrpcServer("unix:/run/x", None)),
        (
            {"grpc": "kp:1", "grpc-tls": {"root-ca-file": "ca", "server-name": "n"}},
            GrpcServer("kp:1", TlsFiles("ca", None, None, "n")),
        ),
        ({"ttrpc": "unix:///run/cdh.sock"}, TtrpcServer("/run/cdh.sock")),
    ):
        assert parse_config(_config(value)) == {"it": expected}
    assert parse_config(_config({"native": "attestation-agent"})) == {}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b'{"key-providers":[]}',
        _config([]),
        _config({"cmd": {}}),
        _config({"cmd": {"path": ""}}),
        _config({"cmd": {"path": "x", "args": "y"}}),
        _config({"cmd": {"path": "x", "args": [1]}}),
        _config({"grpc": ""}),
        _config({"grpc": "a\nb"}),
        _config({"grpc": "x:1", "grpc-tls": {"insecure-skip-verify": True}}),
        _config({"grpc": "x:1", "grpc-tls": {"root-ca-file": 5}}),
        _config({"ttrpc": "tcp://x"}),
        _config({"grpc": "x:1"}, name="a/b"),
        _config({"grpc": "x:1"}, name=""),
    ],
)
def test_malformed_configurations_are_refused(content: bytes) -> None:
    with pytest.raises(FormatError):
        parse_config(content)


def test_a_missing_configuration_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert config.unavailable() == f"{ENVIRONMENT} is not set"
    with pytest.raises(KeyProviderError, match=f"{ENVIRONMENT} is not set"):
        KeyService("it", b"x").unwrap(b"packet")
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "none"))
    assert "which is not there" in str(config.unavailable())
    with pytest.raises(KeyProviderError, match="No such file"):
        KeyService("it", b"x").wrap(b"options")
    (tmp_path / "config").write_bytes(_config({"grpc": "127.0.0.1:1"}, name="other"))
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "config"))
    assert config.unavailable() is None
    with pytest.raises(KeyProviderError, match="has no usable key provider it; it has other"):
        KeyService("it", b"x").wrap(b"options")


@pytest.mark.parametrize(
    ("text", "name", "parameters"),
    [("a", "a", b"Enabled"), ("a:", "a", b"Enabled"), ("a.b-c:keyid=kbs:///x", "a.b-c", b"keyid=kbs:///x")],
)
def test_names_and_parameters(text: str, name: str, parameters: bytes) -> None:
    service = parse_service(text)
    assert (service.name, service.parameters) == (name, parameters)


@pytest.mark.parametrize("text", ["", ":x", "a/b", "a b", "-a"])
def test_malformed_names_are_refused(text: str) -> None:
    with pytest.raises(KeyFileError):
        parse_service(text)


def test_keys_go_to_other_machines_under_tls_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").write_bytes(_config({"grpc": "keys.example:443"}))
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "config"))
    with pytest.raises(KeyProviderError, match="under TLS only") as caught:
        KeyService("it", b"x").wrap(b"options")
    assert "grpc-tls" in str(caught.value.hint)


# -- packets of Confidential Containers


def test_the_published_packet_opens() -> None:
    packet = packets.parse(VECTOR)
    assert packet.kid == KID
    options = packets.unwrap(packet, SymmetricKey(bytearray(SAMPLE_KEK)))
    assert set(json.loads(options)) == {"symkey", "digest", "cipheroptions"}
    assert len(parse_private_options(options).secret) == 32


def test_packets_are_version_1() -> None:
    kek = SymmetricKey(bytearray(SAMPLE_KEK))
    content = packets.wrap(b"options", kek, KID)
    assert list(json.loads(content)) == ["kid", "wrapped_data", "iv", "wrap_type"]
    assert packets.unwrap(packets.parse(content), kek) == b"options"
    second = json.loads(content) | {"version": "0.1.0", "provider": "kbs", "provider_settings": {}, "annotations": {}}
    assert packets.unwrap(packets.parse(json.dumps(second).encode()), kek) == b"options"
    with pytest.raises(IntegrityError, match="another key, or was altered"):
        packets.unwrap(packets.parse(content), SymmetricKey(bytearray(32)))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"wrap_type": "A256CTR"}, "'A256CTR' is not A256GCM"),
        ({"iv": b64_encode(bytes(16))}, "wrong length"),
        ({"wrapped_data": b64_encode(bytes(15))}, "wrong length"),
        ({"kid": "file:///etc/passwd"}, "no resource"),
        ({"kid": "kbs:///a/../\x1b[2J"}, "no resource"),
        ({"kid": 1}, "no resource"),
        ({"version": "0.2.0"}, "version or provider"),
        ({"provider": "aliyun"}, "version or provider"),
        ({"more": 1}, "unknown member"),
        ({"iv": "!"}, "not canonical base64"),
    ],
)
def test_malformed_packets_are_refused(change: dict[str, object], problem: str) -> None:
    with pytest.raises(FormatError, match=problem):
        packets.parse(json.dumps(json.loads(VECTOR) | change).encode())


# -- being a provider


@pytest.fixture
def server() -> Server:
    keys = {KID: SymmetricKey(bytearray(SAMPLE_KEK)), "kbs:///default/key/2": SymmetricKey(bytearray(32))}
    return Server(keys)


def _wrap(parameters: str | None, name: str = "attestation-agent") -> bytes:
    request = json.loads(WRAP)
    values = {} if parameters is None else {name: [b64_encode(parameters.encode())]}
    request["keywrapparams"]["ec"]["Parameters"] = values | {"pubkeys": [b64_encode(b"of another scheme")]}
    return json.dumps(request).encode()


@pytest.mark.parametrize(
    ("parameters", "kid"),
    [
        (f"keyid={KID}", KID),
        (f"keyid={KID}::algorithm=A256GCM", KID),
        ("kbs:///default/key/2", "kbs:///default/key/2"),
    ],
)
def test_the_provider_wraps_under_the_key_that_is_asked_for(server: Server, parameters: str, kid: str) -> None:
    packet = protocol.parse_wrap_answer(server.answer(_wrap(parameters)), "it")
    assert packets.parse(packet).kid == kid
    answer = server.answer(protocol.unwrap_request("attestation-agent", b"Enabled", packet))
    assert protocol.parse_unwrap_answer(answer, "it") == b'{"a":1}'


def test_without_parameters_the_only_key_is_meant(server: Server) -> None:
    only = Server({KID: SymmetricKey(bytearray(SAMPLE_KEK))}, "mine")
    for request in (_wrap(None), _wrap("Enabled", "mine"), _wrap("keyid=other", "another")):
        assert packets.parse(protocol.parse_wrap_answer(only.answer(request), "it")).kid == KID
    with pytest.raises(FormatError, match="names no key"):
        server.answer(_wrap(None))


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ("keyid=kbs:///no/such/key", "no key 'kbs:///no/such/key'"),
        (f"keyid={KID}::algorithm=A256CTR", "'A256CTR' is not supported"),
        (f"keyid={KID}::keypath=/etc/shadow", "'keypath' is not supported"),
        ("algorithm=A256GCM", "names no key"),
    ],
)
def test_other_wishes_are_refused(server: Server, parameters: str, problem: str) -> None:
    with pytest.raises(EncfsError, match=problem):
        server.answer(_wrap(parameters))


def test_malformed_requests_are_refused(server: Server) -> None:
    for content in (
        b"",
        b"{}",
        b'{"op":"steal"}',
        b'{"op":"keywrap"}',
        UNWRAP,
        b'{"op":"keyunwrap","keyunwrapparams":{}}',
    ):
        with pytest.raises(FormatError):
            server.answer(content)
    altered = json.loads(VECTOR) | {"iv": b64_encode(bytes(12))}
    with pytest.raises(IntegrityError):
        server.answer(protocol.unwrap_request("x", b"", json.dumps(altered).encode()))
    server.close()
    with pytest.raises(IntegrityError):
        server.answer(protocol.unwrap_request("x", b"", VECTOR))


def test_keys_by_name(tmp_path: Path) -> None:
    kek = tmp_path / "kek"
    kek.touch(0o600)
    kek.write_bytes(SAMPLE_KEK)
    assert load_keys([f"{KID}={kek}"])[KID].secret == SAMPLE_KEK
    kek.write_text(base64.b64encode(SAMPLE_KEK).decode())
    assert load_keys([f"{KID}=file:{kek}"])[KID].secret == SAMPLE_KEK
    kek.chmod(0o644)
    for text, problem in (
        (f"{KID}={kek}", "accessible by others"),
        (KID, "KID=KEYURI"),
        (f"key={kek}", "names no resource"),
        (f"{KID}={tmp_path / 'none'}", "does not exist"),
    ):
        with pytest.raises(EncfsError, match=problem):
            load_keys([text])


# -- keyrings

PAYLOAD = b"payload"


def _seal(content: bytearray) -> bytes:
    return b"sealed:" + bytes(content)


def _unseal(packet: bytes) -> bytearray:
    return bytearray(packet.removeprefix(b"sealed:"))


class _Opener(KeyServiceProvider):
    """The provider with another service behind it."""

    def __init__(self, name: str, unwrap: Callable[[bytes], bytearray]) -> None:
        super().__init__(name)
        self._unwrap = unwrap

    def unwrap(self, recipients: Any, content_digest: str) -> bytearray:
        return unwrap_with_service(self._service.name, self._unwrap, recipients, content_digest)


def _keyring(*services: WrappingService, digest: str = DIGEST) -> Keyring:
    return parse_keyring(create_keyring(PAYLOAD, digest, services), digest)


def test_a_keyring_is_opened_by_the_service_that_wrapped_it() -> None:
    keyring = _keyring(WrappingService("one", _seal), WrappingService("two", lambda content: b"2" + bytes(content)))
    assert [(one.kind, one.alg, one.service) for one in keyring.recipients] == [
        ("keyprovider", "OCICRYPT-KEYPROVIDER", "one"),
        ("keyprovider", "OCICRYPT-KEYPROVIDER", "two"),
    ]
    assert keyring.open([_Opener("one", _unseal)]) == PAYLOAD
    assert keyring.open([_Opener("two", lambda packet: bytearray(packet[1:]))]) == PAYLOAD
    with pytest.raises(WrongKeyError, match="no recipient of the key provider three; it has some of one, two"):
        keyring.open([_Opener("three", _unseal)])
    with pytest.raises(KeyProviderError, match="cannot"):
        keyring.open([_Opener("one", _failing)])


def _failing(packet: bytes) -> bytearray:
    raise KeyProviderError("it cannot")


def test_the_bytes_that_a_service_is_given() -> None:
    """The form of docs/format.md, section 7."""
    seen: list[bytes] = []

    def wrap(content: bytearray) -> bytes:
        seen.append(bytes(content))
        return b"packet"

    keyring = _keyring(WrappingService("one", wrap))
    (content,) = seen
    symkey = json.loads(content)["symkey"]
    assert content.decode() == f'{{"cipheroptions":{{}},"digest":"{DIGEST}","symkey":"{symkey}"}}'
    assert len(base64.b64decode(symkey)) == 32
    assert keyring.recipients[0].encrypted_key == b"packet"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b'{"cipheroptions":{},"digest":"%b","symkey":"%b"}' % (OTHER_DIGEST.encode(), b64_encode(bytes(32)).encode()),
        b'{"cipheroptions":{},"digest":"%b","symkey":"%b"}' % (DIGEST.encode(), b64_encode(bytes(16)).encode()),
        b'{"cipheroptions":{"nonce":"AAAAAAAAAAAAAAAAAAAAAA=="},"digest":"%b","symkey":"%b"}'
        % (DIGEST.encode(), b64_encode(bytes(32)).encode()),
        b'{"digest":"%b","symkey":"%b"}' % (DIGEST.encode(), b64_encode(bytes(32)).encode()),
    ],
)
def test_what_was_not_wrapped_for_this_artifact_is_no_key(content: bytes) -> None:
    """A layer of ocicrypt's, which has a nonce, or another artifact's keyring: neither is taken for this one's."""
    recipient = Recipient(0, "OCICRYPT-KEYPROVIDER", None, b"x", service="one")
    with pytest.raises(WrongKeyError, match="what the key provider one unwrapped is no key"):
        unwrap_with_service("one", lambda packet: bytearray(content), [recipient], DIGEST)


def test_a_second_packet_of_the_same_service_is_tried() -> None:
    keyring = _keyring(WrappingService("one", lambda content: b"for somebody else"), WrappingService("one", _seal))
    assert keyring.open([_Opener("one", _unseal)]) == PAYLOAD


@pytest.mark.parametrize("size", [0, (16 << 10) + 1])
def test_packets_of_wrong_sizes_are_not_written(size: int) -> None:
    with pytest.raises(KeyProviderError, match="made a packet of"):
        _keyring(WrappingService("one", lambda content: bytes(size)))


@pytest.mark.parametrize("name", [None, 5, "", "a/b", "x" * 200])
def test_malformed_recipients_are_refused(name: object) -> None:
    document = json.loads(create_keyring(PAYLOAD, DIGEST, [WrappingService("one", _seal)]))
    document["recipients"][0]["header"]["provider"] = name
    with pytest.raises(FormatError, match="not the name of a key provider"):
        parse_keyring(json.dumps(document).encode(), DIGEST)


def test_the_scheme_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert "keyprovider" in known_schemes()
    assert provider_from_uri("keyprovider:agent:keyid=x").uri == "keyprovider:agent"
    (found,) = [one for one in availabilities() if one.scheme == "keyprovider"]
    assert found.reason == f"{ENVIRONMENT} is not set"
