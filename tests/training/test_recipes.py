"""The published recipes: the papers' numbers, and a dry run of each without weights, data and network."""

import re
from itertools import chain
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdkernels.training.cli import main
from kdkernels.training.recipe.config import Config
from kdkernels.training.recipe.extends import read_tables
from kdkernels.training.recipe.read import complete, read_recipe
from kdkernels.training.recipe.schema import read_toml, to_toml
from kdkernels.training.recipe.stages import parse_stages

RECIPES = Path(__file__).parents[2] / "recipes"
TSD_KD = ("qwen2.5-14b-to-1.5b", "qwen3-8b-to-1.7b", "gemma2-9b-to-2b")
TSD_KD_KINDS = ("tsd-kd", "gkd", "distillm-2")
VCRD = {  # lambda_teacher, lambda_student: appendix 10.2 of the paper
    "qwen2.5-math-7b-to-1.5b": (1, 1),
    "qwen2-math-7b-to-1.5b": (2, 1.5),
    "qwen2.5-coder-7b-to-1.5b": (2, 1),
    "qwen2.5-coder-14b-to-7b": (2, 1),
    "qwen2.5-7b-to-1.5b": (2, 2),
    "qwen2-7b-to-1.5b": (2, 1),
}
EPOCHS = {  # and steps
    "qwen2.5-math-7b-to-1.5b": (2, None),
    "qwen2-math-7b-to-1.5b": (2, None),
    "qwen2.5-coder-7b-to-1.5b": (None, 600),
    "qwen2.5-coder-14b-to-7b": (None, 400),
    "qwen2.5-7b-to-1.5b": (3, None),
    "qwen2-7b-to-1.5b": (3, None),
}
TUNED_FIRST = [pair for pair in VCRD if pair != "qwen2.5-coder-14b-to-7b"]
NAMES = sorted(
    chain(
        (f"{pair}-{kind}" for pair in TSD_KD for kind in (*TSD_KD_KINDS, *(f"{kind}-lora" for kind in TSD_KD_KINDS))),
        (f"{pair}-{kind}" for pair in VCRD for kind in ("vcrd", "vcrd-prm-free", "gkd", "distillm-2")),
        (f"{pair}-sft" for pair in TUNED_FIRST),
    )
)
QUICK = ("gemma2-9b-to-2b-tsd-kd", "qwen2-math-7b-to-1.5b-vcrd", "qwen2-7b-to-1.5b-sft")
PARAMETERS = {  # of the published checkpoints, in which a tied weight counts once
    "Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-Math-7B-Instruct": 7_615_616_512,
    "Qwen2.5-Math-1.5B": 1_543_714_304,
    "Qwen2.5-Coder-14B-Instruct": 14_770_033_664,
    "Qwen2.5-Coder-7B-Instruct": 7_615_616_512,
    "Qwen2.5-Coder-1.5B": 1_543_714_304,
    "Qwen2-7B-Instruct": 7_615_616_512,
    "Qwen2-1.5B": 1_543_714_304,
    "Qwen2-Math-7B-Instruct": 7_615_616_512,
    "Qwen2-Math-1.5B": 1_543_714_304,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-1.7B": 1_720_574_976,
    "gemma-2-9b-it": 9_241_705_984,
    "gemma-2-2b-it": 2_614_341_888,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Phi-3.5-mini-instruct": 3_821_079_552,
    "Skywork-o1-Open-PRM-Qwen-2.5-1.5B": 1_543_714_304,  # beside its value head
}


@pytest.fixture(autouse=True)
def from_the_project(monkeypatch):
    """Recipes are read where the commands of their documentation are; nobody asks the network."""
    monkeypatch.chdir(RECIPES.parent)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a dry run asked the network"))


def read(name: str) -> Config:
    return complete(read_recipe(f"recipes/{name}.toml", dry_run=True), name)


