"""The language model example: its texts, its model, and that a killed training continues with the same numbers."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the example's digits come with scikit-learn: pip install 'fastpcgrad[examples]'")

from sklearn.datasets import load_digits

from examples import command_line, lm_text, multitask_lm
from examples.lm_model import LanguageModel, ModelConfig
from examples.lm_runs import PLAIN, SURGERY, Run, Settings, windows

TINY = Settings(
    ModelConfig(context=8, width=16, layers=1, heads=2),
    steps=16,
    sequences=2,
    learning_rate=0.05,
    warm_up_steps=2,
    save_every=5,
    threads=1,
)


def opposed(*words: str) -> lm_text.Text:
    joined = "".join(random.Random(0).choices(words, k=400))
    return lm_text.Text(*[torch.tensor(list(joined.encode()), dtype=torch.uint8)] * 2)


OPPOSED = {"b": opposed("ab", "ba"), "c": opposed("ac", "ca"), "d": opposed("ad", "da")}
"""Texts of which each follows the same letter with another one: their gradients soon conflict."""


@pytest.fixture(autouse=True)
def one_thread_and_kept_state():
    threads, python_state = torch.get_num_threads(), random.getstate()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python_state)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def texts():
    return lm_text.load()


def train(run: Run, checkpoint: Path, steps: int | None = None) -> Run:
    for _ in run.train(checkpoint):
        if run.done == steps:
            break
    return run


def test_the_texts_are_what_they_say(texts):
    python, english, digits = (bytes(text.train.tolist()).decode() for text in texts.values())
    assert list(texts) == ["Python", "English", "digits"]
    assert "\ndef " in python and "\nimport " in python
    assert " the " in english and english.count(" the ") > 10 * english.count("self")
    assert set(digits) <= set(lm_text.SHADES) | set("0123456789\n")
    assert all(len(text.held_out) > 10_000 for text in texts.values())


def test_a_drawn_digit_is_its_label_and_its_pixels():
    bunch = load_digits()
    label, *lines, end = lm_text.drawn(bunch.images[3], bunch.target[3]).split("\n")
    assert label == "3" and end == "" and [len(line) for line in lines] == [8] * 8
    levels = torch.tensor([[lm_text.SHADES.index(shade) for shade in line] for line in lines])
    assert (levels / 9 * 16 - torch.as_tensor(bunch.images[3])).abs().max() < 1


def test_documents_that_are_held_out_are_not_trained_on():
    text = lm_text.Text.of([f"<{n}>" for n in range(25)])
    assert bytes(text.held_out.tolist()) == b"<0>\n<10>\n<20>"
    assert bytes(text.train.tolist()) == "\n".join(f"<{n}>" for n in range(25) if n % 10).encode()


def test_windows_are_stretches_of_the_text():
    found = windows(torch.arange(100, dtype=torch.uint8), 8, 500, torch.Generator().manual_seed(0))
    assert found.shape == (500, 9) and found.dtype == torch.int64
    assert (found.diff() == 1).all()
    assert (found.min(), found.max()) == (0, 99)


def test_no_logit_depends_on_a_later_byte_and_checkpoints_change_nothing():
    model = LanguageModel(ModelConfig(context=16, width=16, layers=2, heads=2)).double()
    tokens = torch.randint(256, (2, 16))
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 256
    logits = model(tokens)
    same = (logits == model(changed)).all(dim=2).all(dim=0)
    assert same[:10].all() and not same[10:].any()
    logits.square().mean().backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    model.eval()(tokens).square().mean().backward()
    torch.testing.assert_close(gradients, [p.grad for p in model.parameters()])


@pytest.mark.parametrize("name", [PLAIN, SURGERY])
def test_a_killed_training_continues_with_the_same_bits(name, tmp_path):
    whole = train(Run(name, TINY, OPPOSED), tmp_path / "whole.pt")
    for killed_after in (3, 12, 16):
        checkpoint = tmp_path / f"{killed_after}.pt"
        train(Run(name, TINY, OPPOSED), checkpoint, steps=killed_after)
        resumed = Run(name, TINY, OPPOSED)
        if checkpoint.exists():
            resumed.load(torch.load(checkpoint))
        assert resumed.done == {3: 0, 12: 10, 16: 16}[killed_after]
        train(resumed, checkpoint)
        assert resumed.losses == whole.losses and len(whole.losses) == 16
        assert len(resumed.cosines) == (16 if name == SURGERY else 0)
        assert all(map(torch.equal, resumed.cosines, whole.cosines))
        assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))
        assert resumed.schedule.get_last_lr() == whole.schedule.get_last_lr()


def test_conflicts_are_what_tells_the_runs_apart(tmp_path):
    plain, surgery = (train(Run(name, TINY, OPPOSED), tmp_path / name) for name in (PLAIN, SURGERY))
    conflicts = (torch.stack(surgery.cosines) < 0).any(2).any(1)
    first = int(conflicts.nonzero()[0])
    assert first > 1 and conflicts[first:].all()
    # Until the step of the first conflict the merged gradient is the sum, rounded in rows of bfloat16.
    gaps = (torch.tensor(plain.losses) - torch.tensor(surgery.losses)).abs().amax(1)
    assert gaps[0] == 0 and gaps[: first + 1].max() < 5e-3
    assert gaps[first + 1 :].max() > 0.1
    assert surgery.surgery.nbytes == 3 * 2 * sum(p.numel() for p in surgery.model.parameters())


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    train(Run(PLAIN, TINY, OPPOSED), tmp_path / "run.pt", steps=5)
    other = Run(PLAIN, replace(TINY, steps=20), OPPOSED)
    before = [p.clone() for p in other.model.parameters()]
    with pytest.raises(ValueError, match=r"steps.*16.*20"):
        other.load(torch.load(tmp_path / "run.pt"))
    assert all(map(torch.equal, before, other.model.parameters()))


def test_quick_run_interrupted_and_resumed_writes_its_outputs(tmp_path, capsys, monkeypatch):
    arguments = ["--quick", "--threads", "1", "--out", str(tmp_path)]
    step = Run.step

    def interrupted(run):
        if run.name == SURGERY and run.done == 12:
            raise KeyboardInterrupt
        step(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", interrupted)
        with pytest.raises(SystemExit):
            multitask_lm.main(arguments)
    assert "--resume" in capsys.readouterr().out
    runs = multitask_lm.main([*arguments, "--resume"])
    out = capsys.readouterr().out
    assert "plain sum: continues after step 24" in out and "gradient surgery: continues after step 10" in out
    figure = tmp_path / "multitask_lm.png"
    assert figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and figure.stat().st_size > 20_000
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "gradient-surgery.pt",
        "multitask_lm.png",
        "plain-sum.pt",
    ]
    for run in runs.values():
        losses = torch.tensor(run.losses)
        assert (losses[0] > 7).all()  # 8 bits a byte: nothing known
        assert (losses[-3:].mean(0) < 0.75 * losses[0]).all()
        assert all(bits < 6.5 for bits in run.held_out())
    with pytest.raises(SystemExit, match=r"cannot resume.*steps.*24.*30"):
        multitask_lm.main([*arguments, "--steps", "30", "--resume"])


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(command_line, "find_spec", lambda name: None if name == "rich" else object())
    with pytest.raises(SystemExit, match=r"rich.*pip install 'fastpcgrad\[examples\]'"):
        multitask_lm.main(["--quick"])
