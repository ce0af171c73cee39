"""From raw documents to token blocks with a manifest: `python -m data build`.

Everything in the output follows from the configuration and the bytes of the sources; the same two give the same
manifest digest, whatever the number of workers, however the sources are split into files, and however often the build
was killed on its way. A finished build of the same two is reused.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from data.config import DataConfig, parse_weights, validate
from data.dedup.index import check_index, index_files
from data.dedup.minhash import MinHash
from data.dedup.settings import DedupSettings
from data.errors import DataError, UsageError
from data.hashing import file_sha256, json_sha256
from data.publish import locked, make_directory, published, refuse_foreign, write_file
from data.sources.files import list_files
from data.special_tokens import special_tokens
from data.stages.importing import take_inventory
from data.stages.local import LocalEngine
from data.stages.marker import sync
from data.stages.progress import Progress
from data.stages.runner import Runner, versions
from data.stages.sequence import STAGES, Corpus, report, report_json
from data.stages.storing import link
from data.store.manifest import FORMAT_VERSION, MANIFEST_FILE, load_manifest, verify_files
from data.stream.mixture import Mixture
from data.tokenizer import load_tokenizer

REPORT_FILE = "report.json"
MARK_FILE = "WORK"
PUBLISH = "publish"
STAGE_COMMANDS = (*STAGES, PUBLISH)


def build(config: DataConfig, console: Console) -> dict[str, Any]:
    """Build `config.out`, go on with it, or reuse it. Returns the report, which is also written there as report.json.

    Errors: UsageError for the configuration, DataError for the sources, CannotWriteError, BusyError, WorkerLostError.
    Nothing half-written is left in `out`; what is finished stays in the work directory.
    """
    return _run(config, console, list(STAGE_COMMANDS), ())


def run_stage(config: DataConfig, console: Console, stage: str) -> dict[str, Any]:
    """One stage of a build, the earlier ones being finished: UsageError if one is not. Returns the tasks that were to
    do and those that had been, or the report of a published build. Other errors: as `build`.
    """
    place = STAGE_COMMANDS.index(stage)
    return _run(config, console, list(STAGE_COMMANDS[: place + 1]), STAGE_COMMANDS[:place])


def _run(config: DataConfig, console: Console, stages: list[str], before: tuple[str, ...]) -> dict[str, Any]:
    validate(config)
    # Refuses weights whose mixture repeats too late before any work is done.
    Mixture(parse_weights({name: source.weight for name, source in config.sources.items()}, "source weights"))
    out = Path(config.out)
    _check_given(config)
    work = Path(config.work or f"{config.out}.work")
    if out.resolve() in (work.resolve(), *work.resolve().parents):
        raise UsageError(f"work: found {work}, which is out ({out}) or lies in it")
    refuse_foreign(out, MANIFEST_FILE)
    with locked(out):
        refuse_foreign(out, MANIFEST_FILE)
        refuse_foreign(work, MARK_FILE)
        make_directory(work)
        write_file(work / MARK_FILE, b"Unfinished work of `python -m data build`; goes when it is published.\n")
        with LocalEngine(config.engine.workers, work) as engine, Progress(console) as progress:
            engine_config = config.engine
            runner = Runner(work, engine, progress, engine_config.verify, engine_config.workers, frozenset(before))
            inventory = take_inventory(runner, config.sources)
            build_digest = _build_digest(config, runner, inventory.sha256)
            if (found := _finished(out, build_digest)) is not None:
                _clear(config, work)
                return {**found, "reused": True}
            corpus = Corpus(config, runner, inventory)
            for stage in stages:
                if stage != PUBLISH:
                    STAGES[stage](corpus)
            if stages[-1] != PUBLISH:
                return {"stage": stages[-1], "work": str(work), "tasks": runner.tasks(stages[-1])}
            content = report(corpus) | {"build_digest": build_digest}
            _publish(corpus, out, content)
        _clear(config, work)
    return {**content, "reused": False}


def _check_given(config: DataConfig) -> None:
    """What is only used hours later is looked at first: a tokenizer's folder, an earlier corpus's index."""
    if config.tokenizer.path:
        special_tokens(load_tokenizer(Path(config.tokenizer.path)), Path(config.tokenizer.path))
    if config.dedup.earlier:
        dedup = config.dedup
        minhash = MinHash(dedup.shingle, dedup.bands, dedup.rows, dedup.seed)
        check_index(Path(dedup.earlier), DedupSettings(minhash, dedup.threshold, dedup.scope))


def _build_digest(config: DataConfig, runner: Runner, inputs: dict[str, list[str]]) -> str:
    settings = asdict(config)
    for key in ("out", "raw", "work", "keep_work", "engine"):
        del settings[key]
    del settings["store"]["partition_documents"], settings["tokenizer"]["encoder"]
    for source in settings["sources"].values():
        del source["path"], source["paths"]
    benchmarks = [file for path in settings["decontaminate"].pop("paths") for file in list_files(path)]
    inputs = {**inputs, "decontaminate.paths": [runner.digest(file.path) for file in benchmarks]}
    if earlier := settings["dedup"].pop("earlier"):
        files = [Path(earlier) / name for name in index_files(config.dedup.bands)]
        inputs["dedup.earlier"] = [runner.digest(str(file)) for file in files]
    folder = Path(config.tokenizer.path) if config.tokenizer.path else None
    settings["tokenizer"]["path"] = (
        [file_sha256(file) for file in sorted(folder.glob("tokenizer*.json"))] if folder else []
    )
    return json_sha256({"settings": settings, "inputs": inputs, "versions": {**versions(), "store": FORMAT_VERSION}})


def _finished(out: Path, build_digest: str) -> dict[str, Any] | None:
    """The report of a whole, undamaged build of this digest in `out`; None if there is none."""
    try:
        found = json.loads((out / REPORT_FILE).read_bytes())
        if found["build_digest"] != build_digest:
            return None
        verify_files(out, load_manifest(out), digests=True)
        if any(file_sha256(out / name) != sha256 for name, sha256 in found["files"].items()):
            return None
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None
    return dict(found)


def _publish(corpus: Corpus, out: Path, content: dict[str, Any]) -> None:
    with published(out, MANIFEST_FILE) as directory:
        for file in sorted(path for path in corpus.store.rglob("*") if path.is_file()):
            link(file, directory / file.relative_to(corpus.store))
        for done in corpus.plans:
            for name in done.outputs:
                link(done.directory / name, directory / name)
        write_file(directory / REPORT_FILE, report_json(content))
        for place in (path for path in directory.rglob("*") if path.is_dir()):
            sync(place)


def _clear(config: DataConfig, work: Path) -> None:
    if not config.keep_work:
        for path in sorted(work.iterdir(), key=lambda path: path.name == MARK_FILE):
            # The mark goes last: what is left of a killed deletion is still known for work.
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        work.rmdir()
