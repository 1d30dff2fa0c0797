"""Evolutionary search for presets: `python -m recipe.search --model FOLDER --windows FOLDER --output_dir
DIR`.

Looks for the length configs that give the most F1 for the fewest MACs (Length-Adaptive Transformer, Kim and Cho,
arXiv:2010.07003, section 3.3) on validation, by NSGA-II (Deb et al., 2002). Every candidate is stored as soon as it is
measured: a search that was stopped goes on, and to the same front, when the same command is given again.

Of the candidates that cost at most the share of the MACs that `--preset_shares` names for a preset, and more than it
names for the next, the best on the subset are measured on all validation questions; the best there is the preset. No
test set is read.
"""

import argparse
import hashlib
import json
import math
from functools import partial
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import optuna
import torch
import torchmetrics
from matplotlib.figure import Figure
from optuna.samplers import NSGAIISampler
from optuna.samplers.nsgaii import PolynomialMutation, SBXCrossover
from optuna.trial import TrialState
from tqdm import tqdm

from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from qualaminilm.pipeline_qualaminilm import QuestionAnsweringPipeline
from recipe import ROOT
from recipe.data import file_sha256, load_tokenizer, with_answers
from recipe.evaluate import answer_all, score
from recipe.presets import describe_preset, describe_scores
from recipe.results import describe_engine, describe_run, save_figure, write_json
from recipe.windows import validation_questions

# From the dearest to the cheapest; "full" comes before them.
PRESET_NAMES = ("accurate", "balanced", "fast", "fastest")
PRESET_SHARES = (0.7, 0.6, 0.5, 0.4)
FULL = "full"
REPORT, PLOT = "search.json", "pareto.png"
# Choosing tokens takes time too, of which a layer that drops a smaller share than this would not earn back enough.
LEAST_DROP = 0.1
MOST_DROP = 0.9  # of the tokens left


class Candidates:
    """Measured length configs in an SQLite file, as two Optuna studies: all on a subset, survivors on all questions.

    Args:
        path: the file, made if it does not exist.
        settings (`dict`): what the measurements depend on.

    Raises:
        ValueError: the file holds a search with other settings.
    """

    def __init__(self, path, settings):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.on_subset, self.on_all = (
            optuna.create_study(
                storage=f"sqlite:///{path}", study_name=name, directions=["maximize", "minimize"], load_if_exists=True
            )
            for name in ("on_subset", "on_all")
        )
        self.settings = settings
        stored = self.on_subset.user_attrs.get("settings", settings)
        if stored != settings:
            raise ValueError(f"{path} holds a search with other settings: {stored}, not {settings}")
        self.on_subset.set_user_attr("settings", settings)
        for trial in self.on_subset.get_trials(states=(TrialState.RUNNING,)):
            self.on_subset.tell(trial.number, state=TrialState.FAIL)  # was being measured when the search was killed

    def next_trial(self):
        """The next candidate: one of the `first`, or what follows from the seed, its place in its generation, and the
        generations before."""
        done, first = len(measured(self.on_subset)), self.settings["first"]
        if done < len(first) and not self.on_subset.get_trials(states=(TrialState.WAITING,)):
            self.on_subset.enqueue_trial(drops_of(first[done], self.settings["choosing"]))
        generation_and_place = divmod(done, self.settings["population"])
        seed = np.random.SeedSequence((self.settings["seed"], *generation_and_place)).generate_state(1)
        self.on_subset.sampler = NSGAIISampler(
            population_size=self.settings["population"],
            crossover=SBXCrossover(),
            mutation=PolynomialMutation(),
            seed=int(seed[0]),
        )
        # Where the first candidate of a generation chooses the parents itself, it sees them in another order than one
        # that finds them chosen.
        self.on_subset.sampler.get_parent_population(self.on_subset, generation_and_place[0])
        return self.on_subset.ask()


def measured(study):
    """What a study has measured, a `list` of `{"length_config", "macs_share", "f1", "em"}`, oldest first."""
    return [
        {"f1": trial.values[0], "macs_share": trial.values[1]} | trial.user_attrs
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    ]


def by_length_config(study):
    """What a study has measured, see [`measured`], each by its length config, a tuple."""
    return {tuple(each["length_config"]): each for each in measured(study)}


