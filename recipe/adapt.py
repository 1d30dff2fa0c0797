"""Length-adaptive training: `python -m recipe.adapt --model FOLDER --train FILE ... --output_dir DIR`.

One set of weights learns to answer at any `length_config` (Length-Adaptive Transformer, Kim and Cho, arXiv:2010.07003,
section 3; QuaLA-MiniLM, arXiv:2210.17114, section 2). Options, resuming and several GPUs as in recipe.finetune.
"""

import random
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from transformers import HfArgumentParser, set_seed

from recipe.finetune import (
    FinetuneArguments,
    FinetuneTrainer,
    FinetuneTrainingArguments,
    base_folder,
    cross_entropy,
    load_model,
    span_logits,
    train,
)

# The lower layers do not know yet what the question asks for, the upper ones are sure of it.
BOUNDS = (0.2, 0.3, 0.4, 0.5, 0.5, 0.4)


@dataclass
class AdaptArguments(FinetuneArguments):
    significance: str = field(
        default="learned",
        metadata={"help": "What the model drops tokens by.", "choices": ["attention", "learned"]},
    )
    num_sandwich: int = field(default=1, metadata={"help": "Random sub-models a step, beside the smallest one."})
    length_drop_ratio_bound: list[float] = field(
        default_factory=list,
        metadata={
            "help": f"Greatest share of the tokens left that a layer drops: one number, or one a layer; by default "
            f"{BOUNDS}, spread over the model's depth."
        },
    )
    layer_dropout: float = field(default=0.0, metadata={"help": "Chance that a random sub-model skips a layer."})
    sub_model_weight: float = field(
        default=0.5, metadata={"help": "Weight of each sub-model's loss; the full model's counts 1."}
    )
    scorers_only: bool = field(
        default=False, metadata={"help": "Train the scorers of a model that stays as it is: a start for the rest."}
    )


@dataclass
class AdaptTrainingArguments(FinetuneTrainingArguments):
    learning_rate: float = 1e-4
    num_train_epochs: float = 2
    # Scorers learn outside the forward pass; every weight that is trained gets a gradient each step.
    ddp_find_unused_parameters: bool = False
    scorer_learning_rate: float = field(
        default=1e-3, metadata={"help": "Scorers start from nothing, next to weights that know their task."}
    )


class AdaptTrainer(FinetuneTrainer):
    """Trains the full model on the labels, and sub-models and scorers on what the full model answers.

    The scorers' loss reaches the layers below them too: they learn to know early what will matter.
    """

    def __init__(self, *args, bounds, num_sandwich, layer_dropout, sub_model_weight, scorers_only, **kwargs):
        super().__init__(*args, **kwargs)
        self.bounds = bounds
        self.num_sandwich = num_sandwich
        self.layer_dropout = layer_dropout
        self.sub_model_weight = sub_model_weight
        self.scorers_only = scorers_only

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        named = list((self.model if model is None else model).named_parameters())
        scorers = [parameter for name, parameter in named if ".scorer." in name]
        if scorers:
            others = {parameter for name, parameter in named if ".scorer." not in name}
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if parameter in others]
            optimizer.add_param_group({"params": scorers, "weight_decay": 0.0, "lr": self.args.scorer_learning_rate})
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        targets, teacher_logits = inputs.pop("targets"), inputs.pop("teacher_logits", None)
        encoder = self.accelerator.unwrap_model(model).bert.encoder
        scorers = [layer.scorer for layer in encoder.layer if layer.scorer is not None]

        full = model(
            **inputs, length_config="full", output_hidden_states=bool(scorers), output_attentions=bool(scorers)
        )
        logits = span_logits(full)
        answer = logits.detach().softmax(-1)
        losses = []
        if scorers:
            needed = relevance(answer.mean(1), full.attentions)
            losses.append(ranking_loss(scorers, full.hidden_states, needed, inputs["attention_mask"]))
        if not self.scorers_only:
            losses.append(self.answer_loss(logits, targets, teacher_logits))
            for length_config, skipped in self.sub_models():
                with skipping([encoder.layer[i] for i in skipped]):
                    sub_model = model(**inputs, length_config=length_config, output_kept_tokens=True)
                losses.append(self.sub_model_weight * following_loss(sub_model, answer))
        loss = sum(losses)
        return (loss, full) if return_outputs else loss

    def sub_models(self):
        """The step's sub-models, which follow from (seed, step): for each its length config and the layers it skips.

        The sandwich rule: the smallest one, and `num_sandwich` drawn layer by layer, from half of its bound to all of
        it: what drops less is near enough to the full model.
        """
        rng = random.Random(f"{self.args.seed} {self.state.global_step}")
        yield length_config(self.bounds, ()), ()
        for _ in range(self.num_sandwich):
            skipped = [i for i in range(len(self.bounds)) if rng.random() < self.layer_dropout]
            yield length_config([rng.uniform(bound / 2, bound) for bound in self.bounds], skipped), skipped


