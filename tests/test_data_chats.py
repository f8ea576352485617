"""Conversations of every form through build, index, plan and document: what is trained on, and what is refused."""

import json
from types import SimpleNamespace

import pytest

from mmllm.checkpoints.settings import GenerationConfig
from mmllm.data import commands
from mmllm.data.loading.loader import StepDataset
from mmllm.data.plan.plan import open_plan
from mmllm.data.plan.recipe import load_recipe
from mmllm.data.rows.bad_rows import BadRows, ManifestError
from mmllm.data.rows.forms import read_rows, told_form
from mmllm.data.samples.decode import ImageTransform
from mmllm.data.samples.document import Document
from mmllm.inference.prompting import Prompter
from tests.data_fixtures import make_folder
from tests.rows_fixtures import as_lines, only, pictures, put, read, said

SYSTEM, ASK, ANSWER = (
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "which?"},
    {"role": "assistant", "content": "red"},
)  # fmt: skip
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def recipe_of(tmp_path, **source):
    told = {
        "tokenizer": str(tmp_path / "tok"), "sequence_length": 512, "packing": {"window": 16},
        "on_error": {"action": "raise"}, "mixture": {"on_exhausted": "repeat"},
        "sources": [{"name": "chat", "kind": "interleaved", "shards": str(tmp_path / "s" / "*.tar"), **source}],
    }  # fmt: skip
    return put(tmp_path / "recipe.yaml", json.dumps(told))


def documents_of(tmp_path, *records, **source):
    """What is written and what is trained on of each record, by its key, all the way through."""
    folder = make_folder(tmp_path / "tok")
    commands.build(as_lines(tmp_path / "m.jsonl", *records), tmp_path / "s")
    commands.index(tmp_path / "s", tmp_path / "tok")
    plan = open_plan(load_recipe(recipe_of(tmp_path, **source)), 1, folder)
    dataset = StepDataset(plan, folder, ImageTransform(folder.image_size))
    found = {}
    for number in range(plan.sources[0].num_items):
        item = plan.sources[0].item(number)
        document = dataset.document(item, [])
        assert isinstance(document, Document) and document.num_tokens == item.num_tokens
        texts = document.token_ids_T.tolist(), document.token_ids_T[document.targets_T].tolist()
        found[plan.describe(item)["key"]] = tuple(folder.text.decode(ids) for ids in texts)
    return found


