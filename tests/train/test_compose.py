"""From YAML and `key=value` to a checked configuration: every shipped file, every fault in one line, the digest."""

from __future__ import annotations

import functools
import json

import pytest
from omegaconf import OmegaConf

from parallel.optimizer.config import GroupConfig, GroupsConfig
from train.compose import CONF, compose_run, config_digest, config_json, config_yaml, problems_of
from train.config import RunConfig, StepValue
from train.errors import ConfigError

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))


@functools.cache
def experiment(name: str) -> RunConfig:
    return compose_run([f"experiment={name}"])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes(name: str) -> None:
    config = experiment(name)
    assert config.name == name
    assert config.stages
    chosen = OmegaConf.load(CONF / "model" / f"{config.model.name}.yaml")
    assert OmegaConf.to_container(chosen) == json.loads(config_json(config))["model"]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_composes_and_wins_over_the_experiments(name: str) -> None:
    config = compose_run(["experiment=demo", f"model={name}", "precision.fp8=false", "parallel.expert=1"])
    assert config.model.name == name
    assert (
        OmegaConf.to_container(OmegaConf.load(CONF / "model" / f"{name}.yaml"))
        == json.loads(config_json(config))["model"]
    )


def test_values_given_win() -> None:
    config = compose_run(["experiment=demo", "seed=7", "stages.1.micro_batch=2", "model.num_layers=6"])
    assert (config.seed, config.stages[1].micro_batch, config.model.num_layers) == (7, 2, 6)
    assert config.stages[0].micro_batch == experiment("demo").stages[0].micro_batch


def fault(*overrides: str) -> str:
    with pytest.raises(ConfigError) as failure:
        compose_run(overrides)
    message = str(failure.value)
    assert "\n" not in message and message
    assert failure.value.exit_code == 64
    return message


def test_all_problems_in_one_line() -> None:
    message = fault(
        "experiment=demo",
        "parallel.order=sideways",
        "parallel.expert=3",
        "precision.compute=float16",
        "logging.wandb=sometimes",
        "resume=perhaps",
        "stages.0.length=0",
        "stages.1.learning_rate.0.shape=square",
    )
    wanted = [
        "parallel.order: found 'sideways', allowed default, published",
        "parallel.expert: found 3, allowed divisors of 8 experts",
        "precision.compute: found 'float16', allowed bfloat16, float32, float64",
        "precision.fp8: needs precision.compute bfloat16, found float16",
        "logging.wandb: found 'sometimes'",
        "resume: found 'perhaps'",
        "stages.0.length: found 0, allowed 1 or more",
        "stages.1.learning_rate: shape found 'square', allowed constant, linear, cosine",
    ]
    for line in wanted:
        assert line in message
    assert message.count("; ") >= len(wanted) - 1


@pytest.mark.parametrize(
    "key,value,wanted",
    [
        ("parallel.pipeline", 0, "parallel.pipeline: found 0, allowed 1 or more"),
        ("parallel.stages_per_rank", -1, "parallel.stages_per_rank: found -1, allowed 0 or more"),
        ("parallel.layout", "Et*3|mL", "parallel.layout 'Et*3|mL': found 3 transformer layers (t), allowed 4"),
        ("parallel.layout", "Et*4mL", "parallel.layout 'Et*4mL': found 1 stages, allowed 2"),
        ("parallel.layout", "Ettt|t|mL", "parallel.layout 'Et*3|t|mL': found 3 stages, allowed 2"),
        ("parallel.layout", "Ett|ttL", "parallel.layout 'Ett|ttL': found 0 MTP depths (m), allowed 1"),
        ("parallel.layout", "Ett|tt", "position 7: found the last stage ends without L"),
        ("parallel.schedule", "zigzag", "zigzag"),
        ("stages.0.sequences", [StepValue(10, 20)], "stages.0.sequences: found 20"),  # not 2 replicas of 8
        ("stages.0.sequences", [StepValue(10, 48)], "stages.0.sequences: 48 gives 3 micro-batches"),
        ("stages.0.sequences", [], "stages.0.sequences: empty"),
        (
            "stages.0.mtp_weight",
            [StepValue(9, 1), StepValue(9, 2)],
            "stages.0.mtp_weight: `until` must grow, found [9, 9]",
        ),
        ("stages.0.learning_rate.0.start", -1, "stages.0.learning_rate: found -1.0"),
        ("stages.0.balance.expert", -0.1, "stages.0.balance.expert: found -0.1, allowed 0 or more"),
        ("stages.1.name", "pretrain", "stages: names must differ"),
        ("stages", [], "stages: none given"),
        ("model.experts_per_token", 9, "model.experts_per_token: found 9"),
        ("model.num_expert_groups", 3, "model.num_expert_groups: found 3"),
        (
            "optimizer.groups.router.learning_rate_factor",
            -0.5,
            "optimizer.groups.router.learning_rate_factor: found -0.5, allowed 0 or more",
        ),
        (
            "optimizer.groups.norms.weight_decay_factor",
            float("nan"),
            "optimizer.groups.norms.weight_decay_factor: found nan, allowed 0 or more",
        ),
    ],
)
def test_each_fault_is_named(key: str, value: object, wanted: str) -> None:
    config = OmegaConf.structured(experiment("demo"))
    config.stages[0].micro_batch = 8
    OmegaConf.update(config, key, value, merge=False)
    problems = problems_of(OmegaConf.to_object(config))
    assert any(wanted in problem for problem in problems)


