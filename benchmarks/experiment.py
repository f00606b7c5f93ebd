"""``python -m benchmarks.experiment``: does measured rewriting make a better policy?

Trains the arms of :mod:`benchmarks.experiment_arms` from one base version on a stack of its own and
compares them on held-out prompts, over several seeds: no rewriting with equally many pairs and
steps, the same with equally many rollouts, unmeasured rewriting, MORA simultaneous and sequential;
beside them the null strategy's acceptance and how often classes repeat. Resumable: finished pieces
are JSON files under ``--out``, and the same command goes on with what is missing; more ``--seeds``
may be added to it. ``--scale`` multiplies prompts and steps; 1 is sized to two cores and takes
about two hours. ``--screen N`` diagnoses N prompts first and trains on those of a single reward,
which are the ones that MORA rewrites. A try that changes training alone (steps, beta, learning
rate) takes the batches of a run that has them with ``--batches-from``, and may train only some
``--arms``; one that changes how rewrites are made or accepted samples those batches ``--again``.

With ``--judge-heads`` the held-out answers are scored once more by heads that nothing was trained
against (``python -m actors.train_heads --layers 24 ...``), so that a policy which only pleases its
scorer shows. Their z has the base's answers as pool. Written: ``results.json`` and ``table.md``.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.experiment_arms import (
    ARMS,
    BASE,
    BATCHES,
    SEQUENTIAL,
    Arms,
    Design,
    stored_answers,
)
from benchmarks.experiment_cells import Cells
from benchmarks.experiment_judge import judge
from benchmarks.experiment_table import (
    PAPER,
    Samples,
    alternative_lines,
    compare_arms,
    compare_with_alternatives,
    confirmations,
    control_rates,
    kl_lines,
    pair_lines,
    rate_lines,
    table_lines,
)
from benchmarks.experiment_thresholds import KINDS, threshold_lines
from benchmarks.stack import running
from mora_serve.cli.common import read_prompts
from mora_serve.client import Client
from mora_serve.config import MethodSettings, Settings, load_settings
from mora_serve.demo import DEMO_PROMPTS
from mora_serve.divergence import DivergenceSettings
from mora_serve.errors import MoraError
from mora_serve.evaluation import VersionSample
from mora_serve.evaluation_run import shipped_calibrators
from mora_serve.identity import content_hash
from mora_serve.settings_sources import read_yaml
from mora_serve.stack import Interrupted
from mora_serve.version_sampling import sample_of

Json = dict[str, Any]
NUM_PROMPTS, NUM_HELD_OUT, NUM_STEPS = 24, 48, 12
"""At scale 1."""
SCREENING, BATCH_CELLS = "screening.json", "seed-*/batch-{kind}*.json"
"""What does not depend on how policies are trained and judged ..."""
TRAINING = frozenset(
    {
        "held_out",
        "num_steps",
        "batch_size",
        "n_eval",
        "beta",
        "learning_rate_multiplier",
        "max_pairs",
    }
)
"""... which is this part of the configuration."""


def main() -> int:
    try:
        return run(_parser().parse_args())
    except MoraError as error:
        _note(f"error: {error}")
        return 1


def run(args: argparse.Namespace) -> int:
    """The experiment of a command line; returns the exit status."""
    design = make_design(args)
    tried = {} if args.config is None else read_yaml(args.config)
    cells = open_cells(args, design, tried)
    _note(
        f"{len(design.prompts)} prompts, {len(design.held_out)} held out, seeds {design.seeds}, "
        f"{design.num_steps} steps"
    )
    overrides = {**tried, "data_dir": str((args.out / "state").resolve())}
    settings = load_settings(args.profile, overrides=tried)
    with_kl = divergence_settings(settings) is not None and not args.no_kl
    if not is_complete(cells, design, with_kl=with_kl):
        try:
            with running(args.profile, overrides) as stack:
                kl = divergence_settings(stack.settings) if with_kl else None
                Arms(Client(stack.url), design, cells, _note, kl=kl).run()
        except (Interrupted, KeyboardInterrupt):
            _note("stopped; the same command goes on from here")
            return 130
    samples = load_samples(cells, design)
    judged = None
    if args.judge_heads is not None:
        judged = judge(cells, design, args.judge_heads, _note)
    write_results(args.out, cells, design, samples, judged, settings.method)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prompts", type=Path, help="training prompts; default: half the demo's")
    parser.add_argument("--held-out", type=Path, help="prompts never trained on; likewise")
    parser.add_argument("--out", type=Path, default=Path("runs/experiment"))
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies prompts and steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="only these")
    parser.add_argument("--batches-from", type=Path, help="--out of a run with the same batches")
    parser.add_argument("--again", nargs="+", choices=BATCHES, default=(), help="but sample these")
    parser.add_argument(
        "--screen", type=int, help="train on those of this many, times --scale, that are single"
    )
    parser.add_argument("--order", nargs="+", help="dimensions in the order of their stages")
    parser.add_argument("--n-eval", type=int, default=4, help="held-out answers per prompt")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--learning-rate-multiplier", type=float, default=12.0)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--no-kl", action="store_true", help="spare a minute and more per arm")
    parser.add_argument("--judge-heads", type=Path, help="directory of other heads")
    parser.add_argument("--profile", default="embedded")
    parser.add_argument("--config", type=Path, help="YAML over the profile: other thresholds ...")
    return parser


def make_design(args: argparse.Namespace) -> Design:
    """The design of an experiment; prompts are drawn once, alike for every seed."""
    if (args.prompts is None) != (args.held_out is None):
        raise MoraError("--prompts and --held-out must be given together")
    if args.prompts is None:
        prompts, held_out = _halves([row["prompt"] for row in read_prompts(DEMO_PROMPTS)])
    else:
        prompts = _spread(_of_split(args.prompts, {"train"}))
        held_out = _spread(_of_split(args.held_out, {"test", "held-out", "validation"}))
    num_prompts, num_held_out, num_screened = (
        max(1, round(number * args.scale))
        for number in (NUM_PROMPTS, NUM_HELD_OUT, args.screen or NUM_PROMPTS)
    )
    if args.prompts is not None and len(prompts) < num_screened:
        raise MoraError(
            f"--prompts must hold {num_screened} prompts at this --scale, got {len(prompts)}"
        )
    if len(held_out) < num_held_out:
        _note(f"held out are all {len(held_out)} prompts there are, not {num_held_out}")
    prompts = prompts[:num_screened]
    held_out = held_out[:num_held_out]
    both = {content_hash(prompt) for prompt in prompts} & {content_hash(p) for p in held_out}
    if both:
        raise MoraError(f"--held-out must share no prompt with --prompts, got {len(both)} in both")
    steps = max(len(ARMS), round(NUM_STEPS * args.scale))
    return Design(
        prompts=tuple(prompts),
        held_out=tuple(held_out),
        seeds=tuple(args.seeds),
        dimensions=tuple(args.order or load_settings(args.profile, environ={}).dimensions),
        num_steps=steps,
        batch_size=args.batch_size,
        n_eval=args.n_eval,
        beta=args.beta,
        learning_rate_multiplier=args.learning_rate_multiplier,
        max_pairs=steps * args.batch_size,
        num_single=num_prompts if args.screen else None,
        arms=tuple(arm for arm in ARMS if arm in args.arms),
    )


def open_cells(args: argparse.Namespace, design: Design, tried: Mapping[str, Any]) -> Cells:
    """The cells of this design; seeds and arms have their own, so that more can be added."""
    configuration = {**json.loads(json.dumps(asdict(design))), "profile": args.profile}
    del configuration["seeds"], configuration["arms"]
    if design.num_single is None:
        del configuration["num_single"]
    cells = Cells(args.out, {**configuration, "config": dict(tried)})
    if args.batches_from is not None:
        adopt_batches(cells, args.batches_from, args.again)
    return cells


def adopt_batches(cells: Cells, other: Path, again: Collection[str] = ()) -> None:
    """Take the batches of another run, but for those to be sampled again under this one's settings.

    Raises :class:`MoraError` when the other run differs in more than that lets it differ.
    """
    # `more` draws as many rollouts as `mora` did.
    stale = {*again, *(["more"] if "mora" in again else [])}
    kinds = [kind for kind in (*BATCHES, "more") if kind not in stale]
    differing = {*TRAINING, "config"} if again else TRAINING
    cells.adopt(other, [SCREENING, *(BATCH_CELLS.format(kind=kind) for kind in kinds)], differing)


def divergence_settings(settings: Settings) -> DivergenceSettings | None:
    """How KL is measured on this machine; ``None`` where no model or no whole distribution is."""
    policy, sampling = settings.policy, settings.sampling
    if policy.backend == "fake" or sampling.top_p < 1 or sampling.temperature == 0:
        return None
    return DivergenceSettings(Path(str(policy.path)), sampling.temperature)


def _of_split(path: Path, splits: set[str]) -> list[Json]:
    """Rows of a file; where rows name their split, those of ``splits`` only."""
    rows = [row for row in read_prompts(path) if row.get("split") is None or row["split"] in splits]
    if not rows:
        raise MoraError(f"{path} must hold rows of split {' or '.join(sorted(splits))}, got none")
    return rows


def _spread(rows: Sequence[Json]) -> list[Any]:
    """Prompts in random order, every kind in turn, each prompt once."""
    kinds: dict[str, dict[str, Any]] = {}
    for row in random.Random(0).sample(list(rows), len(rows)):
        kind = kinds.setdefault(str(row.get("kind") or ""), {})
        kind.setdefault(content_hash(row["prompt"]), row["prompt"])
    left = [list(kind.values()) for _, kind in sorted(kinds.items())]
    found = []
    while any(left):
        found += [kind.pop(0) for kind in left if kind]
    return found


def _halves(prompts: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    return list(prompts[::2]), list(prompts[1::2])


def is_complete(cells: Cells, design: Design, *, with_kl: bool) -> bool:
    """Whether every batch and held-out answer is there, and KL, so that no stack is needed."""
    names = [*(f"batch-{kind}" for kind in (*BATCHES, "more"))]
    names += [f"answers-{arm}" for arm in (BASE, *design.arms)]
    names += [f"kl-{arm}" for arm in design.arms if with_kl]
    return all(cells.has(f"seed-{seed}/{name}") for seed in design.seeds for name in names)


def load_samples(cells: Cells, design: Design) -> Samples:
    """Every arm's held-out answers with the scores of the scorer that was trained against."""

    def sample(seed: int, arm: str) -> VersionSample:
        data = stored_answers(cells, seed, arm)
        plain = sample_of(arm, data, None)
        for calibrator in shipped_calibrators(tuple(plain.scorers)):
            try:
                calibrator.check(plain.scorers)
                return sample_of(arm, data, calibrator)
            except MoraError:
                continue
        return plain

    return {arm: [sample(seed, arm) for seed in design.seeds] for arm in (BASE, *design.arms)}


