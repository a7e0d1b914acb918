"""Key URIs, and the providers file, env and passphrase, each with the real thing behind it."""

from __future__ import annotations

import base64
import json
import os
import pty
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path

import pytest

from encfs.errors import (
    EncfsError,
    KeyFileError,
    KeyProviderError,
    NotFoundError,
    StorageError,
    WrongKeyError,
)
from encfs.keys.files import load_decryption_key
from encfs.keys.jwk import PrivateKey
from encfs.keys.jwkjson import private_jwk, public_jwk
from encfs.keys.keyring import Keyring, create_keyring, parse_keyring
from encfs.keys.providers import _OWN, ENTRY_POINT_GROUP, KeyProvider, known_schemes, provider_from_uri
from encfs.keys.providers import file as file_module
from encfs.keys.providers import passphrase as passphrase_module
from encfs.keys.providers.env import EnvProvider
from encfs.keys.providers.passphrase import PassphraseProvider, read_passphrase
from encfs.keys.secrets import Passphrase, SymmetricKey, parse_passphrase
from tests.support.keys import DIGEST, key, private, public, recipient
from tests.unit.test_keys_files import private_pem, secret_file

PAYLOAD = b"payload"
SECRET = "correct horse"


def keyring_for(*recipients: str) -> Keyring:
    keys = [Passphrase(bytearray(SECRET.encode())) if kind == "passphrase" else recipient(kind) for kind in recipients]
    return parse_keyring(create_keyring(PAYLOAD, DIGEST, keys), DIGEST)


@pytest.fixture(scope="module")
def locked() -> Keyring:
    """A keyring under a passphrase and a key; stretching it takes a third of a second, so tests share it."""
    return keyring_for("passphrase", "p256")


def read(rest: str) -> bytes:
    found = read_passphrase(rest)
    assert isinstance(found, Passphrase)
    return bytes(found.secret)


# --- URIs ------------------------------------------------------------------------------------------------------------


def test_known_schemes() -> None:
    assert {"file", "env", "passphrase"} <= set(known_schemes())


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("key.jwk", "file:key.jwk"),
        ("./a:b", "file:./a:b"),
        ("/keys/x", "file:/keys/x"),
        ("file:/keys/x", "file:/keys/x"),
        ("file:tpm2:x", "file:tpm2:x"),
        ("C:/key", "file:C:/key"),
        ("env:KEY_1", "env:KEY_1"),
        ("passphrase:", "passphrase:"),
        ("passphrase:file=a=b", "passphrase:file=a=b"),
        ("passphrase:fd=3", "passphrase:fd=3"),
        ("passphrase:command=pass show 'my secret'", "passphrase:command"),
    ],
)
def test_uris(uri: str, shown: str) -> None:
    provider: KeyProvider = provider_from_uri(uri)
    assert provider.uri == shown
    provider.close()
    provider.close()


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("tpm9:x", "unknown key scheme 'tpm9'; known are .*file, .*passphrase"),
        ("keys:x", "a path with a colon in it is written file:PATH"),
        ("", "key URI without a path"),
        ("file:", "key URI without a path"),
        ("env:", "not followed by the name"),
        ("env:A=B", "not followed by the name"),
        ("env:1A", "not followed by the name"),
        ("env:É", "not followed by the name"),
        ("passphrase:hunter2", "followed by something other than a source"),
        ("passphrase:file=", "other than a source"),
        ("passphrase:=x", "other than a source"),
        ("passphrase:fd=", "other than a source"),
        ("passphrase:fd=-1", "other than a source"),
        ("passphrase:fd=99999999", "other than a source"),
        ("passphrase:fd=³", "other than a source"),
        ("passphrase:command=", "other than a source"),
        ("passphrase:command= ", "command is empty"),
        ("passphrase:command=a 'b", "cannot be split"),
    ],
)
def test_malformed_uris(uri: str, reason: str) -> None:
    with pytest.raises(KeyFileError, match=reason) as caught:
        provider_from_uri(uri)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


def _installed(tmp_path: Path, name: str, entry: str) -> None:
    info = tmp_path / f"{name}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[encfs.key_providers]\n{entry}\n")


