"""The report of a finished run, and groups in the terminal."""

import pyarrow.parquet as pq

from lce_trainer.artifacts import read_manifest
from lce_trainer.pipeline.evaluate import comparisons, query_table
from lce_trainer.pipeline.facts import gather_facts
from lce_trainer.pipeline.run import open_run


def test_the_evaluation_holds_each_query_beside_the_comparison_and_cards_show_the_comparison_alone(finished):
    run = open_run(finished.recipe)
    manifest = read_manifest(finished.root / "evaluation", "evaluation")
    assert set(manifest.files) == {"in_domain.parquet", "in_domain_by_query.parquet"}
    assert comparisons(manifest) == ["in_domain"]
    (evaluation,) = gather_facts(run).evaluations
    assert evaluation.queries == 12
    rows = query_table(run, "in_domain")
    assert len(rows) == 12 and set(rows[0]["systems"]) == {row["system"] for row in evaluation.rows}
    assert rows.to_list() == pq.read_table(finished.root / "evaluation" / "in_domain_by_query.parquet").to_pylist()
