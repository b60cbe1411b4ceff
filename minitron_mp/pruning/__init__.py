"""What to cut, and cutting it.

score (importance), Scores (scores), make_plan and PrunePlan (plan), resolve_target (target), prune (slicing),
masked (masks), depth ablation (ablation), search candidates (candidates).
"""
