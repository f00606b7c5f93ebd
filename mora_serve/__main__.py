"""``python -m mora_serve`` is the ``mora-serve`` command."""

from mora_serve.cli import main

main()
