"""Losses of preferences and their gradients against TRL's own code, on an exported text model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmllm.interop.exporting import export_model
from mmllm.losses.preferences import kto_losses, pair_losses, reward_losses
from mmllm.training.posttraining.preference_module import PreferenceConfig
from tests.preference_fixtures import make_data, make_module, pairs_file, text_model

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")
torch.set_num_threads(1)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A policy, a reference with other weights, and a file of pairs."""
    root = tmp_path_factory.mktemp("trl")
    return text_model(root / "policy", 1), text_model(root / "reference", 2), pairs_file(root, 5)


def theirs(folder: Path, out: Path) -> Any:
    import transformers

    export_model(folder, out)
    return transformers.AutoModelForCausalLM.from_pretrained(out, local_files_only=True, attn_implementation="eager")


def padded(batch: Any) -> dict[str, Tensor]:
    """A packed batch's answers as TRL has them: a row each, the chosen ones first."""
    packed, rows = batch.packed, []
    for answer in range(batch.num_answers):
        row, place = divmod(int(batch.last_A[answer]), packed.token_ids_BT.shape[1])
        own_T = packed.document_ids_BT[row] == packed.document_ids_BT[row, place]
        is_answer_T = torch.roll(batch.answer_BT[row] == answer, 1)[own_T]
        rows.append((int(batch.group_A[answer]), packed.token_ids_BT[row][own_T], is_answer_T))
    order = sorted(range(len(rows)), key=lambda n: (not bool(batch.is_chosen_A[n]), rows[n][0]))
    ids, masks = zip(*[rows[n][1:] for n in order], strict=True)
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(list(ids), batch_first=True),
        "attention_mask": pad([torch.ones_like(each) for each in ids], batch_first=True),
        "completion_mask": pad([each.long() for each in masks], batch_first=True),
    }


def tokenizer() -> Any:
    import transformers
    from tokenizers import Tokenizer, models

    plain = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<end>")


def gradients_as_exported(module: Any, theirs_model: Any) -> None:
    """Compares the gradients of all weights, by the sum of their squares and by the embedding's own rows."""
    own = {name: p.grad for name, p in module.model.named_parameters() if p.grad is not None}
    other = {name: p.grad for name, p in theirs_model.named_parameters() if p.grad is not None}
    rows = len(other["model.embed_tokens.weight"])
    pairs = {
        "decoder.embed_tokens.weight": "model.embed_tokens.weight",
        "decoder.lm_head.weight": "lm_head.weight",
        "decoder.layers.0.self_attn.q_proj.weight": "model.layers.0.self_attn.q_proj.weight",
        "decoder.layers.1.mlp.down_proj.weight": "model.layers.1.mlp.down_proj.weight",
        "decoder.norm.weight": "model.norm.weight",
    }
    for name, name_there in pairs.items():
        mine = own[name][:rows] if "embed" in name or "head" in name else own[name]
        assert mine.abs().max() > 1e-4, name
        torch.testing.assert_close(mine, other[name_there], rtol=1e-3, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (PreferenceConfig("sigmoid"), {"loss_type": ["sigmoid"]}),
        (PreferenceConfig("robust", label_smoothing=0.1), {"loss_type": ["robust"], "label_smoothing": 0.1}),
        (PreferenceConfig("hinge", beta=0.3), {"loss_type": ["hinge"], "beta": 0.3}),
        (PreferenceConfig("ipo", beta=0.2), {"loss_type": ["ipo"], "beta": 0.2}),
        (PreferenceConfig("sigmoid", length_normalized=True), {"loss_type": ["sigmoid_norm"]}),
        (PreferenceConfig("sigmoid", sft_weight=0.7), {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}),
    ],
    ids=lambda value: value.loss if isinstance(value, PreferenceConfig) else "-".join(value["loss_type"]),
)
def test_losses_of_pairs_are_those_of_trl(
    folders: tuple[Path, Path, Path], tmp_path: Path, config: PreferenceConfig, settings: dict[str, Any]
) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    policy, reference, path = folders
    batch = next(iter(make_data(path, policy, batch_size=5).loader("train", seed=None)))
    import dataclasses

    module = make_module(policy, dataclasses.replace(config, reference_model=str(reference)))
    module.configure_model()
    loss, _, _ = module.loss_of(batch)
    loss.backward()

    hf_policy, hf_reference = theirs(policy, tmp_path / "policy"), theirs(reference, tmp_path / "reference")
    common = {"output_dir": str(tmp_path / "trl"), "report_to": [], "use_cpu": True, "bf16": False, "fp16": False}
    arguments = DPOConfig(**{**common, "gradient_checkpointing": False, **settings})
    row = {"prompt": "<end>", "chosen": "<end> <end>", "rejected": "<end>"}
    trainer: Any = DPOTrainer(hf_policy, hf_reference, arguments, train_dataset=Dataset.from_list([row] * 2),
                         processing_class=tokenizer())  # fmt: skip
    trainer.model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = trainer._compute_loss(trainer.model, padded(batch), False)
    wanted.backward()
    assert float(loss) == pytest.approx(float(wanted), abs=TOLERANCE)
    gradients_as_exported(module, trainer.model)


