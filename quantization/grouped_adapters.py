"""What DoRA needs on stacks of experts, as operators that are opaque to torch.compile.

Shapes: N rows, sorted by expert; E experts, O output features of a stack, I input features, R rank.
"""

from __future__ import annotations

from quantization.grouped_operators import experts_of_rows, sum_rows
from quantization.operator_registry import register_operator


def _fake_scale_rows(y, scale, offsets):
    return y.new_empty(y.shape)  # contiguous, as the result is for y of any strides


@register_operator("(Tensor y, Tensor scale, Tensor offsets) -> Tensor", _fake_scale_rows)
def scale_rows(y, scale, offsets):
    """Return each row of y, multiplied by its expert's scale: [N, O] in y's dtype.

    Args:
        y: [N, O].
        scale: [E, O] fp32, near 1.
        offsets: [E] int32, the end of each expert's rows.
    """
    # Written as y + y * (scale - 1), because 16 bits are coarse near 1.
    change = (scale - 1).to(y.dtype)[experts_of_rows(offsets, len(y))]
    return change.mul_(y).add_(y)


def _setup_scale_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _scale_backward(ctx, grad):
    y, scale, offsets = ctx.saved_tensors
    grad_scale = sum_rows(grad.float() * y.float(), offsets) if ctx.needs_input_grad[1] else None
    return scale_rows(grad, scale, offsets) if ctx.needs_input_grad[0] else None, grad_scale, None


scale_rows.register_autograd(_scale_backward, setup_context=_setup_scale_context)
