"""Shards: what a name leads to, what is held out, what a file holds, and what damage does."""

from __future__ import annotations

import gzip
import json
import lzma
import random
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actsparse_lab.data.shards import Corpus, corpus, describe, name_of, shards, texts

# U+2028, U+0085 and \r end a line for `str.splitlines` but not in a file of JSON lines
DOCUMENTS = ["first", "", "two\nlines", "a\u2028b\x85c\rd", "naïve ∑"]
C4 = "c4-train.{:05d}-of-00003.json.gz"


def lines(*documents: object) -> bytes:
    return "".join(
        (document if isinstance(document, str) else json.dumps(document, ensure_ascii=False)) + "\n"
        for document in documents
    ).encode()


def write(path: Path, documents: list[str]) -> str:
    data = lines(*({"text": text, "url": "x"} for text in documents))
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, lambda data: data)
    path.write_bytes(pack(data))
    return str(path)


@pytest.fixture
def c4(tmp_path: Path) -> Path:
    """A folder laid out like C4's, with a file that is no shard."""
    for shard in range(3):
        write(tmp_path / C4.format(shard), [f"train {shard}"])
    write(tmp_path / "c4-validation.00000-of-00001.json.gz", ["held"])
    (tmp_path / "README.md").write_text("C4")
    return tmp_path


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server of tmp_path."""
    monkeypatch.setenv("no_proxy", "*")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def send_header(self, keyword: str, value: str) -> None:
            if keyword == "Content-Length" and "promised" in self.path:
                value = str(int(value) + 7)
            super().send_header(keyword, value)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@pytest.mark.parametrize("suffix", ["jsonl", "json", "jsonl.gz", "json.gz", "jsonl.xz", "json.xz"])
def test_every_kind_of_file_gives_the_same_texts(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path / f"some.{suffix}", DOCUMENTS)
    assert list(texts(file)) == list(enumerate(DOCUMENTS))
    assert shards(str(tmp_path)) == [file]


@pytest.mark.parametrize("suffix", ["jsonl", "json.gz", "jsonl.xz"])
def test_a_server_streams_the_same_texts(tmp_path: Path, server: str, suffix: str) -> None:
    many = [*DOCUMENTS, *(f"{number} " * 500 for number in range(500))]  # many reads long
    name = name_of(write(tmp_path / f"c4.{suffix}", many))
    (file,) = shards(f"{server}/{name}")
    assert list(texts(file)) == list(enumerate(many))
    assert list(texts(f"{file}?download=true", 500)) == list(enumerate(many))[500:]
    assert describe([file])["source"] == name


def test_a_server_that_stops_early_is_named(tmp_path: Path, server: str) -> None:
    write(tmp_path / "promised.jsonl", ["a", "b"])
    with pytest.raises(ValueError, match=r"promised\.jsonl, line 3: EOFError: .* 7 bytes early"):
        list(texts(f"{server}/promised.jsonl"))


def test_other_addresses_are_read_by_fsspec() -> None:
    for name in ("c4-train.0.jsonl", "c4-train.1.jsonl", "c4-validation.0.jsonl"):
        fsspec.filesystem("memory").pipe(f"/en/{name}", lines({"text": name}))
    found = corpus("memory://en")
    assert found == corpus("memory://en/*train*", validation="memory://en/*validation*")
    assert found.train == ["memory:///en/c4-train.0.jsonl", "memory:///en/c4-train.1.jsonl"]
    assert list(texts(found.held[0])) == [(0, "c4-validation.0.jsonl")]


def test_a_servers_missing_file_is_named(server: str) -> None:
    with pytest.raises(ValueError, match=r"http://.*/gone\.json\.gz, line 1: HTTPError: .*404"):
        list(texts(f"{server}/gone.json.gz"))


@given(st.integers(0, 12), st.integers(1, 5), st.integers(0, 14))
def test_shares_divide_the_lines(count: int, every: int, first: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        documents = [f"text {number}" for number in range(count)]
        file = write(Path(folder) / "some.jsonl", documents)
        shared = [list(texts(file, first, (part, every))) for part in range(every)]
        assert sorted(chain(*shared)) == sorted(list(enumerate(documents))[first:])
        assert all(line % every == part for part in range(every) for line, _ in shared[part])


DAMAGE = {
    "no JSON": ("{'text': 1}", "not whole JSON"),
    "half a line": ('{"text": "ab', "not whole JSON"),
    "no text": ('{"content": "ab"}', 'no "text"'),
    "a number as text": ('{"text": 3}', 'no "text"'),
    "a list": ('["text"]', 'no "text"'),
    "half a surrogate pair": (r'{"text": "\ud800"}', "UnicodeEncodeError"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_line_is_named_or_counted(tmp_path: Path, kind: str) -> None:
    line, reason = DAMAGE[kind]
    file = tmp_path / "some.jsonl"
    file.write_bytes(lines({"text": "a"}, line, {"text": "b"}, line))
    with pytest.raises(ValueError, match=rf"some\.jsonl, line 2: .*{reason}"):
        list(texts(str(file)))
    skipped = Counter[str]()
    assert list(texts(str(file), skipped=skipped)) == [(0, "a"), (2, "b")]
    assert skipped == {"some.jsonl": 2}


def test_bytes_that_are_no_text_are_damage(tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    file.write_bytes(b'{"text": "\xff\xfe"}\n')
    with pytest.raises(ValueError, match=r"some\.jsonl, line 1: not whole JSON"):
        list(texts(str(file)))


@pytest.mark.parametrize("suffix", ["json.gz", "jsonl.xz"])
def test_a_file_that_ends_early_is_named_or_counted(tmp_path: Path, suffix: str) -> None:
    draw = random.Random(0)
    numbers = [str(draw.getrandbits(64)) for _ in range(5000)]
    file = Path(write(tmp_path / f"some.{suffix}", numbers))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"some\.{suffix}, line \d+: EOFError"):
        list(texts(str(file)))
    # shared by three, the damage belongs to the one whose line is missing
    skipped = [Counter[str]() for _ in range(3)]
    read = [list(texts(str(file), share=(k, 3), skipped=skipped[k])) for k in range(3)]
    whole = sorted(chain(*read))
    assert 0 < len(whole) < 5000
    assert whole == list(enumerate(numbers))[: len(whole)]
    assert [sum(count.values()) for count in skipped] == [
        int(part == len(whole) % 3) for part in range(3)
    ]


@pytest.mark.parametrize("suffix", ["json.gz", "jsonl.xz"])
def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"some.{suffix}"
    file.write_bytes(lines({"text": "plain"}))
    with pytest.raises(ValueError, match=rf"some\.{suffix}, line 1: (BadGzipFile|LZMAError)"):
        list(texts(str(file)))


def test_a_missing_file_is_named_or_counted(tmp_path: Path) -> None:
    file = str(tmp_path / "gone.jsonl")
    with pytest.raises(ValueError, match=r"gone\.jsonl, line 1: FileNotFoundError"):
        list(texts(file))
    skipped = Counter[str]()
    assert list(texts(file, skipped=skipped)) == []
    assert skipped == {"gone.jsonl": 1}


def test_a_folder_stands_for_its_training_shards(c4: Path) -> None:
    assert [name_of(file) for file in shards(str(c4))] == [C4.format(shard) for shard in range(3)]
    assert len(shards(str(c4), "valid")) == 1
    assert len(shards(str(c4), "no such split")) == 4


def test_globs_lists_and_addresses_are_taken(c4: Path) -> None:
    first, second = (str(c4 / C4.format(shard)) for shard in (0, 1))
    assert shards(str(c4 / "*0000[01]-of*")) == [first, second, *shards(str(c4), "valid")]
    assert shards([second, first, second]) == [second, first]
    assert shards(f"file://{c4}") == [f"file://{file}" for file in shards(str(c4))]


@pytest.mark.parametrize("name", ["gone.jsonl", "*.jsonl", "", "empty"])
def test_a_name_that_leads_nowhere_is_refused(c4: Path, name: str) -> None:
    (c4 / "empty").mkdir()
    present = str(c4 / C4.format(0))
    with pytest.raises(ValueError, match="no shards at"):
        shards([present, str(c4 / "empty" / name)])
    with pytest.raises(ValueError, match="the list of names is empty"):
        shards([])


def test_validation_shards_are_held_out(c4: Path) -> None:
    (held,) = shards(str(c4), "valid")
    assert corpus(str(c4)) == Corpus(shards(str(c4)), [held])
    assert corpus(str(c4 / "*train*"), validation=str(c4)) == corpus(str(c4))


def test_else_the_last_shard_is_held_out(c4: Path) -> None:
    train = shards(str(c4))
    assert corpus(train) == Corpus(train[:2], train[2:])
    assert corpus(train, validation=train[0]) == Corpus(train[1:], train[:1])
    with pytest.raises(ValueError, match="leaves no shard"):
        corpus(train, validation=train)


def test_a_folder_of_validation_shards_alone_can_be_trained_on(tmp_path: Path) -> None:
    files = [write(tmp_path / f"c4-validation.{shard}.jsonl", ["a"]) for shard in range(3)]
    assert corpus(str(tmp_path)) == Corpus(files[:2], files[2:])


def test_one_shard_is_divided_by_its_texts(tmp_path: Path) -> None:
    found = corpus(write(tmp_path / "some.jsonl", ["a"]))
    assert found == Corpus([str(tmp_path / "some.jsonl")], [str(tmp_path / "some.jsonl")], True)
    keeps = [found.keep, found.keep_held("validation"), found.keep_held("test")]
    many = [f"text {number}" for number in range(4000)]
    parts = [[keep is None or keep(text) for keep in keeps] for text in many]
    assert all(sum(part) == 1 for part in parts)
    # 100 of 4000 expected in each held part, standard deviation 9.9: five of them is 50
    assert all(50 < sum(part[held] for part in parts) < 150 for held in (1, 2))


def test_held_shards_are_divided_into_halves() -> None:
    halves = [Corpus(["a"], ["b"]).keep_held(part) for part in ("validation", "test")]
    parts = [[keep(f"text {number}") for keep in halves] for number in range(400)]
    assert all(sum(part) == 1 for part in parts)
    # 200 expected, standard deviation 10
    assert 150 < sum(part[0] for part in parts) < 250
    assert Corpus(["a"], ["b"]).keep is None


def test_a_description_names_shards_and_no_folder(c4: Path, tmp_path: Path) -> None:
    files = shards(str(c4))
    described = describe(files)
    assert described["source"] == f"3 shards, {C4.format(0)} to {C4.format(2)}"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    copies = [str(elsewhere / name_of(file)) for file in files]
    for file, copy in zip(files, copies, strict=True):
        Path(copy).write_bytes(Path(file).read_bytes())
    assert describe(copies) == described
    Path(copies[1]).write_bytes(b"longer or shorter")
    assert describe(copies)["sha256"] != described["sha256"]
