import json
import re

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from tuner import InputError
from tuner.sweep import search_space
from tuner.sweep.search_space import SearchSpace


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    """Of a program with a config group `db`, which has the options mysql, pg and sqlite."""
    folder = tmp_path_factory.mktemp("conf")
    (folder / "db").mkdir()
    for name in ("mysql", "pg", "sqlite"):
        (folder / "db" / f"{name}.yaml").write_text("port: 1\n")
    return ConfigLoaderImpl(create_config_search_path(str(folder)))


@pytest.fixture
def parse(loader):
    return lambda *lines: search_space.parse(lines, loader)


def read(line):
    """What Hydra reads from an override: its key and its value."""
    override = OverridesParser.create().parse_override(line)
    assert not override.is_sweep_override()
    return override.get_key_element(), override.value()


def same(value, expected):
    return repr(value) == repr(expected)  # 1, 1.0, True and '1' differ, and nan equals itself


@pytest.mark.parametrize(
    ("line", "distribution"),
    [
        ("lr=interval(0,1)", FloatDistribution(0, 1)),
        ("lr=tag(log,interval(1e-5,0.1))", FloatDistribution(1e-5, 0.1, log=True)),
        ("width=int(interval(1,1000))", IntDistribution(1, 1000)),
        ("width=tag(log,int(interval(1,1000)))", IntDistribution(1, 1000, log=True)),
        ("depth=range(1,10)", IntDistribution(1, 9)),
        ("depth=range(1,10,3)", IntDistribution(1, 7, step=3)),
        ("depth=range(10,1,-3)", IntDistribution(4, 10, step=3)),
        ("dropout=range(0.1,0.5,0.1)", FloatDistribution(0.1, 0.4, step=0.1)),
        ("depth=float(range(1,4))", CategoricalDistribution([1.0, 2.0, 3.0])),
        ("optimizer=adamw,sgd", CategoricalDistribution(["adamw", "sgd"])),
        ("optimizer=choice(adamw,sgd)", CategoricalDistribution(["adamw", "sgd"])),
        ("x=choice(2,0.5,true,one,'1')", CategoricalDistribution([2, 0.5, True, "one", "1"])),
        ("x=null,1", CategoricalDistribution([None, 1])),
        ("x=str(choice(1,2))", CategoricalDistribution(["1", "2"])),
        ("x=sort(choice(3,1,2))", CategoricalDistribution([1, 2, 3])),
        ("x=choice([256,[512,256]],{a:1})", CategoricalDistribution(["[256,[512,256]]", "{a:1}"])),
        ("db=glob(*)", CategoricalDistribution(["mysql", "pg", "sqlite"])),
        ("db=glob(*,exclude=*sql*)", CategoricalDistribution(["pg"])),
        ("+db@backup=glob([m*,p*])", CategoricalDistribution(["mysql", "pg"])),
    ],
)
def test_what_a_sweep_searches(parse, line, distribution):
    [searched] = parse(line).distributions.values()
    assert searched == distribution
    if isinstance(distribution, CategoricalDistribution):
        assert same(searched.choices, distribution.choices)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("x=interval(5,1)", "`low <= high` must hold"),
        ("x=tag(log,interval(0,1))", "`low > 0` must hold"),
        ("x=interval(0,inf)", ""),
        ("x=interval(nan,1)", ""),
        ("x=range(0,0)", "at least one value"),
        ("x=range(0,5,0)", "nonzero step"),
        ("x=choice(a,b,a)", "choice a is given twice"),
        ("x=choice(1,1.0)", "choice 1 is given twice"),  # to Optuna, equal choices are one
        ("x=choice([1,2],'[1,2]')", "choice [1,2] is given twice"),
        ("nothing=glob(*)", "it has no choices"),
        ("db=glob(oracle*)", "it has no choices"),
    ],
)
def test_what_cannot_be_searched_is_named(parse, line, reason):
    with pytest.raises(InputError, match=re.escape(f"{line} cannot be searched: ") + ".*" + re.escape(reason)):
        parse("y=choice(1,2)", line)


def test_a_shuffled_choice_is_the_same_space_each_time(parse):  # or a study of it could not be resumed
    for line in ("x=shuffle(choice(a,b,c,d,e,f,g,h))", "x=shuffle(range(1,9))"):
        assert parse(line).distributions == parse(line).distributions


def test_a_new_key_is_named_with_its_prefix(parse):
    """As in hydra-optuna-sweeper: a trial's parameters are its overrides."""
    space = parse("+lr=interval(0,1)", "++depth=choice(1,2)", "+db@backup=glob(*)")
    assert list(space.distributions) == ["+lr", "++depth", "+db@backup"]
    lines = ["+lr=0.25", "++depth=2", "+db@backup=pg"]
    assert space.overrides({"+lr": 0.25, "++depth": 2, "+db@backup": "pg"}) == lines
    assert space.names() == ["lr", "depth", "db@backup"]


