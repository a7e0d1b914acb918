"""Key providers in both roles: programs, gRPC and ttrpc servers, ours and others', and what can go wrong with them."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from encfs.errors import KeyProviderError
from encfs.image.compression import Compression
from encfs.keyprovider.client import KeyService
from encfs.keyprovider.config import ENVIRONMENT
from tests.integration.test_registry_commands import command, run
from tests.support.container_images import LAYER_TYPE, Store, archive, descriptor_json, make_image, make_key
from tests.support.ocicrypt_judge import Judge, build_judge, needs_go
from tests.support.waiting import LONG, wait_until

KID = "kbs:///default/key/1"
AGENT = "attestation-agent"

# A provider by somebody else: it keeps what it was given in a file, and answers in base64 as Go programs do.
SCRIPT = """
import base64, json, os, secrets, sys
request = json.load(sys.stdin)
place = sys.argv[1]
if request["op"] == "keywrap":
    name = secrets.token_hex(8)
    with open(os.path.join(place, name), "wb") as file:
        file.write(base64.b64decode(request["keywrapparams"]["optsdata"]))
    with open(os.path.join(place, "parameters"), "w") as file:
        json.dump(request["keywrapparams"]["ec"]["Parameters"], file)
    print(json.dumps({"keywrapresults": {"annotation": base64.b64encode(name.encode()).decode()}}))
else:
    name = base64.b64decode(request["keyunwrapparams"]["annotation"]).decode()
    with open(os.path.join(place, name), "rb") as file:
        print(json.dumps({"keyunwrapresults": {"optsdata": base64.b64encode(file.read()).decode()}}))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A KEK, an image, another one's provider program, and a configuration of providers."""
    (tmp_path / "kek").touch(0o600)
    (tmp_path / "kek").write_bytes(os.urandom(32))
    (tmp_path / "kept").mkdir()
    (tmp_path / "script.py").write_text(SCRIPT)
    make_image(Store(tmp_path / "store"), "plain", [(archive({"a": b"content" * 1000}), Compression.GZIP)])
    ours = command("imagetool", "ocicrypt", "keyprovider", "--kek", f"{KID}={tmp_path / 'kek'}")
    configure(
        tmp_path,
        {
            AGENT: cmd(ours),
            "script": cmd([sys.executable, str(tmp_path / "script.py"), str(tmp_path / "kept")]),
            "grpc": {"grpc": f"unix:{tmp_path / 'grpc.sock'}"},
            "ttrpc": {"ttrpc": f"unix://{tmp_path / 'ttrpc.sock'}"},
        },
    )
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "providers.json"))
    return tmp_path


def cmd(words: list[str]) -> dict[str, Any]:
    return {"cmd": {"path": words[0], "args": words[1:]}}


def configure(place: Path, providers: Mapping[str, object]) -> None:
    path = place / "providers.json"
    known = json.loads(path.read_text())["key-providers"] if path.exists() else {}
    path.write_text(json.dumps({"key-providers": known | dict(providers)}))


def program(place: Path, name: str, text: str) -> KeyService:
    """A provider that is a Python program."""
    configure(place, {name: cmd([sys.executable, "-c", text])})
    return KeyService(name, b"x", timeout=LONG)


def there_and_back(place: Path, recipient: str, key: str) -> None:
    run(place, "imagetool", "ocicrypt", "encrypt", "oci:store:plain", "oci:secret:x", "-r", recipient)
    run(place, "imagetool", "ocicrypt", "decrypt", "oci:secret:x", "oci:back:x", "-k", key)
    assert Store(place / "back").plain_layers("x") == Store(place / "store").plain_layers("plain")


# -- programs


def test_somebody_elses_program(place: Path) -> None:
    there_and_back(place, "provider:script:a=b:c", "provider:script")
    # Nothing but its own parameters is told to a provider.
    assert json.loads((place / "kept" / "parameters").read_text()) == {"script": [base64.b64encode(b"a=b:c").decode()]}
    assert set(Store(place / "secret").manifest("x").layers[0].annotations) == {
        "org.opencontainers.image.enc.pubopts",
        "org.opencontainers.image.enc.keys.provider.script",
    }


def test_our_program(place: Path) -> None:
    there_and_back(place, f"provider:{AGENT}:keyid={KID}", f"provider:{AGENT}")
    run(place, "imagetool", "ocicrypt", "decrypt", "oci:secret:x", "oci:again:x", "-k", "kek")
    listed = run(place, "imagetool", "ocicrypt", "recipients", "list", "oci:secret:x")
    assert f"provider.{AGENT}  key {KID}" in listed


