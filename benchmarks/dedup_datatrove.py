"""datatrove's MinHash over one jsonl file, run by the Python of an environment that has datatrove (not by ours).

    ENVIRONMENT/bin/python benchmarks/dedup_datatrove.py FILE WORK ours|shipped

All four of its stages (signatures, buckets, clusters, filter) in this process, 14 bands of 8 rows of 5-grams. ours: the
tokens are `data.dedup.fold.tokens`, CJK characters and words of text folded once, instead of its own folding and word
tokenizer. shipped: its folding and its English tokenizer, spaCy's. The last line is one JSON object.
"""

from __future__ import annotations

import json
import re
import sys
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers.jsonl import JsonlWriter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.text import TextNormConfig

CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003134f"
TOKEN = re.compile(f"[{CJK}]|[^\\W_{CJK}]+")


class OurTokens:
    def word_tokenize(self, text: str) -> list[str]:
        return TOKEN.findall(unicodedata.normalize("NFKC", text).lower())


def main(arguments: Sequence[str]) -> int:
    source, work, tokens = Path(arguments[0]), arguments[1], arguments[2]
    untouched = TextNormConfig(**{field.name: False for field in fields(TextNormConfig)})
    config = MinhashConfig(
        n_grams=5,
        num_buckets=14,
        hashes_per_bucket=8,
        hash_config=HashConfig(precision=64, hash_fc="xxhash"),
        norm_config=untouched if tokens == "ours" else TextNormConfig(),
    )
    reader = JsonlReader(str(source.parent), glob_pattern=source.name)
    signature = MinhashDedupSignature(output_folder=f"{work}/signatures", config=config, language="eng")
    if tokens == "ours":
        signature.word_tokenizer = OurTokens()
    signature.get_shingles("one two three four five six seven")  # models are loaded before the clock starts
    stages = [
        ([reader, signature], 1),
        ([MinhashDedupBuckets(f"{work}/signatures", f"{work}/buckets", config=config)], 14),
        ([MinhashDedupCluster(f"{work}/buckets", f"{work}/remove", config=config)], 1),
        ([reader, MinhashDedupFilter(f"{work}/remove"), JsonlWriter(f"{work}/out", compression=None)], 1),
    ]
    started = time.process_time()
    for number, (pipeline, tasks) in enumerate(stages):
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=f"{work}/logs/{number}").run()
    seconds = time.process_time() - started
    with source.open("rb") as file:
        documents = sum(1 for _ in file)
    print(
        json.dumps(
            {"side": f"datatrove {tokens}", "documents": documents, "cpu_s": seconds, "peak_bytes": peak_bytes()}
        )
    )
    return 0


def peak_bytes() -> int:
    """Most memory this program held. Unlike `ru_maxrss`, which keeps what the parent held before exec."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
