"""kd.hidden_states: with the head of the model they are the model's own logits."""

import pytest
import torch
from tiny_models import VOCABULARY, tiny
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    CLIPVisionConfig,
    LlavaConfig,
    Qwen2Config,
)

import kdkernels as kd
from kdkernels.sources.hidden import has_encoder

IDS = torch.tensor([[5, 6, 7, 8], [9, 4, 3, 0]])
ATTENTION = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
TEXT = {"input_ids": IDS, "attention_mask": ATTENTION}


def agree(model, hidden, logits):
    """The head over the hidden states gives log-probabilities as the logits do, at the positions that count."""
    target = torch.arange(hidden.shape[0] * hidden.shape[1]).view(hidden.shape[:2]) % 90
    got = kd.cross_entropy(kd.Head.from_model(model, hidden), target)
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    torch.testing.assert_close(got.flatten(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "gemma2", "phi", "mixtral", "mamba2", "llama4_text", "opt"])
def test_causal(kind):
    model = tiny(kind)
    hidden = kd.hidden_states(model, **TEXT, labels=IDS)
    assert hidden.shape == (2, 4, model.get_output_embeddings().in_features) and hidden.requires_grad
    agree(model, hidden, model(**TEXT).logits)


def test_packed_texts():
    """Two texts in a row see each other no more than in rows of their own."""
    model, positions = tiny("qwen2"), torch.tensor([[0, 1, 0, 1]] * 2)
    packed = kd.hidden_states(model, input_ids=IDS, position_ids=positions)
    torch.testing.assert_close(packed.reshape(4, 2, -1), kd.hidden_states(model, input_ids=IDS.reshape(4, 2)))
    assert (packed - kd.hidden_states(model, input_ids=IDS)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["t5", "mt5", "bart", "mbart", "pegasus", "switch_transformers", "blenderbot"])
@pytest.mark.parametrize("given", ["labels", "decoder_input_ids"])
def test_encoder_decoder(kind, given):
    """The decoder's hidden states, of labels as the model's own forward shifts them or of its inputs."""
    model = tiny(kind, AutoModelForSeq2SeqLM)
    model.config.decoder_start_token_id = 1
    assert has_encoder(model)
    decoder = torch.tensor([[3, 8, 2], [7, 5, -100]])
    inputs = {**TEXT, given: decoder if given == "labels" else decoder.abs() % 90}
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    hidden = kd.hidden_states(model, **inputs)
    assert hidden.shape[:2] == (2, 3) and hooks == sum(len(module._forward_hooks) for module in model.modules())
    own = model(**inputs, output_hidden_states=True)
    last = own.decoder_hidden_states[-1]
    torch.testing.assert_close(hidden, last)
    assert (own.encoder_last_hidden_state.abs().sum() > 0) and hidden.requires_grad
    layer = model.get_output_embeddings()
    factor = kd.Head.from_model(model, hidden).scale if kind in ("t5", "mt5", "switch_transformers") else 1.0
    logits = factor * nn.functional.linear(last, layer.weight) + getattr(model, "final_logits_bias", 0)
    torch.testing.assert_close(logits, own.logits, rtol=1e-4, atol=1e-4)


def vision():
    text = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    eyes = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    config = LlavaConfig(text_config=text, vision_config=eyes, image_token_id=96)
    return AutoModelForImageTextToText.from_config(config).eval()


