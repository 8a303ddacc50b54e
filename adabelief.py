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

    Memory for temporaries is kept between steps. Asking the system for it in each step took longer
    than the arithmetic.

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
        ValueError: an argument is outside its range, in the defaults or in a group.
        TypeError, in `step`, before any parameter has changed: a parameter is not float32 or
            float64 (half precision cannot hold eps), or a gradient is sparse.
    """

    def __init__(self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-16, weight_decay: float = 0.0, decoupled: bool = True,
                 rectify: bool = False):
        self.scratch = {}  # a tensor like each parameter
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
                                      decoupled=decoupled, rectify=rectify))

    def add_param_group(self, param_group: dict) -> None:
        """Add a group of parameters, as to every optimiser. Raises ValueError: see the class."""
        given = {**self.defaults, **param_group}
        lr, betas, eps, decay = (given[key] for key in ("lr", "betas", "eps", "weight_decay"))
        if not (0 <= lr < math.inf and 0 <= decay < math.inf):
            raise ValueError(f"lr and weight_decay must be finite, 0 or more: {lr, decay}")
        if not (len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"betas must be two numbers in [0, 1): {betas}")
        if not 1e-37 <= eps < math.inf:
            raise ValueError(f"eps must be 1e-37 or more: {eps}")
        super().add_param_group(param_group)

    def __setstate__(self, state):
        """Copies and unpickled optimisers get temporaries of their own."""
        super().__setstate__(state)
        self.scratch = {}

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient. Returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [p for group in self.param_groups for p in group["params"]]
        for p in params:
            if p.grad is not None and (p.dtype not in (torch.float32, torch.float64)
                                       or p.grad.layout != torch.strided):
                raise TypeError("AdaBelief takes float32 and float64 parameters with dense "
                                f"gradients, not {p.dtype} with {p.grad.layout}")
        self.scratch = {p: self.scratch[p] for p in params if p in self.scratch}
        for group in self.param_groups:
            same_age = {}  # t -> parameters; one entry, unless some had no gradient for a while
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, m=torch.zeros_like(p), s=torch.zeros_like(p))
                if p not in self.scratch:
                    self.scratch[p] = torch.empty_like(p)
                state["step"] += 1
                same_age.setdefault(state["step"], []).append(p)
            for t, params in same_age.items():
                self._update(group, t, params)
        return loss

    def _update(self, group, t, params):
        lr, (b1, b2), eps, decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
        g = [p.grad for p in params]
        m, s = ([self.state[p][key] for p in params] for key in "ms")
        scratch = [self.scratch[p] for p in params]
        if decay and group["decoupled"]:
            torch._foreach_mul_(params, 1 - lr * decay)
        elif decay:
            g = torch._foreach_add(g, params, alpha=decay)

        torch._foreach_lerp_(m, g, 1 - b1)
        for surprise, g_p, m_p in zip(scratch, g, m):
            torch.sub(g_p, m_p, out=surprise)
        torch._foreach_mul_(s, b2)
        torch._foreach_addcmul_(s, scratch, scratch, value=1 - b2)
        torch._foreach_add_(s, eps)

        # The bias corrections are plain numbers, so they go into the step size.
        step_size, root = lr / (1 - b1 ** t), math.sqrt(1 - b2 ** t)
        if group["rectify"]:  # RAdam: t_max and t_eff are the lengths of the mean s
            t_max = 2 / (1 - b2) - 1
            t_eff = t_max - 2 * t * b2 ** t / (1 - b2 ** t)
            if t_eff < 5:
                torch._foreach_add_(params, m, alpha=-step_size)
                return
            step_size *= math.sqrt((t_eff - 4) * (t_eff - 2) * t_max
                                   / ((t_max - 4) * (t_max - 2) * t_eff))
        else:
            eps *= root  # with `rectify` the authors' code divides by sqrt(s) + eps instead
        for denom, s_p in zip(scratch, s):
            torch.sqrt(s_p, out=denom)
        torch._foreach_add_(scratch, eps)
        torch._foreach_addcdiv_(params, m, scratch, value=-step_size * root)
