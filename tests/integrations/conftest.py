"""What trainers made from that of transformers are told in the tests."""

import pytest

from tests.integrations.tiny import BATCH


@pytest.fixture
def arguments(tmp_path):
    from transformers import TrainingArguments

    def made(**options):
        given = {
            "per_device_train_batch_size": BATCH,
            "gradient_accumulation_steps": 6,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "linear",
            "weight_decay": 0.01,
            "max_grad_norm": 0.5,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        return TrainingArguments(str(tmp_path / "out"), **{**given, **options})

    return made
