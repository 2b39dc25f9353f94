"""Small general test sets in every form in which they are published."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from helpers.tiny import WORDS

Rows = list[dict[str, Any]]


def write_nano(
    folder: Path, *splits: str, ranked: bool = True, titles: bool = False, queries: int = 6, seed: int = 3
) -> Path:
    """A dataset in the form of NanoBEIR, as the Hub keeps it: a config a part, in it a split a test set.

    Of each query one relevant passage is ranked by ``bm25`` and one is not.
    """
    draw = random.Random(seed)
    parts: dict[str, dict[str, Rows]] = {name: {} for name in ("corpus", "queries", "qrels", *(["bm25"] * ranked))}
    for split in splits:
        texts = {f"d{i}": " ".join(draw.sample(WORDS, k=draw.randint(4, 16))) for i in range(40)}
        corpus: Rows = [{"_id": doc_id, "text": text} for doc_id, text in texts.items()]
        if titles:
            corpus = [{**row, "title": "moon"} for row in corpus]
        asked = {f"q{i}": " ".join(draw.sample(texts[f"d{i}"].split(), k=3)) for i in range(queries)}
        relevant = {f"q{i}": [f"d{i}", f"d{39 - i}"] for i in range(queries)}
        parts["corpus"][split] = corpus
        parts["queries"][split] = [{"_id": query_id, "text": text} for query_id, text in asked.items()]
        parts["qrels"][split] = [{"query-id": q, "corpus-id": d} for q, docs in relevant.items() for d in docs]
        if ranked:
            parts["bm25"][split] = [
                {"query-id": q, "corpus-ids": [relevant[q][0], *draw.sample([f"d{i}" for i in range(10, 30)], k=12)]}
                for q in asked
            ]
    configs = []
    for name, tables in parts.items():
        (folder / name).mkdir(parents=True)
        for split, rows in tables.items():
            pq.write_table(pa.Table.from_pylist(rows), folder / name / f"{split}-00000-of-00001.parquet")
        files = [{"split": split, "path": f"{name}/{split}-*"} for split in tables]
        configs.append({"config_name": name, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    return folder


def write_beir(folder: Path, queries: int = 6, seed: int = 4) -> Path:
    """A folder in the layout of BEIR, with grades 0 to 2 and titles."""
    draw = random.Random(seed)
    texts = {f"d{i}": " ".join(draw.sample(WORDS, k=draw.randint(4, 16))) for i in range(30)}
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": doc_id, "title": "star", "text": text} for doc_id, text in texts.items()]
    asked = [
        {"_id": f"q{i}", "text": " ".join(draw.sample(texts[f"d{i}"].split(), k=3)), "metadata": {}}
        for i in range(queries + 2)  # two are not judged
    ]
    for name, rows in (("corpus", corpus), ("queries", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"q{i}\td{i + j}\t{grade}\n" for i in range(queries) for j, grade in enumerate((2, 1, 0))]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


def write_candidates(folder: Path, queries: int = 3) -> Path:
    """A folder of candidates with their texts, and of grades, as they can be had of TREC DL."""
    folder.mkdir(parents=True)
    draw = random.Random(5)
    rows = [
        {
            "query_id": f"q{i}",
            "query": f"what {WORDS[i]}",
            "doc_id": f"d{j}",
            "text": " ".join(draw.sample(WORDS, k=8)),
            "bm25_rank": j,
        }
        for i in range(queries)
        for j in range(14 + i)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "candidates.parquet")
    judged = [
        {"query_id": f"q{i}", "doc_id": f"d{j}", "grade": grade}
        for i in range(queries)
        for j, grade in ((1, 2), (3, 1))
    ]
    pq.write_table(pa.Table.from_pylist(judged), folder / "qrels.parquet")
    return folder
