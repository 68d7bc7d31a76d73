"""A trained recommender behind HTTP, with one page to try it on."""

from __future__ import annotations

from rankwise.serving.app import create_app
from rankwise.serving.settings import ServerSettings

__all__ = ["ServerSettings", "create_app"]
