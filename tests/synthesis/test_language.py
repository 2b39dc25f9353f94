"""Languages: no character is lost, no sentence is cut that can stay whole, and a word index finds what is there."""

from pathlib import Path

import datasets
import pytest

from lce_trainer.errors import ConfigError
from lce_trainer.synthesis.corpus import CorpusConfig, build_passages, clean_text, split_passages
from lce_trainer.synthesis.language import count_words, detect_language, find_language, index_words, sentences
from lce_trainer.synthesis.retrieval.bm25 import BM25Index

TEXTS = {
    "zh": "月亮是地球的卫星。它绕着地球转，大约二十七天转一圈！潮汐是由月亮的引力引起的吗？是的，主要是月亮。",
    "ja": "月は地球の衛星です。月は地球の周りを約二十七日で一周します。潮の満ち引きは月の引力によって起こります。",
    "th": "ดวงจันทร์เป็นบริวารของโลก ดวงจันทร์โคจรรอบโลกในเวลาประมาณยี่สิบเจ็ดวัน น้ำขึ้นน้ำลงเกิดจากดวงจันทร์",
    "de": "Der Mond ist ein Satellit der Erde. Er umkreist sie in etwa 27 Tagen. Die Gezeiten entstehen durch ihn.",
    "ru": "Луна является спутником Земли. Она обращается вокруг Земли за 27 дней. Приливы вызваны притяжением Луны.",
    "ar": "القمر هو التابع الطبيعي للأرض. يدور القمر حول الأرض في سبعة وعشرين يوما. هل تحدث المد والجزر بسببه؟ نعم.",
    "hi": "चंद्रमा पृथ्वी का उपग्रह है। यह सत्ताईस दिनों में चक्कर लगाता है। ज्वार भाटा चंद्रमा के कारण होता है।",
    "en": "The moon is a satellite of the earth. It goes around it in about 27 days. The tides come from the moon.",
}
# A query with a word as the text has it not, where the language bends words; and a text that it must not find first.
QUERIES = {
    "zh": "潮汐的原因", "ja": "潮の満ち引き", "th": "น้ำขึ้นน้ำลง", "de": "Satelliten", "ru": "спутники", "ar": "القمر",
    "hi": "उपग्रह", "en": "satellites",
}  # fmt: skip
OTHERS = {
    "zh": "沙漠里很少下雨。", "ja": "砂漠では雨がほとんど降りません。", "th": "ในทะเลทรายฝนตกน้อยมาก",
    "de": "In der Wüste regnet es.", "ru": "В пустыне редко идёт дождь.", "ar": "نادرا ما تمطر في الصحراء.",
    "hi": "रेगिस्तान में बारिश कम होती है।",
    "en": "In the desert it rarely rains.",
}  # fmt: skip


@pytest.mark.parametrize("code", TEXTS)
def test_a_language_is_detected_and_called_by_code_or_name(code):
    found = detect_language([TEXTS[code]])
    assert found.code == code
    assert find_language(found.name) == find_language(code.upper()) == found


def test_what_a_word_index_needs_of_a_language():
    assert [find_language(code).stemmer for code in ("en", "de", "ru", "ar", "hi", "zh", "ja", "th")] == [
        "english", "german", "russian", "arabic", "hindi", None, None, None,
    ]  # fmt: skip
    assert [find_language(code).stopwords for code in ("en", "de", "hi", "zh")] == ["english", "german", None, None]
    assert find_language("nb").stemmer == "norwegian" and find_language("pt-BR").name == "Portuguese"
    with pytest.raises(ConfigError, match=r"corpus\.language: 'Germann' is no language .* did you mean 'german'"):
        find_language("Germann")


def test_every_stemmer_and_list_of_stopwords_is_there(tmp_path):
    for code in ("en", "de", "ru", "ar", "hi", "zh", "nb", "ta", "el", "hu", "tr", "da", "ne", "eu", "yi", "sr", "ga"):
        language = find_language(code)
        table = datasets.Dataset.from_dict({"text": ["ein zwei drei"]})
        index = BM25Index.build(table, tmp_path / code, stemmer=language.stemmer, stopwords=language.stopwords)
        assert len(index) == 1


