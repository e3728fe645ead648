"""The kinds of input: for each a right one, and what reads it after it was made wrong."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from tests.fuzz import mutate

Action = Callable[[], Any]
Make = Callable[[Random], Action]  # an input made wrong, and what reads it
ROOT = Path(__file__).parents[2]
KINDS: dict[str, Callable[[Path], Make]] = {}
# how many of 1000 inputs are of a kind; what takes longer comes less often
SHARES: dict[str, float] = {}


def kind(share: float) -> Callable[[Callable[[Path], Make]], Callable[[Path], Make]]:
    def add(prepare: Callable[[Path], Make]) -> Callable[[Path], Make]:
        KINDS[prepare.__name__], SHARES[prepare.__name__] = prepare, share
        return prepare

    return add


def _of_file(file: Path, read: Action, make: Callable[[bytes, Random], bytes]) -> Make:
    """``read`` after ``file`` was made wrong; now and then it is no file at all."""
    right = file.read_bytes()

    def once(random: Random) -> Action:
        _clear(file)
        if random.random() < 0.01:
            _odd(file, random)
        else:
            file.write_bytes(make(right, random))
        return read

    return once


def _json(right: bytes, random: Random) -> bytes:
    return mutate.text(json.loads(right), random)


def _clear(file: Path) -> None:
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink(missing_ok=True)


def _odd(file: Path, random: Random) -> None:
    """A FIFO, a folder, a link in a circle, to a device, or to nothing."""
    match random.randrange(5):
        case 0:
            os.mkfifo(file)
        case 1:
            file.mkdir()
        case 2:
            file.symlink_to(file.name)
        case 3:
            file.symlink_to("/dev/zero")
        case _:
            file.symlink_to("gone")


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "n_inner": 16, "n_positions": 8}
    return GPT2LMHeadModel(GPT2Config(vocab_size=16, **sizes)).eval()


IDS = torch.arange(6)[None]


def _saved(folder: Path) -> Path:
    from actsparse import save, sparsify

    model = _gpt2()
    sparsify(model, "paper", inputs={"input_ids": IDS})
    return save(model, folder / "saved")


# -- models ----------------------------------------------------------------------------------------


@kind(20)
def sidecars(folder: Path) -> Make:
    from actsparse import load

    saved = _saved(folder)
    return _of_file(saved / "actsparse.json", lambda: load(saved), _json)


@kind(15)
def weights(folder: Path) -> Make:
    from actsparse import load

    saved = _saved(folder)
    return _of_file(saved / "model.safetensors", lambda: load(saved), _header)


def _header(right: bytes, random: Random) -> bytes:
    """Bytes changed anywhere, or the header as plain values."""
    length = int.from_bytes(right[:8], "little")
    if random.random() < 0.3:
        return mutate.content(right, random)
    made = mutate.text(json.loads(right[8 : 8 + length]), random)
    return len(made).to_bytes(8, "little") + made + right[8 + length :]


@kind(15)
def pretrained_configs(folder: Path) -> Make:
    from actsparse.train.start import pretrained

    _gpt2().save_pretrained(folder / "plain")
    return _of_file(folder / "plain/config.json", lambda: pretrained(folder / "plain"), _json)


@kind(10)
def configs_alone(folder: Path) -> Make:
    from actsparse.cli.models import model_named

    file = folder / "config.json"
    _gpt2().config.to_json_file(file)
    return _of_file(file, lambda: model_named(str(file)), _json)


def _adapter(folder: Path) -> tuple[Path, Action]:
    import peft

    from actsparse import sparsify
    from actsparse.modify.adapters import load_adapter, save_adapter

    config = peft.LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True)
    model = peft.get_peft_model(_gpt2(), config)
    sparsify(model, "vanilla", inputs={"input_ids": IDS})
    place = save_adapter(model, folder / "adapter")
    return place, lambda: load_adapter(_gpt2(), place)


@kind(10)
def adapter_configs(folder: Path) -> Make:
    place, read = _adapter(folder)
    return _of_file(place / "adapter_config.json", read, _json)


@kind(5)
def adapter_sidecars(folder: Path) -> Make:
    place, read = _adapter(folder)
    return _of_file(place / "actsparse.json", read, _json)


@kind(5)
def adapters_within(folder: Path) -> Make:
    """The adapters' configs in the sidecar of a whole model."""
    import peft

    from actsparse import load, save, sparsify

    config = peft.LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True)
    model = peft.get_peft_model(_gpt2(), config)
    sparsify(model, "vanilla", inputs={"input_ids": IDS})
    saved = save(model, folder / "saved")

    def wrong(right: bytes, random: Random) -> bytes:
        sidecar = json.loads(right)
        adapters = mutate.plain(sidecar["adapters"], random)
        return json.dumps(sidecar | {"adapters": adapters}).encode()

    return _of_file(saved / "actsparse.json", lambda: load(saved), wrong)


