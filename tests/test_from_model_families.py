"""``Head.from_model`` on every encoder-decoder and vision-language model of transformers: right, or refused by name.

test_from_model.py has the causal LMs.
"""

from __future__ import annotations

import pytest
import torch
from test_from_model import assert_same
from tiny_models import tiny
from transformers import AutoModelForImageTextToText, AutoModelForSeq2SeqLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

import kdkernels as kd
from kdkernels.sources.from_model import trunk

FAMILIES = {
    "seq2seq": (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, AutoModelForSeq2SeqLM),
    "vision": (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, AutoModelForImageTextToText),
}
CHOSEN = {"t5", "bart", "fsmt", "t5gemma", "gemma3", "idefics", "cohere2_vision"}
# An embedding or a linear layer of its own kind as output layer, a head inside the trunk, none at all, or a forward
# that wants a picture before anything else.
REFUSED = """encoder-decoder fsmt prophetnet blip blip-2 idefics instructblip instructblipvideo kosmos-2 kosmos-2.5
    llama4 pi0 pix2struct vision-encoder-decoder"""
# What transformers cannot build here from a small configuration, or without timm or scipy.
UNBUILT = """nemo_speechlm vibevoice_asr chameleon cohere_compass cosmos3_edge deepseek_ocr2 emu3 ernie4_5_vl_moe evolla
    fast_vlm florence2 gemma3n glm5_next granite4_vision granite_docling inkling2 inkling_mm_model molmo2 muse_spark
    nemotron_h_omni perception_lm"""
# Their forward does not run on text alone, or not with a small configuration.
UNRUN = """voxtral_realtime diffusion_gemma hunyuan_vl pp_formulanet qwen2_5_omni_thinker qwen3_omni_moe_thinker step3p7
    udop"""


def rope(*section: int) -> dict:
    return {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": section}}}


THREE_PARTS = ("glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_5_vl", "qwen2_vl")
NEEDS = dict.fromkeys(THREE_PARTS, rope(1, 1, 2))
NEEDS["glm4v_moe"] = rope(1, 1, 0)
CASES = [
    pytest.param(family, kind, marks=() if kind in CHOSEN else pytest.mark.slow)
    for family, (kinds, _) in FAMILIES.items()
    for kind in kinds
    if kind not in UNBUILT.split() and (family, kind) != ("vision", "t5gemma2")
]


def hidden_and_logits(model, **inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """What the trunk returned last in the model's own forward, and the logits."""
    seen = []
    handle = trunk(model).register_forward_hook(lambda module, arguments, output: seen.append(output))
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    handle.remove()
    last = seen[-1]
    return last[0] if isinstance(last, tuple) else last.last_hidden_state, logits


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_every_model(family, kind):
    model = tiny(kind, FAMILIES[family][1], **NEEDS.get(kind, {}))
    if kind in REFUSED.split():
        with pytest.raises(TypeError, match=rf"{type(model).__name__} \(model_type .*\).*kd\.Logits"):
            kd.Head.from_model(model, torch.zeros(1, 16))
        return
    ids = torch.randint(3, 90, (2, 5))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family == "seq2seq":
        inputs["decoder_input_ids"] = ids.flip(0)
    if kind in UNRUN.split():
        with pytest.raises(Exception):  # noqa: B017 (each for its own reason, which is not ours)
            model(**inputs)
        return
    assert_same(model, *hidden_and_logits(model, **inputs))
