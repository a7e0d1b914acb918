"""What is written down of every mount for whoever asks later: which artifact, by whose key, and why it was accepted."""

from __future__ import annotations

from collections.abc import Mapping

from encfs.artifact import Artifact


def audit_of(artifact: Artifact, reference: str) -> Mapping[str, object]:
    """Members of the audit line. The key's URI names a secret and holds none."""
    members = {
        "event": "mount",
        "reference": reference,
        "content_digest": artifact.content_digest,
        "id": artifact.content.id,
        "version": artifact.content.version,
        "key": artifact.key_uri,
        "signer": artifact.origin.signer,
        "pinned": artifact.origin.pinned,
    }
    return members | ({"superseded_by": artifact.superseded_by} if artifact.superseded_by else {})
