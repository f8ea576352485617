"""Manifest rows to WebDataset tars, reproducible to the byte, with a summary of what became of each row.

Rows are cut into groups before any is read; a group is written by one process, to a folder of its own, and becomes one
shard (several, if it outgrows `bytes_per_shard`). So the shards are the same in however many processes, tasks and
machines they were made. They get their names when all are whole.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import psutil
from webdataset.writer import ShardWriter

from mmllm.data.executors.parallel import in_order
from mmllm.data.executors.stages import Executor, Progress, Stage
from mmllm.data.executors.task import Work, function_named
from mmllm.data.rows.bad_rows import BadRows
from mmllm.data.rows.rows import KINDS, Kind, row_files
from mmllm.data.rows.table import ChangedError, RowTable
from mmllm.data.samples.stored import ImageEncoder
from mmllm.data.shards.encode import PICTURES, KeyedRow, SampleFiles, ShardsConfig, TableRows, sample_files
from mmllm.data.shards.find import JOURNAL, SUMMARY
from mmllm_tokenizers.folder import TokenizerFolder

STAGING = ".building"
"""Folder of the groups of a build that goes on."""
FORMAT_VERSION = 1

_CHUNK = 128
_NAMED = 20
_FEW_ROWS = 256
"""Of so few, all bad ones are found before too many of them end the build; of more, it ends at the first too many."""
_GROUP, _UNFINISHED, _OF_PROCESS = "group.json", "unfinished-", "of-"


@dataclass(frozen=True)
class Group:
    """Rows of one kind that go to shards of their own."""

    name: str
    """Of its folder while it is written."""
    kind: Kind
    rows: Sequence[KeyedRow]


def group_rows(table: RowTable, config: ShardsConfig) -> list[Group]:
    """Groups of `samples_per_shard`, by kind, in the rows' order.

    Keys are made unlike before any row is read, so that processes may share the rows.
    """
    table.number_keys()
    groups = []
    for kind in KINDS:
        rows = TableRows(table, table.of_kind(kind))
        copies = config.perturb + 1 if kind == "audio" else 1
        size = max(1, config.samples_per_shard // copies)
        for number, start in enumerate(range(0, len(rows), size)):
            groups.append(Group(f"{kind}-{number:06d}", kind, rows[start : start + size]))
    return groups


def write_shards(
    table: RowTable,
    out: str | Path,
    config: ShardsConfig,
    folder: TokenizerFolder | None = None,
    bad: BadRows | None = None,
    progress: Progress | None = None,
    executor: Executor | None = None,
    left_out: dict[str, int] | None = None,
    encoder: ImageEncoder | None = None,
) -> dict[str, Any]:
    """Writes `out/<kind>-000000.tar`, … and `out/shards.json`, and returns what that file holds.

    Args:
        table: The rows; kinds may be mixed, each goes to its own shards.
        out: The folder; made if need be. Shards of an earlier build there are replaced when this one is whole.
        config: How.
        folder: With an audio tokenizer, each sound's codes are stored beside it.
        bad: Takes the rows whose files can't be read; by default a fresh one with the config's bound. In this process
            and its workers, the first one too many ends the build.
        progress: Called with the numbers of rows done so far and in all.
        executor: Where groups are written; by default in this process. The shards are the same.
        left_out: What isn't in the rows, counted by reason, for the summary.
        encoder: With it, each picture's features are stored beside it.

    Raises:
        ManifestError: Too many rows are bad, or all, or a manifest has been changed.
        UnfinishedError: Tasks elsewhere aren't done yet.
        TaskError: One failed.
        OSError: The folder can't be written, or a shard that no build wrote is in the way.
    """
    executor = executor if executor is not None else Executor()
    bad = bad if bad is not None else BadRows(config.max_bad_fraction)
    num_rows, out = len(table) + len(bad.reasons), Path(out)
    _make(out)
    groups = group_rows(table, config)
    name = _last_file(table) or str(out)

    def note(wrong: Iterable[Sequence[str]], num_done: int) -> None:
        for where, reason in wrong:
            bad.add(where, reason)
        if num_done >= min(_FEW_ROWS, len(table)):
            bad.check(num_rows, name, is_end=num_done == len(table))

    counts = Counter(group.kind for group in groups)
    _refuse_others(out, [f"{kind}-{number:06d}.tar" for kind, count in counts.items() for number in range(count)])
    bad.check(num_rows, name)  # of several manifests, each may have few enough bad rows
    with _staging(out, executor) as staging:
        write = _WriteGroups(str(staging.absolute()), config, folder, encoder)
        if executor.is_here:
            written = list(write.each(groups, executor.workers, progress, note=note))
        else:
            written = _written_elsewhere(write, groups, executor, progress)
            note((wrong for group in written for wrong in group["bad"]), len(table))
        paths, shards = _named(staging, groups, written)
        summary = {
            "format_version": FORMAT_VERSION,
            "num_rows": num_rows,
            "num_samples": sum(shard["num_samples"] for shard in shards.values()),
            "num_bad": len(bad.reasons),
            "bad": bad.reasons,
            **({"left_out": dict(left_out)} if left_out else {}),
            **({"noted": noted} if (noted := _noted(written)) else {}),
            "perturb": config.perturb,
            "seed": config.seed,
            "tokenizer": folder.hash if folder is not None and folder.audio is not None else None,
            **({"image_features": encoder.hash} if encoder is not None else {}),
            "shards": shards,
        }
        _publish(paths, out, summary)
    return summary


def _noted(written: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The groups' notes by kind: how many there are, and the first of them."""
    noted: dict[str, dict[str, Any]] = {}
    for group in written:
        for kind, found in group.get("noted", {}).items():  # groups of earlier versions have none
            told = noted.setdefault(kind, {"num": 0, "first": []})
            told["num"] += found["num"]
            told["first"] = (told["first"] + found["first"])[:_NAMED]
    return noted


