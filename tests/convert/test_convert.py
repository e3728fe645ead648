"""A checkpoint becomes a sparse one by the command, and by the function."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from actsparse import accelerate, load, observe
from actsparse.cli.main import app
from actsparse.convert.checkpoint import load_checkpoint
from actsparse.convert.losses import mean_loss
from actsparse.convert.scores import gate_share
from actsparse.convert.text import read_documents, windows_of
from actsparse.modify.drop_small import dropping_blocks
from tests.convert.checkpoints import tokenizer, trained, write_text


@pytest.fixture(scope="module", params=["gelu", "swiglu"])
def checkpoint(request, tmp_path_factory) -> Path:
    return trained(request.param, tmp_path_factory.mktemp("checkpoint"))


def run(*words: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.stdout, done.stderr


def test_the_command_converts_judges_and_saves(checkpoint: Path, tmp_path: Path) -> None:
    text, out = checkpoint.parent / "text.jsonl", tmp_path / "out"
    words = ["convert", checkpoint, "--text", text, "--window", "64", "--out", out, "--json"]
    words += ["--dtype", "float32", "--tokens", "10k", "--lr", "1e-3", "--budget", "10%"]
    words += ["--form", "both" if checkpoint.name == "swiglu" else "gate"]
    code, said, err = run(*words)
    assert code == 0, err
    for stage in ("dense loss", "calibrate", "choose", "distil", "choose again", "judge on test"):
        assert re.search(rf"^{stage}: ([2-9]|\d\d+) steps$", err, re.M), err  # so it has time left
    record = json.loads(said)
    assert record == json.loads((out / "conversion.json").read_text())
    assert record["choice"]["loss"] - record["choice"]["dense"] <= record["budget_nats"]
    assert out.with_name("out.distilling").exists() == (record["trained_tokens"] == 0)
    names = {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"}
    assert names <= {path.name for path in out.iterdir()}
    card = (out / "README.md").read_text()
    assert f"{record['judgements'][0]['density']:.1%}" in card

    model = load(out)
    assert len(dropping_blocks(model)) == 2
    windows = windows_of(read_documents([text]), lambda t: tokenizer()(t)["input_ids"], 64)
    with observe(model, blocks=dropping_blocks(model)) as seen:
        loss = mean_loss(model, windows)
    density = seen.summary("inference")["density"]
    assert density == pytest.approx(record["judgements"][0]["density"], abs=0.05)
    ids = windows.ids[0][None]
    with torch.no_grad():
        logits = model(ids).logits
        handle = accelerate(model, inputs=ids, mode="sparse")
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(ids[:, :1]).logits, logits[:, :1], rtol=1e-4, atol=1e-4)
    assert {row["program"] for row in handle.table()} == {"sparse"}
    code, said, err = run(
        "judge", out, "--text", text, "--dense", checkpoint, "--window", "64", "--json"
    )
    assert code == 0, err
    judged = json.loads(said)["judgements"][0]
    assert judged["loss"] == pytest.approx(loss, abs=1e-5)
    assert judged["density"] == pytest.approx(density, abs=1e-9)
    assert judged["excess"] == pytest.approx(judged["loss"] - judged["dense_loss"])
    assert judged["interval"][0] <= judged["excess"] <= judged["interval"][1]
    if checkpoint.name == "swiglu":
        passed = 1 - gate_share(record["choice"]["share"])
        assert judged["bytes_read"] == pytest.approx((1 + passed + density) / 3, abs=0.03)
    else:
        assert judged["bytes_read"] == pytest.approx((1 + density) / 2)
    code, said, _ = run("judge", out, "--text", text, "--window", "64")
    assert code == 0
    assert "MLP bytes read" in said


def test_other_loaders_refuse_the_folder(checkpoint: Path, tmp_path: Path) -> None:
    text, out = checkpoint.parent / "text.jsonl", tmp_path / "out"
    code, _, err = run(
        "convert", checkpoint, "--text", text, "--window", "64", "--out", out, "--dtype", "bfloat16"
    )
    assert code == 0, err
    with pytest.raises(Exception, match="actsparse"):
        AutoModelForCausalLM.from_pretrained(out)
    assert AutoTokenizer.from_pretrained(out)("a")["input_ids"] == tokenizer()("a")["input_ids"]
    model = load(out)
    assert model.dtype == torch.bfloat16
    assert model.name_or_path == model.config.name_or_path == str(out)
    if checkpoint.name == "swiglu":  # as transformers has them in bfloat16
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32
        plain = AutoModelForCausalLM.from_pretrained(checkpoint)
        assert torch.equal(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    ids = torch.tensor([tokenizer()("The ")["input_ids"]])
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 8)


@pytest.mark.parametrize("checkpoint", ["swiglu"], indirect=True)
def test_an_interrupted_distillation_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    text = checkpoint.parent / "text.jsonl"

    def words(name: str, *more: str) -> list[str | Path]:
        return [
            "convert", checkpoint, "--text", text, "--window", "64", "--out", tmp_path / name,
            "--dtype", "float32", "--tokens", "6k", "--lr", "1e-3", "--json", "--budget", "30%",
            "--share", "0.9", *more,
        ]  # fmt: skip

    _, whole, _ = run(*words("whole"))
    from actsparse.convert import distillation

    real, calls = distillation.loss_of, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "loss_of", interrupted)
        _, _, err = run(*words("again"))
    assert "the same command goes on with it" in err
    assert (tmp_path / "again.distilling" / "distil.json").is_file()
    assert not (tmp_path / "again").exists()
    calls.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "loss_of", lambda *a: (calls.append(1), real(*a))[1])
        code, again, err = run(*words("again"))
    assert code == 0, err
    assert len(calls) == 12 - 7
    one, two = json.loads(whole), json.loads(again)
    assert one["choice"] == two["choice"]
    assert one["judgements"] == two["judgements"]


REFUSED = {
    "no tokenizer": (["--out", "x"], "holds no tokenizer"),
    "budget": (["--out", "x", "--budget", "0%"], "expected a share of perplexity above 0"),
    "a budget without %": (["--out", "x", "--budget", "3"], "expected a share, as 3% or 0.03"),
    "words for a budget": (["--out", "x", "--budget", "a lot"], "expected a share, as 3% or 0.03"),
    "tokens": (["--out", "x", "--tokens", "1.5"], "as 2M, 300k or 5000"),
    "form": (["--out", "x", "--form", "up"], "expected gate, product, both"),
    "loss": (["--out", "x", "--loss", "kl"], "one of 'logits', 'text', 'blocks'"),
    "train": (["--out", "x", "--train", "head"], "one of 'all', 'blocks', 'lora'"),
    "dtype": (["--out", "x", "--dtype", "int8"], "expected bfloat16 or float32"),
    "a full folder": (["--out", "full"], "holds other files"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_before_any_work(kind: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    options, message = REFUSED[kind]
    text = write_text(tmp_path, 12)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    model = tmp_path / "model"
    from tests.convert.checkpoints import plain

    plain("gelu").save_pretrained(model)
    if kind != "no tokenizer":
        tokenizer().save_pretrained(model)
    code, _, err = run("convert", model, "--text", text, *options)
    assert code == 2
    assert message in err
    assert not (tmp_path / "x").exists()


def test_text_and_tokenizers_that_do_not_fit_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def error(text: str, *more: str) -> str:
        (tmp_path / "text.txt").write_text(text)
        code, _, err = run(
            "convert", checkpoint, "--text", tmp_path / "text.txt", "--out", out, *more
        )
        assert code == 2
        assert not out.exists()
        return err

    assert "no text in" in error("  \n")
    assert "five at least" in error("a short text")
    assert "is the tokenizer another model's" in error("zq\x7fxj" * 3000, "--window", "64")
    (tmp_path / "bad.jsonl").write_text('{"words": "x"}\n')
    code, _, err = run("convert", checkpoint, "--text", tmp_path / "bad.jsonl", "--out", out)
    assert code == 2
    assert 'line 1: expected {"text": "..."}' in err
    wrong = tokenizer()
    wrong.add_tokens([f"<more {i}>" for i in range(9)])
    wrong.save_pretrained(tmp_path / "wrong")
    model, _ = load_checkpoint(checkpoint)
    model.save_pretrained(tmp_path / "wrong")
    with pytest.raises(ValueError, match="tokenizer has 266 tokens, the model 257"):
        load_checkpoint(tmp_path / "wrong")


def test_a_converted_folder_chats(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    text, out = checkpoint.parent / "text.jsonl", tmp_path / "out"
    run("convert", checkpoint, "--text", text, "--window", "64", "--out", out)
    code, said, err = run("chat", out, "--prompt", "The ", "--tokens", "8")
    assert code == 0, err
    assert " a second" in err
    model, tokens = load(out), AutoTokenizer.from_pretrained(out)
    ids = tokens("The ", return_tensors="pt")["input_ids"]
    wanted = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert said.strip() == tokens.decode(wanted, skip_special_tokens=True).strip()
    twice = CliRunner().invoke(app, ["chat", str(out), "--tokens", "70"], input="The \n\nA b\n")
    assert twice.exit_code == 0, twice.stderr
    assert twice.stderr.count(" a second") == 2
    assert "no longer fit" in twice.stderr  # the model takes 128 tokens
    assert ">" not in twice.stdout  # piped: answers alone
    piped = CliRunner().invoke(app, ["chat", str(out), "--tokens", "9"], input="a" * 200 + "\nA\n")
    assert piped.exit_code == 2
    code, _, err = run("chat", out, "--prompt", "caf\udce9")  # so a C locale hands bytes on
    assert code == 2
    assert "is not UTF-8" in err
    monkeypatch.setattr("actsparse.cli.chat._at_terminal", lambda: True)
    lines = f"The \n{'a' * 200}\nA b\n"
    going = CliRunner().invoke(app, ["chat", str(out), "--tokens", "9"], input=lines)
    assert going.exit_code == 0, going.stderr
    assert going.stderr.count(" a second") == 2
    assert "takes 1 to 128" in going.stderr
    assert "left out" not in going.stderr
    code, _, err = run("chat", out, "--prompt", "The ", "--tokens", "400")
    assert code == 2
    assert "takes 1 to 128" in err
    code, _, err = run("chat", checkpoint, "--prompt", "The ")
    assert code == 2
    assert "expected a folder of actsparse convert" in err


@pytest.mark.parametrize("checkpoint", ["swiglu"], indirect=True)
def test_a_conversion_goes_on_with_the_weights_of_another(checkpoint: Path, tmp_path: Path) -> None:
    text, first = checkpoint.parent / "text.jsonl", tmp_path / "first"
    words = ["convert", checkpoint, "--text", text, "--window", "64", "--dtype", "float32"]
    words += ["--lr", "1e-3", "--form", "both"]
    code, said, err = run(
        *words, "--tokens", "10k", "--share", "0.9", "--budget", "1%", "--out", first, "--json"
    )
    assert code == 0, err
    one = json.loads(said)
    assert one["trained_tokens"] == 10240
    again = [*words, "--budget", "1%", "--start", first, "--json"]
    code, said, err = run(*again, "--out", tmp_path / "same")
    assert code == 0, err
    same = json.loads(said)
    assert same["trained_tokens"] == 10240
    assert same["choice"]["share"] == pytest.approx(one["choice"]["share"], abs=2 / 64)
    assert same["judgements"][0]["loss"] == pytest.approx(one["judgements"][0]["loss"], abs=0.05)
    old, new = (load(folder).state_dict() for folder in (first, tmp_path / "same"))
    assert all(torch.equal(old[n], new[n]) for n in old if "threshold" not in n)
    code, said, err = run(*again, "--out", tmp_path / "more", "--tokens", "4k", "--share", "0.9")
    assert code == 0, err
    more = json.loads(said)
    assert more["trained_tokens"] in (10240, 10240 + 4096)
    assert more["choice"]["share"] >= same["choice"]["share"]
    code, said, err = run(*again, "--out", tmp_path / "worse", "--tokens", "512", "--lr", "10")
    assert code == 0, err
    assert json.loads(said)["trained_tokens"] == 10240
    assert "the earlier weights allow more than the distilled" in err
    assert (tmp_path / "worse.distilling" / "distil.json").is_file()
    assert not (tmp_path / "same.distilling").exists()
    half, torn = (shutil.copytree(first, tmp_path / name) for name in ("half", "torn"))
    (half / "model.safetensors").unlink()
    data = bytearray((torn / "model.safetensors").read_bytes())
    data[-8] ^= 1
    (torn / "model.safetensors").write_bytes(data)
    for words, message in (
        ([*again[:-3], "--start", half], "model.safetensors is missing"),
        ([*again[:-3], "--start", torn], "is not what was saved"),
        ([*again, "--budget", "0.0001%"], "lose more than the budget"),
        ([*again[:-3], "--start", checkpoint], "has no conversion.json"),
    ):
        code, _, err = run(*words, "--out", tmp_path / "none")
        assert code == 2
        assert message in err
    assert not (tmp_path / "none").exists()
