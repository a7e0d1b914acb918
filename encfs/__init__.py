"""Encrypted, verified, lazily readable artifacts: the library behind the commands.

    with encfs.open("oci:models:v1", key="me.jwk", trust="signer.jwk.pub", id="acme/model", min_version=3) as artifact:
        image = artifact.volumes[0]
        first = image.read(0, 4096)

Importing this package is cheap; what `open` needs is imported when it is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from encfs.artifact import Artifact

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
) -> Artifact:
    """Accept an artifact, unwrap its keys and open its volumes, by the same rules as `encfs mount`.

    `ref` as skopeo writes it (`oci:PATH:TAG`), `key` one or more key URIs, `trust` files of signers' public keys.
    Raises: `encfs.errors.TrustError` where the origin is not accepted, before any key is asked for; key, format,
    integrity and store errors, all of them `encfs.errors.EncfsError`.
    """
    from encfs.artifact import open_artifact
    from encfs.keys.files import load_trusted_key
    from encfs.keys.providers import provider_from_uri
    from encfs.oci.reference import parse_reference
    from encfs.oci.store import open_source
    from encfs.trust import TrustPolicy

    keys = [key] if isinstance(key, str) else list(key)
    signers = [trust] if isinstance(trust, str | PathLike) else list(trust)
    policy = TrustPolicy(
        pin=pin,
        keys=tuple(load_trusted_key(path) for path in signers),
        artifact_id=id,
        min_version=min_version,
        allow_unsigned=allow_unsigned,
    )
    providers = [provider_from_uri(uri) for uri in keys]
    return open_artifact(open_source(parse_reference(ref)), keys=providers, trust=policy, label=ref)
