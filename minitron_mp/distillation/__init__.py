"""The teacher: its placements, and the transport of its signals to the loss.

teacher           the Teacher protocol, ColocatedTeacher, RemoteTeacher
last_stage_loss   the loss call of training, evaluation, ablation and Megatron-Bridge
teacher_head      the output layer of a remote teacher
serve             the forward passes of a remote teacher
stream            the protocol between teacher and students, and Sender
receiver          Receiver
stream_layout     messages between the ranks, as functions of the layouts
stream_end        early end of a stream
cache             signals on disk
hidden_states     losses on hidden states inside the models
layer_pairs       pairs of hidden states
state_capture     hooks that store hidden states of a frozen teacher
"""
