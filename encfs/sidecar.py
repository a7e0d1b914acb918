"""What a sidecar may be asked for: its own, measured configuration, and volume attributes that only narrow it.

Attributes come from a pod's manifest through the node, both of which may be hostile. They choose among what the
configuration allows; an id, a pin, a key or a reference that is not in it is refused, and a floor can only rise.
Not here: the descriptor (`encfs.mount.handover`).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from encfs.errors import NotFoundError, PinError, StorageError, TrustError, UsageError, WrongIdError
from encfs.keys.files import load_trusted_key
from encfs.strictjson import MAX_INTEGER, show_name
from encfs.trust import TrustPolicy, parse_pin

_MAX_SIZE = 64 << 10
#: Attributes of a volume that are ours. Those of Kubernetes itself (`csi.storage.k8s.io/…`) are for the node.
ATTRIBUTES = frozenset({"reference", "key", "id", "minVersion", "pin", "socketVolume"})
_KUBERNETES = "csi.storage.k8s.io/"


@dataclass(frozen=True, slots=True, kw_only=True)
class SidecarConfig:
    """The configuration file (TOML), member by member. `references` may have `*` in them."""

    socket: str
    references: tuple[str, ...]
    keys: tuple[str, ...]
    pins: tuple[str, ...] = ()
    trusted_keys: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()
    min_version: int | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """What is going to be mounted, and accepted."""

    reference: str
    keys: tuple[str, ...]
    trust: TrustPolicy = field(repr=False)


def load_config(path: str) -> SidecarConfig:
    """Raises: UsageError for anything that is not as it should be, NotFoundError, StorageError."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MAX_SIZE + 1)
        if len(content) > _MAX_SIZE:
            raise UsageError(f"{path} is larger than {_MAX_SIZE} bytes")
        document = tomllib.loads(content.decode())
    except FileNotFoundError:
        raise NotFoundError(f"the sidecar's configuration {path} does not exist") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is no TOML: {error}") from None
    return _parse(document, path)


def _parse(document: Mapping[str, object], path: str) -> SidecarConfig:
    known = {item.name for item in fields(SidecarConfig)}
    if unknown := sorted(document.keys() - known):
        raise UsageError(
            f"{path} has an unknown member {show_name(unknown[0])}", hint=f"known: {', '.join(sorted(known))}"
        )
    if missing := sorted({"socket", "references", "keys"} - document.keys()):
        raise UsageError(f"{path} lacks {missing[0]}")
    values: dict[str, object] = {}
    for name, value in document.items():
        if name == "socket":
            fits = isinstance(value, str) and value.startswith("/")
        elif name == "min_version":
            fits = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_INTEGER
        else:
            fits = isinstance(value, list) and bool(value) and all(isinstance(one, str) and one for one in value)
        if not fits:
            raise UsageError(f"{path}: {name} is of a wrong kind")
        values[name] = tuple(value) if isinstance(value, list) else value
    config = SidecarConfig(**values)  # type: ignore[arg-type]
    for pin in config.pins:
        parse_pin(pin)
    if not config.pins and not (config.trusted_keys and config.ids):
        raise UsageError(f"{path} trusts nothing", hint="give pins, or trusted_keys and ids")
    return config


def narrow(config: SidecarConfig, attributes: Mapping[str, str]) -> Request:
    """What the attributes ask for, within what the configuration allows.

    Raises: UsageError for unknown or malformed attributes and for a choice that is left open; TrustError, PinError,
    WrongIdError for what is not allowed.
    """
    asked = check_attributes(attributes)
    references = [one for one in config.references if "*" not in one]
    reference = asked.get("reference") or _only(references, "reference")
    if not any(_fits(reference, pattern) for pattern in config.references):
        raise TrustError(f"the reference {show_name(reference)} is none that the configuration allows")
    keys = config.keys
    if "key" in asked:
        if asked["key"] not in config.keys:
            raise TrustError("the key that the volume asks for is none that the configuration allows")
        keys = (asked["key"],)
    pin = asked.get("pin") or (_only(config.pins, "pin") if config.pins else None)
    if config.pins and pin not in config.pins:
        raise PinError("the pin that the volume asks for is none that the configuration allows")
    artifact_id = asked.get("id") or (_only(config.ids, "id") if config.ids else None)
    if config.ids and artifact_id not in config.ids:
        raise WrongIdError(f"the id {show_name(str(artifact_id))} is none that the configuration allows")
    floors = [one for one in (config.min_version, _floor(asked)) if one is not None]
    return Request(
        reference,
        keys,
        TrustPolicy(
            pin=pin,
            keys=tuple(load_trusted_key(path) for path in config.trusted_keys),
            artifact_id=artifact_id,
            min_version=max(floors) if floors else None,
        ),
    )


def check_attributes(attributes: Mapping[str, str]) -> dict[str, str]:
    """Ours among a volume's attributes. Raises: UsageError for those that nobody knows."""
    asked = {name: value for name, value in attributes.items() if not name.startswith(_KUBERNETES)}
    if unknown := sorted(asked.keys() - ATTRIBUTES):
        raise UsageError(
            f"unknown volume attribute {show_name(unknown[0])}", hint=f"known: {', '.join(sorted(ATTRIBUTES))}"
        )
    _floor(asked)
    return asked


def _floor(asked: Mapping[str, str]) -> int | None:
    text = asked.get("minVersion")
    if text is None:
        return None
    if not text.isascii() or not text.isdecimal() or len(text) > 16 or int(text) > MAX_INTEGER:
        raise UsageError(f"the volume attribute minVersion {show_name(text)} is no version")
    return int(text)


def _fits(reference: str, pattern: str) -> bool:
    """`*` stands for anything, and nothing else for anything but itself: `[` begins the address of a host, say."""
    return re.fullmatch(".*".join(re.escape(part) for part in pattern.split("*")), reference, re.DOTALL) is not None


def _only(values: tuple[str, ...] | list[str], what: str) -> str:
    if len(values) != 1:
        raise UsageError(f"the configuration allows more than one {what}", hint="name one in the volume's attributes")
    return values[0]