def test_providers_of_other_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real installed distribution adds a scheme; a second one for the same is refused; one for ours gets no key."""
    _installed(tmp_path, "vault", "vault = vault_keys:provider")
    (tmp_path / "vault_keys.py").write_text(
        "from encfs.keys.providers.file import FileProvider\n"
        "def provider(rest):\n    return FileProvider('/vault/' + rest)\n"
    )
    _installed(tmp_path, "broken", "broken = no_such_module:provider")
    monkeypatch.syspath_prepend(tmp_path)
    assert provider_from_uri("vault:x").uri == "file:/vault/x"
    assert "vault" in known_schemes()
    with pytest.raises(KeyProviderError, match="provider of the key scheme broken cannot be loaded: No module"):
        provider_from_uri("broken:x")
    _installed(tmp_path, "thief", "vault = vault_keys:thief\nfile = vault_keys:thief")
    with pytest.raises(KeyProviderError, match="several packages provide the key scheme vault"):
        provider_from_uri("vault:x")
    assert provider_from_uri("file:x").uri == "file:x"
    assert known_schemes().count("file") == 1
    with pytest.raises(KeyFileError, match=r"unknown key scheme \W*valut\W*; known are .*file, .*vault"):
        provider_from_uri("valut:x")


def test_our_own_schemes_are_entry_points() -> None:
    declared = {one.name: one.value for one in distribution("encfs").entry_points.select(group=ENTRY_POINT_GROUP)}
    assert declared == {scheme: f"encfs.keys.providers.{scheme}:{name}" for scheme, name in _OWN.items()}


def test_our_own_schemes_cost_no_look_at_what_is_installed() -> None:
    """That takes longer than all the rest of a short command's start."""
    program = (
        "import sys; from encfs.keys.providers import provider_from_uri; provider_from_uri('file:x')\n"
        "assert 'importlib.metadata' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# --- file ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["x25519", "rsa3072", "mlkem768x25519", "oct"])
def test_file(tmp_path: Path, kind: str) -> None:
    path = secret_file(tmp_path / "key", json.dumps(private_jwk(key(kind))).encode())
    provider = provider_from_uri(str(path))
    for _ in range(2):
        assert keyring_for("p256", kind).open([provider]) == PAYLOAD


def test_file_pem(tmp_path: Path) -> None:
    path = secret_file(tmp_path / "key", private_pem("p384"))
    assert keyring_for("p384").open([provider_from_uri(f"file:{path}")]) == PAYLOAD


def test_file_that_does_not_fit(tmp_path: Path) -> None:
    keyring = keyring_for("p256")
    missing = provider_from_uri(str(tmp_path / "none"))
    with pytest.raises(NotFoundError, match="none does not exist"):
        keyring.open([missing])
    other = secret_file(tmp_path / "other", private_pem("x25519"))
    with pytest.raises(WrongKeyError, match=r"other is for recipients of type x25519, and the keyring has none"):
        keyring.open([provider_from_uri(str(other))])
    with pytest.raises(NotFoundError, match=r"other is for recipients .*; key file .*none does not exist"):
        keyring.open([provider_from_uri(str(other)), missing])
    shared = secret_file(tmp_path / "public", json.dumps(public_jwk(public("p256"))).encode())
    with pytest.raises(KeyFileError, match="is a public key; decrypting needs the private one"):
        keyring.open([provider_from_uri(str(shared))])
    right = secret_file(tmp_path / "right", private_pem("p256"))
    assert keyring.open([missing, provider_from_uri(str(right))]) == PAYLOAD


def test_symmetric_key_of_a_file_is_wiped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = secret_file(tmp_path / "key", json.dumps(private_jwk(key("oct"))).encode())
    loaded: list[SymmetricKey] = []

    def load(name: str) -> PrivateKey | SymmetricKey:
        found = load_decryption_key(name)
        assert isinstance(found, SymmetricKey)
        loaded.append(found)
        return found

    monkeypatch.setattr(file_module, "load_decryption_key", load)
    assert keyring_for("oct").open([provider_from_uri(str(path))]) == PAYLOAD
    with pytest.raises(WrongKeyError):
        keyring_for("p256").open([provider_from_uri(str(path))])
    assert [found.secret for found in loaded] == [bytearray(32)] * 2


# --- env -------------------------------------------------------------------------------------------------------------


def _oct() -> SymmetricKey:
    made = key("oct")
    assert isinstance(made, SymmetricKey)
    return made


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("x25519", lambda: json.dumps(private_jwk(private("x25519")))),
        ("p256", lambda: private_pem("p256").decode()),
        ("oct", lambda: base64.b64encode(_oct().secret).decode()),
        ("oct", lambda: "\n" + base64.b64encode(_oct().secret).decode() + "\n"),
    ],
)
def test_env(monkeypatch: pytest.MonkeyPatch, kind: str, value: Callable[[], str]) -> None:
    monkeypatch.setenv("ENCFS_TEST_KEY", value())
    provider = provider_from_uri("env:ENCFS_TEST_KEY")
    child = subprocess.run(["env"], check=True, capture_output=True, text=True)
    assert "ENCFS_TEST_KEY" not in child.stdout, "another key's provider may start a program first"
    for _ in range(2):
        assert keyring_for(kind).open([provider]) == PAYLOAD
        assert "ENCFS_TEST_KEY" not in os.environ
    child = subprocess.run(["env"], check=True, capture_output=True, text=True)
    assert "ENCFS_TEST_KEY" not in child.stdout
    provider.close()
    with pytest.raises(KeyFileError, match="environment variable ENCFS_TEST_KEY is not set"):
        keyring_for(kind).open([provider])


