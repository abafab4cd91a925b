"""What tests of balancers share: the two ways with flags."""

import pytest

from tests.balancing.late_answers import never_look


@pytest.fixture
def late_answers(monkeypatch):
    return never_look(monkeypatch)


@pytest.fixture(params=["looking", "not looking"])
def looks(request):
    """A CPU's way, which looks at flags, and a GPU's."""
    if request.param == "not looking":
        request.getfixturevalue("late_answers")
