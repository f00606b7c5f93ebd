"""Merging adapters: the formula, rounding that keeps small updates, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.merge import (
    local_directory,
    merge_adapter,
    require_same_shapes,
    round_stochastically,
)
from mora_serve.errors import GenerationError

LAYER = "model.layers.0.self_attn.q_proj.weight"


def write_base(directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    directory.mkdir()
    torch.manual_seed(1)
    save_file(
        {
            LAYER: torch.randn(8, 6).to(dtype),
            "model.norm.weight": torch.ones(6, dtype=dtype),
        },
        directory / "model.safetensors",
    )
    return directory


def write_adapter(directory: Path, layer: str = LAYER, out: int = 8, **config: Any) -> Path:
    directory.mkdir()
    torch.manual_seed(2)
    name = "base_model.model." + layer.removesuffix(".weight")
    save_file(
        {
            f"{name}.lora_A.weight": torch.randn(2, 6),
            f"{name}.lora_B.weight": torch.randn(out, 2),
        },
        directory / "adapter_model.safetensors",
    )
    text = json.dumps({"r": 2, "lora_alpha": 6, "bias": "none", **config})
    (directory / "adapter_config.json").write_text(text)
    return directory


def merged(tmp_path: Path, **config: Any) -> dict[str, torch.Tensor]:
    out = tmp_path / "out"
    out.mkdir()
    base, adapter = write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter", **config)
    merge_adapter(base, adapter, out)
    tensors: dict[str, torch.Tensor] = load_file(out / "model.safetensors")
    return tensors


@pytest.mark.parametrize(("options", "scale"), [({}, 3.0), ({"use_rslora": True}, 6 / 2**0.5)])
def test_the_update_is_scaled_b_times_a(
    tmp_path: Path, options: dict[str, Any], scale: float
) -> None:
    tensors = merged(tmp_path, **options)
    base = load_file(tmp_path / "base" / "model.safetensors")
    parts = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (next(v for k, v in parts.items() if f"lora_{x}" in k) for x in "AB")
    torch.testing.assert_close(tensors[LAYER], base[LAYER] + scale * b @ a)
    assert torch.equal(tensors["model.norm.weight"], base["model.norm.weight"])


def test_updates_below_the_precision_survive_in_expectation() -> None:
    weight = torch.full((400, 500), 1.0)
    update = 2.0**-11
    values = weight + update
    assert torch.equal(values.to(torch.bfloat16).float(), weight)
    kept = round_stochastically(values, torch.bfloat16, torch.Generator().manual_seed(3))
    step = 2.0**-7
    assert set(kept.float().unique().tolist()) == {1.0, 1.0 + step}
    error = (kept.float().mean() - values.mean()).abs()
    standard_error = step * 0.5 / values.numel() ** 0.5
    assert error < 5 * standard_error


def test_values_that_fit_are_not_changed_by_rounding() -> None:
    values = torch.tensor([0.0, 1.0, -2.5, 0.15625])
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(round_stochastically(values, torch.bfloat16, generator).float(), values)


def test_negative_values_are_rounded_to_their_neighbours() -> None:
    values = torch.full((1000,), -1.0 - 2.0**-8)
    rounded = round_stochastically(values, torch.bfloat16, torch.Generator().manual_seed(0))
    assert set(rounded.float().unique().tolist()) == {-1.0, -1.0 - 2.0**-7}


@pytest.mark.parametrize(
    "config", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}]
)
def test_other_kinds_of_adapters_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(GenerationError, match="plain LoRA"):
        merged(tmp_path, **config)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    other_layer = write_adapter(tmp_path / "layer", "model.layers.7.mlp.up_proj.weight")
    other_shape = write_adapter(tmp_path / "shape", out=9)
    (tmp_path / "out").mkdir()
    with pytest.raises(GenerationError, match="lacks"):
        merge_adapter(base, other_layer, tmp_path / "out")
    with pytest.raises(GenerationError, match="shapes"):
        merge_adapter(base, other_shape, tmp_path / "out")


def test_an_unreadable_adapter_is_refused(tmp_path: Path) -> None:
    base, adapter = write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(GenerationError, match="cannot be read"):
        merge_adapter(base, adapter, tmp_path)
    with pytest.raises(GenerationError, match="cannot be read"):
        merge_adapter(base, tmp_path / "absent", tmp_path)


def test_full_weights_must_have_the_bases_shapes(tmp_path: Path) -> None:
    base, same = write_base(tmp_path / "base"), write_base(tmp_path / "same")
    require_same_shapes(base, same)
    save_file({LAYER: torch.zeros(8, 6)}, same / "model.safetensors")
    with pytest.raises(GenerationError, match="shapes"):
        require_same_shapes(base, same)


def test_a_model_that_is_named_by_its_hub_id_is_found_where_the_engine_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(GenerationError, match="org/policy is not on this machine"):
        local_directory("org/policy")
    stored = tmp_path / "models--org--policy"
    for revision in ("a" * 40, "b" * 40):
        (stored / "snapshots" / revision).mkdir(parents=True)
        write_base(stored / "snapshots" / revision / "weights")
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("a" * 40)
    assert local_directory("org/policy") == stored / "snapshots" / ("a" * 40)
    assert local_directory("org/policy", "b" * 40) == stored / "snapshots" / ("b" * 40)
    assert local_directory(str(stored)) == stored
    with pytest.raises(GenerationError, match="is not on this machine"):
        local_directory("org/policy", "v2")
    with pytest.raises(GenerationError, match="is not on this machine"):
        local_directory("/no/such/directory")
