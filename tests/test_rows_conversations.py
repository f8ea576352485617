"""Conversations: whatever a record holds is used, or the row is named."""

from __future__ import annotations

import base64
import json
import logging

import pytest

from mmllm.data import commands
from mmllm.data.rows.bad_rows import BadRows, ManifestError
from mmllm.data.rows.forms import read_rows, told_form
from mmllm.data.rows.media import Embedded
from tests.rows_fixtures import as_lines, only, picture_bytes, pictures, put, read, said, sound_bytes

OPENAI = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PAIR = {"user": "a", "assistant": "b", "source": "x"}
ASK, ANSWER = {"from": "human", "value": "<image>Which?"}, {"from": "gpt", "value": "Red"}
TALK = [ASK, ANSWER]
UNMARKED = [{"from": "human", "value": "Which?"}, ANSWER]


def reason(tmp_path, record: dict, **options) -> str:
    """Why a record is a bad row; it must be named by file and row, and the others still be read."""
    good = {"conversations": UNMARKED}
    path = as_lines(tmp_path / "r.jsonl", good, record)
    rows, reasons = read(path, **options)
    assert len(rows) == 1 and len(reasons) == 1, reasons
    assert reasons[0].startswith(f"{path}:2: ")
    with pytest.raises(ManifestError):
        read_rows(as_lines(tmp_path / "alone.jsonl", record), BadRows(1.0), "llava", **options)
    return reasons[0]


@pytest.mark.parametrize("empty", [{"images": None}, {"images": []}, {"image": "0.png", "images": ["0.png"]}, {}])
@pytest.mark.parametrize("turns", [TALK, UNMARKED])
def test_an_empty_column_hides_no_picture(tmp_path, empty, turns):
    pictures(tmp_path)
    row = only(as_lines(tmp_path / "m.jsonl", {"image": "0.png", **empty, "conversations": turns}))
    assert said(row) == ["u:0.png", "u:Which?", "a:Red"] and not row.metadata


def test_two_columns_that_differ_are_named(tmp_path):
    pictures(tmp_path)
    assert "both 'image' (1) and 'images' (1)" in reason(
        tmp_path, {"image": "0.png", "images": ["1.png"], "conversations": TALK}
    )


def test_paths_between_marks_are_pictures_in_their_places(tmp_path):
    pictures(tmp_path / "p")
    (tmp_path / "p" / "s.flac").write_bytes(sound_bytes())
    turns = [
        {"from": "user", "value": "Picture 1: <img>0.png</img>\nPicture 2: <img>1.png</img>\n<audio>s.flac</audio>"},
        {"from": "assistant", "value": "Red."},
        {"from": "user", "value": "And <img> 2.png </img>?"},
        {"from": "assistant", "value": "Blue."},
    ]  # fmt: skip
    row = only(as_lines(tmp_path / "m.jsonl", {"conversations": turns}), media=tmp_path / "p")
    assert said(row) == [
        "u:Picture 1: ", "u:0.png", "u:Picture 2: ", "u:1.png", "u:s.flac", "a:Red.",
        "u:And ", "u:2.png", "u:?", "a:Blue.",
    ]  # fmt: skip
    assert "names no picture in" in reason(tmp_path, {"conversations": [{**ASK, "value": "<img>9.png</img>"}, ANSWER]})
    outside = {**ASK, "value": "<img>../r.jsonl</img>"}
    assert "leads out of" in reason(tmp_path, {"conversations": [outside, ANSWER]}, media=tmp_path / "p")
    twice = {"images": ["p/0.png"], "conversations": [{**ASK, "value": "<img>p/0.png</img>"}, ANSWER]}
    assert "name files; name each in one of the two" in reason(tmp_path, twice)


