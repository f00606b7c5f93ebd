"""What the ledger within one process keeps of a batch and of its shards."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from mora_serve.store.rate import RateRing
from mora_serve.store.steps import BatchState, PairPart, SealedShard, ShardSpec, StoredRow


@dataclass(slots=True)
class MemoryShard:
    spec: ShardSpec
    rows: dict[int, StoredRow] = field(default_factory=dict)
    token: int = 0
    worker: str | None = None
    expires_at: float = 0.0
    sealed: SealedShard | None = None
    tries: dict[int, tuple[int, int | None]] = field(default_factory=dict)
    """Line -> number of tries, and the token of the last one."""

    def leased(self, now: float) -> bool:
        return self.worker is not None and self.expires_at > now


@dataclass(slots=True)
class MemoryBatch:
    state: BatchState
    expires_at: float
    shards: list[MemoryShard] = field(default_factory=list)
    tail: list[dict[str, Any]] = field(default_factory=list)
    parts: list[PairPart] = field(default_factory=list)
    readers: dict[str, tuple[int, float]] = field(default_factory=dict)
    claim_until: float = 0.0
    claimer: str = ""
    claims: int = 0
    claim_tries: int = 0
    postponed_at: float | None = None
    last_leased: int = 0
    outcome: str = "completed"
    input_bytes: int = 0
    input_rows: int = 0
    working_since: float | None = None
    ring: RateRing = field(default_factory=RateRing)

    def trim(self, now: float) -> None:
        """Drop pairs that lie in a part and that no reader is still to get."""
        positions = [seq + 1 for seq, until in self.readers.values() if until > now]
        keep_from = min([self.state.pairs_sealed, *positions])
        if self.tail:
            del self.tail[: max(0, keep_from - self.tail[0]["seq"])]

    def snapshot(self, now: float) -> BatchState:
        """The state as it is read at ``now``, apart from later changes."""
        state = self.state
        return replace(
            state,
            doc=dict(state.doc),
            options=dict(state.options),
            stamps=dict(state.stamps),
            errors=list(state.errors),
            usage=dict(state.usage),
            classes=dict(state.classes),
            now=now,
        )
