import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from helpers.tiny import build_model, build_tokenizer, make_pairs
from helpers.tiny_models import tiny_model, tiny_tokenizer
from lce_trainer.errors import ConfigError, TrainingError
from lce_trainer.model.crossencoder import RAW_SCORES
from lce_trainer.model.loading import has_head, load_model
from lce_trainer.model.pairs import EncodedPairs, pad_pairs
from lce_trainer.model.reranker import Reranker
from lce_trainer.model.saving import write_calibration, write_first_stage_weight
from lce_trainer.model.scoring import scoring_batches


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """As the trainer saves it, reading 32 tokens, with scores that spread."""
    path = tmp_path_factory.mktemp("checkpoint")
    model, tokenizer = build_model(), build_tokenizer()
    for parameter in model.parameters():
        parameter.data.mul_(10 if parameter.dim() > 1 else 1)
    model.config.sentence_transformers = dict(RAW_SCORES)
    tokenizer.model_max_length = 32
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_transformers_and_sentence_transformers_give_the_same_scores(checkpoint):
    from sentence_transformers import CrossEncoder

    pairs = make_pairs(40)
    scores = Reranker.from_pretrained(checkpoint, device="cpu").score(pairs)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    inputs = tokenizer([q for q, _ in pairs], [p for _, p in pairs], padding=True, truncation=True, return_tensors="pt")
    assert inputs["input_ids"].shape == (40, 32)
    with torch.no_grad():
        plain = model(**inputs).logits[:, 0].numpy()
    np.testing.assert_allclose(scores, plain, atol=1e-5)
    crossed = CrossEncoder(str(checkpoint), device="cpu").predict(pairs, show_progress_bar=False)
    np.testing.assert_allclose(scores, crossed, atol=1e-5)
    assert scores.std() > 0.1 and (scores < 0).any()  # not squashed


def test_scores_do_not_depend_on_the_batch(checkpoint):
    reranker = Reranker.from_pretrained(checkpoint)
    pairs = make_pairs(30)
    together = reranker.score(pairs)
    np.testing.assert_allclose(reranker.score(pairs, batch_tokens=1), together, atol=1e-6)
    np.testing.assert_array_equal(reranker.score(pairs), together)
    assert together.dtype == np.float32
    assert reranker.score([]).shape == (0,)


def test_batches_keep_to_their_tokens_and_lose_no_pair():
    pairs = make_pairs(50)
    seen = []
    for rows, batch in scoring_batches(build_tokenizer(), pairs, 64, 200):
        assert len(rows) == 1 or len(rows) * batch.lengths.max() <= 200
        seen += rows.tolist()
    assert sorted(seen) == list(range(50))


def test_windows_of_pairs_score_as_one(checkpoint, monkeypatch):
    reranker, pairs = Reranker.from_pretrained(checkpoint), make_pairs(20)
    whole = reranker.score(pairs)
    monkeypatch.setattr("lce_trainer.model.scoring.WINDOW", 6)
    np.testing.assert_allclose(reranker.score(pairs), whole, atol=1e-6)


def test_passages_are_ranked_from_the_best_down(checkpoint):
    reranker = Reranker.from_pretrained(checkpoint)
    passages = [passage for _, passage in make_pairs(8)]
    ranked = reranker.rank("what is the moon", passages)
    assert [item.score for item in ranked] == sorted((item.score for item in ranked), reverse=True)
    assert sorted(item.index for item in ranked) == list(range(8))
    assert all(item.passage == passages[item.index] for item in ranked)
    assert reranker.rank("what is the moon", passages, top_k=3) == ranked[:3]


def test_equal_passages_keep_their_order(checkpoint):
    ranked = Reranker.from_pretrained(checkpoint).rank("moon", ["red", *["tree"] * 6])
    assert [item.index for item in ranked if item.passage == "tree"] == [1, 2, 3, 4, 5, 6]


