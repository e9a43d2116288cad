"""What a teacher known at K words of each token loses, on a real model's text: its JSD against the whole one, and what
a student becomes that learns from lists with and without a bucket for all other words.

    KDKERNELS_SMOLLM2=DIRECTORY python benchmarks/stored_teachers.py [--tokens 24] [--steps 150] [--data FILE]

The teacher is SmolLM2-135M-Instruct (any causal LM will do), the text is its own answers to the prompts below, or those
in a file of {"question": TEXT, "answer": TEXT} a line, such as GSM8K's. The student has the teacher's layers but for a
fifth in the middle. In the run, a linear map over its last hidden states is all that is trained, on hidden states that
are computed once: z = (h + A h) W^T, by the reverse KL at K = 16.

Axes: N tokens, H hidden, V vocabulary, K words.
"""

import argparse
import json
import os
import time
from functools import partial
from itertools import islice

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kdkernels as kd
from kdkernels.reference import sampled_masses
from kdkernels.teachers.stored import bytes_per_token, packed_top_k, unpacked_top_k

SUBJECTS = ("the sea", "bread", "prime numbers", "a train", "winter", "the moon", "chess", "glass", "a river", "bees")
ASKED = ("Explain in two sentences what is special about {}.", "Write a short story about {}.")
WORDS = (16, 64, 128, 256)
READ = 12  # lines of --data


