"""Length-adaptive training: `python -m recipe.adapt --model FOLDER --windows FOLDER --output_dir DIR`.

One set of weights learns to answer at any `length_config` (Length-Adaptive Transformer, Kim and Cho, arXiv:2010.07003,
section 3; QuaLA-MiniLM, arXiv:2210.17114, section 2). See recipe.training for what all trainings share.
"""

import random
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile

import torch

from recipe.data import base_model, load_tokenizer
from recipe.presets import parse_length_config
from recipe.training import (
    SpanArguments,
    SpanTrainer,
    SpanTrainingArguments,
    cross_entropies,
    cross_entropy,
    load_model,
    parse,
    span_logits,
    train,
)

# MACs of a sub-model, as a share of the full model's. One that drops less than the most is near enough to the full one.
LEAST_MACS, MOST_MACS = 0.38, 0.7
LEAST_LEFT = 0.05  # of the tokens, in a sub-model
SUB_MODEL_WEIGHT = 0.5  # of each sub-model's loss; the full model's counts 1


@dataclass
class AdaptArguments(SpanArguments):
    significance: str = field(
        default="learned",
        metadata={"help": "What the model drops tokens by.", "choices": ["attention", "learned"]},
    )
    choosing: list[int] = field(
        default_factory=list, metadata={"help": "Layers, from 0, that sub-models may drop tokens in; all by default."}
    )
    at_most: int = field(default=3, metadata={"help": "Layers that one sub-model drops tokens in."})
    length_configs: list[str] = field(
        default_factory=list, metadata={"help": "Sub-models, as JSON, to train each step instead of two drawn ones."}
    )
    scorers_only: bool = field(
        default=False, metadata={"help": "Train the scorers of a model that stays as it is: a start for the rest."}
    )

    def __post_init__(self):
        if self.scorers_only and self.significance != "learned":
            raise ValueError(f"--scorers_only with --significance {self.significance}, which has no scorers")


@dataclass
class AdaptTrainingArguments(SpanTrainingArguments):
    learning_rate: float = 1e-4
    num_train_epochs: float = 1
    save_steps: float = 50
    logging_steps: float = 25
    # Scorers learn outside the forward pass; every weight that is trained gets a gradient each step.
    ddp_find_unused_parameters: bool = False
    scorer_learning_rate: float = field(
        default=1e-3, metadata={"help": "Scorers start from nothing, next to weights that know their task."}
    )


class AdaptTrainer(SpanTrainer):
    """Trains the full model on the labels, and sub-models and scorers on what the full model answers.

    The scorers' loss reaches the layers below them too, where tokens are to be dropped: they learn to know early what
    will matter.
    """

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
        targets, teacher_logits = inputs.pop("targets"), inputs.pop("teacher_logits", None)
        inputs = self.inputs_of(inputs)
        mask = inputs["attention_mask"]
        unwrapped = self.accelerator.unwrap_model(model)
        scorers = [layer.scorer for layer in unwrapped.bert.encoder.layer if layer.scorer is not None]

        full = model(**inputs, output_hidden_states=True, output_attentions=bool(scorers))
        logits = span_logits(full, mask)
        answer = logits.detach().softmax(-1)
        losses = []
        if scorers:
            needed = relevance(answer.mean(1), full.attentions)
            choosing = self.choosing(unwrapped.config)
            states = [each if i in choosing else each.detach() for i, each in enumerate(full.hidden_states)]
            losses.append(ranking_loss(scorers, states, needed, mask))
        if not self.arguments.scorers_only:
            losses.append(self.answer_loss(logits, targets, teacher_logits))
            for length_config in self.sub_models(unwrapped.config):
                with replaying(unwrapped.bert.encoder, full.hidden_states, length_config):
                    sub_model = model(**inputs | {"length_config": length_config}, output_kept_tokens=True)
                losses.append(SUB_MODEL_WEIGHT * following_loss(sub_model, answer, mask))
        loss = sum(losses)
        return (loss, full) if return_outputs else loss

    def choosing(self, config):
        """The layers that sub-models may drop tokens in."""
        return self.arguments.choosing or range(config.num_hidden_layers)

    def sub_models(self, config):
        """The step's sub-models of a model of this `config`, which follow from (seed, step): a length config each.

        With the full model the sandwich rule (Yu and Huang, arXiv:1903.05134): a smallest one, and a random one. Or
        those that were asked for.
        """
        if self.arguments.length_configs:
            yield from map(parse_length_config, self.arguments.length_configs)
            return
        rng = random.Random(f"{self.args.seed} {self.state.global_step}")
        for share in (LEAST_MACS, rng.uniform(LEAST_MACS, MOST_MACS)):
            yield draw_sub_model(rng, config, share, self.choosing(config), self.arguments.at_most)


def draw_sub_model(rng, config, macs_share, choosing, at_most):
    """A length config of at most so large a share of the MACs, or, of a model that cannot have it, with [`LEAST_LEFT`]:
    which of the layers `choosing` drop tokens, and how much of it each does, is drawn."""

    def shares(left):
        return [left**each for each in done]

    for _ in range(100):
        chosen = rng.sample(choosing, rng.randint(1, min(at_most, len(choosing))))
        parts = [rng.random() if layer in chosen else 0.0 for layer in range(config.num_hidden_layers)]
        done = [sum(parts[: layer + 1]) / sum(parts) for layer in range(config.num_hidden_layers)]
        if config.macs_share(shares(LEAST_LEFT)) <= macs_share:  # else they drop too late
            break
    least, most = LEAST_LEFT, 1.0
    while most - least > 1e-3:
        middle = (least + most) / 2
        least, most = (middle, most) if config.macs_share(shares(middle)) <= macs_share else (least, middle)
    return shares(least)


@contextmanager
def replaying(encoder, hidden_states, length_config):
    """Within it the layers below the first that drops tokens return what they did in the full pass: neither they nor
    their gradients are computed once more for a sub-model.

    Args:
        encoder ([`QuaLAMiniLMEncoder`]).
        hidden_states: the full pass's, `(batch, sequence, hidden)`: the embeddings, and what left each layer.
        length_config (list of `float`): the sub-model's.
    """

    def replayed(states):
        return lambda entering, alive, keep, with_map: (states, None, alive, None)

    layers = [layer for layer, _ in zip(encoder.layer, takewhile(lambda share: share == 1, length_config))]
    for layer, states in zip(layers, hidden_states[1:]):
        layer.forward = replayed(states)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own again


def following_loss(sub_model, answer, attention_mask):
    """Cross-entropy of a sub-model to the full model's answer, (batch, 2, sequence).

    A row counts by how much of the answer it still held half-way up. From rows that have lost the answer there is
    nothing to learn, and what they would learn spoils the full model.
    """
    loss = cross_entropies(answer, span_logits(sub_model, attention_mask)).mean(-1)
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
    arguments, training = parse(AdaptArguments, AdaptTrainingArguments)
    folder = arguments.model or base_model()
    model = load_model(folder, significance=arguments.significance)
    if not set(arguments.choosing) <= set(range(model.config.num_hidden_layers)):
        raise ValueError(f"--choosing is {arguments.choosing}, expected layers of {model.config.num_hidden_layers}")
    if arguments.scorers_only:
        model.requires_grad_(False)
        for layer in model.bert.encoder.layer:
            layer.scorer.requires_grad_(True)

    train(AdaptTrainer, model, load_tokenizer(folder), arguments, training)


if __name__ == "__main__":
    main()
