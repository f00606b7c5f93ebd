"""Fixtures that every suite may use; the heavy ones live in modules of their own and start late."""

pytest_plugins = ["tests.ray_fixtures"]
