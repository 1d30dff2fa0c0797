import json
import signal
import subprocess
import sys
import time
from importlib import import_module

import pytest

from conftest import ROOT, once
from recipe import weights

pytestmark = once
FIRST = """
# Reads the data.
module = "tests.stage_of_test_weights"
packages = ["numpy"]

[files]
data = ["*.txt"]
"""
SECOND = """
module = "tests.stage_of_test_weights"
resumes = true
hours = 3

[stages]
stage = "first"

[settings]
steps = 3
"""


@pytest.fixture
def make(tmp_path, monkeypatch, capsys):
    """Runs the stages: what it printed, and which commands ran."""
    stages, data, output = (tmp_path / name for name in ("stages", "data", "output"))
    stages.mkdir()
    data.mkdir()
    (data / "a.txt").write_text("data")
    (stages / "1-first.toml").write_text(FIRST)
    (stages / "10-second.toml").write_text(SECOND)

    def run(*options):
        (output / "runs").unlink(missing_ok=True)
        monkeypatch.setattr(sys, "argv", command(tmp_path, *options)[2:])
        weights.main()
        ran = (output / "runs").read_text().splitlines() if (output / "runs").exists() else []
        return capsys.readouterr().out, ran

    return run


def command(folder, *options):
    folders = ["--stages", folder / "stages", "--data", folder / "data", "--output_dir", folder / "output"]
    return [sys.executable, "-m", "recipe.weights", *map(str, folders), *options]


def test_what_is_made_is_made_once_and_again_when_it_would_be_another(make, tmp_path):
    printed, ran = make("--dry_run")
    assert "first      to do, minutes" in printed and "second     to do, about 3 h" in printed and not ran
    assert make()[1] == ["first from False", "second from False"]
    steps = tmp_path / "output" / "second" / "steps"
    assert steps.read_text().splitlines()[2] == "2 " + repr("0 'data'\n")
    printed, ran = make()
    assert not ran and "first      done" in printed and "second     done" in printed

    first, second = tmp_path / "stages" / "1-first.toml", tmp_path / "stages" / "10-second.toml"
    first.write_text(FIRST.replace("# Reads", "# It reads"))
    assert not make()[1]
    second.write_text(SECOND.replace("steps = 3", "steps = 2"))
    printed, ran = make()
    assert ran == ["second from False"] and "second     to do again" in printed
    assert len(steps.read_text().splitlines()) == 2
    (tmp_path / "data" / "a.txt").write_text("other")
    assert make()[1] == ["first from False", "second from False"] and "other" in steps.read_text()
    assert make("--again", "second")[1] == ["second from False"]


