"""Settings: precedence of the layers, refusal of unknown keys, masked secrets, clear messages."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from mora_serve.config import (
    PROFILES,
    Settings,
    dump_settings,
    load_settings,
    settings_from_dump,
)
from mora_serve.errors import ConfigError

NO_ENVIRON: dict[str, str] = {}


def write(directory: Path, text: str) -> Path:
    path = directory / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_loads(profile: str) -> None:
    settings = load_settings(profile, environ=NO_ENVIRON)
    assert settings.profile == profile
    assert sorted(d for s in settings.scorers for d in s.dimensions) == sorted(settings.dimensions)


def test_profile_beats_defaults() -> None:
    assert load_settings("embedded", environ=NO_ENVIRON).policy.backend == "vllm"
    assert load_settings("fake", environ=NO_ENVIRON).policy.backend == "fake"
    assert Settings().policy.backend == "vllm"


def test_file_beats_profile_and_merges_sections(tmp_path: Path) -> None:
    file = write(tmp_path, "sampling: {temperature: 0.3}\n")
    sampling = load_settings("embedded", config_file=file, environ=NO_ENVIRON).sampling
    assert sampling.temperature == 0.3
    assert sampling.n == 8


def test_environment_beats_file(tmp_path: Path) -> None:
    file = write(tmp_path, "server: {port: 9001, host: 0.0.0.0}\n")
    settings = load_settings(config_file=file, environ={"MORA_SERVER__PORT": "9002"})
    assert (settings.server.port, settings.server.host) == (9002, "0.0.0.0")


def test_arguments_beat_environment() -> None:
    settings = load_settings(
        environ={"MORA_SERVER__PORT": "9002"}, overrides={"server": {"port": 9003}}
    )
    assert settings.server.port == 9003


def test_lists_replace_and_free_mappings_merge(tmp_path: Path) -> None:
    file = write(tmp_path, "policy: {engine: {dtype: float32, seed: 3}}\n")
    settings = load_settings(
        config_file=file,
        environ={"MORA_POLICY__ENGINE__DTYPE": "bfloat16", "MORA_METHOD__STRATEGIES": '["null"]'},
    )
    assert settings.policy.engine["dtype"] == "bfloat16"
    assert settings.policy.engine["seed"] == 3
    assert settings.policy.engine["enforce_eager"] is True
    assert settings.method.strategies == ("null",)


def test_environment_values_have_the_type_of_their_setting() -> None:
    settings = load_settings(
        environ={
            "MORA_REDIS__KEY_PREFIX": "123",
            "MORA_SERVER__API_KEYS": "[k1, k2]",
            "MORA_METHOD__WEIGHTS__HELPFUL": "2.5",
            "MORA_SERVER__HAPROXY": "false",
            "MORA_POLICY__SYSTEM_PROMPT": "null",
        }
    )
    assert settings.redis.key_prefix == "123"
    assert [key.get_secret_value() for key in settings.server.api_keys] == ["k1", "k2"]
    assert settings.method.weights == {"helpful": 2.5}
    assert settings.server.haproxy is False
    assert settings.policy.system_prompt is None


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("MORA_SERVER__PROT", "MORA_SERVER__PORT"),
        ("MORA_PORT", "MORA_SERVER__PORT"),
        ("MORA_REDIS_URL", "MORA_REDIS__URL"),
        ("MORA_RUNNER__SHARD_ROW", "MORA_RUNNER__SHARD_ROWS"),
        ("MORA_DIMENSION", "MORA_DIMENSIONS"),
    ],
)
def test_unknown_variable_is_refused_with_the_nearest(variable: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(environ={variable: "1"})
    assert str(caught.value) == (
        f"{variable} is not a setting; the nearest valid variable is {nearest}"
    )


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("trainer: {batchsize: 2}", "trainer.batchsize", "trainer.batch_size"),
        # "max_tokens" also exists elsewhere; the same section must win.
        ("sampling: {max_token: 2}", "sampling.max_token", "sampling.max_tokens"),
        ("redis: {uri: x}", "redis.uri", "redis.url"),
        ("samplng: {n: 2}", "samplng", "sampling"),
        ("policy: {replica: {num_gpu: 1}}", "policy.replica.num_gpu", "policy.replica.num_gpus"),
        (
            "scorers: [{name: s, dimensions: [helpful, harmless, truthful], modle: x}]",
            "scorers.0.modle",
            "scorers.0.model",
        ),
    ],
)
def test_unknown_yaml_key_is_refused_with_the_nearest(
    tmp_path: Path, text: str, key: str, nearest: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(config_file=write(tmp_path, text), environ=NO_ENVIRON)
    assert f"{key} is not a setting; the nearest valid key is {nearest}" in str(caught.value)


def test_client_variables_and_other_programs_variables_are_not_settings() -> None:
    environ = {"MORA_URL": "http://x", "MORA_API_KEY": "k", "MORA_PROFILE": "gpu", "PATH": "/bin"}
    assert load_settings("fake", environ=environ) == load_settings("fake", environ=NO_ENVIRON)


def test_bad_value_names_the_setting_and_the_value() -> None:
    with pytest.raises(ConfigError, match=r"^server\.port: .*integer.*'abc'"):
        load_settings(environ={"MORA_SERVER__PORT": "abc"})


def test_every_bad_value_gets_its_line(tmp_path: Path) -> None:
    file = write(tmp_path, "sampling: {n: 0, top_p: 2}\n")
    with pytest.raises(ConfigError) as caught:
        load_settings(config_file=file, environ=NO_ENVIRON)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["sampling.n", "sampling.top_p"]


@pytest.mark.parametrize(
    "overrides",
    [
        {"sampling": {"n": 9, "n_max": 8}},
        {"method": {"weights": {"polite": 1.0}}},
        {"method": {"weights": {"helpful": 0.0}}},
        {"dimensions": ["helpful"]},
    ],
)
def test_contradictions_between_settings_are_refused(overrides: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="must"):
        load_settings(environ=NO_ENVIRON, overrides=overrides)


def test_a_file_cannot_switch_the_profile(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--profile"):
        load_settings("fake", config_file=write(tmp_path, "profile: gpu"), environ=NO_ENVIRON)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "\x00"])
def test_unusable_file_is_one_clear_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--config must") as caught:
        load_settings(config_file=write(tmp_path, text), environ=NO_ENVIRON)
    assert "\n" not in str(caught.value)


def test_missing_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--config must name a readable file"):
        load_settings(config_file=tmp_path / "absent.yaml", environ=NO_ENVIRON)


def test_secrets_are_masked_in_dumps_and_messages() -> None:
    environ = {"MORA_SERVER__API_KEYS": "[hush]", "MORA_REDIS__URL": "redis://:hush@h/0"}
    settings = load_settings(environ=environ)
    assert "hush" not in json.dumps(dump_settings(settings))
    assert "hush" not in repr(settings)
    with pytest.raises(ConfigError) as caught:
        load_settings(environ={"MORA_SERVER__API_KEYS": "hush"})
    assert "hush" not in str(caught.value)


def test_revealed_dump_restores_the_settings_in_a_child() -> None:
    settings = load_settings(environ={"MORA_SERVER__API_KEYS": "[hush]"})
    dump = json.loads(json.dumps(dump_settings(settings, reveal=True)))
    restored = settings_from_dump(dump)
    assert restored == settings
    assert pickle.loads(pickle.dumps(restored)) == settings


def test_scorers_of_one_name_are_refused() -> None:
    pair = [{"name": "rm", "backend": "fake", "dimensions": [name]} for name in ("a", "b")]
    overrides = {"dimensions": ["a", "b"], "scorers": pair}
    with pytest.raises(ConfigError, match=r"distinct names, got \['rm', 'rm'\]"):
        load_settings("fake", environ=NO_ENVIRON, overrides=overrides)


def with_remote(**remote: object) -> dict[str, object]:
    """Settings of one remote scorer."""
    remote = {"url": "http://rm/classify", "protocol": "classify", **remote}
    scorer = {"name": "rm", "backend": "remote", "dimensions": ["a"], "sign": 1, "remote": remote}
    return {"dimensions": ["a"], "scorers": [scorer]}


def test_a_remote_scorers_key_can_be_in_a_variable_of_any_name() -> None:
    settings = load_settings(
        "fake", environ={"REWARD_KEY": "k1"}, overrides=with_remote(api_key_env="REWARD_KEY")
    )
    for found in (settings, settings_from_dump(dump_settings(settings, reveal=True))):
        remote = found.scorers[0].remote
        assert remote is not None
        assert remote.api_key is not None
        assert remote.api_key.get_secret_value() == "k1"
    assert "k1" not in json.dumps(dump_settings(settings))


def test_a_variable_without_the_key_is_named() -> None:
    said = "remote.api_key_env of the scorer rm must name a variable that holds its key, got NONE"
    with pytest.raises(ConfigError, match=said):
        load_settings("fake", environ=NO_ENVIRON, overrides=with_remote(api_key_env="NONE"))


def test_a_key_is_given_in_one_way() -> None:
    both = with_remote(api_key="k1", api_key_env="REWARD_KEY")
    with pytest.raises(ConfigError, match="api_key and api_key_env must not both be given"):
        load_settings("fake", environ={"REWARD_KEY": "k2"}, overrides=both)


def test_a_malformed_key_of_a_remote_scorer_is_not_shown() -> None:
    with pytest.raises(ConfigError, match="api_key") as caught:
        load_settings("fake", environ=NO_ENVIRON, overrides=with_remote(api_key=987123))
    assert "987123" not in str(caught.value)
