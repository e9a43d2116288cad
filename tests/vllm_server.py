"""What a vLLM server answers, by a tiny model of transformers: completions of token ids, weights that are loaded while
it runs, and defaults of its own that are as bad as they can be for whoever does not say what is wanted.
"""

import json
from pathlib import Path
from threading import Lock

import torch
from transformers import AutoModelForCausalLM

DEFAULTS = {  # of a server whose model's generation_config.json asks for all of this
    "temperature": 0.3,
    "top_p": 0.9,
    "top_k": 2,
    "min_p": 0.2,
    "presence_penalty": 1.0,
    "frequency_penalty": 1.0,
    "repetition_penalty": 2.0,
    "logit_bias": None,
    "max_tokens": 3,
    "min_tokens": 2,
    "ignore_eos": False,
    "stop_token_ids": [4],
    "seed": 0,
    "logprobs": None,
    "return_token_ids": False,
}
NEUTRAL = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
NEUTRAL |= {"repetition_penalty": 1.0, "min_tokens": 0, "ignore_eos": True}


class VllmServer:
    """The answers: `answer(path, body)`.

    `loaded`: the directories whose weights it was told to load, of which the first so many were (`loads`; None: all).
    `asked`: the requests for completions. `shift`: is added to every id that it answers. `log_prob`: what it says of
    every token instead of the truth. `temperature`: what it divides all logits by, whatever it is asked for.
    """

    def __init__(self, model: str | Path, loads: int | None = None, shift: int = 0, log_prob=None, temperature=1.0):
        self.model, self.loads, self.shift, self.log_prob = self._read(model), loads, shift, log_prob
        self.temperature, self.loaded, self.asked, self.lock = temperature, [], [], Lock()

    def answer(self, path: str, body: bytes) -> dict:
        said = json.loads(body)
        with self.lock:
            if path == "/collective_rpc":
                assert said["method"] == "reload_weights", said
                self.loaded.append(said["kwargs"]["weights_path"])
                if self.loads is None or len(self.loaded) <= self.loads:
                    self.model = self._read(self.loaded[-1])
                return {"results": [None]}
            if path == "/reset_prefix_cache":
                return {"success": True}
            assert path == "/v1/completions", path
            self.asked.append(said)
            return {"choices": [self._complete(said["prompt"], DEFAULTS | said)]}

    def _read(self, directory: str | Path):
        return AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()

    @torch.no_grad()
    def _complete(self, prompt: list[int], asked: dict) -> dict:
        assert {name: asked[name] for name in NEUTRAL} == NEUTRAL, asked
        assert asked["return_token_ids"] and asked["logprobs"] == 0 and asked["temperature"] in (0, 1)
        generator, ids, log_probs = torch.Generator().manual_seed(asked["seed"]), [], []
        while len(ids) < asked["max_tokens"] and not (ids and ids[-1] in asked["stop_token_ids"]):
            logits = self.model(torch.tensor([prompt + ids])).logits[0, -1].float()
            for token, bias in (asked["logit_bias"] or {}).items():
                logits[int(token)] += bias
            values = (logits / self.temperature).log_softmax(0)
            greedy = asked["temperature"] == 0
            token = values.argmax() if greedy else torch.multinomial(values.exp(), 1, generator=generator)[0]
            ids.append(int(token))
            log_probs.append(values[token].item() if self.log_prob is None else self.log_prob)
        ids = [token + self.shift for token in ids]
        return {"index": 0, "text": "", "token_ids": ids, "logprobs": {"token_logprobs": log_probs}}
