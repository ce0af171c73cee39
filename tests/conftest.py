"""Settings shared by all tests."""

from __future__ import annotations

import os

# Before anything imports Triton: its kernels are then run by its interpreter. Child processes inherit it.
os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import settings

# Test machines are shared: a slow example says nothing about the code.
settings.register_profile("bireme", deadline=None)
settings.load_profile("bireme")