def test_kto_is_that_of_trl(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    policy, reference, path = folders
    data = make_data(path, policy, form="answers", batch_size=10)
    batch = next(iter(data.loader("train", seed=None)))
    config = PreferenceConfig("kto", desirable_weight=1.3, undesirable_weight=0.7, reference_model=str(reference))
    module = make_module(policy, config)
    module.configure_model()
    loss, losses, _ = module.loss_of(batch)
    loss.backward()

    common = {"output_dir": str(tmp_path / "trl"), "report_to": [], "use_cpu": True, "bf16": False, "fp16": False}
    arguments = KTOConfig(**{**common, "gradient_checkpointing": False, "desirable_weight": 1.3,
                             "undesirable_weight": 0.7})  # fmt: skip
    row = {"prompt": "<end>", "completion": "<end> <end>", "label": True}
    hf_policy, hf_reference = theirs(policy, tmp_path / "policy"), theirs(reference, tmp_path / "reference")
    trainer: Any = KTOTrainer(hf_policy, hf_reference, arguments, train_dataset=Dataset.from_list([row] * 2),
                         processing_class=tokenizer())  # fmt: skip
    trainer.model.eval()
    given, other = padded(batch), padded(batch.mismatched)
    order = sorted(range(10), key=lambda n: (not bool(batch.is_chosen_A[n]), int(batch.group_A[n])))
    label = batch.is_chosen_A[order]
    inputs = {**given, **{f"KL_{key}": value for key, value in other.items()}, "label": label}
    wanted = trainer._compute_loss(trainer.model, inputs, False)
    wanted.backward()
    assert float(losses.sums["kl"]) > 0, "else the divergence would play no part"
    assert float(loss) == pytest.approx(float(wanted), abs=TOLERANCE)
    gradients_as_exported(module, trainer.model)


def test_losses_of_pairs_are_their_formulas() -> None:
    """The smoothed one, which TRL has in other forms alone, and the reward model's margin and centering."""
    chosen_P, rejected_P = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.5, 1.0, -3.0])
    delta_P = 0.1 * (chosen_P - rejected_P)
    wanted_P = -0.8 * delta_P.sigmoid().log() - 0.2 * (-delta_P).sigmoid().log()
    torch.testing.assert_close(pair_losses(chosen_P, rejected_P, label_smoothing=0.2), wanted_P)
    wanted_P = -(chosen_P - rejected_P - 0.3).sigmoid().log() + 0.01 * (chosen_P + rejected_P) ** 2
    torch.testing.assert_close(reward_losses(chosen_P, rejected_P, margin=0.3, centering=0.01), wanted_P)
    is_liked_A, kl = torch.tensor([True, False, True]), torch.tensor(0.7)
    wanted_A = torch.stack([1 - (0.2 * x).sigmoid() for x in (chosen_P[0] - kl, kl - chosen_P[1], chosen_P[2] - kl)])
    torch.testing.assert_close(kto_losses(chosen_P, is_liked_A, kl, beta=0.2), wanted_A)
