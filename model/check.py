"""`python -m model check folder=DIR`: every problem of a Hugging Face folder, or one line of what it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import prod
from pathlib import Path

from model.errors import ModelError
from model.huggingface_folder import ReleasedFolder
from model.names import canonical_shapes
from model.rope import yarn_is_on
from parallel.arguments import pairs

USAGE = "usage: python -m model check folder=DIR"


def run(arguments: Sequence[str]) -> None:
    """Prints the line, then one JSON object. ModelError: what is wrong."""
    try:
        given = pairs(arguments, ("folder",), ("folder",), USAGE)
    except ValueError as error:
        raise ModelError(str(error)) from None
    folder = ReleasedFolder(Path(given["folder"]))
    folder.check_values()
    found = describe(folder)
    mtp = f" + {found['mtp_parameters']:,} of MTP" if found["mtp_parameters"] else ""
    yarn = ", YaRN" if found["yarn"] else ""
    print(
        f"{folder.folder}: {found['family']}, {found['parameters']:,} parameters{mtp}, {' and '.join(folder.dtypes)}, "
        f"up to {found['length']} tokens{yarn}, {found['tensors']} tensors"
    )
    print(json.dumps(found))


def describe(folder: ReleasedFolder) -> dict[str, object]:
    """What a folder is: family, parameters with router biases (MTP apart), how its weights are stored, length."""
    sizes = {name: prod(shape) for name, shape in canonical_shapes(folder.config).items()}
    mtp = sum(size for name, size in sizes.items() if name.startswith("mtp."))
    return {
        "folder": str(folder.folder),
        "family": folder.values["model_type"],
        "parameters": sum(sizes.values()) - mtp,
        "mtp_parameters": mtp,
        "dtypes": folder.dtypes,
        "length": folder.length,
        "yarn": yarn_is_on(folder.config, folder.length),
        "tensors": folder.tensors,
    }
