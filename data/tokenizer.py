"""Byte-level BPE with DeepSeek-V3's three-stage pre-tokenizer, in Hugging Face form.

Contract: <｜begin▁of▁sentence｜> 0, <｜end▁of▁sentence｜> 1, <｜▁pad▁｜> 2, fill-in-the-middle begin, hole, end 3-5. A
stored document is BOS + tokens + EOS. Text that spells a special token is data: it is encoded as ordinary characters
and never gives the special id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from data.config import TokenizerConfig
from data.errors import DataError

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
SPECIALS = (BOS, EOS, PAD, "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
BOS_ID, EOS_ID, PAD_ID, FIM_BEGIN_ID, FIM_HOLE_ID, FIM_END_ID = range(len(SPECIALS))
VOCAB_MULTIPLE = 128
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"

# The three patterns of DeepSeek-V3's released tokenizer.json, character by character: fast encoders know them by their
# spelling.
NUMBERS = r"\p{N}{1,3}"
HAN_KANA = "[一-龥\u3040-ゟ゠-ヿ]"
WORDS = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)


def pre_tokenizer(han_run: int | None = None) -> pre_tokenizers.PreTokenizer:
    """DeepSeek-V3's pre-tokenizer. han_run: cut runs of Han or kana to this many characters, for training only."""
    han = HAN_KANA + ("+" if han_run is None else f"{{1,{han_run}}}")
    return pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in (NUMBERS, han, WORDS)),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Train on `texts`; the result has at most `config.vocab_size` entries. The same texts give the same tokenizer,
    byte for byte.

    Nearly half of all Han runs in a corpus are unique, so whole runs would make the trainer's word table grow with the
    text.
    """
    tokenizer = Tokenizer(BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizer(config.han_run)
    trainer = BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIALS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=config.max_token_length,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    for identity, token in enumerate(SPECIALS):
        assert tokenizer.token_to_id(token) == identity
    return tokenizer


def tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """Content of tokenizer.json."""
    return tokenizer.to_str(pretty=True).encode()


def tokenizer_config_json() -> bytes:
    """Content of tokenizer_config.json, which `transformers` reads beside it."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
    }
    return (json.dumps(settings, ensure_ascii=False, indent=2) + "\n").encode()


def padded_vocabulary(entries: int) -> int:
    """Rows of the model's embedding for a tokenizer of `entries`: the next multiple of 128."""
    return -(-entries // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def load_tokenizer(directory: Path, sha256: str | None = None) -> Tokenizer:
    """The tokenizer in `directory`. sha256: of its tokenizer.json, as in the manifest. Error: DataError if it is
    another or damaged.
    """
    path = directory / TOKENIZER_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read the tokenizer: {error.strerror}") from None
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise DataError(f"{path}: another tokenizer than the data's: sha256 {found}, the manifest has {sha256}")
    try:
        return Tokenizer.from_str(content.decode())
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(f"{path}: not a tokenizer: {error}") from None


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Content tokens of each text, uint32, without BOS and EOS."""
    tokenizer.encode_special_tokens = True
    return [
        np.array(encoding.ids, dtype=np.uint32)
        for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    ]


def decode(tokenizer: Tokenizer, tokens: Iterable[int]) -> str:
    """Text of content tokens; special tokens are left out."""
    return str(tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True))
