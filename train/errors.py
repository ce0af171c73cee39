"""Errors a user can cause or must act on: one line each, with the exit code of its kind (docs/exit-codes.md)."""

from __future__ import annotations


class RunError(Exception):
    """Base: the message says what is wrong, where, what was found and what is allowed."""

    exit_code = 64


class ConfigError(RunError):
    """Wrong usage or configuration."""

    exit_code = 64


class BusyError(RunError):
    """Another process works in the run directory."""

    exit_code = 76


class CannotWriteError(RunError):
    """The run directory cannot be made or written."""

    exit_code = 73


class AgreedError(RunError):
    """What at least one rank found wrong, raised by all of them together with the code of the first."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class NumericError(RunError):
    """Too many steps in a row without a finite gradient."""

    exit_code = 77


PEER_LOST = 69
PREEMPTED = 75