def test_images_for_guests_of_confidential_containers(place: Path) -> None:
    run(
        *(place, "imagetool", "ocicrypt", "encrypt", "oci:store:plain", "oci:secret:x"),
        *("-r", f"coco:{KID}", "--kek", "kek"),
    )
    (name,) = (key for key in Store(place / "secret").manifest("x").layers[0].annotations if "keys" in key)
    assert name == "org.opencontainers.image.enc.keys.provider.attestation-agent"
    run(place, "imagetool", "ocicrypt", "decrypt", "oci:secret:x", "oci:back:x", "-k", f"keyprovider:{AGENT}")
    words = ("ocicrypt", "encrypt", "oci:store:plain", "oci:no:x", "-r")
    assert "is not given" in run(place, "imagetool", *words, f"coco:{KID}", code=21)
    assert "names no resource" in run(place, "imagetool", *words, "coco:file:kek", "--kek", "kek", code=20)


def test_artifacts_of_our_own_format(place: Path) -> None:
    (place / "model").mkdir()
    (place / "model" / "weights").write_bytes(b"weights")
    run(
        *(place, "imagetool", "encrypt", "model", "oci:art:v1"),
        *("-r", f"keyprovider:{AGENT}:keyid={KID}", "-r", "keyprovider:script"),
    )
    for name in (AGENT, "script"):
        words = ("cat", "oci:art:v1", "/weights", "-k", f"keyprovider:{name}", "--allow-unsigned")
        assert run(place, "encfs", *words) == "weights"
    listed = json.loads(run(place, "imagetool", "recipients", "list", "oci:art:v1", "--json"))["recipients"]
    assert [(one["type"], one["provider"]) for one in listed] == [("keyprovider", AGENT), ("keyprovider", "script")]
    message = run(
        *(place, "encfs", "cat", "oci:art:v1", "/weights", "-k", "keyprovider:grpc", "--allow-unsigned"), code=22
    )
    assert f"it has some of {AGENT}, script" in message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "import sys; sys.stderr.write('\\x1b[2Jnot\\nallowed\\x07 today\\n'); sys.exit(3)",
            "status 3: allowed.x07 today",
        ),
        ("import sys; sys.exit(1)", "status 1: it said nothing"),
        ("print('hello')", "is not JSON"),
        ("print('{}')", "has no keyunwrapresults"),
        ("import sys; sys.stdout.write('x' * (1 << 20))", "more than 524288 bytes"),
        ("import sys; sys.stderr.write('x' * (1 << 22)); sys.exit(1)", "status 1: xxx"),
        ("import sys; sys.stdin.close(); print('no')", "is not JSON"),
    ],
)
def test_programs_that_fail(place: Path, text: str, problem: str) -> None:
    with pytest.raises(KeyProviderError, match=f"keyprovider:bad.*{problem}") as caught:
        program(place, "bad", text).unwrap(b"packet" * 5000)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_program_that_hangs_is_ended_with_its_children(place: Path) -> None:
    # A shell: Python may take longer to begin than it is given.
    configure(place, {"slow": cmd(["/bin/sh", "-c", f"sleep 975 & echo $! > '{place}/child'; sleep 999"])})
    service = KeyService("slow", b"x", timeout=1.0)
    started = time.monotonic()
    with pytest.raises(KeyProviderError, match="did not end within 1 seconds"):
        service.wrap(b"options")
    assert time.monotonic() - started < LONG
    child = int((place / "child").read_text())
    wait_until(lambda: _has_ended(child))


def _has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_program_that_is_not_there(place: Path) -> None:
    configure(place, {"none": cmd(["/nonexistent/program"])})
    with pytest.raises(KeyProviderError, match="cannot be started: '/nonexistent/program': No such file"):
        KeyService("none", b"x").wrap(b"options")


def test_no_secret_is_in_arguments_or_environment(place: Path) -> None:
    text = (
        "import json, sys; "
        "sys.stdin.read(); "
        "json.dump([open('/proc/self/cmdline').read(), open('/proc/self/environ').read()], open('seen', 'w')); "
        "print(json.dumps({'keywrapresults': {'annotation': 'YQ=='}}))"
    )
    secret = b"a very secret key"
    assert program(place, "spy", f"import os; os.chdir({str(place)!r}); {text}").wrap(secret) == b"a"
    seen = (place / "seen").read_text()
    assert secret.decode() not in seen
    assert base64.b64encode(secret).decode() not in seen


def test_our_program_says_what_is_wrong(place: Path) -> None:
    ours = command("imagetool", "ocicrypt", "keyprovider", "--kek", f"{KID}={place / 'kek'}")
    for request, status, problem in ((b"nothing", 10, "is not JSON"), (b"", 10, "is not JSON")):
        done = subprocess.run(ours, input=request, capture_output=True, timeout=LONG, check=False)
        assert done.returncode == status
        assert done.stdout == b""
        assert problem in done.stderr.decode()
    assert "no key was given" in run(place, "imagetool", "ocicrypt", "keyprovider", code=21)


