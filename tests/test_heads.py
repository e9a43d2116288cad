"""Heads read from transformers models give the log-probabilities of the models themselves."""

from dataclasses import replace

import pytest
import torch
import transformers
import truth

import kdkernels as kd

SMALL = dict(
    vocab_size=99, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.5,
)  # fmt: skip
MODELS = {
    "qwen2": {},
    "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"final_logit_softcapping": None},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "phi": {},  # its lm_head has a bias
    "hyperclovax": {"logits_scaling": 4.0},
    "falcon_h1": {"lm_head_multiplier": 3.0, "mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8},
    "recurrent_gemma": {"logits_soft_cap": 0.5, "num_hidden_layers": 3},
}


def tiny(model_type: str):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**SMALL, **MODELS[model_type]})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    bias = model.get_output_embeddings().bias
    if bias is not None:
        torch.nn.init.normal_(bias)
    return model


@pytest.mark.parametrize("model_type", MODELS)
def test_from_model(backend, model_type):
    model = tiny(model_type)
    ids = torch.randint(3, 99, (2, 5))
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
        head = kd.Head.from_model(model, model.base_model(ids, use_cache=False).last_hidden_state)
        target = torch.randint(0, 99, (2, 5))
        expected = logits.log_softmax(-1)
        got = kd.statistics(head, topk=99, target=target)
    torch.testing.assert_close(got.topk_log_probs, expected.gather(-1, got.topk_indices), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        got.target_log_prob, expected.gather(-1, target[..., None])[..., 0], rtol=1e-5, atol=1e-5
    )
    assert head.weight is model.get_output_embeddings().weight
    assert (head.bias is not None) == (model_type == "phi")
    assert expected.std() > 0.1
    if model_type not in ("qwen2", "gemma3_text"):  # what is read of the others matters
        plain = kd.statistics(replace(head, softcap=None, scale=1.0, bias=None), target=target)
        assert (plain.target_log_prob - got.target_log_prob).abs().max() > 1e-2


def test_real_vocabulary(backend):
    """A padded embedding: the entries beyond ``vocab_size`` have probability 0."""
    model = tiny("qwen2")
    hidden = torch.randn(3, 16)
    head = kd.Head.from_model(model, hidden, vocab_size=90)
    assert head.vocabulary == 90
    z = (hidden @ model.lm_head.weight.T)[:, :90]
    torch.testing.assert_close(kd.entropy(head), truth.entropy(z), rtol=1e-5, atol=1e-6)
    assert kd.Head.from_model(model, hidden).vocabulary == 99


def test_an_adapter_on_the_head_is_refused():
    """Reading ``.weight`` would lose it: fused code that does trains nothing."""

    class Adapted(torch.nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden) + hidden.sum(-1, keepdim=True)

    model = tiny("qwen2")
    model.set_output_embeddings(Adapted(16, 99, bias=False))
    with pytest.raises(TypeError, match=r"model: expected a plain torch\.nn\.Linear.*got Adapted.*effective weight"):
        kd.Head.from_model(model, torch.zeros(1, 16))


def test_a_model_without_a_head_is_refused():
    config = transformers.AutoConfig.for_model("qwen2", **SMALL)
    with pytest.raises(TypeError, match="model"):
        kd.Head.from_model(transformers.AutoModel.from_config(config), torch.zeros(1, 16))


