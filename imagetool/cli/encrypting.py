"""The two things that `encrypt` does, and what is printed of them: a path, or a container image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from encfs.console.commandline import size_option, value_option
from encfs.console.commandparts import KeyOptions, RegistryOptions, TrustOptions, warn_of_origin
from encfs.console.terminal import Terminal
from encfs.errors import NotFoundError, UsageError
from encfs.units import format_duration, format_size

if TYPE_CHECKING:
    from encfs.artifact import Artifact
    from encfs.image.manifest import Platform
    from encfs.keys.jwk import PrivateKey
    from encfs.keys.recipients import RecipientKey
    from encfs.oci.options import StoreOptions
    from encfs.oci.reference import Reference
    from imagetool.pipeline.encrypt import EncryptOptions, EncryptResult
    from imagetool.pipeline.encrypt_image import ImageOptions, ImagesResult


MaxLayerSizeOption = Annotated[
    int | None,
    size_option(
        "--max-layer-size", help="What a layer may unpack to.", default="16GiB, or 64 times its size if that is more"
    ),
]


@dataclass(frozen=True, slots=True)
class ReuseOptions:
    """The earlier artifact whose layers are taken over, and what makes it acceptable."""

    reference: Annotated[
        str | None,
        value_option(
            "--reuse",
            metavar="REF",
            help="Take layers of an image over from this earlier artifact, without encrypting them again.",
        ),
    ] = None
    keys: Annotated[
        list[str] | None,
        value_option("-k", "--key", metavar="KEYURI", help="A key that opens it. Repeatable."),
    ] = None
    pin: Annotated[
        str | None,
        value_option("--pin", metavar="DIGEST", help="Reuse exactly this content digest."),
    ] = None
    trust: Annotated[
        list[str] | None,
        value_option(
            "--trust", metavar="KEY", help="Reuse what this public key signed under the same --id. Repeatable."
        ),
    ] = None
    min_version: Annotated[
        int | None,
        value_option("--min-version", metavar="N", help="Reuse no version below this one."),
    ] = None
    allow_unsigned: Annotated[
        bool, typer.Option("--allow-unsigned", help="Reuse an artifact whose origin nothing proves.")
    ] = False

    def check(self, *, is_image: bool) -> None:
        """Raises: UsageError where they do not fit."""
        if self.reference is None and self != ReuseOptions():
            raise UsageError("-k and trust options are for --reuse", hint="name the earlier artifact with --reuse REF")
        if self.reference is not None and not is_image:
            raise UsageError("--reuse is for container images, whose layers stay the same")

    @contextmanager
    def opened(
        self, terminal: Terminal, store: StoreOptions, platforms: Sequence[Platform], artifact_id: str | None
    ) -> Iterator[list[Artifact]]:
        """The earlier artifacts for these platforms; none where none was named. Raises: key errors, TrustError, …"""
        if self.reference is None:
            yield []
            return
        from encfs.oci.reference import parse_reference
        from imagetool.pipeline.reuse import opened_earlier

        # The same rules as for readers; the line of releases is that of the new artifact.
        given = TrustOptions(
            self.pin, self.trust, artifact_id if self.trust else None, self.min_version, self.allow_unsigned
        )
        reference, trust = parse_reference(self.reference), given.policy()
        with ExitStack() as stack:
            keys = stack.enter_context(KeyOptions(self.keys).providers())
            opened = [
                stack.enter_context(opened_earlier(reference, store, platform, keys=keys, trust=trust))
                for platform in platforms
            ]
            for artifact in opened:
                warn_of_origin(terminal, artifact.origin)
            yield opened


@dataclass(frozen=True, slots=True)
class Job:
    """From where to where, and for whom."""

    source: Reference
    destination: Reference
    recipients: Sequence[RecipientKey]
    signers: Sequence[PrivateKey]
    registry: RegistryOptions


def encrypt_path(terminal: Terminal, job: Job, options: EncryptOptions) -> None:
    """Encrypt a directory or file, and print the outcome. Raises: as `imagetool.pipeline.encrypt.encrypt`."""
    from encfs.oci.store import open_sink
    from imagetool.pipeline.encrypt import encrypt

    source = Path(job.source.path)
    if not source.exists():
        # Before the layout is made.
        raise NotFoundError(f"{source} does not exist", hint="give an existing directory or file")
    with closing(open_sink(job.destination, job.registry.store())) as sink, terminal.progress() as progress:
        result = encrypt(
            source,
            sink,
            job.recipients,
            signers=job.signers,
            options=options,
            tag=job.destination.tag,
            progress=progress,
        )
    _note_unsigned(terminal, job)
    terminal.result(_path_document(str(job.destination), result), _path_lines(str(job.destination), result))


def encrypt_image(
    terminal: Terminal, job: Job, options: ImageOptions, platforms: Sequence[Platform], reuse: ReuseOptions
) -> None:
    """Encrypt a container image, and print the outcome. Raises: as `imagetool.pipeline.encrypt_image`."""
    from encfs.oci.store import open_sink
    from imagetool.pipeline.encrypt_image import encrypt_images
    from imagetool.sources.stored import opened_images

    store = job.registry.store()
    with (
        opened_images(job.source, store, platforms) as images,
        reuse.opened(terminal, store, [image.platform for image in images.images], options.artifact_id) as earlier,
        closing(open_sink(job.destination, store)) as sink,
        terminal.progress() as progress,
    ):
        result = encrypt_images(
            images,
            sink,
            job.recipients,
            signers=job.signers,
            options=replace(options, concurrency=store.concurrency),
            tag=job.destination.tag,
            progress=progress,
            earlier=earlier,
        )
    if any(image.reused for image in result.images):
        terminal.warn(
            f"layers are shared with {reuse.reference}: everybody sees which ones, and who can open that can read them"
        )
    _note_unsigned(terminal, job)
    terminal.result(_image_document(str(job.destination), result), _image_lines(str(job.destination), result))


def _note_unsigned(terminal: Terminal, job: Job) -> None:
    if not job.signers:
        terminal.note("not signed: readers must pin the content digest, or sign it with 'imagetool sign'")


def _path_document(reference: str, result: EncryptResult) -> dict[str, object]:
    volume = result.content.volumes[0]
    return {
        "reference": reference,
        "content_digest": result.content.digest,
        "manifest_digest": result.manifest.digest,
        "id": result.content.id,
        "version": result.content.version,
        "root": volume.root.hex(),
        "source_size": result.source_size,
        "image_size": result.image_size,
        "stored_size": result.stored_size,
        "files": result.files,
        "seconds": round(result.seconds, 3),
    }


def _path_lines(reference: str, result: EncryptResult) -> list[str]:
    rate = result.image_size / result.seconds if result.seconds else 0.0
    took = f"{format_duration(result.seconds)} ({format_size(int(rate))}/s)"
    return [
        f"{reference}: {result.files} files, {format_size(result.source_size)} in {took}",
        f"id              {result.content.id}, version {result.content.version}",
        f"content digest  {result.content.digest}",
        f"manifest        {result.manifest.digest}",
    ]


def _image_document(reference: str, result: ImagesResult) -> dict[str, object]:
    content = result.images[0].content
    return {
        "reference": reference,
        "manifest_digest": result.manifest.digest,
        "index": result.is_index,
        "id": content.id,
        "version": content.version,
        "images": [
            {
                "platform": str(image.platform),
                "content_digest": image.content.digest,
                "manifest_digest": image.manifest.digest,
                "layers": image.layers,
                "layers_reused": image.reused,
            }
            for image in result.images
        ],
        "source_size": result.source_size,
        "stored_size": result.stored_size,
        "seconds": round(result.seconds, 3),
    }


def _image_lines(reference: str, result: ImagesResult) -> list[str]:
    content = result.images[0].content
    sizes = f"{format_size(result.source_size)} stored as {format_size(result.stored_size)}"
    lines = [
        f"{reference}: {sizes} in {format_duration(result.seconds)}",
        f"id              {content.id}, version {content.version}",
        f"manifest        {result.manifest.digest}{' (index)' if result.is_index else ''}",
    ]
    for image in result.images:
        reused = f", {image.reused} taken over" if image.reused else ""
        lines.append(f"content digest  {image.content.digest} ({image.platform}, {image.layers} layers{reused})")
    return lines
