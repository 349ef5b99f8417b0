"""Scores a demo checkpoint on demo/heldout.txt: does a story follow what was asked for, are its names consistent, are sums right?

    python demo/evaluate.py [MODEL] [--seed 1] [--only requests sums] [--samples FILE]

Prints a table of shares; --samples writes every text with its scores, to be read by hand. A text is drawn with the checkpoint's
own sampling settings and the seed 1000 * SEED + its number in its section; sums at temperature 0. The conversations of [turns] all have
the seed 1000 * SEED and no score, they are only written. All measures of stories are proxies.
"""

import argparse
import collections
import concurrent.futures
import pathlib
import re
import subprocess
import sys

from corpus import NUMBERS, read_held_out

HERE = pathlib.Path(__file__).resolve().parent
ENGINE = HERE.parent / "qwen3next"
SECTIONS = ("requests", "openings", "more requests", "more openings", "third requests", "third openings",
            "fourth requests", "fourth openings", "sums", "questions", "followups", "turns")
MOST = 1000   # tokens; a text of so many has not ended by itself
STATISTICS = re.compile(r"\[prompt \d+ tokens.*?; answer (\d+) tokens, [^;]*(?:; (\d+) of (\d+) drafts right)?; context .*\]\n")

# A refusal, in a way that fits any question that the model cannot answer.
UNKNOWN = ("don't know/do not know/don't really know/not know/not sure/can't/cannot/no idea/never heard/never learned/too hard/too big/"
           "beyond me/only know/wish I knew")
NOT_NAMES = set("""I I'm I'll I've I'd Mom Mommy Mama Mum Mother Dad Daddy Papa Father Grandma Grandpa Granny Gran Grandmother
    Grandfather Nana Aunt Auntie Uncle Sister Brother Cousin Mr Mrs Ms Miss Dr Sir Captain King Queen Prince Princess Lady Lord
    Old Little Big Professor Monday Tuesday Wednesday Thursday Friday Saturday Sunday
    Mondays Tuesdays Wednesdays Thursdays Fridays Saturdays Sundays January February March April May June July
    August September October November December Earth Mars Moon Sun North South East West Pole God Christmas Easter Halloween
    English French TV OK T-rex Komodo Dalmatian The End""".split())
SUM_WORDINGS = ("What is {a} {sign} {b}?", "{a} {word} {b}", "How much is {A} {word} {B}?")   # {A} {B}: in words


# 1. Running the engine

# What the model said, the tokens of it, and the drafts of its MTP head: those right and those made.
Answer = collections.namedtuple("Answer", "text tokens drafts_right drafts")


def engine(model, *options, text=None):
    """Run ./qwen3next and return its answers: the statistics that it prints behind each one divide them."""
    command = [str(ENGINE), str(model), "-j", "1", "-d", "1", *map(str, options)]
    done = subprocess.run(command, input=text, stdin=None if text else subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stdout}")
    pieces = STATISTICS.split(re.sub(r"^a new conversation begins\n", "", done.stdout, flags=re.M))
    return [Answer(said.strip("\n"), int(tokens), int(right or 0), int(drafts or 0))
            for said, tokens, right, drafts in zip(*(pieces[i::4] for i in range(4)))]


def chats(pool, model, conversations, *options):
    """[Answer] for each of CONVERSATIONS, (seed, system prompt or "", messages); many of them share a process, as new conversations. Raises
    ValueError when a message gets none, as it does where the context is full."""
    def part(some):
        lines = [line for seed, system, turns in some for line in (f"/system {system}".strip(), f"/set seed {seed}", *turns)]
        answers, wanted = engine(model, "-m", "chat", "-n", MOST, *options, text="\n".join(lines) + "\n"), sum(len(turns) for *_, turns in some)
        if len(answers) != wanted:
            raise ValueError(f"{model}: {len(answers)} answers to {wanted} messages; a conversation may have filled the context")
        answers = iter(answers)
        return [[next(answers) for _ in turns] for _, _, turns in some]
    parts = pool.map(part, [conversations[i:i + 20] for i in range(0, len(conversations), 20)])
    return [answers for answered in parts for answers in answered]


