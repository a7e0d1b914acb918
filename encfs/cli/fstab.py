"""`mount.fuse.encfs`: the helper that mount(8) calls for /etc/fstab and .mount units.

    mount.fuse.encfs REF DIR [-sfnv] [-t TYPE] [-o OPTIONS]

OPTIONS are those of `encfs mount` without dashes (`key=file:/etc/encfs/k.jwk`, `trust=…`, `supervise`), and those that
mount(8) and systemd mean for themselves, which are left out. Keys are files and services: what would have to be asked
for, or be secret in a table that everybody reads, is refused. It has to be named with an absolute path in the table.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from encfs.errors import UsageError

#: Options with a value, as `encfs mount` has them.
_VALUES = frozenset(
    {"key", "pin", "trust", "id", "min-version", "memory", "log-file", "log-format", "listen", "backend", "upper"}
    | {"ca-file", "cert-file", "key-file", "io-timeout", "concurrency", "mirror", "cache-dir", "cache-size"}
    | {"prefetch", "prefetch-rate", "platform"}
)
_FLAGS = frozenset(["supervise", "allow-unsigned", "suid", "dev", "writable", "plain-http"])
#: What mount(8), fstab(5) and systemd.mount(5) understand themselves.
_IGNORED = frozenset(
    {"ro", "rw", "defaults", "auto", "noauto", "nofail", "_netdev", "user", "nouser", "users"}
    | {"nosuid", "nodev", "exec", "relatime"}
)
_SECRET_SCHEMES = ("env:", "passphrase:")


def words_of(arguments: Sequence[str]) -> list[str]:
    """The words of `encfs` for those that mount(8) gives. Raises: UsageError."""
    places: list[str] = []
    options: list[str] = []
    rest = iter(arguments)
    for word in rest:
        if word in {"-o", "-t"}:
            value = next(rest, "")
            options += value.split(",") if word == "-o" else []
        elif not word.startswith("-"):
            places.append(word)
    if len(places) != 2:
        raise UsageError("mount.fuse.encfs takes a reference and a directory", hint="mount -t fuse.encfs REF DIR -o …")
    words = ["mount", *places]
    # Tables are for everybody on the machine, unless they say otherwise.
    if "noallow_other" not in options:
        words.append("--allow-other")
    for option in options:
        words += _words(option)
    return words


def _words(option: str) -> list[str]:
    name, given, value = option.partition("=")
    name = name.replace("_", "-") if name != "_netdev" else name
    if option in _IGNORED or name.startswith(("x-", "comment")) or name in {"", "allow-other", "noallow-other"}:
        return []
    if name == "key" and value.startswith(_SECRET_SCHEMES) and not value.startswith("passphrase:file="):
        raise UsageError(
            f"the key of {value.partition(':')[0]}: cannot be had at boot", hint="name a file or a service"
        )
    if (name in _VALUES and given and value) or (name in _FLAGS and not given):
        return [f"--{name}", value] if given else [f"--{name}"]
    raise UsageError(f"unknown mount option {option!r}", hint="they are those of encfs mount, without the dashes")


def main() -> NoReturn:
    """Run `encfs mount` for mount(8)."""
    from encfs.cli import PROGRAM, application
    from encfs.console import commandline
    from encfs.console.terminal import Settings, Terminal, run

    try:
        words = words_of(sys.argv[1:])
    except UsageError as error:
        terminal = Terminal("mount.fuse.encfs")
        terminal.configure(Settings())
        refused = error

        def fail() -> int:
            raise refused

        sys.exit(run(terminal, fail))
    commandline.main(application(words), PROGRAM, words)
