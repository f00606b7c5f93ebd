"""The OpenAPI document: request schemas that FastAPI does not see, and the committed copy.

Bodies are read and validated by hand (:mod:`api.bodies`), so routes name their schema with
:func:`json_body`, and :func:`install_openapi` adds the components. ``python -m api.openapi`` writes
the document to ``openapi.json``; a test compares the two.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

REF = "#/components/schemas/{model}"


def json_body(schema: type[BaseModel]) -> dict[str, Any]:
    """``openapi_extra`` of a route whose JSON body is ``schema``."""
    reference = {"$ref": REF.format(model=schema.__name__)}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}
    }


def install_openapi(app: FastAPI, bodies: Sequence[type[BaseModel]]) -> None:
    """Let ``app.openapi()`` include ``bodies``, without FastAPI's 422 responses (we send 400)."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, bodies)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI, bodies: Sequence[type[BaseModel]]) -> dict[str, Any]:
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    _, extra = models_json_schema([(body, "validation") for body in bodies], ref_template=REF)
    schemas.update(extra.get("$defs", {}))
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    document["components"]["schemas"] = dict(sorted(schemas.items()))
    return dict(document)


def write(path: Path) -> None:
    """Write the document of the application to ``path``."""
    from api.documentation import documentation_app

    text = json.dumps(documentation_app().openapi(), indent=1, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    write(Path(__file__).with_name("openapi.json"))
