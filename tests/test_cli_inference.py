"""The shell's commands that run a model folder, on a tiny one."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import mmllm
from mmllm.checkpoints.folder import save_model
from mmllm.checkpoints.settings import GenerationConfig
from mmllm.cli import completion
from mmllm.cli.main import _parser, main
from mmllm.model.multimodal import MultimodalModel
from mmllm.model.vision import VisionConfig
from mmllm.model.whitened_vision import WhitenedConfig
from tests.inference_fixtures import RATE, images, make, make_model, make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, pictures and sounds."""
    folder = tmp_path_factory.mktemp("shell")
    model = make()
    generation = dataclasses.replace(model.generation, max_heard_seconds=0.3)
    save_model(folder / "model", model.model, model.tokenizer, generation=generation)
    for number, image in enumerate(images(5)):
        Image.fromarray(image).save(folder / f"{number}.png")
    rng = np.random.default_rng(0)
    for name, seconds in (("short", 0.2), ("long", 0.9)):
        wave = rng.normal(0, 0.2, round(seconds * RATE)).astype(np.float32)
        soundfile.write(folder / f"{name}.wav", wave, RATE)
    (folder / "bad.png").write_bytes(b"no picture")
    (folder / "bad.wav").write_bytes(b"no sound")
    return folder


@pytest.fixture(scope="module")
def model(folder) -> mmllm.Model:
    return mmllm.load(folder / "model")


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Runs a command in the folder: its exit code, its lines, and those on stderr."""
    monkeypatch.chdir(folder)

    def run(*command: str, stdin: str = "") -> tuple[int, list[str], list[str]]:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        code = main([*command, "--model", "model"])
        done = capsys.readouterr()
        return code, done.out.removesuffix("\n").split("\n") if done.out else [], done.err.splitlines()

    return run


def test_one_broken_file_does_not_end_the_rest(run, model, folder):
    files = ["0.png", "bad.png", "1.png", "none.png", "2.png", "3.png", "4.png"]
    good = [file for file in files if file[0].isdigit()]
    captions = model.caption([folder / file for file in good])
    code, out, err = run("caption", *files)
    assert code == 2 and out == [line for caption in captions for line in caption.split("\n")]
    assert [line.split(":")[0] for line in err] == ["mmllm", "mmllm", "mmllm"]
    assert "bad.png: not a picture" in err[0] and "no image file at none.png" in err[1]
    assert err[2] == "mmllm: error: 2 of 7 failed: bad.png, none.png"
    code, out, err = run("caption", "--json", *files)
    lines = [json.loads(line) for line in out]
    assert code == 2 and [line["input"] for line in lines] == files, "in the order of the inputs, a line each"
    assert [line["text"] for line in lines if "text" in line] == captions
    assert [line["input"] for line in lines if "error" in line] == ["bad.png", "none.png"]
    first = lines[0]
    assert set(first) == {"input", "text", "finish_reason", "confidence", "num_tokens", "seconds"}
    assert first["confidence"] == pytest.approx(captions[0].confidence) and first["num_tokens"] == len(captions[0].ids)


def test_files_may_be_named_on_stdin(run, model, folder):
    code, out, err = run("caption", "-", "4.png", "--json", stdin="0.png\n\n1.png\r\n")
    assert (code, err) == (0, []) and [json.loads(line)["input"] for line in out] == ["0.png", "1.png", "4.png"]
    assert run("caption", "-", stdin="") == (0, [], [])


def test_results_come_while_later_files_are_still_named(folder, monkeypatch):
    """The first is answered before the second is asked for."""
    monkeypatch.chdir(folder)
    command = [sys.executable, "-m", "mmllm.cli", "caption", "-", "--json", "--model", "model"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("0.png\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["input"] == "0.png"
        process.stdin.write("1.png\n")
        process.stdin.close()
        assert json.loads(process.stdout.readline())["input"] == "1.png"
    assert process.returncode == 0


def test_transcripts_and_subtitles(run, model, folder, tmp_path):
    short, long = model.transcribe([folder / "short.wav", folder / "long.wav"])
    code, out, err = run("transcribe", "short.wav", "bad.wav", "long.wav")
    assert code == 2 and "\n".join(out) == f"{short}\n{long}" and "bad.wav" in err[0]
    code, out, _ = run("transcribe", "long.wav", "--json")
    values = json.loads(out[0])
    assert code == 0 and values["input"] == "long.wav" and values["text"] == long and values["duration"] == 0.9
    code, out, _ = run("transcribe", "long.wav", "--srt")
    assert code == 0 and (not long or out[0] == "1")
    code, out, _ = run("transcribe", "long.wav", "--vtt")
    assert code == 0 and out[0] == "WEBVTT"
    code, out, err = run("transcribe", "long.wav", "short.wav", "--vtt")
    assert code == 2 and "need a folder for their files; give --out DIR" in err[0]
    code, out, err = run("transcribe", "long.wav", "short.wav", "--vtt", "--out", str(tmp_path / "new"))
    assert (code, out) == (0, [str(tmp_path / "new" / f"{name}.vtt") for name in ("long", "short")])
    assert (tmp_path / "new" / "short.vtt").read_text().startswith("WEBVTT\n")
    code, _, err = run("transcribe", "long.wav", "--srt", "--json")
    assert code == 2 and "not allowed with argument --srt" in err[0]


def test_answers_and_continuations(run, model, folder, tmp_path):
    asked = ["see ", folder / "0.png"]
    assert run("answer", "see ", "0.png", "--question", "how many?")[:2] == (
        0, model.answer(asked, "how many?").split("\n"),
    )  # fmt: skip
    code, out, _ = run("answer", "0.png", "--question", "how many?", "--choice", "one", "--choice", "two", "--json")
    assert code == 0 and json.loads(out[0])["text"] in ("one", "two")
    assert run("answer", "-", "--question", "who?", stdin=" he \n")[1] == model.answer("he", "who?").split("\n")
    whole = model.generate("a red")
    assert run("generate", "-", stdin="a red")[1] == whole.split("\n")
    code, out, _ = run("generate", "a red", "--stop", whole[3:5], "--json")
    assert json.loads(out[0])["text"] == whole[: whole.index(whole[3:5])]
    (tmp_path / "schema.json").write_text('{"enum": ["x", "y"]}')
    code, out, _ = run("generate", "a", "--json_schema", str(tmp_path / "schema.json"))
    assert code == 0 and json.loads(out[0]) in ("x", "y")
    (tmp_path / "schema.json").write_text("{")
    assert "is no JSON" in run("generate", "a", "--json_schema", str(tmp_path / "schema.json"))[2][0]
    assert "stdin has no text" in run("generate", "-")[2][0]


def test_speech_from_stdin(run, tmp_path):
    out = tmp_path / "out.wav"
    code, lines, _ = run("speak", "-", "--out", str(out), "--max_seconds", "0.2", stdin="two red\n")
    assert code == 0 and lines[0].startswith(f"{out}: ") and soundfile.info(out).samplerate == RATE


def test_vectors(run, model, folder):
    code, out, err = run("embed", "0.png", "a red", "bad.png")
    lines = [json.loads(line) for line in out]
    assert code == 2 and "bad.png" in err[0] and "error" in lines[2]
    for line, expected in zip(lines[:2], model.embed([folder / "0.png", "a red"]), strict=True):
        np.testing.assert_allclose(line["embedding"], expected.numpy(), rtol=1e-5, atol=1e-6)
    assert "the image side of a CLIP alone" in run("embed", "a", "--space", "clip")[2][0]


def test_a_conversation(run, model, folder):
    first = [{"role": "user", "content": [folder / "0.png", "what is it?"]}]
    reply = model.chat(first)
    talk = [*first, {"role": "assistant", "content": reply}, {"role": "user", "content": "sure?"}]
    typed = "/image 0.png\nwhat is it?\nsure?\n/reset\nsure?\n/quit\nnever read\n"
    code, out, err = run("chat", stdin=typed)
    replies = [reply, model.chat(talk), model.chat(talk[2:])]
    assert (code, err) == (0, []) and "\n".join(out) == "\n".join(replies)
    code, out, err = run("chat", stdin="/image none.png\n/audio bad.wav\n/foo\n/audio\n/audio short.wav\n0.png\n")
    heard = [{"role": "user", "content": [folder / "short.wav", mmllm.data.samples.sample.Segment(text="0.png")]}]
    assert code == 0 and "\n".join(out) == model.chat(heard), "what is typed is text"
    assert "none.png: no such image" in err[0] and "bad.wav" in err[1] and "there is no /foo" in err[2]
    assert "/audio needs a file's name" in err[3]
    code, out, err = run("chat", "--system", "be kind", "--best_of", "2", "--temperature", "1", stdin="one?\n")
    assert code == 0 and out
    code, out, err = run("chat", stdin="/audio long.wav\none?\n\nx\n")
    assert code == 0 and "hears 0.3 s at once" in err[0], "the sound waits on, and is told again"
    assert run("chat", "-", stdin="two?")[1] == model.chat([{"role": "user", "content": "two?"}]).split("\n")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("captoin 0.png", "invalid choice: 'captoin' (did you mean caption?)"),
        ("data buidl x", "(did you mean build?)"),
        ("caption 0.png --temprature 3 --model model", "--temprature (did you mean --temperature?) 3"),
        ("caption 0.png --modle model", "unrecognized arguments: --modle (did you mean --model?); see `mmllm caption"),
        ("caption 00.png --model model", "00.png: no such image (did you mean"),
        ("caption 0.png --model modle", "modle: no such model folder (did you mean model?)"),
        ("transcribe short.wav --vad enrgy --model model", "(did you mean energy?)"),
    ],
)
def test_what_was_meant_is_guessed_and_said(folder, monkeypatch, capsys, command, said):
    monkeypatch.chdir(folder)
    assert main(command.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0]


def completed(script: str, words: list[str], cwd: Path) -> set[str]:
    """What bash offers for the last of some words."""
    line = " ".join(words)
    quoted = " ".join(f"'{word}'" for word in words)
    code = f"{script}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; COMP_LINE='{line}'; COMP_POINT={len(line)}\n"
    code += "_shtab_mmllm; printf '%s\\n' \"${COMPREPLY[@]}\""
    done = subprocess.run(["bash", "-c", code], cwd=cwd, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_bash_completes_commands_options_and_files(folder, capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert {"caption", "chat", "transcribe"} <= completed(script, ["mmllm", ""], folder)
    assert completed(script, ["mmllm", "cap"], folder) == {"caption"}
    assert {"--model", "--json"} <= completed(script, ["mmllm", "caption", "--"], folder)
    assert {"0.png", "1.png"} <= completed(script, ["mmllm", "caption", ""], folder)
    assert "model" in {each.rstrip("/") for each in completed(script, ["mmllm", "caption", "--model", "mo"], folder)}
    assert completed(script, ["mmllm", "data", "bu"], folder) == {"build"}
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef mmllm")


def test_completion_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mmllm\[completion\]'"):
        completion.script(_parser(), "bash")


def test_a_caption_imports_no_more_than_it_needs(folder, tmp_path):
    """Of a model with a tower of its own, as the demo's: what it needs is there in a fraction of the time."""
    tokenizer = make_tokenizer()
    config = make_model(tokenizer).config
    torch.manual_seed(0)
    own = MultimodalModel(dataclasses.replace(config, vision=VisionConfig(whitened=WhitenedConfig(16, (8,), 2))))
    save_model(tmp_path / "m", own, tokenizer, generation=GenerationConfig(max_new_tokens=4))
    heavy = ("open_clip", "torchvision", "lightning", "transformers", "timm", "matplotlib")
    compilers = ("sympy", "torch._dynamo")  # the codec's own kernel imports them
    code = (
        "import sys; from mmllm.cli.main import main; code = main(sys.argv[1:]); "
        "print(code, sorted(set(NAMES) & set(sys.modules)))"
    )
    for command in ("caption 0.png", "transcribe short.wav"):
        names = heavy + compilers if command[0] == "c" else heavy
        arguments = [*command.split(), "--model", str(tmp_path / "m")]
        python = [sys.executable, "-c", code.replace("NAMES", repr(names)), *arguments]
        done = subprocess.run(python, cwd=folder, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "0 []", (command, done.stdout, done.stderr)
