"""Prompts from files: every kind is read, every bad file is refused with what is wrong and what to do."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from distilled_t5.prompts.corpora import COMPBENCH_CATEGORIES, PromptError, read_compbench, read_file

CAPTIONS = ["a red fox", "ein grauer Bär, müde", "\u4e00\u53ea\u732b"]


def texts(path: Path, kind: str, column: str = "", limit: int = 0) -> list[str]:
    return [prompt.text for prompt in read_file(str(path), kind, column, limit)]


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def parquet(folder: Path, **columns: object) -> Path:
    path = folder / "captions.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def compbench(folder: Path, *, prompts: int = 2) -> Path:
    for category in COMPBENCH_CATEGORIES:
        for part in ("train", "val"):
            written(folder, f"{category}_{part}.txt", "".join(f"{category} {part} {index}\n" for index in range(prompts)))
    return folder


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "with a byte order mark"])
def test_lines_are_read_with_any_line_end(tmp_path, end, mark):
    path = written(tmp_path, "captions.txt", mark + end.join([CAPTIONS[0], "", f"  {CAPTIONS[1]} ", "\t", CAPTIONS[2]]).encode())
    assert texts(path, "lines") == CAPTIONS


def test_line_separators_of_unicode_do_not_cut_a_caption(tmp_path):
    path = written(tmp_path, "captions.txt", "one\u2028two\x0bthree\u0085four\nfive\n")
    assert texts(path, "lines") == ["one\u2028two\x0bthree\u0085four", "five"]


def test_json_list_of_strings_and_of_objects(tmp_path):
    assert texts(written(tmp_path, "a.json", json.dumps(CAPTIONS)), "json") == CAPTIONS
    objects = [{"id": 1, "caption": caption} for caption in CAPTIONS] + [{"id": 2, "caption": None}]
    assert texts(written(tmp_path, "b.json", json.dumps(objects, ensure_ascii=False)), "json", "caption") == CAPTIONS


def test_csv_column_with_quotes_commas_and_line_ends(tmp_path):
    path = written(tmp_path, "a.csv", 'id,caption\r\n1,"a fox, ""red"""\r\n2,"two\r\nlines"\r\n\r\n3,\r\n')
    assert texts(path, "csv", "caption") == ['a fox, "red"', "two\r\nlines"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_of_any_spreadsheet_is_read(tmp_path, encoding, delimiter):
    rows = [("id", "name, of it", "caption"), ("1", "a", "a fox"), ("2", "b;c", "ein Bär; müde,\tsehr"), ("3", "", "two\nlines")]
    path = tmp_path / "a.csv"
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    assert texts(path, "csv", "caption") == [row[2] for row in rows[1:]]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_json_lines_are_read(tmp_path, encoding, end):
    lines = [json.dumps({"id": 1, "caption": caption}, ensure_ascii=False) for caption in [*CAPTIONS, "a\u2028b"]]
    for count in (1, 4):
        path = tmp_path / "a.jsonl"
        path.write_bytes(end.join([*lines[:count], ""]).encode(encoding))
        assert texts(path, "json", "caption") == [*CAPTIONS, "a\u2028b"][:count]


def test_lines_in_utf_16_are_read(tmp_path):
    assert texts(written(tmp_path, "captions.txt", "\r\n".join(CAPTIONS).encode("utf-16")), "lines") == CAPTIONS


def test_parquet_column_of_any_string_type(tmp_path):
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        path = parquet(tmp_path, width=[1, 2, 3, 4], caption=pyarrow.array([*CAPTIONS, None]).cast(kind))
        assert texts(path, "parquet", "caption") == CAPTIONS


@pytest.mark.parametrize("limit", [1, 2, 3, 99])
def test_limit_counts_prompts_and_not_blank_lines(tmp_path, limit):
    path = written(tmp_path, "captions.txt", "\n\n" + "\n\n".join(CAPTIONS))
    assert texts(path, "lines", limit=limit) == CAPTIONS[:limit]


def test_path_below_the_packs_folder_is_found_from_anywhere_and_a_nearer_one_comes_first(tmp_path, monkeypatch, pack_root):
    monkeypatch.chdir(tmp_path)
    shipped = "prompts/words/sentences.txt"
    assert len(read_file(shipped, "lines")) == 500
    written(tmp_path, "mine.txt", "a red fox")
    assert texts(Path("mine.txt"), "lines") == ["a red fox"]
    (tmp_path / "prompts" / "words").mkdir(parents=True)
    written(tmp_path, shipped, "a nearer one")
    assert texts(Path(shipped), "lines") == ["a nearer one"]


@pytest.mark.parametrize("nested", [False, True], ids=["the folder", "a checkout of the repository"])
def test_compbench_takes_its_six_categories_in_turn(tmp_path, nested):
    folder = tmp_path / "examples" / "dataset" if nested else tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    compbench(folder)
    for stray in ("color.txt", "complex_train.txt", "color_val_seen.txt", "non_spatial_train.txt"):
        written(folder, stray, "not of the six\n")
    train = [prompt.text for prompt in read_compbench(str(tmp_path))]
    assert train == [f"{category} train {index}" for index in range(2) for category in COMPBENCH_CATEGORIES]
    assert [prompt.text for prompt in read_compbench(str(tmp_path), "validation", limit=6)] == [f"{c} val 0" for c in COMPBENCH_CATEGORIES]


def bad(*rows: tuple[str, str, str | bytes, str, str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("name", "kind", "content", "column", "message"), rows, ids=[f"{row[1]}: {row[4]}" for row in rows])


@bad(
    ("a.txt", "lines", "", "", "contains no prompts"),
    ("a.txt", "lines", " \n\t\n", "", "contains no prompts"),
    ("a.txt", "lines", "ok\n\xffBär\n".encode("latin-1"), "", r"line 2: not valid UTF-8 text: \\udcffB"),
    ("a.txt", "lines", b"\xff\xfea\x00 ", "", "cannot be read as lines from line 1 on: .*truncated data"),
    ("a.txt", "lines", b"PAR1\x15\x04\x00\x00", "", "line 1: not valid UTF-8 text"),
    ("a.txt", "lines", "1\n2\n3.5\n", "", "got text without a single letter.\nThe first: 1"),
    ("a.txt", "lines", "https://a.example/1.jpg\nhttp://a.example/2\n", "", "expected prompts, got only addresses"),
    ("a.csv", "lines", "id,caption\n1,fox\n", "", 'write kind = "csv"'),
    ("a.tsv", "lines", "id\tcaption\n1\tfox\n", "", 'write kind = "csv"'),
    ("a.json", "lines", "[]", "", 'write kind = "json"'),
    ("a.jsonl", "lines", "[]", "", 'write kind = "json"'),
    ("a.txt", "json", "a red fox", "", 'write kind = "lines"'),
    ("a.json", "json", "", "", "cannot be read as json from item 1 on: Expecting value"),
    ("a.json", "json", "[1, 2", "", "Expecting ',' delimiter: line 1 column 6"),
    ("a.jsonl", "json", '{"a": "b"}\n{"a": \n', "a", "cannot be read as json from item 2 on: Expecting value"),
    ("a.json", "json", "[" * 200_000, "", "maximum recursion depth exceeded"),
    ("a.json", "json", b"\x80\x02}q\x00", "", "cannot be read as json"),
    ("a.json", "json", "[]", "", "contains no prompts"),
    ("a.json", "json", '{"images": []}', "caption", 'item 1: there is no column "caption".\nIts columns: images'),
    ("a.json", "json", '["fox", 3]', "", "item 2: expected text, got int 3"),
    ("a.json", "json", '["fox", ["a"]]', "", "item 2: expected text, got list"),
    ("a.json", "json", '["fox", "\\ud800"]', "", "item 2: not valid UTF-8 text"),
    ("a.json", "json", '[{"caption": "fox"}]', "text", r'item 1: there is no column "text".\nIts columns: caption'),
    (
        "a.json",
        "json",
        '[{"caption": "fox"}, {"captoin": "owl"}]',
        "caption",
        'item 2: there is no column "caption".\nIts columns: capt',
    ),
    ("a.json", "json", '[{"caption": "fox"}]', "", "no column is named.\nIts columns: caption"),
    ("a.json", "json", "[{}]", "caption", "Its columns: none"),
    ("a.json", "json", '["fox"]', "caption", 'item 1: expected an object with the key "caption", got "fox"'),
    ("a.csv", "csv", "", "caption", "contains no prompts"),
    ("a.csv", "csv", "id,caption\n", "caption", "contains no prompts"),
    ("a.csv", "csv", "id,captions\n1,fox\n", "caption", 'Its columns: id, captions\nWhat to do: write column = "captions"'),
    ("a.csv", "csv", "id;captions\n1;fox\n", "caption", 'Its columns: id, captions\nWhat to do: write column = "captions"'),
    ("a.csv", "csv", "id,caption\n1,owl\n1,a fox, red\n", "caption", "from row 2 on: expected 2 cells as in the first line; is a ','"),
    ("a.csv", "csv", "id,caption\n1\n", "caption", "from row 1 on: expected 2 cells"),
    ("a.csv", "csv", 'id,caption\n1,"a fox\n2,owl\n', "caption", "from row 1 on: unexpected end of data"),
    ("a.csv", "csv", "id,caption\n1,B\xe4r\n".encode("latin-1"), "caption", "row 1: not valid UTF-8 text"),
    ("a.csv", "csv", "width,caption\n512,fox\n", "width", "got text without a single letter"),
    ("a.parquet", "parquet", "a red fox", "caption", "cannot be read as parquet from row 1 on: "),
    ("a.parquet", "parquet", b"PAR1" + bytes(100) + b"PAR1", "caption", "cannot be read as parquet from row 1 on: "),
    ("a.parquet", "parquet", b"", "caption", "cannot be read as parquet from row 1 on: "),
)
def test_bad_file_is_refused_with_a_reason(tmp_path, name, kind, content, column, message):
    path = written(tmp_path, name, content)
    with pytest.raises(PromptError, match=message) as caught:
        read_file(str(path), kind, column)
    assert str(path) in str(caught.value)
    assert "\nWhat to do: " in str(caught.value)
    assert str(caught.value).isprintable() or "\n" in str(caught.value)


def test_parquet_with_another_column_or_a_column_that_is_not_text(tmp_path):
    path = parquet(tmp_path, width=[512, 768], captions=["fox", "owl"], tags=[["a"], ["b"]])
    with pytest.raises(PromptError, match='Its columns: width, captions, tags\nWhat to do: write column = "captions"'):
        read_file(str(path), "parquet", "caption")
    with pytest.raises(PromptError, match="row 1: expected text, got int 512"):
        read_file(str(path), "parquet", "width")
    with pytest.raises(PromptError, match="row 1: expected text, got list"):
        read_file(str(path), "parquet", "tags")


def test_parquet_without_rows_or_truncated(tmp_path):
    path = parquet(tmp_path, caption=pyarrow.array([], pyarrow.string()))
    with pytest.raises(PromptError, match="contains no prompts"):
        read_file(str(path), "parquet", "caption")
    path = parquet(tmp_path, caption=CAPTIONS * 1000)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(PromptError, match="cannot be read as parquet"):
        read_file(str(path), "parquet", "caption")


def test_missing_pyarrow_is_an_error_that_gives_the_pip_command(tmp_path, monkeypatch):
    path = parquet(tmp_path, caption=CAPTIONS)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="pip install") as caught:
        read_file(str(path), "parquet", "caption")
    assert str(caught.value) == (
        f'Reading the Parquet file {path} needs the package pyarrow.\nWhat to do: run "{sys.executable}" -m pip install pyarrow'
    )


def test_missing_file_is_named_with_the_places_searched_and_similar_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "captions.txt", "a red fox")
    with pytest.raises(PromptError) as caught:
        read_file("caption.txt", "lines")
    assert '"caption.txt" was not found' in str(caught.value)
    assert f"Searched: {tmp_path / 'caption.txt'} and " in str(caught.value)
    assert f"did you mean {tmp_path / 'captions.txt'}?" in str(caught.value)
    with pytest.raises(PromptError, match="correct the path in the recipe"):
        read_file(str(tmp_path / "no" / "such" / "folder" / "a.txt"), "lines")


