import logging

import pytest

from helpers.tiny import ids_of_pairs
from helpers.tiny_models import DECODERS, tiny_config, tiny_tokenizer
from lce_trainer.errors import TrainingError
from lce_trainer.model.pairs import encode_by_template, encode_groups
from lce_trainer.model.template import configure_template, keep_special_tokens, pair_template
from lce_trainer.training.collator import GroupCollator

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRUCTURED = (
    '{% for message in messages %}{% if message.role == "query" %}<Query>: {{ message.content[0].text | trim }}'
    '{% elif message.role == "document" %}<Document>: {{ message.content[0].text | trim }}<|im_end|>{% endif %}'
    "{% endfor %}"
)
TRAINED = {"architectures": ["Qwen3ForSequenceClassification"]}


def decoder_tokenizer(family: str = "qwen3", chat_template: str | None = None, **settings):
    tokenizer = tiny_tokenizer(family)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.chat_template = chat_template
    configure_template(tokenizer, tiny_config(family, **settings))
    return tokenizer


def ids_of(tokenizer, query: str, passage: str) -> list[int]:
    messages = [{"role": "query", "content": query}, {"role": "document", "content": passage}]
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]


@pytest.mark.parametrize("chat_template", [None, CHATML])
def test_a_decoder_without_a_head_gets_the_template_for_pairs(chat_template):
    template = pair_template(decoder_tokenizer(chat_template=chat_template))
    assert template.render("what is rain", "water").startswith("Instruct: Judge how well")
    assert template.render("what is rain", "water").endswith("\nQuery: what is rain\nDocument: water\nRelevance:")


def test_a_text_begins_as_the_tokenizer_begins_one():
    llama, qwen = (decoder_tokenizer(family) for family in ("llama", "qwen3"))
    assert ids_of(llama, "moon", "red").count(llama.bos_token_id) == 1
    assert ids_of(llama, "moon", "red")[0] == llama.bos_token_id
    assert pair_template(qwen).head.startswith("Instruct")


def test_another_instruction_comes_as_a_system_message():
    messages = [{"role": role, "content": role[0]} for role in ("system", "query", "document")]
    text = decoder_tokenizer().apply_chat_template(messages, tokenize=False)
    assert text == "Instruct: s\nQuery: q\nDocument: d\nRelevance:"


@pytest.mark.parametrize("settings", [{}, TRAINED])
def test_a_chat_template_that_is_written_for_pairs_is_kept(settings):
    tokenizer = decoder_tokenizer(chat_template=STRUCTURED, **settings)
    assert tokenizer.chat_template == STRUCTURED
    assert pair_template(tokenizer).render(" moon ", "\nred ") == "<Query>: moon<Document>: red<|im_end|>"


def test_a_reranker_that_renders_any_role_keeps_its_template():
    template = pair_template(decoder_tokenizer(chat_template=CHATML, **TRAINED))
    assert template.render("q", "d") == "<|im_start|>query\nq<|im_end|>\n<|im_start|>document\nd<|im_end|>\n"


@pytest.mark.parametrize(
    "chat_template",
    [
        "{% for message in messages %}{% if message.role == 'user' %}{{ message.content }}{% endif %}{% endfor %}",
        "{{ messages[1].content }} {{ messages[0].content }}",
        "{{ messages[0].content }} {{ messages[1].content | upper }}",
        "{{ raise_exception('no such role') }}",
    ],
)
def test_a_reranker_whose_chat_template_loses_a_text_is_an_error(chat_template):
    with pytest.raises(TrainingError, match=r"does not hold a query and then a document.*set tokenizer.chat_template"):
        decoder_tokenizer(chat_template=chat_template, **TRAINED)


def test_a_reranker_without_any_template_joins_its_texts_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        tokenizer = decoder_tokenizer(**TRAINED)
    assert "no template for pairs" in caplog.text and pair_template(tokenizer) is None


