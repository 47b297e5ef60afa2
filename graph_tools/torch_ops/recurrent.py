"""RNN, GRU and LSTM, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from graph_tools.torch_ops.registry import OPERATORS, Compute, Node, Operator

__all__ = ["recurrent"]

Tensors = tuple[torch.Tensor, ...]
Function = Callable[[torch.Tensor], torch.Tensor]

_DEFAULTS = {
    "RNN": ("Tanh",),
    "GRU": ("Sigmoid", "Tanh"),
    "LSTM": ("Sigmoid", "Tanh", "Tanh"),
}


# Each takes x, alpha and beta; behind it ONNX's defaults of those it has.
_FUNCTIONS: dict[str, tuple[Callable[..., torch.Tensor], tuple[float, ...]]] = {
    "affine": (lambda x, alpha, beta: alpha * x + beta, (1.0, 0.0)),
    "elu": (functional.elu, (1.0,)),
    "hardsigmoid": (lambda x, alpha, beta: (alpha * x + beta).clamp(0.0, 1.0), (0.2, 0.5)),
    "leakyrelu": (functional.leaky_relu, (0.01,)),
    "relu": (torch.relu, ()),
    "scaledtanh": (lambda x, alpha, beta: alpha * torch.tanh(beta * x), (1.0, 1.0)),
    "sigmoid": (torch.sigmoid, ()),
    "softplus": (functional.softplus, ()),
    "softsign": (functional.softsign, ()),
    "tanh": (torch.tanh, ()),
    "thresholdedrelu": (lambda x, alpha: functional.threshold(x, alpha, 0.0), (1.0,)),
}


def _functions(node: Node, num_directions: int) -> list[Function]:
    """Return the activation functions; each takes its coefficients from the lists' heads."""
    names = node.attributes.get("activations") or _DEFAULTS[node.op_type] * num_directions
    given = [list(node.attributes.get(f"activation_{name}", ())) for name in ("alpha", "beta")]
    functions: list[Function] = []
    for name in names:
        if name.lower() not in _FUNCTIONS:
            raise node.fault(f"no activation function {name!r}")
        function, defaults = _FUNCTIONS[name.lower()]
        coefficients = [
            values.pop(0) if values else default
            for values, default in zip(given, defaults, strict=False)
        ]
        functions.append(partial(_apply, function, coefficients))
    return functions


def _apply(
    function: Callable[..., torch.Tensor], coefficients: Sequence[float], x: torch.Tensor
) -> torch.Tensor:
    return function(x, *coefficients)


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """Weights of one direction, and one step of its cell.

    Attributes:
        recurrence: ``[gates * hidden, hidden]``.
        bias: of the input and of the recurrence, ``[gates * hidden]`` each.
        peepholes: LSTM: of input, output and forget gate, ``[hidden]`` each.
        functions: activation functions in the order of ONNX.
        clip: limit of what goes into the activation functions.
    """

    recurrence: torch.Tensor
    bias: Tensors
    peepholes: Tensors
    functions: Sequence[Function]
    clip: Function

    def rnn(self, x: torch.Tensor, state: Tensors) -> Tensors:
        """One step of an RNN; ``x`` is the input times its weight, ``[N, gates * hidden]``."""
        added = x + sum(self.bias) + state[0] @ self.recurrence.t()
        return (self.functions[0](self.clip(added)),)

    def gru(self, x: torch.Tensor, state: Tensors, *, reset_last: bool) -> Tensors:
        """One step of a GRU; gates: update, reset, hidden."""
        activate, hidden_function = self.functions
        (hidden,) = state
        of_x = (x + self.bias[0]).chunk(3, -1)
        weights, biases = self.recurrence.chunk(3), self.bias[1].chunk(3)
        update, reset = (
            activate(self.clip(of_x[gate] + hidden @ weights[gate].t() + biases[gate]))
            for gate in (0, 1)
        )
        if reset_last:
            recurrent = reset * (hidden @ weights[2].t() + biases[2])
        else:
            recurrent = (reset * hidden) @ weights[2].t() + biases[2]
        new = hidden_function(self.clip(of_x[2] + recurrent))
        return ((1 - update) * new + update * hidden,)

    def lstm(self, x: torch.Tensor, state: Tensors, *, coupled: bool) -> Tensors:
        """One step of an LSTM; gates: input, output, forget, cell."""
        activate, cell_function, hidden_function = self.functions
        hidden, cell = state
        gates = (x + sum(self.bias) + hidden @ self.recurrence.t()).chunk(4, -1)
        of_input, of_output, of_forget = self.peepholes
        enter = activate(self.clip(gates[0] + of_input * cell))
        keep = 1 - enter if coupled else activate(self.clip(gates[2] + of_forget * cell))
        cell = keep * cell + enter * cell_function(self.clip(gates[3]))
        leave = activate(self.clip(gates[1] + of_output * cell))
        return leave * hidden_function(cell), cell


