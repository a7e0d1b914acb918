"""Parts that commands of both programs are made of: the options for keys and trust, opening an artifact, listing it.

Everything heavy is imported by the functions that need it, so that help and completion stay quick.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from encfs.console.commandline import size_option, value_option
from encfs.console.terminal import Terminal
from encfs.errors import UsageError
from encfs.tracing import span

if TYPE_CHECKING:
    from encfs.artifact import Artifact
    from encfs.image.artifact import Served
    from encfs.image.manifest import Platform
    from encfs.keys.providers import KeyProvider
    from encfs.oci.blobs import BlobSource
    from encfs.oci.options import StoreOptions
    from encfs.trust import Origin, TrustPolicy

ReferenceArgument = Annotated[
    str,
    typer.Argument(
        metavar="REF",
        help="The artifact: oci:PATH[:TAG], oci-archive:FILE[:TAG] or docker://HOST/REPOSITORY[:TAG]; or @sha256:….",
        show_default=False,
    ),
]
PathArgument = Annotated[
    str, typer.Argument(metavar="PATH", help="A path inside the artifact; its root if left out.", show_default=False)
]
TargetArgument = Annotated[
    str, typer.Argument(metavar="DIR", help="A directory that does not exist yet, or is empty.", show_default=False)
]
PlatformOption = Annotated[
    str | None,
    value_option(
        "--platform",
        metavar="OS/ARCH[/VARIANT]",
        help="What the container image must be for, and what is chosen in an index.  [default: this machine's]",
    ),
]
IndexPlatformOption = Annotated[
    str | None,
    value_option(
        "--platform",
        metavar="OS/ARCH[/VARIANT]",
        help="Of an image index only the artifact for this platform.  [default: all of them]",
    ),
]
BackendOption = Annotated[
    Literal["fuse", "erofs", "auto"],
    typer.Option(
        "--backend",
        metavar="fuse|erofs|auto",
        help="Who reads the images: the daemon, or the kernel's EROFS (root only); auto: the kernel where it can.",
        show_choices=False,
    ),
]
MemoryOption = Annotated[
    int | None, size_option("--memory", help="Plaintext that is kept, beside the kernel's page cache.")
]
RecursiveOption = Annotated[bool, typer.Option("-R", "--recursive", help="Also everything in its subdirectories.")]
LongOption = Annotated[bool, typer.Option("-l", "--long", help="With mode, owner, size, time and link target.")]


@dataclass(frozen=True, slots=True)
class KeyOptions:
    """The keys that may open an artifact."""

    keys: Annotated[
        list[str] | None,
        value_option(
            "-k",
            "--key",
            metavar="KEYURI",
            help="A key that opens the artifact: a key file, file:PATH, env:NAME, passphrase:, … Repeatable.",
        ),
    ] = None

    def check_repeatable(self) -> None:
        """Raises UsageError where a key can be had only once: a daemon that is restarted asks for it again."""
        for uri in self.keys or ():
            scheme, _, rest = uri.partition(":")
            if scheme == "env" or (scheme == "passphrase" and not rest.startswith(("file=", "command="))):
                raise UsageError(
                    f"a restarted daemon cannot get the key of {scheme}: again",
                    hint="name the key by a file or service",
                )

    @contextmanager
    def providers(self) -> Iterator[list[KeyProvider]]:
        """The providers of all keys, closed (and their secrets wiped) at the end. Raises: KeyFileError."""
        from encfs.hardening import protect_keys
        from encfs.keys.providers import provider_from_uri

        if self.keys:
            protect_keys()
        with ExitStack() as stack:
            providers = [provider_from_uri(uri) for uri in self.keys or ()]
            for provider in providers:
                stack.enter_context(closing(provider))
            yield providers


@dataclass(frozen=True, slots=True)
class TrustOptions:
    """What the reader accepts as the artifact's origin (`encfs.trust`)."""

    pin: Annotated[
        str | None,
        value_option("--pin", metavar="DIGEST", help="Accept exactly this content digest."),
    ] = None
    trust: Annotated[
        list[str] | None,
        value_option(
            "--trust",
            metavar="KEY",
            help="Accept what this public key (JWK or PEM file) signed; needs --id. Repeatable.",
        ),
    ] = None
    artifact_id: Annotated[
        str | None,
        value_option("--id", metavar="NAME", help="The line of releases that is expected."),
    ] = None
    min_version: Annotated[
        int | None,
        value_option("--min-version", metavar="N", help="Refuse versions below this one."),
    ] = None
    allow_unsigned: Annotated[
        bool, typer.Option("--allow-unsigned", help="Accept an artifact whose origin nothing proves.")
    ] = False

    @property
    def given(self) -> bool:
        """Whether any of them was given."""
        return self != TrustOptions()

    def policy(self) -> TrustPolicy:
        """Raises: UsageError, KeyFileError, NotFoundError."""
        from encfs.keys.files import load_trusted_key
        from encfs.trust import TrustPolicy

        return TrustPolicy(
            pin=self.pin,
            keys=tuple(load_trusted_key(path) for path in self.trust or ()),
            artifact_id=self.artifact_id,
            min_version=self.min_version,
            allow_unsigned=self.allow_unsigned,
        )


