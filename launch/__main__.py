"""`python -m launch experiment=demo [key=value ...]`: check the configuration, then run it on this machine.

One process composes and validates everything first, so that a wrong key costs one line and no processes; then as many
ranks start as the layout has. With `-m`, `key=a,b` is a sweep: every combination runs in turn in a directory of its
own. The last line is one JSON object with the last training loss (the objective) of each run. Exit codes:
docs/exit-codes.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import NoReturn

from launch.sweep import expand, run_name
from train.compose import compose_run
from train.config import RunConfig
from train.errors import PREEMPTED, ConfigError, RunError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"bireme: {message}", file=sys.stderr)
        self.exit(ConfigError.exit_code)


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit code: of a sweep, that of the first run that failed."""
    parser = _Parser(prog="python -m launch", description="Check a configuration and run it on this machine.")
    parser.add_argument("-m", "--multirun", action="store_true", help="run every combination of key=a,b")
    parser.add_argument(
        "--shutdown-timeout",
        type=int,
        default=300,
        metavar="SECONDS",
        help="time to save a checkpoint after a stop signal (default 300)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)
    try:
        runs = prepare(options.overrides, options.multirun)
    except RunError as error:
        print(f"bireme: {error}", file=sys.stderr)
        return error.exit_code
    # Imported here: torchrun's agent is not needed to refuse a configuration.
    from launch.run import run

    outcomes, code = [], 0
    for number, (config, given) in enumerate(runs, start=1):
        p = config.parallel
        print(
            f"-- run {number}/{len(runs)}: {config.root}/{config.name} on {p.world_size} processes (pipeline "
            f"{p.pipeline} x expert {p.expert} x data {p.data}, {p.schedule})",
            flush=True,
        )
        outcome = run(config, given, options.shutdown_timeout)
        outcomes.append(outcome)
        code = code or outcome.exit_code
        if outcome.exit_code == PREEMPTED or outcome.exit_code > 128:
            break
    print(json.dumps({"runs": [asdict(outcome) for outcome in outcomes], "exit_code": code}))
    return code


def prepare(overrides: Sequence[str], multirun: bool) -> list[tuple[RunConfig, list[str]]]:
    """(configuration, arguments of its ranks) of every run, all checked. ConfigError."""
    if not multirun:
        return [(compose_run(overrides), list(overrides))]
    found = []
    for given in expand(overrides):
        chosen = [argument for argument in given if argument not in overrides]
        config = compose_run(given)
        if not any(argument.startswith("name=") for argument in chosen):
            given = [*given, f"name='{run_name(config.name, chosen)}'"]
            config = compose_run(given)
        found.append((config, given))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
