"""Quality and speed of models.

quality          compare, evaluate: loss, perplexity and KL to the teacher
choice_tasks     score_task: accuracy on choice tasks and last-word tasks
task_files       read_task_file
log_likelihood   score_rows, next_tokens: log-likelihoods, which the tasks use
prefill_speed    measure: tokens per second of forward passes
"""
