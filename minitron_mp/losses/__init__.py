"""The distillation loss: exact, vocabulary-parallel, and fused with both output layers.

distillation_loss (fused.py); Objective and the teacher's targets (objective.py); the table of
divergences (divergences.py), and the KL to a top-k teacher (top_k.py). Row functions: reference.py
is plain torch, and kernels.py is Triton. This room imports nothing of the others.
"""
