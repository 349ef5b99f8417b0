"""Qwen3-Next in plain PyTorch, made to be trained: what qwen3next.c computes token by token, here for whole
rows at once.

Names of modules and parameters are those of the released checkpoints; only the experts of a layer are stacked
into two tensors, which `released_names` in train.py takes apart. Letters in shapes: B rows of a batch, T tokens of a
row, D hidden_size, V vocab_size, H/G heads of queries (attention) or values (DeltaNet) / heads of keys,
R = H/G, dk/dv sizes of a DeltaNet head, E experts, I moe_intermediate_size, C tokens of a chunk, N chunks
of a row.

Weights are float32. Under autocast the large products are in bfloat16; norms, router, delta rule and the
residual stream stay in float32.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Config:
    """Sizes, by their names in config.json. Raises ValueError where they do not fit together."""
    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 10
    full_attention_interval: int = 2            # every second layer has attention, the others DeltaNet
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 64
    partial_rotary_factor: float = 0.25
    rope_theta: float = 10000.0
    linear_num_key_heads: int = 4
    linear_num_value_heads: int = 8
    linear_key_head_dim: int = 32
    linear_value_head_dim: int = 32
    linear_conv_kernel_dim: int = 4
    num_experts: int = 32
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 64
    shared_expert_intermediate_size: int = 128
    rms_norm_eps: float = 1e-6

    def __post_init__(self):
        for many, few in (("num_attention_heads", "num_key_value_heads"),
                          ("linear_num_value_heads", "linear_num_key_heads")):
            if getattr(self, many) % getattr(self, few):
                raise ValueError(f"{many} {getattr(self, many)}: wanted a multiple of {few}, "
                                 f"{getattr(self, few)}")
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ValueError(f"partial_rotary_factor {self.partial_rotary_factor}: wanted an even number of "
                             f"head_dim's {self.head_dim} values, found {self.rotary_dim}")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok}: there are {self.num_experts}")

    @property
    def rotary_dim(self):
        """How many values of a head are turned."""
        return int(self.head_dim * self.partial_rotary_factor)


class RMSNorm(nn.Module):
    """x [..., size] -> y [..., size] = x / sqrt(mean(x^2) + eps) * (1 + weight), in float32; the result has x's dtype."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight)).to(x.dtype)


# ---- Gated DeltaNet ----------------------------------------------------------------------------------------

class UnitLowerInverse(torch.autograd.Function):
    """A, strictly lower triangular [..., C, C], C a power of two -> X = (I + A)^-1.

    Diagonal blocks double in size from 1 to C. With P and Q the inverses of two neighbours and L the part of
    A below them,
        [P^-1  0 ]^-1     [   P     0]
        [ L   Q^-1]    =  [ -Q L P  Q]
    which is what X - X L X adds to all pairs of blocks at once. Unlike a series in powers of A it does not
    amplify rounding. Backward: dA = -X^T dX X^T; so only X is kept.
    """

    @staticmethod
    def forward(ctx, A):
        C = A.shape[-1]
        i = torch.arange(C, device=A.device)
        X = torch.eye(C, device=A.device, dtype=A.dtype)
        size = 1
        while size < C:
            row, column = i[:, None] // size, i[None, :] // size
            L = A * ((row % 2 == 1) & (column == row - 1))
            X = X - (L if size == 1 else X @ L @ X)
            size *= 2
        ctx.save_for_backward(X)
        return X

    @staticmethod
    def backward(ctx, dX):
        X, = ctx.saved_tensors
        Xt = X.transpose(-1, -2)
        return -(Xt @ dX @ Xt)


def l2norm(x):
    """x / sqrt(sum(x^2) + 1e-6) over the last axis, of x's shape and dtype."""
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)


