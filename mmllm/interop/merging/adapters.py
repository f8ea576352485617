"""Several LoRAs of one base in one, by PEFT's methods (`add_weighted_adapter`).

The formulas are PEFT's own functions (`peft.utils.merge_utils`), on the matrices of one weight at a time. Of stacks of
experts each expert is merged by itself, as if it were a linear layer: PEFT's own method would mix up their rows (cat)
or refuses them (svd). What is drawn (dare_…) depends on seed, weight and expert alone.

Shapes: E experts (1 of a linear layer), R rank, I inputs, O outputs.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm.checkpoints.adapters import BASE, CONFIG, WEIGHTS, adapter_folder, base_facts, check_name, saved_adapters
from mmllm.checkpoints.files import ADAPTERS, CARD, replaced_folder, write_json
from mmllm.checkpoints.peft_library import peft_library
from mmllm.checkpoints.weights import Checkpoint
from mmllm.interop.merging.folder import MergeReport, card_notes, check_new, generator_for
from mmllm.interop.merging.lora import Lora, Pair, joined
from mmllm.interop.merging.parents import Parent, open_parents
from mmllm.interop.merging.settings import MergeConfig
from mmllm_tokenizers.tensor_file import save_tensors


def merge_adapters(config: MergeConfig, out: str | Path, is_check: bool = False) -> MergeReport:
    """Writes a copy of the base's model folder with one more adapter, made of others.

    Args:
        config: whose `models` are `DIR+NAME`, `base_model` is the folder and `adapter` the new one's name.
        out: model folder to write; it is new or empty.
        is_check: write nothing, say what would be done.

    Raises:
        FileNotFoundError: no such model, or no such adapter.
        ValueError: an adapter has another base, another kind, or ranks that the method can't merge; or `out` isn't
            empty.
        ModuleNotFoundError: without PEFT.
    """
    assert config.adapter is not None and config.base is not None
    out, name = check_new(out), config.adapter
    check_name(name)
    base, *parents = open_parents([config.base, *config.parents])
    if base.lora is not None:
        raise ValueError(f"base_model is {config.base}, a folder with an adapter; name the folder alone")
    if name in saved_adapters(base.folder):
        raise ValueError(f"adapter is {name!r}, which {base.path} has already; give the new one another name")
    loras = [_lora(parent) for parent in parents]
    _check_bases(base, parents)
    method = _Method(config, loras)
    report = MergeReport(str(out), config.method, [parent.path for parent in parents])
    tensors: dict[str, Tensor] = {}
    weights = sorted({weight for lora in loras for weight in lora.weights})
    for weight in weights:
        having = [place for place, lora in enumerate(loras) if weight in lora.weights]
        keys = loras[having[0]].keys(weight)
        if any(loras[place].keys(weight) != keys for place in having):
            raise ValueError(
                f"{' and '.join(parents[place].path for place in having)} keep {weight} under other names; train "
                f"adapters with the same target_parameters"
            )
        a_ERI, b_EOR = method.merged(weight, having)
        tensors[keys["A"]], tensors[keys["B"]] = joined(a_ERI, b_EOR)
        report.num_parameters += a_ERI.numel() + b_EOR.numel()
    report.num_merged = len(weights)
    if is_check:
        return report
    with replaced_folder(out, sources=[base.folder]) as folder:
        shutil.copytree(base.folder, folder, dirs_exist_ok=True)
        target = folder / ADAPTERS / name
        target.mkdir(parents=True)
        dtype = base.parts.checkpoint.specs["decoder.embed_tokens.weight"].dtype
        plain = {key: tensor.to(dtype).contiguous().clone() for key, tensor in tensors.items()}
        save_tensors(plain, target / WEIGHTS, metadata={"format": "pt"})
        write_json(target / CONFIG, json.loads(json.dumps(method.config(weights), default=str)))
        write_json(target / BASE, base_facts(Checkpoint.open(base.folder), base.parts.config.decoder))
        card = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else ""
        parents_lines = "".join(f"- {parent.line()}\n" for parent in parents)
        added = f"\n## Adapter {name}\n\n{config.method} of:\n\n{parents_lines}\n{card_notes(config.text)}\n"
        (folder / CARD).write_text(card + added, encoding="utf-8")
    return report


class _Method:
    """PEFT's `combination_type`, with its parameters."""

    def __init__(self, config: MergeConfig, loras: list[Lora]) -> None:
        self.name, self.seed, self.loras = config.method, config.seed, loras
        part = config.parts[0]
        levels = [{**config.parameters, **part.models[model]} for model in config.parents]
        for model, values in zip(config.parents, levels, strict=True):
            if any(isinstance(value, list) for value in values.values()):
                raise ValueError(f"{model} has gradients or filters; merges of adapters have one number for all")
        self.weights = [float(values.get("weight", 1.0)) for values in levels]
        shared = dict(config.parameters)
        self.density = shared.get("density")
        own = [key for values in part.models.values() for key in values if key != "weight"]
        if own:
            raise ValueError(f"{own[0]} is given for one model; adapters have it in common: put it into parameters")
        self.majority_sign_method = shared.get("majority_sign_method", "total")
        ranks = [int(lora.values["r"]) for lora in loras]
        takes_density = self.name not in ("svd", "linear", "cat")
        if takes_density and self.density is None:
            raise ValueError(f"density is missing; {self.name} needs it: put it into parameters")
        if takes_density and not self.density:
            raise ValueError(f"density is 0, with which {self.name} keeps nothing; give a share above 0")
        if self.name.endswith("svd"):
            self.rank = int(shared.get("svd_rank", max(ranks)))
        elif self.name == "cat":
            self.rank = sum(ranks)
        elif len(set(ranks)) > 1:
            raise ValueError(
                f"the adapters have ranks {', '.join(map(str, ranks))}; {self.name} wants equal ones: take svd or cat"
            )
        else:
            self.rank = ranks[0]

    def config(self, weights: list[str]) -> dict[str, Any]:
        """The new adapter's, with a scaling of 1."""
        values = {**self.loras[0].values, "r": self.rank, "lora_alpha": self.rank, "use_rslora": False}
        values |= {"rank_pattern": {}, "alpha_pattern": {}, "inference_mode": True}
        for key in ("target_modules", "target_parameters"):
            targets = [lora.values.get(key) or [] for lora in self.loras]
            if any(isinstance(each, str) for each in targets):  # a pattern: PEFT allows one
                names = sorted({weight.removesuffix(".weight") for weight in weights if ".experts." not in weight})
                values[key] = names if key == "target_modules" else None
                continue
            found = list(dict.fromkeys(target for each in targets for target in each))
            values[key] = (sorted(found) if key == "target_modules" else found) or None
        return values

    def merged(self, weight: str, having: list[int]) -> tuple[Tensor, Tensor]:
        """The new matrices of a weight, A [E, R, I] and B [E, O, R]."""
        pairs = [self.loras[place].pair(weight) for place in having]
        numbers = [self.weights[place] for place in having]
        made = []
        for expert in range(len(pairs[0].a_ERI)):
            own = [Pair(pair.a_ERI[expert, None], pair.b_EOR[expert, None], pair.scaling) for pair in pairs]
            with torch.random.fork_rng(devices=[]):  # PEFT draws from the global generator
                torch.manual_seed(generator_for(self.seed, weight, expert).initial_seed())
                made.append(self._of_one(own, numbers))
        return torch.stack([a for a, _ in made]), torch.stack([b for _, b in made])

    def _of_one(self, pairs: list[Pair], numbers: list[float]) -> tuple[Tensor, Tensor]:
        if self.name == "cat":
            a_RI = torch.cat([pair.a_ERI[0] * number * pair.scaling for pair, number in
                              zip(pairs, numbers, strict=True)])  # fmt: skip
            b_OR = torch.cat([pair.b_EOR[0] for pair in pairs], dim=1)
            missing = self.rank - len(a_RI)  # where an adapter lacks the weight
            return torch.nn.functional.pad(a_RI, (0, 0, 0, missing)), torch.nn.functional.pad(b_OR, (0, missing))
        if self.name.endswith("svd"):
            changes = [pair.change()[0] for pair in pairs]
            change_OI = self._combined(self.name.removesuffix("svd").removesuffix("_"), changes, numbers)
            u_OK, s_K, v_KI = torch.linalg.svd(change_OI, full_matrices=False)
            missing = max(self.rank - len(s_K), 0)
            b_OR, a_RI = u_OK[:, : self.rank] * s_K[: self.rank], v_KI[: self.rank]
            return torch.nn.functional.pad(a_RI, (0, 0, 0, missing)), torch.nn.functional.pad(b_OR, (0, missing))
        # A product of two sums: each side takes the root of a weight, and the sign goes to one of them.
        scaled = [number * pair.scaling for pair, number in zip(pairs, numbers, strict=True)]
        sides = [
            ([pair.a_ERI[0] for pair in pairs], [math.copysign(math.sqrt(abs(each)), each) for each in scaled]),
            ([pair.b_EOR[0] for pair in pairs], [math.sqrt(abs(each)) for each in scaled]),
        ]
        a_RI, b_OR = (self._combined(self.name, tensors, roots) for tensors, roots in sides)
        return a_RI, b_OR

    def _combined(self, name: str, tensors: list[Tensor], numbers: list[float]) -> Tensor:
        """PEFT's function on tensors, weighted."""
        peft_library()
        from peft.utils import merge_utils

        weights = torch.tensor(numbers)
        if name in ("", "linear"):
            return merge_utils.task_arithmetic(tensors, weights)
        assert self.density is not None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The density .* is greater than or equal to 1")
            if name in ("ties", "dare_ties"):
                function = {"ties": merge_utils.ties, "dare_ties": merge_utils.dare_ties}[name]
                return function(tensors, weights, self.density, self.majority_sign_method)
            functions = {"dare_linear": merge_utils.dare_linear, "magnitude_prune": merge_utils.magnitude_prune}
            return functions[name](tensors, weights, self.density)


def _lora(parent: Parent) -> Lora:
    if parent.lora is None:
        raise ValueError(f"{parent.path} names no adapter; with adapter given, models are DIR+NAME")
    adapter_folder(parent.folder, parent.lora.name)
    return parent.lora


def _check_bases(base: Parent, parents: list[Parent]) -> None:
    """Raises ValueError where an adapter was trained beside other weights than the base's."""
    for parent in parents:
        if parent.folder.resolve() == base.folder.resolve():
            continue
        for name in base.specs:
            if not torch.equal(base.parts.checkpoint.read(name), parent.parts.checkpoint.read(name)):
                raise ValueError(
                    f"{name} is another in {parent.folder} than in {base.path}: the adapter was trained beside other "
                    f"weights; merge the models instead, without adapter"
                )
