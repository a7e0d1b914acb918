"""ocicrypt's key provider protocol: other programs and services that wrap and unwrap keys.

The wire format is that of github.com/containers/ocicrypt (docs/keyprovider.md there, and its code where that differs).
"""
