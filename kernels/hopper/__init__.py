"""Triton kernels for Hopper (sm_90a): one module per op, with the functions of the torch module that defines it."""
