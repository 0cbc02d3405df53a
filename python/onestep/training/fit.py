"""onestep.fit: from a model, data and a loss to fitted parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onestep._interrupts import undisturbed
from onestep._restored import eval_mode
from onestep._torch_private import reset_method
from onestep.evaluation.distributed import from_first, same_everywhere
from onestep.evaluation.errors import NonFiniteError
from onestep.evaluation.losses import as_loss
from onestep.evaluation.module import call_model, noisy_layers, warn_of_layers
from onestep.evaluation.parameters import ParameterVector
from onestep.training.facts import Facts, Settings
from onestep.training.fingerprint import described, differences, fingerprint
from onestep.training.look import look
from onestep.training.loop import Checkpoint, Stuck, load_checkpoint, run
from onestep.training.methods import METHODS
from onestep.training.methods.affine_equations import NotAffineError
from onestep.training.methods.damped import DampedMethod
from onestep.training.methods.damped_run import CONVEX
from onestep.training.plan import FitPlan, make_plan
from onestep.training.result import FitResult, Record
from onestep.training.structures.affine import NOT_AFFINE

# A convex fit starts from zeros where the loss is at most this part of the loss at the model's own parameters.
_FAR_BELOW = 0.5


@undisturbed
def fit(
    model: nn.Module,
    data: Any,
    loss: str | Callable[[Tensor, Any], Tensor] = "mse",
    *,
    method: str = "auto",
    max_steps: int | None = None,
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
    max_seconds: float | None = None,
    callback: Callable[[Record], object] | None = None,
    epochs: float | None = None,
    validation: Any = None,
    validation_every: int | None = None,
    patience: int | None = None,
) -> FitResult:
    """Fits the trainable parameters of a model by solving for them: θ ← θ - (B + damping·D)⁻¹∇loss, until converged.

    Starts from the parameters that the model has, but for the convex losses that ``method`` tells of. Where the outputs
    are affine in them and the loss is quadratic, one step over one pass is exact. A step that would raise the loss is
    taken back. The model is evaluated in eval mode (dropout off, batch norm with its running statistics), because a
    solve needs a loss that depends on the parameters alone; parameters with requires_grad=False stay as they are.

    Sources: Levenberg 1944 and Marquardt 1963 (damping), Schraudolph 2002 (Gauss-Newton products), Steihaug 1983
    (truncated conjugate gradients), Lau, Long and Su 2025 (polar steps); see the optimisers of ``onestep.optim``.

    Under torch.distributed (``torchrun --nproc-per-node=2``) every process calls fit with the same arguments and
    computes its share of each batch. The parameters are those of one process to rounding; matrix-free methods, whose
    conjugate gradients would magnify it, give the same bits on two processes of as many threads.

    Args:
        model: any module that returns a tensor, (n,…) for n rows, or something that has such ``logits``. Trained
            parameters have one floating dtype and one device; float64 where errors below about 1e-6 count.
        data: a pair (inputs, target) of tensors, numpy arrays or data frames, a Dataset of such pairs, or a DataLoader
            (any iterable that can be read again) of such batches. Inputs may be a tuple or a dict of tensors, which is
            unpacked. In place of a pair a dict may hold the inputs and ``labels``, as the collators of transformers
            make it.
        loss: "mse" (mean over all elements), "cross_entropy" (class indices, of which -100 is ignored, or
            probabilities; class weights, label smoothing and another ignore_index by ``nn.CrossEntropyLoss(...)``),
            "poisson" (the model gives the logarithm of the rate), "bce" (the model gives log-odds), torch's own losses
            of these kinds, or a function (outputs, target) → mean over the rows it was given. With "model" the model is
            given ``labels`` with the other inputs and returns its own ``loss``, their mean over those that are not -100
            (methods "polar" and "gradient_descent"). Outputs of 16 bits, as under autocast, become float32 before a
            loss with a name; a function gets them as they are.
        method: "closed_form" (for "cross_entropy" an estimate of a linear head, which Newton steps close; rows of a
            DataLoader should come in random order), "levenberg_marquardt" (forms the p × p Gauss-Newton matrix),
            "quasi_newton" (a linear head under cross-entropy, by L-BFGS on what the head is given, for which the model
            runs once; a step is up to ten iterations), "gauss_newton" and "newton_cg" (matrix-free), "polar"
            (``onestep.optim.PolarGrad`` on mini-batches, for whole networks; the model keeps its modes in these steps),
            "gradient_descent" (the baseline), or "auto": the first that fits. On all rows the damped methods (not the
            baseline) start from zeros where the loss is convex in the parameters, and is at zeros at most half of what
            it is at the model's own parameters.
        max_steps: the most steps; None for ``epochs``, or 50. The polar method, whose rates fall to zero at the
            end, takes as many as there are seconds where only these are given, and else 40 passes over the data, but
            from 300 to 3,000 steps.
        tol: converged when the loss can be lowered by no more than tol² of itself (or than rounding changes it), as far
            as the method's own matrix tells, without its damping; or when the gradient or the loss is zero. A saddle
            that the Hessian shows, and a parameter that has lost its influence, are no convergence. Where float32
            cannot tell (nearly dependent directions, or more than 128 parameters), a copy of the model in float64 is
            asked; if it does not run there, the fit has not converged. With ``batch_size`` none of this is tested.
        damping: initial damping, else the method's own.
        weight_decay: adds ½ weight_decay ‖θ‖² to the loss.
        batch_size: rows a step, for data that does not fit in memory or many steps; None for all rows. A step is then
            judged on as many other rows, drawn anew each time; from a DataLoader, on those that come next. The polar
            method judges no step, and None means about 1,024 places of the outputs, or a DataLoader's batch.
        curvature_batch_size: rows over which B is taken, drawn anew each step; None for the rows of the step, or for
            Levenberg-Marquardt a sample that is large against the parameters.
        chunk_size: rows computed at a time; None for as many as keep 256 MiB for the backward pass.
        cg_iterations: the most iterations of a solve, with one product each, for the matrix-free methods.
        initialize: whether to draw the trained layers' parameters anew first (``reset_parameters``, with ``seed``).
        seed: of everything random: the order of rows and the initialisation.
        progress: whether to show a bar with loss, damping, CG iterations and the time left. Needs tqdm.
        checkpoint: a file, written whole after each step; a link to a file stays, a pipe is refused. If it
            exists, the fit goes on from it and ends with the same bits as one that was never stopped.
        max_seconds: no further step begins this many seconds after the first one of this call.
        epochs: passes over the data instead of ``max_steps``; the end of the last pass is the end of the fit.
        validation: held-out data, of the kinds that ``data`` may be. Its mean loss goes into history, plot and bar.
        validation_every: steps between two looks at it; None for each step, or 20 times a fit with mini-batches. It is
            taken after the last step, too.
        patience: the fit ends after so many looks in a row without a lower validation loss, and the model gets the
            parameters that had the lowest.
        callback: called with the ``Record`` of each step; if what it returns is true, the fit ends. With several
            processes the first one calls it.

    Returns:
        ``FitResult``. After Ctrl-C it is what was reached so far, with ``interrupted`` true, so that a loop around fit
        can end too.

    Raises:
        NonFiniteError: NaN or infinity in data, loss or gradient, naming step and batch; the model keeps the last good
            parameters.
        ValueError, TypeError: an argument is not what it should be, or the outputs carry no gradient (``detach``,
            ``torch.no_grad`` and the like in forward), which the closed form alone does without.

    Examples:
        >>> import torch, onestep
        >>> X = torch.linspace(0, 1, 20)[:, None]
        >>> result = onestep.fit(torch.nn.Linear(1, 1), (X, 3 * X - 1), progress=False)
        >>> result.method, result.converged, round(result.model.weight.item(), 4)
        ('closed_form', True, 3.0)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(_not_a_module(model))
    if method not in ("auto", *METHODS):
        raise ValueError(f"method={method!r}; expected one of {', '.join(map(repr, ('auto', *METHODS)))}")
    settings = Settings(
        method=method,
        max_steps=max_steps,
        tol=tol,
        damping=damping,
        weight_decay=weight_decay,
        batch_size=batch_size,
        curvature_batch_size=curvature_batch_size,
        chunk_size=chunk_size,
        cg_iterations=cg_iterations,
        seed=seed,
        progress=progress,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        max_seconds=max_seconds,
        callback=callback,
        epochs=epochs,
        validation=validation,
        validation_every=validation_every,
        patience=patience,
    )
    parameters = ParameterVector([p for p in model.parameters() if p.requires_grad])
    function = as_loss(loss, of_model=True)
    noisy = noisy_layers(model)
    with eval_mode(model):
        if initialize:
            _reset(model, seed)
        same_everywhere([*model.parameters(), *model.buffers()])
        facts = look(model, parameters, function, described(loss, function), data, settings)
        return _fit(facts, settings, noisy)


