"""The output folder of a recipe: what a run writes there, and the user's files that it must keep.

A run replaces and deletes artifacts, their temporary siblings, checkpoints, logs and reports. None
of them may be an input of the same run, and none may replace a file that the user wrote.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from minitron_mp.artifacts.files import RUN_LOG, aside_path, hidden_sibling, write_text
from minitron_mp.artifacts.manifest import find_manifest
from minitron_mp.artifacts.output_lock import LOCK, locked
from minitron_mp.config.recipe import RESOLVED_RECIPE, Recipe, recipe_yaml
from minitron_mp.data.file_hashes import HASHES_FILE, SHARDS
from minitron_mp.distributed.job import STOP_FILE
from minitron_mp.errors import InputError

FINISHED = "finished"
"""File in the output folder that `compress` writes at its end. Launch scripts restart the job until
it exists."""

LOGS = (
    "checkpoints",
    "tensorboard",
    "wandb",
    "tracked_runs.json",
    "profile",
    "logs",
    SHARDS,
    HASHES_FILE,
    RUN_LOG,
    RESOLVED_RECIPE,
    FINISHED,
    STOP_FILE,
    LOCK,
)
"""Files and folders beside the artifacts that a run writes or deletes."""

METRICS = ("metrics.jsonl", "metrics_correct.jsonl")

REPORTS = ("report.md", "report.html")

REPORT_MARK = "minitron-mp"
"""Text in the last line of report.md, and in a meta tag of report.html."""


def output_problems(recipe: Recipe, paths: Mapping[str, Path], *, report: bool) -> list[str]:
    """Return a sentence for each user file that a run would overwrite or delete.

    paths: stage -> artifact. report: whether all stages run and the report is written. A single
    stage checks its own artifact later.
    """
    problems = _folder_problems(recipe.root)
    if problems:
        return problems
    problems = _input_problems(recipe, paths) + _foreign_files(recipe.root, report=report)
    return problems + (_foreign_artifacts(paths) if report else [])


def _folder_problems(root: Path) -> list[str]:
    """Return why the output folder cannot be made or written."""
    existing = next(path for path in (root.absolute(), *root.absolute().parents) if os.path.lexists(path))
    if existing.is_symlink() and not existing.exists():
        return [
            f"output: {existing} is a link to {os.readlink(existing)}, which does not exist; create that "
            "folder, or set another output"
        ]
    if not existing.is_dir():
        return [f"output: {existing} is a file, not a folder; move it, or set another output"]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [
            f"output: {existing} cannot be written by this user; change its permissions, or set another "
            "output"
        ]
    most = os.pathconf(existing, "PC_NAME_MAX")
    longest = max((len(os.fsencode(part)) for part in root.absolute().relative_to(existing).parts), default=0)
    if longest > most:
        return [
            f"output: a name in {root} has {longest} bytes; the file system allows {most}; set a shorter name"
        ]
    return []


def _input_problems(recipe: Recipe, paths: Mapping[str, Path]) -> list[str]:
    """Return a sentence for each input that lies in something that a run replaces or deletes."""
    written = []
    for name, path in paths.items():
        written.append(_Written(path, f"the stage {name} replaces"))
        for temporary in (aside_path(path), hidden_sibling(path, "old")):
            written.append(_Written(temporary, f"the stage {name} deletes"))
    written += [_Written(recipe.root / name, "a run replaces") for name in (*LOGS, *METRICS, *REPORTS)]
    problems = []
    for key, paths_of_key in _inputs(recipe).items():
        for given in paths_of_key:
            found = _find_written(given, written)
            if found is not None:
                problems.append(
                    f"{key}: {given} would be lost, because it lies in {found.path}, which {found.reason}; "
                    "copy it out of the output folder and give the copy, or set another output"
                )
                break
    return problems


@dataclass(frozen=True)
class _Written:
    """A file or folder that a run writes, with its real path, and its device and inode."""

    path: Path
    reason: str

    @functools.cached_property
    def real_path(self) -> str:
        return os.path.realpath(self.path)

    @functools.cached_property
    def folder_id(self) -> tuple[int, int] | None:
        return _folder_id(self.path)


def _inputs(recipe: Recipe) -> dict[str, Iterator[Path]]:
    """Return key of the recipe -> its paths, and the links in these folders."""
    data = recipe.data
    inputs: dict[str, Iterator[Path]] = {"model": _folder_inputs(recipe.model)}
    if recipe.file and not _is_same(recipe.file, recipe.root / RESOLVED_RECIPE):
        inputs["recipe"] = iter([recipe.file])
    if recipe.teacher.model:
        inputs["teacher.model"] = _folder_inputs(recipe.teacher.model)
    if data.tokenizer:
        inputs["data.tokenizer"] = _folder_inputs(data.tokenizer)
    if data.chat_template:
        inputs["data.chat_template"] = iter([Path(data.chat_template)])
    texts = {"data.source": [data.source] if isinstance(data.source, str) else data.source}
    texts |= {f"data.{part}": getattr(data, part) for part in ("calibration", "train", "valid")}
    texts |= {f"data.held_out.{name}": entries for name, entries in data.held_out.items()}
    for key, entries in texts.items():
        inputs[key] = (path for entry in entries for path in _text_inputs(entry, recipe.root))
    tasks = {f"evaluate.tasks.{name}": path for name, path in recipe.evaluate.tasks.items()}
    if recipe.depth.task:
        tasks["depth.task"] = recipe.depth.task
    inputs |= {key: iter([Path(path)]) for key, path in tasks.items()}
    inputs["teacher.siblings"] = (Path(path) for path in recipe.teacher.siblings)
    return inputs


def _is_same(path: Path, other: Path) -> bool:
    return os.path.realpath(path) == os.path.realpath(other)


def _folder_inputs(entry: str) -> Iterator[Path]:
    yield Path(entry)
    with suppress(OSError):
        yield from (path for path in Path(entry).iterdir() if path.is_symlink())


def _text_inputs(entry: str, output: Path) -> Iterator[Path]:
    """Yield a text path, the two files of Megatron data with this prefix, and the links in a folder."""
    yield Path(entry)
    prefix = entry.removesuffix(".bin").removesuffix(".idx")
    yield Path(prefix + ".bin")
    yield Path(prefix + ".idx")
    yield from _links_in(entry, output)


def _links_in(folder: str, output: Path) -> Iterator[Path]:
    """Yield the links in a folder and its subfolders. It needs no stat() of each file.

    Output folders in it are left out, as in the text (data/folders.py).
    """
    from minitron_mp.data.folders import is_output

    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                yield Path(entry.path)
            elif entry.is_dir() and not is_output(Path(entry.path), output):
                yield from _links_in(entry.path, output)


def _find_written(path: Path, written: Sequence[_Written]) -> _Written | None:
    """Return what contains a path, through links, `..` and bind mounts; None if the path is safe."""
    real = Path(os.path.realpath(path))
    above = [real, *real.parents]
    names = {str(parent) for parent in above}
    ids = {_folder_id(parent) for parent in above} - {None}
    return next((each for each in written if each.real_path in names or each.folder_id in ids), None)


def _folder_id(path: Path) -> tuple[int, int] | None:
    """Return device and inode of a folder; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if path.is_dir() else None


