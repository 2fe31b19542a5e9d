"""The parameters of a view's augmentation: `draws` draws them, `cutting`, `colour` and `triton_views` apply them.

Each view has one float32 row of PARAMS columns. The constants below are shared by the modules that cut and augment.
"""

from itertools import permutations

import numpy as np

ORDER = 0  # row of PERMUTATIONS: the order of the four jitter operations; -1: no jitter
BRIGHTNESS = 1  # factor (TORCHVISION) or shift of pixels in [0, 1] (TENSORFLOW, MMSEG)
CONTRAST = 2  # factor
SATURATION = 3  # factor
HUE = 4  # shift, where 1 is the whole hue circle
GRAY = 5  # 0 or 1
SIGMA = 6  # standard deviation of the Gaussian in pixels of the view; 0: no blur
SOLARIZE = 7  # 0 or 1
FILTER = 8  # BILINEAR, BILINEAR_ANTIALIAS or BICUBIC_ANTIALIAS
RULE = 9  # TORCHVISION, TENSORFLOW or MMSEG: the library whose formulas the jitter follows
PAD_ROWS, PAD_COLUMNS = 10, 11  # rows at the bottom and columns at the right of the view that are outside the image
PARAMS = 12

BILINEAR, BILINEAR_ANTIALIAS, BICUBIC_ANTIALIAS = 0, 1, 2
TORCHVISION, TENSORFLOW, CENTRE, SCALED, MMSEG = range(5)  # 0 to 3 are samplers; 0, 1 and 4 are rules of the jitter
PERMUTATIONS = np.array(list(permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE))), dtype=np.int64)
CONTRAST_FIRST = 0  # MMSEG uses two rows of PERMUTATIONS: contrast directly after brightness, or last
CONTRAST_LAST = PERMUTATIONS.tolist().index([BRIGHTNESS, SATURATION, HUE, CONTRAST])

RADII = 3.0  # the Gaussian is truncated at this many sigmas; the rest weighs 0.3 %
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as in Pillow's mode "L"
PADDING = (124, 116, 104)  # colour of a view outside the image: ImageNet's mean, which normalises to about 0
VOID = 255  # class of mask pixels outside the image or without a label
