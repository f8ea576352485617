"""What inference.py compares with: transformers' `generate` on the same function, and a Llama that both sides read.

`mmllm export` refuses short convolutions, which no family of transformers has. So the model gets a twin whose
convolutions do nothing (x + 0), which ours computes with all that they cost, and which goes out without them.

Shapes: B rows, T positions, D width, V ids.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from inference_rounds import CLOCKS, Clock
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

from mmllm.checkpoints.folder import save_model
from mmllm.data.samples.document import Document
from mmllm.inference.api import Model
from mmllm.inference.engine.sampling import TextRules
from mmllm.inference.prompts import pad_left
from mmllm.interop.exporting import export_model
from mmllm.interop.importing import import_model
from mmllm.model.multimodal import MultimodalModel

_END = "<|end_of_text|>"
_EXPERTS = ("eager", "grouped_mm", "batched_mm")
"""transformers' ways to compute experts."""
LLAMA: dict[str, Any] = {
    "vocab_size": 16_384, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 14,
    "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64,
}  # fmt: skip
TINY_LLAMA: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


# --- models that both sides compute ---------------------------------------------------------------------------------


def twin(model: Model, work: Path) -> tuple[Model, Path]:
    """The model with convolutions that do nothing, and a checkpoint of transformers that computes the same.

    Args:
        model: whose twin; it stays as it is.
        work: folder for the checkpoint.

    Raises:
        ValueError: no family of transformers computes it without its convolutions either.
    """
    ours = copy.deepcopy(model.model)
    state = ours.state_dict()
    convolutions = [name for name in state if "_conv.weight" in name and name.startswith("decoder.layers.")]
    with torch.no_grad():
        for name in convolutions:
            state[name].zero_()
    config = model.model.config
    plain = MultimodalModel(
        dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, conv_size=0))
    ).requires_grad_(False)
    plain.load_state_dict({name: tensor for name, tensor in state.items() if name not in convolutions})
    save_model(work / "without_convolutions", plain, model.tokenizer, image_transform=model.image_transform)
    export_model(work / "without_convolutions", work / "exported", "decoder")
    return Model(ours, model.tokenizer, model.image_transform, model.generation), work / "exported"


def llama(work: Path, is_tiny: bool) -> tuple[Path, Path]:
    """A random Llama as transformers saves it, and the same imported."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    sizes = TINY_LLAMA if is_tiny else LLAMA
    torch.manual_seed(0)
    config = LlamaConfig(
        **sizes, max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=None, pad_token_id=None,
        eos_token_id=sizes["vocab_size"] - 1,
    )  # fmt: skip
    theirs, ours = work / "llama", work / "llama_imported"
    LlamaForCausalLM(config).save_pretrained(str(theirs))
    backend = _tokenizer(sizes["vocab_size"])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=_END).save_pretrained(str(theirs))
    import_model(theirs, ours)
    return theirs, ours


def _tokenizer(num_ids: int) -> Tokenizer:
    """A byte-level BPE of so many ids: bytes, pairs of them, and an end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(first, second) for first in alphabet for second in alphabet][: num_ids - 1 - len(alphabet)]
    tokens = [*alphabet, *(first + second for first, second in pairs)]
    tokenizer = Tokenizer(BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(_END, special=True, normalized=False)])
    return tokenizer


