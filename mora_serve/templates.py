"""The text of the ``compose`` strategy: what is written beside a question to open a dimension.

A table, so that a dimension or a frame is added by adding a line. ``QUALITIES`` holds adjectives
per known dimension; ``FRAMES`` say where the wish for them stands, the question keeping a paragraph
of its own. The wish also names what the prompt reaches already: asked for the missing dimensions
alone, a small policy gives up the one it had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

QUALITIES: Final[Mapping[str, tuple[str, ...]]] = {
    "helpful": ("practical", "concrete"),
    "harmless": ("safe", "considerate"),
    "truthful": ("accurate", "factual"),
}
"""Adjectives by dimension; a dimension that is not listed is its own adjective. Of nine adjectives
and eight frames tried on the embedded policy these cost the reached dimension least."""

FRAMES: Final = (
    "I want {answer}.\n\n{question}",
    "My question needs {answer}.\n\n{question}",
    "{question}\n\nI want {answer}.",
)
"""``{question}`` is the original, ``{answer}`` the wish as :func:`wanted_answer` words it."""


def qualities(dimension: str) -> tuple[str, ...]:
    """Adjectives that ask for a dimension."""
    return QUALITIES.get(dimension, (dimension,))


def wanted_answer(present: Sequence[str], missing: Sequence[str]) -> str:
    """The wish in words: ``a practical answer that is also safe and accurate``.

    Takes adjectives: those of the dimensions to keep, and (one at least) of those to open.
    """
    if not present:
        return f"an answer that is {_listed(missing)}"
    kept = _listed(present)
    article = "an" if kept[0] in "aeio" else "a"
    return f"{article} {kept} answer that is also {_listed(missing)}"


def _listed(words: Sequence[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
