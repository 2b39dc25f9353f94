import numpy as np
import pytest

from helpers.fake_llm import FakeLLM
from helpers.queries import FILLER, build_passages, generate, plan
from lce_trainer.artifacts import digest
from lce_trainer.errors import ConfigError, DataError, LLMError
from lce_trainer.synthesis.examples import Example, check_not_evaluated, draw_examples, find_passages, read_examples
from lce_trainer.synthesis.filters import near_duplicates
from lce_trainer.synthesis.gauge import Sourced, gauge, mix_styles, overlap
from lce_trainer.synthesis.prompts import Prompt, load_prompt
from lce_trainer.synthesis.queries import GenerateConfig, check_styles, prompt_name
from lce_trainer.synthesis.styles import WRITTEN, assign_styles, misspell, read_styles

STYLED = Prompt("styled.jinja", "{{ style }} by {{ persona }}. Passage: {{ passage }}\nQuery:")


class Echo(FakeLLM):
    """Writes what it was given as style, and the topic of the passage."""

    def complete(self, prompts, *, seeds, **more):
        self.asked += [(prompt,) for prompt in prompts]
        return [f"{prompt.split()[0]} of {prompt.split('Passage: ')[1].split()[0]}" for prompt in prompts]


class Scores:
    """Knows whether the query names the passage's topic."""

    def key(self, query, passage):
        return digest(["scores", query, passage])

    def score(self, pairs, each=None):
        return [float(passage.split(" ")[0] in query.split()) for query, passage in pairs]


def test_without_styles_prompt_and_journal_are_those_of_before(tmp_path):
    shots = load_prompt("query").render(passage="A passage.", examples=[])
    mine = load_prompt("query").render(passage="A passage.", examples=[{"passage": "One.", "query": "what is one"}])
    assert (digest(str(shots)), digest(str(mine))) == DIGESTS
    passages = build_passages(3)
    generate(tmp_path, passages, FakeLLM(completions=plan(passages)), GenerateConfig(queries=3))
    assert [key in (tmp_path / "journal.jsonl").read_text() for key in KEYS] == [True] * 3


@pytest.mark.parametrize("style", WRITTEN)
def test_each_style_has_a_line_and_examples_of_its_own(style):
    prompt = load_prompt("styled")
    frames = {one: str(prompt.render(passage="P", examples=[], style=one)).splitlines() for one in WRITTEN}
    others = [frames[one] for one in WRITTEN if one != style]
    assert all(frames[style][0] != other[0] and frames[style][-1] != other[-1] for other in others)
    assert "Searched by: a nurse" in prompt.render(passage="P", examples=[], style=style, persona="a nurse")


@pytest.mark.parametrize("style", WRITTEN)
def test_a_chat_is_given_the_same_style_persona_and_queries_as_a_text(style):
    def turns(style, **more):
        return load_prompt("styled").render(passage="P", examples=[], style=style, **more).turns

    plain = turns(style)
    assert [turn["role"] for turn in plain] == ["user", "assistant"] * 3 + ["user"]
    for other in set(WRITTEN) - {style}:
        assert all(one["content"] != another["content"] for one, another in zip(plain, turns(other), strict=True))
    text = str(load_prompt("styled").render(passage="P", examples=[], style=style))
    assert all(f": {turn['content']}\n" in text for turn in plain[1::2])  # the same examples
    last = turns(style, persona="a nurse", queries=["night shift rota"])[-1]["content"]
    assert "The person is a nurse" in last and "- night shift rota" in last
    assert "The person is" not in plain[-1]["content"] and "queries like these" not in plain[-1]["content"]
    own = [{"passage": "One.", "query": "what is one"}]
    assert load_prompt("styled").render(passage="P", examples=own, style=style).turns[1]["content"] == "what is one"


def test_without_a_style_the_styled_prompt_gives_the_examples_of_the_plain_one():
    def shots(name, **more):
        return [turn["content"] for turn in load_prompt(name).render(passage="P", examples=[], **more).turns[1::2]]

    assert shots("styled", persona="a nurse") == shots("query")
    assert str(load_prompt("styled").render(passage="P", examples=[])).endswith("Passage: P\nSearch query:")


