"""Cost before a run: memory, step time and the best layouts, on a laptop.

run_estimate (command), training_memory (memory), estimate_distillation (step_time), search_layouts (layouts).
"""
