"""What simple models reach on held-out text, in bits per byte: the marks a trained model is measured against.

The held-out text of a language is its whole held-out documents one after another; bytes are the UTF-8 bytes of their
texts. Costs count content tokens, never BOS or EOS.

- token unigram: add-1/2 counts of content tokens in that language's training text, over all entries of the run's
  tokenizer.
- token bigram: P(b|a) = (c(ab) + t(a) P1(b)) / (c(a) + t(a)), t(a) the number of different tokens seen after a, P1 the
  unigram (Witten and Bell 1991, method C). The context of a document's first token is BOS.
- character bigram: the same over characters; P1 has add-1/2 counts over the training characters and one class of
  unseen ones, spread evenly over Unicode.
- zlib: `zlib -9` of the held-out text alone.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from data.contract import Manifest
from data.documents import Document, read_jsonl
from data.errors import DataError
from data.store.blocks import BlockStore
from data.store.manifest import load_manifest
from data.tokenizer import BOS_ID, EOS_ID, decode, encode, load_tokenizer

UNICODE_CODE_POINTS = 0x110000


def heldout_languages(directory: Path) -> list[str]:
    """Languages with held-out text. Error: DataError if there are none."""
    languages = sorted(path.stem for path in (directory / "heldout").glob("*.jsonl"))
    if not languages:
        raise DataError(f"{directory / 'heldout'}: no held-out text")
    return languages


def heldout_documents(directory: Path, language: str) -> list[Document]:
    """Held-out documents in the order of their file. Error: DataError naming the file and the place of the fault."""
    return list(read_jsonl(directory / "heldout" / f"{language}.jsonl", "heldout", language))


def heldout_tokens(directory: str | Path, language: str) -> tuple[np.ndarray, np.ndarray, int]:
    """(tokens int64 [N], content bool [N], UTF-8 bytes of the texts) of a language's held-out text.

    tokens: BOS, content, EOS of every document in turn. content: True on the tokens whose cost counts; bits per byte
    is the sum of -log2 P over them by the bytes. Errors: DataError, also when the tokenizer is not the one the data
    was made with.
    """
    directory = Path(directory)
    tokenizer = load_tokenizer(directory, load_manifest(directory).tokenizer_sha256)
    texts = [document.text for document in heldout_documents(directory, language)]
    tokens_N = np.concatenate([[BOS_ID, *content, EOS_ID] for content in encode(tokenizer, texts)]).astype(np.int64)
    content_N = (tokens_N != BOS_ID) & (tokens_N != EOS_ID)
    return tokens_N, content_N, sum(len(text.encode()) for text in texts)


def training_tokens(directory: Path, manifest: Manifest, language: str) -> np.ndarray:
    """All training tokens of a language, BOS and EOS included, int64."""
    store = BlockStore(directory, manifest)
    blocks = [block for source in manifest.sources if source.language == language for block in source.blocks]
    if not blocks:
        raise DataError(f"{directory}: held-out text in '{language}', but no training text")
    return np.concatenate([store.tokens(block) for block in blocks]).astype(np.int64)


def unigram_bits(train_N: np.ndarray, vocabulary: int) -> np.ndarray:
    """-log2 P of every token id, float64 [vocabulary]; BOS and EOS in `train_N` are passed over."""
    count_V = np.bincount(train_N[(train_N != BOS_ID) & (train_N != EOS_ID)], minlength=vocabulary) + 0.5
    return -np.log2(count_V / count_V.sum())


def bigram_probabilities(train_N: np.ndarray, text_N: np.ndarray, unigram_V: np.ndarray) -> np.ndarray:
    """Witten-Bell P(text[i] | text[i - 1]) for i >= 1, float64 [N - 1], with counts from `train_N`. unigram_V: P1 of
    every id.
    """
    size = len(unigram_V)
    pair_K, seen_K = np.unique(train_N[:-1] * size + train_N[1:], return_counts=True)
    after_V = np.bincount(train_N[:-1], minlength=size)
    types_V = np.bincount(pair_K // size, minlength=size)
    wanted_N = text_N[:-1] * size + text_N[1:]
    place_N = np.minimum(np.searchsorted(pair_K, wanted_N), len(pair_K) - 1)
    count_N = np.where(pair_K[place_N] == wanted_N, seen_K[place_N], 0)
    before_N, next_N = text_N[:-1], text_N[1:]
    weight_N, total_N = types_V[before_N], after_V[before_N]
    unseen_N = total_N + weight_N == 0
    mixed_N = (count_N + weight_N * unigram_V[next_N]) / np.where(unseen_N, 1, total_N + weight_N)
    return np.where(unseen_N, unigram_V[next_N], mixed_N)


def _character_bits(train: list[str], heldout: list[str]) -> float:
    """Bits of the held-out texts under the character bigram; BOS stands before each."""
    alphabet = {character: i for i, character in enumerate(sorted(set("".join(train))), start=2)}
    unseen, size = len(alphabet) + 2, len(alphabet) + 3

    def ids(texts: list[str]) -> np.ndarray:
        return np.array(
            [i for text in texts for i in (BOS_ID, *(alphabet.get(c, unseen) for c in text), EOS_ID)], dtype=np.int64
        )

    train_N, text_N = ids(train), ids(heldout)
    bits_V = unigram_bits(train_N, size)
    probability_N = bigram_probabilities(train_N, text_N, 2.0**-bits_V)
    content_N = (text_N[1:] != BOS_ID) & (text_N[1:] != EOS_ID)
    spread = np.log2(UNICODE_CODE_POINTS) * int((text_N == unseen).sum())
    return float(-np.log2(probability_N[content_N]).sum() + spread)


def _training_texts(train_N: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    pieces = np.split(train_N, np.flatnonzero(train_N == BOS_ID)[1:])
    return [decode(tokenizer, piece[1:-1]) for piece in pieces]


def baselines(directory: Path) -> dict[str, dict[str, float]]:
    """Per held-out language: bits per byte of each simple model, and the sizes behind them. Errors: DataError."""
    manifest = load_manifest(directory)
    tokenizer = load_tokenizer(directory, manifest.tokenizer_sha256)
    figures: dict[str, dict[str, float]] = {}
    for language in heldout_languages(directory):
        tokens_N, content_N, size = heldout_tokens(directory, language)
        train_N = training_tokens(directory, manifest, language)
        bits_V = unigram_bits(train_N, tokenizer.get_vocab_size())
        bigram_N = -np.log2(bigram_probabilities(train_N, tokens_N, 2.0**-bits_V))
        texts = [document.text for document in heldout_documents(directory, language)]
        compressed = zlib.compress("".join(texts).encode(), 9)
        figures[language] = {
            "zlib": 8 * len(compressed) / size,
            "token_unigram": float(bits_V[tokens_N[content_N]].sum()) / size,
            "token_bigram": float(bigram_N[content_N[1:]].sum()) / size,
            "character_bigram": _character_bits(_training_texts(train_N, tokenizer), texts) / size,
            "documents": len(texts),
            "tokens": int(content_N.sum()),
            "bytes": size,
        }
    return figures
