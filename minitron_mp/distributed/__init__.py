"""Ranks: process groups, roles, collectives, and how a job starts and stops.

world           World, join_world: layout and process groups of a rank
roles           join_roles: several worlds in one job; role_channel joins their ranks
launcher        what torchrun and Slurm put into the environment
schedule        run_schedule: microbatches through the pipeline; batch has their type
sync            on_rank_0, raise_on_all_ranks
preemption      Preemption: stop early near a deadline, for a stop file, after SIGTERM
collectives     collectives that Megatron-Core does not have
layout          which layers lie on which stage
cpu_backend     Megatron-Core on the CPU

Only world.py and cpu_backend.py use parallel_state. Only launcher.py reads the environment.
"""
