"""What goes wrong with data ends in a clear error, or in a counted, masked, named loss; nothing shifts or hangs."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from mmllm.batch import IGNORE
from mmllm.cli.main import main
from mmllm.data import commands
from mmllm.data.loading import loader as loader_module
from mmllm.data.loading.loader import PackedLoader, StepDataset
from mmllm.data.looking import verify as verify_module
from mmllm.data.plan.plan import open_plan
from mmllm.data.plan.recipe import recipe_from_dict
from mmllm.data.rows.cleaning import CleaningConfig
from mmllm.data.samples.decode import MAX_PIXELS, ImageTransform
from mmllm.data.shards import write as shards
from mmllm.data.shards.tar import scan_tar
from mmllm_tokenizers.folder import TokenizerFolder
from tests.data_fixtures import make_folder, mixed_manifest, recipe_dict, write_manifest, write_picture


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults")
    make_folder(root / "tok")
    commands.build(mixed_manifest(root / "m"), root / "s", root / "tok")
    commands.index(root / "s", root / "tok")
    return root


def loader_of(root: Path, shards_: str, steps: int = 6, workers: int = 0, **changes) -> PackedLoader:
    recipe = recipe_dict(root / "s", root / "tok", **{"on_error": {"max_fraction": 1.0}, **changes})
    recipe["sources"][0]["shards"] = shards_
    folder = TokenizerFolder.load(root / "tok")
    plan = open_plan(recipe_from_dict(recipe), 4, folder)
    return PackedLoader(plan, StepDataset(plan, folder, ImageTransform(folder.image_size)), steps, num_workers=workers)


def copied(made: Path, folder: Path) -> Path:
    for path in (made / "s").glob("caption-000000.tar*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder / "caption-000000.tar"


def check_masked(before: PackedLoader, after: PackedLoader, said: str) -> None:
    """Captions are masked and named; everything else stands where it stood."""
    num_gaps = 0
    for whole, holed in zip(before, after, strict=True):
        is_gap = (whole.document_ids_BT >= 0) & (holed.document_ids_BT < 0)
        assert (holed.labels_BT[is_gap] == IGNORE).all() and (holed.source_BT[is_gap] == -1).all()
        assert (whole.source_BT[is_gap] == 0).all()
        assert (whole.token_ids_BT[~is_gap] == holed.token_ids_BT[~is_gap]).all()
        assert (whole.labels_BT[~is_gap] == holed.labels_BT[~is_gap]).all()
        errors = holed.state.get("errors", [])
        assert bool(errors) == bool(is_gap.any()) and all(said in error for error in errors)
        num_gaps += len(errors)
    assert num_gaps and after.state_dict()["failed"] == num_gaps


@pytest.mark.parametrize("fault", ["vanishes", "is cut", "is another"])
def test_a_shard_that_goes_wrong_after_the_plan_was_opened(made, tmp_path, fault):
    shard = copied(made, tmp_path)
    before, after = loader_of(made, str(shard)), loader_of(made, str(shard))
    wanted = list(before)
    match fault:
        case "vanishes":
            shard.unlink()
        case "is cut":
            os.truncate(shard, shard.stat().st_size // 3)
        case _:
            shard.write_bytes(b"\0" * shard.stat().st_size)
    check_masked(_Given(wanted), after, "caption-000000.tar")  # pyright: ignore[reportArgumentType]
    with pytest.raises((ValueError, FileNotFoundError), match=r"caption-000000\.tar"):
        loader_of(made, str(shard))


class _Given(list):
    """Batches that were read before."""


def test_decompression_bombs_are_masked(made, tmp_path):
    manifest = tmp_path / "m"
    manifest.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for number in range(6):
        write_picture(manifest / f"{number}.png", rng)
        rows.append({"id": f"r{number}", "image": f"{number}.png", "text": "a red square"})
    side = int(MAX_PIXELS**0.5) + 10
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    (manifest / "bomb.png").write_bytes((tmp_path / "bomb.png").read_bytes())
    bomb = {"id": "bomb", "image": "bomb.png", "text": "a red square"}
    told = commands.build(write_manifest(manifest, [*rows, bomb]), tmp_path / "b", max_bad_fraction=0.5)
    assert told["num_bad"] == 1 and "pixels" in told["bad"][0]
    commands.build(write_manifest(manifest, rows), tmp_path / "s")
    shard = tmp_path / "s" / "caption-000000.tar"
    files = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            files[member.name] = tar.extractfile(member).read()  # pyright: ignore[reportOptionalMemberAccess]
    files["r3.png"] = (tmp_path / "bomb.png").read_bytes()
    with tarfile.open(shard, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    commands.index(shard, made / "tok")
    errors = [error for batch in loader_of(made, str(shard)) for error in batch.state.get("errors", [])]
    assert errors and all("r3" in error and "pixels" in error for error in errors)


def test_a_full_disk_leaves_no_half_shard_that_looks_whole(tmp_path, monkeypatch):
    manifest = write_manifest(tmp_path, [{"id": f"r{n}", "text": "word " * 2000} for n in range(40)])

    class Full(io.FileIO):
        def write(self, data):
            if self.tell() > 50_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(shards, "_open_new", lambda path: Full(path, "w"))
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            commands.build(manifest, tmp_path / "s", samples_per_shard=10)
        assert not list((tmp_path / "s").iterdir())
    monkeypatch.undo()
    told = commands.build(manifest, tmp_path / "s")
    assert told["num_samples"] == 40 and len(list(scan_tar(tmp_path / "s" / "text-000000.tar"))) == 40
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["shards.json", "text-000000.tar"]


KILLED = """
import os, signal, sys
from pathlib import Path
from mmllm.data import commands

