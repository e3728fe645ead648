"""Synthetic runs, so that the report is tested without training anything."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actsparse_lab.records import Entry, RecordWriter, Run, environment, read_runs, run_path

# arm: accuracy, inference density at the end, share of dead units
ARMS: dict[str, tuple[float, float | None, float]] = {
    "vanilla": (0.967, 0.266, 0.0),
    "paper": (0.972, 0.192, 0.01),
    "no-norm-decay": (0.972, 0.197, 0.01),
    "hoyer": (0.976, 0.036, 0.56),
    "no-mlp": (0.871, None, 0.0),
}
UNITS = 192
SPECTRAL = ("concentration", "ks")


def measures(density: float | None, dead: float = 0.0, blocks: int = 2) -> Entry | None:
    """Measures of equal blocks, the first a little denser."""
    if density is None:
        return None

    def one(value: float) -> Entry:
        units = round(dead * UNITS)
        living = min(1.0, value * UNITS / (UNITS - units)) if units < UNITS else None
        return {
            "density": value,
            "derivative_density": value,
            "dead": units,
            "units": UNITS,
            "living_density": living,
        }

    slope = [1 + 0.2 * (0.5 - i / max(1, blocks - 1)) if blocks > 1 else 1.0 for i in range(blocks)]
    per_block = [{"block": f"blocks.{i}.mlp", **one(density * slope[i])} for i in range(blocks)]
    whole = one(density) | {"dead": blocks * round(dead * UNITS), "units": blocks * UNITS}
    return {**whole, "blocks": per_block}


def header(arm: str, seed: int, **more: Any) -> Entry:
    config = {"arm": arm, "seed": seed, "steps": 1500, "optimizer": {"lr": 5e-3}}
    if arm == "paper":
        config["modify"] = {"zeroth_bias": 0.1, "norm_floor": 1.0, "activation": "jsrelu"}
    return {
        "task": "digits",
        "arm": arm,
        "seed": seed,
        "config": config,
        "command": "actsparse compare --task digits --seeds 3",
        **environment(threads=1),
        **more,
    }


def result(**changed: Any) -> Entry:
    return {
        "split": "test",
        "step": 1500,
        "loss": 0.2,
        "quality": 0.97,
        "quality_name": "accuracy",
        "higher_is_better": True,
        "inference": measures(0.2),
        "training": measures(0.21),
        "skippable": {"forward": 0.4, "backward": 0.6},
        "baselines": {},
        "time": {"seconds": 40.0},
        **changed,
    }


def write_run(out: Path, arm: str, seed: int, losses: Sequence[float] = (), **changed: Any) -> Run:
    """One finished run with given validation losses and a result changed as told."""
    with RecordWriter(run_path(out, arm, seed), header(arm, seed)) as record:
        steps = [round(1500 * (i + 1) / len(losses)) for i in range(len(losses))]
        for step, loss in zip(steps, losses, strict=True):
            shown = measures(0.2)
            record.write(
                "eval", split="validation", step=step, loss=loss, quality=0.9, measures=shown
            )
        record.write("result", **result(**changed))
    return next(run for run in read_runs(out) if (run.arm, run.seed) == (arm, seed))


def write_comparison(out: Path, seeds: int = 3) -> None:
    """Five arms, 20 validations each; curves that look like those of a real digits run."""
    for arm, (accuracy, density, dead) in ARMS.items():
        for seed in range(seeds):
            draw = random.Random(f"{arm}{seed}")
            shift = draw.gauss(0, 1)
            end = None if density is None else density * (1 + 0.03 * shift)
            with RecordWriter(run_path(out, arm, seed), header(arm, seed)) as record:
                for i in range(1, 21):
                    step = 75 * i
                    decay = math.exp(-step / 180)
                    loss = (1 - accuracy) * 4 + 2.1 * decay + 0.004 * draw.random()
                    now = None if end is None else end + (0.5 - end) * math.exp(-step / 400)
                    record.write(
                        "train",
                        step=step,
                        loss=loss,
                        lr=5e-3,
                        time={"seconds": 2.0},
                        penalty=0.1 if arm == "hoyer" else None,
                        measures=measures(None if now is None else 1.02 * now, dead),
                    )
                    record.write(
                        "eval",
                        split="validation",
                        step=step,
                        loss=loss,
                        quality=accuracy - 0.8 * decay,
                        measures=measures(now, dead),
                    )
                record.write(
                    "result",
                    **result(
                        loss=(1 - accuracy) * 4,
                        quality=accuracy + 0.004 * draw.gauss(0, 1),
                        inference=measures(end, dead),
                        training=measures(None if end is None else 1.02 * end, dead),
                        skippable=None
                        if end is None
                        else {"forward": (1 - end) / 2, "backward": 1 - end},
                    ),
                )


def explained(measures: Entry, flatness: float = 2.0, gated: bool = False, **changed: Any) -> Entry:
    """Measures with the theory's beside: T · H = 100, and a coefficient that fits the density."""

    def more(row: Entry) -> Entry:
        coefficient = flatness / (100 * row["derivative_density"])
        return {
            **row,
            "flatness": flatness,
            "flatness_up": flatness,
            **({"flatness_gate": flatness / 2} if gated else {}),
            "flatness_down": flatness / 4,
            "coefficient": coefficient,
            "density_from_flatness": flatness / (100 * coefficient),
            "input_norm": 48.0,
            "activation_gradient": 2e-4,
            "effective_gradient": coefficient / 48,
            "ratio": 1.25 * row["density"],
            "down_input_norm": 3.0,
            "samples": 64,
            "tokens_per_sample": 17.0,
            "skipped": 0,
            "gradient_sparsity": 1 - row["density"],
            "gradient_l1": 1e-4,
            "gradient_l2": 1e-2,
            "participation": 0.1,
            "concentration": 0.4,
            "feature_anisotropy": 40.0,
            "gradient_anisotropy": 180.0,
            "noise_scale": 900.0,
            **changed,
        }

    rows = [
        more(row) | {f"{layer}_{key}": at + 2.0 for layer in ("up", "down") for key in SPECTRAL}
        for at, row in enumerate(measures["blocks"])
    ]
    return {**more(measures), "blocks": rows}


