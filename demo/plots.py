#!/usr/bin/env python3
"""Speed against context depth and against memory: measured by `qwen3next -m bench`, kept in a table, drawn.

    python demo/plots.py measure model.bin --label "8 cores of a server"     # adds rows to demo/measured.tsv
    python demo/plots.py draw                                                # writes demo/depth.svg, demo/memory.svg

The table is text, one row a run, fields separated by tabs; COLUMNS names them. A number is as the engine printed it, an
empty field is a number that it did not print: a checkpoint that is mapped whole reads no experts from disk.
"""
import argparse
import io
import itertools
import math
import re
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from export import ExportError, fail, written

ENGINE = ROOT / "qwen3next"
TABLE = ROOT / "demo" / "measured.tsv"

# A row with the same KEY as an earlier one takes its place.
KEY = ("label", "model", "threads", "axis", "x")
# What the engine calls so, and its unit. prefill and decode are its prefill_N and decode_N, N being prompt and tokens.
METRICS = {
    "prefill": "tok/s", "decode": "tok/s",
    "prefill_found": "%", "decode_found": "%",                        # of the experts used, found in memory
    "prefill_from_disk": "GB/token", "decode_from_disk": "GB/token",
    "prefill_reading": "GB/s", "decode_reading": "GB/s", "decode_disk_speed": "GB/s",
    "decode_bytes": "GB/token", "read_bandwidth": "GB/s", "decode_of_bandwidth": "%",
    "peak_memory": "MB",
}
# file_bytes: size of the model; x: axis depth: positions filled before, axis memory: limit in percent of file_bytes;
# limit: bytes given as --memory, empty on axis depth, where the engine takes what is free; prompt, tokens: how many.
COLUMNS = ("label", "model", "file_bytes", "threads", "axis", "x", "limit", "prompt", "tokens", *METRICS)
NUMBERS = COLUMNS[2:4] + COLUMNS[5:]
NEEDED = ("file_bytes", "threads", "x", "prefill", "decode")          # numbers that no row may lack


def say(text):
    """Progress goes to standard error."""
    print(f"plots.py: {text}", file=sys.stderr, flush=True)


# ---- The table ---------------------------------------------------------------------------------------------------


def check_row(where, row):
    """Raise an error that begins with `where` unless the row, a dict of str by column, is one that can be drawn."""
    if not "".join(row.values()).isprintable():
        fail(where, "a label or a file's name", "printable characters only")
    if row["axis"] not in ("depth", "memory"):
        fail(where, "axis", "depth or memory", repr(row["axis"]))
    for column in NUMBERS:
        text = row[column]
        if (text or column in NEEDED) and not re.fullmatch(r"\d+(\.\d+)?", text, re.ASCII):
            fail(where, column, "a number", repr(text))


