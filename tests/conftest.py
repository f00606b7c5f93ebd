"""Fixtures that every suite may use; the heavy ones live in modules of their own and start late."""

from hypothesis import settings

pytest_plugins = ["tests.ray_fixtures"]

# A busy machine is not a failing test.
settings.register_profile("mora", deadline=None)
settings.load_profile("mora")
