"""The key broker: a KBS-compatible server that releases keys to what its policy accepts, and the owner's side of it.

| module | owns |
|---|---|
| `config` | the broker's directory and `broker.toml` |
| `database`, `tables`, `migrations/` | SQLite or PostgreSQL: engine, transactions, errors, schema |
| `writer` | many requests' transactions in one commit |
| `vault` | what is encrypted and authenticated under the KEK |
| `state` | keys, floors and policy as one authenticated state with an epoch; changing it |
| `rollback` | the epoch's high-water mark in a TPM |
| `policy`, `policyfields` | the policy file |
| `log` | the hash-chained log of decisions |
| `refusals` | refused evidence in the log: one by one up to a limit, then counted |
| `sessions`, `tickets` | sessions and nonces; the cookie and the token that a client has of one |
| `lookups` | what a request needs of the database; counting releases |
| `decisions` | evidence and policy against a request: the one place that says yes |
| `endorsements` | certificates and collateral that evidence does not bring along |
| `app`, `handlers`, `limits`, `metrics` | HTTP |
| `serving`, `httpbounds`, `tls` | processes, sockets, bounds of connections, certificates |

Wire forms are `encfs.kbs`', evidence is judged by `encfs.attestation`.
"""
