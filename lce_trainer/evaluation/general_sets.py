"""Test sets outside a recipe's domain: standard ones, in one of three forms.

- A dataset in the form of NanoBEIR, on the Hub or in a folder: the configs ``corpus``, ``queries``, ``qrels`` and, if
  there is a first stage, ``bm25``, each with a split for each test set. It is read as sentence-transformers'
  ``CrossEncoderNanoBEIREvaluator`` reads it, so that figures are comparable: the first 100 of BM25 and every relevant
  passage are reranked, without titles, and argument retrieval (ArguAna, Touché) is left out.
- A folder in the layout of BEIR: ``corpus.jsonl``, ``queries.jsonl``, ``qrels/test.tsv``, and ``run.*`` if there is a
  first stage.
- A folder with ``candidates.*``, a run with the texts, and ``qrels.*``, as they can be had of TREC's passage ranking.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lce_trainer.errors import ConfigError, EvaluationError
from lce_trainer.evaluation.judged import Judged, grades_by_query, read_judged
from lce_trainer.files import (
    ENDINGS,
    LABELS,
    PASSAGE_IDS,
    QUERY_IDS,
    SCORES,
    canonical,
    configs_of,
    find_column,
    is_hub_id,
    kind_of,
    read_rows,
    splits_of,
)
from lce_trainer.qrels import Triples, beir_files, read_qrels, read_run, read_texts

logger = logging.getLogger(__name__)

NANO_BEIR = "nano_beir"
STANDARD = {NANO_BEIR: "sentence-transformers/NanoBEIR-en"}
DEPTH = 100  # candidates of the first stage

_LEFT_OUT = ("NanoArguAna", "NanoTouche2020")  # of every language, as sentence-transformers does
_PLAIN_SPLITS = ("train", "test")  # that name no test set
_RUN_ENDINGS = (*ENDINGS, ".trec", ".txt", ".run")

Texts = tuple[pa.ChunkedArray, pa.ChunkedArray]  # ids, and their texts
# A first stage where none is given: of queries by id and a corpus it makes the first candidates with their scores.
FirstStage = Callable[[Mapping[str, str], Texts], dict[str, dict[str, float]]]


@dataclass
class TestSet:
    """One test set.

    Attributes:
        judged: Its queries, candidates, first stage and grades.
        candidates: Which candidates they are, in words.
        relevant_from: Lowest grade of a relevant passage.
        counts: What was left out or added.
    """

    judged: Judged
    candidates: str
    relevant_from: int = 1
    counts: dict[str, int] = field(default_factory=dict)


def read_test_sets(name: str, folder: Path, first_stage: FirstStage, relevant_from: int = 1) -> dict[str, TestSet]:
    """Read the test sets of one name.

    Args:
        name: A key of ``STANDARD``, a Hub id, or a folder.
        folder: Where the name is, if it is a folder.
        first_stage: Ranks the corpus for the queries where no ranking comes with them.
        relevant_from: Lowest grade of a relevant passage among ``candidates.*``.

    Returns:
        The test sets by title.

    Raises:
        ConfigError: The name is neither a folder nor a Hub id.
        EvaluationError: It has none of the three forms, or what it holds cannot be used.
    """
    source = STANDARD.get(name, name)
    if name not in STANDARD and folder.is_dir():
        candidates, qrels = _file(folder, "candidates", ENDINGS), _file(folder, "qrels", _RUN_ENDINGS)
        if candidates is not None:
            if qrels is None:
                raise EvaluationError(f"{folder} has {candidates.name} and no qrels.*, its judgments")
            return {_title(folder): _given(candidates, qrels, relevant_from)}
        if (folder / "qrels").is_dir() and _file(folder, "corpus", ENDINGS) is not None:
            return {_title(folder): _beir(folder, first_stage)}
        source = str(folder)
    elif not is_hub_id(source):
        raise ConfigError(f"evaluate.benchmark: no folder {name!r}, here or beside the recipe, and no Hub id")
    return _nano(source, first_stage)


def _title(folder: Path) -> str:
    return folder.resolve().name


def _file(folder: Path, stem: str, endings: Sequence[str]) -> Path | None:
    """Return the file of a folder that has one of several endings, packed or not."""
    found = [file for file in sorted(folder.glob(f"{stem}.*")) if kind_of(file) in endings and file.is_file()]
    if len(found) > 1:
        raise EvaluationError(f"{folder} has {' and '.join(file.name for file in found)}: keep one of them")
    return found[0] if found else None


def _given(candidates: Path, qrels: Path, relevant_from: int) -> TestSet:
    """Return candidates that came with their texts."""
    judged = read_judged(candidates, qrels)
    ids = [query_id for query_id, _ in judged.queries]
    sizes = sorted(map(len, judged.pools))
    what = f"all that {candidates.name} holds, {sizes[0]} to {sizes[-1]} a query"
    if relevant_from != 1:
        what += f" (grades from {relevant_from} on are relevant for MAP and MRR)"
    counts = {"queries_without_candidates": len(judged.qrels) - len(ids)}
    graded = {query_id: judged.qrels[query_id] for query_id in ids}
    return TestSet(Judged(judged.queries, judged.pools, judged.run, graded), what, relevant_from, counts)


def _beir(folder: Path, first_stage: FirstStage) -> TestSet:
    """Return a test set in the layout of BEIR."""
    splits = [file.name.partition(".")[0] for file in sorted((folder / "qrels").glob("*.tsv*"))]
    if "test" not in splits:
        raise EvaluationError(f"{folder / 'qrels'} has no test.tsv, only {', '.join(splits) or 'nothing'}")
    files = beir_files(folder, "test", EvaluationError)
    if files is None:
        raise EvaluationError(f"{folder} has no queries.jsonl beside its corpus")
    ranked = _file(folder, "run", _RUN_ENDINGS)
    return _assemble(
        read_texts(files["queries"], "queries", QUERY_IDS, EvaluationError),
        read_texts(files["corpus"], "corpus", PASSAGE_IDS, EvaluationError),
        read_qrels(files["qrels"], EvaluationError),
        None if ranked is None else read_run(ranked, EvaluationError),
        f"the first {DEPTH} of {'BM25' if ranked is None else ranked.name}",
        first_stage,
    )


def _nano(source: str, first_stage: FirstStage) -> dict[str, TestSet]:
    """Return the test sets of a dataset in the form of NanoBEIR."""
    configs = configs_of(source, EvaluationError)
    if lacking := [config for config in ("corpus", "queries", "qrels") if config not in configs]:
        raise EvaluationError(
            f"{source} is no test set: it has neither candidates.* and qrels.*, nor BEIR's corpus.jsonl, queries.jsonl "
            f"and qrels/test.tsv, nor NanoBEIR's configs corpus, queries and qrels, of which it lacks "
            f"{', '.join(lacking)}; its configs are {', '.join(configs)}"
        )
    splits = [split for split in splits_of(source, "qrels", EvaluationError) if split not in _LEFT_OUT]
    if not splits:
        raise EvaluationError(f"{source} holds no test set beside {' and '.join(_LEFT_OUT)}, which are left out")
    found = {}
    for split in splits:
        try:
            one = _nano_set(source, split, "bm25" in configs, first_stage)
        except EvaluationError as error:
            raise EvaluationError(f"{source}, {split}: {error}") from None
        found[split if split not in _PLAIN_SPLITS else Path(source).name] = one
    return found


def _nano_set(source: str, split: str, ranked: bool, first_stage: FirstStage) -> TestSet:
    def table(config: str) -> pa.Table:
        return read_rows(source, split=split, config=config, error=EvaluationError).table

    def texts(config: str, names: Sequence[str]) -> Texts:
        rows = table(config)  # sentence-transformers reads no titles
        rows = rows.drop_columns([name for name in rows.column_names if canonical(name) == "title"])
        return read_texts(datasets.Dataset(rows), config, names, EvaluationError)

    rows = table("qrels")
    column = find_column(rows, PASSAGE_IDS)
    if column is not None and pa.types.is_nested(rows[column].type):
        rows = rows.rename_columns({column: "corpus_ids"})
    elif find_column(rows, (*LABELS, *SCORES)) is None:  # NanoBEIR lists what is relevant
        rows = rows.append_column("grade", pa.array(np.ones(len(rows), dtype=np.int64)))
    qrels = read_qrels(datasets.Dataset(rows), EvaluationError)
    relevant = Triples(qrels.name, qrels.queries, qrels.passages, np.sign(qrels.values), qrels.numbers)
    return _assemble(
        texts("queries", QUERY_IDS),
        texts("corpus", PASSAGE_IDS),
        relevant,
        read_run(datasets.Dataset(table("bm25")), EvaluationError) if ranked else None,
        f"the first {DEPTH} of {'the ranking bm25' if ranked else 'BM25'}, and every relevant passage",
        first_stage,
        add_relevant=True,
    )


def _assemble(
    queries: Texts,
    corpus: Texts,
    qrels: Triples,
    run: Triples | None,
    what: str,
    first_stage: FirstStage,
    *,
    add_relevant: bool = False,
) -> TestSet:
    """Return a test set from its parts.

    Args:
        queries: Ids and texts.
        corpus: Likewise.
        qrels: Grades.
        run: The first stage; None if there is none.
        what: Which candidates they are, in words.
        first_stage: Ranks the corpus then.
        add_relevant: Also rerank the relevant passages that the first stage did not bring. A candidate that reads
            as a relevant passage does is that passage then.

    Raises:
        EvaluationError: Ids of the parts do not belong together.
    """
    grades = grades_by_query(qrels, qrels.name)
    asked = _texts_of(list(grades), queries)
    if not asked:
        raise EvaluationError(f"the judgments name no known query: {next(iter(grades), None)!r} is none, for one")
    found = first_stage(asked, corpus) if run is None else _first(run)
    judged = [query_id for query_id in asked if query_id in found]
    if not judged:
        raise EvaluationError("the run holds none of the judged queries: do they belong together?")
    counts = {
        "queries_without_text": len(grades) - len(asked),
        "queries_without_candidates": len(asked) - len(judged),
    }
    wanted = {doc_id for query_id in judged for doc_id in (*found[query_id], *grades[query_id])}
    texts = _texts_of(sorted(wanted), corpus)
    missing = [doc_id for query_id in judged for doc_id in found[query_id] if doc_id not in texts]
    if missing:
        raise EvaluationError(f"the run names {len(missing)} passages that the corpus lacks, {missing[0]!r} for one")
    relevant = {q: [doc_id for doc_id, grade in grades[q].items() if grade > 0] for q in judged}
    lost = sum(doc_id not in texts for some in relevant.values() for doc_id in some)
    if lost and lost == sum(map(len, relevant.values())):
        raise EvaluationError("none of the relevant passages is in the corpus: do they belong together?")
    counts |= {"judged_documents_missing": lost, "relevant_added": 0}
    pools = []
    for query_id in judged:
        pool = list(found[query_id])
        if add_relevant:
            mine = [doc_id for doc_id in relevant[query_id] if doc_id in texts]
            read = {texts[doc_id] for doc_id in mine}
            pool = [doc_id for doc_id in pool if doc_id in mine or texts[doc_id] not in read]
            added = [doc_id for doc_id in mine if doc_id not in found[query_id]]
            counts["relevant_added"] += len(added)
            pool += added
        pools.append([(doc_id, texts[doc_id]) for doc_id in pool])
    for name, count in counts.items():
        if count and name != "relevant_added":
            logger.warning("%s: %d %s", qrels.name, count, name.replace("_", " "))
    return TestSet(
        Judged(
            queries=[(query_id, asked[query_id]) for query_id in judged],
            pools=pools,
            run={
                query_id: {doc_id: found[query_id][doc_id] for doc_id, _ in pool if doc_id in found[query_id]}
                for query_id, pool in zip(judged, pools, strict=True)
            },
            qrels={query_id: grades[query_id] for query_id in judged},
        ),
        what,
        counts=counts,
    )


def _texts_of(ids: Sequence[str], known: Texts) -> dict[str, str]:
    """Return the texts of those ids that there are, in their order."""
    places = pc.index_in(pa.array(ids, pa.large_string()), value_set=known[0].combine_chunks())
    texts = known[1].take(places).to_pylist()
    return {one: text for one, text in zip(ids, texts, strict=True) if text is not None}


def _first(run: Triples) -> dict[str, dict[str, float]]:
    """Return the first candidates of each query, best first; equal ones in the order of the run."""
    ranked: dict[str, dict[str, float]] = {}
    ids = zip(run.queries.to_pylist(), run.passages.to_pylist(), run.values.tolist(), strict=True)
    for query_id, doc_id, score in ids:
        scores = ranked.setdefault(query_id, {})
        scores[doc_id] = max(score, scores.get(doc_id, score))
    return {
        query_id: dict(sorted(scores.items(), key=lambda item: -item[1])[:DEPTH]) for query_id, scores in ranked.items()
    }
