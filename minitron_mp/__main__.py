"""python -m minitron_mp, also under torchrun. Kept light: checkpoint writers import it again."""

from __future__ import annotations

from minitron_mp.cli import main

if __name__ == "__main__":
    main()
