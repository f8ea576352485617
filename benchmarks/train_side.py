"""One checkout of this project as `benchmarks/train.py` measures it: a process that does one round when it is told to.

    python benchmarks/train_side.py fit '{"kind": "text", …}'

Run with the checkout's packages on PYTHONPATH, so it may be another revision than this file: what it calls is what
changes least (YAML through `build_cli`, Lightning's loop, checkpoints of transformers), and where names have changed
both are known. A request is a line of JSON on stdin, an answer one on stdout. The process ends with its stdin.

Shapes: B sequences, T positions, D width.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import train_requests
import yaml
from train_documents import Packed, Shape, packed, ragged
from train_names import blocks_of, embedding_of, head_of, load_weights, named
from train_requests import serve, synchronize

NUM_BATCHES = 8
"""Of the demo's data, in turn."""
WITHOUT = ("Progress", "ModelCheckpoint", "RoutingLog", "Samples")
"""Callbacks of the demo that write to disk or to the terminal, and take no part in a step."""
PROMPT, NEW_TOKENS = 32, 32
"""Tokens in the cache when decoding starts, and tokens decoded in a round."""


# --- batches ------------------------------------------------------------------------------------------------------


def text_batch(documents: Packed) -> Any:
    """Documents as a batch of text alone, with whatever the collator would have made of it on the host."""
    from mmllm import batch as contracts

    size = documents.ids_BT.shape
    tensors = {
        "token_ids_BT": documents.ids_BT, "labels_BT": documents.labels_BT, "positions_BT": documents.positions_BT,
        "document_ids_BT": documents.document_ids_BT,
    }  # fmt: skip
    values: dict[str, Any] = {name: torch.from_numpy(array) for name, array in tensors.items()}
    values |= {
        "modality_BT": torch.zeros(size, dtype=torch.int64),
        "source_BT": values["document_ids_BT"].clamp(max=0),
        "audio_codes_BTK": torch.full((*size, 1), -1),
        "audio_labels_BTK": torch.full((*size, 1), contracts.IGNORE),
        "images_NCHW": torch.zeros(0, 3, 8, 8, dtype=torch.uint8),
        "image_slots_NS": torch.zeros(0, 1, dtype=torch.int64),
        "clip_codes_CFK": torch.zeros(0, 1, 1, dtype=torch.int64),
        "clip_slots_CS": torch.zeros(0, 1, dtype=torch.int64),
        "clip_targets_CL": torch.zeros(0, 1, dtype=torch.int64),
    }
    known = {each.name for each in dataclasses.fields(contracts.PackedBatch)}
    batch: Any = contracts.PackedBatch(**{name: value for name, value in values.items() if name in known})
    return batch.with_metadata() if hasattr(batch, "with_metadata") else batch


class InTurn:
    """Batches one after the other, without an end."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return cycle(self.batches)


# --- training -----------------------------------------------------------------------------------------------------


def text_config(shape: Shape, device: str, settings: dict[str, Any]) -> dict[str, Any]:
    """A decoder alone that computes what Mixtral does, moved by AdamW at one small rate; its loss is cross-entropy."""
    decoder = {
        "vocab_size": shape.vocab_size, "hidden_size": shape.hidden_size, "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads, "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim, "tie_word_embeddings": False, "qk_norm": False,
        "moe": {
            "num_experts": shape.num_experts, "num_experts_per_tok": shape.num_experts_per_tok,
            "moe_intermediate_size": shape.moe_intermediate_size, "router_aux_loss_coef": 0.0,
            "router_z_loss_coef": 0.0,
        },
    }  # fmt: skip
    decoder |= settings.get("decoder", {})
    optimizer = {"lr": 1e-5, "weight_decay": 0.0, "warmup": 0.0, "min_lr_ratio": 1.0, "muon": False}
    return {
        "trainer": {**_trainer(device), **settings.get("trainer", {})},
        "model": {
            "class_path": "mmllm.training.decoder_module.DecoderModule",
            "init_args": named({"decoder": decoder, "optimizer": optimizer}),
        },
        "data": {"class_path": "lightning.pytorch.LightningDataModule"},  # one has to be named; batches are made here
    }


def demo_config(root: Path, folder: Path, device: str) -> dict[str, Any]:
    """The checkout's own quickstart config over the folder of a quickstart, without what writes to disk."""
    text = (root / "configs" / "quickstart" / "decoder.yaml").read_text()
    config = yaml.safe_load(text.replace("runs/demo/", f"{folder}/"))
    callbacks = config["trainer"].get("callbacks", [])
    callbacks = [each for each in callbacks if each["class_path"].rpartition(".")[2] not in WITHOUT]
    config["trainer"] |= {**_trainer(device), "callbacks": callbacks}
    config["model"]["init_args"] |= {"out": None, "max_seconds": None}
    config["data"]["init_args"] |= {"num_workers": 0}
    return config


def _trainer(device: str) -> dict[str, Any]:
    return {
        "accelerator": "gpu" if device == "cuda" else "cpu", "devices": 1,
        "precision": "bf16-mixed" if device == "cuda" else "32-true", "max_steps": 10**9, "gradient_clip_val": 1.0,
        "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "num_sanity_val_steps": 0, "limit_val_batches": 0,
    }  # fmt: skip


