"""Whether our kernels can run: a Hopper GPU, or Triton's interpreter on a CPU. Nothing of Triton is imported before."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version

import torch

from kernels.quantize import WIDTH_MULTIPLE

OLDEST = (3, 6)


def problem(device: torch.device) -> str | None:
    """Why these kernels cannot run on `device`, with the remedy; None when they can."""
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "triton is not installed; install it with: pip install 'triton>=3.6'"
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        return f"triton {found} is too old; install it with: pip install 'triton>=3.6'"
    if device.type == "cpu":
        if interpreted():
            return None
        return "a CPU runs Triton kernels in Triton's interpreter only (TRITON_INTERPRET=1). Choose the torch back end"
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device. Choose the torch back end"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; these kernels are made for "
            "9.0 (Hopper). Choose the torch back end"
        )
    return None


def interpreted() -> bool:
    """Whether kernels made in this process are run by Triton's interpreter."""
    return bool(importlib.import_module("triton").knobs.runtime.interpret)


def check_shapes(name: str, out_features: int, in_features: int) -> str | None:
    """What is wrong with the widths of a weight [out_features, in_features]; None when every product fits."""
    if out_features % WIDTH_MULTIPLE == 0 and in_features % WIDTH_MULTIPLE == 0:
        return None
    return (
        f"{name}: a weight of {out_features} x {in_features}; FP8 products need widths that are multiples of "
        f"{WIDTH_MULTIPLE}: choose such widths or leave this layer unquantised"
    )
