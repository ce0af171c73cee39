"""Repairs of Triton's interpreter, without which kernels for FP8 and BF16 cannot be tested on a CPU.

Every repair names the Triton versions it is known to be needed for; `test_interpreter.py` shows each fault with the
repair taken away. The interpreter works on numpy arrays, where BF16 and FP8 are bit patterns in unsigned integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.runtime import autotuner

TORCH_DTYPES = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float64: torch.float64,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
CONTAINERS = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}
LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
BITS_ONLY = (tl.bfloat16, tl.float8e4nv, tl.float8e5)
_convert_float = interpreter._convert_float


def to_torch(data: np.ndarray, dtype: Any) -> torch.Tensor:
    """A tensor of the interpreter as torch's of the same type."""
    # The interpreter's arrays may be read-only or strided.
    t = torch.from_numpy(np.array(data, copy=True, order="C"))
    return (
        t if t.dtype == TORCH_DTYPES[dtype] else t.view(CONTAINERS[dtype.primitive_bitwidth]).view(TORCH_DTYPES[dtype])
    )


def from_torch(t: torch.Tensor, dtype: Any) -> np.ndarray:
    """The inverse of `to_torch`."""
    bits = t.contiguous().view(CONTAINERS[dtype.primitive_bitwidth]).numpy()
    return bits.view(interpreter._get_np_dtype(dtype))


def convert(data: Any, source: Any, target: Any, rounding: Any = None) -> Any:
    """Between float types as the GPU does: to nearest, ties to even, saturating in FP8 (`cvt.rn.satfinite`)."""
    source, target = source.scalar, target.scalar
    toward_zero = rounding is not None and rounding == interpreter._ir.ROUNDING_MODE.RTZ
    if source not in TORCH_DTYPES or target not in TORCH_DTYPES or toward_zero:
        return _convert_float(data, source, target, rounding)
    values = to_torch(np.asarray(data), source)
    if target in LARGEST:
        wide = values.float()
        result = wide.clamp(-LARGEST[target], LARGEST[target]).to(TORCH_DTYPES[target])
        result = torch.where(wide.isnan(), torch.full((), 0x7F, dtype=torch.uint8), result.view(torch.uint8))
        result = result.view(TORCH_DTYPES[target])
    else:
        result = values.to(TORCH_DTYPES[target])
    return from_torch(result, target).reshape(np.shape(data))


def _wide(handle: Any) -> np.ndarray:
    dtype = handle.dtype.scalar
    return to_torch(handle.data, dtype).float().numpy() if dtype in BITS_ONLY else handle.data


def hopper_dot(a_MK: np.ndarray, b_KN: np.ndarray, c_MN: np.ndarray) -> np.ndarray:
    """c + a b as Hopper's FP8 tensor core is reported to add: per K of 32, products and accumulator are aligned to the
    largest of them and cut to 13 fraction bits (V3 section 3.3.2). A model of the report, not the hardware's bits."""
    total = c_MN.astype(np.float64)
    for first in range(0, a_MK.shape[1], 32):
        a, b = a_MK[:, first : first + 32].astype(np.float64), b_KN[first : first + 32].astype(np.float64)
        products = a[:, None, :] * b.T[None, :, :]
        largest = np.maximum(np.abs(products).max(-1), np.abs(total))
        exponent = np.floor(np.log2(largest, where=largest > 0, out=np.zeros_like(largest)))
        unit = np.exp2(exponent - 13)
        total = (np.trunc(products / unit[..., None]).sum(-1) + np.trunc(total / unit)) * unit
    return total.astype(np.float32)


def _dot(limited: bool) -> Callable[..., Any]:
    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        x, y = _wide(a), _wide(b)
        if limited and a.dtype.scalar in LARGEST:
            return interpreter.TensorHandle(hopper_dot(x, y, d.data), d.dtype.scalar)
        if x.dtype == np.float16:
            x, y = x.astype(np.float32), y.astype(np.float32)
        product = np.matmul(x, y, dtype=d.data.dtype) + d.data
        return interpreter.TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)

    return create_dot