def test_the_styled_prompt_stands_in_only_where_it_is_needed():
    alone, answered = Example("q", "row 1"), Example("q", "row 1", passage="One.")
    assert prompt_name(GenerateConfig(), [answered]) == "query"
    assert prompt_name(GenerateConfig(), [alone]) == "styled"
    assert prompt_name(GenerateConfig(styles={"keyword": 1})) == prompt_name(GenerateConfig(styles="auto")) == "styled"
    assert prompt_name(GenerateConfig(personas=["a nurse"])) == "styled"
    assert prompt_name(GenerateConfig(prompt="my.jinja", styles={"keyword": 1})) == "my.jinja"


def test_a_claim_of_an_instruct_model_is_no_answer_and_a_sentence_no_refusal(tmp_path):
    said = {
        "question": "The topic is one of those that are alpha and bravo.",
        "claim": "The topic is one of those that are alpha and bravo.",
        "sentence": "I can't find out what the topic is about",
        "keyword": "Sure, here is a search query for it:",
    }

    class Chat(Echo):
        def reads(self, prompt):
            return [{"role": "user", "content": str(prompt)}]

        def complete(self, prompts, **more):
            return [f"{said[prompt.split()[0]]}" for prompt in prompts]

    prompt = Prompt("styled.jinja", "{{ style }} of: Passage: {{ passage }}\nQuery:")
    for style, kept in (("question", 0), ("claim", 1), ("sentence", 1), ("keyword", 0)):
        config = GenerateConfig(queries=1, styles={style: 1}, roundtrip_k=0)
        try:
            _, counts, _ = generate(tmp_path / style, build_passages(1), Chat(), config, prompt=prompt)
        except LLMError as error:
            assert kept == 0 and "1 reply" in str(error)
        else:
            assert (kept, counts["dropped_reply"]) == (1, 0)


def test_every_first_part_of_the_queries_has_the_proportions_of_the_whole():
    weights = {"keyword": 2.0, "question": 1.0, "claim": 0.5}
    styles = assign_styles(weights, 350)
    for count in range(1, 351):
        for style, weight in weights.items():
            assert abs(styles[:count].count(style) - count * weight / 3.5) < 1.5
    assert assign_styles(weights, 100) == styles[:100]
    assert assign_styles({"keyword": 1.0, "question": 1.0}, 4) == ["keyword", "question"] * 2


@pytest.mark.parametrize(
    ("styles", "message"),
    [
        ({"keywords": 1}, "did you mean 'keyword'"),
        ({"keyword": -1}, "must be a weight"),
        ({"keyword": True}, "must be a weight"),
        ({"misspelled": 1}, "gives no weight to a style that the LLM writes"),
    ],
)
def test_styles_that_cannot_be_are_refused(styles, message):
    with pytest.raises(ConfigError, match=message):
        read_styles(styles)


def test_styles_and_personas_are_written_in_turn_and_misspelled_copies_are_added(tmp_path):
    passages = build_passages(40)
    styles = {"keyword": 1, "question": 1, "misspelled": 1}
    config = GenerateConfig(queries=40, per_passage=2, styles=styles, personas=["nurse", "clerk"], roundtrip_k=0)
    llm = Echo()
    queries, counts, facts = generate(tmp_path, passages, llm, config, prompt=STYLED)
    found = queries["style"][:]
    assert (found.count("keyword"), found.count("question")) == (40, 40)
    assert found.count("misspelled") == counts["misspelled"] and 25 <= counts["misspelled"] <= 55
    assert facts["styles"] == {"keyword": 1.0, "question": 1.0, "misspelled": 1.0}
    asked = [prompt.partition(".")[0] for (prompt,) in llm.asked]
    assert {asked.count(f"{style} by {who}") for style in ("keyword", "question") for who in ("nurse", "clerk")} == {20}
    assert len(set(queries["query_id"])) == len(queries)


def test_a_prompt_that_does_not_use_what_is_set_is_refused(tmp_path):
    config = GenerateConfig(queries=3, styles={"keyword": 1})
    with pytest.raises(ConfigError, match=r"generate.styles needs a prompt that uses \{\{ style \}\}"):
        generate(tmp_path, build_passages(3), FakeLLM(), config)


