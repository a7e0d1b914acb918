"""`python -m tests.support.pastbroker TIME broker serve …`: imagetool, whose broker judges evidence as of TIME.

Recorded quotes verify with collateral of their day alone.
"""

from __future__ import annotations

import sys
from datetime import datetime, tzinfo

from encfs.console import commandline
from imagetool import cli
from imagetool.broker import handlers


def _judge_as_of(moment: datetime) -> None:
    class Past(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return moment.astimezone(tz)

    handlers.datetime = Past  # type: ignore[attr-defined]


if __name__ == "__main__":
    _judge_as_of(datetime.fromisoformat(sys.argv[1]))
    commandline.main(cli.app, cli.PROGRAM, sys.argv[2:])
