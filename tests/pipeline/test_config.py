from pathlib import Path

import pytest

from lce_trainer.errors import ConfigError
from lce_trainer.pipeline.config import load_recipe

TRAINING = ("learning_rate", "num_train_epochs")


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_sections_become_dataclasses(tmp_path):
    recipe = load_recipe(write(tmp_path, "corpus: {max_words: 80}\nlabel: {judge: verdict}"))
    assert recipe.corpus.max_words == 80
    assert recipe.label.judge == "verdict"
    assert recipe.generate.queries == 400


def test_overrides_reach_nested_keys_and_read_yaml_values(tmp_path):
    recipe = load_recipe(
        write(tmp_path, "train: {learning_rate: 1e-5}"),
        ["train.learning_rate=2e-5", "train.lora.r=4", "label.promote_margin=0.5", "corpus.source=null"],
        TRAINING,
    )
    assert recipe.train.arguments == {"learning_rate": 2e-5}
    assert recipe.train.lora.r == 4
    assert recipe.label.promote_margin == 0.5
    assert recipe.corpus.source is None


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("corpus: {text_colunm: x}", [], "unknown key 'text_colunm' in corpus; did you mean 'text_column'"),
        ("trian: {}", [], "unknown key 'trian'; did you mean 'train'"),
        ("train: {learning_rat: 1}", [], "unknown key 'learning_rat' in train; did you mean 'learning_rate'"),
        ("", ["train.lora.alhpa=3"], "unknown key 'alhpa' in train.lora; did you mean 'alpha'"),
        ("", ["train.learning_rate"], "is not an override"),
        ("", ["seed.more=1"], "corpus|seed"),
        ("corpus: {max_words: many}", [], "corpus.max_words must be int, not 'many'"),
        ("seed: true", [], "seed must be int, not True"),
        ("label: {judge_weight: much}", [], "label.judge_weight must be float or one of auto, not 'much'"),
        ("label: {false_negatives: lose}", [], "label.false_negatives must be one of drop, promote, keep, not 'lose'"),
        (
            "label: {judge: oracle}",
            [],
            "label.judge must be one of likelihood, verdict, grade, pairwise, reranker, encoder, not 'oracle'",
        ),
        ("[1, 2]", [], "must hold sections"),
        ("corpus: 3", [], "corpus must be a section"),
        ("train: 3", [], "train must be a section"),
        ("a: [", [], "is not YAML"),
    ],
)
def test_a_mistake_is_named(tmp_path, text, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, text), overrides, TRAINING)


@pytest.mark.parametrize("key", ["publish.language", "corpus.language"])
def test_norwegian_is_no_boolean(key, tmp_path):
    with pytest.raises(ConfigError, match=f"{key} must be str, not False: YAML reads an unquoted yes, no, on or off"):
        load_recipe(write(tmp_path, ""), [f"{key}=no"], TRAINING)
    section, name = key.split(".")
    assert getattr(getattr(load_recipe(write(tmp_path, ""), [f"{key}='no'"], TRAINING), section), name) == "no"


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no recipe at"):
        load_recipe(tmp_path / "nothing.yaml")


def test_defaults_are_not_shared_between_recipes(tmp_path):
    path = write(tmp_path, "")
    load_recipe(path).generate.examples.append({"passage": "a", "query": "b"})
    assert load_recipe(path).generate.examples == []
