"""Whatever comes in, nothing comes out but a result that holds what it promises, or one of our errors in one line.

Each property is tried on 50 drawn cases, and by ``make test-slow`` on some 100,000 in all.
"""

import json
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lce_trainer.errors import ArtifactError, ConfigError, EvaluationError, LCETrainerError, LLMError, PromptError
from lce_trainer.evaluation.metrics import ranking_metrics
from lce_trainer.pipeline.config import Recipe, load_recipe
from lce_trainer.synthesis.journal import Journal
from lce_trainer.synthesis.llm.endpoint import EndpointLLM
from lce_trainer.synthesis.llm.protocol import LLMConfig
from lce_trainer.synthesis.prompts import Prompt, load_prompt
from lce_trainer.synthesis.queries import clean_query

SHORT = 50

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
SECTIONS = [item.name for item in fields(Recipe)]
KEYS = ["source", "queries", "top_k", "model", "learning_rate", "warm_start", "pairs", "lora", "r", "judge", "seed"]
recipes = st.dictionaries(
    st.sampled_from(SECTIONS) | st.text(max_size=8),
    scalars | st.dictionaries(st.sampled_from(KEYS) | scalars, json_values, max_size=4),
    max_size=4,
)
yaml_text = (
    st.text(max_size=80)
    | st.text(alphabet="seed:{}[]&*!<>|-? \n\t'\"0123456789e.#%@,~", max_size=80)
    | recipes.map(lambda value: yaml.dump(value, allow_unicode=True))
)
overrides = st.lists(
    st.builds("{}.{}={}".format, st.sampled_from(SECTIONS), st.sampled_from(KEYS), yaml_text), max_size=2
)
ids = st.text(st.characters(), max_size=6) | st.sampled_from(["a", "b", "c", "1", "01"])
figures = st.floats() | st.integers(-(10**12), 10**12)
grades = st.integers(0, 5) | figures


def one_line(error: LCETrainerError) -> None:
    assert str(error).strip()


def a_recipe_is_read_or_refused(folder: Path) -> Callable[..., None]:
    path = folder / "recipe.yaml"

    @given(yaml_text, overrides)
    def check(text: str, changes: list[str]) -> None:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            assert isinstance(load_recipe(path, changes, ["learning_rate", "seed"]), Recipe)
        except ConfigError as error:
            one_line(error)

    return check


def metrics_lie_between_0_and_1(folder: Path) -> Callable[..., None]:
    runs = st.dictionaries(ids, st.dictionaries(ids, figures, max_size=5), max_size=3)
    qrels = st.dictionaries(ids, st.dictionaries(ids, grades, max_size=5), max_size=3)

    @given(runs, qrels, st.integers(-2, 5))
    def check(run: Any, judged: Any, relevant_from: int) -> None:
        try:
            found = ranking_metrics(run, judged, relevant_from=relevant_from)
        except EvaluationError as error:
            one_line(error)
            return
        for by_query in found.values():
            assert set(by_query) == {query_id for query_id, of in judged.items() if of}
            assert all(0 <= value <= 1 for value in by_query.values())

    return check


def a_template_renders_or_is_refused(folder: Path) -> Callable[..., None]:
    sources = st.text(max_size=60) | st.text(alphabet="{}%# passagequeryexm.[]()|+-*/'\"_01\n", max_size=60)

    @given(sources, st.text(max_size=30))
    def check(source: str, passage: str) -> None:
        try:
            assert isinstance(Prompt("mine.jinja", source).render(passage=passage, query="q", examples=[]), str)
        except PromptError as error:
            one_line(error)

    return check


def a_passage_stands_in_its_prompt_as_it_is_or_escaped(folder: Path) -> Callable[..., None]:
    prompts = [load_prompt(name, folder) for name in ("query", "likelihood", "verdict")]

    @given(st.text(max_size=60))
    def check(passage: str) -> None:
        for prompt in prompts:
            first = prompt.render(passage=passage, query="what", examples=[])
            assert first == prompt.render(passage=passage, query="what", examples=[])
            assert isinstance(first, str) and "what"[: len(first)]

    return check


def a_completion_becomes_one_line_of_text(folder: Path) -> Callable[..., None]:
    @given(st.text(st.characters(), max_size=80) | st.text(alphabet="\"'`*[]<>“”„-•1.) qQuery:\n\ud83d", max_size=40))
    def check(completion: str) -> None:
        query = clean_query(completion)
        assert "\n" not in query and query == query.strip()
        query.encode()

    return check


def a_journal_cut_anywhere_keeps_what_is_whole(folder: Path) -> Callable[..., None]:
    path = folder / "journal.jsonl"
    plain = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=5,
    )

    @given(st.lists(st.dictionaries(ids, plain, min_size=1, max_size=3), max_size=4), st.floats(0, 1))
    def check(records: list[dict[str, Any]], part: float) -> None:
        path.unlink(missing_ok=True)
        with Journal(path) as journal:
            for record in records:
                journal.append(record, sync=False)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * part)])
        lines = path.read_bytes().count(b"\n")
        with Journal(path) as journal:
            wanted: dict[str, Any] = {}
            for record in records[:lines]:
                wanted |= record
            assert {key: journal[key] for key in wanted} == wanted and len(journal) == len(wanted)

    return check