def test_examples_of_a_style_that_is_not_known_are_refused():
    for config, examples in (
        (GenerateConfig(examples=[{"query": "q", "passage": "p", "style": "poem"}]), []),
        (GenerateConfig(), [Example("q", "own.jsonl, row 1", style="poem")]),
    ):
        with pytest.raises(ConfigError, match=r"(generate.examples|own.jsonl, row 1): there is no style 'poem'"):
            check_styles(config, load_prompt("styled"), examples)


def test_a_misspelled_query_differs_by_one_slip_and_is_the_same_for_a_seed():
    made = {misspell("convert numbers to text", 3, number) for number in range(200)}
    assert misspell("convert numbers to text", 3) == misspell("convert numbers to text", 3)
    assert len(made) > 30 and "convert numbers to text" not in made
    for slip in made:
        words = list(zip(slip.split(), ["convert", "numbers", "to", "text"], strict=True))
        changed = [(new, old) for new, old in words if new != old]
        assert len(changed) == 1 and changed[0][0][0] == changed[0][1][0]
        assert abs(len(changed[0][0]) - len(changed[0][1])) <= 1
    assert misspell("a b 1234 get_it", 0) is None and misspell("日本語検索", 0) is None


def test_near_duplicates_are_those_that_comparing_all_pairs_finds():
    rng = np.random.default_rng(0)
    queries = [" ".join(rng.choice(FILLER, rng.integers(1, 7))) for _ in range(300)]
    for threshold in (0.5, 0.8, 1.0):
        kept, dropped = [], []
        for item, query in enumerate(queries):
            words = set(query.split())
            near = any(len(words & other) / len(words | other) >= threshold - 1e-9 for other in kept)
            dropped.append(item) if near else kept.append(words)
        assert near_duplicates(queries, threshold) == dropped


def test_each_filter_that_is_on_counts_what_it_drops(tmp_path):
    passages = build_passages(6)
    answers = [
        "what is topic0",
        "what topic1 is there",
        "is there what topic1",
        "alpha of that",
        "what is topic4",
        "is so",
    ]
    llm = FakeLLM(completions=plan(passages, lambda i: [answers[i]]))
    off = GenerateConfig(queries=6, roundtrip_k=0)
    _, counts, facts = generate(tmp_path, passages, llm, off)
    assert counts["kept"] == 6 and not {"dropped_vague", "dropped_unlikely"} & set(counts) and facts["dropped"] == {}
    on = GenerateConfig(queries=6, roundtrip_k=0, max_jaccard=1.0, max_ties=2, min_gain=0.5)
    queries, counts, facts = generate(tmp_path, passages, llm, on, likelihood=Scores())
    assert counts["dropped_near_duplicate"] == 1
    assert counts["dropped_vague"] + counts["dropped_unlikely"] >= 1
    assert counts["kept"] + sum(n for name, n in counts.items() if name.startswith("dropped_")) == 6
    assert "what is topic0" in queries["query"][:] and "alpha of that" not in queries["query"][:]
    assert all(facts["dropped"][name] for name in facts["dropped"])
    strict = GenerateConfig(queries=6, roundtrip_k=0, min_answerable=0.5)
    _, counts, _ = generate(tmp_path, passages, llm, strict, verdict=Scores())
    assert counts["dropped_unanswerable"] >= 2


