"""Tasks of EleutherAI's lm-evaluation-harness on the sharded model of a recipe.

run_harness (command), ShardedLM (sharded_lm).
"""