def test_the_published_recipes_are_these():
    assert sorted(path.stem for path in RECIPES.glob("*-to-*.toml")) == NAMES and len(NAMES) == 47
    assert {path.stem for path in (RECIPES / "models").iterdir()} == PARAMETERS.keys()
    table = (RECIPES / "README.md").read_text()
    for name in NAMES:
        pair, _, kind = name.partition("-to-")
        kind = kind.partition("-")[2].removeprefix("b-")
        assert f"`{name}`" in table or f"`*-{kind}`" in table or f"`{pair}" in table, name


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_described_model_has_the_published_parameters(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(RECIPES / "models" / f"{name}.json"))
    assert model.num_parameters() == PARAMETERS[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_settings_are_the_papers(name):
    config = read(name)
    pair = re.match(r".*?-to-[\d.]+b", name).group()
    options, adapter = config.objective.options, config.student.adapter
    assert config.run.output == f"runs/{name}" or name.endswith("-sft")
    pairs = config.reads_responses  # both responses of 128 prompts
    assert (config.run.dtype, config.train.batch_size) == ("bfloat16", 256 if pairs else 128)
    assert pairs == (pair in VCRD and not name.endswith(("-sft", "-gkd")))
    assert (config.optimizer.schedule, config.optimizer.warmup_ratio) == ("cosine", 0.1)
    longest = config.data.max_prompt_tokens + config.data.max_response_tokens
    assert longest == (2048 if name.endswith("-sft") else 1024)
    if pair in TSD_KD:
        assert config.optimizer.lr == (1e-7 if "gemma" in name else 5e-6)
        assert (adapter is not None) == name.endswith("-lora")
        assert config.rollout.student_fraction == (0.5 if "-distillm-2" in name else 1)
    elif name.endswith("-sft"):
        assert config.optimizer.lr == (5e-6 if "math" in name or "coder" in name else 5e-5)
        assert adapter is None and config.teacher is None
    else:
        assert config.optimizer.lr == 5e-5
        assert (adapter.kind, adapter.r, adapter.alpha, adapter.dropout) == ("lora", 16, 128, 0.05)
        assert config.rollout.student_fraction == (1 if "-gkd" in name else 0)
        assert (config.responses.temperature, config.responses.top_p) == (0.8, 0.95)
        assert config.responses.output == f"responses/{pair}"
        assert "50k" in config.data.train or "coder" in name
        assert config.judge.path == "Skywork/Skywork-o1-Open-PRM-Qwen-2.5-1.5B" and config.judge.rule == "ratio"
        assert config.asks_judge == name.endswith("-vcrd")
    assert (config.train.epochs, config.train.steps) == EPOCHS.get(pair, (3, None)) or name.endswith("-sft")
    if name.endswith("-sft"):
        assert config.train.epochs == (5 if "coder" in name else 1)
    if "-tsd-kd" in name:
        weights = {"indirect_weight": 0.1, "direct_weight": 1, "entropy_weight": 1}
        paper = {"beta": 0.9, "tau": 1, "k": 10, "opener": 0.1, "entropy_ratio": 0.1, "temperature": 1} | weights
        assert config.objective.name == "TSDKD" and options == paper | {"reduction": "responses"}
    if "-vcrd" in name:
        assert (options["lambda_teacher"], options["lambda_student"]) == VCRD[pair]
        assert options["weighting"] == ("likelihood_ratio" if name.endswith("-prm-free") else "given")
        assert (options["alpha"], options["reduction"]) == (0.1, "prompts")
    if "-gkd" in name:
        assert config.objective.name == "GKD" and options["beta"] == 0.9
    if "-distillm-2" in name:
        assert config.objective.name == "DistiLLM2"
        assert (options["alpha_teacher"], options["alpha_student"]) == (0.1, 0.1)


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_is_its_differing_lines(name):
    """It sets nothing to what the extended recipe has anyway, and every number that it sets has a comment."""
    path = RECIPES / f"{name}.toml"
    tables = read_toml(path)
    base = tables.pop("extends", None)
    if base is None:
        assert name in ("qwen2.5-14b-to-1.5b-tsd-kd", "qwen2.5-math-7b-to-1.5b-sft", "qwen2.5-math-7b-to-1.5b-vcrd")
    else:
        extended = read(base.removesuffix(".toml"))
        for section, table in tables.items():
            if section != "objective":  # where a pair's weights of the terms are stated, equal or not
                values = vars(getattr(extended, section))
                assert all(values[key] != value for key, value in table.items()), section
    own = {"micro_batch_size", "zero_stage", "max_response_tokens", "student_fraction", "beta", "alpha_student"}
    for line in path.read_text().splitlines():
        stated = re.match(r"(\w+) = [\d.]", line)
        assert not stated or stated[1] in own or "#" in line, line


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in NAMES]
)
def test_a_dry_run_of_eight_processes(name, tmp_path, capsys):
    """Resolved recipe printed and saved, models from their configurations, shapes of a process's step, its memory."""
    saved = tmp_path / "plan.toml"
    eight = ["--gpu", "a100-80g", "--gpus", "8", "--save", str(saved)]
    assert main(["train", f"recipes/{name}.toml", "--dry-run", *eight]) == 0
    printed = capsys.readouterr().out
    assert saved.read_text() == printed
    config = read(name)
    assert to_toml(config) in printed
    response = config.data.max_response_tokens
    texts = 512 + response
    assert f"on each of 8 processes {config.train.batch_size // 32} micro-batches of 4)" in printed
    assert (
        f"# micro-batch: tokens 4 x {texts} (prompt 512, response {response}), hidden states of the student 4"
        in printed
    )
    assert printed.count(f", hidden states of the teacher 4 x {texts} x ") == (config.teacher is not None)
    assert printed.count("# rollout: tokens 16 x 1024 at most\n") == (config.rollout.student_fraction > 0)
    assert re.search(r"^# loss: \d+ tokens x \d+ entries a micro-batch, in chunks of \d+ tokens", printed, re.MULTILINE)
    assert "needs a judge's weight for each token" not in printed
    assert printed.count("first kdkernels rollout RECIPE") == config.reads_responses + config.asks_judge
    assert printed.count("logits soft-capped at 30") == (2 if "gemma" in name else 0)
    assert ("student's adapter: " in printed) == (config.student.adapter is not None)
    assert f"models/{Path(config.teacher.path).name}.json" in printed if config.teacher else True
    assert re.search(r"^# memory of a GPU: \d\d\.\d GiB at most, in the phase ", printed, re.MULTILINE)


