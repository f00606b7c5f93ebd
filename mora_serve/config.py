"""Settings of the whole service: one frozen tree, loaded once by a composition root.

Order of precedence: arguments, ``MORA_*`` environment (``__`` nests), the ``--config`` YAML file,
the profile's YAML, defaults. Unknown keys are refused wherever they appear, with the nearest valid
key.
Components receive their own section, never the root.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, SecretStr, ValidationError, model_validator

from mora_serve.dpo_loss import DpoLoss
from mora_serve.errors import ConfigError
from mora_serve.scorer_settings import ScorerSettings
from mora_serve.sections import Positive, ReplicaSettings, Section
from mora_serve.settings_sources import merge, nearest_key, read_environ, read_yaml

ENV_PREFIX = "MORA_"
ENV_CONFIG = "MORA_CONFIG_JSON"
"""How a parent hands its resolved settings to a child process; never set by users."""
ENV_PROFILE = "MORA_PROFILE"
"""Default of the command line's ``--profile``."""
CLIENT_VARIABLES = ("MORA_URL", "MORA_API_KEY")
"""Where the command line's REST commands find a running server; not settings of the service."""
RESERVED_VARIABLES = frozenset({ENV_CONFIG, ENV_PROFILE, *CLIENT_VARIABLES})
SECRETS = ("server.api_keys", "redis.url")
"""Settings whose values appear in no message."""
PROFILES = ("embedded", "fake", "gpu")

Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class ServerSettings(Section):
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    api_keys: tuple[SecretStr, ...] = ()
    """Accepted bearer tokens; empty accepts any header and none."""
    max_body_bytes: int = Field(default=16 * 2**20, ge=1024)
    """Limit of JSON bodies; uploads have ``max_upload_bytes``."""
    max_upload_bytes: int = Field(default=512 * 2**20, ge=1024)
    max_uploads: int = Field(default=4, ge=1)
    """Concurrent uploads of files, or of parts, per gateway replica."""
    max_part_bytes: int = Field(default=64 * 2**20, ge=1024)
    """One part of an upload in parts."""
    max_parts_bytes: int = Field(default=8 * 2**30, ge=1024)
    """All parts of an upload together."""
    upload_lifetime_s: int = Field(default=3600, ge=1)
    """An upload in parts that is not completed within this time expires."""
    max_prompts: int = Field(default=256, ge=1)
    """Prompts in one synchronous request."""
    max_rows: int = Field(default=10_000, ge=1)
    """Rows in one synchronous ``/v1/scores`` request."""
    reward_on_failure: Literal["error"] | None = "error"
    """``/get_reward`` where a score is not valid: the call fails and names the rows, or (``null``)
    the entries of those rows are null. A number in their place would train on an outage."""
    max_in_flight_prompts: int = Field(default=512, ge=1)
    """Prompts being worked on per gateway replica; beyond it requests get 429."""
    max_queued_bytes: int = Field(default=128 * 2**20, ge=1)
    """Bytes of the synchronous requests being worked on per gateway replica; beyond it 429."""
    replicas: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=0.0, ge=0.0)
    """CPUs that Ray reserves for one gateway replica."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom Ray resources of one gateway replica."""
    haproxy: bool = True
    """Serve HTTP through Ray Serve's HAProxy instead of its Python proxy."""
    file_uri_prefixes: tuple[str, ...] = ()
    """Prefixes under which ``POST /v1/files`` may register a ``uri``; empty allows none."""


class RedisSettings(Section):
    url: SecretStr | None = None
    """``redis://...``; ``None`` starts a supervised server under the data directory."""
    key_prefix: str = "mora"


class BlobSettings(Section):
    url: str | None = None
    """fsspec URL of the root; ``None`` is ``<data_dir>/blobs``."""
    options: dict[str, Any] = Field(default_factory=dict)


