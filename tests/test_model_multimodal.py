from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from mmllm.batch import IGNORE, Modality, PackedBatch
from mmllm.losses.batch import BatchLosses, LossFunction
from mmllm.losses.router import balance_loss, z_loss
from mmllm.losses.routing import RoutingTotals, router_losses
from mmllm.model.audio_projectors import AudioProjectorConfig
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.image_projectors import ImageProjectorConfig
from mmllm.model.multimodal import AudioConfig, LossConfig, ModelConfig, MultimodalModel
from mmllm.model.router import MoEConfig
from mmllm.model.vision import VisionConfig
from mmllm.training.totals import GlobalTotals
from mmllm_tokenizers.vocab import AUDIO_END, SPECIAL_TOKENS

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
}
TEXT, K, SIZE, POOL = 40, 3, 9, 2
END_OF_SOUND = SPECIAL_TOKENS.index(AUDIO_END)
CONFIG = ModelConfig(
    DecoderConfig(
        vocab_size=TEXT + K * (SIZE + 1), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=40,
        moe=MoEConfig(4, 2, 24), moe_layers=(1,),
    ),
    VisionConfig(CLIP),
    ImageProjectorConfig(),
    AudioConfig(K, SIZE, codebook_dim=12, projector=AudioProjectorConfig(pool=POOL, num_hidden_layers=2,
    kernel_size=3)),
    LossConfig(text=1.0, units=0.5, ctc=0.3),
)  # fmt: skip


def _model(config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float64) -> MultimodalModel:
    torch.manual_seed(0)
    model = MultimodalModel(config).to(dtype).eval()
    for parameter in model.decoder.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


def _loss(model: MultimodalModel, batch: PackedBatch) -> torch.Tensor:
    """What training minimizes."""
    losses = _losses(model, batch)
    return GlobalTotals.of(losses, batch).loss(losses, model.config)


def _losses(model: MultimodalModel, batch: PackedBatch) -> BatchLosses:
    return LossFunction(model.config, num_sources=2)(model, model(batch), batch)


