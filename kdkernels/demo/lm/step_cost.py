"""What the loss takes within a step of the demo: kdkernels' beside full logits, of the same models and the same batch.

python -m kdkernels.demo.lm.step_cost DATA TEACHER STUDENT FILE. A process of its own, so that memory is that of a step.

"all positions": logits [B, L, V] of both models, prompts and padding too, and the loss in eager PyTorch, masked behind
it, as trainers have it. "response positions": the same on the positions that predict a response token, gathered before
the heads, which is what kdkernels multiplies. Axes: B responses, L length, H hidden, V vocabulary.
"""

import argparse
import ctypes
import gc
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.functional import kl_div
from torch.nn.functional import log_softmax as log_softmax_of
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import kdkernels as kd
from kdkernels.compute import memory
from kdkernels.data import collate, load_examples
from kdkernels.data.tokenizers import vocabulary_size

OURS, GATHERED, ALL = "kdkernels", "full logits, response positions", "full logits, all positions"
ROUNDS, BETA = 3, 0.5
TOLERANCE = 1e-3  # of the ways' losses, relative


class Step:
    """The GKD loss of one batch, whichever way, from hidden states and as a whole step with both models."""

    def __init__(self, teacher: Path, student: Path, data: Path, size: int):
        self.tokenizer = AutoTokenizer.from_pretrained(teacher)
        self.entries = vocabulary_size(self.tokenizer)
        self.teacher = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval().requires_grad_(False)
        self.student = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
        examples = load_examples(
            str(data), self.tokenizer, messages="messages", max_prompt_tokens=512, max_response_tokens=512
        ).usable[:size]
        responses = [one.response_ids for one in examples]
        self.batch = collate([one.prompt_ids for one in examples], responses, self.tokenizer.eos_token_id)
        self.objective = kd.GKD(beta=BETA)
        with torch.no_grad():
            self.hidden = [self._trunk(model) for model in (self.student, self.teacher)]

    def loss(self, way: str) -> torch.Tensor:
        """From hidden states that are there: what comes behind both trunks, forward and backward."""
        own = self.hidden[0].detach().requires_grad_()
        loss = self._of_hidden(way, own, self.hidden[1])
        loss.backward()
        return loss.detach()

    def step(self, way: str) -> torch.Tensor:
        """Both trunks too."""
        with torch.no_grad():
            scored = self._trunk(self.teacher)
        loss = self._of_hidden(way, self._trunk(self.student), scored)
        loss.backward()
        return loss.detach()

    def forget(self) -> None:
        """Drops the gradients."""
        self.student.zero_grad(set_to_none=True)

    def _trunk(self, model: PreTrainedModel) -> torch.Tensor:
        """Its last hidden states [B, L, H]."""
        return kd.Head.of(model, vocab_size=self.entries, **self.batch.inputs).hidden

    def _of_hidden(self, way: str, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        weights = [model.get_output_embeddings().weight for model in (self.student, self.teacher)]
        layout = self.batch.layout
        if way == OURS:
            sources = [kd.Head(one, w, vocab_size=self.entries) for one, w in zip((own, other), weights, strict=True)]
            return self.objective(*sources, layout).loss
        if way == GATHERED:
            own, other = (one.flatten(0, 1)[layout.index] for one in (own, other))
        values = _jsd(own @ weights[0].T, other @ weights[1].T, BETA)
        values = values if way == GATHERED else values.flatten()[layout.index]
        return (layout.sums(values) / torch.tensor(layout.lengths)).mean()


def _jsd(z_s: torch.Tensor, z_t: torch.Tensor, beta: float) -> torch.Tensor:
    """[..., V] logits to [...]: beta KL(p, m) + (1 - beta) KL(q, m), m = beta p + (1 - beta) q, in eager PyTorch."""
    log_q, log_p = (log_softmax_of(z, -1) for z in (z_s, z_t))
    weights = torch.tensor([beta, 1 - beta])
    log_m = torch.logsumexp(torch.stack([log_p, log_q]) + weights.log().view(2, *[1] * log_p.dim()), 0)
    parts = [kl_div(log_m, one, reduction="none", log_target=True).sum(-1) for one in (log_p, log_q)]
    return beta * parts[0] + (1 - beta) * parts[1]


def measure(step: Step, rounds: int = ROUNDS) -> dict:
    """Seconds (the least of `rounds`, the ways taking turns) and MiB beyond what was there, of loss and step each way;
    the sizes of the batch. Raises RuntimeError where the ways do not agree on the loss.
    """
    costs = {way: {"loss": {}, "step": {}} for way in (OURS, GATHERED, ALL)}
    losses = {}
    _give_back_blocks(1 << 16)
    for way, cost in costs.items():
        for name in cost:
            cost[name]["mib"], losses[way] = _peak(step, name, way)
    _give_back_blocks(32 << 20)
    lowest, highest = min(losses.values()), max(losses.values())
    if not (lowest > 0 and highest - lowest <= TOLERANCE * highest):
        raise RuntimeError(f"step_cost: expected the same loss from every way, got {losses}")
    for _ in range(rounds):
        for way, cost in costs.items():
            for name in cost:
                start = time.perf_counter()
                getattr(step, name)(way)
                seconds = time.perf_counter() - start
                step.forget()
                cost[name]["seconds"] = min(seconds, cost[name].get("seconds", seconds))
    responses, length = step.batch.input_ids.shape
    tokens = sum(step.batch.layout.lengths)
    sizes = {"responses": responses, "length": length, "tokens": tokens, "vocabulary": step.entries}
    return {"sizes": sizes, "costs": costs, "threads": torch.get_num_threads()}


def _give_back_blocks(size: int) -> None:
    """Memory in blocks of `size` bytes and more goes back to the system when it is freed, so that it counts again when
    it is taken again. 32 MiB is what glibc's own threshold grows to.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, size)  # M_MMAP_THRESHOLD


def _peak(step: Step, name: str, way: str) -> tuple[float | None, float]:
    """MiB of this process at its most beyond those before (None where Linux does not say), and the loss."""
    step.forget()
    gc.collect()
    memory.release()
    status = Path("/proc/self/clear_refs")
    if not status.exists():
        return None, getattr(step, name)(way).item()
    ctypes.CDLL(None).malloc_trim(0)
    status.write_text("5")  # the peak is now what is resident
    before = _resident("VmRSS")
    loss = getattr(step, name)(way).item()
    extra = _resident("VmHWM") - before
    step.forget()
    return extra, loss


def _resident(line: str) -> float:
    """VmRSS or VmHWM (the peak) of this process, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(each.split()[1]) for each in lines if each.startswith(f"{line}:")) / 1024


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, and writes the file."""
    parser = argparse.ArgumentParser(prog="python -m kdkernels.demo.lm.step_cost")
    for name in ("data", "teacher", "student", "file"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--responses", type=int, default=8)
    options = parser.parse_args(arguments)
    found = measure(Step(options.teacher, options.student, options.data, options.responses))
    unfinished = options.file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(found, indent=1), encoding="utf-8")
    unfinished.replace(options.file)


if __name__ == "__main__":
    main()
