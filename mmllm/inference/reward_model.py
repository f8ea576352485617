"""Scores answers by a reward model: a decoder with a scalar head at each answer's last token.

Shapes: B answers, T positions, D width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmllm.checkpoints.adapters import saved_adapters
from mmllm.checkpoints.files import CONFIG, REWARD_CONFIG, REWARD_HEAD, read_json
from mmllm.checkpoints.folder import load_model
from mmllm.data.loading.preference_rows import AnswerWriter, PreferenceRow, read_row, without_answer
from mmllm.data.samples.decode import ImageTransform
from mmllm.data.samples.document import Document, DocumentWriter
from mmllm.data.samples.documents import default_transform
from mmllm.inference.generate import batches, evaluating
from mmllm.inference.prompts import join, pad_left
from mmllm.model.multimodal import MultimodalModel
from mmllm_tokenizers.folder import TokenizerFolder

FORMAT_VERSION = 1
WEIGHT = "weight"
"""The head's one tensor, [1, D]."""
_ANY_LENGTH = 2**31


class RewardModel:
    """What a `RewardModule` learnt: how good an answer is.

    Args:
        model: in any mode; it is run in eval mode and left as it was.
        tokenizer: of it.
        head_D: the scalar head's weight.
        transform: pictures to pixels; None: what the tokenizer folder implies.
        settings: of `reward_config.json`.
    """

    def __init__(
        self,
        model: MultimodalModel,
        tokenizer: TokenizerFolder,
        head_D: Tensor,
        transform: ImageTransform | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.head_D = model, tokenizer, head_D
        self.transform = transform or default_transform(tokenizer)
        self.settings = settings or {}

    @staticmethod
    def load(directory: str | os.PathLike[str], device: torch.device | str = "cpu") -> RewardModel:
        """From its folder.

        Args:
            directory: that `RewardModule` wrote.
            device: "auto" takes a GPU if there is one.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: it is a model folder without a reward head, or is damaged.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        directory = Path(directory)
        if (directory / CONFIG).is_file() and not (directory / REWARD_HEAD).is_file():
            raise ValueError(
                f"{directory} has no {REWARD_HEAD}: it is a model, not a reward model; train one with "
                f"mmllm.training.posttraining.reward_module.RewardModule"
            )
        settings = read_json(directory / REWARD_CONFIG) if (directory / REWARD_CONFIG).is_file() else {}
        if directory.is_dir() and settings.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{directory / REWARD_CONFIG} is of format version {settings.get('format_version')!r}, this mmllm "
                f"reads {FORMAT_VERSION}; export the reward model again"
            )
        adapter = settings.get("adapter")
        if adapter is not None and adapter not in saved_adapters(directory):
            raise ValueError(f"{directory} lacks adapters/{adapter}, which its head was trained with")
        loaded = load_model(directory, device, adapter=adapter)
        head_D = read_head(directory, loaded.model.config.decoder.hidden_size).to(device)
        return RewardModel(loaded.model, loaded.tokenizer, head_D, loaded.image_transform, settings)

    def to(self, device: torch.device | str) -> None:
        """Moves it; nothing happens where it is there."""
        if self.head_D.device != torch.device(device):
            self.model.to(device)
            self.head_D = self.head_D.to(device)

    def score(self, documents: Sequence[Document], batch_size: int = 64) -> list[float]:
        """The reward of each answer.

        Args:
            documents: prompts with their answers, which end with the answer's last token (its end).
            batch_size: answers at once; those of like length go together.
        """
        scores = [0.0] * len(documents)
        with evaluating(self.model):
            for rows in batches(documents, batch_size):
                batch = pad_left([documents[row] for row in rows]).to(self.head_D.device)
                hidden_BD = self.model.hidden(batch)[:, -1]
                rewards_B = hidden_BD.float() @ self.head_D.float()
                for row, reward in zip(rows, rewards_B.tolist(), strict=True):
                    scores[row] = reward
        return scores

    def score_answers(self, prompts: Sequence[Document], answers: Sequence[str]) -> list[float]:
        """The reward of each text behind its prompt, as the model writes answers: the text, then the end.

        Args:
            prompts: as the model's templates write them.
            answers: one for each.

        Raises:
            ValueError: the numbers differ.
        """
        if len(prompts) != len(answers):
            raise ValueError(f"there are {len(prompts)} prompts but {len(answers)} answers; give one for each")
        text = self.tokenizer.text
        documents = []
        for prompt, answer in zip(prompts, answers, strict=True):
            writer = DocumentWriter(self.tokenizer)
            writer.ids([*text.encode(answer), text.end_ids[0]], is_target=True)
            documents.append(join([prompt, writer.finish()]))
        return self.score(documents)

    def score_texts(self, rows: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> list[float]:
        """The reward of each text, of rows that say what was asked.

        Args:
            rows: each with its `prompt`: a document, or messages in TRL's form and their `task` ("chat" unless given).
            answers: one for each.

        Raises:
            ValueError: a row has no prompt, or one that can't be read.
        """
        prompts = [self._prompt(row) for row in rows]
        return self.score_answers(prompts, answers)

    def _prompt(self, row: Mapping[str, Any]) -> Document:
        prompt = row.get("prompt")
        if isinstance(prompt, Document):
            return prompt
        if prompt is None:
            raise ValueError(f"row {row.get('id')!r} has no prompt, so that no answer to it can be scored")
        answer = [{"role": "assistant", "content": "."}]
        value = {"task": row.get("task", "chat"), "prompt": prompt, "completion": answer, "label": True}
        read = read_row(json.dumps(value), str(row.get("id")), Path())
        document = AnswerWriter(self.tokenizer, self.transform, _ANY_LENGTH).document(read, read.answers[0])
        return without_answer(document)

    def score_rows(self, rows: Sequence[PreferenceRow]) -> list[tuple[float, ...]]:
        """The rewards of each row's answers, the chosen one's first.

        Args:
            rows: of preference data (`mmllm.data.loading.preference_rows.read_row`).

        Raises:
            ValueError: a picture or sound can't be read.
        """
        writer = AnswerWriter(self.tokenizer, self.transform, _ANY_LENGTH)
        documents = [writer.document(row, answer) for row in rows for answer in row.answers]
        scores = iter(self.score(documents))
        return [tuple(next(scores) for _ in row.answers) for row in rows]


def read_head(directory: Path, width: int) -> Tensor:
    """The head's weight, [D], of a reward model's folder.

    Args:
        directory: the folder.
        width: D.

    Raises:
        ValueError: it is damaged, or of another width.
    """
    try:
        head_1D = load_file(directory / REWARD_HEAD)[WEIGHT]
    except (SafetensorError, KeyError, OSError) as error:
        raise ValueError(f"{directory / REWARD_HEAD} is damaged ({error}); export the reward model again") from error
    if tuple(head_1D.shape) != (1, width):
        raise ValueError(f"{directory / REWARD_HEAD} has {list(head_1D.shape)} weights; the model wants [1, {width}]")
    return head_1D[0]


def reward_settings(adapter: str | None, calibration: dict[str, Any] | None) -> str:
    """What `reward_config.json` says.

    Args:
        adapter: with which the head was trained; None: the decoder itself was.
        calibration: on held-out pairs; None: there were none.
    """
    values = {"format": "mmllm reward model", "format_version": FORMAT_VERSION, "adapter": adapter}
    return json.dumps({**values, "calibration": calibration}, indent=1) + "\n"
