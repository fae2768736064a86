"""Columns, labels and texts: found, matched, or refused with the rows that are wrong."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from edgekd.errors import DataError


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        (["text", "label"], {"text": "text", "label": "label"}),
        (["id", "Review", "sentiment"], {"text": "Review", "label": "sentiment"}),
        (["sentence", "idx", "class"], {"text": "sentence", "label": "class"}),
        (["premise", "hypothesis", "label"], {"text": "premise", "text_pair": "hypothesis", "label": "label"}),
        (["sentence2", "sentence1", "target"], {"text": "sentence1", "text_pair": "sentence2", "label": "target"}),
        (["question", "category"], {"text": "question", "label": "category"}),
        (["lyrics", "label"], {"text": "lyrics", "label": "label"}),
        (["text", "sort"], {"text": "text"}),
    ],
)
def test_columns_are_found_by_name(jsonl, load, columns, found):
    rows = [{column: f"{column} {n}" for column in columns} for n in range(6)]
    assert load(jsonl("a.jsonl", rows), id2label=None).columns == found


def test_columns_given_win(jsonl, load):
    rows = [{"text": "no", "wanted": f"w{n}", "label": 7, "mine": n % 2} for n in range(6)]
    splits = load(jsonl("a.jsonl", rows), columns={"text": "wanted", "label": "mine"})
    assert splits.train.columns["text"][0].startswith("w")
    assert set(splits.train.labels) <= {0, 1}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": "lable"}, r"has no label column 'lable' \(did you mean 'label'\?\); its columns are: text, label"),
        ({"text": "texts"}, r"has no text column 'texts' \(did you mean 'text'\?\)"),
        ({"txet": "text"}, r"unknown column role for text data 'txet' \(did you mean 'text'\?\)"),
        ({"text": "label"}, r"column 'label' holds int, not text, in row 1 \(line 1\), .*; 9 of 9 rows affected"),
    ],
)
def test_a_wrong_column_is_refused(jsonl, rows, load, columns, message):
    with pytest.raises(DataError, match=message):
        load(jsonl("a.jsonl", rows(9)), columns=columns)


def test_no_text_column_lists_what_there_is(jsonl, load):
    with pytest.raises(DataError, match="no text column found; its columns are a, b, c"):
        load(jsonl("a.jsonl", [{"a": "x", "b": "y", "c": "z"}] * 3))


@pytest.mark.parametrize("label", [1, 1.0, "1", "1.0", "positive", " POSITIVE ", True])
def test_labels_may_be_numbers_or_names(jsonl, load, label):
    rows = [{"text": f"t{n}", "label": label} for n in range(5)]
    assert set(load(jsonl("a.jsonl", rows)).train.labels) == {1}


@pytest.mark.parametrize("label", [None, -1, "", "-1", float("nan"), "nan", "NaN", "-1.0"])
def test_a_missing_label_is_no_label(jsonl, load, label):
    rows = [{"text": f"t{n}", "label": label} for n in range(5)]
    assert load(jsonl("a.jsonl", rows)).train.labels is None
    rows += [{"text": f"u{n}", "label": 0} for n in range(15)]
    assert (load(jsonl("a.jsonl", rows)).train.labels == -1).sum() == 5


def test_a_csv_column_of_numbers_with_gaps_has_the_classes_it_had(load, tmp_path):
    # What pandas writes of whole numbers beside missing ones.
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"t{n},{('0.0', '1.0', '')[n % 3]}\n" for n in range(30)))
    assert load(tmp_path, id2label=None).label_names == ("0", "1")
    assert set(load(tmp_path).train.labels) == {-1, 0, 1}
    assert set(load(tmp_path, id2label={0: "1.0", 1: "0.0"}).train.labels) == {-1, 0, 1}


def test_a_class_may_be_called_nan(jsonl, load):
    path = jsonl("a.jsonl", [{"text": f"t{n}", "label": ("nan", "roti")[n % 2]} for n in range(10)])
    assert set(load(path, id2label={0: "roti", 1: "Nan"}).train.labels) == {0, 1}


@pytest.mark.parametrize("labels", [(-1, 1), ("-1", "1"), (-1.0, 1.0), ("-1.0", "1.0")])
def test_signs_as_classes_are_refused_since_one_would_be_no_label(jsonl, load, labels):
    path = jsonl("a.jsonl", [{"text": f"t{n}", "label": labels[n % 2]} for n in range(10)])
    for names in (None, {0: "negative", 1: "positive"}):
        with pytest.raises(DataError, match="column 'label' holds -1 and 1 only, and -1 stands for no label"):
            load(path, id2label=names)


def test_splits_that_name_and_number_their_classes_are_told_apart_by_a_teacher_only(jsonl, load, tmp_path):
    jsonl("train.jsonl", [{"text": f"t{n}", "label": ("negative", "positive")[n % 2]} for n in range(10)])
    jsonl("test.jsonl", [{"text": f"u{n}", "label": n % 2} for n in range(4)])
    assert load(tmp_path).test.labels.tolist() == [0, 1, 0, 1]
    with pytest.raises(DataError, match=r"train split names its classes .negative, positive., the test split numbers"):
        load(tmp_path, id2label=None)


def test_names_that_are_numbers_are_names_as_text_and_indices_as_numbers(jsonl, load):
    stars = {0: "1", 1: "2", 2: "3"}
    for labels in (["1", "2", "3"], [0, 1, 2]):
        rows = [{"text": f"t{n}", "label": labels[n % 3]} for n in range(30)]
        train = load(jsonl("a.jsonl", rows), id2label=stars).train
        assert {int(text[1:]) % 3: label for text, label in zip(train.columns["text"], train.labels, strict=True)} == {
            0: 0,
            1: 1,
            2: 2,
        }


def test_class_names_of_the_data_overrule_its_numbers(load, tmp_path):
    metadata = {
        b"huggingface": b'{"info": {"features": {"label": {"names": ["Positive", "Negative"], "_type": "ClassLabel"}}}}'
    }
    table = pa.table({"text": [f"t{n}" for n in range(8)], "label": [0] * 8}).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "train.parquet")
    assert set(load(tmp_path).train.labels) == {1}
    assert load(tmp_path, id2label=None).label_names == ("Positive", "Negative")


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([3, 1, 5], ("1", "3", "5")),
        (["b", "a", "c"], ("a", "b", "c")),
        (["10", "9", "2"], ("2", "9", "10")),
        ([0, 1, 2], ("0", "1", "2")),
        ([True, False, True], ("0", "1")),
        ([1, "x", None], ("1", "x")),
    ],
)
def test_without_a_teacher_the_names_are_those_of_the_data(jsonl, load, labels, names):
    rows = [{"text": f"t{n}", "label": labels[n % 3]} for n in range(30)]
    splits = load(jsonl("a.jsonl", rows), id2label=None)
    assert splits.label_names == names
    assert set(splits.train.labels) - {-1} == set(range(len(names)))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            ["negative", "postive"],
            r"unknown label 'postive' \(did you mean 'positive'\?\) in row 2 \(line 2\), .*; 5 of 10 rows",
        ),
        ([0, 2], r"unknown label '2' in row 2 .*; the model's classes are: 0 'negative', 1 'positive'"),
        (["0", "x"], r"unknown label 'x'"),
        ([[0], [1]], r"label \[0\] is several labels at once \(multi-label\), which is not supported, .* 10 of 10"),
        ([0.5, 1.0], r"label 0.5 is no class \(regression\)"),
    ],
)
def test_an_unknown_label_is_refused(jsonl, load, labels, message):
    rows = [{"text": f"t{n}", "label": labels[n % 2]} for n in range(10)]
    with pytest.raises(DataError, match=message):
        load(jsonl("a.jsonl", rows))


@pytest.mark.parametrize("text", ["", "  ", None])
def test_empty_text_is_refused_with_the_rows(jsonl, rows, load, text):
    data = rows(9)
    data[2]["text"] = data[5]["text"] = text
    with pytest.raises(
        DataError, match=r"a.jsonl: empty text in column 'text', row 3 \(line 3\), row 6 .*; 2 of 9 rows"
    ):
        load(jsonl("a.jsonl", data))


def test_half_characters_are_refused(jsonl, rows, load):
    with pytest.raises(DataError, match=r"broken characters .* row 4 \(line 4\); 1 of 4 rows affected"):
        load(jsonl("a.jsonl", [*rows(3), {"text": "a \ud83d b", "label": 0}]))


def test_lines_are_those_of_the_file(load, tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"two\nlines",0\n\n ,1\nc,1\n')
    with pytest.raises(DataError, match=r"row 2 \(line 5\); 1 of 3 rows affected"):
        load(tmp_path / "a.csv")


def test_pairs_are_distinct_by_both_texts(jsonl, load):
    rows = [{"sentence1": "same", "sentence2": f"b{n}", "label": 0} for n in range(10)]
    splits = load(jsonl("a.jsonl", rows))
    assert len(splits.validation) == 1
    assert len(set(splits.train.digests)) == 9
    extra = jsonl("u.txt", [])
    extra.write_text("one text\n")
    with pytest.raises(DataError, match="one text a row, but the training data has pairs"):
        load(jsonl("a.jsonl", rows), unlabeled=str(extra))


def test_labels_are_int64(jsonl, rows, load):
    assert load(jsonl("a.jsonl", rows(9))).train.labels.dtype == np.int64
