"""The teacher: where it runs, and how its signals reach the loss.

teacher            Teacher (the protocol), ColocatedTeacher, RemoteTeacher
last_stage_loss    the loss call that training, evaluation, ablation and Megatron-Bridge share
teacher_head       the output layer of a remote teacher
serve              serve_signals: the teacher's side of a stream
stream, receiver   the two ends of a stream; stream_layout: who sends what to whom
stream_pairs       connect_pairs: connect the ranks of a stream before its first signal
stream_end         StreamEnd: how a stream ends early
cache              signals on disk
hidden_states      HiddenStatesLoss; layer_pairs and state_capture are its parts
"""
