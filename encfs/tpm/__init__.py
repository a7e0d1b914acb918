"""TPM 2.0: sealing keys under a policy, keys that never leave the TPM, and quotes of its registers.

The modules that talk to a TPM need tpm2-pytss (the extra `tpm`); `structures`, `policy` and `keyfile` do
not, so that an owner approves new measurements on any machine. Nothing here opens artifacts: key URIs are
`encfs.keys.providers.tpm2`'s. Who may know whom:

    resident -> sealing -> counter -> storage
    quote -> storage -> connection -> structures
    keyfile -> policy -> structures
"""
