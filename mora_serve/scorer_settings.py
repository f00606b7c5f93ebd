"""Settings of one scorer: which reward model, how it is asked, how its output becomes rewards.

A *backend* says what kind of model it is and how its numbers are read; an *engine* says what runs
it. A *preset* (:mod:`mora_serve.presets`) fills in what a model's card says (template, sign,
labels, probe pair); fields that are given explicitly win over the preset's.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, SecretStr, model_validator

from mora_serve.presets import merge_preset
from mora_serve.sections import Positive, ReplicaSettings, Section

Sign = Literal[1, -1]

TEMPLATES = (
    "chat",
    "hh_dialog",
    "hh_pair",
    "openbmb",
    "pair",
    "pku",
    "qwen3guard",
    "response_only",
)
"""Names of :mod:`actors.scoring.templates`."""

SIGNED_BY_FORM = {
    "cost": "a larger cost is a worse answer",
    "judge": "positive and negative say which verdict is good",
    "labels": "each of columns has its own",
    "attributes": "each of columns has its own",
}
"""Backends that take no ``sign``, and why."""
READS_TEXT = ("seqcls", "labels", "cost", "attributes", "judge", "remote")
USED_BY = {
    "template": READS_TEXT,
    "columns": ("labels", "attributes", "remote"),
    "head": ("seqcls", "labels", "cost", "attributes", "remote"),
    "positive": ("judge",),
    "negative": ("judge",),
    "heads": ("heads",),
    "remote": ("remote",),
}
"""Backends that use a field; the ``head`` of a ``remote`` one is at its server."""
COMMIT = re.compile(r"[0-9a-f]{40}")


class ColumnSettings(Section):
    """Which of a model's outputs is one dimension's reward."""

    label: int | str = 0
    """Column of the output, or its name in the model's ``id2label``."""
    read: Literal["logit", "log_odds"] = "logit"
    """``log_odds``: the logit minus the log-sum-exp of the other columns."""
    sign: Sign = 1
    """-1 where a larger output is a worse answer."""


class HeadSettings(Section):
    """Where a checkpoint keeps a scoring head that is not called ``score``."""

    weight: str
    """Name of its ``[outputs, hidden]`` tensor in the checkpoint, e.g. ``score_head.weight``."""
    bias: str | None = None
    mean: float = 0.0
    """What the model's own normalisation subtracts, and by what it divides."""
    scale: Positive = 1.0


class ProbeSettings(Section):
    """Two answers to one prompt whose order is beyond doubt: a wrong sign shows at load."""

    prompt: str
    better: str
    worse: str


class RemoteSettings(Section):
    """A scorer that another server runs."""

    url: str = Field(pattern=r"^https?://")
    """Of the endpoint itself, for example ``http://rm:8000/classify``."""
    protocol: Literal["get_reward", "classify", "pooling"]
    """OpenRLHF's ``/get_reward``, or vLLM's ``/classify`` and ``/pooling`` (no activation)."""
    model: str | None = None
    """Name under which the server knows the model; ``None``: whatever model it serves."""
    api_key: SecretStr | None = None
    api_key_env: str | None = None
    """Variable that holds the key, where the other settings are no place for it."""
    timeout_s: Positive = 30.0
    """Of one request."""
    max_tries: int = Field(default=4, ge=1)
    """Tries of one request, the first included."""
    retry_budget: float = Field(default=0.2, ge=0.0, le=1.0)
    """Retries per request on average that the scorer allows itself, so that an outage is not
    answered with a multiple of the load."""
    rows_per_request: int = Field(default=32, ge=1)
    max_in_flight: int = Field(default=8, ge=1)
    """Requests at a time."""

    @model_validator(mode="after")
    def _one_key(self) -> RemoteSettings:
        if self.api_key is not None and self.api_key_env is not None:
            raise ValueError("api_key and api_key_env must not both be given")
        return self