def spectrum(block: str, layer: str = "up", outliers: int = 2, far: float = 2.0) -> Entry:
    """A histogram with outliers up to ``far`` times the law's upper edge, as observe writes it."""
    lower, upper = 1.0, 9.0  # p = 100, N = 400, σ² = 0.01
    bins = [lower + (upper - lower) * i / 48 for i in range(49)]
    counts = [2] * 48 + ([0] * (16 - outliers) + [1] * outliers if outliers else [])
    if outliers:
        bins += [upper * far ** (i / 16) for i in range(1, 17)]
    law = {"variance": 0.01, "ratio": 0.25, "lower": lower, "upper": upper, "ks": 0.2}
    law |= {"ks_limit": 0.03, "outliers": outliers, "below": 0, "accepted": outliers == 0}
    entry = {"block": block, "layer": layer, "shape": [400, 100], "concentration": 9.0}
    return {**entry, "marchenko_pastur": law, "bins": bins, "counts": counts}


def measures_file(run: Run, **changed: Any) -> Path:
    """Writes ``measures.json`` beside a run's record."""
    entry = {
        "kind": "measures",
        "schema": 1,
        "task": run.task,
        "arm": run.arm,
        "seed": run.seed,
        "how": {"samples": 64, "labels": "model", "reduction": "sum", "split": "validation"},
        "measures": explained(measures(0.2) or {}, 4.0),
        "curvature": {
            "gauss_newton": {"value": 20.0 + run.seed, "standard_error": 3.0, "probes": 4},
            "hessian": {"value": -1.5, "standard_error": 4.0, "probes": 4},
            "token_copies": {"value": 5.0, "standard_error": 0.5, "probes": 4},
            "top_eigenvalue": {"value": 7.0, "error_bound": 0.01},
        },
        **changed,
    }
    path = run.path.with_name("measures.json")
    path.write_text(json.dumps(entry), encoding="utf-8")
    return path


def write_theory(out: Path, seeds: int = 2, gated: bool = False) -> None:
    """Two arms whose records hold every measure of the theory, and one that has no MLPs."""
    layers = ("up", "gate", "down") if gated else ("up", "down")
    spectra = [spectrum(f"blocks.{i}.mlp", layer) for i in range(5) for layer in layers]
    for arm in ("vanilla", "paper", "no-mlp"):
        for seed in range(seeds):
            with RecordWriter(run_path(out, arm, seed), header(arm, seed)) as record:
                for i in range(1, 7):
                    density = (0.5 if arm == "vanilla" else 0.4) / i
                    now = measures(density)
                    assert now is not None
                    record.write(
                        "train",
                        step=250 * i,
                        loss=1 / i,
                        lr=5e-3,
                        time={"seconds": 2.0},
                        penalty=None,
                        measures=None
                        if arm == "no-mlp"
                        else explained(now, (1 + seed) * 10.0 ** (1 - i), gated),
                    )
                    if arm != "no-mlp" and i in (1, 6):
                        found = {"gauss_newton": {"value": i + seed}, "hessian": {"value": -1.0}}
                        record.write(
                            "measured", step=250 * i, how={}, measures=None, curvature=found
                        )
                last = None if arm == "no-mlp" else explained(now, 1e-5, gated)
                plain = None if arm == "no-mlp" else now
                more = {} if arm == "no-mlp" else {"spectra": spectra}
                record.write("result", **result(training=last, inference=plain, **more))
    for run in read_runs(out):
        if run.arm != "no-mlp":
            measures_file(run)


