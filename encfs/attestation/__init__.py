"""Attestation: what a trusted execution environment says of itself, collected and verified.

`evidence.py` tells the kinds of evidence apart, `verify.py` judges one against a policy (`policy.py`) and gives a
verdict (`verdict.py`). `kbs.py` has the forms of the key broker protocol. `collect/` asks the machine for evidence.
Nothing here opens a network connection, and nothing decides who gets which key.
"""
