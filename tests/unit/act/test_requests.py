"""Bad input names the field and the rule, has a stable code, and repeats no prompt text."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.errors import InvalidRequestError
from mora_serve.requests import (
    BODIES,
    DIAGNOSTICS_URL,
    REWRITES_URL,
    SCORES_URL,
    DiagnosticsRequest,
    MessageBody,
    custom_id_of,
    parse_batch_row,
    parse_body,
    to_messages,
)
from mora_serve.types import Message

SECRET = "my secret question"


def refused(url: str, body: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        parse_body(url, body)
    assert SECRET not in caught.value.message
    return caught.value


@pytest.mark.parametrize(
    ("fields", "param", "code", "rule"),
    [
        ({"prompts": None}, "prompts", "invalid_type", "must be a list"),
        ({"prompts": []}, "prompts", "invalid_value", "at least 1"),
        ({"prompts": SECRET}, "prompts", "invalid_type", "must be a list"),
        ({"prompts": [3]}, "prompts.0", "invalid_type", "a string or a list of messages"),
        ({"prompts": ["\ud800"]}, "prompts.0", "invalid_value", "valid Unicode"),
        ({"colour": SECRET}, "colour", "unknown_parameter", "not a field"),
        ({"n": 0}, "n", "invalid_value", "at least 1, got 0"),
        ({"n": 257}, "n", "invalid_value", "at most 256, got 257"),
        ({"n": "8"}, "n", "invalid_type", "must be an integer"),
        ({"n": True}, "n", "invalid_type", "must be an integer"),
        ({"n": 8.0}, "n", "invalid_type", "must be an integer"),
        ({"n": 8, "n_max": 4}, "n_max", "invalid_value", "at least n (8), got 4"),
        ({"temperature": 2.1}, "temperature", "invalid_value", "at most 2"),
        ({"temperature": float("nan")}, "temperature", "invalid_value", "finite"),
        ({"top_p": 0}, "top_p", "invalid_value", "above 0"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value", "at least 1"),
        ({"seed": 2**63}, "seed", "invalid_value", "at most"),
        ({"seed": 0.5}, "seed", "invalid_type", "must be an integer"),
        ({"dimensions": []}, "dimensions", "invalid_value", "at least 1"),
        ({"dimensions": [1]}, "dimensions.0", "invalid_type", "must be a string"),
        ({"include_rollouts": 1}, "include_rollouts", "invalid_type", "true or false"),
        ({"responses": [["a"], ["b"]]}, "responses", "invalid_value", "one list per prompt (1)"),
        ({"responses": [[]]}, "responses.0", "invalid_value", "1 to 1024 answers"),
        ({"responses": [["a"]], "n": 2}, "n", "invalid_value", "must be absent"),
    ],
)
def test_diagnostics_rules(fields: dict[str, Any], param: str, code: str, rule: str) -> None:
    error = refused(DIAGNOSTICS_URL, {"prompts": [SECRET], **fields})
    assert (error.param, error.code) == (param, code)
    assert rule in error.message
    assert error.message.startswith(param)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompts": ["a"], "k" * 100_000: 1}, "k" * 80 + "... is not a field of this request"),
        ({"prompts": ["a"], "n": 10**400}, "n must be at most 256, got 1" + "0" * 79 + "..."),
        ({"prompts": ["a"], "model": "m" * 1000, "n": 0}, "n must be at least 1, got 0"),
        ({"prompts": ["a"], "\ud800": 1}, "body must be valid Unicode text, got a string"),
        ({"prompts": [[{"role": "user", "content": "a", "\ud800": 1}]]},
         "prompts.0.0 must be valid Unicode text, got a string"),
    ],
)  # fmt: skip
def test_what_is_repeated_of_a_request_is_short_and_can_be_encoded(body: Any, message: str) -> None:
    error = refused(DIAGNOSTICS_URL, body)
    assert error.message == message
    assert len((error.param or "").encode("utf-8")) < 100


def test_an_unknown_field_of_a_row_is_cut_and_can_be_encoded() -> None:
    for name in ("k" * 100_000, "\ud800"):
        with pytest.raises(InvalidRequestError) as caught:
            parse_batch_row(row(**{name: 1}), DIAGNOSTICS_URL)
        assert len(caught.value.message.encode("utf-8")) < 200


def test_message_faults_name_their_place() -> None:
    error = refused(DIAGNOSTICS_URL, {"prompts": [[{"role": "robot", "content": SECRET}]]})
    assert error.param == "prompts.0.0.role"
    error = refused(DIAGNOSTICS_URL, {"prompts": ["a", [{"role": "user", "content": [SECRET]}]]})
    assert error.param == "prompts.1.0.content"


@pytest.mark.parametrize(
    ("url", "body", "param"),
    [
        (REWRITES_URL, {}, "prompt"),
        (REWRITES_URL, {"prompt": "a", "strategies": ["zip"]}, "strategies.0"),
        (REWRITES_URL, {"prompt": "a", "mode": "both"}, "mode"),
        (REWRITES_URL, {"prompt": "a", "candidates": 17}, "candidates"),
        (REWRITES_URL, {"prompt": "a", "n_confirm": 3}, "n_confirm"),
        (SCORES_URL, {"rows": [{"prompt": "a"}]}, "rows.0.response"),
        (SCORES_URL, {"rows": [SECRET]}, "rows.0"),
        (SCORES_URL, {"rows": [], "n": 3}, "rows"),
        (SCORES_URL, [SECRET], None),
    ],
)
def test_other_bodies(url: str, body: Any, param: str | None) -> None:
    assert refused(url, body).param == param


def test_null_means_the_configured_default_everywhere() -> None:
    for url, required in (
        (DIAGNOSTICS_URL, {"prompts": ["a"]}),
        (REWRITES_URL, {"prompt": "a"}),
        (SCORES_URL, {"rows": [{"prompt": "a", "response": "b"}]}),
    ):
        nulls = {k: None for k in BODIES[url].model_fields if k not in required}
        assert parse_body(url, {**required, **nulls}) == parse_body(url, required)


@given(st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["prompts", "role", "content", "n", "seed", "responses", "x"]), inner
    ),
    max_leaves=8,
))  # fmt: skip
def test_any_json_is_either_valid_or_an_invalid_request(body: Any) -> None:
    for url in BODIES:
        with suppress(InvalidRequestError):
            parse_body(url, body)


def turns(*pairs: tuple[str, str]) -> list[MessageBody]:
    return [MessageBody.model_validate({"role": role, "content": text}) for role, text in pairs]


@pytest.mark.parametrize(
    ("prompt", "param", "code"),
    [
        (" \n", "prompts.3", "empty_prompt"),
        ([], "prompts.3", "empty_prompt"),
        (turns(("user", " ")), "prompts.3.0.content", "empty_prompt"),
        (turns(("user", "a"), ("assistant", "b")), "prompts.3", "invalid_prompt"),
        (
            turns(("user", "a"), ("system", "b"), ("user", "c")),
            "prompts.3.1.role",
            "invalid_prompt",
        ),
    ],
)
def test_prompt_content_rules(prompt: Any, param: str, code: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        to_messages(prompt, "prompts.3")
    assert (caught.value.param, caught.value.code) == (param, code)


def test_the_system_prompt_opens_conversations_that_have_none() -> None:
    assert to_messages("Why?", "prompt", "Be brief.") == (
        Message("system", "Be brief."),
        Message("user", "Why?"),
    )
    own = turns(("system", "Be long."), ("user", "Why?"))
    assert to_messages(own, "prompt", "Be brief.")[0].content == "Be long."
    assert to_messages("Why?", "prompt", None) == (Message("user", "Why?"),)


def row(**changes: Any) -> bytes:
    data = {
        "custom_id": "row-1",
        "method": "POST",
        "url": DIAGNOSTICS_URL,
        "body": {"prompts": ["Why?"]},
        **changes,
    }
    return json.dumps({k: v for k, v in data.items() if v is not ...}).encode()


def test_a_valid_batch_row() -> None:
    parsed = parse_batch_row(row(), DIAGNOSTICS_URL)
    assert parsed.custom_id == "row-1"
    assert isinstance(parsed.body, DiagnosticsRequest)
    assert parsed.body.prompts == ["Why?"]


@pytest.mark.parametrize(
    ("line", "code", "param"),
    [
        (b"{", "invalid_json", None),
        (b'{"custom_id": NaN}', "invalid_json", None),
        (b"\xff\xfe\x00", "invalid_json", None),
        (b"[" * 100_000, "invalid_json", None),
        (b"[1]", "invalid_row", None),
        (row(custom_id=...), "invalid_custom_id", "custom_id"),
        (row(custom_id=7), "invalid_custom_id", "custom_id"),
        (row(custom_id=""), "invalid_custom_id", "custom_id"),
        (row(custom_id="a\ud800"), "invalid_custom_id", "custom_id"),
        (row(method="GET"), "invalid_method", "method"),
        (row(url=SCORES_URL), "invalid_url", "url"),
        (row(body=...), "missing_body", "body"),
        (row(body=[]), "invalid_type", "body"),
        (row(body={"prompts": ["a"], "n": 0}), "invalid_value", "body.n"),
        (row(extra=1), "unknown_parameter", "extra"),
    ],
)
def test_batch_row_faults_have_stable_codes(line: bytes, code: str, param: str | None) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_batch_row(line, DIAGNOSTICS_URL)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_a_broken_row_keeps_its_custom_id_for_the_error_file() -> None:
    assert custom_id_of(row(method="GET")) == "row-1"
    assert custom_id_of(b"{") is None
    assert custom_id_of(row(custom_id=3)) is None
    assert custom_id_of(row(custom_id="a\ud800")) is None
