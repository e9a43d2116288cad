"""What is made once before training: responses of both models, and a judge's scores of them."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdkernels.cli import main
from kdkernels.data import collate
from kdkernels.judges import ValueHead
from kdkernels.training import InputError, load_config, train
from kdkernels.training.dry_run import plan
from kdkernels.training.offline import store as stores
from kdkernels.training.offline.rollout import rollout
from kdkernels.training.offline.scores import StoredWeights
from kdkernels.training.run.atomic import UNFINISHED
from kdkernels.training.run.metrics import read_metrics

from .offline_steps import engine_gradients, exact, exact_scores, stored
from .offline_task import write_offline
from .test_processes import finish, start

PROGRAM = str(Path(__file__).with_name("offline_steps.py"))
DIES = str(Path(__file__).with_name("dies.py"))
RULES = ("ratio", "clamped_ratio", "difference", "student", "uniform")


@pytest.fixture(scope="module")
def written_once(tmp_path_factory):
    root = tmp_path_factory.mktemp("offline") / "task"
    root.mkdir()
    return write_offline(root)


@pytest.fixture(scope="module")
def made_once(written_once):
    """The recipe with all that `kdkernels rollout` makes, by one thread: others round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rollout(load_config(written_once))
    torch.set_num_threads(threads)
    return written_once


def copied(recipe, tmp_path):
    """A copy of the recipe's directory, its paths changed to that."""
    root = tmp_path / "task"
    shutil.copytree(recipe.parent, root)
    for file in (root / "vcrd.toml", root / "recipe.toml"):
        file.write_text(file.read_text().replace(str(recipe.parent), str(root)))
    return root / "vcrd.toml"


@pytest.fixture
def written(written_once, tmp_path):
    recipe = copied(written_once, tmp_path)
    shutil.rmtree(recipe.parent / "responses", ignore_errors=True)
    return recipe


@pytest.fixture
def made(made_once, tmp_path):
    return copied(made_once, tmp_path)


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_the_files_are_what_both_models_wrote(made):
    config = load_config(made)
    root = Path(config.responses.output)
    names = [f"{author}-{i:05d}.jsonl" for author in ("teacher", "student") for i in range(7)]
    assert sorted(path.name for path in root.iterdir()) == sorted([*names, "manifest.json", "scores"])
    lines = [json.loads(line) for name in names for line in (root / name).read_text().splitlines()]
    assert [line["line"] for line in lines] == 2 * list(range(1, 33))
    assert [line["author"] for line in lines] == ["teacher"] * 32 + ["student"] * 32
    inputs, _ = stored(config)
    tokenizer, usable = inputs.tokenizer, inputs.examples.usable
    for line in lines:
        assert tokenizer.decode(line["prompt_ids"]) == line["prompt"] and 1 <= len(line["response_ids"]) <= 6
        assert line["finished"] == (line["response_ids"][-1] == tokenizer.eos_token_id)
        own = line["response_ids"][:-1] if line["finished"] else line["response_ids"]
        assert line["response"] == tokenizer.decode(own, clean_up_tokenization_spaces=False)
    assert [one.prompt_ids for one in usable[::2]] == [one.prompt_ids for one in usable[1::2]]
    assert [one.from_teacher for one in usable] == [True, False] * 32
    assert [list(one.response_ids) for one in usable[1::2]] == [line["response_ids"] for line in lines[32:]]
    assert len({one.response_ids for one in usable}) > 50  # each batch has draws of its own
    manifest = json.loads((root / "manifest.json").read_text())
    assert list(manifest["made_from"]) == ["[data] train", "[student] path", "[teacher] path", "[tokenizer] path"]
    assert manifest["settings"]["[responses] temperature"] == 0.8 and list(manifest["files"]) == names


