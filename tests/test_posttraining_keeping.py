"""Keeping a training near its start: the penalties against slow references, over ranks, and what is exported."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor

from mmllm.batch import IGNORE, PackedBatch
from mmllm.checkpoints.adapter_config import AdapterConfig
from mmllm.checkpoints.adapters import merge_adapter
from mmllm.data import commands
from mmllm.data.loading.collate import Gap, pack_documents
from mmllm.data.loading.datamodules import PackedDataModule
from mmllm.data.loading.loader import StepDataset
from mmllm.data.samples.document import DocumentWriter
from mmllm.inference.api import load
from mmllm.losses.batch import LossFunction
from mmllm.losses.divergence import kl_divergence
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.embedding import joined
from mmllm.model.router import MoEConfig
from mmllm.training.decoder_module import DecoderModule
from mmllm.training.lightning_cli import quiet_lightning
from mmllm.training.optimizers import OptimizerConfig
from mmllm.training.posttraining.fisher import fisher_diagonal, single_documents
from mmllm.training.posttraining.keeping import KeepConfig, Keeper
from mmllm.training.posttraining.start_weights import StartWeights
from mmllm.training.strategy import MeshStrategy
from mmllm_tokenizers.folder import TokenizerConfig, TokenizerFolder
from mmllm_tokenizers.text import TextTokenizer
from tests.data_fixtures import write_manifest
from tests.training_fixtures import (
    CODEBOOK_SIZE,
    NUM_CODEBOOKS,
    NUM_TEXT,
    ListData,
    fit_rank,
    quiet_trainer,
    run_two_ranks,
    tiny_batch,
    tiny_module,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint:UserWarning"),
    pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning"),
]
FULL = OptimizerConfig(lr=1e-2, warmup=0.0, min_lr_ratio=1.0, weight_decay=0.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, a recipe of texts, and a model to start from."""
    folder = tmp_path_factory.mktemp("keeping")
    lines = [f"a line of words {number} and more" for number in range(24)]
    tokenizer = TextTokenizer.train(lines, vocab_size=275)
    TokenizerFolder(tokenizer, None, TokenizerConfig()).save(folder / "tokenizer")
    rows = [{"id": f"t{number}", "text": line} for number, line in enumerate(lines)]
    commands.build(write_manifest(folder / "rows", rows), folder / "shards")
    commands.index(folder / "shards", folder / "tokenizer")
    sources = [{"name": "texts", "kind": "text", "shards": str(folder / "shards" / "*.tar")}]
    recipe = {"tokenizer": str(folder / "tokenizer"), "sequence_length": 48, "sources": sources}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "mixture": {"on_exhausted": "repeat"}}))
    torch.manual_seed(0)
    module = first_module(folder, out=str(folder / "base"))
    with quiet_lightning():
        quiet_trainer(max_steps=2).fit(module, PackedDataModule(folder / "recipe.yaml", batch_size=2))
    return folder


def first_module(folder: Path, **settings: Any) -> DecoderModule:
    sizes: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    moe = MoEConfig(**sizes, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)  # these are means over batches
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    decoder = DecoderConfig(0, **shape, moe=moe, moe_layers=(1,), intermediate_size=32, tie_word_embeddings=False)
    return DecoderModule(decoder, tokenizer=str(folder / "tokenizer"), optimizer=FULL, **settings)


def make_module(folder: Path, **settings: Any) -> DecoderModule:
    torch.manual_seed(3)
    return DecoderModule(init_from=str(folder / "base"), **{"optimizer": FULL, **settings})


def fit(folder: Path, module: DecoderModule, *callbacks: pl.Callback, ckpt: Any = None, **settings: Any) -> None:
    with quiet_lightning():
        trainer = quiet_trainer(*callbacks, **{"max_steps": 4, **settings})
        data = PackedDataModule(folder / "recipe.yaml", batch_size=2)
        trainer.fit(module, data, ckpt_path=ckpt, weights_only=True)


