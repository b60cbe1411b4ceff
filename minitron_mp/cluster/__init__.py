"""Before and around a job: checks of machine and network, and the launch environment.

doctor           doctor: the command
checks           CheckResult, and the results of many ranks as one table
machine          versions, GPUs, FP8
network          links between ranks, clocks
file_system      the output folder
recipe_checks    model, text, tokenizer, disk space
environment      environment_lines: variables of the ranks
"""
