"""Transcripts as JSON, SRT and WebVTT: what players and OpenAI's client read, over odd texts, too."""

from __future__ import annotations

import html
import json
import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmllm.inference.subtitles import make_cues, to_srt, to_verbose_json, to_vtt
from mmllm.inference.transcripts import Segment, Transcript, Word

SRT_CUE = re.compile(r"(\d+)\n(\d\d+):(\d\d):(\d\d),(\d{3}) --> (\d\d+):(\d\d):(\d\d),(\d{3})\n((?:.+\n)+)")
VTT_CUE = re.compile(r"(\d\d+):(\d\d):(\d\d)\.(\d{3}) --> (\d\d+):(\d\d):(\d\d)\.(\d{3})\n((?:.+\n)+)")


def spoken(text: str, start: float = 0.0, step: float = 0.4) -> Segment:
    """A segment whose words are said one by one."""
    words = tuple(
        Word(word, start + step * number, start + step * (number + 1), 0.9) for number, word in enumerate(text.split())
    )
    return Segment(start, words[-1].end, text, words, 0.9, False, -0.1, 0.05)


def transcript(*segments: Segment) -> Transcript:
    return Transcript(" ".join(s.text for s in segments), segments, segments[-1].end + 1 if segments else 5.0)


def test_a_transcript_is_its_text():
    found = transcript(spoken("a red circle"), spoken("two stars", 3.0))
    assert found == "a red circle two stars" == str(found) == f"{found}"
    assert hash(found) == hash(found.text) and json.dumps(found) == '"a red circle two stars"'
    assert found.words is not None and [w.word for w in found.words] == ["a", "red", "circle", "two", "stars"]
    assert not found.doubtful
    assert transcript(Segment(0, 1, "x")).words is None and Transcript("").words == ()


def test_verbose_json_has_the_fields_of_openai():
    first = Segment(0.0, 1.0, "x y", None, None, True, None, None)
    value = json.loads(json.dumps(to_verbose_json(transcript(spoken("a red circle"), spoken("two stars", 3.0)))))
    assert value["task"] == "transcribe" and value["language"] == "und"
    assert value["duration"] == pytest.approx(4.8) and value["text"] == "a red circle two stars"
    assert [segment["id"] for segment in value["segments"]] == [0, 1]
    assert {"id", "seek", "start", "end", "text", "tokens", "temperature", "avg_logprob", "compression_ratio",
            "no_speech_prob"} <= value["segments"][0].keys()  # fmt: skip
    assert value["segments"][0]["avg_logprob"] == -0.1 and value["segments"][0]["no_speech_prob"] == 0.05
    assert value["words"][3] == {"word": "two", "start": 3.0, "end": 3.4, "confidence": 0.9}
    untimed = to_verbose_json(transcript(first), "translate")
    assert "words" not in untimed and untimed["segments"][0]["doubtful"] and untimed["task"] == "translate"
    assert to_verbose_json(Transcript("", (), 2.0, "en")) == {
        "task": "transcribe", "language": "en", "duration": 2.0, "text": "", "segments": [], "words": [],
    }  # fmt: skip


def test_srt_and_vtt_of_two_sentences():
    found = transcript(spoken("a <red> circle & more"), spoken("two --> stars", 3661.5))
    assert to_srt(found) == (
        "1\n00:00:00,000 --> 00:00:02,000\na <red> circle & more\n\n2\n01:01:01,500 --> 01:01:02,700\ntwo → stars\n"
    )
    assert to_vtt(found) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:02.000\na &lt;red&gt; circle &amp; more\n\n"
        "01:01:01.500 --> 01:01:02.700\ntwo --&gt; stars\n"
    )
    assert to_srt(Transcript("")) == "" and to_vtt(Transcript("")) == "WEBVTT\n"


def test_long_segments_are_shown_bit_by_bit():
    text = " ".join(["window"] * 40)  # 279 characters in 16 seconds
    cues = make_cues(transcript(spoken(text)))
    assert [" ".join(cue.lines).count("window") for cue in cues] == [12, 12, 12, 4]
    assert all(len(line) <= 42 for cue in cues for line in cue.lines) and len(cues[0].lines) == 2
    assert abs(len(cues[0].lines[0]) - len(cues[0].lines[1])) <= 7, "two lines are of about the same length"
    assert cues[1].start == 4800, "when its first word is said"
    slow = make_cues(transcript(spoken("one two three four five six", step=2.0)))
    assert [" ".join(cue.lines) for cue in slow] == ["one two three", "four five six"]


