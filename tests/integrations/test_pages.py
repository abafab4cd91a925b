"""What docs/integrations.md shows runs."""

import re
from pathlib import Path

import pytest

for needed in ("transformers", "accelerate", "peft", "lightning", "matplotlib", "torchjd"):
    pytest.importorskip(needed, reason="pip install 'fastpcgrad[test]'")

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers:", "ignore:.*isinstance.treespec, LeafSpec.*")
@pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore:.*tensorboardX.*")
def test_the_blocks_of_the_page_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) == len(re.findall(r"```+ *(?:python|py)\b", text)) > 5
    namespace = {"__name__": "integrations_page"}
    for block in blocks:
        lines = "\n" * text.count("\n", 0, block.start(1))  # so that errors show the page's line numbers
        exec(compile(lines + block[1], str(PAGE), "exec"), namespace)
