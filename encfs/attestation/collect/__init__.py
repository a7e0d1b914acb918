"""Ask this machine for evidence: one module per interface.

What the host answers is not judged here: whoever gets the evidence verifies it.
"""
