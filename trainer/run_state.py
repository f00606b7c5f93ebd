"""What a checkpoint knows beyond TRL's files: how far the data was read, and what was counted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from trainer.source import Position

STATE_FILE = "mora_state.json"
"""Beside TRL's own files in each checkpoint: position, trained tokens, whether the run is over."""


@dataclass(frozen=True, slots=True)
class RunState:
    """What a checkpoint knows beyond TRL's files."""

    position: Position
    trained_tokens: int
    step: int = 0
    """Optimizer steps taken."""
    waited_s: float = 0.0
    """Time spent waiting for pairs."""
    done: bool = False
    """Whether ``max_steps`` or the end of the data was reached."""

    def save(self, folder: Path) -> None:
        data = {
            "position": self.position.to_json(),
            "trained_tokens": self.trained_tokens,
            "step": self.step,
            "waited_s": self.waited_s,
            "done": self.done,
        }
        (folder / STATE_FILE).write_text(json.dumps(data), "utf-8")

    @classmethod
    def load(cls, folder: Path) -> RunState:
        data = json.loads((folder / STATE_FILE).read_text("utf-8"))
        return cls(
            position=Position.from_json(data["position"]),
            trained_tokens=int(data["trained_tokens"]),
            step=int(data["step"]),
            waited_s=float(data["waited_s"]),
            done=bool(data["done"]),
        )
