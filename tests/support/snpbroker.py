"""`python -m tests.support.snpbroker AUTHORITY broker serve …`: imagetool, in which a made-up authority is AMD's."""

from __future__ import annotations

import sys
from pathlib import Path

from encfs.console import commandline
from imagetool import cli
from tests.support.snpchip import trust_authority

if __name__ == "__main__":
    trust_authority(Path(sys.argv[1]).read_bytes())
    commandline.main(cli.app, cli.PROGRAM, sys.argv[2:])
