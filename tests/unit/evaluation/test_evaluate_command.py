"""``mora-serve evaluate`` against a service on fakes: figures, files, page, refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mora_serve.calibrators import fake_calibrator
from mora_serve.cli.app import app
from mora_serve.client import Client
from mora_serve.divergence import DivergenceMeter, DivergenceSettings
from mora_serve.errors import MoraError
from mora_serve.evaluation import NO_DIFFERENCE
from mora_serve.evaluation_page import render
from mora_serve.evaluation_run import distinct
from mora_serve.version_sampling import SamplingPlan, Served, draw, sample_of
from tests.fake_service import FakeService, fake_service

PROMPTS = [f"What do people say about topic {number}?" for number in range(20)]


@pytest.fixture(scope="module")
def service() -> Iterator[FakeService]:
    with fake_service() as running:
        running.publish("policy-1")
        yield running


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "held-out.jsonl"
    rows = [{"prompt": text, "split": "test"} for text in PROMPTS]
    rows.append({"prompt": "trained on", "split": "train"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluate(service: FakeService, prompts: Path, out: Path, *more: str) -> Any:
    arguments = ["evaluate", "--url", service.url, "--prompts", str(prompts), "--out", str(out)]
    return CliRunner().invoke(app, [*arguments, "-n", "4", *more], catch_exceptions=False)


def test_the_same_version_twice_does_not_differ(
    service: FakeService, prompts: Path, tmp_path: Path
) -> None:
    base = service.settings.policy.model
    done = evaluate(service, prompts, tmp_path / "out", "--policy", base, "--policy", base)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    (comparison,) = found["comparisons"]
    assert comparison["name"] == f"{base} (2)"
    for change in comparison["changes"].values():
        assert change["verdict"] == NO_DIFFERENCE
        assert change["change"]["value"] == 0
    assert f"{base} (2) against {base}: helpful no difference, harmless no" in done.stdout


def test_figures_files_and_page_of_two_versions(
    service: FakeService, prompts: Path, tmp_path: Path
) -> None:
    base = service.settings.policy.model
    arguments = ("--policy", base, "--policy", "policy-1", "--split", "test", "--json")
    done = evaluate(service, prompts, tmp_path, *arguments)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert json.loads(done.stdout) == found
    assert found["num_prompts"] == len(PROMPTS)
    assert found["calibrator"] == fake_calibrator(service.settings.dimensions).version
    assert found["versions_kl"] == [None, None]
    for version in found["versions"]:
        assert version["num_answers"] == 4 * len(PROMPTS)
        assert sum(version["classes"].values()) == len(PROMPTS)
    for change in found["comparisons"][0]["changes"].values():
        assert change["percent"]["value"] is not None
        assert change["change"]["low"] <= change["change"]["value"] <= change["change"]["high"]
    answers = [json.loads(line) for line in (tmp_path / "answers-1.jsonl").open()]
    assert {item["policy_version"] for item in answers} == {"policy-1"}
    page = (tmp_path / "report.html").read_text()
    assert page == render(found)
    assert page.count("<svg") >= 8
    assert "policy-1 against" in page
    assert "helpful, ceiling" in page
    renamed = render(json.loads(json.dumps(found).replace("policy-1", "a & b")))
    assert "<h2>a &amp; b against" in renamed


def test_unknown_versions_and_empty_splits_are_refused(
    service: FakeService, prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(MoraError, match="--activate"):
        evaluate(service, prompts, tmp_path, "--policy", "policy-9")
    with pytest.raises(MoraError, match="split validation"):
        evaluate(service, prompts, tmp_path, "--policy", "policy-1", "--split", "validation")
    with pytest.raises(MoraError, match="--base-model"):
        evaluate(service, prompts, tmp_path, "--policy", "x", "--base-model", str(tmp_path))
    with pytest.raises(MoraError, match="--out must be a directory"):
        evaluate(service, prompts, prompts, "--policy", "policy-1")


def test_weights_that_a_broken_off_evaluation_left_are_fetched_again(
    service: FakeService, tmp_path: Path
) -> None:
    client, base = Client(service.url), service.settings.policy.model
    file = client.upload(b"{}", "pairs.jsonl", purpose="fine-tune")
    job = client.post("/v1/fine_tuning/jobs", {"model": base, "training_file": file["id"]})
    while job["status"] == "queued":
        job = client.get(f"/v1/fine_tuning/jobs/{job['id']}")
    (tmp_path / "weights-1").mkdir()
    (tmp_path / "weights-1" / "stale").touch()
    settings = DivergenceSettings(tmp_path, 1.0)
    meter = DivergenceMeter(client, settings, base, tmp_path, lambda command: None)
    meter.fetch([job["fine_tuned_model"]])
    assert [path.name for path in (tmp_path / "weights-1").iterdir()] == ["adapter.bin"]


def test_an_engine_with_one_set_of_weights_serves_each_version_in_turn_and_is_put_back(
    prompts: Path, tmp_path: Path
) -> None:
    with fake_service(one_version=True) as service:
        service.publish("policy-1", make_current=True)
        base = service.settings.policy.model
        arguments = ("--policy", base, "--policy", "policy-1")
        with pytest.raises(MoraError, match="one set of weights"):
            evaluate(service, prompts, tmp_path / "a", *arguments)
        done = evaluate(service, prompts, tmp_path / "b", *arguments, "--activate")
        assert done.exit_code == 0, done.output
        assert service.current() == "policy-1"
    for place, version in enumerate((base, "policy-1")):
        rows = [json.loads(line) for line in (tmp_path / "b" / f"answers-{place}.jsonl").open()]
        assert {row["policy_version"] for row in rows} == {version}


def test_a_version_is_put_back_after_an_error(service: FakeService) -> None:
    before = Client(service.url).get("/v1/models")["data"][0]["id"]

    def broken() -> None:
        with Served(Client(service.url), activate=True) as served:
            served.require("policy-1")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert Client(service.url).get("/v1/models")["data"][0]["id"] == before


def test_versions_get_the_same_seeds_whatever_is_asked_in_one_request(service: FakeService) -> None:
    plan = SamplingPlan(n=2, seed=5)
    many = [f"prompt {number}" for number in range(70)]
    client, base = Client(service.url), service.settings.policy.model
    once, again = (draw(client, base, many, plan) for _ in range(2))
    assert [item["index"] for item in once] == list(range(70))
    assert [item["rollouts"] for item in once] == [item["rollouts"] for item in again]


def test_two_versions_are_asked_for_the_same_prompts_with_the_same_seeds() -> None:
    flaky: Any = FlakyClient(0, "")
    for version in ("base", "policy-with-another-name"):
        draw(flaky, version, [f"prompt {number}" for number in range(70)], SamplingPlan(seed=2))
    assert flaky.seeds == [*flaky.seeds[:2], *flaky.seeds[:2]]
    assert flaky.seeds[0] != flaky.seeds[1]


def test_kl_is_of_whole_distributions_and_names_its_base_model(
    service: FakeService, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "base"
    model.mkdir()
    (model / "config.json").write_text("{}")
    asked: list[Any] = []

    def note(_client: Any, options: Any, *_: Any) -> dict[str, Any]:
        asked.append(options)
        return {}

    monkeypatch.setattr("mora_serve.cli.evaluate.run_evaluation", note)
    base = service.settings.policy.model
    for extra in ((), ("--base-model", str(model), "--temperature", "0.7")):
        evaluate(service, prompts, tmp_path / "kl", "--policy", base, "--json", *extra)
    assert [options.plan.top_p for options in asked] == [None, 1.0]
    with pytest.raises(MoraError, match="--base-model must be given with --reference"):
        evaluate(service, prompts, tmp_path / "kl", "--policy", base, "--reference", base)


def test_a_prompt_keeps_its_seed_however_the_list_is_cut_into_requests() -> None:
    plan = SamplingPlan(seed=3)
    assert plan.body(["c"], "m", 2)["seed"] == plan.body(["a", "b", "c"], "m", 0)["seed"] + 2
    assert plan.body(["a"], "m", 0)["seed"] != SamplingPlan(seed=4).body(["a"], "m", 0)["seed"]


def test_a_foreign_calibrator_gives_no_percents(service: FakeService) -> None:
    client, base = Client(service.url), service.settings.policy.model
    drawn = draw(client, base, PROMPTS[:2], SamplingPlan(n=2))
    drawn[0]["rollouts"][0]["scores"]["helpful"]["value"] += 1.0
    with pytest.raises(MoraError, match="--calibrator must be the one"):
        sample_of(base, drawn, fake_calibrator(service.settings.dimensions))


def test_a_version_evaluated_twice_has_two_names() -> None:
    assert distinct(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]


def test_kl_reads_the_answers_again_in_the_conversation_that_the_server_sampled(
    tmp_path: Path,
) -> None:
    commands: list[list[str]] = []

    def run_command(command: list[str]) -> None:
        commands.append(command)
        rows = Path(command[command.index("--answers") + 1]).read_text().splitlines()
        lines = [json.dumps({"num_tokens": 4, "k1": 0.5, "k3": 1.0}) for _ in rows]
        Path(command[command.index("--out") + 1]).write_text("\n".join(lines) + "\n")

    with fake_service(policy={"system_prompt": "Be brief."}) as service:
        service.publish("policy-1", make_current=True)
        weights = {"id": "file-1", "filename": "adapter.bin", "bytes": 3, "purpose": "x"}
        service.call(service.stores.blobs.put("files/1", b"abc"))
        service.call(service.stores.batches.put_file(weights, "files/1"))
        job: dict[str, Any] = {"id": "ftjob-1", "status": "succeeded", "model": "base"}
        job |= {"fine_tuned_model": "policy-1", "result_files": ["file-1"]}
        service.call(service.stores.jobs.create_job(job))
        client, base = Client(service.url), service.settings.policy.model
        drawn = draw(client, "policy-1", PROMPTS[:3], SamplingPlan(n=2))
        settings = DivergenceSettings(tmp_path, 0.7)
        meter = DivergenceMeter(client, settings, base, tmp_path, run_command)
        found = meter.measure("policy-1", drawn, seed=1)
    assert (found.num_answers, found.num_tokens, found.reference) == (6, 24, base)
    assert found.per_token.value == pytest.approx(0.25)
    assert found.per_answer.value == pytest.approx(1.0)
    assert found.per_answer_k1.value == pytest.approx(0.5)
    (command,) = commands
    options = dict(zip(command[3::2], command[4::2], strict=True))
    assert options["--temperature"] == "0.7"
    assert options["--reference"] == "base"
    assert (Path(options["--policy"]) / "adapter.bin").read_bytes() == b"abc"
    first = json.loads((tmp_path / "kl-answers.jsonl").read_text().splitlines()[0])
    assert first["prompt"] == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPTS[0]}
    ]  # fmt: skip


def test_kl_of_a_version_whose_weights_no_job_hands_out_is_refused_before_sampling(
    prompts: Path, tmp_path: Path
) -> None:
    model = tmp_path / "base"
    model.mkdir()
    (model / "config.json").write_text("{}")
    with fake_service() as service:
        service.publish("policy-9-stage-1")
        stage = {"version": "policy-9-stage-1", "status": "succeeded"}
        job = {"id": "ftjob-9", "status": "succeeded", "fine_tuned_model": "policy-9-stage-2"}
        service.call(service.stores.jobs.create_job({**job, "model": "base", "stages": [stage]}))
        arguments = ("--policy", "policy-9-stage-1", "--base-model", str(model))
        with pytest.raises(MoraError, match="earlier stage of ftjob-9"):
            evaluate(service, prompts, tmp_path / "out", *arguments, "--temperature", "1")
        arguments = ("--policy", service.settings.policy.model, "--base-model", str(model))
        for reference in ("policy-typo", "base"):
            with pytest.raises(MoraError, match=f"got {reference}; leave out --base-model"):
                evaluate(
                    service, prompts, tmp_path / "out", *arguments, "--temperature", "1",
                    "--reference", reference,
                )  # fmt: skip
    assert not list((tmp_path / "out").glob("answers-*"))


class FlakyClient:
    """Answers every request; the second prompt fails ``failures`` times with ``kind``."""

    def __init__(self, failures: int, kind: str) -> None:
        self.failures, self.kind = failures, kind
        self.seeds: list[int] = []

    def ndjson(self, _method: str, _path: str, body: Any) -> Iterator[dict[str, Any]]:
        self.seeds.append(body["seed"])
        for index, _ in enumerate(body["prompts"]):
            item = {"object": "diagnostic", "index": index, "policy_version": body["model"]}
            if index == 1 and len(self.seeds) <= self.failures:
                yield {**item, "status": "failed", "error": {"type": self.kind, "code": "x"}}
            else:
                yield {**item, "status": "ok", "error": None}


@pytest.mark.parametrize(
    ("failures", "kind", "num_requests", "status"),
    [
        (1, "server_error", 2, "ok"),
        (9, "server_error", 3, "failed"),
        (9, "invalid_request_error", 1, "failed"),
    ],
)
def test_what_failed_for_a_reason_that_may_pass_is_asked_again_with_the_same_seed(
    failures: int, kind: str, num_requests: int, status: str
) -> None:
    flaky: Any = FlakyClient(failures, kind)
    drawn = draw(flaky, "v", PROMPTS[:3], SamplingPlan(seed=2))
    assert [item["status"] for item in drawn] == ["ok", status, "ok"]
    assert len(flaky.seeds) == num_requests
    assert len(set(flaky.seeds)) == 1


def test_answers_of_another_version_end_the_evaluation() -> None:
    class Swapped(FlakyClient):
        """A server whose version changes under the second prompt."""

        def ndjson(self, method: str, path: str, body: Any) -> Iterator[dict[str, Any]]:
            for item in super().ndjson(method, path, body):
                yield {**item, "policy_version": "w"} if item["index"] == 1 else item

    swapped: Any = Swapped(0, "")
    with pytest.raises(MoraError, match="asked for v but w answered"):
        draw(swapped, "v", PROMPTS[:3], SamplingPlan())
