import pydoc_data.topics
import re

import pytest

from hf_efficiency.evaluation import default_text, read_text
from hf_efficiency.evaluation import text as text_module


def shingles(text, length=8):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def test_default_text_shares_nothing_with_the_default_calibration_text():
    """Not one run of eight words occurs in both."""
    calibration = " ".join(pydoc_data.topics.topics.values())
    assert shingles(default_text().text) & shingles(calibration) == set()


def test_default_text_is_long_enough_prose_and_always_the_same():
    first = default_text()
    assert first == default_text()
    # 16 windows of 512 tokens need some 35,000 characters
    assert len(first.text) > 60_000
    assert ">>>" not in first.text
    assert re.search(r"Python 3\.\d+\.\d+, [\d,]+ characters, sha256 [0-9a-f]{12}$", first.description)


def test_default_text_without_source_files(monkeypatch):
    monkeypatch.setattr(text_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--eval-text FILE"):
        default_text()


def test_read_text_describes_the_file_without_its_folder(tmp_path):
    (tmp_path / "some.txt").write_text("héllo")
    # sha256 of the UTF-8 bytes, from sha256sum
    assert read_text(tmp_path / "some.txt").description == "some.txt, 5 characters, sha256 3c48591d8d09"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b" \n", "is empty"), (b"ab\xff", "not UTF-8 text .*byte 2")],
)
def test_read_text_of_a_bad_file(tmp_path, content, message):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.txt.*{message}"):
        read_text(path)
