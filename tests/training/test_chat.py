"""Conversations: the loss is of the assistant's tokens alone, behind what a model sees when it writes them."""

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from kdkernels.data import load_examples
from kdkernels.data.tokenizers import train_tokenizer, vocabulary_size
from kdkernels.rollouts import LocalSampler
from kdkernels.training import InputError, load_config, train
from kdkernels.training.cli import main
from kdkernels.training.models.loading import load_student
from kdkernels.training.run.metrics import read_metrics

OTHERS = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    + OTHERS
    + "{% endif %}{% endfor %}"
    + PROMPT
)
PLAIN = "{% for m in messages %}" + OTHERS + "{% endfor %}" + PROMPT
TEXTS = ["What is 3+4?", "7", "And 5?\n", "\nFive, of course.", "é ü", "Say nothing", ""]


def conversation(*contents: str, system: bool = False) -> dict:
    """Messages of user and assistant in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"messages": [{"role": "system", "content": "Be brief."}] * system + messages, "source": 3}


def write(path, *records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level, with ChatML's tokens; its end-of-sequence token ends a turn."""
    tokenizer = train_tokenizer([*TEXTS, "systemuserassistant"], "bpe", 280)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    tokenizer.chat_template = MARKED
    return tokenizer


def read(path, tokenizer, **options):
    options = {"max_prompt_tokens": 999, "max_response_tokens": 999} | options
    return load_examples(path, tokenizer, messages="messages", **options).usable


