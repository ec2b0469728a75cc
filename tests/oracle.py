"""RWKV-4 to 7 token by token in float64, straight from the papers: what losses and gradients are held to.

    time mix, RWKV-4    wkv_t = (A + e^{u+k_t} v_t) / (B + e^{u+k_t}),   A <- w A + e^{k_t} v_t,   B <- w B + e^{k_t}
                        Wo (sigmoid(r) * wkv)
    time mix, RWKV-5    y_t = r_t (S + diag(u) k_t^T v_t),    S <- diag(w) S + k_t^T v_t
                        Wo (silu(g) * GroupNorm(y / 8)), in 5.0 without g
    channel mix         sigmoid(r) * Wv relu(k)^2
    time mix, RWKV-6    RWKV-5's with a w_t of each token, and mixes that depend on it and the one before
    time mix, RWKV-7    S <- (diag(w_t) - (a_t kappa_t)^T kappa_t) S + k_t^T v_t,   y_t = r_t S
                        Wo (g (GroupNorm(y / 8) + (r k r_k) v))
    channel mix         Wv relu(k)^2

(Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era", section 3.1; Peng et al. 2024, "Eagle and Finch",
sections 4.1 and 4.2; Peng et al. 2025, "RWKV-7 Goose", section 4) with w = exp(-exp(time_decay)) in RWKV-4 and 5, every
projection of ``mu x_t + (1 - mu) x_{t-1}`` after the LayerNorm, and ln0 once on the embedding. Autograd differentiates
the lines below; nothing is in chunks, blocked, rounded or rescaled, and A and B are the plain sums (float64 holds
e^{700}).

Nothing here knows the package that it judges. Tensors have the names that the original trainer gave them. The rule for
masks is the meaning of a mask, not an implementation of one: masked tokens are taken out of their row, and each
remaining token predicts the label of the next one that remains.

Cost: one Python step per token and layer. Tests import it as ``from oracle import Case, solve``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

LAYER_NORM_EPSILON = 1e-5
PUBLISHED_GROUP_NORM = (1e-5, 8.0)
"""eps of the GroupNorm, and ``head_size_divisor`` by which its input is divided first."""

IGNORE = -100
PARTS = ("time_shift", "channel_shift", "memory")


@dataclass
class State:
    """State after some tokens.

    Attributes:
        time_shift, channel_shift: [L, B, D], the last token's vector after ln1, after ln2.
        memory: [L, B, H, N, N], S with the key index first; or RWKV-4's [L, B, 3, D], (a, b, m) with A = a e^m and
            B = b e^m. m is a choice of units, not a quantity: no gradient goes to it or comes from it.
    """

    time_shift: Tensor
    channel_shift: Tensor
    memory: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.time_shift, self.channel_shift, self.memory]

    def quantities(self) -> list[Tensor]:
        """The tensors, with RWKV-4's sums A and B themselves in place of (a, b, m)."""
        if self.memory.dim() == 5:
            return self.tensors()
        sums = self.memory[:, :, :2].double() * torch.exp(self.memory[:, :, 2:].double())
        return [self.time_shift, self.channel_shift, sums]


@dataclass(frozen=True)
class Case:
    """One batch, and what of it is asked.

    Attributes:
        labels: [B, T], not shifted; -100 predicts nothing.
        tokens: [B, T]; or ``embeds`` [B, T, D], which stand for the rows of ``emb.weight``.
        valid: [B, T] bool, false where a token is masked; None when none is.
        state: before the first token; empty when None.
        final_objective: G; the sum of its products with the final state is differentiated too (not in the loss).
        divisor: of the summed cross-entropy; the number of predicted tokens when None, or the sum of their weights.
        weights: [B, T], what each token's own cross-entropy counts; 1 when None.
        cut: C, where the gradient is to stop at every C-th position (truncated back-propagation); 0: nowhere.
        group_norm: eps and divisor of RWKV-5's GroupNorm.
    """

    labels: Tensor
    tokens: Tensor | None = None
    embeds: Tensor | None = None
    valid: Tensor | None = None
    state: State | None = None
    final_objective: State | None = None
    divisor: float | None = None
    weights: Tensor | None = None
    cut: int = 0
    group_norm: tuple[float, float] = PUBLISHED_GROUP_NORM


