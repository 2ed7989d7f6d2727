"""Data sets saved by Hugging Face's `datasets`, and Parquet files: splits, columns, labels, and errors."""

import io
import json
import logging
import os
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image

from tuner import InputError
from tuner.data import Data, huggingface, image_folder
from tuner.data.files.image_file import read
from tuner.data.tables import table_files

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
CLASSES = ["cat", "dog", "ant"]


def noise(seed):
    return np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)


def encoded(seed):
    """An image of noise as the bytes of a PNG."""
    file = io.BytesIO()
    Image.fromarray(noise(seed)).save(file, "PNG")
    return file.getvalue()


def table(n=18, first=0, labels=None, names=CLASSES, **more):
    """A table as `datasets` writes it: an Image and a ClassLabel."""
    images = [{"bytes": encoded(first + i), "path": f"{i}.png"} for i in range(n)]
    labels = [i % 3 for i in range(n)] if labels is None else labels
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names else None
    return pa.table({"image": images, "label": labels} | more).replace_schema_metadata(metadata)


def parquet(path, *args, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(args[0] if args else table(**options), path, row_group_size=5)
    return path


def load(path, **options) -> Data:
    return huggingface.load(path, **{"size": [3, 6, 7], "cache_dir": path.parent / "cache"} | options)


def message(path, **options):
    with pytest.raises(InputError) as error:
        load(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value).replace(str(path), "PATH")


def check(data, part, first=0):
    """The images and labels of a part are those of `table`, by the row numbers in their names."""
    for name, image, label in zip(part.names, part.images, part.labels.tolist(), strict=True):
        row = int(name.split("/")[1])
        assert np.array_equal(image.permute(1, 2, 0), noise(first + row))
        assert data.classes[label] == CLASSES[row % 3]


def saved_by_datasets(folder, splits):
    """Save splits, name -> (count, first), with the library itself."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    made = {
        name: datasets.Dataset.from_dict(table(count, first).to_pydict(), features=features)
        for name, (count, first) in splits.items()
    }
    saved = datasets.DatasetDict(made) if len(made) > 1 else next(iter(made.values()))
    saved.save_to_disk(folder / "saved", num_shards=dict.fromkeys(made, 2) if len(made) > 1 else 2)
    for name, part in made.items():
        part.to_parquet(folder / "parquet" / f"{name}-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_what_the_library_writes_is_read(tmp_path, caplog, kind):
    path = saved_by_datasets(tmp_path, {"train": (18, 0), "test": (6, 50), "validation": (3, 90)}) / kind
    for _ in range(2):  # freshly decoded, and cached
        data = load(path)
        assert data.classes == tuple(CLASSES)
        assert (len(data.train), len(data.val), len(data.test)) == (18, 3, 6)
        check(data, data.test, 50)
        for rows, first, split in ((data.train, 0, "train"), (data.val, 90, "val")):
            names = [data.pool.names[row] for row in rows.tolist()]
            assert {name.split("/")[0] for name in names} == {split}
            for name, image in zip(names, data.pool.images[rows], strict=True):
                assert np.array_equal(image.permute(1, 2, 0), noise(first + int(name.split("/")[1])))
    assert not caplog.messages


def test_a_single_data_set_is_divided(tmp_path):
    data = load(saved_by_datasets(tmp_path, {"train": (18, 0)}) / "saved")
    assert (len(data.train), len(data.val), len(data.test)) == (12, 3, 3)
    check(data, data.pool)
    check(data, data.test)
    assert data.pool.files.modes == {"RGB": 15}
    assert len(load(tmp_path / "saved", divide=False).pool) == 18


def test_a_parquet_file(tmp_path):
    data = load(parquet(tmp_path / "a.parquet"))
    check(data, data.pool)
    again = load(tmp_path / "a.parquet")
    assert data.hashes == again.hashes
    parquet(tmp_path / "a.parquet", first=70)
    check(data := load(tmp_path / "a.parquet"), data.pool, 70)  # the change is noticed


@pytest.mark.parametrize(
    ("files", "splits", "sizes"),
    [
        (["train.parquet", "test.parquet"], "auto", (15, 3, 18)),
        (["data/train-00000-of-00001-9f.parquet", "data/validation-00000-of-00001-9f.parquet"], "auto", (15, 18, 3)),
        (
            ["default/train/0000.parquet", "default/train/0001.parquet", "default/test/0000.parquet"],
            "auto",
            (30, 6, 18),
        ),
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"], "auto", (27, 3, 6)),
        (["part1.parquet", "part2.parquet"], "auto", (27, 3, 6)),
        (["train.parquet", "test.parquet"], "none", (27, 3, 6)),
        (["a.parquet", "b.parquet", "c.parquet"], {"train": "b", "test": "a"}, (15, 3, 18)),
    ],
)
def test_splits_by_the_names_of_files(tmp_path, files, splits, sizes):
    for i, name in enumerate(files):
        parquet(tmp_path / "root" / name, first=100 * i)
    data = load(tmp_path / "root", splits=splits)
    assert (len(data.train), len(data.val), len(data.test)) == sizes


REFUSED = {
    "unsupervised": (["train.parquet", "unsupervised.parquet"], "PATH/unsupervised.parquet is not named like a split"),
    "no train": (["test.parquet", "val.parquet"], "PATH has no training split, but test, val: name it, as in"),
    "a missing file": (["train-00000-of-00002.parquet"], "the train split in PATH has 1 of 2 files: get the others"),
    "two versions": (["small/train.parquet", "large/train.parquet"], "there are several versions of the train split"),
    "both kinds": (["a.parquet", "b.arrow"], "PATH has .parquet and .arrow files"),
    "nothing": (["a.txt"], "data.path=PATH has no .parquet or .arrow file"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_files_that_are_refused(tmp_path, what):
    files, says = REFUSED[what]
    for name in files:
        parquet(tmp_path / "root" / name)
    assert says in message(tmp_path / "root")


@pytest.mark.parametrize(
    ("splits", "says"),
    [
        (3, "data.splits=3 must be auto, none, or names"),
        ({"test": "b"}, "data.splits must have different names, and one for train"),
        ({"train": "a", "test": "a"}, "data.splits must have different names"),
        ({"train": "c"}, "data.splits.train=c is not in PATH, which has 'a', 'b'"),
        ({"train": "a", "x": "b"}, "data.splits has the split x"),
    ],
)
def test_wrong_names_of_splits(tmp_path, splits, says):
    for name in "ab":
        parquet(tmp_path / "root" / f"{name}.parquet")
    assert says in message(tmp_path / "root", splits=splits)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["b", "a", "ä"] * 6, ("a", "b", "ä")),
        ([10, 9, -2] * 6, ("-2", "9", "10")),
        ([True, False] * 9, ("False", "True")),
        (pa.array(["b", "a", "ä"] * 6).dictionary_encode(), ("a", "b", "ä")),
    ],
)
def test_labels_without_names(tmp_path, labels, classes):
    path = parquet(tmp_path / "a.parquet", labels=labels, names=None)
    data = load(path)
    assert data.classes == classes
    texts = [str(label) for label in (labels if isinstance(labels, list) else labels.to_pylist())]
    assert [data.classes[label] for label in data.pool.labels] == [texts[int(name[6:])] for name in data.pool.names]


def test_columns_can_be_named(tmp_path):
    whole = table(fine=pa.array([i % 2 for i in range(18)]), text=[f"{i % 6}" for i in range(18)])
    whole = whole.append_column("thumb", pa.array([encoded(500 + i) for i in range(18)]))
    path = parquet(tmp_path / "a.parquet", whole)
    says = "data.image must name a column of PATH that holds image files: 'image', 'thumb'; its columns are 'image', "
    assert message(path).startswith(says)
    data = load(path, image="thumb", label="fine", divide=False)
    assert data.classes == ("0", "1")
    assert np.array_equal(data.pool.images[3].permute(1, 2, 0), noise(503))
    assert load(path, image="image", label="text", divide=False).classes == ("0", "1", "2", "3", "4", "5")
    says = "data.label=y must be a column of PATH with classes, text or whole numbers: 'label', 'fine', 'text'"
    assert message(path, image="image", label="y") == says
    assert message(path, image="nose").startswith("data.image=nose must be a column of PATH")


def test_two_columns_of_classes_have_to_be_chosen_from(tmp_path):
    features = {name: {"_type": "ClassLabel", "names": CLASSES} for name in ("fine_label", "coarse_label")}
    whole = table().rename_columns(["img", "fine_label"])
    whole = whole.append_column("coarse_label", whole["fine_label"])
    whole = whole.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path = parquet(tmp_path / "cifar100.parquet", whole)
    says = "data.label must name a column of PATH with classes, text or whole numbers: 'fine_label', 'coarse_label'"
    assert message(path) == says
    assert load(path, label="coarse_label").classes == tuple(CLASSES)


def test_tables_without_images_or_labels(tmp_path):
    path = parquet(tmp_path / "a.parquet", pa.table({"x": [1, 2], "y": [0.5, 0.5]}))
    assert "holds image files: it has none; its columns are 'x', 'y'" in message(path)
    path = parquet(tmp_path / "b.parquet", table().select(["image"]))
    assert message(path).endswith("with classes, text or whole numbers: it has none")


@pytest.mark.parametrize("labels", [[-1] * 6, [None] * 6])
def test_a_test_split_without_labels_is_left_out(tmp_path, caplog, labels):
    parquet(tmp_path / "root/train.parquet")
    parquet(tmp_path / "root/test.parquet", n=6, labels=pa.array(labels, pa.int64()))
    data = load(tmp_path / "root")
    assert (len(data.train), len(data.val), len(data.test)) == (12, 3, 3)
    assert caplog.messages == [f"the test split of {tmp_path}/root has no labels: it is left out"]


def test_labels_that_are_missing_or_unknown(tmp_path):
    path = parquet(tmp_path / "a.parquet", labels=[0, 1, None] * 6)
    assert message(path) == "row 2 of the train split of PATH has no label: fill it in or remove the row"
    path = parquet(tmp_path / "b.parquet", labels=[0, 1, 7] * 6)
    assert message(path) == "label 7 of column label is not one of its 3 classes"
    parquet(tmp_path / "root/train.parquet", labels=[0, 1] * 9)
    parquet(tmp_path / "root/test.parquet", labels=[0, 1, 2] * 6)
    says = (
        "row 2 of the test split of PATH has the label 'ant', which no training image has: the classes are 'cat', 'dog'"
    )
    assert message(tmp_path / "root") == says


def test_classes_without_a_training_image_are_named(tmp_path, caplog):
    assert load(parquet(tmp_path / "a.parquet", labels=[0, 2] * 9)).classes == ("cat", "ant")
    assert caplog.messages == ["no training image is of 1 of the 3 classes: 'dog'"]


def test_images_that_cannot_be_read(tmp_path):
    images = [{"bytes": encoded(i), "path": None} for i in range(18)]
    images[3], images[5], images[7] = {"bytes": b"text", "path": None}, {"bytes": None, "path": "/etc/passwd"}, None
    whole = table().drop_columns(["image"]).append_column("image", pa.array(images))
    path = parquet(tmp_path / "a.parquet", whole)
    elsewhere = "the table has no bytes of it, and files elsewhere are not read"
    says = f"train/3 (its content is not an image, despite its name); train/5 ({elsewhere}); train/7 ({elsewhere})"
    assert message(path, divide=False).endswith(says)
    assert len(load(path, divide=False, skip_broken=True).pool) == 15
    assert "10 are allowed: raise data.max_pixels" in message(path, divide=False, max_pixels=10)


def arrow(path):
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table().schema) as writer:
        writer.write_table(table(), max_chunksize=5)
    return path


def test_an_arrow_file_that_ends_between_two_batches(tmp_path):
    content = arrow(tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(content[: content.rindex(b"\xff\xff\xff\xff", 0, -8)])
    assert message(tmp_path / "a.arrow") == "PATH is damaged (it ends too early): get it again"


def test_names_of_columns_that_are_not_text(tmp_path):
    content = arrow(tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(content.replace(b"label\0", b"l\xe4bel\0"))
    assert message(tmp_path / "a.arrow").startswith("PATH is damaged ('utf-8' codec can't decode byte 0xe4")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("damage", ["empty", "text", "half", "bytes"])
def test_damaged_files(tmp_path, suffix, damage):
    path = tmp_path / f"a{suffix}"
    parquet(path) if suffix == ".parquet" else arrow(path)
    content = path.read_bytes()
    changed = {"empty": b"", "text": b"no " * 300, "half": content[: len(content) // 2]}
    path.write_bytes(changed.get(damage, content[:200] + bytes(64) + content[264:]))
    if damage == "bytes":  # of an image, or of the table
        with suppress(InputError):
            assert len(load(path, divide=False).pool) == 18
    else:
        assert "PATH is damaged" in message(path, divide=False)


def test_other_rows_than_the_first_file(tmp_path):
    parquet(tmp_path / "root/train-00000-of-00002.parquet")
    parquet(tmp_path / "root/train-00001-of-00002.parquet", labels=[str(i % 3) for i in range(18)], names=None)
    assert "has other columns than" in message(tmp_path / "root")


def test_paths_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message(tmp_path / "a").startswith(f"data.path=PATH does not exist (relative to {tmp_path})")
    for url in ("https://x.org/a.parquet", "hf://datasets/mnist", "mnist"):
        with pytest.raises(InputError, match=r"^data.path=.* does not exist .*; only local files are read$"):
            huggingface.load(url, size=8, cache_dir=tmp_path)
    assert "does not exist" in message(tmp_path / "a\0b")


def test_without_the_extra(tmp_path, monkeypatch):
    path = parquet(tmp_path / "a.parquet")
    monkeypatch.setattr(huggingface.importlib.util, "find_spec", lambda name: None)
    assert message(path) == "data=huggingface needs pyarrow: pip install 'tuner[datasets]'"


@pytest.mark.parametrize(
    "files", [["a.parquet"], ["data/train.parquet"], ["dataset_dict.json"], ["state.json", "x.arrow"]]
)
def test_a_folder_of_images_that_is_none(tmp_path, files):
    for name in files:
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).touch()
    for root in (tmp_path / "root", tmp_path / "root" / files[-1]):
        if table_files.is_table(root):
            says = f"^data.root={root} has tables instead of image files: use data=huggingface data.path={root}$"
            with pytest.raises(InputError, match=says):
                image_folder.load(root, size=8, cache_dir=tmp_path)


def test_a_table_beside_images_does_no_harm(tmp_path):
    for name in ("a", "b"):
        for i in range(4):
            (tmp_path / "root" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "root" / name / f"{i}.png").write_bytes(encoded(i))
    parquet(tmp_path / "root/metadata.parquet")
    assert image_folder.load(tmp_path / "root", size=8, cache_dir=tmp_path / "cache").classes == ("a", "b")


def test_a_run_is_trained_and_evaluated(command, call, tmp_path, caplog):
    parquet(tmp_path / "root/train.parquet", n=30)
    parquet(tmp_path / "root/test.parquet", n=9, first=90)
    arguments = ("data=huggingface", "data.path=root", "data.size=16", "model=tiny", "epochs=1", "plots=false")
    code, said = command(*arguments, "hydra.run.dir=run")
    assert code == 0, said
    assert "(9 images, " in said
    code, out, said = call("evaluate", "run", "data=huggingface", "data.path=root/test.parquet", "--json")
    assert code == 0, said
    assert json.loads(out)["images"] == 9


def test_the_same_image_as_from_a_file(tmp_path):
    parquet(tmp_path / "a.parquet", n=9, labels=[0, 1, 2] * 3)
    data = load(tmp_path / "a.parquet", size=[1, 4, 5], fit="pad", divide=False)
    (tmp_path / "x.png").write_bytes(encoded(4))
    assert torch.equal(data.pool.images[4], read(tmp_path / "x.png", (1, 4, 5), "pad"))


def test_other_files_lead_to_another_array(tmp_path):
    path = parquet(tmp_path / "a.parquet")
    load(path)
    os.utime(path, (5, 5))
    load(path)
    with_names = [p for p in (tmp_path / "cache/images").iterdir() if p.suffix == ".safetensors"]
    assert len(with_names) == 4  # pool and test, twice
    assert logging.getLogger("tuner").level == 0