# -- values ----------------------------------------------------------------------------------------


@kind(220)
def recipes(folder: Path) -> Make:
    from actsparse.modify import Recipe
    from actsparse.modify.recipe import MODIFICATIONS, recipe_named

    changes = [
        {"modification": "FlatnessPenalty", "weight": 1.0},
        {"modification": "PruneGradient", "threshold": 0.1},
        *({"modification": name} for name in ("TopK", "WeightNoise", "LeaveOutMLP")),
    ]
    right = recipe_named("paper-finetune").to_json()
    right["modifications"] += [each for each in changes if each["modification"] in MODIFICATIONS]
    right["modifications"] += recipe_named("best").to_json()["modifications"]

    def once(random: Random) -> Action:
        values = mutate.plain(right, random)
        return lambda: Recipe.from_json(values)

    return once


@kind(220)
def run_configs(folder: Path) -> Make:
    from actsparse.experiments import run_config
    from actsparse.train.config import RunConfig
    from actsparse.values import checked

    right = run_config("digits", "best", 0, active=("hessian", "pruning")).to_json()

    def once(random: Random) -> Action:
        values = mutate.plain(right, random)
        return lambda: checked(RunConfig, values, "config.json")

    return once


@kind(60)
def settings(folder: Path) -> Make:
    """``--set NAME=VALUE``."""
    from actsparse.cli.options import chosen
    from actsparse.experiments import EXPERIMENTS, run_config
    from actsparse.train.config import RunConfig

    tasks = [each for each in EXPERIMENTS if not each.endswith("_finetune")]
    names = [
        *RunConfig.__dataclass_fields__,
        "model.hidden_size",
        "data.size",
        "lora.r",
        "active.x",
    ]

    def once(random: Random) -> Action:
        values = [random.choice(mutate.VALUES) for _ in range(3)]
        texts = [
            v if isinstance(v, str) and random.random() < 0.5 else json.dumps(v) for v in values
        ]
        given = [f"{random.choice(names)}={text}" for text in texts[: random.randint(1, 3)]]
        task = random.choice(tasks)
        return lambda: run_config(task, "best", 0, **chosen(task, True, None, None, None, given))

    return once


@kind(40)
def data_settings(folder: Path) -> Make:
    """Settings of data and of models that a record's config names."""
    from actsparse.data.text import load_documents
    from actsparse.experiments import run_config
    from actsparse.train.tasks import task_of

    load_documents()  # once for all
    tasks = ("digits", "lm", "text", "vit_cifar10", "t5_web", "lm_web", "cifar10")
    (folder / "some.jsonl").write_text('{"text": "a b c"}\n' * 40)
    place = {"shards": str(folder / "some.jsonl"), "tokenizer": "bytes", "length": 8, "rows": 2}

    def once(random: Random) -> Action:
        name = random.choice(tasks)
        config = run_config(name, "vanilla", 0, quick=True)
        data = {**config.data, **(place if "shards" in config.data else {})}
        whole = mutate.plain({"data": data, "model": config.model}, random)
        if isinstance(whole, dict) and isinstance(whole.get("data"), dict):
            whole["data"] = {k: v for k, v in whole["data"].items() if "://" not in str(v)}

        def read() -> None:
            made = run_config(name, "vanilla", 0, quick=True, **whole)
            task_of(name).splits(made)

        return read if isinstance(whole, dict) else lambda: None

    return once


