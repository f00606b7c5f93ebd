"""Full weights from a base model and a LoRA adapter, for engines that cannot serve adapters well.

``W' = W + (alpha / r) * B A`` (Hu et al. 2021, eq. 3), computed in float32. The result is rounded
to the base's precision stochastically: a short training run moves most weights by less than half of
what bfloat16 can resolve, and rounding to the nearest value would undo it. Stochastic rounding
keeps the update in expectation; what it adds is noise of the size that bfloat16 has anyway.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from mora_serve.errors import GenerationError

ADAPTER_PREFIX = "base_model.model."
UNSUPPORTED = ("use_dora", "fan_in_fan_out", "modules_to_save", "alpha_pattern", "rank_pattern")
"""Options of peft that change how an adapter is applied; adapters that use one are refused."""


@dataclass(frozen=True, slots=True)
class _Adapter:
    scale: float
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """Weight name in the base -> ``A [r, in]``, ``B [out, r]``."""


def merge_adapter(base: Path, adapter: Path, out: Path) -> None:
    """Write the merged weights to ``out`` (a directory that exists), under the base's file names.

    Raises ``GenerationError`` when the adapter cannot be read or does not fit the base.
    """
    loaded = _load_adapter(adapter)
    left = set(loaded.pairs)
    generator = torch.Generator().manual_seed(0)
    for file in _weight_files(base):
        tensors = load_file(file)
        for name in sorted(left & set(tensors)):
            tensors[name] = _merged(tensors[name], *loaded.pairs[name], loaded.scale, generator)
            left.remove(name)
        save_file(tensors, out / file.name, metadata={"format": "pt"})
    if left:
        raise GenerationError(f"the adapter changes layers that the base lacks: {sorted(left)[0]}")


def local_directory(model: str, revision: str | None = None) -> Path:
    """Where the weights of a model are that was loaded here: it may be named by its hub id.

    Raises ``GenerationError`` when the hub's cache does not have them.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        raise GenerationError(f"the base model {model} is not on this machine") from error


def require_same_shapes(base: Path, other: Path) -> None:
    """Raise ``GenerationError`` unless ``other`` holds the base's tensors in the same shapes."""
    try:
        differs = _shapes(base) != _shapes(other)
    except (OSError, SafetensorError) as error:
        raise GenerationError(f"weights cannot be read ({type(error).__name__})") from error
    if differs:
        raise GenerationError("weights do not have the names and shapes of the base model's")


def round_stochastically(
    values: torch.Tensor, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """``values`` (float32) in ``dtype``, rounded up or down with odds that keep the expectation.

    Only bfloat16 needs it: it is the upper half of a float32, so adding random lower bits and
    cutting them off rounds as wanted.
    """
    if dtype != torch.bfloat16:
        return values.to(dtype)
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=generator, dtype=torch.int32)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).to(dtype)


def _merged(
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    generator: torch.Generator,
) -> torch.Tensor:
    if (b.shape[0], a.shape[1]) != tuple(weight.shape):
        raise GenerationError("the adapter's layers do not have the shapes of the base's")
    update = scale * (b.float() @ a.float())
    return round_stochastically(weight.float() + update, weight.dtype, generator)


def _load_adapter(directory: Path) -> _Adapter:
    try:
        config = json.loads((directory / "adapter_config.json").read_text("utf-8"))
        tensors = load_file(directory / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise GenerationError(f"the adapter cannot be read ({type(error).__name__})") from error
    used = [option for option in UNSUPPORTED if config.get(option)]
    if used or config.get("bias", "none") != "none":
        raise GenerationError(f"the adapter must be plain LoRA, got {used or 'a bias'}")
    rank = int(config["r"])
    root = math.sqrt(rank) if config.get("use_rslora") else rank
    pairs = {}
    for name, a in tensors.items():
        if ".lora_A." not in name:
            continue
        b = tensors.get(name.replace(".lora_A.", ".lora_B."))
        if b is None:
            raise GenerationError("the adapter is incomplete: a lora_A has no lora_B")
        target = name.removeprefix(ADAPTER_PREFIX).replace(".lora_A.", ".")
        pairs[target] = (a, b)
    return _Adapter(float(config["lora_alpha"]) / root, pairs)


def _weight_files(directory: Path) -> list[Path]:
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise GenerationError("the base model must be stored as safetensors to merge adapters")
    return files


def _shapes(directory: Path) -> dict[str, list[int]]:
    return dict(_iter_shapes(directory))


def _iter_shapes(directory: Path) -> Iterator[tuple[str, list[int]]]:
    for file in _weight_files(directory):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping, only has keys()
                yield name, tensors.get_slice(name).get_shape()
