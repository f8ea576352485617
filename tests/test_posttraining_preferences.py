"""DPO, its kin and KTO: what moves, what the reference is, ranks, accumulated batches, resuming, replay."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from mmllm.checkpoints.adapter_config import AdapterConfig
from mmllm.checkpoints.folder import load_model, save_model
from mmllm.data.samples.decode import ImageTransform
from mmllm.losses.answers import sum_by_answer, target_logprobs
from mmllm.training.posttraining.preference_module import PreferenceConfig
from tests.inference_fixtures import make_model, make_tokenizer
from tests.preference_fixtures import fit, make_data, make_module, pair, pairs_file, text_model, write_rows
from tests.training_fixtures import fit_rank, run_two_ranks

torch.set_num_threads(1)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_model(tmp_path_factory.mktemp("base") / "model")


def metrics_of(module: Any, data: Any, steps: int) -> dict[str, float]:
    """Of a training's last step."""
    from lightning.pytorch.loggers import CSVLogger

    class Kept(CSVLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # pyright: ignore
            seen.update(metrics)

    seen: dict[str, float] = {}
    fit(module, data, steps, logger=Kept(str(data._tokenizer) + "-logs"), log_every_n_steps=1)
    return seen


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "hinge", "ipo"])
def test_what_is_preferred_becomes_likelier(model: Path, tmp_path: Path, loss: Any) -> None:
    smoothing = 0.1 if loss == "robust" else 0.0
    module = make_module(model, PreferenceConfig(loss, label_smoothing=smoothing))
    found = metrics_of(module, make_data(pairs_file(tmp_path), model), 12)
    assert found["train/rewards/accuracies"] == 1 and found["train/rewards/margins"] > 0
    assert found["train/logps/chosen"] < 0 and math.isfinite(found["train/loss"])


def test_the_first_loss_says_that_policy_and_reference_are_equal(model: Path, tmp_path: Path) -> None:
    losses, _ = fit(make_module(model), make_data(pairs_file(tmp_path), model), 1)
    assert losses == [pytest.approx(math.log(2), abs=1e-6)]


@pytest.mark.parametrize("reference", ["copy", "adapter", "stored", "auto"])
def test_references_are_the_start_however_they_are_had(model: Path, tmp_path: Path, reference: Any) -> None:
    """After some steps the rewards are those of two folders, computed apart."""
    adapter = AdapterConfig(r=2, lora_alpha=8) if reference in ("adapter", "auto") else None
    data = make_data(pairs_file(tmp_path), model, batch_size=12)
    module = make_module(model, PreferenceConfig(reference=reference), adapter=adapter)
    fit(module, data, 3)
    start = load_model(model).model
    batch = next(iter(data.loader("train", seed=None)))
    module.eval()
    with torch.no_grad():
        nats = []
        for each in (module.model, start):
            found = target_logprobs(each, each(batch.packed), batch)  # type: ignore[arg-type, misc]
            nats.append(sum_by_answer(found.logprobs_M, found.answer_M, batch.num_answers))
        _, losses, _ = module.loss_of(batch)
    rewards_A = 0.1 * (nats[0] - nats[1])
    wanted = rewards_A[batch.is_chosen_A].sum()
    assert abs(float(wanted)) > 1e-2
    assert float(losses.sums["rewards/chosen"]) == pytest.approx(float(wanted), abs=1e-4)
    files = list(tmp_path.glob("*.npz"))
    assert len(files) == (reference == "stored")


def test_stored_references_are_computed_as_training_computes(model: Path, tmp_path: Path) -> None:
    module = make_module(model, PreferenceConfig(reference="stored"))
    losses, _ = fit(module, make_data(pairs_file(tmp_path), model), 1, precision="bf16-mixed")
    assert losses == [pytest.approx(math.log(2), abs=1e-4)]


def test_kto_likes_what_is_liked(model: Path, tmp_path: Path) -> None:
    data = make_data(pairs_file(tmp_path), model, form="answers", batch_size=8)
    found = metrics_of(make_module(model, PreferenceConfig("kto")), data, 12)
    assert found["train/rewards/chosen"] > found["train/rewards/rejected"] and found["train/kl"] >= 0