def delta_rule(q, k, v, g, beta, chunk=64):
    """Gated delta rule, chunk by chunk: q, k [B, T, G, dk], v [B, T, H, dv], g, beta [B, T, H]
    -> o [B, T, H, dv], all float32. q and k are brought to length one first, q then divided by sqrt(dk).

    Token by token, with a state S [dk, dv] for each value head, zero at first, it is
        S   <-  exp(g_t) S
        S   <-  S + k_t (beta_t (v_t - S^T k_t))^T
        o_t  =  S^T q_t
    With c_i the sum of g in a chunk up to token i, its decay D_ij = exp(c_i - c_j) for j <= i, else 0, and
        X  =  (I + strictly_lower(beta_i (k_i k_j) D_ij))^-1
        U  =  X (beta v),    W = X (beta exp(c) k)                the tokens' writes are U - W S
    the state after a chunk and its outputs are
        S' =  exp(c_C) S + K^T (U - W S),                         K_i = exp(c_C - c_i) k_i
        O  =  exp(c) q S + P (U - W S),                           P_ij = (q_i k_j) D_ij
    All but S' is computed for all chunks at once; what is left of the loop is one small product a chunk.
    """
    B, T, G, dk = q.shape
    H, dv = v.shape[2:]
    R = H // G
    pad = -T % chunk                                           # tokens with beta = 0 and g = 0 change nothing
    if pad:
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, pad)) for x in (q, k, v))
        g, beta = (F.pad(x, (0, 0, 0, pad)) for x in (g, beta))
    N = (T + pad) // chunk
    q, k = (x.view(B, N, chunk, G, 1, dk).permute(1, 0, 3, 4, 2, 5) for x in (q, k))  # [N, B, G, 1, C, dk]
    v = v.view(B, N, chunk, G, R, dv).permute(1, 0, 3, 4, 2, 5)                 # [N, B, G, R, C, dv]
    g, beta = (x.view(B, N, chunk, G, R).permute(1, 0, 3, 4, 2) for x in (g, beta))         # [N, B, G, R, C]
    q, k = l2norm(q) * dk ** -0.5, l2norm(k)

    c = g.cumsum(-1)
    above = torch.ones(chunk, chunk, device=q.device, dtype=torch.bool).triu(1)
    D = (c[..., :, None] - c[..., None, :]).masked_fill(above, -math.inf).exp()  # [N, B, G, R, C, C]
    A = (k @ k.transpose(-1, -2)) * beta[..., None] * D
    X = UnitLowerInverse.apply(A.tril(-1))
    P = (q @ k.transpose(-1, -2)) * D
    UW = X @ torch.cat([v * beta[..., None], k * (beta * c.exp())[..., None]], -1)     # [.., C, dv + dk]
    K = k * (c[..., -1:] - c).exp()[..., None]
    KU, KW = (K.transpose(-1, -2) @ UW).split([dv, dk], -1)       # K^T U [.., dk, dv], K^T W [.., dk, dk]
    PU, PW = (P @ UW).split([dv, dk], -1)

    S = torch.zeros(B, G, R, dk, dv, device=q.device, dtype=q.dtype)
    states = []
    for end, ku, kw in zip(c[..., -1].exp()[..., None, None].unbind(0), KU.unbind(0), KW.unbind(0)):
        states.append(S)
        S = end * S + ku - kw @ S
    O = PU + (q * c.exp()[..., None] - PW) @ torch.stack(states)                # [N, B, G, R, C, dv]
    return O.permute(1, 0, 4, 2, 3, 5).reshape(B, T + pad, H, dv)[:, :T]


class GatedDeltaNet(nn.Module):
    """x [B, T, D] -> [B, T, D]. Projections as released: in_proj_qkvz holds, key head by key head, q, k, R
    times v and R times z; in_proj_ba R times b and R times a."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.key_dim = c.linear_num_key_heads * c.linear_key_head_dim
        self.value_dim = c.linear_num_value_heads * c.linear_value_head_dim
        conv_dim = 2 * self.key_dim + self.value_dim
        self.in_proj_qkvz = nn.Linear(c.hidden_size, 2 * self.key_dim + 2 * self.value_dim, bias=False)
        self.in_proj_ba = nn.Linear(c.hidden_size, 2 * c.linear_num_value_heads, bias=False)
        self.conv1d = nn.Conv1d(conv_dim, conv_dim, c.linear_conv_kernel_dim, groups=conv_dim, bias=False)
        self.A_log = nn.Parameter(torch.zeros(c.linear_num_value_heads))
        self.dt_bias = nn.Parameter(torch.zeros(c.linear_num_value_heads))
        self.norm = nn.Module()
        self.norm.weight = nn.Parameter(torch.ones(c.linear_value_head_dim))    # here without the 1 +
        self.out_proj = nn.Linear(self.value_dim, c.hidden_size, bias=False)

    def forward(self, x):
        c, (B, T, _) = self.c, x.shape
        G, H, dk, dv = (c.linear_num_key_heads, c.linear_num_value_heads, c.linear_key_head_dim,
                        c.linear_value_head_dim)
        R = H // G
        qkvz = self.in_proj_qkvz(x).view(B, T, G, 2 * dk + 2 * R * dv)
        q, k, v, z = qkvz.split([dk, dk, R * dv, R * dv], -1)
        b, a = self.in_proj_ba(x).view(B, T, G, 2 * R).float().split([R, R], -1)

        conv_in = torch.cat([y.reshape(B, T, -1) for y in (q, k, v)], -1)       # all q, all k, all v
        qkv = F.silu(self.causal_conv(conv_in)).float()
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.value_dim], -1)
        beta = b.reshape(B, T, H).sigmoid()
        g = -self.A_log.exp() * F.softplus(a.reshape(B, T, H) + self.dt_bias)
        with torch.autocast(x.device.type, enabled=False):
            o = delta_rule(q.reshape(B, T, G, dk), k.reshape(B, T, G, dk), v.reshape(B, T, H, dv), g, beta)

        o = o * torch.rsqrt(o.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps) * self.norm.weight
        o = o * F.silu(z.reshape(B, T, H, dv).float())
        return self.out_proj(o.reshape(B, T, self.value_dim).to(z.dtype))

    def causal_conv(self, x):
        """y[t, c] = sum over i of weight[c, i] x[t - taps + 1 + i, c], zeros before the row.
        x [B, T, channels]."""
        T, taps = x.shape[1], self.c.linear_conv_kernel_dim
        weight = self.conv1d.weight[:, 0].to(x.dtype)
        padded = F.pad(x, (0, 0, taps - 1, 0))
        return sum(padded[:, i:i + T] * weight[:, i] for i in range(taps))


# ---- Gated attention, experts ------------------------------------------------------------------------------

def rotary(config, T, device):
    """float32 cos, sin [T, rotary_dim] of position * theta^(-2i / rotary_dim), each angle twice, for both
    halves of a pair."""
    exponent = torch.arange(0, config.rotary_dim, 2, device=device, dtype=torch.float32) / config.rotary_dim
    angle = torch.arange(T, device=device, dtype=torch.float32)[:, None] * config.rope_theta ** -exponent
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """The first rotary_dim values of each head turned, pairs being half of rotary_dim apart.
    x [B, heads, T, head_dim], cos and sin [T, rotary_dim] of `rotary`; the result has x's shape and dtype."""
    turned, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned.to(x.dtype), rest], -1)