def test_what_is_not_searched_goes_into_every_trial_as_it_was_typed(parse):
    lines = ["seed=5", "name='a, b'", "+extra=[1,'2']", "root=${oc.env:HOME}"]
    space = parse("lr=interval(0,1)", "~scheduler", "~optimizer=adamw", *lines)
    assert space.overrides({"lr": 0.5}) == ["~scheduler", "~optimizer=adamw", "lr=0.5", *lines]


@pytest.mark.parametrize(
    ("lines", "distributions", "fixed"),
    [
        (["x=1", "x=2"], {}, ["x=2"]),
        (["x=choice(1,2)", "x=5"], {}, ["x=5"]),
        (["+x=choice(1,2)", "++x=5"], {}, ["++x=5"]),
        (["x=5", "++x=choice(1,2)"], {"++x": CategoricalDistribution([1, 2])}, []),
        (["x=choice([1],[2])", "x=int(interval(1,3))"], {"x": IntDistribution(1, 3)}, []),
        (["x=choice(1,2)", "~x"], {}, []),
    ],
)
def test_of_equal_names_the_last_one_counts(parse, lines, distributions, fixed):
    space = parse(*lines)
    assert space.distributions == distributions
    assert list(space.fixed.values()) == fixed


def test_what_was_deleted_may_be_added_again(parse):
    assert parse("~x", "+x=choice(1,2)").overrides({"+x": 2}) == ["~x", "+x=2"]


# fmt: off
STRINGS = [
    "it's", 'say "hi"', """'"'""", "'a'", '"a"', "\\", "a\\b", "a\\'b", "end\\", "\\\\", "line\nline", "é", "",
    "1", "1.5", "1e3", "true", "null", "nan", "${x}", "[1,2]", "{a:1}", "a,b", "a b", " a ", "a=b", "a:b", "(", "]",
    "choice(a,b)", "interval(0,1)", "glob(*)", "str(1)", "~x", "+x", "#1", "@", "$", "50%", "/tmp/a-b_c.d",
]
# fmt: on


@pytest.mark.parametrize("quote", Quote)
@pytest.mark.parametrize("text", STRINGS)
def test_a_string_reaches_the_job_as_that_string(parse, text, quote):
    space = parse(f"x=choice({QuotedString(text, quote).with_quotes()},other)")
    assert space.distributions["x"].choices == (text, "other")
    [line] = space.overrides({"x": text})
    assert read(line) == ("x", text)


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("x=choice(1,-2,1_000)", [1, -2, 1000]),
        ("x=choice(0.1,1e-5,1e20,-2.,inf,nan)", [0.1, 1e-5, 1e20, -2.0, float("inf"), float("nan")]),
        ("x=choice(true,False)", [True, False]),
        ("x=null,0,none,'null'", [None, 0, "none", "null"]),
        ("x=choice(1,'1.0',one)", [1, "1.0", "one"]),
        ("x=choice(${y},'${y}z',${oc.env:HOME})", ["${y}", "${y}z", "${oc.env:HOME}"]),
        ("x=choice(256,[256],[256,[512,256]],[])", [256, [256], [256, [512, 256]], []]),
        ("x=choice([a,'b, c',\"it's\"],['1',1,true,null])", [["a", "b, c", "it's"], ["1", 1, True, None]]),
        ("x=choice({a:1,b:[x,'2']},{},{k l:null})", [{"a": 1, "b": ["x", "2"]}, {}, {"k l": None}]),
        ("x=[1,2],'[1,3]'", [[1, 2], "[1,3]"]),
    ],
)
def test_a_choice_reaches_the_job_as_it_was_typed(parse, line, values):
    space = parse(line)
    lines = [space.overrides({"x": choice})[0] for choice in space.distributions["x"].choices]
    assert same([read(line) for line in lines], [("x", value) for value in values])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("[512,256]", [512, 256]),
        ("{a:1,b:[c]}", {"a": 1, "b": ["c"]}),
        ("1", 1),
        ("true", True),
        ("null", None),
        ("adamw", "adamw"),
        ("a,b", "a,b"),
        ("it's", "it's"),
        ("choice(a,b)", "choice(a,b)"),
        ("glob(*)", "glob(*)"),
        ("[1,", "[1,"),
        (0.1, 0.1),
        (True, True),
        (3, 3),
    ],
)
def test_a_custom_search_space_may_spell_lists_and_numbers(given, expected):
    assert same(read(SearchSpace().overrides({"model.head.width": given})[0]), ("model.head.width", expected))


