"""Documents with an answer each to an `AnswerBatch`.

Shapes: B sequences, T positions, A answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mmllm.batch import IGNORE, AnswerBatch, PackedBatch
from mmllm.data.loading.collate import Gap, pack_documents
from mmllm.data.samples.document import Document


@dataclass(frozen=True)
class AnswerDocument:
    """A prompt and its answer, whose tokens alone are targets.

    Attributes:
        document: at least one target, which is not its first token.
        group: the pair or the prompt that it belongs to.
        is_chosen: whether it is the side that is preferred, or liked.
        reference: its log-probability by the reference, in nats; None: not known.
        margin: of its pair, by how much the chosen side is better, as its row says.
    """

    document: Document
    group: int
    is_chosen: bool = True
    reference: float | None = None
    margin: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Of the document."""
        return self.document.num_tokens


def pack_answers(
    sequences: Sequence[Sequence[AnswerDocument | Gap]],
    sequence_length: int,
    state: dict[str, Any] | None = None,
    token_multiple: int = 1,
    replay: PackedBatch | None = None,
) -> AnswerBatch:
    """Lays each sequence's answers one after the other; they are numbered in this order.

    Args:
        sequences: B lists.
        sequence_length: T.
        state: the plan's state after this batch.
        token_multiple: as of `pack_documents`.
        replay: goes along.

    Raises:
        ValueError: as `pack_documents`; or some references are known and some are not.
    """
    documents = [[item.document if isinstance(item, AnswerDocument) else item for item in row] for row in sequences]
    packed = pack_documents(documents, sequence_length, state=state, token_multiple=token_multiple)
    answer_BT = np.full(tuple(packed.labels_BT.shape), -1, dtype=np.int64)
    answers: list[AnswerDocument] = []
    last: list[int] = []
    for row, items in enumerate(sequences):
        start = 0
        for item in items:
            if isinstance(item, AnswerDocument):
                targets = np.flatnonzero(item.document.targets_T)
                assert len(targets) and targets[0] > 0, "an answer stands behind its prompt"
                answer_BT[row, start + targets - 1] = len(answers)
                last.append(row * sequence_length + start + int(targets[-1]))
                answers.append(item)
            start += item.num_tokens
    references = [answer.reference for answer in answers if answer.reference is not None]
    if references and len(references) < len(answers):
        raise ValueError(
            f"the log-probabilities by the reference of {len(references)} of {len(answers)} answers are known"
        )
    answer = torch.from_numpy(answer_BT)
    is_target_BT = packed.labels_BT != IGNORE
    if packed.audio_labels_BTK.shape[-1]:
        is_target_BT = is_target_BT | (packed.audio_labels_BTK != IGNORE).any(dim=-1)
    assert torch.equal(is_target_BT, answer >= 0), "an answer's tokens are a document's only targets"
    return AnswerBatch(
        packed=packed,
        answer_BT=answer,
        last_A=torch.tensor(last, dtype=torch.int64),
        group_A=torch.tensor([answer.group for answer in answers], dtype=torch.int64),
        is_chosen_A=torch.tensor([answer.is_chosen for answer in answers], dtype=torch.bool),
        reference_A=torch.tensor(references, dtype=torch.float32),
        margin_A=torch.tensor([answer.margin for answer in answers], dtype=torch.float32),
        replay=replay,
        state=state or {},
    )
