import logging
from collections.abc import Iterator

import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from datasets import Dataset, concatenate_datasets
from torch.utils.data import DataLoader

from helpers.paths import TESTS
from helpers.ranks import run_on_two_ranks
from helpers.streams import RUN, USELESS, make_stream
from helpers.trainers import assert_same, make_groups, make_trainer, weights
from lce_trainer.errors import ConfigError, GroupsError, TrainingError
from lce_trainer.groups.schema import validate_groups
from lce_trainer.training.arguments import LCETrainingArguments
from lce_trainer.training.sampling import sample_group
from lce_trainer.training.streaming import StreamedGroups, usable_rows


def take(rows: StreamedGroups, n: int) -> list[tuple[str, int] | None]:
    """Query and epoch of the first rows."""
    taken = [row for _, row in zip(range(n), rows, strict=False)]
    return [row and (row["query_id"], row["epoch"]) for row in taken]


# ---- rows


def test_each_pass_is_an_epoch_in_whole_steps():
    rows = take(StreamedGroups(make_stream(5), batch=2, batches=2), 16)
    for epoch in (0, 1):
        assert rows[8 * epoch : 8 * epoch + 8] == [*((f"q{i}", epoch) for i in range(5)), None, None, None]
    dropped = take(StreamedGroups(make_stream(5), batch=2, batches=2, drop_last=True), 8)
    assert dropped == [(f"q{i}", epoch) for epoch in (0, 1) for i in range(4)]


def test_ranks_that_share_groups_take_the_same_rows():
    alone = take(StreamedGroups(make_stream(5), batch=2, batches=1), 12)
    for rank in range(2):
        shared = StreamedGroups(make_stream(5), batch=2, batches=1, copies=2)
        rows = IterableDatasetShard(shared, batch_size=2, num_processes=2, process_index=rank)
        assert take(rows, 12) == alone


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("shuffled", [False, True])
def test_workers_and_ranks_take_their_part_of_the_same_rows(workers, shuffled):
    stream = make_stream(7, shards=4 if shuffled else 1)
    if shuffled:
        stream = stream.shuffle(seed=3, buffer_size=4)
    alone = take(StreamedGroups(stream, batch=4, batches=2), 40)
    assert len({row[0] for row in alone[:7]}) == 7 and alone[7] is None
    assert ([row[0] for row in alone[:7]] != [row[0] for row in alone[8:15]]) == shuffled
    ranks = []
    for rank in range(2):
        rows = IterableDatasetShard(StreamedGroups(stream, 4, 2), batch_size=2, num_processes=2, process_index=rank)
        loader = DataLoader(rows, batch_size=2, num_workers=workers, collate_fn=list)
        ranks.append([batch for _, batch in zip(range(10), loader, strict=False)])
    joined = [
        row and (row["query_id"], row["epoch"]) for both in zip(*ranks, strict=True) for part in both for row in part
    ]
    assert joined == alone


def test_the_rows_count_what_is_dropped():
    rows = concatenate_datasets([Dataset.from_list(USELESS[:1]), make_groups(2), Dataset.from_list(USELESS)])
    counted = [
        row["stream_position"][:4]
        for _, row in zip(range(4), StreamedGroups(rows.to_iterable_dataset(), 1, 1), strict=False)
    ]
    assert counted == [(0, 2, 0, 1), (0, 6, 2, 2), (1, 2, 0, 1), (1, 6, 2, 2)]


def test_a_stream_takes_the_groups_that_validation_keeps():
    labels = [[3, 2, 1], [2, 2], [1, 1.5], [-1, 0], [1, 0], [0], [1], []]
    rows = [
        {"query_id": f"q{i}", "query": "red", "passages": list("abc"[: len(some)]), "labels": [float(x) for x in some]}
        for i, some in enumerate(labels)
    ]
    kept, counts = validate_groups(Dataset.from_list(rows))
    read = list(usable_rows(rows, 0))
    assert [row["query_id"] for row in read] == kept["query_id"][:] == ["q0", "q2", "q4"]
    assert read[-1]["stream_position"][1:4] == (8, counts["groups_without_positive"], counts["groups_without_negative"])


def test_labels_draw_as_those_of_a_dataset_do():
    row = {"query": "red fish", "passages": list("abcdef"), "labels": [0.7, 0.1, 0.0, 0.2, 0.3, 0.1]}
    (streamed,) = (row for row, _ in zip(StreamedGroups([row], 1, 1), range(1), strict=False))
    assert streamed["query_id"] == "red fish" and streamed["scores"] is None
    kept = validate_groups(Dataset.from_list([{**row, "query_id": "red fish"}]))[0][0]
    assert streamed["passages"] == kept["passages"] and streamed["labels"] == kept["labels"]
    for epoch in range(6):
        draws = [sample_group(1, epoch, group["query_id"], group["labels"], 2) for group in (streamed, kept)]
        assert draws[0] == draws[1]


