"""A batch becomes a dataset that `datasets` loads and plain TRL trains on; pushing, to a stub."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from api import dataset_files
from mora_serve.calibrators import fake_calibrator
from mora_serve.cli.app import app
from mora_serve.cli.export import require_configuration
from mora_serve.client import Client
from mora_serve.config import load_settings
from mora_serve.dataset_export import ExportCounts, finished_batch
from mora_serve.errors import MoraError
from tests.fake_service import FakeService, fake_service
from tests.unit.cli.server import Answer, Seen, serving

NUM_PROMPTS = 24


@pytest.fixture(scope="module")
def service() -> Iterator[FakeService]:
    with fake_service() as running:
        yield running


@pytest.fixture(scope="module")
def batch_id(service: FakeService) -> str:
    return run_batch(service, include_rollouts=True)


@pytest.fixture(scope="module")
def exported(service: FakeService, batch_id: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "data"
    done = export(service, "--batch", batch_id, "--out", str(out), "--profile", "fake")
    assert done.returncode == 0, done.stderr
    return out


def export(service: FakeService, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mora_serve", "export", "--url", service.url, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the commands that an export starts in this process."""

    def run_child(command: list[str], *_: Any) -> None:
        assert command[1:3] == ["-m", "api.dataset_files"]
        assert dataset_files.main(command[3:]) == 0

    monkeypatch.setattr("mora_serve.cli.export.run_child", run_child)


def export_here(service: FakeService, *arguments: str) -> Result:
    command = ["export", "--url", service.url, *arguments]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def finish(client: Client, lines: list[dict[str, Any]], **defaults: Any) -> str:
    """Id of a batch of these rows, once it is completed."""
    content = "".join(json.dumps(line) + "\n" for line in lines)
    file = client.upload(content.encode(), "rows.jsonl")
    body = {"input_file_id": file["id"], "endpoint": lines[0]["url"], "defaults": defaults}
    batch = client.post("/v1/batches", body)
    for _ in client.events(f"/v1/batches/{batch['id']}/events"):
        pass
    assert client.get(f"/v1/batches/{batch['id']}")["status"] == "completed"
    return str(batch["id"])


def run_batch(service: FakeService, **defaults: Any) -> str:
    lines = [
        {
            "custom_id": f"row-{number}", "method": "POST", "url": "/v1/rewrites",
            "body": {"prompt": f"Tell me about subject {number}", "n": 8, "n_max": 16, "seed": 7},
        }
        for number in range(NUM_PROMPTS)
    ]  # fmt: skip
    lines.append({**lines[0], "custom_id": "bad", "body": {"prompt": " "}})
    return finish(Client(service.url), lines, **defaults)


def load(directory: Path, name: str, cache: Path) -> Any:
    from datasets import load_dataset

    return load_dataset(str(directory), name, split="train", cache_dir=str(cache))


def test_pairs_and_groups_load_with_what_the_batch_has(
    service: FakeService, batch_id: str, exported: Path, tmp_path: Path
) -> None:
    client = Client(service.url)
    streamed = list(client.ndjson("GET", f"/v1/batches/{batch_id}/pairs"))
    pairs = load(exported, "pairs", tmp_path)
    assert [row["seq"] for row in pairs] == [row["seq"] for row in streamed]
    assert [row["chosen"] for row in pairs] == [row["chosen"] for row in streamed]
    assert json.loads(pairs[0]["provenance"]) == streamed[0]["provenance"]

    groups = load(exported, "groups", tmp_path)
    originals = [row for row in groups if row["role"] == "original"]
    assert sorted(row["custom_id"] for row in originals) == sorted(
        f"row-{number}" for number in range(NUM_PROMPTS)
    )
    assert any(row["role"] == "candidate" for row in groups)
    for row in groups:
        assert row["prompt"][-1]["role"] == "user"
        assert len(row["responses"]) == len(row["num_tokens"]) >= 8
        for name in service.settings.dimensions:
            reward = row["rewards"][name]
            assert len(reward["value"]) == len(reward["status"]) == len(row["responses"])
            assert row["scorers"][name]["revision"] == "fake-1"
    first = originals[0]
    again = client.post(
        "/v1/scores",
        {"rows": [{"prompt": first["prompt"], "response": text} for text in first["responses"]]},
    )["data"]
    for index, item in enumerate(again):
        for name, score in item["scores"].items():
            assert first["rewards"][name]["raw"][index] == pytest.approx(score["raw"])
            assert first["rewards"][name]["value"][index] == pytest.approx(score["value"])


