"""A Space: what goes to its repo, what its app finds, and how it is in a browser."""

import json
import os
import socket
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import HfApi, constants
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers.browser import CHROMIUM, Browser, wait_for_server
from helpers.hub_client import TOKEN
from helpers.hub_server import HubServer, metadata_errors
from helpers.paths import ROOT
from lce_trainer.artifacts import read_manifest
from lce_trainer.cli import main
from lce_trainer.errors import ConfigError, PublishError
from lce_trainer.hub.publish import publish
from lce_trainer.hub.space import SpaceSettings, public_encoder, space_repo
from lce_trainer.model.reranker import Reranker
from lce_trainer.model.saving import write_first_stage_weight
from lce_trainer.pipeline.facts import repos
from lce_trainer.pipeline.run import open_run
from lce_trainer.synthesis.language import index_words

FILES = ["README.md", "app.py", "requirements.txt", "space.json"]
PASSAGES = [
    {"text": "Moon\nThe moon shines on the river.", "title": "Moon"},
    {"text": "A red fish lives in the river.", "title": None},
    {"text": "Stones fall into the sand.", "title": ""},
    {"text": "Snow falls on the hills, and on the rivers.", "title": ""},
]
SETTINGS = SpaceSettings("user/tiny", stemmer="english", stopwords="english", top_k=10)


@pytest.fixture
def hub():
    with HubServer(tokens={TOKEN: "user"}) as server:
        yield server


