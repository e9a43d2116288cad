"""What a recipe says, in frozen dataclasses that the whole trainer works from.

Every class below is a TOML table, every field of it a key. `read.py` reads them from a file.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from kdkernels.training.recipe.schema import Rule

TEACHERS = "teachers"  # the section of several
FINAL = "final"  # the directory of a trained model, in that of its run

Count = Annotated[int, Rule(lambda value: value >= 1, "an integer >= 1")]
CountOrZero = Annotated[int, Rule(lambda value: value >= 0, "an integer >= 0")]
VocabularySize = Annotated[int, Rule(lambda value: 1 <= value <= 10**7, "an integer from 1 to 10^7")]
Seed = Annotated[int, Rule(lambda value: value >= 0, "an integer from 0 to 2^63 - 1")]
LearningRate = Annotated[float, Rule(lambda value: 0 < value <= 1e30, "a number > 0 and at most 1e30")]
Positive = Annotated[float, Rule(lambda value: 0 < value < float("inf"), "a finite number > 0")]
PositiveOrZero = Annotated[float, Rule(lambda value: 0 <= value < float("inf"), "a finite number >= 0")]
Epochs = Annotated[float, Rule(lambda value: 0 < value <= 10**6, "a number > 0 and at most 1e6")]
Place = Annotated[str, Rule(lambda value: value.strip() and "\0" not in value, "a path, which is not empty")]
Name = Annotated[str, Rule(lambda value: value.strip(), "a name, which is not empty")]
Share = Annotated[float, Rule(lambda value: 0 <= value <= 1, "a number from 0 to 1")]
PositiveShare = Annotated[float, Rule(lambda value: 0 < value <= 1, "a number > 0 and at most 1")]
Momentum = Annotated[float, Rule(lambda value: 0 <= value < 1, "a number >= 0 and < 1")]
Timeout = Annotated[float, Rule(lambda value: 1 <= value <= 10**9, "a number from 1 to 1e9")]
Attention = Literal["auto", "flash_attention_2", "sdpa", "eager"]
ZeroStage = Annotated[int, Rule(lambda value: 0 <= value <= 3, "0, 1, 2 or 3")]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """`output`: the run's directory. `dtype`: of the models' weights; with bfloat16 the optimizer keeps float32 master
    weights. `timeout_seconds`: a process that waits longer for the others ends with an error; it must exceed what one
    process does alone, such as writing final/ or the longest rollout of a step.
    """

    output: Place
    seed: Seed = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    timeout_seconds: Timeout = 1800.0


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """A low-rank adapter of PEFT on the model at [student] `path`, whose own weights stay as they are: z = W h +
    alpha / r * B A h in each layer that has one. Checkpoints and final/ hold the adapter alone, as PEFT reads it. DoRA
    on the output layer makes that layer's whole weight for each micro-batch, LoRA does not.

    `target_modules`: the last parts of the names of linear layers; "lm_head" is the output layer and "all-linear" all
    others, whatever the model calls them. `dropout`: of the adapter's inputs. `merge`: final/ is a whole model, with
    W + alpha / r * B A in place of W (an output layer that has an adapter is then no longer tied to the embedding).
    """

    kind: Literal["lora", "dora"] = "lora"
    r: Count = 16
    alpha: Positive = 32.0
    dropout: Momentum = 0.0
    target_modules: tuple[str, ...] = ("all-linear",)
    merge: bool = False


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """A pretrained model (`path`: directory or hub name) or fresh weights (`architecture`: a transformers configuration
    with its `model_type`).

    `path` may be that of a run, which stands for its final/ (`kdkernels export` makes a model of a checkpoint).
    `path` may be the directory of an adapter: with an `adapter` of the same settings it is trained further, without one
    it is merged into its base, all of which is trained.
    `pad_vocab_to`: embedding and head of a fresh model get the tokenizer's size rounded up to a multiple of it.
    `adapter`: what is trained instead of the whole model; [student.adapter] says how.
    `attention`: transformers' implementation of it; "auto" is flash_attention_2 where flash-attn is installed, the GPU
    can run it (compute capability 8.0) and the weights are bfloat16, else what transformers takes (sdpa, as a rule).
    """

    path: Place | None = None
    architecture: dict | None = None
    pad_vocab_to: Count = 1
    attention: Attention = "auto"
    adapter: AdapterConfig | None = None


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """`path`: directory or hub name of a model that shares the student's tokenizer (an adapter's directory: merged into
    its base), or `base = true`: the student as it was, its adapter left out of the forward, which takes no weights.

    `url`: in place of them, a model that `kdkernels teacher-serve` serves, as http://HOST:PORT: its hidden states come
    from there. `cache`: a directory that `kdkernels teacher-cache` wrote, with what a teacher says about the data's
    responses (rollout.student_fraction = 0); a `path` or `url` beside it is that of the teacher that writes it, which a
    run does not load or ask.

    `placement`: "replicated" on every process's device; "cpu" in its CPU memory, copied to the device for each
    micro-batch; "zero3" in parts on all processes, each layer gathered while it is used.
    `dtype`: of its weights, [run] dtype by default. `attention`: as in [student].
    """

    path: Place | None = None
    base: bool = False
    url: Name | None = None
    cache: Place | None = None
    placement: Literal["replicated", "cpu", "zero3"] = "replicated"
    dtype: Literal["float32", "bfloat16"] | None = None
    attention: Attention = "auto"

    @property
    def model(self) -> str | None:
        """Where the model is that this process loads; None where there is none to load."""
        return self.path if self.cache is None else None


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """An existing tokenizer (`path`, by default the student's) or one trained on the training texts (`kind`; "bpe"
    needs `vocab_size`).
    """

    path: Place | None = None
    kind: Literal["characters", "bpe"] | None = None
    vocab_size: VocabularySize | None = None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """`train`: a file of one JSON object a line, or a dataset: a file or directory of Parquet, a directory that
    `save_to_disk` of Hugging Face's `datasets` wrote, or one of its hub as hf:NAME, hf:NAME:SPLIT ("train" by default)
    or hf:NAME:CONFIGURATION:SPLIT.

    `prompt`, `response`: templates over its fields (texts or numbers). A recipe that never reads responses may leave
    theirs out. Or, in place of both, `messages`: the field that holds a conversation, a list of {role, content}, for
    the tokenizer's chat template. `answers`: "all" of the assistant's messages are a response each, with all before it
    as its prompt; "last": the last one alone. The loss is of their tokens and the token that ends them.

    `max_prompt_tokens`, `max_response_tokens` (end-of-sequence token included; where responses are read): longer
    examples are left out, counted and reported. Together they must fit the models' `max_position_embeddings`.

    `teacher`: the field that names which of several teachers scores a record's responses; each is a table
    [teachers.NAME] with the keys of [teacher], in place of that section.

    `special_tokens_in_fields`: the fields hold special tokens that are meant as such (texts rendered by a chat
    template). Otherwise a special token in a field is an error: only the templates may have them.

    `by_length`: the examples of a step are of similar length (prompt and response, where it is read), in an order that
    is random otherwise: the processes get alike amounts of tokens and next to no padding. false: a plain random order,
    so that a step's lengths are those of the data.
    """

    train: Place
    prompt: str | None = None
    response: str | None = None
    messages: str | None = None
    answers: Literal["all", "last"] = "all"
    max_prompt_tokens: Count
    max_response_tokens: Count
    teacher: Name | None = None
    special_tokens_in_fields: bool = False
    by_length: bool = True


@dataclass(frozen=True, kw_only=True)
class ResponsesConfig:
    """Responses to the prompts of [data], a teacher's and a student's to each, which `kdkernels rollout RECIPE` writes
    once, before training: a step then has both of each prompt, which are two of `train.batch_size` (docs/VCRD.md).

    `output`: their directory. `temperature`, `top_p`: how they are sampled; data.max_response_tokens is the longest
    one. `batch_size`: prompts that a process answers at a time. `shard`: prompts of a file, which a killed command
    begins anew.
    """

    output: Place
    temperature: Positive = 0.8
    top_p: PositiveShare = 0.95
    batch_size: Count = 32
    shard: Count = 256


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Scores the models' proposals r(c, a) in [0, 1] at every prefix of [responses], for an objective that needs a
    judge's weights (VCRD with weighting "given"); `kdkernels rollout RECIPE` stores them (docs/VCRD.md).

    `path`: a process reward model with a value head, or `function`: a Python function as module:function. `output`:
    where the scores are, by default scores/ in [responses] `output`. `proposals`: how the model that did not write a
    response proposes a token, sampled from its distribution or its most probable one. `rule`: the weights, r_S / r_T
    and its ablations; "uniform", which is 1, needs no scores. `batch_size`: responses that are scored at a time, of a
    function prefixes. `dtype`: of the model, [run] dtype by default.
    """

    path: Place | None = None
    function: Name | None = None
    output: Place | None = None
    proposals: Literal["sampled", "greedy"] = "sampled"
    rule: Literal["ratio", "clamped_ratio", "difference", "student", "uniform"] = "ratio"
    batch_size: Count = 8
    dtype: Literal["float32", "bfloat16"] | None = None


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """`student_fraction`: share of steps whose responses the student generates; the others take the data's, which count
    as the teacher's, or those of [responses]. Default: 0 with [responses], else 1 where the objective has a teacher,
    1/2 where it distinguishes teacher and student responses, else 0. `max_new_tokens`: tokens after which an
    unfinished rollout stops; `data.max_response_tokens` by default.

    `samples`: so many rollouts of a step are kept as texts in rollouts-000123.jsonl (4 by default, batch_size where
    that is less; 0: none), at the first step whose responses the student writes and at every `samples_every`-th of
    these steps (a tenth of train.steps by default).

    `updates`: so many of these steps in a row share one generation, which writes to the prompts of all of them at once
    with the weights of the first. `reuse`: each of its batches is trained on so often, in turn: updates / reuse batches
    are written. `max_staleness`: responses that were written more steps ago are written anew before they are used
    (by default never). docs/ROLLOUTS.md says what that costs and saves.

    `engine`: what writes the responses (docs/ROLLOUTS.md): "transformers" the student itself; "vllm" an engine in each
    process (an extra of kdkernels), which takes the share `gpu_memory` of its GPU (0.3 by default); "server" a vLLM
    server at `url`, with at most `at_once` requests of a process under way (64 by default), tried again where they fail
    or take more than `timeout_seconds` (an eighth of run.timeout_seconds by default). `key_variable`: the environment
    variable that has the server's key.

    `weights`: the directory that an engine's weights are handed over in, of this run alone (by default rollout-weights
    in the run's; one in memory, such as under /dev/shm, is faster). `max_drift`: after every handing over, the engine's
    log-probabilities of some drawn tokens are compared with the student's; where they are more than so many nats apart
    in the mean, the run stops (0.1 by default).
    """

    student_fraction: Share | None = None
    max_new_tokens: Count | None = None
    samples: CountOrZero | None = None
    samples_every: Count | None = None
    updates: Count = 1
    reuse: Count = 1
    max_staleness: CountOrZero | None = None
    engine: Literal["transformers", "vllm", "server"] = "transformers"
    url: Name | None = None
    key_variable: Name | None = None
    at_once: Count | None = None
    timeout_seconds: Positive | None = None
    gpu_memory: Share | None = None
    weights: Place | None = None
    max_drift: Positive | None = None


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """`name`: an objective of kdkernels; `options`: its constructor's arguments, beside `name` in the TOML table."""

    name: str
    options: dict = field(default_factory=dict)

    def build(self):
        """The objective itself."""
        from kdkernels import objectives  # here, because it imports torch, which reading a recipe does without

        return getattr(objectives, self.name)(**self.options)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW. `warmup_ratio`: share of the steps over which the rate rises to `lr`, after which it stays or follows half
    a cosine to 0.

    `weight_decay`: each step takes the share lr * weight_decay off the weights, which must not exceed all of it.
    `max_grad_norm`: the gradient is scaled down to this norm; 0 leaves it alone.
    """

    lr: LearningRate
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    weight_decay: PositiveOrZero = 0.0
    warmup_ratio: Share = 0.1
    schedule: Literal["cosine", "constant"] = "cosine"
    max_grad_norm: PositiveOrZero = 1.0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """`steps`: optimizer steps of the whole run; or `epochs`, how often it sees its usable examples: 2.5 of 1000 are
    2500 responses, in as many steps as that takes. A recipe has one of the two.

    `batch_size`: responses per optimizer step, over all processes. `micro_batch_size`: responses per process and
    forward pass. `gradient_checkpointing`: each layer of the student keeps its input alone and computes the rest again
    in the backward pass, which takes a third longer and much less memory; the gradients are the same.

    `max_skipped_steps`: a step whose loss or gradient is not finite changes nothing and is counted; a run that has to
    skip more than so many in a row has diverged and stops.
    """

    steps: Count | None = None
    epochs: Epochs | None = None
    batch_size: Count
    micro_batch_size: Count
    gradient_checkpointing: bool = False
    max_skipped_steps: CountOrZero = 10


@dataclass(frozen=True, kw_only=True)
class CollapseConfig:
    """A run whose student is beyond one of these limits for `steps` steps in a row has collapsed and stops (0: it goes
    on). Judged are the steps whose responses the student writes; where it writes none, all steps, by its entropy.

    `min_entropy`, `max_entropy`: of the student's distributions, the mean over the step's tokens in nats. `min_length`,
    `max_length`: tokens of a response that the student writes, the end-of-sequence token included, the mean over the
    step.

    The defaults stop no healthy run: they stop one whose student is certain of every token to the sixth decimal, or
    writes next to nothing (`min_length` is 2, or rollout.max_new_tokens where that is less). Set limits of your own
    around what metrics.jsonl shows as student_entropy and student_length.
    """

    steps: CountOrZero = 50
    min_entropy: PositiveOrZero = 1e-6
    max_entropy: PositiveOrZero | None = None
    min_length: PositiveOrZero | None = None
    max_length: PositiveOrZero | None = None


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """A checkpoint after `every` steps and the last one (0: none; a tenth of the steps by default), and on SIGTERM; the
    newest `keep` stay. One takes the disk space of the weights and the optimizer's state; a crashed run goes on from
    the newest.
    """

    every: CountOrZero | None = None
    keep: Count = 2


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """The numbers of metrics.jsonl go to TensorBoard's files where it is installed, and with `wandb` or `trackio` (an
    extra of kdkernels each) also to a run of `project` there, named after the run's directory. One that fails while the
    run trains is left out from then on, which a line says.
    """

    wandb: bool = False
    trackio: bool = False
    project: Name = "kdkernels"


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out `data` (the format and limits of [data]), its first `limit` examples, measured before, after and each
    `every` steps (0: not between).

    `metrics`: "exact_match", of the student's greedy responses; of the data's responses, per token, "cross_entropy",
    "kl" of the teacher and the student in nats, and "agreement", the share of tokens at which both find the same one
    most probable.

    `answer`: a regular expression with one group, by which exact_match finds the answer in a response (its last match
    counts). `response`: the template of the held-out responses, [data] `response` by default.
    """

    data: Place
    response: str | None = None
    every: CountOrZero = 0
    limit: Count | None = None
    batch_size: Count = 32
    max_new_tokens: Count | None = None
    metrics: tuple[Literal["exact_match", "cross_entropy", "kl", "agreement"], ...]
    answer: str | None = None

    @property
    def by_token(self) -> bool:
        """Whether the data's responses are read token by token; for exact_match, only the answers in them are."""
        return self.by_teacher or "cross_entropy" in self.metrics

    @property
    def by_teacher(self) -> bool:
        """Whether the teacher scores the data's responses."""
        return bool({"kl", "agreement"} & set(self.metrics))


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """`zero_stage`: 0 keeps everything on every process; 1 shards the optimizer's state, 2 the gradients too, 3 the
    student's weights too, which then are whole on every process only while it generates and is evaluated.

    With bfloat16 weights, 0 adds up the micro-batches' gradients in bfloat16, 1 to 3 in float32. Default: 0, with
    bfloat16 or `offload_optimizer` 1.

    `offload_optimizer`: with ZeRO 1 to 3, the optimizer's state and the float32 weights are in the machine's memory and
    AdamW runs on its CPUs.
    """

    zero_stage: ZeroStage | None = None
    offload_optimizer: bool = False


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole recipe; [teacher], [responses], [judge] and [evaluation] are None where the recipe has none. `teachers`:
    in place of [teacher] several ones, each a table [teachers.NAME] with the keys of that section.
    """

    run: RunConfig
    student: StudentConfig
    teacher: TeacherConfig | None = None
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig
    responses: ResponsesConfig | None = None
    judge: JudgeConfig | None = None
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    collapse: CollapseConfig = CollapseConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    evaluation: EvaluationConfig | None = None
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()

    @property
    def reads_responses(self) -> bool:
        """Whether training takes the stored [responses], not the data's or fresh ones."""
        return self.responses is not None and self.rollout.student_fraction == 0

    @property
    def asks_judge(self) -> bool:
        """Whether [judge] gives the objective its weights."""
        return self.judge is not None and self.objective.build().needs_weights

    @property
    def needs_scores(self) -> bool:
        """Whether these weights come from stored scores."""
        return self.asks_judge and self.judge.rule != "uniform"
