"""Heads of PEFT's models: their own logits and gradients, with adapters on the output layer."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import truth
from tiny_models import tiny
from torch import nn

import kdkernels as kd
from kdkernels.sources.adapted import AdaptedHead

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
HEAD = ["lm_head"]


def lora(**options) -> peft.LoraConfig:
    return peft.LoraConfig(**{"target_modules": HEAD, "r": 4, "lora_alpha": 12, **options})


# name -> (the adapter's configuration, what it is of)
ADAPTERS = {
    "lora": lora(),
    "rslora": lora(use_rslora=True),
    "lora with a bias": lora(lora_bias=True),
    "lora of the trunk too": lora(target_modules=["lm_head", "q_proj"]),
    "dora": lora(use_dora=True),
    "ia3": peft.IA3Config(target_modules=HEAD, feedforward_modules=[]),
    "ia3 of the input": peft.IA3Config(target_modules=HEAD, feedforward_modules=HEAD),
    "modules_to_save": peft.LoraConfig(target_modules=["q_proj"], modules_to_save=HEAD),
    "trainable tokens": peft.TrainableTokensConfig(target_modules=HEAD, token_indices=[3, 5, 96]),
    "loha": peft.LoHaConfig(target_modules=HEAD, r=4),
    "vera": peft.VeraConfig(target_modules=HEAD, r=4),
    "adalora": peft.AdaLoraConfig(target_modules=HEAD, total_step=100),
    "boft": peft.BOFTConfig(target_modules=HEAD, boft_block_size=4),
    "deft": peft.DeftConfig(target_modules=HEAD, r=4),
    "fourierft": peft.FourierFTConfig(target_modules=HEAD),
    "hira": peft.HiraConfig(target_modules=HEAD, r=4),
    "hra": peft.HRAConfig(target_modules=HEAD, r=4),
    "kasa": lora(kasa_config=peft.tuners.lora.config.KasaConfig()),
    "lokr": peft.LoKrConfig(target_modules=HEAD, r=4),
    "miss": peft.MissConfig(target_modules=HEAD, r=4),
    "oft": peft.OFTConfig(target_modules=HEAD, oft_block_size=4, r=0),
    "randlora": peft.RandLoraConfig(target_modules=HEAD, r=4),
    "shira": peft.ShiraConfig(target_modules=HEAD, r=4),
}
LOW_RANK = [name for name in ADAPTERS if name.startswith(("lora", "rslora"))]


def shaken(model: nn.Module) -> nn.Module:
    """Adapters begin with no effect: random numbers in all that is trained."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def adapted(config, kind: str = "llama", dtype: torch.dtype = F64, **needs) -> nn.Module:
    model = tiny(kind, **{"tie_word_embeddings": False, **needs}).to(dtype)
    return shaken(peft.get_peft_model(model, copy.deepcopy(config)).eval())


def hidden_and_logits(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 90, (2, 5), generator=torch.Generator().manual_seed(2))
    base = model.get_base_model()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    return base.base_model(**inputs).last_hidden_state, model(**inputs).logits


MASK = torch.tensor([[False, True, True, True, False], [True, True, True, True, True]])
OBJECTIVES = {
    "GKD": lambda: kd.GKD(beta=0.3),
    "TSDKD": lambda: kd.TSDKD(k=4, opener=0.5),
    "SFT": kd.SFT,
}


def loss(objective, student: kd.sources.Source, **more) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    if objective.needs_target:
        more["target"] = torch.randint(0, 97, (2, 5), generator=generator)
    teacher = torch.randn(2, 5, 97, generator=generator, dtype=F64).to(student.dtype)
    return objective(student, kd.Logits(teacher) if objective.needs_teacher else None, MASK, **more).loss


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(value: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    """Those that there are; the adapters of the output layer have to be among them."""
    parameters = trained(model)
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}


