"""Helm for the chart's tests, the size of the matrix, and the last line.

``make test`` checks each profile once; ``--chart-full`` (``make helm-test``) takes every helm and
every Kubernetes version, and a real Ray.
"""

from __future__ import annotations

import statistics
import subprocess
from pathlib import Path

import pytest

from tests.chart.charts import HELM_VERSIONS, KUBERNETES, PROFILES, ROOT, TALLY, TOOLS

FULL = "chart_full"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chart-full", dest=FULL, action="store_true", help="every version of all")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the test on a real Ray, which takes over a minute, to the full matrix."""
    is_long = collection_path.name == "test_cluster_serve.py"
    return True if is_long and not config.getoption(FULL, default=False) else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption(FULL, default=False)
    if "profile_name" in metafunc.fixturenames:
        metafunc.parametrize("profile_name", PROFILES)
    if "helm_version" in metafunc.fixturenames:
        metafunc.parametrize("helm_version", HELM_VERSIONS if full else HELM_VERSIONS[:1])
    if "kubernetes" in metafunc.fixturenames:
        metafunc.parametrize("kubernetes", KUBERNETES if full else KUBERNETES[:1])


@pytest.fixture(scope="session", autouse=True)
def helm_tools(request: pytest.FixtureRequest) -> None:
    """Both helms under ``.cache``; fetched when they are not there yet."""
    if all((TOOLS / version / "helm").is_file() for version in HELM_VERSIONS):
        return
    done = subprocess.run([ROOT / "scripts" / "helm_tools.sh"], capture_output=True, text=True)
    if done.returncode and not request.config.getoption(FULL, default=False):
        pytest.skip(f"helm could not be fetched: {done.stderr.strip()[-300:]}")
    assert done.returncode == 0, done.stderr


@pytest.fixture(autouse=True)
def counted() -> None:
    TALLY.checks += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not TALLY.render_s:
        return
    versions = sorted(TALLY.kubernetes, key=lambda text: int(text.partition(".")[2]))
    terminalreporter.write_line(
        f"chart: {TALLY.objects} objects in {len(TALLY.render_s)} renderings by helm "
        f"{' and '.join(sorted(TALLY.helm))} (median {statistics.median(TALLY.render_s):.2f} s), "
        f"{TALLY.checks} checks, Kubernetes {', '.join(versions) or 'none'}"
    )
