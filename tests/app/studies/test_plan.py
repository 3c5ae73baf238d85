"""Plans: what is compared, from flags and files, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rewire import methods
from rewire.app.errors import StudyError
from rewire.app.studies.command import plan_from
from rewire.app.studies.plan import Plan, folder_name, make_plan, read_yaml
from rewire.app.studies.search import Choice, Range, options_of, space_of
from rewire.app.train.config import method_options, read_options


def plan(**values: Any) -> Plan:
    return make_plan({"methods": "static,set", **values})


def test_a_plan_is_the_product_of_its_axes() -> None:
    made = plan(densities="0.02,0.1", seeds="3", models=["mlp:30", "mlp:20,10"])
    assert [(c.entry.label, c.density, c.model) for c in made.cells()] == [
        (method, density, model)
        for model in ("mlp:30", "mlp:20,10")
        for density in (0.02, 0.1)
        for method in ("static", "set")
    ]
    assert made.seeds == (0, 1, 2)


def test_methods_without_a_budget_have_one_row_before_the_others() -> None:
    made = make_plan({"methods": ["set", "noiseout", "halo"], "densities": [0.1, 0.2]})
    rows = [(c.entry.label, c.density) for c in made.cells()]
    assert rows == [("noiseout", None), ("set", 0.1), ("halo", 0.1), ("set", 0.2), ("halo", 0.2)]


def test_flags_and_a_file_make_the_same_plan(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(
        "methods: [static, {method: set, set: {fraction: 0.2}}]\n"
        "densities: [0.02, 0.1]\nseeds: [4, 5]\ntrain: {epochs: 3, batch_size: 32}\n"
    )
    given = {"methods": "static,set", "densities": "0.02,0.1", "seeds": "4,5"}
    train = {"epochs": "3", "batch_size": "32"}
    flags = plan_from(None, given, train, ["set.fraction=0.2"])
    read = plan_from(file, {}, {}, [])
    keys = [
        [p.run(cell, "run", seed).key for cell in p.cells() for seed in p.seeds]
        for p in (flags, read)
    ]
    assert keys[0] == keys[1]
    assert len(set(keys[0])) == 8
    over = plan_from(file, {"seeds": "1"}, {"epochs": "2"}, [])
    assert over.seeds == (0,)
    assert over.run(over.cells()[0], "run", 0).values["epochs"] == 2
    assert over.run(over.cells()[0], "run", 0).values["batch_size"] == 32


def test_a_run_has_the_key_of_all_that_decides_its_numbers() -> None:
    base = plan()
    run = base.run(base.cells()[0], "run", 0)
    other = plan(train={"epochs": 3})
    assert other.run(other.cells()[0], "run", 0).key != run.key
    assert base.run(base.cells()[0], "run", 1).key != run.key
    free = plan(train={"threads": 2, "checkpoint_every": 5, "data_dir": "/somewhere"})
    assert free.run(free.cells()[0], "run", 0).key == run.key
    assert free.sha256() == base.sha256() != other.sha256()
    assert len({folder_name(run.key), folder_name(run.key + "x")}) == 2
    assert json.loads(json.dumps(dict(run.values))) == run.values


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"methods": "sett"}, "--methods: unknown name 'sett' (did you mean 'set'?)"),
        ({"methods": "set,set"}, "methods: set is there twice; give one of the two a name"),
        ({"densities": "2"}, "--densities: given '2', allowed is a number at most 1.0"),
        ({"densities": "0.1,0.1"}, "densities: 0.1 is there twice"),
        ({"seeds": "many"}, "--seeds: given 'many'"),
        ({"seeds": "0"}, "--seeds: given"),
        ({"data": "mnis"}, "--data: unknown name 'mnis' (did you mean 'mnist'?)"),
        ({"tune": -1}, "--tune: given -1, allowed is a number at least 0"),
        ({"match": "time"}, "--match: given 'time'"),
        ({"models": ["lenett:3"]}, "--model"),
        ({"metods": "set"}, "unknown entry 'metods' (did you mean 'methods'?)"),
        ({"train": {"epoch": 3}}, "train: unknown option 'epoch' (did you mean 'epochs'?)"),
        ({"train": {"seed": 3}}, "train: seed is not the same for all; say --seeds"),
        ({"train": {"epochs": "x"}}, "static: --epochs: given 'x', allowed is a whole number"),
        ({"methods": [{"method": "set", "sett": 1}]}, "unknown entry 'methods.0.sett'"),
        ({"methods": [{"method": "set", "set": {"zeta": 1}}]}, "set: --set zeta: set has no such"),
        (
            {"expect": [{"method": "rigl", "at_least": 3}]},
            "expect: unknown name 'rigl'; allowed are static, set",
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_line(values: dict[str, Any], told: str) -> None:
    with pytest.raises(StudyError) as caught:
        plan(**values)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("methods: [set", "is no YAML"),
        ("- set\n", "has no plan"),
        ("methods: !!python/object/apply:os.getcwd []", "is no YAML"),
        ("3: 4", "has no plan"),
    ],
)
def test_a_file_that_is_no_plan(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(StudyError, match=told):
        read_yaml(file)
    with pytest.raises(StudyError, match="cannot read"):
        read_yaml(tmp_path / "other.yaml")


@pytest.mark.parametrize("text", ["fraction=0.2", "rigl.fraction=0.2", "set.fraction"])
def test_set_names_a_method_of_the_study(text: str) -> None:
    with pytest.raises(StudyError, match="write it as METHOD"):
        plan_from(None, {"methods": "static,set"}, {}, [text])


GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "compare_methods.md"


def test_the_plan_of_the_guide_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    made = plan_from(file, {}, {}, [])
    assert len(made.cells()) == 8
    assert made.seeds == (0, 1, 2, 3, 4)


def test_the_space_of_a_search_follows_from_declarations() -> None:
    made = make_plan(
        {
            "methods": [
                "deep-r",
                {"method": "rigl", "search": {"fraction": [0.05, 0.5], "init": ["auto", "sparse"]}},
                {"method": "set", "set": {"fraction": 0.2}},
                "halo",
            ]
        }
    )
    spaces = {}
    for cell in made.cells():
        run = made.run(cell, "tune", 9)
        spaces[cell.entry.label] = space_of(cell, run.values)
        # the search begins with the values of a run without one
        begun = made.run(cell, "tune", 9, **options_of(spaces[cell.entry.label].start)).values
        defaults = methods.info(cell.entry.method).parameters()
        own = {n: v for n, v in begun["method_options"].items() if v != defaults[n].default}
        suited = method_options(read_options(run.values))
        assert {**suited, **own} == suited
        assert {**begun, "method_options": {}} == {**run.values, "method_options": {}}
    assert spaces["rigl"].parts["set.fraction"] == Range(0.05, 0.5, log=True)
    assert spaces["rigl"].parts["init"] == Choice(("auto", "sparse"))
    assert "set.fraction" not in spaces["set"].parts
    l1 = spaces["deep-r"].parts["set.l1"]
    assert l1 == Range(0.01, 1.0, log=True)  # around what suits Adam, not the constructor's 1e-5
    assert "init" not in spaces["halo"].parts
    assert all("lr" in space.parts for space in spaces.values())


def test_a_search_for_what_there_is_not() -> None:
    made = make_plan({"methods": [{"method": "set", "search": {"fractoin": [0.1, 0.2]}}]})
    cell = made.cells()[0]
    with pytest.raises(StudyError, match=r"no parameter 'fractoin' \(did you mean 'fraction'"):
        space_of(cell, made.run(cell, "tune", 9).values)
