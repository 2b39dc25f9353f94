import logging
import os
import subprocess
import sys

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from tokenizers import processors
from torch.utils.data import DataLoader

from helpers.paths import TESTS
from helpers.tiny import build_model, build_tokenizer
from helpers.tiny_models import FAMILIES, tiny_config, tiny_tokenizer
from helpers.token_ids import TRIPLETS, settings
from lce_trainer.errors import TrainingError
from lce_trainer.groups.convert import to_groups
from lce_trainer.model.pairs import EncodedPairs, pair_layout
from lce_trainer.model.template import configure_template
from lce_trainer.training.collator import Batch, GroupCollator
from lce_trainer.training.sampling import EpochGroups, GroupSampler
from lce_trainer.training.streaming import training_rows
from lce_trainer.training.token_ids import token_ids
from lce_trainer.training.trainer import LCETrainer

WORDS = ["moon", "river", "tree", "snow", "stone"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "lce_trainer"


def some_groups() -> Dataset:
    return Dataset.from_list(
        [
            {
                "query_id": f"q{i}",
                "query": " ".join(["what"] * (1 + 4 * (i % 4))),
                "passages": [" ".join([word] * (1 + (i + 7 * j) % 40)) for j, word in enumerate(WORDS[: 2 + i % 4])],
                "passage_ids": [f"p{j}" for j in range(2 + i % 4)],
                "labels": [1.0] + [0.0] * (1 + i % 4),
                "scores": None if i % 2 else [0.5] * (2 + i % 4),
            }
            for i in range(12)
        ]
    )


def batches(tokenizer, args, workers: int = 0) -> list[dict]:
    rows = training_rows(some_groups(), tokenizer, 4, args)
    collator = GroupCollator(tokenizer, args.group_size, args.max_length, args.max_query_length)
    sampler = GroupSampler(12, seed=3, epoch=lambda: 1, multiple=5)
    return list(DataLoader(rows, 5, sampler=sampler, collate_fn=collator, num_workers=workers))


def same(one: list[Batch], other: list[Batch]) -> bool:
    def equal(a, b) -> bool:
        if isinstance(a, np.ndarray):
            return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
        return equal(vars(a), vars(b)) if isinstance(a, (Batch, EncodedPairs)) else a == b

    return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_ids_make_the_batches_that_texts_make(family, tmp_path):
    tokenizer = tiny_tokenizer(family)
    assert not tokenizer.chat_template
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    plain = batches(tokenizer, settings(tmp_path, pretokenize=False))
    assert same(plain, batches(tokenizer, settings(tmp_path, pretokenize=True)))
    assert sum(batch.is_cut.sum() for batch in plain) > 0


def test_workers_make_the_same_batches_of_kept_ids(tmp_path):
    args = settings(tmp_path, pretokenize=True)
    assert same(batches(build_tokenizer(), args), batches(build_tokenizer(), args, workers=2))


def test_groups_are_tokenized_once_for_a_tokenizer_and_a_length(tmp_path, cache):
    def files() -> dict:
        return {file.name: file.stat().st_mtime_ns for file in cache.glob("*.arrow")}

    args = settings(tmp_path, pretokenize=True)
    token_ids(some_groups(), build_tokenizer(), args)
    first = files()
    token_ids(some_groups(), build_tokenizer(), args)
    assert len(first) == 1 and files() == first
    other = build_tokenizer()
    other.add_tokens(["river"])
    token_ids(some_groups(), other, args)
    token_ids(some_groups(), build_tokenizer(), settings(tmp_path, pretokenize=True, max_length=16))
    token_ids(some_groups().select([3, 1]), build_tokenizer(), args)
    assert len(files()) == 4 and first.items() <= files().items()


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from helpers.token_ids import TRIPLETS, settings
from helpers.tiny import build_tokenizer
from lce_trainer.groups.convert import to_groups
from lce_trainer.training.token_ids import token_ids
from datasets import Dataset
token_ids(to_groups(Dataset.from_dict(TRIPLETS))[0], build_tokenizer(), settings({out!r}, pretokenize=True))
"""


def test_groups_converted_anew_by_each_process_share_their_file(tmp_path, cache):
    def convert() -> None:
        rows = to_groups(Dataset.from_dict(TRIPLETS))[0]
        ids = token_ids(rows, build_tokenizer(), settings(tmp_path, pretokenize=True)).take([1])
        assert ids[0][1].counts.tolist() == [1, 2]

    tests = TESTS
    script = SCRIPT.format(tests=str(tests), out=str(tmp_path))
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache.parent), "PYTHONPATH": str(tests.parent)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=120)
    (made,) = cache.iterdir()
    at = made.stat().st_mtime_ns
    convert()
    convert()
    assert list(cache.iterdir()) == [made] and made.stat().st_mtime_ns == at


def test_the_same_texts_share_a_file_wherever_they_lie_and_others_do_not(tmp_path, cache):
    def files_of(rows: Dataset) -> int:
        token_ids(rows, build_tokenizer(), settings(tmp_path, pretokenize=True))
        return len(list(cache.glob("*.arrow")))

    rows = some_groups()
    assert files_of(rows) == 1
    assert files_of(rows.select(range(12)[::-1]).select(range(12)[::-1])) == 1
    parts = datasets.concatenate_datasets([rows.select(range(5)), rows.select(range(5, 12))])
    assert files_of(parts) == 1
    assert files_of(rows.select(range(3))) == 2
    assert files_of(Dataset.from_list(rows.to_list()[:3])) == 2
    # The same letters, cut into texts and groups in another way.
    texts = {"query": ["a", "b"], "passages": [["tree", "", "snow"], ["moon"]]}
    assert files_of(Dataset.from_dict(texts)) == 3
    assert files_of(Dataset.from_dict({**texts, "passages": [["tree", "sno", "w"], ["moon"]]})) == 4
    assert files_of(Dataset.from_dict({**texts, "passages": [["tree", ""], ["snow", "moon"]]})) == 5
    assert files_of(Dataset.from_dict({**texts, "query": ["ab", ""]})) == 6


def test_few_groups_are_tokenized_at_once(tmp_path, cache):
    rows = some_groups().select(np.arange(200) % 12)
    token_ids(rows, build_tokenizer(), settings(tmp_path, pretokenize=True))
    (file,) = cache.iterdir()
    with pa.memory_map(str(file)) as source:
        assert max(batch.num_rows for batch in pa.ipc.open_stream(source)) <= 64


def test_a_long_text_is_kept_as_far_as_a_pair_can_hold_it(tmp_path):
    groups = Dataset.from_list(
        [{"query_id": "q", "query": "what", "passages": ["moon " * 500, "tree"], "labels": [1, 0], "scores": None}]
    )
    [(query, passages)] = token_ids(groups, build_tokenizer(), settings(tmp_path, pretokenize=True)).take([0])
    assert [*query.counts, *passages.counts] == [1, 32, 1]
    assert passages.take([1]).ids.tolist() == build_tokenizer()("tree", add_special_tokens=False)["input_ids"]


def test_the_layout_of_pairs_is_found_once_and_again_when_it_changes():
    tokenizer = build_tokenizer()
    layout = pair_layout(tokenizer)
    assert pair_layout(tokenizer) is layout and pair_layout(build_tokenizer()) is not layout
    tokenizer.backend_tokenizer.post_processor = processors.BertProcessing(("[PAD]", 0), ("[CLS]", 2))
    assert layout.separators.ids.tolist() == [2, 3, 3] and pair_layout(tokenizer).separators.ids.tolist() == [2, 0, 0]
    assert not layout.has_types
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert pair_layout(tokenizer).has_types


@pytest.mark.parametrize("pair", ["[CLS] $B [SEP] $A [SEP]", "[CLS] $A [SEP] $B [SEP] $A"])
def test_a_tokenizer_that_makes_no_pair_of_a_query_and_then_a_passage_is_an_error(pair):
    tokenizer = build_tokenizer()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("$A", pair, special)
    with pytest.raises(TrainingError, match=r"a query and then a passage, each once and whole: two words give"):
        pair_layout(tokenizer)


def test_training_ends_with_the_same_weights(tmp_path):
    def weights(name: str, pretokenize: bool) -> dict:
        args = settings(tmp_path / name, pretokenize=pretokenize, num_train_epochs=2, use_cpu=True)
        trainer = LCETrainer(build_model(), args, train_dataset=some_groups(), processing_class=build_tokenizer())
        trainer.train()
        return trainer.model.state_dict()

    texts, ids = weights("texts", False), weights("ids", True)
    assert all(torch.equal(texts[name], ids[name]) for name in texts)


def test_texts_are_tokenized_as_they_come_on_a_cpu_and_under_a_template(tmp_path, caplog):
    assert token_ids(some_groups(), build_tokenizer(), settings(tmp_path, use_cpu=True)) is None
    rows = training_rows(some_groups(), build_tokenizer(), 4, settings(tmp_path, use_cpu=True))
    assert isinstance(rows, EpochGroups) and rows[0, 0]["query"] == "what"
    tokenizer = tiny_tokenizer("qwen3")
    configure_template(tokenizer, tiny_config("qwen3"))
    with caplog.at_level(logging.WARNING, "lce_trainer"):
        assert token_ids(some_groups(), tokenizer, settings(tmp_path, pretokenize=True)) is None
    assert "tokenized as one text" in caplog.text
