"""`kdkernels eval`: right answers counted, on the command line's terms; lm-evaluation-harness through a stand-in."""

import json
import shutil
import sys
import types
from types import SimpleNamespace

import pytest
from torch import nn

from kdkernels.data import Example
from kdkernels.rollouts import LocalSampler
from kdkernels.training import harness, train
from kdkernels.training.cli import main
from kdkernels.training.evaluation import evaluate, wilson
from kdkernels.training.models.loading import load_tokenizer
from kdkernels.training.recipe.config import EvaluationConfig
from kdkernels.training.recipe.measuring import ANSWER

from .conftest import GKD
from .test_processes import finish, start

SUMS = (r"--answer=(\d+)\.", "--prompt={question}", "--max-new-tokens=6", "--max-prompt-tokens=8")


@pytest.fixture
def model(teacher_set):
    return teacher_set.partition("=")[2]


@pytest.fixture
def evaluated(recipe, model, tmp_path, capsys):
    """evaluated(*arguments, status=0): (what was printed, the records) of the model on test.jsonl."""

    def evaluated(*arguments, status=0):
        output = tmp_path / "records.jsonl"
        command = ["eval", model, str(tmp_path / "test.jsonl"), *SUMS, f"--output={output}", *arguments]
        assert main(command) == status
        told = capsys.readouterr()
        if status:
            return told.err
        return told.out, [json.loads(line) for line in output.read_text().splitlines()]

    return evaluated


def test_right_answers_are_counted(evaluated, load, teacher_set, monkeypatch):
    tokenizer = load_tokenizer(load(*GKD, teacher_set))
    end = tokenizer.eos_token_id
    texts = ["1.", "2.", "3.", "4", "9.", "8.", "9.", "8."]  # the sums are 1, 2, 3 ... 8

    def generate(self, prompts, limit, greedy):
        assert greedy and limit == 6
        return [[*tokenizer(texts.pop(0))["input_ids"], end] for _ in prompts]

    monkeypatch.setattr(LocalSampler, "generate", generate)
    printed, records = evaluated("--batch-size=3")
    right = [record["correct"] for record in records]
    assert right == [True, True, True, False, False, False, False, True] and not texts
    low, high = wilson(4, 8)
    assert f"exact match: 0.5000 (4 of 8), 95 % interval {low:.4f} to {high:.4f}" in printed
    assert "responses that ended by themselves: 1.0000" in printed and "test.jsonl: 8 examples; left out 0" in printed


def test_the_same_as_the_trainers_own_evaluation(evaluated, load, tmp_path):
    settings = ("train.steps=40", "train.batch_size=16", "train.micro_batch_size=16", r"evaluation.answer='(\d+)\.'")
    held_out = (f"evaluation.data={tmp_path / 'test.jsonl'}", 'evaluation.metrics=["exact_match"]')
    result = train(load(*settings, *held_out, "evaluation.batch_size=8"))
    own = [json.loads(line) for line in (result.output / "evaluation-000040.jsonl").read_text().splitlines()]
    output = tmp_path / "after.jsonl"
    arguments = [str(result.final), str(tmp_path / "test.jsonl"), *SUMS, f"--output={output}", "--batch-size=8"]
    assert main(["eval", *arguments]) == 0
    assert [json.loads(line) for line in output.read_text().splitlines()] == own
    assert len({record["response"] for record in own}) > 1


def test_the_first_problems_alone(evaluated):
    printed, records = evaluated("--limit=3")
    assert len(records) == 3 and "the first 3 of them" in printed and "of 3)" in printed


@pytest.mark.parametrize(
    ("expected", "written", "answer", "right"),
    [
        ("so\n#### 1,450", "#### 1450.", "1450", True),
        ("#### 1450", "#### 1,450", "1,450", True),
        ("#### 1,450", "#### 1,45", "1,45", False),
        ("#### 12,34,567", "#### 1234567", "1234567", False),
        ("#### -3", "#### 1, no:\n####-3", "-3", True),
        ("#### .5", "#### 0.5", "0.5", False),  # texts are compared, not numbers
        ("#### 5", "five", None, False),
    ],
)
def test_the_answers_of_gsm8k(expected, written, answer, right):
    class Tokenizer:
        def get_vocab(self):
            return {"a": 0}

        def decode(self, ids, **_):
            return written

    class Sampler:
        ends = (7,)

        def generate(self, prompts, *_, **__):
            return [[0, 0]]

    settings = EvaluationConfig(data="d", metrics=("exact_match",), answer=ANSWER, max_new_tokens=2)
    example = Example(1, "q", expected, (0,), ())
    (record,) = evaluate(nn.Linear(1, 1), Sampler(), Tokenizer(), [example], SimpleNamespace(evaluation=settings))
    assert (record["answer"], record["correct"], record["finished"]) == (answer, right, False)


def test_what_cannot_be_evaluated(evaluated, tmp_path):
    assert "--max-new-tokens 99999 and --max-prompt-tokens 8: expected a sum" in evaluated(
        "--max-new-tokens=99999", status=2
    )
    assert "DATA.jsonl" not in evaluated("--answer=(no)", status=2)
    told = evaluated("--response={missing}", status=2)
    assert "test.jsonl" in told and "missing" in told
    (tmp_path / "records.jsonl").mkdir()
    assert "records.jsonl: cannot be written" in evaluated(status=3)


