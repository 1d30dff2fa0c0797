import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from itertools import pairwise

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from conftest import ROOT, once, tiny_config, tiny_folder
from qualaminilm.configuration_qualaminilm import QuaLAMiniLMConfig
from recipe import search

measurements = st.sets(st.tuples(st.integers(0, 20), st.integers(1, 20)), max_size=30).map(
    lambda points: [{"f1": f1, "macs_share": share} for f1, share in points]
)


def dominated(one, others):
    return any(
        other != one and other["f1"] >= one["f1"] and other["macs_share"] <= one["macs_share"] for other in others
    )


@given(measurements)
def test_the_front_is_what_nothing_dominates(candidates):
    front = search.front(candidates)
    assert sorted(front, key=str) == sorted((c for c in candidates if not dominated(c, candidates)), key=str)
    assert front == sorted(front, key=lambda each: each["macs_share"])


@given(measurements, st.sets(st.integers(1, 20), min_size=1, max_size=4))
def test_a_candidate_is_in_the_smallest_budget_that_pays_for_it(candidates, shares):
    shares = sorted(shares, reverse=True)
    budgets = search.by_budget(candidates, shares)
    assert len(budgets) == len(shares)
    for each in candidates:
        enough = [share for share in shares if share >= each["macs_share"]]
        assert [share for share, budget in zip(shares, budgets) if each in budget] == enough[-1:]
    for budget in budgets:
        for one, next_one in pairwise(budget):
            assert (one["f1"], -one["macs_share"]) >= (next_one["f1"], -next_one["macs_share"])


@given(st.lists(st.floats(0, 0.9), min_size=3, max_size=3, unique=True), st.integers(1, 3))
def test_every_candidate_is_a_legal_length_config(drops, at_most):
    trial = optuna.trial.FixedTrial({f"drop_{layer}": drop for layer, drop in zip((0, 2, 3), drops)})
    shares = search.draw_length_config(trial, 4, [0, 2, 3], at_most)
    tiny_config(num_hidden_layers=4).token_lengths(shares)
    asked = [drops[0], 0.0, *drops[1:]]
    dropping = [drop >= 0.1 and sum(other > drop for other in asked) < at_most for drop in asked]
    for entering, handed_on, drops_here in zip([1.0, *shares], shares, dropping):
        assert (handed_on < entering) == drops_here or entering < 0.05  # where three decimals are few
        assert handed_on == entering or handed_on <= entering * 0.9 + 0.001


def candidate(f1, share):
    return {"f1": f1, "macs_share": share, "length_config": [share] * 3}


def test_presets_are_the_best_that_their_shares_of_the_macs_pay_for():
    full = candidate(80, 1.0)

    def placed(*candidates):
        return {name: preset["macs_share"] for name, preset in search.place_presets(full, candidates).items()}

    others = [candidate(60, 0.7), candidate(72, 0.5), candidate(70, 0.36), candidate(81, 0.72)]
    best = [candidate(79, 0.65), candidate(79.5, 0.6), candidate(75, 0.45), candidate(74, 0.4)]
    assert placed(*others, *best) == {"full": 1.0, "accurate": 0.65, "balanced": 0.6, "fast": 0.45, "fastest": 0.4}
    # Of as much F1, the cheaper one.
    assert placed(*others, *best, candidate(79, 0.62))["accurate"] == 0.62
    with pytest.raises(ValueError, match="left for 'fastest', of more than 0.0 and at most 0.4 of the MACs"):
        placed(*best[:3])


FIRST = [1.0, 0.42], [0.76, 0.33]


def command(model, windows, folder):
    options = ["--model", model, "--windows", windows, "--output_dir", folder, "--seed", 3, "--survivors", 5]
    options += ["--candidates", 24, "--population", 6, "--subset", 6, "--max_loss", 100, "--max_preset_loss", 100]
    options += ["--preset_shares", 0.7, 0.63, 0.6, 0.57, "--first", *FIRST]
    return [sys.executable, "-m", "recipe.search", *map(str, options)]


def measured_so_far(path):
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
            return database.execute("SELECT COUNT(*) FROM trials WHERE state = 'COMPLETE'").fetchone()[0]
    except sqlite3.OperationalError:  # not there yet
        return 0


