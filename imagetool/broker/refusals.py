"""Refused evidence in the log: one by one up to a limit, beyond it as numbers. So the log grows by a bounded amount.

Evidence that is not genuine, or not bound to its session, is what anybody can send. In each interval (an hour by the
database's clock) so many refusals of one address, and of all together, have an entry each. The others are counted, by
TEE and by the first of their reasons, in the transaction that uses up their nonce; when the interval is over the
numbers become one entry of the log. Decisions about genuine evidence are none of this: each has its entry.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from sqlalchemy import Connection, bindparam, case, delete, func, select
from sqlalchemy.dialects import postgresql, sqlite

from imagetool.broker import log
from imagetool.broker.limits import network
from imagetool.broker.tables import REFUSALS
from imagetool.broker.vault import Vault

#: Milliseconds.
INTERVAL = 3_600_000
#: Refusals with an entry each, in an interval: of one address, and of all.
MAX_OF_ADDRESS, MAX_OF_ALL = 10, 100
#: What a row counts: entries that an address has in the log; refusals that have none.
_ADDRESS, _REASON = "address", "reason"


def note(
    connection: Connection,
    vault: Vault,
    *,
    now: int,
    client: str,
    tee: str,
    reasons: Sequence[Mapping[str, str]],
    members: Mapping[str, object],
) -> None:
    """Write the refusal of a session's evidence down, in a writing transaction. `reasons` has one at least."""
    interval, address = now // INTERVAL, network(client)
    row = connection.execute(_LOGGED, {"of": interval, "address": address}).one()
    if row.all >= MAX_OF_ALL or row.own >= MAX_OF_ADDRESS:
        _count(connection, interval, _REASON, f"{tee} {reasons[0]['code']}")
        return
    _count(connection, interval, _ADDRESS, address)
    log.append(
        connection,
        vault,
        time=now,
        event="refused-evidence",
        path="",
        members={**members, "client": client, "tee": tee, "reasons": list(reasons)},
    )


def settle(connection: Connection, vault: Vault, now: int) -> None:
    """Make entries of what was counted in intervals that are over, in a writing transaction."""
    rows = connection.execute(_OVER, {"of": now // INTERVAL}).all()
    if not rows:
        return
    counted: dict[int, list[dict[str, object]]] = defaultdict(list)
    for row in rows:
        if row.kind == _REASON:
            tee, _, code = row.name.partition(" ")
            counted[row.interval].append({"tee": tee, "code": code, "count": row.count})
    for interval, counts in counted.items():
        log.append(
            connection,
            vault,
            time=now,
            event="refused-evidence-counted",
            path="",
            members={"from": interval * INTERVAL, "until": (interval + 1) * INTERVAL, "counts": counts},
        )
    connection.execute(_DELETE, {"of": now // INTERVAL})


def _count(connection: Connection, interval: int, kind: str, name: str) -> None:
    connection.execute(_ADD[connection.dialect.name], {"interval": interval, "kind": kind, "name": name, "count": 1})


# Made once: making a statement takes longer than executing it.
_OWN = case((REFUSALS.c.name == bindparam("address"), REFUSALS.c.count), else_=0)
_LOGGED = select(
    func.coalesce(func.sum(REFUSALS.c.count), 0).label("all"), func.coalesce(func.sum(_OWN), 0).label("own")
).where(REFUSALS.c.interval == bindparam("of"), REFUSALS.c.kind == _ADDRESS)
_OVER = select(REFUSALS).where(REFUSALS.c.interval < bindparam("of")).order_by(*REFUSALS.primary_key)
_DELETE = delete(REFUSALS).where(REFUSALS.c.interval < bindparam("of"))
_SQLITE, _POSTGRESQL = sqlite.insert(REFUSALS), postgresql.insert(REFUSALS)
_ADD = {
    "sqlite": _SQLITE.on_conflict_do_update(
        index_elements=list(REFUSALS.primary_key), set_={"count": REFUSALS.c.count + 1}
    ),
    "postgresql": _POSTGRESQL.on_conflict_do_update(
        index_elements=list(REFUSALS.primary_key), set_={"count": REFUSALS.c.count + 1}
    ),
}
