"""`python -m model COMMAND KEY=VALUE ...`. Every command's last line is one JSON object.

    summary model=NAME|all [pipeline=N expert=N ranks=N]         what it is made of, what it costs, where parts live
    check folder=DIR                                             a Hugging Face folder: all its problems, or what it is
    convert from=DIR to=DIR dtype=bfloat16|float32|float64|fp8   its weights in another precision

Exit codes: docs/exit-codes.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from model import check, convert, summary
from model.errors import ModelError

# A command takes its KEY=VALUE arguments, prints, and raises ModelError kinds for what a user can mend.
COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "check": check.run,
    "convert": convert.run,
    "summary": summary.run,
}
USAGES = {"check": check.USAGE, "convert": convert.USAGE, "summary": summary.USAGE}
EXIT_USAGE = 64


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    asked = bool(set(arguments) & {"-h", "--help", "help"})
    if not arguments or (asked and arguments[0] not in COMMANDS):
        print((__doc__ or "").rstrip(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else EXIT_USAGE
    command, *rest = arguments
    if asked:
        print(USAGES[command])
        return 0
    if command not in COMMANDS:
        print(f"python -m model: {command!r}: must be one of {', '.join(COMMANDS)}", file=sys.stderr)
        return EXIT_USAGE
    try:
        COMMANDS[command](rest)
    except ModelError as error:
        print(f"python -m model {command}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