def test_weights_for_training_are_float32_whatever_was_saved(tmp_path):
    build_model().to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(tmp_path).dtype == torch.float32
    assert load_model(tmp_path, dtype="auto").dtype == torch.bfloat16


def test_every_dropout_can_be_set(checkpoint):
    model = load_model(checkpoint, dropout=0.25)
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.25}
    assert model.config.num_labels == 1 and model.config.id2label == {0: "LABEL_0"}


def test_what_is_no_reranker_is_a_one_line_error(tmp_path, checkpoint):
    with pytest.raises(TrainingError, match="no model at"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="needs the Python package"):
        load_model("package:no_such_package_here/model")
    config = BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=3)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "three")
    with pytest.raises(TrainingError, match="classifies into 3 labels; a reranker has one"):
        load_model(tmp_path / "three")
    with pytest.raises(TrainingError, match="the model reads 128 tokens at most"):
        Reranker.from_pretrained(checkpoint, max_length=500)


def test_padding_changes_no_score(checkpoint):
    reranker = Reranker.from_pretrained(checkpoint)
    ids = reranker.tokenizer("what is the moon", "red tree")["input_ids"]
    padded = pad_pairs(reranker.tokenizer, EncodedPairs.of({"input_ids": [ids]}), multiple=32)
    assert padded["input_ids"].shape[1] == 32
    with torch.inference_mode():
        torch.testing.assert_close(
            reranker.model(**padded).logits, reranker.model(input_ids=torch.tensor([ids])).logits, rtol=0, atol=1e-5
        )


def test_a_first_stage_score_counts_as_much_as_training_found(tiny_reranker, tmp_path):
    query, passages = "red fish", ["a red fish", "a moon", "the river falls on stone", "snow"]
    reranker = Reranker.from_pretrained(tiny_reranker)
    first_stage = [0.1, 0.9, 0.5, 0.2]
    scores = reranker.score([(query, passage) for passage in passages]).astype(np.float64)

    def deviations(values):
        return (values - np.mean(values)) / np.std(values)

    for weight in (None, 0.0, 0.7, 1.0):
        if weight is not None:
            reranker.save_pretrained(tmp_path / str(weight))
            write_first_stage_weight(tmp_path / str(weight), weight)
            reranker = Reranker.from_pretrained(tmp_path / str(weight))
        share = 0.5 if weight is None else weight
        fused = share * deviations(np.array(first_stage)) + (1 - share) * deviations(scores)
        ranked = reranker.rank(query, passages, first_stage_scores=first_stage)
        assert [found.index for found in ranked] == np.argsort(-fused).tolist()
        assert [found.score for found in ranked] == pytest.approx(sorted(fused, reverse=True), abs=1e-5)
    equal = reranker.rank(query, passages, first_stage_scores=[1.0] * 4)
    assert [found.score for found in equal] == [0.0] * 4
    assert reranker.rank(query, [], first_stage_scores=[]) == []
    with pytest.raises(TrainingError, match="3 first_stage_scores for 4 passages"):
        reranker.rank(query, passages, first_stage_scores=[1.0, 2.0, 3.0])


def test_a_model_that_ranks_as_it_is_has_a_head(tiny_reranker, tmp_path):
    assert has_head(tiny_reranker)
    model = Reranker.from_pretrained(tiny_reranker).model
    model.bert.save_pretrained(tmp_path)
    assert not has_head(tmp_path)


