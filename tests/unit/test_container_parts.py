"""What is run, by whom, and the messages between the two processes of a container."""

from __future__ import annotations

import json
import os
import signal
import socket

import pytest

from encfs.container.channel import error_message, parse_error, receive, send
from encfs.container.spec import (
    DEFAULT_PATH,
    Bind,
    Requests,
    is_fit_target,
    make_spec,
    parse_bind,
    parse_spec,
    parse_variable,
    stop_signal,
)
from encfs.container.users import Account, find_account
from encfs.errors import FormatError, MountError, NotFoundError, UsageError, WrongKeyError
from encfs.image.config import ImageConfig, parse_image_config
from tests.support.image_artifacts import image_config

PASSWD = (
    "root:x:0:0:root:/root:/bin/sh\nbroken\napp:x:1000:1001::/home/app:\n5:x:77:78::/five:\nhuge:x:99999999999:0::/:\n"
)
GROUP = "root:x:0:\nwheel:x:10:root,app\napp:x:1001:\nvideo:x:44:app\nodd:x:y:app\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Account(0, 0, (10,), "/root")),
        ("root", Account(0, 0, (10,), "/root")),
        ("app", Account(1000, 1001, (10, 44), "/home/app")),
        ("1000", Account(1000, 1001, (10, 44), "/home/app")),
        ("app:video", Account(1000, 44, (), "/home/app")),
        ("app:5", Account(1000, 5, (), "/home/app")),
        ("1234", Account(1234, 0, (), "/")),
        ("1234:wheel", Account(1234, 10, (), "/")),
        # A name that looks like a number is a name.
        ("5", Account(77, 78, (), "/five")),
        (":video", Account(0, 44, (), "/root")),
    ],
)
def test_users_are_those_of_the_image(text: str, expected: Account) -> None:
    assert find_account(text, PASSWD, GROUP) == expected


def test_users_without_files() -> None:
    assert find_account("", "", "") == Account(0, 0, (), "/")
    assert find_account("7:8", "", "") == Account(7, 8, (), "/")


@pytest.mark.parametrize("text", ["nobody", "app:nogroup", "huge"])
def test_names_that_are_not_there(text: str) -> None:
    with pytest.raises(NotFoundError, match="the image knows no"):
        find_account(text, PASSWD, GROUP)


@pytest.mark.parametrize("text", ["4294967295", "0:99999999999999999999"])
def test_numbers_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="no user or group"):
        find_account(text, PASSWD, GROUP)


def config(**members: object) -> ImageConfig:
    return parse_image_config(image_config(1, **members))


@pytest.mark.parametrize(
    ("entrypoint", "command", "requests", "expected"),
    [
        (["/e"], ["c", "d"], Requests(), ("/e", "c", "d")),
        (["/e"], ["c", "d"], Requests(command=("x",)), ("/e", "x")),
        ([], ["c"], Requests(), ("c",)),
        (["/e"], ["c"], Requests(entrypoint=("/n",)), ("/n",)),
        (["/e"], ["c"], Requests(entrypoint=(), command=("x", "y")), ("x", "y")),
    ],
)
def test_entry_point_and_command(
    entrypoint: list[str], command: list[str], requests: Requests, expected: tuple[str, ...]
) -> None:
    spec = make_spec(config(Entrypoint=entrypoint, Cmd=command), requests, parts=1, backend="fuse")
    assert spec.arguments == expected


def test_nothing_to_run() -> None:
    for requests in (Requests(), Requests(entrypoint=())):
        with pytest.raises(UsageError, match="no command"):
            make_spec(config(), requests, parts=1, backend="fuse")


def test_the_environment_is_the_images_and_nothing_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENCFS_SECRET", "not for the container")
    image = config(Cmd=["x"], Env=["A=1", "B=2"])
    spec = make_spec(image, Requests(environment=(("B", "3"),)), parts=1, backend="fuse")
    assert {name: value for name, value in spec.environment.items() if name not in {"TERM", "HOSTNAME"}} == {
        "PATH": DEFAULT_PATH,
        "A": "1",
        "B": "3",
    }
    assert "B" not in repr(spec) or "'3'" not in repr(spec)
    assert parse_spec(spec.to_json()) == spec


