"""Event logs against the quotes of a real TPM that measured the same, with tpm2_eventlog as the judge of the format."""

from __future__ import annotations

import json
import random
import re
import struct
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from hypothesis import given
from hypothesis import strategies as st

from encfs.attestation.collect.sources import Machine, event_log
from encfs.attestation.eventlog import MAX_EVENT_LOG, parse_event_log, replay
from encfs.attestation.eventtext import describe, type_name
from encfs.attestation.evidence import Endorsements, Evidence, EvidenceKind
from encfs.attestation.kbs import from_kbs_evidence
from encfs.attestation.policy import EvidencePolicy
from encfs.attestation.verdict import Verdict
from encfs.attestation.verify import verify_evidence
from encfs.errors import AttestationError, EvidenceRefusedError, FormatError
from encfs.tpm.keyfile import load_object, write_object
from encfs.tpm.quote import attestation_public_key, collect_tpm_evidence, create_attestation_key
from tests.integration.test_tpm_sealing import ok, refused, run
from tests.support.eventlogs import Log, boot_log, image, variable
from tests.support.tpm import software_tpm

REPORT_DATA = bytes(range(32))


@dataclass(frozen=True)
class Booted:
    """A machine after its boot: the log, and a quote of all PCRs, whose key is enrolled by `policy`."""

    place: Path
    log: bytes
    evidence: Evidence
    policy: EvidencePolicy
    #: What tpm2_eventlog makes of the log, and the TPM's own PCRs (SHA-256), both in hex.
    judged: dict[int, str]
    shown: dict[int, str]
    judged_text: str


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Booted:
    place = tmp_path_factory.mktemp("boot")
    log = boot_log()
    with pytest.MonkeyPatch.context() as patch:
        for tpm in software_tpm():
            patch.setenv("TPM2TOOLS_TCTI", tpm.tcti)
            log.extend(tpm)
            write_object(create_attestation_key(), place / "ak.tpm")
            quoted = collect_tpm_evidence(REPORT_DATA, place / "ak.tpm")
            (place / "evidence.json").write_text(json.dumps(quoted))
            (place / "log").write_bytes(log.content)
            read = tpm.tool("pcrread", "sha256:all").stdout.decode()
            text = tpm.tool("eventlog", str(place / "log")).stdout.decode()
    public = attestation_public_key(load_object(place / "ak.tpm"))
    key = load_der_public_key(public)
    (place / "ak.pem").write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    policy = EvidencePolicy(attestation_keys=(public,), report_data=REPORT_DATA)
    pcrs = text[text.index("pcrs:") :]
    return Booted(
        place,
        bytes(log.content),
        from_kbs_evidence("tpm", quoted),
        policy,
        _values(pcrs[pcrs.index("sha256:") :]),
        _values(read),
        text,
    )


def _values(text: str) -> dict[int, str]:
    return {int(found[1]): found[2].lower() for found in re.finditer(r"^\s+(\d+)\s*: 0x([0-9a-fA-F]{64})", text, re.M)}


def judge(booted: Booted, log: bytes, **changes: object) -> Verdict:
    policy = replace(booted.policy, **changes)  # type: ignore[arg-type]
    return verify_evidence(booted.evidence, policy, endorsements=Endorsements(event_log=log), now=datetime.now(UTC))


def test_replay_gives_what_the_tpm_has_and_the_judge_says(booted: Booted) -> None:
    made = replay(parse_event_log(booted.log))
    assert {index: value.hex() for index, value in made.items()} == booted.shown
    assert booted.judged
    assert booted.judged.items() <= booted.shown.items(), "tpm2_eventlog lists PCRs that were extended"
    names = set(re.findall(r"EventType: (\w+)", booted.judged_text))
    assert names >= {type_name(event.type) for event in parse_event_log(booted.log)}


def test_the_log_explains_the_quote(booted: Booted) -> None:
    verdict = judge(booted, booted.log)
    assert verdict.accepted, verdict.reasons
    events = verdict.claims["events"]
    assert isinstance(events, list)
    assert any(
        one.startswith("7 EV_EFI_VARIABLE_DRIVER_CONFIG ") and one.endswith(": SecureBoot = 01") for one in events
    )
    (shim,) = [one for one in events if "shimx64" in one]
    assert shim.startswith("4 EV_EFI_BOOT_SERVICES_APPLICATION ")
    assert shim.endswith(r": \EFI\debian\shimx64.efi (not covered by the digest)")
    assert not any("EV_NO_ACTION" in one for one in events)


