"""Kernels for CPUs: a C library (package resq_kernels) and what it takes to use it from Python.

library             finds, loads and calls it
formats             how codes of weights, activations and cache lie in memory
kernels, attention  torch tensors in and out
target, backend     the provider of the fused operators, and backend="cpu"

What the kernels compute and how operands are laid out is written in kernels/src/resq_kernels.h.
"""