@pytest.mark.parametrize("mark", ["<image{}>", "<image_{}>", "<|image_{}|>", "<image {}>"])
def test_numbered_marks_are_the_pictures_of_their_numbers(tmp_path, mark):
    pictures(tmp_path)
    text = f"Is {mark.format(2)} like {mark.format(1)}?"
    record = {"image": ["0.png", "1.png"], "conversations": [{"from": "human", "value": text}, ANSWER]}
    assert said(only(as_lines(tmp_path / "m.jsonl", record))) == [
        "u:Is ",
        "u:1.png",
        "u: like ",
        "u:0.png",
        "u:?",
        "a:Red",
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<image1> and <image3>", "the marks <image1>, <image3> stand for files 1 to 2"),
        ("<image0> and <image1>", "from 1"),
        ("<image1>", "files 1 to 2"),
        ("<image1> and <image>", "with and without numbers"),
        ("<image><image><image>", "3 marks for image but 2 files"),
    ],
)
def test_marks_that_stand_for_no_picture_are_named(tmp_path, text, why):
    pictures(tmp_path)
    record = {"images": ["0.png", "1.png"], "conversations": [{"from": "human", "value": text}, ANSWER]}
    assert why in reason(tmp_path, record)


@pytest.mark.parametrize(
    "record",
    [
        {"videos": ["a.mp4"], "conversations": UNMARKED},
        {"videos": ["clip"], "conversations": UNMARKED},
        {"video": "a.mp4", "conversations": UNMARKED},
        {"conversations": [{"from": "human", "value": "<video>What?"}, ANSWER]},
        {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}, OPENAI[1]]},
    ],
)  # fmt: skip
def test_videos_are_named(tmp_path, record):
    why = reason(tmp_path, record)
    assert "video" in why and "film" not in why


def test_system_is_a_first_turn_and_other_columns_are_metadata(tmp_path):
    pictures(tmp_path)
    record = {
        "id": 5, "system": "One word.", "source": "vqa", "tools": "[]", "difficulty": 3, "text": "as rendered",
        "question": "q", "image": "0.png", "conversations": TALK, "nothing": None,
    }  # fmt: skip
    row = only(as_lines(tmp_path / "m.jsonl", record))
    assert (row.id, said(row)) == ("5", ["s:One word.", "u:0.png", "u:Which?", "a:Red"])
    assert row.metadata == {"source": "vqa", "difficulty": 3, "source_text": "as rendered", "source_question": "q"}
    row = only(as_lines(tmp_path / "t.jsonl", {"system": "One word.", "conversations": UNMARKED}))
    assert said(row) == ["s:One word.", "u:Which?", "a:Red"] and "new_turn" not in row.segments[1]
    told = only(
        as_lines(tmp_path / "s.jsonl", {"conversations": [{"from": "system", "value": "One word."}, *UNMARKED]})
    )
    assert said(told) == said(row)
    both = {"system": "One.", "conversations": [{"from": "system", "value": "Two."}, *UNMARKED]}
    assert "'system' and another turn of the system" in reason(tmp_path, both)


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"tools": '[{"name": "ocr"', "conversations": UNMARKED}, "tools is "),
        ({"tools": {"name": "ocr"}, "conversations": UNMARKED}, "a list of schemas is wanted"),
        ({"conversations": [*UNMARKED, {"from": "function_call", "value": "{}"}]}, "turn 2 calls '{}'"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}, "nobody answers"),
        ({"messages": [OPENAI[0], {"role": "assistant", "content": None, "tool_calls": [1]}]}, "turn 1 calls '1'"),
        ({"messages": [{**OPENAI[0], "tool_calls": [{"name": "x"}]}, OPENAI[1]]}, "turn 0 (user) calls tools"),
        ({"chosen": ANSWER, "rejected": ANSWER, "conversations": UNMARKED}, "preference pair"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference pair"),
        ({"messages": OPENAI, "rejected_response": "c"}, "pair"),
        ({"conversations": [ASK, {"from": "gpt", "value": None}], "image": "0.png"}, "turn 1"),
        ({"conversations": [ASK, {"from": "gpt", "value": ""}], "image": "0.png"}, "turn 1 (assistant) says nothing"),
        ({"conversations": [{"from": "human", "value": " "}, ANSWER]}, "turn 0 (user) says nothing"),
        ({"conversations": [{**ASK, "image": "0.png"}, ANSWER]}, "turn 0 has 'image' of its own"),
        ({"conversations": UNMARKED, "messages": OPENAI}, "both 'conversations' and 'messages'"),
        ({"conversations": ["a", "b"]}, "turn 0 is 'a'"),
        ({"conversations": '[{"from": "human", "value'}, "isn't JSON"),
        ({"conversations": "[{'from': 'human', 'value': 'x'}]"}, "json.dumps"),
        ({"conversations": "hello"}, "'conversations' is 'hello'"),
    ],
)  # fmt: skip
def test_what_has_no_place_or_makes_no_sense_is_named(tmp_path, record, why):
    pictures(tmp_path)
    assert why in reason(tmp_path, record)


