"""Each experiment runs what its claims read, with controls, in a form that fits."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from actsparse.modify import Recipe
from actsparse_lab.analysis.effects import Arms
from actsparse_lab.engine.config import RunConfig
from actsparse_lab.engine.run_gradient_noise import GradientNoiseConfig
from actsparse_lab.papers.experiments import EXPERIMENTS
from actsparse_lab.papers.questions import SPARED
from actsparse_lab.papers.runs import Form, runs_of
from actsparse_lab.records import Run
from tests.papers.made_up import words

FULL = Form(full=True, data="images")
TRAINED = [name for name in EXPERIMENTS if name != "noise"]


class Asked(Arms):
    """For each arm one run that holds nothing; ``names`` are the arms that were asked for."""

    def __init__(self, arms: Iterable[str] = ()) -> None:
        super().__init__([])
        self.names: set[str] = set()
        for arm in arms:
            self[arm] = {0: self.run(arm)}

    @staticmethod
    def run(arm: str) -> Run:
        header = {"task": "digits", "arm": arm, "seed": 0}
        return Run(Path(arm), header, [], [], [], {"step": 1}, None, False)

    def __getitem__(self, arm: str) -> dict[int, Run]:
        self.names.add(arm)
        return super().__getitem__(arm)

    def __missing__(self, arm: str) -> dict[int, Run]:
        return {0: self.run(arm)}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_claims_read_arms_that_are_run(name: str) -> None:
    quick, full = ({each.arm for each in runs_of(name, form)[""]} for form in (Form(), FULL))
    for question in EXPERIMENTS[name].questions:
        run = full if question.full else quick
        asked = Asked(run if name == "noise" else ())  # its arms are those at hand
        assert question.effects(asked) == {}
        assert asked.names <= run, asked.names - run
        assert asked.names or name == "noise"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_no_runs_are_undecided_and_not_drawn(name: str) -> None:
    assert set(words(EXPERIMENTS[name], [])) == {"undecided"}
    for picture in EXPERIMENTS[name].pictures:
        assert picture.plot(Arms([]), False) is None


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_seeds_are_paired_and_no_run_comes_twice(name: str) -> None:
    for configs in runs_of(name, Form(seeds=3)).values():
        pairs = [(config.arm, config.seed) for config in configs]
        assert len(set(pairs)) == len(pairs)
        arms = {arm for arm, _ in pairs}
        assert len(pairs) == 3 * len(arms)


@pytest.mark.parametrize("name", [name for name in TRAINED if name != "learning-rate"])
def test_controls_differ_in_what_they_control_alone(name: str) -> None:
    stages = runs_of(name, Form(full=name == "decay", seeds=1))
    for configs in stages.values():
        by_arm = {config.arm: config for config in configs if isinstance(config, RunConfig)}
        assert any(SPARED in arm for arm in by_arm) or name == "manipulate"
        for arm, config in by_arm.items():
            if SPARED not in arm or (twin := by_arm.get(arm.replace(SPARED, ""))) is None:
                continue
            own, other = config.to_json(), twin.to_json()
            assert {key for key in own if own[key] != other[key]} <= {"arm", "no_decay", "start"}
            assert config.no_decay == ("norm", "bias")
    if name not in ("finetune", "robustness", "decay"):  # none in trained models, or to disturb
        (without,) = [config for config in stages[""] if config.arm == "no-mlp"]
        assert isinstance(without, RunConfig)
        assert without.recipe["modifications"][0]["modification"] == "LeaveOutMLP"


OWN_DECAY = ("manipulate", "learning-rate", "decay")  # their decay is what they vary, or none


@pytest.mark.parametrize("name", [name for name in TRAINED if name not in OWN_DECAY])
def test_quick_forms_keep_the_budget_of_decay(name: str) -> None:
    for folder, configs in runs_of(name, Form(seeds=1)).items():
        for config in configs:
            assert isinstance(config, RunConfig)
            Recipe.from_json(config.recipe)
            if name != "finetune" or folder:
                assert config.steps * config.weight_decay == pytest.approx(1500 * 0.5)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_full_forms_are_the_same_arms_on_images(name: str) -> None:
    quick, full = runs_of(name, Form()), runs_of(name, FULL)
    assert quick.keys() == full.keys()
    for folder in quick:
        quick_arms = {config.arm for config in quick[folder]}
        assert quick_arms <= {config.arm for config in full[folder]}
        assert all(
            config.task.startswith("vit_cifar10")
            or isinstance(config, GradientNoiseConfig)
            or name == "decay"
            for config in full[folder]
        )


def test_manipulation_is_judged_without_decay_and_with_zeroth_biases_in_both_forms() -> None:
    for form in (Form(seeds=1), FULL):
        for config in runs_of("manipulate", form)[""]:
            assert isinstance(config, RunConfig)
            changes = {each["modification"] for each in config.recipe["modifications"]}
            theirs = not config.arm.endswith("-decayed")
            assert (config.weight_decay == 0) == theirs
            assert ("ZerothBias" in changes) == (theirs and config.arm.startswith("s"))


def test_the_grid_has_all_pairs_on_as_many_samples() -> None:
    for form, largest in ((Form(seeds=1), 5e-3), (FULL, 1e-3)):
        configs = [each for each in runs_of("learning-rate", form)[""] if each.seed == 0]
        pairs = {(each.lr, each.batch_size) for each in configs}
        assert len(pairs) == 9
        assert max(pairs) == (largest, 256)
        assert len({each.steps * each.batch_size for each in configs}) == 1


def test_the_first_epoch_of_the_ratio_is_measured_densely() -> None:
    from actsparse_lab.data.digits import load_digits_splits

    quick, full = (runs_of("ratio", form)[""][0] for form in (Form(seeds=1), FULL))
    rows = load_digits_splits().info["sizes"]["train"]
    assert quick.active_at == (1, 2, 4, 8, 16, -(-rows // quick.batch_size))
    assert full.active_at == (1, 2, 4, 8, 16, 32, 64, 20_000 // full.batch_size)
    assert "flatness_correct" in quick.active


def test_the_sum_of_rate_times_decay_is_what_the_arm_is_called_by() -> None:
    from torch.optim import SGD

    from actsparse_lab.engine.arguments import schedule_of

    for config in runs_of("decay", Form(full=True, seeds=1))[""]:
        assert isinstance(config, RunConfig)
        schedule = schedule_of(config, SGD([torch.zeros(1)], lr=config.lr))
        rates = map(schedule.lr_lambdas[0], range(config.steps))  # type: ignore[attr-defined]
        total = config.lr * config.weight_decay * sum(rates)
        assert total == pytest.approx(float(config.arm.split("-sum")[1]), rel=0.02)
        assert config.lr * config.weight_decay <= 5e-3


def test_bad_forms_are_named() -> None:
    with pytest.raises(ValueError, match="unknown experiment 'magic'; known: ratio, ablation"):
        runs_of("magic", Form())
    with pytest.raises(ValueError, match="--full needs --data FOLDER"):
        runs_of("ratio", Form(full=True))
    with pytest.raises(ValueError, match="--data images is for --full"):
        Form(data="images")
    with pytest.raises(ValueError, match="seeds=0: expected 1 or more"):
        Form(seeds=0)
