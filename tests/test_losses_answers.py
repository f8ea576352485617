"""Log-probabilities of answers against the engine's, and against a loop over positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmllm.batch import AnswerBatch, Modality
from mmllm.checkpoints.settings import Sampling
from mmllm.data.loading.answers import AnswerDocument, pack_answers
from mmllm.data.loading.collate import Gap
from mmllm.data.samples.document import Document, DocumentWriter
from mmllm.data.samples.documents import build_document, build_prompt
from mmllm.data.samples.sample import Sample
from mmllm.inference.engine.engine import Engine
from mmllm.inference.engine.requests import TextRequest, TextResult
from mmllm.inference.engine.sampling import TextRules
from mmllm.inference.engine.unit_rows import UnitRules
from mmllm.inference.prompts import join
from mmllm.losses.answers import UnitLayout, sum_by_answer, target_logprobs
from mmllm.model.multimodal import MultimodalModel
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.pointer import PointerRule
from mmllm_tokenizers.vocab import AUDIO_END
from tests.inference_fixtures import images, make, make_model, make_tokenizer

WORDS = [{"word": "one", "start": 0.0, "end": 0.01}, {"word": "two", "start": 0.01, "end": 0.03}]


def written(folder: TokenizerFolder, prompt: Document, ids: list[int]) -> Document:
    writer = DocumentWriter(folder)
    writer.ids(ids, is_target=True)
    return join([prompt, writer.finish()])


def speech(folder: TokenizerFolder, key: str, num_frames: int) -> Document:
    rng = np.random.default_rng(num_frames)
    codes_KF = rng.integers(0, 12, (folder.heard_codebooks, num_frames))
    metadata = {} if folder.config.pointer is None else {"words": WORDS}
    sample = Sample(key, "one two", codes_KF=codes_KF, metadata=metadata)
    return build_document(sample, "speak", folder)


def slow(
    model: MultimodalModel, folder: TokenizerFolder, document: Document, rules: TextRules | None, temperature: float
) -> tuple[list[float], list[float]]:
    """Log-probability and entropy of each target of one document, position by position, as the engine draws."""
    units = UnitRules(folder, model.pointer is not None)
    batch = pack_answers([[AnswerDocument(document, 0)]], document.num_tokens)
    logits_TV = model.logits(batch.packed)[0].detach().float()
    logprobs, entropies = [], []
    position = 0
    for place in range(1, document.num_tokens):
        if not document.targets_T[place]:
            continue
        logits_V, label = logits_TV[place - 1], int(document.token_ids_T[place])
        choices: list[tuple[list[int], int]] = []
        ended = document.codes_TK[place - 1, 0] == units.filler if units.delay else False
        begun = document.modality_T[place - 1] == Modality.UNITS
        if document.modality_T[place] == Modality.UNITS:
            phase = position % units.step
            start, size = units.block(phase)
            ids = list(range(start, start + size))
            if begun and not phase and not units.has_pointer:
                ids.append(units.end_id)
            if not ended and label in ids:
                choices.append((ids, label))
            for codebook in range(1, units.num_rows):
                code, begin = int(document.codes_TK[place, codebook]), units.starts[codebook]
                if code != units.filler:
                    choices.append((list(range(begin, begin + units.filler)), begin + code))
            position += 1
        elif label == folder.id(AUDIO_END):
            if not ended and not units.has_pointer:
                start, size = units.block(0)
                choices.append(([*range(start, start + size), units.end_id], units.end_id))
        else:
            ids = [i for i in range(model.config.num_text) if rules is None or i not in rules.forbidden_ids]
            choices.append((ids, label))
        log_each = [(logits_V[ids] / temperature).log_softmax(0) for ids, _ in choices]
        logprobs.append(sum(float(log[ids.index(own)]) for log, (ids, own) in zip(log_each, choices, strict=True)))
        entropies.append(sum(float(-(log.exp() * log).sum()) for log in log_each))
    return logprobs, entropies


@pytest.mark.parametrize(
    ("pattern", "num_codebooks", "has_pointer"),
    [("delay", 3, False), ("parallel", 2, False), ("flatten", 2, False), ("delay", 1, False), ("delay", 3, True)],
)
def test_targets_are_as_a_loop_over_positions_has_them(pattern: str, num_codebooks: int, has_pointer: bool) -> None:
    folder = make_tokenizer(pattern, num_codebooks, pointer=PointerRule() if has_pointer else None)
    model = make_model(folder)
    rules = TextRules.of(folder)
    caption = build_document(Sample("a", "a red circle", image=images(1)[0]), "caption", folder)
    documents = [speech(folder, "b", 8), caption, speech(folder, "c", 5)]
    rows = [
        [AnswerDocument(documents[0], 0), Gap(3), AnswerDocument(documents[1], 1)],
        [AnswerDocument(documents[2], 2)],
    ]
    batch = pack_answers(rows, sum(document.num_tokens for document in documents) + 3)
    forbidden_V = rules.mask_V == -torch.inf
    for chunk_bytes in (None, 4000):
        found = target_logprobs(
            model,
            model(batch.packed),
            batch,
            layout=UnitLayout.of(folder),
            forbidden_V=forbidden_V,
            temperature=0.7,
            with_entropy=True,
            chunk_bytes=chunk_bytes,
        )
        assert found.entropy_M is not None and found.logprobs_M.requires_grad and not found.entropy_M.requires_grad
        for number, document in enumerate(documents):
            logprobs, entropies = slow(model, folder, document, rules, 0.7)
            here = found.answer_M == number
            assert found.logprobs_M[here].tolist() == pytest.approx(logprobs, abs=2e-5)
            assert found.entropy_M[here].tolist() == pytest.approx(entropies, abs=2e-5)


def test_chunks_change_no_gradient() -> None:
    folder = make_tokenizer("delay", 3)
    model = make_model(folder)
    document = speech(folder, "b", 6)
    batch = pack_answers([[AnswerDocument(document, 0)]], document.num_tokens)
    gradients = []
    for chunk_bytes in (None, 3000):
        model.zero_grad()
        found = target_logprobs(
            model, model(batch.packed), batch, layout=UnitLayout.of(folder), chunk_bytes=chunk_bytes
        )
        found.logprobs_M.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, grad in gradients[0].items():
        assert (grad - gradients[1][name]).norm() <= 1e-5 * grad.norm(), name


def test_what_the_engine_draws_has_the_log_probabilities_it_told() -> None:
    assistant = make()
    folder, model = assistant.tokenizer, assistant.model
    rules = TextRules.of(folder)
    prompts = [build_prompt("caption", folder, image=image) for image in images(3)]
    requests = [
        TextRequest(prompt, Sampling(temperature=1.0, seed=3), max_new_tokens=12, number=n, num_logprobs=0)
        for n, prompt in enumerate(prompts)
    ]
    results = [result for result in Engine(model, folder).run(requests) if isinstance(result, TextResult)]
    documents = []
    for prompt, result in zip(prompts, results, strict=True):
        ends = [folder.text.end_ids[0]] if result.finish_reason == "stop" else []
        documents.append(AnswerDocument(written(folder, prompt, [*result.ids, *ends]), len(documents)))
    batch = pack_answers([documents], sum(document.num_tokens for document in documents))
    found = target_logprobs(model, model(batch.packed), batch, forbidden_V=rules.mask_V == -torch.inf)
    told = [value for result in results for value in result.logprobs or ()]
    assert found.logprobs_M.tolist() == pytest.approx(told, abs=1e-4)
    sums_A = sum_by_answer(found.logprobs_M, found.answer_M, batch.num_answers)
    assert sums_A.tolist() == pytest.approx([sum(result.logprobs or ()) for result in results], abs=1e-4)


def test_where_a_reward_head_reads_is_the_answers_last_token() -> None:
    folder = make_tokenizer("delay", 3)
    documents = [build_document(Sample(str(n), "two blue squares"), "text", folder) for n in range(3)]
    rows = [
        [AnswerDocument(documents[0], 0), AnswerDocument(documents[1], 0, False)],
        [AnswerDocument(documents[2], 1)],
    ]
    batch = pack_answers(rows, 60)
    ids_A = batch.packed.token_ids_BT.flatten()[batch.last_A]
    assert ids_A.tolist() == [int(document.token_ids_T[-1]) for document in documents]
    assert batch.num_answers == batch.num_documents == 3
    assert batch.is_chosen_A.tolist() == [True, False, True] and batch.group_A.tolist() == [0, 0, 1]


def test_a_batch_moves_as_a_whole() -> None:
    folder = make_tokenizer("delay", 3)
    document = build_document(Sample("a", "one, two"), "text", folder)
    whole = pack_answers([[AnswerDocument(document, 0, reference=-1.5)]], 40)
    batch = pack_answers([[AnswerDocument(document, 0, reference=-1.5)]], 40, replay=whole.packed)
    doubled = batch.map(lambda tensor: tensor * 2)
    assert isinstance(doubled, AnswerBatch) and doubled.replay is not None
    assert torch.equal(doubled.packed.token_ids_BT, batch.packed.token_ids_BT * 2)
    assert torch.equal(doubled.replay.labels_BT, whole.packed.labels_BT * 2)
    assert doubled.packed.metadata is not None and doubled.reference_A.tolist() == [-3.0]


def test_units_without_their_layout_are_refused() -> None:
    folder = make_tokenizer("delay", 3)
    model = make_model(folder)
    document = speech(folder, "b", 4)
    batch = pack_answers([[AnswerDocument(document, 0)]], document.num_tokens)
    with pytest.raises(ValueError, match="UnitLayout"):
        target_logprobs(model, model(batch.packed), batch)
    with pytest.raises(ValueError, match="temperature is 0"):
        target_logprobs(model, model(batch.packed), batch, temperature=0.0)
