"""All functions on boxes, masks and images: what a user of MMCV looks for."""
from visdet.cv.boxes import *
from visdet.cv.iou import *
from visdet.cv.best_iou import *
from visdet.cv.hungarian import *
from visdet.cv.nms import *
from visdet.cv.priors import *
from visdet.cv.coders import *
from visdet.cv.roi import *
from visdet.cv.roi_pool import *
from visdet.cv.masks import *
from visdet.cv.image import *
from visdet.cv.draw import *
from visdet.cv.deform_attn import *