def test_binds_survive_the_way_to_the_other_process() -> None:
    requests = Requests(binds=(Bind("/a", "/b", True),), tmpfs=("/t",), read_only=True, host_files=False)
    spec = make_spec(config(Cmd=["x"], WorkingDir="/w"), requests, parts=3, backend="erofs")
    assert parse_spec(spec.to_json()) == spec
    assert (spec.binds, spec.working_directory) == ((Bind("/a", "/b", True),), "/w")


def test_hostile_configs_are_refused() -> None:
    for members in ({"Cmd": ["a\0b"]}, {"Cmd": ["x"], "Env": ["A=\0"]}):
        with pytest.raises(FormatError, match="NUL"):
            make_spec(config(**members), Requests(), parts=1, backend="fuse")
    with pytest.raises(UsageError, match="not absolute"):
        make_spec(config(Cmd=["x"]), Requests(working_directory="w"), parts=1, backend="fuse")


@pytest.mark.parametrize(
    ("text", "number"), [("", signal.SIGTERM), ("SIGQUIT", signal.SIGQUIT), ("INT", signal.SIGINT), ("10", 10)]
)
def test_stop_signals(text: str, number: int) -> None:
    assert stop_signal(config(StopSignal=text)) == number


@pytest.mark.parametrize("text", ["SIGNOPE", "0", "99", "_DFL", "-1"])
def test_stop_signals_that_are_none(text: str) -> None:
    with pytest.raises(FormatError, match="StopSignal"):
        stop_signal(config(StopSignal=text))


def test_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "value=1")
    assert parse_variable("HERE") == ("HERE", "value=1")
    assert parse_variable("A=b=c") == ("A", "b=c")
    assert parse_bind("/a:/b:ro") == Bind("/a", "/b", True)
    assert parse_bind("/a:/b") == Bind("/a", "/b")
    for wrong in ("NOT_HERE_AT_ALL", "", "=x"):
        with pytest.raises(UsageError):
            parse_variable(wrong)
    for wrong in ("/a", "a:/b", "/a:b", "/a:/", "/a:/b:rx", "/a:/b/../c", "/a://b", ":/b"):
        with pytest.raises(UsageError):
            parse_bind(wrong)
    assert [is_fit_target(path) for path in ("/t", "/t/", "/", "t", "/a/../b")] == [True, True, False, False, False]


def test_messages_with_and_without_a_descriptor() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        reading, writing = os.pipe()
        send(ours, b"fuse", writing)
        os.close(writing)
        content, descriptor = receive(theirs)
        assert content == b"fuse"
        assert descriptor is not None
        assert not os.get_inheritable(descriptor)
        os.write(descriptor, b"x")
        os.close(descriptor)
        assert os.read(reading, 2) == b"x"
        os.close(reading)
        send(ours, error_message(WrongKeyError("not this one", hint="another")))
        error = parse_error(receive(theirs)[0])
        assert isinstance(error, WrongKeyError)
        assert (error.message, error.hint) == ("not this one", "another")
        ours.sendall(b"\xff\xff\xff\xff")
        with pytest.raises(MountError, match="too long"):
            receive(theirs)
        ours.sendall(b"\x05\0\0\0abc")
        ours.close()
        with pytest.raises(MountError, match="in the middle"):
            receive(theirs)
        assert receive(theirs) == (b"", None)


@pytest.mark.parametrize("name", ["ClassVar", "annotations", "error_named", "__name__", "None", None])
def test_an_error_of_no_kind_of_ours_is_a_mount_error(name: str | None) -> None:
    message = json.dumps({"error": name, "message": "odd", "hint": None}).encode()
    assert isinstance(parse_error(message), MountError)
