"""``mora-serve models``: prepare the embedded model, list what can be sampled, choose from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer

from mora_serve import tables
from mora_serve.cli.common import (
    DEFAULT_PROFILE,
    DEFAULT_URL,
    ConfigOption,
    DataDirOption,
    JsonOption,
    KeyOption,
    ProfileOption,
    UrlOption,
    client_for,
    note,
    out,
    say,
    say_json,
    settings_from,
)
from mora_serve.processes import StopSignals
from mora_serve.stack import prepare_model, resolve_settings

app = typer.Typer(no_args_is_help=True)


@app.command("prepare")
def prepare(
    profile: ProfileOption = DEFAULT_PROFILE,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Default: the configured model directory.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace a directory that is damaged.")] = False,
) -> None:
    """Turn the packaged model weights into a model directory; verifies one that exists."""
    settings = resolve_settings(settings_from(profile, config, data_dir=data_dir))
    directory = out_dir or Path(settings.policy.path or "")
    if out_dir is None and (settings.policy.backend == "fake" or not directory.is_absolute()):
        raise typer.BadParameter("this profile has no local model directory; give --out")
    with StopSignals() as signals:
        prepare_model(directory, signals, note, *(["--force"] if force else []))
    say(str(directory))


@app.command("activate")
def activate(
    version: Annotated[str, typer.Argument(help="A published version, or the base model.")],
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a version the one that is sampled by default; an older one to roll back."""
    model = client_for(url, api_key).post(f"/v1/models/{quote(version)}/activate")
    say_json(model) if as_json else say(str(model["id"]))


@app.command("list")
def list_models(
    url: UrlOption = DEFAULT_URL, api_key: KeyOption = None, as_json: JsonOption = False
) -> None:
    """List the policy versions that a running server can sample."""
    models = client_for(url, api_key).get("/v1/models")
    if as_json:
        say_json(models)
        return
    made = tables.table("Policy versions", "model", "kind", "parent", "current")
    for model in models.get("data", []):
        current = "yes" if model.get("current") else ""
        cells = (str(model.get(key) or "") for key in ("id", "kind", "parent"))
        tables.add_row(made, *cells, current)
    out.print(made)
