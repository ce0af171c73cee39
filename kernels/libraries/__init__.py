"""Adapters of library back ends: each module has the functions of the torch module it stands for.

    op              transformer-engine 2.20.2   DeepGEMM 2.3 to 2.8   torch's scaled_mm (cuBLAS)
    quantize        te_quantize                 -                     -
    gemm            te_gemm                     deep_gemm             scaled_mm
    grouped         te_grouped                  deep_gemm_grouped     -

A library is imported when its function is called, never with this package. Every module says with `problem(device)`
why it cannot work there, None when it can, and with `check_shapes(...)` whether a layer's widths fit; both are for the
moment a model is built. Results and errors are those of the torch module. Operands that are not FP8 go to that module.

Tensor cores of Hopper want both FP8 operands along the summed dimension. So `dgrad` needs the transposed copy of a
weight (`Quantized.transposed`), and `wgrad` copies operands that are transposed views, which the torch quantisers make.
The copies of a product that starts from anything but whole tiles, and why:

    cuBLAS (te, scaled_mm)    rows and tokens to a multiple of 16, also each expert's rows and tokens
    DeepGEMM                  tokens of `wgrad`, and each expert's rows, to a multiple of 128
    grouped `wgrad`           each expert's tokens as a matrix of its own, in both libraries

With `into`, te and DeepGEMM add inside the product; scaled_mm writes the product, then adds it. Observers of such a
product get the sum.

What is left out:

- FusedAdam: an optimizer that owns its parameters and state. Ours updates slices it is given and keeps nothing.
- te's permutation: it sorts rows by a routing map that it turns into its own map. Ours takes rows by an index that
  dispatch already has.
- te's RMSNorm, and its SwiGLU, which has no router weight: their functions are in a compiled extension whose arguments
  no Python source states, so nothing checks a call without a GPU. RMSNorm's gradient of the gain is also rounded to the
  gain's dtype after the gain was rounded to that of the rows, where the op promises FP32.
- A grouped scaled_mm: torch's `scaled_grouped_mm` has no 128-wide blocks.
- E5M6, the FP8 cache of SwiGLU: no library has them.
"""
