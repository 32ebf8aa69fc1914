"""Classification: what torchvision lists is what the source lists, and each YAML fits the data it is written for."""

import json
import pickle
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torchvision
from scipy.io import savemat

import cache_embeddings
from datasets.classification import Classification, _listed
from datasets.embeddings import Pairs
from utils.config import known, load_config, make_source
from utils.errors import UserError

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def draw(path):
    """Write a small picture that no other path gets."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(list(str(path).encode())).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(path)
    return path


def folders(*names):
    """Make a layout of two pictures in each folder."""

    def lay(root):
        for name in names:
            draw(root / name / "b.jpg")
            draw(root / name / "a.jpg")

    return lay


def cifar(folder, files, meta, names):
    def lay(root):
        (root / folder).mkdir()
        rng = np.random.default_rng(0)
        for file in files:
            labels = rng.integers(0, len(names), 4).tolist()
            data = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
            key = "labels" if len(names) == 10 else "fine_labels"
            (root / folder / file).write_bytes(pickle.dumps({"data": data, key: labels}))
        key = "label_names" if len(names) == 10 else "fine_label_names"
        (root / folder / meta).write_bytes(pickle.dumps({key: names}))

    return lay


def cifar10(root):
    batches = [f"data_batch_{number}" for number in range(1, 6)]
    cifar("cifar-10-batches-py", [*batches, "test_batch"], "batches.meta", CIFAR10)(root)


def cifar100(root):
    names = ["aquarium_fish", *(f"thing_{number}" for number in range(99))]
    cifar("cifar-100-python", ["train", "test"], "meta", names)(root)


def cifar10h(root):
    cifar10(root)
    np.save(root / "cifar10h-probs.npy", np.full((4, 10), 0.1))


def flowers102(root):
    base = root / "flowers-102"
    for number in range(1, 7):
        draw(base / "jpg" / f"image_{number:05d}.jpg")
    savemat(base / "imagelabels.mat", {"labels": np.array([[77, 102, 1, 3, 2, 102]])})
    savemat(base / "setid.mat", {"trnid": np.array([[6, 1]]), "valid": np.array([[2, 5]]), "tstid": np.array([[4, 3]])})


def food101(root):
    base = root / "food-101"
    (base / "meta").mkdir(parents=True)
    for split, number in (("train", 0), ("test", 1)):
        listed = {name: [f"{name}/{number}"] for name in ("hot_dog", "apple_pie")}
        for rows in listed.values():
            draw(base / "images" / f"{rows[0]}.jpg")
        (base / "meta" / f"{split}.json").write_text(json.dumps(listed))


def dtd(root):
    base = root / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for split in ("train", "val", "test"):
        listed = [f"{name}/{name}_{split}.jpg" for name in ("polka-dotted", "banded", "woven")]
        for name in listed:
            draw(base / "images" / name)
        (base / "labels" / f"{split}1.txt").write_text("\n".join(listed) + "\n")


EUROSAT = [
    "AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial",
    "Pasture", "PermanentCrop", "Residential", "River", "SeaLake",
]  # fmt: skip


def pets(root):
    base = root / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for split in ("trainval", "test"):
        lines = [f"Abyssinian_{split} 1 1 1", f"great_pyrenees_{split} 3 2 1", f"american_bulldog_{split} 2 2 1"]
        for line in lines:
            draw(base / "images" / f"{line.split()[0]}.jpg")
        (base / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")


def cars(root):
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    names = np.array(["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012"], dtype=object)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": names})
    for split, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = [(f"{number}.jpg", np.uint8(2 - number % 2)) for number in range(3)]
        for name, _ in rows:
            draw(base / f"cars_{split}" / name)
        savemat(base / file, {"annotations": np.array(rows, dtype=[("fname", object), ("class", object)])})


def sun397(root):
    names = ["/a/abbey", "/a/apartment_building/outdoor", "/z/zoo"]
    for number, name in enumerate(reversed(names)):
        draw(root / "SUN397" / name[1:] / f"sun_{9 - number}.jpg")
        draw(root / "SUN397" / name[1:] / f"sun_{number}.jpg")
    (root / "SUN397" / "ClassName.txt").write_text("\n".join(names) + "\n")


def aircraft(root):
    base = root / "fgvc-aircraft-2013b" / "data"
    base.mkdir(parents=True)
    (base / "variants.txt").write_text("707-320\nF-16A/B\nFokker 50\n")
    for split, number in (("trainval", 1), ("test", 2)):
        rows = [f"{number}1 Fokker 50", f"{number}2 707-320", f"{number}3 F-16A/B"]
        for row in rows:
            draw(base / "images" / f"{row.split()[0]}.jpg")
        (base / f"images_variant_{split}.txt").write_text("\n".join(rows) + "\n")


WNIDS = ("n02123045", "n01440764", "n04254680")
WNID_NAMES = ["tench", "tabby cat", "soccer ball"]
DOMAINS = [
    f"{domain}/{name}" for domain in ("Art", "Clipart", "Product", "Real World") for name in ("Alarm_Clock", "TV")
]
# A layout for every YAML of this source, and the names that its classes get.
LAYOUTS = {
    "cifar10": (cifar10, CIFAR10),
    "cifar100": (cifar100, ["aquarium fish", *(f"thing {number}" for number in range(99))]),
    "cifar10h": (cifar10h, CIFAR10),
    "flowers102": (flowers102, None),
    "food101": (food101, ["apple pie", "hot dog"]),
    "dtd": (dtd, ["banded", "polka-dotted", "woven"]),
    "eurosat": (folders(*(f"eurosat/2750/{name}" for name in EUROSAT)), None),
    "oxford-pets": (pets, ["Abyssinian", "American Bulldog", "Great Pyrenees"]),
    "stanford-cars": (cars, ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012"]),
    "sun397": (sun397, ["abbey", "apartment building outdoor", "zoo"]),
    "fgvc-aircraft": (aircraft, ["707-320", "F-16A/B", "Fokker 50"]),
    "imagenet": (folders(*(f"{split}/{wnid}" for split in ("train", "val") for wnid in WNIDS)), WNID_NAMES),
    "imagenet-a": (folders(*WNIDS), WNID_NAMES),
    "imagenet-r": (folders(*WNIDS), WNID_NAMES),
    "imagenet-sketch": (folders(*WNIDS), WNID_NAMES),
    "officehome": (folders(*DOMAINS), ["Alarm Clock", "TV"]),
    "folder": (folders("hot_dog", "apple_pie"), ["apple pie", "hot dog"]),
}


@pytest.fixture(autouse=True)
def any_md5(monkeypatch):
    """Let torchvision take files for whole without comparing them to those published."""
    for module in ("cifar", "flowers102"):
        whole = lambda path, md5=None: Path(path).is_file()  # noqa: E731
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", whole)


def source_of(name, root):
    config = load_config(name)
    config.data.root = str(root)
    return make_source(config)


def pixels(picture):
    return np.asarray(picture.convert("RGB")).tobytes()


def test_every_yaml_of_this_source_has_a_layout_here():
    sources = {name: load_config(name).data.source for name in known("datasets")}
    assert {name for name, path in sources.items() if path.startswith("datasets.classification.")} == set(LAYOUTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_it_lists_what_torchvision_lists(tmp_path, name):
    lay, names = LAYOUTS[name]
    lay(tmp_path)
    config = load_config(name).data
    source = source_of(name, tmp_path)
    splits = [split for split in source.splits if name != "folder" or split == "all"]
    assert config.train_split in splits and config.eval_split in splits
    for split in splits:
        options = dict(config.options["splits"][split])
        root = tmp_path / options.pop("folder", ".")
        data = getattr(torchvision.datasets, config.options["dataset"])(str(root), **options)
        images, classes = source.images(split), source.classes(split)
        assert len(images) == len(data) == len(classes.label) and classes.label.dtype == np.int64
        assert [image.id for image in images] == list(range(len(data)))
        listed = [(pixels(source.open(image)), label) for image, label in zip(images, classes.label)]
        expected = [(pixels(picture), label) for picture, label in data]
        if name == "sun397":  # torchvision's order is the file system's
            assert images == sorted(images, key=lambda image: str(image.path))
            listed, expected = sorted(listed), sorted(expected)
        assert listed == expected
        assert len({picture for picture, _ in listed}) == len(listed)
        assert all(image.path is None if name.startswith("cifar") else image.path.is_file() for image in images)
        assert names is None or classes.names == names
        assert len(classes.names) == len(getattr(data, "classes", classes.names)) > classes.label.max()
        assert classes.templates and all(template.count("{}") == 1 for template in classes.templates)
        assert source.captions(split) == []


def test_names_in_a_list_are_in_the_order_of_the_labels():
    flowers, satellite = (load_config(name).data.options["classes"] for name in ("flowers102", "eurosat"))
    assert [flowers[label] for label in (0, 1, 76, 101)] == [
        "pink primrose", "hard-leaved pocket orchid", "passion flower", "blackberry lily",
    ]  # fmt: skip
    known_to_torchvision = getattr(torchvision.datasets.Flowers102, "classes", flowers)
    # CLIP's authors wrote three of them otherwise.
    changed = {ours: theirs for ours, theirs in zip(flowers, known_to_torchvision) if ours != theirs}
    assert changed.items() <= {
        "globe flower": "globe-flower", "pink and yellow dahlia": "pink-yellow dahlia?", "air plant": "ball moss",
    }.items()  # fmt: skip
    words = [
        "annual",
        "forest",
        "shrub",
        "highway",
        "industrial",
        "pasture",
        "permanent",
        "residential",
        "river",
        "sea",
    ]
    assert len(satellite) == len(EUROSAT) and all(word in name for word, name in zip(words, satellite))


def test_images_without_files_are_opened_by_split_and_in_workers(tmp_path):
    cifar10(tmp_path)
    source = source_of("cifar10", tmp_path)
    train, test = source.images("train"), source.images("test")
    assert (len(train), len(test)) == (20, 4) and test[3].place == "CIFAR10 test 3" and test[3].path is None
    data = torchvision.datasets.CIFAR10(tmp_path, train=False).data
    sent = pickle.loads(pickle.dumps(source))  # as a spawned worker gets it
    for row, image in enumerate(test):
        assert (np.asarray(source.open(image)) == data[row]).all() and (np.asarray(sent.open(image)) == data[row]).all()
    assert (np.asarray(source.open(train[3])) != data[3]).any()

    class Opened(torch.utils.data.Dataset):
        def __len__(self):
            return len(test)

        def __getitem__(self, row):
            return torch.from_numpy(np.array(source.open(test[row])))

    forked = torch.utils.data.DataLoader(Opened(), batch_size=4, num_workers=1, multiprocessing_context="fork")
    assert (next(iter(forked)).numpy() == data).all()


def test_images_are_the_same_where_they_are(tmp_path):
    cifar10h(tmp_path)
    ten, human = source_of("cifar10", tmp_path), source_of("cifar10h", tmp_path)
    assert ten.id_space("test") == human.id_space("test") != ten.id_space("train")
    assert ten.id_space("test") != source_of("cifar100", tmp_path).id_space("test")
    (tmp_path / "one").mkdir()
    one, other = source_of("folder", tmp_path / "one"), source_of("folder", tmp_path / "other")
    assert one.id_space("all") == source_of("imagenet-r", tmp_path / "other" / ".." / "one").id_space("all")
    assert len({one.id_space("all"), one.id_space("val"), other.id_space("all")}) == 3


def test_labels_that_torchvision_does_not_list_are_read_off_the_items():
    assert _listed([("picture", 2), ("picture", 0)]) == (None, [2, 0])


def test_imagenet_folders_by_number(tmp_path):
    """As ImageNet-V2 has them: torchvision sorts 10 before 2."""
    folders("0", "10", "2", "281")(tmp_path)
    classes = source_of("imagenet-a", tmp_path).classes("all")
    assert classes.names == ["tench", "brambling", "great white shark", "tabby cat"] and len(classes.templates) == 80
    few = Classification(tmp_path, "ImageFolder", {"all": {}}, "imagenet", "simple").classes("all").templates
    assert len(few) == 7 and "itap of a {}." in few and set(few) <= {*classes.templates}
    folders("cats")(tmp_path)
    with pytest.raises(UserError, match=r"the folder 'cats' in .* is not an ImageNet-1k class: .* --dataset folder\.$"):
        source_of("imagenet-a", tmp_path).classes("all")


def test_human_answers(tmp_path):
    cifar10h(tmp_path)
    file = tmp_path / "cifar10h-probs.npy"
    shares = np.random.default_rng(0).dirichlet(np.ones(10), 4)
    for array, error in (
        (shares, None),
        (shares[:3], r"must hold floats of shape \(4, 10\), not float64 of shape \(3, 10\)"),
        ((shares * 50).astype(int), "not int64"),
        (np.where(np.arange(4)[:, None] == 2, 50 * shares, shares), "row 2 of .* shares that sum to 1, not to 50"),
        (np.where(np.arange(4)[:, None] == 1, np.nan, shares), "row 1 of .*"),
        (np.array([{}]), r"cifar10h-probs\.npy cannot be read"),
    ):
        np.save(file, array, allow_pickle=True)
        if error is None:
            assert (source_of("cifar10h", tmp_path).classes("test").human == array).all()
            continue
        with pytest.raises(UserError, match=error + r".*: put cifar10h-probs\.npy from .* point --root to it\.$"):
            source_of("cifar10h", tmp_path).classes("test")
    file.unlink()
    with pytest.raises(UserError, match=r"the human answers .*cifar10h-probs\.npy cannot be read"):
        source_of("cifar10h", tmp_path).classes("test")
    assert source_of("cifar10", tmp_path).classes("test").human is None


def test_a_folder_laid_out_in_splits_is_no_split(tmp_path):
    folders("train/cat", "train/dog", "test/cat", "test/dog")(tmp_path)
    source = source_of("folder", tmp_path)
    with pytest.raises(UserError, match=r"is laid out in the splits train, test: choose with --splits train test, or"):
        source.images("all")
    assert source.classes("test").names == ["cat", "dog"] and len(source.images("train")) == 4
    with pytest.raises(UserError, match=r"/val \(there is no such folder\): put the images of each class"):
        source.images("val")
    # A class may be called like a split.
    folders("test", "exam")(tmp_path / "flat")
    assert source_of("folder", tmp_path / "flat").classes("all").names == ["exam", "test"]


@pytest.mark.parametrize("twins", [("hot dog", "hot_dog"), ("Crane", "crane"), ("cafe\u0301", "caf\u00e9")])
def test_two_classes_of_one_name_are_refused(tmp_path, twins):
    folders("ant", *twins)(tmp_path)
    with pytest.raises(UserError, match=f"the classes '{twins[0]}' and '{twins[1]}' of .* have one name in prompts"):
        source_of("folder", tmp_path).classes("all")


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(
        UserError, match=r"^CIFAR10 cannot be read from .* \(Dataset not found or corrupted\): download"
    ):
        source_of("cifar10", tmp_path).images("test")
    with pytest.raises(UserError, match=r"CIFAR10 in .* has no split 'val'; it has train, test\.$"):
        source_of("cifar10", tmp_path).images("val")
    flowers102(tmp_path)
    (tmp_path / "flowers-102" / "setid.mat").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"^Flowers102 cannot be read from .* \(.+\): unpack 102flowers\.tgz"):
        source_of("flowers102", tmp_path).images("test")
    with pytest.raises(UserError, match=r"\(Couldn't find any class folder in .*\): put the images"):
        (tmp_path / "bare").mkdir()
        source_of("folder", tmp_path / "bare").images("all")
    # A class may have no image, and a file that is none is listed, for the cache to name it.
    folders("cat")(tmp_path / "images")
    (tmp_path / "images" / "dog").mkdir()
    (tmp_path / "images" / "owl").mkdir()
    (tmp_path / "images" / "dog" / "notes.txt").write_text("no picture")
    (tmp_path / "images" / "dog" / ".DS_Store").write_text("hidden")
    source = source_of("folder", tmp_path / "images")
    assert source.classes("all").names == ["cat", "dog", "owl"]
    assert [image.path.name for image in source.images("all") if image.path.parent.name == "dog"] == ["notes.txt"]
    with pytest.raises(UserError, match=r"notes\.txt \(it is not a folder\)"):
        source_of("folder", tmp_path / "images" / "dog" / "notes.txt").images("all")


def test_what_is_hidden_is_no_class_and_no_image(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    hidden = ".git", ".ipynb_checkpoints", "__MACOSX", "@eaDir", "cat/.thumbnails", "dog/a/.ipynb_checkpoints"
    folders("cat", "dog/a", "dog/b", *hidden)(tmp_path / "images")
    (tmp_path / "images" / "owl").mkdir()
    for name in ("Thumbs.db", "a.jpg:Zone.Identifier", "~$a.jpg"):
        (tmp_path / "images" / "cat" / name).write_text("of Windows")
    source = source_of("folder", "images")
    assert source.classes("all").names == ["cat", "dog", "owl"]
    places = [image.path.relative_to("images").as_posix() for image in source.images("all")]
    assert places == ["cat/a.jpg", "cat/b.jpg", "dog/a/a.jpg", "dog/a/b.jpg", "dog/b/a.jpg", "dog/b/b.jpg"]
    cache_embeddings.main(["--dataset", "folder", "--root", "images", "--backbone", "shapes-tiny", "--quiet"])
    assert "6 images, 3 prompts for 3 classes, D = 64, no image of 'owl'\n" in capsys.readouterr().out
    # A class called like a split may hold hidden folders.
    folders("test/.git", "exam")(tmp_path / "flat")
    assert source_of("folder", "flat").classes("all").names == ["exam", "test"]
    folders("2750/River", "2750/.git")(tmp_path / "eurosat")
    assert len(source_of("eurosat", tmp_path).images("all")) == 2
    with pytest.raises(UserError, match="Couldn't find any class folder"):
        source_of("folder", tmp_path / "images" / "cat").images("all")


def test_names_must_be_as_many_as_classes(tmp_path):
    folders("cat", "dog", "owl")(tmp_path)
    source = Classification(tmp_path, "ImageFolder", {"all": {}}, classes=["a cat", "a dog"])
    with pytest.raises(UserError, match=r"has 3 classes, but data\.options\.classes names 2: name every class once"):
        source.classes("all")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dataset": "Cifar"}, "torchvision.datasets has no class 'Cifar'"),
        ({"splits": ["test"]}, "splits must hold the keyword arguments of each split"),
        ({"splits": {"test": {"trian": False}}}, "splits: test has unknown key 'trian'; CIFAR10 takes train, folder"),
        ({"splits": {"test": {"download": True}}}, "splits: test has unknown key 'download'"),
        ({"classes": [707, "cat"]}, "classes must list their names in quotes, or be own, folders or imagenet"),
        ({"classes": "mine"}, "classes must list their names in quotes, or be own"),
        ({"templates": ["a photo."]}, "templates must be openai or simple, or list prompts with one {} each"),
        ({"templates": "a photo of a {}."}, "templates must be openai or simple, or list prompts"),
        ({"templates": []}, "templates must be openai or simple, or list prompts"),
    ],
)
def test_options_that_cannot_be_are_named(options, error):
    config = load_config("cifar10")
    config.data.options |= options
    with pytest.raises(UserError) as raised:
        make_source(config)
    assert error in str(raised.value) and str(raised.value).startswith("configs/datasets/cifar10.yaml: data.options")


def test_one_flag_caches_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders("red_square", "blue_ring")(tmp_path / "images")
    shapes = ["--backbone", "shapes-tiny", "--device", "cpu", "--quiet"]
    cache_embeddings.main(["--dataset", "folder", "--root", "images", *shapes])
    pairs = Pairs("folder", "shapes-tiny", "all")
    assert pairs.image.shape == (4, 64) and pairs.text.shape == (2, 64)
    assert np.load(pairs.folder / "label.npy").tolist() == [0, 0, 1, 1]
    assert pairs.items["text"] == ["a photo of a blue ring.", "a photo of a red square."]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["Train/cat", "Test/cat"], "Test, Train"),
        (["train/cat", "valid/cat"], "train, valid"),
        (["seg_train/seg_train/sea"], "seg_train"),
    ],
)
def test_folders_that_hold_the_classes_are_none(tmp_path, paths, names):
    folders(*paths)(tmp_path)
    # Where names are compared without case, as on Windows, Train is the split that this source calls train.
    sentence = rf"has folders of folders \({names}\), not of pictures: point --root to the|is laid out in the splits"
    with pytest.raises(UserError, match=sentence):
        source_of("folder", tmp_path).images("all")


def test_lists_beside_the_classes_hide_no_layout(tmp_path):
    """As in Tiny ImageNet, whose val/ has a file of labels beside its folder."""
    folders("train/cat", "val/cat")(tmp_path)
    (tmp_path / "val/val_annotations.txt").write_text("0.png\tcat\n")
    with pytest.raises(UserError, match="is laid out in the splits train, val: choose with --splits train val"):
        source_of("folder", tmp_path).images("all")


@pytest.mark.parametrize(
    "paths",
    [
        ["train_station/platform", "kitchen/a"],
        ["bullet train/images", "cat/images"],
        ["cat/", "test tube/a", "test tube/"],
        ["bottle/good", "bottle/broken"],
    ],
)
def test_a_class_may_be_called_like_a_split(tmp_path, paths):
    folders(*paths)(tmp_path)
    assert len(source_of("folder", tmp_path).images("all")) == 2 * len(paths)


def test_pictures_of_a_class_may_lie_deeper(tmp_path):
    folders("cat/images", "dog/images", "test/")(tmp_path)
    assert source_of("folder", tmp_path).classes("all").names == ["cat", "dog", "test"]