def timed(dense: float, **ratios: float) -> Entry:
    """Times of programs by dense ÷ each, with intervals of a tenth to either side."""
    found = [
        {"of": "dense", "to": to, "value": r, "low": 0.9 * r, "high": 1.1 * r}
        for to, r in ratios.items()
    ]
    return {
        "seconds": {"dense": dense, **{to: dense / r for to, r in ratios.items()}},
        "ratios": found,
    }


def mlp_record(threads: int = 1, **changed: Any) -> Entry:
    """One MLP at T = 1 and 197 and three densities: ratios 0.4 ÷ density, and half as much."""
    rows = []
    for tokens in (1, 197):
        for density in (0.05, 0.1, 0.8):
            gain = 0.4 / density * (1 if tokens == 1 else 0.5)
            row: Entry = {"tokens": tokens, "density": density}
            row["forward"] = timed(0.001, sparse=gain, screened=2 * gain)
            if tokens == 197:
                row["training"] = timed(0.01, sparse=3 * gain, screened=gain)
                row["memory"] = {
                    "dense": 2000,
                    "sparse": 3000 * density,
                    "screened": 3200 * density,
                }
            rows.append(row)
    return {
        **environment(threads=threads),
        "benchmark": "mlp",
        "sizes": {"d": 768, "h": 3072, "activation": "relu", "pattern": "even", "rounds": 9},
        "threads": threads,
        "kernels": "avx512",
        "rows": rows,
        "break_even": {"forward": {"1": 0.8, "197": 0.4}, "training": {"197": None}},
        **changed,
    }


def model_record(threads: int = 1, **changed: Any) -> Entry:
    """A ViT's training steps at two densities."""
    rows = []
    for density, gain in ((0.01, 1.5), (0.05, 1.2)):
        row = {"density": density, **timed(2.5, **{"accelerated": gain, "without MLPs": 1.9})}
        row |= {"mlp_ratio": 4.0, "mlp_share": 0.5, "amdahl": 1.6, "reached": gain / 1.6}
        row |= {"error": {"logits": 2e-7}, "mlps": [{"tokens": 197, "training": timed(0.1)}]}
        row["memory"] = {"dense": {"peak_mib": 800.0}, "accelerated": {"peak_mib": 600.0}}
        rows.append(row)
    return {
        **environment(threads=threads),
        "benchmark": "model",
        "model": "vit-b",
        "sizes": {"batch": 8, "rounds": 5},
        "threads": threads,
        "kernels": "avx512",
        "rows": rows,
        **changed,
    }


def trained_record(**changed: Any) -> Entry:
    """A trained model, timed as it is."""
    phases = {
        name: {"density": density, **timed(0.3, **{"accelerated": 0.98, "without MLPs": 1.3})}
        for name, density in (("inference", 0.04), ("training", 0.06))
    }
    score = {name: {"quality": 0.9} for name in ("dense", "accelerated")}
    entry = {"benchmark": "model", "model": "ViT", **phases, "score": score, "rows": 360}
    entry |= {"task": "digits", "arm": "paper", "seed": 0, "quality_name": "accuracy"}
    return {**environment(threads=1), **entry, "threads": 1, "kernels": "avx512", **changed}


def write_benchmarks(out: Path) -> list[Path]:
    """A record of each kind, in JSON files."""
    out.mkdir(parents=True, exist_ok=True)
    entries = {
        "mlp": mlp_record(),
        "mlp-2": mlp_record(threads=2),
        "vit-b": model_record(),
        "digits": trained_record(),
    }
    for name, entry in entries.items():
        (out / f"{name}.json").write_text(json.dumps(entry), encoding="utf-8")
    return [out / f"{name}.json" for name in entries]


@pytest.fixture(scope="session")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five arms and three seeds. Read it; do not write into it."""
    out = tmp_path_factory.mktemp("comparison")
    write_comparison(out)
    return out


@pytest.fixture
def add_run(tmp_path: Path) -> Callable[..., Run]:
    """Writes a finished run into tmp_path: `add_run(arm, seed, losses=…, quality=…)`."""
    return lambda arm, seed, losses=(), **changed: write_run(tmp_path, arm, seed, losses, **changed)


@pytest.fixture
def add_run_to() -> Callable[..., Run]:
    """The same into any folder: `add_run_to(out, arm, seed, …)`."""
    return write_run


@pytest.fixture
def measured() -> Callable[..., Entry | None]:
    return measures


@pytest.fixture(scope="session")
def theory_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with all measures of the theory. Read it; do not write into it."""
    out = tmp_path_factory.mktemp("theory")
    write_theory(out)
    return out


@pytest.fixture
def theory_parts() -> SimpleNamespace:
    """The functions above that make parts of such records."""
    return SimpleNamespace(
        explained=explained, spectrum=spectrum, measures_file=measures_file, write=write_theory
    )


@pytest.fixture
def benchmarks() -> SimpleNamespace:
    """The functions above that make records of benchmarks."""
    return SimpleNamespace(
        mlp=mlp_record, model=model_record, trained=trained_record, write=write_benchmarks
    )
