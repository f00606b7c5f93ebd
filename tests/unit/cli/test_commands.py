"""Commands as a user types them, against a tiny server: tables, JSON, clean errors, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from mora_serve import __version__, cli
from mora_serve.cli.app import app
from mora_serve.cli.common import read_prompts
from mora_serve.errors import MoraError
from tests.unit.cli.made_up_run import candidate, diagnostic, rewrite_result
from tests.unit.cli.server import Answer, Seen, Server, error, ndjson


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MORA_PROFILE", "MORA_URL", "MORA_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def run_main(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str]:
    """Exit code and stderr of the real entry point."""
    monkeypatch.setattr(sys, "argv", ["mora-serve", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0), capfd.readouterr().err


def diagnosing(seen: Seen) -> Answer:
    """A diagnostics route that answers every prompt, the last one first."""
    items = [
        {**diagnostic({"helpful": 0.5}), "index": index}
        for index in reversed(range(len(seen.json["prompts"])))
    ]
    return ndjson(*items, {"object": "diagnostic.summary", "aggregate": {}})


def test_version() -> None:
    assert run("--version").output.strip() == f"mora-serve {__version__}"


def test_python_dash_m_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mora_serve", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == f"mora-serve {__version__}"


def test_config_prints_yaml_with_masked_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MORA_SERVER__API_KEYS", "[hush]")
    output = run("config", "--profile", "fake").output
    assert "hush" not in output
    assert yaml.safe_load(output)["policy"]["backend"] == "fake"


def test_config_takes_the_profile_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MORA_PROFILE", "fake")
    assert json.loads(run("config", "--json").output)["profile"] == "fake"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["config", "--profile", "tpu"], "profile must be one of embedded, fake, gpu"),
        (["config", "--config", "absent.yaml"], "--config must name a readable file"),
        (["scorers", "train", "--data", "absent"], "--data must be a directory"),
        (["diagnose", "absent.jsonl"], "absent.jsonl must be a readable UTF-8 file"),
    ],
)
def test_bad_input_is_one_line_and_exit_1(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    code, text = run_main(monkeypatch, capfd, *arguments)
    assert code == 1
    assert text.startswith("error: ")
    assert says in text
    assert text.count("\n") == 1


def test_server_errors_are_one_line(
    server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    server.on("POST /v1/rewrites", error(404, "The model '[red]x' does not exist"))
    arguments = ["rewrite", "-p", "Why?", "--model", "[red]x", "--url", server.url]
    code, text = run_main(monkeypatch, capfd, *arguments)
    assert code == 1
    assert text == "error: the server answered 404: The model '[red]x' does not exist\n"


def test_diagnose_sends_given_values_and_leaves_the_rest_to_the_server(server: Server) -> None:
    server.on("POST /v1/diagnostics", diagnosing)
    result = run("diagnose", "-p", "A?", "-p", "B?", "-n", "4", "--url", server.url)
    assert result.exit_code == 0
    assert server.seen[0].json["prompts"] == ["A?", "B?"]
    assert server.seen[0].json["n"] == 4
    assert server.seen[0].json["temperature"] is None
    assert "multi" in result.output
    assert result.output.index("A?") < result.output.index("B?")


def test_diagnose_can_wait_until_the_server_is_ready(server: Server) -> None:
    server.on("GET /readyz", Answer(body={}))
    server.on("POST /v1/diagnostics", diagnosing)
    assert run("diagnose", "-p", "A?", "--ready-timeout", "5", "--url", server.url).exit_code == 0
    assert [seen.path for seen in server.seen] == ["/readyz", "/v1/diagnostics"]


def test_diagnose_json_is_one_object_a_line_with_global_indices(
    server: Server, tmp_path: Path
) -> None:
    server.on("POST /v1/diagnostics", diagnosing)
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"Question {i}?" for i in range(70)))
    result = run("diagnose", str(file), "--json", "--url", server.url)
    items = [json.loads(line) for line in result.output.splitlines()]
    assert sorted(item["index"] for item in items) == list(range(70))
    assert [len(seen.json["prompts"]) for seen in server.seen] == [64, 6]


def test_failed_prompt_shows_its_code_and_no_figures(server: Server) -> None:
    failed = {
        "object": "diagnostic", "index": 0, "status": "failed", "class": None,
        "class_probability": None, "dimensions": {}, "error": {"code": "empty_prompt"},
    }  # fmt: skip
    server.on("POST /v1/diagnostics", ndjson(failed))
    assert "empty_prompt" in run("diagnose", "-p", " ", "--url", server.url).output


def test_diagnose_without_prompts_is_a_usage_error() -> None:
    assert run("diagnose").exit_code == 2


def test_rewrite_shows_confirmed_gains_and_the_accepted_prompt(server: Server) -> None:
    taken = candidate("accepted", {"helpful": 1.0}, accepted=True, gain=0.81)
    server.on("POST /v1/rewrites", Answer(body=rewrite_result("single:helpful", taken)))
    output = run("rewrite", "-p", "Why?", "--strategy", "compose", "--url", server.url).output
    assert server.seen[0].json["strategies"] == ["compose"]
    assert "+0.81" in output
    assert "accepted: Rewritten:" in " ".join(output.split())
    assert "[bold]no markup[/]" in " ".join(output.split())


def test_api_key_comes_from_option_or_environment(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.on("GET /v1/models", Answer(body={"data": [{"id": "base", "current": True}]}))
    monkeypatch.setenv("MORA_API_KEY", "from-env")
    run("models", "list", "--url", server.url)
    run("models", "list", "--url", server.url, "--api-key", "given")
    keys = [seen.headers["authorization"] for seen in server.seen]
    assert keys == ["Bearer from-env", "Bearer given"]


def test_train_follows_the_job_and_prints_the_version(server: Server) -> None:
    events = [
        {
            "id": "ev-2",
            "type": "metrics",
            "level": "info",
            "message": "step 1",
            "data": {"step": 1},
        },
        {"id": "ev-1", "type": "message", "level": "info", "message": "Created", "data": None},
    ]
    server.on("GET /v1/models", Answer(body={"data": [{"id": "base", "current": True}]}))
    server.on("POST /v1/fine_tuning/jobs", Answer(body={"id": "ftjob-1"}))
    job = {"id": "ftjob-1", "status": "succeeded", "fine_tuned_model": "policy-1"}
    server.on("GET /v1/fine_tuning/jobs/ftjob-1", Answer(body=job))
    server.on(
        "GET /v1/fine_tuning/jobs/ftjob-1/events", Answer(body={"data": events, "has_more": False})
    )
    result = run("train", "--batch", "batch_1", "--max-steps", "5", "--url", server.url)
    assert result.stdout.strip() == "policy-1"
    assert result.stderr.index("Created") < result.stderr.index("step 1")
    body = next(seen.json for seen in server.seen if seen.method == "POST")
    assert body == {
        "model": "base", "training_file": "batch_1", "method": {"type": "dpo"},
        "mora": {"max_steps": 5},
    }  # fmt: skip


def test_train_names_the_stages_of_a_sequential_job_in_order(server: Server) -> None:
    server.on("POST /v1/fine_tuning/jobs", Answer(body={"id": "ftjob-1"}))
    result = run(
        "train", "--batch", "batch_1", "--model", "base", "--mode", "sequential",
        "--dimension", "harmless", "--dimension", "helpful", "--no-resample", "--no-follow",
        "--url", server.url,
    )  # fmt: skip
    assert result.stdout.strip() == "ftjob-1"
    (body,) = [seen.json for seen in server.seen]
    assert body["mora"] == {
        "mode": "sequential", "dimensions": ["harmless", "helpful"], "resample": False,
    }  # fmt: skip


def test_models_activate_makes_a_version_current(server: Server) -> None:
    server.on("POST /v1/models/policy-1/activate", Answer(body={"id": "policy-1"}))
    result = run("models", "activate", "policy-1", "--url", server.url)
    assert result.stdout.strip() == "policy-1"


def test_train_that_fails_says_why_and_exits_1(
    server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    server.on("POST /v1/fine_tuning/jobs", Answer(body={"id": "ftjob-1"}))
    job = {"id": "ftjob-1", "status": "failed", "error": {"message": "no pairs"}}
    server.on("GET /v1/fine_tuning/jobs/ftjob-1", Answer(body=job))
    server.on("GET /v1/fine_tuning/jobs/ftjob-1/events", Answer(body={"data": []}))
    arguments = ["train", "--batch", "b", "--model", "base", "--url", server.url]
    code, text = run_main(monkeypatch, capfd, *arguments)
    assert code == 1
    assert "error: job ftjob-1 failed: no pairs" in text


def test_calibrate_fits_on_raw_rewards_of_fixed_n_rollouts(server: Server, tmp_path: Path) -> None:
    def answer(seen: Seen) -> Answer:
        assert (seen.json["n"], seen.json["n_max"]) == (8, 8)
        return ndjson(
            *(
                {
                    **diagnostic({}),
                    "index": index,
                    "prompt_id": str(index),
                    "rollouts": rollouts(index),
                }
                for index in range(len(seen.json["prompts"]))
            )
        )

    def rollouts(prompt: int) -> list[dict[str, Any]]:
        return [
            {
                "text": f"answer {i}", "finish_reason": "stop", "num_tokens": 5 + i,
                "scores": {
                    "helpful": {
                        "value": 99.0, "raw": 10.0 + prompt + 0.1 * i, "status": "ok",
                        "reason": None, "model": "m", "revision": "r",
                    }
                },
            }
            for i in range(8)
        ]  # fmt: skip

    server.on("POST /v1/diagnostics", answer)
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"Q{i}?"}) for i in range(9)))
    out = tmp_path / "calibrator.json"
    arguments = ["--prompts", str(file), "--out", str(out), "--url", server.url]
    assert run("scorers", "calibrate", *arguments).exit_code == 0
    fitted = json.loads(out.read_text())["dimensions"]["helpful"]
    assert fitted["num_rollouts"] == 72
    assert 14 < fitted["center"] < 15


def test_prompts_are_read_from_text_and_jsonl(tmp_path: Path) -> None:
    text, jsonl = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("One?\n\n  Two?  \n")
    assert [row["prompt"] for row in read_prompts(text)] == ["One?", "Two?"]
    jsonl.write_text(
        '{"prompt": "One?", "kind": "x"}\n"Two?"\n[{"role": "user", "content": "3"}]\n'
    )
    rows = read_prompts(jsonl)
    assert rows[0] == {"prompt": "One?", "kind": "x"}
    assert rows[1] == {"prompt": "Two?"}
    assert rows[2]["prompt"][0]["content"] == "3"
    assert len(read_prompts(jsonl, limit=2)) == 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "at least one prompt"),
        ("{", ":1 must be JSON"),
        ('"a"\n{"q": 1}', ":2 must have a field"),
    ],
)
def test_bad_prompt_files_name_the_line(tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(content)
    with pytest.raises(MoraError, match=says):
        read_prompts(file)
