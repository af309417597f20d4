"""Rows, their ``file:row``, and what is said when a dataset cannot be opened."""

import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aa_jax.data import sources
from aa_jax.data.sources import open_source, rows_source
from aa_jax.errors import DataError

ROWS = [{"question": f"q{i}", "response_1": "ä\n", "overall_response": i} for i in range(5)]


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    return path


def test_every_file_format(tmp_path):
    files = [
        write_parquet(tmp_path / "a.parquet", ROWS),
        write_jsonl(tmp_path / "b.jsonl", ROWS),
        write_jsonl(tmp_path / "c.json", ROWS),
        tmp_path / "d.json",
        tmp_path / "e.json",
    ]
    files[3].write_text(json.dumps(ROWS))
    files[4].write_text(json.dumps({"data": ROWS}))
    for file in files:
        source = open_source(file)
        assert len(source) == 5 and list(source) == ROWS
        assert source[3].where == f"{file}:3" and source[-1]["question"] == "q4"
        assert source[0].root == str(tmp_path) and source.columns == tuple(ROWS[0])
        with pytest.raises(IndexError):
            source[5]
    csv = tmp_path / "f.csv"
    csv.write_text('question,response_1\nq0,"a\nb"\nq1,c\n')
    assert list(open_source(csv)) == [
        {"question": "q0", "response_1": "a\nb"},
        {"question": "q1", "response_1": "c"},
    ]


def test_folder_with_splits_and_subsets(tmp_path):
    first = write_parquet(tmp_path / "text-to-text" / "train-00000-of-00002.parquet", ROWS[:2])
    second = write_parquet(tmp_path / "text-to-text" / "train-00001-of-00002.parquet", ROWS[2:])
    write_parquet(tmp_path / "text-to-text" / "validation-00000-of-00001.parquet", ROWS[:1])
    source = open_source(tmp_path, subset="text-to-text")
    assert list(source) == ROWS
    assert [row.where for row in source][1:3] == [f"{first}:1", f"{second}:0"]
    assert len(open_source(tmp_path / "text-to-text", split="val")) == 1
    assert len(open_source(f"{tmp_path}/text-to-text/train*.parquet")) == 5
    assert len(open_source(f"{tmp_path}/*/*.parquet", split="dev")) == 1
    with pytest.raises(DataError, match="no split 'test'; it has train, val"):
        open_source(tmp_path, subset="text-to-text", split="test")
    with pytest.raises(DataError, match="no subset 'text-to-image'; it has text-to-text"):
        open_source(tmp_path, subset="text-to-image")
    with pytest.raises(DataError, match="subset= one of text-to-text"):
        open_source(tmp_path)


def test_data_folder_and_media_root(tmp_path):
    write_parquet(tmp_path / "data" / "part.parquet", ROWS)
    assert open_source(tmp_path)[0].root == str(tmp_path / "data")
    assert open_source(tmp_path, media_root=tmp_path / "images")[4].root == str(tmp_path / "images")


def test_large_parquet_goes_through_datasets(tmp_path, monkeypatch, kit):
    rows = [
        {"image": {"bytes": kit.image_bytes(kit.random_image(i)), "path": None}, "n": i}
        for i in range(3)
    ]
    path = write_parquet(tmp_path / "train.parquet", rows)
    small = list(open_source(path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0)
    large = open_source(path)
    assert list(large) == small == rows and large[2].where == f"{path}:2"


def test_saved_datasets_keep_their_media_encoded(tmp_path, kit):
    import datasets

    features = datasets.Features(
        image=datasets.Image(), images=datasets.List(datasets.Image()), n=datasets.Value("int64")
    )
    pictures = [kit.random_image(i) for i in range(2)]
    rows = {"image": pictures, "images": [pictures, pictures[:1]], "n": [0, 1]}
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, validation=data).save_to_disk(tmp_path / "two")
    row = open_source(tmp_path / "one")[1]
    assert isinstance(row["image"]["bytes"], bytes) and row.where == f"{tmp_path / 'one'}:1"
    assert isinstance(row["images"][0]["bytes"], bytes)
    assert len(open_source(tmp_path / "two", split="val")) == 2
    with pytest.raises(DataError, match="no split 'test'; it has train, validation"):
        open_source(tmp_path / "two", split="test")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="damaged saved dataset"):
        open_source(tmp_path / "one")


def test_nothing_there(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"trian\.jsonl.*there is: train\.jsonl"):
        open_source(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="does not exist either"):
        open_source(tmp_path / "no" / "train.jsonl")
    with pytest.raises(DataError, match="No file matches"):
        open_source(f"{tmp_path}/*.parquet")
    with pytest.raises(DataError, match="unknown format '.txt'"):
        (tmp_path / "x.txt").write_text("")
        open_source(tmp_path / "x.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no dataset file"):
        open_source(tmp_path / "empty")


def test_empty_and_damaged_files(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no rows"):
        open_source(tmp_path / "a.jsonl")
    (tmp_path / "b.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match=r"b\.parquet cannot be read as parquet.*git lfs pull"):
        open_source(tmp_path / "b.parquet")
    (tmp_path / "c.json").write_text("[{,}]")
    with pytest.raises(DataError, match=r"c\.json is not valid JSON"):
        open_source(tmp_path / "c.json")
    (tmp_path / "d.json").write_text("[1, 2]")
    with pytest.raises(DataError, match="list of objects"):
        open_source(tmp_path / "d.json")
    (tmp_path / "e.jsonl").write_text('{"a": 1}\n{"a": \n[1]\n')
    source = open_source(tmp_path / "e.jsonl")
    with pytest.raises(DataError, match=r"e\.jsonl:1 is not valid JSON"):
        source[1]
    with pytest.raises(DataError, match=r"e\.jsonl:2 holds a list"):
        source[2]


def test_mixed_formats_are_refused(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_parquet(tmp_path / "train.parquet", ROWS)
    with pytest.raises(DataError, match="mixes formats"):
        open_source(tmp_path)


def test_hub_without_network_explains_itself(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as error:
        open_source("PKU-Alignment/align-anything", subset="text-to-text")
    message = str(error.value)
    assert "PKU-Alignment/align-anything" in message and "text-to-text" in message
    assert "hf download --repo-type dataset" in message and "HF_HUB_OFFLINE" in message


def test_hub_splits(monkeypatch):
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    found = datasets.DatasetDict(train=data, validation=data.select([0]))
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name=None: found)
    source = open_source("someone/something", split="val")
    assert len(source) == 1 and source[0].where == "someone/something[val]:0"
    with pytest.raises(DataError, match="no split 'test'; it has train, validation"):
        open_source("someone/something", split="test")


def test_rows_in_memory_and_the_log(caplog, tmp_path):
    source = rows_source(ROWS, "world")
    assert source[2].where == "world:2" and source[2].root is None
    with caplog.at_level(logging.INFO):
        open_source(write_jsonl(tmp_path / "a.jsonl", ROWS))
    assert "5 rows" in caplog.text
