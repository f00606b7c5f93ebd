"""``mora-serve up``: the whole service on this machine, in the foreground."""

from __future__ import annotations

from typing import Annotated

import typer

from mora_serve.cli.common import (
    DEFAULT_PROFILE,
    ConfigOption,
    DataDirOption,
    ProfileOption,
    note,
    say,
    settings_from,
    spinner,
)
from mora_serve.processes import StopSignals
from mora_serve.stack import READY_TIMEOUT_S, Stack


def up(
    *,
    profile: ProfileOption = DEFAULT_PROFILE,
    config: ConfigOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; default 8000.")] = None,
    data_dir: DataDirOption = None,
    ready_timeout: Annotated[
        float, typer.Option(help="Seconds to wait for /readyz.")
    ] = READY_TIMEOUT_S,
) -> None:
    """Start the service, print `ready URL` when it is, and stop all of it on Ctrl-C or SIGTERM."""
    settings = settings_from(profile, config, data_dir=data_dir, host=host, port=port)
    with StopSignals() as signals:
        with Stack(settings, signals, say) as stack:
            with spinner("starting"):
                stack.wait_ready(ready_timeout, progress=note)
            say(f"ready {stack.url}")
            stack.supervise()
            note("stopping")
        note("stopped")
