"""The command tree: which function answers to which name."""

from __future__ import annotations

from typing import Annotated

import typer

from mora_serve import __version__
from mora_serve.cli import config, models, requests, scorers, train, up
from mora_serve.cli.demo import demo
from mora_serve.cli.evaluate import evaluate
from mora_serve.cli.export import export

app = typer.Typer(
    name="mora-serve",
    help="Multi-reward pre-sampling, prompt rewriting and DPO as a service.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"mora-serve {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Multi-reward pre-sampling, prompt rewriting and DPO as a service."""


app.command("up")(up.up)
app.command("demo")(demo)
app.command("diagnose")(requests.diagnose)
app.command("rewrite")(requests.rewrite)
app.command("train")(train.train)
app.command("evaluate")(evaluate)
app.command("export")(export)
app.command("config")(config.config)
app.add_typer(models.app, name="models", help="Model directories of this machine.")
app.add_typer(scorers.app, name="scorers", help="Reward heads and their calibration.")