def completions(pool, model, openings):
    """How the model goes on with OPENINGS, each (seed, text)."""
    return list(pool.map(lambda o: engine(model, "-m", "generate", "-n", MOST, "-s", o[0], "-i", o[1])[0], openings))


# 2. Measures of one text

def forms(word):
    """WORD with its regular endings: bake bakes baked baking; hop hopped (but not hoped); pony ponies."""
    if word.endswith("*"):
        return {word}
    if word.endswith("y"):
        return {word, word + "s", word + "ed", word + "ing", word[:-1] + "ies", word[:-1] + "ied"}
    stem = word[:-1] if word.endswith("e") else word + word[-1] * bool(re.fullmatch(r"[^aeiou]*[aeiou][bdgmnprt]", word))
    return {word, word + "s", stem + "ed", stem + "ing"} | ({word + "es"} if re.search("([sxzo]|[cs]h)$", word) else set())


def pattern(alternatives):
    """What matches one of ALTERNATIVES, "mouse/mice/1", in any form; "bak*" whatever begins so."""
    words = set().union(*(forms(word) for word in alternatives.split("/") if word != "1"))
    parts = [re.escape(word).replace(r"\*", r"\w*") for word in sorted(words, key=len, reverse=True)]
    return re.compile(r"\b(?:" + "|".join(parts) + r")\b", re.I)


def brief(answer):
    """Whether an ANSWER to a question is no story."""
    return len(answer.text.split()) <= 60


def sentences(text):
    """The sentences of TEXT, also those inside of quotes."""
    text = re.sub(r"\b(Mr|Mrs|Ms|Dr)\.", r"\1", text)
    return [piece for piece in re.split(r'(?<=[.!?])["\']*\s+(?=["\']?[A-Z0-9])|\n+', text) if re.search(r"\w", piece)]


def story_of(answer):
    """The story in an ANSWER: without the sentence before it, as in "Sure! Here is a story about a fox."."""
    first, _, rest = answer.partition("\n\n")
    lead_in = len(first.split()) <= 20 and re.search(r"\b(story|tale|sure|course|okay)\b", first, re.I)
    return rest if lead_in and len(rest) > 2 * len(first) else answer


def matters(text, word):
    """Whether WORD is in two sentences of TEXT and in its second half; once is enough for "x/1". The name that TEXT gives to it
    counts, too: Pip in the story of "a fox named Pip"."""
    kind, name = f"(?i:{pattern(word).pattern})", r"([A-Z][a-z]+)\b"
    named = sum((re.findall(wording, text) for wording in (
        rf"{kind},? (?:named|called|by the name of|whose name was) {name}", rf"\b(?:[Hh]is|[Hh]er|[Mm]y) {kind} {name}",
        rf"\b{name} (?:was|is) (?:only |just )?(?:an?|the|no ordinary) (?:[a-z-]+ ){{0,2}}{kind}",
        rf"(?:^|[.!?] |\n|friend |and ){name} the (?:[a-z-]+ )?{kind}", rf"\b{name}, (?:an?|the) (?:[a-z-]+ ){{0,2}}{kind}(?=[,.]| who)")), [])
    found = re.compile("|".join([kind] + [rf"\b{name}\b" for name in set(named) - NOT_NAMES]))
    places = [match.start() for match in found.finditer(text)]
    if word.endswith("/1") or not places:
        return bool(places)
    return sum(bool(found.search(sentence)) for sentence in sentences(text)) > 1 and places[-1] >= len(text) / 2


def within(text):
    """TEXT without its first sentence and its last two, which may only say again what was asked for."""
    return " ".join(sentences(text)[1:-2])


def names_of(text):
    """The places of every name in TEXT: a capitalised word that somewhere begins neither a sentence nor a quote."""
    flat = re.sub(r"\b(Mr|Mrs|Ms|Dr)\.", r"\1 ", text)
    names = {match.group() for match in re.finditer(r"(?<=[a-z,;] )[A-Z][a-z]+(?:-[A-Z]?[a-z]+)?\b", flat)} - NOT_NAMES
    places = {name: [match.start() for match in re.finditer(rf"\b{name}\b", flat)] for name in names}
    return dict(sorted(places.items(), key=lambda item: item[1][0]))


