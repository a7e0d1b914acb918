"""Suite `tpm`: how much longer `encfs mount` takes with a key sealed to a TPM (swtpm) than with one in a file."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.contenders import KeyFiles, unmount
from bench.environment import Scale, Workspace, run, say, tool
from bench.results import Comparison, Target

_SIZE = 10**6
_MORE = Target(0.3)
_START_SECONDS = 30.0


def measure_sealed(workspace: Workspace, scale: Scale, _keys: KeyFiles) -> Iterator[Comparison]:
    """Pairs of mounts in alternating order, and the difference of each pair. The storage root key does not persist."""
    directory = workspace.memory / "tpm"
    target = directory / "target"
    target.mkdir(parents=True)
    plain, sealed, layout = directory / "kek.jwk", directory / "kek.tpm", directory / "layout"
    run([tool("imagetool"), "keygen", "-o", plain, "--type", "oct"])
    with _software_tpm():
        run([tool("encfs"), "seal", plain, "-o", sealed, "--tpm2-pcrs", "sha256:0,7,11"])
        source = directory / "source"
        source.mkdir()
        (source / "file").write_bytes(os.urandom(_SIZE))
        run([tool("imagetool"), "encrypt", source, f"oci:{layout}:bench", "-r", plain])
        differences: list[float] = []
        for repetition in range(scale.repetitions * 2):
            say(f"tpm: pair {repetition + 1} of {scale.repetitions * 2}")
            times = {}
            for uri in (f"tpm2:{sealed}", str(plain))[:: -1 if repetition % 2 else 1]:
                started = time.perf_counter()
                run([tool("encfs"), "mount", f"oci:{layout}:bench", target, "-k", uri, "--allow-unsigned"])
                times[uri] = time.perf_counter() - started
                unmount(target)
            differences.append(times[f"tpm2:{sealed}"] - times[str(plain)])
    yield Comparison(
        "tpm",
        "encfs mount, sealed key",
        "seconds more than with a key file",
        "swtpm, three PCRs",
        "s",
        "lower",
        differences,
        target=_MORE,
    )


@contextlib.contextmanager
def _software_tpm() -> Iterator[None]:
    """swtpm as this machine's TPM, in a directory of its own: the path of a socket has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="encfs-swtpm-") as place:
        server, control = Path(place) / "tpm", Path(place) / "tpm.ctrl"
        words = [tool("swtpm"), "socket", "--tpm2", "--tpmstate", f"dir={place}"]
        words += ["--server", f"type=unixio,path={server}", "--ctrl", f"type=unixio,path={control}"]
        process = subprocess.Popen([*words, "--flags", "not-need-init,startup-clear"], stdin=subprocess.DEVNULL)
        before = os.environ.get("TPM2TOOLS_TCTI")
        os.environ["TPM2TOOLS_TCTI"] = f"swtpm:path={server}"
        try:
            deadline = time.monotonic() + _START_SECONDS
            while not (server.exists() and control.exists()):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("swtpm does not start")
                time.sleep(0.01)
            yield
        finally:
            process.terminate()
            process.wait()
            del os.environ["TPM2TOOLS_TCTI"]
            if before is not None:
                os.environ["TPM2TOOLS_TCTI"] = before
