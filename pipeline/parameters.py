"""The parameters of a view's augmentation: `draws` draws them, `cutting`, `colour` and `triton_views` carry them out.

One float32 row per view, PARAMS columns. The functions that cut and augment have constants in common, too.
"""

from itertools import permutations

import numpy as np

ORDER = 0  # row of PERMUTATIONS: the order of the four jitter operations; -1: no jitter
BRIGHTNESS = 1  # factor (torchvision's rule) or shift of the unit range (TensorFlow's)
CONTRAST = 2  # factor
SATURATION = 3  # factor
HUE = 4  # shift of the hue circle = 1
GRAY = 5  # 0 or 1
SIGMA = 6  # of the Gaussian in pixels of the view; 0: no blur
SOLARIZE = 7  # 0 or 1
FILTER = 8  # BILINEAR, BILINEAR_ANTIALIAS or BICUBIC_ANTIALIAS
RULE = 9  # TORCHVISION, TENSORFLOW or MMSEG: whose formulas the jitter follows
PAD_ROWS, PAD_COLUMNS = 10, 11  # how many at the bottom and at the right of the view lie outside the image
PARAMS = 12

BILINEAR, BILINEAR_ANTIALIAS, BICUBIC_ANTIALIAS = 0, 1, 2
TORCHVISION, TENSORFLOW, CENTRE, SCALED, MMSEG = range(5)  # samplers, but the last; rules of the jitter: 0, 1 and 4
PERMUTATIONS = np.array(list(permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE))), dtype=np.int64)
CONTRAST_FIRST = 0  # MMSEG's two rows of PERMUTATIONS: the contrast right behind the brightness, or last
CONTRAST_LAST = PERMUTATIONS.tolist().index([BRIGHTNESS, SATURATION, HUE, CONTRAST])

RADII = 3.0  # the Gaussian is cut off at this many sigmas; what lies beyond weighs 0.3 %
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's "L"
PADDING = (124, 116, 104)  # ImageNet's mean: what a view shows outside the image, which normalises to about 0
VOID = 255  # the class of a mask's pixel there, and of one without a label
