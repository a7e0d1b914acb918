"""The config of a container image (OCI image-spec v1.1, config.md; Docker's is the same in these members): strict.

Members that are not known are ignored, as the specification wants. Not here: what is done with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from encfs.errors import FormatError
from encfs.strictjson import loads_object

#: Bytes of a config at most, as many as a secret payload can carry of one.
MAX_CONFIG_SIZE = 512 << 10
#: Members of a list, such as arguments or variables.
_MAX_ITEMS = 4096
_WHAT = "the image's config"
_DIFF_ID = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """What a runtime needs of an image. `environment` may hold secrets and is in no `repr`.

    `entrypoint` and `command` are empty where the image has none; `user` is as the image spells it
    (`USER[:GROUP]`, names or numbers), `working_directory` absolute or empty; `diff_ids` lowest layer first.
    """

    os: str
    architecture: str
    variant: str
    entrypoint: tuple[str, ...]
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = field(repr=False)
    working_directory: str
    user: str
    stop_signal: str
    diff_ids: tuple[str, ...]


def parse_image_config(content: bytes) -> ImageConfig:
    """Raises: FormatError naming the member that is malformed, never its value."""
    document = loads_object(content, limit=MAX_CONFIG_SIZE, what=_WHAT)
    config = _mapping(document, "config", optional=True)
    rootfs = _mapping(document, "rootfs", optional=False)
    diff_ids = _strings(rootfs, "diff_ids")
    if rootfs.get("type") != "layers" or not all(_DIFF_ID.fullmatch(one) for one in diff_ids):
        raise FormatError(f"{_WHAT}: rootfs is malformed")
    system, architecture = _string(document, "os"), _string(document, "architecture")
    if not system or not architecture:
        raise FormatError(f"{_WHAT} names no os or no architecture")
    directory = _string(config, "WorkingDir")
    if directory and not directory.startswith("/"):
        raise FormatError(f"{_WHAT}: WorkingDir is not absolute")
    return ImageConfig(
        os=system,
        architecture=architecture,
        variant=_string(document, "variant"),
        entrypoint=_strings(config, "Entrypoint"),
        command=_strings(config, "Cmd"),
        environment=tuple(_variable(one) for one in _strings(config, "Env")),
        working_directory=directory,
        user=_string(config, "User"),
        stop_signal=_string(config, "StopSignal"),
        diff_ids=diff_ids,
    )


def _mapping(document: Mapping[str, object], name: str, *, optional: bool) -> Mapping[str, object]:
    value = document.get(name)
    if value is None and optional:
        return {}
    if not isinstance(value, dict):
        raise FormatError(f"{_WHAT}: {name} is not an object")
    return value


def _string(document: Mapping[str, object], name: str) -> str:
    value = document.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise FormatError(f"{_WHAT}: {name} is not a string")
    return value


def _strings(document: Mapping[str, object], name: str) -> tuple[str, ...]:
    value = document.get(name)
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > _MAX_ITEMS or not all(isinstance(one, str) for one in value):
        raise FormatError(f"{_WHAT}: {name} is not a list of at most {_MAX_ITEMS} strings")
    return tuple(value)


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise FormatError(f"{_WHAT}: Env holds something that is not NAME=VALUE")
    return name, value
