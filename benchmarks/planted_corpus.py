"""A corpus with planted copies: chunks cut from real texts, and copies of some of them changed in known ways.

Of 20,000 documents: 11,500 English and 4,500 Chinese bases of about 2 KB, and 4,000 copies: 500 exact, 300 with other
white space and case, 1,200 with 1 % of the tokens changed, 700 with 3 %, 800 with a header and a footer, 300 with
10 %, 200 with 25 %. Everything follows from the texts and the seed.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data.documents import DOCUMENTS, Document
from data.errors import DataError

DOCUMENT_COUNT = 20_000
BASES = {"en": 11_500, "zh": 4_500}
COPIES = {"exact": 500, "space": 300, "edit1": 1200, "edit3": 700, "frame": 800, "edit10": 300, "edit25": 200}
EDITS = {"edit1": 0.01, "edit3": 0.03, "edit10": 0.10, "edit25": 0.25}
CHUNK_BYTES = 2000
CHUNK_CHARACTERS = {"en": 2000, "zh": 680}
LEAST_CHARACTERS = {"en": 500, "zh": 200}
_HAN = re.compile("[\u3400-\u9fff]")
_UNIT = re.compile("[\u3400-\u9fff]|[^\\W\u3400-\u9fff]+|\\s+|[^\\w\\s]")
_FRAMES = {
    "en": (
        "Home | News | About us | Contact | Log in. You are reading the mirror of {}.\n\n",
        "\n\nAll rights reserved. Terms of use, privacy, cookies. Printed copy number {}. Back to the top of the page.",
    ),
    "zh": (
        "首页 新闻 关于我们 联系方式 登录，您正在阅读镜像第{}号。\n\n",
        "\n\n版权所有，转载请注明出处，打印副本编号{}，返回页首。",
    ),
}


@dataclass(frozen=True)
class Planted:
    """documents: bases and copies, shuffled. pairs: (base, copy, kind), places in documents."""

    documents: list[Document]
    pairs: list[tuple[int, int, str]]


def texts_of(raw: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of all jsonl files in a directory, in order; Chinese where a fifth of the characters is Han."""
    paths = sorted(raw.glob("*.jsonl"))
    if not paths:
        raise DataError(f"{raw}: no jsonl files; get texts with: python -m data fetch, or launch/corpus.sh")
    for path in paths:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                text = json.loads(line)["text"]
                yield "zh" if 5 * len(_HAN.findall(text)) > len(text) else "en", text


def planted(raw: Path, documents: int, seed: int) -> Planted:
    """`documents` documents in the proportions above. Error: DataError where the texts are too short for it."""
    rng = random.Random(seed)
    found = _bases(raw, {name: count * documents // DOCUMENT_COUNT for name, count in BASES.items()}, rng)
    kinds = [kind for kind, count in COPIES.items() for _ in range(count * documents // DOCUMENT_COUNT)]
    made = list(found)
    pairs = []
    for number, (base, kind) in enumerate(zip(rng.sample(range(len(found)), len(kinds)), kinds)):
        original = found[base]
        text = _copy(original.text, original.language, kind, rng, number)
        pairs.append((base, len(made), kind))
        made.append(Document(f"{original.id}/{kind}", text, original.source, original.language))
    order = rng.sample(range(len(made)), len(made))
    place = {index: new for new, index in enumerate(order)}
    return Planted([made[index] for index in order], [(place[a], place[b], kind) for a, b, kind in pairs])


def write_shards(directory: Path, documents: Sequence[Document], count: int) -> list[str]:
    """The documents in `count` shards of uneven sizes; their paths."""
    directory.mkdir(parents=True)
    edges = [round(len(documents) * (number / count) ** 1.3) for number in range(count + 1)]
    paths = []
    for number in range(count):
        part = documents[edges[number] : edges[number + 1]]
        rows = [{"source": d.source, "id": d.id, "language": d.language, "text": d.text} for d in part]
        path = directory / f"{number:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, DOCUMENTS), path, compression="zstd", row_group_size=4096)
        paths.append(str(path))
    return paths


def _bases(raw: Path, wanted: dict[str, int], rng: random.Random) -> list[Document]:
    chunks: dict[str, list[str]] = {name: [] for name in wanted}
    for language, text in texts_of(raw):
        size = CHUNK_CHARACTERS[language]
        pieces = (text[first : first + size].strip() for first in range(0, len(text), size))
        chunks[language] += [piece for piece in pieces if len(piece) >= LEAST_CHARACTERS[language]]
    documents = []
    for language, count in wanted.items():
        if len(chunks[language]) < count:
            raise DataError(
                f"{raw}: texts in '{language}' give {len(chunks[language])} chunks of {CHUNK_BYTES} bytes, need {count}"
            )
        chosen = rng.sample(range(len(chunks[language])), count)
        documents += [Document(f"{number:06d}", chunks[language][number], language, language) for number in chosen]
    return documents


def _copy(text: str, language: str, kind: str, rng: random.Random, number: int) -> str:
    if kind == "exact":
        return text
    if kind == "space":
        other = re.sub(r"\s+", lambda match: rng.choice(["\n", "  ", " \n "]), text).swapcase()
        # Chinese has few spaces to change; line breaks are what printing adds.
        return re.sub("(.{30})", r"\1" + "\n", other) if language == "zh" else other
    if kind == "frame":
        head, foot = _FRAMES[language]
        return head.format(number) + text + foot.format(number)
    units = _UNIT.findall(text)
    places = [place for place, unit in enumerate(units) if unit[0].isalnum()]
    words = [units[place] for place in places]
    for place in rng.sample(places, max(1, round(EDITS[kind] * len(places)))):
        units[place] = rng.choice([word for word in rng.choices(words, k=8) if word != units[place]] or ["x"])
    return "".join(units)
