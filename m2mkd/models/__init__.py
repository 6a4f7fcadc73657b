"""Whole networks; importing this package registers the students with timm."""

from m2mkd.models import official
from m2mkd.models.build import (
    create_meta,
    create_network,
    create_vit,
    load_pretrained_vit,
    resolve_depths,
    start_as_teacher,
)
from m2mkd.models.nac import NAC
from m2mkd.models.nac_stages import split_nac
from m2mkd.models.stages import (
    ViTStage,
    balanced_depths,
    check_depths,
    count_flops,
    cut_evenly,
    split_vit,
)
from m2mkd.models.upcycle import upcycle, upcycle_from
from m2mkd.models.vmoe import VMoE

__all__ = [
    "NAC",
    "VMoE",
    "ViTStage",
    "balanced_depths",
    "check_depths",
    "count_flops",
    "create_meta",
    "create_network",
    "create_vit",
    "cut_evenly",
    "load_pretrained_vit",
    "official",
    "resolve_depths",
    "split_nac",
    "split_vit",
    "start_as_teacher",
    "upcycle",
    "upcycle_from",
]
