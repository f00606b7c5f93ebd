"""The gateway application: middleware, routers and error handling around :class:`api.deps.Deps`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from starlette.responses import Response

from api.bodies import (
    BatchRequest,
    ChatRequest,
    FileRegistration,
    FineTuningRequest,
    UploadCompletion,
    UploadRequest,
)  # fmt: skip
from api.deps import Deps, build_context
from api.errors import install_error_handlers
from api.middleware import Authentication, BodyLimits, RequestContext
from api.openapi import install_openapi
from api.routes import batches, chat, files, fine_tuning, health, method, models, uploads
from api.schemas import ErrorResponse
from api.streaming import CLIENT_CLOSED_REQUEST, CLIENT_GONE, ClientGoneError
from mora_serve import __version__
from mora_serve.remote_reward import RewardRequest
from mora_serve.requests import BODIES

ROUTERS = (
    method.router, chat.router, models.router, files.router, uploads.router,
    batches.router, fine_tuning.router, health.router,
)  # fmt: skip

REQUEST_BODIES = (
    *BODIES.values(), RewardRequest, ChatRequest, FileRegistration, UploadRequest,
    UploadCompletion, BatchRequest, FineTuningRequest,
)  # fmt: skip

DESCRIPTION = (
    "Multi-reward pre-sampling, prompt rewriting and DPO as a service. Objects, errors and "
    "pagination are OpenAI's; extensions ride in extra_body."
)


def create_app(deps: Deps) -> FastAPI:
    """The ASGI application of one gateway replica. Closes the stores when it shuts down."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if deps.publisher is not None:
            await deps.publisher.start()
        yield
        if deps.publisher is not None:
            await deps.publisher.stop()
        await deps.stores.aclose()

    app = FastAPI(
        title="mora-serve",
        version=__version__,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.context = build_context(deps)
    for router in ROUTERS:
        app.include_router(router, responses={"default": {"model": ErrorResponse}})
    server = deps.settings.server
    app.add_middleware(
        BodyLimits,
        max_body_bytes=server.max_body_bytes,
        max_upload_bytes=server.max_upload_bytes,
        max_part_bytes=server.max_part_bytes,
    )
    app.add_middleware(Authentication, keys=[key.get_secret_value() for key in server.api_keys])
    app.add_middleware(RequestContext, metrics=deps.metrics, sets_request_id=deps.sets_request_id)
    install_error_handlers(app)

    async def on_gone(request: Request, _: Exception) -> Response:
        request.scope[CLIENT_GONE] = True
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    app.add_exception_handler(ClientGoneError, on_gone)
    install_openapi(app, REQUEST_BODIES)
    return app
