"""Copies of run folders in a place that all machines reach: a folder, or a URL of fsspec such as s3://BUCKET/PATH.

A run folder is packed into one file, whose name ends with its SHA-256: what is read is whole, or an error.
"""

import hashlib
import logging
import secrets
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tuner import InputError
from tuner.cache_files import ARCHIVES, Cache, machine_cache, obtain_folder
from tuner.files import replacing
from tuner.runs.layout import BEST, CHECKPOINT, DEFAULT, OUTCOME_FILE

if TYPE_CHECKING:
    from optuna.study import Study

log = logging.getLogger(__name__)
ARTIFACT = "artifact"  # attribute of a trial: the URL of its run folder
ARTIFACTS = "artifacts"  # attribute of a study: those of best/ and default/, by these names
PAUSES = (1.0, 10.0)  # seconds between attempts
PACKING = ".packing-"  # a folder in the run folder
SOURCE = ".copy-of"  # a file in a folder that was brought here: its URL
LEFT_OUT = (".lock", CHECKPOINT, OUTCOME_FILE, SOURCE)
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}  # schemes of fsspec


class AwayError(InputError):
    """A place cannot be read, for a reason that holds for all of its files."""


def resolved(place: str | None) -> str | None:
    """The place with an absolute path, as jobs may run in other folders; None if there is none."""
    if place is None or "://" in place:
        return place
    return str(Path(place).expanduser().absolute())


def check(place: str) -> None:
    """Write a file to a place, read and remove it. Raises InputError if that fails, or if the URL has a password."""
    if any(map(_has_password, place.split("::"))):
        raise InputError(
            "artifacts=URL has a password, which would be in every run's config: leave it out, and give it as the file "
            "system of fsspec reads it, such as in an environment variable or a file of its own"
        )
    url, content = f"{resolved(place)}/.{secrets.token_hex(8)}", b"tuner"
    try:
        files, path = _open(url)
        _make_folder(files, path)
        files.pipe_file(path, content)
        found = files.cat_file(path)
        files.rm_file(path)
    except Exception as error:
        raise InputError(f"artifacts={place} cannot be used: {_reason(error)}") from error
    if found != content:
        raise InputError(f"artifacts={place} cannot be used: a file that was written there has other content when read")


def _has_password(url: str) -> bool:
    try:
        return urlsplit(url).password is not None
    except ValueError:  # not a URL: fsspec refuses it, too
        return False


def put(folder: Path, place: str, name: str) -> str:
    """Copy a run folder to PLACE/NAME-HASH.tar, and return that URL. Raises OSError if that fails thrice."""
    for killed in folder.glob(f"{PACKING}*"):
        shutil.rmtree(killed)
    content = sorted(path for path in folder.iterdir() if path.name not in LEFT_OUT)
    with tempfile.TemporaryDirectory(prefix=PACKING, dir=folder) as temporary:
        packed = Path(temporary) / "run.tar"
        with tarfile.open(packed, "w") as archive:
            for path in content:
                archive.add(path, path.name)
        with packed.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        url = f"{place}/{name}-{digest}.tar"
        _patiently(lambda: _upload(packed, url), url)
    return url


def _upload(packed: Path, url: str) -> None:
    files, path = _open(url)
    _make_folder(files, path)
    if "file" not in _schemes(files):
        files.put_file(str(packed), path)
        return
    with packed.open("rb") as source, replacing(Path(path)) as file:
        shutil.copyfileobj(source, file)


def try_to_put(folder: Path, place: str, name: str) -> str | None:
    """`put`, or None with a warning: a result is not lost because its files stay where they are."""
    try:
        return put(folder, place, name)
    except OSError as error:
        log.warning("%s stays on this machine: it cannot be copied to %s: %s", folder, place, _reason(error))
        return None


def keep(folder: Path, place: str | None) -> None:
    """Copy the folder of a single run, if there is a place, and log how to use the copy."""
    if where := resolved(place):
        url = try_to_put(folder, f"{where}/runs", f"{folder.parent.name}_{folder.name}")
        if url:
            log.info("copied; use it anywhere: python -m tuner.predict %s FILE|FOLDER", url)


