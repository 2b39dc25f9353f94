import gzip
import json
import logging
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk

from helpers.groups import content
from helpers.tiny import WORDS, build_tokenizer
from lce_trainer.errors import GroupsError
from lce_trainer.groups import pairs as pairs_module
from lce_trainer.groups.convert import load_groups, to_groups
from lce_trainer.groups.schema import GROUPS_FEATURES, validate_groups
from lce_trainer.training.loss import lce_loss


def write_lines(path: Path, rows: list[dict]) -> Path:
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


CAPITALS = {"capital of France": (["Paris"], ["Lyon", "Nice"]), "capital of Peru": (["Lima"], ["Cusco", "Puno"])}

LAYOUTS = {
    "triplets": {
        "anchor": ["capital of France", "capital of France", "capital of Peru", "capital of Peru"],
        "positive": ["Paris", "Paris", "Lima", "Lima"],
        "negative": ["Lyon", "Nice", "Cusco", "Puno"],
    },
    "n-tuples": {
        "question": ["capital of France", "capital of Peru"],
        "answer": ["Paris", "Lima"],
        "negative_1": ["Lyon", "Cusco"],
        "negative_2": ["Nice", "Puno"],
    },
    "labeled pairs": {
        "sentence1": ["capital of France"] * 3 + ["capital of Peru"] * 3,
        "sentence2": ["Lyon", "Paris", "Nice", "Lima", "Cusco", "Puno"],
        "label": [0, 1, 0, 1, 0, 0],
    },
    "labeled lists": {
        "query": ["capital of France", "capital of Peru"],
        "docs": [["Lyon", "Nice", "Paris"], ["Lima", "Cusco", "Puno"]],
        "labels": [[0, 0, 1], [1, 0, 0]],
    },
    "FlagEmbedding": {
        "query": ["capital of France", "capital of Peru"],
        "pos": [["Paris"], ["Lima"]],
        "neg": [["Lyon", "Nice"], ["Cusco", "Puno"]],
        "prompt": ["Is B the capital of A?"] * 2,
    },
    "luyug/Reranker": {
        "qry": [{"qid": "7", "query": "capital of France"}, {"qid": "9", "query": "capital of Peru"}],
        "pos": [[{"pid": "p", "passage": "Paris"}], [{"pid": "l", "passage": "Lima"}]],
        "neg": [
            [{"pid": "y", "passage": "Lyon"}, {"pid": "n", "passage": "Nice"}],
            [{"pid": "c", "passage": "Cusco"}, {"pid": "u", "passage": "Puno"}],
        ],
    },
    "luyug/Reranker, plain texts": {
        "qry": ["capital of France", "capital of Peru"],
        "pos": [["Paris"], ["Lima"]],
        "neg": [["Lyon", "Nice"], ["Cusco", "Puno"]],
    },
    "Tevatron": {
        "query_id": ["7", "9"],
        "query": ["capital of France", "capital of Peru"],
        "positive_passages": [[{"docid": "p", "title": "", "text": "Paris"}], [{"docid": "l", "text": "Lima"}]],
        "negative_passages": [
            [{"docid": "y", "title": None, "text": "Lyon"}, {"docid": "n", "text": "Nice"}],
            [{"docid": "c", "text": "Cusco"}, {"docid": "u", "text": "Puno"}],
        ],
    },
}


# ---- rows


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_says_the_same(layout):
    groups, counts = to_groups(Dataset.from_dict(LAYOUTS[layout]))
    assert content(groups) == CAPITALS
    assert groups.features == GROUPS_FEATURES
    assert all(row["labels"] == [1, 0, 0] and row["scores"] is None for row in groups)
    assert counts["groups"] == 2 and counts["groups_without_negative"] == 0
    assert validate_groups(groups)[0].to_list() == groups.to_list()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ending", ["jsonl", "json", "jsonl.gz", "parquet"])
