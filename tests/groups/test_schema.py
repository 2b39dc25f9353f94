import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from lce_trainer.artifacts import save_artifact
from lce_trainer.errors import GroupsError
from lce_trainer.groups.convert import load_groups
from lce_trainer.groups.schema import GROUPS_FEATURES, check_groups, validate_groups
from lce_trainer.training.sampling import sample_group


def rows(*groups: tuple[list[str], list[float]], **more: list) -> Dataset:
    return Dataset.from_dict(
        {"query": [f"query {i}" for i in range(len(groups))], "passages": [g[0] for g in groups],
         "labels": [g[1] for g in groups], **more}
    )  # fmt: skip


def test_passages_keep_their_order_and_their_scores():
    groups, counts = validate_groups(rows((["a", "b", "c"], [0.0, 2.0, 1.0]), scores=[[0.1, 0.2, 0.3]]))
    assert groups[0]["passages"] == ["a", "b", "c"]
    assert groups[0]["labels"] == [0.0, 2.0, 1.0]
    np.testing.assert_allclose(groups[0]["scores"], [0.1, 0.2, 0.3], rtol=1e-6)
    assert counts["groups"] == 1


def test_rows_without_scores_stay_null_when_others_have_them():
    groups, _ = validate_groups(
        rows((["a", "b"], [0, 1]), (["c", "d"], [0, 1]), (["e", "f"], [1, 0]), scores=[[1.0, 2.0], None, [3.0, 4.0]])
    )
    assert groups["scores"][:] == [[1.0, 2.0], None, [3.0, 4.0]]


def test_groups_that_teach_nothing_are_dropped_and_counted():
    groups, counts = validate_groups(
        rows((["a", "b"], [1, 0]), (["a"], [1]), (["a", "b"], [0, 0]), ([], []), (["a", "b"], [1, 1]))
    )
    assert len(groups) == 1
    assert counts == {"groups_read": 5, "groups": 1, "groups_without_positive": 2, "groups_without_negative": 2}


def test_a_lower_grade_is_negative_enough():
    table = rows((["a", "b", "c"], [3, 2, 1]), (["a", "b"], [2, 2]), (["a", "b"], [1, 1.5]), (["a", "b"], [-1, 0]))
    groups, counts = validate_groups(table)
    assert groups["labels"][:] == [[3, 2, 1], [1, 1.5]]
    assert counts == {"groups_read": 4, "groups": 2, "groups_without_positive": 1, "groups_without_negative": 1}
    for row in groups:
        assert sample_group(0, 0, row["query_id"], row["labels"], 3)[1]
    for row in table.select([1, 3]):
        with pytest.raises(GroupsError):
            sample_group(0, 0, "q", row["labels"], 3)


def test_the_result_has_exactly_the_schema():
    groups, _ = validate_groups(rows((["a", "b"], [1, 0]), source=["extra"]))
    assert groups.features == GROUPS_FEATURES


def test_a_selection_of_rows_is_validated_not_the_whole_table():
    table = rows((["a", "b"], [1, 0]), (["c", "d"], [1, 0])).select([1])
    groups, counts = validate_groups(table)
    assert groups[0]["passages"] == ["c", "d"]
    assert counts["groups_read"] == 1


def test_a_check_keeps_every_row_and_its_order():
    table = rows((["a", "b"], [0, 1]), (["a", "b"], [0, 0]), ([], []), source=["x", "y", "z"])
    checked = check_groups(table)
    assert checked["labels"][:] == [[0, 1], [0, 0], []] and checked["passages"][:] == table["passages"][:]
    assert checked.features == GROUPS_FEATURES
    assert checked["passage_ids"][:] == [["q0-0", "q0-1"], ["q1-0", "q1-1"], []]
    assert checked["query_id"][:] == ["query 0", "query 1", "query 2"]
    assert len(check_groups(table.select([]))) == 0


