"""What a benchmark gives: alternating series of two contenders, their medians and ratio. Data and arithmetic only."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Better = Literal["higher", "lower"]


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on a ratio (or, without a peer, on the value itself), and what is aimed for beyond it."""

    limit: float
    aim: float | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """One workload: our figures and the peer's (empty where there is no peer), in `unit`, one per repetition."""

    suite: str
    workload: str
    condition: str
    variant: str
    unit: str
    better: Better
    ours: Sequence[float]
    peer_name: str = ""
    peer: Sequence[float] = ()
    target: Target | None = None
    note: str = ""

    @property
    def ours_median(self) -> float:
        return statistics.median(self.ours)

    @property
    def peer_median(self) -> float | None:
        return statistics.median(self.peer) if self.peer else None

    @property
    def ratio(self) -> float | None:
        """Ours divided by the peer's, whichever way is better."""
        peer = self.peer_median
        return None if peer is None else self.ours_median / peer

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None where there is none."""
        if self.target is None:
            return None
        value = self.ours_median if self.ratio is None else self.ratio
        return value >= self.target.limit if self.better == "higher" else value <= self.target.limit

    def to_json(self) -> dict[str, object]:
        return {
            "suite": self.suite,
            "workload": self.workload,
            "condition": self.condition,
            "variant": self.variant,
            "unit": self.unit,
            "better": self.better,
            "ours": list(self.ours),
            "ours_median": self.ours_median,
            "peer_name": self.peer_name,
            "peer": list(self.peer),
            "peer_median": self.peer_median,
            "ratio": self.ratio,
            "target": None if self.target is None else self.target.limit,
            "aim": None if self.target is None else self.target.aim,
            "reached": self.reached,
            "note": self.note,
        }