def test_accumulated_batches_are_one_large_batch(model: Path, tmp_path: Path) -> None:
    """Of pairs of other lengths, and an unequal last batch, which has fewer."""
    rows = [pair(number) for number in range(6)]
    rows[4] = {**rows[4], "chosen": rows[4]["rejected"]}  # left out: one batch has two pairs and one has three
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    ends = []
    for batch_size, accumulate in ((6, 1), (3, 2)):
        data = make_data(path, model, batch_size=batch_size, max_bad_fraction=0.5)
        module = make_module(model, PreferenceConfig(sft_weight=0.0))
        fit(module, data, 2, accumulate_grad_batches=accumulate)
        ends.append({name: weight.detach() for name, weight in module.named_parameters()})
    for name, weight in ends[0].items():
        assert torch.allclose(weight, ends[1][name], atol=2e-5), name


def two_ranks(rank: int, port: int, out: str, model: Path, path: Path, preference: PreferenceConfig) -> None:
    form = "answers" if preference.loss == "kto" else "pairs"
    fit_rank(rank, port, out, make_module(model, preference), make_data(path, model, form=form), max_steps=3)


@pytest.mark.parametrize("preference", [PreferenceConfig(sft_weight=0.5), PreferenceConfig("kto")], ids=["dpo", "kto"])
def test_two_ranks_are_one_process(model: Path, tmp_path: Path, preference: PreferenceConfig) -> None:
    path = pairs_file(tmp_path)
    found = run_two_ranks(two_ranks, tmp_path, model, path, preference)
    form = "answers" if preference.loss == "kto" else "pairs"
    module = make_module(model, preference)
    losses, _ = fit(module, make_data(path, model, form=form), 3)
    for rank in found:
        assert rank["losses"] == pytest.approx(losses, abs=1e-5)
        for name, weight in module.state_dict().items():
            assert torch.allclose(rank["weights"][name], weight, atol=2e-5), name


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(model: Path, tmp_path: Path, num_workers: int) -> None:
    path = pairs_file(tmp_path, 10)
    whole, _ = fit(make_module(model), make_data(path, model), 5)
    saver = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=2)
    fit(make_module(model), make_data(path, model), 2, saver, enable_checkpointing=True)
    rest, _ = fit(make_module(model), make_data(path, model, num_workers=num_workers), 5, ckpt=tmp_path / "last.ckpt")
    assert rest == pytest.approx(whole[2:], abs=1e-6)
    with pytest.raises(ValueError, match="saved data state has data"):
        fit(make_module(model), make_data(pairs_file(tmp_path, 9), model), 5, ckpt=tmp_path / "last.ckpt")