def names_consistent(text):
    """Whether a first name in the first third of TEXT is in its last, too, and no name is said but once, in the last, unintroduced."""
    names, third = names_of(text), len(text) / 3
    hero = next(iter(names.values()), [0, len(text)])
    if hero[0] < third and hero[-1] < 2 * third:
        return False
    return not any(len(at) == 1 and at[0] > 2 * third and not re.search(
        rf"(named|called|I am|I'm|[Nn]ame is|[Nn]ame was|\b([Hh]is|[Hh]er|[Tt]heir|[Mm]y|[Aa]n?|[Tt]he)( [a-z]+){{1,3}}),? {name}\b", text)
        for name, at in names.items())


def repeated(text):
    """A sentence of three or more words that TEXT says twice, or None."""
    plain = [" ".join(re.findall(r"[\w']+", sentence.lower())) for sentence in sentences(text)]
    return next((sentence for sentence, n in collections.Counter(plain).items() if n > 1 and sentence.count(" ") > 1), None)


def number_in(answer):
    """The number that an ANSWER to a sum gives: the one behind "is", "=" ..., unless a sum begins there, else the last one; None if there
    is none."""
    found = re.findall(r"(\bis|=|\bmakes?|\bequals|\bgives|\bleaves|\bare|\bget)?\s*\b(\d+|" + "|".join(NUMBERS) + r")\b(?!\s*[-+])", answer.lower())
    value = lambda word: int(word) if word.isdigit() else NUMBERS.index(word)
    return next((value(word) for verb, word in found if verb), value(found[-1][1]) if found else None)


# 3. The sections

class Report:
    """Collects shares for the table and texts for --samples."""

    def __init__(self):
        self.shares, self.samples = {}, []

    def count(self, section, measure, good):
        self.shares.setdefault((section, measure), []).append(bool(good))

    def sample(self, *lines):
        self.samples.append("\n".join(lines) + "\n")

    def table(self):
        for (section, measure), values in self.shares.items():
            print(f"{section:15} {measure:30} {sum(values):6} of {len(values):5}  {100 * sum(values) / len(values):6.1f} %")


def stories(report, pool, model, data, section, seed):
    """[requests] or [openings], or more of them. Of an opening only what follows is searched for words; names and repetition are those
    of the whole."""
    unseen = re.compile(r"\b(" + "|".join(word for line in data["words"] for word in re.split(r"[,\s]+", line[0]) if word) + ")", re.I)
    lines, chat = data[section], section.endswith("requests")
    if chat:
        answers = [one[0] for one in chats(pool, model, [(seed + n, "", line[:1]) for n, line in enumerate(lines, 1)])]
    else:
        answers = completions(pool, model, [(seed + n, line[0]) for n, line in enumerate(lines, 1)])
    for number, ((asked, wanted), answer) in enumerate(zip(lines, answers), 1):
        story = story_of(answer.text) if chat else answer.text
        whole = story if chat else asked + story
        missing = [word for word in wanted.split() if not pattern(word).search(story)]
        idle = [word for word in wanted.split() if not matters(story, word)]
        middle = within(story)
        between = all(pattern(word).search(middle) for word in wanted.split())
        scores = {"followed: all words matter": not idle, "followed, and in between": not idle and between,
                  "appears: all words": not missing, "names consistent": names_consistent(whole),
                  "no repeated sentence": not repeated(whole), "ended by itself": answer.tokens < MOST}
        for measure, good in scores.items():
            report.count(section, measure, good)
        report.count(section, f"followed, {'with' if unseen.search(asked) else 'without'} unseen words", not idle)
        for word in wanted.split():
            report.count(section, "words that matter", word not in idle)
        for draft in range(answer.drafts):
            report.count(section, "drafts right (-d 1)", draft < answer.drafts_right)
        report.sample(f"== {section} {number}: {asked}", "-- fails: " + ", ".join(name for name, good in scores.items() if not good),
                      f"-- wanted {wanted}; missing: {' '.join(missing)}; idle: {' '.join(idle)}; "
                      f"names: {' '.join(names_of(whole))}; twice: {repeated(whole) or ''}", answer.text)


