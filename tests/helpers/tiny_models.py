"""A tiny random reranker and a fast tokenizer of the right kind, for every family."""

import json
from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertTokenizer,
    DebertaV2Tokenizer,
    DistilBertTokenizer,
    LlamaTokenizer,
    MPNetTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    RobertaTokenizer,
    XLMRobertaTokenizer,
)

from helpers.tiny import WORDS

ENCODERS = ("bert", "roberta", "xlm-roberta", "electra", "distilbert", "deberta-v2", "mpnet", "modernbert")
DECODERS = ("qwen3", "llama")
FAMILIES = ENCODERS + DECODERS
POSITIONS = 160
_TEXT = [" ".join(WORDS), " ".join(reversed(WORDS)), *WORDS, *["Instruct: Query: Document: Relevance: yes no"] * 2]
_TEXT += ["Judge how well the document answers the query."] * 2
_BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_ROBERTA_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_MORE = {
    "roberta": {"max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1},
    "xlm-roberta": {"max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1},
    "electra": {"embedding_size": 16},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 16,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
        "type_vocab_size": 0,
        "pooler_hidden_size": 32,
    },
    "mpnet": {"max_position_embeddings": POSITIONS + 2},
    "modernbert": {"local_attention": 16, "global_attn_every_n_layers": 2, "reference_compile": False},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
    "llama": {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False},
}


@cache
def _word_pieces() -> dict[str, int]:
    pieces = [*_BERT_SPECIAL, *WORDS, *"abcdefghijklmnopqrstuvwxyz:"]
    return {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}


def _byte_pairs(
    special: list[str], splitter: pre_tokenizers.PreTokenizer | None = None, alphabet: list[str] | None = None
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a BPE, byte-level unless told otherwise, that knows the words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter or pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=special,
        initial_alphabet=alphabet or pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _unigrams(special: list[str]) -> list[tuple[str, float]]:
    pieces = ["▁" + word for word in WORDS] + ["▁", *"abcdefghijklmnopqrstuvwxyz:"]
    return [(token, 0.0) for token in special] + [(piece, -2.0 - len(piece) ** -1) for piece in pieces]


def tiny_tokenizer(family: str) -> PreTrainedTokenizerBase:
    """As the family's own, over the words of the tests; reads no more than the tiny model."""
    if family in ("bert", "electra"):
        tokenizer = BertTokenizer(vocab=dict(_word_pieces()))
    elif family == "distilbert":
        tokenizer = DistilBertTokenizer(vocab=dict(_word_pieces()))
    elif family == "mpnet":
        vocab = ["<s>", "<pad>", "</s>", "[UNK]", "<mask>", *WORDS]
        tokenizer = MPNetTokenizer(vocab={token: index for index, token in enumerate(vocab)})
    elif family == "roberta":
        vocab, merges = _byte_pairs(_ROBERTA_SPECIAL)
        tokenizer = RobertaTokenizer(vocab=vocab, merges=merges)
    elif family == "xlm-roberta":
        tokenizer = XLMRobertaTokenizer(vocab=_unigrams(["<s>", "<pad>", "</s>", "<unk>"]))
    elif family == "deberta-v2":
        tokenizer = DebertaV2Tokenizer(vocab=_unigrams(["[PAD]", "[CLS]", "[SEP]", "[UNK]"]), unk_id=3)
    elif family == "modernbert":
        vocab, merges = _byte_pairs(_BERT_SPECIAL)
        backend = Tokenizer(models.BPE(vocab, merges))
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token="[PAD]",
            unk_token="[UNK]",
            cls_token="[CLS]",
            sep_token="[SEP]",
            mask_token="[MASK]",
            model_input_names=["input_ids", "attention_mask"],
        )
    elif family == "qwen3":
        vocab, merges = _byte_pairs(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>")
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    elif family == "llama":
        special = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
        vocab, merges = _byte_pairs(special, pre_tokenizers.Metaspace(), ["▁"])
        tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)
    tokenizer.model_max_length = POSITIONS
    return tokenizer


def tiny_config(family: str, **settings):
    """Of a model of 32 dimensions and two layers that reads ``POSITIONS`` tokens."""
    tokenizer = tiny_tokenizer(family)
    ids = {
        name: getattr(tokenizer, name)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
        if getattr(tokenizer, name, None) is not None
    }
    sizes = {} if family == "distilbert" else _SIZES
    return AutoConfig.for_model(
        family,
        **{
            "vocab_size": len(tokenizer),
            "max_position_embeddings": POSITIONS,
            "num_labels": 1,
            **sizes,
            **ids,
            **_MORE.get(family, {}),
            **settings,
        },
    )


def with_dropout(family: str, rate: float) -> dict[str, float]:
    """Settings that give every dropout of a family one rate."""
    settings = tiny_config(family).to_dict()
    return {
        key: rate
        for key, value in settings.items()
        if "dropout" in key and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def without_dropout(family: str) -> dict[str, float]:
    """Settings that switch every dropout of a family off."""
    return with_dropout(family, 0.0)


def lively(model: PreTrainedModel) -> PreTrainedModel:
    """With weights so large that scores differ and gradients are felt."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


def tiny_model(family: str, seed: int = 0, dropout: float = 0.0) -> PreTrainedModel:
    """A reranker, without dropout unless told otherwise."""
    torch.manual_seed(seed)
    config = tiny_config(family, **with_dropout(family, dropout))
    return lively(AutoModelForSequenceClassification.from_config(config))


def tiny_language_model(family: str, seed: int = 0, dropout: float = 0.0) -> PreTrainedModel:
    """A decoder with its language-model head."""
    torch.manual_seed(seed)
    return lively(AutoModelForCausalLM.from_config(tiny_config(family, **with_dropout(family, dropout))))


ASKING = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ message.content }}"
    "{% elif message.role == 'query' %}<|im_start|>{{ message.content }}"
    "{% elif message.role == 'document' %}<|im_end|>{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