class ScorerSettings(Section):
    """One scorer deployment; it may serve several dimensions in one pass."""

    name: str
    preset: str | None = None
    """Name of a preset, see ``mora-serve scorers presets``."""
    backend: Literal[
        "heads", "seqcls", "labels", "cost", "attributes", "judge", "remote", "fake"
    ] = "heads"
    """``seqcls``: one logit. ``labels``: one of several labels. ``cost``: one logit, larger is
    worse. ``attributes``: several regression columns. ``judge``: a causal model's log-odds of two
    answers. ``heads``: linear heads on hidden states. ``remote``: over HTTP."""
    engine: Literal["transformers", "vllm"] = "transformers"
    dimensions: tuple[str, ...]
    model: str | None = None
    """Reward model path or hub id; ``heads``: the backbone directory (``None``: the policy's);
    ``remote``: where the tokenizer of the server's model is, if it is to be used here."""
    revision: str | None = None
    """Commit, tag or branch of a hub model; ``None`` is the hub's default branch."""
    allow_remote_code: bool = False
    """Let the model's own code run. Only presets that say why they need it accept this, and only
    at a commit."""
    template: str | None = None
    """One of :data:`TEMPLATES`, or a text with ``{response}`` and mostly ``{prompt}`` before it;
    ``None``: the model's chat template, or ``hh_dialog`` for a model without one."""
    sign: Sign | None = None
    """``seqcls``: 1 if a larger logit is a better answer; must be given, by a preset at least."""
    columns: dict[str, ColumnSettings] = Field(default_factory=dict)
    """``labels`` and ``attributes``: dimension -> column."""
    head: HeadSettings | None = None
    """``seqcls``, ``cost`` and ``attributes``: a head under a name of its own."""
    positive: tuple[str, ...] = ()
    """``judge``: texts of single tokens that say the answer is good, for example ``" yes"``."""
    negative: tuple[str, ...] = ()
    """``judge``: texts of single tokens that say it is not."""
    heads: str | None = None
    """``heads`` only: directory of the head files; ``None`` is the shipped ``smol-heads``."""
    remote: RemoteSettings | None = None
    """``remote`` only."""
    probe: ProbeSettings | None = None
    """Checked at load; see :mod:`actors.scoring.parity`."""
    reference: str | None = None
    """File of stored probe scores to compare with at load; ``None``: the shipped one, if any."""
    parity: bool = True
    """Refuse to serve when a score depends on its batch, its padding, or differs from the
    reference. Off for experiments only."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    batching: Literal["auto", "packed", "padded", "single"] = "auto"
    """``packed``: answers share the encoding of their prompt. ``padded``: rows of similar length.
    ``single``: one row at a time. ``auto``: packed where the model allows it, and the only one for
    the ``vllm`` engine, which schedules by itself."""
    token_budget: int = Field(default=2048, ge=64)
    """Tokens per forward pass, packed or padded."""
    max_tokens: int = Field(default=1024, ge=32)
    """Tokens of prompt plus answer; longer prompts lose their left end, longer answers fail."""
    num_threads: int = Field(default=2, ge=1)
    """``transformers`` engine. On CPU the ``vllm`` engine takes every core it may use."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """``vllm`` engine: passed to its ``EngineArgs`` unchanged, except for those that follow from
    the settings above."""
    engine_env: dict[str, str] = Field(default_factory=dict)
    """``vllm`` engine: environment of its processes."""
    timeout_s: Positive = 120.0
    fake_delay_ms: float = Field(default=0.0, ge=0.0)
    replica: ReplicaSettings = ReplicaSettings()

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        return merge_preset(data) if isinstance(data, dict) and data.get("preset") else data

    @model_validator(mode="after")
    def _complete(self) -> ScorerSettings:
        needs = {
            "seqcls": ("model", "sign"),
            "labels": ("model", "columns"),
            "cost": ("model",),
            "attributes": ("model", "columns"),
            "judge": ("model", "template", "positive", "negative"),
            "remote": ("remote",),
        }
        for field in needs.get(self.backend, ()):
            if not getattr(self, field):
                raise ValueError(f"{field} must be given for the backend {self.backend!r}")
        if not self.dimensions or len(set(self.dimensions)) != len(self.dimensions):
            raise ValueError("dimensions must be distinct and not empty")
        if self.backend in ("seqcls", "cost", "judge") and len(self.dimensions) != 1:
            raise ValueError(f"dimensions must be one dimension for the backend {self.backend!r}")
        if self.backend == "remote" and not self.columns and len(self.dimensions) != 1:
            raise ValueError("columns must be given for a remote scorer of several dimensions")
        if self.backend in ("labels", "attributes") or self.columns:
            missing = [name for name in self.dimensions if name not in self.columns]
            if missing:
                raise ValueError(f"columns must name a column for {missing[0]!r}")
        return self

    @model_validator(mode="after")
    def _runnable_by_vllm(self) -> ScorerSettings:
        """Refuse what the ``vllm`` engine cannot do."""
        if self.engine == "vllm":
            if self.backend == "heads" or self.head is not None:
                what = "heads on inner layers" if self.head is None else "heads under other names"
                raise ValueError(f"engine must be transformers for {what}, got vllm")
            if self.batching != "auto":
                raise ValueError(f"batching must be auto for engine vllm, got {self.batching}")
        return self

    @model_validator(mode="after")
    def _all_used(self) -> ScorerSettings:
        """Refuse settings of other backends and engines. The fake, which scores no text, takes all:
        it stands in for any scorer."""
        if self.backend == "fake":
            return self
        for field, backends in USED_BY.items():
            if getattr(self, field) and self.backend not in backends:
                raise ValueError(f"{field} must be left out for the backend {self.backend!r}")
        if self.backend == "remote" and (self.engine != "transformers" or self.batching != "auto"):
            raise ValueError("engine and batching must be left out for the backend 'remote'")
        if self.engine != "vllm" and (self.engine_args or self.engine_env):
            raise ValueError("engine_args and engine_env must be left out without engine vllm")
        return self

    @model_validator(mode="after")
    def _unambiguous(self) -> ScorerSettings:
        """Refuse what would be ignored, or read otherwise than it was meant."""
        if self.sign is not None and self.backend in SIGNED_BY_FORM:
            why = SIGNED_BY_FORM[self.backend]
            raise ValueError(f"sign must be left out for the backend {self.backend!r}: {why}")
        if self.backend == "remote" and (self.sign is None) != bool(self.columns):
            raise ValueError("either sign or columns must be given for the backend 'remote'")
        if self.backend == "attributes" or (self.remote and self.remote.protocol == "get_reward"):
            odd = [name for name, column in self.columns.items() if column.read != "logit"]
            if odd:
                raise ValueError(f"columns.{odd[0]}.read must be logit: the outputs do not compete")
        if self.template is not None and self.template not in TEMPLATES:
            _check_literal(self.template)
        if self.allow_remote_code:
            self._check_remote_code()
        return self

    def _check_remote_code(self) -> None:
        if self.preset is None:
            raise ValueError("allow_remote_code must be false without a preset that says why")
        local = self.model is not None and self.model.startswith(("/", "."))
        if not local and not COMMIT.fullmatch(self.revision or ""):
            raise ValueError(
                "revision must be a commit of 40 hex digits with allow_remote_code: a branch would "
                "run whatever code is pushed to it"
            )


def _check_literal(text: str) -> None:
    before, found, after = text.partition("{response}")
    if not found or "{response}" in after or "{prompt}" in after or before.count("{prompt}") > 1:
        raise ValueError(
            f"template must be one of {', '.join(TEMPLATES)}, or a text that holds {{response}} "
            "once and {prompt} at most once, before it"
        )
