"""Interleaved documents of the demo: what is said of their pictures and sounds, and when."""

from __future__ import annotations

import hashlib
import json
import random

from mmllm.evaluation.scenes import POSITION_FORMS
from mmllm.quickstart.interleaved import ORDINALS, Document, _late_remarks, _question, make_interleaved
from mmllm.quickstart.scenes import draw_row, split_pairs
from mmllm.quickstart.speech import CONTENT_WORDS


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def drawn_document(seed: int) -> tuple[Document, random.Random]:
    """Three pictures and two sounds, with the question that the seed chooses."""
    rng = random.Random(seed)
    pairs, _ = split_pairs()
    document = Document(order="pspsp")
    for _ in range(3):
        document.pictures.append(draw_row(rng, pairs, pairs, 1, 64, is_test=False)[1])
    document.sounds = [{"audio": "", "text": rng.choice(CONTENT_WORDS), "kind": "word"} for _ in range(2)]
    _question(document, rng)
    return document, rng


def test_late_remarks_are_true_and_never_tell_the_answer():
    """Each remark is checked word by word against the picture or sound of its number."""
    num_remarks = 0
    for seed in range(300):
        document, rng = drawn_document(seed)
        for remark in _late_remarks(document, rng):
            number = next(i for i, word in enumerate(ORDINALS) if f"the {word} " in remark)
            num_remarks += 1
            if " sound " in remark:
                assert remark == f"the {ORDINALS[number]} sound says {document.sounds[number]['text']}."
                assert document.kind != "sound"
                continue
            picture = document.pictures[number]
            thing = picture["objects"][0]
            place = POSITION_FORMS[picture["relations"][0][2]][0]
            true = {thing["size"], thing["colour"], thing["shape"]} | set(place.split())
            rest = set(remark.rstrip(".").split()) - true
            words = {"the", ORDINALS[number], "picture", "shows", "a", "an", "something", "and", "has", "what", "is"}
            assert rest <= words, remark
            if number == document.asked and document.kind != "which":
                assert document.answer not in remark
            if document.kind == "which":
                assert document.question.split()[-1].rstrip("?") not in remark
    assert num_remarks > 600


def test_training_documents_have_late_remarks_and_test_rows_stay_as_they_were(tmp_path):
    manifests = make_interleaved(tmp_path, 60, 60, seed=1, with_speech=False)
    late = [row for row in rows_of(manifests["train"]) if "text" in row["segments"][-1]]
    many = [row for row in late if row["segments"][-1]["text"].count(" picture ") > 1]
    assert len(many) > 20
    digest = hashlib.sha256(manifests["test"].read_bytes()).hexdigest()
    assert digest == "27ca9eaff58c661288e092933cc109dcc2fb97287d6bd463e8d695a3cc38aed2"
