"""Finished pieces of an experiment as JSON files, so that a second start goes on where one stopped.

A cell is made once and whole (written beside its place, then renamed). The first start writes what
the experiment is made of; a start with anything else on the same directory is refused, since its
cells would answer another question.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mora_serve.errors import MoraError
from mora_serve.identity import content_hash

Json = dict[str, Any]
CONFIGURATION = "configuration.json"


class Cells:
    """Cells below a directory, for example ``cells("seed-0/batch-mora", run_batch)``."""

    def __init__(self, root: Path, configuration: Mapping[str, Any]) -> None:
        """Raises :class:`MoraError` when ``root`` holds cells of another configuration."""
        self.root = root
        self.fingerprint = content_hash(dict(configuration))
        root.mkdir(parents=True, exist_ok=True)
        place = root / CONFIGURATION
        known = json.loads(place.read_text("utf-8")) if place.exists() else None
        if known is None:
            _write(place, dict(configuration))
        elif content_hash(known) != self.fingerprint:
            other = next(
                k for k in {**known, **configuration} if known.get(k) != configuration.get(k)
            )
            raise MoraError(
                f"--out must be new or hold the same experiment, got another {other} in {root}"
            )

    def __call__(self, name: str, make: Callable[[], Json]) -> Json:
        """The content of the cell, made now unless it is there."""
        if not self.has(name):
            place = self._place(name)
            place.parent.mkdir(parents=True, exist_ok=True)
            _write(place, make())
        return self.read(name)

    def has(self, name: str) -> bool:
        """Whether the cell is finished."""
        return self._place(name).exists()

    def read(self, name: str) -> Json:
        """The content of a finished cell."""
        return _read(self._place(name))

    def adopt(self, other: Path, patterns: Sequence[str], differing: Collection[str]) -> None:
        """Copy what matches from cells of an experiment that differs in ``differing`` at most.

        Raises :class:`MoraError` when it differs in anything else, or holds no experiment.
        """
        try:
            theirs = json.loads((other / CONFIGURATION).read_text("utf-8"))
        except (OSError, ValueError):
            raise MoraError(f"--batches-from must be an experiment's --out, got {other}") from None
        ours = json.loads((self.root / CONFIGURATION).read_text("utf-8"))
        for name in sorted((theirs.keys() | ours.keys()) - set(differing)):
            if theirs.get(name) != ours.get(name):
                raise MoraError(f"--batches-from must have the same {name}, got another in {other}")
        for pattern in patterns:
            for place in sorted(other.glob(pattern)):
                name = str(place.relative_to(other).with_suffix(""))
                self(name, partial(_read, place))

    def _place(self, name: str) -> Path:
        return self.root / f"{name}.json"


def _read(place: Path) -> Json:
    found: Json = json.loads(place.read_text("utf-8"))
    return found


def _write(place: Path, content: Mapping[str, Any]) -> None:
    draft = place.with_name(f".{place.name}.partial")
    draft.write_text(json.dumps(content, ensure_ascii=False) + "\n", "utf-8")
    draft.replace(place)