class GatedAttention(nn.Module):
    """x [B, T, D] -> [B, T, D]: o_proj(attention * sigmoid(gate)); q_proj gives query and gate, head by
    head."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.hidden_size, 2 * c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, x, cos, sin):
        c, (B, T, _) = self.c, x.shape
        q, gate = self.q_proj(x).view(B, T, c.num_attention_heads, 2 * c.head_dim).chunk(2, -1)
        k = self.k_proj(x).view(B, T, c.num_key_value_heads, c.head_dim)
        v = self.v_proj(x).view(B, T, c.num_key_value_heads, c.head_dim).transpose(1, 2)
        q = rotate(self.q_norm(q).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(k).transpose(1, 2), cos, sin)
        k, v = (y.repeat_interleave(c.num_attention_heads // c.num_key_value_heads, 1) for y in (k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)             # scale head_dim^-0.5
        return self.o_proj((o.transpose(1, 2) * gate.sigmoid()).reshape(B, T, -1))


class MLP(nn.Module):
    """x [..., D] -> [..., D]: down_proj(silu(gate_proj(x)) * up_proj(x))."""

    def __init__(self, hidden_size, intermediate_size):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SparseMoe(nn.Module):
    """x [B, T, D] -> (y [B, T, D], balance []): y = sum over the chosen e of w_e expert_e(x), plus the gated
    shared expert.

    All experts see all tokens and those not chosen have weight 0: with experts this small, two large matrix
    products take less time than sorting the tokens. balance = E / k * sum over e of (share of tokens that
    chose e) * (mean probability of e): 1 where the experts are used alike, more where they are not.
    """

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.gate = nn.Linear(c.hidden_size, c.num_experts, bias=False)
        self.experts = nn.Module()
        E, I, D = c.num_experts, c.moe_intermediate_size, c.hidden_size
        self.experts.gate_up_proj = nn.Parameter(torch.zeros(E, 2 * I, D))
        self.experts.down_proj = nn.Parameter(torch.zeros(E, D, I))
        self.shared_expert = MLP(c.hidden_size, c.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(c.hidden_size, 1, bias=False)

    def route(self, x):
        """x [n, D] -> (weights [n, E] float32, zero but for k experts and of sum 1, balance [])."""
        c = self.c
        with torch.autocast(x.device.type, enabled=False):
            probability = self.gate(x.float()).softmax(-1)
        last = probability.detach().topk(c.num_experts_per_tok, -1).values[:, -1:]
        chosen = probability.detach() >= last
        weight = probability * chosen
        balance = c.num_experts / c.num_experts_per_tok * (chosen.float().mean(0) * probability.mean(0)).sum()
        return weight / weight.sum(-1, keepdim=True), balance

    def forward(self, x):
        c, E, I, D = self.c, self.c.num_experts, self.c.moe_intermediate_size, self.c.hidden_size
        shape, x = x.shape, x.reshape(-1, D)
        weight, balance = self.route(x)
        gate_up = F.linear(x, self.experts.gate_up_proj.view(-1, D)).view(-1, E, 2, I)
        h = F.silu(gate_up[:, :, 0]) * gate_up[:, :, 1] * weight[..., None].to(gate_up.dtype)
        y = F.linear(h.view(-1, E * I), self.experts.down_proj.transpose(0, 1).reshape(D, E * I))
        y = y + self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)
        return y.view(shape), balance


# ---- The model ---------------------------------------------------------------------------------------------

class DecoderLayer(nn.Module):
    """x [B, T, D] -> (x [B, T, D], balance []): x + mixer(norm(x)), then x + experts(norm(x))."""

    def __init__(self, c, attention):
        super().__init__()
        self.attention = attention
        if attention:
            self.self_attn = GatedAttention(c)
        else:
            self.linear_attn = GatedDeltaNet(c)
        self.mlp = SparseMoe(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, cos, sin):
        y = self.input_layernorm(x)
        x = x + (self.self_attn(y, cos, sin) if self.attention else self.linear_attn(y))
        y, balance = self.mlp(self.post_attention_layernorm(x))
        return x + y, balance


class Mtp(nn.Module):
    """Multi-token prediction: from h_t and token t+1 what scores token t+2; see Qwen3Next.predict_further."""

    def __init__(self, c):
        super().__init__()
        self.pre_fc_norm_embedding = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.pre_fc_norm_hidden = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.fc = nn.Linear(2 * c.hidden_size, c.hidden_size, bias=False)
        self.layers = nn.ModuleList([DecoderLayer(c, attention=True)])
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Qwen3Next(nn.Module):
    """The whole model; embedding and head are one matrix."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.model.layers = nn.ModuleList([DecoderLayer(c, (i + 1) % c.full_attention_interval == 0)
                                           for i in range(c.num_hidden_layers)])
        self.model.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mtp = Mtp(c)
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """Matrices: normal, of standard deviation 0.8 / sqrt(columns), so that a layer neither swells nor
        shrinks what it is given; those that write to the residual stream smaller, for 2 * layers of them add
        up; 0.03 for the embedding, 0.02 for the router. The taps of convolutions stay as PyTorch makes them.
        Norms and the decay's parameters do not depend on sizes: per head exp(A_log) in 1..16 and
        softplus(dt_bias) in 0.001..0.1, which makes states that last from one token to a thousand."""
        for name, p in self.named_parameters():
            if name.endswith("A_log"):
                p.uniform_(1, 16).log_()
            elif name.endswith("dt_bias"):
                dt = torch.exp(torch.empty_like(p).uniform_(math.log(0.001), math.log(0.1)))
                p.copy_(dt + torch.log(-torch.expm1(-dt)))        # softplus backwards
            elif p.ndim > 1 and not name.endswith("conv1d.weight"):
                std = 0.8 / math.sqrt(p.shape[-1])
                if name.endswith("embed_tokens.weight"):
                    std = 0.03
                elif name.endswith("mlp.gate.weight"):
                    std = 0.02
                elif name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
                    std /= math.sqrt(2 * self.c.num_hidden_layers)
                elif name.endswith("experts.down_proj"):          # weighted by about 1/k each
                    std /= math.sqrt(2 * self.c.num_hidden_layers) / 2
                p.normal_(0, std)

    def forward(self, tokens):
        """tokens [B, T] int64 -> (h [B, T, D] float32, after the last norm, mean balance [] of the layers)."""
        cos, sin = rotary(self.c, tokens.shape[1], tokens.device)
        x, total = self.model.embed_tokens(tokens), 0.0
        for layer in self.model.layers:
            x, balance = layer(x, cos, sin)
            total = total + balance
        return self.model.norm(x), total / len(self.model.layers)

    def predict_further(self, h, following):
        """h [B, T, D] of forward, after the last norm; following [B, T] int64, the tokens one later
        -> (h' [B, T, D] float32, balance []): logits(h') at t are of token t+2.  h' = norm(layer(fc([norm(embedding) ; norm(h)])))"""
        cos, sin = rotary(self.c, h.shape[1], h.device)
        e = self.mtp.pre_fc_norm_embedding(self.model.embed_tokens(following))
        x = self.mtp.fc(torch.cat([e, self.mtp.pre_fc_norm_hidden(h)], -1)).float()
        x, balance = self.mtp.layers[0](x, cos, sin)
        return self.mtp.norm(x), balance

    def logits(self, h):
        """h [..., D] -> [..., V], float32, under autocast bfloat16."""
        return F.linear(h, self.model.embed_tokens.weight)