def test_the_scores_are_the_models(made):
    """Of the responses' own tokens and of what the other model proposes there."""
    config = load_config(made)
    inputs, examples = stored(config)
    right = exact_scores(config, examples)
    for author in ("teacher", "student"):
        own = [one for one in inputs.examples.usable if one.from_teacher == (author == "teacher")]
        files = [load_file(f"{config.judge.output}/scores-{author}-{i:05d}.safetensors") for i in range(7)]
        for model in ("teacher", "student"):
            stored_scores = torch.cat([file[model] for file in files]).split([len(one.response_ids) for one in own])
            for one, scores in zip(own, stored_scores, strict=True):
                if one in examples:
                    torch.testing.assert_close(scores.double(), right[one, model], atol=1e-6, rtol=1e-6)
    batch = collate([one.prompt_ids for one in own], [one.response_ids for one in own], 0)
    ids = torch.cat([file["ids"] for file in files])
    assert tuple(bytes(one).hex() for one in ids.tolist()) == batch.ids


def test_proposals_are_drawn_or_the_most_probable(made):
    config = load_config(made)
    greedy = load_config(made, ["judge.proposals=greedy", f"judge.output={made.parent}/greedy"])
    rollout(greedy)
    inputs, _ = stored(config)
    from kdkernels.training.models.loading import load_student, load_teacher

    models = {
        "teacher": load_student(config, inputs.tokenizer).eval(),
        "student": load_teacher(config, inputs.tokenizer),
    }
    for author, other in models.items():
        own = [one for one in inputs.examples.usable[:40] if one.from_teacher == (author == "teacher")]
        found = [[], []]
        for proposals, output in zip(found, (greedy.judge.output, config.judge.output), strict=True):
            for i in range(4):
                proposals += load_file(f"{output}/proposals-{author}-{i:05d}.safetensors")["proposals"].tolist()
        best, drawn, probabilities, place = *found, [], 0
        for one in own:
            n = len(one.response_ids)
            with torch.no_grad():
                z = other(torch.tensor([[*one.prompt_ids, *one.response_ids]])).logits[0, len(one.prompt_ids) - 1 : -1]
            p = z[:, :16].softmax(1)
            assert best[place : place + n] == p.argmax(1).tolist()
            probabilities += p[torch.arange(n), drawn[place : place + n]].tolist()
            place += n
        assert best != drawn and max(drawn) < 16
        # sampled: the mean probability of what is drawn is about sum p^2, far below that of the most probable
        assert 0 < min(probabilities) < 0.2


def test_a_killed_rollout_goes_on_to_the_same_files(made_once, written, monkeypatch):
    """Whenever it is killed, and with what it left half-written."""
    expected = contents(made_once.parent / "responses")
    write, made_files = stores.write_bytes, []
    for files in (2, 9, 3, 6, 11, 100):  # of 14 of responses, 14 of proposals, 14 of scores
        done = []

        def until(path, data, files=files, done=done):
            if len(done) == files:
                path.with_name(UNFINISHED + path.name).write_bytes(data[:5])
                raise KeyboardInterrupt
            write(path, data)
            done.append(path.name)

        monkeypatch.setattr(stores, "write_bytes", until)
        try:
            rollout(load_config(written))
        except KeyboardInterrupt:
            assert contents(written.parent / "responses") != expected
        made_files += done
    assert len(made_files) == 42 and len(set(made_files)) == 42 and len(done) == 11
    found = contents(written.parent / "responses")
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    monkeypatch.setattr(stores, "write_bytes", lambda path, data: pytest.fail(f"{path} was written again"))
    rollout(load_config(written))


