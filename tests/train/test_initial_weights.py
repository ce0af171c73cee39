"""A run that starts from a Hugging Face folder: its first loss is the folder model's; another model and a damaged
folder are refused before anything is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data.stream.stream import open_stream
from model.huggingface import DTYPES, ReleasedFolder, export_model
from model.names import canonical_tensors, load_canonical
from model.released_family import differing_fields
from model.rope import Rotary
from model.transformer import Transformer, cross_entropy_sum
from tests.data.synthetic import VOCABULARY
from tests.model.models import model_config, random_model
from tests.train.ranks import Nursery, arguments, losses, make_corpus, nursery, stage
from train.export import main as export_main
from train.reading import CheckpointReader, read_config, stage_ends

LENGTH, SEQUENCES = 32, 4
STAGES = [stage("only", LENGTH, 100, f"[{{until:9000,value:{SEQUENCES}}}]")]
RUN = ["parallel.pipeline=2", "parallel.timeout_seconds=60", "precision.compute=float64"]


@pytest.fixture(scope="module")
def nurse() -> Iterator[Nursery]:
    with nursery() as started:
        yield started


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture(scope="module", params=["fp8", "float32"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = model_config("tiny", vocab_size=VOCABULARY)
    folder = tmp_path_factory.mktemp("folder") / request.param
    tensors = canonical_tensors(random_model(config, torch.float32, seed=5))
    export_model(folder, config, tensors.__getitem__, length=128, dtype=DTYPES[request.param])
    return folder


def folder_loss(folder: Path, corpus: Path, seed: int) -> float:
    """Of the run's first step, by the plain model on one process."""
    released = ReleasedFolder(folder)
    model = Transformer(released.config, torch.float64)
    load_canonical(model, released.read)
    stream = open_stream(
        corpus, LENGTH, mtp_depth=1, seed=seed, stage="only", weights=None, start_blocks={}, verify=False
    )
    batch = stream.read(list(range(SEQUENCES)))
    rotary = Rotary(released.config, LENGTH)
    with torch.no_grad():
        logits_BTV = model(
            torch.from_numpy(batch.tokens), rotary=rotary, real_BT=torch.from_numpy(batch.real)
        ).logits_BTV
        total = cross_entropy_sum(logits_BTV, torch.from_numpy(batch.labels))
    return float(total) / stream.counts(0, SEQUENCES).main


def test_the_first_loss_is_the_folder_models(nurse: Nursery, folder: Path, corpus: Path, tmp_path: Path) -> None:
    given = arguments(tmp_path, corpus, "run", STAGES, *RUN, f"initial_weights={folder}")
    started = nurse.start(given, tmp_path / "logs", ranks=2)
    assert started.wait() == [0, 0], started.error(0)
    run = tmp_path / "run"
    config = read_config(run)
    assert config.initial_weights == str(folder)
    (_, first), *_ = losses(run)
    assert abs(float.fromhex(first) - folder_loss(folder, corpus, config.seed)) < 1e-10
    # The checkpoint before the first step holds the folder's numbers, biases too.
    initial = next(end for end in stage_ends(run, config) if end.name == "initial")
    saved, released = CheckpointReader(initial.path, config), ReleasedFolder(folder)
    for name in released.names:
        assert torch.equal(saved(name).double(), released.read(name).double()), name

    assert export_main([str(run), "--stage", "initial", "--dtype", "fp8"]) == 0
    exported = ReleasedFolder(run / "export")
    assert "F8_E4M3" in exported.dtypes and differing_fields(exported.config, config.model) == []


def test_another_model_is_refused_in_one_line(nurse: Nursery, folder: Path, corpus: Path, tmp_path: Path) -> None:
    more = ["model.hidden_size=64", "model.routed_scaling_factor=1.0", f"initial_weights={folder}"]
    started = nurse.start(arguments(tmp_path, corpus, "run", STAGES, *RUN, *more), tmp_path / "logs", ranks=2)
    assert started.wait() == [66, 66]
    (line,) = started.error(0).splitlines()
    assert line == (
        f"bireme: initial_weights: {folder} is of another model: model.hidden_size is 32 in the folder and 64 here, "
        "model.routed_scaling_factor is 2.5 in the folder and 1.0 here"
    )
    assert not (tmp_path / "run" / "stages").exists()


def test_a_damaged_folder_and_yarn_of_other_numbers(nurse: Nursery, corpus: Path, tmp_path: Path) -> None:
    config = model_config("tiny", vocab_size=VOCABULARY)
    tensors = canonical_tensors(random_model(config, torch.float32))
    export_model(tmp_path / "yarn", config, tensors.__getitem__, length=1024)
    more = ["model.rope_scaling.factor=8", f"initial_weights={tmp_path / 'yarn'}"]
    started = nurse.start(arguments(tmp_path, corpus, "run", STAGES, *RUN, *more), tmp_path / "logs", ranks=2)
    assert started.wait() == [66, 66]
    assert "model.rope_scaling.factor is 40.0 in the folder and 8.0 here" in started.error(0)

    (file,) = (tmp_path / "yarn").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    (tmp_path / "yarn" / "config.json").write_text(
        json.dumps(json.loads((tmp_path / "yarn" / "config.json").read_text()) | {"hidden_act": "gelu"})
    )
    again = [f"initial_weights={tmp_path / 'yarn'}"]
    started = nurse.start(arguments(tmp_path, corpus, "run", STAGES, *RUN, *again), tmp_path / "again", ranks=2)
    assert started.wait() == [66, 66]
    (line,) = started.error(0).splitlines()
    assert "hidden_act is 'gelu'" in line and "truncated" in line