def test_an_adapter_goes_out_beside_its_base(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    out = tmp_path / "out"
    module = make_module(model, adapter=AdapterConfig(r=2, lora_alpha=8), out=str(out))
    fit(module, make_data(pairs_file(tmp_path), model), 2)
    assert (out / "adapters" / "default").is_dir()
    assert load_model(out, adapter="default").model is not None


def test_speech_and_pictures_are_compared_too(tmp_path: Path) -> None:
    """All senses, experts, a CTC head: every parameter has a gradient, as DDP wants."""
    import numpy as np
    from PIL import Image

    from mmllm.data.samples.stored import pack_codes
    from mmllm_tokenizers.pointer import PointerRule

    folder = make_tokenizer(pointer=PointerRule())
    save_model(tmp_path / "model", make_model(folder), folder)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    words = [{"word": "one", "start": 0.0, "end": 0.02}, {"word": "two", "start": 0.02, "end": 0.05}]
    said = []
    for number in range(2):
        codes_KF = rng.integers(0, 12, (3, 9 + number))
        (tmp_path / f"{number}.npz").write_bytes(pack_codes(codes_KF, folder.require_audio().hash, folder.frame_rate))
        part = {"type": "audio", "audio": f"{number}.npz", "words": words}
        said.append([{"role": "assistant", "content": [part]}])
    seen = [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many"}]}]
    answers = [[{"role": "assistant", "content": text}] for text in ("two", "two blue squares")]
    rows = [
        {"task": "speak", "prompt": [{"role": "user", "content": "one two"}], "chosen": said[0], "rejected": said[1]},
        {"task": "caption", "prompt": seen, "chosen": answers[0], "rejected": answers[1]},
        {"task": "question", "prompt": asked, "images": ["a.png"], "chosen": answers[1], "rejected": answers[0]},
        {"prompt": asked, "images": ["a.png"], "chosen": answers[0], "rejected": answers[1]},
    ]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    for form, loss in (("pairs", "sigmoid"), ("answers", "kto")):
        data = make_data(path, tmp_path / "model", form=form)
        module = make_module(tmp_path / "model", PreferenceConfig(loss))  # type: ignore[arg-type]
        losses, _ = fit(module, data, 4)
        assert all(math.isfinite(each) for each in losses) and losses[-1] < losses[0]
        batch = next(iter(data.train_dataloader()))
        module.zero_grad()
        module.loss_of(batch)[0].backward()
        without = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
        assert without == []


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_a_rank_whose_rows_all_failed_gives_every_gradient(model: Path, tmp_path: Path, loss: Any) -> None:
    """Of 0: the other ranks wait for them."""
    data = make_data(pairs_file(tmp_path), model, form="answers" if loss == "kto" else "pairs")
    dataset = data._dataset("train", None)
    batch = dataset.packed([], {})
    batch.mismatched = dataset.packed([], {})
    module = make_module(model, PreferenceConfig(loss))
    module.configure_model()
    module.loss_of(batch)[0].backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_replay_is_its_own_loss_beside(model: Path, tmp_path: Path) -> None:
    from mmllm.data import commands

    manifest = write_rows(tmp_path / "texts.jsonl", [{"id": f"t{n}", "text": f"one two {n}"} for n in range(20)])
    commands.build(manifest, tmp_path / "shards", model)
    commands.index(str(tmp_path / "shards" / "text-*.tar"), model)
    recipe = tmp_path / "recipe.yaml"
    sources = [{"name": "text", "kind": "text", "shards": str(tmp_path / "shards" / "text-*.tar"), "weight": 1.0}]
    recipe.write_text(json.dumps({"seed": 0, "tokenizer": str(model), "sequence_length": 48, "sources": sources}))
    module = make_module(model, PreferenceConfig(replay_weight=0.5))
    data = make_data(pairs_file(tmp_path), model, replay_recipe=str(recipe), replay_sequences=2)
    assert data.source_names == ["text"] and data.replay is not None
    data.take_transform(transform := ImageTransform(16, mode="pad"))
    with pytest.raises(ValueError, match="sees 32 pixels but the tokenizer folder's image_size is 16"):
        data.take_transform(ImageTransform(32, mode="pad"))
    assert data.replay._dataset._transform is transform, "made anew, as the model's tower saw pictures"
    found = metrics_of(module, data, 2)
    assert found["train/loss/replay"] > 0
    batch = next(iter(data.train_dataloader()))
    assert batch.replay is not None and batch.replay.token_ids_BT.shape[0] == 2
    loss, _, totals = module.loss_of(batch)
    batch.replay = None
    without, _, _ = module.loss_of(batch)
    assert float(loss.detach()) > float(without.detach()) and float(totals.task_loss) > 0
    assert float(without.detach()) == pytest.approx(float(totals.task_loss), abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "dpo"}, "preference.loss is 'dpo'"),
        ({"beta": 0.0}, "preference.beta is 0.0"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "hinge doesn't know"),
        ({"loss": "kto", "reference": "stored"}, "kto also asks the reference"),
        ({"reference": "ema"}, "preference.reference is 'ema'"),
        ({"loss": "kto", "sft_weight": 1.0}, "which is of pairs"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceConfig(**changes)


def test_kto_compares_an_answer_with_others(model: Path, tmp_path: Path) -> None:
    data = make_data(pairs_file(tmp_path), model, form="answers", batch_size=1)
    with pytest.raises(ValueError, match="batch_size is 1; kto compares each answer with others of its batch"):
        fit(make_module(model, PreferenceConfig("kto")), data, 1)


def test_a_reference_of_another_tokenizer_is_refused(model: Path, tmp_path: Path) -> None:
    folder = make_tokenizer()
    save_model(tmp_path / "other", make_model(folder), folder)
    module = make_module(model, PreferenceConfig(reference_model=str(tmp_path / "other")))
    with pytest.raises(ValueError, match="log-probabilities of other tokens can't be compared"):
        module.configure_model()
    data = make_data(pairs_file(tmp_path), tmp_path / "other")
    with pytest.raises(ValueError, match="name one tokenizer folder in both"):
        fit(make_module(model), data, 1)


def test_data_of_another_form_and_a_base_that_moves_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set form to answers"):
        fit(make_module(model, PreferenceConfig("kto")), make_data(pairs_file(tmp_path), model), 1)
    with pytest.raises(ValueError, match="there is no adapter"):
        make_module(model, PreferenceConfig(reference="adapter")).configure_model()