def test_without_ids_a_stream_and_a_dataset_in_any_order_draw_alike():
    def ids(rows) -> dict[str, str]:
        return {row["query"]: row["query_id"] for row in rows}

    rows = make_groups(6).remove_columns("query_id")
    streamed = ids(usable_rows(rows.to_iterable_dataset(), 0))
    assert len(streamed) == len(set(streamed.values())) == 6
    assert ids(validate_groups(rows)[0]) == streamed
    assert ids(validate_groups(rows.shuffle(seed=1))[0]) == streamed
    assert ids(validate_groups(Dataset.from_list(list(rows)[::-1]))[0]) == streamed


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query_id": None, "query": "a", "passages": ["x"], "labels": [1]}, "row 1 of the stream: query_id is null"),
        ({"query": "a", "passages": ["x"]}, "row 1 of the stream has no labels; it has: query, passages"),
        ({"query": "a", "passages": ["x", "y"], "labels": [1]}, "row 1 of the stream: 1 labels for 2 passages"),
        ({"query": "a", "passages": ["x", "y"], "labels": [1, 0], "scores": [1]}, "1 scores for 2 passages"),
        ({"query": "a", "passages": ["x", None], "labels": [1, 0]}, "query and passages must be texts"),
        ({"query": "a", "passages": ["x", "y"], "labels": [1, None]}, "a label is not a finite number"),
        ({"query": "a", "passages": ["x", "y"], "labels": ["yes", "no"]}, "a label is not a finite number"),
    ],
)
def test_a_row_that_is_no_group_is_named(row, message):
    good = {"query": "b", "passages": ["x", "y"], "labels": [1, 0]}
    with pytest.raises(GroupsError, match=message):
        take(StreamedGroups([good, row], 1, 1), 2)


def test_a_stream_with_nothing_to_train_on_ends_in_an_error_and_not_in_a_loop():
    with pytest.raises(
        TrainingError, match="none of 3 groups of the stream is usable: 2 have no positive and 1 no neg"
    ):
        take(StreamedGroups(Dataset.from_list(USELESS).to_iterable_dataset(), 1, 1), 1)
    with pytest.raises(TrainingError, match="the stream gave no row on pass 2: it must start over"):
        take(StreamedGroups(iter(list(make_groups(2))), 1, 1), 3)
    with pytest.raises(TrainingError, match="less than one step of 4 groups"):
        take(StreamedGroups(make_stream(3), 4, 1, drop_last=True), 1)


# ---- training


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> dict[str, torch.Tensor]:
    """Weights after three epochs, in order, over a dataset of 11 groups in steps of 8."""
    folder = tmp_path_factory.mktemp("dataset")
    settings = {**RUN, "max_steps": -1, "num_train_epochs": 3, "train_sampling_strategy": "sequential"}
    trainer = make_trainer(folder, make_groups(11), **settings)
    trainer.train()
    assert trainer.state.global_step == 6
    return weights(trainer)


@pytest.mark.parametrize(
    "way",
    [
        {},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "micro_batch_size": 5},
        {"dataloader_num_workers": 2},
    ],
)
def test_a_stream_trains_as_the_dataset_does(way, straight, tmp_path):
    trainer = make_trainer(tmp_path, make_stream(), **{**RUN, **way})
    trainer.train()
    assert trainer.state.global_step == 6
    assert_same(weights(trainer), straight, 1e-6)


def test_groups_that_teach_nothing_are_skipped_counted_and_reported(straight, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="lce_trainer")
    parts = [Dataset.from_list(USELESS[:1]), make_groups(11).select(range(5)), Dataset.from_list(USELESS)]
    rows = concatenate_datasets([*parts, make_groups(11).select(range(5, 11))])
    trainer = make_trainer(tmp_path, rows.to_iterable_dataset(), **RUN)
    trainer.train()
    assert_same(weights(trainer), straight, 1e-6)
    lines = [record.getMessage() for record in caplog.records if "over the stream" in record.getMessage()]
    assert lines == [
        f"pass {i} over the stream: 15 groups read, 4 dropped: 2 without a positive, 2 without a negative"
        for i in (1, 2, 3)
    ]
    assert trainer.counts == {
        "groups_read": 15,
        "groups": 11,
        "groups_without_positive": 2,
        "groups_without_negative": 2,
    }


