"""jwcrypto, the second implementation of JWK and JWE that tests compare with. It has no types, hence `Any`."""

from __future__ import annotations

from typing import Any

from jwcrypto import jwa, jwe, jwk

JWK: Any = jwk.JWK
JWE: Any = jwe.JWE

# jwcrypto refuses more than 16,384 iterations unless told otherwise.
jwa.default_max_pbkdf2_iterations = 1_000_000