def check(model: nn.Module, objective, rtol: float = 1e-9, **more) -> kd.Head:
    """Value and gradients through the head are those of the model's own logits."""
    hidden, logits = hidden_and_logits(model)
    expected = loss(objective, kd.Logits(logits))
    wanted = gradients(expected, model)
    hidden, _ = hidden_and_logits(model)
    head = kd.Head.from_model(model, hidden)
    got = loss(objective, head, **more)
    assert truth.relative(got.detach(), expected.detach()) < rtol
    found = gradients(got, model)
    assert found.keys() == wanted.keys() and any("lm_head" in name for name in found)
    for name, gradient in found.items():
        assert truth.relative(gradient, wanted[name]) < 10 * rtol, name
    return head


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("objective", ["GKD", *(pytest.param(n, marks=pytest.mark.slow) for n in ("TSDKD", "SFT"))])
def test_every_adapter(objective, name):
    model = adapted(ADAPTERS[name]).train()  # no dropout is set
    head = check(model, OBJECTIVES[objective](), 1e-7 if name == "deft" else 1e-9)  # DEFT computes in fp32
    assert isinstance(head, AdaptedHead) == (name in LOW_RANK)


@pytest.mark.parametrize("kind", ["granite", "gemma2", "minicpm3", "phi", "cohere"])
@pytest.mark.parametrize("name", ["lora with a bias", "dora", "ia3"])
def test_what_the_model_does_besides(kind, name):
    """Scales, a soft-cap, scaled hidden states, a bias."""
    if kind == "phi" and name == "lora with a bias":
        name = "lora"  # PEFT has no lora_bias there
    check(adapted(ADAPTERS[name], kind), kd.GKD())


def test_several_adapters():
    """Active together, one after the other, merged, disabled."""
    model = adapted(ADAPTERS["lora"])
    model.add_adapter("second", lora(r=2, lora_alpha=3))
    model.base_model.set_adapter(["default", "second"])
    head = check(shaken(model), kd.GKD())
    assert head.inner.shape[-1] == 6
    model.set_adapter("second")
    assert check(model, kd.GKD()).outer is model.get_base_model().lm_head.lora_B["second"].weight
    layer = model.get_base_model().lm_head
    with model.disable_adapter():
        hidden, logits = hidden_and_logits(model)
        plain = kd.Head.from_model(model, hidden)
    assert not isinstance(plain, AdaptedHead) and plain.weight is layer.base_layer.weight
    assert torch.equal(torch.nn.functional.linear(hidden, plain.weight), logits)
    model.merge_adapter()
    hidden, logits = hidden_and_logits(model)
    merged = kd.Head.from_model(model, hidden)
    torch.testing.assert_close(torch.nn.functional.linear(hidden, merged.weight), logits)
    assert merged.weight is layer.base_layer.weight
    layer.enable_adapters(False)  # the next forward would first take the adapter out of the weight
    with pytest.raises(TypeError, match=r"disabled but still merged: call unmerge_adapter\(\)"):
        kd.Head.from_model(model, hidden)


def test_modules_to_save():
    """The active adapter's copy, which is trained; the original otherwise."""
    model = adapted(ADAPTERS["modules_to_save"])
    wrapper = model.get_base_model().lm_head
    copy_of_it, hidden = wrapper.modules_to_save["default"], torch.zeros(1, 16, dtype=F64)
    assert kd.Head.from_model(model, hidden).weight is copy_of_it.weight and copy_of_it.weight.requires_grad
    with model.disable_adapter():
        assert kd.Head.from_model(model, hidden).weight is wrapper.original_module.weight
    model.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"]))  # which saves no head
    model.set_adapter("second")
    _, logits = hidden_and_logits(model)
    head = kd.Head.from_model(model, hidden_and_logits(model)[0])
    torch.testing.assert_close(torch.nn.functional.linear(head.hidden, head.weight), logits)