def read_table(path):
    """The rows of a table, each a dict of str by column; anything else in the file is an error that names the line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except OSError as e:
        fail(path, f"cannot be read: {e.strerror}")
    except ValueError:
        fail(path, "is no table: not UTF-8")
    if lines[0] != "\t".join(COLUMNS):
        fail(f"{path}: line 1", "names of columns", " ".join(COLUMNS), " ".join(lines[0].split("\t"))[:200])
    rows = []
    for number, line in enumerate(lines[1:], 2):
        fields = line.split("\t")
        if len(fields) != len(COLUMNS):
            fail(f"{path}: line {number}", "fields", len(COLUMNS), len(fields))
        rows.append(dict(zip(COLUMNS, fields)))
        check_row(f"{path}: line {number}", rows[-1])
    return rows


def write_table(path, rows):
    """Write a table; the one of before is replaced when all of it is there."""
    with written(path) as f:
        for fields in (COLUMNS, *(row.values() for row in rows)):
            f.write(("\t".join(fields) + "\n").encode())


def put(rows, row):
    """Put a row where the one with its key is, else at the end."""
    keys = [[r[column] for column in KEY] for r in rows]
    key = [row[column] for column in KEY]
    at = keys.index(key) if key in keys else len(rows)
    rows[at:at + 1] = [row]


# ---- measure -----------------------------------------------------------------------------------------------------


def engine(*options):
    """Run the engine to its end: a completed process with str stdout and stderr, whatever its status."""
    try:
        return subprocess.run([str(word) for word in (ENGINE, *options)], stdin=subprocess.DEVNULL, capture_output=True,
                              encoding="utf-8", errors="replace")
    except OSError as e:
        fail(ENGINE, f"cannot be run: {e.strerror} (make builds it)")


def bench(args, options):
    """Run -m bench: ({column: number as str} for METRICS and threads, the process)."""
    command = [args.model, "-m", "bench", "-v", "--prompt", args.prompt, "-n", args.tokens, *options]
    process = engine(*command, *([] if args.threads is None else ["-j", args.threads]))
    named = {f"prefill_{args.prompt}": "prefill", f"decode_{args.tokens}": "decode"}
    found = dict.fromkeys(METRICS, "")
    for name, value, unit in re.findall(r"^(\S+) (\S+) (\S+)$", process.stdout, re.MULTILINE):
        column = named.get(name, name)
        if METRICS.get(column) == unit:
            found[column] = value
    threads = re.search(r"^kernels .*, threads (\d+),", process.stderr, re.MULTILINE)     # -v: how many there are
    return dict(found, threads=threads[1] if threads else ""), process


def least_memory(args):
    """Bytes, the smallest --memory that the engine takes for this model: it names them when it is given one byte."""
    _, process = bench(args, ["--memory", 1])
    least = re.search(r"--memory: wanted at least (\d+) bytes", process.stderr)
    return int(least[1]) if least else failed(process)


def failed(process):
    """Raise an error that says why a run failed: the engine's last words, if it had any."""
    last = process.stderr.strip().split("\n")[-1]
    fail("-m bench", last if process.returncode == 1 and last else f"ended with status {process.returncode}")


def measured(args, size, axis, x, limit, options):
    """Measure once; returns the row."""
    found, process = bench(args, options)
    if process.returncode:
        failed(process)
    found.update(label=args.label, model=args.model.name, file_bytes=str(size), axis=axis, x=x, limit=limit,
                 prompt=str(args.prompt), tokens=str(args.tokens))
    row = {column: found[column] for column in COLUMNS}
    check_row("-m bench printed", row)
    return row


def measure(args):
    """Run the engine for every depth and share; every row is written when it is there, so what is measured is kept."""
    try:
        size = args.model.stat().st_size
    except OSError as e:
        fail(args.model, f"cannot be read: {e.strerror}")
    rows = read_table(args.table) if args.table.exists() else []
    runs = []
    trained = re.search(r"^max_position_embeddings (\d+)$", engine(args.model, "-m", "inspect").stdout, re.MULTILINE)
    for depth in args.depths:
        # A context no longer than needed: what it takes is missing for experts, where they come from disk.
        context = depth + max(args.prompt, args.tokens)
        if trained and context > int(trained[1]):
            say(f"{args.model.name}: depth {depth} is left out, the model was made for {trained[1]} positions")
            continue
        runs.append(("depth", str(depth), "", ["--depth", depth, "-c", context]))
    least = least_memory(args) if args.memory else 0
    for limit in dict.fromkeys(max(least, round(size * share / 100)) for share in args.memory):
        if limit == least:
            say(f"{args.model.name}: the least it runs in is {least} bytes, {100 * least / size:.4g} % of the file")
        context = max(args.prompt, args.tokens)
        runs.append(("memory", f"{100 * limit / size:.4g}", str(limit), ["--memory", limit, "-c", context]))
    for number, (axis, x, limit, options) in enumerate(runs, 1):
        say(f"{args.model.name}: run {number} of {len(runs)}, {axis} {x}{' %' if limit else ''}")
        row = measured(args, size, axis, x, limit, options)
        put(rows, row)
        write_table(args.table, rows)
        say(f"    prefill {row['prefill']}, decode {row['decode']} tok/s, {row['threads']} threads")