def load_divergences(cells: Cells, design: Design) -> dict[str, list[Json]]:
    """KL to the base by arm, one of every seed that measured it."""
    found: dict[str, list[Json]] = {}
    for arm in design.arms:
        names = [f"seed-{seed}/kl-{arm}" for seed in design.seeds]
        measured = [cells.read(name) for name in names if cells.has(name)]
        if measured:
            found[arm] = measured
    return found


def pairs_trained_on(cells: Cells, design: Design) -> dict[str, list[int]]:
    """Pairs of every arm, by seed; a sequential arm's are those of its stages together."""

    def count(seed: int, arm: str) -> int:
        stages = [f"stage-{place}-{name}" for place, name in enumerate(design.dimensions)]
        jobs = [f"seed-{seed}/{run}-job" for run in (stages if arm == SEQUENTIAL else [arm])]
        return sum(cells.read(job)["num_pairs"] for job in jobs if cells.has(job))

    return {arm: [count(seed, arm) for seed in design.seeds] for arm in design.arms}


def write_results(
    out: Path,
    cells: Cells,
    design: Design,
    samples: Samples,
    judged: Samples | None,
    method: MethodSettings,
) -> None:
    """``results.json`` and ``table.md``; the table is printed too."""
    batches = {
        seed: {kind: cells.read(f"seed-{seed}/batch-{kind}") for kind in (*BATCHES, "more")}
        for seed in design.seeds
    }
    rates = control_rates(batches)
    lines = [
        f"{len(design.held_out)} held-out prompts, {len(design.seeds)} seeds, "
        f"{design.num_steps} DPO steps per arm; {machine.describe()}",
        "",
        "95 % intervals over prompts and answers; seeds are listed, not covered.",
        "",
    ]
    results: Json = {"machine": machine.describe(), "rates": rates}
    n = design.n_eval * len(design.seeds)
    for title, arms in (("the scorer trained against", samples), ("another scorer", judged)):
        if arms is None:
            lines += ["No second scorer was given: reward hacking would not show.", ""]
            continue
        found, by_seed = compare_arms(arms, n)
        lines += table_lines(found, by_seed, f"Judged by {title}")
        against = compare_with_alternatives(arms, n)
        lines += alternative_lines(against, by_seed)
        results[title] = {
            "evaluation": asdict(found),
            "by_seed": by_seed,
            "against": {rival: asdict(each) for rival, each in against.items()},
        }
    thresholds = threshold_lines(
        {kind: confirmations(batches, kind) for kind in KINDS},
        confidence=method.confidence,
        min_gain=method.min_gain,
    )
    divergences = load_divergences(cells, design)
    results["kl"] = divergences
    taught = pair_lines(batches, pairs_trained_on(cells, design), design.dimensions)
    lines += [*kl_lines(divergences), *rate_lines(rates), *taught, *thresholds]
    lines.append(PAPER)
    (out / "table.md").write_text("\n".join(lines) + "\n", "utf-8")
    text = json.dumps(results, ensure_ascii=False, allow_nan=False)
    (out / "results.json").write_text(text + "\n", "utf-8")
    print("\n".join(lines))


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