HIDDEN, WEIGHT = torch.zeros(2, 3), torch.zeros(7, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        (dict(hidden=[1.0]), TypeError, ["hidden", "floating-point tensor", "list"]),
        (dict(hidden=HIDDEN.long()), TypeError, ["hidden", "int64"]),
        (dict(weight=None), TypeError, ["weight", "NoneType"]),
        (dict(weight=WEIGHT.double()), TypeError, ["weight", "float32", "float64"]),
        (dict(weight=WEIGHT.to("meta")), ValueError, ["weight", "cpu", "meta"]),
        (dict(weight=WEIGHT[0]), ValueError, ["weight", "[V, H]", "[3]"]),
        (dict(weight=WEIGHT[:0]), ValueError, ["weight", "[0, 3]"]),
        (dict(hidden=torch.zeros(2, 4)), ValueError, ["hidden", "[..., 3]", "[2, 4]"]),
        (dict(hidden=torch.zeros(())), ValueError, ["hidden", "[]"]),
        (dict(bias=torch.zeros(6)), ValueError, ["bias", "[7]", "[6]"]),
        (dict(bias=torch.zeros(7, dtype=torch.bfloat16)), TypeError, ["bias", "float32", "bfloat16"]),
        (dict(bias=torch.zeros(7, device="meta")), ValueError, ["bias", "meta"]),
        (dict(softcap=0.0), ValueError, ["softcap", "positive", "0.0"]),
        (dict(softcap=-3.0), ValueError, ["softcap", "-3.0"]),
        (dict(softcap=float("nan")), ValueError, ["softcap", "nan"]),
        (dict(scale=0.0), ValueError, ["scale", "0.0"]),
        (dict(scale=float("nan")), ValueError, ["scale", "nan"]),
        (dict(vocab_size=8), ValueError, ["vocab_size", "7", "8"]),
        (dict(vocab_size=0), ValueError, ["vocab_size", "0"]),
        (dict(vocab_size=True), TypeError, ["vocab_size", "int", "True"]),
        (dict(vocab_size=5.0), TypeError, ["vocab_size", "int", "5.0"]),
        (dict(softcap=True), TypeError, ["softcap", "number", "True"]),
        (dict(softcap=float("inf")), ValueError, ["softcap", "finite", "inf"]),
        (dict(scale=float("inf")), ValueError, ["scale", "finite", "inf"]),
        (dict(scale="2"), TypeError, ["scale", "number", "'2'"]),
        (dict(scale=None), TypeError, ["scale", "number", "None"]),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_bad_input(arguments, error, told):
    with pytest.raises(error) as raised:
        kd.Head(**{"hidden": HIDDEN, "weight": WEIGHT, **arguments})
    assert all(part in str(raised.value) for part in told), str(raised.value)


class Packed(torch.Tensor):
    """Like torchao's: a tensor whose values are computed when they are needed."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        raise NotImplementedError(function)

    def dequantize(self):
        return torch.ones(self.shape)


class Unknown(Packed):
    dequantize = torch.Tensor.dequantize


class Params4bit(torch.nn.Parameter):
    """Like bitsandbytes': packed bits in a parameter of any dtype, bf16 too."""

    quant_state = None


def four_bits(data: torch.Tensor) -> torch.Tensor:
    weight = data.as_subclass(Params4bit)
    weight.quant_state = object()
    return weight


def partitioned() -> torch.Tensor:
    """What ZeRO-3 leaves of a weight between its uses."""
    weight = torch.nn.Parameter(torch.empty(0))
    weight.ds_id, weight.ds_shape = 7, WEIGHT.shape
    return weight


ELSEWHERE = {
    "packed": (lambda: Packed(WEIGHT), ["weight", "test_heads.Packed", "quantized", "weight.dequantize()"]),
    "unknown": (lambda: Unknown(WEIGHT), ["weight", "plain tensor", "test_heads.Unknown", "pass the tensor"]),
    "4 bits": (lambda: four_bits(torch.zeros(7, 3)), ["weight", "Params4bit", "quantized", "dequantize_4bit"]),
    "int8": (lambda: WEIGHT.to(torch.int8), ["weight", "floating-point", "int8", "dequantized"]),
    "fp8": (lambda: WEIGHT.to(torch.float8_e4m3fn), ["weight", "floating-point", "float8_e4m3fn", "dequantized"]),
    "sparse": (lambda: WEIGHT.to_sparse(), ["weight", "dense", "torch.sparse_coo", "weight.to_dense()"]),
    "lazy": (lambda: torch.nn.LazyLinear(7).weight, ["weight", "UninitializedParameter", "run the model once"]),
    "ZeRO-3": (partitioned, ["weight", "[V, H]", "[0]", "ZeRO-3", "kd.through", "GatheredParameters"]),
    "FSDP1": (lambda: torch.nn.Parameter(torch.zeros(21)), ["weight", "[21]", "FSDP", "summon_full_params"]),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_weights_that_are_elsewhere(case):
    """The refusal comes at the head, with a way out; a product over what is here would be another one, or a riddle."""
    make, told = ELSEWHERE[case]
    with pytest.raises(TypeError) as raised:
        kd.Head(HIDDEN, make())
    assert all(part in str(raised.value) for part in told), str(raised.value)


def test_a_head_without_values_is_named():
    with pytest.raises(ValueError, match=r"weight: expected device cpu.*got meta; it has no values there: load it"):
        kd.Head(HIDDEN, WEIGHT.to("meta"))


def test_hidden_states_logits_and_stored_entries_are_looked_at_too():
    for make in (lambda: kd.Head(Packed(HIDDEN), WEIGHT), lambda: kd.Head(HIDDEN, WEIGHT, Packed(WEIGHT[:, 0]))):
        with pytest.raises(TypeError, match=r"(hidden|bias): .*\.dequantize\(\)"):
            make()
    with pytest.raises(TypeError, match=r"logits: .*logits\.dequantize\(\)"):
        kd.Logits(Packed(HIDDEN))
    with pytest.raises(TypeError, match=r"log_probs: .*float8_e4m3fn"):
        kd.TopK(torch.zeros(2, 3, dtype=torch.int64), HIDDEN.to(torch.float8_e4m3fn))


def test_subclasses_that_only_watch_are_tensors():
    class Watched(torch.Tensor):
        pass

    hidden, weight = torch.randn(2, 3), torch.randn(7, 3)
    watched = kd.entropy(kd.Head(hidden.as_subclass(Watched), weight.as_subclass(Watched)))
    torch.testing.assert_close(watched.as_subclass(torch.Tensor), kd.entropy(kd.Head(hidden, weight)))
    with torch._subclasses.FakeTensorMode() as mode:
        assert kd.Head(mode.from_tensor(hidden), mode.from_tensor(weight)).vocabulary == 7


def test_distributed_tensors():
    """FSDP2's: refused outside its forward, where this process has a shard (training/sharded.py has two processes)."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    ours = not dist.is_initialized()  # the trainer's tests leave a group of one process behind
    if ours:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        layer = torch.nn.Linear(3, 7)
        expected = kd.entropy(kd.Head(torch.ones(2, 3), layer.weight.detach().clone(), layer.bias.detach().clone()))
        mesh = dist.init_device_mesh("cpu", (1,))
        fully_shard(layer, mesh=mesh)
        assert isinstance(layer.weight, DTensor)
        with pytest.raises(TypeError, match=r"weight: .*DTensor.*a shard; pass kd\.Head\.from_model"):
            kd.Head(torch.ones(2, 3), layer.weight, layer.bias)
        with pytest.raises(TypeError, match=r"hidden: .*DTensor"):
            kd.Head(DTensor.from_local(torch.ones(2, 3), mesh), WEIGHT)
        head = kd.Head(torch.ones(2, 3), layer.weight.full_tensor(), layer.bias.full_tensor())
        entropy = kd.entropy(head)
        torch.testing.assert_close(entropy, expected)
        entropy.sum().backward()
        assert layer.weight.grad.full_tensor().abs().sum() > 0
    finally:
        if ours:
            dist.destroy_process_group()


@pytest.mark.parametrize("of", ["student", "teacher"])
def test_dtypes_that_only_autocast_makes_one_are_refused_where_it_is_off(of):
    heads = {name: kd.Head(torch.randn(1, 3, 4), torch.randn(5, 4)) for name in ("student", "teacher")}
    with torch.autocast("cpu", torch.bfloat16):
        heads[of] = kd.Head(torch.randn(1, 3, 4).bfloat16(), torch.randn(5, 4))
        assert kd.divergence(**heads, divergence=kd.ForwardKL()).isfinite().all()
    with pytest.raises(TypeError, match=r"^weight: expected dtype torch.bfloat16 .* got torch.float32; .*autocast"):
        kd.divergence(**heads, divergence=kd.ForwardKL())