class PolicySettings(Section):
    """The policy being sampled and the engine that hosts it."""

    backend: Literal["vllm", "fake"] = "vllm"
    model: str = "SmolLM2-135M-Instruct"
    """Public name, the id of the base version in ``/v1/models``."""
    path: str | None = None
    """Model directory or hub id; ``None`` is ``<data_dir>/models/<model>``."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """Passed to vLLM's ``AsyncEngineArgs`` unchanged."""
    engine_env: dict[str, str] = Field(default_factory=dict)
    """Environment of the engine's process, for example ``VLLM_CPU_KVCACHE_SPACE``."""
    max_model_len: int = Field(default=1024, ge=16)
    lora: bool = True
    max_loras: int = Field(default=2, ge=1)
    max_lora_rank: int = Field(default=16, ge=1)
    system_prompt: str | None = None
    """Prepended to conversations without a system turn, in generation and in DPO pairs' prompts."""
    fake_delay_ms: float = Field(default=0.0, ge=0.0)
    """Fake backend only: time each request takes."""
    replica: ReplicaSettings = ReplicaSettings()


class SamplingSettings(Section):
    """Defaults of a request that leaves a field null."""

    n: int = Field(default=8, ge=1, le=256)
    """Rollouts per prompt and round."""
    n_max: int = Field(default=24, ge=1, le=1024)
    """Rollouts per prompt at most, over all rounds of adaptive pre-sampling."""
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    max_tokens: int = Field(default=64, ge=1)
    stop: tuple[str, ...] = ()
    """Strings that end an answer, for example a blank line; not part of its text."""


class MethodSettings(Section):
    """Parameters of MORA (DESIGN section 2)."""

    calibrator: str | None = None
    """Calibrator file; ``None`` is the one shipped with the embedded heads. ``identity`` takes raw
    rewards for z: what a server runs with until ``mora-serve scorers calibrate`` has fitted one."""
    classifier: Literal["posterior", "spread", "fixed"] = "posterior"
    p_class: float = Field(default=0.8, gt=0.5, lt=1.0)
    min_reliability: Probability = 0.5
    min_ceiling: dict[str, float] = Field(default_factory=dict)
    """Absolute bounds per dimension in z; absent ones default to the pool's median prompt."""
    min_conflict: Probability = 0.3
    strategies: tuple[Literal["compose", "llm", "null"], ...] = ("compose",)
    rewriter_model: str | None = None
    """Version that the ``llm`` strategy asks for rewrites; ``None`` is the current policy."""
    num_candidates: int = Field(default=3, ge=1, le=16)
    rewrite_flat: bool = False
    n_confirm: int = Field(default=16, ge=4)
    """Fresh rollouts of the candidate and of the original on which acceptance is decided."""
    acceptance: Literal["confirmed", "all"] = "confirmed"
    """``all`` accepts the first candidate unmeasured, for experiments that ask what measuring is
    worth."""
    min_gain: float = 0.0
    max_ceiling_drop: float = Field(default=0.5, ge=0.0)
    confidence: Probability = 0.9
    weights: dict[str, float] = Field(default_factory=dict)
    """Utility weights by dimension; absent ones are 1."""
    mode: Literal["simultaneous", "sequential"] = "simultaneous"
    min_margin: float = Field(default=0.5, ge=0.0)
    tolerance: float = Field(default=0.5, ge=0.0)
    length_control: bool = True


