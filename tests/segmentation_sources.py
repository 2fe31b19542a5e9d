"""Miniature segmentation data sets in the layout and encoding of the real ones, and a function that runs the tool."""

import io
import runpy
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sharder_sources as photos
from numpy.typing import NDArray
from PIL import Image

TOOL = photos.ROOT / "tools" / "shard_segmentation.py"
sys.path.insert(0, str(TOOL.parent))
VOID = 255
Truth = dict[str, NDArray[np.uint8]]  # {key: the mask that the shards must hold}


def run(*arguments: object) -> int:
    """The command in this process, with one worker unless said."""
    words = [str(argument) for argument in arguments]
    return runpy.run_path(str(TOOL))["main"](words + ["--workers", "1"] * ("--workers" not in words))


def stored(out: Path, split: str) -> dict[str, dict[str, bytes]]:
    """{key: {extension: content}} of a split's tars."""
    return photos.samples(out, f"*-{split}-*.tar")


def masks(out: Path, split: str) -> Truth:
    """{key: mask} of a split's tars, each proven to be of the stored image's size and of one channel."""
    found = {}
    for key, members in stored(out, split).items():
        assert list(members) == ["jpg", "seg.png", "cls", "json"]
        image, mask = (Image.open(io.BytesIO(members[name])) for name in ("jpg", "seg.png"))
        assert (image.format, mask.format, mask.mode, mask.size) == ("JPEG", "PNG", "L", image.size)
        found[key] = np.asarray(mask)
    return found


def labels(seed: int, classes: int, height: int = 20, width: int = 28, void: bool = True) -> NDArray[np.uint8]:
    """u8 (height, width): blocks of random classes, and of void."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, classes, (5, 7), dtype=np.uint8)
    coarse[0, :2] = 0, classes - 1  # both ends are always there
    if void:
        coarse[random.random((5, 7)) < 0.2] = VOID
    return coarse[np.arange(height) * 5 // height][:, np.arange(width) * 7 // width]


def photo(seed: int, mask: NDArray, kind: str = "JPEG", **options: object) -> bytes:
    """An image of the mask's size."""
    return photos.encode(seed, kind, size=mask.shape[:2], **options)