CONFIG = """
hydra: {runtime: {choices: {db: pg, db@backup: sqlite, none_of_it: null}}}
db: {port: 1}
lr: 0.1
twice: ${lr}
width: [512, 256]
mix: {a: 1}
nothing: null
wanted: ???
"""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lr=interval(0,1)", 0.1),
        ("twice=interval(0,1)", 0.1),
        ("db=glob(*)", "pg"),
        ("db@backup=glob(*)", "sqlite"),
        ("db.port=choice(1,2)", 1),
        ("none_of_it=null,a", None),
        ("width=choice([256],[512,256])", "[512,256]"),
        ("width=choice([512, 256],1)", "[512,256]"),
        ("mix=choice({a: 1},{a: 2})", "{a:1}"),
        ("nothing=null,5", None),
        ("width=choice([1],[2])", KeyError),
        ("+added=choice(1,2)", KeyError),
        ("db.host=choice(a,b)", KeyError),
        ("wanted=choice(1,2)", KeyError),
        ("nothing=choice(1,2)", None),
    ],
)
def test_the_value_without_the_search(parse, line, expected):
    space, config = parse(line), OmegaConf.create(CONFIG)
    [name] = space.distributions
    if expected is KeyError:
        with pytest.raises(KeyError, match=re.escape(name)):
            space.default_value(config, name)
    else:
        assert same(space.default_value(config, name), expected)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("x=interval(0,1)", ["x=interval(0,1)"]),
        ("x=interval(0,1)", ["x=interval(-1,1)"]),
        ("x=tag(log,interval(0.01,1))", ["x=tag(log,interval(0.01,10))"]),
        ("x=int(interval(1,5))", ["x=int(interval(0,9))"]),
        ("x=range(0,10,2)", ["x=range(-4,20,2)"]),
        ("x=range(0.3,0.6,0.1)", ["x=range(0.1,0.8,0.1)"]),
        ("x=choice(a,[1,2],3)", ["x=choice(a,[1,2],3)"]),
        ("x=interval(0,1)", ["y=choice(1,2)", "x=interval(0,1)"]),
    ],
)
def test_a_study_goes_on_with_more_parameters_and_wider_ranges(parse, before, now):
    stored = json.loads(json.dumps(search_space.to_json(parse(before).distributions)))
    search_space.check_unchanged(stored, parse(*now).distributions, "mine")


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("x=interval(0,1)", "x=interval(0.1,1)"),
        ("x=interval(0,1)", "x=interval(0,0.9)"),
        ("x=interval(0.1,1)", "x=tag(log,interval(0.1,1))"),
        ("x=interval(0,1)", "x=int(interval(0,1))"),
        ("x=range(0,10)", "x=range(0,10,2)"),
        ("x=range(0,10,2)", "x=range(-1,11,2)"),
        ("x=interval(0,1)", "x=range(0.0,1.1,0.1)"),
        ("x=choice(a,b)", "x=choice(a,b,c)"),
        ("x=choice(a,b)", "x=choice(b,a)"),
        ("x=choice(1,2)", "x=choice('1','2')"),
        ("x=choice(1,2)", "x=int(interval(1,2))"),
        ("x=choice(1,2)", "x=1"),
    ],
)
def test_a_study_does_not_go_on_where_its_trials_do_not_fit(parse, before, now):
    stored = search_space.to_json(parse(before, "y=choice(1,2)").distributions)
    new = parse(now, "y=choice(1,2)").distributions
    old = parse(before).distributions["x"]
    with pytest.raises(InputError) as error:
        search_space.check_unchanged(stored, new, "mine")
    assert str(error.value).startswith("study mine was started with another search space")
    was, now = search_space.describe(old), search_space.describe(new["x"]) if "x" in new else "not searched"
    assert was != now
    assert str(error.value).endswith(f"another study=NAME. x: was {was}, is {now}")


WRITTEN = ["choice(1, 2, 5)", "choice(a, '2', 'b,c', 2)", "interval(0, 1)", "tag(log, interval(0.0001, 0.01))"]
WRITTEN += [
    "int(interval(1, 1234567))",
    "tag(log, int(interval(1, 64)))",
    "range(0, 8, step=2)",
    "range(0, 1.1, step=0.1)",
]


@pytest.mark.parametrize("text", WRITTEN)
def test_a_distribution_is_said_as_it_is_written(parse, text):
    [distribution] = parse(f"x={text}").distributions.values()
    assert search_space.describe(distribution) == text
