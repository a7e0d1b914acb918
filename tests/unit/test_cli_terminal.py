"""Output, progress, and how commands end: `encfs.console.terminal` and `encfs.console.drawing`."""

from __future__ import annotations

import errno
import json
import logging
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from encfs.console.drawing import PlainProgress
from encfs.console.terminal import (
    INTERNAL_ERROR_EXIT_CODE,
    SIGNAL_EXIT_BASE,
    Settings,
    Terminal,
    printable,
    run,
    translated_errors,
)
from encfs.errors import EncfsError, NotFoundError, StorageError, UsageError
from encfs.progress import NoProgress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def terminal() -> Terminal:
    return Terminal("encfs")


def test_names_cannot_drive_a_terminal() -> None:
    assert printable("plain, with ünïcödé") == "plain, with ünïcödé"
    assert printable("\x1b[2J\r\nnext") == "\\x1b[2J\\r\\nnext"
    assert printable(os.fsdecode(b"d\xffr")) == "d\\xffr"
    assert printable("\u202egnp.exe\u2028") == "\\u202egnp.exe\\u2028"


def test_an_error_is_one_line(terminal: Terminal, capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise NotFoundError("no tag 'a\nb'", hint="name another")

    assert run(terminal, fail) == NotFoundError.exit_code
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "encfs: error: no tag 'a\\nb'; name another\n"


def test_an_error_is_an_object_with_json(terminal: Terminal, capfd: pytest.CaptureFixture[str]) -> None:
    terminal.configure(Settings(json=True))

    def fail() -> int:
        raise NotFoundError("gone")

    assert run(terminal, fail) == NotFoundError.exit_code
    out, err = capfd.readouterr()
    assert json.loads(out) == {"error": {"type": "NotFoundError", "message": "gone", "hint": None}, "exit_code": 3}
    assert err == "encfs: error: gone\n"


def test_an_error_behind_a_begun_result_adds_no_object(terminal: Terminal, capfd: pytest.CaptureFixture[str]) -> None:
    terminal.configure(Settings(json=True))

    def fail() -> int:
        terminal.write(b'{"entries": [')
        raise StorageError("gone")

    assert run(terminal, fail) == StorageError.exit_code
    sys.stdout.flush()
    assert capfd.readouterr().out == '{"entries": ['


@pytest.mark.parametrize("debug", [False, True])
def test_a_bug_shows_its_text_only_for_debugging(
    terminal: Terminal, capfd: pytest.CaptureFixture[str], debug: bool
) -> None:
    terminal.configure(Settings(debug=debug))

    def fail() -> int:
        hidden = "value-of-a-local"
        raise ValueError(f"text of the exception {len(hidden)}")

    assert run(terminal, fail) == INTERNAL_ERROR_EXIT_CODE
    err = capfd.readouterr().err
    assert err.startswith("encfs: error: internal error (ValueError); this is a bug: run again with --debug")
    assert ("text of the exception" in err) is debug
    assert ("Traceback" in err) is debug
    assert 'hidden = "value-of-a-local"' not in err


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (OSError(errno.ENOSPC, "x", "/a/b"), StorageError, "/a/b: No space left on device; free some space"),
        (OSError(errno.ENOENT, "x", "/a/b"), NotFoundError, "/a/b: No such file or directory"),
        (OSError(errno.EACCES, "x", b"/a/b"), StorageError, "/a/b: Permission denied"),
        (OSError(errno.EIO, "x"), StorageError, "Input/output error"),
        (MemoryError(), EncfsError, "out of memory; "),
        (RuntimeError("can't start new thread"), EncfsError, "the system lets no more threads be started; "),
        (EOFError(), UsageError, "standard input ended"),
    ],
)
def test_what_the_system_throws_becomes_typed(raised: BaseException, expected: type[EncfsError], message: str) -> None:
    with pytest.raises(EncfsError) as caught, translated_errors():
        raise raised
    assert type(caught.value) is expected
    assert str(caught.value).startswith(message)


def test_a_bug_stays_one() -> None:
    with pytest.raises(RuntimeError, match="odd"), translated_errors():
        raise RuntimeError("odd")


