"""The REST client against a real HTTP server: JSON, errors, streams, uploads, downloads."""

from __future__ import annotations

from pathlib import Path

import pytest

from mora_serve.answers import ApiError, ServerEvent, UnreachableError
from mora_serve.client import Client
from mora_serve.errors import MoraError
from mora_serve.free_ports import free_port
from tests.unit.cli.server import Answer, Seen, Server, error, ndjson, sse


def client(server: Server, **options: object) -> Client:
    return Client(server.url, sleep=lambda _: None, **options)  # type: ignore[arg-type]


def test_get_returns_the_object_and_drops_absent_parameters(server: Server) -> None:
    server.on("GET /v1/batches", Answer(body={"data": []}))
    assert client(server).get("/v1/batches", limit=5, after=None, follow=True) == {"data": []}
    assert server.seen[0].params == {"limit": "5", "follow": "true"}


def test_post_sends_json_and_the_key(server: Server) -> None:
    server.on("POST /v1/batches", Answer(body={"id": "batch_1"}))
    client(server, api_key="k").post("/v1/batches", {"endpoint": "/v1/rewrites"})
    assert server.seen[0].json == {"endpoint": "/v1/rewrites"}
    assert server.seen[0].headers["authorization"] == "Bearer k"


def test_without_a_key_no_authorization_is_sent(server: Server) -> None:
    server.on("GET /v1/models", Answer(body={}))
    client(server).get("/v1/models")
    assert "authorization" not in server.seen[0].headers


def test_error_envelope_becomes_one_sentence(server: Server) -> None:
    server.on("GET /x", error(400, "n must be at least 1", param="n", code="invalid_value"))
    with pytest.raises(ApiError) as caught:
        client(server).get("/x")
    assert str(caught.value) == "the server answered 400: n must be at least 1"
    assert (caught.value.param, caught.value.code) == ("n", "invalid_value")


def test_error_that_does_not_name_its_field_gets_it_added(server: Server) -> None:
    server.on("GET /x", error(400, "must be positive", param="n"))
    with pytest.raises(ApiError, match=r"must be positive \(n\)$"):
        client(server).get("/x")


def test_error_without_envelope_still_reads(server: Server) -> None:
    server.on("GET /x", Answer(502, b"<html>bad gateway</html>"))
    with pytest.raises(ApiError, match="502: <html>bad gateway"):
        client(server).get("/x")


def test_busy_answers_are_sent_again_after_the_delay_asked_for(server: Server) -> None:
    answers = [Answer(429, {}, headers={"Retry-After": "3"}), Answer(body={"ok": True})]
    server.on("POST /x", lambda _: answers.pop(0))
    waits: list[float] = []
    assert Client(server.url, sleep=waits.append).post("/x", {"a": 1}) == {"ok": True}
    assert waits == [3.0]
    assert [seen.json for seen in server.seen] == [{"a": 1}, {"a": 1}]


def test_busy_for_ever_raises_after_max_tries(server: Server) -> None:
    server.on("GET /x", error(503, "full"))
    with pytest.raises(ApiError, match="full"):
        client(server, max_tries=3).get("/x")
    assert len(server.seen) == 3


@pytest.mark.parametrize("status", [400, 404, 409, 500])
def test_other_errors_are_not_sent_again(server: Server, status: int) -> None:
    server.on("GET /x", error(status, "no"))
    with pytest.raises(ApiError):
        client(server).get("/x")
    assert len(server.seen) == 1


def test_nobody_listening_says_how_to_start_a_server() -> None:
    with pytest.raises(UnreachableError, match="mora-serve up"):
        Client(f"127.0.0.1:{free_port()}").get("/v1/models")


def test_address_that_is_none_is_refused() -> None:
    with pytest.raises(MoraError, match="--url"):
        Client("ftp://somewhere")


def test_ready_tells_what_is_missing(server: Server) -> None:
    server.on("GET /readyz", Answer(503, {"status": "not_ready", "reasons": ["store: down"]}))
    assert client(server).ready() == (False, {"status": "not_ready", "reasons": ["store: down"]})
    server.on("GET /readyz", Answer(body={"status": "ok"}))
    assert client(server).ready()[0] is True


def test_pages_follow_after_until_there_is_no_more(server: Server) -> None:
    def page(seen: Seen) -> Answer:
        if seen.params.get("after") == "b":
            return Answer(body={"data": [{"id": "c"}], "has_more": False})
        return Answer(body={"data": [{"id": "a"}, {"id": "b"}], "has_more": True})

    server.on("GET /v1/files", page)
    assert [item["id"] for item in client(server).pages("/v1/files")] == ["a", "b", "c"]


