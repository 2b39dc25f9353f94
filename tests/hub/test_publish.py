import json
import logging
import re
import socket
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from helpers.hub_client import READER, TOKEN, client
from helpers.hub_server import Blob, HubServer
from lce_trainer.artifacts import save_artifact
from lce_trainer.errors import ArtifactError, PublishError
from lce_trainer.groups.schema import GROUPS_FEATURES
from lce_trainer.hub.cards import RunFacts, dataset_card, model_card
from lce_trainer.hub.contents import dataset_repo, model_repo
from lce_trainer.hub.publish import publish

PAIRS = [("where does the red fish live", "the river"), ("what is sand", "stone and sand")]
MODEL_FILES = ["README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
GROUPS_FILES = ["README.md", "groups/manifest.json", "groups/train.parquet"]


@pytest.fixture
def hub():
    with HubServer(tokens={TOKEN: "user", READER: "someone-else"}) as server:
        yield server


@pytest.fixture
def online(monkeypatch, tmp_path):
    """The client of this process may use the network, and finds no token of the person who runs the tests."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "no-tokens"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folders(tmp_path, tiny_reranker) -> tuple[Path, Path]:
    """A model folder as training leaves it, and groups, both with cards."""
    model_dir, groups_dir = tmp_path / "model", tmp_path / "groups"
    AutoModelForSequenceClassification.from_pretrained(tiny_reranker).save_pretrained(model_dir)
    AutoTokenizer.from_pretrained(tiny_reranker).save_pretrained(model_dir)
    for name in ("optimizer.pt", "training_args.bin", "trainer_state.json", "rng_state.pth", "run.log", "events.jsonl"):
        (model_dir / name).write_text(f"private {TOKEN}")
    (model_dir / "checkpoint-5").mkdir()
    (model_dir / "checkpoint-5" / "model.safetensors").write_bytes(b"old")
    row = {
        "query_id": "q",
        "query": PAIRS[0][0],
        "passage_ids": ["a", "b"],
        "passages": ["the river", "hill"],
        "labels": [1.0, 0.0],
        "scores": [0.5, -0.5],
    }
    table = datasets.Dataset.from_list([row], features=GROUPS_FEATURES)
    save_artifact(groups_dir, {"train": table}, kind="groups", config={}, inputs={}, counts={"groups": 1})
    (groups_dir / "journal.jsonl").write_text(f"{TOKEN}\n")
    (groups_dir / ".cache").mkdir()
    (groups_dir / ".cache" / "left.arrow").write_bytes(b"cache")
    (groups_dir / "stray.parquet").write_bytes(b"not of the manifest")
    facts = RunFacts("tiny", "tiny groups", model_id="user/tiny", dataset_id="user/tiny-groups")
    (model_dir / "README.md").write_text(model_card(model_dir, facts))
    (groups_dir / "README.md").write_text(dataset_card({"groups": groups_dir}, facts))
    return model_dir, groups_dir


def run(folders, hub: HubServer, model_id="user/tiny", dataset_id="user/tiny-groups", **changes):
    """Publish the folders with the cards that lie in them."""
    repos = []
    for make, repo_id, folder in ((dataset_repo, dataset_id, folders[1]), (model_repo, model_id, folders[0])):
        if folder is not None:
            what = {"groups": folder} if make is dataset_repo else folder
            repos.append(make(repo_id, what, (folder / "README.md").read_text()))
    return publish(*repos, **{"token": TOKEN, "endpoint": hub.url, **changes})


def test_publish_sends_exactly_the_listed_files_dataset_first(folders, hub, online):
    listed = run(folders, hub, dry_run=True, token=None)
    assert hub.requests == []
    published = run(folders, hub)
    for plan, upload in zip(listed.uploads, published.uploads, strict=True):
        there = hub.files(upload.repo_type, upload.repo_id)
        del there[".gitattributes"]
        assert plan.files == upload.files == {name: len(content) for name, content in there.items()}
        assert upload.changed
        folder = folders[upload.repo_type == "dataset"]
        assert all((folder / Path(name).name).read_bytes() == content for name, content in there.items())
    assert [list(upload.files) for upload in published.uploads] == [GROUPS_FILES, MODEL_FILES]
    assert [upload.repo_id for upload in published.uploads] == ["user/tiny-groups", "user/tiny"]
    assert all(repo.private for repo in hub.repos.values())
    assert "would go (dry run)" in str(listed) and f"published: {hub.url}/datasets/user/tiny-groups" in str(published)


def test_publishing_again_changes_nothing_and_says_so(folders, hub, online):
    run(folders, hub)
    commits = {key: len(repo.commits) for key, repo in hub.repos.items()}
    again = run(folders, hub)
    assert {key: len(repo.commits) for key, repo in hub.repos.items()} == commits
    assert [upload.changed for upload in again.uploads] == [False, False]
    assert str(again).count("nothing changed") == 2
    (folders[0] / "README.md").write_text("---\nlicense: mit\n---\nnew\n")
    assert [upload.changed for upload in run(folders, hub).uploads] == [False, True]
    assert hub.files("model", "user/tiny")["README.md"].endswith(b"new\n")


def test_weights_of_an_earlier_publish_that_would_be_loaded_instead_are_deleted(folders, hub, online):
    (folders[0] / "adapter_config.json").write_text("{}")
    run(folders, hub)
    (folders[0] / "adapter_config.json").unlink()
    run(folders, hub)
    assert "adapter_config.json" not in hub.files("model", "user/tiny")
    assert "model.safetensors" in hub.files("model", "user/tiny")


def test_one_half_can_be_published_alone(folders, hub, online):
    run((folders[0], None), hub, dataset_id=None)
    assert list(hub.repos) == [("model", "user/tiny")]


LOAD = """
import json, sys, torch
from datasets import load_dataset
from huggingface_hub import snapshot_download
from transformers import AutoModelForSequenceClassification, AutoTokenizer

pairs = json.loads(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained("user/tiny")
model = AutoModelForSequenceClassification.from_pretrained("user/tiny").eval()
batch = tokenizer([q for q, _ in pairs], [p for _, p in pairs], padding=True, return_tensors="pt")
with torch.no_grad():
    scores = model(**batch).logits[:, 0].tolist()
groups = load_dataset("user/tiny-groups", split="train")
print(json.dumps({"scores": scores, "groups": groups[0], "snapshot": snapshot_download("user/tiny")}))
"""


def test_what_was_published_loads_over_http_with_equal_scores_and_the_token_is_nowhere(folders, hub, tmp_path):
    model_dir, groups_dir = folders
    up = client(
        hub,
        tmp_path / "publisher",
        TOKEN,
        "import logging, sys; logging.basicConfig(level=logging.DEBUG)\n"
        "from pathlib import Path\n"
        "from lce_trainer.hub.contents import dataset_repo, model_repo\n"
        "from lce_trainer.hub.publish import publish\n"
        "model, groups = map(Path, sys.argv[1:])\n"
        "card = (groups / 'README.md').read_text()\n"
        "dataset = dataset_repo('user/tiny-groups', {'groups': groups}, card)\n"
        "print(publish(dataset, model_repo('user/tiny', model, (model / 'README.md').read_text())))",
        str(model_dir),
        str(groups_dir),
    )
    assert up.returncode == 0, up.stderr
    assert "model.safetensors" in up.stdout
    assert TOKEN not in up.stdout + up.stderr
    for repo_type, repo_id in hub.repos:
        assert all(TOKEN.encode() not in content for content in hub.files(repo_type, repo_id).values())

    down = client(hub, tmp_path / "user", TOKEN, LOAD, json.dumps(PAIRS))
    assert down.returncode == 0, down.stderr
    loaded = json.loads(down.stdout.splitlines()[-1])
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    batch = tokenizer([q for q, _ in PAIRS], [p for _, p in PAIRS], padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = AutoModelForSequenceClassification.from_pretrained(model_dir).eval()(**batch).logits[:, 0].tolist()
    assert loaded["scores"] == pytest.approx(scores, abs=1e-6)
    assert loaded["groups"] == datasets.Dataset.from_parquet(str(groups_dir / "train.parquet"))[0]
    assert sorted(path.name for path in Path(loaded["snapshot"]).iterdir()) == [".gitattributes", *MODEL_FILES]


@pytest.mark.parametrize("token", [None, READER], ids=["no token", "another user's"])
def test_a_private_repo_is_hidden_from_others(folders, hub, online, tmp_path, token):
    run(folders, hub)
    for repo_type, repo_id, name in (
        ("model", "user/tiny", "config.json"),
        ("dataset", "user/tiny-groups", "groups/train.parquet"),
    ):
        with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError):
            huggingface_hub.HfApi(endpoint=hub.url, token=token or False).repo_info(repo_id, repo_type=repo_type)
        with pytest.raises((huggingface_hub.errors.RepositoryNotFoundError, huggingface_hub.errors.HfHubHTTPError)):
            huggingface_hub.hf_hub_download(
                repo_id, name, repo_type=repo_type, endpoint=hub.url, token=token or False, cache_dir=tmp_path / "c"
            )


def test_private_groups_never_go_into_a_repo_that_is_public(folders, hub, online):
    run(folders, hub, private=False)
    commits = len(hub.repos["dataset", "user/tiny-groups"].commits)
    (folders[1] / "README.md").write_text("changed")
    with pytest.raises(PublishError, match="user/tiny-groups exists and is public"):
        run(folders, hub)
    assert len(hub.repos["dataset", "user/tiny-groups"].commits) == commits


@pytest.mark.parametrize("secret", [TOKEN, "hf_" + "x" * 34], ids=["its own", "any"])
@pytest.mark.parametrize("where", ["config.json", "README.md", "../groups/README.md"])
def test_a_token_in_a_file_that_would_go_stops_everything(folders, hub, online, where, secret):
    file = (folders[0] / where).resolve()
    file.write_text(file.read_text() + f"\n<!-- {secret} -->")
    for dry_run in (True, False):
        with pytest.raises(PublishError, match="holds a Hub token") as error:
            run(folders, hub, dry_run=dry_run)
        assert file.name in str(error.value) and secret not in str(error.value)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("pattern", "status", "message"),
    [
        ("repos/create", 401, r"does not know the token \(401"),
        ("repos/create", 403, r"may not write to 'user' \(403"),
        ("repos/create", 500, r"has trouble \(500"),
        ("preupload", 403, r"may not write to 'user' \(403"),
        ("PUT /lfs/", 403, r"may not write to 'user' \(403"),
        ("GET /api/datasets", 404, r"no such repo or owner \(404"),
        ("commit/main", 412, r"changed while this upload ran \(412"),
        ("commit/main", 503, r"has trouble \(503"),
    ],
)
def test_what_the_hub_answers_becomes_one_line_without_the_token(
    folders, hub, online, caplog, pattern, status, message
):
    hub.failures[pattern] = status
    with caplog.at_level(logging.DEBUG), pytest.raises(PublishError, match=message) as error:
        run(folders, hub)
    assert "\n" not in str(error.value)
    assert "user/tiny-groups was not published" in str(error.value)
    assert TOKEN not in f"{error.value}{error.value.__cause__}{error.value.__context__}{caplog.text}"


def test_a_model_that_fails_after_the_dataset_says_what_is_done(folders, hub, online):
    hub.failures["api/models/user/tiny/commit/main"] = 503
    with pytest.raises(PublishError, match=r"model user/tiny was not published: .*user/tiny-groups is published alrea"):
        run(folders, hub)
    hub.failures.clear()
    assert [upload.changed for upload in run(folders, hub).uploads] == [False, True]


def test_an_unknown_token_and_another_owner_are_refused_by_name(folders, hub, online):
    with pytest.raises(PublishError, match="does not know the token"):
        run(folders, hub, token="hf_wrong")
    with pytest.raises(PublishError, match="may not write to 'else'"):
        run(folders, hub, dataset_id="else/groups")
    assert hub.repos == {}


def test_metadata_that_the_hub_refuses_is_named(folders, hub, online):
    (folders[0] / "README.md").write_text("---\nbase_model: /somewhere/else\n---\n")
    with pytest.raises(PublishError, match=r'user/tiny was not published: Invalid metadata.*"base_model"'):
        run(folders, hub)


def test_no_token_no_network_and_offline_mode_are_one_line_each(folders, hub, online, monkeypatch):
    with pytest.raises(PublishError, match="there is no Hub token: run `hf auth login`"):
        run(folders, hub, token=None)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(PublishError, match="cannot be reached"):
        run(folders, hub, endpoint=f"http://127.0.0.1:{port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PublishError, match="HF_HUB_OFFLINE is set"):
        run(folders, hub)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "no configuration"),
        ("model.safetensors", "no safetensors weights"),
        ("tokenizer", "no tokenizer"),
    ],
)
def test_a_model_that_nobody_could_load_is_not_published(folders, hub, missing, message):
    for path in folders[0].glob(f"{missing}*"):
        path.unlink()
    with pytest.raises(PublishError, match=message):
        run(folders, hub, dry_run=True)


def test_unfinished_groups_are_not_published(folders, hub):
    (folders[1] / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="unfinished"):
        run(folders, hub, dry_run=True)


@pytest.mark.parametrize("name", ["tiny", "user/ti ny", "a/b/c", "/home/user/model", "user/-tiny"])
def test_a_repo_name_that_the_hub_cannot_have_is_an_error(folders, hub, name):
    with pytest.raises(PublishError, match=re.escape(repr(name))) as error:
        run(folders, hub, model_id=name, dry_run=True)
    assert "\n" not in str(error.value)


def readers_see(hub: HubServer) -> dict[tuple[str, str], dict[str, bytes]]:
    """What lies on the main branch of every repo."""
    seen = {}
    for key in hub.repos:
        seen[key] = hub.files(*key)
        del seen[key][".gitattributes"]
    return seen


def test_what_is_uploaded_is_checked_on_a_branch_that_is_then_gone(folders, hub, online):
    run(folders, hub)
    assert [list(repo.refs) for repo in hub.repos.values()] == [["main"], ["main"]]
    paths = [path for _, path, _ in hub.requests]
    shown = [i for i, path in enumerate(paths) if path.endswith("/commit/main")]
    staged = [i for i, path in enumerate(paths) if path.endswith("/commit/lce-trainer-upload")]
    checked = [i for i, path in enumerate(paths) if path.endswith("/tree/lce-trainer-upload")]
    assert len(staged) == len(shown) == 2
    assert max(staged) < checked[-1] < min(shown), "both repos are on the Hub whole before one is shown"


@pytest.mark.parametrize("file", ["README.md", "groups/train.parquet", "model.safetensors"])
def test_bytes_that_the_hub_holds_otherwise_are_never_shown(folders, hub, online, file):
    hub.damaged = file
    with pytest.raises(PublishError, match=rf"was not published: the Hub holds other bytes .*{file}"):
        run(folders, hub)
    assert not any(readers_see(hub).values())
    hub.damaged = None
    assert all(upload.changed for upload in run(folders, hub).uploads)


def change(folders) -> None:
    """Another model, another dataset, and another card of both."""
    for folder in folders:
        (folder / "README.md").write_text((folder / "README.md").read_text() + "\nsecond\n")
    model = AutoModelForSequenceClassification.from_pretrained(folders[0])
    torch.nn.init.ones_(model.classifier.weight)
    model.save_pretrained(folders[0])
    table = datasets.Dataset.from_parquet(str(folders[1] / "train.parquet"))
    tables = {"train": datasets.concatenate_datasets([table, table])}
    save_artifact(folders[1], tables, kind="groups", config={}, inputs={}, counts={"groups": 2})


@pytest.mark.parametrize("first", [True, False], ids=["first upload", "later upload"])
@pytest.mark.parametrize("moment", range(10))
def test_a_cut_connection_shows_no_reader_half_and_a_rerun_completes_it(
    folders, hub, online, monkeypatch, moment, first
):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with HubServer(tokens={TOKEN: "user"}) as whole:  # how many requests there are, and what comes of them
        if not first:
            run(folders, whole)
            run(folders, hub)
        before = readers_see(hub)
        if not first:
            change(folders)
        asked = len(whole.requests)
        run(folders, whole)
        after, total = readers_see(whole), len(whole.requests) - asked
    hub.cut_at = round(moment * (total - 1) / 9)
    hub.cut_how = ("before", "during", "after")[moment % 3]
    with pytest.raises(PublishError) as error:
        run(folders, hub)
    assert "\n" not in str(error.value)
    for key, seen in readers_see(hub).items():
        assert seen in (before.get(key, {}), after[key])
    hub.cut_at = None
    arrived, asked = set(hub.large), len(hub.requests)
    run(folders, hub)
    assert readers_see(hub) == after
    assert [list(repo.refs) for repo in hub.repos.values()] == [["main"], ["main"]]
    sent = [path for command, path, _ in hub.requests[asked:] if command == "PUT"]
    assert len(sent) == len(set(hub.large) - arrived), "what had arrived is not sent again"
    assert [upload.changed for upload in run(folders, hub).uploads] == [False, False]


def test_a_commit_whose_answer_is_lost_counts_as_made(folders, hub, online):
    hub.lose_answer = "/commit/main"
    assert [upload.changed for upload in run(folders, hub).uploads] == [True, True]
    assert [upload.changed for upload in run(folders, hub).uploads] == [False, False]


def test_a_branch_can_be_published_to(folders, hub, online):
    published = run(folders, hub, revision="v2")
    assert not any(readers_see(hub).values())
    for upload in published.uploads:
        repo = hub.repos[upload.repo_type, upload.repo_id]
        assert set(repo.refs) == {"main", "v2"}
        assert set(upload.files) == set(repo.at("v2")[1]) - {".gitattributes"}
        assert upload.url.endswith(f"{upload.repo_id}/tree/v2") and upload.commit == repo.at("v2")[0]
    assert str(published).count("published to v2: ") == 2
    assert [upload.changed for upload in run(folders, hub, revision="v2").uploads] == [False, False]
    for name in ("refs/pr/1", "a b", ""):
        with pytest.raises(PublishError, match="--revision must be the name of a branch"):
            run(folders, hub, revision=name)


def test_a_pull_request_is_opened_once_and_by_whoever_may_read(folders, hub, online):
    run(folders, hub, private=False)
    before = readers_see(hub)
    change(folders)
    published = run(folders, hub, private=False, create_pr=True, token=READER)
    assert readers_see(hub) == before
    for upload in published.uploads:
        repo = hub.repos[upload.repo_type, upload.repo_id]
        (pull,) = repo.pulls
        assert (pull.author, pull.status) == ("someone-else", "open")
        assert upload.url.endswith(f"{upload.repo_id}/discussions/1") and upload.changed
        assert {name: len(blob.content) for name, blob in repo.at("refs/pr/1")[1].items() if name[0] != "."} == (
            upload.files
        )
    again = run(folders, hub, private=False, create_pr=True, token=READER)
    assert [upload.changed for upload in again.uploads] == [False, False]
    (folders[0] / "README.md").write_text("third")
    run(folders, hub, private=False, create_pr=True, token=READER)
    assert {len(repo.pulls) for repo in hub.repos.values()} == {1}
    assert hub.repos["model", "user/tiny"].at("refs/pr/1")[1]["README.md"].content == b"third"
    with pytest.raises(PublishError, match="exclude each other"):
        run(folders, hub, create_pr=True, revision="v2")


def test_a_pull_request_with_what_main_holds_already_is_not_opened(folders, hub, online):
    run(folders, hub)
    assert [upload.changed for upload in run(folders, hub, create_pr=True).uploads] == [False, False]
    assert not any(repo.pulls for repo in hub.repos.values())


def test_tables_of_an_earlier_publish_that_do_not_go_any_more_are_deleted(folders, hub, online):
    run(folders, hub)
    repo = hub.repos["dataset", "user/tiny-groups"]
    mine = {"passages/train.parquet": Blob(b"texts", lfs=True), "notes.md": Blob(b"the user's own", lfs=False)}
    repo.commit("by hand", {**repo.at("main")[1], **mine})
    run(folders, hub)
    assert set(hub.files("dataset", "user/tiny-groups")) == {".gitattributes", "notes.md", *GROUPS_FILES}


def test_a_dry_run_says_how_much_goes_where(folders, hub):
    for settings, where in (({}, ""), ({"revision": "v2"}, " to v2"), ({"create_pr": True}, " to a pull request")):
        listed = run(folders, hub, dry_run=True, token=None, **settings)
        text = str(listed)
        sizes = [size for upload in listed.uploads for size in upload.files.values()]
        assert text.endswith(f"\n{sum(sizes):,} bytes in all")
        assert text.count(f"bytes, would go{where} (dry run)") == 2
