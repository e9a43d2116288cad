"""A judge's scores of both models' proposals at every prefix of the stored responses; made once, read by training.

proposals-teacher-00000.safetensors   of the responses in teacher-00000.jsonl, the tokens that the student proposes
proposals-student-00000.safetensors   of those in student-00000.jsonl, the tokens that the teacher proposes
scores-teacher-00000.safetensors ...  for the same responses:
    ids [R, 16] uint8      the sample_id of each response
    lengths [R] int64      its tokens
    student [N], teacher [N] float32   r(c, a_S) and r(c, a_T) of all tokens, one response behind the other

Axes: R responses of a file, N their tokens.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdkernels.data import Batch, Example, Examples, collate, sample_id
from kdkernels.data.tokenizers import vocabulary_size
from kdkernels.errors import InputError
from kdkernels.judges import FunctionScorer, Judge, Scorer, ValueHead, scores
from kdkernels.judges.function import find_function
from kdkernels.objectives import validity_weights
from kdkernels.training.models.loading import read_tokenizer
from kdkernels.training.offline.progress import Progress
from kdkernels.training.offline.responses import AUTHORS, file_names, of_author, seed_of
from kdkernels.training.offline.store import Store
from kdkernels.training.processes import distributed
from kdkernels.training.recipe.config import Config
from kdkernels.training.run.identity import MANIFEST, identify

OTHER = {"teacher": "student", "student": "teacher"}


def judge_sources(config: Config) -> dict[str, str]:
    """Where the judge and what it scored lies, for run/identity.py."""
    judge = config.judge
    if judge.path is not None:
        places = {"[judge] path": judge.path}
    else:
        places = {f"[judge] function {judge.function}": str(find_function(judge.function)[1])}
    return places | {"[responses] output": str(Path(config.responses.output) / MANIFEST)}


def scores_store(config: Config) -> Store:
    """Where the scores are. Raises InputError for a judge that cannot be read."""
    judge = config.judge
    settings = {"[judge] proposals": judge.proposals, "[run] seed": config.run.seed}
    if judge.path is not None:  # of a function, batches cannot change what it says
        settings |= {"[judge] batch_size": judge.batch_size, "[judge] dtype": judge.dtype}
    return Store(judge.output, "[judge] output", identify(judge_sources(config)), settings)


def write_scores(config: Config, store: Store, tokenizer: PreTrainedTokenizerBase, responses: Examples) -> None:
    """Writes what is missing of proposals and scores; all processes call this together, with the store opened."""
    shards = _shards(config, responses)
    for author in AUTHORS:
        _write_proposals(config, store, tokenizer, author, shards[author])
    _write_judged(config, store, tokenizer, {name: part for one in shards.values() for name, part in one.items()})
    store.finish([f"{kind}-{name}" for kind in ("proposals", "scores") for one in shards.values() for name in one])


def _shards(config: Config, responses: Examples) -> dict[str, dict[str, Sequence[Example]]]:
    """author -> file -> the responses that it is about."""
    size, count = config.responses.shard, len(responses.usable) // len(AUTHORS)
    out = {}
    for place, author in enumerate(AUTHORS):
        own = responses.usable[place :: len(AUTHORS)]
        names = file_names(author, count, size, "safetensors")
        out[author] = {name: own[size * i : size * (i + 1)] for i, name in enumerate(names)}
    return out


def _write_proposals(
    config: Config,
    store: Store,
    tokenizer: PreTrainedTokenizerBase,
    author: str,
    shards: Mapping[str, Sequence[Example]],
) -> None:
    names = [f"proposals-{name}" for name in shards]
    with of_author(config, tokenizer, OTHER[author], store, names) as model:
        if model is None:
            return
        total = sum(map(len, shards.values()))
        with Progress(f"the {OTHER[author]}'s proposals", total) as progress:

            def make(name: str) -> bytes:
                found = []
                for part in _parts(shards[name.removeprefix("proposals-")], config.judge.batch_size):
                    found += propose(model, part, vocabulary_size(tokenizer), config.judge.proposals, config.run.seed)
                    progress.add(len(part))
                return save({"proposals": torch.cat(found).int()})

            store.make(names, make)


def _write_judged(
    config: Config, store: Store, tokenizer: PreTrainedTokenizerBase, shards: Mapping[str, Sequence[Example]]
) -> None:
    names = [f"scores-{name}" for name in shards]
    if not distributed.by_first(lambda: store.missing(names)):
        return
    with distributed.together():
        scorer, called = load_scorer(config, tokenizer)
    with Progress("the judge's scores", sum(map(len, shards.values()))) as progress:

        def make(name: str) -> bytes:
            name = name.removeprefix("scores-")
            return _judged(config, store, scorer, called, name, shards[name], progress)

        store.make(names, make)


def _judged(
    config: Config,
    store: Store,
    scorer: Scorer,
    called: str,
    name: str,
    responses: Sequence[Example],
    progress: Progress,
) -> bytes:
    """The contents of a file of scores."""
    lengths = [len(one.response_ids) for one in responses]
    proposals = _read_proposals(store, store.root / f"proposals-{name}", lengths)
    other = dict(zip(map(id, responses), proposals, strict=True))
    found = []
    size = config.judge.batch_size if config.judge.path is not None else 1
    for part in _parts(responses, size):
        given = [[*one.prompt_ids] for one in part], [[*one.response_ids] for one in part]
        found += scores(scorer, called, *given, [other[id(one)].tolist() for one in part])
        progress.add(len(part))
    own, others = torch.cat(found, dim=1) if found else torch.zeros(2, 0)
    teacher = name.startswith("teacher")
    return save(
        {
            "ids": torch.tensor([[*bytes.fromhex(_id(one))] for one in responses], dtype=torch.uint8),
            "lengths": torch.tensor(lengths),
            "student": (others if teacher else own).contiguous(),
            "teacher": (own if teacher else others).contiguous(),
        }
    )


def _read_proposals(store: Store, file: Path, lengths: Sequence[int]) -> Sequence[Tensor]:
    """The proposals for responses of these lengths. Raises InputError for a file that is not theirs."""
    try:
        return load(file.read_bytes())["proposals"].split(lengths)
    except (OSError, LookupError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{store.key}: {file} is missing, cut or changed: delete it, and kdkernels rollout RECIPE makes it again: "
            f"{error}"
        ) from error


def _parts(responses: Sequence[Example], size: int) -> list[Sequence[Example]]:
    return [responses[i : i + size] for i in range(0, len(responses), size)]


def _id(example: Example) -> str:
    return sample_id(example.prompt_ids, example.response_ids)


@torch.no_grad()
def propose(model: PreTrainedModel, responses: Sequence[Example], vocab_size: int, how: str, seed: int) -> list[Tensor]:
    """What `model` proposes behind every prefix of the responses that another wrote [n], one tensor for each response.

    Args:
        vocab_size: the ids that have a token; the others have probability 0.
        how: "sampled" from the model's distribution (temperature 1, nothing cut off), with draws that depend on `seed`
            and the response alone, or "greedy".

    Raises:
        FloatingPointError: the model's logits are not finite.
    """
    batch = collate([one.prompt_ids for one in responses], [one.response_ids for one in responses], pad_id=0)
    logits = model(**batch.to(model.device).inputs).logits[..., :vocab_size].flatten(0, 1)
    out = []
    for example, index in zip(responses, batch.layout.index.split(batch.layout.lengths), strict=True):
        z = logits[index.to(logits.device)].float()
        if not z.amax(1).isfinite().all():
            raise FloatingPointError("the logits of the model that proposes tokens are not finite")
        if how == "greedy":
            out.append(z.argmax(1).cpu())
        else:
            generator = torch.Generator(z.device).manual_seed(seed_of(seed, _id(example)))
            out.append(torch.multinomial(z.softmax(1), 1, generator=generator)[:, 0].cpu())
    return out


def load_scorer(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[Scorer, str]:
    """The recipe's judge and what it is called. Raises InputError where it cannot be used."""
    judge = config.judge
    if judge.function is not None:
        called = f"[judge] function {judge.function}"
        return FunctionScorer(find_function(judge.function)[0], called, judge.batch_size), called
    own, needed = read_tokenizer(judge.path, "[judge] path").get_vocab(), tokenizer.get_vocab()
    differ = sorted(token for token, number in needed.items() if own.get(token) != number)
    if differ:
        raise InputError(
            f"[judge] path: expected a model that knows the recipe's tokens by their ids, but {len(differ)} of "
            f"{len(needed)} are others in the tokenizer of {judge.path}, for instance {differ[0]!r}: take a judge of "
            "the same family, or a [judge] function, which may read the ids as text"
        )
    return ValueHead.load(judge.path, getattr(torch, judge.dtype), distributed.device()), f"[judge] path {judge.path}"


