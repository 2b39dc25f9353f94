"""General test sets are read in every form in which they are published, and show what training has forgotten."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.evaluation import CrossEncoderNanoBEIREvaluator

from helpers.general import write_beir, write_candidates, write_nano
from helpers.hub_client import client
from helpers.hub_server import Blob, HubServer, Repo
from lce_trainer.artifacts import read_manifest
from lce_trainer.cli import main
from lce_trainer.errors import ConfigError, EvaluationError
from lce_trainer.evaluation.compare import mean_ndcg, rerank
from lce_trainer.evaluation.metrics import ranking_metrics
from lce_trainer.model.reranker import Reranker
from lce_trainer.pipeline.evaluate import FUSED, GENERAL, RERANKER, UNTOUCHED, measured_queries
from lce_trainer.pipeline.facts import gather_facts, repos
from lce_trainer.pipeline.general import General, read_general
from lce_trainer.pipeline.run import Run, open_run


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """What datasets keeps of a local folder goes by the folder's name and its card: the next test's has the same."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def opened(folder: Path, *names: Path | str, **settings) -> Run:
    recipe = {"run_dir": str(folder / "run"), "evaluate": {"benchmark": list(map(str, names)), **settings}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return open_run(folder / "recipe.yaml")


def of_set(general: General, name: str) -> list[str]:
    return [query_id for query_id, one in general.sets.items() if one == name]


def test_figures_on_nanobeir_are_those_of_sentence_transformers(tmp_path, tiny_reranker):
    nano = write_nano(tmp_path / "nano", "NanoArguAna", "NanoMSMARCO", "NanoNFCorpus", titles=True)
    general = read_general(opened(tmp_path, nano))
    judged = general.judged
    assert set(general.sets.values()) == {"NanoMSMARCO", "NanoNFCorpus"}  # argument retrieval is left out there too
    ours = rerank(judged.queries, judged.pools, Reranker.from_pretrained(tiny_reranker).score)
    theirs = CrossEncoderNanoBEIREvaluator(["msmarco", "nfcorpus"], dataset_id=str(nano))
    figures = theirs(CrossEncoder(str(tiny_reranker), device="cpu"))
    values, first = ranking_metrics(ours, judged.qrels), ranking_metrics(judged.run, judged.qrels)
    for name in ("NanoMSMARCO", "NanoNFCorpus"):
        mine = of_set(general, name)
        for measure in ("ndcg@10", "mrr@10"):
            assert np.mean([values[measure][q] for q in mine]) == pytest.approx(figures[f"{name}_R100_{measure}"])
            assert np.mean([first[measure][q] for q in mine]) == pytest.approx(figures[f"{name}_R100_base_{measure}"])
    mean = figures["NanoBEIR_R100_mean_ndcg@10"]
    assert 0 < mean < 1 and mean_ndcg(ours, judged.qrels, general.sets) == pytest.approx(mean)
    counts = read_manifest(tmp_path / "run" / "general").counts
    assert counts["test_sets"] == 2 and counts["judged_queries"] == 12 and counts["relevant_added"] == 12


def test_a_candidate_that_reads_as_a_relevant_passage_does_counts_once(tmp_path, tiny_reranker):
    nano = write_nano(tmp_path / "nano", "NanoMSMARCO")
    path = nano / "bm25" / "NanoMSMARCO-00000-of-00001.parquet"
    rows = pq.read_table(path).to_pylist()
    corpus = nano / "corpus" / "NanoMSMARCO-00000-of-00001.parquet"
    texts = pq.read_table(corpus).to_pylist()
    twin = next(row for row in texts if row["_id"] == rows[0]["corpus-ids"][1])
    twin["text"] = texts[0]["text"]  # of d0, which is relevant to q0
    pq.write_table(pq.read_table(corpus).from_pylist(texts), corpus)
    general = read_general(opened(tmp_path, nano))
    ids = [doc_id for doc_id, _ in general.judged.pools[0]]
    assert "d0" in ids and twin["_id"] not in ids and len(ids) == 13
    ours = rerank(general.judged.queries, general.judged.pools, Reranker.from_pretrained(tiny_reranker).score)
    theirs = CrossEncoderNanoBEIREvaluator(["msmarco"], dataset_id=str(nano))
    figures = theirs(CrossEncoder(str(tiny_reranker), device="cpu"))
    assert mean_ndcg(ours, general.judged.qrels) == pytest.approx(figures["NanoBEIR_R100_mean_ndcg@10"])


def test_without_a_ranking_bm25_is_the_first_stage_and_relevant_passages_join_it(tmp_path):
    general = read_general(opened(tmp_path, write_nano(tmp_path / "nano", "NanoSciFact", ranked=False)))
    found = 0
    for (query_id, _), pool in zip(general.judged.queries, general.judged.pools, strict=True):
        scores = general.judged.run[query_id]
        assert list(scores) == [doc_id for doc_id, _ in pool[: len(scores)]] and min(scores.values(), default=1) > 0
        assert list(scores.values()) == sorted(scores.values(), reverse=True)
        assert set(general.judged.qrels[query_id]) <= {doc_id for doc_id, _ in pool}
        found += query_id.replace("NanoSciFact q", "d") in scores  # whose words the query has
    assert found >= 5


def test_a_folder_in_the_layout_of_beir(tmp_path):
    beir = write_beir(tmp_path / "scifact")
    general = read_general(opened(tmp_path, beir))
    assert of_set(general, "scifact") == [f"scifact q{i}" for i in range(6)]
    assert general.judged.qrels["scifact q2"] == {"d2": 2, "d3": 1, "d4": 0}
    assert set(general.relevant_from.values()) == {1}
    for query_id, _ in general.judged.queries:
        pool = general.judged.pools[int(query_id[-1])]
        assert {doc_id for doc_id, _ in pool} == set(general.judged.run[query_id])  # nothing joins
        assert all(text.startswith("star") for _, text in pool)
    (beir / "run.trec").write_text("".join(f"q{i} Q0 d{i + j} {j + 1} {9 - j} x\n" for i in range(5) for j in range(4)))
    general = read_general(opened(tmp_path, beir))
    assert general.judged.run["scifact q1"] == {"d1": 9.0, "d2": 8.0, "d3": 7.0, "d4": 6.0}
    assert len(general.judged.queries) == 5 and general.candidates == {"scifact": "the first 100 of run.trec"}
    assert read_manifest(tmp_path / "run" / "general").counts["queries_without_candidates"] == 1


def test_given_candidates_are_reranked_as_they_are(tmp_path):
    general = read_general(opened(tmp_path, write_candidates(tmp_path / "dl19")))
    assert [len(pool) for pool in general.judged.pools] == [14, 15, 16]
    assert general.candidates["dl19"].startswith("all that candidates.parquet holds, 14 to 16 a query")
    assert set(general.relevant_from.values()) == {2}  # as TREC Deep Learning has it
    assert list(general.judged.run["dl19 q0"])[:2] == ["d0", "d1"]


def test_several_sets_keep_their_names_apart_and_a_limit_holds_for_each(tmp_path):
    names = [write_nano(tmp_path / name, "NanoNQ", seed=seed) for name, seed in (("english", 1), ("dansk", 2))]
    names.append(write_beir(tmp_path / "nfcorpus"))
    general = read_general(opened(tmp_path, *names, max_queries=4))
    assert list(dict.fromkeys(general.sets.values())) == ["NanoNQ", "dansk NanoNQ", "nfcorpus"]
    assert len(general.sets) == 12 == len(dict(general.judged.queries))
    with pytest.raises(ConfigError, match="is given twice"):
        read_general(opened(tmp_path, names[0], names[0], names[0]))


def damage(folder: Path, config: str, change) -> None:
    path = next((folder / config).glob("*.parquet"))
    rows = pq.read_table(path).to_pylist()
    change(rows)
    pq.write_table(pq.read_table(path).from_pylist(rows), path)


def unknown_passage(rows: list[dict]) -> None:
    rows[0]["corpus-ids"].append("d99")


def unknown_query(rows: list[dict]) -> None:
    rows[:] = [{"query-id": "x", "corpus-id": "d1"}]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("none/such/folder", None, "no folder 'none/such/folder', here or beside the recipe, and no Hub id"),
        ("docs", None, "is no test set: it has neither candidates.* and qrels.*, nor BEIR's corpus.jsonl"),
        ("nano", lambda f: damage(f, "bm25", unknown_passage), "NanoNQ: the run names 1 passages"),
        ("nano", lambda f: damage(f, "qrels", unknown_query), "the judgments name no known query: 'x'"),
        ("nano", lambda f: shutil.rmtree(f / "qrels"), "nano"),
        ("beir", lambda f: (f / "qrels" / "test.tsv").rename(f / "qrels" / "dev.tsv"), "has no test.tsv, only dev"),
        ("beir", lambda f: (f / "run.tsv").write_text("q90\td1\t1\n"), "the run holds none of the judged queries"),
        ("dl19", lambda f: (f / "qrels.parquet").unlink(), "has candidates.parquet and no qrels.*, its judgments"),
    ],
)
def test_what_is_no_test_set_is_refused(name, change, message, tmp_path):
    folders = {"nano": lambda f: write_nano(f, "NanoNQ"), "beir": write_beir, "dl19": write_candidates}
    if name in folders:
        folders[name](tmp_path / name)
        change(tmp_path / name)
    if name == "docs":
        (tmp_path / name).mkdir()
        (tmp_path / name / "one.md").write_text("a red fish")
    with pytest.raises((ConfigError, EvaluationError)) as error:
        read_general(opened(tmp_path, tmp_path / name if change or name == "docs" else name))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_nano_beir_is_fetched_from_the_hub_once(tmp_path):
    nano = write_nano(tmp_path / "nano", "NanoArguAna", "NanoFEVER", "NanoNQ")
    files = {file.relative_to(nano).as_posix(): file for file in nano.rglob("*") if file.is_file()}
    with HubServer(tokens={}) as hub:
        repo = hub.repos["dataset", "sentence-transformers/NanoBEIR-en"] = Repo(private=False)
        repo.commit("data", {name: Blob(file.read_bytes(), name.endswith(".parquet")) for name, file in files.items()})
        opened(tmp_path, "nano_beir")
        code = (
            "import sys; from pathlib import Path\n"
            "from lce_trainer.pipeline.general import read_general\n"
            "from lce_trainer.pipeline.run import open_run\n"
            "found = read_general(open_run(Path(sys.argv[1])))\n"
            "print(sorted(set(found.sets.values())), len(found.sets))"
        )
        done = client(hub, tmp_path / "home", None, code, str(tmp_path / "recipe.yaml"))
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.splitlines()[-1] == "['NanoFEVER', 'NanoNQ'] 12"
    # Of the artifact: the network is off, and no such dataset is in this cache.
    general = read_general(open_run(tmp_path / "recipe.yaml"))
    assert general.judged == read_general(opened(tmp_path, nano)).judged


