"""``mora-serve scorers``: train, verify, calibrate, watch and evaluate what scores answers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mora_serve.cli.calibrate import calibrate
from mora_serve.cli.drift import drift
from mora_serve.cli.evaluate_scorers import evaluate_pairs
from mora_serve.cli.presets import presets
from mora_serve.cli.verify import verify
from mora_serve.errors import MoraError
from mora_serve.processes import StopSignals
from mora_serve.stack import run_child

app = typer.Typer(no_args_is_help=True)
app.command("calibrate")(calibrate)
app.command("drift")(drift)
app.command("evaluate")(evaluate_pairs)
app.command("presets")(presets)
app.command("verify")(verify)


@app.command("train", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    data: Annotated[Path, typer.Option(help="Directory with the preference data.")],
) -> None:
    """Train the reward heads on DATA; further options go to `python -m actors.train_heads`."""
    if not data.is_dir():
        raise MoraError(f"--data must be a directory, got {data}")
    command = [sys.executable, "-m", "actors.train_heads", "--data", str(data), *context.args]
    with StopSignals() as signals:
        run_child(command, signals, "training the heads")
