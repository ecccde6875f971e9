"""Tests of deployment serve the same tiny model as those of the server."""

from tests.serving.conftest import export

__all__ = ["export"]
