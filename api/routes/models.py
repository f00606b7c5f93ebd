"""``/v1/models``: the policy versions that can be sampled, the current one first.

``POST /v1/models/{id}/activate`` makes any published version, or the base, the one that requests
sample by default: how a version goes live, and how one is rolled back.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from api.deps import Deps, DepsArg
from api.schemas import Model, ModelList
from api.streaming import Json
from mora_serve.errors import NotFoundError
from mora_serve.policies import activate

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("", response_model=ModelList)
async def list_models(deps: DepsArg) -> Response:
    """Every version that the generator samples, with what the store knows of it."""
    return Json({"object": "list", "data": await model_objects(deps)})


@router.get("/{model:path}", response_model=Model)
async def get_model(model: str, deps: DepsArg) -> Response:
    """One version."""
    for item in await model_objects(deps, model):
        if item["id"] == model:
            return Json(item)
    raise unknown_model(model)


@router.post("/{model:path}/activate", response_model=Model)
async def activate_model(model: str, deps: DepsArg) -> Response:
    """Make a version the current one; generators load it, and ``/v1/models`` says when they have.

    Older versions stay listed. Where an engine holds one set of weights at a time (CPU), the
    current version is the only one that can be sampled.
    """
    try:
        version = await activate(deps.stores.jobs, model, deps.settings.policy.model)
    except NotFoundError:
        raise unknown_model(model) from None
    return Json(_model(deps, model, version, current=True))


def unknown_model(name: str) -> NotFoundError:
    """The 404 of a version that is not served."""
    return NotFoundError(
        f"The model '{name[:80]}' does not exist; GET /v1/models lists what does.",
        "model",
        "model_not_found",
    )


async def model_objects(deps: Deps, wanted: str | None = None) -> list[dict[str, Any]]:
    """OpenAI's Model objects; extensions say what kind of version each is and whence it came."""
    names = await deps.generator.models(wanted)
    known = {version["id"]: version for version in await deps.stores.jobs.list_policies()}
    return [
        _model(deps, name, known.get(name, {}), current=index == 0)
        for index, name in enumerate(names)
    ]


def _model(deps: Deps, name: str, version: dict[str, Any], *, current: bool) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(version.get("created") or 0),
        "owned_by": "mora-serve",
        "current": current,
        "kind": version.get("kind") or "base",
        "base": deps.settings.policy.model,
        "parent": version.get("parent"),
        "job_id": version.get("job_id"),
    }
