"""What our adapters rely on of transformer-engine, read from its sources: `te_signatures.json`.

`python -m tests.kernels.libraries.te_signatures` downloads the wheel and writes the file anew. The sources are parsed,
never imported.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "transformer-engine==2.20.2"
STORED = Path(__file__).with_name("te_signatures.json")
PYTORCH = "transformer_engine.pytorch"
STORAGE = f"{PYTORCH}.tensor.storage.float8_blockwise_tensor_storage.Float8BlockwiseQTensorStorage"
# What is called, and the method that takes the arguments of a class.
CALLED = {
    f"{PYTORCH}.cpp_extensions.gemm.general_gemm": "",
    f"{PYTORCH}.cpp_extensions.gemm.general_grouped_gemm": "",
    f"{PYTORCH}.quantization.is_fp8_block_scaling_available": "",
    f"{PYTORCH}.quantized_tensor.Quantizer.quantize": "",
    f"{PYTORCH}.tensor.float8_blockwise_tensor.Float8BlockQuantizer": "__init__",
    STORAGE: "__new__",
    f"{STORAGE}.get_metadata": "",
}
# Classes whose members are read or set.
MEMBERS = (f"{PYTORCH}.constants.DType", f"{PYTORCH}.quantized_tensor.Quantizer")
# Methods that return a literal dict, for its keys.
KEYS = (f"{STORAGE}.get_metadata",)
SCALE_SHAPE = f"{PYTORCH}.tensor.float8_blockwise_tensor.Float8BlockQuantizer.get_scale_shape"


def download(directory: Path) -> Path:
    """The wheel, without its dependencies and without installing it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, PACKAGE, "--dest", str(directory)], check=True, timeout=300)
    return next(directory.glob("*.whl"))


def read(wheel: Path) -> dict[str, Any]:
    """The contents of `te_signatures.json`."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            "package": PACKAGE,
            "called": {
                name: arguments(definition(archive, f"{name}.{method}" if method else name))
                for name, method in CALLED.items()
            },
            "members": {name: members(definition(archive, name)) for name in MEMBERS},
            "keys": {name: returned_keys(definition(archive, name)) for name in KEYS},
        }


def definition(archive: zipfile.ZipFile, name: str) -> ast.AST:
    """The class or function of a dotted name: as much of it as possible is a file, the rest is looked up inside."""
    parts = name.split(".")
    files = set(archive.namelist())
    depth = max(n for n in range(len(parts)) if "/".join(parts[:n]) + ".py" in files)
    found: ast.AST = ast.parse(archive.read("/".join(parts[:depth]) + ".py"))
    for part in parts[depth:]:
        kinds = (ast.ClassDef, ast.FunctionDef)
        found = next(node for node in ast.iter_child_nodes(found) if isinstance(node, kinds) and node.name == part)
    return found


def arguments(function: ast.AST) -> str:
    """The parameters but self and cls as Python writes them, without types."""
    assert isinstance(function, ast.FunctionDef)
    found = function.args
    everything = [*found.posonlyargs, *found.args, *found.kwonlyargs]
    for argument in [*everything, *(extra for extra in (found.vararg, found.kwarg) if extra)]:
        argument.annotation = None
    if found.args and found.args[0].arg in ("self", "cls"):
        del found.args[0]
    return ast.unparse(found)


def members(class_: ast.AST) -> list[str]:
    """Names that a class body annotates or assigns."""
    assert isinstance(class_, ast.ClassDef)
    names = [node.target for node in class_.body if isinstance(node, ast.AnnAssign)]
    names += [target for node in class_.body if isinstance(node, ast.Assign) for target in node.targets]
    return sorted(name.id for name in names if isinstance(name, ast.Name))


def returned_keys(function: ast.AST) -> list[str]:
    returned = next(node.value for node in ast.walk(function) if isinstance(node, ast.Return))
    assert isinstance(returned, ast.Dict)
    return [ast.literal_eval(key) for key in returned.keys if key is not None]


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        STORED.write_text(json.dumps(read(download(Path(directory))), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
