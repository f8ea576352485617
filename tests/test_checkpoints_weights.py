"""Checkpoints a tensor at a time, against safetensors itself."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmllm.checkpoints.weights import INDEX, WEIGHTS, Checkpoint, TensorSpec, write_weights

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


def tensors():
    made = {f"t.{n}": (torch.randn(3, n + 1) * 100).to(dtype) for n, dtype in enumerate(DTYPES)}
    return {**made, "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}


def specs_of(made):
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in made.items()}


def same(found, wanted):
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("max_bytes", [10**9, 100, 1])
def test_what_is_written_in_any_order_is_what_safetensors_reads(tmp_path, max_bytes):
    made = tensors()
    paths = write_weights(tmp_path, specs_of(made), reversed(list(made.items())), max_bytes)
    found = {}
    for path in paths:
        if path.suffix == ".safetensors":
            part = load_file(path)
            assert not set(part) & set(found)
            found |= part
    same(found, made)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.specs == specs_of(made)
    same({name: checkpoint.read(name) for name in checkpoint.specs}, made)
    assert (len(paths) == 1) == (max_bytes == 10**9)


def test_what_safetensors_writes_is_read(tmp_path):
    made = tensors()
    save_file(made, tmp_path / WEIGHTS, metadata={"format": "pt"})
    checkpoint = Checkpoint.open(tmp_path)
    same({name: checkpoint.read(name) for name in checkpoint.specs}, made)
    assert checkpoint.num_bytes == sum(tensor.nbytes for tensor in made.values())


def test_a_tensor_that_never_comes_or_another_is_an_error_of_ours(tmp_path):
    made = tensors()
    with pytest.raises(AssertionError, match="never came"):
        write_weights(tmp_path, specs_of(made), list(made.items())[:-1])
    with pytest.raises(AssertionError, match="twice"):
        write_weights(tmp_path, specs_of(made), [*made.items(), ("scalar", made["scalar"])])


def test_damaged_and_foreign_checkpoints_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        Checkpoint.open(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin alone, a pickle"):
        Checkpoint.open(tmp_path)
    write_weights(tmp_path, specs_of(tensors()), tensors().items())
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="its header speaks of"):
        Checkpoint.open(tmp_path)
    for bad in (b"", b"\xff" * 40, whole[:8] + b"{" + whole[9:20]):
        (tmp_path / WEIGHTS).write_bytes(bad)
        with pytest.raises(ValueError, match="can't be read as safetensors"):
            Checkpoint.open(tmp_path)


def header(path, **changes):
    """Rewrites entries of a header, over the same data."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    entries = json.loads(whole[8 : 8 + length])
    for name, change in changes.items():
        entries[name] = {**entries[name], **change}
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        {"data_offsets": [0.0, 12.0]},
        {"data_offsets": ["0", "12"]},
        {"data_offsets": [0, 4, 12]},
        {"shape": [True, 3]},
        {"shape": [-1, -3]},
        {"shape": [2**32, 2**32], "data_offsets": [0, 0]},
        {"shape": [10**30], "data_offsets": [0, 0]},
        {"shape": None},
        {"dtype": ["F32"]},
        {"dtype": "F4"},
        {"data_offsets": [12, 24]},
    ],
)
def test_headers_that_lie_are_refused(tmp_path, change):
    save_file({"a": torch.zeros(3), "b": torch.ones(3)}, tmp_path / WEIGHTS)
    header(tmp_path / WEIGHTS, a=change)
    with pytest.raises(ValueError, match="can't be read as safetensors"):
        Checkpoint.open(tmp_path)


def test_json_without_end_is_refused(tmp_path):
    (tmp_path / WEIGHTS).write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000)
    with pytest.raises(ValueError, match="can't be read as safetensors"):
        Checkpoint.open(tmp_path)


def test_of_one_file_and_shards_the_file_counts_as_in_transformers(tmp_path):
    made = tensors()
    write_weights(tmp_path, specs_of(made), made.items(), 100)
    save_file({"a": torch.ones(1)}, tmp_path / WEIGHTS)
    assert set(Checkpoint.open(tmp_path).specs) == {"a"}


def test_an_index_and_its_shards_must_fit(tmp_path):
    made = tensors()
    write_weights(tmp_path, specs_of(made), made.items(), 100)
    index = json.loads((tmp_path / INDEX).read_text())
    names = index["weight_map"]

    def write(weight_map):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    write({**names, "ghost": names["t.0"]})
    with pytest.raises(ValueError, match="lacks ghost"):
        Checkpoint.open(tmp_path)
    write({name: shard for name, shard in names.items() if name != "t.0"})
    with pytest.raises(ValueError, match=r"doesn't name t\.0"):
        Checkpoint.open(tmp_path)
    write({**names, "t.0": "../elsewhere.safetensors"})
    with pytest.raises(ValueError, match="wanted a file beside it"):
        Checkpoint.open(tmp_path)
    for wrong in (5, None, ["x"]):
        write(dict.fromkeys(names, wrong))
        with pytest.raises(ValueError, match="no index of shards"):
            Checkpoint.open(tmp_path)
    write(names)
    (tmp_path / names["t.3"]).unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.json names it"):
        Checkpoint.open(tmp_path)
    (tmp_path / INDEX).write_text("[]")
    with pytest.raises(ValueError, match="no index of shards"):
        Checkpoint.open(tmp_path)