@contextmanager
def rows_file(out: Path, executor: Executor) -> Iterator[Path]:
    """A file of this process in the staging folder, for a table's rows; it goes when the build has ended.

    Whoever writes it makes its folder.

    Raises:
        OSError: `out` can't be made.
    """
    new, staging, is_done = _make(out), out / STAGING, executor.is_here
    with suppress(OSError):  # another build may have begun there
        for folder in new:  # only tried: a build that can't begin leaves nothing
            folder.rmdir()
    own = _own_folder(staging)
    if staging.is_symlink():
        staging.unlink()
    try:
        yield own / "rows.jsonl"
        is_done = True
    finally:
        shutil.rmtree(own, ignore_errors=True)
        if is_done:  # else tasks elsewhere go on to write here
            with suppress(OSError):  # others may be there
                staging.rmdir()
                if new:
                    out.rmdir()


def _make(folder: Path) -> list[Path]:
    """Makes a folder, if need be; those that are new, the innermost first."""
    try:
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        around = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), Path())
        why = (
            f"the system makes none in {around} ({error.strerror})"
            if os.path.isdir(around)
            else f"{'it' if around == folder else around} is there and is no folder"
        )
        raise type(error)(f"{folder}: this folder can't be made, because {why}; choose another by --out") from error
    return new


def _own_folder(staging: Path) -> Path:
    return staging / f"{_OF_PROCESS}{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


@contextmanager
def _staging(out: Path, executor: Executor) -> Iterator[Path]:
    """Where groups are written: for this process a folder that goes with it, elsewhere one that stays."""
    folder = out / STAGING
    if folder.is_symlink():  # shards are moved out of it, which other file systems don't do
        folder.unlink()
    _make(folder)
    if executor.is_here:
        _clear(folder, _OF_PROCESS)
        own = _own_folder(folder)
        own.mkdir()
        try:
            yield own
        finally:
            shutil.rmtree(own, ignore_errors=True)
            with suppress(OSError):  # another build's work may be there
                folder.rmdir()
    else:
        yield folder
        _clear(folder)  # also of what was given up
        with suppress(OSError):
            folder.rmdir()


def _clear(folder: Path, prefix: str = "") -> None:
    """Removes what begins so, but for the folders of processes that may live."""
    for path in folder.iterdir():
        if path.name.startswith(prefix):
            host, _, process = path.name.removeprefix(_OF_PROCESS).rpartition("-")[0].rpartition("-")
            is_dead = host == socket.gethostname() and process.isdigit() and not psutil.pid_exists(int(process))
            if is_dead or not path.name.startswith(_OF_PROCESS):
                shutil.rmtree(path, ignore_errors=True)


