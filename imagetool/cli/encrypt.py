"""`imagetool encrypt`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from encfs.commandline import size_option
from encfs.commandparts import RegistryOptions
from encfs.errors import FormatError, NotFoundError, UsageError
from encfs.terminal import Terminal
from encfs.units import format_duration, format_size

if TYPE_CHECKING:
    from encfs.keys.recipients import RecipientKey
    from imagetool.pipeline.encrypt import EncryptResult

_SERVICE = "keyprovider:"

RecipientsOption = Annotated[
    list[str] | None,
    typer.Option(
        "-r",
        "--recipient",
        metavar="KEY",
        help="Encrypt to this key: a JWK or PEM file, kbs: or cdh: URI to fetch it from, keyprovider:NAME. Repeatable.",
        show_default=False,
    ),
]
PassphraseFileOption = Annotated[
    str | None,
    typer.Option(
        "--passphrase-file",
        metavar="FILE",
        help="Encrypt also to the passphrase in this file; - reads it from standard input.",
        show_default=False,
    ),
]


def command(
    terminal: Terminal,
    source: Annotated[str, typer.Argument(metavar="SRC", help="A directory or a file.", show_default=False)],
    destination: Annotated[
        str,
        typer.Argument(
            metavar="DEST",
            help="oci:PATH[:TAG], a layout that is made where there is none, or docker://HOST/REPOSITORY[:TAG].",
            show_default=False,
        ),
    ],
    recipients: RecipientsOption = None,
    passphrase_file: PassphraseFileOption = None,
    signers: Annotated[
        list[str] | None,
        typer.Option(
            "--sign",
            metavar="KEY",
            help="Sign with this private key (JWK or PEM file). Repeatable.",
            show_default=False,
        ),
    ] = None,
    artifact_id: Annotated[
        str | None,
        typer.Option("--id", metavar="NAME", help="The line of releases; random if left out.", show_default=False),
    ] = None,
    version: Annotated[
        int, typer.Option("--artifact-version", metavar="N", help="The release, from 0 to 2^53-1.", show_default=True)
    ] = 0,
    hash_name: Annotated[
        Literal["blake3", "sha256"], typer.Option("--hash", metavar="blake3|sha256", help="The hash of the tree.")
    ] = "blake3",
    compress: Annotated[
        Literal["none", "zstd"],
        typer.Option("--compress", metavar="none|zstd", help="Compress frames where it pays; sizes then tell more."),
    ] = "none",
    frame_size: Annotated[
        int | None, size_option("--frame-size", help="Bytes sealed together, a power of two.", default="32KiB")
    ] = None,
    segment_size: Annotated[
        int | None, size_option("--segment-size", help="Bytes of a blob, about.", default="1GiB")
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude",
            metavar="GLOB",
            help="Leave out what fits: a name, or a path below SRC. Repeatable.",
            show_default=False,
        ),
    ] = None,
    *,
    registry: RegistryOptions,
) -> None:
    """Encrypt a directory or file into an OCI artifact. The tag moves last: nobody ever sees half an artifact."""
    from encfs.format.frames import DEFAULT_FRAME_SIZE, check_frame_size
    from encfs.format.suite import suite_by_hash
    from encfs.format.writer import DEFAULT_SEGMENT_SIZE, VolumeOptions
    from encfs.keys.files import load_signing_key
    from encfs.oci.reference import parse_reference
    from encfs.oci.store import open_sink
    from imagetool.pipeline.encrypt import EncryptOptions, encrypt

    reference = parse_reference(destination)
    if frame_size is not None:
        try:
            check_frame_size(frame_size)
        except FormatError as error:
            raise UsageError(f"--frame-size: {error.message}") from None
    options = EncryptOptions(
        artifact_id=artifact_id,
        version=version,
        volume=VolumeOptions(
            suite=suite_by_hash(hash_name),
            frame_size=DEFAULT_FRAME_SIZE if frame_size is None else frame_size,
            segment_size=DEFAULT_SEGMENT_SIZE if segment_size is None else segment_size,
            compress=compress == "zstd",
        ),
        exclude=tuple(exclude or ()),
    )
    signing = [load_signing_key(path) for path in signers or ()]
    if not Path(source).exists():
        # Before the layout is made.
        raise NotFoundError(f"{source} does not exist", hint="give an existing directory or file")
    with (
        recipient_keys(terminal, recipients or (), passphrase_file) as keys,
        closing(open_sink(reference, registry.store())) as sink,
        terminal.progress() as progress,
    ):
        result = encrypt(
            Path(source), sink, keys, signers=signing, options=options, tag=reference.tag, progress=progress
        )
    if not signing:
        terminal.note("not signed: readers must pin the content digest, or sign it with 'imagetool sign'")
    terminal.result(_document(str(reference), result), _lines(str(reference), result))


@contextmanager
def recipient_keys(
    terminal: Terminal, paths: Sequence[str], passphrase_file: str | None
) -> Iterator[list[RecipientKey]]:
    """The keys to encrypt to; secrets among them are wiped at the end. Raises: KeyFileError, NotFoundError."""
    from encfs.keyprovider.client import parse_service
    from encfs.keys.files import load_recipient_key
    from encfs.keys.jwk import PublicKey
    from encfs.keys.providers import fetched_key
    from encfs.keys.providers.passphrase import read_passphrase
    from encfs.keys.recipients import WrappingService, mixes_post_quantum

    with ExitStack() as stack:
        keys: list[RecipientKey] = []
        for path in paths:
            if path.startswith(_SERVICE):
                service = parse_service(path.removeprefix(_SERVICE))
                keys.append(WrappingService(service.name, service.wrap))
                continue
            key = fetched_key(path) if path.startswith(("kbs:", "cdh:")) else load_recipient_key(path)
            if not isinstance(key, PublicKey):
                stack.callback(key.wipe)
            keys.append(key)
        if passphrase_file is not None:
            standard_input = passphrase_file == "-"  # noqa: S105 -- the name of a file
            passphrase = read_passphrase("fd=0" if standard_input else f"file={passphrase_file}")
            stack.callback(passphrase.wipe)
            keys.append(passphrase)
        if mixes_post_quantum(keys):
            terminal.warn(
                "a post-quantum recipient stands beside one that is not: whoever breaks the weaker one reads everything"
            )
        yield keys


def _document(reference: str, result: EncryptResult) -> dict[str, object]:
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


def _lines(reference: str, result: EncryptResult) -> list[str]:
    rate = result.image_size / result.seconds if result.seconds else 0.0
    took = f"{format_duration(result.seconds)} ({format_size(int(rate))}/s)"
    return [
        f"{reference}: {result.files} files, {format_size(result.source_size)} in {took}",
        f"id              {result.content.id}, version {result.content.version}",
        f"content digest  {result.content.digest}",
        f"manifest        {result.manifest.digest}",
    ]
