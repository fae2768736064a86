"""From a folder to splits: what is found, what is held out, what is refused."""

from __future__ import annotations

import json
import random
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from edgekd.data import DataSpec, load_evaluation, require_labels
from edgekd.errors import DataError


def texts(examples):
    return list(examples.columns["text"])


def test_splits_are_found_by_their_usual_names(jsonl, rows, load, tmp_path):
    jsonl("d/train.jsonl", rows(8))
    (tmp_path / "d/dev.csv").write_text("text,label\nfine,positive\n")
    pq.write_table(pa.Table.from_pylist(rows(2, 50)), tmp_path / "d/test.parquet")
    (tmp_path / "d/README.md").write_text("about")
    splits = load(tmp_path / "d")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (8, 1, 2)
    assert splits.validation.labels.tolist() == [1]
    assert splits.label_names == ("negative", "positive")
    assert splits.notes == ()


def test_shards_subfolders_and_a_data_folder_are_found(rows, load, tmp_path):
    (tmp_path / "data").mkdir()
    for shard in range(2):
        pq.write_table(pa.Table.from_pylist(rows(3, 3 * shard)), tmp_path / f"data/train-0000{shard}-of-00002.parquet")
    assert texts(load(tmp_path).train) + texts(load(tmp_path).validation)
    assert len(load(tmp_path).train) + len(load(tmp_path).validation) == 6
    saved = tmp_path / "saved"
    for split, count in (("train", 4), ("test", 2)):
        (saved / split).mkdir(parents=True)
        table = pa.Table.from_pylist(rows(count))
        path = saved / split / "data-00000-of-00001.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        (saved / split / "state.json").write_text("{}")
    (saved / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert len(load(saved).test) == 2


def test_splits_can_be_named(jsonl, rows, load, tmp_path):
    jsonl("d/first.jsonl", rows(5))
    jsonl("d/second.jsonl", rows(3, 5))
    splits = load(tmp_path / "d", splits={"train": "first.jsonl", "validation": "second.jsonl"})
    assert (len(splits.train), len(splits.validation), splits.test) == (5, 3, None)
    jsonl("d/parts/a.jsonl", rows(2, 9))
    assert len(load(tmp_path / "d", splits={"train": "first.jsonl", "test": "parts"}).test) == 2
    with pytest.raises(DataError, match=r"unknown split 'third.jsonl'"):
        load(tmp_path / "d", splits={"train": "third.jsonl"})
    with pytest.raises(DataError, match=r"several files and none is called train: first.jsonl, second.jsonl"):
        load(tmp_path / "d")
    with pytest.raises(DataError, match=r"unknown split 'trian' \(did you mean 'train'\?\)"):
        load(tmp_path / "d", splits={"trian": "first.jsonl"})


def test_held_out_rows_do_not_depend_on_the_order(jsonl, rows, load):
    many = rows(200)
    first = load(jsonl("a.jsonl", many))
    random.Random(1).shuffle(many)
    second = load(jsonl("b.jsonl", many))
    assert set(texts(first.validation)) == set(texts(second.validation))
    assert len(first.validation) == 20
    assert not set(texts(first.train)) & set(texts(first.validation))
    assert len(load(jsonl("a.jsonl", many), validation_fraction=0.25).validation) == 50


def test_equal_rows_stay_on_one_side(jsonl, rows, load):
    splits = load(jsonl("a.jsonl", rows(40) * 3))
    assert not set(texts(splits.train)) & set(texts(splits.validation))
    assert len(splits.train) + len(splits.validation) == 120
    assert len(splits.validation) == 12


@pytest.mark.parametrize("count", [2, 3, 5])
def test_even_few_rows_leave_one_on_each_side(jsonl, rows, load, count):
    splits = load(jsonl("a.jsonl", rows(count)))
    assert len(splits.validation) == 1
    assert len(splits.train) == count - 1


def test_too_few_rows_to_hold_out_are_refused(jsonl, rows, load):
    with pytest.raises(DataError, match="3 training rows hold 1 distinct input, too few"):
        load(jsonl("a.jsonl", rows(1) * 3))
    with pytest.raises(DataError, match=r"validation_fraction is 1.5; expected a number between 0 and 1"):
        load(jsonl("a.jsonl", rows(9)), validation_fraction=1.5)


def test_only_labelled_rows_are_held_out(jsonl, load):
    data = [{"text": f"t{n}", "label": 0 if n < 20 else None} for n in range(100)]
    splits = load(jsonl("a.jsonl", data))
    assert len(splits.validation) == 2
    assert (splits.validation.labels == 0).all()
    assert (splits.train.labels == -1).sum() == 80


def test_shared_rows_are_remarked(jsonl, rows, load, tmp_path):
    jsonl("d/train.jsonl", rows(10))
    jsonl("d/validation.jsonl", rows(4, 8))
    assert load(tmp_path / "d").notes == ("2 of 4 validation rows are in the train split too",)


def test_unlabelled_rows_join_the_training_split_once(jsonl, rows, load, tmp_path):
    jsonl("d/train.jsonl", rows(10))
    jsonl("d/validation.jsonl", rows(4, 10))
    (tmp_path / "extra.txt").write_text("new one\n\nnew two\nnew one\ntext 3\ntext 11\n")
    splits = load(tmp_path / "d", unlabeled=str(tmp_path / "extra.txt"))
    assert texts(splits.train)[10:] == ["new one", "new two"]
    assert splits.train.labels[10:].tolist() == [-1, -1]
    assert len(splits.train.digests) == 12
    assert splits.notes == ("2 unlabelled rows added (3 repeated ones left out)",)
    extra = jsonl("extra.jsonl", [{"sentence": "other", "label": "ignored"}])
    assert texts(load(tmp_path / "d", unlabeled=str(extra)).train)[-1] == "other"
    with pytest.raises(DataError, match=r"extra.tx does not exist \(did you mean '.*extra.txt'\?\)"):
        load(tmp_path / "d", unlabeled=str(tmp_path / "extra.tx"))


def test_limit_draws_from_the_training_split_alone(jsonl, rows, load):
    path = jsonl("a.jsonl", rows(100))
    full, some = load(path), load(path, limit=10, seed=3)
    assert texts(some.validation) == texts(full.validation)
    assert len(some.train) == 10
    assert set(texts(some.train)) < set(texts(full.train))
    assert texts(some.train) == texts(load(path, limit=10, seed=3).train) != texts(load(path, limit=10, seed=4).train)
    assert texts(load(path, limit=1000).train) == texts(full.train)
    with pytest.raises(DataError, match="limit is 0; expected at least 1"):
        load(path, limit=0)


def test_the_fingerprint_is_that_of_contents_and_mapping(jsonl, rows, load):
    path = jsonl("a.jsonl", rows(20))
    first = load(path).fingerprint
    assert first == load(jsonl("b.jsonl", rows(20))).fingerprint
    changed = rows(20)
    changed[3]["label"] ^= 1
    assert first != load(jsonl("c.jsonl", changed)).fingerprint
    assert first != load(path, id2label={0: "bad", 1: "good"}).fingerprint
    assert first != load(path, limit=5).fingerprint


def test_taking_rows_takes_everything_of_them(jsonl, rows, load):
    train = load(jsonl("a.jsonl", rows(20))).train
    some = train.take([3, 1])
    assert texts(some) == [texts(train)[3], texts(train)[1]]
    assert some.labels.tolist() == [train.labels[3], train.labels[1]]
    assert some.digests == [train.digests[3], train.digests[1]]


def test_two_files_for_one_split_are_refused(jsonl, rows, load, tmp_path):
    jsonl("d/train.jsonl", rows(3))
    (tmp_path / "d/train.csv").write_text("text,label\na,0\n")
    with pytest.raises(DataError, match=r"has train.csv and train.jsonl, all of them for train"):
        load(tmp_path / "d")
    (tmp_path / "d/train.csv").unlink()
    jsonl("d/valid.jsonl", rows(3))
    jsonl("d/dev.jsonl", rows(3))
    with pytest.raises(DataError, match=r"dev.jsonl and valid.jsonl, all of them for validation"):
        load(tmp_path / "d")


def test_what_is_not_there_is_said_with_the_nearest(jsonl, rows, load, tmp_path):
    jsonl("movies/test.jsonl", rows(3))
    with pytest.raises(DataError, match=r"movis does not exist \(did you mean '.*movies'\?\)"):
        load(tmp_path / "movis")
    with pytest.raises(DataError, match=r"deep/er/x.csv does not exist"):
        load(tmp_path / "deep/er/x.csv")
    with pytest.raises(DataError, match="has no train split, only test"):
        load(tmp_path / "movies")
    with pytest.raises(DataError, match="no data given; name a folder"):
        load(" ")
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="void has no data files"):
        load(tmp_path / "void")
    (tmp_path / "rows.xls").write_text("?")
    with pytest.raises(DataError, match=r"rows.xls is not of a known type; write one of: .jsonl"):
        load(tmp_path / "rows.xls")
    with pytest.raises(DataError, match=r"unknown built-in data set 'sklearn:digit' \(did you mean 'sklearn:digits'"):
        load("sklearn:digit")


