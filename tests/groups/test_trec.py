import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from helpers.groups import content
from helpers.paths import SHARED_DATA
from lce_trainer.errors import GroupsError
from lce_trainer.evaluation.metrics import ranking_metrics
from lce_trainer.groups.convert import load_groups, to_groups
from lce_trainer.training.evaluate import group_metrics

QUERIES = {"1": "capital of France", "2": "capital of Peru", "3": "nobody asked"}
CORPUS = {"p": "Paris", "y": "Lyon", "n": "Nice", "l": "Lima", "c": "Cusco", "u": "Puno", "m": "Marseille"}
QRELS = {"1": {"p": 1, "m": 0}, "2": {"l": 2, "c": 1, "u": 0}}
RUN = {"1": ["y", "p", "n"], "2": ["c", "u", "y", "l"], "3": ["p"]}
GROUPS = {"capital of France": (["Paris"], ["Lyon", "Nice"]), "capital of Peru": (["Lima", "Cusco"], ["Puno", "Lyon"])}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def ms_marco(folder: Path, end: str = "") -> dict[str, Path]:
    """Files as MS MARCO publishes them."""
    judged = [(query, passage, grade) for query, grades in QRELS.items() for passage, grade in grades.items()]
    ranked = [(query, passage, rank) for query, found in RUN.items() for rank, passage in enumerate(found, 1)]
    return {
        "queries": write(
            folder / f"queries.train.tsv{end}", "".join(f"{key}\t{text}\n" for key, text in QUERIES.items())
        ),
        "corpus": write(folder / f"collection.tsv{end}", "".join(f"{key}\t{text}\n" for key, text in CORPUS.items())),
        "qrels": write(folder / f"qrels.train.tsv{end}", "".join(f"{q}\t0\t{p}\t{g}\n" for q, p, g in judged)),
        "run": write(folder / f"run.tsv{end}", "".join(f"{q}\t{p}\t{r}\n" for q, p, r in sorted(ranked))),
    }


def trec_run(separator: str = " ") -> str:
    """In the order of nothing: the score says who is first, and the rank is wrong."""
    rows = [(query, passage, -rank) for query, found in RUN.items() for rank, passage in enumerate(found)]
    return "".join(separator.join((q, "Q0", p, "1", f"{s}.5", "bm25")) + "\n" for q, p, s in sorted(rows))


@pytest.mark.parametrize("end", ["", ".gz"])
def test_ms_marcos_files_become_groups(end, tmp_path):
    groups, counts = to_groups(**ms_marco(tmp_path, end))
    assert content(groups) == GROUPS
    assert groups["query_id"][:] == ["1", "2"]
    assert groups["labels"][:] == [[1, 0, 0], [2, 1, 0, 0]]
    assert groups["passage_ids"][:] == [["p", "y", "n"], ["l", "c", "u", "y"]]
    assert counts["queries_without_positive"] == 1 and counts["candidates_of_other_queries"] == 1
    assert counts["candidates_positive"] == 3


@pytest.mark.parametrize("separator", [" ", "\t", "   "])
def test_a_trec_run_goes_by_its_scores(separator, tmp_path):
    files = {**ms_marco(tmp_path), "run": write(tmp_path / "bm25.trec", trec_run(separator))}
    assert content(to_groups(**files)[0]) == GROUPS


def test_dicts_and_tables_say_the_same():
    scored = {query: {passage: -rank for rank, passage in enumerate(found)} for query, found in RUN.items()}
    for run in (RUN, scored):
        assert content(to_groups(queries=QUERIES, corpus=CORPUS, qrels=QRELS, run=run)[0]) == GROUPS
    judged = [
        {"query-id": int(query), "corpus-id": passage, "score": grade}
        for query, grades in QRELS.items()
        for passage, grade in grades.items()
    ]
    tables = {
        "queries": Dataset.from_list([{"_id": int(key), "text": text} for key, text in QUERIES.items()]),
        "corpus": Dataset.from_list([{"_id": key, "title": "", "text": text} for key, text in CORPUS.items()]),
        "qrels": Dataset.from_list(judged),
        "run": Dataset.from_list([{"query_id": key, "passage_ids": found} for key, found in RUN.items()]),
    }
    assert content(to_groups(**tables)[0]) == GROUPS


