"""``mora-serve diagnose`` and ``rewrite``: one request to a running server, shown as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from mora_serve import tables
from mora_serve.cli.common import (
    DEFAULT_URL,
    JsonOption,
    KeyOption,
    UrlOption,
    client_for,
    out,
    progress_bar,
    read_prompts,
    say_json,
    spinner,
)
from mora_serve.client import Client

READY_SILENCE_S = 5.0
"""How long one answer of ``/readyz`` is waited for."""
PROMPTS_PER_REQUEST = 64
"""Files are sent in pieces of this size, under the server's limit for one request."""

PromptOption = Annotated[
    list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be given repeatedly.")
]
ModelOption = Annotated[str | None, typer.Option(help="Policy version; default: the current one.")]
NOption = Annotated[int | None, typer.Option("-n", help="Rollouts per prompt and round.")]
SeedOption = Annotated[int | None, typer.Option(help="Seed of the sampling.")]
TemperatureOption = Annotated[float | None, typer.Option(help="0 is greedy.")]
MaxTokensOption = Annotated[int | None, typer.Option(help="Completion length limit.")]


def diagnose(
    *,
    file: Annotated[
        Path | None, typer.Argument(help="JSONL with a prompt field, or one prompt a line.")
    ] = None,
    prompt: PromptOption = None,
    limit: Annotated[int | None, typer.Option(help="Only the first prompts of the file.")] = None,
    model: ModelOption = None,
    n: NOption = None,
    temperature: TemperatureOption = None,
    max_tokens: MaxTokensOption = None,
    seed: SeedOption = None,
    rollouts: Annotated[bool, typer.Option(help="Include the answers (with --json).")] = False,
    ready_timeout: Annotated[
        float, typer.Option(help="Seconds to wait for /readyz first; 0: send at once.")
    ] = 0.0,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Diagnose prompts: which rewards can answers to them reach?"""
    prompts = [*(prompt or []), *_file_prompts(file, limit)]
    if not prompts:
        raise typer.BadParameter("give a FILE or --prompt")
    body = {
        "model": model, "n": n, "temperature": temperature, "max_tokens": max_tokens,
        "seed": seed, "include_rollouts": rollouts,
    }  # fmt: skip
    if ready_timeout:
        with spinner("waiting for the server"):
            Client(url, timeout_s=READY_SILENCE_S).wait_ready(ready_timeout)
    items = []
    with progress_bar() as progress:
        task = progress.add_task("diagnosing", total=len(prompts))
        for item in diagnose_all(client_for(url, api_key), prompts, body):
            progress.advance(task)
            items.append(item)
            if as_json:
                say_json(item)
    if not as_json:
        out.print(tables.diagnostics_table(prompts, items))
        out.print(tables.counts_table("Classes", Counter(_class_of(item) for item in items)))


def rewrite(
    *,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The prompt to rewrite.")],
    candidates: Annotated[int | None, typer.Option(help="Candidates to propose.")] = None,
    strategy: Annotated[
        list[str] | None, typer.Option(help="compose, llm or null; may be repeated.")
    ] = None,
    mode: Annotated[str | None, typer.Option(help="simultaneous or sequential pairs.")] = None,
    model: ModelOption = None,
    n: NOption = None,
    temperature: TemperatureOption = None,
    max_tokens: MaxTokensOption = None,
    seed: SeedOption = None,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Rewrite one prompt, and say with which measured gain."""
    body = {
        "prompt": prompt, "candidates": candidates, "strategies": strategy, "mode": mode,
        "model": model, "n": n, "temperature": temperature, "max_tokens": max_tokens, "seed": seed,
    }  # fmt: skip
    with spinner("rewriting"):
        result = client_for(url, api_key).post("/v1/rewrites", body)
    if as_json:
        say_json(result)
        return
    original = result["original"]
    out.print(tables.diagnostics_table([prompt], [{**original, "index": 0}]))
    if result["candidates"]:
        out.print(tables.candidates_table(result))
    accepted = result["accepted"]
    if accepted is None:
        out.print("no rewrite accepted")
    else:
        text = tables.last_turn(result["candidates"][accepted]["prompt"])
        out.print("accepted:", text, markup=False)
    out.print(f"{len(result['pairs'])} preference pair(s)")


def diagnose_all(
    client: Client, prompts: list[Any], body: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Diagnostics of all prompts as they finish; ``index`` is the position in ``prompts``."""
    for start in range(0, len(prompts), PROMPTS_PER_REQUEST):
        piece = prompts[start : start + PROMPTS_PER_REQUEST]
        request = {**body, "prompts": piece, "stream": True}
        for item in client.ndjson("POST", "/v1/diagnostics", request):
            if item.get("object") == "diagnostic":
                yield {**item, "index": item["index"] + start}


def _file_prompts(file: Path | None, limit: int | None) -> list[Any]:
    return [] if file is None else [row["prompt"] for row in read_prompts(file, limit)]


def _class_of(item: dict[str, Any]) -> str:
    return str(item["class"]) if item["status"] == "ok" else "failed"
