from pathlib import Path

import pytest

import lce_trainer.synthesis.prompts
from helpers.paths import ROOT
from lce_trainer.errors import PromptError
from lce_trainer.synthesis.prompts import load_prompt


def write(path: Path, source: str) -> str:
    path.write_text(source, encoding="utf-8")
    return str(path)


def test_the_name_prompts_is_the_module_not_the_folder_beside_it():
    assert lce_trainer.synthesis.prompts.__file__ == str(ROOT / "lce_trainer" / "synthesis" / "prompts" / "__init__.py")


@pytest.mark.parametrize("name", ["query", "likelihood"])
def test_a_writing_prompt_shows_the_examples_and_then_the_passage(name):
    prompt = load_prompt(name)
    mine = prompt.render(passage="P", examples=[{"passage": "E", "query": "Q"}])
    assert mine == "Passage: E\nSearch query: Q\n\nPassage: P\nSearch query:"
    default = prompt.render(passage="P", examples=[])
    assert default.endswith("\n\nPassage: P\nSearch query:")
    assert default.count("Passage:") >= 3


def test_the_verdict_prompt_ends_where_yes_or_no_comes_next():
    text = load_prompt("verdict").render(query="Q", passage="P", examples=[])
    assert text.endswith("\n\nQuery: Q\nPassage: P\nDoes the passage answer the query?")
    assert text.count("? Yes\n") == text.count("? No\n") >= 1  # as many of one as of the other


def test_the_pairwise_prompt_ends_where_a_letter_comes_next_and_favours_none():
    text = load_prompt("pairwise").render(query="Q", first="P", second="R", examples=[])
    assert text.endswith("\n\nQuery: Q\nPassage A: P\nPassage B: R\nBetter passage:")
    assert text.count("passage: A\n") == text.count("passage: B\n") == 2


def test_verdict_examples_are_yours_when_you_give_some():
    examples = [{"query": "A", "passage": "B", "answer": "Yes"}]
    text = load_prompt("verdict").render(query="Q", passage="P", examples=examples)
    assert text.startswith("Query: A\nPassage: B\nDoes the passage answer the query? Yes\n\nQuery: Q")


def test_markup_in_a_passage_is_neither_escaped_nor_run():
    passage = "<b>R&D</b> {{ 7 * 7 }} {% raw %}"
    assert passage in load_prompt("query").render(passage=passage, examples=[])


@pytest.mark.parametrize(
    ("source", "place", "says"),
    [
        ("one\n{{ nobody }}\n", ":2: ", "'nobody' is undefined"),
        ("{{ passage.nothing }}", ":1: ", "has no attribute 'nothing'"),
        ("a\nb\n{{ 1 + passage }}", ":3: ", "unsupported operand"),
        ("a\n{{ passage.__class__.__mro__ }}", ":2: ", "unsafe"),
        ("a\n{% include 'etc/passwd' %}", ":2: ", "no loader"),
    ],
)
def test_a_template_that_fails_names_its_file_and_line(tmp_path, source, place, says):
    path = write(tmp_path / "mine.jinja", source)
    with pytest.raises(PromptError, match=says) as caught:
        load_prompt(path).render(passage="P")
    assert str(caught.value).startswith(path + place)
    assert "\n" not in str(caught.value)


def test_wrong_syntax_names_file_and_line_before_anything_is_rendered(tmp_path):
    path = write(tmp_path / "mine.jinja", "one\n{% for a in b %}\n{{ a \n")
    with pytest.raises(PromptError, match=r"mine\.jinja:3: "):
        load_prompt(path)


def test_a_path_is_found_as_written_and_then_beside_the_recipe(tmp_path, monkeypatch):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "here").mkdir()
    write(tmp_path / "recipe" / "p.jinja", "recipe")
    monkeypatch.chdir(tmp_path / "here")
    assert load_prompt("p.jinja", tmp_path / "recipe").render() == "recipe"
    write(tmp_path / "here" / "p.jinja", "here")
    assert load_prompt("p.jinja", tmp_path / "recipe").render() == "here"


def test_an_unknown_prompt_is_answered_with_the_known_ones(tmp_path):
    with pytest.raises(PromptError, match="likelihood, pairwise, query, styled, verdict"):
        load_prompt("querry")
    with pytest.raises(PromptError, match=r"no prompt at .*gone\.jinja: No such file"):
        load_prompt(str(tmp_path / "gone.jinja"))
    (tmp_path / "latin.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(PromptError, match="not UTF-8"):
        load_prompt(str(tmp_path / "latin.jinja"))


def test_the_digest_is_of_the_source_alone(tmp_path):
    one = load_prompt(write(tmp_path / "one.jinja", "same"))
    assert one.digest == load_prompt(write(tmp_path / "two.jinja", "same")).digest == "0967115f2813a354"
    assert one.digest != load_prompt(write(tmp_path / "three.jinja", "other")).digest