# -- gRPC


@contextmanager
def serving(place: Path, name: str, address: str) -> Iterator[str]:
    """`imagetool ocicrypt keyprovider --grpc`, until the block ends."""
    words = ("ocicrypt", "keyprovider", "--kek", f"{KID}={place / 'kek'}", "--name", name, "--grpc", address, "--json")
    process = subprocess.Popen(command("imagetool", *words), stdout=subprocess.PIPE, text=True, cwd=place)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["address"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(LONG) == 0
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_our_server_on_a_socket(place: Path) -> None:
    with serving(place, "grpc", f"unix:{place / 'grpc.sock'}"):
        assert (place / "grpc.sock").stat().st_mode & 0o777 == 0o600
        second = (
            "imagetool",
            "ocicrypt",
            "keyprovider",
            "--kek",
            f"{KID}=kek",
            "--grpc",
            f"unix:{place / 'grpc.sock'}",
        )
        assert "something is serving" in run(place, *second, code=4)
        there_and_back(place, f"provider:grpc:keyid={KID}", "provider:grpc")
        with pytest.raises(KeyProviderError, match="keyprovider:grpc failed with NOT_FOUND: there is no key"):
            KeyService("grpc", b"keyid=kbs:///no/such/key").wrap(b'{"a":1}')
        with pytest.raises(KeyProviderError, match="INVALID_ARGUMENT: the key packet is not JSON"):
            KeyService("grpc", b"x").unwrap(b"packet")
    assert not (place / "grpc.sock").exists()
    with pytest.raises(KeyProviderError, match="keyprovider:grpc failed with UNAVAILABLE"):
        KeyService("grpc", b"x", timeout=2.0).unwrap(b"packet")


def test_our_server_on_a_port(place: Path) -> None:
    with serving(place, "port", "127.0.0.1:0") as address:
        configure(place, {"port": {"grpc": address}})
        there_and_back(place, "provider:port", "provider:port")
        message = run(
            *(place, "imagetool", "ocicrypt", "keyprovider", "--kek", f"{KID}=kek", "--grpc", address), code=4
        )
        assert "cannot be served" in message
    words = ("imagetool", "ocicrypt", "keyprovider", "--kek", f"{KID}=kek", "--grpc")
    assert "no address of this machine" in run(place, *words, "0.0.0.0:50000", code=2)
    assert "exists and is no socket" in run(place, *words, f"unix:{place / 'kek'}", code=4)


# -- ttrpc: another implementation of the server's side


class TtrpcServer(threading.Thread):
    """Answers one call with what `answer` makes of the frame; remembers the request."""

    def __init__(self, path: Path, answer: bytes, *, kind: int = 2, status: bytes = b"") -> None:
        super().__init__(daemon=True)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(1)
        message = (b"\x0a" + _varint(len(status)) + status if status else b"") + (
            b"\x12" + _varint(len(answer)) + answer if answer else b""
        )
        self.frame = struct.pack(">IIBB", len(message), 1, kind, 0) + message
        self.request = b""

    def run(self) -> None:
        with self.listener, self.listener.accept()[0] as connection:
            size = struct.unpack(">IIBB", connection.recv(10, socket.MSG_WAITALL))[0]
            self.request = connection.recv(size, socket.MSG_WAITALL)
            connection.sendall(self.frame)


def _varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number & 127 | 128, *_varint(number >> 7)])


def _message(content: bytes) -> bytes:
    return b"\x0a" + _varint(len(content)) + content


def test_a_ttrpc_server(place: Path) -> None:
    answer = json.dumps({"keyunwrapresults": {"optsdata": list(b"options")}}).encode()
    server = TtrpcServer(place / "ttrpc.sock", _message(answer))
    server.start()
    assert KeyService("ttrpc", b"x").unwrap(b"packet") == b"options"
    server.join(LONG)
    assert server.request.startswith(b"\x0a\x1ekeyprovider.KeyProviderService\x12\x09UnWrapKey")
    assert b'"annotation":"cGFja2V0"' in server.request


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"answer": b"", "status": b"\x08\x05\x12\x04gone"}, "failed with code 5: gone"),
        ({"answer": b""}, "the answer is empty"),
        ({"answer": b"\x0a\x7fx"}, "another length than it says"),
        ({"answer": _message(b"{}")}, "has no keyunwrapresults"),
        ({"answer": b"", "kind": 3}, "the answer is none"),
    ],
)
def test_ttrpc_servers_that_fail(place: Path, options: dict[str, Any], problem: str) -> None:
    server = TtrpcServer(place / "ttrpc.sock", **options)
    server.start()
    with pytest.raises(KeyProviderError, match=f"keyprovider:ttrpc.*{problem}"):
        KeyService("ttrpc", b"x").unwrap(b"packet")
    server.join(LONG)


