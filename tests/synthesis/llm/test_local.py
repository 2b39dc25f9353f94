"""The local model: tiny random Llama and Gemma models in float64, against computations written out naively."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import processors

from helpers.tiny_llm import PASSAGES, QUERIES, SHOTS, build_model, build_tokenizer, prompts, sampling
from lce_trainer.errors import ConfigError, LLMError
from lce_trainer.synthesis.llm.decode import _gumbel
from lce_trainer.synthesis.llm.endpoint import EndpointLLM
from lce_trainer.synthesis.llm.loading import load_llm
from lce_trainer.synthesis.llm.local import TransformersLLM
from lce_trainer.synthesis.llm.protocol import LLMConfig
from lce_trainer.synthesis.prompts import Prompt

FAMILIES = ["llama", "gemma2", "gemma3"]
# transformers computes Gemma 2's attention weights in float32 whatever the model's dtype is.
DTYPES = {"llama": "float64", "gemma2": "float32", "gemma3": "float64"}
EXACT = {"tiny-llama": 1e-9, "tiny-gemma2": 1e-5, "tiny-gemma3": 1e-9}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for family in FAMILIES:
        found[family] = tmp_path_factory.mktemp(family) / f"tiny-{family}"
        build_model(family).save_pretrained(found[family])
        build_tokenizer().save_pretrained(found[family])
    return found


@pytest.fixture(params=FAMILIES)
def llm(request: pytest.FixtureRequest, folders: dict[str, Path]) -> TransformersLLM:
    return TransformersLLM(LLMConfig(model=str(folders[request.param]), dtype=DTYPES[request.param], batch_tokens=64))


def exact(llm: TransformersLLM) -> float:
    return EXACT[llm.name.partition("@")[0]]


def naive_logprobs(llm: TransformersLLM, text: str) -> tuple[list[int], torch.Tensor]:
    """Token ids of a text and the log-probabilities after each, one sequence alone, no cache."""
    ids = llm._tokenizer(text)["input_ids"]
    with torch.no_grad():
        return ids, llm._model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)


def naive_score(llm: TransformersLLM, prompt: str, continuation: str) -> float:
    start = len(llm._tokenizer(prompt)["input_ids"])
    ids, logprobs = naive_logprobs(llm, prompt + continuation)
    return float(np.mean([logprobs[i - 1, ids[i]] for i in range(start, len(ids))]))


@pytest.mark.parametrize("batch_tokens", [1, 64, 100_000])
def test_scores_equal_those_of_each_pair_alone_without_cache(llm, batch_tokens):
    llm._config.batch_tokens = batch_tokens
    pairs = [(prompt, query) for query in QUERIES for prompt in prompts()]
    pairs += [("unlike the rest:", QUERIES[0]), (prompts()[0], QUERIES[0] * 6)]
    expected = [naive_score(llm, *pair) for pair in pairs]
    for some in (pairs[:12], pairs):  # with the few-shot prefix shared, and with hardly anything shared
        scores = llm.score(*map(list, zip(*some, strict=True)))
        assert scores == pytest.approx(expected[: len(some)], abs=exact(llm))


def test_scores_of_one_pair_and_of_none(llm):
    expected = [naive_score(llm, prompts()[0], QUERIES[1])]
    assert llm.score([prompts()[0]], [QUERIES[1]]) == pytest.approx(expected, abs=exact(llm))
    assert llm.score([], []) == llm.complete([], **sampling(0)) == llm.choose([], [["a"], ["b"]]) == []


def test_the_same_call_gives_the_same_bits_whatever_was_asked_before(folders):
    first = TransformersLLM(LLMConfig(model=str(folders["gemma3"]), dtype="float32"))
    second = TransformersLLM(LLMConfig(model=str(folders["gemma3"]), dtype="float32"))
    second.score([SHOTS + "something", SHOTS + "else"], [" red", " blue"])
    pairs = [prompts() * 4, [query for query in QUERIES for _ in PASSAGES]]
    assert first.score(*pairs) == second.score(*pairs) == first.score(*pairs)


def test_nothing_to_score_is_an_error(folders):
    llm = TransformersLLM(LLMConfig(model=str(folders["llama"])))
    with pytest.raises(LLMError, match="pair 2 of 2 has no tokens in its continuation"):
        llm.score(["red", "a"], [" fish", ""])
    llm._tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()  # no <bos> that could stand before
    with pytest.raises(LLMError, match=r"prompt 2 of 2 \(''…\) has 0 tokens; it must hold some text"):
        llm.score(["red", ""], [" fish", " fish"])


def test_greedy_completion_equals_argmax_one_token_at_a_time(llm):
    llm._config.batch_tokens = 100_000
    uneven = [*prompts(), f"{SHOTS}passage: {' '.join(PASSAGES)} query:", f"{SHOTS}passage: fire"]
    written = llm.complete(uneven, **sampling(5, temperature=0.0))
    for prompt, text in zip(uneven, written, strict=True):
        tokens = llm._tokenizer(prompt)["input_ids"]
        start = len(tokens)
        while len(tokens) < start + 12 and tokens[-1] != 2:
            with torch.no_grad():
                tokens.append(int(llm._model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        assert text == llm._tokenizer.decode(tokens[start:], skip_special_tokens=True)


@pytest.mark.parametrize("top_p", [0.8, 1.0])
def test_what_is_drawn_depends_on_the_rows_own_prompt_and_seed_alone(llm, top_p):
    several = [*prompts(), prompts()[0], "unlike the rest:"]
    seeds = [7, 8, 9, 10, 2**64 + 11]
    together = llm.complete(several, **sampling(5, seeds=seeds, top_p=top_p))
    alone = [
        llm.complete([prompt], **sampling(1, seeds=[seed], top_p=top_p))[0]
        for prompt, seed in zip(several, seeds, strict=True)
    ]
    backwards = llm.complete(several[::-1], **sampling(5, seeds=seeds[::-1], top_p=top_p))
    assert together == alone == backwards[::-1]
    assert together[0] != together[3]  # same prompt, another seed


def test_sampling_leaves_the_global_random_state_alone(folders):
    llm = TransformersLLM(LLMConfig(model=str(folders["llama"]), dtype="float64"))
    llm.complete(prompts(), **sampling(3))
    before = torch.get_rng_state()
    once = llm.complete(prompts(), **sampling(3))
    torch.rand(3)
    assert llm.complete(prompts(), **sampling(3)) == once
    torch.set_rng_state(before)


def test_first_tokens_are_drawn_from_the_nucleus_in_proportion(folders):
    llm = TransformersLLM(LLMConfig(model=str(folders["llama"]), dtype="float64", batch_tokens=100_000))
    _, logprobs = naive_logprobs(llm, prompts()[0])
    probabilities, order = (logprobs[-1] / 0.9).softmax(-1).sort(descending=True)
    size = int((probabilities.cumsum(0) - probabilities < 0.8).sum())
    expected = dict(
        zip(order[:size].tolist(), (probabilities[:size] / probabilities[:size].sum()).tolist(), strict=True)
    )
    drawn = llm.complete([prompts()[0]] * 3000, **sampling(3000, max_new_tokens=1))
    for token, probability in expected.items():
        text = llm._tokenizer.decode([token], skip_special_tokens=True)
        twins = [other for other in expected if llm._tokenizer.decode([other], skip_special_tokens=True) == text]
        share = sum(expected[other] for other in twins)
        assert drawn.count(text) / 3000 == pytest.approx(share, abs=4 * (share * (1 - share) / 3000) ** 0.5 + 1e-9)
        assert probability <= share
    assert len(set(drawn)) <= size


def test_noise_is_standard_gumbel_and_uncorrelated_across_seeds_steps_and_tokens():
    tokens = torch.arange(500)[None].expand(40, -1)
    noise = torch.stack([_gumbel(range(40), step, tokens) for step in range(10)]).double()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(np.pi**2 / 6, abs=0.03)
    flat = noise.permute(2, 0, 1).reshape(500, -1)
    for shifted in (noise[1:, :, :], noise[:, 1:, :], noise[:, :, 1:]):
        whole = noise[: shifted.shape[0], : shifted.shape[1], : shifted.shape[2]]
        assert abs(np.corrcoef(whole.flatten(), shifted.flatten())[0, 1]) < 0.01
    assert torch.isfinite(flat).all()


def test_an_answer_ends_at_the_models_end_token(llm):
    free = llm.complete(prompts(), **sampling(3, temperature=0.0))
    end = int(naive_logprobs(llm, prompts()[0])[1][-1].argmax())
    llm._model.generation_config.eos_token_id = [2, end]
    ended = llm.complete(prompts(), **sampling(3, temperature=0.0))
    assert ended[0] == llm._tokenizer.decode([end]) != free[0]


def test_an_answer_ends_before_its_first_stop_string(llm):
    free = llm.complete(prompts(), **sampling(3, temperature=0.0, max_new_tokens=24))
    stops = [text[5:7] for text in free]
    cut = llm.complete(prompts(), **sampling(3, temperature=0.0, max_new_tokens=24, stop=stops))
    assert cut == [text[: min(text.find(stop) for stop in stops if stop in text)] for text in free]


def test_a_row_goes_on_when_its_neighbour_has_stopped(llm):
    free = llm.complete(prompts(), **sampling(3, temperature=0.0, max_new_tokens=24))
    stop = next(c for c in free[0] if any(c not in text for text in free))
    cut = llm.complete(prompts(), **sampling(3, temperature=0.0, max_new_tokens=24, stop=[stop]))
    assert cut == [text.split(stop)[0] for text in free]
    assert any(text == whole for text, whole in zip(cut, free, strict=True))


def test_choice_is_the_mass_of_each_options_first_tokens(llm):
    words = [word for word in llm._tokenizer.get_vocab() if word.isalpha() and first_of(llm, word) == 1]
    options = [sorted(words)[:60], sorted(words)[60:90]]
    answers = llm.choose(prompts(), options)
    for prompt, answer in zip(prompts(), answers, strict=True):
        _, logprobs = naive_logprobs(llm, prompt)
        masses = [sum(float(logprobs[-1, token].exp()) for token in ids(llm, option)) for option in options]
        assert answer == pytest.approx([mass / sum(masses) for mass in masses], abs=exact(llm))


def test_a_form_counts_by_its_first_token_after_the_prompt(llm):
    whole, first = " moonlight", " moon"
    assert first_of(llm, whole) > first_of(llm, first) == 1
    assert llm.choose(prompts(), [[whole], ["b"]]) == llm.choose(prompts(), [[first, whole], ["b"]])


def test_the_model_abstains_when_no_option_is_among_its_likeliest_tokens(llm):
    _, logprobs = naive_logprobs(llm, prompts()[0])
    words = [word for word in llm._tokenizer.get_vocab() if word.isalpha() and first_of(llm, word) == 1]
    order = logprobs[-1].argsort(descending=True).tolist()
    rank = {word: order.index(token) for word, token in zip(words, ids(llm, words), strict=True)}
    unlikely = sorted((word for word in words if rank[word] >= 20), key=rank.get)
    likely = next(word for word in words if rank[word] < 20)
    assert llm.choose(prompts()[:1], [[unlikely[0]], [unlikely[1]]]) == [None]
    answer = llm.choose(prompts()[:1], [[likely], [unlikely[0]]])[0]
    assert answer is not None and answer[0] > answer[1] > 0


def ids(llm: TransformersLLM, words: list[str]) -> list[int]:
    return llm._tokenizer.convert_tokens_to_ids(words)


def first_of(llm: TransformersLLM, word: str) -> int:
    """Tokens that a word takes right after a prompt."""
    return len(llm._tokenizer("query:" + word)["input_ids"]) - len(llm._tokenizer("query:")["input_ids"])


def test_options_that_start_with_the_same_token_are_an_error(llm):
    with pytest.raises(LLMError, match="cannot be told from the others by its first token"):
        llm.choose(prompts(), [[" the red"], [" the tree"]])


def test_a_prompt_longer_than_the_window_is_named(llm):
    long = "x " * 600
    with pytest.raises(LLMError, match=r"prompt 2 of 2 \('x x .*…\) has \d+ tokens; at most 500 fit into tiny-"):
        llm.complete([SHOTS, long], **sampling(2))
    with pytest.raises(LLMError, match=r"prompt 1 of 1 .* at most 512 fit"):
        llm.score([long], [" red"])


def test_nothing_is_loaded_before_the_first_question(tmp_path):
    llm = load_llm(LLMConfig(model=str(tmp_path / "gone" / "model-x")))
    assert isinstance(llm, TransformersLLM) and llm.name == "model-x"
    with pytest.raises(LLMError, match=r"cannot load '.*model-x' as a causal language model: .+; llm\.model takes"):
        llm.complete(["a"], **sampling(1))


def test_a_name_holds_no_path_of_the_machine(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(folders["llama"].parent)
    names = ["tiny-llama", str(folders["llama"]), "./tiny-llama", "~/models/x.gguf", "org/model", "package:some_gguf"]
    found = [TransformersLLM(LLMConfig(model=name)).name for name in names]
    assert re.fullmatch("tiny-llama@[0-9a-f]{8}", found[0])
    assert found == [found[0]] * 3 + ["x.gguf", "org/model", "package:some_gguf"]


def test_local_models_of_one_name_never_share_answers(folders, tmp_path):
    def name(path):
        return TransformersLLM(LLMConfig(model=str(path))).name

    places = [tmp_path / place / "tiny-llama" for place in ("moved", "tuned", "other tokenizer")]
    for place in places:
        shutil.copytree(folders["llama"], place)
    moved, tuned, other = places
    (moved / "README.md").write_text("Not part of the model.")
    (tuned / "model.safetensors").write_bytes(bytes(reversed((tuned / "model.safetensors").read_bytes())))
    (other / "tokenizer_config.json").write_text("{}")
    assert name(moved) == name(folders["llama"])
    assert len({name(place) for place in places}) == 3


def test_wrong_settings_are_named(folders, tmp_path):
    with pytest.raises(LLMError, match=r"llm\.dtype must be one of auto, float32"):
        TransformersLLM(LLMConfig(model=str(folders["llama"]), dtype="int4")).complete(["a"], **sampling(1))
    with pytest.raises(ConfigError, match="not installed"):
        TransformersLLM(LLMConfig(model="package:no_such_package")).complete(["a"], **sampling(1))
    with pytest.raises(LLMError, match="no GGUF file at"):
        TransformersLLM(LLMConfig(model=str(tmp_path / "no.gguf"))).complete(["a"], **sampling(1))


def test_an_endpoint_takes_the_place_of_a_local_model():
    assert isinstance(load_llm(LLMConfig(endpoint="http://localhost:1")), EndpointLLM)


def test_a_model_without_a_chat_template_completes_and_its_identity_is_its_name(folders):
    llm = TransformersLLM(LLMConfig(model=str(folders["llama"])))
    assert llm.identity == llm.name
    prompt = Prompt("short.jinja", "passage: {{ passage }} query:").render(passage="a bird lives in the old tree")
    assert llm.reads(prompt) == str(prompt)
    answers = llm.complete([prompt, str(prompt)], **sampling(2, seeds=[4, 4]))
    assert answers[0] == answers[1]  # the turns that the prompt also has do not matter
    with pytest.raises(LLMError, match=r"has no chat template, and llm\.chat is true: set llm\.chat=false"):
        _ = TransformersLLM(LLMConfig(model=str(folders["llama"]), chat=True)).identity