def test_env_that_was_not_needed_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the artifact is refused before a key is asked for: the next attempt finds it."""
    value = base64.b64encode(_oct().secret).decode()
    monkeypatch.setenv("ENCFS_TEST_KEY", value)
    provider = provider_from_uri("env:ENCFS_TEST_KEY")
    assert "ENCFS_TEST_KEY" not in os.environ
    provider.close()
    provider.close()
    assert os.environ["ENCFS_TEST_KEY"] == value


def test_closing_env_wipes_its_own_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENCFS_TEST_KEY", base64.b64encode(_oct().secret).decode())
    provider = EnvProvider("ENCFS_TEST_KEY")
    assert keyring_for("oct").open([provider]) == PAYLOAD
    held = provider._key
    assert isinstance(held, SymmetricKey)
    assert held.secret == _oct().secret
    provider.close()
    assert held.secret == bytes(32)
    assert _oct().secret != bytes(32)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "neither a JWK nor a PEM key"),
        ("hunter2", "neither a JWK nor a PEM key"),
        ("{}", "malformed JWK: it has no kty"),
        ("{hunter2", "malformed JWK"),
        (base64.b64encode(bytes(16)).decode(), "neither a JWK nor a PEM key"),
    ],
)
def test_env_malformed(monkeypatch: pytest.MonkeyPatch, value: str, reason: str) -> None:
    monkeypatch.setenv("ENCFS_TEST_KEY", value)
    with pytest.raises(KeyFileError, match=f"the environment variable ENCFS_TEST_KEY is (a )?{reason}") as caught:
        keyring_for("p256").open([provider_from_uri("env:ENCFS_TEST_KEY")])
    assert "hunter2" not in str(caught.value)
    assert "ENCFS_TEST_KEY" not in os.environ


# --- passphrase ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "secret"),
    [
        (b"correct horse", b"correct horse"),
        (b"correct horse\n", b"correct horse"),
        (b"correct horse\r\n", b"correct horse"),
        (b"  spaces stay  \n", b"  spaces stay  "),
        ("A\u030a\n".encode(), "\u00c5".encode()),
        ("\u00c5".encode(), "\u00c5".encode()),
        (b"x" * 1024 + b"\r\n", b"x" * 1024),
    ],
)
def test_passphrase_file(tmp_path: Path, content: bytes, secret: bytes) -> None:
    path = secret_file(tmp_path / "secret", content)
    assert read(f"file={path}") == secret


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is an empty passphrase"),
        (b"\n", "is an empty passphrase"),
        (b"\r\n", "is an empty passphrase"),
        (b"\n\n", "control character or more than one line"),
        (b"hunter2\nhunter3\n", "control character or more than one line"),
        (b"hunter2\r", "control character"),
        (b"hunter2\x00", "control character"),
        (b"hunter2\xff", "is not UTF-8 text"),
        (b"x" * 1025, "longer than 1024 bytes"),
        (b"x" * 60000, "longer than 1024 bytes"),
    ],
    ids=range(10),
)
def test_passphrase_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = secret_file(tmp_path / "secret", content)
    with pytest.raises(KeyFileError, match=reason) as caught:
        read(f"file={path}")
    error: BaseException | None = caught.value
    while error is not None:
        assert "hunter" not in str(error)
        assert b"hunter" not in repr(error).encode()
        error = error.__context__
    buffer = bytearray(content)
    with pytest.raises(KeyFileError):
        parse_passphrase(buffer, "it")
    assert buffer == bytes(len(content)), "what was given is wiped"


def test_passphrase_file_that_others_can_read(tmp_path: Path) -> None:
    path = secret_file(tmp_path / "secret", b"x")
    path.chmod(0o644)
    with pytest.raises(KeyFileError, match="accessible by others"):
        read(f"file={path}")
    with pytest.raises(NotFoundError):
        read(f"file={tmp_path / 'none'}")


def test_passphrase_file_opens(tmp_path: Path, locked: Keyring) -> None:
    path = secret_file(tmp_path / "secret", SECRET.encode() + b"\n")
    provider = PassphraseProvider(f"file={path}")
    assert locked.open([provider]) == PAYLOAD
    path.unlink()
    assert locked.open([provider]) == PAYLOAD, "read once, kept until close"
    held = provider._passphrase
    assert held is not None
    provider.close()
    assert held.secret == bytes(len(SECRET))
    with pytest.raises(NotFoundError):
        locked.open([provider])


def test_no_passphrase_is_asked_for_that_cannot_help() -> None:
    provider = provider_from_uri("passphrase:command=false")
    with pytest.raises(WrongKeyError, match="recipients of type passphrase, and the keyring has none"):
        keyring_for("p256").open([provider])


def test_passphrase_descriptor() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"correct horse\n")
    os.close(writer)
    assert read(f"fd={reader}") == b"correct horse"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reader)
    with pytest.raises(KeyProviderError, match=f"cannot read a passphrase from file descriptor {reader}"):
        read(f"fd={reader}")


def command(program: str) -> str:
    return f"command={shlex.join([sys.executable, '-c', program])}"


def test_passphrase_command(locked: Keyring) -> None:
    assert read("command=echo 'correct horse'") == b"correct horse"
    assert read(command("import sys; print(repr(sys.stdin.read()))")) == b"''"
    assert read("command=echo $HOME ; #") == b"$HOME ; #", "no shell"
    assert locked.open([provider_from_uri(f"passphrase:command=echo {SECRET}")]) == PAYLOAD


@pytest.mark.parametrize(
    ("rest", "kind", "reason"),
    [
        ("command=false", KeyProviderError, "failed with status 1"),
        (command("print('hunter2'); raise SystemExit(3)"), KeyProviderError, "failed with status 3"),
        (command("import os; os.kill(os.getpid(), 9)"), KeyProviderError, "failed with status -9"),
        ("command=/no/such/program hunter2", KeyProviderError, "cannot be started: No such file"),
        ("command=/etc/passwd hunter2", KeyProviderError, "cannot be started: Permission denied"),
        ("command='a\0b'", KeyProviderError, "cannot be started: malformed argument"),
        ("command=true", KeyFileError, "output is an empty passphrase"),
        (command("print('hunter2' * 1000)"), KeyFileError, "longer than 1024 bytes"),
        (command("import itertools; [print('hunter2') for _ in itertools.count()]"), KeyFileError, "longer than 1024"),
    ],
)
def test_passphrase_command_that_fails(rest: str, kind: type[EncfsError], reason: str) -> None:
    with pytest.raises(kind, match=reason) as caught:
        read(rest)
    assert "hunter" not in str(caught.value)


def test_passphrase_command_does_not_get_our_input() -> None:
    program = (
        "from encfs.errors import KeyFileError\n"
        "from encfs.keys.providers.passphrase import read_passphrase\n"
        "try:\n    read_passphrase('command=cat')\n"
        "except KeyFileError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input="hunter2\n", capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "the passphrase command's output is an empty passphrase\n"


def test_passphrase_command_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It and what it started are ended, whether they keep their output open or not."""
    monkeypatch.setattr(passphrase_module, "COMMAND_TIMEOUT", 0.5)
    noted = tmp_path / "pid"
    # A shell: Python may take longer to begin than it is given.
    silent = f"sleep 600 & echo $! > '{noted}'; wait"
    for script in (silent, f"exec >&-; {silent}"):
        started = time.monotonic()
        with pytest.raises(KeyProviderError, match="did not end within"):
            read(f"command={shlex.join(['/bin/sh', '-c', script])}")
        assert time.monotonic() - started < 30
        child = int(noted.read_text())
        assert _gone(child)


