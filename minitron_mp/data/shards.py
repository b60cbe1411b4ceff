"""Shards: a large text is tokenized shard by shard, by several processes, on one or many nodes.

A shard is the token ids of some consecutive files, in a folder with a manifest. The shards follow
from the text alone. Put together in order, they are bitwise the files that one process writes, so
the samples do not depend on shards, workers or nodes. A shard is complete or does not exist. It is
made again if its files, the tokenizer or a setting have changed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from minitron_mp import __version__
from minitron_mp.artifacts.files import read_json, write_text
from minitron_mp.artifacts.manifest import Manifest, find_manifest, writing_artifact
from minitron_mp.artifacts.output_lock import locked
from minitron_mp.data.file_hashes import SHARD_FILE, FileHash, FileHashes, combined_hash, status_of
from minitron_mp.data.indexed_files import concatenate, has_mask, ids_dtype, lengths_of, mask_prefix
from minitron_mp.data.sources import TextFile
from minitron_mp.data.tokenize import Progress, TextJob, WrittenText, write_parts
from minitron_mp.data.unused import load_unused
from minitron_mp.errors import InputError

SHARD_BYTES = 1 << 28
"""Size of a shard in bytes of unpacked text, except that a file is not divided. A core tokenizes it in
one to two minutes, which is the most that a kill loses."""

MAX_SHARDS = 4096
"""Most shards of a text. The shards of a larger text are larger."""

UNPACKED_RATIO = {".gz": 4.0, ".bz2": 4.0, ".xz": 4.0, ".zst": 4.0, ".parquet": 3.0}
"""Estimated bytes of text for each byte of a packed file. They only balance the shards."""

COPY_RATIO = 1 / 16
"""Work for a byte of Megatron data, which is only divided, compared with a byte of text."""


@dataclass(frozen=True)
class Share:
    """A share of the shards: number 1 to count of count shares."""

    number: int
    count: int

    def of(self, shards: Sequence[Shard]) -> list[Shard]:
        """Return the shards of this share. Each shard belongs to one share."""
        return list(shards[self.number - 1 :: self.count])

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def parse_share(text: str) -> Share:
    """Return the share in a text such as 3/16. InputError for other text."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise InputError(
            f"--shard is {text!r}; give NUMBER/COUNT, with a number from 1 to the count, for example "
            "--shard 1/16 to --shard 16/16"
        )
    return Share(int(number), int(count))


@dataclass(frozen=True)
class Shard:
    """Consecutive files of a text."""

    number: int
    """Position in the text, from 0."""
    files: tuple[TextFile, ...]

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.number:05}"

    @property
    def paths(self) -> list[Path]:
        """Its files on disk."""
        return [path for file in self.files for path in file.files]


def divide(files: Sequence[TextFile]) -> list[Shard]:
    """Return the shards of a text. They depend on the order and the sizes of its files only."""
    sizes = [_num_bytes(file) for file in files]
    limit = max(SHARD_BYTES, sum(sizes) / MAX_SHARDS)
    shards: list[Shard] = []
    group: list[TextFile] = []
    group_bytes = 0.0
    for file, size in zip(files, sizes):
        group.append(file)
        group_bytes += size
        if group_bytes >= limit:
            shards.append(Shard(len(shards), tuple(group)))
            group = []
            group_bytes = 0.0
    if group:
        shards.append(Shard(len(shards), tuple(group)))
    return shards


def _num_bytes(file: TextFile) -> float:
    """Return about the bytes of text of a file, as a measure of the work."""
    if file.is_tokenized:
        return sum(status_of(path)[0] for path in file.files) * COPY_RATIO
    return status_of(file.path)[0] * UNPACKED_RATIO.get(file.path.suffix.lower(), 1.0)


@dataclass(frozen=True)
class ShardStore:
    """The shards of a text on disk. It can be pickled, for worker processes."""

    folder: Path
    """Folder of the shards of one stage."""
    job: TextJob
    tokenizer_hash: str
    """Fingerprint of the tokenizer and of the model's vocabulary."""

    def is_done(self, shard: Shard, hashes: FileHashes) -> bool:
        """Return whether a shard exists, is complete, and is made from these files and settings."""
        folder = self.folder / shard.name
        if not folder.is_dir():
            return False
        try:
            manifest = find_manifest(folder)
            expected = self._manifest(shard, hashes.hashes_of(shard.paths))
            if manifest is None or manifest.fingerprint != expected.fingerprint:
                return False
            content = read_json(folder / SHARD_FILE, "data")
            for part in content["parts"]:
                lengths_of(folder / part)
            for part in content.get("masks", []):
                lengths_of(mask_prefix(folder / part))
        except (InputError, KeyError, OSError, ValueError):
            return False
        return True

    def make(self, shard: Shard, progress: Progress | None = None) -> None:
        """Tokenize the files of a shard.

        InputError if another process is making the same shard, or if a file changes meanwhile.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder, f".{shard.name}.lock"):
            found = FileHashes().hashes_of(shard.paths)
            manifest = self._manifest(shard, found)
            with writing_artifact(self.folder / shard.name, manifest) as folder:
                written = write_parts(shard.files, self.job, folder, progress)
                _check_unchanged(found)
                content = {
                    "parts": written.parts,
                    "masks": written.masks,
                    "documents": written.num_documents,
                    "files": [each.row for each in found if each.is_settled],
                }
                write_text(folder / SHARD_FILE, json.dumps(content))
                written.not_used.save(folder)

    def put_together(self, shards: Sequence[Shard], folder: Path) -> WrittenText:
        """Write the datasets of all parts from all shards, and return what was written."""
        total = WrittenText()
        prefixes: dict[str, list[Path]] = {}
        for shard in shards:
            source = self.folder / shard.name
            content = read_json(source / SHARD_FILE, "data")
            total.num_documents += content["documents"]
            total.not_used.update(load_unused(source))
            for part in content["parts"]:
                prefixes.setdefault(part, []).append(source / part)
        for part, datasets in prefixes.items():
            concatenate(datasets, folder / part, ids_dtype(self.job.tokenizer.vocab_size))
        total.parts = list(prefixes)
        total.masks = [part for part in prefixes if has_mask(folder / part)]
        return total

    def discard(self) -> None:
        """Delete all shards, and the folder above if it is empty."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self.folder.parent.rmdir()

    def _manifest(self, shard: Shard, hashes: list[FileHash]) -> Manifest:
        """Return the manifest of a shard: everything that its token ids follow from."""
        settings, chats = self.job.settings, self.job.chats
        sources = dict.fromkeys(file.source for file in shard.files)
        names = repr([(file.source, file.name) for file in shard.files])
        return Manifest(
            stage="shard",
            settings={
                "valid_fraction": settings.valid_fraction,
                "seed": settings.seed,
                "text_field": settings.fields.text,
                **({} if chats is None else {"chat_field": settings.fields.chat, "chats": chats.digest}),
                "rules": {source: list(self.job.rules[source]) for source in sources},
                "names": hashlib.sha256(names.encode()).hexdigest()[:16],
            },
            inputs={
                "tokenizer": self.tokenizer_hash,
                "text": combined_hash(hashes),
            },
            made_by=f"minitron_mp {__version__}",
        )


def _check_unchanged(found: list[FileHash]) -> None:
    """Raise InputError if a file has changed since its hash was computed."""
    for each in found:
        if status_of(Path(each.path)) != each.status:
            raise InputError(
                f"{each.path} changed while it was read; wait until it is complete, or give a copy"
            )
