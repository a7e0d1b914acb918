"""`python -m tests.support.programs`: build what tests build of Go modules and Rust crates, before they are timed.

With an empty cache of packages it takes minutes, which a test's time limit is not made for. What cannot be built is
said, and left to the tests that need it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from tests.support import kbs_judge, ocicrypt_judge
from tests.support.mounts import REPOSITORY
from tests.support.registry import OciServer


def csi_sanity() -> str:
    """The path of CSI's conformance suite, built if need be."""
    script = REPOSITORY / "scripts" / "build-csi-sanity"
    return subprocess.run([script], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


_PROGRAMS: dict[str, Callable[[], object]] = {
    "the second registry": OciServer.program,
    "csi-sanity": csi_sanity,
    "the judge of ocicrypt": ocicrypt_judge.build_judge,
    "the judge of the key broker protocol": kbs_judge.build_judge,
}


def main() -> None:
    for name, build in _PROGRAMS.items():
        try:
            build()
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            print(f"{name} cannot be built, and the tests that need it do not run: {error}", file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    main()