# Where models of other backends come from.
_OTHER_BACKENDS = {"keras", "tensorflow", "tf_keras", "flax", "haiku", "equinox"}


def _not_a_module(model: Any) -> str:
    """What is wrong with a model that is none of torch's, and what to do about one of another backend."""
    told = f"model is {type(model).__name__}; expected a torch.nn.Module"
    if not _OTHER_BACKENDS & {kind.__module__.partition(".")[0] for kind in type(model).__mro__}:
        return told
    return (
        f"{told}. fit computes with torch: build the Keras model under KERAS_BACKEND=torch, where it is one, or save "
        "it as model.keras and run python -m onestep keras model.keras --data data.npz --target y, which fits files of "
        "every backend"
    )


def _fit(facts: Facts, settings: Settings, noisy: str) -> FitResult:
    """Plans and runs; under "auto" another method goes on where one cannot.

    One cannot go on where it is stuck, or where the outputs turn out not to be affine. The next plan is made from the
    parameters that were reached and goes on with the history, without the methods that were tried.
    """
    saved, identity = from_first(lambda: _checkpoint(facts, settings))
    # A source that differs on each pass has no hash, and neither would its batches.
    hashed = identity is not None and identity["inputs"] is not None
    result: FitResult | None = None
    tried: set[str] = set()
    start: Tensor | None = None
    while True:
        try:
            resumed = saved["method"] if saved else None
            plan = make_plan(facts, settings, without=tried, resumed=resumed, hashed=hashed)
        except LookupError:
            # All methods that suit were tried, and the last one was stuck.
            assert result is not None
            return result
        if not plan.method.one_pass:
            # The method begins passes of its own.
            facts.first_pass.close()
        if not plan.method.keeps_modes:
            warn_of_layers(noisy, "fit", 4)
            noisy = ""
        if result is not None:
            plan = replace(plan, why=f"{result.method} could not move after step {len(result.history)}; {plan.why}")
        if start is not None:
            plan = replace(plan, why=f"{plan.why}; from zeros, since the loss overflows at the model's own parameters")
        elif not saved and result is None and (own := _far_above_zeros(facts, plan)):
            facts.parameters.write(torch.zeros_like(facts.parameters.read()))
            what = "overflows" if math.isinf(own) else f"is {own:.3g}"
            plan = replace(plan, why=f"{plan.why}; from zeros, since the loss {what} at the model's own parameters")
        try:
            return run(plan, saved=saved, before=result, identity=identity)
        except NotAffineError:
            if settings.method != "auto":
                raise
            # On the first rows, which the plan was made from, they seemed to be affine.
            facts = replace(facts, known_not_affine=NOT_AFFINE)
        except NonFiniteError:
            # Once: where the data is to blame, or zeros do not help, the parameters are as they were.
            if start is not None:
                facts.parameters.write(start)
            if start is not None or saved or result is not None or not _has_one_minimum(facts):
                raise
            start = facts.parameters.read()
            facts.parameters.write(torch.zeros_like(start))
            continue
        except Stuck as stuck:
            result = stuck.result
            if settings.method != "auto":
                return result
        tried.add(plan.method.name)
        # The checkpoint was of the method that was tried.
        saved = None


