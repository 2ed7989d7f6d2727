"""Which folders of an image folder are splits: by their names, by data.splits, and in layouts of public data sets."""

import logging
import re

import pytest
from test_image_folder import load, make, message, names

from tuner.data.files import layout

TRAIN = [
    "train",
    "training",
    "Train",
    "TRAIN",
    "Training_set",
    "train_set",
    "trainset",
    "TrainSet",
    "train1",
    "train 2",
]
TRAIN += ["train_images", "images_train", "seg_train", "images-train", "Training Data", "train2017", "trainval"]
TEST = [
    "test",
    "test1",
    "test_set",
    "testing",
    "eval",
    "holdout",
    "hold-out",
    "hold_out",
    "seg_test",
    "testset",
    "Evaluation",
]
VAL = [
    "val",
    "valid",
    "validation",
    "dev",
    "val_set",
    "valid_images",
    "ILSVRC_val_images_val",
    "VALID",
    "development set",
]
NEITHER = [
    "test_tube",
    "Val d'Isere",
    "model_dev_board",
    "bus",
    "train station",
    "trains",
    "devil",
    "seg",
    "images",
    "2",
    "",
]
NEITHER += ["train_val", "猫", "contest", "valley"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *((name, "train") for name in TRAIN),
        *((name, "test") for name in TEST),
        *((name, "val") for name in VAL if not name.startswith("ILSVRC")),
        *((name, None) for name in NEITHER),
    ],
)
def test_names_of_splits(name, split):
    assert layout.split_names([name]).get(name) == split


def test_another_word_is_allowed_if_splits_share_it():
    both = ["cars_train", "cars_test", "test_tube", "bus"]
    assert layout.split_names(both) == {"cars_train": "train", "cars_test": "test"}
    assert layout.split_names(both[1:]) == {}


# Folders with their number of images -> the classes, the images of each split (0: drawn from train), what is logged
CATS = {"cat": 6, "dog": 6}


def under(folder, classes):
    return {f"{folder}/{name}": count for name, count in classes.items()}


