"""Cost estimates on a laptop: memory, step time and the best layouts of a recipe.

run_estimate (command), dry_run_rows (dry_run), training_memory (memory), estimate_distillation
(step_time), search_layouts (layouts). PlanningCase (case) is their input.
"""