@pytest.mark.parametrize("at", [2, 3, 6])
def test_a_resumed_stream_ends_bit_equal_with_dropout_on(at, tmp_path):
    """At the end of the first pass, inside the second, and when it was over."""
    stream = make_stream(shards=3).shuffle(seed=5, buffer_size=6)
    run = {
        **RUN,
        "dropout": 0.1,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    whole = make_trainer(tmp_path / "run", stream, **run)
    whole.train()
    resumed = make_trainer(tmp_path / "run", stream, **run)
    torch.manual_seed(999)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{at}"))
    assert resumed.state.global_step == 6
    assert_same(weights(resumed), weights(whole), 0)


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
from helpers.streams import RUN, USELESS, make_stream
from helpers.trainers import make_groups, make_trainer, weights
from datasets import Dataset, concatenate_datasets
from lce_trainer.errors import TrainingError

out = Path({out!r})
run = dict(RUN, per_device_train_batch_size=2, save_strategy="steps", save_steps=3)
rows = concatenate_datasets([make_groups(11), Dataset.from_list(USELESS)])
trainer = make_trainer(out / "run", rows.to_iterable_dataset(), **run)
trainer.train()
after = weights(trainer)
resumed = make_trainer(out / "run", rows.to_iterable_dataset(), **run)
resumed.train(resume_from_checkpoint=str(out / "run" / "checkpoint-3"))
error = ""
try:
    make_trainer(out / "wrong", make_stream().shuffle(seed=trainer.args.process_index), **RUN).train()
except TrainingError as caught:
    error = str(caught)
if trainer.is_world_process_zero():
    torch.save(dict(after=after, resumed=weights(resumed), error=error, counts=trainer.counts,
                    ranks=trainer.args.world_size), out / "result.pt")
trainer.end()
"""


def test_two_ranks_train_and_resume_a_stream_as_one(straight, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(tests=str(TESTS), out=str(tmp_path)))
    done = run_on_two_ranks(script, {"ACCELERATE_USE_CPU": "true"})
    assert done.stderr.count("pass 1 over the stream: 14 groups read, 3 dropped") >= 1
    result = torch.load(tmp_path / "result.pt")
    assert result["ranks"] == 2
    assert_same(result["after"], straight, 1e-6)
    assert_same(result["resumed"], result["after"], 0)
    assert result["counts"]["groups_without_positive"] == 2 and result["counts"]["groups"] == 11
    assert "the ranks read different rows of the stream" in result["error"]


# ---- guards


@pytest.mark.parametrize("workers", [0, 2])
def test_queries_that_a_stream_shares_with_the_evaluation_are_reported_when_they_come(workers, tmp_path, caplog):
    rows = make_groups(11)
    dev = rows.select([5, 9]).map(lambda row: {"query": f" {row['query'].upper()} "})
    run = {**RUN, "dataloader_num_workers": workers, "gradient_accumulation_steps": 1}
    make_trainer(tmp_path, rows.to_iterable_dataset(), **run, eval_dataset={"dev": dev}).train()
    said = [record.getMessage() for record in caplog.records if "also evaluated on" in record.getMessage()]
    assert said == [
        "1 of the first 8 groups of the stream have queries that are also evaluated on, so those figures are too high"
    ]
    caplog.clear()
    make_trainer(tmp_path, rows.to_iterable_dataset(), **run, eval_dataset=make_groups(3, seed=5)).train()
    assert "also evaluated on" not in caplog.text


def test_a_score_that_is_infinite_is_an_error_where_a_stream_is_distilled_from(tmp_path):
    rows = [{**row, "scores": [0.1, None, float("inf"), 0.2]} for row in make_groups(1)]
    assert take(StreamedGroups(rows, 1, 1), 1) == [("q0", 0)]
    with pytest.raises(GroupsError, match="row 0 of the stream: a score is infinite: write null"):
        take(StreamedGroups(rows, 1, 1, distil=True), 1)
    endless = Dataset.from_list(rows).to_iterable_dataset()
    with pytest.raises(GroupsError, match="row 0 of the stream: a score is infinite"):
        make_trainer(tmp_path, endless, **RUN, distillation_weight=0.5).train()


def test_what_a_stream_cannot_do_is_an_error_before_the_first_step(tmp_path):
    with pytest.raises(TrainingError, match="has no length: set max_steps"):
        make_trainer(tmp_path, make_stream())
    with pytest.raises(TrainingError, match="save_strategy is epoch, but a streamed"):
        make_trainer(tmp_path, make_stream(), **RUN, save_strategy="epoch")
    with pytest.raises(GroupsError, match="missing: labels; there are: query_id, query, passages, scores"):
        make_trainer(tmp_path, make_stream().remove_columns("labels"), **RUN)
    with pytest.raises(TrainingError, match="no column scores"):
        make_trainer(tmp_path, make_stream().remove_columns("scores"), **RUN, distillation_weight=0.5)
    with pytest.raises(TrainingError, match=r"eval_dataset must be a datasets\.Dataset of groups, not IterableDataset"):
        make_trainer(tmp_path, make_stream(), **RUN, eval_dataset=make_stream())
    with pytest.raises(ConfigError, match="dispatch_batches and split_batches must be false"):
        LCETrainingArguments(str(tmp_path), accelerator_config={"dispatch_batches": True})


class Generated(torch.utils.data.IterableDataset):
    """A stream of torch's, which knows no columns."""

    def __iter__(self) -> Iterator[dict]:
        yield from make_groups(11)


def test_a_stream_of_torch_trains_and_is_evaluated_on_a_dataset(straight, tmp_path):
    trainer = make_trainer(tmp_path, Generated(), **RUN, eval_dataset=make_groups(3))
    trainer.train()
    assert_same(weights(trainer), straight, 1e-6)
    assert 0 <= trainer.evaluate()["eval_ndcg@10"] <= 1