def _binary(original: Callable[..., Any]) -> Callable[..., Any]:
    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        dtype = left.dtype.scalar
        if dtype not in BITS_ONLY or op in (np.bitwise_and, np.bitwise_or, np.bitwise_xor):
            return original(self, left, right, op)
        result = op(_wide(left), _wide(right))
        if result.dtype == np.bool_:
            return interpreter.TensorHandle(result, tl.int1)
        return interpreter.TensorHandle(convert(np.asarray(result, np.float32), tl.float32, dtype), dtype)

    return binary_op


def _cast(self: Any, source: Any, target_type: Any) -> Any:
    source_dtype, target = source.dtype.scalar, target_type.scalar
    if tl.bfloat16 in (source_dtype, target):
        if source_dtype.is_floating() and target.is_floating():
            return interpreter.TensorHandle(convert(source.data, source_dtype, target), target)
        if source_dtype == tl.bfloat16:
            return interpreter.TensorHandle(_wide(source).astype(interpreter._get_np_dtype(target_type)), target)
        return interpreter.TensorHandle(convert(source.data.astype(np.float32), tl.float32, target), target)
    return interpreter.TensorHandle(source.data.astype(interpreter._get_np_dtype(target_type)), target)


def _reduce(original: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses BF16: a GPU rounds every partial sum, in an order that no interpreter knows."""

    def apply_impl(self: Any, inputs: Any) -> Any:
        if len(inputs) == 1 and inputs[0].dtype.scalar == tl.bfloat16:
            raise TypeError("a reduction of a BF16 tensor: convert it to FP32 first")
        return original(self, inputs)

    return apply_impl


def _autotuned_run(self: Any, *args: Any, **named: Any) -> Any:
    """The first configuration that the pruner leaves, without timing."""
    self.nargs = dict(zip(self.arg_names, args, strict=False))
    configs = self.early_config_prune(self.configs, self.nargs, **named) if self.early_config_prune else self.configs
    self.best_config = configs[0]
    if configs[0].pre_hook is not None:
        configs[0].pre_hook({**self.nargs, **named, **configs[0].all_kwargs()})
    result = self.fn.run(*args, **{**named, **configs[0].all_kwargs()})
    self.nargs = None
    return result


def _autotuner_init(original: Callable[..., None]) -> Callable[..., None]:
    def init(self: Any, *args: Any, **named: Any) -> None:
        # Without a benchmark function it asks for a GPU driver when it is made.
        named["do_bench"] = named.get("do_bench") or (lambda *_, **__: 0.0)
        original(self, *args, **named)

    return init


def _patches(hopper_accumulator: bool) -> dict[str, list[tuple[Any, str, Any]]]:
    builder, reduce_ops, tuner = interpreter.InterpreterBuilder, interpreter.ReduceOps, autotuner.Autotuner
    return {
        "casts": [(interpreter, "_convert_float", convert), (builder, "cast_impl", _cast)],
        "dot": [(builder, "create_dot", _dot(hopper_accumulator))],
        "arithmetic": [(builder, "binary_op", _binary(builder.binary_op))],
        "reductions": [(reduce_ops, "apply_impl", _reduce(reduce_ops.apply_impl))],
        "autotune": [
            (tuner, "run", _autotuned_run),
            (tuner, "__init__", _autotuner_init(tuner.__init__)),
        ],
    }


# Triton versions each repair is needed for; `test_interpreter.py` tells when that is no longer so.
NEEDED_FOR = dict.fromkeys(("casts", "dot", "arithmetic", "reductions", "autotune"), ("3.8", "3.9"))


@contextmanager
def repaired(hopper_accumulator: bool = False, without: tuple[str, ...] = ()) -> Iterator[None]:
    """The interpreter with all repairs (but those named in `without`), and as it was afterwards.

    hopper_accumulator: FP8 products are added with the tensor core's few bits. ValueError: no repair of such a name.
    """
    if unknown := sorted(set(without) - set(NEEDED_FOR)):
        raise ValueError(f"no repair is called {unknown}; there are {sorted(NEEDED_FOR)}")
    chosen = [patch for name, group in _patches(hopper_accumulator).items() if name not in without for patch in group]
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in chosen]
    try:
        for owner, name, value in chosen:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)
