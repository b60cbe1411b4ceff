"""What test_output_folder.py runs on a rank of a pool."""

from __future__ import annotations

import os

from project_workers import Done, minitron


def minitron_in(*, folder: str, arguments: list[str]) -> Done:
    """Run the command line in a working folder."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        return minitron(arguments=arguments)
    finally:
        os.chdir(before)
