"""Quality filters through a build, switched on by keys of the command line: what each rule drops, and its count."""

from __future__ import annotations

import json
import random
from itertools import count, islice, product
from pathlib import Path
from typing import Any

import pytest

import data.clean.clean
from data.__main__ import main
from data.documents import Document
from tests.data.synthetic import write_jsonl

LETTERS = "abdefghiklmnoprstuw"
COMMON = "的年在月是和日了有人中他也而一不这来到大上国个说们为子时道出生会着自家可对地学下里心"
Dropped = dict[str, dict[str, list[str]]]


@pytest.fixture(autouse=True)
def _made_up_words_are_english(monkeypatch: pytest.MonkeyPatch) -> None:
    real = data.clean.clean.language
    monkeypatch.setattr(data.clean.clean, "language", lambda text: "zh" if real(text) == "zh" else "en")


def words(seed: int, number: int, letters: int = 5) -> list[str]:
    """Different made-up words."""
    rng = random.Random(seed)
    first = list(LETTERS)
    rng.shuffle(first)
    found = ["".join(word) for word in islice(product(first, repeat=3), 20 * number)]
    return [word + "".join(rng.choices(LETTERS, k=letters - 3)) for word in rng.sample(found, number)]


def lines(seed: int, number: int, end: str = ".", length: int = 12) -> list[str]:
    """Lines of `length` words, two of them stop words."""
    found = words(seed, number * length)
    return [" ".join(["the", "of", *found[i * length + 2 : (i + 1) * length]]) + end for i in range(number)]


def prose(seed: int) -> str:
    return "\n".join(lines(seed, 12))


def repeating(seed: int, size: int, period: int) -> str:
    """A phrase of `size` words at the start of each of 20 periods of words."""
    found = words(seed, 20 * period)
    for start in range(period, 20 * period, period):
        found[start : start + size] = found[:size]
    return " ".join(found)


def chinese_prose(seed: int, characters: int) -> str:
    rng = random.Random(seed)
    text = ""
    while len(text) < characters:
        for _ in range(rng.randint(2, 5)):
            text += "".join(rng.choices(COMMON, k=rng.randint(5, 20))) + rng.choice("，。。！？")
        text = text[:-1] + "。\n"
    return text.rstrip("\n")


SHORT, LONG = "the same few of it.", " ".join(words(90, 70))
PERIODS = {"top_2": 3, "top_3": 12, "top_4": 20}
PERIODS |= {f"duplicate_{n}": period for n, period in ((5, 25), (6, 30), (7, 38), (8, 48), (9, 58), (10, 72))}

REPETITION: Dropped = {
    "gopher_repetition.duplicate_lines": {"en": ["\n".join([*lines(1, 5), *[SHORT] * 5])]},
    "gopher_repetition.duplicate_line_characters": {"en": ["\n".join([*lines(2, 8), LONG, LONG])]},
    "gopher_repetition.duplicate_paragraphs": {"en": ["\n\n".join([*lines(3, 5), *[SHORT] * 5])]},
    "gopher_repetition.duplicate_paragraph_characters": {"en": ["\n\n".join([*lines(4, 8), LONG[5:], LONG[5:]])]},
    **{
        f"gopher_repetition.{name}_grams": {"en": [repeating(10 + seed, int(name.rpartition("_")[2]), period)]}
        for seed, (name, period) in enumerate(PERIODS.items())
    },
}
REPETITION["gopher_repetition.duplicate_8_grams"]["zh"] = [chinese_prose(7, 150) + chinese_prose(7, 150)]

QUALITY: Dropped = {
    "gopher_quality.few_words": {"en": [" ".join(words(30, 49))], "zh": [chinese_prose(30, 40)]},
    "gopher_quality.many_words": {"en": ["\n".join(lines(31, 17))]},
    "gopher_quality.short_words": {"en": ["ab of " * 40]},
    "gopher_quality.long_words": {"en": [" ".join(words(32, 60, letters=11))]},
    "gopher_quality.hashes": {"en": [" ".join(words(33, 60)) + " #" * 8]},
    "gopher_quality.ellipses": {"en": [" ".join(words(34, 60)) + " …" * 8 + " end"]},
    "gopher_quality.bullet_lines": {"en": ["\n".join(f"- {line}" for line in lines(35, 12))]},
    "gopher_quality.ellipsis_lines": {"en": ["\n".join([*lines(36, 4, end="..."), *lines(37, 6)])]},
    "gopher_quality.alphabetic_words": {"en": [" ".join([*words(38, 40), *map(str, range(100, 115))])]},
    "gopher_quality.stop_words": {"en": [" ".join(words(39, 60))], "zh": ["乙丙丁戊己庚辛壬癸甲。" * 12]},
}
C4: Dropped = {
    "c4.lorem_ipsum": {"en": [prose(50) + "\nLorem ipsum dolor sit amet."]},
    "c4.curly_bracket": {"en": [prose(51) + "\nint main() { return 0; }"]},
    "c4.few_sentences": {"en": [" ".join(lines(52, 4)), "Menu\n" * 20 + "\n".join(lines(53, 4))]},
}
FINEWEB: Dropped = {
    "fineweb.punctuated_lines": {
        "en": ["\n".join(lines(60, 12, end=""))],
        "zh": [chinese_prose(60, 200).translate(str.maketrans("。！？", "，，，"))],
    },
    "fineweb.short_lines": {"en": ["\n".join(lines(61, 12, length=4))]},
    "fineweb.duplicate_line_characters": {"en": ["\n".join([*lines(62, 8), *lines(62, 8)[:2]])]},
    "fineweb.line_breaks": {
        "en": ["\n".join(f"{word}." for word in words(63, 40, letters=40))],
        "zh": ["\n".join(f"{COMMON[i : i + 4]}。" for i in range(0, 40, 4))],
    },
}
GOOD = {"en": [prose(seed) for seed in range(100, 104)], "zh": [chinese_prose(seed, 250) for seed in range(100, 104)]}


