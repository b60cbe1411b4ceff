"""The distillation loss: exact, vocabulary-parallel and fused with both output layers.

distillation_loss (fused), Objective, the teacher targets; reference.py is plain torch, kernels.py is Triton.
"""
