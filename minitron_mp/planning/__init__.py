"""Cost estimates on a laptop: memory, step time and the best layouts of a recipe.

case              PlanningCase: student, teacher, recipe and number of ranks
command           run_estimate: the command `estimate`
dry_run           dry_run_rows: layout and memory in a dry run
memory            training_memory; activations: memory of a layer; stages: layers per stage
step_time         estimate_distillation; model_pass: one microbatch; times: parts of a model
hardware          GPU data
layouts           search_layouts
rounds            estimate_rounds
tables            estimates as tables, sentences and JSON
"""
