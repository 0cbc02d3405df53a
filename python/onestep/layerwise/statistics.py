"""XᵀX of the inputs of chosen layers, and XᵀT with a teacher's outputs, added up batch by batch."""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor, nn

from onestep import linalg
from onestep._files import replacing
from onestep._interrupts import undisturbed
from onestep._restored import replaced
from onestep.evaluation.digest import digest
from onestep.evaluation.progress import Progress
from onestep.layerwise.checks import check_dtype_of_sums, check_flags, check_path
from onestep.layerwise.layers import Layer, Patterns, batches_of, call, count_of, evaluating, find_layers, padded
from onestep.layerwise.padding import Masks, warn_of_padding
from onestep.layerwise.pairs import check_names, paired
from onestep.layerwise.rank import numerical_rank
from onestep.layerwise.seen import Enough, Seen
from onestep.layerwise.sums import InputSums, Storage, TargetSums
from onestep.ops.operands import LinAlgError


class LayerStatistics:
    """Streams Σxxᵀ (and Σxtᵀ) of the inputs of a model's linear layers while data passes through it.

    Layers that are given the same tensor (q, k and v of attention) share their sums. Experts of a mixture have the rows
    that are sent to them, each its own number. Where a batch has an ``attention_mask`` (or a
    ``decoder_attention_mask``, or torch's ``src_key_padding_mask``), padding is left out, of experts' rows as well. A
    layer that is called several times in a pass sees the rows of all calls. The model is run in eval mode without
    gradients; hooks are there during ``update`` only.

    Args:
        model: any nn.Module.
        layers: a pattern of names such as ``"*.mlp.*"``, or several; a leading "!" leaves layers out. nn.Linear
            and transformers' Conv1D; of experts that are stacked in one parameter each one, "…experts.down_proj.3".
        teacher: a model with layers of the same names, whose outputs for the same batch are the targets. Where blocks
            were replaced by ``replace_blocks``, layers are matched by what they were called before.
        names: where the teacher's names are others, what modules of the model are called there, such as
            {"blocks.1": "blocks.2"}; None for what has no counterpart, and no targets.
        dtype: of the sums, torch.float32 or torch.float64. Rows of other dtypes are converted.
        folder: keep the matrices in files there, as where those of all layers do not fit into memory.

    Attributes:
        names: the layers.
        batches: how many batches have been added.

    Raises:
        ValueError: a pattern matches no layer, or the teacher has other layers or outputs.
        TypeError: an argument, or a layer's weight, is of another type or dtype.
        NotImplementedError: a layer that matches has a weight that is computed, or stacked in another way.

    Examples:
        >>> import torch
        >>> from onestep.layerwise import LayerStatistics
        >>> statistics = LayerStatistics(torch.nn.Sequential(torch.nn.Linear(2, 3)))
        >>> statistics.collect([torch.ones(4, 2), torch.ones(1, 2)], progress=False)["0"].gram
        tensor([[5., 5.],
                [5., 5.]])
    """

    # Whether the sums with a teacher are of t − Wx − b, with the weights as they are while data passes through. In
    # Σ‖t − Ŵx − b‖² of sums of t, what is left of three numbers near Σ‖t‖² would be their rounding.
    _lacks = False

    def __init__(
        self,
        model: nn.Module,
        layers: Patterns = "*",
        *,
        teacher: nn.Module | None = None,
        names: Mapping[str, str | None] | None = None,
        dtype: torch.dtype = torch.float32,
        folder: str | Path | None = None,
    ) -> None:
        check_dtype_of_sums(dtype)
        if folder is not None:
            check_path("folder", folder)
        self._layers = find_layers(model, layers)
        self._model, self._teacher, self._dtype = model, teacher, dtype
        self._storage = Storage(folder)
        check_names(names)
        self._teachers: dict[str, Layer] = {}
        if teacher is not None:
            if not isinstance(teacher, nn.Module):
                raise TypeError(f"teacher is {type(teacher).__name__}; expected torch.nn.Module")
            self._teachers = paired(model, self._layers, teacher, names)
        self.names = list(self._layers)
        self.batches = 0
        # Of the data of the last call of collect: where a call that finds its file goes on.
        self._collected = 0
        # Layers that have been warned of.
        self._untold: set[str] = set()
        # Of these batches.
        self._read = ""
        # Layers with the same sums share one object. Replaced, never written into.
        self._inputs: dict[str, InputSums] = {}
        self._targets: dict[str, TargetSums] = {}
        self._factors: dict[str, tuple[InputSums, float, linalg.InverseCholeskyResult, float]] = {}
        # The last one, which layers with the same sums share.
        self._rank: tuple[InputSums, int] | None = None

    def __getitem__(self, name: str) -> InputSums:
        """The sums of a layer's inputs; zeros if no row has reached it."""
        if name not in self._layers:
            raise KeyError(f"{name!r} is none of the layers {list(self._layers)[:8]}")
        layer = self._layers[name]
        d = layer.weight.shape[1]
        zeros = layer.weight.new_zeros(0, dtype=self._dtype)
        return self._inputs.get(name) or InputSums(zeros.new_zeros(d, d), zeros.new_zeros(d), 0)

    def has_targets(self, name: str) -> bool:
        """Whether there are sums with a teacher's outputs.

        Args:
            name: of a layer.

        Returns:
            True where ``targets`` has them.
        """
        return name in self._targets

    def targets(self, name: str) -> TargetSums:
        """The sums with the teacher's outputs.

        Args:
            name: of a layer.

        Returns:
            Σxtᵀ, Σt and Σ‖t‖² of the rows.

        Raises:
            KeyError: there is no teacher, or no row has reached the layer.
        """
        if name not in self._targets:
            raise KeyError(f"no targets for {name!r}: there is no teacher, or no row has reached the layer")
        return self._targets[name]

    def shared(self) -> list[list[str]]:
        """The layers in groups that have had the same inputs, in the model's order; those without rows alone."""
        groups: dict[int, list[str]] = {}
        for index, name in enumerate(self.names):
            sums = self._inputs.get(name)
            groups.setdefault(-1 - index if sums is None else id(sums), []).append(name)
        return list(groups.values())

    def update(self, batch: Any, *, stop_early: bool = False) -> LayerStatistics:
        """Adds one batch: a tensor, a tuple of positional arguments, or a mapping of keyword arguments of the model.

        Args:
            batch: what the model is called with.
            stop_early: end the model's forward pass when every layer has been called once.

        Returns:
            self.

        Raises:
            ValueError: a layer's inputs hold NaN or infinity, or overflow; nothing of the batch has been added then.
        """
        models = [self._model] if self._teacher is None else [self._model, self._teacher]
        runs = [lambda model=model: call(model, batch) for model in models]
        return self.update_by(runs, [Masks.of(batch, model) for model in models], stop_early=stop_early)

    @undisturbed
    def update_by(
        self, runs: Sequence[Callable[[], object]], masks: Sequence[Masks], *, stop_early: bool = False
    ) -> LayerStatistics:
        """As ``update``, of a batch that each of ``runs`` sends through the model, and the teacher if there is one.

        Args:
            runs: through all that has the layers.
            masks: of each, which places are not padding.
            stop_early: as in ``update``.

        Returns:
            self.

        Raises:
            ValueError: as ``update``.
        """
        awaited = set(self.names) if stop_early else None
        seen = Seen(self._layers, self._dtype, awaited, self._storage, lacks=self._lacks)
        models = [self._model] if self._teacher in (None, self._model) else [self._model, self._teacher]
        with evaluating(*models), torch.no_grad(), replaced(padded(models)):
            if self._teacher is not None:
                hooked, calls = seen.of_teacher(self._teacher, self._teachers, masks[1])
                with hooked, calls:
                    runs[1]()
            hooked, calls = seen.of_model(self._model, masks[0])
            with suppress(Enough), hooked, calls:
                runs[0]()
        self._commit(seen)
        untold = {name: shape for name, shape in seen.untold.items() if name not in self._untold}
        self._untold |= untold.keys()
        warn_of_padding(untold)
        return self

    def collect(
        self, data: Any, *, checkpoint: str | Path | None = None, every: int = 16, progress: bool = True
    ) -> LayerStatistics:
        """Adds all batches of ``data``, and with ``checkpoint`` goes on from where an interrupted call was.

        The file is replaced in one step after every ``every`` batches and at the end. A call that finds it skips the
        batches that are in it: killed at any time and called again, it ends with the same bits. Data that do not begin
        with the batches that are in the file, which knows them by a hash, are refused; more of the same are added.

        Args:
            data: batches as in ``update``, in the same order at every call.
            checkpoint: a file; written by ``save``.
            every: batches from one writing to the next.
            progress: show a bar.

        Returns:
            self.

        Raises:
            ValueError: ``every`` is not positive, the file is damaged, or of other layers or other data, of which
                nothing is added then; or inputs as in ``update``.
            TypeError: an argument is something else.
            FileNotFoundError: the checkpoint's folder is not there.
        """
        batches = batches_of(data)
        check_flags(progress=progress)
        if checkpoint is not None:
            check_path("checkpoint", checkpoint)
        if type(every) is not int or every < 1:
            raise ValueError(f"every is {every!r}; expected a positive number of batches")
        if checkpoint is not None and not Path(checkpoint).parent.is_dir():
            raise FileNotFoundError(f"checkpoint is {str(checkpoint)!r}; expected a file in a folder that is there")
        before = dict(vars(self))
        self._collected, self._read = 0, ""
        if checkpoint is not None and Path(checkpoint).exists():
            self.load(checkpoint)
        done, rest, read = self._collected, iter(batches), ""
        for batch in islice(rest, done):
            read = _mark(read, batch)
        # Files of before know no data.
        if self._read and read != self._read:
            vars(self).update(before)
            raise ValueError(
                f"checkpoint {str(checkpoint)!r} is of other data, of which it has {done} batches; expected data that "
                "begin with the same ones, in the same order: pass a file for each data, or none"
            )
        with Progress(count_of(batches), enabled=progress, done=done, what="statistics", unit="batch") as bar:
            for batch in rest:
                # Before a model may write into it.
                read = _mark(read, batch)
                self.update(batch)
                self._collected, self._read = self._collected + 1, read
                bar.update()
                if checkpoint is not None and self.batches % every == 0:
                    self.save(checkpoint)
        if checkpoint is not None:
            self.save(checkpoint)
        return self

    @undisturbed
    def merge(self, other: LayerStatistics) -> LayerStatistics:
        """Adds what another one has seen, in this process or read from a file; returns self.

        Args:
            other: of the same layers; it stays as it is.

        Raises:
            TypeError: it is something else.
            ValueError: it is of other layers, or its sums of another dtype.
        """
        if not isinstance(other, LayerStatistics):
            raise TypeError(f"other is {type(other).__name__}; expected LayerStatistics")
        if other._dtype != self._dtype:
            raise ValueError(f"other has {other._dtype} sums; expected {self._dtype}")
        if other.names != self.names:
            raise ValueError(f"other is of the layers {other.names[:3]}, ...; expected {self.names[:3]}, ...")
        self._check_targets(other._inputs, other._targets, "other")
        merged: dict[tuple[int, int], InputSums] = {}
        inputs = dict(self._inputs)
        for name, added in other._inputs.items():
            mine = self._inputs.get(name)
            key = (id(mine), id(added))
            if key not in merged:
                merged[key] = added if mine is None else mine.plus(added, self._storage)
            inputs[name] = merged[key]
        targets = dict(self._targets)
        for name, sums in other._targets.items():
            targets[name] = targets[name].plus(sums, self._storage) if name in targets else sums
        self._inputs, self._targets, self.batches = inputs, targets, self.batches + other.batches
        return self

    def _check_targets(self, layers: Collection[str], targets: Collection[str], source: str) -> None:
        """Raises where one of two has a teacher's outputs and the other has none: sums would be of unlike rows."""
        if layers and bool(targets) != (self._teacher is not None):
            found, expected = ("outputs", "none") if targets else ("no outputs", "those of a teacher as here")
            raise ValueError(f"{source} has {found} of a teacher; expected {expected}")

    def save(self, path: str | Path) -> None:
        """Writes everything to a file, which is replaced in one step; torch.load reads it.

        Args:
            path: the file, which keeps its mode; a link to a file stays. A file beside it, with ``.partial`` at the end
                of its name, is there while it is written.

        Raises:
            OSError: it cannot be written.
        """
        check_path("path", path)
        slots = {id(sums): sums for sums in self._inputs.values()}
        places = {key: index for index, key in enumerate(slots)}
        state = {
            "batches": self.batches,
            "collected": self._collected,
            "read": self._read,
            "names": self.names,
            "layers": {name: places[id(sums)] for name, sums in self._inputs.items()},
            # On the CPU, so that a machine without the device reads them.
            "inputs": [[sums.gram.cpu(), sums.total.cpu(), sums.count] for sums in slots.values()],
            "targets": {
                name: [sums.cross.cpu(), sums.total.cpu(), sums.square.cpu()] for name, sums in self._targets.items()
            },
            "dtype": str(self._dtype),
        }
        with replacing(Path(path)) as file:
            torch.save(state, file)

    def load(self, path: str | Path) -> LayerStatistics:
        """Takes everything from a file that ``save`` wrote; returns self.

        Args:
            path: the file, or a pipe with its content.

        Raises:
            OSError: it cannot be read.
            ValueError: the file is damaged, or of other layers, other numbers of features, or another dtype.
        """
        # torch.load reads what is no archive, such as text, as the opcodes of a pickle, and fails in any way.
        with Path(path).open("rb") as file:
            # A pipe is read once: opened again, it would wait for another writer.
            piped = None if file.seekable() else io.BytesIO(file.read())
            if not is_zipfile(piped or file):
                raise ValueError(f"{path} is no file of LayerStatistics.save, or damaged")
        try:
            in_files = self._storage.folder is not None and piped is None
            if piped is not None:
                piped.seek(0)
            state = torch.load(piped or path, weights_only=True, mmap=in_files, map_location="cpu")
        except (EOFError, RuntimeError, pickle.UnpicklingError, struct.error) as error:
            raise ValueError(f"{path} is no file of LayerStatistics.save, or damaged: {error}") from error
        if not isinstance(state, dict) or not {"batches", "layers", "inputs", "targets", "dtype"} <= state.keys():
            raise ValueError(f"{path} is no file of LayerStatistics.save")
        # Files of before have no names but those of layers that rows have reached.
        of = list(state["names"] if "names" in state else state["layers"])
        unknown = [name for name in of if name not in self._layers]
        lacking = [name for name in self.names if "names" in state and name not in of]
        if unknown or lacking or state["dtype"] != str(self._dtype):
            raise ValueError(
                f"{path} is of {state['dtype']} sums"
                + (f" and of the layer {unknown[0]!r}, which this one has not" if unknown else "")
                + (f" and not of the layer {lacking[0]!r}" if lacking else "")
                + f"; expected {self._dtype} sums of {len(self.names)} layers such as {self.names[0]!r}"
            )
        devices = {index: self._layers[name].weight.device for name, index in state["layers"].items()}
        slots = [
            InputSums(self._storage.at(gram, device), total.to(device), count)
            for device, (gram, total, count) in (
                (devices.get(index, "cpu"), parts) for index, parts in enumerate(state["inputs"])
            )
        ]
        if not all(index in range(len(slots)) for index in state["layers"].values()):
            raise ValueError(f"{path} is damaged: it has layers without sums")
        for name, index in state["layers"].items():
            found, expected = len(slots[index].gram), self._layers[name].weight.shape[1]
            if found != expected:
                raise ValueError(f"{path} has {found} features of the layer {name!r}; expected {expected}")
        self._check_targets(state["layers"], state["targets"], str(path))
        self._inputs = {name: slots[index] for name, index in state["layers"].items()}
        self._targets = {}
        for name, (cross, *others) in state["targets"].items():
            device = self._layers[name].weight.device
            self._targets[name] = TargetSums(self._storage.at(cross, device), *(other.to(device) for other in others))
        self.batches = state["batches"]
        self._collected, self._read = state.get("collected", self.batches), state.get("read", "")
        return self

    def trace(self, batch: Any) -> dict[str, list[int]]:
        """The layers that one batch reaches, in the order of their first calls, and which inputs each is given.

        Nothing is added. Inputs are numbered; the same number is the same tensor.

        Args:
            batch: as in ``update``.

        Returns:
            For each layer the numbers of the inputs of its calls.

        Raises:
            RuntimeError: the batch does not go through the model (its own errors, whatever they are).
        """
        seen = Seen(self._layers, self._dtype, None, self._storage, sums=False)
        hooked, calls = seen.of_model(self._model, Masks())
        with evaluating(self._model), torch.no_grad(), replaced(padded([self._model])), hooked, calls:
            call(self._model, batch)
        return seen.given

    @undisturbed
    def kept_factor(self, name: str, damping: float) -> tuple[linalg.InverseCholeskyResult, float]:
        """U of E[xxᵀ] of a layer over its mean diagonal element, and that element; factored once, and kept.

        Args:
            name: of a layer.
            damping: as for ``linalg.inverse_cholesky``, in means of the diagonal.

        Raises:
            ValueError: no row has reached the layer.
            LinAlgError: there is no factor with any damping.
        """
        sums = self[name]
        kept = self._factors.get(name)
        if kept is None or kept[0] is not sums or kept[1] != damping:
            scale = float(sums.gram.diagonal().mean())
            if not scale > 0:
                raise ValueError(f"no row other than 0 has reached layer {name!r}: collect statistics first")
            gram = sums.gram.to(self._layers[name].weight.device)
            result = linalg.inverse_cholesky(gram / scale, damping=damping)
            if bool(result.damping.isnan()):
                raise LinAlgError(f"the inputs of layer {name!r} have no factor with any damping")
            kept = self._factors[name] = (sums, damping, result, scale / sums.count)
        return kept[2], kept[3]

    @undisturbed
    def rank(self, name: str) -> int:
        """How many of a layer's inputs are independent, as far as the sums' dtype can tell; those that are 0 are not.

        Args:
            name: of a layer.

        Returns:
            The eigenvalues of the Gram matrix, scaled to a diagonal of 1, that are above ε times their number; no more
            than rows.

        Raises:
            KeyError: the name is of no layer.
        """
        sums = self[name]
        if self._rank is None or self._rank[0] is not sums:
            self._rank = (sums, numerical_rank(sums.gram, sums.count))
        return self._rank[1]

    def _commit(self, seen: Seen) -> None:
        """Adds what one pass has seen: layers that had the same sums and were given the same inputs still do."""
        for name, keys in seen.given.items():
            for key in keys:
                if not seen.sums[key].gram.diagonal().sum().isfinite():
                    raise ValueError(f"the inputs of layer {name!r} hold NaN or infinity, or overflow {self._dtype}")
        for name, targets_of in seen.crossed.items():
            if not bool(targets_of.square.isfinite()):
                raise ValueError(
                    f"the teacher's outputs for layer {name!r} hold NaN or infinity, or overflow {self._dtype}"
                )
        moved: dict[tuple[Any, ...], InputSums] = {}
        inputs = dict(self._inputs)
        for name, keys in seen.given.items():
            old = self._inputs.get(name)
            place = (id(old), *keys)
            if place not in moved:
                new = old
                for key in keys:
                    new = seen.sums[key] if new is None else new.plus(seen.sums[key], self._storage)
                assert new is not None
                moved[place] = new
            inputs[name] = moved[place]
        targets = dict(self._targets)
        for name, sums in seen.crossed.items():
            targets[name] = targets[name].plus(sums, self._storage) if name in targets else sums
        self._inputs, self._targets, self.batches = inputs, targets, self.batches + 1


def _mark(before: str, batch: Any) -> str:
    """A hash of a batch and those before it; of what else than tensors and plain values is in it, by its type."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: plain(value[name]) for name in sorted(value, key=str)}
        if isinstance(value, (tuple, list)):
            return [plain(one) for one in value]
        if isinstance(value, Tensor) and value.layout == torch.strided:
            return value
        known = value is None or isinstance(value, (bool, int, float, str))
        return value if known else str(type(value))

    names = sorted(map(str, batch)) if isinstance(batch, Mapping) else []
    return digest((before, str(type(batch)), names, plain(batch)))
