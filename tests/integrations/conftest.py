"""What trainers made from that of transformers are told in the tests."""

import pytest

from tests.integrations.tiny import ARGUMENTS, BATCH


@pytest.fixture
def arguments(tmp_path):
    from transformers import TrainingArguments

    def made(**options):
        given = {"per_device_train_batch_size": BATCH, "max_steps": 4, "weight_decay": 0.01}
        return TrainingArguments(str(tmp_path / "out"), **{**ARGUMENTS, **given, **options})

    return made
