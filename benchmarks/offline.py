"""vLLM's offline ``LLM.chat`` in a process of its own, driven over standard input and output.

Started by :mod:`benchmarks.gateway` with the settings of the served engine in its environment, so
that both engines have the same arguments and threads. One JSON object a line: in, a job
``{"conversations": [[{"role", "content"}]], "n", "temperature", "top_p", "max_tokens", "stop"}``;
out, a result ``{"seconds", "tokens", "rollouts"}``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from mora_serve.config import ENV_CONFIG, settings_from_dump


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the engine's own prints must not mix with the answers
    from actors.runtime import engine_arguments, engine_environment

    settings = settings_from_dump(json.loads(os.environ[ENV_CONFIG]))
    policy = settings.policy
    os.environ.update(engine_environment(policy.engine_env, on_cpu=True))
    from vllm import LLM

    arguments = engine_arguments(policy, str(policy.path), on_cpu=True)
    arguments.pop("enable_log_requests")
    engine = LLM(**arguments)
    answers.write("ready\n")
    for line in sys.stdin:
        answers.write(json.dumps(run(engine, json.loads(line))) + "\n")


def run(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Generate one job and time it."""
    from vllm import SamplingParams

    params = SamplingParams(
        n=job["n"],
        temperature=job["temperature"],
        top_p=job["top_p"],
        max_tokens=job["max_tokens"],
        stop=job["stop"],
    )
    began = time.perf_counter()
    outputs = engine.chat(job["conversations"], params, use_tqdm=False)
    seconds = time.perf_counter() - began
    drawn = [completion for output in outputs for completion in output.outputs]
    tokens = sum(len(completion.token_ids) for completion in drawn)
    return {"seconds": seconds, "tokens": tokens, "rollouts": len(drawn)}


if __name__ == "__main__":
    main()
