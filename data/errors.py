"""Errors a user can cause: each is one line and an exit code, never a traceback."""

from __future__ import annotations


class DataError(Exception):
    """Bad data (exit 65): the message names the file and place, what was found and what is allowed."""

    exit_code = 65


class UsageError(DataError):
    """Bad command line or configuration (exit 64)."""

    exit_code = 64


class UnavailableError(DataError):
    """A package index did not answer (exit 69)."""

    exit_code = 69


class CannotWriteError(DataError):
    """The output cannot be written (exit 73)."""

    exit_code = 73


class BusyError(DataError):
    """Another process builds the same output (exit 76)."""

    exit_code = 76


class WorkerLostError(DataError):
    """A worker process died (exit 69)."""

    exit_code = 69
