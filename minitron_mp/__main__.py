"""Entry point of `python -m minitron_mp`, also under torchrun.

It imports little at the top, because the processes that write checkpoints import it again.
"""

from __future__ import annotations

from minitron_mp.cli import main

if __name__ == "__main__":
    main()
