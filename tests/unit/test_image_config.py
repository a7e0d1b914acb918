"""Configs of container images: what is read of them, and every malformed member refused without showing its value."""

from __future__ import annotations

import json

import pytest

from encfs.errors import FormatError
from encfs.image.config import MAX_CONFIG_SIZE, parse_image_config

_DIFF_ID = "sha256:" + "ab" * 32


def _config(config: object = None, **members: object) -> bytes:
    document = {
        "os": "linux",
        "architecture": "amd64",
        "config": {} if config is None else config,
        "rootfs": {"type": "layers", "diff_ids": [_DIFF_ID]},
    } | members
    return json.dumps(document).encode()


def test_everything_that_a_runtime_needs_is_read() -> None:
    parsed = parse_image_config(
        _config(
            {
                "Entrypoint": ["/bin/tool", "-x"],
                "Cmd": ["serve"],
                "Env": ["PATH=/bin", "EMPTY=", "URL=a=b"],
                "WorkingDir": "/srv",
                "User": "app:www",
                "StopSignal": "SIGQUIT",
                "Labels": {"a": "b"},
            },
            variant="v8",
            history=[],
        )
    )
    assert parsed.entrypoint == ("/bin/tool", "-x")
    assert parsed.command == ("serve",)
    assert parsed.environment == (("PATH", "/bin"), ("EMPTY", ""), ("URL", "a=b"))
    assert (parsed.working_directory, parsed.user, parsed.stop_signal) == ("/srv", "app:www", "SIGQUIT")
    assert (parsed.os, parsed.architecture, parsed.variant) == ("linux", "amd64", "v8")
    assert parsed.diff_ids == (_DIFF_ID,)


def test_null_and_absent_members_are_empty() -> None:
    parsed = parse_image_config(_config({"Entrypoint": None, "Cmd": None, "Env": None, "User": None}))
    assert parsed.entrypoint == parsed.command == parsed.environment == ()
    assert parsed.user == ""
    assert parse_image_config(_config(config=None)) == parse_image_config(_config())


def test_the_environment_is_in_no_repr() -> None:
    assert "hunter2" not in repr(parse_image_config(_config({"Env": ["TOKEN=hunter2"]})))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (_config({"Env": ["hunter2"]}), "Env"),
        (_config({"Env": ["=hunter2"]}), "Env"),
        (_config({"Env": {"A": "hunter2"}}), "Env"),
        (_config({"Cmd": "hunter2"}), "Cmd"),
        (_config({"Entrypoint": ["x", 1]}), "Entrypoint"),
        (_config({"Cmd": ["x"] * 4097}), "Cmd"),
        (_config({"WorkingDir": "hunter2"}), "WorkingDir"),
        (_config({"User": 0}), "User"),
        (_config(["hunter2"]), "config"),
        (_config(rootfs=None), "rootfs"),
        (_config(rootfs={"type": "tree", "diff_ids": []}), "rootfs"),
        (_config(rootfs={"type": "layers", "diff_ids": ["sha256:AB"]}), "rootfs"),
        (_config(os=""), "os"),
        (_config(architecture=None), "architecture"),
        (b"[]", "object"),
        (b"{", "JSON"),
        (b'{"os": "linux", "os": "plan9"}', "repeats"),
        (b" " * (MAX_CONFIG_SIZE + 1), "more than"),
    ],
)
def test_malformed_configs_are_refused(content: bytes, said: str) -> None:
    with pytest.raises(FormatError, match=said) as caught:
        parse_image_config(content)
    assert "hunter2" not in str(caught.value)