def test_every_layout_reads_from_a_file(layout, ending, tmp_path):
    rows = Dataset.from_dict(LAYOUTS[layout])
    file = tmp_path / f"train.{ending}"
    if ending == "parquet":
        rows.to_parquet(file)
    elif ending == "json":
        file.write_text(json.dumps(rows.to_list()))
    else:
        write_lines(file, rows.to_list())
    assert content(load_groups(str(file))) == CAPITALS


def test_tables_of_text_read_from_csv_tsv_and_a_saved_folder(tmp_path):
    rows = Dataset.from_dict({**LAYOUTS["n-tuples"], "question": ['capital, or "seat", of France', "capital of\nPeru"]})
    rows.to_csv(tmp_path / "a.csv", index=False)
    rows.to_csv(tmp_path / "b.tsv", index=False, sep="\t")
    rows.save_to_disk(str(tmp_path / "c"))
    assert load_from_disk(str(tmp_path / "c")).num_rows == 2
    for name in ("a.csv", "b.tsv", "c"):
        assert list(content(load_groups(str(tmp_path / name)))) == rows["question"][:]


def test_ids_are_kept_and_made_up_where_there_are_none():
    named, _ = to_groups(Dataset.from_dict(LAYOUTS["luyug/Reranker"]))
    assert named["query_id"][:] == ["7", "9"]
    assert named["passage_ids"][:] == [["p", "y", "n"], ["l", "c", "u"]]
    made_up, _ = to_groups(Dataset.from_dict(LAYOUTS["triplets"]))
    assert made_up["query_id"][:] == ["q0", "q1"]
    ids = [name for row in made_up["passage_ids"] for name in row]
    assert len(set(ids)) == 6
    shared, _ = to_groups(
        Dataset.from_dict({"query_id": [5, None], "query": ["a", "b"], "positive": ["x", "y"], "negative": ["z", "z"]})
    )
    assert shared["query_id"][:] == ["5", "q1"]
    assert shared[0]["passage_ids"][1] == shared[1]["passage_ids"][1]


def test_rows_of_one_query_unite_and_a_positive_anywhere_is_never_a_negative():
    rows = {
        "query": ["a", "b", "a", "a"],
        "pos": [["x"], ["k"], ["y", "x"], ["x"]],
        "neg": [["y", "n", "m"], ["l"], ["m", "o"], []],
    }
    groups, counts = to_groups(Dataset.from_dict(rows))
    assert content(groups) == {"a": (["x", "y"], ["n", "m", "o"]), "b": (["k"], ["l"])}
    assert counts["negatives_also_positive"] == 1 and counts["pairs_repeated"] == 4
    assert counts["groups_read"] == 2


def test_the_highest_grade_of_a_pair_counts():
    rows = {"query": ["a"] * 4, "passage": ["x", "y", "x", "n"], "label": [1.0, 2.0, 3.0, 0.0]}
    groups, _ = to_groups(Dataset.from_dict(rows))
    assert groups[0]["passages"] == ["x", "y", "n"] and groups[0]["labels"] == [3, 2, 0]


def test_what_teaches_nothing_is_left_out_and_counted_and_said(caplog):
    rows = {
        "query": ["a", "b", "c", " ", "d"],
        "pos": [["x"], ["x"], [], ["x"], [""]],
        "neg": [["n"], [], ["n"], ["n"], ["n"]],
    }
    groups, counts = to_groups(Dataset.from_dict(rows))
    assert groups["query"][:] == ["a"]
    assert counts["pairs_empty"] == 3
    assert (counts["groups_read"], counts["groups_without_negative"], counts["groups_without_positive"]) == (5, 1, 3)
    assert "groups without negative 1" in caplog.text
    assert caplog.records[-1].levelno == logging.WARNING


