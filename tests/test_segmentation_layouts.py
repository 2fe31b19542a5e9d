"""Each data set's own folders and encoding become the right class indices; what would be silently wrong is refused."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import segmentation_sources as make
from PIL import Image
from segmentation import layouts, masks, pairs, samples
from sharding import SourceError, images

VOID = make.VOID


def layout_of(name: str, root: Path) -> pairs.Layout:
    return layouts.folders(root) if name == "folders" else layouts.LAYOUTS[name]


def read(layout: pairs.Layout, root: Path, split: str, names: Path | None = None) -> dict[str, np.ndarray]:
    """{key: the mask as it will be stored}."""
    found = {}
    for pair in pairs.pairs(layout, root, split, names):
        sample = samples.make(layout, root, split, pair, images.Rules())
        image = Image.open(io.BytesIO(sample.mask))
        assert (image.format, image.mode) == ("PNG", "L")
        assert image.size == Image.open(io.BytesIO(sample.image.jpeg)).size == (sample.image.width, sample.image.height)
        mask = np.asarray(image)
        assert sample.pixels.tolist() == np.bincount(mask.ravel(), minlength=256).tolist()
        found[pair.key] = mask
    return found


def same(found: dict[str, np.ndarray], truth: make.Truth) -> None:
    assert found.keys() == truth.keys()
    for key, mask in truth.items():
        np.testing.assert_array_equal(found[key], mask, key)


@pytest.mark.parametrize("name", make.SETS)
def test_every_data_set_gives_its_classes(name: str, tmp_path: Path) -> None:
    layout_name, build = make.SETS[name]
    found = build(tmp_path)
    layout = layout_of(layout_name, tmp_path)
    assert found.keys() <= layout.splits.keys()
    for split, truth in found.items():
        same(read(layout, tmp_path, split), truth)
        assert max(mask[mask < VOID].max() for mask in truth.values()) < len(layout.classes)


@pytest.fixture(scope="module")
def cities(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, make.Truth]]]:
    root = tmp_path_factory.mktemp("isprs")
    return root, make.isprs(root)


@pytest.mark.parametrize("name", ["potsdam", "vaihingen", "isprs"])
def test_tiles_are_cut_into_patches_that_end_at_the_edge(name: str, cities) -> None:
    root, found = cities
    for split, truth in found[name].items():
        same(read(dataclasses.replace(layouts.LAYOUTS[name], patch=(16, 12)), root, split), truth)


def test_published_patches_are_as_many_as_others_count() -> None:
    def count(side: int, stride: int) -> int:
        return len(pairs._starts(6000, side, stride)) ** 2

    assert count(*layouts.LAYOUTS["potsdam"].patch) * 24 == layouts.LAYOUTS["potsdam"].splits["train"][1]
    assert count(*layouts.LAYOUTS["isprs"].patch) * 38 == layouts.LAYOUTS["isprs"].splits["train"][1]
    assert pairs._starts(1500, 800, 600) == [0, 600, 700]
    assert pairs._starts(512, 512, 512) == pairs._starts(300, 512, 512) == [0]


def test_isprs_gives_both_cities_the_channels_that_both_have(cities) -> None:
    root, _ = cities
    layout = dataclasses.replace(layouts.LAYOUTS["isprs"], patch=(16, 12))
    for split, first in (("train", 0), ("val", 1)):
        pair = pairs.pairs(layout, root, split)[4]
        y0, x0, y1, x1 = pair.box
        tile = np.asarray(Image.open(root / pair.image))[y0:y1, x0:x1].astype(int)
        red, green = tile[..., first], tile[..., first + 1]
        sample = samples.make(layout, root, split, pair, images.Rules())
        stored = np.asarray(Image.open(io.BytesIO(sample.image.jpeg))).astype(int)
        assert np.abs(stored - np.stack([red, green, (red + green) // 2], axis=-1)).mean() < 5


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


def test_a_list_of_names_takes_the_layouts_place(tmp_path: Path) -> None:
    truth = make.kitti(tmp_path)["all"]
    (tmp_path / "mine.txt").write_text("000003_10\ntraining/image_2/000001_10.png training/semantic/000001_10.png\n\n")
    found = read(layouts.LAYOUTS["kitti"], tmp_path, "val", tmp_path / "mine.txt")
    same(found, {key: truth[key] for key in ("000001_10", "000003_10")})
    (tmp_path / "mine.txt").write_text("000007_10\n")
    with pytest.raises(SourceError, match="no image 000007_10, which is listed for split val"):
        pairs.pairs(layouts.LAYOUTS["kitti"], tmp_path, "val", tmp_path / "mine.txt")
    with pytest.raises(SourceError, match=r"cannot read the list .*missing.txt"):
        pairs.pairs(layouts.LAYOUTS["kitti"], tmp_path, "val", tmp_path / "missing.txt")


def test_vocs_augmented_list_may_come_with_the_masks_as_png(tmp_path: Path) -> None:
    found = make.voc(tmp_path)
    home = tmp_path / "VOCdevkit/VOC2012"
    (tmp_path / "benchmark_RELEASE").rename(tmp_path / "elsewhere")
    make.put(home, {f"SegmentationClassAug/{key}.png": make.saved(mask) for key, mask in found["train_aug"].items()})
    with pytest.raises(SourceError, match=r"lacks the list of split train_aug, .*trainaug\.txt.*--list"):
        pairs.pairs(layouts.LAYOUTS["voc"], home, "train_aug")
    lines = [f"/JPEGImages/{key}.jpg /SegmentationClassAug/{key}.png\n" for key in found["train_aug"]]
    make.put(home, {"ImageSets/Segmentation/train_aug.txt": "".join(lines)})
    same(read(layouts.LAYOUTS["voc"], home, "train_aug"), found["train_aug"])


# --- refused: by name, in a sentence ---------------------------------------------------------------------------------


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    make.folders(tmp_path)
    return tmp_path


MASK = np.tile(np.array([0, 1, 2, VOID], np.uint8), (20, 7))  # of the size of the fixture's images

BAD_MASKS = {
    "a palette": (make.palette(MASK), "a.png is a palette PNG where class indices are due"),
    "colours": (make.saved(np.dstack([MASK] * 3)), r"a.png has colours \(RGB\) where class indices are due"),
    "gray with alpha": (make.saved(np.dstack([MASK] * 2)), r"a.png has colours \(LA\)"),
    "another size": (make.saved(MASK[:, :-1]), "a.png has 27 x 20 pixels, its image images/train/a.jpg 28 x 20"),
    "turned by a quarter": (make.saved(MASK.T.copy()), "a.png has 20 x 28 pixels"),
    "a number beyond the classes": (
        make.saved(np.where(MASK == 2, 5, MASK).astype(np.uint8)),
        "a.png holds the number 5, which stands for no",
    ),
    "a number beyond 8 bits": (make.saved(MASK.astype(np.uint16) * 300), "a.png holds the number 300"),
    "a JPEG": (make.saved(MASK, "JPEG"), "a.png is no PNG, BMP or TIFF"),
    "cut short": (make.saved(MASK)[:-30], "a.png cannot be read"),
    "nothing": (b"", "a.png is no PNG"),
}


@pytest.mark.parametrize("what", BAD_MASKS)
def test_a_mask_that_is_none_is_named(what: str, mine: Path) -> None:
    content, message = BAD_MASKS[what]
    (mine / "masks/train/a.png").write_bytes(content)
    with pytest.raises(SourceError, match=message) as refusal:
        read(layouts.folders(mine), mine, "train")
    assert str(refusal.value).count("\n") == 0


def test_gray_pngs_of_fewer_bits_keep_their_numbers(mine: Path) -> None:
    """Decoders stretch 0..3 of 2 bits to 0..255; class 1 must stay class 1."""
    few = np.minimum(MASK, 2)
    for bits in (2, 4, 1):
        want = few if bits > 1 else np.minimum(few, 1)
        packed = make.gray_png(want, bits)
        assert packed[24] == bits
        (mine / "masks/train/a.png").write_bytes(packed)
        np.testing.assert_array_equal(read(layouts.folders(mine), mine, "train")["a"], want)
    (mine / "masks/train/a.png").write_bytes(make.saved(few.astype(np.uint16)))
    np.testing.assert_array_equal(read(layouts.folders(mine), mine, "train")["a"], few)


def test_a_palette_of_any_depth_counts_by_its_indices(tmp_path: Path) -> None:
    truth = make.voc(tmp_path)["train"]["t0"]
    few = np.minimum(truth, 3)
    file = tmp_path / "VOCdevkit/VOC2012/SegmentationClass/t0.png"
    file.write_bytes(make.palette(few, bits=2))
    assert file.read_bytes()[24:26] == b"\x02\x03"
    np.testing.assert_array_equal(read(layouts.LAYOUTS["voc"], tmp_path, "train")["t0"], few)


def test_a_colour_that_is_no_class_is_named(tmp_path: Path) -> None:
    make.camvid_raw(tmp_path)
    file = tmp_path / "LabeledApproved_full/0016E5_07959_L.png"
    rgb = np.asarray(Image.open(file)).copy()
    rgb[3, 4] = 129, 0, 0  # one off from Building
    file.write_bytes(make.saved(rgb))
    with pytest.raises(
        SourceError, match=r"0016E5_07959_L.png holds the colour \(129, 0, 0\), which stands for no class"
    ):
        read(layouts.LAYOUTS["camvid_raw"], tmp_path, "val")
    file.write_bytes(make.saved(MASK))
    with pytest.raises(SourceError, match=r"has no colours \(L\) where colours stand for the classes"):
        read(layouts.LAYOUTS["camvid_raw"], tmp_path, "val")


@pytest.mark.parametrize(("name", "other"), [("cityscapes", "color"), ("cityscapes", "instanceIds")])
def test_the_files_beside_are_no_masks(name: str, other: str, tmp_path: Path) -> None:
    make.cityscapes(tmp_path)
    for file in tmp_path.glob("gtFine/train/*/*_labelIds.png"):
        file.unlink()
        assert file.with_name(file.name.replace("labelIds", other)).exists()
    with pytest.raises(SourceError, match=r"aachen_000000_000019_leftImg8bit.png is an image without a mask$"):
        pairs.pairs(layouts.LAYOUTS[name], tmp_path, "train")


def test_label_ids_in_place_of_train_ids_are_refused(tmp_path: Path) -> None:
    """The trap that made a linear probe fall below k-NN: 26 is car among labelIds and nothing among trainIds."""
    truth = make.bdd10k(tmp_path)["train"]
    (key,) = truth
    file = tmp_path / f"bdd100k/labels/sem_seg/masks/train/{key}.png"
    file.write_bytes(make.saved(make.renumbered(truth[key], make.LABEL_IDS, 0)))
    with pytest.raises(SourceError, match=rf"{key}.png holds the number \d+, which stands for no class"):
        read(layouts.LAYOUTS["bdd10k"], tmp_path, "train")


def test_images_and_masks_without_each_other_are_named(mine: Path) -> None:
    (mine / "masks/train/a.png").rename(mine / "masks/train/c.png")
    with pytest.raises(SourceError, match=r"masks/train/c.png is a mask without an image$"):
        pairs.pairs(layouts.folders(mine), mine, "train")
    (mine / "masks/train/c.png").unlink()
    (mine / "masks/train/deep/b.png").unlink()
    with pytest.raises(SourceError, match=r"images/train/a.jpg is an image without a mask \(one of 2\)$"):
        pairs.pairs(layouts.folders(mine), mine, "train")


def test_idd_says_what_makes_its_masks(tmp_path: Path) -> None:
    make.idd(tmp_path)
    with pytest.raises(SourceError, match=r"without a mask \(one of 2\) \(make it .*--id-type csTrainId\)"):
        pairs.pairs(layouts.LAYOUTS["idd19"], tmp_path, "train")


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("cityscapes", "test", "--split test: this layout has train, val"),  # its labels are dummies
        ("ade20k", "train", r"holds no image of split train: .* images/training/\{key\}.jpg"),
    ],
)
def test_a_split_that_is_not_there_is_a_sentence(name: str, split: str, message: str, tmp_path: Path) -> None:
    make.cityscapes(tmp_path)
    with pytest.raises(SourceError, match=message):
        pairs.pairs(layouts.LAYOUTS[name], tmp_path, split)


def test_two_years_of_voc_are_told_apart(tmp_path: Path) -> None:
    found = make.voc(tmp_path)
    make.put(tmp_path / "VOCdevkit/VOC2007", {"JPEGImages/000001.jpg": b"", "SegmentationClass/000001.png": b""})
    with pytest.raises(SourceError, match=r"holds JPEGImages twice, in .*VOC2007.*VOC2012"):
        pairs.pairs(layouts.LAYOUTS["voc"], tmp_path, "train")
    same(read(layouts.LAYOUTS["voc"], tmp_path / "VOCdevkit/VOC2012", "train"), found["train"])


def test_class_lists_that_cannot_be_are_refused(mine: Path) -> None:
    (mine / "classes.txt").write_text("\n".join(map(str, range(256))))
    with pytest.raises(SourceError, match="256 classes: a mask of 8 bits holds 255 and void"):
        layouts.folders(mine)
    (mine / "classes.txt").unlink()
    with pytest.raises(SourceError, match=r"classes.txt is missing"):
        layouts.folders(mine)


# --- turned images ---------------------------------------------------------------------------------------------------


def turned(orientation: int, content: bytes) -> bytes:
    image = Image.open(io.BytesIO(content))
    exif = image.getexif()
    exif[0x0112] = orientation
    return make.saved(image, "JPEG", exif=exif)


def upright(orientation: int, mask: np.ndarray) -> np.ndarray:
    """By the meaning of the eight values: where the stored first row and column lie."""
    mask = mask.T if orientation >= 5 else mask
    rows, columns = {1: (1, 1), 2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}[
        orientation
    ]
    return mask[::rows, ::columns]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_turned_with_its_image(orientation: int, tmp_path: Path) -> None:
    key, mask = next(iter(make.ade20k(tmp_path)["train"].items()))
    file = tmp_path / f"ADEChallengeData2016/images/training/{key}.jpg"
    file.write_bytes(turned(orientation, make.photo(1, mask)))
    np.testing.assert_array_equal(read(layouts.LAYOUTS["ade20k"], tmp_path, "train")[key], upright(orientation, mask))


def test_a_mask_drawn_on_the_turned_image_stays(mine: Path) -> None:
    mask = MASK.T.copy()
    make.put(mine, {"images/train/a.jpg": turned(6, make.photo(1, MASK)), "masks/train/a.png": make.saved(mask)})
    np.testing.assert_array_equal(read(layouts.folders(mine), mine, "train")["a"], mask)


def test_a_half_turn_of_unknown_masks_is_refused(mine: Path) -> None:
    """Annotation tools turn or do not turn; the size tells for quarter turns only."""
    make.put(mine, {"images/train/a.jpg": turned(3, make.photo(1, MASK)), "masks/train/a.png": make.saved(MASK)})
    with pytest.raises(SourceError, match=r"a.png may have been drawn before or after .*\(EXIF orientation 3\)"):
        read(layouts.folders(mine), mine, "train")


def test_masks_are_written_small_and_alike() -> None:
    mask = make.labels(3, 19, 200, 300)
    content = masks.png(mask)
    assert content == masks.png(mask.copy())
    assert len(content) < len(make.saved(mask, compress_level=1))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), mask)
