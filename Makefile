# qwen3next.c: `make run` to chat, `make test` to test, `make help` for the rest.
# CC and CFLAGS may be given on the command line: make CC=clang CFLAGS="-O2 -g".

CC     ?= cc
CFLAGS ?= -O3

# What the program needs in any build, whatever CFLAGS says.
BUILD = $(CC) -std=gnu11 -Wall -Wextra -Wshadow $(CFLAGS) -pthread

# Programs made by other tools go to folders that git ignores.
PYTHON = .venv/bin/python
PYTEST = -q --durations=10

# The engine. The binary is portable: kernels for newer processors carry their own target attributes
# inside the C file and are chosen when the program starts, so no -march is wanted here.
qwen3next: qwen3next.c Makefile           ## the program (default)
	$(BUILD) -o $@ $< -lm

# The shortest way to see it work: build, then chat with the small model that comes with the repository.
run: qwen3next                            ## build, then chat with the demo checkpoint
	./qwen3next demo/stories.bin

# Everything that is promised is tested here. The first run makes .venv and installs what the tests import.
test: qwen3next qwen3next-debug .venv/installed   ## run all tests
	$(PYTHON) -m pytest $(PYTEST) test_all.py

# Speed on this machine, and where the time goes, on made-up weights: drawn once into build/ (4.4 GB), then measured.
# BENCH says what to measure, for instance: make bench BENCH="-j 1 --prompt 2048".
bench: qwen3next build/bench-q8.bin build/bench-q4.bin   ## measure prefill, decode and what the machine can do
	for type in q8 q4; do ./qwen3next build/bench-$$type.bin -m bench $(BENCH) > build/bench-$$type.txt || exit; done
	@paste build/bench-q8.txt build/bench-q4.txt | awk 'BEGIN {printf "%-26s%12s%12s\n", "", "q8", "q4"} \
	  {printf "%-26s%12s%12s  %s\n", $$1, $$2, $$5, $$3}'

build/bench-%.bin: export.py Makefile | .venv/installed
	mkdir -p build
	printf '%s' '$(BENCH_CONFIG)' > build/bench-$*.json
	$(PYTHON) export.py --random build/bench-$*.json --seed 1 --type $* -o $@

# Layers exactly as in the released model, but 8 of its 48 and with 64 of 512 experts: 2.5 billion weights, 846 million of
# them met by a token.
BENCH_CONFIG = {"model_type": "qwen3_next", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 8, \
  "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "linear_num_key_heads": 16, \
  "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "num_experts": 64, \
  "num_experts_per_tok": 10, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, \
  "intermediate_size": 5120, "rope_theta": 10000000, "partial_rotary_factor": 0.25, "max_position_embeddings": 262144}

# `$(PYTHON) demo/plots.py measure MODEL` adds your machine's numbers to the table.
plots: .venv/installed                    ## draw demo/*.svg from demo/measured.tsv
	$(PYTHON) demo/plots.py draw

# The option table as a page for man (`man build/qwen3next.1`) and as completion for bash (`. build/qwen3next.bash`).
man: build/qwen3next.1                    ## a manual page, from what -h prints
build/qwen3next.1: qwen3next Makefile
	@mkdir -p build
	./qwen3next -h | awk 'NR == 1 { print ".TH QWEN3NEXT 1\n.SH NAME\nqwen3next - Qwen3-Next on a CPU\n.SH SYNOPSIS\n" substr($$0, 8) "\n.SH DESCRIPTION"; next } \
	  /^  / { if (!n++) print ".SH OPTIONS"; left = substr($$0, 3, 28); gsub(/^ +| +$$/, "", left); print ".TP\n.B " left "\n" substr($$0, 32); next } \
	  { print }' | sed 's/-/\\-/g' > $@

completion: build/qwen3next.bash          ## completion for bash, from what -h prints
build/qwen3next.bash: qwen3next Makefile
	@mkdir -p build
	./qwen3next -h | awk '/^  / { for (i = 1; i <= 2; i++) if ($$i ~ /^-/) { sub(/,$$/, "", $$i); words = words " " $$i } } \
	  /--mode/ { modes = $$0; sub(/.*MODE +/, "", modes); gsub(/,/, "", modes) } \
	  END { printf "_qwen3next() {\n  local words=\"%s\"\n  case $$3 in -m|--mode) words=\"%s\" ;; esac\n", words, modes; \
	  printf "  case $$2,$$3 in -*,*|*,-m|*,--mode) COMPREPLY=($$(compgen -W \"$$words\" -- \"$$2\")) ;; esac\n}\n"; \
	  print "complete -o default -F _qwen3next qwen3next" }' > $@

# Finds memory errors and undefined behaviour at the place where they happen. Slow; the tests use it on damaged files.
debug: qwen3next-debug                    ## build with AddressSanitizer and UndefinedBehaviorSanitizer
qwen3next-debug: qwen3next.c Makefile
	$(BUILD) -g -O1 -DFAULTS -fsanitize=address,undefined -fno-sanitize-recover=all -o $@ $< -lm