replace, targets = Path.replace, []

def replace_two(path, target):
    targets.append(target)
    if len(targets) == 4:  # the journal came first
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(path, target)

Path.replace = replace_two
commands.build(sys.argv[1], sys.argv[2], samples_per_shard=2)
"""
"""A build that is killed when two of its shards have their names."""


def test_a_disk_that_fills_at_the_summary_leaves_no_shards(tmp_path, monkeypatch):
    manifest = write_manifest(tmp_path, [{"id": f"r{n}", "text": "word"} for n in range(6)])
    out = tmp_path / "s"
    opened = shards._open_new

    class Full(io.FileIO):
        def write(self, data):
            super().write(data[:40])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(
        shards, "_open_new", lambda path: Full(path, "w") if path.name.startswith(shards.SUMMARY) else opened(path)
    )
    with pytest.raises(OSError, match="No space left"):
        commands.build(manifest, out, samples_per_shard=2)
    assert not list(out.iterdir())

    monkeypatch.undo()
    commands.build(manifest, out, samples_per_shard=3)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(manifest), str(out)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(out.glob("*.tar"))) == 2 and not (out / shards.SUMMARY).exists()
    make_folder(tmp_path / "tok")
    with pytest.raises(ValueError, match="a build was killed while it moved its shards here"):
        commands.index(out, tmp_path / "tok")
    (out / f"{shards.SUMMARY}.partial").write_text("{")
    commands.build(write_manifest(tmp_path, [{"id": "only", "text": "new"}]), out)
    assert sorted(path.name for path in out.iterdir()) == ["shards.json", "text-000000.tar"]


def test_a_build_that_fails_leaves_the_earlier_one(tmp_path):
    out = tmp_path / "s"
    commands.build(write_manifest(tmp_path, [{"id": f"r{n}", "text": "word"} for n in range(6)]), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def stop(count: int, num_rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        commands.build(write_manifest(tmp_path, [{"text": "other"}]), out, progress=stop)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_what_keeps_a_build_from_its_folder_costs_no_shards(tmp_path, monkeypatch):
    out, manifest = tmp_path / "s", write_manifest(tmp_path, [{"id": f"r{n}", "text": "word"} for n in range(6)])
    commands.build(manifest, out, samples_per_shard=2)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    opened = shards._open_new

    def full(path: Path) -> io.IOBase:
        if path.name.startswith(shards.JOURNAL):
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path)

    monkeypatch.setattr(shards, "_open_new", full)
    with pytest.raises(OSError, match="No space left"):
        commands.build(manifest, out)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "text-000003.tar").write_bytes(b"another's")
    with pytest.raises(FileExistsError, match=r"text-000003\.tar: no build wrote this shard"):
        commands.build(manifest, out, samples_per_shard=1)
    (out / "text-000003.tar").unlink()
    (out / shards.STAGING).symlink_to(tmp_path)
    commands.build(manifest, out, samples_per_shard=2)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_faults_of_the_machine_are_no_bad_rows(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    rows = [{"id": str(n), "image": f"{n}.png", "text": "a"} for n in range(40)]
    for row in rows:
        write_picture(tmp_path / row["image"], rng)
    manifest, read = write_manifest(tmp_path, rows), Path.read_bytes

    def fails(number: int) -> None:
        def failing(path: Path) -> bytes:
            if path.name == "7.png":
                raise OSError(number, os.strerror(number), str(path))
            return read(path)

        monkeypatch.setattr(Path, "read_bytes", failing)

    for number in (errno.EMFILE, errno.EIO, errno.ESTALE, errno.ENOENT):
        fails(number)
        with pytest.raises(OSError, match=os.strerror(number)):
            commands.build(manifest, tmp_path / "s")
    fails(errno.EACCES)
    assert commands.build(manifest, tmp_path / "s")["num_bad"] == 1
    monkeypatch.undo()
    opened = Path.open

    def closed(path: Path, *args: object, **options: object) -> object:
        if path.name == "7.png":
            raise OSError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *args, **options)  # pyright: ignore

    monkeypatch.setattr(Path, "open", closed)
    told = commands.build(manifest, tmp_path / "s", cleaning=CleaningConfig("exact"))
    assert told["num_bad"] == 1 and "7.png" in told["bad"][0]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.ENOSPC, "No space left on device"),
        MemoryError("no"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)  # fmt: skip
def test_what_the_machine_has_no_more_of_is_no_broken_sample(made, monkeypatch, error):
    loader = loader_of(made, str(made / "s" / "caption-000000.tar"))

    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(loader_module, "build_document", failing)
    with pytest.raises(type(error)) as caught:
        list(loader)
    assert caught.value is error
    monkeypatch.setattr(verify_module, "build_document", failing)
    with pytest.raises(type(error)) as caught:
        commands.verify(made / "s" / "caption-000000.tar", made / "tok")
    assert caught.value is error


def test_a_publish_that_stops_gives_the_shards_back(tmp_path, monkeypatch):
    """Elsewhere, they would have to be written again."""
    manifest = write_manifest(tmp_path, [{"id": f"r{n}", "text": "word"} for n in range(6)])
    replace, moved = Path.replace, []

    def failing(path: Path, target: Path) -> Path:
        moved.extend([path] if path.suffix == ".tar" else [])
        if len(moved) == 3:
            raise OSError(errno.EIO, "Input/output error")
        return replace(path, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(shards.shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(Path, "replace", failing)
        commands.build(manifest, tmp_path / "s", samples_per_shard=2)
    assert len(moved) == 5 and all(path.is_file() for path in moved[:3])
    assert [path.name for path in (tmp_path / "s").iterdir()] == [shards.STAGING]


def test_verify_counts_what_cannot_be_written_and_goes_on(made, tmp_path, capsys):
    picture = (made / "m" / "0.png").read_bytes()

    def put(name: str, files: dict[str, bytes]) -> None:
        with tarfile.open(tmp_path / name, "w", format=tarfile.USTAR_FORMAT) as tar:
            for path, data in files.items():
                member = tarfile.TarInfo(path)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))

    put("a.tar", {"x.png": picture, "y.png": picture})
    put("b.tar", {"x.png": picture, "x.txt": b"red", "y.png": picture, "y.txt": b"", "z.png": picture})
    put("c.tar", {"x.txt": b"red", "y.txt": b"blue"})
    told = commands.verify(tmp_path, made / "tok")
    assert (told["documents"], told["broken"]) == (7, 4)
    assert [error.partition(":")[2].partition(":")[0] for error in told["errors"]] == ["x", "y", "y", "z"]
    assert all("can't be written as caption: its text is missing" in error for error in told["errors"])
    assert commands.verify(tmp_path, made / "tok", workers=2) == told
    assert len(commands.verify(tmp_path, made / "tok", max_named=3)["errors"]) == 3

    command = ["data", "verify", str(tmp_path), "--tokenizer", str(made / "tok")]
    assert main([*command, "--max_named", "3"]) == 2
    said = capsys.readouterr()
    assert [line.startswith(str(tmp_path)) for line in said.out.splitlines()] == [True] * 3
    assert "4 samples or shards are broken, of 7" in said.err and "--max_named 4 names all" in said.err
    assert main(command) == 2 and len(capsys.readouterr().out.splitlines()) == 4


def test_verify_says_what_a_deaf_tokenizer_cannot_write(made, tmp_path):
    for kind in ("audio", "interleaved"):
        (tmp_path / f"{kind}.tar").write_bytes((made / "s" / f"{kind}-000000.tar").read_bytes())
    folder = TokenizerFolder.load(made / "tok")
    TokenizerFolder(folder.text, None, folder.config).save(tmp_path / "deaf")
    told = commands.verify(sorted(tmp_path.glob("*.tar")), tmp_path / "deaf", max_named=1000)
    assert told["broken"] == told["documents"] == len(told["errors"]) == 48
    assert all("the tokenizer folder has no audio tokenizer" in error for error in told["errors"])


def test_what_a_killed_build_left_is_removed_by_the_next(tmp_path):
    manifest = write_manifest(tmp_path, [{"id": f"r{n}", "text": "word"} for n in range(6)])

    def stop(count: int, num_rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        commands.build(manifest, tmp_path / "s", samples_per_shard=2, progress=stop)
    out = tmp_path / "s"
    assert not list(out.iterdir())
    (out / shards.JOURNAL).write_text("text-000004.tar\n../other.tar\n")  # as SIGKILL leaves it
    (out / "text-000004.tar").write_bytes(b"whole, but of a build that never ended")
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = out / shards.STAGING / f"of-{socket.gethostname()}-{dead.pid}-abc" / "text-000001"
    left.mkdir(parents=True)
    (left / "000000.tar").write_bytes(b"half")
    (tmp_path / "other.tar").write_bytes(b"mine")
    commands.build(manifest, out)
    assert sorted(path.name for path in out.iterdir()) == ["shards.json", "text-000000.tar"]
    assert (tmp_path / "other.tar").exists()


# PyTorch's own handler may raise a second time while the loader is taken down.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_that_is_killed_ends_the_run_with_an_error(made):
    loader = loader_of(made, str(made / "s" / "caption-000000.tar"), steps=200, workers=1)
    stream = iter(loader)
    next(stream)
    children = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    workers = [child for child in children if "multiprocessing" not in " ".join(child.cmdline())]
    assert workers
    began = time.monotonic()
    for worker in workers:
        worker.kill()
    with pytest.raises(RuntimeError, match=r"worker .*(killed|exited)"):
        for _ in stream:
            pass
    assert time.monotonic() - began < 120


def test_keys_with_dots_go_the_whole_way(made, tmp_path):
    rows = [{"id": name, "text": f"text {number}"} for number, name in enumerate(("a.b", "a.c", "a", "v1.2.txt"))]
    commands.build(write_manifest(tmp_path, rows), tmp_path / "s")
    told = commands.index(tmp_path / "s", made / "tok")
    assert told["documents"] == 4 and commands.verify(tmp_path / "s", made / "tok")["broken"] == 0
    ids = []
    with tarfile.open(tmp_path / "s" / "text-000000.tar") as tar:
        for name in tar.getnames():
            if name.endswith(".json"):
                ids.append(json.load(tar.extractfile(name))["id"])  # pyright: ignore[reportArgumentType]
    assert ids == [row["id"] for row in rows]


def test_an_index_of_another_tokenizer_is_refused(made, tmp_path):
    make_folder(tmp_path / "tok", image_size=24)
    recipe = recipe_dict(made / "s", tmp_path / "tok")
    with pytest.raises(ValueError, match=r"source 'caption'.*was made with tokenizer"):
        open_plan(recipe_from_dict(recipe), 4)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    manifest = write_manifest(tmp_path, [{"text": "word"}])
    (tmp_path / "file").write_bytes(b"x")
    where = re.escape(str(tmp_path))
    with pytest.raises(OSError, match=f"^{where}/file: this folder can't be made, because it is there and"):
        commands.build(manifest, tmp_path / "file")
    with pytest.raises(OSError, match=f"^{where}/file/x/y: .*because {where}/file is there and is no folder; choose"):
        commands.build(manifest, tmp_path / "file" / "x" / "y")
    with pytest.raises(OSError, match=r"the system makes none in .* \(File name too long\); choose another by --out"):
        commands.build(manifest, tmp_path / "new" / ("x" * 300))
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(OSError, match="link: this folder can't be made, because it is there and is no folder"):
        commands.build(manifest, tmp_path / "link")


def test_a_build_without_a_manifest_leaves_no_folders(tmp_path):
    with pytest.raises(FileNotFoundError):
        commands.build(tmp_path / "missing.jsonl", tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
