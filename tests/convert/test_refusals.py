"""What a conversion must not do: harm other files, lose work, or judge what it should refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel, PreTrainedModel
from typer.testing import CliRunner

from actsparse import DropSmall, files, sparsify
from actsparse.cli.main import app
from actsparse.convert import Distillation, Split, Windows, calibrate, convert, distil
from actsparse.convert.text import read_texts
from tests.convert.checkpoints import plain, tokenizer, trained
from tests.convert.test_parts import some_windows


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return trained("swiglu", tmp_path_factory.mktemp("checkpoint"), steps=60)


def run(*words: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.stdout, done.stderr


def held(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize("place", ["", "inside"])
def test_the_checkpoint_itself_is_never_written_to(
    checkpoint: Path, tmp_path: Path, place: str
) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "link").symlink_to(source)
    before = held(source)
    text = checkpoint.parent / "text.jsonl"
    code, _, err = run("convert", source, "--text", text, "--out", tmp_path / "link" / place)
    assert code == 2
    assert "is the checkpoint" in err
    assert held(source) == before


def test_a_model_that_no_conversion_wrote_is_not_replaced(checkpoint: Path, tmp_path: Path) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "other")
    text = checkpoint.parent / "text.jsonl"
    code, _, err = run("convert", checkpoint, "--text", text, "--out", other)
    assert code == 2
    assert "that no conversion wrote" in err
    assert held(other) == held(checkpoint)


def test_the_state_of_distillation_is_all_that_is_deleted(checkpoint: Path, tmp_path: Path) -> None:
    text, out, keep = checkpoint.parent / "text.jsonl", tmp_path / "o", tmp_path / "o.distilling"
    keep.mkdir()
    (keep / "mine.txt").write_text("mine")
    words = ["convert", checkpoint, "--text", text, "--window", "64", "--out", out]
    words += ["--dtype", "float32"]
    code, _, err = run(*words, "--tokens", "1k")
    assert code == 2
    assert "holds other files" in err
    code, _, err = run(*words)  # it keeps no state, so it has none to delete
    assert code == 0, err
    assert held(keep) == {"mine.txt": b"mine"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--share", "1.5"], "share=1.5"),
        (["--lr", "0"], "lr=0.0"),
        (["--lr", "-1"], "lr=-1.0"),
        (["--minutes", "nan"], "minutes"),
        (["--delta", "1"], "delta=1.0"),
        (["--eval-tokens", "0"], "eval"),
        (["--window", "200"], "at most 128"),
    ],
)
def test_settings_are_refused_before_any_pass(
    checkpoint: Path, tmp_path: Path, more: list[str], message: str, monkeypatch
) -> None:
    monkeypatch.setattr("actsparse.convert.pipeline.mean_loss", lambda *a: pytest.fail("too late"))
    text = checkpoint.parent / "text.jsonl"
    words = ["convert", checkpoint, "--text", text, "--out", tmp_path / "o", "--tokens", "1k"]
    words += more if "--window" in more else ["--window", "64", *more]
    code, _, err = run(*words)
    assert code == 2
    assert message in err


def test_a_place_that_cannot_be_written_is_refused_before_text_is_read(
    checkpoint: Path, tmp_path: Path
) -> None:
    for out in ("/proc/nowhere/out", checkpoint / "config.json" / "out"):
        code, _, err = run("convert", checkpoint, "--text", tmp_path / "no.txt", "--out", out)
        assert code == 2
        assert "cannot write" in err or "is the checkpoint" in err


def test_a_disk_without_room_is_refused(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("actsparse.convert.checkpoint.disk_usage", lambda path: usage)
    text = checkpoint.parent / "text.jsonl"
    words = ["--window", "64", "--out", tmp_path / "o"]
    code, _, err = run("convert", checkpoint, "--text", text, *words)
    assert code == 2
    assert "free some space" in err


def test_one_process_at_a_time_writes_a_place(tmp_path: Path) -> None:
    place = tmp_path / "out"
    with (
        files.alone(place),
        pytest.raises(FileExistsError, match="another process writes"),
        files.alone(place),
    ):
        pass
    with files.alone(place):
        pass
    assert not list(tmp_path.iterdir())


def test_a_converted_checkpoint_is_not_converted_again(checkpoint: Path, tmp_path: Path) -> None:
    text, out = checkpoint.parent / "text.jsonl", tmp_path / "out"
    how = ["--text", text, "--window", "64"]
    code, _, err = run("convert", checkpoint, *how, "--out", out, "--dtype", "float32")
    assert code == 0, err
    code, _, err = run("convert", out, *how, "--out", tmp_path / "again")
    assert (code, "was converted already" in err) == (2, True)
    code, _, err = run("judge", checkpoint, *how)
    assert (code, "expected a folder of actsparse convert" in err) == (2, True)
    other = tmp_path / "other"
    plain("gelu").save_pretrained(other)
    tokenizer().save_pretrained(other)
    code, _, err = run("judge", out, *how, "--dense", other)
    assert (code, "is not what this one was made of" in err) == (2, True)


def test_texts_of_one_name_are_told_apart(tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("a/x.txt", "b/x.txt", "test.jsonl.xz", "y.jsonl")]
    for place in places:
        place.parent.mkdir(exist_ok=True)
        place.write_text("text" if place.suffix == ".txt" else '{"text": "text"}')
    del places[2]
    (tmp_path / "test.txt").write_text("text")
    found = read_texts([*places, tmp_path / "test.txt"], taken=("test",))
    assert list(found) == [*map(str, places[:2]), "y", str(tmp_path / "test.txt")]
    with pytest.raises(ValueError, match="given twice"):
        read_texts([places[0], places[0]])


def test_a_text_with_a_byte_order_mark_has_none_in_its_document(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_bytes(b"\xef\xbb\xbftext")
    assert read_texts([file]) == {"x": ["text"]}


def test_a_document_twice_is_in_one_part() -> None:
    windows = Windows([torch.full((4,), i // 2) for i in range(60)], list(range(60)))
    parts = Split.of(windows)
    inside = [
        int(ids[0]) for part in (parts.train, parts.validation, parts.test) for ids in part.ids
    ]
    assert sorted(inside) == list(range(30))
    assert not parts.pieces
    assert Split.of(Windows(windows.ids, [0] * 60)).pieces
    with pytest.raises(ValueError, match="1 windows that differ"):
        Split.of(Windows([torch.ones(4)] * 60, list(range(60))))


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=250, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, initializer_range=0.5,
    )  # fmt: skip
    with pytest.raises(ValueError, match="depend on later tokens"):
        convert(BertLMHeadModel(config), Split.of(some_windows(20, 20)), dtype=torch.float32)


class Odd(nn.Module):
    """A φ without a name."""

    def forward(self, z: Tensor) -> Tensor:
        return z * z.sin()


class Two(nn.Module):
    """Two blocks, one of them with a φ that has no name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(250, 8)
        self.one = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        self.two = nn.Sequential(nn.Linear(8, 32), Odd(), nn.Linear(32, 8))
        self.head = nn.Linear(8, 250)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.one(x)
        return self.head(x + self.two(x))