def moved(module: Any, scale: float = 0.1) -> None:
    """Moves the weights away from where they are."""
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in module.model.parameters():
            weight.add_(torch.randn_like(weight), alpha=scale)


def slow_divergence(start: Any, now: Any, batch: PackedBatch) -> tuple[Tensor, float]:
    """Σ KL(start‖now) target by target from all logits, and the number of targets."""
    outputs = [model(batch) for model in (start, now)]
    log_TV = [model.decoder.lm_head(output.hidden_QD).double() for model, output in zip((start, now), outputs)]  # noqa: B905
    tokens_Q = outputs[0].metadata.sequences.tokens_Q
    labels, codes = batch.labels_BT.flatten()[tokens_Q], batch.audio_labels_BTK.flatten(0, 1)[tokens_Q]
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    block = CODEBOOK_SIZE + 1
    for place, label in enumerate(labels.tolist()):
        parts = []
        if label != IGNORE:
            is_code = label >= NUM_TEXT
            parts.append((slice(None), 1 / NUM_CODEBOOKS if is_code else 1.0))
        for k in range(1, NUM_CODEBOOKS):
            if codes[place, k] != IGNORE:
                parts.append((slice(NUM_TEXT + k * block, NUM_TEXT + (k + 1) * block), 1 / NUM_CODEBOOKS))
        for ids, share in parts:
            p, q = (each[place, ids].log_softmax(-1) for each in log_TV)
            total = total + share * F.kl_div(q, p, reduction="sum", log_target=True)
            count += share
    return total, count


@pytest.mark.parametrize("chunk_bytes", [None, 2000])
def test_the_divergence_is_that_of_all_logits_and_so_are_its_gradients(chunk_bytes: int | None) -> None:
    module = tiny_module()
    module.configure_model()
    model: Any = module.model
    model.double().eval()
    start = copy.deepcopy(model)
    moved(module)
    batch = tiny_batch(0)
    losses = LossFunction(model.config, ("a", "b", "c"))
    output = model(batch)
    targets, layout, codebooks_K = losses.targets(output, batch)
    hidden_MD = output.hidden_QD[output.metadata.targets_M]
    with torch.no_grad():
        other_MD = start(batch).hidden_QD[output.metadata.targets_M]
    rows, other = model.decoder.lm_head.rows, joined(start.decoder.lm_head.rows).detach()
    args = (targets, layout, codebooks_K.double())
    got = kl_divergence(hidden_MD, rows, other_MD, other, *args, chunk_bytes=chunk_bytes)
    wanted, count = slow_divergence(start, model, batch)
    assert float(got.count) == pytest.approx(count) and count > 10
    torch.testing.assert_close(got.total, wanted, rtol=1e-9, atol=1e-9)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for one, two in zip(
        torch.autograd.grad(got.total, weights, allow_unused=True, retain_graph=True),
        torch.autograd.grad(wanted, weights, allow_unused=True),
        strict=True,
    ):
        if two is not None:
            torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_is_held_to_its_start_also_under_autocast(dtype: torch.dtype) -> None:
    """Autocast keeps the bf16 copies of weights, which are not the start's."""
    module = tiny_module()
    module.configure_model()
    model: Any = module.model
    model.eval()
    start, keeper = copy.deepcopy(model), Keeper(KeepConfig(kl=1.0), StartWeights(model))
    losses, batch = LossFunction(model.config, ("a", "b", "c")), tiny_batch(0)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        part, mean = keeper.divergence(model, model(batch), batch, losses)
    assert float(mean) == pytest.approx(0.0, abs=1e-6)
    moved(module)
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        part, mean = keeper.divergence(model, model(batch), batch, losses)
    part.backward()
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        total, count = slow_divergence(start, model, batch)
    assert float(mean) == pytest.approx(float(total) / count, rel=1e-4 if dtype == torch.float32 else 0.02)
    assert float(part.detach()) == pytest.approx(float(mean), rel=1e-4)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters()), "all are as they were"
    assert float(model.decoder.layers[0].self_attn.q_proj.weight.grad.abs().sum()) > 0


