/* qwen3next.c - Qwen3-Next, and its siblings of the same blocks (Qwen3.5, 3.6), on a CPU, in one file of C.
 *
 *     gcc -O3 -pthread qwen3next.c -o qwen3next -lm && ./qwen3next model.bin
 *
 * The model. n tokens enter as rows x[t] of width D and pass through L layers:
 *
 *     x = embed[token]
 *     each layer:  x += mixer(norm(x));  x += mlp(norm(x))
 *     logits = lm_head . norm(x)                      norm(x) = x / rms(x) * (1 + w), rms(x) = sqrt(mean(x^2) + eps)
 *
 * Three of four mixers (all such counts are those of the model with 80 billion parameters; -m inspect
 * tells a checkpoint's own) are a *Gated DeltaNet*, a linear attention whose memory is one matrix
 * S[dk][dv] per value head, however long the text (vectors are columns, ' transposes; conv4 is a causal
 * depthwise convolution over 4 tokens):
 *
 *     q, k, v, z = W x;  b, a = W_ba x;   q, k, v = silu(conv4(q, k, v))
 *     q = l2norm(q) / sqrt(dk);  k = l2norm(k)
 *     decay = exp(-exp(A_log) softplus(a + dt_bias))          how much of the memory stays
 *     beta  = sigmoid(b)                                      how strongly to write
 *     S  = decay S;   S += k (beta (v - S'k))';   o = S'q     the delta rule
 *     mixer = W_out (o / rms(o) * w * silu(z))
 *
 * Every fourth is a *gated attention*: grouped keys and values, rotary positions on the first quarter
 * of a head, a sigmoid gate on the output:
 *
 *     q, g, k, v = W x;   q, k = rope(norm(q)), rope(norm(k))                           k, v: a row a token
 *     mixer = W_o (softmax(q k' / sqrt(hd)) v * sigmoid(g))
 *
 * The MLP is a *mixture of experts*: a router picks 10 of 512 small networks for each token, and one
 * shared expert always runs:
 *
 *     p = softmax(W_router x);   mlp = sum over the top 10 of p_e / (their sum) FFN_e(x) + sigmoid(w x) FFN_shared(x)
 *     FFN(x) = W_down (silu(W_gate x) * W_up x)
 *
 * Map. Parts I and II are the model. For a first reading take 3, 4, 6 to 10, then `int8_rows` and `delta_rule` in 15; 1, 2, 5 and 11 can
 * wait, and so can 10a (drafts).
 *
 *     I    1 platform   2 utilities   3 structs   4 kernel interface   5 checkpoint
 *     II   6 small blocks   7 Gated DeltaNet   8 gated attention   9 mixture of experts
 *          10 forward, 10a multi-token prediction   11 state
 *     III  12 tokenizer   13 sampler
 *     IV   14 threads, 14a experts from disk   15 kernels (compiled once for each instruction set)
 *     V    15a what all modes share   16 chat template   17 generate, 17a conversations, 17b saved ones   18 chat
 *          19 other modes, 19a trace   20 benchmark   21 command line   22 Windows   23 fuzzing
 *
 * Rules of the house. stdout carries the result, stderr everything else. Every count from a file is
 * checked before it is used. Nothing is allocated inside the token loop but growing lists of tokens and text.
 * One forward serves any number of tokens, and a token's result has the same bits whatever the batch
 * it came in, the thread that made it and the number of threads: every sum has one fixed order.
 *
 * The checkpoint (made by export.py, described in README.md) is mapped, never copied; of one that is larger than memory,
 * experts are read as they are needed (14a). Matrices lie in tiles of 16 rows in the order in which the kernels stream them. */
#ifndef KERNEL_PASS /* ---------- everything but part IV.15 is compiled once ---------- */

/* ============================== Part I: data ============================== */

/* ---- 1. Platform and limits ---- */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef _WIN32 /* what this program uses of POSIX: section 22 */
#include <io.h>
#define MAP_FAILED ((void *)-1)
enum {
    PROT_READ = 1, PROT_WRITE = 2, MAP_SHARED = 1, MAP_PRIVATE = 2, MAP_ANONYMOUS = 4, MAP_NORESERVE = 8,
    MADV_WILLNEED, MADV_DONTNEED, _SC_PAGESIZE, _SC_PHYS_PAGES, _SC_NPROCESSORS_ONLN,
    O_CLOEXEC = O_BINARY | O_NOINHERIT, O_NONBLOCK = 0
};
typedef _sigset_t sigset_t;
static void *mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset);
static int munmap(void *p, size_t bytes);
static int madvise(void *p, size_t bytes, int advice);
static long sysconf(int name);
static ssize_t pread(int fd, void *to, size_t n, off_t offset);
static void *memmem(const void *text, size_t n, const void *word, size_t length);
static int replace_file(const char *from, const char *to);
static long peak_memory_kb(void);
__declspec(dllimport) unsigned long __stdcall GetModuleFileNameA(void *module, char *path, unsigned long size);
__declspec(dllimport) int __stdcall SetConsoleCP(unsigned page);
__declspec(dllimport) int __stdcall SetConsoleOutputCP(unsigned page);
enum { UTF8_PAGE = 65001 };
#define rename(from, to) replace_file(from, to)
#define realpath(path, to) _fullpath(to, path, PATH_MAX)
#define fchmod(fd, mode) ((void)(mode), 0)
#define fsync(fd) _commit(fd)
#else
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/select.h>
#ifdef __linux__
#include <sys/vfs.h>
#elif defined __APPLE__
#include <mach-o/dyld.h>
#endif
#endif
#if defined __x86_64__ && !defined PLAIN_ONLY
#define HAVE_X86 1
#include <immintrin.h>
#elif defined __aarch64__ && !defined PLAIN_ONLY
#define HAVE_NEON 1
#include <arm_neon.h>
#ifdef __linux__
#include <sys/auxv.h>
#include <asm/hwcap.h>
#endif
#endif

#if !defined __SANITIZE_ADDRESS__ && defined __has_feature /* clang's way to say it */
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#ifdef FUZZ /* section 23 runs the program again and again in one process: nothing may end it, pile up, or touch a user's files */
#define main(...) program(__VA_ARGS__)
int program(int argc, char **argv);
#define exit(status) fuzz_exit(status)
#define realloc(p, bytes) fuzz_realloc(p, bytes)
#define free(p) fuzz_free(p)
#define mmap(at, bytes, ...) fuzz_mmap(at, bytes, __VA_ARGS__)
#define munmap(p, bytes) (fuzz_free(p), (void)(bytes))
#define open(path, ...) open(fuzz_path(path), __VA_ARGS__)
#define fopen(path, mode) fopen(fuzz_path(path), mode)
#define stat(path, info) stat(fuzz_path(path), info)
#define rename(from, to) rename(fuzz_path(from), fuzz_path(to))
#define unlink(path) unlink(fuzz_path(path))
__attribute__((noreturn)) static void fuzz_exit(int status);
static void *fuzz_realloc(void *old, size_t bytes);
static void *fuzz_mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset);
static void fuzz_free(void *p);
static const char *fuzz_path(const char *path);
#define FUZZING true
#else
#define FUZZING false
#endif

#ifdef __MINGW_PRINTF_FORMAT
#define PRINTF __MINGW_PRINTF_FORMAT
#else
#define PRINTF printf
#endif

#define VERSION "0.1.0"
#define PROGRAM "qwen3next"

enum {
    TILE = 16,          /* rows of a weight tile = lanes of the widest vector */
    BLOCK = 32,         /* quantized values that share a scale */
    SUPER = 64,         /* columns of a quantized superblock: two blocks, a whole number of cache lines */
    MAX_ROWS = 8,       /* activation rows one kernel call takes at most */
    KV_RANGE = 512,     /* positions attended to at a time; the results of ranges are merged in order */
    GDN_CHUNK = 32,     /* tokens a DeltaNet head walks its state through before it norms their outputs */
    FFN_CHUNK = 64,     /* tokens that share one scratch of intermediate values */
    HEAD_ROWS = 16,     /* rows of logits made at a time */
    MAX_BATCH = 8192,   /* tokens of one forward at most */
    DEFAULT_BATCH = 1024, /* when all weights are in memory; else up to ... */
    LARGE_BATCH = 4096,   /* ... so many: each batch reads most experts, but nothing is heard of it until it is done */
    PLANNED_CTX = 32768,  /* positions whose keys and values shall have room beside weights in memory */
    MAX_DRAFT = 8,      /* tokens drafted for one forward at most */
    AUTO_DRAFT = 4,     /* ... when the program chooses how many */
    CONFIDENCES = 8,    /* classes of a draft's probability */
    SHORTLIST_IDS = 1 << 13, /* first ids of the vocabulary that drafts are looked for among */
    MAX_TRIAL = MAX_DRAFT + 1, /* tokens of a forward that may be taken back */
    MAX_THREADS = 256,
    MAX_STOPS = 16,
    MAX_LABELS = 1 << 16, /* classes of a classifier */
};

#define SNAPSHOT_BYTES ((size_t)2 << 30) /* of a conversation, to go back to its turns, at most */

_Static_assert(sizeof(size_t) == 8, "checkpoints are larger than 32 bits can address");

/* ---- 2. Utilities ---- */

/* Signals (on_interrupt, section 15a). */
static volatile sig_atomic_t interrupted; /* how many have come that nobody has acted upon; chat does so before each message */
static volatile sig_atomic_t leaving;     /* SIGTERM or SIGHUP when it has come: the program is to save what it should, and end */
static volatile sig_atomic_t watching;    /* a mode is at work that looks at `interrupted` between steps */
static const char *volatile unfinished_file; /* the temporary file being written, or NULL ... */
static volatile sig_atomic_t unfinished_fd; /* ... and its descriptor */

/* The status of a run that a signal has ended. */
static int signal_status(void) { return 128 + (leaving ? leaving : SIGINT); }

#ifdef _WIN32
static const int ENDINGS[] = {SIGINT, SIGTERM}; /* the signals that end a run */
#else
static const int ENDINGS[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT};
#endif

/* Keep signals that may end a run out; *before: what was let in, to go back to. Threads are started like this: signals are
 * the main thread's, which may be waiting to be woken by one. */
static void hold_signals(sigset_t *before)
{
#ifdef _WIN32 /* whose signals come in a thread of their own */
    *before = 0;
#else
    sigset_t stop;
    sigemptyset(&stop);
    for (size_t i = 0; i < sizeof ENDINGS / sizeof *ENDINGS; i++) sigaddset(&stop, ENDINGS[i]);
    pthread_sigmask(SIG_BLOCK, &stop, before);
#endif
}

/* A file that was to appear whole shall not stay behind in part. Safe in a signal handler. */
static void discard_unfinished(void)
{
    const char *path = unfinished_file;
    if (path) close(unfinished_fd), unlink(path); /* Windows removes no open file */
}

/* Whether a control character begins at s, of n bytes > 0: one of ASCII's, or of U+0080 to U+009F in UTF-8. */
static bool is_control(const uint8_t *s, size_t n)
{
    return s[0] < 0x20 || s[0] == 0x7f || (n > 1 && s[0] == 0xc2 && s[1] >= 0x80 && s[1] < 0xa0);
}

/* Write text that a model or a file has made up. On a terminal control characters but newline and tab, which could do
 * anything to it, are shown as ^X. */
static void put_text(FILE *f, const void *text, size_t n)
{
    const uint8_t *s = text;
    bool terminal = isatty(fileno(f));
    if (!terminal) fwrite(s, 1, n, f);
    for (size_t i = 0; terminal && i < n; i++) {
        if (s[i] == '\n' || s[i] == '\t' || !is_control(s + i, n - i)) {
            putc(s[i], f);
        } else {
            i += s[i] == 0xc2;
            fprintf(f, "^%c", (s[i] ^ 0x40) & 0x7f);
        }
    }
}

/* Print a message to stderr: "qwen3next: ", a line without control characters, whatever a file's names hold, and a hint. */
__attribute__((format(PRINTF, 1, 0))) static void say(const char *format, va_list args, const char *hint)
{
    char line[2 * PATH_MAX];
    int n = vsnprintf(line, sizeof line, format, args);
    n = n < (int)sizeof line ? n : (int)sizeof line - 1;
    for (int i = 0; i < n; i++) {
        if (!is_control((uint8_t *)line + i, (size_t)(n - i))) continue;
        if ((uint8_t)line[i] == 0xc2) line[i++] = '?';
        line[i] = '?';
    }
    fprintf(stderr, PROGRAM ": %s%s\n", line, hint);
}

static atomic_flag dying = ATOMIC_FLAG_INIT;

/* Print "qwen3next: message" and leave with status 1: the answer to every bad file or input. Of several threads that come
 * here, one speaks. */
__attribute__((noreturn, format(PRINTF, 1, 2))) static void die(const char *format, ...)
{
    va_list args;
    while (atomic_flag_test_and_set(&dying)) sleep(1);
    va_start(args, format);
    fflush(stdout);
    say(format, args, "");
    va_end(args);
    discard_unfinished();
    exit(1);
}

/* Print "qwen3next: message" and go on. Returns false, for those who fail by it. */
__attribute__((format(PRINTF, 1, 2))) static bool warn(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    say(format, args, "");
    va_end(args);
    return false;
}

/* The smallest multiple of `to` that is not below n. */
static size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }
static int min_int(int a, int b) { return a < b ? a : b; }
static size_t max_size(size_t a, size_t b) { return a > b ? a : b; }
static size_t min_size(size_t a, size_t b) { return a < b ? a : b; }
static int max_int(int a, int b) { return a > b ? a : b; }

/* a * b, or the end of the program when the product does not fit. */
static size_t mul(size_t a, size_t b)
{
    size_t product;
    if (__builtin_mul_overflow(a, b, &product)) die("a size overflows: %zu x %zu", a, b);
    return product;
}

/* Whether what is about to be asked of the system shall fail. In the debug build (-DFAULTS) QWEN3NEXT_FAULT=N fails the N-th
 * request for memory, a file or a thread, with QWEN3NEXT_SIGNAL=S it is signal S that comes then: so tests see what follows. */
static bool fault(void)
{
#ifdef FAULTS
    static atomic_long requests;
    const char *n = getenv("QWEN3NEXT_FAULT"), *signal_number = getenv("QWEN3NEXT_SIGNAL");
    if (!n || atomic_fetch_add(&requests, 1) + 1 != atol(n)) return false;
    if (signal_number) return raise(atoi(signal_number)), false;
    errno = ENOMEM;
    return true;
#else
    return false;
#endif
}

/* realloc for count x size bytes that never returns NULL: ends the program when memory is short. */
static void *grow(void *old, size_t count, size_t size)
{
    void *p = fault() ? NULL : realloc(old, mul(count ? count : 1, size));
    if (!p) die("out of memory: wanted %zu bytes", count * size);
    return p;
}

/* Ask for pages of 2 MB where the system and, for a mapped file, the file system can: fewer address translations, up to
 * 25 % faster reading. Nothing is lost where it cannot. */
static void want_huge_pages(void *p, size_t bytes)
{
#ifdef MADV_HUGEPAGE
    madvise(p, bytes, MADV_HUGEPAGE);
#else
    (void)p, (void)bytes;
#endif
}

/* Zeroed memory of `count` floats that the system commits only where it is touched. */
static float *reserve(size_t count, const char *what)
{
    size_t bytes = round_up(mul(count ? count : 1, sizeof(float)), 4096);
    void *p = fault() ? MAP_FAILED : mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) die("cannot reserve %zu MB for the %s: %s", bytes >> 20, what, strerror(errno));
    if (bytes >= (size_t)16 << 20) want_huge_pages(p, bytes); /* less would cost small models memory they never use */
    return p;
}

/* Give the whole pages of a piece of anonymous memory back to the system; what was there is lost. */
static void give_back(uint8_t *p, size_t bytes)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), first = (page - (uintptr_t)p % page) % page;
    if (bytes > first) madvise(p + first, (bytes - first) / page * page, MADV_DONTNEED);
}

static double now(void) /* seconds */
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* A growable string of bytes, always NUL-terminated. */
typedef struct { char *data; size_t len, cap; } Str;

/* Append n bytes. */
static void str_add(Str *s, const void *bytes, size_t n)
{
    if (s->len + n + 1 > s->cap) {
        s->cap = (s->len + n + 1) * 2;
        s->data = grow(s->data, s->cap, 1);
    }
    if (n) memmove(s->data + s->len, bytes, n);
    s->len += n;
    s->data[s->len] = 0;
}

/* Make the string these n bytes, which may lie in the string itself: then it need not grow. */
static void str_set(Str *s, const void *bytes, size_t n) { s->len = 0; str_add(s, bytes, n); }

/* A growable list of token ids. */
typedef struct { int *id; int len, cap; } Tokens;

/* Append one id. */
static void tokens_add(Tokens *t, int id)
{
    if (t->len == INT_MAX / 2) die("too many tokens");
    if (t->len == t->cap) {
        t->cap = t->cap ? t->cap * 2 : 64;
        t->id = grow(t->id, (size_t)t->cap, sizeof *t->id);
    }
    t->id[t->len++] = id;
}

#define FNV_BASIS 0xcbf29ce484222325u

/* 64-bit FNV-1a of n bytes, going on from h (FNV_BASIS at first). */
static uint64_t fnv1a(const uint8_t *bytes, size_t n, uint64_t h)
{
    for (size_t i = 0; i < n; i++) h = (h ^ bytes[i]) * 0x100000001b3u;
    return h;
}

/* Whether a file is as its hash says. A fuzzer, which cannot guess hashes, is to reach what lies behind them. */
static bool same_hash(uint64_t wanted, uint64_t found) { return wanted == found || FUZZING; }

/* bf16 is the upper half of a float. */
static float bf16_to_float(uint16_t h)
{
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

/* Exact for every finite f16. */
static float f16_to_float(uint16_t h)
{
    uint32_t bits = (uint32_t)(h & 0x7fff) << 13;
    float f;
    memcpy(&f, &bits, 4);
    f *= 0x1p112f; /* moves the exponent's bias from 15 to 127; right for denormals too */
    return h & 0x8000 ? -f : f;
}

/* Nearest f16, ties to even; beyond the range, and of NaN, the largest finite value. */
static uint16_t float_to_f16(float f)
{
    uint32_t bits, sign;
    memcpy(&bits, &f, 4);
    sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits >= 0x477ff000) return (uint16_t)(sign | 0x7bff);
    if (bits < 0x38800000) { /* a denormal: adding 0.5 aligns its bits at the end of the mantissa */
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        memcpy(&bits, &magnitude, 4);
        return (uint16_t)(sign | (bits - 0x3f000000));
    }
    bits += 0xfff + (bits >> 13 & 1);
    return (uint16_t)(sign | ((bits >> 13) - (112 << 10)));
}

static int output_error; /* errno of the first write to standard output that failed, or 0: main tells it at the end */

/* Pass on what was printed. */
static void flush_output(void)
{
    if (fflush(stdout) && !output_error) output_error = errno;
}

/* A file mapped for reading, shared with the page cache. */
typedef struct { const uint8_t *data; size_t size; const char *path; dev_t device; ino_t inode; } Mapping; /* size: bytes */

/* The mapped files, for the handler of SIGBUS: the model, and what is being read: a tokenizer, a conversation. data NULL: none. */
static Mapping mapped[4];

/* AddressSanitizer, where it is built in: the rest of a mapped file's last page is not to be read (or is of no concern again). */
static void guard_rest(const Mapping *m, bool on)
{
#ifdef __SANITIZE_ADDRESS__
    size_t page = (size_t)sysconf(_SC_PAGESIZE), rest = round_up(m->size, page) - m->size;
    if (on) __asan_poison_memory_region(m->data + m->size, rest);
    else __asan_unpoison_memory_region(m->data + m->size, rest);
#else
    (void)m, (void)on;
#endif
}

/* Map a whole file: a regular one of at least 64 bytes. False after a message. */
static bool map_file(const char *path, Mapping *m)
{
    struct stat info;
    void *p = MAP_FAILED;
    int fd = fault() ? -1 : open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC); /* O_NONBLOCK: do not wait on a FIFO */
    if (fd < 0 || fstat(fd, &info)) warn("%s: %s", path, strerror(errno));
    else if (!S_ISREG(info.st_mode)) warn("%s: wanted a regular file", path);
    else if (info.st_size < 64) warn("%s: wanted a header of 64 bytes, found a file of %lld", path, (long long)info.st_size);
    else if (fault() || (p = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_SHARED, fd, 0)) == MAP_FAILED)
        warn("%s: cannot map: %s", path, strerror(errno));
    if (fd >= 0) close(fd);
    if (p == MAP_FAILED) return false;
    want_huge_pages(p, (size_t)info.st_size);
    *m = (Mapping){p, (size_t)info.st_size, path, info.st_dev, info.st_ino};
    guard_rest(m, true);
    for (size_t i = 0; i < sizeof mapped / sizeof *mapped; i++)
        if (!mapped[i].data) {
            mapped[i] = *m;
            break;
        }
    return true;
}

/* Undo map_file. */
static void unmap_file(const Mapping *m)
{
    for (size_t i = 0; i < sizeof mapped / sizeof *mapped; i++)
        if (mapped[i].data == m->data) mapped[i].data = NULL;
    guard_rest(m, false);
    munmap((void *)(uintptr_t)m->data, m->size);
}

#ifndef _WIN32 /* which lets nobody cut off a mapped file */
/* SIGBUS: a page of a mapped file cannot be had: it was cut off meanwhile, or its disk fails. Says which, and leaves with
 * status 1; any other SIGBUS does what it always does. */
static void on_bus_error(int sig, siginfo_t *info, void *context)
{
    (void)context;
    for (size_t i = 0; i < sizeof mapped / sizeof *mapped; i++) {
        size_t offset = (size_t)((const uint8_t *)info->si_addr - mapped[i].data);
        if (!mapped[i].data || offset >= mapped[i].size) continue;
        const char *parts[] = {PROGRAM ": ", mapped[i].path, ": cannot be read any more: cut off while in use, or its disk fails\n"};
        static char line[PATH_MAX + 128]; /* printf is not allowed in a handler */
        size_t n = 0;
        while (atomic_flag_test_and_set(&dying)) pause(); /* another thread speaks */
        for (size_t k = 0; k < 3; k++)
            for (const char *s = parts[k]; *s && n < sizeof line; s++) line[n++] = *s;
        if (write(2, line, n) < 0) _exit(1);
        discard_unfinished();
        _exit(1);
    }
    signal(sig, SIG_DFL); /* the faulting instruction runs again */
}
#endif

/* errno of the write to a file that failed, 0 if none has. */
static int write_error(FILE *f) { return ferror(f) ? (errno ? errno : EIO) : 0; }

/* ---- 3. Structs ---- */

typedef enum { VECTOR, F32, BF16, Q8, Q4, Q6, N_TYPES } Type; /* VECTOR: row-major float32, no tiles; from Q8 on: quantized */
static const char *const TYPE_NAMES[N_TYPES] = {"float", "f32", "bf16", "q8", "q4", "q6"};

/* A checkpoint begins with this, then come its records (README: the format). */
typedef struct {
    char magic[8];
    uint32_t version, n_meta, n_tensors, zero;
    uint64_t file_size, hash;
    uint8_t reserved[24];
} Header;

typedef struct { char key[40]; uint32_t type, count; uint64_t offset, size; } MetaRecord;
typedef struct { char name[72]; uint32_t type, rank; uint64_t shape[4], offset, size; } TensorRecord;

/* One or more matrices of a type and shape, in tiles of TILE rows x all columns (README: the format). */
typedef struct {
    Type type;
    int rows, cols;       /* of one matrix (of a gate_up pair: of each half, I); the last tile is padded with zero rows */
    int count;            /* matrices: experts, or 1 */
    size_t tile_bytes;    /* one tile: TILE rows, all columns */
    size_t matrix_bytes;  /* one matrix; a gate_up pair counts as one: its tiles alternate */
    const uint8_t *data;  /* NULL when the checkpoint has no such tensor */
} Matrix;

/* int8 activations, one superblock: x[i] = d[i/32] * q[i]. */
typedef struct {
    int8_t q[SUPER];
    float d[2];           /* scale of each block */
    int32_t bias[2];      /* -128 * sum of q over the block: weights are stored unsigned, as q+128 */
} ActBlock;

/* Rows of activations: as float and, when some matrix is quantized, as int8 too. Of work.inner only the form that the network's
 * `down` takes is filled (ffn_up_item). */
typedef struct {
    int cols;
    size_t ld;            /* floats from row to row */
    size_t blocks;        /* ActBlocks from row to row */
    float *f;             /* [rows][ld] */
    ActBlock *q;          /* [rows][blocks]; NULL when no matrix is quantized */
} Acts;

/* The model's sizes, by the names of its config.json; behind them the letters that shapes in this file are written with. */
typedef struct {
    int hidden_size, num_hidden_layers, vocab_size;                              /* D, L, V */
    int num_attention_heads, num_key_value_heads, head_dim, rotary_dim;          /* H, G, hd */
    int linear_num_key_heads, linear_num_value_heads;                            /* nk, nv */
    int linear_key_head_dim, linear_value_head_dim;                              /* dk, dv */
    int linear_conv_kernel_dim;                                                  /* kernel, or taps */
    int num_experts, num_experts_per_tok;                                        /* E, k */
    int moe_intermediate_size, shared_expert_intermediate_size;                  /* I, Is */
    int intermediate_size; /* of the dense MLP layers, if any */
    int norm_topk_prob, max_position_embeddings;
    int tokenizer_size;    /* ids from here on are padding rows of the vocabulary: never sampled */
    float rms_norm_eps;
    double rope_theta;
    /* derived */
    int key_dim, value_dim; /* heads x head dim of the DeltaNet */
    int conv_dim;           /* channels of the convolution: q, k and v = 2 key_dim + value_dim */
    int group;              /* H / G: query heads that share a KV head */
    int hdp, dvp;           /* hd, dv up to whole tiles */
    int n_sparse, n_dense, n_full, n_linear; /* layers with experts, with a dense MLP, with attention, with a DeltaNet */
} Config;

typedef struct { /* Gated DeltaNet */
    Matrix in_proj_qkvz;   /* [2 key_dim + 2 value_dim][D]: all q, all k, all v, all z */
    Matrix in_proj_ba;     /* [2 nv][D]: all b, all a */
    const float *conv1d;   /* [kernel][conv_dim], oldest tap first */
    const float *A_log;    /* [nv] */
    const float *dt_bias;  /* [nv] */
    const float *norm;     /* [dv], a plain weight: no 1 + */
    Matrix out_proj;       /* [D][value_dim] */
    int index;             /* among the DeltaNet layers: which state */
} LinearAttn;

typedef struct { /* gated attention */
    Matrix qgkv_proj;       /* [2 H hd + 2 G hd][D]: all queries, all gates, all keys, all values */
    const float *qgkv_bias; /* [2 H hd + 2 G hd] or NULL */
    const float *q_norm, *k_norm; /* [hd], zero-centred */
    Matrix o_proj;          /* [D][H hd] */
    const float *o_bias;    /* [D] or NULL */
    int index;              /* among the attention layers: which cache */
} SelfAttn;

typedef struct { /* experts, or for a dense layer one network */
    Matrix gate;            /* [E][D], the router; no data: a dense layer */
    Matrix gate_up_proj;    /* E x [I pairs][D]; dense: 1 x */
    Matrix down_proj;       /* E x [D][I] */
    Matrix shared_gate_up;  /* [Is pairs][D] */
    Matrix shared_down;     /* [D][Is] */
    const float *shared_expert_gate; /* [D] */
    int index;              /* among the layers with experts */
} Mlp;

typedef struct {
    bool full_attention;
    const float *input_layernorm, *post_attention_layernorm; /* [D], zero-centred */
    LinearAttn linear;
    SelfAttn attn;
    Mlp mlp;
} Layer;

/* The multi-token prediction head, which guesses the token after the next one (section 10a): one more attention layer. */
typedef struct {
    Matrix fc;            /* [D][2 D]: takes an embedding, then a hidden row; no data: the checkpoint has no such head */
    const float *pre_fc_norm_embedding, *pre_fc_norm_hidden, *norm; /* [D], zero-centred */
    Layer layer;          /* its keys and values follow those of the model's attention layers */
} Mtp;

/* The pieces export.py found in the checkpoint's own chat template. */
typedef struct {
    bool present, thinking; /* thinking: earlier answers keep only what follows think_end */
    Str prefix, default_system, system_prefix, system_suffix, user_prefix, user_suffix;
    Str assistant_prefix, assistant_suffix, generation_prompt, think_end;
    Str think_start;        /* think_end without its slash */
    bool opens_thinking;    /* generation_prompt does */
    int think_trim, system_trim, user_trim, assistant_trim; /* bits: 1, 2 white space; 4, 8 newlines; before, after */
} ChatPieces;

typedef struct { float temperature, top_p, min_p, repetition_penalty, presence_penalty; int top_k; } SamplerSettings;

/* What stands on top of the layers: a matrix that turns a row after the final norm into scores (Head.weight). */
typedef enum { CAUSAL_LM, SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION, QUESTION_ANSWERING, N_HEADS } HeadKind;
static const char *const HEAD_NAMES[N_HEADS] = {"causal_lm", "sequence_classification", "token_classification",
                                                "question_answering"};

typedef struct {
    HeadKind kind;
    Matrix weight;        /* to scores of the next token: lm_head [V][D]; of a text's or a token's classes: score [labels][D];
                             of an answer's beginning and end: qa_outputs [2][D] */
    const float *bias;    /* [rows] or NULL */
    Str *labels;          /* [rows] names of the classes; NULL: has none */
    int pad_token_id;     /* a text's class is read at its last token that is not this; -1: at its last */
} Head;

typedef struct {
    Mapping file;
    const Header *header;         /* copies of what the file begins with: */
    const MetaRecord *meta;       /* [n_meta] */
    const TensorRecord *tensors;  /* [n_tensors] */
    Config config;
    Matrix embed_tokens;          /* [V][D]; lm_head, too, when tied */
    const float *norm;            /* [D] */
    Head head;
    Layer *layers;                /* [num_hidden_layers] */
    Mtp mtp;
    bool quantized;               /* some matrix is: activations are needed as int8 */
    double *inv_freq;             /* [rotary_dim / 2], radians a position */
    float rope_magnitude;         /* YaRN's factor on cos and sin, else 1 */
    bool rope_has_scaling;        /* the checkpoint asks for linear scaling or YaRN itself */
    int8_t q4_levels[32];         /* two codebooks */
    int stop_ids[MAX_STOPS], n_stops;
    uint64_t tokenizer_hash;      /* 0: the checkpoint names no tokenizer */
    ChatPieces chat;
    SamplerSettings sampling;
} Model;

typedef enum { KV_F32, KV_F16, KV_Q8, N_KV } KvType; /* q8: int8, and a scale for each position and head */
static const char *const KV_NAMES[N_KV] = {"f32", "f16", "q8"};
static const size_t KV_BYTES[N_KV] = {4, 2, 1};

/* Words used below. A forward on *trial* feeds a token and guesses at those after it (together at most MAX_TRIAL), which may be taken
 * back. Keys and values can be: what lies beyond the length is overwritten. S and conv cannot, so they stay before the trial, and its
 * raw inputs wait on the *tape* until the next forward takes in those that were kept (section 7). In the MTP head a row *waits* in
 * work.pair until its next token is known (section 10a). Without drafts tape_len is 0 and no row waits: skip all of it on first reading. */

/* What a conversation is: the tokens fed so far and what the layers remember of them. */
typedef struct {
    Tokens tokens;        /* fed to the model, in order */
    int ctx;              /* positions there is room for */
    KvType kv_type;       /* of keys and values */
    uint8_t *k;           /* [attention layer][G][ctx / 16 up][hd][16]: 16 positions lie together; heads are kv_head_bytes apart */
    uint8_t *v;           /* [attention layer][G][ctx / KV_RANGE up][hd / 16 up][KV_RANGE][16 dims] */
    size_t kv_head_bytes; /* from head to head, in k as in v; a layer has G heads */
    size_t kv_heads;      /* of all layers */
    float *k_scale, *v_scale; /* [attention layer][G][kv_positions]; only with KV_Q8 */
    size_t kv_positions;  /* ctx, rounded up to whole ranges */
    float *recurrent;     /* all that cannot be cut back: S, conv, last_hidden, in one piece for snapshots */
    size_t recurrent_len; /* floats */
    float *S;             /* [DeltaNet layer][nv][dv / 16 up][dk][16 columns] */
    float *conv;          /* [DeltaNet layer][kernel - 1][conv_dim]: the last raw inputs, oldest first */
    size_t S_layer, conv_layer; /* floats of one layer */
    float *last_hidden;   /* [D] the last token's row after the final norm: its logits can be made again */
    /* After a forward on trial S and conv still lack its tokens; these rows make up for the first tape_len of them. */
    float *tape;          /* [DeltaNet layer][MAX_TRIAL][conv_dim raw inputs, then b and a: 2 nv] */
    size_t tape_row;      /* floats of one row */
    int tape_len;
    bool mtp;             /* the head's keys and values are kept too, to draft with */
    int mtp_len;          /* how many positions have them; the rows of the later ones wait in work.pair for their next token */
} State;

/* A copy of a state's recurrent part at some length; keys and values need none. recurrent NULL: not taken, or dropped. */
typedef struct { int n_tokens; float *recurrent; } Snapshot;

/* Scratch for one forward of n tokens: up to `batch` of a prompt, or up to MAX_TRIAL of a trial, if that is more. Memory is committed as
 * far as it is used. */
typedef struct {
    int batch;            /* tokens of a prompt read at a time */
    float *x;             /* [n][D] the residual stream, rows xn.ld apart */
    Acts xn;              /* [n][D] after a norm */
    float *proj;          /* [rows][proj_ld] what the mixer's input projection made, of a DeltaNet q, k, v, z (rows: gdn_rows), of an
                             attention q, gate, k, v (rows: n); then q, k and v are finished in place */
    size_t proj_ld;
    float *ba;            /* [rows][ba_ld] DeltaNet's b and a; rows: gdn_rows */
    size_t ba_ld;
    Acts mix;             /* [n][value_dim or H hd] the mixer's output before its last projection */
    float *out;           /* [n][D] what a mixer or MLP adds to x, rows xn.ld apart */
    float *rope;          /* [n][rotary_dim / 2][cos, sin] */
    float *router;        /* [n][router_ld] router logits; then their probabilities, -1 for those chosen, so that each is chosen once */
    size_t router_ld;
    int *top_expert;      /* [n][k] chosen experts, ascending */
    float *top_weight;    /* [n][k] */
    float *shared_weight; /* [n] sigmoid(shared_expert_gate . x) */
    struct Ffn *ffn;      /* [E + 1] the networks this batch runs, ... */
    int n_ffn;
    int ffn_from, ffn_to; /* ... and those that run now: all, or as many as the expert cache holds at a time */
    int *row_token;       /* [n (k + 1)] rows of `inner`: which token ... */
    float *row_weight;    /* [n (k + 1)] ... and its weight */
    Acts inner;           /* [n (k + 1)][the largest I] silu(gate) up */
    Acts pair;            /* [pair_rows][2 D] MTP: rows waiting for their next token: (its embedding, hidden), both normed */
    int pair_rows;
    float *partial;       /* [G][row blocks][ranges][MAX_ROWS (hdp + TILE)]: attention not yet merged, for small n */
    float *logits;        /* [HEAD_ROWS][logits_ld] */
    size_t logits_ld;
    float *scratch;       /* [threads][scratch_len] */
    size_t scratch_len;
} Work;

/* Tiles of the output head among whose rows a draft is looked for (section 10a). */
typedef struct {
    int *tile, n;         /* [n], in the order they came in */
    bool *has;            /* [vocab / TILE up] */
} Shortlist;

enum { GATE_UP, DOWN }; /* the two parts of an expert's weights */

/* One feed-forward network and the rows of this batch that visit it. */
typedef struct Ffn {
    const Matrix *gate_up, *down;
    const uint8_t *weights[2]; /* its gate_up and its down: in the mapped file, or in the expert cache ... */
    struct Slot *slot;    /* ... in this slot, where they may yet have to arrive; else NULL */
    int expert;           /* which of the stacked matrices */
    int first, count;     /* its rows of work.inner */
    int first_item;       /* prefix sum of 64-wide pieces of I, to spread the work */
} Ffn;

typedef struct Pool Pool;
typedef struct Kernels Kernels;
typedef struct ExpertCache ExpertCache;

typedef struct {
    Model model;
    State state;
    Work work;
    Pool *pool;
    ExpertCache *experts;  /* when the checkpoint is larger than memory, else NULL: all of it is mapped */
    const Kernels *kernels;
    const char *dump_dir;  /* --dump: where intermediate tensors go, or NULL */
    struct Trace *trace;   /* -m trace: what looks at each layer (section 19a), or NULL */
    double seconds[5];     /* spent in: projections, DeltaNet, attention, experts, head */
} Engine;

enum { T_PROJ, T_DELTA, T_ATTN, T_MOE, T_HEAD };

/* ---- 4. Kernel interface: all that Part IV provides ----
 * Every kernel sums in an order that depends on the shapes alone, never on how many rows came along. */
typedef void TileKernel(const uint8_t *w, int cols, const void *const *x, int n, float (*y)[TILE], const int8_t *levels,
                        const uint8_t *next);

struct Kernels {
    const char *name;
    int rows;              /* activation rows a `tile` call takes at most: its registers' worth */
    /* y[r][0..15] = sum over c of W[0..15][c] x[r][c] for n <= rows activation rows; w is one tile.
     * x[r] points to floats for F32 and BF16, to ActBlocks for the quantized types (levels: Q4's two codebooks).
     * BF16 takes columns in pairs: with an odd number x has one more float, of any finite value.
     * next: a tile of the same size to fetch into the cache meanwhile, or NULL (for tile_kv always NULL). */
    TileKernel *tile[N_TYPES];
    TileKernel *tile_kv[N_KV]; /* the same for keys and values: w is [cols][16] numbers of this type, q8's without scale */
    void (*quantize)(ActBlock *q, const float *x, int n);   /* floats to int8 blocks, zero padded */
    float (*dot)(const float *a, const float *b, int n);
    void (*sigmoid)(float *y, const float *x, int n);       /* y = 1 / (1 + exp(-x)) */
    float (*exp_sum)(float *x, float max, int n);           /* x = exp(x - max), returns the sum */
    void (*add_scaled)(float *out, const float *y, float weight, int n); /* out += weight y */
    /* the arithmetic of int8 or float tiles alone, for the benchmark; data: 16 floats. Returns operations done */
    double (*peak)(float *data, bool floats);
    /* walks 16 columns of one head's S[dk][16] through n tokens: see the definition */
    void (*delta_rule)(float *S, int dk, int n, const float *q, const float *k, const float *v, size_t ld,
                       const float *decay, const float *beta, float *o, int ldo);
};

/* Call fn(arg, item, thread) once for each item, in any order and on any thread; `thread` tells whose scratch it may use. Returns when all
 * are done. */
static void parallel_for(Pool *pool, int items, void (*fn)(void *arg, int item, int thread), void *arg);
static int pool_threads(const Pool *pool);

/* Ask for the weights of the layer's networks ffn[0..n), as many as there is room for; those are used next. Returns how many.
 * scan: the batch wants nearly all experts of the layer, as prompts do (section 9). */
static int experts_fetch(ExpertCache *c, const Mlp *layer, Ffn *ffn, int n, bool scan);
/* Ask for experts of the layer that comes next, before it is known which are wanted: as many as an eighth of the slots. */
static void experts_ahead(ExpertCache *c, const Mlp *layer);
/* Wait until a part of a network's weights is there. */
static void experts_wait(ExpertCache *c, const Ffn *f, int part);
/* Keys and values take so many bytes by now: the cache makes way for them, if it may. */
static void experts_make_way(ExpertCache *c, size_t bytes);

/* ---- 5. Checkpoint: header, records, and binding tensors by name, type and shape ---- */

enum { META_INT, META_FLOAT, META_STRING, META_LIST };

/* The checkpoint while it is being read. */
typedef struct {
    Mapping file;
    const Header *header;
    const MetaRecord *meta;     /* [n_meta] */
    const TensorRecord *tensors; /* [n_tensors] */
    uint32_t cursor;      /* tensors are asked for about in the order they lie in: look here first */
    uint32_t bound;       /* tensors that the model has asked for and got */
} Reader;

/* Bytes of the codes of one block of a quantized type: TILE rows x BLOCK columns, without their scales. */
static size_t block_bytes(Type type) { return TILE * BLOCK * (type == Q8 ? 8 : type == Q6 ? 6 : 4) / 8; }

/* Bytes of one tile of TILE rows x cols columns; 0 for VECTOR, which has no tiles. Where row r, column c lies in it:
 *     f32: [c][r].  bf16: [c / 2][r][c % 2].
 *     q8, q6, q4: for each SUPER columns the bf16 scale[2 blocks][r], then for each block of BLOCK columns its codes. Columns go in
 *     groups of 4, j = 0 to 7 in a block, and of each group a byte array [r][c % 4]:
 *     q8: array j holds q + 128.  q4: array j % 4 holds an index of the codebook, in the low nibble for j < 4, else in the high one.
 *     q6: 2 arrays, of which array j / 4 holds the code's low two bits at bit 2 (j % 4), then 4 with its upper four bits as in q4. */
static size_t bytes_of_tile(Type type, size_t cols)
{
    switch (type) {
    case F32: return cols * TILE * 4;
    case BF16: return round_up(cols, 2) * TILE * 2;
    case Q8: case Q6: case Q4: return round_up(cols, SUPER) / SUPER * (2 * TILE * 2 + 2 * block_bytes(type));
    default: return 0;
    }
}

/* Bytes that a tensor of this type and shape takes, or SIZE_MAX for a shape that cannot be. */
static size_t tensor_bytes(const TensorRecord *t)
{
    size_t n = 1, limit = (size_t)1 << 46;
    for (uint32_t i = 0; i < t->rank; i++) {
        if (t->shape[i] == 0 || t->shape[i] > limit) return SIZE_MAX;
        if (__builtin_mul_overflow(n, (size_t)t->shape[i], &n) || n > limit) return SIZE_MAX;
    }
    if (t->type == VECTOR) return n * 4;
    if (t->rank < 2) return SIZE_MAX;
    size_t rows = t->shape[t->rank - 2], cols = t->shape[t->rank - 1];
    return n / rows / cols * (round_up(rows, TILE) / TILE) * bytes_of_tile((Type)t->type, cols);
}

/* Refuse a region [offset, offset + size) that leaves the file or is not aligned. */
static void check_region(const Reader *r, const char *what, const char *name, uint64_t offset, uint64_t size,
                         uint64_t align)
{
    if (offset % align || offset > r->file.size || size > r->file.size - offset)
        die("%s: %s %s: wanted %llu bytes at a multiple of %llu inside the file's %zu, found offset %llu",
            r->file.path, what, name, (unsigned long long)size, (unsigned long long)align, r->file.size,
            (unsigned long long)offset);
}

/* For qsort: by place in the file. */
static int compare_offsets(const void *a, const void *b)
{
    const TensorRecord *x = *(const TensorRecord *const *)a, *y = *(const TensorRecord *const *)b;
    return (x->offset > y->offset) - (x->offset < y->offset);
}

/* Whether a field of n bytes holds a name, which messages and lists may show. */
static bool is_name(const char *field, size_t n)
{
    size_t length = 0;
    while (length < n && field[length] > ' ' && field[length] <= '~') length++;
    return length > 0 && length < n && !field[length];
}

/* Every tensor inside the payload, none over another. */
static void check_tensors(const Reader *r, size_t payload)
{
    uint32_t n = r->header->n_tensors;
    const TensorRecord **order = grow(NULL, n, sizeof *order);
    for (uint32_t i = 0; i < n; i++) {
        const TensorRecord *t = &r->tensors[i];
        if (!is_name(t->name, sizeof t->name)) die("%s: tensor %u: wanted a name of at most 71 bytes of ASCII", r->file.path, i);
        if (t->type >= N_TYPES || t->rank < 1 || t->rank > 4)
            die("%s: tensor %s: wanted a type below %d and rank 1 to 4, found type %u, rank %u", r->file.path,
                t->name, N_TYPES, t->type, t->rank);
        check_region(r, "tensor", t->name, t->offset, t->size, 64);
        if (t->size != tensor_bytes(t))
            die("%s: tensor %s: its shape wants %zu bytes, found %llu", r->file.path, t->name, tensor_bytes(t),
                (unsigned long long)t->size);
        if (t->offset < payload) die("%s: tensor %s lies over the directory", r->file.path, t->name);
        order[i] = t;
    }
    qsort(order, n, sizeof *order, compare_offsets);
    for (uint32_t i = 1; i < n; i++)
        if (order[i - 1]->offset + order[i - 1]->size > order[i]->offset)
            die("%s: tensors %s and %s overlap", r->file.path, order[i - 1]->name, order[i]->name);
    free(order);
}

/* Map a checkpoint and check everything its directory claims. */
static Reader open_reader(const char *path)
{
    Reader r = {0};
    if (!map_file(path, &r.file)) exit(1);
    Header header, *h = &header;
    memcpy(h, r.file.data, sizeof *h);
    if (memcmp(h->magic, "QWEN3NXT", 8)) die("%s: not a checkpoint of this program (make one with export.py)", path);
    if (h->version != 1) die("%s: version: wanted 1, found %u", path, h->version);
    if (h->file_size != r.file.size)
        die("%s: file_size: wanted %llu bytes, found %zu: cut off?", path, (unsigned long long)h->file_size,
            r.file.size);
    size_t room = (r.file.size - 64) / 64;
    if (h->n_meta > room || h->n_tensors > (room - h->n_meta) / 2)
        die("%s: n_meta %u, n_tensors %u: more than the file can hold", path, h->n_meta, h->n_tensors);
    size_t records = 64 * (size_t)h->n_meta + 128 * (size_t)h->n_tensors;
    uint8_t *copy = grow(NULL, sizeof *h + records, 1); /* what has been checked shall stay so, whoever writes to the file */
    memcpy(copy, h, sizeof *h);
    memcpy(copy + sizeof *h, r.file.data + sizeof *h, records);
    r.header = (const Header *)(void *)copy;
    r.meta = (const MetaRecord *)(r.header + 1);
    r.tensors = (const TensorRecord *)(r.meta + h->n_meta);
    for (uint32_t i = 0; i < h->n_meta; i++) {
        const MetaRecord *m = &r.meta[i];
        if (!is_name(m->key, sizeof m->key)) die("%s: key %u: wanted a name of at most 39 bytes of ASCII", path, i);
        check_region(&r, "key", m->key, m->offset, m->size, 8);
        size_t want = m->type <= META_FLOAT ? (size_t)m->count * 8 : m->size;
        if (m->type > META_LIST || m->size != want || (m->type == META_STRING && m->count != m->size))
            die("%s: key %s: wanted %zu bytes of a known type, found %llu of type %u", path, m->key, want,
                (unsigned long long)m->size, m->type);
    }
    check_tensors(&r, sizeof *h + records);
    return r;
}

/* The record of a key, or NULL when absent; refuses a key of another type. */
static const MetaRecord *find_meta(const Reader *r, const char *key, uint32_t type)
{
    for (uint32_t i = 0; i < r->header->n_meta; i++)
        if (!strcmp(r->meta[i].key, key)) {
            if (r->meta[i].type != type)
                die("%s: key %s: wanted type %u, found %u", r->file.path, key, type, r->meta[i].type);
            return &r->meta[i];
        }
    return NULL;
}

/* Entry i of an integer array. */
static int64_t meta_int_at(const Reader *r, const MetaRecord *m, uint32_t i)
{
    int64_t value;
    memcpy(&value, r->file.data + m->offset + 8 * (size_t)i, 8);
    return value;
}

/* An integer between lo and hi, or `absent` when the key is missing (a message when absent < lo). */
static int meta_int(const Reader *r, const char *key, int64_t lo, int64_t hi, int64_t absent)
{
    const MetaRecord *m = find_meta(r, key, META_INT);
    if (!m && absent < lo) die("%s: key %s: missing", r->file.path, key);
    int64_t value = m && m->count ? meta_int_at(r, m, 0) : absent;
    if (m && (m->count != 1 || value < lo || value > hi))
        die("%s: key %s: wanted one number from %lld to %lld, found %u, %lld", r->file.path, key, (long long)lo,
            (long long)hi, m->count, (long long)value);
    return (int)value;
}

/* A finite number between lo and hi, or `absent` (NAN: the key must be there). */
static double meta_float(const Reader *r, const char *key, double lo, double hi, double absent)
{
    const MetaRecord *m = find_meta(r, key, META_FLOAT);
    double value = absent;
    if (m && m->count == 1) memcpy(&value, r->file.data + m->offset, 8);
    if (m ? m->count != 1 || !(value >= lo && value <= hi) : isnan(absent))
        die("%s: key %s: wanted one number from %g to %g, found %g", r->file.path, key, lo, hi, value);
    return value;
}

/* A string, empty when the key is absent. The caller owns it. */
static Str meta_string(const Reader *r, const char *key)
{
    Str s = {0};
    const MetaRecord *m = find_meta(r, key, META_STRING);
    str_add(&s, m ? r->file.data + m->offset : (const uint8_t *)"", m ? m->size : 0);
    if (strlen(s.data) != s.len) die("%s: key %s: wanted text, found a zero byte", r->file.path, key);
    return s;
}

/* The record of a tensor, or NULL. */
static const TensorRecord *find_tensor(Reader *r, const char *name)
{
    uint32_t n = r->header->n_tensors;
    for (uint32_t i = 0; i < n; i++) {
        const TensorRecord *t = &r->tensors[(r->cursor + i) % n];
        if (!strcmp(t->name, name)) {
            r->cursor = (uint32_t)(t - r->tensors) + 1;
            return t;
        }
    }
    return NULL;
}

enum { REQUIRED, OPTIONAL };

/* The record of a tensor of this shape; NULL only for an OPTIONAL one that is absent. Refuses other shapes. */
static const TensorRecord *want_shape(Reader *r, const char *name, int need, int rank, const int shape[4])
{
    const TensorRecord *t = find_tensor(r, name);
    if (!t && need == REQUIRED) die("%s: tensor %s: missing", r->file.path, name);
    if (!t) return NULL;
    r->bound++;
    bool same = t->rank == (uint32_t)rank;
    for (int i = 0; same && i < rank; i++) same = t->shape[i] == (uint64_t)shape[i];
    if (!same)
        die("%s: tensor %s: wanted rank %d, shape [%d %d %d %d], found rank %u, [%llu %llu %llu %llu]", r->file.path,
            name, rank, shape[0], shape[1], shape[2], shape[3], t->rank, (unsigned long long)t->shape[0],
            (unsigned long long)t->shape[1], (unsigned long long)t->shape[2], (unsigned long long)t->shape[3]);
    return t;
}

/* A vector (b = 0) or table [a][b] of plain floats. */
static const float *bind_floats(Reader *r, const char *layer, const char *name, int need, int a, int b)
{
    char full[160];
    snprintf(full, sizeof full, "%s%s", layer, name);
    int shape[4] = {a, b ? b : 1, 1, 1};
    const TensorRecord *t = want_shape(r, full, need, b ? 2 : 1, shape);
    if (t && t->type != VECTOR)
        die("%s: tensor %s: wanted type float, found %s", r->file.path, full, TYPE_NAMES[t->type]);
    return t ? (const float *)(r->file.data + t->offset) : NULL;
}

enum { SINGLE = 0 }; /* the `count` of a matrix that is no stack, and whose shape has no place for one */

/* A matrix in tiles; data NULL for an OPTIONAL one that is absent. Its shape is [rows][cols] (count SINGLE), of a stack
 * [count][rows][cols], of a stack of gate_up pairs [count][2][rows][cols]. A dense or shared network is a stack of one. */
static Matrix bind_matrix(Reader *r, const char *layer, const char *name, int need, int count, bool paired, int rows,
                          int cols)
{
    char full[160];
    snprintf(full, sizeof full, "%s%s", layer, name);
    int plain[4] = {rows, cols, 1, 1}, stack[4] = {count, rows, cols, 1}, pairs[4] = {count, 2, rows, cols};
    int rank = paired ? 4 : count == SINGLE ? 2 : 3;
    const TensorRecord *t = want_shape(r, full, need, rank, rank == 4 ? pairs : rank == 3 ? stack : plain);
    Matrix m = {.rows = rows, .cols = cols, .count = max_int(count, 1)};
    if (!t) return m;
    if (t->type == VECTOR) die("%s: tensor %s: wanted a matrix type, found float", r->file.path, full);
    m.type = (Type)t->type;
    m.tile_bytes = bytes_of_tile(m.type, (size_t)cols);
    m.matrix_bytes = t->size / (size_t)m.count;
    m.data = r->file.data + t->offset;
    return m;
}

/* Read and range-check the sizes; heads x dims, and the sums of such, fit an int afterwards. */
static void read_config(const Reader *r, Config *c)
{
    const char *path = r->file.path;
    const struct { const char *key; int *field; int lo, hi; } ints[] = {
        {"hidden_size", &c->hidden_size, 1, 1 << 16},
        {"num_hidden_layers", &c->num_hidden_layers, 1, 1 << 12},
        {"vocab_size", &c->vocab_size, 1, 1 << 24},
        {"num_attention_heads", &c->num_attention_heads, 1, 1 << 10},
        {"num_key_value_heads", &c->num_key_value_heads, 1, 1 << 10},
        {"head_dim", &c->head_dim, 1, 1 << 12},
        {"rotary_dim", &c->rotary_dim, 0, 1 << 12},
        {"max_position_embeddings", &c->max_position_embeddings, 1, 1 << 28},
        {"linear_num_key_heads", &c->linear_num_key_heads, 1, 1 << 10},
        {"linear_num_value_heads", &c->linear_num_value_heads, 1, 1 << 10},
        {"linear_key_head_dim", &c->linear_key_head_dim, 1, 1 << 12},
        {"linear_value_head_dim", &c->linear_value_head_dim, 1, 1 << 12},
        {"linear_conv_kernel_dim", &c->linear_conv_kernel_dim, 1, 64},
        {"num_experts", &c->num_experts, 0, 1 << 16},
        {"num_experts_per_tok", &c->num_experts_per_tok, 0, 1 << 10},
        {"moe_intermediate_size", &c->moe_intermediate_size, 1, 1 << 20},
        {"shared_expert_intermediate_size", &c->shared_expert_intermediate_size, 1, 1 << 20},
        {"intermediate_size", &c->intermediate_size, 1, 1 << 20},
        {"norm_topk_prob", &c->norm_topk_prob, 0, 1},
    };
    for (size_t i = 0; i < sizeof ints / sizeof *ints; i++)
        *ints[i].field = meta_int(r, ints[i].key, ints[i].lo, ints[i].hi, ints[i].lo - 1);
    c->tokenizer_size = meta_int(r, "tokenizer_size", 1, c->vocab_size, c->vocab_size);
    c->rms_norm_eps = (float)meta_float(r, "rms_norm_eps", 0, 1, NAN);
    c->rope_theta = meta_float(r, "rope_theta", 1, 1e15, NAN);
    if (c->rotary_dim % 2 || c->rotary_dim > c->head_dim)
        die("%s: rotary_dim: wanted an even number up to head_dim %d, found %d", path, c->head_dim, c->rotary_dim);
    if (c->num_attention_heads % c->num_key_value_heads)
        die("%s: num_attention_heads: wanted a multiple of num_key_value_heads %d, found %d", path,
            c->num_key_value_heads, c->num_attention_heads);
    if (c->linear_num_value_heads % c->linear_num_key_heads)
        die("%s: linear_num_value_heads: wanted a multiple of linear_num_key_heads %d, found %d", path,
            c->linear_num_key_heads, c->linear_num_value_heads);
    c->key_dim = c->linear_num_key_heads * c->linear_key_head_dim;
    c->value_dim = c->linear_num_value_heads * c->linear_value_head_dim;
    c->conv_dim = 2 * c->key_dim + c->value_dim;
    c->group = c->num_attention_heads / c->num_key_value_heads;
    c->hdp = (int)round_up((size_t)c->head_dim, TILE);
    c->dvp = (int)round_up((size_t)c->linear_value_head_dim, TILE);
}

/* YaRN (arXiv 2309.00071) for a context `factor` times as long as the trained one: slow dimensions are divided by the
 * factor, fast ones kept, with a ramp between those that turn `slow` and `fast` times in the trained context. */
static void stretch_rope(Model *m, double factor, double trained, double fast, double slow, bool truncate)
{
    double dim = m->config.rotary_dim, theta = m->config.rope_theta;
    double low = dim * log(trained / (fast * 2 * M_PI)) / (2 * log(theta));
    double high = dim * log(trained / (slow * 2 * M_PI)) / (2 * log(theta));
    if (truncate) low = floor(low), high = ceil(high);
    low = fmax(low, 0), high = fmin(high, dim - 1);
    if (low == high) high += 0.001;
    for (int i = 0; i < m->config.rotary_dim / 2; i++) {
        double keep = 1 - fmin(fmax((i - low) / (high - low), 0), 1);
        m->inv_freq[i] = m->inv_freq[i] * keep + m->inv_freq[i] / factor * (1 - keep);
    }
}

/* Rotary frequencies: theta^(-2i/rotary_dim), as they are, all divided by a factor, or scaled by YaRN. */
static void read_rope(const Reader *r, Model *m)
{
    int half = m->config.rotary_dim / 2;
    Str type = meta_string(r, "rope_type");
    bool yarn = !strcmp(type.data, "yarn"), linear = !strcmp(type.data, "linear");
    if (!yarn && !linear && strcmp(type.data, "default"))
        die("%s: rope_type: wanted default, linear or yarn, found %.40s", r->file.path, type.data);
    free(type.data);
    m->rope_has_scaling = yarn || linear;
    m->rope_magnitude = 1;
    double factor = m->rope_has_scaling ? meta_float(r, "rope_factor", 1e-3, 1e6, NAN) : 1;
    m->inv_freq = grow(NULL, (size_t)half, sizeof *m->inv_freq);
    for (int i = 0; i < half; i++)
        m->inv_freq[i] = pow(m->config.rope_theta, -2.0 * i / m->config.rotary_dim) / (linear ? factor : 1);
    if (!yarn) return;
    double trained = meta_int(r, "rope_original_max_position_embeddings", 1, 1 << 28, 0);
    double fast = meta_float(r, "rope_beta_fast", 1e-6, 1e6, 32), slow = meta_float(r, "rope_beta_slow", 1e-6, 1e6, 1);
    m->rope_magnitude = (float)meta_float(r, "rope_attention_factor", 0, 1e3, NAN);
    stretch_rope(m, factor, trained, fast, slow, meta_int(r, "rope_truncate", 0, 1, 1));
}

/* Read the pieces of the chat template; all empty when the checkpoint has none. */
static void read_chat(const Reader *r, ChatPieces *c)
{
    const struct { const char *key; Str *piece; } pieces[] = {
        {"chat.prefix", &c->prefix}, {"chat.default_system", &c->default_system},
        {"chat.system_prefix", &c->system_prefix}, {"chat.system_suffix", &c->system_suffix},
        {"chat.user_prefix", &c->user_prefix}, {"chat.user_suffix", &c->user_suffix},
        {"chat.assistant_prefix", &c->assistant_prefix}, {"chat.assistant_suffix", &c->assistant_suffix},
        {"chat.generation_prompt", &c->generation_prompt}, {"chat.think_end", &c->think_end}};
    for (size_t i = 0; i < sizeof pieces / sizeof *pieces; i++) *pieces[i].piece = meta_string(r, pieces[i].key);
    c->present = find_meta(r, "chat.user_prefix", META_STRING) != NULL;
    if (c->present && !c->generation_prompt.len) die("%s: key chat.generation_prompt: missing or empty", r->file.path);
    for (size_t i = 0; i < c->think_end.len; i++)
        if (c->think_end.data[i] != '/') str_add(&c->think_start, c->think_end.data + i, 1);
    c->thinking = meta_int(r, "chat.thinking", 0, 1, 0) && c->think_start.len;
    c->opens_thinking = c->think_start.len && memmem(c->generation_prompt.data, c->generation_prompt.len, c->think_start.data, c->think_start.len);
    c->think_trim = meta_int(r, "chat.think_trim", 0, 15, 4);
    c->system_trim = meta_int(r, "chat.system_trim", 0, 15, 0);
    c->user_trim = meta_int(r, "chat.user_trim", 0, 15, 0);
    c->assistant_trim = meta_int(r, "chat.assistant_trim", 0, 15, 0);
}

/* Codebook, stop ids, tokenizer identity and sampling settings. */
static void read_defaults(const Reader *r, Model *m)
{
    const MetaRecord *levels = find_meta(r, "q4_levels", META_INT), *stops = find_meta(r, "stop_ids", META_INT);
    if (levels && levels->count != 32)
        die("%s: q4_levels: wanted 32 numbers, found %u", r->file.path, levels->count);
    for (uint32_t i = 0; levels && i < 32; i++) {
        int64_t level = meta_int_at(r, levels, i);
        if (level < -127 || level > 127)
            die("%s: q4_levels: wanted -127 to 127, found %lld", r->file.path, (long long)level);
        m->q4_levels[i] = (int8_t)level;
    }
    if (stops && stops->count > MAX_STOPS)
        die("%s: stop_ids: wanted at most %d, found %u", r->file.path, MAX_STOPS, stops->count);
    for (uint32_t i = 0; stops && i < stops->count; i++) {
        int64_t id = meta_int_at(r, stops, i);
        if (id < 0 || id >= m->config.vocab_size)
            die("%s: stop_ids: wanted ids below vocab_size %d, found %lld", r->file.path, m->config.vocab_size,
                (long long)id);
        m->stop_ids[m->n_stops++] = (int)id;
    }
    const MetaRecord *hash = find_meta(r, "tokenizer_hash", META_INT);
    m->tokenizer_hash = hash && hash->count ? (uint64_t)meta_int_at(r, hash, 0) : 0;
    m->sampling = (SamplerSettings){
        .temperature = (float)meta_float(r, "sampling.temperature", 0, 100, 1),
        .top_p = (float)meta_float(r, "sampling.top_p", 0, 1, 1),
        .min_p = (float)meta_float(r, "sampling.min_p", 0, 1, 0),
        .repetition_penalty = (float)meta_float(r, "sampling.repetition_penalty", 1e-3, 100, 1),
        .presence_penalty = (float)meta_float(r, "sampling.presence_penalty", -100, 100, 0),
        .top_k = meta_int(r, "sampling.top_k", 0, INT_MAX, 0)};
}

/* A layer's experts, or its one dense network. */
static void bind_mlp(Reader *r, const Config *c, const char *layer, bool sparse, Mlp *mlp)
{
    int D = c->hidden_size, E = c->num_experts, I = sparse ? c->moe_intermediate_size : c->intermediate_size;
    int shared = c->shared_expert_intermediate_size;
    if (!sparse) {
        mlp->gate_up_proj = bind_matrix(r, layer, "mlp.gate_up_proj", REQUIRED, 1, true, I, D);
        mlp->down_proj = bind_matrix(r, layer, "mlp.down_proj", REQUIRED, 1, false, D, I);
        return;
    }
    if (E < 1 || c->num_experts_per_tok < 1 || c->num_experts_per_tok > E)
        die("%s: num_experts_per_tok: wanted 1 to num_experts %d, found %d", r->file.path, E, c->num_experts_per_tok);
    mlp->gate = bind_matrix(r, layer, "mlp.gate", REQUIRED, SINGLE, false, E, D);
    mlp->gate_up_proj = bind_matrix(r, layer, "mlp.experts.gate_up_proj", REQUIRED, E, true, I, D);
    mlp->down_proj = bind_matrix(r, layer, "mlp.experts.down_proj", REQUIRED, E, false, D, I);
    mlp->shared_gate_up = bind_matrix(r, layer, "mlp.shared_expert.gate_up_proj", REQUIRED, 1, true, shared, D);
    mlp->shared_down = bind_matrix(r, layer, "mlp.shared_expert.down_proj", REQUIRED, 1, false, D, shared);
    mlp->shared_expert_gate = bind_floats(r, layer, "mlp.shared_expert_gate", REQUIRED, D, 0);
}

/* The tensors of a Gated DeltaNet mixer. */
static void bind_linear(Reader *r, const Config *c, const char *layer, LinearAttn *a)
{
    int D = c->hidden_size, nv = c->linear_num_value_heads;
    a->in_proj_qkvz = bind_matrix(r, layer, "linear_attn.in_proj_qkvz", REQUIRED, SINGLE, false, c->conv_dim + c->value_dim, D);
    a->in_proj_ba = bind_matrix(r, layer, "linear_attn.in_proj_ba", REQUIRED, SINGLE, false, 2 * nv, D);
    a->conv1d = bind_floats(r, layer, "linear_attn.conv1d", REQUIRED, c->linear_conv_kernel_dim, c->conv_dim);
    a->A_log = bind_floats(r, layer, "linear_attn.A_log", REQUIRED, nv, 0);
    a->dt_bias = bind_floats(r, layer, "linear_attn.dt_bias", REQUIRED, nv, 0);
    a->norm = bind_floats(r, layer, "linear_attn.norm", REQUIRED, c->linear_value_head_dim, 0);
    a->out_proj = bind_matrix(r, layer, "linear_attn.out_proj", REQUIRED, SINGLE, false, D, c->value_dim);
}

/* The tensors of a gated attention mixer. */
static void bind_attention(Reader *r, const Config *c, const char *layer, SelfAttn *a)
{
    int D = c->hidden_size, hd = c->head_dim, q_dim = c->num_attention_heads * hd;
    int rows = 2 * q_dim + 2 * c->num_key_value_heads * hd;
    a->qgkv_proj = bind_matrix(r, layer, "self_attn.qgkv_proj", REQUIRED, SINGLE, false, rows, D);
    a->qgkv_bias = bind_floats(r, layer, "self_attn.qgkv_bias", OPTIONAL, rows, 0);
    a->q_norm = bind_floats(r, layer, "self_attn.q_norm", REQUIRED, hd, 0);
    a->k_norm = bind_floats(r, layer, "self_attn.k_norm", REQUIRED, hd, 0);
    a->o_proj = bind_matrix(r, layer, "self_attn.o_proj", REQUIRED, SINGLE, false, D, q_dim);
    a->o_bias = bind_floats(r, layer, "self_attn.o_bias", OPTIONAL, D, 0);
}

/* All layers, each with the index of its state among its kind. */
static void bind_layers(Reader *r, Model *m)
{
    Config *c = &m->config;
    const MetaRecord *kinds = find_meta(r, "layer_types", META_INT), *mlps = find_meta(r, "mlp_types", META_INT);
    uint32_t n = (uint32_t)c->num_hidden_layers;
    if (!kinds || kinds->count != n || !mlps || mlps->count != n)
        die("%s: layer_types and mlp_types: wanted %u entries each, found %u and %u", r->file.path, n,
            kinds ? kinds->count : 0, mlps ? mlps->count : 0);
    m->layers = grow(NULL, n, sizeof *m->layers);
    memset(m->layers, 0, n * sizeof *m->layers);
    for (uint32_t i = 0; i < n; i++) {
        Layer *l = &m->layers[i];
        char layer[32];
        snprintf(layer, sizeof layer, "layers.%u.", i);
        int64_t kind = meta_int_at(r, kinds, i), mlp = meta_int_at(r, mlps, i);
        if ((kind | mlp) & ~1) die("%s: layer_types, mlp_types of layer %u: wanted 0 or 1", r->file.path, i);
        bool sparse = mlp == 1;
        l->full_attention = kind == 1;
        l->input_layernorm = bind_floats(r, layer, "input_layernorm", REQUIRED, c->hidden_size, 0);
        l->post_attention_layernorm = bind_floats(r, layer, "post_attention_layernorm", REQUIRED, c->hidden_size, 0);
        l->attn.index = c->n_full;
        l->linear.index = c->n_linear;
        *(l->full_attention ? &c->n_full : &c->n_linear) += 1;
        *(sparse ? &c->n_sparse : &c->n_dense) += 1;
        if (l->full_attention) bind_attention(r, c, layer, &l->attn);
        else bind_linear(r, c, layer, &l->linear);
        bind_mlp(r, c, layer, sparse, &l->mlp);
        if (sparse) l->mlp.index = c->n_sparse - 1;
    }
}

/* The multi-token prediction head, all of it or, without its first tensor, nothing. */
static void bind_mtp(Reader *r, const Config *c, Mtp *mtp)
{
    const char *layer = "mtp.layers.0.";
    int D = c->hidden_size;
    mtp->fc = bind_matrix(r, "", "mtp.fc", OPTIONAL, SINGLE, false, D, 2 * D);
    if (!mtp->fc.data) return;
    mtp->pre_fc_norm_embedding = bind_floats(r, "", "mtp.pre_fc_norm_embedding", REQUIRED, D, 0);
    mtp->pre_fc_norm_hidden = bind_floats(r, "", "mtp.pre_fc_norm_hidden", REQUIRED, D, 0);
    mtp->norm = bind_floats(r, "", "mtp.norm", REQUIRED, D, 0);
    mtp->layer = (Layer){.full_attention = true, .attn.index = c->n_full};
    mtp->layer.input_layernorm = bind_floats(r, layer, "input_layernorm", REQUIRED, D, 0);
    mtp->layer.post_attention_layernorm = bind_floats(r, layer, "post_attention_layernorm", REQUIRED, D, 0);
    bind_attention(r, c, layer, &mtp->layer.attn);
    bind_mlp(r, c, layer, c->num_experts > 0, &mtp->layer.mlp);
    mtp->layer.mlp.index = c->n_sparse;
}

/* The string of a list (size bytes at data) that begins at *at, after its length as u32; *at moves behind it. NULL: cut off. */
static const uint8_t *next_string(const uint8_t *data, size_t size, size_t *at, uint32_t *n)
{
    if (size - *at < sizeof *n) return NULL;
    memcpy(n, data + *at, sizeof *n);
    if (size - *at - sizeof *n < *n) return NULL;
    *at += sizeof *n + *n;
    return data + *at - *n;
}

/* The names of the classes, each one line of text. */
static Str *read_labels(const Reader *r, const MetaRecord *list)
{
    Str *labels = grow(NULL, list->count, sizeof *labels);
    memset(labels, 0, list->count * sizeof *labels);
    size_t at = 0;
    for (uint32_t i = 0, n; i < list->count; i++) {
        const uint8_t *text = next_string(r->file.data + list->offset, list->size, &at, &n);
        if (!text) die("%s: key labels: entry %u: cut off", r->file.path, i);
        for (uint32_t k = 0; k < n; k++)
            if (is_control(text + k, n - k)) die("%s: key labels: entry %u: wanted one line of text, found a control character", r->file.path, i);
        str_add(&labels[i], text, n);
    }
    return labels;
}

/* The head: its kind tells which matrix, and how many rows that has. */
static void bind_head(Reader *r, Model *m)
{
    Head *h = &m->head;
    Str kind = meta_string(r, "head");
    int D = m->config.hidden_size;
    for (h->kind = CAUSAL_LM; kind.len && h->kind < N_HEADS && strcmp(kind.data, HEAD_NAMES[h->kind]);) h->kind++;
    if (h->kind == N_HEADS)
        die("%s: key head: wanted causal_lm, ..._classification or question_answering, found %.40s", r->file.path, kind.data);
    free(kind.data);
    h->pad_token_id = meta_int(r, "pad_token_id", -1, m->config.vocab_size - 1, -1);
    if (h->kind == CAUSAL_LM) {
        h->weight = bind_matrix(r, "", "lm_head", OPTIONAL, SINGLE, false, m->config.vocab_size, D);
        if (!h->weight.data) h->weight = m->embed_tokens;
    } else if (h->kind == QUESTION_ANSWERING) {
        h->weight = bind_matrix(r, "", "qa_outputs", REQUIRED, SINGLE, false, 2, D);
        h->bias = bind_floats(r, "", "qa_outputs_bias", OPTIONAL, 2, 0);
    } else {
        const MetaRecord *list = find_meta(r, "labels", META_LIST);
        int n = list && list->count <= MAX_LABELS ? (int)list->count : 0;
        if (!n) die("%s: key labels: wanted 1 to %d names, found %u", r->file.path, MAX_LABELS, list ? list->count : 0);
        h->weight = bind_matrix(r, "", "score", REQUIRED, SINGLE, false, n, D);
        h->bias = bind_floats(r, "", "score_bias", OPTIONAL, n, 0);
        h->labels = read_labels(r, list);
    }
}

/* The hash of a checkpoint: of all between the header and the first tensor, and of the first 64 bytes of each. Damage further on in the
 * weights goes unseen: reading them all would take longer than the first answer. */
static uint64_t directory_hash(const Reader *r)
{
    static const uint8_t zeros[64];
    uint64_t tensors = FNV_BASIS;
    size_t first = r->file.size;
    for (uint32_t i = 0; i < r->header->n_tensors; i++) {
        const TensorRecord *t = &r->tensors[i];
        size_t n = min_size(64, t->size);
        tensors = fnv1a(zeros, 64 - n, fnv1a(r->file.data + t->offset, n, tensors));
        first = min_size(first, t->offset);
    }
    return fnv1a(r->file.data + 64, first - 64, FNV_BASIS) ^ tensors;
}

/* Open a checkpoint: afterwards every tensor's pointer points into the mapping and is safe to follow. */
static Model open_model(const char *path)
{
    Reader r = open_reader(path);
    Model m = {.file = r.file, .header = r.header, .meta = r.meta, .tensors = r.tensors};
    read_config(&r, &m.config);
    read_rope(&r, &m);
    read_defaults(&r, &m);
    read_chat(&r, &m.chat);
    int V = m.config.vocab_size, D = m.config.hidden_size;
    m.embed_tokens = bind_matrix(&r, "", "embed_tokens", REQUIRED, SINGLE, false, V, D);
    bind_layers(&r, &m);
    m.norm = bind_floats(&r, "", "norm", REQUIRED, D, 0);
    bind_head(&r, &m);
    if (m.head.kind == CAUSAL_LM) bind_mtp(&r, &m.config, &m.mtp);
    for (uint32_t i = 0; i < r.header->n_tensors; i++) {
        m.quantized |= r.tensors[i].type >= Q8;
        if (r.tensors[i].type == Q4 && !find_meta(&r, "q4_levels", META_INT)) die("%s: key q4_levels: missing", path);
    }
    if (r.bound != r.header->n_tensors)
        die("%s: n_tensors: this model has %u, found %u", path, r.bound, r.header->n_tensors);
    uint64_t hash = directory_hash(&r);
    if (!same_hash(r.header->hash, hash))
        die("%s: hash: wanted %016llx, found %016llx: damaged", path, (unsigned long long)r.header->hash, (unsigned long long)hash);
    return m;
}

/* ============================== Part II: the model ============================== */

/* ---- 6. Small blocks ---- */

/* One forward's context, handed to every stage of it. */
typedef struct {
    Engine *e;
    const Layer *layer;
    const int *tokens;    /* [n] */
    int n;                /* tokens in this batch */
    int pos;              /* position of the first of them */
    bool trial;           /* they may be taken back: DeltaNet states stay before them */
    const float *norm;    /* weight for the norm stage */
    bool add_out;         /* the norm stage first adds work.out to x */
} Pass;

/* A thread's own scratch: [scratch_len] */
static float *thread_scratch(const Work *w, int thread) { return w->scratch + (size_t)thread * w->scratch_len; }

/* y = x / sqrt(mean(x^2) + eps) * (1 + w): zero-centred RMSNorm, w stored as the distance from one. */
static void rmsnorm(const Kernels *kn, float *y, const float *x, const float *w, int n, float eps)
{
    float scale = 1 / sqrtf(kn->dot(x, x, n) / (float)n + eps);
    for (int i = 0; i < n; i++) y[i] = x[i] * scale * (1 + w[i]);
}

/* x = x / sqrt(sum(x^2) + 1e-6) * scale */
static void l2norm(const Kernels *kn, float *x, int n, float scale)
{
    scale /= sqrtf(kn->dot(x, x, n) + 1e-6f);
    for (int i = 0; i < n; i++) x[i] *= scale;
}

/* The largest of x[0..n), -inf when none is a number; TILE side by side, as vectors do it. */
static float largest(const float *x, int n)
{
    float top[TILE], max = -INFINITY;
    int i = 0;
    for (int j = 0; j < TILE; j++) top[j] = -INFINITY;
    for (; i + TILE <= n; i += TILE)
        for (int j = 0; j < TILE; j++) top[j] = x[i + j] > top[j] ? x[i + j] : top[j];
    for (; i < n; i++) max = x[i] > max ? x[i] : max;
    for (int j = 0; j < TILE; j++) max = top[j] > max ? top[j] : max;
    return max;
}

/* Index of the largest of x[0..n), the first of equals; 0 when none is a number. */
static int likeliest(const float *x, int n)
{
    float max = largest(x, n);
    for (int i = 0; i < n; i++)
        if (x[i] == max) return i;
    return 0;
}

/* x = x sigmoid(x); s is scratch [n] */
static void silu(const Kernels *kn, float *x, float *s, int n)
{
    kn->sigmoid(s, x, n);
    for (int i = 0; i < n; i++) x[i] *= s[i];
}

/* log(1 + e^x); beyond 20 that is x itself (PyTorch's threshold). */
static float softplus(float x) { return x > 20 ? x : log1pf(expf(x)); }

/* x = softmax(x) */
static void softmax(const Kernels *kn, float *x, int n)
{
    float scale = 1 / kn->exp_sum(x, largest(x, n), n);
    for (int i = 0; i < n; i++) x[i] *= scale;
}

/* Rotate the first rotary_dim of a head by the position's angles: (x_i, x_i+half) turn together; the rest stays.
 * rope: [half][cos, sin] */
static void rope_partial(float *x, const float *rope, int half)
{
    for (int i = 0; i < half; i++) {
        float a = x[i], b = x[i + half], c = rope[2 * i], s = rope[2 * i + 1];
        x[i] = a * c - b * s;
        x[i + half] = b * c + a * s;
    }
}

/* cos and sin for positions [pos, pos + n): rope is [n][rotary_dim / 2][2]. */
static void fill_rope(const Model *m, float *rope, int pos, int n)
{
    int half = m->config.rotary_dim / 2;
    for (int t = 0; t < n; t++)
        for (int i = 0; i < half; i++, rope += 2) {
            double angle = (double)(pos + t) * m->inv_freq[i]; /* double: exact enough at position 262,144 */
            rope[0] = (float)cos(angle) * m->rope_magnitude;
            rope[1] = (float)sin(angle) * m->rope_magnitude;
        }
}

/* Row r of an activation buffer in the form a matrix of this type multiplies with. */
static const void *act_row(const Acts *a, Type type, size_t r)
{
    return type >= Q8 ? (const void *)(a->q + r * a->blocks) : (const void *)(a->f + r * a->ld);
}

/* Make the int8 form of row r of a from its floats, when some matrix needs it. */
static void quantize_row(const Engine *e, Acts *a, size_t r)
{
    if (e->model.quantized) e->kernels->quantize(a->q + r * a->blocks, a->f + r * a->ld, a->cols);
}

/* Row r of a matrix as floats: embedding lookup. out: [cols] */
static void matrix_row(const Matrix *m, const int8_t *levels, int row, float *out)
{
    const uint8_t *tile = m->data + (size_t)(row / TILE) * m->tile_bytes;
    int r = row % TILE;
    for (int c = 0; c < m->cols; c++) {
        if (m->type == F32) {
            memcpy(&out[c], tile + ((size_t)c * TILE + r) * 4, 4);
        } else if (m->type == BF16) {
            out[c] = bf16_to_float(((const uint16_t *)tile)[(c / 2 * TILE + r) * 2 + c % 2]);
        } else { /* quantized: scales of a superblock, then groups of 4 columns: 16 rows x 4 */
            const uint8_t *super = tile + (size_t)(c / SUPER) * bytes_of_tile(m->type, SUPER);
            int block = c % SUPER / BLOCK, j = c % BLOCK / 4, byte = r * 4 + c % 4; /* group j of 4 columns */
            uint16_t bits = ((const uint16_t *)super)[block * TILE + r];
            float scale = bf16_to_float(bits);
            const uint8_t *q = super + 2 * TILE * 2 + (size_t)block * block_bytes(m->type);
            if (m->type == Q8) {
                out[c] = scale * (float)(q[j * 64 + byte] - 128);
            } else if (m->type == Q6) { /* two bits of four groups share a byte; four bits of two: j low, j + 4 high */
                int two = q[j / 4 * 64 + byte] >> j % 4 * 2 & 3, four = q[128 + j % 4 * 64 + byte] >> j / 4 * 4 & 15;
                out[c] = scale * (float)(four * 16 + two * 4 - 128);
            } else { /* the scale's lowest bit tells the codebook */
                int four = q[j % 4 * 64 + byte] >> j / 4 * 4 & 15;
                out[c] = scale * (float)levels[(bits & 1) * 16 + four];
            }
        }
    }
}

/* y = W x for n rows of activations, spread over the threads by groups of tiles. */
typedef struct {
    const Engine *e;
    const Matrix *w;
    const Acts *x;
    int n;
    size_t first;         /* row of x to begin with */
    float *y;             /* [n][ld], ld a multiple of TILE */
    size_t ld;
    const float *bias;    /* [rows] of the matrix in its order, or NULL; always NULL with `tiles` */
    const int *tiles;     /* [rows / TILE] which tiles of the matrix y is to have, or NULL: as they come */
} Matmul;

enum {
    ITEM_BYTES = 144 << 10,
    AHEAD_ROWS = 3 /* with fewer rows a tile is read faster than it can be fetched ahead: that would only disturb */
};

/* Tiles of one matrix. */
static int row_tiles(const Matrix *m) { return (m->rows + TILE - 1) / TILE; }

/* How many tiles one item takes: what a core's L2 holds beside the activations, and in decode a stretch of memory
 * long enough for the prefetcher; but never so many that threads would have nothing to do. */
static int item_tiles(const Engine *e, const Matrix *m)
{
    return max_int(1, min_int((int)(ITEM_BYTES / m->tile_bytes), row_tiles(m) / (4 * pool_threads(e->pool))));
}

/* How many items that makes. */
static int matrix_items(const Engine *e, const Matrix *m)
{
    int each = item_tiles(e, m);
    return (row_tiles(m) + each - 1) / each;
}

/* The tiles of one item: *first to *end - 1. */
static void item_range(const Engine *e, const Matrix *m, int item, int *first, int *end)
{
    int each = item_tiles(e, m);
    *first = item * each;
    *end = min_int(*first + each, row_tiles(m));
}

/* Rows for the next tile call when `left` are to go: the fewest calls, of about equal size. */
static int next_rows(const Kernels *kn, int left)
{
    int calls = (left + kn->rows - 1) / kn->rows;
    return (left + calls - 1) / calls;
}

/* One item of a matmul: a few tiles of rows for all n activations. */
static void matmul_item(void *arg, int item, int thread)
{
    (void)thread;
    const Matmul *m = arg;
    const Kernels *kn = m->e->kernels;
    int tile0, tile1;
    item_range(m->e, m->w, item, &tile0, &tile1);
    for (int t0 = 0, n; t0 < m->n; t0 += n) { /* rows outside: they stay in L1, the tiles in L2 */
        n = next_rows(kn, m->n - t0);
        const void *x[MAX_ROWS];
        for (int t = 0; t < n; t++) x[t] = act_row(m->x, m->w->type, m->first + (size_t)(t0 + t));
        for (int i = tile0; i < tile1; i++) {
            float y[MAX_ROWS][TILE];
            const uint8_t *tile = m->w->data + (size_t)(m->tiles ? m->tiles[i] : i) * m->w->tile_bytes;
            kn->tile[m->w->type](tile, m->w->cols, x, n, y, m->e->model.q4_levels, NULL);
            int valid = min_int(TILE, m->w->rows - i * TILE);
            for (int t = 0; t < n; t++) {
                float *out = m->y + (size_t)(t0 + t) * m->ld + (size_t)i * TILE;
                memcpy(out, y[t], sizeof y[t]);
                for (int r = 0; m->bias && r < valid; r++) out[r] += m->bias[i * TILE + r];
            }
        }
    }
}

/* y[t] = W x[first + t] (+ bias) for t < n. */
static void matmul(Engine *e, const Matrix *w, const Acts *x, size_t first, int n, float *y, size_t ld,
                   const float *bias)
{
    Matmul m = {e, w, x, n, first, y, ld, bias, NULL};
    parallel_for(e->pool, matrix_items(e, w), matmul_item, &m);
}

/* x += out (what the block before has made), then xn = norm(x), for one token. */
static void norm_item(void *arg, int t, int thread)
{
    (void)thread;
    Pass *p = arg;
    Work *w = &p->e->work;
    int D = p->e->model.config.hidden_size;
    size_t ld = w->xn.ld;
    float *x = w->x + (size_t)t * ld, *out = w->out + (size_t)t * ld;
    for (int i = 0; p->add_out && i < D; i++) x[i] += out[i];
    rmsnorm(p->e->kernels, w->xn.f + (size_t)t * ld, x, p->norm, D, p->e->model.config.rms_norm_eps);
    quantize_row(p->e, &w->xn, (size_t)t);
}

/* The norm stage for all tokens: work.xn from work.x, after adding work.out if asked to. */
static void add_and_norm(Pass *p, const float *weight, bool add_out)
{
    p->norm = weight;
    p->add_out = add_out;
    parallel_for(p->e->pool, p->n, norm_item, p);
}

/* The mixer's output of token t as int8. */
static void quantize_mix_item(void *arg, int t, int thread)
{
    (void)thread;
    Pass *p = arg;
    quantize_row(p->e, &p->e->work.mix, (size_t)t);
}

/* Write rows [n][cols] of an intermediate tensor as DIR/LAYER.NAME.npy (numpy's format), when asked to. Those of a later
 * batch are appended; of the MTP head, which runs draft by draft, the last draft's stay. */
static void dump(const Pass *p, const char *name, const float *data, int n, int cols, size_t ld)
{
    if (!p->e->dump_dir) return;
    char path[PATH_MAX], header[128], layer[32] = "";
    if (p->layer == &p->e->model.mtp.layer) strcpy(layer, "mtp.layers.0.");
    else if (p->layer) snprintf(layer, sizeof layer, "layers.%d.", (int)(p->layer - p->e->model.layers));
    snprintf(path, sizeof path, "%s/%s%s.npy", p->e->dump_dir, layer, name);
    int before = p->layer == &p->e->model.mtp.layer ? 0 : p->pos;
    FILE *f = fault() ? NULL : fopen(path, before ? "r+b" : "wb");
    if (!f) die("%s: %s", path, strerror(errno));
    memset(header, ' ', sizeof header);
    memcpy(header, "\x93NUMPY\x01\x00\x76\x00", 10);
    header[10 + snprintf(header + 10, 100, "{'descr': '<f4', 'fortran_order': False, 'shape': (%d, %d)}", before + n, cols)] = ' ';
    header[127] = '\n';
    fwrite(header, 1, sizeof header, f);
    fseek(f, 0, SEEK_END);
    for (int t = 0; t < n; t++) fwrite(data + (size_t)t * ld, sizeof(float), (size_t)cols, f);
    int error = write_error(f);
    if (fclose(f) && !error) error = errno;
    if (error) unlink(path);
    if (error) die("%s: %s", path, strerror(error));
}

/* ---- 7. Gated DeltaNet (arXiv 2412.06464) ----
 * Value head h takes its queries and keys from key head h / (nv / nk), so a key head serves nv / nk neighbours
 * (repeat_interleave). All heads are independent, and so are the columns of a head's state.
 *
 * Read it first without drafts: then nothing is on trial and tape_len is 0, so rows = kept = p->n, and all of every chunk stays. With
 * drafts (10a) the tokens of a forward on trial may be taken back, but S cannot: such a forward works on a copy of S, its raw inputs
 * go on a tape, and the next forward walks through as many of them first as were kept. */

/* The conv_dim raw inputs of the convolution in row `src` (the tape's first, see gdn_rows); before row 0 lies conv_state
 * [kernel - 1][conv_dim], whose last row is -1. */
static const float *conv_input(const Pass *p, const float *conv_state, int src)
{
    const Work *w = &p->e->work;
    const Config *c = &p->e->model.config;
    return src >= 0 ? w->proj + (size_t)src * w->proj_ld
                    : conv_state + (size_t)(src + c->linear_conv_kernel_dim - 1) * (size_t)c->conv_dim;
}

/* out[c] = silu(sum over j of conv1d[j][c] in[t - (kernel - 1) + j][c]): the causal depthwise convolution of row t for
 * `count` channels from `first`. s: scratch [count] */
static void conv_silu(const Pass *p, const float *conv_state, int first, int count, int t, float *out, float *s)
{
    const Config *c = &p->e->model.config;
    int taps = c->linear_conv_kernel_dim;
    for (int i = 0; i < count; i++) out[i] = 0;
    for (int j = 0; j < taps; j++) {
        const float *in = conv_input(p, conv_state, t - (taps - 1) + j);
        const float *tap = p->layer->linear.conv1d + (size_t)j * (size_t)c->conv_dim;
        for (int i = 0; i < count; i++) out[i] += tap[first + i] * in[first + i];
    }
    silu(p->e->kernels, out, s, count);
}

/* Rows of work.proj and work.ba that a DeltaNet layer works on: first those of tokens whose trial went well, which S and
 * conv have still to take in, then the batch. */
static int gdn_rows(const Pass *p) { return p->e->state.tape_len + p->n; }

/* How many of them S and conv take in: tokens on trial are not among them. */
static int gdn_kept_rows(const Pass *p) { return p->e->state.tape_len + (p->trial ? 0 : p->n); }

/* raw [kernel - 1][count] = the last raw inputs of conv as they are after the rows kept, oldest first, of `count` channels from `first`. */
static void last_inputs(const Pass *p, const float *conv_state, int first, int count, float *raw)
{
    int history = p->e->model.config.linear_conv_kernel_dim - 1, kept = gdn_kept_rows(p);
    for (int j = 0; j < history; j++)
        memcpy(raw + j * count, conv_input(p, conv_state, kept - history + j) + first, (size_t)count * sizeof *raw);
}

/* Item: a head of q, then of k, then of v, as their channels lie in a row of proj. All rows: convolve in place, last row first, so that
 * no input is overwritten before it has been used; then scale queries and keys (unit length; queries, as in attention, also by
 * 1 / sqrt(dk)). The state becomes the last kernel - 1 raw inputs kept. */
static void gdn_conv(void *arg, int item, int thread)
{
    const Pass *p = arg;
    const Config *c = &p->e->model.config;
    const Work *w = &p->e->work;
    int dk = c->linear_key_head_dim, dv = c->linear_value_head_dim, qk = 2 * c->linear_num_key_heads;
    int width = item < qk ? dk : dv, first = item < qk ? item * dk : 2 * c->key_dim + (item - qk) * dv;
    int history = c->linear_conv_kernel_dim - 1;
    size_t row = (size_t)c->conv_dim, bytes = (size_t)width * sizeof(float);
    float *state = p->e->state.conv + (size_t)p->layer->linear.index * p->e->state.conv_layer; /* [history][conv_dim] */
    float *out = thread_scratch(w, thread), *tmp = out + width; /* [width] each */
    float *raw = tmp + width; /* [history][width] */
    last_inputs(p, state, first, width, raw); /* before the rows are overwritten; conv_silu needs the old state, so it changes last */
    for (int t = gdn_rows(p) - 1; t >= 0; t--) {
        conv_silu(p, state, first, width, t, out, tmp);
        if (item < qk) l2norm(p->e->kernels, out, dk, item < qk / 2 ? 1 / sqrtf((float)dk) : 1);
        memcpy(w->proj + (size_t)t * w->proj_ld + first, out, bytes);
    }
    for (int j = 0; j < history; j++) memcpy(state + (size_t)j * row + first, raw + j * width, bytes);
}

/* How much of the memory stays and how strongly to write, for value head h of n rows from t0:
 * decay = exp(-exp(A_log) softplus(a + dt_bias)), beta = sigmoid(b) */
static void gdn_gates(const Pass *p, int h, int t0, int n, float *decay, float *beta)
{
    const Work *w = &p->e->work;
    const LinearAttn *a = &p->layer->linear;
    int nv = p->e->model.config.linear_num_value_heads;
    for (int t = 0; t < n; t++) {
        const float *ba = w->ba + (size_t)(t0 + t) * w->ba_ld;
        decay[t] = expf(-expf(a->A_log[h]) * softplus(ba[nv + h] + a->dt_bias[h]));
        beta[t] = 1 / (1 + expf(-ba[h]));
    }
}

/* out = o / rms(o) * w * silu(z): RMS over the head, a plain weight, then the gate. s: scratch [2 dv] */
static void gated_norm(const Pass *p, float *out, const float *o, const float *z, float *s)
{
    const Config *c = &p->e->model.config;
    const Kernels *kn = p->e->kernels;
    int dv = c->linear_value_head_dim;
    float scale = 1 / sqrtf(kn->dot(o, o, dv) / (float)dv + c->rms_norm_eps);
    float *gate = s + dv;
    memcpy(gate, z, (size_t)dv * sizeof *gate);
    silu(kn, gate, s, dv);
    for (int i = 0; i < dv; i++) out[i] = o[i] * scale * p->layer->linear.norm[i] * gate[i];
}

/* Value head h for all rows: gate, walk the state, norm what belongs to the batch. */
static void gdn_head(void *arg, int h, int thread)
{
    const Pass *p = arg;
    Engine *e = p->e;
    const Config *c = &e->model.config;
    Work *w = &e->work;
    int dk = c->linear_key_head_dim, dv = c->linear_value_head_dim, dvp = c->dvp;
    int kh = h / (c->linear_num_value_heads / c->linear_num_key_heads), rows = gdn_rows(p), kept = gdn_kept_rows(p);
    float *S = e->state.S + (size_t)p->layer->linear.index * e->state.S_layer + (size_t)h * (size_t)(dk * dvp); /* [dvp / TILE][dk][TILE] */
    float *o = thread_scratch(w, thread);  /* [GDN_CHUNK][dvp] */
    float *decay = o + GDN_CHUNK * dvp;    /* [GDN_CHUNK] */
    float *beta = decay + GDN_CHUNK;       /* [GDN_CHUNK] */
    float *tmp = beta + GDN_CHUNK;         /* [2 dvp] for gated_norm */
    float *trial = tmp + 2 * dvp;          /* [dk][TILE] copy of TILE columns of S */
    for (int t0 = 0; t0 < rows; t0 += GDN_CHUNK) {
        int chunk = min_int(GDN_CHUNK, rows - t0);
        int stay = max_int(0, min_int(chunk, kept - t0)); /* so many of its rows S takes in; the others are on trial */
        const float *q = w->proj + (size_t)t0 * w->proj_ld + kh * dk, *k = q + c->key_dim;
        const float *v = w->proj + (size_t)t0 * w->proj_ld + 2 * c->key_dim + h * dv;
        size_t to_trial = (size_t)stay * w->proj_ld; /* from the chunk's first row to its first on trial */
        gdn_gates(p, h, t0, chunk, decay, beta);
        /* The delta rule, TILE columns j at a time (FN(delta_rule) in section 15); for each token, over all i < dk:
         *     S[i][j] *= decay;              u[j] = beta (v[j] - sum of S[i][j] k[i])
         *     S[i][j] += k[i] u[j];          o[j] = sum of S[i][j] q[i]
         * Columns from dv to dvp are computed from what lies behind the head's v, and read by nobody. */
        for (int col = 0; col < dvp; col += TILE) {
            float *s = S + col * dk;
            if (stay) e->kernels->delta_rule(s, dk, stay, q, k, v + col, w->proj_ld, decay, beta, o + col, dvp);
            if (stay == chunk) continue;
            memcpy(trial, s, (size_t)dk * TILE * sizeof *s); /* the others see a copy, which is forgotten */
            e->kernels->delta_rule(trial, dk, chunk - stay, q + to_trial, k + to_trial, v + to_trial + col, w->proj_ld,
                                   decay + stay, beta + stay, o + stay * dvp + col, dvp);
        }
        /* the tape's rows had their outputs when they were on trial */
        for (int t = max_int(0, e->state.tape_len - t0); t < chunk; t++) {
            size_t token = (size_t)(t0 + t - e->state.tape_len);
            const float *z = w->proj + (size_t)(t0 + t) * w->proj_ld + c->conv_dim + h * dv;
            gated_norm(p, w->mix.f + token * w->mix.ld + h * dv, o + t * dvp, z, tmp);
        }
    }
}
/* Rows are at most MAX_TRIAL of the tape and MAX_TRIAL on trial. All must be of one chunk: the next would begin with S, not with
 * the copy. */
_Static_assert(2 * MAX_TRIAL <= GDN_CHUNK, "a trial's rows are walked through in one piece");

/* Put the tape's rows before the batch's, and the batch's, when it is on trial, on the tape. */
static void gdn_tape(const Pass *p)
{
    const Config *c = &p->e->model.config;
    const State *s = &p->e->state;
    const Work *w = &p->e->work;
    size_t conv = (size_t)c->conv_dim * sizeof(float), ba = 2 * (size_t)c->linear_num_value_heads * sizeof(float);
    float *tape = s->tape + (size_t)p->layer->linear.index * MAX_TRIAL * s->tape_row;
    for (int t = 0; t < s->tape_len; t++) {
        memcpy(w->proj + (size_t)t * w->proj_ld, tape + (size_t)t * s->tape_row, conv);
        memcpy(w->ba + (size_t)t * w->ba_ld, tape + (size_t)t * s->tape_row + c->conv_dim, ba);
    }
    for (int t = 0; p->trial && t < p->n; t++) {
        memcpy(tape + (size_t)t * s->tape_row, w->proj + (size_t)(s->tape_len + t) * w->proj_ld, conv);
        memcpy(tape + (size_t)t * s->tape_row + c->conv_dim, w->ba + (size_t)(s->tape_len + t) * w->ba_ld, ba);
    }
}

/* From projections to work.mix; with an empty batch only the tape goes into S and conv. */
static void gdn_walk(Pass *p)
{
    const Config *c = &p->e->model.config;
    gdn_tape(p);
    parallel_for(p->e->pool, 2 * c->linear_num_key_heads + c->linear_num_value_heads, gdn_conv, p);
    parallel_for(p->e->pool, c->linear_num_value_heads, gdn_head, p);
}

/* decay and beta of all value heads [n][nv], for --dump. */
static void dump_gates(const Pass *p)
{
    int nv = p->e->model.config.linear_num_value_heads;
    if (!p->e->dump_dir) return;
    float *gates = grow(NULL, (size_t)p->n * 2 * (size_t)nv, sizeof *gates); /* [n][decay of all, beta of all] */
    for (int t = 0; t < p->n; t++)
        for (int h = 0; h < nv; h++) {
            float *decay = gates + 2 * t * nv + h;
            gdn_gates(p, h, p->e->state.tape_len + t, 1, decay, decay + nv);
        }
    dump(p, "linear_attn.decay", gates, p->n, nv, 2 * (size_t)nv);
    dump(p, "linear_attn.beta", gates + nv, p->n, nv, 2 * (size_t)nv);
    free(gates);
}

/* The whole mixer: work.out = W_out (heads of W_in xn). */
static void gdn_mixer(Pass *p)
{
    Engine *e = p->e;
    Work *w = &e->work;
    const Config *c = &e->model.config;
    const LinearAttn *a = &p->layer->linear;
    double start = now();
    float *proj = w->proj + (size_t)e->state.tape_len * w->proj_ld, *ba = w->ba + (size_t)e->state.tape_len * w->ba_ld;
    matmul(e, &a->in_proj_qkvz, &w->xn, 0, p->n, proj, w->proj_ld, NULL);
    matmul(e, &a->in_proj_ba, &w->xn, 0, p->n, ba, w->ba_ld, NULL);
    double projected = now();
    dump(p, "linear_attn.in_proj_qkvz", proj, p->n, c->conv_dim + c->value_dim, w->proj_ld); /* all q, all k, all v, all z */
    dump(p, "linear_attn.in_proj_ba", ba, p->n, 2 * c->linear_num_value_heads, w->ba_ld);    /* all b, all a */
    w->mix.cols = c->value_dim;
    gdn_walk(p);
    dump(p, "linear_attn.query", proj, p->n, c->key_dim, w->proj_ld); /* convolved, silu, l2norm, / sqrt(dk) */
    dump(p, "linear_attn.key", proj + c->key_dim, p->n, c->key_dim, w->proj_ld); /* convolved, silu, l2norm */
    dump(p, "linear_attn.value", proj + 2 * c->key_dim, p->n, c->value_dim, w->proj_ld); /* convolved, silu */
    dump_gates(p);
    dump(p, "linear_attn.norm", w->mix.f, p->n, c->value_dim, w->mix.ld); /* gated by silu(z): what out_proj takes */
    parallel_for(e->pool, p->n, quantize_mix_item, p);
    double mixed = now();
    matmul(e, &a->out_proj, &w->mix, 0, p->n, w->out, w->xn.ld, NULL);
    e->seconds[T_DELTA] += mixed - projected;
    e->seconds[T_PROJ] += now() - mixed + projected - start;
}

/* ---- 8. Gated attention ----
 *     q, g, k, v = W x;   q = rope(norm(q)) / sqrt(hd);   k = rope(norm(k))
 *     mixer = W_o (softmax(q k') v * sigmoid(g)),   k and v of all positions up to the token's own
 *
 * Query head h reads KV head h / (H / G). attn_weights is the definition; all else takes KV_RANGE positions at a time and
 * never holds all scores. Of a range stay m = the largest score, l = sum of exp(score - m), o = sum of exp(score - m) v;
 * two of them merge as
 *
 *     m = max(m1, m2);   l = l1 exp(m1 - m) + l2 exp(m2 - m);   o = o1 exp(m1 - m) + o2 exp(m2 - m)
 *
 * and at the end softmax(q k') v = o / l. Up to MAX_ROWS tokens, an item is one range of a block of rows (attn_split, then
 * attn_join); with more, all ranges of a block (attn_block). Both merge from the first range to the last, hence the same bits. */

/* A row of proj: all heads' queries, all heads' gates (export.py undid the checkpoint's [query | gate] per head), keys,
 * values. This is the gate of head h of token t: [hd] */
static float *attn_gate(const Pass *p, int t, int h)
{
    const Config *c = &p->e->model.config;
    return p->e->work.proj + (size_t)t * p->e->work.proj_ld + (c->num_attention_heads + h) * c->head_dim;
}

/* Where position pos of a head's values begins for dims [16 d, 16 d + 16): values of one range lie together. */
static size_t v_offset(const Config *c, int pos, int d)
{
    size_t tiles = (size_t)(c->hdp / TILE);
    return ((size_t)(pos / KV_RANGE) * tiles + (size_t)d) * KV_RANGE * TILE + (size_t)(pos % KV_RANGE) * TILE;
}

/* Which of all heads of all layers KV head g of this layer is. */
static size_t kv_head(const Pass *p, int g)
{
    return (size_t)p->layer->attn.index * (size_t)p->e->model.config.num_key_value_heads + (size_t)g;
}

/* Store number i of a head's key or value as element `at` of its cache, in the cache's type. */
static void kv_put(KvType type, uint8_t *cache, size_t at, float x, float scale)
{
    if (type == KV_F32) ((float *)(void *)cache)[at] = x;
    if (type == KV_F16) ((uint16_t *)(void *)cache)[at] = float_to_f16(x);
    if (type == KV_Q8) ((int8_t *)cache)[at] = scale > 0 ? (int8_t)fminf(fmaxf(rintf(x / scale), -127), 127) : 0; /* beyond: denormals */
}

/* KV_Q8: x = scale * q with q from -127 to 127, for one head's key or value x[n]. A row that is not finite becomes 0. */
static float kv_scale(const float *x, int n)
{
    float max = 0;
    for (int i = 0; i < n; i++) {
        if (!(fabsf(x[i]) < INFINITY)) return 0;
        max = fmaxf(max, fabsf(x[i]));
    }
    return max / 127;
}

/* Norm and rotate one token's keys, and store its keys and values. */
static void attn_store(void *arg, int t, int thread)
{
    (void)thread;
    const Pass *p = arg;
    const Config *c = &p->e->model.config;
    const SelfAttn *a = &p->layer->attn;
    State *s = &p->e->state;
    int hd = c->head_dim, H = c->num_attention_heads, G = c->num_key_value_heads, pos = p->pos + t;
    const float *rope = p->e->work.rope + (size_t)t * (size_t)c->rotary_dim;
    float *k = p->e->work.proj + (size_t)t * p->e->work.proj_ld + 2 * H * hd /* behind queries and gates */, *v = k + G * hd;
    for (int g = 0; g < G; g++, k += hd, v += hd) {
        rmsnorm(p->e->kernels, k, k, a->k_norm, hd, c->rms_norm_eps);
        rope_partial(k, rope, c->rotary_dim / 2);
        size_t head = kv_head(p, g), scale = head * s->kv_positions + (size_t)pos;
        float k_scale = 0, v_scale = 0;
        if (s->kv_type == KV_Q8) {
            s->k_scale[scale] = k_scale = kv_scale(k, hd);
            s->v_scale[scale] = v_scale = kv_scale(v, hd);
        }
        for (int i = 0; i < hd; i++) {
            size_t at = ((size_t)(pos / TILE) * (size_t)hd + (size_t)i) * TILE + (size_t)(pos % TILE);
            kv_put(s->kv_type, s->k + head * s->kv_head_bytes, at, k[i], k_scale);
            kv_put(s->kv_type, s->v + head * s->kv_head_bytes, v_offset(c, pos, i / TILE) + (size_t)(i % TILE), v[i], v_scale);
        }
    }
}

/* Norm and rotate one token's queries; then its keys and values. */
static void attn_prepare(void *arg, int t, int thread)
{
    const Pass *p = arg;
    const Config *c = &p->e->model.config;
    int hd = c->head_dim;
    float *q = p->e->work.proj + (size_t)t * p->e->work.proj_ld;
    for (int h = 0; h < c->num_attention_heads; h++, q += hd) {
        rmsnorm(p->e->kernels, q, q, p->layer->attn.q_norm, hd, c->rms_norm_eps);
        rope_partial(q, p->e->work.rope + (size_t)t * (size_t)c->rotary_dim, c->rotary_dim / 2);
        for (int i = 0; i < hd; i++) q[i] *= 1 / sqrtf((float)hd); /* scores are q . k / sqrt(hd) */
    }
    attn_store(arg, t, thread);
}

/* What head h of token t looks at: weights = softmax(q k') over positions 0 to its own, written in whole tiles. The rest of this
 * section computes the same, for many rows at once and range by range, and sums up values with it. */
static void attn_weights(const Pass *p, int t, int h, float *weights)
{
    const Config *c = &p->e->model.config;
    const State *s = &p->e->state;
    size_t head = kv_head(p, h / c->group), width = KV_BYTES[s->kv_type];
    const void *q = p->e->work.proj + (size_t)t * p->e->work.proj_ld + h * c->head_dim; /* attn_prepare has divided it */
    const uint8_t *keys = s->k + head * s->kv_head_bytes;
    float y[1][TILE];
    int seen = p->pos + t + 1;
    for (int pos = 0; pos < seen; pos += TILE) { /* a tile of 16 keys */
        p->e->kernels->tile_kv[s->kv_type](keys + (size_t)pos * (size_t)c->head_dim * width, c->head_dim, &q, 1, y, NULL, NULL);
        memcpy(weights + pos, y[0], sizeof y[0]);
    }
    for (int pos = 0; s->kv_type == KV_Q8 && pos < seen; pos++) weights[pos] *= s->k_scale[head * s->kv_positions + (size_t)pos];
    softmax(p->e->kernels, weights, seen);
}

/* Of a query row and some positions; m = -inf: it may see none of them. */
typedef struct { float m, l; } Softmax;

/* Up to MAX_ROWS query rows of one KV head, and what a range of positions makes of them. */
typedef struct {
    const Pass *p;
    int g, row0, n;       /* KV head; first row and number of rows. Row r: token r / group, head g group + r % group */
    const void *q[MAX_ROWS];
    int last[MAX_ROWS];   /* the row's own position: what it may look at */
    Softmax sm[MAX_ROWS];
    float *o;             /* [n][hdp] */
} AttnRows;

/* All rows of `a` over range number `range`: a->o and a->sm become that range's partial result.
 * scratch: [MAX_ROWS][KV_RANGE], the scores, then the weights */
static void attn_range(AttnRows *a, int range, float *scratch)
{
    const Engine *e = a->p->e;
    const Config *c = &e->model.config;
    const State *s = &e->state;
    const void *weights[MAX_ROWS];
    float (*score)[KV_RANGE] = (float (*)[KV_RANGE])scratch, y[MAX_ROWS][TILE];
    int pos = range * KV_RANGE, count = min_int(KV_RANGE, a->last[a->n - 1] + 1 - pos);
    count = max_int(count, 0); /* 0: all of these rows' tokens lie before this range */
    int padded = (int)round_up((size_t)count, TILE);
    size_t head = kv_head(a->p, a->g), width = KV_BYTES[s->kv_type], first = head * s->kv_positions + (size_t)pos;
    const uint8_t *keys = s->k + head * s->kv_head_bytes, *values = s->v + head * s->kv_head_bytes;
    TileKernel *tile = e->kernels->tile_kv[s->kv_type];
    bool scaled = s->kv_type == KV_Q8;
    for (int i = 0; i < count; i += TILE) { /* scores = q . k: a tile of 16 keys against all rows */
        tile(keys + (size_t)(pos + i) * (size_t)c->head_dim * width, c->head_dim, a->q, a->n, y, NULL, NULL);
        for (int r = 0; r < a->n; r++) memcpy(score[r] + i, y[r], sizeof y[r]);
    }
    for (int r = 0; r < a->n; r++) { /* weights = exp(scores - the largest), 0 for what the row may not see */
        int seen = min_int(count, a->last[r] + 1 - pos);
        for (int i = 0; scaled && i < count; i++) score[r][i] *= s->k_scale[first + (size_t)i];
        float max = largest(score[r], seen);
        for (int i = max_int(seen, 0); i < padded; i++) score[r][i] = seen > 0 ? -INFINITY : 0;
        a->sm[r] = (Softmax){max, seen > 0 ? e->kernels->exp_sum(score[r], max, padded) : 0};
        for (int i = 0; scaled && i < count; i++) score[r][i] *= s->v_scale[first + (size_t)i];
        weights[r] = score[r];
    }
    for (int d = 0; d < c->hdp / TILE; d++) { /* o = weights . values: a tile of 16 dims */
        tile(values + v_offset(c, pos, d) * width, count, weights, a->n, y, NULL, NULL);
        for (int r = 0; r < a->n; r++) memcpy(a->o + r * c->hdp + d * TILE, y[r], sizeof y[r]);
    }
}

/* (o, sm) of the ranges so far takes in the next range's. */
static void attn_merge(float *o, Softmax *sm, const float *next, Softmax add, int n)
{
    if (add.m == -INFINITY) return;
    float m = fmaxf(sm->m, add.m), a = sm->m == -INFINITY ? 0 : expf(sm->m - m), b = expf(add.m - m);
    for (int i = 0; i < n; i++) o[i] = o[i] * a + next[i] * b;
    *sm = (Softmax){m, sm->l * a + add.l * b};
}

/* mix = o / l * sigmoid(gate), for one row. s: scratch [hd] */
static void attn_finish(const Pass *p, int g, int row, const float *o, float l, float *s)
{
    const Config *c = &p->e->model.config;
    int hd = c->head_dim, t = row / c->group, h = g * c->group + row % c->group;
    float *out = p->e->work.mix.f + (size_t)t * p->e->work.mix.ld + h * hd;
    p->e->kernels->sigmoid(s, attn_gate(p, t, h), hd);
    for (int i = 0; i < hd; i++) out[i] = o[i] / l * s[i];
}

/* The query rows of block `block` for KV head g; o: where their partial output goes. */
static AttnRows attn_rows(const Pass *p, int g, int block, float *o)
{
    const Config *c = &p->e->model.config;
    AttnRows a = {.p = p, .g = g, .row0 = block * p->e->kernels->rows, .o = o};
    a.n = min_int(p->e->kernels->rows, p->n * c->group - a.row0);
    for (int r = 0; r < a.n; r++) {
        int t = (a.row0 + r) / c->group, h = g * c->group + (a.row0 + r) % c->group;
        a.q[r] = p->e->work.proj + (size_t)t * p->e->work.proj_ld + h * c->head_dim;
        a.last[r] = p->pos + t;
    }
    return a;
}

static int attn_blocks(const Pass *p) /* of query rows that share a KV head's tiles */
{
    return (p->n * p->e->model.config.group + p->e->kernels->rows - 1) / p->e->kernels->rows;
}

/* Ranges that cover so many positions. */
static int attn_ranges(int positions) { return (positions + KV_RANGE - 1) / KV_RANGE; }

/* Many tokens: an item is a block of rows, which walks through all ranges. */
static void attn_block(void *arg, int item, int thread)
{
    const Pass *p = arg;
    int blocks = attn_blocks(p), hdp = p->e->model.config.hdp;
    float *scratch = thread_scratch(&p->e->work, thread); /* [MAX_ROWS][KV_RANGE] scores; at the end [hd] */
    float *part = scratch + MAX_ROWS * KV_RANGE;          /* [MAX_ROWS][hdp] one range's o */
    float *o = part + MAX_ROWS * hdp;                     /* [MAX_ROWS][hdp] merged */
    AttnRows a = attn_rows(p, item / blocks, item % blocks, part);
    Softmax sm[MAX_ROWS];
    for (int r = 0; r < a.n; r++) sm[r] = (Softmax){-INFINITY, 0};
    memset(o, 0, (size_t)(MAX_ROWS * hdp) * sizeof *o);
    for (int range = 0; range < attn_ranges(a.last[a.n - 1] + 1); range++) {
        attn_range(&a, range, scratch);
        for (int r = 0; r < a.n; r++) attn_merge(o + r * hdp, &sm[r], part + r * hdp, a.sm[r], hdp);
    }
    for (int r = 0; r < a.n; r++) attn_finish(p, a.g, a.row0 + r, o + r * hdp, sm[r].l, scratch);
}

/* Few tokens: an item is a block of rows and one range; the partial results are merged afterwards.
 * partial: [G][blocks][ranges] pieces of MAX_ROWS (hdp + TILE) floats, each o [n][hdp], then m and l of n rows */
static float *attn_partial(const Pass *p, int g, int block, int range, int ranges)
{
    size_t row = (size_t)p->e->model.config.hdp + TILE;
    size_t index = ((size_t)g * (size_t)attn_blocks(p) + (size_t)block) * (size_t)ranges + (size_t)range;
    return p->e->work.partial + index * MAX_ROWS * row;
}

/* One range of one block of rows into `partial`. */
static void attn_split(void *arg, int item, int thread)
{
    const Pass *p = arg;
    float *scratch = thread_scratch(&p->e->work, thread); /* [MAX_ROWS][KV_RANGE] */
    int ranges = attn_ranges(p->pos + p->n), blocks = attn_blocks(p), range = item % ranges;
    int block = item / ranges % blocks, g = item / ranges / blocks;
    float *partial = attn_partial(p, g, block, range, ranges);
    AttnRows a = attn_rows(p, g, block, partial);
    attn_range(&a, range, scratch);
    memcpy(partial + a.n * p->e->model.config.hdp, a.sm, (size_t)a.n * sizeof *a.sm);
}

/* Merge the ranges of one block of rows, in order, and finish its heads. */
static void attn_join(void *arg, int item, int thread)
{
    const Pass *p = arg;
    float *o = thread_scratch(&p->e->work, thread); /* [hdp], then [hd] for attn_finish */
    int blocks = attn_blocks(p), ranges = attn_ranges(p->pos + p->n), block = item % blocks, g = item / blocks;
    int hdp = p->e->model.config.hdp;
    AttnRows a = attn_rows(p, g, block, NULL);
    for (int r = 0; r < a.n; r++) {
        Softmax sm = {-INFINITY, 0}, add;
        memset(o, 0, (size_t)hdp * sizeof *o);
        for (int range = 0; range < ranges; range++) {
            const float *part = attn_partial(p, g, block, range, ranges);
            memcpy(&add, part + a.n * hdp + 2 * r, sizeof add);
            attn_merge(o, &sm, part + r * hdp, add, hdp);
        }
        attn_finish(p, g, a.row0 + r, o, sm.l, o + hdp);
    }
}

/* The whole mixer: work.out = W_o (heads of W_qgkv xn). */
static void attn_mixer(Pass *p)
{
    Engine *e = p->e;
    Work *w = &e->work;
    const Config *c = &e->model.config;
    const SelfAttn *a = &p->layer->attn;
    int G = c->num_key_value_heads, q_dim = c->num_attention_heads * c->head_dim, kv_dim = G * c->head_dim;
    double start = now();
    matmul(e, &a->qgkv_proj, &w->xn, 0, p->n, w->proj, w->proj_ld, a->qgkv_bias);
    double projected = now();
    dump(p, "self_attn.q_proj", w->proj, p->n, q_dim, w->proj_ld);
    dump(p, "self_attn.gate", w->proj + q_dim, p->n, q_dim, w->proj_ld); /* before sigmoid */
    dump(p, "self_attn.k_proj", w->proj + 2 * q_dim, p->n, kv_dim, w->proj_ld);
    dump(p, "self_attn.v_proj", w->proj + 2 * q_dim + kv_dim, p->n, kv_dim, w->proj_ld);
    parallel_for(e->pool, p->n, attn_prepare, p);
    dump(p, "self_attn.query", w->proj, p->n, q_dim, w->proj_ld); /* normed, rotated, / sqrt(hd) */
    dump(p, "self_attn.key", w->proj + 2 * q_dim, p->n, kv_dim, w->proj_ld); /* normed, rotated */
    w->mix.cols = q_dim;
    if (p->n <= MAX_ROWS) {
        parallel_for(e->pool, G * attn_blocks(p) * attn_ranges(p->pos + p->n), attn_split, p);
        parallel_for(e->pool, G * attn_blocks(p), attn_join, p);
    } else {
        parallel_for(e->pool, G * attn_blocks(p), attn_block, p);
    }
    dump(p, "self_attn.gated", w->mix.f, p->n, q_dim, w->mix.ld); /* attention times sigmoid(gate): what o_proj takes */
    parallel_for(e->pool, p->n, quantize_mix_item, p);
    double mixed = now();
    matmul(e, &a->o_proj, &w->mix, 0, p->n, w->out, w->xn.ld, a->o_bias);
    e->seconds[T_ATTN] += mixed - projected;
    e->seconds[T_PROJ] += now() - mixed + projected - start;
}

/* ---- 9. Mixture of experts ----
 * Prefill turns "the experts of a token" into "the tokens of an expert", so that weights come from memory once a batch.
 * Who stays in which cache: in `matmul` a few rows of activations (L1) meet a few tiles (L2); in `ffn_up_item` two tiles
 * stay while up to FFN_CHUNK of the expert's rows pass; in `ffn_down_item` an item owns some output rows and walks through all experts,
 * so that no two threads ever add to the same number and the order of the sum is fixed. While the last rows use a tile,
 * the next one is fetched: with few tokens an expert, prefill would else often wait for memory. */

/* Router: p = softmax(W x) over *all* experts, then the k largest, divided by their sum if norm_topk_prob says so;
 * and the shared expert's weight, sigmoid(shared_expert_gate . x).
 * Chosen experts are kept in ascending order: a token's sum over experts then has one order. */
static void moe_route_item(void *arg, int t, int thread)
{
    (void)thread;
    const Pass *p = arg;
    const Config *c = &p->e->model.config;
    Work *w = &p->e->work;
    int k = c->num_experts_per_tok, *chosen = w->top_expert + (size_t)t * (size_t)k;
    float *prob = w->router + (size_t)t * w->router_ld, *weight = w->top_weight + (size_t)t * (size_t)k, sum = 0;
    softmax(p->e->kernels, prob, c->num_experts);
    for (int i = 0; i < k; i++) {
        int best = likeliest(prob, c->num_experts), at = i;
        for (; at > 0 && chosen[at - 1] > best; at--) chosen[at] = chosen[at - 1], weight[at] = weight[at - 1];
        chosen[at] = best;
        weight[at] = prob[best];
        sum += prob[best];
        prob[best] = -1; /* out of the race */
    }
    for (int i = 0; c->norm_topk_prob && i < k; i++) weight[i] /= sum;
    const float *x = w->xn.f + (size_t)t * w->xn.ld;
    w->shared_weight[t] = 1 / (1 + expf(-p->e->kernels->dot(p->layer->mlp.shared_expert_gate, x, c->hidden_size)));
}

/* Where the items of the network after this one begin. */
static int ffn_end_item(const Ffn *f) { return f->first_item + (f->gate_up->rows + SUPER - 1) / SUPER; }

/* Append a network and the rows of its tokens to this batch's list. */
static void ffn_add(Work *w, const Matrix *gate_up, const Matrix *down, int expert, int first, int count)
{
    const Ffn *last = w->n_ffn ? &w->ffn[w->n_ffn - 1] : NULL;
    int item = last ? ffn_end_item(last) : 0;
    const uint8_t *up_at = gate_up->data + (size_t)expert * gate_up->matrix_bytes, *down_at = down->data + (size_t)expert * down->matrix_bytes;
    w->ffn[w->n_ffn++] = (Ffn){gate_up, down, {up_at, down_at}, NULL, expert, first, count, item};
}

/* Turn "which experts does a token want" into "which tokens does an expert get": one Ffn per expert in use, in
 * ascending order, its tokens in rows of work.inner one after the other; then the shared expert with all tokens. */
static void moe_group(const Pass *p)
{
    const Config *c = &p->e->model.config;
    const Mlp *mlp = &p->layer->mlp;
    Work *w = &p->e->work;
    int k = c->num_experts_per_tok, row = 0, E = c->num_experts;
    int *start = (int *)(void *)w->scratch; /* [E + 1] */
    memset(start, 0, (size_t)(E + 1) * sizeof *start);
    for (int i = 0; i < p->n * k; i++) start[w->top_expert[i] + 1]++; /* tokens of each expert, one place up */
    for (int expert = 0; expert < E; expert++) {
        int count = start[expert + 1];
        if (count) ffn_add(w, &mlp->gate_up_proj, &mlp->down_proj, expert, row, count);
        row += count;
        start[expert + 1] = row; /* now start[i] is the first row of expert i, ... */
    }
    for (int i = 0; i < p->n * k; i++) {
        int next = start[w->top_expert[i]]++; /* ... and from here on its next free row */
        w->row_token[next] = i / k;
        w->row_weight[next] = w->top_weight[i];
    }
    ffn_add(w, &mlp->shared_gate_up, &mlp->shared_down, 0, row, p->n);
    for (int t = 0; t < p->n; t++) {
        w->row_token[row + t] = t;
        w->row_weight[row + t] = w->shared_weight[t];
    }
}

/* The network that an item of ffn_up_item belongs to: the last one that begins at or before it. */
static const Ffn *ffn_of_item(const Work *w, int item)
{
    int lo = w->ffn_from, hi = w->ffn_to - 1;
    while (lo < hi) {
        int mid = (lo + hi + 1) / 2;
        if (w->ffn[mid].first_item <= item) lo = mid;
        else hi = mid - 1;
    }
    return &w->ffn[lo];
}

/* inner = silu(gate x) up x for one network and 64 of its intermediate units, all its tokens. */
static void ffn_up_item(void *arg, int item, int thread)
{
    const Pass *p = arg;
    const Engine *e = p->e;
    const Work *w = &e->work;
    const Kernels *kn = e->kernels;
    item += w->ffn[w->ffn_from].first_item; /* counted from the first network of the list */
    const Ffn *f = ffn_of_item(w, item);
    const Matrix *m = f->gate_up;
    int unit0 = (item - f->first_item) * SUPER; /* its first intermediate unit */
    int pairs = min_int(SUPER, (int)round_up((size_t)(m->rows - unit0), TILE)) / TILE; /* of a gate and an up tile */
    const uint8_t *tiles = f->weights[GATE_UP] + (size_t)(unit0 / TILE) * 2 * m->tile_bytes;
    experts_wait(e->experts, f, GATE_UP);
    float *inner = thread_scratch(w, thread); /* [FFN_CHUNK][SUPER] */
    float gate[MAX_ROWS][TILE], up[MAX_ROWS][TILE], s[TILE];
    for (int c0 = 0; c0 < f->count; c0 += FFN_CHUNK) {
        int chunk = min_int(FFN_CHUNK, f->count - c0);
        memset(inner, 0, (size_t)chunk * SUPER * sizeof *inner);
        for (int i = 0; i < pairs; i++)
            for (int t0 = 0, n; t0 < chunk; t0 += n) {
                n = next_rows(kn, chunk - t0);
                const void *x[MAX_ROWS];
                for (int t = 0; t < n; t++)
                    x[t] = act_row(&w->xn, m->type, (size_t)w->row_token[f->first + c0 + t0 + t]);
                const uint8_t *tile = tiles + (size_t)(2 * i) * m->tile_bytes, *up_tile = tile + m->tile_bytes;
                bool ahead = n >= AHEAD_ROWS && t0 + n == chunk && i + 1 < pairs; /* last use of these: fetch two more */
                const uint8_t *next = ahead ? up_tile + m->tile_bytes : NULL, *next_up = ahead ? next + m->tile_bytes : NULL;
                kn->tile[m->type](tile, m->cols, x, n, gate, e->model.q4_levels, next);
                kn->tile[m->type](up_tile, m->cols, x, n, up, e->model.q4_levels, next_up);
                for (int t = 0; t < n; t++) {
                    silu(kn, gate[t], s, TILE);
                    for (int r = 0; r < TILE; r++) inner[(t0 + t) * SUPER + i * TILE + r] = gate[t][r] * up[t][r];
                }
            }
        for (int t = 0; t < chunk; t++) {
            size_t row = (size_t)(f->first + c0 + t);
            if (f->down->type < Q8) memcpy(w->inner.f + row * w->inner.ld + unit0, inner + t * SUPER, SUPER * sizeof *inner);
            else kn->quantize(w->inner.q + row * w->inner.blocks + unit0 / SUPER, inner + t * SUPER, SUPER);
        }
    }
}

/* out = sum over a token's networks of weight . down inner, for a few tiles of rows: networks in ascending order. */
static void ffn_down_item(void *arg, int item, int thread)
{
    (void)thread;
    const Pass *p = arg;
    const Engine *e = p->e;
    const Work *w = &e->work;
    const Kernels *kn = e->kernels;
    /* All networks of a layer are cut like the first: an item's rows of the sum are its own. */
    int tile0, tile1;
    item_range(e, w->ffn->down, item, &tile0, &tile1);
    for (int t = 0; t < p->n && w->ffn_from == 0; t++)
        memset(w->out + (size_t)t * w->xn.ld + tile0 * TILE, 0, (size_t)((tile1 - tile0) * TILE) * sizeof(float));
    for (const Ffn *f = w->ffn + w->ffn_from; f < w->ffn + w->ffn_to; f++) {
        const Matrix *m = f->down;
        bool another = f + 1 < w->ffn + w->ffn_to && f[1].down == m; /* an expert after this one */
        experts_wait(e->experts, f, DOWN);
        for (int row0 = f->first, n; row0 < f->first + f->count; row0 += n) {
            n = next_rows(kn, f->first + f->count - row0);
            bool ahead = another && n >= AHEAD_ROWS && row0 + n == f->first + f->count; /* the last use of this one's tiles */
            const void *x[MAX_ROWS];
            for (int r = 0; r < n; r++) x[r] = act_row(&w->inner, m->type, (size_t)(row0 + r));
            for (int i = tile0; i < tile1; i++) {
                float y[MAX_ROWS][TILE];
                const uint8_t *tile = f->weights[DOWN] + (size_t)i * m->tile_bytes;
                const uint8_t *next = ahead ? f[1].weights[DOWN] + (size_t)i * m->tile_bytes : NULL;
                kn->tile[m->type](tile, m->cols, x, n, y, e->model.q4_levels, next);
                for (int r = 0; r < n; r++) {
                    float *out = w->out + (size_t)w->row_token[row0 + r] * w->xn.ld + i * TILE;
                    kn->add_scaled(out, y[r], w->row_weight[row0 + r], TILE);
                }
            }
        }
    }
}

/* Make the next networks of the list, or as many as there is room for, ready to run: ffn_from to ffn_to. A scan wants
 * nearly all experts of the layer, and of the next. */
static void fetch_networks(const Pass *p, bool scan)
{
    const Engine *e = p->e;
    Work *w = &p->e->work;
    const Layer *last = e->model.layers + e->model.config.num_hidden_layers - 1;
    w->ffn_to = w->n_ffn;
    if (!e->experts || !p->layer->mlp.gate.data) return; /* a dense layer is always there */
    w->ffn_to = w->ffn_from + experts_fetch(e->experts, &p->layer->mlp, w->ffn + w->ffn_from, w->n_ffn - w->ffn_from, scan);
    bool another = p->layer != last && p->layer != &e->model.mtp.layer && p->layer[1].mlp.gate.data;
    if (scan && another && w->ffn_to == w->n_ffn) experts_ahead(e->experts, &p->layer[1].mlp);
}

/* Wait for a part of all networks that run now. In a scan each item waits for its own instead, and the first experts are
 * used while the others are on their way; where reading is all there is to do, it is better to sleep than to spin. */
static void wait_for_networks(const Pass *p, int part, bool scan)
{
    const Work *w = &p->e->work;
    for (int i = w->ffn_from; !scan && i < w->ffn_to; i++) experts_wait(p->e->experts, &w->ffn[i], part);
}

/* work.out = sum over the networks of the list, all at once or in groups that the expert cache can hold. */
static void run_networks(Pass *p)
{
    Engine *e = p->e;
    Work *w = &e->work;
    bool scan = p->layer->mlp.gate.data && p->n * e->model.config.num_experts_per_tok >= 2 * e->model.config.num_experts;
    for (w->ffn_from = 0; w->ffn_from < w->n_ffn; w->ffn_from = w->ffn_to) {
        fetch_networks(p, scan);
        wait_for_networks(p, GATE_UP, scan);
        parallel_for(e->pool, ffn_end_item(&w->ffn[w->ffn_to - 1]) - w->ffn[w->ffn_from].first_item, ffn_up_item, p);
        wait_for_networks(p, DOWN, scan);
        parallel_for(e->pool, matrix_items(e, w->ffn->down), ffn_down_item, p); /* every network's down has as many rows */
    }
}

/* The chosen experts of each token, in ascending order, and their weights, for --dump. */
static void dump_experts(const Pass *p)
{
    const Work *w = &p->e->work;
    int k = p->e->model.config.num_experts_per_tok;
    if (!p->e->dump_dir) return;
    float *numbers = grow(NULL, (size_t)p->n * (size_t)k, sizeof *numbers);
    for (int i = 0; i < p->n * k; i++) numbers[i] = (float)w->top_expert[i];
    dump(p, "mlp.top_expert", numbers, p->n, k, (size_t)k);
    dump(p, "mlp.top_weight", w->top_weight, p->n, k, (size_t)k);
    free(numbers);
}

/* The whole MLP: work.out = sum over networks of weight . down(silu(gate xn) up xn). */
static void mlp_block(Pass *p)
{
    Engine *e = p->e;
    Work *w = &e->work;
    const Config *c = &e->model.config;
    const Mlp *mlp = &p->layer->mlp;
    double start = now();
    w->n_ffn = 0;
    if (mlp->gate.data) {
        matmul(e, &mlp->gate, &w->xn, 0, p->n, w->router, w->router_ld, NULL);
        dump(p, "mlp.gate", w->router, p->n, c->num_experts, w->router_ld); /* the router's logits */
        parallel_for(e->pool, p->n, moe_route_item, p);
        dump_experts(p);
        dump(p, "mlp.shared_weight", w->shared_weight, p->n, 1, 1); /* sigmoid(shared_expert_gate . x) */
        moe_group(p);
    } else { /* a dense layer: one network for all tokens */
        ffn_add(w, &mlp->gate_up_proj, &mlp->down_proj, 0, 0, p->n);
        for (int t = 0; t < p->n; t++) w->row_token[t] = t, w->row_weight[t] = 1;
    }
    run_networks(p);
    dump(p, "mlp", w->out, p->n, c->hidden_size, w->xn.ld);
    e->seconds[T_MOE] += now() - start;
}

/* ---- 10. Forward ---- */

static size_t kv_bytes(const State *s, const Config *c, int n); /* section 11 */
static void mtp_fill(Engine *e);                                /* section 10a, as the next */
static void mtp_wait_item(void *arg, int t, int thread);
static void trace_mixer(const Pass *p);                         /* what -m trace shows of a layer: section 19a, as the next */
static void trace_layer(Pass *p);

/* The embedding of token t opens its residual stream. */
static void embed_item(void *arg, int t, int thread)
{
    (void)thread;
    const Pass *p = arg;
    const Model *m = &p->e->model;
    matrix_row(&m->embed_tokens, m->q4_levels, p->tokens[t], p->e->work.x + (size_t)t * p->e->work.xn.ld);
}

/* x += mixer(norm(x));  x += mlp(norm(x)). What is in work.out is always added to x by the norm that follows: a layer's first norm adds the
 * MLP of the layer before, if there is one (add_out), its second norm the mixer. */
static void decoder_layer(Pass *p, bool add_out)
{
    const Work *w = &p->e->work;
    int D = p->e->model.config.hidden_size;
    add_and_norm(p, p->layer->input_layernorm, add_out);
    dump(p, "input", w->x, p->n, D, w->xn.ld);
    dump(p, "input_layernorm", w->xn.f, p->n, D, w->xn.ld);
    if (p->layer->full_attention) attn_mixer(p);
    else gdn_mixer(p);
    dump(p, p->layer->full_attention ? "self_attn" : "linear_attn", w->out, p->n, D, w->xn.ld);
    if (p->e->trace) trace_mixer(p);
    add_and_norm(p, p->layer->post_attention_layernorm, true);
    dump(p, "post_attention_layernorm", w->xn.f, p->n, D, w->xn.ld);
    mlp_block(p);
    if (p->e->trace) trace_layer(p);
}

/* What becomes of a forward's tokens. TRIAL: n <= MAX_TRIAL, and state_keep says afterwards how many of them stay. STOPPABLE:
 * an interrupt ends it before its next layer, and the caller gives the state up or takes one that was remembered. */
typedef enum { KEPT, TRIAL, STOPPABLE } Forward;

/* Run n tokens, at most work.batch or, on trial, MAX_TRIAL, through all layers, extending the state by them. Afterwards work.xn
 * holds the rows after the final norm. The caller has made sure that n more positions fit into the context. False when it was
 * stopped. */
static bool forward(Engine *e, const int *tokens, int n, Forward kind)
{
    State *s = &e->state;
    const Model *m = &e->model;
    if (s->mtp && s->tokens.len - s->mtp_len + n > e->work.pair_rows) mtp_fill(e);
    if (e->experts) experts_make_way(e->experts, kv_bytes(s, &m->config, s->tokens.len + n));
    Pass p = {.e = e, .tokens = tokens, .n = n, .pos = s->tokens.len, .trial = kind == TRIAL};
    fill_rope(m, e->work.rope, p.pos, n);
    parallel_for(e->pool, n, embed_item, &p);
    dump(&p, "embed_tokens", e->work.x, n, m->config.hidden_size, e->work.xn.ld);
    for (int i = 0; i < m->config.num_hidden_layers; i++) {
        if (kind == STOPPABLE && interrupted) return false;
        p.layer = &m->layers[i];
        decoder_layer(&p, i > 0);
    }
    p.layer = NULL;
    add_and_norm(&p, m->norm, true);
    dump(&p, "output", e->work.x, n, m->config.hidden_size, e->work.xn.ld);
    dump(&p, "norm", e->work.xn.f, n, m->config.hidden_size, e->work.xn.ld);
    if (s->mtp) parallel_for(e->pool, n, mtp_wait_item, &p);
    for (int t = 0; t < n; t++) tokens_add(&s->tokens, tokens[t]);
    s->tape_len = p.trial ? n : 0;
    memcpy(s->last_hidden, e->work.xn.f + (size_t)(n - 1) * e->work.xn.ld, (size_t)m->config.hidden_size * sizeof(float));
    return true;
}

/* Logits of rows [first, first + n) of the last forward, n <= HEAD_ROWS: work.logits[i][rows of the head]. */
static const float *head_logits(Engine *e, int first, int n)
{
    double start = now();
    matmul(e, &e->model.head.weight, &e->work.xn, (size_t)first, n, e->work.logits, e->work.logits_ld, e->model.head.bias);
    e->seconds[T_HEAD] += now() - start;
    return e->work.logits;
}

/* Logits of the last token fed, whatever has been computed since: work.logits[0][vocab]. */
static const float *last_logits(Engine *e)
{
    Work *w = &e->work;
    memcpy(w->xn.f, e->state.last_hidden, (size_t)e->model.config.hidden_size * sizeof(float));
    quantize_row(e, &w->xn, 0);
    return head_logits(e, 0, 1);
}

/* ---- 10a. Multi-token prediction (arXiv 2412.19437, section 2.2) ----
 * One more layer guesses a token further ahead. For position t, with h the row after the model's final norm:
 *
 *     x = W_fc [norm(embed[token t+1]), norm(h_t)];   y = norm(layer(x));   logits of token t+2 = lm_head . y
 *
 * and, guess after guess, y takes the place of h. The layer attends to its own keys and values of all earlier positions,
 * and these need nothing of the layer but x. A row h_t waits in work.pair until the token after it is known; then rows
 * are turned into keys and values, many at once. */

/* The hidden half of row `row` of work.pair becomes norm(h). h: [D] */
static void mtp_hidden(const Engine *e, int row, const float *h)
{
    const Config *c = &e->model.config;
    float *half = e->work.pair.f + (size_t)row * e->work.pair.ld + c->hidden_size;
    rmsnorm(e->kernels, half, h, e->model.mtp.pre_fc_norm_hidden, c->hidden_size, c->rms_norm_eps);
}

/* h of token t of the batch takes its place among the waiting rows. */
static void mtp_wait_item(void *arg, int t, int thread)
{
    (void)thread;
    const Pass *p = arg;
    const Acts *xn = &p->e->work.xn;
    mtp_hidden(p->e, p->pos + t - p->e->state.mtp_len, xn->f + (size_t)t * xn->ld);
}

/* The other half of a waiting row: token t's embedding, normed. The pass: tokens from the first waiting row on. */
static void mtp_embed_item(void *arg, int t, int thread)
{
    (void)thread;
    const Pass *p = arg;
    const Model *m = &p->e->model;
    float *row = p->e->work.pair.f + (size_t)t * p->e->work.pair.ld;
    matrix_row(&m->embed_tokens, m->q4_levels, p->tokens[t], row);
    rmsnorm(p->e->kernels, row, row, m->mtp.pre_fc_norm_embedding, m->config.hidden_size, m->config.rms_norm_eps);
    quantize_row(p->e, &p->e->work.pair, (size_t)t);
}

/* Rows [first, first + count) of a matrix; first begins a tile. */
static Matrix some_rows(const Matrix *m, int first, int count)
{
    Matrix part = *m;
    part.rows = count;
    part.data = m->data + (size_t)(first / TILE) * m->tile_bytes;
    return part;
}

/* Keys and values for the waiting rows whose next token has been fed: all but the last. */
static void mtp_fill(Engine *e)
{
    State *s = &e->state;
    Work *w = &e->work;
    const Config *c = &e->model.config;
    const Mtp *mtp = &e->model.mtp;
    int total = max_int(0, s->tokens.len - 1 - s->mtp_len);
    int first = 2 * c->num_attention_heads * c->head_dim / TILE * TILE; /* the tile in which keys begin */
    const float *bias = mtp->layer.attn.qgkv_bias;
    Matrix kv = some_rows(&mtp->layer.attn.qgkv_proj, first, mtp->layer.attn.qgkv_proj.rows - first);
    for (int done = 0, n; done < total; done += n) {
        n = min_int(total - done, w->batch);
        Pass p = {.e = e, .layer = &mtp->layer, .tokens = s->tokens.id + s->mtp_len + 1, .n = n, .pos = s->mtp_len};
        parallel_for(e->pool, n, mtp_embed_item, &p);
        matmul(e, &mtp->fc, &w->pair, 0, n, w->x, w->xn.ld, NULL);
        add_and_norm(&p, mtp->layer.input_layernorm, false);
        matmul(e, &kv, &w->xn, 0, n, w->proj + first, w->proj_ld, bias ? bias + first : NULL);
        fill_rope(&e->model, w->rope, p.pos, n);
        parallel_for(e->pool, n, attn_store, &p);
        s->mtp_len += n; /* the others move up */
        memmove(w->pair.f, w->pair.f + (size_t)n * w->pair.ld, (size_t)(s->tokens.len - s->mtp_len) * w->pair.ld * sizeof(float));
    }
}

/* A token's row of the output head is to be among those that drafts are looked for in. */
static void shortlist_add(Shortlist *s, int id)
{
    if (s->has[id / TILE]) return;
    s->has[id / TILE] = true;
    s->tile[s->n++] = id / TILE;
}

/* Begin with the first tokens of the vocabulary. It is sorted: merges that are more frequent come first. */
static void shortlist_init(Shortlist *s, int vocab)
{
    int tiles = (vocab + TILE - 1) / TILE;
    s->tile = grow(NULL, (size_t)tiles, sizeof *s->tile);
    s->has = grow(NULL, (size_t)tiles, sizeof *s->has);
    memset(s->has, 0, (size_t)tiles * sizeof *s->has);
    for (int id = 0; id < min_int(vocab, SHORTLIST_IDS); id += TILE) shortlist_add(s, id);
}

/* The likeliest next token by row 0 of work.xn, of those in the list, and its probability among them. */
static int shortlist_guess(Engine *e, const Shortlist *list, double *p)
{
    Work *w = &e->work;
    Matrix part = e->model.head.weight;
    part.rows = list->n * TILE;
    Matmul m = {e, &part, &w->xn, 1, 0, w->logits, w->logits_ld, NULL, list->tile};
    parallel_for(e->pool, matrix_items(e, &part), matmul_item, &m);
    for (int i = 0; i < list->n; i++) /* rows that pad the vocabulary are never drawn */
        for (int id = max_int(list->tile[i] * TILE, e->model.config.tokenizer_size); id < (list->tile[i] + 1) * TILE; id++)
            w->logits[i * TILE + id % TILE] = -INFINITY;
    int best = likeliest(w->logits, part.rows);
    *p = 1 / (double)e->kernels->exp_sum(w->logits, w->logits[best], part.rows);
    return list->tile[best / TILE] * TILE + best % TILE;
}

/* Run the head for the token i < MAX_TRIAL places after the first not yet fed: `token`, that one itself (i = 0) or the i-th guess.
 * Afterwards row 0 of work.xn holds y, to guess the next token by. This leaves nothing behind: keys and values will be overwritten. */
static void mtp_step(Engine *e, int token, int i)
{
    const Model *m = &e->model;
    Work *w = &e->work;
    int next[MAX_TRIAL] = {0};
    if (i == 0) mtp_fill(e);
    next[i] = token; /* row i of work.pair is the one it belongs to */
    Pass p = {.e = e, .layer = &m->mtp.layer, .tokens = next, .n = 1, .pos = e->state.mtp_len + i};
    mtp_embed_item(&p, i, 0);
    matmul(e, &m->mtp.fc, &w->pair, (size_t)i, 1, w->x, w->xn.ld, NULL);
    fill_rope(m, w->rope, p.pos, 1);
    decoder_layer(&p, false);
    add_and_norm(&p, m->mtp.norm, true);
    mtp_hidden(e, i + 1, w->xn.f); /* y takes h's place */
}

/* The likeliest token after the i-th: a guess, with its probability in the head's eyes. */
static int mtp_guess(Engine *e, int token, int i, const Shortlist *list, double *p)
{
    mtp_step(e, token, i);
    return shortlist_guess(e, list, p);
}

/* ---- 11. State: allocation, snapshots ---- */

/* Forget everything: the state of an empty text. */
static void state_reset(State *s)
{
    s->tokens.len = s->tape_len = s->mtp_len = 0;
    memset(s->recurrent, 0, s->recurrent_len * sizeof *s->recurrent);
}

/* Bytes that the keys and values of n positions take. */
static size_t kv_bytes(const State *s, const Config *c, int n)
{
    size_t scales = s->kv_type == KV_Q8 ? sizeof(float) : 0;
    return 2 * s->kv_heads * (size_t)n * ((size_t)c->hdp * KV_BYTES[s->kv_type] + scales);
}

/* Reserve memory for ctx positions; it is committed as it is used. mtp: keep what drafting needs, too. */
static void state_init(State *s, const Config *c, int ctx, KvType kv_type, bool mtp)
{
    size_t linear = (size_t)c->n_linear, heads = mul((size_t)(c->n_full + mtp), (size_t)c->num_key_value_heads);
    s->ctx = ctx;
    s->mtp = mtp;
    s->kv_type = kv_type;
    s->kv_heads = heads;
    s->kv_positions = round_up((size_t)ctx, KV_RANGE);
    s->kv_head_bytes = mul(s->kv_positions, (size_t)c->hdp) * KV_BYTES[kv_type];
    s->k = (uint8_t *)reserve(mul(s->kv_head_bytes, heads) / 4, "keys");
    s->v = (uint8_t *)reserve(mul(s->kv_head_bytes, heads) / 4, "values");
    s->k_scale = kv_type == KV_Q8 ? reserve(mul(s->kv_positions, heads), "scales of keys") : NULL;
    s->v_scale = kv_type == KV_Q8 ? reserve(mul(s->kv_positions, heads), "scales of values") : NULL;
    s->S_layer = mul((size_t)c->linear_num_value_heads * (size_t)c->dvp, (size_t)c->linear_key_head_dim);
    s->conv_layer = (size_t)(c->linear_conv_kernel_dim - 1) * (size_t)c->conv_dim;
    s->recurrent_len = linear * (s->S_layer + s->conv_layer) + (size_t)c->hidden_size;
    s->recurrent = reserve(s->recurrent_len, "recurrent state");
    s->S = s->recurrent;
    s->conv = s->S + linear * s->S_layer;
    s->last_hidden = s->conv + linear * s->conv_layer;
    s->tape_row = (size_t)c->conv_dim + 2 * (size_t)c->linear_num_value_heads;
    s->tape = reserve(mtp ? linear * MAX_TRIAL * s->tape_row : 0, "tape");
}

/* Of the n tokens of the last forward, which was on trial, only the first `kept` >= 1 stay. */
static void state_keep(Engine *e, int n, int kept)
{
    State *s = &e->state;
    s->tokens.len -= n - kept;
    s->tape_len = kept;
    memcpy(s->last_hidden, e->work.xn.f + (size_t)(kept - 1) * e->work.xn.ld, (size_t)e->model.config.hidden_size * sizeof(float));
}

/* Bring S and conv up to the last token. */
static void state_settle(Engine *e)
{
    Pass p = {.e = e};
    if (!e->state.tape_len) return;
    for (int i = 0; i < e->model.config.num_hidden_layers; i++) {
        p.layer = &e->model.layers[i];
        if (!p.layer->full_attention) gdn_walk(&p);
    }
    e->state.tape_len = 0;
}

/* The last token's row waits for its next token again, though this was known once. */
static void mtp_wait_again(Engine *e)
{
    e->state.mtp_len = max_int(0, e->state.tokens.len - 1);
    if (e->state.mtp) mtp_hidden(e, 0, e->state.last_hidden);
}

/* Remember the state as it is now. */
static void snapshot_take(Snapshot *snap, Engine *e)
{
    const State *s = &e->state;
    state_settle(e);
    if (s->mtp) mtp_fill(e); /* so that restoring needs but one row: last_hidden's */
    if (!snap->recurrent) snap->recurrent = grow(NULL, s->recurrent_len, sizeof *snap->recurrent);
    memcpy(snap->recurrent, s->recurrent, s->recurrent_len * sizeof *s->recurrent);
    snap->n_tokens = s->tokens.len;
}

/* Back to the length the snapshot was taken at; keys and values beyond it are simply overwritten later. */
static void snapshot_restore(const Snapshot *snap, Engine *e)
{
    State *s = &e->state;
    memcpy(s->recurrent, snap->recurrent, s->recurrent_len * sizeof *s->recurrent);
    s->tape_len = 0;
    s->tokens.len = snap->n_tokens;
    mtp_wait_again(e);
}

/* Forget a snapshot. */
static void snapshot_drop(Snapshot *snap)
{
    free(snap->recurrent);
    *snap = (Snapshot){0};
}

/* Floats from row to row of a buffer with so many columns: an odd number of tiles (cache lines). At a power of two
 * the same column of all tokens would fall into one set of the cache, and push itself out. */
static size_t row_stride(size_t cols, size_t multiple)
{
    size_t ld = round_up(cols, multiple);
    return ld / TILE % 2 ? ld : ld + TILE;
}

/* Reserve an activation buffer of rows x cols. */
static Acts acts_init(size_t rows, size_t cols, bool quantized)
{
    Acts a = {.cols = (int)cols, .ld = row_stride(cols, SUPER), .blocks = round_up(cols, SUPER) / SUPER};
    a.f = reserve(mul(rows, a.ld), "activations");
    if (quantized) a.q = (ActBlock *)reserve(mul(rows, a.blocks) * sizeof *a.q / sizeof(float), "activations");
    return a;
}

/* Reserve scratch for batches of up to `batch` tokens. */
static void work_init(Engine *e, int batch)
{
    const Config *c = &e->model.config;
    Work *w = &e->work;
    bool q = e->model.quantized;
    size_t n = (size_t)max_int(batch, MAX_TRIAL), D = (size_t)c->hidden_size, H = (size_t)c->num_attention_heads, hd = (size_t)c->head_dim;
    bool sparse = c->n_sparse || (e->state.mtp && c->num_experts);
    size_t k = sparse ? (size_t)c->num_experts_per_tok : 0, E = sparse ? (size_t)c->num_experts : 0;
    size_t linear_rows = (size_t)(c->conv_dim + c->value_dim), qgkv_rows = 2 * (H + (size_t)c->num_key_value_heads) * hd;
    size_t inner = sparse ? (size_t)max_int(c->moe_intermediate_size, c->shared_expert_intermediate_size) : 1;
    if (c->n_dense) inner = max_size(inner, (size_t)c->intermediate_size);
    w->batch = batch;
    w->xn = acts_init(n, D, q);
    w->x = reserve(n * w->xn.ld, "residual stream");
    w->out = reserve(n * w->xn.ld, "residual stream");
    w->proj_ld = row_stride(max_size(linear_rows, qgkv_rows) + TILE, TILE); /* + TILE: gdn_head reads v in whole tiles */
    w->proj = reserve(mul(n + MAX_TRIAL, w->proj_ld), "projections"); /* + MAX_TRIAL: rows from the tape, in ba too */
    w->ba_ld = row_stride(2 * (size_t)c->linear_num_value_heads, TILE);
    w->ba = reserve((n + MAX_TRIAL) * w->ba_ld, "gates");
    w->mix = acts_init(n, H * hd > (size_t)c->value_dim ? H * hd : (size_t)c->value_dim, q);
    w->rope = reserve(n * (size_t)c->rotary_dim, "rotary angles");
    w->router_ld = row_stride(E ? E : 1, TILE);
    w->router = reserve(n * w->router_ld, "router");
    w->top_expert = (int *)reserve(n * k, "router");
    w->top_weight = reserve(n * k, "router");
    w->shared_weight = reserve(n, "router");
    w->ffn = grow(NULL, E + 1, sizeof *w->ffn);
    w->row_token = (int *)reserve(n * (k + 1), "router");
    w->row_weight = reserve(n * (k + 1), "router");
    w->inner = acts_init(n * (k + 1), inner, q);
    w->pair_rows = (int)n + MAX_TRIAL;
    if (e->state.mtp) w->pair = acts_init((size_t)w->pair_rows, 2 * D, q);
    w->logits_ld = round_up((size_t)e->model.head.weight.rows, TILE);
    w->logits = reserve(HEAD_ROWS * w->logits_ld, "logits");
    size_t blocks = (MAX_ROWS * (size_t)c->group + 3) / 4; /* a kernel takes 4 rows or more */
    size_t hdp = (size_t)c->hdp, ranges = (size_t)attn_ranges(e->state.ctx);
    w->partial = reserve(mul(mul((size_t)c->num_key_value_heads * blocks, ranges), MAX_ROWS * (hdp + TILE)), "attention");
    size_t dk = (size_t)c->linear_key_head_dim, dvp = (size_t)c->dvp;
    size_t need = GDN_CHUNK * (dvp + 2) + 2 * dvp + dk * TILE;                          /* gdn_head */
    need = max_size(need, (size_t)(c->linear_conv_kernel_dim + 1) * (dk + dvp));        /* gdn_conv */
    need = max_size(need, MAX_ROWS * (KV_RANGE + 2 * hdp) + hdp);                       /* attn_block */
    need = max_size(need, (size_t)FFN_CHUNK * SUPER);                                   /* ffn_up_item */
    need = max_size(need, E + 1);                                                       /* moe_group */
    w->scratch_len = round_up(need, 1024);
    w->scratch = reserve((size_t)pool_threads(e->pool) * w->scratch_len, "scratch");
}

/* ============================== Part III: text ============================== */

/* ---- 12. Tokenizer: byte-level BPE over the bytes of text ----
 * text -> added tokens cut out -> NFC -> split by a pattern -> bytes of each piece merged by rank. */

typedef struct { uint32_t a, b, c; } Triple;

/* An added token's text. prefix: index among the sorted of the longest other that this one begins with, or -1 */
typedef struct { const uint8_t *text; size_t n; int id, prefix; } Added;

typedef struct {
    Mapping file;              /* a copy in memory */
    int n_tokens;
    uint64_t hash;
    const uint32_t *offsets;   /* [n_tokens + 1] into bytes */
    const uint8_t *bytes;
    const Triple *merges;      /* [n_merges] left, right, result, in rank order */
    uint32_t n_merges;
    const uint32_t (*added)[2]; /* [n_added] id, flags (1 = special) */
    uint32_t n_added;
    Added *sorted;             /* [n_added] the same in order of their texts */
    size_t longest;            /* bytes of the longest token */
    uint8_t *special;          /* [n_tokens] 1: special, left out of text */
    uint8_t *class_of;         /* [0x110000] letter, number, mark, space of a code point */
    const Triple *ccc, *decomp, *comp; /* combining class ranges; cp -> a b; a b -> cp; each sorted */
    uint32_t n_ccc, n_decomp, n_comp;
    bool nfc, marks_are_letters; /* the second: Qwen3.5's split pattern */
    int byte_token[256];       /* id of each single byte */
    uint32_t *merge_slot;      /* open-addressing hash: (left, right) -> index into merges + 1 */
    uint32_t merge_mask;
} Tokenizer;

enum { C_OTHER, C_LETTER, C_NUMBER, C_MARK, C_SPACE };

typedef struct {
    char magic[8];
    uint32_t version, n_tokens, n_merges, n_added, n_classes, n_ccc, n_decomp, n_comp, pattern, flags;
    uint64_t hash, file_size;
} TokenizerHeader;

/* Fibonacci hashing of a pair of ids. */
static uint32_t pair_hash(uint32_t left, uint32_t right)
{
    uint64_t h = ((uint64_t)left << 32 | right) * 0x9e3779b97f4a7c15u;
    return (uint32_t)(h >> 32);
}

/* Index into merges of the pair, or -1. */
static int64_t find_merge(const Tokenizer *t, uint32_t left, uint32_t right)
{
    for (uint32_t i = pair_hash(left, right) & t->merge_mask;; i = (i + 1) & t->merge_mask) {
        uint32_t slot = t->merge_slot[i];
        if (!slot) return -1;
        if (t->merges[slot - 1].a == left && t->merges[slot - 1].b == right) return slot - 1;
    }
}

/* The next section of the file: count x size bytes, 8-byte aligned. */
static const void *section(const Tokenizer *t, size_t *at, size_t count, size_t size, const char *what)
{
    size_t start = round_up(*at, 8);
    if (start > t->file.size || count > (t->file.size - start) / size)
        die("%s: %s: wanted %zu x %zu bytes at %zu, found a file of %zu", t->file.path, what, count, size, start,
            t->file.size);
    *at = start + count * size;
    return t->file.data + start;
}

/* Refuse a table that a binary search could not trust: wants ranges [a, b] or pairs (a, b) in order, c up to `most`. */
static void check_sorted(const Tokenizer *t, const Triple *list, uint32_t n, bool ranges, uint32_t most, const char *what)
{
    for (uint32_t i = 0; i < n; i++) {
        const Triple *x = &list[i], *before = i ? x - 1 : NULL;
        bool fine = x->a < 0x110000 && x->b < 0x110000 && x->c <= most;
        if (ranges) fine &= x->b >= x->a && (!before || x->a > before->b);
        else if (before) fine &= x->a > before->a || (x->a == before->a && x->b > before->b);
        if (!fine) die("%s: %s entry %u: out of order or no code point", t->file.path, what, i);
    }
}

enum { MAX_PROBES = 1000, MAX_ADDED = 1 << 12, MAX_ADDED_BYTES = 256 }; /* far more than a tokenizer needs: files that want to take for ever */

/* Build the hash from pairs to merges; refuses ids beyond the vocabulary, and pairs made to meet in it. */
static void index_merges(Tokenizer *t)
{
    uint32_t size = 16;
    while (size < 2 * t->n_merges + 2) size *= 2;
    t->merge_mask = size - 1;
    t->merge_slot = grow(NULL, size, sizeof *t->merge_slot);
    memset(t->merge_slot, 0, size * sizeof *t->merge_slot);
    for (uint32_t i = 0; i < t->n_merges; i++) {
        const Triple *m = &t->merges[i];
        uint32_t n = (uint32_t)t->n_tokens;
        if (m->a >= n || m->b >= n || m->c >= n)
            die("%s: merge %u: wanted ids below %u, found %u %u %u", t->file.path, i, n, m->a, m->b, m->c);
        uint32_t slot = pair_hash(m->a, m->b) & t->merge_mask;
        int probes = 0;
        while (t->merge_slot[slot] && probes++ < MAX_PROBES) slot = (slot + 1) & t->merge_mask;
        if (t->merge_slot[slot]) die("%s: merge %u: one of very many alike", t->file.path, i);
        t->merge_slot[slot] = i + 1;
    }
}

/* For qsort: by text, a text before those that it begins; of equals the lower id last, where it is found. */
static int compare_added(const void *a, const void *b)
{
    const Added *x = a, *y = b;
    int order = memcmp(x->text, y->text, min_size(x->n, y->n));
    if (!order) order = (x->n > y->n) - (x->n < y->n);
    return order ? order : (x->id < y->id) - (x->id > y->id);
}

/* Put the added tokens in order, and find each one's longest prefix among them. */
static void sort_added(Tokenizer *t)
{
    t->sorted = grow(NULL, t->n_added, sizeof *t->sorted);
    for (uint32_t i = 0; i < t->n_added; i++) {
        uint32_t id = t->added[i][0];
        t->sorted[i] = (Added){t->bytes + t->offsets[id], t->offsets[id + 1] - t->offsets[id], (int)id, -1};
    }
    qsort(t->sorted, t->n_added, sizeof *t->sorted, compare_added);
    for (int i = 1; i < (int)t->n_added; i++) {
        int j = i - 1; /* whatever begins text i begins text i - 1 too, or is it */
        while (j >= 0 && (t->sorted[j].n > t->sorted[i].n || memcmp(t->sorted[j].text, t->sorted[i].text, t->sorted[j].n))) j = t->sorted[j].prefix;
        t->sorted[i].prefix = j;
    }
}

/* Check the texts, find the 256 byte tokens, note special ids, spread the classes over all code points. */
static void index_tokens(Tokenizer *t, const Triple *classes, uint32_t n_classes)
{
    size_t n = (size_t)t->n_tokens;
    t->special = grow(NULL, n, 1);
    memset(t->special, 0, n);
    for (int b = 0; b < 256; b++) t->byte_token[b] = -1;
    for (size_t id = 0; id < n; id++) {
        if (t->offsets[id + 1] < t->offsets[id] || t->offsets[id + 1] > t->offsets[n])
            die("%s: token %zu: offsets: wanted ascending ones up to %u, found %u and %u", t->file.path, id, t->offsets[n],
                t->offsets[id], t->offsets[id + 1]);
        t->longest = max_size(t->longest, t->offsets[id + 1] - t->offsets[id]);
        if (t->offsets[id + 1] - t->offsets[id] == 1 && t->byte_token[t->bytes[t->offsets[id]]] < 0)
            t->byte_token[t->bytes[t->offsets[id]]] = (int)id;
    }
    for (int b = 0; b < 256; b++)
        if (t->byte_token[b] < 0) die("%s: no token for byte %d", t->file.path, b);
    for (uint32_t i = 0; i < t->n_added; i++) {
        size_t bytes = t->added[i][0] < n ? t->offsets[t->added[i][0] + 1] - t->offsets[t->added[i][0]] : 0;
        if (bytes == 0 || bytes > MAX_ADDED_BYTES)
            die("%s: added token %u: wanted the id of a text of at most %d bytes, found %u, %zu bytes", t->file.path, i, MAX_ADDED_BYTES,
                t->added[i][0], bytes);
        t->special[t->added[i][0]] = t->added[i][1] & 1;
    }
    t->class_of = grow(NULL, 0x110000, 1);
    memset(t->class_of, C_OTHER, 0x110000);
    for (uint32_t i = 0; i < n_classes; i++)
        memset(t->class_of + classes[i].a, (int)classes[i].c, classes[i].b - classes[i].a + 1);
}

/* A file's bytes in memory, which nobody can change any more. Ends the program with a message when there are none. */
static Mapping read_copy(const char *path)
{
    Mapping file, copy;
    if (!map_file(path, &file)) exit(1);
    copy = file;
    copy.data = memcpy(grow(NULL, file.size, 1), file.data, file.size);
    unmap_file(&file);
    return copy;
}

/* Refuse a header that is none, or whose counts are beyond reason. size: of the file */
static void check_tokenizer_header(const char *path, const TokenizerHeader *h, size_t size)
{
    if (memcmp(h->magic, "QWEN3TOK", 8)) die("%s: not a tokenizer of this program (make one with export.py --tokenizer)", path);
    if (h->version != 1) die("%s: version: wanted 1, found %u", path, h->version);
    if (h->file_size != size)
        die("%s: file_size: wanted %llu bytes, found %zu: cut off?", path, (unsigned long long)h->file_size, size);
    if (h->n_tokens < 1 || h->n_tokens > 1 << 24) die("%s: n_tokens: wanted 1 to %d, found %u", path, 1 << 24, h->n_tokens);
    if (h->pattern > 1) die("%s: pattern: wanted 0 or 1, found %u", path, h->pattern);
    if (h->n_merges > 1 << 26) die("%s: n_merges: wanted at most %d, found %u", path, 1 << 26, h->n_merges);
    if (h->n_added > MAX_ADDED) die("%s: n_added: wanted at most %d, found %u", path, MAX_ADDED, h->n_added);
}

/* Read tokenizer.bin and check it. Ends with a message when anything is wrong. */
static Tokenizer *open_tokenizer(const char *path)
{
    Tokenizer *t = grow(NULL, 1, sizeof *t);
    memset(t, 0, sizeof *t);
    t->file = read_copy(path);
    const TokenizerHeader *h = (const TokenizerHeader *)t->file.data;
    check_tokenizer_header(path, h, t->file.size);
    t->n_tokens = (int)h->n_tokens;
    t->n_merges = h->n_merges, t->n_added = h->n_added, t->n_ccc = h->n_ccc, t->n_decomp = h->n_decomp, t->n_comp = h->n_comp;
    t->nfc = h->flags & 1;
    t->marks_are_letters = h->pattern == 1;
    t->hash = h->hash;
    size_t at = sizeof *h;
    t->offsets = section(t, &at, h->n_tokens + (size_t)1, 4, "offsets");
    t->merges = section(t, &at, h->n_merges, sizeof(Triple), "merges");
    t->added = section(t, &at, h->n_added, 8, "added tokens");
    const Triple *classes = section(t, &at, h->n_classes, sizeof(Triple), "classes");
    t->ccc = section(t, &at, h->n_ccc, sizeof(Triple), "combining classes");
    t->decomp = section(t, &at, h->n_decomp, sizeof(Triple), "decompositions");
    t->comp = section(t, &at, h->n_comp, sizeof(Triple), "compositions");
    t->bytes = section(t, &at, t->offsets[h->n_tokens], 1, "token bytes");
    check_sorted(t, classes, h->n_classes, true, C_SPACE, "class");
    check_sorted(t, t->ccc, t->n_ccc, true, 255, "combining class");
    check_sorted(t, t->decomp, t->n_decomp, false, 0x10ffff, "decomposition");
    check_sorted(t, t->comp, t->n_comp, false, 0x10ffff, "composition");
    index_tokens(t, classes, h->n_classes);
    sort_added(t);
    index_merges(t);
    uint64_t hash = fnv1a(t->file.data + sizeof *h, t->file.size - sizeof *h, FNV_BASIS);
    if (!same_hash(h->hash, hash))
        die("%s: hash: wanted %016llx, found %016llx: damaged", path, (unsigned long long)h->hash, (unsigned long long)hash);
    return t;
}

/* ---- 12a. Code points and NFC ---- */

enum { RAW_BYTE = 0x110000 }; /* a byte that is not UTF-8 travels as the code point RAW_BYTE + byte */

/* One code point at s[0..n), n > 0; *len: its bytes. Overlong forms, surrogates and strays are raw bytes. */
static uint32_t utf8_get(const uint8_t *s, size_t n, size_t *len)
{
    int more = s[0] < 0x80 ? 0 : s[0] >= 0xc2 && s[0] < 0xe0 ? 1 : (s[0] & 0xf0) == 0xe0 ? 2 : s[0] >= 0xf0 && s[0] < 0xf5 ? 3 : -1;
    uint32_t cp = more <= 0 ? s[0] : s[0] & (0x3fu >> more);
    *len = 1;
    if (more == 0) return cp;
    if (more < 0 || n <= (size_t)more) return RAW_BYTE + s[0];
    for (int i = 1; i <= more; i++) {
        if ((s[i] & 0xc0) != 0x80) return RAW_BYTE + s[0];
        cp = cp << 6 | (s[i] & 0x3f);
    }
    if ((more == 2 && cp < 0x800) || (more == 3 && (cp < 0x10000 || cp > 0x10ffff)) || (cp >= 0xd800 && cp < 0xe000))
        return RAW_BYTE + s[0];
    *len = (size_t)more + 1;
    return cp;
}

/* Append a code point as UTF-8, a raw byte as itself. */
static void utf8_put(Str *out, uint32_t cp)
{
    uint8_t b[4];
    size_t n = cp >= RAW_BYTE || cp < 0x80 ? 1 : cp < 0x800 ? 2 : cp < 0x10000 ? 3 : 4;
    b[0] = cp >= RAW_BYTE ? (uint8_t)(cp - RAW_BYTE) : (uint8_t)cp;
    if (n > 1) {
        b[0] = (uint8_t)((0xf00 >> n) | cp >> (6 * (n - 1)));
        for (size_t i = 1; i < n; i++) b[i] = (uint8_t)(0x80 | (cp >> (6 * (n - 1 - i)) & 0x3f));
    }
    str_add(out, b, n);
}

/* The entry with key a (and b), by binary search, or NULL. */
static const Triple *find_triple(const Triple *list, uint32_t n, uint32_t a, uint32_t b, bool use_b)
{
    uint32_t lo = 0, hi = n;
    while (lo < hi) {
        uint32_t mid = lo + (hi - lo) / 2;
        if (list[mid].a < a || (use_b && list[mid].a == a && list[mid].b < b)) lo = mid + 1;
        else hi = mid;
    }
    return lo < n && list[lo].a == a && (!use_b || list[lo].b == b) ? &list[lo] : NULL;
}

/* Canonical combining class, 0 for starters. */
static uint32_t combining_class(const Tokenizer *t, uint32_t cp)
{
    uint32_t lo = 0, hi = t->n_ccc;
    while (lo < hi) {
        uint32_t mid = lo + (hi - lo) / 2;
        if (t->ccc[mid].b < cp) lo = mid + 1;
        else hi = mid;
    }
    return lo < t->n_ccc && t->ccc[lo].a <= cp ? t->ccc[lo].c : 0;
}

/* Hangul syllables compose by arithmetic (Unicode 3.12): L + V, LV + T. */
enum { HANGUL_S = 0xac00, HANGUL_L = 0x1100, HANGUL_V = 0x1161, HANGUL_T = 0x11a7, N_V = 21, N_T = 28, N_S = 19 * N_V * N_T };

enum { MAX_DECOMPOSITION = 4 }; /* steps; Unicode's longest takes 3, and each may double what a strange file makes of a character */

/* Append the full canonical decomposition of cp. */
static void decompose(const Tokenizer *t, Tokens *out, uint32_t cp, int depth)
{
    if (cp - HANGUL_S < N_S) {
        uint32_t s = cp - HANGUL_S;
        tokens_add(out, (int)(HANGUL_L + s / (N_V * N_T)));
        tokens_add(out, (int)(HANGUL_V + s / N_T % N_V));
        if (s % N_T) tokens_add(out, (int)(HANGUL_T + s % N_T));
        return;
    }
    const Triple *d = depth < MAX_DECOMPOSITION ? find_triple(t->decomp, t->n_decomp, cp, 0, false) : NULL;
    if (!d) tokens_add(out, (int)cp);
    else {
        decompose(t, out, d->b, depth + 1);
        if (d->c) decompose(t, out, d->c, depth + 1);
    }
}

/* The primary composite of a and b, or 0. */
static uint32_t compose_pair(const Tokenizer *t, uint32_t a, uint32_t b)
{
    if (a - HANGUL_L < 19 && b - HANGUL_V < N_V) return HANGUL_S + ((a - HANGUL_L) * N_V + b - HANGUL_V) * N_T;
    if (a - HANGUL_S < N_S && (a - HANGUL_S) % N_T == 0 && b - HANGUL_T - 1 < N_T - 1) return a + b - HANGUL_T;
    const Triple *c = find_triple(t->comp, t->n_comp, a, b, true);
    return c ? c->c : 0;
}

/* Marks between two starters in order of their class; equal classes keep theirs. */
static void order_marks(int *cp, const uint8_t *class, int n)
{
    int counts[256] = {0}, *copy;
    if (n < 2) return;
    copy = grow(NULL, (size_t)n, sizeof *copy);
    for (int i = 0; i < n; i++) counts[class[i]]++;
    for (int i = 0, sum = 0; i < 256; i++) {
        int count = counts[i];
        counts[i] = sum;
        sum += count;
    }
    for (int i = 0; i < n; i++) copy[counts[class[i]]++] = cp[i];
    memcpy(cp, copy, (size_t)n * sizeof *cp);
    free(copy);
}

/* Append the NFC form of text[0..n) to out: decompose, order the marks, compose (Unicode annex 15). */
static void nfc(const Tokenizer *t, Str *out, const uint8_t *text, size_t n)
{
    Tokens d = {0};
    for (size_t i = 0, len; i < n; i += len) decompose(t, &d, utf8_get(text + i, n - i, &len), 0);
    uint8_t *class = grow(NULL, (size_t)d.len, 1);
    for (int i = 0; i < d.len; i++) class[i] = (uint8_t)combining_class(t, (uint32_t)d.id[i]);
    for (int i = 0, end; i < d.len; i = end) {
        for (end = i; end < d.len && class[end]; end++) {}
        order_marks(d.id + i, class + i, end - i);
        for (; end < d.len && !class[end]; end++) {}
    }
    int starter = -1, last = 0, len = 0; /* last: class of the mark kept last behind the starter */
    for (int i = 0; i < d.len; i++) {
        int class_i = (int)combining_class(t, (uint32_t)d.id[i]);
        bool blocked = starter < 0 || (len - 1 > starter && (last >= class_i || last == 0));
        uint32_t whole = blocked ? 0 : compose_pair(t, (uint32_t)d.id[starter], (uint32_t)d.id[i]);
        if (whole) {
            d.id[starter] = (int)whole;
            continue;
        }
        if (!class_i) starter = len;
        last = class_i;
        d.id[len++] = d.id[i];
    }
    for (int i = 0; i < len; i++) utf8_put(out, (uint32_t)d.id[i]);
    free(class);
    free(d.id);
}

/* ---- 12b. The split pattern ----
 * (?i:'s|'t|'re|'ve|'m|'ll|'d) | [^\r\n\p{L}\p{N}]?\p{L}+ | \p{N} | [ ]?[^\s\p{L}\p{N}]+[\r\n]* | \s*[\r\n]+
 * | \s+(?!\S) | \s+          (Qwen3.5: marks count as letters) */

typedef struct { const Tokenizer *t; const uint8_t *s; size_t n; } Scan;

/* Class of the code point at i (C_OTHER at the end, with *len = 0). */
static int class_at(const Scan *s, size_t i, size_t *len)
{
    *len = 0;
    if (i >= s->n) return C_OTHER;
    uint32_t cp = utf8_get(s->s + i, s->n - i, len);
    int class = cp < 0x110000 ? s->t->class_of[cp] : C_OTHER;
    return class == C_MARK ? (s->t->marks_are_letters ? C_LETTER : C_OTHER) : class;
}

/* End of the run of one class that begins at i. */
static size_t skip_class(const Scan *s, size_t i, int class)
{
    for (size_t len; class_at(s, i, &len) == class && len;) i += len;
    return i;
}

/* End of the run of CR and LF that begins at i. */
static size_t skip_newlines(const Scan *s, size_t i)
{
    while (i < s->n && (s->s[i] == '\r' || s->s[i] == '\n')) i++;
    return i;
}

/* 's 't 're 've 'm 'll 'd in any case; the long s U+017F folds to s. Returns the end, or i for none. */
static size_t contraction(const Scan *s, size_t i)
{
    size_t left = s->n - i;
    if (s->s[i] != '\'' || left < 2) return i;
    int a = tolower(s->s[i + 1]), b = left > 2 ? tolower(s->s[i + 2]) : 0;
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return i + 2;
    if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return i + 3;
    return a == 0xc5 && b == 0xbf ? i + 3 : i;
}

/* End of the piece that begins at i < n. */
static size_t next_piece(const Scan *s, size_t i)
{
    size_t len, next_len, end = contraction(s, i);
    if (end > i) return end;
    int class = class_at(s, i, &len);
    bool newline = s->s[i] == '\r' || s->s[i] == '\n';
    if (class == C_LETTER) return skip_class(s, i, C_LETTER);
    int next = class_at(s, i + len, &next_len);
    if (class != C_NUMBER && !newline && next == C_LETTER && next_len) return skip_class(s, i + len, C_LETTER);
    if (class == C_NUMBER) return i + len;
    if (class == C_OTHER) return skip_newlines(s, skip_class(s, i, C_OTHER));
    if (s->s[i] == ' ' && next == C_OTHER && next_len) return skip_newlines(s, skip_class(s, i + 1, C_OTHER));
    size_t last_newline = 0, last = i; /* white space: up to its last newline, else all but its last character */
    for (end = i; class_at(s, end, &len) == C_SPACE && len; end += len) {
        if (s->s[end] == '\r' || s->s[end] == '\n') last_newline = end + 1;
        last = end;
    }
    if (last_newline) return last_newline;
    return end == s->n || last == i ? end : last;
}

/* ---- 12c. Merging ---- */

/* A piece of text as a list of symbols, and a heap of the merges that could happen in it. */
typedef struct { int id, prev, next; } Symbol;
typedef struct { uint32_t rank; int at, left, right; } Candidate;
typedef struct {
    Symbol *symbol;
    Candidate *heap;
    int n_heap;
    size_t cap;
} Merger;

/* Order of merging: by rank, then from left to right. */
static bool candidate_before(const Candidate *a, const Candidate *b)
{
    return a->rank != b->rank ? a->rank < b->rank : a->at < b->at;
}

/* Add to the heap. */
static void heap_push(Merger *m, Candidate c)
{
    int i = m->n_heap++;
    for (; i > 0 && candidate_before(&c, &m->heap[(i - 1) / 2]); i = (i - 1) / 2) m->heap[i] = m->heap[(i - 1) / 2];
    m->heap[i] = c;
}

/* Take the first candidate off the heap, which must not be empty. */
static Candidate heap_pop(Merger *m)
{
    Candidate top = m->heap[0], c = m->heap[--m->n_heap];
    int i = 0;
    for (int child; (child = 2 * i + 1) < m->n_heap; i = child) {
        if (child + 1 < m->n_heap && candidate_before(&m->heap[child + 1], &m->heap[child])) child++;
        if (!candidate_before(&m->heap[child], &c)) break;
        m->heap[i] = m->heap[child];
    }
    m->heap[i] = c;
    return top;
}

/* Push the merge of symbol `at` with its right neighbour, if there is one. */
static void consider(const Tokenizer *t, Merger *m, int at)
{
    int next = at < 0 ? -1 : m->symbol[at].next;
    if (next < 0) return;
    int64_t merge = find_merge(t, (uint32_t)m->symbol[at].id, (uint32_t)m->symbol[next].id);
    if (merge >= 0) heap_push(m, (Candidate){(uint32_t)merge, at, m->symbol[at].id, m->symbol[next].id});
}

/* Bytes of one piece -> tokens: the adjacent pair of lowest rank merges first, the leftmost of equals. */
static void merge_piece(const Tokenizer *t, Merger *m, const uint8_t *s, size_t n, Tokens *out)
{
    if (n == 1) {
        tokens_add(out, t->byte_token[s[0]]);
        return;
    }
    if (n > INT_MAX / 4) die("text: a word of %zu bytes is too long", n);
    if (n > m->cap) { /* a merge makes at most two new candidates: 3 n in all */
        m->cap = n * 2;
        m->symbol = grow(m->symbol, m->cap, sizeof *m->symbol);
        m->heap = grow(m->heap, m->cap, 3 * sizeof *m->heap);
    }
    m->n_heap = 0;
    for (size_t i = 0; i < n; i++) m->symbol[i] = (Symbol){t->byte_token[s[i]], (int)i - 1, i + 1 < n ? (int)i + 1 : -1};
    for (size_t i = 0; i + 1 < n; i++) consider(t, m, (int)i);
    while (m->n_heap) {
        Candidate c = heap_pop(m);
        Symbol *left = &m->symbol[c.at], *right = left->next >= 0 ? &m->symbol[left->next] : NULL;
        if (left->id != c.left || !right || right->id != c.right) continue; /* one of the two has changed since */
        left->id = (int)t->merges[c.rank].c;
        left->next = right->next;
        right->id = -1;
        if (left->next >= 0) m->symbol[left->next].prev = c.at;
        consider(t, m, left->prev);
        consider(t, m, c.at);
    }
    for (int i = 0; i >= 0; i = m->symbol[i].next) tokens_add(out, m->symbol[i].id);
}

/* Text that contains no added token: normalize, split, merge. */
static void encode_plain(const Tokenizer *t, Merger *m, const uint8_t *s, size_t n, Tokens *out)
{
    Str normal = {0};
    bool simple = true; /* no code point from U+0300 on: nothing to compose */
    for (size_t i = 0; simple && i < n; i++) simple = s[i] < 0xcc;
    if (t->nfc && !simple) {
        nfc(t, &normal, s, n);
        s = (const uint8_t *)normal.data;
        n = normal.len;
    }
    Scan scan = {t, s, n};
    for (size_t i = 0, end; i < n; i = end) {
        end = next_piece(&scan, i);
        merge_piece(t, m, s + i, end - i, out);
    }
    free(normal.data);
}

/* Text with marks of which bytes may be part of an added token: the template's are, a chat user's are not. */
typedef struct { Str bytes, trust; } Prompt;

/* Append text to a prompt. */
static void prompt_add(Prompt *p, const void *bytes, size_t n, bool trusted)
{
    str_add(&p->bytes, bytes, n);
    char mark = trusted;
    for (size_t i = 0; i < n; i++) str_add(&p->trust, &mark, 1);
}

/* Append another prompt. */
static void prompt_join(Prompt *p, const Prompt *other)
{
    str_add(&p->bytes, other->bytes.data, other->bytes.len);
    str_add(&p->trust, other->trust.data, other->trust.len);
}

/* Free a prompt and make it empty. */
static void free_prompt(Prompt *p)
{
    free(p->bytes.data);
    free(p->trust.data);
    *p = (Prompt){0};
}

/* The longest added token at s[0..n) whose bytes are all trusted, or -1; *len: its bytes. Every one that s begins with is a
 * prefix of the last in order that is not behind s: that one is found by binary search, then its prefixes are gone through. */
static int added_token_at(const Tokenizer *t, const uint8_t *s, const char *trust, size_t n, size_t *len)
{
    const char *end = memchr(trust, 0, min_size(n, MAX_ADDED_BYTES));
    Added here = {s, end ? (size_t)(end - trust) : min_size(n, MAX_ADDED_BYTES), -1, -1};
    int lo = 0, hi = (int)t->n_added;
    while (lo < hi) { /* how many are not behind s */
        int mid = lo + (hi - lo) / 2;
        if (compare_added(&t->sorted[mid], &here) <= 0) lo = mid + 1;
        else hi = mid;
    }
    for (int i = lo - 1; i >= 0; i = t->sorted[i].prefix) {
        const Added *a = &t->sorted[i];
        *len = a->n;
        if (a->n <= here.n && !memcmp(a->text, s, a->n)) return a->id;
    }
    return -1;
}

/* Whether so many bytes of text make more than `room` tokens for sure, which then need not be found: NFC keeps more than a quarter. */
static bool text_too_long(const Tokenizer *t, size_t bytes, int room) { return bytes / 4 / t->longest > (size_t)max_int(room, 0); }

enum { MAX_TRIES = 16 }; /* characters that one takes in: Hangul's take 2 */

/* Whether a character starts anew: what it decomposes into begins with one of class 0. */
static bool is_starter(const Tokenizer *t, uint32_t cp)
{
    Tokens d = {0};
    decompose(t, &d, cp, 0);
    bool starter = !combining_class(t, (uint32_t)d.id[0]);
    free(d.id);
    return starter;
}

/* Bytes of the shortest beginning of s[0..n), n > 0, that NFC turns into the same bytes whatever comes after it; *normal: into
 * how many. Such an end lies before a character that starts anew and that what is before it does not take in. */
static size_t normal_unit(const Tokenizer *t, const uint8_t *s, size_t n, size_t *normal)
{
    size_t end, len;
    utf8_get(s, n, &end);
    *normal = end;
    if (!t->nfc) return end;
    for (int tries = 0; end < n && s[end] >= 0xcc; end += len) { /* below U+0300 all characters start anew */
        bool starts = is_starter(t, utf8_get(s + end, n - end, &len));
        if (starts && tries++ == MAX_TRIES) break;
        Str before = {0}, after = {0}, both = {0};
        if (starts) nfc(t, &before, s, end), nfc(t, &after, s + end, len), nfc(t, &both, s, end + len);
        starts = starts && before.len + after.len == both.len && !memcmp(both.data, before.data, before.len);
        free(before.data), free(after.data), free(both.data);
        if (starts) break;
    }
    Str whole = {0};
    nfc(t, &whole, s, end);
    *normal = whole.len;
    free(whole.data);
    return end;
}

/* Append where the tokens from `first` on, which stand for the plain text s[0..n), begin and end in it, plus `base`: at whole
 * characters, with their marks, so that tokens that share one overlap. */
static void plain_spans(const Tokenizer *t, const uint8_t *s, size_t n, size_t base, const Tokens *ids, int first, Tokens *spans)
{
    size_t begin = 0, end = 0;                       /* of a unit */
    size_t normal_end = 0, done = 0, normal;         /* in bytes of normal text: of the unit; of the tokens so far */
    for (int i = first; i < ids->len; i++) {
        size_t to = done + t->offsets[ids->id[i] + 1] - t->offsets[ids->id[i]];
        for (; normal_end <= done && end < n; normal_end += normal) begin = end, end += normal_unit(t, s + end, n - end, &normal);
        tokens_add(spans, (int)(base + begin));
        for (; normal_end < to && end < n; normal_end += normal) begin = end, end += normal_unit(t, s + end, n - end, &normal);
        tokens_add(spans, (int)(base + end));
        done = to;
    }
}

/* Append a prompt's tokens to out, and to spans, if not NULL, two numbers for each: where it begins and ends in the prompt. */
static void encode(const Tokenizer *t, const Prompt *p, Tokens *out, Tokens *spans)
{
    const uint8_t *s = (const uint8_t *)p->bytes.data;
    size_t n = p->bytes.len, plain = 0;
    bool starts[256] = {0};
    if (!n) return;
    for (uint32_t i = 0; i < t->n_added; i++) starts[t->bytes[t->offsets[t->added[i][0]]]] = true;
    Merger m = {0};
    for (size_t i = 0, len; i < n; i++) {
        int id = starts[s[i]] && p->trust.data[i] ? added_token_at(t, s + i, p->trust.data + i, n - i, &len) : -1;
        if (id < 0) continue;
        int first = out->len;
        encode_plain(t, &m, s + plain, i - plain, out);
        if (spans) plain_spans(t, s + plain, i - plain, plain, out, first, spans);
        tokens_add(out, id);
        plain = i + len;
        if (spans) tokens_add(spans, (int)i), tokens_add(spans, (int)plain);
        i = plain - 1;
    }
    int first = out->len;
    encode_plain(t, &m, s + plain, n - plain, out);
    if (spans) plain_spans(t, s + plain, n - plain, plain, out, first, spans);
    free(m.symbol);
    free(m.heap);
}

/* The bytes of a token; an id without text has none. */
static const uint8_t *token_bytes(const Tokenizer *t, int id, size_t *n)
{
    *n = 0;
    if (id < 0 || id >= t->n_tokens) return t->bytes;
    *n = t->offsets[id + 1] - t->offsets[id];
    return t->bytes + t->offsets[id];
}

/* Writes tokens to stdout as text, holding back the bytes of a character that is not yet complete and, if asked to, what
 * stands before the end of the answer's thinking. */
typedef struct {
    const Tokenizer *t;
    bool show_special, thinking; /* thinking: it may be, and is to be hidden */
    const ChatPieces *chat;    /* says what begins and ends it; NULL: nothing is hidden */
    bool trim;                 /* nothing printed yet but hidden thinking: white space that follows it is dropped */
    Str held, all;             /* all: the answer's text so far */
} Printer;

/* Write what is complete; with `all`, everything. */
static void printer_flush(Printer *p, bool all)
{
    const uint8_t *s = (const uint8_t *)p->held.data;
    size_t done = 0, len;
    while (done < p->held.len) {
        uint32_t cp = utf8_get(s + done, p->held.len - done, &len);
        int need = s[done] >= 0xf0 ? 4 : s[done] >= 0xe0 ? 3 : s[done] >= 0xc2 ? 2 : 1;
        bool whole = true; /* false: more bytes could still complete it */
        if (cp >= RAW_BYTE && p->held.len - done < (size_t)need && s[done] < 0xf5) {
            whole = false;
            for (size_t i = done + 1; i < p->held.len; i++) whole |= (s[i] & 0xc0) != 0x80;
        }
        if (!whole && !all) break;
        done += len;
    }
    if (!done) return;
    put_text(stdout, s, done);
    flush_output();
    memmove(p->held.data, s + done, p->held.len - done);
    p->held.len -= done;
}

/* Whether the answer so far is thinking, or might become it; else `held` is what may be seen of it. */
static bool still_thinking(Printer *p)
{
    const ChatPieces *c = p->chat;
    size_t n = min_size(p->all.len, c->think_start.len);
    bool inside = c->opens_thinking, begins = !memcmp(p->all.data, c->think_start.data, n);
    if (!inside && !begins) return false;
    if (!inside && n < c->think_start.len) return true;
    size_t tail = min_size(p->all.len, p->held.len + c->think_end.len); /* where the end could be new */
    const char *from = p->all.data + p->all.len - tail, *end = memmem(from, tail, c->think_end.data, c->think_end.len);
    p->held.len = 0;
    if (!end) return true;
    end += c->think_end.len;
    str_set(&p->held, end, (size_t)(p->all.data + p->all.len - end));
    p->trim = true;
    return false;
}

/* Write a token's text, special ones only when asked for; keep: it belongs to the answer's text. */
static void print_token(Printer *p, int id, bool keep)
{
    size_t n;
    const uint8_t *bytes = token_bytes(p->t, id, &n);
    bool special = id < p->t->n_tokens && p->t->special[id];
    if (special && !p->show_special) return;
    str_add(&p->held, bytes, n);
    str_add(&p->all, bytes, keep && !special ? n : 0);
    if (p->thinking) p->thinking = still_thinking(p);
    if (p->thinking) return;
    while (p->trim && p->held.len && isspace((unsigned char)p->held.data[0])) {
        memmove(p->held.data, p->held.data + 1, p->held.len);
        p->held.len--;
    }
    p->trim &= !p->held.len;
    printer_flush(p, false);
}

/* ---- 13. Sampler ---- */

typedef struct { float logit; int id; double p; } Choice;

typedef struct {
    SamplerSettings set;
    uint64_t rng;
    int vocab;            /* ids below this one can be drawn */
    uint8_t *seen;        /* [vocab] bit 0: in the text so far, bit 1: generated in this answer */
    Choice *choice;       /* [vocab] */
    float *logits, *candidates; /* [vocab] scratch: logits with penalties; those to find the k-th of */
} Sampler;

/* Equal seeds draw alike; any seed, 0 too, starts somewhere else. The generator's state must not be 0. */
static void sampler_seed(Sampler *s, uint64_t seed)
{
    s->rng = seed * 0x9e3779b97f4a7c15u + 0x853c49e6748fea9bu;
    if (!s->rng) s->rng = 1;
}

/* A sampler for ids below vocab. */
static void sampler_init(Sampler *s, SamplerSettings set, uint64_t seed, int vocab)
{
    *s = (Sampler){.set = set, .vocab = vocab};
    sampler_seed(s, seed);
    s->seen = grow(NULL, (size_t)vocab, 1);
    memset(s->seen, 0, (size_t)vocab);
    s->choice = grow(NULL, (size_t)vocab, sizeof *s->choice);
    s->logits = grow(NULL, (size_t)vocab, sizeof *s->logits);
    s->candidates = grow(NULL, (size_t)vocab, sizeof *s->candidates);
}

/* Whether settings from a file make sense. */
static bool sampling_valid(const SamplerSettings *s)
{
    return s->temperature >= 0 && s->temperature <= 100 && s->top_p >= 0 && s->top_p <= 1 && s->min_p >= 0 && s->min_p <= 1 &&
           s->repetition_penalty >= 1e-3f && s->repetition_penalty <= 100 && s->presence_penalty >= -100 &&
           s->presence_penalty <= 100 && s->top_k >= 0;
}

/* The text's tokens count for the repetition penalty, this answer's for the presence penalty too. */
static void sampler_saw(Sampler *s, int id, bool generated)
{
    if (id >= 0 && id < s->vocab) s->seen[id] |= generated ? 3 : 1;
}

/* The text is now these n tokens, of which those from `answer` on are this answer's. */
static void sampler_recount(Sampler *s, const int *ids, int n, int answer)
{
    memset(s->seen, 0, (size_t)s->vocab);
    for (int i = 0; i < n; i++) sampler_saw(s, ids[i], i >= answer);
}

/* xorshift64*: 53 random bits as a number in [0, 1). One call for each token drawn. */
static double random_unit(Sampler *s)
{
    s->rng ^= s->rng >> 12;
    s->rng ^= s->rng << 25;
    s->rng ^= s->rng >> 27;
    return (double)(s->rng * 0x2545f4914f6cdd1du >> 11) * 0x1p-53;
}

/* For qsort: likelier first, of equals the lower id. */
static int by_probability(const void *a, const void *b)
{
    const Choice *x = a, *y = b;
    if (x->logit != y->logit) return x->logit > y->logit ? -1 : 1;
    return (x->id > y->id) - (x->id < y->id);
}

/* The k-th largest of x[0..n), by quickselect; x is reordered. */
static float kth_largest(float *x, int n, int k)
{
    int lo = 0, hi = n - 1;
    while (lo < hi) {
        float pivot = x[lo + (hi - lo) / 2];
        int i = lo, j = hi;
        while (i <= j) {
            while (x[i] > pivot) i++;
            while (x[j] < pivot) j--;
            if (i <= j) {
                float swap = x[i];
                x[i++] = x[j];
                x[j--] = swap;
            }
        }
        if (k - 1 <= j) hi = j;
        else if (k - 1 >= i) lo = i;
        else break;
    }
    return x[k - 1];
}

/* Penalties, in transformers' and vLLM's order: repetition divides positive and multiplies negative logits of every
 * token in the text; presence subtracts from those of this answer. A logit that is no number counts as -inf. */
static void penalize(const Sampler *s, const float *logits, float *out)
{
    for (int i = 0; i < s->vocab; i++) out[i] = logits[i] == logits[i] ? logits[i] : -INFINITY;
    if (s->set.repetition_penalty == 1 && s->set.presence_penalty == 0) return;
    for (int i = 0; i < s->vocab; i++) {
        if (!s->seen[i]) continue;
        if (s->set.repetition_penalty != 1)
            out[i] = out[i] > 0 ? out[i] / s->set.repetition_penalty : out[i] * s->set.repetition_penalty;
        if (s->seen[i] & 2) out[i] -= s->set.presence_penalty;
    }
}

enum { SIEVE = 64 };

/* A logit that at least k of all reach, and not many more: the k-th largest of the largest of every SIEVE of them. */
static float sieve(const Sampler *s, int k)
{
    int n = 0;
    for (int i = 0; i < s->vocab; i += SIEVE) s->candidates[n++] = largest(s->logits + i, min_int(SIEVE, s->vocab - i));
    return k > 0 && k <= n ? kth_largest(s->candidates, n, k) : -INFINITY;
}

/* The distribution that `sample` draws from, most likely first: penalties, temperature, top-k, top-p, min-p as
 * transformers applies them. Returns how many choices are left; their p sum to 1. Needs temperature > 0. */
static int sampler_distribution(Sampler *s, const float *logits)
{
    int n = 0, keep = 0, k = s->set.top_k < s->vocab ? s->set.top_k : 0;
    penalize(s, logits, s->logits);
    float max = largest(s->logits, s->vocab), t = s->set.temperature, least = (sieve(s, k) - max) / t;
    for (int i = 0; i < s->vocab; i += SIEVE) { /* max is taken off first: a tiny temperature then gives -inf, not inf */
        int end = min_int(i + SIEVE, s->vocab);
        if (!((largest(s->logits + i, end - i) - max) / t >= least)) continue;
        for (int id = i; id < end; id++) {
            float x = (s->logits[id] - max) / t;
            if (x >= least && x > -INFINITY) s->choice[n++] = (Choice){x, id, 0};
        }
    }
    if (k && n > k) { /* equals of the k-th stay with it */
        for (int i = 0; i < n; i++) s->candidates[i] = s->choice[i].logit;
        float kth = kth_largest(s->candidates, n, k);
        int all = n;
        n = 0;
        for (int i = 0; i < all; i++)
            if (s->choice[i].logit >= kth) s->choice[n++] = s->choice[i];
    }
    if (!n) s->choice[n++] = (Choice){0, 0, 1};
    qsort(s->choice, (size_t)n, sizeof *s->choice, by_probability);
    double sum = 0, before = 0, kept = 0;
    for (int i = 0; i < n; i++) sum += s->choice[i].p = exp((double)s->choice[i].logit - (double)s->choice[0].logit);
    for (int i = 0; i < n; i++) s->choice[i].p /= sum;
    for (; keep < n; keep++) { /* top-p: until the likelier ones reach p; min-p: against the likeliest */
        double p = s->choice[keep].p;
        if (keep && (before >= (double)s->set.top_p || p < (double)s->set.min_p * s->choice[0].p)) break;
        before += p;
    }
    for (int i = 0; i < keep; i++) kept += s->choice[i].p;
    for (int i = 0; i < keep; i++) s->choice[i].p /= kept;
    return keep;
}

/* The next token: the likeliest at temperature 0 (the first of equals), else one draw. */
static int sample(Sampler *s, const float *logits)
{
    if (s->set.temperature == 0) {
        penalize(s, logits, s->logits);
        return likeliest(s->logits, s->vocab);
    }
    int n = sampler_distribution(s, logits), i = 0;
    double u = random_unit(s);
    for (; i < n - 1 && (u -= s->choice[i].p) >= 0; i++) {}
    return s->choice[i].id;
}

/* ============================== Part IV: the machine room ============================== */

/* ---- 14. Threads: a pool that spins briefly, then sleeps ----
 * parallel_for cuts a loop's items into one share a thread: neighbours, so that a thread reads long stretches of memory, and
 * no two threads meet. Who is done with its own helps with the others' shares. Which thread makes an item changes no bit.
 * A loop ends when its items are done, not when every thread has been there: one that has taken nothing, for want of a core
 * to run on, delays nobody. */

enum { LINE = 128 }; /* bytes that processors pass from core to core at a time: a pair of cache lines */

/* How much of a thread's share of the items is handed out: number of the loop << 32 | items. Of an older loop: nothing. */
typedef struct { atomic_ullong taken; } __attribute__((aligned(LINE))) Share;

struct Pool {
    int n;                       /* threads, the caller included */
    int wanted;                  /* sleepers to wake for a loop: no more than cores are left for */
    int spins;                   /* looks at `ticket` before sleeping; few when cores are short */
    pthread_t thread[MAX_THREADS];
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    void (*fn)(void *arg, int item, int thread); /* of this loop, as is arg: read only by those who hold one of its items */
    void *arg;
    atomic_bool quit;
    atomic_ullong ticket __attribute__((aligned(LINE))); /* number of the loop << 32 | its items */
    atomic_int sleepers;
    atomic_int done __attribute__((aligned(LINE)));      /* items finished */
    Share share[MAX_THREADS];
};

/* How many threads work on a loop. */
static int pool_threads(const Pool *pool) { return pool->n; }

/* Tell the processor that this is a spin loop. */
static void cpu_relax(void)
{
#if defined HAVE_X86
    _mm_pause();
#elif defined HAVE_NEON
    __asm__ volatile("yield");
#endif
}

/* Take items of share i of the loop on this ticket, one by one, and run them, until it has none left; returns how many.
 * An item in hand keeps the loop, and with it fn and arg, alive. */
static int pool_take(Pool *p, unsigned long long ticket, int i, int thread)
{
    int64_t items = (uint32_t)ticket;
    int first = (int)(items * i / p->n), count = (int)(items * (i + 1) / p->n) - first, done = 0;
    unsigned long long loop = ticket >> 32, seen = atomic_load(&p->share[i].taken);
    for (;;) {
        int taken = seen >> 32 == loop ? (int)(uint32_t)seen : 0;
        if (taken >= count || (seen >> 32 != loop && atomic_load(&p->ticket) >> 32 != loop)) return done; /* or a newer loop has begun */
        if (!atomic_compare_exchange_weak(&p->share[i].taken, &seen, loop << 32 | (unsigned)(taken + 1))) continue;
        p->fn(p->arg, first + taken, thread);
        done++;
        seen = loop << 32 | (unsigned)(taken + 1);
    }
}

/* Work on the loop of this ticket, first on the thread's own share. */
static void pool_work(Pool *p, unsigned long long ticket, int thread)
{
    int done = 0;
    for (int i = 0; i < p->n; i++) done += pool_take(p, ticket, (thread + i) % p->n, thread);
    if (done) atomic_fetch_add_explicit(&p->done, done, memory_order_release);
}

/* Wait for another loop than number `seen`: spin, then sleep. Returns its ticket. */
static unsigned long long pool_wait(Pool *p, unsigned long long seen)
{
    unsigned long long ticket;
    for (int i = 0; i < p->spins; i++) {
        if ((ticket = atomic_load_explicit(&p->ticket, memory_order_acquire)) >> 32 != seen) return ticket;
        cpu_relax();
    }
    pthread_mutex_lock(&p->mutex);
    atomic_fetch_add(&p->sleepers, 1);
    while ((ticket = atomic_load(&p->ticket)) >> 32 == seen) pthread_cond_wait(&p->wake, &p->mutex);
    atomic_fetch_sub(&p->sleepers, 1);
    pthread_mutex_unlock(&p->mutex);
    return ticket;
}

typedef struct { Pool *pool; int thread; } Worker;

/* A worker: wait for a loop, help with it, again. */
static void *pool_thread(void *arg)
{
    Worker w = *(Worker *)arg;
    free(arg);
    for (unsigned long long ticket = 0;;) {
        ticket = pool_wait(w.pool, ticket >> 32);
        if (w.pool->quit) return NULL;
        pool_work(w.pool, ticket, w.thread);
    }
}

/* Cores this process may use, counting hyperthreads of a core once. */
static int physical_cores(void)
{
    int count = 0;
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set)) return 1;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        char path[96], list[16] = "";
        if (!CPU_ISSET(cpu, &set)) continue;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
        FILE *f = fopen(path, "r");
        bool first = true; /* the first of its siblings that we may use stands for the core */
        int sibling;
        if (f && fgets(list, sizeof list, f) && (sibling = atoi(list)) < cpu && CPU_ISSET(sibling, &set)) first = false;
        if (f) fclose(f);
        count += first;
    }
#else
    count = (int)sysconf(_SC_NPROCESSORS_ONLN);
#endif
    return min_int(max_int(count, 1), MAX_THREADS);
}

/* Start a thread. Ends the program with a message when it cannot. what: for the message */
static void start_thread(pthread_t *thread, void *(*run)(void *), void *arg, const char *what)
{
    sigset_t before;
    hold_signals(&before);
    int error = fault() ? EAGAIN : pthread_create(thread, NULL, run, arg);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error) die("cannot start a thread that %s: %s", what, strerror(error));
}

/* Start n - 1 workers; the caller is the n-th. Ends with a message when a thread cannot be started. */
static Pool *pool_create(int n)
{
    Pool *p = (Pool *)reserve(sizeof *p / sizeof(float), "threads"); /* begins a page: its parts are aligned */
    int cores = physical_cores();
    p->n = n;
    p->wanted = min_int(n, max_int(cores, 2)) - 1;
    p->spins = n <= cores ? 20000 : 100;
    pthread_mutex_init(&p->mutex, NULL);
    pthread_cond_init(&p->wake, NULL);
    for (int i = 1; i < n; i++) {
        Worker *w = grow(NULL, 1, sizeof *w);
        *w = (Worker){p, i};
        start_thread(&p->thread[i], pool_thread, w, "computes (-j says how many do)");
    }
    return p;
}

/* Open the next loop, and wake sleepers for it. Returns its ticket. */
static unsigned long long pool_open(Pool *p, int items, int wanted)
{
    unsigned long long ticket = ((atomic_load(&p->ticket) >> 32) + 1) << 32 | (unsigned)items;
    atomic_store(&p->ticket, ticket);
    if (!atomic_load(&p->sleepers)) return ticket;
    pthread_mutex_lock(&p->mutex);
    for (int i = 0; i < wanted; i++) pthread_cond_signal(&p->wake);
    pthread_mutex_unlock(&p->mutex);
    return ticket;
}

/* Stop and join the workers. */
static void pool_free(Pool *p)
{
    p->quit = true;
    pool_open(p, 0, p->n);
    for (int i = 1; i < p->n; i++) pthread_join(p->thread[i], NULL);
    munmap(p, sizeof *p);
}

/* Spread the items over the pool; thread < pool_threads. */
static void parallel_for(Pool *p, int items, void (*fn)(void *arg, int item, int thread), void *arg)
{
    if (p->n == 1 || items <= 1) {
        for (int i = 0; i < items; i++) fn(arg, i, 0);
        return;
    }
    p->fn = fn;
    p->arg = arg;
    atomic_store_explicit(&p->done, 0, memory_order_relaxed);
    pool_work(p, pool_open(p, items, min_int(p->wanted, items - 1)), 0);
    for (int i = 0; atomic_load_explicit(&p->done, memory_order_acquire) < items; i++) {
        if (i < p->spins) cpu_relax();
        else sched_yield();
    }
}

/* ---- 14a. Experts from disk ----
 * When the checkpoint is larger than memory, what every token uses stays mapped, and the experts, nearly all of the weights
 * but used by few tokens each, come through a cache of slots. After routing, all missing ones of a layer are asked for at
 * once; threads of their own read them, past the page cache: the kernel would read ahead what nobody asked for, copy it,
 * and clear out by age (measured at full size with half of it in memory: 3.8 tokens/s like this, 1.9 to 3 when the page
 * cache is asked for the same pieces, 0.8 by mapping alone).
 * Who has to leave: of some drawn by lot the one with the least *heat*, the number of its tokens, halved every HALF_LIFE
 * forwards. A large batch is a *scan*: layer by layer it takes nearly every expert. Those of layers already passed are then
 * needed again last, so they go first, and the next layer's are asked for before they are known to be wanted. */

enum {
    READERS = 16,             /* threads that read: as many requests the disk sees at once */
    READ_BYTES = 512 << 10,   /* of one request at most */
    DIRECT_ALIGN = 4096,      /* what O_DIRECT wants offsets, sizes and addresses to be multiples of */
    LOTS = 64,                /* slots drawn, of which one is emptied */
    HALF_LIFE = 128           /* forwards */
};

/* Room for one expert's weights. */
typedef struct Slot {
    int expert;               /* layer * num_experts + its number; -1: empty */
    uint64_t needed;          /* number of the last fetch that uses it: may be emptied when `fetch` is beyond */
    atomic_int left[2];       /* requests for each part not yet answered: readers count down */
} Slot;

typedef struct { int slot, part; } Job; /* a part to be read, request by request */

struct ExpertCache {
    const Mapping *file;      /* tells where in the file a tensor lies */
    int fd;
    bool direct;              /* reads go past the page cache; else it is told to forget them */
    const Mlp **layer;        /* [n_layers] those with experts */
    int n_layers, num_experts;
    uint8_t *arena;           /* [n_slots][slot_bytes]: gate_up and, part_at[DOWN] further, down; each as far into its page as in the file */
    size_t slot_bytes, part_at[2];
    Slot *slot;               /* [n_slots] */
    int n_slots, n_used;      /* slots; those from n_used on were never filled */
    int least;                /* slots it needs: a token's experts of a layer */
    size_t room;              /* bytes for slots and for keys and values together; 0: n_slots stays */
    int *slot_of;             /* [n_layers][num_experts] or -1 */
    float *heat;              /* [n_layers][num_experts], ... */
    uint64_t *heat_at;        /* ... as of this fetch */
    uint64_t fetch;           /* number of the fetch whose experts are in use */
    uint64_t lot;             /* random numbers */
    Job *jobs;                /* [max_jobs] a ring: what is to be read, in order */
    int64_t job_head, job_tail, max_jobs; /* the first of them and the one after the last, counted on */
    size_t job_done;          /* bytes of the first one that have been asked for */
    bool quit;
    pthread_mutex_t mutex;    /* of jobs, job_*, quit, slots' `expert`; all else is the main thread's alone */
    pthread_cond_t more, done; /* jobs; a part that has arrived */
    pthread_t reader[READERS];
    int64_t wanted, missing;  /* experts used, and experts that were read, in vain too */
    atomic_llong bytes_read;  /* whole pages */
};

/* Where an expert's part lies in the file, in whole pages: from the one in which it begins to the end of the one in which it ends. */
typedef struct { size_t offset, bytes, skip, need; } Pages; /* skip: where in its first page it begins; need: up to its end */

static Pages expert_pages(const ExpertCache *c, int expert, int part)
{
    const Mlp *layer = c->layer[expert / c->num_experts];
    const Matrix *m = part == DOWN ? &layer->down_proj : &layer->gate_up_proj;
    size_t at = (size_t)(m->data - c->file->data) + (size_t)(expert % c->num_experts) * m->matrix_bytes, skip = at % DIRECT_ALIGN;
    return (Pages){at - skip, round_up(skip + m->matrix_bytes, DIRECT_ALIGN), skip, skip + m->matrix_bytes};
}

/* Read `bytes` of the file at `offset`, whole pages, to `to`; at least `need` of them must be there. Ends the program with
 * a message when they cannot be had. */
static void read_pages(ExpertCache *c, uint8_t *to, size_t offset, size_t bytes, size_t need)
{
    for (size_t done = 0; done < need;) {
        ssize_t n = pread(c->fd, to + done, bytes - done, (off_t)(offset + done));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) die("%s: cannot read at %zu: %s", c->file->path, offset + done, strerror(errno));
        if (n == 0) die("%s: wanted %zu bytes at %zu, found the end of the file: cut off while in use?", c->file->path, need, offset);
        done += (size_t)n;
        atomic_fetch_add_explicit(&c->bytes_read, n, memory_order_relaxed);
    }
#ifdef POSIX_FADV_DONTNEED
    if (!c->direct) posix_fadvise(c->fd, (off_t)offset, (off_t)bytes, POSIX_FADV_DONTNEED);
#endif
}

/* A reader: takes the next request off the jobs, waiting for one if need be, reads it, again. */
static void *read_experts(void *arg)
{
    ExpertCache *c = arg;
    pthread_mutex_lock(&c->mutex);
    for (;;) {
        while (c->job_head == c->job_tail && !c->quit) pthread_cond_wait(&c->more, &c->mutex);
        if (c->quit) break;
        Job job = c->jobs[c->job_head % c->max_jobs];
        Slot *s = &c->slot[job.slot];
        Pages pages = expert_pages(c, s->expert, job.part);
        size_t from = c->job_done, bytes = min_size(READ_BYTES, pages.bytes - from);
        c->job_done += bytes;
        if (c->job_done == pages.bytes) c->job_done = 0, c->job_head++;
        pthread_mutex_unlock(&c->mutex);
        uint8_t *to = c->arena + (size_t)job.slot * c->slot_bytes + c->part_at[job.part] + from;
        read_pages(c, to, pages.offset + from, bytes, min_size(bytes, pages.need - from));
        bool last = atomic_fetch_sub_explicit(&s->left[job.part], 1, memory_order_release) == 1;
        pthread_mutex_lock(&c->mutex);
        if (last) pthread_cond_broadcast(&c->done);
    }
    pthread_mutex_unlock(&c->mutex);
    return NULL;
}

/* How warm an expert is now. */
static float heat_now(const ExpertCache *c, int expert)
{
    return c->heat[expert] * exp2f(-(float)(c->fetch - c->heat_at[expert]) / (float)(HALF_LIFE * c->n_layers));
}

/* Whether a slot may be emptied: nothing needs it, nothing is on its way into it. */
static bool slot_idle(const ExpertCache *c, const Slot *s)
{
    return s->needed < c->fetch && !atomic_load_explicit(&s->left[GATE_UP], memory_order_acquire) &&
           !atomic_load_explicit(&s->left[DOWN], memory_order_acquire);
}

/* A slot for another expert, by the rule above; NULL when all are in use. layer: where a scan has come to, else -1. */
static Slot *free_slot(ExpertCache *c, int layer)
{
    Slot *best = NULL;
    float least = INFINITY;
    if (c->n_used < c->n_slots) return &c->slot[c->n_used++];
    for (int i = 0; i < LOTS; i++) {
        c->lot = c->lot * 6364136223846793005u + 1442695040888963407u;
        Slot *s = &c->slot[(c->lot >> 33) % (uint64_t)c->n_slots];
        bool soon = c->heat_at[s->expert] == c->fetch || (layer >= 0 && s->expert / c->num_experts > layer); /* or the scan comes there yet */
        float heat = heat_now(c, s->expert) + (soon ? 1e30f : 0);
        if (heat < least && slot_idle(c, s)) best = s, least = heat;
    }
    for (int i = 0; !best && i < c->n_slots; i++)
        if (slot_idle(c, &c->slot[i])) best = &c->slot[i];
    return best;
}

/* Give an expert a slot and ask for its gate_up, unless it has one; it stays until fetch `needed` is over. Returns the
 * slot, or NULL when all others are in use. Holds the mutex. */
static Slot *expert_slot(ExpertCache *c, int expert, uint64_t needed, int layer)
{
    bool there = c->slot_of[expert] >= 0;
    Slot *s = there ? &c->slot[c->slot_of[expert]] : free_slot(c, layer);
    if (!s) return NULL;
    s->needed = needed;
    if (there) return s;
    if (s->expert >= 0) c->slot_of[s->expert] = -1;
    s->expert = expert;
    c->slot_of[expert] = (int)(s - c->slot);
    c->missing++;
    for (int part = 0; part < 2; part++) {
        int requests = (int)((expert_pages(c, expert, part).bytes + READ_BYTES - 1) / READ_BYTES);
        atomic_store_explicit(&s->left[part], requests, memory_order_relaxed);
    }
    c->jobs[c->job_tail++ % c->max_jobs] = (Job){(int)(s - c->slot), GATE_UP};
    return s;
}

/* After the gate_ups of all experts, ask for their downs, which are used later, and set the readers to work. `first`: the
 * first such job. Holds the mutex. */
static void ask_for_downs(ExpertCache *c, int64_t first)
{
    int64_t end = c->job_tail;
    for (int64_t i = first; i < end; i++) c->jobs[c->job_tail++ % c->max_jobs] = (Job){c->jobs[i % c->max_jobs].slot, DOWN};
    if (end > first) pthread_cond_broadcast(&c->more);
}

/* A network's weights, once they have arrived, are in this slot. */
static void use_slot(const ExpertCache *c, Ffn *f, Slot *s)
{
    f->slot = s;
    for (int part = 0; part < 2; part++)
        f->weights[part] = c->arena + (size_t)(s - c->slot) * c->slot_bytes + c->part_at[part] + expert_pages(c, s->expert, part).skip;
}

static int experts_fetch(ExpertCache *c, const Mlp *layer, Ffn *ffn, int n, bool scan)
{
    int i = 0;
    pthread_mutex_lock(&c->mutex);
    int64_t first = c->job_tail;
    c->fetch++;
    for (int k = 0; k < n; k++) { /* none shall make room for another one of them */
        int expert = layer->index * c->num_experts + ffn[k].expert;
        if (ffn[k].gate_up == &layer->gate_up_proj) c->heat[expert] = heat_now(c, expert), c->heat_at[expert] = c->fetch;
    }
    for (; i < n; i++) {
        if (ffn[i].gate_up != &layer->gate_up_proj) continue; /* the shared expert */
        int expert = layer->index * c->num_experts + ffn[i].expert;
        Slot *s;
        while (!(s = expert_slot(c, expert, c->fetch, scan ? layer->index : -1)) && i == 0)
            pthread_cond_wait(&c->done, &c->mutex); /* what is on its way into a slot was not needed after all */
        if (!s) break;
        c->wanted++;
        c->heat[expert] += (float)ffn[i].count;
        use_slot(c, &ffn[i], s);
    }
    ask_for_downs(c, first);
    pthread_mutex_unlock(&c->mutex);
    return i;
}

static void experts_ahead(ExpertCache *c, const Mlp *layer)
{
    pthread_mutex_lock(&c->mutex);
    int64_t first = c->job_tail;
    for (int i = 0; i < min_int(c->num_experts, c->n_slots / 8); i++) /* enough to keep the disk busy; the others' slots are of use yet */
        if (!expert_slot(c, layer->index * c->num_experts + i, c->fetch + 1, layer->index)) break;
    ask_for_downs(c, first);
    pthread_mutex_unlock(&c->mutex);
}

static void experts_wait(ExpertCache *c, const Ffn *f, int part)
{
    if (!f->slot || !atomic_load_explicit(&f->slot->left[part], memory_order_acquire)) return;
    pthread_mutex_lock(&c->mutex);
    while (atomic_load_explicit(&f->slot->left[part], memory_order_acquire)) pthread_cond_wait(&c->done, &c->mutex);
    pthread_mutex_unlock(&c->mutex);
}

/* Called between forwards, when nothing is in use: slots at the end make way, down to the least there must be. */
static void experts_make_way(ExpertCache *c, size_t bytes)
{
    if (!c->room || (size_t)c->n_slots * c->slot_bytes + bytes <= c->room) return;
    pthread_mutex_lock(&c->mutex);
    c->fetch += 2; /* also past the one that a forward which was then stopped has read ahead for */
    for (; c->n_slots > c->least && (size_t)c->n_slots * c->slot_bytes + bytes > c->room; c->n_slots--) {
        Slot *s = &c->slot[c->n_slots - 1];
        if (c->n_used < c->n_slots) continue; /* was never filled */
        while (!slot_idle(c, s)) pthread_cond_wait(&c->done, &c->mutex); /* read ahead, in vain */
        c->slot_of[s->expert] = -1;
        c->n_used--;
        give_back(c->arena + (size_t)(c->n_slots - 1) * c->slot_bytes, c->slot_bytes);
    }
    pthread_mutex_unlock(&c->mutex);
}

/* Bytes of a slot: the largest gate_up and the largest down, in whole pages; part_at: where each begins. */
static size_t expert_slot_bytes(const ExpertCache *c, size_t part_at[2])
{
    size_t largest[2] = {0};
    for (int layer = 0; layer < c->n_layers; layer++)
        for (int part = 0; part < 2; part++)
            for (int x = 0; x < c->num_experts; x++)
                largest[part] = max_size(largest[part], expert_pages(c, layer * c->num_experts + x, part).bytes);
    part_at[GATE_UP] = 0;
    part_at[DOWN] = largest[GATE_UP];
    return largest[GATE_UP] + largest[DOWN];
}

/* Where the experts of a model lie: a cache without slots yet. */
static ExpertCache *experts_plan(const Model *m)
{
    ExpertCache *c = grow(NULL, 1, sizeof *c);
    memset(c, 0, sizeof *c);
    c->file = &m->file;
    c->least = max_int(2, m->config.num_experts_per_tok);
    c->num_experts = m->config.num_experts;
    c->layer = grow(NULL, (size_t)m->config.n_sparse + 1, sizeof *c->layer);
    for (int i = 0; i < m->config.num_hidden_layers; i++)
        if (m->layers[i].mlp.gate.data) c->layer[c->n_layers++] = &m->layers[i].mlp;
    if (m->mtp.fc.data && m->mtp.layer.mlp.gate.data) c->layer[c->n_layers++] = &m->mtp.layer.mlp;
    c->slot_bytes = expert_slot_bytes(c, c->part_at);
    return c;
}

/* Open the file once more, past the page cache if the file system can; else the cache shall read nothing ahead and keep
 * nothing. Ends the program with a message when this fails or finds another file. */
static void open_for_readers(ExpertCache *c)
{
    int flags = O_RDONLY | O_CLOEXEC;
    struct stat info;
#ifdef O_DIRECT
    c->fd = fault() ? -1 : open(c->file->path, flags | O_DIRECT);
    c->direct = c->fd >= 0 && pread(c->fd, c->arena, DIRECT_ALIGN, 0) >= 0; /* some file systems open it so and then cannot */
    if (c->fd >= 0 && !c->direct) close(c->fd);
#endif
    if (!c->direct) c->fd = fault() ? -1 : open(c->file->path, flags);
    if (c->fd < 0 || fstat(c->fd, &info)) die("%s: %s", c->file->path, strerror(errno));
    if (info.st_dev != c->file->device || info.st_ino != c->file->inode) die("%s: another file has taken its place meanwhile", c->file->path);
#if defined F_NOCACHE
    fcntl(c->fd, F_NOCACHE, 1);
#elif defined POSIX_FADV_RANDOM
    if (!c->direct) posix_fadvise(c->fd, 0, 0, POSIX_FADV_RANDOM);
#endif
}

/* Give it n slots and start its readers. Ends the program with a message when it cannot. */
static void experts_start(ExpertCache *c, size_t n)
{
    size_t all = (size_t)c->n_layers * (size_t)c->num_experts;
    c->n_slots = (int)min_size(n, all);
    c->arena = (uint8_t *)reserve(mul((size_t)c->n_slots, c->slot_bytes) / sizeof(float), "expert cache");
    c->slot = grow(NULL, (size_t)c->n_slots, sizeof *c->slot);
    for (int i = 0; i < c->n_slots; i++) c->slot[i] = (Slot){.expert = -1};
    c->slot_of = grow(NULL, all, sizeof *c->slot_of);
    memset(c->slot_of, -1, all * sizeof *c->slot_of);
    c->heat = grow(NULL, all, sizeof *c->heat);
    c->heat_at = grow(NULL, all, sizeof *c->heat_at);
    memset(c->heat, 0, all * sizeof *c->heat);
    memset(c->heat_at, 0, all * sizeof *c->heat_at);
    c->max_jobs = 2 * c->n_slots; /* no slot is asked for again while something is on its way into it */
    c->jobs = grow(NULL, (size_t)c->max_jobs, sizeof *c->jobs);
    open_for_readers(c);
    pthread_mutex_init(&c->mutex, NULL);
    pthread_cond_init(&c->more, NULL);
    pthread_cond_init(&c->done, NULL);
    for (int i = 0; i < READERS; i++) start_thread(&c->reader[i], read_experts, c, "reads");
}

/* Stop the readers. */
static void experts_stop(ExpertCache *c)
{
    pthread_mutex_lock(&c->mutex);
    c->quit = true;
    pthread_cond_broadcast(&c->more);
    pthread_mutex_unlock(&c->mutex);
    for (int i = 0; i < READERS; i++) pthread_join(c->reader[i], NULL);
    close(c->fd);
}

/* Percent of the experts used that were found in memory. */
static double experts_found(const ExpertCache *c)
{
    return 100 * fmax(0, 1 - (double)c->missing / (double)c->wanted);
}

/* Begin the statistics anew. */
static void experts_count_anew(ExpertCache *c)
{
    c->wanted = c->missing = 0;
    c->bytes_read = 0;
}

/* The first number in a file, SIZE_MAX without one. name: if not NULL, the number that follows this word. */
static size_t number_in(const char *dir, const char *path, const char *file, const char *name)
{
    char full[PATH_MAX + 64], line[256];
    snprintf(full, sizeof full, "%s%s/%s", dir, path, file);
    FILE *f = fopen(full, "r");
    size_t n, found = SIZE_MAX, skip = name ? strlen(name) : 0;
    while (f && found == SIZE_MAX && fgets(line, sizeof line, f))
        if ((!name || !strncmp(line, name, skip)) && sscanf(line + skip, "%zu", &n) == 1) found = n;
    if (f) fclose(f);
    return found;
}

/* Bytes that a control group (cgroup, version 1 or 2) lets its processes still take: what it holds of files on disks can be given back. */
static size_t group_room(const char *root, const char *path, bool two)
{
    size_t limit = number_in(root, path, two ? "memory.max" : "memory.limit_in_bytes", NULL);
    size_t used = number_in(root, path, two ? "memory.current" : "memory.usage_in_bytes", NULL);
    size_t files = number_in(root, path, "memory.stat", two ? "file " : "total_cache ");
    size_t shared = number_in(root, path, "memory.stat", two ? "shmem " : "total_shmem "); /* among them, but stays */
    if (two) limit = min_size(limit, number_in(root, path, "memory.high", NULL));
    if (limit == SIZE_MAX || used == SIZE_MAX) return SIZE_MAX; /* no such group, or no limit */
    if (files != SIZE_MAX) used -= min_size(used, files - (shared != SIZE_MAX ? min_size(shared, files) : 0));
    return limit - min_size(limit, used);
}

/* Bytes of memory that this process may take: what the system has to spare, and what its groups and those around them allow. */
static size_t memory_available(void)
{
    size_t room = number_in("", "/proc", "meminfo", "MemAvailable:"); /* in KB */
    room = room == SIZE_MAX ? (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE) / 4 * 3 : room * 1024;
    char line[PATH_MAX];
    FILE *f = fopen("/proc/self/cgroup", "r");
    while (f && fgets(line, sizeof line, f)) { /* number:kinds:path; version 2 names no kinds */
        char *kinds = strchr(line, ':'), *path = kinds ? strchr(kinds + 1, ':') : NULL;
        if (!path) continue;
        *path++ = 0;
        path[strcspn(path, "\n")] = 0;
        bool two = !kinds[1];
        if (!two && !strstr(kinds, "memory")) continue;
        for (char *slash;; *slash = 0) { /* the group, then those around it */
            room = min_size(room, group_room(two ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory", path, two));
            if (!(slash = strrchr(path, '/'))) break;
        }
    }
    if (f) fclose(f);
    return room;
}

/* ---- 15. Kernels ----
 * From here to the table, this file includes itself once for each instruction set: the same C, other widths of
 * vector, and a few operations that differ: `dot4` (int8), `look_up` (q4), the loads of f16 and int8. The pass called plain is
 * their definition.
 * FN(name) names a pass's copy of a function; VB is the vector's bytes. A tile's 16 rows are PARTS vectors. */
#define KERNEL_PASS plain
#define VB 16
#define ROWS 4
#include "qwen3next.c"
#undef KERNEL_PASS
#if defined HAVE_X86
#define KERNEL_PASS avx2
#define VB 32
#define ROWS 4
#define USE_AVX2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#include "qwen3next.c"
#undef KERNEL_PASS
#define KERNEL_PASS avx512
#define VB 64
#define ROWS 8
#define USE_AVX512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx2,fma,f16c")))
#include "qwen3next.c"
#undef KERNEL_PASS
#elif defined HAVE_NEON
#define KERNEL_PASS neon
#define VB 16
#define ROWS 4
#define USE_NEON
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#include "qwen3next.c"
#undef KERNEL_PASS
#endif

#else /* KERNEL_PASS: one pass over the kernels */

#ifndef TARGET
#define TARGET
#endif
#define FN2(name, pass) name##_##pass
#define FN1(name, pass) FN2(name, pass)
#define FN(name) FN1(name, KERNEL_PASS)
#define vf FN(vf)
#define vfu FN(vfu)
#define vi FN(vi)
#define viu FN(viu)
#define vb FN(vb)
#define vbu FN(vbu)
#define INLINE TARGET static inline __attribute__((always_inline))
#define LANES (VB / 4)
#define PARTS (TILE / LANES)
#if !defined USE_AVX2 && !defined USE_AVX512 && !defined USE_NEON
#define UNROLL
#elif defined __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* Keeps the compiler from moving loads across. Weights must be read strictly forward: a step back, and the processor's
 * prefetcher gives up (measured: 19 instead of 23 GB/s). */
#define IN_ORDER __asm__ volatile("" ::: "memory")

typedef float vf __attribute__((vector_size(VB), may_alias));
typedef float vfu __attribute__((vector_size(VB), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(VB), may_alias));
typedef int32_t viu __attribute__((vector_size(VB), aligned(4), may_alias));
typedef uint8_t vb __attribute__((vector_size(VB), may_alias));
typedef uint8_t vbu __attribute__((vector_size(VB), aligned(1), may_alias));

/* LANES floats from 16-bit floats: bf16 is the upper half of a float. */
INLINE void FN(load_bf16)(vf *out, const uint16_t *p)
{
    typedef uint16_t half __attribute__((vector_size(VB / 2), aligned(2), may_alias));
    *out = (vf)(__builtin_convertvector(*(const half *)p, vi) << 16);
}

INLINE void FN(load_f16)(vf *out, const uint16_t *p)
{
#if defined USE_AVX512
    *out = (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined USE_AVX2
    *out = (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#elif defined USE_NEON
    *out = (vf)vcvt_f32_f16(vld1_f16((const __fp16 *)p));
#else
    vf v = {0};
    for (int i = 0; i < LANES; i++) v[i] = f16_to_float(p[i]);
    *out = v;
#endif
}

/* LANES floats from int8 (gcc 12 does a vector conversion of this kind number by number). */
INLINE void FN(load_int8)(vf *out, const int8_t *p)
{
#if defined USE_AVX512
    *out = (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined USE_AVX2
    *out = (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    vf v = {0};
    for (int i = 0; i < LANES; i++) v[i] = p[i];
    *out = v;
#endif
}

/* The int8 heart: each lane (row) adds the products of its 4 weights (stored + 128) with 4 activations.
 * DOT_UNSIGNED: the instruction takes the weights as stored, so sums begin at -128 * (sum of activations). */
#if defined USE_AVX512
#define DOT_UNSIGNED 1
#else
#define DOT_UNSIGNED 0
#endif
INLINE void FN(dot4)(vi *sum, const vb *w, const int8_t *x)
{
    int32_t four;
    memcpy(&four, x, 4);
#if defined USE_AVX512
    *sum = (vi)_mm512_dpbusd_epi32((__m512i)*sum, (__m512i)*w, _mm512_set1_epi32(four));
#elif defined USE_AVX2 /* vpmaddubsw wants unsigned x signed and saturates beyond 16 bits: |w| times x with w's sign */
    __m256i s = _mm256_xor_si256((__m256i)*w, _mm256_set1_epi8(-128));
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(s), _mm256_sign_epi8(_mm256_set1_epi32(four), s));
    *sum += (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined USE_NEON
    int8x16_t s = vreinterpretq_s8_u8(veorq_u8((uint8x16_t)*w, vdupq_n_u8(128)));
    *sum = (vi)vdotq_s32((int32x4_t)*sum, s, vreinterpretq_s8_s32(vdupq_n_s32(four)));
#else
    for (int r = 0; r < LANES; r++)
        for (int i = 0; i < 4; i++) (*sum)[r] += ((*w)[4 * r + i] - 128) * x[i];
#endif
}

/* Bytes as q8 stores them from q4's nibbles: codebook value + 128. book: all ones in lanes of the second 16 levels. */
INLINE void FN(look_up)(vb *out, const vb *index, const int8_t *levels, const vi *book)
{
#if defined USE_AVX512
    __m512i table = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)levels));
    table = _mm512_xor_si512(table, _mm512_set1_epi8(-128));
    *out = (vb)_mm512_permutexvar_epi8((__m512i)(*index | ((vb)*book & 16)), table);
#elif defined USE_AVX2
    const __m128i flip = _mm_set1_epi8(-128), *l = (const __m128i *)levels;
    __m256i first = _mm256_broadcastsi128_si256(_mm_xor_si128(_mm_loadu_si128(l), flip));
    __m256i second = _mm256_broadcastsi128_si256(_mm_xor_si128(_mm_loadu_si128(l + 1), flip));
    first = _mm256_shuffle_epi8(first, (__m256i)*index);
    second = _mm256_shuffle_epi8(second, (__m256i)*index);
    *out = (vb)_mm256_blendv_epi8(first, second, (__m256i)*book);
#elif defined USE_NEON
    uint8x16_t flip = vdupq_n_u8(128);
    uint8x16x2_t both = {{veorq_u8(vreinterpretq_u8_s8(vld1q_s8(levels)), flip),
                          veorq_u8(vreinterpretq_u8_s8(vld1q_s8(levels + 16)), flip)}};
    *out = (vb)vqtbl2q_u8(both, vorrq_u8((uint8x16_t)*index, vandq_u8((uint8x16_t)*book, vdupq_n_u8(16))));
#else
    for (int i = 0; i < VB; i++) (*out)[i] = (uint8_t)(levels[(*book)[i / 4] * -16 + (*index)[i]] + 128);
#endif
}

/* One tile against n rows, n a constant: y[t] = sum over c of column c times x[t][c], in the order of c. type: what w's numbers
 * are stored as. */
INLINE void FN(float_rows)(const uint8_t *w, int cols, const void *const *x, float (*y)[TILE], int n, const uint8_t *next,
                         KvType type)
{
    vf acc[ROWS][PARTS], column[PARTS];
    UNROLL for (int t = 0; t < n; t++)
        UNROLL for (int p = 0; p < PARTS; p++) acc[t][p] = (vf){0};
    for (int c = 0; c < cols; c++) {
        if (next) __builtin_prefetch(next + (size_t)c * TILE * 4, 0, 2);
        UNROLL for (int p = 0; p < PARTS; p++) {
            if (type == KV_F16) FN(load_f16)(&column[p], (const uint16_t *)w + (size_t)c * TILE + p * LANES);
            else if (type == KV_Q8) FN(load_int8)(&column[p], (const int8_t *)w + (size_t)c * TILE + p * LANES);
            else column[p] = *(const vfu *)((const float *)w + (size_t)c * TILE + p * LANES);
        }
        UNROLL for (int t = 0; t < n; t++)
            UNROLL for (int p = 0; p < PARTS; p++) acc[t][p] += column[p] * ((const float *)x[t])[c];
    }
    UNROLL for (int t = 0; t < n; t++)
        UNROLL for (int p = 0; p < PARTS; p++) *(vfu *)(y[t] + p * LANES) = acc[t][p];
}

/* bf16 tiles hold pairs of columns, so that one load gives two vectors: even columns in the upper halves' places
 * after a shift, odd ones after a mask. Even and odd columns are summed apart and added last. */
INLINE void FN(bf16_rows)(const uint8_t *w, int cols, const void *const *x, float (*y)[TILE], int n, const uint8_t *next)
{
    vf even[ROWS][PARTS], odd[ROWS][PARTS];
    UNROLL for (int t = 0; t < n; t++)
        UNROLL for (int p = 0; p < PARTS; p++) even[t][p] = odd[t][p] = (vf){0};
    for (int c = 0; c < cols; c += 2) {
        if (next) __builtin_prefetch(next + (size_t)c * TILE * 2, 0, 2);
        UNROLL for (int p = 0; p < PARTS; p++) {
            vi pair = *(const viu *)(w + ((size_t)c * TILE + (size_t)p * LANES * 2) * 2);
            vf lower = (vf)(pair << 16), upper = (vf)(pair & (int32_t)0xffff0000);
            UNROLL for (int t = 0; t < n; t++) {
                even[t][p] += lower * ((const float *)x[t])[c];
                odd[t][p] += upper * ((const float *)x[t])[c + 1];
            }
        }
    }
    UNROLL for (int t = 0; t < n; t++)
        UNROLL for (int p = 0; p < PARTS; p++) *(vfu *)(y[t] + p * LANES) = even[t][p] + odd[t][p];
}

/* 16 rows x 4 columns at a time: exact integer sums over a block of 32, then one factor: scale_w * scale_x. */
INLINE void FN(int8_rows)(const uint8_t *w, int cols, const void *const *x, float (*y)[TILE], int n, const uint8_t *next,
                          int bits, const int8_t *levels)
{

    vf acc[ROWS][PARTS];
    const ActBlock *a[ROWS];
    UNROLL for (int t = 0; t < n; t++) {
        a[t] = x[t];
        UNROLL for (int p = 0; p < PARTS; p++) acc[t][p] = (vf){0};
    }
    for (int super = 0; super * SUPER < cols; super++) {
        const uint16_t *scales = (const uint16_t *)w;
        int block = TILE * BLOCK * bits / 8, bytes = 2 * TILE * 2 + 2 * block;
        for (int i = 0; next && i < bytes; i += 64) __builtin_prefetch(next + (size_t)super * (size_t)bytes + i, 0, 2);
        w += 2 * TILE * 2;
        UNROLL for (int b = 0; b < 2; b++)
            UNROLL for (int p = 0; p < PARTS; p++) {
                vi sum[ROWS];
                vf scale;
                const uint8_t *from = w + b * block + p * VB;
                vb two[2] = {{0}};
                FN(load_bf16)(&scale, scales + b * TILE + p * LANES);
                vi book = (vi)scale << 15 >> 31; /* q4: the lowest bit of the 16 chooses the codebook */
                if (bits == 6) two[0] = *(const vbu *)from, two[1] = *(const vbu *)(from + 64);
                IN_ORDER;
                UNROLL for (int t = 0; t < n; t++) sum[t] = (vi){0} + (DOT_UNSIGNED ? a[t][super].bias[b] : 0);
                UNROLL for (int j = 0; j < 8; j++) {
                    vb tile;
                    if (bits == 8) {
                        tile = *(const vbu *)(from + j * 64);
                    } else if (bits == 6) { /* the upper six bits of q8's byte */
                        tile = *(const vbu *)(from + 128 + j % 4 * 64);
                        vb low = two[j / 4];
                        if (j < 4) tile <<= 4;
                        if (j % 4) low >>= j % 4 * 2 - 2;
                        else low <<= 2;
                        tile = (tile & 0xf0) | (low & 12);
                    } else {
                        tile = *(const vbu *)(from + j % 4 * 64);
                        if (j < 4) tile &= 15;
                        else tile >>= 4;
                        FN(look_up)(&tile, &tile, levels, &book);
                    }
                    UNROLL for (int t = 0; t < n; t++) FN(dot4)(&sum[t], &tile, a[t][super].q + b * BLOCK + j * 4);
                }
                UNROLL for (int t = 0; t < n; t++)
                    acc[t][p] += __builtin_convertvector(sum[t], vf) * (scale * a[t][super].d[b]);
            }
        w += 2 * block;
    }
    UNROLL for (int t = 0; t < n; t++)
        UNROLL for (int p = 0; p < PARTS; p++) *(vfu *)(y[t] + p * LANES) = acc[t][p];
}

/* The tile kernels of the table: one body, instantiated for every number of rows so that sums stay in registers. */
#define EACH_ROWS(call)                                                                                                \
    switch (n) {                                                                                                       \
    case 1: { enum { N = 1 }; call; break; }                                                                           \
    case 2: { enum { N = 2 }; call; break; }                                                                           \
    case 3: { enum { N = 3 }; call; break; }                                                                           \
    case 4: { enum { N = 4 }; call; break; }                                                                           \
    case 5: { enum { N = ROWS < 5 ? ROWS : 5 }; call; break; }                                                         \
    case 6: { enum { N = ROWS < 6 ? ROWS : 6 }; call; break; }                                                         \
    case 7: { enum { N = ROWS < 7 ? ROWS : 7 }; call; break; }                                                         \
    default: { enum { N = ROWS }; call; }                                                                              \
    }
#define TILE_KERNEL(name, call)                                                                                        \
    TARGET static void FN(name)(const uint8_t *w, int cols, const void *const *x, int n, float (*y)[TILE],            \
                                const int8_t *levels, const uint8_t *next)                                             \
    {                                                                                                                  \
        (void)levels;                                                                                                  \
        EACH_ROWS(call)                                                                                                \
    }
TILE_KERNEL(tile_f32, FN(float_rows)(w, cols, x, y, N, next, KV_F32))
TILE_KERNEL(kv_f16, FN(float_rows)(w, cols, x, y, N, next, KV_F16))
TILE_KERNEL(kv_q8, FN(float_rows)(w, cols, x, y, N, next, KV_Q8))
TILE_KERNEL(tile_bf16, FN(bf16_rows)(w, cols, x, y, N, next))
TILE_KERNEL(tile_q8, FN(int8_rows)(w, cols, x, y, N, next, 8, NULL))
TILE_KERNEL(tile_q6, FN(int8_rows)(w, cols, x, y, N, next, 6, NULL))
TILE_KERNEL(tile_q4, FN(int8_rows)(w, cols, x, y, N, next, 4, levels))

/* One block of 32 floats to int8: scale = largest / 127, rounded to nearest even. */
INLINE void FN(quantize_block)(ActBlock *a, int b, const float *x)
{
    enum { VECTORS = BLOCK / LANES };
    vi top = {0}, sum = {0};
    UNROLL for (int j = 0; j < VECTORS; j++) { /* without their sign, floats are ordered as their bits are */
        vi size = *(const viu *)(x + j * LANES) & 0x7fffffff, larger = size > top;
        top = (larger & size) | (~larger & top);
    }
    for (int i = 1; i < LANES; i++) top[0] = top[i] > top[0] ? top[i] : top[0];
    float max = ((vf)top)[0];
    bool sane = max > 1e-36f && max < INFINITY; /* else 127 / max or x / max has no value: all q are 0 */
    float inverse = sane ? 127 / max : 0;
    typedef int8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
    UNROLL for (int j = 0; j < VECTORS; j++) { /* adding 1.5 * 2^23 leaves the rounded integer in the lowest bits */
        vi q = ((vi)(*(const vfu *)(x + j * LANES) * inverse + 0x1.8p23f) - 0x4b400000) & -(int32_t)sane;
        *(bytes *)(a->q + b * BLOCK + j * LANES) = __builtin_convertvector(q, bytes);
        sum += q;
    }
    for (int i = 1; i < LANES; i++) sum[0] += sum[i];
    a->d[b] = max / 127;
    a->bias[b] = -128 * sum[0];
}

/* Floats to int8 blocks, zero padded to a whole superblock. */
TARGET static void FN(quantize)(ActBlock *out, const float *x, int n)
{
    for (int i = 0; i < n; i += SUPER, out++)
        for (int b = 0; b < 2; b++) {
            float padded[BLOCK] = {0};
            int left = n - i - b * BLOCK;
            if (left > 0 && left < BLOCK) memcpy(padded, x + i + b * BLOCK, (size_t)left * sizeof *x);
            FN(quantize_block)(out, b, left >= BLOCK ? x + i + b * BLOCK : padded);
        }
}

/* a . b in four interleaved vectors, summed pairwise, then lane by lane. */
TARGET static float FN(dot)(const float *a, const float *b, int n)
{
    vf acc[4] = {{0}};
    float sum = 0;
    int i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        UNROLL for (int j = 0; j < 4; j++) acc[j] += *(const vfu *)(a + i + j * LANES) * *(const vfu *)(b + i + j * LANES);
    vf all = (acc[0] + acc[1]) + (acc[2] + acc[3]);
    for (; i < n; i++) sum += a[i] * b[i];
    for (int j = 0; j < LANES; j++) sum += all[j];
    return sum;
}

/* exp(x) for LANES values: x = k ln 2 + r, a polynomial of degree 7 for e^r, and k into the exponent.
 * Within 2 units in the last place; 0 below -87, saturated above 88; NaN stays NaN. */
INLINE void FN(exp)(vf *out, const vf *in)
{
    vf x = *in;
    vi nan = x != x, low = ~(x >= -87.0f), high = x > 88.0f; /* low: of a NaN too, whose bits shall not reach the sum of exponents */
    x = (vf)((~(low | high) & (vi)x) | (high & (vi)((vf){0} + 88.0f)));
    vf k = x * 1.44269504f + 0x1.8p23f;
    vi shift = (vi)k;
    k -= 0x1.8p23f;
    vf r = (x - k * 0x1.62e4p-1f) - k * 1.42860677e-6f;
    vf p = r * 1.98412698e-4f + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    vi bits = (vi)p + (shift << 23);
    *out = (vf)((~low & bits) | nan);
}

TARGET static void FN(sigmoid)(float *y, const float *x, int n)
{
    for (int i = 0; i < n; i += LANES) {
        vf v = {0};
        if (n - i >= LANES) v = -*(const vfu *)(x + i);
        else for (int j = 0; j < n - i; j++) v[j] = -x[i + j];
        FN(exp)(&v, &v);
        v = 1.0f / (1.0f + v);
        if (n - i >= LANES) *(vfu *)(y + i) = v;
        else for (int j = 0; j < n - i; j++) y[i + j] = v[j];
    }
}

TARGET static float FN(exp_sum)(float *x, float max, int n)
{
    vf all = {0};
    float sum = 0;
    for (int i = 0; i < n; i += LANES) {
        vf v = (vf){0} - INFINITY;
        if (n - i >= LANES) v = *(const vfu *)(x + i);
        else for (int j = 0; j < n - i; j++) v[j] = x[i + j];
        v -= max;
        FN(exp)(&v, &v);
        all += v;
        if (n - i >= LANES) *(vfu *)(x + i) = v;
        else for (int j = 0; j < n - i; j++) x[i + j] = v[j];
    }
    for (int j = 0; j < LANES; j++) sum += all[j];
    return sum;
}

TARGET static void FN(add_scaled)(float *out, const float *y, float weight, int n)
{
    int i = 0;
    for (; i + LANES <= n; i += LANES) *(vfu *)(out + i) += *(const vfu *)(y + i) * weight;
    for (; i < n; i++) out[i] += y[i] * weight;
}

/* S'k for LANES columns: four partial sums, added pairwise. S: [dk][16] */
INLINE void FN(state_read)(vf *out, const float *S, int dk, const float *k)
{
    vf sum[4] = {{0}};
    int i = 0;
    for (; i + 4 <= dk; i += 4)
        UNROLL for (int j = 0; j < 4; j++) sum[j] += *(const vfu *)(S + (i + j) * TILE) * k[i + j];
    for (; i < dk; i++) sum[0] += *(const vfu *)(S + i * TILE) * k[i];
    *out = (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

/* The delta rule for 16 value columns, token after token, with the state in L1:
 *     S = decay S;  u = beta (v - S'k);  S = S + k u;  o = S'q
 * In one pass a token: (decay S)'k = decay (S'k), so u = beta (v - decay Sk) where Sk = S'k of the state before, which
 * the pass of the token before summed up while it wrote that state, in state_read's order (the last one in vain).
 * S: [dk][16]; q, k: [n][dk] and v: [n][16], rows ld apart; o: [n][16], rows ldo apart; decay, beta: [n]. */
TARGET static void FN(delta_rule)(float *S, int dk, int n, const float *q, const float *k, const float *v, size_t ld,
                                  const float *decay, const float *beta, float *o, int ldo)
{
    for (int p = 0; p < PARTS; p++) {
        float *s = S + p * LANES;
        vf Sk;
        FN(state_read)(&Sk, s, dk, k);
        for (int t = 0; t < n; t++) {
            const float *kt = k + (size_t)t * ld, *qt = q + (size_t)t * ld, *next = t + 1 < n ? kt + ld : kt;
            vf u = (*(const vfu *)(v + (size_t)t * ld + p * LANES) - Sk * decay[t]) * beta[t];
            vf out[4] = {{0}}, read[4] = {{0}};
            int i = 0;
            for (; i + 4 <= dk; i += 4)
                UNROLL for (int j = 0; j < 4; j++) {
                    vf row = *(const vfu *)(s + (i + j) * TILE) * decay[t] + u * kt[i + j];
                    *(vfu *)(s + (i + j) * TILE) = row;
                    out[j] += row * qt[i + j];
                    read[j] += row * next[i + j];
                }
            for (; i < dk; i++) {
                vf row = *(const vfu *)(s + i * TILE) * decay[t] + u * kt[i];
                *(vfu *)(s + i * TILE) = row;
                out[0] += row * qt[i];
                read[0] += row * next[i];
            }
            *(vfu *)(o + t * ldo + p * LANES) = (out[0] + out[1]) + (out[2] + out[3]);
            Sk = (read[0] + read[1]) + (read[2] + read[3]);
        }
    }
}

/* Twelve independent sums, enough to hide the latency of one instruction. */
TARGET static double FN(peak)(float *data, bool floats)
{
    enum { SUMS = 12, STEPS = 1000 };
    vi sum[SUMS];
    vf acc[SUMS];
    UNROLL for (int j = 0; j < SUMS; j++) sum[j] = (vi){0} + j, acc[j] = (vf){0} + (float)j; /* all different sums */
    for (int i = 0; i < STEPS; i++) {
        IN_ORDER; /* data may have changed: nothing may be computed ahead */
        vb w = *(const vbu *)data;
        UNROLL for (int j = 0; j < SUMS; j++) {
            if (floats) acc[j] += (vf)w * data[j];
            else FN(dot4)(&sum[j], &w, (const int8_t *)data + j);
        }
    }
    UNROLL for (int j = 0; j < SUMS; j++) data[1] += acc[j][0] + (float)sum[j][0];
    return 2.0 * SUMS * STEPS * (floats ? LANES : VB);
}

#define QUOTE2(x) #x
#define QUOTE(x) QUOTE2(x)
static const Kernels FN(kernels) = {
    QUOTE(KERNEL_PASS), ROWS,
    {NULL, FN(tile_f32), FN(tile_bf16), FN(tile_q8), FN(tile_q4), FN(tile_q6)},
    {FN(tile_f32), FN(kv_f16), FN(kv_q8)},
    FN(quantize), FN(dot), FN(sigmoid), FN(exp_sum), FN(add_scaled), FN(peak), FN(delta_rule)};

#undef TARGET
#undef VB
#undef ROWS
#undef USE_AVX2
#undef USE_AVX512
#undef USE_NEON
#undef FN
#undef FN1
#undef FN2
#undef vf
#undef vfu
#undef vi
#undef viu
#undef vb
#undef vbu
#undef INLINE
#undef LANES
#undef PARTS
#undef UNROLL
#undef IN_ORDER
#undef DOT_UNSIGNED
#undef EACH_ROWS
#undef TILE_KERNEL
#undef QUOTE
#undef QUOTE2
#endif /* KERNEL_PASS */

#ifndef KERNEL_PASS /* ---------- from here on everything is compiled once ---------- */

/* The kernel sets of this build, best last. */
static const Kernels *const KERNEL_SETS[] = {
    &kernels_plain,
#if defined HAVE_X86
    &kernels_avx2, &kernels_avx512,
#elif defined HAVE_NEON
    &kernels_neon,
#endif
};

/* Whether this processor has the instructions of a set. */
static bool kernels_run_here(const Kernels *k)
{
#if defined HAVE_X86
    __builtin_cpu_init();
    if (!strcmp(k->name, "avx2"))
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); /* f16c came before avx2 */
    if (!strcmp(k->name, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
               __builtin_cpu_supports("avx512vnni");
#endif
#if defined HAVE_NEON && defined __linux__
    if (!strcmp(k->name, "neon")) return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#endif
    (void)k; /* a build with no set but plain asks nothing of it */
    return true;
}

/* The set called `name`, or for NULL the best that runs here. */
static const Kernels *choose_kernels(const char *name)
{
    const Kernels *best = NULL;
    for (size_t i = 0; i < sizeof KERNEL_SETS / sizeof *KERNEL_SETS; i++)
        if ((!name || !strcmp(KERNEL_SETS[i]->name, name)) && kernels_run_here(KERNEL_SETS[i])) best = KERNEL_SETS[i];
    if (!best) die("--cpu %s: this processor or build cannot run these kernels", name);
    return best;
}

/* ============================== Part V: the program ============================== */

/* ---- 15a. What all modes share: files, signals, the run, feeding tokens ---- */

/* Nothing more will be printed: ends the program with a message when not all could be. */
static void end_output(void)
{
    flush_output();
    if (ferror(stdout) && !leaving) die("standard output: %s", strerror(output_error ? output_error : EIO)); /* leaving: a terminal has hung up */
}

#define MAX_TEXT ((size_t)1 << 30) /* bytes read at once: more tokens than a context has */

/* The whole of a file, or of standard input for "-", into an empty string. False after a message. */
static bool read_file(const char *path, Str *s)
{
    FILE *f = fault() ? NULL : strcmp(path, "-") ? fopen(path, "rb") : stdin;
    if (!f) return warn("%s: %s", path, strerror(errno));
    char buffer[1 << 16];
    for (size_t n; s->len <= MAX_TEXT && (n = fread(buffer, 1, sizeof buffer, f)) > 0;) str_add(s, buffer, n);
    bool failed = ferror(f) || s->len > MAX_TEXT;
    if (ferror(f)) warn("%s: %s", path, strerror(errno));
    else if (failed) warn("%s: wanted a text of at most %zu bytes, found more", path, MAX_TEXT);
    if (f != stdin) fclose(f);
    str_add(s, "", 0);
    return !failed;
}

/* Whether two names are of one file. */
static bool same_file(const char *a, const char *b)
{
#ifdef _WIN32
    char x[PATH_MAX], y[PATH_MAX];
    return realpath(a, x) && realpath(b, y) && !_stricmp(x, y);
#else
    struct stat x, y;
    return !stat(a, &x) && !stat(b, &y) && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
#endif
}

/* Whether a name is that of a symbolic link. */
static bool is_link(const char *name)
{
#ifdef _WIN32
    return (void)name, false;
#else
    struct stat info;
    return !lstat(name, &info) && S_ISLNK(info.st_mode);
#endif
}

/* The part of a path behind its folder. */
static const char *file_name(const char *path)
{
    const char *slash = strrchr(path, '/');
#ifdef _WIN32
    const char *other = strrchr(path, '\\');
    if (other && (!slash || other > slash)) slash = other;
#endif
    return slash ? slash + 1 : path;
}

/* The path of this program, empty where it cannot be had. */
static void program_path(char path[PATH_MAX])
{
    path[0] = 0;
#if defined _WIN32
    unsigned long n = GetModuleFileNameA(NULL, path, PATH_MAX);
    if (n == PATH_MAX) path[0] = 0;
#elif defined __APPLE__
    uint32_t n = PATH_MAX;
    if (_NSGetExecutablePath(path, &n)) path[0] = 0;
#else
    ssize_t n = readlink("/proc/self/exe", path, PATH_MAX - 1);
    path[n > 0 ? n : 0] = 0;
#endif
}

/* A file being written: a temporary that takes the final name when it is whole, or a device or pipe, as it is. */
typedef struct {
    FILE *file;
    const char *name;      /* as given; messages tell it */
    char target[PATH_MAX], path[PATH_MAX]; /* where it points to if it is a link; what is being written */
    bool temporary;
    int error;             /* errno of the first write that failed, if it has been noticed (out_check) */
} OutFile;

/* Begin to write a file, with the rights of an older one of this name. False after a message. */
static bool out_open(OutFile *o, const char *name)
{
    struct stat info;
    bool old = !stat(name, &info);
    o->name = name;
    o->error = 0;
    o->temporary = !old || S_ISREG(info.st_mode);
    if (!old && is_link(name)) return warn("%s: a link that leads nowhere", name);
    if (!old || !realpath(name, o->target)) snprintf(o->target, sizeof o->target, "%s", name);
    int folder = (int)(file_name(o->target) - o->target), n = snprintf(o->path, sizeof o->path, "%s", o->target);
    if (o->temporary) n = snprintf(o->path, sizeof o->path, "%.*s" PROGRAM ".%ld.tmp", folder, o->target, (long)getpid());
    if (strlen(name) >= sizeof o->target || n >= (int)sizeof o->path) return warn("%s: %s", name, strerror(ENAMETOOLONG));
    int how = O_WRONLY | O_CREAT | O_CLOEXEC | (o->temporary ? O_EXCL : O_TRUNC); /* O_EXCL: not what a link leads to */
    sigset_t before;
    hold_signals(&before); /* until it is known what they are to remove */
    int fd = fault() ? -1 : open(o->path, how, old && o->temporary ? info.st_mode & 0777 : 0666), error = errno;
    if (fd >= 0 && o->temporary) unfinished_fd = fd, unfinished_file = o->path;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (fd < 0) return warn("%s: %s", error == EEXIST ? o->path : name, strerror(error));
    o->file = fault() ? NULL : fdopen(fd, "wb");
    if (!o->file) die("%s: %s", name, strerror(errno));
    if (old && o->temporary && fchmod(fileno(o->file), info.st_mode & 0777)) warn("%s: its rights are not kept: %s", name, strerror(errno));
    return true;
}

/* Note why a write has failed, if one has, before errno tells of something else. */
static void out_check(OutFile *o)
{
    if (!o->error) o->error = write_error(o->file);
}

/* End it: whole, and then under its name, or, after a failed write (errno tells which) or by intention, leaving nothing.
 * durable: on the disk before it takes the place of an older file. False after a message when it was to be whole. */
static bool out_close(OutFile *o, bool whole, bool durable)
{
    out_check(o);
    int error = o->error;
    if (!error && whole && (fflush(o->file) || (durable && o->temporary && fsync(fileno(o->file))))) error = errno;
    if (fclose(o->file) && !error) error = errno;
    if (!error && whole && o->temporary && (fault() || rename(o->path, o->target))) error = errno;
    if (o->temporary && (error || !whole)) unlink(o->path);
    unfinished_file = NULL;
    if (error) warn("%s: %s", o->name, strerror(error));
    return whole && !error;
}

/* Ctrl-C has been acted upon; SIGTERM holds until the end. */
static void forget_interrupts(void) { interrupted = leaving != 0; }

/* A signal that ends a run. SIGQUIT ends it here and now. SIGINT, SIGTERM, SIGHUP: whoever watches stops soon, and what was to
 * be saved is saved; when nobody does, at the third SIGINT that nobody has acted upon, and at the second of the others, the
 * program ends here and now. */
static void on_interrupt(int sig)
{
    bool again = sig == SIGINT ? interrupted >= 2 : leaving != 0;
#ifdef _WIN32
    bool quit = false;
    signal(sig, on_interrupt); /* once is for once there */
#else
    bool quit = sig == SIGQUIT;
#endif
    if (sig != SIGINT) leaving = sig;
    interrupted++;
    if (watching && !again && !quit) return;
    discard_unfinished();
    _exit(128 + sig);
}

/* What signals do from here on. No SA_RESTART: they end a read. Those that are ignored stay so (nohup, jobs in the background). */
static void catch_signals(void)
{
    if (FUZZING) return; /* the fuzzer has its own */
    for (size_t i = 0; i < sizeof ENDINGS / sizeof *ENDINGS; i++) {
#ifdef _WIN32
        signal(ENDINGS[i], on_interrupt);
#else
        struct sigaction stop = {.sa_handler = on_interrupt}, old;
        if (!sigaction(ENDINGS[i], NULL, &old) && old.sa_handler != SIG_IGN) sigaction(ENDINGS[i], &stop, NULL);
#endif
    }
#ifndef _WIN32
    struct sigaction bus = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO};
    sigaction(SIGBUS, &bus, NULL);
    signal(SIGXFSZ, SIG_IGN); /* a file beyond a limit is a failed write with a message, like a full disk; ... */
    signal(SIGPIPE, SIG_IGN); /* ... and so is an output that was closed */
#endif
}

/* Files opened later must not become standard input, output or error where these are closed: what is missing shall fail. */
static void fill_standard_files(void)
{
#ifdef _WIN32
    _setmode(0, O_BINARY), _setmode(1, O_BINARY); /* bytes are passed on as they are, ... */
    SetConsoleCP(UTF8_PAGE), SetConsoleOutputCP(UTF8_PAGE); /* ... and a console takes them for UTF-8 */
#else
    for (int fd = 0; fd < 3; fd++) /* each opened the wrong way round */
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", fd ? O_RDONLY : O_WRONLY) < 0) exit(1);
#endif
}

/* What the command line asked for. */
typedef struct {
    const char *model, *mode, *text, *file, *out, *system, *tokenizer, *load, *save, *dump, *cpu, *kv;
    double temperature, top_p, min_p, presence, repetition, yarn; /* NAN: not given */
    int64_t top_k, seed, ctx, threads, draft, thinking; /* -1: not given */
    int64_t n, depth, prompt, batch;              /* 0: not given */
    uint64_t memory;                              /* bytes; 0: not given */
    bool ids, echo, quiet, verbose, help, version;
} Args;

/* How far to draft is measured, not assumed. A draft costs the time to make it and the time by which it makes the forward
 * longer; it is worth the chance that it and all before it are right, times the time a token takes otherwise. */
typedef struct {
    int fixed;                         /* -d N, or -1: judge */
    int steps[MAX_DRAFT + 1];          /* forwards with so many drafts, ... */
    double forward[MAX_DRAFT + 1];     /* ... seconds of one, with drawing its tokens: running mean */
    int guesses;                       /* drafts made, ... */
    double guess;                      /* ... seconds of one */
    int compared[CONFIDENCES];         /* drafts of a probability from i / CONFIDENCES on that could be compared, ... */
    double right[CONFIDENCES];         /* ... and the share of them that was right */
    double tokens, seconds;            /* of a step: running means */
    int all;                           /* steps in all */
    int64_t drafted, accepted;         /* since the last report */
    Shortlist list;                    /* the vocabulary's first tokens, and the text's: they come again */
} Drafter;

/* What has been read, to tell whether anything was read twice. */
typedef struct {
    Tokens past;          /* what was last read at each position */
    int same;             /* the conversation and `past` agree up to here */
    int64_t read, again;  /* tokens read; of prompts among them those that had been read at their place before */
} Ledger;

/* All that a mode works with. */
typedef struct {
    Args args;
    Engine engine;
    Tokenizer *tokenizer; /* NULL until some text has to be read or written */
    Sampler sampler;
    Drafter drafter;
    Ledger ledger;
    size_t snapshot_bytes; /* that a conversation's snapshots may take: beyond, the oldest are dropped */
    double prompt_seconds, answer_seconds;
    int prompt_tokens, answer_tokens;
} Run;

/* -v: the ids that were fed, or loaded, on stderr. */
static void report_ids(const Run *r, const char *verb, const int *ids, int n)
{
    if (!r->args.verbose || !n) return;
    fprintf(stderr, "%s:", verb);
    for (int i = 0; i < n; i++) fprintf(stderr, " %d", ids[i]);
    fputc('\n', stderr);
}

/* How far something has got that takes a while, on a terminal; when it is done, off its line, which others may print on. */
static void show_progress(const Run *r, const char *what, int done, int n, const char *unit)
{
    static bool shown;
    if (r->args.quiet || (done >= n && !shown) || !isatty(2)) return; /* often called with nothing to hide */
    fputs("\r\033[K", stderr);
    shown = done < n;
    if (shown) fprintf(stderr, "%s: %d of %d %s", what, done, n, unit);
}

static void hide_progress(const Run *r) { show_progress(r, "", 0, 0, ""); }

/* How far a prompt has been read, if it is a long one, and --echo has not left the cursor behind it. */
static void show_prompt(const Run *r, int done, int n)
{
    bool echoed = r->args.echo && isatty(1);
    if (n > r->engine.work.batch / 4 && !echoed) show_progress(r, "prompt", done, n, "tokens");
}

/* Count a token that now stands at position pos, and whether the model has read it there before (that an answer made
 * again may begin as the old one did is no reading). */
static void ledger_add(Ledger *l, int pos, int id, bool made)
{
    bool again = pos == l->same && pos < l->past.len && l->past.id[pos] == id;
    if (!again) l->past.len = min_int(l->past.len, pos), tokens_add(&l->past, id);
    l->same = pos + 1;
    l->read++;
    l->again += again && !made;
}

/* Feed tokens to the model in batches. Returns how many it fed: fewer than n at an interrupt, if it may stop then; the
 * state is of no use any more. */
static int feed(Run *r, const int *ids, int n, bool may_stop)
{
    double start = now();
    int done = 0;
    while (done < n) {
        int batch = min_int(n - done, r->engine.work.batch), pos = r->engine.state.tokens.len;
        if (!forward(&r->engine, ids + done, batch, may_stop ? STOPPABLE : KEPT)) break;
        for (int i = 0; i < batch; i++) {
            sampler_saw(&r->sampler, ids[done + i], false);
            if (r->engine.state.mtp) shortlist_add(&r->drafter.list, ids[done + i]);
            ledger_add(&r->ledger, pos + i, ids[done + i], false);
        }
        done += batch;
        show_prompt(r, done, n);
    }
    report_ids(r, "fed", ids, done);
    r->prompt_seconds += now() - start;
    r->prompt_tokens += done;
    return done;
}

/* ---- 16. Chat template ---- */

/* White space as Python's str.strip has it, which is what templates trim with. */
static bool is_white(uint32_t cp)
{
    return (cp >= 9 && cp <= 13) || (cp >= 0x1c && cp <= 0x20) || cp == 0x85 || cp == 0xa0 || cp == 0x1680 || (cp >= 0x2000 && cp <= 0x200a) ||
           cp == 0x2028 || cp == 0x2029 || cp == 0x202f || cp == 0x205f || cp == 0x3000;
}

/* Whether a character is trimmed: `white` space, or newlines. */
static bool is_trimmed(uint32_t cp, bool white, bool newlines) { return (white && is_white(cp)) || (newlines && cp == '\n'); }

/* Content as the template renders it: bits 1, 2 strip white space before and after it, 4 and 8 newlines. */
static void trim(const char **text, size_t *n, int bits)
{
    const uint8_t *s = (const uint8_t *)*text;
    size_t len, last;
    while (*n && is_trimmed(utf8_get(s, *n, &len), bits & 1, bits & 4)) s += len, *n -= len;
    while (*n) {
        for (last = *n - 1; last > 0 && *n - last < 4 && (s[last] & 0xc0) == 0x80;) last--; /* where the last character begins */
        if (!is_trimmed(utf8_get(s + last, *n - last, &len), bits & 2, bits & 8) || len != *n - last) break;
        *n = last;
    }
    *text = (const char *)s;
}

/* Append a piece of the template: its special tokens count. */
static void add_piece(Prompt *p, const Str *piece) { prompt_add(p, piece->data, piece->len, true); }

/* Append one turn: prefix, text as the user gave it (trimmed like the template), suffix. */
static void add_turn(Prompt *p, const Str *prefix, const char *text, size_t n, int bits, const Str *suffix)
{
    trim(&text, &n, bits);
    add_piece(p, prefix);
    prompt_add(p, text, n, false);
    add_piece(p, suffix);
}

/* What the template keeps of an earlier answer: trimmed, without its thinking, and trimmed where that ended. */
static void kept_answer(const ChatPieces *c, const Str *answer, const char **text, size_t *n)
{
    *text = answer->data;
    *n = answer->len;
    trim(text, n, c->assistant_trim);
    const char *start = *text, *end = start + *n;
    for (const char *s = start; c->thinking && (s = memmem(s, (size_t)(end - s), c->think_end.data, c->think_end.len));) {
        s += c->think_end.len;
        *text = s;
        *n = (size_t)(end - s);
    }
    if (*text != start) trim(text, n, c->think_trim);
}

/* ---- 17. Generate: the one loop that makes tokens ---- */

/* Whether a token ends an answer. */
static bool is_stop(const Model *m, int id)
{
    for (int i = 0; i < m->n_stops; i++)
        if (m->stop_ids[i] == id) return true;
    return false;
}

#define DRAFT_MARGIN 1.3 /* by which a draft has to be worth more than it costs: both are estimates */

enum { DRAFT_TRIES = 4, DRAFT_MEMORY = 64, DRAFT_INTERVAL = 64, DRAFT_PRIOR = 4 };

/* The n-th value (from 1) into a mean that remembers about DRAFT_MEMORY of them. */
static void running_mean(double *mean, int n, double value) { *mean += (value - *mean) / max_int(1, min_int(n, DRAFT_MEMORY)); }

/* Seconds by which a draft makes a forward longer: the slope over all numbers of drafts measured. */
static double draft_cost(const Drafter *d)
{
    double more = 0, drafts = 0;
    for (int n = 1; n <= MAX_DRAFT; n++) {
        double weight = min_int(max_int(d->steps[n] - 1, 0), DRAFT_MEMORY);
        more += weight * (d->forward[n] - d->forward[0]);
        drafts += weight * n;
    }
    return drafts > 0 ? fmax(more / drafts, 0.02 * d->forward[0]) : 0; /* at least a little: clocks are not exact */
}

/* Whether to make an n-th draft when all before it are right with a chance of `chain`. */
static bool draft_worth_making(const Drafter *d, int n, double chain)
{
    double right = 0;
    int all = 0;
    if (d->fixed >= 0) return n <= d->fixed;
    if (n > AUTO_DRAFT || d->steps[0] < DRAFT_TRIES) return false;
    if (n == 1 && (d->steps[1] < DRAFT_TRIES || d->all % DRAFT_INTERVAL == 0)) return true; /* now and then, to see */
    for (int i = 0; i < CONFIDENCES; i++) right += d->right[i] * d->compared[i], all += d->compared[i];
    if (all) chain *= right / all;
    return chain * d->seconds > DRAFT_MARGIN * (draft_cost(d) + d->guess) * d->tokens;
}

/* Whether a draft, made, is worth a place in the forward: it and all before it are right with a chance of `chain`. */
static bool draft_worth_trying(const Drafter *d, double chain)
{
    if (d->fixed >= 0 || d->steps[1] < DRAFT_TRIES || d->all % DRAFT_INTERVAL == 0) return true;
    return chain * d->seconds > DRAFT_MARGIN * draft_cost(d) * d->tokens;
}

/* The class of a draft's probability. */
static int confidence(double p) { return p > 0 ? (int)fmin(p * CONFIDENCES, CONFIDENCES - 1) : 0; } /* a damaged model's may be anything */

/* The chance that a draft of this class is right. */
static double chance_right(const Drafter *d, int class)
{
    double prior = (class + 0.5) / CONFIDENCES;
    return (d->right[class] * d->compared[class] + prior * DRAFT_PRIOR) / (d->compared[class] + DRAFT_PRIOR);
}

/* A step of generation: a token, guesses after it, and how many of them have come true. */
typedef struct {
    int id[MAX_TRIAL], n_guesses, right;
    int class[MAX_DRAFT];  /* of the guesses' probability */
    double start, drafted; /* when it began; when its guesses were made */
} Step;

/* Make guesses as long as that pays, at most `most`. */
static void step_draft(Run *r, Step *step, int most)
{
    Drafter *d = &r->drafter;
    double chain = 1, p = 0;
    for (int n = 0; n < most && draft_worth_making(d, n + 1, chain); n++) {
        double start = now();
        int guess = mtp_guess(&r->engine, step->id[n], n, &d->list, &p);
        d->guesses++; /* the first is not counted: it brings the head's weights in */
        running_mean(&d->guess, d->guesses - 1, d->guesses > 2 ? fmin(now() - start, 3 * d->guess) : now() - start);
        step->class[n] = confidence(p);
        chain *= chance_right(d, step->class[n]);
        if (!draft_worth_trying(d, chain)) break;
        step->id[1 + n] = guess;
        step->n_guesses++;
    }
}

/* Feed a token, with guesses after it if that pays, at most `most`; work.logits: a row for each. */
static void step_begin(Run *r, Step *step, int id, int most)
{
    Engine *e = &r->engine;
    int room = e->state.ctx - e->state.tokens.len - 1;
    *step = (Step){.id = {id}, .start = now()};
    if (e->state.mtp) step_draft(r, step, min_int(MAX_DRAFT, min_int(most, room)));
    step->drafted = now();
    forward(e, step->id, 1 + step->n_guesses, step->n_guesses > 0 ? TRIAL : KEPT);
    head_logits(e, 0, 1 + step->n_guesses);
}

/* What a step teaches whose guesses were compared up to the first wrong one. */
static void step_learn(Drafter *d, const Step *step)
{
    double end = now(), seconds = end - step->drafted, *mean = &d->forward[step->n_guesses];
    int n = ++d->steps[step->n_guesses];
    if (n > 2) seconds = fmin(seconds, 3 * *mean); /* the machine had other things to do */
    running_mean(mean, n - 1, seconds);
    d->all++;
    running_mean(&d->tokens, d->all, 1 + step->right);
    running_mean(&d->seconds, d->all, seconds + step->drafted - step->start);
    for (int i = 0; i < step->n_guesses && i <= step->right; i++) {
        int class = step->class[i];
        d->compared[class] = min_int(d->compared[class] + 1, DRAFT_MEMORY);
        running_mean(&d->right[class], d->compared[class], i < step->right);
    }
}

/* Keep what came true. whole: the guesses were compared up to the first wrong one. */
static void step_end(Run *r, Step *step, bool whole)
{
    if (step->start == 0) return; /* there was none */
    if (step->n_guesses) state_keep(&r->engine, 1 + step->n_guesses, 1 + step->right);
    if (whole) step_learn(&r->drafter, step);
    report_ids(r, "fed", step->id, 1 + step->right);
    for (int i = 0; i <= step->right; i++) {
        if (r->engine.state.mtp) shortlist_add(&r->drafter.list, step->id[i]);
        ledger_add(&r->ledger, r->engine.state.tokens.len - 1 - step->right + i, step->id[i], true);
    }
    r->drafter.drafted += step->n_guesses;
    r->drafter.accepted += step->right;
    step->start = 0;
}

enum { ENDED = -1, BROKEN_OFF = -2 };

/* Draw, print and feed tokens until a stop token, `limit` tokens (0: no limit), a full context or an interrupt. The
 * printer keeps the answer's text, without a stop token. Drafting changes nothing but speed: every token is drawn from
 * the logits that it would have been drawn from without, with the same random number, and a guess counts only when it is
 * the token drawn. Returns a token that was printed but not fed any more, ENDED after a stop token, or BROKEN_OFF. */
static int generate(Run *r, int limit, Printer *printer)
{
    Engine *e = &r->engine;
    Step step = {0};
    double start = now();
    const float *logits = last_logits(e);
    int unfed = BROKEN_OFF;
    for (int count = 1; !interrupted; count++) {
        int id = sample(&r->sampler, logits);
        bool stop = is_stop(&e->model, id);
        r->answer_tokens++;
        if (r->args.ids) printf(count > 1 ? " %d" : "%d", id), flush_output();
        else if (!stop || r->args.verbose) print_token(printer, id, !stop);
        if (stop) {
            unfed = ENDED;
            break;
        }
        sampler_saw(&r->sampler, id, true);
        unfed = id;
        if (count == limit || ferror(stdout)) break; /* nobody hears it any more */
        if (step.right < step.n_guesses && id == step.id[1 + step.right]) {
            step.right++;
        } else {
            step_end(r, &step, true);
            if (e->state.tokens.len >= e->state.ctx) {
                if (isatty(1)) fputc('\n', stderr); /* not on the answer's line */
                warn("the context of %d tokens is full (-c sets it)", e->state.ctx);
                break;
            }
            step_begin(r, &step, id, limit ? limit - count - 1 : MAX_DRAFT);
        }
        unfed = BROKEN_OFF;
        logits = e->work.logits + (size_t)step.right * e->work.logits_ld;
    }
    step_end(r, &step, false);
    r->answer_seconds += now() - start;
    return unfed;
}

/* -v: how often experts were in memory, and what was read, since the last report. */
static void report_experts(Run *r)
{
    ExpertCache *c = r->engine.experts;
    if (!c || !c->wanted || !r->args.verbose) return;
    fprintf(stderr, "experts: %lld used, %.1f %% of them found in memory; %.3f GB read from disk\n", (long long)c->wanted,
            experts_found(c), (double)c->bytes_read / 1e9);
    experts_count_anew(c);
}

/* One line of statistics on stderr, then start counting anew. */
static void report_speed(Run *r)
{
    char drafts[96] = "";
    if (r->drafter.drafted)
        snprintf(drafts, sizeof drafts, "; %lld of %lld drafts right", (long long)r->drafter.accepted, (long long)r->drafter.drafted);
    if (!r->args.quiet)
        fprintf(stderr, "[prompt %d tokens, %.1f tokens/s; answer %d tokens, %.1f tokens/s%s; context %d of %d]\n",
                r->prompt_tokens, r->prompt_seconds > 0 ? r->prompt_tokens / r->prompt_seconds : 0, r->answer_tokens,
                r->answer_seconds > 0 ? r->answer_tokens / r->answer_seconds : 0, drafts, r->engine.state.tokens.len,
                r->engine.state.ctx);
    if (r->args.verbose)
        fprintf(stderr, "read: %lld tokens in all, %lld of them again\n", (long long)r->ledger.read, (long long)r->ledger.again);
    report_experts(r);
    r->drafter.drafted = r->drafter.accepted = 0;
    r->prompt_tokens = r->answer_tokens = 0;
    r->prompt_seconds = r->answer_seconds = 0;
}

/* Whether a name is that of the regular file that standard output goes to. */
static bool is_output(const char *name)
{
#ifdef _WIN32
    return (void)name, false;
#else
    struct stat x, y;
    return !stat(name, &x) && !fstat(1, &y) && S_ISREG(x.st_mode) && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
#endif
}

/* The file being read that writing `out` would destroy, or NULL. */
static const char *input_file(const Run *r, const char *out)
{
    const char *inputs[] = {r->args.model, r->args.file, r->tokenizer ? r->tokenizer->file.path : NULL};
    struct stat info;
    if (stat(out, &info) || !S_ISREG(info.st_mode)) return NULL;
    for (size_t i = 0; i < sizeof inputs / sizeof *inputs; i++)
        if (inputs[i] && same_file(out, inputs[i])) return inputs[i];
    return NULL;
}

/* Find and open the tokenizer: -z, else tokenizer.bin beside the model, the program, or in the working directory. */
static Tokenizer *need_tokenizer(Run *r)
{
    if (r->tokenizer) return r->tokenizer;
    char program[PATH_MAX], places[2][PATH_MAX + 16];
    const char *path = r->args.tokenizer;
    if (!path) {
        program_path(program);
        const char *beside[] = {r->args.model, program};
        for (int i = 0; i < 2; i++) snprintf(places[i], sizeof places[i], "%.*stokenizer.bin", (int)(file_name(beside[i]) - beside[i]), beside[i]);
        path = !access(places[0], F_OK) ? places[0] : !access(places[1], F_OK) ? places[1] : "tokenizer.bin";
        if (access(path, F_OK)) die("tokenizer.bin: not beside the model, the program or in the working directory (-z names it)");
        path = strcpy(grow(NULL, strlen(path) + 1, 1), path);
    }
    r->tokenizer = open_tokenizer(path);
    const Model *m = &r->engine.model;
    if (m->file.data && r->tokenizer->n_tokens > m->config.vocab_size)
        die("%s: n_tokens: the model's vocabulary wants at most %d, found %d", path, m->config.vocab_size, r->tokenizer->n_tokens);
    if (m->tokenizer_hash && !same_hash(m->tokenizer_hash, r->tokenizer->hash))
        die("%s: hash: the model was exported with tokenizer %016llx, found %016llx", path,
            (unsigned long long)m->tokenizer_hash, (unsigned long long)r->tokenizer->hash);
    return r->tokenizer;
}

/* Decimal ids from text; refuses anything else. */
static int parse_ids(const Run *r, const char *what, const Str *text, Tokens *out)
{
    int vocab = r->engine.model.config.vocab_size;
    for (const char *s = text->data; *s;) {
        char *end;
        while (isspace((unsigned char)*s)) s++;
        if (!*s) break;
        errno = 0;
        long id = strtol(s, &end, 10);
        if (end == s || errno || id < 0 || id >= vocab || (*end && !isspace((unsigned char)*end)))
            die("%s: wanted token ids from 0 to %d, found \"%.20s\"", what, vocab - 1, s);
        tokens_add(out, (int)id);
        s = end;
    }
    if (strlen(text->data) != text->len) die("%s: wanted token ids, found a zero byte", what);
    return out->len;
}

/* The bytes of an input: a text as given, or what a file holds; - as either, and neither, is standard input. */
static Str input_text(const char *text, const char *file)
{
    Str s = {0};
    if (!file && (!text || !strcmp(text, "-"))) file = "-";
    sig_atomic_t was = watching;
    watching = false; /* a signal ends the program here and now: nothing is there to save, and reading may take for ever */
    if (interrupted) exit(signal_status()); /* it came before */
    if (file && !read_file(file, &s)) exit(1);
    watching = was;
    if (!file) str_add(&s, text, strlen(text));
    return s;
}

/* The prompt's bytes from -i, -f or standard input. */
static Str prompt_text(const Run *r) { return input_text(r->args.text, r->args.file); }

/* Append an input's tokens: ids as given, or text, encoded with special tokens recognised; spans: as encode. There must be some,
 * and all tokens must fit into `room`. */
static void input_tokens(Run *r, const char *what, const Str *text, int room, Tokens *out, Tokens *spans)
{
    int before = out->len;
    if (r->args.ids) {
        parse_ids(r, what, text, out);
    } else {
        Prompt p = {0};
        if (text_too_long(need_tokenizer(r), text->len, room))
            die("%s: %zu bytes do not fit into the context of %d tokens (-c sets it)", what, text->len, room);
        prompt_add(&p, text->data, text->len, true);
        encode(r->tokenizer, &p, out, spans);
        free_prompt(&p);
    }
    if (out->len == before) die("%s: wanted at least one token, found none", what);
    if (out->len > room) die("%s: %d tokens do not fit into the context of %d (-c sets it)", what, out->len, room);
}

/* The prompt's tokens. */
static Tokens prompt_tokens(Run *r, int room)
{
    Tokens out = {0};
    Str text = prompt_text(r);
    input_tokens(r, "prompt", &text, room, &out, NULL);
    free(text.data);
    return out;
}

/* ---- 17a. Conversations: turns, and the states between them ----
 * A recurrent state cannot be cut back, so it is remembered where somebody may want to go back to: before each message
 * and before each answer. Going there and on from there costs nothing but what is new. */

/* What the tokens fed so far end with. */
typedef enum {
    EMPTY,                 /* nothing is there */
    PLAIN,                 /* text without a template */
    ASKED,                 /* the beginning of a message, up to the user's words */
    OPEN,                  /* an answer as it was made */
    CUT_BACK,              /* what stands before the last answer, whose text is still to be fed as the template keeps it */
    CLOSED,                /* what the template puts behind an answer */
    N_PLACES
} Place;

typedef struct {
    Str user, answer;      /* as typed; as made, without a stop token */
    Place before;          /* where `start` is */
    Snapshot start;        /* before the user's words */
    Snapshot cue;          /* before the generation prompt: only where the template may change an answer later */
    Snapshot begin;        /* before the answer's first token; n_tokens -1: what stood there was replaced */
} Turn;

enum { SNAPSHOTS_PER_TURN = 3, MAX_TURNS = 1 << 20 };

typedef struct {
    Run *run;
    Str system;            /* data NULL: none given */
    Place place;
    Turn *turns;
    int n_turns;
    Snapshot here;         /* scratch: where a turn began that may fail */
    int answer_from;       /* the current answer's tokens begin here */
    int unfed;             /* a token that belongs to the text, but has not been fed; or -1 */
    bool unfinished;       /* the last answer did not end by itself */
} Conversation;

static Snapshot *turn_snapshot(Turn *t, int i) { return i == 0 ? &t->start : i == 1 ? &t->cue : &t->begin; }

/* Forget the last turn. */
static void pop_turn(Conversation *c)
{
    Turn *t = &c->turns[--c->n_turns];
    for (int i = 0; i < SNAPSHOTS_PER_TURN; i++) snapshot_drop(turn_snapshot(t, i));
    free(t->user.data), free(t->answer.data);
}

/* A new last turn, nothing in it but the user's words. */
static Turn *push_turn(Conversation *c, const Str *user)
{
    if (c->n_turns == MAX_TURNS) die("a conversation has at most %d turns", MAX_TURNS);
    c->turns = grow(c->turns, (size_t)c->n_turns + 1, sizeof *c->turns);
    Turn *t = &c->turns[c->n_turns++];
    *t = (Turn){.before = c->place};
    str_add(&t->user, user->data, user->len);
    str_add(&t->answer, "", 0);
    return t;
}

/* Take a snapshot. When all together are beyond what they may take, the oldest are dropped: the newest turn keeps its own. */
static void remember(Conversation *c, Snapshot *snap)
{
    size_t each = c->run->engine.state.recurrent_len * sizeof(float), room = c->run->snapshot_bytes / each;
    snapshot_take(snap, &c->run->engine);
    for (int t = c->n_turns - 1; t >= 0; t--)
        for (int i = SNAPSHOTS_PER_TURN - 1; i >= 0; i--) {
            Snapshot *old = turn_snapshot(&c->turns[t], i);
            if (!old->recurrent) continue;
            if (room > 0) room--;
            else if (t < c->n_turns - 1) free(old->recurrent), old->recurrent = NULL;
        }
}

/* The state has gone back: tell all who keep count. What was left over of an answer is gone. */
static void went_back(Conversation *c)
{
    Run *r = c->run;
    const Tokens *t = &r->engine.state.tokens;
    if (r->args.verbose) fprintf(stderr, "rewind: %d\n", t->len);
    r->ledger.same = min_int(r->ledger.same, t->len);
    sampler_recount(&r->sampler, t->id, t->len, t->len);
    c->answer_from = min_int(c->answer_from, t->len);
    c->unfed = -1;
    c->unfinished = false;
}

/* Back to the first n tokens of the text: from the last snapshot at or before them, reading what lies between again. */
static void go_back(Conversation *c, int n)
{
    Engine *e = &c->run->engine;
    const Snapshot *from = NULL;
    Tokens between = {0};
    for (int i = 0; i < SNAPSHOTS_PER_TURN * c->n_turns; i++) {
        const Snapshot *s = turn_snapshot(&c->turns[i / SNAPSHOTS_PER_TURN], i % SNAPSHOTS_PER_TURN);
        if (s->recurrent && s->n_tokens <= n && (!from || s->n_tokens > from->n_tokens)) from = s;
    }
    for (int i = from ? from->n_tokens : 0; i < n; i++) tokens_add(&between, e->state.tokens.id[i]);
    if (from) snapshot_restore(from, e);
    else state_reset(&e->state);
    went_back(c);
    feed(c->run, between.id, between.len, false);
    free(between.id);
}

/* Forget everything but the system prompt. */
static void conversation_clear(Conversation *c)
{
    while (c->n_turns) pop_turn(c);
    state_reset(&c->run->engine.state);
    c->run->engine.state.mtp = c->run->engine.work.pair.f != NULL; /* a conversation loaded may have been without */
    went_back(c);
    c->place = EMPTY;
}

/* Make the answer's next tokens, print them, and keep its text. fresh: it begins here. Interrupted or at its limit, an
 * answer is unfinished, and can be gone on with. */
static void answer(Conversation *c, Printer *printer, bool fresh)
{
    Run *r = c->run;
    const Tokens *t = &r->engine.state.tokens;
    Turn *turn = &c->turns[c->n_turns - 1];
    if (fresh) {
        c->unfed = -1; /* if there was one, it has been fed with what closed the last answer */
        c->answer_from = t->len;
        str_set(&turn->answer, "", 0);
    }
    if (c->unfed >= 0 && t->len >= r->engine.state.ctx) {
        warn("the context of %d tokens is full (-c sets it)", r->engine.state.ctx);
        return;
    }
    if (c->unfed >= 0) feed(r, &c->unfed, 1, false);
    sampler_recount(&r->sampler, t->id, t->len, c->answer_from);
    str_set(&printer->all, turn->answer.data, turn->answer.len);
    int unfed = generate(r, (int)r->args.n, printer);
    c->unfed = max_int(unfed, -1);
    c->unfinished = unfed != ENDED;
    printer_flush(printer, true);
    flush_output();
    str_set(&turn->answer, printer->all.data, printer->all.len);
    free(printer->held.data), free(printer->all.data);
}

/* ---- 17b. Saved conversations ----
 * A header, then pieces, each padded to 8 bytes: tokens; head by head keys, values, and their scales (q8); recurrent state; system
 * prompt; turns with their snapshots. README describes it. Loading goes through a file twice: once to check everything,
 * then to take it over, so that a bad file changes nothing. */

typedef struct {
    char magic[8];
    uint32_t version, place;
    uint64_t file_size, hash;       /* hash: of everything behind the header, and of the header with a hash of 0 */
    uint64_t model_hash, model_size; /* the checkpoint it belongs to */
    double yarn;
    int32_t n_tokens, kv_type, mtp, answer_from, unfed, unfinished, n_turns, has_system;
    SamplerSettings sampling;
    uint64_t rng, recurrent_len;
    uint8_t reserved[16];
} SavedHeader;
_Static_assert(sizeof(SavedHeader) == 144, "the format has no holes");

/* A saved turn: bytes of its texts; its snapshots' lengths in tokens, and which of them follow. */
typedef struct { uint64_t user, answer; int32_t before, n_tokens[SNAPSHOTS_PER_TURN], present[SNAPSHOTS_PER_TURN], zero; } SavedTurn;

/* What goes through the pieces of a conversation: writes them, hashes them, or takes them from a mapped file. */
typedef struct Stream {
    bool (*piece)(struct Stream *s, void *data, size_t n); /* false: failed, or the file is at its end */
    FILE *file;
    const uint8_t *from;   /* reading: the next piece ... */
    size_t left;           /* ... and the bytes from there on */
    uint64_t hash, size;   /* of what has passed */
} Stream;

/* n bytes into a hash, eight at a time, the last padded with zeros. */
static uint64_t hash_bytes(uint64_t h, const void *data, size_t n)
{
    for (size_t i = 0; i < n; i += 8) {
        uint64_t word = 0;
        memcpy(&word, (const uint8_t *)data + i, min_size(8, n - i));
        h = (h ^ word) * 0x9e3779b97f4a7c15u;
        h ^= h >> 29;
    }
    return h;
}

static bool hash_piece(Stream *s, void *data, size_t n)
{
    s->hash = hash_bytes(s->hash, data, n);
    s->size += round_up(n, 8);
    return true;
}

static bool write_piece(Stream *s, void *data, size_t n)
{
    static const char zeros[8];
    return (!n || fwrite(data, 1, n, s->file) == n) && fwrite(zeros, 1, round_up(n, 8) - n, s->file) == round_up(n, 8) - n;
}

static bool skip_piece(Stream *s, void *data, size_t n)
{
    (void)data;
    if (n > s->left || round_up(n, 8) > s->left) return false;
    s->from += round_up(n, 8);
    s->left -= round_up(n, 8);
    return true;
}

static bool take_piece(Stream *s, void *data, size_t n)
{
    const uint8_t *from = s->from;
    if (!skip_piece(s, data, n)) return false;
    if (n) memcpy(data, from, n);
    return true;
}

/* Everything that the layers remember of n tokens. heads: of all attention layers together; this run may not keep the last
 * of them, the MTP head's. */
static bool stream_state(Stream *s, State *st, const Config *c, size_t heads, int n)
{
    bool (*piece)(Stream *s, void *data, size_t n) = s->piece;
    size_t width = KV_BYTES[st->kv_type], tiles = (size_t)(c->hdp / TILE);
    size_t keys = round_up((size_t)n, TILE) * (size_t)c->head_dim * width;
    for (size_t h = 0; h < heads; h++) {
        if (h >= st->kv_heads) s->piece = skip_piece;
        if (!s->piece(s, st->k + h * st->kv_head_bytes, keys)) return false;
        for (int pos = 0; pos < n; pos += KV_RANGE)
            for (size_t d = 0; d < tiles; d++) {
                uint8_t *values = st->v + h * st->kv_head_bytes + v_offset(c, pos, (int)d) * width;
                if (!s->piece(s, values, (size_t)min_int(KV_RANGE, n - pos) * TILE * width)) return false;
            }
        for (int i = 0; i < 2 && st->kv_type == KV_Q8; i++) {
            float *scale = (i ? st->v_scale : st->k_scale) + h * st->kv_positions;
            if (!s->piece(s, scale, (size_t)n * sizeof *scale)) return false;
        }
    }
    s->piece = piece;
    return s->piece(s, st->recurrent, st->recurrent_len * sizeof *st->recurrent);
}

/* A conversation's pieces on their way out. */
static bool stream_out(Stream *s, Conversation *c, const SavedHeader *h)
{
    State *st = &c->run->engine.state;
    const Config *config = &c->run->engine.model.config;
    size_t heads = (size_t)(config->n_full + h->mtp) * (size_t)config->num_key_value_heads;
    uint64_t system = c->system.len;
    bool ok = s->piece(s, st->tokens.id, (size_t)h->n_tokens * sizeof *st->tokens.id) && stream_state(s, st, config, heads, h->n_tokens) &&
              s->piece(s, &system, sizeof system) && s->piece(s, c->system.data, c->system.len);
    for (int i = 0; ok && i < c->n_turns; i++) {
        Turn *t = &c->turns[i];
        SavedTurn saved = {t->user.len, t->answer.len, t->before, {0}, {0}, 0};
        for (int k = 0; k < SNAPSHOTS_PER_TURN; k++) {
            saved.n_tokens[k] = turn_snapshot(t, k)->n_tokens;
            saved.present[k] = turn_snapshot(t, k)->recurrent != NULL;
        }
        ok = s->piece(s, &saved, sizeof saved) && s->piece(s, t->user.data, t->user.len) && s->piece(s, t->answer.data, t->answer.len);
        for (int k = 0; ok && k < SNAPSHOTS_PER_TURN; k++)
            if (saved.present[k]) ok = s->piece(s, turn_snapshot(t, k)->recurrent, st->recurrent_len * sizeof(float));
    }
    return ok;
}

/* Zeros for keys and values of a head from position `from` on, as far as a file of n positions holds them: nothing of a text
 * that was taken back is to go to strangers. */
static void clear_rest(State *s, const Config *c, size_t head, int from, int n)
{
    size_t width = KV_BYTES[s->kv_type], hd = (size_t)c->head_dim, tiles = (size_t)(c->hdp / TILE);
    for (size_t pos = (size_t)max_int(from, 0); pos < round_up((size_t)n, TILE); pos++) {
        uint8_t *keys = s->k + head * s->kv_head_bytes + (pos / TILE * hd * TILE + pos % TILE) * width;
        for (size_t i = 0; i < hd; i++) memset(keys + i * TILE * width, 0, width);
        for (size_t d = 0; d < tiles; d++) memset(s->v + head * s->kv_head_bytes + v_offset(c, (int)pos, (int)d) * width, 0, TILE * width);
        if (s->kv_type != KV_Q8 || pos >= (size_t)n) continue;
        s->k_scale[head * s->kv_positions + pos] = s->v_scale[head * s->kv_positions + pos] = 0;
    }
}

/* The stretch of positions that this run works with. */
static double yarn_factor(const Run *r) { return isnan(r->args.yarn) ? 1 : r->args.yarn; }

/* Write the conversation: whole, or not at all, and then an older file of this name stays. False after a message. */
static bool conversation_save(Conversation *c, const char *path)
{
    Run *r = c->run;
    Engine *e = &r->engine;
    OutFile out;
    const char *input = input_file(r, path);
    if (input) return warn("%s: that is %s, which is in use", path, input);
    state_settle(e);
    if (e->state.mtp) mtp_fill(e);
    for (size_t i = 0; i < e->state.kv_heads; i++) { /* the MTP head's last position waits for its next token */
        bool mtp = i >= (size_t)e->model.config.n_full * (size_t)e->model.config.num_key_value_heads;
        clear_rest(&e->state, &e->model.config, i, e->state.tokens.len - mtp, e->state.tokens.len);
    }
    SavedHeader h = {.version = 1, .place = c->place, .file_size = sizeof h,
                     .model_hash = e->model.header->hash, .model_size = e->model.file.size,
                     .yarn = yarn_factor(r), .n_tokens = e->state.tokens.len, .kv_type = e->state.kv_type,
                     .mtp = e->state.mtp, .answer_from = c->answer_from, .unfed = c->unfed, .unfinished = c->unfinished,
                     .n_turns = c->n_turns, .has_system = c->system.data != NULL, .sampling = r->sampler.set,
                     .rng = r->sampler.rng, .recurrent_len = e->state.recurrent_len};
    memcpy(h.magic, "QWEN3SES", sizeof h.magic);
    Stream hash = {.piece = hash_piece};
    stream_out(&hash, c, &h);
    h.file_size += hash.size;
    h.hash = hash_bytes(hash.hash, &h, sizeof h);
    if (!out_open(&out, path)) return false;
    Stream writer = {.piece = write_piece, .file = out.file};
    bool written = write_piece(&writer, &h, sizeof h) && stream_out(&writer, c, &h);
    return out_close(&out, written, true);
}

/* Refuse a header whose numbers contradict each other or the model. False after a message. */
static bool check_saved_numbers(const Engine *e, const char *path, const SavedHeader *h)
{
    bool no_answer = h->place == EMPTY || h->place == ASKED || h->place == CLOSED;
    bool fine = h->place < N_PLACES && (h->n_tokens > 0 || h->place == EMPTY) && (h->n_turns > 0 || no_answer);
    fine &= h->answer_from >= 0 && h->answer_from <= h->n_tokens && h->n_turns >= 0 && h->n_turns <= MAX_TURNS;
    fine &= h->unfed >= -1 && h->unfed < e->model.config.vocab_size && h->recurrent_len == e->state.recurrent_len;
    fine &= (!h->unfinished && h->unfed < 0) || (h->n_turns > 0 && !no_answer && h->place != CUT_BACK);
    fine &= h->mtp == 0 || (h->mtp == 1 && e->model.mtp.fc.data);
    fine &= sampling_valid(&h->sampling) && h->rng != 0;
    return fine || warn("%s: a value of the header is out of range", path);
}

/* Refuse a file that is damaged or that this run cannot go on from. False after a message. */
static bool check_saved(const Run *r, const Mapping *file, const SavedHeader *h)
{
    typedef unsigned long long u64;
    const Engine *e = &r->engine;
    const Header *model = e->model.header;
    const char *path = file->path;
    if (file->size < sizeof *h || memcmp(h->magic, "QWEN3SES", 8)) return warn("%s: not a saved conversation", path);
    if (h->version != 1) return warn("%s: version: wanted 1, found %u", path, h->version);
    if (h->file_size != file->size)
        return warn("%s: file_size: wanted %llu bytes, found %zu: cut off?", path, (u64)h->file_size, file->size);
    if (!same_hash(h->model_hash, model->hash) || h->model_size != e->model.file.size)
        return warn("%s: model: this one is %016llx of %zu bytes, found %016llx of %llu", path, (u64)model->hash,
                    e->model.file.size, (u64)h->model_hash, (u64)h->model_size);
    SavedHeader copy = *h;
    copy.hash = 0;
    uint64_t hash = hash_bytes(hash_bytes(0, file->data + sizeof *h, file->size - sizeof *h), &copy, sizeof copy);
    if (!same_hash(h->hash, hash))
        return warn("%s: hash: wanted %016llx, found %016llx: damaged", path, (u64)h->hash, (u64)hash);
    const char *type = h->kv_type >= 0 && h->kv_type < N_KV ? KV_NAMES[h->kv_type] : "an unknown type";
    if (h->kv_type != (int)e->state.kv_type)
        return warn("%s: kv_type: wanted %s (--kv), found %s", path, KV_NAMES[e->state.kv_type], type);
    if (!(h->yarn == yarn_factor(r))) return warn("%s: yarn: wanted %g (--yarn), found %g", path, yarn_factor(r), h->yarn);
    if (h->n_tokens < 0 || h->n_tokens > e->state.ctx)
        return warn("%s: n_tokens: %d do not fit into the context of %d (-c sets it)", path, h->n_tokens, e->state.ctx);
    return check_saved_numbers(e, path, h);
}

/* Whether a turn's snapshots lie one behind the other, and behind *last, which then is the last of them. */
static bool turn_in_order(const SavedTurn *t, int *last, int n_tokens)
{
    for (int k = 0; k < SNAPSHOTS_PER_TURN; k++) {
        bool none = !t->present[k] && (t->n_tokens[k] == 0 || (k == SNAPSHOTS_PER_TURN - 1 && t->n_tokens[k] == -1));
        if (none) continue;
        if (t->n_tokens[k] < *last || t->n_tokens[k] > n_tokens) return false;
        *last = t->n_tokens[k];
    }
    return true;
}

/* The pieces of one turn: checked (t NULL) or taken over. last: where the turn before ends; -1: there is none. */
static bool stream_turn_in(Stream *s, Turn *t, size_t recurrent_len, int n_tokens, int *last)
{
    SavedTurn saved;
    if (!take_piece(s, &saved, sizeof saved) || saved.before < 0 || saved.before >= N_PLACES) return false;
    if (*last < 0 && (saved.before == OPEN || saved.before == CUT_BACK)) return false; /* there is no answer before */
    *last = max_int(*last, 0);
    if (!turn_in_order(&saved, last, n_tokens)) return false;
    if (t) t->before = (Place)saved.before, t->user.len = t->answer.len = 0;
    const uint8_t *user = s->from;
    if (!skip_piece(s, NULL, saved.user)) return false;
    const uint8_t *text = s->from;
    if (!skip_piece(s, NULL, saved.answer)) return false;
    if (t) str_add(&t->user, user, saved.user), str_add(&t->answer, text, saved.answer);
    for (int k = 0; k < SNAPSHOTS_PER_TURN; k++) {
        const uint8_t *recurrent = s->from;
        if (saved.present[k] && !skip_piece(s, NULL, recurrent_len * sizeof(float))) return false;
        if (!t) continue;
        Snapshot *snap = turn_snapshot(t, k);
        snap->n_tokens = saved.n_tokens[k];
        if (!saved.present[k]) continue;
        snap->recurrent = grow(NULL, recurrent_len, sizeof *snap->recurrent);
        memcpy(snap->recurrent, recurrent, recurrent_len * sizeof *snap->recurrent);
    }
    return true;
}

/* All pieces behind the header: looked through, or, with `take`, taken over. False: there is something wrong. */
static bool stream_in(Stream *s, Conversation *c, const SavedHeader *h, bool take)
{
    Engine *e = &c->run->engine;
    const Config *config = &e->model.config;
    size_t heads = (size_t)(config->n_full + h->mtp) * (size_t)config->num_key_value_heads;
    const int32_t *ids = (const int32_t *)(const void *)s->from;
    if (!skip_piece(s, NULL, (size_t)h->n_tokens * sizeof *ids)) return false;
    for (int i = 0; i < h->n_tokens; i++) {
        int id = *(volatile const int32_t *)&ids[i]; /* once: what is checked is what is taken */
        if (id < 0 || id >= config->vocab_size) return false;
        if (take) tokens_add(&e->state.tokens, id);
    }
    s->piece = take ? take_piece : skip_piece;
    if (!stream_state(s, &e->state, config, heads, h->n_tokens)) return false;
    uint64_t system;
    if (!take_piece(s, &system, sizeof system)) return false;
    const uint8_t *text = s->from;
    if (!skip_piece(s, NULL, system)) return false;
    if (take && h->has_system) str_set(&c->system, text, system);
    int last = -1;
    for (int i = 0; i < h->n_turns; i++) {
        Str none = {0};
        Turn *t = take ? push_turn(c, &none) : NULL;
        if (!stream_turn_in(s, t, e->state.recurrent_len, h->n_tokens, &last)) return false;
    }
    return s->left == 0;
}

/* Take over a saved conversation in place of this one, the sampler with it. chat: it must have turns. False after a message:
 * nothing has changed. Who writes to the file meanwhile changes numbers, no more. */
static bool conversation_load(Conversation *c, const char *path, bool chat)
{
    Run *r = c->run;
    State *st = &r->engine.state;
    Mapping file;
    if (!map_file(path, &file)) return false;
    SavedHeader header = {0}, *h = &header;
    memcpy(h, file.data, min_size(sizeof header, file.size));
    bool fine = check_saved(r, &file, h);
    if (fine && chat && h->place == PLAIN) fine = warn("%s: saved by -m generate, not by chat", path);
    Stream look = {.from = file.data + sizeof *h, .left = file.size - sizeof *h};
    if (fine && !(fine = stream_in(&look, c, h, false))) warn("%s: its pieces do not fit its header", path);
    if (fine) {
        Stream taker = {.from = file.data + sizeof *h, .left = file.size - sizeof *h};
        conversation_clear(c);
        free(c->system.data);
        c->system = (Str){0};
        bool mtp = st->mtp && h->mtp;
        if (st->mtp && !mtp) warn("%s: saved without the MTP head's memory: drafting is off", path);
        if (!stream_in(&taker, c, h, true)) die("%s: changed while it was read", path);
        st->mtp = mtp;
        mtp_wait_again(&r->engine);
        report_ids(r, "loaded", st->tokens.id, st->tokens.len);
        r->ledger.past.len = 0;
        for (int i = 0; i < st->tokens.len; i++) {
            tokens_add(&r->ledger.past, st->tokens.id[i]);
            if (st->mtp) shortlist_add(&r->drafter.list, st->tokens.id[i]);
        }
        r->ledger.same = st->tokens.len;
        c->place = (Place)h->place;
        c->answer_from = h->answer_from, c->unfed = h->unfed, c->unfinished = h->unfinished;
        r->sampler.set = h->sampling;
        r->sampler.rng = h->rng;
    }
    unmap_file(&file);
    return fine;
}

/* The checkpoint's sampling settings, overridden by the command line's. */
static SamplerSettings sampling_of(const Args *a, SamplerSettings s)
{
    if (!isnan(a->temperature)) s.temperature = (float)a->temperature;
    if (!isnan(a->top_p)) s.top_p = (float)a->top_p;
    if (!isnan(a->min_p)) s.min_p = (float)a->min_p;
    if (!isnan(a->presence)) s.presence_penalty = (float)a->presence;
    if (!isnan(a->repetition)) s.repetition_penalty = (float)a->repetition;
    if (a->top_k >= 0) s.top_k = (int)a->top_k;
    return s;
}

/* --load: the file's sampling settings, but what the command line says goes before them. False after a message. */
static bool load_first(Conversation *c, bool chat)
{
    Run *r = c->run;
    if (!conversation_load(c, r->args.load, chat)) return false;
    r->sampler.set = sampling_of(&r->args, r->sampler.set);
    if (r->args.seed >= 0) sampler_seed(&r->sampler, (uint64_t)r->args.seed);
    return true;
}

/* --save: find out before the work that nothing can be written there. False after a message. */
static bool can_save(const Conversation *c)
{
    OutFile out;
    struct stat info;
    const char *input = input_file(c->run, c->run->args.save);
    if (input) return warn("--save %s: that is %s, which is in use", c->run->args.save, input);
    if (!stat(c->run->args.save, &info) && !S_ISREG(info.st_mode) && !S_ISDIR(info.st_mode)) return true; /* a device or pipe */
    if (!out_open(&out, c->run->args.save)) return false;
    out_close(&out, false, false);
    return true;
}

/* -m generate: where a loaded text and a new prompt agree, and how much of the prompt is to be fed. */
static int prompt_after_load(Conversation *c, const Tokens *prompt)
{
    Engine *e = &c->run->engine;
    Tokens text = {0};
    for (int i = 0; i < e->state.tokens.len; i++) tokens_add(&text, e->state.tokens.id[i]);
    if (c->unfed >= 0) tokens_add(&text, c->unfed);
    int same = 0, begin = c->n_turns ? c->turns[c->n_turns - 1].begin.n_tokens : 0;
    while (same < text.len && same < prompt->len && text.id[same] == prompt->id[same]) same++;
    if (same < text.len) { /* perhaps the old prompt goes on otherwise */
        if (begin <= 0 || begin > same || begin >= text.len)
            die("%s: its %d tokens are not the beginning of the prompt's %d: only %d agree", c->run->args.load, text.len,
                prompt->len, same);
        go_back(c, begin);
    }
    free(text.id);
    c->unfed = -1;
    return e->state.tokens.len;
}

/* -m generate: print what the model adds to the prompt, or to what was loaded. */
static int mode_generate(Run *r)
{
    Conversation c = {.run = r, .unfed = -1};
    Printer printer = {.show_special = r->args.verbose};
    bool given = r->args.text || r->args.file || !r->args.load;
    Tokens prompt = {0};
    if (r->args.load && !load_first(&c, false)) return 1;
    if (r->args.ids && c.place > PLAIN) die("--ids: %s was saved by chat, which keeps text", r->args.load);
    if (given) prompt = prompt_tokens(r, r->engine.state.ctx);
    if (!r->args.ids) printer.t = need_tokenizer(r);
    if (r->args.save && !can_save(&c)) return 1;
    bool ended = !given && !c.unfinished; /* it had come to its end */
    int done = given && r->args.load ? prompt_after_load(&c, &prompt) : 0;
    const Tokens *text = given ? &prompt : &r->engine.state.tokens;
    for (int i = 0; r->args.echo && i < text->len + (!given && c.unfed >= 0); i++) {
        int id = i < text->len ? text->id[i] : c.unfed;
        if (r->args.ids) printf("%d ", id);
        else print_token(&printer, id, false);
    }
    bool whole = !given || feed(r, prompt.id + done, prompt.len - done, true) == prompt.len - done;
    if (given) {
        while (c.n_turns) pop_turn(&c);
        c.place = EMPTY; /* the turn is the first: what a loaded chat had before it is gone */
        push_turn(&c, &(Str){0});
        c.place = PLAIN;
        c.unfinished = true;
        if (r->args.save) remember(&c, &c.turns->begin);
        c.answer_from = r->engine.state.tokens.len;
    }
    if (ended) warn("%s: the text had come to its end", r->args.load);
    else if (whole) answer(&c, &printer, given);
    if (r->args.ids || isatty(1)) putchar('\n');
    report_speed(r);
    if (r->args.save && !whole) warn("%s: not written: the prompt was not read to its end", r->args.save);
    if (r->args.save && whole && !conversation_save(&c, r->args.save) && !interrupted) return 1;
    return interrupted ? signal_status() : 0;
}

/* ---- 18. Chat ---- */

/* Whether an answer begins in the template's history as it does when it is made. */
static bool begins_alike(const ChatPieces *t)
{
    return t->generation_prompt.len == t->assistant_prefix.len &&
           !memcmp(t->generation_prompt.data, t->assistant_prefix.data, t->assistant_prefix.len);
}

/* Whether the template may later render an answer otherwise than it was made: thinking dropped, text trimmed. */
static bool answers_change(const ChatPieces *t) { return t->thinking || t->assistant_trim || !begins_alike(t); }

/* What stands before a user's message: the system prompt, or what closes the last answer. Usually an answer's tokens simply
 * stay; where the template renders it otherwise, the state goes back to before it and the kept text is fed instead. */
static void add_opening(Conversation *c, Prompt *p)
{
    const ChatPieces *t = &c->run->engine.model.chat;
    if (c->place == EMPTY) {
        add_piece(p, &t->prefix);
        if (c->system.data) add_turn(p, &t->system_prefix, c->system.data, c->system.len, t->system_trim, &t->system_suffix);
        else add_piece(p, &t->default_system);
    }
    if (c->place != OPEN && c->place != CUT_BACK) return;
    Turn *last = &c->turns[c->n_turns - 1];
    const char *text;
    size_t n;
    kept_answer(t, &last->answer, &text, &n);
    if (c->place == OPEN && n == last->answer.len && begins_alike(t)) {
        add_piece(p, &t->assistant_suffix);
        return;
    }
    if (c->place == OPEN) {
        go_back(c, last->cue.n_tokens);
        c->place = CUT_BACK;
    }
    add_turn(p, &t->assistant_prefix, text, n, 0, &t->assistant_suffix);
}

/* A message's tokens: what opens it, the user's text, and the cue for the answer. */
typedef struct {
    Tokens turn, cue;
    int words;             /* of turn: from here on it depends on what the user wrote */
    Place place;           /* what the tokens up to there end with */
} Message;

/* How many tokens p alone gives, if those of the whole begin with them, else 0. */
static int tokens_before(const Tokenizer *t, const Prompt *p, const Tokens *whole)
{
    Tokens part = {0};
    encode(t, p, &part, NULL);
    bool same = part.len <= whole->len;
    for (int i = 0; same && i < part.len; i++) same = part.id[i] == whole->id[i];
    free(part.id);
    return same ? part.len : 0;
}

/* The tokens of the next message, as far as they have not been fed. */
static void chat_encode(Conversation *c, const Str *text, Message *m)
{
    const ChatPieces *t = &c->run->engine.model.chat;
    const Tokenizer *tokenizer = c->run->tokenizer;
    Prompt opening = {0}, asked = {0}, whole = {0}, cue = {0};
    Tokens rest = {0}, header = {0}; /* all of the message; what precedes the user's words */
    int fed = 0;                     /* of the message */
    add_opening(c, &opening);
    prompt_join(&asked, &opening);
    add_piece(&asked, &t->user_prefix);
    prompt_join(&whole, &asked);
    add_turn(&whole, &(Str){0}, text->data, text->len, t->user_trim, &t->user_suffix);
    add_piece(&cue, &t->generation_prompt);
    *m = (Message){.place = c->place};
    if (c->place == OPEN && c->unfed >= 0) tokens_add(&m->turn, c->unfed);
    m->words = m->turn.len;
    encode(tokenizer, &whole, &rest, NULL);
    encode(tokenizer, &cue, &m->cue, NULL);
    int closed = tokens_before(tokenizer, &opening, &rest), ready = tokens_before(tokenizer, &asked, &rest);
    if (c->place == ASKED && ready) {
        fed = ready;
    } else if (c->place == ASKED) { /* the user's first characters make another token of the last ones before them */
        encode(tokenizer, &asked, &header, NULL);
        go_back(c, max_int(0, c->run->engine.state.tokens.len - header.len));
        m->place = c->place = CLOSED;
    } else if (ready || closed) {
        m->words += ready ? ready : closed;
        m->place = ready ? ASKED : CLOSED;
    }
    for (int i = fed; i < rest.len; i++) tokens_add(&m->turn, rest.id[i]);
    free(header.id), free(rest.id);
    free_prompt(&opening), free_prompt(&asked), free_prompt(&whole), free_prompt(&cue);
}

/* A printer for an answer: hides its thinking if asked to, unless the answer so far has come to its end. */
static Printer chat_printer(const Conversation *c, const Str *so_far)
{
    const Run *r = c->run;
    const ChatPieces *t = &r->engine.model.chat;
    Printer p = {.t = r->tokenizer, .show_special = r->args.verbose, .chat = t};
    if (r->args.thinking != 0 || !t->thinking) return p;
    const char *end = memmem(so_far->data, so_far->len, t->think_end.data, t->think_end.len);
    p.thinking = !end;
    p.trim = end != NULL;
    for (end = end ? end + t->think_end.len : NULL; p.trim && *end; end++) p.trim = isspace((unsigned char)*end);
    return p;
}

/* The last turn's answer, from its beginning or from where it stopped. */
static void chat_answer(Conversation *c, bool fresh)
{
    Turn *turn = &c->turns[c->n_turns - 1];
    Str none = {0};
    str_add(&none, "", 0);
    Printer printer = chat_printer(c, fresh ? &none : &turn->answer);
    c->place = OPEN;
    answer(c, &printer, fresh);
    free(none.data);
    putchar('\n');
    flush_output();
    report_speed(c->run);
}

/* Feed a message and the cue for its answer, with snapshots on the way. False when interrupted. */
static bool chat_ask(Conversation *c, const Str *text, const Message *m)
{
    Run *r = c->run;
    if (feed(r, m->turn.id, m->words, true) < m->words) return false;
    c->place = m->place;
    Turn *turn = push_turn(c, text);
    remember(c, &turn->start);
    if (feed(r, m->turn.id + m->words, m->turn.len - m->words, true) < m->turn.len - m->words) return false;
    if (answers_change(&r->engine.model.chat)) remember(c, &turn->cue);
    if (feed(r, m->cue.id, m->cue.len, true) < m->cue.len) return false;
    remember(c, &turn->begin);
    return true;
}

/* The conversation is again as it was when c->here was taken. */
static void restore_here(Conversation *c, const Conversation *before)
{
    const Tokens *t = &c->run->engine.state.tokens;
    int length = t->len;
    if (c->n_turns > before->n_turns) pop_turn(c);
    snapshot_restore(&c->here, &c->run->engine);
    if (t->len > length) report_ids(c->run, "loaded", t->id + length, t->len - length); /* it had been cut back */
    went_back(c);
    c->place = before->place, c->answer_from = before->answer_from;
    c->unfed = before->unfed, c->unfinished = before->unfinished;
}

/* One turn: feed the user's text in the template, then answer. A turn that does not fit, or whose reading is
 * interrupted, leaves the conversation as it was (of an answer that the template changes, what it keeps). False: the turn
 * did not fit. */
static bool chat_turn(Conversation *c, const Str *text)
{
    Run *r = c->run;
    const State *s = &r->engine.state;
    Conversation before = *c;
    int length = s->tokens.len;
    Message m;
    if (text_too_long(r->tokenizer, text->len + (c->place == EMPTY ? c->system.len : 0), s->ctx))
        return warn("context full: a message of %zu bytes does not fit into %d tokens", text->len, s->ctx);
    snapshot_take(&c->here, &r->engine);
    chat_encode(c, text, &m);
    int take = m.turn.len + m.cue.len, left = s->ctx - s->tokens.len;
    if (take >= left) {
        warn("context full: this turn takes %d tokens and an answer one more, %d of %d are free (/clear starts anew)", take, left, s->ctx);
        if (s->tokens.len != length) restore_here(c, &before);
    } else {
        if (s->tokens.len != length) { /* what lay behind is about to be replaced: there is no way back to it */
            before = *c;
            snapshot_take(&c->here, &r->engine);
        }
        if (c->place == CUT_BACK) {
            Snapshot *begin = &c->turns[c->n_turns - 1].begin;
            snapshot_drop(begin);
            begin->n_tokens = -1;
        }
        if (chat_ask(c, text, &m)) {
            chat_answer(c, true);
        } else {
            restore_here(c, &before);
            warn("stopped before the answer; the message is forgotten");
            report_speed(r);
        }
    }
    free(m.turn.id), free(m.cue.id);
    return take < left;
}

/* /undo: the conversation as it was before the last message. */
static void chat_undo(Conversation *c)
{
    if (!c->n_turns) {
        fputs("there is nothing to undo\n", stderr);
        return;
    }
    Turn *turn = &c->turns[c->n_turns - 1];
    go_back(c, turn->start.n_tokens);
    forget_interrupts();
    c->place = turn->before;
    fputs("forgotten: ", stderr);
    size_t n = min_size(turn->user.len, 60);
    while (n > 0 && n < turn->user.len && (turn->user.data[n] & 0xc0) == 0x80) n--; /* a character is shown whole or not at all */
    put_text(stderr, turn->user.data, n);
    fputs(turn->user.len > 60 ? " ...\n" : "\n", stderr);
    pop_turn(c);
}

/* /regen: another answer to the last message. */
static void chat_regen(Conversation *c)
{
    if (!c->n_turns) {
        fputs("there is no answer yet\n", stderr);
        return;
    }
    Turn *turn = &c->turns[c->n_turns - 1];
    if (turn->begin.n_tokens >= 0) {
        go_back(c, turn->begin.n_tokens);
    } else { /* the answer was fed anew as the template keeps it: only what stands before its cue is still there */
        Prompt p = {0};
        Tokens cue = {0};
        go_back(c, turn->cue.n_tokens);
        add_piece(&p, &c->run->engine.model.chat.generation_prompt);
        encode(c->run->tokenizer, &p, &cue, NULL);
        bool fits = cue.len < c->run->engine.state.ctx - c->run->engine.state.tokens.len;
        c->place = CUT_BACK;
        if (fits) feed(c->run, cue.id, cue.len, false), remember(c, &turn->begin);
        else warn("the context of %d tokens is full (-c sets it)", c->run->engine.state.ctx);
        free_prompt(&p), free(cue.id);
        if (!fits) return;
    }
    forget_interrupts();
    chat_answer(c, true);
}

/* What came of reading standard input: a line, or a message of several; no more is there; Ctrl-C; it cannot be read. */
typedef enum { GOT, FENCED, END, BREAK, FAILED } Input;

/* What has been read of standard input. */
typedef struct { char data[4096]; size_t at, len; } InputBuffer;

/* Wait for standard input, or a signal. Those are let in only while it waits, so that none comes between a look at
 * `interrupted` and falling asleep. */
static void wait_for_input(void)
{
#ifndef _WIN32 /* where reading itself is what a signal ends */
    sigset_t before;
    fd_set ready;
    FD_ZERO(&ready);
    FD_SET(0, &ready);
    hold_signals(&before);
    if (!interrupted) pselect(1, &ready, NULL, NULL, NULL, &before);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
#endif
}

/* The next byte of standard input. */
static Input read_byte(InputBuffer *in, char *byte)
{
    while (in->at == in->len) {
        wait_for_input();
        if (interrupted) return BREAK;
        ssize_t n = read(0, in->data, sizeof in->data);
#ifdef _WIN32
        if (n <= 0) nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL); /* the signal that ended it is on its way */
        if (n <= 0 && interrupted) return BREAK;
#endif
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return warn("standard input: %s", strerror(errno)), FAILED;
        if (n == 0) return END;
        in->at = 0, in->len = (size_t)n;
    }
    *byte = in->data[in->at++];
    return GOT;
}

/* Take CR off the end of a line. */
static void drop_return(Str *line)
{
    if (line->len && line->data[line->len - 1] == '\r') line->data[--line->len] = 0;
}

/* One line from standard input, without its newline: on Windows that is CR LF, elsewhere CR is a character like others. */
static Input read_line(InputBuffer *in, Str *line)
{
    str_set(line, "", 0);
    for (char byte;;) {
        Input got = read_byte(in, &byte);
        if (got == END && line->len) return GOT;
#ifdef _WIN32
        if (got == GOT && byte == '\n') drop_return(line);
#endif
        if (got != GOT || byte == '\n') return got;
        if (line->len == MAX_TEXT) return warn("standard input: wanted lines of at most %zu bytes, found a longer one", MAX_TEXT), FAILED;
        str_add(line, &byte, 1);
    }
}

/* A user's message: a line, or what stands between two """, over as many lines as it takes. */
static Input read_message(InputBuffer *in, bool prompt, Str *message)
{
    static const char fence[] = "\"\"\"";
    Str line = {0};
    forget_interrupts();
    if (prompt) fputs("> ", stderr);
    Input got = read_line(in, message);
    if (got != GOT || message->len < 3 || memcmp(message->data, fence, 3)) return got;
    str_set(message, message->data + 3, message->len - 3);
    bool first = !message->len; /* nothing behind the fence: the message begins with the next line */
    while (got == GOT && (message->len < 3 || memcmp(message->data + message->len - 3, fence, 3))) {
        if (prompt) fputs(". ", stderr);
        got = read_line(in, &line);
        if (got == GOT && !first) str_add(message, "\n", 1);
        if (got == GOT) str_add(message, line.data, line.len);
        first = false;
    }
    if (got == GOT) message->len -= 3; /* the closing fence, and the newline before it */
    if (got == GOT && message->len && message->data[message->len - 1] == '\n') message->len--;
    message->data[message->len] = 0;
    free(line.data);
    return got == BREAK || got == FAILED ? got : FENCED;
}

/* Set one sampling value by name; false when name or value are not valid. */
static bool set_sampling(SamplerSettings *s, const char *name, const char *value)
{
    char *end;
    double x = strtod(value, &end);
    SamplerSettings set = *s;
    if (end == value || *end || !(x == x)) return false;
    if (!strcmp(name, "temp")) set.temperature = (float)x;
    else if (!strcmp(name, "top_p")) set.top_p = (float)x;
    else if (!strcmp(name, "top_k") && x >= 0 && x <= 1e9) set.top_k = (int)x;
    else if (!strcmp(name, "min_p")) set.min_p = (float)x;
    else if (!strcmp(name, "repetition_penalty")) set.repetition_penalty = (float)x;
    else if (!strcmp(name, "presence_penalty")) set.presence_penalty = (float)x;
    else return false;
    if (!sampling_valid(&set)) return false;
    *s = set;
    return true;
}

/* Peak resident memory of this process, mapped pages included. */
static long peak_memory_mb(void)
{
#ifdef _WIN32
    return peak_memory_kb() / 1024;
#else
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
#ifdef __APPLE__
    return usage.ru_maxrss >> 20; /* bytes */
#else
    return usage.ru_maxrss / 1024;
#endif
#endif
}

/* /show */
static void chat_show(const Conversation *c)
{
    const Run *r = c->run;
    const SamplerSettings *s = &r->sampler.set;
    fprintf(stderr, "model %s, %d layers, %d threads, kernels %s\ncontext %d of %d tokens, peak memory %ld MB\n", r->args.model,
            r->engine.model.config.num_hidden_layers, pool_threads(r->engine.pool), r->engine.kernels->name,
            r->engine.state.tokens.len, r->engine.state.ctx, peak_memory_mb());
    fprintf(stderr, "temp %g top_p %g top_k %d min_p %g repetition_penalty %g presence_penalty %g n %lld\nsystem: ",
            (double)s->temperature, (double)s->top_p, s->top_k, (double)s->min_p, (double)s->repetition_penalty,
            (double)s->presence_penalty, (long long)r->args.n);
    if (c->system.data) put_text(stderr, c->system.data, c->system.len);
    fputs(c->system.data ? "\n" : "(none)\n", stderr);
}

/* /set NAME VALUE */
static void chat_set(Conversation *c, char *rest)
{
    char *name = strtok(rest, " "), *value = strtok(NULL, " ");
    char *end = value;
    long long number = value ? strtoll(value, &end, 10) : 0;
    bool whole = value && end != value && !*end && number >= 0;
    if (name && whole && !strcmp(name, "seed")) sampler_seed(&c->run->sampler, (uint64_t)number);
    else if (name && whole && number < INT_MAX && !strcmp(name, "n")) c->run->args.n = number;
    else if (!name || !value || !set_sampling(&c->run->sampler.set, name, value))
        fputs("/set temp|top_p|top_k|min_p|repetition_penalty|presence_penalty|seed|n NUMBER\n", stderr);
}

/* /think and /nothink */
static void chat_show_thinking(Conversation *c, bool show)
{
    c->run->args.thinking = show;
    if (!c->run->engine.model.chat.thinking) fputs("this model does not think: there is nothing to hide\n", stderr);
}

/* /system TEXT */
static void chat_system(Conversation *c, const char *text)
{
    free(c->system.data);
    c->system = (Str){0};
    if (*text) str_add(&c->system, text, strlen(text));
    conversation_clear(c);
    fputs("a new conversation begins\n", stderr);
}

/* /save, /load and /read, which want the name of a file. */
static void chat_file(Conversation *c, const char *word, const char *name)
{
    Str text = {0};
    if (!*name) {
        fprintf(stderr, "%s FILE\n", word);
    } else if (!strcmp(word, "/save")) {
        if (conversation_save(c, name)) fprintf(stderr, "saved: %d tokens\n", c->run->engine.state.tokens.len);
    } else if (!strcmp(word, "/load")) {
        if (conversation_load(c, name, true))
            fprintf(stderr, "loaded: %d turns, %d tokens\n", c->n_turns, c->run->engine.state.tokens.len);
    } else if (read_file(name, &text)) {
        chat_turn(c, &text);
    }
    free(text.data);
}

static const char CHAT_HELP[] =
    "/clear            forget the conversation\n"
    "/undo             forget the last message and its answer\n"
    "/regen            answer the last message again\n"
    "/read FILE        a message from a file\n"
    "/save FILE        save the conversation\n"
    "/load FILE        go on with a saved one\n"
    "/system TEXT      set the system prompt (none: remove it) and start anew\n"
    "/think, /nothink  show or hide what the model thinks before it answers\n"
    "/set NAME VALUE   temp, top_p, top_k, min_p, repetition_penalty, presence_penalty, seed, n\n"
    "/show             model, context, memory, settings\n"
    "/exit             leave (Ctrl-D too); Ctrl-C stops an answer\n"
    "\"\"\"               begins and ends a message of several lines\n";

/* A line that begins with a slash. Returns false to leave. */
static bool chat_command(Conversation *c, Str *line)
{
    drop_return(line); /* of a file from Windows: no command ends so */
    char *word = line->data, *rest = strchr(word, ' ');
    if (rest) *rest++ = 0;
    else rest = word + strlen(word);
    if (!strcmp(word, "/exit") || !strcmp(word, "/quit") || !strcmp(word, "/bye")) return false;
    if (!strcmp(word, "/help") || !strcmp(word, "/?")) fputs(CHAT_HELP, stderr);
    else if (!strcmp(word, "/clear")) conversation_clear(c);
    else if (!strcmp(word, "/undo")) chat_undo(c);
    else if (!strcmp(word, "/regen")) chat_regen(c);
    else if (!strcmp(word, "/read") || !strcmp(word, "/save") || !strcmp(word, "/load")) chat_file(c, word, rest);
    else if (!strcmp(word, "/system")) chat_system(c, rest);
    else if (!strcmp(word, "/think") || !strcmp(word, "/nothink")) chat_show_thinking(c, !strcmp(word, "/think"));
    else if (!strcmp(word, "/set")) chat_set(c, rest);
    else if (!strcmp(word, "/show")) chat_show(c);
    else put_text(stderr, word, strlen(word)), fputs(": no such command (/help lists them)\n", stderr);
    return true;
}

/* Turns from standard input until it ends. An answer that was loaded unfinished is gone on with, unless a message comes
 * first (from a terminal none can). Returns the program's status: 0, or that of a signal or a second Ctrl-C, or 1 when standard
 * input cannot be read. */
static int chat_loop(Conversation *c)
{
    bool go_on = c->unfinished;
    const Run *r = c->run;
    Str message = {0};
    InputBuffer in = {.len = 0};
    bool prompt = !r->args.quiet && isatty(0);
    if (prompt) fprintf(stderr, "%s, context %d. /help lists commands.\n", r->args.model, r->engine.state.ctx);
    int breaks = 0; /* Ctrl-C in a row */
    while (breaks < 2 && !ferror(stdout)) {
        Input got = go_on && isatty(0) ? END : read_message(&in, prompt, &message);
        if (got == FAILED) return 1;
        if (got == END && go_on) chat_answer(c, false);
        if (got == END && !(go_on && isatty(0))) break;
        go_on = false;
        if (got == END) continue;
        if (got == BREAK) {
            fputs(breaks++ || leaving ? "\n" : "\n(Ctrl-C again, Ctrl-D or /exit leaves)\n", stderr);
            if (leaving) break;
            continue;
        }
        breaks = 0;
        if (message.len && message.data[0] == '/' && got == GOT) {
            if (!chat_command(c, &message)) break;
        } else if (message.len) {
            chat_turn(c, &message);
        }
        if (interrupted > 1 || leaving) break; /* a second Ctrl-C during the answer */
    }
    free(message.data);
    return breaks < 2 && interrupted < 2 && !leaving ? 0 : signal_status();
}

/* -m chat: one turn for a given prompt, else turns from standard input until it ends. */
static int mode_chat(Run *r)
{
    Conversation c = {.run = r, .unfed = -1};
    int status = 0;
    if (!r->engine.model.chat.present) die("%s: holds no chat template (-m generate completes text)", r->args.model);
    need_tokenizer(r);
    if (r->args.thinking >= 0 && !r->engine.model.chat.thinking) warn("-r: this model does not think: there is nothing to hide");
    if (r->args.load && !load_first(&c, true)) return 1;
    if (interrupted) return signal_status();
    if (r->args.system) str_add(&c.system, r->args.system, strlen(r->args.system));
    if (r->args.save && !can_save(&c)) return 1;
    bool given = r->args.text || r->args.file;
    if (given) {
        Str message = prompt_text(r);
        status = !chat_turn(&c, &message);
        if (interrupted) status = signal_status();
    } else {
        status = chat_loop(&c);
    }
    bool nothing = status == 1 && !c.n_turns; /* an older file is worth more */
    if (r->args.save && !nothing && !conversation_save(&c, r->args.save) && !status) status = 1;
    return status;
}

/* ---- 19. Other modes ---- */

/* Print bytes in ASCII: a backslash and the others that are not printable as in C. */
static void print_escaped(const uint8_t *bytes, size_t n)
{
    for (size_t b = 0; b < n; b++)
        if (bytes[b] == '\\') fputs("\\\\", stdout);
        else if (bytes[b] == '\n') fputs("\\n", stdout);
        else if (bytes[b] == '\t') fputs("\\t", stdout);
        else if (bytes[b] == '\r') fputs("\\r", stdout);
        else if (bytes[b] < 0x20 || bytes[b] >= 0x7f) printf("\\x%02x", bytes[b]);
        else putchar(bytes[b]);
}

/* -m tokenize: a token a line. */
static int mode_tokenize(Run *r)
{
    const Tokenizer *t = need_tokenizer(r);
    Str text = prompt_text(r);
    Prompt p = {0};
    Tokens ids = {0};
    prompt_add(&p, text.data, text.len, true);
    encode(t, &p, &ids, NULL);
    for (int i = 0; i < ids.len; i++) {
        printf(r->args.ids ? "%d\n" : "%d\t", ids.id[i]);
        size_t n;
        const uint8_t *bytes = token_bytes(t, ids.id[i], &n);
        if (r->args.ids) continue;
        print_escaped(bytes, n);
        putchar('\n');
    }
    free(text.data), free(ids.id);
    free_prompt(&p);
    return 0;
}

/* Run a prompt batch by batch and hand each position's logits to `take`, in order. */
static void each_logits(Run *r, const Tokens *prompt, void (*take)(void *arg, int pos, const float *logits), void *arg)
{
    Engine *e = &r->engine;
    for (int done = 0; done < prompt->len;) {
        int batch = min_int(prompt->len - done, e->work.batch);
        if (!forward(e, prompt->id + done, batch, STOPPABLE)) return;
        for (int row = 0; row < batch; row += HEAD_ROWS) {
            int n = min_int(HEAD_ROWS, batch - row);
            const float *logits = head_logits(e, row, n);
            hide_progress(r);
            for (int i = 0; i < n; i++) take(arg, done + row + i, logits + (size_t)i * e->work.logits_ld);
        }
        done += batch;
        show_prompt(r, done, prompt->len);
    }
}

/* Where logits go. */
typedef struct { OutFile file; size_t vocab; } LogitsFile;

/* One position's row of logits to the file. */
static void write_logits(void *arg, int pos, const float *logits)
{
    (void)pos;
    LogitsFile *l = arg;
    if (fwrite(logits, sizeof *logits, l->vocab, l->file.file) != l->vocab) exit(out_close(&l->file, true, false) ? 0 : 1);
}

/* --dump with -d N: the logits of N drafts after the prompt and its likeliest next token, as mtp.logits.npy [N][vocab]. */
static void dump_drafts(Run *r, int n)
{
    Engine *e = &r->engine;
    int vocab = e->model.config.vocab_size;
    if (n <= 0) return;
    float *logits = grow(NULL, mul((size_t)n, (size_t)vocab), sizeof *logits);
    int token = likeliest(last_logits(e), e->model.config.tokenizer_size);
    for (int i = 0; i < n; i++) {
        mtp_step(e, token, i);
        float *row = logits + (size_t)i * (size_t)vocab;
        memcpy(row, head_logits(e, 0, 1), (size_t)vocab * sizeof *row);
        token = likeliest(row, e->model.config.tokenizer_size);
    }
    dump(&(Pass){.e = e}, "mtp.logits", logits, n, vocab, (size_t)vocab);
    free(logits);
}

/* Begin to write to -o, if it is given, and look whether --dump, if it is given, is a folder. False after a message. */
static bool open_results(const Run *r, OutFile *out)
{
    const Args *a = &r->args;
    struct stat info;
    if (a->dump && (stat(a->dump, &info) || !S_ISDIR(info.st_mode) || access(a->dump, W_OK)))
        die("--dump %s: wanted a folder to write to", a->dump);
    const char *input = a->out ? input_file(r, a->out) : NULL;
    if (input) die("-o %s: that is %s, which is being read", a->out, input);
    return !a->out || out_open(out, a->out);
}

/* -m logits: every position's logits to -o FILE. */
static int mode_logits(Run *r)
{
    Tokens prompt = prompt_tokens(r, r->engine.state.ctx);
    if (prompt.len + max_int(0, (int)r->args.draft) > r->engine.state.ctx)
        die("-d %d: no room after a prompt of %d tokens in a context of %d", (int)r->args.draft, prompt.len, r->engine.state.ctx);
    LogitsFile l = {.vocab = (size_t)r->engine.model.config.vocab_size};
    if (!open_results(r, &l.file)) return 1;
    each_logits(r, &prompt, write_logits, &l);
    if (!interrupted && r->args.dump) dump_drafts(r, (int)r->args.draft);
    bool written = out_close(&l.file, !interrupted, false);
    return interrupted ? signal_status() : !written;
}

typedef struct { const int *ids; int n, vocab; double nll; } Score;

/* Add the negative log likelihood of the token after pos. */
static void score_logits(void *arg, int pos, const float *logits)
{
    Score *s = arg;
    double max = (double)largest(logits, s->vocab), sum = 0;
    if (pos + 1 >= s->n) return;
    for (int i = 0; i < s->vocab; i++) sum += exp((double)logits[i] - max);
    s->nll += max + log(sum) - (double)logits[s->ids[pos + 1]];
}

/* Mean negative log likelihood of each token given all before it; the first has none before it. */
static int mode_perplexity(Run *r)
{
    Tokens prompt = prompt_tokens(r, r->engine.state.ctx);
    if (prompt.len < 2) die("prompt: wanted at least two tokens, found %d", prompt.len);
    Score s = {prompt.id, prompt.len, r->engine.model.config.vocab_size, 0};
    each_logits(r, &prompt, score_logits, &s);
    if (interrupted) return signal_status();
    double nll = s.nll / (prompt.len - 1);
    printf("tokens %d\nnll %.9g\nperplexity %.9g\n", prompt.len - 1, nll, exp(nll));
    return 0;
}

/* A token's bytes, escaped, or with --ids its number. */
static void print_piece(const Run *r, int id)
{
    size_t n;
    const uint8_t *bytes = r->args.ids ? NULL : token_bytes(r->tokenizer, id, &n);
    if (bytes) print_escaped(bytes, n);
    else printf("%d", id);
}

/* A label, a space and a score: the head's output for it. */
static void print_label(const Head *h, int i, float score)
{
    put_text(stdout, h->labels[i].data, h->labels[i].len);
    printf(" %.9g\n", (double)score);
}

/* What classifiers look at, position by position. */
typedef struct { const Run *r; const Tokens *prompt; int at; } Classify;

/* The scores of all classes, when this is the position a text's class is read at. */
static void print_classes(void *arg, int pos, const float *scores)
{
    const Classify *c = arg;
    const Head *h = &c->r->engine.model.head;
    for (int i = 0; pos == c->at && i < h->weight.rows; i++) print_label(h, i, scores[i]);
}

/* -m classify: a class a line. A text's class is read at its last token, or the last that is no padding (transformers,
 * GenericForSequenceClassification). */
static int mode_classify(Run *r)
{
    Tokens prompt = prompt_tokens(r, r->engine.state.ctx);
    Classify c = {r, &prompt, prompt.len - 1};
    while (c.at > 0 && prompt.id[c.at] == r->engine.model.head.pad_token_id) c.at--;
    each_logits(r, &prompt, print_classes, &c);
    return interrupted ? signal_status() : 0;
}

/* The likeliest class of one token. */
static void print_tag(void *arg, int pos, const float *scores)
{
    const Classify *c = arg;
    const Head *h = &c->r->engine.model.head;
    int best = likeliest(scores, h->weight.rows);
    print_piece(c->r, c->prompt->id[pos]);
    putchar(' ');
    print_label(h, best, scores[best]);
}

/* -m tag: a token a line, with its likeliest class. */
static int mode_tag(Run *r)
{
    Tokens prompt = prompt_tokens(r, r->engine.state.ctx);
    each_logits(r, &prompt, print_tag, &(Classify){r, &prompt, 0});
    return interrupted ? signal_status() : 0;
}

/* Scores of every position: how well an answer begins there, and how well one ends there. */
typedef struct { float *start, *end; } Ends; /* [n] each */

static void keep_ends(void *arg, int pos, const float *scores)
{
    Ends *e = arg;
    e->start[pos] = scores[0];
    e->end[pos] = scores[1];
}

/* The answer: a span of tokens, first to last, and its score, start + end. */
typedef struct { int first, last; double score; } Answer;

/* The best span of at most `most` tokens (0: any number) within positions [from, to); of equals the first. waiting: the
 * positions that may yet be the best beginning for some end: later ones have lower scores. */
static Answer best_answer(const Ends *e, int from, int to, int most)
{
    Answer best = {from, from, -INFINITY};
    int *waiting = grow(NULL, (size_t)(to - from), sizeof *waiting), first = 0, n = 0;
    for (int last = from; last < to; last++) {
        while (n > first && !(e->start[waiting[n - 1]] >= e->start[last])) n--;
        waiting[n++] = last;
        if (most && waiting[first] <= last - most) first++;
        double score = (double)e->start[waiting[first]] + (double)e->end[last];
        if (score > best.score) best = (Answer){waiting[first], last, score};
    }
    free(waiting);
    return best;
}

/* Print text with its backslashes and control characters escaped: one line, other characters as they are. */
static void print_line(const char *text, size_t n)
{
    for (size_t i = 0, len; i < n; i += len) {
        const uint8_t *s = (const uint8_t *)text + i;
        utf8_get(s, n - i, &len);
        if (s[0] == '\\' || is_control(s, n - i)) print_escaped(s, len);
        else fwrite(s, 1, len, stdout);
    }
}

/* -m answer: the span of the context (-f) that answers the question (-i), its score, and where it begins and ends in the
 * context: bytes, with --ids tokens. The model reads the question, then the context. */
static int mode_answer(Run *r)
{
    Tokens ids = {0}, spans = {0};
    Str question = input_text(r->args.text, NULL), context = input_text(NULL, r->args.file);
    input_tokens(r, "-i, the question", &question, r->engine.state.ctx, &ids, NULL);
    int from = ids.len;
    input_tokens(r, "-f, the text to answer from", &context, r->engine.state.ctx, &ids, &spans);
    Ends ends = {grow(NULL, (size_t)ids.len, sizeof(float)), grow(NULL, (size_t)ids.len, sizeof(float))};
    each_logits(r, &ids, keep_ends, &ends);
    if (interrupted) return signal_status();
    Answer a = best_answer(&ends, from, ids.len, (int)r->args.n);
    int begin = a.first - from, end = a.last + 1 - from;
    if (r->args.ids) {
        for (int i = a.first; i <= a.last; i++) printf(i > a.first ? ",%d" : "%d", ids.id[i]);
    } else {
        begin = spans.id[2 * begin], end = spans.id[2 * end - 1];
        print_line(context.data + begin, (size_t)(end - begin));
    }
    printf(" %.9g %d %d\n", a.score, begin, end);
    return 0;
}

/* What the matrices that one token meets amount to: bytes read, and multiplications (with an addition each). */
typedef struct { double bytes, macs; } Cost;

static void cost_add(Cost *cost, const Matrix *m, double count)
{
    if (!m->data) return;
    cost->bytes += count * (double)m->matrix_bytes;
    cost->macs += count * (double)(m->matrix_bytes / m->tile_bytes) * TILE * m->cols;
}

/* All layers' matrices, of the experts only those chosen. */
static Cost layers_cost(const Model *m)
{
    Cost cost = {0};
    for (const Layer *l = m->layers; l < m->layers + m->config.num_hidden_layers; l++) {
        const Matrix *all[] = {&l->linear.in_proj_qkvz, &l->linear.in_proj_ba, &l->linear.out_proj, &l->attn.qgkv_proj,
                               &l->attn.o_proj, &l->mlp.gate, &l->mlp.shared_gate_up, &l->mlp.shared_down};
        for (size_t k = 0; k < sizeof all / sizeof *all; k++) cost_add(&cost, all[k], 1);
        double experts = l->mlp.gate.data ? m->config.num_experts_per_tok : 1;
        cost_add(&cost, &l->mlp.gate_up_proj, experts);
        cost_add(&cost, &l->mlp.down_proj, experts);
    }
    return cost;
}

/* Bytes of weights one decoded token reads: everything but the embedding and the experts not chosen. */
static double bytes_per_token(const Model *m) { return layers_cost(m).bytes + (double)m->head.weight.matrix_bytes; }

/* A string of the metadata, in quotes. */
static void print_string(const uint8_t *text, size_t n)
{
    fputs(" \"", stdout);
    print_escaped(text, n);
    putchar('"');
}

/* A key and its values. */
static void print_meta(const Model *m, const MetaRecord *meta)
{
    const uint8_t *data = m->file.data + meta->offset, *text;
    uint32_t n;
    fputs(meta->key, stdout);
    for (uint32_t k = 0; k < meta->count && meta->type <= META_FLOAT; k++) {
        int64_t whole;
        double real;
        memcpy(&whole, data + 8 * (size_t)k, 8), memcpy(&real, data + 8 * (size_t)k, 8);
        if (meta->type == META_INT) printf(" %lld", (long long)whole);
        else printf(" %.9g", real);
    }
    if (meta->type == META_STRING) print_string(data, meta->size);
    for (size_t at = 0; meta->type == META_LIST && (text = next_string(data, meta->size, &at, &n));) print_string(text, n);
    putchar('\n');
}

/* -m inspect: metadata, tensors, totals. */
static int mode_inspect(Run *r)
{
    const Model *m = &r->engine.model;
    const TensorRecord *t = m->tensors;
    for (uint32_t i = 0; i < m->header->n_meta; i++) print_meta(m, &m->meta[i]);
    for (uint32_t i = 0; i < m->header->n_tensors; i++) {
        printf("%-48s %-5s [", t[i].name, TYPE_NAMES[t[i].type]);
        for (uint32_t k = 0; k < t[i].rank; k++) printf(k ? ", %llu" : "%llu", (unsigned long long)t[i].shape[k]);
        printf("] offset %llu bytes %llu\n", (unsigned long long)t[i].offset, (unsigned long long)t[i].size);
    }
    printf("total %zu bytes\nread per token %.0f bytes\n", m->file.size, bytes_per_token(m));
    return 0;
}

/* ---- 19a. Trace: what the layers do with a prompt, in numbers ---- */

enum { TOP_TOKENS = 5, TOP_POSITIONS = 3 };

/* One of the largest of many: which, and how much of the whole. */
typedef struct { int index; float weight; } Top;

/* What one layer did to one token. */
typedef struct {
    int layer, pos, id;
    bool full_attention;
    float input_norm, mixer_norm, mlp_norm, output_norm; /* |x| of the residual stream before; |what is added|; |x| after */
    int heads;
    float *a, *b;                 /* [heads] DeltaNet: decay and beta, how much of its memory stayed and how strongly it wrote (gdn_gates);
                                     attention: mean of sigmoid(gate), and entropy of attn_weights, in nats */
    Top *positions;               /* [heads][TOP_POSITIONS] attention: where it looked most; index -1: nowhere else */
    int n_experts;                /* 0: a dense layer */
    Top *experts;                 /* [n_experts] the heaviest first (moe_route_item) */
    float shared_weight;          /* of the shared expert */
    int n_next;                   /* 0: the model has no lm_head */
    Top next[TOP_TOKENS];       /* likeliest next tokens, were this the last layer: softmax(lm_head . norm(x)) */
} LayerView;

typedef struct Trace {
    Run *r;
    const Tokens *prompt;
    OutFile *json;                /* -o: a line for every layer and token; NULL: none, and only the last token is looked at */
    LayerView *view;              /* [batch] of each token of the batch */
    int from;                     /* the first token of the batch that is looked at, ... */
    int row;                      /* ... and the one whose logits are row 0 of work.logits */
    float *weights;               /* [threads][weights_len] attention of one head */
    size_t weights_len;           /* the prompt or head_dim, the larger, rounded up to whole tiles */
} Trace;

/* sqrt(sum x^2) */
static float vector_norm(const Kernels *kn, const float *x, int n) { return sqrtf(kn->dot(x, x, n)); }

/* The k largest of p[0..n), the first of equals first; index -1 beyond the n-th. */
static void find_top(const float *p, int n, int k, Top *top)
{
    for (int i = 0; i < k; i++) top[i] = (Top){-1, -INFINITY};
    for (int i = 0; i < n; i++) {
        if (!(p[i] > top[k - 1].weight)) continue;
        int at = k - 1;
        for (; at > 0 && p[i] > top[at - 1].weight; at--) top[at] = top[at - 1];
        top[at] = (Top){i, p[i]};
    }
}

/* After a mixer, before x takes its output in. */
static void trace_mixer(const Pass *p)
{
    const Work *w = &p->e->work;
    int D = p->e->model.config.hidden_size;
    for (int t = 0; t < p->n; t++) {
        p->e->trace->view[t].input_norm = vector_norm(p->e->kernels, w->x + (size_t)t * w->xn.ld, D);
        p->e->trace->view[t].mixer_norm = vector_norm(p->e->kernels, w->out + (size_t)t * w->xn.ld, D);
    }
}

/* A DeltaNet's part of a view. */
static void view_linear(const Pass *p, int t, LayerView *v)
{
    v->heads = p->e->model.config.linear_num_value_heads;
    for (int h = 0; h < v->heads; h++) gdn_gates(p, h, p->e->state.tape_len + t, 1, &v->a[h], &v->b[h]);
}

/* An attention's part. s: scratch [weights_len] */
static void view_attention(const Pass *p, int t, LayerView *v, float *s)
{
    const Config *c = &p->e->model.config;
    v->heads = c->num_attention_heads;
    for (int h = 0; h < v->heads; h++) {
        v->a[h] = v->b[h] = 0;
        p->e->kernels->sigmoid(s, attn_gate(p, t, h), c->head_dim);
        for (int i = 0; i < c->head_dim; i++) v->a[h] += s[i] / (float)c->head_dim;
        attn_weights(p, t, h, s);
        for (int pos = 0; pos <= v->pos; pos++) v->b[h] -= s[pos] > 0 ? s[pos] * logf(s[pos]) : 0;
        find_top(s, v->pos + 1, TOP_POSITIONS, v->positions + h * TOP_POSITIONS);
    }
}

/* The MLP's part: which experts, the heaviest first. */
static void view_mlp(const Pass *p, int t, LayerView *v)
{
    const Work *w = &p->e->work;
    int k = p->e->model.config.num_experts_per_tok;
    v->n_experts = p->layer->mlp.gate.data ? k : 0;
    if (!v->n_experts) return;
    find_top(w->top_weight + (size_t)t * (size_t)k, k, k, v->experts);
    for (Top *e = v->experts; e < v->experts + k && e->index >= 0; e++) e->index = w->top_expert[t * k + e->index];
    v->shared_weight = w->shared_weight[t];
}

/* All of a token's view but the next tokens; xn becomes what these are told by: norm(x + out), as at the end of forward. */
static void view_item(void *arg, int item, int thread)
{
    const Pass *p = arg;
    Engine *e = p->e;
    Trace *trace = e->trace;
    const Work *w = &e->work;
    int D = e->model.config.hidden_size, t = trace->from + item;
    LayerView *v = &trace->view[t];
    float *out = w->out + (size_t)t * w->xn.ld, *x = w->x + (size_t)t * w->xn.ld, *row = w->xn.f + (size_t)t * w->xn.ld;
    v->layer = (int)(p->layer - e->model.layers);
    v->pos = p->pos + t;
    v->id = p->tokens[t];
    v->full_attention = p->layer->full_attention;
    if (v->full_attention) view_attention(p, t, v, trace->weights + (size_t)thread * trace->weights_len);
    else view_linear(p, t, v);
    view_mlp(p, t, v);
    v->mlp_norm = vector_norm(e->kernels, out, D);
    for (int i = 0; i < D; i++) row[i] = x[i] + out[i];
    v->output_norm = vector_norm(e->kernels, row, D);
    rmsnorm(e->kernels, row, row, e->model.norm, D, e->model.config.rms_norm_eps);
    quantize_row(e, &e->work.xn, (size_t)t);
}

/* The next tokens by a row of logits, which become probabilities. */
static void next_item(void *arg, int item, int thread)
{
    (void)thread;
    const Pass *p = arg;
    const Work *w = &p->e->work;
    int n = p->e->model.config.tokenizer_size;
    float *logits = w->logits + (size_t)item * w->logits_ld;
    softmax(p->e->kernels, logits, n);
    find_top(logits, n, TOP_TOKENS, p->e->trace->view[p->e->trace->row + item].next);
}

/* A string of JSON. Bytes that are no UTF-8 become U+FFFD. */
static void json_string(FILE *f, const uint8_t *s, size_t n)
{
    putc('"', f);
    for (size_t i = 0, len; i < n; i += len) {
        uint32_t cp = utf8_get(s + i, n - i, &len);
        if (cp >= RAW_BYTE) fputs("\\ufffd", f);
        else if (cp == '"' || cp == '\\') fprintf(f, "\\%c", (char)cp);
        else if (is_control(s + i, n - i)) fprintf(f, "\\u%04x", cp);
        else fwrite(s + i, 1, len, f);
    }
    putc('"', f);
}

/* A token's text as JSON has it; with --ids its number. */
static void print_quoted(const Run *r, FILE *f, int id)
{
    size_t n;
    const uint8_t *bytes = r->args.ids ? NULL : token_bytes(r->tokenizer, id, &n);
    if (bytes) json_string(f, bytes, n);
    else fprintf(f, "%d", id);
}

/* A number of JSON, which has no word for those that are none. */
static void json_number(FILE *f, const char *before, float x)
{
    if (fabsf(x) < INFINITY) fprintf(f, "%s%.9g", before, (double)x);
    else fprintf(f, "%snull", before);
}

/* "name": [numbers] */
static void json_numbers(FILE *f, const char *name, const float *x, int n)
{
    fprintf(f, ", \"%s\": [", name);
    for (int i = 0; i < n; i++) json_number(f, i ? ", " : "", x[i]);
    putc(']', f);
}

/* [[index, weight], ...], as many as there are. */
static void json_tops(FILE *f, const Top *tops, int n)
{
    putc('[', f);
    for (int i = 0; i < n && tops[i].index >= 0; i++) {
        fprintf(f, i ? ", [%d" : "[%d", tops[i].index);
        json_number(f, ", ", tops[i].weight);
        putc(']', f);
    }
    putc(']', f);
}

/* "positions" of all heads. */
static void json_positions(FILE *f, const LayerView *v)
{
    fputs(", \"positions\": [", f);
    for (int h = 0; h < v->heads; h++) {
        if (h) fputs(", ", f);
        json_tops(f, v->positions + h * TOP_POSITIONS, TOP_POSITIONS);
    }
    putc(']', f);
}

/* "next", and the texts of these tokens. */
static void json_next(const Run *r, FILE *f, const LayerView *v)
{
    fputs(", \"next\": ", f);
    json_tops(f, v->next, v->n_next);
    if (r->args.ids) return;
    fputs(", \"next_tokens\": [", f);
    for (int i = 0; i < v->n_next && v->next[i].index >= 0; i++) {
        if (i) fputs(", ", f);
        print_quoted(r, f, v->next[i].index);
    }
    putc(']', f);
}

/* A view as a line of JSON. */
static void json_view(const Run *r, FILE *f, const LayerView *v)
{
    fprintf(f, "{\"layer\": %d, \"type\": \"%s\"", v->layer, v->full_attention ? "full_attention" : "linear_attention");
    fprintf(f, ", \"position\": %d, \"id\": %d", v->pos, v->id);
    if (!r->args.ids) fputs(", \"token\": ", f), print_quoted(r, f, v->id);
    json_number(f, ", \"input_norm\": ", v->input_norm);
    json_number(f, ", \"mixer_norm\": ", v->mixer_norm);
    json_number(f, ", \"mlp_norm\": ", v->mlp_norm);
    json_number(f, ", \"output_norm\": ", v->output_norm);
    json_numbers(f, v->full_attention ? "gate" : "decay", v->a, v->heads);
    json_numbers(f, v->full_attention ? "entropy" : "beta", v->b, v->heads);
    if (v->full_attention) json_positions(f, v);
    if (v->n_experts) {
        fputs(", \"experts\": ", f);
        json_tops(f, v->experts, v->n_experts);
        json_number(f, ", \"shared_weight\": ", v->shared_weight);
    }
    if (v->n_next) json_next(r, f, v);
    fputs("}\n", f);
}

/* A row of the table: numbers, 16 a line. */
static void print_numbers(const char *name, const float *x, int n)
{
    printf("  %-10s", name);
    for (int i = 0; i < n; i++) printf(i && i % 16 == 0 ? "\n             %.3f" : " %.3f", (double)x[i]);
    putchar('\n');
}

/* What the heads of an attention layer look at. */
static void print_positions(const Run *r, const Tokens *prompt, const LayerView *v)
{
    for (int h = 0; h < v->heads; h++) {
        printf("  head %-5d", h);
        for (const Top *p = v->positions + h * TOP_POSITIONS; p < v->positions + (h + 1) * TOP_POSITIONS && p->index >= 0; p++) {
            printf(" %.3f at %d ", (double)p->weight, p->index);
            print_quoted(r, stdout, prompt->id[p->index]);
        }
        putchar('\n');
    }
}

/* A view as rows of the table. */
static void print_view(const Run *r, const Tokens *prompt, const LayerView *v)
{
    printf("layer %d, %s: ", v->layer, v->full_attention ? "gated attention" : "Gated DeltaNet");
    printf("|x| %.4g -> %.4g, ", (double)v->input_norm, (double)v->output_norm);
    printf("mixer +%.4g, mlp +%.4g\n", (double)v->mixer_norm, (double)v->mlp_norm);
    print_numbers(v->full_attention ? "gate" : "decay", v->a, v->heads);
    print_numbers(v->full_attention ? "entropy" : "beta", v->b, v->heads);
    if (v->full_attention) print_positions(r, prompt, v);
    if (v->n_experts) {
        printf("  experts   ");
        for (const Top *e = v->experts; e < v->experts + v->n_experts && e->index >= 0; e++) printf(" %d (%.3f)", e->index, (double)e->weight);
        printf(" shared (%.3f)\n", (double)v->shared_weight);
    }
    if (v->n_next) {
        printf("  next      ");
        for (const Top *n = v->next; n < v->next + v->n_next && n->index >= 0; n++) {
            printf(" %.3f ", (double)n->weight);
            print_quoted(r, stdout, n->index);
        }
        putchar('\n');
    }
}

/* At the end of a layer, when x + out is what the next one gets: for each token of the batch a line of JSON, or nothing; for
 * the prompt's last token rows of the table. work.xn and work.logits are free until the next norm. */
static void trace_layer(Pass *p)
{
    Engine *e = p->e;
    Trace *trace = e->trace;
    int last = trace->prompt->len - 1 - p->pos;
    trace->from = trace->json ? 0 : last;
    if (trace->from >= p->n) return;
    parallel_for(e->pool, p->n - trace->from, view_item, p);
    for (trace->row = trace->from; e->model.head.kind == CAUSAL_LM && trace->row < p->n && !interrupted; trace->row += HEAD_ROWS) {
        int n = min_int(HEAD_ROWS, p->n - trace->row);
        head_logits(e, trace->row, n);
        parallel_for(e->pool, n, next_item, p);
    }
    hide_progress(trace->r);
    for (int t = trace->from; t < p->n && !interrupted; t++) {
        if (trace->json) json_view(trace->r, trace->json->file, &trace->view[t]), out_check(trace->json);
        if (t == last) print_view(trace->r, trace->prompt, &trace->view[t]);
    }
    flush_output();
    if (trace->json) show_progress(trace->r, "trace", trace->view[trace->from].layer + 1, e->model.config.num_hidden_layers, "layers");
}

/* Room for the views of a batch. */
static void trace_init(Trace *trace)
{
    const Engine *e = &trace->r->engine;
    const Config *c = &e->model.config;
    size_t heads = (size_t)max_int(c->num_attention_heads, c->linear_num_value_heads), k = (size_t)c->num_experts_per_tok;
    size_t n = (size_t)min_int(e->work.batch, trace->prompt->len);
    trace->weights_len = round_up((size_t)max_int(trace->prompt->len, c->head_dim), TILE);
    trace->weights = grow(NULL, mul((size_t)pool_threads(e->pool), trace->weights_len), sizeof(float));
    trace->view = grow(NULL, n, sizeof *trace->view);
    float *numbers = grow(NULL, mul(n, 2 * heads), sizeof *numbers);
    Top *tops = grow(NULL, mul(n, heads * TOP_POSITIONS + k), sizeof *tops);
    for (size_t t = 0; t < n; t++, numbers += 2 * heads, tops += heads * TOP_POSITIONS + k)
        trace->view[t] = (LayerView){.a = numbers, .b = numbers + heads, .positions = tops, .experts = tops + heads * TOP_POSITIONS,
                                     .n_next = e->model.head.kind == CAUSAL_LM ? TOP_TOKENS : 0};
}

/* -m trace: a table of what each layer did to the prompt's last token; -o FILE: of every token, as JSON lines. */
static int mode_trace(Run *r)
{
    Engine *e = &r->engine;
    OutFile out = {0};
    Tokens prompt = prompt_tokens(r, e->state.ctx);
    if (r->args.out && is_output(r->args.out)) die("-o %s: that is standard output, where the table goes", r->args.out);
    Trace trace = {.r = r, .prompt = &prompt};
    trace_init(&trace);
    if (!open_results(r, &out)) return 1;
    trace.json = r->args.out ? &out : NULL;
    e->trace = &trace;
    printf("position %d, the last: ", prompt.len - 1);
    print_quoted(r, stdout, prompt.id[prompt.len - 1]);
    putchar('\n');
    feed(r, prompt.id, prompt.len, true);
    bool written = !r->args.out || out_close(&out, !interrupted, false);
    return interrupted ? signal_status() : !written;
}

/* ---- 20. Benchmark ---- */

enum {
    READ_PIECE = 1 << 20, /* bytes an item reads */
    READ_PIECES = 512,    /* pieces of one timing */
    READ_WINDOW = 2048,   /* pieces at the file's beginning that are read, in turns */
    DISK_PIECE = 8 << 20, /* bytes read from the disk at a time */
    DISK_PIECES = 32,
    BENCH_SLICE = 8,      /* tokens decoded at a time */
    BENCH_ROUNDS = 5,     /* prompts timed */
    BENCH_SAMPLES = 64,
    PEAK_ITEMS = 256,     /* of one timing of the arithmetic, */
    PEAK_REPEATS = 4      /* each so many calls of its kernel */
};

/* What the machine itself can do: reading weights in memory, reading the disk, and arithmetic without any memory. */
typedef struct {
    Run *r;
    const uint8_t *weights;     /* [total][READ_PIECE] the mapped checkpoint, or the expert cache */
    size_t first, total;        /* pieces: how many have been read so far (modulo total the next), how many there are */
    size_t disk_first;          /* the next piece of the disk */
    bool floats;                /* which arithmetic */
    atomic_ullong sum;          /* keeps the compiler from leaving the work out */
} Machine;

/* Sum one piece, so that every byte is read. */
static void read_piece(void *arg, int item, int thread)
{
    (void)thread;
    Machine *m = arg;
    size_t offset = (m->first + (size_t)item) % m->total * READ_PIECE;
    const uint64_t *p = (const uint64_t *)(m->weights + offset);
    uint64_t sum = 0;
    for (size_t i = 0; i < READ_PIECE / 8; i++) sum += p[i];
    atomic_fetch_add(&m->sum, sum);
}

/* Read the next pieces of the weights in memory with all threads; returns the speed in GB/s, 0 for a file too small. */
static double read_some(Machine *m)
{
    const ExpertCache *c = m->r->engine.experts;
    if (c) m->total = min_size(READ_WINDOW, (size_t)c->n_used * c->slot_bytes / READ_PIECE);
    if (!m->total) return 0;
    int pieces = min_int(READ_PIECES, (int)m->total);
    double start = now();
    parallel_for(m->r->engine.pool, pieces, read_piece, m);
    m->first += (size_t)pieces;
    return (double)pieces * READ_PIECE / (now() - start) / 1e9;
}

/* Read one piece of the disk. */
static void disk_piece(void *arg, int item, int thread)
{
    (void)thread;
    Machine *m = arg;
    ExpertCache *c = m->r->engine.experts;
    size_t pieces = m->r->engine.model.file.size / DISK_PIECE;
    if (!pieces) return;
    uint8_t *to = (uint8_t *)reserve(DISK_PIECE / sizeof(float), "disk's measurement"); /* whole pages, as direct reading wants them */
    read_pages(c, to, (m->disk_first + (size_t)item) % pieces * DISK_PIECE, DISK_PIECE, DISK_PIECE);
    munmap(to, DISK_PIECE);
}

/* Read the checkpoint's next DISK_PIECES from the disk, one after the other but for one a thread; returns the speed in GB/s. */
static double read_disk(Machine *m)
{
    ExpertCache *c = m->r->engine.experts;
    long long before = c->bytes_read;
    double start = now();
    parallel_for(m->r->engine.pool, DISK_PIECES, disk_piece, m);
    double speed = (double)(c->bytes_read - before) / (now() - start) / 1e9;
    m->disk_first += DISK_PIECES;
    c->bytes_read = before;
    return speed;
}

/* Values measured so far, ascending. */
typedef struct { int n; double value[BENCH_SAMPLES]; } Measured;

/* Takes in one more; callers take no more than BENCH_SAMPLES. */
static void measured_add(Measured *s, double value)
{
    int at = s->n++;
    for (; at > 0 && s->value[at - 1] > value; at--) s->value[at] = s->value[at - 1];
    s->value[at] = value;
}

static double median(const Measured *s) { return s->n ? s->value[s->n / 2] : 0; }

/* One thread's share of arithmetic. */
static void peak_item(void *arg, int item, int thread)
{
    (void)item, (void)thread;
    Machine *m = arg;
    float data[16] = {0};
    for (int i = 0; i < PEAK_REPEATS; i++) m->r->engine.kernels->peak(data, m->floats);
    atomic_fetch_add(&m->sum, (unsigned long long)data[0]);
}

/* Billions of operations a second on all threads, a multiplication and an addition counted as two: the best of five. */
static double peak(Machine *m, bool floats)
{
    float data[16] = {0};
    double operations = (double)PEAK_ITEMS * PEAK_REPEATS * m->r->engine.kernels->peak(data, floats), best = 0;
    m->floats = floats;
    for (int i = 0; i < 5; i++) {
        double start = now();
        parallel_for(m->r->engine.pool, PEAK_ITEMS, peak_item, m);
        best = fmax(best, operations / (now() - start) / 1e9);
    }
    return best;
}

/* A pseudo-random number below n, each run the same ones. */
static int bench_random(int n)
{
    static uint64_t seed = 1;
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (int)((seed >> 33) % (uint64_t)n);
}

/* Run n pseudo-random tokens, as one prompt or one by one; returns the seconds it took. */
static double bench_tokens(Run *r, int n, bool one_by_one)
{
    int *ids = grow(NULL, (size_t)n, sizeof *ids);
    for (int i = 0; i < n; i++) ids[i] = bench_random(r->engine.model.config.tokenizer_size);
    double start = now();
    if (one_by_one)
        for (int i = 0; i < n; i++) forward(&r->engine, ids + i, 1, KEPT), head_logits(&r->engine, 0, 1);
    else if (feed(r, ids, n, true)) last_logits(&r->engine);
    free(ids);
    return now() - start;
}

/* Where the time went: lines NAME_PART share %. */
static void bench_parts(const Run *r, const char *name, double seconds)
{
    static const char *const parts[] = {"projections", "deltanet", "attention", "experts", "head"};
    for (int i = 0; i < 5; i++) printf("%s_%s %.1f %%\n", name, parts[i], 100 * r->engine.seconds[i] / seconds);
    fflush(stdout);
}

/* What a benchmark called `name` read from the disk in `seconds`, counted anew from now on: lines NAME_... */
static void bench_disk(ExpertCache *c, const char *name, double tokens, double seconds, const Measured *disk)
{
    if (!c) return;
    double gb = (double)c->bytes_read / 1e9;
    printf("%s_found %.1f %%\n%s_from_disk %.6f GB/token\n%s_reading %.3f GB/s\n", name, experts_found(c), name,
           gb / tokens, name, gb / seconds);
    if (median(disk) > 0) /* 0: the file is smaller than a piece */
        printf("%s_disk_speed %.3f GB/s\n%s_of_disk %.1f %%\n", name, median(disk), name, 100 * gb / seconds / median(disk));
    experts_count_anew(c);
}

/* Prompts of n tokens, each from the same state, and between them the arithmetic's peak: the best seen counts.
 * prefill_of_peak: multiplications with the layers' matrices, as a share of it; all other work counts as time lost. */
static void bench_prefill(Run *r, Machine *m, const Snapshot *start, int n)
{
    Measured speed = {0}, disk = {0};
    ExpertCache *cache = r->engine.experts;
    double seconds = 0, int8 = 0, floats = 0;
    for (int i = -1; i < BENCH_ROUNDS && !interrupted; i++) { /* the first is not counted: it brings the weights in */
        int8 = fmax(int8, peak(m, false));
        floats = fmax(floats, peak(m, true));
        snapshot_restore(start, &r->engine);
        if (cache) measured_add(&disk, read_disk(m));
        if (i == 0) memset(r->engine.seconds, 0, sizeof r->engine.seconds);
        if (i == 0 && cache) experts_count_anew(cache);
        double took = bench_tokens(r, n, false);
        if (i >= 0) measured_add(&speed, n / took), seconds += took;
        show_progress(r, "prefill", i + 1, BENCH_ROUNDS, "prompts");
    }
    if (interrupted) return;
    printf("prefill_%d %.2f tok/s\nprefill_%d_slowest %.2f tok/s\nprefill_%d_fastest %.2f tok/s\n", n, median(&speed), n,
           speed.value[0], n, speed.value[speed.n - 1]);
    bench_parts(r, "prefill", seconds);
    bench_disk(cache, "prefill", (double)speed.n * n, seconds, &disk);
    double used = 2 * layers_cost(&r->engine.model).macs * median(&speed) / 1e9;
    printf("int8_peak %.1f GOP/s\nfloat_peak %.1f GFLOP/s\nprefill_of_peak %.1f %%\n", int8, floats,
           100 * used / (r->engine.model.quantized ? int8 : floats));
}

/* Decode n tokens; before each slice of a few read the file, so that both meet the same disturbances: their ratio is
 * the median over slices. What a token moves: the weights it meets, the recurrent state there and back, all keys and
 * values. */
static void bench_decode(Run *r, Machine *m, int n)
{
    const State *s = &r->engine.state;
    const Config *c = &r->engine.model.config;
    double seconds = 0, position = 2.0 * c->n_full * c->num_key_value_heads * c->head_dim * (double)KV_BYTES[s->kv_type];
    double bytes = bytes_per_token(&r->engine.model) + 2.0 * sizeof(float) * (double)s->recurrent_len +
                   position * (s->tokens.len + n / 2);
    Measured bandwidth = {0}, share = {0}, disk = {0};
    memset(r->engine.seconds, 0, sizeof r->engine.seconds);
    for (int left = n, slice; left > 0 && !interrupted; left -= slice) {
        slice = min_int(left, max_int(BENCH_SLICE, (n + BENCH_SAMPLES - 1) / BENCH_SAMPLES));
        if (r->engine.experts) measured_add(&disk, read_disk(m));
        double reading = read_some(m), took = bench_tokens(r, slice, true);
        seconds += took;
        measured_add(&bandwidth, reading);
        measured_add(&share, reading > 0 ? 100 * bytes * slice / took / 1e9 / reading : 0);
        show_progress(r, "decode", n - left + slice, n, "tokens");
    }
    if (interrupted) return;
    printf("decode_%d %.2f tok/s\n", n, n / seconds);
    bench_parts(r, "decode", seconds);
    bench_disk(r->engine.experts, "decode", n, seconds, &disk);
    printf("read_bandwidth %.2f GB/s\ndecode_bytes %.4f GB/token\ndecode_of_bandwidth %.1f %%\n", median(&bandwidth),
           bytes / 1e9, median(&share));
}

/* Steps of `drafts` drafts, each draft right with a probability of `percent`: draft, verify, take back. Returns tokens made;
 * their seconds are added to *seconds, the experts that a forward met in the last layer to *experts. */
static int bench_steps(Run *r, int drafts, int percent, int steps, double *seconds, double *experts)
{
    Engine *e = &r->engine;
    int tokens = 0;
    double start = now();
    for (int i = 0; i < steps; i++) {
        int ids[MAX_TRIAL] = {bench_random(e->model.config.tokenizer_size)}, kept = 1;
        double p;
        for (int k = 0; k < drafts; k++) ids[1 + k] = mtp_guess(e, ids[k], k, &r->drafter.list, &p);
        for (int k = 1; k <= drafts; k++) ids[k] = bench_random(e->model.config.tokenizer_size); /* so that routing varies */
        forward(e, ids, 1 + drafts, TRIAL);
        *experts += e->work.n_ffn - 1;
        head_logits(e, 0, 1 + drafts);
        while (kept <= drafts && bench_random(100) < percent) kept++;
        state_keep(e, 1 + drafts, kept);
        tokens += kept;
    }
    *seconds += now() - start;
    return tokens;
}

/* What drafting costs, and what it would bring at a given share of right drafts: steps with drafts and plain ones in turns. */
static void bench_drafts(Run *r, int drafts, int n)
{
    static const int right[] = {0, 50, 80, 100};
    for (size_t i = 0; i < sizeof right / sizeof *right && !interrupted; i++) {
        Measured gain = {0}, cost = {0};
        double all = 0, experts = 0;
        int tokens = 0, steps = 0;
        for (int done = 0; done < n && !interrupted; done += BENCH_SLICE) {
            double seconds = 0, plain = bench_tokens(r, BENCH_SLICE, true) / BENCH_SLICE;
            int made = bench_steps(r, drafts, right[i], BENCH_SLICE, &seconds, &experts);
            steps += BENCH_SLICE;
            show_progress(r, "drafts", min_int(done + BENCH_SLICE, n), n, "steps");
            all += seconds;
            tokens += made;
            if (gain.n == BENCH_SAMPLES) continue;
            measured_add(&cost, seconds / BENCH_SLICE / plain);
            measured_add(&gain, made * plain / seconds);
        }
        if (interrupted) return;
        printf("draft_%d_right_%d %.2f tok/s\ndraft_%d_right_%d_step %.3f plain\ndraft_%d_right_%d_gain %.3f x\ndraft_%d_right_%d_experts %.1f each\n",
               drafts, right[i], tokens / all, drafts, right[i], median(&cost), drafts, right[i], median(&gain), drafts, right[i],
               experts / steps);
        fflush(stdout);
    }
}

/* -m bench: lines of name, value, unit. */
static int mode_bench(Run *r)
{
    const Args *a = &r->args;
    int ctx = r->engine.state.ctx, depth = (int)a->depth;
    int prompt = a->prompt > 0 ? (int)a->prompt : 512, decode = a->n > 0 ? (int)a->n : 128;
    if (!depth && !a->prompt) prompt = min_int(prompt, ctx);
    if (!depth && a->n <= 0) decode = min_int(decode, ctx);
    int64_t drafted = a->draft > 0 ? 4 * ((int64_t)decode + BENCH_SLICE) * (2 + a->draft) : 0; /* by bench_drafts, at most */
    int64_t room = prompt > decode + drafted ? prompt : decode + drafted;
    if (depth + room > ctx)
        die("-m bench: wanted room for %lld tokens after a depth of %d, found a context of %d (-c)", (long long)room, depth, ctx);
    if (depth) bench_tokens(r, depth, false);
    Snapshot deep = {0};
    const ExpertCache *cache = r->engine.experts;
    Machine m = {.r = r, .weights = cache ? cache->arena : r->engine.model.file.data};
    m.total = cache ? 0 : r->engine.model.file.size / READ_PIECE;
    if (m.total > READ_WINDOW) m.total = READ_WINDOW;
    for (size_t i = 0; i < m.total; i += READ_PIECES) read_some(&m); /* not counted: brings the pages in */
    snapshot_take(&deep, &r->engine);
    bench_prefill(r, &m, &deep, prompt);
    snapshot_restore(&deep, &r->engine);
    if (!interrupted) bench_decode(r, &m, decode);
    if (!interrupted && a->draft > 0) bench_drafts(r, (int)a->draft, decode);
    hide_progress(r);
    printf("peak_memory %ld MB\n", peak_memory_mb());
    return interrupted ? signal_status() : 0;
}

/* ---- 21. Command line ---- */

typedef enum { TEXT, REAL, WHOLE, BYTES, FLAG } OptionKind;

typedef struct {
    const char *name, *letter; /* --name, -letter */
    OptionKind kind;
    size_t field;              /* offset in Args */
    double lo, hi;             /* of numbers, inclusive */
    const char *value, *help;
} Option;

#define AT(field) offsetof(Args, field)
static const Option OPTIONS[] = {
    {"mode", "m", TEXT, AT(mode), 0, 0, "MODE", "chat, generate, logits, perplexity, tokenize, bench, inspect, classify, tag, answer, trace"},
    {"input", "i", TEXT, AT(text), 0, 0, "TEXT", "the prompt; - reads standard input. answer: the question"},
    {"file", "f", TEXT, AT(file), 0, 0, "FILE", "the prompt from a file. answer: the text to answer from"},
    {"ids", NULL, FLAG, AT(ids), 0, 0, NULL, "prompt and output are token ids (tokenize: text in, ids out)"},
    {"output", "o", TEXT, AT(out), 0, 0, "FILE", "where logits writes: float32, [tokens][vocab]; trace: JSON lines of every token"},
    {"temp", "t", REAL, AT(temperature), 0, 100, "X", "temperature; 0 takes the likeliest token"},
    {"top-p", "p", REAL, AT(top_p), 0, 1, "X", "keep the likeliest tokens up to this probability"},
    {"top-k", "k", WHOLE, AT(top_k), 0, 1e9, "N", "keep the N likeliest tokens; 0: all"},
    {"min-p", NULL, REAL, AT(min_p), 0, 1, "X", "drop tokens below X times the likeliest one's probability"},
    {"presence-penalty", NULL, REAL, AT(presence), -100, 100, "X", "subtracted from logits of tokens in this answer"},
    {"repetition-penalty", NULL, REAL, AT(repetition), 1e-3, 100, "X", "divides logits of tokens in the text"},
    {"seed", "s", WHOLE, AT(seed), 0, 9e18, "N", "seed; default: the clock"},
    {"tokens", "n", WHOLE, AT(n), 0, 1e9, "N", "tokens to make (answer: at most); 0, the default: until it stops"},
    {"ctx", "c", WHOLE, AT(ctx), 1, 1 << 28, "N", "context; default: what the model was trained for"},
    {"yarn", NULL, REAL, AT(yarn), 1, 256, "X", "stretch the context to X times what the model was trained for, by YaRN"},
    {"system", "y", TEXT, AT(system), 0, 0, "TEXT", "system prompt"},
    {"tokenizer", "z", TEXT, AT(tokenizer), 0, 0, "FILE", "tokenizer; default: tokenizer.bin beside the model, the program, or here"},
    {"threads", "j", WHOLE, AT(threads), 1, MAX_THREADS, "N", "threads; default: the physical cores"},
    {"draft", "d", WHOLE, AT(draft), 0, MAX_DRAFT, "N", "tokens drafted by MTP a step, up to 8; 0: off; default: as many as pay"},
    {"load", NULL, TEXT, AT(load), 0, 0, "FILE", "go on with a saved conversation"},
    {"save", NULL, TEXT, AT(save), 0, 0, "FILE", "save the conversation at the end"},
    {"reasoning", "r", WHOLE, AT(thinking), 0, 1, "0|1", "chat: hide or show (default) what the model thinks before it answers"},
    {"echo", NULL, FLAG, AT(echo), 0, 0, NULL, "generate prints the prompt first"},
    {"memory", NULL, BYTES, AT(memory), 1, 1e15, "N", "bytes of weights to keep in memory, suffix M or G (2^20, 2^30); default: what is free"},
    {"dump", NULL, TEXT, AT(dump), 0, 0, "DIR", "a folder where logits and trace also write named intermediate tensors (.npy)"},
    {"cpu", NULL, TEXT, AT(cpu), 0, 0, "NAME", "force a kernel set: plain, avx2, avx512, neon"},
    {"kv", NULL, TEXT, AT(kv), 0, 0, "TYPE", "keys and values as f16 (default for quantized models), f32 or q8"},
    {"batch", NULL, WHOLE, AT(batch), 1, MAX_BATCH, "N", "tokens of the prompt read at a time; default 1024, more when experts come from disk"},
    {"depth", NULL, WHOLE, AT(depth), 0, 1 << 28, "N", "bench: positions to fill first"},
    {"prompt", NULL, WHOLE, AT(prompt), 1, 1 << 28, "N", "bench: tokens of the prompt; default 512 (decode: -n, default 128)"},
    {"quiet", "q", FLAG, AT(quiet), 0, 0, NULL, "no statistics or progress"},
    {"verbose", "v", FLAG, AT(verbose), 0, 0, NULL, "show special tokens and the ids fed"},
    {"help", "h", FLAG, AT(help), 0, 0, NULL, "this text"},
    {"version", NULL, FLAG, AT(version), 0, 0, NULL, "print the version"},
};
enum { N_OPTIONS = sizeof OPTIONS / sizeof *OPTIONS };

/* A bad command line: message and status 2. */
__attribute__((noreturn, format(PRINTF, 1, 2))) static void usage_error(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    say(format, args, " (-h lists the options)");
    va_end(args);
    exit(2);
}

/* -h: the option table as text. */
static void print_help(void)
{
    printf("usage: " PROGRAM " MODEL [options]\n\nRuns a Qwen3-Next checkpoint made by export.py. Without -m: chat when there is no prompt and\n"
           "standard input is a terminal, else generate.\n\n");
    for (int i = 0; i < N_OPTIONS; i++) {
        char left[64];
        const Option *o = &OPTIONS[i];
        snprintf(left, sizeof left, "%s%s%s--%s%s%s", o->letter ? "-" : "    ", o->letter ? o->letter : "", o->letter ? ", " : "",
                 o->name, o->value ? " " : "", o->value ? o->value : "");
        printf("  %-28s %s\n", left, o->help);
    }
}

/* The option an argument names; refuses unknown ones. */
static const Option *find_option(const char *arg)
{
    for (int i = 0; i < N_OPTIONS; i++) {
        const Option *o = &OPTIONS[i];
        if (arg[0] == '-' && arg[1] == '-' ? !strcmp(arg + 2, o->name) : o->letter && !strcmp(arg + 1, o->letter)) return o;
    }
    usage_error("%s: no such option", arg);
}

/* Store one option's value, checked against its range. */
static void set_option(Args *args, const Option *o, const char *arg, const char *value)
{
    char *field = (char *)args + o->field, *end;
    errno = 0;
    if (o->kind == FLAG) *(bool *)(void *)field = true;
    if (o->kind == TEXT) *(const char **)(void *)field = value;
    if (o->kind == WHOLE) {
        long long x = strtoll(value, &end, 10);
        if (end == value || *end || errno || (double)x < o->lo || (double)x > o->hi)
            usage_error("%s: wanted a whole number from %.0f to %.0f, found \"%s\"", arg, o->lo, o->hi, value);
        *(int64_t *)(void *)field = x;
    }
    if (o->kind == BYTES) {
        double x = strtod(value, &end);
        x *= *end == 'M' ? 0x1p20 : *end == 'G' ? 0x1p30 : 1;
        if (end == value || (*end && end[1]) || (*end && !strchr("MG", *end)) || !(x >= o->lo && x <= o->hi))
            usage_error("%s: wanted a number of bytes above 0, or of M or G, found \"%s\"", arg, value);
        *(uint64_t *)(void *)field = (uint64_t)x;
    }
    if (o->kind == REAL) {
        double x = strtod(value, &end);
        if (end == value || *end || !(x >= o->lo && x <= o->hi))
            usage_error("%s: wanted a number from %g to %g, found \"%s\"%s", arg, o->lo, o->hi, value,
                        !strcmp(o->name, "temp") ? " (threads: -j)" : "");
        *(double *)(void *)field = x;
    }
}

/* The command line as Args. Ends with status 2 when it is not valid. */
static Args parse_args(int argc, char **argv)
{
    Args a = {.temperature = NAN, .top_p = NAN, .min_p = NAN, .presence = NAN, .repetition = NAN, .yarn = NAN, .top_k = -1, .seed = -1, .n = 0,
              .ctx = -1, .threads = -1, .draft = -1, .thinking = -1};
    for (int i = 1; i < argc; i++) {
        if (argv[i][0] != '-' || !argv[i][1]) {
            if (a.model) usage_error("%s: one model is enough, %s was given before", argv[i], a.model);
            a.model = argv[i];
            continue;
        }
        const Option *o = find_option(argv[i]);
        if (o->kind != FLAG && i + 1 >= argc) usage_error("%s: wants a value: %s", argv[i], o->value);
        set_option(&a, o, argv[i], o->kind == FLAG ? NULL : argv[i + 1]);
        i += o->kind != FLAG;
    }
    return a;
}

/* engine: needs state and threads; watches: looks at `interrupted` by itself; head: what the model must have, N_HEADS: any */
typedef struct { const char *name; int (*run)(Run *r); bool engine, watches; HeadKind head; } Mode;

static const Mode MODES[] = {
    {"chat", mode_chat, true, true, CAUSAL_LM}, {"generate", mode_generate, true, true, CAUSAL_LM},
    {"logits", mode_logits, true, true, CAUSAL_LM}, {"perplexity", mode_perplexity, true, true, CAUSAL_LM},
    {"tokenize", mode_tokenize, false, false, N_HEADS}, {"bench", mode_bench, true, true, CAUSAL_LM},
    {"inspect", mode_inspect, false, false, N_HEADS}, {"classify", mode_classify, true, true, SEQUENCE_CLASSIFICATION},
    {"tag", mode_tag, true, true, TOKEN_CLASSIFICATION}, {"answer", mode_answer, true, true, QUESTION_ANSWERING},
    {"trace", mode_trace, true, true, N_HEADS}};
enum { N_MODES = sizeof MODES / sizeof *MODES };

/* The mode asked for, or the default for this prompt and terminal. */
static const Mode *choose_mode(Args *a)
{
    bool prompt = a->text || a->file;
    if (!a->mode) a->mode = !prompt && isatty(0) ? "chat" : "generate";
    for (int i = 0; i < N_MODES; i++)
        if (!strcmp(a->mode, MODES[i].name)) return &MODES[i];
    usage_error("-m %s: no such mode", a->mode);
}

/* A mode works with one kind of head. */
static void check_head(const Mode *mode, const Model *m)
{
    const Mode *other = MODES; /* that works with the one there is */
    if (mode->head == N_HEADS || mode->head == m->head.kind) return;
    while (other->head != m->head.kind) other++;
    die("%s: head: -m %s wants %s, found %s (-m %s)", m->file.path, mode->name, HEAD_NAMES[mode->head],
        HEAD_NAMES[m->head.kind], other->name);
}

/* The type of keys and values of this name, or N_KV. */
static KvType kv_named(const char *name)
{
    KvType type = KV_F32;
    while (type < N_KV && strcmp(name, KV_NAMES[type])) type++;
    return type;
}

/* Combinations that make no sense are refused, not ignored (but logits, perplexity, tokenize and inspect let -n pass). */
static void check_args(const Args *a)
{
    bool logits = !strcmp(a->mode, "logits");
    if (!a->model) usage_error("wanted a model, found none");
    bool answer = !strcmp(a->mode, "answer");
    if (!answer && a->text && a->file) usage_error("-i and -f: one prompt is enough");
    if (answer && !(a->text && a->file)) usage_error("-m answer: wants the question as -i TEXT and the text to answer from as -f FILE");
    if (answer && !strcmp(a->text, "-") && !strcmp(a->file, "-")) usage_error("-i - and -f -: standard input can be but one of them");
    if (logits && !a->out) usage_error("-m logits: wants -o FILE");
    bool trace = !strcmp(a->mode, "trace");
    if (!logits && !trace && a->out) usage_error("-o: only -m logits and -m trace write a file");
    if (!logits && !trace && a->dump) usage_error("--dump: goes with -m logits and -m trace");
    bool drafts = !strcmp(a->mode, "chat") || !strcmp(a->mode, "generate") || !strcmp(a->mode, "bench") || (logits && a->dump);
    if (a->draft > 0 && !drafts) usage_error("-d: goes with -m chat, generate and bench, and with -m logits --dump");
    if ((a->depth || a->prompt) && strcmp(a->mode, "bench")) usage_error("--%s: goes with -m bench", a->depth ? "depth" : "prompt");
    if (a->echo && strcmp(a->mode, "generate")) usage_error("--echo: goes with -m generate");
    if (a->system && strcmp(a->mode, "chat")) usage_error("-y: goes with -m chat");
    if (a->thinking >= 0 && strcmp(a->mode, "chat")) usage_error("-r: goes with -m chat");
    bool talks = !strcmp(a->mode, "chat") || !strcmp(a->mode, "generate");
    if (a->save && !*a->save) usage_error("--save: wanted the name of a file, found none");
    if (a->system && a->load) usage_error("-y: a saved conversation has its own system prompt");
    if ((a->load || a->save) && !talks) usage_error("--%s: goes with -m chat and generate", a->load ? "load" : "save");
    bool reads = trace || !strcmp(a->mode, "classify") || !strcmp(a->mode, "tag");
    if (a->n && reads) usage_error("-n: -m %s makes no tokens", a->mode);
    bool no_prompt = !strcmp(a->mode, "bench") || !strcmp(a->mode, "inspect");
    if (a->ids && (no_prompt || !strcmp(a->mode, "chat"))) usage_error("--ids: -m %s takes no ids", a->mode);
    if ((a->text || a->file) && no_prompt) usage_error("-%c: -m %s takes no prompt", a->text ? 'i' : 'f', a->mode);
    if (a->memory && (!strcmp(a->mode, "tokenize") || !strcmp(a->mode, "inspect"))) usage_error("--memory: -m %s keeps no weights", a->mode);
    if (a->kv && kv_named(a->kv) == N_KV) usage_error("--kv: wanted f16, f32 or q8, found \"%s\"", a->kv);
    static const char *const sets[] = {"plain", "avx2", "avx512", "neon"};
    bool known = !a->cpu;
    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++) known |= a->cpu && !strcmp(a->cpu, sets[i]);
    if (!known) usage_error("--cpu: wanted plain, avx2, avx512 or neon, found \"%s\"", a->cpu);
}

/* About how many bytes of scratch a token of a batch takes (work_init). */
static size_t scratch_per_token(const Config *c)
{
    int inner = max_int(max_int(c->moe_intermediate_size, c->shared_expert_intermediate_size), c->n_dense ? c->intermediate_size : 0);
    int mixer = max_int(c->conv_dim + c->value_dim, 2 * (c->num_attention_heads + c->num_key_value_heads) * c->head_dim);
    int floats = 5 * c->hidden_size + mixer + max_int(c->value_dim, c->num_attention_heads * c->head_dim) + c->num_experts;
    return sizeof(float) * ((size_t)floats + (size_t)(c->num_experts_per_tok + 1) * (size_t)inner) * 5 / 4; /* a quarter: as int8 */
}

/* Begin to read the tensors that every token uses, so that they are there when they are. */
static void read_always_used(const Model *m)
{
    const TensorRecord *t = m->tensors;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    for (uint32_t i = 0; i < m->header->n_tensors; i++) {
        size_t skip = t[i].offset % page; /* madvise wants whole pages */
        if (!strstr(t[i].name, "mlp.experts.")) madvise((void *)(m->file.data + t[i].offset - skip), t[i].size + skip, MADV_WILLNEED);
    }
}

/* Whether a file lies in memory already (in Linux's tmpfs), so that mapping it takes no more. */
static bool file_in_memory(const char *path)
{
#ifdef __linux__
    struct statfs info;
    return !statfs(path, &info) && info.f_type == 0x01021994; /* TMPFS_MAGIC */
#else
    return (void)path, false;
#endif
}

/* Bytes of memory to leave to everything but weights, keys and values: a margin of 1/32 of what is available, the recurrent
 * state twice, scratch for batches of so many tokens, and a chat's snapshots. */
static size_t memory_besides(const Run *r, size_t available, int batch)
{
    const State *s = &r->engine.state;
    size_t scratch = scratch_per_token(&r->engine.model.config) * (size_t)min_int(batch, s->ctx);
    return available / 32 + 2 * s->recurrent_len * sizeof(float) + scratch + (strcmp(r->args.mode, "chat") ? 0 : r->snapshot_bytes);
}

/* Bytes of the tensors that are not experts. */
static size_t always_used(const ExpertCache *c, size_t file)
{
    for (int i = 0; i < c->n_layers; i++)
        file -= (c->layer[i]->gate_up_proj.matrix_bytes + c->layer[i]->down_proj.matrix_bytes) * (size_t)c->num_experts;
    return file;
}

/* Decide what of the weights is kept in memory: all, mapped, when they fit into what is free (--memory: into that many
 * bytes); else what every token uses, mapped, and as many experts as there is room for. Returns the batch for prompts:
 * with experts from disk a large one, as each batch reads them anew. */
static int plan_memory(Run *r)
{
    Engine *e = &r->engine;
    const Args *a = &r->args;
    const Config *c = &e->model.config;
    size_t file = e->model.file.size, available = memory_available();
    int batch = a->batch ? (int)a->batch : DEFAULT_BATCH;
    r->snapshot_bytes = SNAPSHOT_BYTES;
    size_t all = file + memory_besides(r, available, batch) + kv_bytes(&e->state, c, min_int(e->state.ctx, PLANNED_CTX));
    if (a->memory ? a->memory >= file : all <= available || file_in_memory(a->model)) return batch;

    ExpertCache *cache = experts_plan(&e->model);
    int large = a->batch ? batch : min_int(LARGE_BATCH, max_int(DEFAULT_BATCH, (int)(available / 16 / scratch_per_token(c))));
    r->snapshot_bytes = min_size(SNAPSHOT_BYTES, available / 32);
    size_t fixed = always_used(cache, file), least = fixed + (size_t)cache->least * cache->slot_bytes;
    size_t keep = a->memory ? a->memory : available - min_size(available, memory_besides(r, available, large));
    if (keep < least || !cache->n_layers) {
        if (a->memory)
            die("--memory: wanted at least %zu bytes for what every token of %s uses and %d experts, found %llu", least, a->model,
                cache->n_layers ? cache->least : 0, (unsigned long long)a->memory);
        warn("%s: %zu MB are free, it takes %zu to run well: this will be slow, or end for want of memory", a->model, available >> 20, all >> 20);
        return batch;
    }
    size_t context = kv_bytes(&e->state, c, e->state.ctx);
    if (a->memory > available) warn("--memory: %zu MB are more than the %zu MB that are free", (size_t)a->memory >> 20, available >> 20);
    if (!a->memory && least + context > keep)
        warn("a context of %d positions, %zu MB, is more than what is free beside the weights (-c limits it)", e->state.ctx, context >> 20);
    cache->room = a->memory ? 0 : keep - fixed; /* --memory: exactly so many, whatever keys and values take */
    experts_start(cache, (keep - fixed) / cache->slot_bytes);
    e->experts = cache;
    read_always_used(&e->model);
    if (a->memory ? a->verbose : !a->quiet)
        fprintf(stderr, "%s, %zu MB, does not fit into %s, %zu MB: %d of %d experts are kept in memory, others read from disk\n", a->model, file >> 20,
                a->memory ? "--memory" : "what is free", (size_t)((a->memory ? a->memory : available) >> 20), cache->n_slots, cache->n_layers * cache->num_experts);
    return large;
}

/* Threads, kernels, state and scratch for the modes that run the model. */
static void start_engine(Run *r)
{
    Engine *e = &r->engine;
    const Args *a = &r->args;
    Config *c = &e->model.config;
    if (!isnan(a->yarn)) {
        if (e->model.rope_has_scaling) die("%s: rope_type: wanted default for --yarn, found a scaling of its own", a->model);
        stretch_rope(&e->model, a->yarn, c->max_position_embeddings, 32, 1, true);
        e->model.rope_magnitude = (float)(0.1 * log(a->yarn) + 1);
        c->max_position_embeddings = (int)fmin(c->max_position_embeddings * a->yarn, 1 << 28);
    }
    int ctx = a->ctx > 0 ? (int)a->ctx : c->max_position_embeddings;
    if (ctx > c->max_position_embeddings)
        die("-c %d: the model was made for at most %d positions%s", ctx, c->max_position_embeddings,
            e->model.rope_has_scaling || !isnan(a->yarn) ? "" : " (--yarn stretches them)");
    e->kernels = choose_kernels(a->cpu);
    e->pool = pool_create(a->threads > 0 ? (int)a->threads : physical_cores());
    e->dump_dir = a->dump;
    KvType kv_type = a->kv ? kv_named(a->kv) : e->model.quantized ? KV_F16 : KV_F32;
    bool drafts = !strcmp(a->mode, "chat") || !strcmp(a->mode, "generate") || a->draft > 0;
    if (a->draft > 0 && !e->model.mtp.fc.data) die("%s: tensor mtp.fc: missing: -d %lld wants an MTP head", a->model, (long long)a->draft);
    state_init(&e->state, c, ctx, kv_type, e->model.mtp.fc.data && drafts && a->draft != 0);
    r->drafter.fixed = (int)a->draft;
    if (e->state.mtp) shortlist_init(&r->drafter.list, c->vocab_size);
    work_init(e, min_int(plan_memory(r), ctx));
    uint64_t seed = a->seed >= 0 ? (uint64_t)a->seed : (uint64_t)time(NULL) ^ (uint64_t)getpid() << 32;
    sampler_init(&r->sampler, sampling_of(a, e->model.sampling), seed, c->tokenizer_size);
    if (a->verbose)
        fprintf(stderr, a->load && a->seed < 0 ? "kernels %s, threads %d, context %d\n" : "kernels %s, threads %d, context %d, seed %llu\n",
                e->kernels->name, pool_threads(e->pool), ctx, (unsigned long long)seed);
}

/* What is allocated lives until the program ends, which frees it: for AddressSanitizer, no leak. */
const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "detect_leaks=0"; }

int main(int argc, char **argv)
{
    fill_standard_files();
    catch_signals();
    Run r = {.args = parse_args(argc, argv)};
    if (r.args.help) return print_help(), end_output(), 0;
    if (r.args.version) return puts(PROGRAM " " VERSION), end_output(), 0;
    const Mode *mode = choose_mode(&r.args);
    check_args(&r.args);
    r.engine.model = open_model(r.args.model);
    check_head(mode, &r.engine.model);
    if (mode->engine) start_engine(&r);
    watching = mode->watches;
    int status = mode->run(&r);
    hide_progress(&r);
    if (status == 1) flush_output(); /* something has been said already */
    else end_output();
    report_experts(&r);
    if (r.engine.pool) pool_free(r.engine.pool);
    if (r.engine.experts) experts_stop(r.engine.experts);
    return leaving ? signal_status() : status;
}

#ifdef _WIN32

/* ---- 22. Windows: the part of POSIX that this program uses ---- */

#undef rename
typedef void *Handle;
#define IMPORT __declspec(dllimport)
#define CALL __stdcall
/* Declared here, as <windows.h> takes names that are used above. */
IMPORT void *CALL VirtualAlloc(void *at, size_t bytes, unsigned long kind, unsigned long protection);
IMPORT int CALL VirtualFree(void *p, size_t bytes, unsigned long kind);
IMPORT Handle CALL CreateFileMappingA(Handle file, void *security, unsigned long protection, unsigned long high, unsigned long low, const char *name);
IMPORT void *CALL MapViewOfFile(Handle mapping, unsigned long access, unsigned long high, unsigned long low, size_t bytes);
IMPORT int CALL UnmapViewOfFile(const void *p);
IMPORT int CALL CloseHandle(Handle handle);
IMPORT int CALL MoveFileExA(const char *from, const char *to, unsigned long flags);
IMPORT int CALL ReadFile(Handle file, void *to, unsigned long bytes, unsigned long *done, void *overlapped);
IMPORT unsigned long CALL GetActiveProcessorCount(unsigned short group);
IMPORT int CALL GlobalMemoryStatusEx(void *status);
IMPORT unsigned long CALL GetLastError(void);
IMPORT Handle CALL GetCurrentProcess(void);
IMPORT int CALL K32GetProcessMemoryInfo(Handle process, void *counters, unsigned long bytes);

/* Memory, or a whole file to read. Memory counts as used at once: Windows promises none that it may not have. */
static void *mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset)
{
    enum { RESERVE_AND_COMMIT = 0x3000, READ_WRITE = 4, READ_ONLY = 2, MAP_READ = 4 };
    (void)protection, (void)offset;
    errno = ENOMEM;
    if (flags & MAP_ANONYMOUS) {
        void *p = VirtualAlloc(at, bytes, RESERVE_AND_COMMIT, READ_WRITE);
        return p ? p : MAP_FAILED;
    }
    Handle mapping = CreateFileMappingA((Handle)_get_osfhandle(fd), NULL, READ_ONLY, 0, 0, NULL);
    void *p = mapping ? MapViewOfFile(mapping, MAP_READ, 0, 0, bytes) : NULL;
    if (mapping) CloseHandle(mapping);
    return p ? p : MAP_FAILED;
}

static int munmap(void *p, size_t bytes)
{
    enum { RELEASE = 0x8000 };
    (void)bytes;
    return UnmapViewOfFile(p) || VirtualFree(p, 0, RELEASE) ? 0 : -1;
}

static int madvise(void *p, size_t bytes, int advice)
{
    enum { RESET = 0x80000, READ_WRITE = 4 };
    if (advice == MADV_DONTNEED) VirtualAlloc(p, bytes, RESET, READ_WRITE); /* its contents are of no use */
    return 0;
}

static long sysconf(int name)
{
    struct { unsigned long size, load; uint64_t physical, rest[6]; } memory = {.size = sizeof memory};
    if (name == _SC_NPROCESSORS_ONLN) return (long)GetActiveProcessorCount(0xffff);
    if (name == _SC_PHYS_PAGES) return GlobalMemoryStatusEx(&memory) ? (long)(memory.physical / 4096) : 0;
    return 4096;
}

static ssize_t pread(int fd, void *to, size_t n, off_t offset)
{
    enum { END_OF_FILE = 38 };
    struct { uintptr_t internal[2]; uint64_t offset; Handle event; } at = {.offset = (uint64_t)offset};
    unsigned long done = 0;
    bool read = ReadFile((Handle)_get_osfhandle(fd), to, (unsigned long)min_size(n, 1 << 30), &done, &at);
    errno = EIO;
    return read || GetLastError() == END_OF_FILE ? (ssize_t)done : -1;
}

static void *memmem(const void *text, size_t n, const void *word, size_t length)
{
    for (const char *s = text; n >= length; s++, n--)
        if (!memcmp(s, word, length)) return (void *)(uintptr_t)s;
    return NULL;
}

static int replace_file(const char *from, const char *to)
{
    enum { REPLACE_EXISTING = 1, WRITE_THROUGH = 8 };
    errno = EACCES;
    return MoveFileExA(from, to, REPLACE_EXISTING | WRITE_THROUGH) ? 0 : -1;
}

static long peak_memory_kb(void)
{
    struct { unsigned long size, faults; size_t peak, rest[8]; } memory = {.size = sizeof memory};
    return K32GetProcessMemoryInfo(GetCurrentProcess(), &memory, sizeof memory) ? (long)(memory.peak / 1024) : 0;
}

#endif /* _WIN32 */

#ifdef FUZZ

/* ---- 23. Fuzzing: `make fuzz` ----
 * libFuzzer calls LLVMFuzzerTestOneInput with bytes of its making. They stand for one of the program's inputs, which one is
 * for QWEN3NEXT_FUZZ to say, and the program runs on it from the first line of main to its end. */

#include <setjmp.h>

enum { MAX_LIVE = 1 << 16 };

/* Files of the folder, and the words that stand for them in a command. */
static const struct { const char *word, *file; } FUZZ_FILES[] = {
    {"MODEL", "model.bin"}, {"TOKENIZER", "tokenizer.bin"}, {"ANSWER", "answer.bin"}};
enum { N_FUZZ_FILES = sizeof FUZZ_FILES / sizeof *FUZZ_FILES };

/* What a run is given and what it leaves behind. */
static struct {
    char input[64], file[N_FUZZ_FILES][PATH_MAX];         /* the files it may read; of all others there is but one: */
    char scratch[64], temporary[80];                      /* ... whatever their names are, and what becomes it */
    int fd;                                               /* of the input, which lies in memory */
    struct { void *p; size_t mapped; } live[MAX_LIVE];    /* memory it has: from malloc, or so many bytes mapped */
    int n_live;
    jmp_buf end;
} fuzz;

/* In place of exit. */
static void fuzz_exit(int status) { longjmp(fuzz.end, status + 1); }

/* Note memory; ends the process when there is no place for that. */
static void *fuzz_keep(void *p, size_t bytes)
{
    if (fuzz.n_live == MAX_LIVE) abort();
    fuzz.live[fuzz.n_live].p = p;
    fuzz.live[fuzz.n_live++].mapped = bytes;
    return p;
}

/* In place of free and munmap. */
static void fuzz_free(void *p)
{
    int i = fuzz.n_live - 1;
    while (i >= 0 && fuzz.live[i].p != p) i--;
    if (!p) return;
    if (i < 0) abort(); /* not ours, or not any more */
    if (!fuzz.live[i].mapped) (free)(p);
    else guard_rest(&(Mapping){.data = p, .size = fuzz.live[i].mapped}, false), (munmap)(p, fuzz.live[i].mapped);
    fuzz.live[i] = fuzz.live[--fuzz.n_live];
}

/* In place of realloc: 256 MB are all there is. */
static void *fuzz_realloc(void *old, size_t bytes)
{
    if (bytes > (size_t)1 << 28) return NULL;
    for (int i = fuzz.n_live - 1; i >= 0; i--)
        if (fuzz.live[i].p == old) return fuzz.live[i].p = (realloc)(old, bytes);
    return fuzz_keep((realloc)(NULL, bytes), 0);
}

/* In place of mmap. */
static void *fuzz_mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset)
{
    void *p = (mmap)(at, bytes, protection, flags, fd, offset);
    return p == MAP_FAILED ? p : fuzz_keep(p, bytes);
}

/* The file that a name stands for. */
static const char *fuzz_path(const char *path)
{
    size_t n = strlen(path);
    if (!strcmp(path, fuzz.input)) return path;
    for (int i = 0; i < N_FUZZ_FILES; i++)
        if (!strcmp(path, fuzz.file[i])) return path;
    return n > 4 && !strcmp(path + n - 4, ".tmp") ? fuzz.temporary : fuzz.scratch;
}

/* The inputs: how the program meets them (INPUT: the file), and where in one its own size stands (0: nowhere). */
static const struct { const char *name; size_t size_at; const char *commands[4]; } FUZZ_TARGETS[] = {
    {"checkpoint", offsetof(Header, file_size),
     {"INPUT -m inspect", "INPUT --ids -i 1\n0\n1 -n 12 -c 48 -s 1 -j 1 -q", "INPUT -m perplexity --ids -i 0\n1\n1 -c 48 -j 1 --cpu plain --kv q8 -q",
      "INPUT -m trace --ids -i 0\n1 -o kept -c 48 -j 1 -q"}},
    {"heads", offsetof(Header, file_size),
     {"INPUT -m classify --ids -i 1\n0 -c 48 -j 1 -q", "INPUT -m tag --ids -i 1\n0 -c 48 -j 1 -q",
      "INPUT -m answer -i Who? -f - -z TOKENIZER -c 96 -j 1 -q"}},
    {"tokenizer", offsetof(TokenizerHeader, file_size), {"MODEL -m tokenize -z INPUT -i The\nowl's\t12\té\u0323가각\u1112\u1161<|im_end|>...!"}},
    {"saved", offsetof(SavedHeader, file_size),
     {"MODEL --ids -n 3 -c 64 -j 1 -q --load INPUT --save kept", "MODEL -m chat -z TOKENIZER -n 3 -c 64 -j 1 -q --load INPUT"}},
    {"text", 0, {"MODEL -m tokenize -z TOKENIZER -f INPUT"}},
    {"spans", 0, {"ANSWER -m answer -i Who? -f INPUT -z TOKENIZER -c 96 -j 1 -q"}},
    {"chat", 0, {"MODEL -m chat -z TOKENIZER -n 3 -c 96 -s 1 -j 1 -q --save kept"}},
    {"options", 0, {NULL}}};

static const char FUZZ_LINES[] = "Hi\n/undo\n/regen\n/save kept\nAnd?\n/load kept\n/regen\n/show\n"; /* said after loading */

/* Make the input's file, or standard input, hold these bytes. */
static void fuzz_write(int fd, const void *data, size_t n)
{
    if (ftruncate(fd, 0) || pwrite(fd, data, n, 0) != (ssize_t)n || lseek(fd, 0, SEEK_SET)) abort();
}

/* Run the program; returns when it has ended. */
static void fuzz_run(const char *command)
{
    static char line[4096], *argv[64];
    int argc = 1, n = snprintf(line, sizeof line, "%s", command);
    for (char *word = line; word < line + n; word += strlen(word) + 1) {
        word[strcspn(word, " ")] = 0;
        argv[argc++] = !strcmp(word, "INPUT") ? fuzz.input : word;
        for (int i = 0; i < N_FUZZ_FILES; i++)
            if (!strcmp(word, FUZZ_FILES[i].word)) argv[argc - 1] = fuzz.file[i];
    }
    argv[0] = (char *)(uintptr_t)PROGRAM, argv[argc] = NULL;
    (unlink)(fuzz.scratch);
    if (!setjmp(fuzz.end)) program(argc, argv);
}

/* The command line that lines stand for, as far as it is looked at before anything is opened. */
static void fuzz_options(char *lines, size_t n)
{
    static char *argv[256];
    int argc = 1;
    for (char *word = lines; word < lines + n && argc < 255; word += strlen(word) + 1) {
        word[strcspn(word, "\n")] = 0;
        argv[argc++] = word;
    }
    if (setjmp(fuzz.end)) return;
    Args args = parse_args(argc, argv);
    if (args.help) print_help();
    choose_mode(&args);
    check_args(&args);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    const char *name = getenv("QWEN3NEXT_FUZZ");
    size_t target = 0, n_targets = sizeof FUZZ_TARGETS / sizeof *FUZZ_TARGETS;
    while (target < n_targets && strcmp(FUZZ_TARGETS[target].name, name ? name : "")) target++;
    if (target == n_targets || !getenv("QWEN3NEXT_FUZZ_FOLDER")) {
        fputs("QWEN3NEXT_FUZZ, QWEN3NEXT_FUZZ_FOLDER: wanted a target and a folder\n", stderr);
        (exit)(1);
    }
    if (!fuzz.fd) { /* the first */
        const char *folder = getenv("QWEN3NEXT_FUZZ_FOLDER");
        for (int i = 0; i < N_FUZZ_FILES; i++) snprintf(fuzz.file[i], sizeof fuzz.file[i], "%s/%s", folder, FUZZ_FILES[i].file);
        snprintf(fuzz.scratch, sizeof fuzz.scratch, "/tmp/qwen3next-fuzz-%ld", (long)getpid());
        snprintf(fuzz.temporary, sizeof fuzz.temporary, "%s.tmp", fuzz.scratch);
        fuzz.fd = memfd_create("input", 0);
        snprintf(fuzz.input, sizeof fuzz.input, "/proc/self/fd/%d", fuzz.fd);
        if (fuzz.fd < 0 || dup2(memfd_create("stdin", 0), 0) < 0) abort();
    }
    Str copy = {0};
    str_set(&copy, data, n);
    size_t size_at = FUZZ_TARGETS[target].size_at;
    if (size_at && n >= size_at + 8) memcpy(copy.data + size_at, &n, 8);
    fuzz_write(fuzz.fd, copy.data, n);
    fuzz_write(0, !strcmp(name, "chat") ? copy.data : FUZZ_LINES, !strcmp(name, "chat") ? n : strlen(FUZZ_LINES));
    if (!strcmp(name, "options")) fuzz_options(copy.data, n);
    for (int i = 0; i < 4 && FUZZ_TARGETS[target].commands[i]; i++) {
        fuzz_run(FUZZ_TARGETS[target].commands[i]);
        while (fuzz.n_live) fuzz_free(fuzz.live[fuzz.n_live - 1].p); /* all of it: the next one begins anew */
        memset(mapped, 0, sizeof mapped);
        interrupted = leaving = watching = output_error = 0, unfinished_file = NULL;
        atomic_flag_clear(&dying);
        clearerr(stdout);
    }
    while (fuzz.n_live) fuzz_free(fuzz.live[fuzz.n_live - 1].p);
    (unlink)(fuzz.scratch), (unlink)(fuzz.temporary);
    return 0;
}

#endif /* FUZZ */
#endif /* KERNEL_PASS */
