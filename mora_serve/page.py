"""Pieces of a self-contained HTML page: document, sections, columns, tables.

No script, no font, no image from anywhere; readable in light and dark. Every text that is given is
escaped, except what is named markup.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from importlib import resources

STYLE = "report.css"
FIGURE = re.compile(r"[+-]?\d+(\.\d+)?( %)?( \([^()]*\))?")
"""A number, a share, or either with its interval: ``+0.12 (+0.03 … +0.21)``."""


def document(title: str, sections: Sequence[str]) -> str:
    """A whole page; ``sections`` are markup."""
    style = resources.files("mora_serve").joinpath(f"data/{STYLE}").read_text("utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def section(title: str, intro: str, body: str) -> str:
    """A titled part of the page; ``intro`` and ``body`` are markup."""
    return f"<section><h2>{escape(title)}</h2>{intro}{body}</section>"


def columns(*parts: str) -> str:
    """Markup side by side where there is room; empty parts are left out."""
    return f"<div class='columns'>{''.join(f'<div>{part}</div>' for part in parts if part)}</div>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, wide: bool = False) -> str:
    """A table of plain text, figures aligned to the right."""
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr>{''.join(f'<td{_align(cell)}>{escape(cell)}</td>' for cell in row)}</tr>"
        for row in rows
    )
    kind = " class='wide'" if wide else ""
    return (
        f"<div class='scroll'><table{kind}><thead><tr>{heads}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _align(cell: str) -> str:
    return " class='n'" if FIGURE.fullmatch(cell) else ""
