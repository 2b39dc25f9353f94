"""Tiny random models, built once a session; no test downloads anything."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Bits are compared, and a GPU's differ; see test_gpu.py.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest

from helpers.tiny import build_model, build_tokenizer

if TYPE_CHECKING:
    from helpers.tiny_recipe import Finished


@pytest.fixture(scope="session")
def tiny_reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a saved tiny reranker: model and tokenizer."""
    path = tmp_path_factory.mktemp("tiny-reranker")
    build_model().save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> "Finished":
    """A whole run of the tiny recipe, which nothing interrupted; look, and do not touch."""
    from helpers.tiny_recipe import finish

    return finish(tmp_path_factory.mktemp("finished"))