def beir(folder: Path) -> Path:
    write(
        folder / "corpus.jsonl",
        "".join(json.dumps({"_id": k, "title": "", "text": t}) + "\n" for k, t in CORPUS.items()),
    )
    write(folder / "queries.jsonl", "".join(json.dumps({"_id": k, "text": t}) + "\n" for k, t in QUERIES.items()))
    judged = [f"{query}\t{passage}\t{grade}\n" for query, some in QRELS.items() for passage, grade in some.items()]
    write(folder / "qrels" / "train.tsv", "query-id\tcorpus-id\tscore\n" + "".join(judged))
    return folder


def test_a_beir_folder_needs_only_a_run(tmp_path):
    assert content(to_groups(beir(tmp_path), run=RUN)[0]) == GROUPS
    with pytest.raises(GroupsError, match=r"has no dev\.tsv, only train: set split="):
        to_groups(beir(tmp_path), run=RUN, split="dev")


def test_without_a_run_what_was_judged_bad_competes(tmp_path):
    wanted = {"capital of France": (["Paris"], ["Marseille"]), "capital of Peru": (["Lima", "Cusco"], ["Puno"])}
    assert content(to_groups(queries=QUERIES, corpus=CORPUS, qrels=QRELS)[0]) == wanted
    assert content(load_groups(str(beir(tmp_path)))) == wanted


def test_titles_and_urls_of_documents(tmp_path):
    docs = write(tmp_path / "msmarco-docs.tsv", 'p\thttp://p\tA "title\tParis\ny\thttp://y\t\tLyon\n')
    groups, _ = to_groups(queries=QUERIES, corpus=docs, qrels={"1": {"p": 1}}, run={"1": ["y"]})
    assert content(groups) == {"capital of France": (['A "title\nParis'], ["Lyon"])}
    titled = {"p": {"title": "A", "text": "Paris"}, "y": {"title": None, "text": "Lyon"}}
    groups, _ = to_groups(queries=QUERIES, corpus=titled, qrels={"1": {"p": 1}}, run={"1": ["y"]})
    assert content(groups) == {"capital of France": (["A\nParis"], ["Lyon"])}


def many(n: int) -> dict:
    corpus = {str(i): f"passage {i}" for i in range(n)}
    return {"queries": {"a": "A", "b": "B"}, "corpus": corpus, "qrels": {"a": {"3": 1}, "b": {"0": 1}},
            "run": {"a": [str(i) for i in range(n)], "b": [str(i) for i in reversed(range(n))]}}  # fmt: skip


def test_the_window_of_a_run_is_honoured_and_what_lies_outside_is_counted():
    groups, counts = to_groups(**many(50), skip=2, depth=6)
    assert groups["passage_ids"][:] == [["3", "2", "4", "5"], ["0", "47", "46", "45", "44"]]
    assert counts["candidates_outside_window"] == 92 and counts["candidates_positive"] == 1


