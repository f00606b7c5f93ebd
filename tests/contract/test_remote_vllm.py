"""The remote scorer against vLLM's own server, with a tiny random classification model."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch

from actors.runtime import engine_environment
from actors.scoring.encoding import ConversationEncoder
from actors.scoring.remote.scorer import RemoteScorer
from actors.scoring.templates import ChatTemplate
from mora_serve.errors import ScoringError
from mora_serve.free_ports import free_port
from mora_serve.scorer_settings import ColumnSettings, RemoteSettings, ScorerSettings
from mora_serve.types import Message, ScoreGroup
from tests.model_fixtures import byte_tokenizer, llama_sizes

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

TOLERANCE = 5e-4
"""Of float32 logits with a standard deviation of about 3, after four layers."""
MAX_TOKENS = 192
DIMENSIONS = ("first", "second")
START_LIMIT_S = 300.0
PROMPT = (Message("user", "Why is the sky blue?"),)
ANSWERS = ("Rayleigh scattering.", "It is not.", "Because of how light scatters in the air.")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    directory = tmp_path_factory.mktemp("classifier")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    sizes = {**llama_sizes(len(tokenizer)), "hidden_size": 128, "num_labels": 2}
    made = LlamaForSequenceClassification(LlamaConfig(**sizes)).eval()
    made.save_pretrained(directory)
    return made, directory


@pytest.fixture(scope="module")
def url(model: tuple[Any, Path]) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    command += [str(model[1]), "--served-model-name", "tiny", "--runner", "pooling"]
    command += ["--dtype", "float32", "--max-model-len", str(MAX_TOKENS), "--enforce-eager"]
    command += ["--block-size", "32", "--host", "127.0.0.1", "--port", str(port)]
    overrides = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    environment = os.environ | engine_environment(overrides, on_cpu=True)
    server = Popen(command, env=environment, stdout=DEVNULL, stderr=DEVNULL, start_new_session=True)
    try:
        base = f"http://127.0.0.1:{port}"
        wait_until_up(server, base)
        yield base
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_until_up(server: Popen[bytes], base: str) -> None:
    end = time.monotonic() + START_LIMIT_S
    while time.monotonic() < end and server.poll() is None:
        try:
            with urlopen(f"{base}/health", timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.5)
    pytest.fail("vLLM's server did not start")


def scorer(url: str, protocol: str, directory: Path | None, **remote: Any) -> RemoteScorer:
    columns = {"first": ColumnSettings(label=0), "second": ColumnSettings(label=1, sign=-1)}
    server = {"url": f"{url}/{protocol}", "protocol": protocol, "model": "tiny", **remote}
    return RemoteScorer(
        ScorerSettings(
            name="tiny",
            backend="remote",
            model=None if directory is None else str(directory),
            dimensions=DIMENSIONS,
            columns=columns,
            max_tokens=MAX_TOKENS,
            remote=RemoteSettings.model_validate(server),
        )
    )


@torch.inference_mode()
def expected(model: Any) -> list[tuple[float, float]]:
    tokenizer = byte_tokenizer()
    encoded = ConversationEncoder(tokenizer, ChatTemplate(tokenizer)).encode(PROMPT, ANSWERS)
    found = []
    for item in encoded:
        assert item is not None
        tokens = [(*item.lead, *item.prompt, *item.answer)]
        first, second = model(torch.tensor(tokens)).logits[0].tolist()
        found.append((first, -second))
    return found


async def test_scores_of_vllms_server_are_transformers_logits(
    url: str, model: tuple[Any, Path]
) -> None:
    classifier, directory = model
    wanted = expected(classifier)
    for protocol, tokens in (("classify", True), ("pooling", True), ("classify", False)):
        remote = scorer(url, protocol, directory if tokens else None)
        await remote.start()
        long = "word " * MAX_TOKENS
        (rows,) = await remote.score([ScoreGroup(PROMPT, (*ANSWERS, long))])
        for row, values in zip(rows, wanted, strict=False):
            assert [row[name].raw for name in DIMENSIONS] == pytest.approx(values, abs=TOLERANCE)
        assert {score.status for score in rows[-1].values()} == {"truncated"}
        await remote.check_health()
        await remote.close()
    other = scorer(url, "classify", directory, model="another")
    with pytest.raises(ScoringError, match="status 404"):
        await other.start()
    await asyncio.gather(remote.close(), other.close())