def drops_of(length_config, choosing):
    """The parameters that [`draw_length_config`] makes such a length config from."""
    entering = [1.0, *length_config]
    return {f"drop_{layer}": 1 - length_config[layer] / entering[layer] for layer in choosing}


def draw_length_config(trial, layers, choosing, at_most):
    """Shares of a row's tokens that `layers` hand on: of the layers `choosing` each drops nothing, or from
    [`LEAST_DROP`] to [`MOST_DROP`] of what is left; of more than `at_most`, those that would drop most."""
    drops = {layer: trial.suggest_float(f"drop_{layer}", 0.0, MOST_DROP) for layer in choosing}
    chosen = [layer for layer in sorted(drops, key=drops.get, reverse=True)[:at_most] if drops[layer] >= LEAST_DROP]
    left, shares = 1.0, []
    for layer in range(layers):
        left *= 1 - drops[layer] if layer in chosen else 1
        shares.append(max(round(left, 3), 0.001))
    return shares


def front(candidates):
    """The candidates than which none has both more F1 and a smaller MACs share, cheapest first."""
    best, ascending = [], sorted(candidates, key=lambda each: (each["macs_share"], -each["f1"]))
    for candidate in ascending:
        if not best or candidate["f1"] > best[-1]["f1"]:
            best.append(candidate)
    return best


def budgets(shares):
    """What each preset may cost at most, and what it costs more than, of `shares` from the greatest to the smallest."""
    return list(pairwise([*shares, 0.0]))


def by_budget(candidates, shares):
    """A list of candidates for each of `shares`, from the greatest to the smallest: those that cost at most this share
    of the MACs and more than the next. Each has the most F1 first, and of as much what costs less."""
    best_first = sorted(candidates, key=lambda each: (-each["f1"], each["macs_share"]))
    return [[each for each in best_first if least < each["macs_share"] <= most] for most, least in budgets(shares)]


def place_presets(full, candidates, shares=PRESET_SHARES):
    """Presets by budgets: `"full"` first, then for each of `shares` the candidate of most F1 that costs at most this
    share of the MACs, and more than the next preset may.

    Args:
        full, candidates: what was measured on all questions, as by [`measured`].
        shares: one number for each of [`PRESET_NAMES`], from the greatest to the smallest.

    Returns:
        `dict`, name -> candidate.

    Raises:
        ValueError: there is no such candidate.
    """
    presets = {FULL: full}
    for name, (most, least), within in zip(PRESET_NAMES, budgets(shares), by_budget(candidates, shares)):
        if not within:
            raise ValueError(
                f"no candidate is left for {name!r}, of more than {least} and at most {most} of the MACs; search "
                "longer, or give other --preset_shares or a larger --max_preset_loss"
            )
        presets[name] = within[0]
    return presets


def loss(candidate, full):
    """F1 lost against `full` on the same questions, in percent of it; where that has none, there is none to lose."""
    return 100 * (1 - candidate["f1"] / full["f1"]) if full["f1"] else 0.0


def within_loss(candidates, full, max_loss):
    """Those that lose at most `max_loss` percent."""
    return [each for each in candidates if loss(each, full) <= max_loss]


def describe_front(candidates, full):
    """A line for each candidate of the front."""
    return "\n".join(
        f"  MACs share {each['macs_share']:.3f}  F1 {each['f1']:.2f}  loss {loss(each, full):5.2f} %"
        f"  {each['length_config']}"
        for each in front(candidates)
    )


