"""SFT with surgery against the stock trainer of TRL, and against a loop that packs rows by hand."""

import pytest

from tests.integrations.tiny import TASKS, VOCABULARY, Texts, distance, language_model

pytest.importorskip("trl", reason="pip install 'fastpcgrad[trl]'")

from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from fastpcgrad import methods
from fastpcgrad.integrations.trl import SFTSurgeryTrainer, Surgery
from tests.integrations.test_transformers import ROWS, by_hand, fixed

# Of other packages, when they are imported or used.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def rows(tasks=(0, 1, 2)):
    """Those of ``Texts``, as SFT has them after tokenization."""
    return [{**row, "input_ids": row["input_ids"].tolist()} for row in Texts(ROWS).rows if row["task_id"] in tasks]


def tokenizer():
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *(f"w{i}" for i in range(VOCABULARY - 2))])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<eos>"
    )


def trained(arguments, kind=SFTSurgeryTrainer, data=None, **options):
    config = arguments(train_sampling_strategy="sequential").to_dict()
    given = {name: value for name, value in config.items() if name in SFTConfig.__dataclass_fields__}
    given |= {"bf16": False, "gradient_checkpointing": False, "packing": options.pop("packing", False)}
    trainer = kind(
        model=language_model(),
        args=SFTConfig(**given),
        train_dataset=Dataset.from_list(rows()) if data is None else data,
        processing_class=tokenizer(),
        **options,
    )
    trainer.train()
    return trainer


def test_pcgrad_is_a_loop_by_hand(arguments):
    trainer = trained(arguments, surgery=Surgery(tasks=TASKS, method=fixed()))
    assert distance(trainer.model, by_hand(arguments, fixed()), language_model()) <= 1e-6


def test_the_sum_is_the_stock_trainer(arguments):
    trainer = trained(arguments, surgery=Surgery(method=methods.Sum(), normalize="batch"))
    assert distance(trainer.model, trained(arguments, SFTTrainer).model, language_model()) <= 1e-6
    assert any("surgery/loss/0" in logs or "surgery/cos_mean" in logs for logs in trainer.state.log_history)


def test_a_dict_of_datasets(arguments):
    data = {
        name: Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows((task,))])
        for task, name in enumerate(TASKS[:2])
    }
    trainer = trained(arguments, data=data, surgery=Surgery(method=fixed()))
    assert trainer.current_task in TASKS[:2] and trainer.surgery_report is not None


def test_what_is_refused(arguments):
    with pytest.raises(NotImplementedError, match="packing"):
        trained(arguments, packing=True, surgery=Surgery())
    with pytest.raises(TypeError, match=r"train_dataset\['a'\].*list"):
        trained(arguments, data={"a": rows()}, surgery=Surgery())