def sums(report, pool, model):
    """Every sum and difference to 20, each in all wordings, taking the likeliest token."""
    def ask(wording, a, sign, b):
        return wording.format(a=a, b=b, A=NUMBERS[a], B=NUMBERS[b], sign=sign, word={"+": "plus", "-": "minus"}[sign])
    tasks = [(wording, a, sign, b) for wording in SUM_WORDINGS for sign in "+-" for a in range(21) for b in range(21)
             if (a + b <= 20 if sign == "+" else b <= a)]
    wrong = []
    for (wording, a, sign, b), (answer,) in zip(tasks, chats(pool, model, [(1, "", [ask(*task)]) for task in tasks], "-t", "0")):
        right = number_in(answer.text) == (a + b if sign == "+" else a - b)
        report.count("sums", ask(wording, 7, sign, 5), right)
        report.count("sums", "all", right)
        wrong += [] if right else [f"{ask(wording, a, sign, b)} -> {answer.text[:80]!r}"]
    report.sample(f"== sums, {len(wrong)} wrong", *wrong)
    print(*wrong[:10], sep="\n", file=sys.stderr)


def questions(report, pool, model, lines, seed):
    """Small talk, facts and what the model cannot know; names and moods of system prompts."""
    kinds = [line[1].partition(":") for line in lines]
    answers = chats(pool, model, [(seed + n, kinds[n - 1][2].strip(), [line[0]]) for n, line in enumerate(lines, 1)])
    for (question, _, expected), (kind, _, system), (answer,) in zip(lines, kinds, answers):
        good = brief(answer) and pattern(expected or UNKNOWN).search(answer.text)
        report.count("questions", kind, good)
        report.count("questions", "all", good)
        report.sample(f"== question: {question} ({kind}{': ' + system if system else ''}) {'good' if good else 'WRONG'}", answer.text)


def followups(report, pool, model, lines, seed):
    """A story, then a question about what was asked for."""
    answers = chats(pool, model, [(seed + n, "", line[:2]) for n, line in enumerate(lines, 1)])
    for (request, question, expected), (story, answer) in zip(lines, answers):
        good = brief(answer) and all(pattern(word).search(answer.text) for word in expected.split())
        report.count("followups", "answer holds the word", good)
        report.sample(f"== followup: {request}", story.text, f"> {question} ({expected}) {'good' if good else 'WRONG'}", answer.text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=HERE / "stories.bin")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--samples", type=pathlib.Path, help="a file for all texts with their scores")
    args = parser.parse_args()
    if args.seed < 0:
        parser.error("--seed must be at least 0")
    if not ENGINE.exists():
        sys.exit(f"evaluate.py: {ENGINE}: not there; `make` builds it")
    samples = open(args.samples, "w") if args.samples else None
    data, report, seed = read_held_out(HERE / "heldout.txt", set(args.only) - {"sums"}), Report(), 1000 * args.seed
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for section in args.only:
            if section.endswith(("requests", "openings")):
                stories(report, pool, args.model, data, section, seed)
            elif section == "sums":
                sums(report, pool, args.model)
            elif section == "turns":
                for turns, answers in zip(data["turns"], chats(pool, args.model, [(seed, "", turns) for turns in data["turns"]])):
                    report.sample("== turns", *(line for turn, answer in zip(turns, answers) for line in (f"> {turn}", answer.text)))
            else:
                globals()[section](report, pool, args.model, data[section], seed)
    report.table()
    if args.samples:
        samples.write("\n".join(report.samples))
        samples.close()


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except OSError as error:
        sys.exit(f"evaluate.py: {error.filename or 'output'}: {error.strerror}")
    except ValueError as error:
        sys.exit(f"evaluate.py: {error}")
    except KeyboardInterrupt:
        sys.exit("evaluate.py: interrupted")
