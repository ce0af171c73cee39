"""What the documents name exists: files, links, modules, scripts, configuration keys."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from train.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
ROOMS = "kernels|parallel|model|data|train|launch|conf|tests|docs|benchmarks"


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize("document", DOCUMENTS, ids=names(DOCUMENTS))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=names(DOCUMENTS))
def test_files_named_in_the_text_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for path in re.findall(rf"`((?:{ROOMS})/[\w./-]*)`", text):
        assert (ROOT / path).exists(), f"{document.name} names {path}"


@pytest.mark.parametrize("file", DOCUMENTS + SCRIPTS, ids=names(DOCUMENTS + SCRIPTS))
def test_commands_exist(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    for module in re.findall(rf"-m ((?:{ROOMS})[\w.]*)", text):
        entry = module if "." in module else f"{module}.__main__"
        assert importlib.util.find_spec(entry) is not None, f"{file.name} runs {module}"
    for script in re.findall(r"bash (launch/\S+\.sh)", text):
        assert (ROOT / script).exists(), f"{file.name} runs {script}"
    for name in re.findall(r"experiment=(\w+)", text):
        assert (ROOT / f"conf/experiment/{name}.yaml").exists(), f"{file.name} names experiment={name}"


def keys(schema: Any, prefix: str = "") -> set[str]:
    """Dotted names of a configuration's leaves and groups."""
    found = set()
    hints = get_type_hints(schema)
    for field in fields(schema):
        found.add(prefix + field.name)
        if is_dataclass(hints[field.name]):
            found |= keys(hints[field.name], f"{prefix}{field.name}.")
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=names(DOCUMENTS))
def test_configuration_keys_exist(document: Path) -> None:
    known = keys(RunConfig)
    groups = "|".join(sorted({key.split(".")[0] for key in known}))
    for key in re.findall(rf"`((?:{groups})\.[a-z_.]+)=", document.read_text(encoding="utf-8")):
        assert key in known, f"{document.name} names {key}"