class StoredWeights:
    """The weights of stored responses; a `Judge`.

    Args:
        weights: by a response's `sample_id` and whether the teacher wrote it, [n] for its tokens.
        place: where they are from, for error messages.
    """

    def __init__(self, weights: Mapping[tuple[str, bool], Tensor], place: str):
        self.weights, self.place = weights, place

    def of(self, sample: str, from_teacher: bool) -> Tensor:
        """The weights of a response [n]. Raises InputError for one that was not scored."""
        try:
            return self.weights[sample, from_teacher]
        except KeyError:
            author = "teacher" if from_teacher else "student"
            raise InputError(
                f"{self.place}: no scores of the {author}'s response {sample}: they are those of other responses; run "
                "kdkernels rollout RECIPE with another [judge] output"
            ) from None

    def __call__(self, batch: Batch) -> Tensor:
        """As `Judge`: 0 outside of the responses."""
        found = [self.of(*key) for key in zip(batch.ids, batch.from_teacher.tolist(), strict=True)]
        weights = torch.zeros(batch.target.shape)
        weights.view(-1)[batch.layout.index] = torch.cat(found)
        return weights.to(batch.target.device)


def read_judge(config: Config, responses: Examples) -> Judge | None:
    """The recipe's judge, whose weights come from the stored scores of `responses`; None where none is asked.

    Raises InputError where scores are missing, cut, of another judge or of other responses.
    """
    if not config.asks_judge:
        return None
    if not config.needs_scores:
        return lambda batch: torch.ones(batch.target.shape, device=batch.target.device)
    weights = {}
    for path in scores_store(config).check():
        if not path.name.startswith("scores-"):
            continue
        read = load_file(path)
        found = validity_weights(read["student"], read["teacher"], config.judge.rule)
        ids = [bytes(one).hex() for one in read["ids"].tolist()]
        keys = [(one, path.name.startswith("scores-teacher")) for one in ids]
        weights |= dict(zip(keys, found.split(read["lengths"].tolist()), strict=True))
    judge = StoredWeights(weights, f"[judge] output {config.judge.output}")
    for one in responses.usable:
        judge.of(_id(one), one.from_teacher)
    return judge