def test_the_gradients_of_the_penalties_of_weights_are_autograds() -> None:
    module = tiny_module()
    module.configure_model()
    model: Any = module.model
    start = StartWeights(model)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    moved(module)
    fisher = {name: torch.rand_like(weight) for name, weight in model.named_parameters()}
    keeper = Keeper(KeepConfig(ewc=3.0, l2=0.5, fisher_recipe="r"), start, fisher)
    penalty = sum(
        (1.5 * fisher[name] * (weight - before[name]).square() + 0.25 * (weight - before[name]).square()).sum()
        for name, weight in model.named_parameters()
        if weight.requires_grad
    )
    assert isinstance(penalty, Tensor)
    penalty.backward()
    wanted = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight) if weight.requires_grad else None
    value = keeper.add_gradients()
    assert value is not None and float(value) == pytest.approx(float(penalty.detach()), rel=1e-5)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(weight.grad - 1, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_fisher_information_is_the_mean_of_squared_gradients_of_single_documents(run: Path) -> None:
    module = make_module(run)
    module.configure_model()
    model: Any = module.model
    model.eval()
    folder = TokenizerFolder.load(run / "tokenizer")
    transform: Any = None
    documents = list(single_documents(str(run / "recipe.yaml"), folder, transform, 5))
    assert len(documents) == 5 and all(batch.num_documents == 1 for batch in documents)
    losses = LossFunction(model.config)
    parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    def loss_of(batch: PackedBatch) -> Tensor:
        return losses(model, model(batch), batch).objective

    fisher = fisher_diagonal(parameters, loss_of, documents)
    slow = {name: torch.zeros_like(weight) for name, weight in parameters.items()}
    for batch in documents:
        model.zero_grad()
        labels = batch.labels_BT.flatten()
        logits = model.decoder.lm_head(model(batch).hidden_QD)
        F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE).backward()
        for name, weight in parameters.items():
            slow[name] += 0 if weight.grad is None else weight.grad.square() / len(documents)
    for name, value in fisher.items():
        torch.testing.assert_close(value, slow[name], rtol=1e-4, atol=1e-6, msg=name)
    packed = fisher_diagonal(parameters, loss_of, [pack_two(documents)])
    name = "decoder.layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(packed[name], slow[name], rtol=0.1), "of two documents together it is another"


def test_documents_that_fail_are_left_out_of_the_fisher_information_and_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    document_of = StepDataset.document

    def broken(self: StepDataset, item: Any, errors: list[str]) -> Any:
        if item.row % 2:
            errors.append(f"row {item.row}: broken")
            return Gap(item.num_tokens)
        return document_of(self, item, errors)

    monkeypatch.setattr(StepDataset, "document", broken)
    folder, transform = TokenizerFolder.load(run / "tokenizer"), cast("Any", None)
    documents = list(single_documents(str(run / "recipe.yaml"), folder, transform, 24))
    assert 0 < len(documents) < 24
    assert f"left out {24 - len(documents)} of 24 documents: row " in caplog.text


def pack_two(documents: list[PackedBatch]) -> PackedBatch:
    ids = [batch.token_ids_BT[0].tolist() for batch in documents[:2]]
    return text_batch([ids[0]], [ids[1]])


def text_batch(*sequences: list[list[int]], length: int = 64) -> PackedBatch:
    folder = TokenizerFolder(TextTokenizer.train(["a b c"], vocab_size=275), None, TokenizerConfig())
    rows = []
    for documents in sequences:
        row = []
        for ids in documents:
            writer = DocumentWriter(folder)
            writer.ids(ids, is_target=True)
            row.append(writer.finish())
        rows.append(row)
    return pack_documents(rows, length)


