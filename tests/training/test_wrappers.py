"""Student and objective under DDP, FSDP and ZeRO: the gradients and updates of full logits in fp64."""

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kdkernels import ForwardKL, Head, ReverseKL, reference
from kdkernels.objectives import Output

from . import hugging_face_wrappers as hugging_face
from .test_processes import finish, start
from .wrappers import OBJECTIVES, WRAPPERS, Distillation, batch


def results(root: Path, program: str, *arguments: str) -> list[dict]:
    """What each of two processes of a program beside this file got."""
    program = str(Path(__file__).with_name(program))
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", program)
    finish(start(command, *arguments, str(root / "found"), cwd=root), root)
    return [torch.load(root / f"found.{rank}") for rank in (0, 1)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes got under each wrapper."""
    return results(tmp_path_factory.mktemp("wrappers"), "wrappers.py")


def jeffreys(z_s: list[torch.Tensor], z_t: list[torch.Tensor]) -> torch.Tensor:
    both = [
        reference.divergence(s, t, ForwardKL()) + reference.divergence(s, t, ReverseKL()) + reference.entropy(s)
        for s, t in zip(z_s, z_t, strict=True)
    ]
    return torch.stack([each.mean() for each in both]).mean()


FORMULAS = {"TSD-KD": lambda z_s, z_t: reference.tsd_kd(z_s, z_t, k=4, opener_share=0.5), "Jeffreys": jeffreys}


@pytest.fixture(scope="module", params=OBJECTIVES)
def objective(request):
    return request.param


@pytest.fixture(scope="module")
def exact(objective):
    x, hidden, weight, mask = batch()
    module = Distillation().double()
    z_s = module.lm_head(torch.tanh(module.trunk(x.double())))
    z_t = hidden.double() @ weight.double().t()
    lengths = mask.sum(1).tolist()
    z_s, z_t = ([z[row, :n] for row, n in enumerate(lengths)] for z in (z_s, z_t))
    FORMULAS[objective](z_s, z_t).backward()
    return {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_gradients(found, objective, exact, wrapper):
    first, second = (process[wrapper, objective] for process in found)
    assert first.keys() == second.keys() == exact.keys()
    for name, expected in exact.items():
        assert torch.equal(first[name], second[name]), f"{name} differs between the processes"
        assert expected.norm() > 0
        assert (first[name].double() - expected).norm() < 2e-6 * expected.norm(), name


# ---- transformers models, through their wrappers ---


@pytest.fixture(scope="module")
def updates(tmp_path_factory):
    return results(tmp_path_factory.mktemp("wrappers"), "hugging_face_wrappers.py", "few")


@pytest.fixture(scope="module")
def more_updates(tmp_path_factory):
    return results(tmp_path_factory.mktemp("wrappers"), "hugging_face_wrappers.py", "more")


@pytest.fixture(scope="module")
def truth():
    """spread -> (loss, gradients) of full logits in fp64, in one process."""
    out = {}
    for spread in hugging_face.SPREADS:
        inputs, labels = hugging_face.batch(spread)
        student = hugging_face.student(spread).double()
        teacher = hugging_face.model(3, hugging_face.ENTRIES + 8).double()
        entries = hugging_face.ENTRIES
        z_s, z_t = (model(**inputs).logits[..., :entries] for model in (student, teacher))
        scored = [(row, labels[row, 1:] != -100) for row in range(4) if (labels[row] != -100).any()]
        z_s, z_t = ([z[row, :-1][where] for row, where in scored] for z in (z_s, z_t))
        loss = reference.gkd(z_s, z_t, beta=0.5)
        loss.backward()
        out[spread] = loss.item(), {name: p.grad for name, p in student.named_parameters()}
    return out


def check_updates(updates: list[dict], case: tuple[str, str, str], truth: dict) -> None:
    loss, gradients = truth[case[-1]]
    first, second = (process[case] for process in updates)
    assert loss > 0.1 and abs(first["loss"] - loss) < 1e-6
    assert first["update"].keys() == second["update"].keys() == gradients.keys()
    for name, expected in gradients.items():
        assert torch.equal(first["update"][name], second["update"][name]), f"{name} differs between the processes"
        assert expected.norm() > 1e-4
        assert (first["update"][name].double() - expected).norm() < 1e-4 * expected.norm(), name


@pytest.mark.parametrize("case", hugging_face.FEW, ids=", ".join)
def test_loss_and_update_of_a_transformers_model(updates, truth, case):
    check_updates(updates, case, truth)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in hugging_face.CASES if case not in hugging_face.FEW], ids=", ".join)
def test_more_of_them(more_updates, truth, case):
    check_updates(more_updates, case, truth)


def test_these_checks_see_a_model_out_of_its_wrapper(updates, truth):
    """Hidden states of ddp.module(...): the right loss, and gradients that nobody has reduced."""
    loss, gradients = truth["uneven"]
    first, second = (process["DDP", "around", "uneven"] for process in updates)
    assert abs(first["loss"] - loss) < 1e-6
    for name, expected in gradients.items():
        assert not torch.allclose(first["update"][name], second["update"][name])
        assert (first["update"][name].double() - expected).norm() > 0.1 * expected.norm(), name


@pytest.mark.parametrize("wrapper", ["DDP", "accelerate"])
def test_a_model_out_of_its_wrapper_is_refused(updates, wrapper):
    for process in updates:
        around, *inside = process["refused"][wrapper]
        assert "got Qwen2ForCausalLM in DistributedDataParallel outside" in around and len(inside) == 2
        for said in inside:
            assert "got Qwen2ForCausalLM out of a DistributedDataParallel" in said and "kd.through(wrapper" in said


def test_mixed_precision_rounds_inputs_alone(updates):
    for process in updates:
        assert process["rounded"] == pytest.approx([1, 1], rel=1e-5)


@pytest.mark.parametrize("what", ["frozen part", "second DDP", "no DDP any more"])
def test_what_is_allowed_of_a_model_in_a_ddp(updates, what):
    assert [process["allowed"][what] for process in updates] == ["", ""]


@pytest.mark.parametrize(
    ("wrapper", "name"), [("FSDP2", "FSDPQwen2ForCausalLM"), ("FSDP1", "FullyShardedDataParallel")]
)
def test_shards_outside_of_their_forward_are_refused(updates, wrapper, name):
    for process in updates:
        (said,) = process["refused"][wrapper]
        assert name in said and "outside of it" in said and "kd.through(wrapper" in said


# ---- what walks through a forward's output ---


def output() -> Output:
    x, hidden, weight, mask = batch()
    return Distillation()(x, Head(hidden, weight), mask)


def test_an_output_is_walked_through():
    """DDP, DeepSpeed and pytrees look for tensors in tuples; whoever rebuilds what he walked through gets an Output."""
    out = output()
    leaves, spec = torch.utils._pytree.tree_flatten(out)
    assert leaves[0] is out.loss and leaves[1] is out.count and len(leaves) == 2 + len(out.metrics)
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert type(again) is Output and again.loss is out.loss and again.metrics == out.metrics
    moved = torch.utils._pytree.tree_map(lambda t: t.detach().double(), out)
    assert moved.loss.dtype == torch.float64 and moved.metrics["direct"].dtype == torch.float64
    loss, count, metrics = out
    assert loss is out.loss and count == 4 and metrics["loss"] == loss


def test_an_output_is_replaced_copied_and_pickled():
    out = output()
    larger = out._replace(loss=out.loss * 2, metrics=out.metrics | {"more": out.count})
    assert type(larger) is Output and larger.loss == 2 * out.loss and "more" not in out.metrics
    larger.loss.backward()
    detached = out._replace(loss=out.loss.detach())
    for again in (pickle.loads(pickle.dumps(detached)), copy.deepcopy(detached)):
        assert type(again) is Output and again.loss == out.loss and again.metrics.keys() == out.metrics.keys()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_an_output_under_checkpointing(use_reentrant):
    """The whole module is computed again in the backward: the same gradients."""
    x, hidden, weight, mask = batch()
    gradients = []
    for checkpointed in (False, True):
        module, inputs = Distillation(), x.clone().requires_grad_()
        call = (inputs, Head(hidden, weight), mask)
        out = checkpoint(module, *call, use_reentrant=use_reentrant) if checkpointed else module(*call)
        assert use_reentrant or not checkpointed or type(out) is Output  # the reentrant one returns plain tuples
        out[0].backward()
        gradients.append([inputs.grad, *(p.grad for p in module.parameters())])
    assert all(torch.equal(a, b) and a.norm() > 0 for a, b in zip(*gradients, strict=True))