@kind(10)
def command_lines(folder: Path) -> Make:
    from typer.testing import CliRunner

    from actsparse.cli.main import VERBS, app

    options = (
        "--task --arm --arms --seed --out --steps --lr --model --data --tokenizer --from --set "
        "--measures --json --markdown --batch-size --threads --split --rows --run"
    ).split()
    words = ["digits", "paper", "0", "1", "hidden_size=8", "data.x=1", "runs/x", "-h", "--", "lm"]
    words += [v for v in mutate.VALUES if isinstance(v, str) and "\0" not in v and v != "\ud800"]
    trains = ("train", "compare")  # a last option says something wrong, or training would begin

    def once(random: Random) -> Action:
        verb = random.choice([each for each in VERBS if each not in ("reproduce", "frontier")])
        given = [verb]
        for _ in range(random.randint(0, 4)):
            given += [random.choice(options), random.choice(words)]
        given += ["--steps", random.choice(["0", "x", "-1", ""])] if verb in trains else []

        def read() -> None:
            os.chdir(folder)
            done = CliRunner().invoke(app, given)
            if done.exception is not None and not isinstance(done.exception, SystemExit):
                raise done.exception
            if done.exit_code not in (0, 2):
                raise AssertionError(f"exit code {done.exit_code} of {given}")

        return read

    return once


# -- records ---------------------------------------------------------------------------------------


@kind(120)
def records(folder: Path) -> Make:
    from actsparse.records import read_run
    from actsparse.report import compare, markdown_table
    from actsparse.report.card import model_card
    from actsparse.report.facts import differences, facts
    from actsparse.report.words import lead, markdown_theory, remarks, title

    source = ROOT / "benchmarks/digits-measures/runs/paper-seed0/record.jsonl"
    every = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    for entry in every:  # shorter: two blocks' spectra are as good as all
        entry["spectra"] = entry.get("spectra", [])[:2]
    picked = [
        e for k in ("run", "train", "eval", "measured", "result") for e in every if e["kind"] == k
    ]
    kept = [e for i, e in enumerate(picked) if i < 3 or e["kind"] == "result"]
    kept += [e for e in picked if e["kind"] == "measured"][:1]
    kept.sort(key=lambda e: e["kind"] != "run")
    file = folder / "record.jsonl"

    def wrong(right: bytes, random: Random) -> bytes:
        lines = list(kept)
        at = random.randrange(len(lines))
        made = [json.dumps(mutate.plain(e, random) if i == at else e) for i, e in enumerate(lines)]
        whole = ("\n".join(made) + "\n").encode()
        return mutate.content(whole, random) if random.random() < 0.1 else whole

    def read() -> None:
        run = read_run(file)
        table = compare([run])
        for said in (title(table), lead(table), *remarks(table), markdown_table(table)):
            assert isinstance(said, str)
        facts([run]), differences(table, [run]), markdown_theory([run])
        if run.finished:
            model_card(run)

    file.write_bytes(b"")
    return _of_file(file, read, wrong)


@kind(0.2)
def pages(folder: Path) -> Make:
    """The whole page, with plots, of records made wrong."""
    from actsparse.report import write_report

    make = records(folder / "runs/x") if (folder / "runs/x").mkdir(parents=True) is None else None
    assert make is not None

    def once(random: Random) -> Action:
        make(random)
        return lambda: write_report(folder)

    return once