def test_negatives_are_drawn_by_seed_evenly_and_stay_in_the_order_of_the_run():
    draws = [to_groups(**many(50), depth=40, negatives=8, seed=seed)[0]["passage_ids"][:] for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    first, second = ([int(name) for name in row[1:]] for row in draws[0])
    assert len(first) == len(second) == 8
    assert first == sorted(first) and second == sorted(second, reverse=True)
    assert 3 not in first and max(first) < 40 <= 49 - min(second) + 40
    seen = {
        name
        for seed in range(30)
        for name in to_groups(**many(50), depth=40, negatives=8, seed=seed)[0][0]["passage_ids"]
    }
    assert len(seen) == 40


def test_for_an_evaluation_only_what_the_run_brings_is_ranked():
    groups, _ = to_groups(
        queries=QUERIES, corpus=CORPUS, qrels=QRELS, run={"1": ["y", "n"], "2": ["u", "l"]}, add_positives=False
    )
    assert content(groups) == {"capital of France": ([], ["Lyon", "Nice"]), "capital of Peru": (["Lima"], ["Puno"])}


def test_what_a_run_misses_counts_against_all_judgments_and_not_in_a_set_of_what_it_brings():
    judged = {"queries": QUERIES, "corpus": CORPUS, "qrels": {"2": {"l": 1, "c": 1}}}
    groups, _ = to_groups(**judged, run={"2": ["l", "u"]}, add_positives=False)
    labels = [np.array(row) for row in groups["labels"]]
    alone = group_metrics([np.array([2.0, 1.0])], labels, 1.0, groups["query_id"])
    both = ranking_metrics({"2": {"l": 2.0, "u": 1.0}}, judged["qrels"])
    assert alone["ndcg@10"] == alone["map@10"] == 1
    assert both["map@10"]["2"] == 1 / 2 and both["ndcg@10"]["2"] < 0.7


def test_for_an_evaluation_judged_queries_that_the_run_brings_nothing_for_are_counted_and_said(caplog):
    groups, counts = to_groups(
        queries=QUERIES, corpus=CORPUS, qrels=QRELS, run={"2": ["l"], "3": ["p"]}, add_positives=False
    )
    assert content(groups) == {"capital of Peru": (["Lima"], [])}
    assert counts["queries_without_candidates"] == 1
    assert "queries without candidates 1" in caplog.text


def test_a_passage_that_is_relevant_under_another_id_is_no_negative():
    qrels = {"1": {"p": 1}, "2": {"l": 1}}
    groups, counts = to_groups(queries=QUERIES, corpus={**CORPUS, "p2": "Paris"}, qrels=qrels, run={"1": ["p2", "y"]})
    assert content(groups) == {"capital of France": (["Paris"], ["Lyon"])}
    assert counts["negatives_also_positive"] == 1 and counts["groups_without_negative"] == 1


def test_unknown_ids_are_counted_and_none_known_is_an_error(caplog):
    run = {"1": ["y", "gone"], "9": ["y"], "2": ["u"]}
    groups, counts = to_groups(queries=QUERIES, corpus=CORPUS, qrels={**QRELS, "8": {"p": 1}}, run=run)
    assert content(groups)["capital of France"] == (["Paris"], ["Lyon"])
    unknown = {name: count for name, count in counts.items() if "unknown" in name}
    assert unknown == {"judgments_unknown_query": 1, "judgments_unknown_passage": 0, "candidates_unknown_query": 1,
                       "candidates_unknown_passage": 1}  # fmt: skip
    assert "candidates unknown passage 1" in caplog.text
    with pytest.raises(GroupsError, match="none of the judgments names a known query: they say 'q1' and so on, where"):
        to_groups(queries=QUERIES, corpus=CORPUS, qrels={"q1": {"p": 1}}, run=RUN)


def test_files_of_another_shape_are_errors_that_say_what_is_wanted(tmp_path):
    files = ms_marco(tmp_path)
    wrong = {
        "run": ("1 p\n", r"must have 6 columns \(query, Q0, passage, rank, score, tag\) or 3"),
        "qrels": ("1\t2\n", r"must have 4 columns \(query, 0, passage, grade\) or 3"),
        "queries": ("1\ta\tb\n", "must have 2 columns, id and text, not 3"),
        "corpus": ("", "is empty"),
    }
    for name, (text, message) in wrong.items():
        with pytest.raises(GroupsError, match=message):
            to_groups(**{**files, name: write(tmp_path / "wrong.txt", text)})
    with pytest.raises(GroupsError, match=r"wrong\.txt, line 2: 3 fields where the first line has 6"):
        to_groups(**{**files, "run": write(tmp_path / "wrong.txt", "1 Q0 p 1 2.5 x\n1 Q0 y\n")})
    with pytest.raises(GroupsError, match=r"qrels: .*high"):
        to_groups(**{**files, "qrels": write(tmp_path / "wrong.txt", "1 0 p 1\n1 0 y high\n")})
    with pytest.raises(GroupsError, match="there is no file"):
        to_groups(**{**files, "run": tmp_path / "nothing"})
    with pytest.raises(GroupsError, match="missing: qrels"):
        to_groups(queries=QUERIES, corpus=CORPUS)
    with pytest.raises(GroupsError, match="run cannot be joined to rows"):
        to_groups(Dataset.from_dict({"a": ["b"]}), run=RUN)
    with pytest.raises(GroupsError, match="run without a column rank: no column score"):
        to_groups(**{**files, "run": Dataset.from_dict({"query_id": ["1"], "doc_id": ["y"]})})


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs the shared data folder")
def test_trec_dl_19_becomes_groups_of_its_relevant_passages():
    folder = SHARED_DATA / "trec-dl19"
    found = pq.read_table(folder / "candidates.parquet")
    texts = dict(zip(found["doc_id"].to_pylist(), found["text"].to_pylist(), strict=True))
    queries = dict(zip(found["query_id"].to_pylist(), found["query"].to_pylist(), strict=True))
    run = Dataset(found.select(["query_id", "doc_id", "bm25_score"]))
    groups, counts = to_groups(
        queries=queries, corpus=texts, qrels=folder / "qrels.parquet", run=run, positive_from=2, add_positives=False
    )
    assert counts["candidates_read"] == 4300 and len(groups) == 43
    assert sum(len(row["passages"]) for row in groups) == 4300
    assert {label for row in groups for label in row["labels"]} == {0.0, 2.0, 3.0}
