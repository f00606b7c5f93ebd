"""Training files and the session that carries asynchronous stores."""

from __future__ import annotations

import io
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from mora_serve.errors import InvalidRequestError
from mora_serve.store import Stores
from trainer.feeds import StoreSession, parse_rows
from trainer.metrics import exposition

TURN = [{"role": "user", "content": "q"}]
ROW = {
    "prompt": TURN,
    "chosen": [{"role": "assistant", "content": "good"}],
    "rejected": [{"role": "assistant", "content": "bad"}],
}


def test_jsonl_rows_are_read_and_blank_lines_ignored() -> None:
    data = b"\n".join([json.dumps(ROW).encode(), b"", json.dumps(ROW).encode()])
    assert parse_rows(data) == [ROW, ROW]


def test_parquet_rows_are_read() -> None:
    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist([ROW]), buffer)
    assert parse_rows(buffer.getvalue()) == [ROW]


def test_openai_preference_lines_are_understood() -> None:
    line = {
        "input": {"messages": TURN},
        "preferred_output": [{"role": "assistant", "content": "good"}],
        "non_preferred_output": [{"role": "assistant", "content": "bad"}],
    }
    (row,) = parse_rows(json.dumps(line).encode())
    assert row["prompt"] == TURN
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("good", "bad")


@pytest.mark.parametrize(
    "line",
    [
        b"{broken",
        b"[1]",
        json.dumps({**ROW, "chosen": []}).encode(),
        json.dumps({**ROW, "rejected": "text"}).encode(),
        json.dumps({"prompt": TURN, "chosen": TURN}).encode(),
        json.dumps({"preferred_output": TURN, "non_preferred_output": TURN, "input": "q"}).encode(),
        json.dumps({"preferred_output": TURN, "non_preferred_output": TURN, "input": [1]}).encode(),
        json.dumps({**ROW, "chosen": [{"role": "assistant", "content": "\ud800"}]}).encode(),
        json.dumps({**ROW, "rejected": [{"role": "assistant", "content": " good\n"}]}).encode(),
        json.dumps({**ROW, "chosen": [{"role": "assistant", "content": " "}]}).encode(),
        json.dumps({**ROW, "margin": float("nan")}).encode(),
        b"[" * 100_000,
    ],
)
def test_an_unusable_line_is_named_by_its_number(line: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="line 2"):
        parse_rows(json.dumps(ROW).encode() + b"\n" + line)


def test_a_table_that_is_cut_short_is_the_files_fault() -> None:
    with pytest.raises(InvalidRequestError, match="whole Parquet file") as caught:
        parse_rows(b"PAR1 and no more")
    assert caught.value.param == "training_file"


def test_session_returns_results_and_raises_errors() -> None:
    with StoreSession(Stores.memory()) as session:
        jobs = session.stores.jobs
        created = session.call(jobs.create_job({"model": "base", "training_file": "batch_1"}))
        assert session.call(jobs.get_job(created["id"]))["model"] == "base"
        with pytest.raises(InvalidRequestError):
            session.call(jobs.get_job("ftjob-none"))


def test_exposition_has_the_wait_and_only_known_metrics() -> None:
    text = exposition("ftjob-1", {"loss": 0.5, "wait_for_data_seconds": 2.0, "entropy": 1.0})
    assert 'mora_train_loss{job="ftjob-1"} 0.5' in text
    assert 'mora_train_wait_for_data_seconds{job="ftjob-1"} 2.0' in text
    assert "entropy" not in text
