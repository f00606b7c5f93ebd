"""An application over the in-process engines, for writing ``openapi.json``: it serves no one."""

from __future__ import annotations

from fastapi import FastAPI

from api.app import create_app
from api.deps import Deps
from mora_serve.calibrators import load_calibrator
from mora_serve.config import load_settings
from mora_serve.fakes import FakeGenerator, FakeScorer
from mora_serve.service import MoraService
from mora_serve.store import Stores


def documentation_app() -> FastAPI:
    """The application whose schema is committed; the same for every configuration."""
    settings = load_settings("fake", environ={})
    generator, scorer = FakeGenerator(), FakeScorer(settings.dimensions)
    service = MoraService(generator, scorer, load_calibrator(settings), settings)
    return create_app(Deps(service, generator, scorer, Stores.memory(), settings))
