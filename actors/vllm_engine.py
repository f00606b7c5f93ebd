"""The generator port over vLLM's ``AsyncLLM``.

One request draws all ``n`` samples. Everything that could be at fault in a request is checked
before the engine sees it, since an error inside the engine ends it for everybody. Policy versions::

    base      the model directory the engine was started with
    lora      an adapter of the base; where the engine applies adapters (``enable_lora``), one per
              request, so that versions are sampled side by side
    merged    full weights, loaded in place of the base's

vLLM 0.32 applies adapters on CPU by gathering a copy of their matrices for every token, which makes
it many times slower. There an adapter is merged into the base's weights instead, and loaded like
full weights. While other weights than the base's are loaded, only they can be sampled.

Replacing weights waits for the requests in flight and holds new ones back, so that every completion
comes from exactly one version.

Seeds: a seed makes the draw of one prompt independent of every other draw. It does not promise
equal texts: the batch that a request happens to share decides how sums are rounded.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.aio import Gate, gather
from actors.generator import PolicyVersion
from actors.merge import local_directory, merge_adapter, require_same_shapes
from actors.runtime import engine_arguments, engine_seed
from actors.vllm_process import VllmProcess, runs_on_cpu
from mora_serve.config import PolicySettings
from mora_serve.errors import ConfigError, GenerationError, InvalidRequestError, NotFoundError
from mora_serve.ports import CompletionDelta
from mora_serve.types import (
    Completion,
    Failure,
    FinishReason,
    Generation,
    GenerationRequest,
    Messages,
    Sampling,
)

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.lora.request import LoRARequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Call:
    """One request as the engine takes it."""

    token_ids: list[int]
    params: SamplingParams
    lora: LoRARequest | None
    version: str
    copies: int
    """Greedy decoding draws one sample, which is returned this many times."""


class VllmGenerator:
    """A :class:`~actors.generator.PolicyEngine` on vLLM. ``model_dir`` is a directory or hub id."""

    def __init__(self, settings: PolicySettings, model_dir: str) -> None:
        self._settings = settings
        self._model_dir = model_dir
        self._process = VllmProcess(GenerationError)
        self._tokenizer: Any = None
        self._seeded = True
        self._current = settings.model
        self._base = PolicyVersion(settings.model, "base", None)
        self._weights = self._base
        self._side_by_side = False
        self._is_broken = False
        self._adapters: dict[str, LoRARequest] = {}
        self._adapter_ids = 0
        self._gate = Gate()

    # --- life cycle -------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the engine's processes and load the model, in a thread: it takes long.

        Raises ``ConfigError`` when the model cannot be served.
        """
        _require_model(self._model_dir)
        on_cpu, arguments = await asyncio.to_thread(self._start)
        self._tokenizer = self._engine.get_tokenizer()
        self._side_by_side = bool(arguments["enable_lora"])
        self._seeded = not (on_cpu and arguments["enable_chunked_prefill"])
        if not self._seeded:
            logger.warning("seeds are ignored: chunked prefill on CPU ends the engine with them")
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise ConfigError(f"policy.path must have a chat template, got {self._model_dir}")

    def _start(self) -> tuple[bool, dict[str, Any]]:
        on_cpu = runs_on_cpu()
        arguments = engine_arguments(self._settings, self._model_dir, on_cpu=on_cpu)
        self._process.start(arguments, self._settings.engine_env, on_cpu=on_cpu)
        return on_cpu, arguments

    @property
    def _engine(self) -> Any:
        return self._process.llm

    async def check_health(self) -> None:
        """Raise ``GenerationError`` when the engine is gone or does not answer."""
        if self._is_broken:
            raise GenerationError("the engine is not running")
        await self._process.check_health()

    async def stop(self) -> None:
        self._process.stop()

    def num_unfinished(self) -> int:
        """Samples that the engine works on or has queued."""
        count: int = self._engine.output_processor.get_num_unfinished_requests()
        return count

    # --- policy versions --------------------------------------------------------------------------

    async def models(self, wanted: str | None = None) -> list[str]:
        others = [self._weights.id, *self._adapters]
        return [self._current, *(name for name in others if name != self._current)]

    async def publish(self, versions: Sequence[PolicyVersion], current: str) -> None:
        """Raises ``GenerationError`` when the current version cannot be loaded; the versions that
        were served before stay. Another version that cannot be loaded is left out and logged."""
        by_id = {version.id: version for version in versions}
        chosen = by_id[current]
        beside = self._side_by_side and chosen.kind == "lora"
        weights = self._base if beside else chosen
        if weights != self._weights:
            await self._replace_weights(weights)
        if self._side_by_side and weights.kind == "base":
            for version in versions:
                if version.kind == "lora" and version.id not in self._adapters:
                    await self._load_adapter(version, required=version.id == current)
        for name in set(self._adapters) - set(by_id):
            await self._engine.remove_lora(self._adapters.pop(name).lora_int_id)
        self._current = current

    async def _load_adapter(self, version: PolicyVersion, *, required: bool) -> None:
        from vllm.lora.request import LoRARequest

        self._adapter_ids += 1
        adapter = LoRARequest(version.id, self._adapter_ids, str(version.uri))
        try:
            await self._engine.add_lora(adapter)
        except Exception as error:
            if required or self._engine.errored:
                raise GenerationError(f"policy version {version.id} cannot be loaded") from error
            logger.error("policy version %s cannot be loaded: %s", version.id, error)
            return
        self._adapters[version.id] = adapter

    async def _replace_weights(self, weights: PolicyVersion) -> None:
        """Everything that can be wrong with a version is found before the engine is touched."""
        with tempfile.TemporaryDirectory(prefix="mora-merged-") as scratch:
            path = await asyncio.to_thread(self._weights_of, weights, Path(scratch))
            async with self._gate.closed():
                await self._engine.pause_generation(mode="wait", clear_cache=True)
                try:
                    arguments = {"weights_path": str(path)}
                    await self._engine.collective_rpc("reload_weights", kwargs=arguments)
                except Exception as error:
                    self._is_broken = True
                    raise GenerationError(f"loading {weights.id} broke the engine") from error
                finally:
                    await self._engine.resume_generation()
                self._weights = weights
                self._adapters.clear()
                self._current = weights.id

    def _weights_of(self, version: PolicyVersion, scratch: Path) -> Path:
        """A directory with the full weights of a version, checked to fit the engine's model."""
        base = local_directory(self._model_dir, self._settings.engine.get("revision"))
        if version.uri is None:
            return base
        if version.kind == "lora":
            merge_adapter(base, Path(version.uri), scratch)
            return scratch
        require_same_shapes(base, Path(version.uri))
        return Path(version.uri)

    # --- sampling ---------------------------------------------------------------------------------

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation | Failure]:
        return await gather(self._generate(request) for request in requests)

    async def _generate(self, request: GenerationRequest) -> Generation | Failure:
        from vllm.sampling_params import RequestOutputKind

        async with self._gate.open():
            call = self._prepare(request, RequestOutputKind.FINAL_ONLY)
            if isinstance(call, Failure):
                return call
            try:
                async with aclosing(self._run(call)) as outputs:
                    async for output in outputs:
                        if output.finished:
                            return _generation(call, output)
            except InvalidRequestError as error:
                return Failure(error.code or "invalid_request", error.message, retryable=False)
        return Failure("generation_failed", "the engine gave no answer", retryable=True)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[CompletionDelta, None]:
        from vllm.sampling_params import RequestOutputKind

        async with self._gate.open():
            call = self._prepare(request, RequestOutputKind.DELTA)
            if isinstance(call, Failure):
                kind = NotFoundError if call.code == "model_not_found" else InvalidRequestError
                raise kind(call.message, code=call.code)
            num_tokens = [0] * request.sampling.n
            async with aclosing(self._run(call)) as outputs:
                async for output in outputs:
                    for delta in _deltas(call, output, num_tokens):
                        yield delta

    def _run(self, call: _Call) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one call. Leaving the iteration early aborts the request in the engine."""
        from vllm.inputs import tokens_input

        return self._process.outputs(
            self._engine.generate(
                tokens_input(call.token_ids),
                call.params,
                uuid.uuid4().hex,
                lora_request=call.lora,
            )
        )

    def _prepare(self, request: GenerationRequest, output_kind: Any) -> _Call | Failure:
        """The engine's form of a request, or why it has none."""
        version = request.model or self._current
        adapter = self._adapters.get(version)
        if adapter is None and version != self._weights.id:
            return Failure("model_not_found", "model is not being served", retryable=False)
        if adapter is not None and not Path(adapter.lora_path).is_dir():
            return Failure("model_not_found", "model was removed from storage", retryable=False)
        token_ids = self._encode(request.prompt)
        if isinstance(token_ids, Failure):
            return token_ids
        limit = self._settings.max_model_len
        if len(token_ids) + request.sampling.max_tokens > limit:
            return Failure(
                "context_length_exceeded",
                f"prompt and max_tokens must fit the context of {limit} tokens, got "
                f"{len(token_ids)} + {request.sampling.max_tokens}",
                retryable=False,
            )
        greedy = request.sampling.temperature == 0
        return _Call(
            token_ids,
            self._parameters(request.sampling, token_ids, output_kind),
            adapter,
            version,
            copies=request.sampling.n if greedy else 1,
        )

    def _encode(self, prompt: Messages) -> list[int] | Failure:
        from jinja2 import TemplateError

        turns = [{"role": turn.role, "content": turn.content} for turn in prompt]
        try:
            encoded = self._tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except TemplateError as error:
            return Failure("invalid_prompt", f"prompt breaks the chat template: {error}", False)
        return list(encoded["input_ids"])

    def _parameters(
        self, sampling: Sampling, token_ids: Sequence[int], output_kind: Any
    ) -> SamplingParams:
        from vllm import SamplingParams

        seed = sampling.seed if self._seeded else None
        return SamplingParams(
            n=1 if sampling.temperature == 0 else sampling.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=None if seed is None else engine_seed(seed, token_ids),
            stop=list(sampling.stop),
            output_kind=output_kind,
        )


