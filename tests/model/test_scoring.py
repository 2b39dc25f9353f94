"""Scores of many pairs: window by window, by one process or several."""

import tracemalloc

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizer, PreTrainedTokenizerBase

from helpers.paths import TESTS
from helpers.ranks import run_on_two_ranks
from helpers.tiny import WORDS, build_tokenizer, ids_of_pairs, make_pairs
from helpers.tiny_models import FAMILIES, tiny_tokenizer
from lce_trainer import Reranker
from lce_trainer.errors import TrainingError
from lce_trainer.model import scoring as module
from lce_trainer.model.pairs import pair_layout
from lce_trainer.model.scoring import score_pairs, scoring_batches
from lce_trainer.model.template import pair_template


@pytest.fixture(scope="module")
def reranker(tiny_reranker):
    loaded = Reranker.from_pretrained(tiny_reranker, device="cpu")
    for parameter in loaded.model.parameters():
        parameter.data.mul_(10 if parameter.dim() > 1 else 1)
    return loaded


def test_a_generator_scores_as_its_list(reranker, monkeypatch):
    monkeypatch.setattr(module, "WINDOW", 7)
    pairs = make_pairs(20)
    scores = reranker.score(pairs)
    assert scores.std() > 0.1
    np.testing.assert_array_equal(reranker.score(pair for pair in pairs), scores)
    np.testing.assert_array_equal(reranker.score([list(pair) for pair in pairs]), scores)
    assert reranker.score(iter(())).shape == (0,)


def test_a_window_is_scored_before_the_next_is_read(reranker, monkeypatch):
    monkeypatch.setattr(module, "WINDOW", 5)
    read, scored = 0, []

    def pairs():
        nonlocal read
        for pair in make_pairs(17):
            read += 1
            yield pair

    def score(batch):
        scored.append(read)
        return torch.zeros(len(batch))

    assert score_pairs(score, reranker.tokenizer, pairs(), 64, 10_000).shape == (17,)
    assert scored == [5, 10, 15, 17]


def test_memory_does_not_grow_with_the_pairs(reranker, monkeypatch):
    """All texts would be 8 MB, and the scores are 16 kB."""
    monkeypatch.setattr(module, "WINDOW", 250)

    def zeros(batch):
        return torch.zeros(len(batch))

    def peak(n):
        tracemalloc.start()
        score_pairs(zeros, reranker.tokenizer, ((f"red {i}", f"{i} " + "f" * 2000) for i in range(n)), 16, 10**6)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(250)
    assert peak(4000) < 1.5 * peak(500)


def test_equal_pairs_get_the_very_same_score(reranker):
    pairs = make_pairs(9) * 3 + make_pairs(30, seed=1)
    scores = reranker.score(pairs, batch_tokens=150)
    np.testing.assert_array_equal(scores[:9], scores[9:18])
    np.testing.assert_array_equal(scores[:9], scores[18:27])


@pytest.mark.parametrize(
    "bad", ["ab", ("red",), ("red", None), ("red", "fish", "bird"), {"query": "red", "passage": "fish"}, None, 3]
)
def test_what_is_no_pair_is_named(reranker, bad):
    with pytest.raises(TrainingError, match=r"pair 2 \(the first is 0\) is .*a query and a passage, two strings"):
        reranker.score([("red", "fish"), ("red", "bird"), bad])


@pytest.mark.parametrize("tokens", [0, -5])
def test_a_batch_has_a_token_at_least(reranker, tokens):
    with pytest.raises(TrainingError, match=f"batch_tokens={tokens}"):
        reranker.score([("red", "fish")], batch_tokens=tokens)


def test_the_bar_counts_every_pair(reranker, monkeypatch, capsys):
    monkeypatch.setattr(module, "WINDOW", 10)
    reranker.score((pair for pair in make_pairs(12) * 2), progress=True)
    assert "24pair" in capsys.readouterr().err
    reranker.score(make_pairs(12) * 2, progress=True)
    assert "24/24" in capsys.readouterr().err


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["word level", *FAMILIES])
def test_texts_tokenized_once_give_the_ids_of_the_tokenizers_own_call(family, side):
    tokenizer = build_tokenizer() if family == "word level" else tiny_tokenizer(family)
    assert not pair_template(tokenizer)
    tokenizer.truncation_side = side
    texts = ["", " ", *(" ".join((WORDS * 2)[:n]) for n in (1, 2, 7, 8, 9, 10, 30, 31, 60))]
    pairs = [(query, passage) for query in texts for passage in texts]
    for max_length in (19, 20, 128):
        assert_as_the_tokenizer_does(tokenizer, pairs, max_length)


def assert_as_the_tokenizer_does(
    tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]], max_length: int
) -> None:
    lengths, encoded = module._encoder(tokenizer, pairs, max_length)
    some = np.random.default_rng(0).permutation(len(pairs))
    found = encoded(some)
    if tokenizer.is_fast:
        assert tokenizer.backend_tokenizer.truncation is None  # it would be saved with the tokenizer
    assert found.lengths.tolist() == lengths[some].tolist()
    queries, passages = (list(texts) for texts in zip(*(pairs[i] for i in some), strict=True))
    wanted = dict(tokenizer(queries, passages, truncation="longest_first", max_length=max_length))
    del wanted["attention_mask"]  # all ones
    assert {name: ids_of_pairs(found, name) for name in wanted} == wanted


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["word level", *FAMILIES])
def test_pairs_of_any_lengths_are_cut_to_any_room_as_the_tokenizer_cuts_them(family, side):
    tokenizer = build_tokenizer() if family == "word level" else tiny_tokenizer(family)
    tokenizer.truncation_side = side
    rng = np.random.default_rng(7)

    def text() -> str:
        return " ".join(rng.choice(WORDS, rng.integers(0, rng.choice([3, 12, 40]))))

    least = pair_layout(tokenizer).overhead + 1
    for max_length in [*range(least, least + 8), *rng.integers(least, 90, 12).tolist()]:
        assert_as_the_tokenizer_does(tokenizer, [(text(), text()) for _ in range(50)], max_length)


