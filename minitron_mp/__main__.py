"""python -m minitron_mp, also under torchrun. Kept light: Megatron's checkpoint writer imports it again in a helper process."""

from __future__ import annotations

from minitron_mp.cli import main

if __name__ == "__main__":
    main()
