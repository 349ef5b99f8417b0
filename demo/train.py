#!/usr/bin/env python3
"""Train the demo checkpoint from scratch: corpus -> tokenizer -> rows of tokens -> weights -> a Hugging Face
directory.

    python demo/corpus.py
    python demo/train.py
    python export.py build/demo/hf -o build/demo/stories.bin --type q8

--start goes on from the weights of before, a folder like hf/, on other documents. README.md has the steps by which the shipped stories.bin was made.

What a step has made stays in the work folder, and another run goes on from there. Remove a file to make it anew; a
new tokenizer makes new rows, and rows older than the documents, or a state of other rows or options, are refused:

    documents.jsonl             a JSON list a line: a story, or a chat in ChatML, in pieces, every second one to be learned
    tokenizer.json              1  byte-level BPE like Qwen's, with a vocabulary of its own
    rows.npy, held-out.npy      2  int16 [rows, row + 1] tokens, whole documents, -1 where a row ends early,
                                   -2 - token for what is read but not learned: questions, beginnings
    state.pt                    3  weights, optimizer, step
    hf/                         4  config.json, model.safetensors, tokenizer.json and so on

A small model would spend two thirds of its weights on Qwen's 151,936 tokens, most of which it would never
see; with 4,096 it does not, and words that it never saw are spelled in pieces.
"""
import argparse
import bisect
import collections
import dataclasses
import itertools
import json
import math
import os
import pickle
import re
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers,
                        processors, trainers)

from model import Config, DecoderLayer, Qwen3Next

START = time.monotonic()
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]      # the last ids of the vocabulary, in this order
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
         r"\s+(?!\S)|\s+")                                       # Qwen2's
BEFORE_CAPITAL = r"[^\p{L}](?=\p{Lu})"                           # in train_tokenizer alone
HELD_OUT = 0.005                                                 # share of documents kept for validation
MTP_WEIGHT, BALANCE_WEIGHT = 0.25, 0.01                          # of the two other losses
EARLY, EARLY_WEIGHT = 100, 5                                     # so many first tokens of an answer count so much:
                                                                 # they settle what the story is about
ASKED_WEIGHT, COMMON = 5, 1e-3                                   # so much counts a token that was read before in the
                                                                 # document, unless it is this share of all learned
WARM_UP, LAST_LR = 200, 0.02                                     # steps; share of --lr at the end
SAVE_EVERY, SAY_EVERY = 300, 100                                 # seconds, steps
CONTEXT = 4096                                                   # tokens that the exported config allows, or --row if more
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def say(text):
    print(f"{time.monotonic() - START:7.1f} s  {text}", flush=True)