@pytest.fixture
def online(hub, monkeypatch, tmp_path):
    """The client of this process has the local server as its Hub, and the token of its user."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "no-tokens"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture(scope="module")
def app():
    """The module of the app; gradio is not imported by it."""
    spec = spec_from_file_location("space_app", ROOT / "recipes" / "space" / "app.py")
    module = module_from_spec(spec)
    sys.modules["space_app"] = module  # where dataclasses search for annotations
    spec.loader.exec_module(module)
    return module


def metadata(card: bytes) -> dict:
    return yaml.safe_load(card.decode().split("---\n")[1])


def upload(hub: HubServer, *repos, **changes):
    return publish(*repos, **{"token": TOKEN, "endpoint": hub.url, **changes})


def test_a_space_goes_up_as_listed_and_a_second_time_changes_nothing(hub, online):
    repo = space_repo("user/demo", SETTINGS, PASSAGES, license="mit")
    listed = upload(hub, repo, dry_run=True, token=None)
    assert hub.requests == []
    (done,) = upload(hub, repo).uploads
    there = hub.files("space", "user/demo")
    del there[".gitattributes"]
    assert sorted(there) == sorted([*FILES, "passages.jsonl"])
    assert listed.uploads[0].files == done.files == {name: len(content) for name, content in there.items()}
    assert done.url == f"{hub.url}/spaces/user/demo" and done.changed
    info = HfApi(endpoint=hub.url, token=TOKEN).space_info("user/demo")
    assert (info.private, info.sha) == (True, done.commit)
    assert list(hub.repos["space", "user/demo"].refs) == ["main"]
    commits = len(hub.repos["space", "user/demo"].commits)
    again = upload(hub, repo)
    assert not again.uploads[0].changed and "nothing changed" in str(again)
    assert len(hub.repos["space", "user/demo"].commits) == commits
    assert [json.loads(line) for line in there["passages.jsonl"].splitlines()] == [
        {**row, "title": row["title"] or ""} for row in PASSAGES
    ]


def test_passages_that_may_not_be_published_any_more_are_deleted(hub, online):
    upload(hub, space_repo("user/demo", SETTINGS, PASSAGES))
    upload(hub, space_repo("user/demo", SETTINGS))
    assert sorted(hub.files("space", "user/demo")) == [".gitattributes", *FILES]


def test_a_pull_request_and_a_branch_of_a_space(hub, online):
    upload(hub, space_repo("user/demo", SETTINGS))
    changed = space_repo("user/demo", SETTINGS, PASSAGES)
    (on_branch,) = upload(hub, changed, revision="next").uploads
    assert on_branch.url == f"{hub.url}/spaces/user/demo/tree/next"
    (proposed,) = upload(hub, changed, create_pr=True).uploads
    assert proposed.url == f"{hub.url}/spaces/user/demo/discussions/1"
    assert "passages.jsonl" not in hub.files("space", "user/demo")


@pytest.mark.parametrize("secret", [TOKEN, "/home/somebody/a.txt"], ids=["token", "path"])
def test_a_passage_with_a_secret_stops_the_upload(hub, secret, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    rows = [*PASSAGES, {"text": f"see {secret} there", "title": ""}]
    with pytest.raises(PublishError, match=r"passages\.jsonl holds"):
        upload(hub, space_repo("user/demo", SETTINGS, rows), dry_run=True)
    assert hub.requests == []


def test_the_card_is_what_the_hub_reads(app):
    settings = SpaceSettings("user/tiny", dataset="user/groups", fuse=True)
    repo = space_repo("user/demo", settings, PASSAGES, license="mit", packages=["peft>=0.18,<1"])
    card = repo.files["README.md"]
    data = metadata(card)
    assert metadata_errors(data, "space") == []
    assert (data["sdk"], data["app_file"], data["license"]) == ("gradio", "app.py", "mit")
    assert (data["models"], data["datasets"]) == (["user/tiny"], ["user/groups"])
    requirements = repo.files["requirements.txt"].decode()
    assert f"gradio=={data['sdk_version']}\n" in requirements and requirements.endswith("\npeft>=0.18,<1\n")
    assert b"HF_TOKEN" in card and b"{{" not in card and b"{%" not in card
    assert f"At most {app.MOST_PASTED} pasted" in card.decode() and f"the first {app.SHOWN} of each" in card.decode()
    read = app.Settings(**json.loads(repo.files["space.json"]))
    assert (read.model, read.dataset, read.fuse) == ("user/tiny", "user/groups", True)
    with pytest.raises(PublishError, match="names no owner"):
        space_repo("demo", settings)


def test_the_app_requires_what_the_project_does():
    """Its packages are those of pyproject.toml in the same ranges, and gradio in the version that is tested."""
    tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = {}
    for line in [*project["dependencies"], *project["optional-dependencies"]["space"]]:
        known[canonicalize_name(Requirement(line).name)] = Requirement(line).specifier
    lines = (ROOT / "recipes" / "space" / "requirements.txt").read_text().splitlines()
    wanted = {
        canonicalize_name(one.name): one.specifier for one in map(Requirement, [l for l in lines if l[0].isalpha()])
    }
    assert str(wanted.pop("gradio")).removeprefix("==") in [
        line.partition("==")[2]
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line[:8] == "gradio=="
    ]
    assert wanted == {name: known[name] for name in wanted}
    assert {"bm25s", "pystemmer", "sentence-transformers"} <= set(wanted)


# The app's own functions


def index_of(app, rows=PASSAGES, encoder=None):
    return app.Index(
        [app.Passage(row["text"], row["title"] or "") for row in rows], app.Words("english", "english"), encoder
    )


def by_length(pairs):
    """A reranker that likes short passages."""
    return np.array([-len(passage) for _, passage in pairs], dtype=np.float32)


@pytest.mark.parametrize(
    "text",
    [
        "Rivers, the rivers' flows; x y2 _a", "Straße und Flüsse", "月亮照在河上。The moon", "東京タワー",
        "พระจันทร์ส่องแสง",
        "달이 강을 비춘다", "नदी में मछली रहती है", "नदी月", "", "a b c", "Ünïcode e\u0301te\u0301",
    ],
)  # fmt: skip
def test_the_words_of_the_app_are_those_of_the_index(app, text):
    assert [word for _, _, word in app.words_at(text)] == index_words(text)
    for start, end, word in app.words_at(text):
        assert text[start:end].lower() == word


def test_a_search_gives_both_orders_with_their_scores_and_times(app):
    found = app.search("which rivers flow", index_of(app), by_length, top_k=10)
    assert {passage.text for passage in found.passages} == {PASSAGES[i]["text"] for i in (0, 1, 3)}
    assert list(found.first) == sorted(found.first, reverse=True) and found.first[-1] > 0
    lengths = [len(found.passages[row].text) for row in found.order]
    assert lengths == sorted(lengths)
    assert found.searched == 4 and set(found.seconds) == {"first", "reranker"} and min(found.seconds.values()) > 0
    everything = app.search("which rivers flow", index_of(app), by_length, top_k=1, everything=True)
    assert len(everything.passages) == 4
    assert len(app.search("which rivers flow", index_of(app), by_length, top_k=1).passages) == 1
    assert app.search("unheard", index_of(app), by_length, top_k=1).passages == []


def test_first_stage_scores_are_those_of_the_recipes_index(app, finished):
    from lce_trainer.synthesis.retrieval.bm25 import BM25Index

    table = open_run(finished.recipe, [f"run_dir={finished.root}"]).table("passages")
    folder = finished.root / "passages" / "bm25"
    words = read_manifest(folder, "bm25").config
    index = app.Index([app.Passage(text) for text in table["text"]], app.Words(words["stemmer"], words["stopwords"]))
    query = "red fish in the river"
    rows, scores = BM25Index.load(folder).search([query], 10, progress=False)
    mine = index.bm25(index.words.stems(query))
    np.testing.assert_allclose(mine[rows[0][rows[0] >= 0]], scores[0][rows[0] >= 0], atol=1e-5)
    found = app.search(query, index, by_length, top_k=10)
    assert [passage.text for passage in found.passages] == [table["text"][row] for row in rows[0] if row >= 0]


def test_the_order_with_the_first_stage_is_that_of_rank(app, tiny_reranker):
    reranker = Reranker.from_pretrained(str(tiny_reranker))
    reranker.model.config.first_stage_weight = 0.3
    found = app.search("where does the red river fall", index_of(app), reranker.score, top_k=10, weight=0.3)
    wanted = reranker.rank(
        "where does the red river fall",
        [passage.text for passage in found.passages],
        first_stage_scores=list(found.first),
    )
    assert [row.index for row in wanted] == list(found.order)
    np.testing.assert_allclose([row.score for row in wanted], found.final[found.order], atol=1e-6)


class Letters:
    """An encoder that counts letters."""

    def encode_query(self, texts):
        return np.array([[text.lower().count(letter) for letter in "abcdefghij"] for text in texts], dtype=np.float32)

    encode_document = encode_query


def test_an_encoder_brings_passages_without_a_common_word_and_counts_by_its_weight(app):
    index = index_of(app, encoder=Letters())
    found = app.search("bead", index, by_length, top_k=2, bm25_weight=0.0)
    assert len(found.passages) == 2 and found.cosine[0] >= found.cosine[1]
    mixed = app.search("fish on the hills", index, by_length, top_k=4, bm25_weight=0.6)
    np.testing.assert_allclose(mixed.first, app.mean(mixed.bm25, mixed.cosine, 0.6))


def test_the_page_marks_what_matched_and_shows_where_a_passage_went(app):
    index = index_of(app)
    settings = app.Settings("user/tiny", fuse=True)
    found = app.search("the moon & river", index, by_length, top_k=10, weight=0.25)
    text = app.page(found, "the moon & river", index.words, settings, {"slope": 1.0, "intercept": 0.0})
    assert "<mark>moon</mark> shines" in text and "<mark>rivers</mark>" in text
    assert "<mark>the</mark>" not in text
    assert "matched: <b>moon</b> <b>river</b>" in text and "matched: <b>river</b>" in text
    assert "First stage: BM25" in text and "75% reranker + 25% first stage" in text
    assert " ms for 4 passages: 3 candidates<" in text and " ms for 3 candidates; " in text
    assert "% answers · logit" in text and "BM25 " in text
    assert text.count("<li") == 6
    for row, place in enumerate(found.order):
        assert f"was {place + 1}" in text or row == place


def test_markup_in_passages_queries_and_names_is_text(app):
    bad = "<script>alert('river')</script>"
    index = index_of(app, [{"text": f"{bad}\n{bad} river", "title": bad}])
    found = app.search(f"river {bad}", index, by_length, top_k=10)
    text = app.page(found, f"river {bad}", index.words, app.Settings("a/<b>"))
    assert "<script" not in text and "&lt;<mark>script</mark>&gt;" in text and "a/&lt;b&gt;" in text
    assert "<i>" not in app.message("<i>")


def test_a_long_passage_shows_the_part_that_matched(app):
    words = app.Words("english", "english")
    long = "stone " * 200 + "the moon shines " + "sand " * 200
    short = app.excerpt(long, words, frozenset(words.stems("moon")))
    assert short.startswith("… stone") and short.endswith("sand …") and "moon" in short
    assert len(short) <= app.EXCERPT + 4 and short[2:-2] in long
    assert app.excerpt("short", words, frozenset()) == "short"
    index = index_of(app, [{"text": long, "title": ""}])
    found = app.search("moon", index, by_length, top_k=5)
    assert app.page(found, "moon", words, app.Settings("a/b")).count("<details>") == 2


def test_what_is_pasted_is_bounded(app):
    assert app.pasted_passages(" a b \n\nc\n") == [app.Passage("a b"), app.Passage("c")]
    for text, complaint in (("a\n" * 201, "201 passages, and 200 at most"), ("a" * 5001, "longer than 5,000")):
        with pytest.raises(ValueError, match=complaint):
            app.pasted_passages(text)


def test_the_answer_comes_from_the_published_model_and_what_fails_is_a_sentence(app, tiny_reranker, monkeypatch):
    settings = app.Settings(str(tiny_reranker))
    pasted = "a red fish\nthe river flows on stone\n"
    text = app.respond("red river", pasted, 50, app.RERANKER_ALONE, settings)
    scores = Reranker.from_pretrained(str(tiny_reranker)).score(
        [("red river", line) for line in pasted.split("\n")[:2]]
    )
    for score in scores:
        assert f"logit {score:.2f}" in text  # and not the probability that CrossEncoder makes of a plain checkpoint
    assert "Type a query" in app.respond(" ", pasted, 50, app.RERANKER_ALONE, settings)
    assert "Paste the passages" in app.respond("red", "", 50, app.RERANKER_ALONE, settings)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    missing = app.respond("red", pasted, 50, app.RERANKER_ALONE, app.Settings("user/none"))
    assert "could not be loaded" in missing and "secret HF_TOKEN" in missing
    assert "gradio" not in sys.modules


# From a run


@pytest.fixture
def published(finished, tmp_path):
    """A copy of the finished run, and what publishes it."""
    root = finished.copy(tmp_path / "run", "passages", "queries", "candidates", "groups", "model", "evaluation")

    def command(*words: str) -> int:
        names = ("publish.model_id=user/fish", f"run_dir={root}")
        return main(["publish", str(finished.recipe), *names, "--anyway", "--space", "user/demo", *words])

    return command


def run_of(finished, *settings):
    return open_run(finished.recipe, [f"run_dir={finished.root}", "publish.space_id=user/demo", *settings])


def test_the_command_publishes_the_space_last_and_passages_only_with_a_licence(published, hub, online, capsys):
    assert published("--dry-run") == 0
    printed = capsys.readouterr().out
    assert "space user/demo, " in printed and "left out: passages: there is no licence for them" in printed
    assert "left out: the encoder encoder: it is on this machine alone" in printed
    assert hub.requests == []
    assert published() == 0
    assert [kind for kind, _ in hub.repos] == ["model", "space"]
    there = hub.files("space", "user/demo")
    assert sorted(there) == [".gitattributes", *FILES]
    settings = json.loads(there["space.json"])
    assert settings["model"] == "user/fish" and not settings["fuse"] and settings["encoder"] is None
    commits = {key: len(repo.commits) for key, repo in hub.repos.items()}
    capsys.readouterr()
    assert published() == 0
    assert capsys.readouterr().out.count("nothing changed") == 2
    assert {key: len(repo.commits) for key, repo in hub.repos.items()} == commits
    assert published("publish.license=mit") == 0
    there = hub.files("space", "user/demo")
    assert len(there["passages.jsonl"].splitlines()) == 60
    assert json.loads(there["space.json"])["examples"] and metadata(there["README.md"])["license"] == "mit"


def test_a_space_needs_a_published_model(finished):
    with pytest.raises(ConfigError, match=r"the Space user/demo loads the model from the Hub: .* publish\.model_id"):
        repos(run_of(finished))


def test_the_first_stage_of_the_space_is_the_one_its_weight_was_found_for(finished, monkeypatch):
    monkeypatch.setattr("lce_trainer.pipeline.space.public_encoder", lambda name: ("user/encoder", "some-package==1.0"))
    space = repos(run_of(finished, "publish.model_id=user/fish"))[-1]
    settings = json.loads(space.files["space.json"])
    chosen = read_manifest(finished.root / "model").facts["first_stage"]
    assert settings["encoder"] == "user/encoder" and settings["fuse"]
    assert settings["bm25_weight"] == chosen["bm25_weight"]
    assert space.files["requirements.txt"].endswith(b"some-package==1.0\n")
    assert b"user/encoder" in space.files["README.md"]


def test_an_encoder_is_public_on_the_hub_or_in_a_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "encoder").mkdir(parents=True)
    assert public_encoder("user/encoder") == ("user/encoder", "")
    assert (
        public_encoder("my/encoder") == public_encoder(str(tmp_path)) == public_encoder("package:none/a") == (None, "")
    )
    name = "package:sentence_transformers/folder"
    assert public_encoder(name) == (name, f"sentence-transformers=={version('sentence-transformers')}")


def test_passages_without_a_licence_go_when_that_is_wanted(finished):
    run = run_of(finished, "publish.model_id=user/fish")
    assert "passages.jsonl" not in repos(run)[-1].files
    assert "passages.jsonl" in repos(run, include_passages=True)[-1].files


def test_a_large_corpus_goes_in_part_and_the_report_says_so(finished, monkeypatch):
    monkeypatch.setattr("lce_trainer.pipeline.space.MOST_PASSAGES", 7)
    space = repos(run_of(finished, "publish.model_id=user/fish", "publish.license=mit"))[-1]
    rows = [json.loads(line) for line in space.files["passages.jsonl"].splitlines()]
    texts = run_of(finished).table("passages")["text"][:]
    assert len(rows) == 7 and (rows[0]["text"], rows[-1]["text"]) == (texts[0], texts[-1])
    assert f"{len(texts) - 7} of {len(texts)} passages: a Space takes 7, drawn evenly over the corpus" in space.left_out
    assert b"It searches 7 of 60 passages" in space.files["README.md"]


# In a browser

QUERY = "red fish in the river"


@pytest.fixture
def served(finished, tmp_path):
    """The address of the Space of the finished run, which a process of its own serves from the files as uploaded."""
    run = run_of(finished, "publish.model_id=user/fish", "publish.license=mit")
    folder = tmp_path / "space"
    folder.mkdir()
    for name, content in repos(run)[-1].files.items():
        (folder / name).write_bytes(content)
    settings = json.loads((folder / "space.json").read_text())
    finished.copy(tmp_path, "model")
    write_first_stage_weight(tmp_path / "model", 0.4)
    settings |= {"model": "../model", "fuse": True}
    (folder / "space.json").write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        yield f"http://127.0.0.1:{port}", process, tmp_path / "log"
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
@pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed: pip install 'lce-trainer[space]'")
def test_a_stranger_searches_in_a_browser(served, tmp_path):
    address, process, log = served
    pictures = Path(os.environ.get("SPACE_PICTURES", tmp_path))
    with Browser(tmp_path / "profile") as browser:
        wait_for_server(address, process, log, seconds=240)
        for name, width, height in (("wide", 1280, 900), ("phone", 390, 844)):
            browser.resize(width, height, phone=name == "phone")
            browser.open(address)
            browser.wait_until("document.querySelector('#query textarea, #query input') !== null")
            browser.type_into("#query textarea, #query input", QUERY)
            browser.click("#search")
            browser.wait_until("document.querySelectorAll('#results li').length >= 2", seconds=120)
            browser.picture(pictures / f"{name}.png")
            browser.picture(pictures / f"{name}-whole.png", whole=True)
            assert browser.run("document.querySelectorAll('#results section').length") == 2
            first, second = browser.run(
                "[...document.querySelectorAll('#results section')].map(s => s.querySelectorAll('li').length)"
            )
            assert first == second == 10
            assert browser.run("document.querySelectorAll('#results mark').length") > 0
            text = browser.run("document.querySelector('#results').innerText")
            assert " ms for 60 passages: " in text and "; 60% reranker + 40% first stage" in text
            assert browser.run("document.querySelector('#query textarea, #query input').value") == QUERY
            assert browser.run("document.documentElement.scrollWidth") <= width, "nothing sticks out sideways"
            places = browser.run(
                "[...document.querySelectorAll('#results section')]"
                ".map(section => section.getBoundingClientRect()).map(box => [box.x, box.y])"
            )
            assert places[0][1] == places[1][1] and places[0][0] < places[1][0] < width, "they stand side by side"
        browser.open(f"{address}/?q=snow&__theme=dark")
        browser.wait_until("document.querySelectorAll('#results li').length >= 2", seconds=120)
        assert browser.run("document.querySelector('#query textarea, #query input').value") == "snow"
        browser.picture(pictures / "dark.png")
        assert browser.errors == []