def fetch(url: str, folder: Path) -> None:
    """Bring a run folder here, whole or not at all.

    Raises InputError if it is not there, or damaged, and AwayError if its place cannot be read.
    """
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir(parents=True)
    try:
        _unpack(url, partial)
        (partial / SOURCE).write_text(url, "utf-8")
        try:
            partial.rename(folder)
        except OSError:  # another process has brought it meanwhile
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _unpack(url: str, folder: Path) -> None:
    """Fill an empty folder with the content of a packed one."""
    digest = _digest(url)
    packed = folder / f".{digest[:24]}.tar"
    try:
        _patiently(lambda: _download(url, packed), url)
        with packed.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest:
            raise InputError(f"{url} is damaged: its SHA-256 is {found}")
        with tarfile.open(packed) as archive:
            archive.extractall(folder, filter="data")
    except tarfile.TarError as error:
        raise InputError(f"{url} cannot be unpacked: {error}") from error
    except FileNotFoundError as error:
        raise InputError(f"there is no {url}") from error
    except OSError as error:
        raise AwayError(f"{url} cannot be read: {_reason(error)}") from error
    finally:
        packed.unlink(missing_ok=True)


def _download(url: str, packed: Path) -> None:
    files, path = _open(url)
    files.get_file(path, str(packed))


def _digest(url: str) -> str:
    digest = url.removesuffix(".tar").rpartition("-")[2]
    if not url.endswith(".tar") or len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise InputError(f"{url} is no run folder of artifacts=: its name must end with -HASH.tar, a SHA-256")
    return digest


def is_url(where: str) -> bool:
    """Whether a run is named by the URL of its copy."""
    return "://" in where or where.endswith(".tar")


def run_folder(run: str | Path) -> Path:
    """The folder of a run that a user names: a path, or the URL of a copy, which is brought into the cache first."""
    where = str(run)
    if not is_url(where):
        return Path(where).expanduser()
    path = machine_cache() / ARCHIVES / _digest(where)[:24]
    obtain_folder(Cache(machine_cache()), path, lambda folder: _unpack(where, folder), {"archive": where}, what=where)
    return path


def of_study(study: "Study") -> dict[str, str]:
    """The URLs of a study's run folders, by the names of these in the study's folder: 0, 1, ..., best, default."""
    urls = {str(trial.number): trial.user_attrs.get(ARTIFACT) for trial in study.get_trials(deepcopy=False)}
    last = study.user_attrs.get(ARTIFACTS)
    urls |= {name: last.get(name) for name in (BEST, DEFAULT)} if isinstance(last, dict) else {}
    return {name: url for name, url in urls.items() if isinstance(url, str)}


def bring(urls: Mapping[str, str], folder: Path) -> bool:
    """Bring the run folders that are missing in the folder of a study. One that can't be read is named in a warning.

    A best/ or default/ that was brought earlier, and is another one now, is renamed. False: the place is away.
    """
    missing = {name: url for name, url in urls.items() if not (folder / name).exists() or _is_stale(folder / name, url)}
    if missing:
        log.info("bringing %d run folders from %s", len(missing), next(iter(missing.values())).rpartition("/")[0])
    for name, url in missing.items():
        if (folder / name).exists():
            (folder / name).rename(folder / f"{name}-until-{time.strftime('%Y-%m-%d_%H-%M-%S')}")
        try:
            fetch(url, folder / name)
        except AwayError as error:
            log.warning("run folders are missing in %s: %s", folder, error)
            return False
        except InputError as error:
            log.warning("%s is missing: %s", folder / name, error)
    return True


def _is_stale(folder: Path, url: str) -> bool:
    """Whether a folder is the copy of another run. Those that were made here are not."""
    source = folder / SOURCE
    return source.exists() and source.read_text("utf-8") != url


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it.

    Raises ImportError for one whose package is not installed, ValueError for a scheme that is not known.
    """
    from fsspec.core import url_to_fs  # takes most of a second

    files, path = url_to_fs(url)
    return files, str(path)


def _schemes(files: Any) -> set[str]:
    return {files.protocol} if isinstance(files.protocol, str) else set(files.protocol)


def _make_folder(files: Any, path: str) -> None:
    """Make the folder of a file. Not in an object store, which has none: a misspelt bucket would be made."""
    if not _schemes(files) & OBJECT_STORES:
        files.makedirs(path.rpartition("/")[0], exist_ok=True)


def _patiently(function: Callable[[], None], url: str) -> None:
    """Call a function, thrice at most. Raises OSError for whatever a file system raises."""
    for pause in (*PAUSES, None):
        try:
            function()
            return
        except FileNotFoundError:
            raise
        except Exception as error:
            if pause is None or isinstance(error, ImportError | ValueError):
                raise OSError(_reason(error)) from error
            log.info("%s: %s; trying again in %.0f s", url, _reason(error), pause)
            time.sleep(pause)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
