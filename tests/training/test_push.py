"""``push_to_hub`` of transformers, through our trainer, against a server that speaks the Hub's protocol."""

import json

import pytest
from safetensors.torch import load

from helpers.hub_client import TOKEN, client
from helpers.hub_server import HubServer
from helpers.paths import TESTS
from helpers.ranks import TORCHRUN
from helpers.sharded import FSDP, KINDS
from helpers.tiny_models import tiny_model
from lce_trainer.artifacts import MANIFEST

TRAIN = """
import os, sys
from pathlib import Path

token = os.environ.pop("TOKEN_OF_THE_TEST")
os.environ["HF_HUB_OFFLINE"] = "0"  # or the tests would switch it on
sys.path.insert(0, {tests!r})
from helpers.trainers import make_groups, make_trainer

for strategy in ("end", "every_save", "checkpoint", "all_checkpoints"):
    trainer = make_trainer(
        Path({out!r}) / strategy,
        make_groups(8),
        per_device_train_batch_size=4,
        save_strategy="steps",
        save_steps=1,
        push_to_hub=True,
        hub_strategy=strategy,
        hub_model_id=f"user/{{strategy}}",
        hub_token=token,
        hub_private_repo=True,
        hub_always_push=True,
        report_to="tensorboard",
    )
    trainer.train()
    trainer.push_to_hub()
"""

ANSWERS = """
tokenizer = tiny_tokenizer("qwen3")
tokenizer.chat_template = ASKING
trainer = make_trainer(
    "qwen3", Path({out!r}) / "answers", tiny_language_model("qwen3"), tokenizer, yes_no=True,
    per_device_train_batch_size=3, save_strategy="steps", save_steps=1,
    push_to_hub=True, hub_strategy="every_save", hub_model_id="user/answers", hub_token=token,
)
trainer.train()
"""

SHARDED = """
trainer = make_trainer(
    "bert", Path({out!r}) / "parts", per_device_train_batch_size=1, save_strategy="steps", save_steps=2,
    push_to_hub=True, hub_strategy="every_save", hub_model_id="user/parts", hub_token=token,
)
trainer.train()
trainer._finish_current_push()
trainer.save_model()  # pushes, too
trainer.end()
"""

OTHERS = """
import os, sys
from pathlib import Path

token = os.environ.pop("TOKEN_OF_THE_TEST")
os.environ["HF_HUB_OFFLINE"] = "0"  # or the tests would switch it on
sys.path.insert(0, {tests!r})
from helpers.backbones import make_trainer
from helpers.tiny_models import ASKING
from helpers.tiny_models import tiny_language_model, tiny_tokenizer
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """The server after a run under each strategy, and the folder the runs wrote to."""
    out = tmp_path_factory.mktemp("pushed")
    with HubServer(tokens={TOKEN: "user"}) as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKEN_OF_THE_TEST", TOKEN)
        done = client(hub, out / "home", None, TRAIN.format(tests=str(TESTS), out=str(out / "runs")))
        assert done.returncode == 0, done.stderr[-3000:]
        assert TOKEN not in done.stdout + done.stderr
        yield hub, out


def test_the_token_is_in_no_file_and_in_no_uploaded_byte(pushed):
    hub, out = pushed
    written = [file for file in out.rglob("*") if file.is_file()]
    assert any(file.name == "optimizer.pt" for file in written)
    assert any("tfevents" in file.name for file in written)
    assert not [file for file in written if TOKEN.encode() in file.read_bytes()]
    contents = [content for repo in hub.repos.values() for commit in repo.commits for content in commit[2].values()]
    assert len(contents) > 30
    assert not [blob for blob in contents if TOKEN.encode() in blob.content]
    assert not [content for content in hub.large.values() if TOKEN.encode() in content]


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_what_is_pushed_is_a_private_reranker(pushed, strategy):
    hub, _ = pushed
    files = hub.files("model", f"user/{strategy}")
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "training_args.json"} <= files.keys()
    assert json.loads(files["config.json"])["architectures"] == ["BertForSequenceClassification"]
    assert json.loads(files["training_args.json"])["hub_model_id"] == f"user/{strategy}"
    assert hub.repos["model", f"user/{strategy}"].private


def test_each_strategy_pushes_when_it_says(pushed):
    hub, _ = pushed
    strategies = ("end", "every_save", "checkpoint", "all_checkpoints")
    messages = {name: [message for _, message, _ in hub.repos["model", f"user/{name}"].commits] for name in strategies}
    during = {name: sum(text.startswith("Training in progress") for text in messages[name]) for name in messages}
    # Uploads run beside the training, and one that finds its files gone through already makes no commit.
    assert during["end"] == 0 and min(during[name] for name in strategies[1:]) >= 1
    for name, folders in (("checkpoint", ["last-checkpoint"]), ("all_checkpoints", ["checkpoint-1", "checkpoint-2"])):
        files = hub.files("model", f"user/{name}")
        for folder in folders:  # sealed, so that a run can go on from it
            sealed = json.loads(files[f"{folder}/{MANIFEST}"])["files"]
            assert "optimizer.pt" in sealed and {f"{folder}/{file}" for file in sealed} <= files.keys()
    # transformers pickles its arguments where it pushes in the middle of a run, and nowhere else.
    assert "training_args.bin" not in hub.files("model", "user/end")


def in_progress(hub: HubServer, name: str) -> list[dict[str, bytes]]:
    """Files of the commits that were made while a run went on."""
    commits = hub.repos["model", f"user/{name}"].commits
    return [
        {path: blob.content for path, blob in files.items()}
        for _, message, files in commits
        if message.startswith("Training in progress")
    ]


def test_what_is_pushed_in_the_middle_of_a_run_tells_how_a_yes_or_no_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN_OF_THE_TEST", TOKEN)
    names = {"tests": str(TESTS), "out": str(tmp_path)}
    with HubServer(tokens={TOKEN: "user"}) as hub:
        done = client(hub, tmp_path / "home", None, (OTHERS + ANSWERS).format(**names))
        assert done.returncode == 0, done.stderr[-3000:]
        pushed = in_progress(hub, "answers")
    assert pushed
    for files in pushed:
        assert {"modules.json", "1_LogitScore/config.json", "model.safetensors", "tokenizer.json"} <= files.keys()


def test_weights_that_are_in_parts_are_pushed_whole(tmp_path, monkeypatch):
    """Two processes share a model by FSDP2, and their checkpoints are in parts."""
    monkeypatch.setenv("TOKEN_OF_THE_TEST", TOKEN)
    for name, value in {**FSDP, **KINDS["fsdp2 with sharded checkpoints"]}.items():
        monkeypatch.setenv(name, value)
    script = tmp_path / "run.py"
    script.write_text((OTHERS + SHARDED).format(tests=str(TESTS), out=str(tmp_path)))
    launch = "import runpy; runpy.run_module('torch.distributed.run', run_name='__main__', alter_sys=True)"
    with HubServer(tokens={TOKEN: "user"}) as hub:
        done = client(hub, tmp_path / "home", None, launch, *TORCHRUN, str(script))
        assert done.returncode == 0, done.stderr[-3000:]
        during, after = in_progress(hub, "parts"), hub.files("model", "user/parts")
    names = tiny_model("bert").state_dict().keys()
    saved = (tmp_path / "parts" / "model.safetensors").read_bytes()
    assert during and all(load(files["model.safetensors"]).keys() == names for files in during)
    assert load(after["model.safetensors"]).keys() == names and after["model.safetensors"] == saved
    assert not list((tmp_path / "parts").glob("checkpoint-*/model.safetensors"))
