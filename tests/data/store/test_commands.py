"""`python -m data export-megatron` and `import-megatron`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.__main__ import main
from tests.data.store.test_megatron import corpus


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus(tmp_path / "corpus", 70_000)
    assert main(["export-megatron", f"corpus={tmp_path}/corpus", f"out={tmp_path}/out"]) == 0
    given = [f"out={tmp_path}/back", f"tokenizer={tmp_path}/corpus"]
    sources = f"+sources={{en: {{prefix: {tmp_path}/out/en, language: en, weight: 4/3}}}}"
    assert main(["import-megatron", *given, "vocab_size=70000", sources]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["command"] == "import-megatron" and last["sources"]["en"]["documents"] == 21
    assert main(["import-megatron", *given, "vocab_size=70", sources]) == 65
    assert "but the vocabulary has 70" in capsys.readouterr().err
    assert main(["import-megatron", *given, sources]) == 64
    assert "'vocab_size' has no value" in capsys.readouterr().err
