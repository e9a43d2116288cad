"""What is trained is the model's own distribution, and its own loss for the experts' load is part of the loss."""

import deepspeed
import pytest
import torch
from tiny_models import KINDS, UNBUILDABLE, tiny
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers import BambaForCausalLM, Llama4Config, MllamaConfig, Qwen2ForCausalLM

import kdkernels as kd
from kdkernels.data import collate
from kdkernels.data.tokenizers import vocabulary_size
from kdkernels.distillation import Distillation, router_loss
from kdkernels.sources.hidden import trunk_output
from kdkernels.training import InputError, deepspeed_strategy, train
from kdkernels.training.dry_run import plan
from kdkernels.training.models.agreement import check_model
from kdkernels.training.models.loading import load_tokenizer
from kdkernels.training.processes import distributed
from kdkernels.training.run.metrics import read_metrics


def set_everywhere(model, **options):
    """In the config, the text config and the model's own copies."""
    for holder in (model.config, model.config.get_text_config(), model):
        for name, value in options.items():
            if hasattr(holder, name):
                setattr(holder, name, value)


def with_routers(kind: str):
    model = tiny(kind)
    set_everywhere(model, output_router_logits=True, router_aux_loss_coef=0.5, aux_loss_coef=0.5)
    return model


def test_the_loss_is_the_models_own():
    """A mixture of experts with SFT, against its own forward with labels: the loss and every gradient."""
    model = with_routers("mixtral").train()
    batch = collate([[5, 6, 7]], [[8, 9, 2]], pad_id=0)
    labels = batch.input_ids.clone()
    labels[:, :3] = -100
    own = model(batch.input_ids, attention_mask=batch.attention_mask, labels=labels)
    parameters = dict(model.named_parameters())
    expected = torch.autograd.grad(own.loss, parameters.values())
    assert own.aux_loss > 0.5

    out = Distillation(model, kd.SFT(), model.config.vocab_size)(**batch.fields(by_author=False))
    torch.testing.assert_close(out.loss, own.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.metrics["router_loss"], 0.5 * own.aux_loss.detach(), rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(out.loss, parameters.values())
    for name, got, right in zip(parameters, gradients, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")

    set_everywhere(model, output_router_logits=False)  # then its own forward leaves it out as well
    own = model(batch.input_ids, attention_mask=batch.attention_mask, labels=labels)
    out = Distillation(model, kd.SFT(), model.config.vocab_size)(**batch.fields(by_author=False))
    torch.testing.assert_close(out.loss, own.loss, rtol=1e-5, atol=1e-6)
    assert "router_loss" not in out.metrics


# In two layers these have no routers of their own, and with output_router_logits their own forward fails.
WITHOUT_ROUTERS = ("deepseek_v4", "flint")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in (*UNBUILDABLE, *WITHOUT_ROUTERS)])
def test_every_router_loss(kind):
    model = with_routers(kind)
    if not hasattr(model.config.get_text_config(), "output_router_logits"):
        assert not hasattr(model.config.get_text_config(), "router_aux_loss_coef")
        return
    batch = collate([[5, 6, 7], [8, 5]], [[8, 9, 2], [3]], pad_id=0)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    own = model(**batch.inputs, labels=labels, use_cache=False)
    logits = own.logits[:, :-1].flatten(0, 1).float()
    expected = own.loss - functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)
    routers = router_loss(model, trunk_output(model, batch.inputs), batch.attention_mask)
    torch.testing.assert_close(torch.zeros(()) if routers is None else routers, expected, rtol=1e-4, atol=1e-5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if expected.item() > 0.1:
        right = torch.autograd.grad(expected, parameters, allow_unused=True)
        got = torch.autograd.grad(routers, parameters, allow_unused=True)
        for a, b in zip(got, right, strict=True):
            a, b = (torch.zeros(()) if g is None else g for g in (a, b))
            assert (a - b).abs().max() < 1e-4 * (1 + b.abs().max())
        assert max(g.abs().max() for g in got if g is not None) > 1e-5


ROUTED = (
    'student.architecture={model_type="mixtral", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, '
    "num_key_value_heads=1, intermediate_size=32, num_local_experts=4, output_router_logits=true, "
    "router_aux_loss_coef=2.0}"
)


@pytest.mark.parametrize("objective", ["SFT", "GKD"])
def test_a_run_trains_the_router_loss(load, teacher_set, objective):
    on_policy = ("objective.name=GKD", teacher_set) if objective == "GKD" else ()
    result = train(load(ROUTED, "train.steps=2", *on_policy))
    for line in read_metrics(result.output / "metrics.jsonl"):
        assert line["router_loss"] > 1.9  # 2 for experts of equal load
        term = line["cross_entropy"] if objective == "SFT" else line["direct"]
        assert line["loss"] == pytest.approx(term + line["router_loss"], rel=0.2)
        assert line["loss"] > line["router_loss"] + 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "granite", "phi", "llama4_text", "mllama", "inkling_text"])
def test_models_that_agree(kind, dtype):
    model = tiny(kind).to(dtype).train()
    state = torch.get_rng_state()
    check_model("[student] path", model, (5, 6), trained=True)
    assert model.training and torch.equal(torch.get_rng_state(), state)


