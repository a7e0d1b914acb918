"""`imagetool broker init`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from encfs.console.terminal import Terminal
from encfs.errors import UsageError
from imagetool.cli.broker.parts import require_packages


def command(
    terminal: Terminal,
    directory: Annotated[str, typer.Argument(metavar="DIR", help="The directory to make.", show_default=False)],
    database: Annotated[
        str,
        typer.Option(
            "--database",
            metavar="URL",
            help="sqlite, or postgresql://USER@HOST/NAME for several brokers.",
            show_default=True,
        ),
    ] = "sqlite",
    kek: Annotated[
        str | None,
        typer.Option(
            "--kek",
            metavar="KEY",
            help="Key URI of the key that keys are encrypted under: tpm2:FILE, file:FILE, …; one is made if left out.",
            show_default=False,
        ),
    ] = None,
    hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--host",
            metavar="NAME",
            help="A name or address that clients use, for the self-signed certificate. Repeatable.",
            show_default=False,
        ),
    ] = None,
    certificate: Annotated[
        str | None,
        typer.Option("--cert", metavar="FILE", help="The server's certificate chain (PEM).", show_default=False),
    ] = None,
    private_key: Annotated[
        str | None, typer.Option("--key", metavar="FILE", help="Its private key (PEM).", show_default=False)
    ] = None,
    counter: Annotated[
        str | None,
        typer.Option(
            "--tpm2-nv-counter",
            metavar="INDEX",
            help="A counter of this machine's TPM that shows when an old database is put back.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Make a broker: its directory, database, key and certificate. It denies everything until it has a policy."""
    require_packages()
    from encfs.hardening import protect_keys
    from encfs.keys.files import write_key_files
    from encfs.keys.jwk import generate_key
    from encfs.tpm.policy import parse_nv_index
    from imagetool.broker.config import CONFIG_FILE, BrokerConfig
    from imagetool.broker.opening import create_broker
    from imagetool.broker.serving import relative_to
    from imagetool.broker.tls import write_self_signed

    if (certificate is None) != (private_key is None):
        raise UsageError("--cert and --key belong together", hint="give both, or neither for a self-signed one")
    if certificate is not None and hosts:
        raise UsageError("--host is for the self-signed certificate", hint="leave it out with --cert")
    index = parse_nv_index(counter) if counter is not None else None
    protect_keys()
    place = Path(directory).absolute()
    place.mkdir(mode=0o700, exist_ok=True)
    if (place / CONFIG_FILE).exists():
        from encfs.errors import ConflictError

        raise ConflictError(f"{directory} is a broker's directory already", hint="choose another")
    config = BrokerConfig(
        place,
        database=database,
        kek=_kek_uri(kek) if kek is not None else "file:kek.jwk",
        certificate=relative_to(place, certificate) if certificate is not None else "tls.crt",
        private_key=relative_to(place, private_key) if private_key is not None else "tls.key",
    )
    made: list[Path] = []
    try:
        if kek is None:
            write_key_files(generate_key("oct"), place / "kek.jwk")
            made.append(place / "kek.jwk")
        if certificate is None:
            pair = place / "tls.crt", place / "tls.key"
            write_self_signed(hosts or ["localhost", "127.0.0.1", "::1"], *pair)
            made += pair
        config = create_broker(config, index)
    except BaseException:
        # Nothing is encrypted under the key so far, and the next attempt makes another; unless it was at its very end.
        if not (place / CONFIG_FILE).exists():
            for path in made:
                path.unlink(missing_ok=True)
        raise
    if kek is None:
        terminal.note(f"the key-encryption key is {place / 'kek.jwk'}: keep a copy where the database's copies are not")
    terminal.result(
        {
            "directory": directory,
            "database": database.partition(":")[0],
            "kek": config.kek,
            "certificate": config.certificate,
            "counter_index": config.counter_index,
        },
        [
            f"{directory}: a broker that denies everything so far",
            f"next  imagetool broker policy set {directory} FILE",
            f"      imagetool broker key add {directory} REPOSITORY/TYPE/TAG --kek FILE",
            f"      imagetool broker serve {directory}",
        ],
    )


def _kek_uri(text: str) -> str:
    """A key URI whose file is found from any working directory."""
    from imagetool.broker.config import FILE_SCHEMES

    scheme, separator, rest = text.partition(":")
    if not separator:
        return f"file:{Path(text).absolute()}"
    return f"{scheme}:{Path(rest).absolute()}" if scheme in FILE_SCHEMES else text
