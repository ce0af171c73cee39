"""`python -m kernels COMMAND ...`. The last line of every command is one JSON object.

    gates   compile every kernel for sm_90a, read the machine code, hold it against what is expected
    bench   on a GPU: correctness, then TFLOPS and GB/s; without one: modelled figures

`python -m kernels COMMAND --help` names the options. Exit codes: docs/exit-codes.md; gates ends with 1 if one fails.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

# Modules with `main(arguments) -> exit code`, imported when asked for.
COMMANDS = {"gates": "kernels.compiled.report", "bench": "kernels.compiled.bench"}
EXIT_USAGE = 64


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print((__doc__ or "").rstrip(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else EXIT_USAGE
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"python -m kernels: {command!r}: must be one of {', '.join(COMMANDS)}", file=sys.stderr)
        return EXIT_USAGE
    code: int = import_module(COMMANDS[command]).main(rest)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