def test_the_users_own_queries_become_examples(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text(
        '{"query": "how far", "doc_id": "d1"}\n{"query": "how near", "passage": "Near."}\n{"query": "so"}\n'
    )
    passages = build_passages(4)
    passages = passages.add_column("doc_id", ["d0", "d1", "d1", "d3"])
    first, second, third = find_passages(read_examples(file), passages)
    assert (first.passage_id, second.passage, third.passage) == ("p1", "Near.", None)
    file.write_text('{"query": "how far", "doc_id": "d9"}\n')
    with pytest.raises(DataError, match=r"own.jsonl, row 1: the corpus has no document 'd9'"):
        find_passages(read_examples(file), passages)


def test_of_many_examples_others_are_drawn_for_each_passage_and_never_its_own(tmp_path):
    passages = build_passages(12)
    own = [Example(f"own{i}", "row", text, passage_id=f"p{i}") for i, text in enumerate(passages["text"])]
    llm = FakeLLM()
    llm.complete = lambda prompts, **more: llm.asked.extend(prompts) or ["what is it"] * len(prompts)
    generate(tmp_path, passages, llm, GenerateConfig(queries=12, n_examples=3, roundtrip_k=0), examples=own)
    sets = [frozenset(word for word in prompt.split() if word.startswith("own")) for prompt in llm.asked]
    assert {len(some) for some in sets} == {3} and len(set(sets)) > 6
    for prompt, some in zip(llm.asked, sets, strict=True):
        assert f"own{prompt.partition('Passage: topic')[2].split()[0]}" not in some
    assert draw_examples(own, 20, 0) == own


def test_an_example_that_is_evaluated_on_is_refused():
    with pytest.raises(ConfigError, match=r"row 1: the example query 'How far\?' is also in evaluate.queries"):
        check_not_evaluated([("How far?", "row 1")], {"evaluate.queries": ["how FAR"]})
    check_not_evaluated([("how near", "row 1")], {"evaluate.queries": ["how far"]})


def test_the_gauge_is_half_for_the_same_kind_and_one_for_another():
    rng = np.random.default_rng(1)

    def some(n, end=""):
        return [Sourced(" ".join(rng.choice(FILLER, 5)) + end, ["alpha bravo charlie"]) for _ in range(n)]

    same, other = gauge(some(80), some(80), 0), gauge(some(80), some(80, "?"), 0)
    assert abs(same["auc"] - 0.5) < 0.12 and same["auc_low"] <= 0.5 <= same["auc_high"]
    assert other["auc"] > 0.99 and other["features"]["with a question mark"] == [0.0, 1.0]
    assert gauge([], some(9), 0) == {"available": False, "reason": "no own queries given: gauge not available"}
    assert not gauge(some(3), some(9), 0)["available"]


def test_the_mix_is_that_which_the_queries_were_drawn_from():
    styles = {
        "keyword": [Sourced("alpha", ["alpha"])] * 10,
        "question": [Sourced("alpha bravo charlie delta echo?", ["golf"])] * 10,
        "sentence": [Sourced("alpha bravo charlie delta echo foxtrot golf hotel india juliet", ["alpha bravo"])] * 10,
        "claim": [],
    }
    own = styles["keyword"] * 3 + styles["question"] * 7
    assert mix_styles(own, styles) == {"keyword": 0.3, "question": 0.7, "sentence": 0.0, "claim": 0.0}
    assert overlap("alpha bravo", ["alpha", "golf"]) == 0.5


def test_auto_writes_in_the_style_of_the_dev_queries(tmp_path):
    passages = build_passages(60)
    own = [Sourced(f"question of topic{i}", [f"topic{i}"]) for i in range(10)]

    class Styles(Echo):
        def complete(self, prompts, **more):
            texts = super().complete(prompts, **more)
            return [f"{text} " + "golf " * 12 if not text.startswith("question") else text for text in texts]

    prompt = Prompt("styled.jinja", "{{ style }}: Passage: {{ passage }}\nQuery:")
    config = GenerateConfig(queries=60, styles="auto", roundtrip_k=0)
    llm = Styles()
    complete = llm.complete
    llm.complete = lambda prompts, **more: [text.replace(":", "") for text in complete(prompts, **more)]
    queries, _, facts = generate(tmp_path, passages, llm, config, prompt=prompt, own=own)
    assert facts["styles"] == {"question": 1.0} and set(queries["style"]) == {"question"}
    with pytest.raises(ConfigError, match=r"evaluate\.dev_queries, and the recipe names none"):
        generate(tmp_path, passages, llm, config, prompt=prompt)


DIGESTS = ("4e2d3216d8454025", "1ce91110ac0dcd2f")
KEYS = ("4f01d52de9dbf9d7", "a127dca1a01b1b9f", "cb3f718c2318a529")