class RunnerSettings(Section):
    """Batch runners and the ledger."""

    shard_rows: int = Field(default=256, ge=1)
    lease_ttl_s: Positive = 30.0
    max_in_flight_rows: int = Field(default=8, ge=1)
    max_stream_tail: int = Field(default=10_000, ge=1)
    """Unsealed pairs kept in Redis per batch before runners wait for readers."""
    max_infra_retries: int = Field(default=8, ge=0)
    """Repeats of a row that engines answer with an error, half a minute's worth of backoff."""
    unavailable_timeout_s: Positive = 900.0
    """How long a row waits while nothing answers it: full queues, no replica, no storage."""
    max_poison_tries: int = Field(default=3, ge=1)
    """Engines, or else runners, that may end under a row before it is given up."""
    poll_interval_s: Positive = 0.5
    completion_window_s: Positive = 86_400.0
    max_backlog_rows: int = Field(default=10_000_000, ge=1)
    """Rows that unfinished batches may hold together; beyond it a new batch gets 429."""
    max_backlog_bytes: int = Field(default=64 * 2**30, ge=1)
    """Input bytes of those rows. A batch larger than a limit is admitted when it is alone."""
    max_input_rows: int = Field(default=10_000_000, ge=1)
    """Rows of one batch; a file with more fails."""
    max_input_bytes: int = Field(default=16 * 2**30, ge=1)
    """Bytes of one batch's rows as JSON lines, after decompression; a file with more fails."""
    max_unpack_bytes: int = Field(default=2**30, ge=256 * 2**20)
    """Memory for the process that reads a Parquet or Arrow input; one that needs more fails."""
    replica: ReplicaSettings = ReplicaSettings(min_replicas=1, max_replicas=2)


class TrainerSettings(Section):
    """DPO runs on Ray Train."""

    num_workers: int = Field(default=1, ge=1)
    use_gpu: bool = False
    num_cpus_per_worker: float = Field(default=1.0, ge=0.0)
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom Ray resources of one training worker."""
    lora: bool = True
    lora_rank: int = Field(default=8, ge=1)
    lora_alpha: int = Field(default=16, ge=1)
    beta: Positive = 0.1
    loss: DpoLoss = DpoLoss()
    learning_rate: Positive = 5e-5
    batch_size: int = Field(default=4, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    """``None`` trains until the batch ends."""
    checkpoint_steps: int = Field(default=10, ge=1)
    max_length: int = Field(default=512, ge=32)
    max_restarts: int = Field(default=3, ge=0)
    launcher: ReplicaSettings = ReplicaSettings()
    """Where trainers are started and looked after; a replica runs one at a time."""
    num_threads: int = Field(default=2, ge=1)
    test_model: str | None = None
    """Overrides the base model; the ``fake`` profile trains a tiny random model."""


class RaySettings(Section):
    address: str | None = None
    """``None`` starts a local Ray; ``auto`` joins a running cluster."""
    num_cpus: int | None = None
    """Logical CPUs of a local Ray; ``None`` is the machine's count."""
    object_store_bytes: int = Field(default=256 * 2**20, ge=80 * 2**20)


class Settings(Section):
    """The whole configuration; ``profile`` names the defaults it started from."""

    profile: Literal["embedded", "fake", "gpu"] = "embedded"
    data_dir: Path = Path(".mora")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    dimensions: tuple[str, ...] = ("helpful", "harmless", "truthful")
    server: ServerSettings = ServerSettings()
    redis: RedisSettings = RedisSettings()
    blobs: BlobSettings = BlobSettings()
    ray: RaySettings = RaySettings()
    policy: PolicySettings = PolicySettings()
    scorers: tuple[ScorerSettings, ...] = ()
    sampling: SamplingSettings = SamplingSettings()
    method: MethodSettings = MethodSettings()
    runner: RunnerSettings = RunnerSettings()
    trainer: TrainerSettings = TrainerSettings()

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if len(set(self.dimensions)) != len(self.dimensions) or not self.dimensions:
            raise ValueError("dimensions must be distinct and not empty")
        names = [scorer.name for scorer in self.scorers]
        if len(set(names)) != len(names):
            raise ValueError(f"scorers must have distinct names, got {names}")
        served = [dimension for scorer in self.scorers for dimension in scorer.dimensions]
        if self.scorers and sorted(served) != sorted(self.dimensions):
            raise ValueError(
                f"scorers must serve every dimension exactly once, got {served} for "
                f"dimensions {list(self.dimensions)}"
            )
        for field in ("weights", "min_ceiling"):
            unknown = set(getattr(self.method, field)) - set(self.dimensions)
            if unknown:
                raise ValueError(f"method.{field} must name dimensions, got {sorted(unknown)}")
        if any(weight <= 0 for weight in self.method.weights.values()):
            raise ValueError("method.weights must be positive")
        if self.sampling.n_max < self.sampling.n:
            raise ValueError("sampling.n_max must be at least sampling.n")
        return self


