"""kd.Distillation: Hugging Face inputs in, the loss of full logits out. Under wrappers: test_wrappers.py."""

import pytest
import torch
from tiny_models import tiny
from torch import nn
from transformers import AutoModelForSeq2SeqLM

import kdkernels as kd
from kdkernels import reference

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 4, 3, 6, 0]])
ATTENTION = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
LABELS = torch.tensor([[-100, -100, 7, 8, 9], [-100, 4, 3, 6, -100]])
TEXT = {"input_ids": IDS, "attention_mask": ATTENTION}
MASK = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 0, 0]]).bool()
ENTRIES = 90


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.module(*args, **kwargs)


def models(kind="qwen2", auto=None):
    both = [tiny(kind, *(() if auto is None else (auto,))) for _ in range(2)]
    with torch.no_grad():
        for p in both[1].parameters():
            p.add_(0.1 * torch.randn_like(p))
    for model in both:
        model.config.decoder_start_token_id = 1
    return both


def scored(teacher, **inputs):
    with torch.no_grad():
        return kd.Head.of(teacher, **inputs, vocab_size=ENTRIES)


def check(module, teacher_model, inputs, given, picked):
    """Loss and gradients against the logits of the models' own forwards, at the positions of each response."""
    student = module.student.module if isinstance(module.student, Wrapper) else module.student
    out = module(teacher=scored(teacher_model, **inputs), **given, **inputs)
    parameters = [p for p in student.parameters() if p.requires_grad]
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    got = torch.autograd.grad(out.loss, parameters, allow_unused=True)
    student, teacher = student.double(), teacher_model.double()
    z_s, z_t = (model(**inputs, use_cache=False).logits[..., :ENTRIES] for model in (student, teacher))
    expected = reference.gkd([z_s[where] for where in picked], [z_t[where] for where in picked], beta=0.5)
    parameters = dict(student.named_parameters())
    right = torch.autograd.grad(expected, [parameters[name] for name in trained], allow_unused=True)
    assert expected > 1e-3 and abs(out.loss - expected) < 1e-6 and out.count == len(picked)
    assert sum(g is not None and g.norm() > 1e-4 for g in right) > 4
    for a, b in zip(got, right, strict=True):
        assert (a is None) == (b is None) and (a is None or (a - b).norm() < 1e-4 * b.norm() + 1e-7)


ROWS = [(0, slice(1, 4)), (1, slice(0, 3))]
GIVEN = {"labels": LABELS, "layout": kd.Layout.from_labels(LABELS), "mask": MASK}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("given", GIVEN)
def test_causal(given, wrapped):
    student, teacher = models()
    student = Wrapper(student) if wrapped else student
    module = kd.Distillation(student, kd.GKD(beta=0.5), ENTRIES)
    check(module, teacher, TEXT, {given: GIVEN[given]}, ROWS)
    assert not wrapped or student.calls == 1


def test_checkpointed_layers():
    """Computed again in the backward, when the function has left the wrapper's forward."""
    student, teacher = models()
    name = "activation_checkpointing_enable"  # the old name warns where there is a new one
    getattr(student.train(), name, student.gradient_checkpointing_enable)()
    module = kd.Distillation(Wrapper(student), kd.GKD(beta=0.5), ENTRIES)
    check(module, teacher, TEXT, {"labels": LABELS}, ROWS)


def test_autocast_of_the_own_forward():
    """As accelerate decorates it: everything as in autocast around the call, the head's product too."""
    student, teacher = models()
    given = {"teacher": scored(teacher, **TEXT), "labels": LABELS, **TEXT}
    module = kd.Distillation(student, kd.GKD(beta=0.5), ENTRIES)
    cast = torch.autocast("cpu", torch.bfloat16)
    with cast:
        expected = module(**given)
    student.forward, weight = cast(type(student).forward).__get__(student), student.lm_head.weight
    for wrapped in (module, kd.Distillation(Wrapper(student), kd.GKD(beta=0.5), ENTRIES)):
        out = wrapped(**given)
        assert torch.equal(out.loss, expected.loss) and not torch.is_autocast_enabled("cpu")
        a, b = (torch.autograd.grad(each.loss, weight, retain_graph=True)[0] for each in (out, expected))
        assert torch.equal(a, b) and a.norm() > 0


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's use
@pytest.mark.parametrize("wrapped", [False, True])
def test_peft(wrapped):
    peft = pytest.importorskip("peft")
    student, teacher = models()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    student = peft.get_peft_model(student, config)
    module = kd.Distillation(Wrapper(student) if wrapped else student, kd.GKD(beta=0.5), ENTRIES)
    check(module, teacher, TEXT, {"labels": LABELS}, ROWS)


