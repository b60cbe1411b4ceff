"""The distillation loss: exact, vocabulary-parallel, and fused with both output layers.

fused            distillation_loss
objective        Objective, and the teacher's targets
divergences      the table of divergences
top_k            the KL to a top-k teacher
rows             types of the arguments and results of the row functions
reference        the row functions in plain torch
kernels          the row functions in Triton
tensor_parallel  matrix products and communication
tile_sizes       tile sizes per device

This package imports no other package of minitron_mp.
"""