def states(directory: str, tokens: int, data: str | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states [N, H] of teacher and student at the tokens of the answers, and their lm_head [V, H]."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    pairs = [(ask.format(one), None) for ask in ASKED for one in SUBJECTS]
    if data is not None:
        with open(data, encoding="utf-8") as lines:
            pairs = [(one["question"], one["answer"]) for one in map(json.loads, islice(lines, READ))]
    found = []
    with torch.no_grad():
        texts = [answered(model, tokenizer, *pair, tokens) for pair in pairs]
        for part in ("teacher", "student"):
            if part == "student":
                layers = len(model.model.layers)
                kept = [i for i in range(layers) if not 2 * layers // 5 <= i < 3 * layers // 5]
                model.model.layers = torch.nn.ModuleList([model.model.layers[i] for i in kept])
            found.append(torch.cat([kd.hidden_states(model, input_ids=ids)[0, start - 1 : -1] for ids, start in texts]))
    return *found, model.lm_head.weight.detach()


def answered(model, tokenizer, question: str, answer: str | None, tokens: int) -> tuple[torch.Tensor, int]:
    """The ids [1, L] of a question with its answer, by default a draw of the model's, and where the answer begins."""
    turn = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    ids, own = (
        tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids for text in (prompt, answer or "")
    )
    if answer is None:
        drawn = {"max_new_tokens": tokens, "do_sample": True, "top_k": 0, "pad_token_id": 0}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **drawn), ids.shape[1]
    return torch.cat((ids, own), 1), ids.shape[1]


def lists(teacher: kd.Head, k: int, sampled: bool = False) -> tuple[torch.Tensor, torch.Tensor, int]:
    """As they are stored and read again: ids and log-probabilities [N, K], bytes a token."""
    if sampled:
        drawn = kd.TopK.sample(teacher, k)
        known = drawn.indices, drawn.log_probs
    else:
        likeliest = kd.statistics(teacher, topk=k)
        known = likeliest.topk_indices, likeliest.topk_log_probs
    rows = packed_top_k(*known, teacher.vocabulary, sampled)
    return *unpacked_top_k(rows, sampled), bytes_per_token(rows)


def losses(student: kd.Head, teacher: kd.Head) -> list[dict[str, object]]:
    """The mean divergences of the whole teacher, and how far those of stored words are off; for drawn ones with the
    standard error of that difference.
    """
    divergences = {f"JSD({beta})": kd.JSD(beta) for beta in (0.1, 0.5, 0.9)}
    divergences |= {"forward KL": kd.ForwardKL(), "reverse KL": kd.ReverseKL()}
    whole = {name: kd.divergence(student, teacher, one).double() for name, one in divergences.items()}
    means = {name: each.mean().item() for name, each in whole.items()}
    found = [{"K": teacher.vocabulary, "bytes": 2 * teacher.width, **means}]
    for sampled in (False, True):
        for k in WORDS:
            ids, log_probs, size = lists(teacher, k, sampled)
            stored = kd.TopK(ids, log_probs, sampled=sampled)
            row = {"K": f"{k} drawn" if sampled else k, "bytes": size}
            for name, one in divergences.items():
                if sampled and name == "reverse KL":
                    row[name] = "-"
                else:
                    off = kd.divergence(student, stored, one).double() - whole[name]
                    row[name] = f"{off.mean():+.5f}" + (f" ± {off.std() / len(off) ** 0.5:.5f}" if sampled else "")
            found.append(row)
    return found


def costs(student: kd.Head, teacher: kd.Head, k: int = 128, rounds: int = 5) -> None:
    """Prints how many of the drawn words are certain, and medians of seconds in turns: of the loss, forward and
    backward, and of finding the words.
    """
    makers = {"likeliest": lambda: kd.statistics(teacher, topk=k), "drawn": lambda: kd.TopK.sample(teacher, k)}
    known, drawn = (make() for make in makers.values())
    certain = (sampled_masses(drawn.log_probs.double()) <= drawn.log_probs.double().exp()).sum(1)
    print(
        f"certain of {k} drawn words: {certain.min()} to {certain.max()}, {certain.double().mean():.1f} in the mean\n"
    )
    head = kd.Head(student.hidden.clone().requires_grad_(), student.weight.clone().requires_grad_())
    sources = {"whole": teacher, "likeliest": kd.TopK(known.topk_indices, known.topk_log_probs), "drawn": drawn}

    def loss(source: kd.sources.Source) -> None:
        torch.autograd.grad(kd.divergence(head, source, kd.JSD(0.5)).mean(), (head.hidden, head.weight))

    calls = {f"loss, {name}": partial(loss, source) for name, source in sources.items()}
    calls |= {f"finding, {name}": make for name, make in makers.items()}
    seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    show([{"seconds": name, "median": sorted(each)[rounds // 2]} for name, each in seconds.items()])


def drift(
    student: torch.Tensor, teacher: kd.Head, steps: int, k: int = 16
) -> tuple[dict[str, dict[str, float]], dict[str, torch.Tensor]]:
    """What the student is after so many steps of each kind of teacher, over all tokens: nats, and the mass of its words
    beyond the teacher's K; and its hidden states then.
    """
    ids, log_probs, _ = lists(teacher, k)
    count, width = student.shape
    arms = {
        "whole": lambda at: kd.Head(teacher.hidden[at], teacher.weight),
        "bucket": lambda at: kd.TopK(ids[at], log_probs[at]),
        "renormalised": lambda at: kd.TopK(ids[at], log_probs[at], renormalize=True),
    }
    found, states = {"start": measured(kd.Head(student, teacher.weight), teacher, ids)}, {}
    for name, source in arms.items():
        torch.manual_seed(0)
        adapter = torch.zeros(width, width, requires_grad=True)
        optimizer = torch.optim.AdamW([adapter], lr=1e-3, weight_decay=0.0)
        for _ in range(steps):
            at = torch.randperm(count)[:128]
            head = kd.Head(student[at] + student[at] @ adapter, teacher.weight)
            optimizer.zero_grad()
            kd.divergence(head, source(at), kd.ReverseKL()).mean().backward()
            optimizer.step()
        states[name] = (student + student @ adapter).detach()
        found[name] = measured(kd.Head(states[name], teacher.weight), teacher, ids)
    return found, states


def measured(student: kd.Head, teacher: kd.Head, ids: torch.Tensor) -> dict[str, float]:
    """Means over the tokens, in nats, and the student's mass beyond the words `ids` [N, K]."""
    known = kd.statistics(student)
    logits = torch.einsum("nh,nkh->nk", student.hidden, student.weight[ids.long()])
    return {
        "entropy": known.entropy.mean().item(),
        "outside": 1 - (logits - known.lse[:, None]).exp().sum(1).mean().item(),
        "KL(q, p)": kd.divergence(student, teacher, kd.ReverseKL()).mean().item(),
        "KL(p, q)": kd.divergence(student, teacher, kd.ForwardKL()).mean().item(),
    }


def show(rows: list[dict]) -> None:
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{one:.5f}" if isinstance(one, float) else str(one) for one in row.values()) + " |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=24, help="of an answer")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--data", metavar="FILE", help="answers in place of the teacher's own")
    parser.add_argument("--states", help="a file that keeps the hidden states for the next time")
    options = parser.parse_args()
    torch.manual_seed(0)
    start = time.time()
    if options.states and os.path.exists(options.states):
        of_teacher, of_student, weight = torch.load(options.states)
    else:
        of_teacher, of_student, weight = states(os.environ["KDKERNELS_SMOLLM2"], options.tokens, options.data)
    if options.states:
        torch.save((of_teacher, of_student, weight), options.states)
    teacher = kd.Head(of_teacher, weight)
    print(f"{len(of_teacher)} tokens, {time.time() - start:.0f} s\n", flush=True)
    show(losses(kd.Head(of_student, weight), teacher))
    costs(kd.Head(of_student, weight), teacher)
    found, trained = drift(of_student, teacher, options.steps)
    print("the same after training with the whole teacher\n")
    show(losses(kd.Head(trained["whole"], weight), teacher))
    entropy = kd.entropy(teacher).mean().item()
    show([{"teacher": name, **row} for name, row in found.items()])
    print(f"the teacher's entropy: {entropy:.5f}; {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
