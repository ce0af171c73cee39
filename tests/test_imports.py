"""Imports point only down, and importing a module does nothing but define names."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Each room and the rooms it may import.
BELOW = {
    "launch": {"train", "model", "parallel", "kernels", "data"},
    "train": {"model", "parallel", "kernels", "data"},
    "model": {"parallel", "kernels"},
    "parallel": {"kernels"},
    "kernels": set(),
    "data": set(),
}
OPTIONAL = {"triton", "deepspeed", "transformer_engine", "submitit", "daft", "ray", "deep_gemm", "flash_attn_interface"}


def sources(room: str) -> list[Path]:
    return sorted(path for path in (ROOT / room).rglob("*.py") if "__pycache__" not in path.parts)


def imported_rooms(tree: ast.AST, package: str) -> list[tuple[int, str]]:
    """(line, room) for every import anywhere in the file, function bodies included."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            names = [".".join([*parents, *([node.module] if node.module else [])])]
        else:
            continue
        found += [(node.lineno, name.split(".")[0]) for name in names if name.split(".")[0] in BELOW]
    return found


def upward_imports(room: str, source: str, package: str) -> list[tuple[int, str]]:
    return [
        (line, name)
        for line, name in imported_rooms(ast.parse(source), package)
        if name != room and name not in BELOW[room]
    ]


@pytest.mark.parametrize("room", BELOW)
def test_imports_point_down(room: str) -> None:
    wrong = []
    for path in sources(room):
        package = ".".join(path.relative_to(ROOT).parent.parts)
        wrong += [
            f"{path.relative_to(ROOT)}:{line} imports {name}"
            for line, name in upward_imports(room, path.read_text(encoding="utf-8"), package)
        ]
    assert not wrong, "\n".join(wrong)


def test_the_direction_check_sees_every_form_of_import() -> None:
    assert upward_imports("model", "import train.loop", "model") == [(1, "train")]
    assert upward_imports("model", "def f():\n    from train import loop", "model") == [(2, "train")]
    assert upward_imports("data", "from kernels import quantize", "data.dedup") == [(1, "kernels")]
    assert upward_imports("kernels", "from parallel.schedule.actions import Op", "kernels") == [(1, "parallel")]
    assert not upward_imports("parallel", "from . import actions\nfrom .. import expert", "parallel.schedule")
    assert not upward_imports("train", "import torch, model.config\nfrom data.contract import IGNORE", "train")


# Runs in a fresh process: argv are JSON lists of optional third parties, modules to import, rooms.
IMPORT_ALL = """
import importlib, json, os, sys
sys.path.insert(0, os.getcwd())
import numpy, torch

optional, modules, rooms = (json.loads(argument) for argument in sys.argv[1:])
ours = tuple(os.path.join(os.getcwd(), room) for room in rooms)
problems, skipped, module = [], [], ""

def state():
    return {"default dtype": torch.get_default_dtype(), "grad mode": torch.is_grad_enabled(),
            "number of torch threads": torch.get_num_threads(),
            "torch random state": torch.get_rng_state().tolist(), "numpy random state": repr(numpy.random.get_state()),
            "process group": torch.distributed.is_initialized(),
            "CUDA context": torch.cuda.is_initialized(), "arguments": list(sys.argv)}

def watch(event, arguments):  # a file opened for writing by a module body of ours
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    if event != "open" or not isinstance(arguments[2], int) or not arguments[2] & writes:
        return
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != "<module>":
        frame = frame.f_back
    if frame is not None and frame.f_code.co_filename.startswith(ours):
        problems.append(f"{module}: opens {arguments[0]} for writing")

sys.addaudithook(watch)
before = state()
for module in modules:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        skipped.append(module) if missing in optional else problems.append(f"{module}: {error!r}")
    except BaseException as error:
        problems.append(f"{module}: {error!r}")
    now = state()
    problems += [f"{module}: importing changed the {what}" for what in now if now[what] != before[what]]
    before = now
print(json.dumps({"problems": problems, "skipped": skipped}))
"""


def import_all(modules: list[str], cwd: Path, rooms: list[str]) -> tuple[dict[str, list[str]], str]:
    """Import modules in one fresh process; (what it reported, anything they printed)."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, json.dumps(sorted(OPTIONAL)), json.dumps(modules), json.dumps(rooms)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr
    *printed, last = done.stdout.splitlines()
    return json.loads(last), "\n".join(printed)


def test_importing_does_no_work() -> None:
    modules = []
    for room in BELOW:
        for path in sources(room):
            parts = path.relative_to(ROOT).with_suffix("").parts
            modules.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    report, printed = import_all(modules, ROOT, list(BELOW))
    assert not report["problems"], "\n".join(report["problems"])
    assert not printed, f"modules print when imported: {printed}"


def test_the_import_check_notices_work(tmp_path: Path) -> None:
    room = tmp_path / "kernels"
    room.mkdir()
    (room / "__init__.py").write_text("")
    (room / "loud.py").write_text("print('hello')")
    (room / "seeded.py").write_text("import torch\ntorch.manual_seed(123)")
    (room / "writer.py").write_text("open('left_behind.txt', 'w').close()")
    (room / "needs_gpu.py").write_text("import triton_missing_here")
    (room / "broken.py").write_text("raise SystemExit(3)")
    names = [f"kernels.{name}" for name in ("loud", "seeded", "writer", "needs_gpu", "broken")]
    report, printed = import_all(names, tmp_path, ["kernels"])
    assert printed == "hello"
    joined = "\n".join(report["problems"])
    assert "seeded: importing changed the torch random state" in joined
    assert "left_behind.txt for writing" in joined
    assert "needs_gpu: ModuleNotFoundError" in joined
    assert "broken: SystemExit(3)" in joined


def test_transformers_does_not_take_our_kernels_for_the_hub_package() -> None:
    """`kernels` is also the name of a Hugging Face package; transformers must not find ours usable as that."""
    code = (
        "import kernels, transformers, transformers.utils.import_utils as u\n"
        "from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast\n"
        "import os; assert os.path.abspath(kernels.__file__).startswith(os.getcwd()), kernels.__file__\n"
        "assert not u.is_kernels_available(), 'transformers takes our package kernels for its own'\n"
        "print('fine')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 and done.stdout.strip() == "fine", done.stderr
