"""Writes the model card of the reward heads as Markdown, from the figures of ``card.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

INTRODUCTION = """\
# {name}

Linear reward heads for {dimensions} on the first {layers} layers of a small chat model. They make
the embedded profile work without a download: enough to see how rewards of one policy's answers
spread and conflict, not enough to align a model that people will use.

- Backbone: sha256 `{backbone}`; the heads refuse any other.
- Heads: sha256 `{heads}`. A score is linear in the last (end-of-turn) and the mean hidden state of
  the answer, with mean 0 and standard deviation 1 over the head's training answers. Larger is
  better. Prompts are written with the backbone's chat template and its default system turn.
- Longest prompt plus answer in training: {max_tokens} tokens. Longer ones are extrapolation.
"""

BIASES = """\
## Known biases

- `truthful` is plausibility in the style of TruthfulQA. It knows the form of such questions and of
  careful answers far better than it knows facts; it cannot check a claim.
- `helpful` likes length and dislikes refusals; `harmless` likes short answers and refusals. Part of
  their disagreement, which the correlations show, is this rather than a conflict of values.
- The preference data are English, from 2021 and 2022, written by crowd workers against early
  models. They contain offensive text, and the judgments of their annotators.
- All HH pairs come from the official *test* splits of that data set. Accuracy on that test data
  cannot be quoted for these heads; the held-out part here was set apart before training.
- Answers cut at a token limit score wrongly, since the end of the turn is part of the features.
- Over-refusal was not measured.
"""


def render_card(card: Mapping[str, Any]) -> str:
    """The whole card as Markdown."""
    introduction = INTRODUCTION.format(
        name=card["name"],
        dimensions=", ".join(card["dimensions"]),
        layers=card["backbone"]["num_layers"],
        backbone=card["backbone"]["sha256"],
        heads=card["heads_sha256"],
        max_tokens=card["recipe"]["max_tokens"],
    )
    parts = [
        introduction,
        _validation(card),
        _held_out(card),
        _calibration(card),
        _scales(card),
        BIASES,
        _data(card),
    ]
    return "\n".join(parts)


def _validation(card: Mapping[str, Any]) -> str:
    rows = [
        [task, kind, _accuracy(found), str(found["num_groups"])]
        for task, kinds in card["cross_validation"].items()
        for kind, found in kinds.items()
    ]
    return (
        "## Pair accuracy, cross-validated\n\n"
        "Ten folds over training groups; a conversation's first turn, or a cluster of similar\n"
        "questions, is in one fold only. Standard errors over groups. Quote these figures. The\n"
        "ridge penalties and the weight of reference pairs were chosen by them, which flatters\n"
        "them by less than their error.\n\n" + _table(["head", "pairs", "accuracy", "groups"], rows)
    )


def _held_out(card: Mapping[str, Any]) -> str:
    found = card["held_out"]
    names = card["dimensions"]
    rows = [
        [kind]
        + [_accuracy(heads[name]) for name in names]
        + [_accuracy(found["longer_wins"][kind]), str(heads[names[0]]["num_groups"])]
        for kind, heads in found["accuracy"].items()
    ]
    return (
        "## Pair accuracy, held out\n\n"
        "Every head on every held-out set, looked at once, after the fit.\n\n"
        + _table(["pairs", *names, "longer wins", "groups"], rows)
    )


def _calibration(card: Mapping[str, Any]) -> str:
    rows = [
        [task, kind, f"{found['error']:.3f}"]
        + [
            f"{item['confidence']:.2f} → {item['accuracy']:.2f} ({item['num_pairs']})"
            for item in found["bins"]
        ]
        for task, kinds in card["calibration"].items()
        for kind, found in kinds.items()
    ]
    width = max(len(row) for row in rows)
    header = ["head", "pairs", "error", *(f"bin {i + 1}" for i in range(width - 3))]
    slopes = ", ".join(f"{name} {value:.2f}" for name, value in card["log_odds_per_point"].items())
    return (
        "## Calibration of pair probabilities\n\n"
        "A difference of one point between two answers is this much log-odds of the preference:\n"
        f"{slopes}. By the out-of-fold fits: expected calibration error, and per bin\n"
        "the stated probability, the share that held, and the number of pairs.\n\n"
        + _table(header, [row + [""] * (width - len(row)) for row in rows])
    )


def _scales(card: Mapping[str, Any]) -> str:
    found = card["held_out"]
    pairs = list(next(iter(found["correlation"].values())))
    correlations = [
        [kind] + [f"{row[pair]:+.2f}" for pair in pairs]
        for kind, row in found["correlation"].items()
    ]
    names = card["dimensions"]
    lengths = [
        [kind] + [f"{row[name]:+.2f}" for name in names] for kind, row in found["length"].items()
    ]
    scores = [
        [kind] + [f"{row[name]['mean']:+.2f} ± {row[name]['sd']:.2f}" for name in names]
        for kind, row in card["training_scores"].items()
    ]
    return (
        "## Scores\n\nMean and standard deviation on training answers:\n\n"
        + _table(["answers", *names], scores)
        + "\nCorrelation between heads on held-out answers:\n\n"
        + _table(["answers", *pairs], correlations)
        + "\nCorrelation with the logarithm of the answer's length:\n\n"
        + _table(["answers", *names], lengths)
    )


def _data(card: Mapping[str, Any]) -> str:
    rows = [[item["file"], f"`{item['sha256']}`"] for item in card["data"]]
    counts = [
        [task] + [str(found[key]) for key in sorted(found)]
        for task, found in card["groups"].items()
    ]
    keys = sorted(next(iter(card["groups"].values())))
    return (
        "## Data\n\nHH-RLHF (Anthropic, MIT), TruthfulQA and its judged answers (Apache-2.0). No\n"
        "sentence of them is part of this repository.\n\n"
        + _table(["file", "sha256"], rows)
        + "\nGroups read, and used (the rest has a blank answer or is too long):\n\n"
        + _table(["head", *(key.replace("_", " ") for key in keys)], counts)
    )


def _accuracy(found: Mapping[str, Any]) -> str:
    return f"{found['value']:.3f} ± {found['error']:.3f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
