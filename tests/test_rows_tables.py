"""Tables: any separator, any names, and values that stay texts unless a type is asked for."""

from __future__ import annotations

import json

import pytest

from mmllm.cli.main import main
from mmllm.data import commands
from mmllm.data.rows.bad_rows import BadRows, ManifestError
from mmllm.data.rows.column_names import ColumnNames
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.records import read_records, record_at
from tests.rows_fixtures import as_lines, only, pictures, put, read, sound_bytes


def names(*texts: str) -> ColumnNames:
    return ColumnNames.parse(texts)


@pytest.mark.parametrize("ending", ["csv", "tsv"])
@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
@pytest.mark.parametrize(
    "header", ["filepath,title", "image,text", "Image,Text", "image, text", " image ,text ", "file_name,caption"]
)
def test_the_separator_and_the_names_are_told_from_the_header(tmp_path, ending, delimiter, header):
    pictures(tmp_path)
    space = " " if ", " in header else ""
    others = "".join({",", "\t", ";", "|"} - {delimiter})
    lines = [header.replace(",", delimiter), f"0.png{delimiter}{space}a red{others} square"]
    lines.append(f'1.png{delimiter}{space}"blue{delimiter} ""large""\nand round"')
    rows = read_rows(put(tmp_path / f"m.{ending}", "\n".join(lines) + "\n"))
    assert [(row.kind, row.image.name, row.text) for row in rows] == [
        ("caption", "0.png", f"a red{others} square"), ("caption", "1.png", f'blue{delimiter} "large"\nand round'),
    ]  # fmt: skip
    assert not any(row.metadata for row in rows)


def test_sounds_by_their_ending_and_lines_that_excel_writes(tmp_path):
    (tmp_path / "a.flac").write_bytes(sound_bytes())
    text = "\ufeffsep=;\r\nfilepath;title\r\na.flac;one, two\r\n"
    path = tmp_path / "m.csv"
    path.write_bytes(text.encode())
    row = only(path)
    assert (row.kind, row.text, row.where) == ("audio", "one, two", f"{path}:3")


def test_values_stay_texts(tmp_path):
    """Numbers in texts are names of things more often than not: zip codes, hashes, answers."""
    pictures(tmp_path)
    values = ["007", "12e45678", "1_000", "nan", "inf", "1e400", "True", "", "0x10", "1.50"]
    table = "image,text,code\n" + "".join(f"0.png,x,{value}\n" for value in values)
    rows = read_rows(put(tmp_path / "m.csv", table))
    assert [row.metadata for row in rows] == [{"code": value} if value else {} for value in values]
    assert [row.text for row in read_rows(put(tmp_path / "t.csv", "text,id\n123,007\nnan,1e5\n"))] == ["123", "nan"]


def test_types_that_are_asked_for(tmp_path):
    table = "text,score,count,good,name\na,1.5,3,true,007\nb,nan,,0,8\nc,-2e3,+4,No,\n"
    rows = read_rows(put(tmp_path / "m.csv", table), columns=names("score:float,count:int", "good:bool", "name:text"))
    assert [row.metadata for row in rows] == [
        {"score": 1.5, "count": 3, "good": True, "name": "007"}, {"good": False, "name": "8"},
        {"score": -2000.0, "count": 4, "good": False},
    ]  # fmt: skip
    wrong = put(tmp_path / "w.csv", "text,score,count\na,1_000,1\nb,2,2.5\nc,inf,3\nd,high,4\ne,1,5\n")
    rows, reasons = read(wrong, columns=names("score:float", "count:int"))
    assert [row.text for row in rows] == ["e"] and len(reasons) == 4
    assert f"{wrong}:2: 'score' is '1_000'; --columns score:float wants a number" in reasons[0]
    assert "'count' is '2.5'; --columns count:int wants a whole number" in reasons[1]


def test_columns_are_named(tmp_path):
    pictures(tmp_path)
    table = put(tmp_path / "m.csv", "title,text,image_path,s\nx,a red square,0.png,0.5\n")
    with pytest.raises(ManifestError, match=r"'image_path' names the file 0\.png.*--columns image=image_path"):
        read_rows(table)
    row = only(table, columns=names("image=image_path,score=s:float"))
    assert (row.image.name, row.text, row.metadata) == ("0.png", "a red square", {"title": "x", "score": 0.5})
    row = only(table, columns=names("image=image_path,text=title"))
    assert (row.text, row.metadata) == ("x", {"s": "0.5", "source_text": "a red square"})
    with pytest.raises(ManifestError, match="no column 'picture', which --columns names; there are image_path, s, te"):
        read_rows(table, columns=names("image=picture"))
    lines = as_lines(tmp_path / "m.jsonl", {"img": "0.png", "words": "red", "n": "3"})
    row = only(lines, columns=names("image=img,text=words,n:int"))
    assert (row.kind, row.text, row.metadata) == ("caption", "red", {"n": 3})


