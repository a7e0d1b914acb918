"""The owner's operations as library functions: encrypt, verify, sign, recipients. No terminal, no option parsing.

Each takes opened stores, keys and a `Progress`, and raises `EncfsError`s. Copying is `encfs.oci.transfer`.
"""
