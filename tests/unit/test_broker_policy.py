"""The broker's policy file: what it means, and that a mistake in it never means less than was written."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from encfs.attestation.evidence import EvidenceKind
from encfs.attestation.policy import EvidencePolicy, SnpTcbFloor
from encfs.errors import FormatError
from imagetool.broker.policy import parse_policy
from imagetool.broker.policyfields import EVIDENCE_FIELDS
from tests.support.shell import Shell

WHOLE = f"""
[key."default/key/chat"]
tee = ["snp", "tdx"]
measurements = ["{"00" * 48}", "{"11" * 48}"]
host_data = "{"22" * 32}"
tcb = [{{ product = "Milan", snp = 8, microcode = 115 }}]
content_digests = ["sha256:{"33" * 32}"]
artifact_id = "acme/chat"
min_version = 3
expires = 2030-01-01T00:00:00Z
releases = 10

[key."default/key/*"]
tee = "sample"

[key."default/*"]
tee = "snp"
any_workload = true

[key."*"]
tee = "snp"
signers = "{"44" * 48}"
"""

HEX_32, HEX_48 = "00" * 32, "00" * 48


def test_a_whole_policy() -> None:
    policy = parse_policy(WHOLE)
    rule = policy.rule_for("default/key/chat")
    assert rule is not None
    assert rule.evidence.kinds == {EvidenceKind.SNP, EvidenceKind.TDX}
    assert rule.evidence.measurements == (bytes(48), b"\x11" * 48)
    assert rule.evidence.host_data == (b"\x22" * 32,)
    assert rule.evidence.tcb_floors == (SnpTcbFloor("Milan", snp=8, microcode=115),)
    assert (rule.artifact_id, rule.min_version, rule.releases) == ("acme/chat", 3, 10)
    assert rule.expires is not None
    assert rule.expires.year == 2030
    assert rule.to_json()["measurements"] == ["00" * 48, "11" * 48]


@pytest.mark.parametrize(
    ("path", "pattern"),
    [
        ("default/key/chat", "default/key/chat"),
        ("default/key/chat2", "default/key/*"),
        ("default/cert/x", "default/*"),
        ("other/key/x", "*"),
        ("defaultx/key/x", "*"),
    ],
)
def test_the_longest_prefix_wins_and_rules_are_not_merged(path: str, pattern: str) -> None:
    rule = parse_policy(WHOLE).rule_for(path)
    assert rule is not None
    assert rule.pattern == pattern


def test_what_has_no_rule_is_denied() -> None:
    assert parse_policy("").rule_for("a/b/c") is None
    assert parse_policy('[key."a/b/*"]\ntee = "sample"').rule_for("a/x/c") is None


def test_every_field_of_evidence_can_be_written_or_is_the_brokers() -> None:
    ours = {"kinds", "tcb_floors", "report_data"}
    #: About tokens, which the protocol does not carry as evidence.
    tokens = {"nonce", "issuers", "claims"}
    written = set(EVIDENCE_FIELDS) | ours | tokens
    missing = {one.name for one in fields(EvidencePolicy)} - written
    assert not missing & {"measurements", "signers", "host_data", "pcrs", "rtmrs", "chip_ids", "min_svn"}


def test_rules_have_digests_of_all_that_they_say() -> None:
    digests = {rule.digest for rule in parse_policy(WHOLE).rules.values()}
    assert len(digests) == 4
    again = parse_policy(WHOLE.replace("releases = 10", "releases = 11"))
    assert again.rules["default/key/chat"].digest not in digests
    assert again.rules["*"].digest in digests


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[key", "is not TOML"),
        ("[rule.x]\n", "line 1: 'rule' is not known"),
        ('[key."a/b"]\ntee = "snp"', r"line 1, .*no path"),
        ('[key."a/b/c/*"]\ntee = "snp"', "no path"),
        ('[key."a/b*"]\ntee = "snp"', "no path"),
        ('[key."../b/c"]\ntee = "snp"', "no path"),
        ('[key."a/b/c"]\n', "which tee"),
        ('[key."a/b/c"]\ntee = "abacus"', r"line 2, .* tee: the TEE 'abacus'"),
        ('[key."a/b/c"]\ntee = []', "holds no value"),
        ('[key."a/b/c"]\ntee = "snp"', "accepts any software"),
        (f'[key."a/b/c"]\ntee = "snp"\nhost_data = "{HEX_32}"', "of snp: name measurements or signers,"),
        (f'[key."a/b/c"]\ntee = "sgx"\nhost_data = "{HEX_32}"', "of sgx: name measurements or signers,"),
        (f'[key."a/b/c"]\ntee = "tdx"\nhost_data = "{HEX_48}"', "of tdx: name measurements,"),
        (f'[key."a/b/c"]\ntee = "tdx"\nrtmrs.1 = "{HEX_48}"', "of tdx: name measurements,"),
        (f'[key."a/b/c"]\ntee = ["sgx", "tdx"]\nsigners = "{HEX_32}"', "of tdx: name measurements,"),
        (f'[key."a/b/c"]\ntee = "az-snp-vtpm"\npcrs.7 = "{HEX_32}"', "of az-snp-vtpm: name measurements .of the"),
        (f'[key."a/b/c"]\ntee = "az-tdx-vtpm"\nmeasurements = "{HEX_48}"', "of az-tdx-vtpm: name .* and pcrs"),
        (f'[key."a/b/c"]\ntee = ["snp", "sample"]\nhost_data = "{HEX_32}"', "accepts any software of snp"),
        ('[key."a/b/c"]\ntee = "tpm"\npcrs.7 = "' + "00" * 32 + '"', "attestation_keys is needed"),
        ('[key."a/b/c"]\ntee = "snp"\n\nmesurements = ["00"]', r"line 4, .* mesurements: it is not known"),
        ('[key."a/b/c"]\ntee = "snp"\nmeasurements = []', "an empty list would allow anything"),
        ('[key."a/b/c"]\ntee = "snp"\nmeasurements = ["0g"]', "not lower-case hexadecimal"),
        ('[key."a/b/c"]\ntee = "snp"\nmeasurements = ["0011"]', "of 2 bytes; it has 32 or 48"),
        ('[key."a/b/c"]\ntee = "snp"\nallow_debug = 1', "neither true nor false"),
        ('[key."a/b/c"]\ntee = "snp"\nmax_vmpl = 4', "from 0 to 3"),
        ('[key."a/b/c"]\ntee = "snp"\nmin_version = true', "not a number"),
        ('[key."a/b/c"]\ntee = "snp"\npcrs = { 24 = "00" }', "there are 0 to 23"),
        ('[key."a/b/c"]\ntee = "snp"\ntcb = [{ snp = 8, mikrocode = 3 }]', "'mikrocode', which is not known"),
        ('[key."a/b/c"]\ntee = "snp"\nexpires = 2030-01-01T00:00:00', "no time with its zone"),
        ('[key."a/b/c"]\ntee = "snp"\nreleases = 0', "from 1"),
        ('[key."a/b/c"]\ntee = "snp"\ncontent_digests = ["sha256:00"]', "a value is not of the form"),
        ('[key."a/b/c"]\ntee = "tpm"\nattestation_keys = ["AAAA"]', "no public key"),
        ('[key."a/b/c"]\ntee = "tpm"\nattestation_keys = ["?"]', "neither PEM nor base64"),
    ],
)
def test_mistakes_name_the_line_and_the_field(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        parse_policy(text, "policy.toml")
    assert str(caught.value).startswith("policy.toml")
    assert "\n" not in str(caught.value)


def test_the_digest_of_a_rule_is_the_same_in_every_version() -> None:
    """Keys at rest are bound to it: where it changes by itself, none of them opens any more."""
    text = f'''[key."a/b/c"]
tee = ["tdx", "snp"]
measurements = "{HEX_48}"
tcb = [{{ product = "Milan", snp = 8 }}]
expires = 2030-01-01T00:00:00Z
releases = 3
min_version = 0
'''
    rule = parse_policy(text).rules["a/b/c"]
    assert rule.digest == "5f25f19688d06569009b65f213a5378763d887b213017a6a5f438fb1c5846ae4"
    other = parse_policy(text.replace("min_version = 0", "")).rules["a/b/c"]
    assert other.digest != rule.digest
    # What is written as it would be without being written is the same rule.
    assert parse_policy(text + "allow_debug = false\nmax_vmpl = 0\n").rules["a/b/c"].digest == rule.digest


def test_the_command_shows_a_policy_as_people_write_it(tmp_path: Path) -> None:
    values = ["00" * 32, "11" * 32]
    rule = f'tee = "az-snp-vtpm"\nmeasurements = ["{"22" * 48}"]\npcrs.7 = {values}\nallow_debug = true\n'
    (tmp_path / "policy.toml").write_text(f'[key."a/b/*"]\n{rule}')
    shown = Shell(tmp_path).ok("imagetool", "broker", "policy", "check", "policy.toml")
    assert f"  pcrs  7 = {' or '.join(values)}\n" in shown
    assert "  allow_debug  true\n" in shown
