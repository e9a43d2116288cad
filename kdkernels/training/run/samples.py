"""rollouts-000123.jsonl: some of what the student wrote in that step, to be read by people."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from kdkernels.data import Example
from kdkernels.training.processes import distributed
from kdkernels.training.recipe.config import Config
from kdkernels.training.run.directory import RunDirectory


class Samples:
    """Keeps rollouts of the first step whose responses the student writes, and of every `samples_every`-th of these
    steps ([rollout]), at the head of the step's batch. `ends`: the ids any of which ends a response.
    """

    def __init__(self, config: Config, run: RunDirectory, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]):
        self.rollout, self.run, self.tokenizer, self.ends = config.rollout, run, tokenizer, set(ends)

    def keep(self, step: int, written: int, examples: Sequence[Example], responses: Sequence[Sequence[int]]) -> None:
        """Writes the file of `step`, if it is one of these; all processes call this together. Raises DiskError.

        Args:
            written: the steps up to this one, itself included, whose responses the student wrote.
            examples, responses: this process's share of the batch, which holds every n-th example, and what the student
                wrote to it, as ids.
        """
        if self.rollout.samples == 0 or (written != 1 and written % self.rollout.samples_every):
            return
        own = [self._record(*pair) for pair in zip(examples, responses, strict=True)]
        records = [record for turn in zip(*distributed.gathered(own), strict=True) for record in turn]
        self.run.write_records(self.run.rollouts(step), records[: self.rollout.samples])

    def _record(self, example: Example, response: Sequence[int]) -> dict[str, object]:
        finished = response[-1] in self.ends
        ids = list(response[:-1] if finished else response)
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return {
            "line": example.line,
            "prompt": example.prompt,
            "response": text,
            "tokens": len(response),
            "finished": finished,
        }
