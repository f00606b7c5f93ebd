"""The core stays free of engines: proved by importing all of it in a fresh interpreter."""

import json
import subprocess
import sys

import mora_serve

ENGINES = {
    "ray",
    "torch",
    "vllm",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "fastapi",
    "starlette",
}

IMPORT_ALL = """
import importlib, json, pkgutil, sys
import mora_serve
for module in pkgutil.walk_packages(mora_serve.__path__, "mora_serve."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def test_importing_the_whole_core_loads_no_engine_and_no_web_framework() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "mora_serve" in loaded
    assert not loaded & ENGINES


def test_the_changelog_names_the_version() -> None:
    root = __import__("pathlib").Path(__file__).resolve().parents[2]
    assert f"## {mora_serve.__version__}\n" in (root / "CHANGELOG.md").read_text("utf-8")
