"""A password of a storage is never on disk or in a log, however the storage is spelled."""

import json
import logging
import os
import subprocess
import sys

import pytest

from tuner import InputError
from tuner.sweep import passwords, storage

PASSWORD = "MARKED77"
URL = f"postgresql+psycopg://ann:{PASSWORD}@db.example:5432/studies"


@pytest.mark.parametrize(
    ("spec", "shown", "secrets"),
    [
        (None, None, []),
        ("sqlite:////a/ann:secret@b?password=x", "sqlite:////a/ann:secret@b?password=***", ["x"]),
        ("journal:////a/ann:secret@b", "journal:////a/ann:secret@b", []),
        ("postgresql://ann:secret@host/db", "postgresql://ann:***@host/db", ["secret"]),
        ("postgresql://ann:p%40ss@host/db", "postgresql://ann:***@host/db", ["p%40ss", "p@ss"]),
        ("postgresql://ann:se cret@host/db", "postgresql://ann:***@host/db", ["se cret"]),
        ("postgresql://ann:se?cr/et@host/db", "postgresql://ann:***@host/db", ["se?cr/et"]),
        ("redis://:secret@host/0", "redis://:***@host/0", ["secret"]),
        ("postgresql://ann@host:5432/db", "postgresql://ann@host:5432/db", []),
        ("postgresql://h/db?user=ann&sslpassword=x&password=y", None, ["x", "y"]),
        ("mysql://h/db?PASSWD=x", "mysql://h/db?PASSWD=***", ["x"]),
        (json.dumps({"url": "postgresql://ann:secret@h/db"}), '{"url": "postgresql://ann:***@h/db"}', ["secret"]),
        (json.dumps({"connect_args": {"password": "x y"}}), '{"connect_args": {"password": "***"}}', ["x y"]),
        (json.dumps({"connect_args": {"passwd": 12345}}), '{"connect_args": {"passwd": "***"}}', ["12345"]),
    ],
)
def test_what_is_secret(spec, shown, secrets):
    assert passwords.secrets(spec) == secrets
    text = passwords.redacted(spec)
    if shown or spec is None:
        assert text == shown
    assert not any(secret in text for secret in secrets)


@pytest.mark.parametrize("url", ["postgresql://ann:pa@ss@host/db", "mysql+pymysql://ann:p@a/s@s:1@host:1/db?x=1"])
def test_a_password_with_an_at_must_be_encoded(url):
    with pytest.raises(InputError, match="has an @ in its user or password; write it as %40") as error:
        storage.resolve(url)
    for half in ("pa@", "ss@", "p@a", "a/s"):
        assert half not in str(error.value)
    storage.resolve("postgresql://ann:pa%40ss@host/db?options=a@b")


def test_words_of_a_message_are_hidden_as_a_whole():
    spec = "postgresql://postgres:postgres@h/db"
    text = "postgresql: password authentication failed for 'postgres'"
    assert passwords.hidden(text, spec) == "postgresql: password authentication failed for '***'"


def test_workers_get_it_in_their_environment():
    ask = "from tuner.sweep.passwords import from_environment as f; import sys; print(f(sys.argv[1]))"
    shown = passwords.redacted(URL)
    with passwords.in_environment(URL):
        assert passwords.from_environment(shown) == URL
        assert subprocess.check_output([sys.executable, "-c", ask, shown], text=True).strip() == URL
        with pytest.raises(InputError, match=r"lacks TUNER_STORAGE"):
            passwords.from_environment("postgresql://bob:***@h/db")
    assert passwords.VARIABLE not in os.environ
    with pytest.raises(InputError, match=r"this worker cannot open the storage .*\*\*\*@db.example"):
        passwords.from_environment(shown)
    with passwords.in_environment("sqlite:////a"):
        assert passwords.VARIABLE not in os.environ


def test_hydras_log_has_none(caplog):
    log = logging.getLogger("test_hydras_log_has_none")
    log.addFilter(passwords.Filter())
    with caplog.at_level(logging.DEBUG):
        log.info("%s -> %s", f"+pw={PASSWORD}", f"+pw={PASSWORD}")
        log.info(f"x: 1\ndb:\n  url: {URL}\n  pw: {PASSWORD}\n  db_password: '{PASSWORD}'\ny: 2")
    assert caplog.messages == [
        "x: 1\ndb:\n  url: postgresql+psycopg://ann:***@db.example:5432/studies\n  pw: ***\n  db_password: ***\ny: 2"
    ]


