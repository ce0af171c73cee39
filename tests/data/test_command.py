"""What `python -m data` says of itself."""

from __future__ import annotations

import pytest
import yaml

from data.__main__ import COMMANDS, USAGE, main
from data.config import DataConfig


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_its_keys(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    described, _, keys = capsys.readouterr().out.partition("\n\n")
    if command in ("build", "dedup"):  # DataConfig's description has two paragraphs
        described, keys = described + keys.partition("\n\n")[0], keys.partition("\n\n")[2]
        assert set(yaml.safe_load(keys)) == set(DataConfig.__dataclass_fields__)
    assert described and command in USAGE


def test_keys_are_shown_as_they_were_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "seed=5", "-h"]) == 0
    assert "\nseed: 5\n" in capsys.readouterr().out
    assert main(["build", "sed=5", "-h"]) == 64
    assert "did you mean 'seed'" in capsys.readouterr().err


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0 and main([]) == 64
    assert capsys.readouterr().out.count(USAGE) == 2
    assert main(["biuld"]) == 64
    assert "unknown command 'biuld'; did you mean 'build'" in capsys.readouterr().err