WORK = {
    "Intel Image Classification, kaggle.com/puneet6060": (
        under("seg_train/seg_train", {"buildings": 6, "sea": 6})
        | under("seg_test/seg_test", {"buildings": 2, "sea": 3})
        | {"seg_pred/seg_pred": 4},
        ("buildings", "sea"),
        {"train": 12, "val": 0, "test": 5},
        ["seg_pred has no class folders, so its images have no labels: it is left out; `python -m tuner.predict RUN "],
    ),
    "Chest X-Ray Pneumonia, kaggle.com/paultimothymooney": (
        under("chest_xray/train", {"NORMAL": 6, "PNEUMONIA": 9})
        | under("chest_xray/val", {"NORMAL": 2, "PNEUMONIA": 2})
        | under("chest_xray/test", {"NORMAL": 3, "PNEUMONIA": 4})
        | {"__MACOSX/chest_xray": 1},
        ("NORMAL", "PNEUMONIA"),
        {"train": 15, "val": 4, "test": 7},
        ["only chest_xray/ in", "is divided into splits: test (test), train (train), val (val)"],
    ),
    "Brain Tumor MRI, kaggle.com/masoudnickparvar": (
        under("Training", {"glioma": 6, "notumor": 6}) | under("Testing", {"glioma": 2, "notumor": 2}),
        ("glioma", "notumor"),
        {"train": 12, "val": 0, "test": 4},
        ["is divided into splits: Testing (test), Training (train)"],
    ),
    "Fruits-360, github.com/fruits-360": (
        under("fruits-360/Training", {"Apple Braeburn 1": 6, "Banana 1": 6})
        | under("fruits-360/Test", {"Apple Braeburn 1": 2, "Banana 1": 2})
        | {"fruits-360/test-multiple_fruits": 3, "fruits-360/papers": 0},
        ("Apple Braeburn 1", "Banana 1"),
        {"train": 12, "val": 0, "test": 4},
        ["test-multiple_fruits has no class folders", "papers has no images and is left out"],
    ),
    "Animals-10, kaggle.com/alessiocorrado99": (
        under("raw-img", {"cane": 9, "cavallo": 9}),
        ("cane", "cavallo"),
        None,
        ["only raw-img/ in"],
    ),
    "Cats and Dogs, microsoft.com/download id 54765": (
        under("PetImages", {"Cat": 9, "Dog": 9}),
        ("Cat", "Dog"),
        None,
        ["only PetImages/ in"],
    ),
    "Imagenette, github.com/fastai/imagenette": (
        under("imagenette2/train", {"n01440764": 9, "n02102040": 9})
        | under("imagenette2/val", {"n01440764": 2, "n02102040": 2}),
        ("n01440764", "n02102040"),
        {"train": 18, "val": 4, "test": 0},
        ["only imagenette2/ in"],
    ),
    "Tiny ImageNet, cs231n.stanford.edu": (
        under("train", {"n01443537/images": 9, "n01629819/images": 9}) | {"val/images": 4, "test/images": 4},
        ("n01443537", "n01629819"),
        {"train": 18, "val": 0, "test": 0},
        ["val has no class folders", "test has no class folders"],
    ),
    "Caltech-101, data.caltech.edu": (
        under("caltech-101/101_ObjectCategories", {"accordion": 9, "BACKGROUND_Google": 9})
        | {"caltech-101/Annotations": 0},
        ("BACKGROUND_Google", "accordion"),
        None,
        ["only caltech-101/101_ObjectCategories/ in"],
    ),
    "Food-101, data.vision.ee.ethz.ch": (
        under("food-101/images", {"apple_pie": 9, "ramen": 9}) | {"food-101/meta": 0},
        ("apple_pie", "ramen"),
        None,
        ["only food-101/images/ in"],
    ),
    "EuroSAT RGB, github.com/phelber/EuroSAT": (
        under("2750", {"AnnualCrop": 9, "SeaLake": 9}),
        ("AnnualCrop", "SeaLake"),
        None,
        ["only 2750/ in"],
    ),
    "CUB-200-2011, vision.caltech.edu": (
        under("CUB_200_2011/images", {"001.Black_footed_Albatross": 9, "002.Laysan_Albatross": 9})
        | {"CUB_200_2011/parts": 0, "CUB_200_2011/attributes": 0},
        ("001.Black_footed_Albatross", "002.Laysan_Albatross"),
        None,
        ["only CUB_200_2011/images/ in"],
    ),
    "Stanford Dogs, vision.stanford.edu": (
        under("Images", {"n02085620-Chihuahua": 9, "n02085782-Japanese_spaniel": 9})
        | {"Annotation/n02085620-Chihuahua": 0},
        ("n02085620-Chihuahua", "n02085782-Japanese_spaniel"),
        None,
        ["only Images/ in"],
    ),
    "GTSRB, kaggle.com/meowmeowmeowmeowmeow, without Meta/": (
        under("Train", {"0": 9, "1": 9, "10": 9}) | {"Test": 5},
        ("0", "1", "10"),
        {"train": 27, "val": 0, "test": 0},
        ["Test has no class folders"],
    ),
}


@pytest.mark.parametrize("name", WORK)
def test_public_layouts_that_work(tmp_path, caplog, name):
    folders, classes, sizes, logged = WORK[name]
    make(tmp_path / "root", folders)
    with caplog.at_level(logging.INFO):
        data = load(tmp_path / "root")
    assert data.classes == classes
    splits = names(data)
    sizes = sizes or {"train": sum(folders.values()), "val": 0, "test": 0}
    for split in ("val", "test"):
        assert len(splits[split]) == sizes[split] or sizes[split] == 0 < len(splits[split])
    drawn = sum(len(splits[split]) for split in ("val", "test") if not sizes[split])
    assert len(splits["train"]) + drawn == sizes["train"]
    for text in logged:
        assert any(text in line for line in caplog.messages), text
    for samples in (data.pool, data.test):  # each image has the class in its path
        for file, label in zip(samples.names, samples.labels.tolist(), strict=True):
            assert classes[label] in file.split("/")
            assert (tmp_path / "root" / file).is_file()


