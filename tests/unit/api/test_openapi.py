"""The committed document is the application's, and it tells of every route and body."""

from __future__ import annotations

import json
from pathlib import Path

from api import openapi
from api.documentation import documentation_app

COMMITTED = Path(openapi.__file__).with_name("openapi.json")

ROUTES = {
    "/v1/diagnostics": {"post"},
    "/v1/scores": {"post"},
    "/v1/rewrites": {"post"},
    "/get_reward": {"post"},
    "/v1/chat/completions": {"post"},
    "/v1/files": {"post", "get"},
    "/v1/files/{file_id}": {"get", "delete"},
    "/v1/files/{file_id}/content": {"get"},
    "/v1/uploads": {"post"},
    "/v1/uploads/{upload_id}/parts": {"post"},
    "/v1/uploads/{upload_id}/complete": {"post"},
    "/v1/uploads/{upload_id}/cancel": {"post"},
    "/v1/batches": {"post", "get"},
    "/v1/batches/{batch_id}": {"get"},
    "/v1/batches/{batch_id}/cancel": {"post"},
    "/v1/batches/{batch_id}/pairs": {"get"},
    "/v1/batches/{batch_id}/events": {"get"},
    "/v1/fine_tuning/jobs": {"post", "get"},
    "/v1/fine_tuning/jobs/{job_id}": {"get"},
    "/v1/fine_tuning/jobs/{job_id}/events": {"get"},
    "/v1/fine_tuning/jobs/{job_id}/checkpoints": {"get"},
    "/v1/fine_tuning/jobs/{job_id}/cancel": {"post"},
    "/v1/models": {"get"},
    "/v1/models/{model}": {"get"},
    "/v1/models/{model}/activate": {"post"},
    "/livez": {"get"},
    "/readyz": {"get"},
    "/metrics": {"get"},
}


def test_committed_document_is_what_the_application_says(tmp_path: Path) -> None:
    """Run ``python -m api.openapi`` after a change of routes or schemas."""
    openapi.write(tmp_path / "openapi.json")

    assert json.loads((tmp_path / "openapi.json").read_text("utf-8")) == json.loads(
        COMMITTED.read_text("utf-8")
    )


def test_every_route_of_the_contract_is_documented() -> None:
    paths = documentation_app().openapi()["paths"]

    assert {path: set(operations) for path, operations in paths.items()} == ROUTES


def test_no_validation_error_is_422_and_all_references_resolve() -> None:
    document = documentation_app().openapi()
    text = json.dumps(document)
    schemas = document["components"]["schemas"]

    assert '"422"' not in text
    assert "HTTPValidationError" not in text
    for part in text.split("#/components/schemas/")[1:]:
        assert part.split('"')[0] in schemas


def test_posted_bodies_have_their_schema() -> None:
    document = documentation_app().openapi()

    for path, operations in document["paths"].items():
        if "post" in operations and not path.endswith(("cancel", "parts", "activate")):
            content = operations["post"]["requestBody"]["content"]["application/json"]
            name = content["schema"]["$ref"].rsplit("/", 1)[-1]
            assert document["components"]["schemas"][name]["additionalProperties"] is False
