"""The rounds of a finished project: the artifacts of each, and the table that compares them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from minitron_mp.artifacts.manifest import require_artifact
from minitron_mp.config.recipe import Recipe
from minitron_mp.config.rounds import of_round, split_command
from minitron_mp.report.document import Section, Table
from minitron_mp.report.project import Paths
from minitron_mp.report.tables import Evaluation

HEADER = (
    "round",
    "pruned",
    "parameters",
    "steps",
    "samples per step",
    "tokens per sample",
    "held-out loss",
    "KL to teacher",
)

NOTE = (
    "Each round starts from the student of the round before. The losses of all students are measured on "
    "the same text, with the number of tokens per sample of the last round."
)


@dataclass(frozen=True, eq=False)
class Round:
    """A round: its recipe, and stage -> artifact."""

    recipe: Recipe
    paths: Paths

    def titled(self, section: Section) -> Section:
        """Return a section of this round, with the name of the round if there are several."""
        if not self.recipe.run.rounds:
            return section
        return replace(section, title=f"{section.title}, round {self.recipe.round_name}")


def rounds_up_to(recipe: Recipe, paths: Paths) -> list[Round]:
    """Return the rounds up to that of a recipe, in order. paths: of its graph."""
    rounds = []
    for earlier in recipe.earlier:
        own = {
            stage: path
            for (stage, name), path in ((split_command(each), path) for each, path in paths.items())
            if name == earlier.round_name
        }
        rounds.append(Round(earlier, own))
    return [*rounds, Round(recipe, paths)]


def rounds_section(rounds: Sequence[Round], evaluation: Evaluation) -> Section:
    """Build the section that compares the students of the rounds."""
    rows = []
    for each in rounds:
        recipe = each.recipe
        is_last = each is rounds[-1]
        quality = evaluation["distilled" if is_last else f"distilled ({recipe.round_name})"]
        arch = require_artifact(each.paths["distill"], of_round("distill", recipe.round_name)).arch
        assert arch is not None
        rows.append(
            (
                recipe.round_name,
                "yes" if recipe.prunes else "no",
                f"{arch.num_parameters():,}",
                f"{recipe.distill.steps:,}",
                f"{recipe.distill.global_batch_size:,}",
                f"{recipe.data.sequence_length:,}",
                f"{quality['loss']:.4f}",
                "" if quality["kl"] is None else f"{quality['kl']:.4f}",
            )
        )
    return Section("Rounds", [NOTE, Table(HEADER, rows)])
