"""Kernel tests run in Triton's interpreter, repaired."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels.interpreter import repaired


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    with repaired():
        yield
