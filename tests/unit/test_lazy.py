"""What a mount of an artifact in a layout does not load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from encfs.oci.layout import Layout
from tests.support.artifacts import encrypt_tree, make_keys, make_small_tree

_PROGRAM = """
import json, sys
from encfs.artifact import open_artifact
from encfs.keys.providers import provider_from_uri
from encfs.lazy import companion_for
from encfs.oci.reference import parse_reference
from encfs.oci.store import open_source
from encfs.prefetching import parse_selection
from encfs.trust import TrustPolicy
import encfs.mount.session
store = open_source(parse_reference(sys.argv[1]))
with open_artifact(store, keys=[provider_from_uri(sys.argv[2])], trust=TrustPolicy(allow_unsigned=True)) as artifact:
    companion = companion_for(artifact, parse_selection("none"))
    print(json.dumps([companion.prefetch()["state"], *sys.modules]))
    companion.close()
"""


def test_no_client_of_registries_is_loaded(tmp_path: Path) -> None:
    keys = make_keys(tmp_path)
    encrypt_tree(make_small_tree(tmp_path / "tree"), Layout(str(tmp_path / "store"), create=True), keys)
    words = [f"oci:{tmp_path / 'store'}:v1", f"file:{keys.recipient_file}"]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *words], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    state, *modules = json.loads(done.stdout)
    assert state == "off"
    assert not {"requests", "oras", "encfs.oci.registry", "encfs.oci.cached"} & set(modules)