@pytest.mark.parametrize(
    ("record", "written", "trained"),
    [
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "ab", "b"),
        ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"},
                            {"from": "gpt", "value": "b"}]}, "s\nab", "b"),
        ({"image": "0.png", "conversations": [{"from": "human", "value": "<image>\nWhich?"},
                                              {"from": "gpt", "value": "Red"}]}, "Which?Red", "Red"),
        ({"messages": [SYSTEM, ASK, ANSWER]}, "Be brief.\nwhich?red", "red"),
        ({"messages": [{**SYSTEM, "role": "developer"}, ASK, ANSWER, {**ASK, "content": "and"}, ANSWER]},
         "Be brief.\nwhich?redandred", "redred"),
        ({"messages": [ASK, {**ANSWER, "loss": False}, {**ASK, "content": "and"}, ANSWER]}, "which?redandred", "red"),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, "Add\n1 23", "3"),
        ({"instruction": "Say", "input": "", "output": "red", "system": "Be brief."}, "Be brief.\nSayred", "red"),
        ({"inputs": "Is it?", "targets": "yes"}, "Is it?yes", "yes"),
        ({"prompt": "a", "completion": "b"}, "ab", "b"),
        ({"messages": [ASK, ASK, ANSWER]}, "which?\nwhich?red", "red"),
        ({"tools": [TOOL], "messages": [SYSTEM, ASK, {"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]},
            {"role": "tool", "tool_call_id": "1", "content": "2"}, ANSWER]},
         f"<tools>\n{json.dumps(TOOL)}\n</tools>\nBe brief.\nwhich?{CALL}2red", f"{CALL}red"),
        ({"tools": json.dumps([TOOL]), "conversations": [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"}, {"from": "gpt", "value": "b"}]},
         f"<tools>\n{json.dumps(TOOL)}\n</tools>\na{CALL}2b", f"{CALL}b"),
    ],
)  # fmt: skip
def test_every_form_is_trained_on_by_its_answers(tmp_path, record, written, trained):
    pictures(tmp_path)
    assert documents_of(tmp_path, {**record, "id": "c"}) == {"c": (written, trained)}
    (shown,) = commands.show(recipe_of(tmp_path), 0, 1, text=True)["sequences"]
    assert "".join(shown["trained"]) == trained * len(shown["documents"]), "`data show` tells what is trained on"


def test_calls_stand_in_a_line_of_their_own_below_what_is_said(tmp_path):
    calls = [{"function": {"name": "add", "arguments": {"a": 1}}}]
    for content in ("I add.", [{"type": "text", "text": "I add."}]):
        talk = [ASK, {"role": "assistant", "content": content, "tool_calls": calls}]
        (row,) = read_rows(as_lines(tmp_path / "m.jsonl", {"messages": talk}))
        assert row.segments[-1]["text"] == f"I add.\n{CALL}"


@pytest.mark.parametrize(
    ("system", "wanted"),
    [
        ({"messages": [SYSTEM, ASK, ANSWER]}, ["{tools}\nBe brief."]),
        ({"system": "Be brief.", "messages": [ASK, ANSWER]}, ["{tools}\nBe brief."]),
        ({"messages": [{**SYSTEM, "content": [{"type": "text", "text": "Be brief."}]}, ASK, ANSWER]},
         ["{tools}\nBe brief."]),
        ({"messages": [{**SYSTEM, "content": ["Be brief.", "Please."]}, ASK, ANSWER]},
         ["{tools}\nBe brief.", "Please."]),
        ({"messages": [ASK, ANSWER]}, ["{tools}"]),
    ],
)  # fmt: skip
def test_tools_and_the_systems_text_are_one_turn(tmp_path, system, wanted):
    """Many chat templates refuse a second one, or write it as another message."""
    (row,) = read_rows(as_lines(tmp_path / "m.jsonl", {"tools": [TOOL], **system}))
    told = [segment for segment in row.segments if segment["role"] == "system"]
    tools = f"<tools>\n{json.dumps(TOOL)}\n</tools>"
    assert [segment["text"] for segment in told] == [text.format(tools=tools) for text in wanted]
    assert not any(segment.get("new_turn") for segment in row.segments)


def test_a_prompt_of_inference_begins_the_document(tmp_path):
    """Also behind a system's turn, of two questions in a row, and in the task `chat` of templates.json."""
    folder = make_folder(tmp_path / "tok")
    more = [{**ASK, "content": "and then?"}, {**ASK, "content": "or now?"}, {**ANSWER, "content": "green"}]
    messages = [SYSTEM, ASK, ASK, ANSWER, *more]
    commands.build(as_lines(tmp_path / "m.jsonl", {"messages": messages}), tmp_path / "s")
    commands.index(tmp_path / "s", tmp_path / "tok")
    plan = open_plan(load_recipe(recipe_of(tmp_path)), 1, folder)
    document = StepDataset(plan, folder, ImageTransform(16)).document(plan.sources[0].item(0), [])
    assert isinstance(document, Document)
    config = SimpleNamespace(vision=None, audio=None)
    prompter = Prompter(config, folder, ImageTransform(16), GenerationConfig())  # type: ignore[arg-type]
    for count in (3, 6):
        prompt = prompter.chat(messages[:count]).token_ids_T.tolist()
        assert document.token_ids_T[: len(prompt)].tolist() == prompt
        assert document.targets_T[len(prompt)] and not document.targets_T[len(prompt) - 1]


def test_a_last_question_is_left_out_named_and_counted(tmp_path, caplog):
    path = as_lines(tmp_path / "m.jsonl", {"messages": [ASK, ANSWER, ASK]}, {"messages": [ASK, ANSWER]})
    told = commands.build(path, tmp_path / "s")
    assert told["left_out"] == {"questions at the end of a conversation, which nobody answers": 1}
    assert f"{path}:1: ends without an answer" in caplog.text
    assert said(read_rows(path)[0]) == ["u:which?", "a:red"]
    for turns in ([ASK], [SYSTEM, ASK], [ASK, {"role": "tool", "content": "2"}]):
        with pytest.raises(ManifestError, match=r"n\.jsonl:1: nobody answers in this conversation"):
            read_rows(as_lines(tmp_path / "n.jsonl", {"messages": turns}))
    segments = [{"text": "a", "role": "user"}, {"text": "b", "role": "assistant"}, {"text": "c", "role": "user"}]
    assert said(only(as_lines(tmp_path / "o.jsonl", {"segments": segments}))) == ["u:a", "a:b"]
    with pytest.raises(ManifestError, match="nobody answers"):
        read_rows(as_lines(tmp_path / "p.jsonl", {"segments": segments[:1]}))


@pytest.mark.parametrize("empty", ["", "  ", "\n", None, []])
def test_an_empty_answer_is_named(tmp_path, empty):
    good = {"messages": [ASK, ANSWER]}
    rows, reasons = read(as_lines(tmp_path / "m.jsonl", good, {"messages": [ASK, {**ANSWER, "content": empty}]}))
    assert len(rows) == 1 and "m.jsonl:2: turn 1" in reasons[0]


def test_a_chat_is_never_cut(tmp_path, caplog):
    folder = make_folder(tmp_path / "tok")
    long = {"id": "long", "messages": [ASK, {**ANSWER, "content": "red " * 600}]}
    commands.build(as_lines(tmp_path / "m.jsonl", {"messages": [ASK, ANSWER]}, long), tmp_path / "s")
    commands.index(tmp_path / "s", tmp_path / "tok")
    source = open_plan(load_recipe(recipe_of(tmp_path)), 1, folder).sources[0]
    assert source.num_items == 1 and source.num_too_long == 1
    assert "longer than a sequence: interleaved-000000.tar:long (" in caplog.text
    assert commands.stats(recipe_of(tmp_path), 1, 1)["left_out"]["chat"]["too_long"] == 1


# ------------------------------------------------------------------------------------------------------------- FLAN
TABLE = """
templates:
  nli:
    - ["{premise} So {hypothesis}?\\n{options}", "{answer}"]
    - {prompt: "Does {premise} mean {hypothesis}?", target: "It is {answer}."}
    - ["{hypothesis}? ({premise})", "{answer}"]
  sum: [["Sum up: {premise}", "{answer}"]]
"""


def examples(count=60):
    fields = {"premise": "it rains", "hypothesis": "it is wet", "answer": "yes", "options": ["yes", "no"]}
    return [{"id": f"e{number}", "task": "nli", **fields} for number in range(count)]


def test_an_example_gets_one_of_its_tasks_wordings(tmp_path):
    path = as_lines(tmp_path / "flan.jsonl", *examples(), {**examples(1)[0], "id": "s", "task": "sum"})
    put(tmp_path / "flan.templates.yaml", TABLE)
    assert told_form(path) == "flan"
    rows = read_rows(path)
    first = {row.id: said(row) for row in rows}
    wordings = [
        ["u:it rains So it is wet?\n- yes\n- no", "a:yes"], ["u:Does it rains mean it is wet?", "a:It is yes."],
        ["u:it is wet? (it rains)", "a:yes"],
    ]  # fmt: skip
    counts = [sum(row == wording for row in first.values()) for wording in wordings]
    assert sum(counts) == 60 and min(counts) >= 10, "each is chosen about as often"
    assert first["s"] == ["u:Sum up: it rains", "a:yes"]
    for row in rows[:60]:
        assert row.metadata["task"] == "nli" and wordings[row.metadata["template"]] == said(row)
    put(tmp_path / "two.templates.yaml", TABLE)
    again = read_rows(as_lines(tmp_path / "two.jsonl", *reversed(examples())))
    assert {row.id: said(row) for row in again} == {name: first[name] for name in first if name != "s"}
    put(tmp_path / "two.templates.yaml", "seed: 1" + TABLE)
    other = {row.id: said(row) for row in read_rows(tmp_path / "two.jsonl")}
    assert sum(other[name] != first[name] for name in other) > 20, "another seed chooses anew"


@pytest.mark.parametrize(
    ("table", "record", "why"),
    [
        (
            TABLE,
            {"task": "other"},
            r"'other', for which flan\.templates\.yaml has no wordings; it has nli, sum",
        ),
        (TABLE, {"task": "sum", "premise": None}, "lacks 'premise'"),
        (TABLE, {"task": "sum", "premise": {"a": 1}}, "a wording reads texts"),
        ("templates: {}", {}, "has no 'templates'"),
        ("templates: {nli: []}", {}, "templates.nli is empty"),
        ("templates: {nli: [[a]]}", {}, r"give \[question, answer\] each"),
        ("templates: {nli: [['{', b]]}", {}, "write {{ and }} for braces"),
        ("templates: {nli: [['{0}', b]]}", {}, "a field is the name of a key"),
        ("templates: {nli: [['{premise:>9}', b]]}", {}, "name of a key, without a format"),
        ("templates: {nli: [['{premise!r}', b]]}", {}, "name of a key, without a format"),
        ("templates: {nli: [[a, b]]}\nseeds: 1", {}, "unknown key 'seeds'"),
    ],
)
def test_wordings_that_do_not_fit_are_named(tmp_path, table, record, why):
    put(tmp_path / "flan.templates.yaml", table)
    with pytest.raises(ManifestError, match=why):
        read_rows(as_lines(tmp_path / "flan.jsonl", {**examples(1)[0], **record}), BadRows(0.0))


def test_examples_that_are_worded_already_need_no_wording(tmp_path):
    put(tmp_path / "flan.templates.yaml", TABLE)
    row = only(as_lines(tmp_path / "flan.jsonl", {"task": "other", "inputs": "a", "targets": "b"}))
    assert said(row) == ["u:a", "a:b"] and row.metadata == {"task": "other"}
