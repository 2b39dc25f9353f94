import json
import logging

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from helpers.backbones import WAYS, make_trainer, pairs_of_all_lengths
from helpers.tiny_models import ASKING, tiny_language_model, tiny_model, tiny_tokenizer
from lce_trainer.errors import TrainingError
from lce_trainer.hub.contents import model_repo
from lce_trainer.model.loading import load_model, load_tokenizer, pairing_tokenizer
from lce_trainer.model.pairs import pad_pairs
from lce_trainer.model.reranker import Reranker
from lce_trainer.model.scoring import scoring_batches
from lce_trainer.model.template import pair_template
from lce_trainer.model.yes_no import answers_of, pair_logits, question_template
from lce_trainer.training.arguments import LCETrainingArguments
from lce_trainer.training.trainer import prepare_model

# The chat format of Qwen3, as far as a question needs it.
QWEN3 = (
    "{% for message in messages %}{% if message.role in ['system', 'user', 'assistant'] %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def prepared(model, tokenizer, yes_no):
    return prepare_model(model, tokenizer, LCETrainingArguments("unused", yes_no=yes_no, report_to="none"))


def language_model_folder(folder, family="qwen3", chat_template=QWEN3):
    tokenizer = tiny_tokenizer(family)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    tiny_language_model(family).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A reranker that answers yes or no, as sentence-transformers publishes one, with its settings and a prompt."""
    from sentence_transformers import CrossEncoder

    base = language_model_folder(tmp_path_factory.mktemp("base"), chat_template=ASKING)
    model = CrossEncoder(str(base), device="cpu", prompts={"web": "what is the"}, default_prompt_name="web")
    model[0].processing_kwargs = {"chat_template": {"add_generation_prompt": True}}
    folder = tmp_path_factory.mktemp("published")
    model.save_pretrained(str(folder), create_model_card=False)
    return folder


def test_a_published_reranker_scores_as_its_cross_encoder_does(published):
    from sentence_transformers import CrossEncoder

    pairs = pairs_of_all_lengths()
    reranker = Reranker.from_pretrained(published, device="cpu")
    assert isinstance(reranker.model, type(tiny_language_model("qwen3")))
    text = pair_template(reranker.tokenizer).render("moon", "star")
    assert text == "what is the<|im_start|>moon<|im_end|>star<|im_start|>"
    crossed = CrossEncoder(str(published), device="cpu").predict(
        pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False
    )
    scores = reranker.score(pairs)
    np.testing.assert_allclose(scores, crossed, atol=1e-5)
    assert scores.std() > 1e-3


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_score_is_the_logit_of_yes_less_that_of_no(family):
    model, tokenizer = tiny_language_model(family).double().eval(), tiny_tokenizer(family)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.chat_template = ASKING
    prepared(model, tokenizer, None)
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    assert answers_of(model) == (yes, no) and yes != no
    for rows, pairs in scoring_batches(tokenizer, pairs_of_all_lengths(), 160, 4000):
        batch = pad_pairs(tokenizer, pairs)
        with torch.no_grad():
            scores = pair_logits(model, batch, model)
            for row in range(len(rows)):
                ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
                logits = model(input_ids=ids[None]).logits[0, -1]
                torch.testing.assert_close(scores[row], logits[yes] - logits[no], rtol=0, atol=1e-9)
        assert scores.dtype == torch.float64


def test_a_gradient_is_that_of_the_whole_head():
    """And the head computes all of its rows again afterwards."""
    model, tokenizer = tiny_language_model("llama"), tiny_tokenizer("llama")
    tokenizer.pad_token, tokenizer.chat_template = tokenizer.eos_token, ASKING
    prepared(model, tokenizer, None)
    (_, pairs), *_ = scoring_batches(tokenizer, pairs_of_all_lengths()[:4], 160, 4000)
    batch = pad_pairs(tokenizer, pairs)
    pair_logits(model, batch, model).sum().backward()
    head = model.lm_head.weight
    got, head.grad = head.grad.clone(), None
    yes, no = answers_of(model)
    last = batch["attention_mask"].sum(1) - 1
    logits = model(**batch).logits[torch.arange(len(last)), last]
    assert logits.shape == (4, len(tokenizer))
    (logits[:, yes] - logits[:, no]).sum().backward()
    torch.testing.assert_close(got, head.grad, rtol=0, atol=1e-5)


def test_a_rounded_model_gives_a_score_that_is_not_rounded_twice():
    model, tokenizer = tiny_language_model("qwen3").bfloat16().eval(), tiny_tokenizer("qwen3")
    tokenizer.chat_template = ASKING
    prepared(model, tokenizer, None)
    (_, pairs), *_ = scoring_batches(tokenizer, pairs_of_all_lengths()[:8], 160, 4000)
    batch = pad_pairs(tokenizer, pairs)
    with torch.no_grad():
        scores = pair_logits(model, batch, model)
    assert scores.dtype == torch.float32
    assert (scores != scores.bfloat16().float()).any()


def test_it_is_trained_exactly_and_saved_as_the_language_model_that_it_is(published, tmp_path):
    from sentence_transformers import CrossEncoder

    ends = []
    for place, way in enumerate(WAYS):
        trainer = make_trainer("qwen3", tmp_path / str(place), model=published, tokenizer=None, **way)
        assert np.isfinite(trainer.train().training_loss)
        ends.append(trainer.model.state_dict())
    before = AutoModelForCausalLM.from_pretrained(published)
    for end in ends[1:]:
        for name, tensor in end.items():
            torch.testing.assert_close(tensor, ends[0][name], rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert max((ends[0][name] - tensor).abs().max() for name, tensor in before.state_dict().items()) > 1e-5

    folder = tmp_path / "saved"
    trainer.save_model(str(folder))
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {str(path.relative_to(published)) for path in published.rglob("*") if path.is_file()} <= names
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["tie_word_embeddings"]
    assert AutoModelForCausalLM.from_pretrained(folder).lm_head.weight.shape == before.lm_head.weight.shape

    pairs = pairs_of_all_lengths()
    scores = Reranker.from_pretrained(folder, device="cpu").score(pairs)
    crossed = CrossEncoder(str(folder), device="cpu").predict(pairs, show_progress_bar=False)
    np.testing.assert_allclose(scores, crossed, atol=1e-5)
    trained = Reranker(trainer.model, trainer.processing_class)
    np.testing.assert_allclose(trained.score(pairs), scores, atol=1e-5)


def test_a_language_model_gets_a_new_head_unless_it_is_to_answer(tmp_path, caplog):
    folder = language_model_folder(tmp_path / "base")
    model, tokenizer = prepared(folder, None, None)
    assert type(model).__name__ == "Qwen3ForSequenceClassification" and model.config.num_labels == 1
    assert answers_of(model) is None and pair_template(tokenizer).tail == "\nRelevance:"
    assert pairing_tokenizer(folder).chat_template == tokenizer.chat_template
    model, tokenizer = prepared(folder, None, True)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert answers_of(model) == tuple(tokenizer.convert_tokens_to_ids(["yes", "no"]))
    assert pairing_tokenizer(folder, yes_no=True).chat_template == tokenizer.chat_template
    assert "rerank" not in caplog.text
    with caplog.at_level(logging.WARNING):
        prepared(language_model_folder(tmp_path / "a-reranker"), None, None)
    assert "does not say that it answers yes or no, so it gets a new head; pass yes_no=True if it does" in caplog.text


def test_a_reranker_can_be_given_a_new_head_all_the_same(published):
    model, tokenizer = prepared(published, None, False)
    assert type(model).__name__ == "Qwen3ForSequenceClassification" and answers_of(model) is None
    (_, pairs), *_ = scoring_batches(tokenizer, [("moon", "star")], 100, 1000)
    batch = pad_pairs(tokenizer, pairs)
    assert pair_logits(model, batch, model) == model(**batch).logits[:, 0]


def test_the_question_is_that_of_qwen3_reranker():
    tokenizer = tiny_tokenizer("qwen3")
    tokenizer.chat_template = QWEN3
    tokenizer.chat_template = question_template(tokenizer)
    assert pair_template(tokenizer).render("a query", 'a "document"') == (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: Given a '
        "web search query, retrieve relevant passages that answer the query\n<Query>: a query\n<Document>: a "
        '"document"<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n'
    )
    messages = [{"role": role, "content": role} for role in ("system", "query", "document")]
    assert "<Instruct>: system\n" in tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_chat_format_without_a_system_role_is_asked_in_one_turn():
    tokenizer = tiny_tokenizer("llama")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no') }}"
        "{% endif %}[INST] {{ message.content }} [/INST]{% endfor %}"
    )
    tokenizer.chat_template = question_template(tokenizer)
    text = pair_template(tokenizer).render("q", "d")
    assert text.startswith("<s>[INST] Judge whether") and text.endswith("\n<Query>: q\n<Document>: d [/INST]")


def test_a_single_token_can_be_the_answer(published, tmp_path):
    model = load_model(published)
    model.config.sentence_transformers = {"answer_ids": [20]}
    tokenizer = load_tokenizer(published)
    trainer = make_trainer("qwen3", tmp_path, model=model, tokenizer=tokenizer)
    trainer.train()
    trainer.save_model()
    assert json.loads((tmp_path / "1_LogitScore" / "config.json").read_text())["false_token_id"] is None
    reranker = Reranker.from_pretrained(tmp_path)
    ids = tokenizer(pair_template(tokenizer).render("moon", "star"), return_tensors="pt")
    with torch.no_grad():
        logits = reranker.model(**ids.to(reranker.model.device)).logits[0, -1]
    assert reranker.score([("moon", "star")])[0] == pytest.approx(float(logits[20]), abs=1e-5)


def test_what_cannot_answer_is_an_error(tmp_path):
    no_chat = language_model_folder(tmp_path / "no-chat", chat_template=None)
    with pytest.raises(TrainingError, match="needs a chat template"):
        prepared(no_chat, None, True)
    with pytest.raises(TrainingError, match="no tokens 'yes' and 'no'"):
        prepared(tiny_language_model("qwen3"), tiny_tokenizer("bert"), None)
    tiny_model("bert").save_pretrained(tmp_path / "bert")
    with pytest.raises(TrainingError, match="BertForSequenceClassification, which cannot answer yes or no"):
        load_model(tmp_path / "bert", yes_no=True)
    with pytest.raises(TrainingError, match="Qwen3ForCausalLM, with no head to score with: train it first"):
        Reranker.from_pretrained(no_chat)
    (no_chat / "modules.json").write_text('[{"type": "a.LogitScore", "path": "1_LogitScore"}]')
    with pytest.raises(TrainingError, match="does not say which token is the true one"):
        load_model(no_chat)


def test_an_encoder_without_a_head_does_not_score(tmp_path):
    model = tiny_model("bert").base_model
    model.save_pretrained(tmp_path)
    tiny_tokenizer("bert").save_pretrained(tmp_path)
    with pytest.raises(TrainingError, match="BertModel, with no head to score with"):
        Reranker.from_pretrained(tmp_path)
    assert isinstance(load_model(tmp_path), AutoModelForSequenceClassification._model_mapping[type(model.config)])


def test_it_is_published_with_what_makes_it_a_cross_encoder(published, tmp_path):
    trainer = make_trainer("qwen3", tmp_path, model=published, tokenizer=None)
    trainer.save_model()
    files = model_repo("me/it", tmp_path, "# a card\n").files
    assert {"1_LogitScore/config.json", "modules.json", "chat_template.jinja", "config.json"} <= files.keys()


def test_the_tokenizer_says_on_which_side_to_pad(published, tmp_path):
    trainer = make_trainer("qwen3", tmp_path, model=published, tokenizer=None)
    trainer.save_model()
    assert AutoTokenizer.from_pretrained(tmp_path).padding_side == "left"