def plot(path, report):
    """Draws every candidate, the front of the survivors and the presets; PNG."""
    on_subset, on_all = report["full_on_subset"], report["presets"][FULL]
    lowest = -2 * report["settings"]["max_loss"]
    below = sum(-loss(each, on_subset) < lowest for each in report["candidates"])
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.scatter(
        [each["macs_share"] for each in report["candidates"]],
        [-loss(each, on_subset) for each in report["candidates"]],
        s=12,
        color="0.75",
        label=f"every candidate, on {report['settings']['subset']} validation questions ({below} lie below)",
    )
    best = front([*report["survivors"], on_all])
    axes.plot(
        [each["macs_share"] for each in best],
        [-loss(each, on_all) for each in best],
        marker=".",
        color="tab:blue",
        label=f"the front, on all {report['questions']} validation questions",
    )
    for name, preset in report["presets"].items():
        point = preset["macs_share"], -loss(preset, on_all)
        axes.scatter(*point, s=60, color="tab:red", zorder=3)
        axes.annotate(name, point, xytext=(6, -14), textcoords="offset points")
    axes.set_ylim(bottom=lowest)
    axes.set_xlabel("MACs, as a share of the full model's (384 tokens)")
    axes.set_ylabel("F1 against the full model's (%)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    save_figure(figure, path)


def search(candidates, measure, full, arguments):
    """Measures candidates on the subset, generation by generation, until there are as many as asked for."""
    known = by_length_config(candidates.on_subset)
    done = len(measured(candidates.on_subset))
    with tqdm(total=arguments.candidates, initial=done, desc="Searching", unit="candidate") as progress:
        while progress.n < arguments.candidates:
            trial = candidates.next_trial()
            length_config = draw_length_config(trial, len(full["length_config"]), arguments.choosing, arguments.at_most)
            if tuple(length_config) not in known:
                known[tuple(length_config)] = measure(length_config)
            result = known[tuple(length_config)]
            trial.set_user_attr("length_config", length_config)
            trial.set_user_attr("em", result["em"])
            trial.set_constraint("loss", loss(result, full) - arguments.max_loss)
            candidates.on_subset.tell(trial, [result["f1"], result["macs_share"]])
            progress.update()
            within = within_loss(known.values(), full, arguments.max_loss)
            if within:
                progress.set_postfix_str(f"cheapest so far: MACs share {min(e['macs_share'] for e in within):.3f}")
            if progress.n % arguments.population == 0:
                progress.write(f"The front after {progress.n} candidates:\n{describe_front(within, full)}")


def score_survivors(candidates, measure, full, arguments):
    """On all questions, what [`measured`] returns of the full model, which comes first, and of the candidates of each
    preset's budget that were best on the subset."""
    unique = by_length_config(candidates.on_subset)
    unique.pop(tuple(full["length_config"]), None)
    within = by_budget(within_loss(unique.values(), full, arguments.max_loss), arguments.preset_shares)
    of_each = math.ceil(arguments.survivors / len(within))
    survivors = [each for of_budget in within for each in of_budget[:of_each]]
    done = by_length_config(candidates.on_all)
    for candidate in tqdm([full, *survivors], desc="Scoring survivors on all questions", unit="candidate"):
        if tuple(candidate["length_config"]) not in done:
            result = measure(candidate["length_config"])
            candidates.on_all.add_trial(
                optuna.trial.create_trial(
                    values=[result["f1"], result["macs_share"]],
                    user_attrs={name: result[name] for name in ("length_config", "em", "f1_standard_error")},
                )
            )
    scored = by_length_config(candidates.on_all)
    return [scored[tuple(each["length_config"])] for each in [full, *survivors]]


def command_line():
    """The command's parser."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT), help="folder of the model (the shipped one)")
    parser.add_argument("--windows", required=True, help="folder that recipe.windows wrote: validation is in it")
    parser.add_argument("--candidates", type=int, default=300, help="length configs to try (%(default)s)")
    parser.add_argument("--population", type=int, default=30, help="candidates a generation (%(default)s)")
    parser.add_argument("--subset", type=int, default=300, help="questions to score each candidate on (%(default)s)")
    parser.add_argument(
        "--survivors",
        type=int,
        default=40,
        help="of them to score on all questions, evenly of each preset's budget (%(default)s)",
    )
    parser.add_argument("--choosing", type=int, nargs="+", help="layers, from 0, that may drop tokens (all)")
    parser.add_argument("--at_most", type=int, default=3, help="layers of them that drop in one preset (%(default)s)")
    parser.add_argument(
        "--first", type=json.loads, nargs="+", default=[], metavar="JSON", help="length configs to try before others"
    )
    parser.add_argument(
        "--max_loss", type=float, default=5.0, help="F1 that candidates may lose, %% of full (%(default)s)"
    )
    parser.add_argument(
        "--max_preset_loss", type=float, default=3.0, help="F1 that presets may lose, on all questions (%(default)s)"
    )
    parser.add_argument(
        "--preset_shares",
        type=float,
        nargs=len(PRESET_NAMES),
        default=PRESET_SHARES,
        help=f"greatest share of the MACs, 1 for all of them, of {', '.join(PRESET_NAMES)}, each smaller than the one "
        "before (%(default)s)",
    )
    parser.add_argument("--batch_size", type=int, default=16, help="windows a batch (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument(
        "--output_dir",
        type=Path,
        required=True,
        help=f"folder to write the model with its presets, {REPORT} and {PLOT} to; it keeps the search too",
    )
    return parser


def check(arguments, config):
    """Whether the command line can be searched by, for a model of this `config`.

    Raises:
        ValueError: it cannot; it says why.
    """
    layers = config.num_hidden_layers
    if not set(arguments.choosing) <= set(range(layers)):
        raise ValueError(f"--choosing is {arguments.choosing}, expected layers of {layers}")
    if not all(1 >= most > least for most, least in budgets(arguments.preset_shares)):
        raise ValueError(
            f"--preset_shares is {arguments.preset_shares}, expected shares of 1, each smaller than the last"
        )
    for length_config in arguments.first:
        config.token_lengths(length_config if isinstance(length_config, list) else [length_config])  # raises
        drops = drops_of(length_config, arguments.choosing)
        drawn = draw_length_config(optuna.trial.FixedTrial(drops), layers, arguments.choosing, arguments.at_most)
        if drawn != length_config or max(drops.values()) > MOST_DROP:
            raise ValueError(f"--first is {length_config}, expected shares that --choosing and --at_most can give")


def main():
    arguments = command_line().parse_args()
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(arguments.model)
    config, full = model.config, [1.0] * model.config.num_hidden_layers
    arguments.choosing = arguments.choosing or list(range(len(full)))
    check(arguments, config)
    questions = with_answers(validation_questions(arguments.windows))
    settings = {
        name: getattr(arguments, name)
        for name in ("population", "subset", "max_loss", "batch_size", "seed", "choosing", "at_most", "first")
    }
    settings |= {
        "questions_sha256": hashlib.sha256(json.dumps(questions.to_list()).encode()).hexdigest(),
        "weights_sha256": file_sha256(Path(arguments.model) / "model.safetensors"),
    }
    candidates = Candidates(arguments.output_dir / "search.sqlite3", settings)
    pipeline = QuestionAnsweringPipeline(model=model, tokenizer=tokenizer)
    subset = questions.shuffle(seed=arguments.seed).select(range(min(arguments.subset, len(questions))))

    def measure(table, length_config):
        scores = score(table, answer_all(pipeline, table, arguments.batch_size, length_config, progress=False)[0])
        return scores | {"length_config": length_config, "macs_share": config.macs_share(length_config)}

    full_on_subset = candidates.on_subset.user_attrs.get(FULL) or measure(subset, full)
    candidates.on_subset.set_user_attr(FULL, full_on_subset)
    search(candidates, partial(measure, subset), full_on_subset, arguments)
    scored = score_survivors(candidates, partial(measure, questions), full_on_subset, arguments)
    full_on_all = scored.pop(0)
    within = within_loss(scored, full_on_all, arguments.max_preset_loss)
    print(f"Front on all {len(questions)} validation questions:\n{describe_front([*within, full_on_all], full_on_all)}")

    presets = place_presets(full_on_all, within, arguments.preset_shares)
    report = {
        "settings": settings,
        "questions": len(questions),
        "significance": config.significance,
        "full_on_subset": full_on_subset,
        "presets": presets,
        "survivors": scored,
        "candidates": measured(candidates.on_subset),
        "engine": describe_engine(model),
        **describe_run("recipe.search", optuna, matplotlib, torchmetrics),
    }
    write_json(arguments.output_dir / REPORT, report)
    plot(arguments.output_dir / PLOT, report)
    config.length_presets = {
        name: describe_preset(config, preset["length_config"]) | {"validation": describe_scores(preset)}
        for name, preset in presets.items()
    }
    model.save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)
    print(f"Wrote the model with {', '.join(presets)}, {REPORT} and {PLOT} to {arguments.output_dir}")


if __name__ == "__main__":
    main()