def test_flag_embeddings_scores_are_the_teachers():
    rows = [
        {"query": "a", "pos": ["x"], "neg": ["n", "m"], "pos_scores": [9], "neg_scores": [1.5, 2]},
        {"query": "b", "pos": ["x"], "neg": ["n"], "pos_scores": None, "neg_scores": None},
        {"query": "a", "pos": ["y"], "neg": [], "pos_scores": None, "neg_scores": None},
    ]
    groups, _ = to_groups(Dataset.from_list(rows))
    assert groups["passages"][:] == [["x", "y", "n", "m"], ["x", "n"]]
    assert groups["scores"][:] == [[9.0, None, 1.5, 2.0], None]
    with pytest.raises(GroupsError, match="row 0: 1 neg_scores for 2 of neg"):
        to_groups(Dataset.from_list([{**rows[0], "neg_scores": [1.0]}]))


def test_fields_that_only_later_lines_have_are_read(tmp_path):
    rows = [{"query": f"q{i} {'x' * 1000}", "pos": ["p"], "neg": []} for i in range(20_000)]
    rows.append({"query": "z", "pos": ["p"], "neg": ["n"], "pos_scores": [2.0], "neg_scores": [1.0]})
    groups, _ = to_groups(write_lines(tmp_path / "a.jsonl", rows))
    assert groups.to_list()[0]["scores"] == [2.0, 1.0]
    write_lines(tmp_path / "long.jsonl", [{"query": "q", "pos": ["p"], "neg": ["n" * (40 << 20)]}])
    assert len(to_groups(tmp_path / "long.jsonl")[0][0]["passages"][1]) == 40 << 20


def test_token_ids_become_texts_with_their_tokenizer():
    tokenizer = build_tokenizer()
    ids = {word: tokenizer.encode(word, add_special_tokens=False) for word in ("red fish", "blue bird", "green tree")}
    rows = [
        {
            "qry": {"qid": "1", "query": ids["red fish"]},
            "pos": [{"pid": "2", "passage": ids["blue bird"]}],
            "neg": [{"pid": "3", "passage": ids["green tree"]}],
        }
    ]
    groups, _ = to_groups(Dataset.from_list(rows), tokenizer=tokenizer)
    assert content(groups) == {"red fish": (["blue bird"], ["green tree"])}
    with pytest.raises(GroupsError, match=r"pos\.passage holds token ids; pass the tokenizer"):
        to_groups(Dataset.from_list(rows))


def test_columns_under_any_names_are_read_in_order():
    nli = {"source": ["s"], "premise": ["a"], "hypothesis": ["x"], "contradiction": ["n"]}
    groups, _ = to_groups(Dataset.from_dict(nli), columns=("premise", "hypothesis", "contradiction"))
    assert content(groups) == {"a": (["x"], ["n"])}
    graded = {"text": ["x", "n"], "rel": [2, 0], "q": ["a", "a"]}
    groups, _ = to_groups(Dataset.from_dict(graded), columns=("q", "text", "rel"))
    assert content(groups) == {"a": (["x"], ["n"])}
    lists = {"good": [["x"]], "bad": [["n"]], "q": ["a"]}
    assert content(to_groups(Dataset.from_dict(lists), columns=("q", "good", "bad"))[0]) == {"a": (["x"], ["n"])}
    with pytest.raises(GroupsError, match="no column text2; there are: text, rel, q"):
        to_groups(Dataset.from_dict(graded), columns=("q", "text2", "rel"))


def test_scores_alone_need_a_threshold_and_become_the_teachers():
    pairs = Dataset.from_dict({"query": ["a", "a"], "passage": ["x", "n"], "score": [0.9, 0.2]})
    with pytest.raises(GroupsError, match=r"score holds numbers from 0\.2 to 0\.9.*set positive_from="):
        to_groups(pairs)
    groups, _ = to_groups(pairs, positive_from=0.5)
    assert groups[0]["labels"] == [1, 0]
    np.testing.assert_allclose(groups[0]["scores"], [0.9, 0.2], rtol=1e-6)
    groups, _ = to_groups(Dataset.from_dict({"query": ["a", "a"], "passage": ["x", "n"], "score": [1.0, 0.0]}))
    assert groups[0]["labels"] == [1, 0] and groups[0]["scores"] is None


