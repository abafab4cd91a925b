"""What docs/integrations.md shows runs."""

import re
from pathlib import Path

import pytest
import torch

import fastpcgrad

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
        if "AGEM" in block[1]:
            check_agem(namespace["optimizer"].report)
    check_adversarial_gradients(namespace)
    check_physics(namespace)


def check_adversarial_gradients(page):
    """Those of two rounds with graphs of their own, the critics' on samples that know no generator."""
    generator, trunk, critics = page["generator"], page["trunk"], page["critics"]
    noise, real = torch.randn(8, 4), torch.randn(8, 8)
    for module in (generator, trunk, critics):
        module.zero_grad()
    page["adversarial_gradients"](noise, real)

    def scores(x):
        return [critic(trunk(x).tanh()) for critic in critics]

    softplus, merged = torch.nn.functional.softplus, fastpcgrad.grad
    fake = generator(noise)
    tell = [(softplus(-r) + softplus(s)).mean() for r, s in zip(scores(real), scores(fake.detach()), strict=True)]
    fool = [softplus(-s).mean() for s in scores(fake)]
    for losses, parameters in ((tell, page["critic_parameters"]), (fool, list(generator.parameters()))):
        for parameter, expected in zip(parameters, merged(losses, parameters), strict=True):
            torch.testing.assert_close(parameter.grad, expected)


def check_agem(report):
    """g − (g·r / r·r) r where g·r < 0, else g."""
    product, length = report.gram[0, 1], report.gram[1, 1]
    expected = torch.stack([torch.ones_like(product), (-product / length).clamp(min=0)])
    assert expected[1] > 0
    torch.testing.assert_close(report.weights, expected)


def check_physics(page):
    """The network solves the equation, and the weights, where it starts, are those of the merged gradient."""
    net, losses, parameters = page["net"], page["equation_and_boundary"], page["parameters"]
    x = torch.linspace(0, 1, 101)[:, None]
    solution = torch.sin(torch.pi * x)
    assert (net(x) - solution).norm() <= 0.02 * solution.norm()
    torch.manual_seed(1)
    for layer in (net[0], net[2]):
        layer.reset_parameters()
    merged = fastpcgrad.grad(losses(), parameters, method=fastpcgrad.methods.ConFIG())
    of_sum = torch.autograd.grad(page["weights"]() @ losses(), parameters)
    found, expected = (torch.cat([g.flatten() for g in gradients]) for gradients in (of_sum, merged))
    assert (found - expected).norm() <= 1e-5 * expected.norm()
