"""Special tokens in queries and passages are text, wherever pairs are made, unless they shall keep their meaning."""

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from helpers.tiny import build_model, build_tokenizer, ids_of_pairs
from helpers.tiny_models import DECODERS, ENCODERS, FAMILIES, tiny_config, tiny_tokenizer
from helpers.token_ids import settings
from lce_trainer import LCETrainer, Reranker
from lce_trainer.groups.convert import to_groups
from lce_trainer.model.pairs import encode_groups
from lce_trainer.model.scoring import scoring_batches
from lce_trainer.model.template import as_text, configure_template, keep_special_tokens
from lce_trainer.training.collator import GroupCollator, group_collator
from lce_trainer.training.sampling import EpochGroups
from lce_trainer.training.token_ids import token_ids


def configured(family: str, keep: bool | None = None):
    """A family's tokenizer, as it is when a model of the family is loaded; a decoder's has a template."""
    tokenizer = tiny_tokenizer(family)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    configure_template(tokenizer, tiny_config(family))
    keep_special_tokens(tokenizer, keep)
    return tokenizer


def special(tokenizer) -> dict[str, int]:
    """Every special token but the unknown one, which pieces of a text may well be."""
    ids = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    ids.pop(tokenizer.unk_token, None)
    return ids


def pair_ids(tokenizer, query: str, passage: str) -> list[int]:
    """The ids of a pair, which scoring and training make alike."""
    (batch,) = scoring_batches(tokenizer, [(query, passage)], 120, 1000)
    (scored,) = ids_of_pairs(batch[1])
    (trained,) = ids_of_pairs(encode_groups(tokenizer, [query], [[passage]], 120, 60)[0])
    assert scored == trained
    return scored


def count(ids: list[int], tokens: dict[str, int]) -> dict[str, int]:
    return {token: ids.count(number) for token, number in tokens.items()}


@pytest.mark.parametrize("form", ["{0}", "red {0} fish", "red{0}fish", "{0}{0}{0}", "[{0}", "<{0}>"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_special_token_in_a_text_is_text(family, form):
    tokenizer = configured(family)
    tokens = special(tokenizer)
    assert tokens
    plain = count(pair_ids(tokenizer, "moon", "red fish"), tokens)
    for token in tokens:
        for pair in (("moon", form.format(token)), (form.format(token), "red fish")):
            assert count(pair_ids(tokenizer, *pair), tokens) == plain, (token, pair)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_special_token_keeps_its_meaning_where_it_shall(family, tmp_path):
    tokenizer = configured(family, keep=True)
    tokens = special(tokenizer)
    plain = count(pair_ids(tokenizer, "moon", "red fish"), tokens)
    for token in tokens:
        assert count(pair_ids(tokenizer, "moon", f"red {token} fish"), tokens)[token] == plain[token] + 1, token
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    keep_special_tokens(saved, None)
    assert pair_ids(saved, "moon", f"red {token} fish") == pair_ids(tokenizer, "moon", f"red {token} fish")


@pytest.mark.parametrize("family", FAMILIES)
def test_other_texts_are_as_they_were(family):
    texts = ["", " a  b ", "red [fish] <moon> a | b", "< pad> [ SEP ]", "x" * 50]
    assert as_text(configured(family), texts) == texts


@pytest.mark.parametrize("family", [family for family in ENCODERS if family not in ("xlm-roberta", "deberta-v2")])
def test_a_saved_tokenizer_reads_them_as_text_in_transformers_too(family, tmp_path):
    """A unigram model has its special tokens among its pieces, where transformers finds them all the same."""
    tokenizer = configured(family)
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    for token in special(tokenizer):
        passage = f"red {token} fish{token}"
        assert saved("moon", passage)["input_ids"] == pair_ids(tokenizer, "moon", passage), token


@pytest.mark.parametrize("family", DECODERS)
def test_the_template_of_a_saved_tokenizer_keeps_its_special_tokens(family, tmp_path):
    tokenizer = configured(family)
    tokenizer.chat_template = f"{{{{ messages[0].content }}}}{tokenizer.eos_token}{{{{ messages[1].content }}}}"
    keep_special_tokens(tokenizer, None)
    assert pair_ids(tokenizer, "moon", f"red{tokenizer.eos_token}").count(tokenizer.eos_token_id) == 1
    tokenizer.save_pretrained(tmp_path)
    messages = [{"role": "query", "content": "moon"}, {"role": "document", "content": "red"}]
    ids = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, tokenize=True, return_dict=True)
    assert ids["input_ids"].count(tokenizer.eos_token_id) == 1


GROUPS = {"anchor": ["what [SEP]", "why"], "positive": ["moon", "tree"], "negative": ["[PAD] [PAD] snow", "stone"]}


@pytest.mark.parametrize("keep", [False, True])
def test_the_collator_cached_tokens_and_scores_agree(keep, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    args = settings(tmp_path / "out", pretokenize=True, special_tokens_in_texts=keep)
    groups, _ = to_groups(Dataset.from_dict(GROUPS))
    tokenizer = build_tokenizer()
    collator = group_collator(tokenizer, args)
    assert collator.special_tokens_in_texts is keep
    items = [(0, 0), (0, 1)]
    from_texts = collator(EpochGroups(groups).__getitems__(items))
    from_ids = collator(EpochGroups(groups, token_ids(groups, tokenizer, args)).__getitems__(items))
    assert ids_of_pairs(from_texts.pairs) == ids_of_pairs(from_ids.pairs)
    wanted = [pair_ids(tokenizer, "what [SEP]", "moon"), pair_ids(tokenizer, "what [SEP]", "[PAD] [PAD] snow")]
    assert ids_of_pairs(from_texts.pairs)[:2] == wanted
    assert (wanted[1].count(tokenizer.pad_token_id), wanted[1].count(tokenizer.sep_token_id)) == (
        (2, 3) if keep else (0, 2)
    )


def test_the_choice_of_training_is_that_of_the_trained_reranker(tmp_path):
    pair = ("moon", "red [SEP] fish")
    for keep in (True, False):
        args = settings(tmp_path / str(keep), special_tokens_in_texts=keep)
        trainer = LCETrainer(build_model(), args, processing_class=build_tokenizer())
        trainer.save_model(str(tmp_path / str(keep)))
        loaded = Reranker.from_pretrained(tmp_path / str(keep), device="cpu")
        assert pair_ids(loaded.tokenizer, *pair).count(loaded.tokenizer.sep_token_id) == 2 + keep
        other = Reranker.from_pretrained(tmp_path / str(keep), device="cpu", special_tokens_in_texts=not keep)
        assert pair_ids(other.tokenizer, *pair).count(other.tokenizer.sep_token_id) == 3 - keep
        assert loaded.score([pair]) != other.score([pair])


def test_a_tokenizer_that_nobody_configured_reads_them_as_text():
    tokenizer = build_tokenizer()
    GroupCollator(tokenizer, max_length=32, max_query_length=8)
    assert as_text(tokenizer, ["[SEP]"]) == ["[SEP]"]
    assert pair_ids(tokenizer, "moon", "[SEP]").count(tokenizer.sep_token_id) == 2
    assert pair_ids(build_tokenizer(), "moon", "[SEP]").count(tokenizer.sep_token_id) == 2