def test_lower_grades_than_the_threshold_are_negatives():
    pairs = Dataset.from_dict({"query": ["a"] * 3, "passage": ["x", "y", "n"], "label": [3, 1, 0]})
    groups, _ = to_groups(pairs, positive_from=2)
    assert groups[0]["labels"] == [3, 0, 0]


def test_grades_that_are_all_positive_make_a_group_unless_they_are_one():
    pairs = Dataset.from_dict({"query": ["a", "a", "b", "b"], "passage": ["x", "y", "x", "y"], "label": [1, 3, 2, 2]})
    groups, counts = to_groups(pairs)
    assert groups["query"][:] == ["a"] and groups["labels"][:] == [[1, 3]]
    assert counts["groups_without_negative"] == 1 and counts["groups_without_positive"] == 0


def test_groups_of_ours_merge_too_and_keep_what_they_say():
    rows = {
        "query_id": ["1", "2"], "query": ["a", "a"], "passage_ids": [["x", "n"], ["y", "m"]],
        "passages": [["X", "N"], ["Y", "M"]],
        "labels": [[1.0, 0.0], [2.0, 0.0]], "scores": [[0.5, 0.25], None], "note": ["new", "newer"],
    }  # fmt: skip
    groups, _ = to_groups(Dataset.from_dict(rows))
    assert groups.to_list() == [
        {"query_id": "1", "query": "a", "passage_ids": ["x", "y", "n", "m"], "passages": ["X", "Y", "N", "M"],
         "labels": [1, 2, 0, 0], "scores": [0.5, None, 0.25, None]}
    ]  # fmt: skip


