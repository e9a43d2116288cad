"""A teacher that ships its hidden states is the local one, to the bit; a server that fails ends the run, trained on
nothing that is wrong.
"""

import json
from pathlib import Path

import pytest
import torch
from faulty_server import closed_port, faulty_server

import kdkernels as kd
from kdkernels.cli import main
from kdkernels.data import collate
from kdkernels.data.tokenizers import vocabulary_hash
from kdkernels.errors import InputError, ServerError
from kdkernels.http import Server
from kdkernels.teachers import HiddenStatesTeacher, LocalTeacher
from kdkernels.teachers.hidden import Output, from_bytes, of_samples, scored, to_bytes
from kdkernels.teachers.served import Client, Service
from kdkernels.training import serving, train
from kdkernels.training.models import placement
from kdkernels.training.models.loading import load_frozen
from kdkernels.training.run import identity
from kdkernels.training.run.metrics import read_metrics

from .conftest import GKD, final_weights

BATCH = collate([[3, 4], [5], [6, 5, 4]], [[6, 1], [7, 8, 1], [3]], 0)
BF16 = ("run.dtype=bfloat16", "teacher.dtype=bfloat16")


@pytest.fixture
def path(teacher_set) -> str:
    return teacher_set.partition("=")[2]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Retries without their pauses."""
    for module in (placement, identity):
        monkeypatch.setattr(module, "Server", lambda url: Server(url, timeout=0.3, retries=2, backoff=0.01))


def kept(result):
    """What a run's log says, but for times, and its weights."""
    lines = read_metrics(result.output / "metrics.jsonl")
    skipped = ("time/", "tokens_per", "peak_memory")
    return [{k: v for k, v in line.items() if not k.startswith(skipped)} for line in lines], final_weights(
        result.output
    )


def check_same(found, expected):
    assert found[0] == expected[0] and len(found[0]) >= 3 and found[0][-1]["gradient_norm"] > 0
    assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])


# ---- to the bit ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shipped_hidden_states_are_the_local_teachers(path, dtype):
    model, tokenizer = load_frozen(path, "MODEL", dtype, "auto")
    service = Service(model, "a", vocabulary_hash(tokenizer))
    local, student = LocalTeacher(model, 16).score(BATCH), torch.randn(*BATCH.layout.shape, 8, requires_grad=True)
    weight = torch.randn(18, 8)
    with faulty_server(service.answer) as server:
        served = Client(Server(server.url), vocabulary_hash(tokenizer), "").teacher(16, torch.device("cpu"))
        parts = {one: scored(local, BATCH)[BATCH.layout.response == b] for b, one in enumerate(BATCH.ids)}
        of_memory = HiddenStatesTeacher(Output.of(local), of_samples(parts.__getitem__), 16)
        found = []
        for source in (local, served.score(BATCH), of_memory.score(BATCH)):
            student.grad = None
            out = kd.GKD()(kd.Head(student, weight, vocab_size=16), source, BATCH.layout)
            out.loss.backward()
            found.append((out.loss.detach(), student.grad))
        assert found[0][1].abs().sum() > 0
        for loss, gradient in found[1:]:
            assert torch.equal(loss, found[0][0]) and torch.equal(gradient, found[0][1])


@pytest.mark.parametrize("options", [(), pytest.param(BF16, marks=pytest.mark.slow)], ids=["float32", "bfloat16"])
def test_a_run_with_a_served_teacher_is_that_with_a_local_one(load, teacher_set, path, options, capsys):
    """Responses by the student and by the data, evaluated against the teacher."""
    root = load().run.output
    more = [*GKD, *options, "rollout.student_fraction=0.5", f"evaluation.data={Path(root).parent}/test.jsonl"]
    more.append('evaluation.metrics=["kl"]')
    expected = kept(train(load(*more, teacher_set)))
    assert expected[0][0]["evaluation/kl"] > 0
    more = [one for one in more if not one.startswith("teacher")]
    with faulty_server(serving.service(path, "bfloat16" if options else "float32").answer) as server:
        found = kept(train(load(*more, f"teacher.url={server.url}", f"run.output={root}-served")))
        positions = [json.loads(body)["positions"] for path, body in server.requests if path == "/states"]
    check_same(found, expected)
    tokens = sum(line["tokens"] for line in found[0] if "tokens" in line)
    assert sum(map(len, positions)) > tokens, "what is evaluated is asked for too"
    said = "16 numbers in bfloat16, 32 bytes" if options else "16 numbers in float32, 64 bytes"
    assert said in capsys.readouterr().out


def test_the_bytes_of_a_token_are_those_that_travel(path):
    service = serving.service(path, "bfloat16")
    asked = json.dumps({"input_ids": [list(range(3, 19))] * 8, "lengths": [16] * 8, "positions": list(range(100))})
    content = service.answer("/states", asked.encode())
    teacher = HiddenStatesTeacher(Output.from_bytes(service.answer("/head", b"")), None, 16)
    assert teacher.bytes_per_token == 2 * 16 and "32 bytes a token" in str(teacher)
    assert 0 <= len(content) - 100 * teacher.bytes_per_token < 300


def test_the_served_lm_head_has_all_of_its_parts():
    head = kd.Head(torch.randn(2, 8), torch.randn(11, 8), torch.randn(11), softcap=30.0, scale=1 / 3)
    found = Output.from_bytes(Output.of(head).to_bytes())
    again = found.head(head.hidden)
    assert torch.equal(again.weight, head.weight) and torch.equal(again.bias, head.bias)
    assert (again.softcap, again.scale) == (head.softcap, head.scale)
    for wrong in (b"", b"{}", to_bytes({"weight": head.weight}, {})):
        with pytest.raises(ValueError, match="expected"):
            Output.from_bytes(wrong)


