"""How a recipe's queries are written: styles, personas, the user's own queries, filters and the gauge, for real."""

import numpy as np
import pytest

from helpers.tiny_recipe import write_recipe
from lce_trainer.errors import ConfigError, LLMError
from lce_trainer.pipeline import stages
from lce_trainer.pipeline.report import render_report
from lce_trainer.pipeline.run import open_run
from lce_trainer.synthesis.cost import QuoteReadyError

STYLED = "generate.styles={keyword: 1, question: 1, misspelled: 1}"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


def test_every_setting_of_the_queries_works_in_a_run_and_is_in_manifest_and_report(recipe, tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text('{"query": "seed what root"}\n{"query": "moon how", "doc_id": "d40", "style": "keyword"}\n')
    settings = [
        STYLED,
        "generate.personas=[a nurse]",
        "generate.min_gain=-9",
        "generate.max_jaccard=0.9",
        "generate.max_ties=30",
        f"generate.example_queries={file}",
        f"run_dir={tmp_path / 'run'}",
    ]
    run = open_run(recipe, settings)
    stages.check(run)
    stages.generate(run)
    made, queries = run.manifest("queries"), run.table("queries")
    assert made.config["prompt"] == "styled"
    assert {"keyword", "question", "misspelled"} == set(queries["style"]) and made.counts["misspelled"] > 0
    assert made.facts["styles"] == {"keyword": 1.0, "question": 1.0, "misspelled": 1.0}
    assert {"dropped_near_duplicate", "dropped_vague", "dropped_unlikely"} <= set(made.counts)
    # All are written, and what reaches the last filter is scored twice.
    assert made.facts["cost"]["calls"] == 120 + 2 * (made.counts["kept"] + made.counts["dropped_unlikely"])
    found = made.facts["gauge"]
    assert (found["own"], found["available"]) == (8, True) and 0 <= found["auc_low"] <= found["auc"] <= 1
    page = render_report(run)
    assert "Synthetic queries against yours" in page and "Examples of dropped queries" in page
    file.write_text('{"query": "seed what river"}\n')
    again = open_run(recipe, settings)
    with pytest.raises(QuoteReadyError):  # an edited file counts as a changed setting
        stages.generate(again, dry_run=True)


def test_an_example_that_is_evaluated_on_is_refused_by_check_and_by_the_stage_alone(recipe, tmp_path):
    test_query = (recipe.parent / "test.jsonl").read_text().split('"query": "')[1].partition('"')[0]
    file = tmp_path / "own.jsonl"
    file.write_text(f'{{"query": "{test_query.upper()}?"}}\n')
    run = open_run(recipe, [f"generate.example_queries={file}", f"run_dir={tmp_path / 'run'}"])
    for stage in (stages.check, stages.generate):
        with pytest.raises(ConfigError, match=r"own\.jsonl, row 1: the example query .* is also in evaluate\.queries"):
            stage(run)
    run = open_run(recipe, [f"generate.examples=[{{query: {test_query}, passage: P}}]", f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match=r"generate\.examples: the example query .* is also in evaluate\.queries"):
        stages.check(run)


@pytest.mark.parametrize(("setting", "need"), [("min_gain", "score"), ("min_answerable", "choose")])
def test_what_a_filter_needs_of_the_llm_is_probed_before_the_first_call(setting, need, recipe, tmp_path):
    run = open_run(recipe, [f"generate.{setting}=0.5", "label.judge=encoder", f"run_dir={tmp_path / 'run'}"])
    llm, check = run.llm, run.llm.check

    def refuse(wanted):
        if wanted == need:
            raise LLMError("the server cannot")
        check(wanted)

    llm.check = refuse
    for stage in (stages.check, stages.generate):
        with pytest.raises(LLMError, match=rf"generate\.{setting}: the server cannot"):
            stage(run)
    assert llm.usage.calls == 0


def test_a_dry_run_quotes_the_queries_after_a_sample_of_styles_and_names_what_it_leaves_out(recipe, tmp_path):
    settings = ["generate.queries=20", "generate.min_gain=0", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(QuoteReadyError, match=r"all 40 calls are answered.*; not counted: generate\.min_gain two more"):
        stages.generate(open_run(recipe, settings), dry_run=True)
    run = open_run(recipe, [*settings, "generate.styles=auto"])
    with pytest.raises(QuoteReadyError, match=r"^40 calls are left of 120: "):  # after 20 in each of four styles
        stages.generate(run, dry_run=True)


def test_a_corpus_too_large_to_compare_all_of_it_is_searched_in_clusters(recipe, tmp_path, caplog, monkeypatch):
    pytest.importorskip("faiss", reason="of the extra ann")
    settings = [f"mine.encoder={recipe.parent / 'encoder'}", "generate.queries=12", f"run_dir={tmp_path / 'run'}"]
    exact = open_run(recipe, settings)
    stages.generate(exact)
    stages.mine(exact)
    wanted = exact.table("candidates")["passage_ids"][:]
    assert "search" not in exact.manifest("candidates").config
    clustered = open_run(recipe, [*settings, "mine.exact_up_to=50"])
    stages.read_corpus(clustered)
    assert len(clustered.first_stage.retrievers["dense"].clusters.search(np.ones((1, 32), np.float32), 5)[0]) == 5
    stages.generate(clustered)
    stages.mine(clustered)
    assert clustered.manifest("candidates").config["search"] == "clusters"
    assert clustered.table("candidates")["passage_ids"][:] == wanted  # all clusters of so few passages are read
    monkeypatch.setattr("lce_trainer.synthesis.retrieval.clusters.find_spec", lambda name: None)
    without = open_run(recipe, [*settings, "mine.exact_up_to=50"])
    stages.generate(without)
    assert "compared with all passages all the same" in caplog.text and not without.searches_clusters