def drop_ratio_bounds(given, layers):
    """For each layer the greatest share of the tokens left that it drops, from what `--length_drop_ratio_bound` gave.

    Raises:
        ValueError: neither nothing, nor one number in [0, 1), nor one for each layer.
    """
    if not given:
        depths = np.linspace(0, 1, len(BOUNDS) + 1)
        left = np.cumsum([0.0, *np.log1p(np.negative(BOUNDS))])  # logarithms of what is left at these depths
        return (-np.expm1(np.diff(np.interp(np.linspace(0, 1, layers + 1), depths, left)))).tolist()
    bounds = given * layers if len(given) == 1 else given
    if len(bounds) != layers or not all(0 <= bound < 1 for bound in bounds):
        raise ValueError(
            f"--length_drop_ratio_bound is {given}, expected one number in [0, 1), or one for each of {layers} layers"
        )
    return bounds


def length_config(drop_ratios, skipped):
    """Shares of a row's tokens that layers hand on, each dropping `drop_ratios` of what is left, but skipped ones."""
    shares, left = [], 1.0
    for i, ratio in enumerate(drop_ratios):
        if i not in skipped:
            left = max(left * (1 - ratio), 0.001)
        shares.append(left)
    return shares


@contextmanager
def skipping(layers):
    """Within, `layers` hand on what enters them (LayerDrop, Fan et al., arXiv:1909.11556)."""

    def hand_on(hidden_states, alive, keep, with_map):
        return hidden_states, None, alive, None

    for layer in layers:
        layer.forward = hand_on
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def following_loss(sub_model, answer):
    """Cross-entropy of a sub-model to the full model's answer, (batch, 2, sequence).

    A row counts by how much of the answer it still held half-way up. From rows that have lost the answer there is
    nothing to learn, and what they would learn spoils the full model.
    """
    loss = -(answer * span_logits(sub_model).log_softmax(-1)).sum(-1).mean(-1)
    held = sub_model.kept_tokens[len(sub_model.kept_tokens) // 2 - 1]
    weight = (answer.mean(1).gather(1, held.clamp(min=0)) * (held >= 0)).sum(-1)
    return (weight * loss).mean()


def relevance(answer, attentions):
    """How much each token matters after each layer: half of it where the answer stands, half where it is read from.

    What the answer reads is followed down through the layers above by attention rollout (Abnar and Zuidema, ACL 2020,
    arXiv:2005.00928), averaged over heads, with equal weight for attention and the residual connection.

    Args:
        answer (float32 `(batch, sequence)`): mean of the full model's start and end distributions.
        attentions: its attention maps, `(batch, heads, sequence, sequence)`, one a layer.

    Returns:
        `list`, for each layer a distribution over the tokens, float32 `(batch, sequence)`.
    """
    needed, rollout = [], answer
    for attention in reversed(attentions):
        needed.append((answer + rollout) / 2)
        read = rollout[:, None, None].to(attention.dtype) @ attention.detach()
        rollout = (rollout + read.float().mean(1).squeeze(1)) / 2
    return needed[::-1]


def ranking_loss(scorers, hidden_states, needed, attention_mask):
    """Listwise cross-entropy of each layer's scores to how much each token matters, averaged over layers.

    ListNet's top-one loss (Cao et al., ICML 2007); ToP (Li et al., KDD 2023) calls its kin ranking distillation.

    Args:
        scorers: the layers' scorers.
        hidden_states: for each layer what enters it, `(batch, sequence, hidden)`, nothing dropped.
        needed: for each layer a distribution over the tokens, `(batch, sequence)`, of [`relevance`].
        attention_mask (`(batch, sequence)`).
    """
    losses = []
    for scorer, states, target in zip(scorers, hidden_states, needed):
        scores = scorer(states, attention_mask != 0).float()
        losses.append(cross_entropy(target, scores.masked_fill(attention_mask == 0, torch.finfo(scores.dtype).min)))
    return sum(losses) / len(losses)


def main():
    parser = HfArgumentParser((AdaptArguments, AdaptTrainingArguments))
    arguments, training = parser.parse_args_into_dataclasses()
    set_seed(training.seed)
    model = load_model(base_folder(arguments), significance=arguments.significance)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # what sub-models are to answer is then not noisy, and a step takes a sixth less
    if arguments.scorers_only:
        if arguments.significance != "learned":
            raise ValueError(f"--scorers_only with --significance {arguments.significance}, which has no scorers")
        model.requires_grad_(False)
        for layer in model.bert.encoder.layer:
            layer.scorer.requires_grad_(True)
    bounds = drop_ratio_bounds(arguments.length_drop_ratio_bound, model.config.num_hidden_layers)
    train(
        AdaptTrainer,
        model,
        arguments,
        training,
        bounds=bounds,
        num_sandwich=arguments.num_sandwich,
        layer_dropout=arguments.layer_dropout,
        sub_model_weight=arguments.sub_model_weight,
        scorers_only=arguments.scorers_only,
    )


if __name__ == "__main__":
    main()
