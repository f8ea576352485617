"""`mmllm upcycle`: a dense model becomes one of experts that computes the same, and is trained on from there.

Each MLP becomes E copies of itself (Sparse Upcycling, arXiv 2212.05055), each cut into G slices of its inner width
("Upcycling LLMs into MoE", arXiv 2410.07524), so that E·G experts hold as much as E copies and K·G chosen ones cost as
much as K. Why the logits stay equal:

- The gates of the chosen experts are divided by their sum. With G = 1 the outputs of all copies are the dense output,
  and so is their weighted mean.
- With slices, the dense output is the sum of all G of them, each chosen equally often. So the G rows of the router that
  belong to one copy begin equal: its slices have one score and are chosen together, K copies whole (the paper's virtual
  groups). Their gates sum to 1 over G slices, each slice's therefore to 1 / G, for which the down projections are
  multiplied by G. (By a factor on the gates it would be the same, but few families of transformers have one.)

The first optimizer step moves the equal rows apart. Noise on the copies makes them differ sooner, and the logits too.

Shapes: E copies, G slices a copy, I inner width, D width.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmllm.checkpoints.adapters import saved_adapters
from mmllm.checkpoints.card import ModelInfo, model_card
from mmllm.checkpoints.files import CARD, CONFIG, GENERATION, SOURCE, replaced_folder, write_json
from mmllm.checkpoints.folder import FolderParts, folder_config, read_folder
from mmllm.checkpoints.weights import Tensors, TensorSpec, write_weights
from mmllm.model.decoder import INIT_STD
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.multimodal import ModelConfig, MultimodalModel
from mmllm.model.router import MoEConfig

_DENSE = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Upcycling:
    """How a dense model becomes one of experts.

    Attributes:
        num_copies: E, of each MLP.
        top_k: K, copies that a token passes.
        granularity: G, slices of a copy; E · G experts are made, of which K · G are chosen.
        noise: standard deviation of noise on the experts, as a share of that of the weights; 0: none, and the logits
            stay equal.
        seed: of routers and noise.
    """

    num_copies: int = 8
    top_k: int = 2
    granularity: int = 1
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_copies < 2:
            raise ValueError(f"--experts is {self.num_copies}; give 2 or more")
        if not 1 <= self.top_k <= self.num_copies:
            raise ValueError(f"--top_k is {self.top_k}; it must be between 1 and --experts, {self.num_copies}")
        if self.granularity < 1:
            raise ValueError(f"--granularity is {self.granularity}; give 1 (whole copies) or more")
        if not 0 <= self.noise < float("inf"):
            raise ValueError(f"--noise is {self.noise}; give a share of the weights' own deviation, 0 or more")

    def config(self, dense: DecoderConfig) -> DecoderConfig:
        """The config of the new decoder.

        Raises:
            ValueError: the decoder has experts or biases, or the slices don't come out even.
        """
        if dense.moe is not None and any(map(dense.has_experts, range(dense.num_hidden_layers))):
            raise ValueError("the model has experts already (decoder.moe); wanted a dense one, whose moe is null")
        if dense.mlp_bias:
            raise ValueError("decoder.mlp_bias is true, and experts have no biases; take a model without")
        if dense.intermediate_size % self.granularity:
            raise ValueError(
                f"--granularity is {self.granularity}, which doesn't divide decoder.intermediate_size, "
                f"{dense.intermediate_size}; choose a divisor"
            )
        layers = tuple(layer for layer in range(dense.num_hidden_layers) if not dense.skips_tokens(layer))
        if not layers:
            raise ValueError("decoder.mod_layers names every layer, and those have no experts; leave some out")
        moe = MoEConfig(
            num_experts=self.num_copies * self.granularity,
            num_experts_per_tok=self.top_k * self.granularity,
            moe_intermediate_size=dense.intermediate_size // self.granularity,
        )
        is_all = len(layers) == dense.num_hidden_layers
        return dataclasses.replace(dense, moe=moe, moe_layers="all" if is_all else layers)

    def experts(self, gate_ID: Tensor, up_ID: Tensor, down_DI: Tensor) -> dict[str, Tensor]:
        """The stacks of a layer's experts, [E·G, 2I/G, D] and [E·G, D, I/G]: a copy's slices one after the other."""
        slices = zip(*(w.chunk(self.granularity) for w in (gate_ID, up_ID)), strict=True)
        gate_up = torch.stack([torch.cat(pair) for pair in slices])
        down = torch.stack(down_DI.chunk(self.granularity, dim=1)) * self.granularity
        return {"gate_up_proj": gate_up.repeat(self.num_copies, 1, 1), "down_proj": down.repeat(self.num_copies, 1, 1)}

    def router(self, width: int, generator: torch.Generator) -> Tensor:
        """[E·G, D]: one random row a copy, for each of its slices."""
        rows_ED = torch.randn(self.num_copies, width, generator=generator) * INIT_STD
        return rows_ED.repeat_interleave(self.granularity, dim=0)


def upcycle(model_dir: str | Path, out: str | Path, upcycling: Upcycling) -> list[str]:
    """Writes a model folder of experts from a dense one, a tensor at a time.

    Args:
        model_dir: model folder.
        out: model folder to write; an older one is replaced.
        upcycling: how.

    Returns:
        Lines to print.

    Raises:
        FileNotFoundError: no such model.
        ValueError: it can't be done with this model, or not so that the logits stay equal; or `out` holds something
            else.
    """
    dense = read_folder(model_dir)
    decoder = upcycling.config(dense.config.decoder)
    config = dataclasses.replace(dense.config, decoder=decoder)
    with torch.device("meta"):
        shapes = MultimodalModel(config)
    specs = _specs(dense.checkpoint, shapes)
    _check_exact(upcycling, specs)
    with replaced_folder(Path(out), sources=[Path(model_dir)]) as folder:
        dense.tokenizer.save(folder)
        write_json(folder / CONFIG, folder_config(config, dense.tokenizer, dense.image_transform))
        shutil.copyfile(Path(model_dir) / GENERATION, folder / GENERATION)
        write_weights(folder, specs, _tensors(dense, config, upcycling, specs))
        info = ModelInfo(notes=f"Upcycled from a dense model: {upcycling}.")
        (folder / CARD).write_text(model_card(shapes, dense.tokenizer, info), encoding="utf-8")
        if (Path(model_dir) / SOURCE).is_dir():
            shutil.copytree(Path(model_dir) / SOURCE, folder / SOURCE)
    return list(_lines(out, decoder, shapes, upcycling, saved_adapters(model_dir)))


def _lines(
    out: str | Path, decoder: DecoderConfig, model: MultimodalModel, upcycling: Upcycling, adapters: list[str]
) -> Iterator[str]:
    assert decoder.moe is not None
    yield (
        f"{out}: {decoder.moe.num_experts} experts a layer, {decoder.moe.num_experts_per_tok} a token, of inner width "
        f"{decoder.moe.moe_intermediate_size}; {model.num_parameters():,} parameters, "
        f"{model.num_active_parameters():,} active"
    )
    if upcycling.noise:
        yield f"noise of {upcycling.noise:g} of the weights' deviation: the logits differ from the dense model's"
    else:
        yield "the logits are the dense model's"
    if adapters:
        yield f"left behind: {', '.join(adapters)}, adapters of the dense layers"


def _specs(dense: Tensors, model: MultimodalModel) -> dict[str, TensorSpec]:
    """Of the new tensors, each in the type that the layer's MLP, or the tensor itself, has."""
    found = dense.specs
    specs: dict[str, TensorSpec] = {}
    for name, tensor in model.state_dict().items():
        path = name.rpartition(".mlp.")[0]
        like = found.get(name) or found[f"{path}.mlp.up_proj.weight"]
        specs[name] = TensorSpec(like.dtype, tuple(tensor.shape))
    return specs


