"""`skr:` against Azure's services as they behave: what is released opens an artifact's keyring, what is not is said."""

from __future__ import annotations

import base64
import ctypes
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from encfs.attestation.collect.sources import Machine
from encfs.errors import AttestationError, KeyFileError, KeyProviderError, KeyRefusedError, WrongKeyError
from encfs.keys import jwk
from encfs.keys.keyring import create_keyring, parse_keyring
from encfs.keys.providers import fetched_key
from encfs.keys.providers.skr import SkrProvider, parse_request
from encfs.keys.secrets import SymmetricKey
from encfs.webclient import Address
from tests.support.azure import Azure, encode, serving
from tests.support.kbs_server import make_certificate
from tests.support.sev_guest import Firmware

FIXTURES = Path(__file__).parents[2] / "fixtures" / "evidence"
DIGEST = "sha256:" + "5a" * 32
KEK = bytes(range(32))
POLICY = b"package policy\n"


@dataclass(frozen=True)
class Place:
    """A container group of Azure's, and the services that it reaches."""

    azure: Azure
    machine: Machine
    firmware: Firmware
    direct: str
    sidecar: str


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def place(certificate: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    azure = Azure({"chat": ("oct", KEK)}, host_data=hashlib.sha256(POLICY).digest())
    context = tmp_path / "context"
    context.mkdir()
    pem = (FIXTURES / "azure" / "snp-vcek.pem").read_text()
    contents = {
        "host-amd-cert-base64": json.dumps({"vcekCert": pem, "certificateChain": pem}).encode(),
        "reference-info-base64": b"COSE",
        "security-policy-base64": POLICY,
    }
    for name, content in contents.items():
        (context / name).write_bytes(base64.b64encode(content) + b"\n")
    monkeypatch.setenv("UVM_SECURITY_CONTEXT_DIR", str(context))
    firmware = Firmware(report=(FIXTURES / "snp" / "report-vcek.bin").read_bytes())
    (tmp_path / "sev-guest").touch()
    with serving(azure, certificate) as secure, serving(azure, None) as plain:
        machine = Machine(
            tsm=tmp_path / "tsm",
            sev_guest=tmp_path / "sev-guest",
            metadata_service=Address("http", "127.0.0.1", plain, ""),
            ioctl=firmware.ioctl,
        )
        ends = f"akv=127.0.0.1:{secure}&maa=127.0.0.1:{secure}"
        yield Place(azure, machine, firmware, f"?{ends}&direct=yes&ca={certificate[0]}", f"?{ends}&port={plain}")


def opened(provider: SkrProvider, key: Any = None) -> bytes:
    """The payload of a keyring for KEK, or for another key, opened by the provider."""
    keyring = create_keyring(b"secret", DIGEST, [key or SymmetricKey(bytearray(KEK))])
    return bytes(parse_keyring(keyring, DIGEST).open([provider]))


def test_through_the_sidecar(place: Place) -> None:
    provider = SkrProvider(f"chat{place.sidecar}")
    assert opened(provider) == b"secret"
    assert opened(provider) == b"secret"
    assert place.azure.asked == ["/key/release"], "the key is kept until the provider is closed"
    provider.close()
    assert bytes(fetched_key(f"skr:chat{place.sidecar}").secret) == KEK
    with pytest.raises(KeyRefusedError, match="release policy is not met"):
        opened(SkrProvider(f"other{place.sidecar}"))


@pytest.mark.parametrize("wrapping", ["RSA_AES_KEY_WRAP_256", "CKM_RSA_AES_KEY_WRAP"])
def test_without_a_sidecar(place: Place, wrapping: str) -> None:
    place.azure.wrapping = wrapping
    provider = SkrProvider(f"chat{place.direct}", machine=place.machine)
    assert opened(provider) == b"secret"
    assert place.azure.asked == [
        "/metadata/identity/oauth2/token",
        "/attest/SevSnpVM",
        "/keys/chat/release",
    ]
    # A version of the key, and a token from a file.
    version = "chat/" + "0a" * 16
    place.azure.keys[version] = ("oct", KEK)
    token = place.machine.sev_guest.parent / "token"
    token.write_text("identity-token\n")
    assert opened(SkrProvider(f"{version}{place.direct}&token-file={token}", machine=place.machine)) == b"secret"


def test_a_private_key_of_the_vault(place: Place) -> None:
    private = rsa.generate_private_key(65537, 2048)
    place.azure.keys["pair"] = ("RSA", private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()))
    provider = SkrProvider(f"pair{place.direct}", machine=place.machine)
    assert opened(provider, jwk.private_key(private).public) == b"secret"
    with pytest.raises(KeyFileError, match="is a private key"):
        provider.fetch()
    with pytest.raises(WrongKeyError):
        opened(provider)