class Documents:
    """Documents of each kind, packed by hand: what the data engine does, in its simplest form."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def _ids(self, count: int) -> torch.Tensor:
        return torch.randint(len(SPECIAL_TOKENS), TEXT, (count,), generator=self.generator)

    def _empty(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        length = len(ids)
        return {
            "ids": ids,
            "labels": torch.full((length,), IGNORE),
            "modality": torch.zeros(length, dtype=torch.int64),
            "codes": torch.full((length, K), -1),
            "unit_labels": torch.full((length, K), IGNORE),
            "images": torch.zeros(0, 3, 16, 16, dtype=torch.uint8),
            "image_slots": torch.zeros(0, 4, dtype=torch.int64),
            "clips": torch.zeros(0, 0, K, dtype=torch.int64),
            "clip_slots": torch.zeros(0, 0, dtype=torch.int64),
            "clip_targets": torch.zeros(0, 0, dtype=torch.int64),
        }

    def text(self, length: int) -> dict[str, torch.Tensor]:
        document = self._empty(self._ids(length))
        document["labels"][:-1] = document["ids"][1:]
        return document

    def caption(self, length: int) -> dict[str, torch.Tensor]:
        document = self._empty(torch.cat([torch.full((4,), 3), self._ids(length)]))
        document["labels"][4:-1] = document["ids"][5:]
        document["modality"][:4] = Modality.IMAGE
        document["images"] = torch.randint(0, 256, (1, 3, 16, 16), generator=self.generator, dtype=torch.uint8)
        document["image_slots"] = torch.arange(4)[None]
        return document

    def transcript(self, frames: int, length: int) -> dict[str, torch.Tensor]:
        slots = -(-frames // POOL)
        document = self._empty(torch.cat([torch.full((slots,), 4), self._ids(length)]))
        document["labels"][slots:-1] = document["ids"][slots + 1 :]
        document["modality"][:slots] = Modality.AUDIO
        document["clips"] = torch.randint(0, SIZE, (1, frames, K), generator=self.generator)
        document["clip_slots"] = torch.arange(slots)[None]
        document["clip_targets"] = document["ids"][None, slots : slots + 3]
        return document

    def speech(self, length: int, frames: int) -> dict[str, torch.Tensor]:
        units = torch.randint(0, SIZE, (frames, K), generator=self.generator)
        units[0, 1:] = SIZE  # a filler, as the delay pattern begins
        document = self._empty(torch.cat([self._ids(length), TEXT + units[:, 0], torch.tensor([END_OF_SOUND])]))
        document["modality"][length : length + frames] = Modality.UNITS
        document["codes"][length : length + frames] = units
        document["labels"][length - 1 : -1] = document["ids"][length:]
        document["unit_labels"][length - 1 : length - 1 + frames] = torch.where(units == SIZE, IGNORE, units)
        return document


def _pad(tensors: list[torch.Tensor], width: int) -> torch.Tensor:
    return torch.cat([F.pad(t, (0, 0) * (t.ndim - 2) + (0, width - t.shape[1]), value=-1) for t in tensors])


def pack(rows: list[list[dict[str, torch.Tensor]]], length: int) -> PackedBatch:
    num = len(rows)
    fill = {"ids": 0, "labels": IGNORE, "modality": 0, "codes": -1, "unit_labels": IGNORE}
    empty = Documents(0)._empty(torch.zeros(1, dtype=torch.int64))
    dense = {k: torch.full((num, length, *empty[k].shape[1:]), v) for k, v in fill.items()}
    positions, documents = torch.zeros(num, length, dtype=torch.int64), torch.full((num, length), -1)
    source = torch.full((num, length), -1)
    found: dict[str, list[torch.Tensor]] = {k: [v] for k, v in empty.items() if k not in fill}
    for b, row in enumerate(rows):
        start = 0
        for d, document in enumerate(row):
            stop = start + len(document["ids"])
            for key in fill:
                dense[key][b, start:stop] = document[key]
            positions[b, start:stop], documents[b, start:stop] = torch.arange(stop - start), d
            source[b, start:stop] = d % 2
            for key in found:
                shift = b * length + start if key.endswith("slots") else 0
                found[key].append(document[key] + shift)
            start = stop
    widths = {k: max(t.shape[1] for t in found[k]) for k in ("clips", "clip_slots", "clip_targets")}
    return PackedBatch(
        dense["ids"], dense["labels"], positions, documents, dense["modality"], source, dense["codes"],
        dense["unit_labels"], torch.cat(found["images"]), torch.cat(found["image_slots"]),
        *(_pad(found[k], widths[k]) for k in ("clips", "clip_slots", "clip_targets")),
    )  # fmt: skip


def _mixed() -> list[list[dict[str, torch.Tensor]]]:
    make = Documents(7)
    return [
        [make.caption(9), make.text(12), make.transcript(7, 6)],
        [make.speech(6, 11), make.transcript(12, 5), make.caption(5)],
    ]


def _reported(model, losses):
    """Sums and counts by name, the router's z-loss among them."""
    routing = losses.routing
    z = router_losses(model.config.decoder.moe, routing, RoutingTotals.of(routing))["z"].detach()
    parts = {key: (losses.sums[key], losses.counts[key]) for key in ("text", "units", "ctc")}
    return parts | {"z": (z * routing.num_tokens, torch.tensor(routing.num_tokens))}