def test_columns_that_are_not_used_are_told(tmp_path, caplog):
    path = put(tmp_path / "a.txt", "words")
    assert only(path, columns=names("image=x")).text == "words"
    assert "--columns isn't used for" in caplog.text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("score:number", "'number' is no type; give one of text, int, float, bool"),
        ("=a", "give [ours=]theirs[:type]"),
        ("image=", "give [ours=]theirs[:type]"),
        ("", "give [ours=]theirs[:type]"),
        ("image=a,image=b", "names 'image' twice"),
        ("image=a,text=a", "names 'a' twice"),
    ],
)
def test_column_names_that_can_not_be_read(text, why):
    with pytest.raises(ValueError) as caught:
        ColumnNames.parse([text])
    assert why in str(caught.value)


def test_tables_that_can_not_be_told(tmp_path):
    for header, why in (
        ("text,text", "two of its columns are called 'text'"),
        ("", "has no header"),
        ("\n\n", "has no header"),
    ):
        with pytest.raises(ManifestError, match=why):
            read_rows(put(tmp_path / "m.csv", header + "\na,b\n" if header.strip() else header), BadRows(1.0))
    (tmp_path / "u.csv").write_bytes("text\na\n".encode("utf-16"))
    with pytest.raises(ManifestError, match="is UTF-16; save it as UTF-8"):
        read_rows(tmp_path / "u.csv")
    pictures(tmp_path)
    path = put(tmp_path / "n.csv", "image,label\n0.png,red\n")
    with pytest.raises(ManifestError, match=r"n\.csv:2: 'text' is missing; the row has label, image.*--columns text="):
        read_rows(path)
    path = put(tmp_path / "o.csv", "image,caption,sentence\n0.png,red,blue\n")
    with pytest.raises(ManifestError, match=r"'caption' as well as 'sentence'.*--columns text=caption"):
        read_rows(path)
    path = put(tmp_path / "e.csv", "filepath,title\nzero,red\n")
    with pytest.raises(ManifestError, match="'filepath' is 'zero', which ends as no picture or sound does"):
        read_rows(path)


def test_headers_and_quotes_of_others(tmp_path):
    pictures(tmp_path)
    row = only(put(tmp_path / "p.csv", ",FilePath,Title,\n7,0.png,red,\n"))
    assert (row.image.name, row.text, row.metadata) == ("0.png", "red", {"column1": "7"})
    for text in ('1.png\t"odd\n0.png\teven\n', '1.png\t"odd'):
        with pytest.raises(ManifestError, match=r"q\.tsv: a quote in its last row is never closed"):
            read_rows(put(tmp_path / "q.tsv", 'filepath\ttitle\n0.png\t5" wide\n' + text), BadRows(1.0))
    assert only(put(tmp_path / "w.tsv", 'filepath\ttitle\n0.png\t5" wide')).text == '5" wide'
    assert [row.text for row in read_rows(put(tmp_path / "r.csv", "image,text\r0.png,a\r1.png,b\r"))] == ["a", "b"]
    with pytest.raises(ManifestError, match=r"'path' names the file 0\.png.*--columns image=path"):
        read_rows(put(tmp_path / "n.csv", "path,sentence\n0.png,hello\n"))


def test_a_stray_quote_takes_no_rows_with_it(tmp_path):
    """Python's reader would go on to the next quote, and drop it: rows between vanish, and texts are changed."""
    pictures(tmp_path, 4)
    for lines in ('0.png,"a dog\n1.png,a cat\n2.png,says "hi"\n3.png,fine\n', '0.png,"a dog\n1.png,"a cat"\n3.png,b\n'):
        with pytest.raises(
            ManifestError, match=r"s\.csv:2: a quote that this line opens closes within .* of line [34]"
        ):
            read_rows(put(tmp_path / "s.csv", "image,text\n" + lines), BadRows(1.0))
    lines = [
        '0.png,"a "big" dog"',
        '1.png,"a \\"big\\" dog"',
        '2.png,"a ""big""\n dog"',
        '3.png,5" wide',
        '"0.png","a, b"',
    ]
    path = put(tmp_path / "q.csv", "image,text\n" + "\n".join(lines) + "\n")
    rows, reasons = read(path)
    assert [row.text for row in rows] == ['a "big"\n dog', '5" wide', "a, b"]
    assert [row.where for row in rows] == [f"{path}:{number}" for number in (5, 6, 7)]
    assert (
        len(reasons) == 2 and "q.csv:2: has text behind a closing quote; write" in reasons[0] and ":3: " in reasons[1]
    )


