"""The comparison holds what the user already has, and the weight of the first stage is found on dev queries."""

import json
import re
import shutil

import numpy as np
import pytest

from lce_trainer.artifacts import read_manifest
from lce_trainer.cli import main
from lce_trainer.evaluation.compare import fuse, mean_ndcg
from lce_trainer.pipeline.evaluate import FUSED, RERANKER, UNTOUCHED, _in_domain, _rerank, choose_first_stage_weight
from lce_trainer.pipeline.facts import gather_facts
from lce_trainer.pipeline.run import open_run


@pytest.fixture
def run(finished):
    return open_run(finished.recipe, [f"run_dir={finished.root}"])


def rows(run) -> dict[str, dict]:
    return {row["system"]: row for row in run.table("evaluation", "in_domain") if row["measure"] == "ndcg@10"}


def test_the_weight_of_the_first_stage_is_the_best_on_dev_queries_and_is_kept_with_the_model(run, finished):
    found = choose_first_stage_weight(run, finished.root / "model")
    assert read_manifest(finished.root / "model").facts["first_stage"] == pytest.approx(found)
    config = json.loads((finished.root / "model" / "config.json").read_text())
    assert config["first_stage_weight"] == found["weight"]
    judged, _ = _in_domain(run, "dev.jsonl", None)
    first, ours = judged.first_stage(found["bm25_weight"]), _rerank(run, finished.root / "model", judged)
    assert mean_ndcg(fuse(first, ours, found["weight"]), judged.qrels) == pytest.approx(found["dev_ndcg@10_fused"])
    assert mean_ndcg(ours, judged.qrels) == pytest.approx(found["dev_ndcg@10_reranker"])
    assert found["dev_ndcg@10_fused"] >= max(found["dev_ndcg@10_reranker"], found["dev_ndcg@10_first_stage"]) - 0.05


def test_systems_are_compared_with_the_best_of_the_others(run, finished):
    found = rows(run)
    others = set(found) - {RERANKER, FUSED}
    assert {"BM25", "encoder", "BM25 + encoder, RRF"} <= others
    (best,) = (name for name, row in found.items() if row["difference"] is None)
    assert found[best]["mean"] == max(found[name]["mean"] for name in others)
    assert all((row["p_value"] is None) == (name in others) for name, row in found.items())
    assert finished.printed.count("nDCG@10 [95 % CI]") == 1
    verdict = read_manifest(finished.root / "evaluation").facts["verdict"]["in_domain"]
    assert f"{FUSED} against {best}" in verdict and verdict in finished.printed


def test_every_system_ranks_the_same_candidates(run):
    judged, _ = _in_domain(run, "test.jsonl", None)
    pools = [{doc_id for doc_id, _ in pool} for pool in judged.pools]
    for scores in judged.scores.values():
        assert [set(scores[query_id]) for query_id, _ in judged.queries] == pools
    for (query_id, _), pool in zip(judged.queries, pools, strict=True):
        assert set(judged.rows["BM25"][query_id]) <= pool
    encoder = run.encoder
    for (query_id, query), pool in zip(judged.queries, judged.pools, strict=True):
        cosines = encoder.similarity([(query, passage) for _, passage in pool])
        best = dict(zip([doc_id for doc_id, _ in pool], cosines.tolist(), strict=True))
        assert judged.scores["dense"][query_id] == pytest.approx(best, abs=5e-3)


def test_a_base_that_ranks_as_it_is_and_other_rerankers_have_rows(finished, tiny_reranker, tmp_path, capsys):
    root = finished.copy(tmp_path / "run", "passages", "queries", "candidates", "groups")
    settings = [f"run_dir={root}", f"train.model={tiny_reranker}", "train.max_steps=2"]
    same = shutil.copytree(tiny_reranker, tmp_path / "same")
    settings += [f"evaluate.rerankers=[{tiny_reranker},{same}]"]
    assert main(["train", str(finished.recipe), *settings]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(finished.recipe), *settings]) == 0
    assert len(re.findall(r" scores [\d,]+ pairs", capsys.readouterr().err)) == 3  # base, same, model: the base once
    found = rows(open_run(finished.recipe, settings))
    assert found[UNTOUCHED]["mean"] == found[str(tiny_reranker)]["mean"] == found[str(same)]["mean"]
    assert np.isfinite(found[FUSED]["mean"])


def test_groups_that_repeat_a_query_that_is_measured_on_are_left_out_of_training_and_counted(
    finished, tmp_path, capsys
):
    root = finished.copy(tmp_path / "run", "passages")
    files = [finished.recipe.parent / f"{name}.jsonl" for name in ("test", "dev")]
    measured = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    queries = [row["query"].upper() + "?" for row in (*measured[:3], measured[12])] + [
        f"what is {i} like" for i in range(40)
    ]
    rows = [
        {"query_id": f"q{i}", "query": query, "passages": ["moon fish", "sand", "stone"], "labels": [1, 0, 0]}
        for i, query in enumerate(queries)
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"run_dir={root}", f"train.groups={tmp_path / 'mine.jsonl'}", "train.max_steps=2"]
    assert main(["train", str(finished.recipe), *settings]) == 0
    assert "4 of 44 groups are left out of training" in (said := capsys.readouterr().err) and queries[0] in said
    model = read_manifest(root / "model")
    assert model.counts["near_duplicates_in_domain"] == 3 and model.counts["near_duplicates_dev"] == 1
    assert main(["evaluate", str(finished.recipe), *settings]) == 0
    manifest = read_manifest(root / "evaluation")
    assert manifest.counts["near_duplicates_in_domain"] == 3 and manifest.counts["near_duplicates_dev"] == 1
    assert manifest.counts["judged_queries"] == 12
    assert "3 training groups were left out whose query is a near-duplicate" in manifest.facts["notes"]["in_domain"]
    assert "3 training groups were left out" in (root / "report.html").read_text()
    assert gather_facts(open_run(finished.recipe, settings)).near_duplicates == 4
    assert main(["train", str(finished.recipe), *settings, "train.near_duplicates=null"]) == 0
    assert "near_duplicates_dev" not in read_manifest(root / "model").counts
    assert main(["train", str(finished.recipe), *settings, "train.near_duplicates=1.5"]) == 2


def test_training_on_nothing_but_test_queries_is_refused(finished, tmp_path, capsys):
    root = finished.copy(tmp_path / "run", "passages")
    query = json.loads((finished.recipe.parent / "test.jsonl").read_text().splitlines()[0])["query"]
    row = {"query_id": "q", "query": query, "passages": ["moon fish", "sand"], "labels": [1, 0]}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["train", str(finished.recipe), f"run_dir={root}", f"train.groups={tmp_path / 'mine.jsonl'}"]) == 2
    assert "the queries of all 1 groups are near-duplicates" in capsys.readouterr().err
