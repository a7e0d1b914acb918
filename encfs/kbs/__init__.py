"""Key broker protocol (KBS, "RCAR"): messages, the encryption of resources, and the client.

Wire-compatible with Trustee's Key Broker Service. `encfs.keys.providers.kbs` makes key URIs of it; the server is
`imagetool.broker`. Evidence is made and judged by `encfs.attestation`.
"""