def test_conversations_as_json_in_a_text(tmp_path):
    pictures(tmp_path)
    record = {"images": json.dumps(["0.png"]), "conversations": json.dumps(TALK)}
    wanted = ["u:0.png", "u:Which?", "a:Red"]
    assert said(only(as_lines(tmp_path / "m.jsonl", record))) == wanted
    quoted = ",".join('"' + value.replace('"', '""') + '"' for value in record.values())
    table = put(tmp_path / "m.csv", f"images,conversations\n{quoted}\n")
    assert said(only(table)) == wanted
    renamed = put(tmp_path / "n.csv", f"images,dialog\n{quoted}\n")
    from mmllm.data.rows.column_names import ColumnNames

    assert said(only(renamed, columns=ColumnNames.parse(["messages=dialog"]))) == wanted


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ({"query": "<image>Which?", "response": "Red", "images": ["0.png"]}, ["u:0.png", "u:Which?", "a:Red"]),
        ({"query": "b", "response": "B", "history": [["a", "A"]]}, ["u:a", "a:A", "u:b", "a:B"]),
        ({"instruction": "Say", "input": "", "output": "red"}, ["u:Say", "a:red"]),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, ["u:Add\n1 2", "a:3"]),
        ({"prompt": "a", "completion": "b"}, ["u:a", "a:b"]),
        (
            {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
            ["u:a", "a:b"],
        ),
        ({"texts": [PAIR, PAIR], "images": ["0.png"]}, ["u:0.png", "u:a", "a:b", "u:a", "a:b"]),
        ({"messages": {"role": ["user", "assistant"], "content": ["a", "b"]}}, ["u:a", "a:b"]),
    ],
)  # fmt: skip
def test_pairs_of_other_forms(tmp_path, record, wanted):
    pictures(tmp_path)
    path = as_lines(tmp_path / "m.jsonl", record)
    assert told_form(path) == "llava"
    row = only(path)
    assert said(row) == wanted
    assert row.metadata == ({"source": "x"} if "texts" in record else {})


def test_a_text_with_keys_of_a_pair_stays_a_text(tmp_path):
    row = only(as_lines(tmp_path / "m.jsonl", {"text": "a b", "prompt": "a", "response": "b"}))
    assert (row.kind, row.metadata) == ("text", {"prompt": "a", "response": "b"})


def test_what_turns_say_of_themselves_is_kept(tmp_path):
    turns = [{"role": "user", "content": "a", "lang": "en"}, {"role": "assistant", "content": "b", "lang": "de"}]
    row = only(as_lines(tmp_path / "m.jsonl", {"messages": turns}))
    assert row.metadata == {"turns": [{"lang": "en"}, {"lang": "de"}]}


