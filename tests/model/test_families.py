"""One record a family of models: no other module names a family."""

import ast
from pathlib import Path

import pytest
from transformers import Gemma2Config, LongformerConfig

import lce_trainer
from helpers.tiny_models import DECODERS, FAMILIES, tiny_config, tiny_model
from lce_trainer.model import families
from lce_trainer.model.families import family_of, first_position, head_modules

HEADS = {
    "bert": ["classifier", "pooler"],
    "roberta": ["classifier"],
    "xlm-roberta": ["classifier"],
    "electra": ["classifier"],
    "distilbert": ["pre_classifier", "classifier"],
    "deberta-v2": ["pooler", "classifier"],
    "mpnet": ["classifier"],
    "modernbert": ["head", "classifier"],
    "qwen3": ["score"],
    "llama": ["score"],
}


def test_no_module_but_families_names_a_family():
    for path in Path(lce_trainer.__file__).parent.rglob("*.py"):
        if path.name != "families.py" and "model" in path.parts:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            named = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)} & set(families.FAMILIES)
            assert not named, f"{path.name} names {named}: that belongs into the family's record"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_s_direction_and_its_head_are_known(family):
    assert family_of(tiny_config(family)).is_decoder == (family in DECODERS)
    assert head_modules(tiny_model(family)) == HEADS[family]


def test_a_family_without_a_record_is_what_transformers_lists_it_as():
    assert "gemma2" not in families.FAMILIES
    assert family_of(Gemma2Config()).is_decoder and family_of(Gemma2Config()).patches is None
    assert not family_of(tiny_config("deberta-v2")).is_decoder
    assert first_position(tiny_config("deberta-v2")) == 0
    assert first_position(LongformerConfig(pad_token_id=1)) == 2