def test_the_loss_is_where_the_template_says_that_the_assistant_writes(tokenizer, tmp_path):
    """Token for token, single-turn and multi-turn, as {% generation %} marks it."""
    draw = random.Random(1)
    records = [conversation(*draw.choices(TEXTS, k=2 * turns), system=bool(turns % 2)) for turns in (1, 1, 2, 3, 4) * 6]
    examples = read(write(tmp_path / "chat.jsonl", *records), tokenizer)
    assert len(examples) == 6 * 11
    for number, record in enumerate(records, 1):
        whole = tokenizer.apply_chat_template(
            record["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, marked = whole["input_ids"], [0] * len(whole["input_ids"])
        before = [record["messages"][:i] for i, one in enumerate(record["messages"]) if one["role"] == "assistant"]
        for example, messages in zip([one for one in examples if one.line == number], before, strict=True):
            prompt = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)["input_ids"]
            assert list(example.prompt_ids) == prompt
            start, end = len(prompt), example.tokens
            marked[start:end] = [1] * (end - start)
            # "\n" and the answer's own "\n" may be one token in the whole, which no model sees that writes the answer
            if tokenizer.decode(example.response_ids)[0] != "\n":
                assert list(example.prompt_ids + example.response_ids) == ids[:end]
        if not any(text["content"].startswith("\n") for text in record["messages"]):
            assert marked == whole["assistant_masks"] and sum(marked) > 0


def test_templates_that_mark_nothing(tokenizer, tmp_path):
    path = write(tmp_path / "chat.jsonl", conversation("3+4", "7", "And?", "8"))
    expected = read(path, tokenizer)
    tokenizer.chat_template = PLAIN
    try:
        assert read(path, tokenizer) == expected
        assert [tokenizer.decode(one.response_ids) for one in expected] == ["7<|im_end|>", "8<|im_end|>"]
        last = read(path, tokenizer, answers="last")
        assert last == expected[1:] and tokenizer.decode(last[0].prompt_ids).endswith(
            "And?<|im_end|>\n<|im_start|>assistant\n"
        )
        # a turn that ends with another special token than that of a sequence; none that ends it; no turn to read
        tokenizer.chat_template = PLAIN.replace("<|im_end|>", "<pad>")
        assert [tokenizer.decode(one.response_ids) for one in read(path, tokenizer)] == ["7<pad>", "8<pad>"]
        tokenizer.chat_template = PLAIN.replace("<|im_end|>", "")
        assert [tokenizer.decode(one.response_ids) for one in read(path, tokenizer)] == [
            "7\n<|im_end|>",
            "8\n<|im_end|>",
        ]
        open_end = write(tmp_path / "open.jsonl", conversation("3+4", "7", "And?"))
        [only] = read(open_end, tokenizer, answers="last", read_responses=False)
        assert (
            tokenizer.decode(only.prompt_ids).endswith("user\nAnd?\n<|im_start|>assistant\n") and not only.response_ids
        )
        with pytest.raises(
            InputError, match=r"open.jsonl, line 1: \[data\] messages: .* ends with .*'assistant', got 'user'"
        ):
            read(open_end, tokenizer)
        tokenizer.chat_template = PLAIN + "{% if not add_generation_prompt and messages|length > 2 %}!{% endif %}"
        assert len(read(write(tmp_path / "one.jsonl", conversation("a", "b")), tokenizer)) == 1
        tokenizer.chat_template = PLAIN.replace("{{ '<|im_start|>' + m.role", "{{ '<|im_start|>' + m.role|upper")
        with pytest.raises(
            InputError, match=r"line 1: .*chat template of .* its own generation prompt: at character \d+ the"
        ):
            read(path, tokenizer)
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(InputError, match="refuses it: roles must alternate"):
            read(path, tokenizer)
        tokenizer.chat_template = None
        with pytest.raises(InputError, match=r"\[data\] messages: the tokenizer .* has no chat template: give another"):
            read(path, tokenizer)
    finally:
        tokenizer.chat_template = MARKED


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"text": "x"}, "field 'messages' is missing; the line has text"),
        ({"messages": "x"}, "field 'messages': expected a list of messages, got 'x'"),
        ({"messages": []}, "field 'messages': expected a list of messages, got none"),
        ({"messages": ["x"]}, "message 1 of field 'messages': expected an object of role and content, got 'x'"),
        ({"messages": [{"role": "user"}]}, "message 1 of field 'messages': content: expected a text, got null"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "content: expected a text, got a list"),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]},
            "role and content alone, got 'tool_calls'",
        ),
        (
            {"messages": conversation("a", "b", "c", "d")["messages"][1:]},
            "expected a message before the assistant's first",
        ),
        (conversation("a", "b<|im_end|>"), "message 2 of field 'messages': content has '<|im_end|>' in it"),
    ],
)
def test_what_is_no_conversation_is_named_with_its_line(tokenizer, tmp_path, record, said):
    path = write(tmp_path / "chat.jsonl", conversation("a", "b"), record)
    with pytest.raises(InputError) as refusal:
        read(path, tokenizer)
    assert f"{path}, line 2: [data] messages: " in str(refusal.value) and said in str(refusal.value)


