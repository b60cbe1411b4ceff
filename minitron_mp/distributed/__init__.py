"""Ranks: process groups, roles, collectives, and the start and stop of a job.

world           World, join_world: layout and process groups of a rank
process_groups  start and end of process groups; host_group for tensors in host memory
roles           join_roles: several worlds in one job
role_channel    RoleChannel: communication between the ranks of all roles
job             identity of this process; require_launcher
launcher        values that torchrun and Slurm set in the environment
schedule        run_schedule: run microbatches through the pipeline
batch           Batch: the type of a microbatch
sync            on_rank_0, raise_on_all_ranks
preemption      Preemption: stop early near a deadline, for a stop file, after SIGTERM
collectives     collectives that Megatron-Core does not have
layout          the layers of each pipeline stage
cpu_backend     Megatron-Core on the CPU

Only world.py and cpu_backend.py use parallel_state. Only
launcher.py and job.py read the environment.
"""
