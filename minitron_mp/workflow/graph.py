"""The stages of a recipe: the artifacts that each one needs, and whether it must run again.

A stage is done when its artifact exists and has the manifest that the recipe requires.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from minitron_mp.errors import InputError, refuse
from minitron_mp.workflow.output_folder import output_problems
from minitron_mp.workflow.preflight import recipe_problems, tracker_problems
from minitron_mp.workflow.saved_progress import saved_progress_problems
from minitron_mp.workflow.stage import Stage
from minitron_mp.workflow.stage_files import StageFiles
from minitron_mp.workflow.stages import STAGES


class StageGraph:
    """A recipe, its stages and their artifacts. It reads files, and needs neither a GPU nor torchrun.

    accept: settings that may differ from those of a checkpoint from which a stage resumes.
    """

    def __init__(self, recipe: Recipe, accept: Sequence[str] = ()):
        self.recipe, self.accept = recipe, tuple(accept)
        self.stages: dict[str, Stage] = {stage.name: stage for stage in STAGES if stage.when(recipe)}
        self.paths: dict[str, Path] = {
            name: recipe.root / stage.artifact for name, stage in self.stages.items()
        }
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
        raise InputError(f"the recipe has no stage {name}; add {requirements[name]}")

    def inputs(self, name: str) -> list[str]:
        """Return the stages whose artifacts a stage reads."""
        stage = self.stages[name]
        names = [source if isinstance(source, str) else source(self.recipe) for source in stage.inputs]
        names += [source for source in stage.optional_inputs if source in self.stages]
        return list(dict.fromkeys(names))

    def before(self, name: str) -> list[str]:
        """Return all stages that a stage depends on, in order."""
        needed = set(self.inputs(name))
        for stage in reversed(self.stages):
            if stage in needed:
                needed |= set(self.inputs(stage))
        return [stage for stage in self.stages if stage in needed]

    def manifest(self, name: str) -> Manifest:
        """Return the manifest that the stage's artifact must have."""
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
        deleted = {}
        for name, stage in self.stages.items():
            if any(files.missing() for files in stage.sources(self.recipe).values()):
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
            require_artifact(self.paths[source], source, self.manifest(source))

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
        problems = output_problems(self.recipe, self.paths, report=True)
        problems += recipe_problems(
            self.recipe, self.paths, num_ranks, weights=weights, deleted=set(self.deleted_sources())
        )
        if saved_progress and weights:
            problems += saved_progress_problems(self) + self._user_file_problems()
        refuse("this recipe cannot run:", problems)

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
        for name, path in self.paths.items():
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
