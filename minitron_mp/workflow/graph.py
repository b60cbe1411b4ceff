"""The stages of a recipe: the artifacts that each one needs, and whether it must run again.

A stage is done when its artifact exists and has the manifest that the recipe requires.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from minitron_mp import __version__
from minitron_mp.artifacts.manifest import (
    Change,
    Manifest,
    find_manifest,
    require_artifact,
    user_files_problem,
)
from minitron_mp.config.recipe import Recipe
from minitron_mp.config.rounds import FIRST, of_round
from minitron_mp.errors import InputError, refuse
from minitron_mp.workflow.earlier_rounds import Place, artifacts_of_earlier_rounds, shared_artifacts
from minitron_mp.workflow.output_folder import output_problems
from minitron_mp.workflow.preflight import recipe_problems, tracker_problems
from minitron_mp.workflow.saved_progress import saved_progress_problems
from minitron_mp.workflow.stage import Stage
from minitron_mp.workflow.stage_files import StageFiles
from minitron_mp.workflow.stages import STAGES


class StageGraph:
    """A recipe, its stages and their artifacts. It reads files, and needs neither a GPU nor torchrun.

    It has one round of a run. accept: settings that may differ from those of a checkpoint from which
    a stage resumes. previous: graph of the round before, if there is one already.
    """

    def __init__(self, recipe: Recipe, accept: Sequence[str] = (), previous: StageGraph | None = None):
        self.recipe, self.accept = recipe, tuple(accept)
        if previous is None and recipe.previous is not None:
            previous = StageGraph(recipe.previous, accept)
        self.earlier: list[StageGraph] = [*previous.earlier, previous] if previous else []
        self.stages: dict[str, Stage] = {stage.name: stage for stage in STAGES if stage.when(recipe)}
        self._elsewhere = shared_artifacts(self) | artifacts_of_earlier_rounds(self)
        self.own_stages = [name for name in self.stages if name not in self._elsewhere]
        self.paths: dict[str, Path] = {
            name: earlier.paths[stage] for name, (earlier, stage) in self._elsewhere.items()
        }
        self.paths |= {name: recipe.root / self.stages[name].artifact for name in self.own_stages}
        self.saved_step: int | None = None
        """The saved step of distill that replaces its final model, with --step."""
        self._manifests: dict[str, Manifest] = {}
        self._sources: dict[str, dict[str, str]] = {}
        self._missing: dict[str, list[str]] = {}

    def require_stage(self, name: str) -> None:
        """Raise InputError unless the recipe has the stage."""
        if name in self.stages:
            return
        requirements = {stage.name: stage.requirement for stage in STAGES}
        if name not in requirements:
            raise InputError(f"there is no stage {name}; the stages are {', '.join(requirements)}")
        if self.earlier:
            added = requirements[name] or "a section target or search"
            raise InputError(f"the round {self.recipe.round_name} has no stage {name}; add {added}")
        raise InputError(f"the recipe has no stage {name}; add {requirements[name]}")

    def rounds(self) -> Iterator[StageGraph]:
        """Yield all rounds of a run, of which this is the first. A further round yields only itself.

        The sizes of a round can depend on a search before it, so a round must be finished before the
        next one is taken, unless only its recipe is needed.
        """
        graph = self
        yield graph
        for recipe in self.recipe.all_rounds[1:]:
            graph = StageGraph(recipe, self.accept, graph)
            yield graph

    def place(self, name: str) -> Place:
        """Return the round that writes an artifact, and the name of its stage there."""
        return self._elsewhere.get(name, (self, name))

    @property
    def all_stages(self) -> dict[str, Stage]:
        """Return stage, or command of an earlier round -> stage, in the order of `paths`."""
        places = {name: self.place(name) for name in self.paths}
        return {name: earlier.stages[stage] for name, (earlier, stage) in places.items()}

    def stages_of_compress(self) -> list[str]:
        """Return the stages that `compress` runs in this round, in order."""
        return [name for name in self.own_stages if self.is_last_round or not self.stages[name].in_last_round]

    @property
    def is_last_round(self) -> bool:
        """Whether no round follows."""
        return self.recipe.round_name == [FIRST, *self.recipe.run.rounds][-1]

    def inputs(self, name: str) -> list[str]:
        """Return the stages whose artifacts a stage reads."""
        stage = self.stages[name]
        names = [source if isinstance(source, str) else source(self.recipe) for source in stage.inputs]
        names += [source for source in stage.optional_inputs if source in self.stages]
        if stage.reads_earlier_students:
            names += [of_round("distill", earlier.recipe.round_name) for earlier in self.earlier]
        return list(dict.fromkeys(names))

    def before(self, name: str) -> list[str]:
        """Return all stages that a stage depends on, in order."""
        needed = set(self.inputs(name))
        for stage in reversed(self.stages):
            if stage in needed:
                needed |= set(self.inputs(stage))
        return [artifact for artifact in self.paths if artifact in needed]

    def manifest(self, name: str) -> Manifest:
        """Return the manifest that the stage's artifact must have."""
        earlier, stage = self.place(name)
        if earlier is not self:
            return earlier.manifest(stage)
        if name not in self._manifests:
            fingerprints = {source: self.manifest(source).fingerprint for source in self.inputs(name)}
            self._manifests[name] = Manifest(
                stage=name,
                settings=self.stages[name].settings(self.recipe),
                inputs=fingerprints | self._fingerprints(name),
                sources={
                    key: files.absolute_paths
                    for key, files in self.stages[name].sources(self.recipe).items()
                    if files.paths
                },
                made_by=f"minitron_mp {__version__}",
            )
        return self._manifests[name]

    def set_step(self, name: str, step: int, changes: Sequence[Change]) -> None:
        """Make the manifest of a training stage that of its checkpoint after a step.

        changes: settings that changed during the run. Call it before manifest() of later stages.
        """
        manifest = self.manifest(name).model_copy(update={"changes": list(changes)})
        self._manifests[name] = manifest.at_step(step)

    def add_settings(self, name: str, settings: dict[str, object]) -> None:
        """Add settings to the manifest that the stage's artifact must have."""
        manifest = self.manifest(name)
        update = {"settings": {**manifest.settings, **settings}}
        self._manifests[name] = manifest.model_copy(update=update)

    def _fingerprints(self, name: str) -> dict[str, str]:
        """Return the fingerprints of the user's files of a stage; each file is read once.

        Files that were deleted after the artifact was made have the fingerprint in its manifest.
        """
        if name in self._sources:
            return self._sources[name]
        fingerprints, gone = {}, []
        for key, files in self.stages[name].sources(self.recipe).items():
            missing = files.missing()
            recorded = find_manifest(self.paths[name]) if missing else None
            if recorded and recorded.sources.get(key) == files.absolute_paths and key in recorded.inputs:
                fingerprints[key] = recorded.inputs[key]
                gone += missing
            else:
                fingerprints[key] = files.fingerprint()
        self._sources[name], self._missing[name] = fingerprints, gone
        return fingerprints

    def deleted_sources(self) -> dict[str, list[str]]:
        """Return stage -> the deleted files of the user that its finished artifact replaces."""
        deleted: dict[str, list[str]] = {}
        for name, stage in self.stages.items():
            earlier, _ = self.place(name)
            if earlier is not self:
                deleted |= {key: files for key, files in earlier.deleted_sources().items() if key == name}
            elif any(files.missing() for files in stage.sources(self.recipe).values()):
                try:
                    is_done = self.why_not_done(name) is None
                except (InputError, OSError):  # a file that no artifact replaces is missing, too
                    continue
                if is_done and self._missing[name]:
                    deleted[name] = self._missing[name]
        return deleted

    def deleted_source_lines(self) -> list[str]:
        """Return a line for each finished stage whose files of the user were deleted."""
        return [
            f"{name}: {', '.join(missing)} does not exist; the run continues with {self.paths[name]}, "
            "which was made from it"
            for name, missing in self.deleted_sources().items()
        ]

    def files(self, name: str) -> StageFiles:
        """Return the artifacts of a stage."""
        return StageFiles(self.recipe, self.paths, self.manifest(name))

    def share_files(self, name: str) -> StageFiles:
        """Return the artifacts of a stage for a share of its work.

        The manifest has no fingerprint of the text, for which all of it would be read.
        """
        stage = self.stages[name]
        sources = {key: files for key, files in stage.sources(self.recipe).items() if key != "text"}
        inputs = {source: self.manifest(source).fingerprint for source in self.inputs(name)}
        inputs |= {key: files.fingerprint() for key, files in sources.items()}
        manifest = Manifest(stage=name, settings=stage.settings(self.recipe), inputs=inputs)
        return StageFiles(self.recipe, self.paths, manifest)

    def why_not_done(self, name: str) -> list[str] | None:
        """Return None if the stage is done, else the differences; [] if there is no artifact."""
        manifest = find_manifest(self.paths[name])
        if manifest is None:
            return []
        return manifest.differences(self.manifest(name)) or None

    def require_inputs(self, name: str) -> None:
        """Raise InputError unless every artifact that the stage needs is up to date."""
        unrecorded = [source for source in self.stages[name].unrecorded_inputs if source in self.stages]
        for source in self.before(name) + unrecorded:
            require_artifact(self.paths[source], self.command(source), self.manifest(source))

    def command(self, name: str) -> str:
        """Return the command that makes an artifact: "plan", or "plan --round narrow"."""
        return self.recipe.command(name) if self.place(name)[0] is self else name

    def without_correction(self) -> StageGraph:
        """Return the same recipe without its section correct, in the folder of correct.baseline."""
        assert self.recipe.correct is not None
        assert self.recipe.correct.baseline is not None
        update = {"correct": None, "output": self.recipe.correct.baseline}
        plain = StageGraph(self.recipe.model_copy(update=update))
        plain._sources = self._sources  # the user's files are the same
        return plain

    def check(
        self, num_ranks: int | None = None, *, weights: bool = True, saved_progress: bool = True
    ) -> None:
        """Raise InputError with every problem of the recipe that would stop a later stage.

        num_ranks: ranks of the job, or None if unknown. weights: whether to also check the weight
        files. saved_progress: whether to also check that checkpoints fit, which reads the user's
        files; it needs the weights.
        """
        problems: list[str] = []
        for graph in self.rounds():
            new = graph._problems(num_ranks, weights=weights, saved_progress=saved_progress and weights)
            start = f"round {graph.recipe.round_name}: " if graph.earlier else ""
            problems += [start + problem for problem in new if problem not in problems]
        refuse("this recipe cannot run:", problems)

    def _problems(self, num_ranks: int | None, *, weights: bool, saved_progress: bool) -> list[str]:
        """Return the problems of this round."""
        problems = output_problems(self.recipe, self.paths, report=True)
        problems += recipe_problems(
            self.recipe, self.paths, num_ranks, weights=weights, deleted=set(self.deleted_sources())
        )
        if saved_progress:
            problems += saved_progress_problems(self) + self._user_file_problems()
        return problems

    def check_before_stage(self, stage: str, *, force: bool = False) -> None:
        """Raise InputError when the stage would orphan checkpoints or delete files of the user.

        force: it may replace a finished model by one that resumes with other settings.
        """
        problem = user_files_problem(self.paths[stage])
        problems = saved_progress_problems(self, stage, force=force) + ([problem] if problem else [])
        if self.stages[stage].has_checkpoints:
            problems += tracker_problems(self.recipe)
        refuse("this recipe cannot run:", problems)

    def _user_file_problems(self) -> list[str]:
        """Return a sentence for each artifact that will be replaced and has files of the user in it."""
        problems = []
        for name in self.own_stages:
            path = self.paths[name]
            try:
                problem = user_files_problem(path)
                if problem and self.why_not_done(name) is not None:
                    problems.append(problem)
            except (InputError, OSError):  # left to the other checks
                continue
        return problems

    def check_output(self, *, report: bool) -> None:
        """Raise InputError when a run would overwrite or delete the user's files.

        report: whether the run writes the report.
        """
        refuse("this recipe cannot run:", output_problems(self.recipe, self.paths, report=report))

    def artifact_problems(self, name: str) -> list[str]:
        """Return why the finished artifact of a stage would stop a later stage, as sentences."""
        problems = self.stages[name].problems
        return [] if problems is None else problems(self.files(name))