# Finds data races between the threads of the pool.
tsan: qwen3next-tsan                      ## build with ThreadSanitizer
qwen3next-tsan: qwen3next.c Makefile
	$(BUILD) -g -O1 -fsanitize=thread -o $@ $< -lm

# No vector instructions at all: for reading along in a debugger, and for processors without kernels of their own.
plain: qwen3next-plain                    ## build with the plain C kernels only
qwen3next-plain: qwen3next.c Makefile
	$(BUILD) -DPLAIN_ONLY -o $@ $< -lm

# ---- Other processors, libraries and systems. Each build is a program qwen3next-NAME of its own.

# For ARM, run by an emulator (Debian: gcc-aarch64-linux-gnu, qemu-user). What is run is a script that starts it.
arm: qwen3next-arm                        ## build for 64-bit ARM, to run under qemu
qwen3next-arm: qwen3next.c Makefile
	mkdir -p build
	aarch64-linux-gnu-gcc -std=gnu11 -Wall -Wextra -Wshadow $(CFLAGS) -pthread -static -o build/arm $< -lm
	printf '#!/bin/sh\nexec qemu-aarch64 "$${0%%/*}/build/arm" "$$@"\n' > $@
	chmod +x $@

# One file that runs on any Linux, whatever its C library (Debian: musl-tools).
musl: qwen3next-musl                      ## build a static program with musl
qwen3next-musl: qwen3next.c Makefile
	musl-gcc -std=gnu11 -Wall -Wextra -Wshadow $(CFLAGS) -pthread -static -o $@ $< -lm

# For Windows (Debian: mingw-w64); wine runs it, if there is one.
windows: qwen3next.exe                    ## build for Windows
qwen3next.exe: qwen3next.c Makefile
	x86_64-w64-mingw32-gcc -std=gnu11 -Wall -Wextra -Wshadow $(CFLAGS) -pthread -static -o $@ $< -lm

# The other compiler.
qwen3next-clang: qwen3next.c Makefile
	clang -std=gnu11 -Wall -Wextra -Wshadow $(CFLAGS) -pthread -o $@ $< -lm

# The same tests, of another build: make test-arm, test-musl, test-clang, test-plain, test-tsan, test-debug (AddressSanitizer).
# PYTEST="-k logits" chooses among them.
test-%: qwen3next-% qwen3next qwen3next-debug .venv/installed
	QWEN3NEXT=$< $(PYTHON) -m pytest $(PYTEST) test_all.py

# ---- Fuzzing: section 23 of qwen3next.c under libFuzzer (clang; Debian: libclang-rt-14-dev). Every target runs FUZZ_SECONDS;
# what it learns stays in build/fuzz, what makes it fail is build/fuzz/TARGET-crash-...
FUZZ_TARGETS ?= checkpoint heads tokenizer saved text spans chat options
FUZZ_SECONDS ?= 60
FUZZ_CC ?= clang
fuzz: qwen3next-fuzz build/fuzz/seeds     ## fuzz each input of the program for FUZZ_SECONDS=60
	for target in $(FUZZ_TARGETS); do mkdir -p build/fuzz/$$target-learned && QWEN3NEXT_FUZZ=$$target QWEN3NEXT_FUZZ_FOLDER=build/fuzz \
	  ./qwen3next-fuzz -max_total_time=$(FUZZ_SECONDS) -timeout=10 -rss_limit_mb=4096 -close_fd_mask=3 -artifact_prefix=build/fuzz/$$target- \
	  build/fuzz/$$target-learned build/fuzz/$$target > build/fuzz/$$target.log 2>&1 || { tail -n 40 build/fuzz/$$target.log; exit 1; }; \
	  echo $$target: $$(grep -a '^Done' build/fuzz/$$target.log), nothing found; done

qwen3next-fuzz: qwen3next.c Makefile
	$(FUZZ_CC) -std=gnu11 -Wall -Wextra -Wshadow -g -O1 -DFUZZ -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -pthread -o $@ $< -lm

build/fuzz/seeds: test_all.py | qwen3next .venv/installed
	$(PYTHON) test_all.py fuzz-seeds build/fuzz
	touch $@

# One place for the Python packages, away from the system's. Made again when requirements.txt changes.
.venv/installed: requirements.txt
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet -r requirements.txt
	touch $@

# The list that you get here is read from the ## comments above.
help:                                     ## list these targets
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

# Back to what git has. The virtual environment takes long to make, so it stays: rm -r .venv.
clean:                                    ## remove everything that was built
	rm -rf qwen3next qwen3next-debug qwen3next-tsan qwen3next-plain qwen3next-arm qwen3next-musl qwen3next-clang qwen3next-fuzz qwen3next.exe build

.PHONY: run test bench plots man completion debug tsan plain arm musl windows fuzz help clean
