"""References to artifacts, images, archives and directories, written as skopeo writes them (containers-transports(5)).

    oci:PATH[:TAG]            an OCI image layout directory; also oci:PATH@sha256:<64 hex>
    docker://[HOST[:PORT]/]REPOSITORY[:TAG][@sha256:<64 hex>]    a registry
    oci-archive:FILE[:TAG]    an OCI image layout in an uncompressed tar archive
    docker-archive:FILE       what `docker save` writes
    PATH                      a plain file or directory

Parsing only: nothing is looked up. Whether a transport fits the use is for the caller to say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from encfs.encoding import parse_digest
from encfs.errors import FormatError, UsageError
from encfs.strictjson import show_name

Transport = Literal["oci", "oci-archive", "docker", "docker-archive", "path"]

#: Where a `docker://` reference without a host leads, and the namespace of its official images.
DEFAULT_REGISTRY = "docker.io"
DEFAULT_NAMESPACE = "library"
#: The tag meant by a `docker://` reference that names neither tag nor digest.
DEFAULT_TAG = "latest"

_MAX_LENGTH = 4096  # PATH_MAX; registry references are far shorter
_MAX_REPOSITORY = 255  # distribution-spec, "Pulling manifests": clients should not exceed it

# distribution-spec, "Pulling manifests"
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*", re.ASCII)
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}", re.ASCII)
# image-spec, annotations.md, grammar of org.opencontainers.image.ref.name
_LAYOUT_TAG = re.compile(
    r"[A-Za-z0-9]+(?:(?:[-._:@+]|--)[A-Za-z0-9]+)*(?:/[A-Za-z0-9]+(?:(?:[-._:@+]|--)[A-Za-z0-9]+)*)*", re.ASCII
)
_MAX_LAYOUT_TAG = 255
_HOST = re.compile(
    r"(?:\[[0-9a-fA-F:.]{2,45}\]|[a-zA-Z0-9](?:[a-zA-Z0-9_-]*[a-zA-Z0-9])?(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9_-]*[a-zA-Z0-9])?)*)"
    r"(?::([0-9]{1,5}))?",
    re.ASCII,
)

# Prefixes of transports that skopeo knows and that are not served here; a path of that name is written with "./".
_FOREIGN = ("containers-storage:", "dir:", "docker-daemon:", "ostree:", "sif:", "tarball:")


@dataclass(frozen=True, slots=True)
class Reference:
    """A parsed reference. Fields that do not apply to the transport are empty or None; `str()` gives the text back."""

    transport: Transport
    path: str = ""
    registry: str = ""
    repository: str = ""
    tag: str | None = None
    digest: str | None = None

    def __str__(self) -> str:
        if self.transport == "path":
            return self.path
        place = f"//{self.registry}/{self.repository}" if self.transport == "docker" else self.path
        tag = f":{self.tag}" if self.tag is not None else ""
        digest = f"@{self.digest}" if self.digest is not None else ""
        return f"{self.transport}:{place}{tag}{digest}"


def parse_reference(text: str) -> Reference:
    """Parse a reference from a command line or configuration.

    A `docker://` reference without a host gets `docker.io`, and one without a namespace there gets `library/`, as
    skopeo does. Raises: UsageError.
    """
    if not text:
        raise UsageError("an empty reference", hint="write oci:PATH[:TAG], docker://HOST/REPOSITORY[:TAG] or a path")
    if len(text) > _MAX_LENGTH or "\0" in text:
        raise UsageError(f"{show_name(text)} is not a reference: too long, or with a NUL character")
    if text.startswith("docker://"):
        return _parse_docker(text, text.removeprefix("docker://"))
    if text.startswith("oci:"):
        return _parse_layout(text, "oci", text.removeprefix("oci:"))
    if text.startswith("oci-archive:"):
        return _parse_layout(text, "oci-archive", text.removeprefix("oci-archive:"))
    if text.startswith("docker-archive:"):
        path = text.removeprefix("docker-archive:")
        if not path or ":" in path:
            raise UsageError(f"{show_name(text)} is not of the form docker-archive:FILE, with no colon in FILE")
        return Reference("docker-archive", path=path)
    if text.startswith("docker:"):
        raise UsageError(f"{show_name(text)} lacks the slashes", hint="write docker://HOST/REPOSITORY[:TAG]")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise UsageError(f"{show_name(text)} is a URL", hint="registries are written docker://HOST/REPOSITORY[:TAG]")
    if text.startswith(_FOREIGN):
        raise UsageError(
            f"{show_name(text)} uses a transport that is not supported here",
            hint="copy it to an oci: layout with skopeo first; a path of that name is written with ./ before it",
        )
    return Reference("path", path=text)


def is_host(text: str) -> bool:
    """Whether a text is `HOST[:PORT]` as references have it."""
    host = _HOST.fullmatch(text)
    return host is not None and (host.group(1) is None or 0 < int(host.group(1)) < 65536)


def check_layout_tag(tag: str) -> str:
    """`tag` itself if it may name an entry of an OCI layout. Raises: UsageError."""
    if len(tag) > _MAX_LAYOUT_TAG or not _LAYOUT_TAG.fullmatch(tag):
        raise UsageError(f"{show_name(tag)} is not a tag", hint="use letters, digits and single - . _ between them")
    return tag


def check_registry_tag(tag: str) -> str:
    """`tag` itself if registries accept it as a tag. Raises: UsageError."""
    if not _TAG.fullmatch(tag):
        raise UsageError(f"{show_name(tag)} is not a tag", hint="use at most 128 letters, digits and . _ -")
    return tag


def _split_digest(text: str, rest: str) -> tuple[str, str | None]:
    """Take a trailing `@algorithm:hex` off; any other `@` belongs to the path or tag."""
    head, mark, digest = rest.rpartition("@")
    if not mark or not re.match(r"(?:sha(?:256|384|512)|blake3):", digest):
        return rest, None
    try:
        parse_digest(digest)
    except FormatError:
        raise UsageError(
            f"{show_name(text)} has a malformed digest", hint="write @sha256: and 64 lower-case hexadecimal digits"
        ) from None
    return head, digest


def _parse_layout(text: str, transport: Literal["oci", "oci-archive"], rest: str) -> Reference:
    rest, digest = _split_digest(text, rest)
    # The first colon ends the path, as in skopeo: the path of a layout or archive cannot have one.
    path, mark, tag = rest.partition(":")
    if not path:
        what = "directory" if transport == "oci" else "file"
        raise UsageError(f"{show_name(text)} names no {what}", hint=f"write {transport}:PATH[:TAG]")
    return Reference(transport, path=path, tag=check_layout_tag(tag) if mark else None, digest=digest)


def _parse_docker(text: str, rest: str) -> Reference:
    rest, digest = _split_digest(text, rest)
    first, slash, remainder = rest.partition("/")
    if slash and (first == "localhost" or first.lower() != first or any(mark in first for mark in ".:[")):
        registry, name = first, remainder
    else:
        registry, name = DEFAULT_REGISTRY, rest
    name, mark, tag = name.partition(":")
    if registry == DEFAULT_REGISTRY and "/" not in name:
        name = f"{DEFAULT_NAMESPACE}/{name}"
    if not is_host(registry):
        raise UsageError(f"{show_name(text)} has a malformed host", hint="write docker://HOST[:PORT]/REPOSITORY[:TAG]")
    if len(name) > _MAX_REPOSITORY or not _REPOSITORY.fullmatch(name):
        raise UsageError(
            f"{show_name(text)} has a malformed repository name",
            hint="use lower-case letters, digits and . _ - in parts that slashes separate",
        )
    return Reference(
        "docker",
        registry=registry,
        repository=name,
        tag=check_registry_tag(tag) if mark else None,
        digest=digest,
    )