def test_dropout():
    """That of LoRA falls on the hidden states, as in the layer; with others the weight would be another for each."""
    model = adapted(lora(lora_dropout=0.5)).train()
    hidden, layer = torch.randn(2, 5, 16, dtype=F64), model.get_base_model().lm_head
    torch.manual_seed(5)
    expected = gradients(loss(kd.GKD(), kd.Logits(layer(hidden))), model)
    torch.manual_seed(5)
    found = gradients(loss(kd.GKD(), kd.Head.from_model(model, hidden)), model)
    assert found.keys() == expected.keys() and len(found) == 2
    for name, gradient in found.items():
        assert truth.relative(gradient, expected[name]) < 1e-9
    model = adapted(lora(lora_dropout=0.5, use_dora=True)).train()
    with pytest.raises(TypeError, match=r"has lora_dropout\.default; set it to 0 or call \.eval\(\)"):
        kd.Head.from_model(model, hidden)
    check(model.eval(), kd.GKD())


@pytest.mark.parametrize("name", ["lora", "dora", "trainable tokens"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_weight_below_is_trained_too(name, tied):
    model = adapted(ADAPTERS[name], tie_word_embeddings=tied)
    model.get_base_model().lm_head.base_layer.weight.requires_grad_()
    check(model, kd.GKD())


def test_tied_trainable_tokens():
    """PEFT puts them over both the embedding and the head."""
    model = adapted(
        peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 5]), tie_word_embeddings=True
    )
    hidden, logits = hidden_and_logits(model)
    head = kd.Head.from_model(model, hidden)
    torch.testing.assert_close(torch.nn.functional.linear(hidden, head.weight), logits)
    expected = gradients(loss(kd.GKD(), kd.Logits(logits)), model)
    found = gradients(loss(kd.GKD(), head), model)
    assert found.keys() == expected.keys() and any("trainable_tokens" in name for name in found)
    for name, gradient in found.items():
        assert truth.relative(gradient, expected[name]) < 1e-8


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"alora_invocation_tokens": [5, 6]}, "ALoraLinearVariant"),
        ({"velora_config": peft.tuners.lora.config.VeloraConfig(num_groups=4)}, "VeloraLinearVariant"),
    ],
    ids=lambda x: None if isinstance(x, dict) else x,
)
def test_variants_that_are_more_than_a_weight(options, named):
    model = adapted(lora(**options))
    with pytest.raises(TypeError, match=rf"no kd.Head is LlamaForCausalLM.*an adapter of the kind {named}.*kd\.Logits"):
        kd.Head.from_model(model, torch.zeros(1, 16, dtype=F64))


@pytest.mark.parametrize("name", ["lily", "a class of one's own", "two tuners"])
def test_what_is_not_known_to_be_linear_is_refused(name):
    """Lily routes: in 16 bits its curvature would be lost in rounding, so nothing is measured."""
    model = adapted(peft.LilyConfig(target_modules=HEAD, r=4) if name == "lily" else ADAPTERS["ia3"])
    layer = model.get_base_model().lm_head
    if name == "a class of one's own":
        layer.__class__ = type("Bent", (type(layer),), {})
    if name == "two tuners":
        layer.base_layer = copy.deepcopy(layer)
    with pytest.raises(
        TypeError, match=r"(lily|Bent|ia3).*, is not known to be linear in the hidden states.*kd\.Logits"
    ):
        kd.Head.from_model(model, torch.zeros(1, 16, dtype=F64))


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "modules_to_save"])
def test_hidden_states_that_do_not_fit(name):
    model = adapted(ADAPTERS[name])
    for hidden in (torch.zeros(1, 15, dtype=F64), torch.zeros(1, 16), torch.zeros(1, 16, dtype=F64, device="meta")):
        with pytest.raises((TypeError, ValueError), match=r"hidden: expected|weight: expected|does not run on these"):
            kd.Head.from_model(model, hidden)


def test_a_bias_beside_an_effective_weight():
    model = adapted(lora(kasa_config=peft.tuners.lora.config.KasaConfig()))
    model.get_base_model().lm_head.lora_B["default"].bias = nn.Parameter(torch.randn(97, dtype=F64))
    with pytest.raises(TypeError, match=r"has a bias of its own, lora_B\.default\.bias.*kd\.Logits"):
        kd.Head.from_model(model, torch.zeros(1, 16, dtype=F64))


