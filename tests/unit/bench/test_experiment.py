"""The whole experiment on the fake backend, a second start with nothing to do, and the table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import experiment
from benchmarks.experiment_arms import ARMS, BASE, Arms, Design, chosen_pairs, share_of
from benchmarks.experiment_cells import Cells
from benchmarks.experiment_judge import second_scores, with_scores
from benchmarks.experiment_table import control_rates
from mora_serve.client import Client
from mora_serve.divergence import DivergenceSettings
from mora_serve.errors import MoraError
from tests.fake_service import FakeService, fake_service

SEEDS = (0, 1)


@pytest.fixture(scope="module")
def service() -> Iterator[FakeService]:
    with fake_service(one_version=True) as running:
        yield running


@pytest.fixture(scope="module")
def design() -> Design:
    return Design(
        prompts=tuple(f"What of subject {number}?" for number in range(16)),
        held_out=tuple(f"And what of matter {number}?" for number in range(6)),
        seeds=SEEDS,
        dimensions=("helpful", "harmless", "truthful"),
        num_steps=4,
        batch_size=2,
        n_eval=4,
        beta=0.1,
        learning_rate_multiplier=1.0,
        max_pairs=6,
    )


@pytest.fixture(scope="module")
def done(service: FakeService, design: Design, tmp_path_factory: pytest.TempPathFactory) -> Cells:
    cells = Cells(tmp_path_factory.mktemp("experiment"), configuration_of(design))
    kl = DivergenceSettings(Path("base-model"), 0.7)
    Arms(
        Client(service.url), design, cells, lambda text: None, kl=kl, run_command=one_nat_each,
        poll_s=0.01,
    ).run()  # fmt: skip
    return cells


def configuration_of(design: Design) -> dict[str, Any]:
    found = json.loads(json.dumps(asdict(design)))
    del found["seeds"], found["arms"]
    return {**found, "config": {}}


def one_nat_each(command: list[str]) -> None:
    """Stands for ``trainer.kl``: every answer has two tokens and diverges by one nat."""
    given = dict(zip(command[3::2], command[4::2], strict=True))
    assert (given["--base"], given["--reference"]) == ("base-model", "base")
    assert (Path(given["--policy"]) / "adapter.bin").read_bytes() == b"weights"
    answers = Path(given["--answers"]).read_text().splitlines()
    line = json.dumps({"num_tokens": 2, "k1": 1.0, "k3": 1.0})
    Path(given["--out"]).write_text(f"{line}\n" * len(answers))


def cell(cells: Cells, name: str) -> Any:
    return json.loads((cells.root / f"{name}.json").read_text())


def test_arms_differ_in_their_pairs_and_in_nothing_else(
    service: FakeService, design: Design, done: Cells
) -> None:
    client = Client(service.url)
    assert experiment.is_complete(done, design, with_kl=True)
    assert not experiment.is_complete(done, replace(design, seeds=(0, 7)), with_kl=False)
    sizes = set()
    for arm in ("plain", "more", "unmeasured", "simultaneous"):
        job = client.get(f"/v1/fine_tuning/jobs/{cell(done, f'seed-0/{arm}-job')['job_id']}")
        assert job["model"] == service.settings.policy.model
        assert job["mora"] == {"max_steps": 4, "make_current": False}
        lines = list(client.ndjson("GET", f"/v1/files/{job['training_file']}/content"))
        sizes.add(len(lines))
    assert sizes == {6}
    plain, more, mora = (cell(done, f"seed-0/batch-{kind}") for kind in ("plain", "more", "mora"))
    assert plain["rollouts"] < mora["rollouts"] <= more["rollouts"] + len(design.prompts)
    assert (plain["confirmations"], more["confirmations"]) == ([], [])
    assert {item["reason"] for item in mora["confirmations"]} >= {"accepted"}
    unmeasured = cell(done, "seed-0/batch-all")
    rewritten = [p for p in unmeasured["pairs"] if p["provenance"]["strategy"]]
    assert rewritten
    assert all(pair["provenance"]["gain"] is None for pair in rewritten)


def test_a_stage_samples_the_version_that_the_stage_before_made(
    service: FakeService, done: Cells
) -> None:
    version = service.settings.policy.model
    client = Client(service.url)
    for place, name in enumerate(("helpful", "harmless", "truthful")):
        stage = f"seed-1/stage-{place}-{name}"
        pairs = cell(done, f"{stage}-batch")["pairs"]
        assert {pair["policy_version"] for pair in pairs} == {version}
        job = client.get(f"/v1/fine_tuning/jobs/{cell(done, f'{stage}-job')['job_id']}")
        assert job["model"] == version
        lines = list(client.ndjson("GET", f"/v1/files/{job['training_file']}/content"))
        assert {line["stage"] for line in lines} == {name}
        version = job["fine_tuned_model"]
    assert cell(done, "seed-1/answers-sequential")["version"] == version


def test_the_stages_divide_the_prompts_so_that_they_cost_as_much_as_one_batch(
    design: Design, done: Cells
) -> None:
    stages = [f"seed-0/stage-{n}-{name}-batch" for n, name in enumerate(design.dimensions)]
    rows = [list(cell(done, stage)["classes"]) for stage in stages]
    assert [len(each) for each in rows] == [6, 5, 5]
    assert [row for each in rows for row in each] == list(
        cell(done, "seed-0/batch-mora")["classes"]
    )


def test_seeds_can_be_added_to_an_experiment(tmp_path: Path) -> None:
    out = ["--profile", "fake", "--out", str(tmp_path)]
    two, three = (
        experiment._parser().parse_args([*out, "--seeds", *seeds]) for seeds in ("01", "012")
    )
    first = experiment.open_cells(two, experiment.make_design(two), {})
    again = experiment.open_cells(three, experiment.make_design(three), {})
    assert first.fingerprint == again.fingerprint


def test_versions_are_sampled_as_themselves_and_the_base_is_current_again(
    service: FakeService, done: Cells
) -> None:
    for arm in (BASE, *ARMS):
        content = cell(done, f"seed-0/answers-{arm}")
        assert {item["policy_version"] for item in content["data"]} == {content["version"]}
    assert service.current() == service.settings.policy.model


def test_a_second_start_asks_for_nothing_and_another_design_is_refused(
    design: Design, done: Cells, service: FakeService
) -> None:
    before = len(Client(service.url).get("/v1/batches", limit=100)["data"])
    again = Cells(done.root, configuration_of(design))
    Arms(Client(service.url), design, again, pytest.fail, poll_s=0.01).run()
    assert len(Client(service.url).get("/v1/batches", limit=100)["data"]) == before
    with pytest.raises(MoraError, match="got another beta"):
        Cells(done.root, configuration_of(replace(design, beta=0.3)))


def test_a_start_that_was_cut_short_goes_on_with_the_batch_it_had_created(
    design: Design, done: Cells, service: FakeService
) -> None:
    place = done.root / "seed-0" / "batch-mora.json"
    first = json.loads(place.read_text())
    place.unlink()
    Arms(Client(service.url), design, done, lambda text: None, poll_s=0.01).run()
    assert json.loads(place.read_text()) == first


def test_the_table_has_every_arm_with_both_scorers_the_rates_and_the_papers_figures(
    design: Design, done: Cells, service: FakeService, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = experiment.load_samples(done, design)
    raw = {
        (seed, arm): second_scores(
            Client(service.url), cell(done, f"seed-{seed}/answers-{arm}")["data"]
        )
        for seed in SEEDS
        for arm in (BASE, *ARMS)
    }
    scale = dict.fromkeys(design.dimensions, (0.0, 2.0))
    judged = {
        arm: [
            with_scores(sample, raw[seed, arm], scale, "r2")
            for seed, sample in zip(SEEDS, samples[arm], strict=True)
        ]
        for arm in samples
    }
    experiment.write_results(done.root, done, design, samples, judged, service.settings.method)
    text = (done.root / "table.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    for part in (
        *ARMS,
        "overall",
        "null strategy accepted",
        "class repeats",
        "+4.6 %",
        "per seed",
        "at other thresholds",
        "simultaneous − plain",
        "sequential − unmeasured",
        "What pairs teach",
        "plain 6 / 6, more 6 / 6, unmeasured 6 / 6, simultaneous 6 / 6, sequential",
    ):
        assert part in text
    assert text.count("### Judged by") == 2
    results = json.loads((done.root / "results.json").read_text())
    found = results["the scorer trained against"]
    assert [item["name"] for item in found["evaluation"]["comparisons"]] == list(ARMS)
    assert len(found["by_seed"]["plain"]["overall"]) == len(SEEDS)
    changes = [
        each["changes"]["overall"]["change"]["value"] for each in found["evaluation"]["comparisons"]
    ]
    plain, ours = changes[0], changes[3]
    assert [item["name"] for item in found["against"]["plain"]["comparisons"]] == list(ARMS[3:])
    against = found["against"]["plain"]["comparisons"][0]["changes"]["overall"]["change"]
    assert against["value"] == pytest.approx(ours - plain)
    assert against["low"] < against["value"] < against["high"]
    # Two seeds differ from their mean by half of what they differ by.
    first, second = (
        found["by_seed"]["simultaneous"]["overall"][place]
        - found["by_seed"]["plain"]["overall"][place]
        for place in range(2)
    )
    error = f"{(first + second) / 2:+.2f} ± {abs(first - second) / 2:.2f} |"
    row = next(line for line in text.splitlines() if line.startswith("| simultaneous − plain"))
    assert row.endswith(error)
    assert [item["per_token"]["value"] for item in results["kl"]["plain"]] == [0.5, 0.5]
    assert found["evaluation"]["versions"][0]["num_answers"] == 2 * 4 * len(design.held_out)


def test_classes_of_two_seeds_are_a_retest() -> None:
    def batch(**classes: str) -> dict[str, Any]:
        pairs = [{"provenance": {"strategy": strategy}} for strategy in (None, "compose")]
        tried = [{"reason": "accepted"}, *9 * [{"reason": "gain"}]]
        return {"classes": classes, "confirmations": tried, "rollouts": 5, "pairs": pairs}

    rates = control_rates(
        {
            0: {"null": batch(), "mora": batch(a="multi", b="flat", c="uncertain")},
            1: {"null": batch(), "mora": batch(a="multi", b="multi", c="flat")},
        }
    )
    assert rates["class_agreement"] == {"count": 1, "of": 2, "share": 0.5}
    assert rates["decided_twice"]["count"] == 2
    assert rates["null_acceptance"]["share"] == 0.1
    assert rates["rewritten_pairs"]["mora"] == {"count": 2, "of": 4, "share": 0.5}


def test_held_out_prompts_are_never_trained_on(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"p{number % 50}", "kind": "ab"[number % 2], "split": split}
        for number in range(100)
        for split in ("train", "test")
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def design_of(*arguments: str) -> Design:
        parser = experiment._parser()
        return experiment.make_design(parser.parse_args(["--profile", "fake", *arguments]))

    with pytest.raises(MoraError, match="must share no prompt"):
        design_of("--prompts", str(path), "--held-out", str(path))
    rows = [{**row, "prompt": f"{row['split']} {row['prompt']}"} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = design_of("--prompts", str(path), "--held-out", str(path), "--scale", "0.5")
    assert len(found.prompts) == 12
    assert len(set(found.prompts)) == 12
    assert all(prompt.startswith("train") for prompt in found.prompts)
    assert all(prompt.startswith("test") for prompt in found.held_out)
    screened = design_of("--scale", "0.5", "--screen", "38")
    assert (len(screened.prompts), screened.num_single) == (19, 12)
    larger = ("--prompts", str(path), "--held-out", str(path), "--scale", "2", "--screen")
    design = design_of(*larger, "25")
    assert (len(design.prompts), design.num_single, len(design.held_out)) == (50, 48, 50)
    with pytest.raises(MoraError, match="--prompts must hold 52 prompts at this --scale, got 50"):
        design_of(*larger, "26")
    own = design_of()
    assert not set(own.prompts) & set(own.held_out)


def test_screening_keeps_the_prompts_that_carry_one_reward(
    service: FakeService, design: Design, tmp_path: Path
) -> None:
    class Enough(Exception):
        pass

    def until_batches(text: str) -> None:
        if "batch" in text:
            raise Enough

    many = [f"What of subject {number}?" for number in range(80)]
    screened = replace(design, prompts=tuple(many), num_single=5)
    cells = Cells(tmp_path, {})
    with pytest.raises(Enough):
        Arms(Client(service.url), screened, cells, until_batches, poll_s=0.01).run()
    classes = cell(cells, "screening")["classes"]
    assert len(classes) == len(many)
    single = [p for p, label in zip(many, classes, strict=True) if label.startswith("single:")]
    file = cell(cells, "seed-0/batch-plain-file")["id"]
    rows = list(Client(service.url).ndjson("GET", f"/v1/files/{file}/content"))
    assert [row["body"]["prompt"] for row in rows] == single[:5]
    with pytest.raises(MoraError, match="--screen must be larger"):
        Arms(Client(service.url), replace(screened, num_single=80), cells, until_batches).run()


def test_a_try_of_other_training_takes_the_batches_and_trains_the_arms_it_names(
    service: FakeService, design: Design, done: Cells, tmp_path: Path
) -> None:
    tried = replace(design, beta=0.3, arms=("simultaneous",))
    cells = Cells(tmp_path, configuration_of(tried))
    experiment.adopt_batches(cells, done.root)
    client = Client(service.url)
    before = len(client.get("/v1/batches", limit=100)["data"])
    Arms(client, tried, cells, lambda text: None, poll_s=0.01).run()
    assert len(client.get("/v1/batches", limit=100)["data"]) == before
    assert experiment.is_complete(cells, tried, with_kl=False)
    assert not (tmp_path / "seed-0" / "answers-plain.json").exists()
    jobs = [
        client.get(f"/v1/fine_tuning/jobs/{cell(each, 'seed-0/simultaneous-job')['job_id']}")
        for each in (done, cells)
    ]
    contents = [
        list(client.ndjson("GET", f"/v1/files/{job['training_file']}/content")) for job in jobs
    ]
    assert contents[0] == contents[1]
    betas = [job["method"]["dpo"]["hyperparameters"]["beta"] for job in jobs]
    assert betas == [0.1, 0.3]
    assert list(experiment.load_samples(cells, tried)) == [BASE, "simultaneous"]


def test_batches_of_other_prompts_are_not_taken(design: Design, tmp_path: Path) -> None:
    known = Cells(tmp_path / "known", configuration_of(design))
    other = replace(design, prompts=design.prompts[1:])
    cells = Cells(tmp_path / "other", configuration_of(other))
    with pytest.raises(MoraError, match="the same prompts"):
        experiment.adopt_batches(cells, known.root)
    with pytest.raises(MoraError, match="must be an experiment's --out"):
        experiment.adopt_batches(cells, tmp_path)


def test_batches_of_other_settings_are_taken_but_for_those_to_be_sampled_again(
    design: Design, done: Cells, tmp_path: Path
) -> None:
    tried = {**configuration_of(design), "config": {"method": {"num_candidates": 4}}}
    cells = Cells(tmp_path, tried)
    with pytest.raises(MoraError, match="the same config"):
        experiment.adopt_batches(cells, done.root)
    experiment.adopt_batches(cells, done.root, ["mora"])
    assert cells.has("seed-0/batch-plain")
    assert not cells.has("seed-0/batch-mora")
    assert not cells.has("seed-0/batch-mora-file")
    assert not cells.has("seed-0/batch-more"), "it draws as many rollouts as mora's does now"


def test_shares_add_up_and_pairs_are_drawn_alike_for_a_seed() -> None:
    stages = ("a", "b", "c")
    assert [share_of(10, place, stages) for place in range(3)] == [4, 3, 3]
    pairs = [{"seq": number} for number in range(10)]
    drawn = chosen_pairs(pairs, 4, 3)
    assert drawn == chosen_pairs(pairs, 4, 3) == sorted(drawn, key=lambda pair: pair["seq"])
