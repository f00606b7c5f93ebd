"""``mora-serve export``: scored groups and pairs as a Hugging Face dataset directory."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from mora_serve.calibrators import load_calibrator
from mora_serve.cli.common import (
    DEFAULT_URL,
    ConfigOption,
    KeyOption,
    UrlOption,
    client_for,
    note,
    say,
    settings_from,
)
from mora_serve.config import Settings, dump_settings
from mora_serve.dataset_card import card
from mora_serve.dataset_export import ExportCounts, finished_batch, write_dataset
from mora_serve.errors import MoraError
from mora_serve.processes import StopSignals
from mora_serve.stack import run_child


def export(
    *,
    out: Annotated[Path, typer.Option(help="Directory to make; must not exist or be empty.")],
    batch: Annotated[str | None, typer.Option(help="A finished batch.")] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="A file of preference rows instead: JSONL or Parquet.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="The server's profile: states its configuration.")
    ] = None,
    config: ConfigOption = None,
    push_to_hub: Annotated[
        str | None, typer.Option(help="Also upload to this dataset repository, private.")
    ] = None,
    public: Annotated[bool, typer.Option(help="Make a new repository public.")] = False,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
) -> None:
    """Export a batch for other trainers: load it with `datasets`, train it with plain TRL."""
    if (batch is None) == (pairs is None):
        raise typer.BadParameter("give one of --batch and --pairs")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MoraError(f"--out must be a new or empty directory, got {out}")
    settings = None
    if profile is not None or config is not None:
        settings = settings_from(profile or "embedded", config)
    client = None if batch is None else client_for(url, api_key)
    finished = None if client is None else finished_batch(client, str(batch))
    out.mkdir(parents=True, exist_ok=True)
    with StopSignals() as signals:

        def run_command(command: list[str]) -> None:
            run_child(command, signals, "exporting")

        with signals.raising():
            try:
                counts = write_dataset(client, finished, pairs, out, run_command)
                require_configuration(settings, counts)
            except MoraError:
                # It was new or empty, and must be again for the next try.
                shutil.rmtree(out)
                raise
            configuration = None if settings is None else dump_settings(settings)
            text = card(out, counts, batch=finished, configuration=configuration)
            (out / "README.md").write_text(text, "utf-8")
            _say_what(out, counts)
            if push_to_hub is not None:
                options = ["--public"] if public else []
                module = [sys.executable, "-m", "api.dataset_files"]
                run_command([*module, "push", str(out), push_to_hub, *options])


def require_configuration(settings: Settings | None, counts: ExportCounts) -> None:
    """Raise :class:`MoraError` when the given settings cannot be those of the batch's server."""
    if settings is None or not counts.calibrators:
        return
    known = load_calibrator(settings).version
    if counts.calibrators != {known}:
        raise MoraError(
            "--profile and --config must be the server's, got settings with calibrator "
            f"{known[:12]} while the pairs were made with "
            f"{', '.join(sorted(version[:12] for version in counts.calibrators))}"
        )


def _say_what(out: Path, counts: ExportCounts) -> None:
    if "groups" not in counts.rows and counts.without_rollouts:
        note(
            "no scored groups: the batch was run without include_rollouts "
            '(create it with {"defaults": {"include_rollouts": true}})'
        )
    for name, rows in counts.rows.items():
        say(f'{rows} {name}: datasets.load_dataset("{out}", "{name}")')