@pytest.mark.slow
def test_two_processes_share_the_problems(evaluated, recipe, model, tmp_path):
    _, alone = evaluated()
    run = "-m torch.distributed.run --standalone --nproc-per-node=2 -m kdkernels.training.cli"
    launcher = (sys.executable, *run.split())
    arguments = ("eval", model, str(tmp_path / "test.jsonl"), *SUMS, f"--output={tmp_path / 'two.jsonl'}")
    printed = finish(start((*launcher, *arguments), cwd=tmp_path), tmp_path)
    assert [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()] == alone
    assert printed.count("exact match") == 1


@pytest.fixture
def lm_eval(monkeypatch):
    """A stand-in for lm-evaluation-harness 0.4.13: its names and the shape of its answers, none of its work."""
    stand_in, calls = types.ModuleType("lm_eval"), []

    def simple_evaluate(**given):
        calls.append(given)
        results = {
            task: {"alias": task, "acc,none": 0.25, "acc_stderr,none": 0.125, "sample_len": 8}
            for task in given["tasks"]
        }
        return {"results": results, "groups": {}}

    stand_in.simple_evaluate = simple_evaluate
    stand_in.tasks = types.ModuleType("lm_eval.tasks")
    known = [task for each in harness.LISTS.values() for task in each]
    stand_in.tasks.TaskManager = lambda: SimpleNamespace(all_tasks=[*known, "arc_easy"])
    monkeypatch.setitem(sys.modules, "lm_eval", stand_in)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", stand_in.tasks)
    return calls


def test_the_tasks_of_the_paper(lm_eval, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    arguments = ["--lm-eval", "--run-code", "--limit=2", "--batch-size=4", f"--output={tmp_path / 'out.json'}"]
    assert main(["eval", model, *arguments]) == 0
    shots = {call["num_fewshot"]: call["tasks"] for call in lm_eval}
    assert shots.keys() == {0, 3, 4, 5} and shots[3] == ["bbh"] and shots[4] == ["minerva_math"] and "gsm8k" in shots[5]
    for call in lm_eval:
        assert call["model"] == "hf" and call["model_args"] == {"dtype": "auto", "pretrained": model}
        assert (call["limit"], call["batch_size"], call["confirm_run_unsafe_code"]) == (2, 4, True)
        assert call["apply_chat_template"] is False
    assert "| gsm8k | acc | 0.2500 | 0.1250 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["results"]["ifeval"]["acc,none"] == 0.25


def test_tasks_of_ones_own(lm_eval, model, tmp_path, capsys):
    output = f"--output={tmp_path / 'out.json'}"
    assert main(["eval", model, "--lm-eval=arc_easy, gsm8k", "--chat", "--dtype=bfloat16", output]) == 0
    (call,) = lm_eval
    assert call["tasks"] == ["arc_easy", "gsm8k"] and call["num_fewshot"] is None and call["apply_chat_template"]
    assert call["model_args"]["dtype"] == "bfloat16" and not call["confirm_run_unsafe_code"]
    assert main(["eval", model, "--lm-eval=arc_eazy", output]) == 2
    assert "--lm-eval: unknown task 'arc_eazy'; did you mean 'arc_easy'?" in capsys.readouterr().err
    assert main(["eval", model, "--lm-eval=gsm8k,,", output]) == 2
    assert "expected tsd-kd, vcrd-math, vcrd-code, or tasks with commas" in capsys.readouterr().err


def test_what_the_harness_lacks_of_a_papers_tasks_is_told(lm_eval, model, tmp_path, capsys):
    output = f"--output={tmp_path / 'out.json'}"
    lacking = "of the paper's tasks, not in lm-evaluation-harness: SVAMP, Minerva, Gaokao2023-EN, "
    assert main(["eval", model, "--lm-eval=vcrd-math", output]) == 0
    assert lacking in capsys.readouterr().out
    assert lm_eval[0]["tasks"] == ["gsm8k", "minerva_math", "agieval_sat_math", "aime24"]
    assert main(["eval", model, "--lm-eval=gsm8k", output]) == 0
    assert "not in lm-eval" not in capsys.readouterr().out


def test_conversations_through_the_chat_template(recipe, model, tmp_path, capsys):
    for path in (tmp_path / "chat", tmp_path / "plain"):
        shutil.copytree(model, path)
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}={% else %}<pad>{% endif %}{% endfor %}"
    (tmp_path / "chat" / "chat_template.jinja").write_text(template)
    sums = [(a, b) for a in range(2) for b in range(4)]
    data = tmp_path / "chat.jsonl"
    turns = [[{"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": f"{a + b}."}] for a, b in sums]
    data.write_text("".join(json.dumps({"talk": talk}) + "\n" for talk in turns))
    output = tmp_path / "out.jsonl"
    few = [str(data), r"--answer=(\d+)\.", "--max-new-tokens=6", "--max-prompt-tokens=8", f"--output={output}"]
    assert main(["eval", str(tmp_path / "chat"), *few, "--messages=talk"]) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["prompt"] for record in records] == [f"{a}+{b}=" for a, b in sums]
    assert [record["expected"] for record in records] == [str(a + b) for a, b in sums]
    assert main(["eval", str(tmp_path / "plain"), *few, "--messages=talk"]) == 2
    assert "chat template" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "chat"), *few, "--messages=talk", "--prompt=x"]) == 2
    assert "--prompt and --messages: expected at most one of them" in capsys.readouterr().err
