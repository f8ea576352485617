"""`engine: mergekit`: the same tensors, merged by mergekit (https://github.com/arcee-ai/mergekit) as a process.

mergekit is an optional extra under the LGPL and is never imported here. It is given one file of tensors a parent, with
adapters added and experts in one order, in float32; its parameters are those of the YAML, resolved for each tensor
(`mergekit-pytorch` knows no layers and so no gradients). What it does otherwise than the formulas here: DARE and DELLA
draw by its own seed, and are rescaled to the sum of magnitudes that the change had instead of by the chance to stay.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from mmllm.checkpoints.weights import Checkpoint, TensorSpec, write_weights
from mmllm.interop.merging.folder import MergeReport, count
from mmllm.interop.merging.formulas import Numbers
from mmllm.interop.merging.parents import Parent
from mmllm.interop.merging.settings import MergeConfig

COMMAND = "mergekit-pytorch"
_ONE_FILE = 1 << 62
_OF_MODELS: dict[str, Callable[[Numbers], tuple[float, ...]]] = {
    "weight": lambda numbers: numbers.weights,
    "density": lambda numbers: numbers.densities,
    "epsilon": lambda numbers: numbers.epsilons,
}
_SHARED: dict[str, Callable[[Numbers], Any]] = {
    "t": lambda numbers: numbers.t,
    "lambda": lambda numbers: numbers.scale,
    "normalize": lambda numbers: numbers.normalize,
    "rescale": lambda numbers: numbers.rescale,
    "filter_wise": lambda numbers: numbers.filter_wise,
}


def mergekit_command() -> str:
    """Where the program is.

    Raises:
        ModuleNotFoundError: it isn't installed.
    """
    found = shutil.which(COMMAND, path=str(Path(sys.executable).parent)) or shutil.which(COMMAND)
    if found is None:
        raise ModuleNotFoundError(
            "engine is mergekit, which is not installed; pip install 'mmllm[mergekit]', or leave engine out: the same "
            "methods are built in"
        )
    return found


def run_mergekit(config: MergeConfig, parents: list[Parent], report: MergeReport) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of a merged model; those in which the parents differ come from mergekit.

    Raises:
        ModuleNotFoundError: without mergekit.
        ValueError: it ended with an error, of which the last lines are told.
    """
    command = mergekit_command()
    differ: list[str] = []
    for name in parents[0].specs:
        tensors = [parent.read(name) for parent in parents]
        if count(report, name, tensors):
            differ.append(name)
        else:
            yield name, tensors[0]
    if not differ:
        return
    with tempfile.TemporaryDirectory(prefix="mmllm-merge-") as made:
        work = Path(made)
        specs = {name: TensorSpec(torch.float32, parents[0].specs[name].shape) for name in differ}
        files: dict[str, str] = {}
        for place, parent in enumerate(parents):
            folder = work / f"parent-{place}"
            folder.mkdir()
            read = ((name, parent.read(name).float()) for name in differ)
            files[parent.path] = str(write_weights(folder, specs, read, _ONE_FILE)[0])
        (work / "merge.yaml").write_text(yaml.safe_dump(_config(config, parents[0], files, differ)), encoding="utf-8")
        _run([command, str(work / "merge.yaml"), str(work / "out"), "--safe-serialization", "--random-seed",
              str(config.seed)])  # fmt: skip
        out = Checkpoint.open(work / "out")
        for name in differ:
            yield name, out.read(name)


def _run(command: list[str]) -> None:
    settings = {"HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}  # it draws in the order of a set of names
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings, check=False)
    if done.returncode:
        said = " | ".join(line.strip() for line in done.stderr.strip().splitlines()[-3:])
        raise ValueError(f"{' '.join(command)} ended with code {done.returncode}: {said}")


def _config(config: MergeConfig, first: Parent, files: dict[str, str], names: list[str]) -> dict[str, Any]:
    """Mergekit's own YAML: its parameters tensor by tensor."""
    num_layers = first.parts.config.decoder.num_hidden_layers
    numbers = {name: config.numbers(name, num_layers) for name in names}
    models = [
        {
            "model": files[path],
            "parameters": {
                key: _setting({name: get(numbers[name])[place] for name in names})
                for key, get in _OF_MODELS.items()
                if key in config.rule.of_models
            },
        }
        for place, path in enumerate(config.parents)
    ]
    if config.base is not None:
        models.insert(0, {"model": files[config.base]})
    shared = {
        key: _setting({name: get(numbers[name]) for name in names})
        for key, get in _SHARED.items()
        if key in config.rule.shared
    }
    base = {} if config.base is None else {"base_model": files[config.base]}
    return {"merge_method": config.method, **base, "models": models, "parameters": shared, "dtype": "float32"}


def _setting(values: dict[str, Any]) -> Any:
    """One value where all are equal, else one a tensor: longer names first, since a filter is a part of a name."""
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    return [{"filter": name, "value": values[name]} for name in sorted(values, key=len, reverse=True)]