# --- transformers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """How transformers may compute the same.

    Attributes:
        experts: `experts_implementation`; None: the model has none.
        cache: `cache_implementation`; None: its default, which grows.
    """

    experts: str | None
    cache: str | None

    def __str__(self) -> str:
        experts = "" if self.experts is None else f"{self.experts} experts, "
        return f"{experts}{self.cache or 'dynamic'} cache"


class Transformers:
    """A checkpoint under transformers' `generate`, greedy.

    Args:
        folder: of the checkpoint.
        ours: the model that computes the same, whose tower and projectors give the embeddings of prompts with media.
    """

    def __init__(self, folder: Path, ours: Model) -> None:
        from transformers import AutoConfig
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self._folder, self._ours = folder, ours
        rules = TextRules.of(ours.tokenizer)
        config = AutoConfig.from_pretrained(str(folder))
        num_rows = config.vocab_size
        self._end_ids = sorted(each for each in rules.end_ids if each < num_rows)
        self._mask_V = torch.zeros(num_rows)
        self._mask_V[sorted(each for each in rules.forbidden_ids if each < num_rows)] = -torch.inf
        self._masks = False
        self._models: dict[str | None, Any] = {}
        kinds = _EXPERTS if any("experts" in name and name[0] != "_" for name in vars(config)) else (None,)
        self.ways = [Way(experts, cache) for experts in kinds for cache in (None, "static")]
        self.way = self.ways[0]

    def first(self, prompts: Sequence[Document]) -> list[int]:
        """The first id of each answer: one forward of the prompts, embeddings included."""
        with torch.inference_mode():
            inputs = self._inputs(prompts)
            logits_BV = self._model(self.way.experts)(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]
            return (logits_BV + self._mask_V).argmax(dim=-1).tolist()

    def generate(self, prompts: Sequence[Document], num_new: int, ends: bool) -> list[list[int]]:
        """The ids of each answer, ends left out.

        Args:
            prompts: of any lengths.
            num_new: ids at most.
            ends: whether an answer ends where the model ends it; else all have `num_new` ids.
        """
        from transformers import GenerationConfig, LogitsProcessorList

        settings = GenerationConfig(
            max_new_tokens=num_new, do_sample=False, use_cache=True, cache_implementation=self.way.cache,
            eos_token_id=self._end_ids if ends else None, pad_token_id=0,
        )  # fmt: skip
        with torch.inference_mode():
            inputs = self._inputs(prompts)
            model = self._model(self.way.experts)
            mask_V = self._mask_V if ends else self._mask_V.index_fill(0, torch.tensor(self._end_ids), -torch.inf)
            masks = LogitsProcessorList([_Mask(mask_V)] if self._masks else [])
            ids_BT = model.generate(**inputs, generation_config=settings, logits_processor=masks)
        if "input_ids" in inputs:
            ids_BT = ids_BT[:, inputs["input_ids"].shape[1] :]
        return [self._until_end(ids) if ends else ids for ids in ids_BT.tolist()]

    def fastest(self, run: Callable[[], Any], clock: Clock = "wall", is_quick: bool = False) -> str:
        """Chooses the way in which something takes the least time; says which.

        Each is tried twice after one time to warm up, unless that took more than twice as long as the best one takes.

        Args:
            run: does it in the way that is chosen.
            clock: what is read.
            is_quick: only the first two ways are tried, once.
        """
        seconds: dict[Way, float] = {}
        for way in self.ways[: 2 if is_quick else None]:
            self.way = way
            first = _seconds(run, clock)
            is_slow = bool(seconds) and first > 2 * min(seconds.values())
            seconds[way] = first if is_slow else min(_seconds(run, clock) for _ in range(1 if is_quick else 2))
        self.way = min(seconds, key=seconds.__getitem__)
        told = "; ".join(f"{way} {1e3 * value:.0f} ms" for way, value in seconds.items())
        return f"transformers: {self.way} is the fastest ({told})"

    def agree(self, wanted: Sequence[Sequence[int]], run: Callable[[], list[list[int]]]) -> str | None:
        """None if transformers writes the same ids; else where it doesn't.

        Ours never writes special tokens. Transformers may, so it is first asked without a mask over them, which costs
        it a little, and only where that gives other ids with one.
        """
        problem = None
        for self._masks in (False, True):
            problem = _difference(wanted, run())
            if problem is None:
                return None
        return problem

    def _until_end(self, ids: list[int]) -> list[int]:
        ends = [place for place, each in enumerate(ids) if each in self._end_ids]
        return ids[: ends[0]] if ends else ids

    def _model(self, experts: str | None) -> Any:
        if experts not in self._models:
            from transformers import AutoModelForCausalLM

            more = {} if experts is None else {"experts_implementation": experts}
            model = AutoModelForCausalLM.from_pretrained(
                str(self._folder), attn_implementation="sdpa", dtype=torch.float32, local_files_only=True, **more
            )
            self._models[experts] = model.eval()
        return self._models[experts]

    def _inputs(self, prompts: Sequence[Document]) -> dict[str, Tensor]:
        """As its users give them: ids where there are only these, padded on the left, and a mask."""
        batch = pad_left(prompts)
        mask_BT = (batch.document_ids_BT >= 0).to(torch.int64)
        if any(prompt.images or prompt.clips for prompt in prompts):
            return {"inputs_embeds": self._ours.model.splice(batch), "attention_mask": mask_BT}
        return {"input_ids": batch.token_ids_BT, "attention_mask": mask_BT}


def _seconds(run: Callable[[], Any], clock: Clock) -> float:
    began = CLOCKS[clock]()
    run()
    return CLOCKS[clock]() - began


class _Mask:
    """A logits processor: what is never written."""

    def __init__(self, mask_V: Tensor) -> None:
        self._mask_V = mask_V

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + self._mask_V


def _difference(wanted: Sequence[Sequence[int]], got: Sequence[Sequence[int]]) -> str | None:
    for row, (ours, theirs) in enumerate(zip(wanted, got, strict=True)):
        if list(ours) != list(theirs):
            place = next(
                (place for place, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other),
                min(len(ours), len(theirs)),
            )
            return f"row {row} of {len(wanted)} has other ids from id {place} of {len(ours)} on"
    return None
