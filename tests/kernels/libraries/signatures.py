"""Signatures of libraries that are not installed, and functions that refuse what such a signature refuses."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Callable
from typing import Any

from tests.kernels.libraries.te_signatures import STORED

TE = json.loads(STORED.read_text(encoding="utf-8"))


def signature(arguments: str) -> inspect.Signature:
    """From "a, b=None, *, c": parameters as Python writes them; a default stands for itself as text."""
    function = ast.parse(f"def function({arguments}): ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    found, kinds = function.args, inspect.Parameter
    plain = [*found.posonlyargs, *found.args]
    defaults = [None] * (len(plain) - len(found.defaults)) + list(found.defaults)
    rows = [(a.arg, kinds.POSITIONAL_OR_KEYWORD, default) for a, default in zip(plain, defaults, strict=True)]
    rows += [(found.vararg.arg, kinds.VAR_POSITIONAL, None)] if found.vararg else []
    rows += [(a.arg, kinds.KEYWORD_ONLY, d) for a, d in zip(found.kwonlyargs, found.kw_defaults, strict=True)]
    rows += [(found.kwarg.arg, kinds.VAR_KEYWORD, None)] if found.kwarg else []
    return inspect.Signature(
        [kinds(name, kind, default=ast.unparse(default) if default else kinds.empty) for name, kind, default in rows]
    )


class Recorder:
    """Calls made, by name; `wrap` binds each call to the signature first, so that a wrong one is a TypeError."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def wrap(self, name: str, bound_to: inspect.Signature, function: Callable[[dict[str, Any]], Any]) -> Any:
        """A function that takes what `bound_to` takes and hands it to `function` by name, without the defaults."""

        def call(*args: Any, **kwargs: Any) -> Any:
            arguments = dict(bound_to.bind(*args, **kwargs).arguments)
            self.calls.append((name, arguments))
            return function(arguments)

        return call

    def named(self, name: str) -> list[dict[str, Any]]:
        return [arguments for called, arguments in self.calls if called.split(".")[-1] == name]


# DeepGEMM's functions that are used, by `deep_gemm.__version__`, from the bindings in its csrc/apis/gemm.hpp. The
# arguments with the groups' sizes changed their names.
_DENSE = "a, b, d, c=None, recipe=None, recipe_a=None, recipe_b=None, compiled_dims='nk', disable_ue8m0_cast=False"
_GROUPED = (
    "a, b, d, grouped_layout, recipe=None, recipe_a=None, recipe_b=None, compiled_dims='nk', disable_ue8m0_cast=False, "
    "use_psum_layout=False"
)
DEEP_GEMM = {
    "2.3.0": {
        "fp8_gemm_nt": signature(_DENSE),
        "m_grouped_fp8_gemm_nt_contiguous": signature(f"{_GROUPED}, expected_m_for_psum_layout=None"),
        "k_grouped_fp8_gemm_nt_contiguous": signature(
            "a, b, d, ks, ks_tensor, c=None, recipe=(1, 1, 128), compiled_dims='mn'"
        ),
    },
    "2.8.0": {
        "fp8_gemm_nt": signature(f"{_DENSE}, alpha=None"),
        "m_grouped_fp8_gemm_nt_contiguous": signature(
            f"{_GROUPED}, ensure_zero_padding=True, expected_m_for_psum_layout=None"
        ),
        "k_grouped_fp8_gemm_nt_contiguous": signature(
            "a, b, d, ks_cpu, grouped_layout, c=None, recipe=(1, 1, 128), compiled_dims='mn', use_psum_layout=False"
        ),
    },
}
