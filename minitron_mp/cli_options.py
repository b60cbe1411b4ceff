"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeFile = Annotated[
    Path, typer.Argument(help="YAML recipe, for example examples/quickstart.yaml", show_default=False)
]

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="dotted overrides: distill.steps=50 parallel.tp=2", show_default=False),
]

DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="print the resolved recipe, layout, parameters per rank and memory; run nothing"
    ),
]

World = Annotated[
    int | None,
    typer.Option("--world", min=1, help="ranks to plan for in a dry run; default: one copy of the model"),
]

Round = Annotated[
    str,
    typer.Option(
        "--round",
        metavar="NAME",
        help="round of the recipe (docs/rounds.md); default: first",
        show_default=False,
    ),
]

Force = Annotated[bool, typer.Option("--force", help="run the stage even if its artifact is up to date")]

Accept = Annotated[
    str,
    typer.Option(
        "--accept",
        metavar="NAME[,NAME]",
        help="settings that may change when training resumes, for example lr,clip_grad",
        show_default=False,
    ),
]

FromStep = Annotated[
    int | None,
    typer.Option(
        "--from-step", min=0, help="resume from this older checkpoint; later ones are moved, not deleted"
    ),
]

Step = Annotated[
    str,
    typer.Option(
        "--step", help="saved step of distill, or best: the one with the lowest held-out loss", metavar="N"
    ),
]

ShardOption = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="I/N",
        help="make only this share of the shards, for job arrays: 1/16 to 16/16; without it the command "
        "makes missing shards and puts all together",
    ),
]
