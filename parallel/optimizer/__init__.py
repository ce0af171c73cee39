"""Gradient buckets, reduction and ZeRO-1 by row ranges of named tensors."""