# ---- draw --------------------------------------------------------------------------------------------------------

STYLE = {
    "svg.hashsalt": "qwen3next", "svg.fonttype": "none",              # the same bytes every time; text as text
    "text.parse_math": False,                                         # a $ in a label is a $
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],     # widths of the first
    "font.size": 10, "axes.titlesize": 10, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#666666",
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": "#e4e4e4", "axes.axisbelow": True,
    "lines.linewidth": 1.6, "lines.markersize": 5, "legend.frameon": False,
}
LOOKS = [("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "D"), ("#56b4e9", "v"), ("#e69f00", "P"),
         ("#000000", "X")]                                            # told apart by colour-blind readers, too


Line = namedtuple("Line", "title colour marker rows")                 # rows of one axis, by rising x


def lines_of(rows, axis):
    """The lines of an axis, one for each label, model and number of threads; in every figure they look the same."""
    keys = list(dict.fromkeys((row["label"], row["model"], row["threads"]) for row in rows))
    labels = [label for label, _, _ in keys]
    lines = []
    for key, (colour, marker) in zip(keys, itertools.cycle(LOOKS)):
        label, model, threads = key
        title = label if labels.count(label) == 1 else f"{label}, {model}, threads: {threads}"
        own = [row for row in rows if row["axis"] == axis and (row["label"], row["model"], row["threads"]) == key]
        lines.append(Line(title, colour, marker, sorted(own, key=lambda row: float(row["x"]))))
    return [line for line in lines if line.rows]


def draw_lines(axes, lines, column):
    """Draw the numbers of a column over x; the axis begins at 0, so that heights compare."""
    for line in lines:
        rows = [row for row in line.rows if row[column]]
        axes.plot([float(row["x"]) for row in rows], [float(row[column]) for row in rows], color=line.colour,
                  marker=line.marker, clip_on=False)
    axes.set_ylim(bottom=0)


def short(n):
    """4096 -> 4k, as depths are called."""
    return f"{n / 1024:g}k" if n >= 1024 else f"{n:g}"


def figure_of(lines, width, panels):
    """A white figure, `width` inches wide, with panels side by side and the lines' titles above them."""
    from matplotlib.figure import Figure                              # here: who only measures need not have it
    from matplotlib.lines import Line2D
    figure = Figure(figsize=(width, 3 + 0.2 * len(lines)), layout="constrained", facecolor="white")
    handles = [Line2D([], [], color=line.colour, marker=line.marker) for line in lines]
    figure.legend(handles, [line.title for line in lines], loc="outside upper left")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def depth_figure(lines):
    """Decode over depth: a step from 0 to the first power of two, doublings from there on, all equally wide."""
    figure, (axes,) = figure_of(lines, 7, 1)
    depths = [float(row["x"]) for line in lines for row in line.rows]
    first, last = (int(math.log2(f(d for d in depths if d))) if any(depths) else 0 for f in (min, max))
    powers = [2 ** i for i in range(last, first - 1, -math.ceil((last - first + 1) / 8))]
    axes.set_xscale("symlog", base=2, linthresh=2 ** first, linscale=0.5)
    draw_lines(axes, lines, "decode")
    axes.set_xticks([0] * (0 in depths) + powers[::-1])
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda n, _: short(n))
    axes.set(xlabel="context depth, tokens (k = 1,024)", ylabel="decode, tokens/s")
    return figure


