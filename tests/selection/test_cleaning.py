import numpy as np
import pytest

from hf_efficiency.selection import optional, select
from hf_efficiency.selection.classifier import QualityClassifier
from hf_efficiency.selection.language import Language
from hf_efficiency.selection.quality_rules import QualityRules

GOOD = "The committee met to discuss the report and agreed that work on it should go on with new people. " * 3
RULES = {"max_duplicate_lines": None, "max_top_ngram": None, "max_repeated_ngram": None, "min_words": 5}


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("too short", "words"),
        ("a I a I a I the of a I a I", "mean_word"),
        ("the # of # and # report # with # people #", "symbols"),
        ("12345 67890 the of 12345 67890 12345", "letters"),
        ("completely unrelated vocabulary without function words", "stop_words"),
        ("the committee has published lorem ipsum and that was it", "forbidden"),
        ("\n".join(f"- point {i} of the list and that" for i in range(6)), "bullets"),
        ("\n".join(f"line {i} of the text and that..." for i in range(6)), "ellipsis"),
    ],
)
def test_each_rule_alone(text, rule):
    assert rule in QualityRules(**RULES).broken(text)
    assert QualityRules(**RULES).broken(GOOD) == []


def test_repetition_by_hand():
    """Ten words of two letters, of which one pair stands there three times: 12 of 20 characters."""
    words = "aa bb cc aa bb dd aa bb ee ff"
    assert "top_2gram" in QualityRules(max_top_ngram=(0.59, 1, 1)).broken(words)
    assert "top_2gram" not in QualityRules(max_top_ngram=(0.6, 1, 1)).broken(words)
    lines = "one line\nother line\none line\none line"
    assert "duplicate_lines" in QualityRules(max_duplicate_lines=0.49).broken(lines)
    assert "duplicate_lines" not in QualityRules(max_duplicate_lines=0.5).broken(lines)
    # five words twice and five others, of equal length: two thirds repeat
    twice = "aa bb cc dd ee xx aa bb cc dd ee yy zz ww vv"
    assert "repeated_5gram" in QualityRules(max_repeated_ngram=0.66).broken(twice)
    assert "repeated_5gram" not in QualityRules(max_repeated_ngram=0.67).broken(twice)


def test_select_by_rules_reports_what_was_broken(texts):
    pool = [*texts[:8], "spam " * 100, "short"]
    selection = select(pool, "rules", min_words=10)
    assert {8, 9}.isdisjoint(selection.indices)
    assert selection.report["broken_rules"]["words"] == 1
    assert {0, 2, 3} <= set(selection.indices)
    assert len(select(pool, "rules", 2)) == 2


def test_language():
    pool = [
        "The weather was fine and the children played in the garden.",
        "Das Wetter war schön und die Kinder spielten im Garten.",
        "Il faisait beau et les enfants jouaient dans le jardin.",
        "",
    ]
    assert select(pool, "language", languages=("en",)).indices.tolist() == [0]
    assert select(pool, "language", languages=("de", "fr")).indices.tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"does not know the languages \['xx'\]; it knows"):
        select(pool, "language", languages=("xx",))


def test_classifier_tells_the_target_from_the_rest(texts):
    other = [" ".join(f"v{(i * j) % 31}" for j in range(40)) for i in range(30)]
    pool = [*other, *texts[:20]]
    selection = select(pool, "classifier", target=texts[20:])
    assert set(selection.indices) == set(range(30, 50))
    assert selection.scores[:30].max() < 0.5 < selection.scores[30:].min()


def test_classifier_features_have_length_one():
    x = QualityClassifier(max_n=1, buckets=1 << 16).features(["a a a a b", ""])
    values = sorted(x[0].data.tolist())
    assert values == pytest.approx([np.sqrt(1 / 5), np.sqrt(4 / 5)])
    assert x[1].nnz == 0


@pytest.mark.parametrize(
    ("call", "library"),
    [
        (lambda: select(["a"], "language"), "py3langid"),
        (lambda: select(["a", "b"], "kmeans", 1), "sklearn"),
        (lambda: select(["a"], "classifier", target=["b"]), "sklearn|scipy"),
    ],
)
def test_missing_libraries_name_the_extra(call, library, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(optional.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=rf"needs '({library})'.*pip install 'hf_efficiency\[data\]'"):
        call()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QualityRules(min_words=-1), "min_words=-1 must not be negative; None switches the rule off"),
        (lambda: QualityRules(min_words=9, max_words=3), "min_words=9 is above max_words=3"),
        (lambda: Language(languages="en"), "must be a tuple of codes"),
        (lambda: Language(threshold=0), r"threshold=0 is a probability"),
        (lambda: QualityClassifier(C=0), "C=0 must be positive"),
        (lambda: QualityClassifier(max_n=0), "max_n=0 must be at least 1"),
        (lambda: QualityClassifier().fit(["a"], []), "has 1 good and 0 other texts; it needs both"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
