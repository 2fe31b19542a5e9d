"""The layouts of the data sets, as their archives unpack. `pairs.Layout` documents the fields."""

from dataclasses import replace
from pathlib import Path

from sharding import SourceError
from sharding.labels import read_classes

from . import classes
from .classes import VOID, identity, without_first
from .masks import Colours, Indices
from .pairs import Layout, every_key


def folders(source: Path) -> Layout:
    """The layout of a user's own set: images/SPLIT, masks/SPLIT (gray PNGs of class indices), classes.txt."""
    file = source / "classes.txt"
    if not file.is_file():
        raise SourceError(f"{file} is missing: it names the classes, one a line, in the order of the masks' numbers")
    names = tuple(read_classes(file))
    if len(names) > VOID:
        raise SourceError(f"{file} names {len(names)} classes: a mask of 8 bits holds {VOID} and void")
    masks = {"masks/{split}/{path}.png": Indices(identity(len(names)))}
    splits = {path.name: (path.name, None) for path in sorted(source.glob("images/*")) if path.is_dir()}
    if not splits:
        raise SourceError(
            f"{source / 'images'} holds no folder of a split: images lie in images/SPLIT, masks in masks/SPLIT"
        )
    return Layout(names, ("images/{split}/{path}.*",), masks, splits, as_stored=False)


def _sunrgbd_partner(split: str, key: str) -> str | None:
    """The image of a label. Labels 1 to 5,050 are those of test, training labels follow; images of both begin at 1."""
    number = int(key.removeprefix("img-"))
    if (split == "test") != (number <= 5050):
        return None
    return f"img-{number - (0 if split == 'test' else 5050):06d}"


def _camvid_member(split: str, key: str) -> bool:
    """Whether a frame belongs to the split, by sequence and number, as SegNet divided the 701 frames."""
    sequence, _, frame = key.partition("_")
    number = int(frame.lstrip("f"))
    test = sequence == "Seq05VD" or (sequence == "0001TP" and number >= 8550)
    val = sequence == "0016E5" and 7959 <= number <= 8159
    return {"train": not test and not val, "val": val, "test": test}[split]


def _kitti_member(split: str, key: str) -> bool:
    """Whether a frame belongs to our split: every fourth is val. KITTI has no official split; `--list` overrides."""
    return split == "all" or (int(key.partition("_")[0]) % 4 == 3) == (split == "val")


def _potsdam_member(split: str, key: str) -> bool:
    """Whether a tile belongs to the split: the benchmark has 24 tiles for training and 14 for testing."""
    return (int(key.rpartition("_")[2]) >= 13) == (split == "val")


def _vaihingen_member(split: str, key: str) -> bool:
    """Whether a tile belongs to the split: the benchmark has 16 tiles for training and 17 for testing."""
    return (int(key.removeprefix("area")) in {1, 3, 5, 7, 11, 13, 15, 17, 21, 23, 26, 28, 30, 32, 34, 37}) == (
        split == "train"
    )


def _vaihingen_partner(split: str, key: str) -> str | None:
    return None if key == "area9" else key  # area9 has a ground truth but no image


_TRAIN_IDS = Indices(identity(19))
_LABEL_IDS = Indices(classes.LABEL_IDS)
_VOC = Indices(identity(21), palette=True)
_ISPRS = Colours(classes.ISPRS_COLOURS, nearest=True)
_LISTS = "ImageSets/Segmentation"

_camvid_raw = Layout(
    classes=classes.CAMVID,
    images=("701_StillsRaw_full/{key}.png",),
    masks={"LabeledApproved_full/{key}_L.png": Colours(classes.CAMVID_COLOURS)},
    splits={"train": ("train", 367), "val": ("val", 101), "test": ("test", 233)},
    member=_camvid_member,
)
_context60 = Layout(
    classes=classes.CONTEXT60,
    images=("JPEGImages/{key}.jpg",),
    masks={  # from mmsegmentation's converter; as downloaded from the data set's page
        "SegmentationClassContext/{key}.png": Indices(identity(60), palette=True),
        "trainval/{key}.mat": Indices(classes.CONTEXT_OF_459),
    },
    splits={"train": ("train", 4998), "val": ("val", 5105)},
    lists={s: (("ImageSets/SegmentationContext/" + s,), ("ImageSets/Main/" + s,)) for s in ("train", "val")},
)
_idd = Layout(
    classes=classes.IDD,
    images=("leftImg8bit/{split}/{path}_leftImg8bit.*",),
    masks={"gtFine/{split}/{path}_gtFine_labellevel3Ids.png": Indices(identity(26))},
    splits={"train": ("train", 6993), "val": ("val", 981)},
    hint="make them from the polygons with AutoNUE's preperation/createLabels.py --id-type level3Id",
)
_potsdam = Layout(
    classes=classes.ISPRS,
    images=("2_Ortho_RGB/top_potsdam_{key}_RGB.tif",),
    masks={
        "5_Labels_all/top_potsdam_{key}_label.tif": _ISPRS,
        "5_Labels_all_noBoundary/top_potsdam_{key}_label_noBoundary.tif": _ISPRS,
    },
    splits={"train": ("", 3456), "val": ("", 2016)},
    member=_potsdam_member,
    patch=(512, 512),
)
_TRUTH = "ISPRS_semantic_labeling_Vaihingen_ground_truth"
_vaihingen = Layout(
    classes=classes.ISPRS,
    images=("top/top_mosaic_09cm_{key}.tif",),
    masks={
        _TRUTH + "_COMPLETE/top_mosaic_09cm_{key}.tif": _ISPRS,
        "gts_for_participants/top_mosaic_09cm_{key}.tif": _ISPRS,
        _TRUTH + "_eroded_COMPLETE/top_mosaic_09cm_{key}_noBoundary.tif": _ISPRS,
    },
    splits={"train": ("", None), "val": ("", None)},
    member=_vaihingen_member,
    partner=_vaihingen_partner,
    patch=(512, 512),
)

