"""Manifests: every stage writes one file or folder with a manifest, completely or not at all.

A manifest records the origin of an artifact: the stage, the settings that change its content, and
the fingerprints of its inputs. The fingerprint of the artifact is a hash of these, so one
comparison shows whether an artifact fits a recipe. Parallel layout, microbatch size and logging
are not among the settings, because they do not change the result.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from minitron_mp.artifacts.files import aside_path, hidden_sibling, write_text
from minitron_mp.artifacts.written_files import changed_files, written_files
from minitron_mp.errors import InputError, differing_fields, refuse
from minitron_mp.models.arch import Arch
from minitron_mp.models.model_folder import shortened

FORMAT = 2
"""Version of the format of artifacts. Artifacts of a different version must be made again.

1: checkpoints with one tensor for all layers. 2: checkpoints with a key for each layer.
"""

MANIFEST = "manifest.json"

TIMING = "timing"
"""Name of a checkpoint that measures the duration of a save, and is deleted at once."""

CHECKPOINT_NAME = re.compile(rf"(step_\d{{8}}|{TIMING})|\.(step_\d{{8}}|{TIMING})\.(tmp|old)")
"""Name of a checkpoint folder after a step or to measure a save, or of its temporary siblings."""


class Change(BaseModel):
    """A setting that the user changed during a training run, with --accept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    """Number of steps that were trained with the old value."""
    name: str
    """Key in Manifest.settings; dotted in a section."""
    old: Any = None
    """None: the key was absent, because it had its default. The same for `new`."""
    new: Any = None


