"""Everything for a notebook: `from visdet.all import *` gives what `from fastai.vision.all import *` gives, and visdet's own names.

Where both have a name (`Resize`, `RandomCrop`, `Normalize`, `FocalLoss`, `DiceLoss`, `save_model`, `load_model`), visdet's is meant: it knows boxes and masks. fastai's stays
reachable under its module, such as `fastai.vision.augment.Resize`.
"""
from fastai.vision.all import *

from visdet.core.basics import VisdetError, DataError, ConfigError, CheckpointError, atomic_write, seed_everything, progress
from visdet.core.registry import register, entry
from visdet.core.config import Config, load_config
from visdet.core.backends import backend
from visdet.cv.boxes import box_area, convert_boxes, clip_boxes, scale_boxes, flip_boxes, shift_boxes, box_flaws
from visdet.cv.iou import box_iou
from visdet.cv.best_iou import best_iou
from visdet.cv.hungarian import hungarian
from visdet.cv.nms import nms, batched_nms
from visdet.cv.soft import soft_nms, matrix_nms, fast_nms
from visdet.cv.fusion import weighted_box_fusion, nms_match
from visdet.cv.rotated import rotated_iou, rotated_nms
from visdet.cv.priors import AnchorGenerator, PointGenerator
from visdet.cv.anchor_kinds import LegacyAnchorGenerator, SSDAnchorGenerator, YOLOAnchorGenerator
from visdet.cv.coders import DeltaCoder, DistanceCoder
from visdet.cv.coder_kinds import BucketingCoder, LegacyDeltaCoder, PseudoCoder, TBLRCoder, YOLOCoder
from visdet.cv.roi import roi_align, roi_levels, RoIPooler
from visdet.cv.roi_pool import roi_pool
from visdet.cv.masks import rle_encode, rle_decode, rle_area, rle_iou, rle_merge, rle_to_box, polygons_to_rle, mask_to_polygons, masks_to_boxes
from visdet.cv.paste import paste_masks, paste_rles
from visdet.cv.sample_masks import sample_masks
from visdet.cv.components import connected_components
from visdet.cv.deform_attn import ms_deform_attn
from visdet.cv.deform_conv import deform_conv
from visdet.cv.focal import sigmoid_focal_loss, quality_focal_loss, varifocal_loss
from visdet.cv.box_loss import box_iou_loss
from visdet.cv.image import read_image, image_size, resize_image, image_hash
from visdet.cv.draw import class_colours, draw_objects, show_objects
from visdet.data.targets import Targets, Sample, make_targets, collate
from visdet.data.detections import Detections, empty_detections
from visdet.data.records import Record, Records, same_vocab
from visdet.data.repair import RepairReport
from visdet.data.coco import read_coco, write_coco, read_coco_results
from visdet.data.voc import read_voc, write_voc
from visdet.data.yolo import read_yolo, write_yolo
from visdet.data.frame import read_df, write_df
from visdet.data.toy import make_toy, toy_records, toy_image
from visdet.data.transforms import Resize, RandomResize, RandomFlip, RandomCrop, Compose
from visdet.data.batch import Normalize, ColourJitter, KorniaJitter
from visdet.data.repeats import class_shares, repeat_factors, repeat_counts
from visdet.data.samplers import EpochSampler, InfiniteSampler, SourceSampler
from visdet.data.loaders import DetDL, DetDataLoaders, det_augs
import visdet.data.datasets  # registers coco, voc, yolo, table and toy
from visdet.nn.body import Body, create_body
from visdet.nn.csp import CSPDarknet, CSPNeXt, csp_body
from visdet.nn.fpn import FPN
from visdet.nn.pan import PAFPN
from visdet.nn.yolox_neck import YOLOXPAFPN, CSPNeXtPAFPN
from visdet.nn.assign import MaxIoUAssigner, PointAssigner
from visdet.nn.atss import ATSSAssigner
from visdet.nn.dynamic import DynamicSoftLabelAssigner, SimOTAAssigner
from visdet.nn.task_aligned import TaskAlignedAssigner
from visdet.nn.hungarian_match import HungarianAssigner, BoxL1Cost, ClassCost, DiceCost, FocalCost, IoUCost, MaskCrossEntropyCost, MaskFocalCost
from visdet.nn.by_place import CenterRegionAssigner, GridAssigner, NearestPointAssigner, UniformAssigner
from visdet.nn.class_losses import CrossEntropyLoss, FocalLoss, QualityFocalLoss, VarifocalLoss, GaussianFocalLoss, DistributionFocalLoss
from visdet.nn.balance import GHMC, GHMR, SeesawLoss
from visdet.nn.box_losses import L1Loss, MSELoss, SmoothL1Loss, BalancedL1Loss, BoundedIoULoss
from visdet.nn.overlap_losses import IoULoss, GIoULoss, DIoULoss, CIoULoss, EIoULoss, SIoULoss
from visdet.nn.sample import RandomSampler
from visdet.nn.sample_kinds import OHEMSampler, IoUBalancedNegSampler, InstanceBalancedPosSampler, CombinedSampler, PseudoSampler
from visdet.nn.score_hlr import ScoreHLRSampler
from visdet.nn.roi_extract import SingleRoIExtractor, GenericRoIExtractor
from visdet.nn.dice import DiceLoss
from visdet.models.zoo import Detector, list_models, create_model
from visdet.models.retinanet import retinanet
from visdet.models.fcos import fcos
from visdet.models.atss import atss
from visdet.models.gfl import gfl
from visdet.models.vfnet import vfnet
from visdet.models.tood import tood
from visdet.models.faster_rcnn import faster_rcnn
from visdet.models.mask_rcnn import mask_rcnn
from visdet.models.cascade import cascade_rcnn, cascade_mask_rcnn
from visdet.models.double_head_rcnn import double_head_rcnn
from visdet.models.mask_scoring_rcnn import mask_scoring_rcnn
from visdet.models.ssd import ssd
from visdet.models.deformable_detr import deformable_detr
from visdet.models.dino import dino
from visdet.models.yolox import yolox, load_yolox, yolox_norm
from visdet.models.rtmdet import rtmdet
from visdet.models.rtmdet_ins import rtmdet_ins
from visdet.models.torchvision import load_torchvision, from_torchvision
from visdet.eval.evaluate import evaluate, Evaluation, CocoEvaluator
from visdet.engine.all import det_learner, DetLoss, FusedAdamW, EMA, Checkpoint, TrainingError, coco_columns, Preflight, preflight
from visdet.deploy.save import save_model, load_model, read_card
from visdet.deploy.predict import Predictor, load, as_predictor
from visdet.runner.simple import SimpleRunner