def test_another_model_is_read_again(make, tmp_path, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_text("weights")
    (model / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(weights, "ROOT", tmp_path)
    described = weights.Stage(tmp_path / "stages" / "1-first.toml", tmp_path / "data", tmp_path / "output")
    assert "models" not in described.made_from({})
    (tmp_path / "stages" / "1-first.toml").write_text(FIRST + '\n[models]\nmodel = "model"\n')
    read = weights.Stage(tmp_path / "stages" / "1-first.toml", tmp_path / "data", tmp_path / "output")
    assert read.command()[-4:-2] == ["--model", "model"]
    before = read.made_from({})
    (model / "config.json").write_text("{}")
    assert read.made_from({}) == before
    (model / "model.safetensors").write_text("others")
    (line,) = weights.differences(before, read.made_from({}))
    assert line.startswith("models model: ")


def test_more_than_an_hour_s_work_is_discarded_when_that_is_asked_for(make, tmp_path):
    make()
    record = tmp_path / "output" / "second.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"hours": 1.5}))
    assert not make()[1]
    (tmp_path / "stages" / "10-second.toml").write_text(SECOND.replace("steps = 3", "steps = 2"))
    before = (tmp_path / "output" / "second" / "steps").read_text()
    with pytest.raises(ValueError, match=r"second .*1.5 hours; --again second .*(?s:.*)settings steps: 3, now 2"):
        make()
    assert (tmp_path / "output" / "second" / "steps").read_text() == before
    assert make("--again", "second")[1] == ["second from False"]


def test_a_killed_run_goes_on_and_its_command_is_waited_for(make, tmp_path):
    (tmp_path / "stages" / "10-second.toml").write_text(SECOND + "pause = 0.3\n")
    running = subprocess.Popen(command(tmp_path), cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    steps = tmp_path / "output" / "second" / "steps"
    while not steps.exists():
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    with pytest.raises(SystemExit):  # the stage's command lives
        make()
    while len(steps.read_text().splitlines()) < 3:
        time.sleep(0.01)
    time.sleep(0.5)
    steps.write_text("".join(steps.read_text().splitlines(keepends=True)[:2]))
    (tmp_path / "output" / "first" / "steps").touch()
    printed, ran = make()
    assert ran == ["second from 2"] and "second     to go on" in printed
    assert len(steps.read_text().splitlines()) == 3


def test_a_command_that_fails_is_not_done(make, tmp_path):
    (tmp_path / "stages" / "10-second.toml").write_text(SECOND.replace("steps = 3", 'steps = "many"'))
    with pytest.raises(subprocess.CalledProcessError):
        make()
    assert "second     to go on" in make("--dry_run")[0]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("10-second", SECOND + "\n[more]\n", "10-second.toml has .*'more'.*, expected module"),
        ("10-second", SECOND.replace('"first"', '"third"'), "stage second reads stage third"),
        ("1-first", FIRST.replace("*.txt", "*.json"), r"data is '\*.json', and no such file is in"),
    ],
)
def test_a_stage_that_cannot_be_is_named(make, tmp_path, name, text, message):
    (tmp_path / "stages" / f"{name}.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        make()


def test_a_stage_reads_files_of_the_repository_too(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "ROOT", tmp_path / "root")
    for name in ("root/written/b.txt", "data/a.txt", "data/written/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    path = tmp_path / "1-first.toml"
    path.write_text(FIRST + '[repository]\ndata = ["written/b.txt"]\n')

    def first():
        return weights.Stage(path, tmp_path / "data", tmp_path / "output")

    assert first().files == {"data": [tmp_path / "data" / "a.txt", tmp_path / "root" / "written" / "b.txt"]}
    before = first().made_from({})
    (tmp_path / "root" / "written" / "b.txt").write_text("another")
    assert first().made_from({}) != before
    (tmp_path / "root" / "written" / "b.txt").unlink()
    with pytest.raises(ValueError, match=r"written/b.txt', and no such file is in .*root"):
        first()
    (tmp_path / "root" / "written" / "b.txt").touch()
    (tmp_path / "data" / "b.txt").touch()
    with pytest.raises(ValueError, match="data has two files of one name"):
        first()


def test_an_unknown_stage_is_no_stage(make, capsys):
    with pytest.raises(SystemExit):
        make("--again", "third")
    assert "--again third: the stages are first, second" in capsys.readouterr().err


# All but the one that reads nothing but packages.
READING = sorted(path for path in (ROOT / "recipe" / "stages").glob("*.toml") if path.stem != "2-mpnet")


@pytest.mark.parametrize("path", READING, ids=lambda path: path.stem)
def test_a_shipped_stage_has_options_that_its_command_knows(tmp_path, monkeypatch, path):
    """It goes past the command line, and then finds no weights and no windows."""
    monkeypatch.setattr(weights, "ROOT", tmp_path)
    described = weights.tomllib.loads(path.read_text())
    for names in (*described.get("files", {}).values(), *described.get("repository", {}).values()):
        for name in names:
            (tmp_path / name.replace("*", "x")).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name.replace("*", "x")).touch()
    stage = weights.Stage(path, tmp_path, tmp_path / "made")
    monkeypatch.setattr(sys, "argv", stage.command()[2:])
    with pytest.raises((OSError, ValueError), match="made|no SQuAD|not SQuAD") as raised:
        import_module(stage.module).main()
    assert "HfArgumentParser" not in str(raised.value)  # which knows all options


@pytest.mark.parametrize("path", READING, ids=lambda path: path.stem)
def test_a_shipped_stage_s_own_files_are_there(path):
    for names in weights.tomllib.loads(path.read_text()).get("repository", {}).values():
        for name in names:
            assert list(ROOT.glob(name)), name