@dataclass(frozen=True, slots=True)
class RegistryOptions:
    """How the registry of a docker:// reference is reached; a layout needs none of it."""

    plain_http: Annotated[
        bool, typer.Option("--plain-http", help="Talk to the registry without TLS; loopback is no exception.")
    ] = False
    ca_file: Annotated[
        str | None,
        value_option("--ca-file", metavar="FILE", help="Trust these authorities (PEM) for TLS, too."),
    ] = None
    cert_file: Annotated[
        str | None,
        value_option("--cert-file", metavar="FILE", help="Client certificate (PEM) for TLS."),
    ] = None
    key_file: Annotated[
        str | None,
        value_option("--key-file", metavar="FILE", help="Its key (PEM), where --cert-file has none."),
    ] = None
    io_timeout: Annotated[
        float | None,
        typer.Option(
            "--io-timeout",
            metavar="SECONDS",
            min=0.1,
            max=86400,
            help="How long to go on trying while nothing arrives.  [default: 60]",
            show_default=False,
        ),
    ] = None
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency",
            metavar="N",
            min=1,
            max=64,
            help="Requests at the same time.  [default: 4]",
            show_default=False,
        ),
    ] = None

    def store(self) -> StoreOptions:
        """What `encfs.oci.store` takes. Raises: UsageError."""
        from encfs.oci.options import DEFAULT_CONCURRENCY, DEFAULT_IO_TIMEOUT, StoreOptions

        if self.key_file is not None and self.cert_file is None:
            raise UsageError("--key-file is given without --cert-file", hint="name the certificate that it belongs to")
        return StoreOptions(
            ca_file=self.ca_file,
            cert_file=self.cert_file,
            key_file=self.key_file,
            plain_http=self.plain_http,
            io_timeout=DEFAULT_IO_TIMEOUT if self.io_timeout is None else self.io_timeout,
            concurrency=DEFAULT_CONCURRENCY if self.concurrency is None else self.concurrency,
        )


@dataclass(frozen=True, slots=True)
class MirrorOptions(RegistryOptions):
    """The same for commands that read whole artifacts, from mirrors of the registry where they can."""

    mirrors: Annotated[
        list[str] | None,
        value_option(
            "--mirror",
            metavar="URL",
            help="Read from this mirror of the registry, HOST[:PORT][/PREFIX], before the registry. Repeatable.",
        ),
    ] = None

    def store(self) -> StoreOptions:
        """Raises: UsageError."""
        return replace(RegistryOptions.store(self), mirrors=tuple(self.mirrors or ()))