def replace(path, write):
    """Has write(temporary path) make a file, which then takes the place of `path`: no half file is ever found
    there."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


def older(path, source):
    """Whether both files are there and `path` was written before `source`."""
    return path.exists() and source.exists() and path.stat().st_mtime < source.stat().st_mtime


def documents(path, every=1):
    """The documents in documents.jsonl, [str] each, or every n-th of them. Raises ValueError for another line, or one that is no UTF-8."""
    with open(path, "rb") as lines:
        for line in itertools.islice(lines, 0, None, every):
            try:
                document = json.loads(line.decode())
            except ValueError as error:
                raise ValueError(f"{path}: wanted JSON in each line, found {line[:60]!r}: {error}") from None
            if not (isinstance(document, list) and document and all(isinstance(piece, str) for piece in document)):
                raise ValueError(f"{path}: wanted a list of strings in each line, found {line[:60]!r}")
            yield document


# ---- 1. Tokenizer ------------------------------------------------------------------------------------------

def train_tokenizer(path, vocab_size, sample):
    """documents.jsonl -> a Tokenizer of at most vocab_size ids: 256 bytes, merges learnt on about `sample`
    documents, SPECIAL. The texts between special tokens are what it learns from, as those are never part of a
    word.

    No merge joins a capital to what stands before it, so that a name has the same tokens everywhere: "Omar" as a
    text's first word and " Omar" in its middle would else be "O|mar" and " Om|ar", and the one could not be copied
    from the other without knowing how both are spelled. It costs 6 % more tokens."""
    with open(path, "rb") as lines:
        every = max(1, sum(1 for _ in lines) // sample)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    plain = dict(add_prefix_space=False, trim_offsets=False, use_regex=False)
    split, as_bytes = lambda pattern: pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(**plain)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split(SPLIT), split(BEFORE_CAPITAL), as_bytes])
    tokenizer.post_processor = processors.ByteLevel(**plain)
    tokenizer.decoder = decoders.ByteLevel(**plain)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(SPECIAL), show_progress=False,
                                  special_tokens=[], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    mark = re.compile("|".join(map(re.escape, SPECIAL)))
    parts = (part for document in documents(path, every) for part in mark.split("".join(document)))
    tokenizer.train_from_iterator(parts, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split(SPLIT), as_bytes])     # Qwen's: the merges are enough
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL])
    return tokenizer


# ---- 2. Rows -----------------------------------------------------------------------------------------------

def encode(path, tokenizer, longest):
    """documents.jsonl -> [int16 [n]], each document with its end, cut after `longest` tokens; -2 - token where it
    is only read. Pieces are encoded one by one: as a prompt is when the model is used."""
    encode_batch = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)
    found, encoded = documents(path), []
    while batch := list(itertools.islice(found, 8192)):
        for document in batch:
            document[-1] += SPECIAL[0]
        tokens = iter(encode_batch([piece for document in batch for piece in document], add_special_tokens=False))
        for document in batch:
            pieces = [np.array(next(tokens).ids, np.int16) for _ in document]
            pieces[::2] = [-2 - piece for piece in pieces[::2]]
            encoded.append(np.concatenate(pieces)[:longest])
    return encoded


def pack(encoded, longest, rng):
    """[int16 [n]], n <= longest -> int16 [rows, longest]: the longest documents first, each into the row that it fills best, or a new one where
    none has room for it. In a row they follow each other in an order drawn by RNG (NumPy's), lest short ones always come late."""
    rows, with_room, rooms = [], collections.defaultdict(list), []         # with_room {room: [row]}; rooms: its keys with rows, sorted
    for i in sorted(range(len(encoded)), key=lambda i: -len(encoded[i])):
        best = bisect.bisect_left(rooms, len(encoded[i]))
        if best == len(rooms):
            room, row = longest, len(rows)
            rows.append([])
        else:
            room = rooms[best]
            row = with_room[room].pop()
            if not with_room[room]:
                del rooms[best]
        rows[row].append(i)
        room -= len(encoded[i])
        if not with_room[room]:
            bisect.insort(rooms, room)
        with_room[room].append(row)
    packed = np.full((len(rows), longest), -1, np.int16)
    for row, members in zip(packed, rows):
        text = np.concatenate([encoded[i] for i in rng.permutation(members)])
        row[:len(text)] = text
    return packed


def save_rows(path, rows):
    """np.save under just this name: it would put .npy behind one that does not end so."""
    with open(path, "wb") as file:
        np.save(file, rows)


def read_rows(path):
    """The int16 rows of rows.npy or held-out.npy at PATH. Raises ValueError for other files, and for what is cut off."""
    try:
        return np.load(path)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: no rows, or not the whole of them (remove rows.npy to make both files anew): {error}") from None


def make_rows(work, tokenizer, longest, seed):
    """Writes held-out.npy and rows.npy. Old rows are removed first: the two files are always of the same cut."""
    encoded = encode(work / "documents.jsonl", tokenizer, longest)
    if len(encoded) < 2:
        sys.exit(f"train.py: {work / 'documents.jsonl'}: wanted two documents or more, found {len(encoded)}")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(encoded))
    held_out = max(1, round(HELD_OUT * len(order)))
    (work / "rows.npy").unlink(missing_ok=True)
    for name, part in (("held-out.npy", order[:held_out]), ("rows.npy", order[held_out:])):
        rows = pack([encoded[i] for i in part], longest, rng)
        say(f"{name}: {len(part)} documents, {np.count_nonzero(rows != -1)} tokens, {np.count_nonzero(rows >= 0)} of "
            f"them to be learned, in {len(rows)} rows, {np.mean(rows == -1):.1%} padding")
        replace(work / name, lambda path: save_rows(path, rows))


