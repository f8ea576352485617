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
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import yaml
from allocations import AllocationPeak
from host_syncs import HostSyncs
from train_documents import Packed, Shape, packed, ragged

EARLIER_NAMES = {
    "hidden_size": "width", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads", "head_dim": "head_width", "intermediate_size": "mlp_width",
    "tie_word_embeddings": "tie_embeddings", "num_experts_per_tok": "top_k", "moe_intermediate_size": "expert_width",
    "router_aux_loss_coef": "balance_weight", "router_z_loss_coef": "z_weight", "optimizer": "optimiser",
}  # fmt: skip
"""Of config keys."""
NUM_BATCHES = 8
"""Of the demo's data, in turn."""
WITHOUT = ("Progress", "ModelCheckpoint", "RoutingLog", "Samples")
"""Callbacks of the demo that write to disk or to the terminal, and take no part in a step."""
PROMPT, NEW_TOKENS = 32, 32
"""Tokens in the cache when decoding starts, and tokens decoded in a round."""


def receive() -> dict[str, Any]:
    """The next request; ends the process where there will be none, since training has no end of its own."""
    line = sys.stdin.readline()
    if not line:
        os._exit(0)
    return json.loads(line)


def answer(values: dict[str, Any]) -> None:
    """Writes the answer to the last request."""
    _ANSWERS.write(json.dumps(values) + "\n")
    _ANSWERS.flush()