def test_packed_texts_are_responses_of_their_own():
    student, teacher = models()
    module = kd.Distillation(student, kd.GKD(beta=0.5), ENTRIES)
    picked = [(0, slice(0, 2)), (0, slice(3, 4)), (1, slice(0, 4))]
    check(module, teacher, PACKED, {"labels": IDS}, picked)


PACKED = {"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])}


def test_a_response_ends_with_its_text():
    """Of a mask or a layout that does not know of packed texts: one response where there are two, or the last token of
    a text that predicts the first of the next.
    """
    module = kd.Distillation(models()[0], kd.SFT(), ENTRIES)
    one = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 0]]).bool()
    touching = torch.tensor([[0, 0, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    wrong = {
        "mask": (one, touching),
        "layout": (kd.Layout.from_mask(one), kd.Layout.from_segments(touching.long()), kd.Layout.from_labels(IDS)),
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=rf"{name}: expected each response.*\[0, [23]\].*position_ids="):
                module(**{name: value}, target=IDS, **PACKED)
    right = kd.Layout.from_labels(IDS, position_ids=PACKED["position_ids"])
    assert module(layout=right, **PACKED).loss == module(labels=IDS, **PACKED).loss > 0.1
    padded = {"input_ids": IDS, "attention_mask": ATTENTION.flip(0), "position_ids": torch.tensor([[0, 1, 2, 3, 4]])}
    ahead = padded | {"position_ids": torch.tensor([[1, 0, 1, 2, 3], [1, 1, 0, 1, 2]])}
    for inputs in (padded, ahead):
        assert module(mask=torch.arange(5).expand(2, 5) > 2, target=IDS, **inputs).count == 4


def test_a_mask_is_read_once_where_nothing_shows_texts(monkeypatch):
    """To read it on a GPU is a sync."""
    module, read, once = kd.Distillation(models()[0], kd.SFT(), ENTRIES), [], kd.Layout.from_mask
    monkeypatch.setattr(kd.Layout, "from_mask", lambda mask: read.append(mask) or once(mask))
    assert module(mask=MASK, target=IDS, **TEXT).loss > 0.1 and len(read) == 1


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "seq_idx"])
def test_packed_texts_without_position_ids(name):
    module = kd.Distillation(models()[0], kd.SFT(), ENTRIES)
    with pytest.raises(ValueError, match=rf"position_ids: expected them beside {name}"):
        module(labels=IDS, input_ids=IDS, **{name: torch.tensor([0, 3, 5])})


def test_positions_of_texts_with_images():
    """Of four rows the first are the texts', which show packing; three are of images too, which do not restart."""
    text = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
    module = kd.Distillation(models()[0], kd.SFT(), ENTRIES)
    four, three = (module._counted(IDS, None, None, {"position_ids": text.expand(n, 2, 5)}) for n in (4, 3))
    assert four.lengths == (2, 1, 4) and three.lengths == (4, 4)


@pytest.mark.parametrize("kind", ["t5", "mbart"])
def test_encoder_decoder_labels_are_not_shifted(kind):
    student, teacher = models(kind, AutoModelForSeq2SeqLM)
    module = kd.Distillation(student, kd.GKD(beta=0.5), ENTRIES)
    inputs = TEXT | {"labels": torch.tensor([[3, 8, 2], [7, 5, -100]])}
    check(module, teacher, inputs, {}, [(0, slice(0, 3)), (1, slice(0, 2))])
    own = student(**inputs).loss  # a mean over tokens
    sft = kd.Distillation(student, kd.SFT(), student.config.vocab_size)
    torch.testing.assert_close(sft(**inputs).loss, own)


def routed():
    model = tiny("mixtral").train()
    for holder in (model.config, model):
        for name, value in {"output_router_logits": True, "router_aux_loss_coef": 0.5}.items():
            if hasattr(holder, name):
                setattr(holder, name, value)
    return model


def test_a_denominator_divides_the_router_loss_too():
    """Two halves of a batch add up to its token mean and the mean of their router losses."""
    module = kd.Distillation(routed(), kd.SFT(), 97)
    whole = module(labels=LABELS, denominator=12, **TEXT)
    alone = module(labels=LABELS, **TEXT)
    assert alone.metrics["router_loss"] > 0.4 and alone.count == 6
    torch.testing.assert_close(whole.loss, alone.loss / 2)
    torch.testing.assert_close(whole.metrics["router_loss"], alone.metrics["router_loss"] / 2)


def test_routers_of_an_encoder_are_not_left_out_in_silence():
    model = tiny("switch_transformers", AutoModelForSeq2SeqLM)
    model.config.decoder_start_token_id = 1
    module = kd.Distillation(model, kd.SFT(), ENTRIES)
    assert module(labels=IDS, **TEXT).loss > 0
    model.config.output_router_logits = True
    with pytest.raises(TypeError, match=r"student: SwitchTransformers.*output_router_logits = False"):
        module(labels=IDS, **TEXT)


def test_compiled():
    student, teacher = models()
    module = kd.Distillation(student, kd.GKD(), ENTRIES)
    given = {"teacher": scored(teacher, **TEXT), "layout": GIVEN["layout"], **TEXT}
    assert torch.equal(torch.compile(module, backend="eager")(**given).loss, module(**given).loss)


def call(objective=None, student=None, vocab_size=ENTRIES, **given):
    student = tiny("qwen2") if student is None else student
    return kd.Distillation(student, objective or kd.SFT(), vocab_size)(**given)


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({**TEXT}, TypeError, ["labels, layout, mask", "none"]),
        ({"labels": LABELS, "layout": GIVEN["layout"], **TEXT}, TypeError, ["exactly one", "labels and layout"]),
        ({"labels": LABELS, "mask": MASK, **TEXT}, TypeError, ["exactly one", "labels and mask"]),
        ({"layout": MASK, **TEXT}, TypeError, ["layout", "kd.Layout", "mask"]),
        ({"labels": LABELS[:, :4], **TEXT}, ValueError, ["[2, 5]", "[2, 4]"]),
        ({"labels": IDS, **TEXT, "position_ids": torch.zeros(2, 4).long()}, ValueError, ["position_ids", "[2, 4]"]),
        ({"mask": MASK[:, :4], **TEXT, "position_ids": IDS}, ValueError, ["mask", "[2, 5]", "[2, 4]"]),
        (
            {
                "mask": torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 0, 0]]).bool(),
                "objective": kd.TSDKD(k=3),
                "teacher": kd.Logits(torch.ones(2, 5, 97)),
                **TEXT,
            },
            ValueError,
            ["mask", "gap behind [0, 1]", "position_ids=position_ids"],
        ),
        ({"labels": LABELS, "vocab_size": 98, **TEXT}, ValueError, ["vocab_size", "97", "98"]),
        ({"labels": LABELS, "vocab_size": 0, **TEXT}, ValueError, ["vocab_size", "0"]),
        ({"labels": LABELS, "student": nn.Linear(2, 2), **TEXT}, TypeError, ["model", "Linear"]),
        ({"labels": LABELS, "student": tiny("qwen2").model, **TEXT}, TypeError, ["output embedding", "Qwen2Model"]),
        ({"labels": LABELS, "student": "qwen2", **TEXT}, TypeError, ["student", "str"]),
        ({"labels": LABELS, "objective": "GKD", **TEXT}, TypeError, ["objective", "kd.GKD()", "'GKD'"]),
        ({"labels": LABELS, "objective": kd.GKD(), **TEXT}, TypeError, ["teacher", "NoneType"]),
        (
            {
                "labels": LABELS,
                "objective": kd.GKD(),
                "teacher": kd.Logits(torch.ones(2, 5, 97, device="meta")),
                **TEXT,
            },
            ValueError,
            ["teacher", "cpu", "meta"],
        ),
        (
            {"labels": LABELS, "weights": torch.ones(2, 5).bfloat16(), **TEXT},
            TypeError,
            ["weights", "around the wrapped"],
        ),
        ({"labels": LABELS, "denominator": torch.tensor(257.0).half(), **TEXT}, ValueError, ["denominator", "an int"]),
        ({"labels": LABELS, "denominator": 0, **TEXT}, ValueError, ["denominator", "0"]),
    ],
)
def test_what_is_refused(wrong, error, words):
    with pytest.raises(error) as caught:
        call(**wrong)
    for word in words:
        assert word in str(caught.value)