def _check_exact(upcycling: Upcycling, specs: dict[str, TensorSpec]) -> None:
    """Refuses slices whose down projections, multiplied by G, would be rounded: the logits would not stay equal."""
    dtype = next(spec.dtype for name, spec in specs.items() if name.endswith(".mlp.experts.down_proj"))
    is_power_of_2 = not upcycling.granularity & (upcycling.granularity - 1)
    if dtype.itemsize < 4 and not is_power_of_2 and not upcycling.noise:
        raise ValueError(
            f"--granularity is {upcycling.granularity} and the weights are {str(dtype).removeprefix('torch.')}, which "
            f"rounds their multiples: the logits would differ from the dense model's; choose a power of 2, or --noise "
            f"above 0, with which they differ anyway"
        )


def _tensors(
    dense: FolderParts, config: ModelConfig, upcycling: Upcycling, specs: dict[str, TensorSpec]
) -> Iterator[tuple[str, Tensor]]:
    checkpoint, decoder = dense.checkpoint, config.decoder
    generator = torch.Generator().manual_seed(upcycling.seed)
    for name in checkpoint.specs:
        if name in specs:
            yield name, checkpoint.read(name)
    for layer in filter(decoder.has_experts, range(decoder.num_hidden_layers)):
        path = f"decoder.layers.{layer}.mlp"
        router = f"{path}.gate.weight"
        yield router, upcycling.router(decoder.hidden_size, generator).to(specs[router].dtype)
        weights = [checkpoint.read(f"{path}.{projection}.weight") for projection in _DENSE]
        for name, stack in upcycling.experts(*weights).items():
            if upcycling.noise:
                noise = torch.randn(stack.shape, generator=generator)
                stack = (stack + noise * upcycling.noise * stack.float().std()).to(stack.dtype)
            yield f"{path}.experts.{name}", stack