REFUSED = {
    "Dogs vs. Cats, kaggle.com/c/dogs-vs-cats": (
        {"train": 4, "test1": 4},
        "train/ has no class folders: put its images",
    ),
    "Dogs vs. Cats, as it is unpacked twice": (
        {"train/train": 4, "test1/test1": 4},
        "in ROOT, test1, train are named like splits, but train/ has no class folders: put its images",
    ),
    "Oxford Flowers 102, robots.ox.ac.uk": (
        {"jpg": 9},
        "if jpg/ has images of several classes, put its images into one folder per class, or list them in a CSV file",
    ),
    "Stanford Cars, kaggle.com/jessicali9530": (
        {"cars_train": 4, "cars_test": 4},
        "in ROOT, cars_test, cars_train are named like splits, but cars_train/ has no class folders",
    ),
    "PlantVillage, kaggle.com/emmarex": (
        under("PlantVillage", {"Potato___healthy": 4, "Tomato_healthy": 4})
        | under("PlantVillage/PlantVillage", {"Potato___healthy": 4, "Tomato_healthy": 4}),
        "ROOT/PlantVillage and ROOT/PlantVillage/PlantVillage both have the folders 'Potato___healthy', ",
    ),
    "EuroSAT, kaggle.com/apollo2506": (
        under("EuroSAT", {"AnnualCrop": 4, "SeaLake": 4}) | under("EuroSATallBands", {"AnnualCrop": 4, "SeaLake": 4}),
        "ROOT/EuroSAT and ROOT/EuroSATallBands both have the folders 'AnnualCrop', 'SeaLake': if these are the "
        "classes, name one as data.root, or both as splits",
    ),
    "MVTec AD, mvtec.com: a split in each class": (
        {"bottle/train": 4, "bottle/test": 4, "cable/train": 4, "cable/test": 4},
        "ROOT/bottle and ROOT/cable both have the folders 'test', 'train'",
    ),
    "GTSRB, kaggle.com/meowmeowmeowmeowmeow": (
        under("Train", {"0": 9, "1": 9}) | {"Test": 5, "Meta": 3},
        "Train/ divides ROOT into splits, but Meta/ is not named like a split (train, val, test): move it elsewhere, "
        "or name the splits, as in 'data.splits={train: Train}'",
    ),
    "a class train with folders beside other classes": (
        {"train/steam": 4, "train/diesel": 4, "bus": 4, "car": 4},
        "train/ divides ROOT into splits, but bus/ is not named like a split (train, val, test): move it elsewhere, or",
    ),
    "no training split": (under("test", CATS), "in ROOT, test is named like splits, but there is no training split"),
    "a split beside classes": (
        CATS | under("test", {"cat": 2, "bird": 2}),
        "in ROOT, test is named like splits, but there is no training split: add one",
    ),
    "splits and another folder": (
        {"train": 4, "test": 4, "bus": 4},
        "in ROOT, test, train are named like splits, but train/ has no class folders",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layouts_that_are_refused(tmp_path, name):
    folders, says = REFUSED[name]
    text = message(make(tmp_path / "root", folders))
    assert says in text
    assert any(option in text for option in ("data.splits=", "data=csv"))


@pytest.mark.parametrize(
    ("splits", "sizes"),
    [
        ({"train": "A"}, {"train": 14, "val": 2, "test": 4}),
        ({"train": "A", "test": "B"}, {"train": 18, "val": 2, "test": 6}),
        ({"test": "B", "val": "deep/C", "train": "A"}, {"train": 20, "val": 4, "test": 6}),
    ],
)
def test_splits_can_be_named(tmp_path, splits, sizes):
    make(
        tmp_path / "root",
        under("A", {"x": 10, "y": 10}) | under("B", {"x": 3, "y": 3}) | under("deep/C", {"x": 2, "y": 2}),
    )
    data = load(tmp_path / "root", splits=splits)
    assert data.classes == ("x", "y")
    assert {split: len(files) for split, files in names(data).items()} == sizes
    assert {name[0] for name in data.test.names} == {splits.get("test", "A")}


@pytest.mark.parametrize(
    ("splits", "says"),
    [
        ("maybe", "data.splits=maybe must be auto, none, or folders, as in {train: A, test: B}"),
        (None, "data.splits=None must be auto, none, or folders"),
        (3, "data.splits=3 must be"),
        ({}, "data.splits has no train: name the folder to train on"),
        ({"test": "B"}, "data.splits has no train"),
        ({"train": "A", "tets": "B"}, "data.splits has the split tets; the splits are train, val and test"),
        ({"train": "A", "test": "D"}, "data.splits.test=D: there is no folder ROOT/D"),
        ({"train": "A", "test": ""}, "data.splits.test= must be a folder in ROOT, relative to it"),
        ({"train": "A", "test": "../B"}, "data.splits.test=../B must be a folder in ROOT, relative to it"),
        ({"train": "A", "test": "/tmp"}, "data.splits.test=/tmp must be a folder in ROOT, relative to it"),
        ({"train": "A", "test": 3}, "data.splits.test=3 must be a folder in ROOT"),
        ({"train": "A", "test": "a\0b"}, "must be a folder in ROOT"),
        ({"train": "A", "test": "loose"}, "data.splits.test=loose has no class folders: put its images into one"),
        ({"train": "A", "test": "A"}, "data.splits.train and data.splits.test must not share a folder, got ROOT/A"),
        ({"train": "A", "test": "A/x"}, "data.splits.test=A/x has no class folders"),
    ],
)
def test_wrong_names_of_splits(tmp_path, splits, says):
    make(tmp_path / "root", under("A", CATS) | under("B", CATS) | {"loose": 2, "A/x": 2})
    assert says in message(tmp_path / "root", splits=splits)


def test_folders_that_share_a_split_are_refused_also_through_a_link(tmp_path):
    root = make(tmp_path / "root", under("A", CATS))
    (root / "B").symlink_to("A")
    assert "must not share a folder" in message(root, splits={"train": "A", "test": "B"})


def test_a_class_folder_may_hold_one_that_is_named_like_a_split(tmp_path):
    data = load(make(tmp_path / "root", {"cat/train": 6, "dog": 6}))
    assert data.classes == ("cat", "dog")


def test_the_same_folders_in_two_classes_can_be_taken_for_classes(tmp_path):
    folders = {"cat/2019": 4, "cat/2020": 4, "dog/2019": 4, "dog/2020": 4}
    root = make(tmp_path / "root", folders)
    assert "data.splits=none" in message(root)
    assert load(root, splits="none").classes == ("cat", "dog")


@pytest.mark.parametrize("depth", ["a", "a/b", "a/b/c"])
def test_a_folder_around_the_classes_is_passed_over(tmp_path, caplog, depth):
    root = make(tmp_path / "root", under(depth, CATS))
    (root / "LICENSE.txt").write_text("text")
    with caplog.at_level(logging.INFO):
        data = load(root)
    assert data.classes == ("cat", "dog")
    assert {name.rpartition("/")[0] for name in data.pool.names} == {f"{depth}/cat", f"{depth}/dog"}
    says = f"only {depth}/ in {root} has images, so its folders are used (data.splits=none: it is a class)"
    assert says in caplog.messages
    assert "ROOT has only one class, 'a'" in message(root, splits="none")


@pytest.mark.parametrize("folders", [{"cat": 4}, {"cat/2019": 4}, {"cat": 4, "empty": 0}])
def test_a_single_class_is_not_passed_over(tmp_path, folders):
    assert load(make(tmp_path / "root", folders), divide=False).classes[0] == "cat"


def test_a_folder_that_links_to_the_one_above_ends(tmp_path):
    root = make(tmp_path / "root", CATS)
    (root / "cat/again").symlink_to(root)
    (root / "loop").symlink_to("loop")
    assert load(root).classes == ("cat", "dog")


def test_classes_without_images_in_a_split_are_named(tmp_path, caplog):
    load(make(tmp_path / "root", under("train", CATS | {"bird": 6}) | {"test/cat": 2, "test/dog": 0}))
    assert caplog.messages == [f"{tmp_path}/root/test has no images of 2 of 3 classes: 'bird', 'dog'"]


@pytest.mark.parametrize("other", ["Cat_A", "cat-a", "CATA", "cat\u00a0a"])
def test_class_names_that_differ_only_in_case_or_separators_are_named(tmp_path, other):
    says = message(make(tmp_path / "root", under("train", {"cat a": 6, "dog": 6}) | {f"test/{other}": 2}))
    assert says == (
        f"ROOT/test/{other} differs from the class 'cat a' of the training split only in case, spaces or other "
        "separators: rename one"
    )


def test_classes_that_differ_only_in_case_or_separators_are_named(tmp_path, caplog):
    data = load(make(tmp_path / "root", {"Cat": 6, "cat": 6, "dog": 6, "+": 6, "-": 6}))
    assert len(data.classes) == 5
    says = f"the classes 'Cat' and 'cat' in {tmp_path}/root differ only in case or separators: are they one?"
    assert caplog.messages == [says]


def test_a_run_takes_the_names_of_splits_from_the_command_line(command, tmp_path):
    make(tmp_path / "images", under("A", CATS) | under("B", CATS))
    arguments = ("data=image_folder", "data.root=images", "data.size=16", "model=tiny", "epochs=1", "plots=false")
    code, said = command(*arguments)
    assert code == 1
    [option] = re.findall(r"'(data.splits=.*?)'", said)
    code, said = command(*arguments, option)
    assert code == 0, said
    assert "test accuracy" in said
    assert "(12 images, " in said