def serve(handlers: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """Answers `{"do": name, …}` by the handler of this name."""
    while True:
        request = receive()
        answer(handlers[request.pop("do")](**request))


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --- names that have changed --------------------------------------------------------------------------------------


def named(values: dict[str, Any]) -> dict[str, Any]:
    """A config with the keys of this checkout."""
    from mmllm.model.decoder import DecoderConfig

    if any(each.name == "hidden_size" for each in dataclasses.fields(DecoderConfig)):
        return values
    return {
        EARLIER_NAMES.get(key, key): named(value) if isinstance(value, dict) else value for key, value in values.items()
    }


def first_of(thing: Any, *names: str) -> Any:
    """The attribute under the first of these names that it has."""
    return next(getattr(thing, name) for name in names if hasattr(thing, name))


def blocks_of(decoder: Any) -> torch.nn.ModuleList:
    """The decoder's layers."""
    return first_of(decoder, "layers", "blocks")


def head_of(decoder: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """From hidden states to logits."""
    return first_of(decoder, "head", "lm_head")


def embedding_of(decoder: Any) -> torch.nn.Embedding:
    """Token embeddings."""
    return first_of(decoder, "embed_tokens", "embedding")


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
    batch = contracts.PackedBatch(**{name: value for name, value in values.items() if name in known})
    if hasattr(contracts, "SequenceMetadata"):
        batch.metadata = contracts.SequenceMetadata.of(batch)
    return batch


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
        "trainer": _trainer(device),
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
        settings: `kind` "text" or "demo"; `device`; `shape` and `weights` (a folder of transformers' Mixtral) of text;
            `folder` of a finished quickstart and `root` of the checkout of the demo; `without_layers` takes the layers
            out, so that embedding, head and loss are left.
    """
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
        cli.trainer.callbacks.append(_rounds(settings))  # pyright: ignore[reportAttributeAccessIssue]
        if settings["kind"] == "text":
            cli.trainer.fit(cli.model, train_dataloaders=InTurn([text_batch(_documents(settings, shape))]))
        else:
            data: Any = cli.datamodule
            make_loader = data.train_dataloader
            data.train_dataloader = lambda: InTurn(list(islice(make_loader(), NUM_BATCHES)))
            cli.trainer.fit(cli.model, datamodule=data)


def _documents(settings: dict[str, Any], shape: Shape) -> Packed:
    import numpy as np

    if "num_targets" not in settings:
        return ragged(shape)
    lengths = [(settings["num_targets"] // shape.num_sequences + 1,)] * shape.num_sequences
    return packed(lengths, lengths[0][0], shape.vocab_size, np.random.default_rng(0))


def _rounds(settings: dict[str, Any]) -> Any:
    """The callback that waits; made here, since Lightning takes seconds to import."""
    import lightning.pytorch as pl

    class Rounds(pl.Callback):
        """A step begins when a request comes, and is answered when Lightning would begin the next one."""

        def __init__(self) -> None:
            self.request: dict[str, Any] = {}
            self.values: dict[str, Any] = {}
            self.began = 0.0
            self.syncs, self.attention = HostSyncs(), AttentionWork()
            self.calls: dict[torch.nn.Module, tuple[Any, Any]] = {}
            self.hooks: list[Any] = []
            self.memory = AllocationPeak(settings["device"])

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            decoder = pl_module.model.decoder
            if "weights" in settings:
                load_weights(decoder, settings["weights"])
            if settings.get("without_layers"):
                name = "layers" if hasattr(decoder, "layers") else "blocks"
                setattr(decoder, name, torch.nn.ModuleList())
                embedding_of(decoder).weight.requires_grad_(False)
                decoder.norm.register_forward_hook(lambda *_: self.memory.start())

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            synchronize()
            if self.request:
                answer({"seconds": time.perf_counter() - self.began, **self.values})
            self.request = receive()
            is_real_BT = batch.document_ids_BT >= 0
            self.values = {"num_tokens": int(is_real_BT.sum())}
            match self.request["do"]:
                case "host syncs" if settings["device"] == "cpu":
                    self.syncs = HostSyncs().__enter__()
                case "host syncs":
                    self.warned = warnings.catch_warnings(record=True)
                    self.warnings: Any = self.warned.__enter__()
                    warnings.simplefilter("always")
                    torch.cuda.set_sync_debug_mode("warn")
                case "attention work":
                    self.values["ideal"] = sum_of_squares(batch.document_ids_BT)
                    self.values["num_layers"] = len(blocks_of(pl_module.model.decoder))
                    self.attention = AttentionWork().__enter__()
                case "graph breaks":
                    self.hooks = [
                        block.register_forward_pre_hook(self._keep, with_kwargs=True)
                        for block in blocks_of(pl_module.model.decoder)
                    ]
                case "memory":
                    self.memory.__enter__()
            self.began = time.perf_counter()

        def _keep(self, block: Any, args: Any, kwargs: Any) -> None:
            self.calls[block] = (_detached(args), {name: _detached(value) for name, value in kwargs.items()})

        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            if self.request["do"] == "memory":
                self.memory.__exit__(None, None, None)
                self.values["bytes"] = self.memory.peak

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            match self.request["do"]:
                case "host syncs" if settings["device"] == "cpu":
                    self.syncs.__exit__(None, None, None)
                    self.values |= {"count": self.syncs.count, "where": str(self.syncs)}
                    apart = self.syncs.asked_apart.items()
                    self.values["apart"] = ", ".join(f"{count} x {what} in {where}" for (what, where), count in apart)
                case "host syncs":
                    torch.cuda.set_sync_debug_mode("default")
                    self.warned.__exit__(None, None, None)
                    found = [each for each in self.warnings if "synchroniz" in str(each.message)]
                    where = "\n".join(f"{each.filename}:{each.lineno}" for each in found)
                    self.values |= {"count": len(found), "where": where, "apart": ""}
                case "attention work":
                    self.attention.__exit__(None, None, None)
                    self.values["computed"] = self.attention.computed
                case "graph breaks":
                    for hook in self.hooks:
                        hook.remove()
                    self.values["breaks"] = [_graph_breaks(block, *call) for block, call in self.calls.items()]
            self.values["loss"] = float(outputs["loss"])

    return Rounds()


def load_weights(decoder: Any, folder: str) -> None:
    """The weights of a Mixtral checkpoint."""
    from mmllm.interop.transformers import from_mixtral

    decoder.load_state_dict(from_mixtral(folder).state_dict())


def _detached(value: Any) -> Any:
    """A call's argument, as it can be given again."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


def _graph_breaks(block: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """How often `torch.compile` would leave the graph in a block, and why the first time."""
    torch._dynamo.reset()
    explained = torch._dynamo.explain(block)(*args, **kwargs)
    reasons = [each.reason.splitlines()[0] for each in explained.break_reasons]
    return {"experts": _has_experts(block), "count": explained.graph_break_count, "reasons": reasons}


def _has_experts(block: Any) -> bool:
    return any(parameter.ndim == 3 for parameter in block.mlp.parameters())


# --- attention ----------------------------------------------------------------------------------------------------


def sum_of_squares(document_ids_BT: torch.Tensor) -> int:
    """Score elements that documents need, all of their square counted."""
    total = 0
    for ids_T in document_ids_BT.cpu():
        total += int((torch.bincount(ids_T[ids_T >= 0]) ** 2).sum())
    return total


class AttentionWork:
    """Score elements (of one head, whole squares) that calls of attention compute, by the backend that is seen."""

    def __init__(self) -> None:
        self.computed: dict[str, int] = {}
        self._modes = (_Scores(self), _VarlenScores(self))

    def add(self, backend: str, count: int) -> None:
        """Counts one call."""
        self.computed[backend] = self.computed.get(backend, 0) + count

    def __enter__(self) -> AttentionWork:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Scores(torch.overrides.TorchFunctionMode):
    def __init__(self, work: AttentionWork) -> None:
        super().__init__()
        self.work = work

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, key = args[:2]
            self.work.add("buckets", query.shape[0] * query.shape[-2] * key.shape[-2])
        return func(*args, **(kwargs or {}))


class _VarlenScores(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self, work: AttentionWork) -> None:
        super().__init__()
        self.work = work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "torch_attn" and func.__name__.startswith("_varlen_attn."):
            self.work.add("varlen", int((args[3].diff().long() ** 2).sum()))  # cumulative lengths
        return func(*args, **(kwargs or {}))


# --- decoding -----------------------------------------------------------------------------------------------------


def decode(settings: dict[str, Any]) -> None:
    """Decodes tokens by the whole decoder with its cache, and by the kernel of one layer, with weights of two dtypes.

    Requests: `{"do": "decoder", "dtype": "float32"}` and `{"do": "kernel", …}`; a round of the first is `NEW_TOKENS`
    tokens, one after the other.
    """
    from mmllm.model.decoder import Decoder, DecoderConfig
    from mmllm.model.moe import MoEConfig

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
    ids_BT, embed, head = decoding_ids(shape, device), embedding_of(decoder), head_of(decoder)
    positions_BT = torch.arange(ids_BT.shape[1], device=device)[None]
    documents_BT = torch.zeros_like(positions_BT)

    def step(part: slice, cache: Any) -> torch.Tensor:
        x_BTD = embed(ids_BT[:, part])
        hidden_BTD = decoder(x_BTD, positions_BT[:, part], documents_BT[:, part], cache)[0]
        return head(hidden_BTD[:, -1:])

    with torch.no_grad():
        prompt = decoder.make_cache(1, ids_BT.shape[1])
        step(slice(0, PROMPT), prompt)

    def run() -> torch.Tensor:
        cache, logits = copy.deepcopy(prompt), None
        for place in range(PROMPT, ids_BT.shape[1]):
            logits = step(slice(place, place + 1), cache)
        assert logits is not None
        return logits

    return run


def _kernel_decoding(decoder: Any, shape: Shape, device: str, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    import mmllm_kernels

    gate_up, down = (p.detach() for p in blocks_of(decoder)[0].mlp.parameters() if p.ndim == 3)
    generator = torch.Generator(device).manual_seed(0)
    x_TD = torch.randn(NEW_TOKENS, shape.hidden_size, generator=generator, device=device).to(dtype)
    logits_TE = torch.randn(NEW_TOKENS, shape.num_experts, generator=generator, device=device)

    def run() -> torch.Tensor:
        for x_1D, logits_1E in zip(x_TD.split(1), logits_TE.split(1), strict=True):
            out = mmllm_kernels.moe(x_1D, logits_1E, gate_up, down, shape.num_experts_per_tok)
        return out.out_TD

    return run


if __name__ == "__main__":
    # What libraries print must not be taken for answers.
    _ANSWERS = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    task, arguments = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(arguments["threads"])
    {"fit": fit, "decode": decode}[task](arguments)
