"""Importance, plan and slicing of a student. All files loop over the table of axes (models/axes.py).

importance      score: activation importance of a sharded model; probes: its hooks
cosine_kernel   a CUDA kernel for the score of layers
aggregation     formulas that turn activations into scores
scores          Scores: the importance of every unit
ranking         which units are kept
depth           which layers are kept; ablation: the loss without some layers
target          resolve_target: the student's sizes
plan            PrunePlan: what a student keeps; make_plan: from scores and a target
slicing         prune: the student's weights
masks           masked: the teacher computes the outputs of the student
search_space    sizes of the candidates of a search; candidates: their measurements
"""
