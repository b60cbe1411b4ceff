"""Ranks: the world, process groups, roles, collectives, and how a job starts and stops.

join_world (world), join_roles (roles), RoleChannel (role_channel), on_rank_0 and raise_on_all_ranks (sync),
run_schedule (schedule), Preemption (preemption). Only world.py and cpu_backend.py use parallel_state, only launcher.py
reads the environment.
"""