# ---- a server that fails ----

SLOWER = ("hang", "500", "garbage", "cut", "empty")


def changed(service, path, change):
    """What the service answers at `path`, changed."""

    def answer(asked, body):
        content = service.answer(asked, body)
        return change(content) if asked == path else content

    return answer


def spoiled(number):
    def change(content):
        tensors, notes = from_bytes(content)
        tensors["hidden"].view(-1)[3] = number
        return to_bytes(tensors, notes)

    return change


def renamed(content):
    tensors, _ = from_bytes(content)
    return to_bytes(tensors, {"model": "another"})


def shorter(content):
    tensors, notes = from_bytes(content)
    return to_bytes({"hidden": tensors["hidden"][1:]}, notes)


WRONG = {
    "nan": ("/states", spoiled(float("nan")), "expected finite numbers, got nan"),
    "infinity": ("/states", spoiled(float("inf")), "expected finite numbers, got inf"),
    "a token less": ("/states", shorter, "expected \\[.*\\] in torch.float32, got"),
    "another model": ("/states", renamed, "the teacher changed while the run went on"),
    "no tensors": ("/states", lambda content: b"<html>", "expected tensors as a whole safetensors file"),
    "a part of them": ("/states", lambda content: content[:-4], "expected tensors as a whole safetensors file"),
    "no lm_head": ("/head", lambda content: to_bytes({"bias": torch.zeros(3)}, {}), "expected an lm_head"),
    "no numbers": ("/about", lambda content: b'{"format": "other"}', "expected what `kdkernels teacher-serve`"),
}


@pytest.mark.parametrize("case", WRONG)
def test_nothing_is_trained_on_what_is_wrong(load, path, case):
    asked, change, message = WRONG[case]
    answer = changed(serving.service(path, "float32"), asked, change)
    with faulty_server(answer) as server, pytest.raises(ServerError, match=message):
        train(load(*GKD, f"teacher.url={server.url}"))
    log = Path(load().run.output, "metrics.jsonl")
    assert not log.exists() or not log.read_text()


@pytest.mark.parametrize("fault", ["die", *(pytest.param(one, marks=pytest.mark.slow) for one in SLOWER)])
def test_a_fault_that_passes_changes_nothing_and_one_that_stays_ends_the_run(load, teacher_set, path, fault):
    expected = kept(train(load(*GKD, teacher_set)))
    root, service = load().run.output, serving.service(path, "float32")
    with faulty_server(service.answer, [fault, "ok", fault, "ok", fault, fault, "ok", "ok", fault]) as server:
        check_same(kept(train(load(*GKD, f"teacher.url={server.url}", f"run.output={root}-passes"))), expected)
    asked = []

    def stays(path, body):
        if path == "/states":
            asked.append(body)
            server.always = fault if len(asked) > 3 else None
        return service.answer(path, body)

    with faulty_server(stays) as server, pytest.raises(ServerError, match="/states: asked 3 times"):
        train(load(*GKD, f"teacher.url={server.url}", f"run.output={root}-stays"))
    lines = read_metrics(Path(f"{root}-stays", "metrics.jsonl"))
    assert 1 <= len(lines) < 3 and lines[0]["loss"] == expected[0][0]["loss"]


def test_the_command_ends_with_the_status_of_servers(load, recipe, path, capsys):
    overrides = [f"--set={one}" for one in (*GKD, f"teacher.url={closed_port()}")]
    assert main(["train", str(recipe), *overrides]) == 6
    assert "no answer" in capsys.readouterr().err


def test_a_server_with_another_tokenizer_is_refused(load, path):
    model, _ = load_frozen(path, "MODEL", "float32", "auto")
    refused = pytest.raises(InputError, match=r"\[teacher\] url: expected the recipe's tokenizer")
    with faulty_server(Service(model, "a", "other").answer) as server, refused:
        train(load(*GKD, f"teacher.url={server.url}"))


def test_a_resumed_run_finds_the_same_teacher(load, path):
    more = [*GKD, "checkpoint.every=1"]
    service = serving.service(path, "float32")
    with faulty_server(service.answer) as server:
        train(load(*more, f"teacher.url={server.url}"))
        service.about["model"] = "another"
        with pytest.raises(InputError, match=r"\[teacher\] url .*: its contents changed"):
            train(load(*more, f"teacher.url={server.url}"), resume=True)


def test_what_a_server_refuses(path):
    service = serving.service(path, "float32")
    good = {"input_ids": [[3, 4]], "lengths": [2], "positions": [1]}
    assert service.answer("/states", json.dumps(good).encode())
    for name, value in (("input_ids", [[3], [4, 5]]), ("input_ids", [[3, 99]]), ("lengths", [3]), ("positions", [2]),
                        ("positions", []), ("lengths", ["2"]), ("input_ids", 3)):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            service.answer("/states", json.dumps(good | {name: value}).encode())
    with pytest.raises(LookupError, match="expected /about"):
        service.answer("/elsewhere", b"")


def test_the_server_of_the_command_answers(path):
    service = serving.service(path)
    with serving.listening(service, "127.0.0.1", 0) as http:
        server = Server(f"http://127.0.0.1:{http.server_port}", retries=0)
        assert server.get_json("/about") == service.about
        with pytest.raises(ServerError, match=r"status 404.*expected /about"):
            server.get("/elsewhere")
        with pytest.raises(ServerError, match=r"status 400.*input_ids"):
            server.post("/states", {})
        with (
            pytest.raises(InputError, match="cannot be listened on"),
            serving.listening(service, "127.0.0.1", http.server_port),
        ):
            pass
