"""The ``mora-serve`` command: starts the service and talks to a running one.

Commands that start something (``up``, ``demo``, ``models``, ``scorers train``) run our other
packages as processes; the rest are clients of the REST API. One module per command group; errors
become one line on stderr and an exit code other than 0 here and nowhere else.
"""

from __future__ import annotations

import sys

from mora_serve.cli.app import app
from mora_serve.cli.common import show_error
from mora_serve.errors import MoraError
from mora_serve.stack import Interrupted

EXIT_INTERRUPTED = 130


def main() -> None:
    """Run the command line and exit with its status."""
    try:
        app()
    except (Interrupted, KeyboardInterrupt):
        show_error("interrupted")
        sys.exit(EXIT_INTERRUPTED)
    except MoraError as error:
        show_error(str(error))
        sys.exit(1)
