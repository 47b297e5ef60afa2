"""RNN, GRU and LSTM, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


def _function(name: str, alpha: float | None, beta: float | None) -> Function:
    """Return an activation function by its ONNX name, with ONNX's default coefficients."""

    def first(default: float) -> float:
        return default if alpha is None else alpha

    def second(default: float) -> float:
        return default if beta is None else beta

    functions: dict[str, Function] = {
        "affine": lambda x: first(1.0) * x + second(0.0),
        "elu": lambda x: functional.elu(x, first(1.0)),
        "hardsigmoid": lambda x: torch.clamp(first(0.2) * x + second(0.5), 0.0, 1.0),
        "leakyrelu": lambda x: functional.leaky_relu(x, first(0.01)),
        "relu": torch.relu,
        "scaledtanh": lambda x: first(1.0) * torch.tanh(second(1.0) * x),
        "sigmoid": torch.sigmoid,
        "softplus": functional.softplus,
        "softsign": functional.softsign,
        "tanh": torch.tanh,
        "thresholdedrelu": lambda x: functional.threshold(x, first(1.0), 0.0),
    }
    return functions[name.lower()]


_WITH_COEFFICIENTS = {  # how many of alpha and beta each function consumes
    "affine": (1, 1),
    "elu": (1, 0),
    "hardsigmoid": (1, 1),
    "leakyrelu": (1, 0),
    "scaledtanh": (1, 1),
    "thresholdedrelu": (1, 0),
}


def _functions(node: Node, num_directions: int) -> list[Function]:
    names = node.attributes.get("activations") or _DEFAULTS[node.op_type] * num_directions
    given = {
        "alpha": list(node.attributes.get("activation_alpha", ())),
        "beta": list(node.attributes.get("activation_beta", ())),
    }
    functions = []
    for name in names:
        wants = _WITH_COEFFICIENTS.get(name.lower(), (0, 0))
        alpha = given["alpha"].pop(0) if wants[0] and given["alpha"] else None
        beta = given["beta"].pop(0) if wants[1] and given["beta"] else None
        functions.append(_function(name, alpha, beta))
    return functions


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
            state: Tensors = tuple(part[index] for part in given)
            projected = x @ weight[index].t()
            times = range(len(x))
            steps: dict[int, torch.Tensor] = {}
            for time in reversed(times) if backward else times:
                new = step(current, projected[time], state)
                shown = new[0]
                if lengths is not None:
                    alive = (lengths.to(x.device) > time)[:, None]
                    new = tuple(
                        torch.where(alive, n, s) for n, s in zip(new, state, strict=True)
                    )
                    shown = torch.where(alive, shown, 0)
                steps[time], state = shown, new
            outputs.append(torch.stack([steps[time] for time in times]))
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
