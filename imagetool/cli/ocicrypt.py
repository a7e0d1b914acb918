"""`imagetool ocicrypt encrypt|decrypt|keyprovider` and `imagetool ocicrypt recipients list|add|remove`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from encfs.console.commandline import add_command, size_option, value_option
from encfs.console.commandparts import RegistryOptions, opened_source
from encfs.console.terminal import Terminal
from encfs.errors import MissingKeyError
from encfs.units import format_duration, format_size
from imagetool.cli.editing import Edited, edited

if TYPE_CHECKING:
    from encfs.image.manifest import Platform
    from encfs.oci.blobs import BlobSource, BlobTarget
    from encfs.progress import Progress
    from imagetool.ocicrypt.edit import ImageRecipients
    from imagetool.ocicrypt.keyservice import KeyService
    from imagetool.ocicrypt.rewriting import ImageResult
    from imagetool.ocicrypt.schemes import Opener, Recipient

app = typer.Typer(
    name="ocicrypt",
    help="Encrypted images of skopeo, containerd and CoCo.",
    rich_markup_mode=None,
)
recipients_app = typer.Typer(name="recipients", help="Show and change who can open such an image.")

_FORMS = "oci:PATH[:TAG], oci-archive:FILE[:TAG] or docker://HOST/REPOSITORY[:TAG]"
SourceArgument = Annotated[str, typer.Argument(metavar="SRC", help=f"The image: {_FORMS}.", show_default=False)]
DestinationArgument = Annotated[
    str, typer.Argument(metavar="DEST", help=f"Where the result goes: {_FORMS}.", show_default=False)
]
ImageArgument = Annotated[str, typer.Argument(metavar="REF", help=f"The image: {_FORMS}.", show_default=False)]
RecipientsOption = Annotated[
    list[str] | None,
    value_option(
        "-r",
        "--recipient",
        metavar="RECIPIENT",
        help="Who can decrypt: a public key or certificate file, pgp:NAME, provider:NAME[:PARAMS], "
        "coco:kbs:///REPO/TYPE/TAG. Repeatable.",
    ),
]
KeysOption = Annotated[
    list[str] | None,
    value_option(
        "-k",
        "--key",
        metavar="KEYURI",
        help="What decrypts: a private key file, pgp:, provider:NAME[:PARAMS], a key URI of a KEK. Repeatable.",
    ),
]
KekOption = Annotated[
    str | None,
    value_option("--kek", metavar="KEYURI", help="The 32-byte key behind the recipients coco:…: a file, kbs:…, cdh:…."),
]
LayersOption = Annotated[
    list[int] | None,
    value_option(
        "--layer", metavar="N", help="Only this layer: from 0, lowest first, or from -1 backwards. Repeatable."
    ),
]
PlatformsOption = Annotated[
    list[str] | None,
    value_option(
        "--platform",
        metavar="OS/ARCH[/VARIANT]",
        help="Only this image of an index. Repeatable; one alone gives a plain image.",
    ),
]


@dataclass(frozen=True, slots=True)
class _Copy:
    """Two open stores, and what is said about the copy between them."""

    names: tuple[str, str]
    source: BlobSource
    sink: BlobTarget
    tag: str | None
    progress: Progress
    started: float


def encrypt(
    terminal: Terminal,
    source: SourceArgument,
    destination: DestinationArgument,
    recipients: RecipientsOption = None,
    kek: KekOption = None,
    layers: LayersOption = None,
    platforms: PlatformsOption = None,
    *,
    registry: RegistryOptions,
) -> None:
    """Encrypt the layers of a container image. Its config and the names in its manifest stay readable."""
    from imagetool.ocicrypt.images import encrypt_image

    with opened_recipients(recipients or (), kek) as added, _copy(terminal, source, destination, registry) as copy:
        result = encrypt_image(
            copy.source,
            copy.sink,
            added,
            tag=copy.tag,
            layers=layers or (),
            platforms=_platforms(platforms),
            progress=copy.progress,
        )
    _report(terminal, copy, result, "encrypted")


def decrypt(
    terminal: Terminal,
    source: SourceArgument,
    destination: DestinationArgument,
    keys: KeysOption = None,
    layers: LayersOption = None,
    platforms: PlatformsOption = None,
    maximum: Annotated[
        int | None,
        size_option(
            "--max-layer-size",
            help="What a layer may decompress to.",
            default="16GiB, or 64 times its size where that is more",
        ),
    ] = None,
    *,
    registry: RegistryOptions,
) -> None:
    """Decrypt the layers of a container image. Nothing is decrypted of a layer that was altered."""
    from imagetool.ocicrypt.images import DecryptOptions, decrypt_image

    options = DecryptOptions(maximum, registry.store().spool)
    with opened_keys(keys or ()) as openers, _copy(terminal, source, destination, registry) as copy:
        result = decrypt_image(
            copy.source,
            copy.sink,
            openers,
            tag=copy.tag,
            layers=layers or (),
            platforms=_platforms(platforms),
            options=options,
            progress=copy.progress,
        )
    _report(terminal, copy, result, "decrypted")


def keyprovider(
    terminal: Terminal,
    keks: Annotated[
        list[str] | None,
        value_option(
            "--kek",
            metavar="KID=KEYURI",
            help="A 32-byte key, and the kbs:///REPO/TYPE/TAG that packets name it by. Repeatable.",
        ),
    ] = None,
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", help="What clients call this provider.")
    ] = "attestation-agent",
    grpc: Annotated[
        str | None,
        value_option(
            "--grpc",
            metavar="ADDRESS",
            help="Serve gRPC at unix:PATH or 127.0.0.1:PORT, not one request on standard input.",
        ),
    ] = None,
) -> None:
    """Be a key provider for skopeo, containerd and others: wrap and unwrap with the given keys."""
    from encfs.hardening import protect_keys
    from imagetool.ocicrypt.keyservice import KeyService, load_keys

    if not keks:
        raise MissingKeyError("no key was given to wrap with", hint="pass one with --kek KID=KEYURI")
    protect_keys()
    with closing(KeyService(load_keys(keks), name)) as service:
        if grpc is None:
            _answer_once(service)
        else:
            _serve(terminal, grpc, service)


def _answer_once(service: KeyService) -> None:
    from encfs.keyprovider.protocol import MAX_MESSAGE_SIZE

    answer = service.answer(sys.stdin.buffer.read(MAX_MESSAGE_SIZE + 1))
    sys.stdout.buffer.write(answer)
    sys.stdout.buffer.flush()
    answer[:] = bytes(len(answer))


def _serve(terminal: Terminal, address: str, service: KeyService) -> None:
    from imagetool.ocicrypt.grpcserver import serving, wait_for_signal

    with serving(address, service.answer) as served:
        terminal.result({"address": served}, [f"serving at {served}"])
        sys.stdout.flush()
        wait_for_signal()


def list_recipients(
    terminal: Terminal, reference: ImageArgument, platforms: PlatformsOption = None, *, registry: RegistryOptions
) -> None:
    """List who can open the encrypted layers of an image. Needs no key; nothing of it is proven."""
    from imagetool.ocicrypt.edit import list_recipients

    with opened_source(reference, registry) as source:
        images = list_recipients(source, _platforms(platforms))
    terminal.result(
        {"reference": reference, "images": [_image_document(image) for image in images]},
        [line for image in images for line in _image_lines(image)],
    )


def add(
    terminal: Terminal,
    reference: ImageArgument,
    recipients: RecipientsOption = None,
    kek: KekOption = None,
    keys: KeysOption = None,
    layers: LayersOption = None,
    *,
    registry: RegistryOptions,
) -> None:
    """Let more keys open an encrypted image. Needs a key that opens it; only its manifest changes."""
    from imagetool.ocicrypt.edit import add_recipients

    with (
        opened_recipients(recipients or (), kek) as added,
        opened_keys(keys or ()) as openers,
        edited(reference, registry) as image,
    ):
        result = add_recipients(image.source, image.sink, openers, added, tag=image.tag, layers=layers or ())
    _report_edit(terminal, image, result, f"{len(added)} recipients added")


def remove(
    terminal: Terminal,
    reference: ImageArgument,
    recipient: Annotated[
        str,
        typer.Argument(
            metavar="RECIPIENT", help="Its number, or its scheme for all of that, as 'list' shows.", show_default=False
        ),
    ],
    layers: LayersOption = None,
    *,
    registry: RegistryOptions,
) -> None:
    """Drop a recipient. It may have kept the keys of the layers: revoking means to encrypt the image anew."""
    from imagetool.ocicrypt.edit import remove_recipients

    number = recipient.isascii() and recipient.isdecimal() and len(recipient) < 4
    with edited(reference, registry) as image:
        result = remove_recipients(
            image.source, image.sink, int(recipient) if number else recipient, tag=image.tag, layers=layers or ()
        )
    terminal.warn("a removed recipient may have kept the keys; to revoke access encrypt the image anew")
    _report_edit(terminal, image, result, "recipient removed")


def _platforms(texts: Sequence[str] | None) -> list[Platform]:
    from encfs.image.manifest import parse_platform

    return [parse_platform(text) for text in texts or ()]


@contextmanager
def opened_recipients(texts: Sequence[str], kek: str | None) -> Iterator[list[Recipient]]:
    from encfs.hardening import protect_keys
    from imagetool.ocicrypt.keys import parse_recipient

    if not texts:
        raise MissingKeyError("no recipient was given", hint="pass one with -r RECIPIENT")
    protect_keys()
    with ExitStack() as stack:
        yield [stack.enter_context(closing(parse_recipient(text, kek))) for text in texts]


@contextmanager
def opened_keys(texts: Sequence[str]) -> Iterator[list[Opener]]:
    from encfs.hardening import protect_keys
    from imagetool.ocicrypt.keys import parse_opener

    if not texts:
        raise MissingKeyError("no key was given to open the image", hint="pass one with -k KEYURI")
    protect_keys()
    with ExitStack() as stack:
        yield [stack.enter_context(closing(parse_opener(text))) for text in texts]


@contextmanager
def _copy(terminal: Terminal, source: str, destination: str, registry: RegistryOptions) -> Iterator[_Copy]:
    from encfs.oci.reference import parse_reference
    from encfs.oci.store import open_sink

    target = parse_reference(destination)
    with opened_source(source, registry) as origin:
        # Before anything is made at the destination.
        origin.document()
        with closing(open_sink(target, registry.store())) as sink, terminal.progress() as progress:
            yield _Copy((source, destination), origin, sink, target.tag, progress, time.monotonic())


def _report(terminal: Terminal, copy: _Copy, result: ImageResult, done: str) -> None:
    seconds = time.monotonic() - copy.started
    source, destination = copy.names
    _warn_of_dropped(terminal, result)
    terminal.result(
        {
            "source": source,
            "destination": destination,
            "manifest_digest": result.descriptor.digest,
            "images": result.images,
            "layers": result.layers,
            "size": result.size,
            "seconds": round(seconds, 3),
        },
        [
            f"{destination}: {result.layers} layers {done}, {format_size(result.size)} in {format_duration(seconds)}",
            f"manifest        {result.descriptor.digest}",
        ],
    )


def _report_edit(terminal: Terminal, image: Edited, result: ImageResult, done: str) -> None:
    _warn_of_dropped(terminal, result)
    where = f"tag {image.tag} moved" if image.tag is not None else "no tag names it"
    terminal.result(
        {
            "reference": image.reference,
            "tag": image.tag,
            "manifest_digest": result.descriptor.digest,
            "images": result.images,
            "layers": result.layers,
        },
        [
            f"{image.reference}: {done}, {result.layers} layers; {where}",
            f"manifest        {result.descriptor.digest}",
        ],
    )


def _warn_of_dropped(terminal: Terminal, result: ImageResult) -> None:
    if result.dropped:
        terminal.warn(
            f"{result.dropped} attestations were left out: they are about the images under their former digests"
        )


def _image_document(image: ImageRecipients) -> dict[str, object]:
    return {
        "digest": image.digest,
        "platform": str(image.platform) if image.platform is not None else None,
        "layers": [
            {
                "layer": layer.layer,
                "media_type": layer.descriptor.media_type,
                "digest": layer.descriptor.digest,
                "size": layer.descriptor.size,
                "recipients": [
                    {"number": entry.number, "scheme": entry.scheme, "description": entry.description}
                    for entry in layer.entries
                ],
            }
            for layer in image.layers
        ],
    }


def _image_lines(image: ImageRecipients) -> Iterator[str]:
    yield f"{image.digest}{f'  {image.platform}' if image.platform is not None else ''}"
    if not image.layers:
        yield "  no layer is encrypted"
    for layer in image.layers:
        yield f"  layer {layer.layer}, {format_size(layer.descriptor.size)}"
        for entry in layer.entries:
            yield f"    {entry.number}  {entry.scheme}  {entry.description}"


add_command(app, "encrypt", encrypt)
add_command(app, "decrypt", decrypt)
add_command(app, "keyprovider", keyprovider)
add_command(recipients_app, "list", list_recipients)
add_command(recipients_app, "add", add)
add_command(recipients_app, "remove", remove)
app.add_typer(recipients_app)
