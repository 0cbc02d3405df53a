"""onestep.fit: from a model, data and a loss to fitted parameters."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onestep.evaluation.data import Chunk, Source, as_source
from onestep.evaluation.distributed import from_first, same_everywhere, share, together
from onestep.evaluation.losses import Loss, as_loss
from onestep.evaluation.module import call_model, chunk_rows, eval_mode, warn_of_eval_mode
from onestep.evaluation.parameters import ParameterVector
from onestep.evaluation.progress import Progress
from onestep.optim import GaussNewton, LevenbergMarquardt, NewtonCG, NonFiniteError, StepReport
from onestep.optim._gradient_descent import GradientDescent
from onestep.optim._optimizer import DampedOptimizer
from onestep.training import checkpoint as checkpoints
from onestep.training import closed_form, softmax_head
from onestep.training.glm_head import HeadObjective, is_glm
from onestep.training.head import find_head
from onestep.training.objective import DataObjective
from onestep.training.perceptron import PerceptronObjective, find_perceptron
from onestep.training.result import FitResult, Record
from onestep.training.vocabulary_head import VocabularyObjective, find_vocabulary_head

OPTIMIZERS: dict[str, type[DampedOptimizer]] = {
    "levenberg_marquardt": LevenbergMarquardt,
    "gauss_newton": GaussNewton,
    "newton_cg": NewtonCG,
    "gradient_descent": GradientDescent,
}
METHODS = ("auto", "closed_form", *OPTIMIZERS)

# Up to so many parameters "auto" forms the Gauss-Newton matrix.
_MOST_DENSE = 2048
# Levenberg-Marquardt takes curvature over so many rows a parameter, and over all where that is cheap anyway.
_ROWS_PER_PARAMETER = 4
_CHEAP_FLOPS = 1e9
# With curvature from such a sample, steps keep some of their momentum, and the first ones are cautious.
_MOMENTUM = 0.7
_DAMPING = 1.0
# So many times what a gradient keeps is what forward over reverse mode does.
_HESSIAN_MEMORY = 4
# Each batch of a matrix-free method is cut into so many pieces, whatever the number of processes up to as many; into
# fewer if a piece had less than such a part of a chunk, which is not worth a call of its own.
_PIECES, _LEAST_PIECE = 4, 32
# A loss whose root is under so many ε of the first one's is zero, and so small a part of a loss is noise.
_ROUNDINGS = 10
_ESTIMATED = "estimated in one pass; method='newton_cg' from here ends at the minimum"
# Mini-batches in a row that may fail to give a step before fit gives up.
_MOST_FAILURES = 10


def fit(
    model: nn.Module,
    data: Any,
    loss: str | Callable[[Tensor, Any], Tensor] = "mse",
    *,
    method: str = "auto",
    max_steps: int = 50,
    tol: float = 1e-6,
    damping: float | None = None,
    weight_decay: float = 0.0,
    batch_size: int | None = None,
    curvature_batch_size: int | None = None,
    chunk_size: int | None = None,
    cg_iterations: int | None = None,
    initialize: bool = False,
    seed: int = 0,
    progress: bool = True,
    checkpoint: str | PathLike[str] | None = None,
) -> FitResult:
    """Fits the trainable parameters of a model by solving for them: θ ← θ - (B + damping·D)⁻¹∇loss, until converged.

    Starts from the parameters that the model has. Where the outputs are affine in them and the loss is quadratic, one
    step over one pass is exact. A step that would raise the loss is taken back. The model is evaluated in eval mode
    (dropout off, batch norm with its running statistics), because a solve needs a loss that depends on the parameters
    alone; parameters with requires_grad=False stay as they are.

    Under torch.distributed (``torchrun --nproc-per-node=2``) every process calls fit with the same arguments and
    computes its share of each batch. The parameters are those of one process to rounding; matrix-free methods, whose
    conjugate gradients would magnify it, give the same bits on two processes of as many threads.

    Args:
        model: any module that returns a tensor, (n,…) for n rows.
        data: a pair of tensors (inputs, target), a Dataset of such pairs, or a DataLoader (any iterable that can be
            read again) of such batches. Inputs may be a tuple or a dict of tensors, which is unpacked.
        loss: "mse" (mean over all elements), "cross_entropy" (class indices; -100 is ignored), "poisson" (the model
            gives the logarithm of the rate), or a function (outputs, target) → mean over the rows it was given.
        method: "closed_form" (for "cross_entropy" an estimate of a linear head, which Newton steps close; rows of a
            DataLoader should come in random order), "levenberg_marquardt" (forms the p × p Gauss-Newton matrix),
            "gauss_newton" and "newton_cg" (matrix-free), "gradient_descent" (the baseline), or "auto": the first that
            fits.
        max_steps: at most so many steps.
        tol: converged when the loss can be lowered by no more than tol² of itself, as far as the method's matrix tells;
            without one, or where damping hides it, when the gradient norm is under tol times the first one and a step
            promises less than tol of the loss. Where the loss can get no lower but the matrix is singular, or a
            parameter has lost its influence, that is not convergence. With ``batch_size`` none of this is tested.
        damping: initial damping, else the method's own.
        weight_decay: adds ½ weight_decay ‖θ‖² to the loss.
        batch_size: rows a step, for data that does not fit in memory or many steps; None for all rows. A step is then
            judged on as many other rows, drawn anew each time; from a DataLoader, on those that come next.
        curvature_batch_size: rows over which B is taken, drawn anew each step; None for the rows of the step, or for
            Levenberg-Marquardt a sample that is large against the parameters.
        chunk_size: rows computed at a time; None for as many as keep 256 MiB for the backward pass.
        cg_iterations: at most so many iterations a solve, of a product each, for the matrix-free methods.
        initialize: whether to draw the trained layers' parameters anew first (``reset_parameters``, with ``seed``).
        seed: of everything random: the order of rows and the initialisation.
        progress: whether to show a bar with loss, damping, CG iterations and the time left. Needs tqdm.
        checkpoint: a file, written whole after each step. If it exists, the fit goes on from it and ends with the same
            bits as one that was never stopped.

    Returns:
        ``FitResult``. After Ctrl-C it is what was reached so far, with ``reason="interrupted"``.

    Raises:
        NonFiniteError: NaN or infinity in data, loss or gradient, naming step and batch; the model keeps the last good
            parameters.
        ValueError, TypeError: an argument is not what it should be.

    Examples:
        >>> import torch, onestep
        >>> X = torch.linspace(0, 1, 20)[:, None]
        >>> result = onestep.fit(torch.nn.Linear(1, 1), (X, 3 * X - 1), progress=False)
        >>> result.method, result.converged, round(result.model.weight.item(), 4)
        ('closed_form', True, 3.0)
    """
    _check(model, method, max_steps, tol, batch_size, curvature_batch_size, chunk_size, cg_iterations, weight_decay)
    parameters = ParameterVector([p for p in model.parameters() if p.requires_grad])
    function = as_loss(loss)
    source = as_source(data, seed)
    source.share = share()
    warn_of_eval_mode(model, "fit", 2)
    with eval_mode(model):
        if initialize:
            _reset(model, seed)
        same_everywhere([*model.parameters(), *model.buffers()])
        one_pass = method == "closed_form" and function.name == "cross_entropy"
        first, chunks = together(lambda: _peek(source, shuffled=one_pass))
        source.chunk_size = chunk_size or from_first(lambda: chunk_rows(model, function, first))
        session = _Session(model, parameters, function, source, max_steps, tol, weight_decay, batch_size, progress)
        chosen, why = from_first(lambda: _choose(method, model, parameters, function, first, batch_size))
        if chosen == "closed_form":
            try:
                return session.solve(chunks, why, seed)
            except closed_form.NotAffineError:
                if method != "auto":
                    raise
            # On the rows that were looked at first, it seemed to be.
            chosen, why = from_first(lambda: _choose_steps(model, parameters, function, first, affine=False))
        del chunks
        rows = curvature_batch_size
        if chosen == "levenberg_marquardt":
            rows = rows or _enough_rows(model, source, parameters, batch_size, first)
        if chosen != "levenberg_marquardt" or rows is not None:
            least = max(1, source.chunk_size // _LEAST_PIECE)
            source.share = source.share._replace(pieces=max(_PIECES, source.share.size), least=least)
        if chosen == "newton_cg" and chunk_size is None:
            source.chunk_size = max(1, source.chunk_size // _HESSIAN_MEMORY)
        session.rows_of_curvature = rows
        session.objective_type = _objective_type(chosen, model, parameters, function, first)
        optimizer = _optimizer(chosen, parameters, damping, weight_decay, cg_iterations, sampled=rows is not None)
        return session.iterate(optimizer, chosen, why, None if checkpoint is None else Path(checkpoint))


@dataclass
class _Session:
    """One call of fit."""

    model: nn.Module
    parameters: ParameterVector
    loss: Loss
    source: Source
    max_steps: int
    tol: float
    weight_decay: float
    batch_size: int | None
    progress: bool
    rows_of_curvature: int | None = None
    objective_type: Callable[..., DataObjective] = DataObjective

    def objective(self, step: int) -> DataObjective:
        """The mean loss over all rows, or over those of a step."""
        make = partial(
            self.objective_type,
            self.model,
            self.loss,
            pieces=self.source.share.pieces,
            kept_rows=self.source.chunk_size or 0,
            sampled=self.rows_of_curvature is not None,
        )
        if self.batch_size is None:
            return make(self.source.all, self.source.all, fixed=True)
        rows = self.rows_of_curvature
        batch = self.source.batch(step, self.batch_size)
        whole = min(self.batch_size, self.source.known_rows or self.batch_size)
        curvature = batch if rows is None else _leading(batch, rows, whole)
        # A step fits the noise of its own rows too, so others judge it.
        trial = self.source.others(step, self.batch_size)
        return make(_again(batch), _again(curvature), fixed=False, trial_chunks=_again(trial))

    def solve(self, chunks: Iterable[Chunk], why: str, seed: int) -> FitResult:
        """The closed form, or for cross-entropy the estimate that one pass gives."""
        exact = self.loss.name == "mse"
        begin = time.perf_counter()
        start = self.parameters.read()
        with Progress(1, enabled=self.progress) as bar:
            try:
                if exact:
                    solution = closed_form.solve(self.objective(0), self.parameters, chunks, self.weight_decay)
                else:
                    solution = softmax_head.solve(self.objective(0), self.parameters, chunks, self.weight_decay, seed)
            except KeyboardInterrupt:
                return FitResult(self.model, math.nan, False, "closed_form", why, "interrupted", math.nan)
            bar.update(loss=solution.loss)
        seconds = time.perf_counter() - begin
        step_norm = (self.parameters.read() - start).norm().item()
        record = Record(1, solution.loss, math.nan, step_norm, 0.0, True, 0, seconds)
        reason = f"solved exactly in one pass{solution.note}" if exact else _ESTIMATED
        return FitResult(self.model, solution.loss, exact, "closed_form", why, reason, solution.initial_loss, [record])

    def iterate(self, optimizer: DampedOptimizer, method: str, why: str, path: Path | None) -> FitResult:
        """Steps of an optimiser until a test is met."""
        result = FitResult(self.model, math.nan, False, method, why, "", math.nan)
        state = _State()
        if path is not None:
            saved = from_first(lambda: _load(path))
            if saved is not None:
                state = self._resume(path, saved, optimizer, result)
        begin = time.perf_counter() - state.seconds
        whole = self.objective(0) if self.batch_size is None else None
        recorded, start = len(result.history), self.parameters.read()
        with Progress(self.max_steps, enabled=self.progress, done=state.step) as bar:
            try:
                while not result.reason and state.step < self.max_steps:
                    recorded, start = len(result.history), self.parameters.read()
                    objective = whole or together(partial(self.objective, state.step))
                    if whole is not None and self.rows_of_curvature is not None:
                        sample = together(partial(self.source.sample, state.step, self.rows_of_curvature))
                        whole.curvature_chunks = _again(sample)
                    report = self._step(optimizer, objective, state)
                    state.seconds = time.perf_counter() - begin
                    self._record(result, report, state)
                    result.reason, result.converged = self._verdict(report, state, optimizer, objective)
                    bar.update(loss=report.new_loss, damping=report.damping, cg=report.cg_iterations)
                    if path is not None:
                        together(partial(self._save, path, optimizer, result, state))
                result.reason = result.reason or f"max_steps={self.max_steps} reached"
            except KeyboardInterrupt:
                result.reason, result.converged = "interrupted", False
                if len(result.history) == recorded:
                    # A step that is not in the history was not taken.
                    self.parameters.write(start)
        result.loss = result.history[-1].loss if result.history else math.nan
        return result

    def _step(self, optimizer: DampedOptimizer, objective: DataObjective, state: _State) -> StepReport:
        try:
            optimizer.step(objective)
        except NonFiniteError as error:
            raise NonFiniteError(f"step {state.step + 1}, {error}") from error
        assert optimizer.report is not None
        return optimizer.report

    def _record(self, result: FitResult, report: StepReport, state: _State) -> None:
        state.step += 1
        if not result.history:
            result.initial_loss, state.first_gradient = report.loss, report.grad_norm
        result.history.append(
            Record(
                step=state.step,
                loss=report.new_loss,
                grad_norm=report.grad_norm,
                step_norm=report.step_norm,
                damping=report.damping,
                accepted=report.accepted,
                cg_iterations=report.cg_iterations,
                seconds=state.seconds,
            )
        )
        result.loss = report.new_loss

    def _verdict(
        self, report: StepReport, state: _State, optimizer: DampedOptimizer, objective: DataObjective
    ) -> tuple[str, bool]:
        """Why to stop, if so, and whether that is convergence."""
        eps = torch.finfo(self.parameters.dtype).eps
        if not report.accepted and report.grad_norm > 0:
            state.failures += 1
        else:
            state.failures = 0
        if self.batch_size is not None:
            stuck = state.failures >= _MOST_FAILURES
            return (f"no step lowered the loss on {_MOST_FAILURES} batches in a row", False) if stuck else ("", False)
        zero = (_ROUNDINGS * eps) ** 2 * min(1.0, state.initial_loss(report))
        if self.loss.name in ("mse", "cross_entropy") and report.new_loss <= zero:
            return "the loss is zero to rounding", True
        test = ""
        least = max(self.tol**2, eps if report.accepted else _ROUNDINGS * eps)
        # From a start far away the first gradient is no measure, so the step must promise little as well. Where the
        # decrement is always known there is no need for either.
        small = report.grad_norm <= self.tol * state.first_gradient
        small = small and report.predicted <= self.tol * abs(report.loss)
        if report.grad_norm == 0:
            test = "the gradient is zero"
        elif report.decrement <= least * abs(report.new_loss):
            test = f"the loss can be lowered by no more than {least:.0e} of itself"
        elif report.decrement <= report.resolution:
            test = "the loss can be lowered by no more than rounding the parameters changes it"
        elif small and not isinstance(optimizer, LevenbergMarquardt):
            test = f"the gradient norm is under tol={self.tol:g} of the first"
        if not test:
            return ("no step lowers the loss, although it may not be at a minimum" if state.failures else "", False)
        lost = report.without_influence
        if lost and isinstance(optimizer, LevenbergMarquardt):
            lost -= self._of_no_use(optimizer.never_used(self.parameters), objective)
        if lost:
            count = f"{lost} of {len(self.parameters)} parameters have"
            return f"{test}, but {count} no influence on the outputs here: not necessarily a minimum", False
        return test, True

    def _of_no_use(self, candidates: Tensor, objective: DataObjective) -> int:
        """How many parameters those are, if changing them all changes nothing, as for a feature that is always zero."""
        start = self.parameters.read()
        noise = torch.randn(len(start), generator=torch.Generator().manual_seed(0)).to(start)
        noise *= candidates * start.square().mean().sqrt().clamp_min(1.0)
        losses = set()
        try:
            for sign in (0, 1, -1):
                self.parameters.write(start + sign * noise)
                losses.add(objective.value(self.parameters))
        finally:
            self.parameters.write(start)
        return int(candidates.sum()) if len(losses) == 1 else 0

    def _save(self, path: Path, optimizer: DampedOptimizer, result: FitResult, state: _State) -> None:
        if self.source.share.rank != 0:
            return
        checkpoints.save(
            path,
            {
                "format": checkpoints.FORMAT,
                "method": result.method,
                "model": self.model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "source": self.source.state(),
                "progress": vars(state),
                "result": result.state(),
            },
        )

    def _resume(self, path: Path, saved: dict[str, Any], optimizer: DampedOptimizer, result: FitResult) -> _State:
        if saved["method"] != result.method:
            raise ValueError(
                f"checkpoint {path} is of method {saved['method']!r}, this fit is {result.method!r}: pass another file"
            )
        try:
            self.model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"checkpoint {path} is of another model: {error}") from error
        self.source.restore(saved["source"])
        result.restore(saved["result"])
        return _State(**saved["progress"])


@dataclass
class _State:
    """What a fit knows between steps, besides the optimiser."""

    step: int = 0
    seconds: float = 0.0
    failures: int = 0
    first_gradient: float = math.nan
    first_loss: float = math.nan

    def initial_loss(self, report: StepReport) -> float:
        """The loss before the first step."""
        if math.isnan(self.first_loss):
            self.first_loss = abs(report.loss)
        return self.first_loss


def _objective_type(
    method: str, model: nn.Module, parameters: ParameterVector, loss: Loss, chunk: Chunk
) -> Callable[..., DataObjective]:
    """The objective that has kernels for the model, or for how it ends."""
    network = find_perceptron(model, loss, chunk)
    if network is not None:
        return partial(PerceptronObjective, network=network)
    if method == "levenberg_marquardt":
        return DataObjective
    if is_glm(loss) and method != "gradient_descent":
        head = find_head(model, parameters, chunk)
        if head is not None:
            return partial(HeadObjective, head=head)
    layer = find_vocabulary_head(model, loss, chunk)
    return DataObjective if layer is None else partial(VocabularyObjective, layer=layer)


def _check(
    model: Any,
    method: str,
    max_steps: int,
    tol: float,
    batch_size: int | None,
    curvature_batch_size: int | None,
    chunk_size: int | None,
    cg_iterations: int | None,
    weight_decay: float,
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
    if method not in METHODS:
        raise ValueError(f"method={method!r}; expected one of {', '.join(map(repr, METHODS))}")
    sizes = {
        "max_steps": max_steps,
        "batch_size": batch_size,
        "curvature_batch_size": curvature_batch_size,
        "chunk_size": chunk_size,
        "cg_iterations": cg_iterations,
    }
    for name, value in sizes.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name} is {type(value).__name__}; expected an integer")
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}; expected at least 1")
    if not 0 <= tol < 1:
        raise ValueError(f"tol={tol}; expected a number from 0, less than 1")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay={weight_decay}; expected a finite number >= 0")


def _load(path: Path) -> dict[str, Any] | None:
    """The checkpoint, if there is one already."""
    if path.exists():
        return checkpoints.load(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"checkpoint {path}: there is no folder {path.parent}")
    return None


def _reset(model: nn.Module, seed: int) -> None:
    frozen = [(p, p.detach().clone()) for p in model.parameters() if not p.requires_grad]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, module in model.named_modules():
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
                if reset is None:
                    kind = type(module).__name__
                    raise ValueError(f"initialize=True, but {name or 'the model'} ({kind}) has no reset_parameters()")
                reset()
    with torch.no_grad():
        # A layer of which only a part is trained was drawn anew as a whole.
        for parameter, value in frozen:
            parameter.copy_(value)


def _peek(source: Source, *, shuffled: bool) -> tuple[Chunk, Iterator[Chunk]]:
    """The first chunk, and all of them, without reading it twice."""
    source.chunk_size = 1024
    chunks = source.shuffled() if shuffled else source.all()
    first = next(chunks, None)
    if first is None:
        raise ValueError("data gives this process no rows; expected at least one for each process")
    return first, itertools.chain([first], chunks)


def _choose(
    method: str, model: nn.Module, parameters: ParameterVector, loss: Loss, first: Chunk, batch_size: int | None
) -> tuple[str, str]:
    """The method, and why."""
    if method == "closed_form" and loss.name not in ("mse", "cross_entropy"):
        raise ValueError(
            f"method='closed_form' solves loss='mse' and estimates a head for 'cross_entropy'; for {loss.name!r} use "
            "method='newton_cg'"
        )
    if method == "closed_form" and batch_size is not None:
        raise ValueError("method='closed_form' reads all data once; batch_size must be None")
    if method == "levenberg_marquardt":
        refusal = _refusal(model, parameters, loss, first)
        if refusal:
            raise ValueError(f"method='levenberg_marquardt' {refusal}: use method='gauss_newton'")
    if method != "auto":
        return method, "as asked"
    affine = closed_form.is_affine(model, parameters, first)
    if affine and loss.name == "mse" and batch_size is None:
        few = len(parameters) <= closed_form.MOST_PARAMETERS and not _refusal(model, parameters, loss, first)
        if few or find_head(model, parameters, first) is not None:
            return "closed_form", "outputs are affine in the parameters and the loss is quadratic"
    return _choose_steps(model, parameters, loss, first, affine=affine)


def _refusal(model: nn.Module, parameters: ParameterVector, loss: Loss, first: Chunk) -> str:
    """Why rows of the Jacobian cannot be had, if so: torch.func.vmap cannot run every module, such as nn.LSTM."""
    few = first.rows(slice(0, 2))
    objective = DataObjective(model, loss, lambda: [few], lambda: [few], fixed=True)
    try:
        with torch.no_grad():
            next(objective.root_jacobian(parameters, few))
    except Exception as error:
        return f"differentiates the model row by row, which fails here ({str(error).splitlines()[0]})"
    return ""


def _choose_steps(
    model: nn.Module, parameters: ParameterVector, loss: Loss, first: Chunk, *, affine: bool
) -> tuple[str, str]:
    """The iterative method, and why."""
    p = len(parameters)
    refusal = _refusal(model, parameters, loss, first) if p <= _MOST_DENSE else ""
    if refusal:
        return "gauss_newton", f"levenberg_marquardt {refusal}"
    if p <= _MOST_DENSE:
        return "levenberg_marquardt", f"{p} parameters: their Gauss-Newton matrix can be factored"
    if affine and loss.name in ("cross_entropy", "poisson"):
        return "newton_cg", "outputs are affine in the parameters and the loss is convex"
    return "gauss_newton", f"{p} parameters: too many for a matrix"


def _optimizer(
    method: str,
    parameters: ParameterVector,
    damping: float | None,
    weight_decay: float,
    cg_iterations: int | None,
    *,
    sampled: bool,
) -> DampedOptimizer:
    """``sampled``: whether curvature is of a sample of the rows."""
    options: dict[str, Any] = {"weight_decay": weight_decay}
    if method == "levenberg_marquardt" and sampled:
        options |= {"momentum": _MOMENTUM, "damping": _DAMPING}
    if damping is not None:
        options["damping"] = damping
    if cg_iterations is not None and method in ("gauss_newton", "newton_cg"):
        options["cg_iterations"] = cg_iterations
    return OPTIMIZERS[method](parameters.tensors, **options)


def _enough_rows(
    model: nn.Module, source: Source, parameters: ParameterVector, batch_size: int | None, first: Chunk
) -> int | None:
    """How many rows Levenberg-Marquardt's matrix needs, or None for all."""
    with torch.no_grad():
        outputs = call_model(model, first.rows(slice(0, 1)).inputs).numel()
    p, rows = len(parameters), batch_size or source.known_rows
    enough = max(_ROWS_PER_PARAMETER * p // outputs, int(_CHEAP_FLOPS / (p * p * outputs)), 1)
    return None if rows is not None and rows <= enough else enough


def _again(chunks: list[Chunk]) -> Callable[[], list[Chunk]]:
    return lambda: chunks


def _leading(batch: list[Chunk], rows: int, whole: int) -> list[Chunk]:
    """The first rows of each piece of a batch, ``rows`` of ``whole`` ones."""
    lengths: Counter[int] = Counter()
    for chunk in batch:
        lengths[chunk.piece] += len(chunk)
    left = {piece: -(-length * rows // whole) for piece, length in lengths.items()}
    chunks = []
    for chunk in batch:
        part = chunk.rows(slice(0, left[chunk.piece]))
        left[chunk.piece] -= len(part)
        if len(part):
            chunks.append(part)
    return chunks