@pytest.mark.slow
def test_a_process_that_dies_goes_on_to_the_same_files_and_weights(made_once, written):
    """kill -9 while it writes responses, proposals and scores, and while it trains."""
    few = ["--set", "train.steps=3", "--set", "checkpoint.every=1"]
    expected = contents(made_once.parent / "responses")
    for command, counts in ((["rollout"], (5, 14, 12)), (["train", "--resume"], (2,))):
        for count in counts:
            arguments = [sys.executable, DIES, str(count), *command, str(written), *few]
            done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
            assert done.returncode == -signal.SIGKILL, done.stderr
        if command == ["rollout"]:
            assert len(list((written.parent / "responses").rglob("unfinished-*"))) == 1
        assert main([*command, str(written), *few]) == 0
        assert contents(written.parent / "responses") == expected
    whole = train(load_config(made_once, [*few[1::2], f"run.output={written.parent}/whole"]))
    one, two = (load_file(path / "model.safetensors") for path in (whole.final, written.parent / "vcrd" / "final"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def check(got, right, case):
    names = right.keys() - {"loss"}
    assert got.keys() - {"norm"} == right.keys() and len(names) > 10
    a, b = (torch.cat([gradients[name].flatten() for name in sorted(names)]) for gradients in (got, right))
    assert b.norm() > 0.1 and (a - b).norm() < 1e-5 * b.norm(), f"{case}: {a.norm()} instead of {b.norm()}"
    assert got["loss"] == pytest.approx(right["loss"], rel=1e-5), case


FREE = ("objective.weighting=likelihood_ratio",)
STEP = ("optimizer.max_grad_norm=0", "train.batch_size=16")


SETS = [[f"judge.rule={rule}", f"train.micro_batch_size={2 ** (i % 4)}"] for i, rule in enumerate(RULES)]
CASES = [[*STEP, *one] for one in (*SETS, [*FREE, "train.micro_batch_size=2"])]


def test_a_step_has_both_responses_of_its_prompts_with_each_weight(made):
    """The mean over prompts, however the two responses of one are spread over micro-batches."""
    losses = set()
    for case in CASES:
        config = load_config(made, case)
        got = engine_gradients(config)
        check(got, exact(config), case)
        losses.add(round(got["loss"], 4))
    assert len(losses) == len(CASES)  # each weight is another one


@pytest.mark.slow
def test_two_processes_with_each_weight(written, made_once, tmp_path):
    """They write the files of one process, and train with them as the paper's formulas have it."""
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", PROGRAM)
    results = tmp_path / "gradients.pt"
    recipes = json.dumps([(str(written), case) for case in CASES])
    finish(start(command, recipes, str(results), cwd=tmp_path), tmp_path)
    for case, got in zip(CASES, torch.load(results), strict=True):
        check(got, exact(load_config(written, case)), case)
    one, two = (contents(recipe.parent / "responses") for recipe in (made_once, written))
    assert one == two


def test_a_run_trains_on_them_and_goes_on_after_a_kill(made, capfd):
    """With the weights of every step by the samples' names: the same model, whenever the run was interrupted."""
    config = load_config(made, ["train.steps=4", "checkpoint.every=1"])
    whole = train(config)
    lines = read_metrics(whole.output / "metrics.jsonl")
    assert len({line["weight"] for line in lines}) == 4 and all(line["student_length"] > 0 for line in lines)
    assert all(line["skl"] > 0 and line["srkl"] > 0 for line in lines)
    cut = load_config(made, ["train.steps=4", "checkpoint.every=1", f"run.output={made.parent}/cut"])
    from kdkernels.training import step, trainer

    def killed(parts, examples, number, config, apply=True):
        if number == 3:
            raise KeyboardInterrupt
        return step.train_step(parts, examples, number, config, apply)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "train_step", killed)
        train(cut)
    train(cut, resume=True)
    one, two = (load_file(Path(c.run.output) / "final" / "model.safetensors") for c in (config, cut))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    free = train(load_config(made, [*FREE, "train.steps=1", f"run.output={made.parent}/free"]))
    assert read_metrics(free.output / "metrics.jsonl")[0]["weight"] != lines[0]["weight"]
    assert "2 responses to each" in capfd.readouterr().out


def test_a_plan_says_what_is_missing(written, capfd):
    said = plan(load_config(written))
    assert "[responses] output: " in said and "[judge] output: " in said
    assert said.count("first kdkernels rollout RECIPE") == 2 and "32 prompts, 2 responses to each" in said
    with pytest.raises(InputError, match=r"\[responses\] output: .* is missing: kdkernels rollout RECIPE makes it"):
        train(load_config(written))
    assert main(["rollout", str(written)]) == 0
    assert "responses to 32 prompts: " in capfd.readouterr().out
    assert "kdkernels rollout" not in plan(load_config(written))
    assert "[judge] is not asked: VCRD" in plan(load_config(written, FREE))


def touch(file):
    """Another number in the weights."""
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, file, {"format": "pt"})


def cut(file):
    file.write_bytes(file.read_bytes()[:-40])


def extend(file):
    file.write_bytes(file.read_bytes() + b"\n")


def of_others(manifest):
    text = manifest.read_text()
    manifest.write_text(text.replace('"[responses] output": "', '"[responses] output": "0'))


