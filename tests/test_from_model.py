"""``Head.from_model`` is the model's own distribution over the next token, or a refusal that names the model."""

from __future__ import annotations

import copy
import functools
import gc
import types
import weakref

import pytest
import torch
import transformers
from tiny_models import KINDS, UNBUILDABLE, VOCABULARY, tiny
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import AutoModelForImageTextToText, AutoModelForSeq2SeqLM

import kdkernels as kd

# A dozen and more that differ in what they do to logits, for every run; all others are slow.
CHOSEN = """llama gpt2 phi mixtral gemma2 gemma3 cohere granite hyperclovax minicpm3 falcon_h1 recurrent_gemma xlstm mpt
    inkling_text llama4_text mllama bert modernbert-decoder"""
# They put the hidden states through a layer of their own before the output layer, ProphetNet makes other ones.
REFUSED = """bert big_bird camembert data2vec-text electra ernie megatron-bert modernbert-decoder rembert roberta
    roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod prophetnet"""


def last_hidden_state(model, **inputs) -> torch.Tensor:
    below = model.base_model if model.base_model is not model else model.model  # Llama 4 text, Mllama text
    return below(**inputs, use_cache=False).last_hidden_state


def log_probs(head: kd.Head) -> torch.Tensor:
    """[..., V] of the head, by the row kernels."""
    found = kd.statistics(head, topk=head.vocabulary)
    out = torch.zeros(*head.shape, head.vocabulary, dtype=torch.float64)
    return out.scatter(-1, found.topk_indices, found.topk_log_probs.double())


def assert_same(model, hidden: torch.Tensor, logits: torch.Tensor) -> kd.Head:
    head = kd.Head.from_model(model, hidden)
    own = logits.double().log_softmax(-1)
    own, beyond = own.split([head.vocabulary, own.shape[-1] - head.vocabulary], -1)
    assert own.std() > 0.03  # else any head would do
    assert beyond.exp().sum() == 0
    got = log_probs(head)
    assert (got - own).abs().max() < 2e-5 * (1 + own.abs().max())
    assert (own.exp() * (own - got)).sum(-1).max() < 1e-6
    return head


def compare(model, **inputs) -> kd.Head:
    ids = torch.randint(3, 90, (2, 5))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | inputs
    with torch.no_grad():
        return assert_same(model, last_hidden_state(model, **inputs), model(**inputs, use_cache=False).logits)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind in CHOSEN.split() else pytest.mark.slow)
        for kind in KINDS
        if kind not in UNBUILDABLE
    ],
)
def test_every_causal_lm(kind):
    model = tiny(kind)
    if kind not in REFUSED.split():
        head, absent = compare(model), copy.deepcopy(model.to("meta"))  # as a dry run has it
        unseen = kd.Head.from_model(absent, head.hidden.to("meta"))
        assert (unseen.scale, unseen.softcap, unseen.vocabulary) == (head.scale, head.softcap, head.vocabulary)
        return
    with pytest.raises(
        TypeError, match=rf"{type(model).__name__} \(model_type {model.config.model_type}\).*kd\.Logits"
    ):
        kd.Head.from_model(model, torch.zeros(1, model.config.hidden_size))


@pytest.mark.slow
def test_what_the_sweep_leaves_out_cannot_be_built():
    for kind in UNBUILDABLE:
        try:
            tiny(kind)
        except Exception:  # of many kinds
            continue
        pytest.fail(f"{kind} can be built now: it belongs into the sweep")


TEXT = dict(
    vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
)  # fmt: skip
VISION_TOWER = dict(
    model_type="clip_vision_model", hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    image_size=28, patch_size=14,
)  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        {"model_type": "gemma2", "final_logit_softcapping": 0.5},
        {"model_type": "cohere", "logit_scale": 0.25},
        {"model_type": "granite", "logits_scaling": 4.0},
        {"model_type": "qwen2"},
    ],
    ids=lambda text: text["model_type"],
)
def test_a_vision_model_that_leaves_out_what_its_text_config_says(text):
    config = transformers.LlavaConfig(text_config={**TEXT, **text}, vision_config=VISION_TOWER, image_token_index=96)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    head = compare(model)
    assert head.softcap is None and head.scale == 1.0  # Llava multiplies by its lm_head and no more


