"""Other frameworks: Megatron-Bridge and lm-evaluation-harness."""