# In a sweep. URL stands for a URL with the password.
RDB = "_target_:optuna.storages.RDBStorage"
SPELLINGS = {
    "plain": (["hydra.sweeper.storage=URL"], "", {}),
    "quoted": (["hydra.sweeper.storage='URL'"], "", {}),
    "forced": (["++hydra.sweeper.storage=URL"], "", {}),
    "class": ([f"hydra.sweeper.storage={{{RDB},url:'URL'}}"], "", {}),
    "forced_class": ([f"++hydra.sweeper.storage={{{RDB},url:'URL'}}"], "", {}),
    "option": (
        [
            f"hydra.sweeper.storage={{{RDB},url:'BARE',engine_kwargs:{{connect_args:{{user:USER,password:{PASSWORD}}}}}}}"
        ],
        "",
        {},
    ),
    "environment": (["hydra.sweeper.storage=${oc.env:DATABASE}"], "", {"DATABASE": "URL"}),
    "key": ([f"+pw={PASSWORD}", "hydra.sweeper.storage=${with_key}"], "with_key: KEYED\n", {}),
    "node": (["+db={url:'URL',n:1}", "hydra.sweeper.storage=${db.url}"], "", {}),
    "yaml": ([], "hydra: {sweeper: {storage: URL}}\n", {}),
    "yaml_class": (
        ["hydra.sweeper.storage=${database}"],
        "database: {_target_: optuna.storages.RDBStorage, url: 'URL'}\n",
        {},
    ),
    "yaml_key": (["hydra.sweeper.storage=${url}"], f"db: {{password: {PASSWORD}}}\nurl: NESTED\n", {}),
    "chain": (["hydra.sweeper.storage=${a}"], "a: ${b}\nb: URL\n", {}),
}


def sweep(toy, run, spelling, url, *options):
    """Run a sweep with the storage in one of these spellings. Returns what it printed."""
    arguments, text, environment = SPELLINGS[spelling]
    user, bare = url.split("//")[1].split(":")[0], f"postgresql+psycopg://{url.split('@')[1]}"
    before, after = url.split(PASSWORD)

    def filled(template):
        return (
            template.replace("KEYED", f"{before}${{pw}}{after}")
            .replace("NESTED", f"{before}${{db.password}}{after}")
            .replace("URL", url)
            .replace("BARE", bare)
            .replace("USER", user)
        )

    conf = toy.folder / "conf" / "toy.yaml"
    old = "    storage: sqlite:///multirun/optuna.db\n"
    if text.startswith("hydra"):
        conf.write_text(conf.read_text().replace(old, f"    storage: {url}\n"))
    else:
        conf.write_text(conf.read_text() + filled(text))
    for name, value in environment.items():
        toy.environment[name] = filled(value)
        toy.patch.setenv(name, filled(value))
    done = run(
        *map(filled, arguments), "hydra.sweeper.n_trials=3", "hydra.output_subdir=.hydra", "does=2-raise", *options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def assert_hidden(toy, printed):
    assert PASSWORD not in printed
    files = [path for path in (toy.folder / "multirun").rglob("*") if path.is_file()]
    assert len([path for path in files if path.name == "hydra.yaml"]) == 3
    assert [path for path in files if PASSWORD.encode() in path.read_bytes()] == []


@pytest.fixture
def without_server(monkeypatch, tmp_path):
    """A storage with a password is kept in a file."""
    build = storage._build

    def build_file(spec):
        assert passwords.secrets(spec) == [PASSWORD]
        return build(f"sqlite:///{tmp_path}/{abs(hash(spec))}.db")

    monkeypatch.setattr(storage, "_build", build_file)
    storage._open.cache_clear()
    yield
    storage._open.cache_clear()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_it_is_in_no_file_and_no_log(toy, without_server, spelling):
    printed = sweep(
        toy, toy.run, spelling, URL, "hydra.verbose=[tuner]" if spelling == "plain" else "hydra.verbose=true"
    )
    assert_hidden(toy, printed)
    assert "trial 2 raises" in printed
    assert "continue with: " in printed


def test_an_unreachable_server_does_not_show_it(toy):
    url = URL.replace("db.example:5432", "127.0.0.1:1")
    for verbose in ("true", "false"):
        done = toy.run(f"hydra.sweeper.storage={url}", f"hydra.verbose={verbose}")
        assert done.returncode == 1
        assert PASSWORD not in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
@pytest.mark.parametrize("spelling", ["forced", "option", "key", "yaml"])
def test_it_reaches_no_file_of_a_worker(toy, postgresql, spelling, launcher):
    url = postgresql.replace("secret", PASSWORD)
    options = [f"hydra/launcher={launcher}", "hydra.sweeper.n_jobs=2", "hydra.verbose=true"]
    assert_hidden(toy, sweep(toy, toy.command, spelling, url, *options))
    if launcher == "submitit_local":
        assert list((toy.folder / "multirun").rglob("*.pkl"))