def test_ndjson_lines_may_be_split_anywhere(server: Server) -> None:
    pieces = [b'{"index"', b": 0}\n\n{", b'"index": 1}\n', b'{"index": 2}']
    server.on("POST /v1/diagnostics", Answer(pieces=pieces))
    items = client(server).ndjson("POST", "/v1/diagnostics", {"stream": True})
    assert [item["index"] for item in items] == [0, 1, 2]


def test_error_line_inside_a_stream_raises(server: Server) -> None:
    server.on("GET /x", ndjson({"index": 0}, {"error": {"message": "the engine is gone"}}))
    items = client(server).ndjson("GET", "/x")
    assert next(items) == {"index": 0}
    with pytest.raises(ApiError, match="the engine is gone"):
        next(items)


def test_item_with_an_error_of_its_own_is_not_the_streams_error(server: Server) -> None:
    failed = {"object": "diagnostic", "index": 0, "error": {"code": "empty_prompt"}}
    server.on("GET /x", ndjson(failed))
    assert list(client(server).ndjson("GET", "/x")) == [failed]


def test_stream_that_breaks_off_is_not_taken_for_complete(server: Server) -> None:
    server.on("GET /x", ndjson({"index": 0}, cut=True))
    items = client(server).ndjson("GET", "/x")
    assert next(items) == {"index": 0}
    with pytest.raises(UnreachableError, match="broke inside an answer"):
        next(items)


def test_events_are_parsed_as_the_standard_says(server: Server) -> None:
    server.on(
        "GET /events",
        sse(
            b": waiting\n\n",
            b'event: progress\nid: 7\ndata: {"pairs":',
            b" 3}\n\ndata: two\ndata: lines\r\n\r\n",
            b"data: [DONE]\n\n",
            b'data: {"never": "seen"}\n\n',
        ),
    )
    assert list(client(server).events("/events")) == [
        ServerEvent("progress", {"pairs": 3}, "7"),
        ServerEvent("message", "two\nlines", "7"),
    ]


@pytest.mark.parametrize("as_path", [False, True])
def test_upload_is_the_multipart_form_of_openai(
    server: Server, tmp_path: Path, as_path: bool
) -> None:
    server.on("POST /v1/files", Answer(body={"id": "file-1"}))
    content = b'{"custom_id": "a"}\n' * 9000
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    made = client(server).upload(path if as_path else content, "x.jsonl")
    assert made == {"id": "file-1"}
    seen = server.seen[0]
    boundary = seen.headers["content-type"].partition("boundary=")[2].encode()
    _, purpose, file, end = seen.body.split(b"--" + boundary)
    assert purpose.endswith(b'name="purpose"\r\n\r\nbatch\r\n')
    assert b'filename="x.jsonl"' in file
    assert file.partition(b"\r\n\r\n")[2] == content + b"\r\n"
    assert end == b"--\r\n"


def test_download_is_all_or_nothing(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "pairs.parquet"
    server.on("GET /good", Answer(body=b"PAR1" * 50_000))
    assert client(server).download("/good", target, accept="x/y") == 200_000
    assert target.read_bytes() == b"PAR1" * 50_000
    assert server.seen[0].headers["accept"] == "x/y"
    server.on("GET /bad", Answer(body=b"half", cut=True))
    with pytest.raises(UnreachableError):
        client(server).download("/bad", tmp_path / "bad")
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.parquet"]


def test_readiness_is_waited_for_while_nothing_answers_or_parts_are_missing(
    server: Server,
) -> None:
    later = iter([error(404, "no route"), error(503, "not ready"), Answer(body={"reasons": []})])
    server.on("GET /readyz", lambda _: next(later))
    waits: list[float] = []
    Client(server.url, sleep=waits.append).wait_ready(60)
    assert len(waits) == 2
    assert len(server.seen) == 3


def test_a_server_that_does_not_become_ready_in_time_says_what_is_missing(
    server: Server,
) -> None:
    server.on("GET /readyz", Answer(503, {"reasons": ["no generator", "scorer helpful"]}))
    clock = iter(range(0, 100, 20))
    with pytest.raises(UnreachableError, match="not ready after 30 s: no generator; scorer help"):
        client(server).wait_ready(30, clock=lambda: next(clock))
    assert len(server.seen) == 2


def test_a_server_that_does_not_answer_is_not_ready() -> None:
    waiting = Client(f"http://127.0.0.1:{free_port()}", sleep=lambda _: None)
    with pytest.raises(UnreachableError, match="not ready after 0 s: no server answers"):
        waiting.wait_ready(0)