def _gone(pid: int) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def _on_terminal(typed: bytes, *, confirm: bool) -> tuple[int, str]:
    """Exit status and output of a child process with a terminal of its own, on which the lines of `typed` are typed."""
    program = (
        "import fcntl, termios\n"
        "from encfs.errors import EncfsError\n"
        "from encfs.keys.providers.passphrase import read_passphrase\n"
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "try:\n"
        f"    print('got', bytes(read_passphrase('', confirm={confirm}).secret).hex())\n"
        "except EncfsError as error:\n"
        "    print(error)\n"
        "    raise SystemExit(error.exit_code)\n"
    )
    terminal, side = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=side, stdout=side, stderr=side, start_new_session=True
    )
    os.close(side)
    output = b""
    lines = typed.splitlines(keepends=True)
    try:
        while select.select([terminal], [], [], 30)[0]:
            try:
                chunk = os.read(terminal, 4096)
            except OSError:  # how Linux reports the end of a terminal
                break
            output += chunk
            if lines and output.count(b": ") > typed.count(b"\n") - len(lines):
                os.write(terminal, lines.pop(0))
    finally:
        os.close(terminal)
        if child.poll() is None:
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                raise
    return child.returncode, output.decode()


def test_passphrase_prompt() -> None:
    status, output = _on_terminal("pässwörd\n".encode(), confirm=False)
    assert status == 0
    assert f"got {'pässwörd'.encode().hex()}" in output
    assert "pässwörd" not in output, "no echo"


