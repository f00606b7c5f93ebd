"""Where preference pairs come from: a batch's growing stream or a finished file, in one order.

Every worker reads the same ordered rows and keeps its own: consecutive accepted rows form groups of
``world_size`` rows, and rank ``r`` takes the ``r``-th of each group. Without a filter that is
``seq % world_size == rank``. A group is handed out only when it is complete, so that all ranks see
the same number of rows without talking to each other; fewer than ``world_size`` rows at the end of
a pass are left over and counted. A position therefore means the same to every rank, and to a later
run with another number of ranks.

Reading is separated from deciding: :class:`PairSource` owns the order, the partition and the waits,
and gets the rows through :class:`Feed`. It knows nothing of TRL, torch or event loops.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from mora_serve.errors import StorageError

Row = Mapping[str, Any]
"""A preference row: ``prompt``, ``chosen``, ``rejected`` as message lists, ``seq`` and more."""
Margins = Mapping[str, float]
"""Dimension -> how much higher chosen is rewarded than rejected, in z."""

MIN_WAIT_S = 0.05
MAX_WAIT_S = 1.0
"""Bounds of the pause between two looks at a stream that has nothing new; it doubles in between."""


class Feed(Protocol):
    """Rows by ``seq``, from 0 without gaps."""

    def read(self, after: int, limit: int) -> Sequence[Row]:
        """Rows with ``seq > after`` in ascending order; empty when there are none yet."""
        ...

    def is_finished(self) -> bool:
        """True when no further row can appear."""
        ...


@dataclass(frozen=True, slots=True)
class Position:
    """What has been consumed: every row of earlier passes, and rows up to ``seq`` of this one."""

    number: int = 0
    """Pass, from 0: epochs times stages."""
    seq: int = -1
    """Last consumed row of this pass; -1 at its start."""

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, int]) -> Position:
        return cls(number=int(data["number"]), seq=int(data["seq"]))


@dataclass(slots=True)
class SourceCounts:
    """What the running iteration has seen, for metrics and the job's report."""

    rows: int = 0
    """Rows this rank handed out."""
    skipped: int = 0
    """Rows that the filter refused, for example because the prompt fills the context; in the first
    epoch, so that each counts once."""
    left_over: int = 0
    """Rows at the ends of passes that did not fill a group of ``world_size``."""
    waited_s: float = 0.0
    """Time spent waiting for rows that were not there yet."""


def accept_all(_row: Row) -> bool:
    """The filter that refuses nothing."""
    return True


