"""The README's lines about keys from the TEE, as they stand there: with a real TPM, a real broker, real mounts."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from encfs.errors import KeyRefusedError
from tests.support.broker import serving
from tests.support.shell import Shell
from tests.support.tpm import SoftwareTpm, tpm

__all__ = ["tpm"]

README = Path(__file__).parents[2] / "README.md"


def lines_of(title: str) -> list[list[str]]:
    section = README.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    return [shlex.split(line) for line in re.findall(r"^    ((?:imagetool|encfs) .*)$", section, re.MULTILINE)]


@pytest.mark.fuse
def test_keys_from_the_tee(tmp_path: Path, tpm: SoftwareTpm) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    (tmp_path / "mnt").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"layers": 12}')
    tpm.extend(7)
    tpm.extend(11)
    shell = Shell(tmp_path)
    shell.ok("imagetool", "keygen", "-o", "owner.jwk", "--type", "ed25519")
    lines = lines_of("Keys from the TEE")
    sealed, broker, machine = lines[:4], lines[4:8], lines[8:]
    assert [line[:2] for line in (sealed[3], broker[3], machine[1])] == [
        ["encfs", "mount"],
        ["imagetool", "broker"],
        ["encfs", "mount"],
    ]

    for line in sealed:
        shell.ok(*line)
    read_and_unmount(shell)
    tpm.extend(11)
    assert shell.run(*sealed[3]).returncode == KeyRefusedError.exit_code

    shell.ok(*machine[0])
    shell.ok("encfs", "attest", "collect", "--ak", "ak.tpm", "-o", "evidence.json")
    pcrs = json.loads((tmp_path / "evidence.json").read_text())["tpm_quote"]["pcrs"]
    (tmp_path / "policy.toml").write_text(
        f'[key."default/key/chat"]\ntee = "tpm"\nattestation_keys = """\n{(tmp_path / "ak.tpm.pub").read_text()}"""\n'
        f'pcrs = {{ 7 = "{pcrs[7]}", 11 = "{pcrs[11]}" }}\n'
    )
    for line in broker[:3]:
        shell.ok(*line)
    assert broker[3] == ["imagetool", "broker", "serve", "broker", "--listen", "0.0.0.0:8080"]
    with serving(tmp_path / "broker") as served:
        mount = [word.replace("https://HOST:8080", served.url) for word in machine[1]]
        assert mount != machine[1]
        shell.ok(*mount)
        read_and_unmount(shell)
        tpm.extend(11)
        refused = shell.run(*mount)
        assert refused.returncode != 0
        assert "PCR 11" in refused.stderr or "refused" in refused.stderr


def read_and_unmount(shell: Shell) -> None:
    assert (shell.path / "mnt" / "config.json").read_text() == '{"layers": 12}'
    shell.ok("encfs", "umount", "mnt")