def _has_one_minimum(facts: Facts) -> bool:
    """Whether the loss is that of counts and convex in what is trained: from zeros its minimum is the same.

    At torch's own initialisation it overflows where columns are not scaled.
    """
    return facts.loss.name == "poisson" and not facts.not_affine


def _far_above_zeros(facts: Facts, plan: FitPlan) -> float:
    """The loss at the model's own parameters, if it is convex in them and much lower at zeros; else 0.

    On columns that are not scaled, torch's own initialisation gives scores of 1e5. Probabilities are 0 or 1 there, so
    that no curvature tells how far to go. The minimum is the same from zeros, and a few steps away.
    """
    steps = isinstance(plan.method, DampedMethod) and plan.method.starts_from_zeros
    if not steps or plan.settings.batch_size is not None or facts.loss.name not in CONVEX:
        return 0.0
    own = facts.parameters.read()

    def at_both(value: Callable[[], float]) -> tuple[float, float]:
        found = []
        for point in (own, torch.zeros_like(own)):
            facts.parameters.write(point)
            found.append(value())
        return found[0], found[1]

    def on_first() -> float:
        with torch.no_grad():
            return float(facts.loss.sum(call_model(facts.model, facts.first.inputs), facts.first.target))

    def promises() -> bool:
        """Whether the first rows say so, which spares most fits passes over all of them."""
        if facts.not_affine:
            return False
        at_own, at_zeros = at_both(on_first)
        return at_zeros <= _FAR_BELOW * at_own

    try:
        if not from_first(promises):
            return 0.0
        objective = plan.objective(plan.source.all, plan.source.all, fixed=True)
        at_own, at_zeros = at_both(lambda: objective.value(facts.parameters))
        return at_own if at_zeros <= _FAR_BELOW * at_own else 0.0
    except Exception:
        # A model that refuses zeros, or what is wrong with its own parameters or the data, as the fit will say.
        return 0.0
    finally:
        facts.parameters.write(own)


def _checkpoint(facts: Facts, settings: Settings) -> tuple[Checkpoint | None, dict[str, Any] | None]:
    """The checkpoint to go on from, if there is one, and the problem's fingerprint, which later checkpoints keep."""
    if settings.checkpoint is None:
        return None, None
    saved, identity = load_checkpoint(settings.checkpoint), fingerprint(facts, settings)
    if saved is not None:
        found = differences(saved["identity"], identity)
        if found:
            raise ValueError(f"checkpoint {settings.checkpoint} is of another problem: {found}; pass another file")
    return saved, identity


def _reset(model: nn.Module, seed: int) -> None:
    """Draws the parameters of all layers anew that have a trained one; those that are not trained stay as they are."""
    frozen = [(p, p.detach().clone()) for p in model.parameters() if not p.requires_grad]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, module in model.named_modules():
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                reset = reset_method(module)
                if reset is None:
                    kind = type(module).__name__
                    raise ValueError(f"initialize=True, but {name or 'the model'} ({kind}) has no reset_parameters()")
                reset()
    with torch.no_grad():
        # A layer of which only a part is trained was drawn anew as a whole.
        for parameter, value in frozen:
            parameter.copy_(value)
