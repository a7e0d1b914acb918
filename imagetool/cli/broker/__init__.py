"""`imagetool broker …`: a module per command or pair of commands. The broker itself is `imagetool.broker`."""

from __future__ import annotations

import typer

from encfs.console.commandline import add_command
from imagetool.cli.broker import endorsements, init, keys, policies, releases, serve

app = typer.Typer(name="broker", help="A key broker of your own: serve, keys, policy, log.", rich_markup_mode=None)
add_command(app, "init", init.command)
add_command(app, "serve", serve.command)
app.add_typer(keys.app)
app.add_typer(policies.app)
add_command(app, "releases", releases.command)
add_command(app, "endorsements", endorsements.command)