def test_parts_with_data_urls_and_base64(tmp_path):
    url = "data:image/png;base64," + base64.b64encode(picture_bytes(1)).decode()
    sound = base64.b64encode(sound_bytes(form="WAV")).decode()
    parts = [
        {"type": "text", "text": "See "},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": url.partition(",")[2]}},
        {"type": "image", "image": {"bytes": url.partition(",")[2], "path": None}},
    ]
    talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": "b"}]
    row = only(as_lines(tmp_path / "m.jsonl", {"messages": talk}))
    kinds = [
        (kind, segment[kind].read_bytes()) for segment in row.segments for kind in ("image", "audio") if kind in segment
    ]
    assert kinds == [
        ("image", picture_bytes(1)), ("audio", sound_bytes(form="WAV")), ("image", picture_bytes(1)),
        ("image", picture_bytes(1)),
    ]  # fmt: skip
    assert all(isinstance(segment["image"], Embedded) for segment in row.segments if "image" in segment)
    in_text = only(as_lines(tmp_path / "t.jsonl", {"messages": [{"role": "user", "content": url}, talk[1]]}))
    assert in_text.segments[0] == {"text": url, "role": "user"}, "a text stays a text, whatever it looks like"


@pytest.mark.parametrize("off", [{"loss": False}, {"weight": 0}, {"loss": False, "weight": 1}])
def test_answers_that_are_not_trained_on(tmp_path, off):
    """From the record through tar and index to the targets of the document."""
    from mmllm.data.samples.documents import build_document
    from mmllm.data.samples.schema import read_sample
    from mmllm.data.shards.tar import scan_tar
    from tests.data_fixtures import make_folder

    turns = [
        {"role": "user", "content": "one"}, {"role": "assistant", "content": "red", **off},
        {"role": "user", "content": "two"}, {"role": "assistant", "content": "blue", "loss": True},
    ]  # fmt: skip
    path = as_lines(tmp_path / "m.jsonl", {"messages": turns})
    row = only(path)
    assert said(row) == ["u:one", "a:red (not trained)", "u:two", "a:blue"]
    commands.build(path, tmp_path / "s")
    folder = make_folder(tmp_path / "tok")
    shard = tmp_path / "s" / "interleaved-000000.tar"
    (span,) = scan_tar(shard)
    data = shard.read_bytes()
    files = {member.ending: data[member.offset : member.offset + member.size] for member in span.members}
    document = build_document(read_sample(files, span.key, "s"), "chat", folder)
    trained = folder.text.decode(document.token_ids_T[document.targets_T].tolist())
    assert "blue" in trained and "red" not in trained and "two" not in trained
    assert "red" in folder.text.decode(document.token_ids_T.tolist())
    plain = only(
        as_lines(
            tmp_path / "p.jsonl",
            {"messages": [{k: v for k, v in t.items() if k in ("role", "content")} for t in turns]},
        )
    )
    assert [segment.get("loss") for segment in plain.segments] == [None] * 4
    commands.index(tmp_path / "s", tmp_path / "tok")
    told = commands.verify(tmp_path / "s", tmp_path / "tok")
    assert told["broken"] == 0 and told["documents"] == 1


@pytest.mark.parametrize(
    ("turn", "why"),
    [
        ({"role": "assistant", "content": "b", "weight": 0.5}, "weight 0.5"),
        ({"role": "assistant", "content": "b", "loss": "false"}, "loss 'false'"),
        ({"role": "assistant", "content": "b", "loss": False}, "no answer of this conversation is trained on"),
    ],
)
def test_a_loss_that_has_no_place_is_named(tmp_path, turn, why):
    assert why in reason(tmp_path, {"messages": [{"role": "user", "content": "a"}, turn]})
    user = {"messages": [{"role": "user", "content": "a", "loss": True}, {"role": "assistant", "content": "b"}]}
    assert "only answers are trained on" in reason(tmp_path, user)


