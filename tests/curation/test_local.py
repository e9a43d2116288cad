"""A model of this process answers: greedily what its logits say, with their log-probability."""

import gc
import json
import shutil
import weakref

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from kdkernels.curation import Failure, LocalChat, curate, read_curation
from kdkernels.curation.local import identity_of
from kdkernels.data.tokenizers import train_tokenizer
from kdkernels.errors import InputError

WORDS = "abcdefgh0123456789+= \n"


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A random model whose greedy answers are neither constant nor endless, and what would spoil them."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([WORDS], "characters")
    torch.manual_seed(6)
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        initializer_range=1.0,
        max_position_embeddings=40,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(repetition_penalty=9.0, suppress_tokens=[5, 6], eos_token_id=1)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def by_hand(chat: LocalChat, text: str) -> tuple[list[int], float]:
    """The greedy answer and its mean log-probability, by a forward of the whole for each token."""
    ids = chat.tokenizer(text)["input_ids"]
    start, total = len(ids), 0.0
    vocabulary = len(chat.tokenizer)
    while len(ids) - start < chat.max_new_tokens and (len(ids) == start or ids[-1] != 1):
        with torch.no_grad():
            logits = chat.model(torch.tensor([ids])).logits[0, -1, :vocabulary].double()
        token = int(logits.argmax())
        total += float(logits.log_softmax(-1)[token])
        ids.append(token)
    return ids[start:], total / (len(ids) - start)


def test_the_greedy_answer_is_that_of_the_logits(directory):
    chat = LocalChat.load(directory, max_new_tokens=12, batch=6)
    texts = ["ab", "12+3=", "h", "a b c d e f g", "0", "77"]
    answers = chat.answers([user(text) for text in texts])
    lengths = set()
    for text, answer in zip(texts, answers, strict=True):
        ids, logprob = by_hand(chat, text)
        lengths.add(len(ids))
        assert answer.tokens_in == len(text) and answer.tokens_out == len(ids)
        assert answer.truncated == (ids[-1] != 1)
        assert answer.text == chat.tokenizer.decode(ids, skip_special_tokens=True)
        assert answer.logprob == pytest.approx(logprob, rel=1e-4) and logprob < -0.01
        assert chat.answer(user(text)).text == answer.text
    assert len(lengths) > 1  # some end by themselves, some are cut off


def test_draws_depend_on_the_seed_and_the_conversation_alone(directory):
    def drawn(seed: int, text: str = "ab") -> str:
        return LocalChat.load(directory, max_new_tokens=12, temperature=1.5, seed=seed).answer(user(text)).text

    state = torch.get_rng_state()
    first = drawn(0)
    torch.rand(3)
    assert drawn(0) == first
    assert len({drawn(seed) for seed in range(4)}) > 1
    torch.set_rng_state(state)
    drawn(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_identity_has_all_that_answers_depend_on(directory):
    settings = {"max_new_tokens": 4}
    greedy = LocalChat.load(directory, **settings).identity
    assert greedy == LocalChat.load(directory, **settings, seed=5, batch=3).identity
    assert "model.safetensors" in greedy["model"] and "tokenizer.json" in greedy["model"]
    assert greedy != LocalChat.load(directory, max_new_tokens=5).identity
    drawn = [LocalChat.load(directory, **settings, temperature=1.0, seed=seed).identity for seed in (0, 1)]
    assert drawn[0] != drawn[1] and greedy not in drawn


def test_a_recipes_teachers_are_loaded_one_after_another_and_only_if_asked(directory, tmp_path, monkeypatch):
    queries, prompt = tmp_path / "q.jsonl", tmp_path / "own.toml"
    queries.write_text("".join(json.dumps({"q": text}) + "\n" for text in ("ab", "12+3=", "h", "0")))
    prompt.write_text(
        'prompt = "{query}"\nlabels = "text"\nresponse = "{label}"\n'
        '[sections]\nrationale = ["(", ")"]\nlabel = ["[", "]"]\nconfidence = ["<", ">"]\n'
    )
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[curation]\noutput = "{tmp_path}/out"\nqueries = "{queries}"\nquery = "{{q}}"\ntask = "{prompt}"\n'
        + "".join(
            f'[[curation.teachers]]\nname = "{name}"\nkind = "local"\npath = "{directory}"\nmax_new_tokens = 12\n'
            f"temperature = {temperature}\nconcurrency = 3\n"
            for name, temperature in (("greedy", 0.0), ("drawn", 1.5))
        )
    )
    alive, load = [], LocalChat.load.__func__

    def counted(cls, *arguments, **settings):
        gc.collect()
        assert not [one for one in alive if one() is not None]
        chat = load(cls, *arguments, **settings)
        alive.append(weakref.ref(chat.model))
        return chat

    monkeypatch.setattr(LocalChat, "load", classmethod(counted))
    for _ in range(2):
        with pytest.raises(InputError, match="no answer is kept"):  # random models do not keep to the sections
            curate(read_curation(recipe))
    assert len(alive) == 2
    lines = (tmp_path / "out/answers.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["answers"]) for line in lines] == [3, 1, 3, 1]
    texts = {name: [] for name in ("greedy", "drawn")}
    for line in lines:
        for one in json.loads(line)["answers"]:
            texts[one["teacher"]].append(one["text"])
    greedy = load(LocalChat, directory, max_new_tokens=12)
    assert texts["greedy"] == [greedy.answer(user(text)).text for text in ("ab", "12+3=", "h", "0")]
    assert texts["greedy"] != texts["drawn"]
    settings = {"max_new_tokens": 12, "temperature": 1.5, "top_p": 0.9, "seed": 2}
    assert identity_of(directory, "float32", **settings) == load(LocalChat, directory, **settings).identity


def test_a_conversation_that_leaves_no_room_fails_alone(directory):
    chat = LocalChat.load(directory, max_new_tokens=12)
    long, short = chat.answers([user("a" * 29), user("a" * 28)])
    assert isinstance(long, Failure) and long.kind == "query too long" and long.final and not long.stops
    assert short.tokens_in == 28
    with pytest.raises(Failure, match="29 tokens"):
        chat.answer(user("a" * 29))


def test_a_chat_template_is_used(directory):
    chat = LocalChat.load(directory, max_new_tokens=4)
    chat.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}={% endfor %}"
    assert chat.answer(user("12+3")).tokens_in == 5
    plain = LocalChat.load(directory, max_new_tokens=4)
    assert plain.answer(user("12+3=")).text == chat.answer(user("12+3")).text


def test_what_is_no_model_is_refused(tmp_path, directory):
    with pytest.raises(InputError, match=r"teachers\[0\] path: no such directory"):
        LocalChat.load(tmp_path / "none", max_new_tokens=4, key="teachers[0] path")
    with pytest.raises(InputError, match="path: "):
        LocalChat.load(tmp_path, max_new_tokens=4)
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match="cannot be read as a language model"):
        LocalChat.load(tmp_path, max_new_tokens=4)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    with pytest.raises(InputError, match="expected a whole model, got an adapter"):
        LocalChat.load(tmp_path, max_new_tokens=4)