def saved(array: NDArray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(out, kind, **options)
    return out.getvalue()


def palette(mask: NDArray[np.uint8], **options: object) -> bytes:
    """A palette PNG: the indices are the labels, its colours (and their gray) are others."""
    image = Image.fromarray(mask).convert("P")
    image.putdata(mask.ravel().tolist())
    image.putpalette([(value * factor + 31) % 256 for value in range(256) for factor in (37, 101, 7)])
    return saved(image, **options)


def gray_png(mask: NDArray[np.uint8], bits: int, claimed: tuple[int, int] | None = None) -> bytes:
    """A gray PNG of 1, 2 or 4 bits a pixel, which Pillow reads but does not write. `claimed`: height and width."""
    each = 8 // bits
    padded = np.pad(mask, ((0, 0), (0, -mask.shape[1] % each)))
    rows = sum(padded[:, n::each].astype(int) << (8 - bits - n * bits) for n in range(each)).astype(np.uint8)
    data = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = claimed or mask.shape
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def coloured(mask: NDArray[np.uint8], colours: dict[int, tuple[int, int, int]]) -> NDArray[np.uint8]:
    table = np.zeros((256, 3), np.uint8)
    for label, colour in colours.items():
        table[label] = colour
    return table[mask]


def put(root: Path, files: dict[str, bytes | str]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def renumbered(mask: NDArray[np.uint8], numbers: list[int], void: int) -> NDArray[np.uint8]:
    """The class `c` becomes `numbers[c]`, void becomes `void`."""
    table = np.full(256, void, np.uint8)
    table[: len(numbers)] = numbers
    return table[mask]


# --- a data set each: writes its files below `root` and returns {split: truth} ---------------------------------------


def folders(root: Path) -> dict[str, Truth]:
    truth = {"a": labels(1, 3), "deep_b": labels(2, 3)}
    put(root, {"classes.txt": "sky\nroad\ncar\n", "images/train/a.jpg": photo(1, truth["a"])})
    put(root, {"images/train/deep/b.PNG": photo(2, truth["deep_b"], "PNG"), "images/train/._a.jpg": b"a Mac's"})
    put(root, {"masks/train/a.png": saved(truth["a"]), "masks/train/deep/b.png": saved(truth["deep_b"])})
    return {"train": truth}


def ade20k(root: Path) -> dict[str, Truth]:
    found = {}
    for split, folder, name in (("train", "training", "ADE_train_0000000"), ("val", "validation", "ADE_val_0000000")):
        found[split] = {f"{name}{n}": labels(n, 150) for n in (1, 2)}
        for n, (key, mask) in enumerate(found[split].items()):
            content = photo(n, mask, mode="LRGB"[: 1 + 3 * n][-3:])  # some are gray
            put(root / "ADEChallengeData2016", {f"images/{folder}/{key}.jpg": content})
            coded = saved(renumbered(mask, list(range(1, 151)), 0))
            put(root / "ADEChallengeData2016", {f"annotations/{folder}/{key}.png": coded})
    return found


def voc(root: Path) -> dict[str, Truth]:
    """VOC 2012 and SBD as their archives unpack: t* train, v* val, s* only in SBD, which holds t0 and v0 as well."""
    from scipy.io import savemat

    masks = {key: labels(n, 21) for n, key in enumerate(("t0", "t1", "v0", "v1"))}
    extra = {key: labels(n + 9, 21, void=False) for n, key in enumerate(("s0", "s1", "t0", "v0"))}
    home, lists = root / "VOCdevkit/VOC2012", "ImageSets/Segmentation"
    put(home, {f"JPEGImages/{key}.jpg": photo(n, mask) for n, (key, mask) in enumerate((extra | masks).items())})
    put(home, {"JPEGImages/other.jpg": photo(99, masks["t0"])})  # most of VOC's images have no mask
    put(home, {f"SegmentationClass/{key}.png": palette(mask) for key, mask in masks.items()})
    put(
        home,
        {f"{lists}/train.txt": "t0\nt1\n", f"{lists}/val.txt": "v0\nv1\n", f"{lists}/trainval.txt": "t0\nt1\nv0\nv1\n"},
    )
    sbd = root / "benchmark_RELEASE/dataset"
    put(sbd, {"train.txt": "s0\nv0\n", "val.txt": "s1\nt0\n"})
    (sbd / "cls").mkdir()
    for key, mask in extra.items():
        boundaries = np.array([[None]], object)
        boundaries[0, 0] = np.eye(3, dtype=np.uint8)
        savemat(
            sbd / f"cls/{key}.mat", {"GTcls": {"Boundaries": boundaries, "Segmentation": mask}}, do_compression=True
        )
    val = {key: masks[key] for key in ("v0", "v1")}
    train = {key: masks[key] for key in ("t0", "t1")}
    return {
        "train": train,
        "val": val,
        "trainval": masks,
        "train_aug": train | {key: extra[key] for key in ("s0", "s1")},
    }


def pascal_context(root: Path, first: int = 1) -> dict[str, Truth]:
    """459 categories in MATLAB files, VOC 2010's lists. `first` 1: background is void, 0: it is a class."""
    from scipy.io import savemat

    home, found = root / "VOC2010", {}
    (home / "trainval").mkdir(parents=True)
    ids = [0, 2, 9, 454, 458]  # background and the first and last of the 59
    for split, key in (("train", "2008_1"), ("val", "2008_2")):
        at = labels(len(key), 5, void=False)
        label_map = np.array(ids, np.uint16)[at]
        label_map[0, 0] = 1  # accordion: none of the 59, so background
        want = np.array([0, 1, 2, 58, 59])[at]
        want[0, 0] = 0
        found[split] = {key: np.where(want < first, VOID, want - first).astype(np.uint8)}
        savemat(home / f"trainval/{key}.mat", {"LabelMap": label_map})
        put(home, {f"JPEGImages/{key}.jpg": photo(3, at), f"ImageSets/Main/{split}.txt": f"{key}\n"})
    return found


def pascal_context_png(root: Path) -> dict[str, Truth]:
    """As mmsegmentation's converter leaves it: 0 is background."""
    home, mask = root / "VOC2010", labels(1, 59)
    put(home, {"SegmentationClassContext/2008_1.png": saved(renumbered(mask, list(range(1, 60)), 0))})
    put(home, {"JPEGImages/2008_1.jpg": photo(1, mask), "ImageSets/SegmentationContext/train.txt": "2008_1\n"})
    return {"train": {"2008_1": mask}}


LABEL_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]  # in the order of their trainIds


def cityscapes(root: Path, train_ids: bool = False) -> dict[str, Truth]:
    found = {}
    for split, city in (("train", "aachen"), ("val", "munster")):
        key, mask = f"{city}_000000_000019", labels(4, 19)
        coded = mask if train_ids else renumbered(mask, LABEL_IDS, 3)
        names = {"labelTrainIds" if train_ids else "labelIds": saved(coded)}
        names |= {"color": saved(coloured(mask, {})), "instanceIds": saved(mask.astype(np.uint16))}  # never a mask
        put(root, {f"leftImg8bit/{split}/{city}/{key}_leftImg8bit.png": photo(4, mask, "PNG")})
        put(root, {f"gtFine/{split}/{city}/{key}_gtFine_{name}.png": content for name, content in names.items()})
        put(root, {f"gtFine/{split}/{city}/{key}_gtFine_polygons.json": "{}"})
        found[split] = {key: mask}
    return found


def camvid(root: Path) -> dict[str, Truth]:
    found = {}
    for n, split in enumerate(("train", "val", "test")):
        key, mask = f"0001TP_00{n}", labels(n, 11)
        put(root / "CamVid", {f"{split}/{key}.png": photo(n, mask, "PNG")})
        put(root / "CamVid", {f"{split}annot/{key}.png": saved(np.where(mask == VOID, 11, mask).astype(np.uint8))})
        found[split] = {key: mask}
    return found


CAMVID_FRAMES = {
    "train": ("0001TP_008520", "0006R0_f00930", "0016E5_07920", "0016E5_08190"),
    "val": ("0016E5_07959", "0016E5_08159"),
    "test": ("0001TP_008550", "Seq05VD_f00000"),
}


def camvid_raw(
    root: Path, colours: dict[int, tuple[int, int, int]] | None = None, classes: int = 11
) -> dict[str, Truth]:
    """720x960 frames and colours in the original; one of the colours that SegNet merged into each class."""
    sky, building, pole, mark, kerb = (128,) * 3, (64, 192, 0), (0, 0, 64), (128, 0, 192), (64, 192, 128)
    rest = ((192, 192, 0), (0, 64, 64), (64, 64, 128), (192, 128, 192), (192, 128, 64), (192, 0, 192))
    colours = colours or dict(enumerate((sky, building, pole, mark, kerb, *rest))) | {VOID: (0, 0, 0)}
    found: dict[str, Truth] = {}
    for split, keys in CAMVID_FRAMES.items():
        found[split] = {key: labels(n, classes, void=classes == 11) for n, key in enumerate(keys)}
        for key, mask in found[split].items():
            put(root, {f"701_StillsRaw_full/{key}.png": photo(1, mask, "PNG")})
            put(root, {f"LabeledApproved_full/{key}_L.png": saved(coloured(mask, colours))})
    return found


def camvid32(root: Path) -> dict[str, Truth]:
    """Labels 0, 1 and 2 stand for three of the 32: the first and the last but one (Void), which is a class here."""
    found = camvid_raw(root, {0: (64, 128, 64), 1: (0, 0, 0), 2: (64, 192, 0)}, 3)
    names = np.array([0, 30, 31], np.uint8)
    return {split: {key: names[mask] for key, mask in masks.items()} for split, masks in found.items()}


def bdd10k(root: Path, new: bool = True) -> dict[str, Truth]:
    found = {}
    image, mask = (
        ("images/10k/{split}", "labels/sem_seg/masks/{split}/{key}.png")
        if new
        else ("seg/images/{split}", "seg/labels/{split}/{key}_{split}_id.png")
    )
    for split, key in (("train", "0004a4c0-d4dff0ad"), ("val", "7d06fefd-f7be05a6")):
        found[split] = {key: labels(len(split), 19)}
        put(root / "bdd100k", {f"{image.format(split=split)}/{key}.jpg": photo(5, found[split][key])})
        put(root / "bdd100k", {mask.format(split=split, key=key): saved(found[split][key])})
    return found


def kitti(root: Path) -> dict[str, Truth]:
    truth = {f"{n:06d}_10": labels(n, 19) for n in range(5)}
    for key, mask in truth.items():
        files = {"image_2": photo(1, mask, "PNG"), "semantic": saved(renumbered(mask, LABEL_IDS, 0))}
        put(root / "data_semantics/training", {f"{name}/{key}.png": content for name, content in files.items()})
    val = {"000003_10": truth["000003_10"]}
    return {"all": truth, "val": val, "train": {key: mask for key, mask in truth.items() if key not in val}}


def idd(root: Path, ids: str = "level3Ids", classes: int = 26) -> dict[str, Truth]:
    found = {}
    for split, sequences in (("train", ("0", "1")), ("val", ("119",))):
        found[split] = {f"{sequence}_005506": labels(int(sequence), classes) for sequence in sequences}
        for sequence in sequences:  # the same frame number in two sequences
            mask, name = found[split][f"{sequence}_005506"], f"{split}/{sequence}/005506"
            put(root / "IDD_Segmentation", {f"leftImg8bit/{name}_leftImg8bit.png": photo(6, mask, "PNG")})
            put(root / "IDD_Segmentation", {f"gtFine/{name}_gtFine_label{ids}.png": saved(mask)})
            put(root / "IDD_Segmentation", {f"gtFine/{name}_gtFine_polygons.json": "{}"})
    return found


def sunrgbd(root: Path) -> dict[str, Truth]:
    """One archive of labels: the 5,050 test images first, then those of training; the images begin at 1 twice."""
    found: dict[str, Truth] = {}
    for split, numbers, offset in (("train", (1, 5050), 5050), ("test", (1, 5050), 0)):
        found[split] = {f"img-{n:06d}": labels(n + offset, 37) for n in numbers}
        for n, (key, mask) in zip(numbers, found[split].items(), strict=True):
            coded = saved(renumbered(mask, list(range(1, 38)), 0))
            put(root, {f"SUNRGBD-{split}_images/{key}.jpg": photo(7, mask)})
            put(root, {f"sunrgbd_train_test_labels/img-{n + offset:06d}.png": coded})
    return found


ISPRS_COLOURS = dict(enumerate(((255,) * 3, (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0))))


def isprs(root: Path) -> dict[str, dict[str, Truth]]:
    """Both cities, tiles of 30 x 40 pixels: {layout: {split: truth}} for patches of 16 pixels, 12 apart."""
    tiles = {"Potsdam": {"2_12": labels(1, 6, 30, 40), "2_13": labels(2, 6, 30, 40)}}
    tiles["Vaihingen"] = {"area1": labels(3, 6, 30, 40), "area2": labels(4, 6, 30, 40)}
    noise = np.random.default_rng(0).integers(-40, 40, (30, 40, 3))
    for city, masks in tiles.items():
        image, label = (
            ("2_Ortho_RGB/top_potsdam_{}_RGB.tif", "5_Labels_all/top_potsdam_{}_label.tif")
            if city == "Potsdam"
            else ("top/top_mosaic_09cm_{}.tif", "gts_for_participants/top_mosaic_09cm_{}.tif")
        )
        for n, (key, mask) in enumerate(masks.items()):
            put(root / city, {image.format(key): photo(n, mask, "TIFF")})
            rough = np.clip(coloured(mask, ISPRS_COLOURS | {VOID: (0, 0, 0)}) + noise, 0, 255).astype(np.uint8)
            put(root / city, {label.format(key): saved(rough, "TIFF")})

    put(root / "Vaihingen", {"gts_for_participants/top_mosaic_09cm_area9.tif": b"a mask without an image"})

    def cut(name: str, mask: NDArray) -> Truth:
        starts = [(y, x) for y in (0, 12, 14) for x in (0, 12, 24)]
        return {f"{name}_{y}_{x}": mask[y : y + 16, x : x + 16] for y, x in starts}

    (p0, p1), (v0, v1) = ([cut(key, mask) for key, mask in tiles[city].items()] for city in ("Potsdam", "Vaihingen"))
    both = {"train": cut("potsdam_2_12", tiles["Potsdam"]["2_12"]) | cut("potsdam_2_13", tiles["Potsdam"]["2_13"])}
    both["val"] = v0 | v1
    return {"potsdam": {"train": p0, "val": p1}, "vaihingen": {"train": v0, "val": v1}, "isprs": both}


def suim(root: Path) -> dict[str, Truth]:
    """A bit for each channel, blended at borders; one mask is larger than its image at the right and at the bottom."""
    found: dict[str, Truth] = {}
    for split, folder in (("train", "train_val"), ("test", "TEST")):
        found[split] = {f"f_r_{n}_": labels(n, 8, void=False) for n in (1, 2)}
        for n, (key, mask) in enumerate(found[split].items()):
            whole = np.pad(mask, ((0, 3), (0, 5)), constant_values=1) if split == "train" and n else mask
            bits = np.stack([whole >> 2 & 1, whole >> 1 & 1, whole & 1], axis=-1)
            blended = (bits * 255 + np.where(bits, -1, 1) * (np.arange(whole.shape[1]) % 128)[:, None]).astype(np.uint8)
            put(root / "SUIM", {f"{folder}/images/{key}.jpg": photo(8, mask)})
            put(root / "SUIM", {f"{folder}/masks/{key}.bmp": saved(blended, "BMP")})
            put(root / "SUIM", {f"{folder}/masks/FV/{key}.bmp": saved((mask == 6).astype(np.uint8) * 255, "BMP")})
    return found


Builder = Callable[[Path], dict[str, Truth]]
SETS: dict[str, tuple[str, Builder]] = {  # name -> layout and builder
    **{one.__name__: (one.__name__, one) for one in (folders, ade20k, voc, pascal_context, cityscapes, camvid)},
    **{one.__name__: (one.__name__, one) for one in (camvid_raw, camvid32, bdd10k, kitti, idd, sunrgbd, suim)},
    "idd19": ("idd19", lambda root: idd(root, "csTrainIds", 19)),
    "pascal_context60": ("pascal_context60", lambda root: pascal_context(root, 0)),
    "pascal_context as PNG": ("pascal_context", pascal_context_png),
    "cityscapes by trainIds": ("cityscapes", lambda root: cityscapes(root, True)),
    "bdd10k, the older folders": ("bdd10k", lambda root: bdd10k(root, False)),
}
