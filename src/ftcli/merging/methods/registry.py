"""Every merge method, one line each, with the parameters that a recipe may set."""

from __future__ import annotations

from typing import Literal

from ftcli.merging.methods import linear, model_stock, nearswap, ram, sce, spherical, task_vectors, weighted_by_data
from ftcli.merging.methods.method import REQUIRED, MergeMethod, Parameter, all_zero, always, no_positive_weight, sums_to_one, weights_cancel

_WEIGHT = Parameter("weight", REQUIRED, "share of the model", per_model=True)
_EVEN = Parameter("weight", 1.0, "share of the model; the default is the same for all", per_model=True)
_DENSITY = Parameter("density", 1.0, "share of each tensor's changes that is kept", per_model=True, minimum=0, maximum=1)
_LAMBDA = Parameter("lambda", 1.0, "factor of the sum of all changes")
_MASK = Parameter("int8_mask", False, "taken from mergekit's files and without effect: masks are never stored", "boolean")
_T = Parameter("t", REQUIRED, "way from the base (0) to the model (1)", minimum=0, maximum=1)
_ELECT = (
    Parameter("elect", "weighted", "whose sum decides the sign", "choice", choices=("weighted", "sum", "count")),
    Parameter(
        "divide",
        "weights",
        "what `normalize` divides by: the weights or the number of those that agree",
        "choice",
        choices=("weights", "count"),
    ),
)


def _normalize(default: bool) -> Parameter:
    return Parameter("normalize", default, "divide by the sum of the weights", "boolean")


def _rescale(default: bool) -> Parameter:
    help_text = "make up for what was dropped: `true` by 1 / probability, `l1` by the sum of magnitudes"
    return Parameter("rescale", default, help_text, "choice", choices=(True, False, "l1"))


def _changes(normalize: bool, *more: Parameter) -> tuple[Parameter, ...]:
    return (_WEIGHT, _LAMBDA, _normalize(normalize), _MASK, *more)


_SCOPE = Parameter("scope", "tensor", "trim each tensor to its density, or all of them together", "choice", choices=("tensor", "global"))
_EPSILON = Parameter("epsilon", 0.15, "half the range of the probabilities around the density", per_model=True, minimum=0, maximum=1)
_GAMMA = Parameter("gamma", 0.01, "share of the largest changes that is dropped", per_model=True, minimum=0, maximum=1)
_MOST = Parameter("alpha", 0.2, "largest ratio that counts", minimum=0)
_NOISE = Parameter("epsilon", 1e-5, "magnitude up to which a change counts as none", minimum=0)
_BOTH: Literal["required"] = "required"