def test_a_selection_and_a_transform_of_rows_are_honoured():
    rows = Dataset.from_dict({"id": [0, 1]})
    texts = [("a", "x", "n"), ("b", "y", "m")]

    def look_up(batch: dict) -> dict:
        return {name: [texts[i][j] for i in batch["id"]] for j, name in enumerate(("query", "positive", "negative"))}

    assert content(to_groups(rows.with_transform(look_up).select([1]))[0]) == {"b": (["y"], ["m"])}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"query": ["a"], "answer": ["x"]}, "pairs without labels hold no negatives: query"),
        ({"a": ["a"], "b": ["x"], "c": ["n"]}, r"cannot tell what these columns hold: a \(string\), b \(string\)"),
        ({"anchor": ["a"], "positive": ["x"], "negative": ["n"], "label": [0.3]}, "cannot tell"),
        ({"anchor": ["a"], "positive": ["x"], "negative": ["n"], "source": ["web"]}, "cannot tell"),
        ({"query": ["a"], "n": [1]}, "cannot tell"),
        ({"query": ["a", "a"], "passage": ["x", "n"], "label": [1, None]}, "label: row 1 is not a finite number"),
        ({"query": ["a"], "docs": [["x", "n"]], "labels": [[1]]}, "row 0: 1 labels for 2 of docs"),
        ({"query": ["a"], "docs": [["x", "n"]], "labels": [[1, None]]}, "row 0: labels holds what is not a finite"),
        ({"anchor": ["a"], "positive": ["x"], "negative": ["n"], "scores": [[1.0]]}, "row 0: 1 scores for 2 of"),
        ({"query": ["a"], "pos": [[{"id": 1}]], "neg": [["n"]]}, "pos holds objects without text"),
    ],
)
def test_what_is_not_understood_is_an_error_that_says_what_is(columns, message):
    with pytest.raises(GroupsError, match=message) as error:
        to_groups(Dataset.from_dict(columns))
    if "tell" in message or "pairs" in message:
        assert "FlagEmbedding" in str(error.value) and "qrels=" in str(error.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"query": "a"}\n{"query": \n')
    with pytest.raises(GroupsError, match=r"bad\.jsonl, line 2 is not JSON"):
        to_groups(tmp_path / "bad.jsonl")
    (tmp_path / "a.xlsx").write_text("")
    with pytest.raises(GroupsError, match=r"a\.xlsx must end in \.jsonl"):
        to_groups(tmp_path / "a.xlsx")
    with pytest.raises(GroupsError, match="no groups at"):
        to_groups(tmp_path / "nothing")
    with pytest.raises(GroupsError, match="pass one split of train, test"):
        to_groups({"train": None, "test": None})


# ---- sentence-transformers itself


@pytest.fixture(scope="module")
def mined():
    """What its own miner writes, by output format, with and without scores."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from sentence_transformers.util import mine_hard_negatives

    model = SentenceTransformer(modules=[StaticEmbedding(build_tokenizer(), embedding_dim=8)], device="cpu")
    pairs = Dataset.from_dict(
        {"question": [f"what is {word}" for word in WORDS[:12]], "answer": [f"the {word} of" for word in WORDS[:12]]}
    )
    settings = {"num_negatives": 2, "verbose": False}
    return {
        (form, scores): mine_hard_negatives(pairs, model, output_format=form, output_scores=scores, **settings)
        for form in ("triplet", "n-tuple", "labeled-pair", "labeled-list")
        for scores in (False, True)
    }


def test_what_sentence_transformers_mines_is_read_alike_in_all_its_formats(mined):
    wanted = content(to_groups(mined["n-tuple", False])[0])
    assert len(wanted) == 12 and all(len(good) == 1 and len(bad) == 2 for good, bad in wanted.values())
    for form in ("triplet", "labeled-pair", "labeled-list"):
        assert content(to_groups(mined[form, False])[0]) == wanted, form
    for form in ("triplet", "n-tuple"):
        scored, _ = to_groups(mined[form, True])
        assert content(scored) == wanted
        assert all(row["scores"] is not None and None not in row["scores"] for row in scored)
    for form in ("labeled-pair", "labeled-list"):
        with pytest.raises(GroupsError, match="set positive_from="):
            to_groups(mined[form, True])


def test_its_own_loss_of_a_tuple_is_that_of_our_group(mined, tiny_reranker):
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder.data_collator import CrossEncoderDataCollator
    from sentence_transformers.cross_encoder.losses import MultipleNegativesRankingLoss

    model = CrossEncoder(str(tiny_reranker), device="cpu")
    loss = MultipleNegativesRankingLoss(model, num_negatives=None, scale=1.0, activation_fn=torch.nn.Identity())
    rows = list(mined["n-tuple", False].select([3]))
    theirs = loss(list(CrossEncoderDataCollator(preprocess_fn=model.preprocess)(rows).values()), None)
    (group,) = to_groups(Dataset.from_list(rows))[0]
    pairs = [(group["query"], text) for text in group["passages"]]
    scores = model.predict(pairs, activation_fn=torch.nn.Identity(), convert_to_tensor=True)
    ours = lce_loss(scores[None], torch.tensor([0]), torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)


# ---- size


def test_200_000_triplets_take_seconds_and_chunks_stay_addressable(monkeypatch):
    n = 200_000
    rows = Dataset.from_dict(
        {
            "anchor": [f"query {i // 4}" for i in range(n)],
            "positive": [f"passage {i // 4} {'y' * 80}" for i in range(n)],
            "negative": [f"passage {i * 7919 % n} {'y' * 80}" for i in range(n)],
        }
    )
    monkeypatch.setattr(pairs_module, "_CHUNK_BYTES", 1 << 20)
    started = time.process_time()
    groups, counts = to_groups(rows)
    assert time.process_time() - started < 20
    assert counts["groups_read"] == n // 4 and groups.data.column("passages").num_chunks > 10
    row = groups[1234]
    assert row["query"] == "query 1234" and row["passages"][0].startswith("passage 1234 ")
    wanted = {f"passage {i * 7919 % n} {'y' * 80}" for i in range(4936, 4940)}
    assert set(row["passages"][1:]) == wanted - {row["passages"][0]}