def test_folder_in_the_place_of_a_file_and_a_file_in_that_of_a_folder(tmp_path):
    with pytest.raises(PromptError, match='is a folder, but kind "lines" reads a file'):
        read_file(str(tmp_path), "lines")
    with pytest.raises(PromptError, match='is a file, but kind "compbench" reads a folder'):
        read_compbench(str(written(tmp_path, "color_train.txt", "a red fox")))


def test_a_path_that_is_neither_a_file_nor_a_folder_is_refused_without_reading():
    with pytest.raises(PromptError, match="neither a file nor a folder" if os.name == "posix" else "was not found"):
        read_file("/dev/zero", "lines")


def test_file_that_cannot_be_opened_is_an_error_with_the_systems_reason(tmp_path, monkeypatch):
    path = written(tmp_path, "captions.txt", "a red fox")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # the tests may run as root, whom no file refuses
    with pytest.raises(PromptError, match=r"cannot be read as lines from line 1 on: .*Permission denied"):
        read_file(str(path), "lines")


def test_compbench_folder_without_a_category_is_refused_with_what_is_missing_and_there(tmp_path):
    compbench(tmp_path)
    (tmp_path / "numeracy_train.txt").unlink()
    with pytest.raises(PromptError, match=r"Missing: numeracy_train.txt. Its text files: 3d_spatial_train.txt, 3d_spatial_val.txt, color_"):
        read_compbench(str(tmp_path))
    assert len(read_compbench(str(tmp_path), "validation")) == 12


def test_compbench_folder_without_anything_or_with_an_empty_file(tmp_path):
    with pytest.raises(PromptError, match="Its text files: none"):
        read_compbench(str(tmp_path))
    compbench(tmp_path)
    written(tmp_path, "shape_train.txt", "\n")
    with pytest.raises(PromptError, match=r"shape_train\.txt contains no prompts"):
        read_compbench(str(tmp_path))
