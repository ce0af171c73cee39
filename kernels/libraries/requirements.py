"""Why a library cannot work here, found out when a model is built."""

from __future__ import annotations

import importlib

import torch

from kernels.quantize import WIDTH_MULTIPLE

# cuBLAS multiplies with 1x128 and 128x128 scales since CUDA 12.9.
BLOCKWISE_CUDA = (12, 9)


def check_shapes(name: str, out_features: int, in_features: int) -> str | None:
    """What is wrong with the widths of a layer's weight [out_features, in_features]; None when every product fits."""
    if out_features % WIDTH_MULTIPLE == 0 and in_features % WIDTH_MULTIPLE == 0 and min(out_features, in_features) > 0:
        return None
    return (
        f"{name}: a weight of {out_features} x {in_features}; FP8 products need widths that are multiples of "
        f"{WIDTH_MULTIPLE}: choose such widths or leave this layer unquantised"
    )


def hopper_problem(library: str, device: torch.device) -> str | None:
    """These products exist for compute capability 9.0 alone; Blackwell has other scales."""
    if device.type != "cuda":
        return f"{library} needs a CUDA device; the model is on {device}. Choose the torch back end"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return f"{library} needs CUDA; torch {torch.__version__} finds no CUDA device. Choose the torch back end"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return (
            f"{library}: {torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; FP8 with FP32 "
            "scales over 1x128 and 128x128 tiles needs 9.0 (Hopper). Choose the torch back end"
        )
    return None


def cuda_version_problem(library: str) -> str | None:
    """cuBLAS is too old for the blocks. Ask after `hopper_problem`."""
    found = torch.version.cuda or "0"
    if tuple(int(part) for part in found.split(".")[:2]) >= BLOCKWISE_CUDA:
        return None
    needed = ".".join(map(str, BLOCKWISE_CUDA))
    return f"{library} needs CUDA {needed} or newer for FP8 blocks; this torch is built for {found}"


def import_problem(module: str, remedy: str) -> str | None:
    """A library that is missing or cannot be loaded. Not every such error is an ImportError: transformer-engine raises
    RuntimeError where it finds no cuDNN."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and module.split(".")[0] == error.name.split(".")[0]:
            return f"{module.split('.')[0]} is not installed; install it with: {remedy}"
        return f"{module} cannot be loaded: {error}; install it with: {remedy}"
    except Exception as error:
        reason = str(error).strip().splitlines()
        return f"{module} cannot be loaded: {reason[0] if reason else type(error).__name__}; install it with: {remedy}"
    return None
