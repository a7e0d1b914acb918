"""`imagetool broker serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from encfs.console.terminal import Terminal
from imagetool.cli.broker.parts import DirectoryArgument, opened


def command(
    terminal: Terminal,
    directory: DirectoryArgument,
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Where to listen; port 0 takes a free one.")
    ] = "127.0.0.1:8080",
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            metavar="N",
            min=1,
            max=64,
            help="Processes; as many as processors if left out.",
            show_default=False,
        ),
    ] = None,
    plain_http: Annotated[
        bool, typer.Option("--plain-http", help="Serve without TLS, behind something that has it.")
    ] = False,
    demo: Annotated[
        bool, typer.Option("--demo", help="Accept sample evidence, which anyone can make, where the policy names it.")
    ] = False,
) -> None:
    """Serve keys until a signal ends it. The result is printed once it listens."""
    from imagetool.broker.metrics import prepared
    from imagetool.broker.serving import (
        ServeOptions,
        default_workers,
        listening,
        prepare,
        serve,
        server_context,
        split_address,
    )

    host, port = split_address(listen)
    options = ServeOptions(host, port, plain_http, demo, workers if workers is not None else default_workers())
    with opened(directory) as broker, prepared():
        endorsements = prepare(broker)
        if not plain_http:
            server_context(broker.config)
        if demo:
            terminal.warn("--demo: sample evidence is accepted where the policy names it, and anyone can make it")
        if plain_http:
            terminal.warn("--plain-http: whoever is on the way can withhold the refusals that come with a key")
        if broker.config.mark is None:
            terminal.note("no TPM counter: an old copy of the database put back would not be noticed (docs/broker.md)")
        with listening(options) as listener:
            address = listener.getsockname()
            shown = f"[{address[0]}]" if ":" in address[0] else address[0]
            url = f"{'http' if plain_http else 'https'}://{shown}:{address[1]}"
            terminal.result({"url": url, "workers": options.workers, "demo": demo}, [f"serving on {url}"])
            terminal.flush()
            serve(broker, options, listener, endorsements)
