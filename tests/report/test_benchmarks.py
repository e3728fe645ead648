"""Records of benchmarks, as numbers: read, checked and told apart."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actsparse.bench.mlp import bench_mlp
from actsparse.bench.model import bench_model
from actsparse_lab.records import RecordError, environment
from actsparse_lab.report.benchmarks import (
    Benchmarks,
    Ratio,
    Whole,
    _labels,
    benchmark_files,
    benchmarks_of,
    read_benchmark,
)

ROOT = Path(__file__).parents[2]


def read(folder: Path, **entries: dict[str, Any]) -> Benchmarks:
    """The payoff of records written to ``folder`` under these names."""
    paths = [folder / f"{name}.json" for name in entries]
    for path, entry in zip(paths, entries.values(), strict=True):
        path.write_text(json.dumps(entry), encoding="utf-8")
    found = benchmarks_of(paths)
    assert found is not None
    return found


def test_a_layer_has_the_numbers_of_its_record(tmp_path: Path, benchmarks: SimpleNamespace) -> None:
    entry = benchmarks.mlp()
    (layer,) = read(tmp_path, mlp=entry).layers
    assert layer.label == ""
    for row, own in zip(layer.rows, entry["rows"], strict=True):
        assert (row.tokens, row.density) == (own["tokens"], own["density"])
        kinds = [kind for kind in ("forward", "training") if kind in own]
        assert list(row.ratios) == kinds
        for kind in kinds:
            assert row.dense[kind] == own[kind]["seconds"]["dense"]
            for ratio in own[kind]["ratios"]:
                wanted = Ratio(ratio["value"], ratio["low"], ratio["high"])
                assert row.ratios[kind][ratio["to"]] == wanted
    assert layer.rows[0].memory == {}
    assert layer.rows[3].memory == {"sparse": 150 / 2000, "screened": 160 / 2000}
    assert layer.break_even == {"forward": {1: 0.8, 197: 0.4}, "training": {197: None}}


def test_a_whole_model_has_the_numbers_of_its_record(
    tmp_path: Path, benchmarks: SimpleNamespace
) -> None:
    first, second = read(tmp_path, vit=benchmarks.model()).wholes
    assert first == Whole(
        label="vit-b, training step",
        density=0.01,
        dense=2.5,
        ratio=Ratio(1.5, 0.9 * 1.5, 1.1 * 1.5),
        limit=Ratio(1.9, 0.9 * 1.9, 1.1 * 1.9),
        half=None,
        mlp_ratio=4.0,
        amdahl=1.6,
        reached=1.5 / 1.6,
        memory=0.75,
        kept=None,
        error=2e-7,
    )
    assert (second.density, second.ratio.value) == (0.05, 1.2)


def test_a_trained_model_has_two_phases_and_no_amdahl(
    tmp_path: Path, benchmarks: SimpleNamespace
) -> None:
    wholes = read(tmp_path, digits=benchmarks.trained()).wholes
    found = [(whole.label, whole.density, whole.amdahl, whole.memory) for whole in wholes]
    assert found == [
        ("digits, paper, seed 0, inference", 0.04, None, None),
        ("digits, paper, seed 0, training", 0.06, None, None),
    ]


def test_decoding_is_told_by_mlps_that_did_not_train(
    tmp_path: Path, benchmarks: SimpleNamespace
) -> None:
    entry = benchmarks.model(model="t5-base")
    for row in entry["rows"]:
        row["mlps"] = [{"tokens": 1}]
    assert {whole.label for whole in read(tmp_path, t5=entry).wholes} == {"t5-base, decoding"}


@pytest.mark.parametrize("name", ["mlp-1-thread", "mlp-2-threads"])
def test_records_in_git_are_read_with_or_without_what_is_new(name: str) -> None:
    found = benchmarks_of([ROOT / "benchmarks" / f"{name}.json"])
    assert found is not None
    entry = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))
    assert [row.density for row in found.layers[0].rows] == [r["density"] for r in entry["rows"]]


def test_what_bench_writes_is_what_is_read(tmp_path: Path) -> None:
    mlp = bench_mlp(8, 32, [0.1, 0.3], [2, 197], rounds=1)
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_inner": 32, "vocab_size": 50, "length": 200}
    model = bench_model("gpt2", [0.1], 1, "sparse", memory=False, **sizes)
    found = read(
        tmp_path, mlp={**environment(threads=1), **mlp}, gpt2={**environment(threads=1), **model}
    )
    assert [row.tokens for row in found.layers[0].rows] == [2, 2, 197, 197]
    assert found.layers[0].rows[2].memory.keys() == {"sparse", "screened"}
    assert found.layers[0].break_even.keys() == {"forward", "training"}
    (whole,) = found.wholes
    assert whole.label == "gpt2, training step"
    assert whole.amdahl == model["rows"][0]["amdahl"]
    assert whole.error == model["rows"][0]["error"]["logits"]


# -- which is which ---------------------------------------------------------------------------

SETTINGS = st.fixed_dictionaries(
    {"threads": st.integers(1, 3), "d": st.integers(1, 2), "pattern": st.sampled_from("ab")}
)


@given(st.lists(SETTINGS, min_size=2, max_size=6, unique_by=lambda own: tuple(sorted(own.items()))))
def test_labels_tell_records_apart_by_what_differs(every: list[dict[str, Any]]) -> None:
    group = {
        Path(f"{at}.json"): {
            "benchmark": "mlp",
            "threads": own["threads"],
            "hardware": {},
            "sizes": {"d": own["d"], "pattern": own["pattern"], "rounds": at},
        }
        for at, own in enumerate(every)
    }
    labels = list(_labels(group).values())
    assert len(set(labels)) == len(every)
    for key, word in (("threads", "thread"), ("d", "D ="), ("pattern", "densities")):
        differs = len({own[key] for own in every}) > 1
        assert all((word in label) == differs for label in labels)


def test_records_that_ran_alike_are_told_apart_by_their_files(
    tmp_path: Path, benchmarks: SimpleNamespace
) -> None:
    found = read(tmp_path, monday=benchmarks.mlp(), friday=benchmarks.mlp())
    assert [layer.label for layer in found.layers] == ["monday", "friday"]
    one, two = benchmarks.mlp(), benchmarks.mlp()
    del two["sizes"]["pattern"]  # as older programs wrote: it was even
    two["threads"] = 2
    assert [layer.label for layer in read(tmp_path, a=one, b=two).layers] == [
        "1 thread",
        "2 threads",
    ]


def test_only_records_of_one_model_need_telling_apart(
    tmp_path: Path, benchmarks: SimpleNamespace
) -> None:
    found = read(tmp_path, mlp=benchmarks.mlp(), vit=benchmarks.model(threads=2))
    assert found.layers[0].label == ""
    assert found.wholes[0].label == "vit-b, training step"
    found = read(tmp_path, a=benchmarks.model(), b=benchmarks.model(threads=2))
    labels = list(dict.fromkeys(whole.label for whole in found.wholes))
    assert labels == ["vit-b, 1 thread, training step", "vit-b, 2 threads, training step"]


def test_a_folder_gives_its_records_and_passes_over_the_rest(
    tmp_path: Path, benchmarks: SimpleNamespace
) -> None:
    paths = benchmarks.write(tmp_path)
    (tmp_path / "table.json").write_text("{}")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "other.json").write_text('{"benchmark": "measures"}')
    assert benchmark_files(tmp_path) == sorted(paths)
    assert benchmarks_of([]) is None


# -- bad input --------------------------------------------------------------------------------

Spoil = Callable[[dict[str, Any]], Any]


def put(value: Any, *keys: Any) -> Spoil:
    def spoil(entry: dict[str, Any]) -> None:
        at: Any = entry
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value

    return spoil


@pytest.mark.parametrize(
    ("kind", "spoil", "said"),
    [
        ("mlp", put("measures", "benchmark"), "benchmark 'measures' has no charts here; give a"),
        ("mlp", put(["mlp"], "benchmark"), r"benchmark \['mlp'\] has no charts here"),
        ("mlp", lambda entry: entry.pop("benchmark"), "names no benchmark; give a record that `ac"),
        ("mlp", lambda entry: entry.pop("rows"), "mlp lacks 'rows'"),
        ("mlp", lambda entry: entry.pop("hardware"), "mlp lacks 'hardware'"),
        ("mlp", put([], "rows"), "mlp has no rows; run the benchmark again"),
        ("mlp", put(0.0, "rows", 1, "forward", "ratios", 0, "value"),
         r"mlp.rows\[1\].forward.ratios\[0\].value must be a finite number above 0; got 0.0"),
        ("mlp", put("sparse", "rows", 1, "forward", "ratios", 0, "of"), "of must be 'dense'; got"),
        ("mlp", put(1.5, "rows", 0, "density"), r"rows\[0\].density must be a share from 0 to 1"),
        ("mlp", put({"sparse": 5}, "rows", 3, "memory"), r"rows\[3\].memory must be an object"),
        ("mlp", put({}, "rows", 3, "training"), r"rows\[3\].training lacks 'seconds'"),
        ("mlp", put([1], "break_even"), "break_even must be an object; got"),
        ("mlp", put({"one": 0.1}, "break_even", "forward"), "break_even.forward must be an object"),
        ("mlp", put({"1": -0.1}, "break_even", "forward"), "break_even.forward must be an object"),
        ("model", lambda entry: entry.pop("rows"), "model lacks 'rows'"),
        ("model", put([7], "rows"), r"model.rows\[0\] must be an object of density"),
        ("model", lambda entry: entry["rows"][1]["ratios"].pop(),
         r"model.rows\[1\].ratios lacks the one of dense to 'without MLPs'"),
        ("model", put({"dense": {"peak_mib": 9}}, "rows", 0, "memory"), "memory lacks 'acc"),
        ("trained", lambda entry: entry["training"]["ratios"].clear(),
         "model.training.ratios lacks the one of dense to 'accelerated'"),
    ],
)  # fmt: skip
def test_a_wrong_record_is_named_with_what_is_wrong(
    tmp_path: Path, benchmarks: SimpleNamespace, kind: str, spoil: Spoil, said: str
) -> None:
    entry = copy.deepcopy(getattr(benchmarks, kind)())
    spoil(entry)
    path = tmp_path / "record.json"
    path.write_text(json.dumps(entry), encoding="utf-8")
    with pytest.raises(RecordError, match=said) as error:
        read_benchmark(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize("text", ["", "{", '{"benchmark": "mlp", "rows": [{"tok', "[NaN]", "\xff"])
def test_a_torn_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "torn.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RecordError, match=r"torn.json: not whole JSON: "):
        read_benchmark(path)
    with pytest.raises(RecordError, match=r"torn.json: not whole JSON: "):
        benchmark_files(tmp_path)  # rather than leave out what may have been a result


@pytest.mark.parametrize("value", [[], 3, None, "mlp"])
def test_json_that_is_no_object_is_no_record(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "value.json"
    path.write_text(json.dumps(value))
    with pytest.raises(RecordError, match=r"value.json: names no benchmark; give a record"):
        read_benchmark(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"cannot read .*none.json: .*; give a folder of runs or"):
        read_benchmark(tmp_path / "none.json")