def _foreign_files(root: Path, *, report: bool) -> list[str]:
    """Return a sentence for each file that a run would replace, but that it did not write."""
    checks: dict[str, Callable[[str], bool]] = {
        RESOLVED_RECIPE: _is_resolved_recipe,
        RUN_LOG: lambda text: _is_log(text, "stage"),
        FINISHED: lambda text: re.match(r"\d{4}-\d\d-\d\d ", text) is not None,
        STOP_FILE: lambda text: not text.strip(),  # made by `touch`
        **{name: lambda text: _is_log(text, "step") for name in METRICS},
    }
    if report:
        checks |= {name: lambda text: REPORT_MARK in text for name in REPORTS}
    problems = []
    for name, is_ours in checks.items():
        path = root / name
        if not os.path.lexists(path):
            continue
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:  # a folder, a dangling link
            text = None
        if text is None or (text and not is_ours(text)):
            change = "deleted" if name == STOP_FILE else "replaced"
            problems.append(
                f"output: {path} would be {change}, but minitron-mp did not write it, or it was edited; "
                "rename it, or set another output"
            )
    return problems


def _foreign_artifacts(paths: Mapping[str, Path]) -> list[str]:
    """Return a sentence for each path of an artifact at which there is something else."""
    problems = []
    for path in paths.values():
        try:
            find_manifest(path)
        except InputError as error:
            problems.append(str(error))
    return problems


def stop_file_line(root: Path) -> str:
    """Return a line about a stop file that exists before the run; "" without one."""
    path = root / STOP_FILE
    if not path.exists():
        return ""
    return f"{path} exists: a run stops before its next stage and deletes that file; delete it to run"


def _is_log(text: str, key: str) -> bool:
    """Return whether the first complete line is a JSON object with a key, or no line is complete."""
    first, end, _ = text.partition("\n")
    try:
        return not end or key in json.loads(first)
    except (ValueError, TypeError):
        return False


def _is_resolved_recipe(text: str) -> bool:
    header, _, body = text.partition("\n")
    return header == _header(body)


def _header(body: str) -> str:
    checksum = hashlib.sha256(body.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return f"# The recipe of the last command with all defaults, by minitron-mp. Edit a copy. {checksum}"


def write_resolved_recipe(recipe: Recipe) -> None:
    """Write the resolved recipe of the run to its output folder. The report refers to that file."""
    body = recipe_yaml(recipe.run)
    write_text(recipe.run.root / RESOLVED_RECIPE, f"{_header(body)}\n{body}")


@contextmanager
def locked_output(root: Path, lock: str = LOCK) -> Iterator[None]:
    """Make the output folder and hold its lock in this context; for rank 0.

    lock: file name of another lock, for a command that writes only one artifact of its own.
    Folders that it made are deleted if they are still empty at the end.
    """
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the output folder {root} cannot be written: {error}; set another output"
        ) from error
    try:
        with locked(root, lock):
            yield
    finally:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()
