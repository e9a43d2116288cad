"""The GSM8K recipes, shortened: tokenizer, teacher, student, distillation, held-out numbers before and after."""

from pathlib import Path

import pytest

from kdkernels.training import load_config, train

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"


@pytest.fixture
def run(tmp_path):
    """run(recipe, *overrides): the Result of the recipe on the first lines of GSM8K."""
    for name in ("gsm8k_train.jsonl", "gsm8k_test.jsonl"):
        if not (DATA / name).is_file():
            pytest.skip(f"needs GSM8K: {DATA / name} is not there")
        lines = (DATA / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / name).write_text("".join(lines[:64]), encoding="utf-8")

    def run(recipe, *overrides):
        short = {
            "run.output": tmp_path / recipe,
            "data.train": tmp_path / "gsm8k_train.jsonl",
            "evaluation.data": tmp_path / "gsm8k_test.jsonl",
            "evaluation.limit": 16,
            "train.batch_size": 8,
            "train.steps": 12,
        }
        overrides = [*(f"{key}={value}" for key, value in short.items()), *overrides]
        return train(load_config(ROOT / "recipes" / f"{recipe}.toml", overrides))

    return run


def test_the_chain_from_text_to_a_distilled_student(run, capsys):
    teacher = run("gsm8k-small-teacher", "tokenizer.vocab_size=512")
    student = run("gsm8k-small-student", f"tokenizer.path={teacher.final}", "train.steps=4")
    for start in (teacher, student):
        assert start.evaluations[max(start.evaluations)]["cross_entropy"] < start.evaluations[0]["cross_entropy"] - 0.2
    capsys.readouterr()
    distilled = run(
        "gsm8k-small",
        f"teacher.path={teacher.final}",
        f"student.path={student.final}",
        "rollout.max_new_tokens=12",
    )
    before, after = distilled.evaluations[0], distilled.evaluations[12]
    assert before["cross_entropy"] == pytest.approx(student.evaluations[4]["cross_entropy"], rel=1e-5)
    assert 0 < after["kl"] < 0.8 * before["kl"]
    report = (distilled.output / "report.md").read_text()
    assert f"| kl | {before['kl']:.4f} | {after['kl']:.4f} |" in report
    assert "with too long a response" in report
