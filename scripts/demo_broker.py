"""The broker's part of the demo: a key that only a measured machine gets. Called by `demo.py`.

The consumer has a software TPM (swtpm), which stands for the vTPM of a confidential machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from narration import BIN, claim, run, say, show, step

NEEDED = ("swtpm", "tpm2_pcrextend")
_RESOURCE = "default/key/vision"
_ID = "acme/vision"
_PCR = 11


def demonstrate(work: Path, first: int) -> None:
    """`first` is the number of the first step."""
    place, model, mount = work / "broker", work / "vision", work / "vision-mount"
    for directory in (model, mount):
        directory.mkdir()
    (model / "weights.bin").write_bytes(os.urandom(1 << 20))
    store = f"oci:{work / 'vision-store'}"
    into = ("--broker", place, "--resource", _RESOURCE)
    trust = ("--trust", work / "owner.jwk.pub", "--id", _ID)

    with _software_tpm() as extend:
        step(first, "A machine with a TPM, while it is in good hands: its attestation key, and what it booted")
        extend("a5" * 32)
        run("encfs", "attest", "enrol", "-o", work / "ak.tpm")
        run("encfs", "attest", "collect", "--ak", work / "ak.tpm", "-o", work / "evidence.json")
        pcrs = json.loads((work / "evidence.json").read_text())["tpm_quote"]["pcrs"]
        say(f"     PCR {_PCR} is {pcrs[_PCR]}")

        step(first + 1, "A key broker of the owner's: a key, and who may have it")
        run("imagetool", "keygen", "--type", "oct", "-o", work / "vision.jwk")
        run("imagetool", "broker", "init", place)
        ak = (work / "ak.tpm.pub").read_text()
        policy = f'[key."{_RESOURCE}"]\ntee = "tpm"\nattestation_keys = """\n{ak}"""\npcrs.{_PCR} = "{pcrs[_PCR]}"\n'
        (work / "policy.toml").write_text(policy)
        show(policy)
        run("imagetool", "broker", "policy", "set", place, work / "policy.toml")
        run("imagetool", "broker", "key", "add", place, _RESOURCE, "--kek", work / "vision.jwk")
        sign = ("--sign", work / "owner.jwk", "--id", _ID)
        show(run("imagetool", "release", model, f"{store}:v1", *into, *sign))

        with _serving(place) as url:
            key = f"kbs:{url}/{_RESOURCE}?ca={place / 'tls.crt'}&ak={work / 'ak.tpm'}"
            step(first + 2, "The machine attests, gets the key, mounts and reads")
            run("encfs", "mount", f"{store}:v1", mount, "-k", key, *trust)
            try:
                same = (mount / "weights.bin").read_bytes() == (model / "weights.bin").read_bytes()
                claim(same, "the weights are the same through the mount")
            finally:
                run("encfs", "umount", mount)

            step(first + 3, "A new version is released; the old one is refused")
            (model / "weights.bin").write_bytes(os.urandom(1 << 20))
            show(run("imagetool", "release", model, f"{store}:v2", *into, *sign))
            run("encfs", "cat", f"{store}:v1", "weights.bin", "-k", key, *trust, code=24)
            claim("below the floor 2" in _last(place), "the log says why: " + _last(place))
            run("encfs", "extract", f"{store}:v2", work / "vision-v2", "-k", key, *trust)
            claim("released" in _last(place), "the new version opens")

            step(first + 4, "Something else runs on the machine: one PCR is another")
            extend("5a" * 32)
            run("encfs", "cat", f"{store}:v2", "weights.bin", "-k", key, *trust, code=24)
            claim(f"PCR {_PCR}" in _last(place), "the log says why: " + _last(place))
    show(run("imagetool", "broker", "releases", place, "--verify"))


def _last(place: Path) -> str:
    """The last entry of the broker's log, without its number and time."""
    done = subprocess.run([BIN / "imagetool", "broker", "releases", place], capture_output=True, text=True, check=True)
    return "  ".join(done.stdout.splitlines()[-1].split("  ")[-5:]).strip()


@contextlib.contextmanager
def _serving(place: Path) -> Iterator[str]:
    words = ["broker", "serve", str(place), "--listen", "127.0.0.1:0", "--json", "--quiet"]
    say(f"   $ imagetool {' '.join(words[:-2])}")
    process = subprocess.Popen([BIN / "imagetool", *words], stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline() if process.stdout is not None else ""
        claim(bool(line), "the broker listens, with TLS")
        yield json.loads(line)["url"]
    finally:
        process.terminate()
        process.communicate(timeout=60)


class _Extend:
    """Extend the PCR: what a measured boot does for each thing that it starts."""

    def __call__(self, value: str) -> None:
        subprocess.run(["tpm2_pcrextend", f"{_PCR}:sha256={value}"], check=True, capture_output=True)


@contextlib.contextmanager
def _software_tpm() -> Iterator[_Extend]:
    """A TPM fresh from the factory, which is the machine's meanwhile."""
    # Not the demo's directory: the path of a socket has at most 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="encfs-demo-tpm-"))
    sockets = [directory / "tpm", directory / "tpm.ctrl"]
    process = subprocess.Popen(
        [
            *("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={directory}"),
            *("--server", f"type=unixio,path={sockets[0]}", "--ctrl", f"type=unixio,path={sockets[1]}"),
            *("--flags", "not-need-init,startup-clear"),
        ],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    before = os.environ.get("TPM2TOOLS_TCTI")
    os.environ["TPM2TOOLS_TCTI"] = f"swtpm:path={sockets[0]}"
    try:
        deadline = time.monotonic() + 30
        while not all(one.exists() for one in sockets) and time.monotonic() < deadline:
            time.sleep(0.02)
        yield _Extend()
    finally:
        if before is None:
            del os.environ["TPM2TOOLS_TCTI"]
        else:
            os.environ["TPM2TOOLS_TCTI"] = before
        process.terminate()
        process.wait()
        shutil.rmtree(directory)