def test_a_hub_data_set_that_cannot_be_had_is_a_clear_error(load, monkeypatch):
    def refuse(name, configuration):
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=refuse))
    with pytest.raises(DataError, match=r"someone/movies is no local path, and the hub data set .*Offline.*or give a"):
        load("someone/movies")


def test_a_hub_data_set_reads_as_its_files_would(load, monkeypatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])})
    part = datasets.Dataset.from_dict({"text": [f"t{n}" for n in range(9)], "label": [0, 1, 1] * 3}, features=features)
    seen = []

    def fake(name, configuration):
        seen.append((name, configuration))
        return datasets.DatasetDict({"train": part, "test": part})

    monkeypatch.setattr(datasets, "load_dataset", fake)
    splits = load("someone/movies:small", id2label={0: "NEG", 1: "POS"})
    assert seen == [("someone/movies", "small")]
    assert splits.test.labels.tolist() == [1, 0, 0] * 3
    assert load("someone/movies", id2label=None).label_names == ("pos", "neg")
    mapped = load("someone/movies", splits={"validation": "test"})
    assert len(mapped.validation) == 9
    assert mapped.test is None
    assert "the data names its classes pos, neg, the model negative, positive: numbers used" in mapped.notes


def test_evaluation_takes_the_test_split_or_what_there_is(jsonl, rows, tmp_path):
    def evaluate(path):
        return load_evaluation(DataSpec(path=str(path)), kind="text", id2label=None)

    path = jsonl("d/train.jsonl", rows(5))
    assert [evaluate(path)[0], len(evaluate(path)[1])] == ["train", 5]
    jsonl("d/val.jsonl", rows(4))
    assert evaluate(tmp_path / "d")[0] == "validation"
    jsonl("d/test.jsonl", [*rows(2), {"text": "no label"}])
    name, examples, unlabelled = evaluate(tmp_path / "d")
    assert (name, len(examples), unlabelled) == ("test", 2, 1)
    jsonl("d/test.jsonl", [{"text": "a", "sort": 1}])
    with pytest.raises(DataError, match=r"the test split has no labels: .*its columns are: text, sort"):
        evaluate(tmp_path / "d")
    jsonl("d/test.jsonl", [{"text": "a", "label": -1}])
    assert evaluate(tmp_path / "d")[0] == "validation", "labels that are withheld"
    jsonl("e/test.jsonl", [{"text": "a", "label": -1}])
    with pytest.raises(DataError, match="the test split has no labels: column 'label' is empty there"):
        evaluate(tmp_path / "e")