def _walk(
    step: Callable[[torch.Tensor, Tensors], Tensors],
    inputs: torch.Tensor,
    state: Tensors,
    lengths: torch.Tensor | None,
    *,
    backward: bool,
) -> tuple[torch.Tensor, Tensors]:
    """Take the steps of one direction; return what each step shows, and the last state."""
    shown: dict[int, torch.Tensor] = {}
    times = range(len(inputs))
    for time in reversed(times) if backward else times:
        new = step(inputs[time], state)
        shown[time] = new[0]
        if lengths is not None:
            alive = (lengths > time)[:, None]
            shown[time] = torch.where(alive, new[0], 0)
            new = tuple(torch.where(alive, n, s) for n, s in zip(new, state, strict=True))
        state = new
    return torch.stack([shown[time] for time in times]), state


def recurrent(node: Node) -> Compute:
    """Run a cell along a sequence, forwards, backwards or both.

    Shapes as in ONNX: input ``[length, N, size]``, weights ``[directions, gates * hidden,
    ...]``; batch first with ``layout`` 1. Steps behind the end of a shorter sequence leave the
    state as it is and give zeros.
    """
    direction = node.text("direction", "forward")
    backwards = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}
    num_directions = len(backwards[direction])
    functions = _functions(node, num_directions)
    share = len(functions) // num_directions
    batch_first, limit = node.flag("layout"), node.attributes.get("clip")
    num_states = 2 if node.op_type == "LSTM" else 1

    def clip(x: torch.Tensor) -> torch.Tensor:
        return x if limit is None else torch.clamp(x, -limit, limit)

    def step(cell: _Cell, x: torch.Tensor, state: Tensors) -> Tensors:
        if node.op_type == "GRU":
            return cell.gru(x, state, reset_last=node.flag("linear_before_reset"))
        if node.op_type == "LSTM":
            return cell.lstm(x, state, coupled=node.flag("input_forget"))
        return cell.rnn(x, state)

    def compute(
        x: torch.Tensor,
        weight: torch.Tensor,
        recurrence: torch.Tensor,
        bias: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
        cell: torch.Tensor | None = None,
        peepholes: torch.Tensor | None = None,
    ) -> Tensors:
        x = x.transpose(0, 1) if batch_first else x
        size = recurrence.shape[-1]
        zeros = x.new_zeros(num_directions, x.shape[1], size)
        given = [
            zeros if state is None else (state.transpose(0, 1) if batch_first else state)
            for state in (hidden, cell)[:num_states]
        ]
        outputs, finals = [], []
        for index, backward in enumerate(backwards[direction]):
            no_bias = x.new_zeros(2 * weight.shape[1])
            current = _Cell(
                recurrence=recurrence[index],
                bias=(no_bias if bias is None else bias[index]).chunk(2),
                peepholes=(
                    x.new_zeros(3 * size) if peepholes is None else peepholes[index]
                ).chunk(3),
                functions=functions[index * share : (index + 1) * share],
                clip=clip,
            )
            shown, state = _walk(
                partial(step, current),
                x @ weight[index].t(),
                tuple(part[index] for part in given),
                None if lengths is None else lengths.to(x.device),
                backward=backward,
            )
            outputs.append(shown)
            finals.append(state)
        every = torch.stack(outputs, 1)  # [length, directions, N, hidden]
        last = [torch.stack(parts) for parts in zip(*finals, strict=True)]
        if batch_first:
            every = every.permute(2, 0, 1, 3)
            last = [part.transpose(0, 1) for part in last]
        return every, *last

    return compute


for _name in _DEFAULTS:
    OPERATORS[_name] = Operator(build=recurrent)