def test_short_cues_stay_for_a_second_if_nothing_follows():
    first, second = spoken("so", 0.0, 0.2), spoken("yes it is", 0.5)
    assert [(cue.start, cue.end) for cue in make_cues(transcript(first, second))] == [(0, 500), (500, 1700)]
    alone, _ = make_cues(transcript(first, spoken("a b c", 5.0)))
    assert (alone.start, alone.end) == (0, 1000)


def test_words_of_double_width_and_without_end():
    cues = make_cues(transcript(Segment(0.0, 12.0, "圆" * 60)))
    assert "".join(line for cue in cues for line in cue.lines) == "圆" * 60
    assert all(len(line) <= 21 for cue in cues for line in cue.lines)


def test_words_that_do_not_match_share_the_time():
    segment = Segment(2.0, 4.0, "ab cdef", (Word("ab", 2.0, 9.0),))
    long = Segment(2.0, 4.0, f"{'ab ' * 20}{'cd ' * 20}".strip(), (Word("ab", 2.0, 9.0),))
    assert [(cue.start, cue.end) for cue in make_cues(transcript(segment))] == [(2000, 4000)]
    assert make_cues(transcript(long))[1].start == pytest.approx(2000 + 2000 * 28 / 40, abs=30)


SEGMENTS = st.lists(
    st.tuples(st.text(max_size=300), st.floats(0, 9), st.floats(0, 30), st.booleans()), max_size=5
)  # fmt: skip


def made(drawn: list[tuple[str, float, float, bool]]) -> Transcript:
    segments, time = [], 0.0
    for text, gap, length, is_timed in drawn:
        tokens = [token for token in text.split() if any(map(str.isalnum, token))]
        start = time + gap
        step = length / max(1, len(tokens))
        words = tuple(Word(token, start + step * i, start + step * (i + 1)) for i, token in enumerate(tokens))
        segments.append(Segment(start, start + length, text, words if is_timed else None))
        time = start + length
    return Transcript("x", tuple(segments), time)


def shown(text: str) -> str:
    """What of a text can be seen: no spaces, no control characters."""
    return "".join(c for c in text if not c.isspace() and unicodedata.category(c) != "Cc")


@settings(max_examples=150, deadline=None)
@given(SEGMENTS)
def test_odd_texts_make_files_that_can_be_read(drawn):
    found = made(drawn)
    json.dumps(to_verbose_json(found))
    cues = make_cues(found)
    ends = 0
    for cue in cues:
        assert ends <= cue.start < cue.end <= cue.start + 7000
        assert 1 <= len(cue.lines) <= 2 and all(line.strip() for line in cue.lines)
        for line in cue.lines:
            assert "\n" not in line and "\r" not in line
            assert sum(not unicodedata.combining(c) for c in line) <= 42
        ends = cue.end
    wanted = shown("".join(text for text, *_ in drawn))
    assert shown("".join(line for cue in cues for line in cue.lines)) == wanted

    srt = list(SRT_CUE.finditer(to_srt(found)))
    assert [int(match[1]) for match in srt] == list(range(1, len(cues) + 1))
    assert "\n".join(match[0] for match in srt) == to_srt(found), "nothing stands between cues"
    times = [tuple(int(match[place]) for place in range(2, 10)) for match in srt]
    assert [((t[0] * 60 + t[1]) * 60 + t[2]) * 1000 + t[3] for t in times] == [cue.start for cue in cues]

    header, *blocks = to_vtt(found).split("\n\n") if cues else ["WEBVTT\n"]
    assert header in ("WEBVTT", "WEBVTT\n") and len(blocks) == len(cues)
    vtt = list(VTT_CUE.finditer(to_vtt(found)))
    assert len(vtt) == len(cues) and all("-->" not in match[9] and "<" not in match[9] for match in vtt)
    assert [html.unescape(match[9]).rstrip("\n").split("\n") for match in vtt] == [list(cue.lines) for cue in cues]
