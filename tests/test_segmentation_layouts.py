"""Each data set's folders and encoding give the right class indices; silently wrong data is refused."""

import dataclasses
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import segmentation_sources as make
from PIL import Image
from segmentation import layouts, masks, pairs

VOID = make.VOID


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here asks what a power cut would leave."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def same(found: make.Truth, truth: make.Truth) -> None:
    assert found.keys() == truth.keys()
    for key, mask in truth.items():
        np.testing.assert_array_equal(found[key], mask, key)


def shard(source: Path, layout: str, split: str, *options: object) -> make.Truth:
    """The masks in the tars of a split, by the tool."""
    out = source.parent / f"{source.name}-{layout}"
    assert make.run(source, out, "--layout", layout, "--split", split, *options) == 0
    return make.masks(out, split)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]):
    """Runs the tool, which must refuse its input with one sentence, and returns that."""

    def run(source: Path, layout: str, split: str, *options: object) -> str:
        out = source.parent / "refused"
        assert make.run(source, out, "--layout", layout, "--split", split, *options) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert not list(out.glob("*.tar"))
        shutil.rmtree(out, ignore_errors=True)
        return said

    return run


@pytest.mark.parametrize("name", make.SETS)
def test_every_data_set_gives_its_classes(name: str, tmp_path: Path) -> None:
    layout, build = make.SETS[name]
    for split, truth in build(tmp_path / "data").items():
        same(shard(tmp_path / "data", layout, split), truth)


@pytest.fixture(scope="module")
def cities(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, make.Truth]]]:
    root = tmp_path_factory.mktemp("isprs") / "data"
    return root, make.isprs(root)


@pytest.mark.parametrize("name", ["potsdam", "vaihingen", "isprs"])
def test_tiles_are_cut_into_patches_that_end_at_the_edge(name: str, cities, monkeypatch: pytest.MonkeyPatch) -> None:
    root, found = cities
    monkeypatch.setitem(layouts.LAYOUTS, name, dataclasses.replace(layouts.LAYOUTS[name], patch=(16, 12)))
    for split, truth in found[name].items():
        same(shard(root, name, split), truth)


def test_published_patches_are_as_many_as_others_count() -> None:
    def count(side: int, stride: int) -> int:
        return len(pairs._starts(6000, side, stride)) ** 2

    assert count(*layouts.LAYOUTS["potsdam"].patch) * 24 == layouts.LAYOUTS["potsdam"].splits["train"][1]
    assert count(*layouts.LAYOUTS["isprs"].patch) * 38 == layouts.LAYOUTS["isprs"].splits["train"][1]
    assert pairs._starts(1500, 800, 600) == [0, 600, 700]
    assert pairs._starts(512, 512, 512) == pairs._starts(300, 512, 512) == [0]