@pytest.fixture
def chat_recipe(recipe, load, tokenizer, tmp_path):
    """A recipe whose student has the chat tokenizer, and whose data are conversations."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    records = [conversation(text, answer, "And 5?", "5!") for text in TEXTS[:3] for answer in TEXTS[:2]]
    write(tmp_path / "chat.jsonl", *records)
    text = recipe.read_text().replace('kind = "characters"', f'path = "{tmp_path}/tokenizer"')
    text = text.replace('prompt = "{question}"\nresponse = "{answer}"', 'messages = "messages"')
    text = text.replace("train.jsonl", "chat.jsonl").replace("max_prompt_tokens = 8", "max_prompt_tokens = 200")
    recipe.write_text(text.replace("max_response_tokens = 6", "max_response_tokens = 100"))
    return recipe


def test_a_step_on_conversations_is_one_on_the_assistants_tokens(chat_recipe, tokenizer, tmp_path):
    """The loss from labels that are -100 outside of them, the mean over all tokens."""
    config = load_config(chat_recipe, ["train.steps=1", "train.batch_size=12", "train.micro_batch_size=3"])
    torch.manual_seed(config.run.seed)
    student, losses = load_student(config, tokenizer), []
    for line in (tmp_path / "chat.jsonl").read_text().splitlines():
        messages = json.loads(line)["messages"]
        whole = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        scored = torch.as_tensor(whole["assistant_masks"]).view(-1).bool()
        logits = student(whole["input_ids"].view(1, -1)).logits[0, :, : vocabulary_size(tokenizer)]
        each = torch.nn.functional.cross_entropy(logits[:-1], whole["input_ids"].view(-1)[1:], reduction="none")
        losses += each[scored[1:]].tolist()
    result = train(config)
    assert read_metrics(result.output / "metrics.jsonl")[0]["loss"] == pytest.approx(
        sum(losses) / len(losses), rel=1e-5
    )
    assert len(losses) > 12 * 2


def test_the_student_writes_behind_the_generation_prompt(chat_recipe, teacher_set, tokenizer, tmp_path):
    config = load_config(chat_recipe, [f"run.output={tmp_path / 'teacher'}", "train.steps=1"])
    teacher = train(config).final
    assert AutoModelForCausalLM.from_pretrained(teacher).config.vocab_size >= len(tokenizer)
    settings = ("objective.name=GKD", f"teacher.path={teacher}", "data.answers=last", "rollout.max_new_tokens=5")
    result = train(load_config(chat_recipe, settings))
    [first] = (json.loads(line) for line in (result.output / "rollouts-000001.jsonl").read_text().splitlines()[:1])
    assert first["prompt"].endswith("user\nAnd 5?<|im_end|>\n<|im_start|>assistant\n") and 0 < first["tokens"] <= 5
    assert all(line["loss"] > 0 for line in read_metrics(result.output / "metrics.jsonl"))


def test_the_end_of_a_turn_ends_what_the_student_writes(chat_recipe, tmp_path, capsys):
    """Base models' tokenizers end a sequence with another token than their chat template ends a turn with."""
    other = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
    other.eos_token = "<eos>"
    other.save_pretrained(tmp_path / "tokenizer")
    end, turn = other.eos_token_id, other.convert_tokens_to_ids("<|im_end|>")
    config = load_config(chat_recipe, ["train.steps=1"])
    assert LocalSampler(load_student(config, other), other).ends == (end, turn) and end != turn
    told = f"the student ends a response with '<eos>' ({end}), '<|im_end|>' ({turn})"
    assert main(["train", str(chat_recipe), "--dry-run"]) == 0
    assert f"# {told}\n" in capsys.readouterr().out
    result = train(config)
    assert f"{told}\n" in capsys.readouterr().out
    assert read_metrics(result.output / "metrics.jsonl")[0]["teacher_finished"] == 1.0
    assert GenerationConfig.from_pretrained(result.final).eos_token_id == [end, turn]  # whoever loads it


@pytest.mark.parametrize(
    ("was", "becomes", "said"),
    [
        ("path = ", 'kind = "bpe"\nvocab_size = 300\n# ', "[tokenizer] kind: a tokenizer that is trained has no chat"),
        (
            "messages = ",
            'prompt = "{x}"\nmessages = ',
            "[data] expected either messages or prompt and response, got both",
        ),
        ('messages = "messages"', "", "[data] key 'prompt' or 'messages' is missing"),
        (
            'messages = "messages"',
            'prompt = "x"\nresponse = ""\nanswers = "last"',
            "[data] answers are those of messages",
        ),
        ('messages = "messages"', 'messages = "talk"', "field 'talk' is missing; the line has messages, source"),
    ],
)
def test_recipes_that_say_it_wrong(chat_recipe, capsys, was, becomes, said):
    text = chat_recipe.read_text()
    assert was in text
    chat_recipe.write_text(text.replace(was, becomes))
    assert main(["train", str(chat_recipe), "--dry-run"]) == 2
    assert said in capsys.readouterr().err
