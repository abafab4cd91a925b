"""Pages of which a part is written from rows."""

import pytest

from benchmarks.pages import between


def test_what_stood_between_the_markers_is_replaced():
    assert between("a\n<s>\nold\n<e>\nb\n", "<s>", "<e>", "new") == "a\n<s>\nnew\n<e>\nb\n"


@pytest.mark.parametrize("page", ["", "<s>", "<e> <s>", "<s><e><s><e>"])
def test_a_page_without_a_place_is_refused(page):
    with pytest.raises(ValueError, match="must hold <s> and <e> once each"):
        between(page, "<s>", "<e>", "x")