LAYOUTS: dict[str, Layout] = {
    "ade20k": Layout(
        classes=classes.ADE20K,
        images=("images/{split}/{key}.jpg",),
        masks={"annotations/{split}/{key}.png": Indices(without_first(identity(151)))},
        splits={"train": ("training", 20210), "val": ("validation", 2000)},
    ),
    "bdd10k": Layout(
        classes=classes.CITYSCAPES,
        images=("images/10k/{split}/{key}.jpg", "seg/images/{split}/{key}.jpg"),
        masks={
            "labels/sem_seg/masks/{split}/{key}.png": _TRAIN_IDS,
            "seg/labels/{split}/{key}_{split}_id.png": _TRAIN_IDS,
        },
        splits={"train": ("train", 7000), "val": ("val", 1000)},
    ),
    "camvid": replace(
        _camvid_raw,  # SegNet's copy at half the size
        images=("{split}/{key}.png",),
        masks={"{split}annot/{key}.png": Indices(identity(11) | {11: VOID})},
        member=every_key,
    ),
    "camvid32": replace(
        _camvid_raw,
        classes=classes.CAMVID32,
        masks={"LabeledApproved_full/{key}_L.png": Colours(classes.CAMVID32_COLOURS)},
    ),
    "camvid_raw": _camvid_raw,
    "cityscapes": Layout(
        classes=classes.CITYSCAPES,
        images=("leftImg8bit/{split}/*/{key}_leftImg8bit.png",),
        masks={
            "gtFine/{split}/*/{key}_gtFine_labelIds.png": _LABEL_IDS,
            "gtFine/{split}/*/{key}_gtFine_labelTrainIds.png": _TRAIN_IDS,
        },
        splits={"train": ("train", 2975), "val": ("val", 500)},  # the labels of test are dummies
    ),
    "idd": _idd,
    "idd19": replace(
        _idd,
        classes=classes.CITYSCAPES,
        masks={"gtFine/{split}/{path}_gtFine_labelcsTrainIds.png": _TRAIN_IDS},
        hint=_idd.hint.replace("level3Id", "csTrainId"),
    ),
    "isprs": replace(  # train on one city, validate on the other, with the channels that both have
        _potsdam,
        images=("{split}/2_Ortho_RGB/top_{key}_RGB.tif", "{split}/top/top_mosaic_09cm_{key}.tif"),
        masks={
            "{split}/" + mask.replace("top_potsdam", "top"): _ISPRS for mask in (*_potsdam.masks, *_vaihingen.masks)
        },
        splits={"train": ("Potsdam", 3800), "val": ("Vaihingen", None)},
        member=every_key,
        partner=_vaihingen_partner,
        patch=(800, 600),
        red_green={"train": (0, 1), "val": (1, 2)},
    ),
    "kitti": Layout(
        classes=classes.CITYSCAPES,
        images=("training/image_2/{key}.png",),
        masks={"training/semantic/{key}.png": _LABEL_IDS},
        splits={"train": ("", 150), "val": ("", 50), "all": ("", 200)},
        member=_kitti_member,
    ),
    "pascal_context": replace(
        _context60,
        classes=classes.CONTEXT60[1:],
        masks={
            "SegmentationClassContext/{key}.png": Indices(without_first(identity(60)), palette=True),
            "trainval/{key}.mat": Indices(without_first(classes.CONTEXT_OF_459)),
        },
    ),
    "pascal_context60": _context60,
    "potsdam": _potsdam,
    "suim": Layout(
        classes=classes.SUIM,
        images=("{split}/images/{key}.jpg",),
        masks={"{split}/masks/{key}.bmp": Colours(classes.SUIM_COLOURS, nearest=True)},
        splits={"train": ("train_val", 1525), "test": ("TEST", 110)},
        oversized=True,
    ),
    "sunrgbd": Layout(
        classes=classes.SUNRGBD,
        images=("SUNRGBD-{split}_images/{key}.jpg",),
        masks={"sunrgbd_train_test_labels/{key}.png": Indices(without_first(identity(38)))},
        splits={"train": ("train", 5285), "test": ("test", 5050)},
        partner=_sunrgbd_partner,
    ),
    "vaihingen": _vaihingen,
    "voc": Layout(
        classes=classes.VOC,
        images=("JPEGImages/{key}.jpg",),
        masks={
            "SegmentationClass/{key}.png": _VOC,
            "SegmentationClassAug/{key}.png": _VOC,
            "dataset/cls/{key}.mat": _VOC,  # SBD, as benchmark.tgz unpacks
        },
        splits={"train": ("", 1464), "val": ("", 1449), "trainval": ("", 2913), "train_aug": ("", 10582)},
        lists={split: ((f"{_LISTS}/{split}",),) for split in ("train", "val", "trainval")}
        | {
            "train_aug": (
                (f"{_LISTS}/train_aug",),
                (f"{_LISTS}/trainaug",),
                (f"{_LISTS}/train", "dataset/train", "dataset/val", f"-{_LISTS}/val"),
            )
        },
    ),
}
