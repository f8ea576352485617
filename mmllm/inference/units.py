"""Speaks: the units that follow prompts, many at once, by the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mmllm.checkpoints.settings import Sampling
from mmllm.data.samples.document import Document
from mmllm.inference.engine.engine import Engine
from mmllm.inference.engine.requests import EngineConfig, SpeechRequest, SpokenUnits
from mmllm.inference.pacing import Pace
from mmllm.model.multimodal import MultimodalModel
from mmllm_tokenizers.folder import TokenizerFolder


def generate_units(
    model: MultimodalModel,
    tokenizer: TokenizerFolder,
    prompts: Sequence[Document],
    sampling: Sampling | Sequence[Sampling],
    max_frames: int | None,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
    pace: Pace | None = None,
    stop: Callable[[], bool] | None = None,
) -> list[SpokenUnits]:
    """Codes of the speech that follows each prompt.

    At every position each codebook can draw its own units alone; see `mmllm.inference.engine.unit_rows`.

    Args:
        model: in any mode; it is run in eval mode and left as it was.
        tokenizer: of the model.
        prompts: as `mmllm.data.samples.documents.build_prompt` writes them, or with the frames of a recording behind,
            as `mmllm.inference.voices.begin` does: these are gone on from, and left out.
        sampling: how units are drawn, or of each codebook; the first one's seed counts.
        max_frames: at most; None, with a pointer alone: as many as the letters may last.
        batch_size: rows at once.
        progress: called with the number of prompts that have become done.
        pace: how pointers move; its rate and pauses are of the sound (`mmllm.inference.pacing.paced`), not of units.
            None: as the model expects.
        stop: asked before each frame; True ends all that is still spoken.

    Returns:
        For each prompt, in order.

    Raises:
        ValueError: the tokenizer has no audio, or a bound or the number of samplings is wrong.
    """
    samplings = (sampling,) if isinstance(sampling, Sampling) else tuple(sampling)
    requests = [
        SpeechRequest(prompt, samplings, max_frames, pace or Pace(), number) for number, prompt in enumerate(prompts)
    ]
    results = Engine(model, tokenizer, EngineConfig(max_rows=batch_size)).run(requests, progress, stop)
    return [result for result in results if isinstance(result, SpokenUnits)]
