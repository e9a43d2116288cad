"""A recipe of three stages on sums of two digits, and teachers that rewrite by a rule."""

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch

from kdkernels.compression import TeacherCompressor
from kdkernels.curation import Answer, Chat
from kdkernels.training import load_config, run_stages
from kdkernels.training.models.loading import load_student, load_tokenizer
from kdkernels.training.processes import distributed
from kdkernels.training.recipe.stages import read_recipes
from kdkernels.training.stages import completed
from tests.training.conftest import RECIPE

SHORT = ("train.steps=1", "checkpoint.every=1", "run.seed=7")  # with which no answer of the student is empty
STAGES = """
[evaluation]
data = "{root}/held_out.jsonl"
metrics = ["exact_match"]
answer = '(\\d+)\\.'
response = "{{label}}"
[reasoning]
label = "{{label}}"
query = "{{question}}"
pattern = '(?s)^(.+)$'
batch_size = 8
[[stages]]
name = "full"
target = "rationale"
[[stages]]
name = "short"
target = "compressed"
[[stages]]
name = "label"
target = "label"
"""


class Rule(Chat):
    """A teacher that replies as `reply` says, given the turns of the conversation."""

    workers = 2

    def __init__(self, name, reply=None):
        self.identity, self.reply = (
            {"model": name},
            reply or (lambda query, own, request: f"<rationale>{query}</rationale>"),
        )
        self.heard, self._lock = [], threading.Lock()

    def answers(self, conversations):
        with self._lock:
            self.heard += conversations
        return [Answer(self.reply(*(turn["content"] for turn in one)), None, None) for one in conversations]


def write(root, text=RECIPE + STAGES):
    """The recipe; the rationales of teacher "a" are the sums the other way round, those of "b" the sums twice."""
    sums = [(a, b) for a in range(8) for b in range(8)]
    for name, part in (("train", sums[::2]), ("held_out", sums[1::8])):
        records = []
        for i, (a, b) in enumerate(part):
            rationale = f"{b}+{a}=" if i % 2 else f"{a}+{b}={a}+{b}="
            teacher = "a" if i % 2 else "b"
            records.append({"question": f"{a}+{b}=", "rationale": rationale, "label": f"{a + b}.", "teacher": teacher})
        (root / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    path = root / "recipe.toml"
    text = text.replace("{{answer}}", "{{rationale}}{{label}}").replace(
        "max_response_tokens = 6", "max_response_tokens = 14"
    )
    path.write_text(text.format(root=root))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def recipe(tmp_path):
    return write(tmp_path)


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """A root whose first stage is trained."""
    root = tmp_path_factory.mktemp("compression") / "task"
    root.mkdir()
    path = write(root)
    run_stages([_only_first(path)], SHORT)
    return root


def _only_first(path):
    first = path.with_name("first.toml")
    first.write_text(path.read_text().partition('[[stages]]\nname = "short"')[0])
    return first


@pytest.fixture
def trained(trained_once, tmp_path):
    """The recipe of a copy of it."""
    root = shutil.copytree(trained_once, tmp_path / "task")
    return write(root)


def make(path, chats, *overrides, stage=1):
    """Compresses for a stage of the recipe; the directory of what comes of it."""
    compression = completed(read_recipes([path], [*SHORT, *overrides]))[stage].compression
    distributed.start()
    compressor = TeacherCompressor(chats)
    compressor.check(compression)
    compressor.make(compression)
    return Path(compression.output).parent


def trained_teachers(path):
    """The recipe with teachers "a" and "b": fresh models of seeds of their own, which write whatever they write."""
    root = path.parent
    text = path.read_text()
    plain = root / "plain.toml"
    plain.write_text(text.partition("[evaluation]")[0])
    config = load_config(plain)
    tokenizer = load_tokenizer(config)
    named = ""
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        load_student(config, tokenizer).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        named += f'[[curation.teachers]]\nname = "{name}"\nkind = "local"\npath = "{root}/{name}"\nmax_new_tokens = 6\n'
    (root / "request.toml").write_text('marks = ["", ""]\nrequest = "{student}"\n')
    text = text.replace("[reasoning]", f'[reasoning]\nrequest = "{root}/request.toml"')
    curation = f'[curation]\noutput = "{root}/curated"\nqueries = "{root}/train.jsonl"\nquery = "{{question}}"\n'
    path.write_text(f'{text}\n{curation}task = "mathematics"\n{named}')
    return path
