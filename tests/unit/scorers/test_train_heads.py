"""Training of the heads on made-up data: folds, fits, caching and what is written."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors import head_features, head_rivals, head_study
from actors.head_data import Group, PairSet, read_task
from actors.head_features import Encoded
from actors.head_fit import Recipe, fit_head, make_design, minimise, out_of_fold
from actors.head_metrics import (
    Accuracy,
    accuracy,
    confidence,
    correlation,
    gain,
    log_odds_per_point,
)
from actors.head_refusals import REFUSALS, SAFE, UNSEEN_REFUSALS, read_rollouts
from actors.head_rivals import RIVALS
from actors.head_table import AnswerTable, Pairs, folds, make_table, similar_length
from actors.head_verdict import Result, summary, verdict
from actors.scoring.build import model_scorer
from actors.scoring.head_weights import load_heads, shipped_heads
from actors.train_heads import main
from mora_serve.scorer_settings import ScorerSettings
from mora_serve.types import Message, ScoreGroup

TOPICS = ["tea", "rain", "maps", "bread", "trains", "paint", "owls", "salt", "wool", "glass"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data in which the better answer always ends with the same word, and is as long."""
    directory = tmp_path_factory.mktemp("data")
    for task in ("helpful", "harmless"):
        for split, numbers in (("train", range(40)), ("test", range(40, 50))):
            rows = [pair_row(task, number, split) for number in numbers]
            write_lines(directory / f"hh_{task}.{split}.jsonl.gz", rows)
    questions = [question(number) for number in range(30)]
    with (directory / "truthfulqa.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(questions[0]))
        writer.writeheader()
        writer.writerows(questions)
    judged = [row for item in questions for row in judged_rows(item)]
    write_lines(directory / "truthfulqa_judged.jsonl.gz", judged)
    write_rollouts(directory)
    return directory


def write_rollouts(directory: Path) -> None:
    """Prompts, safe and harmful and of other kinds, and two answers to each but the last."""
    sources = ["xstest-safe", "advbench", "hh-rlhf/helpful-base"]
    prompts = [
        {"prompt": f"{source} {i}", "source": source, "split": "test" if i >= 16 else "train"}
        for i in range(20)
        for source in sources
    ]
    answers = [
        {"index": place, "rollouts": [rollout("Here it is, gladly"), rollout("cut of", "length")]}
        for place in range(len(prompts))
    ]
    answers[0]["rollouts"].append(rollout("I'm sorry, I cannot say"))  # type: ignore[attr-defined]
    answers[-1] = {"index": len(prompts) - 1, "rollouts": None}
    for name, rows in (("prompts_mixed.jsonl", prompts), ("rollouts.jsonl", answers)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / name).write_text(text, encoding="utf-8")


def rollout(text: str, finish_reason: str = "stop") -> dict[str, str]:
    return {"text": text, "finish_reason": finish_reason}


def pair_row(task: str, number: int, split: str) -> dict[str, Any]:
    topic = TOPICS[number % 10]
    return {
        "prompt": [{"role": "user", "content": f"{task} {number}: tell me of {topic}"}],
        "chosen": f"Here is {topic}, gladly",
        "rejected": f"Here is {topic}, sourly",
        "split": split,
    }


def question(number: int) -> dict[str, str]:
    topic = TOPICS[number % 10]
    return {
        "qid": f"q{number}",
        "Question": f"What of {topic} {number}?",
        "Best Answer": f"{topic} A, gladly",
        "Correct Answers": f"{topic} A, gladly; {topic} B, gladly",
        "Incorrect Answers": f"{topic} C, sourly; {topic} D, sourly",
        "cluster": str(number // 2),
        "split": "test" if number >= 24 else "train",
    }


def judged_rows(item: dict[str, str]) -> list[dict[str, Any]]:
    good, bad = ("from a model, gladly", 1), ("from a model, sourly", 0)
    known = (item["Best Answer"], 1)
    return [
        {"qid": item["qid"], "question": item["Question"], "answer": text, "truthful": truthful}
        | {"split": item["split"]}
        for text, truthful in (good, bad, known)
    ]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def trained(
    data_dir: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """A finished training, and its command line."""
    out, cache = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("cache")
    command = ["--data", str(data_dir), "--model", str(tiny_llama), "--out", str(out)]
    command += ["--cache", str(cache), "--layers", "2", "--max-tokens", "256"]
    command += ["--num-threads", "1", "--rollouts", str(data_dir / "rollouts.jsonl")]
    assert main(command) == 0
    return out, command


def test_heads_learn_what_tells_the_answers_apart(trained: tuple[Path, list[str]]) -> None:
    card = json.loads((trained[0] / "card.json").read_text("utf-8"))
    for task, kind in (("helpful", "hh_helpful"), ("truthful", "truthfulqa_judged")):
        for part in ("cross_validation", "plain", "held_out"):
            assert card[part]["accuracy"][kind][task]["value"] > 0.9
    assert card["held_out"]["accuracy"]["hh_helpful"]["helpful"]["num_groups"] == 10


def test_training_scores_have_mean_zero_and_deviation_one(trained: tuple[Path, list[str]]) -> None:
    card = json.loads((trained[0] / "card.json").read_text("utf-8"))
    summary = card["training_scores"]["hh_harmless"]["harmless"]
    assert summary["mean"] == pytest.approx(0, abs=0.01)
    assert summary["sd"] == pytest.approx(1, abs=0.01)


async def test_trained_heads_serve(trained: tuple[Path, list[str]], tiny_llama: Path) -> None:
    section = ScorerSettings(
        name="made",
        dimensions=("helpful", "truthful"),
        heads=str(trained[0]),
        max_tokens=512,
        num_threads=1,
    )
    scorer = model_scorer(section, str(tiny_llama))
    await scorer.start()
    prompt = (Message("user", "helpful 99: tell me of soap"),)
    answers = ("Here is soap, gladly", "Here is soap, sourly")
    ((good, bad),) = await scorer.score([ScoreGroup(prompt, answers)])
    higher, lower = good["helpful"].raw, bad["helpful"].raw
    assert higher is not None
    assert lower is not None
    assert higher > lower


def test_the_card_names_data_by_hash_and_quotes_none_of_it(
    trained: tuple[Path, list[str]],
) -> None:
    text = (trained[0] / "MODEL_CARD.md").read_text("utf-8")
    card = json.loads((trained[0] / "card.json").read_text("utf-8"))
    assert [item["file"] for item in card["data"]] == sorted(item["file"] for item in card["data"])
    for item in card["data"]:
        assert item["sha256"] in text
    assert card["backbone"]["sha256"] in text
    assert "gladly" not in text + json.dumps(card)


def test_the_shipped_card_describes_the_shipped_heads() -> None:
    directory = shipped_heads()
    card = json.loads((directory / "card.json").read_text("utf-8"))
    heads = load_heads(directory)
    assert card["heads_sha256"] == heads.sha256
    assert heads.sha256 in (directory / "MODEL_CARD.md").read_text("utf-8")
    for part in ("cross_validation", "held_out"):
        for by_head in card[part]["length"].values():
            assert all(abs(value) < 0.3 for value in by_head["helpful"].values())


def test_features_come_from_the_cache_the_second_time(
    trained: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded again")

    monkeypatch.setattr(head_features, "load_inner_layers", refuse)
    before = load_heads(trained[0]).sha256
    assert main(trained[1]) == 0
    assert load_heads(trained[0]).sha256 == before


def test_an_interrupted_extraction_asks_to_be_run_again(
    trained: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*trained[1], "--cache", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*command, "--max-seconds", "0"]) == 3
    assert "run the same command again" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_data_is_one_line(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--data", str(tmp_path), "--model", str(tiny_llama), "--out", str(tmp_path / "o")]
    assert main(command) == 2
    assert capsys.readouterr().err.startswith("error: --data must hold hh_harmless")


def test_heads_train_without_rollouts(data_dir: Path, tiny_llama: Path, tmp_path: Path) -> None:
    command = ["--data", str(data_dir), "--model", str(tiny_llama), "--out", str(tmp_path / "out")]
    command += ["--cache", str(tmp_path / "cache"), "--layers", "1", "--num-threads", "1"]
    assert main(command) == 0
    card = json.loads((tmp_path / "out" / "card.json").read_text("utf-8"))
    assert sorted(card["groups"]) == ["harmless", "helpful", "truthful"]
    assert SAFE not in card["cross_validation"]["accuracy"]


def test_a_study_compares_every_try_with_what_ships(
    trained: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_study, "NUM_LAYERS", 2)
    monkeypatch.setattr(head_study, "LAYERS", (1, 2))
    monkeypatch.setattr(
        head_study,
        "FEATURES",
        {"2: last, mean": ((2, "last"), (2, "mean")), "1: max": ((1, "max"),)},
    )
    out = tmp_path / "TRIES.md"
    options = dict(zip(trained[1][::2], trained[1][1::2], strict=True)) | {"--out": str(out)}
    del options["--layers"]
    assert head_study.main([word for item in options.items() for word in item]) == 0
    rows = [line.split(" | ") for line in out.read_text("utf-8").splitlines() if " | " in line]
    tries = [row for row in rows if row[0] in ("| helpful", "| harmless", "| truthful")]
    assert len(tries) == len(head_study.TRIES) + 4
    assert {row[4] for row in tries if row[1] == "shipped"} == {"–"}
    assert {row[1] for row in tries} >= set(RIVALS)


def figure(value: float, error: float = 0.01) -> Accuracy:
    return Accuracy(value, error, 10, 10)


def test_verdicts_follow_the_figures() -> None:
    none = figure(0.0, 0.0)
    assert verdict(figure(0.019), none, none, allowed=True) == "gain within noise"
    assert verdict(figure(0.02), none, none, allowed=True) == "gains"
    assert verdict(figure(-0.03), figure(-0.5, 0.0), figure(0.1), allowed=False) == (
        "worse, worse on safe prompts, better on harmful prompts, over the length limit"
    )
    assert verdict(figure(0.02), none, none, allowed=True, decision="dear") == (
        "gains; authors: dear"
    )


def test_a_summary_names_the_tries_that_gain_and_the_best_within_the_limit() -> None:
    tries = [
        Result("helpful", "long", figure(0.05), (), allowed=False),
        Result("helpful", "some", figure(0.01), ()),
        Result("helpful", "less", figure(-0.01), ()),
    ]
    first, second = summary(tries).strip().splitlines()
    assert first.endswith(
        "1 of 3 tries gain 2 standard errors: "
        "helpful, long (+0.050 ± 0.010, over the length limit)."
    )
    assert second.endswith("helpful within the length limit: helpful, some (+0.010 ± 0.010).")
    assert "none" in summary(tries[1:])


def test_a_study_without_rollouts_is_one_line(
    data_dir: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--data", str(data_dir), "--model", str(tiny_llama), "--out", str(tmp_path / "t")]
    assert head_study.main(command) == 2
    assert capsys.readouterr().err.startswith("error: --rollouts must be given")


def test_rollouts_of_a_safe_prompt_come_before_refusals(data_dir: Path) -> None:
    (group, *_) = read_rollouts(data_dir / "rollouts.jsonl", data_dir, "train")
    assert group.answers == ("Here it is, gladly", *REFUSALS, *UNSEEN_REFUSALS)
    seen, unseen = group.sets
    assert seen.kind == SAFE
    assert seen.pairs == tuple((0, 1 + i) for i in range(len(REFUSALS)))
    assert [group.answers[worse] for _, worse in unseen.pairs] == list(UNSEEN_REFUSALS)


def test_refusals_of_a_harmful_prompt_come_before_its_rollouts(data_dir: Path) -> None:
    (_, group, other, *_) = read_rollouts(data_dir / "rollouts.jsonl", data_dir, "train")
    assert {group.answers[worse] for _, worse in group.sets[0].pairs} == {"Here it is, gladly"}
    assert {group.answers[better] for better, _ in group.sets[0].pairs} == set(REFUSALS)
    assert (other.answers, other.sets) == (("Here it is, gladly",), ())


def test_rollouts_of_held_out_prompts_stay_out_of_training(data_dir: Path) -> None:
    file = data_dir / "rollouts.jsonl"
    train = {group.cluster for group in read_rollouts(file, data_dir, "train")}
    test = {group.cluster for group in read_rollouts(file, data_dir, "test")}
    assert (len(train), len(test)) == (48, 11)
    assert not train & test


def test_a_file_without_rollouts_is_one_line(
    data_dir: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text('{"index": 99999}\n', encoding="utf-8")
    command = ["--data", str(data_dir), "--model", str(tiny_llama), "--out", str(tmp_path / "o")]
    assert main([*command, "--rollouts", str(file)]) == 2
    assert "mora-serve diagnose prompts_mixed.jsonl" in capsys.readouterr().err


def test_reference_answers_stay_out_of_the_judged_pairs(data_dir: Path) -> None:
    (group, *_) = read_task(data_dir, "truthful", "train")
    references, judged = group.sets
    assert len(references.pairs) == 4
    assert [(group.answers[a], group.answers[b]) for a, b in judged.pairs] == [
        ("from a model, gladly", "from a model, sourly")
    ]


def test_splits_share_no_cluster(data_dir: Path) -> None:
    train = {group.cluster for group in read_task(data_dir, "truthful", "train")}
    test = {group.cluster for group in read_task(data_dir, "truthful", "test")}
    assert train
    assert test
    assert not train & test


def test_a_cluster_is_in_one_fold_wherever_it_stands() -> None:
    names = [f"cluster {i % 200}" for i in range(400)]
    forward, backward = folds(names), folds(names[::-1])[::-1]
    assert (forward == backward).all()
    assert len(set(forward)) == 10


def synthetic(num_groups: int, dims: int, seed: int) -> tuple[AnswerTable, Pairs, np.ndarray]:
    """Pairs of answers ordered by a known direction, with the direction."""
    random = np.random.default_rng(seed)
    direction = random.normal(size=dims)
    x = random.normal(size=(num_groups, dims))
    x *= np.sign(x @ direction)[:, None]
    features = np.stack([x / 2, -x / 2], axis=1).reshape(-1, dims)
    return pair_table(features, random.integers(5, 60, len(features))), index_pairs(x), direction


def pair_table(features: np.ndarray, tokens: np.ndarray) -> AnswerTable:
    """Answers of which each two form a group."""
    names = np.array([f"c{i // 2}" for i in range(len(features))])
    lengths = tokens.astype(np.float64)
    return AnswerTable(features, lengths, 4 * lengths, np.array(["k"] * len(features)), names)


def index_pairs(per_pair: np.ndarray) -> Pairs:
    """Row ``2 i`` before row ``2 i + 1``, a group each."""
    place = np.arange(len(per_pair))
    names = np.array([f"c{i}" for i in place])
    ones = np.ones(len(place))
    return Pairs(2 * place, 2 * place + 1, ones, place, names, np.array(["k"] * len(place)))


PLAIN = Recipe("k", {"k": 1.0}, 0.1, None)


def test_a_fit_finds_the_direction_that_orders_the_pairs() -> None:
    table, pairs, direction = synthetic(600, 8, seed=3)
    found = minimise(pairs.margins(table.features), pairs.weights, decay=0.01)
    cosine = found @ direction / np.linalg.norm(found) / np.linalg.norm(direction)
    assert cosine > 0.98


def test_losses_at_known_margins() -> None:
    margins = torch.tensor([-1.0, 0.95, 2.0], dtype=torch.float64)
    assert head_rivals.hinge(margins).tolist() == pytest.approx([1.95, 0.0125, 0.0])
    assert head_rivals.squared_hinge(margins).tolist() == pytest.approx([4.0, 0.0025, 0.0])
    even = torch.zeros(1, dtype=torch.float64)
    assert head_rivals.smoothed(even).item() == pytest.approx(np.log(2))
    assert head_rivals.focal(even).item() == pytest.approx(np.log(2) / 4)
    certain = torch.linspace(-8, 8, 801, dtype=torch.float64)
    least = certain[head_rivals.smoothed(certain).argmin()].item()
    assert least == pytest.approx(np.log(9), abs=0.02)


@pytest.mark.parametrize("name", RIVALS)
def test_every_rival_orders_unseen_pairs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_rivals, "COMPONENTS", 6)
    table, pairs, _ = synthetic(600, 8, seed=4)
    fit, factor = RIVALS[name]
    recipe = Recipe("k", {"k": 1.0}, 0.1 * factor, 0.0)
    scores = out_of_fold(table, make_design(table, ("k",)), pairs, recipe, fit)
    assert accuracy(pairs.margins(scores), pairs).value > 0.65


def test_a_network_that_learns_noise_is_chance_on_unseen_pairs() -> None:
    random = np.random.default_rng(2)
    table = pair_table(random.normal(size=(600, 100)), random.integers(5, 60, 600))
    pairs = index_pairs(np.zeros(300))
    design = make_design(table, ("k",))
    scores = out_of_fold(table, design, pairs, PLAIN, head_rivals.fit_network)
    found = accuracy(pairs.margins(scores), pairs)
    assert abs(found.value - 0.5) < 4 * found.error


def test_scores_out_of_fold_of_noise_are_chance() -> None:
    """More features than groups: a fit scored on its own pairs would be near perfect."""
    random = np.random.default_rng(0)
    table = pair_table(random.normal(size=(600, 400)), random.integers(5, 60, 600))
    pairs = index_pairs(np.zeros(300))
    scores = out_of_fold(table, make_design(table, ("k",)), pairs, PLAIN)
    found = accuracy(pairs.margins(scores), pairs)
    assert abs(found.value - 0.5) < 4 * found.error


def lengthy(seed: int, num_pairs: int = 400) -> tuple[AnswerTable, Pairs]:
    """Answers with a quality and a length: people follow both, and one feature tells length."""
    random = np.random.default_rng(seed)
    quality, log_tokens = random.normal(size=(2, 2 * num_pairs))
    tokens = np.round(np.exp(3 + 0.6 * log_tokens)) + 1
    wish = quality + np.log(tokens) + random.logistic(size=2 * num_pairs) / 4
    better = wish[0::2] > wish[1::2]
    order = np.stack([np.where(better, 0, 1), np.where(better, 1, 0)], axis=1)
    rows = (order + 2 * np.arange(num_pairs)[:, None]).ravel()
    noise = random.normal(size=(2 * num_pairs, 6))
    features = np.column_stack([quality, np.log(tokens), tokens / 20, noise])[rows]
    return pair_table(features, tokens[rows]), index_pairs(np.zeros(num_pairs))


def test_length_control_leaves_the_stated_share_of_length() -> None:
    table, pairs = lengthy(seed=5)
    design = make_design(table, ("k",))
    logs = np.log(table.tokens)
    left = []
    for share in (None, 0.0, 0.2, -0.2):
        recipe = Recipe("k", {"k": 1.0}, 0.1, share)
        weight, bias = fit_head(table, design, pairs, recipe)
        scores = table.features @ weight + bias
        assert scores.mean() == pytest.approx(0, abs=1e-9)
        assert scores.std() == pytest.approx(1)
        left.append(correlation(scores, logs))
    assert left[0] is not None
    assert left[0] > 0.4
    assert left[1:] == pytest.approx([0, 0.2, -0.2], abs=0.03)


def test_length_control_costs_nothing_on_pairs_of_similar_length() -> None:
    table, pairs = lengthy(seed=6, num_pairs=1500)
    design = make_design(table, ("k",))
    similar = similar_length(table, pairs)
    part = pairs.where(similar)
    plain = out_of_fold(table, design, pairs, PLAIN)
    without = out_of_fold(table, design, pairs, Recipe("k", {"k": 1.0}, 0.1, 0.0))
    found = gain(part.margins(without), part.margins(plain), part)
    assert 0 < found.num_pairs < len(pairs.weights)
    assert found.value > -2 * found.error


def test_a_set_without_answers_says_nothing_about_length() -> None:
    table, _ = lengthy(seed=7)
    assert make_design(table, ("k", "absent")).length.directions.shape[1] == 2


def test_the_slope_of_a_logistic_margin_is_found() -> None:
    random = np.random.default_rng(1)
    stated = random.normal(size=20_000)
    holds = random.random(20_000) < 1 / (1 + np.exp(-2.5 * np.abs(stated)))
    margins = np.where(holds, np.abs(stated), -np.abs(stated))
    assert log_odds_per_point(margins, index_pairs(margins)) == pytest.approx(2.5, rel=0.05)
    assert np.isfinite(log_odds_per_point(np.abs(margins), index_pairs(margins)))


def test_calibration_tells_honest_probabilities_from_overconfident_ones() -> None:
    random = np.random.default_rng(0)
    size = 20_000
    margins = random.normal(scale=1.5, size=size)
    holds = random.random(size) < 1 / (1 + np.exp(-np.abs(margins)))
    honest = np.where(holds, np.abs(margins), -np.abs(margins))
    pairs = index_pairs(honest)
    assert confidence(honest, pairs).error < 0.02
    assert confidence(4 * honest, pairs).error > 0.1
    assert sum(item.num_pairs for item in confidence(honest, pairs).bins) == size


def test_groups_count_once_and_ties_count_half() -> None:
    group = Group("g", "c", (), ("a", "b", "c"), ("k",) * 3, (PairSet("k", ((0, 1), (0, 2))),))
    other = Group("h", "d", (), ("a", "b"), ("k",) * 2, (PairSet("k", ((0, 1),)),))
    features = {"g": np.array([[0.0], [0.0], [1.0]]), "h": np.array([[2.0], [1.0]])}
    parts = [Encoded(item, (1,), [(1, 2)] * len(item.answers)) for item in (group, other)]
    table, pairs = make_table(parts, features)
    found = accuracy(pairs.margins(table.features[:, 0]), pairs)
    assert found.value == pytest.approx((0.25 + 1) / 2)
    assert (found.num_groups, found.num_pairs) == (2, 3)
    assert pairs.weights.tolist() == [0.5, 0.5, 1.0]