def test_vision_language():
    model = vision()
    ids = torch.tensor([[5, 96, 96, 96, 96, 7]])
    images = torch.randn(2, 1, 3, 8, 8)
    found = []
    for pixels in images:
        hidden = kd.hidden_states(model, input_ids=ids, pixel_values=pixels)
        agree(model, hidden, model(input_ids=ids, pixel_values=pixels).logits)
        found.append(hidden)
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", [None, torch.bfloat16])
def test_dtype_and_autocast_of_the_own_forward(dtype, cast):
    model = tiny("qwen2").to(dtype)
    if cast is not None:
        model.forward = torch.autocast("cpu", cast)(type(model).forward).__get__(model)
    with torch.no_grad():
        hidden = kd.hidden_states(model, **TEXT)
        own = model(**TEXT, output_hidden_states=True).hidden_states[-1]
        assert hidden.dtype == own.dtype and torch.equal(hidden, own)
        assert not torch.is_autocast_enabled("cpu")
    if cast is not None:  # with gradients on, the head belongs into autocast as well
        with pytest.raises(RuntimeError, match=r"autocast not entered.*kd\.through"):
            kd.hidden_states(model, **TEXT)
        assert torch.equal(kd.through(model, kd.hidden_states, model, **TEXT), own)


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_a_wrapper_outside_of_its_forward_is_refused():
    model = tiny("qwen2")
    wrapper, expected = Wrapper(model), kd.hidden_states(model, **TEXT)
    for outside in (wrapper, torch.compile(wrapper, backend="eager"), Wrapper(torch.compile(model, backend="eager"))):
        with pytest.raises(RuntimeError, match=r"model: .*Wrapper.*kd\.through\(wrapper, function"):
            kd.hidden_states(outside, **TEXT)
        assert torch.equal(kd.through(outside, lambda w: kd.hidden_states(w, **TEXT), outside), expected)
        with torch.no_grad():
            assert torch.equal(kd.hidden_states(outside, **TEXT), expected)
    assert torch.equal(kd.hidden_states(torch.compile(model, backend="eager"), **TEXT), expected)


def test_inside_a_graph_of_torch_compile():
    model = tiny("qwen2")
    compiled = torch.compile(lambda: kd.hidden_states(model, **TEXT), backend="eager", fullgraph=True)
    assert torch.equal(compiled(), kd.hidden_states(model, **TEXT))


OLD_NAME = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's use


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


@OLD_NAME
def test_peft(peft):
    model = peft.get_peft_model(tiny("qwen2"), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    hidden = kd.hidden_states(model, **TEXT)
    agree(model, hidden, model(**TEXT).logits)
    with model.disable_adapter():
        assert (kd.hidden_states(model, **TEXT) - hidden).abs().max() > 1e-3


@OLD_NAME
@pytest.mark.parametrize(
    ("config", "name"),
    [
        (lambda peft: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PROMPT_TUNING"),
        (lambda peft: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PREFIX_TUNING"),
        (lambda peft: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "P_TUNING"),
        (
            lambda peft: peft.LoraConfig(
                task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], alora_invocation_tokens=[5, 6]
            ),
            "activated LoRA",
        ),
    ],
)
def test_prompt_learning_is_refused(peft, config, name):
    model = peft.get_peft_model(tiny("qwen2"), config(peft))
    for wrapped in (model, Wrapper(model)):
        with torch.no_grad(), pytest.raises(TypeError, match=rf"model: .*{name}.*kd\.Logits"):
            kd.hidden_states(wrapped, **TEXT)


def test_what_is_refused():
    for model in (None, "a path"):
        with pytest.raises(TypeError, match=r"^model: expected a model of transformers, got"):
            kd.hidden_states(model, **TEXT)
        with pytest.raises(TypeError, match=r"^model: expected a model of transformers, got"):
            kd.Head.from_model(model, torch.zeros(1, 2))
    model = tiny("qwen2")
    with pytest.raises(TypeError, match=r"^hidden: expected last hidden states .*, got BaseModelOutputWithPast"):
        kd.Head.from_model(model, model.base_model(**TEXT))
    with pytest.raises(TypeError, match="no base model below its head"):
        kd.hidden_states(nn.Linear(2, 2), input_ids=IDS)
    with pytest.raises(TypeError, match=r"adapter_names: .*PEFT"):
        kd.hidden_states(tiny("qwen2"), **TEXT, adapter_names=["a", "b"])
    model = tiny("bert", AutoModelForCausalLM, is_decoder=True)
    model.config.return_dict = False
    with pytest.raises(TypeError, match=r"last_hidden_state.*return_dict"):
        kd.hidden_states(model, **TEXT)


def test_a_head_over_them_in_one_call():
    model = tiny("qwen2")
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "position_ids": torch.tensor([[0, 1, 0]])}
    head = kd.Head.of(model, **inputs, vocab_size=90)
    expected = kd.Head.from_model(model, kd.hidden_states(model, **inputs), vocab_size=90)
    assert torch.equal(head.hidden, expected.hidden) and head.weight is model.lm_head.weight
    assert head.vocab_size == 90 and kd.Head.of(model, **inputs).vocab_size == 97
    assert head.hidden.requires_grad
    with torch.no_grad():
        assert not kd.Head.of(model, **inputs).hidden.requires_grad
    with pytest.raises(TypeError, match="Linear"):
        kd.Head.of(torch.nn.Linear(2, 2), **inputs)