def test_penalties_keep_a_training_near_its_start_the_more_the_heavier_they_are(run: Path) -> None:
    start = make_module(run)
    start.configure_model()

    def change(**settings: Any) -> float:
        module = make_module(run, **settings)
        fit(run, module)
        pairs = zip(module.parameters(), start.parameters(), strict=True)
        return float(sum((one - two).square().sum() for one, two in pairs).detach())  # type: ignore[union-attr]

    free = change()
    for name, few, many in (("l2", 0.1, 10.0), ("ewc", 1.0, 1e4), ("kl", 0.5, 20.0)):
        kept = {"fisher_recipe": str(run / "recipe.yaml"), "fisher_documents": 8} if name == "ewc" else {}
        light, heavy = (change(keep=KeepConfig(**{name: weight}, **kept)) for weight in (few, many))
        assert heavy < light < free * 1.001, name
        assert heavy < 0.8 * free, name


def pairs_of_texts(count: int) -> list[tuple[PackedBatch, PackedBatch]]:
    generator = torch.Generator().manual_seed(0)

    def one(length: int) -> PackedBatch:
        return text_batch([torch.randint(14, 200, (length,), generator=generator).tolist()], length=32)

    return [(one(6 + 5 * number), one(28)) for number in range(count)]


def together(pair: tuple[PackedBatch, PackedBatch]) -> PackedBatch:
    ids = [batch.token_ids_BT[0][batch.document_ids_BT[0] >= 0].tolist() for batch in pair]
    return text_batch([ids[0]], [ids[1]], length=32)


KEPT = KeepConfig(kl=2.0, l2=0.3)


def _kept_rank(rank: int, port: int, out: str, folder: Path, is_sharded: bool) -> None:
    os.environ.pop("PL_GLOBAL_SEED", None)
    strategy: Any = MeshStrategy(fsdp=2) if is_sharded else "ddp"
    module = make_module(folder, keep=KEPT, wise_ft=0.5, out=f"{out}/model")
    fit_rank(rank, port, out, module, ListData(pairs_of_texts(3)), max_steps=3, strategy=strategy)


@pytest.mark.parametrize("is_sharded", [False, True], ids=["ddp", "fsdp"])
def test_two_ranks_are_kept_as_one_process_is(run: Path, tmp_path: Path, is_sharded: bool) -> None:
    alone = make_module(run, keep=KEPT, wise_ft=0.5, out=str(tmp_path / "alone"))
    with quiet_lightning():
        data = ListData([together(pair) for pair in pairs_of_texts(3)])
        quiet_trainer(max_steps=3).fit(alone, datamodule=data)
    free = make_module(run)
    with quiet_lightning():
        quiet_trainer(max_steps=3).fit(free, datamodule=ListData([together(pair) for pair in pairs_of_texts(3)]))
    ranks = run_two_ranks(_kept_rank, tmp_path, run, is_sharded)
    for rank in ranks:
        for name, weight in alone.state_dict().items():
            torch.testing.assert_close(rank["weights"][name], weight, atol=3e-4, rtol=0, msg=name)
    name = "model.decoder.layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(free.state_dict()[name], alone.state_dict()[name], atol=3e-3), "kept is another run"
    written, wanted = (load_file(tmp_path / each / "model.safetensors") for each in ("model", "alone"))
    for name, weight in wanted.items():
        torch.testing.assert_close(written[name], weight, atol=3e-4, rtol=0, msg=name)


def test_accumulated_batches_are_kept_as_one_large_batch_is(run: Path) -> None:
    pairs = pairs_of_texts(2)
    one, two = make_module(run, keep=KEPT), make_module(run, keep=KEPT)
    with quiet_lightning():
        quiet_trainer(max_steps=2).fit(one, datamodule=ListData([together(pair) for pair in pairs]))
        flat = ListData([batch for pair in pairs for batch in pair])
        quiet_trainer(max_steps=2, accumulate_grad_batches=2).fit(two, datamodule=flat)
    for (name, weight), other in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(weight, other, atol=3e-4, rtol=0, msg=name)