@dataclass(frozen=True, slots=True)
class CacheOptions(MirrorOptions):
    """The same for commands that read the content, and keep its ciphertext."""

    cache_dir: Annotated[
        str | None,
        value_option(
            "--cache-dir",
            metavar="DIR",
            help="Where ciphertext from registries is kept.  [default: encfs in the user's cache directory]",
        ),
    ] = None
    cache_size: Annotated[
        int | None, size_option("--cache-size", help="How much of it is kept; 0 for none.", default="16GiB")
    ] = None

    def store(self) -> StoreOptions:
        """Raises: UsageError."""
        from encfs.oci.options import DEFAULT_CACHE_SIZE, default_cache_dir

        size = DEFAULT_CACHE_SIZE if self.cache_size is None else self.cache_size
        directory = self.cache_dir or default_cache_dir()
        return replace(MirrorOptions.store(self), cache_dir=directory if size else None, cache_size=size)

    def without_cache(self) -> MirrorOptions:
        """For what is copied once and kept elsewhere. Raises: UsageError where a cache was asked for."""
        if self.cache_dir is not None or self.cache_size is not None:
            raise UsageError("--cache-dir and --cache-size are for what goes into the cache", hint="leave them out")
        return MirrorOptions(**{item.name: getattr(self, item.name) for item in fields(MirrorOptions)})


@contextmanager
def opened_source(reference: str, registry: RegistryOptions) -> Iterator[BlobSource]:
    """The store of a reference, closed at the end. Raises: UsageError, NotFoundError and others of the store."""
    from encfs.oci.reference import parse_reference
    from encfs.oci.store import open_source

    with closing(open_source(parse_reference(reference), registry.store())) as source:
        yield source


@contextmanager
def opened_artifact(
    terminal: Terminal,
    reference: str,
    keys: KeyOptions,
    trust: TrustOptions | TrustPolicy,
    registry: RegistryOptions,
    *,
    memory: int | None = None,
    platform: str | None = None,
    auxiliary: bool = False,
    meanwhile: str | None = None,
    forking: bool = False,
    served: Served | None = None,
) -> Iterator[Artifact]:
    """An accepted and unwrapped artifact, closed at the end; warns of what its origin leaves open.

    `memory` is the plaintext that each volume may keep (bytes); `platform` chooses in an image index; `auxiliary` opens
    the volumes, too, that only going back to an image needs; `meanwhile` is a module to load while the store is waited
    for; `forking`: no threads are left that would keep the process from going to the background; `served` is what has
    to be gone on with (`choose_served`), whatever the reference names by now. An image that was asked for by its
    platform, or chosen by this machine's, is of that platform: its config says so.
    Raises: as `encfs.artifact.open_artifact`; UnsupportedError for an image of another platform.
    """
    from encfs.artifact import open_artifact
    from encfs.deferred import loaded_meanwhile
    from encfs.format.volume import DEFAULT_CACHE_SIZE
    from encfs.image.artifact import check_image_platform, choose_manifest, choose_served, is_needed
    from encfs.oci.reference import parse_reference

    policy = trust.policy() if isinstance(trust, TrustOptions) else trust
    wanted = chosen_platform(platform)
    with keys.providers() as providers, opened_source(reference, registry) as source, ExitStack() as stack:
        if forking:
            from encfs.lazy import hold_threads

            hold_threads(source)
        with loaded_meanwhile(meanwhile) if meanwhile is not None else nullcontext(), span("artifact.open") as traced:
            # A reference by digest says itself what is meant: whoever hands a mount over has no say in it.
            if served is None or parse_reference(reference).digest is not None:
                document = source.document()
                manifest = choose_manifest(source, document, wanted)
                by_platform, superseded_by = manifest is not document, ""
            else:
                manifest, superseded_by = choose_served(source, wanted, served)
                by_platform = True
            artifact = stack.enter_context(
                open_artifact(
                    source,
                    keys=providers,
                    trust=policy,
                    cache_size=DEFAULT_CACHE_SIZE if memory is None else memory,
                    label=reference,
                    wanted=None if auxiliary else is_needed,
                    manifest=manifest,
                )
            )
            traced["encfs.volumes"] = len(artifact.volumes)
        # An index is signed by nobody: what it says of platforms has to be what the image says.
        if platform is not None or by_platform:
            check_image_platform(artifact, wanted)
        warn_of_origin(terminal, artifact.origin)
        if superseded_by:
            terminal.warn(f"{reference} names {superseded_by} now; {artifact.content_digest} is served on")
        yield replace(artifact, superseded_by=superseded_by)