def test_a_mixed_batch_equals_its_parts():
    model, rows = _model(), _mixed()
    whole = _losses(model, pack(rows, 48))
    logits = model.logits(pack(rows, 48))
    sums, counts, source_sums = {}, {}, 0
    for b, row in enumerate(rows):
        start = 0
        for d, document in enumerate(row):
            batch = pack([[document]], len(document["ids"]))
            stop = start + len(document["ids"])
            torch.testing.assert_close(logits[b, start:stop], model.logits(batch)[0], rtol=1e-9, atol=1e-10)
            part = _losses(model, batch)
            for key, (value, count) in _reported(model, part).items():
                sums[key] = sums.get(key, 0) + value
                counts[key] = counts.get(key, 0) + count
            source_sums = source_sums + (part.source_sums if d % 2 == 0 else part.source_sums.flip(0))
            start = stop
    for key, (value, count) in _reported(model, whole).items():
        torch.testing.assert_close(value, sums[key], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(count, counts[key])
    torch.testing.assert_close(whole.source_sums, source_sums, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole.source_counts.sum(), whole.counts["text"] + whole.counts["units"])


def test_losses_by_hand():
    model = _model()
    make = Documents(3)
    batch = pack([[make.text(10)], [make.speech(5, 6)]], 16)
    output = _losses(model, batch)
    log_probs = model.logits(batch).log_softmax(dim=-1)
    text = -sum(log_probs[0, t, batch.token_ids_BT[0, t + 1]] for t in range(9))
    torch.testing.assert_close(output.sums["text"].double(), text, rtol=1e-6, atol=1e-6)
    assert output.counts["text"] == 9
    blocks = model.unit_logits(model.hidden(batch))[1].log_softmax(dim=-1)
    units = -log_probs[1, 10, END_OF_SOUND]
    for t in range(4, 10):
        frame = log_probs[1, t, batch.token_ids_BT[1, t + 1]]
        for k in range(1, K):
            if batch.audio_labels_BTK[1, t, k] != IGNORE:
                frame = frame + blocks[t, k, batch.audio_labels_BTK[1, t, k]]
        units = units - frame / K
    torch.testing.assert_close(output.sums["units"].double(), units, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output.counts["units"].item(), 6 - 2 / K + 1, rtol=1e-6, atol=0)
    assert output.routing.counts_LME is not None
    by_modality = output.routing.counts_LME.sum(dim=(0, 2)).tolist()
    assert by_modality == [2 * (10 + 6), 0, 0, 2 * 6]
    targets = 9 + 6 - 2 / K + 1
    routing, num_tokens = output.routing, output.routing.num_tokens
    balance = balance_loss(routing.counts_LE, routing.probability_sums_LE, num_tokens, routing.top_k)
    auxiliary = 0.01 * balance + 0.001 * z_loss(routing.z_sums_L, num_tokens)
    torch.testing.assert_close(_loss(model, batch), (text + 0.5 * units) / targets + auxiliary, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ctc": -0.1}, r"loss\.ctc is -0\.1; a weight is a finite number, 0 or more"),
        ({"units": float("nan")}, r"loss\.units is nan"),
        ({"codebook_weights": [1.0, -2.0]}, r"loss\.codebook_weights\[1\] is -2\.0"),
        ({"source_weights": {"books": float("inf")}}, r"loss\.source_weights\['books'\] is inf"),
        ({"word_dropout": 1.5}, r"loss\.word_dropout is 1\.5; it is a share of words"),
    ],
)
def test_weights_that_are_none_are_refused_when_they_are_read(given: dict, message: str):
    with pytest.raises(ValueError, match=message):
        LossConfig(**given)


def test_the_heads_z_loss_is_reported_where_it_has_a_weight():
    """Of text targets alone, each counts 1: the mean of logsumexp² over them."""
    config = dataclasses.replace(CONFIG, loss=dataclasses.replace(CONFIG.loss, head_z_loss_coef=0.01))
    model, make = _model(config), Documents(3)
    batch = pack([[make.text(9), make.text(5)]], 16)
    losses = _losses(model, batch)
    z_M = model.logits(batch)[batch.labels_BT != IGNORE].logsumexp(dim=-1).square()
    assert losses.counts["head_z"] == len(z_M)
    torch.testing.assert_close(losses.sums["head_z"], z_M.sum().detach())
    assert "head_z" not in _losses(_model(), batch).sums


