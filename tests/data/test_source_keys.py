"""Sources, and entries of other dicts of dataclasses, added and changed on the command line."""

from __future__ import annotations

import pytest

from data.__main__ import main
from data.compose import compose_dataclass
from data.config import DataConfig, SourceConfig
from data.errors import UsageError
from data.look.report import ReportConfig
from data.store.exchange import ImportConfig, ImportSourceConfig


def sources(*given: str) -> dict[str, SourceConfig]:
    return compose_dataclass(DataConfig, "demo", list(given)).sources


@pytest.mark.parametrize("plus", ["+", "++"])
def test_a_source_is_added_key_by_key(plus: str) -> None:
    found = sources(
        f"{plus}sources.new-1.path=http://host:80/a/*.jsonl",
        f"{plus}sources.new-1.weight=1/3",
        "sources.new-1.language=de",
        f"{plus}sources.new-1.read.id=none",
    )
    assert list(found) == ["en", "zh", "new-1"]
    assert found["new-1"].path == "http://host:80/a/*.jsonl"
    assert (found["new-1"].weight, found["new-1"].language, found["new-1"].read.id) == ("1/3", "de", "none")
    assert {name: found[name] for name in ("en", "zh")} == sources()


@pytest.mark.parametrize(
    "given", ["+sources.new={path: x, language: en}", "+sources={new: {path: x, language: en}}"], ids=str
)
def test_a_source_is_added_as_a_whole(given: str) -> None:
    assert sources(given) == sources() | {"new": SourceConfig("x", "en")}


def test_keys_of_a_source_that_exists_may_have_a_plus() -> None:
    plain = sources("sources.en.dump=d", "sources.en.path=x")
    assert (plain["en"].dump, plain["en"].path) == ("d", "x")
    assert sources("+sources.en.dump=d", "++sources.en.path=x") == plain


def test_a_source_is_left_out_or_replaced() -> None:
    assert list(sources("~sources.en")) == ["zh"]
    replaced = sources("sources.en.dump=d", "~sources.en", "+sources.en.path=x", "+sources.en.language=fr")
    assert replaced["en"] == SourceConfig("x", "fr")


def test_entries_of_other_dicts() -> None:
    quality = compose_dataclass(DataConfig, "demo", ["+clean.quality.fr.families=[c4]"]).clean.quality
    assert list(quality) == ["en", "zh", "fr"]
    assert list(quality["fr"].families) == ["c4"]
    given = ["out=o", "tokenizer=t", "vocab_size=4", "+sources.a.prefix=p", "+sources.a.language=en"]
    assert compose_dataclass(ImportConfig, None, given).sources == {"a": ImportSourceConfig("p", "en")}
    assert compose_dataclass(ReportConfig, None, ["data=d", "+tokenizers.x=F"]).tokenizers == {"x": "F"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["sources.new.path=x"], "sources holds no 'new'; to add it, put a plus before the key: +sources.new.path=..."),
        (["sources.new={path: x}"], "sources holds no 'new'; to add it, put a plus before the key: +sources.new=..."),
        (["+sources.new.path=x"], "key 'sources.new.language' has no value; give it as sources.new.language=VALUE"),
        (["+sources.new.pth=x"], "unknown key 'sources.new.pth'; did you mean 'sources.*.path'?"),
        (["+sources.en.wait=x"], "unknown key 'sources.en.wait'"),
        (["+clean.quality.fr.families=[c4]", "+clean.quality.fr.c5.x=1"], "unknown key 'clean.quality.fr.c5"),
        (["clean.quality.fr.families=[c4]"], "clean.quality holds no 'fr'"),
    ],
)
def test_what_is_wrong_is_said_with_the_form_that_is_right(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", *given]) == UsageError.exit_code
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