@pytest.mark.parametrize("name", ["loha", "boft"])
def test_peft_has_dropouts_of_its_own(name):
    config = {
        "loha": peft.LoHaConfig(target_modules=HEAD, r=4, rank_dropout=0.5),
        "boft": peft.BOFTConfig(target_modules=HEAD, boft_block_size=4, boft_dropout=0.5),
    }[name]
    model = adapted(config).train()
    with pytest.raises(TypeError, match=r"has (rank_dropout|boft_dropout)[.\w]*; set it to 0 or call \.eval\(\)"):
        kd.Head.from_model(model, torch.zeros(1, 16, dtype=F64))
    check(model.eval(), kd.GKD())


def test_hooks_and_forwards_inside_an_adapter():
    model, hidden = adapted(ADAPTERS["lora"]), torch.zeros(1, 16, dtype=F64)
    layer = model.get_base_model().lm_head
    handle = layer.lora_A["default"].register_forward_hook(lambda module, arguments, output: 2 * output)
    with pytest.raises(TypeError, match="its output layer has a hook, test_peft"):
        kd.Head.from_model(model, hidden)
    handle.remove()
    layer.base_layer.forward = lambda x: x
    with pytest.raises(TypeError, match="its output layer's forward was replaced by test_peft"):
        kd.Head.from_model(model, hidden)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("name", ["lora", "dora", "modules_to_save"])
def test_adapters_in_fp32_over_a_narrow_model(name, dtype, monkeypatch):
    """PEFT's default: the error of value and gradients is that of the model's own logits."""
    narrow = adapted(ADAPTERS[name], dtype=dtype)
    kinds = {p.dtype for n, p in narrow.named_parameters() if "lora_" in n}
    assert kinds == {F32}
    wide = copy.deepcopy(narrow).double()
    hidden = hidden_and_logits(narrow)[0].detach()
    layers = narrow.get_base_model().lm_head, wide.get_base_model().lm_head
    true = loss(kd.GKD(), kd.Logits(layers[1](hidden.double())))
    own = loss(kd.GKD(), kd.Logits(layers[0](hidden)))
    got = loss(kd.GKD(), kd.Head.from_model(narrow, hidden))
    truth.assert_accurate(got.detach(), own.detach(), true.detach(), "loss", dtype, slack=2)
    true, own, got = gradients(true, wide), gradients(own, narrow), gradients(got, narrow)
    assert got.keys() == true.keys()
    for key, gradient in got.items():
        truth.assert_accurate(gradient, own[key], true[key], key, dtype, slack=2)


def test_autocast():
    model = adapted(ADAPTERS["lora"], dtype=F32)
    wide, hidden = copy.deepcopy(model).double(), hidden_and_logits(model)[0].detach()
    true = gradients(loss(kd.GKD(), kd.Logits(wide.get_base_model().lm_head(hidden.double()))), wide)
    with torch.autocast("cpu", dtype=BF16):
        own = gradients(loss(kd.GKD(), kd.Logits(model.get_base_model().lm_head(hidden))), model)
        got = gradients(loss(kd.GKD(), kd.Head.from_model(model, hidden)), model)
    for name, gradient in got.items():
        assert gradient.dtype == F32
        truth.assert_accurate(gradient, own[name], true[name], name, BF16, slack=2)


def test_in_one_graph_and_without_values():
    model = adapted(ADAPTERS["lora"], dtype=F32)
    hidden = torch.randn(2, 5, 16)

    def total(states):
        return kd.entropy(kd.Head.from_model(model, states)).sum()

    compiled = torch.compile(total, fullgraph=True, backend="eager")(hidden)
    torch.testing.assert_close(compiled, total(hidden), rtol=1e-5, atol=1e-4)
    for name in ("lora", "dora", "modules_to_save"):
        absent = adapted(ADAPTERS[name], dtype=F32).to("meta")
        assert kd.Head.from_model(absent, hidden.to("meta")).vocabulary == 97