def test_half_of_the_room_is_the_shorter_texts_and_the_query_is_the_shorter_of_two_alike():
    counts = np.array([[2, 3], [2, 9], [9, 2], [3, 9], [9, 3], [4, 4], [9, 9], [9, 8], [0, 9], [9, 0]])
    wanted = [[2, 3], [2, 5], [5, 2], [3, 4], [4, 3], [3, 4], [3, 4], [4, 3], [0, 7], [7, 0]]
    assert module.longest_first(counts, 7).tolist() == wanted


def test_a_pair_has_room_for_more_than_its_separators():
    with pytest.raises(TrainingError, match="max_length is 3, but a pair has 3 special tokens: raise it"):
        next(scoring_batches(build_tokenizer(), [("red", "fish")], 3, 200))


def test_a_tokenizer_without_a_fast_engine_makes_its_own_pairs():
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]

    class Slow(PreTrainedTokenizer):
        def get_vocab(self):
            return {word: place for place, word in enumerate(vocabulary)}

        @property
        def vocab_size(self):
            return len(vocabulary)

        def _tokenize(self, text, **kwargs):
            return text.split()

        def _convert_token_to_id(self, token):
            return vocabulary.index(token)

        def _convert_id_to_token(self, index):
            return vocabulary[index]

    tokenizer = Slow(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    assert not tokenizer.is_fast
    assert_as_the_tokenizer_does(tokenizer, [("red fish", "moon"), ("star", "tree hill " * 20)], 16)


def test_no_pairs_make_no_batch():
    assert list(scoring_batches(build_tokenizer(), [], 64, 200)) == []


SHARE = """
import sys
sys.path.insert(0, {tests!r})
import torch
from accelerate import Accelerator
from helpers.tiny import make_pairs
from lce_trainer import Reranker
from lce_trainer.model import scoring
from lce_trainer.errors import TrainingError

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
rank = accelerator.process_index
reranker = Reranker.from_pretrained({model!r}, device=accelerator.device)
found, seen, forward = dict(), 0, reranker.model.forward
def counted(*args, **kwargs):
    global seen
    seen += kwargs["packing"].read.numel()
    return forward(*args, **kwargs)
reranker.model.forward = counted
for window in (6, 16384):
    scoring.WINDOW = window
    for n in (0, 1, 2, 7, 12, 31):
        found[window, n] = reranker.score((pair for pair in make_pairs(n)), accelerator=accelerator)
found["repeated"] = reranker.score(make_pairs(9) * 3, accelerator=accelerator)
found["seen"] = seen
found["alone"] = reranker.score(make_pairs(5)) if rank else None
for name, mine in dict(texts=make_pairs(4, seed=rank), fewer=make_pairs(20)[: 20 - 8 * rank]).items():
    scoring.WINDOW = 4
    try:
        reranker.score(mine, accelerator=accelerator)
    except TrainingError as error:
        found[name] = str(error)
found = dict((key, torch.from_numpy(value) if hasattr(value, "dtype") else value) for key, value in found.items())
torch.save(found, {out!r} + f"/{{rank}}.pt")
accelerator.end_training()
"""


@pytest.fixture(scope="module")
def shared(tiny_reranker, tmp_path_factory):
    """What each of two processes got."""
    out = tmp_path_factory.mktemp("shared")
    (out / "share.py").write_text(SHARE.format(tests=str(TESTS), model=str(tiny_reranker), out=str(out)))
    run_on_two_ranks(out / "share.py", {"CUDA_VISIBLE_DEVICES": ""})
    got = [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(2)]
    return [{key: value.numpy() if torch.is_tensor(value) else value for key, value in rank.items()} for rank in got]


def test_processes_that_share_the_pairs_get_the_scores_of_one(shared, tiny_reranker):
    alone = Reranker.from_pretrained(tiny_reranker, device="cpu")
    for window in (6, 16384):
        for n in (0, 1, 2, 7, 12, 31):
            wanted = alone.score(make_pairs(n))
            for found in shared:
                assert found[window, n].dtype == np.float32
                np.testing.assert_allclose(found[window, n], wanted, rtol=0, atol=1e-6)
            np.testing.assert_array_equal(shared[0][window, n], shared[1][window, n])
    np.testing.assert_allclose(shared[0]["repeated"], np.tile(alone.score(make_pairs(9)), 3), rtol=0, atol=1e-6)
    np.testing.assert_allclose(shared[1]["alone"], alone.score(make_pairs(5)), rtol=0, atol=1e-6)


def test_each_pair_is_scored_by_one_process(shared):
    assert sum(found["seen"] for found in shared) == 2 * (1 + 2 + 7 + 12 + 31) + 9
    assert min(found["seen"] for found in shared) > 40


@pytest.mark.parametrize("case", ["texts", "fewer"])
def test_processes_with_different_pairs_are_told_and_do_not_wait_forever(shared, case):
    for found in shared:
        assert "the processes were given different pairs" in found[case]


def test_an_accelerator_of_one_process_changes_nothing(reranker):
    pairs = make_pairs(10)
    np.testing.assert_array_equal(reranker.score(pairs, accelerator=Accelerator(cpu=True)), reranker.score(pairs))
