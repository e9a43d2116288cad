"""Data that Hugging Face's datasets reads: the same records as of a file of JSON lines."""

import json
import re
import sys

import pytest

from kdkernels.data.records import hash_of_rows, records
from kdkernels.errors import MissingPackage
from kdkernels.training import InputError, train
from kdkernels.training.cli import main
from kdkernels.training.run.metrics import read_metrics

datasets = pytest.importorskip("datasets")


@pytest.fixture
def rows(recipe, tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]


@pytest.fixture
def saved(rows, tmp_path) -> dict[str, str]:
    """The rows as a directory of save_to_disk, as the split of another, as a file of Parquet and a directory of two."""
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data, "test": data.select(range(3))}).save_to_disk(tmp_path / "both")
    data.to_parquet(tmp_path / "train.parquet")
    for number in (0, 1):
        (tmp_path / "shards").mkdir(exist_ok=True)
        data.select(range(16 * number, 16 * number + 16)).to_parquet(tmp_path / "shards" / f"{number}.parquet")
    return {name: str(tmp_path / name) for name in ("saved", "both/train", "train.parquet", "shards")}


def test_every_form_has_the_records_of_the_file(saved, rows):
    for path in saved.values():
        assert list(records(path)) == list(enumerate(rows, 1))
    assert len({hash_of_rows(path) for path in saved.values()}) == 1


def test_a_run_on_a_dataset_is_that_on_the_file(load, saved, rows, tmp_path):
    def losses(result):
        return [line["loss"] for line in read_metrics(result.output / "metrics.jsonl")]

    expected = losses(train(load(f"run.output={tmp_path / 'lines'}")))
    settings = (f"data.train={saved['saved']}", "checkpoint.every=1")
    result = train(load(*settings))
    assert losses(result) == expected and len(expected) == 3
    assert train(load(f"data.train={saved['shards']}", *settings[1:]), resume=True) == result  # the same rows elsewhere
    datasets.Dataset.from_list([*rows[:-1], rows[0]]).to_parquet(saved["train.parquet"])
    with pytest.raises(InputError, match=r"made from something else: \[data\] train .*its contents changed"):
        train(load(f"data.train={saved['train.parquet']}", *settings[1:]), resume=True)


def test_a_dataset_of_the_hub(rows, monkeypatch, load, tmp_path):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((*arguments, options))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for path in ("hf:owner/name", "hf:owner/name:test", "hf:owner/name:main:test"):
        assert list(records(path)) == list(enumerate(rows, 1))
    train(load("data.train=hf:owner/name:main:train", "train.steps=1"))
    assert asked[:3] == [
        ("owner/name", {"split": "train"}),
        ("owner/name", {"split": "test"}),
        ("owner/name", "main", {"split": "test"}),
    ]
    for path in ("hf:", "hf:a:b:c:d", "hf:a::b"):
        with pytest.raises(InputError, match="expected hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIGURATION:SPLIT"):
            list(records(path))


def test_what_is_no_dataset(saved, tmp_path, recipe, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.parquet").write_text("x")
    for path, said in (
        (
            tmp_path / "both",
            rf"expected one of the splits of this dataset: {tmp_path}/both/test, {tmp_path}/both/train$",
        ),
        (tmp_path / "empty", r"expected a dataset saved by save_to_disk, or files \*\.parquet, got neither"),
        (tmp_path / "broken.parquet", "cannot be read as a dataset: "),
    ):
        with pytest.raises(InputError, match=f"{re.escape(str(path))}.*{said}"):
            list(records(str(path)))
    data = datasets.Dataset.from_dict({"question": [b"x"], "answer": [None]})
    data.to_parquet(tmp_path / "train.parquet")
    arguments = ["train", str(recipe), "--dry-run", f"--set=data.train={tmp_path}/train.parquet"]
    assert main(arguments) == 2
    assert (
        "line 1: field 'question' of [data] prompt: expected a text or a number, got bytes" in capsys.readouterr().err
    )
    assert main([*arguments, "--set=data.train=none"]) == 2
    assert "[data] train: no such file: none" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackage, match=r"need datasets: pip install kdkernels\[datasets\]"):
        list(records(saved["saved"]))
    assert main(arguments) == 2
    assert "need datasets: pip install kdkernels[datasets]" in capsys.readouterr().err