def test_a_calibration_makes_probabilities_and_goes_where_the_config_goes(checkpoint, tmp_path):
    from sentence_transformers import CrossEncoder

    pairs = make_pairs(20)
    plain = Reranker.from_pretrained(checkpoint, device="cpu")
    logits = plain.score(pairs)
    plain.save_pretrained(tmp_path / "one")
    write_calibration(tmp_path / "one", {"slope": 0.5, "intercept": -1.0, "cut_off": 0.3})
    Reranker.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    wanted = 1 / (1 + np.exp(-(0.5 * logits.astype(np.float64) - 1.0)))
    for folder in (tmp_path / "one", tmp_path / "two"):
        reranker = Reranker.from_pretrained(folder, device="cpu")
        np.testing.assert_array_equal(reranker.score(pairs), logits)  # which stay the default
        found = reranker.score(pairs, calibrated=True)
        assert found.dtype == np.float32 and ((found >= 0) & (found <= 1)).all()
        np.testing.assert_allclose(found, wanted, atol=1e-6)
        passages = [passage for _, passage in pairs]
        ranked, raw = (reranker.rank("what is red", passages, calibrated=is_wanted) for is_wanted in (True, False))
        assert [one.index for one in ranked] == [one.index for one in raw]
        assert [one.score for one in ranked] == pytest.approx([1 / (1 + np.exp(1 - 0.5 * one.score)) for one in raw])
        # sentence-transformers keeps the numbers, and makes the same probabilities by them.
        theirs = CrossEncoder(str(folder), device="cpu")
        np.testing.assert_allclose(theirs.predict(pairs, show_progress_bar=False), logits, atol=1e-5)
        line = theirs.config.calibration
        chances = theirs.predict(
            pairs,
            activation_fn=lambda scores, line=line: torch.sigmoid(line["slope"] * scores + line["intercept"]),
            show_progress_bar=False,
        )
        np.testing.assert_allclose(chances, wanted, atol=1e-5)


def test_probabilities_that_round_to_one_keep_the_order_of_the_logits(checkpoint, tmp_path):
    Reranker.from_pretrained(checkpoint).save_pretrained(tmp_path)
    write_calibration(tmp_path, {"slope": 1e-9, "intercept": 30.0})
    reranker, passages = Reranker.from_pretrained(tmp_path), [passage for _, passage in make_pairs(8)]
    ranked = reranker.rank("what is red", passages, calibrated=True)
    assert {one.score for one in ranked} == {1.0}
    assert [one.index for one in ranked] == [one.index for one in reranker.rank("what is red", passages)]


def test_probabilities_of_what_has_none_are_refused(checkpoint, tmp_path):
    reranker = Reranker.from_pretrained(checkpoint)
    with pytest.raises(
        ConfigError, match="no calibration, so its scores are no probabilities: run lce-trainer calibrate"
    ):
        reranker.rank("what", ["a fish"], calibrated=True)
    with pytest.raises(ConfigError, match="run lce-trainer calibrate"):
        reranker.score([("what", "a fish")], calibrated=True)
    with pytest.raises(ConfigError, match="pass one of the two"):
        reranker.rank("what", ["a fish"], first_stage_scores=[1.0], calibrated=True)
    for broken in ({"slope": 1.0}, {"slope": "1", "intercept": 0.0}, {"slope": -1.0, "intercept": 0.0}, [1.0, 2.0]):
        reranker.model.config.calibration = broken
        with pytest.raises(ConfigError, match="must hold a slope above 0 and an intercept"):
            reranker.score([("what", "a fish")], calibrated=True)
    del reranker.model.config.calibration


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "mpnet", "modernbert", "deberta-v2", "qwen3"])
@pytest.mark.parametrize("packing", ["auto", "none"])
def test_logits_of_half_precision_are_float32_where_rounding_would_make_ties(family, packing):
    tokenizer, pairs = tiny_tokenizer(family), make_pairs(60)
    reranker = Reranker(tiny_model(family).bfloat16(), tokenizer, packing=packing)
    before = [module.__dict__.get("forward") for module in reranker.model.modules()]
    scores = reranker.score(pairs)
    rounded = torch.from_numpy(scores).bfloat16().float().numpy()
    assert (scores != rounded).mean() > 0.9
    assert len(np.unique(scores)) > len(np.unique(rounded))
    assert [module.__dict__.get("forward") for module in reranker.model.modules()] == before
    assert reranker.model.dtype == torch.bfloat16
    wide = Reranker(tiny_model(family).bfloat16().float(), tokenizer, packing=packing).score(pairs)
    assert np.corrcoef(scores, wide)[0, 1] > 0.95
