"""Azure's secure key release: a key of Azure Key Vault, released to what Microsoft Azure Attestation (MAA) attests.

`sidecar.py` asks Microsoft's sidecar of a container group or pod; `direct.py` does without it there, `guest.py` in a
virtual machine, both by `release.py`. None judges anything: MAA verifies the evidence, the key's release policy in the
vault decides. Key URIs are `encfs.keys.providers.skr`'s.
"""

#: Names the directory in which Azure's confidential container groups have what goes with their reports.
CONTEXT_VARIABLE = "UVM_SECURITY_CONTEXT_DIR"