OTHER, SCORED = r"made from something else: ", "responses/scores/scores-teacher-00001.safetensors"
CHANGED = {
    "data": (extend, "train.jsonl", rf"\[responses\] output: .*{OTHER}\[data\] train: its contents changed"),
    "teacher": (touch, "teacher/model.safetensors", rf"{OTHER}\[teacher\] path: model.safetensors changed"),
    "student": (touch, "student/model.safetensors", rf"{OTHER}\[student\] path: model.safetensors changed"),
    "tokenizer": (extend, "student/tokenizer_config.json", r"\[tokenizer\] path: tokenizer_config.json changed"),
    "judge": (touch, "judge/value_head.safetensors", rf"{OTHER}\[judge\] path: value_head.safetensors changed"),
    "a missing file": (Path.unlink, "responses/student-00003.jsonl", r"student-00003.jsonl is missing \(1 of 14 files"),
    "a cut file": (cut, "responses/student-00003.jsonl", r"student-00003.jsonl is cut or changed"),
    "missing scores": (Path.unlink, SCORED, r"\[judge\] output: .*-teacher-00001.safetensors is missing \(1 of 28"),
    "cut scores": (cut, SCORED, r"\[judge\] output: .*-teacher-00001.safetensors is cut or changed"),
    "no scores": (shutil.rmtree, "responses/scores", r"\[judge\] output: .*is missing: kdkernels rollout RECIPE"),
    "of others": (of_others, "responses/scores/manifest.json", rf"{OTHER}\[responses\] output: its contents changed"),
    "a damaged manifest": (cut, "responses/manifest.json", r"manifest.json is damaged"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_what_was_made_from_something_else_is_refused(made, case):
    change, file, said = CHANGED[case]
    change(made.parent / file)
    with pytest.raises(InputError, match=said):
        train(load_config(made))
    assert not (made.parent / "vcrd").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["responses.temperature=1.0"], r"\[responses\] temperature: 0.8 there, 1.0 in the recipe"),
        (["data.max_response_tokens=5"], r"\[data\] max_response_tokens: 6 there, 5 in the recipe"),
        (["run.seed=4"], r"\[run\] seed: 3 there, 4 in the recipe"),
        (
            ["judge.proposals=greedy"],
            r'\[judge\] proposals: "sampled" there, "greedy" in the recipe.*another directory',
        ),
    ],
)
def test_other_settings_are_refused(made, settings, said):
    for act in (train, rollout):
        with pytest.raises(InputError, match=said):
            act(load_config(made, settings))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["judge.function=json:dumps"], r"\[judge\] expected either path or function, got both"),
        (["train.batch_size=7", "train.micro_batch_size=1"], r"\[train\] batch_size: expected an even number"),
        (["rollout.student_fraction=0.5"], r"\[rollout\] student_fraction: expected 0 with \[responses\]"),
        (["rollout.student_fraction=1"], r"\[judge\] scores stored responses"),
        (["judge.rule=best"], r"\[judge\] rule: expected"),
        (["responses.top_p=0"], r"\[responses\] top_p: expected a number > 0"),
        (["judge.path=/nowhere"], r"\[judge\] path: no such directory: /nowhere"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(written, settings, said):
    with pytest.raises(InputError, match=said):
        load_config(written, settings)


def test_recipes_without_a_part_are_refused(written):
    text = written.read_text()
    for section, said in (
        ("[responses]", r"section \[responses\] is missing: \[judge\] scores those"),
        ("[teacher]", r"\[responses\] are those of the models at .*got no teacher with a path"),
    ):
        before, _, after = text.partition(section)
        written.write_text(before + after[after.index("\n[") :])
        with pytest.raises(InputError, match=said):
            load_config(written)
    written.write_text(text[: text.index("[responses]")] + text[text.index("[objective]") :])
    with pytest.raises(InputError, match=r"section \[responses\] is missing"):
        rollout(load_config(written, FREE))


def test_a_function_judges(made, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    (made.parent / "my_judges.py").write_text(
        "def of_the_token(prefixes, tokens):\n    return [token / 16 for token in tokens]\n\n\n"
        "def nan(prefixes, tokens):\n    return [float('nan')] * len(tokens)\n"
    )
    monkeypatch.syspath_prepend(made.parent)
    text = made.read_text().replace(f'path = "{made.parent}/judge"', 'function = "my_judges:of_the_token"')
    made.write_text(text)
    config = load_config(made, [f"judge.output={made.parent}/own"])
    rollout(config)
    read = load_file(made.parent / "own" / "scores-student-00000.safetensors")
    drawn = load_file(made.parent / "own" / "proposals-student-00000.safetensors")["proposals"]
    torch.testing.assert_close(read["teacher"], drawn / 16)
    with pytest.raises(InputError, match=r"\[judge\] function my_judges:nan: expected scores from 0 to 1, got nan"):
        rollout(load_config(made, ["judge.function=my_judges:nan", f"judge.output={made.parent}/nan"]))
    assert not list((made.parent / "nan").glob("scores-*"))
    (made.parent / "my_judges.py").write_text("def of_the_token(prefixes, tokens):\n    return [1.0] * len(tokens)\n")
    with pytest.raises(InputError, match=r"\[judge\] function my_judges:of_the_token: its contents changed"):
        train(config)


@pytest.mark.parametrize("spoil", [lambda contents: contents[:-9], None], ids=["cut", "those of other responses"])
def test_proposals_that_are_damaged_are_not_scored(made, spoil):
    scores = made.parent / "responses" / "scores"
    file, other = scores / "proposals-teacher-00000.safetensors", scores / "proposals-teacher-00006.safetensors"
    contents = file.read_bytes()
    file.write_bytes(spoil(contents) if spoil else other.read_bytes())
    judged = scores / "scores-teacher-00000.safetensors"
    expected = judged.read_bytes()
    judged.unlink()
    with pytest.raises(InputError, match=r"\[judge\] output: .*proposals-teacher-00000.safetensors is missing, cut or"):
        rollout(load_config(made))
    assert not judged.exists()
    file.unlink()
    rollout(load_config(made))
    assert judged.read_bytes() == expected and file.read_bytes() == contents


def test_a_judge_of_other_tokens_is_refused(written):
    file = written.parent / "judge" / "tokenizer.json"
    text = json.loads(file.read_text())
    vocabulary = text["model"]["vocab"]
    vocabulary["+"], vocabulary["="] = vocabulary["="], vocabulary["+"]
    file.write_text(json.dumps(text))
    with pytest.raises(
        InputError, match=r"\[judge\] path: expected a model that knows the recipe's tokens.*2 of 16 are"
    ):
        rollout(load_config(written))
    (written.parent / "judge" / "value_head.safetensors").unlink()
    shutil.copy(written.parent / "student" / "tokenizer.json", file)
    shutil.rmtree(written.parent / "responses" / "scores")
    with pytest.raises(InputError, match=r"\[judge\] path: no value head in"):
        rollout(load_config(written))


def test_a_response_that_was_not_scored_has_no_weights():
    batch = collate([[1], [1]], [[2], [2]], 0, [True, False])
    judge = StoredWeights({(batch.ids[0], True): torch.tensor([0.5])}, "here")
    with pytest.raises(InputError, match=rf"here: no scores of the student's response {batch.ids[0]}"):
        judge(batch)
    judge.weights[batch.ids[0], False] = torch.tensor([2.0])  # the same tokens by another author
    assert judge(batch).tolist() == [[0.5, 0], [2.0, 0]]


def test_both_a_judge_and_an_argument_are_refused(made):
    with pytest.raises(InputError, match=r"judge: expected either the recipe's \[judge\] or the argument, got both"):
        train(load_config(made), judge=lambda batch: torch.ones(batch.target.shape))


def test_the_cost_of_tokens_off_the_path_is_one_more_forward(made, monkeypatch):
    scorer = ValueHead.load(made.parent / "judge", torch.float32, torch.device("cpu"))
    calls, forward = [], scorer.backbone.forward
    monkeypatch.setattr(scorer.backbone, "forward", lambda **given: calls.append(given) or forward(**given))
    scorer.score([[1, 2]] * 3, [[3, 4, 5]] * 3, [[3, 9, 9], [3, 4, 5], [9, 4, 9]])
    assert [tuple(given["input_ids"].shape) for given in calls] == [(3, 5), (3, 2)]
