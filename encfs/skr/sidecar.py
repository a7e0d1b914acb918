"""Microsoft's sidecar for secure key release (`skr`): it attests and unwraps; the key comes in clear over loopback.

Source: microsoft/confidential-sidecar-containers, cmd/skr. Without an SNP device the sidecar uses a made-up report,
which MAA refuses: what protects the key is its release policy in the vault.
"""

from __future__ import annotations

from encfs.skr.service import ask, text_member
from encfs.webclient import Address, Deadline

HOST, PORT = "127.0.0.1", 8080
SERVICE = "the secure key release sidecar"


def release(vault: Address, attestation: Address, name: str, *, port: int, deadline: Deadline) -> bytearray:
    """The released key as a JWK (JSON); the caller wipes it. Raises: KeyProviderError, KeyRefusedError."""
    request = {"maa_endpoint": _authority(attestation), "akv_endpoint": _authority(vault), "kid": name}
    answer = ask(Address("http", HOST, port, ""), "POST", "/key/release", request, deadline=deadline, service=SERVICE)
    return bytearray(text_member(answer, "key", SERVICE).encode())


def _authority(address: Address) -> str:
    """As the sidecar takes endpoints: without a scheme, and without the port that https has anyway."""
    return address.host if address.port == 443 else f"{address.host}:{address.port}"