SHARED = dict(vocab_size=VOCABULARY, d_model=16, pad_token_id=0, eos_token_id=2, decoder_start_token_id=1)
T5 = SHARED | dict(d_kv=8, d_ff=24, num_layers=1, num_decoder_layers=1, num_heads=2, initializer_factor=3.0)
BART = SHARED | dict(
    encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
    decoder_ffn_dim=24, max_position_embeddings=32, init_std=0.3,
)  # fmt: skip


def seq2seq(model_type: str, **changes):
    torch.manual_seed(0)
    options = (T5 if "t5" in model_type else BART) | changes
    model = AutoModelForSeq2SeqLM.from_config(transformers.AutoConfig.for_model(model_type, **options)).eval()
    ids = torch.randint(3, 90, (2, 5))
    inputs = {"input_ids": ids, "decoder_input_ids": ids.flip(0)}
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    return model, out.decoder_hidden_states[-1], out.logits


@pytest.mark.parametrize("model_type", ["t5", "mt5", "bart", "marian", "pegasus", "mbart"])
def test_encoder_decoder_models(model_type):
    model, hidden, logits = seq2seq(model_type)
    head = assert_same(model, hidden, logits)
    assert head.scale == (0.25 if model_type == "t5" else 1.0)  # T5's embedding is tied: d_model ** -0.5


@pytest.mark.parametrize("model_type", ["bart", "marian"])
def test_a_bias_that_is_no_part_of_the_layer_is_refused(model_type):
    model, hidden, _ = seq2seq(model_type)
    model.final_logits_bias.normal_()
    with pytest.raises(TypeError, match=rf"\(model_type {model_type}\): it adds something.*bias.*kd\.Logits"):
        kd.Head.from_model(model, hidden)


def wrong(model, hidden=None) -> str:
    """What the refusal says."""
    with pytest.raises(TypeError, match=r"^model: .*pass kd\.Head\(.*or kd\.Logits\(") as raised:
        kd.Head.from_model(model, torch.zeros(1, 16) if hidden is None else hidden)
    return str(raised.value)


def test_hooks_are_refused_by_name():
    def louder(module, arguments, output):
        return output * 2

    model = tiny("llama")
    kd.Head.from_model(model, torch.zeros(1, 16))  # what is known of a model is looked at again
    for handle in (
        model.lm_head.register_forward_hook(louder),
        model.register_forward_hook(louder),
        model.lm_head.register_forward_pre_hook(lambda module, arguments: arguments),
        model.lm_head.register_full_backward_hook(lambda module, inward, outward: None),
        model.register_full_backward_pre_hook(lambda module, outward: None),
    ):
        assert " has a hook, test_from_model.test_hooks_are_refused_by_name" in wrong(model)
        handle.remove()
    kd.Head.from_model(model, torch.zeros(1, 16))
    model.model.norm.register_forward_hook(louder)  # the base model itself is run
    compare(model)


def test_replaced_forwards():
    model = tiny("llama")
    kd.Head.from_model(model, torch.zeros(1, 16))
    original = model.forward

    def louder(*arguments, **options):
        out = original(*arguments, **options)
        out.logits = out.logits * 2
        return out

    model.forward = louder
    assert "its forward was replaced by test_from_model.test_replaced_forwards.<locals>.louder" in wrong(model)

    def twice(self, *arguments, **options):  # a method can be asked
        out = type(self).forward(self, *arguments, **options)
        out.logits = out.logits * 2
        return out

    model.forward = types.MethodType(twice, model)
    assert compare(model).scale == 2.0
    del model.forward
    assert compare(model).scale == 1.0

    model.lm_head.forward = lambda hidden: nn.functional.linear(hidden, model.lm_head.weight) * 2
    assert "its output layer's forward was replaced by test_from_model.test_replaced_forwards" in wrong(model)


def test_a_pruned_head_is_refused():
    """Its ``weight`` is what the last forward pass left behind: after a step it is another one."""
    model = tiny("llama")
    prune.l1_unstructured(model.lm_head, "weight", amount=0.5)
    assert "its output layer has a hook, torch.nn.utils.prune.L1Unstructured" in wrong(model)
    prune.remove(model.lm_head, "weight")
    compare(model)