@pytest.mark.parametrize("repeats", [False, True])
def test_a_clip_whose_transcript_cannot_be_aligned_leaves_the_ctc_loss_of_its_neighbour(repeats: bool):
    """Three slots: too few for four targets, and for three of which two are equal."""
    model, make = _model(), Documents(5)
    fitting, too_long = make.transcript(6, 6), make.transcript(6, 6)
    first, second, third = 20, 21, 22
    too_long["clip_targets"] = torch.tensor([[first, first, third] if repeats else [first, second, third, first]])
    alone = _losses(model, pack([[fitting]], 32))
    both = _losses(model, pack([[fitting, too_long]], 32))
    assert (float(alone.counts["ctc"]), float(both.counts["ctc"])) == (1.0, 1.0)
    assert (float(alone.num_ctc_left_out), float(both.num_ctc_left_out)) == (0.0, 1.0)
    assert alone.sums["ctc"] > 1
    torch.testing.assert_close(both.sums["ctc"], alone.sums["ctc"])
    neither = _losses(model, pack([[too_long]], 32))
    assert neither.sums["ctc"] == neither.counts["ctc"] == 0 and neither.num_ctc_left_out == 1
    too_long["clip_targets"] = torch.tensor([[first, first] if repeats else [first, second, third]])
    assert float(_losses(model, pack([[fitting, too_long]], 32)).counts["ctc"]) == 2, "as long as its slots"


def test_a_text_batch_touches_every_parameter():
    model = _model(dataclasses.replace(CONFIG, loss=LossConfig(ctc=0.3, word_dropout=0.5)), torch.float32).train()
    _loss(model, pack([[Documents(1).text(20)]], 24)).backward()
    untouched = [name for name, p in model.named_parameters() if p.grad is None]
    assert not untouched
    assert all(p.grad.abs().max() == 0 for p in model.vision.parameters())


def test_a_mixed_batch_trains_every_parameter():
    config = dataclasses.replace(CONFIG, loss=LossConfig(ctc=0.3, word_dropout=0.5))
    audio = dataclasses.replace(CONFIG.audio.projector, frame_mask=0.8, code_dropout=0.5)
    config = dataclasses.replace(config, audio=dataclasses.replace(config.audio, projector=audio))
    model = _model(config, torch.float32).train()
    _loss(model, pack(_mixed(), 48)).backward()
    still = [name for name, p in model.named_parameters() if not p.grad.abs().max() > 0]
    assert not still


def test_no_gradient_from_a_loss_to_another_documents_image():
    model, rows = _model(dtype=torch.float32), _mixed()
    batch = pack(rows, 48)
    x_BTD = model.splice(batch).detach().requires_grad_()
    hidden_BTD, _ = model.decoder(x_BTD, batch.positions_BT, batch.document_ids_BT)
    (grad,) = torch.autograd.grad(hidden_BTD[0, 13:25].sum(), x_BTD)  # the text between a picture and a sound
    assert grad[0, :13].abs().max() == 0
    assert grad[0, 25:].abs().max() == 0
    assert grad[1].abs().max() == 0


def test_another_documents_picture_changes_nothing_in_a_tower_that_learns():
    """As `configs/quickstart` has it: a ResNet learnt from nothing, in training."""
    resnet = {**CLIP, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32}}
    vision = VisionConfig(resnet, layer="layer3", norm="group")
    model = _model(dataclasses.replace(CONFIG, vision=vision, loss=LossConfig()), torch.float32).train()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    before = model.image_embedding(images)
    images[1] = 255 - images[1]
    after = model.image_embedding(images)
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1])


def test_slots_hold_images_and_clips_in_order():
    model = _model()
    batch = pack(_mixed(), 48)
    x_PD = model.splice(batch).flatten(0, 1)
    torch.testing.assert_close(x_PD[batch.image_slots_NS], model.image_embedding(batch.images_NCHW))
    real = batch.clip_slots_CS >= 0
    torch.testing.assert_close(x_PD[batch.clip_slots_CS[real]], model.clip_embedding(batch.clip_codes_CFK)[real])
    assert real.sum(dim=1).tolist() == [4, 6]


