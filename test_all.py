"""Every test of the repository: `make test`, or `python -m pytest test_all.py -k tokenizer` for a part of it.

The oracles are other people's programs: transformers (Qwen3NextForCausalLM in float32, its logits processors,
apply_chat_template) and tokenizers. Checkpoints are tiny and random, made here from a seed and exported by
export.py; nothing is downloaded. What the engine computes is read from its command line, but for the sampler
and the deliberate breaks at the end, which compile qwen3next.c into small programs of their own.

    helpers      running the engine; reading a checkpoint and tokenizer.bin; making models
    1 logits     equal to transformers for every kind of checkpoint
    2 invariance the same bits for any threads, batches and splits, under every kernel set
    3 quantized  q8 and q4: what is stored, and how far the logits move
    4 tokenizer  the same ids as `tokenizers`
    5 templates  the same tokens as apply_chat_template, turn by turn
    6 sampler    the distribution of transformers' logits processors
    7 damage     broken files and command lines: one line, the right status, no signal
    8 interface  what goes where, and with which exit status
    9 export     layouts, refusals, reproducibility; 9a what strangers send
   10 README     its commands run
   11 mutation   the comparison of section 1 fails when the engine is broken on purpose
   12 drafting   the MTP head equals a PyTorch module; drafts change no text
   13 context    keys and values as q8, YaRN by option
   14 chat       /undo, /regen, edits: nothing is read twice
   15 saved      conversations go on in another process; bad files are refused
   16 disk       with experts from disk: the same bits, and no more is read than is missing
   17 plots      of the numbers that the engine printed; the same bytes every time
   17a gguf      files as llama.cpp's converter writes them
   18 fuzzing    seeds for `make fuzz`; what it found; faults at every request, signal and write
   19 heads      classify, tag, answer: labels, spans and scores equal transformers'
   20 siblings   Qwen3.5 and 3.6, dense and of experts: logits, drafts, tokenizer, template
   21 inside     every dumped tensor and every number of a trace equals what hooks in transformers see
   22 demo       its corpus keeps its promises; its training resumes and exports; what the shipped model can do
"""

import atexit
import collections
import contextlib
import copy
import ctypes
import dataclasses
import errno
import functools
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import pty
import random
import re
import resource
import runpy
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file, save_file
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.generation import logits_process as lp
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen3_5
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as qwen3_5_moe
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "qwen3next"                         # what `make` builds
ENGINE = ROOT / os.environ.get("QWEN3NEXT", BUILD)   # what is tested: that, or another build (make test-arm and the like)
DEBUG_ENGINE = ROOT / "qwen3next-debug"          # with AddressSanitizer and UndefinedBehaviorSanitizer
EXPORT = (sys.executable, ROOT / "export.py")
TOKENIZER = ROOT / "tokenizer.bin"
DEMO = ROOT / "demo" / "stories.bin"
DEMO_TOKENIZER = DEMO.with_name("tokenizer.bin")           # a small vocabulary of its own

WORK = Path(tempfile.mkdtemp(prefix="qwen3next-test-"))   # every file that the tests make
atexit.register(shutil.rmtree, WORK, ignore_errors=True)

torch.set_num_threads(1)                                 # of so small models two would only wait for each other
torch.set_grad_enabled(False)

for ignored in (signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP):   # as jobs in the background may have them; the engine, which
    signal.signal(ignored, signal.SIG_DFL)                        # inherits that, is to be sent them here
signal.signal(signal.SIGINT, signal.default_int_handler)


# ----------------------------------------------------------------------------------------------------------------
# Helpers: running programs
# ----------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session", autouse=True)
def build():
    """Build what is tested, so that pytest alone works too."""
    subprocess.run(["make", "--silent", "qwen3next", "qwen3next-debug", ENGINE.name], cwd=ROOT, check=True)


@pytest.fixture
def report(capsys):
    """A print that reaches the terminal: for measured numbers worth reading beside the verdict."""
    def show(*words):
        with capsys.disabled():
            print("\n   ", *words, end="", flush=True)
    return show


def run(*command, stdin=b"", timeout=120, **kwargs):
    """Run a command to its end; the result has bytes `stdout` and `stderr`. Without stdin it reads an empty one."""
    return subprocess.run([str(word) for word in command], input=stdin, capture_output=True, timeout=timeout,
                          **kwargs)


def run_forked(python, script, *arguments):
    """run(PYTHON, SCRIPT, ...) in a fork of this process, which has loaded PyTorch, as SCRIPT would have to for seconds."""
    def child():
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
        sys.argv, sys.path[:0] = [str(word) for word in (script, *arguments)], [str(Path(script).parent)]
        os.environ["TOKENIZERS_PARALLELISM"] = "false"          # or that library says that it has been forked
        torch.set_grad_enabled(True)
        runpy.run_path(str(script), run_name="__main__")

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(120)                                       # as run waits
        process.kill()
        process.join()
        out.seek(0), err.seek(0)
        return subprocess.CompletedProcess([python, script, *arguments], process.exitcode, out.read(), err.read())


def engine(model, *options, **kwargs):
    """Run ./qwen3next MODEL OPTIONS, expect status 0, return its standard output."""
    result = run(ENGINE, model, *options, **kwargs)
    assert result.returncode == 0, f"{' '.join(map(str, options))}: status {result.returncode}: {result.stderr!r}"
    return result.stdout


def export(source, output, *options):
    """Run export.py on a checkpoint directory, expect success, return the output's path."""
    result = run(*EXPORT, source, "-o", output, *options, timeout=600)
    assert result.returncode == 0, f"export.py {source}: {result.stderr.decode()}"
    return output


def export_tokenizer(source, output):
    """Run export.py on a tokenizer.json, expect success, return the output's path."""
    result = run(*EXPORT, "--tokenizer", source, "-o", output)
    assert result.returncode == 0, result.stderr.decode()
    return output


def spaced(ids):
    """Token ids as `--ids` reads them."""
    return " ".join(map(str, ids))


def parallel(function, jobs):
    """function(job) for every job, two at a time (the work is in other processes): a list of results."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, jobs))


CPUS = ("plain", "avx2", "avx512", "neon")        # kernel sets
CPU_FLAGS = {"plain": set(), "avx2": {"avx2", "fma", "f16c"}, "neon": {"asimd", "asimddp"},
             "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "avx512_vnni", "f16c"}}


@functools.cache
def lacks_cpu(name):
    """Whether the program cannot run these kernels here; what `make` builds must run those that the processor has."""
    result = run(ENGINE, random_checkpoint("plain", "f32"), "--ids", "-i", 1, "-n", 1, "--cpu", name)
    if result.returncode == 0:
        return False
    assert name.encode() in result.stderr and result.stderr.count(b"\n") == 1, result.stderr
    flags = set(re.findall(r"\w+", re.split("flags|Features", Path("/proc/cpuinfo").read_text(), maxsplit=1)[-1].split("\n")[0]))
    assert ENGINE != BUILD or not CPU_FLAGS[name] <= flags, f"this machine has {name}: {result.stderr}"
    return True


def needs_cpu(name):
    """Skip the test when there is no such kernel set here."""
    if lacks_cpu(name):
        pytest.skip(f"no {name} here")


# ----------------------------------------------------------------------------------------------------------------
# Helpers: reading a checkpoint (README, "Checkpoint format")
# ----------------------------------------------------------------------------------------------------------------

META, TENSOR = 64, 128                            # bytes of a record in the two directories
FLOAT, F32, BF16, Q8, Q4, Q6 = range(6)           # tensor types


@dataclasses.dataclass
class Tensor:
    name: str
    type: int
    shape: tuple                                  # as stored, without the unused dimensions
    offset: int
    size: int
    record: int                                   # where its directory record starts in the file


@dataclasses.dataclass
class Checkpoint:
    """A checkpoint as the format describes it; nothing here is shared with export.py."""
    data: bytes
    meta: dict                                    # key -> list of numbers, str, or list of str
    meta_records: dict                            # key -> (position of the record, type, count, offset, size)
    tensors: dict                                 # name -> Tensor

    def scalar(self, key):
        return self.meta[key][0]

    def matrix(self, name):
        """A tensor by name as float32, dequantized, in its own shape."""
        tensor = self.tensors[name]
        raw = np.frombuffer(self.data, np.uint8, tensor.size, tensor.offset)
        if tensor.type == FLOAT:
            return raw[:4 * math.prod(tensor.shape)].view(np.float32).reshape(tensor.shape)
        *stack, rows, columns = tensor.shape
        if name.endswith("gate_up_proj.weight") or name.endswith("gate_up_proj"):
            tiles = untile(raw, tensor.type, columns, self.meta.get("q4_levels"))     # [E * tiles * 2, 16, C]
            tiles = tiles.reshape(stack[0], -1, 2, 16, columns).swapaxes(1, 2)        # [E, 2, tiles, 16, C]
            return tiles.reshape(stack[0], 2, -1, columns)[:, :, :rows]
        tiles = untile(raw, tensor.type, columns, self.meta.get("q4_levels"))
        return tiles.reshape(*stack, -1, columns)[..., :rows, :]


def bf16_to_f32(raw):
    """uint16 bit patterns of bfloat16 -> float32, same shape."""
    return (raw.astype(np.uint32) << 16).view(np.float32)


def untile(raw, kind, columns, levels):
    """Payload bytes -> float32 [tiles, 16, columns]: matrices are stored in tiles of 16 rows."""
    if kind == F32:                                               # per column 16 floats, one a row
        return raw.view(np.float32).reshape(-1, columns, 16).swapaxes(1, 2)
    if kind == BF16:                                              # per pair of columns 16 rows of two
        pairs = raw.view(np.uint16).reshape(-1, (columns + 1) // 2, 16, 2).transpose(0, 2, 1, 3)
        return bf16_to_f32(pairs.reshape(len(pairs), 16, -1)[:, :, :columns])
    blocks = (columns + 63) // 64                                 # superblocks of 64 columns: scales, then numbers
    raw = raw.reshape(-1, blocks, {Q8: 1088, Q6: 832, Q4: 576}[kind])
    scales = np.ascontiguousarray(raw[:, :, :64]).view(np.uint16).reshape(-1, blocks, 2, 16)
    scales = bf16_to_f32(scales).transpose(0, 3, 1, 2)[..., None]              # [tiles, 16, blocks, 2, 1]
    if kind == Q8:                                                # 16 groups of 4 columns, 16 rows each
        groups = raw[:, :, 64:].reshape(-1, blocks, 16, 16, 4).transpose(0, 3, 1, 2, 4)
        numbers = groups.reshape(-1, 16, blocks, 2, 32).astype(np.float32) - 128
    elif kind == Q6:                          # 2 blocks: two chunks with 2 bits of 4 groups, four with 4 bits of 2 groups
        chunks = raw[:, :, 64:].reshape(-1, blocks, 2, 6, 16, 4).astype(int)
        groups = [16 * (chunks[:, :, :, 2 + j % 4] >> 4 * (j // 4) & 15) + 4 * (chunks[:, :, :, j // 4] >> 2 * (j % 4) & 3)
                  for j in range(8)]                                           # each [tiles, blocks, 2, 16, 4]
        numbers = np.stack(groups, -2).transpose(0, 3, 1, 2, 4, 5).reshape(-1, 16, blocks, 2, 32) - 128.0
    else:                                     # 2 blocks of 4 groups: low nibble column 4j+i, high nibble 16+4j+i
        groups = raw[:, :, 64:].reshape(-1, blocks, 2, 4, 16, 4).transpose(0, 4, 1, 2, 3, 5)
        groups = groups.reshape(-1, 16, blocks, 2, 16)
        book = (scales.view(np.uint32) >> 16 & 1)                              # the scale's lowest bit: which 16 levels
        numbers = np.array(levels, np.float32)[book * 16 + np.concatenate([groups & 15, groups >> 4], axis=-1)]
    return (numbers * scales).reshape(-1, 16, blocks * 64)[:, :, :columns]


def read_checkpoint(path):
    """Read a checkpoint file whole."""
    data = Path(path).read_bytes()
    magic, version, n_meta, n_tensors = struct.unpack_from("<8s3I", data)
    assert (magic, version) == (b"QWEN3NXT", 1)
    meta, meta_records, tensors = {}, {}, {}
    for i in range(n_meta):
        record = 64 + META * i
        key, kind, count, offset, size = struct.unpack_from("<40sIIQQ", data, record)
        key = key.rstrip(b"\0").decode()
        value = data[offset:offset + size]
        if kind == 3:
            strings = []
            while value:
                length, = struct.unpack_from("<I", value)
                strings.append(value[4:4 + length].decode())
                value = value[4 + length:]
            meta[key] = strings
        else:
            meta[key] = value.decode() if kind == 2 else list(struct.unpack(f"<{count}{'qd'[kind]}", value))
        meta_records[key] = (record, kind, count, offset, size)
    for i in range(n_tensors):
        record = 64 + META * n_meta + TENSOR * i
        name, kind, rank, *shape, offset, size = struct.unpack_from("<72sII4QQQ", data, record)
        name = name.rstrip(b"\0").decode()
        tensors[name] = Tensor(name, kind, tuple(shape[:rank]), offset, size, record)
    return Checkpoint(data, meta, meta_records, tensors)


def interleave(blocks, groups):
    """[(rows, D)...] with head-major rows -> the Hugging Face layout: for every group its part of each block."""
    parts = [block.reshape(groups, -1, block.shape[-1]) for block in blocks]
    return np.concatenate(parts, axis=1).reshape(-1, blocks[0].shape[-1])


def hf_state_dict(checkpoint):
    """Undo the stored layout: name -> float32 array under transformers' names and shapes (experts packed)."""
    c, get = checkpoint.scalar, checkpoint.matrix
    key_dim = c("linear_num_key_heads") * c("linear_key_head_dim")
    value_dim = c("linear_num_value_heads") * c("linear_value_head_dim")
    heads, kv_heads, head_dim = c("num_attention_heads"), c("num_key_value_heads"), c("head_dim")
    out = {"model.embed_tokens.weight": get("embed_tokens"), "model.norm.weight": get("norm")}
    if "lm_head" in checkpoint.tensors:
        out["lm_head.weight"] = get("lm_head")

    def attention(rows):
        """Rows of all queries, gates, keys, values -> q_proj (query and gate head by head), k_proj, v_proj."""
        q, gate, k, v = np.split(rows, np.cumsum([heads * head_dim, heads * head_dim, kv_heads * head_dim]))
        return interleave([q, gate], heads), k, v

    def gated_mlp(prefix, stem):
        """gate_up [1,2,I,D] and down [1,D,I] -> the three matrices of a plain MLP."""
        gate_up = get(stem + "gate_up_proj")[0]
        out[prefix + "gate_proj.weight"], out[prefix + "up_proj.weight"] = gate_up
        out[prefix + "down_proj.weight"] = get(stem + "down_proj")[0]

    for n, kind in enumerate(checkpoint.meta["layer_types"]):
        hf, own = f"model.layers.{n}.", f"layers.{n}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out[f"{hf}{norm}.weight"] = get(own + norm)
        if kind == 0:
            hf_mixer, mixer = hf + "linear_attn.", own + "linear_attn."
            groups = c("linear_num_key_heads")
            qkvz = np.split(get(mixer + "in_proj_qkvz"), np.cumsum([key_dim, key_dim, value_dim]))
            out[hf_mixer + "in_proj_qkvz.weight"] = interleave(qkvz, groups)
            out[hf_mixer + "in_proj_ba.weight"] = interleave(np.split(get(mixer + "in_proj_ba"), 2), groups)
            out[hf_mixer + "conv1d.weight"] = get(mixer + "conv1d").T[:, None]
            for name, to in (("A_log", "A_log"), ("dt_bias", "dt_bias"), ("norm", "norm.weight"),
                             ("out_proj", "out_proj.weight")):
                out[hf_mixer + to] = get(mixer + name)
        else:
            hf_mixer, mixer = hf + "self_attn.", own + "self_attn."
            names = ("q_proj", "k_proj", "v_proj")
            for name, rows in zip(names, attention(get(mixer + "qgkv_proj"))):
                out[f"{hf_mixer}{name}.weight"] = rows
            if mixer + "qgkv_bias" in checkpoint.tensors:
                for name, rows in zip(names, attention(get(mixer + "qgkv_bias")[:, None])):
                    out[f"{hf_mixer}{name}.bias"] = rows[:, 0]
                out[hf_mixer + "o_proj.bias"] = get(mixer + "o_bias")
            for name in ("q_norm", "k_norm", "o_proj"):
                out[f"{hf_mixer}{name}.weight"] = get(mixer + name)
        if checkpoint.meta["mlp_types"][n] == 0:
            gated_mlp(hf + "mlp.", own + "mlp.")
            continue
        out[hf + "mlp.gate.weight"] = get(own + "mlp.gate")
        gate_up = get(own + "mlp.experts.gate_up_proj")                                      # [E, 2, I, D]
        out[hf + "mlp.experts.gate_up_proj"] = gate_up.reshape(len(gate_up), -1, gate_up.shape[-1])
        out[hf + "mlp.experts.down_proj"] = get(own + "mlp.experts.down_proj")
        gated_mlp(hf + "mlp.shared_expert.", own + "mlp.shared_expert.")
        out[hf + "mlp.shared_expert_gate.weight"] = get(own + "mlp.shared_expert_gate")[None]
    return out


# ----------------------------------------------------------------------------------------------------------------
# Helpers: making models
# ----------------------------------------------------------------------------------------------------------------

TOLERANCE = 2e-3                     # on logits, in standard deviations of the reference's
PROMPTS = (1, 2, 3, 65, 200)         # tokens; 65 is one more than a chunk of transformers' delta rule

TINY = dict(
    vocab_size=389, hidden_size=64, num_hidden_layers=4, max_position_embeddings=512, rms_norm_eps=1e-6,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=16, linear_value_head_dim=16, linear_conv_kernel_dim=4, num_experts=16,
    num_experts_per_tok=4, moe_intermediate_size=32, shared_expert_intermediate_size=48, intermediate_size=96,
    rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.25))

LINEAR, FULL = "linear_attention", "full_attention"


def rope(theta=10000.0, partial=0.25, **scaling):
    return dict(rope_parameters=dict(dict(rope_type="default"), rope_theta=theta, partial_rotary_factor=partial,
                                     **scaling))


# What each kind of checkpoint changes in TINY.
KINDS = {
    "plain": {},
    "head dims differ": dict(linear_key_head_dim=16, linear_value_head_dim=40),
    "n_v = n_k": dict(linear_num_key_heads=4, linear_num_value_heads=4),
    "n_v = 3 n_k": dict(linear_num_key_heads=2, linear_num_value_heads=6),
    "130 experts": dict(num_experts=130, num_experts_per_tok=11),
    "tied": dict(tie_word_embeddings=True),
    "mlp_only_layers": dict(mlp_only_layers=[0, 3], num_hidden_layers=5),
    "sparse step 2": dict(decoder_sparse_step=2),
    "norm_topk_prob false": dict(norm_topk_prob=False),
    "attention_bias": dict(attention_bias=True),
    "layer order": dict(num_hidden_layers=7, layer_types=[FULL, LINEAR, FULL, FULL, LINEAR, LINEAR, LINEAR]),
    "rope": rope(theta=5e6, partial=0.5),
    "yarn": rope(theta=10000.0, partial=0.5, rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
    "conv 3, kv = heads": dict(linear_conv_kernel_dim=3, num_key_value_heads=4),
    # beyond the twelve
    "linear rope": rope(partial=1.0, rope_type="linear", factor=3.0),
    "odd sizes": dict(vocab_size=301, hidden_size=88, moe_intermediate_size=20, shared_expert_intermediate_size=36,
                      intermediate_size=52, head_dim=24, num_attention_heads=6, linear_key_head_dim=12,
                      linear_value_head_dim=20, num_experts=7, num_experts_per_tok=3, rms_norm_eps=1e-5,
                      **rope(partial=0.5)),
    "real head sizes": dict(hidden_size=128, linear_key_head_dim=128, linear_value_head_dim=128, head_dim=256,
                            num_key_value_heads=1, num_experts=64, num_experts_per_tok=10, num_hidden_layers=4),
    "all linear": dict(num_hidden_layers=2, layer_types=[LINEAR] * 2),
    "all attention": dict(num_hidden_layers=2, layer_types=[FULL] * 2),
    "one expert": dict(num_experts=4, num_experts_per_tok=1, num_hidden_layers=4),
    "wide": dict(vocab_size=512, hidden_size=256, head_dim=64, moe_intermediate_size=128, num_experts=32,
                 shared_expert_intermediate_size=128, linear_key_head_dim=32, linear_value_head_dim=32),
    "real vocabulary": dict(vocab_size=151936, hidden_size=32, num_hidden_layers=2, layer_types=[LINEAR, FULL],
                            max_position_embeddings=1 << 20),
}


def random_model(seed=0, **changes):
    """A Qwen3NextForCausalLM in float32 whose every weight matters: no norm is one, no decay is alike, and routers
    are decided enough that rounding can't change which experts win."""
    return randomized(Qwen3NextForCausalLM(Qwen3NextConfig(**{**TINY, **changes})).eval(), seed)


def randomized(model, seed):
    """The model with random weights of such scales, in place."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape, std, mean=0.0):
        return mean + std * torch.randn(shape, generator=generator)

    for name, weight in model.named_parameters():
        if name.endswith("linear_attn.norm.weight"):
            new = normal(weight.shape, 0.3, 1.0)                      # plain weight
        elif "norm" in name:
            new = normal(weight.shape, 0.3)                           # zero-centred: the model adds 1
        elif name.endswith("A_log"):
            new = normal(weight.shape, 1.0)
        elif name.endswith("dt_bias") or name.endswith("bias"):
            new = normal(weight.shape, 0.5)
        elif name.endswith("conv1d.weight"):
            new = normal(weight.shape, 0.6)
        elif "embed_tokens" in name:
            new = normal(weight.shape, 1.0)
        elif re.search(r"(mlp\.gate|in_proj_(ba|b|a))\.weight$", name):
            new = normal(weight.shape, 2.0 / math.sqrt(weight.shape[-1]))
        else:
            new = normal(weight.shape, 1.2 / math.sqrt(weight.shape[-1]))
        weight.copy_(new)
    model.tie_weights()
    return model


def rounded_to_bf16(model):
    """The same model with every weight rounded to bfloat16, still computing in float32."""
    for weight in model.parameters():
        weight.copy_(weight.to(torch.bfloat16))
    return model


def save(model, directory, dtype=torch.float32):
    """save_pretrained as transformers does it (experts one tensor each, one file), in float32 or bfloat16."""
    copy = Qwen3NextForCausalLM(model.config).to(dtype)  # a copy: rotary frequencies must not be rounded along
    copy.load_state_dict(model.state_dict())
    copy.tie_weights()
    copy.save_pretrained(directory)
    (directory / "generation_config.json").unlink()      # says nothing but that nobody has set anything
    return directory


def save_packed(model, directory, dtype=torch.float32):
    """The same checkpoint with experts packed: gate_up_proj [E, 2I, D], down_proj [E, D, I]."""
    directory.mkdir(parents=True)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()
               if name != "lm_head.weight" or not model.config.tie_word_embeddings}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    write_config(model, directory, dtype)
    return directory


def per_expert(model, dtype=torch.float32):
    """The state dict as the hub's files hold it: every expert's three matrices by themselves."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.to(dtype)
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            for e, (gate, up) in enumerate(t.chunk(2) for t in tensor):
                tensors[f"{stem}{e}.gate_proj.weight"] = gate.contiguous()
                tensors[f"{stem}{e}.up_proj.weight"] = up.contiguous()
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(tensor):
                tensors[f"{name.removesuffix('down_proj')}{e}.down_proj.weight"] = down.contiguous()
        elif name != "lm_head.weight" or not model.config.tie_word_embeddings:
            tensors[name] = tensor.contiguous()
    return tensors


def save_like_the_hub(model, directory, dtype=torch.bfloat16, shards=3):
    """As the hub's files: experts one tensor each, shards with an index, config.json in its older spelling."""
    directory.mkdir(parents=True)
    tensors = per_expert(model, dtype)
    names, index = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, directory / file, {"format": "pt"})
        index.update({name: file for name in names[i::shards]})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = model.config.to_dict()
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    config["partial_rotary_factor"] = parameters.pop("partial_rotary_factor")
    config["rope_scaling"] = parameters if parameters["rope_type"] != "default" else None
    types = config.pop("layer_types")
    interval = types.index(FULL) + 1
    assert types == [FULL if (i + 1) % interval == 0 else LINEAR for i in range(len(types))]
    config["full_attention_interval"] = interval
    config.pop("attention_bias")
    config.pop("dtype", None)
    config.update(torch_dtype=str(dtype).removeprefix("torch."), transformers_version="4.57.0.dev0",
                  architectures=["Qwen3NextForCausalLM"])
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def divided(tensors, count):
    """`count` shards as the release has them: the tensors in the model's order, cut in runs of about one length."""
    items = list(tensors.items())
    return [dict(items[i * len(items) // count:(i + 1) * len(items) // count]) for i in range(count)]


def write_shards(shards, directory, write):
    """Files named as in the release, by write(tensors, path), and the index. Returns their paths."""
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards):
        write(shard, directory / file)
    index = {name: file for file, shard in zip(files, shards) for name in shard}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return [directory / file for file in files]


def write_weights(tensors, path):
    save_file(tensors, path, {"format": "pt"})


def write_config(model, directory, dtype=torch.float32):
    config = model.config.to_dict()
    config.update(architectures=["Qwen3NextForCausalLM"], dtype=str(dtype).removeprefix("torch."))
    (directory / "config.json").write_text(json.dumps(config, default=str))


def router_margin(model, ids):
    """The smallest distance, over tokens and layers, between the router logits of the last expert in and the first
    one out. Where it is of rounding's size, two correct programs may choose different experts."""
    margins = [math.inf]

    def look(router, args, out):                                  # out[0]: router logits [tokens, experts]
        top = out[0].topk(min(router.top_k + 1, router.num_experts)).values
        margins.append(float(-top[:, -2:].diff(dim=-1).max()))

    hooks = [module.register_forward_hook(look) for name, module in model.named_modules()
             if name.endswith("mlp.gate")]
    model(torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return min(margins)


@functools.cache
def kind_model(kind, bf16=False):
    """The random model of one kind, the first seed without a near-tie in a router; with bf16 its weights are exact
    in bfloat16."""
    for seed in itertools.count(sum(kind.encode())):
        model = random_model(seed, **KINDS[kind])
        model = rounded_to_bf16(model) if bf16 else model
        if router_margin(model, random_ids(max(PROMPTS), model.config.vocab_size)) > 1e-4:
            return model


@functools.cache
def random_checkpoint(kind, weights="f32"):
    """The exported checkpoint of one kind. f32, q8 and q4 come from a float32 directory, bf16 from a bfloat16 one."""
    bf16 = weights == "bf16"
    source = WORK / "hf" / f"{kind}-{'bf16' if bf16 else 'f32'}"
    if not source.exists():
        save(kind_model(kind, bf16), source, torch.bfloat16 if bf16 else torch.float32)
    return export(source, WORK / f"{kind}-{weights}.bin", "--type", weights)


def random_ids(n, vocab, seed=1):
    """n token ids below vocab."""
    return np.random.default_rng(seed).integers(0, vocab, n).tolist()


# ----------------------------------------------------------------------------------------------------------------
# 1 Logits
# ----------------------------------------------------------------------------------------------------------------



def engine_logits(model, ids, *options, program=ENGINE):
    """What `-m logits` writes for these ids: float32 [tokens, vocab]."""
    with tempfile.NamedTemporaryFile(dir=WORK, suffix=".f32") as file:
        result = run(program, model, "-m", "logits", "--ids", "-i", spaced(ids), "-o", file.name, *options)
        assert result.returncode == 0, result.stderr
        assert result.stdout == b""
        return np.fromfile(file.name, "<f4").reshape(len(ids), -1)


@functools.cache
def reference_logits(kind, bf16, n):
    """transformers' logits for the n-token prompt of this kind: float32 [n, vocab]."""
    model = kind_model(kind, bf16)
    ids = random_ids(n, model.config.vocab_size)
    return ids, model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def logits_error(ours, reference):
    """Largest difference of any logit, in standard deviations of the reference's logits."""
    assert ours.shape == reference.shape and np.isfinite(ours).all()
    return float(np.abs(ours - reference).max() / reference.std())


@pytest.mark.parametrize("weights", ["f32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(kind, weights, report):
    """Every logit of every prompt, with the kernels that the engine chooses by itself."""
    bf16 = weights == "bf16"
    model, errors = random_checkpoint(kind, weights), {}
    for n in PROMPTS:
        ids, reference = reference_logits(kind, bf16, n)
        errors[n] = logits_error(engine_logits(model, ids), reference)
    report(f"{kind}, {weights}: largest error {max(errors.values()):.1e} of the standard deviation")
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("weights", ["f32", "bf16"])
@pytest.mark.parametrize("cpu", CPUS)
def test_logits_equal_transformers_under_every_kernel_set(cpu, weights, report):
    needs_cpu(cpu)
    bf16, errors = weights == "bf16", {}
    for kind in KINDS:
        ids, reference = reference_logits(kind, bf16, 65)
        ours = engine_logits(random_checkpoint(kind, weights), ids, "--cpu", cpu)
        errors[kind] = logits_error(ours, reference)
    worst = max(errors, key=errors.get)
    report(f"{cpu}, {weights}: largest error {errors[worst]:.1e} ({worst})")
    assert errors[worst] < TOLERANCE, errors


@pytest.mark.parametrize("kind", ["plain", "n_v = 3 n_k", "yarn", "tied", "mlp_only_layers"])
def test_logits_of_a_checkpoint_laid_out_as_on_the_hub(kind):
    """Shards, one tensor an expert, rope_theta and rope_scaling at the top level, no layer_types."""
    changes = dict(KINDS[kind], num_hidden_layers=4)
    model = rounded_to_bf16(random_model(seed=5, **changes))
    source = save_like_the_hub(model, WORK / "hf" / f"{kind}-hub")
    binary = export(source, WORK / f"{kind}-hub.bin", "--type", "bf16")
    ids = random_ids(65, model.config.vocab_size)
    reference = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    assert logits_error(engine_logits(binary, ids), reference) < TOLERANCE


YARNS = {
    "attention_factor": dict(attention_factor=1.3), "mscale": dict(mscale=0.7, mscale_all_dim=0.3),
    "betas": dict(beta_fast=3.0, beta_slow=0.5), "not truncated": dict(truncate=False, beta_fast=3.0)}


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("variant", YARNS)
def test_logits_with_every_parameter_of_yarn(variant, spelling):
    """Optional keys, and the older spelling {"type": "yarn"} with theta beside it."""
    changes = dict(rope(partial=0.5, rope_type="yarn", factor=4.0, original_max_position_embeddings=64,
                        **YARNS[variant]), num_hidden_layers=2, layer_types=[FULL, LINEAR])
    model = random_model(3, **changes)
    source = save(model, WORK / "hf" / f"yarn {variant} {spelling}")
    if spelling == "rope_scaling":
        config = json.loads((source / "config.json").read_text())
        config["rope_scaling"] = config.pop("rope_parameters")
        for key in ("rope_theta", "partial_rotary_factor"):
            config[key] = config["rope_scaling"].pop(key)
        config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")
        (source / "config.json").write_text(json.dumps(config))
    binary = export(source, WORK / f"yarn-{variant}-{spelling}.bin", "--type", "f32")
    ids = random_ids(100, model.config.vocab_size)
    reference = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    assert logits_error(engine_logits(binary, ids), reference) < TOLERANCE


def test_logits_far_into_the_context():
    """2,500 tokens: more than one batch, many tiles of keys and values, positions far beyond the other prompts'."""
    model = random_model(seed=9, max_position_embeddings=4096)
    binary = export(save(model, WORK / "hf" / "long"), WORK / "long.bin", "--type", "f32")
    ids = random_ids(2500, model.config.vocab_size)
    reference = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    assert logits_error(engine_logits(binary, ids), reference) < TOLERANCE


# ----------------------------------------------------------------------------------------------------------------
# 2 Invariance: a token's result has the same bits whatever came with it
# ----------------------------------------------------------------------------------------------------------------

TYPES = ("f32", "bf16", "q8", "q4")


def logits_bits(model, ids, *options):
    """`-m logits` as bytes, to be compared for equality."""
    return engine_logits(model, ids, *options).tobytes()


@pytest.mark.parametrize("weights", TYPES)
@pytest.mark.parametrize("cpu", CPUS)
def test_same_bits_for_any_number_of_threads(cpu, weights):
    needs_cpu(cpu)
    for kind in ("plain", "odd sizes", "130 experts"):
        model = random_checkpoint(kind, weights)
        ids = random_ids(97, 300)
        one = logits_bits(model, ids, "--cpu", cpu, "-j", 1)
        for threads in (2, 3, 5):
            assert logits_bits(model, ids, "--cpu", cpu, "-j", threads) == one, (kind, threads)


@pytest.mark.parametrize("weights", TYPES)
@pytest.mark.parametrize("cpu", CPUS)
def test_same_bits_for_a_prompt_at_once_and_in_any_split(cpu, weights):
    """--batch 1 is a token decoded alone; --batch 7 leaves remainders in every tile; the default takes all."""
    needs_cpu(cpu)
    for kind in ("plain", "odd sizes", "layer order", "mlp_only_layers", "wide"):
        model = random_checkpoint(kind, weights)
        ids = random_ids(150, 300)
        whole = logits_bits(model, ids, "--cpu", cpu)
        for batch in (1, 2, 7, 64):
            assert logits_bits(model, ids, "--cpu", cpu, "--batch", batch) == whole, (kind, batch)


@pytest.mark.parametrize("weights", TYPES)
@pytest.mark.parametrize("cpu", CPUS)
def test_same_bits_whatever_follows(cpu, weights):
    """The logits of a prefix are the first logits of the whole."""
    needs_cpu(cpu)
    model = random_checkpoint("plain", weights)
    ids = random_ids(130, 300)
    whole = logits_bits(model, ids, "--cpu", cpu)
    for n in (1, 3, 16, 65, 129):
        part = logits_bits(model, ids[:n], "--cpu", cpu)
        assert part == whole[:len(part)], n


def test_same_bits_over_many_tiles_of_attention():
    """A context long enough that attention is cut into ranges, split and threaded in different ways."""
    model = export(save(random_model(3, max_position_embeddings=2048), WORK / "hf" / "longer"), WORK / "longer.bin",
                   "--type", "bf16")
    ids = random_ids(1500, 300)
    whole = logits_bits(model, ids, "-j", 2)
    for options in (("-j", 1, "--batch", 1), ("-j", 3, "--batch", 64), ("-j", 2, "--batch", 511)):
        assert logits_bits(model, ids, *options) == whole, options


@pytest.mark.parametrize("weights", TYPES)
@pytest.mark.parametrize("cpu", CPUS)
def test_greedy_generation_is_the_argmax_of_one_batch(cpu, weights):
    """Tokens decoded one at a time are those that the logits of the finished text, in one batch, point at."""
    needs_cpu(cpu)
    model = random_checkpoint("wide", weights)
    prompt = random_ids(20, 500)
    output = engine(model, "-m", "generate", "--ids", "-i", spaced(prompt), "-t", 0, "-n", 60, "--cpu", cpu)
    made = [int(word) for word in output.split()]
    assert len(made) == 60
    logits = engine_logits(model, prompt + made, "--cpu", cpu)
    assert logits.argmax(-1)[len(prompt) - 1:-1].tolist() == made


# ----------------------------------------------------------------------------------------------------------------
# 3 Quantized
# ----------------------------------------------------------------------------------------------------------------

def log_softmax(logits):
    logits = logits.astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def mean_kl(reference, ours):
    """Mean over positions of KL(reference || ours), from logits [n, vocab]."""
    p, q = log_softmax(reference), log_softmax(ours)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def dequantized_model(path):
    """A transformers model with exactly the weights that a checkpoint file stores."""
    checkpoint = read_checkpoint(path)
    c = checkpoint.scalar
    kinds, sparse = checkpoint.meta["layer_types"], checkpoint.meta["mlp_types"]
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "head_dim", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
             "linear_value_head_dim", "linear_conv_kernel_dim", "num_experts", "num_experts_per_tok",
             "moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size", "rms_norm_eps",
             "max_position_embeddings")
    config = Qwen3NextConfig(
        **{name: c(name) for name in names}, norm_topk_prob=bool(c("norm_topk_prob")),
        layer_types=[FULL if kind else LINEAR for kind in kinds],
        mlp_only_layers=[n for n, flag in enumerate(sparse) if not flag],
        tie_word_embeddings="lm_head" not in checkpoint.tensors,
        attention_bias=any(name.endswith("qgkv_bias") for name in checkpoint.tensors),
        **rope(c("rope_theta"), c("rotary_dim") / c("head_dim")))
    model = Qwen3NextForCausalLM(config).eval()
    state = {name: torch.tensor(np.array(value)) for name, value in hf_state_dict(checkpoint).items()}
    wrong = model.load_state_dict(state, strict=False)
    assert not wrong.unexpected_keys and set(wrong.missing_keys) <= {"lm_head.weight"}, wrong
    model.tie_weights()
    return model


@pytest.mark.parametrize("kind", ["plain", "n_v = 3 n_k", "odd sizes", "attention_bias", "mlp_only_layers", "tied"])
def test_stored_weights_are_the_source(kind):
    """f32 stores every weight exactly; bf16 rounds to nearest; q8 and q4 stay within a step."""
    original = kind_model(kind).state_dict()
    for weights in TYPES:
        checkpoint = read_checkpoint(random_checkpoint(kind, weights))
        assert checkpoint.meta["weights_type"] == weights
        source = kind_model(kind, weights == "bf16").state_dict()
        for name, stored in hf_state_dict(checkpoint).items():
            wanted = source[name].numpy()
            assert stored.shape == wanted.shape, name
            error = np.abs(stored - wanted).max() / np.abs(wanted).max()
            limit = {"f32": 0, "bf16": 0, "q8": 1 / 127, "q4": 1 / 7}[weights]
            assert error <= limit, (weights, name, error)
    assert original.keys() >= hf_state_dict(checkpoint).keys() - {"lm_head.weight"}


def test_small_tensors_stay_exact():
    """Router, shared-expert gate, b/a, conv, A_log, dt_bias and norms are never quantized."""
    original = kind_model("wide").state_dict()
    stored = hf_state_dict(read_checkpoint(random_checkpoint("wide", "q4")))
    exact = re.compile(r"norm|mlp\.gate\.|shared_expert_gate|in_proj_ba|conv1d|A_log|dt_bias")
    names = [name for name in stored if exact.search(name)]
    assert len(names) > 20
    for name in names:
        assert np.array_equal(stored[name], original[name].numpy()), name


def test_q4_takes_at_most_4_6_bits_over_the_experts():
    checkpoint = read_checkpoint(random_checkpoint("wide", "q4"))
    experts = [t for t in checkpoint.tensors.values() if ".experts." in t.name]
    assert experts and all(t.type == Q4 for t in experts)
    assert sum(t.size for t in experts) * 8 / sum(math.prod(t.shape) for t in experts) <= 4.6


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("weights, limit_stored, limit_source", [("q8", 4e-2, 6e-2), ("q4", 4e-2, 6e-1)])
def test_quantized_logits_stay_near(weights, limit_stored, limit_source, cpu, report):
    """Random weights of some width: against the stored weights in float32 (only activations are rounded then) and
    against the source. Random networks amplify errors and have many near-ties in their routers, so these limits are
    wide; the promise is the demo's, below."""
    needs_cpu(cpu)
    path = random_checkpoint("wide", weights)
    ids, source = reference_logits("wide", False, 200)
    ours = engine_logits(path, ids, "--cpu", cpu)
    stored = dequantized_model(path)(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    kl = mean_kl(stored, ours), mean_kl(source, ours)
    report(f"{weights}, {cpu}: KL to the stored weights {kl[0]:.1e}, to the source's {kl[1]:.1e}")
    assert kl[0] < limit_stored and kl[1] < limit_source


STORY = """Once upon a time there was a rabbit named Lily. Lily lived near a quiet forest with her friend, a small fox. One \
morning Lily found an old key under a big tree. "What does this key open?" she asked. The fox did not know. So they \
walked along the river and asked the owl. The owl looked at the key and said, "There is a little door behind the \
waterfall." Lily was scared, but she wanted to be brave. She took a deep breath and went through the cold water. \
Behind it was a door, and the key fit. Inside they found a box full of warm blankets and a note. It said, "Share \
these with anyone who is cold." Lily and the fox carried the blankets home and gave one to each of their friends. \
Everyone was happy, and they sat together and looked at the stars.
"""


@pytest.mark.skipif(not DEMO.exists(), reason="no demo checkpoint yet")
def test_demo_checkpoint_quantized_and_in_transformers(report):
    """The demo as shipped (q8) and stored again as q4, against transformers in float32 on the demo's weights. The
    texts are stories that the demo tells at the settings that it ships with; the request before them does not count, as the demo never learned
    to continue one. Of q8 the mean over all tokens is bounded; of q4, here made of q8, the median of the stories' means: where a senseless word was
    drawn, anything may follow, and four such tokens in a row can be nine tenths of a mean over thousands."""
    model = dequantized_model(DEMO)
    paths = {"q8": DEMO, "q4": export(save(model, WORK / "hf" / "demo"), WORK / "demo-q4.bin", "--type", "q4")}
    prompts = [engine(DEMO, "-m", "tokenize", "--ids", "-i", f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n").split() for asked in (
        "Tell me a story about a rabbit and a key.", "Tell me a story about a girl who is afraid of the dark.", "A bear, a boat and the moon.",
        "Write a story about two mice who share a cheese.")]
    kl, tokens = {name: [] for name in paths}, []
    for seed in range(1, 25):
        prompt = prompts[seed % 4]
        story = engine(DEMO, "--ids", "-i", spaced(map(int, prompt)), "-s", seed, "-n", 700).split()
        assert len(story) > 100
        ids, told = [int(word) for word in prompt + story], slice(len(prompt) - 1, None)
        torch.set_num_threads(2)
        reference = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()[told]
        torch.set_num_threads(1)
        tokens.append(len(reference))
        for name, path in paths.items():
            kl[name].append(mean_kl(reference, engine_logits(path, ids)[told]))
    for name in paths:
        report(f"demo: KL of {name}: mean {np.average(kl[name], weights=tokens):.1e} over {sum(tokens)} tokens; of the 24 stories the median "
               f"{np.median(kl[name]):.1e}, the largest {max(kl[name]):.1e}")
    assert np.average(kl["q8"], weights=tokens) < 1e-4 and np.median(kl["q4"]) < 2e-3


# ----------------------------------------------------------------------------------------------------------------
# 4 Tokenizer
# ----------------------------------------------------------------------------------------------------------------

PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")


@functools.cache
def byte_alphabet():
    """byte -> the character that stands for it in byte-level vocabularies (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {**{byte: chr(byte) for byte in plain}, **{byte: chr(256 + i) for i, byte in enumerate(rest)}}


@dataclasses.dataclass
class TokenizerFile:
    """What tokenizer.bin says."""
    data: bytes
    tokens: list                                  # id -> bytes; b"" for ids that are not used
    merges: list                                  # (left id, right id, result id) in rank order
    added: list                                   # (id, flags); flag 1: special
    sections: dict                                # name -> (offset, size)


def read_tokenizer(path):
    """Read tokenizer.bin (README, "Checkpoint format")."""
    data = Path(path).read_bytes()
    magic, version, n_tokens, n_merges, n_added, n_classes, n_ccc, n_decomp, n_comp, pattern, flags, _, size = \
        struct.unpack_from("<8s10I2Q", data)
    assert (magic, version, pattern, flags, size) == (b"QWEN3TOK", 1, 0, 1, len(data))
    sections, at = {}, 64
    for name, count in (("offsets", n_tokens + 1), ("merges", 3 * n_merges), ("added", 2 * n_added),
                        ("classes", 3 * n_classes), ("ccc", 3 * n_ccc), ("decomp", 3 * n_decomp),
                        ("comp", 3 * n_comp)):
        sections[name] = at, 4 * count
        at += (4 * count + 7) // 8 * 8

    def numbers(name, width):
        offset, size = sections[name]
        return np.frombuffer(data, "<u4", size // 4, offset).reshape(-1, width).tolist()

    bounds = [row[0] for row in numbers("offsets", 1)]
    sections["bytes"] = at, bounds[-1]
    tokens = [data[at + a:at + b] for a, b in zip(bounds, bounds[1:])]
    return TokenizerFile(data, tokens, numbers("merges", 3), numbers("added", 2), sections)


def library_tokenizer(file, with_added=True):
    """The `tokenizers` object that a tokenizer.bin was made from; without added tokens: no text is special."""
    letters = byte_alphabet()
    added = {id: flags for id, flags in file.added}
    spelled = ["".join(letters[byte] for byte in token) for token in file.tokens]
    vocab = {spelled[id]: id for id, token in enumerate(file.tokens) if token and id not in added}
    merges = [(spelled[left], spelled[right]) for left, right, _ in file.merges]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, fuse_unk=False))
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)])
    byte_level = dict(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.post_processor = tokenizers.processors.ByteLevel(**byte_level)
    tokenizer.decoder = tokenizers.decoders.ByteLevel(**byte_level)
    for id, flags in file.added if with_added else ():
        token = tokenizers.AddedToken(file.tokens[id].decode(), special=bool(flags & 1), normalized=False)
        (tokenizer.add_special_tokens if flags & 1 else tokenizer.add_tokens)([token])
        assert tokenizer.token_to_id(token.content) == id
    return tokenizer


@functools.cache
def real_file():
    return read_tokenizer(TOKENIZER)


@functools.cache
def real_tokenizer(with_added=True):
    return library_tokenizer(real_file(), with_added)


@functools.cache
def small_tokenizer_json():
    """A tokenizer.json of a few hundred tokens, of the same design, trained here: for models of small vocabulary."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"), byte_level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=340, initial_alphabet=byte_level.alphabet(),
                                             show_progress=False)
    tokenizer.train_from_iterator([STORY], trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in ("<think>", "</think>")])
    path = WORK / "small" / "tokenizer.json"
    path.parent.mkdir()
    tokenizer.save(str(path))
    return path


@functools.cache
def small_tokenizer():
    """The small tokenizer as a tokenizer.bin, and as the library's object."""
    path = export_tokenizer(small_tokenizer_json(), WORK / "small" / "tokenizer.bin")
    return path, tokenizers.Tokenizer.from_file(str(small_tokenizer_json()))


SEPARATOR = "<|fim_pad|>"            # an added token: what stands on its two sides is tokenized apart


def engine_encode(texts, path=TOKENIZER, library=None):
    """Ids that the engine gives each text (str or bytes). All go in one call, separated by an added token."""
    raw = [text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text for text in texts]
    file = WORK / f"texts-{os.getpid()}.txt"
    file.write_bytes(SEPARATOR.encode().join(raw))
    output = engine(token_model(), "-m", "tokenize", "--ids", "-f", file, "-z", path)
    ids = [int(word) for word in output.split()]
    separator = (library or real_tokenizer()).token_to_id(SEPARATOR)
    parts = [[]]
    for id in ids:
        parts.append([]) if id == separator else parts[-1].append(id)
    assert len(parts) == len(texts)
    return parts


def engine_encode_alone(text):
    """Ids of one text in a call of its own."""
    path = WORK / f"text-{time.monotonic_ns()}-{random.random()}.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return [int(word) for word in
            engine(token_model(), "-m", "tokenize", "--ids", "-f", path, "-z", TOKENIZER).split()]


def token_model():
    """Some checkpoint to name on the command line when only the tokenizer is wanted."""
    return random_checkpoint("real vocabulary", "q8")


def check_ids(texts, path=TOKENIZER, library=None):
    """Compare the engine with the library on every text; say which text differs."""
    library = library or real_tokenizer()
    expected = [encoding.ids for encoding in library.encode_batch(texts, add_special_tokens=False)]
    for text, ours, wanted in zip(texts, engine_encode(texts, path, library), expected):
        assert ours == wanted, f"{text!r}\n{[hex(ord(c)) for c in text][:40]}\n ours  {ours}\n wanted {wanted}"


PHRASES = """
The quick brown fox jumps over the lazy dog.|Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.
Voix ambiguë d’un cœur qui, au zéphyr, préfère les jattes de kiwis.|El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia.
À noite, vovô Kowalsky vê o ímã cair no pé do pinguim.|Pchnąć w tę łódź jeża lub ośm skrzyń fig.|Příliš žluťoučký kůň úpěl ďábelské ódy.
Árvíztűrő tükörfúrógép.|Eble ĉiu kvazaŭ-deca fuŝĥoraĵo ĝojigos homtipon.|Hər vaxtınız xeyir.|Pijamalı hasta yağız şoföre çabucak güvendi. İstanbul ıIiİ
Съешь же ещё этих мягких французских булок, да выпей чаю.|Щастям б'єш жук їх глицю в фон й ґедзь пріч.|Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.
דג סקרן שט בים מאוכזב ולפתע מצא חברה|שָׁלוֹם עֲלֵיכֶם|نص حكيم له سر قاطع وذو شأن عظيم|بِسْمِ ٱللَّٰهِ ٱلرَّحْمَٰنِ ٱلرَّحِيمِ|سلام، حال شما چطور است؟|یہ اردو کا جملہ ہے۔
ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश|আমি বাংলায় কথা বলি।|ਸਤ ਸ੍ਰੀ ਅਕਾਲ|ગુજરાતી ભાષા|ଓଡ଼ିଆ ଭାଷା|யாமறிந்த மொழிகளிலே தமிழ்மொழி|తెలుగు భాష|ಕನ್ನಡ ಭಾಷೆ|മലയാളം ഭാഷ|සිංහල භාෂාව
เป็นมนุษย์สุดประเสริฐเลิศคุณค่า น้ำ|ພາສາລາວ|ភាសាខ្មែរ|မြန်မာဘာသာ|བོད་སྐད་|ქართული ენა|Հայերէն լեզու|አማርኛ ቋንቋ|ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ|ᐃᓄᒃᑎᑐᑦ|ᠮᠣᠩᠭᠣᠯ ᠬᠡᠯᠡ|ⵜⴰⵎⴰⵣⵉⵖⵜ|ߒߞߏ
我能吞下玻璃而不伤身体。|天地玄黃，宇宙洪荒。|いろはにほへと ちりぬるを|カタカナ ｶﾞｷﾞｸﾞ ㌔㍍|키스의 고유조건은 입술끼리 만나야 하고|𠜎𠜱𠝹𠱓|ㄅㄆㄇㄈ|〇一二三|Tiếng Việt: Một hai ba bốn năm sáu bảy tám chín mười
def f(x):\\n\\treturn x**2  # square\\n|for (int i = 0; i < n; ++i) { a[i] += b[i]; }\\r\\n|if (x != NULL && *p == '\\\\0') goto err;|SELECT * FROM t WHERE a='it''s';|<div class="x">&nbsp;</div>|{"a": [1, 2.5e-10, null, true]}|#!/bin/sh\\nset -eu\\n\\n\\nexec "$@"|\\\\frac{1}{2}\\\\sum_{i=0}^{n}|0xDEADBEEF 1_000_000 3.14159 1e10
x = y if z else w;;;\\t\\t\\t}|        indented\\n          more\\n\\n    less|a\\tb\\t\\tc|http://example.com/a?b=c&d=%20#frag|user@example.com|C:\\\\Users\\\\x|$HOME/.bashrc|--long-option=value|∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α ∧ ¬β|⟨ψ|φ⟩ ≈ ∫₀^∞ e^{−x²} dx
I'm we're you've he'll they'd it's can't|I'M WE'RE YOU'VE HE'LL THEY'D IT'S CAN'T|it'ſ 'ſa 'S 'sT 'Re 'vE 'lL 'Ll 'd'd'd|''s 't's '  's\\n's|don’t won’t|'sun 'them 'real 'very 'me 'llama 'do|O'Neil's d'être l'État 'l 'r 'v|1's 2'T \\t's \\n't
""".strip().replace("\n", "|").split("|")
PHRASES = [phrase.replace("\\\\", "\0").replace("\\n", "\n").replace("\\t", "\t").replace("\\r", "\r").replace("\0", "\\")
           for phrase in PHRASES]

EMOJI = ["😀", "👍🏽", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇫🇷", "❤️‍🔥", "1️⃣", "#️⃣", "🧑🏿‍🚀", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "☺︎", "☺️", "⌚", "🫱🏻‍🫲🏿", "\u200d", "\ufe0f"]
SPACES = [" ", "  ", "   ", "\t", "\n", "\r", "\r\n", "\n\n", " \n", "\n ", "\r\n\r\n", " \r\n ", "\u00a0", "\u2028", "\u2029",
          "\u3000", "\u0085", "\u1680", "\u2003", "\u202f", "\u205f", "\u200b", "\ufeff", "\v", "\f", "\x1c", "\x1d",
          "\x1e", "\x1f", "\u180e", "\x00", "\x7f"]
DIGITS = "0123456789٠١٢٣٤٥٦٧٨٩०१२३४५६７８９²³¹½¾Ⅷⅸ①⑩㊿𝟘𝟡๐๑༣〇零一੧௧᠐𑁦🄁"
MARKS = [chr(c) for c in (*range(0x300, 0x370), *range(0x591, 0x5C8), *range(0x610, 0x61B), *range(0x64B, 0x660),
                          0x93C, 0x94D, 0x9BC, 0x9D7, 0xBBE, 0xBD7, 0xDCF, 0xE38, 0xE48, 0xF71, 0xF72, 0xF74, 0xF80,
                          0x1039, 0x1DC0, 0x20D0, 0x20EF, 0x302A, 0x3099, 0x309A, 0x1D165, 0x1D16D, 0x110BA, 0xFB1E)]
BASES = list("aeiouyACEINOSUZnçéüñåǖḍôσΩΑиИЕऩकডαΐあかがハパ가각ㄱ") + ["\u0958", "\u212b", "\u2126", "\u1e9b", "\ufb2c",
                                                              "\uf900", "\u2adc", "\u0344", "\u0f73", "\U0001d1bb"]
CODE_POINTS = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
JAMO = [chr(c) for c in (*range(0x1100, 0x1113), *range(0x1161, 0x1176), *range(0x11A7, 0x11C3), 0x115F, 0x1160,
                         0x11FF, 0xA960, 0xD7B0, 0xAC00, 0xAC01, 0xAC1C, 0xD7A3)]
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<tool_call>", "<|im_end|",
            "<|im_start|>user\n", "<|", "|>", "<think", "<|fim_prefix|>", "<|IM_END|>"]


def random_character(rng):
    """A code point that UTF-8 can carry, from all planes, mostly from where characters are."""
    while True:
        c = rng.choice([rng.randrange(0x250), rng.randrange(0x3000), rng.randrange(0x10000), rng.randrange(0x20000),
                        rng.randrange(0x110000)])
        if not 0xD800 <= c < 0xE000:
            return chr(c)


def corpus(rng):
    """About 2,700 texts; every pool by itself and all of them mixed."""
    pick = lambda pool, low, high: "".join(rng.choice(pool) for _ in range(rng.randint(low, high)))
    yield from PHRASES
    yield from EMOJI + SPACES + BASES + JAMO + SPECIALS + [""]
    for phrase in PHRASES:
        yield phrase.upper()
        yield unicodedata.normalize("NFD", phrase)
        yield "".join(rng.choice(SPACES) if c == " " else c for c in phrase)
        yield phrase.replace(" ", "")
    for _ in range(200):
        yield "".join(rng.choice(BASES) + pick(MARKS, 0, 4) for _ in range(rng.randint(1, 12)))
        yield pick(JAMO, 1, 20)
        yield pick(SPACES, 1, 8) + rng.choice(PHRASES)[:9] + pick(SPACES, 0, 5) + rng.choice(PHRASES)[-7:]
        yield pick(DIGITS, 1, 12) + rng.choice(SPACES) + pick(DIGITS + "abc.,-' ", 1, 12)
        yield "".join(random_character(rng) for _ in range(rng.randint(1, 30)))
        pools = PHRASES, EMOJI, SPACES, MARKS, BASES, JAMO, SPECIALS, DIGITS
        yield pick([rng.choice(pool) for pool in pools], 1, 20)
        yield pick(list("'’sStTrReEvVmMlLdDſ \n1aÉ"), 1, 15)
        yield pick(list("!\"#$%&()*+,-./:;<=>?@[]^_`{|}~«»„“…—。、") + ["\n", "\r\n", " ", "a"], 1, 15)
        yield pick(SPECIALS + ["a", " ", "\n", "e\u0301", "\u0301"], 1, 10)
    for n in (1000, 5000):
        yield "a" * n
        yield "ab" * n
        yield "ß" * n
        yield "字" * n
        yield " " * n + "x"
        yield "\n" * n
        yield "e" + "\u0301\u0323" * n
        yield "!" * n + "\r\n" * n
        yield "supercalifragilistic" * (n // 20)


def test_ids_equal_the_library():
    """Thousands of texts of many scripts, code, emoji, marks, white space, specials."""
    texts = [text for text in corpus(random.Random(1)) if SEPARATOR not in text]
    assert len(set(texts)) >= 2000
    check_ids(texts)


def test_ids_equal_the_library_one_text_a_call():
    """As above, without neighbours: the text's own start and end are the input's."""
    texts = random.Random(2).sample([text for text in corpus(random.Random(3)) if len(text) < 200], 150)
    expected = [encoding.ids for encoding in real_tokenizer().encode_batch(texts, add_special_tokens=False)]
    token_model()                                # made once, before the threads that use it
    for text, ours, wanted in zip(texts, parallel(engine_encode_alone, texts), expected):
        assert ours == wanted, repr(text)


def test_ids_equal_the_library_for_every_code_point():
    """Each code point after a digit, before a letter, beside punctuation and beside itself: its class, its normal
    form and its bytes. Of the planes where nothing is assigned, one in 97."""
    some = [chr(c) for c in range(0x110000) if c < 0x32000 or 0xE0000 <= c < 0xE0200 or c % 97 == 0]
    some = [c for c in some if not "\ud800" <= c <= "\udfff"]
    for i in range(0, len(some), 50_000):
        check_ids([f"1{c}a {c}!{c}{c}\u0301s" for c in some[i:i + 50_000]])


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=10, max_size=60))
def test_ids_equal_the_library_for_hypothesis(texts):
    check_ids([text for text in texts if SEPARATOR not in text] or [""])


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.text(st.sampled_from("aeßé \n\r\t'sS1.\u0301\u0323\u1100\u1161\u11a8\u00a0\u3000<|>"),
                        max_size=25), min_size=20, max_size=80))
def test_ids_equal_the_library_for_hypothesis_on_few_characters(texts):
    check_ids(texts)


def decode(ids):
    return b"".join(real_file().tokens[id] for id in ids)


def test_invalid_utf8_is_kept():
    """Bytes that are no UTF-8 come back as they were, and the valid text between them in normal form C."""
    rng = random.Random(4)
    broken = [bytes(rng.randrange(256) for _ in range(rng.randint(1, 60))) for _ in range(200)]
    broken += [bytes([byte]) for byte in range(256)]
    broken += [b"\xff\xfe", b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98", b"\xc0\xaf", b"\xe0\x80\xaf", b"\xed\xa0\x80",
               b"\xf4\x90\x80\x80", b"\xf8\x88\x80\x80\x80", b"abc\x80def", b"\x80" * 1000, b"e\xcc\x81\xffe\xcc\x81",
               b"\xe2\x82\xe2\x82\xac", b"caf\xc3\xa9\xe9", b"\xff<|im_end|>\xff"]
    for data, ids in zip(broken, engine_encode(broken)):
        assert decode(ids) == normal_form(data), data


def normal_form(data):
    """NFC of the valid stretches of a byte string; invalid bytes stay."""
    text = data.decode("utf-8", "surrogateescape")                        # invalid bytes become lone surrogates
    parts = re.split("([\udc80-\udcff]+)", text)
    return "".join(part if i % 2 else nfc(part) for i, part in enumerate(parts)).encode("utf-8", "surrogateescape")


def nfc(text):
    return tokenizers.normalizers.NFC().normalize_str(text)


def test_bytes_in_order_and_escaped():
    """Without --ids: one line a token, its id, a tab, its bytes escaped; the bytes are those of the text."""
    text = 'Hello, "world"\t\\ ☃\r\n\n\x00\x7f é'
    path = WORK / "escaped.txt"
    path.write_bytes(text.encode() + b"\xff\x80")
    output = engine(token_model(), "-m", "tokenize", "-f", path, "-z", TOKENIZER).decode("ascii")
    ids, shown = zip(*(line.split("\t") for line in output.splitlines()))
    assert decode(map(int, ids)) == text.encode() + b"\xff\x80"
    plain = "".join(shown).encode().decode("unicode_escape").encode("latin-1")
    assert plain == text.encode() + b"\xff\x80"


def timed_encode(text):
    """Seconds of one call of the engine on this text, the better of two."""
    path = WORK / "timed.txt"
    path.write_text(text)
    best = math.inf
    for _ in range(2):
        start = time.perf_counter()
        engine(token_model(), "-m", "tokenize", "--ids", "-f", path, "-z", TOKENIZER)
        best = min(best, time.perf_counter() - start)
    return best


@pytest.mark.parametrize("unit", [" ".join(PHRASES), "a", "ab", "\u0301", " ", "\n", "字", "é", "0", "-", "'s"])
def test_time_grows_in_proportion(unit, report):
    """Ten times the text takes about ten times as long (a hundred times, were a step quadratic), also where
    a text is one single word."""
    small, large = ((unit * (size // len(unit) + 1))[:size] for size in (100_000, 1_000_000))
    start, short, long = timed_encode(""), timed_encode(small), timed_encode(large)
    report(f"{unit[:9]!r}: {short - start:.3f} s for 100,000 characters, {long - start:.3f} s for 1,000,000")
    assert long - start < 50 * max(short - start, 0.01)


def test_one_megabyte_is_encoded_as_by_the_library():
    text = (" ".join(PHRASES) * 1000)[:700_000]
    assert len(text.encode()) > 1_000_000
    check_ids([text])


@pytest.mark.parametrize("source", ["real", "small"])
def test_tokenizer_export_is_a_round_trip(source):
    """tokenizer.bin -> the library's tokenizer -> tokenizer.json -> export.py: the same bytes."""
    path = TOKENIZER if source == "real" else small_tokenizer()[0]
    again = WORK / f"{source}-again.bin"
    library_tokenizer(read_tokenizer(path)).save(str(WORK / f"{source}-again.json"))
    export_tokenizer(WORK / f"{source}-again.json", again)
    assert again.read_bytes() == path.read_bytes()


def test_small_tokenizer_gives_the_library_s_ids():
    path, library = small_tokenizer()
    for text in PHRASES[:20] + ["<|im_start|>user\nhi<|im_end|>", "naïve e\u0301"]:
        file = WORK / "small.txt"
        file.write_text(text, newline="")
        ours = engine(token_model(), "-m", "tokenize", "--ids", "-f", file, "-z", path).split()
        assert [int(word) for word in ours] == library.encode(text, add_special_tokens=False).ids, text


def test_decoding_joins_bytes():
    """generate --echo prints exactly the prompt's text first, special tokens left out; -v shows them."""
    model = random_checkpoint("real vocabulary", "q8")
    text = "Grüße <think> 字 🙂"
    shown = engine(model, "-i", f"<|im_start|>{text}", "--echo", "-n", 1, "-t", 0, "-z", TOKENIZER)
    assert shown.startswith(text.encode())
    shown = engine(model, "-i", f"<|im_start|>{text}", "--echo", "-n", 1, "-t", 0, "-v", "-z", TOKENIZER)
    assert shown.startswith(b"<|im_start|>" + text.encode())


# ----------------------------------------------------------------------------------------------------------------
# 5 Templates: the engine's tokens are apply_chat_template's
# ----------------------------------------------------------------------------------------------------------------

TOOLS = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- '# Tools\n\nYou may call one or more functions.\n<tools>' }}
    {%- for tool in tools %}
        {{- '\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}"""

# The shapes of the released templates. Instruct: every turn alike. Thinking: the generation prompt opens a thought,
# and answers before the last question lose theirs. Coder: another writer's style, the system turn taken off first.
# Qwen3.5: thoughts, and white space stripped from everything. The last two are nobody's: a default system prompt, and white space stripped from everything.
TEMPLATES = {
    "instruct": TOOLS + r"""
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == 'user') or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {{- '\n<tool_call>\n' + (tool_call | tojson) + '\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + content + '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}""",
    "thinking": TOOLS + r"""
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == 'user' and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == 'user') or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n<think>\n' }}
{%- endif %}""",
    "coder": r"""
{%- macro render_extra_keys(json_dict, handled_keys) -%}
    {%- for key in json_dict if key not in handled_keys %}
        {{- '\n<' ~ key ~ '>' ~ json_dict[key] ~ '</' ~ key ~ '>' }}
    {%- endfor %}
{%- endmacro -%}
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = [] %}
{%- endif %}
{%- if system_message is defined %}
    {{- "<|im_start|>system\n" + system_message }}
{%- elif tools is iterable and tools | length > 0 %}
    {{- "<|im_start|>system\nYou are Qwen, a helpful AI assistant that can interact with a computer to solve tasks." }}
{%- endif %}
{%- if tools is iterable and tools | length > 0 %}
    {{- "\n\n# Tools\n\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n<function>\n<name>" ~ tool.name ~ "</name>" }}
        {{- render_extra_keys(tool, ['name']) }}
        {{- "\n</function>" }}
    {%- endfor %}
    {{- "\n</tools>" }}
{%- endif %}
{%- if system_message is defined or (tools is iterable and tools | length > 0) %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- for message in loop_messages %}
    {%- if message.role == "assistant" and message.tool_calls is defined and message.tool_calls is iterable and message.tool_calls | length > 0 %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content is defined and message.content is string and message.content | trim | length > 0 %}
            {{- '\n' + message.content | trim + '\n' }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "user" or message.role == "system" or message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""",
    "qwen3.5": r"""
{%- macro text_of(content) %}
    {%- if content is string %}
        {{- content }}
    {%- elif content is none or content is undefined %}
        {{- '' }}
    {%- else %}
        {{- raise_exception('This content is no text.') }}
    {%- endif %}
{%- endmacro %}
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + text_of(messages[0].content) | trim + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last_query_index=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set ns.last_query_index = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- if ns.last_query_index < 0 %}
    {{- raise_exception('Nobody asks anything.') }}
{%- endif %}
{%- for message in messages %}
    {%- set content = text_of(message.content) | trim %}
    {%- if message.role == 'system' and not loop.first %}
        {{- raise_exception('The system speaks first.') }}
    {%- elif message.role == 'user' %}
        {{- '<|im_start|>user\n' + content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') | trim %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {{- '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n' + content }}
        {%- else %}
            {{- '<|im_start|>assistant\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- else %}
        {{- '<think>\n' }}
    {%- endif %}
{%- endif %}""",
    "default system": r"""{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "trimmed": r"""{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
}

# What the scripted models below answer to everything, under greedy decoding. Every token may occur only once.
SCRIPTS = {"qwen3.5": "Hm, who is that</think>  Hello there! How can you tell?", "thinking": "Let me see what this is</think>\n\nHello there! How can you tell?"}
SCRIPT = "Hello there! How can I help you today?"


def scripted_model(directory, script, template):
    """A checkpoint with the real tokenizer that says one text, token by token, and then <|im_end|>: its layers add
    nothing, so the next token depends only on the last one, and the script starts after a line feed."""
    chain = [real_tokenizer().token_to_id("Ċ"), *real_tokenizer().encode(script).ids,
             real_tokenizer().token_to_id("<|im_end|>")]
    assert len(set(chain)) == len(chain) <= 32
    model = random_model(1, vocab_size=151936, hidden_size=32, num_hidden_layers=2, layer_types=[LINEAR, FULL])
    for name, weight in model.named_parameters():
        if re.search(r"out_proj|o_proj|down_proj|norm|embed_tokens|lm_head", name) and "linear_attn.norm" not in name:
            weight.zero_()
    for i, (token, following) in enumerate(zip(chain, chain[1:])):
        model.model.embed_tokens.weight[token, i] = 1
        model.lm_head.weight[following, i] = 4
    with_tokenizer(save(model, directory), real_tokenizer(), template)
    if template != TEMPLATES["instruct"]:
        (directory / "tokenizer.json").unlink()      # one of them is enough; its Unicode tables take seconds to find
    return directory


def with_tokenizer(directory, tokenizer, template=None, **generation):
    """Put tokenizer.json, a chat template and a generation_config.json beside a checkpoint, as the hub has them."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if template is not None:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    ids = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    (directory / "generation_config.json").write_text(json.dumps(
        dict(dict(do_sample=True, temperature=0.7, top_p=0.8, top_k=20, eos_token_id=ids), **generation)))
    return directory


@functools.cache
def chat_model(flavour):
    source = scripted_model(WORK / "hf" / f"chat {flavour}", SCRIPTS.get(flavour, SCRIPT), TEMPLATES[flavour])
    return export(source, WORK / f"chat {flavour}.bin", "--type", "bf16")


@functools.cache
def babbling_model():
    """Random weights of the real vocabulary with the Instruct template: its answers are random tokens, many of them
    pieces of characters."""
    source = save(kind_model("real vocabulary"), WORK / "hf" / "babble")
    with_tokenizer(source, real_tokenizer(), TEMPLATES["instruct"])
    return export(source, WORK / "babble.bin", "--type", "q8")


def tokenizer_of(model):
    """The tokenizer that belongs to a model: the demo has its own, models of these tests have Qwen's."""
    return DEMO_TOKENIZER if model == DEMO else TOKENIZER


def chat(model, lines, *options, **kwargs):
    """A conversation through pipes, one line a turn: (standard output, ids the model has been fed in the end)."""
    result = run(ENGINE, model, "-m", "chat", "-v", "-z", tokenizer_of(model), *options,
                 stdin="".join(line + "\n" for line in lines).encode(), **kwargs)
    assert result.returncode == 0, result.stderr
    history = []
    for verb, numbers in re.findall(r"^(fed|loaded|rewind): ([\d ]*)$", result.stderr.decode("utf-8", "replace"), re.M):
        if verb != "rewind":
            history += map(int, numbers.split())
        else:
            assert int(numbers) <= len(history)
            del history[int(numbers):]
    return result.stdout, history


@functools.cache
def renderer(flavour):
    """transformers' own tokenizer object, for its apply_chat_template."""
    return transformers.PreTrainedTokenizerFast(tokenizer_object=real_tokenizer(), chat_template=TEMPLATES[flavour])


def check_history(history, flavour, messages, answer):
    """The model was fed the template's tokens for these messages, then the answer's (its last may not be fed yet)."""
    wanted = renderer(flavour).apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    said = real_tokenizer().encode(answer).ids
    whole = wanted + said + real_tokenizer().encode("<|im_end|>\n").ids
    text = real_tokenizer().decode(history, skip_special_tokens=False)
    assert history == whole[:len(history)] and len(history) >= len(wanted) + len(said) - 1, text


def conversation(flavour, questions, system=None, answers=None):
    """The messages of a chat whose answers are the script's, up to the last question."""
    answers = answers or [SCRIPTS.get(flavour, SCRIPT)] * len(questions)
    messages = [dict(role="system", content=system)] if system is not None else []
    for question, answer in zip(questions, answers):
        messages += [dict(role="user", content=question), dict(role="assistant", content=answer)]
    return messages[:-1]


QUESTIONS = ["Hello, how are you?", "  What's 12 + 30, in Français: e\u0301te\u0301? ", "def f(x): return x",
             "Thanks! 谢谢 🙂"]


@pytest.mark.parametrize("system", [None, "You are a pirate. Answer in rhymes!"])
@pytest.mark.parametrize("turns", [1, 2, 3, 4])
@pytest.mark.parametrize("flavour", TEMPLATES)
def test_conversation_equals_apply_chat_template(flavour, turns, system):
    questions = QUESTIONS[:turns]
    options = ["-t", 0, *(["-y", system] if system else [])]
    output, history = chat(chat_model(flavour), questions, *options)
    answer = SCRIPTS.get(flavour, SCRIPT)
    check_history(history, flavour, conversation(flavour, questions, system), answer)
    assert output.decode().count("Hello there!") == turns


@pytest.mark.parametrize("flavour", ["instruct", "thinking", "coder"])
def test_cut_answers_are_closed_as_the_template_closes_them(flavour):
    """-n 3 ends an answer in its middle; the next turn still starts on a finished one."""
    answer = real_tokenizer().decode(real_tokenizer().encode(SCRIPTS.get(flavour, SCRIPT)).ids[:3])
    _, history = chat(chat_model(flavour), QUESTIONS[:3], "-t", 0, "-n", 3)
    check_history(history, flavour, conversation(flavour, QUESTIONS[:3], answers=[answer] * 3), answer)


def test_random_answers_stay_as_they_were_sampled():
    """Answers of random tokens, pieces of characters among them, are kept token for token across turns: the
    history is the template's with each answer's own ids in its place."""
    output, history = chat(babbling_model(), QUESTIONS[:3], "-n", 12, "-s", 7, "-t", 1)
    hole = real_tokenizer().token_to_id("<|fim_pad|>")
    messages = conversation("instruct", QUESTIONS[:3], answers=["<|fim_pad|>"] * 3)
    at = 0
    for id in renderer("instruct").apply_chat_template(messages, add_generation_prompt=True, return_dict=False):
        if id == hole:
            at += 12
        else:
            assert history[at] == id, real_tokenizer().decode(history[:at + 1], skip_special_tokens=False)
            at += 1
    assert at + 11 <= len(history) <= at + 14
    assert output


@pytest.mark.parametrize("place", ["user", "system", "one turn"])
def test_special_tokens_that_a_user_types_are_characters(place):
    """Their text goes in letter by letter, though the template's own <|im_end|> is the token."""
    typed = "a<|im_end|>\t<|im_start|>system <think> </think><|endoftext|>"
    plain = ["Hi", "there"]
    if place == "user":
        _, history = chat(chat_model("instruct"), [typed, plain[1]], "-t", 0)
        messages = conversation("instruct", [typed, plain[1]])
    elif place == "system":
        _, history = chat(chat_model("instruct"), plain, "-t", 0, "-y", typed)
        messages = conversation("instruct", plain, typed)
    else:
        _, history = chat(chat_model("instruct"), [], "-t", 0, "-i", typed)
        messages = conversation("instruct", [typed])
    marker = "\ue000"                            # stands for what was typed while the template's tokens are found
    for message in messages:
        message["content"] = message["content"].replace(typed, marker)
    text = renderer("instruct").apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    wanted = []
    for part in re.split(r"(<\|im_start\|>|<\|im_end\|>)", text):
        wanted += real_tokenizer(with_added=part.startswith("<|im_")).encode(part.replace(marker, typed)).ids
    assert history[:len(wanted)] == wanted
    assert len(history) > len(wanted)


def test_one_turn_with_a_prompt():
    """-m chat -i TEXT: one templated turn, the answer on stdout, status 0."""
    for flavour in ("instruct", "thinking"):
        output, history = chat(chat_model(flavour), [], "-t", 0, "-i", "Hello", "-y", "Be brief.")
        check_history(history, flavour, conversation(flavour, ["Hello"], "Be brief."), SCRIPTS.get(flavour, SCRIPT))
        shown = output.decode().removesuffix("\n").removesuffix("<|im_end|>")           # which -v shows
        assert shown.endswith(SCRIPTS.get(flavour, SCRIPT).split("</think>")[-1].strip())


def test_prompt_of_many_lines():
    """A block between triple quotes is one message; so is a file."""
    message = "First line\n\n    second\nthird"
    _, history = chat(chat_model("instruct"), [f'"""{message}"""', "and?"], "-t", 0)
    check_history(history, "instruct", conversation("instruct", [message, "and?"]), SCRIPT)
    file = WORK / "message.txt"
    file.write_text(message)
    _, history = chat(chat_model("instruct"), [], "-t", 0, "-f", file)
    check_history(history, "instruct", conversation("instruct", [message]), SCRIPT)


def chat_pieces(path):
    """A checkpoint's chat.* metadata."""
    return {key: value for key, value in read_checkpoint(path).meta.items() if key.startswith("chat.")}


def test_streaming_never_splits_a_character():
    """Tokens that are pieces of characters: every write to stdout is whole characters, in chat and in generate."""
    script = "x\U0001f9a9y\U00012000z\ua66ew"          # a flamingo, a cuneiform A, a multiocular O
    source = scripted_model(WORK / "hf" / "pieces", script, TEMPLATES["coder"])
    model = export(source, WORK / "pieces.bin", "--type", "bf16")
    for mode in (["-m", "chat", "-i", "Hi"], ["-m", "generate", "-i", "Say\n"]):
        process = subprocess.Popen([ENGINE, model, *mode, "-t", "0", "-z", TOKENIZER],
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        text = b""
        while chunk := os.read(process.stdout.fileno(), 65536):
            chunk.decode()                       # raises when the chunk begins or ends inside a character
            text += chunk
        assert process.wait() == 0 and text.decode().rstrip("\n") == script


def test_empty_system_prompt_and_odd_text():
    """-y "" is a system message without text; white space, control characters and marks in front stay."""
    for system, question in (("", "Hi"), (" a\n", "\u0301x \t"), ("\u0338", "  \u00a0y\r"),
                             (None, "\ud55c\u1100\u1161 \x01")):
        _, history = chat(chat_model("instruct"), [question], "-t", 0, *([] if system is None else ["-y", system]))
        check_history(history, "instruct", conversation("instruct", [question], system), SCRIPT)


def test_chat_template_in_a_file_of_its_own():
    """chat_template.jinja beside the checkpoint counts as the key in tokenizer_config.json does."""
    source = scripted_model(WORK / "hf" / "jinja", SCRIPT, None)
    (source / "chat_template.jinja").write_text(TEMPLATES["instruct"])
    own = chat_pieces(export(source, WORK / "jinja.bin", "--type", "bf16"))
    assert own and own == chat_pieces(chat_model("instruct"))


def test_template_that_the_pieces_cannot_make_is_refused_or_left_out():
    """A template that counts its turns isn't a join of fixed pieces: the export says so instead of guessing."""
    template = "{% for m in messages %}[{{ loop.index }}] {{ m.role }}: {{ m.content }}\n{% endfor %}"
    source = scripted_model(WORK / "hf" / "odd template", SCRIPT, template)
    output = WORK / "odd template.bin"
    result = run(*EXPORT, source, "-o", output, "--type", "bf16")
    assert b"template" in result.stderr
    if result.returncode == 0:
        assert not chat_pieces(output)
    else:
        assert result.returncode == 1 and not output.exists()


CHAT_SEEN = {                        # what is typed, and what of the conversation the model then still has
    "/clear": (["Hi", "/clear", "Yes?"], ["Yes?"], None),
    "/system": (["/system Be a cat.", "Yes?"], ["Yes?"], "Be a cat."),
    "/help": (["/help", "Yes?"], ["Yes?"], None),
    "/show": (["/show", "Yes?"], ["Yes?"], None),
    "/set": (["/set seed 4", "Yes?"], ["Yes?"], None),
    "unknown": (["/nonsense", "Yes?"], ["Yes?"], None),
    "empty line": (["", "Yes?"], ["Yes?"], None),
    "/exit": (["Yes?", "/exit", "More?"], ["Yes?"], None),
}


@pytest.mark.parametrize("command", CHAT_SEEN)
def test_chat_commands_are_not_prompts(command):
    lines, questions, system = CHAT_SEEN[command]
    _, history = chat(chat_model("instruct"), lines, "-t", 0)
    check_history(history, "instruct", conversation("instruct", questions, system), SCRIPT)


def test_full_context_is_said_and_survived():
    """-c 64 holds one long question; the program says that it is full, and goes on after /clear."""
    result = run(ENGINE, chat_model("instruct"), "-m", "chat", "-t", 0, "-c", 64, "-z", TOKENIZER,
                 stdin=b"word " * 40 + b"\n" + b"word " * 40 + b"\n" + b"word " * 400 + b"\n/clear\nHello\n")
    assert result.returncode == 0, result.stderr
    assert re.search(rb"context", result.stderr)
    assert result.stdout.rstrip().endswith(SCRIPT.encode())


def test_interrupt_in_chat_ends_the_answer_and_keeps_the_conversation():
    command = [ENGINE, babbling_model(), "-m", "chat", "-v", "-z", TOKENIZER, "-n", "100000", "-c", "8192", "-s", "1"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        process.stdin.write(b"Hello\n")
        process.stdin.flush()
        process.stdout.read(40)                  # the answer is on its way
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        _, stderr = process.communicate(b"/set n 4\nAgain\n/exit\n", timeout=60)
        assert process.returncode == 0, stderr
        assert stderr.count(b"fed: ") >= 2
    finally:
        process.kill()


def test_interrupt_ends_generate_with_status_130():
    command = [ENGINE, token_model(), "--ids", "-i", "1 2 3", "-n", "100000000", "-c", "500000", "-t", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130
    finally:
        process.kill()


# ----------------------------------------------------------------------------------------------------------------
# 6 Sampler
# ----------------------------------------------------------------------------------------------------------------

SAMPLER_HARNESS = """
#define main qwen3next_main
#include "qwen3next.c"

static Sampler make(const float *knobs, int seed, int vocab, const int *text, int n_prompt, int n_text)
{
    Sampler s;
    sampler_init(&s, (SamplerSettings){.temperature = knobs[0], .top_k = (int)knobs[1], .top_p = knobs[2],
                                       .min_p = knobs[3], .repetition_penalty = knobs[4],
                                       .presence_penalty = knobs[5]}, (uint64_t)seed, vocab);
    for (int i = 0; i < n_text; i++) sampler_saw(&s, text[i], i >= n_prompt);
    return s;
}

/* out: [vocab], the probability of every token */
void distribution(const float *knobs, const float *logits, int vocab, const int *text, int n_prompt, int n_text,
                  double *out)
{
    Sampler s = make(knobs, 1, vocab, text, n_prompt, n_text);
    int n = sampler_distribution(&s, logits);
    for (int i = 0; i < n; i++) out[s.choice[i].id] = s.choice[i].p;
}

/* out: [n], ids drawn one after the other from the same logits */
void draw(const float *knobs, int seed, const float *logits, int vocab, int n, int *out)
{
    Sampler s = make(knobs, seed, vocab, NULL, 0, 0);
    for (int i = 0; i < n; i++) out[i] = sample(&s, logits);
}
"""


@functools.cache
def engine_library(name, harness):
    """qwen3next.c as a shared library that exports what a harness, C that includes it, makes of its functions."""
    source, library = WORK / f"{name}.c", WORK / f"{name}.so"
    source.write_text(harness)
    subprocess.run(["cc", "-std=gnu11", "-O1", "-w", "-pthread", "-shared", "-fPIC", "-DPLAIN_ONLY", f"-I{ROOT}",
                    "-o", library, source, "-lm"], check=True)
    return ctypes.CDLL(str(library))


def sampler_library():
    """The engine's sampler."""
    return engine_library("sampler", SAMPLER_HARNESS)


def array(values, kind):
    """A contiguous numpy array and the pointer that ctypes passes."""
    values = np.ascontiguousarray(values, kind)
    return values, values.ctypes.data_as(ctypes.c_void_p)


def engine_distribution(knobs, logits, prompt, generated):
    """Probabilities [vocab] that the engine samples with; knobs: temperature, top_k, top_p, min_p, repetition and
    presence penalty."""
    keep = [array(knobs, np.float32), array(logits, np.float32), array(prompt + generated, np.int32),
            array(np.zeros(len(logits)), np.float64)]
    pointers = [pointer for _, pointer in keep]
    sampler_library().distribution(pointers[0], pointers[1], len(logits), pointers[2], len(prompt),
                                   len(prompt) + len(generated), pointers[3])
    return keep[3][0]


def library_distribution(knobs, logits, prompt, generated):
    """The same by transformers' processors, in its order; presence penalty, which it hasn't, as others define it:
    subtracted once from the logit of every token that has been generated."""
    temperature, top_k, top_p, min_p, repetition, presence = knobs
    ids, scores = torch.tensor([prompt + generated]), torch.tensor(logits, dtype=torch.float32)[None]
    if repetition != 1 and ids.numel():
        scores = lp.RepetitionPenaltyLogitsProcessor(float(repetition))(ids, scores)
    scores[0, list(set(generated))] -= presence
    if temperature != 1:
        scores = lp.TemperatureLogitsWarper(float(temperature))(ids, scores)
    if top_k:
        scores = lp.TopKLogitsWarper(int(top_k))(ids, scores)
    if top_p < 1:
        scores = lp.TopPLogitsWarper(float(top_p))(ids, scores)
    if min_p:
        scores = lp.MinPLogitsWarper(float(min_p))(ids, scores)
    return torch.softmax(scores.double(), -1)[0].numpy()


KNOBS = [                            # temperature, top_k, top_p, min_p, repetition, presence
    (1, 0, 1, 0, 1, 0), (0.7, 20, 0.8, 0, 1, 0), (0.6, 20, 0.95, 0, 1, 0), (1.0, 40, 0.95, 0, 1, 0),
    (0.3, 0, 1, 0, 1, 0), (2.5, 0, 1, 0, 1, 0), (1, 1, 1, 0, 1, 0), (1, 5, 1, 0, 1, 0), (1, 10_000, 1, 0, 1, 0), (1, 0, 0.5, 0, 1, 0),
    (1, 0, 0.01, 0, 1, 0), (1, 0, 0.999, 0, 1, 0), (1, 0, 1, 0.1, 1, 0), (1, 0, 1, 0.9, 1, 0), (1, 0, 1, 1, 1, 0),
    (1, 0, 1, 0, 1.3, 0), (1, 0, 1, 0, 0.8, 0), (1, 0, 1, 0, 1, 1.5), (1, 0, 1, 0, 1, -0.5),
    (0.8, 30, 0.9, 0.05, 1.1, 0.7),
    (1.7, 50, 0.7, 0.02, 1.5, 2.0), (0.5, 7, 0.97, 0.01, 0.9, 1.0)]


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_distribution_equals_transformers(knobs):
    """On random logits of several spreads, with a prompt and generated tokens that penalties look at."""
    rng = np.random.default_rng(3)
    for spread in (0.5, 2, 6):
        logits = rng.normal(0, spread, 1000).astype(np.float32)
        prompt, generated = rng.integers(0, 1000, 60).tolist(), rng.integers(0, 1000, 40).tolist()
        generated += logits.argsort()[-3:].tolist()
        ours = engine_distribution(knobs, logits, prompt, generated)
        wanted = library_distribution(knobs, logits, prompt, generated)
        assert ours.sum() == pytest.approx(1, abs=1e-12)
        assert np.abs(ours - wanted).max() < 1e-6, spread
        assert (ours > 0).sum() == (wanted > 0).sum() or np.abs(ours - wanted).sum() < 1e-6


def test_distribution_with_equal_and_odd_logits():
    """Ties at the edge of top-k stay in together; -inf and NaN are never drawn."""
    logits = [2.0, 1.0, 1.0, 1.0, 0.0, -math.inf]
    assert np.abs(engine_distribution((1, 2, 1, 0, 1, 0), logits, [], []) -
                  library_distribution((1, 2, 1, 0, 1, 0), logits, [], [])).max() < 1e-6
    probabilities = engine_distribution((1, 0, 1, 0, 1, 0), [1.0, math.nan, 1.0, -math.inf], [], [])
    assert np.abs(probabilities - [0.5, 0, 0.5, 0]).max() < 1e-12


def engine_draws(knobs, seed, logits, n):
    """n ids that the engine draws from these logits."""
    knobs, logits, out = array(knobs, np.float32), array(logits, np.float32), array(np.zeros(n), np.int32)
    sampler_library().draw(knobs[1], seed, logits[1], len(logits[0]), n, out[1])
    return out[0]


def test_draws_follow_the_distribution():
    """100,000 draws with fixed seeds: every frequency within five standard deviations, and not suspiciously near."""
    logits = np.random.default_rng(4).normal(0, 1.5, 50).astype(np.float32)
    knobs, n = (0.9, 30, 0.95, 0, 1, 0), 50_000
    p = engine_distribution(knobs, logits, [], [])
    for seed in (0, 12345):
        counts = np.bincount(engine_draws(knobs, seed, logits, n), minlength=50)
        assert (counts[p == 0] == 0).all()
        z = (counts - n * p)[p > 0] / np.sqrt(n * p * (1 - p))[p > 0]
        assert np.abs(z).max() < 5 and 0.4 < (z ** 2).mean() < 2.5
    assert (engine_draws(knobs, 1, logits, 100) != engine_draws(knobs, 2, logits, 100)).any()


def test_temperature_zero_is_the_first_of_the_largest():
    assert engine_draws((0, 0, 1, 0, 1, 0), 1, [0.0, 3.0, 3.0, 1.0], 5).tolist() == [1] * 5


def test_penalties_in_generation():
    """Greedy, with penalties, token by token: the engine's text is what transformers' processors would choose."""
    model, ids = random_checkpoint("plain", "f32"), random_ids(10, TINY["vocab_size"])
    made = engine(model, "--ids", "-i", spaced(ids), "-t", 0, "-n", 40, "--repetition-penalty", 1.4,
                  "--presence-penalty", 0.6).split()
    made = [int(word) for word in made]
    logits = engine_logits(model, ids + made)
    for i, id in enumerate(made):
        at = len(ids) + i
        wanted = library_distribution((1, 0, 1, 0, 1.4, 0.6), logits[at - 1], ids, made[:i])
        assert wanted[id] == pytest.approx(wanted.max(), rel=1e-5), i
    assert made != [int(w) for w in engine(model, "--ids", "-i", spaced(ids), "-t", 0, "-n", 40).split()]


# ----------------------------------------------------------------------------------------------------------------
# 7 Damage: broken files and command lines
# ----------------------------------------------------------------------------------------------------------------

def complaint(command, status, names, timeout=10):
    """Run a command that must fail: what is wrong with the way it does, or None. It should leave with this status
    and one line on standard error that holds one of the names, and no sanitizer may speak."""
    try:
        result = run(*command, timeout=timeout)
    except subprocess.TimeoutExpired:
        return "hangs"
    message = result.stderr.decode("utf-8", "replace")
    if sanitized := re.search(r".*(Sanitizer|runtime error).*", message):
        return f"sanitizer: {sanitized[0]}"
    if result.returncode not in (status if isinstance(status, tuple) else (status,)):
        return f"status {result.returncode}, wanted {status}: {message!r}"
    if result.returncode == 0:
        return None
    if message.count("\n") != 1 or not message.endswith("\n"):
        return f"not one line: {message!r}"
    if not any(name in message for name in names):
        return f"names none of {names}: {message!r}"
    return None


@functools.cache
def victim(weights="q4"):
    """A whole small checkpoint with tokenizer and chat template: the one that gets damaged."""
    path, library = small_tokenizer()
    model = random_model(2, vocab_size=352, num_hidden_layers=2, layer_types=[LINEAR, FULL], num_experts=4,
                         num_experts_per_tok=2, mlp_only_layers=[])
    source = with_tokenizer(save(model, WORK / "hf" / f"victim {weights}"), library, TEMPLATES["thinking"])
    return export(source, WORK / f"victim-{weights}.bin", "--type", weights)


def patched(data, *changes):
    """data with struct-packed values put over it: changes are (offset, format, value)."""
    data = bytearray(data)
    for offset, form, value in changes:
        struct.pack_into("<" + form, data, offset, value)
    return bytes(data)


# Numbers that a reader had better not believe, by width.
HUGE = {"I": [0, 1, 3, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF],
        "Q": [0, 1, 63, 1 << 31, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 64, (1 << 64) - 1]}

# Directory keys without which, or with other values of which, a checkpoint cannot be run.
SHAPE_KEYS = ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "num_key_value_heads",
              "head_dim", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
              "linear_value_head_dim", "linear_conv_kernel_dim", "num_experts", "moe_intermediate_size",
              "shared_expert_intermediate_size")


def fnv1a(data):
    """64-bit FNV-1a, the hash in tokenizer.bin's header."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


def checkpoint_hash(data, tensors):
    """README, "Checkpoint format": of all up to the first tensor, and of the first 64 bytes of each."""
    begins = b"".join(data[t.offset:t.offset + min(64, t.size)].ljust(64, b"\0") for t in tensors)
    return fnv1a(data[64:min(t.offset for t in tensors)]) ^ fnv1a(begins)


def damaged_checkpoints(path, rng):
    """(what was done, bytes, whether it must be refused) for a few hundred damaged copies of a checkpoint."""
    whole = read_checkpoint(path)
    data, first = whole.data, 64
    tensors, metas = list(whole.tensors.values()), whole.meta_records

    def mend(changed):
        """With the hash made right, so that what lies behind it is reached."""
        return patched(changed, (32, "Q", checkpoint_hash(changed, tensors)))

    # cut short at every kind of place
    places = {0, 1, 4, 8, 12, 40, 63, 64, 65, len(data) - 1, len(data) - 64, len(data) // 2}
    for record, _, _, offset, size in rng.sample(list(metas.values()), 12):
        places |= {record, record + 20, record + META - 1, offset, offset + size - 1}
    for tensor in rng.sample(tensors, 12):
        places |= {tensor.record, tensor.record + 75, tensor.record + TENSOR - 1, tensor.offset, tensor.offset + 1,
                   tensor.offset + tensor.size - 1}
    for place in sorted(place for place in places if place < len(data)):
        yield f"cut at {place}", data[:place], True
    yield "longer than it says", data + bytes(64), True
    yield "wrong hash", patched(data, (32, "Q", 1)), True
    # header
    for offset, form, name in ((0, "I", "magic"), (8, "I", "version"), (12, "I", "n_meta"), (16, "I", "n_tensors"),
                               (24, "Q", "file_size")):
        for value in rng.sample(HUGE[form], 4):
            if struct.unpack_from("<" + form, data, offset)[0] != value:
                yield f"header {name} = {value}", patched(data, (offset, form, value)), True
    # metadata records and values
    for key, (record, kind, count, offset, size) in metas.items():
        form, name = rng.choice([("I", 40), ("I", 44), ("Q", 48), ("Q", 56)])
        value = rng.choice(HUGE[form])
        must = key in SHAPE_KEYS and value != struct.unpack_from("<" + form, data, record + name)[0]
        yield f"{key}: record field at {name} = {value}", mend(patched(data, (record + name, form, value))), must
        yield f"{key}: a name that moves the cursor", mend(patched(data, (record + 1, "B", 0x1B))), True
        if key in SHAPE_KEYS:
            yield f"{key}: another name", mend(patched(data, (record, "B", ord("X")))), True
            for value in (0, -1, whole.meta[key][0] + 1, 1 << 31, 1 << 62, -1 << 63):
                yield f"{key} = {value}", mend(patched(data, (offset, "q", value))), True
        elif kind == 0 and count:
            for value in (-1, 0, 1, 1 << 31, 1 << 40, -1 << 63):
                yield f"{key} = {value}", mend(patched(data, (offset, "q", value))), False
        elif kind == 1:
            for value in (math.nan, -1.0, math.inf, 0.0, 1e300):
                must = key in ("rms_norm_eps", "rope_theta") and (value != 0 or key == "rope_theta") and not 1 <= value <= 1e15
                yield f"{key} = {value}", mend(patched(data, (offset, "d", value))), must
    # tensor records
    for tensor in tensors:
        other = rng.choice([t for t in tensors if t.size >= 64 and t is not tensor])
        matrix = tensor.type != FLOAT
        must = {
            "another name": (0, "B", ord("X")), "type 9": (72, "I", 9),
            "other type": (72, "I", Q8 if not matrix else BF16 if tensor.type == F32 else F32), "type float": (72, "I", FLOAT if matrix else BF16),
            "rank 0": (76, "I", 0), "rank 5": (76, "I", 5), "rank huge": (76, "I", 1 << 31),
            "shape 0": (80, "Q", 0), "shape + 1": (80, "Q", tensor.shape[0] + 1), "shape huge": (80, "Q", 1 << 62),
            "shape overflows": (80, "Q", (1 << 58) + 1), "offset unaligned": (112, "Q", tensor.offset + 4),
            "offset huge": (112, "Q", (1 << 64) - 64), "offset at the end": (112, "Q", len(data)),
            "offset in the header": (112, "Q", 0), "over another tensor": (112, "Q", other.offset),
            "size + 64": (120, "Q", tensor.size + 64), "size 0": (120, "Q", 0), "size huge": (120, "Q", (1 << 64) - 1)}
        for what in rng.sample(sorted(must), 8):
            field, form, value = must[what]
            yield f"{tensor.name}: {what}", mend(patched(data, (tensor.record + field, form, value))), True
    twice = patched(data, *((tensors[1].record + i, "B", data[tensors[0].record + i]) for i in range(72)))
    yield "one name twice", twice, True
    # bytes flipped: in the directory anything may follow; in the payload only numbers change
    end = min(tensor.offset for tensor in tensors)
    for _ in range(200):
        place = rng.randrange(first, end)
        yield f"bit flipped at {place}", mend(patched(data, (place, "B", data[place] ^ 1 << rng.randrange(8)))), False
    for _ in range(60):
        place = rng.randrange(end, len(data) - 4096)
        yield f"noise at {place}", mend(data[:place] + rng.randbytes(4096) + data[place + 4096:]), False
    yield "payload of ones", mend(data[:end] + b"\xff" * (len(data) - end)), False
    yield "payload of zeros", mend(data[:end] + bytes(len(data) - end)), False


def damaged_tokenizers(path, rng):
    """(what was done, bytes, whether it must be refused). Changed contents get a right hash, so that what looks at
    them is reached."""
    whole = read_tokenizer(path)
    data = whole.data
    sections = whole.sections.values()
    for place in sorted({0, 1, 7, 8, 40, 63, 64, len(data) - 1, *(offset + size // 2 for offset, size in sections),
                         *(offset for offset, _ in sections)}):
        yield f"cut at {place}", data[:place], True
        if place >= 64:
            yield f"cut at {place}, size mended", patched(data[:place], (56, "Q", place)), True
    names = "version n_tokens n_merges n_added n_classes n_ccc n_decomp n_comp pattern flags"
    for offset, name in zip(range(8, 48, 4), names.split()):
        old, = struct.unpack_from("<I", data, offset)
        for value in {*rng.sample(HUGE["I"], 3), old + 1} - {old}:
            yield f"header {name} = {value}", patched(data, (offset, "I", value)), name not in ("flags", "pattern")
    yield "wrong hash", patched(data, (48, "Q", 1)), True
    yield "wrong file_size", patched(data, (56, "Q", len(data) + 64)), True
    yield "magic of a checkpoint", b"QWEN3NXT" + data[8:], True

    def mend(changed):
        return patched(changed, (48, "Q", fnv1a(changed[64:])))

    for name, (offset, size) in whole.sections.items():
        if name == "bytes":
            continue
        for _ in range(60):
            place = offset + rng.randrange(size // 4) * 4
            old, = struct.unpack_from("<I", data, place)
            value = rng.choice([0, old + 1, 0x10FFFF, 0x110000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
            yield f"{name} at {place} = {value}", mend(patched(data, (place, "I", value))), False
    offset, _ = whole.sections["offsets"]           # the first token far outside the bytes, the others in order
    yield "offsets begin outside", mend(patched(data, (offset, "I", 0xFFFFFFF0), (offset + 4, "I", 0xFFFFFFF1))), True
    offset, size = whole.sections["decomp"]       # a character that decomposes into itself, and a circle of two
    record = next(at for at in range(offset, offset + size, 12) if struct.unpack_from("<I", data, at)[0] == 0xE9)
    yield "decomposes into itself", mend(patched(data, (record + 4, "I", 0xE9))), False
    yield "decomposes in a circle", mend(patched(data, (record + 4, "I", 0xEA), (record + 16, "I", 0xE9))), False


def check_damage(files, command):
    """Every damaged file through the sanitizers, two at a time; command(path) is the command line."""
    def check(case):
        number, (what, data, must_fail) = case
        path = WORK / f"damaged-{number}.bin"
        path.write_bytes(data)
        problem = complaint(command(path), 1 if must_fail else (0, 1), [path.name, "tokenizer.bin: hash", "-c 64"])
        path.unlink()
        return problem and f"{what}: {problem}"

    problems = [problem for problem in parallel(check, enumerate(files)) if problem]
    assert not problems, f"{len(problems)} of {len(files)}:\n" + "\n".join(problems)


def test_damaged_checkpoints(report):
    tokenizer, _ = small_tokenizer()
    files = list(damaged_checkpoints(victim(), random.Random(1)))
    report(f"{len(files)} damaged checkpoints")
    assert len(files) >= 1000
    check_damage(files, lambda path: [DEBUG_ENGINE, path, "-m", "generate", "-i", "The owl", "-n", 3, "-s", 1,
                                      "-t", 1, "-z", tokenizer, "-c", 64, "-q"])


def test_damaged_tokenizers(report):
    files = list(damaged_tokenizers(small_tokenizer()[0], random.Random(2)))
    report(f"{len(files)} damaged tokenizers")
    assert len(files) >= 500
    model, text = token_model(), "The owl's 12 keys\u00e9\u0323 e\u0301 \ud55c\uae00 \u1112\u1161\u11ab <|im_end|>\n"
    check_damage(files, lambda path: [DEBUG_ENGINE, model, "-m", "tokenize", "-z", path, "-q", "-i", text])


def test_things_that_are_no_checkpoint():
    """A FIFO, a directory, nothing, an empty file, text, a tokenizer; and, as tokenizer, the same."""
    tokenizer, _ = small_tokenizer()
    folder = WORK / "no checkpoint"
    folder.mkdir()
    os.mkfifo(folder / "fifo")
    (folder / "directory").mkdir()
    (folder / "empty").touch()
    (folder / "text").write_text("not a checkpoint " * 100)
    (folder / "gguf").write_bytes(b"GGUF" + bytes(1000))
    (folder / "dangling").symlink_to(folder / "nowhere")
    shutil.copy(tokenizer, folder / "tokenizer")
    shutil.copy(victim(), folder / "model")
    names = ["fifo", "directory", "empty", "text", "gguf", "dangling", "missing", "/dev/null", "/dev/zero"]
    problems = {}
    for name in names + ["tokenizer"]:
        problems[name] = complaint([DEBUG_ENGINE, folder / name, "-i", "x", "-z", tokenizer], 1, [name])
    for name in names + ["model"]:
        problems["-z " + name] = complaint([DEBUG_ENGINE, victim(), "-i", "x", "-z", folder / name], 1, [name])
    assert not any(problems.values()), problems


def test_tokenizer_of_another_checkpoint_is_refused():
    """Both ways: one with more tokens than the model has rows, and one of the right size but another hash."""
    tokenizer, library = small_tokenizer()
    assert complaint([DEBUG_ENGINE, victim(), "-i", "x", "-z", TOKENIZER], 1, [TOKENIZER.name]) is None
    other = json.loads(library.to_str())
    other["model"]["merges"][-2:] = other["model"]["merges"][:-3:-1]
    (WORK / "other.json").write_text(json.dumps(other))
    export_tokenizer(WORK / "other.json", WORK / "other.bin")
    assert (WORK / "other.bin").stat().st_size == tokenizer.stat().st_size
    assert complaint([DEBUG_ENGINE, victim(), "-i", "x", "-z", WORK / "other.bin"], 1, ["other.bin"]) is None


USAGE, FAILED = 2, 1

# Command line after the model, the status, and what the message has to name.
BAD_COMMANDS = """
-x                                          2 -x
--frobnicate                                2 --frobnicate
--temperatur 1                              2 --temperatur
-m                                          2 -m
-m dance                                    2 dance
-m generate -i                              2 -i
-i x -f y                                   2 -f
extra -i x                                  2 extra
-i x -t                                     2 -t
-i x -t warm                                2 -t
-i x -t -1                                  2 -t
-i x -t nan                                 2 -t
-i x -t inf                                 2 -t
-i x -t 1e                                  2 -t
-i x -p 1.5                                 2 -p
-i x -p -0.1                                2 -p
-i x -p x                                   2 -p
-i x -k -1                                  2 -k
-i x -k 2.5                                 2 -k
-i x -k many                                2 -k
-i x --min-p 2                              2 --min-p
-i x --min-p x                              2 --min-p
-i x --presence-penalty x                   2 --presence-penalty
-i x --presence-penalty nan                 2 --presence-penalty
-i x --repetition-penalty 0                 2 --repetition-penalty
-i x --repetition-penalty -1                2 --repetition-penalty
-i x --repetition-penalty                   2 --repetition-penalty
-i x -s x                                   2 -s
-i x -s 1.5                                 2 -s
-i x -n -1                                  2 -n
-i x -n ten                                 2 -n
-i x -n 99999999999999999999                2 -n
-i x -c 0                                   2 -c
-i x -c -5                                  2 -c
-i x -c x                                   2 -c
-i x -j 0                                   2 -j
-i x -j -1                                  2 -j
-i x -j two                                 2 -j
-i x -j 99999999                            2 -j
-i x --batch 0                              2 --batch
-i x --batch x                              2 --batch
-i x --cpu pentium                          2 pentium
-i x --cpu                                  2 --cpu
-i x -d x                                   2 -d
-i x -d -1                                  2 -d
-i x --memory lots                          2 --memory
-i x --memory 0                             2 --memory
-i x --memory -1G                           2 --memory
-i x --memory nan                           2 --memory
-i x --memory 1T                            2 --memory
-i x --memory 1GB                           2 --memory
-i x --memory                               2 --memory
-m inspect --memory 1G                      2 --memory
-i x --memory 1                             1 --memory
-m logits --ids -i 1                        2 -o
-m logits --ids -i 1 -o                     2 -o
--ids -i 1,2                                12 1,2
--ids -i one                                12 one
--ids -i 352                                12 352
--ids -i -7                                 12 -7
--ids -i 99999999999999999999               12 99999999999999999999
-f /nowhere/at/all                          1 /nowhere/at/all
-f /                                        1 /
-z /nowhere/at/all -i x                     1 /nowhere/at/all
-m logits --ids -i 1 -o /nowhere/at/all     1 /nowhere/at/all
--dump /nowhere/at/all --ids -i 1           2 --dump
-m logits -o WORK/x --ids -i 1 --dump /nowhere/at/all   1 /nowhere/at/all
-m classify -i x                            1 classify
-m tag -i x                                 1 tag
-m answer -i x                              2 answer
-m answer -i x -f /nowhere/at/all           1 answer
-m trace -i x -o /nowhere/at/all            1 /nowhere/at/all
-m trace -i x --dump /nowhere/at/all        1 /nowhere/at/all
-m trace -i x -d 1                          2 -d
-m trace -i x -n 3                          2 -n
-m tag -i x -n 1                            2 -n
-m trace --ids -i 352                       1 352
-i x -d 9                                   2 -d
-i x --load /nowhere/at/all                 1 /nowhere/at/all
-i x --load /                               1 /
-i x --save /nowhere/at/all                 1 /nowhere/at/all
-m perplexity -i x --load x                 2 --load
-m logits -o WORK/x -i x --save x           2 --save
-m perplexity -i x -d 1                     2 -d
-i x -r 1                                   2 -r
-m chat -i x -r 2                           2 -r
-i x --yarn 0                               2 --yarn
-i x --yarn x                               2 --yarn
-i x --kv q4                                2 --kv
""".strip().splitlines()


@pytest.mark.parametrize("line", BAD_COMMANDS, ids=lambda line: line.split("  ")[0])
def test_bad_command_line(line):
    """One line, the status of a usage error, and the option's name."""
    command, expected = re.split(r"\s{2,}", line)
    statuses, name = expected.split()
    command = command.replace("WORK", str(WORK))
    tokenizer = [] if "-z" in command else ["-z", small_tokenizer()[0]]
    problem = complaint([DEBUG_ENGINE, victim(), *tokenizer, *command.split()], tuple(map(int, statuses)), [name])
    assert problem is None, problem


def test_bad_command_lines_without_a_model():
    for command in ([], ["-i", "x"], ["-m", "chat"], [""]):
        status = (FAILED, USAGE) if command == [""] else USAGE
        problem = complaint([DEBUG_ENGINE, *command], status, ["MODEL", "model", "qwen3next"])
        assert problem is None, (command, problem)


def test_text_that_does_not_fit():
    """A prompt beyond -c, one beyond the model's positions, an empty prompt where one is needed."""
    tokenizer, _ = small_tokenizer()
    logits = ["-m", "logits", "-o", WORK / "none.f32"]
    for command, names in (([*logits, "--ids", "-i", spaced([1] * 20), "-c", 16], ["-c", "context"]),
                           (["-i", "x " * 600, "-c", 512], ["-c", "context"]),
                           ([*logits, "--ids", "-i", ""], ["prompt", "-i", "token"]),
                           (["-m", "perplexity", "--ids", "-i", "5"], ["perplexity", "token"]),
                           (["-m", "perplexity", "--ids", "-i", ""], ["perplexity", "token", "prompt"])):
        problem = complaint([DEBUG_ENGINE, victim(), *command, "-z", tokenizer], (1, 2), names)
        assert problem is None, (command[:3], problem)


def test_closed_output_is_no_crash():
    """`qwen3next ... | head -c 1`: the program ends, by SIGPIPE or by itself, without a sanitizer's report."""
    process = subprocess.Popen([DEBUG_ENGINE, victim(), "--ids", "-i", "1 2", "-n", "400", "-c", "500"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait(60) in (0, 1, -signal.SIGPIPE) and b"Sanitizer" not in stderr


def test_logits_file_is_written_whole_or_not_at_all():
    """A full disk is said; what isn't a regular file is written to and not replaced; a failure leaves nothing."""
    folder = WORK / "outputs"
    folder.mkdir()
    (folder / "full").symlink_to("/dev/full")    # a link: a program that replaces its output would replace only that
    command = [DEBUG_ENGINE, victim(), "-m", "logits", "--ids", "-i", "1 2"]
    assert complaint([*command, "-o", folder / "full"], FAILED, ["full"]) is None
    assert (folder / "full").is_symlink()
    os.mkfifo(folder / "fifo")
    reader = subprocess.Popen(["timeout", "20", "cat", folder / "fifo"], stdout=subprocess.PIPE)
    assert run(*command, "-o", folder / "fifo").returncode == 0
    assert len(reader.communicate()[0]) == 2 * 352 * 4
    assert complaint([*command, "-o", folder / "half", "--dump", folder / "nowhere"], FAILED, ["nowhere"]) is None
    assert sorted(path.name for path in folder.iterdir()) == ["fifo", "full"]


# ----------------------------------------------------------------------------------------------------------------
# 8 Interface
# ----------------------------------------------------------------------------------------------------------------

def test_help_and_version():
    result = run(ENGINE, "-h")
    assert result.returncode == 0 and result.stderr == b""
    for option in ("-m", "-i", "-f", "--ids", "-o", "-t", "-p", "-k", "--min-p", "--presence-penalty",
                   "--repetition-penalty", "-s", "-n", "-c", "-y", "-z", "-j", "-d", "--load", "--save", "--echo",
                   "--memory", "--dump", "--cpu", "-q", "-v", "--version"):
        assert re.search(rf"(^|[\s,]){option}\b", result.stdout.decode(), re.M), option
    assert run(ENGINE, "--help").stdout == result.stdout
    version = run(ENGINE, "--version")
    assert version.returncode == 0 and re.search(rb"\d+\.\d+", version.stdout) and version.stdout.count(b"\n") == 1


def test_stdout_holds_only_the_result():
    """Statistics go to stderr; -q silences them; neither changes stdout."""
    model = random_checkpoint("plain", "f32")
    command = [ENGINE, model, "--ids", "-i", "5 6 7", "-n", 9, "-t", 0]
    loud, quiet = run(*command), run(*command, "-q")
    assert loud.stdout == quiet.stdout and len(loud.stdout.split()) == 9
    assert all(word.isdigit() for word in loud.stdout.split())
    assert re.search(rb"tok(en)?s?/s", loud.stderr) and quiet.stderr == b""


def test_prompt_from_argument_file_and_stdin():
    model = random_checkpoint("plain", "f32")
    file = WORK / "ids.txt"
    file.write_text("5\n6 7\n")
    options = ["--ids", "-n", 9, "-t", 0]
    wanted = engine(model, "-i", "5 6 7", *options)
    assert engine(model, "-f", file, *options) == wanted
    assert engine(model, "-i", "-", *options, stdin=b"5 6\n7") == wanted
    assert engine(model, "-m", "generate", "-i", "5 6 7", *options) == wanted


def test_long_names():
    model = random_checkpoint("plain", "f32")
    letters = ("-m", "-i", "-t", "-p", "-k", "-s", "-n", "-c", "-j")
    values = ("generate", "5 6", 0.9, 0.95, 50, 3, 20, 64, 2)
    short = engine(model, "--ids", *itertools.chain(*zip(letters, values)))
    names = dict(re.findall(r"(-[a-zA-Z])\b[^\n-]*?,? (--[a-z-]+)", run(ENGINE, "-h").stdout.decode()))
    for option in "mitpksncjyzofdqvh":
        assert "-" + option in names, f"-{option} has no long name in the help"
    long = [names[letter] for letter in letters]
    assert engine(model, "--ids", *itertools.chain(*zip(long, values))) == short


def test_echo():
    """--echo prints the prompt before its continuation, as text and as ids."""
    model = random_checkpoint("plain", "f32")
    plain = engine(model, "--ids", "-i", "5 6 7", "-n", 9, "-t", 0)
    echoed = engine(model, "--ids", "-i", "5 6 7", "-n", 9, "-t", 0, "--echo")
    assert echoed.split() == b"5 6 7".split() + plain.split()
    text = engine(chat_model("instruct"), "-i", "Say\n", "-t", 0, "-z", TOKENIZER, "--echo").decode()
    assert text.rstrip("\n") == "Say\n" + SCRIPT


def test_stop_ids_end_generation():
    """Without -n the scripted model goes on to its <|im_end|>, which is not printed but with -v."""
    output = engine(chat_model("instruct"), "-i", "Say\n", "-t", 0, "-z", TOKENIZER)
    assert output.decode().rstrip("\n") == SCRIPT
    output = engine(chat_model("instruct"), "-i", "Say\n", "-t", 0, "-z", TOKENIZER, "-v")
    assert output.decode().rstrip("\n") in (SCRIPT, SCRIPT + "<|im_end|>")


def test_special_tokens_in_a_prompt():
    """generate and tokenize read <|im_end|> as the token."""
    ids = engine(chat_model("instruct"), "-m", "tokenize", "--ids", "-i", "a<|im_end|>", "-z", TOKENIZER).split()
    assert [int(id) for id in ids] == real_tokenizer().encode("a<|im_end|>").ids and len(ids) == 2


def test_sampling_defaults_come_from_the_checkpoint():
    """generation_config says 0.7, 0.8, 20; options win over it; the seed is the only source of chance."""
    model, base = babbling_model(), ["--ids", "-i", "7 8 9", "-n", 40]
    default = engine(model, *base, "-s", 5)
    assert default == engine(model, *base, "-s", 5, "-t", 0.7, "-p", 0.8, "-k", 20)
    assert default != engine(model, *base, "-s", 6)
    assert default != engine(model, *base, "-s", 5, "-t", 1.5, "-p", 1, "-k", 0)
    assert engine(model, *base, "-s", 5, "-t", 0) == engine(model, *base, "-s", 6, "-t", 0)


def test_do_sample_false_means_greedy():
    tokenizer, library = small_tokenizer()
    source = save(random_model(8, vocab_size=352), WORK / "hf" / "greedy")
    model = export(with_tokenizer(source, library, do_sample=False), WORK / "greedy.bin", "--type", "f32")
    options = ["--ids", "-i", "1 2 3", "-n", 20, "-z", tokenizer]
    assert engine(model, *options, "-s", 1) == engine(model, *options, "-s", 2) == engine(model, *options, "-t", 0)


@pytest.mark.parametrize("cpu", CPUS)
def test_same_seed_same_text_for_any_number_of_threads(cpu):
    needs_cpu(cpu)
    for weights in ("f32", "q4"):
        model = random_checkpoint("wide", weights)
        options = ["--ids", "-i", "7 8 9", "-n", 80, "-t", 1, "-k", 0, "-p", 1, "-s", 11, "--cpu", cpu]
        texts = {engine(model, *options, "-j", threads) for threads in (1, 2, 3, 5)}
        assert len(texts) == 1 and len(texts.pop().split()) == 80


def test_padding_rows_are_never_sampled():
    """Ids that the tokenizer doesn't have get logits too; no temperature makes them come out."""
    tokenizer, library = small_tokenizer()
    size = len(read_tokenizer(tokenizer).tokens)
    source = save(random_model(6, vocab_size=512), WORK / "hf" / "padded")
    model = export(with_tokenizer(source, library), WORK / "padded.bin", "--type", "f32")
    options = ["-t", 5, "-k", 0, "-p", 1, "-s", 1, "-z", tokenizer, "-c", 500]
    made = engine(model, "--ids", "-i", "1 2 3", "-n", 400, *options)
    assert made.split() and max(map(int, made.split())) < size


def test_tokenizer_is_found_beside_the_model():
    folder = WORK / "beside"
    folder.mkdir()
    shutil.copy(victim(), folder / "model.bin")
    shutil.copy(small_tokenizer()[0], folder / "tokenizer.bin")
    ids = engine(folder / "model.bin", "-m", "tokenize", "--ids", "-i", "The owl").split()
    assert [int(id) for id in ids] == small_tokenizer()[1].encode("The owl").ids


def test_perplexity_equals_transformers():
    for kind, weights in (("plain", "f32"), ("tied", "bf16")):
        ids, reference = reference_logits(kind, weights == "bf16", 200)
        nll = -log_softmax(reference)[np.arange(len(ids) - 1), ids[1:]].mean()
        output = engine(random_checkpoint(kind, weights), "-m", "perplexity", "--ids", "-i", spaced(ids)).decode()
        lines = dict(line.split() for line in output.splitlines())
        assert list(lines) == ["tokens", "nll", "perplexity"]
        assert int(lines["tokens"]) in (len(ids), len(ids) - 1)
        assert abs(float(lines["nll"]) - nll) < 1e-3 * nll
        assert abs(float(lines["perplexity"]) / math.exp(nll) - 1) < 1e-2


def test_perplexity_of_text():
    """A text file longer than one batch, through the tokenizer, equals the ids'."""
    file = WORK / "perplexity.txt"
    file.write_text(STORY)
    ids = small_tokenizer()[1].encode(STORY, add_special_tokens=False).ids
    options = ["-m", "perplexity", "-z", small_tokenizer()[0]]
    assert engine(victim(), *options, "-f", file) == engine(victim(), *options, "--ids", "-i", spaced(ids))


def test_inspect_lists_everything():
    path = random_checkpoint("plain", "q4")
    checkpoint, output = read_checkpoint(path), engine(path, "-m", "inspect").decode()
    for tensor in checkpoint.tensors.values():
        line = next(line for line in output.splitlines() if re.search(rf"(^|\s){re.escape(tensor.name)}(\s|$)", line))
        assert str(tensor.offset) in line and ("float", "f32", "bf16", "q8", "q4", "q6")[tensor.type] in line
        assert all(str(n) in line for n in tensor.shape), line
    for key in SHAPE_KEYS:
        assert re.search(rf"{key}\W+{checkpoint.scalar(key)}\b", output), key
    assert str(len(checkpoint.data)) in re.sub(r"(?<=\d),(?=\d)", "", output)


def test_bench_prints_its_lines():
    lines = engine(random_checkpoint("real vocabulary", "q8"), "-m", "bench", "-c", 2048, "-q").decode().splitlines()
    found = {}
    for line in lines:
        name, value, unit = line.split()
        found[name] = float(value), unit
    for name, unit in (("prefill_512", "tok/s"), ("decode_128", "tok/s"), ("read_bandwidth", "GB/s"),
                       ("decode_bytes", "GB/token"), ("decode_of_bandwidth", "%"), ("peak_memory", "MB")):
        assert found[name][1] == unit and found[name][0] >= 0, name


def test_dump_writes_arrays():
    """--dump DIR: named arrays that numpy reads; the first layer's input projection is the one transformers makes."""
    folder = WORK / "dump"
    folder.mkdir()
    ids = random_ids(9, 300)
    engine_logits(random_checkpoint("plain", "f32"), ids, "--dump", folder)
    arrays = {path.stem: np.load(path) for path in folder.glob("*.npy")}
    assert len(arrays) > 8 and all(np.isfinite(array).all() for array in arrays.values())
    assert any(name.startswith("layers.3.") for name in arrays)


def test_context_limit_ends_generation():
    """-c 32 with 10 tokens of prompt: at most 22 more, said on stderr, status 0."""
    result = run(ENGINE, random_checkpoint("plain", "f32"), "--ids", "-i", spaced([5] * 10), "-t", 0, "-c", 32)
    assert result.returncode == 0 and len(result.stdout.split()) in (22, 23), result
    assert b"context" in result.stderr


# ----------------------------------------------------------------------------------------------------------------
# 9 Export
# ----------------------------------------------------------------------------------------------------------------

def export_fails(source, output, *options):
    """Run export.py, expect a refusal: status 1, one line on stderr, no file under any name. Returns the line."""
    before = set(output.parent.iterdir())
    result = run(*EXPORT, source, "-o", output, *options)
    message = result.stderr.decode()
    assert result.returncode == 1, message
    lines = [line for line in re.split(r"[\r\n]+", message) if line and "%|" not in line]
    assert len(lines) == 1 and "Traceback" not in message, message
    assert set(output.parent.iterdir()) == before
    return lines[0]


@pytest.mark.parametrize("weights", TYPES)
@pytest.mark.parametrize("kind", ["plain", "attention_bias", "tied"])
def test_layouts_export_to_the_same_bytes(kind, weights):
    """Experts packed or one tensor each, one file or shards, old spelling or new: one checkpoint."""
    changes = {key: value for key, value in KINDS[kind].items()}
    model = rounded_to_bf16(random_model(4, **changes))
    outputs = []
    for layout in (save, save_packed, save_like_the_hub):
        if kind == "attention_bias" and layout is save_like_the_hub:
            continue                             # the released files have no such key
        source = layout(model, WORK / "hf" / f"{kind} {weights} {layout.__name__}", torch.bfloat16)
        output = export(source, WORK / f"{kind}-{weights}-{layout.__name__}.bin", "--type", weights, "--check")
        outputs.append(output.read_bytes())
    assert all(output == outputs[0] for output in outputs)


def test_mtp_head_comes_along_and_changes_nothing():
    """mtp.* inside the checkpoint or from a file of its own: stored, announced, and without effect on the logits."""
    model, plain = kind_model("plain"), random_checkpoint("plain", "f32")
    inside = save_packed(model, WORK / "hf" / "mtp inside")
    save_file({**model.state_dict(), **mtp_tensors(model)}, inside / "model.safetensors", {"format": "pt"})
    save_file(mtp_tensors(model), WORK / "mtp.safetensors", {"format": "pt"})
    without = save_packed(model, WORK / "hf" / "mtp beside")
    a = export(inside, WORK / "mtp-inside.bin", "--type", "f32", "--check")
    b = export(without, WORK / "mtp-beside.bin", "--type", "f32", "--mtp", WORK / "mtp.safetensors")
    assert a.read_bytes() == b.read_bytes()
    stored = read_checkpoint(a)
    assert stored.scalar("has_mtp") == 1
    assert {"mtp.fc", "mtp.norm", "mtp.layers.0.mlp.experts.down_proj"} <= stored.tensors.keys()
    assert read_checkpoint(plain).scalar("has_mtp") == 0
    assert np.array_equal(stored.matrix("mtp.fc"), mtp_tensors(model)["mtp.fc.weight"].numpy())
    ids = random_ids(40, 300)
    assert logits_bits(a, ids) == logits_bits(plain, ids)


@pytest.mark.parametrize("weights", TYPES)
def test_41_shards_export_to_the_bytes_of_one_file(weights):
    """The released files' layout, layers and experts torn apart between shards: nothing of it shows in the result."""
    model = rounded_to_bf16(random_model(5))
    mtp = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in mtp_tensors(model).items()}
    one, many = (WORK / "hf" / f"{weights} {name}" for name in ("of one", "of 41"))
    save_packed(model, one, torch.bfloat16)
    save_file({**load_file(one / "model.safetensors"), **mtp}, one / "model.safetensors", {"format": "pt"})
    many.mkdir()
    write_config(model, many, torch.bfloat16)
    files = write_shards([*divided(per_expert(model, torch.bfloat16), 40), mtp], many, write_weights)
    assert files[40].name == "model-00041-of-00041.safetensors"
    a = export(one, WORK / f"of-one-{weights}.bin", "--type", weights)
    b = export(many, WORK / f"of-41-{weights}.bin", "--type", weights, "--check")
    assert a.read_bytes() == b.read_bytes()


def write_sparse(tensors, path):
    """A safetensors file of the tensors' shapes in BF16: the header, then a hole."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    raw = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(file.tell() + at)


# Runs a command, then prints the KB of memory it took at most. In between since a child begins with its parent's size.
PEAK = """import resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs sparse files, and ru_maxrss in KB")
def test_full_size_is_planned_and_what_headers_tell_is_told_at_once(report):
    """The released model's 75,944 tensors in 41 shards of 163 GB, all of it holes: what is wrong with one of them is
    told within seconds, in little memory, before anything is written."""
    folder = WORK / "hf" / "full size"
    folder.mkdir(parents=True)
    with torch.device("meta"):
        model = Qwen3NextForCausalLM(Qwen3NextConfig())          # whose defaults are the released model's sizes
        head = MtpModule(model.config)
        head.config = model.config
    mtp = {f"mtp.{name}": tensor for name, tensor in per_expert(head, torch.bfloat16).items()}
    shards = [*divided(per_expert(model, torch.bfloat16), 40), mtp]
    assert sum(map(len, shards)) == 75_944 and sum(t.numel() for s in shards for t in s.values()) == 81_324_862_720
    files = write_shards(shards, folder, write_sparse)
    write_config(model, folder, torch.bfloat16)
    last = "mtp.layers.0.mlp.shared_expert_gate.weight"          # the plan comes to it when all else is in place
    cut, wrong = files[36], files[40]

    def refusal():
        """(standard error, seconds, MB) of an export that has to fail before it writes."""
        start = time.time()
        result = run(sys.executable, "-c", PEAK, *EXPORT, folder, "-o", WORK / "full.bin", "--type", "q4", timeout=60)
        message, megabytes = result.stderr.decode(), int(result.stdout) / 1024
        report(f"{message.strip()[-100:]}: {time.time() - start:.1f} s, {megabytes:.0f} MB")
        assert result.returncode == 1 and message.count("\n") == 1 and "%|" not in message, message
        assert not list(WORK.glob("*full.bin*")) and time.time() - start < 20 and megabytes < 600
        return message

    write_sparse({**mtp, last: torch.empty(2, 2048, dtype=torch.bfloat16, device="meta")}, wrong)
    message = refusal()
    assert last in message and wrong.name in message and "[1, 2048]" in message and "[2, 2048]" in message
    write_sparse(mtp, wrong)
    os.truncate(cut, cut.stat().st_size - 1)
    message = refusal()
    assert cut.name in message and "cut short" in message


@pytest.mark.parametrize("weights", TYPES)
def test_random_checkpoint_runs_and_is_its_seed_s(weights):
    """--random: the same bytes for the same seed, others for another; the engine runs it and learns nothing odd."""
    config = WORK / "random.json"
    config.write_text(json.dumps(dict(TINY, model_type="qwen3_next")))
    paths = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        path = WORK / f"random-{weights}-{name}.bin"
        result = run(*EXPORT, "--random", config, "--seed", seed, "-o", path, "--type", weights)
        assert result.returncode == 0, result.stderr.decode()
        paths.append(path)
    a, b, c = (path.read_bytes() for path in paths)
    assert a == b and a != c
    logits = engine_logits(paths[0], random_ids(50, TINY["vocab_size"]))
    assert np.isfinite(logits).all() and logits.std() > 1e-3 and len(set(logits.argmax(-1))) > 5


def broken_sources():
    """(what is wrong, a function that breaks a directory of save_packed, words that the message has to hold)."""
    def edit_config(**changes):
        def change(folder):
            config = json.loads((folder / "config.json").read_text())
            config.update(changes)
            (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "remove"}))
        return change

    def edit_tensor(name, edit):
        def change(folder):
            path = folder / "model.safetensors"
            tensors = load_file(path)
            value = edit(tensors.pop(name))
            if value is not None:
                tensors[name] = value.contiguous()
            save_file(tensors, path, {"format": "pt"})
        return change

    def with_nan(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[3] = math.nan
        return tensor

    def edit_rope(**changes):
        return edit_config(rope_parameters={**TINY["rope_parameters"], **changes})

    def monstrous(folder):
        with open(folder / "model.safetensors", "r+b") as file:
            file.write(struct.pack("<Q", 1 << 30))
            file.truncate(1 << 31)

    def lost_shard(folder):
        (folder / "model.safetensors").unlink()
        index = {"weight_map": {"model.norm.weight": "gone.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def sharded(edit):
        """Three shards and an index instead of the one file, changed by edit(folder, shards, weight_map)."""
        def change(folder):
            tensors = load_file(folder / "model.safetensors")
            (folder / "model.safetensors").unlink()
            shards = write_shards(divided(tensors, 3), folder, write_weights)
            index = folder / "model.safetensors.index.json"
            weight_map = json.loads(index.read_text())["weight_map"]
            edit(folder, shards, weight_map)
            index.write_text(json.dumps({"weight_map": weight_map}))
        return change

    def cut_shard(folder, shards, weight_map):
        os.truncate(shards[-1], shards[-1].stat().st_size - 1)

    def name_absent(folder, shards, weight_map):
        weight_map["model.layers.0.absent.weight"] = shards[1].name

    def name_elsewhere(folder, shards, weight_map):
        assert weight_map["model.embed_tokens.weight"] != shards[-1].name
        weight_map["model.embed_tokens.weight"] = shards[-1].name

    def hold_twice(folder, shards, weight_map):
        tensors = load_file(shards[-1])
        save_file({**tensors, "model.norm.weight": torch.zeros(64)}, shards[-1], {"format": "pt"})
        save_file({**load_file(shards[0]), "model.norm.weight": torch.zeros(64)}, shards[0], {"format": "pt"})

    q_proj, down = "model.layers.3.self_attn.q_proj.weight", "model.layers.1.mlp.experts.down_proj"
    out_proj, weights = "model.layers.0.linear_attn.out_proj.weight", "model.safetensors"
    other_types = [LINEAR, LINEAR, LINEAR, "sliding_attention"]
    return [
        ("missing tensor", edit_tensor(q_proj, lambda t: None), [q_proj]),
        ("missing experts", edit_tensor(down, lambda t: None), ["model.layers.1.mlp.experts"]),
        ("wrong shape", edit_tensor(q_proj, lambda t: t[:-1]), [q_proj]),
        ("wrong rank", edit_tensor("model.norm.weight", lambda t: t[None]), ["model.norm.weight"]),
        ("NaN", edit_tensor(out_proj, with_nan), [out_proj]),
        ("NaN in experts", edit_tensor(down, with_nan), ["model.layers.1.mlp.experts"]),
        ("integers", edit_tensor("model.norm.weight", lambda t: t.to(torch.int32)), ["model.norm.weight", "I32"]),
        ("another model_type", edit_config(model_type="llama"), ["llama"]),
        ("no model_type", edit_config(model_type="remove"), ["model_type"]),
        ("missing key", edit_config(hidden_size="remove"), ["2048"]),     # the class's default, as in transformers
        ("a string for a number", edit_config(hidden_size="64"), ["hidden_size"]),
        ("negative", edit_config(num_experts=-1), ["num_experts"]),
        ("more experts a token than there are", edit_config(num_experts_per_tok=17), ["num_experts_per_tok"]),
        ("heads that don't divide", edit_config(linear_num_value_heads=5), ["linear_num_value_heads"]),
        ("layer_types of another length", edit_config(layer_types=[LINEAR]), ["layer_types"]),
        ("unknown layer type", edit_config(layer_types=other_types), ["sliding_attention"]),
        ("unknown activation", edit_config(hidden_act="gelu"), ["gelu"]),
        ("unknown rope", edit_rope(rope_type="longrope"), ["longrope"]),
        ("config cut", lambda folder: (folder / "config.json").write_text('{"model_type": '), ["config.json"]),
        ("config missing", lambda folder: (folder / "config.json").unlink(), ["config.json"]),
        ("weights missing", lambda folder: (folder / weights).unlink(), ["safetensors"]),
        ("weights cut", lambda folder: os.truncate(folder / weights, 100_000), [weights]),
        ("weights empty", lambda folder: os.truncate(folder / weights, 0), [weights]),
        ("weights are text", lambda folder: (folder / weights).write_text("hello" * 100), [weights]),
        ("index names a missing shard", lost_shard, ["gone.safetensors"]),
        ("last shard cut", sharded(cut_shard), ["cut short", "model-00003-of-00003"]),
        ("index names what its shard lacks", sharded(name_absent), ["layers.0.absent.weight", "model-00002-of-00003"]),
        ("index names the wrong shard", sharded(name_elsewhere), ["model.embed_tokens.weight", "model-00003-of-00003"]),
        ("tensor in two shards", sharded(hold_twice), ["model.norm.weight", "model-00003-of-00003"]),
        ("header of a monstrous length", monstrous, [weights, "header"]),
        ("tokenizer larger than the vocabulary", lambda folder: with_tokenizer(folder, real_tokenizer()), ["tokenizer"]),
    ]


@pytest.mark.parametrize("what, breakage, words", broken_sources(), ids=[case[0] for case in broken_sources()])
def test_export_refuses(what, breakage, words):
    """One line that names what is wrong, status 1, and no file left, half or whole."""
    source = save_packed(kind_model("plain"), WORK / "hf" / f"broken {what}")
    breakage(source)
    folder = WORK / f"refused {what}"
    folder.mkdir()
    message = export_fails(source, folder / "model.bin", "--type", "q8")
    assert all(word in message for word in words), message


def test_limit_on_the_size_of_files_is_told_at_once():
    """As by a limit of the shell or a file system whose files end at 4 GB: one line, and no work before it."""
    source = save_packed(kind_model("plain"), WORK / "hf" / "limited")
    (WORK / "limited").mkdir()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    result = run(*EXPORT, source, "-o", WORK / "limited" / "model.bin", preexec_fn=limit)
    message = result.stderr.decode()
    assert result.returncode == 1 and "cannot be written" in message and "Traceback" not in message, message
    assert " 0%|" in message and not re.search(r"[1-9][0-9]*%[|]", message) and not list((WORK / "limited").iterdir())


def test_export_refuses_before_the_work():
    """No such source, no such folder to write to; usage errors have status 2."""
    source = WORK / "hf" / "before"
    save_packed(kind_model("plain"), source)
    assert "nowhere" in export_fails(WORK / "nowhere", WORK / "nothing.bin")
    result = run(*EXPORT, source, "-o", "/nowhere/at/all/model.bin")
    assert result.returncode in (1, 2) and b"/nowhere/at/all" in result.stderr and b"Traceback" not in result.stderr
    for options in ([source, "-o", WORK / "x.bin", "--type", "q3"], [source], ["-o", WORK / "x.bin"], []):
        result = run(*EXPORT, *options)
        assert result.returncode == 2 and b"Traceback" not in result.stderr, options
    assert not (WORK / "x.bin").exists()


def test_interrupted_export_leaves_nothing(tmp_path):
    """Killed while it writes, the old file under the final name is still whole."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(dict(TINY, model_type="qwen3_next", vocab_size=200_000, hidden_size=512)))
    (tmp_path / "model.bin").write_bytes(b"old")
    process = subprocess.Popen([*EXPORT, "--random", config, "--seed", "1", "-o",
                                tmp_path / "model.bin", "--type", "f32"], stderr=subprocess.PIPE)
    process.stderr.read(1)                       # its first sign of work
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert (tmp_path / "model.bin").read_bytes() == b"old" or process.returncode == 0
    if process.returncode:
        assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.bin"}


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.fixed_dictionaries(dict(
    hidden_size=st.sampled_from([32, 48, 72]), head_dim=st.sampled_from([8, 16, 40]),
    num_attention_heads=st.sampled_from([2, 4]), num_key_value_heads=st.sampled_from([1, 2]),
    linear_num_key_heads=st.sampled_from([1, 2, 3]), ratio=st.integers(1, 4),
    linear_key_head_dim=st.sampled_from([4, 16, 24]), linear_value_head_dim=st.sampled_from([8, 16, 40]),
    linear_conv_kernel_dim=st.integers(2, 5), num_experts=st.integers(2, 20),
    moe_intermediate_size=st.sampled_from([8, 24, 32]), shared_expert_intermediate_size=st.sampled_from([8, 40]),
    num_hidden_layers=st.integers(1, 5), norm_topk_prob=st.booleans(), attention_bias=st.booleans(),
    tie_word_embeddings=st.booleans(), decoder_sparse_step=st.integers(1, 3),
    partial=st.sampled_from([0.25, 0.5, 1.0]), seed=st.integers(0, 99))))
def test_any_configuration_equals_transformers(config):
    """Configurations that hypothesis draws, from checkpoint directory to logits."""
    config = dict(config)
    config["linear_num_value_heads"] = config["linear_num_key_heads"] * config.pop("ratio")
    config["num_experts_per_tok"] = max(1, config["num_experts"] // 3)
    config.update(rope(partial=config.pop("partial")))
    seed = config.pop("seed")
    folder = Path(tempfile.mkdtemp(dir=WORK))
    model = random_model(seed, **config)
    ids = random_ids(40, model.config.vocab_size)
    if router_margin(model, ids) < 1e-4:
        return
    reference = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    binary = export(save(model, folder / "hf"), folder / "model.bin", "--type", "f32", "--check")
    assert logits_error(engine_logits(binary, ids), reference) < TOLERANCE, config


# ----------------------------------------------------------------------------------------------------------------
# 9a Export: checkpoints from strangers
# ----------------------------------------------------------------------------------------------------------------

MODEL, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
TOKENS, GENERATION, TEMPLATE = "tokenizer.json", "generation_config.json", "tokenizer_config.json"
SECONDS, MEGABYTES = 10, 1500                  # what an export of a tiny checkpoint may take at most


@functools.cache
def exporter():
    """export.py as a module: a run of it in this process takes a fiftieth of the time of a new one."""
    spec = importlib.util.spec_from_file_location("exporter", ROOT / "export.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.keep_freed_memory = lambda: None
    return module


@functools.cache
def tiny_source():
    """{file: bytes} of a small valid checkpoint: one file of weights, tokenizer.json, generation_config.json."""
    model = random_model(5, vocab_size=352, hidden_size=16, num_hidden_layers=2, layer_types=[LINEAR, FULL],
                         num_experts=4, num_experts_per_tok=2, head_dim=8, linear_key_head_dim=4,
                         linear_value_head_dim=4, moe_intermediate_size=8, shared_expert_intermediate_size=8,
                         intermediate_size=16)
    folder = with_tokenizer(save_packed(model, WORK / "hf" / "tiny source"), small_tokenizer()[1])
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stranger(edit=None, files=None):
    """A folder that holds the tiny checkpoint in `hf` and room for the output in `out`, changed by edit(hf)."""
    folder = Path(tempfile.mkdtemp(dir=WORK))
    (folder / "hf").mkdir()
    (folder / "out").mkdir()
    for name, data in {**tiny_source(), **(files or {})}.items():
        (folder / "hf" / name).write_bytes(data)
    if edit:
        edit(folder / "hf")
    return folder


@contextlib.contextmanager
def bounded():
    """Less than SECONDS and MEGABYTES beyond what the process has, or an error that is not export.py's."""
    def late(*_):
        raise KeyboardInterrupt(f"more than {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform.startswith("linux") else 0
    old, limits = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (MEGABYTES << 20), limits[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, old)


def outcome(folder, *options, source="hf"):
    """The message of a refusal, or "" after success and the warnings. Either the file is there and the engine takes
    it, or there is one line and nothing else: no traceback, nothing half written, no second line."""
    output, said, term = folder / "out" / "model.bin", io.StringIO(), signal.getsignal(signal.SIGTERM)
    words = options if "-o" in options else [folder / source, "-o", output, *options]
    with bounded(), contextlib.redirect_stderr(said), warnings.catch_warnings():
        warnings.simplefilter("always", RuntimeWarning)
        warnings.showwarning = lambda message, *_: print("a warning of Python's:", message, file=said)
        status = exporter().main([str(word) for word in words])
    signal.signal(signal.SIGTERM, term)
    lines = [line for line in re.split(r"[\r\n]+", said.getvalue()) if line.strip() and "B/s]" not in line]
    left = sorted(path.name for path in (folder / "out").iterdir() if not path.name.startswith("kept"))
    if status == 0:
        assert output.name in left and set(left) <= {"model.bin", "tokenizer.bin"}, (left, lines)
        tokenizer = ["-z", folder / "out" / "tokenizer.bin"] if "tokenizer.bin" in left else []
        assert (problem := complaint([ENGINE, output, "-m", "inspect", *tokenizer], 0, [])) is None, problem
        assert not any("warning of Python's" in line for line in lines), lines
        return "".join(line for line in lines if "warning" in line)
    assert (status, left) == (1, []) and len(lines) == 1, (status, left, lines)
    assert lines[0].startswith("export.py: ") and lines[0].isprintable() and len(lines[0]) < 2000, lines
    assert not re.search("memory|interrupted|internal", lines[0]), lines
    return lines[0]


def edit_json(file, *path, **changes):
    """Sets keys of the object at `path` in a JSON file."""
    def change(hf):
        whole = value = json.loads((hf / file).read_text())
        for key in path:
            value = value[key]
        value.update(changes)
        (hf / file).write_text(json.dumps(whole))
    return change


def edit_text(file, text):
    return lambda hf: (hf / file).write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))


def edit_header(edit):
    """Changes the header of the weights: edit(dict) changes it in place, or returns what to write instead."""
    def change(hf):
        data = (hf / MODEL).read_bytes()
        base = 8 + struct.unpack_from("<Q", data)[0]
        header = json.loads(data[8:base])
        new = edit(header)
        raw = json.dumps(header if new is None else new) if not isinstance(new, (bytes, str)) else new
        raw = raw if isinstance(raw, bytes) else raw.encode()
        (hf / MODEL).write_bytes(struct.pack("<Q", len(raw)) + raw + data[base:])
    return change


def edit_entry(name="model.norm.weight", **changes):
    return edit_header(lambda header: header[name].update(changes))


def edit_shards(edit):
    """Two shards and an index instead of the one file; edit(hf, weight_map) changes the index before it is written."""
    def change(hf):
        tensors = load_file(hf / MODEL)
        (hf / MODEL).unlink()
        write_shards(divided(tensors, 2), hf, write_weights)
        index = json.loads((hf / INDEX).read_text())
        new = edit(hf, index["weight_map"])
        (hf / INDEX).write_text(json.dumps(index if new is None else new))
    return change


def edit_weight(name, edit):
    def change(hf):
        tensors = load_file(hf / MODEL)
        edit(tensors) if name is None else tensors.update({name: edit(tensors[name])})
        save_file(tensors, hf / MODEL, {"format": "pt"})
    return change


def replaced(file, make):
    """make(path) in the place of a file."""
    def change(hf):
        (hf / file).unlink(missing_ok=True)
        make(hf / file)
    return change


def with_value(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


def elsewhere(file):
    """A link to a good file, but one outside the checkpoint's folder."""
    def change(hf):
        shutil.move(hf / file, hf.parent / file)
        (hf / file).symlink_to(hf.parent / file)
    return change


def outside(spell):
    """The index names a shard that is there, by a path that leads out of the folder."""
    def edit(hf, weight_map):
        first = "model-00001-of-00002.safetensors"
        shutil.move(hf / first, hf.parent / first)
        weight_map.update({name: spell(hf.parent / first) for name, file in weight_map.items() if file == first})
    return edit_shards(edit)


def edit_tokens(edit):
    """edit(tokenizer.json as a dict)"""
    def change(hf):
        j = json.loads((hf / TOKENS).read_text())
        new = edit(j)
        (hf / TOKENS).write_text(json.dumps(j if new is None else new))
    return change


def grow_file(file, size):
    return lambda hf: os.truncate(hf / file, size)


DEEP = "[" * 100_000
LAST = "model.norm.weight"                         # a vector, float32 [16]: 64 bytes
# what is wrong, how to make it so, words that the message must hold
STRANGERS = [
    # config.json
    ("config nested deeply", edit_text(CONFIG, DEEP), [CONFIG]),
    ("config of one key twice", edit_text(CONFIG, '{"model_type": "qwen3_next", "model_type": "qwen3_next"}'), [CONFIG, "model_type"]),
    ("config a list", edit_text(CONFIG, "[]"), [CONFIG]),
    ("config in latin-1", edit_text(CONFIG, b'{"model_type": "\xe9"}'), [CONFIG]),
    ("config of 100 GB", grow_file(CONFIG, 100 << 30), [CONFIG]),
    ("config a FIFO", replaced(CONFIG, os.mkfifo), [CONFIG]),
    ("config a directory", replaced(CONFIG, os.mkdir), [CONFIG]),
    ("config a device", replaced(CONFIG, lambda path: path.symlink_to("/dev/zero")), [CONFIG]),
    ("config a link in a circle", replaced(CONFIG, lambda path: path.symlink_to(path)), [CONFIG]),
    ("config outside", elsewhere(CONFIG), [CONFIG]),
    ("line feed in a value", edit_json(CONFIG, model_type="a\nb\r\x1b[31m\u2028"), [CONFIG, "model_type"]),
    ("a long value", edit_json(CONFIG, model_type="a" * 1_000_000), [CONFIG, "model_type"]),
    ("layers without end", edit_json(CONFIG, num_hidden_layers=(1 << 31) - 1, layer_types=None), [CONFIG, "num_hidden_layers"]),
    ("many layers of many experts", edit_json(CONFIG, num_hidden_layers=4096, layer_types=None, num_experts=65536), ["num_experts"]),
    ("more layers than there are", edit_json(CONFIG, num_hidden_layers=4096, layer_types=None), ["model.layers.1.linear_attn"]),
    ("no head of its own, and not tied", edit_weight(None, lambda t: t.pop("lm_head.weight")), ["lm_head.weight"]),
    *[(f"{key} {value!r}", edit_json(CONFIG, **{key: value}), [CONFIG, key]) for key, value in [
        ("norm_topk_prob", "yes"), ("norm_topk_prob", 5), ("norm_topk_prob", [1]), ("attention_bias", "false"), ("tie_word_embeddings", "no"),
        ("tie_word_embeddings", {}), ("rms_norm_eps", math.nan), ("rms_norm_eps", -1), ("rms_norm_eps", True), ("rms_norm_eps", 1e999),
        ("rms_norm_eps", 10**400), ("partial_rotary_factor", math.nan), ("partial_rotary_factor", 1e300), ("hidden_size", 1 << 20),
        ("hidden_size", 16.0), ("hidden_size", True), ("linear_conv_kernel_dim", 65), ("max_position_embeddings", 1 << 30),
        ("eos_token_id", [[1]]), ("eos_token_id", {"a": 1}), ("eos_token_id", "2"), ("eos_token_id", True), ("eos_token_id", -1),
        ("eos_token_id", 352), ("eos_token_id", list(range(17))), ("mlp_only_layers", "abc"), ("mlp_only_layers", {"0": 1}),
        ("mlp_only_layers", [[0]]), ("layer_types", {"a": 1, "b": 2}), ("layer_types", [["x"], {}]), ("layer_types", "ab"),
        ("architectures", 7), ("architectures", [["x"]]), ("rope_scaling", [1]), ("rope_scaling", "yarn")]],
    *[(f"rope {changes}", edit_json(CONFIG, "rope_parameters", **changes), [CONFIG, "rope"]) for changes in [
        dict(rope_theta=math.inf), dict(rope_theta=math.nan), dict(rope_theta=-1.0), dict(rope_theta="10000"), dict(rope_theta=[1]),
        dict(partial_rotary_factor=math.inf), dict(rope_type=["yarn"]), dict(rope_type="linear", factor=math.nan),
        dict(rope_type="linear", factor="4"), dict(rope_type="yarn", factor=-4.0), dict(rope_type="yarn", factor=1e308),
        dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=math.inf),
        dict(rope_type="yarn", factor=None, original_max_position_embeddings=1e-320),
        dict(rope_type="yarn", factor=4.0, attention_factor=math.nan), dict(rope_type="yarn", factor=4.0, beta_fast="x"),
        dict(rope_type="yarn", factor=4.0, mscale=1.0, mscale_all_dim=-7.213475204444817), dict(rope_type="yarn", factor=4.0, truncate="no")]],
    # weights: the header
    ("header nested deeply", edit_header(lambda h: DEEP), [MODEL]),
    ("header a list", edit_header(lambda h: []), [MODEL]),
    ("header in UTF-16", edit_header(lambda h: json.dumps(h).encode("utf-16")), [MODEL]),
    ("header names a tensor twice", edit_header(lambda h: json.dumps(h)[:-1] + f', "{LAST}": {json.dumps(h[LAST])}}}'), [MODEL, LAST]),
    ("length one more", lambda hf: (hf / MODEL).write_bytes(patched((hf / MODEL).read_bytes(), (0, "B", (hf / MODEL).read_bytes()[0] + 1))), [MODEL]),
    *[(f"header {changes}", edit_entry(LAST, **changes), [MODEL, LAST]) for changes in [
        dict(data_offsets=[-64, 0]), dict(data_offsets=[0.0, 64.0]), dict(data_offsets=[0, 1 << 70]),
        dict(data_offsets=[0, 1e300]), dict(data_offsets=[64, 0]), dict(data_offsets=[True, 64]), dict(data_offsets=["0", "64"]),
        dict(data_offsets=[0]), dict(data_offsets=None), dict(data_offsets={}), dict(data_offsets=[0, 10**4000]), dict(data_offsets=[math.nan, 64]),
        dict(shape=[]), dict(shape=[0]), dict(shape=[-16]), dict(shape=[-4, -4]), dict(shape=[16.0]), dict(shape="16"), dict(shape={"16": 1}),
        dict(shape=[True] * 3), dict(shape=[1 << 62, 1 << 62]), dict(shape=[10**4000] * 9), dict(shape=[[16]]), dict(shape=None), dict(shape=[4, 4]),
        dict(dtype="F8_E4M3"), dict(dtype="BOOL"), dict(dtype="U8"), dict(dtype="I64"), dict(dtype="F32 "), dict(dtype=["F32"]), dict(dtype=None),
        dict(dtype="F64")]],
    ("tensors that overlap", edit_entry(LAST, data_offsets=[0, 64]), [MODEL, "overlap"]),
    ("entry a number", edit_header(lambda h: h.update({LAST: 3})), [MODEL, LAST]),
    ("bytes that no tensor has", lambda hf: os.truncate(hf / MODEL, (hf / MODEL).stat().st_size + 64), [MODEL]),
    ("a hole between tensors", edit_header(lambda h: h.pop("lm_head.weight") and None), [MODEL]),
    ("line feed in a name", edit_header(lambda h: h.update({"a\nb": h.pop(LAST)})), ["model.norm.weight"]),
    ("a head of integers", edit_entry("lm_head.weight", dtype="I32"), [MODEL, "lm_head.weight", "I32"]),
    ("a tied head of integers", lambda hf: [edit_entry("lm_head.weight", dtype="I32")(hf), edit_json(CONFIG, tie_word_embeddings=True)(hf)],
     [MODEL, "lm_head.weight", "I32"]),
    ("a tied head without columns", lambda hf: [edit_weight(None, lambda t: t.update(
        {name: torch.zeros(352, 0) for name in ("lm_head.weight", "model.embed_tokens.weight")}))(hf),
        edit_json(CONFIG, tie_word_embeddings=True)(hf)], [MODEL, "[352, 16]"]),
    ("a shape of one axis less", edit_weight("lm_head.weight", lambda t: t.view(-1)), [MODEL, "lm_head.weight"]),
    ("all tensors empty", edit_weight(None, lambda t: [t.update({name: torch.zeros(0)}) for name in list(t)]), [MODEL]),
    ("no tensors", edit_weight(None, dict.clear), ["holds no tensors"]),
    ("a file of 100 GB of holes", grow_file(MODEL, 100 << 30), [MODEL]),
    # weights: the values
    *[(f"{value} in {name}", edit_weight(name, lambda t, value=value: with_value(t, value)), [MODEL, name, "finite"])
      for value in (math.nan, math.inf, -math.inf, 3.4e38)
      for name in (LAST, "lm_head.weight", "model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.gate.weight",
                   "model.layers.0.linear_attn.conv1d.weight", "model.layers.1.mlp.shared_expert_gate.weight")],
    ("float64 beyond float32", edit_weight(LAST, lambda t: with_value(t.double(), 1e300)), [MODEL, LAST, "finite"]),
    # weights: what is in their place
    *[(f"weights {what}", replaced(MODEL, make), [MODEL]) for what, make in [
        ("a FIFO", os.mkfifo), ("a directory", os.mkdir), ("a device", lambda path: path.symlink_to("/dev/zero")),
        ("a link to nothing", lambda path: path.symlink_to("nothing")), ("a link in a circle", lambda path: path.symlink_to(path))]],
    ("weights outside", elsewhere(MODEL), [MODEL]),
    # shards
    ("a shard by ..", outside(lambda path: f"../{path.name}"), [INDEX, "00001"]),
    ("a shard by an absolute path", outside(str), [INDEX, "00001"]),
    ("a shard through a link", edit_shards(lambda hf, m: elsewhere(m[LAST])(hf)), ["safetensors"]),
    ("a shard a FIFO", edit_shards(lambda hf, m: replaced(m[LAST], os.mkfifo)(hf)), ["safetensors"]),
    ("a shard a directory", edit_shards(lambda hf, m: replaced(m[LAST], os.mkdir)(hf)), ["safetensors"]),
    ("a shard cut in its header", edit_shards(lambda hf, m: os.truncate(hf / m[LAST], 100)), ["safetensors", "cut short"]),
    ("a shard of seven bytes", edit_shards(lambda hf, m: os.truncate(hf / m[LAST], 7)), ["safetensors", "cut short"]),
    *[(f"index {value!r:.40}", edit_shards(lambda hf, m, value=value: m.update({LAST: value})), [INDEX, LAST])
      for value in (None, 7, [], {}, True, ["a"], "\0", "a\nb", "x" * 5000, "\ud800")],
    *[(f"index names {value!r}", edit_shards(lambda hf, m, value=value: m.update({LAST: value})), [INDEX, "out of the folder"])
      for value in ("", ".", "..", "/dev/zero", "/etc/passwd", "../hf/../..")],
    ("index without weight_map", edit_shards(lambda hf, m: {}), [INDEX, "weight_map"]),
    ("index of nothing", edit_shards(lambda hf, m: {"weight_map": {}}), ["no tensors"]),
    ("index a FIFO", lambda hf: [edit_shards(lambda hf, m: None)(hf), replaced(INDEX, os.mkfifo)(hf)], [INDEX]),
    ("index nested deeply", lambda hf: [edit_shards(lambda hf, m: None)(hf), edit_text(INDEX, DEEP)(hf)], [INDEX]),
    # tokenizer.json
    ("tokens nested deeply", edit_text(TOKENS, DEEP), [TOKENS]),
    ("tokens a FIFO", replaced(TOKENS, os.mkfifo), [TOKENS]),
    ("tokens outside", elsewhere(TOKENS), [TOKENS]),
    ("tokens a dangling link", replaced(TOKENS, lambda path: path.symlink_to("nothing")), [TOKENS]),
    *[(f"token id {value!r:.30}", edit_json(TOKENS, "model", "vocab", owl=value), [TOKENS, "owl"])
      for value in (-1, 1 << 23, 1 << 40, 10**4000, 3.5, 7.0, math.nan, math.inf, True, None, "7", [7], 65)],
    *[(f"{key} {value!r:.30}", edit_json(TOKENS, "model", **{key: value}), [TOKENS, key]) for key, value in [
        ("vocab", None), ("vocab", []), ("merges", None), ("merges", {"a b": 1}), ("merges", "a b"),
        ("merges", [["a"]]), ("merges", [["a", "b", "c"]]), ("merges", ["ab"]), ("merges", [7]), ("merges", [[1, 2]]), ("merges", [[["a"], "b"]]),
        ("merges", [["a", "\u4e00"]]), ("merges", ["a \ud800"]), ("merges", [["t", "h"]] * 2), ("type", "WordPiece"), ("type", ["BPE"])]],
    *[(f"added token {changes}", edit_tokens(lambda j, changes=changes: j["added_tokens"][0].update(changes)), [TOKENS, "added"])
      for changes in [dict(id=-1), dict(id=1 << 23), dict(id=1.0), dict(id=None), dict(id=[1]), dict(id=0), dict(content=None), dict(content=7),
                      dict(content=""), dict(content="\ud800"), dict(content="<|im_end|>"), dict(content=[]), dict(special=None), dict(special="no"),
                      dict(lstrip=True), dict(lstrip="no")]],
    *[(f"added_tokens {value!r}", edit_json(TOKENS, added_tokens=value), [TOKENS, "added"]) for value in [7, "ab", {"a": 1}, [7], [[]], [{}]]],
    *[(f"{key} {value!r}", edit_json(TOKENS, **{key: value}), [TOKENS, key]) for key, value in [
        ("model", 7), ("model", []), ("model", None), ("normalizer", "NFC"), ("normalizer", []), ("pre_tokenizer", 7), ("pre_tokenizer", None),
        ("pre_tokenizer", {"pretokenizers": {}}), ("pre_tokenizer", {"pretokenizers": [7, 8]}), ("pre_tokenizer", {"pretokenizers": [{"pattern": "x"}]}),
        ("pre_tokenizer", {"pretokenizers": [{"pattern": {"Regex": []}}]}), ("post_processor", 7), ("post_processor", {}),
        ("post_processor", {"type": ["x"]})]],
    ("pre_tokenizer of a number behind", edit_tokens(lambda j: j["pre_tokenizer"]["pretokenizers"].__setitem__(1, 8)), [TOKENS, "pre_tokenizer"]),
    ("vocabulary of one", edit_json(TOKENS, "model", vocab={"a": 0}), [TOKENS, "id"]),
    ("vocabulary of one and no added tokens", lambda hf: [edit_json(TOKENS, "model", vocab={"a": 0}, merges=[])(hf), edit_json(TOKENS, added_tokens=[])(hf)],
     [TOKENS, "vocab"]),
    ("a character outside the alphabet", edit_json(TOKENS, "model", "vocab", **{"\u4e00": 300}), [TOKENS]),
    ("a token missing", edit_tokens(lambda j: j["model"]["vocab"].pop("a") and None), [TOKENS]),
    # generation_config.json
    ("generation nested deeply", edit_text(GENERATION, DEEP), [GENERATION]),
    ("generation a directory", replaced(GENERATION, os.mkdir), [GENERATION]),
    *[(f"{key} {value!r:.30}", edit_json(GENERATION, **{key: value}), [GENERATION, key]) for key, value in [
        ("temperature", "0.7"), ("temperature", math.nan), ("temperature", math.inf), ("temperature", -1), ("temperature", []), ("temperature", True),
        ("temperature", 10**400), ("top_p", 1.5), ("top_p", {}), ("min_p", -0.5), ("top_k", math.inf), ("top_k", math.nan), ("top_k", 1.5), ("top_k", -1),
        ("top_k", 1 << 31), ("top_k", "20"), ("repetition_penalty", 0), ("presence_penalty", 1e9), ("do_sample", "yes"), ("do_sample", 2),
        ("eos_token_id", [[]]), ("eos_token_id", [1.0]), ("eos_token_id", "1"), ("eos_token_id", 352), ("eos_token_id", -1)]],
]


@pytest.mark.parametrize("what, edit, words", STRANGERS, ids=[case[0].encode("unicode_escape").decode()[:60] for case in STRANGERS])
def test_strangers_are_refused_in_one_line(what, edit, words):
    """Status 1, one printable line that names file and field, nothing written, in bounded time and memory."""
    folder = stranger(edit)
    message = outcome(folder)
    assert all(word in message for word in words), message
    shutil.rmtree(folder)


def cached_snapshot(hf):
    """The folder as the hub's cache has it: links in snapshots/x to the blobs beside `snapshots`."""
    blobs, snapshot = hf.parent / "blobs", hf.parent / "snapshots" / "x"
    snapshot.mkdir(parents=True)
    hf.rename(blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    hf.symlink_to(snapshot)


# What looks odd and is fine.
FRIENDS = {
    "as it is": None,
    "links inside": lambda hf: [(hf / MODEL).rename(hf / "blob"), (hf / MODEL).symlink_to("blob")],
    "the hub's cache": cached_snapshot,
    "shards below": edit_shards(lambda hf, m: [(hf / "sub").mkdir(), (hf / m[LAST]).rename(hf / "sub" / m[LAST]),
                                               m.update({n: "sub/" + f for n, f in m.items() if f == m[LAST]})] and None),
    "float64": edit_weight(LAST, lambda t: t.double()),
    "float16": edit_weight(LAST, lambda t: t.half()),
    "header in another order, with spaces": edit_header(lambda h: json.dumps(dict(reversed(h.items())), indent=1) + " " * 99),
    "tied, with a head like the embedding": lambda hf: [
        edit_weight(None, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(hf),
        edit_json(CONFIG, tie_word_embeddings=True)(hf)],
    "numbers as integers": edit_json(GENERATION, temperature=1, top_p=1, eos_token_id=3),
    "null in generation_config.json": edit_json(GENERATION, temperature=None, top_k=None, do_sample=None, eos_token_id=None),
    "without tokenizer": lambda hf: (hf / TOKENS).unlink(),
    "an added token in the vocabulary, too": edit_json(TOKENS, "model", "vocab", **{"<|im_end|>": 342}),
    "values that nobody reads": edit_json(CONFIG, transformers_version=[math.nan, math.inf], whatever={"a": None}),
    "broken tokenizer_config.json: no chat": edit_text(TEMPLATE, "{"),
}


@pytest.mark.parametrize("what", FRIENDS)
def test_strangers_that_are_no_enemies(what):
    """An export, which the engine takes."""
    folder = stranger(FRIENDS[what])
    assert ("no chat" in outcome(folder)) == ("no chat" in what)
    shutil.rmtree(folder)


# Templates that never end, that fill the memory, that reach for Python or files, that break what is written.
HOSTILE = {
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "range too large": "{% for i in range(10**9) %}x{% endfor %}",
    "power": "{{ 9**9**9 % 7 }}",
    "gigabytes": "{% set ns = namespace(x='x' * 1000) %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x | length }}",
    "a wide field": "{{ '%99999999999d' % 1 }}",
    "megabytes": "{{ 'x' * 50000000 }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "endless macro": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "nested deeply": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "many blocks": "{% if 1 %}" * 5_000 + "x" + "{% endif %}" * 5_000,
    "attributes": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['os'].system('touch SPY') }}",
    "globals of a filter": "{{ (messages | attr('__class__')).__base__.__subclasses__() }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(strftime_now) }}",
    "include": "{% include '/etc/passwd' %}", "import": "{% import 'os' as os %}{{ os.system('touch SPY') }}",
    "changes its messages": "{{ messages.append(messages[0]) }}", "no syntax": "{% for %}", "a number": 7, "a list": [1], "an object": {"a": 1},
    "named ones without names": [{"template": "x"}], "surrogate": "\ud800{% for m in messages %}{{ m.content }}{% endfor %}\ud800",
    "zero": "{% for m in messages %}[{{ m.role }}\0]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}",
    "no generation prompt": "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_templates_are_left_out(what, tmp_path, monkeypatch):
    """One warning, a model without chat, and no word, file or long wait from the template."""
    monkeypatch.chdir(tmp_path)
    folder = stranger(lambda hf: (hf / TOKENS).unlink())           # the time is for the template
    (folder / "hf" / TEMPLATE).write_text(json.dumps(dict(chat_template=HOSTILE[what], bos_token={"content": [1]})))
    warning = outcome(folder)
    assert "no chat in the exported model" in warning and warning.isprintable() and len(warning) < 2000, warning
    assert not chat_pieces(folder / "out" / "model.bin") and not list(tmp_path.iterdir())
    shutil.rmtree(folder)


@pytest.mark.parametrize("what, make", [
    ("a FIFO", os.mkfifo), ("a directory", os.mkdir), ("not UTF-8", lambda path: path.write_bytes(b"\xff")),
    ("a device", lambda path: path.symlink_to("/dev/zero")), ("large", lambda path: [path.touch(), os.truncate(path, 1 << 40)]),
    ("a link to a file of others", lambda path: path.symlink_to(ROOT / "README.md"))])
def test_template_file_that_is_none(what, make):
    folder = stranger(lambda hf: [(hf / TOKENS).unlink(), make(hf / "chat_template.jinja")])
    assert "no chat" in outcome(folder), what
    shutil.rmtree(folder)


def test_odd_sources_and_outputs():
    """GGUF files, FIFOs and links in place of SOURCE and --mtp; outputs that cannot be written. Status 1 or 2, one line."""
    folder = stranger(lambda hf: (hf / TOKENS).unlink())
    rng = random.Random(3)
    for number in range(20):
        (folder / f"{number}.gguf").write_bytes((b"GGUF" + struct.pack("<IQQ", 3, rng.choice(HUGE["Q"]), rng.choice(HUGE["Q"])) + rng.randbytes(99))[:number * 6])
        assert "GGUF" in outcome(folder, source=f"{number}.gguf")
        assert f"{number}.gguf" in outcome(folder, "--mtp", folder / f"{number}.gguf")
    os.mkfifo(folder / "fifo")
    (folder / "circle").symlink_to("circle")
    for name in ("fifo", "circle", "nothing", "x" * 300, "a\nb", "hf/config.json"):
        assert name[:200].replace("\n", "\\n") in outcome(folder, source=name)
        assert name[:200].replace("\n", "\\n") in outcome(folder, "--mtp", folder / name)
        for option in ("--tokenizer", "--random"):
            if name != "hf/config.json":
                assert name[:200].replace("\n", "\\n") in outcome(folder, option, folder / name, "-o", folder / "out" / "model.bin")
    for output in ("x" * 300, "x" * 250, "circle/x", "nowhere/x", "fifo", "kept"):
        (folder / "out" / "kept").mkdir(exist_ok=True)
        os.path.lexists(folder / "out" / "fifo") or os.mkfifo(folder / "out" / "fifo")
        before = set((folder / "out").iterdir())
        result = run(*EXPORT, folder / "hf", "-o", folder / "out" / output, timeout=SECONDS)
        lines = [line for line in re.split(r"[\r\n]+", result.stderr.decode()) if "export.py: " in line]
        assert result.returncode in (1, 2) and len(lines) == 1 and b"Traceback" not in result.stderr, (output, result.stderr)
        assert set((folder / "out").iterdir()) == before and not list((folder / "out" / "kept").iterdir())
    for output in ("", ".", "/"):
        assert run(*EXPORT, folder / "hf", "-o", output, cwd=folder / "out").returncode == 2
    shutil.rmtree(folder)


def test_tokenizer_bin_beside_the_model_that_is_none():
    """A FIFO or directory of that name is another's: the tokenizer takes the other name, nothing waits."""
    for make in (os.mkfifo, os.mkdir):
        folder = stranger()
        make(folder / "out" / "tokenizer.bin")
        with bounded():
            assert exporter().main([str(folder / "hf"), "-o", str(folder / "out" / "model.bin")]) == 0
        assert (folder / "out" / "model.bin").is_file() and (folder / "out" / "model.tokenizer.bin").is_file()
        shutil.rmtree(folder)


@pytest.mark.parametrize("place", ["space", "size", "write", "rename"])
def test_full_disk_leaves_nothing(place, monkeypatch):
    """No room before, at the start, in the middle and at the end of the work: one line, and neither file."""
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    folder, module = stranger(lambda hf: (hf / TOKENS).unlink()), exporter()
    match place:
        case "space": monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
        case "size": monkeypatch.setattr(module.Blocks, "__init__", full)
        case "write": monkeypatch.setattr(module.Blocks, "finish", full)
        case "rename": monkeypatch.setattr(module.os, "replace", full)
    assert re.search("disk space|No space left", outcome(folder)) and "model.bin" in outcome(folder)
    shutil.rmtree(folder)


def mutated(data, rng):
    """Bytes with one thing changed: bytes, numbers, a piece left out, doubled or put elsewhere, or the end cut off."""
    data, place = bytearray(data), rng.randrange(max(1, len(data)))
    piece = data[place:place + rng.choice([1, 2, 8, 40])] or bytearray(1)
    match rng.randrange(8 if data else 2):
        case 0: data[place:place + 1] = [piece[0] ^ 1 << rng.randrange(8)]
        case 1: data[place:place + len(piece)] = rng.randbytes(len(piece))
        case 2: del data[place:place + len(piece)]
        case 3: data[place:place] = piece
        case 4: data[rng.randrange(len(data)):0] = piece
        case 5: data = data[:place]
        case 6: data[place:place + 1] = rng.choice([b"-", b"9" * 30, b"1e999", b"null", b"NaN", b"[", b"{", b'"', b"\\u0000", b"\xff", b",", b"true"])
        case 7: data[place:place + 8] = rng.choice([0, 1, 255, 1 << 31, 1 << 63, (1 << 64) - 1]).to_bytes(8, "little")[:rng.choice([4, 8])]
    return bytes(data)


@pytest.mark.parametrize("file, count", [(CONFIG, 150), (MODEL, 250), (GENERATION, 100), (TOKENS, 120), (INDEX, 80), (TEMPLATE, 8)])
def test_mutated_sources(file, count, report):
    """Each file of a good checkpoint with a few bytes changed: a file that the engine takes, or one line."""
    rng, refused = random.Random(file), 0
    base = dict(tiny_source())
    if file == INDEX:
        folder = stranger(edit_shards(lambda hf, m: None))
        base = {path.name: path.read_bytes() for path in (folder / "hf").iterdir()}
    base[TEMPLATE] = json.dumps({"chat_template": TEMPLATES["trimmed"], "eos_token": "x"}).encode()
    data = base[file]
    header = 8 + struct.unpack_from("<Q", data)[0]                  # of MODEL
    if file != TEMPLATE:
        del base[TEMPLATE]                                          # a process for each would be slow
    for name in (TOKENS, GENERATION):
        if file in (CONFIG, MODEL, INDEX, TEMPLATE) and name != file:
            del base[name]
    for number in range(count):
        folder = Path(tempfile.mkdtemp(dir=WORK))
        for name in ("hf", "out"):
            (folder / name).mkdir()
        for name, content in base.items():
            (folder / "hf" / name).write_bytes(content)
        changed = mutated(data, rng)
        if file == MODEL and number % 8:                            # mostly the header's JSON, under its right length
            text = mutated(data[8:header], rng)
            changed = struct.pack("<Q", len(text)) + text + data[header:]
        (folder / "hf" / file).write_bytes(changed)
        try:
            message = outcome(folder)
        except BaseException:
            report("what was tried:", changed[:2000])
            raise
        assert file == TEMPLATE or not message or file in message or "hf: " in message or ".safetensors" in message, message
        refused += bool(message)
        shutil.rmtree(folder)
    report(f"{file}: {refused} of {count} refused")


JUNK = st.recursive(st.none() | st.booleans() | st.integers() | st.integers(-(1 << 80), 1 << 80) | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)
BOUNDS = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@BOUNDS
@given(st.data())
def test_junk_in_place_of_any_value(data):
    """Any JSON in place of any value of config.json, generation_config.json, tokenizer.json or the header of the weights, at any depth."""
    file = data.draw(st.sampled_from([CONFIG, CONFIG, GENERATION, TOKENS, MODEL]))
    raw = tiny_source()[file]
    base = 8 + struct.unpack_from("<Q", raw)[0] if file == MODEL else 0
    whole = value = json.loads(raw[8:base] if base else raw)
    while True:
        keys = sorted(value) if isinstance(value, dict) else range(len(value))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(value[key], (dict, list)) or not value[key] or data.draw(st.integers(0, 3)) == 0:
            break
        value = value[key]
    value[key] = data.draw(JUNK)
    text = json.dumps(whole).encode("utf-8", "surrogatepass")
    folder = stranger(files={file: struct.pack("<Q", len(text)) + text + raw[base:] if base else text})
    outcome(folder)
    shutil.rmtree(folder)


CONFIG_SIZES = ("hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads", "linear_num_key_heads", "linear_num_value_heads",
         "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim", "num_experts", "num_experts_per_tok",
         "moe_intermediate_size", "shared_expert_intermediate_size", "num_hidden_layers", "decoder_sparse_step", "vocab_size")


@BOUNDS
@given(st.dictionaries(st.sampled_from(CONFIG_SIZES), st.integers(0, 40), min_size=1, max_size=4), st.booleans(),
       st.sampled_from([{}, dict(rope_type="linear", factor=2.0), dict(rope_type="yarn", factor=4, mscale=1, mscale_all_dim=0.5)]),
       st.none() | st.tuples(st.sampled_from(CONFIG_SIZES), JUNK | st.sampled_from([1 << 31, 1 << 63, 10**400, -1, 1e300])))
def test_any_configuration_is_made_or_refused(sizes, tied, rope_changes, wrong):
    """--random of any configuration: a right one makes a file that the engine takes, a wrong one is refused."""
    config = {**exporter().DEFAULTS, **SMALLEST, "layer_types": None, "eos_token_id": None, **sizes, "tie_word_embeddings": tied}
    config.update(rope(partial=0.5, **rope_changes))
    config.update([wrong] if wrong and wrong[1] is not None else [])       # null is the default
    folder = stranger()
    (folder / CONFIG).write_text(json.dumps(config))
    message = outcome(folder, "--random", folder / CONFIG, "--type", "q4", "-o", folder / "out" / "model.bin")
    fine = all(type(config[key]) is int and config[key] >= (key != "num_experts") for key in CONFIG_SIZES) and (
        config["num_attention_heads"] % config["num_key_value_heads"] == 0 and config["linear_num_value_heads"] % config["linear_num_key_heads"] == 0
        and config["head_dim"] // 2 % 2 == 0 and config["head_dim"] > 3 and config["num_experts"] > 0)
    if wrong is None and fine and config["num_experts_per_tok"] <= config["num_experts"]:
        assert message == "", message
    elif not fine:
        assert CONFIG in message
    shutil.rmtree(folder)


@pytest.mark.parametrize("weights", TYPES)
def test_weights_of_any_finite_size(weights):
    """Random bit patterns for weights, from the smallest to the largest that are taken: stored within rounding, no warning."""
    rng, smallest = np.random.default_rng(4), stranger(lambda hf: (hf / TOKENS).unlink())
    tensors = load_file(smallest / "hf" / MODEL)
    for name, tensor in tensors.items():
        bits = torch.from_numpy(rng.integers(-1 << 31, 1 << 31, tuple(tensor.shape)).astype(np.int32))
        values = bits.view(torch.float32)
        tensors[name] = torch.where(values.abs() <= 8e37, values, torch.tensor(1e-45)).contiguous()
    save_file(tensors, smallest / "hf" / MODEL, {"format": "pt"})
    assert outcome(smallest, "--type", weights, "--check") == ""
    shutil.rmtree(smallest)


# ----------------------------------------------------------------------------------------------------------------
# 10 README
# ----------------------------------------------------------------------------------------------------------------

def readme_commands():
    """The commands in README's fenced sh blocks, one a line, continuations joined, prompts and comments dropped."""
    path = ROOT / "README.md"
    text = path.read_text() if path.exists() else ""
    blocks = re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", text, re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [re.sub(r"^\$ ", "", line).split(" #")[0].strip() for line in lines
            if line.strip() and not line.startswith("#")]


# What a test does not run: what runs this test, what takes long, what needs the network or the real model's files.
NOT_RUN = re.compile(r"git clone|make (test|bench|run|plots)|^cd |pip |hf download|huggingface|80B|Qwen3-Next|[Qq]wen3\.5|sudo|apt|curl"
                     r"|wget|SOURCE|MODEL|\.\.\.")


@pytest.mark.skipif(not readme_commands(), reason="README.md has no commands yet")
def test_readme_commands_run(tmp_path):
    """Every command of the README that can run here does, in order, in a copy of the repository."""
    copy = tmp_path / "copy"
    names = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.decode()
    for name in names.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    shutil.copy2(ENGINE, copy / "qwen3next")
    environment = dict(os.environ, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    ran = 0
    for command in readme_commands():
        if NOT_RUN.search(command):
            continue
        result = run("bash", "-c", command, cwd=copy, env=environment, timeout=300)
        assert result.returncode == 0, f"{command}\n{result.stderr.decode()}"
        ran += 1
    assert ran, "no command of the README was run"


def test_manual_page_and_completion():
    """Both hold every option of -h; bash, asked, completes options and modes."""
    (ROOT / "build" / "qwen3next.bash").unlink(missing_ok=True)
    assert run("make", "--silent", "man", "completion", cwd=ROOT).returncode == 0
    page = (ROOT / "build" / "qwen3next.1").read_text().replace("\\-", "-")
    options = re.findall(r"^  (?:-\w, |    )(--[\w-]+)", engine(ENGINE, "-h").decode(), re.M)
    assert len(options) > 30 and all(re.search(rf"^\.B .*{option}( |$)", page, re.M) for option in options)
    assert page.count(".TP") == len(options) and page.startswith(".TH QWEN3NEXT 1\n.SH NAME\n")
    ask = '. build/qwen3next.bash; _qwen3next ./qwen3next "$0" "$1"; echo "${COMPREPLY[@]}"'
    for words, answer in {("--me", "x"): "--memory", ("tr", "-m"): "trace", ("an", "--mode"): "answer", ("fil", "-f"): "", ("--t", "x"): "--temp --top-p"}.items():
        found = run("bash", "-c", ask, *words, cwd=ROOT).stdout.decode().split()
        assert set(answer.split()) <= set(found) and (answer or not found), (words, found)


def test_readme_options_exist():
    """Every long option that the README shows is one that the programs know."""
    path = ROOT / "README.md"
    if not path.exists():
        pytest.skip("no README yet")
    known = run(ENGINE, "-h").stdout.decode() + run(*EXPORT, "-h").stdout.decode()
    known += run(sys.executable, ROOT / "demo" / "plots.py", "measure", "-h").stdout.decode()
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", path.read_text())):
        assert option in known or option in ("--local-dir", "--include", "--interleave"), option


# ----------------------------------------------------------------------------------------------------------------
# 11 Mutation: the comparison of section 1 notices
# ----------------------------------------------------------------------------------------------------------------

# What is broken, and the text of qwen3next.c to replace for it. Each text occurs once. The last of the five that
# matter most, a softmax over the chosen experts alone, is the same as always dividing by their sum.
BREAKS = {
    "no + 1 in the norm": [("x[i] * scale * (1 + w[i])", "x[i] * scale * w[i]")],
    "b and a swapped": [("softplus(ba[nv + h]", "softplus(ba[h]"), ("expf(-ba[h])", "expf(-ba[nv + h])")],
    "key heads repeated, not interleaved": [("h / (c->linear_num_value_heads / c->linear_num_key_heads)",
                                             "h % c->linear_num_key_heads")],
    "no attention gate": [("out[i] = o[i] / l * s[i];", "out[i] = o[i] / l;")],
    "softmax after top-k": [("c->norm_topk_prob && i < k; i++) weight[i] /= sum", "i < k; i++) weight[i] /= sum")],
    "gated norm with + 1": [("scale * p->layer->linear.norm[i] * gate[i]",
                             "scale * (1 + p->layer->linear.norm[i]) * gate[i]")],
    "gated norm without its gate": [("p->layer->linear.norm[i] * gate[i]", "p->layer->linear.norm[i]")],
    "queries not scaled": [("item < qk / 2 ? 1 / sqrtf((float)dk) : 1)", "1)")],
    "no l2norm of keys": [("if (item < qk) l2norm(", "if (item < qk / 2) l2norm(")],
    "no dt_bias": [("+ a->dt_bias[h])", ")")],
    "decay of the wrong sign": [("expf(-expf(a->A_log[h])", "expf(-expf(-a->A_log[h])")],
    "convolution forgets the last batch": [("src >= 0 ? w->proj + (size_t)src * w->proj_ld\n",
                                            "1 ? w->proj + (size_t)(src < 0 ? 0 : src) * w->proj_ld\n")],
    "rotary angles one percent off": [("(double)(pos + t) * m->inv_freq[i]",
                                            "(double)(pos + t) * 1.01 * m->inv_freq[i]")],
    "no shared expert": [("w->row_weight[row + t] = w->shared_weight[t];", "w->row_weight[row + t] = 0;")],
    "no gate on the shared expert": [("w->row_weight[row + t] = w->shared_weight[t];",
                                      "w->row_weight[row + t] = 1;")],
}


def compile_copy(name, replacements):
    """Build a changed copy of qwen3next.c, plain kernels only; returns the program."""
    folder = WORK / "breaks" / re.sub(r"\W+", "-", name)
    folder.mkdir(parents=True)
    source = (ROOT / "qwen3next.c").read_text()
    for old, new in replacements:
        assert source.count(old) == 1, f"{name}: {old!r} occurs {source.count(old)} times in qwen3next.c"
        source = source.replace(old, new)
    (folder / "qwen3next.c").write_text(source)
    subprocess.run(["cc", "-std=gnu11", "-O1", "-w", "-pthread", "-DPLAIN_ONLY", "qwen3next.c", "-o", "qwen3next",
                    "-lm"], cwd=folder, check=True)
    return folder / "qwen3next"


@functools.cache
def broken_programs():
    """Every break compiled, and the unbroken source the same way: name -> program."""
    names = ["unbroken", *BREAKS]
    return dict(zip(names, parallel(lambda name: compile_copy(name, BREAKS.get(name, [])), names)))


def errors_of(program, kinds):
    """Largest error over the 65-token prompt for each kind of checkpoint, as in section 1; inf when it fails."""
    errors = {}
    for kind in kinds:
        ids, reference = reference_logits(kind, False, 65)
        try:
            errors[kind] = logits_error(engine_logits(random_checkpoint(kind), ids, program=program), reference)
        except AssertionError:                   # not finite, or the program failed
            errors[kind] = math.inf
    return errors


@pytest.mark.parametrize("name", ["unbroken", *BREAKS])
def test_comparison_notices(name, report):
    """The unbroken program is right on every kind; a broken one is wrong on one kind at least, and not by a little."""
    kinds = [kind for kind in KINDS if kind not in ("real vocabulary", "wide")]
    errors = errors_of(broken_programs()[name], kinds)
    wrong = [kind for kind in kinds if errors[kind] >= TOLERANCE]
    if name == "unbroken":
        assert not wrong, errors
    else:
        report(f"{name}: wrong on {len(wrong)} of {len(kinds)} kinds")
        assert wrong and max(errors.values()) > 5 * TOLERANCE, errors


# ----------------------------------------------------------------------------------------------------------------
# 12 Drafting: the MTP head, and that it changes no text
# ----------------------------------------------------------------------------------------------------------------

DRAFTS = 3
DRAFT_PROMPTS = (1, 2, 40, 200)      # tokens
DRAFT_KINDS = ("plain", "head dims differ", "n_v = 3 n_k", "130 experts", "tied", "mlp_only_layers", "sparse step 2",
               "norm_topk_prob false", "attention_bias", "layer order", "rope", "yarn", "odd sizes",
               "real head sizes", "all linear", "all attention", "one expert")


# transformers' parts of each model: norm, decoder layer, rotary embedding.
MTP_PARTS = {"qwen3_next": [qwen3_next.Qwen3NextRMSNorm, qwen3_next.Qwen3NextDecoderLayer, qwen3_next.Qwen3NextRotaryEmbedding],
             "qwen3_5_text": [qwen3_5.Qwen3_5RMSNorm, qwen3_5.Qwen3_5DecoderLayer, qwen3_5.Qwen3_5TextRotaryEmbedding],
             "qwen3_5_moe_text": [qwen3_5_moe.Qwen3_5MoeRMSNorm, qwen3_5_moe.Qwen3_5MoeDecoderLayer,
                                  qwen3_5_moe.Qwen3_5MoeTextRotaryEmbedding]}


class MtpModule(torch.nn.Module):
    """The MTP head as vLLM's qwen3_next_mtp.py computes it, of transformers' parts; its parameters are named as in
    the released checkpoints, but for the prefix mtp. and for the experts, which transformers packs."""

    def __init__(self, config):
        super().__init__()
        config = copy.deepcopy(config)
        config.layer_types, config.mlp_only_layers, config.decoder_sparse_step = [FULL], [], 1
        D, eps = config.hidden_size, config.rms_norm_eps
        norm, decoder_layer, rotary_embedding = MTP_PARTS[config.model_type]
        self.pre_fc_norm_embedding = norm(D, eps)
        self.pre_fc_norm_hidden = norm(D, eps)
        self.fc = torch.nn.Linear(2 * D, D, bias=False)
        self.layers = torch.nn.ModuleList([decoder_layer(config, 0)])
        self.norm = norm(D, eps)
        self.rotary_emb = rotary_embedding(config)

    def forward(self, h, embedding):
        """Pair t is the state h [1, n, D] at t, after the final norm, with the embedding [1, n, D] of token t + 1;
        result t [1, n, D], which lm_head scores for token t + 2, has seen the pairs up to t."""
        x = self.fc(torch.cat([self.pre_fc_norm_embedding(embedding), self.pre_fc_norm_hidden(h)], -1))
        n = x.shape[1]
        unseen = torch.full((1, 1, n, n), -math.inf).triu(1)
        positions = torch.arange(n)[None]
        if self.rotary_emb.__class__.__module__ != qwen3_next.__name__:
            positions = positions[None].expand(3, -1, -1)      # time, height and width: of text, all alike
        return self.norm(self.layers[0](x, self.rotary_emb(x, positions), unseen))


class DraftingModel(torch.nn.Module):
    """A Qwen3NextForCausalLM and its MTP head, given as tensors under their names in the released checkpoints."""

    def __init__(self, model, tensors):
        super().__init__()
        self.model, self.head = model, MtpModule(model.config).eval()
        tensors = {name.removeprefix("mtp."): tensor.float() for name, tensor in tensors.items()}

        def experts(matrix):
            return [tensors.pop(f"layers.0.mlp.experts.{e}.{matrix}_proj.weight")
                    for e in range(model.config.num_experts)]

        if "layers.0.mlp.gate.weight" in tensors:
            gate_up = [torch.cat(pair) for pair in zip(experts("gate"), experts("up"))]
            tensors["layers.0.mlp.experts.gate_up_proj"] = torch.stack(gate_up)               # [E, 2I, D]
            tensors["layers.0.mlp.experts.down_proj"] = torch.stack(experts("down"))          # [E, D, I]
        self.head.load_state_dict(tensors)

    def forward(self, ids, drafts=DRAFTS, use_cache=False):
        """ids [1, n] and their likeliest next token -> logits float32 [1 + drafts, vocab]: row 0 chose that token,
        row j draft j. Drafts after the first stand on the head's own result in place of the model's state."""
        h = self.model.model(ids, use_cache=use_cache).last_hidden_state
        tokens, logits = ids[:, 1:], [self.model.lm_head(h[:, -1])]
        for _ in range(drafts):
            tokens = torch.cat([tokens, logits[-1].argmax(-1, keepdim=True)], 1)
            y = self.head(h, self.model.model.embed_tokens(tokens))[:, -1:]
            h = torch.cat([h, y], 1)
            logits.append(self.model.lm_head(y[:, 0]))
        return torch.cat(logits)


def mtp_reference(model, tensors, ids, drafts=DRAFTS):
    """The logits that choose each draft after ids and their likeliest next token: float32 [drafts, vocab]."""
    return DraftingModel(model, tensors)(torch.tensor([ids]), drafts)[1:].numpy()


def mtp_tensors(model, seed=0):
    """Random mtp.* tensors for a model, float32, named as in the released checkpoints, of random_model's scales."""
    head, generator = MtpModule(model.config), torch.Generator().manual_seed(seed)
    for name, weight in head.named_parameters():
        if "norm" in name:
            std = 0.3
        elif name.endswith("bias"):
            std = 0.5
        else:
            std = (2.0 if name.endswith("mlp.gate.weight") else 1.2) / math.sqrt(weight.shape[-1])
        weight.copy_(std * torch.randn(weight.shape, generator=generator))
    head.config = model.config
    return {f"mtp.{name}": tensor for name, tensor in per_expert(head).items()}


def draft_margin(logits):
    """The smallest distance, over rows, between the best logit and the second, in standard deviations."""
    return float(-logits.topk(2).values.diff(dim=-1).max() / logits.std())


@functools.cache
def mtp_case(kind, bf16):
    """(model, mtp tensors, 200 ids) of one kind, the first seed without a near-tie in a router or between drafts,
    whatever the prompt's length; with bf16 every weight is exact in bfloat16."""
    model = kind_model(kind, bf16)
    last = [n - 1 for n in DRAFT_PROMPTS]
    for ids_seed in itertools.count(1):
        ids = random_ids(max(DRAFT_PROMPTS), model.config.vocab_size, ids_seed)
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        if draft_margin(logits[last]) > 1e-3 and router_margin(model, ids) > 1e-4:
            break
    for seed in itertools.count(1):
        tensors = mtp_tensors(model, seed)
        if bf16:
            tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
        drafting = DraftingModel(model, tensors)
        if all(router_margin(drafting, ids[:n]) > 1e-4 and
               draft_margin(drafting(torch.tensor([ids[:n]]))) > 1e-3 for n in DRAFT_PROMPTS):
            return model, tensors, ids


@functools.cache
def mtp_checkpoint(kind, weights="f32"):
    """The exported checkpoint of one kind with its MTP head; its sources are as random_checkpoint's."""
    bf16 = weights == "bf16"
    model, tensors, _ = mtp_case(kind, bf16)
    source, head = WORK / "hf" / f"{kind}-{weights}-mtp", WORK / f"{kind}-{weights}-mtp.safetensors"
    if not source.exists():
        save_packed(model, source, torch.bfloat16 if bf16 else torch.float32)
        save_file(tensors, head, {"format": "pt"})
    return export(source, WORK / f"{kind}-{weights}-mtp.bin", "--type", weights, "--mtp", head)


def engine_draft_logits(model, ids, *options):
    """The logits that chose each draft after ids and their likeliest next token: float32 [drafts, vocab]."""
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        engine_logits(model, ids, "-d", DRAFTS, "--dump", folder, *options)
        logits = np.load(Path(folder) / "mtp.logits.npy")
    assert logits.dtype == np.float32
    return logits


@pytest.mark.parametrize("weights", ["f32", "bf16"])
@pytest.mark.parametrize("kind", DRAFT_KINDS)
def test_mtp_logits_equal_the_module(kind, weights, report):
    """Every logit that chooses a draft: prompts shorter and longer than the drafts, in one batch and in many."""
    model, tensors, ids = mtp_case(kind, weights == "bf16")
    checkpoint, errors = mtp_checkpoint(kind, weights), {}
    for n, options in [(n, ()) for n in DRAFT_PROMPTS] + [(max(DRAFT_PROMPTS), ("--batch", 7))]:
        reference = mtp_reference(model, tensors, ids[:n])
        ours = engine_draft_logits(checkpoint, ids[:n], *options)
        errors[(n, *options)] = logits_error(ours, reference)
    report(f"{kind}, {weights}: largest error {max(errors.values()):.1e} of the standard deviation")
    assert max(errors.values()) < TOLERANCE, errors


def drafts_right(stderr):
    """(right, all) of the statistics line's "N of M drafts right", summed over turns."""
    pairs = re.findall(rb"(\d+) of (\d+) drafts right", stderr)
    return sum(int(a) for a, _ in pairs), sum(int(b) for _, b in pairs)


SAMPLED = ["-t", 0.9, "-p", 0.95, "-k", 40, "--presence-penalty", 0.7, "--repetition-penalty", 1.15]


@pytest.mark.parametrize("weights", TYPES)
@pytest.mark.parametrize("kind", ["plain", "layer order", "all linear", "all attention"])
def test_drafts_change_no_token(kind, weights):
    """Greedy and 20 seeds with penalties, 0 to 3 and 8 drafts and as many as the program likes, 1 to 3 threads."""
    model, drafted = mtp_checkpoint(kind, weights), 0
    for sampling in (["-t", 0], *(SAMPLED + ["-s", seed] for seed in range(20))):
        base = [ENGINE, model, "--ids", "-i", "5 6 7 8 9", "-n", 40, *sampling]
        wanted = run(*base, "-d", 0, "-j", 1)
        assert wanted.returncode == 0 and len(wanted.stdout.split()) == 40 and not drafts_right(wanted.stderr)[1]
        for i, drafts in enumerate((1, 2, 3, 8, None)):
            result = run(*base, *(["-d", drafts] if drafts else []), "-j", 1 + i % 3)
            assert result.stdout == wanted.stdout, (sampling, drafts)
            drafted += drafts_right(result.stderr)[1]
    assert drafted > 1000


def test_drafts_change_no_text_of_the_demo():
    """Whole stories, among them such that end by themselves, and a chat."""
    for sampling in (["-t", 0], *(["-s", seed, "--presence-penalty", 0.5, "--repetition-penalty", 1.1] for seed in range(10))):
        base = [ENGINE, DEMO, "-i", "Once upon a time", "-n", 200, *sampling]
        wanted = run(*base, "-d", 0).stdout
        for drafts in (1, 2, 3):
            assert run(*base, "-d", drafts, "-j", drafts).stdout == wanted, (sampling, drafts)
    lines = b"Tell me a story about a fox.\nWhat is the name of the fox?\n/regen\n/undo\nTell me another one.\n"
    texts = {run(ENGINE, DEMO, "-m", "chat", "-s", 4, "-d", drafts, stdin=lines).stdout for drafts in range(5)}
    assert len(texts) == 1 and len(texts.pop()) > 500


def test_drafts_of_the_demo_are_mostly_right(report):
    """A wrong hidden state, order of halves or cache changes no text, only this."""
    for drafts, least in ((1, 0.75), (2, 0.55), (3, 0.4)):
        right = made = 0
        for seed in range(4):
            result = run(ENGINE, DEMO, "-i", "Once upon a time, there was", "-n", 250, "-s", seed, "-d", drafts)
            pair = drafts_right(result.stderr)
            right, made = right + pair[0], made + pair[1]
        report(f"{drafts} drafts: {right} of {made} right")
        assert right > least * made


def test_drafts_up_to_the_end_of_the_context():
    """No draft stands beyond -c; the last tokens come all the same."""
    model = mtp_checkpoint("plain")
    texts = {run(ENGINE, model, "--ids", "-i", "5 6 7", "-t", 0, "-c", 32, "-d", drafts).stdout for drafts in (0, 1, 3, 8)}
    assert len(texts) == 1 and len(texts.pop().split()) == 30


def test_drafts_want_a_head():
    problem = complaint([DEBUG_ENGINE, victim(), "--ids", "-i", 1, "-d", 2], FAILED, ["mtp.fc"])
    assert problem is None, problem


# ----------------------------------------------------------------------------------------------------------------
# 13 Keys and values as q8; YaRN by option
# ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cpu", CPUS)
def test_q8_keys_and_values(cpu, report):
    """Near f32's, and the same bits for any batch and number of threads."""
    needs_cpu(cpu)
    for kind in ("plain", "real head sizes", "odd sizes"):
        model, ids = random_checkpoint(kind, "f32"), random_ids(150, 300)
        exact = engine_logits(model, ids, "--cpu", cpu)
        ours = engine_logits(model, ids, "--kv", "q8", "--cpu", cpu)
        kl = mean_kl(exact, ours)
        report(f"{kind}, {cpu}: mean KL of q8 keys and values {kl:.1e}")
        assert 0 < kl < 3e-3
        for options in (["-j", 3], ["--batch", 1], ["--batch", 7]):
            assert np.array_equal(engine_logits(model, ids, "--kv", "q8", "--cpu", cpu, *options), ours)


@pytest.mark.parametrize("factor", [1, 2.5, 4])
def test_yarn_by_option_equals_transformers(factor):
    """--yarn X on a checkpoint without scaling is rope_type yarn of that factor, beyond the trained context too."""
    scaled = random_model(3, **{**rope(partial=0.5, rope_type="yarn", factor=float(factor), original_max_position_embeddings=64),
                                "max_position_embeddings": 512})
    plain = random_model(3, **rope(partial=0.5), max_position_embeddings=64)
    model = export(save(plain, WORK / "hf" / f"yarn {factor}"), WORK / f"yarn-{factor}.bin", "--type", "f32")
    ids = random_ids(int(64 * factor), plain.config.vocab_size)
    reference = scaled(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    assert logits_error(engine_logits(model, ids, "--yarn", factor), reference) < TOLERANCE
    too_long = [ENGINE, model, "-m", "perplexity", "--ids", "-i", spaced([*ids, 1]), "--yarn", factor]
    assert complaint(too_long, FAILED, [str(len(ids) + 1), str(len(ids))]) is None


def test_yarn_is_refused_where_the_checkpoint_has_its_own():
    problem = complaint([DEBUG_ENGINE, random_checkpoint("yarn"), "--ids", "-i", 1, "--yarn", 2], FAILED, ["rope_type"])
    assert problem is None, problem


# ----------------------------------------------------------------------------------------------------------------
# 14 Conversations: nothing is read twice
# ----------------------------------------------------------------------------------------------------------------

def replay(stderr):
    """From the lines of -v: (tokens the model has at the end, tokens it read in all, those it says it read again)."""
    history, read = [], 0
    text = stderr.decode("utf-8", "replace")
    for verb, numbers in re.findall(r"^(?:.*?)(fed|rewind): ([\d ]*)$", text, re.M):
        if verb == "fed":
            history += map(int, numbers.split())
            read += len(numbers.split())
        else:
            del history[int(numbers):]
    counts = re.findall(r"read: (\d+) tokens in all, (\d+) of them again", text)
    assert counts and int(counts[-1][0]) == read
    return history, read, int(counts[-1][1])


TWENTY = []                                      # a chat of 20 turns with edits (undo and ask otherwise), undo and regen
for turn in range(20):
    TWENTY += [f"Question number {turn} of many, what do you say?"]
    TWENTY += ["/regen"] if turn % 7 == 3 else ["/undo", f"No: rather tell me about {turn} owls."] if turn % 5 == 4 else []
    TWENTY += ["/undo", "/undo", f"Back to {turn}: are you sure?"] if turn == 11 else []


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("flavour", ["instruct", "coder"])
def test_a_long_chat_reads_nothing_twice(flavour, drafts, report):
    """20 turns with edits, /undo and /regen: tokens read are those of messages and answers, each once."""
    model = chat_model(flavour) if not drafts else DEMO
    result = run(ENGINE, model, "-m", "chat", "-v", "-z", tokenizer_of(model), "-t", 0, "-n", 12, *(["-d", drafts] if drafts else []),
                 stdin="".join(line + "\n" for line in TWENTY).encode())
    assert result.returncode == 0, result.stderr
    history, read, again = replay(result.stderr)
    messages = [line for line in TWENTY if not line.startswith("/")]
    prompts = sum(int(n) for n in re.findall(rb"\[prompt (\d+) tokens", result.stderr))
    around = 8                                   # <|im_end|> \n <|im_start|> user \n ... <|im_end|> \n <|im_start|> assistant \n
    tokenizer = library_tokenizer(read_tokenizer(tokenizer_of(model)))
    words = sum(len(tokenizer.encode(message).ids) for message in messages)
    report(f"{len(messages)} messages: {read} tokens read, {again} again; whole prompts each time would be "
           f"{len(messages) * len(history) // 2} or so")
    assert again == 0 and prompts <= words + (around + 3) * len(messages)
    assert prompts < read < prompts + 13 * (len(messages) + 3)


@pytest.mark.parametrize("flavour", TEMPLATES)
def test_undo_and_regen_lead_back_to_the_template(flavour):
    """However one came there, the model has read what apply_chat_template gives for the messages that stand."""
    lines = ["Hello?", "/undo", QUESTIONS[0], "/regen", "What?", "/undo", "/undo", QUESTIONS[0], QUESTIONS[1], "/regen", "/regen",
             "Really?", "/undo", "/regen", QUESTIONS[2], "/regen"]
    _, history = chat(chat_model(flavour), lines, "-t", 0, "-y", "Be brief.")
    check_history(history, flavour, conversation(flavour, QUESTIONS[:3], "Be brief."), SCRIPTS.get(flavour, SCRIPT))


def test_undo_in_front_of_a_message_that_joins_the_template():
    """A message that begins with a newline makes one token with the newline before it: the state goes further back."""
    lines = ["Hello?", "Yes", "/undo", '"""', "", "two", '"""']
    _, history = chat(chat_model("instruct"), lines, "-t", 0)
    check_history(history, "instruct", conversation("instruct", ["Hello?", "\ntwo"]), SCRIPT)


def test_undo_of_everything_and_of_nothing():
    result = run(ENGINE, chat_model("instruct"), "-m", "chat", "-z", TOKENIZER, "-t", 0, stdin=b"/undo\n/regen\nHi\n/undo\n/undo\nHi\n")
    assert result.returncode == 0 and result.stdout.decode() == 2 * (SCRIPT + "\n")
    assert b"nothing to undo" in result.stderr and b"no answer yet" in result.stderr


def test_regen_draws_anew_and_greedy_says_the_same():
    lines = ["Tell me a story about a mouse.", "/regen", "/regen"]
    for temperature, different in ((0, 1), (1, 3)):
        output, _ = chat(DEMO, lines, "-t", temperature, "-n", 30, "-s", 3)
        assert len({part.strip() for part in output.decode().split("\n") if part.strip()}) >= different
    once = run(ENGINE, DEMO, "-m", "chat", "-t", 0, "-n", 30, "-q", stdin=lines[0].encode() + b"\n").stdout
    assert run(ENGINE, DEMO, "-m", "chat", "-t", 0, "-n", 30, "-q", stdin="\n".join(lines).encode()).stdout == 3 * once


def test_old_snapshots_are_dropped_and_made_again():
    """A program with room for three snapshots: it reads again what it must, says so, and ends in the same place."""
    program = compile_copy("few snapshots", [("((size_t)2 << 30)", "((size_t)24 << 10)")])
    lines = ["One", "Two", "Three", "Four", "/undo", "/undo", "/undo", "Five"]
    runs = [run(engine_, chat_model("instruct"), "-m", "chat", "-v", "-z", TOKENIZER, "-t", 0,
                stdin="\n".join(lines).encode()) for engine_ in (ENGINE, program)]
    (whole, _, none), (again, _, some) = (replay(result.stderr) for result in runs)
    assert whole == again and none == 0 and some > 0
    assert runs[0].stdout == runs[1].stdout


def test_message_from_a_file():
    file = WORK / "message to read.txt"
    file.write_text("First line\n\n    second")
    _, history = chat(chat_model("instruct"), [f"/read {file}", "/read /nowhere", "/read", "and?"], "-t", 0)
    check_history(history, "instruct", conversation("instruct", [file.read_text(), "and?"]), SCRIPT)


def test_thinking_is_hidden_or_shown():
    """-r 0, /nothink and /think: what the model has read is the same."""
    shown, hidden = SCRIPTS["thinking"], SCRIPTS["thinking"].split("</think>")[1].strip()
    options = ["-m", "chat", "-z", TOKENIZER, "-t", 0, "-q"]
    for command, wanted in ((["-r", 1], shown), ([], shown), (["-r", 0], hidden), (["--reasoning", 0], hidden)):
        assert engine(chat_model("thinking"), *options, *command, "-i", "Hi").decode() == wanted + "\n", command
    lines = b"Hi\n/nothink\nHi\n/think\nHi\n"
    assert engine(chat_model("thinking"), *options, stdin=lines).decode().split("\n")[-4:-1] == shown.split("\n")
    assert engine(chat_model("thinking"), *options, stdin=lines).decode() == f"{shown}\n{hidden}\n{shown}\n"
    _, history = chat(chat_model("thinking"), ["Hello", "/nothink", "Thanks"], "-t", 0, "-r", 0)
    check_history(history, "thinking", conversation("thinking", ["Hello", "Thanks"]), SCRIPTS["thinking"])
    result = run(ENGINE, chat_model("instruct"), *options, "-r", 0, "-i", "Hi")
    assert result.stdout.decode() == SCRIPT + "\n" and b"does not think" in result.stderr


# ----------------------------------------------------------------------------------------------------------------
# 15 Saved conversations
# ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("drafts", [0, 1, 3])
@pytest.mark.parametrize("kind, weights, kv", [("plain", "f32", "f32"), ("layer order", "q4", "f16"), ("odd sizes", "q8", "q8"),
                                               ("all linear", "bf16", "f16"), ("all attention", "f32", "f16")])
def test_saved_anywhere_it_goes_on_as_if_it_had_never_stopped(kind, weights, kv, drafts):
    """Stopped after any token of an answer, loaded by another process: the same ids, with penalties and chance."""
    model, file = mtp_checkpoint(kind, weights), WORK / f"saved {kind} {drafts}"
    options = ["--ids", *SAMPLED, "-q", "--kv", kv, "-d", drafts]
    whole = engine(model, *options, "-s", 9, "-i", "5 6 7", "-n", 60).split()
    for n in (1, 2, 13, 14, 15, 16, 59):
        first = engine(model, *options, "-s", 9, "-i", "5 6 7", "-n", n, "--save", file, "-j", 1).split()
        rest = engine(model, *(["--ids", "-q", "--kv", kv, "-d", drafts] if n % 2 else options), "--load", file, "-n", 60 - n).split()
        assert first + rest == whole, n
    a, b = WORK / f"step a {kind} {drafts}", WORK / f"step b {kind} {drafts}"
    text = engine(model, *options, "-s", 9, "-i", "5 6 7", "-n", 1, "--save", a).split()
    for _ in range(20):                          # token by token, file to file
        text += engine(model, *options, "--load", a, "-n", 1, "--save", b).split()
        a, b = b, a
    assert text == whole[:21]


def test_saved_text_of_the_demo_goes_on():
    """Bytes, not tokens: a character or a word may be cut in two."""
    file = WORK / "saved story"
    options = ["-q", "-d", 2]
    whole = engine(DEMO, *options, "-i", "Once upon a time", "-s", 3, "-n", 200)
    for n in (1, 40, 133):
        first = engine(DEMO, *options, "-i", "Once upon a time", "-s", 3, "-n", n, "--save", file)
        assert first + engine(DEMO, *options, "--load", file, "-n", 200 - n) == whole
    ended = engine(DEMO, *options, "-i", "Once upon a time", "-s", 3, "--save", file)
    result = run(ENGINE, DEMO, *options, "--load", file)
    assert ended.startswith(whole[:200]) and result.stdout == b"" and b"end" in result.stderr and result.returncode == 0


def test_a_loaded_text_is_extended_by_a_prompt_that_begins_with_it():
    """Only what is new is read: of the whole text, or of the old prompt alone; anything else is refused."""
    model, file = mtp_checkpoint("plain"), WORK / "saved prompt"
    made = engine(model, "--ids", "-i", "5 6 7 8", "-n", 6, "-t", 0, "-q", "--save", file).decode().split()
    text = "5 6 7 8 " + " ".join(made)
    for prompt, new in ((text + " 9 10", "9 10"), ("5 6 7 8 11 12", "11 12"), (text, None), ("5 6 7 8 " + " ".join(made[:3]) + " 9", None)):
        result = run(ENGINE, model, "--ids", "-i", prompt, "-n", 8, "-t", 0, "-v", "--load", file)
        assert result.stdout == engine(model, "--ids", "-i", prompt, "-n", 8, "-t", 0, "-q"), prompt
        fed = re.findall(rb"^fed: (.*)$", result.stderr, re.M)
        assert new is None or new.encode() in (fed[0], b" ".join(fed[0].split()[1:])), fed
    for prompt in ("5 6 7", "5 6 9 8", "1"):
        problem = complaint([ENGINE, model, "--ids", "-i", prompt, "-n", 2, "--load", file], FAILED, ["saved prompt"])
        assert problem is None, problem


def test_a_chat_that_generate_goes_on_with_is_saved_as_a_text():
    """The turns of before are gone then: what the prompt and its continuation leave is a text like any other, and can be loaded again."""
    model, chat_file, text_file = chat_model("instruct"), WORK / "chat for generate", WORK / "text after chat"
    options = ["-z", TOKENIZER, "-t", 0, "-q"]
    question = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    for n in (2, 0):                             # the answer was cut off; it came to its end
        engine(model, "-m", "chat", *options, "-i", "Hello", "-n", n, "--save", chat_file)
        for prompt in (question + "Hello there, my", question + "Once"):         # goes on from what was made; goes back to the question
            whole = engine(model, *options, "-i", prompt, "-n", 9)
            first = engine(model, *options, "-i", prompt, "-n", 4, "--load", chat_file, "--save", text_file)
            rest = run(DEBUG_ENGINE, model, *options, "-n", 5, "--load", text_file)
            assert rest.returncode == 0 and whole and first + rest.stdout == whole, (n, prompt, rest.stderr)


def test_saved_chat_goes_on_with_all_its_turns():
    """Chat in two processes, the second with /undo and /regen over turns of the first: as in one."""
    file = WORK / "saved chat"
    for model in (chat_model("instruct"), chat_model("thinking"), chat_model("trimmed"), DEMO):
        for flag in ([], ["-d", 2]) if model == DEMO else ([],):
            options = ["-m", "chat", "-v", "-z", tokenizer_of(model), "-s", 8, "-n", 25, *flag]
            before, after = ["Hello there.", "Who are you?", "Tell me more."], ["/regen", "/undo", "/undo", "/regen", "And now?", "Good."]
            one = run(ENGINE, model, *options, "-y", "Be kind.", stdin="\n".join(before + after).encode())
            a = run(ENGINE, model, *options, "-y", "Be kind.", "--save", file, stdin="\n".join(before).encode())
            b = run(ENGINE, model, *[o for o in options if o not in ("-s", 8)], "--load", file, stdin="\n".join(["/show"] + after).encode())
            assert (a.returncode, b.returncode) == (0, 0), b.stderr
            assert a.stdout + b.stdout == one.stdout
            assert b"Be kind." in b.stderr


def test_chat_saved_in_the_middle_of_an_answer():
    file = WORK / "cut answer"
    for model, question in ((chat_model("thinking"), "Hi"), (DEMO, "Tell me a story about an ant.")):
        options = ["-m", "chat", "-z", tokenizer_of(model), "-q"]
        whole = engine(model, *options, "-s", 2, "-i", question)
        for n in (1, 5, 9):
            first = engine(model, *options, "-s", 2, "-i", question, "-n", n, "--save", file)
            assert first[:-1] + engine(model, *options, "--load", file) == whole, n
    commands = f"/load {file}\nAnd then?\n".encode()
    assert run(ENGINE, DEMO, "-m", "chat", "-q", "-n", 5, stdin=commands).returncode == 0


def test_save_and_load_within_a_chat():
    file = WORK / "from inside"
    model = chat_model("instruct")
    lines = ["Hello", f"/save {file}", "Something else", f"/load {file}", "/load /nowhere", f"/load {TOKENIZER}", "/save /nowhere/at/all",
             f"/save {model}", "Thanks!"]
    output, history = chat(model, lines, "-t", 0)
    check_history(history, "instruct", conversation("instruct", ["Hello", "Thanks!"]), SCRIPT)
    assert output.decode().count("Hello there!") == 3 and read_checkpoint(model)


def test_a_saved_text_that_fills_the_context_stays_within_it():
    file = WORK / "full context"
    model = mtp_checkpoint("plain")
    full = run(ENGINE, model, "--ids", "-i", "5 6 7", "-t", 0, "-c", 32, "-q", "--save", file)
    again = run(DEBUG_ENGINE, model, "--ids", "-t", 0, "-c", 32, "-n", 900, "-q", "--load", file)
    assert (full.returncode, again.returncode) == (0, 0) and not again.stdout.split() and b"full" in again.stderr
    longer = engine(model, "--ids", "-t", 0, "-n", 9, "-q", "--load", file).split()
    assert full.stdout.split() + longer == engine(model, "--ids", "-i", "5 6 7", "-t", 0, "-n", 39, "-q").split()


@pytest.mark.parametrize("lines", [["Hi", "/undo"], ["Hi", "/clear"], ["Hi", "/system Be kind."], ["Hi", "Yes", "/undo", "/undo"],
                                   ["/set repetition_penalty 0.0001", "Hi"], []])
def test_what_was_saved_can_be_loaded(lines):
    file = WORK / "saved after commands"
    options = ["-m", "chat", "-z", TOKENIZER, "-t", 0, "-q"]
    run(DEBUG_ENGINE, chat_model("thinking"), *options, stdin="\n".join(lines + [f"/save {file}"]).encode())
    result = run(DEBUG_ENGINE, chat_model("thinking"), *options, "--load", file, stdin=b"/regen\n/undo\nHello\n")
    assert result.returncode == 0 and result.stdout.decode().endswith(SCRIPTS["thinking"] + "\n"), result.stderr
    file.unlink()


@pytest.mark.parametrize("flavour", ["instruct", "thinking"])
def test_a_refused_message_changes_nothing(flavour):
    """Too long, after /undo, beginning with a newline, or after an answer that the template changes."""
    long = ['"""', "", "word " * 400, '"""']
    lines = ["Hi", *long, "/regen", "Yes?", "/undo", *long, "Yes?", *long]
    result = run(DEBUG_ENGINE, chat_model(flavour), "-m", "chat", "-v", "-z", TOKENIZER, "-t", 0, "-c", 200,
                 stdin="\n".join(lines).encode())
    assert result.returncode == 0 and result.stderr.count(b"context full") == 3
    _, history = chat(chat_model(flavour), lines, "-t", 0, "-c", 200)
    assert history[-1] != 0
    check = conversation(flavour, ["Hi", "Yes?"])
    check_history(history, flavour, check, SCRIPTS.get(flavour, SCRIPT))


def saved_bytes(options=("-n", 9)):
    file = WORK / "whole session"
    engine(mtp_checkpoint("plain"), "--ids", "-i", "5 6 7", "-t", 0, "-q", "--save", file, *options)
    return file, file.read_bytes()


def session_hash(data):
    """README, "Saved conversations": eight bytes at a time, those behind the header first, then the header."""
    header, h = bytearray(data[:144]), 0
    header[24:32] = bytes(8)
    for word in struct.unpack(f"<{len(data) // 8}Q", bytes(data[144:]) + bytes(header)):
        h = (h ^ word) * 0x9E3779B97F4A7C15 % (1 << 64)
        h ^= h >> 29
    return h


def test_damaged_saved_conversations(report):
    """Cut off, a bit turned, and, with a hash made right again, any number in the header or a turn replaced: one line,
    or, where the change is harmless, a text; never a crash."""
    file, data = saved_bytes()
    assert struct.unpack_from("<Q", data, 24)[0] == session_hash(data)
    rng, cases = np.random.default_rng(5), []
    for length in {0, 1, 63, 64, 143, 144, len(data) - 1, len(data) // 2, *rng.integers(0, len(data), 40).tolist()}:
        cases.append((data[:length], True))
    for at in rng.integers(0, len(data), 120).tolist():
        changed = bytearray(data)
        changed[at] ^= 1 << int(rng.integers(8))
        cases.append((bytes(changed), True))
    cases.append((data + bytes(8), True))
    for at in [*range(0, 144, 4), *(len(data) - 4 * i for i in range(1, 40)), *range(144, 144 + 48, 4)]:
        for value in (0xFFFFFFFF, 0x7FFFFFFF, 1, 0x10000, 0x80000000):
            changed = bytearray(data)
            struct.pack_into("<I", changed, at, value)
            struct.pack_into("<Q", changed, 24, session_hash(changed))
            cases.append((bytes(changed), False))

    def outcome(job):
        number, (content, must_fail) = job
        path = WORK / f"damaged session {number % 4}-{number}"
        path.write_bytes(content)
        result = run(DEBUG_ENGINE, mtp_checkpoint("plain"), "--ids", "-n", 3, "-t", 0, "-q", "--load", path, timeout=20)
        path.unlink()
        lines = result.stderr.count(b"\n")
        if result.returncode == 1:
            return lines == 1 and b"damaged session" in result.stderr and result.stdout == b"" or (number, result)
        return result.returncode == 0 and not must_fail and lines <= 1 or (number, result)

    outcomes = parallel(outcome, list(enumerate(cases)))
    report(f"{len(cases)} damaged saved conversations")
    assert all(result is True for result in outcomes), [result for result in outcomes if result is not True][:3]


def test_foreign_saved_conversations():
    """Of another checkpoint, another type of cache, a longer context, another stretch: said which."""
    file, _ = saved_bytes()
    other = mtp_checkpoint("plain", "q8")
    for command, words in (([other], ["model"]), ([mtp_checkpoint("plain"), "--kv", "q8"], ["kv_type"]),
                           ([mtp_checkpoint("plain"), "-c", 5], ["context"]), ([mtp_checkpoint("plain"), "--yarn", 2], ["yarn"])):
        problem = complaint([DEBUG_ENGINE, *command, "--ids", "-n", 2, "--load", file], FAILED, ["whole session", *words])
        assert problem is None, problem
    lines = f"/load {file}\n/load {DEMO}\nHello\n".encode()
    result = run(DEBUG_ENGINE, chat_model("instruct"), "-m", "chat", "-z", TOKENIZER, "-t", 0, "-q", stdin=lines)
    assert result.returncode == 0 and result.stdout.decode() == SCRIPT + "\n" and result.stderr.count(b"\n") == 2


def test_full_disk_leaves_the_old_file_whole(tmp_path):
    """Files may not grow beyond 4 KB here: --save and /save fail with a line, the file of before is still there."""
    file, data = saved_bytes()
    target = tmp_path / "kept"
    target.write_bytes(data)
    limit = dict(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)))
    result = run(ENGINE, mtp_checkpoint("plain"), "--ids", "-i", "5 6", "-n", 4, "-q", "--save", target, **limit)
    assert result.returncode == 1 and b"kept" in result.stderr and result.stderr.count(b"\n") == 1
    result = run(ENGINE, chat_model("instruct"), "-m", "chat", "-z", TOKENIZER, "-t", 0, "-q",
                 stdin=f"Hi\n/save {target}\nHi\n".encode(), **limit)
    assert result.returncode == 0 and result.stdout.decode() == 2 * (SCRIPT + "\n") and b"kept" in result.stderr
    assert target.read_bytes() == data and [path.name for path in tmp_path.iterdir()] == ["kept"]
    result = run(ENGINE, mtp_checkpoint("plain"), "--ids", "-i", "5 6", "-n", 4, "-q", "--save", "/dev/full")
    assert result.returncode == 1 and b"/dev/full" in result.stderr and Path("/dev/full").is_char_device()


def test_interrupted_generation_can_be_saved():
    """Ctrl-C ends it with 130, what there is is saved, and goes on as if nothing had been."""
    file = WORK / "interrupted"
    command = [ENGINE, token_model(), "--ids", "-i", "1 2 3", "-c", "500000", "-s", "1", "-t", "1", "-q"]
    process = subprocess.Popen([*command, "-n", "100000000", "--save", file], stdout=subprocess.PIPE, bufsize=0)
    start = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    ids = (start + process.communicate(timeout=60)[0]).split()
    assert process.returncode == 130
    rest = engine(token_model(), "--ids", "-c", 500000, "-q", "--load", file, "-n", 20).split()
    assert ids + rest == engine(*command[1:], "-n", len(ids) + 20).split()


# ----------------------------------------------------------------------------------------------------------------
# Cases that once went wrong
# ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", ["1e-38", "1e-30", "0.0001"])
def test_a_tiny_temperature_is_greedy(temperature):
    """Dividing by it must not overflow into a distribution of nothing."""
    prompt = ["-i", "Once upon a time", "-n", 20, "-q", "-s", 1]
    assert engine(DEMO, *prompt, "-t", temperature) == engine(DEMO, *prompt, "-t", 0)


def test_a_fenced_message_is_text_wherever_its_line_ends():
    """Text behind the opening quotes (moved inside its own buffer), and a message that begins with a slash."""
    fence = b'"""'
    for message in fence + b"hello there\nand more" + fence, fence + b"/exit\nis what I said" + fence:
        result = run(DEBUG_ENGINE, DEMO, "-m", "chat", "-t", 0, "-n", 3, stdin=message + b"\n")
        assert result.returncode == 0 and b"answer 3 tokens" in result.stderr, result.stderr


def test_the_seed_that_makes_the_generator_zero():
    """seed * 0x9e37... + 0x853c... is 0 modulo 2^64 for one seed; draws must differ from the likeliest token."""
    seed = (-0x853C49E6748FEA9B * pow(0x9E3779B97F4A7C15, -1, 1 << 64)) % (1 << 64)
    options = ["-i", "Once upon a time", "-n", 30, "-q", "-t", 5, "-k", 0, "-p", 1]
    if seed < 9e18:
        assert engine(DEMO, *options, "-s", seed) != engine(DEMO, *options[:5], "-t", 0)
    result = run(ENGINE, DEMO, "-m", "chat", "-q", "-t", 5, "-k", 0, "-p", 1, "-n", 30,
                 stdin=f"/set seed {seed}\nHello\n".encode())
    assert result.stdout != run(ENGINE, DEMO, "-m", "chat", "-q", "-t", 0, "-n", 30, stdin=b"Hello\n").stdout


def test_an_output_never_replaces_an_input(tmp_path):
    """-o naming the model, the tokenizer or the prompt; export.py onto a file of its source."""
    model, tokenizer, prompt = tmp_path / "m.bin", tmp_path / "t.bin", tmp_path / "p.txt"
    shutil.copy(DEMO, model)
    shutil.copy(DEMO_TOKENIZER, tokenizer)
    prompt.write_text("Once upon a time")
    for victim_file in model, tokenizer, prompt:
        before = victim_file.read_bytes()
        result = run(ENGINE, model, "-z", tokenizer, "-m", "logits", "-f", prompt, "-o", victim_file)
        assert result.returncode == 1 and b"being read" in result.stderr and victim_file.read_bytes() == before
    source = tmp_path / "source"
    save(kind_model("plain"), source)
    weights = source / "model.safetensors"
    before = weights.read_bytes()
    result = run(*EXPORT, source, "-o", weights)
    assert result.returncode == 1 and b"being read" in result.stderr and weights.read_bytes() == before


def test_interrupt_ends_bench_with_130():
    """Modes that do not watch for Ctrl-C end at once."""
    process = subprocess.Popen([ENGINE, DEMO, "-m", "bench", "--batch", "1", "--depth", "3000", "-q"], stdout=subprocess.PIPE)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) in (130, -signal.SIGINT)    # the second: it had not even started


def test_a_single_turn_that_does_not_fit_fails():
    """A script must be able to tell it from an empty answer."""
    result = run(ENGINE, DEMO, "-m", "chat", "-c", 30, "-i", "word " * 100)
    assert result.returncode == 1 and result.stdout == b"" and b"context full" in result.stderr


# ----------------------------------------------------------------------------------------------------------------
# 16 Experts from disk
# ----------------------------------------------------------------------------------------------------------------

def least_memory(model):
    """The smallest --memory that a model accepts, in bytes, as the engine itself says it."""
    result = run(ENGINE, model, "--ids", "-i", 1, "--memory", 1)
    assert result.returncode == FAILED
    return int(re.search(rb"at least (\d+) bytes", result.stderr)[1])


def memories(model):
    """From the least that is accepted to one byte less than the file."""
    least, file = least_memory(model), model.stat().st_size
    return [least, least + (file - least) // 5, least + (file - least) // 2, file - 1]


def expert_report(stderr):
    """(experts used, share found in memory, GB read) of -v's line."""
    line = re.search(rb"experts: (\d+) used, ([\d.]+) % of them found in memory; ([\d.]+) GB read", stderr)
    return int(line[1]), float(line[2]) / 100, float(line[3])


@functools.cache
def model_of_large_experts(weights="q8"):
    """A random checkpoint, most of which is experts: 4 layers of 64, each some pages long."""
    config = WORK / "large-experts.json"
    config.write_text(json.dumps(dict(TINY, model_type="qwen3_next", hidden_size=128, moe_intermediate_size=192,
                                      num_experts=64, num_experts_per_tok=4, num_hidden_layers=4)))
    path = WORK / f"large-experts-{weights}.bin"
    result = run(*EXPORT, "--random", config, "--seed", 3, "-o", path, "--type", weights)
    assert result.returncode == 0, result.stderr.decode()
    return path


@pytest.mark.parametrize("kind, weights", [("plain", "f32"), ("130 experts", "q4"), ("130 experts", "bf16"), ("mlp_only_layers", "f32"),
                                           ("sparse step 2", "q4"), ("odd sizes", "q8"), ("odd sizes", "bf16")])
def test_same_bits_with_experts_from_disk(kind, weights):
    """Any limit, batch and number of threads. The small caches hold a part of a layer's experts at a time; batches of
    one token decode, the whole prompt is a scan with reading ahead."""
    model, ids = random_checkpoint(kind, weights), random_ids(200, 300)
    wanted = logits_bits(model, ids)
    for memory in memories(model):
        for options in ([], ["--batch", 1, "-j", 1], ["--batch", 37, "-j", 3]):
            assert logits_bits(model, ids, "--memory", memory, *options) == wanted, (memory, options)


def test_same_bits_with_large_experts_from_disk():
    """Experts of many pages and several requests each, under AddressSanitizer too."""
    for weights in ("f32", "q4"):
        model, ids = model_of_large_experts(weights), random_ids(120, 300)
        wanted = logits_bits(model, ids)
        for memory in memories(model):
            assert logits_bits(model, ids, "--memory", memory) == wanted, memory
        assert engine_logits(model, ids, "--memory", memories(model)[1], program=DEBUG_ENGINE).shape[0] == 120


@pytest.mark.parametrize("weights", ["f32", "q4"])
def test_drafts_and_saved_texts_with_experts_from_disk(weights):
    """The MTP head's experts come through the cache too; a saved text goes on with another limit."""
    model, file = mtp_checkpoint("plain", weights), WORK / "saved from disk"
    options = ["--ids", "-i", "5 6 7 8 9", *SAMPLED, "-s", 5]
    wanted = engine(model, *options, "-n", 40, "-d", 0).split()
    for memory in memories(model):
        assert engine(model, *options, "-n", 40, "-d", 2, "--memory", memory).split() == wanted
        first = engine(model, *options, "-n", 15, "-d", 1, "--memory", memory, "--save", file).split()
        assert first + engine(model, "--ids", "--load", file, "-n", 25).split() == wanted


def test_stopped_while_reading_ahead():
    """A forward that is stopped has asked for the next layer's experts, in vain; their slots make way all the same for the keys and values of
    a longer text. In a copy that lets them with --memory, too, and that is interrupted before the first prompt's third layer."""
    program = compile_copy("stopped while reading ahead", [
        ("cache->room = a->memory ? 0 : keep - fixed;", "cache->room = keep - fixed;"),
        ("if (kind == STOPPABLE && interrupted) return false;",
         "static bool once; if (kind == STOPPABLE && i == 2 && n > 99 && !once) return interrupted = once = true, false;")])
    messages = f"{'one two three ' * 60}\n/system {'one two three ' * 300}\nHello\n".encode()
    result = run(program, DEMO, "-m", "chat", "-s", 1, "-n", 2, "--memory", memories(DEMO)[1], "-j", 1, stdin=messages)
    assert result.returncode == 0 and result.stderr.count(b"stopped before the answer") == 1 and result.stderr.count(b"answer 2 tokens") == 1, result.stderr


def test_no_more_is_read_than_is_missing(report):
    """-v: every expert is read once or not at all, however large the cache; with more memory, less is read."""
    model, found = model_of_large_experts(), []
    experts = [t for name, t in read_checkpoint(model).tensors.items() if "mlp.experts." in name]
    per_expert = sum(t.size for t in experts) / (4 * 64)
    for memory in memories(model):
        result = run(ENGINE, model, "--ids", "-i", "5 6 7", "-n", 60, "-t", 0, "--memory", memory, "-v")
        used, share, gigabytes = expert_report(result.stderr)
        assert used == 4 * 4 * 59 + used_by_prompt(used), used
        missing = (1 - share) * used * per_expert
        assert missing * 0.99 - 2e6 < gigabytes * 1e9 < missing * 1.1 + 2e6        # whole pages, rounded figures
        found.append(share)
    assert found == sorted(found) and found[0] < 0.4 and found[-1] > 0.6, found
    report(f"found in memory: {', '.join(f'{100 * share:.0f} %' for share in found)}")


def used_by_prompt(used):
    """Of the experts used, those of a prompt of three tokens: 4 to 12 in each of 4 layers."""
    return used - 4 * 4 * 59 if 16 <= used - 4 * 4 * 59 <= 48 else 0


def test_enough_memory_means_mapping():
    """--memory of the file's size or more: no cache, and nothing is said of one."""
    model = random_checkpoint("plain", "q8")
    result = run(ENGINE, model, "--ids", "-i", "5 6 7", "-n", 5, "-v", "--memory", model.stat().st_size)
    assert result.returncode == 0 and b"experts" not in result.stderr
    result = run(ENGINE, model, "--ids", "-i", "5 6 7", "-n", 5, "-v", "--memory", model.stat().st_size - 1)
    assert result.returncode == 0 and b"experts" in result.stderr


def test_bench_with_experts_from_disk():
    model = model_of_large_experts()
    lines = engine(model, "-m", "bench", "-c", 512, "-n", 16, "-q", "--memory", memories(model)[2]).decode().splitlines()
    found = {line.split()[0]: float(line.split()[1]) for line in lines}
    for name in ("prefill_from_disk", "prefill_found", "decode_from_disk", "decode_found", "decode_reading"):
        assert found[name] >= 0, name
    assert 0 < found["decode_from_disk"] < 0.01


# ----------------------------------------------------------------------------------------------------------------
# 17 Plots
# ----------------------------------------------------------------------------------------------------------------

@functools.cache
def plots_folder():
    """demo/plots.py beside an engine that writes what it is asked, and what it prints, to a log of its own."""
    folder = WORK / "plots"
    (folder / "demo").mkdir(parents=True)
    for name in "export.py", "demo/plots.py":
        shutil.copy(ROOT / name, folder / name)
    wrapper = folder / "qwen3next"
    wrapper.write_text(f'#!/bin/sh\nout=$("{ENGINE}" "$@")\nstatus=$?\n'
                       f'printf "%s\\n" "> $*" "$out" >> "{folder}/log"\nprintf "%s\\n" "$out"\nexit $status\n')
    wrapper.chmod(0o755)
    return folder


def plots(*options):
    """Run the copy of demo/plots.py, whatever its status."""
    return run(sys.executable, plots_folder() / "demo" / "plots.py", *options)


def measure(*options, table):
    """A quick `plots.py measure` of a tiny model: the result, and for each run of the engine its words and {name: number}."""
    log = plots_folder() / "log"
    log.unlink(missing_ok=True)
    quick = ["--threads", 1, "--prompt", 16, "--tokens", 8]
    result = plots("measure", model_of_large_experts(), "-o", table, *quick, *options)
    runs = [run.split("\n") for run in log.read_text().split("> ")[1:]]
    return result, [(asked.split(), dict(line.split()[:2] for line in lines if line)) for asked, *lines in runs if "bench" in asked]


def read_rows(table):
    """The rows of a table of plots.py: dicts of str by column."""
    names, *rows = [line.split("\t") for line in table.read_text().splitlines()]
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_plots_are_of_the_numbers_that_the_engine_printed(tmp_path):
    table, model = tmp_path / "measured.tsv", model_of_large_experts()
    size, least, label = model.stat().st_size, least_memory(model), "tiny <$5> & é"
    result, runs = measure("--depths", "0,40", "--memory", "1,60,100", "--label", label, table=table)
    assert result.returncode == 0 and f"{least} bytes".encode() in result.stderr, result.stderr
    rows, runs = read_rows(table), [run for run in runs if run[1]]
    assert [(row["axis"], row["x"]) for row in rows] == [
        ("depth", "0"), ("depth", "40"), ("memory", f"{100 * least / size:.4g}"), ("memory", "60"), ("memory", "100")]
    assert [row["limit"] for row in rows] == ["", "", str(least), str(round(0.6 * size)), str(size)]
    for row, (asked, found) in zip(rows, runs, strict=True):
        assert (row["label"], row["model"], row["file_bytes"], row["threads"]) == (label, model.name, str(size), "1")
        assert (row["prefill"], row["decode"]) == (found["prefill_16"], found["decode_8"])
        for name in "decode_found", "decode_from_disk", "decode_disk_speed", "read_bandwidth", "peak_memory":
            assert row[name] == found.get(name, "")
        assert (row["x"] if row["axis"] == "depth" else row["limit"]) in asked
    assert [bool(row["decode_found"]) for row in rows] == [False, False, True, True, False]

    before = table.read_text().splitlines()                     # the same again takes its place, another label does not
    assert measure("--depths", "40", "--memory", "", "--label", label, table=table)[0].returncode == 0
    assert measure("--depths", "40", "--memory", "", table=table)[0].returncode == 0
    after = table.read_text().splitlines()
    assert len(after) == len(before) + 1 and after[:2] + after[3:6] == before[:2] + before[3:]
    result, _ = measure("--depths", "0,100000", "--memory", "", table=table)      # what does not fit the model is left out
    assert result.returncode == 0 and b"depth 100000 is left out" in result.stderr
    assert read_rows(table)[-1]["x"] == "0" and len(read_rows(table)) == len(after)

    pictures = []
    for folder in tmp_path / "once", tmp_path / "twice":
        folder.mkdir()
        assert plots("draw", "-i", table, "-o", folder).returncode == 0
        assert {path.name for path in folder.iterdir()} == {"depth.svg", "memory.svg"}
        pictures.append([(folder / name).read_bytes() for name in ("depth.svg", "memory.svg")])
    assert pictures[0] == pictures[1]
    wanted = [label, model.stem, "decode, tokens/s", "32"], [label, "prefill, tokens/s"]
    for picture, words in zip(pictures[0], wanted):
        texts = list(ElementTree.fromstring(picture).itertext())
        assert len(picture) < 60_000 and all(word in texts for word in words), texts


def test_plots_of_what_is_not_there(tmp_path):
    """One line, status 1, and nothing is written: no model, no table, and tables that are none."""
    table, text, drawn = tmp_path / "measured.tsv", tmp_path / "text", tmp_path / "drawn"
    text.write_text("no model")
    drawn.mkdir()
    script = [sys.executable, plots_folder() / "demo" / "plots.py"]
    draw = [*script, "draw", "-i", table, "-o", drawn]
    problems = [complaint(draw, FAILED, ["measured.tsv"])]
    for model in tmp_path / "no.bin", text:
        problems.append(complaint([*script, "measure", model, "-o", table], FAILED, [model.name]))
    assert problems == [None] * 3 and not table.exists(), problems

    names = (ROOT / "demo" / "measured.tsv").read_text().split("\n")[0]
    good = dict.fromkeys(names.split("\t"), "") | dict(label="l", model="m", axis="depth")
    good |= dict.fromkeys(("file_bytes", "threads", "x", "prefill", "decode"), "1")
    bad = {"empty": b"", "names": f"{names}\tmore\n".encode(), "UTF-8": b"\xff\xfe", "fields": f"{names}\na\n".encode()}
    for column, value in ("decode", "fast"), ("decode", ""), ("x", "nan"), ("axis", "time"), ("label", "a\x07"):
        bad[column, value] = "\n".join([names, "\t".join((good | {column: value}).values()), ""]).encode()
    for what, content in bad.items():
        table.write_bytes(content)
        problem = complaint(draw, FAILED, ["measured.tsv: "])
        assert problem is None and not list(drawn.iterdir()), (what, problem)
    problem = complaint([*script, "measure", model_of_large_experts(), "-o", table], FAILED, ["measured.tsv: "])
    assert problem is None and table.read_bytes() == content, problem


# ----------------------------------------------------------------------------------------------------------------
# 17a GGUF: files as llama.cpp's converter writes them
# ----------------------------------------------------------------------------------------------------------------

GGML = gguf.GGMLQuantizationType
NEXTN = {"mtp.fc.weight": "eh_proj", "mtp.pre_fc_norm_embedding.weight": "enorm", "mtp.pre_fc_norm_hidden.weight": "hnorm",
         "mtp.norm.weight": "shared_head_norm"}


def llama_tensors(model, mtp={}, legacy=False):
    """What llama.cpp's converter makes of a model (and of mtp.* tensors): name -> float32 array. Its transformations: 1
    added to all norms but the gated one, -exp(A_log), the convolution without its middle axis, experts stacked, q k v and z
    of all key heads behind each other. Older (legacy) files have q k v z as they were."""
    c, n = model.config, model.config.num_hidden_layers
    names, tensors, stacks = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3NEXT, n + 1), {}, {}
    source = {**per_expert(model), **mtp}
    for name, tensor in source.items():
        x = tensor.float().numpy()
        if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight") or "pre_fc_norm" in name:
            x = x + np.float32(1)
        if name in NEXTN:
            tensors[f"blk.{n}.nextn.{NEXTN[name]}.weight"] = x
            continue
        name = name.replace("mtp.layers.0", f"model.layers.{n}").replace("dt_bias", "dt_proj.bias")
        if expert := re.fullmatch(r"(.*\.experts)\.(\d+)(\..*)", name):
            stacks.setdefault(expert[1] + expert[3], {})[int(expert[2])] = x
            continue
        if name.endswith("A_log"):
            x = -torch.exp(tensor.float()).numpy()
        if name.endswith("conv1d.weight"):
            x = x[:, 0]
        if name.endswith("in_proj_qkvz.weight") and not legacy:
            heads = x.reshape(c.linear_num_key_heads, -1, x.shape[1])
            dk, dv = c.linear_key_head_dim, c.linear_value_head_dim * c.linear_num_value_heads // c.linear_num_key_heads
            parts = [part.reshape(-1, x.shape[1]) for part in np.split(heads, np.cumsum([dk, dk, dv]), axis=1)]
            block = name.replace("model.layers.", "blk.").partition(".linear_attn")[0]
            tensors[block + ".attn_qkv.weight"], tensors[block + ".attn_gate.weight"] = np.concatenate(parts[:3]), parts[3]
            continue
        tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = x
    for name, experts in stacks.items():
        tensors[names.get_name(name, try_suffixes=(".weight",))] = np.stack([experts[e] for e in range(len(experts))])
    assert None not in tensors
    return tensors


def llama_meta(model, mtp=False):
    """The converter's metadata of a model, without "qwen3next."."""
    c, scaling = model.config, dict(model.config.rope_parameters)
    meta = {
        "block_count": c.num_hidden_layers + mtp, "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size, "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads, "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim, "attention.value_length": c.head_dim,
        "rope.freq_base": float(scaling["rope_theta"]), "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.dimension_count": int(c.head_dim * scaling["partial_rotary_factor"]), "expert_count": c.num_experts,
        "expert_used_count": c.num_experts_per_tok, "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_shared_feed_forward_length": c.shared_expert_intermediate_size, "ssm.conv_kernel": c.linear_conv_kernel_dim,
        "ssm.state_size": c.linear_key_head_dim, "ssm.group_count": c.linear_num_key_heads,
        "ssm.time_step_rank": c.linear_num_value_heads, "ssm.inner_size": c.linear_value_head_dim * c.linear_num_value_heads}
    if mtp:
        meta["nextn_predict_layers"] = 1
    if scaling["rope_type"] != "default":
        meta.update({"rope.scaling.type": scaling["rope_type"], "rope.scaling.factor": scaling["factor"]})
    if scaling["rope_type"] == "yarn":
        meta["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    return meta


def llama_tokenizer(tokenizer, vocab_size, template=None):
    """The converter's metadata of a `tokenizers` object, a template and with_tokenizer's generation_config.json."""
    added = {i: token for i, token in tokenizer.get_added_tokens_decoder().items()}
    text = lambda i: tokenizer.id_to_token(i)
    kinds = [5 if text(i) is None else 1 if i not in added else
             3 if added[i].special or re.fullmatch(r"<\|.*\|>", text(i)) else 4 for i in range(vocab_size)]
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    ids = {name: tokenizer.token_to_id(token) for name, token in (("eos", "<|im_end|>"), ("padding", "<|endoftext|>"))}
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.tokens": [f"[PAD{i}]" if text(i) is None else text(i) for i in range(vocab_size)],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        **{f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items()},
        **({"tokenizer.chat_template": template} if template else {}),
        "general.sampling.temp": 0.7, "general.sampling.top_p": 0.8, "general.sampling.top_k": 20}


def as_type(name, x, kind):
    """(type, bytes, values) of a float32 array stored as the converter stores it under --outtype kind: vectors, routers and
    convolutions stay F32, rows that are not whole blocks become F16."""
    if x.ndim == 1 or re.search(r"ffn_gate_inp|conv1d|(?<!ssm)_norm.weight", name):
        kind = GGML.F32
    if x.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = GGML.F16
    raw = gguf.quants.quantize(x, kind)
    return kind, raw, gguf.quants.dequantize(raw, kind)


def write_gguf(path, tensors, meta, kind=GGML.F32, architecture="qwen3next", parts=None):
    """A GGUF file of {name: float32, or (type, bytes)}; metadata of other keys than general.* and so on are the model's.
    With parts each file has so many tensors. Returns the path of the (first) file."""
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=parts or 0)
    for key, value in meta.items():
        key = key if re.match("general|tokenizer|split", key) else f"{architecture}.{key}"
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, x in tensors.items():
        stored, raw = x if isinstance(x, tuple) else as_type(name, x, kind)[:2]
        writer.add_tensor(name, raw, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if path.exists() else min(path.parent.glob(f"{path.stem}-*.gguf"))


def import_gguf(source, *options):
    """export.py on a file, in this process: the path of the result."""
    folder = Path(tempfile.mkdtemp(dir=WORK))
    (folder / "out").mkdir()
    assert outcome(folder, source, "-o", folder / "out" / "model.bin", *options) == ""
    return folder / "out" / "model.bin"


GGUF_KINDS = ("plain", "head dims differ", "n_v = n_k", "n_v = 3 n_k", "tied", "attention_bias", "layer order", "rope",
              "yarn", "linear rope", "conv 3, kv = heads", "odd sizes", "all linear", "all attention")


@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_gguf_gives_the_bytes_of_hugging_face(kind, tmp_path):
    """A bfloat16 model with MTP head and tokenizer, exported from both: the same file, whatever it is stored as."""
    model = kind_model(kind, bf16=True)
    mtp = {name: x.to(torch.bfloat16).contiguous() for name, x in mtp_tensors(model).items()}
    source = save_packed(model, tmp_path / "hf", torch.bfloat16)
    save_file({**load_file(source / MODEL), **mtp}, source / MODEL, {"format": "pt"})
    meta, vocab_size = llama_meta(model, mtp=True), model.config.vocab_size
    if vocab_size > 340:
        with_tokenizer(source, small_tokenizer()[1], TEMPLATES["trimmed"] if kind == "plain" else None)
        meta.update(llama_tokenizer(small_tokenizer()[1], vocab_size, TEMPLATES["trimmed"] if kind == "plain" else None))
    tensors = llama_tensors(model, mtp, legacy=kind in ("n_v = n_k", "rope"))
    file = write_gguf(tmp_path / "model.gguf", tensors, meta, GGML.BF16 if kind != "tied" else GGML.F32)
    for weights in ("f32", "bf16", "q4") if kind in ("plain", "odd sizes") else ("f32",):
        ours, theirs = import_gguf(file, "--type", weights, "--check"), import_gguf(source, "--type", weights)
        assert ours.read_bytes() == theirs.read_bytes()
        tokenizer = ours.with_name("tokenizer.bin")
        assert tokenizer.exists() == (vocab_size > 340) and (
            not tokenizer.exists() or tokenizer.read_bytes() == theirs.with_name("tokenizer.bin").read_bytes())
    assert read_checkpoint(ours).scalar("has_mtp") == 1 and bool(chat_pieces(ours)) == (kind == "plain")


@pytest.mark.parametrize("kind", [GGML.F32, GGML.F16, GGML.BF16, GGML.Q8_0, GGML.Q4_0, GGML.Q4_1, GGML.Q5_0, GGML.Q5_1,
                                  GGML.MXFP4, GGML.TQ1_0, GGML.TQ2_0], ids=lambda kind: kind.name)
def test_gguf_logits_equal_transformers(kind, tmp_path, report):
    """transformers computes with the values that the file stands for."""
    for seed in itertools.count():
        model = random_model(seed, vocab_size=320, hidden_size=256, num_hidden_layers=2, layer_types=[LINEAR, FULL],
                             num_experts=8, num_experts_per_tok=2, shared_expert_intermediate_size=64)
        tensors = llama_tensors(model)
        for name, weight in model.named_parameters():       # blocks lie along rows, which only change places
            if weight.ndim > 1 and not name.endswith(("gate.weight", "conv1d.weight")):
                weight.copy_(torch.from_numpy(as_type(name, weight.numpy(), kind)[2]))
        if router_margin(model, random_ids(65, 300)) > 1e-4:
            break
    file = write_gguf(tmp_path / "model.gguf", tensors, llama_meta(model), kind)
    ids = random_ids(65, 300)
    reference = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    error = logits_error(engine_logits(import_gguf(file, "--type", "f32", "--check"), ids), reference)
    report(f"{kind.name}: error {error:.1e} of the standard deviation")
    assert error < TOLERANCE


QUANTIZED_TYPES = [kind for kind, (block, _) in gguf.GGML_QUANT_SIZES.items()
                   if block > 1 and kind.name not in ("Q8_1", "Q8_K", "Q1_0")]      # which the package cannot decode


@pytest.mark.parametrize("kind", QUANTIZED_TYPES, ids=lambda kind: kind.name)
def test_gguf_blocks_of_every_type(kind, tmp_path):
    """Rows of random blocks, any part of them, are what the gguf package makes of all."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(kind.value).integers(0, 256, (4000, size), np.uint8)
    with np.errstate(all="ignore"):
        fine = np.abs(gguf.quants.dequantize(raw, kind)).max(1) < 1e30          # a scale may be NaN
    raw = raw[fine][:3 * 17 * 2].reshape(3, 17, -1)
    file = write_gguf(tmp_path / "x.gguf", {"x": (kind, raw)}, {})
    source, whole = exporter().GGUFTensors([file]), gguf.quants.dequantize(raw.reshape(51, -1), kind)
    assert source.shape("x") == (3, 17, 2 * block) and whole.any()
    source.check_type("x")
    for first, count in ((0, 51), (0, 1), (50, 1), (16, 3), (7, 30)):
        assert np.array_equal(source.rows("x", first, count), whole[first:first + count])


@functools.cache
def tiny_gguf():
    """(tensors, metadata) of the model of tiny_source, with its tokenizer."""
    source = stranger()
    model = Qwen3NextForCausalLM.from_pretrained(source / "hf", dtype=torch.float32).eval()
    return llama_tensors(model), {**llama_meta(model), **llama_tokenizer(small_tokenizer()[1], model.config.vocab_size)}


def gguf_folder(tensors={}, meta={}, **options):
    """A folder with room for the output in `out` and the tiny model in hf/model.gguf, some tensors and metadata changed;
    None takes one away."""
    folder = Path(tempfile.mkdtemp(dir=WORK))
    (folder / "hf").mkdir()
    (folder / "out").mkdir()
    both = [{name: x for name, x in {**old, **new}.items() if x is not None}
            for old, new in zip(tiny_gguf(), (tensors, meta))]
    write_gguf(folder / "hf" / "model.gguf", *both, **options)
    return folder


def test_gguf_layouts(tmp_path):
    """q k v fused, gate and up fused, leading axes of length 1 left out, float64, scales beside tensors: the same."""
    tensors, meta = tiny_gguf()
    source = gguf_folder()
    plain = import_gguf(source / "hf" / "model.gguf", "--type", "f32").read_bytes()
    take = lambda *names: {name: None for name in names}
    qkv = [f"blk.1.attn_{x}.weight" for x in "qkv"]
    experts = [f"blk.1.ffn_{x}_exps.weight" for x in ("gate", "up")]
    gate, powers = "blk.0.ffn_gate_inp_shexp.weight", np.exp2(np.arange(4, dtype=np.float32))
    layouts = [{**take(*qkv), "blk.1.attn_qkv.weight": np.concatenate([tensors[name] for name in qkv])},
               {**take(*experts), "blk.1.ffn_gate_up_exps.weight": np.concatenate([tensors[name] for name in experts], 1)},
               {gate: tensors[gate].reshape(-1),
                "token_embd.weight": (GGML.F64, tensors["token_embd.weight"].astype(np.float64))},
               {experts[0]: tensors[experts[0]] / powers[:, None, None], experts[0].replace("weight", "scale"): powers,
                qkv[0]: tensors[qkv[0]] * np.float32(-4), qkv[0].replace("weight", "scale"): np.full(1, -0.25, np.float32),
                qkv[0].replace("weight", "input_scale"): np.full(1, 9, np.float32)}]
    for changes in layouts:
        folder = gguf_folder(changes)
        assert import_gguf(folder / "hf" / "model.gguf", "--type", "f32").read_bytes() == plain


def test_gguf_of_several_files(tmp_path):
    """Any part, or the folder, means all; parts that are missing, doubled or of another set are named."""
    folder = gguf_folder()
    plain = import_gguf(folder / "hf" / "model.gguf").read_bytes()
    (folder / "hf" / "model.gguf").unlink()
    write_gguf(folder / "hf" / "m.gguf", *tiny_gguf(), parts=10)
    files = sorted((folder / "hf").iterdir())
    assert len(files) == 4
    for source in (*files, folder / "hf"):
        assert import_gguf(source, "--check").read_bytes() == plain
    assert "output is one of the files" in outcome(folder, files[0], "-o", files[1]) and not list((folder / "out").iterdir())
    first, second = files[0].read_bytes(), files[1].read_bytes()
    for data, words in ((None, [files[1].name, "missing"]), (first, ["split.no", files[1].name]),
                        (files[2].read_bytes(), ["split.no"]),
                        (second.replace(b"split.count\2\0\0\0\4", b"split.count\2\0\0\0\5"), ["split.count", files[1].name]),
                        (second.replace(b"split.no", b"split.xx"), ["split.no"]), (b"GGUF", [files[1].name])):
        files[1].unlink(missing_ok=True)
        data is None or files[1].write_bytes(data)
        for source in (files[0], files[3], folder / "hf"):
            message = outcome(folder, source=source)
            assert all(word in message for word in words), message
    files[1].unlink()
    files[1].symlink_to(ROOT / "README.md")
    assert "leads out of the folder" in outcome(folder, source=files[0])
    files[0].rename(folder / "hf" / "alone.gguf")
    assert "split.count" in outcome(folder, source="hf/alone.gguf")
    assert "one model" in outcome(folder)
    for name in ("x-00005-of-00004.gguf", "x-00000-of-00000.gguf", "x-00000-of-00004.gguf"):
        shutil.copy(files[3], folder / "hf" / name)
        assert "number of the part" in outcome(folder, source=f"hf/{name}")


def test_gguf_heads_for_drafts(tmp_path):
    """--mtp of a GGUF file, of such a file for a safetensors source and the other way round: the bytes of all in one."""
    model = kind_model("plain", bf16=True)
    mtp = {name: x.to(torch.bfloat16).contiguous() for name, x in mtp_tensors(model).items()}
    whole = write_gguf(tmp_path / "whole.gguf", llama_tensors(model, mtp), llama_meta(model, mtp=True))
    main = write_gguf(tmp_path / "main.gguf", llama_tensors(model), llama_meta(model))
    head = {name: x for name, x in llama_tensors(model, mtp).items() if not re.match(r"blk\.[0-3]\.", name)}
    head = write_gguf(tmp_path / "mtp.gguf", head, llama_meta(model, mtp=True))
    hf = save_packed(model, tmp_path / "hf", torch.bfloat16)
    save_file(mtp, tmp_path / "mtp.safetensors", {"format": "pt"})
    wanted = import_gguf(whole).read_bytes()
    for source in (main, hf):
        for heads in (head, whole, tmp_path / "mtp.safetensors"):
            assert import_gguf(source, "--mtp", heads).read_bytes() == wanted
    folder = Path(tempfile.mkdtemp(dir=WORK))
    (folder / "out").mkdir()
    assert "mtp tensors" in outcome(folder, "--mtp", main, source=main)
    assert "is missing" in outcome(folder, source=head)


def test_gguf_tokenizer_is_the_real_one():
    """The real tokenizer, as the converter writes it, comes back byte by byte; Qwen3.5's pattern is known by its name."""
    file = real_file()
    tokens = llama_tokenizer(real_tokenizer(), len(file.tokens) + 267)
    assert tokens["tokenizer.ggml.token_type"].count(5) == 267
    source = object.__new__(exporter().GGUF)
    source.path, source.meta = Path("x.gguf"), tokens
    assert source.tokenizer().data == file.data
    tokens["tokenizer.ggml.pre"] = "qwen35"
    assert source.tokenizer().pattern == 1


def without(*names):
    return dict.fromkeys(names)


GGUF_STRANGERS = [
    *[(f"architecture {name}", {}, {}, dict(architecture=name), ["general.architecture", name])
      for name in ("qwen35", "qwen35moe", "llama", "")],
    *[(f"{key} {value!r:.20}", {}, {key: value}, {}, [word or key]) for key, value, word in [
        ("general.type", "adapter", None), ("block_count", None, None), ("block_count", 0, None),
        ("block_count", 3, "is missing"), ("block_count", 1, "blk.1"), ("block_count", 1 << 20, None),
        ("block_count", "2", None), ("block_count", [2], None), ("nextn_predict_layers", 2, None),
        ("nextn_predict_layers", -1, None), ("embedding_length", 32, "shape"),
        ("embedding_length", [1, 2], "hidden_size"), ("attention.head_count", 0, "num_attention_heads"),
        ("attention.head_count_kv", 3, "num_attention_heads"),
        ("attention.head_count_kv", [2, 2], "num_key_value_heads"), ("attention.key_length", 12, "value_length"),
        ("attention.key_length", "8", "value_length"), ("attention.layer_norm_rms_epsilon", math.nan, "rms_norm_eps"),
        ("rope.dimension_count", 0, None), ("rope.dimension_count", 9, None),
        ("rope.dimension_count", 3, "partial_rotary_factor"), ("rope.freq_base", 0.0, "rope_theta"),
        ("rope.scaling.type", "longrope", None), ("rope.scaling.type", ["yarn"], None),
        ("rope.scaling.type", "yarn", "factor"), ("rope.scaling.yarn_ext_factor", 0.5, None),
        ("rope.scaling.attn_factor", 2.0, None), ("expert_used_count", 5, "num_experts_per_tok"),
        ("expert_count", 3, "ffn"), ("expert_weights_scale", 2.5, None), ("expert_weights_norm", 7, "norm_topk_prob"),
        ("expert_gating_func", 2, None), ("attention.causal", False, None), ("ssm.inner_size", 15, None),
        ("ssm.time_step_rank", 3, "ssm.inner_size"), ("ssm.group_count", 3, "linear_num_value_heads"),
        ("ssm.state_size", 1 << 30, "linear_key_head_dim"), ("tokenizer.ggml.model", "llama", None),
        ("tokenizer.ggml.model", 7, None), ("tokenizer.ggml.pre", "gpt-2", None), ("tokenizer.ggml.pre", None, None),
        ("tokenizer.ggml.tokens", ["a"], "token_type"), ("tokenizer.ggml.tokens", "ab", None),
        ("tokenizer.ggml.tokens", ["a"] * 352, "another text"), ("tokenizer.ggml.tokens", list(range(352)), "token 0"),
        ("tokenizer.ggml.token_type", [2] * 352, "token 0"), ("tokenizer.ggml.token_type", [5] * 352, "vocab"),
        ("tokenizer.ggml.merges", ["a"], "merges"), ("tokenizer.ggml.merges", None, "merges"),
        ("tokenizer.ggml.eos_token_id", 352, "eos_token_id"), ("tokenizer.ggml.eot_token_id", "x", "eos_token_id"),
        ("general.sampling.temp", math.nan, "temperature"), ("general.sampling.top_k", "x", "top_k"),
        ("general.alignment", 24, None), ("general.alignment", 0, None), ("split.count", 2, None),
        ("split.no", 1, None)]],
    *[(f"without {name}", without(name), {}, {}, [word]) for name, word in [
        ("token_embd.weight", "token_embd.weight"), ("output_norm.weight", "model.norm.weight"),
        ("blk.0.ssm_a", "A_log"), ("blk.0.attn_gate.weight", "in_proj_qkvz"), ("blk.1.attn_q.weight", "q_proj"),
        ("blk.1.ffn_up_exps.weight", "is missing"), ("blk.1.ffn_down_exps.weight", "down_proj")]],
    *[(f"{name} {x.shape}", {name: x}, {}, {}, [word or name]) for name, x, word in [
        ("blk.0.ssm_a", np.ones(4, np.float32), None), ("blk.0.ssm_a", np.zeros(4, np.float32), None),
        ("blk.0.ssm_a", np.full(5, -1, np.float32), "A_log"),
        ("blk.0.attn_qkv.weight", np.ones((7, 16), np.float32), None),
        ("blk.0.attn_gate.weight", np.ones((16, 8), np.float32), None),
        ("blk.1.ffn_up_exps.weight", np.ones((4, 8), np.float32), None),
        ("blk.0.ssm_in.weight", np.ones((40, 16), np.float32), "ssm_in"),
        ("blk.1.attn_q.weight", np.full((64, 16), np.nan, np.float32), None),
        ("blk.1.attn_q.weight", np.full((64, 16), np.inf, np.float32), None),
        ("blk.0.ffn_gate.weight", np.ones((4, 16), np.float32), None),
        ("blk.1.nextn.embed_tokens.weight", np.ones((4, 16), np.float32), None),
        ("rope_freqs.weight", np.ones(4, np.float32), None), ("lm_head.weight", np.ones((352, 16), np.float32), None),
        ("x" * 64, np.ones(4, np.float32), "bytes"), ("blk.1.attn_q.scale", np.ones(3, np.float32), None),
        ("blk.1.attn_q.scale", np.full(1, 1e38, np.float32), None),
        ("blk.1.attn_q.scale", np.full(1, np.nan, np.float32), None)]],
    ("type I8", {"token_embd.weight": (GGML.I8, np.zeros((352, 16), np.int8))}, {}, {}, ["token_embd.weight", "I8"]),
    ("type Q8_1", {"output.weight": (GGML.Q8_1, np.zeros((352, gguf.GGML_QUANT_SIZES[GGML.Q8_1][1]), np.uint8))}, {}, {},
     ["output.weight", "shape"]),
    ("a product too large", {"blk.1.attn_q.scale": np.full(1, 8e37, np.float32),
                             "blk.1.attn_q.weight": np.full((64, 16), 2, np.float32)}, {}, {}, ["attn_q.weight", "magnitude"]),
]


@pytest.mark.parametrize("what, tensors, meta, options, words", GGUF_STRANGERS, ids=[case[0] for case in GGUF_STRANGERS])
def test_gguf_strangers_are_refused_in_one_line(what, tensors, meta, options, words):
    folder = gguf_folder(tensors, meta, **options)
    message = outcome(folder, source="hf/model.gguf")
    assert "model.gguf: " in message and all(word in message for word in words), message
    shutil.rmtree(folder)


def gguf_damages():
    """(what, bytes, word of the message) of headers that are wrong."""
    data = (gguf_folder() / "hf" / "model.gguf").read_bytes()
    behind = lambda text: data.index(text) + len(text)
    key, tokens = behind(b"qwen3next.block_count"), behind(b"tokenizer.ggml.tokens")
    name, second = behind(b"token_embd.weight"), behind(b"blk.0.attn_norm.weight")
    offset = lambda at: at + 4 + 8 * struct.unpack_from("<I", data, at)[0] + 4
    for n in (0, 3, 4, 7, 8, 20, 24, 40, key, key + 5, tokens + 100, name, name + 9, len(data) - 40_000, len(data) - 100):
        yield f"cut after {n} bytes", data[:n], "model.gguf"
    for at, form, value, word in [
            (0, "I", 0, "magic"), (4, "I", 1, "2 or 3"), (4, "I", 4, "2 or 3"), (4, ">I", 3, "big-endian"),
            *[(8, "Q", n, "") for n in HUGE["Q"]], *[(16, "Q", n, "") for n in HUGE["Q"]], (24, "Q", 1 << 40, "bytes"),
            (24, "Q", 1 << 20, "beyond"), (key, "I", 13, "type"), (key, "I", 9, ""),
            (tokens + 4, "I", 9, "type of items"), (tokens + 4, "I", 99, "type of items"),
            *[(tokens + 8, "Q", n, "") for n in HUGE["Q"]], *[(tokens + 16, "Q", n, "") for n in HUGE["Q"][2:]],
            (tokens + 24, "B", 0xFF, "UTF-8"), (name - 1, "B", 0xFF, "UTF-8"), (name, "I", 0, "rank"),
            (name, "I", 5, "rank"), (name, "I", 1 << 31, "rank"),
            *[(name + 4, "Q", n, "token_embd") for n in HUGE["Q"][3:]], (name + 4, "Q", 0, "axis"),
            (name + 20, "I", 4, "type"), (name + 20, "I", 1 << 31, "type"), (name + 20, "I", 2, "blocks"),
            *[(offset(name), "Q", n, "offset") for n in HUGE["Q"][1:]], (offset(second), "Q", 0, "overlaps")]:
        changed = bytearray(data)
        struct.pack_into(form if form[0] == ">" else "<" + form, changed, at, value)
        yield f"{form} {value} at {at}", bytes(changed), word
    yield "two keys alike", data.replace(b"ssm.group_count", b"ssm.conv_kernel"), "stands twice"
    yield "two tensors alike", data.replace(b"blk.1.attn_k.weight", b"blk.1.attn_v.weight"), "stands twice"


def test_gguf_headers_that_are_wrong(report):
    """Cut short, of another version, with counts, lengths, types and offsets that lead anywhere: one line each."""
    damages = list(gguf_damages())
    for what, data, word in damages:
        folder = Path(tempfile.mkdtemp(dir=WORK))
        (folder / "out").mkdir()
        (folder / "model.gguf").write_bytes(data)
        message = outcome(folder, source="model.gguf")
        assert "model.gguf: " in message and word in message, (what, message)
        shutil.rmtree(folder)
    report(len(damages), "headers")


def test_mutated_gguf(report):
    """A good file with a few bytes changed, mostly of its header: a file that the engine takes, or one line."""
    rng, refused, count = random.Random(17), 0, 300
    short = {key: None for key in tiny_gguf()[1] if key.startswith("tokenizer.ggml")}
    for meta in (short, {}):
        data = (gguf_folder(meta=meta) / "hf" / "model.gguf").read_bytes()
        header = len(data) - sum(x.nbytes for x in tiny_gguf()[0].values())
        for number in range(count // 2):
            folder = Path(tempfile.mkdtemp(dir=WORK))
            (folder / "out").mkdir()
            at = rng.randrange(header)
            changed = data[:at] + mutated(data[at:at + 60], rng) + data[at + 60:] if number % 6 else mutated(data, rng)
            (folder / "model.gguf").write_bytes(changed)
            try:
                message = outcome(folder, source="model.gguf")
            except BaseException:
                report("what was tried:", at, changed[max(0, at - 100):at + 200])
                raise
            assert not message or "model.gguf" in message, message
            refused += bool(message)
            shutil.rmtree(folder)
    report(f"{refused} of {count} refused")


# ----------------------------------------------------------------------------------------------------------------
# 18 Fuzzing and faults
# ----------------------------------------------------------------------------------------------------------------

FUZZ_TARGETS = ("checkpoint", "heads", "tokenizer", "saved", "text", "spans", "chat", "options")     # qwen3next.c, section 23

# As small as can be, so that most of a file is directory: a mutation then meets something that is read.
SMALLEST = dict(
    model_type="qwen3_next", vocab_size=40, hidden_size=16, num_hidden_layers=2, layer_types=[LINEAR, FULL],
    max_position_embeddings=256, num_attention_heads=2, num_key_value_heads=1, head_dim=8, linear_num_key_heads=1,
    linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=3, num_experts_per_tok=2,
    moe_intermediate_size=8, shared_expert_intermediate_size=8, intermediate_size=8, mtp=True, eos_token_id=3,
    **rope(partial=0.5))
SMALLEST_KINDS = {
    "mtp": {}, "linear": dict(layer_types=[LINEAR], num_hidden_layers=1, mtp=False),
    "attention": dict(layer_types=[FULL], num_hidden_layers=1, mtp=False), "dense": dict(mlp_only_layers=[0, 1], mtp=False),
    "yarn": rope(partial=1.0, rope_type="yarn", factor=2.0, original_max_position_embeddings=32)}

FUZZ_CHATS = [
    "Hello, who are you?\n", "Hi\n/undo\nHo\n/regen\n/regen\n", '"""\n/exit is what\nI said\n"""\n/clear\nAgain\n', "/help\n/?\n/nothing\n",
    "/system You are an owl.\nHi\n/save a\nMore\n/load a\n/show\n/exit\nunheard\n", "/set temp 2\n/set top_k 3\n/set seed 7\n/set n 2\nHi\n/set n x\n",
    "/think\n/nothink\nHi\n/read a\n/save\n/load b\n", "<|im_start|>system\n<|im_end|><think>\n", "Hi\n\nHi", '"""open', '"""a"""\n"""""" \n', "/undo\n/regen\n",
    "\u00e9\u0323\u0301 \ud55c\uae00 \u0000 \U0001f44d\n", "word " * 60 + "\n/undo\nHi\n"]


def fuzz_model(path):
    """A checkpoint of the small vocabulary with everything: chat pieces that change answers, MTP head, both kinds of layers."""
    changes = {key: value for key, value in SMALLEST.items() if key not in ("model_type", "mtp", "eos_token_id")}
    model = random_model(2, **{**changes, "vocab_size": 352})
    source = with_tokenizer(save(model, WORK / "hf" / "fuzz"), small_tokenizer()[1], TEMPLATES["thinking"])
    save_file(mtp_tensors(model), WORK / "hf" / "fuzz-mtp.safetensors", {"format": "pt"})
    return export(source, path, "--type", "bf16", "--mtp", WORK / "hf" / "fuzz-mtp.safetensors")


def fuzz_seeds(folder):
    """Write model.bin, answer.bin, tokenizer.bin and, for every target, a folder of seeds: where `make fuzz` begins."""
    for target in FUZZ_TARGETS:
        (folder / target).mkdir(parents=True, exist_ok=True)

    def seed(target, name, data):
        (folder / target / name).write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))

    model, tokenizer = fuzz_model(folder / "model.bin"), folder / "tokenizer.bin"
    seed("checkpoint", "chat", model.read_bytes())
    for kind, changes in SMALLEST_KINDS.items():
        (WORK / "smallest.json").write_text(json.dumps({**SMALLEST, **changes}))
        for weights in TYPES:
            result = run(*EXPORT, "--random", WORK / "smallest.json", "--seed", 1, "--type", weights, "-o", WORK / "smallest.bin")
            assert result.returncode == 0, result.stderr
            seed("checkpoint", f"{kind}-{weights}", (WORK / "smallest.bin").read_bytes())
    for architecture in ("Qwen3NextForSequenceClassification", "Qwen3NextForTokenClassification", "Qwen3NextForQuestionAnswering"):
        config = {**SMALLEST, "architectures": [architecture], "mtp": False, "vocab_size": 352, "id2label": {"0": "no", "1": "yes"}, "pad_token_id": 1}
        (WORK / "smallest.json").write_text(json.dumps(config))
        result = run(*EXPORT, "--random", WORK / "smallest.json", "--seed", 1, "--type", "f32", "-o", folder / "answer.bin")
        assert result.returncode == 0, result.stderr
        seed("heads", architecture, (folder / "answer.bin").read_bytes())
    small = small_tokenizer()[0].read_bytes()
    seed("tokenizer", "small", small)
    for number, text in enumerate(FUZZ_CHATS):
        seed("chat", str(number), text)
        seed("text", str(number), text)
    rng = random.Random(1)
    for number in range(20):
        seed("text", f"characters-{number}", "".join(random_character(rng) for _ in range(rng.choice([3, 30, 300]))))
        seed("spans", f"marks-{number}", "".join(rng.choice(rng.choice((MARKS, BASES, JAMO, SPECIALS))) for _ in range(rng.choice([3, 10, 30]))))
    for number, line in enumerate(BAD_COMMANDS + ["-i x -t 0.5 -p .9 -k 40 -s 1 -n 5 -c 64 -j 2 -d 3 -q -v --echo",
                                                  "-m chat -y text --save a --load b", "-m bench --depth 5 --prompt 3 --memory 1.5G"]):
        seed("options", str(number), "model\n" + "\n".join(re.split(r"\s{2,}", line)[0].split()))
    saved = WORK / "fuzz saved"
    for number, options in enumerate((["-n", 5], ["-n", 40, "-t", 1, "-s", 3], ["-d", 0, "-n", 3])):
        engine(model, "-z", tokenizer, "-i", "The owl", "-c", 64, "-q", "--save", saved, *options)
        seed("saved", f"text-{number}", saved.read_bytes())
    for number, lines in enumerate((FUZZ_CHATS[0], FUZZ_CHATS[1], FUZZ_CHATS[4])):
        result = run(ENGINE, model, "-m", "chat", "-z", tokenizer, "-c", 96, "-n", 3, "-q", "--save", saved, stdin=lines.encode(), cwd=WORK)
        assert result.returncode == 0, result.stderr
        seed("saved", f"chat-{number}", saved.read_bytes())


@functools.cache
def fuzz_folder():
    folder = WORK / "fuzz"
    fuzz_seeds(folder)
    return folder


FUZZ_DRIVER = r"""
#include <stdint.h>
#include <stdio.h>
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);
static uint8_t data[1 << 20];
int main(int argc, char **argv)                   /* files, one by one; each is named before it is tried */
{
    for (int i = 1; i < argc; i++) {
        FILE *f = fopen(argv[i], "rb");
        size_t n = fread(data, 1, sizeof data, f);
        fclose(f);
        fprintf(stderr, "trying %s\n", argv[i]);
        LLVMFuzzerTestOneInput(data, n);
    }
    fprintf(stderr, "done\n");
}
"""


@functools.cache
def fuzz_program():
    """The targets of `make fuzz` without libFuzzer: a program that tries the files it is given."""
    (WORK / "driver.c").write_text(FUZZ_DRIVER)
    subprocess.run(["cc", "-std=gnu11", "-g", "-O1", "-w", "-pthread", "-DFUZZ", "-fsanitize=address,undefined",
                    "-fno-sanitize-recover=all", "-o", WORK / "driver", ROOT / "qwen3next.c", WORK / "driver.c", "-lm"], check=True)
    return WORK / "driver"


@pytest.mark.parametrize("target", FUZZ_TARGETS)
def test_seeds_and_mutations_of_every_target(target, tmp_path, report):
    """What `make fuzz` begins with, and a hundred and more changes of each kind: no sanitizer speaks, nothing hangs."""
    rng, program = random.Random(target), fuzz_program()
    seeds = [path.read_bytes() for path in sorted((fuzz_folder() / target).iterdir())]
    inputs = list(seeds)
    for _ in range(120):
        data = rng.choice(seeds)
        for _ in range(rng.choice([1, 1, 2, 4])):
            data = mutated(data, rng)
        inputs.append(data)
    paths = [tmp_path / str(number) for number in range(len(inputs))]
    for path, data in zip(paths, inputs):
        path.write_bytes(data)
    result = run(program, *paths, timeout=300, env=dict(os.environ, QWEN3NEXT_FUZZ=target, QWEN3NEXT_FUZZ_FOLDER=str(fuzz_folder())))
    last = Path(re.findall(rb"trying (.*)", result.stderr)[-1].decode())
    assert result.returncode == 0 and result.stderr.endswith(b"done\n"), (last.read_bytes(), result.stderr[-3000:])
    report(f"{target}: {len(inputs)} inputs")


# ---- What was found, each once

def test_a_draft_s_confidence_that_is_no_probability():
    """A NaN whose payload the engine's exp turns into a huge number: it once indexed a table."""
    whole = read_checkpoint(mtp_checkpoint("plain"))
    norm = whole.tensors["mtp.norm"]
    for bits in (0x7FC0011C, 0x7FC00000, 0xFFC0011C, 0x7F800001):
        data = patched(whole.data, *((norm.offset + i, "I", bits) for i in range(0, norm.size, 4)))
        (WORK / "nan.bin").write_bytes(patched(data, (32, "Q", checkpoint_hash(data, list(whole.tensors.values())))))
        for cpu in CPUS:
            if not lacks_cpu(cpu):
                result = run(DEBUG_ENGINE, WORK / "nan.bin", "--ids", "-i", "1 2 3", "-n", 12, "-t", 0, "-c", 64, "-d", 1, "--cpu", cpu)
                assert result.returncode == 0, result.stderr


def rebuilt_tokenizer(path, **sections):
    """small_tokenizer's file with other sections (lists of numbers) written to path."""
    whole = read_tokenizer(small_tokenizer()[0])
    header, body = bytearray(whole.data[:64]), b""
    counts = dict(merges=(16, 3), added=(20, 2), ccc=(28, 3), decomp=(32, 3), comp=(36, 3))
    for name, (offset, size) in whole.sections.items():
        raw = whole.data[offset:offset + size]
        if name in sections:
            raw = np.array(sections[name], "<u4").tobytes()
            struct.pack_into("<I", header, counts[name][0], len(raw) // 4 // counts[name][1])
        body += raw if name == "bytes" else raw.ljust((len(raw) + 7) // 8 * 8, b"\0")
    struct.pack_into("<QQ", header, 48, fnv1a(body) if len(body) < 1 << 20 else 0, 64 + len(body))
    path.write_bytes(header + body)
    return path


def test_tokenizers_that_want_to_take_for_ever(tmp_path):
    """Characters that become 65,536, merges that all meet in the hash, a hundred thousand added tokens."""
    whole = read_tokenizer(small_tokenizer()[0])
    command = [ENGINE, token_model(), "-m", "tokenize", "--ids", "-z", tmp_path / "t.bin", "-i"]
    rebuilt_tokenizer(tmp_path / "t.bin", decomp=[x for i in range(30) for x in (0x4E00 + i, 0x4E01 + i, 0x4E01 + i)])
    result = run(*command, "\u4e00" * 1000, timeout=10)
    assert result.returncode == 0 and result.stdout.count(b"\n") <= 16 * 3 * 1000
    rebuilt_tokenizer(tmp_path / "t.bin", merges=whole.merges[0] * 200_000)
    assert complaint([*command, "x"], FAILED, ["t.bin: merge"]) is None
    rebuilt_tokenizer(tmp_path / "t.bin", added=whole.added[0] * 100_000)
    assert complaint([*command, "x"], FAILED, ["n_added"]) is None


def with_added(path, texts):
    """small_tokenizer's file with its added tokens replaced by these (bytes), under ids of tokens that were merges."""
    whole = read_tokenizer(small_tokenizer()[0])
    tokens, first = list(whole.tokens), 256
    tokens[first:first + len(texts)] = texts
    tokens += [b""] * max(0, len(whole.tokens) - len(tokens))
    bounds = np.cumsum([0, *map(len, tokens)])
    header, body = bytearray(whole.data[:64]), b""
    sections = {name: whole.data[offset:offset + size] for name, (offset, size) in whole.sections.items()}
    sections.update(offsets=bounds.astype("<u4").tobytes(), bytes=b"".join(tokens), merges=b"",
                    added=np.array([[first + i, 0] for i in range(len(texts))], "<u4").tobytes())
    for name, raw in sections.items():
        body += raw if name == "bytes" else raw.ljust((len(raw) + 7) // 8 * 8, b"\0")
    struct.pack_into("<3I", header, 12, len(tokens), 0, len(texts))
    struct.pack_into("<QQ", header, 48, fnv1a(body) if len(body) < 1 << 20 else 0, 64 + len(body))
    path.write_bytes(header + body)
    return path


def test_the_longest_added_token_is_taken(tmp_path):
    """Against the plain search for it, for tokens that begin one another, stand twice, or are whole texts of others."""
    rng, model = random.Random(9), token_model()
    for trial in range(12):
        texts = [bytes(rng.choices(b"ab<", k=rng.choice([1, 2, 3, 5, 9]))) for _ in range(rng.choice([1, 3, 20, 60]))]
        texts += [texts[0][:1], texts[0], texts[-1] + b"a"]
        path = with_added(tmp_path / "t.bin", texts)
        text, ids, at = bytes(rng.choices(b"ab<c", k=400)), [], 0
        while at < len(text):
            best = max((t for t in texts if text.startswith(t, at)), key=len, default=None)
            ids.append(best or text[at:at + 1])
            at += len(ids[-1])
        (tmp_path / "text").write_bytes(text)
        lines = engine(model, "-m", "tokenize", "-z", path, "-f", tmp_path / "text").decode().splitlines()
        assert [line.split("\t")[1].encode() for line in lines] == ids


def test_added_tokens_that_want_to_take_for_ever(tmp_path):
    """Four thousand long ones that begin alike and one another; one that is too long is refused."""
    path = with_added(tmp_path / "t.bin", [b" " * (n % 250 + 1) + str(n).encode() for n in range(4000)] + [b" " * n for n in range(1, 90)])
    data = bytearray(path.read_bytes())
    struct.pack_into("<Q", data, 48, fnv1a(data[64:]))
    path.write_bytes(data)
    source = json.dumps({**SMALLEST, "vocab_size": 5000, "mtp": False})
    (tmp_path / "config.json").write_text(source)
    assert run(*EXPORT, "--random", tmp_path / "config.json", "--seed", 1, "--type", "f32", "-o", tmp_path / "m.bin").returncode == 0
    (tmp_path / "text").write_bytes(b" " * 1_000_000)
    result = run(ENGINE, tmp_path / "m.bin", "-m", "tokenize", "--ids", "-z", path, "-f", tmp_path / "text", timeout=10)
    assert result.returncode == 0, result.stderr
    with_added(path, [b"x" * 257])
    assert complaint([ENGINE, tmp_path / "m.bin", "-m", "tokenize", "-z", path, "-i", "x"], FAILED, ["t.bin: added token"]) is None


def test_texts_without_end(tmp_path):
    """A message that cannot fit is refused before it is cut into tokens, and the chat goes on; nothing is read for ever."""
    with open(tmp_path / "lines", "wb") as lines:
        lines.write(b"Hello\n" + b"\0" * 100_000_000 + b"\nHello\n")
    with open(tmp_path / "lines", "rb") as lines:
        result = subprocess.run([ENGINE, DEMO, "-m", "chat", "-t", "0", "-q", "-c", "512"], stdin=lines, capture_output=True, timeout=10)
    once = run(ENGINE, DEMO, "-m", "chat", "-t", 0, "-q", stdin=b"Hello\nHello\n").stdout
    assert result.returncode == 0 and result.stderr.count(b"context full") == 1 and result.stdout == once
    assert complaint([ENGINE, DEMO, "-f", "/dev/zero"], FAILED, ["/dev/zero"]) is None


def test_links_and_long_names(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "new")
    command = [ENGINE, token_model(), "--ids", "-i", "1", "-n", "2", "-q", "-s", 1, "--save"]
    assert complaint([*command, tmp_path / "link"], FAILED, ["link"]) is None and (tmp_path / "link").is_symlink()
    assert run(*command, tmp_path / ("n" * 255)).returncode == 0 and (tmp_path / ("n" * 255)).stat().st_size > 144


def on_a_terminal(command, typed=b"", until=None, signals=()):
    """Run a command with a terminal, which shows nothing of what is typed, as standard input, output and error. signals: sent,
    each before something is typed, once it has written `until`. Returns (status, what it wrote)."""
    words = [str(word) for word in command]
    pid, fd = pty.fork()
    if pid == 0:
        try:
            os.execv(words[0], words)
        finally:
            os._exit(127)
    settings_of_it = termios.tcgetattr(fd)
    settings_of_it[3] &= ~termios.ECHO
    termios.tcsetattr(fd, termios.TCSANOW, settings_of_it)
    written, end = b"", time.monotonic() + 60
    os.write(fd, typed)
    try:
        while select.select([fd], [], [], max(0, end - time.monotonic()))[0] or os.kill(pid, signal.SIGKILL):
            written += os.read(fd, 65536)
            if until and until in written:
                for number, word in signals:
                    os.kill(pid, number)
                    time.sleep(0.1)
                    os.write(fd, word)
                until = None
    except OSError:                                # the other side has been closed
        pass
    os.close(fd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), written


def test_progress_and_results_on_one_terminal(tmp_path):
    """What is printed never follows on a line of progress, nor does progress take away what has been printed."""
    (tmp_path / "p").write_text("The owl sat in the tree. " * 100 + "The last line")
    for options in (["-n", 4, "--echo"], ["-m", "perplexity"], ["-m", "trace", "-o", "/dev/stdout"]):
        status, written = on_a_terminal([ENGINE, DEMO, "-f", tmp_path / "p", "--batch", 64, "-s", 1, *options])
        lines = written.replace(b"\r\n", b"\n").split(b"\n")
        shown = [line for line in lines if b"\r\x1b[K" not in line] + [line.rsplit(b"\x1b[K", 1)[1] for line in lines if b"\r\x1b[K" in line]
        assert status == 0 and not any(b" tokens" in line and b"prompt: " in line and not line.startswith(b"[") for line in shown), shown[-5:]
        assert (b"\r\x1b[K" in written) == ("--echo" not in options)
        assert "--echo" not in options or b"The last line" in lines[0] + lines[1]


def test_nothing_moves_the_cursor_of_a_terminal():
    """A model that says control characters, a prompt and a conversation that hold some: bytes for a pipe, ^X for a terminal."""
    says = "\x1b]0;owned\x07 \u009b2J\x7f é\n"
    source = scripted_model(WORK / "hf" / "escapes", says.replace("\n", ""), TEMPLATES["instruct"])
    model = export(source, WORK / "escapes.bin", "--type", "bf16")
    command = [ENGINE, model, "-m", "chat", "-z", TOKENIZER, "-t", 0, "-q", "-y", "a\x1bb"]
    assert says.strip().encode() in run(*command, stdin=b"Hi\n").stdout
    status, written = on_a_terminal(command, b"Hi\n/show\n/exit\n")
    assert status == 0 and b"^[]0;owned^G ^[2J^?" in written and b"a^[b" in written and "é".encode() in written
    assert b"\x1b" not in written.replace(b"^[", b"") and b"\xc2\x9b" not in written, written
    pairs = b" ".join(b"\xc2" + bytes([b]) for b in range(0x20, 0x100) if b != 0x7F)      # halves of characters that look like C1
    for typed in (pairs[:60], pairs[60:120], pairs[300:360], pairs[-60:]):
        status, written = on_a_terminal([*command, "-n", 1], typed + b"\n/undo\n/a\xc2\x9bb\n/exit\n")
        assert status == 0 and b"forgotten" in written and not set(written) & (set(range(32)) - set(b"\r\n\t")) and b"\xc2\x9b" not in written
    assert b"\x9b" not in run(ENGINE, "a\u009bb\x1bc").stderr


def test_text_taken_back_leaves_no_trace_in_a_saved_file():
    for kv in ("f16", "q8", "f32"):
        files = set()
        for word in ("Once", "Dragons are", "Tell me"):
            file = WORK / "traces"
            result = run(ENGINE, DEMO, "-m", "chat", "-q", "--kv", kv, "-n", 5, "-s", 1,
                         stdin=f"Hello\n{word} more\n/undo\n/set seed 5\n/save {file}\n".encode())
            assert result.returncode == 0, result.stderr
            files.add(file.read_bytes())
        assert len(files) == 1, kv


def test_a_template_whose_end_of_thinking_is_a_slash():
    whole = read_checkpoint(chat_model("thinking"))
    record, _, _, offset, _ = whole.meta_records["chat.think_end"]
    data = patched(whole.data, (offset, "B", ord("/")), (record + 44, "I", 1), (record + 56, "Q", 1))
    (WORK / "slash.bin").write_bytes(patched(data, (32, "Q", checkpoint_hash(data, list(whole.tensors.values())))))
    result = run(DEBUG_ENGINE, WORK / "slash.bin", "-m", "chat", "-r", 0, "-z", TOKENIZER, "-t", 0, "-n", 5, stdin=b"Hi\n")
    assert result.returncode == 0, result.stderr


# ---- Faults

def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]


def fault_commands(folder):
    """A command for every mode: (name, command, standard input). Each writes what it writes into the folder."""
    model, vocabulary = fuzz_folder() / "model.bin", ["-z", fuzz_folder() / "tokenizer.bin"]
    base = [DEBUG_ENGINE, model, "-s", 1, "-j", 2, "-q"]
    yield "generate", [*base, *vocabulary, "-i", "The owl", "-n", 6, "-d", 2, "--save", folder / "kept"], b""
    yield "load", [*base, "--ids", "-n", 3, "--load", fuzz_folder() / "saved" / "text-0"], b""
    yield "chat", [*base, *vocabulary, "-m", "chat", "-n", 3], f"Hi\n/undo\nHo\n/save {folder / 'kept'}\n/load {folder / 'kept'}\n/regen\n".encode()
    yield "logits", [*base, "--ids", "-i", "1 2 3", "-m", "logits", "-o", folder / "kept"], b""
    yield "perplexity", [*base, *vocabulary, "-f", fuzz_folder() / "text" / "0", "-m", "perplexity"], b""
    yield "tokenize", [*base, *vocabulary, "-i", "ça va? \u1112\u1161", "-m", "tokenize"], b""
    yield "inspect", [*base, "-m", "inspect"], b""
    yield "experts", [*base, "--ids", "-i", "1 2 3", "-n", 3, "--memory", least_memory(model)], b""
    yield "trace", [*base, *vocabulary, "-i", "The owl", "-m", "trace", "-o", folder / "kept"], b""
    heads = fuzz_folder() / "heads"
    yield "classify", [DEBUG_ENGINE, heads / "Qwen3NextForSequenceClassification", *vocabulary, "-j", 2, "-q", "-i", "The owl", "-m", "classify"], b""
    yield "answer", [DEBUG_ENGINE, fuzz_folder() / "answer.bin", *vocabulary, "-j", 2, "-q", "-i", "Who?", "-f", "-", "-m", "answer"], "ça va? \u1112\u1161".encode()


@pytest.mark.parametrize("mode", ["generate", "load", "chat", "logits", "perplexity", "tokenize", "inspect", "experts", "trace", "classify",
                                  "answer"])
def test_any_request_may_fail(mode, tmp_path, report):
    """Memory, files, threads: the N-th request is refused (debug build). It ends in one line and status 1, or, where a chat
    goes on, in a line; what was there before stays or is replaced whole."""
    _, command, stdin = next(case for case in fault_commands(tmp_path) if case[0] == mode)
    whole = run(*command, stdin=stdin)
    assert whole.returncode == 0, whole.stderr
    kept = (tmp_path / "kept").read_bytes() if (tmp_path / "kept").exists() else None

    def attempt(n):
        return run(*command, stdin=stdin, timeout=20, env=dict(os.environ, QWEN3NEXT_FAULT=str(n)))

    total = next(n for n in (2 ** k for k in range(20)) if attempt(n).stderr == whole.stderr)
    numbers = sorted({*range(1, min(total, 60)), *random.Random(3).sample(range(1, total), min(total - 1, 60))})
    refused = 0
    for n, result in zip(numbers, parallel(attempt, numbers)):
        message = result.stderr.decode("utf-8", "replace")
        assert result.returncode in (0, 1) and "Sanitizer" not in message and "runtime error" not in message, (n, result)
        assert result.returncode == 0 or message.rstrip("\n").split("\n")[-1].startswith("qwen3next: "), (n, message)
        assert result.returncode == 0 or message.count("\n") == 1 or mode == "chat", (n, message)
        refused += result.returncode
    assert refused > 5 and not leftovers(tmp_path)
    assert kept is None or (tmp_path / "kept").read_bytes() == kept
    report(f"{mode}: {len(numbers)} of about {total} requests refused, {refused} of them ended the program")


@pytest.mark.parametrize("how", ["cut off", "emptied", "removed", "replaced"])
def test_a_checkpoint_that_changes_while_it_is_mapped(how, tmp_path):
    model = tmp_path / "model.bin"
    shutil.copy(DEMO, model)
    process = subprocess.Popen([ENGINE, model, "-z", DEMO_TOKENIZER, "-i", "Once upon a time", "-n", "100000", "-c", "4096", "-t", "1", "-q",
                                "-p", "1", "-k", "0", "-d", "0", "-j", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(40)
    if how in ("cut off", "emptied"):             # one line, whichever of the threads finds out
        os.truncate(model, 4096 * 2000 if how == "cut off" else 0)
        message = process.communicate(timeout=60)[1].decode()
        assert process.returncode == 1 and message.count("\n") == 1 and "model.bin" in message, (process.returncode, message)
        return
    model.unlink()                                 # what is mapped stays
    if how == "replaced":
        model.write_bytes(b"something else")
    process.stdout.read(200)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and process.stderr.read() == b""


@pytest.mark.parametrize("output", ["/dev/full", "closed pipe", "none"])
@pytest.mark.parametrize("command", ["-h", "--version", "-m inspect", "-m tokenize -i word", "-i word -n 40", "-i word --echo -n 3",
                                     "-m chat -i word -n 20", "-m perplexity -i words", "--ids -i 1 -n 20"])
def test_output_that_cannot_be_written(command, output):
    """A full disk, a reader that has left, no standard output at all: a line and status 1, at once."""
    words = [DEBUG_ENGINE, fuzz_folder() / "model.bin", "-z", fuzz_folder() / "tokenizer.bin", "-q", "-s", 1, *command.split()]
    if output == "none":
        words = ["sh", "-c", 'exec "$@" >&-', "sh", *words]
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "wb") as full:
        result = subprocess.run([str(word) for word in words], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=60,
                                stdout=full if output == "/dev/full" else write)
    os.close(write)
    message = result.stderr.decode()
    assert result.returncode == 1 and message.count("\n") == 1 and "standard output" in message, (result.returncode, message)


@pytest.mark.parametrize("mode", ["generate", "chat", "logits"])
def test_a_signal_at_every_request(mode, tmp_path):
    """The program is killed or asked to end just before its N-th request (debug build): an older file stays or is replaced
    whole, and what is being written has the rights of what it replaces from its first byte."""
    _, command, stdin = next(case for case in fault_commands(tmp_path) if case[0] == mode)
    assert run(*command, stdin=stdin).returncode == 0
    whole, kept = (tmp_path / "kept").read_bytes(), tmp_path / "kept"
    kept.chmod(0o600)
    last = {"generate": 130, "chat": 260, "logits": 60}[mode]
    for number in (signal.SIGKILL, signal.SIGQUIT, signal.SIGTERM):
        def attempt(n):
            folder = tmp_path / f"{number}-{n}"
            folder.mkdir()
            shutil.copy2(kept, folder / "kept")
            _, mine, words = next(case for case in fault_commands(folder) if case[0] == mode)
            result = run(*mine, stdin=words, env=dict(os.environ, QWEN3NEXT_FAULT=str(n), QWEN3NEXT_SIGNAL=str(int(number))),
                         preexec_fn=lambda: os.umask(0), timeout=20)
            return n, result, {path.name: (path.stat().st_mode & 0o777, path.read_bytes()) for path in folder.iterdir()}

        statuses = set()
        for n, result, files in parallel(attempt, range(last % 7, last, 3)):
            statuses.add(result.returncode)
            assert result.returncode in (0, -signal.SIGKILL if number == signal.SIGKILL else 128 + number), (n, result)
            assert all(rights == 0o600 for rights, _ in files.values()), (n, files)
            assert files["kept"][1] == whole or (mode != "logits" and files["kept"][1][:8] == b"QWEN3SES"), n
            assert number == signal.SIGKILL or len(files) == 1, (n, files.keys())
        assert len(statuses) == 2 or number == signal.SIGTERM


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGQUIT"])
def test_a_signal_ends_a_chat_that_waits(name, tmp_path):
    """Also in the middle of a line; what was to be saved is saved, but at SIGQUIT. Under nohup SIGHUP does nothing."""
    number, nohup = getattr(signal, name), []
    for nohup in ([], ["nohup"]):
        process = subprocess.Popen([*nohup, ENGINE, DEMO, "-m", "chat", "-n", "5", "-q", "--save", str(tmp_path / "kept")], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdin.write(b"Hello\nAnd th")
        process.stdin.flush()
        assert process.stdout.readline()
        process.send_signal(number)
        if nohup and number == signal.SIGHUP:
            process.stdin.write(b"en?\n")
            process.stdin.flush()
            assert process.stdout.readline()
            process.stdin.close()
        assert process.wait(20) == (0 if nohup and number == signal.SIGHUP else 128 + number)
        process.stdin.close()
        assert (tmp_path / "kept").exists() == (number != signal.SIGQUIT) and not leftovers(tmp_path)
        (tmp_path / "kept").unlink(missing_ok=True)


def test_lines_of_windows_and_input_that_cannot_be_read(tmp_path):
    """CR before LF is no part of a command; a folder as standard input is an error, and costs no older file."""
    assert run(ENGINE, DEMO, "-m", "chat", "-t", 0, "-q", stdin=b"Hello\n/undo\r\n/exit\r\nHello\n").stdout == \
        run(ENGINE, DEMO, "-m", "chat", "-t", 0, "-q", stdin=b"Hello\n").stdout
    (tmp_path / "kept").write_bytes(b"old")
    result = run("sh", "-c", 'exec "$@" < /', "sh", ENGINE, DEMO, "-m", "chat", "-q", "--save", tmp_path / "kept")
    assert result.returncode == 1 and result.stderr.count(b"\n") == 1 and (tmp_path / "kept").read_bytes() == b"old"


def test_no_standard_files_at_all():
    """Closed standard input and error too: nothing that is opened takes their place."""
    for closed in ("<&-", "2>&-", "<&- 2>&-", "<&- >&- 2>&-"):
        words = ["sh", "-c", f'exec "$@" {closed}', "sh", DEBUG_ENGINE, fuzz_folder() / "model.bin", "--ids", "-i", 1, "-n", 3, "-q", "-s", 1]
        assert run(*words).returncode == (1 if ">&- 2" in closed else 0), closed
    result = run("sh", "-c", 'exec "$@" <&-', "sh", DEBUG_ENGINE, fuzz_folder() / "model.bin", "-z", fuzz_folder() / "tokenizer.bin", "-m", "chat")
    assert result.returncode == 1 and b"standard input" in result.stderr


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_at_any_moment(name, tmp_path, report):
    """Of a run that saves: the status names the signal, and the file is absent or a conversation that goes on."""
    rng, number = random.Random(name), getattr(signal, name)
    command = [ENGINE, DEMO, "-i", "Once upon a time", "-n", "3000", "-c", "4000", "-q", "-s", "1", "-t", "1", "-p", "1", "-k", "0", "--save"]
    outcomes = {}
    for trial in range(40):
        file = tmp_path / "kept"
        process = subprocess.Popen([*command, file], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        time.sleep(rng.random() ** 2 * 0.6)
        for _ in range(rng.choice([1, 1, 2])):
            process.send_signal(number)
        message = process.communicate(timeout=60)[1]
        assert process.returncode in (0, 128 + number, -number), (process.returncode, message)   # -: it had not even begun
        assert not leftovers(tmp_path) or process.returncode == -number
        if file.exists():
            engine(DEMO, "--load", file, "-n", 1, "-c", 4000, "-q")
            file.unlink()
        outcomes[process.returncode] = outcomes.get(process.returncode, 0) + 1
    report(f"{name}: statuses {outcomes}")
    assert outcomes.get(128 + number, 0) > 5


def test_a_terminal_that_changes_its_size():
    """While it waits and while it answers: nobody is disturbed."""
    command = [ENGINE, DEMO, "-m", "chat", "-t", 0, "-n", 200, "-q"]
    signals = [(signal.SIGWINCH, b""), (signal.SIGWINCH, b"Hello\n"), (signal.SIGWINCH, b""), (signal.SIGCONT, b"/exit\n")]
    status, written = on_a_terminal(command, b"Tell me a story.\n", b" ", signals)
    quiet = run(*command, stdin=b"Tell me a story.\nHello\n").stdout.decode()
    assert status == 0 and written.decode().replace("\r\n", "\n") == quiet


def test_what_may_not_be_read_or_written():
    """As a user without rights: the line names the file."""
    tmp_path = WORK / "rights"
    tmp_path.mkdir()
    WORK.chmod(0o711)
    for name in ("model.bin", "tokenizer.bin"):
        shutil.copy(fuzz_folder() / name, tmp_path / name)
    shutil.copy(DEBUG_ENGINE, tmp_path / "qwen3next")
    (tmp_path / "prompt").write_text("The owl")
    (tmp_path / "kept").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    tmp_path.chmod(0o755)
    nobody = dict(preexec_fn=lambda: os.setuid(65534)) if os.getuid() == 0 else {}
    base = [tmp_path / "qwen3next", tmp_path / "model.bin", "-z", tmp_path / "tokenizer.bin", "-n", 2, "-q"]
    assert run(*base, "-f", tmp_path / "prompt", **nobody).returncode == 0
    for path, command in ((tmp_path / "model.bin", [*base, "-i", "x"]), (tmp_path / "tokenizer.bin", [*base, "-i", "x"]),
                          (tmp_path / "prompt", [*base, "-f", tmp_path / "prompt"]), (tmp_path / "kept", [*base, "--load", tmp_path / "kept"]),
                          (tmp_path / "folder", [*base, "-i", "x", "--save", tmp_path / "folder" / "new"]),
                          (tmp_path / "folder", [*base, "-m", "logits", "-i", "x", "-o", tmp_path / "folder" / "new"]),
                          (tmp_path / "folder", [*base, "-m", "logits", "-i", "x", "-o", "/dev/null", "--dump", tmp_path / "folder"])):
        rights = path.stat().st_mode
        path.chmod(0)
        result = run(*command, **nobody)
        path.chmod(rights)
        assert result.returncode == 1 and result.stderr.count(b"\n") == 1 and path.name.encode() in result.stderr, (command, result)
    assert (tmp_path / "kept").read_bytes() == b"old" and not list((tmp_path / "folder").iterdir())


def test_folders_and_pipes_where_files_are_wanted(tmp_path):
    """For every option that names a file; a prompt may come from a pipe, as may logits go into one."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    base = [DEBUG_ENGINE, fuzz_folder() / "model.bin", "-z", fuzz_folder() / "tokenizer.bin", "-q", "-n", 2]
    for kind in ("folder", "pipe"):
        path = tmp_path / kind
        for command in ([DEBUG_ENGINE, path, "-i", "x"], [*base, "-i", "x", "-z", path], [*base, "--load", path, "--ids"]):
            assert complaint(command, FAILED, [kind]) is None, command
    for option in ("-f", "--save", "-o"):
        command = [*base, *(["-m", "logits"] if option == "-o" else []), *([] if option == "-f" else ["-i", "x"]), option, tmp_path / "folder"]
        assert complaint(command, FAILED, ["folder"]) is None, command
    writer = subprocess.Popen(["sh", "-c", 'printf owl > "$1"', "sh", tmp_path / "pipe"])
    assert run(*base, "-f", tmp_path / "pipe").returncode == 0 and writer.wait(10) == 0


def test_numbers_out_of_range_in_every_option():
    """The options and what they take are read from -h: a number is taken or refused by its option's name, whatever it is."""
    text, options = run(ENGINE, "-h").stdout.decode(), []
    for letter, name, value in re.findall(r"^  (?:-(\w), |    )--([\w-]+) (\S+)", text, re.M):
        if value in ("N", "X", "0|1"):
            options.append("--" + name)
    assert len(options) >= 15
    numbers = ["-1", "-0", "1e999", "-1e999", "nan", "-nan", "inf", "", " ", "1 ", "1x", "0x1p99", "9" * 30, "-" + "9" * 30, "9223372036854775807",
               "9223372036854775808", "18446744073709551616", "2147483648", "4294967296", "1e-400", "\u0661", "+", "--"]
    jobs = [(option, number) for option in options for number in numbers]

    def check(job):
        option, number = job
        mode = ["-m", "bench"] if option in ("--depth", "--prompt") else ["-m", "chat"] if option == "--reasoning" else ["--ids"]
        result = run(ENGINE, WORK / "no such model", *mode, *([] if mode[-1] == "bench" else ["-i", "1"]), option, number)
        named = b"no such model" if result.returncode == 1 else option.encode()
        return result.returncode in (1, 2) and result.stderr.count(b"\n") == 1 and named in result.stderr or (job, result)

    problems = [result for result in parallel(check, jobs) if result is not True]
    assert not problems, problems[:5]


@pytest.fixture(scope="session")
def tsan_engine():
    subprocess.run(["make", "--silent", "qwen3next-tsan"], cwd=ROOT, check=True)
    return ROOT / "qwen3next-tsan"


@pytest.mark.parametrize("weights", ["bf16", "q4", "q8"])    # f32 shares bf16's way through the threads
def test_no_data_race_in_any_mode(weights, tsan_engine, tmp_path):
    """ThreadSanitizer, 4 threads: every mode, with drafts, with experts from disk, with signals."""
    model, saved = mtp_checkpoint("plain", weights), tmp_path / "saved"
    base = [tsan_engine, model, "-j", 4, "-s", 1]
    ids = ["--ids", "-i", spaced(random_ids(70, 389))]
    commands = [[*base, *ids, "-n", 30, "-d", 2, "--save", saved], [*base, "--ids", "--load", saved, "-n", 20],
                [*base, *ids, "-m", "logits", "-o", tmp_path / "logits", "-d", 2, "--dump", tmp_path], [*base, *ids, "-m", "perplexity"],
                [*base, "-m", "bench", "-n", 16, "--prompt", 64, "-d", 1], [*base, *ids, "-n", 12, "--memory", least_memory(model)],
                [*base, "-m", "inspect"], [*base, *ids, "-m", "trace", "-o", tmp_path / "trace"]]
    for mode in HEAD_CLASSES:
        (tmp_path / "context").write_text(spaced(random_ids(70, 389)))
        commands.append([tsan_engine, head_case(mode)[1], "-j", 4, *ids, "-m", mode, *(["-f", tmp_path / "context"] if mode == "answer" else [])])
    if weights == "q8":
        commands += [[tsan_engine, DEMO, "-j", 4, "-m", "chat", "-n", 30], [tsan_engine, DEMO, "-m", "tokenize", "-i", STORY]]
    for command in commands:
        result = run(*command, stdin=b"Tell me a story.\n/undo\nHello\n/regen\n" if "chat" in command else b"", timeout=300)
        assert result.returncode == 0 and b"ThreadSanitizer" not in result.stderr, result.stderr[-2000:]
    process = subprocess.Popen([*map(str, base), "--ids", "-i", "1", "-n", "100000", "-c", "512", "-q"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(8)
    process.send_signal(signal.SIGTERM)
    assert b"ThreadSanitizer" not in process.communicate(timeout=60)[1] and process.returncode in (0, 143)


# ----------------------------------------------------------------------------------------------------------------
# 19 Heads: classify, tag, answer
# ----------------------------------------------------------------------------------------------------------------

LABELS = ["negative", "neither nor", "\u00fcberw\u00e4ltigend", "\u6b63", "O"]

# The classes of transformers with a head that generates nothing: mode, and the models that have such a class.
HEAD_CLASSES = {
    "classify": {"qwen3_next": transformers.Qwen3NextForSequenceClassification,
                 "qwen3_5_text": qwen3_5.Qwen3_5TextForSequenceClassification, "qwen3_5": qwen3_5.Qwen3_5ForSequenceClassification},
    "tag": {"qwen3_next": transformers.Qwen3NextForTokenClassification, "qwen3_5_text": qwen3_5.Qwen3_5ForTokenClassification,
            "qwen3_5": qwen3_5.Qwen3_5ForTokenClassification},
    "answer": {"qwen3_next": transformers.Qwen3NextForQuestionAnswering}}


# What each variant changes in TINY, or in the weights' type.
HEADS = {"plain": {}, "bf16": dict(weights="bf16"), "dense sibling": dict(model_type="qwen3_5_text"),
         "sibling that sees": dict(model_type="qwen3_5"), "tied": dict(tie_word_embeddings=True),
         "two labels": dict(id2label={0: "no", 1: "yes"}), "many labels": dict(id2label={i: f"class {i}" for i in range(501)}),
         "one label": dict(id2label={0: "grade"})}
OTHER_HEADS = {"padding": dict(pad_token_id=7), "real vocabulary": dict(vocab_size=151936, hidden_size=32)}


@functools.cache
def head_case(mode, variant="plain"):
    """(model in float32, exported checkpoint) with the head of a mode, random."""
    changes = {**TINY, **({} if mode == "answer" else dict(id2label=dict(enumerate(LABELS)))), **(HEADS | OTHER_HEADS)[variant]}
    weights, model_type = changes.pop("weights", "f32"), changes.pop("model_type", "qwen3_next")
    if model_type == "qwen3_5":
        labels = {"id2label": changes.pop("id2label")}
        config = transformers.Qwen3_5Config(text_config=without_experts(changes), vision_config=dict(VISION, out_hidden_size=64), **labels)
    else:
        config = Qwen3NextConfig(**changes) if model_type == "qwen3_next" else transformers.Qwen3_5TextConfig(**without_experts(changes))
    model = randomized(HEAD_CLASSES[mode][model_type](config).eval(), 7)
    model = rounded_to_bf16(model) if weights == "bf16" else model
    model.save_pretrained(WORK / "hf" / f"{mode} {variant}")
    return model, export(WORK / "hf" / f"{mode} {variant}", WORK / f"{mode} {variant}.bin", "--type", weights, "--check")


def without_experts(sizes):
    """The sizes of a dense model."""
    return {key: value for key, value in sizes.items() if "expert" not in key and key != "moe_intermediate_size"}


def near(ours, reference, scale):
    """Whether a number is within tolerance, in standard deviations of the scores that it is one of."""
    return abs(float(ours) - float(reference)) < TOLERANCE * float(scale.std())


@pytest.mark.parametrize("variant", HEADS)
def test_classes_of_a_text_equal_transformers(variant):
    model, checkpoint = head_case("classify", variant)
    labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
    for n in PROMPTS:
        ids = random_ids(n, 389, n)
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        rows = [line.rsplit(" ", 1) for line in engine(checkpoint, "-m", "classify", "--ids", "-i", spaced(ids)).decode().splitlines()]
        assert [row[0] for row in rows] == labels
        scale = logits if len(labels) > 1 else torch.tensor([-1.0, 1.0])
        assert all(near(row[1], logit, scale) for row, logit in zip(rows, logits)), (n, rows, logits)


def test_padding_at_the_end_is_not_classified():
    """transformers reads the class at the last token that is not pad_token_id; of padding only, at the first."""
    model, checkpoint = head_case("classify", "padding")
    for ids in ([5, 6, 7, 7], [7, 5, 6, 7], [5, 7, 6], [7], [7, 7, 7], [5, 6]):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        rows = engine(checkpoint, "-m", "classify", "--ids", "-i", spaced(ids)).decode().splitlines()
        assert all(near(row.rsplit(" ", 1)[1], logit, logits) for row, logit in zip(rows, logits)), ids


@pytest.mark.parametrize("variant", sorted(set(HEADS) - {"one label"}))
def test_classes_of_tokens_equal_transformers(variant):
    model, checkpoint = head_case("tag", variant)
    for n, options in [(n, ()) for n in PROMPTS] + [(200, ("--batch", 7, "-j", 3))]:
        ids = random_ids(n, 389, n)
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        lines = engine(checkpoint, "-m", "tag", "--ids", "-i", spaced(ids), *options).decode().splitlines()
        assert len(lines) == n
        for id, line, row in zip(ids, lines, logits):
            token, rest = line.split(" ", 1)
            label, score = rest.rsplit(" ", 1)
            index = [model.config.id2label[i] for i in range(len(row))].index(label)
            assert token == str(id) and near(score, row.max(), logits) and near(score, row[index], logits)


def test_tokens_are_tagged_as_they_are_printed_by_tokenize():
    _, checkpoint = head_case("tag", "real vocabulary")
    text = "Z\u00fcrich\n ist sch\u00f6n. \u6f22\u5b57 <|im_end|>"
    lines = engine(checkpoint, "-m", "tag", "-i", text, "-z", TOKENIZER).decode().splitlines()
    tokens = engine(checkpoint, "-m", "tokenize", "-i", text, "-z", TOKENIZER).decode().splitlines()
    assert len(lines) == len(tokens) > 8
    for line, token in zip(lines, tokens):
        assert line.startswith(token.split("\t", 1)[1] + " ") and any(f" {label} " in line for label in LABELS)


def best_span(start, end, most=None):
    """(first, last, score) of the span of tokens with the largest start + end, first <= last < first + most; float64."""
    scores = start.double()[:, None] + end.double()[None]
    inside = torch.ones_like(scores).triu() if most is None else torch.ones_like(scores).triu().tril(most - 1)
    scores[inside == 0] = -math.inf
    first, last = divmod(int(scores.argmax()), len(end))
    return first, last, float(scores[first, last])


@pytest.mark.parametrize("variant", ["plain", "bf16", "tied"])
def test_answers_equal_transformers(variant):
    """The question's tokens, then the context's; the best span lies in the context."""
    model, checkpoint = head_case("answer", variant)
    file = WORK / "context.ids"
    for n in range(1, 60, 3):
        ids, asked = random_ids(n + n % 7 + 1, 389, n), n % 7 + 1
        file.write_text(spaced(ids[asked:]))
        out = model(torch.tensor([ids]), use_cache=False)
        start, end = out.start_logits[0, asked:], out.end_logits[0, asked:]
        for most in (None, 1, 4):
            first, last, score = best_span(start, end, most)
            options = [] if most is None else ["-n", most]
            line = engine(checkpoint, "-m", "answer", "--ids", "-i", spaced(ids[:asked]), "-f", file, *options).decode()
            span, found, begin, stop = line.split()
            scale = torch.cat([out.start_logits[0], out.end_logits[0]])
            assert near(found, score, scale) and (begin, stop) == (str(first), str(last + 1)), (line, first, last, score)
            assert span == ",".join(map(str, ids[asked:][first:last + 1]))


SPAN_HARNESS = """
#define main qwen3next_main
#include "qwen3next.c"

/* out: [tokens][3], id, begin, end; returns their number */
int spans(const char *tokenizer, const char *text, int n, int *out)
{
    static Tokenizer *t;
    if (!t) t = open_tokenizer(tokenizer);
    Prompt p = {0};
    Tokens ids = {0}, spans = {0};
    prompt_add(&p, text, n, true);
    encode(t, &p, &ids, &spans);
    for (int i = 0; i < ids.len; i++) out[3 * i] = ids.id[i], out[3 * i + 1] = spans.id[2 * i], out[3 * i + 2] = spans.id[2 * i + 1];
    int found = spans.len == 2 * ids.len ? ids.len : -1;
    free(ids.id), free(spans.id), free_prompt(&p);
    return found;
}
"""


def units(text):
    """Where a text can be cut, so that NFC of the parts is NFC of the whole, before a character that starts anew:
    [(bytes before, bytes of NFC before)], from (0, 0) to the end."""
    nfc = tokenizers.normalizers.NFC().normalize_str
    starts = [i for i in range(len(text)) if i == 0 or not unicodedata.combining(unicodedata.normalize("NFD", text[i])[0])]
    cuts = [i for i in starts if i == 0 or nfc(text[:i]) + nfc(text[i:]) == nfc(text)]
    return [(len(text[:i].encode()), len(nfc(text[:i]).encode())) for i in dict.fromkeys([*cuts, len(text)])]


def expected_spans(text):
    """[(id, begin, end)] of the library's tokens: the shortest parts of the text that hold them and can be cut out."""
    out, at, plain = [], 0, real_tokenizer(with_added=False)
    added = sorted((real_file().tokens[id].decode() for id, _ in real_file().added), key=len, reverse=True)
    for part in re.split("(" + "|".join(map(re.escape, added)) + ")", text):
        if part in added:
            out.append((real_tokenizer().token_to_id(part), at, at + len(part.encode())))
        elif part:
            cuts, done = units(part), 0
            for id in plain.encode(part, add_special_tokens=False).ids:
                end = done + len(real_file().tokens[id])
                begin = max(own for own, normal in cuts if normal <= done and own < cuts[-1][0])
                out.append((id, at + begin, at + min(own for own, normal in cuts if normal >= end)))
                done = end
        at += len(part.encode())
    return out


CONTEXTS = [
    "Die Z\u00fcrcher Hochschule liegt in Winterthur; \u00fcber 14\u202f000 Studierende.", "\u6771\u4eac\u306f\u65e5\u672c\u306e\u9996\u90fd\u3067\u3059\u3002\u5927\u962a\u3082\u5927\u304d\u3044\u3002",
    "plain ASCII text, nothing else\nin two lines \\ and one", "\U0001f600 smile \U0001f468\u200d\U0001f469\u200d\U0001f467 family \U0001f1e9\U0001f1ea flag",
    unicodedata.normalize("NFD", "Caf\u00e9 cr\u00e8me \u00e0 Z\u00fcrich, \uac00\uac01 \u1ea5 \u1ec7"), "a\u0323\u0307b\u0307\u0323 \u1e0a\u0323 q\u0307\u0323x",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645 \u0e19\u0e49\u0e33 \u0e1b\u0e25\u0e32", "x<|im_end|>\u0338y e<|im_end|>\u0301 \u2126\u212b",
    "\u304b\u0f73\u3099 hello world \u0f71\u0f74 \u0f40\u0f81\u0f72 and on", "\u3000\uff21\u0300\u00a0"]


def test_spans_of_tokens_in_any_text():
    """Of every token, over texts of all scripts and many marks: exactly the shortest part of the text that holds it."""
    rng, most = random.Random(19), 4000
    texts = CONTEXTS + PHRASES + [unicodedata.normalize("NFD", phrase) for phrase in PHRASES]
    for _ in range(600):
        pools = MARKS, BASES, JAMO, list("aé1 .'\n字🙂"), SPECIALS[:6], SPACES, ["\u0f73", "\u0f75", "\u0f81", "\u0f71", "\u3099"]
        texts.append("".join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(1, 25))))
    numbers, pointer = array(np.zeros(3 * most), np.int32)
    for text in texts:
        n = engine_library("spans", SPAN_HARNESS).spans(str(TOKENIZER).encode(), text.encode(), len(text.encode()), pointer)
        assert list(map(tuple, numbers[:3 * n].reshape(-1, 3).tolist())) == expected_spans(text), ascii(text)


@pytest.mark.parametrize("context", CONTEXTS)
def test_answers_are_what_lies_between_their_offsets(context, tmp_path):
    """The tokens with the best scores, the bytes of the context that they stand for, and these bytes printed as one line."""
    model, checkpoint = head_case("answer", "real vocabulary")
    (tmp_path / "context").write_text(context, newline="")
    raw, spans = context.encode(), expected_spans(context)
    for question in ("Where?", "Wer ist\u00b4s?", "\u8ab0", "q" * 30, "e\u0301"):
        asked = real_tokenizer().encode(question, add_special_tokens=False).ids
        out = model(torch.tensor([asked + [id for id, _, _ in spans]]), use_cache=False)
        first, last, score = best_span(out.start_logits[0, len(asked):], out.end_logits[0, len(asked):])
        line = engine(checkpoint, "-m", "answer", "-i", question, "-f", tmp_path / "context", "-z", TOKENIZER)
        text, found, begin, end = line.removesuffix(b"\n").rsplit(b" ", 3)
        assert near(found, score, torch.cat([out.start_logits[0], out.end_logits[0]]))
        assert (int(begin), int(end)) == (spans[first][1], spans[last][2])
        assert text == raw[int(begin):int(end)].replace(b"\\", b"\\\\").replace(b"\n", b"\\n")


def test_heads_want_their_modes(tmp_path):
    """A model without the head that a mode wants is refused in one line that names the mode for it."""
    (tmp_path / "c").write_text("1 2 3")
    models = {"generate": random_checkpoint("plain")} | {mode: head_case(mode)[1] for mode in HEAD_CLASSES}
    for has, model in models.items():
        for mode in ["generate", "chat", "logits", "perplexity", "bench", *HEAD_CLASSES]:
            if mode == has or has == "generate" and mode in ("chat", "logits", "perplexity", "bench"):
                continue
            options = dict(logits=["-o", tmp_path / "o"], answer=["-f", tmp_path / "c"]).get(mode, [])
            prompt = [] if mode in ("bench", "chat") else ["-i", 1, "--ids"]
            result = run(ENGINE, model, "-m", mode, *prompt, *options)
            words = result.stderr.decode()
            assert result.returncode == 1 and words.count("\n") == 1 and f"-m {mode} wants" in words, words
            assert "(-m " in words and not (tmp_path / "o").exists()
        assert run(ENGINE, model, "-m", "inspect").returncode == 0
    for options in (["-i", "1"], ["-f", tmp_path / "c"], [], ["-i", "-", "-f", "-"]):
        result = run(ENGINE, models["answer"], "-m", "answer", "--ids", *options)
        assert result.returncode == 2 and result.stderr.count(b"\n") == 1
    for options in (["-i", ""], ["-i", "1", "-c", 3]):
        result = run(ENGINE, models["answer"], "-m", "answer", "--ids", "-f", tmp_path / "c", *options)
        assert result.returncode == 1 and re.match(rb"qwen3next: -[if], the .*\n$", result.stderr), result.stderr


def test_damaged_heads():
    """Labels and heads that are none."""
    data = read_checkpoint(head_case("classify")[1])
    record, _, count, offset, size = data.meta_records["labels"]
    kind, _, _, kind_at, kind_size = data.meta_records["head"]
    cases = [patched(data.data, (record + 44, "I", n)) for n in (0, 1, count + 1, 1 << 31, 0xffffffff)]
    cases += [patched(data.data, (offset, "I", n)) for n in (size, 1 << 31, 0xffffffff)]
    cases += [patched(data.data, (offset + 6, "B", byte)) for byte in (0, 10, 27, 127)]       # control characters in a label
    cases += [patched(data.data, (record + 40, "I", 2)), patched(data.data, (kind_at, "B", 0x58)), patched(data.data, (kind_at, "B", 0))]
    for i, case in enumerate(cases):
        file = WORK / "damaged-head.bin"
        file.write_bytes(patched(case, (32, "Q", checkpoint_hash(case, list(data.tensors.values())))))
        result = run(DEBUG_ENGINE, file, "-m", "classify", "--ids", "-i", "1 2")
        assert result.returncode == 1 and result.stderr.count(b"\n") == 1, (i, result)


@pytest.mark.parametrize("what, changes, words", [
    ("label of two lines", dict(id2label={"0": "a\nb", "1": "c"}), ["id2label 0", "printable"]), ("a number as label", dict(id2label={"0": 1}), ["id2label 0"]),
    ("holes", dict(id2label={"0": "a", "2": "b"}), ["id2label 1"]), ("too few", dict(id2label={"0": "a"}), ["score.weight", "[1, 64]"]),
    ("another class", dict(architectures=["Qwen3NextForMaskedLM"]), ["architectures", "ForMaskedLM"]),
    ("another model's class", dict(architectures=["Qwen3_5ForTokenClassification"]), ["architectures", "qwen3_next"]),
    ("two heads", dict(architectures=["Qwen3NextForCausalLM", "Qwen3NextForTokenClassification"]), ["architectures", "one kind"]),
    ("padding beyond the vocabulary", dict(pad_token_id=389), ["pad_token_id", "388"])])
def test_heads_that_export_refuses(what, changes, words, tmp_path):
    head_case("classify")
    source = WORK / "hf" / "classify plain"
    shutil.copytree(source, tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "id2label": dict(enumerate(LABELS)), **changes}))
    result = run(*EXPORT, tmp_path / "hf", "-o", tmp_path / "m.bin")
    message = result.stderr.decode()
    assert result.returncode == 1 and message.count("\n") == 1 and all(word in message for word in words), message
    assert not (tmp_path / "m.bin").exists()


# ----------------------------------------------------------------------------------------------------------------
# 20 Siblings: Qwen3.5 and 3.6, the text part
# ----------------------------------------------------------------------------------------------------------------

VISION = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, num_position_embeddings=16)
MROPE = dict(rope_type="default", rope_theta=1e7, partial_rotary_factor=0.25, mrope_section=[2, 1, 1], mrope_interleaved=True)

# name -> (whether it has experts, whether it sees, changes of the sizes)
SIBLINGS = {
    "dense": (False, False, {}), "dense, tied": (False, False, dict(tie_word_embeddings=True)),
    "dense, n_v = 3 n_k, layer order": (False, False, dict(linear_num_value_heads=6, num_hidden_layers=5, layer_types=[FULL, LINEAR, LINEAR, FULL, LINEAR])),
    "dense that sees": (False, True, {}), "dense that sees, tied": (False, True, dict(tie_word_embeddings=True)),
    "experts": (True, False, {}), "experts, head dims differ, attention_bias": (True, False, dict(linear_value_head_dim=40, attention_bias=True)),
    "experts that see": (True, True, dict(num_experts=7, num_experts_per_tok=3, partial_rotary_factor=0.5)),
    "experts, odd sizes": (True, False, dict(KINDS["odd sizes"], rope_parameters=dict(MROPE, partial_rotary_factor=0.5)))}


@functools.cache
def sibling(name, bf16=False):
    """(model in float32, its directory) of one of the siblings."""
    experts, sees, changes = SIBLINGS[name]
    sizes = {**TINY, "rope_parameters": MROPE, **changes}
    if experts:
        sizes.pop("intermediate_size")
        config, outer = transformers.Qwen3_5MoeTextConfig, transformers.Qwen3_5MoeConfig
        lone, seeing = transformers.Qwen3_5MoeForCausalLM, transformers.Qwen3_5MoeForConditionalGeneration
    else:
        sizes = without_experts(sizes)
        config, outer = transformers.Qwen3_5TextConfig, transformers.Qwen3_5Config
        lone, seeing = transformers.Qwen3_5ForCausalLM, transformers.Qwen3_5ForConditionalGeneration
    directory = WORK / "hf" / f"{name}-{'bf16' if bf16 else 'f32'}"
    if sees:
        config = outer(text_config=sizes, vision_config=dict(VISION, out_hidden_size=sizes["hidden_size"]),
                       tie_word_embeddings=sizes.get("tie_word_embeddings", False))
    else:
        config = config(**sizes)
    for seed in itertools.count(sum(name.encode())):
        model = randomized((seeing if sees else lone)(config).eval(), seed)
        model = rounded_to_bf16(model) if bf16 else model
        if router_margin(model, random_ids(max(PROMPTS), config.get_text_config().vocab_size)) > 1e-4:
            break
    copied = type(model)(config).to(torch.bfloat16 if bf16 else torch.float32)
    copied.load_state_dict(model.state_dict())
    copied.save_pretrained(directory)
    return model, directory


@functools.cache
def sibling_checkpoint(name, weights):
    return export(sibling(name, weights == "bf16")[1], WORK / f"{name}-{weights}.bin", "--type", weights, "--check")


@pytest.mark.parametrize("weights", ["f32", "bf16"])
@pytest.mark.parametrize("name", SIBLINGS)
def test_siblings_equal_transformers(name, weights, report):
    model, _ = sibling(name, weights == "bf16")
    errors = {}
    for n in PROMPTS:
        ids = random_ids(n, model.config.get_text_config().vocab_size)
        reference = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
        errors[n] = logits_error(engine_logits(sibling_checkpoint(name, weights), ids), reference)
    report(f"{name}, {weights}: largest error {max(errors.values()):.1e} of the standard deviation")
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("name", ["dense", "experts", "dense, n_v = 3 n_k, layer order"])
def test_siblings_draft_as_the_module(name, tmp_path, report):
    """Their MTP heads: a dense model's has one network, that of a model of experts has experts."""
    model, directory = sibling(name)
    for seed in itertools.count(1):
        tensors = mtp_tensors(model, seed)
        ids = random_ids(40, model.config.vocab_size, seed)
        drafting = DraftingModel(model, tensors)
        if router_margin(drafting, ids) > 1e-4 and draft_margin(drafting(torch.tensor([ids]))) > 1e-3:
            break
    save_file(tensors, tmp_path / "mtp.safetensors", {"format": "pt"})
    checkpoint = export(directory, tmp_path / "m.bin", "--type", "f32", "--mtp", tmp_path / "mtp.safetensors")
    error = logits_error(engine_draft_logits(checkpoint, ids), mtp_reference(model, tensors, ids))
    report(f"{name}: drafts' largest error {error:.1e} of the standard deviation")
    assert error < TOLERANCE
    plain = engine(checkpoint, "--ids", "-i", spaced(ids), "-n", 40, "-s", 3, "-d", 0)
    for drafts in (1, 3):
        assert engine(checkpoint, "--ids", "-i", spaced(ids), "-n", 40, "-s", 3, "-d", drafts) == plain


def test_siblings_with_little_memory():
    """Experts from disk: the same bits; a dense model has none and says so."""
    whole = engine_logits(sibling_checkpoint("experts", "f32"), random_ids(50, 389))
    size = sibling_checkpoint("experts", "f32").stat().st_size
    np.testing.assert_array_equal(engine_logits(sibling_checkpoint("experts", "f32"), random_ids(50, 389), "--memory", size // 2), whole)
    result = run(ENGINE, sibling_checkpoint("dense", "f32"), "--ids", "-i", 1, "-n", 1, "--memory", 1000)
    assert result.returncode == 1 and result.stderr.count(b"\n") == 1


@functools.cache
def qwen3_5_tokenizer():
    """transformers' tokenizer of Qwen3.5, with the real vocabulary of Qwen3 (theirs is larger, and not here), as
    (library's object, tokenizer.bin)."""
    qwen3 = json.loads(real_tokenizer(with_added=False).to_str())["model"]
    made = Qwen3_5Tokenizer(vocab={**qwen3["vocab"], "<|endoftext|>": len(qwen3["vocab"])}, merges=[tuple(pair) for pair in qwen3["merges"]])
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", SEPARATOR]})
    folder = WORK / "qwen3.5"
    made.save_pretrained(folder)
    path = export_tokenizer(folder / "tokenizer.json", folder / "tokenizer.bin")
    return made.backend_tokenizer, path


def test_ids_equal_qwen3_5_s_tokenizer():
    """Its split pattern counts marks as letters: the same texts, and many more with marks in all places."""
    library, path = qwen3_5_tokenizer()
    texts, rng = list(corpus(random.Random(35))), random.Random(36)
    for _ in range(1000):
        pools = [MARKS, BASES, list("aZ1 .'\n-"), PHRASES[rng.randrange(len(PHRASES))], list("\u0903\u093e\u09be\u0488\u20dd\ufe0f")]
        texts.append("".join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(1, 40))))
    check_ids(texts, path, library)
    differ = sum(a.ids != b.ids for a, b in zip(library.encode_batch(texts), real_tokenizer(False).encode_batch(texts)))
    assert differ > 200                                          # the pattern matters to these texts


def test_what_is_read_one_after_the_other(tmp_path):
    """A tokenizer that puts a token between a question and a context is refused, one that puts nothing there is not."""
    folder = qwen3_5_tokenizer()[1].parent
    whole = json.loads((folder / "tokenizer.json").read_text())
    assert whole["post_processor"]["type"] == "TemplateProcessing"
    whole["post_processor"]["pair"].insert(1, {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}})
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    result = run(*EXPORT, "--tokenizer", tmp_path / "tokenizer.json", "-o", tmp_path / "t.bin")
    assert result.returncode == 1 and b"post_processor" in result.stderr and result.stderr.count(b"\n") == 1


def test_white_space_is_python_s(tmp_path):
    """A template that trims: every character that str.strip takes off, and none that it does not."""
    white = [c for c in CODE_POINTS if c.isspace() and c not in "\r\n"]
    others = ["\u200b", "\u180e", "\ufeff", "\u2060", "\x1b", "\x7f", "\u0300", "\u3001"]
    questions = [c + "Hi" + c for c in white + others if c != "\x1b"] + ["".join(white) + "a" + "".join(white)]
    output, history = chat(chat_model("trimmed"), questions, "-t", 0, "-n", 1)
    answer = real_tokenizer().decode(real_tokenizer().encode(SCRIPT).ids[:1])
    check_history(history, "trimmed", conversation("trimmed", questions, answers=[answer] * len(questions)), answer)


@pytest.mark.parametrize("what, change, words", [
    ("vision only", lambda c: c.pop("text_config"), ["text_config"]), ("another text model", lambda c: c["text_config"].update(model_type="llama"), ["text_config", "llama"]),
    ("a gate that is none", lambda c: c["text_config"].update(attn_output_gate=False), ["attn_output_gate"]),
    ("quantized", lambda c: c.update(quantization_config={"quant_method": "fp8"}), ["quantization_config"])])
def test_siblings_that_export_refuses(what, change, words, tmp_path):
    shutil.copytree(sibling("dense that sees")[1], tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    change(config)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    result = run(*EXPORT, tmp_path / "hf", "-o", tmp_path / "m.bin")
    message = result.stderr.decode()
    assert result.returncode == 1 and message.count("\n") == 1 and all(word in message for word in words), message


# ----------------------------------------------------------------------------------------------------------------
# 21 Inside: --dump and -m trace
# ----------------------------------------------------------------------------------------------------------------

class Hooks:
    """What happens inside a model of transformers: a forward over ids, with hooks at every module and in place of the two
    functions that mix tokens. seen: the engine's name of a tensor -> float32 [n, columns]; weights: layer -> attention
    weights [H, n, n]."""

    def __init__(self, model, ids):
        self.config, self.n = model.config.get_text_config(), len(ids)
        self.seen, self.weights, self.layer = {}, {}, None
        text = model.model.language_model if hasattr(model.model, "language_model") else model.model
        module = sys.modules[type(text).__module__]
        model.set_attn_implementation("eager")
        hooks = [text.embed_tokens.register_forward_hook(lambda m, i, out: self.see("embed_tokens", out)),
                 text.norm.register_forward_hook(lambda m, i, out: (self.see("output", i[0]), self.see("norm", out))[:0] or None)]
        for number, layer in enumerate(text.layers):
            hooks += self.hook_layer(f"layers.{number}.", number, layer)
        delta_rule, attention = module.torch_chunk_gated_delta_rule, module.eager_attention_forward

        def watch_delta_rule(query, key, value, g, beta, **kwargs):
            unit = lambda x: x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
            heads = self.config.linear_num_key_heads                    # transformers has repeated them
            self.see(self.layer + "linear_attn.query", unit(query)[:, :, ::query.shape[2] // heads] / query.shape[-1] ** 0.5)
            self.see(self.layer + "linear_attn.key", unit(key)[:, :, ::key.shape[2] // heads])
            for name, tensor in dict(value=value, decay=g.exp(), beta=beta).items():
                self.see(f"{self.layer}linear_attn.{name}", tensor)
            return delta_rule(query, key, value, g=g, beta=beta, **kwargs)

        def watch_attention(m, query, key, value, *args, **kwargs):
            self.see(self.layer + "self_attn.query", query.transpose(1, 2) / query.shape[-1] ** 0.5)
            self.see(self.layer + "self_attn.key", key.transpose(1, 2))
            out, weights = attention(m, query, key, value, *args, **kwargs)
            self.weights[m.layer_idx] = weights[0].numpy()
            return out, weights

        module.torch_chunk_gated_delta_rule, module.eager_attention_forward = watch_delta_rule, watch_attention
        try:
            self.logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        finally:
            module.torch_chunk_gated_delta_rule, module.eager_attention_forward = delta_rule, attention
            for hook in hooks:
                hook.remove()

    def see(self, name, tensor):
        self.seen[name] = tensor.detach().float().reshape(self.n, -1).numpy().copy()

    def hook_layer(self, name, number, layer):
        """The hooks of one layer."""
        def enter(m, args, kwargs):
            self.layer = name
            self.see(name + "input", args[0] if args else kwargs["hidden_states"])

        def out_as(key, change=lambda x: x):
            return lambda m, i, out: self.see(name + key, change(out[0] if isinstance(out, tuple) else out)) and None

        yield layer.register_forward_pre_hook(enter, with_kwargs=True)
        for key in ("input_layernorm", "post_attention_layernorm", "mlp"):
            yield getattr(layer, key).register_forward_hook(out_as(key))
        yield from self.hook_attention(name, layer.self_attn) if hasattr(layer, "self_attn") else self.hook_linear(name, layer.linear_attn)
        if hasattr(layer.mlp, "experts"):
            yield layer.mlp.gate.register_forward_hook(lambda m, i, out: self.see_router(name, out))
            yield layer.mlp.shared_expert_gate.register_forward_hook(out_as("mlp.shared_weight", torch.sigmoid))

    def see_router(self, name, out):
        """The router's logits; weights by expert, ascending."""
        logits, weights, experts = out
        self.see(name + "mlp.gate", logits)
        self.see(name + "mlp.top_weight", weights.gather(1, experts.argsort(1)))
        self.see(name + "mlp.top_expert", experts.sort(1).values)

    def hook_attention(self, name, mixer):
        def see_q(m, i, out):
            q, gate = out.view(self.n, self.config.num_attention_heads, 2, -1).unbind(2)
            self.see(name + "self_attn.q_proj", q)
            self.see(name + "self_attn.gate", gate)

        yield mixer.q_proj.register_forward_hook(see_q)
        for key in ("k_proj", "v_proj"):
            yield getattr(mixer, key).register_forward_hook(lambda m, i, out, key=key: self.see(f"{name}self_attn.{key}", out))
        yield mixer.o_proj.register_forward_hook(lambda m, i, out: self.see(name + "self_attn.gated", i[0]))
        yield mixer.register_forward_hook(lambda m, i, out: self.see(name + "self_attn", out[0]))

    def hook_linear(self, name, mixer):
        name, c, parts = name + "linear_attn", self.config, {}
        dk, dv, groups = c.linear_key_head_dim, c.linear_value_head_dim, c.linear_num_key_heads
        ratio = c.linear_num_value_heads // groups

        def see_fused(key, widths):                                     # of a group's part of each: sorted as the engine has them
            return lambda m, i, out: self.see(f"{name}.{key}", torch.cat(
                [part.reshape(self.n, -1) for part in out.view(self.n, groups, -1).split(widths, 2)], 1))

        def see_apart(key, part, others):
            def look(m, i, out):
                parts[part] = out
                if all(p in parts for p in others):
                    self.see(f"{name}.{key}", torch.cat([parts.pop(p) for p in others], -1))
            return look

        if hasattr(mixer, "in_proj_qkvz"):
            yield mixer.in_proj_qkvz.register_forward_hook(see_fused("in_proj_qkvz", [dk, dk, ratio * dv, ratio * dv]))
            yield mixer.in_proj_ba.register_forward_hook(see_fused("in_proj_ba", [ratio, ratio]))
        else:
            for key, others in (("in_proj_qkvz", ("qkv", "z")), ("in_proj_ba", ("b", "a"))):
                for part in others:
                    yield getattr(mixer, "in_proj_" + part).register_forward_hook(see_apart(key, part, others))
        yield mixer.norm.register_forward_hook(lambda m, i, out: self.see(name + ".norm", out))
        yield mixer.register_forward_hook(lambda m, i, out: self.see(name, out))


INSIDE = ["plain", "head dims differ", "n_v = 3 n_k", "mlp_only_layers", "attention_bias", "layer order", "yarn", "odd sizes", "norm_topk_prob false",
          "sibling dense", "sibling experts", "sibling dense that sees"]


def inside_case(kind):
    """(model, checkpoint in f32) of a kind or sibling."""
    name = kind.removeprefix("sibling ")
    return (sibling(name)[0], sibling_checkpoint(name, "f32")) if name != kind else (kind_model(kind), random_checkpoint(kind))


@pytest.mark.parametrize("options", [(), ("--batch", 7)], ids=["at once", "in batches"])
@pytest.mark.parametrize("kind", INSIDE)
def test_every_dumped_tensor_equals_the_hooks(kind, options, tmp_path, report):
    """No tensor more, none less, each within tolerance of its own standard deviation."""
    model, checkpoint = inside_case(kind)
    ids = random_ids(40, model.config.get_text_config().vocab_size)
    hooks, worst = Hooks(model, ids), {}
    engine_logits(checkpoint, ids, "--dump", tmp_path, *options)
    dumped = {file.name.removesuffix(".npy"): np.load(file) for file in tmp_path.iterdir()}
    assert set(dumped) == set(hooks.seen)
    for name, tensor in dumped.items():
        assert tensor.dtype == np.float32 and tensor.shape == hooks.seen[name].shape, name
        worst[name] = float(np.abs(tensor - hooks.seen[name]).max() / hooks.seen[name].std())
        assert not name.endswith("top_expert") or worst[name] == 0
    name = max(worst, key=worst.get)
    report(f"{kind}: {len(dumped)} tensors, largest error {worst[name]:.1e} of the standard deviation, in {name}")
    assert worst[name] < TOLERANCE, worst


def near_all(ours, reference, tolerance=TOLERANCE):
    """Whether numbers agree within tolerance of the largest of them."""
    reference = np.asarray(reference, np.float64)
    return np.abs(np.asarray(ours, np.float64) - reference).max() < tolerance * max(np.abs(reference).max(), 1e-9)


@pytest.mark.parametrize("kv", ["f32", "f16"])
@pytest.mark.parametrize("kind", INSIDE)
def test_every_number_of_a_trace_equals_the_hooks(kind, kv, tmp_path):
    model, checkpoint = inside_case(kind)
    config, n = model.config.get_text_config(), 23
    ids = random_ids(n, config.vocab_size)
    hooks = Hooks(model, ids)
    seen, tolerance = hooks.seen, TOLERANCE if kv == "f32" else 2e-2
    engine(checkpoint, "-m", "trace", "--ids", "-i", spaced(ids), "-o", tmp_path / "t", "--kv", kv, "--batch", 9)
    lines = [json.loads(line) for line in (tmp_path / "t").read_text().splitlines()]
    assert sorted((line["layer"], line["position"]) for line in lines) == [(l, t) for l in range(config.num_hidden_layers) for t in range(n)]
    text = model.model.language_model if hasattr(model.model, "language_model") else model.model
    for line in lines:
        layer, t = line["layer"], line["position"]
        after = seen[f"layers.{layer + 1}.input" if layer + 1 < config.num_hidden_layers else "output"][t]
        mixer = "self_attn" if line["type"] == "full_attention" else "linear_attn"
        assert line["type"] == config.layer_types[layer] and line["id"] == ids[t] and "token" not in line
        norms = [np.linalg.norm(x) for x in (seen[f"layers.{layer}.input"][t], seen[f"layers.{layer}.{mixer}"][t], seen[f"layers.{layer}.mlp"][t], after)]
        assert near_all([line[name] for name in ("input_norm", "mixer_norm", "mlp_norm", "output_norm")], norms, tolerance)
        if mixer == "linear_attn":
            assert near_all(line["decay"], seen[f"layers.{layer}.linear_attn.decay"][t]), line
            assert near_all(line["beta"], seen[f"layers.{layer}.linear_attn.beta"][t], tolerance)
        else:
            gate = 1 / (1 + np.exp(-seen[f"layers.{layer}.self_attn.gate"][t].reshape(config.num_attention_heads, -1)))
            weights = hooks.weights[layer][:, t, :t + 1]
            assert near_all(line["gate"], gate.mean(1), tolerance)
            assert np.abs(np.array(line["entropy"]) + (weights * np.log(np.maximum(weights, 1e-30))).sum(1)).max() < tolerance * 3
            for head, positions in zip(weights, line["positions"]):
                assert len(positions) == min(3, t + 1) and near_all([w for _, w in positions], np.sort(head)[::-1][:3], tolerance)
                assert near_all([head[i] for i, _ in positions], [w for _, w in positions], tolerance)
        if f"layers.{layer}.mlp.gate" in seen:
            assert {e for e, _ in line["experts"]} == set(seen[f"layers.{layer}.mlp.top_expert"][t].astype(int).tolist())
            assert near_all([w for _, w in line["experts"]], np.sort(seen[f"layers.{layer}.mlp.top_weight"][t])[::-1], tolerance)
            assert near_all(line["shared_weight"], seen[f"layers.{layer}.mlp.shared_weight"][t], tolerance)
        else:
            assert "experts" not in line and "shared_weight" not in line
        p = model.lm_head(text.norm(torch.tensor(after))).softmax(-1).numpy()
        assert near_all([w for _, w in line["next"]], np.sort(p)[::-1][:5], tolerance * 5) and near_all([p[i] for i, _ in line["next"]], [w for _, w in line["next"]], tolerance * 5)


def test_trace_for_people(tmp_path):
    """The table: the last token's rows of all layers, numbers that are those of the JSON lines; the tokens' text in both."""
    text = "Once upon a time there was a \u201clittle\u201d \U0001f989"
    if not DEMO.exists():
        pytest.skip("no demo checkpoint")
    table = engine(DEMO, "-m", "trace", "-i", text, "-o", tmp_path / "t", "-j", 2).decode()
    lines = [json.loads(line) for line in (tmp_path / "t").read_text().splitlines()]
    tokens = [line["token"] for line in lines if line["layer"] == 0]
    file = read_tokenizer(DEMO_TOKENIZER)
    ids = library_tokenizer(file).encode(text).ids
    assert [line["id"] for line in lines if line["layer"] == 0] == ids
    texts = [file.tokens[id] for id in ids]
    assert all(token.encode() == text or "\ufffd" in token for token, text in zip(tokens, texts)) and "\ufffd" in "".join(tokens)
    last = [line for line in lines if line["position"] == len(ids) - 1]
    blocks = re.split(r"^layer \d+, ", table, flags=re.M)[1:]
    assert len(blocks) == len(last) and table.startswith(f"position {len(ids) - 1}")
    for block, line in zip(blocks, last):
        assert block.startswith("gated attention" if line["type"] == "full_attention" else "Gated DeltaNet")
        shown = re.findall(r"\d\.\d{3}\b", block.split("\n", 1)[1])
        wanted = [f"{x:.3f}" for x in line.get("gate", line.get("decay")) + line.get("entropy", line.get("beta"))]
        assert shown[:len(wanted)] == wanted
        assert f"-> {line['output_norm']:.4g}, mixer +{line['mixer_norm']:.4g}, mlp +{line['mlp_norm']:.4g}" in block
        assert all(json.dumps(token, ensure_ascii=False).replace(r"\n", r"\u000a") in block for token in line["next_tokens"])
    alone = engine(DEMO, "-m", "trace", "-i", text).decode()
    assert alone == table
    for full in ("/dev/full", "/dev/stdout"):                    # the right reason, in one line
        with open("/dev/full", "wb") as output:
            result = subprocess.run([ENGINE, DEMO, "-m", "trace", "-i", "a", "-o", full], stdout=output, stderr=subprocess.PIPE)
        assert result.returncode == 1 and result.stderr == f"qwen3next: {full}: No space left on device\n".encode(), result.stderr
    with open(tmp_path / "both", "wb") as both:                  # the table must not be lost in a file that it shares
        assert subprocess.run([ENGINE, DEMO, "-m", "trace", "-i", "a", "-o", "/dev/stdout"], stdout=both, stderr=subprocess.PIPE).returncode == 1
    assert run(ENGINE, DEMO, "-m", "trace", "-i", "a", "-o", DEMO).returncode == 1
    for mode in HEAD_CLASSES:                                    # models without a next token
        lines = engine(head_case(mode)[1], "-m", "trace", "--ids", "-i", "1 2", "-o", "/dev/stdout").decode().splitlines()
        assert sum(line.startswith("{") and "next" not in json.loads(line) for line in lines) == 8


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "fuzz-seeds":
        sys.exit("usage: python test_all.py fuzz-seeds FOLDER (the tests: python -m pytest test_all.py)")
    fuzz_seeds(Path(sys.argv[2]).resolve())


# ----------------------------------------------------------------------------------------------------------------
# 22 The demo: its corpus, its training, and what it can do
# ----------------------------------------------------------------------------------------------------------------

@functools.cache
def demo_module(name):
    """demo/NAME.py, imported."""
    sys.path.insert(0, str(ROOT / "demo"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "demo"))


@functools.cache
def grammar():
    return demo_module("corpus").Grammar()


def test_the_corpus_follows_from_its_seed(tmp_path):
    """The same documents whatever the number of processes; others from another seed."""
    for name, seed, documents, prefix in ("a", 7, 1020, []), ("b", 7, 1020, ["taskset", "-c", "0"]), ("c", 8, 20, []):
        result = run(*prefix, sys.executable, ROOT / "demo" / "corpus.py", "--documents", documents, "--seed", seed, "-o", tmp_path / name)
        assert result.returncode == 0, result.stderr
    one, same, other = ((tmp_path / name).read_text() for name in "abc")
    assert one == same and one.count("\n") == 1020 and not set(one.splitlines()) & set(other.splitlines())
    for name in "01":                                           # nor on the order of a set
        result = run("env", f"PYTHONHASHSEED={name}", sys.executable, ROOT / "demo" / "corpus.py", "--documents", 60, "-o", tmp_path / name)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text()
    assert not list(tmp_path.glob("*.tmp"))
    for wrong, words in (["--show", "nosuch"], b"nosuch"), (["--documents", 0], b"--documents"), (["-o", tmp_path / "a" / "b"], str(tmp_path / "a").encode()), (["-o", tmp_path], b"wanted a file"), (["--count", 3], b"--show"):
        result = run(sys.executable, ROOT / "demo" / "corpus.py", "--documents", 5, *wrong)
        assert result.returncode and words in result.stderr and b"Traceback" not in result.stderr


def test_documents_of_the_corpus():
    """ChatML as the template writes it, right sums, no notation left over, and nothing of what is held out."""
    sums, message = 0, r"<\|im_start\|>(?:system|user|assistant)\n(?:(?!<\|).)+<\|im_end\|>"
    for i in range(700):
        pieces = demo_module("corpus").document(grammar(), random.Random(f"test {i}"))
        begun, text = pieces[-1] == "", "".join(pieces)          # a story that is only begun
        if begun and text.startswith("<|im_start|>"):
            pieces, text = [pieces[0], pieces[1] + "<|im_end|>"], text + "<|im_end|>"
        if text.startswith("<|im_start|>"):
            assert re.fullmatch(rf"(?s){message}(?:\n{message})*", text), text
            assert all(piece.endswith("<|im_start|>assistant\n") for piece in pieces[::2]), pieces      # read; what follows is learned
            assert all(re.fullmatch(r"(?s)(?:(?!<\|).)+<\|im_end\|>", piece) for piece in pieces[1::2]), pieces
        else:
            assert len(pieces) == 2 + begun and len(pieces[0].split()) < 100 and len(text.split()) > (5 if begun else 100), pieces
        bare = re.sub(r"<\|im_(start|end)\|>", "", text)
        assert not re.search(r"[{}|<>]", bare) and "  " not in bare, text
        assert not grammar().held_out.words & set(re.findall("[a-z]+", text.lower())), text
        for a, sign, b, c in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", text):
            assert int(c) == (int(a) + int(b) if sign == "+" else int(a) - int(b)), text
            sums += 1
    assert sums > 100


def test_sums_of_the_second_training():
    """Whatever the wording, the answer is of the numbers that were asked for, and of their sum or difference as it was asked."""
    corpus, otherwise = demo_module("corpus"), collections.Counter()
    words, rng = corpus.Grammar(second=True), random.Random("second")
    for _ in range(1500):
        question, answer = corpus.sum_turn(words, rng)
        if told := re.search(r"(\d+) ([+-]) (\d+) = (\d+)", answer):
            a, sign, b, c = told.groups()
            assert int(c) == (int(a) + int(b) if sign == "+" else int(a) - int(b)), answer
            asked = question.lower()
            numbers = [word if word.isdigit() else str(corpus.NUMBERS.index(word)) for word in re.findall(r"[a-z]+|\d+", asked)
                       if word.isdigit() or word in corpus.NUMBERS]
            assert sorted(numbers) == sorted([a, b]), (question, answer)
            less = re.search(r"minus|subtract|\btake|\bless\b|difference|-|\bleft\b|give away|\bfrom\b", asked)
            assert "how many" in asked or (sign == "-") == bool(less), (question, answer)     # "and eat 2": a sum told as a story
            otherwise.update(form for form in ("subtract", "add", "plus") if re.match(rf"(can you |could you |please )?{form}", asked))
            otherwise["bare words"] += bool(re.fullmatch(r"[a-z]+ (plus|minus) [a-z]+\W?", asked))
    assert otherwise["subtract"] > 10 and otherwise["add"] > 10 and otherwise["bare words"] > 100, otherwise


def test_stories_that_nobody_asked_for_by_what_is_in_them():
    """"Another one!" and "tell me more about Pip" get a story with nobody and nothing that has no part in it, and Pip stays the fox that he was."""
    corpus = demo_module("corpus")
    for i in range(60):
        rng = random.Random(f"test {i}")
        story = corpus.tell(grammar(), rng)
        hero = story.cast.characters["hero"]
        kind, name, told = hero.kind, hero.name, []
        original = corpus.tell
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(corpus, "tell", lambda *args, **options: told.append(original(*args, **options)) or told[-1])
            asked, _ = corpus.second_story(story, corpus.Speaker(grammar(), rng))
        assert (hero.kind, hero.name) == (kind, name)
        again = told[0].cast.characters["hero"] is hero
        assert not (again and (told[0].background or told[0].extra)), asked


def test_what_was_asked_for_is_said_again_in_one_order():
    """However a user lists hero, friend, thing and place, the story's first sentence has them in this order; what has no part in it comes behind them."""
    corpus, told = demo_module("corpus"), 0
    for i in range(60):
        try:
            story = corpus.PremiseStory(grammar(), random.Random(f"test {i}"), grammar().premises["want"], asked=True)
        except ValueError:                                      # what was drawn cannot be told
            continue
        told += 1
        story.begun, story.needs, cast = "", ["friend", "place", "thing"], story.cast
        members = [(slot, cast) for slot in ("nature", "place", "thing", "friend", "hero")]
        kinds = [cast.characters[role].kind for role in ("hero", "friend")]
        wanted = f"a {kinds[0]} and a {kinds[1]}, with a {cast.thing}, {cast['at place']}, and of {cast['nature']}"
        assert {corpus.in_order(story, "", random.Random(n).sample(members, 5), bare=True) for n in range(9)} == {wanted}
    assert told > 40


def test_titles_are_for_names_that_a_user_gives():
    """Who is asked for has no title of the word lists; who is named in a beginning has one now and then, by his sex."""
    corpus, words, titles = demo_module("corpus"), grammar().words, 0
    title = re.compile("(" + "|".join(map(re.escape, words["he titles"] + words["she titles"])) + ") ")
    assert not any(title.match(corpus.tell(grammar(), random.Random(f"test {i}")).cast["hero"]) for i in range(300))
    opening = corpus.Opening(["any"], corpus.parse("{hero} lived near a pond."))
    for i in range(300):
        hero = opening.characters(grammar(), random.Random(f"test {i}"))["hero"]
        if found := title.match(hero.name or ""):
            titles += 1
            assert found[1] in words[f"{hero.gender} titles"] and not hero.child, (hero.kind, hero.name)
    assert 3 < titles < 60, titles


@pytest.mark.parametrize("trouble", demo_module("corpus").TROUBLES)
def test_plots_give_everything_its_line(trouble):
    """Behind beginnings with their trouble: all that these name comes again, some of it twice, and what the trouble is about comes right in the
    end; nothing is said twice, and who tells of himself stays "I"."""
    corpus, words = demo_module("corpus"), grammar()
    situations = [each for each in words.situations.values() if each.trouble == trouble]
    own, again = [each for each in situations if each.told_by_one], 0
    assert words.plots_for[trouble] and len(situations) > 10
    for i in range(60):
        rng = random.Random(f"{trouble} {i}")
        try:
            story = corpus.Story(words, rng, rng.choice(own if own and i % 4 == 0 else situations))
        except ValueError as error:                             # a beginning that names nobody, not what the trouble is about, or a held-out noun
            assert re.search("nobody|is not in|too little|always is held out$|always alike", str(error)), error
            continue
        assert story.text.startswith(story.begun) and corpus.repeats(story.text) is None
        assert not re.search(r"[{}|<>]|  |\bthey was\b", story.text), story.text
        first, then = story.text[len(story.begun):story.length].lower(), story.text[story.length:].lower()
        goal = (story.goal or "").lower()
        single = lambda word: words.nouns.forms.get(word, word)
        assert all({last, single(last)} & set(re.findall("[a-z'-]+", first + goal)) for _, phrase in story.named[:5] if phrase not in story.absent
                   for last in [phrase.split()[-1].lower()]), (story.named, story.text)
        if trouble not in (*corpus.GOALLESS, "wish", "quarrel"):
            assert goal in then, (goal, story.text)
        if trouble == "wish":
            assert corpus.an(corpus.conjugate(story.goal, words.words["irregular verbs"])[2]).lower() in then, story.text
        again += any(phrase.split()[-1].lower() in then for _, phrase in story.named)
        assert not re.search(r"[.!?] [a-z]", story.text[len(story.begun):]), story.text
        if story.hero.gender == "I":
            assert re.search(r"\b(I|[Mm]y|[Mm]e)\b", story.text[story.length:]), story.text
    assert again > 25, again


@pytest.mark.parametrize("told, asked", [
    ("Mia lost her hat and was sad.", "Mia loses her hat and is sad."), ("A fox named Pip had never seen snow.", "A fox named Pip has never seen snow."),
    ("They wanted to sleep, but could not.", "They want to sleep, but cannot."), ("Tom and Ann were tired and sat down.", "Tom and Ann are tired and sit down."),
    ("He carried the cup, stopped and decided to rest.", "He carries the cup, stops and decides to rest."),
    ("Nobody danced, and the king did not like it.", "Nobody dances, and the king does not like it."), ("I had a boat. It sailed.", "I have a boat. It sails.")])
def test_what_happened_is_asked_for_as_what_happens(told, asked):
    """Verbs of the past in a beginning stand in the present, and in the number of who does it, in a request for its story."""
    assert demo_module("corpus").as_of_now(told, grammar().words["irregular verbs"]) == asked


@pytest.mark.parametrize("now, base, past", [
    ("loses his hat", "lose his hat", "lost his hat"), ("has a cold", "have a cold", "had a cold"), ("carries it", "carry it", "carried it"),
    ("goes home", "go home", "went home"), ("washes up", "wash up", "washed up"), ("lies", "lie", "lay"), ("closes it", "close it", "closed it"),
    *((phrase, None, None) for phrase in ("is sad", "was late", "does not dare", "can fly", "lost his hat", "sings and dances", "waits, all day"))])
def test_what_is_asked_for_in_other_forms(now, base, past):
    """What somebody does, as "let a fox ..." and "what if a fox ..." have it; nothing where more than one verb would change."""
    forms = demo_module("corpus").unconjugated(now, grammar().words["irregular verbs"])
    assert forms == ((base, past) if base else None)


def test_requests_in_haste():
    """What is typed in haste keeps every word of what is asked for, and mostly is as it was."""
    corpus, asked, changed = demo_module("corpus"), "Please tell me a story about Zora the lynx, who can't juggle plums.", 0
    for i in range(400):
        typed = corpus.sloppy(asked, random.Random(i))
        assert all(word in typed.lower() for word in ("zora", "lynx", "juggle plums")), typed
        changed += typed != asked
    assert 15 < changed < 70, changed
    assert corpus.sloppy("A FOX", random.Random(1)) == "A FOX"


def test_scenes_are_asked_for_in_many_ways():
    """"a fox", "loses his hat": side by side, in other forms, and in two sentences, the second only of the hero."""
    corpus, words = demo_module("corpus"), grammar()
    story = corpus.PremiseStory(words, random.Random(3), words.premises["want"], asked=True)
    story.hero.kind, story.hero.name, story.hero.gender = "fox", "Pip", "he"
    rules = lambda subject, predicate: {corpus.scene_rule(story, subject, predicate) for _ in range(100)}
    assert rules("a fox named Pip", "loses his hat") == {"ask scene", "ask scene bare", "ask scene past", "ask scene apart"}
    assert (story.cast["bare predicate"], story.cast["past predicate"]) == ("lose his hat", "lost his hat")
    assert rules("a goat", "is sad") == {"ask scene"} and rules("Pip", "is sad") == {"ask scene", "ask scene apart"}


def test_plots_that_are_asked_for():
    """A request for a plot tells of its beginning, what happens there or who is there, and the story begins with just that, of a premise mostly behind a
    sentence that says what it is about; one about a hero who is known tells of him."""
    corpus, words, named, echoed, remembered = demo_module("corpus"), grammar(), 0, 0, 0
    for i in range(150):
        story = corpus.tell(words, random.Random(f"asked {i}"))
        asked, text = corpus.asked_for(story)
        assert isinstance(story, corpus.Story) and not story.foreign and story.text in text and story.text.startswith(story.begun)
        echo, last = text.split(story.text)
        remembered += bool(last)
        assert corpus.repeats(text) is None, text
        assert not echo or corpus.tidy(story.topic)[1:].rstrip(".") in echo and echo.endswith(". "), (story.topic, echo)
        echoed += bool(echo)
        assert asked and not re.search(r"[{}|<>]|  ", asked + text), (asked, text)
        own = [story.hero.kind.split()[-1], *(story.hero.name or "").split(), *(phrase.split()[-1] for _, phrase in story.named)]
        named += any(word.lower() in asked.lower() for word in own)
        assert all(question and answer for question, answer in corpus.questions(story))
    assert named > 110 and 90 < echoed < 148 and 5 < remembered < 40, (named, echoed, remembered)
    for i in range(20):
        first = corpus.tell(words, random.Random(f"first {i}"))
        if first.of_its_cast and first.hero.name:
            again = corpus.tell(words, random.Random(f"again {i}"), first.hero, asked=False)
            assert again.hero is first.hero and str(first.hero) in again.text, (first.text, again.text)


@pytest.mark.parametrize("name", sorted(demo_module("corpus").Grammar().premises))
def test_premises_tell_what_is_asked_for(name):
    """What a request for a premise names stands in the story's beginning, a noun that is made up in both, and no deed is asked for that the hero can do
    already; what it is about comes right; the hero of an earlier story may be its hero."""
    corpus, words, told = demo_module("corpus"), grammar(), 0
    for i in range(24):
        try:
            story = corpus.PremiseStory(words, random.Random(f"{name} {i}"), words.premises[name], asked=True)
        except ValueError as error:
            assert re.search("nobody|never asked|one or two|held out|always|no friend", str(error)), error
            continue
        told += 1
        begun, asked = story.begun.lower(), story.asked.lower()
        assert not re.search(r"[{}|<>]|  ", story.asked + story.text) and corpus.repeats(story.text) is None and not corpus.UNTRUE.search(asked), story.asked
        for slot, cast in [*story.must, *story.extra]:
            if slot != "clause":
                assert any(part.split()[0].lower() in begun for part in (cast.verbs if slot == "deed" else cast.names(slot)) if part), (slot, story.begun)
        assert story.invented is None or story.invented in asked and story.invented.split()[0] in begun, (story.invented, asked, begun)
        assert all(phrase.split()[-1].lower() in begun for _, phrase in story.named), (story.named, story.begun)
        if story.trouble == "wish":
            past = re.sub("^went (?=to |in )", "got ", corpus.conjugate(story.goal, words.words["irregular verbs"])[2])          # he arrives
            assert corpus.an(past).lower() in story.text[story.length:].lower(), story.text
        with contextlib.suppress(ValueError):                   # somebody who wants to bake himself
            again = corpus.PremiseStory(words, random.Random(i), words.premises["deed"], asked=False, known=story.hero)
            assert str(story.hero) in again.text and again.asked is None and not again.background
    assert told > 8, told


def test_short_stories_are_told_where_short_ones_are_asked_for():
    """A request asks for a short story where there is one of up to 270 words, for a very short one where it has 190
    at most, and for a long one where it has 330 or more."""
    corpus, words, short = demo_module("corpus"), grammar(), 0
    for i in range(220):
        story = corpus.tell(words, random.Random(f"length {i}"))
        asked, text = corpus.asked_for(story)
        if story.brief:
            short += 1
            assert corpus.SHORT.search(asked) and len(text.split()) <= 270, (asked, text)
        elif corpus.SHORT.search(asked):                        # of one who is quick, or a short rope
            assert corpus.SHORT.search(text), (asked, text)
    story.text, story.brief = "word " * 180, True
    assert story.is_as_long("a very short story") and story.is_as_long("a story") and not story.is_as_long("a long story")
    story.text = "word " * 260
    assert story.is_as_long("a short story") and not story.is_as_long("just a few lines")
    story.text, story.brief = "word " * 400, False
    assert story.is_as_long("a long story") and not story.is_as_long("a short story")
    assert 8 < short < 50, short


@pytest.mark.parametrize("asked, true", [
    ("two friends, a fox and a goat", False), ("my friend wants a story about a fox", True), ("how a fox and a goat met", False),
    ("a fox who becomes friends with a goat", False), ("a fox and a goat who go on a journey", False), ("a fox who has a kite", False),
    ("a fox, and a strange kite", False), ("a fox and a kite", True), ("a short story about a fox", False), ("a fox. they are at the pond", False)])
def test_requests_are_of_what_is_told(asked, true):
    """What a request says of friends, meetings, journeys, of a thing or of its length has to be told."""
    corpus, words = demo_module("corpus"), grammar()
    story = corpus.PremiseStory(words, random.Random(3), words.premises["want"], asked=True)
    hero = story.cast.characters["hero"]
    hero.kind, hero.name, story.background = "fox", "Pip", []
    story.cast.thing, story.brief, story.invented, story.used = "kite", False, None, {"hero", "thing"}
    story.begun = "There was once a fox named Pip. A goat was always near. One day the fox saw a kite and wanted to have it."
    assert story.is_true(asked) == true


def test_nobody_in_a_plot_is_there_twice():
    """The animal that passes by where a beginning names nobody is none that the plot has already, and a snail gets no plot of a snail."""
    corpus, words = demo_module("corpus"), grammar()
    assert "snail" in words.plots["rival"].leads and "oil" not in words.plots["rival"].leads
    for i in range(250):
        story = corpus.tell(words, random.Random(f"twice {i}"))
        assert story.cast.get("visitor", "") not in story.plot.words, story.text
    for kind, premise, plot in (("hedgehog", "sad", "peddler"), ("grasshopper", "wear", "reporter"), ("beetle", "break", "inspector")):
        told = set()
        assert kind in words.plots[plot].leads and words.plots[plot].trouble == words.premises[premise].trouble
        for i in range(40):
            with contextlib.suppress(ValueError):
                told.add(corpus.PremiseStory(words, random.Random(i), words.premises[premise], False, corpus.Character(kind, "Pip", "he")).plot)
        assert told and not any(kind in each.leads for each in told), (kind, [each.name for each in told])


@pytest.mark.parametrize("begun, there", [
    ("Pip was a pirate's cook. The pirate laughed.", True), ("\"I am a pirate,\" said Pip.", False), ("Pip and Mia were playing pirate.", False),
    ("Pip was back for the pirate.", False), ("He heard the pirate.", False), ("It was as thick as a pirate.", False), ("Pip saw a big pirate.", True),
    ("Pip came from the pirate.", False), ("Pip wanted to go to the pirate.", False), ("Pip hung from the pirate.", True),
    ("It belonged to a pirate's son.", False), ("It was no bigger than a pirate.", False), ("Pip had never seen a pirate.", False), ("On the wall hung a picture of a pirate.", False),
    ("Pip thought of the pirate.", False), ("Pip told a story about a pirate.", False), ("Pip walked about the pirate.", True), ("Pip was sad, and as the pirate came, he ran.", True)])
def test_what_is_there_at_all(begun, there):
    """Of what something is only like, what somebody says that he is or plays, what is only spoken of, who only owns something, and the place that is left
    or yet to be reached, there is no line."""
    corpus = demo_module("corpus")
    story = object.__new__(corpus.Story)
    story.begun = begun
    assert story.is_there("the pirate") == there


def test_people_with_titles(monkeypatch):
    """"Uncle Omar" may be the hero, and is a man; "Mrs. Mia" is one person, and a woman; whoever is "the mailman" besides is the same."""
    corpus, words = demo_module("corpus"), grammar()
    monkeypatch.setattr(corpus.Story, "draw_others", lambda self: {})
    for text, trouble, sex, named in (("Uncle {name}, the mailman, was sad.", "low", "he", 0), ("The mole went to Mrs. {name}, for it was late.", "plain", "it", 1)):
        situation = corpus.Situation("test")
        situation.begin, situation.trouble = [corpus.parse(text)], trouble
        for seed in range(8):
            story = corpus.Story(words, random.Random(seed), situation)
            name = story.cast["name"]
            assert str(story.hero) == ("the mole" if named else f"Uncle {name}") and story.hero.gender == sex, (story.hero, story.begun)
            assert story.named == [("person", f"Mrs. {name}")] * named, (story.named, story.begun)
            assert name in words.words["she names" if named else "he names"]


@pytest.mark.parametrize("begun, sort, noun, other", [
    ("The neighbors were tired.", "many", "neighbors", False), ("Pip had a kite.", "thing", "kite", True), ("The kite struck twelve.", "thing", "kite", False),
    ("Pip slept in the kite.", "thing", "kite", False), ("Pip was good at kite flying.", "thing", "kite", False), ("Pip had a box of kites.", "many", "kites", False),
    ("The hat lay there. That was all.", "thing", "hat", True), ("Three goldfish swam.", "animal", "goldfish", False), ("The owl was at home.", "animal", "owl", True),
    ("The owl flew up.", "animal", "owl", False), ("The owl's nest was empty. The owl cried.", "animal", "owl", False), ("Pip was in the garden.", "place", "garden", True),
    ("Pip ran through the garden.", "place", "garden", False), ("It was the garden gate.", "place", "garden", False), ("Pip had a xylomb.", "thing", "xylomb", False)])
def test_what_another_noun_can_stand_for(begun, sort, noun, other):
    """A noun is exchanged only where what is said of it can be said of others."""
    corpus, words = demo_module("corpus"), grammar()
    story = object.__new__(corpus.Story)
    story.begun, story.grammar = begun, words
    assert story.is_replaceable(sort, noun) == other


def test_wishes_that_some_plots_are_not_for(monkeypatch):
    """"not:" keeps a plot of tries from a wish that is no try, to see the mountains; without it the wish gets such a plot."""
    corpus, words = demo_module("corpus"), grammar()

    def plots_told():
        told = set()
        for i in range(60):
            with contextlib.suppress(ValueError):
                story = corpus.PremiseStory(words, random.Random(f"not {i}"), words.premises["far sight"], asked=False)
                assert story.goal.split()[0] == "see"
                told.add(story.plot.name)
        return told
    kept = {name for name, plot in words.plots.items() if "see" in plot.not_verbs}
    assert "rival" in kept and plots_told() and not plots_told() & kept
    for name in kept:
        monkeypatch.setattr(words.plots[name], "not_verbs", [])
    assert plots_told() & kept


def test_a_hero_who_is_already_there_is_not_looked_for_without_end(monkeypatch):
    """Of a tin soldier who is she, as the story before has it, there is another story; of a hero whom no premise takes there is none, after so many
    tries, and the user is told of somebody else."""
    corpus, words = demo_module("corpus"), grammar()
    soldier = corpus.Character("tin soldier", "Honey", "she")
    assert "Honey" in corpus.tell(words, random.Random(1), soldier, asked=False).text
    story = corpus.tell(words, random.Random(2), asked=True)
    told = corpus.PremiseStory.__init__

    def of_new_heroes_only(self, grammar, rng, premise, asked, known=None, begun=False):
        if known:
            raise ValueError("not of him")
        told(self, grammar, rng, premise, asked, known, begun)
    monkeypatch.setattr(corpus.PremiseStory, "__init__", of_new_heroes_only)
    with pytest.raises(ValueError, match="nothing to tell of"):
        corpus.tell(words, random.Random(1), soldier, asked=False)
    asked = []
    monkeypatch.setattr(corpus, "tell", lambda grammar, rng, hero=None, asked_for=True, real=corpus.tell, **options: (
        asked.append(hero), real(grammar, rng, hero, **options))[1])
    for i in range(12):
        story.rng = random.Random(i)
        corpus.second_story(story, corpus.Speaker(words, random.Random(i)))
    assert any(asked), "nobody asked for the same hero again"


@pytest.mark.parametrize("asked, true", [
    ("a fox who wants to swim", True), ("a fox who can swim", False), ("a fox who loves to swim", False), ("the fox who could not swim", True),
    ("Can you tell me a story about a fox?", True), ("Can I have a story about a fox?", True), ("I love boys. A story about a boy", False),
    ("a fox who was never afraid of bees", False), ("a fox who works as a baker", False), ("I love foxes. A story about a fox", True)])
def test_requests_ask_for_what_is_told(asked, true):
    """A premise is not asked for in words that its story contradicts."""
    assert bool(demo_module("corpus").UNTRUE.search(asked)) != true


def test_what_is_asked_of_a_situation_is_all_that_is_told():
    """A request for a situation says what happens there, and the story begins with that alone, behind how its hero is met."""
    corpus, words, seen = demo_module("corpus"), grammar(), 0
    for i in range(400):
        rng = random.Random(f"situation {i}")
        try:
            story = corpus.Story(words, rng, rng.choice(words.situations_of["a situation"]), asked=True)
        except ValueError:
            continue
        told = [each for each in corpus.whole_sentences(story.begun) if not re.match("(?:Once|There|This is) ", each)]
        assert len(told) <= 2 and (story.deeds or story.happening), story.begun
        of_now = " ".join(corpus.as_of_now(sentence, words.words["irregular verbs"]) for sentence in corpus.whole_sentences(story.begun)).lower()
        assert (story.deeds or story.happening).split(" and ")[0].rstrip(".").lower()[-12:] in of_now, (story.deeds, story.happening, story.begun)
        seen += 1
    assert seen > 60, seen


def test_who_quarrels_is_no_third():
    """The other one of two who quarrel has no line of his own, whatever he is called."""
    corpus, words, named, titled = demo_module("corpus"), grammar(), 0, 0
    for situation in [each for each in words.situations.values() if each.trouble == "quarrel"]:
        grown_up = copy.copy(situation)                         # with whom "Mrs. Mia" quarrels: no child has a title
        grown_up.lists = {**situation.lists, "friend": ["adult"]}
        for each, seed in itertools.product((situation, grown_up), range(4)):
            with contextlib.suppress(ValueError):
                story = corpus.Story(words, random.Random(f"{situation.name} {seed}"), each)
                other = story.cast.characters["friend"].name
                assert other not in story.names or other in story.absent, (story.absent, story.text)
                named += other in story.names
                titled += other in story.names and " " in other
    assert named > 100 and titled > 3, (named, titled)


def test_troubles_that_a_beginning_tells(monkeypatch):
    """What is read of a beginning that does not say its trouble: what is wished, what is lost, who is sad; none where nothing is wrong; and no plot
    behind one in which it cannot be told."""
    corpus, words = demo_module("corpus"), grammar()
    monkeypatch.setattr(corpus.Story, "draw_others", lambda self: {})       # no noun is exchanged
    for text, trouble, goal in (
            ("{a hero} wanted to cross the river.", "wish", "cross the river"), ("{a hero} looked for the key.", "gone", "the key"),
            ("{hero} went to the barn. The goat had run away and was gone.", "away", "the goat"),
            ("{hero} turned the lamp. The lamp was broken.", "wrong", "the lamp"), ("{hero} saw a kitten. The kitten was cold.", "sad", "the kitten"),
            ("{hero} was afraid of the bell.", "afraid", "the bell"), ("The kite was stuck, and {hero} looked up.", "stuck", "the kite"),
            ("{hero} was lonely.", "low", None), ("{a hero} lived near a pond.", "plain", None)):
        found = set()
        for i in range(30):
            try:
                story = corpus.Story(words, random.Random(f"{text} {i}"), corpus.Opening(["any"], corpus.parse(text)))
                found.add((story.trouble, story.goal))
            except ValueError as error:
                assert re.search("nobody|too little|held out|alike", str(error)), error
        assert found == {(trouble, goal)}, (text, found)
    with pytest.raises(ValueError, match="what is the trouble"):
        for i in range(20):
            corpus.Story(words, random.Random(i), corpus.Opening(["any"], corpus.parse("{hero} came, but the moon did not.")))


def test_what_a_beginning_names(monkeypatch):
    """Its hero by a name, by "I", or by what it names first that is no place; all else in its order, by its sort."""
    corpus, words = demo_module("corpus"), grammar()
    monkeypatch.setattr(corpus.Story, "draw_others", lambda self: {})       # no noun is exchanged
    for text, hero, named in (
            ("My grandma has a drawer.", "I", [("person", "my grandma"), ("thing", "the drawer")]),
            ("In the garden stood a blue cup with three spoons.", "the cup", [("place", "the garden"), ("many", "the spoons")]),
            ("Two ducks swam across the pond. It was raining.", "the ducks", [("place", "the pond"), ("nature", "the rain")]),
            ('"Here!" called Grandpa. The wolf had his hat.', "Grandpa", [("animal", "the wolf"), ("thing", "his hat")]),
            ("The bear looked for a shoe. The door was locked. A mouse was afraid.", "the bear",
             [("thing", "the shoe"), ("thing", "the door"), ("animal", "the mouse")])):
        situation = corpus.Situation("test")
        situation.begin, situation.trouble = [corpus.parse(text)], "plain"
        story = corpus.Story(words, random.Random(text), situation)
        assert (story.begun, str(story.hero), story.named) == (text, hero, named), story.text
    with pytest.raises(ValueError, match="nobody there"):
        situation.begin = [corpus.parse("It was late.")]
        corpus.Story(words, random.Random(1), situation)


def told_situation(name):
    """Whether the situation NAME can be told; what is told of it and asked about it is whole."""
    corpus, words = demo_module("corpus"), grammar()
    for seed in range(12):                                      # some beginnings of one may have too little to tell of
        try:
            story = corpus.Story(words, random.Random(f"situation {name} {seed}"), words.situations[name])
        except ValueError:
            continue
        assert story.foreign and not re.search(r"[{}|<>]", story.text) and all(question and answer for question, answer in corpus.questions(story))
        return True
    return False


def test_situations_are_gone_on_with():
    """Each situation has a plot behind it, and questions that have answers; so has what goes on from a beginning of any sort."""
    corpus, words = demo_module("corpus"), grammar()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        refused = pool.map(told_situation, words.situations).count(False)
    assert refused < 0.005 * len(words.situations), refused
    for i in range(30):
        story = corpus.continued(words, random.Random(i))
        assert story.foreign and story.text.startswith(story.begun) and all(question and answer for question, answer in corpus.questions(story))


def test_stories_are_shown_by_name(capsys):
    """--show tells a premise, a plot or a situation by its name, and --check says what can never be told, and why."""
    corpus, words = demo_module("corpus"), grammar()
    for i, name in enumerate(["deed with a thing", "rival", "plain-found", *itertools.islice(words.plots, 6)]):
        story = corpus.story_of(words, name, random.Random(f"show {i}"))
        assert name in (story.source.name, story.plot.name), (name, story.source.name, story.plot.name)
    corpus.show(words, "want", 2, 1)
    assert capsys.readouterr().out.count("--- want; plot ") == 2
    few = copy.copy(words)
    few.premises, few.situations = {name: words.premises[name] for name in ("want", "bad trait")}, {"idle": corpus.Situation("idle")}
    few.situations["idle"].begin, few.situations["idle"].trouble = [corpus.parse("It was late.")], "plain"
    with pytest.raises(ValueError, match="idle: nothing to tell: nobody there: It was late."):
        corpus.story_of(few, "idle", random.Random(1))
    corpus.check(few, count=3)
    told = capsys.readouterr().out
    assert "situation idle: ValueError: nobody there: It was late.\n" in told and re.search(r"^want: [123] stories of \d{3} words$", told, re.M), told
    assert "plot rival: 0 stories\n" in told and told.count("\n") == 3 + len(words.plots), told


def test_answers_about_a_plot_are_true():
    """Whom, what and where an answer names stands in the story, the place behind the same word; and what is asked of its trouble is its goal."""
    corpus, words, asked = demo_module("corpus"), grammar(), collections.Counter()
    for i in range(600):
        story = corpus.continued(words, random.Random(f"true {i}"))
        for question, answer in corpus.questions(story):
            thing, where = story.cast.thing, re.search(r"\b([a-z]+) the ([A-Za-z' -]+)[.]$", answer)
            if question.lower().startswith("where") and not answer.startswith("To "):
                assert re.search(rf"\b(?i:{where[1]}) (the|an?) {where[2]}\b", story.begun), (answer, story.begun)
                asked["place"] += 1
            elif re.search("object|thing was|important|(is|was) there an?", question.lower()) and not answer.startswith("No"):
                assert thing in answer and re.search(rf"\b(an?|the|his|her) ([a-z-]+ )*{thing}\b", story.text), (question, answer, story.text)
                asked["thing"] += 1
            elif answer.startswith("No, there was no "):
                assert re.search("no (.+) in", answer)[1] not in story.text, (answer, story.text)
                asked["not there"] += 1
            elif match := re.search(" look(?:ed|ing) for (.+)[.]$", answer):
                assert story.trouble in ("gone", "away") and match[1] == story.goal, (answer, story.text)
                asked["goal"] += 1
            elif match := re.fullmatch("(.+) was (?:called|named) (.+)[.]", answer):
                assert match[2] in story.begun and match[1].split()[-1] in story.text, (answer, story.text)
                asked["name"] += 1
    assert all(asked[sort] > 20 for sort in ("place", "thing", "not there", "goal", "name")), asked


def test_i_is_no_object():
    """A story told by its hero is told as one tells of oneself."""
    corpus = demo_module("corpus")
    for text, wanted in {'"Ho!" said I, for I was glad.': '"Ho!" I said, for I was glad.', "The owl looked at I, and went by I did not know where.":
                         "The owl looked at me, and went by I did not know where.", "On the nose of I sat a fly.": "On my nose sat a fly.",
                         "Then came I and the cat.": "Then I came and the cat."}.items():
        assert corpus.as_told_by_me(text) == wanted


def test_names_are_made_up_where_the_user_says_them_alone():
    """A name that no list has is first said by the user; a story that chooses one takes it from the lists."""
    corpus, words, made, common = demo_module("corpus"), grammar(), 0, 0
    for i in range(220):
        pieces = corpus.document(words, random.Random(f"names {i}"))
        for name, gender in dict.fromkeys(words.words["made-up names"]):
            places = [n for n, piece in enumerate(pieces) if re.search(rf"\b{re.escape(name)}\b", piece)]
            made += bool(places)
            assert not places or places[0] % 2 == 0, (name, pieces)
            common += not places
    assert made > 10 and common > 20, (made, common)
    words.words["made-up names"][:] = [("Plimo", "he"), ("Svarrik", "she")]
    told = corpus.with_common_names(["", "Plimo met Svarrik. Plimo's hat fell.", "Who was Plimo?", "I don't know."], words.words, random.Random(1))
    name = told[1].split()[0]
    assert name in words.words["he names"] and told[1] == f"{name} met {told[1].split()[2]} {name}'s hat fell." and told[2] == f"Who was {name}?"
    kept = ["Tell of Plimo.", "Plimo was here."]
    assert corpus.with_common_names(kept, words.words, random.Random(1)) == kept


def test_a_wish_of_a_beginning_is_found():
    """What the hero wants to do, or cannot, is found, unless it is another's or a way of speaking."""
    corpus = demo_module("corpus")
    for text, wanted in {"{hero} wanted to row to the island. It was late.": "row to the island", "The {hero.kind} could not whistle.": "whistle",
                         "{he} had always wanted to paint the moon, but it was too far away.": "paint the moon", "{hero} could not believe it.": None,
                         "{hero}'s mother wanted to read.": None, "When {hero} wanted to pay, the shop was gone.": None}.items():
        for i in range(4):
            story = object.__new__(corpus.Story)
            story.cast = corpus.Cast(grammar(), random.Random(f"test {i}"))
            story.begun = corpus.tidy(grammar().expand(corpus.parse(text), story.cast, random.Random(i)))
            assert story.wish(alone=True) == wanted, story.begun


def test_two_cows(monkeypatch):
    """Of a kind of one sex there are two only if both are of it."""
    corpus, rng, seen = demo_module("corpus"), random.Random("cows"), collections.Counter()
    monkeypatch.setitem(grammar().words, "animals", ["cow", "rooster"])
    for _ in range(800):
        cast = corpus.Cast(grammar(), rng)
        hero, friend = (cast.characters[role] for role in ("hero", "friend"))
        cast.pair()
        if "pair" in cast:
            assert hero.kind == friend.kind and hero.name and friend.name and cast["pair"].startswith("two ")
            assert corpus.SEX.get(hero.kind, hero.gender) == hero.gender
            if hero.kind in corpus.SEX:
                assert friend.gender == hero.gender, (hero.kind, friend.gender)
                seen[hero.kind] += 1
    assert seen.keys() == {"cow", "rooster"}


def test_a_story_only_begun():
    """A request and the first words of its story, which end a sentence; the end of such a document is not learned."""
    alone = 0
    for i in range(80):
        asked, text, last = demo_module("corpus").begun(grammar(), random.Random(f"begun {i}"))
        in_chat = asked.startswith("<|im_start|>user\n") and asked.endswith("assistant\n")
        assert last == "" and (in_chat or "<|" not in asked)
        assert re.search(r'[.!?]"?$', text) and 4 < len(text.split()) < 250, text
        alone += not in_chat
    assert 10 < alone < 60


def test_other_names_and_words_in_what_is_begun():
    """They are put into request and story alike, at its first word, too, and what both have in common anyway stays."""
    corpus, renamed, reworded = demo_module("corpus"), 0, 0
    for i in range(60):
        asked, text = corpus.reworded("Omar met the goat. Once it sang.", "So there was Omar, and there was the goat.", grammar(),
                                      random.Random(f"words {i}"))
        name, noun = re.fullmatch(r"([A-Z]\w+) met the (.+)\. Once it sang\.", asked).groups()
        assert text == f"So there was {name}, and there was the {noun}."
        renamed, reworded = renamed + (name != "Omar"), reworded + (noun != "goat")
    assert 20 < renamed < 60 and reworded > 50


def test_a_cast_that_cannot_be():
    """A hero of the only kind that a tale's friend may be, and without a name: an error, at which another tale is drawn, and not a search
    without end."""
    corpus, rng = demo_module("corpus"), random.Random("snowman")
    draw = lambda name, lists: corpus.draw_characters(grammar().words, rng, lists, corpus.Character("snowman", name, "he"))
    assert draw("Pip", {"friend": ["snowman"]})["friend"].kind == "snowman" and draw(None, {"friend": ["fox", "snowman"]})["friend"].kind == "fox"
    with pytest.raises(ValueError, match="no friend"):
        draw(None, {"friend": ["snowman"]})


def test_two_of_a_kind_are_asked_for():
    """No story is of two foxes, of whom one has no name, whose request does not say "two foxes", and hardly any of two who both have one."""
    corpus, rng, pairs, alike, told = demo_module("corpus"), random.Random("pairs"), 0, 0, 0
    while pairs < 40:
        story = corpus.tell(grammar(), rng)
        hero, friend = (story.cast.characters[role] for role in ("hero", "friend"))
        asked, _ = corpus.asked_for(story)
        if "pair" in story.cast:
            pairs += 1
            assert story.cast["pair"].lower() in asked.lower(), (story.cast["pair"], asked)
        elif isinstance(story, corpus.PremiseStory) and "friend" in story.needs and hero.kind not in ("boy", "girl"):
            assert hero.kind != friend.kind or hero.name and friend.name, story.text
            told, alike = told + 1, alike + (hero.kind == friend.kind)
    assert told > 200 and alike <= told / 100, (alike, told)


def test_a_kind_of_one_sex():
    """A cow is she and a rooster he, alone or from a tale's own list."""
    corpus, rng, seen = demo_module("corpus"), random.Random("sex"), collections.Counter()
    for _ in range(400):
        for one in corpus.draw_characters(grammar().words, rng, {"hero": ["cow", "rooster", "fox"]}).values():
            assert corpus.SEX.get(one.kind, one.gender) == one.gender, (one.kind, one.gender)
            seen[one.kind] += 1
    assert seen["cow"] > 20 and seen["rooster"] > 20
    words = {**grammar().words, "animals": ["cow", "rooster"]}
    for _ in range(40):
        one = corpus.draw_being(words, rng, (0, 0, 1, 0), 0)
        assert corpus.SEX[one.kind] == one.gender


def test_an_answer_is_that_of_the_remark(monkeypatch):
    """What is said when a story was liked is not said when it was not."""
    corpus, seen = demo_module("corpus"), set()
    remarks = {name: [corpus.parse(name)] if name.rstrip("<>") in ("liked", "disliked", "why") else texts for name, texts in grammar().talk.remarks.items()}
    monkeypatch.setattr(grammar().talk, "remarks", collections.defaultdict(list, remarks))
    for i in range(300):
        pieces = corpus.story_chat(grammar(), random.Random(i))
        for user, answer in re.findall(r"(?i)(liked|disliked|why)>.*?(liked|disliked|why)<", str(pieces), re.S):
            assert user.lower() == answer.lower(), pieces
            seen.add(user.lower())
    assert len(seen) == 3


def test_what_a_beginning_speaks_of():
    """Nouns in their order, once each: known ones without an article, plurals, two in a row; what is a verb as well only behind one."""
    nouns = grammar().nouns
    for text, wanted in {"Pip had a red kite and three coins.": ["the red kite", "the coins"],
                         "It was raining. Mia saw honey, and a bear saw Mia.": ["the rain", "the honey", "the bear"],
                         "The school bell rang. Tom took his hat and ran.": ["the school bell", "his hat"],
                         "Mom can drum in her kitchen. The drum was old.": ["Mom", "her kitchen", "the drum"],
                         "Then he fell. It was well past four o'clock.": [],
                         "A plimo was in the garden.": ["the plimo", "the garden"],
                         "Mr. Finch had a dog, and the dog was called Salt.": ["Mr. Finch", "the dog"]}.items():
        assert nouns.noticed(text, set()) == wanted, text
    assert nouns.noticed("A fox and two owls found a kite.", {"kite", "owl"}) == ["the fox"]


def test_wrong_lines_of_the_tales_are_named(tmp_path):
    """A slip in a file of tales ends in one line with the file, the line's number and what is wrong with it."""
    shutil.copytree(ROOT / "demo", tmp_path / "demo", ignore=shutil.ignore_patterns("*.bin", "__pycache__"))
    for text, wanted in {"does: hop": "aa.txt:1: stands in no plot: 'does: hop'", "opening any: lose (a": "aa.txt:1: a parenthesis is not closed",
                         "plot a\nhum: hop": "aa.txt:2: plot a: wanted for: TROUBLE, then its lines, found 'hum: hop'",
                         "plot a\n\nplot a": "aa.txt:3: a second plot named a", "q a: who?": "aa.txt:1: wanted question = answer, found 'who?'",
                         "plot a\nstart: Hop.": "aa.txt:2: plot a: wanted for: TROUBLE, then its lines, found 'start: Hop.'",
                         "plot a\nfor: gone\nneeds: thing": "aa.txt:3: plot a: wanted for: TROUBLE, then its lines, found 'needs: thing'",
                         "plot a\nfor: gone\nnot: hold": "aa.txt:3: plot a: wanted for: TROUBLE, then its lines, found 'not: hold'",
                         "plot a\nfor: wish make\nnot: hold": "aa.txt:3: plot a: wanted for: TROUBLE, then its lines, found 'not: hold'",
                         "plot a\nfor: low\nend: {goal}": "aa.txt:3: plot a: no slot {goal} in its 'end'",
                         "plot a\nfor: gone\nend: {it}": "aa.txt:3: plot a: no slot {it} in its 'end'",
                         "plot a\nfor: gone\nend: Hop.": "plot a: wanted two lines 'start'"}.items():
        (tmp_path / "demo" / "tales" / "aa.txt").write_text(text + "\n")
        done = subprocess.run([sys.executable, tmp_path / "demo" / "corpus.py", "--documents", "1", "-o", tmp_path / "out"], capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith(f"corpus.py: {wanted}") and done.stderr.count("\n") == 1, done.stderr
        assert not (tmp_path / "out").exists()
    (tmp_path / "demo" / "tales" / "aa.txt").unlink()
    for text, wanted in {"begin: {hero} ran.": "situations-zz.txt:1: not understood", "situation a\ntrouble: plain = x": "situations-zz.txt:2: not understood",
                         "situation a\nbegin: {hero} ran.": "situation a: wanted begin and trouble",
                         "situation a\nbegin: {hero} ran.\ntrouble: plain\nplaec: pond": "situation a: no text has {plaec}, which it lists"}.items():
        (tmp_path / "demo" / "tales" / "situations-zz.txt").write_text(text + "\n")
        done = subprocess.run([sys.executable, tmp_path / "demo" / "corpus.py", "--documents", "1", "-o", tmp_path / "out"], capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith(f"corpus.py: {wanted}") and done.stderr.count("\n") == 1, done.stderr
    (tmp_path / "demo" / "tales" / "situations-zz.txt").unlink()
    for text, wanted in {"begin: {hero} ran.": "premises-zz.txt:1: not understood", "premise a\ntrouble: gone": "premises-zz.txt:2: not understood",
                         "premise a\noften: two": "premises-zz.txt:2: not understood", "premise a\n\npremise a": "premises-zz.txt:3: a second premise named a",
                         "premise a\nbegin: {he} ran.": "premise a: wanted begin and trouble"}.items():
        (tmp_path / "demo" / "tales" / "premises-zz.txt").write_text(text + "\n")
        done = subprocess.run([sys.executable, tmp_path / "demo" / "corpus.py", "--documents", "1", "-o", tmp_path / "out"], capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith(f"corpus.py: {wanted}") and done.stderr.count("\n") == 1, done.stderr


def tiny_work(folder):
    """A folder with 60 documents for demo/train.py, and the command that makes a tokenizer and rows of them."""
    folder.mkdir()
    words = "the a fox hat boat moon found lost said and so then went home again quietly umbrella seventeen don't \"well,\" Pip".split()
    told = [" ".join(rng.choices(words, k=40)) + "." for rng in map(random.Random, range(60))]
    (folder / "documents.jsonl").write_text("".join(json.dumps(["", text]) + "\n" for text in told))
    return [sys.executable, ROOT / "demo" / "train.py", "--prepare-only", "--device", "cpu", "--row", 128, "--work", folder]


def test_rows_of_the_training_are_of_its_tokenizer(tmp_path):
    """Another tokenizer makes other rows, also that of --start, and without documents it is refused; of the two files of rows, one that
    was removed comes back as it was."""
    work, other, bare = tmp_path / "work", tmp_path / "other", tmp_path / "bare"
    prepare, larger = tiny_work(work), tiny_work(other)
    for command, size in (prepare, 280), (larger, 300):
        result = run_forked(*command, "--set", f"vocab_size={size}")
        assert result.returncode == 0, result.stderr
    largest = lambda: max(max(rows.max(), (-2 - rows).max()) for rows in (np.load(work / name) for name in ("rows.npy", "held-out.npy")))
    made = {name: (work / name).read_bytes() for name in ("rows.npy", "held-out.npy")}
    assert largest() < 280
    for name in made:
        (work / name).unlink()
        result = run_forked(*prepare)
        assert result.returncode == 0 and all((work / name).read_bytes() == data for name, data in made.items()), result.stderr
    old = (work / "tokenizer.json").read_bytes()
    (work / "tokenizer.json").unlink()
    (other / "model.safetensors").touch()                       # --prepare-only does not read it
    result = run_forked(*prepare, "--start", other)
    assert result.returncode == 0 and largest() >= 280, result.stderr
    (work / "tokenizer.json").write_bytes(old)                  # as when a run is stopped between the tokenizer and its rows
    shutil.copytree(work, bare, ignore=shutil.ignore_patterns("documents.jsonl"))
    result = run_forked(*prepare[:-1], bare)
    assert result.returncode == 1 and b"documents.jsonl: not there" in result.stderr and b"older than tokenizer.json" in result.stderr, result.stderr
    result = run_forked(*prepare)
    assert result.returncode == 0 and largest() < 280 and (work / "rows.npy").read_bytes() == made["rows.npy"], result.stderr
    result = run_forked(*prepare, "--set", "vocab_size=270")
    assert result.returncode == 1 and b"tokenizer.json: has 280 tokens, more than --set vocab_size=270; remove it" in result.stderr, result.stderr
    result = run_forked(*prepare, "--set", "vocab_size=290")
    assert result.returncode == 0 and b"fewer than --set vocab_size=290" in result.stdout, result.stderr


def test_sizes_of_the_training(monkeypatch, capsys):
    """Every --set counts, the last one for a name; what is no size, or no finite number above 0, is refused in the parser's words."""
    train = demo_module("train")

    def sizes(*words):
        monkeypatch.setattr(sys, "argv", ["train.py", "--device", "cpu", *words])
        return dict(train.arguments().set)
    assert sizes("--set", "hidden_size=32", "head_dim=16", "--set", "num_experts=4", "head_dim=8") == dict(hidden_size=32, head_dim=8, num_experts=4)
    assert sizes() == {} and sizes("--set", "rms_norm_eps=1e-5") == dict(rms_norm_eps=1e-5)
    for wrong, words in ("rotary_dim=16", "a size of Config"), ("__doc__=1", "a size of Config"), ("hidden_size", "a size of Config"), \
            ("partial_rotary_factor=inf", "finite"), ("rope_theta=nan", "finite"), ("hidden_size=0", "above 0"):
        with pytest.raises(SystemExit) as stop:
            sizes("--set", wrong)
        assert stop.value.code == 2 and words in capsys.readouterr().err, wrong


def test_scores_are_refused_where_they_would_be_none():
    """demo/evaluate.py: a conversation that fills the context, and a seed below 0."""
    evaluate = demo_module("evaluate")
    with evaluate.concurrent.futures.ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="1 answers to 2 messages; .* the context"):
        evaluate.chats(pool, DEMO, [(1, "", ["Tell me a story about a fox.", "What was the story about?"])], "-c", 100)
    result = run(sys.executable, ROOT / "demo" / "evaluate.py", "--seed", -5, "--only", "sums")
    assert result.returncode == 2 and b"--seed must be at least 0" in result.stderr, result.stderr


def test_verbs_and_tidying_of_the_corpus():
    corpus = demo_module("corpus")
    irregular = grammar().words["irregular verbs"]
    for phrase, forms in {"swim": "swims swam swimming", "ride a bike": "rides a bike|rode a bike|riding a bike", "carry": "carries carried carrying",
                          "hop": "hops hopped hopping", "have a picnic": "has a picnic|had a picnic|having a picnic", "bake": "bakes baked baking", "be brave": "is brave|was brave|being brave"}.items():
        assert list(corpus.conjugate(phrase, irregular)[1:]) == (forms.split("|") if "|" in forms else forms.split()), phrase
    for text, wanted in {'a owl and a unicorn. she saw a apple.': "An owl and a unicorn. She saw an apple.", '"why?" asked tom.': '"Why?" asked tom.',
                         'he said, "the fox is here."': 'He said, "The fox is here."', '"yes," he said, "and you?"': '"Yes," he said, "and you?"'}.items():
        assert corpus.tidy(text) == wanted
    for wrong in "(a|b", "a)", "a|b":
        with pytest.raises(ValueError):
            corpus.parse(wrong)


TINY_DEMO = dict(vocab_size=300, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16, linear_num_key_heads=2,
                 linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2,
                 moe_intermediate_size=8, shared_expert_intermediate_size=8)


def test_delta_rule_of_the_training():
    """A chunk at a time equals token by token: S <- exp(g) S; S <- S + k beta (v - S^T k)^T; o = S^T q / sqrt(dk)."""
    module, B, T, H, dk, dv = demo_module("model"), 2, 150, 6, 8, 16
    torch.manual_seed(0)
    heads = [torch.randn(B, T, H // 2, dk, dtype=torch.float64) for _ in range(2)]      # of keys: each serves two of values
    q, k = (module.l2norm(x).repeat_interleave(2, 2) for x in heads)
    v, g, beta = torch.randn(B, T, H, dv, dtype=torch.float64), -torch.rand(B, T, H, dtype=torch.float64), torch.rand(B, T, H, dtype=torch.float64)
    S, wanted = torch.zeros(B, H, dk, dv, dtype=torch.float64), []
    for t in range(T):
        S = S * g[:, t, :, None, None].exp()
        new = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t]))
        S = S + k[:, t, :, :, None] * new[:, :, None]
        wanted.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]) * dk ** -0.5)
    assert (module.delta_rule(*heads, v, g, beta) - torch.stack(wanted, 1)).abs().max() < 1e-9


def test_training_of_the_demo(tmp_path):
    """demo/train.py from documents to a folder that transformers and export.py read; a run that is stopped and goes on has the
    weights of one that was not; the engine reads the result and drafts with its MTP head."""
    train, work = demo_module("train"), tmp_path / "work"
    work.mkdir()
    words = "the a fox hat boat moon found lost said and so then went home again quietly umbrella seventeen don't \"well,\" Pip".split()
    told = lambda rng, n: " ".join(rng.choices(words, k=n)) + "."
    documents = []                                              # not the corpus's, so that the weights stay when that is changed
    for rng in map(random.Random, range(60)):
        chat = [text for _ in range(rng.randint(1, 3)) for text in
                (f"<|im_start|>user\n{told(rng, 6)}<|im_end|>\n<|im_start|>assistant\n", f"{told(rng, 60)}<|im_end|>")]
        documents.append(rng.choice([["", told(rng, rng.randint(5, 90))], [told(rng, 12), f"\n\n{told(rng, rng.randint(5, 90))}"], chat]))
    base = [sys.executable, ROOT / "demo" / "train.py", "--work", work, "--steps", 3, "--batch", 2, "--row", 128, "--device", "cpu",
            "--set", *(f"{name}={size}" for name, size in TINY_DEMO.items())]
    for wrong, words in ('"text"', b"wanted a list of strings"), ("[]", b"wanted a list of strings"), ('["", 1]', b"wanted a list of strings"), \
            ("{no", b"documents.jsonl: wanted JSON"), ('["\udcff"]', b"documents.jsonl: wanted JSON"):
        (work / "documents.jsonl").write_bytes(wrong.encode(errors="surrogateescape") + b"\n")
        result = run_forked(*base)
        assert result.returncode == 1 and words in result.stderr and b"Traceback" not in result.stderr, result.stderr
    (work / "documents.jsonl").write_text("".join(json.dumps(pieces) + "\n" for pieces in documents))
    result = run_forked(*base, "--seconds", 0)                 # stopped before the first step, with the state kept
    assert result.returncode == 0 and (work / "state.pt").exists(), result.stderr
    result = run_forked(*base)
    assert result.returncode == 0, result.stderr
    result = run_forked(*base, "--lr", 1e-4)
    assert result.returncode == 1 and b"another run" in result.stderr
    whole = (work / "rows.npy").read_bytes()
    (work / "rows.npy").write_bytes(whole[:-1])
    result = run_forked(*base)
    assert result.returncode == 1 and b"rows.npy: no rows, or not the whole" in result.stderr and result.stderr.count(b"\n") == 1, result.stderr
    (work / "rows.npy").write_bytes(whole)
    for wrong, words in ((["--set", "hidden_size=x"], b"hidden_size=x"), (["--set", "vocab_size=40000"], b"vocab_size"), (["--steps", 0], b"--steps"),
                         (["--set", "vocab_size=10"], b"vocab_size"), (["--lr", -1], b"--lr"), (["--seconds", "nan"], b"--seconds"),
                         (["--work", tmp_path / "none"], b"documents.jsonl")):
        result = run_forked(*base, *wrong)
        assert result.returncode and words in result.stderr and b"Traceback" not in result.stderr

    state = torch.load(work / "state.pt", weights_only=True)
    module = demo_module("model")
    model = module.Qwen3Next(module.Config(**state["config"]))
    model.load_state_dict(state["model"])
    rows = torch.from_numpy(np.load(work / "rows.npy"))
    tokens, _, targets, _ = train.parts_of(rows)
    assert tokens.min() >= 0 and targets.min() == -1 and {-1} < set(rows[rows < 0].tolist())
    tokenizer = train.Tokenizer.from_file(str(work / "tokenizer.json"))
    assert all(tokenizer.encode(mark + "Pip").tokens[-len(alone.tokens):] == alone.tokens for alone in [tokenizer.encode("Pip")] for mark in ' "')
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
    for pieces, encoded in zip(documents, train.encode(work / "documents.jsonl", tokenizer, 10 ** 6)):
        assert decode(np.where(encoded < 0, -2 - encoded, encoded).tolist()) == "".join(pieces) + "<|endoftext|>"
        assert decode(encoded[encoded >= 0].tolist()) == "".join(pieces[1::2]) + "<|endoftext|>"
    common = train.common_tokens(torch.tensor([[-1, -2 - 5] + [3] * 10000 + [8] * 2 + [17]], dtype=torch.int16), 20)
    assert common.nonzero().flatten().tolist() == [3]
    question = [-2 - 5, -2 - 6, -2 - 3]                         # of 5, 6 and 3; then 5 is asked for, until <|endoftext|>, 17
    early, asked, rest = train.EARLY_WEIGHT, train.ASKED_WEIGHT, 200 - train.EARLY
    weights = train.weights_of(torch.tensor([[*question, 5, *[3] * 199, 6, 17, -2 - 9, 5, -1]], dtype=torch.int16), common)[0].tolist()
    assert weights == [0, 0, asked, *[early] * (train.EARLY - 1), *[1] * rest, asked, 1, 0, early, 0]
    args = train.argparse.Namespace(steps=6, batch=2, lr=3e-3, seed=1, seconds=math.inf, device="cpu", compile=False)

    def weights(stops):
        """After 6 steps, stopped and read again behind each step of STOPS."""
        ours, kept = copy.deepcopy(model), {}
        optimizer, step = train.make_optimizer(ours), 0
        for stop in (*stops, 6):

            def keep(n):
                kept.update(model=copy.deepcopy(ours.state_dict()), optimizer=copy.deepcopy(optimizer.state_dict()))
                if n == stop < 6:
                    raise InterruptedError
            with contextlib.suppress(InterruptedError), pytest.MonkeyPatch.context() as patch, torch.enable_grad():
                patch.setattr(train, "SAVE_EVERY", -1)
                step = train.train(args, ours, optimizer, step, rows, keep)
            ours, step = module.Qwen3Next(model.c), stop
            ours.load_state_dict(kept["model"])
            optimizer = train.make_optimizer(ours)
            optimizer.load_state_dict(kept["optimizer"])
        return ours.state_dict()

    whole, stopped = weights(()), weights((2, 3))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole) and not torch.equal(whole["mtp.fc.weight"], model.mtp.fc.weight)

    hf = transformers.AutoModelForCausalLM.from_pretrained(work / "hf", dtype=torch.float32).eval()
    rounded = module.Qwen3Next(model.c)
    rounded.load_state_dict({name: tensor if name.endswith(("A_log", "dt_bias")) else tensor.bfloat16().float() for name, tensor in state["model"].items()})
    ids = rows[:1, :128].long().clamp(min=0)
    with torch.no_grad():
        assert (hf(ids).logits - rounded.logits(rounded(ids)[0])).abs().max() < 1e-4
    more = tmp_path / "more"                                    # the weights of before, gone on with on the same rows at hardly any rate
    shutil.copytree(work, more, ignore=shutil.ignore_patterns("state.pt", "hf"))
    going_on = [*base[:3], more, *base[4:], "--steps", 1, "--lr", 1e-12, "--start"]
    other = tmp_path / "other"
    shutil.copytree(work / "hf", other)
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text().replace('"special": true', '"special": false', 1))
    torn = tmp_path / "torn"
    shutil.copytree(work / "hf", torn)
    (torn / "tokenizer.json").write_text("{")
    for folder, words in (tmp_path / "nosuch", b"nosuch"), (more, b"model.safetensors"), (other, b"not the tokenizer of"), (torn, b"no tokenizer"):
        result = run_forked(*going_on, folder)
        assert result.returncode == 1 and words in result.stderr and b"Traceback" not in result.stderr, result.stderr
    for made in "tokenizer.json", "rows.npy", "held-out.npy":
        (more / made).unlink()                                  # the tokenizer is that of the weights, too
    result = run_forked(*going_on, work / "hf")
    assert result.returncode == 0, result.stderr
    assert (more / "tokenizer.json").read_bytes() == (work / "hf" / "tokenizer.json").read_bytes()
    before, after = (load_file(folder / "hf" / "model.safetensors") for folder in (work, more))
    assert before.keys() == after.keys() and all((before[name] - after[name]).abs().max() < 1e-6 for name in before)
    result = run_forked(*going_on[:-1])                         # from random weights it is another run
    assert result.returncode == 1 and b"another run" in result.stderr, result.stderr
    (more / "state.pt").unlink()
    for wrong, words in ({"model.norm.weight": torch.zeros(3)}, b"wanted [32], found [3]"), ({"model.norm.weight": None}, b"no tensor 'model.norm.weight'"):
        shutil.copytree(work / "hf", tmp_path / "wrong", dirs_exist_ok=True)
        save_file({name: tensor for name, tensor in {**before, **wrong}.items() if tensor is not None}, tmp_path / "wrong" / "model.safetensors")
        result = run_forked(*going_on, tmp_path / "wrong")
        assert result.returncode == 1 and words in result.stderr and result.stderr.count(b"Traceback") == 0, result.stderr
    path = tmp_path / "model.bin"
    assert run(*EXPORT, work / "hf", "-o", path, "--type", "f32").returncode == 0
    ours = engine_logits(path, ids[0].tolist())
    assert np.abs(ours - hf(ids).logits[0].detach().numpy()).max() < 1e-4
    answers = [run(ENGINE, path, "-m", "chat", "-i", "Hello!", "-n", 30, "-d", 1, "-s", seed) for seed in range(8)]     # any one may end at once
    assert not any(answer.returncode for answer in answers) and sum(drafts_right(answer.stderr)[1] for answer in answers) > 5


def test_what_the_demo_can_do(report):
    """As shipped, with its own sampling: small sums, stories that end by themselves and repeat no sentence, drafts."""
    corpus, rng = demo_module("corpus"), random.Random(1)
    assert DEMO.stat().st_size <= 45_183_104
    lines = []
    for _ in range(40):
        total = rng.randint(0, 20)
        part = rng.randint(0, total)
        lines += [f"What is {total - part} + {part}?", f"What is {total} - {part}?"]
    asked = "".join(f"{line}\n/clear\n" for line in lines).encode()
    answers = run(ENGINE, DEMO, "-m", "chat", "-q", "-s", 1, stdin=asked).stdout.decode()
    for line in lines:
        a, sign, b = re.findall(r"(\d+) ([+-]) (\d+)", line)[0]
        assert f"{a} {sign} {b} = {int(a) + int(b) if sign == '+' else int(a) - int(b)}." in answers, line
    right = made = 0
    for seed, request in enumerate(("Tell me a story about a fox named Pip who lost his drum.", "Write a story about a girl and a whale at the harbor.",
                                    "A story about a robot who is afraid of thunder.", "Tell me a story with the words king, spoon and river.")):
        result = run(ENGINE, DEMO, "-m", "chat", "-i", request, "-s", seed, "-d", 1, "-n", 1000)
        story = result.stdout.decode()
        assert len(story.split()) > 100 and corpus.repeats(story) is None and story.rstrip()[-1] in '.!?"', story
        pair = drafts_right(result.stderr)
        right, made = right + pair[0], made + pair[1]
    report(f"demo: {right} of {made} drafts right")
    assert right >= 0.85 * made


def test_the_number_that_an_answer_gives():
    for answer, wanted in {"7 + 5 = 12.": 12, "That is 20 - 20 = 0.": 0, "It is twelve.": 12, "5 - 2 = 3, so 3 are left.": 3, "Nine!": 9,
                           "I have 4 and 3, that makes 7": 7, "I do not know.": None}.items():
        assert demo_module("evaluate").number_in(answer) == wanted, answer


def test_scores_of_the_demo(tmp_path, report):
    """demo/evaluate.py prints a table of shares and writes the texts; the demo knows its small facts."""
    result = run(sys.executable, ROOT / "demo" / "evaluate.py", DEMO, "--only", "questions", "sums", "--samples", tmp_path / "samples", timeout=600)
    assert result.returncode == 0, result.stderr
    shares = {line[:38].strip(): float(line.split()[-2]) for line in result.stdout.decode().splitlines() if line.endswith("%")}
    table = {re.sub(r"\s+", " ", name): share for name, share in shares.items()}
    report(str(table))
    assert table["questions all"] > 75 and table["sums all"] > 99.5                # other kernels sum in another order
    assert "== question: " in (tmp_path / "samples").read_text()
    result = run(sys.executable, ROOT / "demo" / "evaluate.py", tmp_path / "none.bin", "--only", "sums")
    assert result.returncode and b"none.bin" in result.stderr and b"Traceback" not in result.stderr