def load_settings(
    profile: str = "embedded",
    *,
    config_file: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Merge profile, file, environment and arguments into :class:`Settings`.

    ``overrides`` is a nested mapping like the YAML. Raises :class:`ConfigError` with one plain line
    per problem; an unknown key names the nearest valid one.
    """
    if profile not in PROFILES:
        raise ConfigError(f"profile must be one of {', '.join(PROFILES)}, got {profile!r}")
    merged = _read_profile(profile)
    file = {} if config_file is None else read_yaml(config_file)
    if file.get("profile", profile) != profile:
        raise ConfigError(
            f"profile must be chosen with --profile ({profile}), got {file['profile']!r} in "
            f"{config_file}"
        )
    merge(merged, file)
    variables = os.environ if environ is None else environ
    merge(merged, read_environ(Settings, ENV_PREFIX, variables, RESERVED_VARIABLES))
    merge(merged, overrides or {})
    settings = _validate({**merged, "profile": profile})
    scorers = tuple(_with_key(scorer, variables) for scorer in settings.scorers)
    return settings.model_copy(update={"scorers": scorers})


def dump_settings(settings: Settings, *, reveal: bool = False) -> dict[str, Any]:
    """Settings as plain JSON values; secrets are masked unless ``reveal`` (for child processes)."""
    data = settings.model_dump(mode="json")
    if reveal:
        data["server"]["api_keys"] = [k.get_secret_value() for k in settings.server.api_keys]
        url = settings.redis.url
        data["redis"]["url"] = None if url is None else url.get_secret_value()
        for scorer, dumped in zip(settings.scorers, data["scorers"], strict=True):
            if scorer.remote is not None and scorer.remote.api_key is not None:
                dumped["remote"]["api_key"] = scorer.remote.api_key.get_secret_value()
    return data


def settings_from_dump(data: Mapping[str, Any]) -> Settings:
    """Inverse of ``dump_settings(..., reveal=True)``."""
    return _validate(dict(data))


def _validate(data: dict[str, Any]) -> Settings:
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item) for item in error.errors())) from None


def _with_key(scorer: ScorerSettings, environ: Mapping[str, str]) -> ScorerSettings:
    """A remote scorer with the key that its variable holds."""
    remote = scorer.remote
    if remote is None or remote.api_key_env is None:
        return scorer
    key = environ.get(remote.api_key_env)
    if not key:
        raise ConfigError(
            f"remote.api_key_env of the scorer {scorer.name} must name a variable that holds its "
            f"key, got {remote.api_key_env}, which is not set"
        )
    found = remote.model_copy(update={"api_key": SecretStr(key), "api_key_env": None})
    return scorer.model_copy(update={"remote": found})


def _explain(item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        nearest = nearest_key(Settings, path)
        return f"{path} is not a setting; the nearest valid key is {nearest}"
    got = item.get("input")
    secret = path.startswith(SECRETS) or path.endswith(".api_key")
    hidden = isinstance(got, dict | list | BaseModel) or got is None or secret
    shown = "" if hidden else f", got {got!r}"
    return f"{path or 'settings'}: {item['msg'].removeprefix('Value error, ')}{shown}"


def _read_profile(profile: str) -> dict[str, Any]:
    text = resources.files("mora_serve").joinpath(f"profiles/{profile}.yaml").read_text("utf-8")
    return yaml.safe_load(text) or {}
