"""Checks of the machine and network before a job, and the environment variables of a launch.

doctor           doctor: the command
checks           CheckResult, and the merge of the results of all ranks
machine          versions, GPUs, FP8
temporary_folder TMPDIR
network          links between ranks, clocks
file_system      the output folder
recipe_checks    model, text, tokenizer, disk space
environment      environment_lines: variables of the ranks
"""