def test_no_thread_to_be_had() -> None:
    """In truth: without privilege, since a limit of processes does not hold for root."""
    program = (
        "import os, resource, threading\n"
        "from encfs.console.terminal import translated_errors\n"
        "from encfs.deferred import loaded_meanwhile\n"
        "resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        "with loaded_meanwhile('colorsys'): pass\n"
        "with translated_errors(): threading.Thread(target=int).start()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.splitlines()[-1].startswith("encfs.errors.EncfsError: the system lets no more threads")


def test_results_are_lines_or_an_object(terminal: Terminal, capfd: pytest.CaptureFixture[str]) -> None:
    terminal.result({"a": 1}, ["one", "two"])
    terminal.flush()
    assert capfd.readouterr().out == "one\ntwo\n"
    terminal.configure(Settings(json=True))
    terminal.warn("careful")
    terminal.result({"a": "ä"}, ["one", "two"])
    terminal.flush()
    out, err = capfd.readouterr()
    assert json.loads(out) == {"a": "ä", "warnings": ["careful"]}
    assert err == "encfs: warning: careful\n"


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_streamed_list_is_one_object(terminal: Terminal, capfd: pytest.CaptureFixture[str], count: int) -> None:
    entries = [({"index": index}, f"line {index}") for index in range(count)]
    terminal.stream({"head": True}, "entries", iter(entries))
    terminal.configure(Settings(json=True))
    terminal.stream({"head": True}, "entries", iter(entries))
    terminal.flush()
    lines = capfd.readouterr().out.splitlines(keepends=True)
    assert lines[:count] == [f"line {index}\n" for index in range(count)]
    assert json.loads("".join(lines[count:])) == {"head": True, "entries": [one for one, _ in entries], "warnings": []}


def test_the_library_s_log_is_shown_by_its_level(terminal: Terminal, capfd: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("encfs.test")
    for settings, expected in [
        (Settings(), ["warning: wary", "error: bad"]),
        (Settings(quiet=True), ["warning: wary", "error: bad"]),
        (Settings(verbose=True), ["told", "warning: wary", "error: bad"]),
        (Settings(debug=True), ["detail", "told", "warning: wary", "error: bad"]),
    ]:
        terminal.configure(settings)
        log.debug("detail")
        log.info("told")
        log.warning("wary")
        log.error("bad")
        assert capfd.readouterr().err.splitlines() == [f"encfs: {line}" for line in expected]


def test_warnings_that_are_kept_are_bounded(terminal: Terminal, capfd: pytest.CaptureFixture[str]) -> None:
    terminal.configure(Settings(json=True))
    for index in range(1000):
        terminal.warn(str(index))
    terminal.result({})
    terminal.flush()
    out, err = capfd.readouterr()
    assert len(json.loads(out)["warnings"]) == 100
    assert len(err.splitlines()) == 1000


def test_settings_add_up() -> None:
    assert Settings(json=True).merged(Settings(progress="plain")) == Settings(json=True, progress="plain")
    assert Settings(progress="none").merged(Settings(quiet=True)) == Settings(progress="none", quiet=True)
    assert Settings(progress="none").merged(Settings(progress="plain")).progress == "plain"


# Progress


def test_plain_progress_prints_a_line_now_and_then() -> None:
    clock, lines = Clock(), list[str]()
    progress = PlainProgress(lines.append, clock)
    progress.begin("encrypt", 1000 << 20)
    for _ in range(100):
        clock.now += 0.12
        progress.advance(10 << 20)
    progress.end()
    assert lines == [
        "encrypt: 90 MiB of 1000 MiB (9 %), 83.3 MiB/s, 11 s left",
        "encrypt: 510 MiB of 1000 MiB (51 %), 83.3 MiB/s, 5.9 s left",
        "encrypt: 930 MiB of 1000 MiB (93 %), 83.3 MiB/s, 840 ms left",
        "encrypt: 1000 MiB in 12 s, 83.3 MiB/s",
    ]


def test_plain_progress_says_nothing_of_what_is_quick() -> None:
    clock, lines = Clock(), list[str]()
    progress = PlainProgress(lines.append, clock)
    for _ in range(5):
        progress.begin("quick", 100)
        clock.now += 0.9
        progress.advance(100)
    progress.end()
    assert lines == []


def test_plain_progress_without_a_total_and_broken_off() -> None:
    clock, lines = Clock(), list[str]()
    progress = PlainProgress(lines.append, clock)
    progress.advance(1)
    progress.begin("copy", None)
    clock.now += 2
    progress.advance(4096)
    progress.close()
    progress.end()
    assert lines == ["copy: 4 KiB, 2 KiB/s"]


def test_no_progress_off_a_terminal_unless_asked(terminal: Terminal) -> None:
    for mode, kind in [(None, NoProgress), ("auto", NoProgress), ("none", NoProgress), ("plain", PlainProgress)]:
        terminal.configure(Settings(progress=mode))  # type: ignore[arg-type]
        with terminal.progress() as progress:
            assert type(progress) is kind
    terminal.configure(Settings(progress="fancy"))
    with terminal.progress() as progress:
        assert type(progress) is PlainProgress, "a bar cannot be redrawn in a file"
    terminal.configure(Settings(progress="plain", quiet=True))
    with terminal.progress() as progress:
        assert type(progress) is NoProgress


_DRAW = """
import sys, time
import encfs.console.drawing
from encfs.console.terminal import Settings, Terminal
encfs.console.drawing.DRAW_AFTER = encfs.console.drawing.REDRAW_INTERVAL = 0
terminal = Terminal("encfs")
terminal.configure(Settings())
with terminal.progress() as progress:
    print("rich imported early" if "rich" in sys.modules else "lazy", type(progress).__name__, flush=True)
    progress.begin("encrypt", 1 << 30)
    for step in range(4):
        progress.advance(1 << 28)
        terminal.note(f"between {step}")
    progress.end()
"""


def _on_terminal(code: str, **environment: str) -> str:
    """What a Python program writes to a terminal, which is its standard output and error."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120", **environment},
    ) as process:
        os.close(slave)
        written = bytearray()
        while True:
            try:
                piece = os.read(master, 65536)
            except OSError as error:
                assert error.errno == errno.EIO  # noqa: PT017 - how the end of a terminal is told
                break
            written += piece
    os.close(master)
    assert process.returncode == 0, written.decode()
    return written.decode()


def test_a_bar_on_a_terminal() -> None:
    written = _on_terminal(_DRAW)
    assert "lazy FancyProgress" in written
    assert "256 MiB of 1 GiB (25 %)" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written)
    assert "encfs: between 3" in written
    assert re.search(r"\x1b\[[39][0-9;]*m", written), "colours"
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l"), "the cursor is shown again"


def test_no_colour_where_none_is_wanted() -> None:
    written = _on_terminal(_DRAW, NO_COLOR="1")
    assert "of 1 GiB (25 %)" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written)
    assert not re.search(r"\x1b\[(3[0-7]|9[0-7]|38;|4[0-7])", written)


def test_no_bar_on_a_dumb_terminal() -> None:
    written = _on_terminal(_DRAW, TERM="dumb")
    assert "lazy NoProgress" in written
    assert "\x1b" not in written


# How commands end

_RUN = """
import os, signal, sys, time
from encfs.console.terminal import Settings, Terminal, run
terminal = Terminal("encfs")
terminal.configure(Settings())
def call():
    try:
        CALL
    finally:
        print("cleaned up", flush=True)
    return 0
sys.exit(run(terminal, call))
"""


def _run(call: str, shell: str = 'exec "$@"') -> subprocess.CompletedProcess[str]:
    """Run the program from a shell script, which may prepare something first."""
    words = ["sh", "-c", shell, "sh", sys.executable, "-c", _RUN.replace("CALL", call)]
    return subprocess.run(words, text=True, capture_output=True, check=False, timeout=60)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_unwind(name: str) -> None:
    number = signal.Signals[name]
    done = _run(f"os.kill(os.getpid(), {int(number)}); time.sleep(30)")
    assert done.returncode == SIGNAL_EXIT_BASE + number
    assert done.stdout == "cleaned up\n"
    assert done.stderr == f"encfs: interrupted by {name}\n"


def test_a_signal_in_the_middle_of_an_import_waits_for_its_end() -> None:
    """Raised there it was lost, where a weak reference's callback ran, or left the import system's lock locked."""
    importing = f"""
import importlib._bootstrap, types
def inside():
    kill(pid, {int(signal.SIGINT)})
    steps.append(1)
    steps.append(2)
steps = []
names = {{**vars(importlib._bootstrap), "kill": os.kill, "pid": os.getpid(), "steps": steps}}
try:
    types.FunctionType(inside.__code__, names)()
    time.sleep(30)
finally:
    print(steps, flush=True)
"""
    done = _run(f"exec({importing!r}, {{**globals()}})")
    assert done.returncode == SIGNAL_EXIT_BASE + signal.SIGINT
    assert done.stdout == "[1, 2]\ncleaned up\n"
    assert done.stderr == "encfs: interrupted by SIGINT\n"


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    done = _run(f"os.kill(os.getpid(), {int(signal.SIGHUP)})", "trap '' HUP; exec \"$@\"")
    assert done.returncode == 0
    assert done.stderr == ""


def test_handlers_are_put_back(terminal: Terminal) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert run(terminal, lambda: 0) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_a_reader_that_goes_away() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    code = _RUN.replace("CALL", "[terminal.write(bytes(65536)) for _ in range(100)]").replace(
        'print("cleaned', '("cleaned'
    )
    code = code.replace(", flush=True)", ")")
    done = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, check=False, timeout=60)
    os.close(writing)
    assert done.returncode == SIGNAL_EXIT_BASE + signal.SIGPIPE
    assert done.stderr == b""


@pytest.mark.parametrize("size", [10, 1 << 20])
def test_a_full_disk_behind_standard_output(size: int) -> None:
    code = _RUN.replace("CALL", f"terminal.write(bytes({size}))").replace('print("cleaned up", flush=True)', "pass")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, check=False, timeout=60, text=True
        )
    assert done.returncode == StorageError.exit_code
    assert done.stderr == "encfs: error: cannot write to standard output: No space left on device\n"


def test_nobody_listens_to_messages() -> None:
    done = _run("terminal.warn('x')", 'exec "$@" 2>&-')
    assert (done.returncode, done.stdout) == (0, "cleaned up\n")


def test_standard_output_is_closed() -> None:
    done = _run("terminal.line('x')", 'exec "$@" >&-')
    assert done.returncode == StorageError.exit_code
    assert done.stderr == "encfs: error: standard output is closed\n"


def test_exit_codes_are_returned(terminal: Terminal) -> None:
    codes: list[Callable[[], int]] = [lambda: 0, lambda: 5]
    assert [run(terminal, call) for call in codes] == [0, 5]
