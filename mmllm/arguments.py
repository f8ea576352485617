"""The options of every command but `fit` and its siblings, and what each prints.

Nothing heavy is imported before a command runs, so that `mmllm --help` is quick.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mmllm.ticker import end_line, ticker

Run = Callable[[argparse.Namespace], Iterable[str]]
"""Runs a command and gives the lines to print."""

DATA_FORMS = (
    "manifest", "csv", "folder", "llava", "coco", "librispeech", "commonvoice", "obelics", "mmc4", "text",
)  # fmt: skip
TASKS = ("caption", "transcribe", "speak", "text", "interleaved")


def add_commands(commands: Any) -> None:
    """Adds all commands to the subparsers of `mmllm`."""
    _add_data(_group(commands, "data", "manifests to shards, indices, and what a recipe draws from them"))
    _add_tokenizer(_group(commands, "tokenizer", "make text and audio tokenizers, put a tokenizer folder together"))
    _add_inference(commands)
    _add_eval(commands)
    _add_interop(commands)
    _add_configs(_group(commands, "configs", "list and copy the configs that are shipped"))
    _add_quickstart(commands)


def _group(commands: Any, name: str, help_text: str) -> Any:
    parser = commands.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
    return parser.add_subparsers(metavar="ACTION", dest="action", required=True, parser_class=type(parser))


def _command(commands: Any, name: str, help_text: str, run: Run) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
    parser.set_defaults(run=run, prog=parser.prog)
    return parser


def _as_json(values: Any) -> list[str]:
    return [json.dumps(values, indent=2, ensure_ascii=False, default=str)]


# --- data and tokenizers --------------------------------------------------------------------------------------


def _add_data(actions: Any) -> None:
    def build(args: argparse.Namespace) -> Iterable[str]:
        from mmllm.data import commands
        from mmllm.data.executors.stages import Executor, parse_options
        from mmllm.data.rows.cleaning import CleaningConfig

        work = args.work if args.executor == "local" or args.work else f"{args.out.rstrip('/')}-work"
        work = Path(work) if work else None
        executor = Executor(args.executor, args.workers, args.tasks, work, parse_options(args.executor_option))
        encoder = None
        if args.image_features:
            from mmllm.training.image_encoder import load_image_encoder

            encoder = load_image_encoder(args.image_features, args.image_layer, args.image_mode)
        written = commands.build(
            args.manifest, args.out, args.tokenizer, args.perturb, args.holdout, args.part, args.samples_per_shard,
            args.max_seconds, args.max_image_side, args.max_bad_fraction, args.seed, args.workers, ticker("rows"),
            args.format, args.media, CleaningConfig(args.dedup, args.threshold, args.quality), executor, encoder,
        )  # fmt: skip
        end_line()
        return _as_json(written)

    parser = _command(actions, "build", "manifests to shards", build)
    parser.add_argument("manifest", nargs="+", help="JSONL manifests, or data of other forms; kinds may be mixed")
    parser.add_argument("--out", required=True, help="folder of the shards")
    parser.add_argument(
        "--format", choices=("auto", *DATA_FORMS), default="auto", help="of the inputs; auto: told from each"
    )
    parser.add_argument("--dedup", choices=("none", "exact", "minhash"), default="none", help="leave out repeated rows")
    parser.add_argument("--threshold", type=float, default=0.8, help="similarity from which minhash leaves one out")
    parser.add_argument("--quality", metavar="FILTER", help="which rows are kept, e.g. 'words >= 5 and symbols < 0.3'")
    parser.add_argument(
        "--executor", choices=("local", "datatrove", "slurm", "ray"), default="local",
        help="where rows are measured and shards written; local: here, without datatrove",
    )  # fmt: skip
    parser.add_argument("--executor_option", action="append", default=[], metavar="KEY=VALUE", help="of datatrove's")
    parser.add_argument("--tasks", type=int, help="datatrove's tasks; by default as many as workers")
    parser.add_argument("--work", metavar="DIR", help="folder of datatrove's tasks and logs; by default OUT-work")
    parser.add_argument("--media", metavar="DIR", help="what paths are relative to; by default each input's folder")
    parser.add_argument("--tokenizer", help="tokenizer folder; stores each sound's codes with it")
    parser.add_argument(
        "--image_features", metavar="TOWER", help="stores each picture's features with it: a CLIP run's out folder, or "
        "open_clip's NAME:TAG or NAME:FILE",
    )  # fmt: skip
    parser.add_argument("--image_layer", default="-1", help="of the tower, as vision.layer of the decoder's config")
    parser.add_argument(
        "--image_mode", choices=("squash", "pad", "crop"), default="squash", help="as the data's image_mode in training"
    )
    parser.add_argument("--perturb", type=int, default=0, help="altered copies of each sound row")
    parser.add_argument("--holdout", metavar="KEY=VALUE", help="rows that are held out: KEY=VALUE or a fraction")
    parser.add_argument("--part", choices=("train", "heldout"), default="train", help="which of them to write")
    parser.add_argument("--samples_per_shard", type=int, default=10_000)
    parser.add_argument("--max_seconds", type=float, default=60.0, help="longer sounds are skipped and named")
    parser.add_argument("--max_image_side", type=int, default=1024, help="larger pictures are scaled down")
    parser.add_argument("--max_bad_fraction", type=float, default=0.05, help="more unusable rows are an error")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="processes that read and encode; 0: this one alone")

    def split(args: argparse.Namespace) -> Iterable[str]:
        from mmllm.data.rows.split import split as split_manifests

        return _as_json(
            split_manifests(
                args.manifest, args.out, args.test, args.holdout, args.num_val, args.max_bad_fraction, args.seed
            )
        )

    parser = _command(actions, "split", "manifests for training, looking and testing", split)
    parser.add_argument("manifest", nargs="+", help="JSONL manifests to train on; kinds may be mixed")
    parser.add_argument("--out", required=True, help="folder of the new manifests")
    parser.add_argument("--test", action="append", default=[], help="manifest of held-out rows; may be repeated")
    parser.add_argument("--holdout", metavar="KEY=VALUE", help="rows to hold out: KEY=VALUE or a fraction")
    parser.add_argument("--num_val", type=int, default=16, help="rows of each kind to look at during training")
    parser.add_argument("--max_bad_fraction", type=float, default=0.05, help="more unusable rows are an error")
    parser.add_argument("--seed", type=int, default=0)

    def index(args: argparse.Namespace) -> Iterable[str]:
        from mmllm.data import commands

        found = commands.index(args.shards, args.tokenizer, ticker("shards"), args.workers)
        end_line()
        return _as_json(found)

    parser = _command(actions, "index", "write the index beside each shard", index)
    parser.add_argument("shards", nargs="+", help="paths, globs, brace ranges or folders")
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder whose tokens are counted")
    parser.add_argument("--workers", type=int, default=0, help="processes that share the shards; 0: this one alone")

    def verify(args: argparse.Namespace) -> Iterable[str]:
        from mmllm.data import commands

        tick = ticker("documents")
        found = commands.verify(args.shards, args.tokenizer, args.max_named, args.workers, tick)
        end_line()
        if not found["broken"]:
            yield from _as_json(found)
            return
        yield from found["errors"]
        left = found["broken"] - len(found["errors"])
        more = f" and {left} more (--max_named {found['broken']} names all)" if left else ""
        raise ValueError(
            f"{found['broken']} samples or shards are broken, of {found['documents']} samples that were looked at; "
            f"{len(found['errors'])} are named above{more}"
        )

    parser = _command(actions, "verify", "read, decode and tokenise every sample", verify)
    parser.add_argument("shards", nargs="+", help="paths, globs, brace ranges or folders")
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder")
    parser.add_argument("--workers", type=int, default=0, help="processes that read; 0: this one alone")
    parser.add_argument(
        "--max_named", type=int, default=20, metavar="N", help="broken samples that are named, one a line"
    )

    def stats(args: argparse.Namespace) -> Iterable[str]:
        from mmllm.data import commands
        from mmllm.data.looking.tables import stats_lines

        told = commands.stats(args.recipe, args.steps, args.batch_size, args.html)
        return _as_json(told) if args.json else stats_lines(told)

    parser = _command(actions, "stats", "the realised mixture of a recipe's first steps", stats)
    parser.add_argument("--recipe", required=True, metavar="FILE", help="YAML")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=8, help="sequences a step")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--html", metavar="FILE", help="also write them as plots")

    def show(args: argparse.Namespace) -> Iterable[str]:
        from mmllm.data import commands
        from mmllm.data.looking.tables import show_lines

        ways = args.text, args.world_size, args.num_workers, args.html
        told = commands.show(args.recipe, args.step, args.batch_size, *ways, starts=not args.json)
        return _as_json(told) if args.json else show_lines(told)

    parser = _command(actions, "show", "exactly what a step holds", show)
    parser.add_argument("--recipe", required=True, metavar="FILE", help="YAML")
    parser.add_argument("--step", type=int, default=0, help="from 0")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences a step")
    parser.add_argument("--text", action="store_true", help="also the text of each sequence")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines to read")
    parser.add_argument("--html", metavar="FILE", help="also write a page with texts, pictures and sounds")
    parser.add_argument("--world_size", type=int, default=1, help="read through so many ranks' loaders")
    parser.add_argument("--num_workers", type=int, default=0, help="workers of each loader")


def _add_tokenizer(actions: Any) -> None:
    def train_text(args: argparse.Namespace) -> Iterable[str]:
        from mmllm.training import tokenizer_commands

        config = _tokenizer_config(args)
        return _as_json(tokenizer_commands.train_text(args.inputs, args.out, args.vocab_size, args.codec, config))

    parser = _command(actions, "train-text", "byte-level BPE from text, as a tokenizer folder", train_text)
    parser.add_argument("inputs", nargs="+", help="manifests (.jsonl), recipes (.yaml) or shards")
    parser.add_argument("--vocab_size", type=int, default=4096, help="ids at most, special tokens and bytes included")
    _add_tokenizer_options(parser)

    def assemble(args: argparse.Namespace) -> Iterable[str]:
        from mmllm.training import tokenizer_commands

        return _as_json(tokenizer_commands.assemble(args.out, args.text, args.codec, _tokenizer_config(args)))

    parser = _command(actions, "assemble", "a tokenizer folder from text tokens and an audio tokenizer", assemble)
    parser.add_argument("--text", required=True, help="tokenizer.json, or the folder that holds it")
    _add_tokenizer_options(parser)
    _add_audio_tokenizers(actions)


def _add_audio_tokenizers(actions: Any) -> None:
    def encodec(args: argparse.Namespace) -> Iterable[str]:
        from mmllm.training import tokenizer_commands

        return _as_json(tokenizer_commands.encodec(args.name, args.out, args.weights, args.num_codebooks))

    parser = _command(actions, "encodec", "an audio tokenizer from one of Meta's EnCodec models", encodec)
    parser.add_argument("name", help="encodec_24khz or encodec_48khz")
    parser.add_argument(
        "--weights", metavar="FILE", help="the published .th file, or its folder; else torch hub's cache"
    )
    parser.add_argument("--num_codebooks", type=int, default=8, help="codebooks in use")
    parser.add_argument("--out", required=True, metavar="DIR", help="what `assemble --codec DIR` takes")

    def kmeans(args: argparse.Namespace) -> Iterable[str]:
        from mmllm.training import tokenizer_commands
        from mmllm_tokenizers.audio import KMeansConfig

        config = KMeansConfig(
            args.sample_rate, args.hop_samples, args.num_clusters, window_samples=5 * args.hop_samples // 2,
            seed=args.seed,
        )  # fmt: skip
        return _as_json(tokenizer_commands.kmeans(args.inputs, args.out, config, args.max_minutes))

    parser = _command(actions, "kmeans", "an audio tokenizer of k-means units, which hears but can't speak", kmeans)
    parser.add_argument("inputs", nargs="+", help="manifests (.jsonl) or shards with sound")
    parser.add_argument("--num_clusters", type=int, default=256, help="units")
    parser.add_argument("--sample_rate", type=int, default=8000, help="sounds are resampled to it")
    parser.add_argument("--hop_samples", type=int, default=160, help="samples a frame; windows are 2.5 times as long")
    parser.add_argument("--max_minutes", type=float, default=60.0, help="at most so much sound, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, metavar="DIR", help="what `assemble --codec DIR` takes")


def _add_tokenizer_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, help="tokenizer folder")
    parser.add_argument("--codec", help="folder of an audio tokenizer; without it there is no sound")
    parser.add_argument("--image_tokens", type=int, default=16, help="slots an image")
    parser.add_argument("--image_size", type=int, default=64, help="pixels, both sides")
    parser.add_argument("--audio_pool", type=int, default=2, help="frames an <|audio|> slot")
    parser.add_argument("--pattern", choices=("parallel", "delay", "flatten"), default="delay")
    parser.add_argument("--num_codebooks", type=int, default=0, help="codebooks in use; 0: as in the codec folder")


def _tokenizer_config(args: argparse.Namespace) -> Any:
    from mmllm_tokenizers.folder import TokenizerConfig

    names = ("image_tokens", "image_size", "audio_pool", "pattern", "num_codebooks")
    return TokenizerConfig(**{name: getattr(args, name) for name in names})


# --- inference, evaluation, interop -------------------------------------------------------------------------------


def _add_eval(commands: Any) -> None:
    def run(args: argparse.Namespace) -> Iterable[str]:
        from mmllm.evaluation import commands as evaluation

        result = evaluation.run_eval(
            args.model, args.task, args.manifest, args.json, args.limit, args.batch_size, args.seed, args.media,
            args.sequence_length, args.device, args.max_bad_fraction, ticker(f"prompts of {args.task}"),
        )  # fmt: skip
        end_line()
        return evaluation.score_lines(result)

    parser = _command(commands, "eval", "scores on held-out rows, with intervals and the blind baseline", run)
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder")
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--manifest", required=True, metavar="FILE", help="JSONL of held-out rows")
    parser.add_argument("--json", metavar="OUT", help="where scores and predictions go")
    parser.add_argument("--limit", type=int, help="at most so many rows, drawn at random")
    parser.add_argument("--sequence_length", type=int, default=512, help="of text: the length of training's sequences")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--media", metavar="DIR", help="folder for what is spoken")
    parser.add_argument("--max_bad_fraction", type=float, default=0.05, help="more unusable rows are an error")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)


def _add_interop(commands: Any) -> None:
    def export(args: argparse.Namespace) -> Iterable[str]:
        from mmllm.training import interop_commands

        return [interop_commands.export(args.model, args.out)]

    parser = _command(commands, "export", "a model's decoder as a transformers checkpoint", export)
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the checkpoint goes")

    def import_(args: argparse.Namespace) -> Iterable[str]:
        from mmllm.training import interop_commands

        return [interop_commands.import_decoder(args.source, args.out)]

    parser = _command(commands, "import", "a transformers checkpoint as a decoder to train from", import_)
    parser.add_argument("source", help="folder of a Mixtral or Qwen3-MoE checkpoint")
    parser.add_argument("--out", required=True, metavar="DIR", help="for DecoderModule's `init_from`")


def _add_inference(commands: Any) -> None:
    def caption(args: argparse.Namespace) -> Iterable[str]:
        return _loaded(args).caption(args.images, **_settings(args))

    parser = _command(commands, "caption", "say what is in pictures", caption)
    parser.add_argument("images", nargs="+", help="image files")
    _add_text_settings(parser)

    def transcribe(args: argparse.Namespace) -> Iterable[str]:
        return _loaded(args).transcribe(args.sounds, **_settings(args))

    parser = _command(commands, "transcribe", "write down what is said in recordings", transcribe)
    parser.add_argument("sounds", nargs="+", help="sound files")
    _add_text_settings(parser)

    def speak(args: argparse.Namespace) -> Iterable[str]:
        said = _loaded(args).speak(args.text, args.out, voice=args.voice, **_settings(args))
        units = " x ".join(str(size) for size in reversed(said.codes_KF.shape))
        return [f"{args.out}: {said.seconds:.2f} s at {said.sample_rate} Hz, {units} units"]

    parser = _command(commands, "speak", "say a text", speak)
    parser.add_argument("text")
    parser.add_argument("--out", required=True, metavar="WAV", help="the file to write, .wav or .flac")
    parser.add_argument("--voice", help="a speaker of the training data")
    parser.add_argument("--max_seconds", type=float, help="at most so long")
    _add_settings(parser)

    def generate(args: argparse.Namespace) -> Iterable[str]:
        images, sounds = args.image or (), args.audio or ()
        return [_loaded(args).generate(args.parts, images=images, sounds=sounds, **_settings(args))]

    parser = _command(commands, "generate", "continue any order of text, pictures and sounds", generate)
    parser.add_argument("parts", nargs="+", help="text, and files that are told by their suffix")
    parser.add_argument("--image", action="append", help="fills an <|image|> slot of the text; may be repeated")
    parser.add_argument("--audio", action="append", help="fills an <|audio|> slot of the text; may be repeated")
    _add_text_settings(parser)

    def chat(args: argparse.Namespace) -> Iterable[str]:
        messages = [{"role": "system", "content": args.system}] if args.system else []
        return [_loaded(args).chat([*messages, {"role": "user", "content": args.parts}], **_settings(args))]

    parser = _command(commands, "chat", "answer a message of text, pictures and sounds", chat)
    parser.add_argument("parts", nargs="+", help="text, and files that are told by their suffix")
    parser.add_argument("--system", help="text before the conversation")
    _add_text_settings(parser)


_SETTINGS = ("max_new_tokens", "max_seconds", "temperature", "top_k", "top_p", "seed")


def _add_text_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max_new_tokens", type=int, help="at most so many tokens")
    _add_settings(parser)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder")
    parser.add_argument("--temperature", type=float, help="0 takes the most probable")
    parser.add_argument("--top_k", type=int, help="draw among so many")
    parser.add_argument("--top_p", type=float, help="draw among the fewest of this probability")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same output")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What was given: the rest is the model's own."""
    given = {name: getattr(args, name, None) for name in _SETTINGS}
    return {name: value for name, value in given.items() if value is not None}


