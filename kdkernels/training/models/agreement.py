"""Whether a run's models are what the trainer takes them for: the logits of the heads are their own, and nothing is
missing in the loss that their own forward adds to it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from kdkernels import Head
from kdkernels.data import collate
from kdkernels.distillation import beyond_cross_entropy, has_router_loss
from kdkernels.errors import InputError
from kdkernels.rollouts.local import evaluating
from kdkernels.sources.adapted import AdaptedHead
from kdkernels.sources.hidden import trunk_output


def check_model(key: str, model: PreTrainedModel, tokens: Sequence[int], trained: bool) -> None:
    """Compares the logits behind two `tokens` from the model's head with those of its own forward, and, if the model is
    `trained`, the terms of its own loss with those that training knows. Raises InputError.
    """
    name = f"{key}: {type(model).__name__} (model_type {model.config.model_type})"
    batch = collate([tokens[:1]], [tokens[1:]], pad_id=0).to(model.device)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            with evaluating(model):
                output = trunk_output(model, batch.inputs)
                ours = _logits(Head.from_model(model, output.last_hidden_state))
                own = model(**batch.inputs, use_cache=False).logits.float()  # last: ZeRO-3 takes its end for a step's
                beyond = beyond_cross_entropy(model, output, batch.attention_mask) if trained else None
            if trained:  # some models take other inputs then
                Head.from_model(model, trunk_output(model, batch.inputs).last_hidden_state)
        except Exception as error:  # of any kind: the model's code ran
            raise InputError(f"{name}: the logits behind two tokens could not be computed: {error!r}") from error
    entries = ours.shape[-1]
    difference = (own[..., :entries] - ours).abs().max().item()
    # both come from the same operations, each of which may round
    limit = max(1e-4, 4 * torch.finfo(model.dtype).eps) * own[..., :entries].abs().max().item()
    if not difference <= limit:
        raise InputError(
            f"{name}: the logits of its own forward differ from those of its last hidden states and its head by up to "
            f"{difference:.3g} (of {own[..., :entries].abs().max().item():.3g}); such a model cannot be trained here"
        )
    if beyond is not None and not has_router_loss(output) and abs(beyond.item()) > 1e-4:
        raise InputError(
            f"{name}: its own loss is a cross-entropy and something of {beyond.item():.3g}, which training would leave "
            "out: turn it off in its config.json (for instance z_loss_coefficient = 0)"
        )


def _logits(head: Head) -> Tensor:
    """The head's equation, in its dtype: [..., vocabulary]."""
    z = linear(head.hidden, head.weight, head.bias)
    if isinstance(head, AdaptedHead):
        z = z + linear(head.inner, head.outer)
    z = z.float() * head.scale
    return (z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap))[..., : head.vocabulary]