def test_what_is_refused(place: Place) -> None:
    def refused(kind: type[Exception], match: str, name: str = "chat") -> None:
        with pytest.raises(kind, match=match):
            opened(SkrProvider(f"{name}{place.direct}", machine=place.machine))

    place.azure.keys["long"] = ("oct", bytes(64))
    refused(KeyFileError, "is 64 bytes", "long")
    odd = ec.generate_private_key(ec.BrainpoolP256R1())
    place.azure.keys["odd"] = ("EC", odd.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()))
    refused(KeyFileError, "^skr:odd is on the curve brainpoolP256r1", "odd")
    refused(KeyProviderError, "status 404: A key with this name", "none")
    place.azure.host_data = bytes(32)
    refused(KeyRefusedError, "Azure Key Vault refuses with status 403: the release policy is not met")
    place.azure.identity = "another"
    place.azure.faults["/metadata/identity/oauth2/token"] = lambda *_: (200, {"access_token": "stolen"})
    refused(KeyRefusedError, "status 401: AKV10000")
    place.azure.faults["/metadata/identity/oauth2/token"] = lambda *_: (200, {})
    refused(KeyProviderError, "answers without access_token")
    place.azure.faults.clear()
    place.firmware.status = 5
    refused(AttestationError, "refused to make a report")


def test_a_report_over_other_data_is_refused_by_maa(place: Place) -> None:
    genuine = place.firmware.ioctl

    def lying(descriptor: int, request: int, argument: bytearray) -> int:
        result = genuine(descriptor, request, argument)
        ctypes.memmove(int.from_bytes(argument[16:24], "little") + 32 + 0x50, bytes(64), 64)
        return result

    machine = replace(place.machine, ioctl=lying)
    with pytest.raises(KeyRefusedError, match="Microsoft Azure Attestation refuses with status 400: the runtime data"):
        opened(SkrProvider(f"chat{place.direct}", machine=machine))


@pytest.mark.parametrize(("file", "message"), [("/dev/zero", "holds no access token"), ("none", "cannot be read")])
def test_a_token_file_that_holds_none(place: Place, file: str, message: str) -> None:
    with pytest.raises(KeyFileError, match=message):
        opened(SkrProvider(f"chat{place.direct}&token-file={file}", machine=place.machine))


def _payload(document: dict[str, Any]) -> dict[str, Any]:
    return {"value": f"e30.{encode(json.dumps(document).encode())}.AAAA"}


def _released(**hsm: object) -> dict[str, Any]:
    content = {"header": {"enc": "RSA_AES_KEY_WRAP_256"}, "ciphertext": encode(bytes(300)), **hsm}
    key = {"kty": "oct-HSM", "key_hsm": encode(json.dumps(content).encode())}
    return _payload({"response": {"key": {"key": key}}})


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({}, "answers without value"),
        ({"value": "x"}, "it is no JWS"),
        ({"value": "e30.!.AAAA"}, "base64url"),
        (_payload({}), "it has no response"),
        (_payload({"response": {"key": []}}), "it has no key"),
        (_released(header={"enc": "none"}), "wrapped by 'none'"),
        (_released(header={"enc": []}), "which is not known"),
        (_released(ciphertext=5), "ciphertext is not canonical"),
        (_released(), "does not open with the key that was attested"),
        (_released(ciphertext=""), "does not open with the key that was attested"),
    ],
)
def test_malformed_releases(place: Place, answer: dict[str, Any], message: str) -> None:
    place.azure.faults["/keys/chat/release"] = lambda *_: (200, answer)
    with pytest.raises(KeyProviderError, match=message):
        opened(SkrProvider(f"chat{place.direct}", machine=place.machine))


@pytest.mark.parametrize("key", ["", "{", '{"kty": "oct", "k": "AAAA"}', "[]", '{"kty": "EC"}'])
def test_malformed_keys_of_the_sidecar(place: Place, key: str) -> None:
    place.azure.faults["/key/release"] = lambda *_: (200, {"key": key})
    with pytest.raises((KeyFileError, KeyProviderError)):
        opened(SkrProvider(f"chat{place.sidecar}"))


def test_outside_of_azure(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UVM_SECURITY_CONTEXT_DIR")
    with pytest.raises(KeyProviderError, match="no confidential container of Azure's"):
        opened(SkrProvider(f"chat{place.direct}", machine=place.machine))
    # In a network of its own: something may listen at that port here.
    look = "from encfs.keys.providers.skr import SkrProvider; print(SkrProvider.unavailable())"
    alone = ["unshare", "--map-root-user", "--net", sys.executable, "-c", look]
    reason = subprocess.run(alone, capture_output=True, text=True, check=True, timeout=120).stdout
    assert reason.startswith("no sidecar for secure key release at 127.0.0.1:8080")
    with pytest.raises(KeyProviderError, match="sidecar gives no answer"):
        opened(SkrProvider("chat?akv=a.vault.azure.net&maa=b.attest.azure.net&port=1"))
    # Without the authority nothing is said to the services.
    monkeypatch.setenv("UVM_SECURITY_CONTEXT_DIR", str(place.machine.sev_guest.parent / "context"))
    before = len(place.azure.asked)
    with pytest.raises(KeyProviderError, match="certificate"):
        opened(SkrProvider(f"chat{place.direct.partition('&ca=')[0]}", machine=place.machine))
    assert "/attest/SevSnpVM" not in place.azure.asked[before:]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a/b?akv=x&maa=y",
        "a?akv=x",
        "a?maa=y",
        "a?akv=x&maa=y&akv=z",
        "a?akv=x&maa=y&port=0",
        "a?akv=x&maa=y&direct=maybe",
        "a?akv=x&maa=y&ca=z",
        "a?akv=http://x&maa=y",
        "a?akv=x/y&maa=y",
        "a?akv=user@x&maa=y",
        "a?akv=x&maa=y&speed=1",
        "a?akv",
    ],
)
def test_malformed_uris(text: str) -> None:
    with pytest.raises(KeyFileError):
        parse_request(text)
