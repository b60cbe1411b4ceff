"""The distillation loss: exact, vocabulary-parallel, and fused with both output layers.

fused             distillation_loss: hidden states to loss and gradients, in tiles of tokens
objective         Objective, TeacherHidden, TeacherLogits, TeacherTopK: what is compared
divergences       DIVERGENCES: name -> statistics, value and gradient
parameters        parameters of the divergences; imports no torch
top_k             KL to a teacher of which only the top-k probabilities are known
rows              what the row functions take and return
torch_rows        row functions in plain torch
kernel_calls      row functions for CUDA, which start the kernels
kernels           the Triton kernels that read logits
row_kernels       the Triton kernels that read a few numbers per row
tensor_parallel   matrix products and their communication
tile_sizes        rows per tile; imports no torch

This room imports no other room, except the errors.
"""