ALL = (
    MergeMethod(
        "linear", linear.linear, "weighted average",
        (_WEIGHT, _normalize(True)), "ignored", keeps_base=False, fault=all_zero, is_mean=sums_to_one,
    ),
    MergeMethod(
        "wise_ft", linear.wise_ft, "straight line from the base to one model",
        (Parameter("alpha", REQUIRED, "way from the base (0) to the model (1)", minimum=0, maximum=1),), _BOTH, (1, 1),
    ),
    MergeMethod(
        "passthrough", linear.passthrough, "one model's layers, copied",
        (Parameter("scale", None, "factor of the tensor", per_model=True),), "ignored", (1, 1), keeps_base=False,
    ),
    MergeMethod("slerp", spherical.slerp, "arc from the base to one model", (_T,), _BOTH, (1, 1), is_symmetric=False),
    MergeMethod(
        "nuslerp", spherical.nuslerp, "arc between two models, or between what they change of a base",
        (
            _WEIGHT,
            Parameter("nuslerp_flatten", True, "take the tensor as one vector", "boolean"),
            Parameter("nuslerp_row_wise", False, "without flatten: by columns (as mergekit computes it) instead of by rows", "boolean"),
        ),
        "optional", (2, 2), keeps_base=False, is_symmetric=False, fault=no_positive_weight, is_mean=always,
    ),
    MergeMethod(
        "karcher", spherical.karcher, "weighted mean on the sphere",
        (
            _EVEN,
            Parameter("max_iter", None, "most iterations; the default is until nothing moves", "whole", minimum=0),
            Parameter("tol", None, "taken from mergekit's files and without effect: the iterations are on numbers, not tensors"),
        ),
        "ignored", keeps_base=False, fault=no_positive_weight, is_mean=always,
    ),
    MergeMethod(
        "multislerp", spherical.multislerp, "weighted sum of directions, as mergekit computes it",
        (
            _WEIGHT,
            Parameter("normalize_weights", True, "divide the weights by their sum", "boolean"),
            Parameter("eps", None, "taken from mergekit's files and without effect"),
        ),
        "optional", keeps_base=False, fault=no_positive_weight, is_mean=sums_to_one,
    ),
    MergeMethod("task_arithmetic", task_vectors.task_arithmetic, "base + weighted changes", _changes(False), _BOTH, fault=weights_cancel),
    MergeMethod("ties", task_vectors.ties, "trim, elect a sign, merge", _changes(True, _DENSITY, _rescale(False), _SCOPE, *_ELECT), _BOTH),
    MergeMethod(
        "dare_linear", task_vectors.dare_linear, "drop at random, add",
        _changes(False, _DENSITY, _rescale(True)), _BOTH, fault=weights_cancel,
        is_random=True,
    ),
    MergeMethod(
        "dare_ties", task_vectors.dare_ties, "drop at random, elect a sign",
        _changes(False, _DENSITY, _rescale(True), *_ELECT), _BOTH,
        is_random=True,
    ),
    MergeMethod(
        "della_linear", task_vectors.della_linear, "drop by rank and chance, add",
        _changes(False, _DENSITY, _EPSILON, _rescale(True)), _BOTH, fault=lambda s: task_vectors.della_fault(s) or weights_cancel(s),
        is_random=True,
    ),
    MergeMethod(
        "della", task_vectors.della, "drop by rank and chance, elect a sign",
        _changes(True, _DENSITY, _EPSILON, _rescale(True), *_ELECT), _BOTH, fault=task_vectors.della_fault,
        is_random=True,
    ),
    MergeMethod(
        "breadcrumbs", task_vectors.breadcrumbs, "drop the largest and smallest, add",
        _changes(False, _DENSITY, _GAMMA, _rescale(False)), _BOTH, fault=weights_cancel,
    ),
    MergeMethod(
        "breadcrumbs_ties", task_vectors.breadcrumbs_ties, "drop the largest and smallest, elect a sign",
        _changes(False, _DENSITY, _GAMMA, _rescale(False), *_ELECT), _BOTH,
    ),
    MergeMethod(
        "sce", sce.sce, "select by variance, weigh by energy, erase minority signs",
        (Parameter("select_topk", 1.0, "share of the differing positions that is merged", minimum=0, maximum=1), _MASK), _BOTH,
        is_mean=always,
    ),
    MergeMethod(
        "model_stock", model_stock.model_stock, "as far from the base as the models agree",
        (Parameter("filter_wise", False, "one ratio for each row instead of each tensor", "boolean"),), _BOTH, (2, None),
        is_mean=always,
    ),
    MergeMethod("ram", ram.ram, "unique changes whole, shared ones averaged", (_NOISE,), _BOTH),
    MergeMethod(
        "ramplus_tl", ram.ramplus_tl, "as ram, unique changes enlarged",
        (_NOISE, Parameter("r", 0.1, "strength of the enlargement", minimum=0), _MOST), _BOTH,
    ),
    MergeMethod(
        "nearswap", nearswap.nearswap, "base moved by at most t towards the model",
        (Parameter("t", REQUIRED, "largest change of a weight", minimum=0),), _BOTH, (1, 1), is_symmetric=False,
    ),
    MergeMethod("arcee_fusion", nearswap.arcee_fusion, "the important changes of one model", (), _BOTH, (1, 1), is_symmetric=False),
    MergeMethod(
        "fisher", weighted_by_data.fisher, "average weighted by Fisher information", (_EVEN,), "ignored",
        keeps_base=False, statistics="elementwise", fault=weights_cancel, is_mean=always,
    ),
    MergeMethod(
        "regmean", weighted_by_data.regmean, "nearest outputs on each model's data",
        (_EVEN, Parameter("alpha", 0.9, "factor of the Gram matrices off their diagonal", minimum=0, maximum=1)), "ignored",
        keeps_base=False, statistics="inputs", fault=weights_cancel, is_mean=always,
    ),
)  # fmt: skip

METHODS = {method.name: method for method in ALL}
"""Every merge method by its name in a recipe."""
