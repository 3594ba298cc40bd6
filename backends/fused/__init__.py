"""A quantized graph as fused operators `torch.ops.resq.*`, for kernels of any machine.

    quantized graph ── lower(gm, target) ──▶ graph of resq operators ──▶ the target's kernels, or the torch form of each operator

formats    what codes, weights and cache rows are, and what a target says about the bytes that hold them
target     everything the lowering knows about a set of kernels;  targets: those there are, by name
operators  schemas, shapes and types of torch.ops.resq.*;  torch_kernels: what each computes, in PyTorch
patterns, lowering_*, lower    from the quantized graph to operators
source     the quantized graph back from a lowered one;  cache, runner: how a lowered graph is run
"""
