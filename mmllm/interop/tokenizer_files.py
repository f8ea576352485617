"""Tokenizer folders as files that transformers' `AutoTokenizer` reads: a checkpoint's own, or one trained here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from mmllm.checkpoints.files import write_json
from mmllm.interop.foreign_config import read_json_if_there
from mmllm.interop.tokenizers import TOKENIZER, TOKENIZER_FILES
from mmllm_tokenizers.folder import CHAT_FILE, TokenizerFolder
from mmllm_tokenizers.vocab import END, PAD

CONFIG = "tokenizer_config.json"
GENERATION = "generation_config.json"


def write_tokenizer(tokenizer: TokenizerFolder, source: Path | None, folder: Path, num_rows: int) -> None:
    """Writes a tokenizer as transformers reads it.

    Args:
        tokenizer: of the model.
        source: what the imported checkpoint had beside its weights; None: the tokenizer was trained here.
        folder: where to.
        num_rows: of text that go out; our special tokens among them become tokens of the file.
    """
    text = tokenizer.text
    if source is None or text.foreign is None:
        _write_own(tokenizer, folder)
        return
    for name in TOKENIZER_FILES:
        copy_there(source / name, folder / name)
    added = {name: i for name, i in text.special_ids.items() if text.num_tokens <= i < num_rows}
    if not added:
        return
    written = Tokenizer.from_file(str(folder / TOKENIZER))
    last = max(added.values())
    names = {token_id: name for name, token_id in added.items()}
    tokens = [names.get(i, f"<|unused_{i}|>") for i in range(text.num_tokens, last + 1)]
    written.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    wrong = [name for name, i in added.items() if written.token_to_id(name) != i]
    assert not wrong, f"{wrong} have other ids than in the model"
    written.save(str(folder / TOKENIZER))
    _tell_added(folder / CONFIG, tokens, text.num_tokens)


def copy_there(source: Path, target: Path) -> None:
    """Copies a file, or a folder of files, that is there; of links what they link to."""
    if source.is_dir():
        shutil.copytree(source, target)
    elif source.is_file():
        shutil.copyfile(source, target)


def _tell_added(path: Path, tokens: list[str], first: int) -> None:
    """Names added tokens in the config too, where transformers looks when it has built a tokenizer anew."""
    config = read_json_if_there(path)
    if "added_tokens_decoder" in config:
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        config["added_tokens_decoder"] |= {
            str(first + number): {"content": token, **flags} for number, token in enumerate(tokens)
        }
        write_json(path, config)


def _write_own(tokenizer: TokenizerFolder, folder: Path) -> None:
    tokenizer.text.save(folder / TOKENIZER)
    write_json(
        folder / CONFIG,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 10**30,
        },
    )
    template = tokenizer.chat_template or chat_template_of(tokenizer.templates["chat"])
    (folder / CHAT_FILE).write_text(template, encoding="utf-8")


def chat_template_of(parts: Mapping[str, str]) -> str:
    """The task `chat` as Jinja: whoever is not the assistant asks, one after the other, and then it answers.

    A line break parts messages of one side that follow each other, as in training's documents.
    """
    (asks, opens), (begins, ends) = parts["prompt"].split("{segments}"), parts["target"].split("{text}")
    asked, answered, ended = (json.dumps(text, ensure_ascii=False) for text in (asks, opens + begins, ends))
    return (
        "{%- set ns = namespace(side='') -%}\n"
        "{%- for message in messages -%}\n"
        "{%- if message.role == 'assistant' -%}\n"
        f"{{%- if not ns.side -%}}{{{{ {asked} }}}}{{%- endif -%}}\n"
        f"{{%- if ns.side != 'answer' -%}}{{{{- {answered} -}}}}{{%- endif -%}}{{% generation %}}"
        "{%- if ns.side == 'answer' -%}{{- '\\n' -}}{%- endif -%}{{- message.content -}}"
        "{%- if loop.last or loop.nextitem.role != 'assistant' -%}"
        f"{{{{- {ended} -}}}}{{%- endif -%}}{{% endgeneration %}}\n"
        "{%- set ns.side = 'answer' -%}\n"
        "{%- else -%}\n"
        f"{{%- if ns.side != 'question' -%}}{{{{- {asked} -}}}}{{%- else -%}}{{{{- '\\n' -}}}}{{%- endif -%}}\n"
        "{{- message.content -}}{%- set ns.side = 'question' -%}\n"
        "{%- endif -%}\n"
        "{%- endfor -%}\n"
        f"{{%- if add_generation_prompt -%}}{{{{- {answered} -}}}}{{%- endif -%}}"
    )


def text_ids(tokenizer: TokenizerFolder) -> dict[str, int]:
    """What configs say of a tokenizer that was trained here."""
    return {"eos_token_id": tokenizer.id(END), "pad_token_id": tokenizer.id(PAD)}