@pytest.fixture(scope="module")
def evaluated(finished, tiny_reranker, tmp_path_factory):
    """A run of the tiny recipe whose base ranks, evaluated on two general test sets and a folder of TREC's form."""
    folder = tmp_path_factory.mktemp("general")
    root = finished.copy(folder / "run", "passages", "queries", "candidates", "groups")
    names = [write_nano(folder / "nano", "NanoNQ", "NanoFEVER"), write_candidates(folder / "dl19", queries=4)]
    settings = [f"run_dir={root}", f"train.model={tiny_reranker}", "train.max_steps=2"]
    settings += [f"evaluate.benchmark=[{','.join(map(str, names))}]", "publish.model_id=user/fish"]
    settings += ["evaluate.precision=float32"]
    assert main(["train", str(finished.recipe), *settings]) == 0
    assert main(["evaluate", str(finished.recipe), *settings]) == 0
    return finished.recipe, settings


def test_the_trained_weights_are_compared_with_those_before_training(evaluated, capsys):
    run = open_run(*evaluated)
    general = read_general(run)
    rows = {r["system"]: r for r in run.table("evaluation", GENERAL).to_list() if r["measure"] == "ndcg@10"}
    assert set(rows) == {"first stage", "encoder", UNTOUCHED, RERANKER, FUSED, *(n for n in rows if "+" in n)}
    assert rows[UNTOUCHED]["difference"] is None and rows[RERANKER]["p_value"] is not None
    base = rerank(general.judged.queries, general.judged.pools, Reranker.from_pretrained(evaluated[1][1][12:]).score)
    assert rows[UNTOUCHED]["mean"] == pytest.approx(mean_ndcg(base, general.judged.qrels, general.sets), abs=1e-6)
    assert rows[RERANKER]["ci_low"] <= rows[RERANKER]["mean"] <= rows[RERANKER]["ci_high"]
    manifest = run.manifest("evaluation")
    line = manifest.facts["verdict"][GENERAL]
    assert f" on GENERAL test sets: {RERANKER} against {UNTOUCHED}, nDCG@10" in line and "16 queries" in line
    assert manifest.inputs["general"] == run.manifest("general").digest
    assert manifest.counts["general_test_sets"] == 3 and manifest.counts["general_relevant_added"] == 12
    note = manifest.facts["notes"][GENERAL]
    assert "each of the 3 counts alike" in note and "and every relevant passage (Nano" in note
    assert "all that candidates.parquet holds, 14 to 17 a query" in note and "cannot rank" not in note
    assert measured_queries(run)[GENERAL] == [query for _, query in general.judged.queries]
    assert "near_duplicates_general" in run.manifest("model").counts
    assert main(["evaluate", str(evaluated[0]), *evaluated[1]]) == 0
    captured = capsys.readouterr()
    assert f"GENERAL test sets, the mean over them, 16 queries; p against {UNTOUCHED}" in captured.out
    assert "evaluation: already made" in captured.err and "general: already made" in captured.err