def test_blocks_that_are_left_out_are_told() -> None:
    torch.manual_seed(0)
    model = Two()
    with torch.no_grad():
        model.head.weight.mul_(0.1)
    windows = Windows([torch.randint(0, 250, (16,)) for _ in range(400)], list(range(400)))
    done = convert(model, Split.of(windows), dtype=torch.float32)
    assert [row["block"] for row in done.judgements[0].blocks] == ["one"]
    assert "two" in " ".join(done.left_out)
    assert done.to_json()["left_out"] == done.left_out


@pytest.mark.parametrize("at", [1, 8, 11, 19])
def test_a_resumed_distillation_is_the_same_with_dropout_and_after_recalibration(
    tmp_path: Path, at: int
) -> None:
    windows = some_windows(30)
    how = Distillation(share=0.8, tokens=64 * 20, batch=64, lr=1e-3)

    def distilled(folder: Path | None, stop: int | None = None) -> dict[str, Tensor]:
        teacher, student = plain("gelu"), plain("gelu")  # GPT-2 has dropout
        sparsify(student, DropSmall(), inputs=windows.ids[0][None])
        calibration = calibrate(student, [ids[None] for ids in windows.ids])

        def progress(step: int, steps: int, known: dict[str, float]) -> None:
            if step == stop:
                raise KeyboardInterrupt

        torch.manual_seed(0 if stop is None else 1)
        distil(
            student, teacher, windows, how, calibration=calibration, folder=folder,
            progress=progress,
        )  # fmt: skip
        return student.state_dict()

    whole = distilled(None)
    with pytest.raises(KeyboardInterrupt):
        distilled(tmp_path / "state", at)
    again = distilled(tmp_path / "state")
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_a_kept_distillation_of_something_else_is_refused(tmp_path: Path) -> None:
    how, folder = Distillation(share=0.5, tokens=128, batch=64), tmp_path / "state"

    def distilled(windows: Windows, form: str = "gate", more: float = 0.0) -> int:
        teacher, student = plain("swiglu"), plain("swiglu")
        with torch.no_grad():
            for each in (teacher, student):
                each.model.norm.weight += more
        handle = sparsify(student, DropSmall(form), inputs=windows.ids[0][None])  # type: ignore[arg-type]
        assert handle.blocks
        calibration = calibrate(student, [ids[None] for ids in windows.ids])
        return distil(student, teacher, windows, how, calibration=calibration, folder=folder)

    assert distilled(some_windows(30)) == 2
    assert distilled(some_windows(30)) == 2
    for other in ({"form": "product"}, {"more": 0.1}, {}):
        windows = some_windows(30 if other else 29)
        with pytest.raises(ValueError, match="of another model, form, dtype or text"):
            distilled(windows, **other)  # type: ignore[arg-type]
    said = json.loads((folder / "distil.json").read_text())
    assert said["step"] == 2


