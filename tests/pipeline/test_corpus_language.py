from pathlib import Path

import pytest

from lce_trainer.pipeline.run import open_run
from lce_trainer.pipeline.stages import read_corpus
from lce_trainer.synthesis.retrieval.bm25 import BM25Index

TEXTS = {
    "zh": (
        "月亮是地球的卫星，它绕着地球转。潮汐是由月亮的引力引起的。" * 20,
        "沙漠里很少下雨。仙人掌在沙漠里生长。" * 20,
        "潮汐",
    ),
    "de": ("Der Mond umkreist die Erde in 27 Tagen. " * 9, "In der Wüste regnet es selten, sagt man. " * 9, "Tag"),
}


@pytest.mark.parametrize("code", TEXTS)
def test_a_corpus_is_cut_indexed_and_named_in_its_language(code, tmp_path: Path):
    moon, desert, query = TEXTS[code]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "desert.md").write_text(desert)
    (tmp_path / "docs" / "moon.md").write_text(moon)
    corpus = f"{{source: {tmp_path / 'docs'}, max_words: 60}}"
    (tmp_path / "recipe.yaml").write_text(
        f"run_dir: {tmp_path / 'run'}\ncorpus: {corpus}\nmine: {{first_stage: bm25}}\n"
    )
    run = open_run(tmp_path / "recipe.yaml")
    read_corpus(run)
    assert run.manifest("passages").facts["language"] == code
    passages = run.table("passages")
    texts = {row["doc_id"]: "" for row in passages}
    for row in passages:
        assert len(row["text"]) < 500
        texts[row["doc_id"]] += row["text"]
    assert set(moon.replace(" ", "")) == set(texts["moon.md"].replace(" ", ""))
    rows, _ = BM25Index.load(run.root / "passages" / "bm25").search([query], 1)
    assert passages[int(rows[0, 0])]["doc_id"] == "moon.md"
