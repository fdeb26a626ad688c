"""Latency tables: interpolation, monotone curves, their file."""

import itertools
import json

import pytest

from slim_utils.common.atomic_output import write_json_atomic
from slim_utils.common.errors import UserError
from slim_utils.profiling.latency_table import LatencyTable, PhaseSeconds, isotonic, read_latency_table
from tests.latency_tables import curve, made_up_table
from tests.tiny_models import make_tiny


def test_isotonic_is_the_nearest_monotone_sequence_by_brute_force():
    values = [3.0, 1.0, 2.0, 2.0, 5.0, 4.0]
    grid = sorted({sum(values[i:j]) / (j - i) for i in range(6) for j in range(i + 1, 7)})

    def distance(sequence) -> float:
        return sum((a - b) ** 2 for a, b in zip(sequence, values, strict=True))

    nearest = min(itertools.combinations_with_replacement(grid, 6), key=distance)
    assert isotonic(values) == pytest.approx(list(nearest))
    assert isotonic([1.0, 2.0, 2.0]) == [1.0, 2.0, 2.0]


def test_curve_is_linear_between_points_and_constant_below_the_first():
    seconds = curve([4, 8], float)
    assert [seconds.at(kept, "prefill", 7) for kept in (1, 4, 5, 8)] == pytest.approx([4e-3, 4e-3, 5e-3, 8e-3])
    assert seconds.at(6, "decode", 7) == pytest.approx(6.25e-3)


def test_workload_generation_is_a_prefill_and_all_steps():
    phases = PhaseSeconds(0.5, 0.01)
    assert [phases.of(name, 20) for name in ("prefill", "decode", "generation")] == pytest.approx([0.5, 0.01, 0.7])


def test_table_written_and_read_is_the_same(tmp_path):
    table = made_up_table(make_tiny("gqa").config, float, float)
    write_json_atomic(tmp_path / "table.json", table.to_json())
    assert read_latency_table(tmp_path / "table.json") == table


def test_table_with_falling_times_is_read_as_a_monotone_one():
    content = made_up_table(make_tiny("gqa").config, lambda heads: -heads, float).to_json()
    table = LatencyTable.from_json(json.loads(json.dumps(content)))
    assert [phases.prefill for phases in table.kinds[0].heads.seconds] == pytest.approx([-2e-3] * 3)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.pop("rest"),
        lambda content: content.update(format=9),
        lambda content: content["kinds"][0]["layers"].pop(),
        lambda content: content["kinds"][0]["heads"]["seconds"].pop(),
        lambda content: content["kinds"][0]["heads"].update(kept=[3, 2, 1]),
        lambda content: content["model"]["shapes"][0].pop("head_dim"),
    ],
)
def test_damaged_table_is_refused_in_one_line(tmp_path, damage):
    content = made_up_table(make_tiny("gqa").config, float, float).to_json()
    content = json.loads(json.dumps(content))
    damage(content)
    write_json_atomic(tmp_path / "table.json", content)
    with pytest.raises(UserError, match=r"--latency_file .*table\.json: not a latency table"):
        read_latency_table(tmp_path / "table.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", "3"])
def test_file_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(UserError, match="not a latency table"):
        read_latency_table(tmp_path / "table.json")
