"""Teachers behind a server on loopback: sums of two numbers, answered well or in a way in which models fail."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

ASKED = re.compile(r"What is (\d+) plus (\d+)\?")
# Ways to fail, by what the decision on such an answer says. The number of a query chooses one.
WAYS = {
    "truncated": {"finish_reason": "length"},
    "rationale is empty": {"rationale": " "},
    "label is empty": {"label": ""},
    "confidence is no decimal number": {"confidence": "high"},
    "confidence is outside [0, 1]": {"confidence": "95"},
    "confidence is missing": {"whole": "<rationale>I add.</rationale><label>3</label>"},
    "text outside the sections": {"before": "Certainly! "},
    "confidence below the threshold": {"confidence": "0.94"},
}


def sections(rationale: str, label: str, confidence: str) -> str:
    return f"<rationale>\n{rationale}\n</rationale>\n<label>{label}</label>\n<confidence>{confidence}</confidence>\n"


def completion(content, finish_reason: str = "stop", tokens: int = 7) -> dict:
    """The JSON of a chat completion."""
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}
    usage = {"prompt_tokens": 100, "completion_tokens": tokens, "total_tokens": 100 + tokens}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}


def way_of(model: str, a: int) -> str | None:
    """How the teacher fails at a query; None: it does not. Teachers fail at different ones."""
    ways = list(WAYS)
    number = (a + 3 * len(model)) % 20
    return ways[number] if number < len(ways) else None


def oracle(path: str, body: bytes) -> dict:
    """What the server says to a request: the model's name decides how it thinks."""
    asked = json.loads(body)
    assert path == "/v1/chat/completions", path
    a, b = map(int, ASKED.search(asked["messages"][0]["content"]).groups())
    way = WAYS.get(way_of(asked["model"], a), {})
    rationale = f"{asked['model']} räsoniert 🧮: {a} + {b} = {a + b}." + " Aha." * len(asked["model"])
    if a % 50 == 49:
        rationale += "x" * 10**6
    parts = {"rationale": rationale, "label": str(a + b), "confidence": "0.97"} | way
    content = parts.get("whole") or sections(parts["rationale"], parts["label"], parts["confidence"])
    answer = completion(parts.get("before", "") + content, parts.get("finish_reason", "stop"))
    if asked.get("logprobs"):
        answer["choices"][0]["logprobs"] = {
            "content": [{"token": "x", "logprob": -0.01}, {"token": "y", "logprob": -0.03}]
        }
    return answer


def write_recipe(
    root: Path, url: str, queries: int = 8, teachers: Sequence[str] = ("ann", "ben", "carla"), **keys
) -> Path:
    """recipe.toml and queries.jsonl in `root`; `keys` go into [curation] (t_...: into each teacher's table)."""
    lines = [{"question": f"What is {a} plus {a % 7}?", "answer": str(a + a % 7)} for a in range(queries)]
    (root / "queries.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = {key: value for key, value in keys.items() if not key.startswith("t_")}
    data = {"queries": f"{root}/queries.jsonl", "query": "{question}", "label": "{answer}", "task": "mathematics"}
    own = {"output": f"{root}/out", "diversity": "random"} | data | own
    text = "[curation]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in own.items())
    each = {"timeout": 60.0, "backoff": 0.001, "concurrency": 4, "max_new_tokens": 50}
    each |= {key[2:]: value for key, value in keys.items() if key.startswith("t_")}
    for name in teachers:
        text += f'[[curation.teachers]]\nname = "{name}"\nkind = "openai"\nurl = "{url}/v1"\nmodel = "{name}"\n'
        text += "".join(f"{key} = {json.dumps(value)}\n" for key, value in each.items())
    recipe = root / "recipe.toml"
    recipe.write_text(text)
    return recipe


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