class Validation(BaseModel):
    """Loss on held-out text after a step: means over valid tokens in nats. kl: None without a teacher."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    loss: float
    kl: float | None = None


class Manifest(BaseModel):
    """The origin of an artifact. inputs: name -> fingerprint of the artifact that was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    arch: Arch | None = None
    format: int = FORMAT
    sources: dict[str, list[str]] = {}
    """Name in `inputs` of the user's files -> their absolute paths. They are not part of the
    fingerprint. An artifact stays valid when the files at these paths are deleted."""
    made_by: str = ""
    """Version of this library, for information. It is not part of the fingerprint."""
    files: dict[str, str] = {}
    """Files of an artifact folder, as written_files() returns them; {} if they were not recorded.
    They are not part of the fingerprint."""
    validation: Validation | None = None
    """Validation of a model in training. It is not part of the fingerprint."""
    lasts: bool = False
    """Whether a checkpoint stays after the end of its run, also if keep_every is changed later. It is
    not part of the fingerprint."""
    changes: list[Change] = []
    """Settings that changed during the training run. `settings` has their last values. They are not
    part of the fingerprint."""

    @property
    def fingerprint(self) -> str:
        """Hash of stage, settings, inputs and format."""
        content = self.model_dump(mode="json", include={"stage", "settings", "inputs", "format"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def differences(self, other: Manifest) -> list[str]:
        """Return 'settings.x: 1, here 2' for each field that differs.

        self is the manifest on disk, other the expected one.
        """
        rows = differing_fields(
            {"stage": self.stage, "format": self.format}, {"stage": other.stage, "format": other.format}
        )
        rows += [f"settings.{row}" for row in self.changed_settings(other)]
        for row in differing_fields(self.inputs, other.inputs):
            rows.append(f"input {row}{self._changed_files(row.partition(':')[0], other)}")
        return rows

    def at_step(self, step: int) -> Manifest:
        """Return the manifest of this run's checkpoint after a step: without later changes."""
        settings = self.settings
        for change in reversed(self.changes):
            if change.step >= step:
                settings = _replaced(settings, change.name.split("."), change.old)
        changes = [change for change in self.changes if change.step < step]
        return self.model_copy(update={"settings": settings, "changes": changes})

    def accepting(self, names: Collection[str], saved: Manifest, step: int) -> Manifest:
        """Return this manifest with the history of the run that resumes.

        saved: manifest of the run's checkpoint after `step`. names: settings that may differ from
        it. They are added to the history.
        """
        old, new = _flat(saved.settings), _flat(self.at_step(step).settings)
        accepted = [
            Change(step=step, name=name, old=old.get(name), new=new.get(name))
            for name in names
            if old.get(name) != new.get(name)
        ]
        recorded = [change for change in self.changes if change.step >= step]
        return self.model_copy(update={"changes": [*saved.changes, *accepted, *recorded]})

    def changed_settings(self, other: Manifest) -> list[str]:
        """Return 'x: 1, here 2' for each setting that differs."""
        return differing_fields(_flat(self.settings), _flat(other.settings))

    def changed_sources(self, other: Manifest) -> list[str]:
        """Return which of the user's files differ, by their paths."""
        rows = []
        for name in sorted({*self.sources, *other.sources}):
            before, now = self.sources.get(name, []), other.sources.get(name, [])
            if self.inputs.get(name) == other.inputs.get(name):
                continue
            if before == now:
                rows.append(f"{', '.join(now)} has changed since")
            else:
                rows.append(f"{name}: {', '.join(before) or 'nothing'}, here {', '.join(now) or 'nothing'}")
        return rows

    def _changed_files(self, name: str, other: Manifest) -> str:
        """Return the paths of the user's files that differ; "" for an artifact."""
        before, now = self.sources.get(name), other.sources.get(name)
        if not before or not now:
            return ""
        if before == now:
            return f" ({', '.join(now)} has changed since)"
        return f" (from {', '.join(before)}, here {', '.join(now)})"


def _replaced(tree: dict[str, Any], keys: list[str], value: object) -> dict[str, Any]:
    """Return nested settings with one other value. None: without the key."""
    name, *rest = keys
    if rest:
        return {**tree, name: _replaced(tree.get(name, {}), rest, value)}
    kept = {key: old for key, old in tree.items() if key != name}
    return kept if value is None else {**kept, name: value}


def _flat(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
    rows: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            rows |= _flat(value, f"{prefix}{key}.")
        else:
            rows[prefix + key] = value
    return rows


def find_manifest(artifact: Path) -> Manifest | None:
    """Return the manifest of an artifact, or None if the artifact does not exist.

    It is in manifest.json of a folder, under "manifest" in a .json file, or in the metadata of a
    .safetensors file. If a kill interrupted the replacement of the artifact, the old artifact is
    restored. InputError for a damaged artifact, and for one that this library did not write.
    """
    if not artifact.exists():
        with suppress(OSError):  # no old artifact exists, or another rank has restored it
            hidden_sibling(artifact, "old").rename(artifact)
    if artifact.is_dir() and not (artifact / MANIFEST).is_file():
        raise _not_ours(artifact, MANIFEST)
    is_folder = artifact.is_dir()
    try:
        text = (artifact / MANIFEST).read_text(encoding="utf-8") if is_folder else _manifest_in(artifact)
        if text is None:
            raise _not_ours(artifact, "manifest")
        content = json.loads(text)
        return Manifest.model_validate(content)
    except InputError:
        raise
    except FileNotFoundError:
        return None
    except ValidationError as error:
        if isinstance(content, dict) and isinstance(content.get("format"), int) and "stage" in content:
            _require_format(artifact, content["format"], content["stage"])
        fields = ", ".join(".".join(map(str, row["loc"])) or "manifest" for row in error.errors())
        raise InputError(
            f"{artifact} is damaged (missing or unknown in its manifest: {fields}); delete it and run its "
            "stage again"
        ) from error
    except Exception as error:  # of json or safetensors
        if is_folder:
            raise InputError(f"{artifact} is damaged ({error}); delete it and run its stage again") from error
        raise InputError(
            f"{artifact} cannot be read ({error}): minitron-mp did not write it, or it is damaged; move it "
            "and run its stage again, or set another output"
        ) from error


def _manifest_in(file: Path) -> str | None:
    """Return the manifest in a .json or .safetensors file as JSON; None if it has none."""
    if file.suffix == ".json":
        content = json.loads(file.read_text(encoding="utf-8"))
        has_manifest = isinstance(content, dict) and "manifest" in content
        return json.dumps(content["manifest"]) if has_manifest else None
    from safetensors import safe_open

    with safe_open(file, "numpy") as tensors:
        text: str | None = (tensors.metadata() or {}).get("manifest")
    return text


def _not_ours(artifact: Path, missing: str) -> InputError:
    return InputError(
        f"{artifact} has no {missing}: minitron-mp did not write it and will not replace it; move it, or "
        "set another output"
    )


def require_artifact(artifact: Path, stage: str, expected: Manifest | None = None) -> Manifest:
    """Return the manifest of an artifact. InputError if it is missing or not the expected one."""
    manifest = find_manifest(artifact)
    if manifest is None:
        raise InputError(f"{artifact} is missing; run `minitron-mp {stage}` first")
    require_format(artifact, manifest)
    if expected is not None and manifest.fingerprint != expected.fingerprint:
        refuse(
            f"{artifact} was made from other inputs or settings; run `minitron-mp {stage}` again, or restore "
            "these:",
            manifest.differences(expected),
        )
    return manifest


def require_format(artifact: Path, manifest: Manifest) -> None:
    """Raise InputError unless this version of the library reads the format of the artifact."""
    _require_format(artifact, manifest.format, manifest.stage)


def _require_format(artifact: Path, format: object, stage: object) -> None:
    if format != FORMAT:
        raise InputError(
            f"{artifact} has format {format}, this version reads format {FORMAT}; "
            f"delete it and run `minitron-mp {stage}` again"
        )


def user_files(artifact: Path) -> list[str]:
    """Return the files in an artifact folder that the user added or edited, for a message.

    [] for a file, and for a folder whose files were not recorded. InputError for a folder that is
    not an artifact.
    """
    manifest = find_manifest(artifact) if artifact.is_dir() else None
    if manifest is None or not manifest.files:
        return []
    return shortened([name for name in changed_files(artifact, manifest.files) if name != MANIFEST])


def user_files_problem(artifact: Path) -> str:
    """Return why an artifact folder cannot be replaced without loss, or ""."""
    files = user_files(artifact)
    if not files:
        return ""
    return (
        f"{artifact} would be replaced, and files in it would be lost that minitron-mp did not write, or "
        f"that were edited: {', '.join(files)}; move them out of that folder, or set another output"
    )


@contextmanager
def writing_artifact(folder: Path, manifest: Manifest) -> Iterator[Path]:
    """Yield a temporary folder, and on success replace the artifact by it, with its manifest.

    One process calls it. A kill leaves the old artifact or the new one. If the kill comes between
    the two renames, find_manifest() restores the old artifact.
    """
    temporary = prepare_artifact(folder)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    commit_artifact(folder, manifest)


def prepare_artifact(folder: Path) -> Path:
    """Create and return the empty folder aside_path(folder). Rank 0 calls it before ranks write.

    InputError if commit_artifact() would delete files of the user in the folder.
    """
    # A checkpoint without a manifest is incomplete, and the run that resumes writes it again.
    is_checkpoint = CHECKPOINT_NAME.fullmatch(folder.name) is not None
    if folder.is_dir() and any(folder.iterdir()) and not is_checkpoint:
        problem = user_files_problem(folder)
        if problem:
            raise InputError(problem)
    temporary = aside_path(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def commit_artifact(folder: Path, manifest: Manifest) -> None:
    """Replace the artifact by aside_path(folder) with its manifest. Rank 0 calls it at the end."""
    old = hidden_sibling(folder, "old")
    files = written_files(aside_path(folder))
    write_manifest(aside_path(folder), manifest.model_copy(update={"files": files}))
    while True:
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        try:
            aside_path(folder).rename(folder)
            break
        except OSError:
            # Another command, such as a dry run, has restored the old artifact between the renames.
            if not folder.exists():
                raise
    shutil.rmtree(old, ignore_errors=True)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of an artifact folder atomically."""
    write_text(folder / MANIFEST, manifest.model_dump_json(indent=1))