def fit(settings: dict[str, Any]) -> None:
    """Trains by Lightning's own loop, which waits for a request before each step.

    Args:
        settings: `kind` "text" or "demo"; `device`; `shape`, `weights` (a folder of transformers' Mixtral) and other
            keys of `decoder` and `trainer` of text; `folder` of a finished quickstart and `root` of the checkout of the
            demo; `without_layers` takes the layers out, so that embedding, head and loss are left.
    """
    from train_rounds import Rounds

    from mmllm.training.lightning_cli import build_cli, quiet_lightning

    device, shape = settings["device"], Shape(**settings.get("shape", {"name": "demo"}))
    if settings["kind"] == "text":
        config = text_config(shape, device, settings)
    else:
        config = demo_config(Path(settings["root"]), Path(settings["folder"]), device)
    with tempfile.TemporaryDirectory() as work, quiet_lightning():
        path = Path(work) / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        cli = build_cli(["-c", str(path)], run=False)
        rounds: Any = Rounds(device, settings.get("weights"), settings.get("without_layers", False))
        cli.trainer.callbacks.append(rounds)  # pyright: ignore[reportAttributeAccessIssue]
        if settings["kind"] == "text":
            cli.trainer.fit(cli.model, train_dataloaders=InTurn([text_batch(_documents(settings, shape))]))
        else:
            data: Any = cli.datamodule
            make_loader = data.train_dataloader
            data.train_dataloader = lambda: InTurn(list(islice(make_loader(), NUM_BATCHES)))
            cli.trainer.fit(cli.model, datamodule=data)


def _documents(settings: dict[str, Any], shape: Shape) -> Packed:
    if "num_targets" not in settings:
        return ragged(shape)
    lengths = [(settings["num_targets"] // shape.num_sequences + 1,)] * shape.num_sequences
    return packed(lengths, lengths[0][0], shape.vocab_size, np.random.default_rng(0))


# --- decoding -----------------------------------------------------------------------------------------------------


def decode(settings: dict[str, Any]) -> None:
    """Decodes tokens by the whole decoder with its cache, and by the kernel of one layer, with weights of two dtypes.

    Requests: `{"do": "decoder", "dtype": "float32"}` and `{"do": "kernel", …}`; a round of the first is `NEW_TOKENS`
    tokens, one after the other.
    """
    from mmllm.model.decoder import Decoder
    from mmllm.model.decoder_config import DecoderConfig

    try:
        from mmllm.model.router import MoEConfig
    except ModuleNotFoundError:  # another revision's
        from mmllm.model.moe import MoEConfig  # pyright: ignore[reportMissingImports]

    device, shape = settings["device"], Shape(**settings["shape"])
    values = text_config(shape, device, {})["model"]["init_args"]["decoder"]
    values["moe"] = MoEConfig(**values["moe"])
    decoders, kernels = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        decoder = Decoder(DecoderConfig(**values))
        load_weights(decoder, settings["weights"])
        name = str(dtype).removeprefix("torch.")
        decoders[name] = _decoding(decoder.to(device, dtype).eval(), shape, device)
        kernels[name] = _kernel_decoding(decoder, shape, device, dtype)

    @torch.no_grad()
    def run(of: dict[str, Callable[[], torch.Tensor]], dtype: str) -> dict[str, Any]:
        began = time.perf_counter()
        out = of[dtype]()
        synchronize()
        return {"seconds": time.perf_counter() - began, "out": out.float().flatten()[:64].tolist()}

    serve({"decoder": lambda dtype: run(decoders, dtype), "kernel": lambda dtype: run(kernels, dtype)})


def decoding_ids(shape: Shape, device: str) -> torch.Tensor:
    """The prompt and what follows; drawn, so that each token has experts of its own and dtypes do not part ways."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, shape.vocab_size, (1, PROMPT + NEW_TOKENS), generator=generator).to(device)


def _decoding(decoder: Any, shape: Shape, device: str) -> Callable[[], torch.Tensor]:
    from mmllm.model.row_cache import Chunk, PromptStep, RunningStep

    ids_BT, embed, head = decoding_ids(shape, device), embedding_of(decoder), head_of(decoder)
    text_T = torch.zeros_like(ids_BT[0])

    def begin() -> Any:
        cache = decoder.make_row_cache()
        row = cache.allocate(ids_BT.shape[1])
        positions_T = torch.arange(PROMPT, device=device)
        step = PromptStep([Chunk(row, PROMPT)])
        decoder.continue_rows(embed(ids_BT[0, :PROMPT]), positions_T, text_T[:PROMPT], step)
        cache.start(row)
        return cache

    with torch.no_grad():
        prompt = begin()

    def run() -> torch.Tensor:
        (slab,), logits = copy.deepcopy(prompt).slabs, None
        for place in range(PROMPT, ids_BT.shape[1]):
            step = RunningStep(slab)
            hidden_1D = decoder.continue_rows(embed(ids_BT[0, place : place + 1]), step.lengths_N, text_T[:1], step)
            logits = head(hidden_1D[None])
        assert logits is not None
        return logits

    return run


def _kernel_decoding(decoder: Any, shape: Shape, device: str, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    import mmllm_kernels

    mlp: Any = blocks_of(decoder)[0].mlp
    gate_up, down = (parameter.detach() for parameter in mlp.parameters() if parameter.ndim == 3)
    generator = torch.Generator(device).manual_seed(0)
    x_TD = torch.randn(NEW_TOKENS, shape.hidden_size, generator=generator, device=device).to(dtype)
    logits_TE = torch.randn(NEW_TOKENS, shape.num_experts, generator=generator, device=device)

    def run() -> torch.Tensor:
        for x_1D, logits_1E in zip(x_TD.split(1), logits_TE.split(1), strict=True):
            out = mmllm_kernels.moe(x_1D, logits_1E, gate_up, down, shape.num_experts_per_tok)
        return out.out_TD

    return run


def main() -> None:
    """See the module's first lines."""
    train_requests.open_answers()
    task, settings = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(settings["threads"])
    {"fit": fit, "decode": decode}[task](settings)


if __name__ == "__main__":
    main()
