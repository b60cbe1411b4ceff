"""The teacher: where it runs, and how its signals reach the loss.

teacher.py: the Teacher protocol, ColocatedTeacher and RemoteTeacher. last_stage_loss.py: the loss
call that training, evaluation, ablation and Megatron-Bridge share. teacher_head.py: the
output layer of a remote teacher. serve.py, stream.py, receiver.py, stream_end.py: a teacher on
other ranks; stream_layout.py is their pure part. cache.py: signals on disk. hidden_states.py,
layer_pairs.py, state_capture.py: losses inside the models.
"""