def test_segments_of_manifests_have_loss_too(tmp_path):
    segments = [{"text": "a", "role": "user"}, {"text": "b", "role": "assistant", "loss": False}]
    more = [{"text": "c", "role": "user"}, {"text": "d", "role": "assistant"}]
    row = only(as_lines(tmp_path / "m.jsonl", {"segments": [*segments, *more]}))
    assert said(row) == ["u:a", "a:b (not trained)", "u:c", "a:d"]
    with pytest.raises(ManifestError, match="no answer of this conversation is trained on"):
        read_rows(as_lines(tmp_path / "n.jsonl", {"segments": segments}))
    for wrong in ({"text": "a", "loss": False}, {"text": "a", "role": "assistant", "loss": 0.5}, {"text": "a", "x": 1}):
        with pytest.raises(ManifestError, match=r"segment 0 has the (loss|key 'x')"):
            read_rows(as_lines(tmp_path / "w.jsonl", {"segments": [wrong]}))


def test_a_misspelt_picture_of_a_conversation_is_named(tmp_path):
    pictures(tmp_path)
    assert "'img' names the file 0.png" in reason(tmp_path, {"img": "0.png", "conversations": UNMARKED})


def test_what_is_skipped_is_logged(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        reason(tmp_path, {"conversations": UNMARKED, "tools": "x"})
    assert any("r.jsonl:2" in record.message for record in caplog.records)


def test_more_that_is_used_or_named(tmp_path):
    pictures(tmp_path)
    same = {"system": "One.", "messages": [{"role": "system", "content": "One."}, *OPENAI], "tools": "{}"}
    assert said(only(as_lines(tmp_path / "s.jsonl", same))) == ["s:One.", "u:a", "a:b"]
    nulls = {"image": "0.png", "images": [None], "conversations": TALK}
    assert said(only(as_lines(tmp_path / "n.jsonl", nulls))) == ["u:0.png", "u:Which?", "a:Red"]
    off = {"messages": [*OPENAI, OPENAI[0], {**OPENAI[1], "train": False}]}
    assert said(only(as_lines(tmp_path / "o.jsonl", off)))[-1] == "a:b (not trained)"
    for key in ("label", "kto_tag"):
        assert "is one that is refused" in reason(tmp_path, {"messages": OPENAI, key: False})
        assert only(as_lines(tmp_path / "k.jsonl", {"messages": OPENAI, key: True})).metadata == {key: True}
    assert "image' must be a path, got None" in reason(tmp_path, {"images": ["0.png", None], "conversations": UNMARKED})
    masked = {"image": "0.png", "conversations": [{**ASK, "mask": {"bytes": "iVBORw0KGgo" + "A" * 80}}, ANSWER]}
    bad = BadRows(0.0)
    (row,) = read_rows(as_lines(tmp_path / "b.jsonl", masked), bad)
    assert not row.metadata and bad.left_out == {"bytes of the column 'mask'": 1}


def asked(*parts) -> dict:
    return {"messages": [{"role": "user", "content": list(parts)}, OPENAI[1]]}


@pytest.mark.parametrize(
    ("part", "why"),
    [
        ({"type": "text", "text": "q", "image": "0.png"}, "type text also has 'image': '0.png'"),
        ({"type": "text", "text": "q", "content": "r"}, "type text also has 'content': 'r'"),
        ({"type": "text", "text": "q", "loss": False}, "type text also has 'loss': False"),
        ({"type": "image", "image": "0.png", "text": "what is it?"}, "type image also has 'text': 'what is it?'"),
        ({"type": "image", "image": "0.png", "url": "1.png"}, "type image also has 'url': '1.png'"),
        ({"type": "image", "text": "what is it?"}, "type image also has 'text': 'what is it?'"),
        ({"type": "image", "image": "0.png", "index": 1}, "type image also has 'index': 1"),
        ({"type": "image_url", "image_url": "0.png", "text": "q"}, "type image_url also has 'text': 'q'"),
        ({"type": "image_url", "image_url": {"url": "0.png", "text": "q"}}, "type image_url also has 'text': 'q'"),
        (
            {"type": "input_audio", "input_audio": {"data": "UklGR" + "A" * 99, "format": "wav", "transcript": "a"}},
            "type input_audio also has 'transcript': 'a'",
        ),
    ],
)
def test_what_a_part_holds_beside_its_own_is_named(tmp_path, part, why):
    pictures(tmp_path)
    assert why in reason(tmp_path, {"image": "2.png", **asked({"type": "text", "text": "<image>"}, part)})


def test_keys_of_parts_that_mean_nothing_here_are_passed_over(tmp_path):
    pictures(tmp_path)
    record = asked(
        {"type": "image_url", "image_url": {"url": "0.png", "detail": "low"}},
        {"type": "image", "image": "1.png", "max_pixels": 100, "text": None, "url": ""},
        {"type": "text", "text": "q", "cache_control": {"type": "ephemeral"}, "image": None, "index": None},
    )
    assert said(only(as_lines(tmp_path / "m.jsonl", record))) == ["u:0.png", "u:1.png", "u:q", "a:b"]


def test_a_part_may_name_a_picture_by_its_index(tmp_path):
    pictures(tmp_path)
    record = {"images": ["0.png", "1.png"], **asked({"type": "image", "index": 1}, {"type": "image", "index": 0})}
    assert said(only(as_lines(tmp_path / "m.jsonl", record))) == ["u:1.png", "u:0.png", "a:b"]
    record = {"images": ["0.png"], **asked({"type": "image", "index": 1})}
    assert "<image2>" in reason(tmp_path, record)


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_is_a_content_like_any_other(tmp_path, key):
    pictures(tmp_path)
    parts = [{"type": "text", "text": "Answer in rhyme."}, {"type": "image", "image": "0.png"}]
    row = only(as_lines(tmp_path / "m.jsonl", {key: parts, "messages": OPENAI}))
    assert said(row) == ["s:Answer in rhyme.", "s:0.png", "u:a", "a:b"] and not row.metadata
    for nothing in (None, [], " "):
        assert said(only(as_lines(tmp_path / "n.jsonl", {key: nothing, "messages": OPENAI}))) == ["u:a", "a:b"]
    for wrong in ({"text": "x"}, 5, True):
        why = reason(tmp_path, {key: wrong, "messages": OPENAI})
        assert f"{key!r} is " in why and "give a text or a list of parts" in why
    assert "also has 'image'" in reason(tmp_path, {key: [{**parts[0], "image": "0.png"}], "messages": OPENAI})


def test_a_record_that_is_not_trained_on_is_named(tmp_path):
    for said_so in ({"loss": False}, {"weight": 0}, {"weight": 0.5}, {"loss": "false"}, {"loss": [0, 1]}):
        ((key, value),) = said_so.items()
        shown = json.dumps(value) if isinstance(value, list) else repr(value)
        assert f"has the {key} {shown} beside its turns" in reason(tmp_path, {**said_so, "messages": OPENAI})
    for nothing in ({"loss": True}, {"weight": 1}, {"weight": 1.0}, {"loss": None}):
        assert said(only(as_lines(tmp_path / "n.jsonl", {**nothing, "messages": OPENAI}))) == ["u:a", "a:b"]


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"conversations": None}, "'conversations' is null"),
        ({"conversations": []}, "'conversations' is empty"),
        ({"id": 1, "messages": []}, "'messages' is empty"),
        ({"instruction": None, "output": "x"}, "'instruction' is null"),
        ({"instruction": "x", "output": None}, "'output' is null"),
        ({"query": "x", "response": None}, "'response' is null"),
        ({"texts": []}, "'texts' is empty"),
        ({"system": "s", "conversations": []}, "'conversations' is empty"),
    ],
)
def test_what_is_null_or_empty_is_said(tmp_path, record, why):
    _, reasons = read(as_lines(tmp_path / "c.jsonl", {"text": "good", "n": 1}, record), form="manifest")
    assert len(reasons) == 1 and f"c.jsonl:2: no conversation: {why}; " in reasons[0]
    answered = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    _, reasons = read(as_lines(tmp_path / "d.jsonl", answered, record))
    assert len(reasons) == 1 and f"d.jsonl:2: no conversation: {why}; " in reasons[0]