@kind(40)
def measures(folder: Path) -> Make:
    from actsparse.records import read_run
    from actsparse.report import compare
    from actsparse.report.measures import read_measures, read_spectra, theory_of

    source = ROOT / "benchmarks/digits-measures/runs/paper-seed0"
    every = (source / "record.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "record.jsonl").write_bytes(every[0] + every[-1])
    shutil.copy(source / "measures.json", folder)

    def read() -> None:
        run = read_run(folder / "record.jsonl")
        read_measures(run), read_spectra(run), theory_of(compare([run]), [run])

    return _of_file(folder / "measures.json", read, _json)


@kind(60)
def benchmarks(folder: Path) -> Make:
    from actsparse.report.benchmarks import payoff_of
    from actsparse.report.payoff import markdown_payoff, payoff_lead, payoff_title

    names = ("mlp-2-threads.json", "vit-b-1-thread.json")
    sources = [
        ROOT / "benchmarks" / name for name in names if (ROOT / "benchmarks" / name).exists()
    ]
    file = folder / "mlp.json"

    def read() -> None:
        found = payoff_of([file])
        assert found is not None
        payoff_title(found), payoff_lead(found), markdown_payoff(found)

    def wrong(right: bytes, random: Random) -> bytes:
        return _json(random.choice(sources).read_bytes(), random)

    file.write_bytes(b"")
    return _of_file(file, read, wrong)


@kind(10)
def manifests(folder: Path) -> Make:
    from actsparse.train.checkpoint import facts, flaw, seal

    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5/model").write_bytes(b"1234")
    seal(folder / "checkpoint-5", step=5)

    def read() -> None:
        if flaw(folder / "checkpoint-5") is None:
            facts(folder / "checkpoint-5")

    return _of_file(folder / "checkpoint-5/manifest.json", read, _json)


# -- data ------------------------------------------------------------------------------------------


@kind(60)
def shards(folder: Path) -> Make:
    from actsparse.data.shards import texts

    lines = "".join(json.dumps({"text": f"word {n}", "n": n}) + "\n" for n in range(20)).encode()
    packed = {"jsonl": lines, "jsonl.gz": gzip.compress(lines), "json.xz": lzma.compress(lines)}

    def once(random: Random) -> Action:
        suffix = random.choice(list(packed))
        file = folder / f"some.{suffix}"
        _clear(file)
        if random.random() < 0.01:
            _odd(file, random)
        elif random.random() < 0.01:  # little that unpacks to much
            bomb = b"0" * 2**28 if random.random() < 0.5 else b"\n" * 2**28
            file.write_bytes(gzip.compress(bomb) if suffix.endswith("gz") else packed[suffix])
        else:
            file.write_bytes(mutate.content(packed[suffix], random))
        skipped = Counter[str]() if random.random() < 0.5 else None
        return lambda: [text for _, text in texts(str(file), skipped=skipped)]

    return once


@kind(50)
def images(folder: Path) -> Make:
    from PIL import Image

    from actsparse.data.augment import View
    from actsparse.data.images import FORMATS, FolderPictures, ImageRows

    made = {}
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    for form in FORMATS:
        held = io.BytesIO()
        Image.fromarray(pixels).save(held, form)
        made[form] = held.getvalue()
    rows = ImageRows(FolderPictures(folder, ["a.png"], [0]), np.array([0]), View(size=8))

    def wrong(right: bytes, random: Random) -> bytes:
        return mutate.content(made[random.choice(FORMATS)], random)

    (folder / "a.png").write_bytes(b"")
    return _of_file(folder / "a.png", lambda: rows[0], wrong)


@kind(20)
def tokenizers(folder: Path) -> Make:
    from tokenizers import Tokenizer, models, pre_tokenizers

    from actsparse.data.tokenizer import load_tokenizer

    vocab = {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}
    fast = Tokenizer(models.BPE(vocab, [("a", "b")]))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    names = ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"]
    right = {name: (folder / name).read_bytes() for name in names}

    def once(random: Random) -> Action:
        for name, held in right.items():
            _clear(folder / name)
            (folder / name).write_bytes(held)
        name = random.choice(names)
        make = mutate.content if name.endswith("txt") else _json
        _of_file(folder / name, lambda: None, make)(random)
        file = folder / ("vocab.json" if name in names[2:] else "tokenizer.json")
        return lambda: load_tokenizer(file).encode("ab a </s>")

    return once


@kind(5)
def sentencepiece_models(folder: Path) -> Make:
    from actsparse.data.tokenizer import load_tokenizer

    file = folder / "spiece.model"
    file.write_bytes(
        bytes.fromhex("0a0d0a053c756e6b3e15000000001802") + b"\n\x08\n\x01a\x15" + b"\0" * 4
    )
    return _of_file(file, lambda: load_tokenizer(file), mutate.content)


@kind(9)
def mnist(folder: Path) -> Make:
    from actsparse.data.mnist import TEST, TRAIN, mnist_splits

    for name in (TRAIN, TEST):
        images = np.zeros((12, 28, 28), np.uint8)
        np.savez_compressed(folder / name, image=images, label=np.arange(12, dtype=np.uint8) % 10)
    return _of_file(folder / TRAIN, lambda: mnist_splits(folder), mutate.content)