def _loaded(args: argparse.Namespace) -> Any:
    from mmllm.inference.api import load

    return load(args.model, args.device)


# --- configs and quickstart ---------------------------------------------------------------------------------------


def _add_configs(actions: Any) -> None:
    def list_all(_: argparse.Namespace) -> Iterable[str]:
        from mmllm import paths

        return paths.list_configs()

    def copy(args: argparse.Namespace) -> Iterable[str]:
        from mmllm import paths

        return [str(paths.copy_config(args.name, args.destination))]

    _command(actions, "ls", "names of all", list_all)
    parser = _command(actions, "cp", "copy one", copy)
    parser.add_argument("name", help="as `mmllm configs ls` shows it")
    parser.add_argument("destination", nargs="?", default=".", help="file or folder; by default here")


def _add_quickstart(commands: Any) -> None:
    def run(args: argparse.Namespace) -> Iterable[str]:
        from mmllm.cli import main
        from mmllm.quickstart.run import quickstart

        quickstart(
            main, args.out, args.train, args.test, args.holdout, args.minutes, args.seed, args.max_steps,
            args.max_bad_fraction,
        )  # fmt: skip
        return []

    def demo_data(args: argparse.Namespace) -> Iterable[str]:
        from mmllm.quickstart.demo_data import DemoSizes, make_demo_data

        sizes = DemoSizes().scaled(args.share)
        return _as_json(make_demo_data(args.out, args.seed, sizes, max(1, args.workers)))

    parser = _command(commands, "demo-data", "the scenes, speech, documents and prose of the demo", demo_data)
    parser.add_argument("--out", required=True, metavar="DIR", help="where the manifests go")
    parser.add_argument("--share", type=float, default=1.0, help="of the demo's rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="processes that synthesise; 0: this one alone")

    def report(args: argparse.Namespace) -> Iterable[str]:
        from mmllm.quickstart.summary import summarise

        return [str(summarise(Path(args.out)))]

    parser = _command(commands, "report", "a quickstart's report and model card again, from its folder", report)
    parser.add_argument("--out", required=True, metavar="DIR", help="the quickstart's folder")

    parser = _command(commands, "quickstart", "the whole way on one machine, from data to report", run)
    parser.add_argument("--train", action="append", default=[], metavar="MANIFEST", help="your data; may be repeated")
    parser.add_argument("--test", action="append", default=[], metavar="MANIFEST", help="may be repeated")
    parser.add_argument("--holdout", metavar="KEY=VALUE", help="rows to hold out where there is no --test")
    parser.add_argument(
        "--minutes", type=float, metavar="N",
        help="wall time at most, evaluation included; a run that goes on may get more until its decoder is trained",
    )  # fmt: skip
    parser.add_argument("--max_steps", type=int, metavar="N", help="steps of each training at most")
    parser.add_argument("--max_bad_fraction", type=float, help="more unusable rows are an error")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--out", required=True, metavar="DIR", help="where everything goes")
