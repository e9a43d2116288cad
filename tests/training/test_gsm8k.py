"""The GSM8K recipes, shortened: tokenizer, teacher, student, distillation, held-out numbers before and after."""

from pathlib import Path

import pytest

from kdkernels.data import ExampleStream
from kdkernels.training import load_config, train
from kdkernels.training.inputs import read_examples
from kdkernels.training.models.loading import load_tokenizer

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


@pytest.mark.slow
def test_padding_of_steps_on_eight_processes():
    """docs/TRAINING.md: batches of 64, micro-batches of 8."""
    if not (DATA / "gsm8k_train.jsonl").is_file():
        pytest.skip(f"needs GSM8K: {DATA / 'gsm8k_train.jsonl'} is not there")
    recipe = ROOT / "recipes" / "gsm8k-small-teacher.toml"
    overrides = [f"data.train={DATA / 'gsm8k_train.jsonl'}", "tokenizer.kind=bpe", "tokenizer.vocab_size=4096"]
    limits = ["data.max_prompt_tokens=512", "data.max_response_tokens=512"]  # nothing is left out
    config = load_config(recipe, [*overrides, *limits])
    tokens = [one.tokens for one in read_examples(config.data, config.data.train, load_tokenizer(config)).usable]
    assert len(tokens) > 7000

    def padding(lengths) -> tuple[float, float]:
        """Padding as a share of all positions; positions of the process with the most over the mean of a step."""
        stream, places, slowest = ExampleStream(len(tokens), 0, 0, lengths, 64), 0, []
        steps = [[tokens[i] for i in stream.next(64)] for _ in range(len(tokens) // 64)]
        for step in steps:
            shares = [step[rank::8] for rank in range(8)]
            places += sum(8 * max(share) for share in shares)
            slowest.append(max(8 * max(share) for share in shares) / (sum(8 * max(share) for share in shares) / 8))
        return 1 - sum(map(sum, steps)) / places, sum(slowest) / len(slowest)

    by_length, in_any_order = padding(tokens), padding(None)
    print(f"padding, slowest process over the mean: by length {by_length}, in any order {in_any_order}")
    assert by_length[0] < 0.1 and by_length[1] < 1.05
    assert in_any_order[0] > 0.3 and in_any_order[1] > 1.2