def test_common_voice_has_no_quotes(tmp_path):
    (tmp_path / "clips").mkdir()
    table = "client_id\tpath\tsentence\n"
    for name, text in (("a", '"hi" he said'), ("b", '"open'), ("c", "end")):
        (tmp_path / "clips" / f"{name}.flac").write_bytes(sound_bytes())
        table += f"x\t{name}.flac\t{text}\n"
    rows = read_rows(put(tmp_path / "train.tsv", table))
    assert [row.text for row in rows] == ['"hi" he said', '"open', "end"]


def test_rows_are_read_again_alone(tmp_path):
    """As a later step does that keeps only their places."""
    table = 'a, b\r\n1, "x\r\ny"\r\n\r\n2, café\r\n3, 🙂\r\n'
    for name, text in (("t.csv", table), ("bom.csv", "\ufeff" + table)):
        path = tmp_path / name
        path.write_bytes(text.encode())
        records = list(read_records(path))
        assert [record.value["b"] for record in records] == ["x\r\ny", "café", "🙂"]
        assert [record_at(path, record.place, "b") for record in records] == ["x\r\ny", "café", "🙂"]
    values = [{"a": 1}, {"a": "é🙂"}, {"a": [1, {"b": "]"}]}]
    texts = {
        "l.jsonl": "\n".join(json.dumps(value, ensure_ascii=False) for value in values) + "\n",
        "i.json": json.dumps(values, indent=1, ensure_ascii=False),
        "c.json": json.dumps(values),
        "b.json": "\ufeff " + json.dumps(values, ensure_ascii=False) + "\n",
    }
    for name, text in texts.items():
        path = put(tmp_path / name, text)
        records = list(read_records(path))
        assert [record.value for record in records] == values, name
        assert [record_at(path, record.place, "a") for record in records] == [value["a"] for value in values], name
    for broken in ("[1, 2", '[{"a": 1} {"a": 2}]', "[1,]", "[1] 2", "[", '{"a": 1}, 2'):
        with pytest.raises(ManifestError, match="not JSON"):
            list(read_records(put(tmp_path / "broken.json", broken)))
    assert [record.value for record in read_records(put(tmp_path / "e.json", " [ ] "))] == []


def test_a_filter_over_a_table_names_the_column(tmp_path):
    """Values are texts: a number that is compared with one would silently keep nothing."""
    table = put(tmp_path / "m.csv", "text,score\none two,0.7\nthree four,0.2\nfive six,\n")
    from mmllm.data.rows.cleaning import CleaningConfig

    for expression in ("score > 0.5", "not (score < 0.5)"):
        cleaning = CleaningConfig(quality=expression)
        with pytest.raises(ValueError, match=r"the column 'score', here the text '0\.7'.*--columns score:float"):
            commands.build(table, tmp_path / "s", cleaning=cleaning)
        told = commands.build(table, tmp_path / "s", cleaning=cleaning, columns=names("score:float"))
        assert told["num_samples"] == 1 and told["left_out"]["quality"] == 2


def test_the_command_line_takes_columns(tmp_path, capsys):
    pictures(tmp_path)
    path = put(tmp_path / "m.csv", "img;words;n\n0.png;red;007\n1.png;blue;x\n")
    command = ["data", "build", str(path), "--out", str(tmp_path / "s"), "--columns"]
    assert main([*command, "image=img,text=words"]) == 0
    assert json.loads(capsys.readouterr().out)["num_samples"] == 2
    assert main([*command, "image=img,text=words", "--columns", "n:int", "--max_bad_fraction", "0.4"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["num_samples"] == 1 and "m.csv:3: 'n' is 'x'" in told["bad"][0]
    assert main([*command, "image=img,text=words,n:bool"]) == 2
    assert "m.csv:2: 'n' is '007'" in capsys.readouterr().err
    assert main([*command, "image=nothing"]) == 2
    assert "no column 'nothing'" in capsys.readouterr().err


def test_integers_beyond_64_bits_are_named(tmp_path):
    good = [2**63 - 1, -(2**63), 0, -7]
    texts = [*map(str, good), "0" * 5000 + "12", "-" + "0" * 30]
    beyond = [str(2**63), str(-(2**63) - 1), "9" * 30, "1" * 5000]
    table = put(tmp_path / "m.csv", "text,n\n" + "".join(f"x,{text}\n" for text in [*texts, *beyond]))
    rows, reasons = read(table, columns=names("n:int"))
    assert [row.metadata["n"] for row in rows] == [*good, 12, 0]
    assert len(reasons) == len(beyond) and "'n' is 9223372036854775808, which 64 bits don't hold" in reasons[0]
    assert all("(n:text)" in reason and len(reason) < 400 for reason in reasons)
    lines = as_lines(tmp_path / "m.jsonl", {"text": "x", "n": 2**64}, {"text": "y", "n": 5})
    rows, reasons = read(lines, columns=names("n:int"))
    assert [row.metadata for row in rows] == [{"n": 5}] and "is 18446744073709551616, which 64 bits" in reasons[0]
