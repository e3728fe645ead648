"""Kinds of input that are files of records and of data."""

from __future__ import annotations

import gzip
import io
import json
import lzma
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np

from tests.fuzz import mutate
from tests.fuzz.kinds import ROOT, Action, Make, clear, json_of, kind, odd, of_file

# -- records ---------------------------------------------------------------------------------------

RUN = ROOT / "benchmarks/digits-measures/runs/paper-seed0"


@kind(120)
def records(folder: Path) -> Make:
    from actsparse_lab.packed import read_file
    from actsparse_lab.records import read_run
    from actsparse_lab.report import compare, markdown_table
    from actsparse_lab.report.card import model_card
    from actsparse_lab.report.provenance import differences, what_ran
    from actsparse_lab.report.summary import lead, remarks, title
    from actsparse_lab.report.theory_tables import markdown_theory

    source = RUN / "record.jsonl"
    every = [json.loads(line) for line in read_file(source).splitlines()]
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
        what_ran([run]), differences(table, [run]), markdown_theory([run])
        if run.finished:
            model_card(run)

    file.write_bytes(b"")
    return of_file(file, read, wrong)


@kind(0.2)
def pages(folder: Path) -> Make:
    """The whole page, with plots, of records made wrong."""
    from actsparse_lab.report import write_report

    make = records(folder / "runs/x") if (folder / "runs/x").mkdir(parents=True) is None else None
    assert make is not None

    def once(random: Random) -> Action:
        make(random)
        return lambda: write_report(folder)

    return once


@kind(40)
def measures(folder: Path) -> Make:
    from actsparse_lab.analysis.measures import read_measures, read_spectra, theory_of
    from actsparse_lab.packed import read_file
    from actsparse_lab.records import read_run
    from actsparse_lab.report import compare

    every = read_file(RUN / "record.jsonl").splitlines(keepends=True)
    (folder / "record.jsonl").write_bytes(every[0] + every[-1])
    (folder / "measures.json").write_bytes(read_file(RUN / "measures.json"))

    def read() -> None:
        run = read_run(folder / "record.jsonl")
        read_measures(run), read_spectra(run), theory_of(compare([run]), [run])

    return of_file(folder / "measures.json", read, json_of)


@kind(40)
def packs(folder: Path) -> Make:
    from actsparse_lab.packed import PACK, pack, read_file
    from actsparse_lab.records import read_runs

    for seed in range(3):
        run = folder / "runs" / f"paper-seed{seed}"
        run.mkdir(parents=True)
        lines = read_file(RUN.with_name(run.name) / "record.jsonl").splitlines(keepends=True)
        (run / "record.jsonl").write_bytes(lines[0] + lines[-1])
    pack(folder, [f"paper-seed{seed}" for seed in range(3)])

    def wrong(right: bytes, random: Random) -> bytes:
        if random.random() < 0.5:
            return mutate.content(right, random)
        return lzma.compress(mutate.content(lzma.decompress(right), random), preset=0)

    return of_file(folder / PACK, lambda: read_runs(folder), wrong)


@kind(60)
def benchmarks(folder: Path) -> Make:
    from actsparse_lab.report.benchmark_tables import (
        benchmarks_lead,
        benchmarks_title,
        markdown_benchmarks,
    )
    from actsparse_lab.report.benchmarks import benchmarks_of

    names = ("mlp-2-threads.json", "vit-b-1-thread.json")
    sources = [
        ROOT / "benchmarks" / name for name in names if (ROOT / "benchmarks" / name).exists()
    ]
    file = folder / "mlp.json"

    def read() -> None:
        found = benchmarks_of([file])
        assert found is not None
        benchmarks_title(found), benchmarks_lead(found), markdown_benchmarks(found)

    def wrong(right: bytes, random: Random) -> bytes:
        return json_of(random.choice(sources).read_bytes(), random)

    file.write_bytes(b"")
    return of_file(file, read, wrong)


@kind(10)
def manifests(folder: Path) -> Make:
    from actsparse_lab.engine.checkpoint import facts, flaw, seal

    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5/model").write_bytes(b"1234")
    seal(folder / "checkpoint-5", step=5)

    def read() -> None:
        if flaw(folder / "checkpoint-5") is None:
            facts(folder / "checkpoint-5")

    return of_file(folder / "checkpoint-5/manifest.json", read, json_of)


# -- data ------------------------------------------------------------------------------------------


@kind(60)
def shards(folder: Path) -> Make:
    from actsparse_lab.data.shards import texts

    lines = "".join(json.dumps({"text": f"word {n}", "n": n}) + "\n" for n in range(20)).encode()
    packed = {"jsonl": lines, "jsonl.gz": gzip.compress(lines), "json.xz": lzma.compress(lines)}

    def once(random: Random) -> Action:
        suffix = random.choice(list(packed))
        file = folder / f"some.{suffix}"
        clear(file)
        if random.random() < 0.01:
            odd(file, random)
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

    from actsparse_lab.data.augment import View
    from actsparse_lab.data.images import ImageRows
    from actsparse_lab.data.pictures import FORMATS, FolderPictures

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
    return of_file(folder / "a.png", lambda: rows[0], wrong)


@kind(20)
def tokenizers(folder: Path) -> Make:
    from tokenizers import Tokenizer, models, pre_tokenizers

    from actsparse_lab.data.tokenizer import load_tokenizer

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
            clear(folder / name)
            (folder / name).write_bytes(held)
        name = random.choice(names)
        make = mutate.content if name.endswith("txt") else json_of
        of_file(folder / name, lambda: None, make)(random)
        file = folder / ("vocab.json" if name in names[2:] else "tokenizer.json")
        return lambda: load_tokenizer(file).encode("ab a </s>")

    return once


@kind(5)
def sentencepiece_models(folder: Path) -> Make:
    import sentencepiece

    from actsparse_lab.data.tokenizer import load_tokenizer

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c ab abc cab bca", "the cat sat on a mat"] * 20),
        model_writer=made, vocab_size=24, hard_vocab_limit=False, minloglevel=9,
    )  # fmt: skip
    file = folder / "spiece.model"
    file.write_bytes(made.getvalue())
    return of_file(file, lambda: load_tokenizer(file).encode("ab a </s>"), mutate.content)


@kind(9)
def mnist(folder: Path) -> Make:
    from actsparse_lab.data.mnist import TEST, TRAIN, mnist_splits

    for name in (TRAIN, TEST):
        images = np.zeros((12, 28, 28), np.uint8)
        np.savez_compressed(folder / name, image=images, label=np.arange(12, dtype=np.uint8) % 10)
    return of_file(folder / TRAIN, lambda: mnist_splits(folder), mutate.content)
