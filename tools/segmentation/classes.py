"""Class lists, and the numbers and colours of classes in the masks as downloaded. Labels follow the usual order."""

from collections.abc import Iterable, Mapping

VOID = 255


def _names(text: str) -> tuple[str, ...]:
    return tuple(" ".join(name.split()) for name in text.split(","))


def identity(count: int) -> dict[int, int]:
    """The table of masks whose numbers are the classes already; 255 stays void."""
    return {number: number for number in range(count)} | {VOID: VOID}


def without_first(table: Mapping[int, int]) -> dict[int, int]:
    """The table with class 0 (other, unlabelled, background) as void and all other classes one lower."""
    return {number: VOID if label in (0, VOID) else label - 1 for number, label in table.items()}


def _ranked(numbers: Iterable[int], known: Iterable[int]) -> dict[int, int]:
    """The table in which `numbers` become 0, 1, ... in this order, and all other `known` numbers are void."""
    return dict.fromkeys(known, VOID) | {number: label for label, number in enumerate(numbers)}


ADE20K = _names("""wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person,
    earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug,
    field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard,
    chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case,
    pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill,
    bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus,
    towel, light, truck, tower, chandelier, awning, streetlight, booth, television, airplane, dirt track, apparel, pole,
    land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy,
    washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food,
    step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce,
    vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass,
    clock, flag""")

VOC = _names("""background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse,
    motorbike, person, pottedplant, sheep, sofa, train, tvmonitor""")

# Pascal Context's 59 most frequent of 459 categories, in alphabetical order, which is also the order of their ids.
CONTEXT60 = _names("""background, aeroplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building,
    bus, cabinet, car, cat, ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence, floor, flower, food,
    grass, ground, horse, keyboard, light, motorbike, mountain, mouse, person, plate, platform, pottedplant, road, rock,
    sheep, shelves, sidewalk, sign, sky, snow, sofa, table, track, train, tree, truck, tvmonitor, wall, water, window,
    wood""")
_CONTEXT_IDS = (
    *(2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158, 159),
    *(162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366, 368),
    *(397, 415, 416, 420, 424, 427, 440, 445, 454, 458),
)
CONTEXT_OF_459 = dict.fromkeys(range(460), 0) | {number: label for label, number in enumerate(_CONTEXT_IDS, 1)}

CITYSCAPES = _names("""road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain,
    sky, person, rider, car, truck, bus, train, motorcycle, bicycle""")
LABEL_IDS = _ranked((7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33), (*range(34), VOID))  # -1 in 8 bits is 255

IDD = _names("""road, parking or drivable fallback, sidewalk, rail track or non-drivable fallback, person or animal,
    rider, motorcycle, bicycle, autorickshaw, car, truck, bus, caravan or other large vehicle, curb, wall, fence,
    guard rail, billboard, traffic sign, traffic light, pole, obs-str-bar-fallback, building, bridge or tunnel,
    vegetation, sky or fallback background""")

SUNRGBD = _names("""wall, floor, cabinet, bed, chair, sofa, table, door, window, bookshelf, picture, counter, blinds,
    desk, shelves, curtain, dresser, pillow, mirror, floor mat, clothes, ceiling, books, fridge, tv, paper, towel,
    shower curtain, box, whiteboard, person, night stand, toilet, sink, lamp, bathtub, bag""")

SUIM = _names("""background (waterbody), human divers, aquatic plants and sea-grass, wrecks and ruins, robots,
    reefs and invertebrates, fish and vertebrates, sea-floor and rocks""")
SUIM_COLOURS = {(255 * (k >> 2), 255 * (k >> 1 & 1), 255 * (k & 1)): k for k in range(8)}  # one bit per channel

ISPRS = _names("impervious surfaces, building, low vegetation, tree, car, clutter")
ISPRS_COLOURS = {
    (255, 255, 255): 0,
    (0, 0, 255): 1,
    (0, 255, 255): 2,
    (0, 255, 0): 3,
    (255, 255, 0): 4,
    (255, 0, 0): 5,
    (0, 0, 0): VOID,  # the eroded borders of the noBoundary masks
}

# CamVid's classes and colours in the order of its label_colors.txt, each with the one of SegNet's eleven classes that
# it is merged into.
CAMVID = _names("sky, building, pole, road, pavement, tree, sign, fence, car, pedestrian, bicyclist")
_CAMVID_COLOURS = """Animal 64 128 64 pedestrian, Archway 192 0 128 building, Bicyclist 0 128 192 bicyclist,
    Bridge 0 128 64 building, Building 128 0 0 building, Car 64 0 128 car, CartLuggagePram 64 0 192 pedestrian,
    Child 192 128 64 pedestrian, Column_Pole 192 192 128 pole, Fence 64 64 128 fence, LaneMkgsDriv 128 0 192 road,
    LaneMkgsNonDriv 192 0 64 road, Misc_Text 128 128 64 sign, MotorcycleScooter 192 0 192 bicyclist,
    OtherMoving 128 64 64 car, ParkingBlock 64 192 128 pavement, Pedestrian 64 64 0 pedestrian, Road 128 64 128 road,
    RoadShoulder 128 128 192 pavement, Sidewalk 0 0 192 pavement, SignSymbol 192 128 128 sign, Sky 128 128 128 sky,
    SUVPickupTruck 64 128 192 car, TrafficCone 0 0 64 pole, TrafficLight 0 64 64 sign, Train 192 64 128 car,
    Tree 128 128 0 tree, Truck_Bus 192 128 192 car, Tunnel 64 0 64 building, VegetationMisc 192 192 0 tree,
    Void 0 0 0 void, Wall 64 192 0 building"""
_CAMVID_ROWS = [row.split() for row in _CAMVID_COLOURS.split(",")]
CAMVID32 = tuple(row[0] for row in _CAMVID_ROWS)
CAMVID32_COLOURS = {(int(r), int(g), int(b)): label for label, (_, r, g, b, _) in enumerate(_CAMVID_ROWS)}
CAMVID_COLOURS = {
    (int(r), int(g), int(b)): CAMVID.index(merged) if merged in CAMVID else VOID for _, r, g, b, merged in _CAMVID_ROWS
}