def test_passphrase_prompt_confirmed() -> None:
    status, output = _on_terminal(b"hunter2\nhunter2\n", confirm=True)
    assert (status, output.count(": ")) == (0, 2)
    status, output = _on_terminal(b"hunter2\nhunter3\n", confirm=True)
    assert status == KeyFileError.exit_code
    assert "the two passphrases differ" in output
    assert "hunter" not in output


def test_passphrase_prompt_without_an_answer() -> None:
    status, output = _on_terminal(b"\n", confirm=False)
    assert status == KeyFileError.exit_code
    assert "what was typed is an empty passphrase" in output
    status, output = _on_terminal(b"\x04\n", confirm=False)
    assert status == KeyProviderError.exit_code
    assert "no passphrase was typed" in output


def test_passphrase_prompt_without_a_terminal() -> None:
    """In a session of its own there is no /dev/tty; standard input is not read in its place."""
    program = (
        "from encfs.errors import KeyProviderError\n"
        "from encfs.keys.providers.passphrase import read_passphrase\n"
        "try:\n    read_passphrase('')\n"
        "except KeyProviderError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input="hunter2\n",
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "there is no terminal to ask for a passphrase; use passphrase:file=PATH" in done.stdout
    assert done.stderr == ""


def test_unreadable_passphrase_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        read(f"file={tmp_path / 'file' / 'x'}")
