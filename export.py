#!/usr/bin/env python3
"""Checkpoint of Qwen3-Next (Hugging Face, GGUF) -> the flat one that qwen3next.c maps; tokenizer.json -> tokenizer.bin.

    python export.py SOURCE -o model.bin [--type f32|bf16|q8|q4] [--mtp FILE_OR_DIR] [--check]
    python export.py --tokenizer tokenizer.json -o tokenizer.bin
    python export.py --random config.json --seed N -o model.bin --type q4

The work streams: a plan says, tensor by tensor, which rows of which source tensors make it up; rows are read,
converted and written a chunk at a time, so that memory does not grow with the model. Contents:

    1  errors and small things      5  metadata                8  tokenizer.bin
    2  the source of tensors        6  the file                9  chat pieces
   2a  GGUF as a source             7  --random, --check      10  command line
    3  config
    4  plan, and stored types

Names in shapes: D hidden, V vocabulary, H/G attention heads/kv heads, hd head_dim, nk/nv key/value heads of a linear
layer, dk/dv their sizes, Kd = nk*dk, Vd = nv*dv, E experts, I intermediate size, R rows, C columns of a matrix.
"""
import argparse
import contextlib
import ctypes
import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import stat
import statistics
import struct
import subprocess
import sys
import unicodedata
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import numpy as np
from tqdm import tqdm

# ---- 1. Errors and small things ----------------------------------------------------------------------------------


class ExportError(Exception):
    """What the user is told, on one line, before exit status 1."""


def fail(where, what, wanted=None, found=None):
    """Raise the error `WHERE: WHAT, wanted X, found Y`."""
    tail = "" if wanted is None else f", wanted {wanted}"
    raise ExportError(f"{where}: {what}{tail}" + ("" if found is None else f", found {found}"))


def one_line(text, most=1000):
    """text as one line of about `most` characters that do nothing to a terminal: a file may hold any name or value."""
    if len(text) > most:
        text = f"{text[:most * 3 // 4]} ... {text[-most // 4:]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def say(text):
    """Progress, warnings and results for people go to standard error."""
    tqdm.write(one_line(f"export.py: {text}"), file=sys.stderr)


KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "an integer",
         float: "a number"}


def checked(where, what, value, kind, low=None, high=None):
    """A value out of JSON that has to be of a kind of KINDS, a number from low to high. An integer is a number, true is
    none; NaN is in no range. Anything else is an error."""
    right = type(value) is kind or (kind is float and type(value) is int)
    if not right or (low is not None and not low <= value <= high):
        limits = "" if low is None else f" from {low} to {high}"
        fail(where, what, KINDS[kind] + limits, one_line(repr(value), 200))
    return value


def checked_integers(where, what, value, low=0, high=(1 << 63) - 1):
    """A list of integers out of JSON, each from low to high."""
    return [checked(where, what, x, int, low, high) for x in checked(where, what, value, list)]


def fnv1a(data, h=0xCBF29CE484222325):
    """64-bit FNV-1a of bytes, going on from h."""
    for byte in data:
        h = ((h ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return h


def signed64(u):
    """The int64 with the bits of the unsigned u."""
    return u - (1 << 64) if u >> 63 else u


def align(n, a):
    """n rounded up to a multiple of a."""
    return -(-n // a) * a


def keep_freed_memory():
    """Have the C library keep what arrays give back. By default glibc returns it to the system, from which the next
    array gets it anew, page by page and zeroed: half the time of the simpler conversions, more with many threads."""
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3             # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return                                              # not glibc: slower, no more
    mallopt(M_MMAP_THRESHOLD, 1 << 25)                      # 32 MB, the most that glibc takes
    mallopt(M_TRIM_THRESHOLD, 1 << 30)


MAX_WEIGHT = np.float32(2**126)                             # a quarter of float32's range: no rounding leads out of it


def from_bf16(bits):
    """uint16 bit patterns -> float32, exact."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def to_bf16(x):
    """Finite float32 -> bf16 bit patterns (uint16), to nearest, ties to even."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + (0x7FFF + ((u >> 16) & 1))) >> 16).astype(np.uint16)


def to_bf16_up(x):
    """Non-negative float32 -> bf16 bit patterns, never smaller than x."""
    return ((np.ascontiguousarray(x, np.float32).view(np.uint32) + 0xFFFF) >> 16).astype(np.uint16)


MAX_JSON = 100_000_000                                      # bytes, as the safetensors library has it for headers


def open_file(path):
    """A regular file, open for reading, unbuffered. A pipe would be waited for, a device has no end: both are errors."""
    at_once = getattr(os, "O_NONBLOCK", 0)                  # opening a pipe waits, too
    try:
        f = open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | at_once))
    except OSError as e:
        fail(path, f"cannot be read: {e.strerror}")
    if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):
        fail(path, "cannot be read", "a regular file", "a device or pipe")
    return f


def read_file(path):
    """The bytes of a small file."""
    with open_file(path) as f:
        size = os.fstat(f.fileno()).st_size
        if size > MAX_JSON:
            fail(path, "size", f"at most {MAX_JSON} bytes", size)
        try:
            return f.read()
        except OSError as e:
            fail(path, f"cannot be read: {e.strerror}")


def parse_json(where, raw):
    """The JSON object that UTF-8 bytes spell; errors begin with `where`. A key that stands twice is one: programs would
    differ in which of the two they take."""
    def unique(pairs):
        value = dict(pairs)
        if len(value) < len(pairs):
            keys = sorted(key for key, _ in pairs)
            fail(where, f"key {next(a for a, b in zip(keys, keys[1:]) if a == b)} stands twice")
        return value

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except ValueError as e:
        fail(where, f"is not JSON: {e}")
    except RecursionError:
        fail(where, "is nested too deeply")
    return checked(where, "top level", value, dict)


def read_json(path):
    """The JSON object in a file; anything else is an error that names the file."""
    return parse_json(path, read_file(path))


def inside(folder, name, said_by=None):
    """The path of a checkpoint's file, None where there is none. A checkpoint is one folder: a name or link that leads
    out of it is an error of `said_by`, for a stranger's checkpoint must not have us read other files. But a snapshot in
    the hub's cache is made of links to the blobs beside it."""
    path = folder / name
    if not os.path.lexists(path):
        return None
    try:
        home, real = folder.resolve(), path.resolve(strict=True)
    except (OSError, RuntimeError) as e:                    # RuntimeError: a circle of links, up to Python 3.12
        fail(path, f"cannot be read: {getattr(e, 'strerror', None) or e}")
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if home not in real.parents and real.parent != blobs:
        fail(said_by or folder, f"{name} leads out of the folder", "a file in it", real)
    return path


@contextlib.contextmanager
def written(path):
    """A binary file under a temporary name beside `path`, renamed to it at the end; on any failure it is removed."""
    path = Path(path)
    if os.path.exists(path) and not path.is_file():
        fail(path, "the output", "a regular file or a new name", "a directory, device or pipe")
    rights = path.stat().st_mode & 0o777 if path.exists() else 0o666
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:                                                    # x: a new file, not what a link leads to
        with open(temporary, "x+b", opener=lambda name, flags: os.open(name, flags, rights)) as f:
            yield f
        os.replace(temporary, path)
    except OSError as e:
        fail(path, f"cannot be written: {e.strerror}")
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


# ---- 2. The source of tensors ------------------------------------------------------------------------------------
# A source has names(), shape(name), where(name) for messages, check_type(name), which fails unless the tensor can be
# read, and rows(name, first, count) -> float32 [count, C], the tensor seen as a matrix of its last axis; names
# and values are those of Hugging Face's checkpoints.

Entry = namedtuple("Entry", "file dtype shape offset end")   # offset, end in bytes from the start of the file


def memory_bytes():
    """The machine's memory; infinite where that cannot be learnt."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return math.inf


class Files:
    """Tensors in files: self.entries {name: Entry}. Reads with pread: no mapping, so resident memory stays small. Files
    larger than half the machine's memory leave the page cache once read, and do not push all else out of it."""

    DTYPES = {"BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8")}

    def __init__(self, paths):
        self.entries, self.files = {}, {path: open_file(path) for path in paths}
        self.cached, self.most_cached = 0, memory_bytes() / 4
        self.drop = hasattr(os, "posix_fadvise") and sum(map(os.path.getsize, self.files)) > 2 * self.most_cached

    def _add(self, path, entries):
        """Takes in the tensors of one file."""
        for name, entry in entries.items():
            if self.entries.setdefault(name, entry) is not entry:
                fail(path, f"{name} is in another file as well", "one tensor of a name", self.entries[name].file)

    def _read(self, path, what, count, offset):
        """count bytes of a file."""
        try:
            raw = os.pread(self.files[path].fileno(), count, offset)
        except OSError as e:
            fail(path, f"{what}: cannot be read: {e.strerror}")
        return raw if len(raw) == count else fail(path, f"{what}: file is cut short")

    def names(self):
        return self.entries.keys()

    def shape(self, name):
        return self.entries[name].shape

    def where(self, name):
        return self.entries[name].file

    def rows(self, name, first, count):
        """Rows first .. first+count of a tensor [..., C] as float32 [count, C]; NaN and too large ones are refused."""
        entry = self.entries[name]
        each = self.row_bytes(entry)
        raw = self._read(entry.file, name, count * each, entry.offset + first * each)
        self._forget(len(raw))
        with np.errstate(all="ignore"):
            return self._finite(name, self.decode(entry, np.frombuffer(raw, np.uint8).reshape(count, each)))

    def _finite(self, name, x):
        """x, unless a number in it is none or too large."""
        largest = np.abs(x).max(initial=0)
        if not largest <= MAX_WEIGHT:                       # so NaN is refused too
            wanted = f"finite weights, of magnitude at most {MAX_WEIGHT:.2g}"
            fail(self.where(name), f"{name}: a value", wanted, largest)
        return x

    def row_bytes(self, entry):
        return entry.shape[-1] * self.DTYPES[entry.dtype].itemsize

    def decode(self, entry, raw):
        """Stored rows uint8 [count, row_bytes] -> float32 [count, C]."""
        x = raw.view(self.DTYPES[entry.dtype])
        return from_bf16(x) if entry.dtype == "BF16" else x.astype(np.float32)

    def _forget(self, size):
        """Called for `size` bytes read: now and then, what the page cache holds of the files is dropped. Not at once,
        for the system reads ahead of what is asked for, and experts are read in two rounds: gate and up, then down."""
        self.cached += size
        if self.drop and self.cached > self.most_cached:
            self.cached = 0
            for f in self.files.values():
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Safetensors(Files):
    """The tensors of one or more safetensors files."""

    def __init__(self, paths):
        super().__init__(paths)
        for path in paths:
            self._add(path, self._header(path))

    def _header(self, path):
        """Entries of one file. Format: u64 length of the header, the header (JSON), the data, which the tensors divide
        among themselves without holes (the safetensors library refuses all else, too)."""
        size = os.fstat(self.files[path].fileno()).st_size
        length = int.from_bytes(self._read(path, "safetensors header", min(size, 8), 0), "little")
        if length > MAX_JSON:
            fail(path, "safetensors header is damaged, length", f"at most {MAX_JSON} bytes", length)
        base = 8 + length
        if base > size:
            fail(path, "file is cut short, safetensors header", f"{base} bytes", f"{size} bytes")
        header = parse_json(f"{path}: safetensors header", self._read(path, "safetensors header", length, 8))
        header.pop("__metadata__", None)
        at, entries = base, {}
        for name, h in header.items():
            entries[name] = self._entry(path, name, h, base, size)
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].end)):
            if entry.offset != at:
                fail(path, f"{name}: data_offsets overlap another tensor's or leave a hole", at - base,
                     entry.offset - base)
            at = entry.end
        if at != size:
            fail(path, "there is more in the file than its tensors", f"{at} bytes", f"{size} bytes")
        return entries

    def _entry(self, path, name, header, base, size):
        where = f"{path}: {name}"
        checked(where, "safetensors header", header, dict)
        dtype = checked(where, "dtype", header.get("dtype"), str)
        shape = tuple(checked_integers(where, "shape", header.get("shape")))
        offsets = checked_integers(where, "data_offsets", header.get("data_offsets"))
        if len(offsets) != 2 or offsets[0] > offsets[1]:
            fail(where, "data_offsets", "first and end", one_line(repr(offsets), 200))
        begin, end = offsets
        if base + end > size:
            fail(where, "file is cut short", f"{base + end} bytes", f"{size} bytes")
        if dtype in self.DTYPES and end - begin != math.prod(shape) * self.DTYPES[dtype].itemsize:
            fail(where, "size", f"that of shape {list(shape)} in {dtype}", f"{end - begin} bytes")
        return Entry(path, dtype, shape, base + begin, base + end)

    def check_type(self, name):
        """Refuses what rows() cannot read."""
        entry = self.entries[name]
        if entry.dtype not in self.DTYPES:
            fail(entry.file, f"{name}: dtype", "BF16, F16, F32 or F64", entry.dtype)


class Merged:
    """A source with the mtp.* tensors of a second one, which win over its own."""

    def __init__(self, main, extra):
        self.sources = {name: main for name in main.names() if not name.startswith("mtp.")}
        self.sources.update({name: extra for name in extra.names() if name.startswith("mtp.")})

    def names(self):
        return self.sources.keys()

    def shape(self, name):
        return self.sources[name].shape(name)

    def where(self, name):
        return self.sources[name].where(name)

    def check_type(self, name):
        self.sources[name].check_type(name)

    def rows(self, name, first, count):
        return self.sources[name].rows(name, first, count)


