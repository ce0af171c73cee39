"""What the commands of this room share: wrong usage is exit 64 like everywhere else, and errors are one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from data.errors import DataError
from model.errors import ModelError
from train.checkpoint_format import CheckpointError
from train.errors import RunError

USAGE = 64


class CommandParser(argparse.ArgumentParser):
    """argparse, but a usage error ends with 64 and not 2."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(USAGE, f"{self.prog}: {message}\n")


def run_command(action: Callable[[], None]) -> int:
    """0, or the exit code of an error that a user can act on, said in one line."""
    try:
        action()
    except (RunError, DataError, CheckpointError, ModelError) as error:
        print(f"bireme: {error}", file=sys.stderr)
        return error.exit_code
    return 0
