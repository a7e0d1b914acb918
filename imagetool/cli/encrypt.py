"""`imagetool encrypt`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from encfs.console.commandline import size_option, value_option
from encfs.console.commandparts import RegistryOptions
from encfs.console.terminal import Terminal
from encfs.errors import FormatError, UsageError
from imagetool.cli.encrypting import Job, MaxLayerSizeOption, ReuseOptions, encrypt_image, encrypt_path
from imagetool.cli.recipientkeys import ForWhat, recipient_keys

RecipientsOption = Annotated[
    list[str] | None,
    value_option(
        "-r",
        "--recipient",
        metavar="KEY",
        help="Encrypt to this key: a JWK or PEM file, kbs:///REPOSITORY/TYPE/TAG?key=FILE (or broker=DIR, fetch=yes), "
        "keyprovider:NAME. Repeatable.",
    ),
]
PassphraseFileOption = Annotated[
    str | None,
    value_option(
        "--passphrase-file",
        metavar="FILE",
        help="Encrypt also to the passphrase in this file; - reads it from standard input.",
    ),
]


def command(
    terminal: Terminal,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A directory or a file; or a container image: docker://…, oci:PATH[:TAG], oci-archive:FILE, "
            "docker-archive:FILE.",
            show_default=False,
        ),
    ],
    destination: Annotated[
        str,
        typer.Argument(
            metavar="DEST",
            help="oci:PATH[:TAG], a layout that is made where there is none, docker://HOST/REPOSITORY[:TAG], or "
            "oci-archive:FILE[:TAG], a new file.",
            show_default=False,
        ),
    ],
    recipients: RecipientsOption = None,
    passphrase_file: PassphraseFileOption = None,
    signers: Annotated[
        list[str] | None,
        value_option("--sign", metavar="KEY", help="Sign with this private key (JWK or PEM file). Repeatable."),
    ] = None,
    artifact_id: Annotated[
        str | None,
        value_option("--id", metavar="NAME", help="The line of releases; random if left out."),
    ] = None,
    version: Annotated[
        int, typer.Option("--artifact-version", metavar="N", help="The release, from 0 to 2^53-1.", show_default=True)
    ] = 0,
    hash_name: Annotated[
        Literal["blake3", "sha256"], typer.Option("--hash", metavar="blake3|sha256", help="The hash of the tree.")
    ] = "blake3",
    compress: Annotated[
        Literal["none", "zstd"] | None,
        value_option(
            "--compress",
            metavar="none|zstd",
            help="Compress frames where it pays; sizes then tell more.  [default: zstd for images, none for the rest]",
        ),
    ] = None,
    frame_size: Annotated[
        int | None,
        size_option(
            "--frame-size", help="Bytes sealed together, a power of two.", default="32KiB, 256KiB for large files"
        ),
    ] = None,
    segment_size: Annotated[
        int | None, size_option("--segment-size", help="Bytes of a blob, about.", default="1GiB")
    ] = None,
    exclude: Annotated[
        list[str] | None,
        value_option("--exclude", metavar="GLOB", help="Leave out what fits: a name, or a path below SRC. Repeatable."),
    ] = None,
    platforms: Annotated[
        list[str] | None,
        value_option(
            "--platform",
            metavar="OS/ARCH[/VARIANT]",
            help="Of an image for several platforms take this one. Repeatable.  [default: all of them]",
        ),
    ] = None,
    flatten: Annotated[
        bool, typer.Option("--flatten", help="Make all layers of an image into one; they are read twice.")
    ] = False,
    max_layer_size: MaxLayerSizeOption = None,
    *,
    reuse: ReuseOptions,
    registry: RegistryOptions,
) -> None:
    """Encrypt a directory, file or image into an OCI artifact.

    The tag moves last: nobody ever sees half an artifact.
    """
    from encfs.format.suite import suite_by_hash
    from encfs.format.writer import DEFAULT_SEGMENT_SIZE, VolumeOptions
    from encfs.image.manifest import parse_platform
    from encfs.keys.files import load_signing_key
    from encfs.oci.reference import parse_reference
    from imagetool.pipeline.encrypt import EncryptOptions
    from imagetool.pipeline.encrypt_image import ImageOptions

    origin, reference = parse_reference(source), parse_reference(destination)
    is_image = origin.transport != "path"
    if is_image and exclude:
        raise UsageError("--exclude is for directories; an image is encrypted as it is")
    if not is_image and (platforms or flatten or max_layer_size is not None):
        raise UsageError(
            "--platform, --flatten and --max-layer-size are for container images", hint=f"write oci:{source}"
        )
    if flatten and reuse.reference is not None:
        raise UsageError("--flatten leaves no layers that could be taken over", hint="leave --reuse or --flatten out")
    reuse.check(is_image=is_image)
    volume = VolumeOptions(
        suite=suite_by_hash(hash_name),
        frame_size=_checked_frame_size(frame_size),
        segment_size=DEFAULT_SEGMENT_SIZE if segment_size is None else segment_size,
        compress=is_image if compress is None else compress == "zstd",
    )
    signing = [load_signing_key(path) for path in signers or ()]
    wanted = [parse_platform(text) for text in platforms or ()]
    made = ForWhat(artifact_id, version)
    with recipient_keys(terminal, recipients or (), passphrase_file, [made]) as keys:
        job = Job(origin, reference, keys, signing, registry)
        if is_image:
            encrypt_image(
                terminal, job, ImageOptions(artifact_id, version, volume, max_layer_size, flatten), wanted, reuse
            )
        else:
            encrypt_path(
                terminal, job, EncryptOptions(artifact_id, version, volume, tuple(exclude or ()), frame_size is None)
            )


def _checked_frame_size(size: int | None) -> int:
    from encfs.format.frames import DEFAULT_FRAME_SIZE, check_frame_size

    if size is None:
        return DEFAULT_FRAME_SIZE
    try:
        check_frame_size(size)
    except FormatError as error:
        raise UsageError(f"--frame-size: {error.message}") from None
    return size
