"""The trainer of sentence-transformers with surgery against the stock one, and against a loop by hand."""

import random

import pytest
import torch

from tests.integrations.tiny import distance, flat

pytest.importorskip("sentence_transformers", reason="pip install 'fastpcgrad[sentence-transformers]'")
pytest.importorskip("datasets", reason="pip install 'fastpcgrad[test]'")

from datasets import Dataset, DatasetDict
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from fastpcgrad import FastPCGradWarning, methods
from fastpcgrad.integrations.sentence_transformers import SentenceTransformerSurgeryTrainer, Surgery

# Of other packages, when they are imported or used.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

WORDS, WIDTH, STEPS = 40, 16, 3


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Of a small BERT and its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(WORDS))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    folder = tmp_path_factory.mktemp("bert")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


def sentences(rng, count):
    return [" ".join(f"w{rng.randrange(WORDS)}" for _ in range(5)) for _ in range(count)]


def data():
    rng = random.Random(0)
    first = sentences(rng, 48)
    return DatasetDict(
        {
            "qa": Dataset.from_dict({"anchor": first, "positive": [" ".join(sorted(x.split())) for x in first]}),
            "sts": Dataset.from_dict(
                {"one": sentences(rng, 32), "two": sentences(rng, 32), "score": [i % 5 / 5 for i in range(32)]}
            ),
            "nli": Dataset.from_dict(
                {"one": sentences(rng, 24), "two": sentences(rng, 24), "label": [i % 3 for i in range(24)]}
            ),
        }
    )


def losses_of(model, cached):
    torch.manual_seed(5)
    ranking = losses.MultipleNegativesRankingLoss(model)
    if cached:
        ranking = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)
    return {
        "qa": ranking,
        "sts": losses.CosineSimilarityLoss(model),
        "nli": losses.SoftmaxLoss(model, WIDTH, 3),
    }


def sentence_model(path):
    return SentenceTransformer(path, device="cpu").double()


@pytest.fixture
def made(path, tmp_path):
    def trainer(kind=SentenceTransformerSurgeryTrainer, cached=False, sampler="round_robin", accumulation=3, **extra):
        torch.manual_seed(0)
        model = sentence_model(path)
        arguments = SentenceTransformerTrainingArguments(
            str(tmp_path / "out"),
            per_device_train_batch_size=4,
            max_steps=STEPS,
            gradient_accumulation_steps=accumulation,
            multi_dataset_batch_sampler=sampler,
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            max_grad_norm=0.5,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        given = extra.pop("loss", None) or losses_of(model, cached)
        given = given(model) if callable(given) else given
        for own in given.values() if isinstance(given, dict) else [given]:
            own.double()
        return kind(model=model, args=arguments, train_dataset=extra.pop("data", None) or data(), loss=given, **extra)

    return trainer


def fixed():
    """Draws from its own generator, so that all runs draw alike."""
    return methods.PCGrad(generator=torch.Generator().manual_seed(7))


def by_hand(trainer, method, accumulation):
    """Rows of backward passes, packed, weights of their G; on the batches of the stock trainer."""
    model, names = trainer.model, list(trainer.train_dataset)
    model.train()
    optimizer = trainer.create_optimizer()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    batches = iter(trainer.get_train_dataloader())
    for _ in range(STEPS):
        own = {}
        for _ in range(accumulation):
            batch = next(batches)
            own.setdefault(batch.pop("dataset_name"), []).append(batch)
        rows, present = [], [t for t, name in enumerate(names) if name in own]
        for t in present:
            optimizer.zero_grad()
            for batch in own[names[t]]:
                loss = trainer.loss[names[t]](*trainer.collect_features(batch))
                (loss / len(own[names[t]])).backward()
            rows.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]))
        J = torch.stack(rows)
        merged = method.solve_for(J @ J.mT, present).weights @ J
        for parameter, piece in zip(parameters, merged.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = piece.view_as(parameter).clone()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return model


@pytest.mark.parametrize(
    ("cached", "sampler", "accumulation"),
    [(False, "round_robin", 3), (False, "proportional", 5), (True, "round_robin", 4)],
    ids=["round_robin", "proportional", "cached"],
)
def test_pcgrad_is_a_loop_by_hand(made, path, cached, sampler, accumulation):
    given = {"cached": cached, "sampler": sampler, "accumulation": accumulation}
    trainer = made(surgery=Surgery(method=fixed()), **given)
    trainer.train()
    expected = by_hand(made(SentenceTransformerTrainer, **given), fixed(), accumulation)
    assert distance(trainer.model, expected, sentence_model(path)) <= 1e-6
    assert trainer.current_task in ("qa", "sts", "nli")
    assert any("surgery/loss/qa" in logs for logs in trainer.state.log_history)


@pytest.mark.parametrize("cached", [False, True])
def test_the_sum_is_the_stock_trainer(made, path, cached):
    trainer = made(surgery=Surgery(method=methods.Sum(), normalize="batch"), cached=cached)
    trainer.train()
    stock = made(SentenceTransformerTrainer, cached=cached)
    stock.train()
    assert distance(trainer.model, stock.model, sentence_model(path)) <= 1e-6


def test_one_loss_for_all_datasets(made, path):
    pairs = DatasetDict({name: own.select_columns(["one", "two", "score"]) for name, own in two_of_pairs().items()})
    given = {"data": pairs, "loss": losses.CosineSimilarityLoss, "accumulation": 2}
    trainer = made(surgery=Surgery(method=methods.Sum(), normalize="batch", tasks=2), **given)
    trainer.train()
    assert trainer.surgery_report is not None and trainer.current_task in ("left", "right")
    stock = made(SentenceTransformerTrainer, **given)
    stock.train()
    assert distance(trainer.model, stock.model, sentence_model(path)) <= 1e-6


def two_of_pairs():
    return {"left": data()["sts"], "right": data()["sts"].shuffle(seed=1)}


def test_evaluation_knows_the_datasets(made):
    trainer = made(surgery=Surgery(method=fixed()), eval_dataset=data())
    assert {"eval_qa_loss", "eval_sts_loss", "eval_nli_loss"} <= set(trainer.evaluate())


def test_what_is_refused_and_warned_of(made):
    with pytest.raises(TypeError, match="DatasetDict"):
        made(data=data()["sts"], loss=losses.CosineSimilarityLoss)
    trainer = made(accumulation=2)
    with pytest.warns(FastPCGradWarning, match="2 micro-batches for 3 tasks"):
        trainer.train()
    assert flat(trainer.model).isfinite().all()
    trainer.accelerator = type("Accelerator", (), {"distributed_type": "MULTI_GPU", "num_processes": 2})()
    with pytest.raises(NotImplementedError, match=r"2 processes.*deals out.*in one process"):
        trainer._refuse()