def test_a_ttrpc_server_that_is_silent_or_absent(place: Path) -> None:
    with pytest.raises(KeyProviderError, match="gives no answer: No such file"):
        KeyService("ttrpc", b"x").unwrap(b"packet")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place / "ttrpc.sock"))
        listener.listen(1)
        with pytest.raises(KeyProviderError, match="gives no answer: timed out"):
            KeyService("ttrpc", b"x", timeout=0.5).unwrap(b"packet")


# -- the reference implementation as client, and as the judge of our images


@pytest.fixture(scope="module")
def judge() -> Judge:
    return build_judge()


def _layer(place: Path) -> tuple[Mapping[str, str], bytes]:
    store = Store(place / "secret")
    (layer,) = store.manifest("x").layers
    return layer.annotations, store.blob(layer.digest)


def _put(place: Path, annotations: Mapping[str, str], blob: bytes) -> None:
    """The plain image with its layer as somebody else encrypted it, as `oci:theirs:x`."""
    store = Store(place / "store")
    written = store.add(blob, f"{LAYER_TYPE}+gzip+encrypted")
    document = descriptor_json(written) | {"annotations": dict(annotations)}
    store.change("plain", lambda manifest: manifest["layers"].__setitem__(0, document), new_tag="theirs")


@needs_go
def test_the_reference_asks_our_program(place: Path, judge: Judge) -> None:
    (plain,) = Store(place / "store").plain_layers("plain")
    annotations, blob = judge.encrypt(plain, [f"provider:{AGENT}:keyid={KID}"])
    _put(place, annotations, blob)
    run(place, "imagetool", "ocicrypt", "decrypt", "oci:store:theirs", "oci:back:x", "-k", f"provider:{AGENT}")
    run(place, "imagetool", "ocicrypt", "decrypt", "oci:store:theirs", "oci:again:x", "-k", "kek")
    assert Store(place / "back").plain_layers("x") == Store(place / "again").plain_layers("x") == [plain]
    run(
        *(place, "imagetool", "ocicrypt", "encrypt", "oci:store:plain", "oci:secret:x"),
        *("-r", f"coco:{KID}", "--kek", "kek"),
    )
    assert judge.decrypt(*_layer(place), [f"provider:{AGENT}"]) == plain


@needs_go
def test_the_reference_asks_our_server(place: Path, judge: Judge) -> None:
    (plain,) = Store(place / "store").plain_layers("plain")
    with serving(place, "port", "127.0.0.1:0") as address:
        configure(place, {"port": {"grpc": address}})
        annotations, blob = judge.encrypt(plain, [f"provider:port:keyid={KID}"])
        _put(place, annotations, blob)
        run(place, "imagetool", "ocicrypt", "decrypt", "oci:store:theirs", "oci:back:x", "-k", "provider:port")
        assert Store(place / "back").plain_layers("x") == [plain]
        run(place, "imagetool", "ocicrypt", "encrypt", "oci:store:plain", "oci:secret:x", "-r", "provider:port")
        assert judge.decrypt(*_layer(place), ["provider:port"]) == plain


@needs_go
def test_the_reference_opens_by_recipients_added_here_and_we_by_those_added_there(place: Path, judge: Judge) -> None:
    (plain,) = Store(place / "store").plain_layers("plain")
    rsa, ec = make_key(place, "rsa"), make_key(place, "p384")
    run(place, "imagetool", "ocicrypt", "encrypt", "oci:store:plain", "oci:secret:x", "-r", rsa.public.name)
    words = ("ocicrypt", "recipients", "add", "oci:secret:x", "-r", ec.public.name, "-r", "provider:script")
    run(place, "imagetool", *words, "-k", rsa.private.name)
    annotations, blob = _layer(place)
    for key in (str(rsa.private), str(ec.private), "provider:script"):
        assert judge.decrypt(annotations, blob, [key]) == plain
    run(place, "imagetool", "ocicrypt", "recipients", "remove", "oci:secret:x", "0")
    annotations, blob = _layer(place)
    added = judge.add(annotations, blob, f"jwe:{rsa.public}", str(ec.private))
    _put(place, added, blob)
    run(place, "imagetool", "ocicrypt", "decrypt", "oci:store:theirs", "oci:back:x", "-k", rsa.private.name)
    assert Store(place / "back").plain_layers("x") == [plain]