@pytest.mark.parametrize(
    ("dropped", "keys"),
    [
        (
            REPETITION,
            ["clean.quality.en.families=[gopher_repetition]", "clean.quality.zh.families=[gopher_repetition]"],
        ),
        (
            QUALITY,
            [
                "clean.quality.en.families=[gopher_quality]",
                "clean.quality.zh.families=[gopher_quality]",
                "clean.quality.en.gopher_quality.max_words=200",
            ],
        ),
        (C4, ["clean.quality.en.families=[c4]"]),
        (FINEWEB, ["clean.quality.en.families=[fineweb]", "clean.quality.zh.families=[fineweb]"]),
        ({}, []),
    ],
    ids=["gopher_repetition", "gopher_quality", "c4", "fineweb", "none"],
)
def test_each_rule_drops_its_document_and_is_counted(dropped: Dropped, keys: list[str], tmp_path: Path) -> None:
    report = built(tmp_path, dropped or REPETITION | QUALITY | C4, keys)
    wanted = {
        reason: {language: [len(texts), sum(len(text.encode()) for text in texts)] for language, texts in row.items()}
        for reason, row in dropped.items()
    }
    assert report["dropped"] == wanted
    for language in ("en", "zh"):
        count = sum(cells[language][0] for cells in wanted.values() if language in cells)
        assert report["steps"]["quality"][language]["dropped_documents"] == count
        if dropped:
            assert report["steps"]["quality"][language]["documents"] == len(GOOD[language])


def test_a_threshold_that_is_moved_or_switched_off_keeps_the_document(tmp_path: Path) -> None:
    moved = [
        "clean.quality.en.families=[c4,gopher_quality,fineweb]",
        "clean.quality.en.gopher_quality.min_words=40",
        "clean.quality.en.gopher_quality.min_stop_words=null",
        "clean.quality.en.gopher_quality.max_symbols_per_word=0.5",
        "clean.quality.en.fineweb.min_punctuated_lines=0",
        "clean.quality.en.fineweb.max_line_breaks_per_word=null",
        "clean.quality.en.c4.curly_bracket=false",
        "clean.quality.en.c4.min_sentences=null",
    ]
    names = ("few_words", "stop_words", "hashes", "ellipses")
    given = {name: {"en": row["en"]} for name, row in QUALITY.items() if name.rpartition(".")[2] in names}
    given |= {"fineweb.punctuated_lines": {"en": FINEWEB["fineweb.punctuated_lines"]["en"]}}
    given |= {"c4.curly_bracket": C4["c4.curly_bracket"], "c4.lorem_ipsum": C4["c4.lorem_ipsum"]}
    given |= {"c4.empty": {"en": ["\n".join(words(71, 60))]}}
    assert list(built(tmp_path, given, moved)["dropped"]) == ["c4.empty", "c4.lorem_ipsum"]


def test_lines_that_c4_takes_away_are_counted(tmp_path: Path) -> None:
    edited = prose(70) + "\nPlease enable JavaScript to see this.\nHome\nRead our privacy policy here."
    report = built(tmp_path, {"none": {"en": [edited]}}, ["clean.quality.en.families=[c4]"])
    assert report["dropped"] == {}
    assert report["edited"] == {"c4.lines": {"en": [1, len(edited) - len(prose(70))]}}


def built(directory: Path, texts: Dropped, keys: list[str]) -> dict[str, Any]:
    """report.json of a build of these and the GOOD ones."""
    for language in ("en", "zh"):
        number = count()
        given = [*GOOD[language], *(text for row in texts.values() for text in row.get(language, []))]
        write_jsonl(directory / f"{language}.jsonl", [Document(f"{next(number)}", text, "", "") for text in given])
    paths = [f"sources.{language}.path={directory}/{language}.jsonl" for language in ("en", "zh")]
    rest = ["heldout_share=0.2", "tokenizer.vocab_size=300", "tokenizer.encoder=huggingface", "store.plan_lengths=[64]"]
    assert main(["build", f"out={directory}/out", *paths, *rest, *keys]) == 0
    found: dict[str, Any] = json.loads((directory / "out/report.json").read_bytes())
    return found
