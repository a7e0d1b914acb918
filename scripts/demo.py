"""The whole way of an artifact on one machine: make a model, encrypt, sign, search, mount, push, load, refuse, tamper.

Run by `make demo`. Every claim that is printed is checked; the exit code is 1 if one of them is false.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import filecmp
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import demo_broker
import numpy as np
from narration import ClaimError, claim, run, say, show, step
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

LAYERS = 12
WIDTH = 1024
SAMPLES_PER_FILE = 4096
WINDOW = 32
ARTIFACT_ID = "acme/chat"
MODEL_FILE = "chat-00001-of-00001.safetensors"
CODE_FILE = "modeling_chat.py"


def make_model(directory: Path) -> None:
    """A directory as model hubs serve it: weights, configuration, tokenizer, code."""
    directory.mkdir()
    generator = np.random.default_rng()
    shapes = {"chat.embed_tokens.weight": (8192, WIDTH)}
    for layer in range(LAYERS):
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"chat.layers.{layer}.attention.{part}.weight"] = (WIDTH, WIDTH // 2)
    tensors = {
        name: generator.standard_normal(shape, dtype=np.float32).astype(np.float16) for name, shape in shapes.items()
    }
    save_file(tensors, directory / MODEL_FILE, metadata={"format": "np"})
    vocabulary = {f"token_{index}": index for index in range(8192)}
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": vocabulary}}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "model_config.json").write_text(json.dumps({"layers": LAYERS, "width": WIDTH}))
    code = f"""
        import sys
        from safetensors import safe_open

        def norm(path):
            with safe_open(path, framework="np") as model:
                return float(abs(model.get_tensor("chat.layers.0.attention.q_proj.weight")).max())

        if __name__ == "__main__":
            print(f"largest weight of the first layer: {{norm(sys.argv[1] + '/{MODEL_FILE}'):.3f}}")
        """
    (directory / CODE_FILE).write_text(textwrap.dedent(code))


def files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file())


def sample_windows(directory: Path) -> list[bytes]:
    """Runs of WINDOW bytes from random places of every file."""
    windows = []
    for path in files(directory):
        content = path.read_bytes()
        places = range(len(content) - WINDOW + 1)
        chosen = random.sample(places, min(SAMPLES_PER_FILE, len(places)))
        windows += [content[place : place + WINDOW] for place in chosen]
    return windows


def find_any(directory: Path, windows: list[bytes]) -> int:
    """How many of the windows occur anywhere in the files of a directory, at any alignment."""
    wanted = set(windows)
    starts = np.zeros(1 << 24, dtype=bool)
    for window in wanted:
        starts[int.from_bytes(window[:3], "little")] = True
    found = set()
    for path in files(directory):
        content = path.read_bytes()
        octets = np.frombuffer(content, dtype=np.uint8).astype(np.uint32)
        if len(octets) < WINDOW:
            continue
        keys = octets[:-2] | octets[1:-1] << 8 | octets[2:] << 16
        for place in np.flatnonzero(starts[keys]).tolist():
            window = content[place : place + WINDOW]
            if window in wanted:
                found.add(window)
    return len(found)


def find_names(directory: Path, names: list[str]) -> list[str]:
    contents = [(path, path.read_bytes()) for path in files(directory)]
    return [
        name
        for name in names
        if any(name in str(path.relative_to(directory)) or name.encode() in content for path, content in contents)
    ]


def secrecy(model: Path, layout: Path) -> None:
    with safe_open(model / MODEL_FILE, framework="np") as opened:
        names = [path.name for path in files(model)] + sorted(opened.keys())
    windows = sample_windows(model)
    found = find_any(model, windows)
    claim(found == len(set(windows)), f"the search works: it finds all {found} samples of {WINDOW} bytes in the model")
    claim(find_any(layout, windows) == 0, "it finds none of them in the layout")
    claim(find_names(layout, names) == [], f"nor any of the {len(names)} names of files and tensors")


def loading(model: Path, mount: Path) -> None:
    compared = filecmp.dircmp(model, mount)
    claim(not compared.left_only and not compared.right_only, f"the mount shows {len(compared.common)} files")
    started = time.monotonic()
    loaded = load_file(mount / MODEL_FILE)
    seconds = time.monotonic() - started
    original = load_file(model / MODEL_FILE)
    same = loaded.keys() == original.keys() and all(np.array_equal(loaded[key], original[key]) for key in original)
    size = sum(tensor.nbytes for tensor in loaded.values())
    claim(same, f"safetensors loads {len(loaded)} equal tensors ({size >> 20} MiB) through it in {seconds:.2f} s")
    equal = [filecmp.cmp(model / name, mount / name, shallow=False) for name in compared.common]
    claim(all(equal), "and every file is the same byte for byte")
    done = subprocess.run([sys.executable, mount / CODE_FILE, mount], capture_output=True, text=True, check=False)
    claim(done.returncode == 0, f"its code runs from the mount: {done.stdout.strip()}")


@contextlib.contextmanager
def local_registry(work: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Debian's docker-registry on a free loopback port: its address, and the process, which may be ended before."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{listener.getsockname()[1]}"
    config = {
        "version": 0.1,
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str((work / "registry").absolute())}},
        "http": {"addr": host, "secret": "of this demonstration"},
    }
    file = work / "registry.yml"
    file.write_text(json.dumps(config))  # JSON is YAML
    with open(work / "registry.log", "wb") as log:
        server = subprocess.Popen(["docker-registry", "serve", file], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 20
        while not answers(host):
            if server.poll() is not None or time.monotonic() > deadline:
                raise ClaimError("docker-registry serves: " + (work / "registry.log").read_text())
            time.sleep(0.05)
        yield host, server
    finally:
        server.kill()
        server.wait()


def answers(host: str) -> bool:
    name, port = host.split(":")
    try:
        socket.create_connection((name, int(port)), 1).close()
    except OSError:
        return False
    return True


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def one_tensor(model: Path, mount: Path) -> None:
    """Load a single tensor as an inference server would, from the mount and from the original."""
    name = f"chat.layers.{LAYERS - 1}.attention.o_proj.weight"
    started = time.monotonic()
    with safe_open(mount / MODEL_FILE, framework="np") as opened:
        tensor = opened.get_tensor(name)
    seconds = time.monotonic() - started
    with safe_open(model / MODEL_FILE, framework="np") as opened:
        claim(np.array_equal(tensor, opened.get_tensor(name)), f"{name} is there in {seconds:.2f} s")


def transferred(mount: Path) -> dict[str, int]:
    """What a mount has fetched so far, by kind and place (bytes)."""
    [status] = [item for item in mounts() if item["mountpoint"] == str(mount.absolute())]
    return dict(status["transfer"])


def mounts() -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = json.loads(run("encfs", "status", "--json"))["mounts"]
    return listed


def through_a_registry(work: Path, model: Path, layout: str, open_with: tuple[str | Path, ...]) -> None:
    """Push, mount lazily, fetch the rest, and read on when the registry is gone."""
    mount, cache = work / "from-registry", work / "cache"
    mount.mkdir()
    reached = ("--plain-http", "--cache-dir", cache)
    with local_registry(work) as (host, server):
        remote = f"docker://{host}/acme/chat:v3"
        show(run("imagetool", "push", layout, remote, "--plain-http"), only="copied")
        inspected = json.loads(run("imagetool", "inspect", remote, "--plain-http", "--json"))
        size = sum(part["size"] for volume in inspected["volumes"] for part in volume["segments"])
        started = time.monotonic()
        run("encfs", "mount", remote, mount, *open_with, *reached)
        try:
            say(f"     mounted in {time.monotonic() - started:.2f} s")
            one_tensor(model, mount)
            part, ahead = (transferred(mount)[name] for name in ("bytes_from_registry", "bytes_read_ahead"))
            shown = f"{megabytes(part)} of {megabytes(size)} were fetched, {megabytes(ahead)} of them ahead of reads"
            claim(0 < part < size / 4, f"for that, {shown}")
            claim(directory_size(cache) < size / 2, f"the cache holds {megabytes(directory_size(cache))}")
            show(run("imagetool", "pull", remote, *reached), only="fetched")
            server.kill()
            server.wait()
            claim(not answers(host), "the registry is stopped, and the mount reads on:")
            loading(model, mount)
            from_cache = transferred(mount)["bytes_from_cache"]
            claim(from_cache > 0, f"{megabytes(from_cache)} came from the cache")
        finally:
            run("encfs", "umount", mount)
        run("encfs", "mount", remote, mount, *open_with, *reached, "--io-timeout", "2")
        try:
            equal = filecmp.cmp(model / MODEL_FILE, mount / MODEL_FILE, shallow=False)
            claim(equal, "a new mount works without the registry, too")
        finally:
            run("encfs", "umount", mount)


def directory_size(directory: Path) -> int:
    """Bytes of disk space that its files take up."""
    return sum(path.stat().st_blocks * 512 for path in files(directory))


def tamper(layout: Path) -> None:
    """Flip one bit in the middle of the largest blob."""
    blob = max(files(layout), key=lambda path: path.stat().st_size)
    place = blob.stat().st_size // 2
    with blob.open("r+b") as stream:
        stream.seek(place)
        octet = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([octet ^ 0x10]))
    say(f"   bit 4 of byte {place} of {blob.name[:16]}… is flipped")


def failing_read(mount: Path, log_file: Path) -> None:
    failure = None
    try:
        (mount / MODEL_FILE).read_bytes()
    except OSError as error:
        failure = error.errno
    claim(failure == errno.EIO, "reading the weights fails with EIO; no wrong byte came out")
    claim((mount / "tokenizer.json").read_bytes() != b"", "what is intact is still served")
    lines = [line for line in log_file.read_text().splitlines() if "frame" in line]
    claim(bool(lines), "and the log says what happened:")
    show(textwrap.fill(lines[0], 110))


def demonstrate(work: Path) -> None:
    model, layout, mount = work / "model", work / "layout", work / "mount"
    reference = f"oci:{layout}:v3"
    trust = ("--trust", work / "owner.jwk.pub", "--id", ARTIFACT_ID, "--min-version", "3")

    step(1, "A model directory, made on the spot")
    make_model(model)
    for path in files(model):
        say(f"     {path.stat().st_size:>10}  {path.name}")

    step(2, "Keys: two consumers, and the owner's for signing")
    run("imagetool", "keygen", "-o", work / "alice.jwk")
    run("imagetool", "keygen", "-o", work / "bob.jwk", "--type", "p256")
    run("imagetool", "keygen", "-o", work / "owner.jwk", "--type", "ed25519")

    step(3, "Encrypt it for both, and sign it")
    recipients = ("-r", work / "alice.jwk.pub", "-r", work / "bob.jwk.pub")
    signed = ("--sign", work / "owner.jwk", "--id", ARTIFACT_ID, "--artifact-version", "3")
    show(run("imagetool", "encrypt", model, reference, *recipients, *signed))

    step(4, "What is in the layout, for those without a key")
    secrecy(model, layout)
    show(run("imagetool", "verify", reference), only="root commits")

    step(5, "Mount it with Bob's key, and load the model")
    mount.mkdir()
    show(run("encfs", "mount", reference, mount, "-k", work / "bob.jwk", *trust))
    try:
        loading(model, mount)
    finally:
        run("encfs", "umount", mount)

    step(6, "Push it to a registry, mount it from there, and stop the registry")
    through_a_registry(work, model, reference, ("-k", work / "alice.jwk", *trust))

    step(7, "Who is refused")
    run("imagetool", "keygen", "-o", work / "eve.jwk")
    run("imagetool", "keygen", "-o", work / "mallory.jwk", "--type", "ed25519")
    show(run("encfs", "ls", reference, "-k", work / "eve.jwk", *trust, code=22))
    other = ("--trust", work / "mallory.jwk.pub", "--id", ARTIFACT_ID)
    show(run("encfs", "ls", reference, "-k", work / "bob.jwk", *other, code=31))
    newer = (*trust[:-1], "4")
    show(run("encfs", "ls", reference, "-k", work / "bob.jwk", *newer, code=33))

    step(8, "Somebody flips one bit in the store")
    tamper(layout)
    show(run("imagetool", "verify", reference, code=11))
    mounted = run("encfs", "mount", reference, mount, "-k", work / "alice.jwk", *trust, "--json")
    try:
        failing_read(mount, Path(json.loads(mounted)["log_file"]))
    finally:
        run("encfs", "umount", mount)

    demo_broker.demonstrate(work, first=9)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("demo-work"), help="directory to work in; it is replaced")
    parser.add_argument("--keep", action="store_true", help="leave the directory behind")
    options = parser.parse_args()
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        say("the demo mounts through FUSE, and /dev/fuse cannot be opened here (in a container: --device /dev/fuse)")
        return 1
    for needed in ("docker-registry", *demo_broker.NEEDED):
        if shutil.which(needed) is None:
            say(f"the demo needs {needed}: scripts/install-packages demo")
            return 1
    if options.work.exists():
        shutil.rmtree(options.work)
    options.work.mkdir()
    started = time.monotonic()
    try:
        demonstrate(options.work)
    except ClaimError as error:
        say(f"\nNOT SO: {error}")
        return 1
    finally:
        if not options.keep:
            shutil.rmtree(options.work)
    say(f"\nEvery claim held. ({time.monotonic() - started:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
