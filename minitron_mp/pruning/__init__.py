"""What to cut, and cutting it. All files loop over the table of axes (models/axes.py).

importance      score: activation importance of a sharded model; cosine_kernel: its kernel
aggregation     how activations become scores
scores          Scores: the importance of every unit
ranking         which units are kept
depth           which layers are kept; ablation: the loss without some layers
target          resolve_target: the student's sizes
plan            PrunePlan, make_plan
slicing         prune: the student's weights
masks           masked: the teacher computes what the student would
search_space    candidates of a search; candidates: what is measured of them
"""