def test_a_test_split_without_labels_does_not_take_the_place_of_a_labelled_one(jsonl, rows, load, tmp_path):
    jsonl("d/train.jsonl", rows(5))
    jsonl("d/validation.jsonl", rows(4, 10))
    jsonl("d/test.jsonl", [{"text": "a", "label": -1}, {"text": "b", "label": -1}])
    splits = load(tmp_path / "d")
    assert splits.test is None
    assert any("the test split has no labels and is left out" in note for note in splits.notes)
    jsonl("d/validation.jsonl", [{"text": "c", "label": -1}])
    jsonl("d/train.jsonl", [{"text": "d", "label": -1}])
    assert len(load(tmp_path / "d").test) == 2, "all are labelled by the teacher then"


def test_labels_may_be_missing_from_training_but_not_where_they_are_required(jsonl, rows, load, tmp_path):
    jsonl("d/train.jsonl", [{"text": f"t{n}"} for n in range(5)])
    jsonl("d/validation.jsonl", rows(4))
    splits = load(tmp_path / "d")
    assert splits.train.labels is None
    assert len(require_labels(splits, "validation")) == 4
    with pytest.raises(DataError, match="the train split has no labels: column 'label' is empty there"):
        require_labels(splits, "train")
    with pytest.raises(DataError, match="there is no test split"):
        require_labels(splits, "test")


def test_paths_are_expanded(jsonl, rows, load, tmp_path, monkeypatch):
    jsonl("home/d/train.jsonl", rows(5))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert len(load("~/d").train) == 4


def test_digits_come_with_fixed_splits(load):
    splits = load("sklearn:digits", id2label=None, kind="image")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (1297, 200, 300)
    assert splits.label_names == tuple("0123456789")
    assert splits.notes == ()
    image = splits.train.columns["image"][0]
    assert image.shape == (8, 8)
    assert image.dtype == np.uint8
    assert max(image.max() for image in splits.train.columns["image"]) == 255
    assert splits.fingerprint == load("sklearn:digits", id2label=None, kind="image").fingerprint
    assert json.dumps(splits.columns) == '{"image": "image", "label": "label"}'