def test_a_parametrized_head_is_what_multiplies():
    """Weights computed from others are read anew, and those get the gradient."""
    model = tiny("llama", tie_word_embeddings=False)
    parametrizations.weight_norm(model.lm_head)
    with torch.no_grad():
        model.lm_head.parametrizations.weight.original0.mul_(2)
    compare(model)
    hidden = torch.randn(3, 16)
    (expected,) = torch.autograd.grad(
        model.lm_head(hidden).double().log_softmax(-1)[:, 5].sum(), model.lm_head.parametrizations.weight.original0
    )
    kd.cross_entropy(kd.Head.from_model(model, hidden), torch.full((3,), 5)).sum().neg().backward()
    torch.testing.assert_close(model.lm_head.parametrizations.weight.original0.grad, expected, rtol=1e-4, atol=1e-5)


class Masked(transformers.LlamaForCausalLM):
    def forward(self, *arguments, **options):
        out = super().forward(*arguments, **options)
        out.logits[..., self.config.hidden_entries] = float("-inf")
        return out


@pytest.mark.parametrize(
    ("hidden_entries", "vocabulary"), [(slice(90, None), 90), ([96], 96), (slice(3, 5), None), (slice(None), None)]
)
def test_masked_entries(hidden_entries, vocabulary):
    model = tiny("llama")
    model.__class__, model.config.hidden_entries = Masked, hidden_entries
    if vocabulary is None:
        assert "Masked (model_type llama): it masks entries in the middle of the vocabulary" in wrong(model)
    else:
        assert compare(model).vocabulary == vocabulary


class Late(transformers.LlamaForCausalLM):
    """More than a head can say between base model and logits, each where nothing else has it."""

    def forward(self, input_ids, attention_mask=None, **options):
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        kind, logits = self.config.late, None
        if kind == "norm":
            hidden = self.model.norm(hidden)
        if kind == "dropout":
            hidden = nn.functional.dropout(hidden, 0.5, self.training)
        if kind == "skip":
            logits = self.lm_head(hidden[:, -1:])
        logits = self.lm_head(hidden) if logits is None else logits
        if kind == "temperature of a token":
            logits = logits * torch.arange(1, logits.shape[1] + 1)[:, None]
        if kind == "squared":
            logits = logits * logits.abs()
        if kind == "one entry":
            logits = logits + nn.functional.one_hot(torch.tensor(7), VOCABULARY)
        if kind == "functional":
            logits = nn.functional.linear(hidden, self.lm_head.weight)
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


@pytest.mark.parametrize(
    ("late", "reason"),
    [
        ("norm", "followed"),  # in stand-ins there is no norm
        ("dropout", "transforms the trunk's last hidden states"),
        ("skip", "followed"),
        ("temperature of a token", "no scale and no soft-cap"),
        ("squared", "no scale and no soft-cap"),
        ("one entry", "adds something"),
        ("functional", "followed"),
    ],
)
def test_what_no_head_can_say(late, reason):
    model = tiny("llama").train()
    model.__class__, model.config.late = Late, late
    with pytest.raises(TypeError, match=rf"Late \(model_type llama\).*({reason})"):
        kd.Head.from_model(model, torch.zeros(1, 16))
    if late == "dropout":
        compare(model.eval())
    model.config.late = None  # a configuration that changes is noticed
    compare(model.eval())


def test_a_scale_that_changes_is_noticed():
    model = tiny("granite")
    assert compare(model).scale == 0.25
    model.config.logits_scaling = 0.1
    assert compare(model).scale == 10.0
    model.config.logits_scaling = 3.0
    assert compare(model).scale == 1 / 3


