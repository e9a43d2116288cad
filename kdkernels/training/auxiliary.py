"""What a model's own forward adds to its loss beside the cross-entropy: a mixture of experts balances their load.

Shapes: B responses, L length, H hidden.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from kdkernels.sources.from_model import ask, tail


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
