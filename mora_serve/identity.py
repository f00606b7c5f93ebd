"""Content hashes and ids: stable names for prompts, templates and objects."""

from __future__ import annotations

import hashlib
import json
import secrets
from typing import Any

from mora_serve.types import Messages


def content_hash(value: Any) -> str:
    """sha256 hex digest of ``value`` as canonical JSON (sorted keys, no spaces, UTF-8)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def prompt_id(prompt: Messages) -> str:
    """Content hash of the prompt messages: equal prompts share it, rows have ids of their own."""
    return content_hash([[message.role, message.content] for message in prompt])


def new_id(prefix: str) -> str:
    """A fresh object id such as ``batch_6f1c…`` (96 random bits)."""
    return f"{prefix}_{secrets.token_hex(12)}"