def test_an_encoder_keeps_its_separators_whatever_chats_look_like():
    tokenizer = tiny_tokenizer("bert")
    tokenizer.chat_template = CHATML
    configure_template(tokenizer, tiny_config("bert"))
    assert pair_template(tokenizer) is None


@pytest.mark.parametrize("family", DECODERS)
def test_a_pair_that_fits_is_tokenized_as_its_text_is(family):
    tokenizer = decoder_tokenizer(family)
    keep_special_tokens(tokenizer, True)  # or that of the last passage is text
    pairs = [("what is rain", "rain is water"), ("", ""), ("moon?", ".\n\n star\n"), ("ünïcode 雨", "<|im_end|> x")]
    encoded, cut = encode_by_template(tokenizer, pair_template(tokenizer), pairs, 150)
    assert ids_of_pairs(encoded) == [ids_of(tokenizer, *pair) for pair in pairs]
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    encoded, _ = encode_by_template(tokenizer, pair_template(tokenizer), pairs, 150)
    assert ids_of_pairs(encoded, "token_type_ids") == [[0] * len(ids) for ids in ids_of_pairs(encoded)]
    assert not cut.any()


@pytest.mark.parametrize("family", DECODERS)
def test_only_the_passage_is_cut_and_query_and_template_stay(family):
    tokenizer = decoder_tokenizer(family)
    template, query, passage = pair_template(tokenizer), "what is the moon", "river stone " * 60
    whole, tail = ids_of(tokenizer, query, passage), list(template.tail_ids)
    assert tokenizer.decode(tail).endswith("Relevance:")
    encoded, cut = encode_groups(tokenizer, [query], [[passage, "red"]], 64, 16)
    first, second = ids_of_pairs(encoded)
    assert first == whole[: 64 - len(tail)] + tail
    assert f"Query: {query}\nDocument: river stone" in tokenizer.decode(first)
    assert second == ids_of(tokenizer, query, "red")
    assert cut.tolist() == [True, False]


def test_a_query_is_cut_at_its_own_limit():
    tokenizer = decoder_tokenizer()
    query = "red green blue fish bird tree stone river"
    assert len(tokenizer(query)["input_ids"]) == 8
    encoded, cut = encode_groups(tokenizer, [query, "moon"], [["sand", "leaf"], ["snow"]], 64, 5)
    assert ids_of_pairs(encoded) == [
        *[ids_of(tokenizer, "red green blue fish bird", passage) for passage in ("sand", "leaf")],
        ids_of(tokenizer, "moon", "snow"),
    ]
    assert cut.tolist() == [True, True, False]


def test_when_scoring_a_long_query_leaves_half_of_the_room_to_the_passage():
    tokenizer = decoder_tokenizer()
    template, long = pair_template(tokenizer), "red green blue fish bird tree " * 40
    room = 100 - template.overhead
    encoded, cut = encode_by_template(tokenizer, template, [(long, long), (long, "moon"), ("moon", long)], 100)
    both, short_passage, short_query = ids_of_pairs(encoded)
    assert len(both) == len(short_query) == 100 and 95 < len(short_passage) <= 100 and cut.all()
    query, passage = tokenizer.decode(both).split("Query: ")[1].removesuffix("\nRelevance:").split("\nDocument: ")
    assert abs(len(query.split()) - room // 2) <= 2 and abs(len(passage.split()) - room // 2) <= 4
    assert tokenizer.decode(short_passage).endswith("\nDocument: moon\nRelevance:")
    assert "Query: moon\n" in tokenizer.decode(short_query)


def test_settings_that_leave_no_room_are_errors():
    tokenizer = decoder_tokenizer()
    overhead = pair_template(tokenizer).overhead
    with pytest.raises(TrainingError, match="leave no room for a passage"):
        GroupCollator(tokenizer, max_length=overhead + 8, max_query_length=8)
    GroupCollator(tokenizer, max_length=overhead + 9, max_query_length=8)
    with pytest.raises(TrainingError, match=f"max_length is 20, but the template of pairs takes {overhead} tokens"):
        encode_by_template(tokenizer, pair_template(tokenizer), [("a", "b")], 20)
