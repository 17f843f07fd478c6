import sys

import pytest

from mokernels.demo import text
from mokernels.errors import MissingDependencyError


@pytest.mark.skipif(
    sys.version_info[:2] not in {(3, 11), (3, 12), (3, 13)}, reason="pinned for 3.11 to 3.13"
)
def test_the_text_is_the_pinned_one():
    assert text.reference_text().pinned
    assert len(text.reference_text().text) == 33428


def test_another_wording_is_noticed(monkeypatch):
    import pydoc_data.topics

    changed = {**pydoc_data.topics.topics, "calls": "Calls are called calls."}
    monkeypatch.setattr(pydoc_data.topics, "topics", changed)
    found = text.reference_text()
    assert not found.pinned
    assert found.text.startswith("Calls are called calls.\n\n")


def test_a_missing_page_is_left_out(monkeypatch):
    import pydoc_data.topics

    monkeypatch.setattr(pydoc_data.topics, "topics", {"for": "one page"})
    assert text.reference_text() == text.ReferenceText("one page", pinned=False)


def test_a_python_without_documentation(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(MissingDependencyError, match="libpython3-stdlib"):
        text.reference_text()
