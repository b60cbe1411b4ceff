"""How good and how fast a model is.

quality          compare, evaluate: loss, perplexity and KL to the teacher
choice_tasks     score_task: accuracy on choice tasks and last-word tasks
task_files       read_task_file
log_likelihood   score_rows, next_tokens: what the tasks are made of
prefill_speed    measure: tokens per second of forward passes
"""
