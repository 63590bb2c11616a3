"""The initial value of CLIP's learnable logit scale."""

import math

LOG_SCALE_INIT = math.log(1 / 0.07)  # CLIP, section 2.5
