"""How good a model is: loss, perplexity, KL to the teacher, choice tasks, prefill speed.

compare (quality), score_rows (log_likelihood), score_task (choice_tasks), measure (prefill_speed).
"""