def test_unit_embedding_is_what_splice_puts_at_a_frame():
    model = _model()
    batch = pack([[Documents(3).speech(5, 6)]], 16)
    x_BTD = model.splice(batch)
    frames = model.unit_embedding(batch.audio_codes_BTK[:, 5:11])
    torch.testing.assert_close(x_BTD[:, 5:11], frames)
    assert not torch.allclose(frames, model.decoder.embed(batch.token_ids_BT[:, 5:11]))
    text = model.decoder.embed(batch.token_ids_BT)
    torch.testing.assert_close(x_BTD[:, :5], text[:, :5])
    torch.testing.assert_close(x_BTD[:, 11:], text[:, 11:])


def test_word_dropout_hides_only_target_text():
    model = _model(dataclasses.replace(CONFIG, loss=LossConfig(word_dropout=0.99)))
    batch = pack([[Documents(5).caption(20), Documents(5).speech(6, 4)]], 40)
    clean = model.splice(batch)
    hidden = (model.train().splice(batch) != clean).any(dim=-1)
    assert hidden[0, 5:24].sum() > 15  # behind the caption's first token, whose label came from a token that stays
    assert not hidden[0, :5].any()
    assert not hidden[0, 30:34].any()


def test_codebooks_start_the_embeddings():
    model = _model()
    codebooks = torch.randn(K + 1, SIZE, 12) * 5
    model.initialize_audio(codebooks)
    codes = torch.randint(0, SIZE, (4000, K))
    embedded = model.code_embedding(codes)
    assert abs(embedded.var(dim=0).mean().item() - 1) < 0.25
    expected = sum(codebooks[k][codes[:, k]] for k in range(K)).to(embedded)
    torch.testing.assert_close(embedded, expected * embedded.std() / expected.std(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"\[3, 9, 5\]; the model's audio config wants \[3, 9, 12\]"):
        model.initialize_audio(torch.randn(3, 9, 5))


def test_config_round_trip_and_unknown_keys():
    values = CONFIG.to_dict()
    assert ModelConfig.from_dict(values) == CONFIG
    assert values["decoder"]["moe_layers"] == [1]
    with pytest.raises(ValueError, match=r"unknown key 'num_expert' of model.decoder.moe; MoEConfig has num_experts"):
        ModelConfig.from_dict(values | {"decoder": values["decoder"] | {"moe": {"num_expert": 3}}})
    with pytest.raises(ValueError, match=r"'vocab_size' of model.decoder is missing"):
        ModelConfig.from_dict({"decoder": {"hidden_size": 32}})
    with pytest.raises(ValueError, match="leaves 9 text ids"):
        dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, vocab_size=39))


def test_parameters_are_counted():
    model = _model()
    expert = 3 * 24 * 32
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert model.num_parameters() - model.num_active_parameters() == 2 * expert


def test_slots_and_images_that_differ_are_named():
    model = _model()
    batch = pack([[Documents(5).caption(20)]], 40)
    batch.image_slots_NS = batch.image_slots_NS[:, :3]
    with pytest.raises(ValueError, match=r"\[1, 3\] image slots, but the model fills \[1, 4\]"):
        model(batch)
    blind = _model(dataclasses.replace(CONFIG, vision=None))
    with pytest.raises(ValueError, match="no vision tower"):
        blind(batch)


def test_large_model_builds_on_the_meta_device():
    config = ModelConfig(
        DecoderConfig(vocab_size=40000, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
        num_key_value_heads=4,
                      moe=MoEConfig(16, 2, 768)),
        VisionConfig("ViT-B-16"),
        ImageProjectorConfig("average", num_tokens=49),
        AudioConfig(8, 1024),
    )  # fmt: skip
    with torch.device("meta"):
        model = MultimodalModel(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.num_parameters() > 1e9
    assert model.num_active_parameters() < 0.5e9


def test_bf16_autocast_is_close_to_fp32():
    model = _model(dtype=torch.float32)
    batch = pack(_mixed(), 48)
    exact = _loss(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = _loss(model, batch)
    assert rounded.dtype == torch.float32
    assert abs(rounded.item() - exact.item()) < 0.03 * exact.item()
    rounded.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
