"""The runs that axes span, and mistakes in them."""

from itertools import product

import pytest

from tools.study.design import Study, When
from tools.study.measure import At, Best, Last, Mean


def study(**changes) -> Study:
    settings = {
        "name": "s",
        "base": ["experiment=demo/scenes"],
        "axes": {
            "size": {"small": ["model.num_layers=2", "schedule.lr=1e-3"], "large": ["model.num_layers=4"]},
            "optimizer.eps": [1e-8, 1e-15],
        },
        "seeds": [0, 1],
        "measure": {},
        "analyses": {},
    }
    return Study(**(settings | changes))


def test_every_combination_runs_once_with_each_seed():
    points = study().points()
    assert {(p.labels["size"], p.labels["optimizer.eps"], p.seed) for p in points} == set(
        product(("small", "large"), ("eps1e-08", "eps1e-15"), (0, 1))
    )
    assert len({point.name for point in points}) == len(points) == 8
    first = points[0]
    assert first.name == "small_eps1e-08_seed0"
    assert first.overrides == [
        *("experiment=demo/scenes", "model.num_layers=2", "schedule.lr=1e-3", "optimizer.eps=1e-08", "seed=0")
    ]


def test_further_overrides_go_to_the_combinations_that_are_named():
    when = [When({"size": ["large"], "optimizer.eps": ["eps1e-15"]}, ["pass_size=4"])]
    with_it = [p.name for p in study(when=when).points() if "pass_size=4" in p.overrides]
    assert with_it == ["large_eps1e-15_seed0", "large_eps1e-15_seed1"]


def test_combinations_can_be_left_out_and_held_out():
    left_out = [{"size": ["large"], "optimizer.eps": ["eps1e-08"]}]
    points = study(leave_out=left_out, held_out={"size": ["large"]}).points()
    assert [(p.name, p.held_out) for p in points if p.seed == 0] == [
        *(("small_eps1e-08_seed0", False), ("small_eps1e-15_seed0", False), ("large_eps1e-15_seed0", True)),
    ]


def test_values_read_as_on_a_command_line():
    points = study(axes={"data.flip": [True, False], "model.qk_norm": [None, "rms_norm"]}, seeds=[0]).points()
    assert [p.overrides[1:3] for p in points] == [
        ["data.flip=true", "model.qk_norm=null"],
        ["data.flip=true", "model.qk_norm=rms_norm"],
        ["data.flip=false", "model.qk_norm=null"],
        ["data.flip=false", "model.qk_norm=rms_norm"],
    ]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"axes": {"size": {}}}, "axes.size"),
        ({"axes": {"size": {"a/b": []}}}, "'a/b'"),
        ({"held_out": {"size": ["huge"]}}, "held_out.*huge"),
        ({"when": [When({"sise": ["small"]}, [])]}, r"when\[0\].*sise"),
        ({"leave_out": [{"size": ["huge"]}]}, r"leave_out\[0\]"),
    ],
)
def test_a_mistake_names_its_place(changes, named):
    with pytest.raises(ValueError, match=named):
        study(**changes)


ROWS = [
    {"step": 10, "loss": 3.0},
    {"step": 20, "loss": 1.0, "val/loss": 2.5},
    {"step": 30, "loss": None},
    {"step": 40, "loss": 2.0, "val/loss": 2.6},
]


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        (Last("val/loss"), 2.6),
        (Best("val/loss"), 2.5),
        (Best("loss", highest=True), 3.0),
        (Mean("loss", 2), 1.5),
        (At("val/loss", 20), 2.5),
        (At("val/loss", 30), None),
        (Last("fid"), None),
        (Mean("fid", 3), None),
    ],
)
def test_measures_read_rows(measure, expected):
    assert measure.of(ROWS) == expected
