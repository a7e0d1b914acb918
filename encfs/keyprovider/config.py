"""Which key providers there are: the file that OCICRYPT_KEYPROVIDER_CONFIG names, as ocicrypt has it.

    {"key-providers": {NAME: {"cmd": {"path": PATH, "args": [ARGUMENT, …]}}}}
    {"key-providers": {NAME: {"grpc": "HOST:PORT" or "unix:PATH", "grpc-tls"?: {"root-ca-file", "cert-file", "key-file",
                                                                                "server-name"}}}}
    {"key-providers": {NAME: {"ttrpc": "unix://PATH"}}}

There is no default place. Members that are not known are passed over, since each implementation has its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from encfs.errors import FormatError, KeyProviderError
from encfs.strictjson import loads_object, show_name

ENVIRONMENT = "OCICRYPT_KEYPROVIDER_CONFIG"

_MAX_SIZE = 64 << 10
_MAX_ARGUMENTS = 256
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
_UNIX = re.compile(r"unix:(?://)?(/[^\0]{1,100})")
_HINT = f'{ENVIRONMENT} names a file such as {{"key-providers": {{"NAME": {{"cmd": {{"path": "/usr/bin/PROGRAM"}}}}}}}}'


@dataclass(frozen=True, slots=True)
class Command:
    """A program that is run for every request."""

    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files; `authorities` None: the system's."""

    authorities: str | None
    certificate: str | None
    key: str | None
    server_name: str | None


@dataclass(frozen=True, slots=True)
class GrpcServer:
    """`address` as gRPC writes it: HOST:PORT or unix:PATH."""

    address: str
    tls: TlsFiles | None


@dataclass(frozen=True, slots=True)
class TtrpcServer:
    """A unix socket."""

    path: str


Service = Command | GrpcServer | TtrpcServer


def is_name(text: str) -> bool:
    """Whether it can name a provider: it becomes the end of an annotation's name."""
    return _NAME.fullmatch(text) is not None


def find_service(name: str) -> Service:
    """The provider of that name in the configuration. Raises: KeyProviderError."""
    path = os.environ.get(ENVIRONMENT)
    if not path:
        raise KeyProviderError(f"the key provider {name} is not configured: {ENVIRONMENT} is not set", hint=_HINT)
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_SIZE + 1)
    except OSError as error:
        raise KeyProviderError(f"the configuration of key providers {path}: {error.strerror}", hint=_HINT) from None
    try:
        services = parse_config(content)
    except FormatError as error:
        raise KeyProviderError(f"{path}: {error.message}", hint=_HINT) from None
    if name not in services:
        known = ", ".join(sorted(services)) or "none"
        raise KeyProviderError(f"{path} has no usable key provider {name}; it has {known}")
    return services[name]


def unavailable() -> str | None:
    """Why no provider can be asked on this machine."""
    path = os.environ.get(ENVIRONMENT)
    if not path:
        return f"{ENVIRONMENT} is not set"
    return None if Path(path).is_file() else f"{ENVIRONMENT} names {path}, which is not there"


def parse_config(content: bytes) -> Mapping[str, Service]:
    """The providers that can be asked, by name. Raises: FormatError."""
    document = loads_object(content, limit=_MAX_SIZE, what="the configuration of key providers")
    providers = document.get("key-providers")
    if not isinstance(providers, dict):
        raise FormatError("the configuration has no object key-providers")
    services: dict[str, Service] = {}
    for name, value in providers.items():
        if not is_name(name):
            raise FormatError(f"{show_name(name)} cannot be the name of a key provider")
        if not isinstance(value, dict):
            raise FormatError(f"the key provider {name} is no JSON object")
        service = _service(name, value)
        if service is not None:
            services[name] = service
    return services


def _service(name: str, value: Mapping[str, object]) -> Service | None:
    """None for one that only other implementations can ask."""
    if value.get("cmd") is not None:
        return _command(name, value["cmd"])
    if value.get("grpc") is not None:
        return _grpc(name, value["grpc"], value.get("grpc-tls"))
    if value.get("ttrpc") is not None:
        match = _UNIX.fullmatch(str(value["ttrpc"]))
        if match is None:
            raise FormatError(f"the ttrpc address of the key provider {name} is not of the form unix:///PATH")
        return TtrpcServer(match[1])
    return None


def _command(name: str, value: object) -> Command:
    path = value.get("path") if isinstance(value, dict) else None
    arguments = (value.get("args") or []) if isinstance(value, dict) else []
    if not isinstance(path, str) or not path or "\0" in path:
        raise FormatError(f"the command of the key provider {name} has no path")
    if not isinstance(arguments, list) or len(arguments) > _MAX_ARGUMENTS:
        raise FormatError(f"the arguments of the key provider {name} are no list")
    if not all(isinstance(word, str) for word in arguments):
        raise FormatError(f"the arguments of the key provider {name} are not texts")
    return Command((path, *arguments))


def _grpc(name: str, address: object, tls: object) -> GrpcServer:
    if not isinstance(address, str) or not address.isascii() or not address.isprintable() or not address:
        raise FormatError(f"the gRPC address of the key provider {name} is malformed")
    socket = _UNIX.fullmatch(address)
    address = f"unix:{socket[1]}" if socket is not None else address
    if tls is None:
        return GrpcServer(address, None)
    if not isinstance(tls, dict):
        raise FormatError(f"grpc-tls of the key provider {name} is no JSON object")
    if tls.get("insecure-skip-verify"):
        raise FormatError(f"the key provider {name} is to be asked without verifying who it is, which is not supported")
    names = ("root-ca-file", "cert-file", "key-file", "server-name")
    files = [tls.get(member) or None for member in names]
    if not all(file is None or isinstance(file, str) for file in files):
        raise FormatError(f"grpc-tls of the key provider {name} holds something other than texts")
    return GrpcServer(address, TlsFiles(*files))
