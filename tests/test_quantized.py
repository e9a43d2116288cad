"""Quantised and offloaded output layers: their values as a frozen head, or a refusal by name.

With stand-ins everywhere; with bitsandbytes and torchao themselves where they are installed.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch
import truth
from tiny_models import tiny
from torch import nn

import kdkernels as kd
from kdkernels.sources.adapted import AdaptedHead

# transformers and PEFT look for both packages, whose imports warn
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
IDS = torch.arange(10).reshape(2, 5) * 7 % 90 + 3
TEACHER = torch.linspace(-3, 3, 2 * 5 * 97).reshape(2, 5, 97).sin() * 3
MASK = torch.ones(2, 5, dtype=torch.bool)


def llama(dtype=torch.float32, width: int = 64) -> nn.Module:
    return tiny("llama", tie_word_embeddings=False, hidden_size=width).to(dtype)


def loss(student) -> torch.Tensor:
    return kd.GKD(beta=0.4)(student, kd.Logits(TEACHER.to(student.dtype)), MASK).loss


def check(model) -> kd.Head:
    """Value and the gradient of the trunk are those of the model's own logits; the head itself gets none."""
    trunk = [p for n, p in model.named_parameters() if "norm" in n and p.requires_grad]
    logits = model(IDS, use_cache=False).logits
    head = kd.Head.of(model, input_ids=IDS)
    expected, got = loss(kd.Logits(logits)), loss(head)
    assert truth.relative(got.detach(), expected.detach()) < 1e-5
    for mine, its in zip(torch.autograd.grad(got, trunk), torch.autograd.grad(expected, trunk), strict=True):
        assert its.norm() > 0 and truth.relative(mine, its) < 1e-4
    assert head.verify(model, input_ids=IDS) < 1e-4
    assert not head.weight.requires_grad
    return head


def refused(model, told: str) -> None:
    with pytest.raises(TypeError, match=rf"^model: no kd\.Head is LlamaForCausalLM.*{told}.*kd\.Logits"):
        kd.Head.from_model(model, torch.zeros(1, model.config.hidden_size))


# ---- stand-ins ---


class Packed(torch.Tensor):
    """Like torchao's: values are computed when they are needed."""

    __module__ = "torchao.quantization"

    @staticmethod
    def __new__(cls, values, **fields):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values, **fields):
        self.values = values
        self.__dict__.update({"act_quant_kwargs": None, **fields})

    def dequantize(self):
        return self.values

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        if function is torch.ops.aten.detach.default:
            return arguments[0]
        unpacked = [each.values if isinstance(each, cls) else each for each in arguments]
        return function(*unpacked, **options or {})


def packed(model, **fields) -> nn.Module:
    layer = model.lm_head
    values = (layer.weight.detach() * 16).round() / 16
    layer.weight = nn.Parameter(Packed(values, **fields), requires_grad=fields.pop("trained", False))
    return model


class State:
    """Like bitsandbytes': what its bits say."""

    def __init__(self, values):
        self.values = values


class Linear4bit(nn.Linear):
    """Like bitsandbytes': packed bits of another shape, and a forward of its own."""

    __module__ = "bitsandbytes.nn.modules"

    def forward(self, hidden):
        return nn.functional.linear(hidden, self.weight.quant_state.values)


def four_bits(model, monkeypatch) -> nn.Module:
    layer = model.lm_head
    values = (layer.weight.detach() * 16).round() / 16
    layer.weight = nn.Parameter(torch.zeros(values.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    layer.weight.quant_state, layer.__class__ = State(values), Linear4bit
    functional = types.SimpleNamespace(dequantize_4bit=lambda data, state: state.values)
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.SimpleNamespace(functional=functional))
    return model


def test_the_values_of_torchao_s_weights():
    model = packed(llama())
    assert torch.equal(check(model).weight, model.lm_head.weight.values)
    refused(packed(llama(), act_quant_kwargs=object()), r"Packed quantizes hidden states too \(act_quant_kwargs\)")
    trained = packed(llama())
    trained.lm_head.weight.requires_grad_()
    refused(trained, "Packed is quantized and trained: leave the output layer out of the quantization")


def test_the_values_of_bitsandbytes_four_bits(monkeypatch):
    model = four_bits(llama(), monkeypatch)
    assert check(model).weight.shape == (97, 64)
    model.lm_head.weight.quant_state.packing_format_for_cpu = True
    refused(model, r"repacked its output layer.*load it again and call \.train\(\), or leave the output layer out")
    model.lm_head.weight.quant_state = None
    refused(model, "not quantized yet: move the model to its device first")


def test_other_quantized_layers_are_refused_by_their_class():
    class Linear8bitLt(nn.Linear):  # rounds hidden states
        def forward(self, hidden):
            return super().forward(hidden.round())

    model = llama()
    model.lm_head.__class__ = Linear8bitLt
    with pytest.raises(TypeError, match=r"expected a plain torch\.nn\.Linear.*got Linear8bitLt.*kd\.Logits"):
        kd.Head.from_model(model, torch.zeros(1, 64))


def test_offloaded_layers(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(llama().eval(), execution_device="cpu")
    with torch.no_grad():
        hidden = kd.hidden_states(model, input_ids=IDS)
    assert model.lm_head.weight.is_meta and hidden.std() > 0
    refused(model, "accelerate has offloaded its output layer.*a device in device_map")


# ---- the packages themselves ----


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes")


def in_four_bits(model, bitsandbytes) -> nn.Module:
    old = model.lm_head
    model.lm_head = bitsandbytes.nn.Linear4bit(64, 97, bias=False, quant_type="nf4", compute_dtype=old.weight.dtype)
    model.lm_head.load_state_dict({"weight": old.weight.detach()})
    model.lm_head.weight.requires_grad = False
    return model.to("cpu")  # where it quantizes


@pytest.mark.parametrize("adapter", [None, "lora", "dora"])
def test_bitsandbytes(bitsandbytes, adapter):
    model = in_four_bits(llama(), bitsandbytes)
    if adapter:
        model = with_adapter(model, use_dora=adapter == "dora")
        assert isinstance(check_adapter(model), AdaptedHead) == (adapter == "lora")
    else:
        check(model)


@pytest.mark.parametrize("adapter", [False, True])
def test_torchao(adapter):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    def quantized(config):
        model = llama()
        quantize_(model, config, filter_fn=lambda module, name: name == "lm_head")
        assert type(model.lm_head.weight) is not nn.Parameter
        return with_adapter(model) if adapter else model

    model = quantized(Int8WeightOnlyConfig())
    assert isinstance(check_adapter(model), AdaptedHead) if adapter else check(model)
    refused(quantized(Int8DynamicActivationInt8WeightConfig()), "quantizes hidden states too")


def with_adapter(model, **options):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"], r=4, **options)).train()
    torch.manual_seed(1)
    nn.init.normal_(model.get_base_model().lm_head.lora_B["default"].weight, std=0.1)
    return model


def check_adapter(model) -> kd.Head:
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(loss(kd.Logits(model(IDS, use_cache=False).logits)), trained)
    head = kd.Head.of(model, input_ids=IDS)
    for mine, its in zip(torch.autograd.grad(loss(head), trained), expected, strict=True):
        assert its.norm() > 0 and truth.relative(mine, its) < 1e-4
    return head
