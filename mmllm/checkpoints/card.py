"""The model card: the README.md of a model folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mmllm.model.multimodal import MultimodalModel
from mmllm_tokenizers.folder import TokenizerFolder


@dataclass(frozen=True)
class ModelInfo:
    """What the model card says beyond the config."""

    name: str = "mmllm model"
    recipe_hash: str | None = None
    commit: str | None = None
    data: tuple[str, ...] = ()
    """One line for each source: its name, kind and share."""
    scores: Mapping[str, Any] = field(default_factory=dict)
    """As in `report.json`: measures, or tasks of measures."""
    notes: str = ""


def model_card(model: MultimodalModel, tokenizer: TokenizerFolder, info: ModelInfo) -> str:
    """The card's Markdown."""
    senses = [name for name, part in (("images", model.config.vision), ("sound", model.config.audio)) if part]
    lines = [
        f"# {info.name}",
        "",
        f"A {'mixture-of-experts decoder' if model.config.decoder.moe else 'decoder'}"
        f"{' that takes ' + ' and '.join(senses) if senses else ''}, of mmllm.",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {model.num_parameters():,} ({model.num_active_parameters():,} active) |",
        f"| vocabulary | {tokenizer.vocabulary.size:,} ids |",
        f"| tokenizer hash | `{tokenizer.hash}` |",
        f"| recipe hash | {f'`{info.recipe_hash}`' if info.recipe_hash else 'not recorded'} |",
        f"| commit | {f'`{info.commit}`' if info.commit else 'not recorded'} |",
        "",
        "## Data",
        "",
        *([f"- {line}" for line in info.data] or ["Not recorded."]),
        "",
        "## Scores",
        "",
        *(_score_lines(info.scores) or ["Not measured."]),
        "",
        "## Use",
        "",
        "```python",
        "import mmllm",
        'model = mmllm.load("this folder")',
        "```",
    ]
    if info.notes:
        lines += ["", info.notes]
    return "\n".join(lines) + "\n"


def _score_lines(scores: Mapping[str, Any], prefix: str = "") -> list[str]:
    lines: list[str] = []
    for name, value in scores.items():
        if isinstance(value, Mapping):
            lines += _score_lines(value, f"{prefix}{name} ")
        else:
            lines.append(f"- {prefix}{name}: {value:.4g}" if isinstance(value, float) else f"- {prefix}{name}: {value}")
    return lines