# ---- 3. Training -------------------------------------------------------------------------------------------

class Order:
    """Which rows a step takes: epoch after epoch, each in an order of its own that follows from seed and
    epoch alone."""

    def __init__(self, rows, batch, seed):
        self.rows, self.batch, self.seed, self.epoch = rows, batch, seed, None

    def permutation(self, epoch):
        if epoch != self.epoch:
            self.epoch, self.kept = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        return self.kept

    def __call__(self, step):
        """int64 [batch] indices of rows."""
        places = range(step * self.batch, (step + 1) * self.batch)
        return np.array([self.permutation(place // self.rows)[place % self.rows] for place in places])


def learning_rate(step, steps, highest):
    """The rate of `step`, counted from 0: up in WARM_UP steps, along a cosine down to LAST_LR of the highest."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return highest * min(1, (step + 1) / WARM_UP) * (LAST_LR + (1 - LAST_LR) * cosine)


def ids_of(rows):
    """Rows as in rows.npy -> int64 ids, whether they are learned or only read; 0 where there is none."""
    rows = rows.long()
    return torch.where(rows < -1, -2 - rows, rows).clamp(min=0)


def parts_of(rows):
    """Rows as in rows.npy, [B, T + 1] -> int64 [B, T] each: the tokens, those one later as input, those one and
    two later as targets, in which -1 has no loss."""
    ids, learned = ids_of(rows), rows[:, 1:].long().clamp(min=-1)
    return ids[:, :-1], ids[:, 1:], learned, F.pad(learned[:, 1:], (0, 1), value=-1)


def common_tokens(rows, vocab_size):
    """bool [vocab_size]: which ones are COMMON among those that are learned in rows, int16 as in rows.npy."""
    counts = torch.bincount(rows[rows >= 0].long(), minlength=vocab_size)
    return counts > COMMON * counts.sum()


def weights_of(rows, common):
    """Rows as in rows.npy, [B, T + 1] -> float32 [B, T], how much each token from the second on counts: 0 where it is not
    learned, ASKED_WEIGHT where it was read before in its document and is not of `common`, bool [vocab_size], EARLY_WEIGHT for
    the EARLY tokens behind the last one read in the row, else 1. That last one is of a document before, if there is any, for
    a story without a beginning."""
    ids = ids_of(rows)
    document = (ids == len(common) - len(SPECIAL)).cumsum(1)     # SPECIAL[0] ends a document
    key = document * len(common) + ids
    place = torch.arange(rows.shape[1], device=rows.device)
    read = key[:, 1:, None] == torch.where(rows < -1, key, -1)[:, None]                      # [B, T, T + 1]
    asked = (read & (place < place[1:, None])).any(-1) & ~common[ids[:, 1:]]
    last = torch.where(rows < 0, place, -EARLY - 1).cummax(1).values
    weights = torch.where((place - last)[:, 1:] <= EARLY, EARLY_WEIGHT, 1.0)
    return torch.where(asked, ASKED_WEIGHT, weights) * (rows[:, 1:] >= 0)


def head_loss(h, embedding, targets, weights):
    """Weighted mean of the cross-entropy of softmax(h embedding^T), [], in nats. h [B, T, D], embedding [V, D], targets
    int64 [B, T], -1 where there is none, weights float32 [B, T]."""
    logits = F.linear(h, embedding).float()
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    return (each * weights.flatten()).sum() / weights.sum().clamp(min=1)      # a batch may hold nothing to be learned


def losses(model, rows, head_loss, common):
    """rows as in rows.npy, [B, T + 1], common: bool [vocab_size] -> (cross-entropy of the next token, that of the MTP
    head, both in nats, balance of the experts), each []."""
    tokens, following, targets, further = parts_of(rows)
    embedding = model.model.embed_tokens.weight
    h, balance = model(tokens)
    h_mtp, balance_mtp = model.predict_further(h, following)
    n = model.c.num_hidden_layers
    return (head_loss(h, embedding, targets, weights_of(rows, common)),
            head_loss(h_mtp, embedding, further, (further >= 0).float()), (n * balance + balance_mtp) / (n + 1))


def make_optimizer(model):
    """AdamW; only matrices decay, but neither the embedding, whose rare rows would fade, nor the taps of
    convolutions. `train` sets the learning rate, step by step."""
    decay, keep = [], []
    for name, p in model.named_parameters():
        matrix = p.ndim > 1 and not name.endswith(("embed_tokens.weight", "conv1d.weight"))
        (decay if matrix else keep).append(p)
    groups = [dict(params=decay, weight_decay=0.1), dict(params=keep, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def train(args, model, optimizer, step, data, save):
    """Trains from `step` to args.steps or until args.seconds are over, and returns the step reached. data:
    the rows, int16 [rows, T + 1], on the device. save(step) is called now and then, and at the end. Ends the program
    when the loss that it prints is no number, and save_state does when a weight is."""
    order, parameters = Order(len(data), args.batch, args.seed), list(model.parameters())
    loss_of_head = torch.compile(head_loss) if args.compile else head_loss
    common = common_tokens(data, model.c.vocab_size)
    saved, said, said_step = time.monotonic(), time.monotonic(), step
    while step < args.steps and time.monotonic() - START < args.seconds:
        rows = data[torch.from_numpy(order(step)).to(data.device)]
        with autocast(args):
            main, mtp, balance = losses(model, rows, loss_of_head, common)
            loss = main + MTP_WEIGHT * mtp + BALANCE_WEIGHT * balance
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        # The fused optimizer skips a step for which this is 1 (it is made for GradScaler): no NaN reaches the
        # weights, and the host need not wait to learn of it.
        optimizer.found_inf = (~torch.isfinite(norm)).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % SAY_EVERY == 0 or step in (1, 10):
            values = [x.item() for x in (main.detach(), mtp.detach(), balance.detach(), norm)]
            tokens = (step - said_step) * args.batch * (data.shape[1] - 1)
            line = "step {}  loss {:.4f}  mtp {:.4f}  balance {:.3f}  norm {:.2f}  lr {:.2e}  {:.0f} tokens/s"
            lr, now = optimizer.param_groups[0]["lr"], time.monotonic()
            say(line.format(step, *values, lr, tokens / (now - said)))
            said, said_step = now, step
            if not all(map(math.isfinite, values[:2])):
                sys.exit(f"train.py: no number as loss at step {step}; the saved state is of before")
        if time.monotonic() - saved > SAVE_EVERY:
            save(step)
            saved = time.monotonic()
    save(step)
    return step


def autocast(args):
    return torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda")


def save_state(path, args, model, optimizer, step):
    """Writes state.pt at `path`. Ends the program, with the old one kept, if a weight is no number."""
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        sys.exit(f"train.py: a weight is no number at step {step}, not saved")
    state = dict(config=dataclasses.asdict(model.c), run=run_of(args), step=step, model=model.state_dict(),
                 optimizer=optimizer.state_dict())
    replace(path, lambda temporary: torch.save(state, temporary))
    say(f"saved step {step}")


def run_of(args):
    """What makes one run of training differ from another; args.rows is the checksum of rows.npy."""
    return {name: getattr(args, name) for name in ("steps", "batch", "lr", "seed", "rows")} | {"start": args.start and str(args.start)}


# ---- 4. Validation and export ------------------------------------------------------------------------------

@torch.no_grad()
def validate(args, model, rows):
    """int16 [rows, T + 1], on the device -> {name: float}, over the held-out tokens that are learned: the loss in nats a
    token, without weights, the rest shares of 1."""
    total = torch.zeros(6, device=rows.device, dtype=torch.float64)
    rows = F.pad(rows, (0, 0, 0, -len(rows) % args.batch), value=-1)
    for batch in rows.split(args.batch):
        tokens, following, targets, further = parts_of(batch)
        with autocast(args):
            h, _ = model(tokens)
            h_mtp, _ = model.predict_further(h, following)
            logits, guess = model.logits(h).float(), model.logits(h_mtp).argmax(-1)
        choice, real, real_further = logits.argmax(-1), targets >= 0, further >= 0
        total += torch.stack([
            F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum"),
            ((choice == targets) & real).sum(), real.sum(),
            ((guess == further) & real_further).sum(),
            ((guess[:, :-1] == choice[:, 1:]) & real_further[:, :-1]).sum(), real_further.sum()]).double()
    loss, right, n, mtp_right, agree, n_further = total.tolist()
    return {"loss": loss / n, "top-1 accuracy": right / n, "MTP accuracy": mtp_right / n_further,
            "MTP guess is the model's choice": agree / n_further}


def released_names(model):
    """{name: tensor} as in the released checkpoints: an expert's matrices one by one, in bfloat16, A_log and
    dt_bias in float32."""
    tensors = {}
    for name, p in model.state_dict().items():
        p = p.cpu()
        if name.endswith("experts.gate_up_proj"):
            for e, (gate, up) in enumerate(p.unflatten(1, (2, -1)).unbind(0)):
                tensors[name.replace("gate_up_proj", f"{e}.gate_proj.weight")] = gate
                tensors[name.replace("gate_up_proj", f"{e}.up_proj.weight")] = up
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(p):
                tensors[name.replace("down_proj", f"{e}.down_proj.weight")] = down
        else:
            tensors[name] = p
    kept = "A_log", "dt_bias"
    return {name: (p.float() if name.endswith(kept) else p.bfloat16()).clone() for name, p in tensors.items()}


def start_from(folder, model):
    """Loads MODEL's weights from model.safetensors in FOLDER, as export wrote it; what released_names does, backward. MODEL's sizes
    are its own, not those of config.json there; tensors that it has no use for, of further layers, are left. Raises ValueError
    when one is missing or of another shape."""
    path, state = folder / "model.safetensors", {}
    tensors = load_file(path)
    one = lambda name: tensors[name].float()
    for name, p in model.state_dict().items():
        matrix = lambda e, kind: one(re.sub(r"(gate_up|down)_proj$", f"{e}.{kind}_proj.weight", name))
        try:
            if name.endswith("experts.gate_up_proj"):
                state[name] = torch.stack([torch.cat([matrix(e, "gate"), matrix(e, "up")]) for e in range(len(p))])
            elif name.endswith("experts.down_proj"):
                state[name] = torch.stack([matrix(e, "down") for e in range(len(p))])
            else:
                state[name] = one(name)
        except KeyError as error:
            raise ValueError(f"{path}: there is no tensor {error}") from None
        if state[name].shape != p.shape:
            raise ValueError(f"{path}: {name}: wanted {list(p.shape)}, found {list(state[name].shape)}")
    model.load_state_dict(state)


def export(folder, model, tokenizer, context):
    """Writes the Hugging Face directory: config.json, generation_config.json, tokenizer_config.json, tokenizer.json and
    model.safetensors, whose tensors are as released_names gives them. context: most positions, in tokens."""
    end, _, im_end = map(tokenizer.token_to_id, SPECIAL)
    config = dict(
        architectures=["Qwen3NextForCausalLM"], model_type="qwen3_next", **dataclasses.asdict(model.c),
        intermediate_size=2 * model.c.hidden_size, hidden_act="silu", max_position_embeddings=context,
        initializer_range=0.02, tie_word_embeddings=True, use_cache=True, attention_bias=False,
        attention_dropout=0.0, rope_scaling=None, decoder_sparse_step=1, mlp_only_layers=[],
        norm_topk_prob=True, output_router_logits=False, router_aux_loss_coef=0.001, bos_token_id=end,
        eos_token_id=im_end, torch_dtype="bfloat16")
    generation = dict(bos_token_id=end, pad_token_id=end, eos_token_id=[im_end, end], do_sample=True,
                      temperature=0.5, top_k=20, top_p=0.8)
    added = {tokenizer.token_to_id(text): dict(content=text, lstrip=False, normalized=False, rstrip=False,
                                               single_word=False, special=True) for text in SPECIAL}
    tokenizer_config = dict(
        tokenizer_class="Qwen2Tokenizer", added_tokens_decoder=added, additional_special_tokens=SPECIAL[1:],
        chat_template=CHAT_TEMPLATE, eos_token=SPECIAL[2], pad_token=SPECIAL[0], bos_token=None,
        unk_token=None, add_bos_token=False, add_prefix_space=False, clean_up_tokenization_spaces=False,
        errors="replace", split_special_tokens=False, model_max_length=context)
    folder.mkdir(exist_ok=True)
    for name, content in (("config.json", config), ("generation_config.json", generation),
                          ("tokenizer_config.json", tokenizer_config)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file(released_names(model), str(folder / "model.safetensors"), metadata={"format": "pt"})


# ---- Command line ------------------------------------------------------------------------------------------

def size(text):
    """NAME=N of --set -> (name, number), for the sizes of Config. Raises ArgumentTypeError for others."""
    name, _, value = text.partition("=")
    kinds = {field.name: field.type for field in dataclasses.fields(Config)}
    try:
        return name, kinds[name](value)
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text}: wanted a size of Config and a number") from None


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--work", type=Path, default=Path(__file__).resolve().parent.parent / "build" / "demo",
                        help="folder for all files (build/demo)")
    parser.add_argument("--steps", type=int, default=9500, help="steps of the whole training (9500)")
    parser.add_argument("--start", type=Path, help="begin with the weights of this folder (an hf/ of before), not with random ones")
    parser.add_argument("--batch", type=int, default=42, help="rows a step (42)")
    parser.add_argument("--row", type=int, default=2304, help="tokens a row (2304)")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate (3e-3)")
    parser.add_argument("--seed", type=int, default=1, help="of weights, rows and their order (1)")
    parser.add_argument("--seconds", type=float, default=math.inf,
                        help="stop this long after the start; run again to go on")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--no-compile", dest="compile", action="store_false",
                        help="run PyTorch's operations one by one")
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="NAME=N", type=size,
                        help="sizes other than Config's: hidden_size=128")
    parser.add_argument("--prepare-only", action="store_true",
                        help="stop after steps 1 and 2, which need no GPU")
    parser.add_argument("--export-only", action="store_true",
                        help="validate and export the state as it is")
    args = parser.parse_args()
    if not all(0 < value < math.inf for _, value in args.set):
        parser.error("--set: sizes must be above 0, and finite")
    if not 256 + len(SPECIAL) < dict(args.set).get("vocab_size", 4096) <= 32767:
        parser.error(f"--set: vocab_size: wanted more than the {256 + len(SPECIAL)} of bytes and special tokens, and at most "
                     "32767, as rows hold int16")
    if not (0 < args.lr < math.inf and args.seconds >= 0 and args.seed >= 0):
        parser.error("--lr must be above 0, --seconds and --seed at least 0")
    if min(args.steps, args.batch, args.row) < 1:
        parser.error("--steps, --batch and --row must be at least 1")
    if args.device == "cuda" and not args.prepare_only and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU (cpu is for tiny sizes)")
    args.compile &= args.device == "cuda"
    return args


def read_tokenizer(path):
    """The Tokenizer at PATH; ends the program when it is none."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:                                    # the library raises nothing narrower
        sys.exit(f"train.py: {path}: no tokenizer: {error}")


def wanting(work):
    """Why rows are to be made in the folder WORK, in words; None if it has all and they are no older than the tokenizer."""
    for name in ("tokenizer.json", "held-out.npy", "rows.npy"):
        if not (work / name).exists():
            return f"no {name} yet"
    return "rows.npy is older than tokenizer.json" if older(work / "rows.npy", work / "tokenizer.json") else None


def check_vocabulary(tokenizer, args, path):
    """Ends the program when the Tokenizer of PATH has more tokens than --set vocab_size, and says so when it has fewer."""
    found = tokenizer.get_vocab_size()
    wanted = dict(args.set).get("vocab_size", found)
    if found > wanted:
        sys.exit(f"train.py: {path}: has {found} tokens, more than --set vocab_size={wanted}" + ("" if args.start else "; remove it to make it anew"))
    if found < wanted:
        say(f"{path.name}: has {found} tokens, fewer than --set vocab_size={wanted}")


def prepare(args):
    """Steps 1 and 2, where their files are wanting -> the Tokenizer. Ends the program where files do not fit together."""
    work, path, source = args.work, args.work / "tokenizer.json", args.work / "documents.jsonl"
    if not source.exists() and (reason := wanting(work)):
        sys.exit(f"train.py: {source}: not there; corpus.py writes it ({reason})")
    if args.start:
        (args.start / "model.safetensors").open("rb").close()    # before the work; and the library's error would not name it
    fresh = not path.exists()
    if fresh and args.start:
        replace(path, lambda temporary: temporary.write_bytes((args.start / "tokenizer.json").read_bytes()))
    elif fresh:
        tokenizer = train_tokenizer(source, dict(args.set).get("vocab_size", Config.vocab_size), sample=50000)
        replace(path, lambda temporary: tokenizer.save(str(temporary)))
        say(f"tokenizer.json: {tokenizer.get_vocab_size()} tokens")
    tokenizer = read_tokenizer(path)
    if args.start and read_tokenizer(args.start / "tokenizer.json").to_str() != tokenizer.to_str():
        sys.exit(f"train.py: {args.start / 'tokenizer.json'}: not the tokenizer of {work}; weights know their tokens by number")
    check_vocabulary(tokenizer, args, path)
    if not fresh and older(work / "rows.npy", source):
        sys.exit(f"train.py: {work / 'rows.npy'}: older than documents.jsonl; remove it and tokenizer.json to make them anew")
    if fresh or wanting(work):
        make_rows(work, tokenizer, args.row + 1, args.seed)
    return tokenizer


def main():
    args = arguments()
    sizes = dict(args.set)
    work, path = args.work, args.work / "state.pt"
    tokenizer = prepare(args)
    if args.prepare_only:
        return

    rows, held_out = (read_rows(work / name) for name in ("rows.npy", "held-out.npy"))
    args.rows = zlib.crc32(rows)
    torch.manual_seed(args.seed)
    try:
        state = torch.load(path, map_location=args.device, weights_only=True) if path.exists() else None
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        sys.exit(f"train.py: {path}: no state, or not the whole of one: {str(error).splitlines()[0]}")
    if state and not args.export_only and state["run"] != run_of(args):
        sys.exit(f"train.py: {path} is of another run: wanted {run_of(args)}, found {state['run']}")
    if args.export_only and not state:
        sys.exit(f"train.py: {path}: there is no state to export")
    sizes["vocab_size"] = tokenizer.get_vocab_size()
    for name, wanted in sizes.items():
        if state and state["config"][name] != wanted:
            sys.exit(f"train.py: {path}: {name}: wanted {wanted}, found {state['config'][name]}")
    config = Config(**(state["config"] if state else sizes))
    model = Qwen3Next(config).to(args.device)
    optimizer, step = make_optimizer(model), 0
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    elif args.start:
        start_from(args.start, model)
    say(f"{sum(p.numel() for p in model.parameters())} weights, step {step} of {args.steps}")
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")               # TF32 for what autocast leaves in float32
    if args.compile:                                   # one graph for each kind of layer, used by all of them
        DecoderLayer.forward = torch.compile(DecoderLayer.forward, dynamic=False)

    on_device = lambda some: torch.from_numpy(some).to(args.device)
    if held_out.shape[1] != args.row + 1:
        sys.exit(f"train.py: {work / 'rows.npy'}: rows are not of --row {args.row} tokens")
    if not args.export_only:
        save = lambda step: save_state(path, args, model, optimizer, step)
        step = train(args, model, optimizer, step, on_device(rows), save)
    if step >= args.steps or args.export_only:
        values = validate(args, model, on_device(held_out))
        say("held out: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
        export(work / "hf", model, tokenizer, max(CONTEXT, args.row))
        say(f"wrote {work / 'hf'}")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"train.py: {error.filename or 'standard output'}: {error.strerror}")
    except torch.OutOfMemoryError:
        sys.exit("train.py: the GPU has no room for --batch rows of --row tokens; take fewer")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted")
    except (ValueError, SafetensorError) as error:               # documents or rows that are none, sizes that do not fit
        sys.exit(f"train.py: {error}")
