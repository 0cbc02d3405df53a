"""Steps along the orthogonal polar factor of each weight matrix's momentum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from onestep._interrupts import undisturbed
from onestep._processes import add_up
from onestep.evaluation.errors import NonFiniteError
from onestep.linalg import polar_ex
from onestep.optim._hidden import Layout, blocks_by_identity, is_transposed, known_of, layout
from onestep.optim._input_gram import InputGrams, damped_inverse

# Settings of the other optimisers, which a param group may bring by mistake.
_OF_DAMPED_METHODS = {"damping", "damping_decrease", "damping_increase", "cg_iterations", "cg_tolerance"}
_NOT_NEGATIVE = ("lr", "adam_lr", "weight_decay", "eps", "gram_damping")


class PolarGrad(torch.optim.Optimizer):
    """Trains hidden weight matrices by polar steps and everything else by Adam, in one optimiser without a closure.

    For a matrix W (n,m) with gradient G: B ← μB + (1 − μ)G, M = (1 − μ)G + μB (``nesterov``) or B, and
    W ← (1 − lr·weight_decay)W − lr·0.2√max(n,m)·polar(MC), where polar is the orthogonal factor of
    ``onestep.linalg.polar``, and C = (E[xxᵀ] + δI)⁻¹ over the inputs x of the layer, or I. So all singular values of a
    step are the same, and its elements are of the size of Adam's. (Lau, Long and Su, "PolarGrad", arXiv 2505.21799;
    Jordan et al., "Muon", 2024; C: "Newton-Muon", arXiv 2604.01472.)

    Hidden matrices are the weights of linear layers and convolutions; kernels are flattened to (out, in·…). Embeddings,
    the head, biases and norms are left to Adam. With a module these are told apart by the layers they belong to, the
    head being ``get_output_embeddings()`` or the last layer in the module's order; with (name, parameter) pairs by
    their names; of parameters alone each with two or more dimensions is hidden. A group with ``"polar": True`` or
    ``False`` decides for itself. After construction each group is one of either kind, with its own ``lr``, and
    schedulers that multiply rates keep their proportion. OneCycleLR and CyclicLR set rates: give them one a group.

    Matrices of equal shape are solved for in one call. For a module wrapped in DistributedDataParallel the solves are
    shared out over its processes, and all get the same bits.

    Args:
        params: a module, or an iterable of parameters, of (name, parameter), or of groups of these, in float32,
            float64, bfloat16 or float16.
        lr: of hidden matrices.
        momentum: μ, from 0, less than 1.
        nesterov: whether M looks ahead.
        gram_every: C is taken anew from the inputs of every so many-th step, which costs something in that step's
            forward pass alone. None, or params other than a module, for C = I. For a module under torch.compile
            pass None: hooks that come and go would compile it anew.
        adam_lr: the rate of the rest; also a group's, in which ``lr`` is that of its matrices.
        betas, eps: Adam's.
        weight_decay: decoupled, of parameters with two or more dimensions.
        gram_damping: δ over the mean of the diagonal of E[xxᵀ].
        iterations, lower: those of ``onestep.linalg.polar``.
        blocks: for weights by name, of how many matrices stacked along its outputs each consists. Weights with three
            times as many outputs as inputs are taken for those of queries, keys and values, thus for 3 blocks.
        process_group: over which the solves are shared out; None for that of a DistributedDataParallel, or none. All
            its processes must have the same parameters and gradients.

    Raises:
        NonFiniteError: (``step``) a gradient holds NaN or infinity; nothing has changed. On a GPU, where looking would
            wait for it, such a gradient makes its parameter NaN, as with torch's optimisers; GradScaler looks before.
        ValueError, TypeError: an argument is not what it should be.

    Examples:
        >>> import torch
        >>> from onestep.optim import PolarGrad
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> optimizer = PolarGrad(model)
        >>> model(torch.ones(16, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> [(group["polar"], group["param_names"]) for group in optimizer.param_groups]
        [(True, ['0.weight']), (False, ['0.bias', '2.weight', '2.bias'])]
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-2,
        momentum: float = 0.95,
        nesterov: bool = True,
        gram_every: int | None = 32,
        *,
        adam_lr: float = 5e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        gram_damping: float = 0.2,
        iterations: int = 2,
        lower: float = 1e-2,
        blocks: Mapping[str, int] | None = None,
        process_group: Any = None,
    ) -> None:
        if gram_every is not None and (
            isinstance(gram_every, bool) or not isinstance(gram_every, int) or gram_every < 1
        ):
            raise ValueError(f"gram_every={gram_every!r}; expected an integer of at least 1, or None")
        module = params
        if isinstance(params, nn.parallel.DistributedDataParallel):
            process_group, module = process_group or params.process_group, params.module
        self._known, groups, model = known_of(module)
        self._blocks = blocks_by_identity(blocks or {}, self._known.names)
        self._layouts: dict[int, Layout] = {}
        self._process_group = process_group
        self._grams: InputGrams | None = None
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "adam_lr": adam_lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "gram_every": gram_every if model is not None else None,
            "gram_damping": gram_damping,
            "iterations": iterations,
            "lower": lower,
            "steps": 0,
        }
        super().__init__(groups, defaults)
        if model is not None and gram_every is not None:
            self._grams = InputGrams(model, set(self._layouts))
            self._collect_where_due()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """How matrices are cut into blocks is a setting of the groups; copies have no module to take inputs from."""
        super().__setstate__(state)
        # load_state_dict comes here too, and keeps the module.
        if not hasattr(self, "_known"):
            self._known, _, _ = known_of([p for group in self.param_groups for p in group["params"]])
            self._blocks, self._grams, self._process_group = {}, None, None
        self._layouts = {
            id(p): Layout(*cut)
            for group in self.param_groups
            if group["polar"]
            for p, cut in zip(group["params"], group["layouts"], strict=True)
        }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as two where it holds hidden matrices and others.

        Args:
            param_group: "params", and settings that differ from the defaults; ``"polar"`` decides for all members.

        Raises:
            ValueError: a setting or a parameter is not what it should be, a setting is one of the damped optimisers, or
                a parameter is in a group already.
            TypeError: a parameter is no tensor.
        """
        group = dict(param_group)
        foreign = sorted(_OF_DAMPED_METHODS & group.keys())
        if foreign:
            raise ValueError(
                f"{foreign[0]} is given in a param group; expected settings of PolarGrad, which takes no damped steps "
                "(gram_damping is for the inverse of the inputs' Gram matrix)"
            )
        given = group.pop("params")
        members = [given] if isinstance(given, Tensor) else list(given)
        parameters = [member[1] if isinstance(member, tuple) else member for member in members]
        for parameter in parameters:
            self._check_parameter(parameter)
        settings = self.defaults | group
        _check_settings(settings)
        hidden = [
            bool(group["polar"]) if group.get("polar") is not None else id(p) not in self._known.others
            for p in parameters
        ]
        for polar in (True, False):
            part = [member for member, is_hidden in zip(members, hidden, strict=True) if is_hidden == polar]
            if not part:
                continue
            own = dict(group) | {"params": part, "polar": polar}
            if polar:
                chosen = [p for p, is_hidden in zip(parameters, hidden, strict=True) if is_hidden]
                for p in chosen:
                    if p.dim() < 2:
                        raise ValueError(
                            f"a group with polar=True holds a parameter of shape {tuple(p.shape)}; expected matrices"
                        )
                    self._layouts[id(p)] = layout(p, self._blocks.get(id(p)), id(p) in self._known.transposed)
                # Plain numbers, which go into checkpoints.
                own["layouts"] = [tuple(self._layouts[id(p)]) for p in chosen]
            else:
                own["lr"] = settings["adam_lr"]
            super().add_param_group(own)

    @staticmethod
    def _check_parameter(parameter: Any) -> None:
        if not isinstance(parameter, Tensor):
            raise TypeError(f"params holds {type(parameter).__name__}; expected tensors")
        if not parameter.is_floating_point():
            raise TypeError(f"params holds a tensor of {parameter.dtype}; expected a real floating-point type")
        if parameter.numel() == 0:
            raise ValueError(f"params holds a tensor of shape {tuple(parameter.shape)}, without elements")

    @undisturbed
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step from the gradients that are there.

        Args:
            closure: computes the loss and the gradients first, if given.

        Returns:
            What the closure returned.

        Raises:
            TypeError: a gradient is sparse.
            NonFiniteError: a gradient on the CPU holds NaN or infinity. No parameter has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        self._take_grams()
        work = [matrices for group in self.param_groups if group["polar"] for matrices in self._momenta(group)]
        factors = self._polar_factors(work)
        for group in self.param_groups:
            if group["polar"]:
                self._move(group, factors)
            else:
                self._adam(group)
            group["steps"] += 1
        self._collect_where_due()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; the inputs of the next step are collected again if that is due.

        Args:
            state_dict: what ``state_dict`` of an optimiser of the same parameters gave.

        Raises:
            ValueError: it is of other groups (torch's own).
        """
        super().load_state_dict(state_dict)
        if self._grams is not None:
            self._grams.take()
        self._collect_where_due()

    # Gradients.

    def _check_gradients(self) -> None:
        for group in self.param_groups:
            names = group.get("param_names")
            for number, parameter in enumerate(group["params"]):
                gradient = parameter.grad
                if gradient is None:
                    continue
                if gradient.layout != torch.strided:
                    raise TypeError(f"{_called(names, number)} has a sparse gradient; expected a dense one")
                # One infinite or NaN element makes the sum so; a sum that overflows is looked at again.
                if (
                    gradient.device.type == "cpu"
                    and not math.isfinite(gradient.sum().item())
                    and not gradient.isfinite().all()
                ):
                    raise NonFiniteError(f"the gradient of {_called(names, number)} holds NaN or infinity")

    def _momenta(self, group: dict[str, Any]) -> list[_Momenta]:
        """The matrices whose factors are wanted: those of equal shape, device and dtype in one batch."""
        members: dict[Any, list[tuple[Tensor, Layout]]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                cut = self._layouts[id(parameter)]
                members.setdefault((cut.rows, cut.columns, parameter.device, parameter.dtype), []).append(
                    (parameter, cut)
                )
        batches = []
        mu = group["momentum"]
        for (rows, columns, device, dtype), own in members.items():
            stacked = torch.empty(sum(cut.blocks for _, cut in own), rows, columns, device=device, dtype=dtype)
            places = stacked.split([cut.blocks for _, cut in own])
            for (parameter, cut), place in zip(own, places, strict=True):
                gradient = parameter.grad
                assert gradient is not None
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
                buffer = state["momentum_buffer"].lerp_(gradient, 1 - mu)
                inverse = state.get("gram_inverse")
                # The last operation writes to the batch, unless the blocks are of columns.
                target = None if cut.by_columns else place.view(parameter.shape)
                ahead = buffer
                if group["nesterov"]:
                    ahead = torch.lerp(gradient, buffer, mu, out=target if inverse is None else None)
                if inverse is not None:
                    transposed = id(parameter) in self._known.transposed
                    ahead = inverse @ ahead if transposed else torch.mm(ahead, inverse, out=target)
                if ahead is not target:
                    place.copy_(cut.matrices(ahead.contiguous()))
            batches.append(_Momenta(stacked, [p for p, _ in own], group["iterations"], group["lower"]))
        return batches

    def _polar_factors(self, work: list[_Momenta]) -> dict[int, Tensor]:
        """The factors (blocks,n,m) of each parameter's matrices, by its identity."""
        shared = self._process_group is not None and dist.get_world_size(self._process_group) > 1
        for batch in work:
            if shared:
                batch.factors = batch.stacked.new_zeros(batch.stacked.shape, dtype=_computed(batch.stacked.dtype))
                rank, size = dist.get_rank(self._process_group), dist.get_world_size(self._process_group)
                part = slice(len(batch.stacked) * rank // size, len(batch.stacked) * (rank + 1) // size)
                if part.start < part.stop:
                    batch.factors[part] = batch.solve(part)
            else:
                batch.factors = batch.solve(slice(None))
        if shared:
            # All but one process have zeros in each place, which change no bit.
            for device, dtype in {(batch.factors.device, batch.factors.dtype) for batch in work}:
                own = [b for b in work if (b.factors.device, b.factors.dtype) == (device, dtype)]
                flat = torch.cat([batch.factors.reshape(-1) for batch in own])
                add_up(flat, group=self._process_group)
                for batch, values in zip(own, flat.split([batch.factors.numel() for batch in own]), strict=True):
                    batch.factors = values.view(batch.factors.shape)
        result: dict[int, Tensor] = {}
        for batch in work:
            counts = [self._layouts[id(p)].blocks for p in batch.parameters]
            result |= {id(p): part for p, part in zip(batch.parameters, batch.factors.split(counts), strict=True)}
        return result

    def _move(self, group: dict[str, Any], factors: dict[int, Tensor]) -> None:
        lr = float(group["lr"])
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            cut, factor = self._layouts[id(parameter)], factors[id(parameter)]
            if group["weight_decay"]:
                parameter.mul_(1 - lr * group["weight_decay"])
            if cut.by_columns:
                factor = factor.transpose(0, 1).reshape(parameter.shape)
            parameter.add_(factor.reshape(parameter.shape).to(parameter.dtype), alpha=-lr * cut.scale)

    def _adam(self, group: dict[str, Any]) -> None:
        for decays in (True, False):
            own = [p for p in group["params"] if p.grad is not None and (p.dim() >= 2) == decays]
            if not own:
                continue
            for parameter in own:
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            states = [self.state[parameter] for parameter in own]
            adamw(
                own,
                [parameter.grad for parameter in own],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                # On a GPU the fused kernel wants its count of steps there; several tensors at a time cost little more.
                fused=all(parameter.device.type == "cpu" for parameter in own),
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"] if decays else 0.0,
                eps=group["eps"],
                maximize=False,
            )

    # The inputs' second moments.

    def _collect_where_due(self) -> None:
        """Registers hooks if the next step is one that takes them."""
        if self._grams is not None and any(_is_due(group) for group in self.param_groups):
            self._grams.begin()

    def _take_grams(self) -> None:
        if self._grams is None or not self._grams.collecting:
            return
        sums, counts = self._grams.take()
        for group in self.param_groups:
            if not _is_due(group):
                continue
            for parameter in group["params"]:
                identity = id(parameter)
                # With several processes each has seen its own rows, or none if the layer was not run there.
                gram, count = sums.get(identity), counts.get(identity, 0)
                if self._process_group is not None and identity in self._grams.layers:
                    layer = self._grams.layers[identity]
                    d = parameter.shape[0 if is_transposed(layer) else 1]
                    gram = parameter.new_zeros(d, d) if gram is None else gram
                    rows = torch.tensor(float(count), device=gram.device)
                    add_up(gram, rows, group=self._process_group)
                    count = int(rows)
                if gram is None or not count:
                    continue
                inverse, failed = damped_inverse(gram / count, group["gram_damping"])
                usable = (failed == 0) & inverse.isfinite().all()
                identity_matrix = torch.eye(len(inverse), dtype=inverse.dtype, device=inverse.device)
                inverse = torch.where(usable, inverse, identity_matrix)
                self.state[parameter]["gram_inverse"] = inverse.to(parameter.dtype)


class _Momenta:
    """Matrices of equal shape, and what is to be done with them.

    Attributes:
        stacked: (B,n,m).
        parameters: whose blocks they are, one parameter's after another's.
        factors: (B,n,m), when they have been solved for.
    """

    def __init__(self, stacked: Tensor, parameters: list[Tensor], iterations: int, lower: float) -> None:
        self.stacked, self.parameters, self.iterations, self.lower = stacked, parameters, iterations, lower
        self.factors = stacked

    def solve(self, part: slice) -> Tensor:
        """The polar factors of a part of the batch."""
        return polar_ex(self.stacked[part], iterations=self.iterations, lower=self.lower).factor


def _computed(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _is_due(group: dict[str, Any]) -> bool:
    return bool(group["polar"] and group["gram_every"] and group["steps"] % group["gram_every"] == 0)


def _called(names: list[str] | None, number: int) -> str:
    return repr(names[number]) if names else f"parameter {number}"


def _check_settings(group: dict[str, Any]) -> None:
    for name in _NOT_NEGATIVE:
        if not 0 <= float(group[name]) < math.inf:
            raise ValueError(f"{name}={group[name]}; expected a finite number >= 0")
    for name, value in (("momentum", group["momentum"]), *(("betas", beta) for beta in group["betas"])):
        if not 0 <= value < 1:
            raise ValueError(f"{name}={group[name]}; expected from 0, less than 1")
    iterations = group["iterations"]
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 1:
        raise ValueError(f"iterations={iterations!r}; expected an integer of at least 1")
    if not 0 < group["lower"] <= 1:
        raise ValueError(f"lower={group['lower']}; expected a number from 0 (not itself) to 1")