def test_the_card_states_configuration_revisions_and_counts_and_no_licence(
    service: FakeService, batch_id: str, exported: Path
) -> None:
    text = (exported / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    fields = yaml.safe_load(header)
    assert [item["config_name"] for item in fields["configs"]] == ["pairs", "groups"]
    assert "license" not in fields
    assert "# license: to be chosen" in header
    for stated in (batch_id, fake_calibrator(service.settings.dimensions).version, "fake-1"):
        assert stated in body
    assert "1 rows of the batch failed" in body
    assert "min_margin: 0.5" in body
    assert not list(exported.glob(".*"))


@pytest.mark.slow
def test_rows_that_were_scored_on_different_dimensions_keep_all_they_have(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    def pair(seq: int, *names: str) -> dict[str, Any]:
        scores = {name: {"value": 1.5, "raw": 3.0} for name in names}
        return {"seq": seq, "chosen_scores": scores, "rejected_scores": scores}

    rows = tmp_path / "rows.jsonl"
    lines = [pair(0, "helpful"), pair(1, "harmless", "helpful")]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    dataset_files.write_parquet("pairs", rows, tmp_path / "pairs.parquet")
    found = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert [row["chosen_scores"]["harmless"] for row in found] == [
        None, {"value": 1.5, "raw": 3.0}
    ]  # fmt: skip


def test_plain_trl_trains_on_the_pairs(exported: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from trainer.tiny_model import ensure_tiny_model

    model = str(ensure_tiny_model(tmp_path / "tiny"))
    config = DPOConfig(
        output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2,
        max_length=256, report_to="none", use_cpu=True, bf16=False, logging_steps=1,
        save_strategy="no", gradient_checkpointing=False,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=config,
        train_dataset=load(exported, "pairs", tmp_path / "cache"),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert len(losses) == 2


@pytest.mark.usefixtures("in_process")
def test_a_batch_without_rollouts_has_pairs_only_and_is_said_to(
    service: FakeService, tmp_path: Path
) -> None:
    done = export_here(service, "--batch", run_batch(service), "--out", str(tmp_path / "d"))
    assert "run without include_rollouts" in " ".join(done.stderr.split())
    text = (tmp_path / "d" / "README.md").read_text()
    assert "it holds no scored groups" in text
    assert "Unknown to the exporter" in text
    assert len(load(tmp_path / "d", "pairs", tmp_path / "cache")) > 0
    assert not (tmp_path / "d" / "groups").exists()


@pytest.mark.usefixtures("in_process")
def test_a_batch_of_diagnostics_has_groups_only(service: FakeService, tmp_path: Path) -> None:
    url = "/v1/diagnostics"
    body = {"prompts": ["One subject?", "Another subject?"], "n": 4, "n_max": 4}
    line = {"custom_id": "both", "method": "POST", "url": url, "body": body}
    batch_id = finish(Client(service.url), [line], include_rollouts=True)
    export_here(service, "--batch", batch_id, "--out", str(tmp_path / "d"))
    groups = load(tmp_path / "d", "groups", tmp_path / "cache")
    assert [row["prompt"][0]["content"] for row in groups] == body["prompts"]
    assert {len(row["responses"]) for row in groups} == {4}
    assert not (tmp_path / "d" / "pairs").exists()


@pytest.mark.usefixtures("in_process")
def test_a_file_of_pairs_is_exported_again_as_it_was(
    service: FakeService, exported: Path, tmp_path: Path
) -> None:
    (file,) = (exported / "pairs").iterdir()
    export_here(service, "--pairs", str(file), "--out", str(tmp_path / "d"))
    both = [load(place, "pairs", tmp_path / "cache") for place in (exported, tmp_path / "d")]
    assert both[0].to_list() == both[1].to_list()


def test_what_cannot_be_exported_is_refused(exported: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> None:
        CliRunner().invoke(app, ["export", *arguments], catch_exceptions=False)

    with pytest.raises(MoraError, match="--out must be a new or empty directory"):
        run("--pairs", str(tmp_path / "x.jsonl"), "--out", str(exported))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "text", "chosen": [], "rejected": []}\n')
    with pytest.raises(MoraError, match=r"bad.jsonl:1: prompt must be a list of messages"):
        run("--pairs", str(bad), "--out", str(tmp_path / "a"))
    assert not (tmp_path / "a").exists()
    with pytest.raises(MoraError, match="must be the server's"):
        require_configuration(load_settings("fake", environ={}), ExportCounts(calibrators={"x"}))


PAIR: dict[str, Any] = {
    "prompt": [{"role": "user", "content": "q"}],
    "chosen": [{"role": "assistant", "content": "a"}],
    "rejected": [{"role": "assistant", "content": "b"}],
    "chosen_scores": {"helpful": {"value": 1.0, "raw": 1.0}},
    "rejected_scores": {"helpful": {"value": 0.0, "raw": 0.0}},
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ["q"]),
        ("chosen", [{"role": "assistant"}]),
        ("chosen_scores", {"helpful": 1.0}),
        ("provenance", 5),
        ("provenance", "{x"),
        ("provenance", "[1]"),
        ("provenance", {"scorers": {"helpful": "x"}}),
    ],
)
def test_a_pair_that_cannot_be_exported_is_named_by_its_place(
    tmp_path: Path, field: str, value: Any
) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(PAIR) + "\n" + json.dumps({**PAIR, field: value}) + "\n")
    arguments = ["export", "--pairs", str(file), "--out", str(tmp_path / "d")]
    with pytest.raises(MoraError, match=rf"pairs.jsonl:2: {field}"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.mark.parametrize(
    ("endpoint", "status", "problem"),
    [
        ("/v1/rewrites", "in_progress", "must be finished, got batch_1 in in_progress"),
        ("/v1/rewrites", "failed", "must be finished"),
        ("/v1/scores", "completed", "must be one that samples answers"),
    ],
)
def test_a_batch_that_has_no_whole_result_is_not_exported(
    endpoint: str, status: str, problem: str
) -> None:
    class Stub:
        def get(self, path: str) -> dict[str, Any]:
            assert path == "/v1/batches/batch_1"
            return {"endpoint": endpoint, "status": status}

    stub: Any = Stub()
    with pytest.raises(MoraError, match=problem):
        finished_batch(stub, "batch_1")


def push(hub: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Push with a hub client of its own, whose hub is the stub."""
    hub_settings = {"HF_ENDPOINT": hub, "HF_TOKEN": "hf_stub", "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, "-m", "api.dataset_files", "push", str(directory), "me/data"],
        env={**os.environ, **hub_settings, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_pushing_creates_a_private_repository_and_commits_card_and_files(exported: Path) -> None:
    with serving() as hub:
        commits: list[dict[str, Any]] = []

        def preupload(seen: Seen) -> Answer:
            files = [
                {"path": item["path"], "uploadMode": "regular", "shouldIgnore": False}
                for item in seen.json["files"]
            ]
            return Answer(200, {"files": files})

        def commit(seen: Seen) -> Answer:
            commits.extend(json.loads(line) for line in seen.body.splitlines())
            url = f"{hub.url}/datasets/me/data/commit/abc"
            return Answer(200, {"commitUrl": url, "commitOid": "abc", "success": True})

        repository = {"url": f"{hub.url}/datasets/me/data", "name": "me/data"}
        hub.on("POST /api/repos/create", Answer(200, repository))
        hub.on("POST /api/validate-yaml", Answer(200, {"errors": [], "warnings": []}))
        hub.on("POST /api/datasets/me/data/preupload/main", preupload)
        hub.on("POST /api/datasets/me/data/commit/main", commit)
        done = push(hub.url, exported)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().endswith("/commit/abc")
        (created,) = [seen.json for seen in hub.seen if seen.path == "/api/repos/create"]
    assert (created["name"], created["organization"]) == ("data", "me")
    assert (created["type"], created["visibility"]) == ("dataset", "private")
    files = {item["value"]["path"]: item["value"] for item in commits if item["key"] == "file"}
    assert set(files) == {
        "README.md", "pairs/train-00000-of-00001.parquet", "groups/train-00000-of-00001.parquet"
    }  # fmt: skip
    card = base64.b64decode(files["README.md"]["content"])
    assert card == (exported / "README.md").read_bytes()


def test_a_hub_that_refuses_is_one_line_and_exit_status_1(exported: Path) -> None:
    with serving() as hub:
        hub.on("POST /api/repos/create", Answer(403, {"error": "no"}))
        done = push(hub.url, exported)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
