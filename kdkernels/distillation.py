"""Student and objective as one module, for any trainer: its forward turns Hugging Face inputs into the loss.

Axes: B sequences, L positions, H hidden.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from .checks import check_count
from .errors import InputError
from .layout import Layout
from .objectives import Objective, Output
from .sources import Head, Source
from .sources.from_model import ask, tail, unwrapped
from .sources.hidden import has_encoder, last_hidden_state, trunk_output
from .wrappers import Held, given_to, is_inside, is_wrapped, through

ROUTER_LOSS = "router_loss"  # among the metrics
PACKED = ("cu_seq_lens_q", "seq_idx")  # inputs that say of packed texts where they start
KEPT = ("teacher", "weights", "denominator")  # as they are given, whatever mixed precision does to inputs


class Distillation(nn.Module):
    """Student and objective in one module: Hugging Face inputs in, loss and metrics out.

    ::

        distillation = kd.Distillation(student, kd.GKD(), vocab_size=len(tokenizer))
        with torch.no_grad():
            scored = kd.Head.of(teacher, **inputs, vocab_size=len(tokenizer))
        distillation(teacher=scored, labels=labels, **inputs).loss.backward()

    Either the module is wrapped (``DDP(distillation)``, ``fully_shard(distillation)``, ``deepspeed.initialize(
    model=distillation)``, ``accelerator.prepare(distillation)``), or it is made around a student that is wrapped
    already, as a trainer hands it over: then the forward runs through that wrapper (``kd.through``). FSDP1 and DDP with
    mixed precision cast all that they are given, a teacher too; around a wrapped student it stays as it is.

    Args:
        student: a model of transformers with a language-model head, or what wraps one.
        objective: kd.GKD(), kd.TSDKD() ...
        vocab_size: the ids that have a token, the tokenizer's size: entries beyond are padding and have probability 0.

    Raises:
        TypeError: the student's head is none that ``kd.Head.from_model`` takes, which the message names.
        ValueError: vocab_size exceeds the entries that the student gives a logit.
    """

    accepts_loss_kwargs = False  # says to transformers' Trainer: divide this loss by the micro-batches of a step

    def __init__(self, student: nn.Module, objective: Objective, vocab_size: int):
        super().__init__()
        if not isinstance(student, nn.Module):
            raise TypeError(f"student: expected a model of transformers, got {type(student).__name__}")
        if not isinstance(objective, Objective):
            raise TypeError(f"objective: expected one like kd.GKD(), got {objective!r}")
        check_count("vocab_size", vocab_size, 1, tail(student).entries)
        self.student, self.objective, self.vocab_size = student, objective, vocab_size

    def __call__(self, *args, **kwargs) -> Output:
        """FSDP2 casts the arguments of the module that it is applied to, before its forward."""
        kept = {name: Held(kwargs[name]) for name in KEPT if name in kwargs}
        return super().__call__(*args, **kwargs | kept)

    def forward(
        self,
        *,
        teacher: Source | None = None,
        labels: Tensor | None = None,
        layout: Layout | None = None,
        mask: Tensor | None = None,
        target: Tensor | None = None,
        weights: Tensor | None = None,
        from_teacher: Tensor | None = None,
        denominator: float | Tensor | None = None,
        **inputs,
    ) -> Output:
        """The objective's loss, count and metrics for a batch. The student's own router loss is part of the loss and
        among the metrics where its config turns that on (``output_router_logits``).

        Which positions count is said by exactly one of labels, layout and mask.

        Args:
            teacher: what a teacher gives the batch, as a ``kd.Head``, ``kd.Logits`` or ``kd.TopK`` over its positions
                [B, L], on the student's device; None for an objective without one.
            labels: [B, L] Hugging Face labels, -100 where a token is not scored; shifted here. Packed texts are told
                apart by ``position_ids`` [B, L] among the inputs. In encoder-decoder models they also make the
                decoder's inputs; position t predicts ``labels[t]`` there, and a row is one response.
            layout: the positions and their responses, each within one of packed texts.
            mask: [B, L] bool, True where a position predicts a response token, one response a row.
            target: [B, L], the token that each position predicts, where layout or mask do not know it.
            weights: [B, L] fp32 or fp64, of each token, a factor on the objective's terms; not on the router loss.
            from_teacher: [B] bool, for objectives that tell authors apart.
            denominator: what to divide by instead of this batch's own count; the router loss then counts
                count / denominator, so that it adds up to a mean over batches too.
            inputs: of the student's forward: input_ids, attention_mask, position_ids, pixel_values ...

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        teacher, weights, denominator = map(given_to, (teacher, weights, denominator))
        _check_given({"labels": labels, "layout": layout, "mask": mask}, weights)
        if has_encoder(self.student) and labels is not None:
            inputs["labels"] = labels
        options = {"target": target, "weights": weights, "from_teacher": from_teacher, "denominator": denominator}
        counted = self._counted(labels, layout, mask, inputs)
        loss = partial(self._loss, teacher, counted, options)
        if is_wrapped(self.student) and not is_inside(self.student):
            return through(self.student, loss, **inputs)
        return loss(**inputs)

    def _counted(
        self, labels: Tensor | None, layout: Layout | None, mask: Tensor | None, inputs: dict
    ) -> Layout | Tensor:
        if layout is not None and not isinstance(layout, Layout):
            raise TypeError(f"layout: expected a kd.Layout, got {type(layout).__name__}; a bool tensor is a mask")
        if has_encoder(self.student):
            return _unshifted(labels) if labels is not None else layout if layout is not None else mask
        positions = _positions_of_texts(inputs)
        if labels is not None:
            return Layout.from_labels(labels, position_ids=positions)
        if mask is not None:
            _check_texts("mask", mask, positions)
            return mask
        _check_texts("layout", layout, positions)
        return layout

    def _loss(self, teacher: Source | None, counted: Layout | Tensor, options: dict, **inputs) -> Output:
        output = trunk_output(self.student, inputs)
        hidden = last_hidden_state(self.student, output)
        scored = Head.from_model(self.student, hidden, vocab_size=self.vocab_size)
        out = self.objective(scored, teacher, counted, **options)
        routers = router_loss(self.student, output, inputs.get("attention_mask"))
        if routers is None:
            return out
        if options["denominator"] is not None:
            routers = routers * (out.count / options["denominator"])
        return out._replace(loss=out.loss + routers, metrics=out.metrics | {ROUTER_LOSS: routers.detach()})

    def metric_reduction(self, metric: str) -> str:
        """As `Objective.metric_reduction`; the router loss is a term of the loss."""
        return self.objective.metric_reduction("loss" if metric == ROUTER_LOSS else metric)


