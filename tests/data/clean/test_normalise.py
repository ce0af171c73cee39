"""Normalisation and language."""

from __future__ import annotations

import random
import unicodedata

from data.clean.language import language
from data.clean.normalise import normalise


def test_one_form() -> None:
    assert normalise("\ufeffe\u0301a \r\nb\u200b\r\r\r\rc\x00\t\n\n") == "éa\nb\n\nc"
    assert normalise(" \u3000\n\t\u200b") == ""
    assert normalise("    indented\n👩‍👩‍👧 ｆｕｌｌ") == "    indented\n👩‍👩‍👧 ｆｕｌｌ"


def test_normalising_twice_changes_nothing() -> None:
    rng = random.Random(1)
    for _ in range(500):
        once = normalise(
            "".join(rng.choices("a\u0301e 　\t\r\n\x00\x0c\x85\u2028\u200b\u200dㄱᅡᆨ中\ufeff", k=rng.randint(0, 30)))
        )
        assert normalise(once) == once
        assert unicodedata.is_normalized("NFC", once)


def test_language_by_script_then_by_model() -> None:
    assert language("滚滚长江东逝水，浪花淘尽英雄。") == "zh"
    assert language("安装 package 之后 run pip install -U foo 即可使用 the new version") == "zh"
    assert language("運行 docker compose up 後再試一次") == "zh"
    assert language("これはペンです。日本語の文章です。") == "ja"
    assert language("In the beginning God created the heavens and the earth.") == "en"
    assert language("Am Anfang schuf Gott Himmel und Erde, und die Erde war wüst.") == "de"
    assert language("1234 …!") == "und"