def memory_figure(lines):
    """Decode, prefill and the experts that decode found in memory, over the share of the file that is kept there."""
    figure, panels = figure_of(lines, 8.4, 3)
    for axes, column, name in zip(panels, ("decode", "prefill", "decode_found"),
                                  ("decode, tokens/s", "prefill, tokens/s", "decode: experts in memory, %")):
        draw_lines(axes, lines, column)
        axes.set(title=name, xlim=(0, 104), xticks=range(0, 101, 25))
    panels[2].set_ylim(0, 104)
    panels[1].set_xlabel("weights kept in memory, % of the file")
    return figure


def draw(args):
    """Draw both figures, and only then write them; one without rows is left as it is."""
    rows, drawn = read_table(args.table), {}
    from matplotlib import rc_context
    for axis, make in (("depth", depth_figure), ("memory", memory_figure)):
        lines = lines_of(rows, axis)
        if not lines:
            say(f"{args.table}: no rows of axis {axis}: {axis}.svg is not drawn")
            continue
        with rc_context(STYLE):
            svg = io.BytesIO()
            make(lines).savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
            drawn[args.out / f"{axis}.svg"] = svg.getvalue()
    for path, content in drawn.items():
        with written(path) as f:
            f.write(content)
        say(f"{path}: {len(content)} bytes")


# ---- Command line ------------------------------------------------------------------------------------------------


def whole(least):
    """A kind of argument: a whole number, at least `least`."""
    def parse(text):
        if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or int(text) < least:
            raise argparse.ArgumentTypeError(f"wanted whole numbers from {least}, found {text!r}")
        return int(text)
    return parse


def shares(text):
    """A kind of argument: percent, above 0; more than 100 is 100."""
    numbers = [float(part) if re.fullmatch(r"\d+(\.\d+)?", part, re.ASCII) else 0.0 for part in text.split(",") if text]
    if not all(numbers):
        raise argparse.ArgumentTypeError(f"wanted percent above 0, found {text!r}")
    return [min(number, 100.0) for number in numbers]


def depths(text):
    """A kind of argument: positions."""
    return [whole(0)(part) for part in text.split(",") if text]


def arguments(argv):
    parser = argparse.ArgumentParser(
        prog="plots.py", description="Measure speed against context depth and memory; draw it.")
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("measure", help="run -m bench, add rows to the table")
    sub.add_argument("model", metavar="MODEL", type=Path)
    sub.add_argument("--depths", type=depths, default="0,4096,16384,65536", metavar="LIST",
                     help="positions to fill first (default: %(default)s; empty: none)")
    sub.add_argument("--memory", type=shares, default="25,50,75,100", metavar="LIST",
                     help="percent of the file to keep in memory (default: %(default)s; empty: none)")
    sub.add_argument("--threads", type=whole(1), metavar="N", help="default: the physical cores")
    sub.add_argument("--prompt", type=whole(1), default=512, metavar="N", help="tokens of the prompt (default: 512)")
    sub.add_argument("--tokens", type=whole(1), default=128, metavar="N", help="tokens to decode (default: 128)")
    sub.add_argument("--label", metavar="TEXT", help="what the plots call it (default: MODEL's name)")
    sub.add_argument("-o", dest="table", type=Path, default=TABLE, metavar="FILE", help="default: demo/measured.tsv")
    sub = commands.add_parser("draw", help="write depth.svg and memory.svg")
    sub.add_argument("-i", dest="table", type=Path, default=TABLE, metavar="FILE", help="default: demo/measured.tsv")
    sub.add_argument("-o", dest="out", type=Path, default=TABLE.parent, metavar="DIR", help="default: demo")
    args = parser.parse_args(argv)
    folder = args.table.parent if args.command == "measure" else args.out
    if not folder.is_dir():
        parser.error(f"-o: no directory {folder}")
    if args.command == "measure":
        args.label = args.label or args.model.stem
        if not (args.label + args.model.name).isprintable():
            parser.error("--label, or MODEL's name: wanted printable characters only")
    return args


def main(argv=None):
    args = arguments(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)         # the engine must not go on without us
    try:
        (measure if args.command == "measure" else draw)(args)
    except ExportError as e:
        say(e)
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
