"""One side of `benchmarks/stream.py`: a process that reads samples when told to.

    python benchmarks/stream_sides.py ours DIRECTORY LENGTH SAMPLES FIM_RATE
    python benchmarks/stream_sides.py megatron PREFIX LENGTH SAMPLES PAD

Prints a JSON line when it is ready, then one for every line on its standard input, which is the size of the
micro-batches to read: wall and processor seconds of all samples. Each sample is tokens, labels, loss mask and positions
as torch tensors; a micro-batch of 1 is not stacked.
"""

from __future__ import annotations

import json
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

SEED = 7
Batch = dict[str, torch.Tensor]


def ours(directory: str, length: int, fim_rate: float) -> tuple[Callable[[Sequence[int]], Batch], dict[str, Any]]:
    """Batches of the token stream."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from data.contract import IGNORE
    from data.stream.stream import open_stream

    started = time.perf_counter()
    stream = open_stream(directory, length, mtp_depth=0, seed=SEED, stage="benchmark", fim_rate=fim_rate, verify=False)

    def read(samples: Sequence[int]) -> Batch:
        batch = stream.read(samples)
        return {
            "tokens": torch.from_numpy(batch.tokens),
            "labels": torch.from_numpy(batch.labels),
            "loss_mask": torch.from_numpy((batch.labels != IGNORE).astype(np.float32)),
            "position_ids": torch.from_numpy(batch.positions),
        }

    return read, {"open_seconds": time.perf_counter() - started}


def megatron(prefix: str, length: int, pad: int) -> tuple[Callable[[Sequence[int]], Batch], dict[str, Any]]:
    """Batches of Megatron-Core's GPTDataset; before that, the files are read and written by its own classes and
    compared.
    """
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig  # type: ignore[import-not-found]
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder  # type: ignore[import-not-found]
    from megatron.core.datasets.utils import Split  # type: ignore[import-not-found]
    from torch.utils.data import default_collate

    class Tokenizer:
        """What GPTDataset asks of one."""

        vocab_size, eod, eos = 129_280, 1, 1

        def __init__(self) -> None:
            self.pad = pad
            self.special_tokens_dict: dict[str, int] = {}
            self.unique_identifiers = OrderedDict(kind="integers")

    indexed = IndexedDataset(prefix, multimodal=False, mmap=True)
    copy = f"{prefix}-copy"
    builder = IndexedDatasetBuilder(f"{copy}.bin", dtype=indexed.index.dtype)
    for number in range(len(indexed)):
        tokens = indexed[number]
        builder.add_document(torch.from_numpy(tokens.astype(np.int64)), [len(tokens)])
    builder.finalize(f"{copy}.idx")
    same = all(Path(f"{prefix}{end}").read_bytes() == Path(f"{copy}{end}").read_bytes() for end in (".bin", ".idx"))
    for end in (".bin", ".idx"):
        Path(f"{copy}{end}").unlink()
    started = time.perf_counter()
    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=length,
        blend=([prefix], None),
        split="1",
        path_to_cache=str(Path(prefix).parent / "cache"),
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    documents = np.arange(len(indexed), dtype=np.int32)
    dataset = GPTDataset(indexed, prefix, documents, None, Split.train, config)
    found = {"open_seconds": time.perf_counter() - started, "same_files": same, "samples": len(dataset)}

    def read(samples: Sequence[int]) -> Batch:
        if len(samples) == 1:
            sample: Batch = dataset[samples[0]]
            return sample
        batch: Batch = default_collate([dataset[sample] for sample in samples])
        return batch

    return read, found


def main() -> None:
    side, place, length, samples, setting = sys.argv[1:]
    torch.set_num_threads(1)
    read, found = (
        ours(place, int(length), float(setting)) if side == "ours" else megatron(place, int(length), int(setting))
    )
    names = ("tokens", "labels", "loss_mask", "position_ids")
    first = read([0])
    assert all(first[name].numel() == int(length) for name in names), {name: first[name].shape for name in names}
    for sample in range(int(samples)):
        read([sample])
    print(json.dumps(found), flush=True)
    for line in sys.stdin:
        size = int(line)
        wall, processor = time.perf_counter(), time.process_time()
        for start in range(0, int(samples) - size + 1, size):
            read(range(start, start + size))
        print(
            json.dumps({"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}), flush=True
        )


if __name__ == "__main__":
    main()
