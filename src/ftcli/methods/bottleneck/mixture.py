"""Several bottlenecks in one place, one of them taken at a time, and their average.

Legend: ``M`` targets of a batch, ``C`` of a chunk, ``V`` vocabulary, ``D`` width of the residual stream.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ftcli.layout.model import inner_model
from ftcli.methods.bottleneck.layer import Bottleneck, bottleneck_layers
from ftcli.methods.parameter_groups import rest
from ftcli.models.head import HeadTransform, chunk_size

if TYPE_CHECKING:
    from ftcli.layout.batch import Batch
    from ftcli.layout.model import TreeModel

ADAPTER = "default"


class Routes:
    """Which of a step's two routes the next forward pass takes; shared by all places of a model."""

    def __init__(self) -> None:
        self.current = 0

    @contextmanager
    def taken(self, route: int) -> Iterator[None]:
        """Forward passes inside take `route`."""
        before, self.current = self.current, route
        try:
            yield
        finally:
            self.current = before


class Mixture(Bottleneck):
    """Experts instead of one bottleneck: a route names a down and an up projection; evaluation computes with the average of each.

    All experts start as one, so that their average stays near each of them: on the embedded order task 60 steps ended at 0.15 nats a
    target, against 0.35 where every expert had random weights of its own.

    Source: Wang et al. 2022, arXiv:2205.12410, sections 3.1 to 3.4.
    """

    def __init__(self, first: Bottleneck, num_experts: int, sharing: str, routes: Routes) -> None:
        """
        Args:
            first: the first expert; norms, gate and scaling are its own, one for all.
            sharing: `down` or `up` for one projection that all experts have in common, or `none`.
        """
        nn.Module.__init__(self)
        self.non_linearity, self.scaling, self.dropout = first.non_linearity, first.scaling, first.dropout
        self.norm_before, self.norm_after, self.gate = first.norm_before, first.norm_after, first.gate
        self.downs = nn.ModuleList(copy.deepcopy(first.down) for _ in range(1 if sharing == "down" else num_experts))
        self.ups = nn.ModuleList(copy.deepcopy(first.up) for _ in range(1 if sharing == "up" else num_experts))
        self.routes = routes
        self.pairs = ((0, 0), (0, 0))
        """(down, up) of each of the step's two routes."""

    def projected(self, x: Tensor) -> Tensor:
        """``(..., D)`` through the expert of the route, or in evaluation through the average."""
        if self.training:
            down, up = self.pairs[self.routes.current]
            return cast("Tensor", self.ups[up](self.non_linearity(self.downs[down](x))))
        narrow = functional.linear(x, *_mean(self.downs))
        return functional.linear(self.non_linearity(narrow), *_mean(self.ups))

    def plain_state(self) -> dict[str, Tensor]:
        """The tensors of the average: one plain bottleneck."""
        state = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(("downs.", "ups."))}
        for name, experts in (("down", self.downs), ("up", self.ups)):
            state[f"{name}.weight"], state[f"{name}.bias"] = _mean(experts)
        return state

    def draw(self, generator: random.Random) -> None:
        """Draw both routes anew; the projections of neither rest."""
        self.pairs = cast("Any", tuple((generator.randrange(len(self.downs)), generator.randrange(len(self.ups))) for _ in range(2)))

    def settle(self, num_routes: int) -> None:
        """Let what no route of the step takes rest."""
        for part, experts in enumerate((self.downs, self.ups)):
            taken = {pair[part] for pair in self.pairs[:num_routes]}
            for index, expert in enumerate(experts):
                for parameter in expert.parameters():
                    rest(parameter, index not in taken)


def _mean(experts: nn.ModuleList) -> tuple[Tensor, Tensor]:
    """Mean weight and bias; of one expert exactly its own."""
    if len(experts) == 1:
        return experts[0].weight, experts[0].bias  # type: ignore[return-value]
    weights, biases = zip(*((expert.weight, expert.bias) for expert in experts), strict=True)
    return torch.stack(weights).mean(0), torch.stack(biases).mean(0)


def mixtures(module: nn.Module) -> list[Mixture]:
    """Every mixture in the model, in its order."""
    return [child for child in module.modules() if isinstance(child, Mixture)]


def multiply(module: nn.Module, num_experts: int, sharing: str) -> None:
    """Replace every bottleneck of an adapted model by a mixture of its likes."""
    routes = Routes()
    for _, layer in bottleneck_layers(module):
        first = cast("Bottleneck", layer.bottleneck_adapters[ADAPTER])
        layer.bottleneck_adapters[ADAPTER] = Mixture(first, num_experts, sharing, routes)


def draw_routes(module: nn.Module, generator: random.Random, num_routes: int) -> None:
    """The routes of a step, independent in every place, and recomputation that keeps to them."""
    found = mixtures(module)
    for mixture in found:
        mixture.draw(generator)
        mixture.settle(num_routes)
    _keep_routes(module, found[0].routes)


def _keep_routes(module: nn.Module, routes: Routes) -> None:
    """Let layers that are recomputed in the backward pass take the route they took in the forward pass."""
    for layer in module.modules():
        compute = layer.__dict__.get("_gradient_checkpointing_func")
        if compute is not None and not isinstance(compute, RoutedCheckpoint):
            layer._gradient_checkpointing_func = RoutedCheckpoint(compute, routes)  # type: ignore[assignment]


class RoutedCheckpoint:
    """A checkpoint function that remembers the route."""

    def __init__(self, compute: Callable[..., Any], routes: Routes) -> None:
        self.compute, self.routes = compute, routes

    def __call__(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        route = self.routes.current

        def again(*inner: Any, **inner_options: Any) -> Any:
            with self.routes.taken(route):
                return function(*inner, **inner_options)

        return self.compute(again, *arguments, **options)


class Consistency:
    """How far two routes of a step disagree: ½ (KL(p1 || p2) + KL(p2 || p1)) over the targets.

    Source: Wang et al. 2022, arXiv:2205.12410, equation 5.
    """

    reads_hidden = True

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def loss_sum(self, model: TreeModel, batch: Batch, hidden: Tensor) -> Tensor:
        """Nats, summed over the batch's weighted targets; the logits of a few targets are held at a time."""
        routes = mixtures(model.module)[0].routes
        with routes.taken(1):
            other = model.hidden_states(batch)
        head = inner_model(model.module).get_output_embeddings()
        size = chunk_size(int(getattr(head, "out_features", 0)) or 2**15, hidden)
        total = hidden.new_zeros((), dtype=torch.float32)
        for rows, weights in zip(batch.predict_from.split(size), batch.weights.split(size), strict=True):
            part = checkpoint(symmetric_kl, hidden[rows], other[rows], weights, head, model.transform, use_reentrant=False)
            total = total + cast("Tensor", part)
        return self.weight * total


def symmetric_kl(first: Tensor, second: Tensor, weights: Tensor, head: nn.Module, transform: HeadTransform) -> Tensor:
    """Weighted sum over targets of ½ (KL(p1 || p2) + KL(p2 || p1)) = ½ Σ (p1 - p2) (ln p1 - ln p2), a scalar in nats.

    Args:
        first: ``(C, D)`` states that the first distribution is made from.
        second: ``(C, D)`` those of the second.
        weights: ``(C,)`` of the targets.
    """
    ours, theirs = (transform(head(states)).log_softmax(-1) for states in (first, second))
    return 0.5 * (((ours.exp() - theirs.exp()) * (ours - theirs)).sum(-1) * weights).sum()