def test_little_text_is_english_and_that_is_logged(caplog):
    assert detect_language(["rain"]).code == "en"
    assert "too little text to detect its language" in caplog.text
    assert detect_language(["月は地球の衛星です。"]).code == "ja"


@pytest.mark.parametrize("code", TEXTS)
@pytest.mark.parametrize("max_words", [1, 3, 10, 150])
def test_no_character_is_lost(code, max_words):
    text = TEXTS[code]
    pieces = list(sentences(text, max_words))
    assert "".join(pieces) == text
    passages = split_passages(text, max_words, 0)
    assert "".join("".join(passages).split()) == "".join(text.split())
    if max_words > 1:
        assert all(count_words(passage) <= max_words for passage in passages)


@pytest.mark.parametrize("code", ["zh", "ja", "de", "ru", "ar", "hi", "en"])
def test_sentences_end_where_their_punctuation_says(code):
    pieces = list(sentences(TEXTS[code], 100))
    assert len(pieces) == {"zh": 4, "ja": 3, "ar": 4}.get(code, 3)
    assert all(piece.strip()[-1] in "。！？.؟।" for piece in pieces)


def test_small_letters_of_any_script_start_no_sentence():
    assert list(sentences("Он жил в г. москве. Там хорошо.", 50)) == ["Он жил в г. москве. ", "Там хорошо."]
    assert list(sentences("Das ist z. B. so. Gut.", 50)) == ["Das ist z. B. so. ", "Gut."]


def test_words_without_spaces_are_counted_by_their_characters():
    assert count_words("one two three") == 3
    assert count_words("月亮是地球的卫星") == 4
    assert count_words("BERT 是模型") == 3
    assert count_words("") == count_words(" ") == 0


def test_a_long_paragraph_without_spaces_is_text_and_encoded_data_in_it_is_not():
    text = TEXTS["zh"] * 200
    assert clean_text(text) == (text, 0)
    data = "QUJD" * 400
    assert clean_text(f"{text}图片{data}结束") == (f"{text}图片 结束", 1)
    assert clean_text("x" * 201 + " y") == ("y", 1)
    assert clean_text("ก" + "\u0e49\u0e38" * 100_000)[1] == 1


def test_a_passage_of_chinese_is_of_the_size_that_is_asked():
    passages = split_passages(TEXTS["zh"] * 100, 150, 20)
    assert max(map(len, passages)) <= 300 and sum(map(len, passages)) / len(passages) > 200
    assert passages[1][:4] in passages[0]


@pytest.mark.parametrize("code", TEXTS)
def test_bm25_finds_what_there_is_in_every_language(code, tmp_path: Path):
    language = find_language(code)
    table = datasets.Dataset.from_dict({"text": [OTHERS[code], TEXTS[code]]})
    index = BM25Index.build(table, tmp_path / "bm25", stemmer=language.stemmer, stopwords=language.stopwords)
    rows, scores = index.search([QUERIES[code]], 1)
    assert rows[0, 0] == 1 and scores[0, 0] > 0


def test_index_words_are_words_or_runs_of_characters():
    assert index_words("The Moon's 2 sides") == ["the", "moon", "sides"]
    assert index_words("हिन्दी में") == ["हिन्दी", "में"]
    assert index_words("月亮是BERT吗") == ["月亮", "亮是", "bert", "吗"]
    assert index_words("서울의") == ["서울", "울의"]
    assert index_words("น้ำขึ้น")[0] == "น้ำ"


@pytest.mark.parametrize("code", TEXTS)
def test_the_corpus_names_its_language(code, tmp_path: Path):
    (tmp_path / "a.txt").write_text(TEXTS[code] * 3)
    passages = build_passages(CorpusConfig(source=str(tmp_path)), 0, tmp_path)
    assert passages.language.code == code
    assert "".join("".join(passages.table["text"]).split()) == "".join((TEXTS[code] * 3).split())
    assert build_passages(CorpusConfig(source=str(tmp_path), language="fr"), 0, tmp_path).language.name == "French"
