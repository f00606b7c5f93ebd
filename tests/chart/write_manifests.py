"""``python -m tests.chart.write_manifests DIR``: every profile as files for other tools to look at.

One file per profile; the Ray pods are added as plain Pods, for tools that know built-in kinds only.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from tests.chart.charts import PROFILES, Rendered, everything, profile
from tests.chart.test_templates import as_pods, builtin


def main(folder: Path) -> None:
    named: dict[str, Rendered] = {name: profile(name) for name in PROFILES}
    for name, rendered in (named | {"everything": everything()}).items():
        documents = [*builtin(rendered), *as_pods(rendered)]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump_all(documents, sort_keys=True), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