def test_the_shipped_run_has_no_problem() -> None:
    assert problems_of(experiment("demo")) == []


def test_optimizer_groups() -> None:
    """Given in YAML's dots, one by one; the head's are refused where it is the embedding."""
    config = compose_run(["experiment=demo", "optimizer.groups.router.learning_rate_factor=0.5"])
    assert config.optimizer.groups == GroupsConfig(router=GroupConfig(0.5, 1.0))
    assert experiment("demo").optimizer.groups == GroupsConfig()
    assert json.loads(config_json(config))["optimizer"]["groups"]["norms"]["weight_decay_factor"] == 0.0
    tied = ["experiment=demo", "model.tie_embeddings=true"]
    message = fault(*tied, "optimizer.groups.head.weight_decay_factor=0")
    assert message == "optimizer.groups.head: with model.tie_embeddings the head is in optimizer.groups.embedding"
    assert compose_run([*tied, "optimizer.groups.embedding.weight_decay_factor=0"])


def test_no_experiment_has_no_stages() -> None:
    assert "stages: none given; choose an experiment" in fault()


@pytest.mark.parametrize(
    "override,key,meant",
    [
        ("parallel.pipelin=2", "parallel.pipelin", "parallel.pipeline"),
        ("+parallel.pipelin=2", "parallel.pipelin", "parallel.pipeline"),
        ("sede=1", "sede", "seed"),
        ("+sede=1", "sede", "seed"),
        ("model.num_layer=2", "model.num_layer", "model.num_layers"),
        ("stages.0.lenght=4", "lenght", "length"),
        ("experiment=dmeo", "dmeo", "demo"),
        ("optimizer.groups.routers.weight_decay_factor=0", "optimizer.groups.routers", "optimizer.groups.router"),
        ("optimizer.groups.experts.decay=0", "optimizer.groups.experts.decay", "weight_decay_factor"),
    ],
)
def test_misspelt_keys(override: str, key: str, meant: str) -> None:
    message = fault("experiment=demo", override) if "dmeo" not in override else fault(override)
    assert key in message and meant in message


@pytest.mark.parametrize("override", ["seed=many", "parallel.pipeline=two", "precision.fp8=perhaps", "seed"])
def test_values_of_the_wrong_kind(override: str) -> None:
    fault("experiment=demo", override)


# Digest ---------------------------------------------------------------------------------------------------------------


def test_the_digest_is_of_the_values_alone() -> None:
    base = compose_run(["experiment=demo", "seed=3", "parallel.timeout_seconds=60"])
    assert config_digest(base) == config_digest(
        compose_run(["parallel.timeout_seconds=60.0", "seed=3", "experiment=demo"])
    )
    assert json.loads(config_json(base))["seed"] == 3
    others = [compose_run(["experiment=demo", *overrides]) for overrides in (["seed=3"], ["stages.2.tokens=5"])]
    digests = [config_digest(config) for config in (base, experiment("demo"), *others)]
    assert len(set(digests)) == len(digests)
    assert all(len(digest) == 64 for digest in digests)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_saved_file_gives_the_same_digest(name: str) -> None:
    config = experiment(name)
    again = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.create(config_yaml(config))))
    assert again == config
    assert config_digest(again) == config_digest(config)
