"""AdaBelief, the optimiser of the paper (Zhuang et al., NeurIPS 2020).

    m <- b1 m + (1 - b1) g                     the expected gradient, a running mean
    s <- b2 s + (1 - b2) (g - m)^2 + eps       how far gradients are from it, squared
    m' = m / (1 - b1^t),  s' = s / (1 - b2^t)  bias correction: both means start at zero
    p <- p - lr m' / (sqrt(s') + eps)          long steps where gradients are as expected

Adam has g^2 instead of (g - m)^2, and no eps inside s. The file stands alone, and works with any
model; train.py uses it. The authors' package, adabelief-pytorch, has more: weight decay and
rectification.

    optimizer = AdaBelief(model.parameters(), lr=1e-3)
"""

import math

import torch
from torch.optim import Optimizer


class AdaBelief(Optimizer):
    """AdaBelief with `torch._foreach_*`: one call for each operation on all tensors.

    Args:
        params: float32 or float64 tensors, or dicts that define parameter groups.
        lr: step size.
        betas: decay of m and of s, two numbers in [0, 1).
        eps: added to s in every step, and to its root.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
    ):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self):
        """Update every parameter that has a gradient. Raises TypeError: a parameter is of another
        type than float32 or float64 (half precision cannot hold eps)."""
        for group in self.param_groups:
            same_age = {}  # t -> parameters; one entry, unless some had no gradient for a while
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.dtype not in (torch.float32, torch.float64):
                    raise TypeError(f"AdaBelief takes float32 and float64, not {p.dtype}")
                state = self.state[p]
                if not state:
                    state.update(step=0, m=torch.zeros_like(p), s=torch.zeros_like(p))
                state["step"] += 1
                same_age.setdefault(state["step"], []).append(p)
            for t, params in same_age.items():
                self._update(group, t, params)

    def _update(self, group, t, params):
        lr, (b1, b2), eps = group["lr"], group["betas"], group["eps"]
        g = [p.grad for p in params]
        m = [self.state[p]["m"] for p in params]
        s = [self.state[p]["s"] for p in params]

        torch._foreach_lerp_(m, g, 1 - b1)
        surprise = torch._foreach_sub(g, m)
        torch._foreach_mul_(s, b2)
        torch._foreach_addcmul_(s, surprise, surprise, value=1 - b2)
        torch._foreach_add_(s, eps)

        # The bias corrections are plain numbers, so they go into the step size.
        step_size, root = lr / (1 - b1**t), math.sqrt(1 - b2**t)
        denom = torch._foreach_sqrt(s)
        torch._foreach_add_(denom, eps * root)
        torch._foreach_addcdiv_(params, m, denom, value=-step_size * root)