@once
def test_a_search_killed_at_a_random_moment_ends_with_the_same_front(tmp_path, city_windows, monkeypatch, capsys):
    model, whole, killed = tiny_folder(tmp_path / "model"), tmp_path / "whole", tmp_path / "killed"

    def run_here(folder):
        monkeypatch.setattr(sys, "argv", command(model, city_windows, folder)[2:])
        search.main()
        return capsys.readouterr()

    printed = run_here(whole).out
    assert "The front after 24 candidates" in printed and f"pareto.png to {whole}" in printed

    running = subprocess.Popen(command(model, city_windows, killed), cwd=ROOT, stderr=subprocess.DEVNULL)
    moment = random.randrange(1, 28)  # 24 on the subset, then full and the survivors on all questions
    while measured_so_far(killed / "search.sqlite3") < moment and running.poll() is None:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    stopped_after = measured_so_far(killed / "search.sqlite3")
    assert stopped_after > 0
    assert f"{stopped_after}/24" in run_here(killed).err or stopped_after >= 24

    first, second = (json.loads((folder / "search.json").read_text()) for folder in (whole, killed))
    for part in ("candidates", "survivors", "presets", "full_on_subset"):
        assert first[part] == second[part], f"killed after {moment} candidates"
    assert [each["length_config"] for each in first["candidates"][:2]] == list(FIRST)
    assert len(first["candidates"]) == 24
    expected, different = [], {tuple(each["length_config"]): each for each in first["candidates"]}
    different.pop((1.0, 1.0), None)
    for least, most in ((0.63, 0.7), (0.6, 0.63), (0.57, 0.6), (0.0, 0.57)):
        of_budget = [each for each in different.values() if least < each["macs_share"] <= most]
        expected += sorted(of_budget, key=lambda each: (each["f1"], -each["macs_share"]))[-2:]
    found = [different[tuple(each["length_config"])] for each in first["survivors"]]
    assert sorted((each["f1"], each["macs_share"]) for each in found) == sorted(
        (each["f1"], each["macs_share"]) for each in expected
    )

    config = QuaLAMiniLMConfig.from_pretrained(killed)
    assert list(config.length_presets) == ["full", *search.PRESET_NAMES]
    for name, preset in config.length_presets.items():
        assert preset["validation"]["f1"] == pytest.approx(first["presets"][name]["f1"], abs=0.01)
        assert config.token_lengths({"max_macs": preset["macs_share"]})
    assert Image.open(killed / "pareto.png").size == (1200, 750)


@pytest.mark.parametrize(("place", "first"), [(0, []), (1, []), (-6, [[1.0, 0.5, 0.2]]), (-5, [[1.0, 0.5, 0.2]] * 2)])
def test_a_candidate_that_was_being_measured_comes_again(tmp_path, place, first):
    def ask(candidates):
        trial = candidates.next_trial()
        return trial, search.draw_length_config(trial, 3, [0, 1, 2], 2)

    def tell(candidates, trial, shares):
        trial.set_user_attr("length_config", shares)
        trial.set_user_attr("em", 0.0)
        trial.set_constraint("loss", -1.0)
        candidates.on_subset.tell(trial, [100 * sum(shares) % 7, sum(shares)])

    settings = {"seed": 5, "population": 6, "choosing": [0, 1, 2], "first": first}
    whole, killed = (search.Candidates(tmp_path / name, settings) for name in ("whole", "killed"))
    for _ in range(6 + place):
        for candidates in (whole, killed):
            tell(candidates, *ask(candidates))
    ask(killed)
    resumed = search.Candidates(tmp_path / "killed", settings)
    for n in range(6 + place, 12 + place):
        (trial, expected), (other, found) = ask(whole), ask(resumed)
        assert found == expected and (n >= len(first) or found == first[n])
        tell(whole, trial, expected)
        tell(resumed, other, found)


def test_a_study_of_other_settings_is_refused(tmp_path):
    path = tmp_path / "search.sqlite3"
    search.Candidates(path, {"seed": 1, "population": 6})
    search.Candidates(path, {"seed": 1, "population": 6})
    with pytest.raises(ValueError, match="other settings: .*'seed': 1.*, not .*'seed': 2"):
        search.Candidates(path, {"seed": 2, "population": 6})


@once
@pytest.mark.parametrize("first", [[0.95, 0.95], [0.05, 0.05]])
def test_first_candidates_are_ones_that_the_search_can_draw(tmp_path, city_windows, monkeypatch, first):
    options = command(tiny_folder(tmp_path / "model"), city_windows, tmp_path / "searched")[2:-2]
    monkeypatch.setattr(sys, "argv", [*options, str(first)])
    with pytest.raises(ValueError, match="--first is .*, expected shares that --choosing and --at_most can give"):
        search.main()


@once
@pytest.mark.parametrize("first", ['{"max_macs": 0.5}', '"full"', "5"])
def test_first_candidates_are_shares(tmp_path, city_windows, monkeypatch, first):
    options = command(tiny_folder(tmp_path / "model"), city_windows, tmp_path / "searched")[2:-2]
    monkeypatch.setattr(sys, "argv", [*options, first])
    with pytest.raises(ValueError, match="length_config"):
        search.main()


@once
def test_the_budgets_of_presets_get_smaller(tmp_path, city_windows, monkeypatch):
    options = command(tiny_folder(tmp_path / "model"), city_windows, tmp_path / "searched")[2:]
    options[options.index("0.63")] = "0.7"
    monkeypatch.setattr(sys, "argv", options)
    with pytest.raises(ValueError, match=r"--preset_shares is \[0.7, 0.7, 0.6, 0.57\], expected shares of 1"):
        search.main()
