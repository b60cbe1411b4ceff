"""What to cut, and cutting it.

score (importance), Scores (scores), make_plan and PrunePlan (plan), resolve_target (target),
prune (slicing), masked (masks), losses_without (ablation), survey_candidates (search_space).
All of them loop over the table of axes (models/axes.py).
"""
