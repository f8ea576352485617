"""Pictures and clips are told which of their document they are, and answers weigh what the config says."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mmllm.batch import IGNORE, PackedBatch
from mmllm.losses.batch import LossFunction, answer_targets
from mmllm.model.audio_projectors import AudioProjectorConfig
from mmllm.model.image_projectors import ImageProjectorConfig
from mmllm.model.media_numbers import MediaNumbers, numbers_in_documents
from mmllm.model.multimodal import ModelConfig, MultimodalModel
from mmllm_tokenizers.vocab import ANSWER, SPECIAL_TOKENS
from tests.test_model_multimodal import CONFIG, Documents, _model, pack

Document = dict[str, torch.Tensor]
ANSWER_ID = SPECIAL_TOKENS.index(ANSWER)


def joined(*parts: Document) -> Document:
    """Documents one behind the other as one document."""
    shift, whole = 0, {}
    for part in parts:
        for key, value in part.items():
            moved = value + shift if key.endswith("slots") else value
            whole.setdefault(key, []).append(moved)
        shift += len(part["ids"])
    widths = {key: max(t.shape[1] for t in whole[key]) for key in ("clips", "clip_slots", "clip_targets")}
    for key, width in widths.items():
        whole[key] = [
            torch.nn.functional.pad(t, (0, 0) * (t.ndim - 2) + (0, width - t.shape[1]), value=-1) for t in whole[key]
        ]
    keep = {key: [t for t in tensors if t.numel() or key not in ("images", "image_slots")] or tensors[:1]
            for key, tensors in whole.items()}  # fmt: skip
    return {key: torch.cat(tensors) for key, tensors in keep.items()}


def counted_by_hand(slots: torch.Tensor, batch: PackedBatch) -> list[int]:
    """The number of each, document by document, by walking through the positions."""
    starts = [row[0] for row in slots.tolist()]
    seen: dict[tuple[int, int], int] = {}
    numbers = {}
    num_positions = batch.document_ids_BT.shape[1]
    for position in range(batch.document_ids_BT.numel()):
        if position in starts:
            document = (position // num_positions, int(batch.document_ids_BT.flatten()[position]))
            numbers[position] = seen.get(document, 0)
            seen[document] = numbers[position] + 1
    return [numbers[start] for start in starts]


@pytest.fixture
def batch() -> PackedBatch:
    make = Documents(11)
    three = joined(make.caption(3), make.caption(2), make.transcript(6, 2), make.caption(4), make.transcript(3, 3))
    two = joined(make.transcript(4, 2), make.transcript(5, 2))
    return pack([[make.caption(5), three], [two, make.caption(2), make.text(3)]], 64)


def numbered(max_number: int = 8) -> ModelConfig:
    assert CONFIG.audio is not None
    projector = AudioProjectorConfig(pool=2, num_hidden_layers=2, kernel_size=3, max_number=max_number)
    return dataclasses.replace(
        CONFIG,
        image_projector=ImageProjectorConfig(max_number=max_number),
        audio=dataclasses.replace(CONFIG.audio, projector=projector),
    )


def learnt(config: ModelConfig) -> MultimodalModel:
    """A model whose numbers are no longer zero."""
    model = _model(config)
    for module in model.modules():
        if isinstance(module, MediaNumbers):
            torch.nn.init.normal_(module.embedding)
    return model


def test_numbers_are_those_counted_by_hand(batch):
    for slots in (batch.image_slots_NS, batch.clip_slots_CS):
        got = numbers_in_documents(slots[:, 0], batch.document_ids_BT)
        assert got.tolist() == counted_by_hand(slots, batch)
    assert numbers_in_documents(batch.image_slots_NS[:, 0], batch.document_ids_BT).tolist() == [0, 0, 1, 2, 0]
    assert numbers_in_documents(batch.clip_slots_CS[:, 0], batch.document_ids_BT).tolist() == [0, 1, 0, 1]


def test_order_in_the_batch_does_not_matter(batch):
    order = torch.tensor([3, 0, 4, 2, 1])
    got = numbers_in_documents(batch.image_slots_NS[order, 0], batch.document_ids_BT)
    assert got.tolist() == [2, 0, 0, 1, 0]


def test_tiles_have_the_number_of_their_picture():
    """Two pictures of three and two tiles in one document, then one of two in the next."""
    starts = torch.tensor([0, 4, 8, 13, 17, 22, 26])
    documents = torch.tensor([[0] * 22 + [1] * 10])
    pictures = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    assert numbers_in_documents(starts, documents, pictures).tolist() == [0, 0, 0, 1, 1, 0, 0]


def test_each_slot_gets_its_number_and_the_last_is_shared(batch):
    model = learnt(numbered(2))
    x_PD = model.splice(batch).flatten(0, 1)
    plain = _model(CONFIG)
    plain.load_state_dict(model.state_dict(), strict=False)
    plain_PD = plain.splice(batch).flatten(0, 1)
    assert model.image_projector is not None and model.image_projector.numbers is not None
    assert model.clip_projector is not None and model.clip_projector.numbers is not None
    wanted_PD = torch.zeros_like(x_PD)
    for slots, table in (
        (batch.image_slots_NS, model.image_projector.numbers.embedding),
        (batch.clip_slots_CS, model.clip_projector.numbers.embedding),
    ):
        for row, number in zip(slots.tolist(), counted_by_hand(slots, batch), strict=True):
            for position in row:
                if position >= 0:
                    wanted_PD[position] = table[min(number, 1)]
    torch.testing.assert_close(x_PD - plain_PD, wanted_PD)


def test_a_document_is_told_the_same_alone_and_packed(batch):
    model, make = learnt(numbered()), Documents(5)
    first, second = joined(make.caption(3), make.caption(4)), joined(make.caption(2), make.transcript(4, 2))
    packed = model.splice(pack([[first, second]], 48))[0]
    num_first, num_second = len(first["ids"]), len(second["ids"])
    torch.testing.assert_close(packed[:num_first], model.splice(pack([[first]], num_first))[0])
    alone = model.splice(pack([[second]], num_second))[0]
    torch.testing.assert_close(packed[num_first : num_first + num_second], alone)


def test_a_picture_alone_is_the_first():
    model = learnt(numbered())
    picture = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    same = model.image_embedding(picture, numbers_N=torch.tensor([0]))
    torch.testing.assert_close(model.image_embedding(picture), same)
    assert not torch.allclose(model.image_embedding(picture, numbers_N=torch.tensor([1])), same)


def test_a_model_without_numbers_goes_on_where_it_was(batch):
    """The embeddings begin at zero, so that they can be added to a trained model."""
    plain, model = _model(CONFIG), _model(numbered())
    model.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(model.splice(batch), plain.splice(batch))


@pytest.mark.parametrize("config", [ImageProjectorConfig, AudioProjectorConfig])
def test_a_negative_number_is_refused(config):
    with pytest.raises(ValueError, match="max_number is -1; give 0"):
        config(max_number=-1)


# -------------------------------------------------------------------------------------------------------------- answers
def with_question(make: Documents, num_before: int, num_answer: int) -> Document:
    document = make.text(num_before + 1 + num_answer)
    document["ids"][num_before] = ANSWER_ID
    document["labels"][num_before - 1] = ANSWER_ID
    return document


def test_answers_reach_from_their_mark_to_the_documents_end():
    make = Documents(2)
    rows = [[with_question(make, 4, 3), make.text(5), with_question(make, 2, 1)], [make.text(3), make.text(2)]]
    batch = pack(rows, 20)
    wanted = torch.zeros(2, 20, dtype=torch.bool)
    wanted[0, 4:8] = True
    wanted[0, 15:17] = True
    assert torch.equal(answer_targets(batch, ANSWER_ID), wanted)


def test_answers_weigh_what_the_config_says():
    make = Documents(4)
    batch = pack([[with_question(make, 5, 3), make.text(6)], [make.speech(4, 5), with_question(make, 3, 2)]], 20)
    config = dataclasses.replace(CONFIG, loss=dataclasses.replace(CONFIG.loss, answers=3.0))
    model = _model(CONFIG)
    plain = LossFunction(CONFIG, num_sources=2)(model, model(batch), batch)
    weighted = LossFunction(config, num_sources=2)(model, model(batch), batch)
    log_probs = model.logits(batch).log_softmax(dim=-1)
    is_answer = answer_targets(batch, ANSWER_ID) & (batch.labels_BT != IGNORE)
    answers = -log_probs[is_answer].gather(1, batch.labels_BT[is_answer][:, None]).sum()
    torch.testing.assert_close((weighted.objective - plain.objective).double(), 2.0 * answers, rtol=1e-6, atol=1e-6)
    for key in ("text", "units"):  # what is reported stays what it was
        torch.testing.assert_close(weighted.sums[key], plain.sums[key])
        torch.testing.assert_close(weighted.counts[key], plain.counts[key])