def read_index(path):
    """{tensor: file} of a model.safetensors.index.json; all the files are there."""
    weight_map = checked(path, "weight_map", read_json(path).get("weight_map"), dict)
    for name, file in weight_map.items():
        checked(path, f"weight_map: {name}", file, str)
    files = {file: inside(path.parent, file, path) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if files[file] is None:
            fail(path, f"{name}: there is no shard {file}")
    return {name: files[file] for name, file in weight_map.items()}


def open_safetensors(path):
    """A file, or of a directory model.safetensors, else the shards that the index names, else all *.safetensors."""
    if not path.is_dir():
        return Safetensors([path])
    single, index = inside(path, "model.safetensors"), inside(path, "model.safetensors.index.json")
    if single:
        return Safetensors([single])
    if not index:
        files = [inside(path, file.name) for file in sorted(path.glob("*.safetensors"))]
        return Safetensors(files or fail(path, "no weights", "*.safetensors", "none"))
    weight_map = read_index(index)
    source = Safetensors(sorted(set(weight_map.values())))
    for name, shard in weight_map.items():
        if name not in source.names() or source.where(name) != shard:
            fail(shard, f"{name} is not in it, though {index.name} says so")
    return source


def open_source(path):
    """A file or directory of the command line -> a source of tensors."""
    path = Path(path)
    if not os.path.exists(path):
        fail(path, "no such file or directory")
    gguf = find_gguf(path)
    source = GGUF(gguf) if gguf else open_safetensors(path)
    if not source.entries:
        fail(path, "holds no tensors")
    return source


# ---- 2a. GGUF ----------------------------------------------------------------------------------------------------
# llama.cpp's container: one file or several parts with metadata, config and tokenizer among it, and tensors under names
# and in an order of its own. The gguf package's reader maps a file and believes it: a wrong count has it loop for ever.
# So the header is read here, and the package has what it does well, the decoding of blocks of some twenty types.

MAX_HEADER, MAX_ITEMS = 1 << 26, 1 << 22                    # bytes of a header, items of an array: ten times the usual
MAX_RECORDS, MAX_NAME = 1 << 16, 63                         # metadata, or tensors, of one file; bytes, as in llama.cpp
GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_STRING, GGUF_ARRAY = 8, 9


@functools.cache
def type_name(number):
    """The name of a type of tensors, None if there is none of the number."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    known = number in list(GGMLQuantizationType) and GGMLQuantizationType(number) in GGML_QUANT_SIZES
    return GGMLQuantizationType(number).name if known else None


@functools.cache
def block_size(name):
    """(weights, bytes) of a block of a type."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    return GGML_QUANT_SIZES[GGMLQuantizationType[name]]


def dequantize(raw, name):
    """Blocks uint8 [count, bytes] of a type -> float32 [count, C]; None if the package cannot."""
    from gguf import GGMLQuantizationType, quants
    try:
        return quants.dequantize(raw, GGMLQuantizationType[name])
    except NotImplementedError:
        return None


@functools.cache
def can_dequantize(name):
    """Whether blocks of a type can be decoded: tried on one."""
    with np.errstate(all="ignore"):
        return dequantize(np.zeros((1, block_size(name)[1]), np.uint8), name) is not None


class GGUFHeader:
    """The header of a GGUF file: self.meta {key: number, bool, string or a list of them}, self.entries {name: Entry}.

    Format, little-endian: "GGUF", u32 version, u64 number of tensors, u64 number of metadata, these (key, u32 type,
    value), the tensors (name, u32 rank, u64 sizes, last axis first, u32 type, u64 offset), then, aligned, the data.
    A string is its u64 length and UTF-8, an array u32 type, u64 count, values."""

    def __init__(self, path, size, read):
        """read(path, what, count, offset) gives bytes of the file, which has `size` of them."""
        self.path, self.size, self.read, self.raw, self.at = path, size, read, bytearray(), 0
        at = self.take(4, "magic")
        magic, version = bytes(self.raw[at:self.at]), self.number("I", "version")
        if magic != b"GGUF" or version not in (2, 3):
            big = magic == b"GGUF" and version in (2 << 24, 3 << 24)
            self.fail("magic and version", "GGUF, 2 or 3", "a big-endian file" if big else f"{magic!r}, {version}")
        tensors, metadata = [self.count(f"number of {what}", MAX_RECORDS) for what in ("tensors", "metadata")]
        self.meta, self.entries = {}, {}
        for i in range(metadata):
            key = self.text(f"key {i}")
            if key in self.meta:
                self.fail(f"metadata {key} stands twice")
            self.meta[key] = self.value(f"metadata {key}", self.number("I", key))
        found = [self.tensor(i) for i in range(tensors)]
        self.place(found)
        del self.raw

    def fail(self, what, wanted=None, found=None):
        fail(self.path, f"GGUF header: {one_line(what)}", wanted, found)

    def take(self, n, what):
        """Where the next n bytes start in self.raw, which holds them then."""
        at, self.at = self.at, self.at + n
        if self.at > len(self.raw):
            if self.at > min(self.size, MAX_HEADER):
                self.fail(f"{what} leads beyond the {'file' if self.at > self.size else 'largest header'}",
                          f"at most {min(self.size, MAX_HEADER)} bytes", self.at)
            more = min(max(self.at - len(self.raw), 1 << 20), self.size - len(self.raw))
            self.raw += self.read(self.path, "GGUF header", more, len(self.raw))
        return at

    def number(self, code, what):
        return struct.unpack_from("<" + code, self.raw, self.take(struct.calcsize("<" + code), what))[0]

    def count(self, what, most):
        n = self.number("Q", what)
        return n if n <= most else self.fail(what, f"at most {most}", n)

    def text(self, what, most=MAX_HEADER):
        n = self.count(f"{what}: bytes", most)
        at = self.take(n, what)
        try:
            return self.raw[at:at + n].decode()
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8", found=one_line(repr(bytes(self.raw[at:at + n])), 200))

    def value(self, what, kind):
        """A value of metadata. A float32 becomes the shortest decimal number that it stands for, as 1e-6 in JSON."""
        if kind == GGUF_STRING:
            return self.text(what)
        if kind in GGUF_SCALARS:
            x, = self.numbers(what, kind, 1)
            return float(str(np.float32(x))) if GGUF_SCALARS[kind] == "f" else x
        if kind != GGUF_ARRAY:
            self.fail(f"{what}: type", "0 to 12", kind)
        kind, count = self.number("I", what), self.count(f"{what}: items", MAX_ITEMS)
        if kind == GGUF_STRING:
            return [self.text(what) for _ in range(count)]
        return self.numbers(what, kind, count) if kind in GGUF_SCALARS else self.fail(
            f"{what}: type of items", "numbers or strings", kind)

    def numbers(self, what, kind, count):
        code = GGUF_SCALARS[kind]
        at = self.take(struct.calcsize("<" + code) * count, what)
        return list(struct.unpack_from(f"<{count}{code}", self.raw, at))

    def tensor(self, i):
        """(name, shape, type number, offset in the data) of tensor number i."""
        name = self.text(f"name of tensor {i}", MAX_NAME)
        rank = self.number("I", name)
        if not 1 <= rank <= 4:
            self.fail(f"{name}: rank", "1 to 4", rank)
        shape = tuple(self.number("Q", name) for _ in range(rank))[::-1]
        return name, shape, self.number("I", name), self.number("Q", name)

    def place(self, found):
        """Sets self.entries. The tensors follow each other, each aligned (llama.cpp refuses all else, too)."""
        step = self.meta.get("general.alignment", 32)
        if type(step) is not int or not 1 <= step <= 1 << 20 or step & (step - 1):
            self.fail("general.alignment", "a power of two", one_line(repr(step), 200))
        base, at = align(self.at, step), 0
        for name, shape, kind, offset in found:
            dtype = type_name(kind) or self.fail(f"{name}: type", "a known one", kind)
            block, size = block_size(dtype)
            if 0 in shape or shape[-1] % block:
                self.fail(f"{name}: shape", f"no empty axis, whole blocks of {block}", list(shape))
            if offset != at:
                self.fail(f"{name}: offset overlaps another tensor or leaves a hole", at, offset)
            if name in self.entries:
                self.fail(f"tensor {name} stands twice")
            end = at + math.prod(shape) // block * size
            if base + end > self.size:
                fail(self.path, f"GGUF file is cut short, {name}", f"{base + end} bytes", f"{self.size} bytes")
            self.entries[name] = Entry(self.path, dtype, shape, base + at, base + end)
            at = align(end, step)


def gguf_parts(path):
    """The files of the set that a GGUF file belongs to, in order: model-00001-of-00003.gguf and so on, or it alone."""
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name, re.DOTALL)
    if not match or match[3] == "00001":
        return [path]
    stem, number, count = match[1], int(match[2]), int(match[3])
    if not 1 <= number <= count:
        fail(path, "number of the part of a GGUF file", f"1 to {count}", number)
    names = (f"{stem}-{i + 1:05}-of-{count:05}.gguf" for i in range(count))
    return [inside(path.parent, name) or fail(path, f"part {name} of the GGUF file is missing") for name in names]


class GGUFTensors(Files):
    """The tensors of a GGUF file, or of all its parts, under their own names; self.meta, the metadata of the first."""

    def __init__(self, paths):
        super().__init__(paths)
        headers = [GGUFHeader(path, os.fstat(f.fileno()).st_size, self._read) for path, f in self.files.items()]
        total = sum(len(header.entries) for header in headers)
        self.path, self.meta = paths[0], headers[0].meta
        for i, header in enumerate(headers):
            for key, wanted, default in (("count", len(paths), 1), ("no", i, 0), ("tensors.count", total, total)):
                found = header.meta.get("split." + key, default if len(paths) == 1 else None)
                if found != wanted:
                    fail(header.path, f"GGUF metadata: split.{key} of part {i + 1} of {len(paths)}", wanted, found)
            self._add(header.path, header.entries)

    def check_type(self, name):
        """Refuses what rows() cannot read."""
        entry = self.entries[name]
        if entry.dtype not in self.DTYPES and not can_dequantize(entry.dtype):
            fail(entry.file, f"{name}: type", "a float or quantized one that the gguf package decodes", entry.dtype)

    def row_bytes(self, entry):
        block, size = block_size(entry.dtype)
        return entry.shape[-1] // block * size

    def decode(self, entry, raw):
        return super().decode(entry, raw) if entry.dtype in self.DTYPES else dequantize(raw, entry.dtype)

    def rows(self, name, first, count):
        """As of any file, times the scale in a tensor beside it: one number, or one for each expert (NVFP4 has it)."""
        x, scale = super().rows(name, first, count), name.removesuffix("weight") + "scale"
        if scale not in self.entries or scale == name:
            return x
        scales = super().rows(scale, 0, 1)[0]
        shape = self.entries[name].shape
        if len(scales) not in (1, shape[0]):
            fail(self.where(name), f"{scale}: numbers", f"1 or {shape[0]}", len(scales))
        each = math.prod(shape[:-1]) // len(scales)         # rows
        with np.errstate(over="ignore"):
            return self._finite(name, x * scales[(first + np.arange(count)) // each, None])


# Names of llama.cpp's converter (conversion/qwen.py) -> names of Hugging Face's checkpoints.
GGUF_MODEL = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
              "output.weight": "lm_head.weight"}
GGUF_MTP = {"nextn.eh_proj.weight": "mtp.fc.weight", "nextn.enorm.weight": "mtp.pre_fc_norm_embedding.weight",
            "nextn.hnorm.weight": "mtp.pre_fc_norm_hidden.weight", "nextn.shared_head_norm.weight": "mtp.norm.weight"}
GGUF_BLOCK = {
    "attn_norm.weight": "input_layernorm.weight", "post_attention_norm.weight": "post_attention_layernorm.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight", "attn_k_norm.weight": "self_attn.k_norm.weight",
    **{f"attn_{ours}.{part}": f"self_attn.{theirs}_proj.{part}" for part in ("weight", "bias")
       for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("output", "o"))},
    "ssm_in.weight": "linear_attn.in_proj_qkvz.weight", "ssm_ba.weight": "linear_attn.in_proj_ba.weight",
    "ssm_conv1d.weight": "linear_attn.conv1d.weight", "ssm_a": "linear_attn.A_log",
    "ssm_dt.bias": "linear_attn.dt_bias", "ssm_norm.weight": "linear_attn.norm.weight",
    "ssm_out.weight": "linear_attn.out_proj.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight", "ffn_gate_inp_shexp.weight": "mlp.shared_expert_gate.weight",
    "ffn_gate_up_exps.weight": "mlp.experts.gate_up_proj", "ffn_down_exps.weight": "mlp.experts.down_proj",
    **{f"ffn_{x}_shexp.weight": f"mlp.shared_expert.{x}_proj.weight" for x in ("gate", "up", "down")}}
# Keys of config.json -> keys of the metadata, behind "qwen3next.".
GGUF_CONFIG = dict(
    hidden_size="embedding_length", intermediate_size="feed_forward_length", max_position_embeddings="context_length",
    num_attention_heads="attention.head_count", num_key_value_heads="attention.head_count_kv",
    head_dim="attention.key_length", rms_norm_eps="attention.layer_norm_rms_epsilon", num_experts="expert_count",
    num_experts_per_tok="expert_used_count", moe_intermediate_size="expert_feed_forward_length",
    shared_expert_intermediate_size="expert_shared_feed_forward_length", linear_conv_kernel_dim="ssm.conv_kernel",
    linear_key_head_dim="ssm.state_size", linear_num_key_heads="ssm.group_count",
    linear_num_value_heads="ssm.time_step_rank")
# What the model's mathematics are for; a file that says otherwise is refused.
GGUF_FIXED = {"attention.causal": (True,), "expert_gating_func": (1,), "expert_weights_scale": (0, 1),
              "rope.scaling.attn_factor": (1,), "rope.scaling.yarn_ext_factor": (1,),
              "rope.scaling.yarn_log_multiplier": (0,)}

View = namedtuple("View", "shape rows undo")                # a tensor made of Rows of others; undo(x, where) -> values


def padded(shape, rank):
    """The shape with the leading axes of length 1 that llama.cpp drops when it writes a file anew."""
    return (1,) * (rank - len(shape)) + shape


def as_stored(x, where):
    return x


def minus_one(x, where):
    """A norm's 1 + w -> w."""
    return x - np.float32(1)


def decay_log(x, where):
    """-exp(A_log) -> A_log. The released ones are bf16: where one of those explains the number, it is that."""
    if not (x < 0).all():
        fail(where, "-exp(A_log)", "negative numbers", x.max())
    exact = np.log(-x.astype(np.float64))
    near = from_bf16(to_bf16(exact)).astype(np.float64)
    explained = np.abs(np.exp(near) + x) <= np.spacing(np.abs(x))
    return np.where(explained, near, exact).astype(np.float32)


