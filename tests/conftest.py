"""Settings shared by all tests."""

from __future__ import annotations

from hypothesis import settings

# Test machines are shared: a slow example says nothing about the code.
settings.register_profile("bireme", deadline=None)
settings.load_profile("bireme")
