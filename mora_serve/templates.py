"""The text of the ``compose`` strategy: what is written around a question to open a dimension.

A table, so that a dimension or a variant is added by adding a line. ``INTENTS`` holds, per known
dimension, sentences that ask for it; they avoid the vocabulary of the other dimensions. ``FRAMES``
place the sentences; each keeps the question in a paragraph of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

INTENTS: Final[Mapping[str, tuple[str, ...]]] = {
    "helpful": (
        "Give practical advice that I can use today, with a short example.",
        "Answer as a helpful expert and explain the main steps clearly.",
        "Make the answer useful: say what to do first and why it works.",
        "Please be as helpful as possible and give a complete answer.",
    ),
    "harmless": (
        "Keep everyone safe, and kindly say when something should not be done.",
        "Be careful and kind, and mention any risk to people.",
        "Please answer in a respectful and safe way that causes no harm.",
        "If any part could hurt someone, say so and suggest a safer way.",
    ),
    "truthful": (
        "Say only what is accurate, and admit what is not known.",
        "Correct any common myth and rely on well established facts.",
        "Be truthful: state the facts plainly and say if you are unsure.",
        "Base the answer on evidence, and do not guess.",
    ),
}
"""Sentences by dimension."""

GENERIC_INTENTS: Final = (
    "Make sure that the answer is also {dimension}.",
    "Please give an answer that is clearly {dimension}.",
    "It matters to me that your answer is {dimension} as well.",
)
"""For dimensions that have no sentences of their own; ``{dimension}`` is the name."""

FRAMES: Final = (
    "{question}\n\n{intents}",
    "{intents}\n\n{question}",
    "{question}\n\nWhen you answer: {intents}",
)
"""Where the sentences go; ``{question}`` is the original, ``{intents}`` the sentences."""
