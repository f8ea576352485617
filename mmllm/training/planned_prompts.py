"""How much of a planned document an encoder would take, without reading it."""

from __future__ import annotations

from mmllm.data.index.index import Place
from mmllm.data.plan.plan import Item, Plan, span_masking
from mmllm.data.plan.recipe import SourceConfig
from mmllm.data.samples.masked_spans import MASKED, SpanMasking
from mmllm.data.samples.templates import literal_ids, parse_template, template_of
from mmllm_tokenizers.folder import TokenizerFolder


class PlannedPrompts:
    """Counts the tokens before the position that predicts a document's first target.

    Of captions, transcripts, what is spoken and masked spans that is known from the plan. Interleaved documents and
    conversations, whose first answer may stand anywhere, count as the decoder's whole, and so do texts, which are.

    Args:
        plan: of a recipe whose tokenizer folder is there.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._folder = TokenizerFolder.load(plan.recipe.tokenizer_folder())
        self._masking: dict[int, SpanMasking] = {}
        self._sides: dict[tuple[int, str], tuple[_Side, _Side]] = {}

    def num_tokens(self, item: Item, place: Place) -> int:
        """The encoder's tokens of an item.

        Args:
            item: of the plan.
            place: where its document is.
        """
        config = self._plan.sources[item.source].config
        if item.task.startswith(MASKED):
            if item.source not in self._masking:
                self._masking[item.source] = span_masking(config, self._folder)
            return max(0, self._masking[item.source].num_prompt(item.num_tokens, place.num_tiles) - 1)
        if item.part > 0 or item.task in ("interleaved", "question", "chat"):
            return 0
        key = item.source, item.task
        if key not in self._sides:
            self._sides[key] = self._sides_of(config, item.task)
        prompt, target = self._sides[key]
        count = prompt.count(place, self._folder)
        if count is None:  # what is spoken: its text has as many tokens as are left beside the units
            answer = target.count(place, self._folder)
            count = 1 if answer is None else item.num_tokens - answer
        return max(0, count - 1)

    def _sides_of(self, config: SourceConfig, task: str) -> tuple[_Side, _Side]:
        template = (config.templates or {}).get(task) or template_of(task, self._folder)
        anchor = len(self._folder.text.encode(config.anchor_prompt or ""))
        return _Side(template["prompt"], self._folder, anchor), _Side(template["target"], self._folder)


class _Side:
    """A template's prompt or target: how many tokens it writes itself, and which fields it has."""

    def __init__(self, template: str, folder: TokenizerFolder, more: int = 0) -> None:
        pieces = parse_template(template)
        self._literals = more + sum(len(literal_ids(folder.text, literal)) for literal, _ in pieces if literal)
        self._fields = [name for _, name in pieces if name is not None]

    def count(self, place: Place, folder: TokenizerFolder) -> int | None:
        """Its tokens; None: they depend on a text."""
        total = self._literals
        for name in self._fields:
            match name:
                case "image":
                    total += place.num_tiles * folder.num_image_tokens
                case "audio":
                    total += folder.num_audio_slots(place.num_frames)
                case "units":
                    total += folder.num_unit_positions(place.num_frames)
                case _:
                    return None
        return total
