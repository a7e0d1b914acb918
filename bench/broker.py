"""The key broker: full handshakes with SNP verification, over TLS, with SQLite; latency at half the load; memory.

The chip is made up and its authority put in the place of AMD's in the server's process, so that reports are signed
afresh for each session, as firmware does. The clients are Python, too, and share the processors with the server.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.contenders import KeyFiles
from bench.environment import Scale, Workspace, run, say, tool
from bench.results import Comparison, Target
from encfs.attestation.kbs import digest_of_json
from encfs.kbs import jwe, protocol
from tests.support.snpchip import MEASUREMENT, SnpChip, trust_authority

_PATH = "default/key/chat"
_CLIENTS = 8
_ROOT = Path(__file__).resolve().parents[1]
_RATE, _P99, _MEMORY = Target(200), Target(100), Target(150)


@dataclass(frozen=True, slots=True)
class _Server:
    port: int
    authority: Path
    pid: int


def measure_broker(workspace: Workspace, scale: Scale, keys: KeyFiles) -> Iterator[Comparison]:
    """Rate, p99 latency at 100 handshakes a second, processor time, and memory (PSS of all processes) after both."""
    quick = scale.repetitions == 1
    count, seconds = (200, 3) if quick else (4000, 20)
    chip = SnpChip()
    with _server(workspace.disk / "broker", chip) as server:
        _shake_many(server, chip, 50, None)  # everything is loaded in the server, too
        loads = [_shake_many(server, chip, count, None) for _ in range(scale.repetitions)]
        rates, servers = [count / one.seconds for one in loads], [one.server for one in loads]
        clients = [one.client for one in loads]
        kept = [count / _shake_many(server, chip, count, None, keep=True).seconds for _ in range(scale.repetitions)]
        say(f"{statistics.median(rates):.0f} handshakes a second; processor time of each: broker "
            f"{statistics.median(servers):.2f} ms, client {statistics.median(clients):.2f} ms")  # fmt: skip
        p99 = []
        for _ in range(scale.repetitions):
            paced = _shake_many(server, chip, 100 * seconds, 100.0)
            p99.append(1000 * statistics.quantiles(paced.latencies, n=100)[98])
        say(f"p99 {statistics.median(p99):.1f} ms at 100 a second")
        memory = _memory(server.pid)
    note = "clients on the same processors"
    for workload, unit, better, values, target in (
        ("handshakes with SNP", "1/s", "higher", rates, _RATE),
        ("the same, connections kept", "1/s", "higher", kept, None),
        ("processor time of the broker", "ms", "lower", servers, None),
        ("processor time of a client", "ms", "lower", clients, None),
        ("p99 at 100/s", "ms", "lower", p99, _P99),
    ):
        yield Comparison("broker", workload, "TLS, SQLite", "", unit, better, values, target=target, note=note)
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
    # All clients have one address.
    more = {
        "rate = 50": "rate = 90000",
        "burst = 200": "burst = 900000",
        "max_sessions = 100000": "max_sessions = 9000000",
    }
    content = config.read_text()
    for before, after in more.items():
        content = content.replace(before, after)
    config.write_text(content)
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


@dataclass(frozen=True, slots=True)
class _Load:
    """What a number of handshakes took: seconds of each; seconds of all; processor time of each, milliseconds."""

    latencies: list[float]
    seconds: float
    client: float
    server: float


def _shake_many(server: _Server, chip: SnpChip, count: int, rate: float | None, *, keep: bool = False) -> _Load:
    """`count` handshakes as fast as possible, or begun at a steady rate (each second).

    Each has a connection of its own, as real clients have; `keep`: each client has one for all of its handshakes.
    """
    context = multiprocessing.get_context("fork")
    running = []
    for number in range(_CLIENTS):
        ours, theirs = context.Pipe()
        due = [index / rate if rate else 0.0 for index in range(number, count, _CLIENTS)]
        process = context.Process(target=_client, args=(server, chip, due, keep, theirs))
        process.start()
        theirs.close()
        running.append((process, ours))
    for _, pipe in running:
        pipe.recv()  # it is ready
    busy, begin = _processor_time(server.pid), time.monotonic() + 0.05
    for _, pipe in running:
        pipe.send(begin)
    latencies: list[float] = []
    client = 0.0
    for _, pipe in running:
        taken, spent = pipe.recv()
        latencies += taken
        client += spent
    seconds = time.monotonic() - begin
    for process, _ in running:
        process.join()
    each = 1000 / count
    return _Load(latencies, seconds, client * each, (_processor_time(server.pid) - busy) * each)


def _client(server: _Server, chip: SnpChip, due: list[float], keep: bool, pipe: Any) -> None:
    """One handshake after the other, in a process of its own: threads of one process would wait for each other."""
    # A certificate that is not known to be a chip's would not be sent along.
    trust_authority(chip.authority)
    context = ssl.create_default_context(cafile=str(server.authority))
    with _connected(server.port, context) as kept:
        _handshake(kept, chip)  # everything is loaded
        pipe.send(None)
        _shake_when_due(chip, due, pipe, lambda: nullcontext(kept) if keep else _connected(server.port, context))


def _shake_when_due(
    chip: SnpChip, due: list[float], pipe: Any, connected: Callable[[], AbstractContextManager[ssl.SSLSocket]]
) -> None:
    begin = pipe.recv()
    busy, paced, taken = time.process_time(), due[-1] > 0, []
    for offset in due:
        time.sleep(max(0.0, begin + offset - time.monotonic()))
        # A handshake's latency counts from when it was to begin, so that waiting for a free client is not left out.
        begun = begin + offset if paced else time.monotonic()
        with connected() as connection:
            _handshake(connection, chip)
        taken.append(time.monotonic() - begun)
    pipe.send((taken, time.process_time() - busy))


@contextmanager
def _connected(port: int, context: ssl.SSLContext) -> Iterator[ssl.SSLSocket]:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as raw:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with context.wrap_socket(raw, server_hostname="127.0.0.1") as connection:
            yield connection


def _handshake(connection: ssl.SSLSocket, chip: SnpChip) -> None:
    """Three requests: what a client of the broker does once."""
    key = jwe.session_key()
    public = jwe.public_members(key.public)
    version = protocol.VERSIONS[0]
    hello = {"version": version, "tee": "snp", "extra-params": {}}
    challenge, cookie = _exchange(connection, "POST /kbs/v0/auth", hello, b"")
    nonce = challenge["nonce"]
    evidence = chip.evidence(digest_of_json(protocol.runtime_data(nonce, public, version)))
    message = protocol.attest_message(nonce, public, evidence, version, None)
    _exchange(connection, "POST /kbs/v0/attest", message, cookie)
    sealed, _ = _exchange(connection, f"GET /kbs/v0/resource/{_PATH}", None, cookie)
    if len(jwe.decrypt(sealed, key)) != 32:
        raise RuntimeError("not the key")


def _exchange(connection: ssl.SSLSocket, request: str, body: object, cookie: bytes) -> tuple[dict[str, Any], bytes]:
    """As little HTTP as does: the clients take time from the server that is measured."""
    content = json.dumps(body, separators=(",", ":")).encode() if body is not None else b""
    head = f"{request} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(content)}\r\n".encode()
    connection.sendall(head + (b"Cookie: " + cookie + b"\r\n" if cookie else b"") + b"\r\n" + content)
    answer = b""
    while (end := answer.find(b"\r\n\r\n")) < 0 or len(answer) < end + 4 + _length(answer[:end]):
        answer += connection.recv(65536) or _cut_short(request)
    if not answer.startswith(b"HTTP/1.1 200 "):
        raise RuntimeError(f"{request}: {answer!r}")
    cookies = [line[12:].partition(b";")[0] for line in answer[:end].split(b"\r\n") if line.startswith(b"set-cookie: ")]
    return json.loads(answer[end + 4 :]), cookies[0] if cookies else b""


def _length(head: bytes) -> int:
    return int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])


def _cut_short(request: str) -> bytes:
    raise RuntimeError(f"{request}: the answer was cut short")


def _processes(pid: int) -> list[str]:
    """A process and its children."""
    return [str(pid), *Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _processor_time(pid: int) -> float:
    """Seconds that a process and its children have used."""
    ticks = 0
    for one in _processes(pid):
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _memory(pid: int) -> float:
    """Proportional set size of a process and its children, MiB."""
    total = 0
    for one in _processes(pid):
        rollup = Path(f"/proc/{one}/smaps_rollup").read_text()
        total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total / 1024
