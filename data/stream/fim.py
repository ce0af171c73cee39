"""Fill-in-the-middle on whole documents before packing, in the order prefix, suffix, middle (Bavarian et al. 2022,
Efficient Training of Language Models to Fill in the Middle, PSM; DeepSeek-V3 section 4.1, rate 0.1).

`BOS content EOS` becomes `BOS begin prefix hole suffix end middle EOS`: three tokens more, so that lengths, and with
them packing, are known from the index alone. Which documents and where they are cut follows from (seed, source,
document, epoch). The cuts are two of the content's n + 1 places, drawn uniformly, between tokens; any part may be
empty.

Shape letters: D documents, N tokens.
"""

from __future__ import annotations

import numpy as np

from data.errors import DataError, UsageError
from data.hashing import UINT64, mix

ADDED = 3
_SECOND_CUT = UINT64(0xD1B54A32D192ED03)
_FIRST_CUT = UINT64(0x8CB92BA72F3D8DD7)


def check_fim(rate: float, ids: tuple[int, ...], where: str) -> None:
    """Refuse a rate that is no share (UsageError) and one above 0 for a tokenizer without FIM ids (DataError)."""
    if not 0 <= rate <= 1:
        raise UsageError(f"FIM rate: found {rate}, allowed 0 to 1")
    if rate and len(ids) != ADDED:
        raise DataError(
            f"{where}: FIM rate {rate} asked for, but its tokenizer has no begin, hole and end tokens for it"
        )


def draw_fim(
    length_D: np.ndarray, document_D: np.ndarray, key: int, rate: float, capacity: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which documents are rearranged, bool [D], and the two cuts of each one's content, int64 [D, 2].

    length_D: stored tokens, BOS and EOS included. document_D: numbers within the source. key: of (seed, source, epoch).
    A document that fits a sequence of `capacity` tokens but would not with three more stays as it is, so that none
    shorter than a sequence is cut.
    """
    with np.errstate(over="ignore"):
        hash_D = mix(document_D.astype(UINT64) * UINT64(0x9E3779B97F4A7C15) + UINT64(key))
    chosen_D = (hash_D >> UINT64(1)) < UINT64(int(rate * 2.0**63))
    chosen_D &= (length_D >= 2) & ((length_D > capacity) | (length_D + ADDED <= capacity))
    places_D = np.maximum(length_D - 1, 1).astype(UINT64)
    cut_D2 = np.stack([mix(hash_D ^ _FIRST_CUT) % places_D, mix(hash_D ^ _SECOND_CUT) % places_D], axis=1)
    return chosen_D, np.sort(cut_D2.astype(np.int64), axis=1)


def apply_fim(document_N: np.ndarray, first: int, second: int, ids: tuple[int, ...]) -> np.ndarray:
    """The document with its content cut before the tokens `first` and `second`, [N + 3]."""
    begin, hole, end = (np.array([token], dtype=document_N.dtype) for token in ids)
    bos, content, eos = document_N[:1], document_N[1:-1], document_N[-1:]
    prefix, middle, suffix = content[:first], content[first:second], content[second:]
    return np.concatenate([bos, begin, prefix, hole, suffix, end, middle, eos])


def undo_fim(document_N: np.ndarray, ids: tuple[int, ...]) -> np.ndarray:
    """The document that `apply_fim` was given; one that was not rearranged comes back as it is."""
    if len(document_N) < 2 + ADDED or document_N[1] != ids[0]:
        return document_N
    hole, end = (int(np.flatnonzero(document_N == token)[0]) for token in ids[1:])
    prefix, suffix, middle = document_N[2:hole], document_N[hole + 1 : end], document_N[end + 1 : -1]
    return np.concatenate([document_N[:1], prefix, middle, suffix, document_N[-1:]])


def write_fim(
    out_N: np.ndarray, stored_N: np.ndarray, length: int, cuts: tuple[int, int], start: int, ids: tuple[int, ...]
) -> None:
    """Fill `out_N` with tokens [start, start + len(out_N)) of the rearranged document, copying no others.

    stored_N: the block from the document's BOS on. length: of the stored document.
    """
    first, second = cuts
    content = length - 2
    hole = 2 + first
    end = hole + 1 + content - second
    if start == 0 and len(out_N) == length + ADDED:
        out_N[0], out_N[1], out_N[hole], out_N[end], out_N[-1] = (
            stored_N[0],
            ids[0],
            ids[1],
            ids[2],
            stored_N[length - 1],
        )
        out_N[2:hole] = stored_N[1 : 1 + first]
        out_N[hole + 1 : end] = stored_N[1 + second : length - 1]
        out_N[end + 1 : -1] = stored_N[1 + first : 1 + second]
        return
    runs = (
        (0, 1, 0),
        (2, hole, 1),
        (hole + 1, end, 1 + second),
        (end + 1, length + ADDED - 1, 1 + first),
        (length + ADDED - 1, length + ADDED, length - 1),
    )
    stop = start + len(out_N)
    for run_first, run_last, source in runs:
        low, high = max(run_first, start), min(run_last, stop)
        if low < high:
            out_N[low - start : high - start] = stored_N[source + low - run_first : source + high - run_first]
    for place, token in zip((1, hole, end), ids, strict=True):
        if start <= place < stop:
            out_N[place - start] = token
