"""Fixtures that these tests share."""

from tests.model_fixtures import model_dir

__all__ = ["model_dir"]