def _require_model(path: str) -> None:
    if Path(path).is_absolute() and not Path(path).is_dir():
        raise ConfigError(f"policy.path must be a model directory, got {path}")


def _generation(call: _Call, output: RequestOutput) -> Generation:
    drawn = sorted(output.outputs, key=lambda item: item.index)
    completions = tuple(
        Completion(item.text, _finish_reason(item.finish_reason), len(item.token_ids))
        for item in drawn
    )
    return Generation(
        completions * call.copies,
        call.version,
        len(call.token_ids),
        output.num_cached_tokens or 0,
    )


def _deltas(call: _Call, output: RequestOutput, num_tokens: list[int]) -> Iterator[CompletionDelta]:
    """Pieces of one engine output; ``num_tokens`` counts per completion and is updated."""
    for piece in output.outputs:
        for index in range(piece.index, piece.index + call.copies):
            num_tokens[index] += len(piece.token_ids)
            reason = piece.finish_reason
            yield CompletionDelta(
                text=piece.text,
                index=index,
                finish_reason=None if reason is None else _finish_reason(reason),
                num_tokens=num_tokens[index],
                num_prompt_tokens=len(call.token_ids),
                policy_version=call.version,
            )


def _finish_reason(reason: str | None) -> FinishReason:
    if reason == "stop":
        return "stop"
    if reason == "length":
        return "length"
    raise GenerationError(f"the engine ended a completion early ({reason})")
