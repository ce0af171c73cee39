"""transformer-engine's block-scaled tensors around our FP8 operands, without a copy of what already fits.

Its matrix product is cuBLAS's: codes as bytes, contiguous along the summed dimension; scales of 1x128 tiles as
[tiles, rows], those of 128x128 blocks as [blocks of rows, blocks of columns, padded to a multiple of 4]
(`Float8BlockQuantizer.get_scale_shape`). A "columnwise" tensor holds the transpose of the matrix that it stands for.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from kernels.libraries.layout import padded_block_scale, padded_codes, round_up, tile_major_scale
from kernels.libraries.requirements import cuda_version_problem, hopper_problem, import_problem
from kernels.quantize import Quantized

LIBRARY = "transformer-engine"
VERSION = "2.20.2"
REMEDY = f'pip install --no-build-isolation "transformer-engine[pytorch,core_cu13]=={VERSION}" (core_cu12 for CUDA 12)'
# cuBLAS needs rows in multiples of 8 and summed lengths in multiples of 16 bytes.
MULTIPLE = 16


def problem(device: torch.device) -> str | None:
    """Why transformer-engine cannot multiply our blocks on `device`; None when it can."""
    return (
        hopper_problem(LIBRARY, device)
        or import_problem("transformer_engine.pytorch", REMEDY)
        or _version_problem()
        or cuda_version_problem(LIBRARY)
        or _recipe_problem()
    )


def _version_problem() -> str | None:
    found = metadata.version(LIBRARY)
    if found.split("+")[0].split(".")[:2] == VERSION.split(".")[:2]:
        return None
    return f"{LIBRARY} {found} is installed; the calls here are checked against {VERSION}: {REMEDY}"


def _recipe_problem() -> str | None:
    from transformer_engine.pytorch.quantization import is_fp8_block_scaling_available

    available, reason = is_fp8_block_scaling_available(return_reason=True)
    return None if available else f"{LIBRARY} has no FP8 block scaling here: {reason}"


def row_tiles(q_RC: Quantized) -> Any:
    """1x128 tiles [R, C] as such a tensor [R rounded up to 16, C]; the rows added are zero."""
    rows = round_up(q_RC.rows, MULTIPLE)
    return _tensor(
        rowwise_data=_codes(padded_codes(q_RC.data, rows, q_RC.columns)),
        rowwise_scale_inv=tile_major_scale(q_RC.scale, rows),
    )


def column_tiles(q_CR: Quantized) -> Any:
    """1x128 tiles of a transpose [C, R tokens] as the tensor [R rounded up to 16, C]; the tokens added are zero."""
    tokens = round_up(q_CR.columns, MULTIPLE)
    return _tensor(
        columnwise_data=_codes(padded_codes(q_CR.data, q_CR.rows, tokens)),
        columnwise_scale_inv=tile_major_scale(q_CR.scale, q_CR.rows),
    )


def blocks(data_NK: Tensor, scale: Tensor) -> Any:
    """128x128 blocks of W [N, K]."""
    return _tensor(
        rowwise_data=_codes(data_NK.contiguous()), rowwise_scale_inv=padded_block_scale(scale), is_2D_scaled=True
    )


def transposed_blocks(data_KN: Tensor, scale: Tensor) -> Any:
    """W [N, K] by its transposed codes [K, N]; scale: that of W's blocks."""
    return _tensor(
        columnwise_data=_codes(data_KN), columnwise_scale_inv=padded_block_scale(scale.t()), is_2D_scaled=True
    )


def _codes(data: Tensor) -> Tensor:
    return data.view(torch.uint8)


def _tensor(
    *,
    rowwise_data: Tensor | None = None,
    rowwise_scale_inv: Tensor | None = None,
    columnwise_data: Tensor | None = None,
    columnwise_scale_inv: Tensor | None = None,
    is_2D_scaled: bool = False,
) -> Any:
    from transformer_engine.pytorch.constants import DType
    from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage

    return Float8BlockwiseQTensorStorage(
        rowwise_data=rowwise_data,
        rowwise_scale_inv=rowwise_scale_inv,
        columnwise_data=columnwise_data,
        columnwise_scale_inv=columnwise_scale_inv,
        fp8_dtype=DType.kFloat8E4M3,
        quantizer=None,
        is_2D_scaled=is_2D_scaled,
    )
