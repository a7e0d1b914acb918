"""Encrypted, verified, lazily readable artifacts: the library behind the commands.

    with encfs.open("oci:models:v1", key="me.jwk", trust="signer.jwk.pub", id="acme/model", min_version=3) as artifact:
        for entry in artifact.list():
            print(entry.path, entry.size)
        config = artifact.read("config.json")

No mount, no root and no FUSE is needed for it. `encfs.aio` is the same for trio, `encfs.safetensors` loads tensors,
and fsspec knows the protocol `encfs`. Importing this package is cheap; what `open` needs is imported when it is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from encfs.api import Artifact
    from encfs.oci.options import StoreOptions

__all__ = ["open"]


def open(  # noqa: A001 - the name that readers of `gzip.open`, `tarfile.open` and the like expect
    ref: str,
    *,
    key: str | Sequence[str] = (),
    pin: str | None = None,
    trust: str | PathLike[str] | Sequence[str | PathLike[str]] = (),
    id: str | None = None,  # noqa: A002 - as on the command line and in the descriptor
    min_version: int | None = None,
    allow_unsigned: bool = False,
    platform: str | None = None,
    store: StoreOptions | None = None,
    threads: int | None = None,
) -> Artifact:
    """Accept an artifact, unwrap its keys and open it, by the same rules as `encfs mount`. Nothing of its data is read.

    `ref` as skopeo writes it (`oci:PATH:TAG`, `docker://HOST/REPOSITORY:TAG`), `key` one or more key URIs, `trust`
    files of signers' public keys, `id` and `min_version` what the release must be, `pin` a content digest; `platform`
    (`OS/ARCH[/VARIANT]`) is what a container image must be for, and what is chosen in an index, by default this
    machine's; `store` says how a registry is reached; `threads` read large pieces side by side (None: by the number of
    processors).

    Raises: `encfs.errors.TrustError` where the origin is not accepted, before any key is asked for; key, format,
    integrity and store errors, all of them `encfs.errors.EncfsError`.
    """
    from encfs.api import Opening, open_artifact_by_reference

    return open_artifact_by_reference(
        Opening(
            ref=ref,
            key=key,
            pin=pin,
            trust=trust,
            artifact_id=id,
            min_version=min_version,
            allow_unsigned=allow_unsigned,
            platform=platform,
            store=store,
            threads=threads,
        )
    )