@dataclass
class Answer:
    """Loss, final state, and gradients by original tensor name, by part of the given state, by the embeddings."""

    loss: float
    state: State
    gradients: dict[str, Tensor]
    by_state: dict[str, Tensor] = field(default_factory=dict)
    by_embeds: Tensor | None = None


def solve(tensors: Mapping[str, Tensor], case: Case, dtype: torch.dtype = torch.float64) -> Answer:
    """Loss and all gradients of a case.

    Args:
        tensors: by original name, any floating dtype.
        dtype: of the arithmetic; float32 tells what that makes of the same lines.
    """

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype, copy=True).requires_grad_()

    weights = {name: leaf(tensor) for name, tensor in tensors.items()}
    given = [] if case.state is None else [leaf(part) for part in case.state.tensors()]
    embeds = [] if case.embeds is None else [leaf(case.embeds)]
    case = replace(case, state=State(*given) if given else None, embeds=embeds[0] if embeds else None)
    loss, end = _run(weights, case)
    objective = loss
    if case.final_objective is not None:
        pairs = zip(end.tensors(), case.final_objective.tensors(), strict=True)
        objective = loss + sum((mine * theirs.to(dtype)).sum() for mine, theirs in pairs)
    wanted = [*weights.values(), *given, *embeds]
    found = iter(torch.autograd.grad(objective, wanted, allow_unused=True, materialize_grads=True))
    return Answer(
        loss.item(),
        State(*(part.detach() for part in end.tensors())),
        {name: next(found) for name in weights},
        {part: next(found) for part, _ in zip(PARTS, given, strict=False)},
        next(found, None),
    )


def logits(
    tensors: Mapping[str, Tensor], tokens: Tensor, group_norm: tuple[float, float] = PUBLISHED_GROUP_NORM
) -> Tensor:
    """Logits [B, V] after the last of ``tokens`` [B, T]."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    state, w = _layers(_empty(weights, len(tokens))), _derived(weights)
    for token in tokens.unbind(1):
        out, state = _token(w, w["emb.weight"][token], state, group_norm)
    return out


Layers = list[tuple[Tensor, Tensor, Tensor]]
"""A state layer by layer, in the order of :data:`PARTS`: what a token's step reads and writes."""