def a_journal_of_anything_opens_or_is_refused(folder: Path) -> Callable[..., None]:
    path = folder / "journal.jsonl"
    lines = json_values.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40)

    @given(st.lists(lines, max_size=4))
    def check(content: list[bytes]) -> None:
        path.write_bytes(b"\n".join(content))
        try:
            with Journal(path) as journal:
                assert len(journal) == 0
        except ArtifactError as error:
            one_line(error)

    return check


class Anything(BaseHTTPRequestHandler):
    """Replies with whatever the server is to reply with now."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        status, body = self.server.reply  # type: ignore[attr-defined]
        try:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            pass

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Anything)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


tokens = st.fixed_dictionaries(
    {"text": st.text(max_size=4), "token": st.text(max_size=4), "logprob": scalars, "id": scalars}
)
answers = (
    json_values
    | st.lists(st.fixed_dictionaries({"generated_text": scalars, "details": json_values}), min_size=1, max_size=1)
    | st.lists(
        st.fixed_dictionaries(
            {
                "generated_text": st.text(max_size=8),
                "details": st.fixed_dictionaries(
                    {"top_tokens": st.lists(st.lists(tokens, max_size=2), max_size=2), "prefill": st.lists(tokens)}
                ),
            }
        ),
        min_size=1,
        max_size=1,
    )
    | st.fixed_dictionaries(
        {
            "choices": st.lists(
                st.fixed_dictionaries(
                    {
                        "message": st.fixed_dictionaries({"content": scalars}),
                        "logprobs": st.fixed_dictionaries({"content": st.lists(json_values | tokens, max_size=2)}),
                    }
                ),
                max_size=2,
            )
        }
    )
)
replies = st.tuples(
    st.sampled_from([200, 200, 200, 400, 404, 422]),
    answers.map(lambda answer: json.dumps(answer).encode()) | st.binary(max_size=40),
)


def check_endpoint(server: ThreadingHTTPServer, examples: int) -> None:
    impatient = {name: 0.01 for name in ("patience",) if name in {item.name for item in fields(LLMConfig)}}

    def connect(path: str) -> EndpointLLM:
        url = f"http://127.0.0.1:{server.server_port}{path}"
        return EndpointLLM(LLMConfig(model="org/m", endpoint=url, retries=1, timeout=5, **impatient))

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(replies, st.sampled_from(["", "/v1"]), st.sampled_from(["complete", "choose", "score"]))
    def check(reply: tuple[int, bytes], path: str, what: str) -> None:
        server.reply = reply  # type: ignore[attr-defined]
        llm = connect(path)
        try:
            if what == "complete":
                sampling = {"max_new_tokens": 3, "temperature": 0.0, "top_p": 1.0, "seeds": [1], "stop": ["\n"]}
                (text,) = llm.complete(["p"], **sampling)
                assert text is None or "\n" not in text
            elif what == "choose":
                (shares,) = llm.choose(["p"], [[" yes"], [" no"]])
                assert shares is None or (len(shares) == 2 and math.isclose(sum(shares), 1))
            else:
                (score,) = llm.score(["p"], [" q"])
                assert isinstance(score, float)
        except LLMError as error:
            one_line(error)

    check()


PROPERTIES = {
    a_recipe_is_read_or_refused: 25_000,
    metrics_lie_between_0_and_1: 25_000,
    a_template_renders_or_is_refused: 20_000,
    a_passage_stands_in_its_prompt_as_it_is_or_escaped: 5_000,
    a_completion_becomes_one_line_of_text: 20_000,
    a_journal_cut_anywhere_keeps_what_is_whole: 3_000,
    a_journal_of_anything_opens_or_is_refused: 3_000,
}


def run(property_of: Callable[[Path], Callable[..., None]], examples: int, folder: Path) -> None:
    more = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
    settings(max_examples=examples, **more)(property_of(folder))()


@pytest.mark.parametrize("property_of", PROPERTIES, ids=lambda function: function.__name__)
def test_no_drawn_case_breaks_the_property(property_of, tmp_path):
    run(property_of, SHORT, tmp_path)


def test_whatever_a_server_replies_is_an_answer_or_one_line(server):
    check_endpoint(server, SHORT)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("property_of", PROPERTIES, ids=lambda function: function.__name__)
def test_no_case_of_many_breaks_the_property(property_of, tmp_path):
    run(property_of, PROPERTIES[property_of], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_whatever_a_server_replies_thousands_of_times_is_an_answer_or_one_line(server):
    check_endpoint(server, 5_000)
