"""Student and objective as one module, for any trainer: its forward turns a batch into the loss.

    module = Distillation(student, kd.GKD(), vocabulary_size(tokenizer))
    with torch.no_grad():
        scored = head(teacher, batch, module.vocab_size)
    module(batch, scored).loss.backward()

Axes: B responses, L length, H hidden.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from kdkernels.data.batch import Batch
from kdkernels.objectives import Objective, Output
from kdkernels.sources import Head, Source
from kdkernels.sources.from_model import ask, tail, trunk

ROUTER_LOSS = "router_loss"  # among the metrics


class Distillation(nn.Module):
    """Student and objective in one module, so that the engine that wraps it sees every use of every weight, the
    lm_head's included.
    """

    def __init__(self, student: PreTrainedModel, objective: Objective, vocab_size: int):
        super().__init__()
        self.student, self.objective, self.vocab_size = student, objective, vocab_size

    def forward(self, batch: Batch, teacher: Source | None, weights: Tensor | None = None) -> Output:
        """The objective's output (loss, count, metrics) for `batch`; the student's own router loss is part of the loss
        where its config turns that on.

        Args:
            batch: on the student's device.
            teacher: what a teacher gave for it; None for an objective without one.
            weights: [B, L], of each token, a factor on the objective's terms; not on the router loss.
        """
        output = states(self.student, batch)
        scored = Head.from_model(self.student, output.last_hidden_state, vocab_size=self.vocab_size)
        from_teacher = batch.from_teacher if self.objective.by_author else None
        out = self.objective(
            scored, teacher, batch.layout, target=batch.target, weights=weights, from_teacher=from_teacher
        )
        routers = router_loss(self.student, output, batch.attention_mask)
        if routers is None:
            return out
        return out._replace(loss=out.loss + routers, metrics=out.metrics | {ROUTER_LOSS: routers.detach()})

    def metric_reduction(self, metric: str) -> str:
        """As `Objective.metric_reduction`; the router loss is a term of the loss."""
        return self.objective.metric_reduction("loss" if metric == ROUTER_LOSS else metric)


def head(model: PreTrainedModel, batch: Batch, vocab_size: int) -> Head:
    """The model's last hidden states [B, L, H] for `batch` with its lm_head, which is left to multiply the positions
    that matter.
    """
    return Head.from_model(model, states(model, batch).last_hidden_state, vocab_size=vocab_size)


def states(model: PreTrainedModel, batch: Batch) -> ModelOutput:
    """What the model's trunk returns for `batch`: its last hidden states [B, L, H] and, if its config asks for them,
    the logits of its routers.
    """
    return trunk(model)(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)


def router_loss(model: PreTrainedModel, output: ModelOutput, attention_mask: Tensor) -> Tensor | None:
    """What the model's own forward adds to its loss for the experts' load, coefficient included: a scalar that is
    differentiable; None for a model that computes none (its config says `output_router_logits`).

    output: of its trunk, last hidden states [B, L, H] among it; attention_mask: [B, L].
    """
    return beyond_cross_entropy(model, output, attention_mask) if has_router_loss(output) else None


def has_router_loss(output: ModelOutput) -> bool:
    """Whether the trunk that returned `output` was told to report on its routers."""
    return getattr(output, "router_logits", None) is not None


def beyond_cross_entropy(model: PreTrainedModel, output: ModelOutput, attention_mask: Tensor) -> Tensor | None:
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
