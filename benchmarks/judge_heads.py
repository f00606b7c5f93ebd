"""``python -m benchmarks.judge_heads``: heads that judge the experiment and train nothing.

As far from the shipped heads as the data allow: they read 24 layers of the backbone and not 16, and
the helpful one learns from ``hh_helpful_extra``, which the shipped one has never seen. Harmless and
truthful have one data set each, so those two share their pairs with the shipped heads, and the
agreement of both scorers proves less there. Only groups of up to 224 tokens are used, since the
policy answers in a sentence. Does nothing where ``--out`` has heads already.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from actors import train_heads
from actors.head_data import EXTRA, data_files
from benchmarks.stack import CACHE, prepared_model
from mora_serve.errors import MoraError

LAYERS, MAX_TOKENS = 24, 224


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="directory of preference data")
    parser.add_argument("--out", type=Path, default=CACHE / "judge-heads")
    args = parser.parse_args()
    if (args.out / "heads.safetensors").is_file():
        return 0
    try:
        with tempfile.TemporaryDirectory(prefix="mora-judge-") as folder:
            link_data(args.data, Path(folder))
            return train_heads.main(
                [
                    "--data", folder, "--out", str(args.out), "--model", str(prepared_model()),
                    "--layers", str(LAYERS), "--max-tokens", str(MAX_TOKENS),
                ]
            )  # fmt: skip
    except MoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def link_data(data: Path, folder: Path) -> None:
    """Links to the files that heads are trained on, another set in the place of ``hh_helpful``.

    Raises :class:`MoraError` for a file that is missing.
    """
    for place in data_files(data):
        helpful = place.name == "hh_helpful.train.jsonl.gz"
        source = data / f"{EXTRA}.train.jsonl.gz" if helpful else place
        if not source.is_file():
            raise MoraError(f"--data must hold {source.name}, got no file {source}")
        (folder / place.name).symlink_to(source.resolve())


if __name__ == "__main__":
    sys.exit(main())