def test_what_the_model_itself_holds_is_noticed():
    """A number, which Cohere's forward reads, not the config's; a buffer, filled in place as load_state_dict does; a
    bias, also where the hidden states are scaled before."""
    model = tiny("cohere")
    compare(model)
    model.logit_scale = 3.0
    assert compare(model).scale == 3.0
    model, hidden, logits = seq2seq("marian")
    assert_same(model, hidden, logits)
    model.load_state_dict(model.state_dict() | {"final_logits_bias": torch.randn_like(model.final_logits_bias)})
    assert "it adds something" in wrong(model, hidden)
    model = tiny("minicpm3")
    compare(model)
    model.lm_head.bias = nn.Parameter(torch.randn(VOCABULARY))
    assert compare(model).bias is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(dtype):
    """Scales are the config's numbers, not what is left of them in 16 bits."""
    for kind, scale in (("minicpm3", 4 / 16), ("granite", 1 / 7)):
        model = tiny(kind, **({"logits_scaling": 7.0} if kind == "granite" else {})).to(dtype)
        assert kd.Head.from_model(model, torch.zeros(1, 16, dtype=dtype)).scale == scale
    head = kd.Head.from_model(tiny("gemma2").to(dtype), torch.zeros(1, 16, dtype=dtype))
    assert (head.scale, head.softcap) == (1.0, 3.0)


def test_nothing_is_read_or_left_behind():
    """Neither weights (they may be anywhere) nor random numbers, and the model stays as it was."""
    model = tiny("gemma2").to("meta")
    before, state = {name: id(module) for name, module in model.named_modules()}, torch.get_rng_state()
    head = kd.Head.from_model(model, torch.zeros(2, 16, device="meta"))
    assert (head.softcap, head.vocabulary) == (3.0, VOCABULARY)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_is_not_kept_alive():
    model = tiny("llama")
    model.forward = types.MethodType(transformers.LlamaForCausalLM.forward, model)
    kd.Head.from_model(model, torch.zeros(1, 16))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_entries_without_a_logit():
    """Rows of the weight that the model's forward cuts off are no entries, whatever the tokenizer has."""
    model, hidden = tiny("inkling_text"), torch.zeros(1, 16)
    assert kd.Head.from_model(model, hidden, vocab_size=80).vocabulary == 80
    with pytest.raises(ValueError, match="vocab_size: expected an int of 1 to 90, got 95"):
        kd.Head.from_model(model, hidden, vocab_size=95)


class Wrapper(nn.Module):
    """Like DDP, FSDP and DeepSpeed's engine."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class Adapted(nn.Module):
    """Like PEFT's: it forwards attributes to the model inside."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def get_base_model(self):
        return self.inner

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "inner" else getattr(super().__getattr__("inner"), name)


def test_wrappers():
    model = tiny("gemma2")
    hidden = torch.randn(3, 16)
    for wrapped in (Wrapper(model), Adapted(model), Wrapper(Adapted(model)), torch.compile(model, backend="eager")):
        head = kd.Head.from_model(wrapped, hidden)
        assert head.weight is model.lm_head.weight and head.softcap == 3.0
    model.forward = torch.compile(model.forward, backend="eager")
    assert compare(model).softcap == 3.0


def test_hooks_that_only_gather_and_move():
    def gather(module, arguments):
        pass

    model = tiny("llama")
    for package in ("torch.distributed.fsdp._fully_shard._fsdp_state", "deepspeed.runtime.zero.x", "accelerate.hooks"):
        gather.__module__ = package
        for module in (model, model.lm_head):
            module.register_forward_pre_hook(gather)
    compare(model)


def test_models_that_accelerate_spreads_over_devices():
    """It wraps each forward in one that moves tensors and says where the original is."""

    def new_forward(module, *arguments, **options):
        return module._old_forward(*arguments, **options)

    new_forward.__module__ = "accelerate.hooks"
    model = tiny("gemma2")
    for module in (model, model.lm_head):
        module._old_forward = module.forward
        module.forward = functools.update_wrapper(functools.partial(new_forward, module), module._old_forward)
    assert compare(model).softcap == 3.0
    model.lm_head.forward = functools.partial(nn.Linear.forward, model.lm_head)  # no longer accelerate's
    assert "its output layer's forward was replaced" in wrong(model)


def test_compiled_in_one_graph():
    """Also where the model was never seen before."""

    def total(ids):
        hidden = last_hidden_state(model, input_ids=ids)
        return kd.entropy(kd.Head.from_model(model, hidden)).sum()

    model = tiny("gemma2")
    ids = torch.randint(3, 90, (2, 5))
    compiled = torch.compile(total, fullgraph=True, backend="eager")(ids)
    torch.testing.assert_close(compiled, total(ids), rtol=1e-5, atol=1e-4)