def _run(weights: dict[str, Tensor], case: Case) -> tuple[Tensor, State]:
    """Loss and final state, with graph."""
    batch, length = case.labels.shape
    valid = torch.ones(batch, length, dtype=torch.bool) if case.valid is None else case.valid
    places, alive = _remaining(valid)  # [B, S]
    state = _layers(_empty(weights, batch) if case.state is None else case.state)
    w = _derived(weights)
    total, predicted = 0 * weights["emb.weight"].sum(), 0.0
    chunk = torch.zeros(batch, dtype=torch.int64)  # of the row's last token, where the gradient is cut
    rows = torch.arange(batch)
    for step in range(places.shape[1]):
        place, here = places[:, step], alive[:, step]
        if case.cut:
            state = _where((place // case.cut == chunk) | ~here, state, _detached(state))
            chunk = torch.where(here, place // case.cut, chunk)
        if case.embeds is None:
            assert case.tokens is not None
            x = weights["emb.weight"][case.tokens[rows, place]]
        else:
            x = case.embeds[rows, place]
        logits, after = _token(w, x, state, case.group_norm)
        state = _where(here, after, state)
        if step + 1 == places.shape[1]:
            break
        target = case.labels[rows, places[:, step + 1]]
        counts = alive[:, step + 1] & (target != IGNORE)
        of_token = torch.ones(batch) if case.weights is None else case.weights[rows, places[:, step + 1]]
        predicted += float(of_token[counts].double().sum())
        cross_entropy = torch.logsumexp(logits, -1) - logits[rows, target.clamp(min=0)]
        total = total + (of_token[counts] * cross_entropy[counts]).sum()
    if case.cut:  # rows without a token in the last chunk
        state = _where((length - 1) // case.cut == chunk, state, _detached(state))
    end = State(*(torch.stack(parts) for parts in zip(*state, strict=True)))
    return total / ((predicted or 1.0) if case.divisor is None else case.divisor), end


def _remaining(valid: Tensor) -> tuple[Tensor, Tensor]:
    """[B, S] positions of each row's valid tokens in order, and whether there is one; S is the longest row's count."""
    counts = valid.sum(1)
    places = torch.zeros(len(valid), int(counts.max()), dtype=torch.int64)
    for row, flags in enumerate(valid):
        places[row, : counts[row]] = flags.nonzero()[:, 0]
    return places, torch.arange(places.shape[1]) < counts[:, None]


def _token(
    w: dict[str, Tensor], x: Tensor, state: Layers, group_norm: tuple[float, float]
) -> tuple[Tensor, Layers]:
    """Logits [B, V] and state after one token, whose embedding is x [B, D]."""
    x = _layer_norm(w, "blocks.0.ln0", x)
    after = []
    first: list[Tensor] = []  # of RWKV-7: the values of layer 0
    for layer, (time_shift, channel_shift, memory) in enumerate(state):
        block = f"blocks.{layer}"
        to_time = _layer_norm(w, f"{block}.ln1", x)
        if f"{block}.att.r_k" in w:
            mixed, memory = _time_mix_7(w, f"{block}.att.", to_time, time_shift, memory, group_norm, first)
        elif f"{block}.att.time_maa_x" in w:
            mixed, memory = _time_mix_6(w, f"{block}.att.", to_time, time_shift, memory, group_norm)
        else:
            mixed, memory = _time_mix(w, f"{block}.att", to_time, time_shift, memory, group_norm)
        x = x + mixed
        to_channel = _layer_norm(w, f"{block}.ln2", x)
        x = x + _channel_mix(w, f"{block}.ffn", to_channel, channel_shift)
        after.append((to_time, to_channel, memory))
    return _layer_norm(w, "ln_out", x) @ w["head.weight"].T, after


def _derived(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, mixes as [D], and what is the same for every token: ``w`` and ``u`` of each time mix."""
    vectors = (".time_mix_", ".x_", ".w0", ".a0", ".v0", ".k_k", ".k_a")
    w = {
        name: tensor.flatten()
        if any(part in name for part in vectors) or tensor.shape[:2] == (1, 1)
        else tensor
        for name, tensor in weights.items()
    }
    for name in weights:
        if name.endswith(".time_decay") and f"{name.removesuffix('decay')}maa_x" not in w:
            att = name.removesuffix(".time_decay")
            decay = torch.exp(-torch.exp(w[name]))
            bonus = w[f"{att}.time_first" if f"{att}.time_first" in w else f"{att}.time_faaaa"]
            if f"{att}.ln_x.weight" in w:
                if f"{att}.time_first" in w:  # 5.0 as it was first trained has the logarithm of the bonus
                    bonus = torch.exp(bonus)
                decay, bonus = (part.reshape(len(part), -1, 1) for part in (decay, bonus))  # [H, N or 1, 1]
            w[f"{att}.w"], w[f"{att}.u"] = decay, bonus
    return w


def _time_mix(
    w: dict[str, Tensor],
    att: str,
    now: Tensor,
    before: Tensor,
    memory: Tensor,
    group_norm: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    def projected(letter: str, name: str) -> Tensor:
        mu = w[f"{att}.time_mix_{letter}"]
        return (mu * now + (1 - mu) * before) @ w[f"{att}.{name}.weight"].T

    r, k, v = projected("r", "receptance"), projected("k", "key"), projected("v", "value")
    decay, bonus = w[f"{att}.w"], w[f"{att}.u"]
    if f"{att}.ln_x.weight" not in w:
        wkv, memory = _wkv4(k, v, decay, bonus, memory)
        return (torch.sigmoid(r) * wkv) @ w[f"{att}.output.weight"].T, memory
    heads = len(decay)
    r, k, v = (part.unflatten(-1, (heads, -1)) for part in (r, k, v))  # [B, H, N]
    product = k[..., :, None] * v[..., None, :]
    y = (r[..., None, :] @ (memory + bonus * product)).flatten(1)  # [B, D]
    memory = decay * memory + product
    epsilon, divisor = group_norm
    y = F.group_norm(y / divisor, heads, w[f"{att}.ln_x.weight"], w[f"{att}.ln_x.bias"], epsilon)
    if f"{att}.gate.weight" in w:
        y = y * F.silu(projected("g", "gate"))
    return y @ w[f"{att}.output.weight"].T, memory


def _time_mix_6(
    w: dict[str, Tensor],
    att: str,
    now: Tensor,
    before: Tensor,
    memory: Tensor,
    group_norm: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    change = before - now
    hidden = torch.tanh((now + change * w[f"{att}time_maa_x"]) @ w[f"{att}time_maa_w1"]).chunk(5, -1)
    mixed = {
        letter: now + change * (w[f"{att}time_maa_{letter}"] + part @ up)
        for letter, part, up in zip("wkvrg", hidden, w[f"{att}time_maa_w2"], strict=True)
    }
    shape = w[f"{att}time_faaaa"].shape
    r, k, v, g = (
        mixed[name[0]] @ w[f"{att}{name}.weight"].T for name in ("receptance", "key", "value", "gate")
    )
    low_rank = torch.tanh(mixed["w"] @ w[f"{att}time_decay_w1"]) @ w[f"{att}time_decay_w2"]
    decay = torch.exp(-torch.exp(w[f"{att}time_decay"] + low_rank))
    r, k, v, decay = (part.unflatten(-1, shape) for part in (r, k, v, decay))  # [B, H, N]
    product = k[..., :, None] * v[..., None, :]
    y = (r[..., None, :] @ (memory + w[f"{att}time_faaaa"][..., None] * product)).flatten(1)
    memory = decay[..., None] * memory + product
    epsilon, divisor = group_norm
    y = F.group_norm(y / divisor, shape[0], w[f"{att}ln_x.weight"], w[f"{att}ln_x.bias"], epsilon)
    return (y * F.silu(g)) @ w[f"{att}output.weight"].T, memory


def _time_mix_7(
    w: dict[str, Tensor],
    att: str,
    now: Tensor,
    before: Tensor,
    memory: Tensor,
    group_norm: tuple[float, float],
    first: list[Tensor],
) -> tuple[Tensor, Tensor]:
    def mixed(letter: str) -> Tensor:
        share = w[f"{att}x_{letter}"]
        return (1 - share) * now + share * before

    def low_rank(letter: str, x: Tensor) -> Tensor:
        return x @ w[f"{att}{letter}1"] @ w[f"{att}{letter}2"]

    shape = w[f"{att}r_k"].shape
    r, k, v = (
        mixed(letter) @ w[f"{att}{name}.weight"].T
        for letter, name in (("r", "receptance"), ("k", "key"), ("v", "value"))
    )
    hidden = torch.tanh(mixed("w") @ w[f"{att}w1"])
    decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(w[f"{att}w0"] + hidden @ w[f"{att}w2"]))
    a = torch.sigmoid(w[f"{att}a0"] + low_rank("a", mixed("a")))
    g = torch.sigmoid(mixed("g") @ w[f"{att}g1"]) @ w[f"{att}g2"]
    kappa = F.normalize((k * w[f"{att}k_k"]).unflatten(-1, shape), dim=-1)
    k = k + k * (a - 1) * w[f"{att}k_a"]
    if first:
        v = torch.lerp(v, first[0], torch.sigmoid(w[f"{att}v0"] + low_rank("v", mixed("v"))))
    else:
        first.append(v)
    r, k, v, a, decay = (part.unflatten(-1, shape) for part in (r, k, v, a, decay))  # [B, H, N]
    found = kappa[..., None, :] @ memory
    memory = decay[..., None] * memory - (a * kappa)[..., None] * found + k[..., None] * v[..., None, :]
    epsilon, divisor = group_norm
    y = (r[..., None, :] @ memory).flatten(1) / divisor
    y = F.group_norm(y, shape[0], w[f"{att}ln_x.weight"], w[f"{att}ln_x.bias"], epsilon)
    y = y + ((r * k * w[f"{att}r_k"]).sum(-1, keepdim=True) * v).flatten(1)
    return (y * g) @ w[f"{att}output.weight"].T, memory


def _wkv4(k: Tensor, v: Tensor, decay: Tensor, u: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """wkv [B, D], and (a, b, m) after the token, whose m is the largest exponent so far, decayed."""
    a, b, m = memory.unbind(1)
    unit = torch.exp(m)
    A, B = a * unit, b * unit
    present, bonus = torch.exp(k), torch.exp(u + k)
    wkv = (A + bonus * v) / (B + bonus)
    A, B = decay * A + present * v, decay * B + present
    with torch.no_grad():
        m = torch.maximum(m + torch.log(decay), k)
        unit = torch.exp(-m)
    return wkv, torch.stack([A * unit, B * unit, m], 1)


def _channel_mix(w: dict[str, Tensor], ffn: str, now: Tensor, before: Tensor) -> Tensor:
    if f"{ffn}.x_k" in w:  # RWKV-7
        key = (now + (before - now) * w[f"{ffn}.x_k"]) @ w[f"{ffn}.key.weight"].T
        return torch.relu(key).square() @ w[f"{ffn}.value.weight"].T
    if f"{ffn}.time_maa_k" in w:  # RWKV-6
        mu_k, mu_r = 1 - w[f"{ffn}.time_maa_k"], 1 - w[f"{ffn}.time_maa_r"]
    else:
        mu_k, mu_r = w[f"{ffn}.time_mix_k"], w[f"{ffn}.time_mix_r"]
    key = (mu_k * now + (1 - mu_k) * before) @ w[f"{ffn}.key.weight"].T
    receptance = (mu_r * now + (1 - mu_r) * before) @ w[f"{ffn}.receptance.weight"].T
    return torch.sigmoid(receptance) * (torch.relu(key).square() @ w[f"{ffn}.value.weight"].T)


def _layer_norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], LAYER_NORM_EPSILON)


def _layers(state: State) -> Layers:
    """The state for a run; RWKV-4's m without a gradient."""
    memory = state.memory
    if memory.dim() == 4:
        a, b, m = memory.unbind(2)
        memory = torch.stack([a, b, m.detach()], 2)
    return list(zip(state.time_shift, state.channel_shift, memory, strict=True))


def _where(rows: Tensor, these: Layers, others: Layers) -> Layers:
    """``these`` in the batch rows [B] that are true, ``others`` elsewhere."""
    if bool(rows.all()):
        return these

    def choose(this: Tensor, other: Tensor) -> Tensor:
        return torch.where(rows.view(-1, *[1] * (this.dim() - 1)), this, other)

    return [
        (choose(a, d), choose(b, e), choose(c, f)) for (a, b, c), (d, e, f) in zip(these, others, strict=True)
    ]


def _detached(state: Layers) -> Layers:
    return [(a.detach(), b.detach(), c.detach()) for a, b, c in state]


def _empty(w: dict[str, Tensor], batch: int) -> State:
    """The state before the first token."""
    layers = sum(name.endswith(".ln1.weight") for name in w)
    width, dtype = w["emb.weight"].shape[1], w["emb.weight"].dtype
    shift = torch.zeros(layers, batch, width, dtype=dtype)
    if "blocks.0.att.ln_x.weight" in w:
        att = "blocks.0.att."
        heads_first = "r_k" if att + "r_k" in w else "time_faaaa" if att + "time_maa_x" in w else "time_decay"
        heads = w[att + heads_first].shape[0]
        size = width // heads
        return State(shift, shift.clone(), torch.zeros(layers, batch, heads, size, size, dtype=dtype))
    memory = torch.zeros(layers, batch, 3, width, dtype=dtype)
    memory[:, :, 2] = -torch.inf
    return State(shift, shift.clone(), memory)