class Shifted(Qwen2ForCausalLM):
    """Gives its base model other tokens than it got: no stand-in for the base model can see that."""

    def forward(self, input_ids=None, **options):
        return super().forward(input_ids=input_ids + self.config.shift, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_distribution_is_refused_with_its_difference(dtype):
    model = tiny("qwen2").to(dtype)
    model.__class__, model.config.shift = Shifted, 0
    check_model("[teacher] path", model, (5, 6), trained=False)
    model.config.shift = 1
    expected = r"\[teacher\] path: Shifted \(model_type qwen2\): .* differ from .* head by up to ([0-9.]+) \(of"
    with pytest.raises(InputError, match=expected):
        check_model("[teacher] path", model, (5, 6), trained=False)


def test_a_term_of_the_loss_that_training_does_not_know_is_refused():
    model = tiny("bamba")
    assert isinstance(model, BambaForCausalLM)
    check_model("[student] path", model, (5, 6), trained=True)
    model.z_loss_coefficient = 0.1
    check_model("[teacher] path", model, (5, 6), trained=False)
    with pytest.raises(
        InputError, match=r"BambaForCausalLM \(model_type bamba\): its own loss .* z_loss_coefficient = 0"
    ):
        check_model("[student] path", model, (5, 6), trained=True)


def test_a_model_that_needs_more_in_training_than_token_ids_is_refused():
    model = tiny("reformer")
    check_model("[teacher] path", model, (5, 6), trained=False)
    expected = r"ReformerModelWithLMHead \(model_type reformer\): .*If training, make sure that config"
    with pytest.raises(InputError, match=expected):
        check_model("[student] path", model.train(), (5, 6), trained=True)


def sharded(module: Distillation, how: str):
    if how == "FSDP2":
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for layer in module.student.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(module, mesh=mesh)
    settings = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}
    return deepspeed.initialize(model=module, config=settings)[0]


@pytest.mark.filterwarnings("ignore:.*all_gather_into_tensor:FutureWarning")  # DeepSpeed's
@pytest.mark.parametrize("how", ["FSDP2", "ZeRO-3"])
def test_shards_are_gathered_where_the_head_is_read(how, monkeypatch):
    monkeypatch.setattr(functional, "linear", functional.linear)  # put back afterwards: ZeRO-3 leaves its own there
    distributed.start()
    deepspeed_strategy.join()
    batch = collate([[5, 6, 7], [5, 6]], [[8, 9, 2], [3, 2]], pad_id=0)
    expected = Distillation(tiny("gemma2"), kd.SFT(), 97)(**batch.fields(by_author=False))
    module = sharded(Distillation(tiny("gemma2"), kd.SFT(), 97), how)
    weight = (module if how == "FSDP2" else module.module).student.lm_head.weight
    assert isinstance(weight, DTensor) if how == "FSDP2" else weight.shape == (0,)
    with pytest.raises(TypeError, match=r"weight: .*(from_model|GatheredParameters)"):
        kd.Head(torch.zeros(1, 16), weight)
    torch.testing.assert_close(module(**batch.fields(by_author=False)).loss, expected.loss)


@pytest.fixture
def changed(monkeypatch):
    """Every Qwen2's own forward makes other logits than its head does, as a patched library would."""
    original = Qwen2ForCausalLM.forward

    def forward(self, input_ids=None, **options):
        output = original(self, input_ids=input_ids, **options)
        if input_ids is not None and input_ids.any():  # not for the stand-ins' zeros
            output.logits = output.logits * 1.1
        return output

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", forward)


def test_training_ends_before_its_first_step(load, changed, tmp_path):
    expected = r"^\[student\] architecture: Qwen2ForCausalLM \(model_type qwen2\): .* differ"
    with pytest.raises(InputError, match=expected):
        train(load())
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_a_teacher_that_is_another_distribution(load, teacher_set, changed):
    overrides = 'student.architecture={model_type="gpt2", n_embd=16, n_layer=1, n_head=2}'
    with pytest.raises(InputError, match=r"^\[teacher\] path: Qwen2ForCausalLM \(model_type qwen2\): .* differ"):
        train(load(overrides, "objective.name=GKD", "student.pad_vocab_to=7", teacher_set))


@pytest.fixture
def saved(load, tmp_path):
    """saved(kind, **options): the path of a tiny model of that kind with the recipe's tokenizer."""

    def saved(kind: str, **options) -> str:
        tokenizer, path = load_tokenizer(load()), tmp_path / kind
        text = {"vocab_size": vocabulary_size(tokenizer), **TOKENS}
        model = tiny(kind, **({"text_config": text} if kind in WHOLE else text), **options)
        model.save_pretrained(path)
        if kind in WHOLE:  # as the checkpoints have it, beside the vision tower's
            WHOLE[kind](text_config=model.config.to_dict()).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return str(path)

    return saved


TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WHOLE = {"llama4": Llama4Config, "mllama": MllamaConfig}


@pytest.mark.parametrize("kind", ["llama4_text", "llama4", "mllama"])
def test_a_base_model_of_another_name(load, saved, kind):
    """Llama 4's and Mllama's text models name a base model that they do not have."""
    overrides = ("objective.name=GKD", f"teacher.path={saved(kind)}", "train.steps=1")
    plan(load(*overrides))
    (line,) = read_metrics(train(load(*overrides)).output / "metrics.jsonl")
    assert line["student_entropy"] != line["teacher_entropy"] > 0.1


def test_the_dry_run_refuses_what_training_would(load, saved):
    path = saved("bert", is_decoder=True)
    for act in (plan, train):
        with pytest.raises(InputError, match=r"\[teacher\] path: .*BertLMHeadModel \(model_type bert\)"):
            act(load("objective.name=GKD", f"teacher.path={path}"))