class GGUF:
    """A GGUF file as a source of Hugging Face's names and values, llama.cpp's transformations of both undone;
    self.config, the Config that the metadata tell."""

    def __init__(self, path):
        self.stored = GGUFTensors(gguf_parts(path))
        self.path, self.meta, self.entries = self.stored.path, self.stored.meta, self.stored.entries
        for key, wanted, default in (("type", "model", "model"), ("architecture", "qwen3next", None)):
            if self.meta.get("general." + key, default) != wanted:
                self._fail("general." + key, wanted, self.meta.get("general." + key))
        self.meta.setdefault("qwen3next.nextn_predict_layers", 0)
        self.mtp = self._integer("nextn_predict_layers", 0, 1)
        self.layers = self._integer("block_count", 1 + self.mtp, 1 << 12) - self.mtp
        self.config = Config(self.path, self._config())
        self.views, self.used = {}, set()
        for name, to in GGUF_MODEL.items():
            self._map(name, to)
        for i in range(self.layers):
            self._block(f"blk.{i}.", f"model.layers.{i}.")
        if self.mtp:
            block = f"blk.{self.layers}."
            self._block(block, "mtp.layers.0.")
            for name, to in GGUF_MTP.items():
                self._map(block + name, to)
        scales = {name.removesuffix("weight") + x for name in self.used for x in ("scale", "input_scale")}
        for name in self.entries.keys() - self.used - scales:   # to be refused by its own name
            self._view(f"GGUF tensor {name}", self.entries[name].shape, [Rows(name, 0, 1)])

    def _fail(self, key, wanted, found):
        fail(self.path, f"GGUF metadata: {key}", wanted, one_line(repr(found), 200))

    def _get(self, key):
        """A value of metadata that has to be there."""
        value = self.meta.get("qwen3next." + key)
        return self._fail("qwen3next." + key, "a value", None) if value is None else value

    def _integer(self, key, low, high):
        return checked(self.path, f"GGUF metadata: qwen3next.{key}", self._get(key), int, low, high)

    def _config(self):
        """What config.json would hold. Of which kind a layer is, and whether there are biases and a head, tell the
        tensors: older files have no keys for it."""
        for key, wanted in GGUF_FIXED.items():
            if self.meta.get("qwen3next." + key, wanted[0]) not in wanted:
                self._fail("qwen3next." + key, " or ".join(map(str, wanted)), self._get(key))
        config = {key: self._get(name) for key, name in GGUF_CONFIG.items()}
        heads, inner = self._integer("ssm.time_step_rank", 1, 1 << 10), self._integer("ssm.inner_size", 1, 1 << 22)
        if inner % heads:
            self._fail("qwen3next.ssm.inner_size", f"a multiple of ssm.time_step_rank ({heads})", inner)
        if self.meta.get("qwen3next.attention.value_length", config["head_dim"]) != config["head_dim"]:
            self._fail("qwen3next.attention.value_length", config["head_dim"], self._get("attention.value_length"))
        if "token_embd.weight" not in self.entries:
            fail(self.path, "GGUF tensors: token_embd.weight is missing")
        linear = {name.split(".")[1] for name in self.entries if re.match(r"blk\.\d+\.ssm_", name)}
        stops = [self.meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
        config.update(
            model_type="qwen3_next", vocab_size=self.entries["token_embd.weight"].shape[0],
            num_hidden_layers=self.layers, linear_value_head_dim=inner // heads, rope_parameters=self._rope(),
            layer_types=["linear_attention" if str(i) in linear else "full_attention" for i in range(self.layers)],
            attention_bias=any(re.fullmatch(r"blk\.\d+\.attn_(q|qkv|output)\.bias", name) for name in self.entries),
            norm_topk_prob=self.meta.get("qwen3next.expert_weights_norm", True),
            tie_word_embeddings="output.weight" not in self.entries,
            eos_token_id=[token for token in stops if token is not None])
        return config

    def _rope(self):
        """config.json's rope_parameters. llama.cpp's converter writes what it finds in those."""
        head = self._integer("attention.key_length", 1, 1 << 12)
        rotary = self._integer("rope.dimension_count", 1, head)
        kind = self.meta.get("qwen3next.rope.scaling.type", "none")
        if kind not in ("none", "linear", "yarn"):
            self._fail("qwen3next.rope.scaling.type", "none, linear or yarn", kind)
        rope = dict(rope_type="default" if kind == "none" else kind, rope_theta=self._get("rope.freq_base"),
                    partial_rotary_factor=min(1.0, (rotary + 0.5) / head))     # whose product is rounded down
        keys = dict(factor="factor", original_max_position_embeddings="original_context_length",
                    attention_factor="yarn_attn_factor", beta_fast="yarn_beta_fast", beta_slow="yarn_beta_slow")
        found = {key: self.meta.get("qwen3next.rope.scaling." + name) for key, name in keys.items()}
        return {**rope, **{key: value for key, value in found.items() if value is not None and kind != "none"}}

    def _map(self, name, to):
        """The tensor `to` of Hugging Face's is tensor `name`, with its transformation undone."""
        if name not in self.entries:
            return
        last = re.sub(r"blk\.\d+\.", "", name)
        rank = 3 if "_exps." in last else 1 if last.endswith(("norm.weight", ".bias", "ssm_a")) else 2
        shape = self.entries[name].shape
        rows, shape = math.prod(shape[:-1]), padded(shape, rank)
        if last == "ssm_conv1d.weight":
            shape = shape[0], 1, *shape[1:]
        norm = last.endswith("norm.weight") and last != "ssm_norm.weight"
        self._view(to, shape, [Rows(name, 0, rows)], minus_one if norm else decay_log if last == "ssm_a" else as_stored)

    def _view(self, to, shape, rows, undo=as_stored):
        if to not in self.views:                            # else it stays unread, which is an error
            self.views[to] = View(shape, rows, undo)
            self.used.update(row.name for row in rows)

    def _block(self, block, to):
        """Maps the tensors of a block to those of a layer."""
        c, D = self.config, self.config.hidden_size
        for name, theirs in GGUF_BLOCK.items():
            self._map(block + name, to + theirs)
        gate, up = block + "ffn_gate_exps.weight", block + "ffn_up_exps.weight"
        if self._are(gate, up):
            I = c.moe_intermediate_size
            self._check((c.num_experts, I, D), gate, up)
            for e, (x, name) in itertools.product(range(c.num_experts), (("gate", gate), ("up", up))):
                self._view(f"{to}mlp.experts.{e}.{x}_proj.weight", (I, D), [Rows(name, e * I, I)])
        qkv, z, bias = block + "attn_qkv.weight", block + "attn_gate.weight", block + "attn_qkv.bias"
        if self._are(qkv, z):
            Kd, Vd, nk, dk = c.key_dim, c.value_dim, c.linear_num_key_heads, c.linear_key_head_dim
            self._check((2 * Kd + Vd, D), qkv)
            self._check((Vd, D), z)
            self._view(to + "linear_attn.in_proj_qkvz.weight", (2 * Kd + 2 * Vd, D), [
                row for g in range(nk) for row in (
                    Rows(qkv, g * dk, dk), Rows(qkv, Kd + g * dk, dk), Rows(qkv, 2 * Kd + g * (Vd // nk), Vd // nk),
                    Rows(z, g * (Vd // nk), Vd // nk))])
        elif self._are(qkv) and not self._are(block + "ssm_a"):  # the converter's --fuse-qkv
            Qd, Gd = 2 * c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
            self._check((Qd + 2 * Gd, D), qkv)
            for x, first, n in (("q", 0, Qd), ("k", Qd, Gd), ("v", Qd + Gd, Gd)):
                self._view(f"{to}self_attn.{x}_proj.weight", (n, D), [Rows(qkv, first, n)])
                if self._are(bias):
                    self._check((Qd + 2 * Gd,), bias)
                    self._view(f"{to}self_attn.{x}_proj.bias", (n,), [Rows(bias, 0, 1)],
                               lambda x, where, part=slice(first, first + n): x[:, part])

    def _are(self, *names):
        return all(name in self.entries for name in names)

    def _check(self, shape, *names):
        """The tensors have the shape."""
        for name in names:
            found = padded(self.entries[name].shape, len(shape))
            if found != shape:
                fail(self.entries[name].file, f"{name}: shape", list(shape), list(found))

    def names(self):
        return self.views.keys()

    def shape(self, name):
        return self.views[name].shape

    def where(self, name):
        """The file and, where that is another, the name in it."""
        stored = self.views[name].rows[0].name
        return f"{self.entries[stored].file}" + ("" if name.endswith(stored) else f": {stored}")

    def check_type(self, name):
        for stored in {row.name for row in self.views[name].rows}:
            self.stored.check_type(stored)

    def rows(self, name, first, count):
        view = self.views[name]
        return view.undo(read_rows(self.stored, view.rows, first, count), self.where(name))

    def generation(self):
        """What generation_config.json would hold, None if the file says nothing about it. It had do_sample: the
        converter takes the numbers from there."""
        keys = dict(temperature="temp", top_p="top_p", top_k="top_k", min_p="min_p",
                    repetition_penalty="penalty_repeat")
        found = {key: self.meta.get("general.sampling." + name) for key, name in keys.items()}
        found = {key: value for key, value in found.items() if value is not None}
        return dict(found, do_sample=True) if found else None

    def template(self):
        """(template, its variables), as of find_template."""
        tokens, variables = self.meta.get("tokenizer.ggml.tokens") or [], {}
        names = dict(bos="bos_token", eos="eos_token", padding="pad_token", unknown="unk_token")
        for name, variable in names.items():
            token = self.meta.get(f"tokenizer.ggml.{name}_token_id")
            if type(token) is int and 0 <= token < len(tokens):
                variables[variable] = tokens[token]
        return self.meta.get("tokenizer.chat_template"), variables

    def tokenizer(self):
        """The TokenizerFile that the metadata tell, None if they do not."""
        get = lambda key, kind: checked(self.path, f"GGUF metadata: tokenizer.ggml.{key}",
                                        self.meta.get("tokenizer.ggml." + key), kind)
        if self.meta.get("tokenizer.ggml.model", "none") == "none":
            return None
        if get("model", str) != "gpt2":
            self._fail("tokenizer.ggml.model", "gpt2", get("model", str))
        pattern = GGUF_PATTERNS.get(get("pre", str), None)
        if pattern is None:
            self._fail("tokenizer.ggml.pre", " or ".join(GGUF_PATTERNS), get("pre", str))
        tokens, kinds = get("tokens", list), get("token_type", list)
        if len(tokens) != len(kinds):
            self._fail("tokenizer.ggml.token_type", f"{len(tokens)} items", len(kinds))
        vocab, added = {}, []
        for i, (text, kind) in enumerate(zip(tokens, kinds)):
            if kind == UNUSED:
                continue
            if kind not in (NORMAL, CONTROL, USER_DEFINED) or not isinstance(text, str):
                self._fail(f"tokenizer.ggml: token {i}", "normal, control or user-defined text", (text, kind))
            if vocab.setdefault(text, i) != i:
                self._fail(f"tokenizer.ggml: token {i}", f"another text than token {vocab[text]}", text)
            if kind != NORMAL:
                added.append(dict(id=i, content=text, special=kind == CONTROL and text not in QWEN_TEXT))
        steps = [dict(type="Split", pattern=dict(Regex=SPLIT_PATTERNS[pattern]), behavior="Isolated", invert=False),
                 dict(type="ByteLevel", add_prefix_space=False, use_regex=False)]
        return TokenizerFile(self.path, dict(
            model=dict(type="BPE", vocab=vocab, merges=get("merges", list)), added_tokens=added,
            normalizer=dict(type="NFC"), pre_tokenizer=dict(type="Sequence", pretokenizers=steps)))


NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5          # types of tokens; unused ones fill up the vocabulary
GGUF_PATTERNS = dict(qwen2=0, qwen35=1)                     # tokenizer.ggml.pre -> number in SPLIT_PATTERNS; with NFC
# Added tokens that are not special in Qwen's tokenizers. The converter calls all control tokens that look like one.
QWEN_TEXT = {f"<|{name}|>" for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")}


def find_gguf(path):
    """The GGUF file that a path of the command line means: itself, or the (first) one in a directory of one model in
    this format only. Else None."""
    if path.suffix == ".gguf" and not path.is_dir():
        return path
    files = sorted(path.glob("*.gguf")) if path.is_dir() and not any(path.glob("*.safetensors")) else []
    if not files:
        return None
    first = inside(path, files[0].name)
    if len(files) != len(gguf_parts(first)):
        fail(path, "GGUF files", "one model", f"{len(files)} files, {files[0].name} among them")
    return first


# ---- 3. Config ---------------------------------------------------------------------------------------------------

# What transformers assumes for absent keys (Qwen3NextConfig).
DEFAULTS = dict(
    vocab_size=151936, hidden_size=2048, intermediate_size=5632, num_hidden_layers=48, num_attention_heads=16,
    num_key_value_heads=2, head_dim=256, max_position_embeddings=32768, rms_norm_eps=1e-6, attention_bias=False,
    linear_conv_kernel_dim=4, linear_key_head_dim=128, linear_value_head_dim=128, linear_num_key_heads=16,
    linear_num_value_heads=32, decoder_sparse_step=1, moe_intermediate_size=512, shared_expert_intermediate_size=512,
    num_experts_per_tok=10, num_experts=512, norm_topk_prob=True, tie_word_embeddings=False, hidden_act="silu",
    partial_rotary_factor=0.25, full_attention_interval=4, mlp_only_layers=[])

# The models made of these blocks, by model_type: what differs in the defaults, and what their classes in transformers
# take for granted whatever config.json says. Qwen3.5 and 3.6 call the text part of a model that sees ..._text; in such a
# model's config.json it is the object text_config.
QWEN3_5 = (dict(vocab_size=248320, hidden_size=4096, intermediate_size=12288, num_hidden_layers=32,
                num_key_value_heads=4), dict(num_experts=0))
QWEN3_5_MOE = (dict(vocab_size=248320, num_hidden_layers=40, num_experts=256, num_experts_per_tok=8),
               dict(decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True))
FAMILIES = dict(qwen3_next=({}, {}), qwen3_5_text=QWEN3_5, qwen3_5_moe_text=QWEN3_5_MOE)
OUTER = ("qwen3_5", "qwen3_5_moe")                          # with a vision part, which is left out
# Their classes in transformers -> what stands on top of the layers.
ARCHITECTURES = dict(
    qwen3_next=dict(Qwen3NextForCausalLM="causal_lm", Qwen3NextForSequenceClassification="sequence_classification",
                    Qwen3NextForTokenClassification="token_classification",
                    Qwen3NextForQuestionAnswering="question_answering"),
    qwen3_5_text=dict(Qwen3_5ForCausalLM="causal_lm", Qwen3_5ForConditionalGeneration="causal_lm",
                      Qwen3_5ForSequenceClassification="sequence_classification",
                      Qwen3_5TextForSequenceClassification="sequence_classification",
                      Qwen3_5ForTokenClassification="token_classification"),
    qwen3_5_moe_text=dict(Qwen3_5MoeForCausalLM="causal_lm", Qwen3_5MoeForConditionalGeneration="causal_lm"))
MAX_LABELS = 1 << 16

# The largest of each size that the engine takes. All are 1 or more, but num_experts may be 0.
SIZES = dict(
    vocab_size=1 << 24, hidden_size=1 << 16, intermediate_size=1 << 20, num_hidden_layers=1 << 12,
    num_attention_heads=1 << 10, num_key_value_heads=1 << 10, head_dim=1 << 12, max_position_embeddings=1 << 28,
    linear_conv_kernel_dim=64, linear_key_head_dim=1 << 12, linear_value_head_dim=1 << 12,
    linear_num_key_heads=1 << 10, linear_num_value_heads=1 << 10, decoder_sparse_step=1 << 30,
    moe_intermediate_size=1 << 20, shared_expert_intermediate_size=1 << 20, num_experts_per_tok=1 << 10,
    num_experts=1 << 16, full_attention_interval=1 << 30)
MAX_EXPERTS = 1 << 18                                       # of all layers together: ten times the released model's
LAYER_KINDS = {"linear_attention": 0, "full_attention": 1}


class Config:
    """config.json checked, with transformers' defaults: c.hidden_size and so on, c.layers, c.sparse, c.rope, c.head,
    c.labels, c.pad (the id of padding, None if there is none), c.fused (whether q k v z and b a are one matrix each)."""

    def __init__(self, path, found=None):
        """found: what the file holds, where it is not read from there (GGUF)."""
        self.path, whole = path, read_json(path) if found is None else found
        self.json = self._text_part(whole)
        defaults, fixed = FAMILIES[self.model_type]
        for key, value in {**DEFAULTS, **defaults}.items():
            found = self.json.get(key)
            setattr(self, key, fixed[key] if key in fixed else value if found is None else found)
        self.fused = self.model_type == "qwen3_next"
        self._refuse_other_models(whole)
        self.head = self._head(whole)
        self.labels = self._labels(whole)
        pad = self.json.get("pad_token_id")
        self.pad = None if pad is None else checked(path, "pad_token_id", pad, int, -1, self.vocab_size - 1)
        self._check_numbers()
        self.layers = self._layer_types()          # [num_hidden_layers] 0 linear attention, 1 full attention
        self.sparse = [self._is_sparse(i) for i in range(self.num_hidden_layers)]
        self.rope = self._rope()
        self.rope_meta = self._rope_meta()
        self.rotary_dim = int(self.head_dim * self.rope["partial_rotary_factor"])
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            fail(self.path, "partial_rotary_factor * head_dim", f"even, 2..{self.head_dim}", self.rotary_dim)
        self.key_dim = self.linear_num_key_heads * self.linear_key_head_dim
        self.value_dim = self.linear_num_value_heads * self.linear_value_head_dim

    def _text_part(self, whole):
        """The object that describes the language model: all of config.json, or its text_config. Sets self.model_type and
        self.sees."""
        found = whole.get("model_type")
        nested = self.sees = found in OUTER
        part = checked(self.path, "text_config", whole.get("text_config"), dict) if nested else whole
        self.model_type = part.get("model_type")
        wanted = [found + "_text"] if nested else list(FAMILIES)
        if self.model_type not in wanted:                   # a list, for model_type may be anything
            what = "text_config model_type" if nested else "model_type"
            fail(self.path, what, " or ".join(wanted + ([] if nested else list(OUTER))), self.model_type)
        if nested and whole.get("tie_word_embeddings") is not None:
            part = {**part, "tie_word_embeddings": whole["tie_word_embeddings"]}
        return part

    def _refuse_other_models(self, whole):
        """Anything that would change the mathematics in a way this exporter does not know."""
        wanted = dict(hidden_act="silu", use_sliding_window=False, quantization_config=None, attn_output_gate=True)
        for key, value in wanted.items():
            for found in (self.json.get(key), whole.get(key)):
                if found != value and found is not None:
                    fail(self.path, key, value or "none", found)

    def _head(self, whole):
        """What stands on top of the model, by config.json's architectures; without, the next token is told."""
        architectures, found, known = whole.get("architectures") or [], set(), ARCHITECTURES[self.model_type]
        for name in checked(self.path, "architectures", architectures, list):
            if name not in list(known):                     # a list, for name may be anything
                fail(self.path, f"architectures: {name} is not known for {self.model_type}", " or ".join(known))
            found.add(known[name])
        if len(found) > 1:
            fail(self.path, "architectures", "one kind of head", architectures)
        return found.pop() if found else "causal_lm"

    def _labels(self, whole):
        """The names of a classifier's classes in the order of its outputs, else none (transformers, PreTrainedConfig)."""
        if not self.head.endswith("classification"):
            return []
        given = checked(self.path, "id2label", whole.get("id2label") or {}, dict)
        number = len(given) or whole.get("num_labels") or 2
        count = checked(self.path, "id2label, num_labels", number, int, 1, MAX_LABELS)
        labels = [given.get(str(i), None if given else f"LABEL_{i}") for i in range(count)]
        for i, label in enumerate(labels):
            checked(self.path, f"id2label {i}", label, str)
            if not label or not all(c.isprintable() for c in label):
                fail(self.path, f"id2label {i}", "printable text", repr(label))
        return labels

    def _check_numbers(self):
        for key, most in SIZES.items():
            checked(self.path, key, getattr(self, key), int, 0 if key == "num_experts" else 1, most)
        for key in ("rms_norm_eps", "partial_rotary_factor"):
            checked(self.path, key, getattr(self, key), float, 0, 1)
        for key in ("attention_bias", "norm_topk_prob", "tie_word_embeddings"):
            checked(self.path, key, getattr(self, key), bool)
        checked_integers(self.path, "mlp_only_layers", self.mlp_only_layers)
        for many, few in (("linear_num_value_heads", "linear_num_key_heads"),
                          ("num_attention_heads", "num_key_value_heads")):
            if getattr(self, many) % getattr(self, few):
                fail(self.path, many, f"a multiple of {few} ({getattr(self, few)})", getattr(self, many))
        if self.num_experts and self.num_experts_per_tok > self.num_experts:
            fail(self.path, "num_experts_per_tok", f"at most {self.num_experts}", self.num_experts_per_tok)
        if self.num_hidden_layers * self.num_experts > MAX_EXPERTS:
            fail(self.path, "num_hidden_layers * num_experts", f"at most {MAX_EXPERTS}",
                 self.num_hidden_layers * self.num_experts)

    def _layer_types(self):
        types = self.json.get("layer_types")
        if types is None:
            every = self.full_attention_interval
            return [int((i + 1) % every == 0) for i in range(self.num_hidden_layers)]
        if len(checked(self.path, "layer_types", types, list)) != self.num_hidden_layers:
            fail(self.path, "layer_types", f"{self.num_hidden_layers} entries", len(types))
        for name in types:
            if name not in list(LAYER_KINDS):               # a list, for name may be anything
                fail(self.path, "layer_types", " or ".join(LAYER_KINDS), name)
        return [LAYER_KINDS[name] for name in types]

    def _is_sparse(self, i):
        """Whether layer i has experts (transformers, Qwen3NextDecoderLayer)."""
        return int(i not in self.mlp_only_layers and self.num_experts > 0 and (i + 1) % self.decoder_sparse_step == 0)

    def _rope(self):
        """Rotary parameters in the spelling of transformers 5, from it or from rope_theta and rope_scaling (4.57)."""
        keys = "rope_scaling", "rope_parameters"
        rope, new = [dict(checked(self.path, key, self.json.get(key) or {}, dict)) for key in keys]
        rope = rope or new
        rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
        if rope["rope_type"] not in ("default", "linear", "yarn"):
            fail(self.path, "rope_type", "default, linear or yarn", rope["rope_type"])
        if any(isinstance(value, dict) for value in rope.values()):
            fail(self.path, "rope_parameters", "one set for all layers", "one for each layer type")
        for key, default in (("rope_theta", 10000.0), ("partial_rotary_factor", 0.25)):
            if rope.get(key) is None:
                rope[key] = default if self.json.get(key) is None else self.json[key]
        return rope

    def _rope_number(self, key, default, low, high):
        """A rotary parameter, or the default where it is absent."""
        value = self.rope.get(key)
        return float(checked(self.path, f"rope {key}", default if value is None else value, float, low, high))

    def _rope_meta(self):
        """Metadata of the rotary embedding; YaRN (arXiv 2309.00071) resolved as in modeling_rope_utils.py. The ranges
        are those that the engine takes."""
        rope, most, number = self.rope, self.max_position_embeddings, self._rope_number
        number("partial_rotary_factor", None, 0, 1)
        meta = dict(rope_theta=number("rope_theta", None, 1, 1e15), rope_type=rope["rope_type"])
        if rope["rope_type"] == "linear":
            meta["rope_factor"] = number("factor", None, 1e-3, 1e6)
        if rope["rope_type"] != "yarn":
            return meta
        original = (self.json.get("original_max_position_embeddings")
                    or rope.get("original_max_position_embeddings") or most)
        checked(self.path, "rope original_max_position_embeddings", original, int, 1, 1 << 28)
        factor = number("factor", most / original if "factor" in rope else None, 1e-3, 1e6)
        scale = lambda m: 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0
        m, m_all = number("mscale", 0, 0, 1e3), number("mscale_all_dim", 0, 0, 1e3)
        attention = scale(m) / scale(m_all) if m and m_all else scale(1)
        beta = lambda key, default: number(key, default, 0, 1e6) or float(default)
        return dict(meta, rope_factor=factor, rope_original_max_position_embeddings=original,
                    rope_beta_fast=beta("beta_fast", 32), rope_beta_slow=beta("beta_slow", 1),
                    rope_attention_factor=number("attention_factor", attention, 0, 1e3),
                    rope_truncate=int(checked(self.path, "rope truncate", rope.get("truncate", True), bool)))


# ---- 4. Plan, and stored types -----------------------------------------------------------------------------------
# kinds: "float"   float32 as it is: norms, vectors, the convolution
#        "small"   a matrix kept bf16 when that is exact, else f32
#        "matrix"  stored as --type says
#        "head"    embedding and output head: as --type says, but q8 under q4

Rows = namedtuple("Rows", "name first count")               # rows of a source tensor
Tensor = namedtuple("Tensor", "name kind shape data type", defaults=[None])
# data of a matrix: one tuple for each matrix of the leading axis, holding one list of Rows, or two (gate, up) that
# are stored tile by tile in turn. data of a float: a function source -> float32 array. type: a Type, set by typed().


def ungroup(groups, *widths):
    """Spans (first, count) that sort group-interleaved rows by part: part 0 of all groups, part 1 of all, ..."""
    starts = [sum(widths[:i]) for i in range(len(widths))]
    return [(g * sum(widths) + s, w) for s, w in zip(starts, widths) for g in range(groups)]


def text_prefix(names):
    """What the names of the language model's tensors begin with: it is a part of a model that sees too, or of a class
    that calls it otherwise (transformers, Qwen3NextForQuestionAnswering)."""
    return next((p for p in ("model.language_model.", "transformer.") if p + "embed_tokens.weight" in names), "model.")


class Plan:
    """What goes into the file: self.tensors in order, self.wanted the names of the source tensors they need.

    packed: source names of experts that are one tensor for all experts (transformers 5) instead of one each. source,
    path: where what is planned is looked for at once, so that no config.json makes a plan larger than it; or None."""

    def __init__(self, config, mtp, tied, packed=frozenset(), source=None, path=None):
        self.c, self.packed, self.tensors, self.wanted = config, packed, [], set()
        self.source, self.path = source, path
        model = text_prefix(source.names() if source else ())
        D, V = config.hidden_size, config.vocab_size
        self.matrix("embed_tokens", "head", [V, D], self.rows(model + "embed_tokens.weight", V, D))
        for i, (attention, sparse) in enumerate(zip(config.layers, config.sparse)):
            self.layer(f"{model}layers.{i}.", f"layers.{i}.", attention, sparse)
        self.vector("norm", model + "norm.weight", D)
        if config.head != "causal_lm":
            self.classifier(*("qa_outputs", 2) if config.head == "question_answering" else ("score", len(config.labels)))
        elif not tied:
            self.matrix("lm_head", "head", [V, D], self.rows("lm_head.weight", V, D))
        if mtp:
            self.matrix("mtp.fc", "matrix", [D, 2 * D], self.rows("mtp.fc.weight", D, 2 * D))
            for name in ("mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm"):
                self.vector(name, name + ".weight", D)
            self.layer("mtp.layers.0.", "mtp.layers.0.", attention=1, sparse=config.num_experts > 0)

    def classifier(self, name, n):
        """A head of n outputs; its bias is optional (that of sequence classification has none)."""
        D = self.c.hidden_size
        self.matrix(name, "small", [n, D], self.rows(name + ".weight", n, D))
        if self.source and name + ".bias" in self.source.names():
            self.vector(name + "_bias", name + ".bias", n)

    def want(self, name, *shape):
        """The name of a source tensor, which has to have the shape and a type that can be read."""
        self.wanted.add(name)
        if self.source:
            if name not in self.source.names():
                fail(self.path, f"{name} is missing", list(shape), "none")
            if self.source.shape(name) != shape:
                fail(self.source.where(name), f"{name}: shape", list(shape), list(self.source.shape(name)))
            self.source.check_type(name)
        return name

    def rows(self, name, R, C, spans=None):
        """The rows of source matrix [R, C], all or the spans (first, count)."""
        self.want(name, R, C)
        return [Rows(name, first, count) for first, count in spans or [(0, R)]]

    def matrix(self, name, kind, shape, *pieces):
        self.tensors.append(Tensor(name, kind, tuple(shape), [tuple(pieces)]))

    def vector(self, name, source_name, n):
        self.want(source_name, n)
        self.floats(name, [n], lambda source: source.rows(source_name, 0, 1)[0])

    def floats(self, name, shape, data):
        self.tensors.append(Tensor(name, "float", tuple(shape), data))

    def layer(self, src, dst, attention, sparse):
        D = self.c.hidden_size
        self.vector(dst + "input_layernorm", src + "input_layernorm.weight", D)
        (self.attention if attention else self.linear)(src, dst)
        self.vector(dst + "post_attention_layernorm", src + "post_attention_layernorm.weight", D)
        (self.experts if sparse else self.dense)(src + "mlp.", dst + "mlp.")

    def linear(self, src, dst):
        """Gated DeltaNet: all q, all k, all v, all z, and all b, all a. Qwen3-Next's checkpoints group these rows by key
        head, [q k v.. z..] and [b.. a..] (transformers, Qwen3NextGatedDeltaNet.fix_query_key_value_ordering); Qwen3.5's
        have in_proj_qkv, in_proj_z, in_proj_b and in_proj_a in this order."""
        c, src, dst = self.c, src + "linear_attn.", dst + "linear_attn."
        D, Kd, Vd, nk, nv = c.hidden_size, c.key_dim, c.value_dim, c.linear_num_key_heads, c.linear_num_value_heads
        dk, dv, K, ratio = c.linear_key_head_dim, c.linear_value_head_dim, c.linear_conv_kernel_dim, nv // nk
        R, channels = 2 * Kd + 2 * Vd, 2 * Kd + Vd
        if c.fused:
            qkvz = self.rows(src + "in_proj_qkvz.weight", R, D, ungroup(nk, dk, dk, ratio * dv, ratio * dv))
            ba = self.rows(src + "in_proj_ba.weight", 2 * nv, D, ungroup(nk, ratio, ratio))
        else:
            qkvz = self.rows(src + "in_proj_qkv.weight", channels, D) + self.rows(src + "in_proj_z.weight", Vd, D)
            ba = self.rows(src + "in_proj_b.weight", nv, D) + self.rows(src + "in_proj_a.weight", nv, D)
        self.matrix(dst + "in_proj_qkvz", "matrix", [R, D], qkvz)
        self.matrix(dst + "in_proj_ba", "small", [2 * nv, D], ba)
        conv = self.want(src + "conv1d.weight", channels, 1, K)
        self.floats(dst + "conv1d", [K, channels], lambda source: source.rows(conv, 0, channels).T)
        self.vector(dst + "A_log", src + "A_log", nv)
        self.vector(dst + "dt_bias", src + "dt_bias", nv)
        self.vector(dst + "norm", src + "norm.weight", dv)
        self.matrix(dst + "out_proj", "matrix", [D, Vd], self.rows(src + "out_proj.weight", D, Vd))

    def attention(self, src, dst):
        """Gated attention. q_proj holds [query gate] head by head; here all queries, all gates, all keys, values."""
        c, src, dst = self.c, src + "self_attn.", dst + "self_attn."
        D, hd = c.hidden_size, c.head_dim
        Qd, Gd = c.num_attention_heads * hd, c.num_key_value_heads * hd
        spans = ungroup(c.num_attention_heads, hd, hd)
        self.matrix(dst + "qgkv_proj", "matrix", [2 * Qd + 2 * Gd, D],
                    self.rows(src + "q_proj.weight", 2 * Qd, D, spans) + self.rows(src + "k_proj.weight", Gd, D)
                    + self.rows(src + "v_proj.weight", Gd, D))
        if c.attention_bias:
            q, k, v = [self.want(f"{src}{x}_proj.bias", n) for x, n in (("q", 2 * Qd), ("k", Gd), ("v", Gd))]
            self.floats(dst + "qgkv_bias", [2 * Qd + 2 * Gd], lambda source: np.concatenate(
                [source.rows(q, 0, 1)[0, first:first + n] for first, n in spans]
                + [source.rows(k, 0, 1)[0], source.rows(v, 0, 1)[0]]))
            self.vector(dst + "o_bias", src + "o_proj.bias", D)
        self.vector(dst + "q_norm", src + "q_norm.weight", hd)
        self.vector(dst + "k_norm", src + "k_norm.weight", hd)
        self.matrix(dst + "o_proj", "matrix", [D, Qd], self.rows(src + "o_proj.weight", D, Qd))

    def dense(self, src, dst, I=None):
        """Gated MLP: gate and up as one tensor [1, 2, I, D]."""
        D, I = self.c.hidden_size, I or self.c.intermediate_size
        self.matrix(dst + "gate_up_proj", "matrix", [1, 2, I, D],
                    self.rows(src + "gate_proj.weight", I, D), self.rows(src + "up_proj.weight", I, D))
        self.matrix(dst + "down_proj", "matrix", [1, D, I], self.rows(src + "down_proj.weight", D, I))

    def experts(self, src, dst):
        """Sparse MLP: router, experts stacked, shared expert and its gate."""
        c, D = self.c, self.c.hidden_size
        E, I = c.num_experts, c.moe_intermediate_size
        self.matrix(dst + "gate", "small", [E, D], self.rows(src + "gate.weight", E, D))
        for name, shape, find in (("gate_up_proj", (E, 2, I, D), self.gate_up), ("down_proj", (E, D, I), self.down)):
            self.tensors.append(Tensor(f"{dst}experts.{name}", "matrix", shape,
                                       [find(src + "experts.", e, I, D) for e in range(E)]))
        self.dense(src + "shared_expert.", dst + "shared_expert.", c.shared_expert_intermediate_size)
        gate = self.want(src + "shared_expert_gate.weight", 1, D)
        self.floats(dst + "shared_expert_gate", [D], lambda source: source.rows(gate, 0, 1)[0])

    def gate_up(self, src, e, I, D):
        if src + "gate_up_proj" in self.packed:
            name = self.want(src + "gate_up_proj", self.c.num_experts, 2 * I, D)
            return [Rows(name, 2 * I * e, I)], [Rows(name, 2 * I * e + I, I)]
        return self.rows(f"{src}{e}.gate_proj.weight", I, D), self.rows(f"{src}{e}.up_proj.weight", I, D)

    def down(self, src, e, I, D):
        if src + "down_proj" in self.packed:
            return [Rows(self.want(src + "down_proj", self.c.num_experts, D, I), D * e, D)],
        return self.rows(f"{src}{e}.down_proj.weight", D, I),

    def refuse_others(self):
        """Refuse a source with tensors that nobody would read, but for those of a vision part, and of what only helps to
        generate in a model that does not."""
        unread = ["model.visual."] * self.c.sees + ["mtp."] * (self.c.head != "causal_lm")
        for name in self.source.names():
            if not (name in self.wanted or name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"
                    or name.startswith(tuple(unread))):
                fail(self.source.where(name), f"{name} is not a tensor of this model")


# A matrix [..., R, C] is stored matrix by matrix, each in tiles of 16 rows (the last zero padded) and all C columns;
# gate and up matrices alternate tile by tile. In a tile, rows run fastest but for what one lane of a kernel takes:
#   f32   for each column: 16 floats
#   bf16  for each pair of columns: 16 x 2 bf16
#   q8    for each 64 columns: 2 x 16 bf16 scales [block of 32][row], then for each 4 columns 16 x 4 bytes q+128;
#         a weight is scale * q, q = -127..127
#   q6    for each 64 columns: the same scales, then for each block of 32 two times 16 x 4 bytes, with two bits each of
#         the 4-column groups 0..3 and 4..7, lowest first, and four times 16 x 4 bytes with the upper four bits of the
#         groups j (low) and j+4 (high); a weight is scale * (16 four + 4 two - 128): q8 without its two lowest bits
#   q4    for each 64 columns: the same scales, then for block b and j = 0..3 16 x 4 bytes, byte i holding the levels
#         of columns 32b+4j+i (low four bits) and 32b+16+4j+i (high); a weight is scale * Q4_LEVELS[book, index],
#         where book is the lowest bit of the scale's 16
# Columns are padded to whole pairs or 64s with zeros; in q4, which has no 0, a begun block ends in smallest levels.
TILE = 16
PORTION = 1 << 16                                           # weights encoded at once: their arrays stay in the cache
Type = namedtuple("Type", "name code tile_bytes encode decode")
# encode: float32 [T, 16, C] -> uint8 [T, tile_bytes(C)], sum of squared rounding errors (0 unless quantized);
# decode: those bytes and C -> float32 [T, 16, C], scales or None


def portions(count, C):
    """Slices of 0..count tiles of C columns, each of about PORTION weights."""
    step = max(1, PORTION // (TILE * C))
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def squares(x):
    """Sum of the squares of a float32 array, infinite where one is. Not np.vdot: on long vectors that is BLAS with
    threads of its own."""
    with np.errstate(over="ignore"):
        return float(np.vecdot(x, x).sum(dtype=np.float64))


def encode_f32(x):
    return np.ascontiguousarray(x.transpose(0, 2, 1)).view(np.uint8).reshape(len(x), -1), 0.0


def decode_f32(tiles, C):
    return tiles.view(np.float32).reshape(len(tiles), C, TILE).transpose(0, 2, 1), None


def encode_bf16(x):
    pairs = to_bf16(pad_columns(x, 2)).view(np.uint32)      # two at once
    return np.ascontiguousarray(pairs.transpose(0, 2, 1)).view(np.uint8).reshape(len(x), -1), 0.0


def decode_bf16(tiles, C):
    pairs = from_bf16(tiles.view(np.uint16)).reshape(len(tiles), -1, TILE, 2)
    return pairs.transpose(0, 2, 1, 3).reshape(len(tiles), TILE, -1)[:, :, :C], None


def pad_columns(x, multiple):
    """[T, 16, C] -> the same with C zero padded to a multiple."""
    extra = -x.shape[2] % multiple
    return np.pad(x, ((0, 0), (0, 0), (0, extra))) if extra else x


def join(scales, packed):
    """scales uint16 [T, S, 2, 16] and codes uint8 [T, S, bytes] -> tiles [T, S * (64 + bytes)]."""
    T, S = scales.shape[:2]
    return np.concatenate([scales.view(np.uint8).reshape(T, S, 64), packed.reshape(T, S, -1)], 2).reshape(T, -1)


def split(tiles, bytes_each):
    """The inverse of join: float32 scales [T, 16, S, 2], codes uint8 [T, S, bytes]."""
    blocks = tiles.reshape(len(tiles), -1, 64 + bytes_each)
    scales = np.ascontiguousarray(blocks[:, :, :64]).view(np.uint16).reshape(*blocks.shape[:2], 2, TILE)
    return from_bf16(scales).transpose(0, 3, 1, 2), blocks[:, :, 64:]


def values(scales, levels, C):
    """scales [T, 16, S, 2] times levels [T, 16, S, 64] -> values [T, 16, C] and the scale of each."""
    each = np.repeat(scales, 32, axis=3).reshape(*levels.shape[:2], -1)[:, :, :C]
    return each * levels.reshape(*levels.shape[:2], -1)[:, :, :C], each


def quantize_even(x, most, unit):
    """[T, 16, C] -> scales uint16 [T, S, 2, 16], codes uint8 [T, S, 2, 8, 64], squared error. A weight is
    scale * unit * q, q = -most..most, stored as q + most + 1 in the order of the tile: block, 4 columns, row. The scale
    is max|w| / (unit * most) rounded up to bf16, so that q stays in its range."""
    x = pad_columns(x, 64)
    T, S = len(x), x.shape[2] // 64
    fours = np.ascontiguousarray(x).view(np.complex128)     # 16 bytes, moved as one
    w = np.ascontiguousarray(fours.transpose(0, 2, 1)).view(np.float32).reshape(-1, 8, 4 * TILE)
    largest = np.abs(w)
    for half in (4, 2, 1):                                  # halved again and again, as numpy is slow at short maxima
        largest = np.maximum(largest[:, :half], largest[:, half:])
    for _ in range(2):
        largest = np.maximum(largest[:, 0, 0::2], largest[:, 0, 1::2])[:, None]
    largest = largest[:, 0]
    bits = to_bf16_up(largest / np.float32(unit * most))
    step = from_bf16(bits) * np.float32(unit)
    step[step == 0] = 1                                     # weights that are all zero, or too small for any scale
    step = np.repeat(step, 4, axis=1)[:, None]
    q = w / step
    np.rint(q, out=q)
    codes = (q + np.float32(most + 1)).astype(np.uint8).reshape(T, S, 2, 8, -1)
    q *= step
    q -= w
    return bits.reshape(T, S, 2, TILE), codes, squares(q.reshape(len(q), -1))


def encode_q8(x):
    scales, codes, error = quantize_even(x, most=127, unit=1)
    return join(scales, codes), error


def decode_q8(tiles, C):
    scales, codes = split(tiles, 1024)
    q = codes.reshape(*codes.shape[:2], 16, TILE, 4).transpose(0, 3, 1, 2, 4).astype(np.float32) - 128
    return values(scales, q.reshape(*q.shape[:3], 64), C)


def encode_q6(x):
    scales, codes, error = quantize_even(x, most=31, unit=4)
    T, S = scales.shape[:2]
    codes = np.moveaxis(codes.reshape(T, S, 2, 2, 4, -1), (3, 4), (0, 1))    # half, j, tile, superblock, block, lane
    two = np.stack([sum((half[j] & 3) << 2 * j for j in range(4)) for half in codes], 3)     # [T, S, 2, 2, 64]
    four = np.stack([codes[0, j] >> 2 | codes[1, j] >> 2 << 4 for j in range(4)], 3)         # [T, S, 2, 4, 64]
    return join(scales, np.concatenate([two, four], 3)), error


def decode_q6(tiles, C):
    scales, codes = split(tiles, 768)
    codes = codes.reshape(*codes.shape[:2], 2, 6, TILE, 4)
    two = np.stack([codes[:, :, :, j // 4] >> j % 4 * 2 & 3 for j in range(8)], 3)
    four = np.stack([codes[:, :, :, 2 + j % 4] >> j // 4 * 4 & 15 for j in range(8)], 3)
    q = (four * np.float32(16) + two * np.float32(4) - 128).transpose(0, 4, 1, 2, 3, 5)      # tile, row, superblock, ...
    return values(scales, q.reshape(*q.shape[:3], 64), C)


# Two codebooks of 16 levels, found by Lloyd's iteration on blocks of 32 normal values, each block with the better book
# and its best signed scale. The relative error on normal weights is 0.070; with one book 0.0726, with symmetric levels
# 0.0776, all at 4.5 bits.
Q4_LEVELS = np.array([[-127, -93, -71, -55, -41, -30, -19, -8, 1, 11, 22, 33, 45, 59, 76, 100],
                      [-127, -103, -82, -65, -50, -36, -23, -9, 3, 16, 28, 41, 54, 69, 87, 108]], np.float32)
# Where the search puts the largest weight of a block at first, in units of the levels, and in which book: chosen greedily
# from a fine grid; with eight the error is 0.4 % above that of the whole grid.
Q4_TARGETS = ((0, -127), (1, -127), (0, 102), (1, 111), (1, -136), (1, -109), (0, -136), (1, -121))
Q4_TINY = 1e-36                                             # blocks of smaller weights count as zero
# Nearest level by table: floor(2 * value) + 512 -> index, exact since the midpoints are halves of integers.
Q4_INDEX = np.stack([np.searchsorted(book[1:] + book[:-1], np.arange(-512, 512), side="right") for book in Q4_LEVELS])
Q4_INDEX = Q4_INDEX.astype(np.uint8)
Q4_NEAREST = np.take_along_axis(Q4_LEVELS, Q4_INDEX.astype(int), 1)


def dot(a, b):
    """[8, 4, N] each -> their products summed over a block, [N]: four sums of every fourth column, then those."""
    sums = np.einsum("kx,kx->x", a.reshape(8, -1), b.reshape(8, -1)).reshape(4, -1)
    return (sums[0] + sums[1]) + (sums[2] + sums[3])


class Q4Blocks:
    """N blocks of 32 weights on their way to q4. Column by column, [8, 4, N], so that every pass runs along the blocks.
    The columns come in the order 12..15, 8..11, 4..7, 0..3, then the same + 16, in which dot() adds them up: any order
    would do, but another one would round otherwise now and then, and change the files."""

    def __init__(self, x):
        """x: float32 [T, 16, C], C a multiple of 64. Blocks are numbered tile, block of the row, row."""
        T, _, C = x.shape
        fours = x.reshape(T, TILE, C // 32, 2, 4, 4)[:, :, :, :, ::-1].transpose(3, 4, 5, 0, 2, 1)
        self.w = np.ascontiguousarray(fours).reshape(8, 4, -1)
        # What the passes write again and again.
        self.product, self.levels = np.empty_like(self.w), np.empty_like(self.w)
        self.places = np.empty(self.w.shape, np.int16)

    def largest(self):
        """[N]: each block's weight of largest magnitude, with its sign; of several the first."""
        w = self.w.reshape(32, -1)
        high, low = w.max(0), w.min(0)
        largest = np.where(high >= -low, high, low)
        tied = np.flatnonzero(high == -low)
        if len(tied):
            columns = self.w.reshape(2, 4, 4, -1)[:, ::-1, :, tied].reshape(32, -1)
            largest[tied] = np.take_along_axis(columns, np.abs(columns).argmax(0)[None], 0)[0]
        largest[np.abs(largest) < Q4_TINY] = 0
        return largest

    def find_places(self, w, inverse):
        """Sets self.places of weights w under 1/scale, a number or [N], in the tables above."""
        np.multiply(w, 2 * inverse, out=self.product)
        self.product += np.float32(512)
        np.copyto(self.places, self.product, casting="unsafe")

    def fit(self, w, inverse, book):
        """With a book's levels nearest to w/scale, [N] each: the products <w, levels> and <levels, levels>."""
        self.find_places(w, inverse)
        Q4_NEAREST[book].take(self.places, mode="clip", out=self.levels)
        return dot(w, self.levels), dot(self.levels, self.levels)

    def scales(self):
        """Scale bits [N], whose lowest is the book, of least squared error among the scales tried. Given the levels l
        nearest to w/scale, the best scale is <w,l>/<l,l> and its error <w,w> - <w,l>^2/<l,l>: two such steps a target."""
        largest = self.largest()
        unit = self.w * reciprocal(largest)                 # the search sees weights of magnitude 0..1
        gains, scales = np.empty((2, len(Q4_TARGETS), len(largest)), np.float32)
        for i, (book, target) in enumerate(Q4_TARGETS):
            wl, ll = self.fit(unit, np.float32(target), book)
            wl, ll = self.fit(unit, ll * reciprocal(wl), book)
            gains[i], scales[i] = wl * wl / ll, wl / ll
        best = gains.argmax(0)
        books = np.array([book for book, _ in Q4_TARGETS], np.uint32)[best]
        return to_bf16_with_book(np.take_along_axis(scales, best[None], 0)[0] * largest, books)

    def indices(self, bits):
        """Level indices uint8 [8, 4, N] under the scales, and the squared error."""
        scale = from_bf16(bits)
        self.find_places(self.w, reciprocal(scale))
        np.clip(self.places, 0, 1023, out=self.places)
        self.places += (bits & 1).astype(np.int16) << 10    # the book
        places = self.places.astype(np.intp)
        difference = Q4_NEAREST.reshape(-1).take(places)
        difference *= scale
        difference -= self.w
        return Q4_INDEX.reshape(-1).take(places), squares(difference)


def to_bf16_with_book(x, book):
    """float32 and book [N] -> the nearest bf16 bit patterns whose lowest bit is the book (0 stays 0)."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    bits = (((u - (book << 16) + 0x10000) >> 17) << 1) + book
    return np.where(u << 1, bits, 0).astype(np.uint16)


def reciprocal(x):
    """1/x, and 0 where x is 0."""
    return np.divide(np.float32(1), x, out=np.zeros_like(x), where=x != 0)


def encode_q4(x):
    x = pad_columns(x, 64)
    T, S = len(x), x.shape[2] // 64
    blocks = Q4Blocks(x)
    bits = blocks.scales()
    index, error = blocks.indices(bits)
    codes = (index[:4] | index[4:] << 4)[::-1].reshape(4, 4, T, S, 2, TILE)  # j, i, tile, superblock, block, row
    return join(bits.reshape(T, S, 2, TILE), codes.transpose(2, 3, 4, 0, 5, 1)), error


def q4_book(scales):
    """float32 scales as stored in bf16 -> which codebook their blocks use."""
    return scales.view(np.uint32) >> 16 & 1


def decode_q4(tiles, C):
    scales, codes = split(tiles, 512)
    codes = codes.reshape(*codes.shape[:2], 2, 4, TILE, 4).transpose(0, 4, 1, 2, 3, 5)
    index = np.stack([codes & 15, codes >> 4], 4)           # tile, row, superblock, block, half, j, i
    index += (q4_book(scales) << 4).astype(np.uint8)[..., None, None, None]
    return values(scales, Q4_LEVELS.reshape(-1).take(index).reshape(*index.shape[:3], 64), C)


F32 = Type("f32", 1, lambda C: C * 64, encode_f32, decode_f32)
BF16 = Type("bf16", 2, lambda C: -(-C // 2) * 64, encode_bf16, decode_bf16)
Q8 = Type("q8", 3, lambda C: -(-C // 64) * 1088, encode_q8, decode_q8)
Q4 = Type("q4", 4, lambda C: -(-C // 64) * 576, encode_q4, decode_q4)
Q6 = Type("q6", 5, lambda C: -(-C // 64) * 832, encode_q6, decode_q6)   # only for the output head of a q4 file
FLOAT = Type("float", 0, None, None, None)
QUANTIZED = Q8, Q6, Q4
TYPES = {t.name: t for t in (F32, BF16, Q8, Q4)}


def typed(tensors, type_name, small):
    """The tensors with their stored types; small(tensor) tells BF16 or F32 for the small ones."""
    stored = TYPES[type_name]
    kinds = {"float": lambda t: FLOAT, "small": small, "matrix": lambda t: stored,
             "head": lambda t: stored if stored is not Q4 else Q6 if t.name == "lm_head" else Q8}
    return [t._replace(type=kinds[t.kind](t)) for t in tensors]


def small_type(source, tensor):
    """BF16 when it holds every value of the tensor exactly, else F32."""
    x = read_rows(source, tensor.data[0][0], 0, tensor.shape[0])
    return BF16 if np.array_equal(from_bf16(to_bf16(x)), x) else F32


def tiles_of(tensor):
    """Tiles of each matrix of the tensor, gate and up counted as one."""
    return -(-tensor.shape[-2] // TILE)


def stored_bytes(tensor):
    if tensor.type is FLOAT:
        return 4 * math.prod(tensor.shape)
    matrices = math.prod(tensor.shape[:-2])
    return matrices * tiles_of(tensor) * tensor.type.tile_bytes(tensor.shape[-1])


def read_rows(source, pieces, first, count):
    """Rows first .. first+count of the rows that the pieces list, float32 [count, C]."""
    parts, at = [], 0
    for piece in pieces:
        low, high = max(first, at), min(first + count, at + piece.count)
        if low < high:
            parts.append(source.rows(piece.name, piece.first + low - at, high - low))
        at += piece.count
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


# ---- 5. Metadata -------------------------------------------------------------------------------------------------
# A dict: int or list of int -> int64, float -> float64, str -> string, list of str -> list of strings.

META_KEYS = """hidden_size num_hidden_layers vocab_size num_attention_heads num_key_value_heads head_dim rotary_dim
    max_position_embeddings linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim
    linear_conv_kernel_dim num_experts num_experts_per_tok moe_intermediate_size shared_expert_intermediate_size
    intermediate_size""".split()


def config_meta(config, type_name, tensors):
    """Metadata of the model itself."""
    meta = dict(model_type=config.model_type, weights_type=type_name, head=config.head)
    if config.labels:
        meta["labels"] = config.labels
    if config.pad is not None and config.pad >= 0:
        meta["pad_token_id"] = config.pad
    meta.update({key: getattr(config, key) for key in META_KEYS})
    meta.update(norm_topk_prob=int(config.norm_topk_prob), layer_types=config.layers, mlp_types=config.sparse,
                has_mtp=int(any(t.name == "mtp.fc" for t in tensors)), rms_norm_eps=float(config.rms_norm_eps),
                **config.rope_meta)
    if any(t.type is Q4 for t in tensors):
        meta["q4_levels"] = [int(level) for level in Q4_LEVELS.reshape(-1)]
    return meta


MAX_STOPS = 16                                              # that the engine takes


def stop_ids(path, found, vocab_size):
    """The eos_token_id of a JSON object as configs spell it (absent, one id, several): a list of ids."""
    value = found.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    return checked_integers(path, "eos_token_id", ids, 0, vocab_size - 1)


def distinct(path, stops):
    """The ids that end an answer, each once."""
    ids = list(dict.fromkeys(stops))
    return ids if len(ids) <= MAX_STOPS else fail(path, "eos_token_id: stop tokens", f"at most {MAX_STOPS}", len(ids))


def sampling_meta(path, found):
    """Sampling defaults of generation_config.json's object; what it leaves out is transformers' default. The ranges are
    those that the engine takes."""
    def get(key, default, low, high, kind=float):
        value = found.get(key)
        return kind(checked(path, key, default if value is None else value, kind, low, high))

    sample, temperature = get("do_sample", False, None, None, bool), get("temperature", 1, 0, 100)
    return {"sampling.temperature": temperature if sample else 0.0,
            "sampling.top_p": get("top_p", 1, 0, 1), "sampling.top_k": get("top_k", 50, 0, (1 << 31) - 1, int),
            "sampling.min_p": get("min_p", 0, 0, 1),
            "sampling.repetition_penalty": get("repetition_penalty", 1, 1e-3, 100),
            "sampling.presence_penalty": get("presence_penalty", 0, -100, 100)}


def source_meta(config, tokenizer, path, generation, template, where):
    """Metadata from what is beside the weights. tokenizer: a TokenizerFile or None; generation: the object of
    generation_config.json at path, or None; template: a function for (chat template, its variables) of `where`."""
    meta, stops = {}, []
    if generation is not None:
        meta, stops = sampling_meta(path, generation), stop_ids(path, generation, config.vocab_size)
    stops += stop_ids(config.path, config.json, config.vocab_size)
    if tokenizer:
        stops += [tokenizer.added[text] for text in ("<|im_end|>", "<|endoftext|>") if text in tokenizer.added]
        meta.update(tokenizer_hash=signed64(tokenizer.hash), tokenizer_size=tokenizer.n_tokens)
    meta["stop_ids"] = distinct(config.path, stops)
    return {**meta, **chat_meta(where, template)}


# ---- 6. The file -------------------------------------------------------------------------------------------------

MAGIC, VERSION = b"QWEN3NXT", 1
HEADER = struct.Struct("<8sIIIIQQ24x")                      # magic, version, n_meta, n_tensors, 0, file size, hash
META_RECORD = struct.Struct("<40sIIQQ")                     # key, type, count, offset, size
TENSOR_RECORD = struct.Struct("<72sII4QQQ")                 # name, type, rank, shape, offset, size
CHUNK = 1 << 20                                             # weights that are read, converted and written at once

Chunk = namedtuple("Chunk", "tensor matrix first count")    # tiles first .. first+count of one matrix of a tensor


def packed_meta(value):
    """(type, count, bytes) of a metadata value."""
    if isinstance(value, str):
        raw = value.encode()
        return 2, len(raw), raw
    items = value if isinstance(value, list) else [value]
    if items and isinstance(items[0], str):
        raws = [item.encode() for item in items]
        return 3, len(items), b"".join(struct.pack("<I", len(raw)) + raw for raw in raws)
    if items and isinstance(items[0], float):
        return 1, len(items), struct.pack(f"<{len(items)}d", *items)
    return 0, len(items), struct.pack(f"<{len(items)}q", *items)


def field(text, size, what):
    raw = text.encode()
    return raw if len(raw) < size else fail(text, what, f"under {size} bytes", len(raw))


class Directory:
    """Where everything goes: self.head, the bytes after the header up to the payload; self.offsets, self.size."""

    def __init__(self, meta, tensors):
        self.meta, self.tensors, self.offsets = meta, tensors, {}
        at = HEADER.size + META_RECORD.size * len(meta) + TENSOR_RECORD.size * len(tensors)
        records, blob = [], bytearray()
        for key, value in meta.items():
            type, count, raw = packed_meta(value)
            records.append(META_RECORD.pack(field(key, 40, "metadata key"), type, count, at + len(blob), len(raw)))
            blob += raw.ljust(align(len(raw), 8), b"\0")
        at = self.payload = align(at + len(blob), 64)
        for t in tensors:
            size, rank = stored_bytes(t), len(t.shape)
            records.append(TENSOR_RECORD.pack(field(t.name, 72, "tensor name"), t.type.code, rank,
                                              *t.shape, *[1] * (4 - rank), at, size))
            self.offsets[t.name] = at
            at = align(at + size, 64)
        self.size = at
        self.head = (b"".join(records) + blob).ljust(self.payload - HEADER.size, b"\0")

    def header(self, fingerprint):
        return HEADER.pack(MAGIC, VERSION, len(self.meta), len(self.tensors), 0, self.size,
                           fnv1a(self.head) ^ fingerprint)


def chunks(tensors):
    """Every tensor in pieces that can be made on their own, in the order of the file."""
    for t in tensors:
        if t.type is FLOAT:
            yield Chunk(t, 0, 0, 0)
            continue
        for m, pieces in enumerate(t.data):
            step = max(1, CHUNK // (TILE * t.shape[-1] * len(pieces)))
            for first in range(0, tiles_of(t), step):
                yield Chunk(t, m, first, min(step, tiles_of(t) - first))


def in_order(work, jobs, threads):
    """(job, work(job)) for all jobs, in order, worked on by threads that run ahead of what was asked for."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = []
        for job in jobs:
            waiting.append((job, pool.submit(work, job)))
            if len(waiting) > 2 * threads:                  # enough to go on with while the oldest is written
                job, future = waiting.pop(0)
                yield job, future.result()
        for job, future in waiting:
            yield job, future.result()


def read_tiles(source, chunk):
    """The source rows of a chunk, zero padded to whole tiles: one float32 [T, 16, C] for each of its pieces."""
    t, first = chunk.tensor, chunk.first * TILE
    count = min(chunk.count * TILE, t.shape[-2] - first)
    for pieces in t.data[chunk.matrix]:
        x = read_rows(source, pieces, first, count)
        if count < chunk.count * TILE:
            x = np.concatenate([x, np.zeros((chunk.count * TILE - count, x.shape[1]), np.float32)])
        yield x.reshape(chunk.count, TILE, -1)


def float_values(source, tensor):
    """A float tensor's values, contiguous, checked against its shape."""
    x = np.ascontiguousarray(tensor.data(source), np.float32)
    assert x.shape == tensor.shape, (tensor.name, x.shape, tensor.shape)
    return x


def encode_chunk(source, chunk):
    """The stored bytes of a chunk, with the squares of its rounding errors and of its weights summed."""
    t = chunk.tensor
    if t.type is FLOAT:
        return float_values(source, t).view(np.uint8).reshape(-1), 0.0, 1.0
    C, parts, error, square = t.shape[-1], len(t.data[chunk.matrix]), 0.0, 0.0
    tiles = np.empty((chunk.count, parts, t.type.tile_bytes(C)), np.uint8)
    for part, x in enumerate(read_tiles(source, chunk)):
        for portion in portions(chunk.count, C):
            tiles[portion, part], e = t.type.encode(x[portion])
            error += e
        square += squares(x)
    return tiles.reshape(-1), error, square


class Blocks:
    """Writes to f in whole, aligned blocks: Linux then keeps the file in pages of 2 MB, which the engine reads up to a quarter
    faster than small ones. The last, short block goes out with finish()."""

    SIZE = 4 << 20   # bytes

    def __init__(self, f):
        self.f, self.pending, self.done = f, bytearray(), 0

    def tell(self):
        """Bytes written so far, pending ones included."""
        return self.done + len(self.pending)

    def write(self, data):
        self.pending += memoryview(data).cast("B")
        whole = len(self.pending) // self.SIZE * self.SIZE
        if whole:
            self.f.write(memoryview(self.pending)[:whole].toreadonly())
            self.pending, self.done = self.pending[whole:], self.done + whole

    def finish(self):
        self.f.write(self.pending)
        self.f.flush()


def write_model(path, meta, tensors, make, threads, check=None):
    """Write the file: make(chunk) gives (bytes, error, square). check(file) may refuse it before it gets its name."""
    directory, fingerprint, errors = Directory(meta, tensors), fnv1a(b""), {}
    free = shutil.disk_usage(path.parent).free
    if free < directory.size:
        fail(path, "disk space", f"{directory.size} bytes free", free)
    with written(path) as f, tqdm(total=directory.size, unit="B", unit_scale=True, desc=path.name) as bar:
        f.truncate(directory.size)                          # a limit on the size of files shows now, not after hours
        blocks = Blocks(f)
        blocks.write(bytes(HEADER.size) + directory.head)
        for chunk, (raw, error, square) in in_order(make, chunks(tensors), threads):
            offset = directory.offsets[chunk.tensor.name]
            if chunk.matrix == chunk.first == 0:
                blocks.write(bytes(offset - blocks.tell()))
                fingerprint = fnv1a(bytes(raw[:64]).ljust(64, b"\0"), fingerprint)
            blocks.write(raw)
            total = errors.setdefault(kind_of(chunk.tensor), [0.0, 0.0, 0])
            for i, value in enumerate((error, square, raw.size)):
                total[i] += value
            bar.update(blocks.tell() - bar.n)
        blocks.write(bytes(directory.size - blocks.tell()))
        blocks.finish()
        f.seek(0)
        f.write(directory.header(fingerprint))
        f.flush()
        if check:
            check(f)
    return errors


def kind_of(tensor):
    """A tensor's name and type without its layer's number, for tables."""
    return re.sub(r"layers\.\d+\.", "layers.*.", tensor.name), tensor.type.name


def print_errors(errors):
    """Relative root-mean-square rounding error of each kind of quantized tensor."""
    rows = [(*kind, size, math.sqrt(error / square) if square else 0.0)
            for kind, (error, square, size) in errors.items() if kind[1] in ("q8", "q4")]
    if rows:
        say(f"{'relative rms error':<44}{'type':<6}{'MB':>10}  error")
        for name, type, size, error in rows:
            say(f"  {name:<42}{type:<6}{size / 1e6:>10.1f}  {error:.5f}")


# ---- 7. --check and --random -------------------------------------------------------------------------------------


def read_directory(path, f):
    """{name: (type code, shape, offset, size)} of a written file, read back from its own records."""
    size = f.seek(0, os.SEEK_END)
    f.seek(0)
    magic, version, n_meta, n_tensors, _, file_size, _ = HEADER.unpack(f.read(HEADER.size))
    if (magic, version, file_size) != (MAGIC, VERSION, size):
        fail(path, "header", (MAGIC, VERSION, size), (magic, version, file_size))
    f.seek(META_RECORD.size * n_meta, os.SEEK_CUR)
    found = {}
    for _ in range(n_tensors):
        name, code, rank, *numbers = TENSOR_RECORD.unpack(f.read(TENSOR_RECORD.size))
        found[name.rstrip(b"\0").decode()] = code, tuple(numbers[:rank]), numbers[4], numbers[5]
    return found


def allowed_error(type, x, scales):
    """How far a stored value may lie from the weight x [T, 16, C]."""
    if type is BF16:                                        # half a unit in the last place, none where x is a bf16
        return np.where(x.view(np.uint32) & 0xFFFF, np.abs(x) * np.float32(2**-8) + np.float32(2**-134), 0)
    if type is Q8:
        return np.abs(scales) * np.float32(0.50001)
    if type is Q6:
        return np.abs(scales) * np.float32(2.00004)
    if type is Q4:                                          # half the widest gap; beyond the ends, up to 0.35 max|w|
        columns = lambda block: np.repeat(block, 32, axis=2)[:, :, :x.shape[2]]
        scale = scales[:, :, ::32]                          # of a block
        ends = Q4_LEVELS[q4_book(scale)][..., [0, -1]] * scale[..., None]
        beyond = np.maximum(np.maximum(x - columns(ends.max(-1)), columns(ends.min(-1)) - x), 0)
        largest = pad_columns(np.abs(x), 32).reshape(*x.shape[:2], -1, 32).max(3)
        far = np.where(beyond <= columns(0.35 * largest), beyond * np.float32(1.0001), 0)
        gap = columns(np.abs(scale) * np.float32(np.diff(Q4_LEVELS, axis=1).max() * 0.50001))
        return Q4_TINY + np.where(beyond > 0, far, gap)
    return np.zeros_like(x)


def check_chunk(source, fd, offset, chunk):
    """Compare the chunk in the file with the source: (largest error, whether one is too large)."""
    t = chunk.tensor
    if t.type is FLOAT:
        wanted = float_values(source, t)
        found = np.frombuffer(os.pread(fd, wanted.nbytes, offset), np.float32).reshape(wanted.shape)
        return float(np.abs(found - wanted).max()), not np.array_equal(found, wanted)
    parts, tile = len(t.data[chunk.matrix]), t.type.tile_bytes(t.shape[-1])
    start = offset + (chunk.matrix * tiles_of(t) + chunk.first) * parts * tile
    raw = np.frombuffer(os.pread(fd, chunk.count * parts * tile, start), np.uint8).reshape(chunk.count, parts, tile)
    worst, bad = 0.0, False
    for part, whole in enumerate(read_tiles(source, chunk)):
        for portion in portions(chunk.count, t.shape[-1]):
            x = whole[portion]
            found, scales = t.type.decode(np.ascontiguousarray(raw[portion, part]), t.shape[-1])
            error = np.abs(found - x)
            worst = max(worst, float(error.max()))
            bad |= not (error <= allowed_error(t.type, x, scales)).all()
    return worst, bad


def check_model(path, source, tensors, threads, f):
    """Re-read the written file f against the source; an error beyond the stored type's rounding fails."""
    found, worst = read_directory(path, f), 0.0
    for t in tensors:
        wanted = t.type.code, t.shape, stored_bytes(t)
        code, shape, _, size = found.get(t.name, (None,) * 4)
        if (code, shape, size) != wanted:
            fail(path, f"{t.name}: type, shape, size", wanted, (code, shape, size))
    work = lambda chunk: check_chunk(source, f.fileno(), found[chunk.tensor.name][2], chunk)
    with tqdm(total=sum(map(stored_bytes, tensors)), unit="B", unit_scale=True, desc="check") as bar:
        for chunk, (error, bad) in in_order(work, chunks(tensors), threads):
            if bad:
                fail(path, f"--check: {chunk.tensor.name} differs from the source", "rounding only", f"error {error}")
            worst = max(worst, error)
            if chunk.matrix == chunk.first == 0:
                bar.update(stored_bytes(chunk.tensor))
    say(f"--check: {len(tensors)} tensors agree with the source, largest error {worst:.3g}")


class RandomWeights:
    """Synthetic weights made in the stored type: make(chunk) as write_model wants it. The same seed gives the same
    bytes with any number of threads, since every chunk has a generator of its own."""

    def __init__(self, config, tensors, seed):
        self.c, self.seed = config, seed
        self.numbers = {t.name: i for i, t in enumerate(tensors)}
        self.normal = np.array([statistics.NormalDist().inv_cdf((i + 0.5) / 65536) for i in range(65536)], np.float32)

    def raw(self, chunk, count):
        """count random bytes that depend on the seed and the chunk only."""
        key = self.seed, self.numbers[chunk.tensor.name], chunk.matrix, chunk.first
        return np.random.SFC64(np.random.SeedSequence(key)).random_raw(-(-count // 8)).view(np.uint8)[:count]

    def normals(self, chunk, count, std=1.0):
        """count normal float32, of 65,536 different values: the quantiles of the distribution."""
        return self.normal.take(self.raw(chunk, 2 * count).view(np.uint16)) * np.float32(std)

    def make(self, chunk):
        t = chunk.tensor
        if t.type is FLOAT:
            x = self.floats(t.name, self.normals(chunk, math.prod(t.shape)), t.shape)
            return np.ascontiguousarray(x, np.float32).view(np.uint8).reshape(-1), 0.0, 1.0
        C, parts = t.shape[-1], len(t.data[chunk.matrix])
        count, std = chunk.count * parts, 0.8 / math.sqrt(C)  # of a unit vector's image: activations stay near 1
        whole = (chunk.first + chunk.count) * TILE <= t.shape[-2] and C % 64 == 0
        if whole and t.type in QUANTIZED:
            tiles = self.quantized(chunk, count, C, std)
        elif whole and t.type is BF16:
            bits = to_bf16(self.normal * np.float32(std))
            tiles = bits.take(self.raw(chunk, 2 * count * TILE * C).view(np.uint16)).view(np.uint8)
        else:                                               # padding: through the encoder, which knows it
            x = self.normals(chunk, count * TILE * C, std).reshape(chunk.count, parts, TILE, C)
            row = (chunk.first * TILE + np.arange(chunk.count * TILE)).reshape(chunk.count, 1, TILE, 1)
            tiles, _ = t.type.encode((x * (row < t.shape[-2])).reshape(count, TILE, C))
        return tiles.reshape(-1), 0.0, 1.0

    def quantized(self, chunk, count, C, std):
        """count tiles of random codes under scales that differ by up to an eighth, of either sign: q4's levels have a mean
        that is not 0, and all matrices would share it, so that all tokens would look alike to the router."""
        S, size = C // 64, chunk.tensor.type.tile_bytes(C) // (C // 64)
        tiles = self.raw(chunk, count * S * size).reshape(count * S, size)
        levels = {Q4: Q4_LEVELS, Q6: np.arange(-128, 128, 4), Q8: np.arange(-127, 128)}[chunk.tensor.type]
        scale = int(to_bf16([std / levels.std()])[0])
        scales = tiles[:, :64].view(np.uint16)
        np.add(scales & 0x800F, np.uint16(scale - 8), out=scales)  # 7 bits of fraction: steps of at most 1/128
        if chunk.tensor.type is Q8:
            np.maximum(tiles[:, 64:], 1, out=tiles[:, 64:])  # 0 would be -128
        return tiles

    def floats(self, name, x, shape):
        """Values of a float tensor from normal x: A_log as transformers draws it, norms near the identity."""
        x, last = x.reshape(shape), name.rsplit(".", 1)[-1]
        if last == "A_log":
            return np.log(0.01 + 15.99 * np.vectorize(statistics.NormalDist().cdf)(x))
        if last in ("conv1d", "shared_expert_gate"):
            return x * (0.8 / math.sqrt(shape[0]))
        return (name.endswith(("linear_attn.norm", "dt_bias")) + 0.1 * x)


# ---- 8. tokenizer.bin --------------------------------------------------------------------------------------------

SPLIT_PATTERNS = [                                          # number 0 is that of Qwen2 and 3, 1 that of Qwen3.5
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"]
CLASSES = [(r"\P{L}+", 1), (r"\P{N}+", 2), (r"\P{M}+", 3), (r"\S+", 4)]   # what is not of the class
TOKENIZER_HEADER = struct.Struct("<8s10IQQ")                # magic, version, eight counts and flags, hash, size
HANGUL = range(0xAC00, 0xAC00 + 11172)                      # syllables, composed and decomposed by arithmetic
CODE_POINTS = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]


@functools.cache
def byte_of_character():
    """The byte-level alphabet of GPT-2, character -> byte: printable Latin-1 stands for itself, the rest for 256.."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}


def ranges(pairs):
    """Sorted (code point, value) -> [[first, last, value]] with neighbours of one value joined."""
    out = []
    for c, value in pairs:
        if out and out[-1][1] == c - 1 and out[-1][2] == value:
            out[-1][1] = c
        else:
            out.append([c, c, value])
    return out


def class_table():
    """Code points of the pattern's classes as the tokenizers library's regex engine sees them."""
    from tokenizers import Regex, normalizers
    text, found = "".join(CODE_POINTS), []
    for others, number in CLASSES:
        found += [(ord(c), number) for c in normalizers.Replace(Regex(others), "").normalize_str(text)]
    return ranges(sorted(found))


def normalized(normalizer, texts):
    """The normalizer over many texts at once; a line feed takes part in no composition."""
    return normalizer.normalize_str("\n".join(texts)).split("\n")


def nfc_tables():
    """(ccc ranges, decompositions, compositions) of the library's own NFC, whatever Unicode version it has.

    It tells only results, so the one-step decomposition of c is rebuilt from its full one d: the last character of d,
    and the character that the others are the full decomposition of."""
    from tokenizers import normalizers
    nfd, nfc = normalizers.NFD(), normalizers.NFC()
    probed = [c for c in CODE_POINTS if ord(c) not in HANGUL and c != "\n"]
    full = {c: d for c, d in zip(probed, normalized(nfd, probed)) if c != d}
    composed = dict(zip(full, normalized(nfc, full)))
    whole = {}                                              # full decomposition -> the character it stands for
    for c, d in full.items():
        if d not in whole or composed[c] == c:
            whole[d] = c
    decomp, comp = [], []
    for c, d in full.items():
        first = d[0] if len(d) == 2 else whole[d[:-1]] if len(d) > 2 else d
        decomp.append([ord(c), ord(first), ord(d[-1]) if len(d) > 1 else 0])
        if len(d) > 1 and composed[c] == c:
            comp.append([ord(first), ord(d[-1]), ord(c)])
    return combining_classes(nfd), sorted(decomp), sorted(comp)


def combining_classes(nfd):
    """Ranges of canonical combining classes. NFD sorts neighbouring marks by class, so a mark is what changes places
    with a mark of class 240 before it or of class 1 behind it. Sorting is stable: all marks in rising, then in falling
    order of code point come out in the same classes, and a class ends where either order breaks. Python's own table
    names the classes; its Unicode version does not matter, as classes never change."""
    others = [c for c in CODE_POINTS if c != "\n"]
    behind = normalized(nfd, ["\u0345" + c for c in others])
    before = normalized(nfd, [c + "\u0334" for c in others])
    marks = [c for c, x, y in zip(others, behind, before) if x == c + "\u0345" or y == "\u0334" + c]
    up, down = nfd.normalize_str("".join(marks)), nfd.normalize_str("".join(marks[::-1]))
    found, group = [], []
    for i, c in enumerate(up):
        group.append(c)
        if i + 1 == len(up) or up[i] > up[i + 1] or down[i] < down[i + 1]:
            number = max(map(unicodedata.combining, group))
            found += [(ord(c), number) for c in group]
            group = []
    return ranges(sorted(found))


class NFC:
    """Normalization by the tables, as the C program does it: the check that they say what the library does."""

    def __init__(self, ccc, decomp, comp):
        self.ccc = {c: k for first, last, k in ccc for c in range(first, last + 1)}
        self.decomp = {c: (a, b) for c, a, b in decomp}
        self.comp = {(a, b): c for a, b, c in comp}

    def decompose(self, c):
        if c in HANGUL:
            i = c - 0xAC00
            return [0x1100 + i // 588, 0x1161 + i % 588 // 28] + [0x11A7 + i % 28] * (i % 28 > 0)
        if c not in self.decomp:
            return [c]
        a, b = self.decomp[c]
        return self.decompose(a) + ([b] if b else [])

    def compose(self, a, b):
        """The composition of two code points, or None."""
        if 0 <= a - 0x1100 < 19 and 0 <= b - 0x1161 < 21:
            return 0xAC00 + ((a - 0x1100) * 21 + b - 0x1161) * 28
        if a in HANGUL and (a - 0xAC00) % 28 == 0 and 0 < b - 0x11A7 < 28:
            return a + b - 0x11A7
        return self.comp.get((a, b))

    def __call__(self, text):
        points = [d for c in text for d in self.decompose(ord(c))]
        for i, c in enumerate(points):                      # stable sort of marks: insert each where it belongs
            k, j = self.ccc.get(c, 0), i
            while k and j and self.ccc.get(points[j - 1], 0) > k:
                points[j], j = points[j - 1], j - 1
            points[j] = c
        out, starter, last = [], None, 0                    # starter: its place in out; last: class of out's end
        for c in points:
            k = self.ccc.get(c, 0)
            free = starter is not None and (last < k or len(out) == starter + 1)   # no mark stands in between
            joined = self.compose(out[starter], c) if free else None
            if joined is not None:
                out[starter] = joined
                continue
            if k == 0:
                starter = len(out)
            out.append(c)
            last = k
        return "".join(map(chr, out))


def verify_nfc(tables, count=3000):
    """Refuse tables that differ from the library on a character or on random strings rich in marks."""
    from tokenizers import normalizers
    library, ours, rng = normalizers.NFC(), NFC(*tables), random.Random(1)
    marks = [chr(c) for first, last, _ in tables[0] for c in range(first, last + 1)]
    parts = [chr(c) for entry in tables[2] for c in entry] + [chr(c) for c, *_ in tables[1]]
    jamo = [chr(c) for c in (*range(0x10FF, 0x1200), *range(0xAC00, 0xAC40))]
    texts = ["".join(rng.choice(rng.choice((marks, marks, parts, parts, jamo, CODE_POINTS)))
                     for _ in range(rng.randrange(1, 9))) for _ in range(count)]
    for text in parts + marks + jamo + texts:
        if ours(text) != library.normalize_str(text):
            fail("NFC tables", f"differ from the tokenizers library for {text!a}",
                 ascii(library.normalize_str(text)), ascii(ours(text)))


def section(rows, width):
    """Rows of unsigned integers as little-endian u32, padded to 8 bytes."""
    raw = np.array(rows, "<u4").reshape(-1, width).tobytes()
    return raw.ljust(align(len(raw), 8), b"\0")


@functools.cache
def unicode_tables():
    """(class ranges, combining class ranges, decompositions, compositions) of the tokenizers library, tried on it."""
    tables = nfc_tables()
    verify_nfc(tables)
    return class_table(), *tables


def item(value, *path):
    """value[path[0]][path[1]].. of JSON; None where there is no such thing."""
    for key in path:
        there = isinstance(value, list) and isinstance(key, int) and key < len(value)
        value = value[key] if there else value.get(key) if isinstance(value, dict) else None
    return value


class TokenizerFile:
    """tokenizer.json -> the bytes of tokenizer.bin: self.data, self.hash, self.n_tokens, self.added {text: id}."""

    def __init__(self, path, found=None):
        """found: what the file holds, where it is not read from there (GGUF)."""
        self.path, self.json = path, read_json(path) if found is None else found
        self.model = checked(path, "model", self.json.get("model"), dict)
        self.vocab = checked(path, "model vocab", self.model.get("vocab"), dict)
        self.pattern, self.nfc = self._known_kind()
        added_tokens = checked(path, "added_tokens", self.json.get("added_tokens") or [], list)
        # Few gaps between ids: else a small file could make a large one.
        self.most = min(2 * (len(self.vocab) + len(added_tokens)), 1 << 24)
        added = [self._added_token(i, a) for i, a in enumerate(added_tokens)]
        self.added = {text: i for text, i, _ in added}
        tokens = self._tokens(added)
        self.n_tokens = max(tokens) + 1
        blob = [tokens.get(i, b"") for i in range(self.n_tokens)]
        merges = self._merges()
        classes, ccc, decomp, comp = unicode_tables()
        offsets = list(itertools.accumulate(map(len, blob), initial=0))
        body = b"".join([section(offsets, 1), section(merges, 3), section([(i, flag) for _, i, flag in added], 2),
                         section(classes, 3), section(ccc, 3), section(decomp, 3), section(comp, 3), *blob])
        self.hash = fnv1a(body)
        self.data = TOKENIZER_HEADER.pack(
            b"QWEN3TOK", 1, self.n_tokens, len(merges), len(added), len(classes), len(ccc), len(decomp), len(comp),
            self.pattern, int(self.nfc), self.hash, TOKENIZER_HEADER.size + len(body)) + body

    def _known_kind(self):
        """(number of the split pattern, whether NFC comes first); any other kind of tokenizer is refused."""
        j, model = self.json, self.model
        for key, wanted in dict(type="BPE", dropout=None, unk_token=None, byte_fallback=False,
                                ignore_merges=False).items():
            if (model.get(key) or None) != (wanted or None):
                fail(self.path, f"model {key}", wanted, model.get(key))
        for key in ("continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key):
                fail(self.path, f"model {key}", "none", model[key])
        normalizer = j.get("normalizer")
        if normalizer not in (None, {"type": "NFC"}):
            fail(self.path, "normalizer", "NFC or none", json.dumps(normalizer))
        steps = item(j, "pre_tokenizer", "pretokenizers")
        pattern = item(steps, 0, "pattern", "Regex")
        if pattern not in SPLIT_PATTERNS:
            fail(self.path, "pre_tokenizer", "the split pattern of Qwen2 to Qwen3.5", repr(pattern))
        level = dict(type="ByteLevel", add_prefix_space=False, use_regex=False)
        split = dict(type="Split", behavior="Isolated", invert=False)
        if len(steps) != 2 or any(item(steps, 0, k) != v for k, v in split.items()) or any(
                (item(steps, 1, k) or False) != v for k, v in level.items()):
            fail(self.path, "pre_tokenizer", "Split, isolated, then ByteLevel without regex", json.dumps(steps)[:200])
        after = j.get("post_processor")
        parts = [[item(part, "Sequence", "id") for part in item(after, key) or [] if isinstance(part, dict)]
                 for key in ("single", "pair") if isinstance(item(after, key), list)]
        adds_nothing = item(after, "type") == "TemplateProcessing" and parts == [["A"], ["A", "B"]]
        if after is not None and item(after, "type") != "ByteLevel" and not adds_nothing:
            fail(self.path, "post_processor", "ByteLevel, none or one that adds no token", json.dumps(after)[:200])
        return SPLIT_PATTERNS.index(pattern), normalizer is not None

    def _added_token(self, i, entry):
        """(text, id, 1 if special) of entry i of added_tokens; flags that change what it matches are refused."""
        where = f"{self.path}: added_tokens {i}"
        checked(where, "entry", entry, dict)
        text = checked(where, "content", entry.get("content"), str)
        special = checked(where, "special", entry.get("special"), bool)
        for flag in ("single_word", "lstrip", "rstrip", "normalized"):
            if entry.get(flag) not in (None, False):
                fail(where, f"{text!r}: {flag}", False, repr(entry[flag]))
        if not text or any("\ud800" <= c <= "\udfff" for c in text):
            fail(where, "content", "a text of Unicode", repr(text))
        return text, checked(where, f"{text!r}: id", entry.get("id"), int, 0, self.most - 1), int(special)

    def _tokens(self, added):
        """{id: bytes}: the vocabulary with the byte-level alphabet undone, and the added tokens as they are. A token has
        one id and an id one token, but an added token may stand in the vocabulary, too."""
        alphabet, tokens, texts = byte_of_character(), {}, {}
        for what, pairs in (("model vocab", self.vocab.items()), ("added_tokens", [(text, i) for text, i, _ in added])):
            ids = {}
            for text, i in pairs:
                checked(self.path, f"{what} {text!r}: id", i, int, 0, self.most - 1)
                if ids.setdefault(text, i) != i or texts.setdefault(i, text) != text or self.vocab.get(text, i) != i:
                    fail(self.path, f"{what} {text!r}: id", "one of its own", f"{i}, that of {texts.get(i, text)!r}")
        for text, i in self.vocab.items():
            if all(c in alphabet for c in text):
                tokens[i] = bytes([alphabet[c] for c in text])
            elif text not in self.added:
                fail(self.path, f"model vocab: token {i} ({text!r}) is not byte-level")
        singles = {raw for raw in tokens.values() if len(raw) == 1}
        if len(singles) < 256:
            fail(self.path, "model vocab: single-byte tokens", 256, len(singles))
        tokens.update({i: text.encode() for text, i, _ in added})
        return tokens

    def _merges(self):
        """[left, right, result] ids in rank order, from either spelling: "a b" or ["a", "b"]."""
        merges, ids = checked(self.path, "model merges", self.model.get("merges"), list), {}
        for rank, merge in enumerate(merges):
            pair = merge.split(" ") if isinstance(merge, str) else merge
            if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
                fail(self.path, f"model merges: number {rank}", "two tokens", one_line(repr(merge), 200))
            a, b = pair
            found = [self.vocab.get(text) for text in (a, b, a + b)]
            if None in found:
                fail(self.path, f"model merges: number {rank} names a token that is not in the vocabulary",
                     found=repr(merge))
            if ids.setdefault((a, b), found) is not found:
                fail(self.path, f"model merges: number {rank} stands twice", found=repr(merge))
        return list(ids.values())

    def write(self, path):
        with written(path) as f:
            f.write(self.data)


def stored_tokenizer_hash(path):
    """The hash in a tokenizer.bin, None when there is no such file."""
    try:
        with open_file(path) as f:
            head = f.read(TOKENIZER_HEADER.size)
        return TOKENIZER_HEADER.unpack(head)[-2] if len(head) == TOKENIZER_HEADER.size else None
    except (ExportError, OSError):
        return None


def place_tokenizer(tokenizer, model_path):
    """Write tokenizer.bin where qwen3next looks for it first, beside the model, unless it will find one like it."""
    beside, program = model_path.with_name("tokenizer.bin"), Path(__file__).resolve().with_name("tokenizer.bin")
    for place in (beside, program):
        if stored_tokenizer_hash(place) == tokenizer.hash:
            return say(f"{place} is this model's tokenizer already")
        if place.exists():
            break
    if beside.exists():                                     # another model's: keep it
        beside = model_path.with_suffix(".tokenizer.bin")
        say(f"tokenizer.bin beside the model is another model's: run with -z {beside}")
    tokenizer.write(beside)
    say(f"wrote {beside}")


# ---- 9. Chat pieces ----------------------------------------------------------------------------------------------
# The C program does not run Jinja. It joins fixed pieces around the messages; here the pieces are read off the
# checkpoint's own template by rendering conversations of marked messages, and then tried on many others.

MAX_RENDERED = 1 << 20                                      # characters that a template may write
LEFT, RIGHT, LEFT_LINES, RIGHT_LINES = 1, 2, 4, 8           # bits: strip white space or line feeds, left or right


def find_template(directory):
    """(template, its variables) of a checkpoint, or (None, {}): chat_template.jinja, else tokenizer_config.json."""
    path = inside(directory, "tokenizer_config.json")
    config = read_json(path) if path else {}
    text = lambda value: value.get("content") if isinstance(value, dict) else value
    names = "bos_token", "eos_token", "pad_token", "unk_token"
    variables = {key: text(config[key]) for key in names if config.get(key)}
    file = inside(directory, "chat_template.jinja")
    if file:
        return read_file(file).decode("utf-8"), variables
    template = config.get("chat_template")
    if isinstance(template, list):                          # several named ones
        template = {t["name"]: t["template"] for t in template}.get("default")
    return template, variables


def template_renderer(template, variables):
    """render(messages, generation prompt or not) -> text, in an environment like transformers' apply_chat_template."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} .. {% endgeneration %}, which marks text for training, changes nothing here."""
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    compiled = environment.from_string(template)

    def render(messages, prompt):
        messages = [dict(role=role, content=content) for role, content in messages]
        text = compiled.render(messages=messages, tools=None, documents=None, add_generation_prompt=prompt,
                               **variables)
        if len(text) > MAX_RENDERED:
            raise NoPieces(f"it writes {len(text)} characters around a few messages")
        return text

    return render


class NoPieces(Exception):
    """The template is not made of pieces; the text says where that shows."""


def cut(text, head="", tail=""):
    """text without its known beginning and end."""
    if not (text.startswith(head) and text.endswith(tail) and len(text) >= len(head) + len(tail)):
        raise NoPieces(f"{text!r} is not {head!r} ... {tail!r}")
    return text[len(head):len(text) - len(tail)]


def find_pieces(render):
    """The chat.* strings. The letters S, U, A below stand for marked messages of the three roles."""
    S, U, V, A = "QsysX", "QuserX", "QnextX", "QansX"

    def parts(*messages, prompt=False):
        """What the template writes before, between and behind the messages' contents."""
        pattern = "(.*)".join(["", *(re.escape(content) for _, content in messages), ""])
        found = re.fullmatch(pattern, render(messages, prompt), re.DOTALL)
        if not found:
            raise NoPieces(f"a message is changed or missing in {render(messages, prompt)!r}")
        return found.groups()

    user = ("user", U)
    head, user_suffix = parts(user)
    generation = cut(render([user], True), head + U + user_suffix)
    _, _, assistant_suffix = parts(user, ("assistant", A))
    _, between, back, tail = parts(user, ("assistant", A), ("user", V))
    if tail != user_suffix:
        raise NoPieces(f"{user_suffix!r} ends a first question and {tail!r} a second")
    assistant_prefix, user_prefix = cut(between, head=user_suffix), cut(back, head=assistant_suffix)
    start = cut(head, tail=user_prefix)
    system_start, system_back, _ = parts(("system", S), user)
    system_suffix = cut(system_back, tail=user_prefix)
    if system_start.startswith(start):                      # what comes before everything
        prefix, default_system, system_prefix = start, "", system_start[len(start):]
    else:                                                   # a system message of the template's own
        prefix, default_system, system_prefix = "", start, system_start
    return dict(prefix=prefix, default_system=default_system, system_prefix=system_prefix, system_suffix=system_suffix,
                user_prefix=user_prefix, user_suffix=user_suffix, assistant_prefix=assistant_prefix,
                assistant_suffix=assistant_suffix, generation_prompt=generation)


def strip(text, bits):
    """Bits 1, 2 white space left, right; bits 4, 8 line feeds left, right."""
    text = text.lstrip() if bits & LEFT else text.lstrip("\n") if bits & LEFT_LINES else text
    return text.rstrip() if bits & RIGHT else text.rstrip("\n") if bits & RIGHT_LINES else text


def join_pieces(chat, messages):
    """What the C program makes of a conversation that ends with a question: the definition of the pieces."""
    out = [chat["prefix"]]
    if messages[0][0] != "system":
        out.append(chat["default_system"])
    for role, content in messages:
        content = strip(content, chat[role + "_trim"])
        if role == "assistant" and chat["thinking"] and chat["think_end"] in content:
            content = strip(content.rpartition(chat["think_end"])[2], chat["think_trim"])
        out += [chat[role + "_prefix"], content, chat[role + "_suffix"]]
    return "".join(out + [chat["generation_prompt"]])


def find_trim(render_content):
    """Which trim bits turn a content into what render_content(content) shows of it."""
    for bits in (0, LEFT_LINES, RIGHT_LINES, LEFT_LINES | RIGHT_LINES, LEFT, RIGHT, LEFT | RIGHT,
                 LEFT | RIGHT_LINES, LEFT_LINES | RIGHT):
        if all(render_content(probe) == strip(probe, bits) for probe in (" \n\tQx\t\n ", "\n\n Qx \n\n", "\nQx\n")):
            return bits
    raise NoPieces("white space around a message is changed in an unknown way")


def find_trims(render, chat):
    """The integers of chat.*: trims for each role, and whether earlier thinking is dropped."""
    def shown(role, content, before=""):
        """How the content of one message comes out in a conversation of plain ones."""
        messages = {"system": [("system", content), ("user", "u")], "user": [("user", content)],
                    "assistant": [("user", "u"), ("assistant", before + content), ("user", "v")]}[role]
        mark = "QmarkX"
        plain = join_pieces({**chat, "thinking": 0, "system_trim": 0, "user_trim": 0, "assistant_trim": 0},
                            [(r, mark if c == before + content else c) for r, c in messages])
        return cut(render(messages, True), *plain.split(mark))

    trims = {role + "_trim": find_trim(functools.partial(shown, role)) for role in ("system", "user", "assistant")}
    think_end = "</think>"
    before = "<think>\nthought\n" + think_end
    thinking = int(shown("assistant", "Qx", before) == "Qx")
    trim = find_trim(lambda content: shown("assistant", content, before)) if thinking else 0
    return dict(trims, thinking=thinking, think_trim=trim, think_end=think_end)


def probe_conversations(count=400):
    """Conversations of one to four questions to try the pieces on."""
    rng = random.Random(2)
    words = ["Hello", "two words", "  indented", "\n\nlines\n", "trailing  ", "\t", "", " ", "line\nline",
             "é ü 漢字 🙂", "<|im_end|>", "{{ x }} {% y %}", "</think>", "<b>&amp;\"'</b>", "\u00a0nbsp\u00a0",
             "\r\nCR\r\n"]
    thoughts = ["<think>\nwhy\n</think>\n\n", "<think>\n\n</think>\n\n", "why not\n</think>\n", "</think>", ""]
    content = lambda: "".join(rng.choices(words, k=rng.randrange(1, 4)))
    for i in range(count):
        messages = [("system", content())] if i % 3 == 0 else []
        for _ in range(rng.randrange(4)):
            messages += [("user", content()), ("assistant", rng.choice(thoughts) + content())]
        yield messages + [("user", content())]


def chat_pieces(template, variables):
    """The chat.* strings and integers of a template, tried on many conversations; an exception if it has no such."""
    render = template_renderer(template, variables)
    chat = find_pieces(render)
    chat.update(find_trims(render, chat))
    for messages in probe_conversations():
        wanted, found = render(messages, True), join_pieces(chat, messages)
        if wanted != found:
            raise NoPieces(f"for {messages!r} the template gives {wanted!r}, the pieces {found!r}")
    texts = [value.encode() for value in chat.values() if isinstance(value, str)]
    if b"\0" in b"".join(texts) or not chat["generation_prompt"]:
        raise NoPieces("a piece holds a zero, or nothing is written before an answer")
    return chat


# A template is a program, and may be a stranger's. jinja2's sandbox keeps it from files and from Python; it does not keep
# it from running for ever or from filling the memory. So it runs in a process of its own, which can be ended.
TEMPLATE_PROCESS = "--template-process"                     # the only argument of that process
TEMPLATE_SECONDS, TEMPLATE_MEMORY = 4, 1 << 30              # a usual one takes 0.1 s
TEMPLATE_TIMEOUT = 60                                       # seconds by the clock: other programs may need the processor


def limit_process():
    """No more than TEMPLATE_SECONDS of a processor for this process, nor TEMPLATE_MEMORY bytes, beyond what it has had (on
    Linux; elsewhere seconds only, and on Windows neither)."""
    try:
        import resource
    except ImportError:
        return

    def limit(kind, most):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))

    limit(resource.RLIMIT_CORE, 0)
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime) + TEMPLATE_SECONDS)
    statm = Path("/proc/self/statm")
    if statm.exists():
        limit(resource.RLIMIT_AS, int(statm.read_text().split()[0]) * resource.getpagesize() + TEMPLATE_MEMORY)


def answer_for_template():
    """The process of a template: reads [template, variables], writes {"chat": pieces} or {"error": why}, all JSON."""
    question = json.loads(sys.stdin.buffer.read())
    limit_process()
    try:
        reply = dict(chat=chat_pieces(*question))
    except Exception as e:                                  # a template is a program: anything may be wrong with it
        reply = dict(error=one_line(" ".join(f"{type(e).__name__}: {e}".split())))
    sys.stdout.write(json.dumps(reply))


def ask_template(template, variables):
    """chat_pieces(template, variables), made in another process within bounds."""
    command = [sys.executable, Path(__file__).resolve(), TEMPLATE_PROCESS]
    try:
        result = subprocess.run(command, input=json.dumps([template, variables]).encode(), stdout=subprocess.PIPE,
                                stderr=subprocess.DEVNULL, timeout=TEMPLATE_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise NoPieces("it takes too long") from None
    if result.returncode:
        raise NoPieces(f"it takes more than {TEMPLATE_SECONDS} s or too much memory (status {result.returncode})")
    reply = json.loads(result.stdout)
    if "error" in reply:
        raise NoPieces(reply["error"])
    return reply["chat"]


def chat_meta(where, template):
    """chat.* metadata of a checkpoint, whose template() gives (template, variables); none, after a warning, when it is
    not made of such pieces."""
    try:
        template, variables = template()
        chat = ask_template(template, variables) if template else {}
        return {"chat." + key: value for key, value in chat.items()}
    except Exception as e:                                  # or its file is not what it should be
        say(f"{where}: warning: no chat in the exported model, its template cannot be taken to pieces: {e}")
        return {}


# ---- 10. Command line --------------------------------------------------------------------------------------------


def same_tensor(source, a, b):
    """Whether two source tensors, both [R, C], hold the same values."""
    for name in (a, b):
        source.check_type(name)
    R, C = source.shape(a)
    step = max(1, CHUNK // C)
    return all(
        np.array_equal(*(source.rows(name, first, min(step, R - first)) for name in (a, b)))
        for first in range(0, R, step))


def is_tied(config, source):
    """No head of its own: config.json calls it tied, and the checkpoint lacks it or has it equal to the embedding."""
    names = text_prefix(source.names()) + "embed_tokens.weight", "lm_head.weight"
    if not config.tie_word_embeddings or "lm_head.weight" not in source.names():
        return config.tie_word_embeddings
    shape = config.vocab_size, config.hidden_size
    return (all(name in source.names() and source.shape(name) == shape for name in names)
            and same_tensor(source, *names))


def open_model(path):
    """SOURCE -> (source of tensors, Config, function for its TokenizerFile or None, one for source_meta's others)."""
    if find_gguf(path):
        source = open_source(path)
        beside = lambda: (source.path, source.generation(), source.template, source.path)
        return source, source.config, source.tokenizer, beside
    if not path.is_dir():
        fail(path, "SOURCE", "a GGUF file, or a directory with config.json and *.safetensors",
             "another file" if os.path.exists(path) else "nothing")

    def tokenizer():
        file = inside(path, "tokenizer.json")
        return TokenizerFile(file) if file else None

    def beside():
        file = inside(path, "generation_config.json")
        return file, read_json(file) if file else None, functools.partial(find_template, path), path

    config = Config(inside(path, "config.json") or path / "config.json")
    return open_source(path), config, tokenizer, beside


def export_model(args):
    """SOURCE -> model.bin, and tokenizer.bin beside it."""
    path = Path(args.source)
    source, config, tokenizer, beside = open_model(path)
    if args.mtp:
        extra = open_source(args.mtp)
        if not any(name.startswith("mtp.") for name in extra.names()):
            fail(args.mtp, "mtp tensors", "mtp.*", "none")
        source = Merged(source, extra)
    names = source.names()
    packed = {name for name in names if name.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    mtp = config.head == "causal_lm" and any(name.startswith("mtp.") for name in names)
    plan = Plan(config, mtp, is_tied(config, source), packed, source, path)
    plan.refuse_others()
    tokenizer = tokenizer()
    if tokenizer and tokenizer.n_tokens > config.vocab_size:
        fail(tokenizer.path, "tokens", f"at most vocab_size {config.vocab_size}", tokenizer.n_tokens)
    tensors = typed(plan.tensors, args.type, functools.partial(small_type, source))
    meta = {**config_meta(config, args.type, tensors), **source_meta(config, tokenizer, *beside())}
    make = functools.partial(encode_chunk, source)
    check = functools.partial(check_model, args.out, source, tensors, args.threads) if args.check else None
    print_errors(write_model(args.out, meta, tensors, make, args.threads, check))
    if tokenizer:
        place_tokenizer(tokenizer, args.out)


def export_random(args):
    """config.json -> a model of synthetic weights; config.json may ask for MTP by "mtp": true."""
    config = Config(args.random)
    mtp = bool(config.json.get("mtp") or config.json.get("num_nextn_predict_layers"))
    plan = Plan(config, mtp, config.tie_word_embeddings)
    tensors = typed(plan.tensors, args.type, lambda t: BF16)
    stops = distinct(args.random, stop_ids(args.random, config.json, config.vocab_size))
    meta = {**config_meta(config, args.type, tensors), "stop_ids": stops}
    write_model(args.out, meta, tensors, RandomWeights(config, tensors, args.seed).make, args.threads)


def arguments(argv):
    parser = argparse.ArgumentParser(
        prog="export.py", description="Make the flat checkpoint and the tokenizer that qwen3next runs.")
    parser.add_argument("source", nargs="?", metavar="SOURCE", help="directory of a checkpoint, or GGUF file")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json to export instead")
    parser.add_argument("--random", metavar="FILE", help="config.json to draw synthetic weights for instead")
    parser.add_argument("-o", dest="out", metavar="FILE", required=True, type=Path, help="file to write")
    parser.add_argument("--type", choices=TYPES, default="bf16", help="how matrices are stored (default: bf16)")
    parser.add_argument("--mtp", metavar="FILE_OR_DIR", help="where the mtp.* tensors are, if not in SOURCE")
    parser.add_argument("--check", action="store_true", help="compare what was written with SOURCE")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="for --random (default: 0)")
    args = parser.parse_args(argv)
    if sum(map(bool, (args.source, args.tokenizer, args.random))) != 1:
        parser.error("give one of SOURCE, --tokenizer and --random")
    if (args.mtp or args.check) and not args.source:
        parser.error("--mtp and --check belong to SOURCE")
    if args.seed < 0:
        parser.error("--seed: wanted 0 or more")
    if not args.out.name:
        parser.error("-o: wanted the name of a file")
    if not os.path.isdir(args.out.parent):
        parser.error(one_line(f"-o: no directory {args.out.parent}"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    args.threads = min(cores, 16)                           # each holds some 50 MB; a disk needs no more of them
    return args


def refuse_output_among_inputs(args):
    """The output must not be a file that is being read: SOURCE, a file in it, --mtp, --tokenizer or --random's config."""
    out = Path(args.out)
    for given in (args.source, args.mtp, args.tokenizer, args.random):
        if given is None or not os.path.exists(out):
            continue
        path = Path(given)
        parts = path.parent.glob("*.gguf") if path.suffix == ".gguf" else ()
        read = [path, *(path.iterdir() if path.is_dir() else parts)]
        if any(os.path.exists(p) and p.samefile(out) for p in read if p.suffix != ".bin"):
            fail(out, "the output is one of the files being read", "a new name", out)


def main(argv=None):
    args = arguments(argv)
    keep_freed_memory()
    signal.signal(signal.SIGTERM, signal.default_int_handler)   # both leave no half file
    try:
        refuse_output_among_inputs(args)
        if args.tokenizer:
            TokenizerFile(args.tokenizer).write(args.out)
        else:
            (export_random if args.random else export_model)(args)
    except ExportError as e:
        print(one_line(f"export.py: {e}"), file=sys.stderr)
        return 1
    except OSError as e:                                    # of a path that was only looked at
        print(one_line(f"export.py: {e.filename or args.out}: {e.strerror or e}"), file=sys.stderr)
        return 1
    except MemoryError:
        source = args.source or args.random or args.tokenizer
        print(one_line(f"export.py: {source}: not enough memory"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"export.py: {args.out}: interrupted, not written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(answer_for_template() if sys.argv[1:] == [TEMPLATE_PROCESS] else main())
