"""Cost estimates on a laptop: memory, step time and the best layouts of a recipe.

case              PlanningCase: student, teacher, recipe and number of ranks
command           run_estimate: the command `estimate`; advice: warnings and settings
dry_run           dry_run_rows: layout and memory in a dry run
memory            training_memory; activations: memory of a layer; stages: layers per stage
step_time         estimate_distillation; model_pass: one microbatch; times: parts of a model
estimate          Estimate: seconds, memory and GPU-hours of one layout
published         published rates, and the correction towards them
hardware          GPU data
search            search_layouts; variants: what it tries; layouts: which layouts are possible
campaign          campaign: GPU-hours of the whole run
rounds            estimate_rounds
tables            estimates as tables, sentences and JSON
"""