def test_what_is_exported_lies_between_start_and_trained(run: Path, tmp_path: Path) -> None:
    trained, mixed = make_module(run, out=str(tmp_path / "trained")), make_module(run, wise_ft=0.25)
    mixed.out = str(tmp_path / "mixed")
    fit(run, trained)
    fit(run, mixed)
    weights = [
        load_file(folder / "model.safetensors") for folder in (run / "base", tmp_path / "trained", Path(mixed.out))
    ]
    start, end, got = weights
    for name, weight in got.items():
        torch.testing.assert_close(weight, 0.75 * start[name] + 0.25 * end[name], atol=1e-6, rtol=1e-5, msg=name)
    assert any(not torch.equal(start[name], end[name]) for name in start)
    for one, two in zip(trained.parameters(), mixed.parameters(), strict=True):
        assert torch.equal(one, two), "what was trained stays in the module"
    card = (tmp_path / "mixed" / "README.md").read_text()
    assert "0.75 · start + 0.25 · trained" in card and "`base`" in card


def test_of_a_lora_the_mixture_is_that_of_the_merged_weights(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    lora = AdapterConfig(r=4, lora_alpha=8, parts=("attention", "experts"))
    rates = OptimizerConfig(lr=3e-2, warmup=0.0, min_lr_ratio=1.0)
    for name, share in (("trained", None), ("mixed", 0.5)):
        module = make_module(run, adapter=lora, optimizer=rates, wise_ft=share, out=str(tmp_path / name))
        fit(run, module)
    weights = []
    for name in ("trained", "mixed"):
        model = load(tmp_path / name, "cpu", adapter="default").model
        merge_adapter(model.decoder, "default")
        weights.append(model.state_dict())
    base = load(run / "base", "cpu").model.state_dict()
    changed = 0
    for name, weight in base.items():
        torch.testing.assert_close(weights[1][name], (weight + weights[0][name]) / 2, atol=1e-6, rtol=1e-5, msg=name)
        changed += not torch.equal(weights[0][name], weight)
    assert changed >= 10


def test_a_kept_training_goes_on_exactly_and_with_no_other_start(run: Path, tmp_path: Path) -> None:
    keep = KeepConfig(kl=1.0, ewc=10.0, fisher_recipe=str(run / "recipe.yaml"), fisher_documents=4)
    whole = make_module(run, keep=keep)
    fit(run, whole)
    saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=2)
    fit(run, make_module(run, keep=keep), saving, enable_checkpointing=True)
    rest = make_module(run, keep=keep)
    fit(run, rest, ckpt=tmp_path / "step=2.ckpt")
    for name, weight in whole.state_dict().items():
        assert torch.equal(rest.state_dict()[name], weight), name
    other = tmp_path / "other"
    fit(run, make_module(run, out=str(other)), max_steps=1)
    module = DecoderModule(init_from=str(other), keep=keep, optimizer=FULL)
    with pytest.raises(ValueError, match=r"was kept near .*base with hash .*go on with the same start"):
        fit(run, module, ckpt=tmp_path / "step=2.ckpt")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"keep": {"kl": -1.0}}, r"keep\.kl is -1"),
        ({"keep": {"ewc": 1.0}}, r"keep\.ewc is given without fisher_recipe"),
        ({"keep": {"l2": 1.0, "fisher_recipe": "r"}}, r"keep\.fisher_recipe is r, which ewc alone reads"),
        ({"wise_ft": 1.5}, r"wise_ft is 1\.5; it is the trained weights' share"),
        ({"wise_ft": 0.5, "adapter": AdapterConfig(use_dora=True)}, r"wise_ft is 0\.5 and the adapter has use_dora"),
        ({"wise_ft": 0.5, "adapter": AdapterConfig(kind="prompt_tuning")}, r"has kind prompt_tuning"),
    ],
)
def test_what_cant_be_kept_is_said(run: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_module(run, **{k: KeepConfig(**v) if k == "keep" else v for k, v in settings.items()})
    with pytest.raises(ValueError, match="keep is given without init_from"):
        tiny_module(keep=KeepConfig(kl=1.0))
    keeper: Any = Keeper
    with pytest.raises(ValueError, match="strategy that shards weights"):
        keeper(KeepConfig(ewc=1.0, fisher_recipe="r"), None, is_sharded=True)
