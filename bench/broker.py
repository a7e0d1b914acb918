"""The key broker: full handshakes with SNP verification, over TLS, with SQLite; latency at half the load; memory.

The chip is made up and its authority put in the place of AMD's in the server's process, so that reports are signed
afresh for each session, as firmware does. The clients are Python, too, and share the processors with the server.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any

from bench.contenders import KeyFiles
from bench.environment import Scale, Workspace, run, say, tool
from bench.results import Comparison, Target
from encfs.attestation.kbs import digest_of_json
from encfs.kbs import jwe, protocol
from tests.support.snpchip import MEASUREMENT, SnpChip, trust_authority

_PATH = "default/key/chat"
_CLIENTS = 2  # processes
_THREADS = 8  # of each
_ROOT = Path(__file__).resolve().parents[1]
_RATE, _P99, _MEMORY = Target(200), Target(100), Target(150)


@dataclass(frozen=True, slots=True)
class _Server:
    port: int
    authority: Path
    pid: int


def measure_broker(workspace: Workspace, scale: Scale, keys: KeyFiles) -> Iterator[Comparison]:
    """Rate, p99 latency at 100 handshakes a second, and memory (PSS of all processes) after both."""
    quick = scale.repetitions == 1
    count, seconds = (200, 3) if quick else (4000, 20)
    chip = SnpChip()
    with _server(workspace.disk / "broker", chip) as server:
        _shake_many(server, chip, 50, None)  # everything is loaded
        rates = []
        for _ in range(scale.repetitions):
            started = time.perf_counter()
            _shake_many(server, chip, count, None)
            rates.append(count / (time.perf_counter() - started))
        say(f"{statistics.median(rates):.0f} handshakes a second")
        latencies = _shake_many(server, chip, 100 * seconds, 100.0)
        p99 = 1000 * statistics.quantiles(latencies, n=100)[98]
        say(f"p99 {p99:.1f} ms at 100 a second")
        memory = _memory(server.pid)
    note = "clients on the same processors"
    yield Comparison(
        "broker", "handshakes with SNP", "TLS, SQLite", "", "1/s", "higher", rates, target=_RATE, note=note
    )
    yield Comparison("broker", "p99 at 100/s", "TLS, SQLite", "", "ms", "lower", [p99], target=_P99, note=note)
    yield Comparison("broker", "memory", "2 workers, PSS", "", "MiB", "lower", [memory], target=_MEMORY)


@contextmanager
def _server(directory: Path, chip: SnpChip) -> Iterator[_Server]:
    directory.mkdir()
    place, authority = directory / "b", directory / "authority.der"
    authority.write_bytes(chip.authority)
    policy = directory / "policy.toml"
    policy.write_text(f'[key."{_PATH}"]\ntee = "snp"\nmeasurements = "{MEASUREMENT.hex()}"\n')
    imagetool = tool("imagetool")
    run([imagetool, "broker", "init", place])
    config = place / "broker.toml"
    config.write_text(config.read_text().replace("rate = 50", "rate = 90000").replace("burst = 200", "burst = 900000"))
    run([imagetool, "keygen", "--type", "oct", "-o", directory / "kek.jwk"])
    run([imagetool, "broker", "policy", "set", place, policy])
    run([imagetool, "broker", "key", "add", place, _PATH, "--kek", directory / "kek.jwk"])
    words = ["broker", "serve", str(place), "--listen", "127.0.0.1:0", "--workers", "2", "--json", "--quiet"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.snpbroker", str(authority), *words],
        cwd=_ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        url: str = json.loads(process.stdout.readline())["url"]
        yield _Server(int(url.rpartition(":")[2]), place / "tls.crt", process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


def _shake_many(server: _Server, chip: SnpChip, count: int, rate: float | None) -> list[float]:
    """Seconds that each of `count` handshakes took: as fast as possible, or begun at a steady rate (each second)."""
    context = multiprocessing.get_context("fork")
    begin = time.monotonic() + 0.2
    share = count // _CLIENTS
    receivers = []
    for number in range(_CLIENTS):
        receiver, sender = context.Pipe(duplex=False)
        # A handshake's latency counts from when it was to begin, so that waiting for a free client is not left out.
        times = [begin + (number + index * _CLIENTS) / rate if rate else begin for index in range(share)]
        process = context.Process(target=_client, args=(server, chip, times, sender))
        process.start()
        receivers.append((process, receiver))
    found: list[float] = []
    for process, receiver in receivers:
        found += receiver.recv()
        process.join()
    return found


def _client(server: _Server, chip: SnpChip, times: list[float], sender: Any) -> None:
    # In this process of its own: a certificate that is not known to be a chip's would not be sent along.
    trust_authority(chip.authority)
    context = ssl.create_default_context(cafile=str(server.authority))
    paced = times[0] != times[-1]

    def one(due: float) -> float:
        time.sleep(max(0.0, due - time.monotonic()))
        begun = due if paced else time.monotonic()
        _handshake(server.port, context, chip)
        return time.monotonic() - begun

    with ThreadPoolExecutor(_THREADS) as pool:
        sender.send(list(pool.map(one, times)))


def _handshake(port: int, context: ssl.SSLContext, chip: SnpChip) -> None:
    connection = HTTPSConnection("127.0.0.1", port, timeout=30, context=context)
    try:
        key = jwe.session_key()
        public = jwe.public_members(key.public)
        version = protocol.VERSIONS[0]
        hello = {"version": version, "tee": "snp", "extra-params": {}}
        challenge, cookie = _exchange(connection, "POST", "/kbs/v0/auth", hello, "")
        nonce = challenge["nonce"]
        evidence = chip.evidence(digest_of_json(protocol.runtime_data(nonce, public, version)))
        message = protocol.attest_message(nonce, public, evidence, version, None)
        _exchange(connection, "POST", "/kbs/v0/attest", message, cookie)
        sealed, _ = _exchange(connection, "GET", f"/kbs/v0/resource/{_PATH}", None, cookie)
        if len(jwe.decrypt(sealed, key)) != 32:
            raise RuntimeError("not the key")
    finally:
        connection.close()


def _exchange(
    connection: HTTPSConnection, method: str, path: str, body: object, cookie: str
) -> tuple[dict[str, Any], str]:
    connection.request(method, path, json.dumps(body).encode() if body is not None else None, {"Cookie": cookie})
    response = connection.getresponse()
    content = response.read()
    if response.status != 200:
        raise RuntimeError(f"{path}: {response.status} {content!r}")
    return json.loads(content), (response.headers["Set-Cookie"] or "").split(";")[0]


def _memory(pid: int) -> float:
    """Proportional set size of a process and its children, MiB."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    total = 0
    for one in [str(pid), *children]:
        rollup = Path(f"/proc/{one}/smaps_rollup").read_text()
        total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total / 1024