def _written_elsewhere(
    write: _WriteGroups, groups: Sequence[Group], executor: Executor, progress: Progress | None
) -> list[dict[str, Any]]:
    stage, items, keys = Stage("write", executor, write.settings), [group.rows for group in groups], []
    for rows in map(list, items):  # one group's at a time
        keys.append(stage.key(rows, [path for keyed in rows for path in row_files(keyed.row)]))
    return stage.run(write.work, items, keys, [len(rows) for rows in items], progress, write.is_written)


def _named(
    staging: Path, groups: Sequence[Group], written: Sequence[dict[str, Any]]
) -> tuple[dict[str, Path], dict[str, dict[str, Any]]]:
    """By each shard's name where it lies before it is published, and what the summary says of it."""
    paths: dict[str, Path] = {}
    shards: dict[str, dict[str, Any]] = {}
    counts: Counter[str] = Counter()
    for group, found in zip(groups, written, strict=True):
        for shard in found["shards"]:
            name = f"{group.kind}-{counts[group.kind]:06d}.tar"
            counts[group.kind] += 1
            paths[name] = staging / found["folder"] / shard["file"]
            shards[name] = {"kind": group.kind, **{key: shard[key] for key in ("num_samples", "bytes", "sha256")}}
    return paths, dict(sorted(shards.items()))