def test_checked_and_validated_groups_stay_on_disk(tmp_path):
    n = 20_000
    groups = Dataset.from_dict(
        {"query": ["q"] * n, "passages": [["a" * 500, "b" * 500]] * n, "labels": [[0.0, 1.0]] * (n - 1) + [[1.0, 1.0]]}
    )
    groups.to_parquet(tmp_path / "groups.parquet")
    mapped = Dataset.from_parquet(str(tmp_path / "groups.parquet"), cache_dir=str(tmp_path / "cache"))
    before = pa.total_allocated_bytes()
    kept, counts = validate_groups(mapped)
    assert counts["groups_without_negative"] == 1 and len(kept) == n - 1
    drawn, _ = validate_groups(mapped.select(np.arange(n)[::-2]))
    assert len(drawn) == n // 2 - 1
    assert pa.total_allocated_bytes() - before < 5e6  # of 20 MB of text
    assert not list((tmp_path / "cache").rglob("cache-*"))  # nor is a copy of it written


def test_more_text_than_one_arrow_array_can_address_is_validated_where_it_lies():
    chunk = pa.table({"query": ["q"] * 8, "passages": [["a" * (4 << 20), "b"]] * 8, "labels": [[0.0, 1.0]] * 8})
    huge = Dataset(pa.concat_tables([chunk] * 70), fingerprint="huge")  # 2.3 GB, of which all but 34 MB are repeats
    before = pa.total_allocated_bytes()
    groups, counts = validate_groups(huge)
    assert counts["groups"] == len(groups) == 560
    assert groups[559]["passages"][1] == "b" and groups[559]["labels"] == [0, 1]
    assert pa.total_allocated_bytes() - before < 5e6


def test_what_a_selection_leaves_out_may_be_bad_and_what_it_takes_is_numbered_as_it_does():
    table = rows((["a", None], [1, 0]), (["a", "b"], [1, 0]), (["a"], [1, 0]), (["c", "d"], [0, 1]))
    groups, _ = validate_groups(table.select([3, 1]))
    assert groups["passages"][:] == [["c", "d"], ["a", "b"]] and groups["labels"][:] == [[0, 1], [1, 0]]
    assert check_groups(table.select([3, 1]))["passages"][:] == [["c", "d"], ["a", "b"]]
    with pytest.raises(GroupsError, match="row 1: passages holds a null"):
        validate_groups(table.select([1, 0]))
    with pytest.raises(GroupsError, match="row 0: 2 labels for 1 passages"):
        validate_groups(table.select([2, 3]))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (Dataset.from_dict({"query": ["q"], "passages": [["a"]]}), "missing: labels"),
        (rows((["a", "b"], [1, 0]), (["a", "b"], [1])), "row 1: 1 labels for 2 passages"),
        (rows((["a", None], [1, 0])), "row 0: passages holds a null"),
        (rows((["a", "b"], [1, 0]), query_id=[None]), "row 0: query_id is null"),
        (
            Dataset.from_dict({"query": ["q", None], "passages": [["a"]] * 2, "labels": [[1]] * 2}),
            "row 1: query is null",
        ),
        (rows((["a", "b"], [1, 0]), scores=[[0.5]]), "row 0: 1 scores for 2 passages"),
        (Dataset.from_dict({"query": ["q"], "passages": ["a"], "labels": [[1.0]]}), "column 'passages' must be"),
        (
            rows((["a", "b"], [1, 0]), ([], []), (["a", "b"], [1, float("nan")])),
            "row 2: a label is not a finite number",
        ),
        (rows((["a"], [1]), ([], []), (["b", None], [1, 0])), "row 2: passages holds a null"),
    ],
)
def test_a_bad_row_is_named(table, message):
    with pytest.raises(GroupsError, match=f"^(groups need.*)?{message}"):
        validate_groups(table)
    with pytest.raises(GroupsError, match=f"^dev: (groups need.*)?{message}"):
        check_groups(table, "dev")


def test_saved_groups_load_back(tmp_path):
    groups, counts = validate_groups(rows((["a", "b"], [1, 0])))
    save_artifact(tmp_path / "groups", {"train": groups}, kind="groups", config={}, inputs={}, counts=counts)
    assert load_groups(str(tmp_path / "groups")).to_list() == groups.to_list()


def test_no_groups_is_a_clear_error(tmp_path):
    with pytest.raises(GroupsError, match="no groups at"):
        load_groups(str(tmp_path / "nothing"))