def chosen_platform(text: str | None) -> Platform:
    """What `--platform` says, by default this machine's. Raises: UsageError."""
    from encfs.image.artifact import this_platform

    return wanted_platform(text) or this_platform()


def wanted_platform(text: str | None) -> Platform | None:
    """What `--platform` says, where all artifacts of an index count without it. Raises: UsageError."""
    from encfs.image.manifest import parse_platform

    return None if text is None else parse_platform(text)


def warn_of_origin(terminal: Terminal, origin: Origin) -> None:
    for warning in origin.warnings:
        terminal.warn(warning)


def origin_document(origin: Origin) -> dict[str, object]:
    return {"proven": origin.proven, "pinned": origin.pinned, "signer": origin.signer}


def list_artifact(
    terminal: Terminal,
    reference: ReferenceArgument,
    path: PathArgument = "",
    *,
    keys: KeyOptions,
    trust: TrustOptions,
    registry: CacheOptions,
    recursive: RecursiveOption = False,
    long: LongOption = False,
    platform: PlatformOption = None,
) -> None:
    """List what is in an artifact, without mounting it."""
    import os

    from encfs.browse import Listed, listing, open_image

    with opened_artifact(terminal, reference, keys, trust, registry, platform=platform) as artifact:
        entries = listing(open_image(artifact), os.fsencode(path), recursive=recursive)

        def shown(found: Iterable[Listed]) -> Iterator[tuple[dict[str, object], str]]:
            for one in found:
                yield one.to_json(), one.long_line() if long else one.name()

        head = {"reference": reference, "content_digest": artifact.content_digest, "path": path}
        terminal.stream(head, "entries", shown(entries))


def extract_artifact(
    terminal: Terminal,
    reference: str,
    directory: str,
    keys: KeyOptions,
    trust: TrustOptions,
    registry: RegistryOptions,
    *,
    platform: str | None,
) -> None:
    """`imagetool decrypt` and `encfs extract`."""
    import time
    from pathlib import Path

    from encfs.browse import open_image
    from encfs.extract import extract_tree
    from encfs.format.readahead import ReadAhead
    from encfs.units import format_duration, format_size

    started = time.monotonic()
    with (
        opened_artifact(terminal, reference, keys, trust, registry, platform=platform) as artifact,
        terminal.progress() as progress,
    ):
        image = open_image(artifact)
        ahead = ReadAhead(image.volume)
        try:
            progress.begin("decrypt", image.volume.size)
            result = extract_tree(image.tree, ahead, Path(directory), progress)
            progress.end()
        finally:
            ahead.close()
    seconds = time.monotonic() - started
    if result.skipped:
        terminal.warn(
            f"{result.skipped} devices, owners or attributes could not be set; run as root to get everything back"
        )
    terminal.result(
        {
            "reference": reference,
            "directory": directory,
            "content_digest": artifact.content_digest,
            "id": artifact.content.id,
            "version": artifact.content.version,
            "origin": origin_document(artifact.origin),
            "names": result.names,
            "size": result.size,
            "skipped": result.skipped,
            "seconds": round(seconds, 3),
        },
        [f"{directory}: {result.names} names, {format_size(result.size)} in {format_duration(seconds)}"],
    )
