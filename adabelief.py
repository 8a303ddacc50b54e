"""AdaBelief, the optimiser of the paper (Zhuang et al., NeurIPS 2020).

    m <- b1 m + (1 - b1) g                     the expected gradient, a running mean
    s <- b2 s + (1 - b2) (g - m)^2 + eps       how far gradients are from it, squared
    m' = m / (1 - b1^t),  s' = s / (1 - b2^t)  bias correction: both means start at zero
    p <- p - lr m' / (sqrt(s') + eps)          long steps where gradients are as expected

Adam has g^2 instead of (g - m)^2, and no eps inside s. The file stands alone, and works with any
model; train.py uses it.

    optimizer = AdaBelief(model.parameters(), lr=1e-3)
"""

import math

import torch
from torch.optim import Optimizer


class AdaBelief(Optimizer):
    """AdaBelief with `torch._foreach_*`: one call for each operation on all tensors.

    Args:
        params: float32 or float64 tensors, or dicts that define parameter groups.
        lr: step size, 0 or more.
        betas: decay of m and of s, two numbers in [0, 1).
        eps: added to s in every step, and to its root; 1e-37 or more, because of float32.
        weight_decay: 0 for none.
        decoupled: shrink the parameters by lr * weight_decay (as AdamW does) instead of adding
            weight_decay * p to the gradient.
        rectify: scale the steps as RAdam does; the first steps are plain momentum steps.

    Raises:
        ValueError: an argument is outside its range.
        TypeError, in `step`: a parameter is of another type (half precision cannot hold eps).
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0.0,
        decoupled: bool = True,
        rectify: bool = False,
    ):
        if not (0 <= lr < math.inf and 0 <= weight_decay < math.inf):
            raise ValueError(f"lr and weight_decay must be 0 or more: {lr}, {weight_decay}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1): {betas}")
        if not 1e-37 <= eps < math.inf:
            raise ValueError(f"eps must be 1e-37 or more: {eps}")
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled=decoupled,
            rectify=rectify,
        )
        super().__init__(params, defaults)

    def load_state_dict(self, state_dict):
        """Go on from the `state_dict()` of an AdaBelief. Raises ValueError: it is of another."""
        if "rectify" not in state_dict["param_groups"][0]:
            raise ValueError("this is the state of another optimiser")
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient. Returns what `closure` returns."""
        loss = closure and torch.enable_grad()(closure)()
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
        return loss

    def _update(self, group, t, params):
        lr, (b1, b2), eps, decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
        g = [p.grad for p in params]
        m = [self.state[p]["m"] for p in params]
        s = [self.state[p]["s"] for p in params]
        if decay and group["decoupled"]:
            torch._foreach_mul_(params, 1 - lr * decay)
        elif decay:
            g = torch._foreach_add(g, params, alpha=decay)

        torch._foreach_lerp_(m, g, 1 - b1)
        surprise = torch._foreach_sub(g, m)
        torch._foreach_mul_(s, b2)
        torch._foreach_addcmul_(s, surprise, surprise, value=1 - b2)
        torch._foreach_add_(s, eps)

        # The bias corrections are plain numbers, so they go into the step size.
        step_size, root = lr / (1 - b1**t), math.sqrt(1 - b2**t)
        if group["rectify"]:  # RAdam: t_max and t_eff are the lengths of the mean s
            t_max = 2 / (1 - b2) - 1
            t_eff = t_max - 2 * t * b2**t / (1 - b2**t)
            if t_eff < 5:
                torch._foreach_add_(params, m, alpha=-step_size)
                return
            done = (t_eff - 4) * (t_eff - 2) / t_eff
            step_size *= math.sqrt(done * t_max / ((t_max - 4) * (t_max - 2)))
        else:
            eps *= root  # with `rectify` the authors' code divides by sqrt(s) + eps instead
        denom = torch._foreach_sqrt(s)
        torch._foreach_add_(denom, eps)
        torch._foreach_addcdiv_(params, m, denom, value=-step_size * root)