def test_isprs_gives_both_cities_the_channels_that_both_have(cities, tmp_path: Path) -> None:
    root, _ = cities
    for split, tile, first in (
        ("train", "Potsdam/2_Ortho_RGB/top_potsdam_2_12_RGB.tif", 0),
        ("val", "Vaihingen/top/top_mosaic_09cm_area1.tif", 1),
    ):
        assert make.run(root, tmp_path, "--layout", "isprs", "--split", split) == 0  # each tile is smaller than a patch
        rgb = np.asarray(Image.open(root / tile)).astype(int)
        red, green = rgb[..., first], rgb[..., first + 1]
        key = {"train": "potsdam_2_12_0_0", "val": "area1_0_0"}[split]
        found = np.asarray(Image.open(io.BytesIO(make.stored(tmp_path, split)[key]["jpg"]))).astype(int)
        assert np.abs(found - np.stack([red, green, (red + green) // 2], axis=-1)).mean() < 5


def test_class_lists_are_complete() -> None:
    counts = {"ade20k": 150, "voc": 21, "pascal_context": 59, "pascal_context60": 60, "cityscapes": 19, "bdd10k": 19}
    counts |= {"camvid": 11, "camvid32": 32, "kitti": 19, "idd": 26, "idd19": 19, "sunrgbd": 37, "suim": 8, "isprs": 6}
    for name, layout in layouts.LAYOUTS.items():
        assert len(set(layout.classes)) == len(layout.classes) == counts.get(name, len(layout.classes))
        for encoding in layout.masks.values():
            assert set(encoding.table.values()) - {VOID} == set(range(len(layout.classes)))
    voc, context = layouts.LAYOUTS["voc"].classes, layouts.LAYOUTS["pascal_context60"].classes
    assert list(context[1:]) == sorted(context[1:])
    assert set(voc) - set(context) == {"diningtable"}  # there it is "table"


def test_camvids_colours_are_merged_as_by_segnets_authors() -> None:
    merged = {
        "sky": "Sky",
        "building": "Archway Bridge Building Tunnel Wall",
        "pole": "Column_Pole TrafficCone",
        "road": "LaneMkgsDriv LaneMkgsNonDriv Road",
        "pavement": "ParkingBlock RoadShoulder Sidewalk",
        "tree": "Tree VegetationMisc",
        "sign": "Misc_Text SignSymbol TrafficLight",
        "fence": "Fence",
        "car": "Car OtherMoving SUVPickupTruck Train Truck_Bus",
        "pedestrian": "Animal CartLuggagePram Child Pedestrian",
        "bicyclist": "Bicyclist MotorcycleScooter",
    }
    eleven, all32 = (layouts.LAYOUTS[name] for name in ("camvid_raw", "camvid32"))
    ((colours,), (names,)) = (layout.masks.values() for layout in (eleven, all32))
    found: dict[int, set[str]] = {}
    for colour, label in colours.table.items():
        found.setdefault(label, set()).add(all32.classes[names.table[colour]])
    wanted = {eleven.classes.index(name): set(parts.split()) for name, parts in merged.items()}
    assert found == wanted | {VOID: {"Void"}}


# --- lists -----------------------------------------------------------------------------------------------------------


def test_a_list_of_names_takes_the_layouts_place(tmp_path: Path, refused) -> None:
    truth, names = make.kitti(tmp_path / "data")["all"], tmp_path / "mine.txt"
    names.write_text("000003_10\ntraining/image_2/000001_10.png training/semantic/000001_10.png\n\n")
    found = shard(tmp_path / "data", "kitti", "val", "--list", names)
    same(found, {key: truth[key] for key in ("000001_10", "000003_10")})
    make.idd(tmp_path / "idd")
    names.write_text("1/005506\n")
    assert shard(tmp_path / "idd", "idd", "train", "--list", names).keys() == {"1_005506"}
    names.write_text("000007_10\n")
    said = refused(tmp_path / "data", "kitti", "val", "--list", names)
    assert "holds no image 000007_10, which is listed for split val" in said
    assert "cannot read the list" in refused(tmp_path / "data", "kitti", "val", "--list", tmp_path / "none.txt")
    names.write_text("\n")
    assert f"{names} lists no image" in refused(tmp_path / "data", "kitti", "val", "--list", names)


def test_a_split_without_an_image_is_named(tmp_path: Path, refused) -> None:
    make.kitti(tmp_path / "data")
    for path in (tmp_path / "data").rglob("*000003_10.png"):
        path.unlink()
    assert "holds no image of split val" in refused(tmp_path / "data", "kitti", "val")


def test_a_count_other_than_the_published_one_is_noted(tmp_path: Path, capsys) -> None:
    make.kitti(tmp_path / "data")
    (tmp_path / "mine.txt").write_text("000001_10\n")
    options = (tmp_path / "data", tmp_path / "out", "--layout", "kitti", "--split", "val", "--dry-run")
    assert make.run(*options) == 0
    assert f"note: kitti val has 50 samples as published, {tmp_path}/data 1\n" in capsys.readouterr().out
    assert make.run(*options, "--list", tmp_path / "mine.txt") == 0
    assert "note" not in capsys.readouterr().out


def test_vocs_augmented_list_may_come_with_the_masks_as_png(tmp_path: Path, refused) -> None:
    found = make.voc(tmp_path / "data")
    home = tmp_path / "data/VOCdevkit/VOC2012"
    make.put(home, {f"SegmentationClassAug/{key}.png": make.saved(mask) for key, mask in found["train_aug"].items()})
    said = refused(home, "voc", "train_aug")
    assert "lacks the list of split train_aug" in said
    assert "trainaug.txt" in said
    assert "--list" in said
    lines = [f"/JPEGImages/{key}.jpg /SegmentationClassAug/{key}.png\n" for key in found["train_aug"]]
    make.put(home, {"ImageSets/Segmentation/train_aug.txt": "".join(lines)})
    same(shard(home, "voc", "train_aug"), found["train_aug"])


# --- refused: by name, in a sentence ---------------------------------------------------------------------------------


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    make.folders(tmp_path / "mine")
    return tmp_path / "mine"


MASK = np.tile(np.array([0, 1, 2, VOID], np.uint8), (20, 7))  # of the size of the fixture's images

BAD_MASKS = {
    "a palette": (make.palette(MASK), "a.png is a palette PNG instead of class indices"),
    "colours": (
        make.saved(np.dstack([MASK] * 3)),
        "a.png has mode RGB, but class indices need a single channel of integers",
    ),
    "gray with alpha": (make.saved(np.dstack([MASK] * 2)), "a.png has mode LA, but class indices need"),
    "another size": (make.saved(MASK[:, :-1]), "a.png has 27 x 20 pixels, its image images/train/a.jpg 28 x 20"),
    "turned by a quarter": (make.saved(MASK.T.copy()), "a.png has 20 x 28 pixels"),
    "a number beyond the classes": (
        make.saved(np.where(MASK == 2, 5, MASK).astype(np.uint8)),
        "a.png holds the number 5, which stands for no class",
    ),
    "a number beyond 8 bits": (make.saved(MASK.astype(np.uint16) * 300), "a.png holds the number 300"),
    "a JPEG": (make.saved(MASK, "JPEG"), "a.png is no PNG, BMP or TIFF"),
    "cut short": (make.saved(MASK)[:-30], "a.png cannot be read"),
    "nothing": (b"", "a.png is no PNG"),
    "a bomb": (make.gray_png(MASK[:1, :8] & 1, 1, claimed=(10**5, 10**5)), "a.png has 100000 x 100000 pixels by its"),
}


@pytest.mark.parametrize("what", BAD_MASKS)
def test_a_mask_that_is_none_is_named(what: str, mine: Path, refused) -> None:
    content, message = BAD_MASKS[what]
    (mine / "masks/train/a.png").write_bytes(content)
    assert message in refused(mine, "folders", "train")


@pytest.mark.parametrize("bits", [1, 2, 4, 16])
def test_gray_pngs_of_any_depth_keep_their_numbers(bits: int, mine: Path) -> None:
    """Decoders stretch the 0..3 of 2 bits to 0..255; class 1 must stay class 1."""
    want = np.minimum(MASK, 2 if bits > 1 else 1)
    content = make.saved(want.astype(np.uint16)) if bits == 16 else make.gray_png(want, bits)
    assert content[24] == bits
    (mine / "masks/train/a.png").write_bytes(content)
    np.testing.assert_array_equal(shard(mine, "folders", "train")["a"], want)


def test_a_palette_of_any_depth_counts_by_its_indices(tmp_path: Path) -> None:
    few = np.minimum(make.voc(tmp_path / "data")["train"]["t0"], 3)
    file = tmp_path / "data/VOCdevkit/VOC2012/SegmentationClass/t0.png"
    file.write_bytes(make.palette(few, bits=2))
    assert file.read_bytes()[24:26] == b"\x02\x03"
    np.testing.assert_array_equal(shard(tmp_path / "data", "voc", "train")["t0"], few)


def test_a_colour_that_is_no_class_is_named(tmp_path: Path, refused) -> None:
    make.camvid_raw(tmp_path / "data")
    file = tmp_path / "data/LabeledApproved_full/0016E5_07959_L.png"
    rgb = np.asarray(Image.open(file)).copy()
    rgb[3, 4] = 129, 0, 0  # one off from Building
    file.write_bytes(make.saved(rgb))
    said = refused(tmp_path / "data", "camvid_raw", "val")
    assert "0016E5_07959_L.png holds the colour (129, 0, 0), which stands for no class" in said
    file.write_bytes(make.saved(MASK))
    assert "has no colours (L) where colours stand for the" in refused(tmp_path / "data", "camvid_raw", "val")


@pytest.mark.parametrize("other", ["color", "instanceIds"])
def test_the_files_beside_are_no_masks(other: str, tmp_path: Path, refused) -> None:
    make.cityscapes(tmp_path / "data")
    for file in (tmp_path / "data").glob("gtFine/train/*/*_labelIds.png"):
        assert file.with_name(file.name.replace("labelIds", other)).exists()
        file.unlink()
    said = refused(tmp_path / "data", "cityscapes", "train")
    assert (
        "holds no mask of split train: this layout keeps them as gtFine/train/*/{key}_gtFine_labelIds.png or " in said
    )


def test_label_ids_in_place_of_train_ids_are_refused(tmp_path: Path, refused) -> None:
    """The trap that made a linear probe fall below k-NN: 26 is car among labelIds and nothing among trainIds."""
    ((key, mask),) = make.bdd10k(tmp_path / "data")["train"].items()
    file = tmp_path / f"data/bdd100k/labels/sem_seg/masks/train/{key}.png"
    file.write_bytes(make.saved(make.renumbered(mask, make.LABEL_IDS, 0)))
    said = refused(tmp_path / "data", "bdd10k", "train")
    assert f"{key}.png holds the number " in said
    assert "which stands for no class" in said


def test_images_and_masks_without_each_other_are_named(mine: Path, refused) -> None:
    (mine / "masks/train/a.png").rename(mine / "masks/train/c.png")
    assert "masks/train/c.png is a mask without an image\n" in refused(mine, "folders", "train")
    make.put(mine, {"images/train/c.jpg": make.photo(1, MASK), "images/train/d.jpg": make.photo(1, MASK)})
    assert "images/train/a.jpg is an image without a mask (one of 2)\n" in refused(mine, "folders", "train")
    (mine / "images/train").rename(mine / "images/val")
    assert "--split train: this layout has val\n" in refused(mine, "folders", "train")
    (mine / "images/train").mkdir()
    said = refused(mine, "folders", "train")
    assert "holds no image of split train: this layout keeps them as images/train/{path}.*\n" in said
    shutil.rmtree(mine / "images")
    assert "holds no folder of a split: images lie in images/SPLIT" in refused(mine, "folders", "train")


def test_names_that_a_data_set_does_not_have_are_named(tmp_path: Path, refused) -> None:
    for layout, build, name in (
        ("kitti", make.kitti, "data_semantics/training/image_2/copy.png"),
        ("sunrgbd", make.sunrgbd, "sunrgbd_train_test_labels/preview.png"),
        ("camvid_raw", make.camvid_raw, "701_StillsRaw_full/overview.png"),
    ):
        build(tmp_path / layout)
        make.put(tmp_path / layout, {name: make.saved(MASK)})
        assert f"{name} is no file of this data set: move it away\n" in refused(tmp_path / layout, layout, "train")


def test_odd_names_are_survived(mine: Path) -> None:
    """Bytes that are no UTF-8, dots, blanks; folders named like images."""
    (mine / "images/train/folder.jpg").mkdir()
    (mine / "masks/train/folder.png").mkdir()
    for name in (os.fsdecode(b"\xff x"), "v1.2"):
        make.put(mine, {f"images/train/{name}.jpg": make.photo(1, MASK), f"masks/train/{name}.png": make.saved(MASK)})
    mine = mine.rename(mine.with_name("my data-1.2"))
    assert len(shard(mine, "folders", "train")) == 4
    assert {path.name for path in mine.parent.glob("*-folders/*.tar")} == {"my_data_1-train-0000.tar"}


def test_two_images_of_one_name_are_named(mine: Path, refused) -> None:
    make.put(mine, {"images/train/a.png": make.photo(1, MASK, "PNG")})
    said = refused(mine, "folders", "train")
    assert "images/train/a.png and" in said
    assert "images/train/a.jpg have one name" in said
    (mine / "images/train/a.png").unlink()
    make.put(mine, {"images/train/deep_b.jpg": make.photo(1, MASK), "masks/train/deep_b.png": make.saved(MASK)})
    said = refused(mine, "folders", "train")
    assert "images/train/deep/b.PNG and images/train/deep_b.jpg have one key, deep_b: rename" in said


def test_idd_says_what_makes_its_masks(tmp_path: Path, refused) -> None:
    make.idd(tmp_path / "data")
    said = refused(tmp_path / "data", "idd19", "train")
    assert "keeps them as gtFine/train/{path}_gtFine_labelcsTrainIds.png (make them from the polygons with " in said
    assert "--id-type csTrainId)" in said
    next((tmp_path / "data").glob("IDD_Segmentation/gtFine/train/1/*3Ids.png")).unlink()
    assert "1/005506_leftImg8bit.png is an image without a mask (make them " in refused(
        tmp_path / "data", "idd", "train"
    )


@pytest.mark.parametrize(
    ("layout", "split", "message"),
    [
        ("cityscapes", "test", "--split test: this layout has train, val\n"),  # its labels are dummies
        ("ade20k", "train", "holds no mask of split train: this layout keeps them as annotations/training/{key}.png\n"),
        ("idd19", "train", "holds no mask of split train: "),
        ("folders", "train", "classes.txt is missing: it names the classes, one a line"),
    ],
)
def test_what_is_not_there_is_a_sentence(layout: str, split: str, message: str, tmp_path: Path, refused) -> None:
    make.cityscapes(tmp_path / "data")
    assert message in refused(tmp_path / "data", layout, split)


def test_a_source_that_is_an_archive_or_holds_the_shards_is_refused(mine: Path, refused, capsys) -> None:
    assert "no folder: SOURCE is where the data set's archives are unpacked" in refused(
        mine / "classes.txt", "folders", "train"
    )
    assert make.run(mine, mine / "out", "--layout", "folders") == 2
    assert "lies inside" in capsys.readouterr().err


def test_two_years_of_voc_are_told_apart(tmp_path: Path, refused) -> None:
    found = make.voc(tmp_path / "data")
    devkit = tmp_path / "data/VOCdevkit"
    make.put(devkit / "VOC2007", {"JPEGImages/000001.jpg": b"", "SegmentationClass/000001.png": b""})
    said = refused(tmp_path / "data", "voc", "train")
    assert f"holds SegmentationClass twice, in {devkit}/VOC2007/SegmentationClass and {devkit}/VOC2012/S" in said
    same(shard(devkit / "VOC2012", "voc", "train"), found["train"])


def test_too_many_classes_are_refused(mine: Path, refused) -> None:
    (mine / "classes.txt").write_text("\n".join(map(str, range(256))))
    assert "names 256 classes: a mask of 8 bits holds 255 and void" in refused(mine, "folders", "train")


# --- turned images ---------------------------------------------------------------------------------------------------


def turned(orientation: int, content: bytes) -> bytes:
    image = Image.open(io.BytesIO(content))
    exif = image.getexif()
    exif[0x0112] = orientation
    return make.saved(image, "JPEG", exif=exif)


def upright(orientation: int, mask: np.ndarray) -> np.ndarray:
    """By the meaning of the eight values: where the first row and the first column as stored lie."""
    mask = mask.T if orientation >= 5 else mask
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return mask[::rows, ::columns]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_turned_with_its_image(orientation: int, tmp_path: Path) -> None:
    key, mask = next(iter(make.ade20k(tmp_path / "data")["train"].items()))
    file = tmp_path / f"data/ADEChallengeData2016/images/training/{key}.jpg"
    file.write_bytes(turned(orientation, make.photo(1, mask)))
    found = shard(tmp_path / "data", "ade20k", "train")[key]
    np.testing.assert_array_equal(found, upright(orientation, mask))


def test_a_mask_drawn_on_the_turned_image_stays(mine: Path) -> None:
    mask = MASK.T.copy()
    make.put(mine, {"images/train/a.jpg": turned(6, make.photo(1, MASK)), "masks/train/a.png": make.saved(mask)})
    np.testing.assert_array_equal(shard(mine, "folders", "train")["a"], mask)


def test_a_half_turn_of_unknown_masks_is_refused(mine: Path, refused) -> None:
    """Annotation tools turn or do not turn; the size tells for quarter turns only."""
    make.put(mine, {"images/train/a.jpg": turned(3, make.photo(1, MASK)), "masks/train/a.png": make.saved(MASK)})
    assert "a.png may have been drawn before or after its image is turned (EXIF orientation 3)" in refused(
        mine, "folders", "train"
    )


def test_masks_are_written_small_and_alike() -> None:
    mask = make.labels(3, 19, 200, 300)
    content = masks.png(mask)
    assert content == masks.png(mask.copy())
    assert len(content) < len(make.saved(mask, compress_level=1))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), mask)
