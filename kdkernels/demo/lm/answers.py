"""What the teacher answers, written once and kept: the data that every arm learns from or is measured on.

Answers are greedy: the teacher's most probable words. One that is not finished within the limit is left out, for who
learnt from it would learn to break off. A batch is a file, written at once: what was interrupted goes on with the next.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from kdkernels.data.jsonl import json_line
from kdkernels.rollouts import LocalSampler
from kdkernels.training.run.atomic import write_text

AT_ONCE = 32  # prompts that are answered together


def answer(model: Path, prompts: Sequence[str], longest: int, parts: Path, file: Path) -> None:
    """Writes conversations of two messages, a prompt and the model's answer, to `file`, one JSON object a line.

    Args:
        model: a chat model's directory.
        prompts: what the user says.
        longest: of an answer, in tokens, the one that ends it included.
        parts: where the answers to AT_ONCE prompts at a time are kept until all are there.
    """
    if file.is_file():
        return
    parts.mkdir(parents=True, exist_ok=True)
    missing = [start for start in range(0, len(prompts), AT_ONCE) if not _part(parts, start).is_file()]
    sampler = load_sampler(model) if missing else None
    for start in tqdm(missing, desc=f"answers for {file.name}", unit="batch", disable=not missing):
        lines = answers(sampler, prompts[start : start + AT_ONCE], longest)
        write_text(_part(parts, start), "".join(map(json_line, lines)))
    kept = [line for start in range(0, len(prompts), AT_ONCE) for line in read(_part(parts, start)) if line["finished"]]
    if not kept:
        raise RuntimeError(f"{model}: expected answers of at most {longest} tokens, got none to {len(prompts)} prompts")
    print(f"{file}: {len(kept)} answers to {len(prompts)} prompts; the others are not finished after {longest} tokens")
    write_text(file, "".join(json_line({"messages": line["messages"]}) for line in kept))


def read(file: Path) -> list[dict]:
    """The records of a JSON lines file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def prompt_ids(tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """The ids of each prompt as the user's first message, with the template's generation prompt."""
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return tokenizer.apply_chat_template(conversations, add_generation_prompt=True, return_dict=False)


def load_sampler(model: Path) -> LocalSampler:
    """What writes answers with the model in a directory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return LocalSampler(AutoModelForCausalLM.from_pretrained(model, dtype="auto"), AutoTokenizer.from_pretrained(model))


def answers(sampler: LocalSampler, prompts: Sequence[str], longest: int) -> list[dict]:
    """The conversation of each prompt with its greedy answer, and whether that is finished."""
    ids = sampler.generate(prompt_ids(sampler.tokenizer, prompts), longest, greedy=True)
    lines = []
    for prompt, response in zip(prompts, ids, strict=True):
        text = sampler.tokenizer.decode(response, skip_special_tokens=True)
        pair = (("user", prompt), ("assistant", text))
        messages = [{"role": role, "content": content} for role, content in pair]
        lines.append({"messages": messages, "finished": response[-1] in sampler.ends and bool(text.strip())})
    return lines


def _part(parts: Path, start: int) -> Path:
    return parts / f"{start:06d}.jsonl"