def _check_given(positions: dict[str, object], weights: object) -> None:
    """Of what says which positions count, one is given; and weights are not rounded."""
    given = [name for name, value in positions.items() if value is not None]
    if len(given) != 1:
        raise TypeError(f"{', '.join(positions)}: expected exactly one of them, got {' and '.join(given) or 'none'}")
    if isinstance(weights, Tensor) and weights.is_floating_point() and weights.dtype.itemsize < 4:
        raise TypeError(
            f"weights: expected float32 or float64, got {weights.dtype}; a wrapper with mixed precision casts what "
            "it is given: make the Distillation around the wrapped student, whose forward is not given weights"
        )


def _positions_of_texts(inputs: dict) -> Tensor | None:
    """[B, L] or [1, L] the place of each token in its text, where the student's inputs say it."""
    positions = inputs.get("position_ids")
    if not isinstance(positions, Tensor):
        for name in PACKED:
            if inputs.get(name) is not None:
                raise InputError(
                    f"position_ids: expected them beside {name}, which packs texts into a sequence, to tell their "
                    "responses apart; DataCollatorWithFlattening(return_position_ids=True) makes them"
                )
        return None
    if positions.dim() == 3:  # of images too: the first of four are the text's
        return positions[0] if len(positions) == 4 else None
    return positions


def _check_texts(name: str, counted: Layout | Tensor, positions: Tensor | None) -> None:
    """Refuses a response that goes on in the next of packed texts, on the CPU: elsewhere looking would cost a sync."""
    if positions is None or positions.device.type != "cpu":
        return
    layout = (counted if isinstance(counted, Layout) else Layout.from_mask(counted)).to("cpu")
    if positions.shape not in (layout.shape, (1, layout.shape[1])):
        return  # another error, of the model or of the objective
    starts = pad(positions.expand(layout.shape).diff(dim=1) < 1, (1, 1))
    text = starts.cumsum(1)[:, 1:].flatten()[layout.index]  # of the token that is predicted
    first = text[layout.position == 0][layout.response]
    beyond = (text != first) | starts[:, 1:].flatten()[layout.index]
    if beyond.any():
        b, t = divmod(int(layout.index[beyond.nonzero()[0, 0]]), layout.shape[1])
        raise InputError(
            f"{name}: expected each response within one of the texts that position_ids show, got one that is scored "
            f"at [{b}, {t}] too, in another text or where the next one starts; give labels, or "
            "kd.Layout.from_labels(labels, position_ids=position_ids)"
        )


def _unshifted(labels: Tensor) -> Layout:
    """The layout of an encoder-decoder model's labels, where position t predicts the label at t."""
    scored = labels != -100
    layout = Layout.from_mask(scored)
    return Layout.trusted(layout.index, layout.lengths, layout.shape, labels.flatten()[layout.index].long())


def router_loss(model: nn.Module, output: object, attention_mask: Tensor | None) -> Tensor | None:
    """What the model's own forward adds to its loss for the experts' load, coefficient included: a scalar that is
    differentiable; None for a model that computes none (its config says `output_router_logits`).

    output: of its trunk, last hidden states [B, L, H] among it; attention_mask: [B, L], None where every token counts.

    Raises TypeError for an encoder-decoder model that computes one: its encoder's routers are not in that output.
    """
    model = unwrapped(model)
    if has_encoder(model):
        if getattr(model.config, "output_router_logits", False):
            raise TypeError(
                f"student: {type(model).__name__} computes a loss of its routers in encoder and decoder, which is left "
                "out here; set config.output_router_logits = False"
            )
        return None
    return beyond_cross_entropy(model, output, attention_mask) if has_router_loss(output) else None


def has_router_loss(output: object) -> bool:
    """Whether the trunk that returned `output` was told to report on its routers."""
    return getattr(output, "router_logits", None) is not None


def beyond_cross_entropy(model: nn.Module, output: object, attention_mask: Tensor | None) -> Tensor | None:
    """The loss of the model's own forward without its cross-entropy, None where it has no loss.

    The forward runs over what its trunk returned, with two positions and logits that are all equal: whatever the labels
    are and however it shifts them, the cross-entropy is the same number, which is taken off again.
    """
    layer = tail(model).layer
    hidden = output.last_hidden_state
    few = replace(output, last_hidden_state=hidden.new_zeros(1, 2, hidden.shape[-1]))
    raw = hidden.new_zeros(2, layer.weight.shape[0], dtype=torch.float32)
    labels = torch.zeros(1, 2, dtype=torch.int64, device=hidden.device)
    _, own = ask(model, layer, few, raw, input_ids=labels, attention_mask=attention_mask, labels=labels)
    if getattr(own, "loss", None) is None:
        return None
    return own.loss - cross_entropy(own.logits[0].float(), labels[0])
