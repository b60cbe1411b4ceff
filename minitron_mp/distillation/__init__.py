"""The teacher: where it runs, and how its signals reach the loss.

ColocatedTeacher and RemoteTeacher (teacher), serve_signals (serve), Link, Sender and Receiver
(stream), HiddenStatesLoss (hidden_states).
"""
