"""`key=a,b` arguments into the runs of a sweep, in Hydra's own grammar (lists, `range`, `choice`, `glob`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from train.errors import ConfigError


def expand(arguments: Sequence[str]) -> list[list[str]]:
    """The product of all swept keys, each run as its own arguments with the swept ones last. ConfigError: not in
    Hydra's grammar, or a continuous sweep, which needs an optimiser."""
    try:
        overrides = OverridesParser.create().parse_overrides(list(arguments))
    except HydraException as error:
        raise ConfigError("; ".join(line.strip() for line in str(error).splitlines() if line.strip())) from None
    fixed, swept = [], []
    for argument, override in zip(arguments, overrides, strict=True):
        if not override.is_sweep_override():
            fixed.append(argument)
        elif not override.is_discrete_sweep():
            raise ConfigError(f"{argument}: a sweep needs a list, choice(...) or range(...)")
        else:
            key = override.get_key_element()
            swept.append([f"{key}={value}" for value in override.sweep_string_iterator()])
    return [[*fixed, *chosen] for chosen in product(*swept)]


def run_name(base: str, chosen: Sequence[str]) -> str:
    """A run's own directory below `base`, from what was chosen for it: the same sweep finds its runs again."""
    if not chosen:
        return base
    return f"{base}/" + ",".join(re.sub(r"[^\w.=+-]+", "_", choice) for choice in chosen)
