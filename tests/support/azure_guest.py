"""A confidential VM of Azure's made of a software TPM, and the MAA that judges what it sends.

This MAA checks what binds the parts to one another, as the real one does: report and runtime data, attestation key,
quote, PCRs, event log, the certified key and its policy. Not AMD's signature: the report was altered to fit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256

from encfs.attestation.eventlog import parse_event_log, replay
from encfs.attestation.snp import parse_report
from tests.support.azure import Azure, decode, encode
from tests.support.eventlogs import Log
from tests.support.tpm import SoftwareTpm

FIXTURES = Path(__file__).parents[2] / "fixtures" / "evidence"
SNP, TDX = 2, 4


def make_machine(tpm: SoftwareTpm, log: Log, place: Path, kind: int = SNP) -> None:
    """Give a TPM what a paravisor does: the attestation key, its certificate, the report that vouches for it."""
    log.extend(tpm)
    tpm.tool("createek", "-c", "ek.ctx", "-G", "rsa", "-u", "ek.pub")
    tpm.tool("createak", "-C", "ek.ctx", "-c", "ak.ctx", "-G", "rsa", "-g", "sha256", "-s", "rsassa")
    tpm.tool("evictcontrol", "-c", "ak.ctx", "0x81000003")
    tpm.tool("readpublic", "-c", "0x81000003", "-f", "tpmt", "-o", str(place / "ak.tpmt"))
    modulus = (place / "ak.tpmt").read_bytes()[-256:]
    key = {"kid": "HCLAkPub", "key_ops": ["sign"], "kty": "RSA", "e": "AQAB", "n": encode(modulus)}
    runtime = json.dumps({"keys": [key], "vm-configuration": {"secure-boot": True}}).encode()
    bound = hashlib.sha256(runtime).digest().ljust(64, b"\0")
    report = bytearray((FIXTURES / "snp" / "report-vcek.bin").read_bytes()) if kind == SNP else bytearray(1024)
    offset = 0x50 if kind == SNP else 128
    report[offset : offset + 64] = bound
    head = b"HCLA" + bytes(28) + bytes(report).ljust(1184, b"\0")
    hcl = head + struct.pack("<IIIII", 20 + len(runtime), 1, kind, 1, len(runtime)) + runtime
    for index, content in (("0x01400001", hcl), ("0x01C101D0", b"certificate of the key")):
        (place / "nv").write_bytes(content)
        tpm.tool("nvdefine", index, "-C", "o", "-s", str(len(content)), "-a", "ownerread|ownerwrite")
        tpm.tool("nvwrite", index, "-C", "o", "-i", str(place / "nv"))


@dataclass
class GuestAzure(Azure):
    """What its token says of the machine is the digest of its PCRs: that is what the release policy asks for."""

    infos: list[dict[str, Any]] = field(default_factory=list)

    def certification(self) -> dict[str, str]:
        pem = (FIXTURES / "azure" / "snp-vcek.pem").read_text()
        return {"vcekCert": pem, "certificateChain": pem}

    def td_quote(self, request: dict[str, Any]) -> dict[str, str]:
        assert len(decode(request["report"])) == 1024
        return {"quote": encode((FIXTURES / "tdx" / "quote-v4.dat").read_bytes())}

    def attest_guest(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        assert set(request) == {"AttestationInfo"}
        info = json.loads(decode(request["AttestationInfo"]))
        self.infos.append(info)
        tpm = {name: base64.b64decode(value) for name, value in info["TpmInfo"].items() if isinstance(value, str)}
        ak = _rsa_key(tpm["AikPub"])
        try:
            _check_hardware(info["IsolationInfo"], ak)
            pcrs = _check_quote(info, tpm, ak)
            key = _check_certified(tpm, ak, pcrs)
        except (AssertionError, InvalidSignature) as error:
            return 400, {"error": {"code": "InvalidParameter", "message": f"the evidence does not hold: {error!r}"}}
        numbers = key.public_numbers()
        named = {"kid": "TpmEphemeralEncryptionKey", "key_ops": ["encrypt"], "kty": "RSA", "e": "AQAB"}
        runtime = {"keys": [named | {"n": encode(numbers.n.to_bytes(256))}], "client-payload": info["ClientPayload"]}
        claims = {"x-ms-runtime": runtime, "x-ms-sevsnpvm-hostdata": pcrs.hex(), "x-ms-attestation-type": "azurevm"}
        inner, iv = os.urandom(32), os.urandom(12)
        sealed = AESGCM(inner).encrypt(iv, self.token(claims).encode(), b"Transport Key")
        envelope = {
            "EncryptedInnerKey": key.encrypt(inner, padding.PKCS1v15()),
            "AuthenticationData": sealed[-16:],
            "Jwt": sealed[:-16],
        }
        texts = {name: base64.b64encode(value).decode() for name, value in envelope.items()}
        document = texts | {"EncryptionParams": {"Iv": base64.b64encode(iv).decode()}}
        return 200, {"token": encode(json.dumps(document).encode())}


def _rsa_key(public: bytes) -> rsa.RSAPublicKey:
    """Of a TPM2B_PUBLIC of RSA-2048."""
    assert struct.unpack_from(">HH", public) == (len(public) - 2, 1)
    return rsa.RSAPublicNumbers(65537, int.from_bytes(public[-256:])).public_key()


def _check_hardware(isolation: dict[str, Any], ak: rsa.RSAPublicKey) -> None:
    evidence = isolation["Evidence"]
    if isolation["Type"] == "Tdx":
        assert base64.b64decode(evidence["Proof"])[:2] == b"\4\0", "no TDX quote"
        runtime = base64.b64decode(evidence["RunTimeData"])
    else:
        assert isolation["Type"] == "SevSnp"
        proof, runtime = json.loads(decode(evidence["Proof"])), decode(evidence["RunTimeData"])
        report = parse_report(decode(proof["SnpReport"]))
        assert report.report_data[:32] == hashlib.sha256(runtime).digest(), "the report is not of this runtime data"
        assert decode(proof["VcekCertChain"]).count(b"BEGIN CERTIFICATE") >= 2
    (named,) = json.loads(runtime)["keys"]
    assert int.from_bytes(decode(named["n"])) == ak.public_numbers().n, "another attestation key"


def _check_quote(info: dict[str, Any], tpm: dict[str, bytes], ak: rsa.RSAPublicKey) -> bytes:
    """The digest of the PCRs."""
    message = tpm["PcrQuote"]
    ak.verify(tpm["PcrSignature"], message, padding.PKCS1v15(), SHA256())
    values = [base64.b64decode(one["Digest"]) for one in info["TpmInfo"]["PCRs"]]
    assert [one["Index"] for one in info["TpmInfo"]["PCRs"]] == info["TpmInfo"]["PcrSet"] == list(range(8))
    digest = hashlib.sha256(b"".join(values)).digest()
    assert struct.unpack_from(">IH", message) == (0xFF544347, 0x8018)
    assert message[-32:] == digest, "the PCRs are not those of the quote"
    made = replay(parse_event_log(base64.b64decode(info["TcgLogs"])))
    assert [made[index] for index in range(8)] == values, "the event log does not give the PCRs"
    return digest


def _check_certified(tpm: dict[str, bytes], ak: rsa.RSAPublicKey, pcrs: bytes) -> rsa.RSAPublicKey:
    public, message = tpm["EncKeyPub"], tpm["EncKeyCertifyInfo"]
    ak.verify(tpm["EncKeyCertifyInfoSignature"], message, padding.PKCS1v15(), SHA256())
    assert struct.unpack_from(">IH", message) == (0xFF544347, 0x8017)
    name = b"\0\x0b" + hashlib.sha256(public[2:]).digest()
    assert struct.pack(">H", len(name)) + name in message, "another key was certified"
    (attributes,) = struct.unpack_from(">I", public, 6)
    assert attributes & 0xF0C0 == 0, "it can be used without its policy"
    assert attributes & 0x20032 == 0x20032, "it can leave the TPM"
    selection = struct.pack(">IHB", 1, 0x0B, 3) + b"\xff\0\0"
    policy = hashlib.sha256(bytes(32) + struct.pack(">I", 0x17F) + selection + pcrs).digest()
    assert public[10:44] == b"\0\x20" + policy, "it has another policy"
    return _rsa_key(public)
