"""Before and around a job: checks of machine and network, and the launch environment.

doctor (doctor), environment_lines (environment).
"""