def test_by_command(booted: Booted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(booted.place)
    words = ("imagetool", "attest", "verify", "evidence.json", "--attestation-key", "ak.pem")
    assert "event      8 EV_IPL" in ok(*words, "--event-log", "log")
    found = json.loads(ok(*words, "--event-log", "log", "--event-log-pcr", "7", "--json"))
    assert {one.split()[0] for one in found["claims"]["events"]} == {"7"}
    assert any(one["code"] == "event-log" for one in found["unchecked"])
    other = boot_log(secure_boot=False)
    Path("other").write_bytes(other.content)
    code, out, _ = run(*words, "--event-log", "other")
    assert code == EvidenceRefusedError.exit_code
    assert "refused    event-log: the event log disagrees about PCR 7: it gives " in out
    Path("short").write_bytes(booted.log[:-1])
    assert "cut short" in refused(FormatError, *words, "--event-log", "short")
    code, out, _ = run(*words, "--event-log", "log", "--event-log-pcr", "99")
    assert code == EvidenceRefusedError.exit_code
    assert "the quote does not cover PCR 99" in out


def test_a_log_of_another_boot_is_refused(booted: Booted) -> None:
    log = boot_log(secure_boot=False)
    verdict = judge(booted, bytes(log.content))
    assert verdict.codes == ("event-log",)
    assert "disagrees about PCR 7:" in verdict.reasons[0].message
    assert "events" not in verdict.claims
    log.add(2, 4, b"more")
    assert "disagrees about PCR 2:" in judge(booted, bytes(log.content)).reasons[0].message
    assert "so do PCRs 7" in judge(booted, bytes(log.content)).reasons[0].message
    # What is not compared may differ; and it is said.
    verdict = judge(booted, bytes(log.content), event_log_pcrs=frozenset({0, 4}))
    assert verdict.accepted
    assert any("not compared with PCRs 1, 2, 3, 5" in one.message for one in verdict.unchecked)
    assert {one.split()[0] for one in verdict.claims["events"]} == {"0", "4"}  # type: ignore[union-attr]


def test_order_counts() -> None:
    log = Log()
    log.add(8, 0xD, b"b")
    log.add(8, 0xD, b"a")
    swapped = Log()
    swapped.add(8, 0xD, b"a")
    swapped.add(8, 0xD, b"b")
    assert replay(parse_event_log(bytes(log.content)))[8] != replay(parse_event_log(bytes(swapped.content)))[8]


def test_the_startup_locality(booted: Booted) -> None:
    values = replay(parse_event_log(bytes(boot_log(locality=3).content)))
    plain = replay(parse_event_log(booted.log))
    assert values[0] != plain[0]
    assert {index for index in values if values[index] != plain[index]} == {0}
    with pytest.raises(FormatError, match="a locality that there is not"):
        replay(parse_event_log(bytes(boot_log(locality=9).content)))


def test_what_has_no_pcrs(booted: Booted) -> None:
    sample = Evidence(EvidenceKind.SAMPLE, json.dumps({"svn": "1", "report_data": ""}).encode())
    policy = EvidencePolicy(kinds=frozenset({EvidenceKind.SAMPLE}))
    verdict = verify_evidence(sample, policy, endorsements=Endorsements(event_log=booted.log), now=datetime.now(UTC))
    assert "event-log" in verdict.codes


def test_a_quote_that_is_refused_explains_nothing(booted: Booted) -> None:
    document = json.loads(booted.evidence.content)
    document["tpm_quote"]["pcrs"][7] = "00" * 32
    changed = Evidence(EvidenceKind.TPM, json.dumps(document).encode())
    verdict = verify_evidence(
        changed, booted.policy, endorsements=Endorsements(event_log=booted.log), now=datetime.now(UTC)
    )
    assert verdict.codes == ("pcr",)
    assert "events" not in verdict.claims


# Hostile logs


def test_every_cut_is_noticed(booted: Booted) -> None:
    """At the boundary of an event the log is well-formed, and does not give the PCRs."""
    for size in range(len(booted.log)):
        try:
            verdict = judge(booted, booted.log[:size])
        except FormatError:
            continue
        assert verdict.codes == ("event-log",), size


def test_every_digest_counts(booted: Booted) -> None:
    """A changed byte is malformed, gives other PCRs, or is in what no digest covers: SHA-1, types, descriptions."""
    genuine = parse_event_log(booted.log)
    for at in random.Random(7).sample(range(len(booted.log)), 300):
        changed = bytearray(booted.log)
        changed[at] ^= 0x41
        try:
            verdict = judge(booted, bytes(changed))
        except FormatError:
            continue
        if verdict.accepted:
            found = parse_event_log(bytes(changed))
            assert [(one.pcr, one.digest) for one in found if one.extended] == [
                (one.pcr, one.digest) for one in genuine if one.extended
            ]
            differing = [one for one, other in zip(found, genuine, strict=True) if one.data != other.data]
            assert not any(one.covered for one in differing), "a description that changed is not covered any more"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut short"),
        (bytes(100), "no crypto agile log"),
        (struct.pack("<II20sI", 0, 3, bytes(20), 1 << 31), "cut short"),
        (struct.pack("<II20sI", 0, 3, bytes(20), 28) + b"Spec ID Event03\0" + bytes(12), "0 banks"),
        (
            struct.pack("<II20sI", 0, 3, bytes(20), 28) + b"Spec ID Event03\0" + bytes(8) + b"\xff" * 4,
            "4294967295 banks",
        ),
        (bytes(MAX_EVENT_LOG + 1), "is larger than"),
    ],
)
def test_malformed_logs(content: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_event_log(content)


def test_malformed_events(booted: Booted) -> None:
    def broken(event: bytes, message: str) -> None:
        with pytest.raises(FormatError, match=message):
            parse_event_log(bytes(Log().content) + event)

    broken(struct.pack("<III", 24, 4, 0), "a PCR beyond")
    broken(struct.pack("<III", 1, 4, 0) + bytes(4), "without a SHA-256 digest")
    broken(struct.pack("<IIIH", 1, 4, 1, 0x0D) + bytes(64), "its header does not know")
    broken(struct.pack("<IIIH", 1, 4, 1 << 31, 0x0B) + bytes(32) + b"\x0b\0" + bytes(32), "or twice")
    broken(struct.pack("<IIIH", 1, 4, 1, 0x0B) + bytes(32) + b"\xff\xff\xff\xff", "cut short")
    many = Log()
    one = Log()
    one.add(1, 4, b"")
    event = bytes(one.content[len(many.content) :])
    with pytest.raises(FormatError, match="more than 10000 events"):
        parse_event_log(bytes(many.content) + event * 10_001)


@given(kind=st.sampled_from([1, 4, 5, 6, 8, 0xD, 0x80000001, 0x80000003, 0x80000007, 0x800000E0, 77]), data=st.binary())
def test_descriptions_of_anything(kind: int, data: bytes) -> None:
    text = describe(kind, data)
    assert text.isprintable()
    assert len(text) <= 120


def test_descriptions() -> None:
    assert describe(0x80000001, variable("PK", bytes(100))) == "PK, 100 bytes"
    assert describe(0x80000001, variable("PK", b"")[:-1]) == ""
    assert describe(0x80000003, image("a" * 500)).endswith("…")
    endless = struct.pack("<QQQQ", 0, 0, 0, 4) + struct.pack("<BBH", 4, 4, 0)
    assert describe(0x80000003, endless) == ""
    assert describe(5, b"two\nlines\x1b[31m") == "two?lines?[31m"
    assert describe(0x12345, b"x") == ""
    assert type_name(0x12345) == "0x00012345"


# Collecting


def test_collecting(booted: Booted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tpm_logs=tmp_path)
    with pytest.raises(AttestationError, match="cannot be read: No such file"):
        event_log(machine)
    place = tmp_path / "binary_bios_measurements"
    place.write_bytes(booted.log)
    assert event_log(machine) == booted.log
    place.write_bytes(booted.log[:-1])
    with pytest.raises(AttestationError, match="cut short"):
        event_log(machine)
    place.write_bytes(booted.log)
    monkeypatch.setattr("encfs.attestation.collect.sources.THIS_MACHINE", machine)
    monkeypatch.setattr(event_log, "__defaults__", (machine,))
    monkeypatch.chdir(tmp_path)
    ok("encfs", "attest", "collect", "--tee", "sample", "-o", "evidence", "--event-log", "copy")
    assert Path("copy").read_bytes() == booted.log
