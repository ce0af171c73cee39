"""Packing plans: how many sequences each block gives at one sequence length. A few integers per block, built once,
read at every start.
"""

from __future__ import annotations

import json
from dataclasses import asdict

from data.contract import Plan
from data.errors import DataError
from data.store.blocks import BlockStore
from data.stream.packing import packed_count


def plan_file(length: int) -> str:
    """Name of the plan for sequences of `length` tokens, beside the manifest."""
    return f"plan-{length:07d}.json"


def build_plan(store: BlockStore, length: int) -> Plan:
    """Plan from the block indexes alone."""
    sequences = {
        source.name: tuple(packed_count(store.offsets(block), length) for block in source.blocks)
        for source in store.manifest.sources
    }
    return Plan(store.manifest.digest, length, sequences)


def plan_json(plan: Plan) -> bytes:
    """Content of the plan file."""
    return (json.dumps(asdict(plan), ensure_ascii=False) + "\n").encode()


def load_plan(store: BlockStore, length: int) -> Plan:
    """The plan written beside the manifest, or one built now if none was. Error: DataError for one of another manifest
    or a damaged one.
    """
    path = store.directory / plan_file(length)
    if not path.is_file():
        return build_plan(store, length)
    try:
        content = json.loads(path.read_bytes())
        counts = {name: tuple(int(n) for n in blocks) for name, blocks in content["sequences"].items()}
        plan = Plan(content["manifest_digest"], content["length"], counts)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: damaged plan: {error}") from None
    if plan.manifest_digest != store.manifest.digest:
        raise DataError(f"{path}: made for manifest {plan.manifest_digest}, this one is {store.manifest.digest}")
    shape = {source.name: len(source.blocks) for source in store.manifest.sources}
    if plan.length != length or {name: len(blocks) for name, blocks in plan.sequences.items()} != shape:
        raise DataError(f"{path}: plan for length {plan.length} does not fit the manifest's blocks")
    return plan