@dataclass(slots=True)
class PairSource:
    """Iterable over this rank's rows with the position behind each, for example::

    source = PairSource(feed, rank=0, world_size=2, num_epochs=1)
    for row, position in source.rows(Position()): ...
    """

    feed: Feed
    rank: int = 0
    world_size: int = 1
    num_epochs: int = 1
    stages: tuple[str, ...] = ()
    """One pass per stage and epoch, over the rows whose ``stage`` it is; a stage has all its epochs
    before the next one. Empty: all rows."""
    accept: Callable[[Row], bool] = accept_all
    """Must give the same answer on every rank."""
    check: Callable[[], None] = lambda: None
    """Called at each wait, of which :attr:`counts` tells; raises to give up, for example when the
    job is cancelled."""
    clock: Callable[[], float] = time.monotonic
    wait: Callable[[float], None] = time.sleep
    page: int = 64
    """Rows asked for at a time."""
    counts: SourceCounts = field(default_factory=SourceCounts)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be in [0, {self.world_size}), got {self.rank}")

    @property
    def num_passes(self) -> int:
        return self.num_epochs * max(1, len(self.stages))

    def stages_behind(self, position: Position) -> tuple[str, ...]:
        """The stages of which a run that ends at ``position`` has seen no row."""
        return self.stages[position.number // self.num_epochs + 1 :]

    def rows(self, start: Position) -> Iterator[tuple[Row, Position]]:
        """This rank's rows behind ``start``, each with the position after its group.

        Waits while the feed is not finished; ends when all passes are done. Raises
        :class:`~mora_serve.errors.StorageError` when the feed leaves a gap.
        """
        for number in range(start.number, self.num_passes):
            after = start.seq if number == start.number else -1
            stage = self.stages[number // self.num_epochs] if self.stages else None
            group: list[Row] = []
            for row in self._pass(after):
                if stage is not None and row.get("stage") != stage:
                    continue
                if not self.accept(row):
                    self.counts.skipped += number % self.num_epochs == 0
                    continue
                group.append(row)
                if len(group) == self.world_size:
                    self.counts.rows += 1
                    yield group[self.rank], Position(number, int(row["seq"]))
                    group = []
            self.counts.left_over += len(group)

    def _pass(self, after: int) -> Iterator[Row]:
        """All rows behind ``after``, until the feed is finished."""
        finished = False
        while True:
            page = self.feed.read(after, self.page)
            for row in page:
                if int(row["seq"]) != after + 1:
                    raise StorageError(f"pair stream must be gapless, got {row['seq']} on {after}")
                after += 1
                yield row
            if not page:
                if finished:
                    return
                # Read once more when finished: rows may have been appended before it was asked.
                finished = self.feed.is_finished()
                if not finished:
                    self._await_rows(after)

    def _await_rows(self, after: int) -> None:
        """Return when a row behind ``after`` can be read or the feed is finished.

        The time is counted as it passes, so that whoever looks meanwhile sees how long it is.
        """
        counted = self.clock()
        pause = MIN_WAIT_S
        while not self.feed.is_finished() and not self.feed.read(after, 1):
            self.check()
            self.wait(pause)
            pause = min(2 * pause, MAX_WAIT_S)
            now = self.clock()
            self.counts.waited_s += now - counted
            counted = now
        self.counts.waited_s += self.clock() - counted


class ResumableRows:
    """Rows of a source that can be iterated again and knows what has been trained on.

    Consumers of a streaming dataset look at the first row several times before they train. Each
    iteration begins behind what was trained on, at :attr:`start`; :meth:`consumed` says that rows
    of the running iteration went into a step, and :attr:`position` is the place to resume from.
    """

    def __init__(self, source: PairSource, start: Position) -> None:
        self.source = source
        self.start = start
        self.position = start
        """Behind the last consumed row."""
        self._ahead: deque[tuple[Position, Margins]] = deque()

    def __call__(self) -> Iterator[dict[str, Any]]:
        self.start = self.position
        self._ahead.clear()
        self.source.counts = SourceCounts(waited_s=self.source.counts.waited_s)
        for row, position in self.source.rows(self.start):
            self._ahead.append((position, margins(row)))
            yield {name: row[name] for name in ("prompt", "chosen", "rejected")}

    def __reduce__(self) -> tuple[Any, ...]:
        """What ``datasets`` fingerprints instead of us: a live feed cannot be pickled."""
        source = self.source
        return tuple, ((self.start.number, self.start.seq, source.rank, source.world_size),)

    def consumed(self, num_rows: int) -> list[Margins]:
        """Count the next rows as trained on; returns what each teaches."""
        if num_rows > len(self._ahead):
            raise ValueError(f"{num_rows} rows consumed of {len(self._ahead)} handed out")
        taken = [self._ahead.popleft() for _ in range(num_rows)]
        if taken:
            self.position = taken[-1][0]
        return [taught for _, taught in taken]


def margins(row: Row) -> Margins:
    """Calibrated reward of chosen minus rejected, of the dimensions on which both have one."""
    chosen, rejected = row.get("chosen_scores"), row.get("rejected_scores")
    if not isinstance(chosen, Mapping) or not isinstance(rejected, Mapping):
        return {}
    values = {name: (_value(chosen[name]), _value(rejected.get(name))) for name in chosen}
    return {
        name: better - worse
        for name, (better, worse) in values.items()
        if better is not None and worse is not None
    }


def _value(score: Any) -> float | None:
    value = score.get("value") if isinstance(score, Mapping) else score
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


@dataclass(frozen=True, slots=True)
class ListFeed:
    """A finished file's rows; they are numbered by their place."""

    items: Sequence[Row]

    def read(self, after: int, limit: int) -> Sequence[Row]:
        first = after + 1
        page = self.items[first : first + limit]
        return [{**row, "seq": first + place} for place, row in enumerate(page)]

    def is_finished(self) -> bool:
        return True