def test_report_card_and_figures_have_every_general_test_set(evaluated, finished):
    run = open_run(*evaluated)
    page = (run.root / "report.html").read_text()
    markdown = (run.root / "evaluation" / "general.md").read_text()
    (repo,) = repos(run)
    card = repo.files["README.md"].decode()
    assert "Comparison, GENERAL test sets, the mean over them" in page and "nDCG@10 by test set" in page
    assert "### GENERAL test sets, the mean over them" in card and "show what it has forgotten" in card
    for text in (page, card, markdown):
        assert all(name in text for name in ("NanoNQ", "NanoFEVER", "dl19")), text[:200]
    assert f"| test set | queries | {UNTOUCHED} | {RERANKER} | difference [95 % CI] |" in card
    assert "| NanoNQ | 6 |" in card and str(run.root.parent) not in card
    assert json.loads((run.root / "evaluation" / "evaluation.json").read_text())[GENERAL]["general"]
    recipe = yaml.safe_load(repo.files["recipe.yaml"]) if "recipe.yaml" in repo.files else {}
    assert str(run.root.parent) not in json.dumps(recipe)
    assert [one.general for one in gather_facts(run).evaluations] == [False, True]


def test_a_base_without_a_head_cannot_rank_and_the_note_says_so(finished, tmp_path, capsys):
    root = finished.copy(tmp_path / "run", "passages", "queries", "candidates", "groups", "model")
    nano = write_nano(tmp_path / "nano", "NanoNQ")
    settings = [f"run_dir={root}", f"evaluate.benchmark=[{nano}]"]
    assert main(["evaluate", str(finished.recipe), *settings]) == 0
    run = open_run(finished.recipe, settings)
    assert UNTOUCHED not in run.table("evaluation", GENERAL)["system"]
    assert (
        "The base has no head of its own, so before training it cannot rank"
        in (run.manifest("evaluation").facts["notes"][GENERAL])
    )
    assert (
        "GENERAL test sets, the mean over them, 6 queries; p against the best of the others" in capsys.readouterr().out
    )