class _WriteGroups:
    """Writes groups to their folders in the staging folder."""

    def __init__(
        self, staging: str, config: ShardsConfig, folder: TokenizerFolder | None, encoder: ImageEncoder | None
    ) -> None:
        self._staging, self._config, self._folder, self._encoder = staging, config, folder, encoder

    @property
    def settings(self) -> dict[str, Any]:
        """All that the shards depend on besides the rows."""
        config = dataclasses.replace(self._config, max_bad_fraction=0.0)
        return {
            "staging": self._staging,
            "config": dataclasses.asdict(config),
            "tokenizer": self._folder and self._folder.hash,
            "image_features": self._encoder and self._encoder.hash,
        }

    @property
    def work(self) -> Work:
        """What `group_writer` makes the same of.

        Raises:
            ValueError: The tokenizer or the tower is in this process alone.
        """
        tokenizer = encoder = None
        if self._folder is not None:
            if self._folder.path is None:
                raise ValueError("the tokenizer is in memory alone, where tasks elsewhere can't read it; save it first")
            tokenizer = {"path": str(self._folder.path.absolute()), "hash": self._folder.hash}
        if self._encoder is not None:
            function, hashed = self._encoder.factory, self._encoder.hash
            if function is None:
                raise ValueError("tasks elsewhere can't make this image encoder; take one of load_image_encoder")
            encoder = {"function": function, "settings": self._encoder.settings, "hash": hashed}
        settings = {
            "staging": self._staging, "config": dataclasses.asdict(self._config), "tokenizer": tokenizer,
            "encoder": encoder,
        }  # fmt: skip
        return Work("mmllm.data.shards.write:group_writer", settings)

    def is_written(self, key: str) -> bool:
        """Whether the group of this name is whole."""
        return _is_whole(Path(self._staging, key))

    def __call__(self, group: Group, key: str) -> dict[str, Any]:
        """As a task does it."""
        return next(self.each([group], keys=[key]))

    def each(
        self,
        groups: Sequence[Group],
        workers: int = 0,
        progress: Progress | None = None,
        keys: Sequence[str] | None = None,
        note: Callable[[Iterable[tuple[str, str]], int], None] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Of each group its `folder`, `shards` (file, samples, bytes, digest) and `bad` rows, when it is written.

        The folder is named by the group's key, by default its name. It gets that name when it is whole; where it is
        there already, by the same task run twice, that one stands. `note` is given the bad rows of each chunk, and
        how many rows are done; what it raises ends the work.

        Raises:
            ChangedError: A manifest has been changed.
        """
        size = _CHUNK if self._encoder is None else PICTURES  # features are large, and towers slow
        chunks = [group.rows[start : start + size] for group in groups for start in range(0, len(group.rows), size)]
        read = partial(_samples_of, config=self._config, folder=self._folder, encoder=self._encoder)
        results = in_order(read, chunks, workers)
        num_done, num_all = 0, sum(len(group.rows) for group in groups)
        for group, key in zip(groups, keys or [group.name for group in groups], strict=True):
            left, bad = len(group.rows), []
            with _GroupWriter(Path(self._staging), key, self._config) as writer:
                while left:
                    chunk, found = next(results)
                    if isinstance(found, ChangedError):
                        raise found
                    samples, errors = found
                    bad += errors
                    for sample in samples:
                        writer.write(sample)
                    left -= len(chunk)
                    num_done += len(chunk)
                    if note:
                        note(errors, num_done)
                    if progress:
                        progress(num_done, num_all)
            yield writer.finished(bad)


def _samples_of(
    rows: Sequence[KeyedRow], config: ShardsConfig, folder: TokenizerFolder | None, encoder: ImageEncoder | None
) -> tuple[list[SampleFiles], list[tuple[str, str]]] | ChangedError:
    """As `sample_files`; an error that is the user's is returned, for what a worker raises comes with its traceback."""
    try:
        return sample_files(rows, config, folder, encoder)
    except ChangedError as error:
        return error


def group_writer(settings: dict[str, Any]) -> Callable[[Sequence[Any], str], dict[str, Any]]:
    """What a task elsewhere does with the rows of a group, given as JSON.

    Raises:
        ValueError: The tokenizer or the tower has changed since the build began.
    """
    folder = encoder = None
    if settings["tokenizer"] is not None:
        folder = TokenizerFolder.load(settings["tokenizer"]["path"])
        _check_same(folder.hash, settings["tokenizer"]["hash"], f"tokenizer {settings['tokenizer']['path']}")
    if settings["encoder"] is not None:
        told = settings["encoder"]
        encoder = function_named(told["function"])(**told["settings"])
        _check_same(encoder.hash, told["hash"], f"image tower {told['settings']}")
    write = _WriteGroups(settings["staging"], ShardsConfig(**settings["config"]), folder, encoder)

    def write_group(lines: Sequence[Any], key: str) -> dict[str, Any]:
        rows = tuple(map(KeyedRow.from_json, lines))
        return write(Group(key, rows[0].row.kind, rows), key)

    return write_group


def _check_same(found: str, wanted: str, name: str) -> None:
    if found != wanted:
        raise ValueError(
            f"{name} is {found[:12]} here, but was {wanted[:12]} when the build began; run the build again"
        )


class _GroupWriter:
    """`ShardWriter` in a folder that gets its name in the end."""

    def __init__(self, staging: Path, key: str, config: ShardsConfig) -> None:
        self._staging, self._key, self._config = staging, key, config
        self._writer: ShardWriter | None = None
        self._files: list[_ShardFile] = []
        self._counts: list[int] = []
        self._noted: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> _GroupWriter:
        self._folder = Path(tempfile.mkdtemp(prefix=f"{_UNFINISHED}{self._key}-", dir=self._staging))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for file in self._files:
                file.drop()
        if self._writer is not None:
            self._writer.close()  # writes the tar's end
            self._files[-1].close()
        if kind is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def write(self, sample: SampleFiles) -> None:
        if self._writer is None:
            self._writer = ShardWriter(
                "%06d.tar", maxcount=self._config.samples_per_shard, maxsize=self._config.bytes_per_shard,
                verbose=0, opener=self._open, mtime=0, encoder=False,
            )  # fmt: skip
        self._writer.write({"__key__": sample.key, **sample.files})
        self._counts[-1] += 1
        for note in sample.notes:
            told = self._noted.setdefault(note.kind, {"num": 0, "first": []})
            told["num"] += 1
            told["first"] = (told["first"] + [note.message])[:_NAMED]

    def _open(self, name: str) -> _ShardFile:
        if self._files:
            self._files[-1].close()
        self._files.append(_ShardFile(self._folder / name))
        self._counts.append(0)
        return self._files[-1]

    def finished(self, bad: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """Gives the folder its name, and what `_WriteGroups.each` says of it."""
        shards = [
            {"file": file.path.name, "num_samples": count, "bytes": file.num_bytes, "sha256": file.digest}
            for file, count in zip(self._files, self._counts, strict=True)
        ]
        told = {"folder": self._key, "shards": shards, "bad": list(bad), "noted": self._noted}
        with _open_new(self._folder / _GROUP) as stream:
            stream.write(json.dumps(told).encode())
        whole = self._staging / self._key
        if whole.exists() and not _is_whole(whole):  # its shards were moved by a build that was stopped
            shutil.rmtree(whole)
        try:
            self._folder.rename(whole)
        except OSError:
            shutil.rmtree(self._folder, ignore_errors=True)
            if not _is_whole(whole):
                raise
            told = json.loads((whole / _GROUP).read_bytes())
        return told


def _is_whole(folder: Path) -> bool:
    """Whether a group's folder holds all that it should."""
    try:
        shards = json.loads((folder / _GROUP).read_bytes())["shards"]
        return all((folder / shard["file"]).stat().st_size == shard["bytes"] for shard in shards)
    except FileNotFoundError:
        return False


class _ShardFile:
    """What a tar is written to. Once it is dropped it swallows what the tar's own end still writes."""

    def __init__(self, path: Path) -> None:
        self.path, self.num_bytes = path, 0
        self._stream: BinaryIO | None = _open_new(path)
        self._digest = hashlib.sha256()

    @property
    def digest(self) -> str:
        """SHA-256 of what was written."""
        return self._digest.hexdigest()

    def write(self, data: bytes) -> int:
        if self._stream is not None:
            self._stream.write(data)
            self._digest.update(data)
            self.num_bytes += len(data)
        return len(data)

    def flush(self) -> None:
        if self._stream is not None:
            self._stream.flush()

    def close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def drop(self) -> None:
        with suppress(OSError):
            self.close()


def _open_new(path: Path) -> BinaryIO:
    return path.open("wb")


def _publish(paths: dict[str, Path], out: Path, summary: dict[str, Any]) -> None:
    """Moves the shards to their names and writes the summary.

    What needs room on the disk comes first. While shards move, the journal tells which to remove if this never ends.
    """
    partial_summary, partial_journal = out / f"{SUMMARY}.partial", out / f"{JOURNAL}.partial"
    with _locked(out):
        earlier = _earlier(out)
        _refuse_others(out, paths)
        moved: list[str] = []
        text = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
        try:
            with _open_new(partial_summary) as stream:
                stream.write(text.encode("utf-8", "backslashreplace"))  # names of files may be no UTF-8
            with _open_new(partial_journal) as stream:
                stream.write("".join(f"{name}\n" for name in {**dict.fromkeys(earlier), **paths}).encode())
            partial_journal.replace(out / JOURNAL)
            _remove(out, earlier)
            for name, path in paths.items():
                path.replace(out / name)
                moved.append(name)
            partial_summary.replace(out / SUMMARY)
            (out / JOURNAL).unlink()
        except BaseException:
            if (out / JOURNAL).is_file():
                for name in moved:
                    (out / name).replace(paths[name])
                _remove(out, earlier)
                (out / JOURNAL).unlink()
            raise
        finally:
            partial_summary.unlink(missing_ok=True)
            partial_journal.unlink(missing_ok=True)


def _last_file(table: RowTable) -> str:
    """The file of the last row; "" where there is none."""
    if not len(table):
        return ""
    ((row, _),) = table.rows([len(table) - 1])
    return row.where.rpartition(":")[0]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps builds of this machine from publishing into a folder at once."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _refuse_others(out: Path, names: Iterable[str]) -> None:
    """Raises FileExistsError where a shard that no build wrote has one of these names."""
    earlier = set(_earlier(out))
    for name in names:
        if (out / name).exists() and name not in earlier:
            raise FileExistsError(f"{out / name}: no build wrote this shard; move it, or choose another folder")


def _earlier(out: Path) -> list[str]:
    """The shards of an earlier build, ended or not."""
    names: list[str] = []
    with suppress(OSError, ValueError, KeyError, TypeError):
        names += json.loads((out / SUMMARY).read_text(encoding="utf-8"))["shards"]
    with suppress(OSError, ValueError):
        names += (out / JOURNAL).read_text(encoding="utf-8").splitlines()
    return [name for name in names if re.fullmatch(r"(caption|interleaved|text|audio)-\d{6,}\.tar", str(name))]


def _remove(out: Path, names: Iterable[str]) -> None:
    """Removes shards, their indices and the summary; nothing else."""
    for name in names:
        for ending in ("", ".index", ".index.copies", ".index.npz"):
            (out / f"{name}{ending}").unlink(missing_ok=True)
    (out / SUMMARY).unlink(missing_ok=True)
