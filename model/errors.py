"""Errors that people can act on: one clear line each, and the exit code a command ends with."""

from __future__ import annotations


class ModelError(Exception):
    """A model or an option that cannot be."""

    exit_code = 64


class CheckpointError(ModelError):
    """A weights folder that is not what it should be. The message lists every problem found, one a line."""

    exit_code = 66


class CannotWriteError(ModelError):
    """A folder that could not be written."""

    exit_code = 73


class DivergedError(ModelError):
    """Weights whose results are not numbers."""

    exit_code = 77