@pytest.mark.parametrize("where", ["the state", "the result"])
def test_a_disk_that_is_full_later_is_named(
    where: str, checkpoint: Path, tmp_path: Path, monkeypatch
) -> None:
    def full(*_, **__) -> None:
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    if where == "the state":
        monkeypatch.setattr("actsparse.convert.distillation.save_file", full)
    else:
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    text, out = checkpoint.parent / "text.jsonl", tmp_path / "o"
    words = ["convert", checkpoint, "--text", text, "--window", "64", "--out", out]
    code, _, err = run(*words, "--tokens", "1k", "--dtype", "float32")
    assert code != 0
    assert "No space left on device" in err
    assert not out.exists()
    if where == "the result":  # nothing of the work is lost
        assert "the same command goes on with it" in err


def test_a_distillation_that_gains_nothing_is_told_and_kept(
    checkpoint: Path, tmp_path: Path
) -> None:
    text, out = checkpoint.parent / "text.jsonl", tmp_path / "o"
    words = ["convert", checkpoint, "--text", text, "--window", "64", "--out", out]
    words += ["--tokens", "1k", "--lr", "0.5", "--share", "0.95", "--dtype", "float32"]
    code, _, err = run(*words, "--budget", "0.5%")
    assert code == 0, err
    assert "the dense weights allow more than the distilled ones" in err
    record = json.loads((out / "conversion.json").read_text())
    assert record["trained_tokens"] == 0
    assert record["distilled"][-1][1] - record["choice"]["dense"] > record["budget_nats"]
    assert (tmp_path / "o.distilling" / "distil.json").is_file()
