"""What the tests of integrations train: a language model made from a config, on rows of three tasks."""

import os

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from torch.utils.data import Dataset, SequentialSampler

VOCABULARY = 32
BATCH = 2
TASKS = ["a", "b", "c"]


def language_model(seed=0, dtype=torch.float64):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        pad_token_id=0,
        attention_dropout=0.0,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).to(dtype)


class Texts(Dataset):
    """Rows of tasks 0, 1, 2 in turn, ``run`` of one task one after the other: each task another progression, of another
    length."""

    def __init__(self, rows, run=2, tasks=3, key="task_id", named=False):
        generator = torch.Generator().manual_seed(0)
        self.rows = []
        for i in range(rows):
            task = (i // run) % tasks
            start = torch.randint(1, VOCABULARY, (1,), generator=generator)
            ids = (start + torch.arange((4, 6, 9)[task]) * (1 + 2 * task)) % (VOCABULARY - 1) + 1
            self.rows.append({"input_ids": ids, key: TASKS[task] if named else task})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


ARGUMENTS = {
    "gradient_accumulation_steps": 6,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 0.5,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
"""What trainers made from that of transformers are told."""


class InOrder:
    """Before a trainer: rows come as they stand."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


def collate(rows):
    """Pads; knows nothing of tasks."""
    ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100)}


def flat(model):
    own = [p.detach() for p in model.parameters() if p.requires_grad]
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in own]  # of DTensors
    return torch.cat([p.flatten().double() for p in whole])


def distance(model, other, start):
    """How far apart two models are, of the distance that the other has walked."""
    walked = (flat(other) - flat(start)).norm()
    assert walked > 0
    return float((flat(model) - flat(other)).norm() / walked)
