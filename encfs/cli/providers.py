"""`encfs providers`."""

from __future__ import annotations

from encfs.console.terminal import Terminal


def command(terminal: Terminal) -> None:
    """List the key providers, and why some cannot work here."""
    from encfs.keys.providers import availabilities

    found = availabilities()
    width = max((len(one.scheme) for one in found), default=0) + 1
    terminal.result(
        {"providers": [{"scheme": one.scheme, "usable": one.usable, "reason": one.reason} for one in found]},
        [f"{one.scheme + ':':{width}}  {one.reason or 'usable'}" for one in found],
    )
