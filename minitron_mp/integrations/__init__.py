"""Integrations with other frameworks.

megatron_bridge   student, teacher and loss in Megatron-Bridge's pretrain()
lm_eval           tasks of lm-evaluation-harness on the sharded model
"""