def test_the_rehearsal_of_vcrd_is_documented_and_runs(tmp_path, monkeypatch, capsys):
    """What the recipe and docs/VCRD.md say, but for fewer steps."""
    commands = [line[4:] for line in (RECIPES / "rehearsal-vcrd.toml").read_text().splitlines() if "#   " in line]
    assert len(commands) == 3
    for line in commands:
        assert line in (RECIPES.parent / "docs" / "VCRD.md").read_text()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(RECIPES)
    (tmp_path / "few.jsonl").write_text("".join((RECIPES / "data" / "arithmetic.jsonl").open().readlines()[:24]))
    few = ["--set=train.steps=2", "--set=train.batch_size=8", "--set=data.train=few.jsonl"]
    for line in commands:
        assert main([*line.removeprefix("kdkernels ").split(), *few, "--set=train.micro_batch_size=4"]) == 0, line
    assert "scores of both models' proposals in 48 responses" in capsys.readouterr().out
    assert (tmp_path / "runs" / "rehearsal-vcrd" / "metrics.jsonl").read_text().count('"weight"') == 2


@pytest.mark.slow
@pytest.mark.parametrize("extended", ["qwen2.5-14b-to-1.5b-tsd-kd", "qwen2.5-math-7b-to-1.5b-vcrd-prm-free"])
def test_a_rehearsal_trains_what_the_paper_describes(extended, tmp_path, monkeypatch):
    """On models of this machine, after a first stage: full and with an adapter, responses of both authors."""
    text = (RECIPES / "rehearsal.toml").read_text().replace("qwen2.5-14b-to-1.5b-tsd-kd", extended)
    text = text.replace('extends = "', f'extends = "{RECIPES}/')
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "data").symlink_to(RECIPES / "data")
    (tmp_path / "rehearsal.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    settings = ["--set=train.steps=2", "--set=train.batch_size=16"]
    assert main(["train", str(RECIPES / "first.toml"), *settings]) == 0
    assert "vcrd" not in extended or main(["rollout", "rehearsal.toml", *settings]) == 0
    assert main(["train", str(RECIPES / "first.toml"), "rehearsal.toml", *settings]) == 0
    assert (tmp_path / "runs" / "rehearsal" / "metrics.jsonl").read_text().count('"loss"') == 2


TWT = [f"{student}-twt-{task}" for student in ("mistral-7b", "phi-3.5-mini") for task in ("metamath", "cqa", "mbpp")]
IN_FOUR = "mistral-7b-twt-cqa-4-stages"


@pytest.mark.parametrize("name", [*TWT, IN_FOUR])
def test_the_settings_of_twt_are_the_papers(name):
    """Section 4.1, of every stage; and each stage starts from the one before."""
    stages = parse_stages(f"recipes/{name}.toml")
    assert sorted(path.stem for path in RECIPES.glob("*-twt-*.toml")) == sorted([*TWT, IN_FOUR])
    assert f"`{name}`" in (RECIPES / "README.md").read_text()
    targets = ["rationale", *["compressed"] * (2 if name == IN_FOUR else 1), "label"]
    assert [stage.target for stage in stages] == targets
    for before, stage in zip([None, *stages], stages, strict=False):
        config = stage.config
        assert config.run.output == f"runs/{name}/{stage.name}"
        assert (config.student.adapter.kind, config.student.adapter.r, config.student.adapter.merge) == (
            "lora",
            8,
            False,
        )
        assert (config.optimizer.lr, config.train.batch_size, config.train.epochs) == (1e-5, 8, 4)
        assert config.data.max_prompt_tokens + config.data.max_response_tokens == 4096
        assert config.evaluation.max_new_tokens == 2048 and config.objective.name == "SFT"
        assert ("{rationale}" in config.data.response) == (stage.target != "label")
        assert config.evaluation.response in config.data.response
        assert config.student.path.endswith(f"{before.name}/final" if before else ("v0.3", "instruct"))
        found = re.search(stages[1].compression.settings.pattern, "a\nb\n\n" + config.evaluation.response)
        assert found[1] == "a\nb"
    settings = stages[1].compression.settings
    tables = read_tables(settings.teachers)["curation"]
    assert (tables["threshold"], len(tables["teachers"])) == (0.95, 3) and settings.teachers == f"recipes/{name}.toml"
    assert f"{tables['output']}/dataset.jsonl" == stages[0].config.data.train
    for teacher in tables["teachers"]:
        assert [teacher[key] for key in ("temperature", "top_p", "max_new_tokens")] == [0, 0.95, 2048]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TWT, IN_FOUR])
def test_a_dry_run_of_twt_needs_nothing(name, capsys):
    assert main(["train", f"recipes/{name}.toml", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("# stage stage") == (4 if name == IN_FOUR else 3)
    assert printed.count("student's adapter: ") == printed.count("# stage stage")
    assert main(["plan", f"recipes/{name}.toml", "--gpu", "a100-80g", "--gpus", "4"]) == 0
    assert re.search(r"^# memory of a GPU: \d\d\.\d GiB at most", capsys.readouterr().out, re.MULTILINE)
