"""`mmllm tokenizer`: text and audio tokenizers, and the folder that holds both."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from mmllm.cli.command import add_command, add_group, add_input_options, as_json, check_there, column_names


def add_tokenizer(commands: Any) -> None:
    """Adds `mmllm tokenizer`."""
    actions = add_group(commands, "tokenizer", "make text and audio tokenizers, put a tokenizer folder together")
    _add_train_text(actions)
    _add_assemble(actions)
    _add_encodec(actions)
    _add_kmeans(actions)
    _add_encode(actions)


def _add_encode(actions: Any) -> None:
    parser = add_command(
        actions, "encode", "lines of text to ids, a JSON list a line, as transformers encodes them", _encode
    )
    parser.add_argument("inputs", nargs="*", help="text files; without any, standard input")
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="tokenizer folder, model folder or checkpoint of transformers"
    )


def _encode(args: argparse.Namespace) -> Iterable[str]:
    check_there("tokenizer folder", args.tokenizer)
    check_there("text file", *args.inputs)
    from mmllm.training import tokenizer_commands

    return tokenizer_commands.encode(args.inputs, args.tokenizer)


def _add_train_text(actions: Any) -> None:
    parser = add_command(actions, "train-text", "byte-level BPE from text, as a tokenizer folder", _train_text)
    parser.add_argument("inputs", nargs="+", help="manifests, data of other forms, recipes (.yaml) or shards")
    add_input_options(parser)
    parser.add_argument("--media", metavar="DIR", help="what paths are relative to; by default each input's folder")
    parser.add_argument("--vocab_size", type=int, default=4096, help="ids at most, special tokens and bytes included")
    _add_tokenizer_options(parser)


def _train_text(args: argparse.Namespace) -> Iterable[str]:
    check_there("manifest, recipe or shard", *args.inputs)
    check_there("audio tokenizer", args.codec)
    from mmllm.training import tokenizer_commands

    config = _tokenizer_config(args)
    return as_json(tokenizer_commands.train_text(
        args.inputs, args.out, args.vocab_size, args.codec, config, args.format, args.media, column_names(args)
    ))  # fmt: skip


def _add_assemble(actions: Any) -> None:
    parser = add_command(actions, "assemble", "a tokenizer folder from text tokens and an audio tokenizer", _assemble)
    parser.add_argument("--text", required=True, help="tokenizer.json, or the folder that holds it")
    _add_tokenizer_options(parser)


def _assemble(args: argparse.Namespace) -> Iterable[str]:
    check_there("text tokenizer", args.text, hint="`mmllm tokenizer train-text` writes it")
    check_there("audio tokenizer", args.codec)
    from mmllm.training import tokenizer_commands

    return as_json(tokenizer_commands.assemble(args.out, args.text, args.codec, _tokenizer_config(args)))


def _add_encodec(actions: Any) -> None:
    parser = add_command(actions, "encodec", "an audio tokenizer from one of Meta's EnCodec models", _encodec)
    parser.add_argument("name", help="encodec_24khz or encodec_48khz")
    parser.add_argument(
        "--weights", metavar="FILE", help="the published .th file, or its folder; else torch hub's cache"
    )
    parser.add_argument("--num_codebooks", type=int, default=8, help="codebooks in use")
    parser.add_argument("--out", required=True, metavar="DIR", help="what `assemble --codec DIR` takes")


def _encodec(args: argparse.Namespace) -> Iterable[str]:
    check_there("file of weights", args.weights)
    from mmllm.training import tokenizer_commands

    return as_json(tokenizer_commands.encodec(args.name, args.out, args.weights, args.num_codebooks))


def _add_kmeans(actions: Any) -> None:
    parser = add_command(actions, "kmeans", "an audio tokenizer of k-means units, which hears but can't speak", _kmeans)
    parser.add_argument("inputs", nargs="+", help="manifests (.jsonl) or shards with sound")
    parser.add_argument("--num_clusters", type=int, default=256, help="units")
    parser.add_argument("--sample_rate", type=int, default=8000, help="sounds are resampled to it")
    parser.add_argument("--hop_samples", type=int, default=160, help="samples a frame; windows are 2.5 times as long")
    parser.add_argument("--max_minutes", type=float, default=60.0, help="at most so much sound, drawn at random")
    parser.add_argument(
        "--deduplicate", action="store_true", help="a run of one unit is that unit once; such units aren't pooled"
    )
    parser.add_argument(
        "--bpe", type=int, metavar="SIZE", help="merge frequent pairs of de-duplicated units; tokens, units included"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, metavar="DIR", help="what `assemble --codec DIR` takes")


def _kmeans(args: argparse.Namespace) -> Iterable[str]:
    check_there("manifest or shard", *args.inputs)
    from mmllm.training import tokenizer_commands
    from mmllm_tokenizers.audio import KMeansConfig

    config = KMeansConfig(
        args.sample_rate, args.hop_samples, args.num_clusters, window_samples=5 * args.hop_samples // 2,
        seed=args.seed,
    )  # fmt: skip
    return as_json(tokenizer_commands.kmeans(
        args.inputs, args.out, config, args.max_minutes, args.deduplicate, args.bpe
    ))  # fmt: skip


def _add_tokenizer_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, help="tokenizer folder")
    parser.add_argument("--codec", help="folder of an audio tokenizer; without it there is no sound")
    parser.add_argument("--image_tokens", type=int, default=16, help="slots an image")
    parser.add_argument("--image_size", type=int, default=64, help="pixels, both sides")
    parser.add_argument(
        "--max_tiles",
        type=int,
        default=1,
        help="cut larger pictures into at most so many tiles of image_size; 1: don't",
    )
    parser.add_argument("--no_thumbnail", action="store_true", help="tiles alone, not the whole picture before them")
    parser.add_argument("--max_image_tokens", type=int, help="slots that one picture's tiles may fill together")
    parser.add_argument(
        "--audio_pool", type=int, help="frames an <|audio|> slot; without it 2, and 1 of a codec that de-duplicates"
    )
    parser.add_argument("--pattern", choices=("parallel", "delay", "flatten"), default="delay")
    parser.add_argument("--num_codebooks", type=int, default=0, help="that are spoken; 0: as the codec folder says")
    parser.add_argument(
        "--heard_codebooks", type=int, help="of a sound that is heard, from --num_codebooks on; without it: as many as "
        "are spoken, and without either as the codec folder says",
    )  # fmt: skip
    parser.add_argument(
        "--pointer", type=int, nargs="?", const=2, default=0, metavar="LETTERS",
        help="speech has a pointer into its text, which passes so many letters a frame at most (2); rows need `words`",
    )  # fmt: skip


def _tokenizer_config(args: argparse.Namespace) -> Any:
    from mmllm_tokenizers.folder import TokenizerConfig
    from mmllm_tokenizers.pointer import PointerRule
    from mmllm_tokenizers.tiling import Tiling

    tiling = None
    if args.max_tiles > 1:
        tiling = Tiling(args.max_tiles, not args.no_thumbnail, args.max_image_tokens)
    elif args.max_tiles < 1:
        raise ValueError(f"--max_tiles is {args.max_tiles}; give 1 (pictures are not cut) or more")
    elif args.no_thumbnail or args.max_image_tokens is not None:
        raise ValueError("--no_thumbnail and --max_image_tokens are of pictures that are cut; give --max_tiles as well")
    names = ("image_tokens", "image_size", "pattern", "num_codebooks", "heard_codebooks")
    if args.pointer and args.codec is None:
        raise ValueError("--pointer is of speech, but there is no --codec; give one, or leave --pointer out")
    pointer = PointerRule(args.pointer) if args.pointer else None
    return TokenizerConfig(
        **{name: getattr(args, name) for name in names}, audio_pool=_audio_pool(args), tiling=tiling, pointer=pointer
    )


def _audio_pool(args: argparse.Namespace) -> int:
    """Two frames a slot, if nothing is said; of de-duplicated codes, which are short already, one."""
    if args.audio_pool is not None or args.codec is None:
        return 2 if args.audio_pool is None else args.audio_pool
    from mmllm_tokenizers.audio import load_audio_tokenizer

    return 2 if load_audio_tokenizer(args.codec).keeps_durations else 1
