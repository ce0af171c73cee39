"""Each rule: a document just within its threshold is kept, one just beyond is dropped for that reason."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from data.clean.c4 import c4, sentences
from data.clean.quality import fineweb, gopher_quality, gopher_repetition, quality
from data.clean.statistics import Statistics
from data.clean.thresholds import (
    C4Rules,
    FineWebRules,
    GopherQuality,
    GopherRepetition,
    QualityConfig,
    chinese,
    english,
    validate_quality,
)
from data.errors import UsageError

OFF = GopherRepetition(None, None, None, None, {}, {})
ALL = ("gopher_repetition", "gopher_quality", "fineweb")


def distinct(count: int, seed: int = 0) -> list[str]:
    return [
        f"{'abcdefghij'[i % 10]}{'klmnopqrst'[i // 10 % 10]}{'uvwxyz'[i // 100 % 6]}" for i in range(seed, seed + count)
    ]


def repetition(text: str, **given: object) -> str | None:
    return gopher_repetition(Statistics(text), replace(OFF, **given))  # type: ignore[arg-type]


def test_repeated_lines_and_paragraphs() -> None:
    for again, wanted in ((3, None), (4, "duplicate_lines")):
        lines = ["same", *distinct(9 - again), *["same"] * again]
        assert repetition("\n".join(lines), duplicate_lines=0.3) == wanted
        wanted = wanted and "duplicate_paragraphs"
        assert repetition("\n\n".join(lines), duplicate_paragraphs=0.3) == wanted
    text = "x" * 20 + "\n" + "x" * 20 + "\n" + "y" * 58
    assert repetition(text, duplicate_line_characters=0.20) is None
    assert repetition(text[:-1], duplicate_line_characters=0.20) == "duplicate_line_characters"
    text = text.replace("\n", "\n\n")
    assert repetition(text[:-2], duplicate_paragraph_characters=0.20) is None
    assert repetition(text[:-3], duplicate_paragraph_characters=0.20) == "duplicate_paragraph_characters"
    assert repetition("") == "empty"


def test_repeated_ngrams() -> None:
    text = " ".join([*distinct(20), "to be", *distinct(20, 20), "to be", *distinct(20, 40), "to be"])
    share = 3 * 5 / len(text)
    assert repetition(text, top_ngrams={2: share}) is None
    assert repetition(text, top_ngrams={2: share - 1e-9}) == "top_2_grams"
    phrase = " ".join(distinct(7, 300))
    text = " ".join([phrase, *distinct(60), phrase])
    share = 5 * 3 / len(text)
    assert repetition(text, duplicate_ngrams={5: share}) is None
    assert repetition(text, duplicate_ngrams={5: share - 1e-9}) == "duplicate_5_grams"
    assert repetition(text, duplicate_ngrams={8: 0.0}) is None


@pytest.mark.parametrize(
    ("good", "bad", "reason"),
    [
        ("word " * 50, "word " * 49 + "! ? !", "few_words"),
        ("word " * 60, "word " * 61, "many_words"),
        ("abc " * 55, "abc " * 54 + "ab", "short_words"),
        ("a" * 10 + " " + "abcdefghij " * 52, "a" * 11 + " " + "abcdefghij " * 52, "long_words"),
        ("word " * 54 + "#" * 6, "word " * 53 + "#" * 6, "hashes"),
        ("word " * 54 + "… " * 6 + ".", "word " * 52 + "… " * 6 + ".", "ellipses"),
        ("- word\n" * 54 + "word\n" * 6, "• word\n" * 55 + "word\n" * 5, "bullet_lines"),
        (
            "word…\n" * 3 + "seven words stand here in this line\n" * 7,
            "word…\n" * 3 + "nine words stand here in this line as well\n" * 6,
            "ellipsis_lines",
        ),
        ("word " * 48 + "1234 " * 12, "word " * 47 + "1234 " * 12, "alphabetic_words"),
        ("word " * 50 + "the of", "word " * 50 + "the the", "stop_words"),
    ],
)
def test_gopher_quality(good: str, bad: str, reason: str) -> None:
    limits = GopherQuality(max_words=60, min_stop_words=2 if reason == "stop_words" else None)
    if reason == "bullet_lines":
        limits = replace(limits, min_alphabetic_words=None)
    assert gopher_quality(Statistics(good), limits) is None
    assert gopher_quality(Statistics(bad), limits) == reason


def test_fineweb() -> None:
    long = "This line has more than thirty characters in it"
    lines = [f"{long} {i}" for i in range(25)]
    limits = FineWebRules()
    three = [line + end for line, end in zip(lines, [".", "!”", "?"] + [""] * 22, strict=True)]
    assert fineweb(Statistics("\n".join(three)), limits) is None
    three[0] = lines[0]
    assert fineweb(Statistics("\n".join(three)), limits) == "punctuated_lines"
    ended = [line + "." for line in lines]
    short = [f"{i:030d}" for i in range(50)]
    assert fineweb(Statistics("\n".join([*ended, *short])), limits) is None
    assert fineweb(Statistics("\n".join([*ended, *short, "x" * 30])), limits) == "short_lines"
    assert fineweb(Statistics("\n".join([*ended, *ended[:2]])), limits) is None
    assert fineweb(Statistics("\n".join([*ended, *ended[:3]])), limits) == "duplicate_line_characters"
    joined = [f"{'x' * 31}{i}." for i in range(40)]
    assert fineweb(Statistics("\n".join(joined)), limits) == "line_breaks"
    assert fineweb(Statistics(" \n"), limits) == "empty"


def test_c4() -> None:
    text = "One is here. Two is there!\nMenu\nThree you see?\n汉字 和 句子。第二句。\nEnable JavaScript to see this.\n"
    text += "We use cookies here ok.\n"
    kept, reason = c4(text + "w" * 1001 + " is too long.\nAs is known[12][edit] since then.", C4Rules())
    assert reason is None
    assert kept == "One is here. Two is there!\nThree you see?\n汉字 和 句子。第二句。\nAs is known since then."
    assert c4("One is here.\nA page { with code }", C4Rules())[1] == "curly_bracket"
    assert c4("One is here.\nLorem Ipsum dolor sit.", C4Rules())[1] == "lorem_ipsum"
    assert c4("One is here. Two is here. And 3 is. Four is.", C4Rules()) == (
        "One is here. Two is here. And 3 is. Four is.",
        "few_sentences",
    )
    assert c4("One is here. Two is here. And 3 is. Four is. 5", C4Rules())[1] is None
    ends = C4Rules(terminal_punctuation=True, min_sentences=None)
    assert (
        c4('No end here\nEnds well today.\nTrails off now...\nHe said "yes."', ends)[0]
        == 'Ends well today.\nHe said "yes."'
    )
    assert [sentences(line) for line in ("", "a", "a.", "3.5 is one. b", "一。二！三", "Why?! No.")] == [
        0,
        1,
        1,
        2,
        3,
        2,
    ]
    found = quality("One is here. { ", english("c4"))
    assert found == ("One is here. { ", "c4.curly_bracket")


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("Mr. A. B. Smith of the U.S. navy, e.g. me, vs. him.", 1),
        ("Went to St. Ives with Dr. Who. Sent the rent.", 2),
        ("Yes . . . it is. No", 3),
        ("Wait... What? 'Here.' There.", 4),
        ("In What is to be done?, he said no.", 1),
        ("Done!!! . . . .", 1),
    ],
)
def test_what_ends_a_sentence(line: str, count: int) -> None:
    assert sentences(line) == count


def test_many_dots_take_no_time_of_their_square() -> None:
    """A square would be half an hour."""
    for sign in (".", ". ", "!", "a."):
        assert sentences(sign * 200_000 + "x") <= 2


def chinese_prose(characters: int) -> str:
    """Random characters among frequent ones, sentences of 5 to 20, lines of several."""
    rng = random.Random(3)
    common = "的年在月是和日了有人中他也而一不这来到大上国个说们为子时道出生会着自家可对地学下里心"
    text = ""
    while len(text) < characters:
        for _ in range(rng.randint(2, 5)):
            text += "".join(rng.choices(common, k=rng.randint(5, 20))) + rng.choice("，。。！？")
        text = text[:-1] + "。\n"
    return text


def test_chinese_counts_characters() -> None:
    settings = chinese(*ALL)
    text = chinese_prose(600)
    assert quality(text, settings) == (text, None)
    assert quality(text[:70], settings)[1] == "gopher_quality.few_words"
    assert quality(text, english(*ALL))[1] == "gopher_quality.short_words"
    assert quality(text.translate(str.maketrans("，。！？", "，，，，")), settings)[1] == "fineweb.punctuated_lines"
    assert quality(text.replace("。", "．").replace("！", "!"), settings)[1] is None
    unmarked = text.translate({ord(sign): "乙" for sign in chinese().gopher_quality.stop_words[:22]})
    assert quality(unmarked, chinese("gopher_quality"))[1] == "gopher_quality.stop_words"
    lines = text.replace("。", "。\n").replace("，", "。\n")
    broken = "".join(line[i : i + 4] + "。\n" for line in lines.split("\n") for i in range(0, len(line), 4))
    assert quality(broken, chinese("fineweb"))[1] == "fineweb.line_breaks"
    assert quality(text[:150] + text[:150], chinese("gopher_repetition"))[1] == "gopher_repetition.duplicate_8_grams"
    digits = "".join(f"{i}；" for i in range(100, 190))
    assert quality(text[:100] + digits, chinese("gopher_quality"))[1] == "gopher_quality.alphabetic_words"


def test_chinese_thresholds_are_the_published_ones_in_characters() -> None:
    settings = chinese()
    assert settings.gopher_repetition.top_ngrams == {3: 0.256, 5: 0.201, 6: 0.171}
    assert settings.gopher_repetition.duplicate_ngrams == {
        8: 0.198,
        9: 0.182,
        11: 0.167,
        12: 0.154,
        14: 0.14,
        15: 0.127,
    }
    assert settings.families == ()


def test_switched_off_rules_and_the_order_of_families() -> None:
    text = "short # # # #"
    assert quality(text, QualityConfig()) == (text, None)
    assert quality(text, english("fineweb", "gopher_quality"))[1] == "fineweb.punctuated_lines"
    assert quality(text, english("gopher_quality", "fineweb"))[1] == "gopher_quality.few_words"
    none = GopherQuality(*[None] * 9, ())  # type: ignore[arg-type]
    assert quality(text, QualityConfig(("gopher_quality",), gopher_quality=none))[1] is None


def test_settings_are_checked() -> None:
    validate_quality(english(*ALL), "q")
    validate_quality(chinese(*ALL), "q")
    wrong = QualityConfig(
        ("gopher",),
        replace(OFF, duplicate_lines=30.0, top_ngrams={0: 0.1}),
        GopherQuality(stop_words=("the",)),
    )
    with pytest.raises(UsageError) as caught:
        validate_quality(wrong, "q")
    for part in ("q.families: found 'gopher'", "duplicate_lines: found 30.0", "found 0: 0.1", "2 of 1 stop words"):
        assert part in str(caught.value)
